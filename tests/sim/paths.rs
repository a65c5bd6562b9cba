//! The path between two nodes changes: roaming, NAT, partitions, new snapshots.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use warren::datapath::Total;
use warren::packet::DropReason;

use crate::rng::for_seeds;
use crate::world::{Spec, WIREGUARD_PORT, World};

/// A world in which nodes 0 and 1 have a session and talk.
fn talking(seed: u64, spec: Spec) -> World {
    let mut world = World::mesh(seed, 2, spec);
    let ids = [world.send(0, 1), world.send(1, 0)];
    world.run_secs(1);
    world.ledger.assert_all(&ids);
    world
}

fn assert_both_ways(world: &mut World) {
    let ids = [world.send(0, 1), world.send(1, 0)];
    world.run_ms(200);
    world.ledger.assert_all(&ids);
}

#[test]
fn a_node_that_moves_is_followed() {
    let mut world = talking(1, Spec::default());
    let other = IpAddr::from([203, 0, 113, 7]);
    world.move_to(0, other);
    let lost = world.send(1, 0);
    world.run_ms(100);
    world.ledger.assert_none(&[lost]);
    let moved = world.send(0, 1);
    world.run_ms(100);
    world.ledger.assert_all(&[moved]);
    assert_eq!(world.endpoint(1, 0), Some(SocketAddr::new(other, WIREGUARD_PORT)));
    assert_eq!(world.nodes[1].lanes[0].wireguard().stats.roamed, 1);
    assert_both_ways(&mut world);
    // From IPv4 to IPv6 too.
    world.move_to(0, "2001:db8:77::1".parse().expect("address"));
    let moved = world.send(0, 1);
    world.run_ms(100);
    world.ledger.assert_all(&[moved]);
    assert_both_ways(&mut world);
    world.audit();
}

#[test]
fn a_partition_heals_within_the_bounds_of_wireguard() {
    for_seeds("a_partition_heals_within_the_bounds_of_wireguard", 10, |seed| {
        let mut world = talking(seed, Spec::default());
        world.net.cut(0, 1);
        let away = world.rng.within(1..400);
        for _ in 0..away {
            world.send(0, 1);
            world.run_secs(1);
        }
        world.net.heal();
        // A retransmission every 5 s, and a third of a second at random.
        world.talk_until_heard(0, 1, Duration::from_secs(6));
        assert_both_ways(&mut world);
        world.audit();
    });
}

#[test]
fn a_path_that_fails_one_way_heals() {
    for (from, to) in [(0, 1), (1, 0)] {
        let mut world = talking(2, Spec::default());
        world.net.cut_one_way(from, to);
        for _ in 0..120 {
            world.send(0, 1);
            world.send(1, 0);
            world.run_secs(1);
        }
        world.net.heal();
        world.run_secs(16);
        assert_both_ways(&mut world);
        world.audit();
    }
}

#[test]
fn new_endpoints_by_snapshot() {
    let mut world = talking(3, Spec::default());
    let other = IpAddr::from([203, 0, 113, 8]);
    world.move_to(1, other);
    world.nodes[1].endpoints = vec![SocketAddr::new(other, WIREGUARD_PORT)];
    world.publish();
    // At once, with the session that there is.
    assert_both_ways(&mut world);
    world.audit();
}

#[test]
fn a_dead_endpoint_first_in_the_list_is_passed_over() {
    let mut world = World::mesh(4, 2, Spec::default());
    let dead: Vec<SocketAddr> =
        ["192.0.2.1:1", "192.0.2.2:2"].iter().map(|text| text.parse().expect("address")).collect();
    let real = world.nodes[1].endpoints[0];
    world.nodes[1].endpoints = vec![dead[0], dead[1], real];
    world.publish();
    world.talk_until_heard(0, 1, Duration::from_secs(21));
    assert_both_ways(&mut world);
    world.audit();
}

