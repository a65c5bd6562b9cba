//! Making room: the index's slots, entries that are free, and those that are worth less than a newcomer.

use std::sync::atomic::{Ordering, fence};

use super::entry::{self, StateWord, exchange, original_key, reply_key};
use super::key::{family, protocol};
use super::memory::{self, head, shard};
use super::state::Rank;
use super::{FlowRef, FlowTable, IDLE_ENOUGH};

/// Entries that a full table looks at to find the one worth least.
const SAMPLE: u32 = 16;
/// And at most, when all so far were worth more than the newcomer.
const SAMPLE_MOST: u32 = 64;
/// An unanswered flow this old (ms) is given up without looking further.
const STALE: u64 = 1_000;
/// A flow whose place someone wants.
pub(super) struct Candidate {
    flow: FlowRef,
    word: u64,
    seen: u64,
    ends: u64,
    rank: Rank,
}

impl Candidate {
    fn idle(&self, now: u64) -> u64 {
        now.saturating_sub(self.seen)
    }

    fn may_go(&self, now: u64) -> bool {
        self.rank < Rank::Established || self.idle(now) >= IDLE_ENOUGH
    }

    fn worth(&self) -> (Rank, u64) {
        (self.rank, self.seen)
    }
}

impl FlowTable {
    /// Looks at the next `budget` entries and forgets those that have expired; returns how many.
    pub fn sweep(&self, now: u64, budget: u32) -> u32 {
        let capacity = self.slab.layout().capacity();
        let start = self.slab.head(head::CURSOR).fetch_add(budget.into(), Ordering::Relaxed);
        let mut gone = 0;
        for step in 0..budget.min(capacity) {
            let index = ((start + u64::from(step)) % u64::from(capacity)) as u32;
            if self.was_used(index)
                && let Some(candidate) = self.candidate(index)
                && self.expire(now, &candidate)
            {
                gone += 1;
            }
        }
        gone
    }

    /// A free entry of a shard, if need be one that is given up for it.
    pub(super) fn take(&self, now: u64, shard: u32, hash: u64) -> Option<u32> {
        if let Some(index) = self.slab.take(shard) {
            return Some(index);
        }
        let used = u64::from(self.slab.used(shard).max(1));
        let base = shard * self.slab.layout().per_shard;
        // Places far from each other (by the golden ratio): flows that came together lie together.
        let stride = (used * 633 / 1024) | 1;
        let mut best: Option<Candidate> = None;
        for step in 0..u64::from(SAMPLE_MOST) {
            if best.is_some() && step >= u64::from(SAMPLE) {
                break;
            }
            let place = ((hash & 0xffff_ffff) + step * stride) % used;
            let Some(candidate) = self.candidate(base + place as u32) else { continue };
            if self.expire(now, &candidate) {
                return self.slab.take(shard);
            }
            let stale = candidate.rank == Rank::HalfOpen && candidate.idle(now) >= STALE;
            if candidate.may_go(now) && best.as_ref().is_none_or(|best| candidate.worth() < best.worth()) {
                best = Some(candidate);
            }
            if stale {
                break;
            }
        }
        self.evict(&best?).then(|| self.slab.take(shard)).flatten()
    }

    /// Puts an entry into a bucket whose lock we hold; if it is full, its least flow goes.
    pub(super) fn link(&self, now: u64, bucket: u32, hash: u64, index: u32) -> bool {
        let (_, slots) = self.slab.bucket(bucket);
        let word = slot_word(index, hash);
        let put = || {
            let free = slots.iter().find(|slot| slot.load(Ordering::Relaxed) == 0);
            free.inspect(|slot| slot.store(word, Ordering::Release)).is_some()
        };
        if put() {
            return true;
        }
        let victim = slots
            .iter()
            .filter_map(|slot| (slot.load(Ordering::Relaxed) as u32).checked_sub(1))
            .filter(|other| *other != index)
            .filter_map(|other| self.candidate(other))
            .filter(|candidate| candidate.may_go(now))
            .min_by_key(Candidate::worth);
        victim.is_some_and(|victim| self.evict(&victim)) && put()
    }

