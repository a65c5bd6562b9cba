//! Services: from every client to every kind of endpoint and back, as packets on the two sides of a lane.

use proptest::prelude::*;

use super::*;
use crate::packet::L4;
use crate::packet::checksum::verify_transport;
use crate::packet::icmp::{IcmpError, build_error, quoted};
use crate::packet::vnet::VnetHdr;
use crate::snapshot::service::{
    Endpoint, Frontend, Known, LOOP_V4, Listen, Protocol, ServicePort, ServiceTable, Way,
};

const VIP: [u8; 4] = [10, 96, 0, 10];
const LOOP: [u8; 4] = LOOP_V4.octets();
const OTHER: [u8; 4] = [10, 244, 9, 6];
const ME: [u8; 4] = [10, 244, 9, 0];
const SYN: &str = "S";

/// A Service on port 80 of its ClusterIP and port 30080 of every node, for TCP and UDP.
struct Service {
    endpoints: Vec<([u8; 4], u16)>,
    gone: Vec<([u8; 4], u16)>,
    affinity: u32,
    external_local: bool,
    sources: Vec<&'static str>,
}

fn service(endpoints: &[[u8; 4]]) -> Service {
    Service {
        endpoints: endpoints.iter().map(|address| (*address, 8080)).collect(),
        gone: Vec::new(),
        affinity: 0,
        external_local: false,
        sources: Vec::new(),
    }
}

fn endpoint((address, port): &([u8; 4], u16)) -> Endpoint {
    Endpoint { address: (*address).into(), port: *port }
}

impl Service {
    fn table(&self) -> Arc<ServiceTable> {
        let mut table = ServiceTable::default();
        let mut cluster: Vec<Endpoint> = self.endpoints.iter().map(endpoint).collect();
        cluster.sort();
        let local = cluster.iter().filter(|e| e.address.to_string().starts_with("10.244.9.")).copied();
        let mut known: Vec<Known> =
            cluster.iter().map(|endpoint| Known { endpoint: *endpoint, serving: true }).collect();
        known.extend(self.gone.iter().map(|gone| Known { endpoint: endpoint(gone), serving: false }));
        known.sort();
        let port = Arc::new(ServicePort {
            id: 7,
            name: "default/web:http".into(),
            affinity: self.affinity,
            internal_local: false,
            external_local: self.external_local,
            local: local.clone().collect(),
            anywhere: !cluster.is_empty(),
            known: known.into(),
            sources: self.sources.iter().map(|range| range.parse().expect("range")).collect(),
            cluster: cluster.into(),
        });
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let at = |address: [u8; 4], port| Listen { address: address.into(), protocol, port };
            let frontend = |way| Frontend { way, port: Arc::clone(&port) };
            table.listen(at(VIP, 80), frontend(Way::Cluster));
            table.listen(at(LOOP, 30080), frontend(Way::NodePort));
            table.listen(at(LOOP, 1234), frontend(Way::LoadBalancer));
            for endpoint in &*port.local {
                table.expose(Listen { address: endpoint.address, protocol, port: endpoint.port });
            }
        }
        table.put_port(port);
        table.set_complete();
        Arc::new(table)
    }
}

fn serving(service: &Service) -> World {
    let mut world = world();
    world.serve(service);
    world
}

impl World {
    fn serve(&mut self, service: &Service) {
        self.snapshot.services = service.table();
    }

    fn total(&self, total: Total) -> u64 {
        self.lane.counters.total(total)
    }
}

pub(super) fn udp_between(from: ([u8; 4], u16), to: ([u8; 4], u16), payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = etherparse::PacketBuilder::ipv4(from.0, to.0, 64).udp(from.1, to.1);
    builder.write(&mut packet, payload).expect("a packet");
    packet
}

pub(super) fn tcp_between(from: ([u8; 4], u16), to: ([u8; 4], u16), flags: &str) -> Vec<u8> {
    tcp(from.0, to.0, (from.1, to.1), 1, flags)
}

/// Source and destination of a packet, which must be right.
pub(super) fn ends(packet: &[u8]) -> (([u8; 4], u16), ([u8; 4], u16)) {
    let headers = parse(packet).expect("a packet");
    assert!(verify_transport(packet, &headers), "checksum");
    let octets = |address| match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(_) => panic!("IPv4 only here"),
    };
    let (from, to) = headers.ports().expect("ports");
    ((octets(headers.source), from), (octets(headers.destination), to))
}

pub(super) fn one<T: std::fmt::Debug>(mut list: Vec<T>) -> T {
    assert_eq!(list.len(), 1, "{list:?}");
    list.remove(0)
}

