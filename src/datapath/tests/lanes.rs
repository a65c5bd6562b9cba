//! Several lanes: which one may send.

use super::*;
use crate::snapshot::PeerLane;

/// The world as lane `id` sees it, where peer 0 is an ordinary WireGuard peer if that is said.
fn on_lane(id: u8, ordinary: bool) -> World {
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
    world
}

fn read(world: &mut World, packet: &[u8]) {
    let mut frame = [&[0; VNET_HDR_LEN][..], packet].concat();
    world.lane.handle_tun(world.now, &world.snapshot, &mut frame, &mut world.out);
}

#[test]
fn what_an_ordinary_peer_is_sent_goes_by_lane_0() {
    let packet = udp(OURS, PEERS[0], 64);
    let mut other = on_lane(2, true);
    other.lane.initiate(other.now, &other.snapshot, PeerId(0), &mut other.out);
    read(&mut other, &packet);
    assert!(other.out.tx.runs().is_empty() && other.lane.waiting() == 0, "with a key that nobody knows");
    let parcels = std::mem::take(&mut other.out.parcels);
    assert_eq!(parcels.iter().map(Parcel::packets).sum::<usize>(), 1);
    assert_eq!(other.drops(), []);

    let mut first = on_lane(0, true);
    first.lane.take_parcel(first.now, &first.snapshot, &parcels[0], &mut first.out);
    assert_eq!(
        (first.out.tx.runs().len(), first.lane.waiting()),
        (1, 1),
        "a handshake, and the packet waits"
    );
    // By itself it does the same.
    let mut alone = on_lane(0, true);
    read(&mut alone, &packet);
    assert_eq!((alone.out.tx.runs().len(), alone.lane.waiting()), (1, 1));
    assert!(alone.out.parcels.is_empty());

    // Meanwhile the number is another node's.
    let mut late = on_lane(0, false);
    read(&mut other, &packet);
    read(&mut other, &packet);
    late.lane.take_parcel(late.now, &late.snapshot, &other.out.parcels[0], &mut late.out);
    assert!(late.out.tx.runs().is_empty());
    assert_eq!(late.lane.counters.dropped(DropReason::NoRoute), 2);
}

#[test]
fn parcels_are_bounded_and_what_is_too_much_is_counted() {
    let mut world = on_lane(1, true);
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