    /// A flow in this entry, as someone who wants its place sees it.
    pub(super) fn candidate(&self, index: u32) -> Option<Candidate> {
        let entry = self.slab.entry(index)?;
        let (sequence, tail, word) = memory::read_entry(entry, |entry, sequence| {
            let load = |place: usize| entry[place].load(Ordering::Relaxed);
            (sequence, load(entry::TAIL), load(entry::STATE))
        })?;
        if family(tail) == 0 {
            return None;
        }
        let state = StateWord::unpack(word)?;
        let ends = self.life_end(&state, protocol(tail));
        let rank = state.state.rank(state.replied());
        Some(Candidate { flow: FlowRef { index, sequence }, word, seen: state.seen, ends, rank })
    }

    pub(super) fn expire(&self, now: u64, candidate: &Candidate) -> bool {
        let gone = candidate.ends <= now && self.forget(candidate.flow, |word| word == candidate.word);
        if gone {
            self.count_gone(candidate.flow.index, shard::EXPIRED);
        }
        gone
    }

    fn evict(&self, candidate: &Candidate) -> bool {
        let gone = self.forget(candidate.flow, |word| word == candidate.word);
        if gone {
            self.count_gone(candidate.flow.index, shard::EVICTED);
        }
        gone
    }

    /// Takes a flow out of the index and frees its entry, if it is still that flow and its state word still passes.
    pub(super) fn forget(&self, flow: FlowRef, still: impl FnOnce(u64) -> bool) -> bool {
        let Some(entry) = self.slab.entry(flow.index) else { return false };
        if flow.sequence & 1 != 0 || !memory::claim(entry, flow.sequence) {
            return false;
        }
        // Free entries have sequences that no reference ever had; but nothing depends on it.
        if family(entry[entry::TAIL].load(Ordering::Relaxed)) == 0
            || !still(entry[entry::STATE].load(Ordering::Relaxed))
        {
            memory::unclaim(entry, flow.sequence);
            return false;
        }
        // Whoever puts this entry into a slot after we have looked there sees our claim (see `insert`).
        fence(Ordering::SeqCst);
        for key in [original_key(entry), reply_key(entry)] {
            self.unlink(flow.index, key.hash(self.seed));
        }
        let owner = entry[entry::TAIL].swap(0, Ordering::Relaxed) as u16;
        self.count_disowned(owner);
        memory::end_write(entry, 0);
        self.slab.shard(self.slab.shard_of(flow.index), shard::LIVE).fetch_sub(1, Ordering::Relaxed);
        self.slab.give_back(flow.index);
        true
    }

    /// Takes an entry out of the bucket of a hash.
    pub(super) fn unlink(&self, index: u32, hash: u64) {
        let word = slot_word(index, hash);
        for slot in self.slab.bucket(self.slab.bucket_of(hash)).1 {
            if slot.load(Ordering::Relaxed) == word {
                // Nobody can put the same word in again before the entry is free.
                let _ = exchange(slot, word, 0);
            }
        }
    }

    pub(super) fn count_gone(&self, index: u32, place: usize) {
        self.slab.shard(self.slab.shard_of(index), place).fetch_add(1, Ordering::Relaxed);
    }
}

/// What a slot holds: the tag, the lower half of the hash, and the entry's number + 1.
fn slot_word(index: u32, hash: u64) -> u64 {
    (hash & 0xffff_ffff) << 32 | u64::from(index + 1)
}

/// The entry that a slot names, if its tag is the hash's.
pub(super) fn slot_index(word: u64, hash: u64) -> Option<u32> {
    if (word >> 32) as u32 == hash as u32 { (word as u32).checked_sub(1) } else { None }
}
