//! The table's memory: plain words, no pointers, so that it can be a shared file that outlives a killed agent.
//!
//! ```text
//! header   what the rest means, and a checksum of that
//! shards   per shard: free list, how many entries were ever used, counters
//! index    buckets of 16 words: a lock for insertions, 15 slots of (tag, entry number + 1)
//! entries  16 words each; a shard hands out its own range of them
//! ```
//!
//! Everything but the entries is derived from the entries, and rebuilt when the memory is attached.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use siphasher::sip::SipHasher24;
use thiserror::Error;

use super::entry::{NEXT, SEQUENCE};

/// Words of an entry; two cache lines.
pub(super) const ENTRY: usize = 16;
/// Words of a bucket, the lock included; two cache lines, which the processor fetches as a pair.
pub(super) const BUCKET: usize = 16;
/// A full table of translated flows, two slots each, fills 8 of a bucket's 15 slots on average.
const ENTRIES_PER_BUCKET: usize = 4;
/// Bytes that one flow costs.
pub const BYTES_PER_FLOW: usize = (ENTRY + BUCKET / ENTRIES_PER_BUCKET) * 8;
const _: () = assert!(BYTES_PER_FLOW <= 200);

/// The most flows a table can be made for.
pub const MAX_CAPACITY: u32 = 1 << 28;
const MAX_SHARDS: u32 = 64;
const FLOWS_PER_SHARD: u32 = 4096;

const MAGIC: u64 = u64::from_be_bytes(*b"WARRENFT");
/// Changes whenever an old agent's table would be misread by a new one.
const VERSION: u64 = 1;
const HEADER: usize = 32;
const SHARD: usize = 16;

/// Places in the header.
pub(super) mod head {
    pub(in super::super) const MAGIC: usize = 0;
    /// Version 32, words of an entry 16, words of a bucket 16.
    pub(in super::super) const VERSION: usize = 1;
    pub(in super::super) const SHARDS: usize = 2;
    pub(in super::super) const PER_SHARD: usize = 3;
    pub(in super::super) const BUCKETS: usize = 4;
    pub(in super::super) const EPOCH: usize = 5;
    /// Of the words before it.
    pub(in super::super) const CHECKSUM: usize = 6;
    /// Where the sweeper stands.
    pub(in super::super) const CURSOR: usize = 8;
    pub(in super::super) const INVALID: usize = 9;
    pub(in super::super) const BUSY: usize = 10;
    pub(in super::super) const RECOVERED: usize = 11;
}

/// Places in a shard.
pub(super) mod shard {
    /// Times changed 32, first free entry + 1 32.
    pub(in super::super) const FREE: usize = 0;
    /// How many of its entries were ever used.
    pub(in super::super) const USED: usize = 1;
    pub(in super::super) const LIVE: usize = 2;
    pub(in super::super) const CREATED: usize = 3;
    pub(in super::super) const EXPIRED: usize = 4;
    pub(in super::super) const EVICTED: usize = 5;
    pub(in super::super) const FULL: usize = 6;
}

/// Why memory cannot be used as it is; start afresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AttachError {
    /// Fewer words than the table needs.
    #[error("the flow table's memory holds {have} words, it needs {need}")]
    TooSmall {
        /// Words that there are.
        have: usize,
        /// Words that it takes.
        need: usize,
    },
    /// No table was ever made here, or not to the end.
    #[error("this memory holds no flow table")]
    NoTable,
    /// Made by another version of Warren.
    #[error("the flow table was made by another version (layout {found:#x})")]
    Version {
        /// The header's version word.
        found: u64,
    },
    /// The header is damaged.
    #[error("the flow table's header is damaged")]
    Damaged,
    /// Its clock was another one: the machine was started again in between.
    #[error("the flow table is older than this boot")]
    OtherBoot,
}

/// The words a table lives in.
pub enum FlowMemory {
    /// Shared, for instance a mapped file.
    Shared(&'static [AtomicU64]),
    /// Our own, for tests and simulations.
    Owned(Box<[AtomicU64]>),
}

impl FlowMemory {
    /// Zeroed memory of our own.
    pub fn owned(words: usize) -> FlowMemory {
        FlowMemory::Owned(std::iter::repeat_with(AtomicU64::default).take(words).collect())
    }
}

impl Deref for FlowMemory {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        match self {
            FlowMemory::Shared(words) => words,
            FlowMemory::Owned(words) => words,
        }
    }
}

pub(super) type Entry = [AtomicU64; ENTRY];

/// Memory with its layout; hands out entries, buckets and shards.
pub(super) struct Slab {
    memory: FlowMemory,
    layout: Layout,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) shards: u32,
    pub(super) per_shard: u32,
    pub(super) buckets: u32,
    buckets_at: usize,
    entries_at: usize,
    pub(super) words: usize,
}

impl Layout {
    /// The layout for at least `capacity` flows.
    pub(super) fn for_capacity(capacity: u32) -> Layout {
        let capacity = capacity.clamp(64, MAX_CAPACITY);
        let shards = (capacity / FLOWS_PER_SHARD).next_power_of_two().clamp(1, MAX_SHARDS);
        let per_shard = capacity.div_ceil(shards).next_multiple_of(ENTRIES_PER_BUCKET as u32);
        Layout::new(shards, per_shard, shards * per_shard / ENTRIES_PER_BUCKET as u32)
    }

