//! Inbound: runs of packets become super-packets before they are written to the TUN.
//!
//! A write costs the kernel about the same for one packet as for sixty, so consecutive segments of a flow
//! are joined as the kernel's own receive offload would (`net/ipv4/tcp_offload.c`, `udp_offload.c`). No
//! payload is copied: a [`Frame`] is a virtio header and a list of [`Piece`]s to gather.
//!
//! 1. [`TunBatch::push`] takes packets in the order in which they came;
//! 2. between, [`TunBatch::heads`] shows each frame's first packet, whose addresses, ports and hop limit may
//!    be rewritten in place: once for the whole frame;
//! 3. [`TunBatch::finish`] writes the joined frames' headers, reading back what step 2 left there;
//! 4. [`TunBatch::frames`] is what goes to the TUN; [`TunBatch::clear`] begins the next batch.
//!
//! Joining is invisible: cutting a frame again gives back the packets that were joined, bit by bit, but for
//! the identification of IPv4 packets that may not be fragmented (RFC 6864 gives it no meaning) and for
//! merged acknowledgements ([`Offloads::acks`]).

use super::vnet::{VNET_HDR_LEN, VnetHdr};
use super::{DropReason, Headers, L4};
use frame::{Building, Kind, ends_frame, is_right, kind, tcp_flags};
use table::{Table, flow_hash};

mod frame;
mod repeat;
mod table;
#[cfg(test)]
mod tests;

/// Most packets in one frame: the kernel's UDP_MAX_SEGMENTS was 64 until 6.9 (`include/linux/udp.h`), and it
/// refuses a longer frame whole.
pub const MAX_SEGMENTS: u16 = 64;

/// Most acknowledgements that become one; see [`Offloads::acks`].
pub const MAX_ACKS: u16 = 4;

/// Which of the caller's two buffers a packet is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Where datagrams were received: VXLAN needs no copy.
    Receive,
    /// Where WireGuard decrypted to.
    Plain,
}

/// The two buffers.
#[derive(Debug)]
pub struct Memory<'a> {
    /// [`Region::Receive`].
    pub receive: &'a mut [u8],
    /// [`Region::Plain`].
    pub plain: &'a mut [u8],
}

/// Bytes to gather.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where they are.
    pub region: Region,
    /// From here.
    pub offset: u32,
    /// This many.
    pub len: u32,
}

/// What may be joined; may change at any time, for what is pushed afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// TCP segments. The kernel must take TSO frames (TUN_F_TSO4, TUN_F_TSO6).
    pub tcp: bool,
    /// UDP datagrams. The kernel must take USO frames (TUN_F_USO4, TUN_F_USO6; 6.2).
    pub udp: bool,
    /// A pure TCP acknowledgement replaces the ones just before it, as `net/sched/sch_cake.c`'s ACK filter
    /// has it (RFC 3449 section 5.2.1). Any acknowledgement may be lost, and they are cumulative, so what
    /// counts is that no signal is lost that lives in their number or in the single one:
    /// - duplicates (same number) are counted by fast retransmit: never replaced;
    /// - SACK, and any option but timestamps, is kept; timestamps must be the same in both, so that the
    ///   echo by which a sender detects a needless retransmission (RFC 3522) survives;
    /// - ECE and CWR, and Accurate ECN's third bit, are kept;
    /// - the window is a level, not an event: the sender acts on the last one it saw, which stays. But a
    ///   window of zero, and the update that reopens it, are kept;
    /// - senders that let the congestion window grow by at most two segments for each acknowledgement
    ///   (RFC 3465) would grow more slowly, and a long silence makes bursts: so at most [`MAX_ACKS`] become
    ///   one. These came in one batch, microseconds apart; a receiver with GRO acknowledges more at once.
    ///
    /// Needs nothing from the kernel.
    pub acks: bool,
}

/// What is to be written to the TUN in one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The virtio header.
    pub vnet: [u8; VNET_HDR_LEN],
    /// The packet behind it.
    pub pieces: &'a [Piece],
    /// How many packets it is made of.
    pub packets: u16,
}

