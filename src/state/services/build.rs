//! One Service: its ports with their endpoints, where each listens, what the host does for it.

use std::collections::{BTreeSet, HashSet};
use std::hash::Hasher;
use std::net::IpAddr;
use std::sync::Arc;

use siphasher::sip::SipHasher13;

use super::Surroundings;
use super::claims::{Claim, Claims};
use super::judge::{Wanted, judge};
use super::loops::{Full, LoopPorts, MAX_OF_NAMESPACE};
use super::plan::{HealthCheck, MAX_HEALTH_CHECKS};
use super::service::{PortInfo, Problems, ServiceInfo};
use super::slice::SliceInfo;
use super::store::ServiceStore;
use super::topology::{self, Candidate, Place, Uses};
use crate::snapshot::service::{Endpoint, Frontend, Known, Listen, Protocol, ServicePort, Way, loop_address};
use crate::state::problem::{Problem, ProblemKind};

/// Most endpoints of one port of one Service in one family.
pub(super) const MAX_ENDPOINTS: usize = 20_000;
/// Most endpoints of all ports of one Service together: ten such ports, or 256 ports with 780 each.
pub(super) const MAX_OF_SERVICE: usize = 200_000;

/// Most endpoints of all Services: some 400 MB.
pub(super) const MAX_OF_ALL: usize = 4_000_000;

/// What one Service came to. Lists are sorted.
#[derive(Debug, Default)]
pub(super) struct Built {
    pub(super) ports: Box<[BuiltPort]>,
    pub(super) frontends: Box<[(Listen, Frontend)]>,
    pub(super) exposed: Box<[Listen]>,
    pub(super) externals: Box<[(Listen, u16)]>,
    pub(super) node_ports: Box<[(Protocol, u16)]>,
    pub(super) health_check: Option<(u16, HealthCheck)>,
    pub(super) endpoints: usize,
    /// Whether something was left out because all Services together have too many.
    pub(super) starved: bool,
    pub(super) problems: Vec<Problem>,
}

/// A port in one family.
#[derive(Clone, Debug)]
pub(super) struct BuiltPort {
    ipv4: bool,
    protocol: Protocol,
    pub(super) port: Arc<ServicePort>,
}

/// How much more Services may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) endpoints: usize,
    pub(super) health_checks: usize,
}

impl Room {
    pub(super) fn give_back(&mut self, built: &Built) {
        self.endpoints += built.endpoints;
        self.health_checks += usize::from(built.health_check.is_some());
    }

    pub(super) fn take(&mut self, built: &Built) {
        self.endpoints = self.endpoints.saturating_sub(built.endpoints);
        self.health_checks = self.health_checks.saturating_sub(usize::from(built.health_check.is_some()));
    }
}

/// What all Services have in common while one is built.
pub(super) struct Builder<'a> {
    pub(super) store: &'a ServiceStore,
    pub(super) around: &'a Surroundings,
    pub(super) claims: &'a Claims,
    /// ClusterIPs that lie in no Service range.
    pub(super) outside: &'a BTreeSet<IpAddr>,
    pub(super) loops: &'a mut LoopPorts,
    /// What had to give its port of the loop away.
    pub(super) evicted: &'a mut Vec<Listen>,
    /// The ids of all ports.
    pub(super) ids: &'a mut HashSet<u32>,
    /// How much there is room for.
    pub(super) room: Room,
}

