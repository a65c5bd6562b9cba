//! What the agent shares with whoever asks how it is.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use nix::sys::eventfd::EventFd;
use tokio::sync::{mpsc, oneshot};

use super::{pb, view};
use crate::datapath::Counters;
use crate::io::clock;
use crate::io::lane::{Command, LaneOffloads, LaneReport};
use crate::snapshot::{LaneId, PublicKey, Snapshot};

/// How long all lanes together may take to say how they are. A lane answers between two batches, so a
/// healthy one needs far less than a millisecond.
pub const REPORT_DEADLINE: Duration = Duration::from_secs(1);

/// What never changes while the agent runs.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    /// The Node's name.
    pub name: String,
    /// The agent's version.
    pub version: String,
    /// The tunnel device.
    pub tun: String,
    /// Settings worth showing, in the order to show them; no secret may be among them.
    pub settings: Vec<(String, String)>,
    /// Which agent this is, where several may stand by on one node; empty where that cannot be.
    pub instance: String,
    /// When the agent started.
    pub started: Instant,
}

/// What changes, and is not in the snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Live {
    /// The MTU that new pods get.
    pub pod_mtu: u16,
    /// This node's own pod ranges.
    pub pod_ranges: Vec<IpNet>,
    /// Why pods may not be started here; `None` when they may.
    pub not_ready: Option<String>,
    /// What is wrong now.
    pub problems: Vec<pb::Problem>,
    /// Why this node's Services are not ours; empty when they are.
    pub services_elsewhere: String,
    /// Where a change of keys stands; empty when there is none.
    pub keys: String,
    /// Why the runtime of this node has no list of plugins yet; empty when it has one, or none is wanted.
    pub cni: String,
    /// What the state line knows; `None` until it has said so.
    pub state: Option<pb::StateView>,
}

/// Somebody wants new keys.
#[derive(Debug)]
pub struct RotateOrder {
    /// How long the next keys are announced before they are used; `None` for as long as usual.
    pub overlap: Option<Duration>,
    /// Hears where the change stands, or why there is none.
    pub answer: oneshot::Sender<Result<String, String>>,
}

/// How to reach one lane.
#[derive(Clone, Debug)]
pub struct LaneHandle {
    /// Which.
    pub id: LaneId,
    /// Its WireGuard public key.
    pub public_key: PublicKey,
    /// Its UDP port.
    pub port: u16,
    /// Takes commands; a full queue counts as a lane that does not answer.
    pub commands: SyncSender<Command>,
    /// Wakes it.
    pub bell: Arc<EventFd>,
    /// What it counts.
    pub counters: Arc<Counters>,
    /// The offloads it started with: one that is gone since then was refused by the kernel.
    pub offloads: LaneOffloads,
}

/// Everything that a view is made of; cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    info: Arc<NodeInfo>,
    lanes: Arc<ArcSwap<Vec<LaneHandle>>>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    live: Arc<ArcSwap<Live>>,
    rotations: Option<mpsc::Sender<RotateOrder>>,
}

impl Handle {
    /// Puts a handle together. The node starts as not ready, until [`Self::update`] says otherwise.
    pub fn new(info: NodeInfo, snapshot: Arc<ArcSwap<Snapshot>>, lanes: Vec<LaneHandle>) -> Handle {
        let live = Live { not_ready: Some("starting".to_owned()), ..Live::default() };
        Handle {
            info: Arc::new(info),
            lanes: Arc::new(ArcSwap::from_pointee(lanes)),
            snapshot,
            live: Arc::new(ArcSwap::from_pointee(live)),
            rotations: None,
        }
    }

    /// The same, of an agent that takes orders for new keys.
    pub fn taking(self, rotations: mpsc::Sender<RotateOrder>) -> Handle {
        Handle { rotations: Some(rotations), ..self }
    }

    /// Asks for new keys.
    pub async fn rotate(&self, overlap: Option<Duration>) -> Result<String, String> {
        let (answer, answered) = oneshot::channel();
        let rotations = self.rotations.as_ref().ok_or("this agent has keys that cannot be changed")?;
        let ended = |_| "the agent is ending".to_owned();
        rotations
            .send(RotateOrder { overlap, answer })
            .await
            .map_err(|_| "the agent is ending".to_owned())?;
        answered.await.map_err(ended)?
    }

    /// Changes what is not in the snapshot. `change` may run more than once when two writers meet.
    pub fn update(&self, change: impl Fn(&mut Live)) {
        self.live.rcu(|live| {
            let mut next = Live::clone(live);
            change(&mut next);
            next
        });
    }

