//! Desired state to what the packet line reads ([`Snapshot`]) and what the host needs ([`HostPlan`]).
//!
//! In order: settle who owns what, give every peer its number, choose its encapsulation and MTU, build
//! the routes. A peer that did not change keeps its `Arc`; a mesh that did not change keeps its too.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::annotations::{Announcement, Encaps};
use super::convert::NodeInfo;
use super::desired::Desired;
use super::ownership::{self, ClusterRanges, Grant};
use super::problem::{Problem, ProblemKind};
use super::source::Kind;
use crate::snapshot::{Encap, LaneId, LocalNode, Mesh, Owner, Peer, PeerId, PeerVxlan, Snapshot};

/// The smallest MTU that IPv6 allows on a link (RFC 8200, 5).
pub const MIN_MTU_V6: u16 = 1280;
/// What every IPv4 host must be able to receive (RFC 791, 3.1): a smaller path is somebody's mistake.
pub const MIN_MTU_V4: u16 = 576;
/// How many removed peers' numbers rest before the first of them is used again.
const RESTING_IDS: usize = 64;

/// Which encapsulation this node may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EncapPolicy {
    /// WireGuard to everyone.
    #[default]
    WireGuard,
    /// VXLAN to everyone.
    Vxlan,
    /// VXLAN inside a location, WireGuard between locations.
    Auto,
}

impl EncapPolicy {
    /// Its name in flags and reports.
    pub const fn name(self) -> &'static str {
        match self {
            EncapPolicy::WireGuard => "wireguard",
            EncapPolicy::Vxlan => "vxlan",
            EncapPolicy::Auto => "auto",
        }
    }

    /// What a node with this policy announces.
    pub const fn encaps(self) -> Encaps {
        match self {
            EncapPolicy::WireGuard => Encaps { wireguard: true, vxlan: false },
            EncapPolicy::Vxlan => Encaps { wireguard: false, vxlan: true },
            EncapPolicy::Auto => Encaps { wireguard: true, vxlan: true },
        }
    }
}

/// What this node's own configuration adds to the cluster's objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// This node's name.
    pub node: String,
    /// Which encapsulation it may use.
    pub encap: EncapPolicy,
    /// What it announces.
    pub announcement: Announcement,
    /// UDP port of VXLAN, the same on all nodes.
    pub vxlan_port: u16,
    /// VXLAN network identifier.
    pub vni: u32,
    /// Inner MAC address of our VXLAN end.
    pub mac: [u8; 6],
    /// MTU of the network under the tunnels.
    pub underlay_mtu: u16,
    /// `--cluster-cidr`; empty: the union of the pod ranges seen.
    pub cluster_ranges: Vec<IpNet>,
    /// `--service-cidr`; empty: what the ServiceCIDR objects say.
    pub service_ranges: Vec<IpNet>,
}

/// A range that is reached through the tunnel device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerRange {
    /// The range.
    pub range: IpNet,
    /// Largest packet that the path carries.
    pub mtu: u16,
    /// Whose it is.
    pub peer: String,
}

/// What the host's routes, rules, addresses and nftables table are made from. Everything is sorted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPlan {
    /// This node's name.
    pub node: String,
    /// This node's own pod ranges.
    pub pod_ranges: Vec<IpNet>,
    /// The node addresses: the network address of each own pod range; they sit on the tunnel device.
    pub node_addresses: Vec<IpAddr>,
    /// The addresses this node has outside the mesh (`status.addresses`).
    pub host_addresses: Vec<IpAddr>,
    /// The peers' pod ranges.
    pub peer_ranges: Vec<PeerRange>,
    /// The ranges that hold all pods of the cluster.
    pub cluster_ranges: Vec<IpNet>,
    /// Whether `cluster_ranges` is only the union of what was seen: pods of a node that was not seen
    /// yet are then not known to be pods.
    pub cluster_ranges_guessed: bool,
    /// The Service ranges.
    pub service_ranges: Vec<IpNet>,
    /// MTU for pods and the tunnel device: the smallest of all peers.
    pub pod_mtu: u16,
    /// Whether cluster traffic may only leave this node encapsulated (any policy but plain VXLAN).
    pub encrypted: bool,
}

