//! VXLAN's end of a lane: whose frames are taken, and which MAC address a peer has.
//!
//! The wire format is in [`vxlan`]. A peer that announces its MAC address needs no more; for
//! one that does not (a kernel `vxlan` device set up by hand) the address is asked for and learnt, per
//! peer and never across peers, and packets wait for it in a small queue.
//!
//! All lanes read from one port, and the kernel picks the lane by the sender's address and port: the answer
//! comes to the lane that asked only by chance. So what one lane learns stands in [`Neighbours`] for all.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use super::vxlan::{self, HEADER, Inner, MAX_NEIGHBOUR, Mac};
use super::{Sealed, Segments, TxBatch, Via, Waited};
use crate::packet::DropReason;
use crate::snapshot::{Encap, LocalNode, Mesh, Owner, Peer, PeerId, Snapshot};

/// How often a lane with waiting packets looks whether another lane was told.
const LOOK_EVERY: Duration = Duration::from_millis(20);
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

/// MAC addresses that peers have told, shared by the lanes of a node. No packet waits for its lock: who finds
/// it taken goes on without, and looks again.
#[derive(Debug, Default)]
pub struct Neighbours {
    version: AtomicU64,
    /// With the outer address that told it: another machine may have another one.
    table: RwLock<HashMap<PeerId, (IpAddr, Mac)>>,
}

/// The VXLAN end of one lane.
#[derive(Debug)]
pub struct VxlanLink {
    sources: u8,
    shared: Arc<Neighbours>,
    /// What this lane has looked up in `shared`, good for one version of it.
    learnt: HashMap<PeerId, Mac>,
    version: u64,
    waiting: BTreeMap<PeerId, Waiting>,
    waited: Waited,
    mesh: Option<Arc<Mesh>>,
}

#[derive(Debug)]
struct Waiting {
    asked: Instant,
    looked: Instant,
    packets: VecDeque<(Instant, Vec<u8>)>,
}

impl VxlanLink {
    /// An end that spreads its flows over this many source sockets.
    pub fn new(sources: u8, shared: Arc<Neighbours>) -> VxlanLink {
        VxlanLink {
            sources: sources.max(1),
            shared,
            learnt: HashMap::new(),
            version: 0,
            waiting: BTreeMap::new(),
            waited: Waited::default(),
            mesh: None,
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
        let dropped = &mut self.waited.dropped;
        self.waiting.retain(|id, waiting| {
            let keep = same(id);
            *dropped += if keep { 0 } else { waiting.packets.len() };
            keep
        });
    }

    /// How many packets wait for a MAC address.
    pub fn waiting(&self) -> usize {
        self.waiting.values().map(|waiting| waiting.packets.len()).sum()
    }

    /// What became of packets that waited, since this was last asked.
    pub fn take_waited(&mut self) -> Waited {
        std::mem::take(&mut self.waited)
    }

    /// When [`Self::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.values().map(|waiting| waiting.looked + LOOK_EVERY).min()
    }

    /// Sends what need not wait any longer, asks again, and lets go of what has waited too long.
    pub fn handle_timeout(&mut self, now: Instant, local: &LocalNode, tx: &mut TxBatch) {
        if self.poll_timeout().is_none_or(|at| now < at) {
            return;
        }
        let Some(mesh) = self.mesh.clone() else { return };
        let ids: Vec<PeerId> = self.waiting.keys().copied().collect();
        for peer in ids.iter().filter_map(|id| mesh.peer(*id)) {
            if let Some(mac) = self.known(peer) {
                self.flush(now, local, peer, mac, tx);
            }
        }
        let dropped = &mut self.waited.dropped;
        self.waiting.retain(|id, waiting| {
            *dropped += waiting.expire(now);
            let Some((_, packet)) = waiting.packets.front() else { return false };
            waiting.looked = now;
            if now.saturating_duration_since(waiting.asked) < ASK_EVERY {
                return true;
            }
            waiting.asked = now;
            let peer = mesh.peer(*id).and_then(|peer| peer.vxlan.as_ref());
            if let (Some(remote), Ok(headers)) = (peer, crate::packet::parse(packet)) {
                ask(local, SocketAddr::new(remote.address, remote.port), headers.destination, tx);
            }
            true
        });
    }

