//! What lanes tell the table, and what it answers.

use std::hash::Hasher as _;
use std::net::IpAddr;

use siphasher::sip::SipHasher13;

use super::{Direction, FlowKey, FlowState};
use crate::snapshot::PeerId;

/// A burst of packets of one flow, as a lane sees it.
#[derive(Clone, Copy, Debug)]
pub struct Sighting {
    /// Its key as it arrived.
    pub key: FlowKey,
    /// Whether it came out of a peer's tunnel (else from this node).
    pub from_peer: bool,
    /// The peer on the other side.
    pub peer: Option<PeerId>,
    /// The lane that saw it.
    pub lane: u8,
    /// TCP flags of the whole burst; ignored for other protocols.
    pub tcp_flags: u8,
    /// Packets on the wire.
    pub packets: u32,
    /// Bytes of them.
    pub bytes: u64,
    /// Who pays for the entry: the local pod's number ([`Sighting::owner_of`]); 0 for nobody.
    pub owner: u16,
}

impl Sighting {
    /// The number of a local pod: two pods seldom share one, and then share a quota.
    pub fn owner_of(pod: IpAddr) -> u16 {
        let mut hasher = SipHasher13::new_with_keys(0, 0);
        match pod {
            IpAddr::V4(v4) => hasher.write_u32(v4.to_bits()),
            IpAddr::V6(v6) => hasher.write_u128(v6.to_bits()),
        }
        (hasher.finish() % u64::from(u16::MAX)) as u16 + 1
    }
}

/// What a Service does to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The key that a reply arrives with, before it is translated back.
    pub reply: FlowKey,
    /// The Service's number.
    pub service: u32,
    /// The endpoint's number.
    pub endpoint: u32,
}

/// One entry at one time in its life; another flow in the same place has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowRef {
    pub(super) index: u32,
    pub(super) sequence: u64,
}

/// What the table knows about a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// The flow.
    pub flow: FlowRef,
    /// Which way the burst goes.
    pub direction: Direction,
    /// The flow's state after it.
    pub state: FlowState,
    /// Whether it opened the flow.
    pub new: bool,
    /// The peer that the flow was opened to or from.
    pub peer: Option<PeerId>,
    /// Whether that peer opened it.
    pub from_peer: bool,
    /// The Service, endpoint and new key of a translated flow.
    pub rewrite: Option<Rewrite>,
}

/// How to translate a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The addresses and ports that the packets must get.
    pub to: FlowKey,
    /// The Service's number.
    pub service: u32,
    /// The endpoint's number.
    pub endpoint: u32,
}

/// Why a burst has no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Untracked {
    /// TCP that fits no state of its flow, or cannot open one.
    Invalid {
        /// Whether the flow is translated: then nobody would know these packets as they are.
        translated: bool,
    },
    /// No room: all flows looked at are worth more.
    Full,
    /// The local pod that would pay for it has as many as one may have.
    Quota,
    /// Another lane is changing this place right now.
    Busy,
    /// Another flow has this key already, in one of the directions: take another source port.
    Taken,
}

/// A flow as `warren flows` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// The entry.
    pub flow: FlowRef,
    /// Key of the packet that opened it.
    pub original: FlowKey,
    /// Key of the answers as they arrive; not the reverse of `original` if the flow is translated.
    pub reply: FlowKey,
    /// State.
    pub state: FlowState,
    /// Whether it was ever answered.
    pub replied: bool,
    /// Whether a peer opened it.
    pub from_peer: bool,
    /// The peer on the other side.
    pub peer: Option<PeerId>,
    /// The lane that saw it last.
    pub lane: u8,
    /// Who pays for it.
    pub owner: u16,
    /// Service and endpoint of a translated flow.
    pub target: Option<(u32, u32)>,
    /// Second (since boot) in which it began.
    pub created: u32,
    /// When it was seen last, milliseconds since boot.
    pub seen: u64,
    /// When it will be forgotten if it stays silent, milliseconds since boot.
    pub expires: u64,
    /// Packets in the original and the reply direction; they wrap.
    pub packets: [u32; 2],
    /// Bytes in the original and the reply direction.
    pub bytes: [u64; 2],
}

/// How the table fares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCounters {
    /// Flows that fit.
    pub capacity: u64,
    /// Flows that are in, some perhaps expired.
    pub entries: u64,
    /// Ever created.
    pub created: u64,
    /// Forgotten after silence.
    pub expired: u64,
    /// Given up for a newer one.
    pub evicted: u64,
    /// Newcomers refused.
    pub full: u64,
    /// Bursts of TCP that fit no state.
    pub invalid: u64,
    /// Bursts untracked because another lane was at work in the same place.
    pub busy: u64,
    /// Entries cleared at [`attach`](super::FlowTable::attach) because they were half written or damaged.
    pub recovered: u64,
}
