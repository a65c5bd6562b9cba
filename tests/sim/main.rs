//! The mesh in virtual time: whole lanes with real boringtun on a simulated network, seeded.
//!
//! `cargo test --no-default-features --features sim --test sim`; `WARREN_SIM_RUNS=n` tries more seeds,
//! `WARREN_SIM_SEED=n` repeats one.

mod chaos;
mod fit;
mod hostile;
mod ledger;
mod net;
mod packets;
mod paths;
mod rng;
mod sessions;
mod vxlan;
mod world;
