//! The Kubernetes API as a source: Nodes, Services, EndpointSlices and ServiceCIDRs, listed and then watched.
//!
//! - [`access`]: which API servers there are to ask, and as whom (`files`); `connect`: the first that answers
//! - [`client`]: requests, and since when nobody answers
//! - `watch`: one kind, for ever; `loose`: what of its objects is read, and that one that cannot be read costs itself
//!
//! While nobody answers nothing is removed: what was last said stays in force. What is needed of RBAC: `list` and
//! `watch` of `nodes`, `services`, `endpointslices.discovery.k8s.io` and `servicecidrs.networking.k8s.io`.

use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use tokio::sync::{mpsc, watch as channel};
use tokio::task::JoinSet;

use super::{Kind, Object, SourceEvent};
use crate::state::problem::{Problem, ProblemKind};

pub mod access;
pub mod client;
mod connect;
mod files;
mod loose;
mod watch;

pub use access::{AccessSettings, ServerUrl};
pub use client::{Cluster, Contact};

use watch::Watch;

/// What kube-proxy leaves out too: Services of another proxy, and those without an address.
const OURS: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// Where `--services off` leaves only this to know.
const API_SERVER: &str = "kubernetes.io/service-name=kubernetes";
/// The condition that says whether a node's network stands.
pub const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";

/// The source.
#[derive(Debug)]
pub struct KubeSource {
    cluster: Cluster,
    node: String,
    services: bool,
    stream_silence: Duration,
    page_silence: Duration,
    own: channel::Sender<Option<Arc<Node>>>,
}

impl KubeSource {
    /// The source of the node of that name, and its own Node as the API server has it. Without `services`, Services
    /// and their endpoints are not followed.
    pub fn new(
        cluster: Cluster,
        node: impl Into<String>,
        services: bool,
    ) -> (KubeSource, channel::Receiver<Option<Arc<Node>>>) {
        let (own, reader) = channel::channel(None);
        (
            KubeSource {
                cluster,
                node: node.into(),
                services,
                stream_silence: watch::STREAM_SILENCE,
                page_silence: watch::PAGE_SILENCE,
                own,
            },
            reader,
        )
    }

