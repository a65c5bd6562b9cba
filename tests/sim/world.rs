//! Whole nodes on a simulated network, in virtual time.
//!
//! 1. A scenario builds a [`World`]: nodes, what they know of each other, faults.
//! 2. [`World::send`] hands a packet to a node's TUN; the lane's datagrams go through [`Net`] and come back
//!    as events of [`World::run_for`], in the order of their time.
//! 3. Everything that reaches a TUN is held against the [`Ledger`], which knows what was sent.
//! 4. [`World::audit`] adds up every node's counters: no packet may be unaccounted for.
//!
//! boringtun's clock is the thread's mock clock; it moves together with `now`. Its wall clock is the real one,
//! which stands still while virtual time passes. So a session made anew later sends timestamps that are older
//! than those its predecessor sent after its first second: a clock that was set back. [`World::step_clock`] sets
//! a node's clock forward while it runs, as when a machine was suspended: boringtun's goes on in sleep, ours does not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mock_instant::MockClock;
use warren::datapath::affinity::Affinity;
use warren::datapath::conntrack::{FlowTable, Seed};
use warren::datapath::{Arrival, Counters, Lane, LaneConfig, Output, Total};
use warren::packet::coalesce::{Memory, Offloads};
use warren::packet::segment::SuperPacket;
use warren::packet::vnet::{VNET_HDR_LEN, VnetHdr};
use warren::packet::{DropReason, parse};
use warren::snapshot::{
    Encap, LaneId, LocalNode, Mesh, Owner, Peer, PeerId, PeerLane, PeerVxlan, PublicKey, Snapshot,
};
use warren::tunnel::Via;
use warren::tunnel::vxlan_link::Neighbours;
use warren::tunnel::wireguard::{Keys, SessionReport};
use x25519_dalek::StaticSecret;

use crate::ledger::Ledger;
use crate::net::{Datagram, Host, Landing, Net};
use crate::packets::{self, Probe};
use crate::rng::Rng;

pub(crate) const WIREGUARD_PORT: u16 = 51_820;
const VXLAN_PORT: u16 = 8472;
const VXLAN_SOURCES: u16 = 40_000;

/// How a node wants its packets wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    WireGuard,
    Vxlan,
    /// VXLAN within a location, WireGuard between locations.
    Auto,
}

/// What a node is like.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub lanes: u8,
    pub policy: Policy,
    pub location: u8,
    pub announces_mac: bool,
    pub keepalive: u16,
    pub outer_v6: bool,
    /// The nodes it has heard of; `None` for all.
    pub knows: Option<Vec<usize>>,
}

impl Default for Spec {
    fn default() -> Spec {
        Spec {
            lanes: 1,
            policy: Policy::WireGuard,
            location: 0,
            announces_mac: true,
            keepalive: 0,
            outer_v6: false,
            knows: None,
        }
    }
}

pub(crate) struct Node {
    pub spec: Spec,
    /// Its address on the network.
    pub address: IpAddr,
    /// What it says of itself.
    pub endpoints: Vec<SocketAddr>,
    pub keys: Vec<[u8; 32]>,
    /// Second keys, while they change; empty otherwise.
    pub also: Vec<[u8; 32]>,
    pub lanes: Vec<Lane>,
    pub snapshot: Arc<Snapshot>,
    /// Packets that reached its TUN and are no probes.
    pub other: Vec<Vec<u8>>,
    timers: Vec<Option<Duration>>,
    books: Books,
    /// How far boringtun's clock is ahead here.
    skew: Duration,
}

/// What went into a node, to be found again in its counters.
#[derive(Clone, Copy, Debug, Default)]
struct Books {
    /// Packets handed to the TUN, and ICMP errors that it sent through a tunnel.
    handed: u64,
    /// Datagrams that carry a packet.
    arrived: u64,
    /// Drops of datagrams that carry none.
    control_drops: u64,
    /// Sent, received, dropped and lost in queues by lanes that are no more.
    retired: u64,
}

