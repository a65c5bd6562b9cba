//! After a kill: what the entries say is true, everything else is made from them again.

use std::sync::atomic::Ordering;

use super::entry::{self, original_key, reply_key};
use super::key::family;
use super::memory::shard;
use super::memory::{self, Entry, head};
use super::{FlowTable, Probe};

impl FlowTable {
    /// Looks through all entries that were ever used: live ones go into a fresh index, the rest becomes free.
    pub(super) fn rebuild(&self, now: u64) {
        for shard in 0..self.slab.layout().shards {
            let base = shard * self.slab.layout().per_shard;
            for index in base..base + self.slab.used(shard) {
                if self.revive(now, index) {
                    self.slab.shard(shard, shard::LIVE).fetch_add(1, Ordering::Relaxed);
                    let tail =
                        self.slab.entry(index).map_or(0, |entry| entry[entry::TAIL].load(Ordering::Relaxed));
                    self.count_owned(tail as u16);
                } else {
                    self.slab.give_back(index);
                }
            }
        }
    }

    fn revive(&self, now: u64, index: u32) -> bool {
        let Some(entry) = self.slab.entry(index) else { return false };
        let torn = entry[entry::SEQUENCE].load(Ordering::Relaxed) & 1 != 0;
        let free = family(entry[entry::TAIL].load(Ordering::Relaxed)) == 0;
        if free && !torn {
            return false;
        }
        let whole = (!torn).then(|| self.read_record(index)).flatten().filter(|record| record.seen <= now);
        let alive = whole.as_ref().is_some_and(|record| record.expires > now);
        if alive && self.relink(now, index, entry) {
            return true;
        }
        if whole.is_none() {
            self.slab.head(head::RECOVERED).fetch_add(1, Ordering::Relaxed);
        }
        memory::begin_write(entry);
        entry[entry::TAIL].store(0, Ordering::Relaxed);
        memory::end_write(entry, 0);
        false
    }

    fn relink(&self, now: u64, index: u32, entry: &Entry) -> bool {
        let (original, reply) = (original_key(entry), reply_key(entry));
        let (hash, reply_hash) = (original.hash(self.seed), reply.hash(self.seed));
        let free = |hash| {
            let (_, slots) = self.slab.bucket(self.slab.bucket_of(hash));
            slots.iter().filter(|slot| slot.load(Ordering::Relaxed) == 0).count() >= 2
        };
        let alone = [(&original, hash), (&reply, reply_hash)]
            .into_iter()
            .all(|(key, hash)| matches!(self.probe(key, hash), Probe::Miss) && free(hash));
        alone
            && self.link(now, self.slab.bucket_of(hash), hash, index)
            && (reply_hash == hash || self.link(now, self.slab.bucket_of(reply_hash), reply_hash, index))
    }
}
