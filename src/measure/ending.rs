//! How a measurement ends for everybody who takes part in it: once, with a reason, and soon.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::io::clock;

/// How often whoever waits looks whether it is over.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Shared by all threads of a measurement.
#[derive(Clone, Debug, Default)]
pub(super) struct Ending {
    reason: Arc<Mutex<Option<String>>>,
    of_all: Option<Arc<Mutex<Option<String>>>>,
}

impl Ending {
    /// One that ends also when this one does.
    pub(super) fn part(&self) -> Ending {
        Ending { reason: Arc::default(), of_all: Some(Arc::clone(&self.reason)) }
    }

    /// Ends it; the first reason counts.
    pub(super) fn raise(&self, reason: impl Into<String>) {
        let mut held = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        held.get_or_insert_with(|| reason.into());
    }

    /// Why it is over, if it is.
    pub(super) fn reason(&self) -> Option<String> {
        let read =
            |held: &Arc<Mutex<Option<String>>>| held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.of_all.as_ref().and_then(read).or_else(|| read(&self.reason))
    }

    /// Whether it is over.
    pub(super) fn is_raised(&self) -> bool {
        self.reason().is_some()
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
        one.raise("lost");
        one.raise("too late");
        assert_eq!(one.reason().as_deref(), Some("lost"));
        assert!(!whole.is_raised() && !other.is_raised());
        whole.raise("stopped");
        assert_eq!(other.reason().as_deref(), Some("stopped"));
        assert!(!other.pause(Duration::from_secs(60)));
    }

    #[test]
    fn a_pause_takes_its_time() {
        let begun = clock::now();
        assert!(Ending::default().pause(Duration::from_millis(150)));
        assert!(clock::now() - begun >= Duration::from_millis(150));
    }
}
