//! Services: from Service and EndpointSlice objects to the packet line's
//! [`ServiceTable`](crate::snapshot::service::ServiceTable) and the host's [`ServicePlan`].
//!
//! 1. [`service`], [`mod@slice`]: typed, bounded values
//! 2. [`store`]: what should be, and a journal of which Services changed
//! 3. `claims`: who has an address or a node port that several want
//! 4. `topology`: which endpoints a client is led to
//! 5. [`compile`]: only the Services that changed, into tables that share everything else with the last ones
//! 6. [`saved`]: what survives a restart

mod build;
mod claims;
pub mod compile;
mod judge;
mod loops;
mod plan;
pub mod saved;
pub mod service;
pub mod slice;
pub mod store;
mod topology;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::annotations::is_reachable;
use crate::snapshot::service::{Listen, Protocol, loop_address};

pub use plan::{HealthCheck, MAX_OUTSIDE, ServicePlan};

/// What this node's configuration says about Services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSettings {
    /// Whether this agent serves Services at all.
    pub enabled: bool,
    /// Whether `spec.externalIPs` are honoured (CVE-2020-8554: whoever may write a Service takes any address).
    pub external_ips: bool,
    /// Ports that no Service may capture on a node's address: the tunnels', the kubelet's, the API server's.
    pub protected_ports: BTreeSet<(Protocol, u16)>,
}

impl Default for ServiceSettings {
    fn default() -> ServiceSettings {
        ServiceSettings { enabled: false, external_ips: true, protected_ports: BTreeSet::new() }
    }
}

/// What Services are judged by, besides themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// This node's name.
    pub node: String,
    /// Its zone.
    pub zone: Option<String>,
    /// Where the cluster's pods live.
    pub pods: RangeSet,
    /// The Service ranges.
    pub services: RangeSet,
    /// The addresses of nodes outside of the mesh, sorted.
    pub nodes: Vec<IpAddr>,
    /// What of theirs no Service may capture and no setting of ours names, sorted: where tunnels end, and
    /// kubelets of other ports.
    pub listeners: Vec<Listen>,
    /// Where the API servers are, sorted: the endpoints of Service default/kubernetes. The compiler fills it.
    pub api_servers: Vec<Listen>,
    /// The settings.
    pub settings: ServiceSettings,
}

impl Surroundings {
    /// Whether it is a node's address.
    pub fn is_node(&self, address: IpAddr) -> bool {
        self.nodes.binary_search(&address).is_ok()
    }

    /// Why no Service may listen there, although the address may be a Service's.
    fn taken(&self, listen: &Listen) -> Option<&'static str> {
        let ours = self.settings.protected_ports.contains(&(listen.protocol, listen.port));
        if ours && self.is_node(listen.address) || self.listeners.binary_search(listen).is_ok() {
            Some("is a node's address, and nodes need")
        } else if self.api_servers.binary_search(listen).is_ok() {
            Some("is an API server's address, and it needs")
        } else {
            None
        }
    }

    /// Whether nodes need that port, so that it can be no node port.
    fn is_protected_port(&self, protocol: Protocol, port: u16) -> bool {
        let api = |at: &Listen| (at.protocol, at.port) == (protocol, port) && self.is_node(at.address);
        self.settings.protected_ports.contains(&(protocol, port)) || self.api_servers.iter().any(api)
    }

    /// The ports of the address that somebody else listens on.
    fn listeners_at(&self, address: IpAddr) -> &[Listen] {
        let from = self.listeners.partition_point(|other| other.address < address);
        let rest = self.listeners.get(from..).unwrap_or_default();
        &rest[..rest.partition_point(|other| other.address == address)]
    }
}

/// Ranges to look an address up in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// First and last address of each; sorted, and none overlaps another.
    spans: Vec<(IpAddr, IpAddr)>,
}

impl RangeSet {
    /// Those ranges.
    pub fn new(ranges: &[IpNet]) -> RangeSet {
        let ranges = IpNet::aggregate(&ranges.to_vec());
        let mut spans: Vec<_> = ranges.iter().map(|range| (range.network(), range.broadcast())).collect();
        spans.sort();
        RangeSet { spans }
    }

    /// Whether one of them holds the address.
    pub fn holds(&self, address: IpAddr) -> bool {
        let after = self.spans.partition_point(|(first, _)| *first <= address);
        let span = after.checked_sub(1).and_then(|at| self.spans.get(at));
        span.is_some_and(|(_, last)| address <= *last)
    }
}

/// Why the address can be no Service's and no endpoint's, whatever else there is.
fn no_ones(address: IpAddr) -> Option<&'static str> {
    if address == loop_address(address) {
        Some("is this program's own")
    } else if is_reachable(address) {
        None
    } else {
        Some("is of this host, of one link, multicast or reserved")
    }
}

#[cfg(test)]
mod tests;
