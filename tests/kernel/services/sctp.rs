//! SCTP, packet by packet: this kernel need not have it.

use std::net::IpAddr;
use std::time::Duration;

use warren::snapshot::service::loop_address;

use super::{NODE_PORT, SOON, pods, service, services, vips};
use crate::lab::netns::Netns;
use crate::lab::raw::{Raw, Sctp};
use crate::lab::service::{PORT, Service, TARGET};
use crate::lab::{Underlay, wait_for};

/// The client's port.
const FROM: u16 = 41_000;

/// A whole handshake, and what each end sees of the other.
fn handshake(what: &str, from: u16, client: &Raw, server: &Raw, to: (IpAddr, u16), seen: IpAddr) {
    let say = |raw: &Raw, to: IpAddr, packet: &Sctp| {
        raw.send(to, &packet.bytes()).unwrap_or_else(|e| panic!("{what}: {e}"));
    };
    let hear = |raw: &Raw, chunk: u8, within: Duration| {
        let came = raw.hear(within, |came| came.payload.get(12) == Some(&chunk))?;
        let packet = Sctp::read(&came.payload).unwrap_or_else(|| panic!("{what}: a wrong checksum"));
        Some((came.from, packet))
    };
    let patience = Duration::from_secs(2);
    let init = Sctp { ports: (from, to.1), tag: 0, chunk: Sctp::INIT, value: Sctp::offer(0x1111) };
    // As who connects would: again, until the Service is known.
    let (source, asked) = wait_for(what, SOON, || {
        say(client, to.0, &init);
        hear(server, Sctp::INIT, Duration::from_millis(100))
    });
    assert_eq!((source, asked.ports.1), (seen, TARGET), "{what}");
    assert_eq!(asked.value, init.value, "{what}");
    if source != loop_address(source) {
        assert_eq!(asked.ports.0, from, "{what}");
    }
    let back = (TARGET, asked.ports.0);
    let mut tags = [0x1111, 0x2222].into_iter().cycle();
    for chunks in [[Sctp::INIT_ACK, Sctp::COOKIE_ECHO], [Sctp::COOKIE_ACK, 0]] {
        let [answer, question] = chunks;
        let value = if answer == Sctp::INIT_ACK { Sctp::offer(0x2222) } else { Vec::new() };
        let tag = tags.next().unwrap_or_default();
        let packet = Sctp { ports: back, tag, chunk: answer, value };
        say(server, source, &packet);
        let (whom, heard) = hear(client, answer, patience).unwrap_or_else(|| panic!("{what}: no answer"));
        assert_eq!((whom, heard.ports), (to.0, (to.1, from)), "{what}: who answers");
        assert_eq!((heard.tag, &heard.value), (tag, &packet.value), "{what}");
        let tag = tags.next().unwrap_or_default();
        // The last one carries data, of a length that no word divides.
        let value = if question == 0 { [&[0; 12][..], b"warrens"].concat() } else { b"cookie".to_vec() };
        let packet = Sctp { ports: (from, to.1), tag, chunk: question, value };
        say(client, to.0, &packet);
        let (whom, heard) =
            hear(server, question, patience).unwrap_or_else(|| panic!("{what}: chunk {question}"));
        assert_eq!((whom, heard.ports), (source, (asked.ports.0, TARGET)), "{what}: who asks");
        assert_eq!((heard.tag, &heard.value), (tag, &packet.value), "{what}");
    }
}

#[test]
fn sctp_with_its_ports_rewritten() {
    for (encap, underlay) in
        [("wireguard", Underlay::V4), ("vxlan", Underlay::V4), ("wireguard", Underlay::V6)]
    {
        let mesh = services(3, encap, underlay);
        let [node1, node2, node3] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1], &mesh.lab.nodes[2]];
        let sctp = |name, number, which: &[(u8, u8)], node_port| Service {
            node_port,
            sctp: true,
            ..service(name, number, pods(&mesh, which))
        };
        sctp("near", 1, &[(1, 11)], NODE_PORT).write(&mesh.lab);
        sctp("far", 2, &[(2, 10)], NODE_PORT + 1).write(&mesh.lab);
        let raw = |ns: &Netns, address: IpAddr| Raw::new(ns, address, Sctp::PROTOCOL);
        let mut port = FROM;
        for family in [0, 1] {
            let [near, far] = [node1.inner(11), node2.inner(10)].map(|addresses| addresses[family]);
            let (at_near, at_far) = (raw(&node1.pods[1], near), raw(&node2.pods[0], far));
            let pod = raw(&node1.pods[0], node1.inner(10)[family]);
            let host = raw(&node1.ns, node1.inner(0)[family]);
            let [to_near, to_far] = [1, 2].map(|number| (vips(number)[family], PORT));
            let of_loop = loop_address(near);
            for (client, server, to, seen, what) in [
                (&pod, &at_far, to_far, pod.address, "pod to a pod elsewhere"),
                (&pod, &at_near, to_near, pod.address, "pod to a pod of its node"),
                (&at_near, &at_near, to_near, of_loop, "pod to itself"),
                (&host, &at_far, to_far, host.address, "host to a pod elsewhere"),
                (&host, &at_near, to_near, of_loop, "host to a pod of its node"),
            ] {
                port += 1;
                handshake(&format!("{what}, {encap}, {}", to.0), port, client, server, to, seen);
            }
        }
        // From outside and from another node, by the NodePort.
        let here = mesh.lab.outer(node1);
        let family = usize::from(here.is_ipv6());
        let at_near = raw(&node1.pods[1], node1.inner(11)[family]);
        let at_far = raw(&node2.pods[0], node2.inner(10)[family]);
        let outside = raw(&mesh.lab.switch, mesh.lab.outside());
        let other = raw(&node3.ns, mesh.lab.outer(node3));
        for (client, server, to, seen, what) in [
            (&outside, &at_near, NODE_PORT, outside.address, "outside to a pod of the node"),
            (&outside, &at_far, NODE_PORT + 1, outside.address, "outside to a pod of another node"),
            (&other, &at_near, NODE_PORT, other.address, "another node to a pod of this one"),
        ] {
            port += 1;
            handshake(&format!("{what}, {encap}"), port, client, server, (here, to), seen);
        }
    }
}
