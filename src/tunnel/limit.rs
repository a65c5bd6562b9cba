//! How many handshakes one source address may ask for: a limit per source, so that one attacker
//! cannot use up the share of a thousand honest nodes that restart together.

use std::hash::Hasher;
use std::net::IpAddr;
use std::time::Instant;

use siphasher::sip::SipHasher13;

/// Handshakes a source may start per second once its burst is used. The kernel allows 20
/// (drivers/net/wireguard/ratelimiter.c); a NAT hides several nodes with several lanes each.
const PER_SECOND: u32 = 50;
/// How many it may start at once.
const BURST: u32 = 100;
/// Buckets: enough for 5,000 nodes to hardly ever share one. Sources that do share one share its limit.
const BUCKETS: usize = 16_384;

/// Nanoseconds that one handshake costs, and how far a source may go into debt.
const COST: u64 = 1_000_000_000 / PER_SECOND as u64;
const DEPTH: u64 = COST * BURST as u64;

/// A token bucket per source address, in a fixed table keyed by a secret hash.
pub struct SourceLimiter {
    seed: (u64, u64),
    /// The first time it was asked; the buckets count from here.
    start: Option<Instant>,
    /// When each bucket will be empty of debt ("theoretical arrival time" of the GCRA), in nanoseconds.
    /// Zeroes, so that the kernel gives no memory to buckets that nobody uses.
    due: Box<[u64]>,
}

impl std::fmt::Debug for SourceLimiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceLimiter").finish_non_exhaustive()
    }
}

impl SourceLimiter {
    /// A limiter whose hash nobody outside can predict.
    pub fn new(seed: (u64, u64)) -> SourceLimiter {
        SourceLimiter { seed, start: None, due: vec![0; BUCKETS].into_boxed_slice() }
    }

    /// Whether this source may start one more handshake now; if so, it has.
    pub fn allow(&mut self, source: IpAddr, now: Instant) -> bool {
        let start = *self.start.get_or_insert(now);
        let now = now.saturating_duration_since(start).as_nanos() as u64;
        let slot = &mut self.due[bucket(self.seed, source)];
        let due = (*slot).max(now) + COST;
        if due - now > DEPTH {
            return false;
        }
        *slot = due;
        true
    }
}

/// IPv6 sources count by their /64: one host owns all of it.
fn bucket(seed: (u64, u64), source: IpAddr) -> usize {
    let mut hasher = SipHasher13::new_with_keys(seed.0, seed.1);
    match source {
        IpAddr::V4(a) => hasher.write(&a.octets()),
        IpAddr::V6(a) => hasher.write(&a.octets()[..8]),
    }
    hasher.finish() as usize % BUCKETS
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    /// Tests begin at some instant; which one does not matter.
    fn start() -> Instant {
        #[allow(clippy::disallowed_methods)] // a test's starting point, not a clock in the code
        Instant::now()
    }

    #[test]
    fn one_source_is_limited_and_recovers_while_others_go_on() {
        let mut limiter = SourceLimiter::new((1, 2));
        let now = start();
        let attacker = IpAddr::from([203, 0, 113, 9]);
        let allowed = (0..10_000).filter(|_| limiter.allow(attacker, now)).count();
        assert_eq!(allowed, BURST as usize);
        let honest =
            (0..1_000u32).filter(|i| limiter.allow(Ipv4Addr::from(0x0a00_0000 + i).into(), now)).count();
        assert!(honest >= 999, "{honest} of 1000 honest nodes");
        let later = now + Duration::from_secs(1);
        let again = (0..10_000).filter(|_| limiter.allow(attacker, later)).count();
        assert_eq!(again, PER_SECOND as usize);
    }

    #[test]
    fn an_ipv6_host_is_its_64() {
        let mut limiter = SourceLimiter::new((3, 4));
        let now = start();
        let allowed = (0..1000u128)
            .filter(|i| limiter.allow(std::net::Ipv6Addr::from((0x2001_0db8u128 << 96) | i).into(), now))
            .count();
        assert_eq!(allowed, BURST as usize);
    }
}
