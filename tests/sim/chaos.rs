//! Many nodes, random traffic, random faults: the ledger and the books must hold all the time, and when the
//! faults end everything must work again within WireGuard's bounds.

use std::net::IpAddr;
use std::time::Duration;

use crate::net::Faults;
use crate::rng::{Rng, for_seeds};
use crate::world::{Node, Policy, Spec, WIREGUARD_PORT, World};

#[test]
fn a_few_nodes_in_chaos() {
    for_seeds("a_few_nodes_in_chaos", 8, |seed| {
        let nodes = 2 + seed as usize % 6;
        chaos(seed, nodes, 150);
    });
}

#[test]
fn fifty_nodes_in_chaos() {
    for_seeds("fifty_nodes_in_chaos", 1, |seed| chaos(seed, 50, 40));
}

fn chaos(seed: u64, nodes: usize, seconds: u64) {
    let mut world = World::new(seed);
    let mut rng = Rng::new(seed ^ 0xc4a05);
    world.receive_offload = rng.permille(500);
    for _ in 0..nodes {
        let policy = [Policy::WireGuard, Policy::WireGuard, Policy::Vxlan, Policy::Auto][rng.index(4)];
        world.add(Spec {
            lanes: 1 + rng.index(3) as u8,
            policy,
            location: rng.index(2) as u8,
            announces_mac: rng.permille(700),
            keepalive: if rng.permille(200) { 20 } else { 0 },
            outer_v6: rng.permille(300),
            knows: None,
        });
    }
    world.publish();
    let end = world.at() + Duration::from_secs(seconds);
    while world.at() < end {
        for _ in 0..rng.within(1..nodes as u64 + 4) {
            let (a, b) = pair(&mut rng, nodes);
            world.send(a, b);
        }
        if rng.permille(150) {
            disturb(&mut world, &mut rng, nodes);
        }
        world.run_ms(rng.within(1..400));
    }
    world.audit();

    // Peace: whoever restarted or moved is announced, and 25 s of talk let every dead session be noticed
    // (15 s) and made again (5 s).
    world.net.heal();
    world.net.faults = Faults::NONE;
    world.nodes.iter_mut().for_each(announce);
    world.publish();
    let pairs: Vec<_> = (0..2 * nodes).map(|_| pair(&mut rng, nodes)).collect();
    for _ in 0..50 {
        for (a, b) in &pairs {
            world.send(*a, *b);
        }
        world.run_ms(500);
    }
    // Lanes of a pair are chosen by the flow: all of them.
    let sent: Vec<_> = pairs.iter().chain(&pairs).map(|(a, b)| (*a, *b, world.send(*a, *b))).collect();
    world.run_secs(1);
    for (a, b, id) in sent {
        assert!(world.ledger.has(id), "no way from {a} to {b}: {}", explain(&world, a, b));
    }
    world.audit();
}

fn disturb(world: &mut World, rng: &mut Rng, nodes: usize) {
    let (a, b) = pair(rng, nodes);
    match rng.within(0..10) {
        0 => world.net.cut(a, b),
        1 => world.net.cut_one_way(a, b),
        2 => world.net.heal(),
        3 => world.restart(a),
        4 => {
            world.restart(a);
            (0..nodes).filter(|other| *other != a).for_each(|other| world.initiate(a, other));
        }
        5 => {
            let address = match world.nodes[a].spec.outer_v6 {
                false => IpAddr::from([203, rng.next() as u8, rng.next() as u8, a as u8]),
                true => IpAddr::from([0x2001, 0xdb9, rng.next() as u16, a as u16, 0, 0, 0, 1]),
            };
            world.move_to(a, address);
        }
        6 => {
            announce(&mut world.nodes[a]);
            world.publish();
        }
        7 => {
            world.rekey(a);
            if rng.permille(500) {
                world.publish();
            }
        }
        8 => {
            world.net.faults = Faults {
                loss: rng.within(0..300) as u32,
                duplicate: rng.within(0..200) as u32,
                reorder: rng.within(0..300) as u32,
                delay: Duration::from_millis(rng.within(1..100)),
                jitter: Duration::from_millis(rng.within(0..50)),
                mtu: 1500,
            };
        }
        _ => world.net.faults = Faults::NONE,
    }
}

/// What both nodes know of each other.
fn explain(world: &World, a: usize, b: usize) -> String {
    let mut text = format!("{:?}\n", world.encap(a, b));
    for (node, other) in [(a, b), (b, a)] {
        text += &format!("node {node} at {}: {}\n", world.nodes[node].address, world.describe_counters(node));
        for lane in &world.nodes[node].lanes {
            let sessions = lane.wireguard().report(world.now());
            for session in sessions.iter().filter(|s| s.peer.0 as usize == other) {
                text += &format!("  {session:?}\n");
            }
        }
    }
    text
}

fn announce(node: &mut Node) {
    node.endpoints = vec![(node.address, WIREGUARD_PORT).into()];
}

fn pair(rng: &mut Rng, nodes: usize) -> (usize, usize) {
    let a = rng.index(nodes);
    let b = (a + 1 + rng.index(nodes - 1)) % nodes;
    (a, b)
}
