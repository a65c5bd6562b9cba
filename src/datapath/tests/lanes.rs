//! Several lanes: which one a flow has, and which one may send.

use super::*;
use crate::snapshot::PeerLane;

/// The world as lane `id` of `lanes` sees it, where peer 0 is an ordinary WireGuard peer if that is said.
fn on_lane(id: u8, lanes: u8, ordinary: bool) -> World {
    let mut world = world();
    let mesh = Arc::get_mut(&mut world.snapshot.mesh).expect("nobody has it yet");
    if ordinary {
        let peer = mesh.peers[0].as_mut().and_then(Arc::get_mut).expect("nobody has it yet");
        peer.encap = Some(Encap::WireGuard);
        peer.ordinary = true;
        // Any 32 bytes are a public key.
        peer.lanes = vec![PeerLane { key: [9; 32], port: 51820 }];
        peer.endpoints = vec![SocketAddr::new(outer(0), 51820)];
    }
    world.lane.id = LaneId(id);
    world.lane.lanes = lanes;
    world
}

fn read(world: &mut World, packet: &[u8]) {
    let mut frame = [&[0; VNET_HDR_LEN][..], packet].concat();
    world.lane.handle_tun(world.now, &world.snapshot, &mut frame, &mut world.out);
}

#[test]
fn what_an_ordinary_peer_is_sent_goes_by_lane_0() {
    let packet = udp(OURS, PEERS[0], 64);
    let mut other = on_lane(2, 3, true);
    other.lane.initiate(other.now, &other.snapshot, PeerId(0), &mut other.out);
    read(&mut other, &packet);
    assert!(other.out.tx.runs().is_empty() && other.lane.waiting() == 0, "with a key that nobody knows");
    let parcels = std::mem::take(&mut other.out.parcels);
    assert_eq!(parcels.iter().map(Parcel::packets).sum::<usize>(), 1);
    assert_eq!(other.drops(), []);

    let mut first = on_lane(0, 3, true);
    first.lane.take_parcel(first.now, &first.snapshot, &parcels[0], &mut first.out);
    assert_eq!(
        (first.out.tx.runs().len(), first.lane.waiting()),
        (1, 1),
        "a handshake, and the packet waits"
    );
    // By itself it does the same.
    let mut alone = on_lane(0, 3, true);
    read(&mut alone, &packet);
    assert_eq!((alone.out.tx.runs().len(), alone.lane.waiting()), (1, 1));
    assert!(alone.out.parcels.is_empty());

    // Meanwhile the number is another node's.
    let mut late = on_lane(0, 3, false);
    read(&mut other, &packet);
    read(&mut other, &packet);
    late.lane.take_parcel(late.now, &late.snapshot, &other.out.parcels[0], &mut late.out);
    assert!(late.out.tx.runs().is_empty());
    assert_eq!(late.lane.counters.dropped(DropReason::NoRoute), 2);
}

#[test]
fn parcels_are_bounded_and_what_is_too_much_is_counted() {
    let mut world = on_lane(1, 2, true);
    for _ in 0..1000 {
        read(&mut world, &udp(OURS, PEERS[0], 64));
    }
    // Small ones share a parcel.
    assert_eq!(world.out.parcels.len(), 2);
    let large = {
        let mut packet = Vec::new();
        let builder = etherparse::PacketBuilder::ipv4(OURS, PEERS[0], 64).udp(1000, 2000);
        builder.write(&mut packet, &[7; 1300]).expect("a packet");
        packet
    };
    for _ in 0..10_000 {
        read(&mut world, &large);
    }
    let kept: usize = world.out.parcels.iter().map(Parcel::packets).sum();
    let dropped = world.lane.counters.dropped(DropReason::HandOver);
    assert!(dropped > 0);
    assert_eq!(kept as u64 + dropped, 11_000);
}

#[test]
fn pings_and_fragments_have_one_lane_too() {
    for v6 in [false, true] {
        let mut seen = Vec::new();
        for id in 0..3 {
            let mut world = on_lane(id, 3, false);
            let mesh = Arc::get_mut(&mut world.snapshot.mesh).expect("nobody has it yet");
            mesh.routes.insert("fd00:0:0:9::/64".parse().expect("range"), Owner::LocalPod);
            mesh.routes.insert("fd00::/64".parse().expect("range"), Owner::PeerPod(PeerId(0)));
            seen.push(queues_of(&mut world, &echo(v6, 7, true)));
            if !v6 {
                let mut first = udp(PEERS[0], OURS, 64);
                // More fragments follow; then the header's checksum again.
                first[6] = 0x20;
                first[10..12].fill(0);
                let sum = crate::packet::checksum::checksum(&first[..20]);
                first[10..12].copy_from_slice(&sum.to_be_bytes());
                seen.push(queues_of(&mut world, &first));
            }
        }
        assert!(seen.iter().all(|queues| *queues == seen[0] && queues[0].is_some()), "{v6}: {seen:?}");
    }
}

/// The queues that packets of these ports are written to, by the lane that happens to receive them.
fn queues(id: u8, lanes: u8, ports: std::ops::Range<u16>) -> Vec<Option<u8>> {
    let mut world = on_lane(id, lanes, false);
    let mut queue = |port: u16| {
        let mut packet = Vec::new();
        let builder = etherparse::PacketBuilder::ipv4(PEERS[0], OURS, 64).udp(port, 2000);
        builder.write(&mut packet, b"data").expect("a packet");
        queues_of(&mut world, &packet)[0]
    };
    ports.map(&mut queue).collect()
}

/// The queue that one packet of peer 0 is written to.
fn queues_of(world: &mut World, packet: &[u8]) -> Vec<Option<u8>> {
    let mut receive = [&vxlan::header(1, OUR_MAC, mac(0), packet[0] >> 4 == 6)[..], packet].concat();
    let (from, len) = (SocketAddr::new(outer(0), 8472), receive.len());
    let arrival = Arrival { encap: Encap::Vxlan, from, offset: 0, len, stride: len };
    world.lane.handle_udp(world.now, &world.snapshot, arrival, &mut receive, &mut world.out);
    world.lane.finish_tun(world.now, &mut receive, &mut world.out);
    let queues: Vec<Option<u8>> = world.out.tun.frames().map(|frame| frame.queue).collect();
    world.out.clear_tun();
    assert_eq!(queues.len(), 1);
    queues
}

#[test]
fn a_flow_is_led_to_one_lane_whichever_receives() {
    let all = 3000..3100;
    assert!(queues(0, 1, all.clone()).iter().all(Option::is_none), "one lane has one queue");
    let seen = queues(0, 3, all.clone());
    assert_eq!(seen, queues(1, 3, all.clone()));
    assert_eq!(seen, queues(2, 3, all));
    for lane in 0..3 {
        assert!(seen.iter().filter(|queue| **queue == Some(lane)).count() > 10, "{seen:?}");
    }
}