impl Frame<'_> {
    /// Length without the virtio header.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len as usize).sum()
    }

    /// Whether it has no bytes: it always has.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Copies the packet to the front of `out`, for a kernel that refuses joined frames: what stands there
    /// can be cut again with [`super::segment::SuperPacket`]. Returns its length; 0 if `out` is too short.
    pub fn gather(&self, memory: &Memory<'_>, out: &mut [u8]) -> usize {
        let mut len = 0;
        for piece in self.pieces {
            let end = len + piece.len as usize;
            let (Some(to), Some(from)) = (out.get_mut(len..end), memory.get(*piece)) else { return 0 };
            to.copy_from_slice(from);
            len = end;
        }
        len
    }
}

/// The first packet of a frame, before [`TunBatch::finish`].
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// Number of the frame, for [`TunBatch::discard`].
    pub index: usize,
    /// Where it is.
    pub piece: Piece,
    /// What [`super::parse()`] said of it.
    pub headers: &'a Headers,
    /// How many packets the frame is made of.
    pub packets: u16,
    /// How many bytes they had together.
    pub bytes: u32,
    /// What the caller gave with it.
    pub tag: u32,
}

/// Packets on their way to the TUN. Allocates when it is made and never after.
///
/// The packets of one flow stay in their order: a packet joins its flow's last frame or none, and frames go
/// out in the order in which they were begun.
#[derive(Debug)]
pub struct TunBatch {
    offloads: Offloads,
    capacity: usize,
    frames: Vec<Building>,
    items: Vec<Item>,
    /// The items in the order of the frames, once finished.
    pieces: Vec<Piece>,
    table: Table,
    /// The frame that took the last packet, as long as it may take the next; see [`TunBatch::repeat`].
    run: Option<u16>,
}

#[derive(Clone, Copy, Debug)]
struct Item {
    piece: Piece,
    next: u16,
}

const NONE: u16 = u16::MAX;

impl TunBatch {
    /// A batch of up to `packets` packets (at most 65,534); everything is switched off.
    pub fn new(packets: usize) -> TunBatch {
        let capacity = packets.clamp(1, usize::from(NONE) - 1);
        TunBatch {
            offloads: Offloads::default(),
            capacity,
            frames: Vec::with_capacity(capacity),
            items: Vec::with_capacity(capacity),
            pieces: Vec::with_capacity(capacity),
            table: Table::new(),
            run: None,
        }
    }

    /// Says what may be joined from now on.
    pub fn set_offloads(&mut self, offloads: Offloads) {
        // A protocol that is not looked at for a while must not find its old frames open afterwards.
        self.table.clear();
        self.run = None;
        self.offloads = offloads;
    }

    /// What may be joined.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Whether no packet has been pushed.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// How many more packets fit: write out and clear before there are too few.
    pub fn free(&self) -> usize {
        self.capacity - self.items.len()
    }

    /// Adds the packet at `offset`, of which [`super::parse()`] said `headers`; whether it joined a frame that
    /// was there already.
    pub fn push(
        &mut self,
        region: Region,
        offset: u32,
        headers: &Headers,
        memory: &Memory<'_>,
    ) -> Result<bool, DropReason> {
        self.push_tagged(region, offset, headers, memory, 0)
    }

