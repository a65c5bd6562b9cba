//! Random changes and packets: a whole lane against a model that is simple enough to be right.
//!
//! The model does not know which endpoint a flow will get. It knows which it may get, that it keeps it as
//! long as that is there, that answers come back as the Service's, and that no two living flows look alike
//! to an endpoint. All within the time in which no flow expires, over IPv4 and over IPv6.

use std::collections::HashMap;

use proptest::prelude::*;

use super::services::{ends, one, tcp_between, udp_between};
use super::*;
use crate::snapshot::service::{
    Endpoint, Frontend, Known, LOOP_V4, LOOP_V6, Listen, Protocol, ServicePort, ServiceTable, Way,
};

/// An address and a port. The model thinks in IPv4; [`address`] says what that is over IPv6.
type End = ([u8; 4], u16);

const CLIENTS: [[u8; 4]; 4] = [[10, 244, 9, 5], [10, 244, 9, 6], [10, 244, 9, 0], [203, 0, 113, 9]];
const ENDPOINTS: [End; 6] = [
    ([10, 244, 0, 5], 8080),
    ([10, 244, 1, 5], 8080),
    ([10, 244, 0, 5], 9090),
    ([10, 244, 9, 5], 8080),
    ([10, 244, 9, 6], 8080),
    ([10, 244, 9, 0], 8080),
];
const SERVICES: u8 = 3;

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// A Service has these endpoints now (a bit each).
    Endpoints { service: u8, set: u8 },
    /// A client sends to a Service.
    Ask { client: usize, port: u16, service: u8, tcp: bool },
    /// A client sends to an endpoint itself.
    Direct { client: usize, port: u16, endpoint: usize },
    /// The n-th flow is answered.
    Answer { flow: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let client = 0..CLIENTS.len();
    let port = 4000_u16..4003;
    prop_oneof![
        2 => (0..SERVICES, 0_u8..64).prop_map(|(service, set)| Step::Endpoints { service, set }),
        6 => (client.clone(), port.clone(), 0..SERVICES, any::<bool>())
            .prop_map(|(client, port, service, tcp)| Step::Ask { client, port, service, tcp }),
        2 => (client, port, 0..ENDPOINTS.len())
            .prop_map(|(client, port, endpoint)| Step::Direct { client, port, endpoint }),
        4 => (0..64_usize).prop_map(|flow| Step::Answer { flow }),
    ]
}

/// A living flow: how it left us, and the endpoint it went to.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Flow {
    asked: End,
    client: End,
    seen_as: End,
    endpoint: End,
    tcp: bool,
}

#[derive(Default)]
struct Model {
    /// The endpoints of each Service.
    endpoints: [Vec<End>; SERVICES as usize],
    /// By protocol, client and where it sends.
    flows: HashMap<(bool, End, End), Flow>,
    order: Vec<(bool, End, End)>,
}

fn vip(service: u8) -> End {
    ([10, 96, 0, service], 80)
}

fn node_port(service: u8) -> End {
    (LOOP_V4.octets(), 30_000 + u16::from(service))
}

/// The address as it is in packets and tables.
fn address(v6: bool, octets: [u8; 4]) -> IpAddr {
    match v6 {
        false => octets.into(),
        true if octets == LOOP_V4.octets() => LOOP_V6.into(),
        true => {
            let [a, b, c, d] = octets.map(u16::from);
            std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, a << 8 | b, c << 8 | d).into()
        }
    }
}

/// The same, back again.
fn octets(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(LOOP_V6) => LOOP_V4.octets(),
        IpAddr::V6(v6) => v6.octets()[12..].try_into().expect("four octets"),
    }
}

