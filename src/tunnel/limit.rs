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

/// Handshakes a second on one lane above which cookies are demanded of all; boringtun's device uses 100.
const BEFORE_COOKIES: u32 = 200;

/// Whether there is time for the expensive part of a handshake.
///
/// When there are too many, or too many from one source, a sender first proves with a cookie that he is where
/// he says. One that has proved it has a share of his own: who forges an honest node's address can use up only
/// the share that needs no proof.
///
/// An answer to a handshake of ours costs as much to check as a question. Honest ones come as often as we ask, so
/// only those that turn out to be forged are counted, and only their sources are asked for a cookie.
#[derive(Debug)]
pub struct HandshakeLimits {
    /// Handshakes.
    begun: PerSecond,
    unproven: SourceLimiter,
    proven: SourceLimiter,
    /// Answers that were forged.
    forged: PerSecond,
    forgers: SourceLimiter,
}

impl HandshakeLimits {
    /// Limits whose hashes nobody outside can predict.
    pub fn new(seed: (u64, u64)) -> HandshakeLimits {
        HandshakeLimits {
            begun: PerSecond::default(),
            unproven: SourceLimiter::new(seed),
            proven: SourceLimiter::new((seed.1, seed.0)),
            forged: PerSecond::default(),
            forgers: SourceLimiter::new((!seed.0, seed.1)),
        }
    }

    /// Counts a handshake; whether it is dealt with without a cookie.
    pub fn allow_unproven(&mut self, source: IpAddr, now: Instant) -> bool {
        let count = self.begun.count(now);
        self.begun.add(now);
        count < BEFORE_COOKIES && self.unproven.allow(source, now)
    }

    /// Whether a handshake that came with a cookie is dealt with.
    pub fn allow_proven(&mut self, source: IpAddr, now: Instant) -> bool {
        self.proven.allow(source, now)
    }

    /// Whether an answer from here is checked without a cookie.
    pub fn trusts_answer(&mut self, source: IpAddr, now: Instant) -> bool {
        self.forged.count(now) < BEFORE_COOKIES && self.forgers.has_room(source, now)
    }

    /// An answer from here was checked in vain.
    pub fn answer_was_forged(&mut self, source: IpAddr, now: Instant) {
        self.forged.add(now);
        self.forgers.allow(source, now);
    }
}

/// How often something happened in the second that began then.
#[derive(Debug, Default)]
struct PerSecond(Option<(Instant, u32)>);

impl PerSecond {
    fn count(&self, now: Instant) -> u32 {
        match self.0 {
            Some((since, count)) if now.saturating_duration_since(since).as_secs() < 1 => count,
            Some(_) | None => 0,
        }
    }

    fn add(&mut self, now: Instant) {
        self.0 = match (self.0, self.count(now)) {
            (Some((since, _)), count @ 1..) => Some((since, count.saturating_add(1))),
            (Some(_) | None, _) => Some((now, 1)),
        };
    }
}

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
        let (slot, due) = self.due_after_one(source, now);
        if let Some(due) = due {
            self.due[slot] = due;
        }
        due.is_some()
    }

    /// Whether it may, without doing it.
    pub fn has_room(&mut self, source: IpAddr, now: Instant) -> bool {
        self.due_after_one(source, now).1.is_some()
    }

    /// The source's bucket, and what it holds after one more handshake if there is room for that.
    fn due_after_one(&mut self, source: IpAddr, now: Instant) -> (usize, Option<u64>) {
        let start = *self.start.get_or_insert(now);
        let now = now.saturating_duration_since(start).as_nanos() as u64;
        let slot = bucket(self.seed, source);
        let due = self.due[slot].max(now) + COST;
        (slot, (due - now <= DEPTH).then_some(due))
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
    fn what_was_forged_in_a_nodes_name_does_not_count_against_its_cookie() {
        let mut limits = HandshakeLimits::new((5, 6));
        let (now, node) = (start(), IpAddr::from([198, 51, 100, 7]));
        let free = (0..10_000).filter(|_| limits.allow_unproven(node, now)).count();
        assert_eq!(free, BURST as usize);
        assert!(!limits.allow_unproven(IpAddr::from([198, 51, 100, 8]), now), "cookies for all");
        assert!(limits.allow_proven(node, now));
        let next = now + Duration::from_secs(1);
        assert!(limits.allow_unproven(IpAddr::from([198, 51, 100, 8]), next));
    }

    #[test]
    fn only_forged_answers_count_against_their_source() {
        let mut limits = HandshakeLimits::new((7, 8));
        let (now, forger) = (start(), IpAddr::from([203, 0, 113, 9]));
        assert!((0..10_000).all(|_| limits.trusts_answer(forger, now)), "asking costs nothing");
        let checked = (0..10_000).take_while(|_| {
            let trusted = limits.trusts_answer(forger, now);
            limits.answer_was_forged(forger, now);
            trusted
        });
        assert_eq!(checked.count(), BURST as usize);
        assert!(limits.trusts_answer(IpAddr::from([198, 51, 100, 7]), now), "others go on");
        // From so many places that none of them stands out: cookies for all until the second is over.
        for host in 0..BEFORE_COOKIES {
            limits.answer_was_forged(Ipv4Addr::from(0x0a00_0000 + host).into(), now);
        }
        assert!(!limits.trusts_answer(IpAddr::from([198, 51, 100, 7]), now));
        assert!(limits.trusts_answer(IpAddr::from([198, 51, 100, 7]), now + Duration::from_secs(1)));
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
