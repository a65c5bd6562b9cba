//! Encapsulation: WireGuard and VXLAN as siblings, and the batch of datagrams that both fill.

pub mod batch;
pub mod endpoints;
pub mod limit;
pub mod neighbours;
pub mod ring;
pub mod vxlan;
pub mod vxlan_link;
pub mod wireguard;

pub use batch::{TxBatch, Via};

use crate::packet::DropReason;
use crate::snapshot::PeerId;

/// What became of packets that were to be sealed: the first were sent, the next wait, the rest were refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// How many stand in the batch.
    pub sent: usize,
    /// How many wait, for a session or for a MAC address.
    pub waiting: usize,
    /// Why the others were dropped, if there are others.
    pub refused: Option<DropReason>,
}

impl Sealed {
    /// All were dropped.
    pub(crate) const fn refused(reason: DropReason) -> Sealed {
        Sealed { sent: 0, waiting: 0, refused: Some(reason) }
    }
}

/// What became of packets that waited, since the lane last asked.
#[derive(Debug, Default)]
pub struct Waited {
    /// Sent after all: to whom, and how many bytes.
    pub sent: Vec<(PeerId, usize)>,
    /// Dropped.
    pub dropped: usize,
}

/// IP packets that leave together: the segments of a super-packet, or one packet that is whole.
pub trait Segments {
    /// How many.
    fn count(&self) -> usize;
    /// Length of the i-th.
    fn len(&self, index: usize) -> usize;
    /// Writes the i-th to the start of `out`, which must hold it; returns its length.
    fn write(&self, index: usize, out: &mut [u8]) -> usize;
}

/// One whole packet.
impl Segments for &[u8] {
    fn count(&self) -> usize {
        1
    }

    fn len(&self, _index: usize) -> usize {
        <[u8]>::len(self)
    }

    fn write(&self, _index: usize, out: &mut [u8]) -> usize {
        out[..<[u8]>::len(self)].copy_from_slice(self);
        <[u8]>::len(self)
    }
}
