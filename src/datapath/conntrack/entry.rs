//! One entry of the table: what its sixteen words say.

use std::sync::atomic::{AtomicU64, Ordering};

use super::key::{PackedKey, TAIL_MASK, protocol};
use super::memory::{self, ENTRY, Entry};
use super::{Direction, FlowKey, FlowRecord, FlowRef, FlowState, Sighting, Translation};
use crate::snapshot::PeerId;

// --- places of the words -------------------------------------------------------------------------

/// Second of creation 32, sequence 32: odd while it is being written.
pub(super) const SEQUENCE: usize = 0;
/// In a free entry: the next free one + 1.
pub(super) const NEXT: usize = 1;
/// Original source (2 words), destination (2).
pub(super) const ORIGINAL: usize = 1;
/// Ports, protocol, family, and the 16 bits of who pays for the entry. Family 0: free.
pub(super) const TAIL: usize = 5;
/// Reply source (2 words), destination (2).
pub(super) const REPLY: usize = 6;
/// Reply ports 32, peer + 1 32.
pub(super) const REPLY_PORTS: usize = 10;
/// Service 32, endpoint 32.
pub(super) const TARGET: usize = 11;
/// Last seen (ms) 40, state 8, flags 8, lane 8.
pub(super) const STATE: usize = 12;
/// Reply packets 32, original packets 32; both wrap.
pub(super) const PACKETS: usize = 13;
pub(super) const ORIGINAL_BYTES: usize = 14;
pub(super) const REPLY_BYTES: usize = 15;

const FLAG_REPLIED: u8 = 1;
pub(super) const FLAG_FROM_PEER: u8 = 2;
pub(super) const FLAG_TRANSLATED: u8 = 4;

/// Time within an entry: 40 bits of milliseconds, 34 years.
const TIME_MASK: u64 = (1 << 40) - 1;

#[derive(Clone, Copy)]
pub(super) struct Hit {
    pub(super) flow: FlowRef,
    pub(super) direction: Direction,
    pub(super) protocol: u8,
    pub(super) state: u64,
}

/// The word of an entry that changes with every burst; changed by exchange only.
#[derive(Clone, Copy)]
pub(super) struct StateWord {
    pub(super) seen: u64,
    pub(super) state: FlowState,
    pub(super) flags: u8,
    pub(super) lane: u8,
}

impl StateWord {
    pub(super) fn pack(&self) -> u64 {
        let [state, flags, lane] = [self.state as u8, self.flags, self.lane].map(u64::from);
        (self.seen & TIME_MASK) << 24 | state << 16 | flags << 8 | lane
    }

    pub(super) fn unpack(word: u64) -> Option<StateWord> {
        let state = FlowState::from_u8((word >> 16) as u8)?;
        Some(StateWord { seen: word >> 24, state, flags: (word >> 8) as u8, lane: word as u8 })
    }

    pub(super) fn replied(&self) -> bool {
        self.flags & FLAG_REPLIED != 0
    }

    pub(super) fn sighted(mut self, packet: &Sighting, hit: &Hit) -> StateWord {
        self.lane = packet.lane;
        if hit.direction == Direction::Reply {
            self.flags |= FLAG_REPLIED;
        }
        self
    }
}

/// Compares a key with both keys of an entry.
pub(super) fn matching(entry: &Entry, sequence: u64, index: u32, key: &PackedKey) -> Option<Hit> {
    let load = |place: usize| entry[place].load(Ordering::Relaxed);
    let tail = load(TAIL);
    let direction = if original_key(entry).same(key) {
        Direction::Original
    } else if reply_key(entry).same(key) {
        Direction::Reply
    } else {
        return None;
    };
    let flow = FlowRef { index, sequence };
    Some(Hit { flow, direction, protocol: protocol(tail), state: load(STATE) })
}

pub(super) fn original_key(entry: &Entry) -> PackedKey {
    key_at(entry, ORIGINAL, entry[TAIL].load(Ordering::Relaxed) & TAIL_MASK)
}

pub(super) fn reply_key(entry: &Entry) -> PackedKey {
    let ports = entry[REPLY_PORTS].load(Ordering::Relaxed) & 0xffff_ffff_0000_0000;
    key_at(entry, REPLY, ports | entry[TAIL].load(Ordering::Relaxed) & 0xffff_0000)
}

fn key_at(entry: &Entry, place: usize, tail: u64) -> PackedKey {
    let load = |n: usize| entry[place + n].load(Ordering::Relaxed);
    PackedKey { source: [load(0), load(1)], destination: [load(2), load(3)], tail }
}

pub(super) fn unpack_peer(reply_ports: u64) -> Option<PeerId> {
    (reply_ports as u32).checked_sub(1).map(PeerId)
}

