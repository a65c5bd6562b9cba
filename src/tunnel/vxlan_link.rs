//! VXLAN's end of a lane: whose frames are taken, and which MAC address a peer has.
//!
//! The wire format is in [`vxlan`](super::vxlan). A peer that announces its MAC address needs no more; for
//! one that does not (a kernel `vxlan` device set up by hand) the address is asked for and learnt, per
//! peer and never across peers, and packets wait for it in a small queue.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::vxlan::{self, HEADER, Inner, MAX_NEIGHBOUR, Mac};
use super::{Segments, TxBatch, Via};
use crate::packet::DropReason;
use crate::snapshot::{Encap, LocalNode, Mesh, Owner, Peer, PeerId, Snapshot};

/// Packets that wait for one peer's MAC address.
const QUEUE_PACKETS: usize = 64;
/// Between two questions to the same peer; the kernel's `retrans_time_ms` is a second too.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// A packet that has waited this long is of no use to anyone.
const QUEUE_AGE: Duration = Duration::from_secs(3);

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// An IP packet stands at this offset of the datagram.
    Packet {
        /// Who sent it.
        peer: PeerId,
        /// Where it begins.
        offset: usize,
    },
    /// A question was answered.
    Answered,
    /// A MAC address was told.
    Learnt,
    /// Refused.
    Drop(DropReason),
}

/// The VXLAN end of one lane.
#[derive(Debug)]
pub struct VxlanLink {
    sources: u8,
    learnt: HashMap<PeerId, Mac>,
    waiting: HashMap<PeerId, Waiting>,
    mesh: Option<Arc<Mesh>>,
    /// Packets that waited in vain, since somebody last took the number.
    pub queue_dropped: usize,
}

#[derive(Debug)]
struct Waiting {
    asked: Option<Instant>,
    packets: VecDeque<(Instant, Vec<u8>)>,
}

impl VxlanLink {
    /// An end that spreads its flows over this many source sockets.
    pub fn new(sources: u8) -> VxlanLink {
        VxlanLink {
            sources: sources.max(1),
            learnt: HashMap::new(),
            waiting: HashMap::new(),
            mesh: None,
            queue_dropped: 0,
        }
    }

    /// Forgets what it learnt about peers that have gone or moved.
    pub fn follow(&mut self, mesh: &Arc<Mesh>) {
        if self.mesh.as_ref().is_some_and(|old| Arc::ptr_eq(old, mesh)) {
            return;
        }
        let old = self.mesh.replace(Arc::clone(mesh));
        let same = |id: &PeerId| {
            let before = old.as_ref().and_then(|m| m.peer(*id)).and_then(|p| p.vxlan.as_ref());
            let after = mesh.peer(*id).and_then(|p| p.vxlan.as_ref());
            after.is_some() && before == after
        };
        self.learnt.retain(|id, _| same(id));
        let dropped = &mut self.queue_dropped;
        self.waiting.retain(|id, waiting| {
            let keep = same(id);
            *dropped += if keep { 0 } else { waiting.packets.len() };
            keep
        });
    }

    /// Wraps packets for `peer` into `tx`; `flow` picks the source port. Returns how many were sent; an
    /// error tells how many were before the reason for the others.
    #[allow(clippy::too_many_arguments)] // one packet and everything that is known about it
    pub fn seal(
        &mut self,
        now: Instant,
        local: &LocalNode,
        peer: &Peer,
        flow: u64,
        destination: IpAddr,
        packets: &impl Segments,
        tx: &mut TxBatch,
    ) -> Result<usize, (usize, DropReason)> {
        let Some(remote) = &peer.vxlan else { return Err((0, DropReason::NoEndpoint)) };
        let to = SocketAddr::new(remote.address, remote.port);
        let Some(mac) = remote.mac.or_else(|| self.learnt.get(&peer.id).copied()) else {
            return self.ask_and_wait(now, local, peer.id, to, destination, packets, tx).map(|()| 0);
        };
        let via = self.via(flow);
        let header = vxlan::header(local.vni, mac, local.mac, destination.is_ipv6());
        for i in 0..packets.count() {
            let Some(slot) = tx.reserve(HEADER + packets.len(i)) else {
                return Err((i, DropReason::NoBuffer));
            };
            slot[..HEADER].copy_from_slice(&header);
            let len = HEADER + packets.write(i, &mut slot[HEADER..]);
            tx.commit(to, via, len);
        }
        Ok(packets.count())
    }

    fn via(&self, flow: u64) -> Via {
        Via::Vxlan(vxlan::source_port_index(flow, usize::from(self.sources)) as u8)
    }

