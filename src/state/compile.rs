//! Desired state to what the packet line reads ([`Snapshot`]) and what the host needs ([`HostPlan`]).
//!
//! In order: settle who owns what, give every peer its number, choose its encapsulation and MTU, build
//! the routes. A peer that did not change keeps its `Arc`; a mesh that did not change keeps its too. Services
//! come last, and where only they changed, nothing else is looked at.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::annotations::{Announcement, Encaps};
use super::convert::NodeInfo;
use super::desired::Desired;
use super::ownership::{self, ClusterRanges, Grant};
use super::problem::{Problem, ProblemKind};
use super::services::compile::{Listed, ServiceCompiler};
use super::services::{ServicePlan, ServiceSettings, Surroundings};
use super::source::Kind;
use crate::snapshot::service::{Listen, Protocol};
use crate::snapshot::{Encap, LaneId, LocalNode, Mesh, Owner, Peer, PeerId, Snapshot};

mod local;

use local::Local;

/// The smallest MTU that IPv6 allows on a link (RFC 8200, 5).
pub const MIN_MTU_V6: u16 = 1280;
/// What every IPv4 host must be able to receive (RFC 791, 3.1): a smaller path is somebody's mistake.
pub const MIN_MTU_V4: u16 = 576;
/// How many removed peers' numbers rest before the first of them is used again.
const RESTING_IDS: usize = 64;
/// Most ranges of peers that are guarded after they went; whoever makes up more keeps those of today.
const MAX_GUARDED: usize = 1 << 16;

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
    /// `--cluster-cidr`; empty: the union of the pod ranges seen since the start.
    pub cluster_ranges: Vec<IpNet>,
    /// `--service-cidr`; empty: what the ServiceCIDR objects say.
    pub service_ranges: Vec<IpNet>,
    /// Services.
    pub services: ServiceSettings,
}

/// A range that is reached through the tunnel device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerRange {
    /// The range.
    pub range: IpNet,
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
    /// Whether `cluster_ranges` is only the union of what was seen since the start: pods of a node that was
    /// not seen yet are then not known to be pods.
    pub cluster_ranges_guessed: bool,
    /// The Service ranges.
    pub service_ranges: Vec<IpNet>,
    /// MTU for pods and the tunnel device: what fits whichever way this node may wrap it.
    pub pod_mtu: u16,
    /// Whether cluster traffic may only leave this node encapsulated (any policy but plain VXLAN).
    pub encrypted: bool,
    /// Where its kubelet listens, if its Node says so.
    pub kubelet_port: Option<u16>,
    /// Whether the node is about to go, by its Node.
    pub leaving: bool,
    /// What Services need.
    pub services: Arc<ServicePlan>,
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
    /// By origin: what is wrong now with Services that were looked at.
    pub service_reports: Vec<(String, Vec<Problem>)>,
    /// Whether snapshot and plan are the last ones, because this node has lost its pod ranges: half a
    /// state would drop the packets of pods that run.
    pub held: bool,
}

/// Compiles, and remembers what it compiled, so that the next time only what changed is made anew.
#[derive(Debug, Default)]
pub struct Compiler {
    generation: u64,
    ids: HashMap<String, PeerId>,
    resting: VecDeque<(u64, PeerId)>,
    next_id: u32,
    known: HashMap<String, Known>,
    services: ServiceCompiler,
    /// Every range that a peer ever had, joined: without `--cluster-cidr` nothing else says that an address
    /// there is a pod's, and packets for the pods of a Node that went must not leave in clear.
    guarded: Vec<IpNet>,
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

    /// How many Services and endpoints are in force.
    pub fn service_counts(&self) -> (usize, usize) {
        (self.services.services(), self.services.endpoints())
    }

    /// Compiles the desired state.
    pub fn compile(&mut self, desired: &Desired, settings: &Settings) -> Compiled {
        let (compiled, around) = self.compile_mesh(desired, settings);
        self.finish_services(desired, compiled, around)
    }

    /// Compiles what depends on Services alone, which is all that has changed since the last time.
    pub fn compile_services(&mut self, desired: &Desired, settings: &Settings) -> Compiled {
        match self.last.clone() {
            Some(last) => self.finish_services(desired, last, None),
            None => self.compile(desired, settings),
        }
    }

    /// Compiles all but the Services: they are the last ones here. And what they depend on, unless that is
    /// what it was.
    fn compile_mesh(&mut self, desired: &Desired, settings: &Settings) -> (Compiled, Option<Surroundings>) {
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
        let last = self.last.as_ref().filter(|last| !last.plan.pod_ranges.is_empty());
        let held = last.filter(|_| local.grant.ranges.is_empty());
        local.check(desired, held.is_some(), &mut problems);
        let kubelets = nodes.iter().zip(&ownership.grants).flat_map(|(node, grant)| kubelets(node, grant));
        let kubelets = kubelets.collect();
        if let Some(last) = held {
            return (Compiled { problems, held: true, ..last.clone() }, None);
        }

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
        self.guard(&mesh);
        let services = self.last.as_ref().map(|last| Arc::clone(&last.plan.services)).unwrap_or_default();
        let plan = local.plan(&mesh, cluster, services, &self.guarded, settings);
        let around = local.surroundings(&mesh, &plan, kubelets, settings);
        (self.finish_mesh(same, mesh, plan, local.node(settings), problems), Some(around))
    }

