//! Keeps this node's own Node object right in Kubernetes: its annotations, and the condition `NetworkUnavailable`.
//!
//! Annotations go by server-side apply under the field manager `warren`: ours and no others, and only when the Node
//! does not say what it should. The patch names the Node's UID, so that it never makes a Node, nor writes to
//! one that was replaced. The condition goes by a patch of that one condition, once packets flow; it stays when the
//! agent ends, because so does the network.
//!
//! Whoever changes them back meets growing pauses. RBAC: `patch` of `nodes` and of `nodes/status`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, NodeCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::Repairs;
use crate::state::annotations::{self, Announcement};
use crate::state::problem::{Problem, ProblemKind};
use crate::state::run::Clock;
use crate::state::source::SourceEvent;
use crate::state::source::kube::client::{is_silence, reason};
use crate::state::source::kube::{Cluster, NETWORK_UNAVAILABLE, Pauses};

/// Our name as a field manager.
pub const FIELD_MANAGER: &str = "warren";
/// How long the watch may take to show what we wrote, before we believe what it shows.
const ECHO: Duration = Duration::from_secs(10);

/// Keeps one Node right.
#[derive(Debug)]
pub struct NodeKeeper {
    /// The cluster.
    pub cluster: Cluster,
    /// The Node's name.
    pub node: String,
    /// The Node as the source last saw it.
    pub own: watch::Receiver<Option<Arc<Node>>>,
    /// What its annotations should say; `None` as long as that is not known.
    pub wanted: watch::Receiver<Option<Announcement>>,
    /// Whether packets flow.
    pub ready: watch::Receiver<bool>,
    /// Takes what is wrong.
    pub events: mpsc::WeakSender<SourceEvent>,
    /// The clocks.
    pub clock: Clock,
}

