//! The flow table: every flow that crosses this node's tunnel, both directions, in fixed-size plain data.
//!
//! A lane asks once per burst ([`FlowTable::lookup`]), and enters what is new ([`FlowTable::insert`]):
//!
//! 1. hash the packet's key (the same for both directions) to a bucket of the index;
//! 2. each slot with the hash's tag names an entry: compare its original and its reply key;
//! 3. hit: step the state, note the time, count;
//! 4. miss: take a free entry, or one that is worth less, write it, put it into the index.
//!
//! Lanes share the table and never wait for each other. A hit writes single words; what must be read
//! together (keys, targets) is written once, guarded by the entry's sequence word. Only insertion locks a
//! bucket, and who finds it locked lets the packet go untracked ([`Untracked::Busy`]) instead of waiting.
//!
//! The memory may be a mapped file ([`FlowMemory::Shared`]): after a SIGKILL [`FlowTable::attach`] finds
//! all flows again, throws away what was half written and rebuilds the index.
//!
//! A full table gives up, of the flows it happens to look at, an unanswered one first, then one that is
//! over, then one that was answered, the oldest each. An established flow goes only when it has been silent
//! for [`IDLE_ENOUGH`]; else the newcomer is refused ([`Untracked::Full`]), as Linux does it.
//! Time is in milliseconds since boot, so that it means the same to the next process.

mod entry;
mod flow;
mod key;
mod memory;
mod rebuild;
mod room;
mod state;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

pub use flow::{FlowCounters, FlowRecord, FlowRef, Rewrite, Sighting, Tracked, Translation, Untracked};
pub use key::{FlowKey, Seed};
pub use memory::{AttachError, BYTES_PER_FLOW, FlowMemory, MAX_CAPACITY};
pub use state::{Direction, FlowState, Stage, Timeouts};

use entry::{FLAG_FROM_PEER, FLAG_TRANSLATED, Hit, StateWord, count, exchange, matching, unpack_peer, write};
use key::PackedKey;
use memory::{Entry, Layout, Slab, head, shard};
use room::slot_index;
use state::{LiveTimeouts, Step};

/// Silence (ms) after which a full table may give up an established flow: as long as kube-proxy lets a
/// half-closed connection be silent (its --conntrack-tcp-timeout-close-wait, one hour).
pub const IDLE_ENOUGH: u64 = 3_600_000;

/// Of the whole table, how much one local pod may have: a quarter. Its flood then costs itself.
const QUOTA_SHARE: u32 = 4;
/// A UDP flow that is answered for this long is a stream. Linux says two seconds
/// (net/netfilter/nf_conntrack_proto_udp.c); ours is counted in whole ones.
const STREAM_AFTER: u64 = 3;
/// Tries to change a state word that another lane changes at the same time; what the other wrote will do.
const STATE_TRIES: usize = 4;
/// Entries that one [`FlowTable::page`] looks at.
const PAGE: u32 = 65_536;

/// The flow table.
pub struct FlowTable {
    slab: Slab,
    seed: Seed,
    timeouts: LiveTimeouts,
    /// How many entries each owner has.
    owned: Box<[AtomicU32]>,
    quota: u32,
}

impl FlowTable {
    /// Words of memory for `capacity` flows.
    pub fn words_for(capacity: u32) -> usize {
        Layout::for_capacity(capacity).words
    }

    /// The flows to make room for on a machine with this much memory: a 256th of it, within reason.
    pub fn default_capacity(memory_bytes: u64) -> u32 {
        (memory_bytes / 256 / BYTES_PER_FLOW as u64).clamp(1 << 16, 1 << 20) as u32
    }

    /// Makes an empty table. `epoch` names the boot that time is counted from. The seed may be a new one
    /// each time a process starts; it is not kept in the memory.
    pub fn create(
        memory: FlowMemory,
        capacity: u32,
        epoch: u64,
        seed: Seed,
        timeouts: Timeouts,
    ) -> Result<FlowTable, AttachError> {
        Ok(FlowTable::over(Slab::create(memory, capacity, epoch)?, seed, timeouts))
    }

    /// A table in memory of its own, for tests and simulations.
    pub fn in_memory(capacity: u32, seed: Seed) -> Result<FlowTable, AttachError> {
        let memory = FlowMemory::owned(FlowTable::words_for(capacity));
        FlowTable::create(memory, capacity, 0, seed, Timeouts::KERNEL)
    }

    /// Takes over the table of a process that is gone (the caller makes sure of that), flows and all.
    pub fn attach(
        memory: FlowMemory,
        now: u64,
        epoch: u64,
        seed: Seed,
        timeouts: Timeouts,
    ) -> Result<FlowTable, AttachError> {
        let table = FlowTable::over(Slab::attach(memory, epoch)?, seed, timeouts);
        table.rebuild(now);
        Ok(table)
    }

