//! From kube-proxy to Warren on a node that is in use.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use warren::io::clock;

use super::hosts::nft;
use super::meetings::Talk;
use super::{NODE_PORT, SERVICES, SOON, asked, pods, refused, service, vips};
use crate::api::Api;
use crate::lab::agent::Mesh;
use crate::lab::netns::Netns;
use crate::lab::service::{Over, PORT, Service, TARGET, Who, ask, ask_udp, open, udp};
use crate::lab::{Lab, Node, Underlay, wait_for};
use crate::proxy::KubeProxy;

/// How soon the loop has taken over.
const AT_ONCE: Duration = Duration::from_secs(2);

/// What kube-proxy 1.36.3 wrote, of both families, on a node with address `NODE`, for the Services of
/// [`known_to_kube_proxy`]: in nftables mode, and in iptables mode, which kubeadm and k3s choose.
const NFTABLES: &str = include_str!("kube-proxy-1.36.3.nft");
const IPTABLES: &str = include_str!("kube-proxy-1.36.3.iptables");
/// Between the two families' rules.
const NEXT_FAMILY: &str = "# ip6tables\n";

/// How kube-proxy does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nftables,
    Iptables,
}

impl Mode {
    /// Puts its rules on every node.
    fn begin(self, lab: &Lab) {
        for node in &lab.nodes {
            let address = lab.outer(node).to_string();
            match self {
                Mode::Nftables => nft(&node.ns, &NFTABLES.replace("NODE", &address)),
                Mode::Iptables => {
                    let rules = IPTABLES.replace("NODE", &address);
                    let (four, six) = rules.split_once(NEXT_FAMILY).expect("rules of both families");
                    for (tool, rules) in [("iptables", four), ("ip6tables", six)] {
                        let file = lab.path().join(format!("{}.{tool}", node.name));
                        std::fs::write(&file, rules).expect("write the rules");
                        sh(&node.ns, &format!("{tool}-restore --noflush < {}", file.display()));
                    }
                }
            }
        }
    }

    /// Takes them away, as `kube-proxy --cleanup` does.
    fn end(self, node: &Node) {
        match self {
            Mode::Nftables => {
                node.ns.run_all("nft delete table ip kube-proxy\n nft delete table ip6 kube-proxy");
            }
            Mode::Iptables => {
                for tool in ["iptables", "ip6tables"] {
                    sh(&node.ns, &format!("{tool}-save | grep -v KUBE- | {tool}-restore"));
                }
            }
        }
    }

    /// Where Warren finds it.
    fn place(self) -> &'static str {
        match self {
            Mode::Nftables => "nft table ip kube-proxy",
            Mode::Iptables => "chain KUBE-SERVICES of nft table ip nat",
        }
    }
}

/// Without the matches that count in an object of kube-proxy's own, which would have to be there; and without dates.
fn without_counters(rules: &str) -> String {
    let kept = rules.lines().filter(|line| !line.starts_with("# ") || format!("{line}\n") == NEXT_FAMILY);
    let bare = kept.map(|line| match line.split_once(" -m nfacct --nfacct-name ") {
        Some((before, after)) => {
            format!("{before} {}\n", after.trim_start().split_once(' ').map_or("", |(_, rest)| rest))
        }
        None => format!("{line}\n"),
    });
    bare.collect()
}

fn sh(ns: &Netns, script: &str) -> String {
    let output = ns.command("sh").args(["-c", script]).output().expect("start sh");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "in {}: `{script}`: {said}", ns.name());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Two Services of one endpoint each.
fn known_to_kube_proxy(lab: &Lab) -> Vec<Value> {
    let mut objects = Vec::new();
    for node in &lab.nodes {
        let addresses = json!([{"type": "InternalIP", "address": lab.outer(node)}]);
        objects.push(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name}, "status": {"addresses": addresses},
        }));
    }
    for (name, number, node, host) in [("near", 1, &lab.nodes[0], 11), ("far", 2, &lab.nodes[1], 10)] {
        let port = |protocol: &str| {
            json!({
                "name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": TARGET,
                "nodePort": NODE_PORT + u16::from(number),
            })
        };
        let cluster_ips = vips(number);
        objects.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "type": "NodePort", "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips,
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack", "sessionAffinity": "None",
                "internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Cluster",
                "ports": [port("TCP"), port("UDP")],
            },
        }));
        for (family, address) in ["IPv4", "IPv6"].into_iter().zip(node.inner(host)) {
            let ports = ["TCP", "UDP"].map(
                |protocol| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": TARGET}),
            );
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {
                    "name": format!("{name}-{}", family.to_lowercase()), "namespace": "default",
                    "labels": {"kubernetes.io/service-name": name},
                },
                "ports": ports,
                "endpoints": [{
                    "addresses": [address], "nodeName": node.name,
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                }],
            }));
        }
    }
    objects
}

