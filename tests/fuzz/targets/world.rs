//! A lane with live peers: whatever the network or a pod sends, only packets that may be there come out.
//!
//! Node 0 is under test. Peer 1 speaks WireGuard and has a session, peers 2 and 3 speak VXLAN (3 never said
//! its MAC address), peer 4 speaks WireGuard and never answers, peer 5 has no encapsulation in common with us.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use warren::datapath::conntrack::{FlowTable, Seed};
use warren::datapath::{Arrival, Lane, LaneConfig, Output};
use warren::packet::coalesce::{Memory, Offloads};
use warren::packet::segment::SuperPacket;
use warren::packet::vnet::VnetHdr;
use warren::packet::{checksum, parse};
use warren::snapshot::{
    Encap, LaneId, LocalNode, Mesh, Owner, Peer, PeerId, PeerLane, PeerVxlan, PublicKey, Snapshot,
};
use warren::tunnel::wireguard::{Opened, WireGuard};
use warren::tunnel::{TxBatch, Via, vxlan};
use x25519_dalek::StaticSecret;

use super::Reader;
use super::build::Builder;

const VNI: u32 = 1;
const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const THEIR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const PEERS: u8 = 5;

/// Datagrams from outside: garbage, valid ones, valid ones with damage, neighbours' questions, handshakes.
pub(crate) fn datagrams(data: &[u8]) {
    let mut input = Reader::new(data);
    let mut world = World::new();
    let mut builder = Builder::new();
    while !input.is_empty() {
        let op = input.byte();
        match op % 9 {
            0 => {
                let len = usize::from(input.short());
                let bytes = input.bytes(len).to_vec();
                world.arrive(Encap::WireGuard, world.from(&mut input), &bytes, input.short());
            }
            1 => {
                let len = usize::from(input.short());
                let bytes = input.bytes(len).to_vec();
                world.arrive(Encap::Vxlan, world.from(&mut input), &bytes, input.short());
            }
            2 => {
                let inner = builder.packet(&mut input, 1400);
                world.arrive_sealed(&inner, None);
            }
            3 => {
                let inner = builder.packet(&mut input, 1400);
                let damage = (usize::from(input.short()), input.byte());
                world.arrive_sealed(&inner, Some(damage));
            }
            4 => {
                let inner = builder.packet(&mut input, 1400);
                let v6 = inner.first().is_some_and(|first| first >> 4 == 6);
                let mut bytes = vxlan::header(VNI, OUR_MAC, THEIR_MAC, v6).to_vec();
                bytes.extend(inner);
                world.arrive(Encap::Vxlan, peer_address(2), &bytes, 0);
            }
            5 => {
                // An Ethernet frame of any kind behind a good VXLAN header.
                let mut bytes = vxlan::header(VNI, OUR_MAC, THEIR_MAC, false).to_vec();
                bytes.truncate(bytes.len() - 2);
                bytes.extend(input.one_of(&[[8u8, 6], [0x86, 0xdd], [8, 0], [0x81, 0]]));
                let len = usize::from(input.byte());
                bytes.extend(input.bytes(len));
                let from = input.one_of(&[2, 3, 1]);
                world.arrive(Encap::Vxlan, peer_address(from), &bytes, 0);
            }
            6 => world.pass(Duration::from_millis(u64::from(input.short()))),
            7 => world.restart_peer(),
            _ => world.settle(),
        }
    }
    world.settle();
}

/// Frames from our own pods: whole, super, with every kind of virtio header.
pub(crate) fn frames(data: &[u8]) {
    let mut input = Reader::new(data);
    let mut world = World::new();
    let mut builder = Builder::new();
    while !input.is_empty() {
        let op = input.byte();
        let vnet = match op % 4 {
            0 => VnetHdr::default(),
            1 => VnetHdr {
                flags: 1,
                gso_type: input.one_of(&[1, 4, 5, 0x81, 0x84, 0x11, 0, 3]),
                hdr_len: input.short(),
                gso_size: input.one_of(&[1, 8, 536, 1368, 1448, 65_000]),
                csum_start: input.one_of(&[20, 40, 24]),
                csum_offset: input.one_of(&[16, 6, 2]),
            },
            2 => VnetHdr {
                flags: input.byte(),
                gso_type: input.byte(),
                hdr_len: input.short(),
                gso_size: input.short(),
                csum_start: input.short(),
                csum_offset: input.short(),
            },
            _ => {
                world.pass(Duration::from_millis(u64::from(input.short())));
                continue;
            }
        };
        let mut frame = vnet.encode().to_vec();
        frame.extend(builder.packet(&mut input, 30_000));
        world.lane.handle_tun(world.now, &world.snapshot, &mut frame, &mut world.out);
        world.settle();
    }
}