/// The world of the other tests, and the same pods with IPv6 addresses.
fn world_of(v6: bool) -> World {
    let mut world = world();
    if v6 {
        let mesh = Arc::get_mut(&mut world.snapshot.mesh).expect("nobody has it yet");
        let range = |octets, bits| ipnet::IpNet::new(address(true, octets), bits).expect("a range");
        mesh.routes.insert(range([10, 244, 9, 0], 120), Owner::LocalPod);
        mesh.routes.insert(range([10, 244, 9, 0], 128), Owner::LocalNode);
        for peer in 0..2 {
            mesh.routes.insert(range([10, 244, peer, 0], 120), Owner::PeerPod(PeerId(peer.into())));
        }
        let local = Arc::get_mut(&mut world.snapshot.local).expect("nobody has it yet");
        let IpAddr::V6(own) = address(true, [10, 244, 9, 0]) else { unreachable!("asked for IPv6") };
        local.address_v6 = Some(own);
    }
    world
}

impl Model {
    fn table(&self, v6: bool) -> Arc<ServiceTable> {
        let mut table = ServiceTable::default();
        for (service, endpoints) in (0..SERVICES).zip(&self.endpoints) {
            let endpoint = |end: &End| Endpoint { address: address(v6, end.0), port: end.1 };
            let mut cluster: Vec<Endpoint> = endpoints.iter().map(endpoint).collect();
            cluster.sort();
            let port = Arc::new(ServicePort {
                id: u32::from(service) + 1,
                name: format!("default/s{service}:web").into(),
                affinity: 0,
                internal_local: false,
                external_local: false,
                local: Box::default(),
                anywhere: !cluster.is_empty(),
                known: cluster.iter().map(|e| Known { endpoint: *e, serving: true }).collect(),
                sources: Box::default(),
                cluster: cluster.into(),
            });
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                for (at, way) in [(vip(service), Way::Cluster), (node_port(service), Way::NodePort)] {
                    let listen = Listen { address: address(v6, at.0), protocol, port: at.1 };
                    table.listen(listen, Frontend { way, port: Arc::clone(&port) });
                }
            }
            table.put_port(port);
        }
        table.set_complete();
        Arc::new(table)
    }

    fn remember(&mut self, key: (bool, End, End), flow: Flow) {
        let looks_like = |other: &Flow| {
            (other.tcp, other.seen_as, other.endpoint) == (flow.tcp, flow.seen_as, flow.endpoint)
        };
        let twin = self.flows.iter().find(|(other, twin)| **other != key && looks_like(twin));
        assert_eq!(twin, None, "{flow:?} looks like another flow");
        if self.flows.insert(key, flow).is_none() {
            self.order.push(key);
        }
    }
}

fn packet(v6: bool, tcp: bool, from: End, to: End, flags: &str) -> Vec<u8> {
    let (IpAddr::V6(source), IpAddr::V6(destination)) = (address(v6, from.0), address(v6, to.0)) else {
        return if tcp { tcp_between(from, to, flags) } else { udp_between(from, to, b"payload") };
    };
    let mut packet = Vec::new();
    let ip = etherparse::PacketBuilder::ipv6(source.octets(), destination.octets(), 64);
    let written = match tcp {
        true => {
            let tcp = ip.tcp(from.1, to.1, 1, 100).syn();
            let tcp = if flags.contains('A') { tcp.ack(1) } else { tcp };
            tcp.write(&mut packet, &[])
        }
        false => ip.udp(from.1, to.1).write(&mut packet, b"payload"),
    };
    written.expect("a packet");
    packet
}

/// Source and destination of a packet, which must be right.
fn ends_of(packet: &[u8]) -> (End, End) {
    let headers = parse(packet).expect("a packet");
    if headers.source.is_ipv4() {
        return ends(packet);
    }
    assert!(crate::packet::checksum::verify_transport(packet, &headers), "checksum");
    let (from, to) = headers.ports().expect("ports");
    ((octets(headers.source), from), (octets(headers.destination), to))
}

/// The one packet that came out, wherever.
fn out((frames, datagrams): Left) -> Vec<u8> {
    one(frames.into_iter().chain(datagrams.into_iter().map(|(_, packet)| packet)).collect())
}

