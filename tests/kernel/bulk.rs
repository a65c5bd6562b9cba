//! Much data through an underlay that loses packets, by each encapsulation, on one lane and on two: every byte
//! arrives, once and in its place.
//!
//! ```text
//! WARREN=target/release/warren WARREN_BULK_MB=10240 cargo test --test kernel bulk -- --nocapture
//! ```
//!
//! What reorders packets is simulated (`tests/sim`): not every kernel has a queue that does.

use std::net::SocketAddr;

use warren::io::clock;

use crate::lab::agent::Mesh;
use crate::lab::traffic::{Echo, tcp_bulk};
use crate::lab::{Lab, Node};

/// Of what a node receives for a tunnel, one in so many is lost: datagrams, or runs of them where the kernel joins.
const LOST: u32 = 100;

#[test]
fn wireguard() {
    through_losses("wireguard", "1");
}

#[test]
fn wireguard_on_two_lanes() {
    through_losses("wireguard", "2");
}

#[test]
fn vxlan() {
    through_losses("vxlan", "1");
}

#[test]
fn vxlan_on_two_lanes() {
    through_losses("vxlan", "2");
}

fn through_losses(encap: &str, lanes: &str) {
    let megabytes: u64 = std::env::var("WARREN_BULK_MB").map_or(64, |text| text.parse().expect("a number"));
    let mesh = Mesh::start(Lab::two(), &["--encap", encap, "--lanes", lanes]);
    mesh.lab.nodes.iter().for_each(lose);
    let echo = Echo::start(mesh.pod(1));
    let began = clock::now();
    // Each way, in each of two connections of each family.
    let bytes = (megabytes << 20) / 8;
    std::thread::scope(|scope| {
        for family in [0, 0, 1, 1] {
            let (from, to) = (mesh.pod(0), mesh.pod(1));
            let target = SocketAddr::new(to.addresses[family], echo.port);
            scope.spawn(move || tcp_bulk(from.ns, from.addresses[family], target, bytes));
        }
    });
    let lost: Vec<u64> = mesh.lab.nodes.iter().map(losses).collect();
    println!(
        "{encap}, lanes {lanes}: {megabytes} MB in {:.1} s, lost {lost:?}",
        clock::now().duration_since(began).as_secs_f64()
    );
    assert!(lost.iter().all(|lost| *lost > 0), "nothing was lost: this shows nothing");
}

fn lose(node: &Node) {
    for command in [
        "nft add table inet losses",
        "nft add chain inet losses some { type filter hook prerouting priority -400 ; }",
        &format!(
            "nft add rule inet losses some udp dport {{ 8472, 51820-51829 }} numgen random mod {LOST} < 1 counter drop"
        ),
    ] {
        node.ns.run(command);
    }
}

fn losses(node: &Node) -> u64 {
    let rules = node.ns.run("nft list table inet losses");
    let count = rules.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no counter in {rules}"))
}