/// What a compile gives.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// For the packet line.
    pub snapshot: Arc<Snapshot>,
    /// For the host.
    pub plan: Arc<HostPlan>,
    /// Claims that were refused, and settings that do not fit.
    pub problems: Vec<Problem>,
}

/// Compiles, and remembers what it compiled, so that the next time only what changed is made anew.
#[derive(Debug, Default)]
pub struct Compiler {
    generation: u64,
    ids: HashMap<String, PeerId>,
    resting: VecDeque<(u64, PeerId)>,
    next_id: u32,
    known: HashMap<String, Known>,
    last: Option<Compiled>,
}

/// What a peer was last made from.
#[derive(Debug)]
struct Known {
    info: Arc<NodeInfo>,
    grant: Grant,
    peer: Arc<Peer>,
}

impl Compiler {
    /// A compiler that gives peers the numbers they had before a restart.
    pub fn with_ids(ids: impl IntoIterator<Item = (String, PeerId)>) -> Compiler {
        // A number far beyond the number of nodes would only make the table of peers large.
        const LARGEST: u32 = 1 << 20;
        let mut compiler = Compiler::default();
        let mut used = std::collections::HashSet::new();
        for (name, id) in ids {
            if id.0 < LARGEST && used.insert(id) {
                compiler.next_id = compiler.next_id.max(id.0 + 1);
                compiler.ids.insert(name, id);
            }
        }
        compiler
            .resting
            .extend((0..compiler.next_id).map(PeerId).filter(|id| !used.contains(id)).map(|id| (0, id)));
        compiler
    }

    /// Every peer's number, to be saved.
    pub fn ids(&self) -> impl Iterator<Item = (&str, PeerId)> {
        self.ids.iter().map(|(name, id)| (name.as_str(), *id))
    }

    /// Compiles the desired state.
    pub fn compile(&mut self, desired: &Desired, settings: &Settings) -> Compiled {
        let nodes: Vec<&Arc<NodeInfo>> = desired.nodes().collect();
        let cluster = ClusterRanges {
            pods: settings.cluster_ranges.clone(),
            services: match settings.service_ranges.is_empty() {
                true => desired.service_ranges(),
                false => settings.service_ranges.clone(),
            },
        };
        let ownership = ownership::settle(&nodes, &cluster);
        let mut problems = ownership.problems;
        let local = Local::new(&nodes, &ownership.grants, settings);
        local.check(desired, &mut problems);

        let generation = self.generation + 1;
        self.release_ids(desired, settings, generation);
        let mut mesh = Mesh::default();
        let mut same = true;
        for (node, grant) in nodes.iter().zip(ownership.grants) {
            if node.name == settings.node {
                continue;
            }
            let (peer, reused) = self.peer(node, grant, &local, settings, generation, &mut problems);
            same &= reused;
            place(&mut mesh, peer);
        }
        local.place(&mut mesh);
        // The guard against a peer that went: every one was reused, and there are as many as before.
        let alive = mesh.peers.iter().flatten().count();
        same &= self.last.as_ref().is_some_and(|last| {
            last.snapshot.mesh.peers.iter().flatten().count() == alive
                && last.plan.pod_ranges == local.grant.ranges
                && last.plan.host_addresses == local.host_addresses()
        });
        let plan = Arc::new(local.plan(&mesh, cluster, settings));
        let local_node = local.node(settings);
        self.finish(same, mesh, plan, local_node, problems)
    }

    fn finish(
        &mut self,
        same: bool,
        mesh: Mesh,
        plan: Arc<HostPlan>,
        local: LocalNode,
        problems: Vec<Problem>,
    ) -> Compiled {
        let compiled = match &self.last {
            Some(last) if same && *last.snapshot.local == local => Compiled {
                snapshot: last.snapshot.clone(),
                plan: if last.plan == plan { last.plan.clone() } else { plan },
                problems,
            },
            Some(_) | None => {
                self.generation += 1;
                let snapshot =
                    Snapshot { generation: self.generation, local: Arc::new(local), mesh: Arc::new(mesh) };
                let plan = match &self.last {
                    Some(last) if last.plan == plan => last.plan.clone(),
                    Some(_) | None => plan,
                };
                Compiled { snapshot: Arc::new(snapshot), plan, problems }
            }
        };
        self.last = Some(compiled.clone());
        compiled
    }

