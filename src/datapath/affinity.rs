//! Which endpoint a client of a Service with `sessionAffinity: ClientIP` had last.
//!
//! Plain words, as the flow table's ([`super::conntrack`]), so that a mapped file can hold them: the next
//! agent finds them after a SIGKILL. Buckets of eight entries; in a full bucket the one unused for longest
//! goes. Lanes share the table without waiting: an entry that another lane is writing counts as not there.

use std::hash::Hasher as _;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use siphasher::sip::SipHasher13;

use super::conntrack::{FlowMemory, Seed};
use crate::snapshot::service::Endpoint;

/// Words of an entry: a cache line.
const ENTRY: usize = 8;
const BUCKET: usize = 8;
const HEADER: usize = 8;
/// "WARRENA" and the version of the layout.
const MAGIC: u64 = u64::from_be_bytes(*b"WARRENA\x01");
/// Time within an entry: 40 bits of milliseconds, 34 years.
const TIME_MASK: u64 = (1 << 40) - 1;

/// Places in an entry. The first: sequence 24 (odd while it is being written), last use in ms 40.
const STAMP: usize = 0;
/// Service 32, port 16, family 8 (0: free).
const TAIL: usize = 1;
const CLIENT: usize = 2;
const ADDRESS: usize = 4;

/// The table.
pub struct Affinity {
    memory: FlowMemory,
    buckets: usize,
    seed: Seed,
}

impl Affinity {
    /// Words of memory for at least `clients` clients.
    pub const fn words_for(clients: usize) -> usize {
        HEADER + clients.div_ceil(BUCKET) * BUCKET * ENTRY
    }

    /// A table in memory of its own.
    pub fn in_memory(clients: usize) -> Affinity {
        Affinity::open(FlowMemory::owned(Affinity::words_for(clients)), 0, Seed(0, 0))
    }

    /// Takes the memory as a process of the same boot (`epoch`) left it, or begins anew. `seed` is used for a
    /// new table only; an old one keeps its own, or nothing in it would be found.
    pub fn open(memory: FlowMemory, epoch: u64, seed: Seed) -> Affinity {
        let buckets = memory.len().saturating_sub(HEADER) / (BUCKET * ENTRY);
        let header = |at: usize| memory.get(at).map_or(0, |word| word.load(Ordering::Relaxed));
        let known = header(0) == MAGIC && header(1) == epoch && header(2) == buckets as u64;
        let seed = if known { Seed(header(3), header(4)) } else { seed };
        if known {
            // What a killed process left half written is free.
            for entry in memory[HEADER..].chunks_exact(ENTRY) {
                let stamp = entry[STAMP].load(Ordering::Relaxed);
                if is_written(stamp) {
                    entry[TAIL].store(0, Ordering::Relaxed);
                    entry[STAMP].store(0, Ordering::Relaxed);
                }
            }
        } else {
            memory.iter().for_each(|word| word.store(0, Ordering::Relaxed));
            for (at, value) in [(1, epoch), (2, buckets as u64), (3, seed.0), (4, seed.1), (0, MAGIC)] {
                if let Some(word) = memory.get(at) {
                    word.store(value, Ordering::Release);
                }
            }
        }
        Affinity { memory, buckets, seed }
    }