#[test]
fn from_a_pod_to_an_endpoint_elsewhere_and_back() {
    let mut world = serving(&service(&[PEERS[1]]));
    let (frames, datagrams) = world.take_frame(&tcp_between((OURS, 4000), (VIP, 80), SYN));
    assert_eq!(frames, Vec::<Vec<u8>>::new());
    let (to, packet) = one(datagrams);
    assert_eq!(
        (to, ends(&packet)),
        (outer(1), ((OURS, 4000), (PEERS[1], 8080))),
        "the pod keeps its address"
    );
    let answer = tcp_between((PEERS[1], 8080), (OURS, 4000), "SA");
    let (frames, datagrams) = world.take_datagram(1, &answer);
    assert!(datagrams.is_empty());
    assert_eq!(ends(&one(frames)), ((VIP, 80), (OURS, 4000)));
    assert_eq!((world.drops(), world.total(Total::SourcesRewritten)), (vec![], 0));
}

#[test]
fn from_a_pod_to_one_on_the_same_node_and_back() {
    let mut world = serving(&service(&[OTHER]));
    let (frames, _) = world.take_frame(&udp_between((OURS, 4000), (VIP, 80), b"question"));
    assert_eq!(ends(&one(frames)), ((OURS, 4000), (OTHER, 8080)));
    // The kernel marks the answer, and sends it up here.
    let (frames, _) = world.take_frame(&udp_between((OTHER, 8080), (OURS, 4000), b"answer"));
    assert_eq!(ends(&one(frames)), ((VIP, 80), (OURS, 4000)));
    assert_eq!((world.drops(), world.total(Total::SourcesRewritten)), (vec![], 0));
}

#[test]
fn where_no_reply_would_find_back_the_source_is_the_loops() {
    for (client, endpoint, what) in [
        (OURS, OURS, "a pod through its Service to itself"),
        (ME, OTHER, "a process of this node to a pod of it"),
        (ME, ME, "a process to another one of this node"),
        (ME, OUTSIDE, "a process of this node to an endpoint outside"),
    ] {
        let mut world = serving(&service(&[endpoint]));
        let (frames, datagrams) = world.take_frame(&udp_between((client, 4000), (VIP, 80), b"question"));
        assert!(datagrams.is_empty(), "{what}");
        assert_eq!(ends(&one(frames)), ((LOOP, 4000), (endpoint, 8080)), "{what}");
        let (frames, _) = world.take_frame(&udp_between((endpoint, 8080), (LOOP, 4000), b"answer"));
        assert_eq!(ends(&one(frames)), ((VIP, 80), (client, 4000)), "{what}");
        assert_eq!((world.drops(), world.total(Total::SourcesRewritten)), (vec![], 1), "{what}");
    }
    // The kernel masquerades pods to the world, and brings the answer back by its mark.
    let mut world = serving(&service(&[OUTSIDE]));
    let (frames, _) = world.take_frame(&udp_between((OURS, 4000), (VIP, 80), b"question"));
    assert_eq!(ends(&one(frames)), ((OURS, 4000), (OUTSIDE, 8080)));
    let (frames, _) = world.take_frame(&udp_between((OUTSIDE, 8080), (OURS, 4000), b"answer"));
    assert_eq!(ends(&one(frames)), ((VIP, 80), (OURS, 4000)));
}

#[test]
fn a_client_outside_keeps_its_address_across_nodes() {
    // On the node where it comes in.
    let mut entrance = serving(&service(&[PEERS[0]]));
    let (_, datagrams) = entrance.take_frame(&tcp_between((OUTSIDE, 5000), (LOOP, 30080), SYN));
    let (to, packet) = one(datagrams);
    assert_eq!((to, ends(&packet)), (outer(0), ((OUTSIDE, 5000), (PEERS[0], 8080))));
    let (frames, _) = entrance.take_datagram(0, &tcp_between((PEERS[0], 8080), (OUTSIDE, 5000), "SA"));
    assert_eq!(ends(&one(frames)), ((LOOP, 30080), (OUTSIDE, 5000)), "the kernel has the rest");
    assert_eq!(entrance.drops(), []);
    // Nothing else leaves to the world by a peer's word.
    let stray = tcp_between((PEERS[0], 8080), (OUTSIDE, 5001), "SA");
    assert_eq!(entrance.take_datagram(0, &stray), (vec![], vec![]));
    assert_eq!(entrance.drops(), [DropReason::NotOurs]);

    // On the node of the endpoint.
    let mut home = serving(&service(&[OURS]));
    let question = tcp_between((OUTSIDE, 5000), (OURS, 8080), SYN);
    let (frames, _) = home.take_datagram(1, &question);
    assert_eq!(one(frames), question);
    let (_, datagrams) = home.take_frame(&tcp_between((OURS, 8080), (OUTSIDE, 5000), "SA"));
    let (to, packet) = one(datagrams);
    assert_eq!(
        (to, ends(&packet)),
        (outer(1), ((OURS, 8080), (OUTSIDE, 5000))),
        "back through the same node"
    );
    assert_eq!(home.drops(), []);
    // The same by another node, with the same port: the first has it.
    assert_eq!(home.take_datagram(0, &question), (vec![], vec![]));
    assert_eq!(home.drops(), [DropReason::SpoofedSource]);
}