    /// The peer, and whether it is the very same as before.
    fn peer(
        &mut self,
        info: &Arc<NodeInfo>,
        grant: Grant,
        local: &Local<'_>,
        settings: &Settings,
        generation: u64,
        problems: &mut Vec<Problem>,
    ) -> (Arc<Peer>, bool) {
        let id = self.id(&info.name, generation);
        let encap = local.encap(info, &grant, settings);
        if encap.is_none() && !info.announcement.encaps.is_empty() {
            let reason = format!(
                "speaks {}, which does not go with this node's {} here",
                info.announcement.encaps,
                settings.encap.encaps()
            );
            problems.push(Problem::node(ProblemKind::Setting, &info.name, "warren.dev/encaps", reason));
        }
        let vxlan = local.vxlan(info, &grant, settings);
        let mtu = path_mtu(encap, &grant, vxlan.as_ref(), local, settings.underlay_mtu);
        if let Some(known) = self.known.get(&info.name) {
            let peer = &known.peer;
            let unchanged = Arc::ptr_eq(&known.info, info) && known.grant == grant;
            if unchanged && peer.encap == encap && peer.vxlan == vxlan && peer.mtu == mtu && peer.id == id {
                return (peer.clone(), true);
            }
        }
        let mut addresses = grant.addresses.clone();
        addresses.extend(grant.ranges.iter().map(IpNet::network));
        let peer = Peer {
            id,
            name: info.name.clone(),
            encap,
            lanes: grant.lanes.clone(),
            endpoints: grant.endpoints.clone(),
            vxlan,
            pod_ranges: grant.ranges.clone(),
            addresses,
            mtu,
            keepalive: info.announcement.keepalive,
        };
        let before = self.known.get(&info.name).map(|known| &known.peer).filter(|before| ***before == peer);
        let (peer, reused) = match before {
            Some(before) => (before.clone(), true),
            None => (Arc::new(peer), false),
        };
        self.known.insert(info.name.clone(), Known { info: info.clone(), grant, peer: peer.clone() });
        (peer, reused)
    }

    fn id(&mut self, name: &str, generation: u64) -> PeerId {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        // A lane may skip snapshots, so a number rests for long where that costs nothing: until many
        // rest. It never comes back in the snapshot that follows the removal.
        let rested = self.resting.front().is_some_and(|(since, _)| generation >= since + 2);
        let id = match self.resting.len() > RESTING_IDS && rested {
            true => self.resting.pop_front().map(|(_, id)| id),
            false => None,
        };
        let id = id.unwrap_or_else(|| {
            let id = PeerId(self.next_id);
            self.next_id += 1;
            id
        });
        self.ids.insert(name.to_owned(), id);
        id
    }

    /// Takes back the numbers of Nodes that are gone. Before the first full list nothing counts as gone:
    /// a Node that was saved but not seen yet keeps its number.
    fn release_ids(&mut self, desired: &Desired, settings: &Settings, generation: u64) {
        let stays = |name: &str| name != settings.node && desired.node(name).is_some();
        self.known.retain(|name, _| stays(name));
        if !desired.is_listed(Kind::Node) {
            return;
        }
        let gone: Vec<String> = self.ids.keys().filter(|name| !stays(name)).cloned().collect();
        for name in gone {
            if let Some(id) = self.ids.remove(&name) {
                self.resting.push_back((generation, id));
            }
        }
    }
}

/// Enters a peer into every table of the mesh.
fn place(mesh: &mut Mesh, peer: Arc<Peer>) {
    let index = peer.id.0 as usize;
    if mesh.peers.len() <= index {
        mesh.peers.resize(index + 1, None);
    }
    for range in &peer.pod_ranges {
        mesh.routes.insert(*range, Owner::PeerPod(peer.id));
    }
    for address in &peer.addresses {
        mesh.routes.insert((*address).into(), Owner::PeerNode(peer.id));
    }
    for (lane, number) in peer.lanes.iter().zip(0..) {
        mesh.keys.insert(lane.key, (peer.id, LaneId(number)));
    }
    if let (Some(Encap::Vxlan), Some(vxlan)) = (peer.encap, &peer.vxlan) {
        mesh.vxlan_sources.insert(vxlan.address, peer.id);
    }
    mesh.peers[index] = Some(peer);
}

