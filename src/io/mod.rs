//! The world: TUN, UDP, threads, routes, clocks. The only room with `unsafe` in it.
#![allow(unsafe_code)] // system calls; each block says why it is sound

pub mod clock;
pub mod fleet;
pub mod flows;
pub mod host;
pub mod kernel;
pub mod lane;
mod outbox;
mod spin;
pub mod tun;
pub mod udp;
pub mod underlay;
