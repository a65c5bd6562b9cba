//! How long a lane that has nothing to do keeps looking before it sleeps.
//!
//! Being woken is most of a short round trip: 100 us of looking, with a yield in between, brings it below that of
//! kernel VXLAN. But whoever looks takes time from others, so a lane looks only where that pays off:
//! - as long as that finds something now and then: each sleep that took longer than the longest look halves it,
//!   down to nothing; what was found by looking, or would have been, restores it;
//! - only briefly beside TCP super-packets, which are worth a wake-up each. A flood of datagrams is not: they gather
//!   while a lane yields.

use std::time::{Duration, Instant};

/// The longest.
const MOST: Duration = Duration::from_micros(100);
/// Below this, sleeping is the better way to wait.
const LEAST: Duration = Duration::from_micros(10);
/// Beside super-packets.
const BESIDE_BULK: Duration = Duration::from_micros(30);
/// And so long after the last.
const BULK_FOR: Duration = Duration::from_millis(2);

/// Remembers what came when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spin {
    limit: Duration,
    worked: Instant,
    /// Since then.
    slept: bool,
    bulk: Option<Instant>,
}

impl Spin {
    /// Begins as if there had just been work.
    pub(super) fn new(now: Instant) -> Spin {
        Spin { limit: MOST, worked: now, slept: false, bulk: None }
    }

    /// A turn found something to do: super-packets, or nothing but others.
    pub(super) fn worked(&mut self, now: Instant, bulk: bool) {
        let missed = self.slept && now.saturating_duration_since(self.worked) > MOST;
        self.limit = match self.limit / 2 {
            _ if !missed => MOST,
            half if half < LEAST => Duration::ZERO,
            half => half,
        };
        (self.worked, self.slept) = (now, false);
        if bulk {
            self.bulk = Some(now);
        }
    }

    /// The lane has slept.
    pub(super) fn slept(&mut self) {
        self.slept = true;
    }

    /// Whether to look once more.
    pub(super) fn goes_on(&self, now: Instant) -> bool {
        let beside_bulk = self.bulk.is_some_and(|at| now.saturating_duration_since(at) < BULK_FOR);
        let limit = if beside_bulk { self.limit.min(BESIDE_BULK) } else { self.limit };
        now.saturating_duration_since(self.worked) < limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock;

    const US: Duration = Duration::from_micros(1);

    /// How many microseconds it looks after the last work.
    fn looks(spin: &Spin) -> u32 {
        (0..1000).find(|us| !spin.goes_on(spin.worked + *us * US)).expect("an end")
    }

    /// After work at each of these pauses, slept through where looking ended.
    fn after(pauses: &[u32], bulk: bool) -> Spin {
        let mut now = clock::now();
        let mut spin = Spin::new(now);
        for pause in pauses {
            if looks(&spin) <= *pause {
                spin.slept();
            }
            now += *pause * US;
            spin.worked(now, bulk);
        }
        spin
    }

    #[test]
    fn it_looks_as_long_as_packets_come_at_short_intervals() {
        assert_eq!(looks(&after(&[], false)), 100);
        assert_eq!(looks(&after(&[50, 99, 100], false)), 100);
    }

    #[test]
    fn what_was_found_by_looking_counts_however_long_others_had_the_processor() {
        let mut spin = after(&[], false);
        spin.worked(spin.worked + 5000 * US, false);
        assert_eq!(looks(&spin), 100);
        // Woken late: as good as never looked.
        spin.slept();
        spin.worked(spin.worked + 5000 * US, false);
        assert_eq!(looks(&spin), 50);
    }

    #[test]
    fn pauses_that_looking_cannot_bridge_end_it() {
        let table: [(&[u32], u32); 6] = [
            (&[101], 50),
            (&[1000, 1000], 25),
            (&[1000, 1000, 1000], 13),
            (&[1000; 4], 0),
            (&[1000; 40], 0),
            // A question and its answer, every millisecond: the answer is waited for.
            (&[1000, 60, 1000, 60], 100),
        ];
        for (pauses, expected) in table {
            assert_eq!(looks(&after(pauses, false)), expected, "{pauses:?}");
        }
    }

    #[test]
    fn beside_super_packets_it_looks_briefly_and_soon_as_before() {
        let mut spin = after(&[50], true);
        assert_eq!(looks(&spin), 30);
        // Acknowledgements between two bursts change nothing.
        spin.worked(spin.worked + 50 * US, false);
        assert_eq!(looks(&spin), 30);
        spin.worked(spin.worked + BULK_FOR, false);
        spin.worked(spin.worked + 50 * US, false);
        assert_eq!(looks(&spin), 100);
        // And does not begin to, where it has not paid off.
        assert_eq!(looks(&after(&[1000; 5], true)), 0);
    }
}
