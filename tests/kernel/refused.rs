//! Kernels that offer less: every offload that is refused, when an agent starts or when it makes use of it, is done
//! without, the status says so, and every byte arrives all the same.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::Value;

use crate::lab::agent::{Agent, Mesh};
use crate::lab::joined::{self, Pieces};
use crate::lab::refuse::{Refused, on_a_kernel_without};
use crate::lab::traffic::{Echo, pattern, reach, tcp_bulk, udp_socket};
use crate::lab::{Lab, Node, Station};

/// Bytes of a TCP connection, each way.
const BULK: u64 = 8 << 20;
/// Datagrams of one send, how large, and how many sends.
const SEGMENTS: usize = 16;
const PAYLOAD: usize = 1200;
const SENDS: usize = 100;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What goes through a node's hands in one piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Joined {
    tcp: bool,
    udp: bool,
    runs: bool,
}

const EVERYTHING: Joined = Joined { tcp: true, udp: true, runs: true };

/// What makes the others say something: where nothing is refused everything is joined.
#[test]
fn nothing() {
    carries(&[], &[], EVERYTHING);
}

#[test]
fn udp_super_packets_on_the_tun() {
    carries(&[Refused::TunUdp], &["tun-udp"], Joined { udp: false, ..EVERYTHING });
}

#[test]
fn all_super_packets_on_the_tun() {
    carries(&[Refused::Tun], &["tun-tcp", "tun-udp"], Joined { runs: true, ..Joined::default() });
}

#[test]
fn segmentation() {
    carries(&[Refused::Segmentation], &["udp-segmentation"], Joined { runs: false, ..EVERYTHING });
}

#[test]
fn receive_offload() {
    carries(&[Refused::ReceiveOffload], &["udp-receive"], EVERYTHING);
}

#[test]
fn everything() {
    let all = [Refused::Tun, Refused::Segmentation, Refused::ReceiveOffload, Refused::LargeBuffers];
    carries(&all, &["tun-tcp", "tun-udp", "udp-segmentation", "udp-receive"], Joined::default());
}

/// The kernel has taken the offloads, and refuses what is made by them: the lane learns it by its first joined packets,
/// in the middle of a transfer.
#[test]
fn joined_packets_on_the_tun() {
    for encap in ["wireguard", "vxlan"] {
        on_a_kernel_without(&[Refused::JoinedWrites], || {
            let mesh = Mesh::start(Lab::two(), &["--encap", encap]);
            mesh.lab.nodes.iter().for_each(joined::watch);
            for agent in &mesh.agents {
                assert_eq!(not_on(agent), [""; 0], "{encap}: before there was anything to join");
                assert_eq!(agent.counted("offload-fallbacks"), [0], "{encap}");
            }
            bulk(mesh.pod(0), mesh.pod(1));
            for (agent, node) in mesh.agents.iter().zip(&mesh.lab.nodes) {
                let fallen = ["tun-tcp fallen-back", "tun-udp fallen-back"];
                assert_eq!(not_on(agent), fallen, "{encap}, {}", node.name);
                assert_eq!(agent.counted("offload-fallbacks"), [2], "{encap}, {}", node.name);
                assert_eq!(agent.dropped("tun-write-failed"), 0, "{encap}, {}", node.name);
                let runs = Joined { runs: true, ..Joined::default() };
                assert_eq!(seen(node), runs, "{encap}, {}", node.name);
                let features = node.ns.run("ethtool -k warren0");
                for feature in ["tx-tcp-segmentation", "tx-udp-segmentation"] {
                    assert!(features.contains(&format!("{feature}: off")), "{encap}: {features}");
                }
            }
        });
    }
}

/// The agent takes what the system allows everybody, and says what to set.
#[test]
fn large_buffers() {
    on_a_kernel_without(&[Refused::LargeBuffers], || {
        let mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
        // src/io/udp.rs
        let (receive, send) = (limit("rmem_max").min(8 << 20), limit("wmem_max").min(1 << 20));
        let small = receive < 8 << 20 || send < 1 << 20;
        let warning = "smaller buffers than they need to be fast: give the agent the capability";
        for agent in &mesh.agents {
            let log = agent.log();
            let line = log.lines().find(|line| line.contains(warning)).unwrap_or_default();
            assert_eq!(!line.is_empty(), small, "limits {receive}, {send}: {log}");
            for part in ["net.core.rmem_max to 8388608", "net.core.wmem_max to 1048576"] {
                assert_eq!(line.contains(part), small, "{part}: {log}");
            }
            for part in [format!("receive={receive}"), format!("send={send}")] {
                assert_eq!(line.contains(&part), small, "{part}: {log}");
            }
        }
        bulk(mesh.pod(0), mesh.pod(1));
    });
}