    /// Wraps packets for `peer` into `tx`; `flow` picks the source port.
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
    ) -> Sealed {
        let Some(remote) = &peer.vxlan else { return Sealed::refused(DropReason::NoEndpoint) };
        let to = SocketAddr::new(remote.address, remote.port);
        let Some(mac) = remote.mac.or_else(|| self.known(peer)) else {
            return self.ask_and_wait(now, local, peer.id, to, destination, packets, tx);
        };
        let via = Via::Vxlan(vxlan::source_port_index(flow, usize::from(self.sources)) as u8);
        let header = vxlan::header(local.vni, mac, local.mac, destination.is_ipv6());
        for i in 0..packets.count() {
            let Some(slot) = tx.reserve(HEADER + packets.len(i)) else {
                return Sealed { sent: i, waiting: 0, refused: Some(DropReason::NoBuffer) };
            };
            slot[..HEADER].copy_from_slice(&header);
            let len = HEADER + packets.write(i, &mut slot[HEADER..]);
            tx.commit(to, via, len);
        }
        Sealed { sent: packets.count(), waiting: 0, refused: None }
    }

    /// The MAC address that a peer has told any of the lanes.
    fn known(&mut self, peer: &Peer) -> Option<Mac> {
        let version = self.shared.version.load(Ordering::Acquire);
        if version != self.version {
            self.version = version;
            self.learnt.clear();
        }
        if let Some(mac) = self.learnt.get(&peer.id) {
            return Some(*mac);
        }
        let remote = peer.vxlan.as_ref()?;
        let (told_by, mac) = *self.shared.table.try_read().ok()?.get(&peer.id)?;
        (told_by == remote.address).then(|| *self.learnt.entry(peer.id).or_insert(mac))
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
    ) -> Sealed {
        let mut unasked = false;
        let waiting = self.waiting.entry(peer).or_insert_with(|| {
            unasked = true;
            Waiting { asked: now, looked: now, packets: VecDeque::new() }
        });
        self.waited.dropped += waiting.expire(now);
        let mut sealed = Sealed::default();
        for i in 0..packets.count() {
            if waiting.packets.len() >= QUEUE_PACKETS {
                sealed.refused = Some(DropReason::AwaitingMac);
                break;
            }
            let mut packet = vec![0; packets.len(i)];
            packets.write(i, &mut packet);
            waiting.packets.push_back((now, packet));
            sealed.waiting += 1;
        }
        if unasked {
            ask(local, to, destination, tx);
        }
        sealed
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
        let Some(remote) = peer.vxlan.as_ref().filter(|remote| remote.mac.is_none()) else { return };
        if self.known(peer) != Some(mac) {
            // If another lane is at it: the next frame tells it again.
            let Ok(mut table) = self.shared.table.try_write() else { return };
            table.insert(peer.id, (remote.address, mac));
            self.shared.version.fetch_add(1, Ordering::Release);
        }
        self.flush(now, local, peer, mac, tx);
    }

    fn flush(&mut self, now: Instant, local: &LocalNode, peer: &Peer, mac: Mac, tx: &mut TxBatch) {
        let Some(mut waiting) = self.waiting.remove(&peer.id) else { return };
        self.learnt.insert(peer.id, mac);
        self.waited.dropped += waiting.expire(now);
        for (_, packet) in waiting.packets {
            let destination = match crate::packet::parse(&packet) {
                Ok(headers) => headers.destination,
                Err(_) => {
                    self.waited.dropped += 1;
                    continue;
                }
            };
            if self.seal(now, local, peer, 0, destination, &&packet[..], tx).sent == 1 {
                self.waited.sent.push((peer.id, packet.len()));
            } else {
                self.waited.dropped += 1;
            }
        }
    }
}

impl Waiting {
    /// Drops what has waited too long; returns how many.
    fn expire(&mut self, now: Instant) -> usize {
        let before = self.packets.len();
        while self
            .packets
            .front()
            .is_some_and(|(since, _)| now.saturating_duration_since(*since) >= QUEUE_AGE)
        {
            self.packets.pop_front();
        }
        before - self.packets.len()
    }
}

fn ask(local: &LocalNode, to: SocketAddr, destination: IpAddr, tx: &mut TxBatch) {
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

fn is_ours(mesh: &Mesh, address: IpAddr) -> bool {
    match mesh.routes.lookup(address) {
        Some(Owner::LocalPod | Owner::LocalNode) => true,
        Some(Owner::PeerPod(_) | Owner::PeerNode(_)) | None => false,
    }
}
