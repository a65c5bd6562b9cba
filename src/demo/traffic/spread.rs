//! Many short conversations with one address: who answers how often, and whom they see.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::Protocol;
use super::client::{ask_once, in_micros, in_words};
use crate::io::clock;

/// How long one conversation may take.
const TIMEOUT: Duration = Duration::from_millis(1000);
/// While the nodes hear of a change, nothing is waited for that long.
const IMPATIENT: Duration = Duration::from_millis(150);
/// So many in a row must go well before counting begins: then who has gone is not asked any more.
const SETTLED: u32 = 16;
/// More failures than that say nothing new, and each may cost the whole timeout.
const ENOUGH_FAILURES: u32 = 2;

/// What to ask.
#[derive(Args, Clone, Debug)]
pub(in crate::demo) struct SpreadArgs {
    /// Over which protocol.
    #[arg(value_enum)]
    pub protocol: Protocol,
    /// Where.
    pub target: std::net::SocketAddr,
    /// How often.
    #[arg(long, default_value_t = 100)]
    pub times: u32,
    /// How long a change of the Service may take to reach this node, before anything is counted.
    #[arg(long, default_value_t = 2000)]
    pub settle_ms: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::demo) struct Spread {
    /// Who answered, and how often.
    pub by: BTreeMap<String, u32>,
    /// Which client addresses they saw.
    pub saw: BTreeSet<IpAddr>,
    /// How many were not answered.
    pub failed: u32,
    /// Why the first of them was not.
    pub error: Option<String>,
    /// The middle one took so long, in microseconds.
    pub median: u64,
}

impl Spread {
    /// How many were answered.
    pub(in crate::demo) fn answered(&self) -> u32 {
        self.by.values().sum()
    }
}

/// Asks again and again, each time from another port.
pub(in crate::demo) fn spread(args: &SpreadArgs) -> Result<Spread, String> {
    settle(args);
    let mut spread = Spread::default();
    let mut took = Vec::new();
    for _ in 0..args.times {
        let asked = clock::now();
        match ask_once(args.protocol, args.target, TIMEOUT) {
            Ok((by, saw, _)) => {
                took.push(in_micros(clock::now().duration_since(asked)));
                *spread.by.entry(by).or_default() += 1;
                spread.saw.insert(saw);
            }
            Err(error) => {
                spread.failed += 1;
                spread.error.get_or_insert_with(|| in_words(&error));
                if spread.failed == ENOUGH_FAILURES {
                    break;
                }
            }
        }
    }
    took.sort_unstable();
    spread.median = took.get(took.len() / 2).copied().unwrap_or(0);
    Ok(spread)
}

fn settle(args: &SpreadArgs) {
    let deadline = clock::now() + Duration::from_millis(args.settle_ms);
    let mut well = 0;
    while well < SETTLED && clock::now() < deadline {
        well = if ask_once(args.protocol, args.target, IMPATIENT).is_ok() { well + 1 } else { 0 };
    }
}
