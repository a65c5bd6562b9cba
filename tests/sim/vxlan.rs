//! VXLAN beside WireGuard, and what Ethernet needs to know first.

use std::time::Duration;

use warren::datapath::Total;
use warren::packet::DropReason;
use warren::snapshot::Encap;

use crate::rng::for_seeds;
use crate::world::{Policy, Spec, World, pod};

fn silent_about_its_mac() -> Spec {
    Spec { policy: Policy::Vxlan, announces_mac: false, ..Spec::default() }
}

#[test]
fn mac_addresses_are_asked_for_and_learnt_by_both_sides() {
    for v6 in [false, true] {
        let mut world = World::mesh(1, 2, silent_about_its_mac());
        let ids: Vec<_> = (0..10)
            .map(|_| {
                let mut probe = world.probe(0, 1);
                (probe.source, probe.destination, probe.len) = (pod(0, 5, v6), pod(1, 9, v6), 400);
                world.send_probe(0, 1, &probe)
            })
            .collect();
        assert_eq!(world.nodes[0].lanes[0].waiting(), 10);
        world.run_ms(100);
        world.ledger.assert_all(&ids);
        // For the pod and for the node address of its range.
        assert_eq!(world.total(1, Total::NeighboursAnswered), 2);
        // Being asked is being told.
        let back = world.send(1, 0);
        world.run_ms(100);
        world.ledger.assert_all(&[back]);
        assert_eq!(world.total(0, Total::NeighboursAnswered), 0);
        world.audit();
    }
}

/// The answer comes to one lane, the kernel says to which; packets of the others wait for it too.
#[test]
fn what_one_lane_is_told_all_lanes_know() {
    for lanes in [2, 3] {
        let mut world = World::mesh(8, 2, Spec { lanes, ..silent_about_its_mac() });
        let ids: Vec<_> = (0..30).map(|_| world.send(0, 1)).collect();
        world.run_ms(100);
        world.ledger.assert_all(&ids);
        let back: Vec<_> = (0..30).map(|_| world.send(1, 0)).collect();
        world.run_ms(100);
        world.ledger.assert_all(&back);
        world.audit();
    }
}

#[test]
fn both_ask_at_once() {
    let mut world = World::mesh(2, 2, silent_about_its_mac());
    let ids: Vec<_> = (0..20).flat_map(|_| [world.send(0, 1), world.send(1, 0)]).collect();
    world.run_ms(100);
    world.ledger.assert_all(&ids);
    world.audit();
}

#[test]
fn a_lost_question_is_asked_again_without_further_packets() {
    let mut world = World::mesh(3, 2, silent_about_its_mac());
    world.net.cut(0, 1);
    let id = world.send(0, 1);
    world.run_ms(500);
    world.net.heal();
    world.run_ms(1_000);
    world.ledger.assert_all(&[id]);
    world.audit();
}

#[test]
fn packets_that_wait_for_a_mac_are_bounded_expire_and_are_counted() {
    let mut world = World::mesh(4, 2, silent_about_its_mac());
    world.net.cut(0, 1);
    let ids: Vec<_> = (0..100).map(|_| world.send(0, 1)).collect();
    assert_eq!(world.nodes[0].lanes[0].waiting(), 64);
    world.audit();
    world.run_secs(10);
    assert_eq!(world.nodes[0].lanes[0].waiting(), 0);
    assert_eq!(world.dropped(0, DropReason::AwaitingMac), 100);
    assert!(world.net.lost <= 2 * 4, "{} questions", world.net.lost);
    world.ledger.assert_none(&ids);
    world.audit();
    // Nobody has anything to say: no timer goes on.
    let before = world.net.lost;
    world.run_secs(100);
    assert_eq!(world.net.lost, before);
}

#[test]
fn vxlan_under_loss_and_reorder() {
    for_seeds("vxlan_under_loss_and_reorder", 10, |seed| {
        let mut world = World::mesh(seed, 3, silent_about_its_mac());
        world.net.faults.loss = 200;
        world.net.faults.duplicate = 100;
        world.net.faults.reorder = 100;
        for _ in 0..100 {
            world.send(0, 1);
            world.send(1, 2);
            world.send(2, 0);
            world.run_ms(100);
        }
        world.net.faults = crate::net::Faults::NONE;
        world.run_secs(4);
        let ids = [world.send(0, 1), world.send(1, 2), world.send(2, 0)];
        world.run_secs(1);
        world.ledger.assert_all(&ids);
        world.audit();
    });
}

#[test]
fn auto_mixes_both_by_location() {
    let mut world = World::new(5);
    for (location, policy) in
        [(0, Policy::Auto), (0, Policy::Auto), (1, Policy::Auto), (1, Policy::WireGuard), (0, Policy::Vxlan)]
    {
        world.add(Spec {
            lanes: 1 + location,
            location,
            policy,
            announces_mac: location == 0,
            ..Spec::default()
        });
    }
    world.publish();
    assert_eq!(world.encap(0, 1), Encap::Vxlan);
    assert_eq!(world.encap(0, 2), Encap::WireGuard);
    let mut ids = Vec::new();
    for _ in 0..50 {
        for (from, to) in (0..5).flat_map(|a| (0..5).map(move |b| (a, b))).filter(|(a, b)| a != b) {
            ids.push(world.send(from, to));
        }
        world.run_secs(3);
    }
    world.ledger.assert_all(&ids);
    let sessions = world.nodes[0].lanes[0].wireguard().report(world.now());
    assert!(sessions.iter().all(|s| [2, 3].contains(&s.peer.0)), "node 0 speaks WireGuard with 2 and 3 only");
    world.audit();
}

#[test]
fn an_encapsulation_that_changes_by_snapshot() {
    let mut world = World::mesh(6, 2, Spec { policy: Policy::Vxlan, ..Spec::default() });
    for policy in [Policy::WireGuard, Policy::Vxlan, Policy::WireGuard] {
        let ids = [world.send(0, 1), world.send(1, 0)];
        world.run_ms(100);
        world.ledger.assert_all(&ids);
        world.nodes[0].spec.policy = policy;
        world.publish();
    }
    world.audit();
}

#[test]
fn a_peer_that_moves_is_believed_by_snapshot_only() {
    let mut world = World::mesh(7, 2, Spec { policy: Policy::Vxlan, ..Spec::default() });
    world.move_to(0, std::net::IpAddr::from([203, 0, 113, 9]));
    let probe = world.probe(0, 1);
    world.send_forbidden(0, &probe);
    world.run_ms(100);
    assert_eq!(world.dropped(1, DropReason::UnknownVxlanSource), 1);
    world.publish();
    let ids = [world.send(0, 1), world.send(1, 0)];
    world.run_for(Duration::from_millis(100));
    world.ledger.assert_all(&ids);
    world.audit();
}
