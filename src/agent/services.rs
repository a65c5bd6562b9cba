//! Services on this node: who does them, and what the plan means for the host.

use std::sync::Arc;

use ipnet::IpNet;
use tracing::{info, warn};

use super::health::Answers;
use crate::config::{AgentConfig, ServicesArg};
use crate::state::compile::HostPlan;

/// What is routed into the loop for Services, in the families that this node has pods of: no other pod or
/// node could be reached from here.
pub(super) fn ranges(plan: &HostPlan) -> Vec<IpNet> {
    let reachable =
        |range: &IpNet| plan.pod_ranges.iter().any(|pods| pods.addr().is_ipv4() == range.addr().is_ipv4());
    let single = plan.services.cluster_ips_outside.iter().map(|address| IpNet::from(*address));
    plan.service_ranges.iter().copied().chain(single).filter(reachable).collect()
}

/// What load balancers and monitoring are told; nothing while kube-proxy tells them.
pub(super) fn answers(config: &AgentConfig, plan: &HostPlan, kube_proxy: bool) -> Answers {
    let ours = match config.services {
        ServicesArg::Auto => !kube_proxy,
        ServicesArg::On => true,
        ServicesArg::Off => false,
    };
    if !ours {
        return Answers::default();
    }
    let checks = Arc::clone(&plan.services.health_checks);
    Answers {
        healthz: config.healthz,
        proxy_mode: config.proxy_mode,
        checks,
        check_ranges: config.nodeport_ranges.clone(),
        leaving: plan.leaving,
        ..Answers::default()
    }
}

/// Why Services are not ours, for `status`; empty when they are.
pub(super) fn elsewhere(config: &AgentConfig, kube_proxy: Option<&str>) -> String {
    match (config.services, kube_proxy) {
        (ServicesArg::Off, _) => "not Warren's (--services off)".to_owned(),
        (ServicesArg::Auto, Some(place)) => format!("left to kube-proxy, whose rules are here ({place})"),
        (ServicesArg::Auto, None) | (ServicesArg::On, _) => String::new(),
    }
}

/// Says what was found and what to do about it.
pub(super) fn yielded(config: &AgentConfig, place: &str) {
    match config.services {
        ServicesArg::Auto => warn!(
            "kube-proxy has its rules here ({place}): Services are left to it, and Warren connects pods and nodes \
             only. To hand Services over, stop kube-proxy on this node and run `kube-proxy --cleanup`; Warren goes \
             on with them by itself"
        ),
        ServicesArg::On => warn!(
            "kube-proxy has its rules here ({place}), and --services on does Services all the same: stop kube-proxy on \
             this node and run `kube-proxy --cleanup`"
        ),
        ServicesArg::Off => {}
    }
}

/// Says that it is gone.
pub(super) fn taken(config: &AgentConfig) {
    match config.services {
        ServicesArg::Auto => info!("kube-proxy's rules are gone: Services are Warren's now"),
        ServicesArg::On | ServicesArg::Off => {}
    }
}
