//! Flows that have too much in common, and flows whose agents go away.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use warren::snapshot::service::loop_address;

use super::{NODE_PORT, SOON, asked, pods, service, services, vips};
use crate::lab::netns::Netns;
use crate::lab::service::{Over, PORT, Service, TARGET, Who, open};
use crate::lab::{Underlay, wait_for};

/// A connection whose answers are read one by one.
pub(super) struct Talk {
    stream: TcpStream,
    /// The client as the server sees it.
    pub(super) seen: SocketAddr,
}

impl Talk {
    /// Says hello on a stream.
    pub(super) fn begin(what: &str, server: &str, mut stream: TcpStream) -> Talk {
        stream.write_all(b"hello").unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut room = [0; 200];
        let mut text = String::new();
        while text.matches('|').count() < 2 || !text.ends_with("hello") {
            let n = stream.read(&mut room).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(n > 0, "{what}: the end");
            text.push_str(&String::from_utf8_lossy(&room[..n]));
        }
        let mut parts = text.split('|');
        assert_eq!(parts.next(), Some(server), "{what}");
        let seen = parts.next().and_then(|part| part.parse().ok()).expect("an address");
        Talk { stream, seen }
    }

    /// Says something, which comes back.
    pub(super) fn say(&mut self, what: &str, words: &str) {
        self.stream.write_all(words.as_bytes()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut back = vec![0; words.len()];
        self.stream.read_exact(&mut back).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(String::from_utf8_lossy(&back), words, "{what}: another's bytes");
    }
}

/// A connection from a port that others may have too.
fn open_from(ns: &Netns, from: SocketAddr, target: SocketAddr) -> std::io::Result<TcpStream> {
    ns.enter(|| {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&target.into(), Duration::from_secs(3))?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        socket.set_tcp_nodelay(true)?;
        Ok(TcpStream::from(socket))
    })
}

#[test]
fn one_client_port_to_one_endpoint_by_three_ways() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
        service("one", 1, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        service("two", 2, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        let mut port = 50_000;
        for (client, host) in [(&node1.pods[0], 10), (&node1.ns, 0)] {
            for family in [0, 1] {
                let direct = SocketAddr::new(node2.inner(10)[family], TARGET);
                let [one, two] = [1, 2].map(|number| SocketAddr::new(vips(number)[family], PORT));
                asked(client, None, one, Over::Tcp);
                asked(client, None, two, Over::Tcp);
                for order in [[one, two, direct], [one, direct, two], [direct, one, two]] {
                    let what = format!("{} {order:?}, {encap}", client.name());
                    port += 1;
                    let from = SocketAddr::new(node1.inner(host)[family], port);
                    let mut talks: Vec<Talk> = Vec::new();
                    for target in order {
                        let stream = open_from(client, from, target)
                            .unwrap_or_else(|e| panic!("{what}, {target}: {e}"));
                        talks.push(Talk::begin(&what, "far", stream));
                    }
                    for round in 0..10 {
                        for (number, talk) in talks.iter_mut().enumerate() {
                            talk.say(&what, &format!("connection {number}, round {round}"));
                        }
                    }
                    let seen: Vec<SocketAddr> = talks.iter().map(|talk| talk.seen).collect();
                    assert_eq!(seen[0], from, "{what}: the first keeps its port");
                    assert!(seen.iter().all(|seen| seen.ip() == from.ip()), "{what}: {seen:?}");
                    assert!(
                        seen[1] != seen[0] && seen[2] != seen[0] && seen[1] != seen[2],
                        "{what}: {seen:?}"
                    );
                }
                // One socket that asks all three: each answers for itself.
                port += 1;
                let from = SocketAddr::new(node1.inner(host)[family], port);
                let socket = client.enter(|| UdpSocket::bind(from)).expect("a socket");
                socket.set_read_timeout(Some(Duration::from_secs(2))).expect("a timeout");
                for round in 0..5 {
                    for target in [one, direct, two] {
                        let question = format!("{target}, round {round}");
                        socket.send_to(question.as_bytes(), target).expect("to send");
                        let mut room = [0; 300];
                        let (n, who) =
                            socket.recv_from(&mut room).unwrap_or_else(|e| panic!("{target}: {e}"));
                        assert_eq!(who, target);
                        assert!(String::from_utf8_lossy(&room[..n]).ends_with(&question), "{target}");
                    }
                }
            }
        }
    }
}

