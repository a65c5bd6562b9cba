//! The client: requests with our credentials over whichever connection stands, and whether the server answers.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderValue, USER_AGENT};
use hyper::http::Extensions;
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{CaptureConnection, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::Body;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::access::{Access, AccessSettings};
use super::connect::{Connector, Reached, Unreachable};
use super::random;
use crate::state::problem::one_line;

/// So many watches may begin within so long, four kinds a few times each; from then on each waits for a while.
const WATCHES: usize = 20;
const WATCHES_WITHIN: Duration = Duration::from_secs(10);
const WATCH_PAUSE: Duration = Duration::from_secs(1);

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
            answer: Duration::from_secs(35),
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
    caller: Arc<Caller>,
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
        let connector = Connector::new(Arc::clone(&access));
        let http = legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .http2_keep_alive_interval(timing.ping_after)
            .http2_keep_alive_timeout(timing.ping_answer)
            .http2_keep_alive_while_idle(true)
            .build::<_, Body>(connector.clone());
        let (current, watches) = (Mutex::default(), Mutex::default());
        let caller = Caller { http, connector, current, watches, access, contact: sender, wall, timing };
        let caller = Arc::new(caller);
        let asked = Arc::clone(&caller);
        let service = tower::service_fn(move |request| {
            let caller = Arc::clone(&asked);
            async move { caller.ask(request).await }
        });
        Cluster { client: kube::Client::new(service, "default"), caller, contact }
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
        Arc::clone(&self.caller.access)
    }

    /// An answer of the server began and did not go on: the next one has its turn.
    pub(super) fn stalled(&self) {
        if let Some(server) = self.caller.connector.last()
            && self.caller.connector.failed(&server, true, "its answers do not go on")
        {
            self.caller.leave();
        }
    }
}

struct Caller {
    http: legacy::Client<Connector, Body>,
    connector: Connector,
    /// The connection that was used last.
    current: Mutex<Option<CaptureConnection>>,
    /// When watches were begun, the last few.
    watches: Mutex<VecDeque<Instant>>,
    access: Arc<Access>,
    contact: watch::Sender<Contact>,
    wall: fn() -> SystemTime,
    timing: Timing,
}

impl Caller {
    async fn ask(&self, request: Request<Body>) -> Result<Response<Incoming>, CallError> {
        let is_read = request.method() == Method::GET;
        if is_watch(&request) {
            self.hold_back().await;
        }
        if self.connector.may_do_better() {
            self.leave();
        }
        let answer = self.send(request).await;
        match &answer {
            Ok(answer) => {
                self.judge(answer, is_read);
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

    /// Whether it is this server's fault. A write may fail anywhere for a reason of its own, such as somebody's webhook.
    fn judge(&self, answer: &Response<Incoming>, is_read: bool) {
        let status = answer.status();
        if status == StatusCode::UNAUTHORIZED {
            self.access.refused();
            // A client certificate is shown once for each connection, and its file may hold the next one.
            self.leave();
        }
        let Some(Reached(server)) = answer.extensions().get() else { return };
        match status.is_server_error() {
            true if is_read => {
                if self.connector.failed(server, false, &format!("it answers {status}")) {
                    self.leave();
                }
            }
            true => {}
            false => self.connector.worked(server),
        }
    }

    /// A server that ends every watch as soon as it has begun would be asked again at once, for ever.
    async fn hold_back(&self) {
        let now = Instant::now();
        let too_many = {
            let mut begun = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
            begun.push_back(now);
            let first = if begun.len() > WATCHES { begun.pop_front() } else { None };
            first.is_some_and(|first| now.saturating_duration_since(first) < WATCHES_WITHIN)
        };
        if too_many {
            sleep(WATCH_PAUSE + Duration::from_millis(random(500))).await;
        }
    }

    /// The next request makes a connection of its own. What is under way on this one goes on.
    fn leave(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(current) = current
            && let Some(connection) = current.connection_metadata().as_ref()
        {
            connection.poison();
        }
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
        let connection = capture_connection(&mut request);
        let answer = timeout(patience, self.http.request(request)).await;
        let mut extras = Extensions::new();
        if let Some(connected) = connection.connection_metadata().as_ref() {
            connected.get_extras(&mut extras);
        }
        if extras.get::<Reached>().is_some() {
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        }
        match answer {
            Ok(answer) => answer.map_err(CallError::new),
            Err(_) => {
                let why = format!("the API server did not answer within {} s", patience.as_secs());
                if let Some(Reached(server)) = extras.get()
                    && self.connector.failed(server, true, &why)
                {
                    self.leave();
                }
                Err(CallError(why))
            }
        }
    }
}

fn is_watch(request: &Request<Body>) -> bool {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1"))
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
