//! Every kind of client to every kind of endpoint, over TCP and UDP, IPv4 and IPv6, with what the server saw.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use warren::snapshot::service::loop_address;

use super::{NODE_PORT, SOON, asked, pods, refused, service, services, vips};
use crate::lab::agent::Mesh;
use crate::lab::service::{BOTH, Over, PORT, Service, TARGET, Who, ask, ask_again, ask_udp, open, udp};
use crate::lab::traffic::{Echo, tcp_bulk};
use crate::lab::{Node, Underlay, wait_for};

#[test]
fn cluster_ips_with_wireguard() {
    cluster_ips("wireguard", Underlay::V4);
}

#[test]
fn cluster_ips_with_vxlan() {
    cluster_ips("vxlan", Underlay::V4);
}

#[test]
fn cluster_ips_with_vxlan_over_ipv6() {
    cluster_ips("vxlan", Underlay::V6);
}

/// From pods and from the host, to an endpoint elsewhere, on the same node, and to itself.
fn cluster_ips(encap: &str, underlay: Underlay) {
    let mesh = services(2, encap, underlay);
    let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    let _servers = [
        Who::start("near", &node1.pods[1], &node1.inner(11)),
        Who::start("far", &node2.pods[0], &node2.inner(10)),
    ];
    service("near", 1, pods(&mesh, &[(1, 11)])).write(&mesh.lab);
    service("far", 2, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
    let (pod, same) = (&node1.pods[0], &node1.pods[1]);
    for family in [0, 1] {
        let near = SocketAddr::new(vips(1)[family], PORT);
        let far = SocketAddr::new(vips(2)[family], PORT);
        let of_loop = loop_address(near.ip());
        for over in BOTH {
            for (client, target, server, saw, what) in [
                (pod, far, "far", node1.inner(10)[family], "pod to a pod elsewhere"),
                (pod, near, "near", node1.inner(10)[family], "pod to a pod of its node"),
                (same, near, "near", of_loop, "pod to itself"),
                (&node1.ns, far, "far", node1.inner(0)[family], "host to a pod elsewhere"),
                (&node1.ns, near, "near", of_loop, "host to a pod of its node"),
            ] {
                let answer = asked(client, None, target, over);
                assert_eq!((answer.server.as_str(), answer.client.ip()), (server, saw), "{what}, {over:?}");
            }
            // Fragments, both ways; TCP of some length.
            for (client, target) in [(pod, far), (pod, near), (&node1.ns, far), (same, near)] {
                let answer = ask(client, None, target, over, 30_000);
                assert!(answer.is_ok(), "30,000 bytes from {} to {target}: {answer:?}", client.name());
            }
        }
    }
}

#[test]
fn a_lot_of_bytes_through_a_service() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let _echo = Echo::start(node2.pod());
        let mut bulk = service("bulk", 3, pods(&mesh, &[(2, 10)]));
        bulk.spec = "  sessionAffinity: None\n".to_owned();
        bulk.write_for_port(&mesh.lab, 7);
        for family in [0, 1] {
            let target = SocketAddr::new(vips(3)[family], PORT);
            wait_for("the Service is there", SOON, || open(&node1.pods[0], None, target).ok());
            tcp_bulk(&node1.pods[0], node1.inner(10)[family], target, 32 << 20);
        }
        let mut near = service("near", 4, pods(&mesh, &[(1, 11)]));
        near.spec = "  sessionAffinity: None\n".to_owned();
        let _echo = Echo::start(crate::lab::Station { ns: &node1.pods[1], addresses: node1.inner(11) });
        near.write_for_port(&mesh.lab, 7);
        for family in [0, 1] {
            let target = SocketAddr::new(vips(4)[family], PORT);
            wait_for("the Service is there", SOON, || open(&node1.pods[0], None, target).ok());
            tcp_bulk(&node1.pods[0], node1.inner(10)[family], target, 32 << 20);
        }
    }
}

#[test]
fn node_ports_over_ipv4() {
    for encap in ["wireguard", "vxlan"] {
        node_ports(encap, Underlay::V4);
    }
}

#[test]
fn node_ports_over_ipv6() {
    for encap in ["wireguard", "vxlan"] {
        node_ports(encap, Underlay::V6);
    }
}

