//! Warren: the pod network of a Kubernetes cluster whose nodes cannot route pod traffic to each other.
#![deny(missing_docs)]

pub mod packet;
pub mod snapshot;
