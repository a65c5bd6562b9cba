//! A small mesh for this room's tests: real snapshot and reports, lanes that are only a queue.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant, UNIX_EPOCH};

use arc_swap::ArcSwap;

use super::handle::{Handle, LaneHandle, Live, NodeInfo};
use super::{pb, view};
use crate::datapath::{Counters, PeerTraffic};
use crate::io::clock;
use crate::io::kernel::bell;
use crate::io::lane::{Command, LaneOffloads, LaneReport};
use crate::packet::DropReason;
use crate::snapshot::{
    Encap, LaneId, LocalNode, Mesh, Peer, PeerId, PeerLane, PeerVxlan, PublicKey, Snapshot,
};
use crate::state::problem::ProblemKind;
use crate::state::run::StateReport;
use crate::tunnel::wireguard::{SessionReport, WireGuardStats};

/// Saturday, 21 November 2026, 12:00:00.250 UTC.
pub(super) const WALL_MS: u64 = 1_795_262_400_250;

pub(super) fn peer(id: u32, name: &str) -> Peer {
    let byte = id as u8 + 2;
    Peer {
        id: PeerId(id),
        name: name.to_owned(),
        encap: Some(Encap::WireGuard),
        lanes: vec![
            PeerLane { key: [byte; 32], port: 51820 },
            PeerLane { key: [byte + 100; 32], port: 51821 },
        ],
        endpoints: vec![format!("192.0.2.{byte}:51820").parse().unwrap()],
        vxlan: None,
        pod_ranges: vec![
            format!("10.244.{byte}.0/24").parse().unwrap(),
            format!("fd00:{byte}::/64").parse().unwrap(),
        ],
        addresses: vec![
            format!("192.0.2.{byte}").parse().unwrap(),
            format!("10.244.{byte}.0").parse().unwrap(),
        ],
        mtu: 1420,
        keepalive: 25,
        ordinary: false,
        takes_strangers: true,
        also: Vec::new(),
    }
}

/// node-b by WireGuard, node-c by VXLAN, a hole, node-d by WireGuard over IPv6.
pub(super) fn snapshot() -> Snapshot {
    let vxlan = Some(PeerVxlan {
        address: "198.51.100.3".parse().unwrap(),
        port: 8472,
        mac: Some([2, 0, 0, 0, 0, 3]),
    });
    let c = Peer { encap: Some(Encap::Vxlan), vxlan, mtu: 1450, keepalive: 0, ..peer(1, "node-c") };
    let d = Peer { endpoints: vec!["[2001:db8::4]:7".parse().unwrap()], mtu: 1400, ..peer(3, "node-d") };
    let peers = vec![Some(Arc::new(peer(0, "node-b"))), Some(Arc::new(c)), None, Some(Arc::new(d))];
    let local = LocalNode {
        name: "node-a".to_owned(),
        address_v4: Some("10.244.1.0".parse().unwrap()),
        address_v6: Some("fd00:1::".parse().unwrap()),
        vni: 1,
        mac: [2, 0, 0, 0, 0, 1],
    };
    Snapshot {
        generation: 9,
        local: Arc::new(local),
        mesh: Arc::new(Mesh { peers, ..Mesh::default() }),
        services: Arc::default(),
    }
}

pub(super) fn session(peer: u32, lane: u8, key: PublicKey, endpoint: &str) -> SessionReport {
    SessionReport {
        peer: PeerId(peer),
        lane: LaneId(lane),
        key,
        endpoint: Some(endpoint.parse().unwrap()),
        established: true,
        handshake_age: Some(Duration::from_millis(31_000)),
        received: 0,
        sent: 0,
        idle: None,
    }
}

fn traffic(received: u64, sent: u64, now: Instant) -> PeerTraffic {
    PeerTraffic {
        packets_sent: 2,
        bytes_sent: sent,
        packets_received: 1,
        bytes_received: received,
        last_received: now.checked_sub(Duration::from_secs(600)),
        last_sent: now.checked_sub(Duration::from_secs(601)),
    }
}

/// What the two lanes say at `now`.
pub(super) fn reports(now: Instant) -> Vec<LaneReport> {
    let fresh = PeerTraffic {
        packets_received: 2,
        last_received: now.checked_sub(Duration::from_secs(2)),
        last_sent: Some(now),
        ..traffic(1023, (2 << 20) - 1, now)
    };
    let trying = PeerTraffic {
        packets_received: 0,
        last_received: None,
        last_sent: Some(now),
        ..traffic(0, 300, now)
    };
    let unanswered = SessionReport {
        established: false,
        handshake_age: None,
        ..session(3, 0, [5; 32], "[2001:db8::4]:7")
    };
    let quiet = PeerTraffic::default();
    vec![
        LaneReport {
            public_key: [1; 32],
            sessions: vec![session(0, 0, [2; 32], "192.0.2.2:51820"), unanswered],
            traffic: vec![PeerTraffic { bytes_received: 1023, ..fresh }, traffic(1, 2, now), quiet, trying],
            wireguard: WireGuardStats { initiations_sent: 4, ..WireGuardStats::default() },
            offloads: LaneOffloads { tun_udp: false, ..LaneOffloads::default() },
        },
        LaneReport {
            public_key: [2; 32],
            sessions: vec![SessionReport {
                handshake_age: Some(Duration::from_secs(90)),
                ..session(0, 1, [102; 32], "192.0.2.2:51821")
            }],
            traffic: vec![traffic(1, 1, now)],
            wireguard: WireGuardStats::default(),
            offloads: LaneOffloads { tun_udp: false, udp_segmentation: false, ..LaneOffloads::default() },
        },
    ]
}