fn run(steps: &[Step], v6: bool) {
    let mut world = world_of(v6);
    let mut model = Model::default();
    world.snapshot.services = model.table(v6);
    for step in steps {
        world.now += std::time::Duration::from_millis(10);
        match *step {
            Step::Endpoints { service, set } => {
                let in_set = |(bit, _): &(usize, &End)| set >> bit & 1 == 1;
                let chosen = ENDPOINTS.iter().enumerate().filter(in_set).map(|(_, end)| *end).collect();
                model.endpoints[usize::from(service)] = chosen;
                world.snapshot.services = model.table(v6);
            }
            Step::Ask { client, port, service, tcp } => {
                ask(&mut world, &mut model, client, port, service, (tcp, v6))
            }
            Step::Direct { client, port, endpoint } => {
                let (from, to) = ((CLIENTS[client], port), ENDPOINTS[endpoint]);
                // The rest never comes to the loop.
                if from.0[..2] == [10, 244] && from.0[2] == 9 && to.0[2] != 9 {
                    let sent = ends_of(&out(world.take_frame(&packet(v6, false, from, to, "S"))));
                    assert_eq!((sent.1, sent.0.0), (to, from.0));
                    let flow = Flow { asked: to, client: from, seen_as: sent.0, endpoint: to, tcp: false };
                    let before = model.flows.get(&(false, from, to)).copied();
                    assert!(before.is_none_or(|before| before == flow), "{before:?} became {flow:?}");
                    model.remember((false, from, to), flow);
                }
            }
            Step::Answer { flow } => {
                let Some(key) = model.order.get(flow).filter(|key| model.flows.contains_key(*key)) else {
                    continue;
                };
                let flow = model.flows[key];
                let answer = packet(v6, flow.tcp, flow.endpoint, flow.seen_as, "SA");
                let left = match flow.endpoint.0[2] {
                    9 => world.take_frame(&answer),
                    peer => world.take_datagram(peer, &answer),
                };
                assert_eq!(ends_of(&out(left)), (flow.asked, flow.client), "an answer to {flow:?}");
            }
        }
    }
}

fn ask(world: &mut World, model: &mut Model, client: usize, port: u16, service: u8, (tcp, v6): (bool, bool)) {
    let from = (CLIENTS[client], port);
    // Who comes from outside comes by a node port.
    let to = if client == 3 { node_port(service) } else { vip(service) };
    let key = (tcp, from, to);
    let endpoints = &model.endpoints[usize::from(service)];
    let (frames, datagrams) = world.take_frame(&packet(v6, tcp, from, to, "S"));
    let before = model.flows.get(&key).copied();
    if endpoints.is_empty() {
        assert!(datagrams.is_empty());
        // A reset always; of ICMP errors there are only so many.
        assert!(frames.len() == 1 || (frames.is_empty() && !tcp), "{frames:?}");
        for answer in frames {
            assert_eq!(parse(&answer).expect("a refusal").destination, address(v6, from.0));
        }
        model.flows.remove(&key);
        return;
    }
    let (seen_as, endpoint) = ends_of(&out((frames, datagrams)));
    assert!(endpoints.contains(&endpoint), "{endpoint:?} is not one of {endpoints:?}");
    let flow = Flow { asked: to, client: from, seen_as, endpoint, tcp };
    if let Some(before) = before.filter(|before| endpoints.contains(&before.endpoint)) {
        assert_eq!(before, flow, "a flow keeps its endpoint and its source");
    }
    let keeps_source = endpoint.0[2] != 9 || (client != 2 && from.0 != endpoint.0);
    let expected = if keeps_source { from.0 } else { LOOP_V4.octets() };
    assert_eq!(seen_as.0, expected, "the source that {endpoint:?} sees");
    model.flows.remove(&key);
    model.remember(key, flow);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn the_loop_does_what_the_model_says(steps in prop::collection::vec(step(), 1..80)) {
        run(&steps, false);
        run(&steps, true);
    }
}
