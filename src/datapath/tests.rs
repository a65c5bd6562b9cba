//! Packets through a whole lane: which ways are closed, and what the flow table hears of it. Services have
//! their own file.

mod lanes;
#[cfg(feature = "agent")]
mod model;
#[cfg(feature = "agent")]
mod objects;
mod runs;
mod services;
#[cfg(feature = "agent")]
mod shares;

use super::conntrack::{FlowState, Seed, Sighting};
use super::*;
use crate::packet::parse;
use crate::packet::vnet::VNET_HDR_LEN;
use crate::snapshot::{LocalNode, Owner, Peer, PeerVxlan};
use crate::tunnel::vxlan;

const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// Frames for the TUN, and packets in datagrams with where those went.
type Left = (Vec<Vec<u8>>, Vec<(IpAddr, Vec<u8>)>);

struct World {
    lane: Lane,
    snapshot: Snapshot,
    out: Output,
    now: Instant,
}

fn mac(peer: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, peer]
}

fn outer(peer: u8) -> IpAddr {
    [192, 0, 2, peer].into()
}

/// Pods 10.244.N.0/24 of peers 0 and 1, which speak VXLAN; ours are 10.244.9.0/24.
fn world() -> World {
    world_with(1, 1024)
}

/// The same with other choices, and room for so many flows and clients.
fn world_with(seed: u64, flows: u32) -> World {
    #[allow(clippy::disallowed_methods)] // where time begins does not matter
    let now = Instant::now();
    let mut mesh = Mesh::default();
    mesh.routes.insert("10.244.9.0/24".parse().expect("range"), Owner::LocalPod);
    mesh.routes.insert("10.244.9.0/32".parse().expect("range"), Owner::LocalNode);
    for number in 0..2 {
        let id = PeerId(number.into());
        let range = format!("10.244.{number}.0/24").parse().expect("range");
        mesh.routes.insert(range, Owner::PeerPod(id));
        mesh.vxlan_sources.insert(outer(number), id);
        mesh.peers.push(Some(Arc::new(Peer {
            id,
            name: format!("peer{number}"),
            encap: Some(Encap::Vxlan),
            lanes: Vec::new(),
            endpoints: Vec::new(),
            vxlan: Some(PeerVxlan { address: outer(number), port: 8472, mac: Some(mac(number)) }),
            pod_ranges: vec![range],
            addresses: Vec::new(),
            mtu: 1450,
            keepalive: 0,
            ordinary: false,
            takes_strangers: true,
            also: Vec::new(),
        })));
    }
    let local = LocalNode {
        name: "me".to_owned(),
        address_v4: Some([10, 244, 9, 0].into()),
        address_v6: None,
        vni: 1,
        mac: OUR_MAC,
    };
    let lane = Lane::new(LaneConfig {
        id: LaneId(0),
        private: [7; 32],
        seed: (seed, seed + 1),
        vxlan_sources: 1,
        neighbours: Arc::default(),
        flows: Arc::new(FlowTable::in_memory(flows, Seed(seed, seed + 1)).expect("a table")),
        affinity: Arc::new(crate::datapath::affinity::Affinity::in_memory(flows as usize)),
        epoch: (now, 0),
    });
    let snapshot =
        Snapshot { generation: 1, local: Arc::new(local), mesh: Arc::new(mesh), services: Arc::default() };
    World { lane, snapshot, out: Output::new(Offloads { tcp: true, udp: true, acks: true }), now }
}

impl World {
    /// This comes from the TUN.
    fn take_frame(&mut self, packet: &[u8]) -> Left {
        let mut frame = [&[0; VNET_HDR_LEN][..], packet].concat();
        self.lane.handle_tun(self.now, &self.snapshot, &mut frame, &mut self.out);
        self.results(&mut [])
    }

    /// This comes from a peer.
    fn take_datagram(&mut self, peer: u8, packet: &[u8]) -> Left {
        let mut receive = [&vxlan::header(1, OUR_MAC, mac(peer), packet[0] >> 4 == 6)[..], packet].concat();
        let from = SocketAddr::new(outer(peer), 8472);
        let len = receive.len();
        let arrival = Arrival { encap: Encap::Vxlan, from, offset: 0, len, stride: len };
        self.lane.handle_udp(self.now, &self.snapshot, arrival, &mut receive, &mut self.out);
        self.results(&mut receive)
    }

