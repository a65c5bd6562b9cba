//! Somebody deletes what the agent made: it comes back within two seconds, and traffic with it.

use std::time::Duration;

use crate::lab::Node;
use crate::lab::agent::{Agent, Mesh};
use crate::lab::traffic::reach;
use crate::lab::{Lab, wait_for};

/// What the agent promises.
const SOON: Duration = Duration::from_secs(2);

/// Everything of the node's own network that the agent is responsible for, as a person would list it.
fn network(node: &Node) -> Vec<(&'static str, String)> {
    [
        "ip -br link show dev warren0",
        "ip -br addr show dev warren0",
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "nft --stateless list ruleset",
        "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.conf.warren0.rp_filter",
        "sysctl net.ipv4.conf.warren0.accept_local net.ipv4.conf.warren0.forwarding",
    ]
    .map(|line| {
        let text = String::from_utf8_lossy(&node.ns.attempt(line).stdout).into_owned();
        // A new device has a new MAC-less link-local address and index; lines come in any order.
        let mut lines: Vec<&str> = text.lines().filter(|l| !l.contains("fe80:")).map(str::trim).collect();
        lines.sort_unstable();
        (line, lines.join("\n"))
    })
    .into()
}

fn comes_back(encap: &str, damages: &[&str]) {
    let mesh = Mesh::start(Lab::two(), &["--encap", encap]);
    let node = &mesh.lab.nodes[0];
    let before = network(node);
    for damage in damages {
        node.ns.run(damage);
        let mut different = Vec::new();
        let repaired = wait_until(SOON, || {
            different = network(node).into_iter().zip(&before).filter(|(now, then)| now != *then).collect();
            different.is_empty()
        });
        assert!(
            repaired,
            "{encap}: after `{damage}`, not right within {SOON:?} (now, before): {different:#?}"
        );
        reach(mesh.pod(0), mesh.pod(1));
        reach(mesh.pod(1), mesh.pod(0));
    }
}

