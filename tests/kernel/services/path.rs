//! Paths that narrow somewhere behind a Service: who sent too much is told by an ICMP error about what he
//! sent himself, and not about what it was translated to.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::{NODE_PORT, SOON, asked, pods, service, services, vips};
use crate::lab::agent::Mesh;
use crate::lab::netns::{Netns, veth};
use crate::lab::service::{Over, PORT, Service, Who, ask_udp, udp};
use crate::lab::traffic::{Echo, tcp_bulk};
use crate::lab::{Station, Underlay, wait_for};

/// The narrow place: less than any tunnel's, and enough for IPv6.
const NARROW: u32 = 1300;
/// What goes into a pod's device and any tunnel, and not through the narrow place.
const TOO_MUCH: usize = 1330;

/// The MTU that a namespace's kernel has heard of on the way to an address, if any.
fn mtu_to(ns: &Netns, target: IpAddr) -> Option<u32> {
    let route = ns.run(&format!("ip route get {target}"));
    let mut words = route.split_whitespace().skip_while(|word| *word != "mtu");
    words.nth(1)?.parse().ok()
}

/// Asks with more than the path carries until an answer comes: the first tries make the ends learn.
fn learns(what: &str, ns: &Netns, target: SocketAddr, bytes: usize) {
    let socket = udp(ns, None, target).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    wait_for(what, SOON, || ask_udp(&socket, bytes).ok());
}

/// Switches br_netfilter off. With it the kernel joins a pod's fragments on the bridge and forgets how large
/// they were, so that a large IPv6 datagram is too large again for a narrow place that its sender knows of;
/// this happens below all Services, whoever does them.
fn without_bridge_netfilter(mesh: &Mesh) {
    for node in &mesh.lab.nodes {
        node.ns.attempt("sysctl -qw net.bridge.bridge-nf-call-ip6tables=0");
    }
}

/// Gives a node's way to one of its pods another MTU, as a router between them would have.
fn narrow(mesh: &Mesh, node: usize, host: u8) {
    let node = &mesh.lab.nodes[node];
    for address in node.inner(host) {
        node.ns.run(&format!("ip route add {address} dev cbr0 mtu lock {NARROW}"));
    }
}

#[test]
fn the_clients_side_learns_of_a_narrow_place_behind_the_service() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        without_bridge_netfilter(&mesh);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let _servers = [
            Who::start("near", &node1.pods[1], &node1.inner(11)),
            Who::start("far", &node2.pods[0], &node2.inner(10)),
        ];
        let _bulk = [
            Echo::start(Station { ns: &node1.pods[1], addresses: node1.inner(11) }),
            Echo::start(node2.pod()),
        ];
        service("near", 1, pods(&mesh, &[(1, 11)])).write(&mesh.lab);
        service("far", 2, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        service("bulk-near", 3, pods(&mesh, &[(1, 11)])).write_for_port(&mesh.lab, 7);
        service("bulk-far", 4, pods(&mesh, &[(2, 10)])).write_for_port(&mesh.lab, 7);
        for number in 1..=2 {
            for family in [0, 1] {
                asked(&node1.pods[0], None, SocketAddr::new(vips(number)[family], PORT), Over::Tcp);
            }
        }
        narrow(&mesh, 0, 11);
        narrow(&mesh, 1, 10);
        for family in [0, 1] {
            for (client, number, what) in [
                (&node1.pods[0], 2, "a pod, of a place on another node"),
                (&node1.pods[0], 1, "a pod, of a place on its own node"),
                (&node1.ns, 2, "the host, of a place on another node"),
            ] {
                let what = format!("{what}, {encap}, family {family}");
                let target = SocketAddr::new(vips(number)[family], PORT);
                assert_ne!(mtu_to(client, target.ip()), Some(NARROW), "{what}: before anything was sent");
                learns(&what, client, target, TOO_MUCH);
                // Of the Service's address, which is all that the client knows.
                assert_eq!(mtu_to(client, target.ip()), Some(NARROW), "{what}");
            }
            for number in [3, 4] {
                let target = SocketAddr::new(vips(number)[family], PORT);
                let source = node1.inner(10)[family];
                tcp_bulk(&node1.pods[0], source, target, 4 << 20);
            }
        }
    }
}