    /// The same, with a number that tells the caller where the packet came from: only packets with the same
    /// one join, and [`Head::tag`] gives it back.
    pub fn push_tagged(
        &mut self,
        region: Region,
        offset: u32,
        headers: &Headers,
        memory: &Memory<'_>,
        tag: u32,
    ) -> Result<bool, DropReason> {
        self.run = None;
        if self.free() == 0 {
            return Err(DropReason::NoBuffer);
        }
        let piece = Piece { region, offset, len: headers.total_len };
        let packet = memory.get(piece).ok_or(DropReason::Truncated)?;
        let kind = kind(packet, headers, self.offloads);
        let Some(hash) = self.hash(headers) else {
            self.begin(piece, packet, headers, 0, Kind::Alone, tag);
            return Ok(false);
        };
        let open = self.table.find(hash, headers, &self.frames);
        let joined = match open {
            Some((_, index)) if kind != Kind::Alone && self.frames[usize::from(index)].tag == tag => {
                self.join(index, kind, piece, packet, headers, memory)
            }
            Some(_) | None => Joined::Refused,
        };
        match joined {
            Joined::Open => self.run = open.map(|(_, index)| index),
            Joined::Closed => self.table.forget(open),
            Joined::Refused | Joined::Damaged => {
                self.table.forget(open);
                let kind = if joined == Joined::Damaged { Kind::Alone } else { kind };
                self.begin(piece, packet, headers, hash, kind, tag);
                let index = (self.frames.len() - 1) as u16;
                if kind != Kind::Alone && !ends_frame(headers) {
                    self.table.remember(hash, index);
                    self.run = Some(index);
                }
            }
        }
        Ok(matches!(joined, Joined::Open | Joined::Closed))
    }

    /// What comes next is no repetition of what was pushed: another packet came in between, or judgements change.
    pub fn end_run(&mut self) {
        self.run = None;
    }

    /// Adds a packet that needs nothing more, with the virtio header that belongs to it: `packets` in one.
    pub fn push_ready(
        &mut self,
        piece: Piece,
        headers: &Headers,
        memory: &Memory<'_>,
        vnet: VnetHdr,
        packets: u16,
    ) -> Result<(), DropReason> {
        self.run = None;
        if self.free() == 0 {
            return Err(DropReason::NoBuffer);
        }
        let packet = memory.get(piece).ok_or(DropReason::Truncated)?;
        // What it might have overtaken stays before it.
        if let Some(hash) = self.hash(headers) {
            let open = self.table.find(hash, headers, &self.frames);
            self.table.forget(open);
        }
        self.begin(piece, packet, headers, 0, Kind::Ready, 0);
        if let Some(frame) = self.frames.last_mut() {
            (frame.vnet, frame.packets) = (vnet, packets);
        }
        Ok(())
    }

