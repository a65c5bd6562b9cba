//! What comes in runs takes a short way to the TUN: the frames, counters and flows are those of the long way.

use std::net::Ipv6Addr;

use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv6Extensions,
    Ipv6FragmentHeader, Ipv6Header, PacketBuilder, TcpHeader,
};
use proptest::prelude::*;

use super::*;
use crate::datapath::conntrack::FlowRecord;
use crate::packet::checksum::{fold, pseudo_header, transport_field};
use crate::snapshot::PeerLane;
use crate::tunnel::wireguard::{Opened, WireGuard};

/// Bytes of each inner packet with what stands behind it, and of each datagram of VXLAN.
const ROOM: usize = 120;
const SIZE: usize = vxlan::HEADER + ROOM;

/// One datagram: the next of one of four flows of peer 0, unless something is odd about it.
#[derive(Clone, Copy, Debug)]
struct Step {
    v6: bool,
    udp: bool,
    odd: Odd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Odd {
    Nothing,
    /// TCP's flags, as far as it is TCP.
    Push,
    Fin,
    /// Less payload, and trailing bytes.
    Short,
    /// Not its checksum, or none yet.
    Damaged,
    Owed,
    /// Not the flow's addresses.
    Spoofed,
    Foreign,
    /// Not the flow at all.
    Echo,
    LaterFragment,
    Neighbour,
    /// Not the header of the flow's other frames.
    OtherNetwork,
    OtherType,
    OtherMac,
    /// By the other peer.
    Stranger,
}

const ODD: [Odd; 14] = [
    Odd::Push,
    Odd::Fin,
    Odd::Short,
    Odd::Damaged,
    Odd::Owed,
    Odd::Spoofed,
    Odd::Foreign,
    Odd::Echo,
    Odd::LaterFragment,
    Odd::Neighbour,
    Odd::OtherNetwork,
    Odd::OtherType,
    Odd::OtherMac,
    Odd::Stranger,
];

/// Peer 0.
#[derive(Default)]
struct Sender {
    /// Of the two TCP flows.
    seq: [u32; 2],
    /// Of IPv4's datagrams.
    id: u16,
}

fn v6(node: u16) -> [u8; 16] {
    Ipv6Addr::new(0xfd00, 0, 0, node, 0, 0, 0, 5).octets()
}

impl Sender {
    fn ip(&self, step: Step) -> IpHeaders {
        let Step { odd, udp, .. } = step;
        let later = odd == Odd::LaterFragment;
        let offset = IpFragOffset::try_new(if later { 100 } else { 0 }).expect("an offset");
        let from = usize::from(odd == Odd::Spoofed);
        if step.v6 {
            let destination = if odd == Odd::Foreign { v6(77) } else { v6(9) };
            let ip = Ipv6Header { source: v6(from as u16), destination, hop_limit: 64, ..Default::default() };
            let fragment = later.then(|| Ipv6FragmentHeader::new(IpNumber::UDP, offset, false, 5));
            return IpHeaders::Ipv6(ip, Ipv6Extensions { fragment, ..Default::default() });
        }
        let destination = if odd == Odd::Foreign { OUTSIDE } else { OURS };
        let mut ip = Ipv4Header::new(0, 64, IpNumber::UDP, PEERS[from], destination).expect("a header");
        if udp || later {
            (ip.dont_fragment, ip.identification, ip.fragment_offset) = (false, self.id, offset);
        }
        IpHeaders::Ipv4(ip, Default::default())
    }

