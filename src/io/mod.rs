//! The world: TUN, UDP, threads, routes, clocks. The only room with `unsafe` in it.

pub mod clock;