pub(crate) struct World {
    pub nodes: Vec<Node>,
    pub net: Net,
    pub rng: Rng,
    pub ledger: Ledger,
    /// Largest inner packet of every path.
    pub mtu: u16,
    /// Datagrams of one sender that arrive together are handed over together.
    pub receive_offload: bool,
    at: Duration,
    base: Instant,
    events: BTreeMap<(Duration, u64), (Landing, Vec<u8>)>,
    timers: BTreeSet<(Duration, usize, usize)>,
    serial: u64,
    generation: u64,
    out: Output,
    receive: Vec<u8>,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        #[allow(clippy::disallowed_methods)] // where virtual time begins does not matter
        let base = Instant::now();
        MockClock::set_time(Duration::ZERO);
        World {
            nodes: Vec::new(),
            net: Net::new(),
            rng: Rng::new(seed),
            ledger: Ledger::default(),
            mtu: 1420,
            receive_offload: false,
            at: Duration::ZERO,
            base,
            events: BTreeMap::new(),
            timers: BTreeSet::new(),
            serial: 0,
            generation: 0,
            out: Output::new(Offloads { tcp: true, udp: true, acks: false }),
            receive: vec![0; 1 << 17],
        }
    }

    /// A world of `count` nodes that all know each other.
    pub(crate) fn mesh(seed: u64, count: usize, spec: Spec) -> World {
        let mut world = World::new(seed);
        (0..count).for_each(|_| _ = world.add(spec.clone()));
        world.publish();
        world
    }

    // --- nodes -----------------------------------------------------------------------------------

    pub(crate) fn add(&mut self, spec: Spec) -> usize {
        let id = self.nodes.len();
        let address = underlay(id, spec.outer_v6);
        let keys = (0..spec.lanes).map(|_| self.rng.bytes()).collect();
        let snapshot = Arc::new(Snapshot {
            generation: 0,
            local: Arc::new(LocalNode {
                name: format!("n{id}"),
                address_v4: Some(node_v4(id)),
                address_v6: Some(node_v6(id)),
                vni: 1,
                mac: mac(id),
            }),
            mesh: Arc::new(Mesh::default()),
            services: Arc::default(),
        });
        self.nodes.push(Node {
            endpoints: vec![SocketAddr::new(address, WIREGUARD_PORT)],
            spec,
            address,
            keys,
            also: Vec::new(),
            lanes: Vec::new(),
            snapshot,
            other: Vec::new(),
            timers: Vec::new(),
            books: Books::default(),
            skew: Duration::ZERO,
        });
        self.net.attach(id, address);
        self.boot(id);
        id
    }

    fn boot(&mut self, id: usize) {
        let flows = FlowTable::in_memory(256, Seed(1, id as u64)).expect("a small table");
        let (flows, neighbours) = (Arc::new(flows), Arc::new(Neighbours::default()));
        let affinity = Arc::new(Affinity::in_memory(64));
        let epoch = (self.now(), 0);
        let seeds: Vec<(u64, u64)> =
            (0..self.nodes[id].keys.len()).map(|_| (self.rng.next(), self.rng.next())).collect();
        let node = &mut self.nodes[id];
        node.lanes = std::iter::zip(&node.keys, seeds)
            .enumerate()
            .map(|(i, (key, seed))| {
                Lane::new(LaneConfig {
                    id: LaneId(i as u8),
                    private: *key,
                    seed,
                    vxlan_sources: 4,
                    neighbours: Arc::clone(&neighbours),
                    flows: Arc::clone(&flows),
                    affinity: Arc::clone(&affinity),
                    epoch,
                })
            })
            .collect();
        for (lane, timer) in node.timers.iter_mut().enumerate() {
            if let Some(at) = timer.take() {
                self.timers.remove(&(at, id, lane));
            }
        }
        node.timers = vec![None; node.lanes.len()];
    }

    /// The node's agent dies and comes back: same keys, no sessions. Its wall clock: see the module.
    pub(crate) fn restart(&mut self, id: usize) {
        let node = &mut self.nodes[id];
        node.skew = Duration::ZERO;
        node.books.retired +=
            node.lanes.iter().map(|lane| accounted(&lane.counters()) + lane.waiting() as u64).sum::<u64>();
        self.boot(id);
    }

    /// The clock of a running node jumps forward, until it is restarted.
    pub(crate) fn step_clock(&mut self, id: usize, by: Duration) {
        self.nodes[id].skew += by;
    }

    /// New keys; nobody is told before [`Self::publish`].
    pub(crate) fn rekey(&mut self, id: usize) {
        let keys = (0..self.nodes[id].spec.lanes).map(|_| self.rng.bytes()).collect();
        self.nodes[id].keys = keys;
        self.restart(id);
    }

    /// The running lanes get these keys; nobody is told before [`Self::publish`].
    pub(crate) fn set_keys(&mut self, id: usize, keys: Vec<[u8; 32]>, also: Vec<[u8; 32]>) {
        let secret = |key: &[u8; 32]| StaticSecret::from(*key);
        for number in 0..keys.len() {
            let keys = Keys { current: secret(&keys[number]), also: also.get(number).map(secret) };
            self.drive(id, number, |lane, now, _, _, _| lane.set_keys(now, keys));
        }
        (self.nodes[id].keys, self.nodes[id].also) = (keys, also);
    }

    /// The node is reached at another address from now on; what it announces stays.
    pub(crate) fn move_to(&mut self, id: usize, address: IpAddr) {
        self.net.detach(self.nodes[id].address);
        self.net.attach(id, address);
        self.nodes[id].address = address;
    }

    /// Every node gets a snapshot of how things stand.
    pub(crate) fn publish(&mut self) {
        self.generation += 1;
        let described: Vec<Peer> = (0..self.nodes.len()).map(|id| self.describe(id)).collect();
        for id in 0..self.nodes.len() {
            let mesh = Arc::new(self.mesh_of(id, &described));
            let node = &mut self.nodes[id];
            let local = Arc::clone(&node.snapshot.local);
            node.snapshot =
                Arc::new(Snapshot { generation: self.generation, local, mesh, services: Arc::default() });
        }
    }

    fn describe(&self, id: usize) -> Peer {
        let node = &self.nodes[id];
        let lane =
            |(i, key): (usize, &[u8; 32])| PeerLane { key: public(key), port: WIREGUARD_PORT + i as u16 };
        Peer {
            id: PeerId(id as u32),
            name: format!("n{id}"),
            encap: None,
            lanes: node.keys.iter().enumerate().map(lane).collect(),
            endpoints: node.endpoints.clone(),
            vxlan: (node.spec.policy != Policy::WireGuard).then(|| PeerVxlan {
                address: node.address,
                port: VXLAN_PORT,
                mac: node.spec.announces_mac.then(|| mac(id)),
            }),
            pod_ranges: vec![pod_range(id, false), pod_range(id, true)],
            addresses: vec![node_v4(id).into(), node_v6(id).into()],
            mtu: self.mtu,
            keepalive: node.spec.keepalive,
            ordinary: false,
            takes_strangers: true,
            also: node.also.iter().map(public).collect(),
        }
    }

    fn mesh_of(&self, id: usize, described: &[Peer]) -> Mesh {
        let mut mesh = Mesh { peers: vec![None; described.len()], ..Mesh::default() };
        for peer in described {
            let other = peer.id.0 as usize;
            let (pod, node) = match other == id {
                true => (Owner::LocalPod, Owner::LocalNode),
                false => (Owner::PeerPod(peer.id), Owner::PeerNode(peer.id)),
            };
            if self.nodes[id].spec.knows.as_ref().is_some_and(|known| other != id && !known.contains(&other))
            {
                continue;
            }
            peer.pod_ranges.iter().for_each(|range| _ = mesh.routes.insert(*range, pod));
            peer.addresses.iter().for_each(|address| _ = mesh.routes.insert((*address).into(), node));
            if other == id {
                continue;
            }
            let encap = self.encap(id, other);
            for (i, lane) in peer.lanes.iter().enumerate() {
                mesh.keys.insert(lane.key, (peer.id, LaneId(i as u8)));
            }
            for (i, key) in peer.also.iter().enumerate() {
                mesh.keys.insert(*key, (peer.id, LaneId(i as u8)));
            }
            if let Some(vxlan) = &peer.vxlan {
                mesh.vxlan_sources.insert(vxlan.address, peer.id);
            }
            mesh.peers[other] = Some(Arc::new(Peer { encap: Some(encap), ..peer.clone() }));
        }
        mesh
    }

    pub(crate) fn encap(&self, a: usize, b: usize) -> Encap {
        let (a, b) = (&self.nodes[a].spec, &self.nodes[b].spec);
        match (a.policy, b.policy) {
            (Policy::WireGuard, _) | (_, Policy::WireGuard) => Encap::WireGuard,
            (Policy::Vxlan, _) | (_, Policy::Vxlan) => Encap::Vxlan,
            (Policy::Auto, Policy::Auto) if a.location == b.location => Encap::Vxlan,
            (Policy::Auto, Policy::Auto) => Encap::WireGuard,
        }
    }

    // --- packets ---------------------------------------------------------------------------------

    /// A pod of `from` sends a numbered packet to a pod of `to`; returns its number.
    pub(crate) fn send(&mut self, from: usize, to: usize) -> u64 {
        let probe = self.probe(from, to);
        self.send_probe(from, to, &probe)
    }

    /// A probe between pods of two nodes, of either family, not sent yet.
    pub(crate) fn probe(&mut self, from: usize, to: usize) -> Probe {
        let v6 = self.rng.permille(300);
        let len = self.rng.within(64..u64::from(self.mtu) + 1) as usize;
        let ports = (self.rng.within(1024..60_000) as u16, 5000);
        let (source, destination) = (pod(from, 5, v6), pod(to, 9, v6));
        let id = self.ledger.number();
        Probe { id, source, destination, ports, len, hop_limit: 64, dont_fragment: true }
    }

    /// Hands a probe over that is to arrive once and unchanged at `to` alone.
    pub(crate) fn send_probe(&mut self, from: usize, to: usize, probe: &Probe) -> u64 {
        let expected = probe.build();
        // VXLAN does not notice a datagram that the network has doubled.
        let twice = self.encap(from, to) == Encap::Vxlan;
        self.ledger.sent(probe.id, to, expected, self.at, twice);
        self.hand_over(from, probe);
        probe.id
    }

    /// Hands a probe over that must not arrive anywhere.
    pub(crate) fn send_forbidden(&mut self, from: usize, probe: &Probe) {
        self.ledger.forbidden(probe.id);
        self.hand_over(from, probe);
    }

    fn hand_over(&mut self, from: usize, probe: &Probe) {
        let frame = [&[0; VNET_HDR_LEN][..], &probe.build()].concat();
        let lane = usize::from(probe.ports.0) % self.nodes[from].lanes.len();
        self.hand_frame(from, lane, frame, 1);
    }

    /// Hands a frame of so many packets to a lane's TUN queue.
    pub(crate) fn hand_frame(&mut self, from: usize, lane: usize, mut frame: Vec<u8>, packets: u64) {
        self.nodes[from].books.handed += packets;
        self.drive(from, lane, |lane, now, snapshot, _, out| lane.handle_tun(now, snapshot, &mut frame, out));
    }

    /// Starts sessions as an agent does after a restart.
    pub(crate) fn initiate(&mut self, from: usize, to: usize) {
        for lane in 0..self.nodes[from].lanes.len() {
            let peer = PeerId(to as u32);
            self.drive(from, lane, |lane, now, snapshot, _, out| lane.initiate(now, snapshot, peer, out));
        }
    }

    /// Puts a datagram on the network in anybody's name.
    pub(crate) fn inject(&mut self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        if let Some(landing) = self.net.land(self.at, from, to) {
            self.serial += 1;
            let at = self.at + Duration::from_millis(1);
            self.events.insert((at, self.serial), (landing, bytes.to_vec()));
        }
    }

    // --- time ------------------------------------------------------------------------------------

    pub(crate) fn at(&self) -> Duration {
        self.at
    }

    pub(crate) fn now(&self) -> Instant {
        self.base + self.at
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.at + time;
        loop {
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let timer = self.timers.first().map(|(at, _, _)| *at);
            let Some(next) = event.into_iter().chain(timer).min().filter(|next| *next <= end) else { break };
            self.set_time(next.max(self.at));
            if event == Some(next) {
                self.deliver_next();
            } else {
                self.fire_next();
            }
        }
        self.set_time(end);
    }

    pub(crate) fn run_ms(&mut self, ms: u64) {
        self.run_for(Duration::from_millis(ms));
    }

    pub(crate) fn run_secs(&mut self, secs: u64) {
        self.run_for(Duration::from_secs(secs));
    }

    /// Sends a packet every 200 ms until one arrives; how long that took.
    #[track_caller]
    pub(crate) fn talk_until_heard(&mut self, from: usize, to: usize, limit: Duration) -> Duration {
        let start = self.at;
        let mut last = self.send(from, to);
        while !self.ledger.has(last) {
            assert!(self.at - start < limit, "nothing arrives within {limit:?} of virtual time");
            self.run_ms(150);
            last = self.send(from, to);
            self.run_ms(50);
        }
        self.at - start
    }

    fn set_time(&mut self, at: Duration) {
        self.at = at;
        MockClock::set_time(at);
    }

    fn fire_next(&mut self) {
        let Some((at, node, lane)) = self.timers.pop_first() else { return };
        self.nodes[node].timers[lane] = None;
        self.drive(node, lane, |lane, now, snapshot, _, out| lane.handle_timeout(now, snapshot, out));
        let next = self.nodes[node].timers[lane];
        assert!(next.is_none_or(|next| next > at), "a timer that does not move on");
    }

    fn deliver_next(&mut self) {
        let Some(((at, _), (landing, bytes))) = self.events.pop_first() else { return };
        let Some((encap, lane)) = self.socket(landing) else { return };
        let stride = bytes.len();
        let mut all = bytes;
        while self.receive_offload
            && let Some(next) = self.events.first_entry()
            && next.key().0 == at
            && next.get().0 == landing
            && next.get().1.len() == stride
            && all.len() + stride < 65_000
        {
            all.extend(next.remove().1);
        }
        let arrival = Arrival { encap, from: landing.from, offset: 0, len: all.len(), stride: stride.max(1) };
        let packets = all.chunks(stride.max(1)).filter(|datagram| carries_packet(encap, datagram)).count();
        let before = refused(&self.nodes[landing.host].lanes[lane].counters());
        let icmp = self.nodes[landing.host].lanes[lane].counters().total(Total::IcmpSent);
        self.drive(landing.host, lane, |lane, now, snapshot, receive, out| {
            receive[..all.len()].copy_from_slice(&all);
            lane.handle_udp(now, snapshot, arrival, receive, out);
        });
        let node = &mut self.nodes[landing.host];
        let counters = node.lanes[lane].counters();
        node.books.arrived += packets as u64;
        node.books.handed += counters.total(Total::IcmpSent) - icmp;
        if packets == 0 {
            node.books.control_drops += refused(&counters) - before;
        }
    }

    /// Which lane reads from a port.
    fn socket(&self, landing: Landing) -> Option<(Encap, usize)> {
        let lanes = self.nodes[landing.host].lanes.len();
        match landing.port {
            VXLAN_PORT => Some((Encap::Vxlan, usize::from(landing.from.port()) % lanes)),
            port => {
                let lane = usize::from(port.checked_sub(WIREGUARD_PORT)?);
                (lane < lanes).then_some((Encap::WireGuard, lane))
            }
        }
    }

    /// Lets a lane do something, and carries away what comes out of it.
    fn drive(
        &mut self,
        id: usize,
        lane: usize,
        act: impl FnOnce(&mut Lane, Instant, &Snapshot, &mut [u8], &mut Output),
    ) {
        let now = self.now();
        let node = &mut self.nodes[id];
        let snapshot = Arc::clone(&node.snapshot);
        MockClock::set_time(self.at + node.skew);
        let packets = {
            let lane = &mut node.lanes[lane];
            act(lane, now, &snapshot, &mut self.receive, &mut self.out);
            lane.finish_tun(now, &mut self.receive, &mut self.out);
            frames(&mut self.receive, &mut self.out)
        };
        MockClock::set_time(self.at);
        let timer = node.lanes[lane].poll_timeout().map(|at| at.saturating_duration_since(self.base));
        let old = std::mem::replace(&mut node.timers[lane], timer);
        if old != timer {
            old.into_iter().for_each(|at| _ = self.timers.remove(&(at, id, lane)));
            self.timers.extend(timer.map(|at| (at, id, lane)));
        }
        for packet in packets {
            match packets::probe_id(&packet) {
                Some(number) => self.ledger.arrived(number, id, &packet, self.at, self.net.doubled),
                None => self.nodes[id].other.push(packet),
            }
        }
        self.transmit(id, lane);
        for parcel in std::mem::take(&mut self.out.parcels) {
            let mut take =
                |lane: &mut Lane, now: Instant, snapshot: &Snapshot, _: &mut [u8], out: &mut Output| {
                    lane.take_parcel(now, snapshot, &parcel, out);
                };
            // Of one type, however often: what drives itself must not be another function each time.
            self.drive(id, 0, &mut take as &mut Act<'_>);
        }
    }

    fn transmit(&mut self, id: Host, lane: usize) {
        let address = self.nodes[id].address;
        for run in self.out.tx.runs() {
            let port = match run.via {
                Via::WireGuard => WIREGUARD_PORT + lane as u16,
                Via::Vxlan(socket) => VXLAN_SOURCES + u16::from(socket),
            };
            for bytes in self.out.tx.bytes(run).chunks(run.segment.max(1)) {
                let datagram =
                    Datagram { from: SocketAddr::new(address, port), to: run.to, bytes: bytes.to_vec() };
                for (delay, landing) in self.net.carry(self.at, id, &datagram, &mut self.rng) {
                    self.serial += 1;
                    self.events.insert((self.at + delay, self.serial), (landing, datagram.bytes.clone()));
                }
                if let Some(tap) = &mut self.net.tap {
                    tap.push(datagram);
                }
            }
        }
        self.out.tx.clear();
    }

    // --- books -----------------------------------------------------------------------------------

    /// Drops of one reason, all lanes of a node.
    pub(crate) fn dropped(&self, id: usize, reason: DropReason) -> u64 {
        self.nodes[id].lanes.iter().map(|lane| lane.counters().dropped(reason)).sum()
    }

    /// A total, all lanes of a node.
    pub(crate) fn total(&self, id: usize, total: Total) -> u64 {
        self.nodes[id].lanes.iter().map(|lane| lane.counters().total(total)).sum()
    }

    /// Whether a node's first lane has a live session with another.
    pub(crate) fn established(&self, id: usize, other: usize) -> bool {
        self.report(id).iter().any(|s| s.peer == PeerId(other as u32) && s.established)
    }

    /// Where a node's first lane sends to another.
    pub(crate) fn endpoint(&self, id: usize, other: usize) -> Option<SocketAddr> {
        self.report(id).iter().find(|s| s.peer == PeerId(other as u32) && s.established)?.endpoint
    }

    /// The sessions of a node's first lane.
    pub(crate) fn report(&self, id: usize) -> Vec<SessionReport> {
        MockClock::set_time(self.at + self.nodes[id].skew);
        let report = self.nodes[id].lanes[0].wireguard().report(self.now());
        MockClock::set_time(self.at);
        report
    }

    /// Every packet that went into a node came out of it, waits in it, or was dropped for a counted reason.
    pub(crate) fn audit(&self) {
        for (id, node) in self.nodes.iter().enumerate() {
            let now: u64 =
                node.lanes.iter().map(|lane| accounted(&lane.counters()) + lane.waiting() as u64).sum();
            let books = node.books;
            assert_eq!(
                now + books.retired,
                books.handed + books.arrived + books.control_drops,
                "node {id} at {:?}: sent, received, waiting and dropped do not add up to {books:?}; {}",
                self.at,
                self.describe_counters(id)
            );
        }
    }

    /// A node's counters that are not zero.
    pub(crate) fn describe_counters(&self, id: usize) -> String {
        let reasons = DropReason::ALL.iter().map(|r| (r.name(), self.dropped(id, *r)));
        let totals = Total::ALL.iter().map(|t| (t.name(), self.total(id, *t)));
        let shown = totals.chain(reasons).filter(|(_, n)| *n > 0).map(|(name, n)| format!("{name} {n}"));
        shown.collect::<Vec<_>>().join(", ")
    }
}

