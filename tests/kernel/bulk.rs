//! Much data through an underlay that loses packets and lets others overtake them, by each encapsulation, on one
//! lane, on two, and on as many as the agent finds right: every byte arrives, once and in its place. So it does while
//! what the card does for runs of datagrams comes and goes.
//!
//! ```text
//! tests/run bulk      # 10 GB each, in a release build
//! ```

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use warren::io::clock;

use crate::lab::agent::Mesh;
use crate::lab::traffic::{Echo, tcp_bulk};
use crate::lab::{Lab, Node, wait_for};

/// Of what a node receives for a tunnel, one in so many is lost: datagrams, or runs of them where the kernel joins.
const LOST: u32 = 100;
/// Of what a node sends into a tunnel, one in so many is late: it takes a slow lane that cuts joined datagrams apart.
const LATE: u32 = 50;
/// How often the card changes its mind, and how fast.
const TURNS: usize = 6;
const TURN: Duration = Duration::from_millis(150);
/// Much longer than it takes until a run is sent.
const SOON: Duration = Duration::from_secs(10);
/// The ports of both encapsulations, as nft has them.
const TUNNELS: &str = "udp dport { 8472, 51820-51829 }";

#[test]
fn wireguard() {
    through_trouble("wireguard", "1");
}

#[test]
fn wireguard_on_two_lanes() {
    through_trouble("wireguard", "2");
}

#[test]
fn vxlan() {
    through_trouble("vxlan", "1");
}

#[test]
fn vxlan_on_two_lanes() {
    through_trouble("vxlan", "2");
}

#[test]
fn wireguard_on_lanes_by_themselves() {
    through_trouble("wireguard", "auto");
}

#[test]
fn wireguard_while_the_card_changes_its_offloads() {
    while_offloads_change("wireguard");
}

#[test]
fn vxlan_while_the_card_changes_its_offloads() {
    while_offloads_change("vxlan");
}

#[test]
fn wireguard_while_the_path_takes_no_more_runs() {
    when_runs_are_refused("wireguard");
}

#[test]
fn vxlan_while_the_path_takes_no_more_runs() {
    when_runs_are_refused("vxlan");
}

/// What the card did for runs of datagrams it does no more, then again: in the middle of connections. Its kernel then
/// cuts them and computes their checksums itself, or before Linux 6.11 refuses what has no card for its checksums.
fn while_offloads_change(encap: &str) {
    let mesh = Mesh::start(Lab::two(), &["--encap", encap]);
    in_the_middle_of_transfers(&mesh, || {
        for turn in 0..TURNS {
            std::thread::sleep(TURN);
            let to = if turn % 2 == 0 { "off" } else { "on" };
            for node in &mesh.lab.nodes {
                // Some of them follow others, so that one alone may be refused.
                for offload in ["tx-udp-segmentation", "gso", "gro", "tx"] {
                    node.ns.attempt(&format!("ethtool -K eth0 {offload} {to}"));
                }
                let state = node.ns.run("ethtool -k eth0");
                assert!(state.contains(&format!("tx-udp-segmentation: {to}")), "{state}");
            }
        }
    });
}

/// In the middle of connections their datagrams no longer fit the card whole. It still takes them, in fragments, but
/// not as runs: the agents send them one by one from then on, say so, and stay with it for as long as they said.
fn when_runs_are_refused(encap: &str) {
    let mesh = Mesh::start(Lab::two(), &["--encap", encap]);
    let fallbacks = || mesh.agents.iter().map(|agent| agent.counted("offload-fallbacks")[0]);
    in_the_middle_of_transfers(&mesh, || {
        std::thread::sleep(TURN);
        assert_eq!(fallbacks().collect::<Vec<u64>>(), [0, 0], "{encap}: while runs fit");
        // What waits for the agents is as long as the card took: they follow its MTU within milliseconds.
        mesh.agents[0].frozen(|| {
            mesh.agents[1].frozen(|| {
                std::thread::sleep(TURN);
                mesh.lab.nodes.iter().for_each(|node| drop(node.ns.run("ip link set eth0 mtu 1400")));
            });
        });
        let both = || fallbacks().all(|count| count > 0).then_some(());
        wait_for("both agents have been refused a run", SOON, both);
        std::thread::sleep(TURN);
        mesh.lab.nodes.iter().for_each(|node| drop(node.ns.run("ip link set eth0 mtu 1500")));
        std::thread::sleep(TURN);
    });
    for agent in &mesh.agents {
        let said = "no UDP segmentation on this path: sending datagrams one by one";
        assert!(agent.log().contains(said), "{encap}: {}", agent.log());
        assert_eq!(agent.dropped("send-failed"), 0, "{encap}: datagrams of refused runs");
    }
}