/// From outside, from another node, from the node itself and from pods; the client's own address arrives
/// wherever it can.
fn node_ports(encap: &str, underlay: Underlay) {
    let mesh = services(3, encap, underlay);
    let family = if underlay == Underlay::V4 { 0 } else { 1 };
    let [node1, node2, node3] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1], &mesh.lab.nodes[2]];
    let (outside, strangers) = (&mesh.lab.switch, mesh.lab.outside());
    let _servers = [
        Who::start("near", &node1.pods[1], &node1.inner(11)),
        Who::start("far", &node2.pods[0], &node2.inner(10)),
    ];
    let near = Service { node_port: NODE_PORT, ..service("near", 1, pods(&mesh, &[(1, 11)])) };
    let far = Service { node_port: NODE_PORT + 1, ..service("far", 2, pods(&mesh, &[(2, 10)])) };
    near.write(&mesh.lab);
    far.write(&mesh.lab);
    let here = mesh.lab.outer(node1);
    let at = |port| SocketAddr::new(here, port);
    let of_loop = loop_address(here);
    for over in BOTH {
        for (client, port, server, saw, what) in [
            (outside, NODE_PORT, "near", Some(strangers), "outside to a pod of the node"),
            (outside, NODE_PORT + 1, "far", Some(strangers), "outside to a pod of another node"),
            (&node3.ns, NODE_PORT, "near", Some(mesh.lab.outer(node3)), "another node to a pod of this one"),
            (&node3.ns, NODE_PORT + 1, "far", Some(node1.inner(0)[family]), "another node to a third"),
            (&node1.ns, NODE_PORT, "near", Some(of_loop), "the node to a pod of its own"),
            (&node1.ns, NODE_PORT + 1, "far", Some(here), "the node to a pod elsewhere"),
            (&node1.pods[0], NODE_PORT, "near", Some(node1.inner(10)[family]), "a pod, on its own node"),
            (&node1.pods[0], NODE_PORT + 1, "far", Some(node1.inner(10)[family]), "a pod, elsewhere"),
            (&node3.pods[0], NODE_PORT, "near", None, "another node's pod"),
            (&node3.pods[0], NODE_PORT + 1, "far", None, "another node's pod to a third"),
        ] {
            let answer = asked(client, None, at(port), over);
            assert_eq!(answer.server, server, "{what}, {over:?}");
            if let Some(saw) = saw {
                assert_eq!(answer.client.ip(), saw, "{what}, {over:?}");
            }
        }
        // The node's address inside the mesh has them too, for everybody there.
        for v in [0, 1] {
            let at = |port| SocketAddr::new(node1.inner(0)[v], port);
            let own = |node: &Node, host| node.inner(host)[v];
            for (client, port, server, saw) in [
                (&node3.pods[0], NODE_PORT, "near", own(node3, 10)),
                (&node3.pods[0], NODE_PORT + 1, "far", own(node1, 0)),
                (&node2.pods[0], NODE_PORT + 1, "far", own(node1, 0)),
                (&node3.ns, NODE_PORT, "near", own(node3, 0)),
                (&node1.pods[0], NODE_PORT, "near", own(node1, 10)),
                (&node1.pods[0], NODE_PORT + 1, "far", own(node1, 10)),
            ] {
                let answer = asked(client, None, at(port), over);
                let what = format!("{} to {}, {over:?}", client.name(), at(port));
                assert_eq!((answer.server.as_str(), answer.client.ip()), (server, saw), "{what}");
            }
        }
        // The pods' own way to the node's other addresses is not disturbed, and no other port is taken.
        assert!(refused(outside, at(NODE_PORT + 2), over), "{over:?}");
    }
}

#[test]
fn a_client_from_outside_may_come_by_another_node_when_it_is_done_with_the_first() {
    for encap in ["wireguard", "vxlan"] {
        a_client_from_outside_may_come_by_another_node_when_it_is_done_with_the_first_over(encap);
    }
}

