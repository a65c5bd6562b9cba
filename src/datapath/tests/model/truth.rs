//! What Services mean, said as simply as it can be said: no tables, no identifiers, nothing remembered but the
//! objects themselves, and everything looked up anew for every packet.

use serde_json::{Value, json};

use super::super::objects::{End, LOOP, address, object};
use crate::state::source::Object;

pub(super) const SERVICES: usize = 3;
pub(super) const SLICES: usize = 2;

/// Where endpoints may be, and on which node.
pub(super) const PLACES: [([u8; 4], Option<&str>); 7] = [
    ([10, 244, 9, 5], Some("here")),
    ([10, 244, 9, 6], Some("here")),
    ([192, 0, 2, 9], Some("here")),
    ([10, 244, 0, 5], Some("n0")),
    ([10, 244, 1, 5], Some("n1")),
    ([192, 0, 2, 1], Some("n1")),
    ([198, 51, 100, 77], None),
];

/// What the address this node has inside the mesh is.
const ME: [u8; 4] = [10, 244, 9, 0];

/// Where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    Pod,
    Node,
    Peer(u8),
    Outside,
}

pub(super) fn at([a, b, c, d]: [u8; 4]) -> At {
    match (a, b, c, d) {
        (10, 244, 9, 0) | (192, 0, 2, 9) => At::Node,
        (10, 244, 9, _) => At::Pod,
        (10, 244, peer, _) | (192, 0, 2, peer) => At::Peer(peer),
        _ => At::Outside,
    }
}

fn is_inside(client: [u8; 4]) -> bool {
    matches!(at(client), At::Pod | At::Node)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    ClusterIp,
    NodePort,
    Balancer { proxy: bool },
}

/// What a Service says.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    pub(super) kind: Type,
    pub(super) node_port: u16,
    pub(super) external_ip: Option<u8>,
    pub(super) external_local: bool,
    pub(super) internal_local: bool,
    /// Seconds; 0 for none.
    pub(super) affinity: u16,
    pub(super) publish: bool,
    pub(super) sources: bool,
    /// IPv4, IPv6.
    pub(super) families: [bool; 2],
    /// Another proxy's.
    pub(super) foreign: bool,
}

/// `ready`, `serving`, `terminating`, where they are said at all.
pub(super) const CONDITIONS: [Option<(bool, bool, bool)>; 7] = [
    None,
    Some((true, true, false)),
    Some((false, false, false)),
    Some((false, true, true)),
    Some((false, true, false)),
    Some((false, false, true)),
    Some((true, true, true)),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hint {
    None,
    /// Of its own zone, as `PreferSameZone` and `PreferClose` give it.
    Zone,
    /// Of its own zone and node, as `PreferSameNode` gives it.
    Node,
    /// Of a zone in which nobody is.
    Elsewhere,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) place: usize,
    pub(super) conditions: usize,
    pub(super) hint: Hint,
}

#[derive(Clone, Debug)]
pub(super) struct Slice {
    pub(super) port: u16,
    pub(super) members: Vec<Member>,
}

/// A way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    ClusterIp(usize),
    NodePort(u16),
    Balancer(usize),
    External(u8),
}

impl Door {
    /// The address and port that a client calls; a node port's address is any of the node's.
    pub(super) fn end(self) -> End {
        match self {
            Door::ClusterIp(service) => ([10, 96, 0, 10 + service as u8], 80),
            Door::NodePort(port) => (LOOP, port),
            Door::Balancer(service) => ([198, 51, 100, 10 + service as u8], 80),
            Door::External(number) => ([203, 0, 113, 200 + number], 80),
        }
    }
}

/// An endpoint, all slices put together.
#[derive(Clone, Debug)]
struct Merged {
    end: End,
    here: bool,
    ready: bool,
    serving: bool,
    terminating: bool,
    zone: Option<&'static str>,
    node: Option<&'static str>,
}

