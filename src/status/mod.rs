//! What a person or a program may ask of a running agent, and the commands that ask it.
//!
//! 1. [`Handle`]: what the agent shares; [`Handle::collect`] asks every lane, with a deadline.
//! 2. [`view`]: snapshot, reports and counters become one [`pb::NodeView`].
//! 3. [`server`]: gives it out as gRPC on the agent's unix socket; [`uapi`]: speaks WireGuard's
//!    cross-platform interface, so that the ordinary `wg` program works.
//! 4. [`client`]: `warren status` and `warren peers` ask the server; [`render`] is what they print.
//!
//! Nothing here holds a private key, so nothing here can give one away.

pub mod client;
#[cfg(test)]
mod fake;
pub mod handle;
pub mod meaning;
pub mod render;
pub mod server;
pub mod socket;
pub mod uapi;
pub mod view;

pub use handle::{Handle, LaneHandle, Live, NodeInfo, RotateOrder};

/// The messages of `proto/warren/v1/status.proto`, generated.
#[allow(missing_docs, unreachable_pub, rust_2018_idioms, clippy::all)] // generated code
pub mod pb {
    tonic::include_proto!("warren.v1");
}