    fn over(slab: Slab, seed: Seed, timeouts: Timeouts) -> FlowTable {
        let quota = (slab.layout().capacity() / QUOTA_SHARE).max(1);
        let owned = std::iter::repeat_with(AtomicU32::default).take(1 << 16).collect();
        FlowTable { slab, seed, timeouts: LiveTimeouts::new(timeouts), owned, quota }
    }

    /// From now on flows live so long.
    pub fn set_timeouts(&self, timeouts: &Timeouts) {
        self.timeouts.set(timeouts);
    }

    /// Finds or makes the flow of a burst and brings it up to date.
    #[cfg(test)]
    fn track(&self, now: u64, packet: &Sighting) -> Result<Tracked, Untracked> {
        if let Some(tracked) = self.lookup(now, packet)? {
            return Ok(tracked);
        }
        match self.insert(now, packet, None) {
            // Another lane has made it since.
            Err(Untracked::Taken) => self.lookup(now, packet)?.ok_or(Untracked::Busy),
            result => result,
        }
    }

    /// Finds the flow of a burst and brings it up to date; `Ok(None)` if there is none (any more).
    pub fn lookup(&self, now: u64, packet: &Sighting) -> Result<Option<Tracked>, Untracked> {
        let key = PackedKey::new(&packet.key);
        match self.probe(&key, key.hash(self.seed)) {
            Probe::Hit(hit) => self.touch(now, packet, &hit),
            Probe::Miss => Ok(None),
            Probe::Busy => Err(self.busy()),
        }
    }

    /// What is known of the flow that a packet with this key belongs to, which is no sighting of it: the
    /// packet is one that speaks about the flow, or one that is sighted later.
    pub fn peek(&self, now: u64, key: &FlowKey) -> Option<Tracked> {
        let key = PackedKey::new(key);
        let Probe::Hit(hit) = self.probe(&key, key.hash(self.seed)) else { return None };
        let state = StateWord::unpack(hit.state)?;
        if self.life_end(&state, hit.protocol) <= now {
            return None;
        }
        self.tracked(&hit, self.slab.entry(hit.flow.index)?, &state).ok()
    }

    /// Makes the flow of a burst that [`FlowTable::lookup`] did not find. With a translation, which only a
    /// packet that opens a connection can have, its replies' key is taken too.
    pub fn insert(
        &self,
        now: u64,
        packet: &Sighting,
        translation: Option<&Translation>,
    ) -> Result<Tracked, Untracked> {
        let (state, direction) = self.opening(packet, translation.is_some())?;
        let original = match direction {
            Direction::Original => PackedKey::new(&packet.key),
            Direction::Reply => PackedKey::new(&packet.key.reversed()),
        };
        let reply = translation.map_or(original.reversed(), |t| PackedKey::new(&t.reply));
        if packet.owner != 0 && self.owned_by(packet.owner) >= self.quota {
            return Err(Untracked::Quota);
        }
        let (hash, reply_hash) = (original.hash(self.seed), reply.hash(self.seed));
        let (home, away) = (self.slab.bucket_of(hash), self.slab.bucket_of(reply_hash));

        let _home = self.lock(home)?;
        let _away = if away == home { None } else { Some(self.lock(away)?) };
        // Also the reply key of a plain flow, whose hash is the same: a translated one may have it.
        self.vacant(now, &original, hash)?;
        self.vacant(now, &reply, reply_hash)?;

        let shard = self.slab.shard_of_bucket(home);
        let full = || {
            self.slab.shard(shard, shard::FULL).fetch_add(1, Ordering::Relaxed);
            Untracked::Full
        };
        let index = self.take(now, shard, hash).ok_or_else(full)?;
        let entry = self.slab.entry(index).ok_or(Untracked::Full)?;
        // Counted first: as soon as it is written, another lane in need of room may take it away again.
        self.slab.shard(shard, shard::LIVE).fetch_add(1, Ordering::Relaxed);
        self.slab.shard(shard, shard::CREATED).fetch_add(1, Ordering::Relaxed);
        self.count_owned(packet.owner);
        let sequence = write(entry, now, &original, &reply, packet, translation, state, direction);

        let flow = FlowRef { index, sequence };
        let linked = self.link(now, home, hash, index)
            && (reply_hash == hash || self.link(now, away, reply_hash, index));
        fence(Ordering::SeqCst);
        let ours = entry[entry::SEQUENCE].load(Ordering::Relaxed) == sequence;
        if !linked || !ours {
            self.forget(flow, |_| true);
            // If another lane took the entry before it was in the index, nobody else knows of these slots.
            self.unlink(index, hash);
            self.unlink(index, reply_hash);
            return Err(if ours { full() } else { self.busy() });
        }
        let rewrite =
            translation.map(|t| Rewrite { to: t.reply.reversed(), service: t.service, endpoint: t.endpoint });
        let from_peer = entry::is_from_peer(packet, direction);
        Ok(Tracked { flow, direction, state, new: true, peer: packet.peer, from_peer, rewrite })
    }