#[expect(clippy::too_many_arguments, reason = "one call; a struct of these would only repeat them")]
pub(super) fn write(
    entry: &Entry,
    now: u64,
    original: &PackedKey,
    reply: &PackedKey,
    packet: &Sighting,
    translation: Option<&Translation>,
    state: FlowState,
    direction: Direction,
) -> u64 {
    let mut flags = 0;
    for (flag, set) in [
        (FLAG_REPLIED, direction == Direction::Reply),
        (FLAG_FROM_PEER, is_from_peer(packet, direction)),
        (FLAG_TRANSLATED, translation.is_some()),
    ] {
        flags |= if set { flag } else { 0 };
    }
    let peer = packet.peer.map_or(0, |peer| u64::from(peer.0) + 1);
    let target = translation.map_or(0, |t| u64::from(t.service) << 32 | u64::from(t.endpoint));
    let state = StateWord { seen: now, state, flags, lane: packet.lane };
    let [a, b] = original.source;
    let [c, d] = original.destination;
    let [e, f] = reply.source;
    let [g, h] = reply.destination;
    let tail = original.tail | u64::from(packet.owner);
    let ports = reply.tail & 0xffff_ffff_0000_0000 | peer & 0xffff_ffff;
    memory::begin_write(entry);
    let words = [a, b, c, d, tail, e, f, g, h, ports, target, state.pack(), 0, 0, 0];
    for (word, value) in entry[ORIGINAL..].iter().zip(words) {
        word.store(value, Ordering::Relaxed);
    }
    count(entry, direction, packet);
    memory::end_write(entry, (now / 1000) as u32)
}

/// Whether a peer opened the flow of which this is the first packet seen.
pub(super) fn is_from_peer(packet: &Sighting, direction: Direction) -> bool {
    packet.from_peer != (direction == Direction::Reply)
}

pub(super) fn count(entry: &Entry, direction: Direction, packet: &Sighting) {
    let (packets, bytes) = match direction {
        Direction::Original => (u64::from(packet.packets), ORIGINAL_BYTES),
        Direction::Reply => (u64::from(packet.packets) << 32, REPLY_BYTES),
    };
    entry[PACKETS].fetch_add(packets, Ordering::Relaxed);
    entry[bytes].fetch_add(packet.bytes, Ordering::Relaxed);
}

/// Changes a word from `old` to `new`, or says what it is instead.
pub(super) fn exchange(word: &AtomicU64, old: u64, new: u64) -> Result<(), u64> {
    if old == new {
        return Ok(());
    }
    word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).map(|_| ())
}

/// Where packets of a translated flow go, by which Service and to which endpoint; `None` if the entry is that flow's
/// no longer. A part of [`record`], for every burst.
pub(super) fn translation(entry: &Entry, flow: FlowRef, direction: Direction) -> Option<(FlowKey, u32, u32)> {
    let (key, target) = memory::read_entry(entry, |entry, sequence| {
        let key = match direction {
            Direction::Original => reply_key(entry),
            Direction::Reply => original_key(entry),
        };
        (sequence == flow.sequence).then(|| (key, entry[TARGET].load(Ordering::Relaxed)))
    })??;
    Some((key.reversed().unpack()?, (target >> 32) as u32, target as u32))
}

/// Reads a whole entry; `expires` is still the time at which it was seen last. `None` if it is free, damaged, or
/// kept by a writer.
pub(super) fn record(entry: &Entry, index: u32) -> Option<FlowRecord> {
    let (sequence, original, reply, words) = memory::read_entry(entry, |entry, sequence| {
        let words: [u64; ENTRY] = std::array::from_fn(|n| entry[n].load(Ordering::Relaxed));
        (sequence, original_key(entry), reply_key(entry), words)
    })?;
    let state = StateWord::unpack(words[STATE])?;
    let (target, packets) = (words[TARGET], words[PACKETS]);
    Some(FlowRecord {
        flow: FlowRef { index, sequence },
        original: original.unpack()?,
        reply: reply.unpack()?,
        state: state.state,
        replied: state.replied(),
        from_peer: state.flags & FLAG_FROM_PEER != 0,
        peer: unpack_peer(words[REPLY_PORTS]),
        lane: state.lane,
        owner: words[TAIL] as u16,
        target: (state.flags & FLAG_TRANSLATED != 0).then_some(((target >> 32) as u32, target as u32)),
        created: (sequence >> 32) as u32,
        seen: state.seen,
        expires: state.seen,
        packets: [packets as u32, (packets >> 32) as u32],
        bytes: [words[ORIGINAL_BYTES], words[REPLY_BYTES]],
    })
}
