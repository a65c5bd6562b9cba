//! The client: requests with our credentials over whichever connection stands, and whether the server answers.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderValue, USER_AGENT};
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::Body;
use tokio::sync::watch;
use tokio::time::timeout;

use super::access::{Access, AccessSettings};
use super::connect::{Connector, Unreachable};
use crate::state::problem::one_line;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(in crate::state) struct Timing {
    /// Until an answer begins, which a watch's does at once; finding the server included.
    pub(in crate::state) answer: Duration,
    /// A connection that says nothing for so long is asked whether it lives, and has so long to say so. The requests
    /// of a server that is stopped, or behind a cable that was pulled, end after both.
    pub(in crate::state) ping_after: Duration,
    /// See [`Self::ping_after`].
    pub(in crate::state) ping_answer: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            answer: Duration::from_secs(40),
            ping_after: Duration::from_secs(15),
            ping_answer: Duration::from_secs(10),
        }
    }
}

/// Whether the API server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contact {
    /// It was not asked yet.
    Unknown,
    /// It answered last time.
    Answers,
    /// It does not.
    Silent {
        /// Since when.
        since: SystemTime,
        /// Why the first request failed.
        reason: String,
    },
}

/// The Kubernetes cluster that this node belongs to: cheap to clone, to be made inside a runtime.
#[derive(Clone)]
pub struct Cluster {
    client: kube::Client,
    access: Arc<Access>,
    contact: watch::Receiver<Contact>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("contact", &*self.contact.borrow()).finish_non_exhaustive()
    }
}

impl Cluster {
    /// The cluster whose API server these settings find; connects when it is first asked something.
    pub fn new(settings: AccessSettings, wall: fn() -> SystemTime) -> Cluster {
        Cluster::with(settings, wall, Timing::default())
    }

    pub(in crate::state) fn with(
        settings: AccessSettings,
        wall: fn() -> SystemTime,
        timing: Timing,
    ) -> Cluster {
        let access = Arc::new(Access::new(settings));
        let (sender, contact) = watch::channel(Contact::Unknown);
        let http = legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .http2_keep_alive_interval(timing.ping_after)
            .http2_keep_alive_timeout(timing.ping_answer)
            .http2_keep_alive_while_idle(true)
            .build::<_, Body>(Connector::new(Arc::clone(&access)));
        let caller = Caller { http, access: Arc::clone(&access), contact: sender, wall, timing };
        let caller = Arc::new(caller);
        let service = tower::service_fn(move |request| {
            let caller = Arc::clone(&caller);
            async move { caller.ask(request).await }
        });
        Cluster { client: kube::Client::new(service, "default"), access, contact }
    }

    /// For requests.
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Whether the server answers, now and as it changes.
    pub fn contact(&self) -> watch::Receiver<Contact> {
        self.contact.clone()
    }

    pub(super) fn access(&self) -> Arc<Access> {
        Arc::clone(&self.access)
    }
}

struct Caller {
    http: legacy::Client<Connector, Body>,
    access: Arc<Access>,
    contact: watch::Sender<Contact>,
    wall: fn() -> SystemTime,
    timing: Timing,
}

impl Caller {
    async fn ask(&self, request: Request<Body>) -> Result<Response<Incoming>, CallError> {
        let answer = self.send(request).await;
        match &answer {
            Ok(answer) => {
                if answer.status() == StatusCode::UNAUTHORIZED {
                    self.access.refused();
                }
                self.contact
                    .send_if_modified(|now| std::mem::replace(now, Contact::Answers) != Contact::Answers);
            }
            Err(error) => {
                self.contact.send_if_modified(|now| match now {
                    // The first reason stays: others come and go with what is tried.
                    Contact::Silent { .. } => false,
                    Contact::Unknown | Contact::Answers => {
                        *now = Contact::Silent { since: (self.wall)(), reason: error.to_string() };
                        true
                    }
                });
            }
        }
        answer
    }

    async fn send(&self, mut request: Request<Body>) -> Result<Response<Incoming>, CallError> {
        let mut uri = std::mem::take(request.uri_mut()).into_parts();
        uri.scheme = Some(Scheme::HTTPS);
        uri.authority = Some(Authority::try_from(self.access.authority()).map_err(CallError::new)?);
        uri.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from_parts(uri).map_err(CallError::new)?;
        let agent = concat!("warren/", env!("CARGO_PKG_VERSION"));
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(agent));
        if let Some(header) = self.access.authorization().await.map_err(CallError)? {
            request.headers_mut().insert(AUTHORIZATION, header);
        }
        let patience = self.timing.answer;
        let answer = timeout(patience, self.http.request(request)).await;
        let answer = answer.map_err(|_| {
            CallError(format!("the API server did not answer within {} s", patience.as_secs()))
        })?;
        answer.map_err(CallError::new)
    }
}

/// Why there was no answer.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct CallError(String);

impl CallError {
    /// The innermost reason: the outer ones say "client error (Connect)".
    fn new(error: impl Error + 'static) -> CallError {
        let mut inner: &(dyn Error + 'static) = &error;
        loop {
            // It is made of lines that are fit for a log, and long.
            if let Some(unreachable) = inner.downcast_ref::<Unreachable>() {
                return CallError(unreachable.to_string());
            }
            match inner.source() {
                Some(source) => inner = source,
                None => {
                    return CallError(format!(
                        "the connection to it broke: {}",
                        one_line(&inner.to_string())
                    ));
                }
            }
        }
    }
}

/// What a request came to, in one line: the server's own words, or why there are none.
pub(in crate::state) fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => one_line(&status.message),
        kube::Error::Service(inner) if inner.is::<CallError>() => inner.to_string(),
        other => one_line(&other.to_string()),
    }
}

/// Whether there was no answer at all: [`Contact`] tells that, once for everybody.
pub(in crate::state) fn is_silence(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Service(_) | kube::Error::HyperError(_) | kube::Error::ReadEvents(_))
}
