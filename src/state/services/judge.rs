//! What a Service may ask for at all, before others are asked.

use std::net::IpAddr;

use super::claims::Claim;
use super::service::{Problems, ServiceInfo};
use super::{Surroundings, no_ones};
use crate::snapshot::service::{Listen, Protocol, Way};
use crate::state::problem::ProblemKind;

/// Most ports of external and load-balancer addresses of one Service: the loop has some 62,000 for all.
const MAX_EXTERNALS: usize = 2_048;

/// What it may ask for.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) cluster_ips: Vec<IpAddr>,
    /// Load-balancer addresses first: of one that is both, its source ranges hold.
    pub(super) externals: Vec<(Way, Listen)>,
    pub(super) node_ports: Vec<(Protocol, u16)>,
    pub(super) health_check: Option<u16>,
}

impl Wanted {
    pub(super) fn claims(&self) -> Box<[Claim]> {
        let cluster_ips = self.cluster_ips.iter().map(|address| Claim::ClusterIp(*address));
        let externals = self.externals.iter().map(|(_, listen)| Claim::External(*listen));
        let node_ports = self.node_ports.iter().map(|(protocol, port)| Claim::NodePort(*protocol, *port));
        let health_check = self.health_check.map(|port| Claim::NodePort(Protocol::Tcp, port));
        cluster_ips.chain(externals).chain(node_ports).chain(health_check).collect()
    }
}

/// Judges a Service by what is around it.
pub(super) fn judge(info: &ServiceInfo, around: &Surroundings, problems: &mut Problems) -> Wanted {
    let mut wanted = Wanted::default();
    for address in &info.cluster_ips {
        let node = || around.is_node(*address).then_some("is a node's address");
        match refusal(*address, around).or_else(|| node().map(conflict)) {
            Some((kind, reason)) => problems.add(kind, "spec.clusterIPs", format!("{address} {reason}")),
            None => wanted.cluster_ips.push(*address),
        }
    }
    let balancers = ("status.loadBalancer.ingress", Way::LoadBalancer, &*info.load_balancers);
    externals(balancers, info, around, problems, &mut wanted.externals);
    if around.settings.external_ips {
        let external = ("spec.externalIPs", Way::ExternalIp, &*info.external_ips);
        externals(external, info, around, problems, &mut wanted.externals);
    }
    for port in info.ports.iter().filter(|port| port.node_port != 0) {
        let claim = (port.protocol, port.node_port);
        let reason = if around.is_protected_port(port.protocol, port.node_port) {
            "is one that nodes need for themselves"
        } else if wanted.node_ports.contains(&claim) {
            "is used twice"
        } else {
            wanted.node_ports.push(claim);
            continue;
        };
        let reason = format!("{} {} {reason}", port.protocol.name(), port.node_port);
        problems.add(ProblemKind::Conflict, "spec.ports.nodePort", reason);
    }
    let health = Some(info.health_check).filter(|port| *port != 0);
    wanted.health_check = health.filter(|port| {
        let ways = &wanted.node_ports;
        let (twice, protected) =
            (ways.contains(&(Protocol::Tcp, *port)), around.is_protected_port(Protocol::Tcp, *port));
        if twice || protected {
            let reason = format!("{port} is taken already");
            problems.add(ProblemKind::Conflict, "spec.healthCheckNodePort", reason);
        }
        !twice && !protected
    });
    wanted
}

fn externals(
    (field, way, addresses): (&str, Way, &[IpAddr]),
    info: &ServiceInfo,
    around: &Surroundings,
    problems: &mut Problems,
    wanted: &mut Vec<(Way, Listen)>,
) {
    for address in addresses {
        let service = || around.services.holds(*address).then_some("lies in a Service range");
        if let Some((kind, reason)) = refusal(*address, around).or_else(|| service().map(conflict)) {
            problems.add(kind, field, format!("{address} {reason}"));
            continue;
        }
        for port in &info.ports {
            let listen = Listen { address: *address, protocol: port.protocol, port: port.port };
            if let Some(why) = around.taken(&listen) {
                let (protocol, port) = (port.protocol.name(), port.port);
                let reason = format_args!("{address} {why} {protocol} {port}");
                problems.add(ProblemKind::Conflict, field, reason);
            } else if wanted.len() >= MAX_EXTERNALS {
                problems.value(field, format!("more than {MAX_EXTERNALS} addresses times ports"));
                return;
            } else if !wanted.iter().any(|(_, other)| *other == listen) {
                wanted.push((way, listen));
            }
        }
    }
}

/// Why no Service may have the address.
fn refusal(address: IpAddr, around: &Surroundings) -> Option<(ProblemKind, &'static str)> {
    match no_ones(address) {
        Some(reason) => Some((ProblemKind::Value, reason)),
        None => around.pods.holds(address).then_some("lies in a pod range of the cluster").map(conflict),
    }
}

fn conflict(reason: &'static str) -> (ProblemKind, &'static str) {
    (ProblemKind::Conflict, reason)
}
