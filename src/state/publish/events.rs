//! Events on Nodes, for those who look with `kubectl describe node`: what is wrong with what a node announced, what
//! it claims of another's, and when its keys are others than before.
//!
//! Each node tells what concerns itself. What concerns another is told by three of the nodes, chosen by name, because
//! that one may have no agent, or a bad one. The Event's name is made from the teller's and from what it says: told
//! twice it is one, and nobody else can take the name with something harmless before. It is told again after an hour,
//! when the API server has forgotten it. So many at a time and no more; what the API server did not take is told later.
//!
//! RBAC: `create` of `events.events.k8s.io` in the namespace `default`, where a Node's Events live. The policy of
//! `deploy/` holds a teller to its name.

use std::collections::{HashMap, VecDeque};
use std::hash::Hasher as _;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use siphasher::sip::SipHasher24;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::snapshot::{Peer, PublicKey, Snapshot};
use crate::state::problem::{Problem, ProblemKind};
use crate::state::run::{Clock, StateReport};
use crate::state::source::kube::client::reason;
use crate::state::source::kube::{Cluster, Pauses};

/// How many of the nodes tell what concerns another one.
const TELLERS: usize = 3;
/// How often it is looked what there is to tell.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// What is over sooner is not told: an agent that starts finds its old keys announced.
const SETTLED: Duration = Duration::from_secs(3);
/// Most Events at a time, and how soon there is room for another one.
const BURST: u32 = 10;
const ROOM_EVERY: Duration = Duration::from_secs(10);
/// How soon one that was refused is told again: rights may come.
const REFUSED_AGAIN: Duration = Duration::from_secs(60);
/// An API server keeps Events for an hour (--event-ttl).
const AGAIN: Duration = Duration::from_secs(3660);
/// Most that is remembered as told.
const MAX_TOLD: usize = 1024;
/// Most that happened once and is still to be told.
const MAX_ONCE: usize = 64;
/// validateV1EventCreate: a note has so many bytes at most, and the instance so many.
const MAX_NOTE: usize = 1024;
const MAX_INSTANCE: usize = 128;
/// Most of the teller's name in the Event's, which has 253 characters at most: a dot and 16 more follow.
const MAX_STEM: usize = 236;

/// Tells Events.
#[derive(Debug)]
pub struct Teller {
    /// The cluster.
    pub cluster: Cluster,
    /// This node.
    pub node: String,
    /// What is wrong.
    pub report: watch::Receiver<Arc<StateReport>>,
    /// Who is there, with which keys.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// The clocks.
    pub clock: Clock,
}

impl Teller {
    /// Tells until the state line ends.
    pub async fn run(mut self) {
        let api: Api<Event> = Api::namespaced(self.cluster.client(), "default");
        let mut desk = Desk { told: Told { room: BURST, ..Told::default() }, ..Desk::default() };
        let mut keys = Keys::default();
        let mut pauses = Pauses::default();
        loop {
            let report = Arc::clone(&self.report.borrow_and_update());
            let snapshot = self.snapshot.load_full();
            let now = (self.clock.now)();
            let ours = |news: &News| concerns(&news.node, &self.node, &snapshot);
            desk.happened(keys.look(&snapshot).into_iter().filter(ours));
            // Only what this start has seen: the saved state's problems are those of then.
            let problems = report.problems.iter().filter(|_| report.listed).filter_map(News::of);
            let (due, mut again) = desk.due(problems.filter(ours).collect(), now);
            for news in due {
                match self.tell(&api, &news).await {
                    Ok(()) => {
                        pauses.reset();
                        desk.told(&news, now);
                    }
                    Err(error) => {
                        let reason = reason(&error);
                        tracing::debug!("an Event on Node {} is told later: {reason}", news.node);
                        if is_refused(&error) {
                            // The others may be taken.
                            desk.refused(&news, now);
                            again = again.min(REFUSED_AGAIN);
                            continue;
                        }
                        again = pauses.next();
                        break;
                    }
                }
            }
            sleep(LOOK_EVERY).await;
            tokio::select! {
                changed = self.report.changed() => if changed.is_err() { return },
                () = sleep(again) => {}
            }
        }
    }

