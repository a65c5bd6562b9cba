//! THE PACKET LINE. No async, no clock, no sockets, no lock that a packet waits on.
//!
//! ```text
//!  outbound.rs                                          inbound.rs
//!  1 parse        bytes from the TUN -> Headers         1 open      datagram -> packet and peer
//!  2 decide       flow table, Services (service.rs,     2 parse     bytes -> Headers
//!                 odd.rs), routes (route.rs)            3 admit     is the source the peer's, the target ours?
//!  3 translate    addresses and ports                   4 hop       the kernel's, unless a tunnel is next; MSS
//!  4 fit          MSS clamp, ICMP if it is too big      5 join      into the TUN batch
//!  5 seal         cut and encapsulate, into the batch   6 translate flow table, once per joined frame
//! ```
//!
//! A [`Lane`] is one such line: one thread drives it with what it read, and sends what stands in
//! [`Output`] afterwards. Every drop has its [`DropReason`] and a counter. Lanes share tables (flows,
//! clients, neighbours) and nothing else; only what an ordinary WireGuard peer is sent may change lanes, as a [`Parcel`].

pub mod affinity;
pub mod conntrack;
pub mod counters;
mod fragments;
mod inbound;
mod odd;
mod outbound;
mod parcel;
pub mod route;
mod service;
#[cfg(test)]
mod tests;
mod track;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use x25519_dalek::StaticSecret;

pub use counters::{Counters, Total};
pub use parcel::Parcel;
pub use route::Exit;

use crate::packet::coalesce::{Memory, Offloads, Piece, Region, TunBatch};
use crate::packet::icmp::{IcmpLimiter, IcmpRates};
use crate::packet::vnet::VnetHdr;
use crate::packet::{DropReason, Headers, parse};
use crate::snapshot::{Encap, LaneId, Mesh, Peer, PeerId, Snapshot};
use crate::tunnel::vxlan_link::{Neighbours, VxlanLink};
use crate::tunnel::wireguard::{Keys, WireGuard};
use crate::tunnel::{Segments, TxBatch};
use affinity::Affinity;
use conntrack::FlowTable;
use fragments::Fragments;
use route::RouteCache;
use service::{Kept, Passage};

/// Bytes that a batch of outgoing datagrams may hold: eight super-packets with their overhead.
const TX_BYTES: usize = 1 << 20;
/// Bytes that decrypted packets of one receive batch may take.
const PLAIN_BYTES: usize = 1 << 20;
/// Packets that one read from the TUN can become: 64 KiB in the smallest segments that a kernel makes by itself, for
/// an MSS of 48 (TCP_MIN_SND_MSS, include/net/tcp.h) with timestamps, without SACK. In smaller ones, what finds no room
/// is dropped.
const READ_PACKETS: usize = (64 << 10) / SMALLEST_PAYLOAD;
const SMALLEST_PAYLOAD: usize = 48 - 12;
/// Headers of such a segment: IPv6, TCP with timestamps.
const SEGMENT_HEADERS: usize = 40 + 20 + 12;
/// Most that a tunnel adds: WireGuard's header and tag, 16 bytes each, and padding; VXLAN's 22 are less.
const OVERHEAD: usize = 16 + 16 + 15;
/// Packets that one receive call can bring (8 messages of 64 joined datagrams), and some of our own making; then
/// those of one read.
const TUN_PACKETS: usize = 8 * 64 + 64 + READ_PACKETS;
/// Room in [`Output::tx`] that one read from the TUN can need.
pub const TX_ROOM: usize = READ_PACKETS * (SEGMENT_HEADERS + SMALLEST_PAYLOAD + OVERHEAD);
/// Room in [`Output::plain`] that one read from the TUN can need, if it goes back there.
const PLAIN_ROOM: usize = READ_PACKETS * (SEGMENT_HEADERS + SMALLEST_PAYLOAD);
const _: () = assert!(2 * TX_ROOM <= TX_BYTES && 2 * PLAIN_ROOM <= PLAIN_BYTES);

