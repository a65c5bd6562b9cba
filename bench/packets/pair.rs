//! Two nodes' lanes that face each other in memory, without a kernel: the client's pod is on node 0, and so is
//! the Service in force; the endpoint's pod is on node 1. What is counted and timed is the work of node 0.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use warren::datapath::affinity::Affinity;
use warren::datapath::conntrack::{FlowTable, Seed};
use warren::datapath::{Arrival, Lane, LaneConfig, Output};
use warren::packet::coalesce::Offloads;
use warren::packet::vnet::{GSO_TCPV4, NEEDS_CSUM, VnetHdr};
use warren::snapshot::service::{
    Endpoint, Frontend, Known, Listen, Protocol, ServicePort, ServiceTable, Way,
};
use warren::snapshot::{Encap, LaneId, LocalNode, Mesh, Owner, Peer, PeerId, PeerLane, PeerVxlan, Snapshot};
use warren::tunnel::vxlan_link::Neighbours;
use x25519_dalek::{PublicKey, StaticSecret};

/// An address and a port.
pub type Socket = ([u8; 4], u16);

/// The client.
pub const CLIENT: Socket = ([10, 244, 0, 10], 1000);
/// What it speaks with.
pub const ENDPOINT: Socket = ([10, 244, 1, 10], 8080);
/// The Service in between.
pub const SERVICE: Socket = ([10, 96, 0, 20], 80);
/// Payload of a super-packet.
pub const BULK: usize = 64_000;
/// Payload of a small packet.
const SMALL: usize = 64;
/// As many frames as a lane reads from the TUN before the network has its turn.
const SMALL_PACKETS: usize = 16;
/// IPv4 and TCP header.
const HEADERS: usize = 40;
/// Bytes of a frame that a lane may write into.
const HEADERS_AT_MOST: usize = 128;
/// Keys that need be no secret.
pub const PRIVATE: [[u8; 32]; 2] = [[1; 32], [2; 32]];

/// What a burst is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// One TCP super-packet of 64,000 bytes, as TSO and GRO make them.
    Bulk,
    /// Sixteen UDP datagrams of 64 bytes, one by one.
    Small,
}

/// Where a burst goes, as node 0 sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heading {
    /// From its TUN to the network.
    Out,
    /// From the network to its TUN.
    In,
}

/// What is carried, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carriage {
    /// The encapsulation.
    pub encap: Encap,
    /// Whether the client speaks to the Service, not to the pod.
    pub service: bool,
    /// What a burst is.
    pub load: Load,
}

/// What the lanes of one node share.
#[derive(Clone)]
pub struct Shared {
    snapshot: Arc<Snapshot>,
    neighbours: Arc<Neighbours>,
    flows: Arc<FlowTable>,
    affinity: Arc<Affinity>,
}

struct Node {
    lane: Lane,
    snapshot: Arc<Snapshot>,
    out: Output,
    receive: Vec<u8>,
}

/// Bursts that are ready to be worked on.
pub struct Bursts {
    /// Frames from the TUN, each with itself as it was; the same ones each time.
    out: Vec<(Vec<u8>, Vec<u8>)>,
    /// What was received. WireGuard opens each datagram only once.
    inward: Vec<(Vec<u8>, Vec<Arrival>)>,
}

/// Both nodes, with an open connection between their pods.
pub struct Pair {
    nodes: [Node; 2],
    carriage: Carriage,
    client: Socket,
    /// Whose answers come in: mostly the same one's.
    answered: Socket,
    now: Instant,
    /// What node 0 is about to read from its TUN.
    frames: Vec<Vec<u8>>,
    /// What it is about to receive.
    arrivals: Vec<Arrival>,
}

impl Pair {
    /// Two nodes whose pods have spoken.
    pub fn new(carriage: Carriage) -> Pair {
        Pair::of_lane(carriage, 0, &[0, 1].map(|number| Shared::of(number, carriage.encap, 1)))
    }

    /// The lanes of that number of two nodes, with a client of their own.
    pub fn of_lane(carriage: Carriage, number: u8, shared: &[Shared; 2]) -> Pair {
        #[allow(clippy::disallowed_methods)] // where time begins does not matter
        let now = Instant::now();
        let nodes = [0, 1].map(|node| Node {
            lane: lane_of(node, number, &shared[node], now),
            snapshot: Arc::clone(&shared[node].snapshot),
            out: Output::new(Offloads { tcp: true, udp: true, acks: true }),
            receive: Vec::new(),
        });
        let client = client_of(number);
        let (frames, arrivals) = (Vec::new(), Vec::new());
        let mut pair = Pair { nodes, carriage, client, answered: client, now, frames, arrivals };
        let opening: [(usize, &str); 3] = [(0, "S"), (1, "SA"), (0, "A")];
        for (node, flags) in opening {
            let mut frame = match carriage.load {
                Load::Bulk => pair.tcp(node, flags, 0),
                Load::Small => pair.udp(node),
            };
            pair.nodes[node].take_frame(now, &mut frame);
            pair.talk();
        }
        pair
    }

