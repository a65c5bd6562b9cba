//! Random changes of Kubernetes objects, and packets between them: an agent's whole way from object to packet
//! against a model that is simple enough to be right ([`truth`]).
//!
//! The model does not know which endpoint a flow will get. It knows which it may get, that a client with
//! affinity gets its last one, that a flow keeps its own as long as that is there, what source an endpoint sees,
//! that answers come back as the Service's, and that no two living flows look alike to an endpoint. All within
//! the time in which no flow expires. A sequence that fails is made shorter, and printed with its seed.

mod truth;

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;

use super::objects::{Cluster, End, LOOP, address, ends_of, node, packet};
use super::*;
use crate::snapshot::service::Protocol;
use crate::state::source::Kind;
use truth::{
    At, CONDITIONS, Door, Fate, Hint, Member, PLACES, SERVICES, SLICES, Slice, Spec, Truth, Type, at,
};

/// Two pods of this node, the node itself, two strangers (of whom balancers with source ranges take only the first),
/// and a pod of `n0`, which comes by the doors of the node only.
const CLIENTS: [[u8; 4]; 6] =
    [[10, 244, 9, 5], [10, 244, 9, 6], [10, 244, 9, 0], [203, 0, 113, 9], [198, 18, 0, 9], [10, 244, 0, 7]];

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// A Service is so now, or gone.
    Service { service: usize, spec: Option<Spec> },
    /// A slice of it is so now, or gone.
    Slice { service: usize, number: usize, slice: Option<Slice> },
    /// Another node port for a Service that has one, which may be another's.
    NodePort { service: usize, node_port: u16 },
    /// One endpoint becomes ready, or unready, or leaves.
    Conditions { service: usize, number: usize, member: usize, conditions: usize },
    /// This node is in another zone, or in none.
    Zone(Option<&'static str>),
    /// A peer does Services, or not.
    Serves { peer: usize, serves: bool },
    /// Nothing, for a while.
    Wait(u64),
    /// A client sends to a Service: a SYN or a datagram.
    Ask { client: usize, port: u16, door: Door, tcp: bool, v6: bool },
    /// The client of the n-th flow sends what it sent first once more.
    Again(usize),
    /// A client sends to a pod of another node itself.
    Direct { client: usize, port: u16, peer: usize, v6: bool },
    /// The n-th flow is answered.
    Answer(usize),
    /// The client of the n-th flow, a connection, goes on.
    Continue(usize),
}

fn spec() -> impl Strategy<Value = Spec> {
    let kind = prop_oneof![
        2 => Just(Type::ClusterIp),
        2 => Just(Type::NodePort),
        2 => Just(Type::Balancer { proxy: false }),
        1 => Just(Type::Balancer { proxy: true }),
    ];
    let seldom = || prop::bool::weighted(0.25);
    let families = prop_oneof![4 => Just([true, true]), 1 => Just([true, false]), 1 => Just([false, true])];
    let doors = (kind, 30_000_u16..30_002, prop::option::weighted(0.3, 0_u8..2), families);
    let policies = (seldom(), seldom(), prop_oneof![2 => Just(0), 1 => 1_u16..3]);
    (doors, policies, (seldom(), seldom(), prop::bool::weighted(0.1))).prop_map(|(doors, policies, more)| {
        let (kind, node_port, external_ip, families) = doors;
        let (external_local, internal_local, affinity) = policies;
        let (publish, sources, foreign) = more;
        Spec {
            kind,
            node_port,
            external_ip,
            external_local,
            internal_local,
            affinity,
            publish,
            sources,
            families,
            foreign,
        }
    })
}