fn wait_until(within: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = warren::io::clock::now() + within;
    while warren::io::clock::now() < deadline {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    condition()
}

#[test]
fn routes_come_back() {
    comes_back(
        "wireguard",
        &[
            "ip -4 route flush dev warren0",
            "ip -6 route flush dev warren0 proto 87",
            "ip -4 route flush table 22354",
        ],
    );
}

#[test]
fn addresses_come_back() {
    comes_back("wireguard", &["ip -4 addr flush dev warren0", "ip -6 addr flush dev warren0 scope global"]);
}

#[test]
fn rules_come_back() {
    comes_back("wireguard", &["ip -4 rule del prio 4700", "ip -6 rule del prio 4700"]);
}

#[test]
fn nft_tables_come_back() {
    comes_back(
        "wireguard",
        &["nft delete table inet warren", "nft flush table inet warren", "nft flush ruleset"],
    );
}

#[test]
fn link_settings_come_back() {
    comes_back("wireguard", &["ip link set warren0 down", "ip link set warren0 mtu 1300"]);
}

#[test]
fn a_deleted_tun_comes_back() {
    comes_back("wireguard", &["ip link del warren0"]);
    comes_back("vxlan", &["ip link del warren0"]);
}

#[test]
fn sysctls_come_back() {
    comes_back(
        "wireguard",
        &[
            "sysctl -qw net.ipv4.ip_forward=0",
            "sysctl -qw net.ipv6.conf.all.forwarding=0",
            "sysctl -qw net.ipv4.conf.warren0.rp_filter=1",
        ],
    );
}

#[test]
fn a_connection_survives_a_deleted_tun() {
    let mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
    let echo = crate::lab::traffic::Echo::start(mesh.pod(1));
    let flow = crate::lab::traffic::Flow::start(mesh.pod(0), mesh.pod(1), 0, echo.port, 1 << 20);
    flow.assert_alive(Duration::from_secs(5));
    mesh.lab.nodes[0].ns.run("ip link del warren0");
    wait_for("warren0 is back", SOON, || {
        mesh.lab.nodes[0].ns.attempt("ip link show warren0").status.success().then_some(())
    });
    flow.assert_alive(Duration::from_secs(10));
    flow.finish();
}

#[test]
fn what_cleanup_leaves_is_what_was_there() {
    for end in ["stopped", "killed"] {
        let lab = Lab::two().with_pods();
        let node = &lab.nodes[0];
        // The device's own settings vanish with it; those of the whole node are asked for by `network`.
        let list = |node: &Node| {
            let links = node.ns.run("ip -o link show");
            (
                network(node),
                links.lines().filter_map(|l| l.split(": ").nth(1).map(str::to_owned)).collect::<Vec<_>>(),
            )
        };
        let before = list(node);
        let mut mesh = Mesh::start(lab, &["--encap", "wireguard"]);
        assert_ne!(list(&mesh.lab.nodes[0]), before, "the agent makes something");
        match end {
            "stopped" => drop(mesh.agents[0].stop()),
            _ => mesh.agents[0].kill(),
        }
        let mut cleanup = crate::lab::agent::command(&mesh.lab, &mesh.lab.nodes[0], &["--cleanup"]);
        let done = cleanup.output().expect("run the cleanup");
        let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{end}: {said}");
        assert_eq!(list(&mesh.lab.nodes[0]), before, "{end}: what is left: {said}");
        assert!(said.contains("warren0"), "{end}: it says what it removed: {said}");
        // Once more finds nothing, is no error, and makes no folders.
        let gone = mesh.lab.path().join("gone");
        let [run, state] = ["run", "state"].map(|folder| gone.join(folder).display().to_string());
        let mut cleanup = mesh.lab.nodes[0].ns.command(crate::lab::agent::warren());
        cleanup.args(["agent", "--cleanup", "--run-dir", &run, "--state-dir", &state]);
        assert!(cleanup.status().expect("run the cleanup again").success(), "{end}: a second cleanup");
        assert!(!gone.exists(), "{end}: a folder");
    }
}

#[test]
fn readiness_follows_the_device() {
    let lab = Lab::two();
    lab.write_nodes();
    let node = &lab.nodes[0];
    let _agent = Agent::start(&lab, node, &["--probe-bind-address", "127.0.0.1:10300"]);
    let answers = |code: &str, reason: &str| {
        wait_for(&format!("/readyz answers {code} {reason}"), Duration::from_secs(10), || {
            let answer = node.ns.attempt("curl -s -w %{http_code} http://127.0.0.1:10300/readyz").stdout;
            let answer = String::from_utf8_lossy(&answer).into_owned();
            (answer.ends_with(code) && answer.contains(reason)).then_some(())
        });
    };
    answers("200", "");
    // Not for so long that the agent gives up.
    node.ns.run_all("ip link set warren0 down\nip link set warren0 name elsewhere0");
    answers("503", "the interface warren0 is gone");
    node.ns.run_all("ip link set elsewhere0 name warren0\nip link set warren0 up");
    answers("200", "");
}

/// A renamed device keeps its queues, so nothing fails by itself: the agent must not go on without its name.
#[test]
fn an_agent_whose_tun_was_renamed_says_so_and_ends() {
    let mut mesh = Mesh::start(Lab::two(), &[]);
    reach(mesh.pod(0), mesh.pod(1));
    let node = &mesh.lab.nodes[0];
    node.ns.run_all("ip link set warren0 down\nip link set warren0 name stolen0");
    wait_for("the agent ends", Duration::from_secs(20), || (!mesh.agents[0].is_running()).then_some(()));
    let log = mesh.agents[0].log();
    assert!(log.contains("the interface warren0 is gone and did not come back"), "{log}");
    node.ns.run("ip link delete stolen0");
    mesh.agents[0].restart(&mesh.lab, &mesh.lab.nodes[0]);
    reach(mesh.pod(0), mesh.pod(1));
}
