//! Turns the handle of the state line: source events in; snapshot, host plan, report, checkpoint and our
//! own announcement out.
//!
//! Per turn: take everything that waits, change the desired state, compile once, hand over. Saving and
//! publishing come after, so that a slow disk delays no packet's route.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::blocking::blocking;
use super::checkpoint::{Checkpoint, CheckpointFiles, MAX_BYTES};
use super::compile::{Compiled, Compiler, HostPlan, Settings};
use super::desired::{Desired, Outcome};
use super::problem::{Problem, ProblemBoard, ProblemKind};
use super::publish::{Announcer, Published, Publisher};
use super::services::saved::SavedServices;
use super::source::{Key, Kind, Object, SourceEvent};
use crate::snapshot::{LocalNode, Mesh, Snapshot};

/// How often our published file is looked at, and the state saved if it has changed.
const TICK: Duration = Duration::from_secs(2);
/// How much of Services is written between two ticks, on average, when they change all the time.
const BYTES_A_TICK: usize = 1 << 20;
/// What the mesh is made from: nothing is compiled before the source has listed these.
const NEEDED: [Kind; 2] = [Kind::Node, Kind::ServiceCidr];
/// Most events of one turn; more are the next one's.
const BATCH: usize = 4096;
/// Most nodes that a problem names.
const NAMED: usize = 8;

/// Where the time comes from (`io::clock` in the agent).
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The monotonic clock.
    pub now: fn() -> Instant,
    /// The wall clock.
    pub wall: fn() -> SystemTime,
}

/// What the state line knows about itself, for `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateReport {
    /// Whether the source has given its first complete list.
    pub listed: bool,
    /// When the state was saved that is still in force, if it is: seconds since 1970. The source has then
    /// not given a complete list yet, or one without a pod range of this node.
    pub from_checkpoint: Option<u64>,
    /// Whether the source shows this node's Node with the keys that we announce.
    pub keys_shown: bool,
    /// Whether the source has given a list since the start, be it incomplete.
    pub heard: bool,
    /// Whether the source has shown this node's own Node since the start, and the plan's pod ranges are that one's.
    pub own_confirmed: bool,
    /// How many Nodes there are, this one included.
    pub nodes: usize,
    /// How many Services are served.
    pub services: usize,
    /// How many endpoints their ports have.
    pub endpoints: usize,
    /// The snapshot's generation.
    pub generation: u64,
    /// What is wrong now.
    pub problems: Vec<Problem>,
    /// How many problems of each kind there ever were.
    pub problems_seen: Vec<(ProblemKind, u64)>,
    /// The ranges in which pods of the cluster live.
    pub cluster_ranges: Vec<IpNet>,
    /// Whether those are only the ranges of the nodes seen.
    pub cluster_ranges_guessed: bool,
}

/// What the rest of the agent reads.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// For the lanes.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// For the host; `None` until there is a saved or a full state, so that nothing is torn down early.
    pub plan: watch::Receiver<Option<Arc<HostPlan>>>,
    /// For `status`.
    pub report: watch::Receiver<Arc<StateReport>>,
}

/// The state line. [`StateLine::handle`] and [`StateLine::compile`] are all of it without the waiting.
#[derive(Debug)]
pub struct StateLine {
    desired: Desired,
    compiler: Compiler,
    board: ProblemBoard,
    settings: Settings,
    from_checkpoint: Option<u64>,
    /// The UID that this node's Node had when that was saved, until the source has shown the Node.
    saved_uid: Option<String>,
    /// Which kinds the source has listed, and whether it said that this was all.
    heard: BTreeMap<Kind, bool>,
    /// Whether what is in force would do for a restart.
    savable: bool,
    /// Whether the plan is an earlier one, because this node's Node has no pod ranges.
    held: bool,
    /// Whether more than Services changed since the last compile.
    mesh_changed: bool,
    /// Whether more than Services changed since the last save, and whether Services did.
    unsaved: Unsaved,
    snapshot: Arc<ArcSwap<Snapshot>>,
    plan: watch::Sender<Option<Arc<HostPlan>>>,
    report: watch::Sender<Arc<StateReport>>,
}

/// What a restart would not bring back.
#[derive(Clone, Copy, Debug, Default)]
struct Unsaved {
    mesh: bool,
    services: bool,
    /// Ticks until Services may be saved again.
    rest: usize,
}

impl StateLine {
    /// A state line that starts from what was saved, if anything was.
    pub fn new(settings: Settings, saved: Option<Checkpoint>) -> (StateLine, Outputs) {
        let empty = Snapshot {
            generation: 0,
            local: Arc::new(LocalNode {
                name: settings.node.clone(),
                address_v4: None,
                address_v6: None,
                vni: settings.vni,
                mac: settings.mac,
            }),
            mesh: Arc::new(Mesh::default()),
            services: Arc::default(),
        };
        let snapshot = Arc::new(ArcSwap::from_pointee(empty));
        let (plan, plan_reader) = watch::channel(None);
        let (report, report_reader) = watch::channel(Arc::new(StateReport::default()));
        let from_checkpoint = saved.as_ref().map(|saved| saved.saved);
        let saved = saved.unwrap_or_default();
        let is_own = |object: &&Object| object.key().kind == Kind::Node && object.key().name == settings.node;
        let saved_uid = saved.objects.iter().find(is_own).and_then(|own| own.metadata().uid.clone());
        let mut line = StateLine {
            desired: Desired::default(),
            compiler: Compiler::with_ids(saved.ids),
            board: ProblemBoard::default(),
            settings,
            from_checkpoint,
            saved_uid,
            heard: BTreeMap::new(),
            savable: false,
            held: false,
            mesh_changed: true,
            unsaved: Unsaved::default(),
            snapshot: snapshot.clone(),
            plan,
            report,
        };
        for object in &saved.objects {
            let outcome = line.desired.remember(object);
            line.take_in(outcome);
        }
        line.compile();
        (line, Outputs { snapshot, plan: plan_reader, report: report_reader })
    }