#[test]
#[ignore = "no test: writes kube-proxy-1.36.3.nft and .iptables anew; needs `tests/peers.sh kube-proxy`"]
fn kube_proxy_writes_its_rules() {
    const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernel/services/kube-proxy-1.36.3");
    for mode in [Mode::Nftables, Mode::Iptables] {
        let lab = Lab::new(2, Underlay::V4, 1500);
        let node = &lab.nodes[0];
        let _api = Api::start(&node.ns, known_to_kube_proxy(&lab));
        let (more, list, led): (&[&str], _, fn(&IpAddr) -> String) = match mode {
            Mode::Nftables => (
                &[],
                "nft -s list table ip kube-proxy && nft -s list table ip6 kube-proxy".to_owned(),
                |endpoint| format!("map {{ 0 : {endpoint} . {TARGET} }}"),
            ),
            Mode::Iptables => (
                &["--proxy-mode=iptables"],
                format!("iptables-save && printf '{}' && ip6tables-save", NEXT_FAMILY.replace('\n', "\\n")),
                |endpoint| format!("--to-destination {}", SocketAddr::new(*endpoint, TARGET)),
            ),
        };
        let mut proxy = KubeProxy::start_with(&node.ns, &node.name, lab.path().join("kube-proxy.log"), more);
        let endpoints = [node.inner(11), lab.nodes[1].inner(10)].concat();
        let written = wait_for("kube-proxy's rules", Duration::from_secs(30), || {
            proxy.assert_running();
            let output = node.ns.command("sh").args(["-c", &list]).output().expect("start sh");
            let rules = String::from_utf8_lossy(&output.stdout).into_owned();
            endpoints.iter().all(|endpoint| rules.contains(&led(endpoint))).then_some(rules)
        });
        let (file, written) = match mode {
            Mode::Nftables => (format!("{FILES}.nft"), written),
            Mode::Iptables => (format!("{FILES}.iptables"), without_counters(&written)),
        };
        std::fs::write(file, written.replace(&lab.outer(node).to_string(), "NODE")).expect("write it down");
    }
}

