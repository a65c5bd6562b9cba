//! All lanes of a node: opens their queues and sockets, runs their threads, asks them.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::eventfd::EventFd;
use nix::unistd::Pid;
use thiserror::Error;
use tracing::{info, warn};

use super::clock;
use super::kernel::{self, Linux};
use super::lane::{Command, Desk, LaneLoop, LaneOffloads, Shared};
use super::tun::{TunError, TunOffloads, TunQueues};
use super::udp::{self, UdpError, UdpOptions, UdpSocket};
use crate::datapath::affinity::Affinity;
use crate::datapath::conntrack::FlowTable;
use crate::datapath::{Counters, Lane, LaneConfig};
use crate::snapshot::{LaneId, PeerId, PublicKey, Snapshot};
use crate::tunnel::wireguard::Keys;

/// VXLAN source sockets of a lane: what a hash over source ports needs to spread flows a little.
const VXLAN_SOURCES: u8 = 4;
/// Commands that may wait for a lane.
const COMMANDS: usize = 64;
/// Parcels that may wait for lane 0, each of 64 KiB and what one read adds, mostly as much again.
const PARCELS: usize = 128;

/// Why the lanes cannot be started.
#[derive(Debug, Error)]
pub enum FleetError {
    /// The TUN.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// A socket.
    #[error(transparent)]
    Udp(#[from] UdpError),
    /// A thread or a descriptor.
    #[error("cannot start a lane: {0}")]
    Io(#[from] io::Error),
}

/// What the lanes are made with.
pub struct FleetConfig {
    /// The interface.
    pub tun: String,
    /// The lanes' keys.
    pub keys: Vec<Keys>,
    /// The lanes' sockets, as many as keys.
    pub sockets: Vec<LaneSockets>,
    /// Whether each lane keeps to one processor.
    pub pinned: bool,
    /// Offloads that may be used.
    pub offloads: LaneOffloads,
    /// The flow table.
    pub flows: Arc<FlowTable>,
    /// Which endpoint each client had.
    pub affinity: Arc<Affinity>,
    /// What the lanes read.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
}

/// Which UDP ports the lanes have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// WireGuard's, of lane 0; lane i has the one `i` above. 0 is any.
    pub wireguard: u16,
    /// VXLAN's; `None` when the node does not speak it.
    pub vxlan: Option<u16>,
    /// Whether several sockets may have VXLAN's: all lanes of an agent do, and the next agent's too.
    pub share_vxlan: bool,
}

/// The sockets of one lane. A socket stays in the network namespace where it was opened, so the lane's thread and
/// its TUN may be in another.
#[derive(Debug)]
pub struct LaneSockets {
    wireguard: UdpSocket,
    vxlan: Option<UdpSocket>,
    vxlan_sources: Vec<UdpSocket>,
}

impl LaneSockets {
    /// Opens those of all lanes.
    pub fn open(lanes: usize, ports: Ports, receive_offload: bool) -> Result<Vec<LaneSockets>, UdpError> {
        (0..lanes).map(|lane| LaneSockets::open_one(lane, ports, receive_offload)).collect()
    }

    fn open_one(lane: usize, ports: Ports, receive_offload: bool) -> Result<LaneSockets, UdpError> {
        let wireguard = match ports.wireguard {
            0 => 0,
            first => u16::try_from(lane).ok().and_then(|lane| first.checked_add(lane)).unwrap_or(first),
        };
        let options = |port, share_port| UdpOptions { port, share_port, receive_offload, send_only: false };
        let wireguard = UdpSocket::bind(options(wireguard, false))?;
        let vxlan = ports.vxlan.map(|port| UdpSocket::bind(options(port, ports.share_vxlan))).transpose()?;
        let source = UdpOptions { send_only: true, ..UdpOptions::default() };
        let vxlan_sources = (0..if vxlan.is_some() { VXLAN_SOURCES } else { 0 })
            .map(|_| UdpSocket::bind(source))
            .collect::<Result<_, _>>()?;
        Ok(LaneSockets { wireguard, vxlan, vxlan_sources })
    }

