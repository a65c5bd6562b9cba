//! THE STATE LINE: from Kubernetes objects to the [`Snapshot`](crate::snapshot::Snapshot) that the
//! packet line reads.
//!
//! In the order in which an object meets them:
//!
//! 1. [`source`]: where objects come from (a folder, or the Kubernetes API). Everything after it
//!    is the same for both: apply, delete, reset.
//! 2. [`convert`] and [`annotations`]: untyped, hostile objects become typed, bounded values. What is
//!    wrong is reported ([`problem`]) and costs that one value.
//! 3. [`desired`]: the store of what should be; nothing leaves it before a first full list came.
//! 4. [`ownership`] and [`compile`]: who owns which range, address and key, then the snapshot and the
//!    [`HostPlan`](compile::HostPlan). [`services`]: the same for Services, one by one as they change.
//! 5. [`run`]: turns the handle: events in, snapshots, plans, checkpoints and our own announcement out.
//! 6. [`publish`]: what this node tells the others. [`checkpoint`], [`keys`]: what survives a restart.

pub mod annotations;
mod blocking;
pub mod checkpoint;
pub mod compile;
pub mod convert;
pub mod desired;
pub mod durable;
pub mod keys;
pub mod ownership;
pub mod problem;
pub mod publish;
pub mod run;
pub mod services;
pub mod source;
