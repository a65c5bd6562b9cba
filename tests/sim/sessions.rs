//! Handshakes, rekeys, restarts: how sessions begin, go on and end.

use std::time::Duration;

use warren::datapath::Total;
use warren::packet::DropReason;

use crate::net::Faults;
use crate::rng::for_seeds;
use crate::world::{Spec, World, public};

/// After this long without an answer WireGuard begins a new handshake (KEEPALIVE_TIMEOUT + REKEY_TIMEOUT), and
/// this long it may take on a network that loses nothing (a tick of ours, a round trip).
const DEAD_PEER: Duration = Duration::from_millis(15_000 + 1_000);

#[test]
fn handshake_under_loss() {
    for_seeds("handshake_under_loss", 20, |seed| {
        let mut world = World::mesh(seed, 2, Spec::default());
        world.net.faults = Faults { loss: 300, duplicate: 200, reorder: 200, ..Faults::NONE };
        // A handshake needs two datagrams and is tried 17 times.
        world.talk_until_heard(0, 1, Duration::from_secs(90));
        world.net.faults = Faults::NONE;
        world.run_secs(16);
        let ids: Vec<_> = (0..10).map(|_| world.send(0, 1)).collect();
        world.run_secs(1);
        world.ledger.assert_all(&ids);
        world.audit();
    });
}

#[test]
fn first_packets_wait_for_the_session() {
    let mut world = World::mesh(1, 2, Spec::default());
    let ids: Vec<_> = (0..20).map(|_| world.send(0, 1)).collect();
    world.run_ms(100);
    world.ledger.assert_all(&ids);
    assert_eq!(world.nodes[0].lanes[0].wireguard().stats.initiations_sent, 1);
    world.audit();
}

#[test]
fn a_peer_nobody_talks_to_costs_no_handshake() {
    let mut world = World::mesh(1, 3, Spec::default());
    let id = world.send(0, 1);
    world.run_secs(200);
    world.ledger.assert_all(&[id]);
    assert!(world.nodes[2].lanes[0].wireguard().report(world.now()).is_empty());
    assert_eq!(world.total(2, Total::DatagramsReceived), 0);
}

#[test]
fn rekey_under_traffic_loses_nothing() {
    for (lanes, seed) in [(1, 1), (2, 2)] {
        let mut world = World::mesh(seed, 2, Spec { lanes, ..Spec::default() });
        let mut ids = Vec::new();
        // Ten minutes, both ways, and pauses now and then.
        for step in 0..6_000u32 {
            if step % 1000 < 900 {
                ids.extend([world.send(0, 1), world.send(1, 0)]);
            }
            world.run_ms(100);
        }
        world.ledger.assert_all(&ids);
        let stats = world.nodes[0].lanes[0].wireguard().stats;
        assert!(stats.initiations_sent + stats.initiations_answered >= 5, "{stats:?}");
        assert_eq!(stats.old_timestamps, 0);
        world.audit();
    }
}

#[test]
fn rekey_while_only_one_side_sends() {
    for sender in [0, 1] {
        let mut world = World::mesh(3, 2, Spec::default());
        // Node 0 has begun; so once the initiator sends, once the responder.
        let first = world.send(0, 1);
        world.run_secs(1);
        let ids: Vec<_> = (0..1200)
            .map(|_| {
                let id = world.send(sender, 1 - sender);
                world.run_ms(500);
                id
            })
            .collect();
        world.ledger.assert_all(&[first]);
        world.ledger.assert_all(&ids);
        world.audit();
    }
}

#[test]
fn both_begin_at_once() {
    for_seeds("both_begin_at_once", 20, |seed| {
        let mut world = World::mesh(seed, 2, Spec::default());
        world.net.faults.jitter = Duration::from_millis(3);
        let mut ids = vec![world.send(0, 1), world.send(1, 0)];
        for _ in 0..20 {
            world.run_ms(20);
            ids.extend([world.send(0, 1), world.send(1, 0)]);
        }
        world.run_secs(1);
        world.ledger.assert_all(&ids);
        world.audit();
    });
}

