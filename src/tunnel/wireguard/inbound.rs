//! What [`super`] does with a datagram. boringtun's names come from there: that file names it, no other does.
//!
//! 1. [`WireGuard::open`]: which kind of message it is;
//! 2. the answer to a handshake of ours: gate, a cookie if its source has forged others, then 3;
//! 3. what belongs to a session: data, cookies, answers; the peer's endpoint follows what is authentic;
//! 4. a handshake that a peer begins: gate, limit, whose key it is, then the session or a candidate.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{
    DATA_OVERHEAD, HANDSHAKE_ROOM, Opened, Packet, QUEUE_AGE, Session, Slot, Tunn, TunnResult, WireGuard,
    WireGuardError, parse_handshake_anon,
};
use crate::packet::DropReason;
use crate::snapshot::{LaneId, Mesh, Peer, PeerId, PublicKey};
use crate::tunnel::{TxBatch, Via};

/// A session ends before its counter does (WireGuard paper section 6.5: 2^64 - 2^13 - 1 messages); boringtun
/// would compute with larger ones.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// A candidate session that proved nothing within this time makes room for another.
const CANDIDATE_AGE: Duration = Duration::from_secs(5);
/// Initiations with an old timestamp that are remembered, so that a recorded one can be in an honest one's way
/// once and not again: eight hours of one peer's rekeys.
const SPENT: usize = 256;

/// Between which keys a handshake is: the peer's, and which one of ours.
#[derive(Clone, Copy)]
struct Pair {
    key: PublicKey,
    identity: usize,
    ours: PublicKey,
}

impl WireGuard {
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
        let identity = match self.gate(mesh, from, datagram) {
            Ok((_, identity)) => identity,
            Err(reason) => return Opened::Drop(reason),
        };
        if !self.limits.trusts_answer(from.ip(), now)
            && let Err(reason) = self.demand_cookie(now, from, identity, datagram, tx)
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
        self.promote(now, index, peer, lane);
        self.flush_queue(now, index, tx);
    }

    /// A candidate that proved itself replaces the session that was in use, which goes on receiving: the peer
    /// may not know it yet, and packets are under way.
    fn promote(&mut self, now: Instant, index: usize, peer: PeerId, lane: LaneId) {
        let Some(slot) = self.slots.get_mut(&(peer, lane)) else { return };
        if slot.candidate != Some(index) {
            return;
        }
        let old = slot.active;
        let before = slot.retired.replace(old);
        (slot.active, slot.candidate) = (index, None);
        let Some(waiting) = self.sessions.get_mut(old).and_then(Option::as_mut) else { return };
        waiting.retired = Some(now);
        let (mut queue, received, sent) =
            (std::mem::take(&mut waiting.queue), waiting.received, waiting.sent);
        if let Some(session) = self.sessions.get_mut(index).and_then(Option::as_mut) {
            session.queue.append(&mut queue);
            session.received += received;
            session.sent += sent;
        }
        if let Some(before) = before {
            self.drop_retired(before);
        }
    }

    /// Ends a session that is in no place any more.
    fn drop_retired(&mut self, index: usize) {
        if self.sessions.get_mut(index).and_then(Option::take).is_some() {
            self.live -= 1;
            self.free.push(index);
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
        let (message, identity) = match self.gate(mesh, from, datagram) {
            Ok((Packet::HandshakeInit(message), identity)) => (message, identity),
            Ok((Packet::HandshakeResponse(_) | Packet::PacketCookieReply(_) | Packet::PacketData(_), _)) => {
                return Opened::Drop(DropReason::NotTunnel);
            }
            Err(reason) => return Opened::Drop(reason),
        };
        if let Err(reason) = self.admit(now, from, identity, datagram, tx) {
            return Opened::Drop(reason);
        }
        let Some(ours) = self.identities.get(identity) else {
            return Opened::Drop(DropReason::UnknownPeer);
        };
        let Ok(half) = parse_handshake_anon(&ours.private, &ours.public, &message) else {
            return Opened::Drop(DropReason::BadAuthentication);
        };
        let pair = Pair { key: half.peer_static_public, identity, ours: ours.public.to_bytes() };
        let Some(&(id, lane)) = mesh.keys.get(&pair.key) else {
            return Opened::Drop(DropReason::UnknownPeer);
        };
        let Some(peer) = mesh.peer(id) else {
            return Opened::Drop(DropReason::UnknownPeer);
        };
        self.answer_initiation(now, peer, lane, pair, from, datagram, tx)
    }

    /// What is cheap to see of a handshake message: that it did not come through the mesh, and that whoever wrote
    /// it knows a public key of ours, and which.
    fn gate<'a>(
        &self,
        mesh: &Mesh,
        from: SocketAddr,
        datagram: &'a [u8],
    ) -> Result<(Packet<'a>, usize), DropReason> {
        if mesh.routes.among_pods(from.ip()) {
            return Err(DropReason::TunnelInTunnel);
        }
        let mut refused = DropReason::NotTunnel;
        for (number, identity) in self.identities.iter().enumerate() {
            match identity.open_gate.verify_packet(None, datagram, &mut []) {
                Ok(packet) => return Ok((packet, number)),
                Err(TunnResult::Err(error)) => refused = reason(&error),
                Err(
                    TunnResult::Done
                    | TunnResult::WriteToNetwork(_)
                    | TunnResult::WriteToTunnelV4(..)
                    | TunnResult::WriteToTunnelV6(..),
                ) => {}
            }
        }
        Err(refused)
    }

    /// Whether there is time for the expensive part of a handshake. When there are too many, or too many
    /// from this source, its sender first proves with a cookie that he is there.
    fn admit(
        &mut self,
        now: Instant,
        from: SocketAddr,
        identity: usize,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Result<(), DropReason> {
        if self.limits.allow_unproven(from.ip(), now) {
            return Ok(());
        }
        self.demand_cookie(now, from, identity, datagram, tx)
    }

    /// Lets a handshake message with our cookie in it pass, in measure; to another the cookie is sent.
    fn demand_cookie(
        &mut self,
        now: Instant,
        from: SocketAddr,
        identity: usize,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Result<(), DropReason> {
        let mut cookie = [0; 64];
        let ours = self.identities.get(identity).ok_or(DropReason::UnknownPeer)?;
        match ours.cookies.verify_packet(Some(from.ip()), datagram, &mut cookie) {
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

    #[allow(clippy::too_many_arguments)] // one datagram and everything that is known about it
    fn answer_initiation(
        &mut self,
        now: Instant,
        peer: &Peer,
        lane: LaneId,
        pair: Pair,
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
            None => match self.make_session(now, peer, lane, pair.key, pair.identity) {
                Ok(index) => {
                    self.slots.insert((peer.id, lane), Slot::of(index));
                    index
                }
                Err(reason) => return Opened::Drop(reason),
            },
        };
        let session = |index: usize| self.sessions.get(index).and_then(Option::as_deref);
        let in_the_way = |s: &Session| s.established && !s.ring.has_room();
        let between = |s: &Session| s.key == pair.key && s.ours == pair.ours;
        let other_keys = !session(active).is_some_and(between);
        if !other_keys && !session(active).is_some_and(in_the_way) {
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
            let judges = self.sessions.get(candidate).and_then(Option::as_deref).is_some_and(between);
            if judges && self.respond(candidate, from, datagram, tx).is_ok() {
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
        self.stats.old_timestamps += u64::from(!other_keys);
        let Ok(candidate) = self.make_session(now, peer, lane, pair.key, pair.identity) else {
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
