//! What the packet line reads: one immutable, compiled view of the cluster.
//!
//! The state line compiles a new [`Snapshot`] whenever something changes and swaps it in; a lane
//! loads it once per batch. Sections that change at different speeds sit behind their own `Arc`,
//! so that a change of one does not copy the others.

pub mod service;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use service::ServiceTable;

/// A WireGuard public key.
pub type PublicKey = [u8; 32];

/// The number of a peer: an index into [`Mesh::peers`], stable for as long as the peer exists
/// (across snapshots), reused only after it has been gone for a whole snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u32);

/// Which lane of a node: lane i of one node talks to lane i mod n of a node with n lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneId(pub u8);

impl LaneId {
    /// The lane of a peer with `lanes` lanes that this lane talks to.
    pub fn partner(self, lanes: usize) -> LaneId {
        debug_assert!(lanes > 0);
        LaneId((self.0 as usize % lanes.max(1)) as u8)
    }
}

/// Most lanes a node may have.
pub const MAX_LANES: usize = 64;

/// How packets to one peer are wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encap {
    /// WireGuard: encrypted, the default.
    WireGuard,
    /// VXLAN: plain, for networks that are trusted.
    Vxlan,
}

impl Encap {
    /// The name used in annotations, flags and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Encap::WireGuard => "wireguard",
            Encap::Vxlan => "vxlan",
        }
    }

    /// Bytes that the encapsulation adds to an inner packet, outer IP header included.
    /// WireGuard: 16 header + 16 tag + 8 UDP; VXLAN: 14 Ethernet + 8 VXLAN + 8 UDP (RFC 7348).
    pub const fn overhead(self, outer_v6: bool) -> u16 {
        let ip = if outer_v6 { 40 } else { 20 };
        match self {
            Encap::WireGuard => ip + 8 + 32,
            Encap::Vxlan => ip + 8 + 8 + 14,
        }
    }
}

/// One lane of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerLane {
    /// The lane's WireGuard key.
    pub key: PublicKey,
    /// The lane's UDP port at each of the peer's endpoints, unless the endpoint names its own.
    pub port: u16,
}

/// What VXLAN needs to know of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerVxlan {
    /// The only outer address that frames of this peer may come from, and where ours go.
    pub address: IpAddr,
    /// UDP port.
    pub port: u16,
    /// Inner MAC address of the peer's tunnel device; learnt by ARP or ND when it is not announced.
    pub mac: Option<[u8; 6]>,
}

/// Another node of the mesh, as the packet line sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number.
    pub id: PeerId,
    /// The Node's name.
    pub name: String,
    /// How packets to it are wrapped; `None` when the two nodes have no encapsulation in common.
    pub encap: Option<Encap>,
    /// Its lanes, lane 0 first; empty when it has not announced a key yet.
    pub lanes: Vec<PeerLane>,
    /// Whether it knows lane 0 of ours only: an ordinary WireGuard peer, to which a person has given one key of ours.
    pub ordinary: bool,
    /// Where it may be reached for WireGuard, best first: lane 0's address and port. Lane i of the
    /// peer listens on the same address at `lanes[i].port`.
    pub endpoints: Vec<SocketAddr>,
    /// VXLAN, if it speaks it.
    pub vxlan: Option<PeerVxlan>,
    /// The pod ranges it owns.
    pub pod_ranges: Vec<IpNet>,
    /// The node addresses it owns (its `status.addresses` and the addresses on its tunnel device).
    pub addresses: Vec<IpAddr>,
    /// The largest inner packet that the path to it carries.
    pub mtu: u16,
    /// Seconds between keepalives, for peers behind NAT; 0 for none.
    pub keepalive: u16,
    /// Whether it takes packets of clients outside the mesh that are sent to an endpoint of its own.
    pub takes_strangers: bool,
    /// A second key of each lane, while its keys change: the next one before, the last one after it. Empty otherwise.
    pub also: Vec<PublicKey>,
}

/// Whose address this is, when a packet comes out of a peer's tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceOwner {
    /// A pod of the peer.
    Pod,
    /// The peer itself.
    Node,
    /// Neither: refused, unless it is a client of a Service here.
    Foreign,
}

/// Where an address lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A pod of a peer.
    PeerPod(PeerId),
    /// A peer's own address.
    PeerNode(PeerId),
    /// A pod of this node.
    LocalPod,
    /// This node itself.
    LocalNode,
}

/// Longest-prefix match over both families; cost depends on the prefix length, not on the number of nodes.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    v4: PrefixMap<Ipv4Net, Owner>,
    v6: PrefixMap<Ipv6Net, Owner>,
}

impl RouteTable {
    /// Adds a range; returns what it replaced.
    pub fn insert(&mut self, range: IpNet, owner: Owner) -> Option<Owner> {
        match range {
            IpNet::V4(net) => self.v4.insert(net.trunc(), owner),
            IpNet::V6(net) => self.v6.insert(net.trunc(), owner),
        }
    }

