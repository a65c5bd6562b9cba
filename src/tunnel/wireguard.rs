//! WireGuard: the only file that names boringtun.
//!
//! One [`WireGuard`] per lane, with the lane's own key. Sessions are made when first needed, found by
//! the index that a message carries (boringtun keeps our 24 bits of it above its own 8), and forgotten
//! when they have been silent for nine minutes.
//!
//! 1. [`WireGuard::seal`]: packets to a peer become datagrams, or wait in a bounded queue for the session.
//! 2. [`WireGuard::open`]: a datagram becomes a packet, or moves a handshake on.
//! 3. [`WireGuard::handle_timeout`]: retransmissions, rekeying, keepalives, expiry.
//!
//! boringtun reads a clock of its own (the one exception to the rule that time is an argument); the
//! simulation advances it together with `now`.
//!
//! A peer may have two sessions at once: the one in use and a candidate. A handshake whose timestamp is
//! not newer than the last one we saw is a replay, or a peer whose clock was set back; it gets a
//! candidate of its own, which takes over only when data arrives that proves the peer holds the keys.
//!
//! An endpoint never lies inside the mesh: what is sealed for such a peer would come back to be sealed again.
//! Announced ones were checked where they were compiled; where datagrams come from is checked here, once for
//! each place: an ordinary packet comes from the confirmed one and costs no look-up.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use x25519_dalek::{PublicKey as DalekPublic, StaticSecret};

use super::endpoints::{Endpoints, MAX_ANNOUNCED};
use super::limit::HandshakeLimits;
use super::ring::Ring;
use super::{Sealed, Segments, TxBatch, Via, Waited};
use crate::packet::DropReason;
use crate::snapshot::{LaneId, Mesh, Peer, PeerId, PublicKey};

/// Bytes that a data message adds: 16 of header, 16 of authentication tag.
pub const DATA_OVERHEAD: usize = 32;
/// Room that any handshake message fits into (the initiation has 148 bytes).
const HANDSHAKE_ROOM: usize = 256;
/// How often timers are looked at; WireGuard's own timers are in seconds.
const TICK: Duration = Duration::from_millis(250);
/// A session ends before its counter does (WireGuard paper section 6.5: 2^64 - 2^13 - 1 messages); boringtun
/// would compute with larger ones.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Packets that wait for one session, and the bytes that wait on one lane.
const QUEUE_PACKETS: usize = 128;
const QUEUE_BYTES: usize = 8 << 20;
/// A packet that has waited this long is of no use to anyone: TCP has sent it again twice.
const QUEUE_AGE: Duration = Duration::from_secs(5);
/// A candidate session that proved nothing within this time makes room for another.
const CANDIDATE_AGE: Duration = Duration::from_secs(5);
/// Initiations with an old timestamp that are remembered, so that a recorded one can be in an honest one's way
/// once and not again: eight hours of one peer's rekeys.
const SPENT: usize = 256;
/// boringtun's session index has 24 bits of ours.
const MAX_SESSIONS: usize = 1 << 24;

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// A packet of this length stands at the start of the plaintext buffer.
    Packet {
        /// Who sent it.
        peer: PeerId,
        /// Its length.
        len: usize,
    },
    /// Handshake, cookie or keepalive: dealt with.
    Control,
    /// Refused.
    Drop(DropReason),
}

/// A session as `warren peers` and `wg show` present it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionReport {
    /// The peer.
    pub peer: PeerId,
    /// Its lane.
    pub lane: LaneId,
    /// Its key.
    pub key: PublicKey,
    /// Where datagrams go now.
    pub endpoint: Option<SocketAddr>,
    /// Whether data can flow.
    pub established: bool,
    /// Time since the last completed handshake.
    pub handshake_age: Option<Duration>,
    /// Plaintext bytes received.
    pub received: u64,
    /// Plaintext bytes sent.
    pub sent: u64,
    /// Since an authenticated data packet came.
    pub idle: Option<Duration>,
}

/// Counters of this room that are not drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WireGuardStats {
    /// Handshakes begun by us.
    pub initiations_sent: u64,
    /// Handshakes begun by a peer and answered.
    pub initiations_answered: u64,
    /// Sessions that became usable (rekeys too).
    pub handshakes_completed: u64,
    /// Times an endpoint moved to where authenticated data came from.
    pub roamed: u64,
    /// Candidates made for a handshake with an old timestamp.
    pub old_timestamps: u64,
    /// Packets that were queued for a session.
    pub queued: u64,
    /// Packets that waited in vain: the queue was full, too old, or the peer never answered.
    pub queue_dropped: u64,
}

