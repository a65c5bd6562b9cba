//! How a measurement ends for everybody who takes part in it: once, with a reason, and soon.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::io::clock;

/// How often whoever waits looks whether it is over.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Shared by all threads of a measurement.
#[derive(Clone, Debug, Default)]
pub(super) struct Ending {
    own: Arc<Held>,
    whole: Option<Arc<Ending>>,
}

#[derive(Debug, Default)]
struct Held {
    /// Set after the reason: pumps ask for every datagram, and must not meet at a lock.
    raised: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Ending {
    /// One that ends also when this one does.
    pub(super) fn part(&self) -> Ending {
        Ending { own: Arc::default(), whole: Some(Arc::new(self.clone())) }
    }

    /// Ends it; the first reason counts.
    pub(super) fn raise(&self, reason: impl Into<String>) {
        let mut held = self.own.reason.lock().unwrap_or_else(PoisonError::into_inner);
        held.get_or_insert_with(|| reason.into());
        self.own.raised.store(true, Ordering::Release);
    }

    /// Why it is over, if it is; the reason of the whole before its own.
    pub(super) fn reason(&self) -> Option<String> {
        let own = || self.own.reason.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.whole.as_ref().and_then(|whole| whole.reason()).or_else(own)
    }

    /// Whether it is over.
    pub(super) fn is_raised(&self) -> bool {
        self.own.raised.load(Ordering::Acquire) || self.whole.as_ref().is_some_and(|whole| whole.is_raised())
    }

    /// Waits so long, or until it is over; whether it still goes on.
    pub(super) fn pause(&self, long: Duration) -> bool {
        let until = clock::now() + long;
        loop {
            if self.is_raised() {
                return false;
            }
            let left = until.saturating_duration_since(clock::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(LOOK_EVERY));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts_and_the_whole_ends_its_parts() {
        let whole = Ending::default();
        let (one, other) = (whole.part(), whole.part());
        let part_of_part = other.part();
        one.raise("lost");
        one.raise("too late");
        assert_eq!(one.reason().as_deref(), Some("lost"));
        assert!(one.is_raised() && !whole.is_raised() && !other.is_raised());
        whole.raise("stopped");
        for part in [&one, &other, &part_of_part] {
            assert!(part.is_raised());
            assert_eq!(part.reason().as_deref(), Some("stopped"));
        }
        assert!(!other.pause(Duration::from_secs(60)));
    }

    #[test]
    fn a_pause_takes_its_time() {
        let begun = clock::now();
        assert!(Ending::default().pause(Duration::from_millis(150)));
        assert!(clock::now() - begun >= Duration::from_millis(150));
    }
}