#[test]
fn both_begin_at_once_under_loss() {
    for_seeds("both_begin_at_once_under_loss", 30, |seed| {
        let mut world = World::mesh(seed, 2, Spec::default());
        world.net.faults = Faults { loss: 500, ..Faults::NONE };
        world.initiate(0, 1);
        world.initiate(1, 0);
        world.run_ms(200);
        world.net.faults = Faults::NONE;
        // Whatever was lost: a node that has something to say gets through at its next retransmission.
        let ids = vec![world.send(0, 1)];
        world.run_ms(5_500);
        let late = vec![world.send(0, 1), world.send(1, 0)];
        world.run_ms(200);
        world.ledger.assert_all(&late);
        assert!(world.ledger.count(&ids) <= 1);
        world.audit();
    });
}

/// The restarted node says something first: back within a round trip.
#[test]
fn a_restarted_node_that_sends_is_back_at_once() {
    let mut world = World::mesh(5, 2, Spec::default());
    let before = [world.send(0, 1), world.send(1, 0)];
    world.run_secs(1);
    world.ledger.assert_all(&before);
    world.restart(0);
    let after = world.send(0, 1);
    world.run_ms(100);
    let back = world.send(1, 0);
    world.run_ms(100);
    world.ledger.assert_all(&[after, back]);
    assert_eq!(world.nodes[1].lanes[0].wireguard().stats.old_timestamps, 0, "its clock went on");
    world.audit();
}

/// The restarted node only receives: the others notice after 15 s ...
#[test]
fn a_dead_peer_is_noticed_by_silence() {
    let mut world = World::mesh(6, 2, Spec::default());
    let first = world.send(0, 1);
    world.run_secs(1);
    world.ledger.assert_all(&[first]);
    world.restart(1);
    world.talk_until_heard(0, 1, DEAD_PEER);
    assert!(world.dropped(1, DropReason::UnknownPeer) > 0);
    world.audit();
}

/// ... unless it remembers whom it talked to.
#[test]
fn initiating_to_recent_peers_does_not_wait_for_silence() {
    let mut world = World::mesh(7, 3, Spec { lanes: 2, ..Spec::default() });
    let first: Vec<_> = (0..20).map(|_| world.send(0, 1)).collect();
    world.run_secs(1);
    world.ledger.assert_all(&first);
    world.restart(1);
    world.initiate(1, 0);
    world.run_ms(50);
    let after: Vec<_> = (0..20).map(|_| world.send(0, 1)).collect();
    world.run_ms(50);
    world.ledger.assert_all(&after);
    world.audit();
}

/// The timestamps of the restarted node are older than those it sent before (TAI64N, CVE-2021-46873's kin):
/// the others answer it in a session of its own, which takes over once it has proved itself.
#[test]
fn a_node_whose_clock_was_set_back_is_not_locked_out() {
    for_seeds("a_node_whose_clock_was_set_back_is_not_locked_out", 10, |seed| {
        let mut world = World::mesh(seed, 2, Spec::default());
        // Long enough for rekeys: their timestamps are minutes after that of the first handshake.
        for _ in 0..300 {
            world.send(0, 1);
            world.run_secs(1);
        }
        world.restart(0);
        if seed > 5 {
            world.net.faults.loss = 300;
        }
        world.talk_until_heard(0, 1, Duration::from_secs(60));
        assert!(world.nodes[1].lanes[0].wireguard().stats.old_timestamps > 0, "the clock was set back");
        world.net.faults = Faults::NONE;
        // And it goes on: rekeys of the new session too.
        world.run_ms(100);
        let ids: Vec<_> = (0..300)
            .flat_map(|_| {
                let ids = [world.send(0, 1), world.send(1, 0)];
                world.run_secs(1);
                ids
            })
            .collect();
        world.ledger.assert_all(&ids);
        world.audit();
    });
}

