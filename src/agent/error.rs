//! Why the agent ends, and what to do about it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::io::fleet::FleetError;
use crate::io::host::HostError;
use crate::io::underlay::UnderlayError;
use crate::snapshot::LaneId;
use crate::state::keys::KeyError;
use crate::status::socket::SocketError;

/// Why the agent ended, and what to do.
#[derive(Debug, Error)]
pub enum AgentError {
    /// An ordinary user, or a container without the capability.
    #[error("run this as root: it makes an interface, routes and rules (a container needs CAP_NET_ADMIN)")]
    NotRoot,
    /// A directory.
    #[error("cannot use the directory {path}: {source}; make it, or choose another with {flag}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// The flag that names it.
        flag: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The status socket, which is also what makes sure that there is only one of us.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Two agents would share one device's queues, or one set of routes, rules and nft tables.
    #[error(
        "another agent is running in this network namespace: it has the interface {0}; stop it first. There is one \
         agent for each network namespace; for a second one on this machine run it in a namespace of its own (`ip \
         netns exec NAME warren agent ...`), with its own --run-dir, --state-dir and --tun-name"
    )]
    DeviceInUse(String),
    /// Not in the source.
    #[error(
        "there is no Node named `{node}` in {source_name}{}: write one (kind: Node, with spec.podCIDRs and \
         status.addresses), or say with --node which one this machine is",
        others(known)
    )]
    NoSuchNode {
        /// Our name.
        node: String,
        /// Where we looked.
        source_name: String,
        /// Who is there.
        known: Vec<String>,
    },
    /// No pods can live here.
    #[error(
        "Node `{node}` has no usable pod range: set spec.podCIDRs (for example [\"10.244.1.0/24\"]), different on \
         every node{}",
        reasons(problems)
    )]
    NoPodRange {
        /// Our name.
        node: String,
        /// What was wrong with the ranges it has.
        problems: Vec<String>,
    },
    /// Renamed, or moved to another network namespace.
    #[error(
        "the interface {0} is gone and did not come back: somebody renamed or moved it; the agent ends (its supervisor \
         starts it again, which makes a new one)"
    )]
    DeviceTaken(String),
    /// The interface's state.
    #[error(transparent)]
    Underlay(#[from] UnderlayError),
    /// A panic there, or of the source.
    #[error(
        "the part that follows the source has ended (see above); the agent ends, its supervisor starts it again"
    )]
    StateLineEnded,
    /// Keys.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Lanes.
    #[error(transparent)]
    Lanes(#[from] FleetError),
    /// Routes, rules, nftables.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A lane failed: there is no data path any more.
    #[error("lane {} failed: {reason}; the data path is down, so the agent ends (its supervisor starts it again)", lane.0)]
    LaneFailed {
        /// Which.
        lane: LaneId,
        /// Why.
        reason: String,
    },
    /// Something of the machine.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What went wrong.
        source: io::Error,
    },
}

fn others(known: &[String]) -> String {
    match known {
        [] => " (there is no Node at all)".to_owned(),
        some => format!(" (there are: {})", some.join(", ")),
    }
}

pub(super) fn reasons(problems: &[String]) -> String {
    problems.iter().map(|p| format!("; {p}")).collect()
}
