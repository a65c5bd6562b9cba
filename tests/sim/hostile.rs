//! Attackers: replay, floods, spoofing, and bytes that mean nothing.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use warren::datapath::Total;
use warren::packet::DropReason;
use warren::snapshot::{Mesh, Owner, PeerId, RouteTable, Snapshot};

use crate::net::Datagram;
use crate::packets::Probe;
use crate::rng::for_seeds;
use crate::world::{Policy, Spec, WIREGUARD_PORT, World, node_v4, pod, underlay};

fn attacker() -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 66], 6666))
}

fn assert_both_ways(world: &mut World) {
    let ids = [world.send(0, 1), world.send(1, 0)];
    world.run_ms(100);
    world.ledger.assert_all(&ids);
}

fn assert_endpoints_stay(world: &World) {
    for (node, other) in [(0, 1), (1, 0)] {
        assert_eq!(
            world.endpoint(node, other),
            Some(SocketAddr::new(underlay(other, false), WIREGUARD_PORT))
        );
    }
}

/// Two nodes that have talked for a while, and all that went over the network. Node 0 begins the handshakes.
fn recorded(seed: u64, seconds: u64) -> (World, Vec<Datagram>) {
    let mut world = World::mesh(seed, 2, Spec::default());
    world.net.tap = Some(Vec::new());
    for _ in 0..seconds {
        world.send(0, 1);
        world.run_ms(500);
        world.send(1, 0);
        world.run_ms(500);
    }
    let recorded = world.net.tap.take().expect("tap");
    (world, recorded)
}

#[test]
fn what_was_recorded_is_worth_nothing() {
    let (mut world, recorded) = recorded(1, 600);
    let received = world.total(0, Total::PacketsReceived) + world.total(1, Total::PacketsReceived);
    for datagram in &recorded {
        // In the sender's name, in the attacker's, and to the wrong node. The ledger sees what comes through.
        world.inject(datagram.from, datagram.to, &datagram.bytes);
        world.inject(attacker(), datagram.to, &datagram.bytes);
        world.inject(attacker(), datagram.from, &datagram.bytes);
        world.run_ms(20);
    }
    assert_endpoints_stay(&world);
    let now = world.total(0, Total::PacketsReceived) + world.total(1, Total::PacketsReceived);
    assert_eq!(now, received);
    assert!(world.dropped(1, DropReason::Replay) > 0);
    for _ in 0..200 {
        assert_both_ways(&mut world);
        world.run_secs(1);
    }
    assert_endpoints_stay(&world);
    world.audit();
}

/// A restarted node has forgotten which timestamps it has seen, so recorded initiations are new to it: more of
/// them than boringtun's ring of sessions has places must not push out the session in use.
#[test]
fn recorded_handshakes_do_not_end_the_session_of_a_restarted_node() {
    let (mut world, recorded) = recorded(2, 2_000);
    let initiations: Vec<_> = recorded.iter().filter(|d| d.bytes[0] == 1).collect();
    assert!(initiations.len() > 12, "{} recorded", initiations.len());
    world.restart(1);
    world.initiate(1, 0);
    world.run_ms(100);
    assert_both_ways(&mut world);
    for datagram in &initiations {
        world.inject(attacker(), datagram.to, &datagram.bytes);
        world.run_ms(50);
        assert_both_ways(&mut world);
        assert_endpoints_stay(&world);
    }
    // And its own handshakes are not in the way of those of its peer.
    for _ in 0..400 {
        assert_both_ways(&mut world);
        world.run_secs(1);
    }
    world.audit();
}

