//! Where a packet goes: to a peer, back into our own TUN, or through the kernel to outside the mesh.

use std::net::IpAddr;
use std::sync::Arc;

use super::conntrack::FlowKey;
use crate::packet::DropReason;
use crate::snapshot::service::loop_address;
use crate::snapshot::{Mesh, Owner, PeerId, SourceOwner};

/// The three ways out of the packet loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Through the tunnel to another node.
    Peer(PeerId),
    /// Into our own TUN: a pod of this node.
    LocalPod,
    /// Into our own TUN: this node itself.
    LocalNode,
    /// Into our own TUN for the kernel to route towards an address outside the mesh.
    Outside,
}

impl Exit {
    /// The peer that this is the way to.
    pub fn peer(self) -> Option<PeerId> {
        match self {
            Exit::Peer(peer) => Some(peer),
            Exit::LocalPod | Exit::LocalNode | Exit::Outside => None,
        }
    }
}

/// The two ways into the packet loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// Our own TUN.
    Tun,
    /// A peer's tunnel.
    Peer,
}

/// What may pass as it is. That most ways are closed to it is decided here and nowhere else; what a Service
/// translated, or an answer to it, may go them all.
pub(super) fn untranslated(entrance: Entrance, exit: Exit) -> Result<Exit, DropReason> {
    match (entrance, exit) {
        (Entrance::Tun, Exit::Peer(_)) | (Entrance::Peer, Exit::LocalPod | Exit::LocalNode) => Ok(exit),
        // The kernel knows the way to these, and sent them here all the same: it would do so again.
        (Entrance::Tun, Exit::LocalPod | Exit::LocalNode) => Err(DropReason::NotOurs),
        (Entrance::Tun, Exit::Outside) => Err(DropReason::NoRoute),
        // A peer's packets are for us: nothing is reflected, and this node is nobody's way out.
        (Entrance::Peer, Exit::Peer(_) | Exit::Outside) => Err(DropReason::NotOurs),
    }
}

/// Remembers the last answers: the packets of a burst ask the same questions.
#[derive(Debug, Default)]
pub struct RouteCache {
    mesh: Option<Arc<Mesh>>,
    out: Option<(IpAddr, IpAddr, Result<Exit, DropReason>)>,
    into: Option<(PeerId, IpAddr, IpAddr, Result<Exit, DropReason>)>,
    translated: Option<(IpAddr, IpAddr, Exit)>,
}

impl RouteCache {
    /// Takes another mesh and forgets all answers.
    pub fn follow(&mut self, mesh: &Arc<Mesh>) {
        *self = RouteCache { mesh: Some(Arc::clone(mesh)), ..RouteCache::default() };
    }

    /// The way out of a packet that came from our TUN.
    pub fn outbound(&mut self, source: IpAddr, destination: IpAddr) -> Result<Exit, DropReason> {
        if let Some((s, d, exit)) = self.out
            && s == source
            && d == destination
        {
            return exit;
        }
        let exit = self.mesh.as_ref().ok_or(DropReason::NoRoute);
        let exit = exit.and_then(|mesh| outbound(mesh, source, destination));
        self.out = Some((source, destination, exit));
        exit
    }

    /// The way of a translated packet: what has the loop's source goes through the kernel.
    pub fn translated(&mut self, to: &FlowKey) -> Exit {
        if let Some((source, destination, exit)) = self.translated
            && source == to.source
            && destination == to.destination
        {
            return exit;
        }
        let exit = self.mesh.as_ref().map_or(Exit::Outside, |mesh| exit_translated(mesh, to));
        self.translated = Some((to.source, to.destination, exit));
        exit
    }

    /// The way out of a packet that came out of a peer's tunnel.
    pub fn inbound(&mut self, peer: PeerId, source: IpAddr, destination: IpAddr) -> Result<Exit, DropReason> {
        if let Some((p, s, d, exit)) = self.into
            && p == peer
            && s == source
            && d == destination
        {
            return exit;
        }
        let exit = self.mesh.as_ref().ok_or(DropReason::NotOurs);
        let exit = exit.and_then(|mesh| inbound(mesh, peer, source, destination));
        self.into = Some((peer, source, destination, exit));
        exit
    }
}

/// From our TUN: the source must be this node's or one of its pods'.
fn outbound(mesh: &Mesh, source: IpAddr, destination: IpAddr) -> Result<Exit, DropReason> {
    if is_multicast(destination) {
        return Err(DropReason::Multicast);
    }
    match mesh.routes.lookup(source) {
        Some(Owner::LocalPod | Owner::LocalNode) => {}
        Some(Owner::PeerPod(_) | Owner::PeerNode(_)) | None => return Err(DropReason::ForeignSource),
    }
    Ok(exit(mesh, destination))
}

