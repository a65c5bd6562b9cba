//! Pods that have more than their share of the kernel's connection table, while it is nearly full.
//!
//! What a pod sends to node ports and external addresses needs an entry there, for the kernel itself
//! translates it; so does what goes past Services. To count them in the packets' way (`ct count`) makes each
//! new flow walk through the others of its pod, which costs more than the flood: on Linux 6.18 a flow takes 8 us
//! without, 52 at a limit of 1,024, 76 at 4,096. So the table is counted from outside, and only while it is
//! nearly full: whoever has more than a quarter, as much as a pod has of the loop's own table, opens no
//! more until he has less.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use ipnet::IpNet;
use nlink::netlink::{Connection, Netfilter};
use tokio::sync::watch as latest;
use tracing::debug;

use crate::io::clock;

/// A pod may have one of so many parts of the table.
const SHARE: u64 = 4;
/// How long after one count the next one comes, at least, and how much of one core counting may take.
const PAUSE: Duration = Duration::from_secs(1);
const PART_OF_A_CORE: u32 = 10;

/// What there is to count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Census {
    /// This node's pods.
    pub(super) pods: Vec<IpNet>,
    /// How many entries the table may have.
    pub(super) max: u64,
}

/// Counts for as long as it is told to.
#[derive(Debug)]
pub(super) struct Counter {
    wanted: latest::Sender<Option<Census>>,
    found: latest::Receiver<Arc<BTreeSet<IpAddr>>>,
}

impl Counter {
    /// Starts the task; it ends with this. Without conntrack in the kernel there is no table to fill.
    pub(super) fn start() -> Self {
        let (wanted, orders) = latest::channel(None);
        let (findings, found) = latest::channel(Arc::default());
        if let Ok(connection) = Connection::<Netfilter>::new() {
            tokio::spawn(count(connection, orders, findings));
        }
        Self { wanted, found }
    }

    /// Counts from now on, or no longer.
    pub(super) fn want(&self, census: Option<Census>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != census;
            *wanted = census;
            changed
        });
    }

    /// Who had too much when it was counted last.
    pub(super) fn found(&self) -> Arc<BTreeSet<IpAddr>> {
        Arc::clone(&self.found.borrow())
    }
}

async fn count(
    connection: Connection<Netfilter>,
    mut orders: latest::Receiver<Option<Census>>,
    findings: latest::Sender<Arc<BTreeSet<IpAddr>>>,
) {
    loop {
        let census = orders.borrow_and_update().clone();
        let Some(census) = census else {
            findings.send_replace(Arc::default());
            if orders.changed().await.is_err() {
                return;
            }
            continue;
        };
        let began = clock::now();
        match greedy(&connection, &census).await {
            Ok(found) => drop(findings.send_replace(Arc::new(found))),
            Err(error) => debug!("the connection table cannot be counted: {error}"),
        }
        tokio::select! {
            () = tokio::time::sleep(pause(began)) => {}
            changed = orders.changed() => if changed.is_err() { return },
        }
    }
}

fn pause(began: Instant) -> Duration {
    let took = clock::now().duration_since(began);
    (took * (PART_OF_A_CORE - 1)).max(PAUSE)
}

/// The pods that have more than their share.
async fn greedy(connection: &Connection<Netfilter>, census: &Census) -> nlink::Result<BTreeSet<IpAddr>> {
    let mut counts: HashMap<IpAddr, u64> = HashMap::new();
    for v6 in [false, true] {
        let pods: Vec<&IpNet> = census.pods.iter().filter(|range| range.addr().is_ipv6() == v6).collect();
        if pods.is_empty() {
            continue;
        }
        let mut entries = match v6 {
            false => connection.stream_conntrack_v4().await?,
            true => connection.stream_conntrack_v6().await?,
        };
        while let Some(entry) = entries.next().await {
            if let Some(source) = entry?.orig.src_ip
                && pods.iter().any(|range| range.contains(&source))
            {
                *counts.entry(source).or_default() += 1;
            }
        }
    }
    let share = census.max / SHARE;
    Ok(counts.into_iter().filter(|(_, count)| *count > share).map(|(pod, _)| pod).collect())
}