/// After a clock was set back every recorded initiation looks newer than the honest ones. Each can be in their
/// way once, not again and again.
#[test]
fn recorded_handshakes_do_not_lock_out_a_node_whose_clock_was_set_back() {
    let (mut world, recorded) = recorded(3, 400);
    let initiations: Vec<_> = recorded.iter().filter(|d| d.bytes[0] == 1).collect();
    assert!(initiations.len() > 2);
    world.restart(0);
    let restarted = world.at();
    let mut last = 0;
    while !world.ledger.has(last) {
        assert!(world.at() - restarted < Duration::from_secs(12), "locked out");
        // The newest first: none of the others is of use after it, and none of node 0's.
        for datagram in initiations.iter().rev() {
            world.inject(attacker(), datagram.to, &datagram.bytes);
            world.run_ms(20);
        }
        last = world.send(0, 1);
        world.run_ms(20);
    }
    assert_both_ways(&mut world);
    for datagram in &initiations {
        world.inject(attacker(), datagram.to, &datagram.bytes);
    }
    for _ in 0..300 {
        assert_both_ways(&mut world);
        world.run_secs(1);
    }
    assert_endpoints_stay(&world);
    world.audit();
}

const HUB_SEED: u64 = 4242;

/// An initiation towards the first node of a world of [`HUB_SEED`], well formed, of a key that nobody knows.
/// To be called before that world's time begins: all worlds of a thread share the clock.
fn strangers_initiation() -> Vec<u8> {
    let hub = World::mesh(HUB_SEED, 1, Spec::default());
    let mut world = World::mesh(9, 2, Spec::default());
    world.nodes[0].keys = hub.nodes[0].keys.clone();
    world.publish();
    world.net.tap = Some(Vec::new());
    world.initiate(1, 0);
    world.net.tap.take().expect("tap")[0].bytes.clone()
}

/// A thousand nodes come back at once and all begin with one: it answers all of them soon, while others flood.
#[test]
fn a_thousand_restarted_nodes_are_all_answered_in_a_flood() {
    const NODES: usize = 1000;
    let flood = strangers_initiation();
    let mut world = World::new(HUB_SEED);
    world.add(Spec::default());
    for _ in 0..NODES {
        world.add(Spec { knows: Some(vec![0]), ..Spec::default() });
    }
    world.publish();
    let hub = SocketAddr::new(underlay(0, false), WIREGUARD_PORT);
    for leaf in 1..=NODES {
        world.initiate(leaf, 0);
    }
    let mut forged = 0u32;
    let took = loop {
        if (1..=NODES).all(|leaf| world.established(leaf, 0)) {
            break world.at();
        }
        assert!(world.at() < Duration::from_secs(30), "not all are answered");
        for _ in 0..50 {
            world.inject(attacker(), hub, &flood);
            forged += 1;
            world.inject(
                SocketAddr::from((0xc633_6400u32.wrapping_add(forged * 7).to_be_bytes(), 9)),
                hub,
                &flood,
            );
        }
        world.run_ms(50);
    };
    assert!(world.dropped(0, DropReason::UnknownPeer) > 100, "the flood reached the gate");
    assert!(world.dropped(0, DropReason::CookieDemanded) > 1000);
    println!("{NODES} nodes answered within {took:?} of virtual time");
    let ids: Vec<_> = (1..=NODES).flat_map(|leaf| [world.send(leaf, 0), world.send(0, leaf)]).collect();
    world.run_ms(100);
    world.ledger.assert_all(&ids);
    world.audit();
}

/// Handshakes in an honest node's name, fewer than make the receiver demand cookies of all: they use up that
/// node's share, but not what it gets for showing a cookie.
#[test]
fn whoever_forges_a_nodes_address_does_not_shut_it_out() {
    let flood = strangers_initiation();
    let mut world = World::mesh(HUB_SEED, 2, Spec::default());
    let (honest, hub) = (world.nodes[1].endpoints[0], world.nodes[0].endpoints[0]);
    let mut last = 0;
    for round in 0..120 {
        for _ in 0..16 {
            world.inject(honest, hub, &flood);
        }
        world.run_ms(100);
        // Not before the share is used up.
        if round > 40 && !world.established(1, 0) {
            last = world.send(1, 0);
        }
    }
    assert!(world.established(1, 0), "shut out");
    assert!(last > 0 && world.dropped(0, DropReason::CookieDemanded) > 0);
    assert_both_ways(&mut world);
    world.audit();
}