fn a_client_from_outside_may_come_by_another_node_when_it_is_done_with_the_first_over(encap: &str) {
    let mesh = services(3, encap, Underlay::V4);
    let [node1, node2, node3] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1], &mesh.lab.nodes[2]];
    let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
    Service { node_port: NODE_PORT, ..service("far", 1, pods(&mesh, &[(2, 10)])) }.write(&mesh.lab);
    asked(&mesh.lab.switch, None, SocketAddr::new(mesh.lab.outer(node3), NODE_PORT), Over::Tcp);
    asked(&mesh.lab.switch, None, SocketAddr::new(mesh.lab.outer(node1), NODE_PORT), Over::Tcp);
    // The kernel, too, uses a port again that it has used towards another address.
    let stranger = SocketAddr::from(([10, 99, 0, 254], 40_000));
    for node in [node1, node3, node1] {
        let target = SocketAddr::new(mesh.lab.outer(node), NODE_PORT);
        let mut stream = mesh.lab.switch.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("a port may be used again");
            socket.bind(&stranger.into()).expect("the port");
            let outcome = socket.connect_timeout(&target.into(), SOON);
            outcome.unwrap_or_else(|e| panic!("by {}: {e}", node.name));
            std::net::TcpStream::from(socket)
        });
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        let answer = ask_again(&mut stream, 10).expect("an answer");
        assert_eq!(answer.client, stranger, "by {}", node.name);
        drop(stream);
        wait_for("the server is done with it too", SOON, || {
            node2.pods[0].run("ss -Htn dst 10.99.0.254").trim().is_empty().then_some(())
        });
    }
}

#[test]
fn without_endpoints_everybody_hears_it_at_once() {
    for encap in ["wireguard", "vxlan"] {
        without_endpoints_everybody_hears_it_at_once_over(encap);
    }
}

fn without_endpoints_everybody_hears_it_at_once_over(encap: &str) {
    let mesh = services(2, encap, Underlay::V4);
    let node1 = &mesh.lab.nodes[0];
    let empty = Service { node_port: NODE_PORT, ..service("empty", 1, Vec::new()) };
    empty.write(&mesh.lab);
    let nodes = SocketAddr::new(mesh.lab.outer(node1), NODE_PORT);
    for over in BOTH {
        for family in [0, 1] {
            let target = SocketAddr::new(vips(1)[family], PORT);
            let closed = SocketAddr::new(vips(1)[family], PORT + 1);
            for client in [&node1.pods[0], &node1.ns] {
                let what = format!("{over:?} from {}", client.name());
                wait_for(&what, SOON, || refused(client, target, over).then_some(()));
                // Answers are rate-limited, and the tries before have used them up.
                wait_for("another port", SOON, || refused(client, closed, over).then_some(()));
            }
        }
        for client in [&mesh.lab.switch, &node1.ns, &node1.pods[0]] {
            wait_for("the node port refuses", SOON, || refused(client, nodes, over).then_some(()));
        }
    }
}

#[test]
fn endpoints_that_are_nodes_and_endpoints_outside() {
    for (encap, underlay) in [
        ("wireguard", Underlay::V4),
        ("vxlan", Underlay::V4),
        ("wireguard", Underlay::V6),
        ("vxlan", Underlay::V6),
    ] {
        let mesh = services(2, encap, underlay);
        let family = usize::from(underlay == Underlay::V6);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let (this, other) = (mesh.lab.outer(node1), mesh.lab.outer(node2));
        let world = mesh.lab.outside();
        let _servers = [
            Who::start("this node", &node1.ns, &[this]),
            Who::start("other node", &node2.ns, &[other]),
            Who::start("world", &mesh.lab.switch, &[world]),
        ];
        for (name, number, address) in [("this", 1, this), ("other", 2, other), ("world", 3, world)] {
            let one =
                Service { cluster_ips: vec![vips(number)[family]], ..service(name, number, Vec::new()) };
            Service { endpoints: vec![(address, String::new(), true)], ..one }.write(&mesh.lab);
        }
        for over in BOTH {
            for (client, number, server, saw) in [
                (&node1.pods[0], 1, "this node", Some(node1.inner(10)[family])),
                (&node1.pods[0], 2, "other node", Some(node1.inner(10)[family])),
                // The kernel masquerades it.
                (&node1.pods[0], 3, "world", Some(this)),
                (&node1.ns, 1, "this node", Some(loop_address(this))),
                (&node1.ns, 2, "other node", Some(node1.inner(0)[family])),
                (&node1.ns, 3, "world", Some(this)),
            ] {
                let answer = asked(client, None, SocketAddr::new(vips(number)[family], PORT), over);
                assert_eq!(answer.server, server);
                let what = format!("{} to {server}, {over:?}, {encap}, {underlay:?}", client.name());
                assert_eq!(Some(answer.client.ip()), saw, "{what}");
            }
        }
    }
}