/// What the state line says of it.
pub(super) fn state() -> StateReport {
    StateReport {
        listed: true,
        nodes: 4,
        services: 7,
        endpoints: 40,
        problems_seen: ProblemKind::ALL.into_iter().zip([3, 0, 0, 1, 0, 0]).collect(),
        cluster_ranges: vec!["10.244.0.0/16".parse().unwrap()],
        ..StateReport::default()
    }
}

fn info(started: Instant) -> NodeInfo {
    NodeInfo {
        name: "node-a".to_owned(),
        version: "0.1.0".to_owned(),
        tun: "warren0".to_owned(),
        settings: vec![("encap".to_owned(), "auto".to_owned()), ("port".to_owned(), "51820".to_owned())],
        instance: "pod-1".to_owned(),
        started,
    }
}

fn lanes() -> (Vec<LaneHandle>, Vec<Receiver<Command>>) {
    (0..2u8)
        .map(|id| {
            let (commands, receiver) = sync_channel(1);
            let counters = Arc::new(Counters::default());
            if id == 0 {
                counters.count_drops(DropReason::NoRoute, 5);
                counters.count_drops(DropReason::HopLimit, 2);
            }
            let lane = LaneHandle {
                id: LaneId(id),
                public_key: [id + 1; 32],
                port: 51820 + u16::from(id),
                commands,
                bell: Arc::new(bell().unwrap()),
                counters,
                offloads: LaneOffloads { tun_udp: false, ..LaneOffloads::default() },
            };
            (lane, receiver)
        })
        .unzip()
}

/// The view of the small mesh, at a fixed time.
pub(super) fn view() -> pb::NodeView {
    let now = clock::now() + Duration::from_secs(10_000);
    let reports: Vec<Option<LaneReport>> = reports(now).into_iter().map(Some).collect();
    let mut view = view::build(&view::Parts {
        info: &info(now.checked_sub(Duration::from_secs(7380)).unwrap()),
        live: &Live {
            pod_mtu: 1420,
            pod_ranges: vec!["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
            state: Some(pb::StateView::from(&state())),
            ..Live::default()
        },
        snapshot: &snapshot(),
        lanes: &lanes().0,
        reports: &reports,
        now,
        wall: UNIX_EPOCH + Duration::from_millis(WALL_MS),
    });
    view.pid = 4711;
    view
}

/// The same as the answer to `warren peers`.
pub(super) fn peers_of(view: &pb::NodeView) -> pb::PeersResponse {
    pb::PeersResponse {
        node: view.node.clone(),
        collected_unix_ms: view.collected_unix_ms,
        peers: view.peers.clone(),
        silent_lanes: Vec::new(),
    }
}

/// A handle whose lanes are the receivers that come with it.
pub(super) fn handle() -> (Handle, Vec<Receiver<Command>>) {
    handle_of(snapshot())
}

fn handle_of(snapshot: Snapshot) -> (Handle, Vec<Receiver<Command>>) {
    let (lanes, receivers) = lanes();
    let handle = Handle::new(info(clock::now()), Arc::new(ArcSwap::from_pointee(snapshot)), lanes);
    handle.update(|live| {
        live.pod_mtu = 1420;
        live.not_ready = None;
    });
    (handle, receivers)
}

/// Answers as a lane does, until the handle is gone.
pub(super) fn answer_as(index: usize, commands: Receiver<Command>) {
    std::thread::spawn(move || {
        while let Ok(command) = commands.recv() {
            match command {
                Command::Report(answer) => {
                    let _ = answer.try_send(reports(clock::now()).swap_remove(index));
                }
                Command::Initiate(_) | Command::Keys(_) => {}
            }
        }
    });
}

/// A handle whose lanes answer.
pub(super) fn living_handle() -> Handle {
    living_handle_of(snapshot())
}

/// The same with another cluster.
pub(super) fn living_handle_of(snapshot: Snapshot) -> Handle {
    let (handle, receivers) = handle_of(snapshot);
    for (index, commands) in receivers.into_iter().enumerate() {
        answer_as(index, commands);
    }
    handle
}