/// An answer to the first handshake of the first node of a world of [`HUB_SEED`], well formed, by a stranger. To be
/// called before that world's time begins.
fn strangers_answer() -> Vec<u8> {
    let hub = World::mesh(HUB_SEED, 1, Spec::default());
    let mut world = World::mesh(9, 2, Spec::default());
    world.nodes[0].keys = hub.nodes[0].keys.clone();
    world.restart(0);
    world.publish();
    world.net.tap = Some(Vec::new());
    world.initiate(0, 1);
    world.run_ms(100);
    world.net.tap.take().expect("tap").into_iter().find(|d| d.bytes[0] == 2).expect("an answer").bytes
}

/// Each forged answer costs as much as an honest one, for as long as a handshake is under way. Few are paid for, and
/// the peer in whose name they come gets through.
#[test]
fn forged_answers_are_not_worth_their_price() {
    let forged = strangers_answer();
    let mut world = World::mesh(HUB_SEED, 2, Spec::default());
    let (peer, hub) = (world.nodes[1].endpoints[0], world.nodes[0].endpoints[0]);
    world.net.cut(0, 1);
    world.send(0, 1);
    let mut sent = 0;
    let flood = |world: &mut World, sent: &mut u64| {
        for _ in 0..20 {
            world.inject(peer, hub, &forged);
            *sent += 1;
        }
        world.run_ms(10);
    };
    for _ in 0..400 {
        flood(&mut world, &mut sent);
    }
    let paid = world.dropped(0, DropReason::BadAuthentication);
    assert!((100..=100 + 50 * 4).contains(&paid), "{paid} of {sent}");
    assert!(world.dropped(0, DropReason::CookieDemanded) > 7_000);

    // The peer's next answer comes without a cookie, the one after that with it.
    world.net.heal();
    let since = world.at();
    while !world.established(0, 1) {
        assert!(world.at() - since < Duration::from_secs(12), "shut out");
        flood(&mut world, &mut sent);
    }
    let ids = [world.send(0, 1), world.send(1, 0)];
    world.run_ms(100);
    world.ledger.assert_all(&ids);
    world.audit();
}

/// Two nodes and a third that is a member of the mesh but evil: it believes what `claim` writes into its routes.
fn evil(seed: u64, policy: Policy, claim: impl Fn(&mut RouteTable)) -> World {
    let mut world = World::mesh(seed, 3, Spec { policy, ..Spec::default() });
    let old = Arc::clone(&world.nodes[2].snapshot);
    let mut routes = old.mesh.routes.clone();
    claim(&mut routes);
    let mesh = Mesh {
        peers: old.mesh.peers.clone(),
        routes,
        keys: old.mesh.keys.clone(),
        vxlan_sources: old.mesh.vxlan_sources.clone(),
    };
    world.nodes[2].snapshot = Arc::new(Snapshot {
        generation: 99,
        local: Arc::clone(&old.local),
        mesh: Arc::new(mesh),
        services: Arc::default(),
    });
    world
}

fn probe(world: &mut World, source: IpAddr, destination: IpAddr) -> Probe {
    let id = world.ledger.number();
    Probe { id, source, destination, ports: (1, 2), len: 100, hop_limit: 64, dont_fragment: true }
}

#[test]
fn a_member_cannot_lie_about_the_source() {
    for policy in [Policy::WireGuard, Policy::Vxlan] {
        let strange = IpAddr::from([192, 0, 2, 1]);
        let mut world = evil(11, policy, |routes| {
            for id in [0, 1] {
                for v6 in [false, true] {
                    routes.insert(pod(id, 7, v6).into(), Owner::LocalPod);
                }
                routes.insert(IpAddr::V4(node_v4(id)).into(), Owner::LocalNode);
            }
            routes.insert(strange.into(), Owner::LocalPod);
        });
        let own = world.send(2, 1);
        world.run_ms(100);
        let targets = [pod(1, 9, false), pod(1, 9, true)];
        let mut lies = 0;
        for source in [
            pod(0, 7, false),
            pod(0, 7, true),
            pod(1, 7, false),
            node_v4(0).into(),
            node_v4(1).into(),
            strange,
        ] {
            let destination = targets[usize::from(source.is_ipv6())];
            let probe = probe(&mut world, source, destination);
            world.send_forbidden(2, &probe);
            lies += 1;
        }
        world.run_ms(100);
        world.ledger.assert_all(&[own]);
        assert_eq!(world.dropped(1, DropReason::SpoofedSource), lies);
        assert!(world.nodes[1].other.is_empty());
        world.audit();
    }
}