struct Queued {
    since: Instant,
    packet: Vec<u8>,
}

struct Session {
    tunn: Tunn,
    peer: PeerId,
    lane: LaneId,
    key: PublicKey,
    established: bool,
    keepalive: Option<Duration>,
    endpoints: Endpoints,
    ring: Ring,
    queue: VecDeque<Queued>,
    created: Instant,
    last_sent: Instant,
    last_data: Option<Instant>,
    received: u64,
    sent: u64,
}

/// Where whoever has this key was last.
#[derive(Clone, Copy, Debug)]
struct LastSeen {
    key: PublicKey,
    at: SocketAddr,
}

/// Sessions of one peer's lane, as indices.
#[derive(Clone, Copy, Debug)]
struct Slot {
    active: usize,
    candidate: Option<usize>,
}

/// The WireGuard end of one lane.
pub struct WireGuard {
    private: StaticSecret,
    public: DalekPublic,
    lane: LaneId,
    /// Demands a cookie of whoever it is asked about.
    cookies: Arc<RateLimiter>,
    /// Checks the first MAC of handshakes and lets all pass that have it right; every session has it too.
    open_gate: Arc<RateLimiter>,
    limits: HandshakeLimits,
    spent: VecDeque<[u8; 8]>,
    sessions: Vec<Option<Box<Session>>>,
    free: Vec<usize>,
    live: usize,
    slots: HashMap<(PeerId, LaneId), Slot>,
    /// Where peers without a session were last, if they had not announced that: one place for each of the
    /// mesh's keys, so no more of them than keys.
    last_seen: HashMap<(PeerId, LaneId), LastSeen>,
    queue_bytes: usize,
    waited: Waited,
    next_tick: Option<Instant>,
    mesh: Option<Arc<Mesh>>,
    scratch: Box<[u8]>,
    /// What happened here besides drops.
    pub stats: WireGuardStats,
}

impl std::fmt::Debug for WireGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WireGuard").field("lane", &self.lane).field("sessions", &self.live).finish()
    }
}

impl WireGuard {
    /// The lane's end, with its private key; `seed` keys the table of source limits.
    pub fn new(private: StaticSecret, lane: LaneId, seed: (u64, u64)) -> WireGuard {
        let public = DalekPublic::from(&private);
        WireGuard {
            cookies: Arc::new(RateLimiter::new(&public, 0)),
            open_gate: Arc::new(RateLimiter::new(&public, u64::MAX)),
            private,
            public,
            lane,
            limits: HandshakeLimits::new(seed),
            spent: VecDeque::new(),
            sessions: Vec::new(),
            free: Vec::new(),
            live: 0,
            slots: HashMap::new(),
            last_seen: HashMap::new(),
            queue_bytes: 0,
            waited: Waited::default(),
            next_tick: None,
            mesh: None,
            scratch: vec![0; 65_536 + 64].into_boxed_slice(),
            stats: WireGuardStats::default(),
        }
    }

    /// The lane's public key.
    pub fn public_key(&self) -> PublicKey {
        self.public.to_bytes()
    }

    // --- 1. out ----------------------------------------------------------------------------------