#[test]
fn a_stranger_reaches_only_what_is_shown_to_the_world() {
    for (from, to, what) in [
        (OUTSIDE, (OURS, 8081), "another port"),
        (OUTSIDE, (OTHER, 8080), "another pod"),
        (PEERS[1], (OURS, 8080), "with another node's address"),
        (OTHER, (OURS, 8080), "with our own address"),
        (LOOP, (OURS, 8080), "with the loop's address"),
    ] {
        let mut world = serving(&service(&[OURS]));
        assert_eq!(world.take_datagram(0, &tcp_between((from, 5000), to, SYN)), (vec![], vec![]), "{what}");
        assert_eq!(world.drops(), [DropReason::SpoofedSource], "{what}");
    }
}

#[test]
fn another_node_as_client_of_a_third_gets_our_address() {
    // A node port here, spoken to by another node, with an endpoint on a third.
    let mut world = serving(&service(&[PEERS[0]]));
    let (_, datagrams) = world.take_frame(&tcp_between((PEERS[1], 5000), (LOOP, 30080), SYN));
    assert_eq!(ends(&one(datagrams).1), ((ME, 5000), (PEERS[0], 8080)));
    let (frames, _) = world.take_datagram(0, &tcp_between((PEERS[0], 8080), (ME, 5000), "SA"));
    assert_eq!(ends(&one(frames)), ((LOOP, 30080), (PEERS[1], 5000)));
    assert_eq!(world.drops(), []);
}

#[test]
fn loopback_clients_of_a_node_port_are_this_node() {
    let mut world = serving(&service(&[PEERS[0]]));
    let (_, datagrams) = world.take_frame(&tcp_between(([127, 0, 0, 1], 5000), (LOOP, 30080), SYN));
    assert_eq!(ends(&one(datagrams).1), ((ME, 5000), (PEERS[0], 8080)));
    assert_eq!(world.take_frame(&tcp_between(([127, 0, 0, 1], 5000), (VIP, 80), SYN)), (vec![], vec![]));
    assert_eq!(world.drops(), [DropReason::MartianAddress]);
}

#[test]
fn nobody_there_is_said_at_once() {
    let empty = service(&[]);
    for (to, reason) in [
        ((VIP, 80), DropReason::NoServiceEndpoint),
        ((VIP, 81), DropReason::ServicePortClosed),
        ((LOOP, 30080), DropReason::NoServiceEndpoint),
        ((LOOP, 31000), DropReason::ServicePortClosed),
    ] {
        let mut world = serving(&empty);
        let (frames, _) = world.take_frame(&tcp_between((OURS, 4000), to, SYN));
        let reset = one(frames);
        assert_eq!(ends(&reset), (to, (OURS, 4000)));
        assert!(matches!(parse(&reset).expect("a packet").l4, L4::Tcp { flags, .. } if flags & 4 != 0));
        assert_eq!(world.drops(), [reason]);

        let mut world = serving(&empty);
        let question = udp_between((OURS, 4000), to, b"question");
        let (frames, _) = world.take_frame(&question);
        let error = one(frames);
        let headers = parse(&error).expect("a packet");
        assert_eq!((error[20], error[21], headers.destination), (3, 3, OURS.into()), "port unreachable");
        assert_eq!(quoted(&error, &headers).expect("a quote").headers.destination, IpAddr::from(to.0));
        assert_eq!(world.drops(), [reason]);
    }
}

#[test]
fn local_policy_drops_in_silence_where_others_could_answer() {
    let local = Service { external_local: true, ..service(&[PEERS[0]]) };
    let mut world = serving(&local);
    assert_eq!(world.take_frame(&tcp_between((OUTSIDE, 4000), (LOOP, 30080), SYN)), (vec![], vec![]));
    assert_eq!(world.drops(), [DropReason::NoLocalEndpoint]);
    // Pods of this node have no other node to go to.
    let (_, datagrams) = world.take_frame(&tcp_between((OURS, 4000), (LOOP, 30080), SYN));
    assert_eq!(ends(&one(datagrams).1), ((OURS, 4000), (PEERS[0], 8080)));
}

#[test]
fn source_ranges_bind_the_load_balancers_way_only() {
    let guarded = Service { sources: vec!["198.51.100.0/24"], ..service(&[OURS]) };
    let mut world = serving(&guarded);
    assert_eq!(world.take_frame(&tcp_between((OUTSIDE, 4000), (LOOP, 1234), SYN)), (vec![], vec![]));
    assert_eq!(world.drops(), [DropReason::ClientNotAllowed]);
    assert_eq!(world.take_frame(&tcp_between((OUTSIDE, 4000), (LOOP, 30080), SYN)).0.len(), 1);
    assert_eq!(world.take_frame(&tcp_between(([198, 51, 100, 7], 4000), (LOOP, 1234), SYN)).0.len(), 1);
}