    /// WireGuard's port.
    pub fn wireguard_port(&self) -> u16 {
        self.wireguard.port()
    }

    /// VXLAN's port.
    pub fn vxlan_port(&self) -> Option<u16> {
        self.vxlan.as_ref().map(UdpSocket::port)
    }
}

/// One running lane, from the outside.
#[derive(Debug)]
pub struct RunningLane {
    /// Which.
    pub id: LaneId,
    /// Its public key.
    pub public_key: PublicKey,
    /// Its WireGuard port.
    pub port: u16,
    /// To ask it something; ring the bell afterwards.
    pub commands: SyncSender<Command>,
    /// Wakes it.
    pub bell: Arc<EventFd>,
    /// Its counters.
    pub counters: Arc<Counters>,
    /// Offloads that it started with.
    pub offloads: LaneOffloads,
    thread: Option<JoinHandle<()>>,
}

/// All lanes. Dropping it stops them.
#[derive(Debug)]
pub struct Fleet {
    /// The lanes, lane 0 first.
    pub lanes: Vec<RunningLane>,
    stop: Arc<AtomicBool>,
}

impl Fleet {
    /// Opens the TUN's queues, then starts the threads. `ended` is called with the reason when a lane fails: the
    /// data path is broken then, and the process should end.
    pub fn start(
        mut config: FleetConfig,
        ended: impl Fn(LaneId, String) + Clone + Send + 'static,
    ) -> Result<Fleet, FleetError> {
        let sockets = std::mem::take(&mut config.sockets);
        let stop = Arc::new(AtomicBool::new(false));
        let mut fleet = Fleet { lanes: Vec::new(), stop: Arc::clone(&stop) };
        let shared = Shared { snapshot: Arc::clone(&config.snapshot), stop };
        let epoch = (clock::now(), clock::since_boot_ms());
        let neighbours = Arc::default();
        let lanes = config.keys.len().min(sockets.len());
        let queues = Arc::new(TunQueues::new(lanes));
        let (put, take) = sync_channel(PARCELS);
        let mut take = Some(take);
        // Everything is opened before anything runs: what is refused must not leave half a data path.
        let mut ready = Vec::new();
        for (index, (key, sockets)) in config.keys.iter().zip(sockets).enumerate() {
            let id = LaneId(index as u8);
            let (kernel, offloads) = open_kernel(&config, id, sockets, &queues)?;
            let mut lane = Lane::new(LaneConfig {
                id,
                private: key.current.to_bytes(),
                seed: random_seed()?,
                vxlan_sources: VXLAN_SOURCES,
                neighbours: Arc::clone(&neighbours),
                flows: Arc::clone(&config.flows),
                affinity: Arc::clone(&config.affinity),
                epoch,
            });
            lane.set_keys(epoch.0, key.clone());
            let (commands, orders) = sync_channel(COMMANDS);
            fleet.lanes.push(RunningLane {
                id,
                public_key: lane.wireguard().public_key(),
                port: kernel.wireguard.port(),
                commands,
                bell: Arc::clone(&kernel.bell),
                counters: lane.counters(),
                offloads,
                thread: None,
            });
            let first = fleet.lanes.first().filter(|first| first.id != id);
            let putting = first.map(|first| (put.clone(), Arc::clone(&first.bell)));
            let desk = Desk { taking: take.take(), putting };
            ready.push((kernel, lane, orders, desk, offloads));
        }
        for (running, (kernel, lane, orders, desk, offloads)) in fleet.lanes.iter_mut().zip(ready) {
            let (id, ended, shared) = (running.id, ended.clone(), shared.clone());
            let pinned = config.pinned;
            let thread = std::thread::Builder::new().name(format!("lane-{}", id.0)).spawn(move || {
                if pinned && let Err(error) = pin(usize::from(id.0)) {
                    warn!(lane = id.0, "the lane cannot be kept on one processor: {error}");
                }
                let lane = LaneLoop::new(kernel, lane, shared, orders, desk, offloads);
                if let Err(reason) = run_lane(lane) {
                    ended(id, reason);
                }
            })?;
            running.thread = Some(thread);
        }
        Ok(fleet)
    }

