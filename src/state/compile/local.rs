//! This node as one end of every link: encapsulation, MTU, its own place in the mesh, the host plan.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::{EncapPolicy, HostPlan, MIN_MTU_V4, MIN_MTU_V6, PeerRange, Settings};
use crate::snapshot::service::{Listen, Protocol};
use crate::snapshot::{Encap, LocalNode, Mesh, Owner, Peer, PeerVxlan};
use crate::state::convert::NodeInfo;
use crate::state::desired::Desired;
use crate::state::ownership::{ClusterRanges, Grant};
use crate::state::problem::{Problem, ProblemKind};
use crate::state::services::{RangeSet, ServicePlan, Surroundings};
use crate::state::source::Kind;

/// This node among the others.
pub(super) struct Local<'a> {
    info: Option<&'a NodeInfo>,
    pub(super) grant: Grant,
    location: Option<&'a str>,
    ipv6: bool,
    settings: &'a Settings,
}

impl<'a> Local<'a> {
    pub(super) fn new(nodes: &[&'a Arc<NodeInfo>], grants: &[Grant], settings: &'a Settings) -> Local<'a> {
        let found = nodes.iter().zip(grants).find(|(node, _)| node.name == settings.node);
        let info: Option<&'a NodeInfo> =
            found.map(|(node, _)| -> &'a Arc<NodeInfo> { node }).map(Arc::as_ref);
        let grant = found.map(|(_, grant)| grant.clone()).unwrap_or_default();
        // What the others see counts, so that both ends choose the same.
        let seen = info.and_then(|info| info.announcement.location.as_deref());
        Local {
            info,
            location: seen.or(settings.announcement.location.as_deref()),
            ipv6: grant.ranges.iter().any(is_v6),
            grant,
            settings,
        }
    }

    /// What is wrong with this node's own Node. `held`: what was compiled before stays in force.
    pub(super) fn check(&self, desired: &Desired, held: bool, problems: &mut Vec<Problem>) {
        let node = &self.settings.node;
        let mut report = |field: &str, reason: &str| {
            problems.push(Problem::node(ProblemKind::Setting, node, field, reason));
        };
        match self.info {
            None if held => {
                report(
                    "",
                    "this node's Node is gone: the last state stays in force until there is one again",
                );
            }
            None if desired.is_listed(Kind::Node) => report("", "no such Node: is --node right?"),
            None => {}
            Some(_) if self.grant.ranges.is_empty() && held => report(
                "spec.podCIDRs",
                "this node has lost its pod range: the last state stays in force until there is one again",
            ),
            Some(_) if self.grant.ranges.is_empty() => {
                report("spec.podCIDRs", "this node has no pod range: its pods cannot be reached");
            }
            Some(info) => {
                let (seen, own) = (&info.announcement, &self.settings.announcement);
                if !seen.lanes.is_empty() && seen.lanes != own.lanes {
                    report("warren.dev/lanes", "the keys announced for this node are not its own");
                }
            }
        }
    }

    /// How packets between this node and that one are wrapped. Both ends ask this and must agree, so it
    /// depends only on what both know: the two announcements and the two Nodes' addresses.
    pub(super) fn encap(&self, peer: &NodeInfo, grant: &Grant, settings: &Settings) -> Option<Encap> {
        let mine = settings.encap.encaps();
        let theirs = peer.announcement.encaps;
        if theirs.is_empty() {
            // Nothing announced yet. Never plain by default.
            return mine.wireguard.then_some(Encap::WireGuard);
        }
        let together = self.location.is_some() && self.location == peer.announcement.location.as_deref();
        let both_choose = mine.wireguard && mine.vxlan || theirs.wireguard && theirs.vxlan;
        // A node in `auto` speaks VXLAN only inside its location, whatever the other would accept.
        let vxlan = mine.vxlan && theirs.vxlan && (together || !both_choose);
        if vxlan && self.vxlan_address(grant).is_some() {
            Some(Encap::Vxlan)
        } else if mine.wireguard && theirs.wireguard {
            Some(Encap::WireGuard)
        } else {
            None
        }
    }

    pub(super) fn vxlan(&self, peer: &NodeInfo, grant: &Grant, settings: &Settings) -> Option<PeerVxlan> {
        let address = self.vxlan_address(grant).filter(|_| peer.announcement.encaps.vxlan)?;
        Some(PeerVxlan { address, port: settings.vxlan_port, mac: peer.announcement.vxlan_mac })
    }

    /// The peer's first address of a family that this node has too.
    fn vxlan_address(&self, grant: &Grant) -> Option<IpAddr> {
        let shared = |address: &&IpAddr| {
            let own = &self.grant.addresses;
            own.iter().any(|own| own.is_ipv4() == address.is_ipv4())
        };
        grant.addresses.iter().find(shared).copied()
    }

    pub(super) fn place(&self, mesh: &mut Mesh) {
        for range in &self.grant.ranges {
            mesh.routes.insert(*range, Owner::LocalPod);
        }
        for address in self.node_addresses().into_iter().chain(self.grant.addresses.iter().copied()) {
            mesh.routes.insert(address.into(), Owner::LocalNode);
        }
    }

    fn node_addresses(&self) -> Vec<IpAddr> {
        self.grant.ranges.iter().map(IpNet::network).collect()
    }

    pub(super) fn host_addresses(&self) -> Vec<IpAddr> {
        let mut addresses = self.grant.addresses.clone();
        addresses.sort();
        addresses
    }

    pub(super) fn node(&self, settings: &Settings) -> LocalNode {
        let v4 = |address| match address {
            IpAddr::V4(v4) => Some(v4),
            IpAddr::V6(_) => None,
        };
        let v6 = |address| match address {
            IpAddr::V6(v6) => Some(v6),
            IpAddr::V4(_) => None,
        };
        LocalNode {
            name: settings.node.clone(),
            address_v4: self.node_addresses().into_iter().find_map(v4),
            address_v6: self.node_addresses().into_iter().find_map(v6),
            vni: settings.vni,
            mac: settings.mac,
        }
    }

    /// `guarded`: the ranges of all peers that there ever were.
    pub(super) fn plan(
        &self,
        mesh: &Mesh,
        cluster: ClusterRanges,
        services: Arc<ServicePlan>,
        guarded: &[IpNet],
        settings: &Settings,
    ) -> HostPlan {
        let peers = || mesh.peers.iter().flatten();
        let of_peer = |peer: &Arc<Peer>| {
            let (name, ranges) = (peer.name.clone(), peer.pod_ranges.clone());
            ranges.into_iter().map(move |range| PeerRange { range, peer: name.clone() })
        };
        let mut peer_ranges: Vec<PeerRange> = peers().flat_map(of_peer).collect();
        peer_ranges.sort();
        let guessed = cluster.pods.is_empty();
        let cluster_ranges = if guessed {
            IpNet::aggregate(&[guarded, &self.grant.ranges].concat())
        } else {
            IpNet::aggregate(&cluster.pods)
        };
        HostPlan {
            node: settings.node.clone(),
            pod_ranges: self.grant.ranges.clone(),
            node_addresses: self.node_addresses(),
            host_addresses: self.host_addresses(),
            peer_ranges,
            cluster_ranges,
            cluster_ranges_guessed: guessed,
            service_ranges: IpNet::aggregate(&cluster.services),
            pod_mtu: self.pod_mtu(settings),
            encrypted: settings.encap != EncapPolicy::Vxlan,
            kubelet_port: self.info.and_then(|info| info.kubelet_port),
            leaving: self.info.is_some_and(|info| info.leaving),
            services,
        }
    }

    /// What Services are judged by.
    pub(super) fn surroundings(
        &self,
        mesh: &Mesh,
        plan: &HostPlan,
        kubelets: Vec<Listen>,
        settings: &Settings,
    ) -> Surroundings {
        let of_peer = |peer: &Arc<Peer>| -> Vec<IpAddr> {
            let endpoints = peer.endpoints.iter().map(SocketAddr::ip);
            peer.addresses.iter().copied().chain(endpoints).collect()
        };
        let mut nodes: Vec<IpAddr> = mesh.peers.iter().flatten().flat_map(of_peer).collect();
        nodes.extend(&self.grant.addresses);
        nodes.extend(self.grant.endpoints.iter().map(SocketAddr::ip));
        nodes.extend(settings.announcement.endpoints.iter().map(SocketAddr::ip));
        nodes.sort();
        nodes.dedup();
        let tunnels = mesh.peers.iter().flatten().flat_map(tunnels);
        let udp = |(address, port)| Listen { address, protocol: Protocol::Udp, port };
        let mut listeners: Vec<Listen> = tunnels.map(udp).chain(kubelets).collect();
        listeners.sort_unstable();
        listeners.dedup();
        let mut services = settings.services.clone();
        // On its own addresses a node has it whether or not anybody knows of them.
        services.protected_ports.extend(plan.kubelet_port.map(|port| (Protocol::Tcp, port)));
        Surroundings {
            node: settings.node.clone(),
            zone: self.info.and_then(|info| info.zone.clone()),
            pods: RangeSet::new(&plan.cluster_ranges),
            services: RangeSet::new(&plan.service_ranges),
            nodes,
            listeners,
            api_servers: Vec::new(),
            settings: services,
        }
    }

    /// What a pod may send to anybody: the dearest header that this node's policy and addresses allow (where
    /// the outer family is not settled, as WireGuard peers roam, IPv6's). Never below what IPv6 needs where
    /// pods have it: on a smaller underlay the outer packet is then fragmented.
    /// No other node has a say, so that none can make our pods' MTU move by coming, going or lying.
    pub(super) fn pod_mtu(&self, settings: &Settings) -> u16 {
        let overhead = match settings.encap {
            EncapPolicy::WireGuard | EncapPolicy::Auto => Encap::WireGuard.overhead(true),
            EncapPolicy::Vxlan => {
                let own = &self.grant.addresses;
                Encap::Vxlan.overhead(own.is_empty() || own.iter().any(IpAddr::is_ipv6))
            }
        };
        clamp(settings.underlay_mtu.saturating_sub(overhead), self.ipv6)
    }
}

/// Where packets to this peer go: whichever of its addresses it is reached by.
fn tunnels(peer: &Arc<Peer>) -> impl Iterator<Item = (IpAddr, u16)> + '_ {
    let addresses = || peer.addresses.iter().copied().chain(peer.endpoints.iter().map(SocketAddr::ip));
    let lanes = peer.lanes.iter().flat_map(move |lane| addresses().map(|address| (address, lane.port)));
    let vxlan = peer.vxlan.iter().map(|vxlan| (vxlan.address, vxlan.port));
    lanes.chain(peer.endpoints.iter().map(|at| (at.ip(), at.port()))).chain(vxlan)
}

fn clamp(mtu: u16, ipv6: bool) -> u16 {
    mtu.max(if ipv6 { MIN_MTU_V6 } else { MIN_MTU_V4 })
}

fn is_v6(range: &IpNet) -> bool {
    matches!(range, IpNet::V6(_))
}