    /// The client's endpoint, if it was used within the last `seconds`.
    pub fn find(&self, now: u64, service: u32, client: IpAddr, seconds: u32) -> Option<Endpoint> {
        let mut found = None;
        for entry in self.bucket(service, client) {
            let stamp = entry[STAMP].load(Ordering::Acquire);
            let words: [u64; ENTRY] = std::array::from_fn(|n| entry[n].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            let whole = !is_written(stamp) && entry[STAMP].load(Ordering::Relaxed) == stamp;
            if whole && is_of(&words, service, client) {
                let used = stamp & TIME_MASK;
                let fresh = now.saturating_sub(used) <= u64::from(seconds) * 1000;
                found = fresh.then(|| endpoint(&words, client)).flatten();
                break;
            }
        }
        found
    }

    /// The client uses this endpoint now.
    pub fn note(&self, now: u64, service: u32, client: IpAddr, endpoint: Endpoint) {
        // Its own entry, a free one, or the one unused for longest.
        let mut best: Option<(u64, &[AtomicU64], u64)> = None;
        for entry in self.bucket(service, client) {
            let stamp = entry[STAMP].load(Ordering::Acquire);
            if is_written(stamp) {
                continue;
            }
            let words: [u64; ENTRY] = std::array::from_fn(|n| entry[n].load(Ordering::Relaxed));
            let worth = match words[TAIL] {
                _ if is_of(&words, service, client) => 0,
                0 => 1,
                _ => 2 + (stamp & TIME_MASK),
            };
            if best.is_none_or(|(least, _, _)| worth < least) {
                best = Some((worth, entry, stamp));
            }
        }
        let Some((_, entry, stamp)) = best else { return };
        let odd = stamp.wrapping_add(1 << 40);
        if entry[STAMP].compare_exchange(stamp, odd, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return;
        }
        fence(Ordering::Release);
        let family = if client.is_ipv4() { 4 } else { 6 };
        let [a, b] = pack(client);
        let [c, d] = pack(endpoint.address);
        let tail = u64::from(service) << 32 | u64::from(endpoint.port) << 16 | family;
        for (place, value) in [(TAIL, tail), (CLIENT, a), (CLIENT + 1, b), (ADDRESS, c), (ADDRESS + 1, d)] {
            entry[place].store(value, Ordering::Relaxed);
        }
        let even = (odd.wrapping_add(1 << 40) & !TIME_MASK) | (now & TIME_MASK);
        entry[STAMP].store(even, Ordering::Release);
    }

    fn bucket(&self, service: u32, client: IpAddr) -> impl Iterator<Item = &[AtomicU64]> {
        let mut hasher = SipHasher13::new_with_keys(self.seed.0, self.seed.1);
        hasher.write_u32(service);
        let [a, b] = pack(client);
        hasher.write_u64(a);
        hasher.write_u64(b);
        let bucket = ((u128::from(hasher.finish()) * self.buckets as u128) >> 64) as usize;
        let from = HEADER + bucket * BUCKET * ENTRY;
        self.memory.get(from..from + BUCKET * ENTRY).unwrap_or_default().chunks_exact(ENTRY)
    }
}

impl std::fmt::Debug for Affinity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Affinity").field("buckets", &self.buckets).finish_non_exhaustive()
    }
}

fn is_written(stamp: u64) -> bool {
    stamp >> 40 & 1 == 1
}

fn is_of(words: &[u64; ENTRY], service: u32, client: IpAddr) -> bool {
    let family = if client.is_ipv4() { 4 } else { 6 };
    words[TAIL] >> 32 == u64::from(service)
        && words[TAIL] & 0xff == family
        && [words[CLIENT], words[CLIENT + 1]] == pack(client)
}

fn endpoint(words: &[u64; ENTRY], client: IpAddr) -> Option<Endpoint> {
    let bits = u128::from(words[ADDRESS]) << 64 | u128::from(words[ADDRESS + 1]);
    let address = Ipv6Addr::from_bits(bits);
    let address = if client.is_ipv4() { IpAddr::V4(address.to_ipv4_mapped()?) } else { IpAddr::V6(address) };
    Some(Endpoint { address, port: (words[TAIL] >> 16) as u16 })
}

