//! The one place that reads the clocks.
#![allow(clippy::disallowed_methods)] // this is where they are allowed

use std::time::{Instant, SystemTime};

/// The monotonic clock.
pub fn now() -> Instant {
    Instant::now()
}

/// The wall clock.
pub fn wall() -> SystemTime {
    SystemTime::now()
}

/// Milliseconds since boot, counting sleep: comparable across restarts of the agent, not across reboots.
pub fn since_boot_ms() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(0, |t| t.tv_sec() as u64 * 1000 + t.tv_nsec() as u64 / 1_000_000)
}

/// Milliseconds that the machine has been running since boot, not counting sleep: for what goes silent only while
/// nothing runs.
pub fn uptime_ms() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| t.tv_sec() as u64 * 1000 + t.tv_nsec() as u64 / 1_000_000)
}
