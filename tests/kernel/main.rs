//! Warren on real kernels: network namespaces, real TUN devices, and other people's programs.
//!
//! Needs root and what `tests/peers.sh` builds; a missing thing is a failure that says how to get it.
//! Everything lives in namespaces without names that end with the test, however it ends.

pub mod lab;

/// What the real kube-proxy needs to run, as the measurements beside it have it.
#[allow(dead_code)] // the measurements use the rest of it
#[path = "../../bench/kube_proxy/api.rs"]
pub mod api;
#[allow(dead_code)] // as above
#[path = "../../bench/kube_proxy/proxy.rs"]
pub mod proxy;

mod others;

mod bench;
mod bulk;
mod cni;
mod folder;
mod idle;
mod interop;
mod keys;
mod mesh;
mod mtu;
mod nat;
mod order;
mod processors;
mod queues;
mod refusals;
mod refused;
mod rekey;
mod repair;
mod restart;
mod services;
mod uapi;