/// What becomes of a new connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    OneOf(Vec<End>),
    Refused,
    Silence,
    /// No Service has to do with it.
    NoService,
}

/// All objects.
#[derive(Debug)]
pub(super) struct Truth {
    pub(super) services: [Option<Spec>; SERVICES],
    pub(super) slices: [[Option<Slice>; SLICES]; SERVICES],
    /// This node's zone.
    pub(super) zone: Option<&'static str>,
    /// Whether `n0` and `n1` do Services.
    pub(super) peers_serve: [bool; 2],
}

impl Default for Truth {
    fn default() -> Truth {
        Truth {
            services: Default::default(),
            slices: Default::default(),
            zone: Some("a"),
            peers_serve: [true; 2],
        }
    }
}

impl Truth {
    /// The Service, if it is ours to serve and has that family.
    fn served(&self, service: usize, v6: bool) -> Option<&Spec> {
        self.services[service].as_ref().filter(|spec| !spec.foreign && spec.families[usize::from(v6)])
    }

    /// Whose door it is: of several Services that want it, the first by name.
    pub(super) fn owner(&self, door: Door, v6: bool) -> Option<usize> {
        let wants = |service: &usize| {
            self.services[*service].as_ref().filter(|spec| !spec.foreign).is_some_and(|spec| match door {
                Door::ClusterIp(number) => number == *service,
                Door::NodePort(port) => spec.kind != Type::ClusterIp && spec.node_port == port,
                Door::Balancer(number) => {
                    number == *service
                        && spec.kind == Type::Balancer { proxy: false }
                        && spec.families[usize::from(v6)]
                }
                Door::External(number) => spec.external_ip == Some(number) && spec.families[usize::from(v6)],
            })
        };
        (0..SERVICES).find(wants)
    }

    /// All endpoints of a Service. Where slices contradict each other, who says `ready` is believed, then who
    /// says `serving`, then the first.
    fn merged(&self, service: usize) -> Vec<Merged> {
        let Some(spec) = &self.services[service] else { return Vec::new() };
        let mut merged: Vec<Merged> = Vec::new();
        for slice in self.slices[service].iter().flatten() {
            for member in &slice.members {
                let (address, node) = PLACES[member.place];
                let (ready, serving, terminating) =
                    CONDITIONS[member.conditions].unwrap_or((true, true, false));
                let own_zone = match node {
                    Some("here" | "n0") => Some("a"),
                    Some(_) => Some("b"),
                    None => None,
                };
                let (zone, node_hint) = match member.hint {
                    Hint::None => (None, None),
                    Hint::Zone => (own_zone, None),
                    Hint::Node => (own_zone, node),
                    Hint::Elsewhere => (Some("nowhere"), None),
                };
                let one = Merged {
                    end: (address, slice.port),
                    here: node == Some("here"),
                    ready: ready || spec.publish,
                    serving,
                    terminating,
                    zone,
                    node: node_hint,
                };
                match merged.iter_mut().find(|other| other.end == one.end) {
                    Some(other) if (one.ready, one.serving) > (other.ready, other.serving) => *other = one,
                    Some(_) => {}
                    None => merged.push(one),
                }
            }
        }
        merged
    }

    /// Whether a flow to this endpoint may go on: `new` if the packet opens one, or is a datagram.
    pub(super) fn keeps(&self, service: usize, v6: bool, end: End, new: bool) -> bool {
        match self.served(service, v6) {
            Some(_) => {
                let merged = self.merged(service);
                merged.iter().any(|one| one.end == end && (!new || one.ready || one.serving))
            }
            // Who has a connection to a Service that is gone may end it.
            None => !new,
        }
    }

