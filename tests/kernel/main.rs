//! Warren on real kernels: network namespaces, real TUN devices, and other people's programs.
//!
//! Needs root and what `tests/peers.sh` builds; a missing thing is a failure that says how to get it.
//! Everything lives in namespaces without names that end with the test, however it ends.

pub mod lab;

mod others;

mod bulk;
mod cni;
mod folder;
mod interop;
mod keys;
mod mesh;
mod mtu;
mod nat;
mod refusals;
mod rekey;
mod repair;
mod restart;
mod services;
mod uapi;
