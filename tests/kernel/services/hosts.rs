//! What the host around Services does: masquerading plugins, fragments, loopback and chosen addresses.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Stdio;
use std::time::Duration;

use warren::snapshot::service::loop_address;

use super::{NODE_PORT, SOON, asked, pods, refused, service, services, services_with, vips};
use crate::lab::netns::Netns;
use crate::lab::raw::Raw;
use crate::lab::service::{BOTH, Over, PORT, Service, TARGET, Who, open};
use crate::lab::traffic::pattern;
use crate::lab::{Node, Underlay, wait_for};

/// What the `bridge` plugin writes with `ipMasq: true` for one pod, by iptables or by nftables.
fn masquerade(node: &Node, host: u8, by_nftables: bool) {
    let [v4, v6] = node.inner(host);
    let n = node.number;
    let rules = if by_nftables {
        format!(
            "table inet cni_plugins_masquerade {{
                 chain masq_checks {{
                     ip saddr {v4} ip daddr != 10.244.{n}.0/24 jump masq_{host}
                     ip6 saddr {v6} ip6 daddr != fd00:10:244:{n:x}::/64 jump masq_{host}
                 }}
                 chain masq_{host} {{
                     ip daddr 224.0.0.0/4 return
                     ip6 daddr ff00::/8 return
                     masquerade
                 }}
                 chain postrouting {{
                     type nat hook postrouting priority srcnat; policy accept;
                     jump masq_checks
                 }}
             }}"
        )
    } else {
        format!(
            "table ip nat {{
                 chain CNI-{host} {{
                     ip daddr 10.244.{n}.0/24 accept
                     ip daddr != 224.0.0.0/4 masquerade
                 }}
                 chain POSTROUTING {{
                     type nat hook postrouting priority srcnat; policy accept;
                     ip saddr {v4} jump CNI-{host}
                 }}
             }}
             table ip6 nat {{
                 chain CNI-{host} {{
                     ip6 daddr fd00:10:244:{n:x}::/64 accept
                     ip6 daddr != ff00::/8 masquerade
                 }}
                 chain POSTROUTING {{
                     type nat hook postrouting priority srcnat; policy accept;
                     ip6 saddr {v6} jump CNI-{host}
                 }}
             }}"
        )
    };
    nft(&node.ns, &rules);
}