#[test]
fn another_key_by_snapshot() {
    let mut world = World::mesh(5, 2, Spec::default());
    world.net.tap = Some(Vec::new());
    world.send(0, 1);
    let recorded = world.net.tap.take().expect("tap");
    world.run_secs(1);

    world.rekey(0);
    world.publish();
    let ids = [world.send(0, 1)];
    world.run_ms(100);
    world.ledger.assert_all(&ids);
    assert_both_ways(&mut world);

    // Who still has the old key is a stranger.
    let before = world.dropped(1, DropReason::UnknownPeer);
    let (from, to) = (world.nodes[0].endpoints[0], world.nodes[1].endpoints[0]);
    world.inject(from, to, &recorded[0].bytes);
    world.run_ms(10);
    assert_eq!(world.dropped(1, DropReason::UnknownPeer), before + 1);
    assert_both_ways(&mut world);
    world.audit();
}

#[test]
fn a_node_that_leaves_the_mesh_is_refused() {
    let mut world = talking(6, Spec::default());
    world.nodes[1].spec.knows = Some(vec![]);
    world.publish();
    let probe = world.probe(0, 1);
    world.send_forbidden(0, &probe);
    world.run_ms(100);
    assert!(world.nodes[1].lanes[0].wireguard().report(world.now()).is_empty());
    assert_eq!(world.dropped(1, DropReason::UnknownPeer), 1);
    world.audit();
}

/// Node 0 sits behind a NAT box and announces its private address only.
fn behind_nat(seed: u64, keepalive: u16, timeout: u64, cone: bool) -> World {
    let mut world = World::new(seed);
    world.add(Spec { keepalive: 0, ..Spec::default() });
    world.add(Spec { keepalive, ..Spec::default() });
    let inside = IpAddr::from([192, 168, 1, 10]);
    world.move_to(0, inside);
    world.net.hide(0, IpAddr::from([203, 0, 113, 1]), Duration::from_secs(timeout), cone);
    world.nodes[0].endpoints = vec![SocketAddr::new(inside, WIREGUARD_PORT)];
    world.publish();
    world
}

#[test]
fn a_node_behind_nat_is_answered_where_it_called_from() {
    for cone in [false, true] {
        let mut world = behind_nat(7, 0, 60, cone);
        let first = world.send(0, 1);
        world.run_ms(100);
        world.ledger.assert_all(&[first]);
        for _ in 0..100 {
            assert_both_ways(&mut world);
            world.run_secs(5);
        }
        world.audit();
    }
}

/// Somebody else's change makes a new snapshot: what was learnt about the NAT box must survive it.
#[test]
fn a_snapshot_does_not_forget_where_a_node_behind_nat_is() {
    let mut world = behind_nat(8, 0, 60, false);
    let first = world.send(0, 1);
    world.run_ms(100);
    world.ledger.assert_all(&[first]);
    for _ in 0..5 {
        world.publish();
        let back = world.send(1, 0);
        world.run_ms(100);
        world.ledger.assert_all(&[back]);
    }
    // Its list changes too, but says nothing about the outside of the box.
    world.nodes[0].endpoints.push("192.168.2.10:51820".parse().expect("address"));
    world.publish();
    let back = world.send(1, 0);
    world.run_ms(100);
    world.ledger.assert_all(&[back]);
    world.audit();
}

#[test]
fn keepalives_hold_the_mapping_open() {
    let mut world = behind_nat(9, 20, 30, false);
    let first = world.send(0, 1);
    world.run_ms(100);
    world.ledger.assert_all(&[first]);
    for _ in 0..5 {
        world.run_secs(110);
        let back = world.send(1, 0);
        world.run_ms(100);
        world.ledger.assert_all(&[back]);
    }
    world.audit();
}