/// A clock that jumps forward while sessions live: by little, timers are early; by much, all of the node's keys have
/// expired and it begins again, with timestamps that its peers have seen.
#[test]
fn a_clock_that_jumps_forward_costs_one_handshake() {
    for by in [3, 30, 100, 170, 200, 600, 86_400] {
        for stepped in [0, 1] {
            let mut world = World::mesh(11, 2, Spec::default());
            for _ in 0..150 {
                world.send(0, 1);
                world.send(1, 0);
                world.run_secs(1);
            }
            world.step_clock(stepped, Duration::from_secs(by));
            // It does not wait for the other's timers: it sees at once that its keys are too old.
            world.run_ms(400);
            world.talk_until_heard(stepped, 1 - stepped, Duration::from_secs(6));
            let ids: Vec<_> = (0..300)
                .flat_map(|_| {
                    let ids = [world.send(0, 1), world.send(1, 0)];
                    world.run_secs(1);
                    ids
                })
                .collect();
            world.ledger.assert_all(&ids);
            world.audit();
        }
    }
}

/// And the other way: the node whose clock jumped only listens. Its peer learns of it as of any node that has lost its
/// keys.
#[test]
fn a_silent_node_whose_clock_jumps_forward_is_noticed_as_a_dead_peer() {
    for by in [30, 200, 86_400] {
        let mut world = World::mesh(12, 2, Spec::default());
        let first = world.send(0, 1);
        world.run_secs(1);
        world.ledger.assert_all(&[first]);
        world.step_clock(1, Duration::from_secs(by));
        world.run_ms(400);
        world.talk_until_heard(0, 1, DEAD_PEER);
        world.audit();
    }
}

/// A clock that ran ahead while handshakes were made, and is right again after a restart: everything the node now says
/// is older than what its peer has seen.
#[test]
fn a_clock_that_was_ahead_and_is_set_right_does_not_lock_the_node_out() {
    for ahead in [60, 100] {
        let mut world = World::mesh(13, 2, Spec::default());
        let first = world.send(0, 1);
        world.run_secs(1);
        world.step_clock(0, Duration::from_secs(ahead));
        // A handshake with the wrong time.
        let before = world.nodes[0].lanes[0].wireguard().stats.initiations_sent;
        for _ in 0..130 {
            world.send(0, 1);
            world.run_secs(1);
        }
        assert!(world.nodes[0].lanes[0].wireguard().stats.initiations_sent > before);
        world.restart(0);
        world.talk_until_heard(0, 1, Duration::from_secs(6));
        assert!(world.nodes[1].lanes[0].wireguard().stats.old_timestamps > 0);
        let ids: Vec<_> = (0..300)
            .flat_map(|_| {
                let ids = [world.send(0, 1), world.send(1, 0)];
                world.run_secs(1);
                ids
            })
            .collect();
        world.ledger.assert_all(&[first]);
        world.ledger.assert_all(&ids);
        world.audit();
    }
}

#[test]
fn a_session_that_is_silent_is_forgotten_and_made_again() {
    let mut world = World::mesh(8, 2, Spec::default());
    let first = world.send(0, 1);
    world.run_secs(600);
    for node in [0, 1] {
        assert!(world.nodes[node].lanes[0].wireguard().report(world.now()).is_empty(), "node {node}");
        assert_eq!(
            world.nodes[node].lanes[0].wireguard().poll_timeout(),
            None,
            "node {node} still has a timer"
        );
    }
    let second = world.send(1, 0);
    world.run_secs(1);
    world.ledger.assert_all(&[first, second]);
    world.audit();
}