    /// An error: it may be taken another time.
    async fn tell(&self, api: &Api<Event>, news: &News) -> Result<(), kube::Error> {
        let event = news.event(&self.node, (self.clock.wall)());
        match api.create(&PostParams::default(), &event).await {
            // 409: we, before a restart.
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            // Never: it is not made better by saying it again.
            Err(kube::Error::Api(status)) if matches!(status.code, 400 | 413 | 422) => {
                tracing::debug!("an Event on Node {} is not taken: {}", news.node, status.message);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether the server has looked at this one and will not have it; else it is the server that has troubles.
fn is_refused(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => {
            (400..500).contains(&status.code) && !matches!(status.code, 401 | 408 | 429)
        }
        _ => false,
    }
}

/// What there is to tell, and what was told.
#[derive(Debug, Default)]
struct Desk {
    told: Told,
    /// What was refused, and when it is told again.
    refused: HashMap<u64, Instant>,
    /// What happened, and is not to be seen a second time.
    once: VecDeque<News>,
    /// Since when problems have been there that are not settled.
    since: HashMap<u64, Instant>,
}

impl Desk {
    fn happened(&mut self, news: impl Iterator<Item = News>) {
        for news in news {
            if self.once.len() >= MAX_ONCE {
                self.once.pop_front();
            }
            self.once.push_back(news);
        }
    }

    /// What is to be told now, and how soon there may be more of it.
    fn due(&mut self, problems: Vec<News>, now: Instant) -> (Vec<News>, Duration) {
        let (mut again, mut due, mut unsettled) = (AGAIN / 6, Vec::new(), HashMap::new());
        let told = &self.told;
        self.once.retain(|news| !told.is_recent(news.hash(), now));
        self.refused.retain(|_, until| *until > now);
        for news in self.once.iter().cloned().chain(problems) {
            let hash = news.hash();
            if told.is_recent(hash, now) {
                continue;
            }
            if let Some(until) = self.refused.get(&hash) {
                again = again.min(until.saturating_duration_since(now));
                continue;
            }
            let first = self.since.get(&hash).copied().unwrap_or(now);
            if news.warning {
                unsettled.insert(hash, first);
                if now.saturating_duration_since(first) < SETTLED {
                    again = LOOK_EVERY;
                    continue;
                }
            }
            due.push(news);
        }
        self.since = unsettled;
        let room = self.told.room(now);
        if due.len() > room {
            due.truncate(room);
            again = again.min(ROOM_EVERY);
        }
        (due, again)
    }

    fn refused(&mut self, news: &News, now: Instant) {
        if self.refused.len() < MAX_TOLD {
            self.refused.insert(news.hash(), now + REFUSED_AGAIN);
        }
    }

    fn told(&mut self, news: &News, now: Instant) {
        self.told.note(news.hash(), now);
        self.once.retain(|one| one != news);
    }
}

/// Something to tell about a Node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct News {
    node: String,
    reason: &'static str,
    note: String,
    warning: bool,
}

impl News {
    fn of(problem: &Problem) -> Option<News> {
        let node = problem.subject.strip_prefix("Node/")?;
        let reason = match problem.kind {
            ProblemKind::Annotation => "BadAnnotation",
            ProblemKind::Value => "BadValue",
            ProblemKind::Conflict => "Conflict",
            // That there is no such Node is nothing to be told on it.
            ProblemKind::Setting if problem.field.is_empty() => return None,
            ProblemKind::Setting => "Mismatch",
            ProblemKind::Object => "BadObject",
            ProblemKind::File => return None,
        };
        let note = match problem.field.as_str() {
            "" => problem.reason.clone(),
            field => format!("{field}: {}", problem.reason),
        };
        Some(News { node: node.to_owned(), reason, note, warning: true })
    }

    /// The same for the same.
    fn hash(&self) -> u64 {
        let mut hasher = SipHasher24::new();
        for part in [self.node.as_str(), self.reason, &self.note] {
            hasher.write(part.as_bytes());
            hasher.write_u8(0);
        }
        hasher.finish()
    }

    fn event(&self, teller: &str, wall: SystemTime) -> Event {
        // A name has 253 characters at most, and ends with a letter or digit before our dot.
        let stem = cut(teller, MAX_STEM).trim_end_matches(['-', '.']);
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{stem}.{:016x}", self.hash())),
                namespace: Some("default".to_owned()),
                ..ObjectMeta::default()
            },
            action: Some("Check".to_owned()),
            event_time: Some(MicroTime(Timestamp::try_from(wall).unwrap_or_default())),
            note: Some(cut(&self.note, MAX_NOTE).to_owned()),
            reason: Some(self.reason.to_owned()),
            regarding: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Node".to_owned()),
                name: Some(self.node.clone()),
                uid: Some(self.node.clone()), // as the kubelet has it; `kubectl describe` looks for both
                ..ObjectReference::default()
            }),
            reporting_controller: Some("warren.dev/agent".to_owned()),
            reporting_instance: Some(cut(teller, MAX_INSTANCE).to_owned()),
            type_: Some(if self.warning { "Warning" } else { "Normal" }.to_owned()),
            ..Event::default()
        }
    }
}