/// From a peer's tunnel: the source must be the peer's.
fn inbound(mesh: &Mesh, peer: PeerId, source: IpAddr, destination: IpAddr) -> Result<Exit, DropReason> {
    match mesh.source_owner(peer, source) {
        SourceOwner::Pod | SourceOwner::Node => {}
        SourceOwner::Foreign => return Err(DropReason::SpoofedSource),
    }
    Ok(exit(mesh, destination))
}

/// The way to an address.
pub(super) fn exit(mesh: &Mesh, destination: IpAddr) -> Exit {
    match mesh.routes.lookup(destination) {
        Some(Owner::LocalPod) => Exit::LocalPod,
        Some(Owner::LocalNode) => Exit::LocalNode,
        Some(Owner::PeerPod(peer) | Owner::PeerNode(peer)) => Exit::Peer(peer),
        None => Exit::Outside,
    }
}

/// The way of a translated packet. What has the loop's source is an answer to a client that the kernel led
/// here, wherever he is: it must see the answer too.
pub(super) fn exit_translated(mesh: &Mesh, to: &FlowKey) -> Exit {
    if to.source == loop_address(to.source) && exit(mesh, to.destination) != Exit::LocalNode {
        return Exit::Outside;
    }
    exit(mesh, to.destination)
}

fn is_multicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_multicast() || a.is_broadcast(),
        IpAddr::V6(a) => a.is_multicast(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh() -> Arc<Mesh> {
        let mut mesh = Mesh::default();
        for (range, owner) in [
            ("10.244.0.0/24", Owner::LocalPod),
            ("10.99.0.1/32", Owner::LocalNode),
            ("10.244.0.0/32", Owner::LocalNode),
            ("10.244.1.0/24", Owner::PeerPod(PeerId(1))),
            ("10.99.0.2/32", Owner::PeerNode(PeerId(1))),
            ("10.244.2.0/24", Owner::PeerPod(PeerId(2))),
            ("fd00:10:244::/64", Owner::LocalPod),
            ("fd00:10:244:1::/64", Owner::PeerPod(PeerId(1))),
        ] {
            mesh.routes.insert(range.parse().expect("range"), owner);
        }
        Arc::new(mesh)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    #[test]
    fn outbound_table() {
        let mut cache = RouteCache::default();
        cache.follow(&mesh());
        for (source, destination, expected) in [
            ("10.244.0.5", "10.244.1.7", Ok(Exit::Peer(PeerId(1)))),
            ("10.99.0.1", "10.244.2.7", Ok(Exit::Peer(PeerId(2)))),
            ("fd00:10:244::5", "fd00:10:244:1::5", Ok(Exit::Peer(PeerId(1)))),
            ("10.244.0.5", "10.99.0.2", Ok(Exit::Peer(PeerId(1)))),
            ("10.244.0.5", "10.244.9.7", Err(DropReason::NoRoute)),
            ("10.244.0.5", "10.244.0.6", Err(DropReason::NotOurs)),
            ("10.244.1.5", "10.244.2.6", Err(DropReason::ForeignSource)),
            ("192.0.2.1", "10.244.2.6", Err(DropReason::ForeignSource)),
            ("10.244.0.5", "224.0.0.1", Err(DropReason::Multicast)),
            ("fd00:10:244::5", "ff02::1", Err(DropReason::Multicast)),
        ] {
            for _ in 0..2 {
                let exit = cache.outbound(ip(source), ip(destination));
                assert_eq!(
                    exit.and_then(|exit| untranslated(Entrance::Tun, exit)),
                    expected,
                    "{source} -> {destination}"
                );
            }
        }
    }

    #[test]
    fn inbound_table() {
        let mut cache = RouteCache::default();
        cache.follow(&mesh());
        for (peer, source, destination, expected) in [
            (1, "10.244.1.7", "10.244.0.5", Ok(Exit::LocalPod)),
            (1, "10.99.0.2", "10.244.0.5", Ok(Exit::LocalPod)),
            (1, "10.244.1.7", "10.244.0.0", Ok(Exit::LocalNode)),
            (1, "10.244.2.7", "10.244.0.5", Err(DropReason::SpoofedSource)),
            (2, "10.99.0.2", "10.244.0.5", Err(DropReason::SpoofedSource)),
            (1, "10.244.0.7", "10.244.0.5", Err(DropReason::SpoofedSource)),
            (1, "192.0.2.7", "10.244.0.5", Err(DropReason::SpoofedSource)),
            (1, "10.244.1.7", "10.244.2.5", Err(DropReason::NotOurs)),
            (1, "10.244.1.7", "192.0.2.5", Err(DropReason::NotOurs)),
        ] {
            for _ in 0..2 {
                let exit = cache.inbound(PeerId(peer), ip(source), ip(destination));
                assert_eq!(
                    exit.and_then(|exit| untranslated(Entrance::Peer, exit)),
                    expected,
                    "{peer}: {source} -> {destination}"
                );
            }
        }
    }
}
