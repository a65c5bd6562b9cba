//! What a router has to say: hop limits, packets that do not fit, queues that are full.

use std::net::IpAddr;
use std::time::Duration;

use warren::datapath::Total;
use warren::packet::DropReason;

use crate::packets::{self, Probe};
use crate::world::{Policy, Spec, World, node_v4, node_v6, pod};

fn talking(policy: Policy) -> World {
    let mut world = World::mesh(1, 2, Spec { policy, ..Spec::default() });
    let ids = [world.send(0, 1), world.send(1, 0)];
    world.run_ms(100);
    world.ledger.assert_all(&ids);
    world
}

fn probe(world: &mut World, destination: IpAddr, len: usize, hop_limit: u8, dont_fragment: bool) -> Probe {
    let source = pod(0, 5, destination.is_ipv6());
    Probe { id: world.ledger.number(), source, destination, ports: (7, 5000), len, hop_limit, dont_fragment }
}

/// Each node's kernel takes one hop as it forwards, and tells the sender when none is left.
#[test]
fn the_hop_limit_is_left_to_the_kernels() {
    for policy in [Policy::WireGuard, Policy::Vxlan] {
        for v6 in [false, true] {
            let mut world = talking(policy);
            let node: IpAddr = if v6 { node_v6(1).into() } else { node_v4(1).into() };
            let there = [pod(1, 9, v6), node].map(|to| {
                let probe = probe(&mut world, to, 200, 1, true);
                world.send_probe(0, 1, &probe)
            });
            world.run_ms(100);
            world.ledger.assert_all(&there);
            assert_eq!(world.dropped(1, DropReason::HopLimit), 0);
            world.audit();
        }
    }
}

#[test]
fn too_big_is_told_to_the_sender_with_the_right_size() {
    for policy in [Policy::WireGuard, Policy::Vxlan] {
        for v6 in [false, true] {
            let mut world = talking(policy);
            let fits = probe(&mut world, pod(1, 9, v6), 1420, 64, true);
            let fits = world.send_probe(0, 1, &fits);
            let over = probe(&mut world, pod(1, 9, v6), 1421, 64, true);
            world.send_forbidden(0, &over);
            world.run_ms(100);
            world.ledger.assert_all(&[fits]);
            let node: IpAddr = if v6 { node_v6(0).into() } else { node_v4(0).into() };
            let told: Vec<_> = world.nodes[0].other.iter().filter_map(|p| packets::icmp_error(p)).collect();
            assert_eq!(told, [if v6 { (node, 2, 0, 1420) } else { (node, 3, 4, 1420) }]);
            assert_eq!(world.dropped(0, DropReason::TooBig), 1);
            world.audit();
        }
    }
}

#[test]
fn icmp_errors_are_few() {
    let mut world = talking(Policy::WireGuard);
    for _ in 0..1000 {
        let over = probe(&mut world, pod(1, 9, false), 1450, 64, true);
        world.send_forbidden(0, &over);
    }
    let told = world.nodes[0].other.len();
    assert!((1..=60).contains(&told), "{told} errors");
    assert_eq!(world.dropped(0, DropReason::IcmpRateLimited) as usize, 1000 - told);
    assert_eq!(world.dropped(0, DropReason::TooBig), 1000);
    world.audit();
}

#[test]
fn what_may_be_fragmented_arrives_in_fragments() {
    for policy in [Policy::WireGuard, Policy::Vxlan] {
        let mut world = talking(policy);
        let long = probe(&mut world, pod(1, 9, false), 9_000, 64, false);
        world.send_forbidden(0, &long);
        world.run_ms(100);
        let whole = long.build();
        let fragments = &world.nodes[1].other;
        assert_eq!(fragments.len(), 9_000usize.div_ceil(1400));
        let mut payload = vec![0; whole.len() - 20];
        for fragment in fragments {
            assert!(fragment.len() <= 1420 && warren::packet::checksum::verify_ipv4_header(fragment));
            let at = usize::from(u16::from_be_bytes([fragment[6], fragment[7]]) & 0x1fff) * 8;
            payload[at..at + fragment.len() - 20].copy_from_slice(&fragment[20..]);
        }
        assert_eq!(payload, whole[20..]);
        assert_eq!(world.total(0, Total::Fragmented), 1);
    }
}

#[test]
fn the_mss_of_both_directions_fits_the_path() {
    for (v6, expected) in [(false, 1380), (true, 1360)] {
        let mut world = talking(Policy::WireGuard);
        for (offered, arrives) in [(1460, expected), (8960, expected), (1000, 1000)] {
            world.nodes[1].other.clear();
            let syn = packets::syn(pod(0, 5, v6), pod(1, 9, v6), offered);
            world.hand_frame(0, 0, [&[0; 10][..], &syn].concat(), 1);
            world.run_ms(100);
            let got: Vec<_> = world.nodes[1].other.iter().filter_map(|p| packets::offered_mss(p)).collect();
            assert_eq!(got, [arrives]);
        }
        // A far node that allows more than this one: the way in clamps too.
        let far = world.nodes[1].snapshot.clone();
        world.mtu = 1300;
        world.publish();
        world.nodes[1].snapshot = far;
        world.nodes[0].other.clear();
        let syn = packets::syn(pod(1, 5, v6), pod(0, 9, v6), 1460);
        world.hand_frame(1, 0, [&[0; 10][..], &syn].concat(), 1);
        world.run_ms(100);
        let got: Vec<_> = world.nodes[0].other.iter().filter_map(|p| packets::offered_mss(p)).collect();
        assert_eq!(got, [expected - 120]);
        world.audit();
    }
}