    /// Follows the cluster until nobody listens any more.
    pub async fn run(self, events: mpsc::Sender<SourceEvent>) {
        let client = || self.cluster.client();
        let (stream_silence, page_silence) = (self.stream_silence, self.page_silence);
        let mut tasks = JoinSet::new();

        let (node, own) = (self.node, self.own);
        let nodes = Watch {
            api: Api::all(client()),
            kind: Kind::Node,
            resource: "nodes",
            labels: None,
            optional: false,
            stream_silence,
            page_silence,
            cluster: self.cluster.clone(),
            object: node_fields,
        };
        tasks.spawn(nodes.run(events.clone(), async move |event: &SourceEvent| notice(&own, &node, event)));

        let cidrs = Watch {
            api: Api::all(client()),
            kind: Kind::ServiceCidr,
            resource: "servicecidrs.networking.k8s.io",
            labels: None,
            optional: true, // Kubernetes 1.33
            stream_silence,
            page_silence,
            cluster: self.cluster.clone(),
            object: |cidr: ServiceCIDR| Object::ServiceCidr(Arc::new(cidr)),
        };
        tasks.spawn(cidrs.run(events.clone(), async |_: &SourceEvent| {}));

        let slices = Watch {
            api: match self.services {
                true => Api::all(client()),
                false => Api::namespaced(client(), "default"),
            },
            kind: Kind::EndpointSlice,
            resource: "endpointslices.discovery.k8s.io",
            labels: Some(if self.services { OURS } else { API_SERVER }),
            optional: false,
            stream_silence,
            page_silence,
            cluster: self.cluster.clone(),
            object: |slice: EndpointSlice| Object::EndpointSlice(Arc::new(slice)),
        };
        let access = self.cluster.access();
        tasks.spawn(slices.run(events.clone(), async move |event: &SourceEvent| learn(&access, event).await));

        if self.services {
            let services = Watch {
                api: Api::all(client()),
                kind: Kind::Service,
                resource: "services",
                labels: Some(OURS),
                optional: false,
                stream_silence,
                page_silence,
                cluster: self.cluster.clone(),
                object: |service: Service| Object::Service(Arc::new(service)),
            };
            tasks.spawn(services.run(events.clone(), async |_: &SourceEvent| {}));
        }
        tasks.spawn(say_whether_it_answers(self.cluster.contact(), events));

        // A panic in one of them goes on here: without it the source would be silently incomplete.
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended
                && let Ok(panic) = error.try_into_panic()
            {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// Keeps our own Node, for those who write to it.
fn notice(own: &channel::Sender<Option<Arc<Node>>>, name: &str, event: &SourceEvent) {
    let ours = |object: &Object| match object {
        Object::Node(node) if node.metadata.name.as_deref() == Some(name) => Some(Arc::clone(node)),
        Object::Node(_)
        | Object::Service(_)
        | Object::EndpointSlice(_)
        | Object::Pod(_)
        | Object::ServiceCidr(_) => None,
    };
    let now = match event {
        SourceEvent::Apply(object) => match ours(object) {
            Some(node) => Some(node),
            None => return,
        },
        SourceEvent::Delete(key) if key.name == name => None,
        SourceEvent::Reset { objects, .. } => objects.iter().find_map(ours),
        SourceEvent::Delete(_) | SourceEvent::Problems { .. } => return,
    };
    own.send_if_modified(|before| std::mem::replace(before, now.clone()) != now);
}

/// Remembers where the API servers are, for a start without Services.
async fn learn(access: &access::Access, event: &SourceEvent) {
    let found = |object: &Object| match object {
        Object::EndpointSlice(slice) if access::is_api_server(slice) => {
            Some((object.key().name, access::endpoints(slice)))
        }
        Object::EndpointSlice(_)
        | Object::Node(_)
        | Object::Service(_)
        | Object::Pod(_)
        | Object::ServiceCidr(_) => None,
    };
    let (news, all) = match event {
        SourceEvent::Apply(object) => (found(object).into_iter().collect(), false),
        SourceEvent::Delete(key) if key.namespace == "default" => {
            (vec![(key.name.clone(), BTreeSet::new())], false)
        }
        SourceEvent::Reset { objects, complete, .. } => {
            (objects.iter().filter_map(found).collect(), *complete)
        }
        SourceEvent::Delete(_) | SourceEvent::Problems { .. } => (Vec::new(), false),
    };
    if let Err(error) = access.learn(news, all).await {
        tracing::warn!("where the API servers are cannot be saved: {error}");
    }
}

/// Says since when nobody answers; everything else goes on meanwhile.
async fn say_whether_it_answers(mut contact: channel::Receiver<Contact>, events: mpsc::Sender<SourceEvent>) {
    loop {
        let now = contact.borrow_and_update().clone();
        let problems = match &now {
            Contact::Unknown => None,
            Contact::Answers => Some(Vec::new()),
            Contact::Silent { since, reason } => {
                let since = Timestamp::try_from(*since).unwrap_or_default();
                let since = since.strftime("%Y-%m-%d %H:%M:%S UTC");
                let reason = format!("silent since {since}, and what it last said stays in force: {reason}");
                Some(vec![setting("API server", reason)])
            }
        };
        if let Some(problems) = problems {
            let news = SourceEvent::Problems { origin: "API server".to_owned(), problems };
            if events.send(news).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = contact.changed() => if changed.is_err() { return },
            () = events.closed() => return,
        }
    }
}

/// Of a Node's conditions only one is ours.
fn node_fields(mut node: Node) -> Object {
    if let Some(conditions) = node.status.as_mut().and_then(|status| status.conditions.as_mut()) {
        conditions.retain(|one| one.type_ == NETWORK_UNAVAILABLE);
    }
    Object::Node(Arc::new(node))
}

fn setting(subject: &str, reason: String) -> Problem {
    Problem { kind: ProblemKind::Setting, subject: subject.to_owned(), field: String::new(), reason }
}

/// Pauses between attempts that grow, up to a quarter of a minute, each partly by chance: when an API server comes back,
/// a thousand agents come back with it.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::state) struct Pauses(u32);

impl Pauses {
    const FIRST: Duration = Duration::from_millis(500);
    const LONGEST: Duration = Duration::from_secs(15);

    pub(in crate::state) fn next(&mut self) -> Duration {
        let full = (Self::FIRST * 2_u32.saturating_pow(self.0.min(16))).min(Self::LONGEST);
        self.0 = self.0.saturating_add(1);
        let half = full / 2;
        half + Duration::from_millis(random(half.as_millis() as u64 + 1))
    }

    pub(in crate::state) fn reset(&mut self) {
        self.0 = 0;
    }
}

/// A number below that one (0 for 0), different on every node; nothing secret depends on it.
fn random(below: u64) -> u64 {
    RandomState::new().hash_one(0_u8).checked_rem(below).unwrap_or_default()
}

#[cfg(test)]
pub(in crate::state) mod tests;