    fn new(shards: u32, per_shard: u32, buckets: u32) -> Layout {
        let buckets_at = HEADER + shards as usize * SHARD;
        let entries_at = buckets_at + buckets as usize * BUCKET;
        let words = entries_at + shards as usize * per_shard as usize * ENTRY;
        Layout { shards, per_shard, buckets, buckets_at, entries_at, words }
    }

    pub(super) fn capacity(&self) -> u32 {
        self.shards * self.per_shard
    }
}

impl Slab {
    /// Makes an empty table. The magic comes last: a table half made is no table.
    pub(super) fn create(memory: FlowMemory, capacity: u32, epoch: u64) -> Result<Slab, AttachError> {
        let layout = Layout::for_capacity(capacity);
        if memory.len() < layout.words {
            return Err(AttachError::TooSmall { have: memory.len(), need: layout.words });
        }
        let slab = Slab { memory, layout };
        for word in &slab.memory[..HEADER + layout.shards as usize * SHARD] {
            word.store(0, Ordering::Relaxed);
        }
        slab.clear_index();
        let [version, shards, per_shard, buckets] = [
            VERSION << 32 | (ENTRY as u64) << 16 | BUCKET as u64,
            layout.shards.into(),
            layout.per_shard.into(),
            layout.buckets.into(),
        ];
        slab.head(head::VERSION).store(version, Ordering::Relaxed);
        slab.head(head::SHARDS).store(shards, Ordering::Relaxed);
        slab.head(head::PER_SHARD).store(per_shard, Ordering::Relaxed);
        slab.head(head::BUCKETS).store(buckets, Ordering::Relaxed);
        slab.head(head::EPOCH).store(epoch, Ordering::Relaxed);
        slab.head(head::CHECKSUM).store(checksum(&slab.memory), Ordering::Relaxed);
        slab.head(head::MAGIC).store(MAGIC, Ordering::Release);
        Ok(slab)
    }

    /// Takes over a table that another process has left. The entries are still to be looked through.
    pub(super) fn attach(memory: FlowMemory, epoch: u64) -> Result<Slab, AttachError> {
        if memory.len() < HEADER {
            return Err(AttachError::TooSmall { have: memory.len(), need: HEADER });
        }
        let read = |at: usize| memory[at].load(Ordering::Acquire);
        if read(head::MAGIC) != MAGIC {
            return Err(AttachError::NoTable);
        }
        if read(head::VERSION) != VERSION << 32 | (ENTRY as u64) << 16 | BUCKET as u64 {
            return Err(AttachError::Version { found: read(head::VERSION) });
        }
        if read(head::CHECKSUM) != checksum(&memory) {
            return Err(AttachError::Damaged);
        }
        let (shards, per_shard, buckets) = (read(head::SHARDS), read(head::PER_SHARD), read(head::BUCKETS));
        // The checksum is right, but the one who made it may have been wrong: no product here may overflow.
        let sane = (1..=u64::from(MAX_SHARDS)).contains(&shards)
            && (1..=u64::from(MAX_CAPACITY)).contains(&per_shard)
            && shards * per_shard <= 2 * u64::from(MAX_CAPACITY)
            && (1..=2 * u64::from(MAX_CAPACITY)).contains(&buckets);
        if !sane {
            return Err(AttachError::Damaged);
        }
        let layout = Layout::new(shards as u32, per_shard as u32, buckets as u32);
        if memory.len() < layout.words {
            return Err(AttachError::TooSmall { have: memory.len(), need: layout.words });
        }
        if read(head::EPOCH) != epoch {
            return Err(AttachError::OtherBoot);
        }
        let slab = Slab { memory, layout };
        slab.clear_index();
        for number in 0..layout.shards {
            slab.shard(number, shard::FREE).store(0, Ordering::Relaxed);
            slab.shard(number, shard::LIVE).store(0, Ordering::Relaxed);
            slab.shard(number, shard::USED).fetch_min(layout.per_shard.into(), Ordering::Relaxed);
        }
        Ok(slab)
    }