#[test]
fn load_balancer_addresses_and_external_ips() {
    let mesh = services(2, "wireguard", Underlay::V4);
    let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    let stranger: IpAddr = "10.99.0.254".parse().expect("an address");
    let balanced: IpAddr = "192.0.2.10".parse().expect("an address");
    let external: IpAddr = "192.0.2.20".parse().expect("an address");
    let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
    Service {
        ingress: vec![balanced],
        node_port: NODE_PORT,
        spec: format!("  externalIPs:\n  - {external}\n  - {}\n", mesh.lab.outer(node1)),
        ..service("far", 1, pods(&mesh, &[(2, 10)]))
    }
    .write(&mesh.lab);
    mesh.lab.switch.run(&format!("ip route add 192.0.2.0/24 via {}", mesh.lab.outer(node1)));
    for over in BOTH {
        for address in [balanced, external, mesh.lab.outer(node1)] {
            let target = SocketAddr::new(address, PORT);
            let outside = asked(&mesh.lab.switch, None, target, over);
            assert_eq!((outside.server.as_str(), outside.client.ip()), ("far", stranger), "{target}");
            let pod = asked(&node1.pods[0], None, target, over);
            assert_eq!(pod.client.ip(), node1.inner(10)[0], "{target}");
            let host = asked(&node1.ns, None, target, over);
            assert_eq!(host.server, "far", "{target}");
        }
    }
    // Source ranges bind the balancer's address, and only that.
    Service {
        ingress: vec![balanced],
        node_port: NODE_PORT,
        spec: "  loadBalancerSourceRanges:\n  - 10.0.0.0/30\n".to_owned(),
        ..service("far", 1, pods(&mesh, &[(2, 10)]))
    }
    .write(&mesh.lab);
    let guarded = SocketAddr::new(balanced, PORT);
    wait_for("strangers are kept out", SOON, || {
        let socket = udp(&mesh.lab.switch, None, guarded).ok()?;
        socket.set_read_timeout(Some(Duration::from_millis(300))).ok()?;
        ask_udp(&socket, 10).is_err().then_some(())
    });
    asked(&mesh.lab.switch, None, SocketAddr::new(mesh.lab.outer(node1), NODE_PORT), Over::Tcp);
}

#[test]
fn local_policy_keeps_the_client_and_is_silent_elsewhere() {
    let mesh = services(2, "vxlan", Underlay::V4);
    let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
    Service {
        node_port: NODE_PORT,
        spec: "  externalTrafficPolicy: Local\n".to_owned(),
        ..service("far", 1, pods(&mesh, &[(2, 10)]))
    }
    .write(&mesh.lab);
    let at = |node| SocketAddr::new(mesh.lab.outer(node), NODE_PORT);
    let answer = asked(&mesh.lab.switch, None, at(node2), Over::Tcp);
    assert_eq!(answer.client.ip(), IpAddr::from([10, 99, 0, 254]));
    let socket = udp(&mesh.lab.switch, None, at(node1)).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    let silent = ask_udp(&socket, 10).expect_err("nobody here");
    assert_ne!(
        silent.kind(),
        io::ErrorKind::ConnectionRefused,
        "silence, so that a balancer looks elsewhere"
    );
    // Who is inside has no other node to go to.
    asked(&node1.pods[0], None, at(node1), Over::Udp);
}

#[test]
fn an_endpoint_that_goes() {
    for encap in ["wireguard", "vxlan"] {
        an_endpoint_that_goes_over(encap);
    }
}

