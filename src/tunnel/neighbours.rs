//! The MAC addresses that VXLAN peers have told, shared by the lanes of a node.
//!
//! No packet waits for the table's lock: who finds it taken goes on without, and looks again. What a peer
//! told is used until it tells something else or its outer address changes. After silence it is asked again
//! and again: a device that was made anew has another MAC address; one that answers nobody (`arp off`) keeps
//! the one it has.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::{Duration, Instant};

use super::vxlan::Mac;
use crate::snapshot::PeerId;

/// Between two questions to the same peer; the kernel's `retrans_time_ms` is a second too.
pub(super) const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long what was told is believed without a sign of life; the kernel's `base_reachable_time_ms`.
const BELIEVE: Duration = Duration::from_secs(30);

/// MAC addresses that peers have told.
#[derive(Debug, Default)]
pub struct Neighbours {
    /// Counts up when an address comes or changes.
    version: AtomicU64,
    /// Times below are milliseconds since the first that anybody said.
    start: OnceLock<Instant>,
    table: RwLock<HashMap<PeerId, Arc<Neighbour>>>,
}

/// What one peer told.
#[derive(Debug)]
pub(super) struct Neighbour {
    /// From which outer address: another machine may have another MAC address.
    pub(super) address: IpAddr,
    pub(super) mac: Mac,
    told: AtomicU64,
    asked: AtomicU64,
}

impl Neighbours {
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// What a peer told, unless another lane is writing.
    pub(super) fn find(&self, peer: PeerId) -> Option<Arc<Neighbour>> {
        self.table.try_read().ok()?.get(&peer).cloned()
    }

    /// Enters what a peer told; whether another lane was not at the table.
    pub(super) fn tell(&self, now: Instant, peer: PeerId, address: IpAddr, mac: Mac) -> bool {
        let told = AtomicU64::new(self.millis(now));
        let neighbour = Arc::new(Neighbour { address, mac, told, asked: AtomicU64::new(0) });
        let Ok(mut table) = self.table.try_write() else { return false };
        table.insert(peer, neighbour);
        self.version.fetch_add(1, Ordering::Release);
        true
    }

    /// A frame of the peer's has confirmed it. Written once a second at most: other lanes read it all the time.
    pub(super) fn confirm(&self, now: Instant, neighbour: &Neighbour) {
        let now = self.millis(now);
        if now.saturating_sub(neighbour.told.load(Ordering::Relaxed)) >= millis(ASK_EVERY) {
            neighbour.told.store(now, Ordering::Relaxed);
        }
    }

    /// Whether who is about to use it has to ask for it too: one of the lanes, once a second.
    pub(super) fn is_to_be_asked(&self, now: Instant, neighbour: &Neighbour) -> bool {
        let now = self.millis(now);
        let told = neighbour.told.load(Ordering::Relaxed);
        let asked = neighbour.asked.load(Ordering::Relaxed);
        now.saturating_sub(told) >= millis(BELIEVE)
            && now.saturating_sub(asked) >= millis(ASK_EVERY)
            && neighbour.asked.compare_exchange(asked, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn millis(&self, now: Instant) -> u64 {
        millis(now.saturating_duration_since(*self.start.get_or_init(|| now)))
    }
}

const fn millis(time: Duration) -> u64 {
    time.as_millis() as u64
}
