//! How long a lane that has nothing to do keeps looking before it sleeps.
//!
//! Being woken is most of a short round trip: 100 us of looking, with a yield in between, brings it below that of
//! kernel VXLAN. But whoever looks takes time from others, so a lane looks only where that pays off:
//! - as long as it finds something now and then: after some long sleeps in a row, which no look could have bridged,
//!   it looks only once in a while, until that finds something or a sleep is short;
//! - only briefly beside TCP super-packets, which are worth a wake-up each. A flood of datagrams is not: they gather
//!   while a lane yields.

use std::time::{Duration, Instant};

/// How long it looks.
const LOOK: Duration = Duration::from_micros(100);
/// A longer sleep would not have been bridged; wake-ups, here and of whoever is waited for, make it longer than the
/// pause that a lane sees which looks.
const LONG: Duration = Duration::from_micros(300);
/// So many long sleeps in a row end it,
const LONG_SLEEPS: u32 = 8;
/// but for every so many-th.
const ONCE_IN: u32 = 16;
/// Beside super-packets.
const LOOK_BESIDE_BULK: Duration = Duration::from_micros(20);
/// And so long after the last.
const BULK_FOR: Duration = Duration::from_millis(2);

/// Remembers what came when.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spin {
    /// When it was first seen that there is nothing to do.
    idle: Option<Instant>,
    /// Since then.
    slept: bool,
    /// Long sleeps in a row.
    long_sleeps: u32,
    /// When a super-packet last came by.
    bulk: Option<Instant>,
}

impl Spin {
    /// A turn found something to do: super-packets, or nothing but others.
    pub(super) fn worked(&mut self, now: Instant, bulk: bool) {
        let long = self.idle.take().is_some_and(|since| now.saturating_duration_since(since) > LONG);
        // What was found by looking counts, however long others had the processor meanwhile.
        self.long_sleeps = if self.slept && long { self.long_sleeps.wrapping_add(1) } else { 0 };
        self.slept = false;
        if bulk {
            self.bulk = Some(now);
        }
    }

    /// Nothing to do: whether to look once more. Else the lane sleeps.
    pub(super) fn goes_on(&mut self, now: Instant) -> bool {
        let idle = *self.idle.get_or_insert(now);
        let looks = now.saturating_duration_since(idle) < self.look(idle);
        self.slept |= !looks;
        looks
    }

    fn look(&self, idle: Instant) -> Duration {
        if self.bulk.is_some_and(|at| idle.saturating_duration_since(at) < BULK_FOR) {
            LOOK_BESIDE_BULK
        } else if self.long_sleeps < LONG_SLEEPS || self.long_sleeps.is_multiple_of(ONCE_IN) {
            LOOK
        } else {
            Duration::ZERO
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock;

    const US: Duration = Duration::from_micros(1);

    /// A lane's day: turns that take 2 us, and work that comes so long after the last.
    struct Day {
        now: Instant,
        spin: Spin,
    }

    impl Day {
        fn begin() -> Day {
            Day { now: clock::now(), spin: Spin::default() }
        }

        /// Waits `pause` microseconds for work; how many of them it looked, and it sleeps through the others.
        fn wait(&mut self, pause: u32, bulk: bool) -> u32 {
            let begun = self.now;
            let mut looked = 0;
            while looked < pause && self.spin.goes_on(begun + looked * US) {
                looked += 2;
            }
            self.now = begun + pause * US;
            self.spin.worked(self.now, bulk);
            looked
        }
    }

    #[test]
    fn it_looks_for_what_is_soon_there() {
        let mut day = Day::begin();
        for pause in [50, 98, 20] {
            assert_eq!(day.wait(pause, false), pause);
        }
        assert_eq!(day.wait(150, false), 100);
        assert_eq!(day.wait(50, false), 50);
    }

    #[test]
    fn an_answer_is_looked_for_however_rare_the_questions() {
        let mut day = Day::begin();
        for _ in 0..100 {
            // The question; its answer; the acknowledgement of that, delayed; thinking.
            assert_eq!(day.wait(60, false), 60);
            assert_eq!(day.wait(40_000, false), 100);
            assert_eq!(day.wait(200_000, false), 100);
        }
    }

    #[test]
    fn what_comes_now_and_then_only_costs_a_look_now_and_then() {
        let mut day = Day::begin();
        let looked: Vec<u32> = (0..40).map(|_| day.wait(1000, false)).collect();
        let looks: Vec<usize> = (0..40).filter(|i| looked[*i] > 0).collect();
        assert_eq!(looks, [0, 1, 2, 3, 4, 5, 6, 7, 16, 32]);
        // One short sleep, or something found, and it looks again.
        assert_eq!(day.wait(250, false), 0);
        assert_eq!(day.wait(50, false), 50);
    }

    #[test]
    fn beside_super_packets_it_looks_briefly_and_soon_as_before() {
        let mut day = Day::begin();
        day.wait(0, true);
        assert_eq!(day.wait(60, true), 20);
        // Acknowledgements between two bursts change nothing.
        assert_eq!([day.wait(60, false), day.wait(60, false)], [20, 20]);
        day.wait(2000, false);
        assert_eq!(day.wait(60, false), 60);
    }

    #[test]
    fn a_lane_that_others_keep_from_looking_has_not_slept() {
        let mut day = Day::begin();
        for _ in 0..20 {
            assert!(day.spin.goes_on(day.now));
            day.now += 5000 * US;
            day.spin.worked(day.now, false);
        }
        assert_eq!(day.wait(60, false), 60);
    }
}
