//! Packets that only lane 0 can send, on their way there from another lane.
//!
//! An ordinary WireGuard peer knows one key of ours, lane 0's: what another lane reads from the TUN for it goes by
//! lane 0's session, for as long as the flow lives. Leading such a flow to lane 0 would save a copy, and let it
//! overtake what still waits where it was.

use crate::packet::DropReason;
use crate::snapshot::{Peer, PeerId, PublicKey};
use crate::tunnel::Segments;

/// Parcels that may wait in one lane's output: more than its own pods make in one turn. And bytes after which one is
/// closed; the packets of one read may go beyond that.
const MOST: usize = 64;
const BYTES: usize = 64 << 10;

/// Packets to one peer, whole and ready to be sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// To whom.
    pub(super) peer: PeerId,
    /// And to which key: a number may be another node's by the time it arrives.
    pub(super) key: PublicKey,
    bytes: Vec<u8>,
    /// Where each packet ends.
    ends: Vec<usize>,
}

impl Parcel {
    fn add(&mut self, packets: &impl Segments) {
        for index in 0..packets.count() {
            let start = self.bytes.len();
            self.bytes.resize(start + packets.len(index), 0);
            let len = packets.write(index, &mut self.bytes[start..]);
            self.bytes.truncate(start + len);
            self.ends.push(self.bytes.len());
        }
    }

    /// How many packets are in it.
    pub fn packets(&self) -> usize {
        self.ends.len()
    }

    fn packet(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..self.ends[index]]
    }
}

impl Segments for Parcel {
    fn count(&self) -> usize {
        self.packets()
    }

    fn len(&self, index: usize) -> usize {
        self.packet(index).len()
    }

    fn write(&self, index: usize, out: &mut [u8]) -> usize {
        let packet = self.packet(index);
        out[..packet.len()].copy_from_slice(packet);
        packet.len()
    }
}

/// Puts packets aside for lane 0.
pub(super) fn put(parcels: &mut Vec<Parcel>, peer: &Peer, packets: &impl Segments) -> Result<(), DropReason> {
    let key = peer.lanes.first().ok_or(DropReason::NoEndpoint)?.key;
    // Fragments come one by one.
    let open = parcels.last_mut();
    if let Some(last) =
        open.filter(|last| (last.peer, last.key) == (peer.id, key) && last.bytes.len() < BYTES)
    {
        last.add(packets);
        return Ok(());
    }
    if parcels.len() >= MOST {
        return Err(DropReason::HandOver);
    }
    let count = packets.count();
    let bytes = (0..count).map(|index| packets.len(index)).sum();
    let mut parcel =
        Parcel { peer: peer.id, key, bytes: Vec::with_capacity(bytes), ends: Vec::with_capacity(count) };
    parcel.add(packets);
    parcels.push(parcel);
    Ok(())
}