#[test]
fn super_packets_arrive_as_the_bytes_they_were() {
    for (policy, v6, lanes) in [
        (Policy::WireGuard, false, 1),
        (Policy::WireGuard, true, 1),
        (Policy::Vxlan, false, 1),
        (Policy::Vxlan, true, 2),
    ] {
        let mut world = World::mesh(1, 2, Spec { policy, lanes, ..Spec::default() });
        world.receive_offload = true;
        let len = 40_000usize;
        let mss = if v6 { 1360 } else { 1380 };
        let count = len.div_ceil(usize::from(mss)) as u64;
        for _ in 0..2 {
            world.nodes[1].other.clear();
            let frame = packets::super_segment(pod(0, 5, v6), pod(1, 9, v6), len, mss);
            world.hand_frame(0, 0, frame, count);
            world.run_ms(100);
            let mut stream = vec![None; len];
            for packet in &world.nodes[1].other {
                let headers = warren::packet::parse(packet).expect("segment");
                assert!(warren::packet::checksum::verify_transport(packet, &headers));
                let (sequence, payload) = packets::segment(packet).expect("segment");
                for (i, byte) in payload.iter().enumerate() {
                    let old = stream[sequence as usize - 1000 + i].replace(*byte);
                    assert_eq!(old, None, "a byte came twice");
                }
            }
            assert!(stream.iter().enumerate().all(|(i, byte)| *byte == Some((i % 251) as u8)));
        }
        assert!(world.total(1, Total::PacketsReceived) == 2 * count);
        world.audit();
    }
}

#[test]
fn a_super_packet_whose_segments_do_not_fit_is_too_big() {
    let mut world = talking(Policy::WireGuard);
    let frame = packets::super_segment(pod(0, 5, false), pod(1, 9, false), 20_000, 1400);
    world.hand_frame(0, 0, frame, 1);
    world.run_ms(100);
    assert!(world.nodes[1].other.is_empty());
    let told: Vec<_> = world.nodes[0].other.iter().filter_map(|p| packets::icmp_error(p)).collect();
    assert_eq!(told, [(IpAddr::from(node_v4(0)), 3, 4, 1420)]);
    world.audit();
}

#[test]
fn the_queue_before_a_session_is_bounded_and_counted() {
    let mut world = World::mesh(2, 2, Spec::default());
    world.net.cut(0, 1);
    let ids: Vec<_> = (0..1000).map(|_| world.send(0, 1)).collect();
    assert_eq!(world.nodes[0].lanes[0].waiting(), 128);
    assert_eq!(world.dropped(0, DropReason::AwaitingSession), 1000 - 128);
    world.audit();
    world.run_ms(4_000);
    world.net.heal();
    world.run_ms(1_500);
    // The retransmission comes after 5 s, and that old no packet is sent any more.
    assert_eq!(world.ledger.count(&ids), 0);
    assert_eq!(world.nodes[0].lanes[0].waiting(), 0);
    assert!(world.established(0, 1));
    let id = world.send(0, 1);
    world.run_ms(100);
    world.ledger.assert_all(&[id]);
    world.audit();
}

#[test]
fn all_queues_of_a_lane_together_are_bounded() {
    let mut world = World::mesh(3, 80, Spec::default());
    (1..80).for_each(|other| world.net.cut(0, other));
    for other in 1..80 {
        for _ in 0..128 {
            let mut probe = world.probe(0, other);
            probe.len = 1420;
            world.send_probe(0, other, &probe);
        }
    }
    let waiting = world.nodes[0].lanes[0].waiting();
    assert!(waiting * 1420 <= 8 << 20 && waiting > 5_000, "{waiting} packets wait");
    world.audit();
    world.run_secs(6);
    assert_eq!(world.nodes[0].lanes[0].waiting(), 0);
    world.audit();
}

#[test]
fn a_path_that_is_smaller_than_believed_loses_only_what_is_too_big() {
    let mut world = talking(Policy::WireGuard);
    world.net.faults.mtu = 1400;
    let big = probe(&mut world, pod(1, 9, false), 1400, 64, true);
    let big = world.send_probe(0, 1, &big);
    let small = probe(&mut world, pod(1, 9, false), 1300, 64, true);
    let small = world.send_probe(0, 1, &small);
    world.run_ms(100);
    world.ledger.assert_none(&[big]);
    world.ledger.assert_all(&[small]);
    assert_eq!(world.net.too_big, 1);
    assert_eq!(world.ledger.latency(small), Some(Duration::from_millis(5)));
    world.audit();
}