    /// Takes in one event; says whether a compile could give something new.
    pub fn handle(&mut self, event: SourceEvent) -> bool {
        let outcome = match event {
            SourceEvent::Apply(object) => self.desired.apply(&object),
            SourceEvent::Delete(key) => self.desired.delete(&key),
            SourceEvent::Reset { kind, objects, complete, unread } => {
                let mut outcome = self.desired.list(kind, &objects);
                unread.iter().for_each(|key| self.desired.confirm(key));
                let news = self.heard.insert(kind, complete) != Some(complete);
                outcome.changed |= news;
                outcome.mesh |= news && NEEDED.contains(&kind);
                outcome
            }
            SourceEvent::Problems { origin, problems } => {
                Outcome { reports: vec![(origin, problems)], ..Outcome::default() }
            }
        };
        let changed = self.take_in(outcome);
        self.drop_of_another() | self.drop_unconfirmed() | changed
    }

    /// A Node of this name that is another one than was saved: what was saved is of another node, perhaps of another
    /// cluster, and holds no longer.
    fn drop_of_another(&mut self) -> bool {
        if !self.is_own_node_shown() {
            return false;
        }
        let (Some(saved), Some(own)) = (self.saved_uid.take(), self.desired.node(&self.settings.node)) else {
            return false;
        };
        if saved == own.uid || own.uid.is_empty() {
            return false;
        }
        tracing::warn!(
            "this node's Node was replaced since the state was saved: that is not obeyed any more"
        );
        let outcome = self.desired.forget();
        self.take_in(outcome)
    }

    /// Takes complete lists for what they say. One without this node's own Node, when there was one
    /// before, is no list of this cluster: the folder is still being filled, or it is the wrong one.
    fn drop_unconfirmed(&mut self) -> bool {
        let complete = self.heard.iter().filter(|(_, complete)| **complete).map(|(kind, _)| *kind);
        let mut changed = false;
        for kind in complete.collect::<Vec<_>>() {
            if self.desired.is_listed(kind) || !self.is_own_node_missing() {
                let outcome = self.desired.complete(kind);
                changed |= self.take_in(outcome);
            }
        }
        changed
    }

    /// Compiles and hands over, once there is a saved state or the source has spoken.
    pub fn compile(&mut self) {
        if self.is_heard() || self.from_checkpoint.is_some() {
            let compiled = match std::mem::take(&mut self.mesh_changed) {
                true => self.compiler.compile(&self.desired, &self.settings),
                false => self.compiler.compile_services(&self.desired, &self.settings),
            };
            let Compiled { snapshot, plan, problems, service_reports, held } = compiled;
            self.held = held;
            // What the source has not shown is saved along: it is in force, and would be after a restart.
            self.savable =
                self.is_heard() && !held && !plan.pod_ranges.is_empty() && !self.is_own_node_missing();
            if self.is_listed() && !held {
                self.from_checkpoint = None;
            }
            self.snapshot.store(snapshot);
            self.note("compile", problems);
            for (origin, problems) in service_reports {
                self.note(&origin, problems);
            }
            self.plan.send_if_modified(|last| {
                let changed = last.as_ref() != Some(&plan);
                *last = Some(plan);
                changed
            });
        }
        self.tell();
    }

    /// What is to be saved.
    pub fn checkpoint(&self, wall: SystemTime) -> Checkpoint {
        let saved = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        CheckpointFiles::capture(&self.desired, self.compiler.ids(), saved)
    }