impl NodeKeeper {
    /// Keeps the Node right until the agent ends.
    pub async fn run(mut self) {
        let api: Api<Node> = Api::all(self.cluster.client());
        let mut annotations = Keeping::new("the annotations of this node's Node");
        let mut condition = Keeping::new("the condition NetworkUnavailable of this node's Node");
        loop {
            let node = self.own.borrow_and_update().clone();
            let wanted = self.wanted.borrow_and_update().clone();
            let ready = *self.ready.borrow_and_update();
            let mut again = None;
            if let Some(node) = &node {
                if let Some(wanted) = &wanted {
                    let change = annotate(node, wanted, &mut annotations.last);
                    again = self.keep(&api, node, change, &mut annotations).await;
                }
                if ready {
                    let change = network_is_there(node, (self.clock.wall)());
                    let later = self.keep(&api, node, change, &mut condition).await;
                    again = again.into_iter().chain(later).min();
                }
            }
            let pause = async move {
                match again {
                    Some(pause) => sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            let changed = tokio::select! {
                changed = self.own.changed() => changed,
                changed = self.wanted.changed() => changed,
                changed = self.ready.changed() => changed,
                () = pause => Ok(()),
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// Makes a change if one is needed and due; says when to look again, if nothing else happens.
    async fn keep(
        &self,
        api: &Api<Node>,
        node: &Node,
        change: Option<Change>,
        keeping: &mut Keeping,
    ) -> Option<Duration> {
        let now = (self.clock.now)();
        if let Some(left) = keeping.echo_left(node, now) {
            return Some(left);
        }
        let Some(change) = change else {
            keeping.pauses.reset();
            self.tell(keeping, None).await;
            return None;
        };
        if let Some(left) = keeping.failed.and_then(|(at, pause)| (at + pause).checked_duration_since(now))
            && !left.is_zero()
        {
            return Some(left);
        }
        if change.heals {
            let left = keeping.repairs.left(now);
            if !left.is_zero() {
                let why = "somebody keeps changing it: does another agent run with this node's name, or another \
                           network plugin?";
                self.tell(keeping, Some(why.to_owned())).await;
                return Some(left);
            }
        }
        let parameters = PatchParams { force: change.apply, ..PatchParams::apply(FIELD_MANAGER) };
        let patch = match change.apply {
            true => Patch::Apply(&change.body),
            false => Patch::Strategic(&change.body),
        };
        let answer = match change.status {
            false => api.patch(&self.node, &parameters, &patch).await,
            true => api.patch_status(&self.node, &parameters, &patch).await,
        };
        match answer {
            Ok(written) => {
                if change.heals {
                    tracing::info!("somebody had changed {}: mended", keeping.what);
                    keeping.repairs.done(now);
                }
                keeping.failed = None;
                keeping.pauses.reset();
                keeping.last = change.annotations;
                keeping.written = version(&written).map(|version| (version, now));
                self.tell(keeping, None).await;
                Some(ECHO)
            }
            Err(error) => {
                let pause = keeping.pauses.next();
                keeping.failed = Some((now, pause));
                // 409: the Node was replaced, and the source is about to say so.
                let expected = matches!(&error, kube::Error::Api(status) if status.code == 409);
                if !is_silence(&error) && !expected {
                    let resource = if change.status { "nodes/status" } else { "nodes" };
                    let allow = match &error {
                        kube::Error::Api(status) if status.is_forbidden() => {
                            format!("; its role must allow to patch {resource}")
                        }
                        _ => String::new(),
                    };
                    self.tell(keeping, Some(format!("cannot be written: {}{allow}", reason(&error)))).await;
                }
                Some(pause)
            }
        }
    }

    async fn tell(&self, keeping: &mut Keeping, problem: Option<String>) {
        if keeping.told == problem {
            return;
        }
        let wrong = |reason: &String| Problem {
            kind: ProblemKind::Setting,
            subject: keeping.what.to_owned(),
            field: String::new(),
            reason: reason.clone(),
        };
        let problems = problem.iter().map(wrong).collect();
        // Only the source keeps the state line alive.
        if let Some(events) = self.events.upgrade() {
            let _ = events.send(SourceEvent::Problems { origin: keeping.what.to_owned(), problems }).await;
        }
        keeping.told = problem;
    }
}

/// One thing that is kept right.
struct Keeping {
    what: &'static str,
    repairs: Repairs,
    pauses: Pauses,
    /// When a write last failed, and how long to wait then.
    failed: Option<(Instant, Duration)>,
    /// The version of the Node that we made, and when: what is older says nothing about it.
    written: Option<(u64, Instant)>,
    /// The annotations that we last wrote.
    last: Option<Vec<(String, String)>>,
    told: Option<String>,
}

impl Keeping {
    fn new(what: &'static str) -> Keeping {
        Keeping {
            what,
            repairs: Repairs::default(),
            pauses: Pauses::default(),
            failed: None,
            written: None,
            last: None,
            told: None,
        }
    }

    /// How long the watch may still show what was before our own change.
    fn echo_left(&mut self, node: &Node, now: Instant) -> Option<Duration> {
        let (written, at) = self.written?;
        let left = (at + ECHO).checked_duration_since(now).filter(|left| !left.is_zero());
        match left {
            Some(left) if version(node).is_some_and(|shown| shown < written) => Some(left),
            Some(_) | None => {
                self.written = None;
                None
            }
        }
    }
}

/// Numbers that grow, by KEP-5504; where they are not, nothing is waited for.
fn version(node: &Node) -> Option<u64> {
    node.metadata.resource_version.as_deref()?.parse().ok()
}

/// A patch.
struct Change {
    body: Value,
    /// Server-side apply; else a strategic merge.
    apply: bool,
    status: bool,
    /// Whether we said the same before, so that somebody must have changed it.
    heals: bool,
    annotations: Option<Vec<(String, String)>>,
}

/// The annotations that are not as they should be, if any.
fn annotate(node: &Node, wanted: &Announcement, last: &mut Option<Vec<(String, String)>>) -> Option<Change> {
    let rendered = annotations::render(wanted);
    let none = std::collections::BTreeMap::new();
    let found = node.metadata.annotations.as_ref().unwrap_or(&none);
    let is_right = rendered.iter().all(|(name, value)| found.get(name) == Some(value));
    let pairs: Vec<(String, String)> = rendered.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    // What an earlier agent said besides goes with the first apply; what somebody else adds is theirs.
    let is_more =
        || annotations::published().any(|name| found.contains_key(name) && !rendered.contains_key(name));
    let needed = match last {
        Some(last) if *last == pairs => !is_right,
        Some(_) => true,
        None => !is_right || is_more(),
    };
    if !needed {
        // Said by an agent before us: from now on a change is somebody else's.
        last.get_or_insert(pairs);
        return None;
    }
    let heals = last.as_ref() == Some(&pairs);
    let body = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node.metadata.name, "uid": node.metadata.uid, "annotations": rendered },
    });
    Some(Change { body, apply: true, status: false, heals, annotations: Some(pairs) })
}

/// The condition, if it is missing or says that there is no network.
fn network_is_there(node: &Node, wall: std::time::SystemTime) -> Option<Change> {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let found = conditions.iter().find(|condition| condition.type_ == NETWORK_UNAVAILABLE);
    if found.is_some_and(|condition| condition.status == "False") {
        return None;
    }
    let now = Time(Timestamp::try_from(wall).unwrap_or_default());
    let condition = NodeCondition {
        type_: NETWORK_UNAVAILABLE.to_owned(),
        status: "False".to_owned(),
        reason: Some("WarrenIsUp".to_owned()),
        message: Some("Warren carries this node's packets".to_owned()),
        last_heartbeat_time: Some(now.clone()),
        last_transition_time: Some(now),
    };
    // The UID: a Node that was replaced is none of ours yet.
    let body = json!({ "metadata": { "uid": node.metadata.uid }, "status": { "conditions": [condition] } });
    Some(Change { body, apply: false, status: true, heals: found.is_some(), annotations: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::source::kube::tests::fake::{Fake, Manners, until};
    use crate::state::source::kube::{KubeSource, tests};

    fn node(annotations: Value, conditions: Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "a", "uid": "u-1", "resourceVersion": "7", "annotations": annotations},
            "status": {"conditions": conditions},
        }))
        .unwrap()
    }