/// What a lane wants sent: datagrams, and frames for the TUN.
pub struct Output {
    /// Datagrams.
    pub tx: TxBatch,
    /// Frames for the TUN, as lists of pieces of the receive buffer and of `plain`.
    pub tun: TunBatch,
    /// What only lane 0 can send.
    pub parcels: Vec<Parcel>,
    /// Decrypted packets and packets of our own making.
    pub plain: Box<[u8]>,
    plain_used: usize,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").field("tx", &self.tx).field("plain", &self.plain_used).finish()
    }
}

impl Output {
    /// Empty buffers; `offloads` says what may be joined for the TUN.
    pub fn new(offloads: Offloads) -> Output {
        let mut tun = TunBatch::new(TUN_PACKETS);
        tun.set_offloads(offloads);
        Output {
            tx: TxBatch::new(TX_BYTES),
            tun,
            parcels: Vec::new(),
            plain: vec![0; PLAIN_BYTES].into_boxed_slice(),
            plain_used: 0,
        }
    }

    /// Whether another read from the TUN can be taken in.
    pub fn has_room(&self) -> bool {
        self.tx.free() >= TX_ROOM
            && self.plain.len() - self.plain_used >= PLAIN_ROOM
            && self.tun.free() >= READ_PACKETS
    }

    /// Puts a packet that came from the TUN into the batch that goes there, as it is.
    fn turn_round_whole(
        &mut self,
        vnet: &VnetHdr,
        packet: &[u8],
        headers: &Headers,
        packets: u16,
    ) -> Result<(), DropReason> {
        let at = self.plain_used;
        let packet = packet.get(..headers.total_len as usize).ok_or(DropReason::Truncated)?;
        self.plain.get_mut(at..at + packet.len()).ok_or(DropReason::NoBuffer)?.copy_from_slice(packet);
        let memory = &Memory { receive: &mut [], plain: &mut self.plain };
        let piece = Piece { region: Region::Plain, offset: at as u32, len: headers.total_len };
        self.tun.push_ready(piece, headers, memory, *vnet, packets)?;
        self.plain_used += packet.len();
        Ok(())
    }

    /// Puts one segment of a packet that came from the TUN into the batch that goes there.
    fn turn_round(&mut self, segments: &impl Segments, index: usize) -> Result<(), DropReason> {
        let at = self.plain_used;
        let room = self.plain.get_mut(at..at + segments.len(index)).ok_or(DropReason::NoBuffer)?;
        let len = segments.write(index, room);
        let headers = parse(&self.plain[at..at + len])?;
        let memory = &Memory { receive: &mut [], plain: &mut self.plain };
        self.tun.push(Region::Plain, at as u32, &headers, memory)?;
        self.plain_used += len;
        Ok(())
    }

    /// Forgets the frames for the TUN, after they were written.
    pub fn clear_tun(&mut self) {
        self.tun.clear();
        self.plain_used = 0;
    }
}

/// Datagrams that arrived together from one sender, in the receive buffer.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Which socket they came in by.
    pub encap: Encap,
    /// Who sent them.
    pub from: SocketAddr,
    /// Start in the receive buffer.
    pub offset: usize,
    /// Bytes in all.
    pub len: usize,
    /// Bytes of each datagram but the last, which may be shorter.
    pub stride: usize,
}

/// What a lane knows about traffic with one peer, whatever the encapsulation.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerTraffic {
    /// Packets sent.
    pub packets_sent: u64,
    /// Bytes of those packets.
    pub bytes_sent: u64,
    /// Packets received.
    pub packets_received: u64,
    /// Bytes of those packets.
    pub bytes_received: u64,
    /// When the last packet came.
    pub last_received: Option<Instant>,
    /// When the last packet left.
    pub last_sent: Option<Instant>,
}

