//! What the host has to do for Services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::snapshot::service::{Listen, Protocol};

/// Most ClusterIPs that are routed one by one.
pub const MAX_OUTSIDE: usize = 1_000;

/// Most health check node ports: more than there are node ports by default.
pub(super) const MAX_HEALTH_CHECKS: usize = 4_096;

/// What a load balancer is told that asks for this node's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `namespace/name` of the Service.
    pub name: Arc<str>,
    /// How many ready endpoints of it are on this node.
    pub local_endpoints: usize,
}

/// What the host has to do for Services. Whatever did not change is the same `Arc` as before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// Load-balancer and external addresses, and the port of the loop's address that stands for each.
    pub externals: Arc<BTreeMap<Listen, u16>>,
    /// Ports of this node's own addresses; the loop's address has the same.
    pub node_ports: Arc<BTreeSet<(Protocol, u16)>>,
    /// By TCP port: where load balancers ask for this node's endpoints.
    pub health_checks: Arc<BTreeMap<u16, HealthCheck>>,
    /// ClusterIPs that lie in no known Service range; at most [`MAX_OUTSIDE`].
    pub cluster_ips_outside: Arc<BTreeSet<IpAddr>>,
}