    fn results(&mut self, receive: &mut [u8]) -> Left {
        self.lane.finish_tun(self.now, receive, &mut self.out);
        let memory = Memory { receive, plain: &mut self.out.plain };
        let mut room = vec![0; 70_000];
        let gather = |frame: crate::packet::coalesce::Frame<'_>| {
            let len = frame.gather(&memory, &mut room);
            room[..len].to_vec()
        };
        let frames = self.out.tun.frames().map(gather).collect();
        let tx = &self.out.tx;
        let sent = |run: &crate::tunnel::batch::Run| {
            let (to, bytes, segment) = (run.to.ip(), tx.bytes(run).to_vec(), run.segment);
            let datagrams = bytes.chunks(segment).map(|datagram| datagram[vxlan::HEADER..].to_vec());
            datagrams.map(move |packet| (to, packet)).collect::<Vec<_>>()
        };
        let datagrams = tx.runs().iter().flat_map(sent).collect();
        self.out.clear_tun();
        self.out.tx.clear();
        (frames, datagrams)
    }

    fn drops(&self) -> Vec<DropReason> {
        let counters = &self.lane.counters;
        DropReason::ALL.iter().copied().filter(|reason| counters.dropped(*reason) > 0).collect()
    }
}

fn udp(from: [u8; 4], to: [u8; 4], hop_limit: u8) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = etherparse::PacketBuilder::ipv4(from, to, hop_limit).udp(1000, 2000);
    builder.write(&mut packet, &[7; 64]).expect("a packet");
    packet
}

const OURS: [u8; 4] = [10, 244, 9, 5];
const PEERS: [[u8; 4]; 2] = [[10, 244, 0, 5], [10, 244, 1, 5]];
const OUTSIDE: [u8; 4] = [203, 0, 113, 1];

#[test]
fn without_translation_most_ways_are_closed() {
    for (to, reason) in [
        ([10, 244, 9, 6], DropReason::NotOurs),
        ([10, 244, 9, 0], DropReason::NotOurs),
        (OUTSIDE, DropReason::NoRoute),
    ] {
        let mut world = world();
        let (frames, datagrams) = world.take_frame(&udp(OURS, to, 64));
        assert!(datagrams.is_empty());
        // At most the news that there is no way.
        assert!(
            frames
                .iter()
                .all(|f| parse(f).is_ok_and(|h| h.protocol == 1 && h.destination == IpAddr::from(OURS)))
        );
        assert_eq!(world.drops(), [reason], "from the TUN to {to:?}");
    }
    for to in [PEERS[0], PEERS[1], OUTSIDE] {
        let mut world = world();
        assert_eq!(world.take_datagram(0, &udp(PEERS[0], to, 64)), (vec![], vec![]), "from a peer to {to:?}");
        assert_eq!(world.drops(), [DropReason::NotOurs]);
    }
}

/// An echo request from our pod to that of peer 0, or its answer.
fn echo(v6: bool, id: u16, answer: bool) -> Vec<u8> {
    use etherparse::PacketBuilder;
    let mut packet = Vec::new();
    let (ours, theirs): ([u8; 4], [u8; 4]) = (OURS, PEERS[0]);
    let v4 = |from, to| PacketBuilder::ipv4(from, to, 64);
    let six = |host: u16| std::net::Ipv6Addr::new(0xfd00, 0, 0, host, 0, 0, 0, 5).octets();
    let written = match (v6, answer) {
        (false, false) => v4(ours, theirs).icmpv4_echo_request(id, 1).write(&mut packet, b"ping"),
        (false, true) => v4(theirs, ours).icmpv4_echo_reply(id, 1).write(&mut packet, b"ping"),
        (true, false) => {
            PacketBuilder::ipv6(six(9), six(0), 64).icmpv6_echo_request(id, 1).write(&mut packet, b"ping")
        }
        (true, true) => {
            PacketBuilder::ipv6(six(0), six(9), 64).icmpv6_echo_reply(id, 1).write(&mut packet, b"ping")
        }
    };
    written.expect("a packet");
    packet
}