/// What a lane is made with.
pub struct LaneConfig {
    /// Which lane.
    pub id: LaneId,
    /// Its WireGuard key.
    pub private: [u8; 32],
    /// Randomness for the keyed hashes.
    pub seed: (u64, u64),
    /// How many VXLAN source sockets there are.
    pub vxlan_sources: u8,
    /// The MAC addresses that VXLAN peers have told, shared with the other lanes.
    pub neighbours: Arc<Neighbours>,
    /// The table of flows, shared with the other lanes.
    pub flows: Arc<FlowTable>,
    /// Which endpoint a client had last, shared with the other lanes.
    pub affinity: Arc<Affinity>,
    /// An instant and its milliseconds since boot: the flow table's clock outlives the process.
    pub epoch: (Instant, u64),
}

/// One packet line.
pub struct Lane {
    id: LaneId,
    wireguard: WireGuard,
    vxlan: VxlanLink,
    routes: RouteCache,
    icmp: IcmpLimiter,
    flows: Arc<FlowTable>,
    affinity: Arc<Affinity>,
    kept: Option<Kept>,
    fragments: Fragments<Passage>,
    traffic: Vec<PeerTraffic>,
    mesh: Option<Arc<Mesh>>,
    counters: Arc<Counters>,
    scratch: Box<[u8]>,
    seed: u64,
    epoch: (Instant, u64),
    next_sweep: Option<Instant>,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("id", &self.id).field("wireguard", &self.wireguard).finish()
    }
}

impl Lane {
    /// A lane with its key, without any session.
    pub fn new(config: LaneConfig) -> Lane {
        Lane {
            id: config.id,
            wireguard: WireGuard::new(StaticSecret::from(config.private), config.id, config.seed),
            vxlan: VxlanLink::new(config.vxlan_sources, config.neighbours),
            routes: RouteCache::default(),
            icmp: IcmpLimiter::new(IcmpRates::default(), config.seed.0, config.epoch.0),
            flows: config.flows,
            affinity: config.affinity,
            kept: None,
            fragments: Fragments::default(),
            traffic: Vec::new(),
            mesh: None,
            counters: Arc::new(Counters::default()),
            scratch: vec![0; 65_536 + 64].into_boxed_slice(),
            seed: config.seed.1,
            epoch: config.epoch,
            next_sweep: None,
        }
    }

    /// Its counters, for readers.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// The WireGuard end, to report on.
    pub fn wireguard(&self) -> &WireGuard {
        &self.wireguard
    }

    /// Traffic per peer, indexed by [`PeerId`].
    pub fn traffic(&self) -> &[PeerTraffic] {
        &self.traffic
    }

    /// How many packets wait for a session or a MAC address.
    pub fn waiting(&self) -> usize {
        self.wireguard.waiting() + self.vxlan.waiting()
    }

    /// Starts a session with a peer that was active before a restart.
    pub fn initiate(&mut self, now: Instant, snapshot: &Snapshot, peer: PeerId, out: &mut Output) {
        self.follow(&snapshot.mesh);
        let Some(peer) = snapshot.mesh.peer(peer).filter(|peer| !self.is_unknown_to(peer)) else { return };
        if peer.encap == Some(Encap::WireGuard)
            && let Err(reason) = self.wireguard.initiate(now, peer, &mut out.tx)
        {
            self.counters.count_drop(reason);
        }
    }

    /// Whether the peer would not know this lane's key.
    fn is_unknown_to(&self, peer: &Peer) -> bool {
        peer.ordinary && self.id != LaneId(0)
    }

    /// Sends what another lane has put aside for this one.
    pub fn take_parcel(&mut self, now: Instant, snapshot: &Snapshot, parcel: &Parcel, out: &mut Output) {
        self.follow(&snapshot.mesh);
        let peer = snapshot.mesh.peer(parcel.peer);
        let is_right = |peer: &&Arc<Peer>| {
            peer.encap == Some(Encap::WireGuard)
                && peer.lanes.first().is_some_and(|lane| lane.key == parcel.key)
        };
        match peer.filter(is_right) {
            Some(peer) => {
                if let Err(reason) = self.seal_for_wireguard(now, peer, parcel, out) {
                    self.counters.count_drop(reason);
                }
            }
            None => self.counters.count_drops(DropReason::NoRoute, parcel.packets()),
        }
        self.count_waited(now);
    }