    fn announcement(keepalive: u16) -> Announcement {
        Announcement { keepalive, location: Some("home".to_owned()), ..Announcement::default() }
    }

    #[test]
    fn only_what_is_not_right_is_written() {
        let right = json!({"warren.dev/protocol": "1", "warren.dev/location": "home", "example.com/x": "y"});
        let more =
            json!({"warren.dev/protocol": "1", "warren.dev/location": "home", "warren.dev/keepalive": "25"});
        let wrong = json!({"warren.dev/protocol": "1", "warren.dev/location": "away"});
        let mut last = None;
        assert!(annotate(&node(right.clone(), json!([])), &announcement(0), &mut last).is_none());
        // Said before by somebody; then what is changed is healed, and what is added is not ours.
        let change = annotate(&node(wrong.clone(), json!([])), &announcement(0), &mut last).unwrap();
        assert!(change.heals && change.apply && !change.status);
        assert_eq!(change.body["metadata"]["uid"], "u-1");
        let written = json!({"warren.dev/protocol": "1", "warren.dev/location": "home"});
        assert_eq!(change.body["metadata"]["annotations"], written);
        assert!(annotate(&node(more.clone(), json!([])), &announcement(0), &mut last).is_none());
        // Something new to say is no repair, and neither is what an earlier agent left.
        assert!(!annotate(&node(right, json!([])), &announcement(25), &mut last).unwrap().heals);
        for found in [more, wrong, json!(null)] {
            let change = annotate(&node(found, json!([])), &announcement(0), &mut None).unwrap();
            assert!(!change.heals);
        }
    }

    #[test]
    fn the_condition_is_written_when_it_is_missing_or_says_no() {
        let at = std::time::UNIX_EPOCH + Duration::from_secs(1);
        for (conditions, heals) in [
            (json!(null), Some(false)),
            (json!([{"type": "Ready", "status": "True"}]), Some(false)),
            (json!([{"type": "NetworkUnavailable", "status": "True"}]), Some(true)),
            (json!([{"type": "NetworkUnavailable", "status": "Unknown"}]), Some(true)),
            (json!([{"type": "NetworkUnavailable", "status": "False", "reason": "Other"}]), None),
        ] {
            let change = network_is_there(&node(json!({}), conditions.clone()), at);
            assert_eq!(change.as_ref().map(|change| change.heals), heals, "{conditions}");
            if let Some(change) = change {
                let condition = &change.body["status"]["conditions"][0];
                assert_eq!(
                    (&condition["status"], &condition["reason"]),
                    (&json!("False"), &json!("WarrenIsUp"))
                );
                assert!(
                    change.body["status"].as_object().unwrap().len() == 1 && change.status && !change.apply
                );
                assert!(condition["lastTransitionTime"].as_str().unwrap().starts_with("1970-01-01T00:00:01"));
            }
        }
    }

    /// The keeper of Node `a` against a server.
    struct Scene {
        wanted: watch::Sender<Option<Announcement>>,
        ready: watch::Sender<bool>,
        events: mpsc::Receiver<SourceEvent>,
        tasks: tokio::task::JoinSet<()>,
    }

    fn scene(fake: &Fake) -> Scene {
        #[expect(clippy::disallowed_methods, reason = "the agent would pass io::clock")]
        let clock = Clock { now: Instant::now, wall: std::time::SystemTime::now };
        let cluster = Cluster::with(fake.access(), clock.wall, tests::quick());
        let (source, own) = KubeSource::new(cluster.clone(), "a", true);
        let (sender, mut objects) = mpsc::channel(64);
        let (telling, events) = mpsc::channel(64);
        let (wanted, wants) = watch::channel(None);
        let (ready, is_ready) = watch::channel(false);
        let keeper = NodeKeeper {
            cluster,
            node: "a".to_owned(),
            own,
            wanted: wants,
            ready: is_ready,
            events: telling.downgrade(),
            clock,
        };
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(source.run(sender));
        tasks.spawn(keeper.run());
        tasks.spawn(async move { while objects.recv().await.is_some() {} });
        tasks.spawn(async move {
            let _keeps_it_open = telling;
            std::future::pending::<()>().await;
        });
        Scene { wanted, ready, events, tasks }
    }