    /// Removes a flow; whether it was still there.
    pub fn remove(&self, flow: FlowRef) -> bool {
        self.forget(flow, |_| true)
    }

    /// What is known about a flow; `None` when it is gone.
    pub fn record(&self, flow: FlowRef) -> Option<FlowRecord> {
        self.read_record(flow.index).filter(|record| record.flow == flow)
    }

    /// Appends up to `limit` live flows to `out`, from place `from` on (0 for the first); returns where to go on.
    pub fn page(&self, now: u64, from: u32, limit: usize, out: &mut Vec<FlowRecord>) -> Option<u32> {
        let enough = out.len().saturating_add(limit);
        let capacity = self.slab.layout().capacity();
        for index in from..capacity {
            if out.len() >= enough || index - from >= PAGE {
                return Some(index);
            }
            if self.was_used(index) {
                out.extend(self.read_record(index).filter(|record| record.expires > now));
            }
        }
        None
    }

    /// How many flows a local pod has, by its number.
    pub fn owned_by(&self, owner: u16) -> u32 {
        self.owned[usize::from(owner)].load(Ordering::Relaxed)
    }

    fn count_owned(&self, owner: u16) {
        self.owned[usize::from(owner)].fetch_add(1, Ordering::Relaxed);
    }

    fn count_disowned(&self, owner: u16) {
        self.owned[usize::from(owner)].fetch_sub(1, Ordering::Relaxed);
    }

    /// The counters, summed over the shards.
    pub fn counters(&self) -> FlowCounters {
        let layout = self.slab.layout();
        let head = |place| self.slab.head(place).load(Ordering::Relaxed);
        let sum = |place| (0..layout.shards).map(|n| self.slab.shard(n, place).load(Ordering::Relaxed)).sum();
        FlowCounters {
            capacity: layout.capacity().into(),
            entries: sum(shard::LIVE),
            created: sum(shard::CREATED),
            expired: sum(shard::EXPIRED),
            evicted: sum(shard::EVICTED),
            full: sum(shard::FULL),
            invalid: head(head::INVALID),
            busy: head(head::BUSY),
            recovered: head(head::RECOVERED),
        }
    }

    // --- hit -------------------------------------------------------------------------------------

    fn probe(&self, key: &PackedKey, hash: u64) -> Probe {
        let (_, slots) = self.slab.bucket(self.slab.bucket_of(hash));
        for slot in slots {
            let word = slot.load(Ordering::Acquire);
            let Some(index) = slot_index(word, hash) else { continue };
            let Some(entry) = self.slab.entry(index) else { continue };
            match memory::read_entry(entry, |entry, sequence| matching(entry, sequence, index, key)) {
                Some(Some(hit)) => return Probe::Hit(hit),
                Some(None) => {}
                None => return Probe::Busy,
            }
        }
        Probe::Miss
    }

    fn touch(&self, now: u64, packet: &Sighting, hit: &Hit) -> Result<Option<Tracked>, Untracked> {
        let Some(entry) = self.slab.entry(hit.flow.index) else { return Ok(None) };
        let mut word = hit.state;
        for _ in 0..STATE_TRIES {
            let Some(old) = StateWord::unpack(word) else {
                self.forget(hit.flow, |_| true);
                return Ok(None);
            };
            if self.life_end(&old, hit.protocol) <= now {
                if self.forget(hit.flow, |state| state == word) {
                    self.count_gone(hit.flow.index, shard::EXPIRED);
                }
                return Ok(None);
            }
            let new = match self.step(now, packet, hit, &old) {
                Step::To(state) => StateWord { seen: now.max(old.seen), state, ..old }.sighted(packet, hit),
                Step::Ignore => old,
                Step::Restart => {
                    self.forget(hit.flow, |_| true);
                    return Ok(None);
                }
                Step::Invalid => return Err(self.invalid(old.flags & FLAG_TRANSLATED != 0)),
            };
            match exchange(&entry[entry::STATE], word, new.pack()) {
                Ok(()) => {
                    count(entry, hit.direction, packet);
                    return self.tracked(hit, entry, &new).map(Some);
                }
                // The flow may even have made room for another one.
                Err(_) if entry[entry::SEQUENCE].load(Ordering::Acquire) != hit.flow.sequence => break,
                Err(changed) => word = changed,
            }
        }
        // Other lanes change it all the time; what they write will do.
        let whole = entry[entry::SEQUENCE].load(Ordering::Acquire) == hit.flow.sequence;
        match StateWord::unpack(word).filter(|_| whole) {
            Some(state) => self.tracked(hit, entry, &state).map(Some),
            None => Err(self.busy()),
        }
    }

