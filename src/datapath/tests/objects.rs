//! A lane whose snapshot comes from Kubernetes objects, through the store and the compiler, as in an agent:
//! node `here` (pods 10.244.9.0/24, in zone `a` at first) with peers `n0` (in zone `a`) and `n1` (`b`), over both families.

use std::net::Ipv6Addr;

use serde_json::{Value, json};

use super::*;
use crate::snapshot::service::{LOOP_V4, LOOP_V6, Listen, Protocol};
use crate::state::annotations::{Announcement, Encaps};
use crate::state::compile::{Compiler, EncapPolicy, HostPlan, Settings};
use crate::state::desired::Desired;
use crate::state::services::ServiceSettings;
use crate::state::source::{Key, Kind, Object};

/// An address and a port. Tests think in IPv4; [`address`] says what that is over IPv6.
pub(super) type End = ([u8; 4], u16);

/// What all tests mean by the loop's own address.
pub(super) const LOOP: [u8; 4] = LOOP_V4.octets();

/// The address as it is in packets and objects.
pub(super) fn address(v6: bool, octets: [u8; 4]) -> IpAddr {
    match v6 {
        false => octets.into(),
        true if octets == LOOP => LOOP_V6.into(),
        true => {
            let [a, b, c, d] = octets.map(u16::from);
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, a << 8 | b, c << 8 | d).into()
        }
    }
}

/// The same, back again.
pub(super) fn octets(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(LOOP_V6) => LOOP,
        IpAddr::V6(v6) => v6.octets()[12..].try_into().expect("four octets"),
    }
}

/// The cluster.
pub(super) struct Cluster {
    pub(super) world: World,
    pub(super) plan: Arc<HostPlan>,
    desired: Desired,
    compiler: Compiler,
    settings: Settings,
    mesh_changed: bool,
}

/// The Node of that number: pods 10.244.NUMBER.0/24, address 192.0.2.NUMBER.
pub(super) fn node(name: &str, number: u8, zone: Option<&str>, services: bool) -> Object {
    let range = |v6, bits: u8| format!("{}/{bits}", address(v6, [10, 244, number, 0]));
    let own = |v6| json!({"type": "InternalIP", "address": address(v6, [192, 0, 2, number])});
    object(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name,
            "labels": zone.map(|zone| json!({"topology.kubernetes.io/zone": zone})),
            "annotations": {
                "warren.dev/encaps": "vxlan",
                "warren.dev/vxlan-mac": format!("02:00:00:00:00:0{number}"),
                "warren.dev/services": if services { "on" } else { "off" },
            },
        },
        "spec": {"podCIDRs": [range(false, 24), range(true, 120)]},
        "status": {"addresses": [own(false), own(true)]},
    }))
}

/// The object of a manifest.
pub(super) fn object(manifest: Value) -> Object {
    let kind = manifest["kind"].as_str().expect("a kind").to_owned();
    let read = "an object of its kind";
    match kind.as_str() {
        "Node" => Object::Node(Arc::new(serde_json::from_value(manifest).expect(read))),
        "Service" => Object::Service(Arc::new(serde_json::from_value(manifest).expect(read))),
        "EndpointSlice" => Object::EndpointSlice(Arc::new(serde_json::from_value(manifest).expect(read))),
        kind => panic!("no {kind} here"),
    }
}

impl Cluster {
    pub(super) fn new() -> Cluster {
        Cluster::with(1, 1024)
    }