    /// Seals packets for `peer` into `tx`, or queues them until the session is there.
    pub fn seal(&mut self, now: Instant, peer: &Peer, packets: &impl Segments, tx: &mut TxBatch) -> Sealed {
        let index = match self.session_towards(now, peer) {
            Ok(index) => index,
            Err(reason) => return Sealed::refused(reason),
        };
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else {
            return Sealed::refused(DropReason::NoEndpoint);
        };
        let Some(to) = session.endpoints.target() else {
            return Sealed::refused(DropReason::NoEndpoint);
        };
        if !session.established {
            return self.enqueue(now, index, packets, tx);
        }
        session.last_sent = now;
        for i in 0..packets.count() {
            let some = |reason| Sealed { sent: i, waiting: 0, refused: Some(reason) };
            let len = packets.write(i, &mut self.scratch);
            let Some(slot) = tx.reserve((len + DATA_OVERHEAD).max(HANDSHAKE_ROOM)) else {
                return some(DropReason::NoBuffer);
            };
            match session.tunn.encapsulate(&self.scratch[..len], slot) {
                TunnResult::WriteToNetwork(message) => {
                    let sealed = message.len();
                    tx.commit(to, Via::WireGuard, sealed);
                    session.sent += len as u64;
                }
                // The session ended between two ticks: boringtun has kept the packet and asks for a handshake.
                TunnResult::Done | TunnResult::Err(_) => return some(DropReason::ExpiredSession),
                TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                    return some(DropReason::ExpiredSession);
                }
            }
        }
        Sealed { sent: packets.count(), waiting: 0, refused: None }
    }

    /// How many packets wait for a session.
    pub fn waiting(&self) -> usize {
        self.sessions.iter().flatten().map(|session| session.queue.len()).sum()
    }

    /// What became of packets that waited, since this was last asked.
    pub fn take_waited(&mut self) -> Waited {
        std::mem::take(&mut self.waited)
    }

    /// Starts a handshake with `peer` now, if there is no session: used for peers that were active
    /// before a restart, which may be waiting for us.
    pub fn initiate(&mut self, now: Instant, peer: &Peer, tx: &mut TxBatch) -> Result<(), DropReason> {
        let index = self.session_towards(now, peer)?;
        if self.sessions.get(index).and_then(Option::as_ref).is_some_and(|session| !session.established) {
            self.send_initiation(now, index, tx);
        }
        Ok(())
    }

    /// The session that packets to this peer use, made if there is none.
    fn session_towards(&mut self, now: Instant, peer: &Peer) -> Result<usize, DropReason> {
        if peer.lanes.is_empty() {
            return Err(DropReason::NoEndpoint);
        }
        let lane = self.lane.partner(peer.lanes.len());
        if let Some(slot) = self.slots.get(&(peer.id, lane)) {
            return Ok(slot.active);
        }
        let index = self.make_session(now, peer, lane)?;
        self.slots.insert((peer.id, lane), Slot { active: index, candidate: None });
        Ok(index)
    }

    fn make_session(&mut self, now: Instant, peer: &Peer, lane: LaneId) -> Result<usize, DropReason> {
        let key = peer.lanes.get(usize::from(lane.0)).ok_or(DropReason::UnknownPeer)?.key;
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.sessions.len() < MAX_SESSIONS => {
                self.sessions.push(None);
                self.sessions.len() - 1
            }
            None => return Err(DropReason::NoBuffer),
        };
        let mut endpoints = Endpoints::new(lane_endpoints(peer, lane));
        if let Some(seen) = self.last_seen.get(&(peer.id, lane)).filter(|seen| seen.key == key) {
            endpoints.called(seen.at);
        }
        // Persistent keepalives are sent by the tick: boringtun could not follow a changed interval.
        let tunn = Tunn::new(
            self.private.clone(),
            DalekPublic::from(key),
            None,
            None,
            index as u32,
            Some(Arc::clone(&self.open_gate)),
        );
        self.sessions[index] = Some(Box::new(Session {
            tunn,
            peer: peer.id,
            lane,
            key,
            established: false,
            keepalive: keepalive(peer),
            endpoints,
            ring: Ring::default(),
            queue: VecDeque::new(),
            created: now,
            last_sent: now,
            last_data: None,
            received: 0,
            sent: 0,
        }));
        self.live += 1;
        self.next_tick.get_or_insert(now + TICK);
        Ok(index)
    }

    /// Keeps packets until the session is there, as many as there is room for, and sees that a handshake runs.
    fn enqueue(&mut self, now: Instant, index: usize, packets: &impl Segments, tx: &mut TxBatch) -> Sealed {
        let mut sealed = Sealed::default();
        if let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) {
            for i in 0..packets.count() {
                let len = packets.len(i);
                if session.queue.len() >= QUEUE_PACKETS || self.queue_bytes + len > QUEUE_BYTES {
                    self.stats.queue_dropped += (packets.count() - i) as u64;
                    sealed.refused = Some(DropReason::AwaitingSession);
                    break;
                }
                let mut packet = vec![0; len];
                packets.write(i, &mut packet);
                self.queue_bytes += len;
                self.stats.queued += 1;
                session.queue.push_back(Queued { since: now, packet });
                sealed.waiting += 1;
            }
        }
        self.send_initiation(now, index, tx);
        sealed
    }

    /// Begins a handshake, unless one is under way.
    fn send_initiation(&mut self, now: Instant, index: usize, tx: &mut TxBatch) {
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else { return };
        let Some(to) = session.endpoints.target() else { return };
        let Some(room) = tx.reserve(HANDSHAKE_ROOM) else { return };
        if let TunnResult::WriteToNetwork(message) = session.tunn.format_handshake_initiation(room, false) {
            let len = message.len();
            session.last_sent = now;
            session.ring.sent(message);
            tx.commit(to, Via::WireGuard, len);
            session.endpoints.attempted();
            self.stats.initiations_sent += 1;
        }
    }

    // --- 2. in -----------------------------------------------------------------------------------

    /// Opens a datagram. A packet in it is written to the start of `plain`, which must be at least as
    /// long as the datagram; answers (handshakes, cookies, packets that waited) go to `tx`.
    pub fn open(
        &mut self,
        now: Instant,
        mesh: &Mesh,
        from: SocketAddr,
        datagram: &[u8],
        plain: &mut [u8],
        tx: &mut TxBatch,
    ) -> Opened {
        if plain.len() < datagram.len().max(HANDSHAKE_ROOM) {
            return Opened::Drop(DropReason::NoBuffer);
        }
        let index = match Tunn::parse_incoming_packet(datagram) {
            Ok(Packet::PacketData(_)) if counter(datagram) >= REJECT_AFTER_MESSAGES => {
                return Opened::Drop(DropReason::ExpiredSession);
            }
            Ok(Packet::PacketData(p)) => p.receiver_idx,
            Ok(Packet::HandshakeResponse(p)) => {
                let index = (p.receiver_idx >> 8) as usize;
                return self.open_response(now, mesh, index, from, datagram, plain, tx);
            }
            Ok(Packet::PacketCookieReply(p)) => p.receiver_idx,
            Ok(Packet::HandshakeInit(_)) => return self.open_initiation(now, mesh, from, datagram, tx),
            Err(_) => return Opened::Drop(DropReason::NotTunnel),
        };
        self.open_in_session(now, mesh, (index >> 8) as usize, from, datagram, plain, tx)
    }

    /// The answer to a handshake of ours: gate, then the session. Whoever sends too many that were not made by the
    /// peer shows a cookie first.
    #[allow(clippy::too_many_arguments)] // one datagram and everything that is known about it
    fn open_response(
        &mut self,
        now: Instant,
        mesh: &Mesh,
        index: usize,
        from: SocketAddr,
        datagram: &[u8],
        plain: &mut [u8],
        tx: &mut TxBatch,
    ) -> Opened {
        if let Err(reason) = self.gate(mesh, from, datagram) {
            return Opened::Drop(reason);
        }
        if !self.limits.trusts_answer(from.ip(), now)
            && let Err(reason) = self.demand_cookie(now, from, datagram, tx)
        {
            return Opened::Drop(reason);
        }
        let opened = self.open_in_session(now, mesh, index, from, datagram, plain, tx);
        // Its first MAC was right: the keys were computed.
        if opened == Opened::Drop(DropReason::BadAuthentication) {
            self.limits.answer_was_forged(from.ip(), now);
        }
        opened
    }

    #[allow(clippy::too_many_arguments)] // one datagram and everything that is known about it
    fn open_in_session(
        &mut self,
        now: Instant,
        mesh: &Mesh,
        index: usize,
        from: SocketAddr,
        datagram: &[u8],
        plain: &mut [u8],
        tx: &mut TxBatch,
    ) -> Opened {
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else {
            return Opened::Drop(DropReason::UnknownPeer);
        };
        if !session.endpoints.is_confirmed(from) && mesh.routes.among_pods(from.ip()) {
            return Opened::Drop(DropReason::TunnelInTunnel);
        }
        let data = datagram[0] == 4;
        let result = match session.tunn.decapsulate(None, datagram, plain) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                let len = packet.len();
                session.received += len as u64;
                session.last_data = Some(now);
                Opened::Packet { peer: session.peer, len }
            }
            // A response was accepted: the keepalive behind it confirms the session to the peer.
            TunnResult::WriteToNetwork(message) => {
                if let Some(room) = tx.reserve(message.len()) {
                    room.copy_from_slice(message);
                    tx.commit(from, Via::WireGuard, message.len());
                }
                session.last_sent = now;
                session.established = false; // a rekey counts as a new handshake below
                Opened::Control
            }
            TunnResult::Done => Opened::Control,
            TunnResult::Err(error) => return Opened::Drop(reason(&error)),
        };
        // A cookie reply proves nothing about who sent it.
        if data || datagram[0] == 2 {
            session.ring.proved(datagram[if data { 4 } else { 8 }]);
            self.authenticated(now, index, from, tx);
        }
        result
    }

    /// The peer has just proved that it holds the session's keys.
    fn authenticated(&mut self, now: Instant, index: usize, from: SocketAddr, tx: &mut TxBatch) {
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else { return };
        self.stats.roamed += u64::from(session.endpoints.proved(from));
        if session.established || session.tunn.time_since_last_handshake().is_none() {
            return;
        }
        session.established = true;
        self.stats.handshakes_completed += 1;
        let (peer, lane) = (session.peer, session.lane);
        self.promote(index, peer, lane);
        self.flush_queue(now, index, tx);
    }

    /// A candidate that proved itself replaces the session that was in use.
    fn promote(&mut self, index: usize, peer: PeerId, lane: LaneId) {
        let Some(slot) = self.slots.get_mut(&(peer, lane)) else { return };
        if slot.candidate != Some(index) {
            return;
        }
        let old = std::mem::replace(slot, Slot { active: index, candidate: None }).active;
        let waiting = self.sessions.get_mut(old).and_then(Option::take);
        if let Some(mut waiting) = waiting {
            self.live -= 1;
            self.free.push(old);
            if let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) {
                session.queue.append(&mut waiting.queue);
                session.received += waiting.received;
                session.sent += waiting.sent;
            }
        }
    }

    fn flush_queue(&mut self, now: Instant, index: usize, tx: &mut TxBatch) {
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else { return };
        let Some(to) = session.endpoints.target() else { return };
        session.last_sent = now;
        while let Some(waiting) = session.queue.pop_front() {
            self.queue_bytes -= waiting.packet.len();
            let room = (waiting.packet.len() + DATA_OVERHEAD).max(HANDSHAKE_ROOM);
            let fresh = now.saturating_duration_since(waiting.since) < QUEUE_AGE;
            let sealed = match tx.reserve(room).filter(|_| fresh) {
                Some(slot) => session.tunn.encapsulate(&waiting.packet, slot),
                None => TunnResult::Done,
            };
            let TunnResult::WriteToNetwork(message) = sealed else {
                self.stats.queue_dropped += 1;
                self.waited.dropped += 1;
                continue;
            };
            let len = message.len();
            tx.commit(to, Via::WireGuard, len);
            session.sent += waiting.packet.len() as u64;
            self.waited.sent.push((session.peer, waiting.packet.len()));
        }
    }

    /// A handshake that a peer begins: gate, per-source limit, then whose key it is, then the session.
    fn open_initiation(
        &mut self,
        now: Instant,
        mesh: &Mesh,
        from: SocketAddr,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Opened {
        let message = match self.gate(mesh, from, datagram) {
            Ok(Packet::HandshakeInit(message)) => message,
            Ok(Packet::HandshakeResponse(_) | Packet::PacketCookieReply(_) | Packet::PacketData(_)) => {
                return Opened::Drop(DropReason::NotTunnel);
            }
            Err(reason) => return Opened::Drop(reason),
        };
        if let Err(reason) = self.admit(now, from, datagram, tx) {
            return Opened::Drop(reason);
        }
        let Ok(half) = parse_handshake_anon(&self.private, &self.public, &message) else {
            return Opened::Drop(DropReason::BadAuthentication);
        };
        let Some(&(id, lane)) = mesh.keys.get(&half.peer_static_public) else {
            return Opened::Drop(DropReason::UnknownPeer);
        };
        let Some(peer) = mesh.peer(id) else {
            return Opened::Drop(DropReason::UnknownPeer);
        };
        self.answer_initiation(now, peer, lane, from, datagram, tx)
    }

    /// What is cheap to see of a handshake message: that it did not come through the mesh, and that whoever wrote
    /// it knows our public key.
    fn gate<'a>(&self, mesh: &Mesh, from: SocketAddr, datagram: &'a [u8]) -> Result<Packet<'a>, DropReason> {
        if mesh.routes.among_pods(from.ip()) {
            return Err(DropReason::TunnelInTunnel);
        }
        self.open_gate.verify_packet(None, datagram, &mut []).map_err(|refusal| match refusal {
            TunnResult::Err(error) => reason(&error),
            TunnResult::Done
            | TunnResult::WriteToNetwork(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => DropReason::NotTunnel,
        })
    }

    /// Whether there is time for the expensive part of a handshake. When there are too many, or too many
    /// from this source, its sender first proves with a cookie that he is there.
    fn admit(
        &mut self,
        now: Instant,
        from: SocketAddr,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Result<(), DropReason> {
        if self.limits.allow_unproven(from.ip(), now) {
            return Ok(());
        }
        self.demand_cookie(now, from, datagram, tx)
    }

    /// Lets a handshake message with our cookie in it pass, in measure; to another the cookie is sent.
    fn demand_cookie(
        &mut self,
        now: Instant,
        from: SocketAddr,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Result<(), DropReason> {
        let mut cookie = [0; 64];
        match self.cookies.verify_packet(Some(from.ip()), datagram, &mut cookie) {
            Ok(_) if self.limits.allow_proven(from.ip(), now) => Ok(()),
            Ok(_) => Err(DropReason::HandshakeRate),
            Err(TunnResult::WriteToNetwork(reply)) => {
                if let Some(room) = tx.reserve(reply.len()) {
                    room.copy_from_slice(reply);
                    tx.commit(from, Via::WireGuard, reply.len());
                }
                Err(DropReason::CookieDemanded)
            }
            Err(TunnResult::Err(error)) => Err(reason(&error)),
            Err(TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..)) => {
                Err(DropReason::NotTunnel)
            }
        }
    }

    fn answer_initiation(
        &mut self,
        now: Instant,
        peer: &Peer,
        lane: LaneId,
        from: SocketAddr,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Opened {
        let print = fingerprint(datagram);
        if self.spent.contains(&print) {
            return Opened::Drop(DropReason::Replay);
        }
        let known = self.slots.get(&(peer.id, lane)).copied();
        let active = match known {
            Some(slot) => slot.active,
            None => match self.make_session(now, peer, lane) {
                Ok(index) => {
                    self.slots.insert((peer.id, lane), Slot { active: index, candidate: None });
                    index
                }
                Err(reason) => return Opened::Drop(reason),
            },
        };
        let in_the_way = |s: &Session| s.established && !s.ring.has_room();
        if !self.sessions.get(active).and_then(Option::as_ref).is_some_and(|s| in_the_way(s)) {
            match self.respond(active, from, datagram, tx) {
                Err(WireGuardError::WrongTai64nTimestamp) => {}
                Err(error) => {
                    // Whoever knows two public keys can write what makes a session here: not for long.
                    if known.is_none() {
                        self.remove(active);
                    }
                    return Opened::Drop(reason(&error));
                }
                Ok(()) => return Opened::Control,
            }
        }
        // The candidate may have answered an earlier one of the same peer: let it judge first.
        if let Some(candidate) = known.and_then(|slot| slot.candidate) {
            if self.respond(candidate, from, datagram, tx).is_ok() {
                self.spend(print);
                return Opened::Control;
            }
            let age = self.sessions.get(candidate).and_then(Option::as_ref).map(|s| now - s.created);
            if age.is_some_and(|age| age < CANDIDATE_AGE) {
                // An honest peer tries again with another one.
                self.spend(print);
                return Opened::Drop(DropReason::Replay);
            }
            self.remove(candidate);
        }
        self.stats.old_timestamps += 1;
        let Ok(candidate) = self.make_session(now, peer, lane) else {
            return Opened::Drop(DropReason::NoBuffer);
        };
        if let Some(slot) = self.slots.get_mut(&(peer.id, lane)) {
            slot.candidate = Some(candidate);
        }
        match self.respond(candidate, from, datagram, tx) {
            Ok(()) => {
                self.spend(print);
                Opened::Control
            }
            Err(error) => {
                self.remove(candidate);
                Opened::Drop(reason(&error))
            }
        }
    }

    fn spend(&mut self, print: [u8; 8]) {
        if self.spent.len() >= SPENT {
            self.spent.pop_front();
        }
        self.spent.push_back(print);
    }

    /// Lets a session answer an initiation; the answer goes to where the initiation came from, but the
    /// endpoint moves only when data has been authenticated.
    fn respond(
        &mut self,
        index: usize,
        from: SocketAddr,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Result<(), WireGuardError> {
        let session =
            self.sessions.get_mut(index).and_then(Option::as_mut).ok_or(WireGuardError::NoCurrentSession)?;
        let room = tx.reserve(HANDSHAKE_ROOM).ok_or(WireGuardError::DestinationBufferTooSmall)?;
        match session.tunn.decapsulate(None, datagram, room) {
            TunnResult::WriteToNetwork(message) => {
                let len = message.len();
                session.ring.sent(message);
                tx.commit(from, Via::WireGuard, len);
                self.stats.initiations_answered += 1;
                session.endpoints.called(from);
                Ok(())
            }
            TunnResult::Err(error) => Err(error),
            TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                Err(WireGuardError::UnexpectedPacket)
            }
        }
    }

    // --- 3. time ---------------------------------------------------------------------------------

    /// When [`Self::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.next_tick
    }

    /// Runs the timers of every session: retransmission, rekey, keepalive, expiry.
    pub fn handle_timeout(&mut self, now: Instant, tx: &mut TxBatch) {
        if self.next_tick.is_none_or(|tick| now < tick) {
            return;
        }
        for index in 0..self.sessions.len() {
            self.tick_session(now, index, tx);
        }
        self.next_tick = (self.live > 0).then_some(now + TICK);
    }

    fn tick_session(&mut self, now: Instant, index: usize, tx: &mut TxBatch) {
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else { return };
        let Some(room) = tx.reserve(HANDSHAKE_ROOM) else { return };
        match session.tunn.update_timers(room) {
            TunnResult::WriteToNetwork(message) => {
                let (len, initiation) = (message.len(), message[0] == 1);
                if initiation {
                    session.ring.sent(message);
                    session.endpoints.attempted();
                    self.stats.initiations_sent += 1;
                }
                if let Some(to) = session.endpoints.target() {
                    tx.commit(to, Via::WireGuard, len);
                    session.last_sent = now;
                }
            }
            TunnResult::Err(_) => return self.remove(index),
            TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {}
        }
        session.established &= session.tunn.time_since_last_handshake().is_some();
        self.keep_alive(now, index, tx);
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else { return };
        while session.queue.front().is_some_and(|q| now.saturating_duration_since(q.since) >= QUEUE_AGE) {
            if let Some(old) = session.queue.pop_front() {
                self.queue_bytes -= old.packet.len();
                self.stats.queue_dropped += 1;
                self.waited.dropped += 1;
            }
        }
    }

    /// Sends a persistent keepalive if one is due. Where the keys have expired it takes a handshake to send one,
    /// and so a peer with keepalives keeps its session for as long as it answers.
    fn keep_alive(&mut self, now: Instant, index: usize, tx: &mut TxBatch) {
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else { return };
        let silent = now.saturating_duration_since(session.last_sent);
        if session.keepalive.is_none_or(|interval| silent < interval) {
            return;
        }
        // A candidate has yet to prove that there is anybody to keep alive.
        if self.slots.get(&(session.peer, session.lane)).is_none_or(|slot| slot.active != index) {
            return;
        }
        if !session.established {
            return self.send_initiation(now, index, tx);
        }
        let (Some(to), Some(room)) = (session.endpoints.target(), tx.reserve(HANDSHAKE_ROOM)) else { return };
        if let TunnResult::WriteToNetwork(message) = session.tunn.encapsulate(&[], room) {
            let len = message.len();
            tx.commit(to, Via::WireGuard, len);
            session.last_sent = now;
        }
    }

    /// Follows a new mesh: sessions whose peer or key has gone end, endpoints follow the announcements.
    pub fn handle_mesh(&mut self, mesh: &Arc<Mesh>) {
        if self.mesh.as_ref().is_some_and(|old| Arc::ptr_eq(old, mesh)) {
            return;
        }
        self.mesh = Some(Arc::clone(mesh));
        for index in 0..self.sessions.len() {
            let Some(session) = self.sessions[index].as_mut() else { continue };
            let peer = mesh.peer(session.peer);
            let kept = peer
                .filter(|p| p.lanes.get(usize::from(session.lane.0)).is_some_and(|l| l.key == session.key));
            match kept {
                Some(peer) => {
                    session.keepalive = keepalive(peer);
                    session.endpoints.follow(lane_endpoints(peer, session.lane));
                    session.endpoints.forget(|at| mesh.routes.among_pods(at.ip()));
                }
                None => self.remove(index),
            }
        }
        self.last_seen.retain(|(peer, lane), seen| {
            let lane = mesh.peer(*peer).and_then(|p| p.lanes.get(usize::from(lane.0)));
            lane.is_some_and(|l| l.key == seen.key) && !mesh.routes.among_pods(seen.at.ip())
        });
    }

    fn remove(&mut self, index: usize) {
        let Some(session) = self.sessions.get_mut(index).and_then(Option::take) else { return };
        self.live -= 1;
        self.free.push(index);
        self.queue_bytes -= session.queue.iter().map(|q| q.packet.len()).sum::<usize>();
        self.stats.queue_dropped += session.queue.len() as u64;
        self.waited.dropped += session.queue.len();
        let key = (session.peer, session.lane);
        if let Some(at) = session.endpoints.unannounced() {
            self.last_seen.insert(key, LastSeen { key: session.key, at });
        }
        let Some(slot) = self.slots.get_mut(&key) else { return };
        if slot.candidate == Some(index) {
            slot.candidate = None;
        } else if slot.active == index {
            match slot.candidate.take() {
                Some(candidate) => slot.active = candidate,
                None => {
                    self.slots.remove(&key);
                }
            }
        }
    }

    /// The sessions there are.
    pub fn report(&self, now: Instant) -> Vec<SessionReport> {
        self.sessions
            .iter()
            .flatten()
            .map(|s| SessionReport {
                peer: s.peer,
                lane: s.lane,
                key: s.key,
                endpoint: s.endpoints.target(),
                established: s.established,
                handshake_age: s.tunn.time_since_last_handshake(),
                received: s.received,
                sent: s.sent,
                idle: s.last_data.map(|at| now.saturating_duration_since(at)),
            })
            .collect()
    }
}