    /// Only written where there is something: untouched pages of a sparse file stay holes as long as they can.
    fn clear_index(&self) {
        for word in &self.memory[self.layout.buckets_at..self.layout.entries_at] {
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn head(&self, place: usize) -> &AtomicU64 {
        &self.memory[place]
    }

    pub(super) fn shard(&self, number: u32, place: usize) -> &AtomicU64 {
        &self.memory[HEADER + number as usize * SHARD + place]
    }

    /// `None` only for a number that no slot of ours holds.
    pub(super) fn entry(&self, index: u32) -> Option<&Entry> {
        let at = self.layout.entries_at + index as usize * ENTRY;
        self.memory.get(at..)?.first_chunk()
    }

    /// The bucket of a hash: its upper half, scaled.
    pub(super) fn bucket_of(&self, hash: u64) -> u32 {
        (((hash >> 32) * u64::from(self.layout.buckets)) >> 32) as u32
    }

    /// The lock and the slots of a bucket.
    pub(super) fn bucket(&self, number: u32) -> (&AtomicU64, &[AtomicU64]) {
        let at = self.layout.buckets_at + number as usize * BUCKET;
        let words = &self.memory[at..at + BUCKET];
        (&words[0], &words[1..])
    }

    /// The shard that gives entries to a bucket.
    pub(super) fn shard_of_bucket(&self, number: u32) -> u32 {
        (u64::from(number) * u64::from(self.layout.shards) / u64::from(self.layout.buckets)) as u32
    }

    /// The shard that an entry belongs to.
    pub(super) fn shard_of(&self, index: u32) -> u32 {
        index / self.layout.per_shard
    }

    /// How many entries of a shard were ever used.
    pub(super) fn used(&self, shard: u32) -> u32 {
        self.shard(shard, shard::USED).load(Ordering::Relaxed) as u32
    }

    /// Takes a free entry; `None` when the shard has none. Nobody else knows it until it is in a slot.
    pub(super) fn take(&self, shard: u32) -> Option<u32> {
        let free = self.shard(shard, shard::FREE);
        let mut first = free.load(Ordering::Acquire);
        while let Some(index) = (first as u32).checked_sub(1) {
            // Read from an entry that another lane may have taken since; then the exchange below fails.
            let next = self.entry(index)?[NEXT].load(Ordering::Relaxed) as u32;
            let changed = list_head(first, next);
            match free.compare_exchange_weak(first, changed, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(index),
                Err(now) => first = now,
            }
        }
        let limit = u64::from(self.layout.per_shard);
        self.shard(shard, shard::USED)
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |used| (used < limit).then_some(used + 1))
            .ok()
            .map(|used| shard * self.layout.per_shard + used as u32)
    }

    /// Gives an entry back. It is in no slot any more and its family is 0.
    pub(super) fn give_back(&self, index: u32) {
        let Some(entry) = self.entry(index) else { return };
        let free = self.shard(self.shard_of(index), shard::FREE);
        let mut first = free.load(Ordering::Relaxed);
        loop {
            entry[NEXT].store(first & 0xffff_ffff, Ordering::Relaxed);
            let changed = list_head(first, index + 1);
            match free.compare_exchange_weak(first, changed, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => first = now,
            }
        }
    }
}

/// A list head with its change count up by one, so that an exchange cannot mistake a head that left and came back.
const fn list_head(old: u64, first: u32) -> u64 {
    ((old >> 32).wrapping_add(1) << 32) | first as u64
}

/// Guards against damage, not against forgers (the file is the agent's own, 0600): the key is fixed.
fn checksum(memory: &[AtomicU64]) -> u64 {
    let mut bytes = [0; head::CHECKSUM * 8];
    // The magic is written after the checksum, so it is left out.
    for (word, out) in memory[head::VERSION..head::CHECKSUM].iter().zip(bytes.chunks_exact_mut(8)) {
        out.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
    }
    SipHasher24::new().hash(&bytes)
}

// --- the sequence word of an entry (a seqlock) ----------------------------------------------------

/// How often a reader looks again while a writer is at work: a few dozen stores. A writer that was put to
/// sleep in between costs the reader this much and no more.
const LOOKS: usize = 64;

/// Reads an entry so that all values belong together; `None` when a writer keeps it.
pub(super) fn read_entry<T>(entry: &Entry, read: impl Fn(&Entry, u64) -> T) -> Option<T> {
    for _ in 0..LOOKS {
        let before = entry[SEQUENCE].load(Ordering::Acquire);
        if before & 1 == 0 {
            let value = read(entry, before);
            fence(Ordering::Acquire);
            if entry[SEQUENCE].load(Ordering::Relaxed) == before {
                return Some(value);
            }
        }
        std::hint::spin_loop();
    }
    None
}

/// Begins to write an entry that nobody else may write (just taken).
pub(super) fn begin_write(entry: &Entry) {
    let sequence = entry[SEQUENCE].load(Ordering::Relaxed);
    entry[SEQUENCE].store(sequence | 1, Ordering::Relaxed);
    fence(Ordering::Release);
}

/// Claims an entry for writing if it is still the one that was read; only one lane can.
pub(super) fn claim(entry: &Entry, sequence: u64) -> bool {
    let claimed = entry[SEQUENCE]
        .compare_exchange(sequence, sequence | 1, Ordering::Acquire, Ordering::Relaxed)
        .is_ok();
    fence(Ordering::Release);
    claimed
}

/// Lets go of a claimed entry that was not changed.
pub(super) fn unclaim(entry: &Entry, sequence: u64) {
    entry[SEQUENCE].store(sequence, Ordering::Release);
}

/// Ends writing; returns the new sequence word.
pub(super) fn end_write(entry: &Entry, created: u32) -> u64 {
    let sequence = (entry[SEQUENCE].load(Ordering::Relaxed) as u32 | 1).wrapping_add(1);
    let word = u64::from(created) << 32 | u64::from(sequence);
    entry[SEQUENCE].store(word, Ordering::Release);
    word
}