#[test]
fn kube_proxy_hands_over() {
    for (encap, mode) in [
        ("wireguard", Mode::Nftables),
        ("vxlan", Mode::Nftables),
        ("wireguard", Mode::Iptables),
        ("vxlan", Mode::Iptables),
    ] {
        let mut lab = Lab::new(2, Underlay::V4, 1500);
        for node in &mut lab.nodes {
            node.add_pod(1500);
            node.add_pod(1500);
        }
        mode.begin(&lab);
        let mesh = Mesh::start(lab, &["--encap", encap, "--services", "auto", "--service-cidr", SERVICES]);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let _servers = [
            Who::start("near", &node1.pods[1], &node1.inner(11)),
            Who::start("far", &node2.pods[0], &node2.inner(10)),
        ];
        for (name, number, which) in [("near", 1, (1, 11)), ("far", 2, (2, 10))] {
            let node_port = NODE_PORT + u16::from(number);
            Service { node_port, ..service(name, number, pods(&mesh, &[which])) }.write(&mesh.lab);
        }
        // kube-proxy has not heard of this one: who can speak to it speaks through the loop.
        service("new", 3, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        for agent in &mesh.agents {
            let log = agent.log();
            assert!(log.contains(&format!("kube-proxy has its rules here ({})", mode.place())), "{log}");
        }
        let at = |number: u8, family: usize| SocketAddr::new(vips(number)[family], PORT);
        let here = |number| SocketAddr::new(mesh.lab.outer(node1), NODE_PORT + number);
        for family in [0, 1] {
            assert!(ask(&node1.pods[0], None, at(3, family), Over::Tcp, 10).is_err(), "nobody serves it yet");
        }
        let mut clients = vec![
            ("outside to a pod of the node", &mesh.lab.switch, here(1), "near"),
            ("outside to a pod elsewhere", &mesh.lab.switch, here(2), "far"),
            // These nodes have no IPv6 way to anywhere, and without one the kernel does not come to DNAT.
            ("the host to a pod elsewhere", &node1.ns, at(2, 0), "far"),
            ("the host to a pod of its own", &node1.ns, at(1, 0), "near"),
        ];
        for family in [0, 1] {
            clients.extend([
                ("a pod to a pod elsewhere", &node1.pods[0], at(2, family), "far"),
                ("a pod to a pod of its node", &node1.pods[0], at(1, family), "near"),
            ]);
        }
        let mut talks: Vec<(String, Talk)> = Vec::new();
        for (what, client, target, server) in clients {
            let what = format!("{what}, {target}, {encap}, {mode:?}");
            asked(client, None, target, Over::Tcp);
            let stream = open(client, None, target).unwrap_or_else(|e| panic!("{what}: {e}"));
            talks.push((what.clone(), Talk::begin(&what, server, stream)));
        }
        let socket = udp(&node1.pods[0], None, at(2, 0)).expect("a socket");
        assert_eq!(ask_udp(&socket, 10).expect("an answer").server, "far");
        assert!(talks[1].1.seen.ip() != mesh.lab.outside(), "kube-proxy hides who is outside");

        for node in [node1, node2] {
            mode.end(node);
        }
        let gone = clock::now();
        for family in [0, 1] {
            wait_for("the loop has the Services", AT_ONCE, || {
                ask(&node1.pods[0], None, at(3, family), Over::Tcp, 10).ok()
            });
        }
        eprintln!("{encap}, {mode:?}: in the loop after {:?}", clock::now().duration_since(gone));
        for (what, talk) in &mut talks {
            for round in 0..3 {
                talk.say(what, &format!("{what}, round {round}"));
            }
        }
        // Who is outside is known by his address from now on, and closed ports of ClusterIPs say so.
        for number in [1, 2] {
            wait_for("the client's own address", AT_ONCE, || {
                let answer = ask(&mesh.lab.switch, None, here(number), Over::Tcp, 10).ok()?;
                (answer.client.ip() == mesh.lab.outside()).then_some(())
            });
        }
        assert!(refused(&node1.pods[0], SocketAddr::new(vips(1)[0], PORT + 1), Over::Tcp));
        let log = mesh.agents[0].log();
        assert!(log.contains("kube-proxy's rules are gone: Services are Warren's now"), "{log}");
        // And what began under kube-proxy still goes on.
        for (what, talk) in &mut talks {
            talk.say(what, "and on");
        }
        assert_eq!(ask_udp(&socket, 10).expect("an answer").server, "far");

        // And back.
        let stream = open(&mesh.lab.switch, None, here(2)).expect("a connection");
        talks.push(("from outside, through the loop".to_owned(), Talk::begin("the loop's", "far", stream)));
        mode.begin(&mesh.lab);
        for agent in &mesh.agents {
            let yielded = || agent.log().matches("kube-proxy has its rules here").count() == 2;
            wait_for("Services are kube-proxy's again", SOON, || yielded().then_some(()));
        }
        asked(&node1.pods[0], None, at(2, 0), Over::Tcp);
        for (what, talk) in &mut talks {
            talk.say(what, "and back");
        }
    }
}

#[test]
fn datagrams_that_kube_proxy_led_move_on_when_their_endpoint_goes() {
    let mut lab = Lab::new(2, Underlay::V4, 1500);
    for node in &mut lab.nodes {
        node.add_pod(1500);
        node.add_pod(1500);
    }
    Mode::Nftables.begin(&lab);
    let mesh = Mesh::start(lab, &["--services", "auto", "--service-cidr", SERVICES]);
    let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    let _servers = [
        Who::start("near", &node1.pods[1], &node1.inner(11)),
        Who::start("far", &node2.pods[0], &node2.inner(10)),
        Who::start("heir", &node2.pods[1], &node2.inner(11)),
    ];
    let write = |name: &'static str, number: u8, which: (u8, u8)| {
        let node_port = NODE_PORT + u16::from(number);
        Service { node_port, ..service(name, number, pods(&mesh, &[which])) }.write(&mesh.lab);
    };
    // kube-proxy has not heard yet that `near` has gone elsewhere.
    write("near", 1, (2, 11));
    write("far", 2, (2, 10));
    service("new", 3, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
    let at = |number: u8, family: usize| SocketAddr::new(vips(number)[family], PORT);
    let here = |number| SocketAddr::new(mesh.lab.outer(node1), NODE_PORT + number);
    let mut talks = Vec::new();
    for (client, number, target) in [
        (&node1.pods[0], 1, at(1, 0)),
        (&node1.pods[0], 1, at(1, 1)),
        (&mesh.lab.switch, 1, here(1)),
        (&node1.pods[0], 2, at(2, 0)),
        (&node1.pods[0], 2, at(2, 1)),
        (&node1.ns, 2, at(2, 0)),
        (&mesh.lab.switch, 2, here(2)),
    ] {
        asked(client, None, target, Over::Udp);
        let socket = udp(client, None, target).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        let server = ["near", "far"][usize::from(number) - 1];
        assert_eq!(ask_udp(&socket, 10).expect("an answer").server, server, "{target}");
        talks.push((format!("{} to {target}", client.name()), number, socket));
    }
    for node in [node1, node2] {
        Mode::Nftables.end(node);
    }
    for family in [0, 1] {
        wait_for("the loop has the Services", AT_ONCE, || {
            ask(&node1.pods[0], None, at(3, family), Over::Tcp, 10).ok()
        });
    }
    // None of them ever pauses for as long as the kernel would need to forget it.
    let moved = |number: u8| {
        for (what, _, socket) in talks.iter().filter(|(_, of, _)| *of == number) {
            wait_for(&format!("{what} moves on"), SOON, || {
                ask_udp(socket, 10).ok().filter(|answer| answer.server == "heir")
            });
        }
    };
    moved(1);
    for (what, _, socket) in talks.iter().filter(|(_, of, _)| *of == 2) {
        let answer = ask_udp(socket, 10).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(answer.server, "far", "{what}: its endpoint is still there");
        assert_ne!(answer.client.ip(), mesh.lab.outside(), "{what}: the kernel goes on with it");
    }
    write("far", 2, (2, 11));
    moved(2);
    // And now they are the loop's: they move on with the next packet.
    write("far", 2, (2, 10));
    for (what, _, socket) in talks.iter().filter(|(_, of, _)| *of == 2) {
        wait_for(&format!("{what} moves back"), SOON, || {
            ask_udp(socket, 10).ok().filter(|answer| answer.server == "far")
        });
    }
}