impl Builder<'_> {
    /// Builds it; what is as `before` is the same as before.
    pub(super) fn build(&mut self, info: &Arc<ServiceInfo>, before: &Built) -> Built {
        let (namespace, name) = info.name.split_once('/').unwrap_or_default();
        let mut problems = Problems::of("Service", namespace, name);
        let wanted = judge(info, self.around, &mut problems);
        let mut service =
            Building { info, before, built: Built::default(), problems, local: BTreeSet::new() };
        let (mut ports, mut frontends, mut exposed) = (Vec::new(), Vec::new(), Vec::new());
        let externals = self.externals(&wanted, &mut service);
        let node_ports: Vec<(Protocol, u16)> = self.node_ports(&wanted, &mut service);
        for cluster_ip in &info.cluster_ips {
            let ipv4 = cluster_ip.is_ipv4();
            let granted = wanted.cluster_ips.contains(cluster_ip)
                && self.is_granted(&Claim::ClusterIp(*cluster_ip), "spec.clusterIPs", &mut service);
            for port in &info.ports {
                let mine = |(_, listen, _): &&(Way, Listen, u16)| {
                    listen.address.is_ipv4() == ipv4
                        && listen.protocol == port.protocol
                        && listen.port == port.port
                };
                let loops = loop_address(*cluster_ip);
                let at = |address, number| Listen { address, protocol: port.protocol, port: number };
                let mut ways: Vec<(Listen, Way)> = Vec::with_capacity(2);
                ways.extend(granted.then(|| (at(*cluster_ip, port.port), Way::Cluster)));
                let node_port = node_ports.contains(&(port.protocol, port.node_port));
                ways.extend(node_port.then(|| (at(loops, port.node_port), Way::NodePort)));
                ways.extend(externals.iter().filter(mine).map(|(way, _, number)| (at(loops, *number), *way)));
                let external = ways.iter().any(|(_, way)| *way != Way::Cluster);
                let built = self.port(port, ipv4, external, &mut service, &mut exposed);
                let frontend = |(listen, way)| (listen, Frontend { way, port: Arc::clone(&built) });
                frontends.extend(ways.into_iter().map(frontend));
                service.built.endpoints += built.known.len();
                ports.push(BuiltPort { ipv4, protocol: port.protocol, port: built });
            }
        }
        frontends.sort_by_key(|(listen, _)| *listen);
        exposed.sort();
        exposed.dedup();
        let health_check = wanted.health_check.filter(|port| {
            self.is_granted(&Claim::NodePort(Protocol::Tcp, *port), "spec.healthCheckNodePort", &mut service)
        });
        let health_check = health_check.filter(|port| {
            if self.room.health_checks == 0 {
                let reason = format!("{port} is not answered: more than {MAX_HEALTH_CHECKS} such ports");
                service.problems.value("spec.healthCheckNodePort", reason);
                service.built.starved = true;
            }
            self.room.health_checks > 0
        });
        let health = |port| {
            (port, HealthCheck { name: Arc::clone(&info.name), local_endpoints: service.local_endpoints() })
        };
        let mut externals: Vec<(Listen, u16)> =
            externals.iter().map(|(_, listen, port)| (*listen, *port)).collect();
        externals.sort();
        Built {
            ports: ports.into(),
            frontends: frontends.into(),
            exposed: exposed.into(),
            externals: externals.into(),
            node_ports: node_ports.into(),
            health_check: health_check.map(health),
            endpoints: service.built.endpoints,
            starved: service.built.starved,
            problems: service.problems.list,
        }
    }

    /// Whether the Service has it; says who has it if not.
    fn is_granted(&self, claim: &Claim, field: &str, service: &mut Building<'_>) -> bool {
        let Some(winner) = self.claims.winner(claim) else { return false };
        if winner.name == service.info.name {
            return true;
        }
        let what = match claim {
            Claim::ClusterIp(address) => address.to_string(),
            Claim::External(at) => format!("{} {} of {}", at.protocol.name(), at.port, at.address),
            Claim::NodePort(protocol, port) => format!("{} {port}", protocol.name()),
        };
        let reason = format!("{what} belongs to Service/{}", winner.name);
        service.problems.add(ProblemKind::Conflict, field, reason);
        false
    }

    /// The external ways in that it has, with the loop's port for each.
    fn externals(&mut self, wanted: &Wanted, service: &mut Building<'_>) -> Vec<(Way, Listen, u16)> {
        let mut granted = Vec::with_capacity(wanted.externals.len());
        for (way, listen) in &wanted.externals {
            let field = match way {
                Way::LoadBalancer => "status.loadBalancer.ingress",
                Way::ExternalIp | Way::Cluster | Way::NodePort => "spec.externalIPs",
            };
            if let Some(owner) = self.claims.winner(&Claim::ClusterIp(listen.address)) {
                let reason = format!("{} is the ClusterIP of Service/{}", listen.address, owner.name);
                service.problems.add(ProblemKind::Conflict, field, reason);
                continue;
            }
            if *way == Way::ExternalIp && self.is_node_port(listen, service) {
                continue;
            }
            if !self.is_granted(&Claim::External(*listen), field, service) {
                continue;
            }
            let claims = self.claims;
            let is_node_port = |port| claims.winner(&Claim::NodePort(listen.protocol, port)).is_some();
            let (namespace, _) = service.info.name.split_once('/').unwrap_or_default();
            let namespace = (*way == Way::ExternalIp).then_some(namespace);
            let reason = match self.loops.port(*listen, namespace, is_node_port) {
                Ok((port, evicted)) => {
                    granted.push((*way, *listen, port));
                    self.evicted.extend(evicted);
                    continue;
                }
                Err(Full::All) => "there are too many such addresses".to_owned(),
                Err(Full::Namespace) => {
                    format!("a namespace's externalIPs have at most {MAX_OF_NAMESPACE} ports in all")
                }
            };
            let reason = format!("{} finds no place: {reason}", listen.address);
            service.problems.add(ProblemKind::Conflict, field, reason);
        }
        granted
    }

    /// Whether the node's address has that port for another Service already, on every node.
    fn is_node_port(&self, listen: &Listen, service: &mut Building<'_>) -> bool {
        let winner = self.claims.winner(&Claim::NodePort(listen.protocol, listen.port));
        let winner = winner.filter(|winner| winner.name != service.info.name);
        let Some(winner) = winner.filter(|_| self.around.is_node(listen.address)) else { return false };
        let reason = format!(
            "{} is a node's address, and {} {} is the node port of Service/{}",
            listen.address,
            listen.protocol.name(),
            listen.port,
            winner.name
        );
        service.problems.add(ProblemKind::Conflict, "spec.externalIPs", reason);
        true
    }

    fn node_ports(&self, wanted: &Wanted, service: &mut Building<'_>) -> Vec<(Protocol, u16)> {
        let mut granted = wanted.node_ports.clone();
        granted.retain(|(protocol, port)| {
            self.is_granted(&Claim::NodePort(*protocol, *port), "spec.ports.nodePort", service)
        });
        granted.sort();
        granted
    }

    /// A port in one family with its endpoints.
    fn port(
        &mut self,
        port: &PortInfo,
        ipv4: bool,
        external: bool,
        service: &mut Building<'_>,
        exposed: &mut Vec<Listen>,
    ) -> Arc<ServicePort> {
        let info = service.info;
        let slices = self.store.slices(&info.name).filter(|slice| slice.ipv4 == ipv4);
        let candidates = self.candidates(slices, port, service);
        let uses = Uses {
            cluster: !info.internal_local || external,
            local: info.internal_local || (info.external_local && external),
        };
        let place = Place { node: &self.around.node, zone: self.around.zone.as_deref() };
        let chosen = topology::choose(&candidates, uses, place);
        let here = || candidates.iter().filter(|candidate| candidate.local);
        if external {
            let listen = |endpoint: Endpoint| Listen {
                address: endpoint.address,
                protocol: port.protocol,
                port: endpoint.port,
            };
            // An endpoint that names no node may still be here: whose its address is, the packet line knows.
            let maybe = candidates.iter().filter(|candidate| candidate.local || candidate.nowhere);
            exposed.extend(maybe.map(|candidate| listen(candidate.endpoint)));
        }
        service.local.extend(here().filter(|candidate| candidate.ready).map(|one| one.endpoint.address));
        let name = match &*port.name {
            "" => info.name.to_string(),
            name => format!("{}:{name}", info.name),
        };
        let same = |built: &&BuiltPort| {
            built.ipv4 == ipv4 && built.protocol == port.protocol && *built.port.name == *name
        };
        let before = service.before.ports.iter().find(same).map(|built| &built.port);
        let known = |candidate: &Candidate<'_>| Known {
            endpoint: candidate.endpoint,
            serving: candidate.ready || candidate.serving,
        };
        let built = ServicePort {
            id: match before {
                Some(before) => before.id,
                None => self.new_id(&name, port.protocol, ipv4),
            },
            name: name.into(),
            affinity: info.affinity,
            internal_local: info.internal_local,
            external_local: info.external_local,
            cluster: chosen.cluster.into(),
            local: chosen.local.into(),
            anywhere: chosen.anywhere,
            known: candidates.iter().map(known).collect(),
            sources: info.sources.iter().filter(|range| range.addr().is_ipv4() == ipv4).copied().collect(),
        };
        match before {
            Some(before) if **before == built => Arc::clone(before),
            Some(_) | None => Arc::new(built),
        }
    }

    /// The endpoints of a port, sorted, each once: what says that it is on this node counts before what does
    /// not (as in kube-proxy), then who says that it is ready.
    fn candidates<'s>(
        &self,
        slices: impl Iterator<Item = &'s Arc<SliceInfo>>,
        port: &PortInfo,
        service: &mut Building<'_>,
    ) -> Vec<Candidate<'s>> {
        let room = self.room.endpoints.saturating_sub(service.built.endpoints);
        let most = MAX_ENDPOINTS.min(MAX_OF_SERVICE.saturating_sub(service.built.endpoints)).min(room);
        let mut found: Vec<Candidate<'s>> = Vec::new();
        for slice in slices {
            // Slices may repeat each other, but not for ever.
            if found.len() > 2 * most {
                break;
            }
            let mine =
                |other: &&super::slice::SlicePort| other.name == port.name && other.protocol == port.protocol;
            for number in slice.ports.iter().filter(mine).map(|port| port.port) {
                for endpoint in &slice.endpoints {
                    let address = endpoint.address;
                    if self.around.services.holds(address) || self.outside.contains(&address) {
                        service.problems.add(
                            ProblemKind::Conflict,
                            "endpoints",
                            format_args!("{address} (EndpointSlice/{}) is a Service's", slice.name),
                        );
                        continue;
                    }
                    found.push(Candidate {
                        endpoint: Endpoint { address, port: number },
                        ready: endpoint.ready || service.info.publish_not_ready,
                        serving: endpoint.serving,
                        terminating: endpoint.terminating,
                        local: endpoint.node.as_deref() == Some(&self.around.node),
                        nowhere: endpoint.node.is_none(),
                        hints: endpoint.hints.as_deref(),
                    });
                }
            }
        }
        let rank = |one: &Candidate<'_>| (one.endpoint, !one.local, !one.ready, !one.serving);
        found.sort_by_key(rank);
        found.dedup_by_key(|one| one.endpoint);
        if found.len() > most {
            let reason = format!(
                "more than {MAX_ENDPOINTS} for port {}, {MAX_OF_SERVICE} for all ports, or {MAX_OF_ALL} for all \
                 Services: the rest is not used",
                port.port
            );
            service.problems.value("endpoints", reason);
            service.built.starved |= most == room;
            found.truncate(most);
        }
        found
    }

    /// An id that no other port has: the hash of what names this one.
    fn new_id(&mut self, name: &str, protocol: Protocol, ipv4: bool) -> u32 {
        let mut hasher = SipHasher13::new_with_keys(0x7761_7272_656e, 0x706f_7274);
        hasher.write(name.as_bytes());
        hasher.write(&[protocol.number(), u8::from(ipv4)]);
        let mut id = hasher.finish() as u32;
        while !self.ids.insert(id) {
            id = id.wrapping_add(1);
        }
        id
    }
}

/// A Service half built.
struct Building<'a> {
    info: &'a Arc<ServiceInfo>,
    before: &'a Built,
    built: Built,
    problems: Problems,
    /// Addresses of ready endpoints of this node.
    local: BTreeSet<IpAddr>,
}

impl Building<'_> {
    /// How many endpoints this node has: a pod with an address of each family is one.
    fn local_endpoints(&self) -> usize {
        let ipv4 = self.local.iter().filter(|address| address.is_ipv4()).count();
        ipv4.max(self.local.len() - ipv4)
    }
}