/// Agents whose tunnels have IPv4 only still carry both families. What is refused is refused to them alone: they
/// live on a thread of their own until the test is over, or fails.
#[test]
fn ipv6_sockets() {
    for encap in ["wireguard", "vxlan"] {
        let lab = Lab::two().with_pods();
        lab.write_nodes();
        let (ready, started) = channel();
        let (over, wait) = channel::<()>();
        std::thread::scope(|scope| {
            let lab = &lab;
            scope.spawn(move || {
                on_a_kernel_without(&[Refused::Ipv6Sockets], move || {
                    let start = |node| Agent::start(lab, node, &["--encap", encap, "--lanes", "2"]);
                    let agents: Vec<Agent> = lab.nodes.iter().map(start).collect();
                    for (agent, node) in agents.iter().zip(&lab.nodes) {
                        node.set_pod_mtu(agent.pod_mtu());
                        let have =
                            ["4", "6"].map(|v| node.ns.run(&format!("ss -{v}Hulnp")).contains("\"warren\""));
                        assert_eq!(have, [true, false], "sockets for IPv4, and for IPv6");
                    }
                    ready.send(()).expect("somebody waits");
                    let _ = wait.recv();
                });
            });
            started.recv().expect("the agents are ready");
            let [a, b] = [lab.nodes[0].pod(), lab.nodes[1].pod()];
            reach(a, b);
            bulk(a, b);
            drop(over);
        });
    }
}

fn limit(name: &str) -> u64 {
    let file = format!("/proc/sys/net/core/{name}");
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{file}: {e}"));
    text.trim().parse().unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn carries(refused: &[Refused], off: &[&str], joined: Joined) {
    for encap in ["wireguard", "vxlan"] {
        on_a_kernel_without(refused, || {
            let mesh = Mesh::start(Lab::two(), &["--encap", encap, "--lanes", "2"]);
            mesh.lab.nodes.iter().for_each(joined::watch);
            bulk(mesh.pod(0), mesh.pod(1));
            for (agent, node) in mesh.agents.iter().zip(&mesh.lab.nodes) {
                let expected: Vec<String> = off.iter().map(|name| format!("{name} off")).collect();
                assert_eq!(not_on(agent), expected, "{encap} without {refused:?}, {}", node.name);
                assert_eq!(seen(node), joined, "{encap} without {refused:?}, {}", node.name);
                let features = node.ns.run("ethtool -k warren0");
                for (offload, feature) in
                    [("tun-tcp", "tx-tcp-segmentation"), ("tun-udp", "tx-udp-segmentation")]
                {
                    let state = if off.contains(&offload) { "off" } else { "on" };
                    assert!(features.contains(&format!("{feature}: {state}")), "{encap}: {features}");
                }
            }
        });
    }
}

/// The offloads that every lane says are not in use, and how it says so.
fn not_on(agent: &Agent) -> Vec<String> {
    let view = agent.status();
    let lanes = view["lanes"].as_array().expect("a list of lanes").iter();
    let off = lanes.map(|lane| {
        let offloads = lane["offloads"].as_array().expect("a list of offloads").iter();
        let word = |offload: &Value, key: &str| offload[key].as_str().expect("a word").to_owned();
        let states = offloads.map(|offload| [word(offload, "name"), word(offload, "state")]);
        states.filter(|[_, state]| state != "on").map(|words| words.join(" ")).collect()
    });
    let off: Vec<Vec<String>> = off.collect();
    assert!(off.windows(2).all(|pair| pair[0] == pair[1]), "the lanes do not agree: {off:?}");
    off.into_iter().next().expect("a lane")
}

fn seen(node: &Node) -> Joined {
    let seen = |pieces| joined::seen(node, pieces) > 0;
    Joined { tcp: seen(Pieces::Tcp), udp: seen(Pieces::Udp), runs: seen(Pieces::Runs) }
}

/// Much TCP and UDP, both families, there and back.
fn bulk(a: Station<'_>, b: Station<'_>) {
    let echo = Echo::start(b);
    for family in [0, 1] {
        let (source, target) = (a.addresses[family], SocketAddr::new(b.addresses[family], echo.port));
        tcp_bulk(a.ns, source, target, BULK);
        udp_bulk(a, family, target);
    }
}

/// Many datagrams in one send, echoed one by one: the same ones come back in the same order.
fn udp_bulk(from: Station<'_>, family: usize, target: SocketAddr) {
    let socket = udp_socket(from.ns, from.addresses[family], target);
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    let (size, together) = (PAYLOAD as u16, SEGMENTS * PAYLOAD);
    for send in 0..SENDS {
        let bytes = pattern((send * together) as u64, together);
        let cut = [ControlMessage::UdpGsoSegments(&size)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], &cut, MsgFlags::empty(), None)
            .unwrap_or_else(|e| panic!("UDP to {target}: {e}"));
        for (number, sent) in bytes.chunks(PAYLOAD).enumerate() {
            let mut answer = [0; PAYLOAD + 1];
            let length = socket.recv(&mut answer).unwrap_or_else(|e| {
                panic!("UDP to {target}: no answer to datagram {number} of send {send}: {e}")
            });
            assert!(answer[..length] == *sent, "UDP to {target}: wrong bytes in answer {number} of {send}");
        }
    }
}
