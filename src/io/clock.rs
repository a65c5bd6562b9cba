//! The one place that reads the clock; everything else takes the time as an argument.

use std::time::Instant;

/// Now, on the monotonic clock.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Instant {
    Instant::now()
}