#[test]
fn an_endpoint_that_goes_takes_no_flow_with_it() {
    let (first, second) = (PEERS[0], PEERS[1]);
    let mut world = serving(&service(&[first]));
    let udp = udp_between((OURS, 4000), (VIP, 80), b"question");
    let syn = tcp_between((OURS, 4001), (VIP, 80), SYN);
    let ack = tcp_between((OURS, 4001), (VIP, 80), "A");
    assert_eq!(world.take_frame(&udp).1[0].0, outer(0));
    assert_eq!(world.take_frame(&syn).1[0].0, outer(0));
    world.take_datagram(0, &tcp_between((first, 8080), (OURS, 4001), "SA"));
    assert_eq!(world.take_frame(&ack).1[0].0, outer(0));

    // Not serving, but not gone: datagrams move on, the connection may come to its end.
    world.serve(&Service { gone: vec![(first, 8080)], ..service(&[second]) });
    assert_eq!(world.take_frame(&udp).1[0].0, outer(1));
    assert_eq!(world.take_frame(&ack).1[0].0, outer(0));
    // Gone: the connection is reset, and what it may begin anew goes elsewhere.
    world.serve(&service(&[second]));
    let (frames, datagrams) = world.take_frame(&ack);
    assert!(datagrams.is_empty());
    assert_eq!(ends(&one(frames)), ((VIP, 80), (OURS, 4001)));
    assert_eq!(world.take_frame(&syn).1[0].0, outer(1));
    assert_eq!(world.drops(), [DropReason::EndpointGone]);

    // Nobody at all, and then somebody: datagrams find him with their next packet.
    world.serve(&service(&[]));
    assert_eq!(parse(&world.take_frame(&udp).0[0]).expect("a packet").protocol, 1);
    world.serve(&service(&[first]));
    assert_eq!(world.take_frame(&udp).1[0].0, outer(0));
}

#[test]
fn connections_outlive_a_restart_that_knows_no_services_yet() {
    let mut world = serving(&service(&[PEERS[0]]));
    world.take_frame(&tcp_between((OURS, 4001), (VIP, 80), SYN));
    world.take_datagram(0, &tcp_between((PEERS[0], 8080), (OURS, 4001), "SA"));
    world.snapshot.services = Arc::default();
    let ack = tcp_between((OURS, 4001), (VIP, 80), "A");
    assert_eq!(world.take_frame(&ack).1[0].0, outer(0));
    // And a connection that nobody knows is reset, not sent to somebody.
    world.serve(&service(&[PEERS[0]]));
    let (frames, datagrams) = world.take_frame(&tcp_between((OURS, 4002), (VIP, 80), "A"));
    assert_eq!((frames.len(), datagrams.len()), (1, 0));
    assert_eq!(world.drops(), [DropReason::UnknownConnection]);
}

#[test]
fn flows_that_would_be_taken_for_each_other_get_other_ports() {
    let mut world = serving(&service(&[PEERS[0]]));
    let (to, first) = one(world.take_frame(&udp_between((OURS, 4000), (PEERS[0], 8080), b"direct")).1);
    assert_eq!((to, ends(&first)), (outer(0), ((OURS, 4000), (PEERS[0], 8080))));
    let second = one(world.take_frame(&udp_between((OURS, 4000), (VIP, 80), b"by the Service")).1).1;
    let third = one(world.take_frame(&udp_between((OURS, 4000), (LOOP, 30080), b"by the port")).1).1;
    let ports = [&first, &second, &third].map(|packet| ends(packet).0.1);
    assert!(ports[1] != 4000 && ports[2] != 4000 && ports[1] != ports[2], "{ports:?}");
    assert_eq!(world.total(Total::SourcePortsChanged), 2);
    for (port, expected) in ports.into_iter().zip([(PEERS[0], 8080), (VIP, 80), (LOOP, 30080)]) {
        let (frames, _) = world.take_datagram(0, &udp_between((PEERS[0], 8080), (OURS, port), b"answer"));
        assert_eq!(ends(&one(frames)), (expected, (OURS, 4000)));
    }
    // The other way round: the Service's flow is there first.
    let mut world = serving(&service(&[PEERS[0]]));
    world.take_frame(&tcp_between((OURS, 4000), (VIP, 80), SYN));
    let direct = one(world.take_frame(&tcp_between((OURS, 4000), (PEERS[0], 8080), SYN)).1).1;
    assert_ne!(ends(&direct).0.1, 4000);
    let port = ends(&direct).0.1;
    let (frames, _) = world.take_datagram(0, &tcp_between((PEERS[0], 8080), (OURS, port), "SA"));
    assert_eq!(ends(&one(frames)), ((PEERS[0], 8080), (OURS, 4000)));
    assert_eq!(world.drops(), []);
}