struct World {
    now: Instant,
    lane: Lane,
    snapshot: Snapshot,
    out: Output,
    receive: Vec<u8>,
    /// Peer 1's end.
    peer: WireGuard,
    /// We, as peer 1 knows us.
    us: Peer,
    peer_mesh: Mesh,
    peer_tx: TxBatch,
    plain: Vec<u8>,
    /// Where datagrams came from: answers may go there.
    heard: Vec<SocketAddr>,
}

impl World {
    fn new() -> World {
        #[allow(clippy::disallowed_methods)] // a starting point: time passes only when the input says so
        let now = Instant::now();
        let (ours, theirs) = (secret(1), secret(2));
        let lane = Lane::new(LaneConfig {
            id: LaneId(0),
            private: ours.to_bytes(),
            seed: (1, 2),
            vxlan_sources: 4,
            neighbours: Arc::default(),
            flows: Arc::new(FlowTable::in_memory(1 << 10, Seed(3, 4)).expect("a table")),
            affinity: Arc::new(warren::datapath::affinity::Affinity::in_memory(256)),
            epoch: (now, 1_000),
        });
        let us = Peer {
            id: PeerId(0),
            lanes: vec![PeerLane { key: public(&ours), port: 51820 }],
            endpoints: vec![SocketAddr::new(address(0), 51820)],
            ..peer(1, Some(Encap::WireGuard))
        };
        let mut peer_mesh = Mesh::default();
        peer_mesh.keys.insert(public(&ours), (PeerId(0), LaneId(0)));
        peer_mesh.peers.push(Some(Arc::new(us.clone())));
        let mut world = World {
            now,
            lane,
            snapshot: snapshot(),
            out: Output::new(Offloads { tcp: true, udp: true, acks: true }),
            receive: vec![0; 1 << 18],
            peer: WireGuard::new(theirs, LaneId(0), (5, 6)),
            us,
            peer_mesh,
            peer_tx: TxBatch::new(1 << 18),
            plain: vec![0; 1 << 16],
            heard: Vec::new(),
        };
        world.restart_peer();
        world
    }

    /// Any address that a datagram could come from.
    fn from(&self, input: &mut Reader<'_>) -> SocketAddr {
        let number = input.byte();
        SocketAddr::new(address(number % 8), if number & 0x80 == 0 { 51820 } else { 8472 })
    }

    /// Peer 1 begins a session, as after a restart; what is under way reaches its end.
    fn restart_peer(&mut self) {
        self.peer = WireGuard::new(secret(2), LaneId(0), (5, 6));
        let begun = self.peer.initiate(self.now, &self.us, &mut self.peer_tx);
        assert!(begun.is_ok());
        self.peer_to_us(None);
        self.settle();
    }

    fn arrive_sealed(&mut self, inner: &[u8], damage: Option<(usize, u8)>) {
        let _ = self.peer.seal(self.now, &self.us, &inner, &mut self.peer_tx);
        self.peer_to_us(damage);
    }

    fn peer_to_us(&mut self, damage: Option<(usize, u8)>) {
        let mut sent: Vec<Vec<u8>> = Vec::new();
        for run in self.peer_tx.runs() {
            sent.extend(self.peer_tx.bytes(run).chunks(run.segment).map(<[u8]>::to_vec));
        }
        self.peer_tx.clear();
        for mut datagram in sent {
            if let Some((at, change)) = damage {
                let len = datagram.len();
                datagram[at % len] ^= change;
            }
            self.arrive(Encap::WireGuard, peer_address(1), &datagram, 0);
        }
    }