    fn step(&self, now: u64, packet: &Sighting, hit: &Hit, old: &StateWord) -> Step {
        if hit.protocol == state::TCP {
            return state::tcp_step(old.state, hit.direction, packet.tcp_flags);
        }
        let replied = old.replied() || hit.direction == Direction::Reply;
        let created = hit.flow.sequence >> 32;
        let streams = hit.protocol == state::UDP && old.replied() && now / 1000 >= created + STREAM_AFTER;
        Step::To(match (replied, streams) {
            (false, _) => FlowState::Unreplied,
            (true, false) => FlowState::Replied,
            (true, true) => FlowState::Stream,
        })
    }

    fn tracked(&self, hit: &Hit, entry: &Entry, state: &StateWord) -> Result<Tracked, Untracked> {
        let rewrite = if state.flags & FLAG_TRANSLATED == 0 {
            None
        } else {
            // A translated flow without its translation is worse than none: a flow that was replaced since it
            // was matched must not send these packets to a stranger.
            let found = entry::translation(entry, hit.flow, hit.direction);
            let (to, service, endpoint) = found.ok_or_else(|| self.busy())?;
            Some(Rewrite { to, service, endpoint })
        };
        let peer = unpack_peer(entry[entry::REPLY_PORTS].load(Ordering::Relaxed));
        Ok(Tracked {
            flow: hit.flow,
            direction: hit.direction,
            state: state.state,
            new: false,
            peer,
            from_peer: state.flags & FLAG_FROM_PEER != 0,
            rewrite,
        })
    }

    fn life_end(&self, state: &StateWord, protocol: u8) -> u64 {
        state.seen + self.timeouts.of(state.state, protocol, state.replied())
    }

    // --- insert ----------------------------------------------------------------------------------

    fn opening(&self, packet: &Sighting, translated: bool) -> Result<(FlowState, Direction), Untracked> {
        if packet.key.protocol != state::TCP {
            return Ok((FlowState::Unreplied, Direction::Original));
        }
        match state::tcp_open(packet.tcp_flags) {
            // Only what opens a connection may choose an endpoint for it.
            Some(opening) if !translated || opening.state == FlowState::SynSent => {
                Ok((opening.state, opening.direction))
            }
            Some(_) | None => Err(self.invalid(translated)),
        }
    }

    /// Whether no living flow has this key.
    fn vacant(&self, now: u64, key: &PackedKey, hash: u64) -> Result<(), Untracked> {
        match self.probe(key, hash) {
            Probe::Hit(hit) => {
                let candidate = self.candidate(hit.flow.index);
                let over = candidate.is_some_and(|candidate| self.expire(now, &candidate));
                if over { Ok(()) } else { Err(Untracked::Taken) }
            }
            Probe::Miss => Ok(()),
            Probe::Busy => Err(self.busy()),
        }
    }

    fn lock(&self, bucket: u32) -> Result<BucketLock<'_>, Untracked> {
        const TRIES: usize = 32;
        let (lock, _) = self.slab.bucket(bucket);
        for _ in 0..TRIES {
            if lock.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Ok(BucketLock(lock));
            }
            std::hint::spin_loop();
        }
        Err(self.busy())
    }

    // --- helpers ---------------------------------------------------------------------------------

    fn read_record(&self, index: u32) -> Option<FlowRecord> {
        let mut record = entry::record(self.slab.entry(index)?, index)?;
        record.expires += self.timeouts.of(record.state, record.original.protocol, record.replied);
        Some(record)
    }

    fn was_used(&self, index: u32) -> bool {
        let shard = self.slab.shard_of(index);
        index - shard * self.slab.layout().per_shard < self.slab.used(shard)
    }

    fn busy(&self) -> Untracked {
        self.slab.head(head::BUSY).fetch_add(1, Ordering::Relaxed);
        Untracked::Busy
    }

    fn invalid(&self, translated: bool) -> Untracked {
        self.slab.head(head::INVALID).fetch_add(1, Ordering::Relaxed);
        Untracked::Invalid { translated }
    }
}

impl std::fmt::Debug for FlowTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowTable").field("counters", &self.counters()).finish_non_exhaustive()
    }
}

enum Probe {
    Hit(Hit),
    Miss,
    Busy,
}

/// Held while a bucket gets a new slot.
struct BucketLock<'a>(&'a AtomicU64);

impl Drop for BucketLock<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}
