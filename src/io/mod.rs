//! To come.
pub mod host;