fn cut(text: &str, most: usize) -> &str {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Whether this node tells what concerns that one.
fn concerns(about: &str, own: &str, snapshot: &Snapshot) -> bool {
    if about == own {
        return true;
    }
    let score = |name: &str| {
        let mut hasher = SipHasher24::new();
        hasher.write(about.as_bytes());
        hasher.write_u8(0);
        hasher.write(name.as_bytes());
        hasher.finish()
    };
    let mine = score(own);
    let peers = snapshot.mesh.peers.iter().flatten().filter(|peer| peer.name != about);
    peers.filter(|peer| score(&peer.name) < mine).take(TELLERS).count() < TELLERS
}

/// What was told, and how much may still be.
#[derive(Debug, Default)]
struct Told {
    at: HashMap<u64, Instant>,
    room: u32,
    refilled: Option<Instant>,
}

impl Told {
    fn is_recent(&self, hash: u64, now: Instant) -> bool {
        self.at.get(&hash).is_some_and(|at| now.saturating_duration_since(*at) < AGAIN)
    }

    fn note(&mut self, hash: u64, now: Instant) {
        self.at.insert(hash, now);
        self.room = self.room.saturating_sub(1);
    }

    /// How many may be told now.
    fn room(&mut self, now: Instant) -> usize {
        let refilled = *self.refilled.get_or_insert(now);
        let more = now.saturating_duration_since(refilled).as_secs() / ROOM_EVERY.as_secs();
        if let Some(more) = u32::try_from(more).ok().filter(|more| *more > 0) {
            self.room = self.room.saturating_add(more).min(BURST);
            self.refilled = Some(now);
        }
        if self.at.len() >= MAX_TOLD {
            self.at.retain(|_, at| now.saturating_duration_since(*at) < AGAIN);
        }
        // What cannot be remembered is not told.
        (self.room as usize).min(MAX_TOLD.saturating_sub(self.at.len()))
    }
}

/// The keys that each peer had.
#[derive(Debug, Default)]
struct Keys(HashMap<String, Arc<Peer>>);

impl Keys {
    /// The peers none of whose keys is one of before. Peers that did not change are the same by address.
    fn look(&mut self, snapshot: &Snapshot) -> Vec<News> {
        let mut news = Vec::new();
        for peer in snapshot.mesh.peers.iter().flatten().filter(|peer| !peer.lanes.is_empty()) {
            let before = self.0.get(&peer.name);
            if before.is_some_and(|before| Arc::ptr_eq(before, peer)) {
                continue;
            }
            // Keys that are changed in order are announced beforehand.
            let is_new = before.is_some_and(|before| {
                let known = |key: &PublicKey| {
                    before.lanes.iter().any(|old| old.key == *key) || before.also.contains(key)
                };
                !peer.lanes.iter().any(|lane| known(&lane.key))
            });
            if is_new {
                let keys: Vec<String> =
                    peer.lanes.iter().map(|lane| crate::state::annotations::key_text(&lane.key)).collect();
                let note = format!("the node has other WireGuard keys than before: {}", keys.join(", "));
                tracing::info!("Node {}: {note}", peer.name);
                news.push(News { node: peer.name.clone(), reason: "KeysChanged", note, warning: false });
            }
            self.0.insert(peer.name.clone(), Arc::clone(peer));
        }
        // Nodes that went: their names may come back with other keys, and nobody minds.
        if self.0.len() > 2 * snapshot.mesh.peers.len() + 16 {
            let names: std::collections::HashSet<&str> =
                snapshot.mesh.peers.iter().flatten().map(|peer| peer.name.as_str()).collect();
            self.0.retain(|name, _| names.contains(name.as_str()));
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(note: &str) -> News {
        let problem = Problem::node(ProblemKind::Annotation, "node-b", "warren.dev/lanes", note);
        News::of(&problem).unwrap()
    }

    #[test]
    fn an_event_is_valid_and_the_tellers_own() {
        let long = News { node: "n".repeat(253), ..news(&"ä".repeat(1000)) };
        let teller = format!("{}.-{}", "n".repeat(234), "n".repeat(10));
        for news in [news("not a key"), long] {
            let [a, b, c] = ["node-a", "node-c", &teller].map(|teller| {
                let event = news.event(teller, SystemTime::UNIX_EPOCH);
                let name = event.metadata.name.clone().unwrap();
                assert!(crate::state::source::manifest::is_dns_name(&name) && name.len() <= 253, "{name}");
                assert!(event.note.unwrap().len() <= MAX_NOTE);
                assert_eq!(event.type_.as_deref(), Some("Warning"));
                name
            });
            // As the policy of deploy/ wants it.
            assert!(a.starts_with("node-a.") && a.len() == "node-a".len() + 17, "{a}");
            assert!(a != b && c.starts_with(&"n".repeat(200)), "{b} {c}");
        }
        assert_ne!(news("x").hash(), news("y").hash());
        let missing = Problem::node(ProblemKind::Setting, "node-b", "", "no such Node: is --node right?");
        assert_eq!(News::of(&missing), None);
    }

    #[test]
    fn the_same_is_told_once_an_hour_and_not_too_much_at_a_time() {
        #[expect(clippy::disallowed_methods, reason = "a start for the made-up clock")]
        let start = Instant::now();
        let mut told = Told { room: BURST, ..Told::default() };
        told.note(1, start);
        assert!(told.is_recent(1, start) && !told.is_recent(2, start) && !told.is_recent(1, start + AGAIN));
        assert_eq!(told.room(start), BURST as usize - 1);
        (0..BURST).for_each(|hash| told.note(hash.into(), start));
        assert_eq!(
            (told.room(start), told.room(start + ROOM_EVERY), told.room(start + ROOM_EVERY)),
            (0, 1, 1)
        );
        (0..MAX_TOLD as u64).for_each(|hash| told.note(hash, start));
        assert_eq!(told.room(start + 100 * ROOM_EVERY), 0);
        assert_eq!(told.room(start + AGAIN), BURST as usize);
    }

    #[test]
    fn what_was_not_taken_is_due_until_it_is() {
        #[expect(clippy::disallowed_methods, reason = "a start for the made-up clock")]
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut desk = Desk { told: Told { room: BURST, ..Told::default() }, ..Desk::default() };
        let changed =
            News { node: "b".to_owned(), reason: "KeysChanged", note: "x".to_owned(), warning: false };
        desk.happened([changed.clone()].into_iter());
        // It happened once and is due for as long as nobody took it; a problem only once it has settled.
        assert_eq!(desk.due(vec![news("y")], at(0)), (vec![changed.clone()], LOOK_EVERY));
        assert_eq!(desk.due(vec![news("y")], at(4)).0, [changed.clone(), news("y")]);
        desk.told(&changed, at(4));
        assert_eq!(desk.due(vec![news("y")], at(5)).0, [news("y")]);
        desk.told(&news("y"), at(5));
        assert_eq!(desk.due(vec![news("y")], at(6)).0, []);
        assert_eq!(desk.due(vec![news("y")], at(5) + AGAIN).0, []);
        let again = desk.due(vec![news("y")], at(9) + AGAIN).0;
        assert_eq!(again, [news("y")], "the API server has forgotten it");

        let many = || (0..100).map(|n| News { note: n.to_string(), ..changed.clone() });
        desk.happened(many());
        assert_eq!(desk.once.len(), MAX_ONCE);
        // What is refused takes no room from the others, and is told again.
        let (first, _) = desk.due(Vec::new(), at(900));
        first.iter().for_each(|news| desk.refused(news, at(900)));
        let (others, _) = desk.due(Vec::new(), at(900));
        assert_eq!(others.len(), BURST as usize);
        assert!(others.iter().all(|news| !first.contains(news)), "{others:?}");
        assert_eq!(desk.due(Vec::new(), at(900) + REFUSED_AGAIN).0, first);

        let (due, again) = desk.due(Vec::new(), at(1000));
        assert_eq!((due.len(), again), (BURST as usize, ROOM_EVERY));
        assert_eq!(desk.due(Vec::new(), at(1000)).0, due, "nothing is lost by looking");
    }

    fn snapshot(peers: Vec<Peer>) -> Snapshot {
        let peers = peers.into_iter().map(|peer| Some(Arc::new(peer))).collect();
        let mesh = crate::snapshot::Mesh { peers, ..Default::default() };
        let local = crate::snapshot::LocalNode {
            name: "x".to_owned(),
            address_v4: None,
            address_v6: None,
            vni: 1,
            mac: [2; 6],
        };
        Snapshot { generation: 1, local: Arc::new(local), mesh: Arc::new(mesh), services: Arc::default() }
    }

    fn peer(name: &str, key: u8) -> Peer {
        Peer {
            id: crate::snapshot::PeerId(0),
            name: name.to_owned(),
            encap: None,
            lanes: vec![crate::snapshot::PeerLane { key: [key; 32], port: 1 }],
            endpoints: Vec::new(),
            vxlan: None,
            pod_ranges: Vec::new(),
            addresses: Vec::new(),
            mtu: 1400,
            keepalive: 0,
            ordinary: false,
            takes_strangers: false,
            also: Vec::new(),
        }
    }

    #[test]
    fn three_of_all_tell_what_concerns_another() {
        let names: Vec<String> = (0..50).map(|n| format!("node-{n}")).collect();
        let tells = |own: &String| {
            let others = names.iter().filter(|name| *name != own).map(|name| peer(name, 1)).collect();
            concerns("node-7", own, &snapshot(others))
        };
        let tellers: Vec<&String> = names.iter().filter(|own| tells(own)).collect();
        assert_eq!(tellers.len(), TELLERS + 1, "{tellers:?}");
        assert!(tellers.contains(&&"node-7".to_owned()));
    }

    #[test]
    fn other_keys_are_noticed_once() {
        let mut keys = Keys::default();
        assert!(keys.look(&snapshot(vec![peer("a", 1)])).is_empty());
        assert!(keys.look(&snapshot(vec![peer("a", 1)])).is_empty());
        let news = keys.look(&snapshot(vec![peer("a", 2)]));
        assert_eq!(news.iter().map(|news| news.reason).collect::<Vec<_>>(), ["KeysChanged"]);
        assert!(keys.look(&snapshot(vec![peer("a", 2)])).is_empty());
        let announced = Peer { also: vec![[3; 32]], ..peer("a", 2) };
        assert!(keys.look(&snapshot(vec![announced])).is_empty());
        assert!(keys.look(&snapshot(vec![peer("a", 3)])).is_empty(), "in order");
    }

    #[tokio::test]
    async fn what_is_wrong_is_told_once_by_each_teller() {
        use crate::state::source::kube::tests::fake::{Fake, Manners, until};
        let fake = Fake::start(&["kubernetes.default.svc"], Manners::default()).await;
        #[expect(clippy::disallowed_methods, reason = "the agent would pass io::clock")]
        let clock = Clock { now: Instant::now, wall: SystemTime::now };
        let problem = |field: &str| Problem::node(ProblemKind::Annotation, "node-a", field, "not a key");
        let report = |problems| Arc::new(StateReport { listed: true, problems, ..StateReport::default() });
        let (reports, reader) = watch::channel(report(vec![problem("x")]));
        let teller = |node: &str| Teller {
            cluster: Cluster::new(fake.access(), clock.wall),
            node: node.to_owned(),
            report: reader.clone(),
            snapshot: Arc::new(ArcSwap::from_pointee(snapshot(Vec::new()))),
            clock,
        };
        let tasks = ["node-a", "node-b"].map(|node| tokio::spawn(teller(node).run()));
        until("an Event of each", || fake.posted().len() == 2).await;
        reports.send_replace(report(vec![problem("x"), problem("y")]));
        until("the next one", || fake.posted().len() == 4).await;
        // One that is refused keeps none back.
        fake.manners(|manners| manners.refusing = Some("not-this".to_owned()));
        reports.send_replace(report(["x", "y", "a-not-this", "b"].map(problem).into()));
        until("the one after it", || fake.posted().len() == 6).await;
        // While the API server fails nothing is lost, and it is not asked all the time.
        fake.manners(|manners| manners.failing = Some(503));
        let before = fake.requests().len();
        reports.send_replace(report(["x", "y", "z"].map(problem).into()));
        until("an attempt", || fake.requests().len() > before).await;
        fake.manners(|manners| manners.failing = None);
        until("the last one", || fake.posted().len() == 8).await;
        let event = &fake.posted()[0];
        assert_eq!(
            (&event["regarding"]["kind"], &event["regarding"]["name"]),
            (&"Node".into(), &"node-a".into())
        );
        assert_eq!((&event["note"], &event["reason"]), (&"x: not a key".into(), &"BadAnnotation".into()));
        assert!(fake.requests()[0].contains("/apis/events.k8s.io/v1/namespaces/default/events"));
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}