    fn packet(&mut self, step: Step) -> Vec<u8> {
        let Step { v6, udp, odd } = step;
        let len = |headers: usize| {
            let behind = if odd == Odd::Short { 12 } else { 0 };
            vec![self.id as u8; ROOM - behind - headers - if v6 { 40 } else { 20 }]
        };
        let (builder, mut packet) = (PacketBuilder::ip(self.ip(step)), Vec::new());
        let echo = IcmpEchoHeader { id: 7, seq: 1 };
        let written = match odd {
            Odd::LaterFragment => builder.write(&mut packet, IpNumber::UDP, &[7; 40]),
            Odd::Echo if v6 => builder.icmpv6(Icmpv6Type::EchoRequest(echo)).write(&mut packet, &len(8)),
            Odd::Echo => builder.icmpv4(Icmpv4Type::EchoRequest(echo)).write(&mut packet, &len(8)),
            _ if udp => builder.udp(1000, 2000).write(&mut packet, &len(8)),
            _ => {
                let mut tcp = TcpHeader::new(1000, 80, self.seq[usize::from(v6)], 500);
                (tcp.ack, tcp.psh, tcp.fin) = (true, odd == Odd::Push, odd == Odd::Fin);
                builder.tcp_header(tcp).write(&mut packet, &len(20))
            }
        };
        written.expect("a packet");
        let headers = parse(&packet).expect("whole");
        match (odd, transport_field(&headers)) {
            (Odd::Damaged, _) => packet[headers.total_len as usize - 1] ^= 1,
            (Odd::Owed, Some(field)) => {
                let l4 = headers.l4_offset;
                let covered = headers.total_len - u32::from(l4);
                let owed = pseudo_header(headers.source, headers.destination, headers.protocol, covered);
                packet[usize::from(l4) + field..][..2].copy_from_slice(&fold(owed).to_be_bytes());
            }
            (_, _) => {}
        }
        // What is refused is what could have come next.
        let next = [Odd::Nothing, Odd::Push, Odd::Short, Odd::Damaged, Odd::Owed, Odd::OtherMac];
        if next.contains(&odd) {
            self.id = self.id.wrapping_add(u16::from(udp && !v6));
            let payload = headers.total_len - headers.payload_offset() as u32;
            self.seq[usize::from(v6)] += if udp { 0 } else { payload };
        }
        packet.resize(ROOM, 0xee);
        packet
    }

    /// Also says which peer sends it.
    fn vxlan(&mut self, step: Step) -> (u8, Vec<u8>) {
        let packet = self.packet(step);
        let peer = u8::from(step.odd == Odd::Stranger);
        let source = mac(if step.odd == Odd::OtherMac { 7 } else { peer });
        let vni = if step.odd == Odd::OtherNetwork { 2 } else { 1 };
        let header = vxlan::header(vni, OUR_MAC, source, step.v6 ^ (step.odd == Odd::OtherType));
        let mut datagram = [&header[..], &packet].concat();
        if step.odd == Odd::Neighbour {
            let asked = match step.v6 {
                true => vxlan::ask_v6(&mut datagram, 1, source, v6(0).into(), v6(9).into()),
                false => vxlan::ask_v4(&mut datagram, 1, source, PEERS[0].into(), OURS.into()),
            };
            datagram[asked.expect("room")..].fill(0);
        }
        (peer, datagram)
    }
}

/// All that can be seen of what became of datagrams.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// Virtio header, packets that were joined, and the packet.
    frames: Vec<([u8; VNET_HDR_LEN], u16, Vec<u8>)>,
    answers: Vec<(SocketAddr, Vec<u8>)>,
    drops: Vec<(DropReason, u64)>,
    totals: Vec<u64>,
    /// Of each peer: packets, bytes, and whether any came now.
    traffic: Vec<(u64, u64, bool)>,
    flows: Vec<FlowRecord>,
}

/// [`world`], over both families.
fn both_families() -> World {
    let mut world = world();
    let mesh = Arc::get_mut(&mut world.snapshot.mesh).expect("nobody has it yet");
    let peer = |number| Owner::PeerPod(PeerId(number));
    for (node, owner) in [(0, peer(0)), (1, peer(1)), (9, Owner::LocalPod)] {
        mesh.routes.insert(format!("fd00:0:0:{node}::/64").parse().expect("range"), owner);
    }
    world
}

impl World {
    /// These came together from one peer.
    fn arrive(&mut self, encap: Encap, peer: u8, sizes: (usize, usize), offset: usize, receive: &mut [u8]) {
        let (stride, count) = sizes;
        let from = SocketAddr::new(outer(peer), 8472);
        let arrival = Arrival { encap, from, offset, len: stride * count, stride };
        self.lane.handle_udp(self.now, &self.snapshot, arrival, receive, &mut self.out);
    }