#[test]
fn one_client_port_to_one_endpoint_of_the_same_node() {
    for encap in ["wireguard", "vxlan"] {
        one_client_port_to_one_endpoint_of_the_same_node_over(encap);
    }
}

fn one_client_port_to_one_endpoint_of_the_same_node_over(encap: &str) {
    let mesh = services(2, encap, Underlay::V4);
    let node1 = &mesh.lab.nodes[0];
    let _server = Who::start("near", &node1.pods[1], &node1.inner(11));
    service("one", 1, pods(&mesh, &[(1, 11)])).write(&mesh.lab);
    service("two", 2, pods(&mesh, &[(1, 11)])).write(&mesh.lab);
    let mut port = 51_000;
    for family in [0, 1] {
        let direct = SocketAddr::new(node1.inner(11)[family], TARGET);
        let [one, two] = [1, 2].map(|number| SocketAddr::new(vips(number)[family], PORT));
        for target in [one, two] {
            asked(&node1.pods[0], None, target, Over::Tcp);
        }
        let begin = |from, target| {
            let stream = open_from(&node1.pods[0], from, target).unwrap_or_else(|e| panic!("{target}: {e}"));
            Talk::begin("near", "near", stream)
        };
        // Two Services: the later flow gets another port.
        port += 1;
        let from = SocketAddr::new(node1.inner(10)[family], port);
        let mut talks = [begin(from, one), begin(from, two)];
        assert!(talks[0].seen == from && talks[1].seen != from && talks[1].seen.ip() == from.ip());
        // What goes to a pod of the same node directly does not pass the loop: such a connection is not made
        // while a Service's has its addresses and ports, and falls silent when a Service's takes them.
        let late = open_from(&node1.pods[0], from, direct);
        assert_eq!(late.expect_err("its place is taken").kind(), std::io::ErrorKind::TimedOut);
        for round in 0..10 {
            for (number, talk) in talks.iter_mut().enumerate() {
                talk.say("beside each other", &format!("connection {number}, round {round}"));
            }
        }
        port += 1;
        let from = SocketAddr::new(node1.inner(10)[family], port);
        let mut early = begin(from, direct);
        early.say("alone", "words");
        begin(from, one).say("the Service's", "words");
    }
}

#[test]
fn a_connection_from_outside_outlives_both_agents() {
    for (encap, underlay) in [("vxlan", Underlay::V4), ("wireguard", Underlay::V6)] {
        let mut mesh = services(2, encap, underlay);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let _servers = [
            Who::start("near", &node1.pods[1], &node1.inner(11)),
            Who::start("far", &node2.pods[0], &node2.inner(10)),
        ];
        for (name, number, which) in [("near", 1, (1, 11)), ("far", 2, (2, 10))] {
            let node_port = NODE_PORT + u16::from(number);
            Service { node_port, ..service(name, number, pods(&mesh, &[which])) }.write(&mesh.lab);
        }
        let here = mesh.lab.outer(node1);
        let at = |number| SocketAddr::new(here, NODE_PORT + number);
        let begin = |client: &Netns, number: u16, server: &str, seen: Option<IpAddr>| {
            asked(client, None, at(number), Over::Tcp);
            let talk = Talk::begin(encap, server, open(client, None, at(number)).expect("a connection"));
            assert!(seen.is_none_or(|seen| talk.seen.ip() == seen), "{encap}: {}", talk.seen);
            talk
        };
        let outside = Some(mesh.lab.outside());
        let mut talks = [
            begin(&mesh.lab.switch, 1, "near", outside),
            begin(&mesh.lab.switch, 2, "far", outside),
            begin(&node1.ns, 1, "near", Some(loop_address(here))),
            begin(&node1.ns, 2, "far", None),
            begin(&node1.pods[0], 2, "far", None),
        ];
        mesh.agents[0].wait_saved(&mesh.lab, node2);
        mesh.agents[1].wait_saved(&mesh.lab, node1);
        for round in 0..2 {
            for index in [0, 1] {
                mesh.agents[index].kill();
                let node = &mesh.lab.nodes[index];
                mesh.agents[index].restart(&mesh.lab, node);
                for (number, talk) in talks.iter_mut().enumerate() {
                    let what =
                        format!("{encap}, {underlay:?}, connection {number}, agent {} killed", index + 1);
                    talk.say(&what, &format!("{what}, round {round}"));
                }
            }
        }
        // And new ones.
        let node1 = &mesh.lab.nodes[0];
        for client in [&mesh.lab.switch, &node1.ns] {
            wait_for("new connections", SOON, || open(client, None, at(2)).ok());
        }
    }
}