    /// Runs until the source and everyone else who could send an event is gone; then saves once more.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<SourceEvent>,
        mut settings: watch::Receiver<Settings>,
        files: Option<CheckpointFiles>,
        mut announcer: Option<Announcer>,
        clock: Clock,
    ) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH.min(256));
        let mut settings_open = true;
        loop {
            let publish;
            tokio::select! {
                count = events.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        break;
                    }
                    publish = batch.iter().any(|event| self.concerns_this_node(event));
                    let mut changed = false;
                    for event in batch.drain(..) {
                        changed |= self.handle(event);
                    }
                    match changed {
                        true => self.compile(),
                        false => self.tell(),
                    }
                }
                result = settings.changed(), if settings_open => {
                    settings_open = result.is_ok();
                    self.settings = settings.borrow_and_update().clone();
                    self.mesh_changed = true;
                    self.compile();
                    publish = true;
                }
                _ = tick.tick() => {
                    publish = true;
                    self.save_what_changed(files.as_ref(), clock).await;
                }
            }
            if publish {
                announcer = self.announce(announcer, clock).await;
            }
        }
        self.unsaved.rest = 0;
        self.save_what_changed(files.as_ref(), clock).await;
    }

    fn is_listed(&self) -> bool {
        NEEDED.into_iter().all(|kind| self.desired.is_listed(kind))
    }

    /// Whether the source has given a list, be it incomplete.
    fn is_heard(&self) -> bool {
        NEEDED.into_iter().all(|kind| self.heard.contains_key(&kind))
    }

    /// Whether this node's own Node is one that is only remembered, or was there and is gone.
    fn is_own_node_missing(&self) -> bool {
        let name = self.settings.node.clone();
        let had = self.plan.borrow().as_ref().is_some_and(|plan| !plan.pod_ranges.is_empty());
        let gone = had && self.desired.node(&name).is_none();
        gone || self.desired.is_unconfirmed(&Key { kind: Kind::Node, namespace: String::new(), name })
    }

    /// Whether the source has shown this node's own Node since the start.
    fn is_own_node_shown(&self) -> bool {
        self.desired.node(&self.settings.node).is_some() && !self.is_own_node_missing()
    }

    /// Why what the source gave is not yet taken for everything.
    fn incomplete(&self) -> Option<Problem> {
        if self.is_listed() || !self.is_heard() {
            return None;
        }
        let missing = NEEDED.into_iter().any(|kind| self.heard.get(&kind) != Some(&true));
        let mut reason = match missing {
            true => "a part of it cannot be read (which, is said here too)".to_owned(),
            false => "this node's own Node is not in it: until it is, no state is saved".to_owned(),
        };
        let mut unseen = self.desired.unconfirmed(Kind::Node).filter(|name| *name != self.settings.node);
        let named: Vec<&str> = unseen.by_ref().take(NAMED).collect();
        if !named.is_empty() {
            reason += "; in force from before, and not counted as removed until then: ";
            reason += &named.join(", ");
            match unseen.count() {
                0 => {}
                more => reason += &format!(" and {more} more"),
            }
        }
        Some(setting("source", reason))
    }

    fn concerns_this_node(&self, event: &SourceEvent) -> bool {
        match event {
            SourceEvent::Apply(object) => {
                let key = object.key();
                key.kind == Kind::Node && key.name == self.settings.node
            }
            SourceEvent::Delete(key) => key.kind == Kind::Node && key.name == self.settings.node,
            SourceEvent::Reset { kind, .. } => *kind == Kind::Node,
            SourceEvent::Problems { .. } => false,
        }
    }

    fn take_in(&mut self, outcome: Outcome) -> bool {
        for (origin, problems) in outcome.reports {
            self.note(&origin, problems);
        }
        self.mesh_changed |= outcome.mesh;
        self.unsaved.mesh |= outcome.mesh;
        self.unsaved.services |= outcome.changed && !outcome.mesh;
        outcome.changed
    }

    /// Each problem is logged once, when it appears.
    fn note(&mut self, origin: &str, problems: Vec<Problem>) {
        for problem in self.board.set(origin, problems) {
            tracing::warn!(kind = problem.kind.name(), "{problem}");
        }
    }

    fn tell(&mut self) {
        self.note("source", self.incomplete().into_iter().collect());
        let plan = self.plan.borrow().clone();
        let (services, endpoints) = self.compiler.service_counts();
        let report = StateReport {
            listed: self.is_listed(),
            from_checkpoint: self.from_checkpoint,
            keys_shown: self.desired.node(&self.settings.node).is_some_and(|node| {
                let (shown, said) = (&node.announcement, &self.settings.announcement);
                shown.lanes == said.lanes && shown.also == said.also
            }),
            heard: self.is_heard(),
            own_confirmed: self.is_own_node_shown() && !self.held,
            nodes: self.desired.nodes().count(),
            services,
            endpoints,
            generation: self.snapshot.load().generation,
            problems: self.board.list(),
            problems_seen: self.board.seen().collect(),
            cluster_ranges: plan.as_ref().map(|plan| plan.cluster_ranges.clone()).unwrap_or_default(),
            cluster_ranges_guessed: plan.is_some_and(|plan| plan.cluster_ranges_guessed),
        };
        self.report.send_if_modified(|last| {
            let changed = **last != report;
            if changed {
                *last = Arc::new(report);
            }
            changed
        });
    }

    /// Saves what a restart would not bring back; a failure is reported and tried again.
    async fn save_what_changed(&mut self, files: Option<&CheckpointFiles>, clock: Clock) {
        self.unsaved.rest = self.unsaved.rest.saturating_sub(1);
        let Some(files) = files.filter(|_| self.savable) else { return };
        if self.unsaved.mesh {
            let (files, checkpoint) = (files.clone(), self.checkpoint((clock.wall)()));
            let saved = blocking(move || files.save(&checkpoint)).await;
            self.unsaved.mesh = saved.is_err();
            self.note_saved("checkpoint", saved.err());
        }
        if self.unsaved.services && self.unsaved.rest == 0 && self.settings.services.enabled {
            let (files, services) = (files.clone(), SavedServices::capture(self.desired.services()));
            let saved = blocking(move || files.save_services(&services)).await;
            self.unsaved.services = saved.is_err();
            // The more there is to write, the less often.
            let bytes = match &saved {
                Ok(bytes) => *bytes,
                Err(error) if error.kind() == ErrorKind::FileTooLarge => MAX_BYTES,
                Err(_) => 0,
            };
            self.unsaved.rest = bytes / BYTES_A_TICK;
            self.note_saved("saved services", saved.err());
        }
    }

    fn note_saved(&mut self, origin: &str, error: Option<std::io::Error>) {
        let problem =
            error.map(|error| setting("state folder", format!("the {origin} cannot be written: {error}")));
        self.note(origin, problem.into_iter().collect());
        self.tell();
    }

    /// Sees to it that the others are told what they should be; hands the announcer back. An agent that was
    /// started with a wrong name, or before its Node has pods, has nothing to say.
    async fn announce(&mut self, announcer: Option<Announcer>, clock: Clock) -> Option<Announcer> {
        let Some(has_pods) = self.plan.borrow().as_ref().map(|plan| !plan.pod_ranges.is_empty()) else {
            return announcer;
        };
        Some(match announcer? {
            Announcer::Folder(publisher) => Announcer::Folder(self.publish(publisher, has_pods, clock).await),
            Announcer::Kubernetes(keeper) => {
                let wanted = has_pods.then(|| self.settings.announcement.clone());
                if wanted.is_some() && *keeper.borrow() != wanted {
                    keeper.send_replace(wanted);
                }
                Announcer::Kubernetes(keeper)
            }
        })
    }

    /// Makes the published file say what it should. One that is there is put right in any case: as long as it
    /// cannot be read, the source withholds this node's Node, and nobody else repairs it.
    async fn publish(&mut self, mut publisher: Publisher, has_pods: bool, clock: Clock) -> Publisher {
        let path = publisher.path().display().to_string();
        let announcement = self.settings.announcement.clone();
        let now = (clock.now)();
        let (publisher, result) = blocking(move || {
            let result = match has_pods || publisher.exists() {
                true => publisher.reconcile(&announcement, now),
                false => Ok(Published::Unchanged),
            };
            (publisher, result)
        })
        .await;
        let problem = match result {
            Ok(Published::Unchanged | Published::Written) => None,
            Ok(Published::Healed) => {
                tracing::info!("{path} had been changed or removed: written again");
                None
            }
            Ok(Published::Waiting) => Some(setting(
                &path,
                "somebody keeps changing it: does another agent run with this node's name?".to_owned(),
            )),
            Err(error) => Some(setting(&path, format!("this node cannot be announced: {error}"))),
        };
        self.note("publish", problem.into_iter().collect());
        self.tell();
        publisher
    }
}