    /// What becomes of datagrams of one size; on the long way, none of them repeats another.
    fn outcome(mut self, encap: Encap, datagrams: &[(u8, Vec<u8>)], long: bool) -> Outcome {
        let mut receive: Vec<u8> = datagrams.iter().flat_map(|(_, datagram)| datagram.clone()).collect();
        let mut offset = 0;
        for run in datagrams.chunk_by(|one, next| !long && one.0 == next.0) {
            let (peer, stride) = (run[0].0, run[0].1.len());
            self.arrive(encap, peer, (stride, run.len()), offset, &mut receive);
            offset += stride * run.len();
            if long {
                self.out.tun.end_run();
            }
        }
        self.lane.finish_tun(self.now, &mut receive, &mut self.out);
        let (memory, mut room) =
            (Memory { receive: &mut receive, plain: &mut self.out.plain }, vec![0; 70_000]);
        let frames = self.out.tun.frames().map(|frame| {
            let len = frame.gather(&memory, &mut room);
            (frame.vnet, frame.packets, room[..len].to_vec())
        });
        let (tx, counters, mut flows) = (&self.out.tx, &self.lane.counters, Vec::new());
        let mut next = Some(0);
        while let Some(from) = next {
            next = self.lane.flows.page(0, from, 100, &mut flows);
        }
        let drops = DropReason::ALL.iter().map(|reason| (*reason, counters.dropped(*reason)));
        let seen = |peer: &PeerTraffic| {
            (peer.packets_received, peer.bytes_received, peer.last_received == Some(self.now))
        };
        Outcome {
            frames: frames.collect(),
            answers: tx.runs().iter().map(|run| (run.to, tx.bytes(run).to_vec())).collect(),
            drops: drops.filter(|(_, count)| *count > 0).collect(),
            totals: Total::ALL.iter().map(|total| counters.total(*total)).collect(),
            traffic: self.lane.traffic().iter().map(seen).collect(),
            flows,
        }
    }
}

/// What becomes of them by VXLAN, the same on both ways.
fn by_vxlan(steps: &[Step]) -> Outcome {
    let mut sender = Sender::default();
    let datagrams: Vec<_> = steps.iter().map(|step| sender.vxlan(*step)).collect();
    let [long, short] = [true, false].map(|long| both_families().outcome(Encap::Vxlan, &datagrams, long));
    assert!(long == short, "{steps:?}\nlong: {long:?}\nshort: {short:?}");
    short
}

/// The other end of a session with a world, and what it needs to know of that.
struct Tunnel {
    end: WireGuard,
    peer: Peer,
    tx: TxBatch,
}

impl Tunnel {
    /// Peer 0's, which speaks WireGuard with the world from now on.
    fn to(world: &mut World) -> Tunnel {
        let mut tunnel = {
            let mesh = Arc::get_mut(&mut world.snapshot.mesh).expect("nobody has it yet");
            let peer = mesh.peers[0].as_mut().and_then(Arc::get_mut).expect("nobody has it yet");
            let end = WireGuard::new([8; 32].into(), LaneId(0), (1, 2));
            let lane = |key| vec![PeerLane { key, port: 8472 }];
            peer.encap = Some(Encap::WireGuard);
            peer.lanes = lane(end.public_key());
            peer.endpoints = vec![SocketAddr::new(outer(0), 8472)];
            mesh.keys.insert(end.public_key(), (PeerId(0), LaneId(0)));
            let lanes = lane(world.lane.wireguard.public_key());
            let endpoints = vec![SocketAddr::new(outer(9), 8472)];
            Tunnel { end, peer: Peer { lanes, endpoints, ..peer.clone() }, tx: TxBatch::new(1 << 20) }
        };
        let (now, us) = (world.now, SocketAddr::new(outer(9), 8472));
        tunnel.end.initiate(now, &tunnel.peer, &mut tunnel.tx).expect("an initiation");
        world.hear(&mut tunnel);
        let answer = world.out.tx.bytes(&world.out.tx.runs()[0]).to_vec();
        world.out.tx.clear();
        let mesh = Mesh { peers: vec![Some(Arc::new(tunnel.peer.clone()))], ..Mesh::default() };
        let opened = tunnel.end.open(now, &mesh, us, &answer, &mut [0; 2048], &mut tunnel.tx);
        assert_eq!(opened, Opened::Control);
        world.hear(&mut tunnel);
        tunnel
    }

    fn seal(&mut self, now: Instant, packet: &[u8]) -> Vec<u8> {
        assert_eq!(self.end.seal(now, &self.peer, &packet, &mut self.tx).sent, 1);
        let sealed = self.tx.bytes(&self.tx.runs()[0]).to_vec();
        self.tx.clear();
        sealed
    }
}