/// What a lane is made to do.
type Act<'a> = dyn FnMut(&mut Lane, Instant, &Snapshot, &mut [u8], &mut Output) + 'a;

/// Takes the frames out of a batch, cut apart again where they were joined.
fn frames(receive: &mut [u8], out: &mut Output) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let mut room = vec![0; if out.tun.is_empty() { 0 } else { 1 << 16 }];
    for frame in out.tun.frames() {
        let memory = Memory { receive, plain: &mut out.plain };
        let len = frame.gather(&memory, &mut room);
        let (vnet, _) = VnetHdr::decode(&frame.vnet).expect("our own header");
        let headers = parse(&room[..len]).expect("a packet for the TUN parses");
        let parts = SuperPacket::new(&vnet, &room[..len], &headers).expect("a frame can be cut");
        assert_eq!(parts.count(), usize::from(frame.packets));
        for i in 0..parts.count() {
            let mut packet = vec![0; parts.len(i)];
            parts.write(i, &mut packet);
            packets.push(packet);
        }
    }
    out.clear_tun();
    packets
}

fn drops(counters: &Counters) -> u64 {
    // Not a packet's fate but an answer's.
    let fates = DropReason::ALL.iter().filter(|reason| **reason != DropReason::IcmpRateLimited);
    fates.map(|reason| counters.dropped(*reason)).sum()
}

