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
use crate::lab::service::{Over, PORT, Service, TARGET, Who, ask, ask_udp, open, udp};
use crate::lab::{Lab, Underlay, wait_for};
use crate::proxy::KubeProxy;

/// How soon the loop has taken over.
const AT_ONCE: Duration = Duration::from_secs(2);

/// What kube-proxy 1.36.3 wrote in nftables mode, of both families, on a node with address `NODE`, for the Services of
/// [`known_to_kube_proxy`].
const RULES: &str = include_str!("kube-proxy-1.36.3.nft");

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

/// On every node.
fn kube_proxies(lab: &Lab) {
    for node in &lab.nodes {
        nft(&node.ns, &RULES.replace("NODE", &lab.outer(node).to_string()));
    }
}

#[test]
#[ignore = "no test: writes kube-proxy-1.36.3.nft anew; needs `tests/peers.sh kube-proxy`"]
fn kube_proxy_writes_its_rules() {
    let lab = Lab::new(2, Underlay::V4, 1500);
    let node = &lab.nodes[0];
    let _api = Api::start(&node.ns, known_to_kube_proxy(&lab));
    let mut proxy = KubeProxy::start(&node.ns, &node.name, lab.path().join("kube-proxy.log"));
    let list = || ["ip", "ip6"].map(|family| node.ns.run(&format!("nft -s list table {family} kube-proxy")));
    let endpoints = [node.inner(11), lab.nodes[1].inner(10)].concat();
    let written = wait_for("kube-proxy's rules", Duration::from_secs(30), || {
        proxy.assert_running();
        let tables = node.ns.run("nft list tables");
        let rules = (tables.matches("kube-proxy").count() == 2).then(list)?.concat();
        let led = |endpoint: &IpAddr| rules.contains(&format!("map {{ 0 : {endpoint} . {TARGET} }}"));
        endpoints.iter().all(led).then_some(rules)
    });
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernel/services/kube-proxy-1.36.3.nft");
    std::fs::write(file, written.replace(&lab.outer(node).to_string(), "NODE")).expect("write it down");
}

#[test]
fn kube_proxy_hands_over() {
    for encap in ["wireguard", "vxlan"] {
        let mut lab = Lab::new(2, Underlay::V4, 1500);
        for node in &mut lab.nodes {
            node.add_pod(1500);
            node.add_pod(1500);
        }
        kube_proxies(&lab);
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
            assert!(log.contains("kube-proxy has its rules here (nft table ip kube-proxy)"), "{log}");
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
            let what = format!("{what}, {target}, {encap}");
            asked(client, None, target, Over::Tcp);
            let stream = open(client, None, target).unwrap_or_else(|e| panic!("{what}: {e}"));
            talks.push((what.clone(), Talk::begin(&what, server, stream)));
        }
        let socket = udp(&node1.pods[0], None, at(2, 0)).expect("a socket");
        assert_eq!(ask_udp(&socket, 10).expect("an answer").server, "far");
        assert!(talks[1].1.seen.ip() != mesh.lab.outside(), "kube-proxy hides who is outside");

        for node in [node1, node2] {
            node.ns.run_all("nft delete table ip kube-proxy\n nft delete table ip6 kube-proxy");
        }
        let gone = clock::now();
        for family in [0, 1] {
            wait_for("the loop has the Services", AT_ONCE, || {
                ask(&node1.pods[0], None, at(3, family), Over::Tcp, 10).ok()
            });
        }
        eprintln!("{encap}: in the loop after {:?}", clock::now().duration_since(gone));
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
        kube_proxies(&mesh.lab);
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
    kube_proxies(&lab);
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
        node.ns.run_all("nft delete table ip kube-proxy\n nft delete table ip6 kube-proxy");
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