fn setting(subject: &str, reason: String) -> Problem {
    Problem { kind: ProblemKind::Setting, subject: subject.to_owned(), field: String::new(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::service::{Listen, Protocol};
    use crate::state::annotations::{Announcement, Encaps, key_text};
    use crate::state::checkpoint::CheckpointFiles;
    use crate::state::compile::EncapPolicy;
    use crate::state::durable::Loaded;
    use crate::state::services::ServiceSettings;
    use crate::state::source::dir::DirSource;
    use crate::state::source::folder::Folder;
    use crate::state::source::manifest;
    use std::fs;
    use std::path::Path;

    #[expect(clippy::disallowed_methods, reason = "the agent would pass io::clock")]
    const CLOCK: Clock = Clock { now: Instant::now, wall: SystemTime::now };

    fn settings(node: &str, key: u8) -> Settings {
        Settings {
            node: node.to_owned(),
            encap: EncapPolicy::WireGuard,
            announcement: Announcement {
                lanes: vec![crate::snapshot::PeerLane { key: [key; 32], port: 51820 }],
                encaps: Encaps { wireguard: true, vxlan: false },
                ..Announcement::default()
            },
            vxlan_port: 8472,
            vni: 1,
            mac: [2, 0, 0, 0, 0, key],
            underlay_mtu: 1500,
            cluster_ranges: Vec::new(),
            service_ranges: Vec::new(),
            services: ServiceSettings::default(),
        }
    }

    fn node(name: &str, number: u8) -> String {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [10.244.{number}.0/24]}}\n\
             status: {{addresses: [{{type: InternalIP, address: 192.0.2.{number}}}]}}\n---\n"
        )
    }

    /// An agent's state line on this folder, as the agent would start it.
    fn start(
        folder: &Path,
        state: &Path,
        name: &str,
        key: u8,
    ) -> (Outputs, Vec<tokio::task::JoinHandle<()>>) {
        let files = CheckpointFiles::new(state, name);
        let saved = match files.load().unwrap() {
            Loaded::Good(saved) => Some(saved),
            Loaded::Missing => None,
            Loaded::SetAside { reason, .. } => panic!("{reason}"),
        };
        let (line, outputs) = StateLine::new(settings(name, key), saved);
        let (sender, events) = mpsc::channel(64);
        let (_, settings) = watch::channel(settings(name, key));
        let publisher = Announcer::Folder(Publisher::new(folder, name));
        let source = tokio::spawn(DirSource::new(folder).run(sender));
        let line = tokio::spawn(line.run(events, settings, Some(files), Some(publisher), CLOCK));
        (outputs, vec![source, line])
    }

    async fn until(outputs: &mut Outputs, what: &str, wanted: impl Fn(&Snapshot, &StateReport) -> bool) {
        let wait = async {
            loop {
                let report = outputs.report.borrow_and_update().clone();
                if wanted(&outputs.snapshot.load(), &report) {
                    return;
                }
                // What is waited for may also be outside, a file: look again soon in any case.
                let changed = tokio::time::timeout(Duration::from_millis(50), outputs.report.changed()).await;
                assert!(!matches!(changed, Ok(Err(_))), "the state line ended");
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
        assert!(waited.is_ok(), "not in time: {what}; {:?}", outputs.report.borrow());
    }

    fn has_lanes(snapshot: &Snapshot, name: &str, key: u8) -> bool {
        let peer = snapshot.mesh.peers.iter().flatten().find(|peer| peer.name == name);
        peer.is_some_and(|peer| {
            peer.lanes.iter().any(|lane| lane.key == [key; 32]) && !peer.endpoints.is_empty()
        })
    }

    #[tokio::test]
    async fn two_agents_find_each_other_through_a_folder_and_remember() {
        let (folder, states) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let state = |name: &str| states.path().join(name);
        fs::write(folder.path().join("nodes.yaml"), node("a", 1) + &node("b", 2)).unwrap();
        let (mut a, a_tasks) = start(folder.path(), &state("a"), "a", 1);
        let (mut b, b_tasks) = start(folder.path(), &state("b"), "b", 2);
        until(&mut a, "b's key at a", |snapshot, _| has_lanes(snapshot, "b", 2)).await;
        until(&mut b, "a's key at b", |snapshot, report| {
            has_lanes(snapshot, "a", 1) && report.problems.is_empty()
        })
        .await;

        // Somebody edits and removes what b says; it comes back, and a does not lose b for long.
        fs::write(folder.path().join("b.warren.yaml"), "kind: [").unwrap();
        fs::remove_file(folder.path().join("b.warren.yaml")).unwrap();
        until(&mut a, "b's key again", |snapshot, _| {
            has_lanes(snapshot, "b", 2) && folder.path().join("b.warren.yaml").exists()
        })
        .await;

        // An agent whose folder is lost starts with what it knew.
        let id = a.snapshot.load().mesh.peers.iter().flatten().next().unwrap().id;
        for task in a_tasks.into_iter().chain(b_tasks) {
            task.abort();
            let _ = task.await;
        }
        let (mut line, _) = StateLine::new(settings("a", 1), None);
        for event in Folder::new(folder.path()).scan(true).unwrap() {
            line.handle(event);
        }
        line.compile();
        // In a folder of its own: a save that was under way when the task was aborted goes on.
        CheckpointFiles::new(state("a2"), "a").save(&line.checkpoint(SystemTime::UNIX_EPOCH)).unwrap();
        let (mut again, tasks) = start(&states.path().join("no-such-folder"), &state("a2"), "a", 1);
        let known = again.snapshot.load_full();
        assert!(has_lanes(&known, "b", 2) && known.mesh.peer(id).is_some());
        assert!(again.plan.borrow().is_some());
        until(&mut again, "the missing folder is named", |_, report| {
            report.from_checkpoint == Some(0)
                && report.problems.iter().any(|p| p.reason.contains("does not exist"))
        })
        .await;
        assert!(has_lanes(&again.snapshot.load(), "b", 2));
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }

    /// The names of the peers in force.
    fn peers(outputs: &Outputs) -> Vec<String> {
        let snapshot = outputs.snapshot.load();
        let mut names: Vec<String> = snapshot.mesh.peers.iter().flatten().map(|p| p.name.clone()).collect();
        names.sort();
        names
    }

    /// What one agent knew when it ended.
    fn saved_by_one_that_knew(text: &str) -> Checkpoint {
        let (mut line, _) = StateLine::new(settings("a", 1), None);
        let objects = manifest::parse(text.as_bytes(), false).objects;
        line.handle(SourceEvent::Reset { kind: Kind::Node, objects, complete: true, unread: Vec::new() });
        line.handle(SourceEvent::Reset {
            kind: Kind::ServiceCidr,
            objects: Vec::new(),
            complete: true,
            unread: Vec::new(),
        });
        line.compile();
        assert!(line.savable);
        line.checkpoint(SystemTime::UNIX_EPOCH + Duration::from_secs(77))
    }

    fn feed(line: &mut StateLine, events: Vec<SourceEvent>) {
        let changed = events.into_iter().fold(false, |changed, event| line.handle(event) | changed);
        if changed {
            line.compile();
        }
    }

    #[test]
    fn what_was_saved_of_another_node_of_this_name_is_not_obeyed() {
        let of_uid = |name: &str, number, uid: &str| {
            node(name, number).replace(&format!("name: {name}"), &format!("name: {name}, uid: {uid}"))
        };
        let saved = saved_by_one_that_knew(&(of_uid("a", 1, "one") + &of_uid("b", 2, "b")));
        let own = |text: &str| SourceEvent::Reset {
            kind: Kind::Node,
            objects: manifest::parse(text.as_bytes(), false).objects,
            complete: false,
            unread: Vec::new(),
        };
        let range = |outputs: &Outputs| outputs.plan.borrow().as_ref().unwrap().pod_ranges.clone();
        for (uid, number, known) in [("one", 1, vec!["b"]), ("two", 7, Vec::new())] {
            let (mut line, outputs) = StateLine::new(settings("a", 1), Some(saved.clone()));
            assert_eq!(
                (peers(&outputs), outputs.report.borrow().own_confirmed),
                (vec!["b".to_owned()], false)
            );
            // Somebody else's Node says nothing about it.
            let other = manifest::parse(node("c", 3).as_bytes(), false).objects.remove(0);
            feed(&mut line, vec![SourceEvent::Apply(other)]);
            assert!(!outputs.report.borrow().own_confirmed);
            feed(&mut line, vec![own(&of_uid("a", number, uid))]);
            assert!(outputs.report.borrow().own_confirmed);
            let mut expected = known;
            if uid == "one" {
                expected.push("c");
            }
            assert_eq!(peers(&outputs), expected, "{uid}");
            assert_eq!(range(&outputs), [format!("10.244.{number}.0/24").parse().unwrap()]);
        }
        // Nobody has given the new one a range yet: what the plan has is the old one's.
        let (mut line, outputs) = StateLine::new(settings("a", 1), Some(saved));
        let bare = of_uid("a", 7, "two").replace("podCIDRs: [10.244.7.0/24]", "");
        feed(&mut line, vec![own(&bare)]);
        assert_eq!(range(&outputs), ["10.244.1.0/24".parse().unwrap()]);
        assert!(!outputs.report.borrow().own_confirmed);
        feed(&mut line, vec![own(&of_uid("a", 7, "two"))]);
        assert_eq!(range(&outputs), ["10.244.7.0/24".parse().unwrap()]);
        assert!(outputs.report.borrow().own_confirmed);
    }

    #[test]
    fn a_restart_while_a_file_is_broken_forgets_nobody() {
        let saved = saved_by_one_that_knew(&(node("a", 1) + &node("b", 2) + &node("c", 3)));
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("a.yaml", &node("a", 1));
        write("b.yaml", "apiVersion: v1\nkind: [");
        write("d.yaml", &node("d", 4));
        let (mut line, outputs) = StateLine::new(settings("a", 1), Some(saved));
        let mut folder = Folder::new(dir.path());
        feed(&mut line, folder.scan(true).unwrap());
        assert_eq!(peers(&outputs), ["b", "c", "d"]);
        let report = outputs.report.borrow().clone();
        assert_eq!((report.listed, report.from_checkpoint, line.savable), (false, Some(77), true));
        let said = |report: &StateReport| {
            let of_source = report.problems.iter().find(|p| p.subject == "source");
            of_source.map(|p| p.reason.clone()).unwrap_or_default()
        };
        assert!(said(&report).contains("cannot be read") && said(&report).ends_with(": b, c"), "{report:?}");

        // What was read and is removed is gone, and a restart brings back only what nobody removed.
        write("c.yaml", &node("c", 3));
        feed(&mut line, folder.reread(["c.yaml"]));
        fs::remove_file(dir.path().join("d.yaml")).unwrap();
        feed(&mut line, folder.reread(["d.yaml"]));
        assert_eq!(peers(&outputs), ["b", "c"]);
        assert!(said(&outputs.report.borrow()).ends_with(": b"));
        let (mut line, outputs) =
            StateLine::new(settings("a", 1), Some(line.checkpoint(SystemTime::UNIX_EPOCH)));
        fs::remove_file(dir.path().join("c.yaml")).unwrap();
        write("d.yaml", &node("d", 4));
        let mut folder = Folder::new(dir.path());
        feed(&mut line, folder.scan(true).unwrap());
        assert_eq!(peers(&outputs), ["b", "c", "d"]);

        // When the file is well again, what went meanwhile goes; and from then on a broken one costs nothing.
        write("b.yaml", &node("b", 2));
        feed(&mut line, folder.reread(["b.yaml"]));
        assert_eq!(peers(&outputs), ["b", "d"]);
        let report = outputs.report.borrow().clone();
        assert_eq!((report.listed, report.from_checkpoint, line.savable), (true, None, true));
        assert_eq!(report.problems, []);
        write("b.yaml", "kind: [");
        feed(&mut line, folder.reread(["b.yaml"]));
        assert_eq!(peers(&outputs), ["b", "d"]);
        fs::remove_file(dir.path().join("b.yaml")).unwrap();
        feed(&mut line, folder.reread(["b.yaml"]));
        assert_eq!((peers(&outputs), line.savable), (vec!["d".to_owned()], true));
    }

    #[test]
    fn a_folder_that_is_being_filled_forgets_nobody_before_this_node_is_there() {
        let saved = saved_by_one_that_knew(&(node("a", 1) + &node("b", 2) + &node("c", 3)));
        let dir = tempfile::tempdir().unwrap();
        let (mut line, outputs) = StateLine::new(settings("a", 1), Some(saved));
        let mut folder = Folder::new(dir.path());
        feed(&mut line, folder.scan(true).unwrap());
        assert_eq!((peers(&outputs).len(), line.savable), (2, false));
        let problems = outputs.report.borrow().problems.clone();
        assert!(problems.iter().any(|p| p.reason.contains("own Node is not in it")), "{problems:?}");
        fs::write(dir.path().join("b.yaml"), node("b", 2)).unwrap();
        feed(&mut line, folder.reread(["b.yaml"]));
        assert_eq!(peers(&outputs), ["b", "c"]);
        fs::write(dir.path().join("a.yaml"), node("a", 1)).unwrap();
        feed(&mut line, folder.reread(["a.yaml"]));
        assert_eq!((peers(&outputs), line.savable), (vec!["b".to_owned()], true));
    }

    #[test]
    fn a_first_start_works_with_what_can_be_read_and_saves_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("n.yaml"), node("a", 1) + &node("b", 2)).unwrap();
        fs::write(dir.path().join("c.yaml"), "").unwrap();
        let (mut line, outputs) = StateLine::new(settings("a", 1), None);
        feed(&mut line, Folder::new(dir.path()).scan(true).unwrap());
        assert_eq!((peers(&outputs), line.savable), (vec!["b".to_owned()], true));
        assert_eq!(outputs.plan.borrow().as_ref().unwrap().pod_ranges.len(), 1);
    }

    #[test]
    fn a_node_that_is_taken_out_is_out_whatever_else_is_wrong_with_the_folder() {
        let all = node("a", 1) + &node("b", 2);
        for (name, text) in [("values.yaml", "replicas: 2\n"), ("x.yaml", ""), ("x.yaml", "kind: [")] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("nodes.yaml"), &all).unwrap();
            fs::write(dir.path().join("laptop.yaml"), node("laptop", 3)).unwrap();
            fs::write(dir.path().join(name), text).unwrap();
            let saved = saved_by_one_that_knew(&(all.clone() + &node("laptop", 3)));
            let (mut line, outputs) = StateLine::new(settings("a", 1), Some(saved));
            let mut folder = Folder::new(dir.path());
            feed(&mut line, folder.scan(true).unwrap());
            assert_eq!(peers(&outputs), ["b", "laptop"]);
            fs::remove_file(dir.path().join("laptop.yaml")).unwrap();
            feed(&mut line, folder.reread(["laptop.yaml"]));
            assert_eq!((peers(&outputs), line.savable), (vec!["b".to_owned()], true), "{name} {text}");
            let saved = line.checkpoint(SystemTime::UNIX_EPOCH);
            let (_line, outputs) = StateLine::new(settings("a", 1), Some(saved));
            assert_eq!(peers(&outputs), ["b"]);
        }
    }

    #[test]
    fn a_folder_that_is_emptied_while_a_file_is_broken_forgets_nobody() {
        let saved = saved_by_one_that_knew(&(node("a", 1) + &node("b", 2)));
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.yaml"), node("a", 1)).unwrap();
        fs::write(dir.path().join("b.yaml"), "kind: [").unwrap();
        let (mut line, outputs) = StateLine::new(settings("a", 1), Some(saved));
        let mut folder = Folder::new(dir.path());
        feed(&mut line, folder.scan(true).unwrap());
        for name in ["a.yaml", "b.yaml"] {
            fs::remove_file(dir.path().join(name)).unwrap();
            feed(&mut line, folder.reread([name]));
            assert_eq!((peers(&outputs), line.savable), (vec!["b".to_owned()], false));
        }
        fs::write(dir.path().join("a.yaml"), node("a", 1)).unwrap();
        feed(&mut line, folder.reread(["a.yaml"]));
        assert_eq!((peers(&outputs), line.savable), (Vec::new(), true));
    }

    #[tokio::test]
    async fn a_fresh_agent_puts_its_own_unreadable_announcement_right() {
        for broken in ["", "kind: [", "<<<<<<< ours\napiVersion: v1\n=======\n", "# Written by", "a: 1\n"] {
            let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            fs::write(folder.path().join("nodes.yaml"), node("a", 1) + &node("b", 2)).unwrap();
            fs::write(folder.path().join("a.warren.yaml"), broken).unwrap();
            let (mut a, tasks) = start(folder.path(), state.path(), "a", 1);
            until(&mut a, "a with its pods", |snapshot, report| {
                report.listed && snapshot.local.address_v4.is_some()
            })
            .await;
            tasks.iter().for_each(tokio::task::JoinHandle::abort);
        }
        // Without a Node that has pods there is nothing to announce.
        let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(folder.path().join("nodes.yaml"), node("b", 2)).unwrap();
        let (mut a, tasks) = start(folder.path(), state.path(), "a", 1);
        until(&mut a, "the list", |_, report| report.listed).await;
        assert!(!folder.path().join("a.warren.yaml").exists());
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }

    #[test]
    fn a_node_that_loses_its_pod_range_keeps_the_last_state() {
        let saved = saved_by_one_that_knew(&(node("a", 1) + &node("b", 2)));
        let nodes = |text: &str| SourceEvent::Reset {
            unread: Vec::new(),
            kind: Kind::Node,
            objects: manifest::parse(text.as_bytes(), false).objects,
            complete: true,
        };
        let cidrs = SourceEvent::Reset {
            kind: Kind::ServiceCidr,
            objects: Vec::new(),
            complete: true,
            unread: Vec::new(),
        };
        let wrong = node("a", 1).replace(".0/24", ".0/33");
        // Wrong from the first list after a restart on; then well; then wrong again.
        let (mut line, mut outputs) = StateLine::new(settings("a", 1), Some(saved));
        let (snapshot, plan) = (outputs.snapshot.load_full(), outputs.plan.borrow_and_update().clone());
        feed(&mut line, vec![nodes(&(wrong.clone() + &node("c", 3))), cidrs]);
        let stands = |outputs: &Outputs| Arc::ptr_eq(&outputs.snapshot.load_full(), &snapshot);
        assert!(stands(&outputs) && !outputs.plan.has_changed().unwrap() && !line.savable);
        let report = outputs.report.borrow().clone();
        assert_eq!((report.listed, report.from_checkpoint), (true, Some(77)));
        let said = |report: &StateReport| {
            report.problems.iter().any(|p| p.reason.contains("has lost its pod range"))
        };
        assert!(said(&report), "{report:?}");

        feed(&mut line, vec![nodes(&(node("a", 1) + &node("c", 3)))]);
        assert_eq!((peers(&outputs), line.savable), (vec!["c".to_owned()], true));
        assert!(!said(&outputs.report.borrow()) && outputs.report.borrow().from_checkpoint.is_none());
        assert_ne!(outputs.plan.borrow_and_update().clone(), plan);

        for lost in [wrong, String::new()] {
            feed(&mut line, vec![nodes(&(lost + &node("d", 4)))]);
            assert_eq!((peers(&outputs), line.savable), (vec!["c".to_owned()], false));
            assert!(outputs.snapshot.load().local.address_v4.is_some());
        }
        assert!(!outputs.plan.has_changed().unwrap());
    }

    #[tokio::test]
    async fn one_bad_peer_costs_that_peer() {
        let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hand_made = |name: &str, number: u8, key: &str| {
            node(name, number).replace(
                "}\nspec",
                &format!(", annotations: {{warren.dev/public-key: '{key}', warren.dev/endpoint: '192.0.2.{number}:51820'}}}}\nspec"),
            )
        };
        let text = node("a", 1) + &hand_made("b", 2, "$(reboot)") + &hand_made("c", 3, &key_text(&[3; 32]));
        fs::write(folder.path().join("nodes.yaml"), text).unwrap();
        let (mut a, tasks) = start(folder.path(), state.path(), "a", 1);
        until(&mut a, "c alone", |snapshot, report| {
            let reason =
                report.problems.iter().any(|p| p.to_string().starts_with("Node/b, warren.dev/public-key: "));
            has_lanes(snapshot, "c", 3) && !has_lanes(snapshot, "b", 2) && reason
        })
        .await;
        let report = a.report.borrow().clone();
        assert!(report.problems_seen.contains(&(ProblemKind::Annotation, 1)), "{report:?}");
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }

    const SERVICES: &str = "
{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.96.0.5, ports: [{port: 80, nodePort: 30080}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-1, labels: {kubernetes.io/service-name: web}},
 addressType: IPv4, ports: [{port: 8080}], endpoints: [{addresses: [10.244.1.5], nodeName: a}]}