/// Drops that are not of packets that waited: those a datagram may bring about, but it is not one of them.
fn refused(counters: &Counters) -> u64 {
    let waited = [DropReason::AwaitingSession, DropReason::AwaitingMac];
    drops(counters) - waited.iter().map(|reason| counters.dropped(*reason)).sum::<u64>()
}

fn accounted(counters: &Counters) -> u64 {
    counters.total(Total::PacketsSent) + counters.total(Total::PacketsReceived) + drops(counters)
}

fn carries_packet(encap: Encap, datagram: &[u8]) -> bool {
    match encap {
        Encap::WireGuard => datagram.len() > 32 && datagram[0] == 4,
        Encap::Vxlan => {
            let arp = datagram.get(20..22) == Some(&[8, 6]);
            let neighbour = datagram.get(28) == Some(&58) && matches!(datagram.get(62), Some(135 | 136));
            !arp && !neighbour
        }
    }
}

// --- addresses -----------------------------------------------------------------------------------

pub(crate) fn public(private: &[u8; 32]) -> PublicKey {
    x25519_dalek::PublicKey::from(&StaticSecret::from(*private)).to_bytes()
}

/// The address of a node on the network.
pub(crate) fn underlay(id: usize, v6: bool) -> IpAddr {
    match v6 {
        false => IpAddr::from([198, 18 + (id >> 8) as u8, id as u8, 1]),
        true => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, id as u16, 0, 0, 0, 0, 1)),
    }
}

pub(crate) fn node_v4(id: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, (id >> 8) as u8, id as u8)
}

pub(crate) fn node_v6(id: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x99, id as u16, 0, 0, 0, 0, 1)
}

/// The address of a pod.
pub(crate) fn pod(id: usize, host: u8, v6: bool) -> IpAddr {
    match v6 {
        false => IpAddr::from([10, 100 + (id >> 8) as u8, id as u8, host]),
        true => IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, id as u16, 0, 0, 0, 0, u16::from(host))),
    }
}

fn pod_range(id: usize, v6: bool) -> ipnet::IpNet {
    ipnet::IpNet::new(pod(id, 0, v6), if v6 { 64 } else { 24 }).expect("range").trunc()
}

fn mac(id: usize) -> [u8; 6] {
    [2, 0, 0, 0, (id >> 8) as u8, id as u8]
}