#[test]
fn the_endpoints_side_learns_of_a_narrow_place_before_the_client() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        without_bridge_netfilter(&mesh);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let _servers = [
            Who::start("near", &node1.pods[1], &node1.inner(11)),
            Who::start("far", &node2.pods[0], &node2.inner(10)),
        ];
        let _bulk = [
            Echo::start(Station { ns: &node1.pods[1], addresses: node1.inner(11) }),
            Echo::start(node2.pod()),
        ];
        service("near", 1, pods(&mesh, &[(1, 11)])).write(&mesh.lab);
        service("far", 2, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        service("bulk-near", 3, pods(&mesh, &[(1, 11)])).write_for_port(&mesh.lab, 7);
        service("bulk-far", 4, pods(&mesh, &[(2, 10)])).write_for_port(&mesh.lab, 7);
        for number in 1..=4 {
            for family in [0, 1] {
                let target = SocketAddr::new(vips(number)[family], PORT);
                wait_for("the Service", SOON, || {
                    crate::lab::service::open(&node1.pods[0], None, target).ok()
                });
            }
        }
        narrow(&mesh, 0, 10);
        for family in [0, 1] {
            for (number, endpoint, what) in [
                (2, &node2.pods[0], "an endpoint on another node"),
                (1, &node1.pods[1], "an endpoint on the client's node"),
            ] {
                let what = format!("{what}, {encap}, family {family}");
                let target = SocketAddr::new(vips(number)[family], PORT);
                learns(&what, &node1.pods[0], target, TOO_MUCH);
                assert_eq!(mtu_to(endpoint, node1.inner(10)[family]), Some(NARROW), "{what}");
            }
            for number in [3, 4] {
                let target = SocketAddr::new(vips(number)[family], PORT);
                tcp_bulk(&node1.pods[0], node1.inner(10)[family], target, 4 << 20);
            }
        }
    }
}

#[test]
fn the_tunnel_itself_is_narrower_than_the_pods() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        without_bridge_netfilter(&mesh);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let tunnel = mesh.agents[0].pod_mtu();
        let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
        service("far", 2, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        for node in [node1, node2] {
            node.set_pod_mtu(1500);
        }
        for family in [0, 1] {
            let target = SocketAddr::new(vips(2)[family], PORT);
            asked(&node1.pods[0], None, target, Over::Tcp);
            learns("the pod", &node1.pods[0], target, 1430);
            assert_eq!(mtu_to(&node1.pods[0], target.ip()), Some(tunnel));
            let client = node1.inner(10)[family];
            assert_eq!(mtu_to(&node2.pods[0], client), Some(tunnel), "the answer was as large");
        }
    }
}

#[test]
fn a_narrow_place_before_a_client_outside() {
    for (encap, underlay) in
        [("wireguard", Underlay::V4), ("vxlan", Underlay::V4), ("wireguard", Underlay::V6)]
    {
        let mesh = services(2, encap, underlay);
        without_bridge_netfilter(&mesh);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let switch = &mesh.lab.switch;
        let client = Netns::new("client");
        veth((switch, "beyond"), (&client, "eth0"), 1500);
        let (here, there, default) = match underlay {
            Underlay::V4 => ("198.51.100.1/24", "198.51.100.2/24", "198.51.100.1"),
            Underlay::V6 => ("2001:db8:9::1/64", "2001:db8:9::2/64", "2001:db8:9::1"),
        };
        switch.run_all(&format!(
            "ip addr add {here} dev beyond
             sysctl -qw net.ipv4.ip_forward=1
             sysctl -qw net.ipv6.conf.all.forwarding=1"
        ));
        client.run_all(&format!("ip addr add {there} dev eth0\n ip route add default via {default}"));
        let address: IpAddr = there.split('/').next().and_then(|text| text.parse().ok()).expect("an address");
        let _servers = [
            Who::start("near", &node1.pods[1], &node1.inner(11)),
            Who::start("far", &node2.pods[0], &node2.inner(10)),
        ];
        for (name, number, which) in [("near", 1, (1, 11)), ("far", 2, (2, 10))] {
            let node_port = NODE_PORT + u16::from(number);
            Service { node_port, ..service(name, number, pods(&mesh, &[which])) }.write(&mesh.lab);
        }
        let at = |number| SocketAddr::new(mesh.lab.outer(node1), NODE_PORT + number);
        for number in [1, 2] {
            assert_eq!(asked(&client, None, at(number), Over::Tcp).client.ip(), address, "{encap}");
        }
        switch.run(&format!("ip route add {address} dev beyond mtu lock {NARROW}"));
        for (number, endpoint) in [(1, &node1.pods[1]), (2, &node2.pods[0])] {
            let what = format!("endpoint {number}, {encap}, {underlay:?}");
            learns(&what, &client, at(number), TOO_MUCH);
            assert_eq!(mtu_to(endpoint, address), Some(NARROW), "{what}");
        }
    }
}
