//! Warren with Warren: every encapsulation, both underlay families, lanes, offloads on and off.

use crate::lab::agent::{Agent, Mesh};
use crate::lab::probe::{Meter, traceroute};
use crate::lab::{Lab, Underlay};

/// What an agent is started with to use no offload at all.
const PLAIN: [&str; 5] =
    ["--no-tun-gso", "--no-udp-gso", "--no-udp-gro", "--no-coalescing", "--no-ack-coalescing"];

#[test]
fn wireguard() {
    Mesh::start(Lab::two(), &["--encap", "wireguard"]).exchange(0, 1);
}

#[test]
fn vxlan() {
    Mesh::start(Lab::two(), &["--encap", "vxlan"]).exchange(0, 1);
}

#[test]
fn wireguard_over_ipv6() {
    Mesh::start(Lab::new(2, Underlay::V6, 1500), &["--encap", "wireguard"]).exchange(0, 1);
}

#[test]
fn vxlan_over_ipv6() {
    Mesh::start(Lab::new(2, Underlay::V6, 1500), &["--encap", "vxlan"]).exchange(0, 1);
}

#[test]
fn auto_speaks_vxlan_inside_a_location_and_wireguard_between() {
    let lab = Lab::new(3, Underlay::V4, 1500);
    let mesh = Mesh::start_each(lab, |number| {
        vec!["--encap", "auto", "--location", if number == 3 { "garage" } else { "attic" }]
    });
    for (other, spoken, silent) in [(1, 8472, 51820), (2, 51820, 8472)] {
        let meter = Meter::new(&mesh.lab.nodes[other].ns, &[8472, 51820, 51821]);
        mesh.exchange(0, other);
        assert!(meter.packets(spoken) > 100, "node1 speaks to node{} on port {spoken}", other + 1);
        assert_eq!(meter.packets(silent), 0, "nothing for port {silent} on node{}", other + 1);
    }
    mesh.exchange(1, 2);
}

#[test]
fn two_lanes_with_one() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = Mesh::start_each(Lab::two(), |number| {
            vec!["--encap", encap, "--lanes", if number == 1 { "2" } else { "1" }]
        });
        mesh.exchange(0, 1);
    }
}

#[test]
fn two_lanes_with_two() {
    for encap in ["wireguard", "vxlan"] {
        Mesh::start(Lab::two(), &["--encap", encap, "--lanes", "2"]).exchange(0, 1);
    }
}

#[test]
fn without_offloads() {
    for encap in ["wireguard", "vxlan"] {
        let arguments = [&["--encap", encap][..], &PLAIN].concat();
        Mesh::start(Lab::two(), &arguments).exchange(0, 1);
    }
}

#[test]
fn without_offloads_on_one_side() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = Mesh::start_each(Lab::two(), |number| match number {
            1 => [&["--encap", encap][..], &PLAIN].concat(),
            _ => vec!["--encap", encap],
        });
        mesh.exchange(0, 1);
    }
}

#[test]
fn each_offload_off_alone() {
    for flag in PLAIN {
        Mesh::start(Lab::two(), &["--encap", "wireguard", flag]).exchange(0, 1);
    }
}

#[test]
fn traceroute_shows_each_node_once() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = Mesh::start(Lab::two(), &["--encap", encap]);
        for family in [0, 1] {
            let hops = traceroute(mesh.pod(0), mesh.pod(1), family);
            let names: Vec<_> = hops
                .iter()
                .map(|hop| {
                    // A node speaks with its bridge's address or its own.
                    let node = mesh.lab.nodes.iter().find(|node| {
                        hop.is_some_and(|hop| [node.inner(0)[family], node.inner(1)[family]].contains(&hop))
                    });
                    match node {
                        Some(node) => format!("node{}", node.number),
                        None if *hop == Some(mesh.pod(1).addresses[family]) => "pod".to_owned(),
                        None => format!("{hop:?}"),
                    }
                })
                .collect();
            assert_eq!(names, ["node1", "node2", "pod"], "{encap}: {hops:?}");
        }
    }
}

#[test]
fn a_node_reaches_pods_of_another_and_the_node_itself() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = Mesh::start(Lab::two(), &["--encap", encap]);
        let [node1, node2] = [mesh.lab.nodes[0].host(0), mesh.lab.nodes[1].host(0)];
        for (from, to) in [(node1, mesh.pod(1)), (mesh.pod(0), node2), (node1, node2)] {
            crate::lab::traffic::reach(from, to);
            crate::lab::traffic::exchange(from, to);
        }
    }
}

/// Bridged packets pass by the node's IP tables or not, as its `br_netfilter` settings say: both work.
#[test]
fn with_and_without_br_netfilter() {
    for call in ["0", "1"] {
        let lab = Lab::two().with_pods();
        for node in &lab.nodes {
            for family in ["iptables", "ip6tables"] {
                // Without the module there is no such setting, and packets do not pass.
                node.ns.attempt(&format!("sysctl -qw net.bridge.bridge-nf-call-{family}={call}"));
            }
        }
        Mesh::start(lab, &["--encap", "wireguard"]).exchange(0, 1);
    }
}

#[test]
fn lanes_have_large_buffers_and_keep_to_a_processor_if_told() {
    let lab = Lab::two().with_pods();
    lab.write_nodes();
    let agent = Agent::start(&lab, &lab.nodes[0], &["--lanes", "2", "--pin-lanes"]);
    // The kernel counts double: 8 MiB to receive, 1 MiB to send.
    let sockets = lab.nodes[0].ns.run("ss -uanm sport = :51821");
    assert!(sockets.contains("rb16777216") && sockets.contains("tb2097152"), "{sockets}");
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let mut processors = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", agent.pid())).expect("the agent's threads") {
        let task = task.expect("a thread").path();
        let name = std::fs::read_to_string(task.join("comm")).expect("its name");
        let status = std::fs::read_to_string(task.join("status")).expect("its status");
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        if name.starts_with("lane-") {
            processors.push(list.expect("its processors").trim().to_owned());
        }
    }
    assert_eq!(processors.len(), 2, "{processors:?}");
    assert!(processors.iter().all(|list| list.parse::<usize>().is_ok()), "one each: {processors:?}");
    assert!(allowed == 1 || processors[0] != processors[1], "{processors:?}");
}