#[test]
fn one_client_can_use_up_all_ports_to_one_endpoint() {
    let mut world = serving(&service(&[PEERS[0]]));
    world.lane.flows = Arc::new(FlowTable::in_memory(1 << 18, Seed(1, 2)).expect("a table"));
    let through_the_port = |port| udp_between((OUTSIDE, port), (LOOP, 30080), b"x");
    let to_the_balancer = |port| udp_between((OUTSIDE, port), (LOOP, 1234), b"x");
    // Every second one, and then those between them: no flow needs another port than its client's own.
    for port in (1024..=u16::MAX).step_by(2) {
        assert_eq!(world.take_frame(&through_the_port(port)).1.len(), 1, "{port}");
    }
    for port in (1024..1224).step_by(2) {
        let packet = one(world.take_frame(&to_the_balancer(port)).1).1;
        assert_ne!(ends(&packet).0.1, port, "half of all ports are free");
    }
    assert_eq!((world.drops(), world.total(Total::SourcePortsChanged)), (vec![], 100));
    for port in (1025..=u16::MAX).step_by(2) {
        world.take_frame(&through_the_port(port));
    }
    // Those that were given others' ports have found others again; somewhere it ended.
    let before = world.lane.counters.dropped(DropReason::NoSourcePort);
    for port in (2024..2124).step_by(2) {
        assert_eq!(world.take_frame(&to_the_balancer(port)), (vec![], vec![]), "{port}");
    }
    assert_eq!(world.lane.counters.dropped(DropReason::NoSourcePort), before + 50);
    assert_eq!(world.drops(), [DropReason::NoSourcePort]);
    // The next client has all of them, and the first one towards another endpoint.
    let other = udp_between(([203, 0, 113, 2], 2024), (LOOP, 1234), b"x");
    assert_eq!(world.take_frame(&other).1.len(), 1);
    world.serve(&service(&[PEERS[1]]));
    assert_eq!(world.take_frame(&to_the_balancer(2024)).1.len(), 1);
}

#[test]
fn tcp_that_fits_no_state_is_not_translated() {
    let mut world = serving(&service(&[PEERS[0]]));
    let client = |flags| tcp_between((OURS, 4000), (VIP, 80), flags);
    let server = |flags| tcp_between((PEERS[0], 8080), (OURS, 4000), flags);
    let count = |world: &World| world.lane.counters.dropped(DropReason::InvalidTcp);
    assert_eq!(world.take_frame(&client(SYN)).1.len(), 1);
    // The end, before anybody has answered.
    assert_eq!(world.take_frame(&client("FA")), (vec![], vec![]));
    assert_eq!(count(&world), 1);
    assert_eq!(world.take_datagram(0, &server("SA")).0.len(), 1);
    assert_eq!(world.take_frame(&client("A")).1.len(), 1);
    // A server does not begin, and nobody begins and ends at once.
    for packet in [server(SYN), server("SF")] {
        assert_eq!(world.take_datagram(0, &packet), (vec![], vec![]));
    }
    assert_eq!(world.take_frame(&client("SFA")), (vec![], vec![]));
    assert_eq!((count(&world), world.drops()), (4, vec![DropReason::InvalidTcp]));
    // It hurt nobody.
    assert_eq!(ends(&one(world.take_frame(&client("A")).1).1), ((OURS, 4000), (PEERS[0], 8080)));
}

#[test]
fn a_client_with_affinity_comes_back_to_its_endpoint() {
    let endpoints = [PEERS[0], PEERS[1], OTHER, [10, 244, 0, 9], [10, 244, 1, 9]];
    let sticky = Service { affinity: 60, ..service(&endpoints) };
    let mut world = serving(&sticky);
    let to = |world: &mut World, port: u16| {
        let (frames, datagrams) = world.take_frame(&tcp_between((OURS, port), (VIP, 80), SYN));
        let packet = frames.into_iter().chain(datagrams.into_iter().map(|(_, packet)| packet)).next();
        ends(&packet.expect("a packet")).1.0
    };
    let first = to(&mut world, 4000);
    for port in 4001..4040 {
        assert_eq!(to(&mut world, port), first);
        world.now += std::time::Duration::from_secs(1);
    }
    // It goes: the client gets another one, and keeps that.
    let rest: Vec<[u8; 4]> = endpoints.into_iter().filter(|endpoint| *endpoint != first).collect();
    world.serve(&Service { affinity: 60, ..service(&rest) });
    let second = to(&mut world, 5000);
    assert_ne!(second, first);
    assert!((5001..5020).all(|port| to(&mut world, port) == second));
    world.serve(&sticky);
    assert!((5021..5040).all(|port| to(&mut world, port) == second));
    // Its time is over.
    world.now += std::time::Duration::from_secs(61);
    let mut others = std::collections::BTreeSet::new();
    for port in 6000..6040 {
        others.insert(to(&mut world, port));
        world.now += std::time::Duration::from_secs(61);
    }
    assert!(others.len() > 2, "{others:?}");
}