/// Gives nft a script.
pub(super) fn nft(ns: &Netns, rules: &str) {
    let mut child = ns.command("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("run nft");
    child.stdin.take().expect("a pipe").write_all(rules.as_bytes()).expect("write rules");
    assert!(child.wait().expect("wait for nft").success(), "nft refuses: {rules}");
}

#[test]
fn pods_behind_a_masquerading_bridge_keep_their_address() {
    for (encap, by_nftables) in [("wireguard", true), ("vxlan", false)] {
        let mesh = services(2, encap, Underlay::V4);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        for node in [node1, node2] {
            masquerade(node, 10, by_nftables);
            masquerade(node, 11, by_nftables);
        }
        let _servers = [
            Who::start("near", &node1.pods[1], &node1.inner(11)),
            Who::start("far", &node2.pods[0], &node2.inner(10)),
            Who::start("world", &mesh.lab.switch, &[mesh.lab.outside()]),
        ];
        service("near", 1, pods(&mesh, &[(1, 11)])).write(&mesh.lab);
        service("far", 2, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        let (pod, same) = (&node1.pods[0], &node1.pods[1]);
        for family in [0, 1] {
            let [near, far] = [1, 2].map(|number| SocketAddr::new(vips(number)[family], PORT));
            let direct = |node: &Node, host| SocketAddr::new(node.inner(host)[family], TARGET);
            let own = node1.inner(10)[family];
            for over in BOTH {
                for (client, target, server, saw, what) in [
                    (pod, far, "far", own, "a Service elsewhere"),
                    (pod, near, "near", own, "a Service on its node"),
                    (same, near, "near", loop_address(near.ip()), "its own Service"),
                    (pod, direct(node2, 10), "far", own, "a pod elsewhere, directly"),
                    (pod, direct(node1, 11), "near", own, "a pod of its node, directly"),
                ] {
                    let answer = asked(client, None, target, over);
                    let what = format!("{what}, {over:?}, {encap}");
                    assert_eq!((answer.server.as_str(), answer.client.ip()), (server, saw), "{what}");
                }
            }
        }
        let world = asked(pod, None, SocketAddr::new(mesh.lab.outside(), TARGET), Over::Tcp);
        assert_eq!(world.client.ip(), mesh.lab.outer(node1), "to the world it is still masqueraded");
    }
}

/// A UDP datagram as fragments, with all headers; each but the last carries `size` bytes.
fn fragments(from: SocketAddr, to: SocketAddr, payload: &[u8], size: usize, id: u32) -> Vec<Vec<u8>> {
    let mut udp = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let length = payload.len() as u16 + 8;
    udp.extend(length.to_be_bytes());
    udp.extend([0; 2]);
    udp.extend(payload);
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let addresses = [octets(from.ip()), octets(to.ip())].concat();
    let mut sum: u64 = 17 + u64::from(length);
    for two in [&addresses[..], &udp].concat().chunks(2) {
        sum += u64::from(u16::from_be_bytes([two[0], two.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    udp[6..8].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let pieces = udp.chunks(size).enumerate();
    let count = udp.len().div_ceil(size);
    let fragment = |(index, piece): (usize, &[u8])| {
        let (offset, more) = (index * size / 8, u16::from(index + 1 < count));
        if from.is_ipv4() {
            // The kernel fills in length and checksum (raw(7)).
            let mut packet = vec![0x45, 0, 0, 0];
            packet.extend((id as u16).to_be_bytes());
            packet.extend((more << 13 | offset as u16).to_be_bytes());
            packet.extend([64, 17, 0, 0]);
            packet.extend(&addresses);
            packet.extend(piece);
            packet
        } else {
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend((piece.len() as u16 + 8).to_be_bytes());
            packet.extend([44, 64]);
            packet.extend(&addresses);
            packet.extend([17, 0]);
            packet.extend(((offset as u16) << 3 | more).to_be_bytes());
            packet.extend(id.to_be_bytes());
            packet.extend(piece);
            packet
        }
    };
    pieces.map(fragment).collect()
}

/// Lets a node's kernel pass fragments on as they come: it joins and sorts what it tracks.
fn let_fragments_through(node: &Node) {
    node.ns.attempt("sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0");
    nft(
        &node.ns,
        // Before joining, NF_IP_PRI_CONNTRACK_DEFRAG (-400).
        "table inet early {
             chain in {
                 type filter hook prerouting priority -450; policy accept;
                 meta nfproto ipv4 @nh,48,16 & 0x3fff != 0 counter notrack
                 meta nfproto ipv6 @nh,48,8 44 counter notrack
             }
         }",
    );
}

#[test]
fn fragments_in_any_order_both_ways() {
    const SIZE: usize = 1200;
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let_fragments_through(node1);
        let_fragments_through(node2);
        service("far", 1, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        let who = Who::start("far", &node2.pods[0], &node2.inner(10));
        for family in [0, 1] {
            asked(&node1.pods[0], None, SocketAddr::new(vips(1)[family], PORT), Over::Udp);
        }
        drop(who);
        for family in [0, 1] {
            let at = |address: [IpAddr; 2], port| SocketAddr::new(address[family], port);
            let (here, there) = (at(node1.inner(10), 42_000), at(node2.inner(10), TARGET));
            let service = SocketAddr::new(vips(1)[family], PORT);
            let socket = |ns: &Netns, address: SocketAddr| {
                let socket =
                    ns.enter(|| UdpSocket::bind(address)).unwrap_or_else(|e| panic!("{address}: {e}"));
                socket.set_read_timeout(Some(Duration::from_secs(2))).expect("a timeout");
                socket
            };
            let (client, server) = (socket(&node1.pods[0], here), socket(&node2.pods[0], there));
            let raw = [&node1.pods[0], &node2.pods[0]].map(|pod| Raw::with_headers(pod, here.is_ipv4()));
            // The flow must be known before its answers can come.
            client.send_to(b"hello", service).expect("to send");
            server.recv_from(&mut [0; 100]).expect("the first datagram");
            let mut id = 7_000;
            for order in [vec![0, 1, 2], vec![2, 1, 0], vec![1, 2, 0], vec![2, 0, 1]] {
                for back in [false, true] {
                    let what = format!("{encap}, family {family}, {order:?}, back {back}");
                    let message = pattern(u64::from(id), 3 * SIZE - 100);
                    id += 1;
                    let (from, to, shown) = if back { (there, here, service) } else { (here, service, here) };
                    let pieces = fragments(from, to, &message, SIZE, id);
                    for index in &order {
                        raw[usize::from(back)].send(to.ip(), &pieces[*index]).expect("to send a fragment");
                    }
                    let mut room = vec![0; 65_536];
                    let receiver = if back { &client } else { &server };
                    let (n, seen) = receiver.recv_from(&mut room).unwrap_or_else(|e| panic!("{what}: {e}"));
                    assert!(room[..n] == message, "{what}: {n} bytes, or others");
                    assert_eq!(seen, shown, "{what}");
                }
            }
        }
        for node in [node1, node2] {
            let rules = node.ns.run("nft list table inet early");
            assert!(!rules.contains("packets 0 "), "the kernel sorted the fragments itself: {rules}");
        }
    }
}

#[test]
fn loopback_has_node_ports_where_it_may() {
    for encap in ["wireguard", "vxlan"] {
        loopback_has_node_ports_where_it_may_over(encap);
    }
}

fn loopback_has_node_ports_where_it_may_over(encap: &str) {
    for (flags, works) in [(&["--nodeport-localhost"][..], true), (&[], false)] {
        let mesh = services_with(2, encap, Underlay::V4, flags);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let _servers = [
            Who::start("near", &node1.pods[1], &node1.inner(11)),
            Who::start("far", &node2.pods[0], &node2.inner(10)),
        ];
        for (name, number, which) in [("near", 1, (1, 11)), ("far", 2, (2, 10))] {
            let node_port = NODE_PORT + u16::from(number);
            Service { node_port, ..service(name, number, pods(&mesh, &[which])) }.write(&mesh.lab);
        }
        for number in [1, 2] {
            let at =
                |address: &str| SocketAddr::new(address.parse().expect("an address"), NODE_PORT + number);
            for over in BOTH {
                asked(&node1.ns, None, SocketAddr::new(mesh.lab.outer(node1), NODE_PORT + number), over);
                if works {
                    for address in ["127.0.0.1", "127.8.8.8"] {
                        let answer = asked(&node1.ns, None, at(address), over);
                        let expected =
                            if number == 1 { loop_address(node1.inner(0)[0]) } else { node1.inner(0)[0] };
                        assert_eq!(answer.server, ["near", "far"][usize::from(number) - 1]);
                        assert_eq!(answer.client.ip(), expected, "{address}, {over:?}");
                    }
                } else {
                    assert!(refused(&node1.ns, at("127.0.0.1"), over), "{over:?}: switched off");
                }
                assert!(refused(&node1.ns, at("::1"), over), "{over:?}: never");
            }
            assert!(open(&mesh.lab.switch, None, at("127.0.0.1")).is_err(), "another machine's loopback");
        }
    }
}

#[test]
fn node_ports_on_chosen_addresses_only() {
    for encap in ["wireguard", "vxlan"] {
        node_ports_on_chosen_addresses_only_over(encap);
    }
}

fn node_ports_on_chosen_addresses_only_over(encap: &str) {
    let mesh = services_with(2, encap, Underlay::V4, &["--nodeport-addresses", "10.99.7.0/24"]);
    let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    node1.ns.run_all("ip addr add 10.99.7.1/32 dev eth0\n ip addr add fd00:77::1/128 dev eth0 nodad");
    mesh.lab.switch.run_all(
        "ip route add 10.99.7.1/32 via 10.99.0.1
         ip addr add fd00:78::1/64 dev br0 nodad
         ip route add fd00:77::1/128 dev br0",
    );
    node1.ns.run("ip route add fd00:78::/64 dev eth0");
    let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
    Service { node_port: NODE_PORT, ..service("far", 1, pods(&mesh, &[(2, 10)])) }.write(&mesh.lab);
    let at = |address: &str| SocketAddr::new(address.parse().expect("an address"), NODE_PORT);
    for over in BOTH {
        for client in [&mesh.lab.switch, &node1.ns, &node1.pods[0]] {
            assert_eq!(asked(client, None, at("10.99.7.1"), over).server, "far", "{}", client.name());
            wait_for("the other address has none", SOON, || {
                refused(client, at("10.99.0.1"), over).then_some(())
            });
        }
        // No range names IPv6: there all addresses have them, as kube-proxy has it.
        assert_eq!(asked(&mesh.lab.switch, None, at("fd00:77::1"), over).server, "far");
    }
}