impl World {
    /// What the tunnel's other end has to say.
    fn hear(&mut self, tunnel: &mut Tunnel) {
        let mut message = tunnel.tx.bytes(&tunnel.tx.runs()[0]).to_vec();
        tunnel.tx.clear();
        self.arrive(Encap::WireGuard, 0, (message.len(), 1), 0, &mut message);
    }
}

/// What becomes of them by WireGuard, the same on both ways.
fn by_wireguard(steps: &[Step]) -> Outcome {
    let [long, short] = [true, false].map(|long| {
        let (mut world, mut sender) = (both_families(), Sender::default());
        let mut tunnel = Tunnel::to(&mut world);
        let mut seal = |step: &Step| (0, tunnel.seal(world.now, &sender.packet(*step)));
        let datagrams: Vec<_> = steps.iter().map(&mut seal).collect();
        world.outcome(Encap::WireGuard, &datagrams, long)
    });
    assert!(long == short, "{steps:?}\nlong: {long:?}\nshort: {short:?}");
    short
}

const FLOWS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

#[test]
fn a_run_is_judged_by_its_first() {
    for (v6, udp) in FLOWS {
        // More than a frame takes.
        let run = [Step { v6, udp, odd: Odd::Nothing }; 100];
        for outcome in [by_vxlan(&run), by_wireguard(&run)] {
            assert_eq!(outcome.frames.iter().map(|frame| frame.1).collect::<Vec<_>>(), [64, 36]);
            assert_eq!((outcome.drops, outcome.traffic[0]), (vec![], (100, 100 * ROOM as u64, true)));
        }
        // Who asks for a route now finds none: the short way does not ask.
        let (mut world, mut sender) = (both_families(), Sender::default());
        let mut receive: Vec<u8> = run.iter().flat_map(|step| sender.vxlan(*step).1).collect();
        world.arrive(Encap::Vxlan, 0, (SIZE, 1), 0, &mut receive);
        world.lane.routes = RouteCache::default();
        world.arrive(Encap::Vxlan, 0, (SIZE, 63), SIZE, &mut receive);
        assert_eq!((world.drops(), world.out.tun.count()), (vec![], 1));
        world.arrive(Encap::Vxlan, 0, (SIZE, 1), 64 * SIZE, &mut receive);
        assert_eq!((world.drops(), world.out.tun.count()), (vec![DropReason::NotOurs], 1));
    }
}

#[test]
fn whatever_comes_between_is_judged_by_itself() {
    for ((v6, udp), odd) in FLOWS.iter().flat_map(|flow| ODD.map(|odd| (*flow, odd))) {
        let next = Step { v6, udp, odd: Odd::Nothing };
        for between in FLOWS.map(|(v6, udp)| Step { v6, udp, odd }) {
            by_vxlan(&[next, next, between, next, next]);
        }
    }
}

#[test]
fn a_judgement_is_not_carried_over_what_waits() {
    for v6 in [false, true] {
        let next = Step { v6, udp: false, odd: Odd::Nothing };
        // It waits for its first, and has the header of the other family, which is wrong for what comes after it.
        let waits = Step { v6: !v6, odd: Odd::LaterFragment, ..next };
        let outcome = by_vxlan(&[next, waits, Step { odd: Odd::OtherType, ..next }, next]);
        assert_eq!(outcome.drops, [(DropReason::BadInnerFrame, 1)]);
        assert_eq!(outcome.frames.iter().map(|frame| frame.1).collect::<Vec<_>>(), [2]);
    }
}

/// Some packets of a flow, and something odd about the next or about another flow's.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flow = proptest::sample::select(&FLOWS);
    let run = (flow.clone(), 0..6usize, flow, any::<bool>(), proptest::sample::select(&ODD));
    let run = run.prop_map(|((v6, udp), count, other, same, odd)| {
        let mut run = vec![Step { v6, udp, odd: Odd::Nothing }; count];
        let (v6, udp) = if same { (v6, udp) } else { other };
        run.push(Step { v6, udp, odd });
        run
    });
    proptest::collection::vec(run, 1..16).prop_map(|runs| runs.concat().into_iter().take(60).collect())
}

proptest! {
    #[test]
    fn both_ways_lead_to_the_same(steps in steps()) {
        by_vxlan(&steps);
        by_wireguard(&steps);
    }
}