    /// With other choices of endpoints, and room for so many flows.
    pub(super) fn with(seed: u64, flows: u32) -> Cluster {
        let range = |v6, octets, bits| ipnet::IpNet::new(address(v6, octets), bits).expect("a range");
        let ranges = |octets| vec![range(false, octets, 16), range(true, octets, 112)];
        let settings = Settings {
            node: "here".to_owned(),
            encap: EncapPolicy::Vxlan,
            announcement: Announcement {
                encaps: Encaps { wireguard: false, vxlan: true },
                services: true,
                ..Announcement::default()
            },
            vxlan_port: 8472,
            vni: 1,
            mac: OUR_MAC,
            underlay_mtu: 1500,
            cluster_ranges: ranges([10, 244, 0, 0]),
            service_ranges: ranges([10, 96, 0, 0]),
            services: ServiceSettings { enabled: true, ..ServiceSettings::default() },
        };
        let mut desired = Desired::default();
        desired.reset(Kind::Node, &[node("here", 9, Some("a"), true), node("n0", 0, Some("a"), true)]);
        desired.apply(&node("n1", 1, Some("b"), true));
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::ServiceCidr] {
            desired.reset(kind, &[]);
        }
        let mut world = world_with(seed, flows);
        let mut compiler = Compiler::default();
        let compiled = compiler.compile(&desired, &settings);
        assert_eq!(compiled.problems, []);
        world.snapshot = (*compiled.snapshot).clone();
        Cluster { world, plan: compiled.plan, desired, compiler, settings, mesh_changed: false }
    }

    /// The source shows an object.
    pub(super) fn apply(&mut self, object: &Object) {
        let outcome = self.desired.apply(object);
        let problems: Vec<_> = outcome.reports.into_iter().flat_map(|(_, problems)| problems).collect();
        assert_eq!(problems, [], "{object:?}");
        self.mesh_changed |= outcome.mesh;
    }

    /// The source says that an object is gone.
    pub(super) fn delete(&mut self, kind: Kind, name: &str) {
        self.desired.delete(&Key { kind, namespace: "default".to_owned(), name: name.to_owned() });
    }

    /// What was said reaches the lane; says what is wrong with Services.
    pub(super) fn compile(&mut self) -> Vec<String> {
        let compiled = match std::mem::take(&mut self.mesh_changed) {
            true => self.compiler.compile(&self.desired, &self.settings),
            false => self.compiler.compile_services(&self.desired, &self.settings),
        };
        self.world.snapshot = (*compiled.snapshot).clone();
        self.plan = compiled.plan;
        let problems = compiled.service_reports.into_iter().flat_map(|(_, problems)| problems);
        problems.map(|problem| problem.to_string()).collect()
    }

    /// Where the kernel sends what goes to this port of a node's own address.
    pub(super) fn node_port(&self, protocol: Protocol, port: u16) -> Option<End> {
        self.plan.services.node_ports.contains(&(protocol, port)).then_some((LOOP, port))
    }

    /// Where the kernel sends what goes to a load balancer's or an external address.
    pub(super) fn external(&self, v6: bool, protocol: Protocol, at: End) -> Option<End> {
        let listen = Listen { address: address(v6, at.0), protocol, port: at.1 };
        Some((LOOP, *self.plan.services.externals.get(&listen)?))
    }
}

/// A packet that opens or goes on with a flow: a SYN, or what `flags` say, or a datagram.
pub(super) fn packet(v6: bool, tcp: bool, from: End, to: End, flags: &str) -> Vec<u8> {
    let (source, destination) = (address(v6, from.0), address(v6, to.0));
    let ip = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            etherparse::PacketBuilder::ipv4(source.octets(), destination.octets(), 64)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            etherparse::PacketBuilder::ipv6(source.octets(), destination.octets(), 64)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => unreachable!("one family"),
    };
    let mut packet = Vec::new();
    let written = match tcp {
        true => {
            let mut tcp = ip.tcp(from.1, to.1, 1, 100);
            for flag in flags.chars() {
                tcp = if flag == 'S' { tcp.syn() } else { tcp.ack(1) };
            }
            tcp.write(&mut packet, &[])
        }
        false => ip.udp(from.1, to.1).write(&mut packet, b"payload"),
    };
    written.expect("a packet");
    packet
}

/// Source and destination of a packet, which must be right.
pub(super) fn ends_of(packet: &[u8]) -> (End, End) {
    let headers = parse(packet).expect("a packet");
    assert!(crate::packet::checksum::verify_transport(packet, &headers), "checksum");
    let (from, to) = headers.ports().expect("ports");
    ((octets(headers.source), from), (octets(headers.destination), to))
}
