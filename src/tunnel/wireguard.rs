//! WireGuard: the only file that names boringtun.
//!
//! One [`WireGuard`] per lane, with the lane's own key. Sessions are made when first needed, found by
//! the index that a message carries (boringtun keeps our 24 bits of it above its own 8), and forgotten
//! when they have been silent for nine minutes.
//!
//! 1. [`WireGuard::seal`]: packets to a peer become datagrams, or wait in a bounded queue for the session.
//! 2. [`WireGuard::open`]: a datagram becomes a packet, or moves a handshake on (`inbound.rs`).
//! 3. [`WireGuard::handle_timeout`]: retransmissions, rekeying, keepalives, expiry.
//!
//! boringtun reads a clock of its own (the one exception to the rule that time is an argument); the
//! simulation advances it together with `now`.
//!
//! A peer may have two sessions at once: the one in use and a candidate. A handshake whose timestamp is
//! not newer than the last one we saw is a replay, or a peer whose clock was set back; it gets a
//! candidate of its own, which takes over only when data arrives that proves the peer holds the keys.
//!
//! Keys change without a packet lost ([`Keys`], and `also` of a [`Peer`]): handshakes to either of our keys and by
//! either of the peer's are answered. A session of a key of ours that is no longer the one in use gets a
//! candidate of the one that is; and whatever was replaced goes on receiving for a while, because packets are under way.
//!
//! An endpoint never lies inside the mesh: what is sealed for such a peer would come back to be sealed again.
//! Announced ones were checked where they were compiled; where datagrams come from is checked here, once for
//! each place: an ordinary packet comes from the confirmed one and costs no look-up.

mod inbound;

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
/// Packets that wait for one session, and the bytes that wait on one lane.
const QUEUE_PACKETS: usize = 128;
const QUEUE_BYTES: usize = 8 << 20;
/// A packet that has waited this long is of no use to anyone: TCP has sent it again twice.
const QUEUE_AGE: Duration = Duration::from_secs(5);
/// How long a session that was replaced goes on receiving: longer than any packet is under way.
const RETIRED: Duration = Duration::from_secs(20);
/// Sessions that get a candidate between newer keys in one tick: a handshake costs more than a hundred packets.
const RENEWALS: usize = 16;
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

/// The private keys of a lane.
#[derive(Clone)]
pub struct Keys {
    /// The one in use.
    pub current: StaticSecret,
    /// One whose handshakes are answered too: the next one before a change, the last one after it.
    pub also: Option<StaticSecret>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("also", &self.also.is_some()).finish_non_exhaustive()
    }
}

/// One of our keys, and who is let through to it.
struct Identity {
    private: StaticSecret,
    public: DalekPublic,
    /// Demands a cookie of whoever it is asked about.
    cookies: Arc<RateLimiter>,
    /// Checks the first MAC of handshakes and lets all pass that have it right; every session has it too.
    open_gate: Arc<RateLimiter>,
}

impl Identity {
    fn new(private: StaticSecret) -> Identity {
        let public = DalekPublic::from(&private);
        Identity {
            cookies: Arc::new(RateLimiter::new(&public, 0)),
            open_gate: Arc::new(RateLimiter::new(&public, u64::MAX)),
            private,
            public,
        }
    }
}

struct Queued {
    since: Instant,
    packet: Vec<u8>,
}

struct Session {
    tunn: Tunn,
    peer: PeerId,
    lane: LaneId,
    /// The peer's key, and ours.
    key: PublicKey,
    ours: PublicKey,
    /// Since when another has been in its place.
    retired: Option<Instant>,
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
    /// What was active before, and still receives.
    retired: Option<usize>,
}

impl Slot {
    fn of(active: usize) -> Slot {
        Slot { active, candidate: None, retired: None }
    }
}

/// The WireGuard end of one lane.
pub struct WireGuard {
    /// Ours in use first.
    identities: Vec<Identity>,
    lane: LaneId,
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
        WireGuard {
            identities: vec![Identity::new(private)],
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
        self.identity().public.to_bytes()
    }

    /// Changes the lane's keys. Sessions of keys that are not among them end; those of the key that is no longer
    /// in use are replaced one after the other.
    pub fn set_keys(&mut self, now: Instant, keys: Keys) {
        let mut old = std::mem::take(&mut self.identities);
        for private in [Some(keys.current), keys.also].into_iter().flatten() {
            let public = DalekPublic::from(&private);
            let known = old.iter().position(|identity| identity.public == public);
            self.identities.push(match known {
                Some(index) => old.swap_remove(index),
                None => Identity::new(private),
            });
        }
        for index in 0..self.sessions.len() {
            let ours = self.sessions[index].as_ref().map(|session| session.ours);
            if ours.is_some_and(|ours| !self.identities.iter().any(|i| i.public.to_bytes() == ours)) {
                self.remove(index);
            }
        }
        self.next_tick = (self.live > 0).then_some(now);
    }

