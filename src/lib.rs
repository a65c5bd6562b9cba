//! Warren: the pod network of a Kubernetes cluster whose nodes cannot route pod traffic to each other.

pub mod datapath;
pub mod packet;
pub mod snapshot;
pub mod tunnel;

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "agent")]
pub mod config;
#[cfg(feature = "agent")]
pub mod demo;
#[cfg(feature = "agent")]
pub mod io;
#[cfg(feature = "agent")]
pub mod state;
#[cfg(feature = "agent")]
pub mod status;
