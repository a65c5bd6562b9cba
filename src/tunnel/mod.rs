//! Encapsulation: WireGuard and VXLAN as siblings, and the batch of datagrams that both fill.

pub mod batch;
pub mod limit;
pub mod vxlan;
pub mod vxlan_link;
pub mod wireguard;

pub use batch::{TxBatch, Via};

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
