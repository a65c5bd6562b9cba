//! When the agent cannot work it ends at once and says what to do.

use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::lab::agent::{self, Mesh, warren};
use crate::lab::{Lab, wait_for};

/// A refusal needs no longer.
const AT_ONCE: Duration = Duration::from_secs(10);

/// Runs a command that must fail; what it said must contain each of the words.
fn refuses(mut command: Command, words: &[&str]) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start the command");
    let status =
        wait_for(&format!("{words:?} is refused"), AT_ONCE, || child.try_wait().expect("look at it"));
    let output = child.wait_with_output().expect("read what it said");
    let said =
        (String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr)).to_lowercase();
    assert!(!status.success(), "it is refused: {said}");
    assert!(!said.contains("panicked"), "a refusal is no accident: {said}");
    for word in words {
        assert!(said.contains(&word.to_lowercase()), "the refusal names {word:?}: {said}");
    }
}

fn lab() -> Lab {
    let lab = Lab::two();
    lab.write_nodes();
    lab
}

#[test]
fn without_permission() {
    let lab = lab();
    let command = agent::command(&lab, &lab.nodes[0], &[]);
    // The same command line, but with every capability taken away first.
    let mut words: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
    let program = words.iter().position(|w| *w == *warren()).expect("the agent is in the command line");
    let drop = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--ambient-caps", "-all"];
    words.splice(program..program, drop.map(Into::into));
    let mut without = Command::new(command.get_program());
    without.args(words);
    refuses(without, &["CAP_NET_ADMIN"]);
}

#[test]
fn without_the_tun_device() {
    let lab = lab();
    let node = &lab.nodes[0];
    node.ns.run("mount -t tmpfs tmpfs /dev/net");
    refuses(agent::command(&lab, node, &[]), &["/dev/net/tun", "modprobe tun"]);
}

#[test]
fn when_the_port_is_taken() {
    for (encap, port) in [("wireguard", 51820), ("vxlan", 8472)] {
        let lab = lab();
        let node = &lab.nodes[0];
        let _taken = node.ns.enter(|| UdpSocket::bind(("::", port)).expect("take the port"));
        refuses(agent::command(&lab, node, &["--encap", encap]), &[&port.to_string(), "taken"]);
    }
}

#[test]
fn when_another_agent_runs() {
    let mut mesh = Mesh::start(Lab::two(), &[]);
    refuses(agent::command(&mesh.lab, &mesh.lab.nodes[0], &[]), &["another agent"]);
    // Also when only the kernel tells: other folders, other ports, another device.
    let other = mesh.lab.path().join("elsewhere");
    let [run, state] = ["run", "state"].map(|f| other.join(f).display().to_string());
    let elsewhere = ["--run-dir", &run, "--state-dir", &state, "--port", "51900", "--vxlan-port", "8500"];
    let source = format!("dir:{}", mesh.lab.cluster().display());
    for more in [&[][..], &["--tun-name", "warren1"], &["--tun-name", "warren1", "--cleanup"]] {
        let mut command = mesh.lab.nodes[0].ns.command(warren());
        command.args(["agent", "--source", &source, "--node", "node1"]).args(elsewhere).args(more);
        refuses(command, &["warren0", "another agent", "network namespace"]);
    }
    assert!(mesh.agents[0].is_running(), "the first one is not disturbed");
    mesh.exchange(0, 1);
}

#[test]
fn when_the_node_does_not_exist() {
    let lab = lab();
    let mut command = lab.nodes[0].ns.command(warren());
    let source = format!("dir:{}", lab.cluster().display());
    let [run, state] = ["run", "state"].map(|f| lab.path().join(f).display().to_string());
    command.args(["agent", "--node", "node9", "--source", &source, "--run-dir", &run, "--state-dir", &state]);
    refuses(command, &["node9", "--node"]);
    assert!(!lab.cluster().join("node9.warren.yaml").exists(), "nobody is announced who is not there");
}

#[test]
fn when_the_node_has_no_pod_range() {
    let lab = lab();
    lab.write_object("node1.yaml", "apiVersion: v1\nkind: Node\nmetadata:\n  name: node1\n");
    refuses(agent::command(&lab, &lab.nodes[0], &[]), &["node1", "podCIDR"]);
}

#[test]
fn when_a_flag_is_mistyped() {
    let lab = lab();
    refuses(agent::command(&lab, &lab.nodes[0], &["--encap", "wiregard"]), &["wireguard"]);
    refuses(agent::command(&lab, &lab.nodes[0], &["--emcap", "wireguard"]), &["--encap"]);
}
