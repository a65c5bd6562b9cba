//! Who has an address or a port that several Services want: the older, then the lower UID, then the name.
//! Never the order of arrival; and when the winner goes, the next one has it. A load balancer's address, which
//! a controller wrote into the status, goes before an external IP, which anybody may write into the spec.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use super::service::ServiceInfo;
use crate::snapshot::service::{Listen, Protocol};
use crate::state::desired::Precedence;

/// What one Service alone can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Claim {
    /// A ClusterIP, whole.
    ClusterIp(IpAddr),
    /// A port of a load-balancer or external address.
    External(Listen),
    /// A port of every node.
    NodePort(Protocol, u16),
}

/// All claims, and who makes them.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Who wins comes first.
    claimants: BTreeMap<Claim, Vec<Arc<ServiceInfo>>>,
    /// The addresses of which somebody claims that port as an external one.
    external_ports: HashMap<(Protocol, u16), BTreeSet<IpAddr>>,
}

impl Claims {
    /// Who has it.
    pub(super) fn winner(&self, claim: &Claim) -> Option<&Arc<ServiceInfo>> {
        self.claimants.get(claim)?.first()
    }

    /// Who wants it.
    pub(super) fn claimants(&self, claim: &Claim) -> impl Iterator<Item = &Arc<ServiceInfo>> {
        self.claimants.get(claim).into_iter().flatten()
    }

    /// Who wants a port of this address.
    pub(super) fn external_claimants(&self, address: IpAddr) -> impl Iterator<Item = &Arc<ServiceInfo>> {
        let end = |protocol, port| Claim::External(Listen { address, protocol, port });
        let range = (Bound::Included(end(Protocol::Tcp, 0)), Bound::Included(end(Protocol::Sctp, u16::MAX)));
        self.claimants.range(range).flat_map(|(_, claimants)| claimants)
    }

    /// Who wants that port of an external address.
    pub(super) fn external_port_claimants(
        &self,
        protocol: Protocol,
        port: u16,
    ) -> impl Iterator<Item = &Arc<ServiceInfo>> {
        let addresses = self.external_ports.get(&(protocol, port)).into_iter().flatten();
        let claim = move |address: &IpAddr| Claim::External(Listen { address: *address, protocol, port });
        addresses.filter_map(move |address| self.claimants.get(&claim(address))).flatten()
    }

    /// Every ClusterIP that somebody has.
    pub(super) fn cluster_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.claimants.keys().map_while(|claim| match claim {
            Claim::ClusterIp(address) => Some(*address),
            Claim::External(_) | Claim::NodePort(..) => None, // they come after all of those
        })
    }

    pub(super) fn add(&mut self, claim: Claim, info: &Arc<ServiceInfo>) {
        if let Claim::External(at) = claim {
            self.external_ports.entry((at.protocol, at.port)).or_default().insert(at.address);
        }
        let claimants = self.claimants.entry(claim).or_insert_with(|| Vec::with_capacity(1));
        let at = claimants.partition_point(|other| rank(&claim, other) < rank(&claim, info));
        claimants.insert(at, Arc::clone(info));
    }

    pub(super) fn remove(&mut self, claim: &Claim, name: &str) {
        let Some(claimants) = self.claimants.get_mut(claim) else { return };
        claimants.retain(|info| *info.name != *name);
        if claimants.is_empty() {
            self.claimants.remove(claim);
            if let Claim::External(at) = claim
                && let Some(addresses) = self.external_ports.get_mut(&(at.protocol, at.port))
            {
                addresses.remove(&at.address);
                if addresses.is_empty() {
                    self.external_ports.remove(&(at.protocol, at.port));
                }
            }
        }
    }
}

fn rank<'a>(claim: &Claim, info: &'a ServiceInfo) -> (bool, &'a Precedence) {
    let external_ip = match claim {
        Claim::External(at) => !info.load_balancers.contains(&at.address),
        Claim::ClusterIp(_) | Claim::NodePort(..) => false,
    };
    (external_ip, &info.precedence)
}
