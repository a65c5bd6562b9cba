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
    /// Which queue of the TUN it is for, where that is not the writer's own ([`TunBatch::lead`]).
    pub queue: Option<u8>,
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

    /// Whether no further packet fits: write out and clear first.
    pub fn is_full(&self) -> bool {
        self.items.len() >= self.capacity
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
        if self.is_full() {
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
        if self.is_full() {
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

    /// Says to which queue of the TUN a frame goes.
    pub fn lead(&mut self, index: usize, queue: u8) {
        if let Some(frame) = self.frames.get_mut(index) {
            frame.queue = Some(queue);
        }
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
            let Building { vnet, packets, queue, .. } = frame;
            let frame = Frame { vnet: vnet.encode(), pieces, packets: *packets, queue: *queue };
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

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::super::parse;
    use super::super::segment::kit::*;
    use super::super::segment::{SuperPacket, TCP_ACK, TCP_CWR, TCP_ECE, TCP_FIN, TCP_PSH, put};
    use super::super::vnet::{DATA_VALID, GSO_ECN, GSO_TCPV4, VnetHdr};
    use super::frame::{be32, tcp_flags};
    use super::*;
    use proptest::prelude::*;

    const ALL: Offloads = Offloads { tcp: true, udp: true, acks: true };
    const JOIN: Offloads = Offloads { tcp: true, udp: true, acks: false };

    /// A frame as the kernel would get it.
    #[derive(Clone, Debug, PartialEq)]
    struct Out {
        vnet: VnetHdr,
        packet: Vec<u8>,
        packets: u16,
    }

    /// Pushes packets, alternating between the two regions, and gathers what comes out: the same, whether or not
    /// runs take their short way.
    fn run(offloads: Offloads, packets: &[Vec<u8>], translate: impl Fn(&mut [u8])) -> Vec<Out> {
        let (plain, _) = run_by(false, offloads, packets, &translate);
        let (quick, _) = run_by(true, offloads, packets, &translate);
        assert_eq!(plain, quick);
        quick
    }

    /// Also says how many took it.
    fn run_by(
        quick: bool,
        offloads: Offloads,
        packets: &[Vec<u8>],
        translate: impl Fn(&mut [u8]),
    ) -> (Vec<Out>, usize) {
        let (mut receive, mut plain) = (vec![0xaa; 3], vec![0xbb; 7]);
        let mut places = Vec::new();
        for (i, packet) in packets.iter().enumerate() {
            let (region, buffer) =
                if i % 3 == 0 { (Region::Receive, &mut receive) } else { (Region::Plain, &mut plain) };
            places.push((region, buffer.len() as u32));
            buffer.extend(packet);
            buffer.extend([0xcc; 5]);
        }
        let mut memory = Memory { receive: &mut receive, plain: &mut plain };
        let mut batch = TunBatch::new(packets.len());
        batch.set_offloads(offloads);
        let mut repeated = 0;
        for ((region, offset), packet) in places.iter().zip(packets) {
            // What stands behind the packet does not count.
            let room = packet.len() + 5;
            assert_eq!(batch.repeat(*region, *offset as usize, room, &memory, 1), None, "another's");
            let short = if quick { batch.repeat(*region, *offset as usize, room, &memory, 0) } else { None };
            match short {
                Some(len) => {
                    assert_eq!(len as usize, packet.len());
                    repeated += 1;
                }
                None => {
                    batch.push(*region, *offset, &parse(packet).unwrap(), &memory).unwrap();
                }
            }
        }
        for index in 0..batch.count() {
            let piece = batch.head(index).unwrap().piece;
            translate(memory.get_mut(piece).unwrap());
        }
        assert_eq!(batch.frames().count(), 0);
        batch.finish(&mut memory);
        assert_eq!(
            batch.heads().map(|head| head.bytes as usize).sum::<usize>(),
            packets.iter().map(Vec::len).sum::<usize>()
        );
        let mut out = vec![0; 70_000];
        let frames = batch.frames().map(|frame| {
            let len = frame.gather(&memory, &mut out);
            assert_eq!(len, frame.len());
            let vnet = VnetHdr::decode(&frame.vnet).unwrap().0;
            Out { vnet, packet: out[..len].to_vec(), packets: frame.packets }
        });
        (frames.collect(), repeated)
    }

    fn join(packets: &[Vec<u8>]) -> Vec<u16> {
        run(ALL, packets, |_| ()).iter().map(|out| out.packets).collect()
    }

    fn cut(out: &Out) -> Vec<Vec<u8>> {
        let headers = parse(&out.packet).unwrap();
        let whole = SuperPacket::new(&out.vnet, &out.packet, &headers).unwrap();
        let mut buffer = vec![0; 70_000];
        (0..whole.count())
            .map(|i| {
                let len = whole.write(i, &mut buffer);
                buffer[..len].to_vec()
            })
            .collect()
    }

    /// Consecutive segments or datagrams.
    fn train(spec: &Spec, lens: &[usize]) -> Vec<Spec> {
        let mut at = 0;
        let mut specs = Vec::new();
        for (i, len) in lens.iter().enumerate() {
            specs.push(Spec {
                id: spec.id.wrapping_add(i as u16),
                seq: spec.seq.wrapping_add(at as u32),
                payload: payload(*len, i as u32),
                ..spec.clone()
            });
            at += len;
        }
        specs
    }

    fn built(specs: &[Spec]) -> Vec<Vec<u8>> {
        specs.iter().map(Spec::build).collect()
    }

    #[test]
    fn a_run_of_segments_becomes_the_super_packet_it_was() {
        for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
            let flags = if udp { 0 } else { TCP_ACK | TCP_PSH | TCP_FIN };
            let spec = Spec { v6, udp, flags, payload: payload(20_100, 8), ..Spec::default() };
            let mut packet = spec.build();
            let vnet = owed(&mut packet, 1200);
            let segments = cut(&Out { vnet, packet: packet.clone(), packets: 1 });
            let joined = run(JOIN, &segments, |_| ());
            let hdr_len = (packet.len() - spec.payload.len()) as u16;
            assert_eq!(joined, [Out { vnet: VnetHdr { hdr_len, ..vnet }, packet, packets: 17 }]);
        }
    }

    #[test]
    fn all_but_the_first_of_a_frame_take_the_short_way() {
        for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
            let spec = Spec { v6, udp, flags: if udp { 0 } else { TCP_ACK }, ..Spec::default() };
            let mut specs = train(&spec, &[100; 20]);
            assert_eq!(run_by(true, JOIN, &built(&specs), |_| ()).1, 19);
            // A flow in between ends the run, not the frame.
            specs.insert(10, Spec { source_port: 9, ..spec.clone() });
            let (out, repeated) = run_by(true, JOIN, &built(&specs), |_| ());
            assert_eq!((out.len(), repeated), (2, 18));
        }
    }

    #[test]
    fn pieces_lie_where_the_packets_came_in() {
        let specs = train(&Spec::default(), &[100, 100, 40]);
        let mut receive = built(&specs).concat();
        let headers: Vec<Headers> = specs.iter().map(|spec| parse(&spec.build()).unwrap()).collect();
        let mut memory = Memory { receive: &mut receive, plain: &mut [] };
        let mut batch = TunBatch::new(8);
        batch.set_offloads(JOIN);
        for (i, headers) in headers.iter().enumerate() {
            batch.push(Region::Receive, i as u32 * 152, headers, &memory).unwrap();
        }
        batch.finish(&mut memory);
        let pieces: Vec<(u32, u32)> = batch
            .frames()
            .flat_map(|f| f.pieces.iter().map(|p| (p.offset, p.len)).collect::<Vec<_>>())
            .collect();
        assert_eq!(pieces, [(0, 152), (204, 100), (356, 40)]);
        batch.clear();
        assert!(batch.is_empty() && batch.frames().next().is_none());
    }

    #[test]
    fn switched_off_every_packet_goes_alone_and_untouched() {
        let packets = built(&train(&Spec::default(), &[100, 100, 100]));
        let out = run(Offloads::default(), &packets, |_| ());
        assert_eq!(out.iter().map(|out| out.packet.clone()).collect::<Vec<_>>(), packets);
        assert!(out.iter().all(|out| out.vnet == VnetHdr::default()));
    }

    #[test]
    fn a_shorter_segment_a_push_and_a_fin_end_a_frame() {
        let specs = train(&Spec::default(), &[100, 100, 40, 100, 100, 120, 120]);
        assert_eq!(join(&built(&specs)), [3, 2, 2]);
        for flag in [TCP_PSH, TCP_FIN] {
            let mut specs = train(&Spec::default(), &[100; 4]);
            specs[1].flags |= flag;
            let out = run(ALL, &built(&specs), |_| ());
            assert_eq!(out.iter().map(|out| out.packets).collect::<Vec<_>>(), [2, 2]);
            assert_eq!(out[0].packet[33], TCP_ACK | flag);
        }
    }

    #[test]
    fn what_cutting_could_not_give_back_is_not_joined() {
        type Change = fn(&mut Spec);
        let changes: [Change; 14] = [
            |s| s.seq = s.seq.wrapping_add(1),
            |s| s.ack += 1,
            |s| s.window += 1,
            |s| s.flags |= TCP_ECE,
            |s| s.flags |= TCP_CWR,
            |s| s.flags |= 0x20,
            |s| s.options = timestamps(2, 2),
            |s| s.options = Vec::new(),
            |s| s.hop_limit -= 1,
            |s| s.traffic_class = 3,
            |s| s.dont_fragment = false,
            |s| s.source_port += 1,
            |s| s.payload.push(1),
            |s| s.ip_options = vec![1; 4],
        ];
        for (i, change) in changes.iter().enumerate() {
            for v6 in [false, true] {
                let mut specs = train(&Spec { v6, ..Spec::default() }, &[100, 100]);
                assert_eq!(join(&built(&specs)), [2]);
                change(&mut specs[1]);
                let same = v6 && matches!(i, 10 | 13);
                assert_eq!(join(&built(&specs)).len(), if same { 1 } else { 2 }, "change {i}, v6 {v6}");
            }
        }
    }

    #[test]
    fn identification_matters_where_fragmenting_is_allowed() {
        let spec = Spec { dont_fragment: false, ..Spec::default() };
        let mut specs = train(&spec, &[100; 3]);
        assert_eq!(join(&built(&specs)), [3]);
        specs[2].id += 1;
        assert_eq!(join(&built(&specs)), [2, 1]);
        let mut specs = train(&Spec::default(), &[100; 3]);
        specs[2].id = 7;
        assert_eq!(join(&built(&specs)), [3]);
    }

    #[test]
    fn cwr_stands_in_the_first_segment_only() {
        let mut specs = train(&Spec::default(), &[100; 4]);
        specs[2].flags |= TCP_CWR;
        let out = run(ALL, &built(&specs), |_| ());
        assert_eq!(out.iter().map(|out| out.packets).collect::<Vec<_>>(), [2, 2]);
        assert_eq!(out[1].vnet.gso_type, GSO_TCPV4 | GSO_ECN);
        assert_eq!(cut(&out[1]), built(&specs)[2..]);
    }

    #[test]
    fn a_wrong_checksum_is_left_to_the_kernel() {
        for udp in [false, true] {
            for bad in 0..3 {
                let mut packets = built(&train(&Spec { udp, ..Spec::default() }, &[100; 3]));
                packets[bad][70] ^= 1;
                let out = run(ALL, &packets, |_| ());
                let counts: Vec<u16> = out.iter().map(|out| out.packets).collect();
                assert_eq!(counts, [&[1, 2][..], &[1, 1, 1], &[2, 1]][bad]);
                let at = out.iter().position(|out| out.packet == packets[bad]).unwrap();
                assert_eq!(out[at].vnet, VnetHdr::default());
            }
        }
        let mut packets = built(&train(&Spec::default(), &[100; 2]));
        packets[1][10] ^= 1;
        assert_eq!(join(&packets), [1, 1], "IPv4 header checksum");
    }

    #[test]
    fn datagrams_without_checksum_or_bound_for_a_tunnel_go_alone() {
        let mut packets = built(&train(&Spec { udp: true, ..Spec::default() }, &[100; 2]));
        assert_eq!(join(&packets), [2]);
        for packet in &mut packets {
            put(packet, 26, [0, 0]);
        }
        assert_eq!(join(&packets), [1, 1]);
        let mut packets = built(&train(&Spec { udp: true, ..Spec::default() }, &[100; 2]));
        for packet in &mut packets {
            put(packet, 22, 4789u16.to_be_bytes());
            let headers = parse(packet).unwrap();
            fill_checksum(packet, &headers);
        }
        assert_eq!(join(&packets), [1, 1]);
    }

    #[test]
    fn a_frame_has_at_most_64_packets_and_64_kilobytes() {
        assert_eq!(join(&built(&train(&Spec::default(), &[10; 130]))), [64, 64, 2]);
        assert_eq!(join(&built(&train(&Spec { udp: true, ..Spec::default() }, &[10; 130]))), [64, 64, 2]);
        // 47 whole segments, and what is left of the largest packet the kernel cuts.
        let mut lens = [1368; 48];
        lens[47] = 65_535 - 52 - 47 * 1368;
        assert_eq!(join(&built(&train(&Spec::default(), &lens))), [48]);
        lens[47] += 1;
        assert_eq!(join(&built(&train(&Spec::default(), &lens))), [47, 1]);
    }

    #[test]
    fn translation_between_push_and_finish_reaches_the_whole_frame() {
        for v6 in [false, true] {
            let specs = train(&Spec { v6, ..Spec::default() }, &[100, 100, 40]);
            let out = run(ALL, &built(&specs), |packet| {
                let (address, port) = if v6 { (39, 42) } else { (19, 22) };
                packet[address] = 99;
                put(packet, port, 8080u16.to_be_bytes());
            });
            for segment in cut(&out[0]) {
                assert!(checksums_hold(&segment));
                let headers = parse(&segment).unwrap();
                assert_eq!(headers.ports(), Some((40_000, 8080)));
                assert!(headers.destination.to_string().ends_with(if v6 { ":63" } else { ".99" }));
            }
        }
    }

    #[test]
    fn a_first_fragment_closes_its_flow() {
        let spec = Spec { udp: true, ..Spec::default() };
        let mut packets = built(&train(&spec, &[96; 4]));
        packets[1][6] = 0x20;
        let checksum = !slow_sum(0, &[&packets[1][..10], &[0, 0], &packets[1][12..20]].concat());
        put(&mut packets[1], 10, checksum.to_be_bytes());
        assert_eq!(join(&packets), [1, 1, 2]);
    }

    #[test]
    fn acknowledgements_become_the_last_of_four() {
        let acks: Vec<Spec> = (0..6)
            .map(|i| Spec { ack: 1000 + 2736 * i, window: 500 + i as u16, ..Spec::default() })
            .collect();
        let out = run(ALL, &built(&acks), |_| ());
        assert_eq!(out.iter().map(|out| out.packets).collect::<Vec<_>>(), [4, 2]);
        assert_eq!(out[0].packet, acks[3].build());
        assert_eq!(out[1].packet, acks[5].build());
        assert!(out.iter().all(|out| out.vnet == VnetHdr { flags: DATA_VALID, ..VnetHdr::default() }));
        assert_eq!(run(JOIN, &built(&acks), |_| ()).len(), 6);
    }

    #[test]
    fn acknowledgements_that_say_more_are_kept() {
        type Change = fn(&mut [Spec]);
        let changes: [Change; 13] = [
            |s| s[1].ack = s[0].ack,
            |s| s[1].ack = s[0].ack.wrapping_sub(1),
            |s| s[1].ack = s[0].ack.wrapping_add((1 << 30) + 1),
            |s| s[1].seq += 1,
            |s| s[0].window = 0,
            |s| s[1].window = 0,
            |s| s[1].flags |= TCP_ECE,
            |s| s[0].flags |= TCP_ECE,
            |s| s[1].options = timestamps(1, 3),
            |s| s[1].hop_limit -= 1,
            |s| s[1].traffic_class = 3,
            |s| s[1].flags |= TCP_FIN,
            |s| {
                for spec in s {
                    spec.options = vec![1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2];
                }
            },
        ];
        for (i, change) in changes.iter().enumerate() {
            let mut acks = [1000, 2000].map(|ack| Spec { ack, ..Spec::default() });
            assert_eq!(join(&built(&acks)), [2]);
            change(&mut acks);
            assert_eq!(join(&built(&acks)), [1, 1], "change {i}");
        }
        let mut acks = built(&[1000, 2000].map(|ack| Spec { ack, ..Spec::default() }));
        acks[1][36] ^= 1;
        assert_eq!(join(&acks), [1, 1], "a damaged one must not replace a good one");
    }

    #[test]
    fn a_full_batch_and_a_place_outside_memory_are_refused() {
        let mut receive = Spec::default().build();
        let headers = parse(&receive).unwrap();
        let memory = Memory { receive: &mut receive, plain: &mut [] };
        let mut batch = TunBatch::new(1);
        assert_eq!(batch.push(Region::Plain, 0, &headers, &memory), Err(DropReason::Truncated));
        assert_eq!(batch.push(Region::Receive, 1, &headers, &memory), Err(DropReason::Truncated));
        assert_eq!(batch.push(Region::Receive, 0, &headers, &memory), Ok(false));
        assert_eq!(batch.push(Region::Receive, 0, &headers, &memory), Err(DropReason::NoBuffer));
    }

    #[test]
    fn a_discarded_frame_is_not_written() {
        let mut receive = Spec::default().build();
        let headers = parse(&receive).unwrap();
        let mut memory = Memory { receive: &mut receive, plain: &mut [] };
        let mut batch = TunBatch::new(4);
        batch.push(Region::Receive, 0, &headers, &memory).unwrap();
        batch.push(Region::Receive, 0, &headers, &memory).unwrap();
        batch.discard(0);
        batch.discard(9);
        batch.finish(&mut memory);
        assert_eq!((batch.heads().count(), batch.frames().count()), (1, 1));
        assert!(batch.head(0).is_none());
    }

    /// What stays the same when packets are joined and cut again: all but an atomic packet's number.
    fn lasting(packet: &[u8]) -> Vec<u8> {
        let mut packet = packet.to_vec();
        if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        }
        packet
    }

    fn flow(packet: &[u8]) -> (IpAddr, Option<(u16, u16)>, u8) {
        let headers = parse(packet).unwrap();
        (headers.source, headers.ports(), headers.protocol)
    }

    /// One step of a random conversation: which flow, what it sends.
    type Step = (u16, u8, u16, bool);

    /// Builds what `flows` senders, each in its own order, send.
    fn conversation(steps: &[Step]) -> Vec<Vec<u8>> {
        let mut next: std::collections::HashMap<u16, (u32, u32, u16)> = std::collections::HashMap::new();
        let mut packets = Vec::new();
        for (i, &(flow, action, len, odd)) in steps.iter().enumerate() {
            let (seq, ack, id) = next.entry(flow).or_insert((u32::from(flow) << 20, 5, flow));
            let len = if odd { usize::from(len) } else { 200 };
            let udp = flow % 3 == 1;
            let mut spec = Spec {
                v6: flow % 2 == 1,
                udp,
                source_port: flow,
                dont_fragment: flow % 5 != 0,
                seq: *seq,
                ack: *ack,
                id: *id,
                payload: payload(len, i as u32),
                ..Spec::default()
            };
            match action {
                0..=5 => {}
                6 => spec.flags |= TCP_PSH,
                7 => spec.flags |= TCP_ECE,
                8 => spec.flags |= TCP_CWR,
                9 => spec.seq = spec.seq.wrapping_sub(300),
                10 => spec.window += 1,
                11 => spec.hop_limit = 9,
                12 => spec.flags = 0x02,
                _ if udp => {}
                _ => {
                    spec.payload.clear();
                    spec.ack = spec.ack.wrapping_add(if odd { 0 } else { 1448 });
                }
            }
            *ack = spec.ack;
            *seq = seq.wrapping_add(spec.payload.len() as u32);
            *id = id.wrapping_add(1);
            let mut packet = spec.build();
            if action == 5 && odd {
                let last = packet.len() - 1;
                packet[last] ^= 0x10;
            }
            packets.push(packet);
        }
        packets
    }

    fn steps(flows: u16) -> impl Strategy<Value = Vec<Step>> {
        proptest::collection::vec((0..flows, 0u8..20, 1u16..300, proptest::bool::weighted(0.1)), 1..300)
    }

    proptest! {
        #[test]
        fn any_super_packet_survives(
            v6: bool, udp: bool, gso in 20u16..3000, count in 1usize..=64, last: u16, id: u16, seq: u32,
        ) {
            let len = (usize::from(gso) * (count - 1) + 1 + usize::from(last % gso)).min(65_000);
            let count = len.div_ceil(gso.into());
            let flags = if udp { 0 } else { TCP_ACK | TCP_PSH };
            let spec = Spec { v6, udp, id, seq, flags, payload: payload(len, seq), ..Spec::default() };
            let mut packet = spec.build();
            let vnet = owed(&mut packet, gso);
            let segments = cut(&Out { vnet, packet: packet.clone(), packets: 1 });
            let joined = run(ALL, &segments, |_| ());
            prop_assert_eq!(joined.len(), 1);
            prop_assert_eq!(usize::from(joined[0].packets), count);
            if count > 1 {
                prop_assert_eq!(&joined[0].packet, &packet);
                prop_assert_eq!(VnetHdr { hdr_len: 128, ..joined[0].vnet }, vnet);
            }
            prop_assert_eq!(cut(&joined[0]), segments);
        }

        #[test]
        fn every_flow_keeps_its_order_and_its_bytes(steps in prop_oneof![steps(3), steps(40), steps(2000)]) {
            let packets = conversation(&steps);
            let mut out: Vec<Vec<u8>> = run(JOIN, &packets, |_| ()).iter().flat_map(cut).collect();
            let mut sent = packets;
            // Stable: only the order inside a flow counts.
            out.sort_by_key(|packet| flow(packet));
            sent.sort_by_key(|packet| flow(packet));
            prop_assert_eq!(out.len(), sent.len());
            for (out, sent) in out.iter().zip(&sent) {
                prop_assert_eq!(lasting(out), lasting(sent));
            }
        }

        #[test]
        fn only_replaced_acknowledgements_are_missing(steps in steps(6)) {
            let packets = conversation(&steps);
            let mut out: Vec<Vec<u8>> = run(ALL, &packets, |_| ()).iter().flat_map(cut).collect();
            let mut sent = packets;
            out.sort_by_key(|packet| flow(packet));
            sent.sort_by_key(|packet| flow(packet));
            let mut out = out.iter().peekable();
            let mut missing = 0;
            for (i, packet) in sent.iter().enumerate() {
                if out.peek().is_some_and(|out| lasting(out) == lasting(packet)) {
                    out.next();
                    missing = 0;
                    continue;
                }
                missing += 1;
                prop_assert!(missing < MAX_ACKS);
                let (this, next) = (parse(packet).unwrap(), &sent[i + 1]);
                prop_assert_eq!(this.total_len as usize, this.payload_offset());
                prop_assert_eq!(tcp_flags(&this), TCP_ACK);
                prop_assert_eq!(flow(packet), flow(next));
                let next_headers = parse(next).unwrap();
                prop_assert_eq!(next_headers.total_len as usize, next_headers.payload_offset());
                prop_assert!(be32(next, &next_headers, 8) > be32(packet, &this, 8));
            }
            prop_assert_eq!(out.next(), None);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 60..400),
            shapes in proptest::collection::vec((0u8..6, 0usize..300, 0u16..120), 1..40),
            tcp: bool, udp: bool, acks: bool,
        ) {
            let mut batch = TunBatch::new(30);
            batch.set_offloads(Offloads { tcp, udp, acks });
            for (shape, at, len) in shapes {
                // Now and then something that gets past the first look.
                let Some(ip) = bytes.get_mut(at..) else { continue };
                match (shape, ip.len()) {
                    (0..=2, 20..) => {
                        ip[..4].copy_from_slice(&[0x45, 0, 0, len as u8]);
                        ip[6..10].copy_from_slice(&[0x40, 0, 9, [6, 17, 1][usize::from(shape)]]);
                    }
                    (3..=4, 40..) => {
                        ip[..4].copy_from_slice(&[0x60, 0, 0, 0]);
                        ip[4..8].copy_from_slice(&[0, len as u8, [6, 17][usize::from(shape) - 3], 9]);
                    }
                    (_, _) => {}
                }
                let Ok(headers) = parse(ip) else { continue };
                let memory = Memory { receive: &mut bytes, plain: &mut [] };
                let _ = batch.push(Region::Receive, at as u32, &headers, &memory);
            }
            let mut memory = Memory { receive: &mut bytes, plain: &mut [] };
            batch.finish(&mut memory);
            let mut out = [0; 2000];
            for frame in batch.frames() {
                frame.gather(&memory, &mut out);
            }
        }
    }
}