#[test]
fn a_nat_box_that_reboots_costs_no_more_than_a_dead_peer() {
    for_seeds("a_nat_box_that_reboots_costs_no_more_than_a_dead_peer", 5, |seed| {
        let mut world = behind_nat(seed, 20, 60, false);
        let first = world.send(0, 1);
        world.run_secs(1 + seed * 7);
        world.ledger.assert_all(&[first]);
        world.net.reboot_nat(0);
        let lost = world.send(1, 0);
        world.run_ms(100);
        world.ledger.assert_none(&[lost]);
        // Its next keepalive tells where it is now.
        world.run_secs(21);
        assert_both_ways(&mut world);
        world.audit();
    });
}

#[test]
fn the_outer_family_does_not_matter_to_the_inner() {
    for v6 in [false, true] {
        let mut world = talking(10, Spec { outer_v6: v6, ..Spec::default() });
        let ids: Vec<_> = (0..100).map(|_| world.send(0, 1)).collect();
        world.run_secs(1);
        world.ledger.assert_all(&ids);
        world.audit();
    }
}

/// How many seconds lie between what node 0 sends to node 1, which has nothing to say.
fn heartbeat(world: &mut World) -> Vec<u64> {
    let mut heard = Vec::new();
    let mut before = world.total(1, Total::DatagramsReceived);
    for _ in 0..120 {
        world.run_secs(1);
        let now = world.total(1, Total::DatagramsReceived);
        heard.extend((now != before).then(|| world.at().as_secs()));
        before = now;
    }
    heard.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

#[test]
fn a_changed_keepalive_reaches_sessions_that_live() {
    let mut world = talking(11, Spec::default());
    world.run_secs(30);
    assert_eq!(heartbeat(&mut world), [0; 0], "nobody asked for keepalives");
    for seconds in [20, 7, 0, 30] {
        world.nodes[1].spec.keepalive = seconds;
        world.publish();
        // What the old interval had under way.
        world.run_secs(40);
        let gaps = heartbeat(&mut world);
        match u64::from(seconds) {
            0 => assert_eq!(gaps, [0; 0]),
            // A tick late at most, and a handshake is as good as a keepalive.
            interval => assert!(
                gaps.len() as u64 >= 120 / (interval + 1) - 2 && gaps.iter().all(|gap| *gap <= interval + 1),
                "{interval}: {gaps:?}"
            ),
        }
    }
    assert!(world.established(0, 1));
    assert_both_ways(&mut world);
    world.audit();
}

/// Keepalives alone, no packet for an hour: the keys are renewed and the session lives.
#[test]
fn keepalives_keep_a_session_for_as_long_as_they_are_answered() {
    let mut world = behind_nat(12, 25, 60, false);
    let first = world.send(0, 1);
    world.run_ms(100);
    world.ledger.assert_all(&[first]);
    world.run_secs(3600);
    let back = world.send(1, 0);
    world.run_ms(100);
    world.ledger.assert_all(&[back]);
    world.audit();
}

/// Nine silent minutes end a session, but not what it found out: a node that is not where it announces to be can be
/// called again, if its box has kept the mapping or it has moved to a public address.
#[test]
fn where_a_node_was_last_outlives_the_session() {
    for moved in [false, true] {
        let mut world = behind_nat(13, 0, 100_000, false);
        if moved {
            world = talking(13, Spec::default());
            world.move_to(0, IpAddr::from([203, 0, 113, 9]));
        }
        let first = world.send(0, 1);
        world.run_secs(1);
        world.ledger.assert_all(&[first]);
        world.run_secs(700);
        assert!(world.nodes[1].lanes[0].wireguard().report(world.now()).is_empty());
        // Other people's changes in between.
        world.publish();
        // The first attempt goes to where it announces to be, the second is due after 5 s.
        world.talk_until_heard(1, 0, Duration::from_secs(6));
        assert_both_ways(&mut world);

        // Another key is another machine.
        world.run_secs(700);
        world.rekey(0);
        world.publish();
        world.net.tap = Some(Vec::new());
        world.send(1, 0);
        world.run_secs(100);
        let announced = world.nodes[0].endpoints[0];
        let calls = world.net.tap.take().expect("tap");
        assert!(calls.len() > 10 && calls.iter().all(|call| call.to == announced));
        world.audit();
    }
}
