//! Warren on real kernels: network namespaces, real TUN devices, and other people's programs.
//!
//! Needs root and what `tests/peers.sh` builds; a missing thing is a failure that says how to get it.
//! Everything lives in namespaces without names that end with the test, however it ends.

pub mod lab;

/// A few objects for the real kube-proxy, as the measurements beside it have them.
#[allow(dead_code)]
#[path = "../../bench/kube_proxy/api.rs"]
pub mod api;
mod others;
#[allow(dead_code)]
#[path = "../../bench/kube_proxy/proxy.rs"]
pub mod proxy;

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