    #[tokio::test]
    async fn the_node_says_what_we_announce_and_is_healed() {
        let fake = Fake::start(&["kubernetes.default.svc"], Manners::default()).await;
        let mut scene = scene(&fake);
        scene.wanted.send_replace(Some(announcement(25)));
        // No Node: none is made.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(fake.patches().len(), 0);
        fake.put("nodes", tests::node("a", "10.1.0.0/24"));
        let says = |name: &str| fake.get("nodes", "a")["metadata"]["annotations"][name].clone();
        until("the annotations", || says("warren.dev/keepalive") == "25").await;
        let (path, patch) = fake.patches()[0].clone();
        assert_eq!((path.as_str(), &patch["metadata"]["uid"]), ("nodes/a", &json!("uid-a")));
        let names: Vec<String> =
            patch["metadata"]["annotations"].as_object().unwrap().keys().cloned().collect();
        assert!(names.iter().all(|name| name.starts_with("warren.dev/")), "{names:?}");
        assert!(fake.requests().iter().any(|line| {
            line.starts_with("PATCH") && line.contains("fieldManager=warren") && line.contains("force=true")
        }));

        // Somebody removes one; another annotation is theirs.
        let mut object = fake.get("nodes", "a");
        object["metadata"]["annotations"] = json!({"example.com/x": "y", "warren.dev/location": "away"});
        fake.put("nodes", object);
        until("the repair", || says("warren.dev/keepalive") == "25" && says("warren.dev/location") == "home")
            .await;
        assert_eq!(says("example.com/x"), "y");
        let before = fake.patches().len();
        fake.put("nodes", fake.get("nodes", "a"));
        // Nothing is to be said until packets flow, and nothing twice.
        assert_eq!(fake.get("nodes", "a")["status"]["conditions"][0]["type"], "Ready");
        scene.ready.send_replace(true);
        let condition = || fake.get("nodes", "a")["status"]["conditions"][0].clone();
        until("the condition", || condition()["type"] == "NetworkUnavailable").await;
        assert_eq!(
            (condition()["status"].clone(), condition()["reason"].clone()),
            (json!("False"), json!("WarrenIsUp"))
        );
        let patches = fake.patches();
        assert_eq!((patches.len(), patches[before].0.as_str()), (before + 1, "nodes/a/status"));

        // Somebody insists: the pauses grow, and it is said.
        for _ in 0..40 {
            let mut object = fake.get("nodes", "a");
            object["metadata"]["annotations"]["warren.dev/location"] = json!("away");
            fake.put("nodes", object);
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        assert!(fake.patches().len() < before + 6, "{}", fake.patches().len());
        let said = scene.events.recv().await.unwrap();
        let SourceEvent::Problems { problems, .. } = said else { panic!("{said:?}") };
        assert!(problems[0].reason.contains("somebody keeps changing it"), "{problems:?}");
        scene.tasks.abort_all();
    }

    #[tokio::test]
    async fn what_is_not_allowed_is_said_and_a_replaced_node_is_followed() {
        let fake = Fake::start(&["kubernetes.default.svc"], Manners::default()).await;
        let mut scene = scene(&fake);
        fake.put("nodes", tests::node("a", "10.1.0.0/24"));
        until("the Node is watched", || fake.requests().iter().any(|line| line.contains("/nodes"))).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        fake.manners(|manners| {
            manners.forbidden.insert("nodes".to_owned());
        });
        scene.wanted.send_replace(Some(announcement(25)));
        let said = scene.events.recv().await.unwrap();
        let SourceEvent::Problems { problems, .. } = said else { panic!("{said:?}") };
        assert!(problems[0].reason.contains("its role must allow to patch nodes"), "{problems:?}");
        fake.manners(|manners| manners.forbidden.clear());
        let says = |name: &str| fake.get("nodes", "a")["metadata"]["annotations"][name].clone();
        until("the annotations", || says("warren.dev/keepalive") == "25").await;
        let said = scene.events.recv().await.unwrap();
        assert!(matches!(said, SourceEvent::Problems { problems, .. } if problems.is_empty()));

        fake.remove("nodes", "a");
        let mut other = tests::node("a", "10.2.0.0/24");
        other["metadata"]["uid"] = json!("uid-other");
        fake.put("nodes", other);
        until("the other Node's annotations", || says("warren.dev/keepalive") == "25").await;
        scene.tasks.abort_all();
    }
}