    fn finish_mesh(
        &mut self,
        same: bool,
        mesh: Mesh,
        plan: HostPlan,
        local: LocalNode,
        problems: Vec<Problem>,
    ) -> Compiled {
        let last = self.last.as_ref();
        let plan = match last {
            Some(last) if *last.plan == plan => Arc::clone(&last.plan),
            Some(_) | None => Arc::new(plan),
        };
        let snapshot = match last {
            Some(last) if same && *last.snapshot.local == local => Arc::clone(&last.snapshot),
            Some(_) | None => {
                self.generation += 1;
                Arc::new(Snapshot {
                    generation: self.generation,
                    local: Arc::new(local),
                    mesh: Arc::new(mesh),
                    services: last.map(|last| Arc::clone(&last.snapshot.services)).unwrap_or_default(),
                })
            }
        };
        Compiled { snapshot, plan, problems, service_reports: Vec::new(), held: false }
    }

    /// Puts the Services into what the mesh came to.
    fn finish_services(
        &mut self,
        desired: &Desired,
        mut compiled: Compiled,
        around: Option<Surroundings>,
    ) -> Compiled {
        let both =
            |is: fn(&Desired, Kind) -> bool| is(desired, Kind::Service) && is(desired, Kind::EndpointSlice);
        let listed = match (both(Desired::is_listed), both(Desired::is_heard)) {
            (true, _) => Listed::All,
            (false, true) => Listed::Some,
            (false, false) => Listed::Nothing,
        };
        let services = self.services.compile(desired.services(), around, listed);
        if !Arc::ptr_eq(&services.table, &compiled.snapshot.services) {
            let snapshot = &*compiled.snapshot;
            let last = self.last.as_ref();
            let handed_out = last.is_some_and(|last| last.snapshot.generation == snapshot.generation);
            self.generation += u64::from(handed_out);
            compiled.snapshot = Arc::new(Snapshot {
                generation: self.generation,
                local: Arc::clone(&snapshot.local),
                mesh: Arc::clone(&snapshot.mesh),
                services: services.table,
            });
        }
        if !Arc::ptr_eq(&services.plan, &compiled.plan.services) {
            compiled.plan = Arc::new(HostPlan { services: services.plan, ..(*compiled.plan).clone() });
        }
        compiled.service_reports = services.reports;
        self.last = Some(Compiled { service_reports: Vec::new(), ..compiled.clone() });
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
        if grant.ranges.is_empty() {
            let reason = "has no usable pod range, so none of its pods can be reached: set spec.podCIDRs, for \
                          example [\"10.244.1.0/24\"], different on every node";
            problems.push(Problem::node(ProblemKind::Value, &info.name, "spec.podCIDRs", reason));
        }
        let vxlan = local.vxlan(info, &grant, settings);
        // The tunnel device's: what would fit more never gets there, and a larger MSS would promise too much.
        let mtu = local.pod_mtu(settings);
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
            ordinary: info.announcement.ordinary,
            endpoints: grant.endpoints.clone(),
            vxlan,
            pod_ranges: grant.ranges.clone(),
            addresses,
            mtu,
            // Whoever of the two is behind NAT, its own packets keep the way in open.
            keepalive: shortest(info.announcement.keepalive, settings.announcement.keepalive),
            takes_strangers: info.announcement.services,
            also: grant.also.clone(),
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

    /// Remembers the peers' ranges. Not this node's own: those of today are in the plan, and pods of an earlier
    /// one may still sit on its bridge.
    fn guard(&mut self, mesh: &Mesh) {
        let today = || mesh.peers.iter().flatten().flat_map(|peer| peer.pod_ranges.iter().copied());
        self.guarded.extend(today());
        self.guarded = IpNet::aggregate(&self.guarded);
        if self.guarded.len() > MAX_GUARDED {
            self.guarded = IpNet::aggregate(&today().collect());
        }
    }

    /// Takes back the numbers of Nodes that are gone. Before the first full list a Node whose number was
    /// saved but that was not seen yet keeps it.
    fn release_ids(&mut self, desired: &Desired, settings: &Settings, generation: u64) {
        let stays = |name: &str| name != settings.node && desired.node(name).is_some();
        let listed = desired.is_listed(Kind::Node);
        let is_gone = |name: &str| !stays(name) && (listed || self.known.contains_key(name));
        let gone: Vec<String> = self.ids.keys().filter(|name| is_gone(name)).cloned().collect();
        self.known.retain(|name, _| stays(name));
        for name in gone {
            if let Some(id) = self.ids.remove(&name) {
                self.resting.push_back((generation, id));
            }
        }
    }
}

/// The shorter of two intervals, of which 0 is none.
/// Where a node's kubelet listens, by its Node.
fn kubelets<'a>(node: &NodeInfo, grant: &'a Grant) -> impl Iterator<Item = Listen> + use<'a> {
    let port = node.kubelet_port;
    let at =
        move |address: &IpAddr| port.map(|port| Listen { address: *address, protocol: Protocol::Tcp, port });
    grant.addresses.iter().filter_map(at)
}

fn shortest(theirs: u16, ours: u16) -> u16 {
    [theirs, ours].into_iter().filter(|seconds| *seconds > 0).min().unwrap_or(0)
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
    let keys = peer.lanes.iter().map(|lane| lane.key).zip(0..).chain(peer.also.iter().copied().zip(0..));
    for (key, number) in keys {
        mesh.keys.insert(key, (peer.id, LaneId(number)));
    }
    if let (Some(Encap::Vxlan), Some(vxlan)) = (peer.encap, &peer.vxlan) {
        mesh.vxlan_sources.insert(vxlan.address, peer.id);
    }
    mesh.peers[index] = Some(peer);
}

#[cfg(test)]
mod tests;