    /// Datagrams of `stride` bytes (0: one datagram) reach us.
    fn arrive(&mut self, encap: Encap, from: SocketAddr, bytes: &[u8], stride: u16) {
        let bytes = &bytes[..bytes.len().min(65_535)];
        let stride = if stride == 0 { bytes.len() } else { usize::from(stride) };
        self.receive[..bytes.len()].copy_from_slice(bytes);
        let arrival = Arrival { encap, from, offset: 0, len: bytes.len(), stride };
        self.heard.push(from);
        self.lane.handle_udp(self.now, &self.snapshot, arrival, &mut self.receive, &mut self.out);
        // The frames refer to the receive buffer, which is used again at the next arrival.
        self.judge_tun();
        if self.out.tx.free() < warren::datapath::TX_ROOM {
            self.settle();
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        // boringtun's own clock. The ordinary tests replay without: their boringtun is the real one.
        #[cfg(feature = "sim")]
        mock_instant::MockClock::advance(time);
        self.lane.handle_timeout(self.now, &self.snapshot, &mut self.out);
        self.peer.handle_timeout(self.now, &mut self.peer_tx);
        self.settle();
        self.peer_to_us(None);
    }

    /// Looks at everything that wants to leave; what goes to peer 1 arrives there, and its answers here.
    fn settle(&mut self) {
        for _ in 0..8 {
            self.judge_tun();
            if self.out.tx.is_empty() {
                return;
            }
            self.judge_sent();
            self.peer_to_us(None);
        }
    }

    /// What is written to the TUN comes from where it says, is for us, and is what the kernel takes.
    fn judge_tun(&mut self) {
        self.lane.finish_tun(self.now, &mut self.receive, &mut self.out);
        let mut room = vec![0; if self.out.tun.is_empty() { 0 } else { 70_000 }];
        let routes = &self.snapshot.mesh.routes;
        for frame in self.out.tun.frames() {
            let memory = Memory { receive: &mut self.receive, plain: &mut self.out.plain };
            let len = frame.gather(&memory, &mut room);
            assert!(len > 0 && len <= 65_575);
            let headers = parse(&room[..len]).expect("a packet for the kernel");
            let (vnet, _) = VnetHdr::decode(&frame.vnet).expect("a header for the kernel");
            assert!(SuperPacket::new(&vnet, &room[..len], &headers).is_ok(), "the kernel can cut it");
            let (from, to) = (routes.lookup(headers.source), routes.lookup(headers.destination));
            let own_error = from == Some(Owner::LocalNode) && headers.protocol != 6;
            let from_peer = matches!(from, Some(Owner::PeerPod(_) | Owner::PeerNode(_)));
            assert!(from_peer || own_error, "from {} of {from:?}", headers.source);
            assert!(
                matches!(to, Some(Owner::LocalPod | Owner::LocalNode)),
                "to {} of {to:?}",
                headers.destination
            );
        }
        self.out.clear_tun();
    }

    /// What leaves goes to a node, fits its path, and comes from us.
    fn judge_sent(&mut self) {
        for run in self.out.tx.runs() {
            assert!(run.count > 0 && run.segment > 0 && run.len <= 65_507);
            assert!(
                (1..=PEERS).any(|n| run.to.ip() == address(n)) || self.heard.contains(&run.to),
                "{run:?}"
            );
            for datagram in self.out.tx.bytes(run).chunks(run.segment) {
                match run.via {
                    Via::WireGuard if run.to == peer_address(1) => {
                        let opened = self.peer.open(
                            self.now,
                            &self.peer_mesh,
                            peer_address_of_us(),
                            datagram,
                            &mut self.plain,
                            &mut self.peer_tx,
                        );
                        if let Opened::Packet { len, .. } = opened {
                            inner(&self.snapshot, 1, &self.plain[..len]);
                        }
                    }
                    Via::WireGuard => {}
                    Via::Vxlan(_) => {
                        assert!(datagram[0] & 8 != 0 && datagram[4..7] == [0, 0, 1]);
                        let number = if run.to.ip() == address(2) { 2 } else { 3 };
                        if matches!(datagram.get(20..22), Some([8, 0]))
                            || datagram.get(20..22) == Some(&[0x86, 0xdd])
                        {
                            inner(&self.snapshot, number, &datagram[22..]);
                        }
                    }
                }
            }
        }
        self.out.tx.clear();
    }
}

/// A packet inside a tunnel to a peer: readable, whole, of ours, for the peer, and not too big.
fn inner(snapshot: &Snapshot, number: u8, packet: &[u8]) {
    let headers = parse(packet).expect("a packet for a peer");
    if headers.protocol == 58 && headers.hop_limit == 255 {
        return; // neighbour discovery inside VXLAN
    }
    let peer = snapshot.mesh.peer(PeerId(u32::from(number))).expect("a peer");
    assert_eq!(headers.total_len as usize, packet.len());
    assert!(packet.len() <= usize::from(peer.mtu), "{} bytes for a path of {}", packet.len(), peer.mtu);
    let routes = &snapshot.mesh.routes;
    assert!(matches!(routes.lookup(headers.source), Some(Owner::LocalPod | Owner::LocalNode)), "{headers:?}");
    let to = routes.lookup(headers.destination);
    assert!(
        matches!(to, Some(Owner::PeerPod(id) | Owner::PeerNode(id)) if id == peer.id),
        "{headers:?} {to:?}"
    );
    if headers.is_ipv4() && packet.len() < 100 {
        let _ = checksum::verify_ipv4_header(packet);
    }
}

fn snapshot() -> Snapshot {
    let mut mesh = Mesh::default();
    for (range, owner) in [
        ("10.244.0.0/24", Owner::LocalPod),
        ("10.244.0.0/32", Owner::LocalNode),
        ("fd00:10:244::/64", Owner::LocalPod),
        ("fd00:10:244::/128", Owner::LocalNode),
    ] {
        mesh.routes.insert(range.parse().expect("a range"), owner);
    }
    mesh.peers.push(None);
    for number in 1..=PEERS {
        let encap =
            [Some(Encap::WireGuard), Some(Encap::Vxlan), Some(Encap::Vxlan), Some(Encap::WireGuard), None]
                [usize::from(number - 1)];
        let peer = peer(number, encap);
        for range in &peer.pod_ranges {
            mesh.routes.insert(*range, Owner::PeerPod(peer.id));
        }
        mesh.routes.insert(address(number).into(), Owner::PeerNode(peer.id));
        for lane in &peer.lanes {
            mesh.keys.insert(lane.key, (peer.id, LaneId(0)));
        }
        if peer.vxlan.is_some() {
            mesh.vxlan_sources.insert(address(number), peer.id);
        }
        mesh.peers.push(Some(Arc::new(peer)));
    }
    let local = LocalNode {
        name: "a".to_owned(),
        address_v4: Some([10, 244, 0, 0].into()),
        address_v6: Some("fd00:10:244::".parse().expect("an address")),
        vni: VNI,
        mac: OUR_MAC,
    };
    Snapshot { generation: 1, local: Arc::new(local), mesh: Arc::new(mesh), services: Arc::default() }
}

fn peer(number: u8, encap: Option<Encap>) -> Peer {
    let vxlan = (encap == Some(Encap::Vxlan)).then(|| PeerVxlan {
        address: address(number),
        port: 8472,
        mac: (number == 2).then_some(THEIR_MAC),
    });
    Peer {
        id: PeerId(u32::from(number)),
        name: format!("peer{number}"),
        encap,
        lanes: vec![PeerLane { key: public(&secret(number + 1)), port: 51820 }],
        endpoints: vec![peer_address(number)],
        vxlan,
        pod_ranges: [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")]
            .map(|range| range.parse().expect("a range"))
            .to_vec(),
        addresses: vec![address(number)],
        mtu: if number == 2 { 1280 } else { 1420 },
        keepalive: if number == 1 { 25 } else { 0 },
        ordinary: false,
        takes_strangers: true,
        also: Vec::new(),
    }
}

fn address(number: u8) -> IpAddr {
    [192, 0, 2, number].into()
}

fn peer_address(number: u8) -> SocketAddr {
    SocketAddr::new(address(number), 51820)
}

fn peer_address_of_us() -> SocketAddr {
    SocketAddr::new(address(0), 51820)
}

fn secret(number: u8) -> StaticSecret {
    StaticSecret::from([number; 32])
}

fn public(secret: &StaticSecret) -> PublicKey {
    x25519_dalek::PublicKey::from(secret).to_bytes()
}

/// Whether valid traffic gets through at all: without it the targets above would prove nothing.
#[allow(dead_code)] // only the replay asks
pub(crate) fn assert_alive() {
    use warren::datapath::Total;
    let mut world = World::new();
    let good = |source, destination| [0, 1, source, destination, 1, 0, 0, 200, 0, 0];
    let mut builder = Builder::new();
    let inner = builder.packet(&mut Reader::new(&good(1, 0)), 1400);
    world.arrive_sealed(&inner, None);
    let mut framed = vxlan::header(VNI, OUR_MAC, THEIR_MAC, false).to_vec();
    framed.extend(builder.packet(&mut Reader::new(&good(2, 0)), 1400));
    world.arrive(Encap::Vxlan, peer_address(2), &framed, 0);
    assert_eq!(world.lane.counters().total(Total::PacketsReceived), 2);
    for destination in [1, 2] {
        let mut frame = VnetHdr::default().encode().to_vec();
        frame.extend(builder.packet(&mut Reader::new(&good(0, destination)), 1400));
        world.lane.handle_tun(world.now, &world.snapshot, &mut frame, &mut world.out);
        world.settle();
    }
    assert_eq!(world.lane.counters().total(Total::PacketsSent), 2);
}
