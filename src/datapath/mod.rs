//! To come.

pub mod conntrack;
