//! The cluster's DNS, small: a pod that answers for the Services of the demo's folder, and a client that asks
//! it. Real clusters have CoreDNS; the names are the same (Kubernetes' DNS-Based Service Discovery 1.1.0).
//!
//! 1. `server`: UDP and TCP, on port 53 of the pod
//! 2. `message`: a question's bytes to its answer's, and nothing else
//! 3. `zone`: which addresses a name has, read from the folder when somebody asks
//! 4. `client`: asks one server one question, as `dig` does

pub(super) mod client;
mod message;
pub(super) mod server;
mod zone;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// Where DNS is spoken.
pub(super) const PORT: u16 = 53;
/// Under which name all Services are.
pub(super) const CLUSTER_DOMAIN: &str = "cluster.local";

/// How to answer.
#[derive(Args, Clone, Debug)]
pub(super) struct DnsArgs {
    /// Where, UDP and TCP.
    #[arg(long, required = true)]
    pub listen: Vec<SocketAddr>,
    /// The folder of objects.
    #[arg(long)]
    pub objects: PathBuf,
}

/// What to ask.
#[derive(Args, Clone, Debug)]
pub(super) struct LookupArgs {
    /// The whole name; no search domain is tried.
    pub name: String,
    /// Which addresses.
    #[arg(long, value_enum, default_value_t = Record::A)]
    pub record: Record,
    /// Whom.
    #[arg(long)]
    pub server: SocketAddr,
    /// By TCP and not by UDP.
    #[arg(long)]
    pub tcp: bool,
    /// How long one try may take.
    #[arg(long, default_value_t = 1000)]
    pub timeout_ms: u64,
    /// For how long to try again.
    #[arg(long, default_value_t = 0)]
    pub retry_ms: u64,
}

/// Addresses of which family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Record {
    /// IPv4.
    A,
    /// IPv6.
    Aaaa,
}

impl Record {
    /// As a person calls it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Record::A => "A",
            Record::Aaaa => "AAAA",
        }
    }

    /// As the command line calls it.
    pub(super) const fn flag(self) -> &'static str {
        match self {
            Record::A => "a",
            Record::Aaaa => "aaaa",
        }
    }
}

/// What the server said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LookedUp {
    /// Whether there is such a name.
    pub exists: bool,
    /// The addresses it has, of the family that was asked for.
    pub addresses: Vec<IpAddr>,
    /// From question to answer, in microseconds; of the try that succeeded.
    pub micros: u64,
}