    /// Changes its WireGuard keys.
    pub fn set_keys(&mut self, now: Instant, keys: Keys) {
        self.wireguard.set_keys(now, keys);
    }

    /// When [`Self::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let (wireguard, vxlan) = (self.wireguard.poll_timeout(), self.vxlan.poll_timeout());
        let timers = [wireguard, vxlan, self.fragments.poll_timeout(), self.next_sweep];
        timers.into_iter().flatten().min()
    }

    /// Lets time pass: handshakes, rekeys, keepalives.
    pub fn handle_timeout(&mut self, now: Instant, snapshot: &Snapshot, out: &mut Output) {
        self.follow(&snapshot.mesh);
        self.wireguard.handle_timeout(now, &mut out.tx);
        self.vxlan.handle_timeout(now, &snapshot.local, &mut out.tx);
        let lonely = self.fragments.expire(now);
        self.counters.count_drops(DropReason::AwaitingFragment, lonely);
        self.sweep_flows(now);
        self.count_waited(now);
    }

    fn follow(&mut self, mesh: &Arc<Mesh>) {
        if self.mesh.as_ref().is_some_and(|old| Arc::ptr_eq(old, mesh)) {
            return;
        }
        self.routes.follow(mesh);
        self.wireguard.handle_mesh(mesh);
        self.vxlan.follow(mesh);
        let before = self.mesh.replace(Arc::clone(mesh));
        self.traffic.resize(mesh.peers.len(), PeerTraffic::default());
        for (index, traffic) in self.traffic.iter_mut().enumerate() {
            // A number that another node has now must not inherit what the first one sent.
            let id = PeerId(index as u32);
            let old = before.as_ref().and_then(|mesh| mesh.peer(id)).map(|peer| &peer.name);
            if old != mesh.peer(id).map(|peer| &peer.name) {
                *traffic = PeerTraffic::default();
            }
        }
    }

    /// Puts a packet of our own making into the TUN batch.
    fn answer_into_tun(&mut self, packet: &[u8], headers: &Headers, out: &mut Output) {
        let at = out.plain_used;
        let Some(room) = out.plain.get_mut(at..at + packet.len()) else {
            return self.counters.count_drop(DropReason::NoBuffer);
        };
        room.copy_from_slice(packet);
        out.plain_used += packet.len();
        let memory = &Memory { receive: &mut [], plain: &mut out.plain };
        if let Err(reason) = out.tun.push(Region::Plain, at as u32, headers, memory) {
            self.counters.count_drop(reason);
        }
    }

    /// The address that our ICMP errors come from.
    fn own_address(snapshot: &Snapshot, like: IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => snapshot.local.address_v4.map(IpAddr::V4),
            IpAddr::V6(_) => snapshot.local.address_v6.map(IpAddr::V6),
        }
    }

    /// Counts what became of packets that waited for a session or a MAC address.
    fn count_waited(&mut self, now: Instant) {
        for (waited, reason) in [
            (self.wireguard.take_waited(), DropReason::AwaitingSession),
            (self.vxlan.take_waited(), DropReason::AwaitingMac),
        ] {
            self.counters.count_drops(reason, waited.dropped);
            for (peer, bytes) in waited.sent {
                self.count_sent(now, peer, 1, bytes);
            }
        }
    }

    fn count_sent(&mut self, now: Instant, peer: PeerId, packets: usize, bytes: usize) {
        self.counters.add(Total::PacketsSent, packets);
        if let Some(traffic) = self.traffic.get_mut(peer.0 as usize)
            && packets > 0
        {
            traffic.packets_sent += packets as u64;
            traffic.bytes_sent += bytes as u64;
            traffic.last_sent = Some(now);
        }
    }
}