    /// The owner of the longest range that holds `address`.
    pub fn lookup(&self, address: IpAddr) -> Option<Owner> {
        match address {
            IpAddr::V4(a) => self.v4.get_lpm(&host_v4(a)).map(|(_, owner)| *owner),
            IpAddr::V6(a) => self.v6.get_lpm(&host_v6(a)).map(|(_, owner)| *owner),
        }
    }

    /// Whether any range that holds `address` is one of pods, also where a node's address stands out of it.
    pub fn among_pods(&self, address: IpAddr) -> bool {
        let pods = |owner: &Owner| match owner {
            Owner::PeerPod(_) | Owner::LocalPod => true,
            Owner::PeerNode(_) | Owner::LocalNode => false,
        };
        match address {
            IpAddr::V4(a) => self.v4.cover_values(&host_v4(a)).any(pods),
            IpAddr::V6(a) => self.v6.cover_values(&host_v6(a)).any(pods),
        }
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn host_v4(address: Ipv4Addr) -> Ipv4Net {
    Ipv4Net::from(address)
}

fn host_v6(address: Ipv6Addr) -> Ipv6Net {
    Ipv6Net::from(address)
}

/// All nodes and where every address lives.
#[derive(Debug, Default)]
pub struct Mesh {
    /// Indexed by [`PeerId`]; `None` where a peer has gone.
    pub peers: Vec<Option<Arc<Peer>>>,
    /// Every pod range and node address, this node's too.
    pub routes: RouteTable,
    /// Which peer and lane a WireGuard key belongs to, those of [`Peer::also`] too.
    pub keys: HashMap<PublicKey, (PeerId, LaneId)>,
    /// Outer addresses that may send VXLAN to us.
    pub vxlan_sources: HashMap<IpAddr, PeerId>,
}

impl Mesh {
    /// The peer of that number, if it is still there.
    pub fn peer(&self, id: PeerId) -> Option<&Arc<Peer>> {
        self.peers.get(id.0 as usize)?.as_ref()
    }

    /// Whether the address is this node's or one of its pods'.
    pub fn is_ours(&self, address: IpAddr) -> bool {
        matches!(self.routes.lookup(address), Some(Owner::LocalPod | Owner::LocalNode))
    }

    /// Whose address a packet from `peer` claims to come from: one function, three answers.
    pub fn source_owner(&self, peer: PeerId, source: IpAddr) -> SourceOwner {
        match self.routes.lookup(source) {
            Some(Owner::PeerPod(id)) if id == peer => SourceOwner::Pod,
            Some(Owner::PeerNode(id)) if id == peer => SourceOwner::Node,
            Some(Owner::PeerPod(_) | Owner::PeerNode(_) | Owner::LocalPod | Owner::LocalNode) | None => {
                SourceOwner::Foreign
            }
        }
    }
}

/// This node, as its own packet line sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalNode {
    /// Its name.
    pub name: String,
    /// The source of ICMP errors we send, IPv4 (the address on the tunnel device).
    pub address_v4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub address_v6: Option<Ipv6Addr>,
    /// VXLAN network identifier.
    pub vni: u32,
    /// Inner MAC address of our end of the VXLAN.
    pub mac: [u8; 6],
}

/// Everything the packet line reads.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Counts up with every change.
    pub generation: u64,
    /// This node.
    pub local: Arc<LocalNode>,
    /// All nodes.
    pub mesh: Arc<Mesh>,
    /// All Services.
    pub services: Arc<ServiceTable>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_address_among_pods_is_told_from_its_address_outside() {
        let mut routes = RouteTable::default();
        for (range, owner) in [
            ("10.244.0.0/24", Owner::LocalPod),
            ("10.244.0.0/32", Owner::LocalNode),
            ("192.0.2.1/32", Owner::LocalNode),
            ("10.244.1.0/24", Owner::PeerPod(PeerId(1))),
            ("10.244.1.0/32", Owner::PeerNode(PeerId(1))),
            ("192.0.2.2/32", Owner::PeerNode(PeerId(1))),
            ("fd00:10:244:1::/64", Owner::PeerPod(PeerId(1))),
            ("fd00:10:244:1::/128", Owner::PeerNode(PeerId(1))),
        ] {
            routes.insert(range.parse().expect("range"), owner);
        }
        let among = |text: &str| routes.among_pods(text.parse().expect("address"));
        for inside in ["10.244.0.0", "10.244.0.9", "10.244.1.0", "10.244.1.9", "fd00:10:244:1::"] {
            assert!(among(inside), "{inside}");
        }
        for outside in ["192.0.2.1", "192.0.2.2", "192.0.2.3", "10.244.2.1", "fd00:10:244:2::"] {
            assert!(!among(outside), "{outside}");
        }
    }
}