---
{apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: kubernetes}, spec: {cidrs: [10.96.0.0/16]}}
";

    fn serving() -> Settings {
        Settings {
            services: ServiceSettings { enabled: true, ..ServiceSettings::default() },
            ..settings("a", 1)
        }
    }

    fn cluster_ip() -> Listen {
        Listen { address: "10.96.0.5".parse().unwrap(), protocol: Protocol::Tcp, port: 80 }
    }

    #[test]
    fn a_change_of_services_leaves_the_mesh_alone() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("n.yaml", &(node("a", 1) + &node("b", 2)));
        write("s.yaml", SERVICES);
        let (mut line, mut outputs) = StateLine::new(serving(), None);
        let mut folder = Folder::new(dir.path());
        feed(&mut line, folder.scan(true).unwrap());
        let first = outputs.snapshot.load_full();
        let port = |snapshot: &Snapshot| Arc::clone(&snapshot.services.frontend(&cluster_ip()).unwrap().port);
        assert_eq!((port(&first).cluster.len(), first.services.is_complete()), (1, true));
        let plan = outputs.plan.borrow_and_update().clone().unwrap();
        assert!(plan.services.node_ports.contains(&(Protocol::Tcp, 30080)));
        let report = outputs.report.borrow().clone();
        assert_eq!((report.services, report.endpoints, &*report.problems), (1, 1, &[][..]));

        write("s.yaml", &SERVICES.replace("10.244.1.5", "10.244.2.6"));
        feed(&mut line, folder.reread(["s.yaml"]));
        let second = outputs.snapshot.load_full();
        assert_eq!(port(&second).cluster[0].address.to_string(), "10.244.2.6");
        assert!(Arc::ptr_eq(&first.mesh, &second.mesh) && Arc::ptr_eq(&first.local, &second.local));
        assert_eq!(second.generation, first.generation + 1);
        assert!(!outputs.plan.has_changed().unwrap(), "the host has nothing to do");
        assert!(!line.mesh_changed && line.unsaved.services);

        // A new node, and the Services are the same; a Service in a pod range, and the node hears of it.
        write("c.yaml", &node("c", 3));
        feed(&mut line, folder.reread(["c.yaml"]));
        let third = outputs.snapshot.load_full();
        assert!(Arc::ptr_eq(&second.services, &third.services) && peers(&outputs).len() == 2);
        let plan = outputs.plan.borrow_and_update().clone().unwrap();
        write("s.yaml", &SERVICES.replace("10.96.0.5", "10.244.3.5"));
        feed(&mut line, folder.reread(["s.yaml"]));
        let said = |outputs: &Outputs| {
            outputs.report.borrow().problems.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            said(&outputs),
            ["Service/default/web, spec.clusterIPs: 10.244.3.5 lies in a pod range of the cluster"]
        );
        fs::remove_file(dir.path().join("s.yaml")).unwrap();
        feed(&mut line, folder.reread(["s.yaml"]));
        assert!(outputs.snapshot.load().services.is_empty() && said(&outputs).is_empty());
        let last = outputs.plan.borrow_and_update().clone().unwrap();
        assert!(last.services.node_ports.is_empty() && last.peer_ranges == plan.peer_ranges);
    }

    #[tokio::test]
    async fn services_outlive_the_agent_and_an_api_that_is_away() {
        let states = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::new(states.path(), "a");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("all.yaml"), node("a", 1) + &node("b", 2) + "---" + SERVICES).unwrap();
        let (mut line, _outputs) = StateLine::new(serving(), None);
        feed(&mut line, Folder::new(dir.path()).scan(true).unwrap());
        line.save_what_changed(Some(&files), CLOCK).await;
        assert!(!line.unsaved.mesh && !line.unsaved.services);

        let load = || match files.load().unwrap() {
            Loaded::Good(saved) => saved,
            other => panic!("{other:?}"),
        };
        let (mut line, outputs) = StateLine::new(serving(), Some(load()));
        let serves = |outputs: &Outputs| outputs.snapshot.load().services.frontend(&cluster_ip()).is_some();
        assert!(serves(&outputs) && !outputs.snapshot.load().services.is_complete());
        let list = |kind, text: &str, complete| SourceEvent::Reset {
            unread: Vec::new(),
            kind,
            objects: manifest::parse(text.as_bytes(), false).objects,
            complete,
        };
        let nodes = node("a", 1) + &node("b", 2);
        feed(&mut line, vec![list(Kind::Node, &nodes, true), list(Kind::ServiceCidr, "", true)]);
        feed(&mut line, vec![list(Kind::Service, "", false), list(Kind::EndpointSlice, "", true)]);
        assert!(serves(&outputs), "an incomplete list removes nothing");
        assert!(outputs.snapshot.load().services.frontend(&cluster_ip()).unwrap().port.cluster.is_empty());
        feed(&mut line, vec![list(Kind::Service, "", true)]);
        assert!(!serves(&outputs) && outputs.snapshot.load().services.is_complete());
    }
}