    /// The first packet of each frame, in order.
    pub fn heads(&self) -> impl Iterator<Item = Head<'_>> {
        (0..self.frames.len()).filter_map(|index| self.head(index))
    }

    /// Number of frames begun, discarded ones included: [`Head::index`] is below it.
    pub fn count(&self) -> usize {
        self.frames.len()
    }

    /// The first packet of one frame; `None` when there is no such frame or it was discarded.
    pub fn head(&self, index: usize) -> Option<Head<'_>> {
        let frame = self.frames.get(index).filter(|frame| frame.kind != Kind::Discarded)?;
        let piece = self.items[usize::from(frame.first)].piece;
        let Building { headers, packets, bytes, tag, .. } = frame;
        Some(Head { index, piece, headers, packets: *packets, bytes: *bytes, tag: *tag })
    }

    /// Takes a frame out of the batch.
    pub fn discard(&mut self, index: usize) {
        self.run = None;
        if let Some(frame) = self.frames.get_mut(index) {
            frame.kind = Kind::Discarded;
        }
    }

    /// Ends the batch: nothing joins any more, headers are complete.
    pub fn finish(&mut self, memory: &mut Memory<'_>) {
        self.table.clear();
        self.run = None;
        self.pieces.clear();
        for frame in &mut self.frames {
            if frame.kind == Kind::Discarded {
                continue;
            }
            let from = self.pieces.len() as u32;
            let mut next = frame.first;
            while let Some(item) = self.items.get(usize::from(next)) {
                self.pieces.push(item.piece);
                next = item.next;
            }
            frame.pieces = (from, self.pieces.len() as u32);
            let first = self.items[usize::from(frame.first)].piece;
            if let Some(packet) = memory.get_mut(first) {
                frame.complete(packet);
            }
        }
    }

    /// What goes to the TUN, in order; nothing before [`finish`](TunBatch::finish).
    pub fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        self.frames.iter().filter(|frame| frame.kind != Kind::Discarded).filter_map(|frame| {
            let pieces = self.pieces.get(frame.pieces.0 as usize..frame.pieces.1 as usize)?;
            let Building { vnet, packets, .. } = frame;
            let frame = Frame { vnet: vnet.encode(), pieces, packets: *packets };
            (!pieces.is_empty()).then_some(frame)
        })
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.items.clear();
        self.pieces.clear();
        self.table.clear();
        self.run = None;
    }

    /// The flow's hash, if packets of its protocol are looked at all.
    fn hash(&self, headers: &Headers) -> Option<u32> {
        let Offloads { tcp, udp, acks } = self.offloads;
        match headers.l4 {
            L4::Tcp { .. } if tcp || acks => Some(flow_hash(headers)),
            L4::Udp { .. } if udp => Some(flow_hash(headers)),
            L4::Tcp { .. } | L4::Udp { .. } => None,
            L4::Sctp { .. } | L4::Icmp { .. } | L4::Other | L4::None => None,
        }
    }

    fn begin(&mut self, piece: Piece, packet: &[u8], headers: &Headers, hash: u32, kind: Kind, tag: u32) {
        let item = self.items.len() as u16;
        self.items.push(Item { piece, next: NONE });
        let mut frame = Building::new(kind, hash, item, packet, headers);
        frame.tag = tag;
        self.frames.push(frame);
    }

    fn join(
        &mut self,
        index: u16,
        kind: Kind,
        piece: Piece,
        packet: &[u8],
        headers: &Headers,
        memory: &Memory<'_>,
    ) -> Joined {
        let frame = &mut self.frames[usize::from(index)];
        let Some(head) = memory.get(self.items[usize::from(frame.first)].piece) else {
            return Joined::Refused;
        };
        let fits = match (frame.kind, kind) {
            (Kind::Tcp, Kind::Tcp) => frame.takes_segment(head, packet, headers),
            (Kind::Ack, Kind::Ack) => frame.takes_ack(head, packet, headers),
            (Kind::Udp, Kind::Udp) => frame.takes_datagram(head, packet, headers),
            (Kind::Alone | Kind::Ready | Kind::Tcp | Kind::Ack | Kind::Udp | Kind::Discarded, _) => false,
        };
        // The kernel takes a joined frame's checksums on trust.
        if !fits || !frame.is_right(head) {
            return Joined::Refused;
        }
        if !is_right(packet, headers) {
            return Joined::Damaged;
        }
        frame.packets += 1;
        frame.bytes += headers.total_len;
        if kind == Kind::Ack {
            frame.headers = *headers;
            frame.total_len = headers.total_len;
            self.items[usize::from(frame.first)].piece = piece;
            return if frame.packets == MAX_ACKS { Joined::Closed } else { Joined::Open };
        }
        let skip = headers.payload_offset() as u32;
        let len = headers.total_len - skip;
        let item = self.items.len() as u16;
        self.items.push(Item { piece: Piece { offset: piece.offset + skip, len, ..piece }, next: NONE });
        self.items[usize::from(frame.last)].next = item;
        frame.last = item;
        if frame.extend(len, tcp_flags(headers)) { Joined::Open } else { Joined::Closed }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Joined {
    /// And more may follow.
    Open,
    /// As the last.
    Closed,
    /// It begins a frame of its own.
    Refused,
    /// It goes alone, for the kernel to judge.
    Damaged,
}

impl Memory<'_> {
    /// The bytes of a piece, if they are there.
    pub fn get(&self, piece: Piece) -> Option<&[u8]> {
        let from = piece.offset as usize;
        let range = from..from + piece.len as usize;
        match piece.region {
            Region::Receive => self.receive.get(range),
            Region::Plain => self.plain.get(range),
        }
    }

    /// The same, to be rewritten.
    pub fn get_mut(&mut self, piece: Piece) -> Option<&mut [u8]> {
        let from = piece.offset as usize;
        let range = from..from + piece.len as usize;
        match piece.region {
            Region::Receive => self.receive.get_mut(range),
            Region::Plain => self.plain.get_mut(range),
        }
    }
}