#[test]
fn pings_are_flows_too() {
    for v6 in [false, true] {
        let mut world = world();
        let mesh = Arc::get_mut(&mut world.snapshot.mesh).expect("nobody has it yet");
        mesh.routes.insert("fd00:0:0:9::/64".parse().expect("range"), Owner::LocalPod);
        mesh.routes.insert("fd00::/64".parse().expect("range"), Owner::PeerPod(PeerId(0)));
        let sender: IpAddr = if v6 { "fd00:0:0:9::5".parse().expect("address") } else { OURS.into() };
        let owner = Sighting::owner_of(sender);
        let record = |world: &World| {
            let mut records = Vec::new();
            assert_eq!(world.lane.flows.page(0, 0, 2, &mut records), None);
            assert_eq!(records.len(), 1);
            records.remove(0)
        };
        assert_eq!(world.take_frame(&echo(v6, 7, false)).1.len(), 1, "IPv6: {v6}");
        let first = record(&world);
        assert_eq!((first.state, first.original.source), (FlowState::Unreplied, sender));
        assert_eq!((first.owner, world.lane.flows.owned_by(owner)), (owner, 1));
        assert_eq!(first.expires - first.seen, 30_000, "nf_conntrack_icmp_timeout, _icmpv6_timeout");
        assert_eq!(world.take_datagram(0, &echo(v6, 7, true)).0.len(), 1);
        assert_eq!((record(&world).state, record(&world).packets), (FlowState::Replied, [1, 1]));
        // Each ping program is one flow, and a pod has no more of them than its quarter of the table.
        for id in 8..400 {
            assert_eq!(world.take_frame(&echo(v6, id, false)).1.len(), 1, "carried, tracked or not");
        }
        assert_eq!(world.lane.flows.owned_by(owner), 256);
        // And they are over as soon as the kernel's.
        world.now += std::time::Duration::from_secs(31);
        assert_eq!(world.take_frame(&echo(v6, 7, false)).1.len(), 1);
        let key = first.original;
        let again = world.lane.flows.peek(31_000, &key).expect("tracked anew");
        assert_eq!(again.state, FlowState::Unreplied);
        assert_eq!(world.drops(), []);
    }
}

/// Flags of one TCP packet without payload.
fn tcp(from: [u8; 4], to: [u8; 4], ports: (u16, u16), seq: u32, flags: &str) -> Vec<u8> {
    let mut builder = etherparse::PacketBuilder::ipv4(from, to, 64).tcp(ports.0, ports.1, seq, 100);
    for flag in flags.chars() {
        builder = match flag {
            'S' => builder.syn(),
            'F' => builder.fin(),
            _ => builder.ack(1),
        };
    }
    let mut packet = Vec::new();
    builder.write(&mut packet, &[]).expect("a packet");
    packet
}

#[test]
fn a_lone_fin_of_a_peer_ends_one_direction() {
    let mut world = world();
    let (there, back) = ((1000, 80), (80, 1000));
    world.take_frame(&tcp(OURS, PEERS[0], there, 1, "S"));
    world.take_datagram(0, &tcp(PEERS[0], OURS, back, 1, "SA"));
    world.take_frame(&tcp(OURS, PEERS[0], there, 2, "A"));
    let state = |world: &World| {
        let (mut records, mut next) = (Vec::new(), Some(0));
        while let Some(from) = next {
            next = world.lane.flows.page(0, from, 100, &mut records);
        }
        records.iter().map(|record| record.state).collect::<Vec<_>>()
    };
    assert_eq!(state(&world), [FlowState::Established]);
    world.take_datagram(0, &tcp(PEERS[0], OURS, back, 2, "FA"));
    world.take_frame(&tcp(OURS, PEERS[0], there, 2, "A"));
    assert_eq!(state(&world), [FlowState::CloseWait]);
}
