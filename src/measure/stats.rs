//! What many round trips come to.

use serde::Serialize;

/// Most round trips that are kept of one measurement: 32 MiB of them.
const MOST: usize = 8 << 20;

/// Round trips, in nanoseconds.
#[derive(Debug, Default)]
pub(super) struct Trips {
    nanos: Vec<u32>,
    lost: u64,
}

/// Percentiles of round trips.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Summary {
    /// How many there were.
    pub count: u64,
    /// Requests without an answer.
    pub lost: u64,
    /// Half took no longer, in microseconds.
    pub p50: f64,
    /// 99 of 100 took no longer.
    pub p99: f64,
    /// 999 of 1000 took no longer.
    pub p999: f64,
}

impl Trips {
    /// One more.
    pub(super) fn add(&mut self, took: std::time::Duration) {
        if self.nanos.len() < MOST {
            self.nanos.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
        }
    }

    /// One more that did not come back.
    pub(super) fn lose(&mut self) {
        self.lost += 1;
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.nanos.len()
    }

    /// What they come to; `None` when there is none.
    pub(super) fn summary(mut self) -> Option<Summary> {
        self.nanos.sort_unstable();
        let micros = |share| percentile(&self.nanos, share).map(|nanos| f64::from(nanos) / 1000.0);
        Some(Summary {
            count: self.nanos.len() as u64,
            lost: self.lost,
            p50: micros(500)?,
            p99: micros(990)?,
            p999: micros(999)?,
        })
    }
}

/// The smallest value that at least so many thousandths are no larger than (nearest rank).
fn percentile(sorted: &[u32], thousandths: usize) -> Option<u32> {
    let rank = (sorted.len() * thousandths).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn summary(nanos: impl IntoIterator<Item = u64>) -> Option<Summary> {
        let mut trips = Trips::default();
        nanos.into_iter().for_each(|nanos| trips.add(Duration::from_nanos(nanos)));
        trips.summary()
    }

    #[test]
    fn percentiles_are_values_that_were_there() {
        let of = |nanos: &[u64]| {
            summary(nanos.iter().copied()).map(|s| (s.count, s.p50, s.p99, s.p999)).expect("some")
        };
        assert_eq!(of(&[5000]), (1, 5.0, 5.0, 5.0));
        assert_eq!(of(&[9000, 1000]), (2, 1.0, 9.0, 9.0));
        assert_eq!(of(&[3000, 1000, 2000]), (3, 2.0, 3.0, 3.0));
        let thousand: Vec<u64> = (1..=1000).rev().map(|n| n * 1000).collect();
        assert_eq!(of(&thousand), (1000, 500.0, 990.0, 999.0));
        assert_eq!(summary([]), None);
    }

    #[test]
    fn what_takes_longer_than_fits_is_as_long_as_fits() {
        let only = summary([10_000_000_000]).expect("one");
        assert_eq!(only.p50, f64::from(u32::MAX) / 1000.0);
    }

    #[test]
    fn what_was_lost_is_counted_and_no_round_trip() {
        let mut trips = Trips::default();
        trips.lose();
        assert_eq!(trips.len(), 0);
        trips.add(Duration::from_micros(7));
        let summary = trips.summary().expect("one");
        assert_eq!((summary.count, summary.lost, summary.p999), (1, 1, 7.0));
    }

    proptest! {
        #[test]
        fn percentiles_rise(nanos in prop::collection::vec(0..u64::from(u32::MAX), 1..500)) {
            let s = summary(nanos.clone()).expect("some");
            let most = *nanos.iter().max().expect("some") as f64 / 1000.0;
            prop_assert!(s.p50 <= s.p99 && s.p99 <= s.p999 && s.p999 <= most);
            let below = nanos.iter().filter(|n| **n as f64 / 1000.0 <= s.p50).count();
            prop_assert!(2 * below >= nanos.len());
        }
    }
}