/// A slice as the controller writes it for one `trafficDistribution`, or as somebody did by hand.
fn slice() -> impl Strategy<Value = Slice> {
    let hint = || prop_oneof![4 => Just(Hint::None), 2 => Just(Hint::Zone), 2 => Just(Hint::Node), 1 => Just(Hint::Elsewhere)];
    let conditions = prop_oneof![3 => 0..2_usize, 2 => 0..CONDITIONS.len()];
    let members = prop::collection::vec((0..PLACES.len(), conditions, hint()), 0..6);
    (prop_oneof![3 => Just(8080_u16), 1 => Just(9090)], members, hint(), any::<bool>()).prop_map(
        |(port, members, same, by_hand)| {
            let hint = |own| if by_hand { own } else { same };
            let member = |(place, conditions, own)| Member { place, conditions, hint: hint(own) };
            Slice { port, members: members.into_iter().map(member).collect() }
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let service = || 0..SERVICES;
    let door = prop_oneof![
        4 => service().prop_map(Door::ClusterIp),
        3 => (30_000_u16..30_002).prop_map(Door::NodePort),
        2 => service().prop_map(Door::Balancer),
        1 => (0_u8..2).prop_map(Door::External),
    ];
    let port = || 4000_u16..4003;
    prop_oneof![
        3 => (service(), prop::option::weighted(0.85, spec())).prop_map(|(service, spec)| Step::Service { service, spec }),
        4 => (service(), 0..SLICES, prop::option::weighted(0.85, slice()))
            .prop_map(|(service, number, slice)| Step::Slice { service, number, slice }),
        2 => (service(), 30_000_u16..30_002)
            .prop_map(|(service, node_port)| Step::NodePort { service, node_port }),
        5 => (service(), 0..SLICES, 0..6_usize, 0..CONDITIONS.len())
            .prop_map(|(service, number, member, conditions)| Step::Conditions { service, number, member, conditions }),
        1 => prop_oneof![Just(Some("a")), Just(Some("b")), Just(None)].prop_map(Step::Zone),
        1 => (0..2_usize, any::<bool>()).prop_map(|(peer, serves)| Step::Serves { peer, serves }),
        1 => (0..1_500_u64).prop_map(Step::Wait),
        14 => (0..CLIENTS.len(), port(), door, any::<bool>(), any::<bool>())
            .prop_map(|(client, port, door, tcp, v6)| Step::Ask { client, port, door, tcp, v6 }),
        2 => (0..2_usize, port(), 0..2_usize, any::<bool>())
            .prop_map(|(client, port, peer, v6)| Step::Direct { client, port, peer, v6 }),
        8 => (0..24_usize).prop_map(Step::Again),
        5 => (0..24_usize).prop_map(Step::Answer),
        4 => (0..24_usize).prop_map(Step::Continue),
    ]
}

/// What names a flow: protocol, family, client, and where it sends.
type Key = (bool, bool, End, End);

/// A living flow: how it left us, the endpoint it went to, and for which Service.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Flow {
    seen_as: End,
    endpoint: End,
    service: Option<usize>,
    /// By which door.
    door: Option<Door>,
    answered: bool,
}

/// A client at a Service, by protocol and family too.
type Record = (usize, bool, bool, [u8; 4]);

/// What was seen so far, and what must follow from it.
struct Run {
    cluster: Cluster,
    truth: Truth,
    flows: HashMap<Key, Flow>,
    order: Vec<Key>,
    /// The last endpoint of a client at a Service, and when it was given to it.
    last: HashMap<Record, (End, u64)>,
    ms: u64,
}

fn run(steps: &[Step]) {
    let mut run = Run {
        cluster: Cluster::new(),
        truth: Truth::default(),
        flows: HashMap::new(),
        order: Vec::new(),
        last: HashMap::new(),
        ms: 0,
    };
    for step in steps {
        run.wait(10);
        run.step(step);
    }
}

impl Run {
    fn wait(&mut self, ms: u64) {
        // A flow that nobody answers lives for 30 s.
        let ms = ms.min(25_000_u64.saturating_sub(self.ms));
        self.ms += ms;
        self.cluster.world.now += Duration::from_millis(ms);
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Service { service, spec } => self.service(*service, spec.clone()),
            Step::Slice { service, number, slice } => self.slice(*service, *number, slice.clone()),
            Step::NodePort { service, node_port } => {
                if let Some(spec) = self.truth.services[*service].clone() {
                    self.service(*service, Some(Spec { node_port: *node_port, ..spec }));
                }
            }
            Step::Conditions { service, number, member, conditions } => {
                let mut slice = self.truth.slices[*service][*number].clone();
                if let Some(member) = slice.as_mut().and_then(|slice| slice.members.get_mut(*member)) {
                    member.conditions = *conditions;
                    self.slice(*service, *number, slice);
                }
            }
            Step::Zone(zone) => {
                self.cluster.apply(&node("here", 9, *zone, true));
                self.truth.zone = *zone;
                self.compile();
            }
            Step::Serves { peer, serves } => {
                let (name, number, zone) = [("n0", 0, "a"), ("n1", 1, "b")][*peer];
                self.cluster.apply(&node(name, number, Some(zone), *serves));
                self.truth.peers_serve[*peer] = *serves;
                self.compile();
            }
            Step::Wait(ms) => self.wait(*ms),
            Step::Ask { client, port, door, tcp, v6 } => {
                self.ask((CLIENTS[*client], *port), *door, *tcp, *v6)
            }
            Step::Again(flow) => {
                if let Some(((tcp, v6, from, to), flow)) = self.flow(*flow) {
                    match flow.door {
                        Some(door) => self.ask(from, door, tcp, v6),
                        None => self.direct(from, to, v6),
                    }
                }
            }
            Step::Direct { client, port, peer, v6 } => {
                self.direct((CLIENTS[*client], *port), ([10, 244, *peer as u8, 5], 8080), *v6);
            }
            Step::Answer(flow) => {
                if let Some((key, flow)) = self.flow(*flow) {
                    self.answer(key, flow);
                }
            }
            Step::Continue(flow) => {
                if let Some((key, flow)) = self.flow(*flow).filter(|(key, flow)| key.0 && flow.answered) {
                    self.go_on(key, flow);
                }
            }
        }
    }

    fn service(&mut self, service: usize, spec: Option<Spec>) {
        match &spec {
            Some(spec) => self.cluster.apply(&truth::service_object(service, spec)),
            None => self.cluster.delete(Kind::Service, &format!("s{service}")),
        }
        self.truth.services[service] = spec;
        self.compile();
    }

    fn slice(&mut self, service: usize, number: usize, slice: Option<Slice>) {
        for v6 in [false, true] {
            match &slice {
                Some(slice) => self.cluster.apply(&truth::slice_object(service, number, slice, v6)),
                None => {
                    self.cluster.delete(Kind::EndpointSlice, &truth::slice_name(service, number, v6));
                }
            }
        }
        self.truth.slices[service][number] = slice;
        self.compile();
    }

    fn compile(&mut self) {
        // Two Services may want one door: whoever does not get it is told so.
        let _ = self.cluster.compile();
        let checks = &self.cluster.plan.services.health_checks;
        for service in 0..SERVICES {
            let said = checks.get(&(31_000 + service as u16)).map(|check| check.local_endpoints);
            assert_eq!(said, self.truth.health(service), "the health check of s{service}");
        }
    }

    /// The n-th flow, if it lives.
    fn flow(&self, number: usize) -> Option<(Key, Flow)> {
        let key = self.order.get(number)?;
        Some((*key, *self.flows.get(key)?))
    }

    fn ask(&mut self, from: End, door: Door, tcp: bool, v6: bool) {
        let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
        let owner = self.truth.owner(door, v6);
        let to = match door {
            // Another node's own loop does that.
            Door::ClusterIp(_) if matches!(at(from.0), At::Peer(_)) => return,
            Door::ClusterIp(_) => Some(door.end()),
            Door::NodePort(port) => self.cluster.node_port(protocol, port),
            Door::Balancer(_) | Door::External(_) => self.cluster.external(v6, protocol, door.end()),
        };
        let Some(to) = to else {
            assert_eq!(owner, None, "{door:?} leads nowhere");
            return;
        };
        assert!(owner.is_some() || matches!(door, Door::ClusterIp(_)), "{door:?} is nobody's");
        let key = (tcp, v6, from, to);
        let before = self.flows.get(&key).copied().filter(|flow| {
            let service = flow.service.expect("it went to a Service");
            owner == Some(service) && self.truth.keeps(service, v6, flow.endpoint, true)
        });
        let left = self.cluster.world.take_frame(&packet(v6, tcp, from, to, "S"));
        if let Some(before) = before {
            assert_eq!(self.sent(left), (before.seen_as, before.endpoint), "a flow goes on as it was");
            return;
        }
        self.flows.remove(&key);
        let fate = self.truth.fate(door, v6, from.0);
        let Fate::OneOf(candidates) = fate else {
            let (frames, datagrams) = left;
            assert_eq!(datagrams, []);
            match fate {
                Fate::Silence => assert_eq!(frames, Vec::<Vec<u8>>::new(), "{door:?} for {from:?}"),
                // A reset always; of ICMP errors there are only so many.
                Fate::Refused => assert!(frames.len() == 1 || (frames.is_empty() && !tcp), "{frames:?}"),
                Fate::NoService => assert!(frames.len() <= 1, "{frames:?}"),
                Fate::OneOf(_) => unreachable!("not here"),
            }
            for answer in frames {
                assert_eq!(parse(&answer).expect("a refusal").destination, address(v6, from.0));
            }
            return;
        };
        let (seen_as, endpoint) = self.sent(left);
        assert!(candidates.contains(&endpoint), "{endpoint:?} is not one of {candidates:?} ({door:?})");
        let service = owner.expect("somebody's");
        let affinity = u64::from(self.truth.services[service].as_ref().expect("it is there").affinity);
        if affinity > 0 {
            let record = (service, tcp, v6, from.0);
            let last = self
                .last
                .get(&record)
                .filter(|(last, at)| candidates.contains(last) && self.ms - at <= affinity * 1000);
            assert!(last.is_none_or(|(last, _)| *last == endpoint), "{last:?} became {endpoint:?}");
            self.last.insert(record, (endpoint, self.ms));
        }
        let expected = (self.truth.seen_as(from.0, endpoint.0, door), from.1);
        self.enter(
            key,
            Flow { seen_as, endpoint, service: Some(service), door: Some(door), answered: false },
            expected,
        );
    }

    fn direct(&mut self, from: End, to: End, v6: bool) {
        let left = self.cluster.world.take_frame(&packet(v6, false, from, to, "S"));
        let (seen_as, endpoint) = self.sent(left);
        assert_eq!(endpoint, to);
        let key = (false, v6, from, to);
        match self.flows.get(&key) {
            Some(before) => assert_eq!((before.seen_as, before.endpoint), (seen_as, endpoint)),
            None => {
                self.enter(key, Flow { seen_as, endpoint, service: None, door: None, answered: false }, from)
            }
        }
    }

    /// A new flow: it must look to its endpoint as expected, and in any case like no other.
    fn enter(&mut self, key: Key, flow: Flow, expected: End) {
        let taken = |as_who: End| {
            let looks_like = |(other, twin): (&Key, &Flow)| {
                (other.0, other.1) == (key.0, key.1)
                    && (twin.seen_as, twin.endpoint) == (as_who, flow.endpoint)
            };
            self.flows.iter().any(looks_like)
        };
        assert_eq!(flow.seen_as.0, expected.0, "the source that {:?} sees of {key:?}", flow.endpoint);
        assert!(!taken(flow.seen_as), "{flow:?} looks like another flow");
        if !taken(expected) {
            assert_eq!(flow.seen_as, expected, "a source port is changed only where it must be");
        }
        if self.flows.insert(key, flow).is_none() && !self.order.contains(&key) {
            self.order.push(key);
        }
    }

    fn answer(&mut self, key: Key, flow: Flow) {
        let (tcp, v6, client, asked) = key;
        let answer = packet(v6, tcp, flow.endpoint, flow.seen_as, "SA");
        let (frames, datagrams) = match at(flow.endpoint.0) {
            At::Peer(peer) => self.cluster.world.take_datagram(peer, &answer),
            At::Pod | At::Node | At::Outside => self.cluster.world.take_frame(&answer),
        };
        assert_eq!((frames.len(), datagrams), (1, vec![]), "an answer to {flow:?}");
        assert_eq!(ends_of(&frames[0]), (asked, client), "an answer to {flow:?}");
        self.flows.insert(key, Flow { answered: true, ..flow });
    }

    fn go_on(&mut self, key: Key, flow: Flow) {
        let (tcp, v6, from, to) = key;
        let left = self.cluster.world.take_frame(&packet(v6, tcp, from, to, "A"));
        if flow.service.is_none_or(|service| self.truth.keeps(service, v6, flow.endpoint, false)) {
            assert_eq!(self.sent(left), (flow.seen_as, flow.endpoint), "a connection goes on");
            return;
        }
        let (frames, datagrams) = left;
        assert_eq!((frames.len(), datagrams), (1, vec![]), "{flow:?} is reset");
        let reset = parse(&frames[0]).expect("a reset");
        assert!(matches!(reset.l4, crate::packet::L4::Tcp { flags, .. } if flags & 0x04 != 0), "{reset:?}");
        assert_eq!(ends_of(&frames[0]), (to, from));
        self.flows.remove(&key);
    }

    /// The one packet that came out, and by the right way: its source and destination.
    fn sent(&self, (mut frames, mut datagrams): Left) -> (End, End) {
        assert_eq!(frames.len() + datagrams.len(), 1, "{frames:?} {datagrams:?}");
        let (way, packet) = match frames.pop() {
            Some(frame) => (None, frame),
            None => datagrams.pop().map(|(to, packet)| (Some(to), packet)).expect("one of both"),
        };
        let ends = ends_of(&packet);
        let expected = match at(ends.1.0) {
            At::Peer(peer) => Some(outer(peer)),
            At::Pod | At::Node | At::Outside => None,
        };
        assert_eq!(way, expected, "the way to {:?}", ends.1);
        assert_ne!(ends.1.0, LOOP);
        ends
    }
}