    /// From now on what comes in are answers to that lane's client, whose connection is open too: each node chooses
    /// the lane that sends by its own hash, so that a flow mostly leaves by one lane and comes back by another.
    pub fn cross(&mut self, number: u8) {
        self.answered = client_of(number);
    }

    /// Packets of one burst.
    pub fn packets(&self) -> usize {
        match self.carriage.load {
            Load::Bulk => BULK.div_ceil(self.mss()),
            Load::Small => SMALL_PACKETS,
        }
    }

    /// Bytes of the payload of one burst.
    pub fn bytes(&self) -> usize {
        match self.carriage.load {
            Load::Bulk => BULK,
            Load::Small => SMALL * SMALL_PACKETS,
        }
    }

    /// Makes ready what [`Self::one_burst`] works on.
    pub fn prepare(&mut self, heading: Heading) {
        self.now += Duration::from_micros(50);
        let from = match heading {
            Heading::Out => 0,
            Heading::In => 1,
        };
        self.frames = match self.carriage.load {
            Load::Bulk => vec![self.tcp(from, "A", BULK)],
            Load::Small => std::iter::repeat_with(|| self.udp(from)).take(SMALL_PACKETS).collect(),
        };
        if heading == Heading::In {
            for frame in &mut self.frames {
                self.nodes[1].take_frame(self.now, frame);
            }
            self.arrivals = self.fly(1);
        }
    }

    /// One burst: what stands ready, up to what a system call would take over.
    #[inline(never)]
    pub fn one_burst(&mut self, heading: Heading) {
        let node = &mut self.nodes[0];
        match heading {
            Heading::Out => {
                for frame in &mut self.frames {
                    node.take_frame(self.now, frame);
                }
            }
            Heading::In => {
                for arrival in &self.arrivals {
                    node.take_datagrams(self.now, *arrival);
                }
                node.lane.finish_tun(self.now, &mut node.receive, &mut node.out);
            }
        }
        black_box(&node.out);
    }

    /// Makes sure that the burst came through whole, and forgets it.
    pub fn check(&mut self, heading: Heading) {
        let packets = self.packets();
        let out = &mut self.nodes[0].out;
        let done: usize = match heading {
            Heading::Out => out.tx.runs().iter().map(|run| run.count).sum(),
            Heading::In => out.tun.frames().map(|frame| usize::from(frame.packets)).sum(),
        };
        assert_eq!(done, packets, "{:?}, {heading:?}", self.carriage);
        out.tx.clear();
        out.clear_tun();
    }

    /// Makes ready as many bursts each way as [`Self::run`] is to work on.
    pub fn prepare_many(&mut self, bursts: usize) -> Bursts {
        self.prepare(Heading::Out);
        let out = self.frames.iter().map(|frame| (frame.clone(), frame.clone())).collect();
        let mut inward = Vec::with_capacity(bursts);
        for _ in 0..bursts {
            self.prepare(Heading::In);
            inward.push((std::mem::take(&mut self.nodes[0].receive), self.arrivals.clone()));
        }
        Bursts { out, inward }
    }

    /// Works on them, in turns out and in, up to what system calls would take over. Says how many packets came through.
    pub fn run(&mut self, bursts: &mut Bursts) -> usize {
        let node = &mut self.nodes[0];
        let mut packets = 0;
        for (receive, arrivals) in &mut bursts.inward {
            for (frame, original) in &mut bursts.out {
                // A lane writes into headers, as those of a packet to a Service; the payload stays.
                let headers = frame.len().min(HEADERS_AT_MOST);
                frame[..headers].copy_from_slice(&original[..headers]);
                node.take_frame(self.now, frame);
            }
            packets += node.out.tx.runs().iter().map(|run| run.count).sum::<usize>();
            node.out.tx.clear();

            std::mem::swap(&mut node.receive, receive);
            for arrival in arrivals {
                node.take_datagrams(self.now, *arrival);
            }
            node.lane.finish_tun(self.now, &mut node.receive, &mut node.out);
            packets += node.out.tun.frames().map(|frame| usize::from(frame.packets)).sum::<usize>();
            node.out.clear_tun();
            std::mem::swap(&mut node.receive, receive);
        }
        packets
    }

    fn mss(&self) -> usize {
        usize::from(mtu(self.carriage.encap)) - HEADERS
    }