#[test]
fn errors_about_a_translated_flow_are_translated() {
    let mut world = serving(&service(&[PEERS[0]]));
    let question = udp_between((OURS, 4000), (VIP, 80), &[7; 600]);
    let sent = one(world.take_frame(&question).1).1;
    let mut room = [0; 1500];
    // From the endpoint (nobody listens), and from its node on the way (it does not fit).
    for (from, error, seen_from) in [
        (PEERS[0], IcmpError::PortUnreachable, VIP),
        ([10, 244, 0, 1], IcmpError::TooBig { mtu: 1300 }, [10, 244, 0, 1]),
    ] {
        let headers = parse(&sent).expect("a packet");
        let len = build_error(&mut room, error, from.into(), &sent, &headers).expect("an error");
        let (frames, _) = world.take_datagram(0, &room[..len]);
        let translated = one(frames);
        let headers = parse(&translated).expect("a packet");
        assert!(verify_transport(&translated, &headers));
        assert_eq!((headers.source, headers.destination), (seen_from.into(), OURS.into()));
        let quote = quoted(&translated, &headers).expect("a quote").headers;
        assert_eq!((quote.source, quote.destination), (OURS.into(), VIP.into()));
        assert_eq!(quote.ports(), Some((4000, 80)));
    }
    // And the other way: the client cannot take an answer.
    world.take_datagram(0, &udp_between((PEERS[0], 8080), (OURS, 4000), &[7; 600]));
    let answer = udp_between((VIP, 80), (OURS, 4000), &[7; 600]);
    let headers = parse(&answer).expect("a packet");
    let len =
        build_error(&mut room, IcmpError::PortUnreachable, OURS.into(), &answer, &headers).expect("one");
    let (to, translated) = one(world.take_frame(&room[..len]).1);
    let headers = parse(&translated).expect("a packet");
    assert_eq!((to, headers.source, headers.destination), (outer(0), OURS.into(), PEERS[0].into()));
    let quote = quoted(&translated, &headers).expect("a quote").headers;
    assert_eq!((quote.source, quote.ports()), (PEERS[0].into(), Some((8080, 4000))));
    assert_eq!(world.drops(), []);
}

#[test]
fn our_own_errors_speak_of_what_was_sent() {
    let mut world = serving(&service(&[PEERS[0]]));
    let mut packet = udp_between((OURS, 4000), (VIP, 80), &[7; 1460]);
    packet[6] |= 0x40; // must not be fragmented
    etherparse_checksum(&mut packet);
    let error = one(world.take_frame(&packet).0);
    let headers = parse(&error).expect("a packet");
    assert!(verify_transport(&error, &headers));
    assert_eq!((error[20], error[21]), (3, 4), "fragmentation needed");
    let quote = quoted(&error, &headers).expect("a quote").headers;
    assert_eq!((quote.destination, quote.ports()), (VIP.into(), Some((4000, 80))));
    assert_eq!((headers.source, headers.destination), (ME.into(), OURS.into()));
}