/// The endpoints of one lane of a peer.
fn lane_endpoints(peer: &Peer, lane: LaneId) -> Vec<SocketAddr> {
    let port = peer.lanes.get(usize::from(lane.0)).map(|l| l.port);
    peer.endpoints
        .iter()
        .map(|e| match port {
            Some(port) if lane.0 > 0 => SocketAddr::new(e.ip(), port),
            Some(_) | None => *e,
        })
        .take(MAX_ANNOUNCED)
        .collect()
}

/// How often a peer wants to hear from us, if it does.
fn keepalive(peer: &Peer) -> Option<Duration> {
    (peer.keepalive > 0).then(|| Duration::from_secs(peer.keepalive.into()))
}

/// Tells initiations apart: part of the ephemeral key, which nobody can choose but its sender.
fn fingerprint(initiation: &[u8]) -> [u8; 8] {
    initiation.get(8..16).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default()
}

/// The counter of a data message.
fn counter(datagram: &[u8]) -> u64 {
    datagram.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(u64::MAX, u64::from_le_bytes)
}

/// boringtun's errors in our words.
fn reason(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => DropReason::Replay,
        WireGuardError::WrongTai64nTimestamp => DropReason::Replay,
        WireGuardError::InvalidMac | WireGuardError::InvalidAeadTag | WireGuardError::WrongKey => {
            DropReason::BadAuthentication
        }
        WireGuardError::InvalidTai64nTimestamp => DropReason::BadAuthentication,
        WireGuardError::WrongIndex | WireGuardError::NoCurrentSession => DropReason::ExpiredSession,
        WireGuardError::ConnectionExpired | WireGuardError::UnexpectedPacket => DropReason::ExpiredSession,
        WireGuardError::UnderLoad => DropReason::CookieDemanded,
        WireGuardError::DestinationBufferTooSmall | WireGuardError::LockFailed => DropReason::NoBuffer,
        WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType
        | WireGuardError::InvalidPacket => DropReason::NotTunnel,
    }
}
