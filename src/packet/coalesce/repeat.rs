//! The way for packets that come in runs: what repeats the headers of the packet before it need not be looked
//! at again.
//!
//! [`parse`](crate::packet::parse()) and whoever admits packets judge by the headers. Where these are, byte by
//! byte, those of a packet that has been admitted and joined just now, but for the few fields that differ
//! between the segments of one super-packet, so is the judgement: it is the super-packet that was admitted. Anything
//! else is for [`TunBatch::push_tagged`], which also judges again what is refused here.

use super::frame::{Building, Kind, same};
use super::table::Table;
use super::{Item, Memory, NONE, Piece, Region, TunBatch};
use crate::packet::checksum::{fold, pseudo_header, sum, verify_ipv4_header};
use crate::packet::segment::{IPV6_HEADER, TCP_ACK, TCP_PSH};

/// A packet that belongs to a run.
#[derive(Clone, Copy)]
struct Next {
    /// Its length, without what stands behind it.
    total_len: u32,
    /// Of it, headers.
    skip: u32,
    /// TCP's.
    flags: u8,
}

impl TunBatch {
    /// Adds the packet at `offset`, at most `room` bytes long, to the frame that took the packet before it, if
    /// its headers are those of that frame and it came from the same place (`tag`): says how long it is. `None`
    /// and nothing done if it is to be pushed as any other.
    pub fn repeat(
        &mut self,
        region: Region,
        offset: usize,
        room: usize,
        memory: &Memory<'_>,
        tag: u32,
    ) -> Option<u32> {
        let frame = self.frames.get_mut(usize::from(self.run?)).filter(|frame| frame.tag == tag)?;
        if self.items.len() >= self.capacity {
            return None;
        }
        let packet = memory.get(Piece { region, offset: offset as u32, len: room as u32 })?;
        let head = memory.get(self.items.get(usize::from(frame.first))?.piece)?;
        let next = frame.next(head, packet)?;
        if !frame.is_right(head) {
            return None;
        }
        let Next { total_len, skip, flags } = next;
        let len = total_len - skip;
        let item = self.items.len() as u16;
        let piece = Piece { region, offset: offset as u32 + skip, len };
        self.items.push(Item { piece, next: NONE });
        self.items[usize::from(frame.last)].next = item;
        (frame.last, frame.packets, frame.bytes) = (item, frame.packets + 1, frame.bytes + total_len);
        if !frame.extend(len, flags) {
            let place = self.run.take().map(|index| (Table::set(frame.hash), index));
            self.table.forget(place);
        }
        Some(total_len)
    }
}

impl Building {
    /// Whether `packet` is the next of the run that began with `head`, whole and with right checksums.
    fn next(&self, head: &[u8], packet: &[u8]) -> Option<Next> {
        let (headers, l4) = (&self.headers, usize::from(self.headers.l4_offset));
        let skip = headers.payload_offset();
        let v4 = headers.is_ipv4();
        // IP: version, class and flow; then all but length, identification and checksum.
        let ip = if v4 { [0..2, 6..10, 12..20] } else { [0..4, 6..8, 8..IPV6_HEADER] };
        let total_len = match v4 {
            true => usize::from(be16(packet, 2)?),
            false => IPV6_HEADER + usize::from(be16(packet, 4)?),
        };
        // No options and no extension headers: only such packets begin a frame that others may join.
        let whole = packet.get(..total_len).filter(|_| total_len > skip)?;
        let len = (total_len - skip) as u32;
        if !self.takes_payload(len) || !ip.into_iter().all(|range| same(head, whole, range)) {
            return None;
        }
        let id = if v4 { be16(head, 4)?.wrapping_add(self.packets) } else { 0 };
        if v4 && !headers.dont_fragment && be16(whole, 4)? != id {
            return None;
        }
        let (old, new) = (head.get(l4..skip)?, whole.get(l4..skip)?);
        let flags = match self.kind {
            // Ports; acknowledgement and header length; window; urgent pointer and options.
            Kind::Tcp => {
                let (before, flags) = (old.get(13)?, new.get(13)?);
                let plain = (before ^ flags) & !TCP_PSH == 0 && flags & !TCP_PSH == TCP_ACK;
                let seq = new.get(4..).and_then(|bytes| bytes.first_chunk())?;
                let repeated = same(old, new, 0..4) && same(old, new, 8..13) && same(old, new, 14..16);
                let next = u32::from_be_bytes(*seq) == self.next_seq;
                (plain && next && repeated && old.get(18..) == new.get(18..)).then_some(*flags)?
            }
            // Ports, and a length and a checksum that fill the packet.
            Kind::Udp => {
                let filled = usize::from(be16(new, 4)?) == total_len - l4 && be16(new, 6)? != 0;
                (filled && same(old, new, 0..4)).then_some(0)?
            }
            Kind::Alone | Kind::Ready | Kind::Ack | Kind::Discarded => return None,
        };
        let covered = whole.get(l4..)?;
        let pseudo =
            pseudo_header(headers.source, headers.destination, headers.protocol, covered.len() as u32);
        let right = fold(pseudo + sum(covered)) == 0xffff && (!v4 || verify_ipv4_header(whole));
        right.then_some(Next { total_len: total_len as u32, skip: skip as u32, flags })
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}