#[test]
fn what_is_for_somebody_else_is_not_reflected() {
    for policy in [Policy::WireGuard, Policy::Vxlan] {
        let outside = IpAddr::from([192, 0, 2, 9]);
        let mut world = evil(12, policy, |routes| {
            routes.insert(pod(0, 9, false).into(), Owner::PeerPod(PeerId(1)));
            routes.insert(pod(2, 200, false).into(), Owner::PeerPod(PeerId(1)));
            routes.insert(outside.into(), Owner::PeerPod(PeerId(1)));
        });
        let own = world.send(2, 1);
        world.run_ms(100);
        let sent = world.total(1, Total::PacketsSent);
        for destination in [pod(0, 9, false), pod(2, 200, false), outside] {
            let probe = probe(&mut world, pod(2, 5, false), destination);
            world.send_forbidden(2, &probe);
        }
        world.run_ms(100);
        world.ledger.assert_all(&[own]);
        assert_eq!(world.dropped(1, DropReason::NotOurs), 3);
        assert_eq!(world.total(1, Total::PacketsSent), sent);
        assert_eq!(world.total(0, Total::DatagramsReceived), 0);
        world.audit();
    }
}

#[test]
fn frames_of_strangers_and_of_wireguard_peers_are_refused() {
    let mut world = World::new(13);
    for policy in [Policy::Vxlan, Policy::Vxlan, Policy::WireGuard] {
        world.add(Spec { policy, ..Spec::default() });
    }
    world.publish();
    world.net.tap = Some(Vec::new());
    let id = world.send(0, 1);
    world.run_ms(100);
    world.ledger.assert_all(&[id]);
    let frame = world.net.tap.take().expect("tap").remove(0);
    for ip in [attacker().ip(), underlay(2, false)] {
        world.inject(SocketAddr::new(ip, frame.from.port()), frame.to, &frame.bytes);
    }
    let mut wrong_vni = frame.bytes.clone();
    wrong_vni[6] ^= 1;
    world.inject(frame.from, frame.to, &wrong_vni);
    world.run_ms(100);
    assert_eq!(world.dropped(1, DropReason::UnknownVxlanSource), 2);
    assert_eq!(world.dropped(1, DropReason::WrongVni), 1);
    world.audit();
}

/// Bytes that anybody can send, from nobody and from members, do no harm and are counted.
#[test]
fn bytes_from_the_network_do_no_harm() {
    for_seeds("bytes_from_the_network_do_no_harm", 4, |seed| {
        let mut world = World::new(seed);
        for policy in [Policy::Vxlan, Policy::Vxlan, Policy::WireGuard] {
            world.add(Spec { policy, lanes: 2, announces_mac: false, ..Spec::default() });
        }
        world.publish();
        world.net.tap = Some(Vec::new());
        for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
            world.send(from, to);
            world.run_ms(50);
        }
        let recorded = world.net.tap.take().expect("tap");
        for _ in 0..4_000 {
            let like = &recorded[world.rng.index(recorded.len())];
            let (mut from, to) = (like.from, like.to);
            let mut bytes = like.bytes.clone();
            if world.rng.permille(100) {
                bytes = (0..world.rng.within(0..2000)).map(|_| world.rng.next() as u8).collect();
            }
            for _ in 0..world.rng.within(1..6) {
                if bytes.is_empty() {
                    break;
                }
                // Headers are where it hurts.
                let reach = if world.rng.permille(800) { bytes.len().min(110) } else { bytes.len() };
                let at = world.rng.index(reach);
                match world.rng.within(0..4) {
                    0 => bytes[at] = world.rng.next() as u8,
                    1 => bytes[at] ^= 1 << world.rng.within(0..8),
                    2 => bytes[at] = 0xff,
                    _ => bytes.truncate(at),
                }
            }
            if world.rng.permille(200) {
                from = attacker();
            }
            // Mutated VXLAN is not authenticated: its probes may arrive changed. They lose their number.
            if to.port() == 8472 {
                bytes.windows(8).position(|w| w == b"burrow01").into_iter().for_each(|at| bytes[at] = 0);
            }
            world.inject(from, to, &bytes);
            world.run_ms(2);
        }
        world.run_secs(1);
        let ids: Vec<_> = [(0, 2), (2, 0), (1, 2), (2, 1)].map(|(a, b)| world.send(a, b)).to_vec();
        world.run_secs(1);
        world.ledger.assert_all(&ids);
    });
}