    #[allow(clippy::too_many_arguments)] // the same as `seal`, split only for length
    fn ask_and_wait(
        &mut self,
        now: Instant,
        local: &LocalNode,
        peer: PeerId,
        to: SocketAddr,
        destination: IpAddr,
        packets: &impl Segments,
        tx: &mut TxBatch,
    ) -> Result<(), (usize, DropReason)> {
        let waiting =
            self.waiting.entry(peer).or_insert_with(|| Waiting { asked: None, packets: VecDeque::new() });
        while waiting.packets.front().is_some_and(|(since, _)| now.duration_since(*since) > QUEUE_AGE) {
            waiting.packets.pop_front();
            self.queue_dropped += 1;
        }
        let mut full = 0;
        for i in 0..packets.count() {
            if waiting.packets.len() >= QUEUE_PACKETS {
                full = packets.count() - i;
                break;
            }
            let mut packet = vec![0; packets.len(i)];
            packets.write(i, &mut packet);
            waiting.packets.push_back((now, packet));
        }
        if waiting.asked.is_none_or(|asked| now.duration_since(asked) >= ASK_EVERY) {
            waiting.asked = Some(now);
            self.ask(local, to, destination, tx);
        }
        if full > 0 { Err((packets.count() - full, DropReason::AwaitingMac)) } else { Ok(()) }
    }

    fn ask(&self, local: &LocalNode, to: SocketAddr, destination: IpAddr, tx: &mut TxBatch) {
        let Some(room) = tx.reserve(MAX_NEIGHBOUR) else { return };
        let written = match (destination, local.address_v4, local.address_v6) {
            (IpAddr::V4(target), Some(ours), _) => vxlan::ask_v4(room, local.vni, local.mac, ours, target),
            (IpAddr::V6(target), _, Some(ours)) => vxlan::ask_v6(room, local.vni, local.mac, ours, target),
            (IpAddr::V4(_), None, _) | (IpAddr::V6(_), _, None) => return,
        };
        if let Ok(len) = written {
            tx.commit(to, Via::Vxlan(0), len);
        }
    }

    /// Opens a datagram: only a known node's, only with our network identifier, and only if VXLAN is what
    /// we speak with that node.
    pub fn open(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        from: SocketAddr,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Opened {
        let Some(peer) = snapshot.mesh.vxlan_sources.get(&from.ip()).and_then(|id| snapshot.mesh.peer(*id))
        else {
            return Opened::Drop(DropReason::UnknownVxlanSource);
        };
        if peer.encap != Some(Encap::Vxlan) {
            return Opened::Drop(DropReason::UnknownVxlanSource);
        }
        let local = &snapshot.local;
        match vxlan::open(datagram, local.vni, &local.mac) {
            Ok(Inner::Ip { offset, source_mac }) => {
                self.learn(now, local, peer, source_mac, tx);
                Opened::Packet { peer: peer.id, offset }
            }
            Ok(Inner::Request(request)) => {
                self.learn(now, local, peer, request.source_mac, tx);
                let Some(to) = peer.vxlan.as_ref().map(|v| SocketAddr::new(v.address, v.port)) else {
                    return Opened::Drop(DropReason::NoEndpoint);
                };
                let Some(room) = tx.reserve(MAX_NEIGHBOUR) else {
                    return Opened::Drop(DropReason::NoBuffer);
                };
                match vxlan::answer(room, local.vni, local.mac, &request, |a| is_ours(&snapshot.mesh, a)) {
                    Ok(len) => {
                        tx.commit(to, Via::Vxlan(0), len);
                        Opened::Answered
                    }
                    Err(reason) => Opened::Drop(reason),
                }
            }
            Ok(Inner::Reply(reply)) => {
                self.learn(now, local, peer, reply.source_mac, tx);
                Opened::Learnt
            }
            Err(reason) => Opened::Drop(reason),
        }
    }

    /// Remembers the MAC address of a peer that announces none, and sends what waited for it.
    fn learn(&mut self, now: Instant, local: &LocalNode, peer: &Peer, mac: Mac, tx: &mut TxBatch) {
        if peer.vxlan.as_ref().is_none_or(|v| v.mac.is_some()) || self.learnt.get(&peer.id) == Some(&mac) {
            return;
        }
        self.learnt.insert(peer.id, mac);
        let Some(waiting) = self.waiting.remove(&peer.id) else { return };
        for (_, packet) in waiting.packets {
            let destination = match crate::packet::parse(&packet) {
                Ok(headers) => headers.destination,
                Err(_) => continue,
            };
            if self.seal(now, local, peer, 0, destination, &&packet[..], tx).is_err() {
                self.queue_dropped += 1;
            }
        }
    }
}

fn is_ours(mesh: &Mesh, address: IpAddr) -> bool {
    match mesh.routes.lookup(address) {
        Some(Owner::LocalPod | Owner::LocalNode) => true,
        Some(Owner::PeerPod(_) | Owner::PeerNode(_)) | None => false,
    }
}