/// A cluster that is in use already, and what happens to it then.
fn story() -> impl Strategy<Value = Vec<Step>> {
    let services = prop::array::uniform3((spec(), slice()));
    let begin = services.prop_map(|services| {
        let both = |(service, (spec, slice)): (usize, (Spec, Slice))| {
            [
                Step::Service { service, spec: Some(spec) },
                Step::Slice { service, number: 0, slice: Some(slice) },
            ]
        };
        services.into_iter().enumerate().flat_map(both).collect::<Vec<Step>>()
    });
    (begin, prop::collection::vec(step(), 1..80)).prop_map(|(begin, then)| [begin, then].concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn objects_become_what_the_model_says(story in story()) {
        run(&story);
    }
}

#[test]
fn a_node_port_that_changes_hands_takes_its_datagrams_along() {
    let spec = |node_port| Spec {
        kind: Type::NodePort,
        node_port,
        external_ip: None,
        external_local: false,
        internal_local: false,
        affinity: 0,
        publish: false,
        sources: false,
        families: [true; 2],
        foreign: false,
    };
    let slice =
        |place| Slice { port: 8080, members: vec![Member { place, conditions: 0, hint: Hint::None }] };
    let service = |service, node_port| Step::Service { service, spec: Some(spec(node_port)) };
    let endpoint = |service, place| Step::Slice { service, number: 0, slice: Some(slice(place)) };
    let ask = |tcp| Step::Ask { client: 3, port: 4000, door: Door::NodePort(30_001), tcp, v6: false };
    let before = [service(1, 30_001), endpoint(1, 3), service(0, 30_000), endpoint(0, 4)];
    let during = [ask(true), ask(false), Step::Answer(0), Step::Continue(0), Step::Answer(1)];
    // The connection goes on with whom it is with; datagrams, and who begins anew, are the new owner's.
    let after = [service(1, 30_002), service(0, 30_001), Step::Continue(0), ask(false), ask(true)];
    run(&[&before[..], &during, &after].concat());
}