    /// What becomes of a client's new connection.
    pub(super) fn fate(&self, door: Door, v6: bool, client: [u8; 4]) -> Fate {
        let Some(service) = self.owner(door, v6) else { return Fate::NoService };
        let Some(spec) = self.served(service, v6) else {
            return if matches!(door, Door::NodePort(_)) { Fate::Refused } else { Fate::NoService };
        };
        if matches!(door, Door::Balancer(_)) && spec.sources && client == [198, 18, 0, 9] {
            return Fate::Silence;
        }
        let all = self.merged(service);
        let leaving = |one: &&Merged| one.serving && one.terminating;
        let ends = |some: Vec<&Merged>| some.iter().map(|one| one.end).collect::<Vec<End>>();
        let local = match door {
            Door::ClusterIp(_) => spec.internal_local,
            Door::NodePort(_) | Door::Balancer(_) | Door::External(_) => {
                spec.external_local && !is_inside(client)
            }
        };
        let list: Vec<&Merged> =
            if local { all.iter().filter(|one| one.here).collect() } else { all.iter().collect() };
        let ready: Vec<&Merged> = list.iter().copied().filter(|one| one.ready).collect();
        let chosen = match (ready.is_empty(), local) {
            (true, _) => list.iter().copied().filter(leaving).collect(),
            (false, true) => ready,
            (false, false) => self.nearest(ready),
        };
        if !chosen.is_empty() {
            Fate::OneOf(ends(chosen))
        } else if local && all.iter().any(|one| one.ready || leaving(&one)) {
            Fate::Silence
        } else {
            Fate::Refused
        }
    }

    /// Hints count where all ready endpoints have them and one is for us: those of the node, else of the zone.
    fn nearest<'a>(&self, ready: Vec<&'a Merged>) -> Vec<&'a Merged> {
        let on_node: Vec<_> = ready.iter().copied().filter(|one| one.node == Some("here")).collect();
        if ready.iter().all(|one| one.node.is_some()) && !on_node.is_empty() {
            return on_node;
        }
        let zone = self.zone;
        let in_zone: Vec<_> =
            ready.iter().copied().filter(|one| zone.is_some() && one.zone == zone).collect();
        if ready.iter().all(|one| one.zone.is_some()) && !in_zone.is_empty() {
            return in_zone;
        }
        ready
    }

    /// The address that an endpoint sees of a client.
    pub(super) fn seen_as(&self, client: [u8; 4], endpoint: [u8; 4], door: Door) -> [u8; 4] {
        match (at(client), at(endpoint)) {
            _ if client == endpoint => LOOP,
            (At::Node, At::Pod | At::Node | At::Outside) => LOOP,
            (At::Node | At::Pod, _) | (_, At::Pod | At::Node) => client,
            (_, At::Outside) => LOOP,
            (At::Peer(_), At::Peer(_)) => ME,
            (At::Outside, At::Peer(peer)) => {
                let takes = self.peers_serve[usize::from(peer)] && !matches!(door, Door::ClusterIp(_));
                if takes { client } else { ME }
            }
        }
    }

    /// How many endpoints the health check node port tells, if the Service has one.
    pub(super) fn health(&self, service: usize) -> Option<usize> {
        let spec = self.services[service].as_ref().filter(|spec| !spec.foreign && health_port(spec))?;
        let merged = self.merged(service);
        let mut here: Vec<[u8; 4]> =
            merged.iter().filter(|one| one.here && one.ready).map(|one| one.end.0).collect();
        here.sort();
        here.dedup();
        Some(if spec.families == [false; 2] { 0 } else { here.len() })
    }
}

fn health_port(spec: &Spec) -> bool {
    matches!(spec.kind, Type::Balancer { .. }) && spec.external_local
}