/// Sets the IPv4 header's checksum.
fn etherparse_checksum(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let sum = crate::packet::checksum::checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn a_super_packet_turns_round_whole() {
    let mut world = serving(&service(&[OTHER]));
    world.take_frame(&tcp_between((OURS, 1000), (VIP, 80), SYN));
    let mut packet = Vec::new();
    let builder = etherparse::PacketBuilder::ipv4(OURS, VIP, 64).tcp(1000, 80, 2, 100).ack(1);
    builder.write(&mut packet, &[7; 5000]).expect("a packet");
    packet[6] |= 0x40;
    etherparse_checksum(&mut packet);
    let vnet =
        VnetHdr { flags: 1, gso_type: 1, hdr_len: 40, gso_size: 1000, csum_start: 20, csum_offset: 16 };
    world.take_frame(&tcp_between((OTHER, 8080), (OURS, 1000), "SA"));
    let mut frame = [&vnet.encode()[..], &packet].concat();
    world.lane.handle_tun(world.now, &world.snapshot, &mut frame, &mut world.out);
    let (frames, datagrams) = world.results(&mut []);
    assert!(datagrams.is_empty());
    let frame = one(frames);
    assert_eq!(frame[40..], packet[40..], "one frame with all of it");
    let headers = parse(&frame).expect("a packet");
    assert_eq!((headers.source, headers.destination), (OURS.into(), OTHER.into()));
    assert_eq!(headers.ports(), Some((1000, 8080)));
    // As the kernel will find it: the pseudo-header's sum where the checksum is owed.
    let pseudo = crate::packet::checksum::pseudo_header(headers.source, headers.destination, 6, 5020);
    let before = crate::packet::checksum::pseudo_header(OURS.into(), VIP.into(), 6, 5020);
    let fold = crate::packet::checksum::fold;
    let field = |bytes: &[u8]| u16::from_be_bytes([bytes[36], bytes[37]]);
    let moved = u32::from(field(&packet)) + u32::from(!fold(before)) + u32::from(fold(pseudo));
    assert_eq!(fold(moved), field(&frame), "the sum followed the addresses");
    assert_eq!(world.drops(), []);
}

/// An IPv4 packet in fragments of at most `size` bytes of payload each.
fn fragments(packet: &[u8], size: usize) -> Vec<Vec<u8>> {
    let payload = &packet[20..];
    let mut all = Vec::new();
    for (index, part) in payload.chunks(size).enumerate() {
        let mut fragment = packet[..20].to_vec();
        fragment.extend_from_slice(part);
        let more = if (index + 1) * size < payload.len() { 0x2000_u16 } else { 0 };
        let offset = (index * size / 8) as u16 | more;
        let len = fragment.len() as u16;
        fragment[2..4].copy_from_slice(&len.to_be_bytes());
        fragment[4..6].copy_from_slice(&77_u16.to_be_bytes());
        fragment[6..8].copy_from_slice(&offset.to_be_bytes());
        etherparse_checksum(&mut fragment);
        all.push(fragment);
    }
    all
}

fn whole(mut fragments: Vec<Vec<u8>>) -> Vec<u8> {
    fragments.sort_by_key(|fragment| u16::from_be_bytes([fragment[6], fragment[7]]) & 0x1fff);
    let mut packet = fragments[0][..20].to_vec();
    fragments.iter().for_each(|fragment| packet.extend_from_slice(&fragment[20..]));
    let len = packet.len() as u16;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet[6..8].fill(0);
    etherparse_checksum(&mut packet);
    packet
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn fragments_follow_their_first_in_any_order(order in Just((0..4_usize).collect::<Vec<_>>()).prop_shuffle()) {
        let mut world = serving(&service(&[PEERS[0]]));
        let question = udp_between((OURS, 4000), (VIP, 80), &[7; 2000]);
        let parts = fragments(&question, 512);
        prop_assert_eq!(parts.len(), 4);
        let sent: Vec<Vec<u8>> =
            order.iter().flat_map(|n| world.take_frame(&parts[*n]).1).map(|(_, packet)| packet).collect();
        prop_assert_eq!(sent.len(), 4);
        prop_assert_eq!(ends(&whole(sent)), ((OURS, 4000), (PEERS[0], 8080)));

        let answer = fragments(&udp_between((PEERS[0], 8080), (OURS, 4000), &[9; 2000]), 512);
        let got: Vec<Vec<u8>> = order.iter().flat_map(|n| world.take_datagram(0, &answer[*n]).0).collect();
        prop_assert_eq!(got.len(), 4);
        prop_assert_eq!(ends(&whole(got)), ((VIP, 80), (OURS, 4000)));
        prop_assert_eq!(world.drops(), []);
    }
}

#[test]
fn another_node_that_is_its_own_endpoint_is_answered() {
    // 10.244.1.0 is that node itself, behind a node port of ours.
    let mut world = serving(&service(&[PEERS[1]]));
    let (_, datagrams) = world.take_frame(&tcp_between((PEERS[1], 5000), (LOOP, 30080), SYN));
    assert_eq!(ends(&one(datagrams).1), ((ME, 5000), (PEERS[1], 8080)), "no loop address leaves the node");
    let (frames, _) = world.take_datagram(1, &tcp_between((PEERS[1], 8080), (ME, 5000), "SA"));
    assert_eq!(ends(&one(frames)), ((LOOP, 30080), (PEERS[1], 5000)));
}

#[test]
fn a_stranger_at_a_cluster_ip_gets_our_address() {
    let mut world = serving(&service(&[PEERS[0]]));
    let (_, datagrams) = world.take_frame(&tcp_between((OUTSIDE, 5000), (VIP, 80), SYN));
    assert_eq!(ends(&one(datagrams).1), ((ME, 5000), (PEERS[0], 8080)));
    let (frames, _) = world.take_datagram(0, &tcp_between((PEERS[0], 8080), (ME, 5000), "SA"));
    assert_eq!(ends(&one(frames)), ((VIP, 80), (OUTSIDE, 5000)));
}

#[test]
fn what_was_saved_before_resets_nothing() {
    let mut world = serving(&service(&[PEERS[0]]));
    world.take_frame(&tcp_between((OURS, 4001), (VIP, 80), SYN));
    world.take_datagram(0, &tcp_between((PEERS[0], 8080), (OURS, 4001), "SA"));
    // The last save did not know this endpoint yet; the source has not spoken.
    let mut saved = (*service(&[PEERS[1]]).table()).clone();
    saved.set_incomplete();
    world.snapshot.services = Arc::new(saved);
    let ack = tcp_between((OURS, 4001), (VIP, 80), "A");
    assert_eq!(world.take_frame(&ack).1[0].0, outer(0));
    // Nor is anybody told that there is nothing.
    assert_eq!(world.take_frame(&tcp_between((OURS, 4002), (VIP, 81), SYN)), (vec![], vec![]));
    world.serve(&service(&[PEERS[1]]));
    assert_eq!(world.take_frame(&ack).0.len(), 1, "now it is reset");
}

#[test]
fn one_client_by_two_nodes_to_one_endpoint() {
    // By our own node port first, and then by another node.
    let mut world = serving(&service(&[OURS]));
    world.take_frame(&udp_between((OUTSIDE, 5000), (LOOP, 30080), b"to us"));
    let (frames, _) = world.take_datagram(1, &udp_between((OUTSIDE, 5000), (OURS, 8080), b"to them"));
    let ((from, port), to) = ends(&one(frames));
    assert_eq!((from, to), (OUTSIDE, (OURS, 8080)));
    assert_ne!(port, 5000, "the pod can tell them apart");
    let (frames, _) = world.take_frame(&udp_between((OURS, 8080), (OUTSIDE, 5000), b"from us"));
    assert_eq!(ends(&one(frames)), ((LOOP, 30080), (OUTSIDE, 5000)));
    let (_, datagrams) = world.take_frame(&udp_between((OURS, 8080), (OUTSIDE, port), b"from them"));
    let (to, packet) = one(datagrams);
    assert_eq!((to, ends(&packet)), (outer(1), ((OURS, 8080), (OUTSIDE, 5000))));
    assert_eq!(world.drops(), []);

    // By one node, and after a while by another: the first may be gone.
    let mut world = serving(&service(&[OURS]));
    let question = udp_between((OUTSIDE, 5000), (OURS, 8080), b"question");
    assert_eq!(world.take_datagram(0, &question).0.len(), 1);
    assert_eq!(world.take_datagram(1, &question).0.len(), 0);
    world.now += std::time::Duration::from_millis(1_100);
    assert_eq!(world.take_datagram(1, &question).0.len(), 1);
    let (_, datagrams) = world.take_frame(&udp_between((OURS, 8080), (OUTSIDE, 5000), b"answer"));
    assert_eq!(one(datagrams).0, outer(1));
}

#[test]
fn errors_of_a_peer_end_here() {
    let mut world = serving(&service(&[OURS]));
    let question = udp_between((OUTSIDE, 5000), (OURS, 8080), b"question");
    world.take_datagram(0, &question);
    // About that flow, to the client: we are nobody's way out.
    let headers = parse(&question).expect("a packet");
    let mut room = [0; 1500];
    let error = IcmpError::PortUnreachable;
    let len = build_error(&mut room, error, [198, 51, 100, 66].into(), &question, &headers).expect("one");
    assert_eq!(world.take_datagram(0, &room[..len]), (vec![], vec![]));
    assert_eq!(world.drops(), [DropReason::SpoofedSource]);
}

#[test]
fn a_forged_reset_ends_nothing() {
    let mut world = serving(&service(&[PEERS[0]]));
    world.take_frame(&tcp_between((OURS, 4001), (VIP, 80), SYN));
    world.take_datagram(0, &tcp_between((PEERS[0], 8080), (OURS, 4001), "SA"));
    let ack = tcp_between((OURS, 4001), (VIP, 80), "A");
    world.take_frame(&ack);
    let mut reset = Vec::new();
    let builder = etherparse::PacketBuilder::ipv4(OURS, VIP, 64).tcp(4001, 80, 77_777, 100).rst();
    builder.write(&mut reset, &[]).expect("a packet");
    world.take_frame(&reset);
    // Whoever goes on, as whoever gets a reset out of its window does, takes it back.
    world.now += std::time::Duration::from_secs(9);
    assert_eq!(world.take_frame(&ack).1.len(), 1);
    world.now += std::time::Duration::from_secs(3600);
    assert_eq!(world.take_frame(&ack).1.len(), 1, "it is open as before");
    assert_eq!(world.drops(), []);
}

#[test]
fn a_stranger_is_not_sent_as_himself_to_who_takes_none() {
    let mut world = serving(&service(&[PEERS[0]]));
    let mut mesh = Mesh { routes: world.snapshot.mesh.routes.clone(), ..Mesh::default() };
    mesh.vxlan_sources = world.snapshot.mesh.vxlan_sources.clone();
    for peer in world.snapshot.mesh.peers.iter().flatten() {
        mesh.peers.push(Some(Arc::new(Peer { takes_strangers: false, ..(**peer).clone() })));
    }
    world.snapshot.mesh = Arc::new(mesh);
    let (_, datagrams) = world.take_frame(&tcp_between((OUTSIDE, 5000), (LOOP, 30080), SYN));
    assert_eq!(ends(&one(datagrams).1), ((ME, 5000), (PEERS[0], 8080)));
    let (frames, _) = world.take_datagram(0, &tcp_between((PEERS[0], 8080), (ME, 5000), "SA"));
    assert_eq!(ends(&one(frames)), ((LOOP, 30080), (OUTSIDE, 5000)));
}

#[test]
fn what_goes_back_into_the_tun_packet_by_packet_finds_room() {
    // The smallest that a kernel makes by itself, and an ordinary one.
    for size in [36_u16, 1379] {
        let mut world = serving(&service(&[[10, 244, 9, 5]]));
        world.out.tun.set_offloads(Offloads::default());
        let packet = udp_between((OURS, 4000), (VIP, 80), &[7; 64_000]);
        let vnet = VnetHdr {
            flags: 1, // NEEDS_CSUM, include/uapi/linux/virtio_net.h
            gso_type: crate::packet::vnet::GSO_UDP_L4,
            hdr_len: 28,
            gso_size: size,
            csum_start: 20,
            csum_offset: 6,
        };
        let frame = [&vnet.encode()[..], &packet].concat();
        let (mut reads, mut written) = (0, 0);
        while reads < 40 {
            let before = reads;
            while reads < 40 && world.out.has_room() {
                world.lane.handle_tun(world.now, &world.snapshot, &mut frame.clone(), &mut world.out);
                reads += 1;
            }
            assert!(reads > before, "an empty batch takes a read");
            written += world.results(&mut []).0.len();
        }
        assert_eq!((written, world.drops()), (40 * 64_000_usize.div_ceil(usize::from(size)), vec![]));
    }
}