/// So do frames that a pod can make the kernel hand over, with any virtio header.
#[test]
fn frames_from_the_tun_do_no_harm() {
    for_seeds("frames_from_the_tun_do_no_harm", 4, |seed| {
        let mut world = World::mesh(seed, 2, Spec::default());
        world.send(0, 1);
        world.run_ms(100);
        for round in 0..4_000 {
            let v6 = world.rng.permille(400);
            let (source, destination) = (pod(0, 5, v6), pod(1, 9, v6));
            let mut frame = match round % 3 {
                0 => crate::packets::super_segment(
                    source,
                    destination,
                    world.rng.within(1..20_000) as usize,
                    1000,
                ),
                1 => [&[0; 10][..], &crate::packets::syn(source, destination, 1460)].concat(),
                _ => {
                    let mut probe = world.probe(0, 1);
                    (probe.hop_limit, probe.dont_fragment) = (world.rng.next() as u8, false);
                    let bytes = probe.build();
                    let at = bytes.windows(8).position(|w| w == b"burrow01").expect("magic");
                    let mut frame = [&[0; 10][..], &bytes].concat();
                    frame[10 + at] = 0;
                    frame
                }
            };
            for _ in 0..world.rng.within(1..5) {
                if frame.is_empty() {
                    break;
                }
                let at = world.rng.index(frame.len().min(90));
                match world.rng.within(0..5) {
                    0 => frame[at] = world.rng.next() as u8,
                    1 => frame[at] ^= 1 << world.rng.within(0..8),
                    2 => frame[at] = [0, 0xff][world.rng.index(2)],
                    3 => frame[world.rng.index(10).min(at)] = world.rng.next() as u8,
                    _ => frame.truncate(at),
                }
            }
            world.hand_frame(0, 0, frame, 1);
            world.run_ms(1);
        }
        let id = world.send(0, 1);
        world.run_secs(1);
        world.ledger.assert_all(&[id]);
    });
}

/// A member puts a WireGuard message into a packet of its own pod: opened, it comes to our socket from an address
/// inside the mesh. Were that taken for where the member is, what we seal for it would come back for ever.
#[test]
fn a_member_cannot_lead_the_tunnel_into_itself() {
    for inside in [pod(1, 7, false), pod(1, 7, true), pod(0, 7, false), pod(1, 0, false)] {
        let mut world = World::mesh(14, 2, Spec::default());
        assert_both_ways(&mut world);
        let to = world.nodes[0].endpoints[0];
        let via = SocketAddr::new(inside, WIREGUARD_PORT);
        // Data that is new to us, and a handshake; both never came here the honest way.
        let mut inner = Vec::new();
        world.net.cut(0, 1);
        for _ in 0..2 {
            world.net.tap = Some(Vec::new());
            let probe = world.probe(1, 0);
            world.send_forbidden(1, &probe);
            inner.extend(world.net.tap.take().expect("tap").into_iter().filter(|d| d.from.ip() != to.ip()));
            world.restart(1);
        }
        world.net.heal();
        assert_eq!(inner.iter().map(|d| d.bytes[0]).collect::<Vec<_>>(), [4, 1]);
        for datagram in &inner {
            world.inject(via, to, &datagram.bytes);
            world.run_ms(10);
        }
        assert_eq!(world.dropped(0, DropReason::TunnelInTunnel), 2, "{inside}");
        assert_eq!(world.endpoint(0, 1), Some(SocketAddr::new(underlay(1, false), WIREGUARD_PORT)));
        world.initiate(1, 0);
        world.run_ms(100);
        assert_both_ways(&mut world);
        assert_endpoints_stay(&world);
        world.audit();
    }
}