/// While both nodes send to each other by TCP, over both families, as much as they can.
fn in_the_middle_of_transfers(mesh: &Mesh, change: impl FnOnce()) {
    let echo = Echo::start(mesh.pod(1));
    let going = AtomicBool::new(true);
    std::thread::scope(|scope| {
        for family in [0, 1] {
            let (from, to, going) = (mesh.pod(0), mesh.pod(1), &going);
            let target = SocketAddr::new(to.addresses[family], echo.port);
            scope.spawn(move || {
                // As long as it takes to see every change.
                let mut rounds = 0;
                while rounds == 0 || going.load(Ordering::Relaxed) {
                    tcp_bulk(from.ns, from.addresses[family], target, 4 << 20);
                    rounds += 1;
                }
            });
        }
        let _end = Ends(&going);
        change();
    });
}

/// Also when a change is refused: transfers that nobody ends would go on for ever.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn through_trouble(encap: &str, lanes: &str) {
    let megabytes: u64 = std::env::var("WARREN_BULK_MB").map_or(64, |text| text.parse().expect("a number"));
    let mesh = Mesh::start(Lab::two(), &["--encap", encap, "--lanes", lanes]);
    for node in &mesh.lab.nodes {
        lose(node);
        delay(node);
    }
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
    let lost: Vec<u64> = mesh.lab.nodes.iter().map(|node| counted(node, "losses")).collect();
    let late: Vec<u64> = mesh.lab.nodes.iter().map(|node| counted(node, "delays")).collect();
    println!(
        "{encap}, lanes {lanes}: {megabytes} MB in {:.1} s, lost {lost:?}, late {late:?}",
        clock::now().duration_since(began).as_secs_f64()
    );
    assert!(lost.iter().all(|lost| *lost > 0), "nothing was lost: this shows nothing");
    assert!(late.iter().all(|late| *late > 0), "nothing was late: this shows nothing");
}

fn lose(node: &Node) {
    node.ns.run_all(&format!(
        "nft add table inet losses
         nft add chain inet losses some {{ type filter hook prerouting priority -400 ; }}
         nft add rule inet losses some {TUNNELS} numgen random mod {LOST} < 1 counter drop"
    ));
}

/// A datagram at 400 Mbit/s is overtaken by those on the way beside it, and the next of the slow lane the more so.
fn delay(node: &Node) {
    node.ns.run_all(&format!(
        "tc qdisc add dev eth0 root handle 1: htb default 0
         tc class add dev eth0 parent 1: classid 1:1 htb rate 10gbit quantum 60000
         tc qdisc add dev eth0 parent 1:1 handle 11: tbf rate 400mbit burst 3000 latency 20ms
         nft add table inet delays
         nft add chain inet delays some {{ type filter hook postrouting priority 400 ; }}
         nft add rule inet delays some oifname eth0 {TUNNELS} numgen random mod {LATE} < 1 counter meta priority set 1:1"
    ));
}

/// What a table's only rule has counted.
fn counted(node: &Node, table: &str) -> u64 {
    let rules = node.ns.run(&format!("nft list table inet {table}"));
    let count = rules.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no counter in {rules}"))
}
