//! To come.

pub mod clock;
