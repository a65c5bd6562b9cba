//! The laboratory itself: the other programs with each other, without Warren. If these fail, look here first.

use crate::lab::Lab;
use crate::lab::peer::{KernelVxlan, Neighbours, PORT, Program, WireGuard};
use crate::lab::traffic::{exchange, reach};

#[test]
fn kernel_vxlan_with_itself() {
    let lab = Lab::two();
    let [a, b] = [&lab.nodes[0], &lab.nodes[1]];
    for (node, other) in [(a, b), (b, a)] {
        KernelVxlan::new(&lab, node, 1, 8472).connect(&lab, other, Neighbours::Learnt);
    }
    reach(a.host(10), b.host(10));
    exchange(a.host(10), b.host(10));
}

#[test]
fn wireguard_go_with_boringtun() {
    two_programs(Program::WireguardGo, Program::Boringtun);
}

#[test]
fn wireguard_go_with_gotatun() {
    two_programs(Program::WireguardGo, Program::Gotatun);
}

fn two_programs(first: Program, second: Program) {
    let lab = Lab::two();
    let [a, b] = [&lab.nodes[0], &lab.nodes[1]];
    let (on_a, on_b) = (WireGuard::start(&lab, a, first), WireGuard::start(&lab, b, second));
    on_a.add_peer(a, b, &on_b.public_key, Some((lab.outer(b), PORT)));
    on_b.add_peer(b, a, &on_a.public_key, Some((lab.outer(a), PORT)));
    reach(a.host(10), b.host(10));
    exchange(a.host(10), b.host(10));
}
