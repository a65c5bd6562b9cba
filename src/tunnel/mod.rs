//! To come.

pub mod vxlan;
