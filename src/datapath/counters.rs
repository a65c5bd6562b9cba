//! What the packet line counts: every drop by its reason, and the totals.
//!
//! Each lane writes its own set and nobody else writes it, so that an increment is a plain load and
//! store; readers add the lanes up.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::packet::DropReason;

/// Declares the totals once: variant, name.
macro_rules! totals {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Things that are counted and are not drops.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Total { $($(#[$doc])* $variant,)* }

        impl Total {
            /// Every total, in the order of its counter.
            pub const ALL: &'static [Total] = &[$(Total::$variant,)*];

            /// The name shown to people.
            pub const fn name(self) -> &'static str {
                match self { $(Total::$variant => $name,)* }
            }
        }
    };
}

totals! {
    /// Reads from the TUN (a super-packet is one).
    TunReads => "tun-reads",
    /// Bytes read from the TUN.
    TunReadBytes => "tun-read-bytes",
    /// Writes to the TUN (a joined super-packet is one).
    TunWrites => "tun-writes",
    /// Bytes written to the TUN.
    TunWriteBytes => "tun-write-bytes",
    /// Packets that left in a tunnel.
    PacketsSent => "packets-sent",
    /// Packets that came out of a tunnel and were accepted.
    PacketsReceived => "packets-received",
    /// Datagrams received from the network.
    DatagramsReceived => "datagrams-received",
    /// Send calls' messages (an offloaded run is one).
    SendRuns => "send-runs",
    /// ICMP errors sent.
    IcmpSent => "icmp-sent",
    /// TCP SYNs whose MSS was lowered.
    MssClamped => "mss-clamped",
    /// Inner IPv4 packets cut into fragments for the path.
    Fragmented => "fragmented",
    /// ARP requests and neighbour solicitations answered inside VXLAN.
    NeighboursAnswered => "neighbours-answered",
    /// ICMP errors about translated packets that were translated with them.
    IcmpTranslated => "icmp-translated",
    /// TCP resets sent for Services that cannot answer.
    ResetsSent => "resets-sent",
    /// Flows to a Service whose source was rewritten, because no reply would have found back.
    SourcesRewritten => "sources-rewritten",
    /// Flows that got another source port, because another flow would have been taken for theirs.
    SourcePortsChanged => "source-ports-changed",
    /// Flows that were found to have lost their endpoint.
    StaleFlows => "stale-flows",
    /// Times an offload was refused by the kernel and given up.
    OffloadFallbacks => "offload-fallbacks",
}

/// One lane's counters.
#[derive(Debug)]
pub struct Counters {
    drops: [AtomicU64; DropReason::ALL.len()],
    totals: [AtomicU64; Total::ALL.len()],
}

impl Default for Counters {
    fn default() -> Counters {
        Counters {
            drops: std::array::from_fn(|_| AtomicU64::new(0)),
            totals: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Counters {
    /// Counts one drop.
    pub fn count_drop(&self, reason: DropReason) {
        self.count_drops(reason, 1);
    }

    /// Counts several drops of one reason.
    pub fn count_drops(&self, reason: DropReason, count: usize) {
        bump(&self.drops[reason as usize], count as u64);
    }

    /// Adds to a total.
    pub fn add(&self, total: Total, count: usize) {
        bump(&self.totals[total as usize], count as u64);
    }

    /// How often packets were dropped for this reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].load(Ordering::Relaxed)
    }

    /// A total.
    pub fn total(&self, total: Total) -> u64 {
        self.totals[total as usize].load(Ordering::Relaxed)
    }
}

/// The lane is the only writer: no atomic read-modify-write is needed.
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}
