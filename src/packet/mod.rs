//! Bytes to typed packets and back: parse, rewrite, checksums, ICMP, segmentation, coalescing.
//!
//! A packet is checked once, by [`parse()`]; everything after trusts the [`Headers`] it returned.
//! No offset into a packet is written anywhere outside this module.

pub mod checksum;
pub mod coalesce;
pub mod drop;
pub mod icmp;
pub mod parse;
pub mod rewrite;
pub mod segment;
#[cfg(test)]
mod testing;
pub mod vnet;

pub use drop::DropReason;
pub use icmp::{IcmpError, IcmpLimiter};
pub use parse::{Fragment, Headers, L4, parse};
pub use rewrite::{ChecksumState, Rewrite};