fn an_endpoint_that_goes_over(encap: &str) {
    let mesh = services(2, encap, Underlay::V4);
    let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    let _servers = [
        Who::start("first", &node2.pods[0], &node2.inner(10)),
        Who::start("second", &node2.pods[1], &node2.inner(11)),
    ];
    let with = |which: &[(u8, u8)]| service("web", 1, pods(&mesh, which)).write(&mesh.lab);
    with(&[(2, 10)]);
    let target = SocketAddr::new(vips(1)[0], PORT);
    asked(&node1.pods[0], None, target, Over::Tcp);
    let socket = udp(&node1.pods[0], None, target).expect("a socket");
    assert_eq!(ask_udp(&socket, 10).expect("an answer").server, "first");
    let mut stream = open(&node1.pods[0], None, target).expect("a connection");
    stream.write_all(b"hello").expect("to write");
    let mut greeting = [0; 5];
    stream.read_exact(&mut greeting).expect("an answer");
    assert_eq!(&greeting, b"first");

    with(&[(2, 11)]);
    // The same socket, the same port: its next packets go elsewhere.
    socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    wait_for("datagrams move on", SOON, || {
        ask_udp(&socket, 10).is_ok_and(|answer| answer.server == "second").then_some(())
    });
    // The connection hears that it is over.
    let error = stream.write_all(b"more").and_then(|()| stream.read(&mut [0; 100]).map(drop));
    let error = error.and_then(|()| stream.write_all(b"more").and_then(|()| stream.read(&mut [0]).map(drop)));
    assert_eq!(error.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);

    // None, and then one again: the same socket finds it.
    with(&[]);
    wait_for("nobody is there", SOON, || {
        ask_udp(&socket, 10).err().filter(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    });
    with(&[(2, 10)]);
    wait_for("somebody is there", SOON, || {
        ask_udp(&socket, 10).is_ok_and(|answer| answer.server == "first").then_some(())
    });
}

#[test]
fn affinity_outlives_the_agent() {
    for encap in ["wireguard", "vxlan"] {
        affinity_outlives_the_agent_over(encap);
    }
}

fn affinity_outlives_the_agent_over(encap: &str) {
    let mut mesh = services(2, encap, Underlay::V4);
    let mut servers = Vec::new();
    for (name, node, host) in [("a", 1, 10), ("b", 1, 11), ("c", 2, 10), ("d", 2, 11)] {
        let node = &mesh.lab.nodes[node - 1];
        servers.push(Who::start(name, &node.pods[usize::from(host) - 10], &node.inner(host)));
    }
    let all = pods(&mesh, &[(1, 10), (1, 11), (2, 10), (2, 11)]);
    Service { spec: "  sessionAffinity: ClientIP\n".to_owned(), ..service("web", 1, all) }.write(&mesh.lab);
    let target = SocketAddr::new(vips(1)[0], PORT);
    let from = |mesh: &Mesh| asked(&mesh.lab.nodes[0].pods[0], None, target, Over::Tcp).server;
    let first = from(&mesh);
    for _ in 0..20 {
        assert_eq!(from(&mesh), first);
    }
    mesh.agents[0].wait_saved(&mesh.lab, &mesh.lab.nodes[1]);
    mesh.agents[0].kill();
    let node = &mesh.lab.nodes[0];
    mesh.agents[0].restart(&mesh.lab, node);
    for _ in 0..20 {
        assert_eq!(from(&mesh), first, "after a restart");
    }
}

#[test]
fn a_connection_through_a_service_outlives_the_agent() {
    let mut mesh = services(2, "wireguard", Underlay::V4);
    let node2 = &mesh.lab.nodes[1];
    let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
    service("web", 1, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
    let target = SocketAddr::new(vips(1)[0], PORT);
    asked(&mesh.lab.nodes[0].pods[0], None, target, Over::Tcp);
    let mut stream = open(&mesh.lab.nodes[0].pods[0], None, target).expect("a connection");
    // What was lost while the agent was away is sent again, later each time.
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let mut say = |what: &str| {
        stream.write_all(b"x").unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut answer = [0; 200];
        let n = stream.read(&mut answer).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(n > 0, "{what}: the end");
    };
    say("before");
    for index in [0, 1] {
        mesh.agents[index].wait_saved(&mesh.lab, &mesh.lab.nodes[1 - index]);
        mesh.agents[index].kill();
        let node = &mesh.lab.nodes[index];
        mesh.agents[index].restart(&mesh.lab, node);
        say(&format!("after the agent of node{} was killed", index + 1));
    }
}

#[test]
fn many_clients_are_spread_over_all_endpoints() {
    let mesh = services(2, "vxlan", Underlay::V4);
    let node1 = &mesh.lab.nodes[0];
    let mut servers = Vec::new();
    for (name, node, host) in [("a", 1, 11), ("b", 2, 10), ("c", 2, 11)] {
        let node = &mesh.lab.nodes[node - 1];
        servers.push(Who::start(name, &node.pods[usize::from(host) - 10], &node.inner(host)));
    }
    service("web", 1, pods(&mesh, &[(1, 11), (2, 10), (2, 11)])).write(&mesh.lab);
    let target = SocketAddr::new(vips(1)[1], PORT);
    asked(&node1.pods[0], None, target, Over::Udp);
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..600 {
        let answer = ask(&node1.pods[0], None, target, Over::Udp, 10).expect("an answer");
        *counts.entry(answer.server).or_insert(0_u32) += 1;
    }
    assert!(counts.len() == 3 && counts.values().all(|count| (140..260).contains(count)), "{counts:?}");
    assert_ne!(TARGET, PORT, "the port was translated too");
}