    /// Who node `from`'s pod is, and whom it speaks to.
    fn sockets(&self, from: usize) -> (Socket, Socket) {
        match from {
            0 => (self.client, if self.carriage.service { SERVICE } else { ENDPOINT }),
            _ => (ENDPOINT, self.answered),
        }
    }

    /// A frame as a TUN gives it.
    fn tcp(&self, from: usize, flags: &str, payload: usize) -> Vec<u8> {
        let (source, destination) = self.sockets(from);
        super_packet(source, destination, flags, payload, self.mss())
    }

    /// A frame as a TUN gives it.
    fn udp(&self, from: usize) -> Vec<u8> {
        let (source, destination) = self.sockets(from);
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv4(source.0, destination.0, 64).udp(source.1, destination.1);
        builder.write(&mut packet, &[7; SMALL]).expect("a packet");
        let vnet = VnetHdr { flags: NEEDS_CSUM, csum_start: 20, csum_offset: 6, ..VnetHdr::default() };
        [&vnet.encode()[..], &packet].concat()
    }

    /// Lets everything fly that waits to be sent, and what is sent in answer.
    fn talk(&mut self) {
        for turn in 0..8 {
            let (from, to) = (turn % 2, (turn + 1) % 2);
            for arrival in self.fly(from) {
                self.nodes[to].take_datagrams(self.now, arrival);
            }
            let node = &mut self.nodes[to];
            node.lane.finish_tun(self.now, &mut node.receive, &mut node.out);
            node.out.clear_tun();
        }
        assert!(self.nodes.iter().all(|node| node.out.tx.is_empty() && node.lane.waiting() == 0));
    }

    /// Moves what one node sends into the receive buffer of the other.
    fn fly(&mut self, from: usize) -> Vec<Arrival> {
        let [a, b] = &mut self.nodes;
        let (sender, receiver) = if from == 0 { (a, b) } else { (b, a) };
        receiver.receive.clear();
        let tx = &sender.out.tx;
        let arrivals = tx.runs().iter().map(|run| {
            let offset = receiver.receive.len();
            receiver.receive.extend_from_slice(tx.bytes(run));
            let encap = self.carriage.encap;
            let port = run.to.port();
            let from = SocketAddr::new(outer(from), port);
            Arrival { encap, from, offset, len: run.len, stride: run.segment }
        });
        let arrivals = arrivals.collect();
        sender.out.tx.clear();
        arrivals
    }
}

/// The client whose flow goes out by a lane.
fn client_of(lane: u8) -> Socket {
    (CLIENT.0, CLIENT.1 + u16::from(lane))
}

impl Node {
    fn take_frame(&mut self, now: Instant, frame: &mut [u8]) {
        self.lane.handle_tun(now, &self.snapshot, frame, &mut self.out);
    }

    fn take_datagrams(&mut self, now: Instant, arrival: Arrival) {
        self.lane.handle_udp(now, &self.snapshot, arrival, &mut self.receive, &mut self.out);
    }
}

/// The largest packet that an underlay of 1500 carries in this encapsulation, WireGuard's as wg-quick has it.
pub fn mtu(encap: Encap) -> u16 {
    match encap {
        Encap::WireGuard => 1420,
        Encap::Vxlan => 1450,
    }
}

/// A TCP packet as a TUN gives it; with more payload than `mss` a super-packet.
pub fn super_packet(from: Socket, to: Socket, flags: &str, payload: usize, mss: usize) -> Vec<u8> {
    let mut builder = PacketBuilder::ipv4(from.0, to.0, 64).tcp(from.1, to.1, 1, 64_000);
    for flag in flags.chars() {
        builder = if flag == 'S' { builder.syn() } else { builder.ack(1) };
    }
    let mut packet = Vec::new();
    builder.write(&mut packet, &vec![7; payload]).expect("a packet");
    let mut vnet = VnetHdr { flags: NEEDS_CSUM, csum_start: 20, csum_offset: 16, ..VnetHdr::default() };
    if payload > mss {
        (vnet.gso_type, vnet.hdr_len, vnet.gso_size) = (GSO_TCPV4, HEADERS as u16, mss as u16);
    }
    [&vnet.encode()[..], &packet].concat()
}

/// Where a node is on the underlay.
pub fn outer(node: usize) -> IpAddr {
    IpAddr::from([192, 0, 2, 1 + node as u8])
}

/// A node of one lane as its peer sees it.
pub fn peer(node: usize, encap: Encap) -> Peer {
    peer_of(node, encap, 1)
}