/// This node among the others.
struct Local<'a> {
    info: Option<&'a NodeInfo>,
    grant: Grant,
    location: Option<&'a str>,
    ipv6: bool,
    settings: &'a Settings,
}

impl<'a> Local<'a> {
    fn new(nodes: &[&'a Arc<NodeInfo>], grants: &[Grant], settings: &'a Settings) -> Local<'a> {
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

    fn check(&self, desired: &Desired, problems: &mut Vec<Problem>) {
        let node = &self.settings.node;
        let mut report = |field: &str, reason: &str| {
            problems.push(Problem::node(ProblemKind::Setting, node, field, reason));
        };
        match self.info {
            None if desired.is_listed(Kind::Node) => report("", "no such Node: is --node right?"),
            None => {}
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
    fn encap(&self, peer: &NodeInfo, grant: &Grant, settings: &Settings) -> Option<Encap> {
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

    fn vxlan(&self, peer: &NodeInfo, grant: &Grant, settings: &Settings) -> Option<PeerVxlan> {
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

    fn place(&self, mesh: &mut Mesh) {
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

    fn host_addresses(&self) -> Vec<IpAddr> {
        let mut addresses = self.grant.addresses.clone();
        addresses.sort();
        addresses
    }

    fn node(&self, settings: &Settings) -> LocalNode {
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

    fn plan(&self, mesh: &Mesh, cluster: ClusterRanges, settings: &Settings) -> HostPlan {
        let peers = || mesh.peers.iter().flatten();
        let of_peer = |peer: &Arc<Peer>| {
            let (mtu, name) = (peer.mtu, peer.name.clone());
            let ranges = peer.pod_ranges.clone();
            ranges.into_iter().map(move |range| PeerRange { range, mtu, peer: name.clone() })
        };
        let mut peer_ranges: Vec<PeerRange> = peers().flat_map(of_peer).collect();
        peer_ranges.sort();
        let guessed = cluster.pods.is_empty();
        let cluster_ranges = if guessed {
            let seen = peer_ranges.iter().map(|peer| peer.range).chain(self.grant.ranges.iter().copied());
            IpNet::aggregate(&seen.collect())
        } else {
            IpNet::aggregate(&cluster.pods)
        };
        let pod_mtu = peers().map(|peer| peer.mtu).min();
        // With nobody to ask: the dearest encapsulation, so that a pod made now fits what may come.
        let alone =
            || clamp(settings.underlay_mtu.saturating_sub(Encap::WireGuard.overhead(true)), self.ipv6);
        HostPlan {
            node: settings.node.clone(),
            pod_ranges: self.grant.ranges.clone(),
            node_addresses: self.node_addresses(),
            host_addresses: self.host_addresses(),
            peer_ranges,
            cluster_ranges,
            cluster_ranges_guessed: guessed,
            service_ranges: IpNet::aggregate(&cluster.services),
            pod_mtu: pod_mtu.unwrap_or_else(alone),
            encrypted: settings.encap != EncapPolicy::Vxlan,
        }
    }
}

/// The largest inner packet for a peer. Where the outer family is not settled (WireGuard peers roam), the
/// larger header is assumed. Never below what IPv6 needs where IPv6 is used: on a smaller underlay the
/// outer packet is then fragmented.
fn path_mtu(
    encap: Option<Encap>,
    grant: &Grant,
    vxlan: Option<&PeerVxlan>,
    local: &Local<'_>,
    underlay: u16,
) -> u16 {
    let outer_v6 = match encap {
        Some(Encap::Vxlan) => vxlan.is_none_or(|vxlan| vxlan.address.is_ipv6()),
        Some(Encap::WireGuard) | None => {
            grant.endpoints.is_empty() || grant.endpoints.iter().any(SocketAddr::is_ipv6)
        }
    };
    let overhead = encap.unwrap_or(Encap::WireGuard).overhead(outer_v6);
    clamp(underlay.saturating_sub(overhead), local.ipv6 || grant.ranges.iter().any(is_v6))
}

fn clamp(mtu: u16, ipv6: bool) -> u16 {
    mtu.max(if ipv6 { MIN_MTU_V6 } else { MIN_MTU_V4 })
}

fn is_v6(range: &IpNet) -> bool {
    matches!(range, IpNet::V6(_))
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
