//! Warren with other people's programs: both ends begin, both ends send, every size, both families.

use std::time::Duration;

use crate::lab::agent::Agent;
use crate::lab::peer::{KernelVxlan, Neighbours, PORT, Program, WireGuard};
use crate::lab::traffic::{exchange, reach};
use crate::lab::{Lab, Station, Underlay, wait_for};

/// Which end sends the first packet, and so the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begins {
    Warren,
    Other,
}

/// How the kernel's VXLAN sends checksums of the inner packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sums {
    Computed,
    Owed,
}

#[test]
fn wireguard_go() {
    wireguard(Program::WireguardGo, Begins::Warren, Underlay::V4, "1");
    wireguard(Program::WireguardGo, Begins::Other, Underlay::V4, "1");
}

#[test]
fn boringtun() {
    wireguard(Program::Boringtun, Begins::Warren, Underlay::V4, "1");
    wireguard(Program::Boringtun, Begins::Other, Underlay::V4, "1");
}

#[test]
fn gotatun() {
    wireguard(Program::Gotatun, Begins::Warren, Underlay::V4, "1");
    wireguard(Program::Gotatun, Begins::Other, Underlay::V4, "1");
}

#[test]
fn wireguard_go_over_ipv6() {
    wireguard(Program::WireguardGo, Begins::Warren, Underlay::V6, "1");
    wireguard(Program::WireguardGo, Begins::Other, Underlay::V6, "1");
}

/// The other program knows lane 0's key; flows begin on every lane.
#[test]
fn one_key_is_enough_for_several_lanes() {
    wireguard(Program::WireguardGo, Begins::Warren, Underlay::V4, "3");
    wireguard(Program::WireguardGo, Begins::Other, Underlay::V4, "3");
}

#[test]
fn kernel_vxlan_with_written_neighbours() {
    vxlan(true, Begins::Warren, Underlay::V4, Sums::Computed);
    vxlan(true, Begins::Other, Underlay::V4, Sums::Computed);
}

#[test]
fn kernel_vxlan_with_learnt_neighbours() {
    vxlan(false, Begins::Warren, Underlay::V4, Sums::Computed);
    vxlan(false, Begins::Other, Underlay::V4, Sums::Computed);
}

#[test]
fn kernel_vxlan_over_ipv6() {
    vxlan(true, Begins::Warren, Underlay::V6, Sums::Computed);
    vxlan(false, Begins::Other, Underlay::V6, Sums::Computed);
}

#[test]
fn kernel_vxlan_that_owes_its_sums() {
    vxlan(true, Begins::Warren, Underlay::V4, Sums::Owed);
}

/// The other node answers ARP and neighbour discovery for its own addresses, not for the pods that it routes to.
#[test]
fn kernel_vxlan_with_a_pod_behind_it() {
    let mut lab = Lab::new(2, Underlay::V4, 1500);
    lab.nodes[0].add_pod(1500);
    // Its device has the first pod's addresses.
    (0..2).for_each(|_| lab.nodes[1].add_pod(1500));
    let [warren, other] = [&lab.nodes[0], &lab.nodes[1]];
    let kernel = KernelVxlan::new(&lab, other, 1, 8472);
    kernel.sum_by_itself();
    lab.write_node(warren, &[]);
    lab.write_node(other, &[("warren.dev/encaps", "vxlan")]);
    let agent = Agent::start(&lab, warren, &["--encap", "vxlan"]);
    [warren, other].iter().for_each(|node| node.set_pod_mtu(agent.pod_mtu()));
    kernel.connect(&lab, warren, Neighbours::Learnt);
    let behind = Station { ns: &other.pods[1], addresses: other.inner(11) };
    reach(warren.pod(), behind);
    exchange(warren.pod(), behind);
}

fn wireguard(program: Program, begins: Begins, underlay: Underlay, lanes: &str) {
    eprintln!("{program:?}, {begins:?} begins, underlay {underlay:?}, lanes {lanes}");
    let mut lab = Lab::new(2, underlay, 1500);
    lab.nodes[0].add_pod(1500);
    let [warren, other] = [&lab.nodes[0], &lab.nodes[1]];
    let peer = WireGuard::start(&lab, other, program);
    let endpoint = std::net::SocketAddr::new(lab.outer(other), PORT).to_string();
    lab.write_node(warren, &[]);
    lab.write_node(other, &[("warren.dev/public-key", &peer.public_key), ("warren.dev/endpoint", &endpoint)]);
    let agent = Agent::start(&lab, warren, &["--encap", "wireguard", "--lanes", lanes]);
    warren.set_pod_mtu(agent.pod_mtu());
    let (key, port) = lane_zero(&lab);
    // The other program knows no endpoint when Warren begins: it must learn it from the handshake.
    let known = (begins == Begins::Other).then_some((lab.outer(warren), port));
    peer.add_peer(other, warren, &key, known);
    match begins {
        Begins::Warren => reach(warren.pod(), other.host(10)),
        Begins::Other => reach(other.host(10), warren.pod()),
    }
    exchange(warren.pod(), other.host(10));
    assert!(WireGuard::last_handshake(other) > 0, "the other program tells of a handshake");
}

/// The key and port that a standard WireGuard peer uses, as the first node has published them.
pub(crate) fn lane_zero(lab: &Lab) -> (String, u16) {
    let published = || lab.published(&lab.nodes[0], "warren.dev/lanes");
    let lanes = wait_for("node1 has published its lanes", Duration::from_secs(5), published);
    let first = lanes.split(',').next().unwrap_or_default();
    let (key, port) = first.rsplit_once(':').unwrap_or_else(|| panic!("lanes are KEY:PORT, not {lanes:?}"));
    (key.to_owned(), port.parse().expect("the port is a number"))
}

fn vxlan(written: bool, begins: Begins, underlay: Underlay, sums: Sums) {
    eprintln!("neighbours written: {written}, {begins:?} begins, underlay {underlay:?}");
    let mut lab = Lab::new(2, underlay, 1500);
    lab.nodes[0].add_pod(1500);
    let [warren, other] = [&lab.nodes[0], &lab.nodes[1]];
    let kernel = KernelVxlan::new(&lab, other, 1, 8472);
    match sums {
        Sums::Computed => kernel.sum_by_itself(),
        Sums::Owed => kernel.owe_sums(),
    }
    lab.write_node(warren, &[]);
    if written {
        lab.write_node(
            other,
            &[("warren.dev/encaps", "vxlan"), ("warren.dev/vxlan-mac", &KernelVxlan::mac(other))],
        );
    } else {
        lab.write_node(other, &[("warren.dev/encaps", "vxlan")]);
    }
    let agent = Agent::start(&lab, warren, &["--encap", "vxlan"]);
    warren.set_pod_mtu(agent.pod_mtu());
    let published = || lab.published(warren, "warren.dev/vxlan-mac");
    let mac = wait_for("node1 has published its MAC address", Duration::from_secs(5), published);
    let how = if written { Neighbours::Static { mac: &mac } } else { Neighbours::Learnt };
    kernel.connect(&lab, warren, how);
    match begins {
        Begins::Warren => reach(warren.pod(), other.host(10)),
        Begins::Other => reach(other.host(10), warren.pod()),
    }
    exchange(warren.pod(), other.host(10));
}