#[test]
fn a_peer_that_never_answers_is_given_up_and_every_packet_counted() {
    let mut world = World::mesh(9, 2, Spec::default());
    world.net.cut(0, 1);
    let ids: Vec<_> = (0..50).map(|_| world.send(0, 1)).collect();
    world.run_secs(100);
    world.ledger.assert_none(&ids);
    assert_eq!(world.dropped(0, DropReason::AwaitingSession), 50);
    assert_eq!(world.nodes[0].lanes[0].waiting(), 0);
    // 5 s apart for 90 s, then silence.
    let sent = world.nodes[0].lanes[0].wireguard().stats.initiations_sent;
    assert!((15..=19).contains(&sent), "{sent} initiations");
    world.run_secs(100);
    assert_eq!(world.nodes[0].lanes[0].wireguard().stats.initiations_sent, sent);
    world.audit();
    world.net.heal();
    let id = world.send(0, 1);
    world.run_secs(1);
    world.ledger.assert_all(&[id]);
}

#[test]
fn lanes_of_different_number_find_each_other() {
    let mut world = World::new(10);
    for lanes in [1, 2, 3] {
        world.add(Spec { lanes, ..Spec::default() });
    }
    world.publish();
    let mut ids = Vec::new();
    for _ in 0..200 {
        for (from, to) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
            ids.push(world.send(from, to));
        }
        world.run_secs(1);
    }
    world.ledger.assert_all(&ids);
    for node in 0..3 {
        for lane in &world.nodes[node].lanes {
            assert!(lane.counters().total(Total::PacketsSent) > 0, "an idle lane of node {node}");
        }
    }
    world.audit();
}

/// Announced, switched, retired: whatever the network does to the order of packets, none is lost.
#[test]
fn keys_change_under_traffic_and_nothing_is_lost() {
    for_seeds("keys_change_under_traffic", 12, |seed| {
        let lanes = 1 + (seed % 2) as u8;
        let mut world = World::mesh(seed, 4, Spec { lanes, ..Spec::default() });
        world.net.faults = Faults { reorder: 300, duplicate: 100, ..Faults::NONE };
        world.net.faults.jitter = Duration::from_millis(5);
        let mut ids = Vec::new();
        let mut talk = |world: &mut World, seconds: u32| {
            for _ in 0..seconds * 100 {
                for other in 1..4 {
                    ids.extend([world.send(0, other), world.send(other, 0)]);
                }
                world.run_ms(10);
            }
        };
        talk(&mut world, 3);
        for round in 0..2 {
            let first = world.nodes[0].keys.clone();
            let next: Vec<[u8; 32]> = first.iter().map(|_| world.rng.bytes()).collect();
            world.set_keys(0, first.clone(), next.clone());
            world.publish();
            talk(&mut world, 3);
            world.set_keys(0, next.clone(), first.clone());
            // The others hear of it later than of the handshakes.
            talk(&mut world, 1);
            world.publish();
            talk(&mut world, 25);
            let ours = public(&next[0]);
            assert_eq!(world.nodes[0].lanes[0].wireguard().public_key(), ours);
            for other in 1..4 {
                let report = world.report(other);
                assert!(report.iter().any(|s| s.key == ours && s.established), "round {round}: {report:?}");
            }
            world.set_keys(0, next, Vec::new());
            world.publish();
            talk(&mut world, 3);
        }
        world.run_secs(1);
        world.ledger.assert_all(&ids);
        world.audit();
    });
}

/// Whoever did not hear of the change calls the last key, and is answered for as long as there is one.
#[test]
fn who_missed_the_change_is_answered_while_the_last_key_is_there() {
    let mut world = World::mesh(9, 2, Spec::default());
    let first = world.nodes[0].keys.clone();
    let next: Vec<[u8; 32]> = vec![world.rng.bytes()];
    // Node 1 knows the next key, but not that it is in use.
    world.set_keys(0, first.clone(), next.clone());
    world.publish();
    world.set_keys(0, next.clone(), first);
    let early = world.send(1, 0);
    world.run_secs(1);
    let back = world.send(0, 1);
    world.run_secs(1);
    world.ledger.assert_all(&[early, back]);
    // Node 0 has gone over to a session between the keys in use by itself.
    let ours = public(&next[0]);
    assert!(world.report(1).iter().any(|s| s.key == ours && s.established), "{:?}", world.report(1));
    world.audit();
}