    /// Wakes all lanes, for instance after a new snapshot.
    pub fn ring(&self) {
        for lane in &self.lanes {
            // Full is rung already.
            let _ = lane.bell.write(1);
        }
    }

    /// Gives the lanes other keys, lane 0's first. False if one is so busy that it could not be told: then all are
    /// to be told again.
    pub fn change_keys(&self, keys: &[Keys]) -> bool {
        let told = self.lanes.iter().zip(keys);
        let told = told.map(|(lane, keys)| lane.commands.try_send(Command::Keys(keys.clone())).is_ok());
        let all = told.fold(true, |all, told| all & told);
        self.ring();
        all
    }

    /// Tells every lane to start sessions with these peers.
    pub fn initiate(&self, peers: &[PeerId]) {
        for lane in &self.lanes {
            // A lane with that many open questions has others than when to start sessions.
            if lane.commands.try_send(Command::Initiate(peers.to_vec())).is_err() {
                warn!(lane = lane.id.0, "the lane is too busy to start sessions: they start with traffic");
            }
        }
        self.ring();
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.ring();
        for lane in &mut self.lanes {
            if let Some(thread) = lane.thread.take() {
                // A panic was told through `ended`.
                let _ = thread.join();
            }
        }
    }
}

fn open_kernel(
    config: &FleetConfig,
    id: LaneId,
    sockets: LaneSockets,
    queues: &Arc<TunQueues>,
) -> Result<(Linux, LaneOffloads), FleetError> {
    let LaneSockets { wireguard, vxlan, vxlan_sources } = sockets;
    if let Some([receive, send]) = wireguard.small_buffers().filter(|_| id == LaneId(0)) {
        warn!(
            receive,
            send,
            "the kernel gives the tunnel's sockets smaller buffers than they need to be fast: give the agent the \
             capability CAP_NET_ADMIN in the node's own user namespace, or raise net.core.rmem_max to {} and \
             net.core.wmem_max to {}",
            udp::RECEIVE_BYTES,
            udp::SEND_BYTES
        );
    }
    let wanted = TunOffloads { tcp: config.offloads.tun_tcp, udp: config.offloads.tun_udp };
    let tun = queues.open(&config.tun, wanted)?;
    let offloads = LaneOffloads {
        tun_tcp: tun.offloads().tcp,
        tun_udp: tun.offloads().udp,
        joining: config.offloads.joining,
        udp_segmentation: config.offloads.udp_segmentation && wireguard.segmentation(),
        udp_receive: wireguard.receive_offload(),
        ack_joining: config.offloads.ack_joining,
    };
    if offloads != config.offloads {
        info!(lane = id.0, ?offloads, "this kernel offers fewer offloads than Warren can use");
    }
    let kernel = Linux {
        name: config.tun.clone(),
        tun,
        queues: Arc::clone(queues),
        wireguard,
        vxlan,
        vxlan_sources,
        bell: Arc::new(kernel::bell()?),
        receiver: udp::Receiver::default(),
        sender: udp::Sender::default(),
    };
    Ok((kernel, offloads))
}

/// Keeps this thread on one of the processors that it may use: the `number`-th, counting round.
fn pin(number: usize) -> nix::Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let usable: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true)).collect();
    let mut one = CpuSet::new();
    one.set(*usable.get(number % usable.len().max(1)).ok_or(nix::errno::Errno::EINVAL)?)?;
    sched_setaffinity(this, &one)
}

/// Runs a lane to its end; a panic is a reason like any other.
fn run_lane(mut lane: LaneLoop<Linux>) -> Result<(), String> {
    match catch_unwind(AssertUnwindSafe(|| lane.run())) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("panicked: {}", panic_text(&*panic))),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

/// Randomness for keyed hashes.
pub fn random_seed() -> io::Result<(u64, u64)> {
    let mut bytes = [0; 16];
    // SAFETY: the buffer is ours and as long as said.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != bytes.len() as isize {
        return Err(io::Error::last_os_error());
    }
    let (low, high) = bytes.split_at(8);
    let word = |half: &[u8]| half.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    Ok((word(low), word(high)))
}