fn peer_of(node: usize, encap: Encap, lanes: u8) -> Peer {
    let address = outer(node);
    Peer {
        id: PeerId(0),
        name: format!("node{node}"),
        encap: Some(encap),
        lanes: (0..lanes)
            .map(|lane| PeerLane { key: public_of(node, lane), port: 51820 + u16::from(lane) })
            .collect(),
        endpoints: vec![SocketAddr::new(address, 51820)],
        vxlan: Some(PeerVxlan { address, port: 8472, mac: Some(mac(node)) }),
        pod_ranges: vec![pods(node)],
        addresses: vec![address],
        mtu: mtu(encap),
        keepalive: 0,
        ordinary: false,
        takes_strangers: true,
        also: Vec::new(),
    }
}

impl Shared {
    /// Of a node with so many lanes, whose peer has as many.
    pub fn of(number: usize, encap: Encap, lanes: u8) -> Shared {
        Shared {
            snapshot: Arc::new(snapshot_of(number, encap, lanes)),
            neighbours: Arc::default(),
            flows: Arc::new(FlowTable::in_memory(1 << 16, Seed(1, 2)).expect("a table")),
            affinity: Arc::new(Affinity::in_memory(1024)),
        }
    }

    /// Of each flow, the lane that has seen it last.
    pub fn seen_by(&self) -> Vec<u8> {
        let mut records = Vec::new();
        self.flows.page(0, 0, usize::MAX, &mut records);
        records.iter().map(|record| record.lane).collect()
    }
}

/// The only lane of a node.
pub fn lane(node: usize, now: Instant) -> Lane {
    lane_of(node, 0, &Shared::of(node, Encap::WireGuard, 1), now)
}

fn lane_of(node: usize, number: u8, shared: &Shared, now: Instant) -> Lane {
    Lane::new(LaneConfig {
        id: LaneId(number),
        private: private(node, number),
        seed: (1, 2),
        vxlan_sources: 1,
        neighbours: Arc::clone(&shared.neighbours),
        flows: Arc::clone(&shared.flows),
        affinity: Arc::clone(&shared.affinity),
        epoch: (now, 0),
    })
}

/// What a node knows.
pub fn snapshot(number: usize, encap: Encap) -> Snapshot {
    snapshot_of(number, encap, 1)
}

fn snapshot_of(number: usize, encap: Encap, lanes: u8) -> Snapshot {
    let other = 1 - number;
    let mut mesh = Mesh::default();
    mesh.peers.push(Some(Arc::new(peer_of(other, encap, lanes))));
    for lane in 0..lanes {
        mesh.keys.insert(public_of(other, lane), (PeerId(0), LaneId(lane)));
    }
    mesh.vxlan_sources.insert(outer(other), PeerId(0));
    for (range, owner) in [
        (pods(number), Owner::LocalPod),
        (outer(number).into(), Owner::LocalNode),
        (pods(other), Owner::PeerPod(PeerId(0))),
        (outer(other).into(), Owner::PeerNode(PeerId(0))),
    ] {
        mesh.routes.insert(range, owner);
    }
    let address = Ipv4Addr::new(10, 244, number as u8, 0);
    let local = LocalNode {
        name: format!("node{number}"),
        address_v4: Some(address),
        address_v6: None,
        vni: 1,
        mac: mac(number),
    };
    let services = if number == 0 { services() } else { ServiceTable::default() };
    Snapshot { generation: 1, local: Arc::new(local), mesh: Arc::new(mesh), services: Arc::new(services) }
}

/// The Service, for TCP and for UDP.
fn services() -> ServiceTable {
    let mut table = ServiceTable::default();
    for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
        let endpoint = Endpoint { address: ENDPOINT.0.into(), port: ENDPOINT.1 };
        let port = Arc::new(ServicePort {
            id,
            name: format!("bench/web:{}", protocol.name()).into(),
            affinity: 0,
            internal_local: false,
            external_local: false,
            cluster: Box::new([endpoint]),
            local: Box::new([]),
            anywhere: true,
            known: Box::new([Known { endpoint, serving: true }]),
            sources: Box::new([]),
        });
        table.put_port(Arc::clone(&port));
        let at = Listen { address: SERVICE.0.into(), protocol, port: SERVICE.1 };
        table.listen(at, Frontend { way: Way::Cluster, port });
    }
    table.set_complete();
    table
}

fn pods(node: usize) -> ipnet::IpNet {
    format!("10.244.{node}.0/24").parse().expect("a range")
}

fn mac(node: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0, node as u8]
}

/// The public key of a node's first lane.
pub fn public(node: usize) -> [u8; 32] {
    public_of(node, 0)
}

fn public_of(node: usize, lane: u8) -> [u8; 32] {
    PublicKey::from(&StaticSecret::from(private(node, lane))).to_bytes()
}

/// Each lane has a key of its own.
fn private(node: usize, lane: u8) -> [u8; 32] {
    PRIVATE[node].map(|byte| byte + 2 * lane)
}