    /// What is not in the snapshot, now.
    pub fn live(&self) -> Arc<Live> {
        self.live.load_full()
    }

    /// What never changes.
    pub fn info(&self) -> &NodeInfo {
        &self.info
    }

    /// The lanes run now: before, there was nobody to ask.
    pub fn start_lanes(&self, lanes: Vec<LaneHandle>) {
        self.lanes.store(Arc::new(lanes));
    }

    /// The lanes, lane 0 first.
    pub fn lanes(&self) -> Arc<Vec<LaneHandle>> {
        self.lanes.load_full()
    }

    /// Asks every lane and puts the view together. Blocks for at most [`REPORT_DEADLINE`]: async callers
    /// use [`Self::collect_async`].
    pub fn collect(&self) -> pb::NodeView {
        let lanes = self.lanes();
        let reports = ask_all(&lanes);
        // The clock is read after the answers, so that no age comes out negative.
        view::build(&view::Parts {
            info: &self.info,
            live: &self.live.load(),
            snapshot: &self.snapshot.load(),
            lanes: &lanes,
            reports: &reports,
            now: clock::now(),
            wall: clock::wall(),
        })
    }

    /// [`Self::collect`] on a thread that may block.
    pub async fn collect_async(&self) -> Result<pb::NodeView, tokio::task::JoinError> {
        let handle = self.clone();
        tokio::task::spawn_blocking(move || handle.collect()).await
    }
}

/// All lanes are asked before the first answer is waited for: the deadline is for all of them together.
fn ask_all(lanes: &[LaneHandle]) -> Vec<Option<LaneReport>> {
    let asked: Vec<Option<Receiver<LaneReport>>> = lanes.iter().map(ask).collect();
    let deadline = clock::now() + REPORT_DEADLINE;
    asked
        .into_iter()
        .map(|answer| {
            let left = deadline.saturating_duration_since(clock::now());
            // Too late, or the lane has ended: no answer either way.
            answer?.recv_timeout(left).ok()
        })
        .collect()
}

fn ask(lane: &LaneHandle) -> Option<Receiver<LaneReport>> {
    let (sender, receiver) = sync_channel(1);
    lane.commands.try_send(Command::Report(sender)).ok()?;
    // A bell that cannot be rung has been rung already (its counter is full): the lane wakes anyway.
    let _ = lane.bell.write(1);
    Some(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake;

    #[test]
    fn every_lane_is_asked() {
        let view = fake::living_handle().collect();
        assert!(view.ready && view.lanes.iter().all(|lane| lane.answered));
        assert_eq!(view.peers.iter().find(|p| p.name == "node-b").unwrap().sessions, 2);
    }

    #[test]
    fn lanes_that_do_not_answer_cost_one_deadline_together_and_are_shown() {
        let (handle, mut receivers) = fake::handle();
        let start = clock::now();
        let view = handle.collect();
        let took = clock::now() - start;
        assert!(took >= REPORT_DEADLINE && took < REPORT_DEADLINE * 2, "{took:?}");
        assert!(view.lanes.iter().all(|lane| !lane.answered));
        // What needs no answer is there all the same.
        assert_eq!(view.drops.iter().map(|d| d.count).sum::<u64>(), 7);
        assert_eq!(view.peers.len(), 3);
        assert_eq!(handle.lanes()[0].bell.read().unwrap(), 1, "the bell was rung");

        // Lane 1 comes back; lane 0's queue is full now, which is as good as no answer, at once.
        let lane1 = receivers.pop().unwrap();
        lane1.try_recv().unwrap();
        fake::answer_as(1, lane1);
        let start = clock::now();
        let view = handle.collect();
        assert_eq!([false, true], [view.lanes[0].answered, view.lanes[1].answered]);
        assert!(clock::now() - start < REPORT_DEADLINE);
    }

    #[test]
    fn a_lane_that_has_ended_is_shown_at_once() {
        let (handle, receivers) = fake::handle();
        drop(receivers);
        let start = clock::now();
        assert!(handle.collect().lanes.iter().all(|lane| !lane.answered));
        assert!(clock::now() - start < REPORT_DEADLINE);
    }

    #[test]
    fn a_node_is_not_ready_before_it_is_said_to_be() {
        let (handle, _receivers) = fake::handle();
        let fresh = Handle::new(handle.info().clone(), Arc::clone(&handle.snapshot), Vec::new());
        assert_eq!(fresh.collect().not_ready_reason, "starting");
        assert!(fresh.collect().lanes.is_empty());
        fresh.start_lanes(handle.lanes().to_vec());
        assert_eq!(fresh.collect().lanes.len(), handle.lanes().len());
    }
}
