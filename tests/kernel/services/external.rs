//! Ways in from outside besides node ports, over both families: addresses of load balancers and external
//! ones, who may come to them, and what they say when nobody is there.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::{NODE_PORT, SOON, asked, pods, refused, service, services, services_with};
use crate::lab::agent::Mesh;
use crate::lab::netns::Netns;
use crate::lab::service::{BOTH, Over, PORT, Service, Who, ask, ask_udp, open, udp};
use crate::lab::{Underlay, wait_for};

/// How long silence must last to be believed.
const SILENCE: Duration = Duration::from_millis(500);

/// Every encapsulation, and every family.
const WAYS: [(&str, Underlay); 2] = [("wireguard", Underlay::V4), ("vxlan", Underlay::V6)];

/// Whether the client hears nothing at all.
pub(super) fn silent(ns: &Netns, target: SocketAddr, over: Over) -> bool {
    let kind = match over {
        Over::Tcp => open(ns, None, target).map(drop).map_err(|error| error.kind()),
        Over::Udp => udp(ns, None, target)
            .and_then(|socket| {
                socket.set_read_timeout(Some(SILENCE))?;
                ask_udp(&socket, 10).map(drop)
            })
            .map_err(|error| error.kind()),
    };
    matches!(kind, Err(io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock))
}

/// The address of a load balancer, and an external one, that the switch sends to node 1.
fn addresses(mesh: &Mesh) -> [IpAddr; 2] {
    let node1 = mesh.lab.outer(&mesh.lab.nodes[0]);
    let (range, texts) = match mesh.lab.underlay {
        Underlay::V4 => ("192.0.2.0/24", ["192.0.2.10", "192.0.2.20"]),
        Underlay::V6 => ("fd00:aa::/64", ["fd00:aa::10", "fd00:aa::20"]),
    };
    mesh.lab.switch.run(&format!("ip route add {range} via {node1}"));
    texts.map(|text| text.parse().expect("an address"))
}

fn balanced(mesh: &Mesh, ingress: IpAddr, spec: String, which: &[(u8, u8)]) {
    let more = Service { ingress: vec![ingress], node_port: NODE_PORT, spec, ..Service::default() };
    let Service { name, cluster_ips, endpoints, .. } = service("far", 1, pods(mesh, which));
    Service { name, cluster_ips, endpoints, ..more }.write(&mesh.lab);
}

#[test]
fn by_every_address_from_everywhere() {
    for (encap, underlay) in WAYS {
        let mesh = services(2, encap, underlay);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let family = usize::from(underlay == Underlay::V6);
        let [balancer, external] = addresses(&mesh);
        let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
        let own = mesh.lab.outer(node1);
        let spec = format!("  externalIPs:\n  - \"{external}\"\n  - \"{own}\"\n");
        balanced(&mesh, balancer, spec.clone(), &[(2, 10)]);
        for over in BOTH {
            for address in [balancer, external, own] {
                let target = SocketAddr::new(address, PORT);
                let what = format!("{target}, {over:?}, {encap}");
                let outside = asked(&mesh.lab.switch, None, target, over);
                assert_eq!(
                    (outside.server.as_str(), outside.client.ip()),
                    ("far", mesh.lab.outside()),
                    "{what}"
                );
                let pod = asked(&node1.pods[0], None, target, over);
                assert_eq!(pod.client.ip(), node1.inner(10)[family], "{what}");
                assert_eq!(asked(&node1.ns, None, target, over).server, "far", "{what}");
            }
        }
        // And when nobody is there any more, everybody hears it.
        balanced(&mesh, balancer, spec, &[]);
        for over in BOTH {
            for address in [balancer, external, own] {
                for client in [&mesh.lab.switch, &node1.pods[0], &node1.ns] {
                    let target = SocketAddr::new(address, PORT);
                    let what =
                        format!("{} hears that nobody is at {target}, {over:?}, {encap}", client.name());
                    wait_for(&what, SOON, || refused(client, target, over).then_some(()));
                }
            }
        }
    }
}

#[test]
fn source_ranges_bind_pods_and_nodes_too() {
    for (encap, underlay) in WAYS {
        let mesh = services(2, encap, underlay);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let family = usize::from(underlay == Underlay::V6);
        let [balancer, external] = addresses(&mesh);
        let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
        let all = [&mesh.lab.switch, &node1.pods[0], &node1.ns];
        let sources = [mesh.lab.outside(), node1.inner(10)[family], mesh.lab.outer(node1)];
        for (allowed, source) in sources.into_iter().enumerate() {
            let bits = if source.is_ipv4() { 32 } else { 128 };
            let spec = format!(
                "  externalIPs:\n  - \"{external}\"\n  loadBalancerSourceRanges:\n  - \"{source}/{bits}\"\n"
            );
            balanced(&mesh, balancer, spec, &[(2, 10)]);
            let target = SocketAddr::new(balancer, PORT);
            for over in BOTH {
                asked(all[allowed], None, target, over);
                for (number, client) in all.into_iter().enumerate().filter(|(number, _)| *number != allowed) {
                    let what = format!("{} is kept out, {over:?}, {encap}, {number}", client.name());
                    wait_for(&what, SOON, || silent(client, target, over).then_some(()));
                }
                // The ranges are the balancer's: other ways in are open.
                let node_port = SocketAddr::new(mesh.lab.outer(node1), NODE_PORT);
                for client in all {
                    asked(client, None, SocketAddr::new(external, PORT), over);
                    asked(client, None, node_port, over);
                }
            }
        }
    }
}

#[test]
fn external_ips_can_be_switched_off() {
    for (encap, underlay) in WAYS {
        let mesh = services_with(2, encap, underlay, &["--external-ips", "off"]);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let [balancer, external] = addresses(&mesh);
        let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
        balanced(&mesh, balancer, format!("  externalIPs:\n  - \"{external}\"\n"), &[(2, 10)]);
        for over in BOTH {
            for client in [&mesh.lab.switch, &node1.pods[0], &node1.ns] {
                asked(client, None, SocketAddr::new(balancer, PORT), over);
                let taken = ask(client, None, SocketAddr::new(external, PORT), over, 10);
                assert!(taken.is_err(), "{} gets {taken:?}, {over:?}, {encap}", client.name());
            }
        }
        let rules = node1.ns.run("nft list table inet warren-services");
        assert!(rules.contains(&balancer.to_string()) && !rules.contains(&external.to_string()), "{rules}");
    }
}