fn pack(address: IpAddr) -> [u64; 2] {
    let bits = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    [(bits >> 64) as u64, bits as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    fn at(text: &str) -> Endpoint {
        Endpoint { address: ip(text), port: 8080 }
    }

    #[test]
    fn a_client_keeps_its_endpoint_until_its_time_is_over() {
        let table = Affinity::in_memory(64);
        for (client, first, second) in
            [("192.0.2.1", "10.244.0.5", "10.244.1.5"), ("2001:db8::1", "fd00::5", "fd00:1::5")]
        {
            assert_eq!(table.find(1_000, 7, ip(client), 10), None);
            table.note(1_000, 7, ip(client), at(first));
            assert_eq!(table.find(11_000, 7, ip(client), 10), Some(at(first)));
            assert_eq!(table.find(11_001, 7, ip(client), 10), None);
            assert_eq!(table.find(1_000, 8, ip(client), 10), None, "another Service");
            table.note(11_000, 7, ip(client), at(first));
            assert_eq!(table.find(20_000, 7, ip(client), 10), Some(at(first)), "each use renews it");
            table.note(20_000, 7, ip(client), at(second));
            assert_eq!(table.find(20_000, 7, ip(client), 10), Some(at(second)));
        }
    }

    #[test]
    fn a_full_table_forgets_who_was_silent_for_longest() {
        let table = Affinity::in_memory(8); // one bucket
        let client = |n: u8| IpAddr::from([192, 0, 2, n]);
        for n in 0..8 {
            table.note(1_000 + u64::from(n), 7, client(n), at("10.244.0.5"));
        }
        table.note(2_000, 7, client(0), at("10.244.0.5"));
        table.note(3_000, 7, client(100), at("10.244.0.6"));
        assert_eq!(table.find(3_000, 7, client(1), 60), None);
        for n in [0, 2, 3, 4, 5, 6, 7] {
            assert_eq!(table.find(3_000, 7, client(n), 60), Some(at("10.244.0.5")), "{n}");
        }
        assert_eq!(table.find(3_000, 7, client(100), 60), Some(at("10.244.0.6")));
    }

    #[test]
    fn the_next_process_finds_it_and_the_next_boot_does_not() {
        let words: &'static [AtomicU64] = Box::leak(
            std::iter::repeat_with(AtomicU64::default).take(Affinity::words_for(64)).collect::<Box<[_]>>(),
        );
        let open = |epoch, seed| Affinity::open(FlowMemory::Shared(words), epoch, Seed(seed, seed));
        let client = ip("192.0.2.1");
        open(1, 10).note(1_000, 7, client, at("10.244.0.5"));
        let second = open(1, 20);
        assert_eq!(second.find(1_000, 7, client, 60), Some(at("10.244.0.5")));
        // Killed while it wrote.
        for entry in
            words[HEADER..].chunks_exact(ENTRY).filter(|entry| entry[TAIL].load(Ordering::Relaxed) != 0)
        {
            entry[STAMP].fetch_add(1 << 40, Ordering::Relaxed);
        }
        assert_eq!(second.find(1_000, 7, client, 60), None);
        let third = open(1, 30);
        assert_eq!(third.find(1_000, 7, client, 60), None);
        third.note(1_000, 7, client, at("10.244.0.6"));
        assert_eq!(third.find(1_000, 7, client, 60), Some(at("10.244.0.6")));
        assert_eq!(open(2, 40).find(1_000, 7, client, 60), None);
    }

    #[test]
    fn lanes_at_the_same_entry_never_mix_endpoints() {
        let table = Affinity::in_memory(8);
        let client = ip("192.0.2.1");
        let known = [at("10.244.0.5"), Endpoint { address: ip("10.244.77.99"), port: 9 }];
        std::thread::scope(|scope| {
            for mine in known {
                let table = &table;
                scope.spawn(move || {
                    for _ in 0..20_000 {
                        table.note(1_000, 7, client, mine);
                        if let Some(found) = table.find(1_000, 7, client, 60) {
                            assert!(known.contains(&found), "{found:?}");
                        }
                    }
                });
            }
        });
        assert!(table.find(1_000, 7, client, 60).is_some());
    }
}