    fn identity(&self) -> &Identity {
        // There is always the one in use.
        &self.identities[0]
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
        let key = current_key(peer, lane).ok_or(DropReason::UnknownPeer)?;
        let index = self.make_session(now, peer, lane, key, 0)?;
        self.slots.insert((peer.id, lane), Slot::of(index));
        Ok(index)
    }

    /// A session between this key of the peer's lane and that identity of ours.
    fn make_session(
        &mut self,
        now: Instant,
        peer: &Peer,
        lane: LaneId,
        key: PublicKey,
        identity: usize,
    ) -> Result<usize, DropReason> {
        let ours = self.identities.get(identity).ok_or(DropReason::UnknownPeer)?;
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
            ours.private.clone(),
            DalekPublic::from(key),
            None,
            None,
            index as u32,
            Some(Arc::clone(&ours.open_gate)),
        );
        self.sessions[index] = Some(Box::new(Session {
            tunn,
            peer: peer.id,
            lane,
            key,
            ours: ours.public.to_bytes(),
            retired: None,
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
        self.renew(now, tx);
        self.next_tick = (self.live > 0).then_some(now + TICK);
    }

    fn tick_session(&mut self, now: Instant, index: usize, tx: &mut TxBatch) {
        let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) else { return };
        if let Some(since) = session.retired {
            // It only receives: no timer of its own may begin anything.
            if now.saturating_duration_since(since) >= RETIRED {
                self.remove(index);
            }
            return;
        }
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

    /// Gives sessions of a key of ours that is no longer the one in use a candidate of the one that is. Only whoever
    /// changes keys does that: a peer that has not heard of it yet would lead the session back.
    fn renew(&mut self, now: Instant, tx: &mut TxBatch) {
        let Some(mesh) = self.mesh.clone() else { return };
        let ours = self.public_key();
        let session = |index: usize| self.sessions.get(index).and_then(Option::as_deref);
        let begun = |slot: &Slot| slot.candidate.and_then(session).is_some_and(|s| s.ours == ours);
        // Most of the time there is none.
        let outdated = |slot: &Slot| {
            session(slot.active).filter(|s| s.ours != ours && !begun(slot)).map(|s| s.endpoints.target())
        };
        let found: Vec<(PeerId, LaneId, Option<SocketAddr>)> = self
            .slots
            .iter()
            .filter_map(|((peer, lane), slot)| outdated(slot).map(|at| (*peer, *lane, at)))
            .take(RENEWALS)
            .collect();
        for (id, lane, at) in found {
            let Some(peer) = mesh.peer(id) else { continue };
            let Some(key) = current_key(peer, lane) else { continue };
            // One that has proved nothing, and is of the old key too.
            if let Some(old) = self.slots.get(&(id, lane)).and_then(|slot| slot.candidate) {
                self.remove(old);
            }
            let Ok(index) = self.make_session(now, peer, lane, key, 0) else { return };
            // Where the peer is now, which it may not have announced.
            if let (Some(session), Some(at)) = (self.sessions.get_mut(index).and_then(Option::as_mut), at) {
                session.endpoints.called(at);
            }
            if let Some(slot) = self.slots.get_mut(&(id, lane)) {
                slot.candidate = Some(index);
            }
            self.send_initiation(now, index, tx);
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
            // An ordinary peer knows lane 0's key alone, whatever it was before.
            let kept = peer
                .filter(|peer| has_key(peer, session.lane, &session.key))
                .filter(|peer| !peer.ordinary || self.lane == LaneId(0));
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
            mesh.peer(*peer).is_some_and(|peer| has_key(peer, *lane, &seen.key))
                && !mesh.routes.among_pods(seen.at.ip())
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
        } else if slot.retired == Some(index) {
            slot.retired = None;
        } else if slot.active == index {
            match slot.candidate.take() {
                Some(candidate) => slot.active = candidate,
                None => {
                    let retired = slot.retired;
                    self.slots.remove(&key);
                    if let Some(retired) = retired {
                        self.remove(retired);
                    }
                }
            }
        }
    }

    /// The sessions there are.
    pub fn report(&self, now: Instant) -> Vec<SessionReport> {
        self.sessions
            .iter()
            .flatten()
            .filter(|s| s.retired.is_none())
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

/// The key that a peer's lane uses.
fn current_key(peer: &Peer, lane: LaneId) -> Option<PublicKey> {
    peer.lanes.get(usize::from(lane.0)).map(|lane| lane.key)
}

/// Whether a key is one of this lane's: the one in use, or the next or last one.
fn has_key(peer: &Peer, lane: LaneId, key: &PublicKey) -> bool {
    let number = usize::from(lane.0);
    current_key(peer, lane).as_ref() == Some(key) || peer.also.get(number) == Some(key)
}

/// How often a peer wants to hear from us, if it does.
fn keepalive(peer: &Peer) -> Option<Duration> {
    (peer.keepalive > 0).then(|| Duration::from_secs(peer.keepalive.into()))
}