/// The Service as an object.
pub(super) fn service_object(number: usize, spec: &Spec) -> Object {
    let families: Vec<bool> =
        [false, true].into_iter().filter(|v6| spec.families[usize::from(*v6)]).collect();
    let of = |octets: [u8; 4]| families.iter().map(|v6| address(*v6, octets)).collect::<Vec<_>>();
    let policy = |local| if local { "Local" } else { "Cluster" };
    let port = |name: &str, protocol: &str| {
        let mut port = json!({"name": name, "protocol": protocol, "port": 80, "targetPort": name});
        if spec.kind != Type::ClusterIp {
            port["nodePort"] = spec.node_port.into();
        }
        port
    };
    let both = |octets, bits: [u8; 2]| {
        [false, true].map(|v6| format!("{}/{}", address(v6, octets), bits[usize::from(v6)]))
    };
    let mut said = json!({
        "type": match spec.kind {
            Type::ClusterIp => "ClusterIP",
            Type::NodePort => "NodePort",
            Type::Balancer { .. } => "LoadBalancer",
        },
        "clusterIPs": of(Door::ClusterIp(number).end().0),
        "ports": [port("t", "TCP"), port("u", "UDP")],
        "internalTrafficPolicy": policy(spec.internal_local),
        "externalTrafficPolicy": policy(spec.external_local),
        "publishNotReadyAddresses": spec.publish,
        "externalIPs": spec.external_ip.map(|number| of(Door::External(number).end().0)),
        "loadBalancerSourceRanges": spec.sources.then(|| {
            [both([203, 0, 113, 0], [24, 120]), both([10, 244, 0, 0], [16, 112])].concat()
        }),
        "healthCheckNodePort": health_port(spec).then_some(31_000 + number),
    });
    if spec.affinity > 0 {
        said["sessionAffinity"] = "ClientIP".into();
        said["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": spec.affinity}});
    }
    let ingress: Option<Vec<Value>> = match spec.kind {
        Type::ClusterIp | Type::NodePort => None,
        Type::Balancer { proxy } => {
            let mode = if proxy { "Proxy" } else { "VIP" };
            let addresses = of(Door::Balancer(number).end().0);
            Some(addresses.into_iter().map(|ip| json!({"ip": ip, "ipMode": mode})).collect())
        }
    };
    let labels = spec.foreign.then(|| json!({"service.kubernetes.io/service-proxy-name": "another"}));
    object(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": format!("s{number}"), "namespace": "default", "labels": labels},
        "spec": said,
        "status": {"loadBalancer": {"ingress": ingress}},
    }))
}

pub(super) fn slice_name(service: usize, slice: usize, v6: bool) -> String {
    format!("s{service}-{slice}-{}", if v6 { 6 } else { 4 })
}

/// The slice of one family as an object.
pub(super) fn slice_object(service: usize, number: usize, slice: &Slice, v6: bool) -> Object {
    let endpoints: Vec<Value> = slice
        .members
        .iter()
        .map(|member| {
            let (octets, node) = PLACES[member.place];
            let zone = match node {
                Some("here" | "n0") => Some("a"),
                Some(_) => Some("b"),
                None => None,
            };
            let zones = match member.hint {
                Hint::None => None,
                Hint::Zone | Hint::Node => zone.map(|zone| json!([{"name": zone}])),
                Hint::Elsewhere => Some(json!([{"name": "nowhere"}])),
            };
            let nodes = node.filter(|_| member.hint == Hint::Node).map(|node| json!([{"name": node}]));
            let mut endpoint = json!({"addresses": [address(v6, octets)], "nodeName": node, "zone": zone});
            if let Some((ready, serving, terminating)) = CONDITIONS[member.conditions] {
                endpoint["conditions"] =
                    json!({"ready": ready, "serving": serving, "terminating": terminating});
            }
            if member.hint != Hint::None {
                endpoint["hints"] = json!({"forZones": zones, "forNodes": nodes});
            }
            endpoint
        })
        .collect();
    object(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "metadata": {
            "name": slice_name(service, number, v6), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{service}")},
        },
        "ports": [
            {"name": "t", "protocol": "TCP", "port": slice.port},
            {"name": "u", "protocol": "UDP", "port": slice.port},
        ],
        "endpoints": endpoints,
    }))
}
