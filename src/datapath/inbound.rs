//! From a peer to the TUN, in the order of the map in [`super`].

use std::time::Instant;

use super::conntrack::{FlowKey, FlowState, Tracked};
use super::fragments::Datagram;
use super::route::{Entrance, untranslated};
use super::service::{Passage, opens};
use super::{Arrival, Exit, Lane, Output, Total};
use crate::packet::checksum::complete_owed;
use crate::packet::coalesce::{Memory, Region};
use crate::packet::icmp::{IcmpError, MAX_ANSWER};
use crate::packet::rewrite::{self, ChecksumState};
use crate::packet::vnet::VnetHdr;
use crate::packet::{DropReason, Fragment, Headers, L4, parse};
use crate::snapshot::service::{Listen, Protocol, loop_address};
use crate::snapshot::{Encap, Owner, PeerId, Snapshot};
use crate::tunnel::vxlan::HEADER;
use crate::tunnel::{vxlan_link, wireguard};

/// The tag of frames that need nothing more: of our own making, or translated already. Others have their peer's
/// number + 1.
const OWN: u32 = 0;
/// In a tag: only as packets of a flow that is translated here may they pass.
const MUST_TRANSLATE: u32 = 1 << 31;

/// How a packet of a peer may come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// As it is.
    AsItIs,
    /// Only as a packet of a flow that is translated here.
    Translated,
}

/// A packet that came out of a tunnel, and where it stands.
#[derive(Clone, Copy)]
struct Inner {
    peer: PeerId,
    region: Region,
    offset: usize,
    len: usize,
}

impl Inner {
    fn bytes<'a>(&self, receive: &'a [u8], plain: &'a [u8]) -> &'a [u8] {
        let range = self.offset..self.offset + self.len;
        match self.region {
            Region::Plain => &plain[range],
            Region::Receive => &receive[range],
        }
    }

    fn bytes_mut<'a>(&self, receive: &'a mut [u8], plain: &'a mut [u8]) -> &'a mut [u8] {
        let range = self.offset..self.offset + self.len;
        match self.region {
            Region::Plain => &mut plain[range],
            Region::Receive => &mut receive[range],
        }
    }
}

/// The tag of what a peer sent.
fn tag_of(peer: PeerId, entry: Entry) -> u32 {
    (peer.0 + 1) | if entry == Entry::Translated { MUST_TRANSLATE } else { 0 }
}

impl Lane {
    /// Takes datagrams that arrived; `receive` is the receive buffer they stand in. Frames for the TUN
    /// refer to it, so they are to be written before it is received into again.
    pub fn handle_udp(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        arrival: Arrival,
        receive: &mut [u8],
        out: &mut Output,
    ) {
        self.follow(&snapshot.mesh);
        let end = (arrival.offset + arrival.len).min(receive.len());
        let mut at = arrival.offset;
        // Of a run of VXLAN: the datagram before, and whose it was.
        let mut before = None;
        while at < end {
            let len = arrival.stride.max(1).min(end - at);
            self.counters.add(Total::DatagramsReceived, 1);
            if !self.repeats(now, before, at, len, receive, out) {
                let delivered = self.inbound(now, snapshot, &arrival, at, len, receive, out);
                let peer = delivered.unwrap_or_else(|reason| {
                    self.counters.count_drop(reason);
                    None
                });
                before = peer.filter(|_| arrival.encap == Encap::Vxlan).map(|peer| (at, peer));
            }
            at += len;
        }
        self.count_waited(now);
    }

    #[allow(clippy::too_many_arguments)] // one datagram and everything that is known about it
    fn inbound(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        arrival: &Arrival,
        at: usize,
        len: usize,
        receive: &mut [u8],
        out: &mut Output,
    ) -> Result<Option<PeerId>, DropReason> {
        // 1 open
        let datagram = &receive[at..at + len];
        let opened = match arrival.encap {
            Encap::WireGuard => self.open_wireguard(now, snapshot, arrival, datagram, out)?,
            Encap::Vxlan => self.open_vxlan(now, snapshot, arrival, datagram, at, out)?,
        };
        let Some(inner) = opened else { return Ok(None) };
        if !self.repeats_inside(now, inner, receive, out) {
            self.deliver(now, snapshot, inner, receive, out)?;
        }
        Ok(Some(inner.peer))
    }

    /// Takes a datagram of the same message that repeats the headers of the one before, VXLAN's and all within:
    /// nothing about it is new but its payload. Says whether it was one.
    fn repeats(
        &mut self,
        now: Instant,
        before: Option<(usize, PeerId)>,
        at: usize,
        len: usize,
        receive: &mut [u8],
        out: &mut Output,
    ) -> bool {
        let Some((before, peer)) = before else { return false };
        let same = receive.get(before..before + HEADER) == receive.get(at..at + HEADER);
        if !same || len <= HEADER {
            return false;
        }
        let inner = Inner { peer, region: Region::Receive, offset: at + HEADER, len: len - HEADER };
        self.repeats_inside(now, inner, receive, out)
    }

    /// The same for what has been opened: parsed, admitted and joined as the packet before it.
    fn repeats_inside(&mut self, now: Instant, inner: Inner, receive: &mut [u8], out: &mut Output) -> bool {
        let Inner { peer, region, offset, len } = inner;
        let memory = &Memory { receive, plain: &mut out.plain };
        let Some(bytes) = out.tun.repeat(region, offset, len, memory, tag_of(peer, Entry::AsItIs)) else {
            return false;
        };
        out.plain_used += if region == Region::Plain { len } else { 0 };
        self.count_received(now, peer, bytes);
        true
    }

    fn open_wireguard(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        arrival: &Arrival,
        datagram: &[u8],
        out: &mut Output,
    ) -> Result<Option<Inner>, DropReason> {
        let offset = out.plain_used;
        let room = out.plain.get_mut(offset..).unwrap_or_default();
        match self.wireguard.open(now, &snapshot.mesh, arrival.from, datagram, room, &mut out.tx) {
            wireguard::Opened::Packet { peer, len } => {
                Ok(Some(Inner { peer, region: Region::Plain, offset, len }))
            }
            wireguard::Opened::Control => Ok(None),
            wireguard::Opened::Drop(reason) => Err(reason),
        }
    }

    fn open_vxlan(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        arrival: &Arrival,
        datagram: &[u8],
        at: usize,
        out: &mut Output,
    ) -> Result<Option<Inner>, DropReason> {
        match self.vxlan.open(now, snapshot, arrival.from, datagram, &mut out.tx) {
            vxlan_link::Opened::Packet { peer, offset } => Ok(Some(Inner {
                peer,
                region: Region::Receive,
                offset: at + offset,
                len: datagram.len() - offset,
            })),
            vxlan_link::Opened::Answered => {
                self.counters.add(Total::NeighboursAnswered, 1);
                Ok(None)
            }
            vxlan_link::Opened::Learnt => Ok(None),
            vxlan_link::Opened::Drop(reason) => Err(reason),
        }
    }

    fn deliver(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        inner: Inner,
        receive: &mut [u8],
        out: &mut Output,
    ) -> Result<(), DropReason> {
        // What comes after it repeats this one, or nothing.
        out.tun.end_run();
        // 2 parse
        let packet = inner.bytes_mut(receive, &mut out.plain);
        let mut headers = parse(packet)?;

        // 3 admit
        if headers.fragment != Fragment::None || matches!(headers.l4, L4::Icmp { .. }) {
            return self.deliver_oddly(now, snapshot, inner, headers, receive, out);
        }
        let exit = self.routes.inbound(inner.peer, headers.source, headers.destination);
        let entry = match exit.and_then(|exit| untranslated(Entrance::Peer, exit)) {
            Ok(_) => Entry::AsItIs,
            Err(DropReason::NotOurs) => self.entry_of_answer(now, &headers)?,
            Err(DropReason::SpoofedSource) => self.entry_of_stranger(now, snapshot, inner.peer, &headers)?,
            Err(reason) => return Err(reason),
        };

        // 4 hop: a node is one hop. The kernel takes it where it forwards from the TUN, and tells the sender
        // when none is left; what goes out again by a tunnel never passes there.
        self.make_ready(snapshot, inner, packet, &headers);

        // 5 join
        self.join(now, inner, &mut headers, tag_of(inner.peer, entry), receive, out)
    }

    /// What another kernel's VXLAN sends within one host may still owe its checksum; and what our peers
    /// offer must fit our way to them.
    fn make_ready(&self, snapshot: &Snapshot, inner: Inner, packet: &mut [u8], headers: &Headers) {
        if inner.region == Region::Receive {
            complete_owed(packet, headers);
        }
        if let Some(peer) = snapshot.mesh.peer(inner.peer) {
            self.clamp(packet, headers, peer.mtu, ChecksumState::Complete);
        }
    }

    fn join(
        &mut self,
        now: Instant,
        inner: Inner,
        headers: &mut Headers,
        tag: u32,
        receive: &mut [u8],
        out: &mut Output,
    ) -> Result<(), DropReason> {
        let used = if inner.region == Region::Plain { inner.len } else { 0 };
        let memory = &Memory { receive, plain: &mut out.plain };
        let joined = out.tun.push_tagged(inner.region, inner.offset as u32, headers, memory, tag)?;
        out.plain_used += used;
        self.count_received(now, inner.peer, headers.total_len);
        // The head of a frame is tracked with the frame; what opens or ends a connection may stand behind it.
        if joined {
            self.track_control(now, headers, inner.peer);
        }
        Ok(())
    }

    /// A packet to an address outside: the answer to a client of ours, if it is one.
    fn entry_of_answer(&mut self, now: Instant, headers: &Headers) -> Result<Entry, DropReason> {
        let key = FlowKey::of(headers).ok_or(DropReason::NotOurs)?;
        let known = self.flows.peek(self.boot_ms(now), &key).filter(|tracked| tracked.rewrite.is_some());
        known.map(|_| Entry::Translated).ok_or(DropReason::NotOurs)
    }

    /// A packet whose source is not the peer's: a client from outside whom that node sent to an endpoint of
    /// ours, if it is one. Never a source that is somebody's in the mesh.
    fn entry_of_stranger(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        peer: PeerId,
        headers: &Headers,
    ) -> Result<Entry, DropReason> {
        let spoofed = Err(DropReason::SpoofedSource);
        let Some(key) = FlowKey::of(headers) else { return spoofed };
        let routes = &snapshot.mesh.routes;
        let ours = matches!(routes.lookup(key.destination), Some(Owner::LocalPod | Owner::LocalNode));
        if !ours || routes.lookup(key.source).is_some() || key.source == loop_address(key.source) {
            return spoofed;
        }
        match self.flows.peek(self.boot_ms(now), &key) {
            Some(tracked) if tracked.peer == Some(peer) && tracked.from_peer => Ok(Entry::AsItIs),
            // The same client by two nodes at once, with one port, to one endpoint: the first has it, as long
            // as it is there.
            Some(tracked) if !self.may_be_replaced(now, snapshot, &tracked, headers) => spoofed,
            found => {
                if let Some(tracked) = found {
                    self.flows.remove(tracked.flow);
                }
                let listen =
                    |protocol| Listen { address: key.destination, protocol, port: key.destination_port };
                let exposed = Protocol::of(key.protocol).map(listen);
                let exposed = exposed.is_some_and(|listen| snapshot.services.is_exposed(&listen));
                if exposed { Ok(Entry::AsItIs) } else { spoofed }
            }
        }
    }

    /// Whether a flow gives way to the same one by another node: it is over or never began, its node is gone, or
    /// its client has been silent and begins anew.
    fn may_be_replaced(
        &self,
        now: Instant,
        snapshot: &Snapshot,
        tracked: &Tracked,
        headers: &Headers,
    ) -> bool {
        const SILENT: u64 = 1_000;
        let over = match tracked.state {
            FlowState::SynSent | FlowState::TimeWait | FlowState::Close => true,
            FlowState::FinWait | FlowState::CloseWait | FlowState::LastAck => opens(headers),
            FlowState::Unreplied | FlowState::Replied | FlowState::Stream => false,
            FlowState::SynRecv | FlowState::Established => false,
        };
        let gone = tracked.peer.is_none_or(|peer| snapshot.mesh.peer(peer).is_none());
        let record = self.flows.record(tracked.flow);
        let silent = record.is_none_or(|record| self.boot_ms(now).saturating_sub(record.seen) > SILENT);
        tracked.from_peer && (over || gone || (silent && opens(headers)))
    }

    /// Packets that do not show their own flow, or not all of it; translated here, one by one.
    fn deliver_oddly(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        inner: Inner,
        mut headers: Headers,
        receive: &mut [u8],
        out: &mut Output,
    ) -> Result<(), DropReason> {
        let packet = inner.bytes_mut(receive, &mut out.plain);
        let datagram = Datagram::of(&headers, Some(inner.peer));
        let (decision, waited) = match datagram.map(|datagram| (headers.fragment, datagram)) {
            None | Some((Fragment::None, _)) => {
                (self.decide_inbound(now, snapshot, inner.peer, packet, &headers), Vec::new())
            }
            Some((Fragment::First { .. }, datagram)) => {
                let decision = self.decide_inbound(now, snapshot, inner.peer, packet, &headers);
                (decision, self.fragments.decide(now, datagram, decision))
            }
            Some((Fragment::Later { .. }, datagram)) => match self.fragments.decision(&datagram) {
                Some(decision) => (decision, Vec::new()),
                None => return self.fragments.wait(now, datagram, packet),
            },
        };
        let mut result = decision.and_then(|passage| {
            let packet = inner.bytes_mut(receive, &mut out.plain);
            self.make_ready(snapshot, inner, packet, &headers);
            if let Some(change) = passage.change {
                rewrite::rewrite(packet, &mut headers, &change, ChecksumState::Complete)?;
            }
            match passage.exit {
                Exit::LocalPod | Exit::LocalNode | Exit::Outside => {
                    self.join(now, inner, &mut headers, OWN, receive, out)
                }
                Exit::Peer(to) => self.pass_on(now, snapshot, inner, to, receive, out),
            }
        });
        for later in waited {
            if let Err(reason) = self.deliver_waited(now, snapshot, inner.peer, &later, receive, out) {
                result = self.also(result, reason);
            }
        }
        result
    }

    fn deliver_waited(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        peer: PeerId,
        packet: &[u8],
        receive: &mut [u8],
        out: &mut Output,
    ) -> Result<(), DropReason> {
        let offset = out.plain_used;
        let room = out.plain.get_mut(offset..offset + packet.len()).ok_or(DropReason::NoBuffer)?;
        room.copy_from_slice(packet);
        let inner = Inner { peer, region: Region::Plain, offset, len: packet.len() };
        self.deliver_oddly(now, snapshot, inner, parse(packet)?, receive, out)
    }

    fn decide_inbound(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        peer: PeerId,
        packet: &mut [u8],
        headers: &Headers,
    ) -> Result<Passage, DropReason> {
        let about = self.about(now, packet, headers)?;
        let raw = self.routes.inbound(peer, headers.source, headers.destination);
        let plain = raw.and_then(|exit| untranslated(Entrance::Peer, exit));
        if let Some(about) = about {
            // Whoever is on the way may speak about a flow that this peer has with us.
            // It goes no further than that flow's packets would.
            let ends = about.change.is_some() || snapshot.mesh.is_ours(headers.destination);
            return match plain {
                Err(reason) if about.tracked.peer != Some(peer) || !ends => Err(reason),
                Ok(_) | Err(_) => Ok(Passage { change: about.change, exit: about.exit(snapshot, headers) }),
            };
        }
        let entry = match plain {
            Ok(_) => Entry::AsItIs,
            Err(DropReason::NotOurs) => self.entry_of_answer(now, headers)?,
            Err(DropReason::SpoofedSource) => self.entry_of_stranger(now, snapshot, peer, headers)?,
            Err(reason) => return Err(reason),
        };
        let change = self.track_from_peer(now, headers, 1, peer, entry == Entry::Translated)?;
        // For the kernel, as the joined frames.
        Ok(Passage { change, exit: Exit::LocalNode })
    }

    /// From one peer's tunnel into another's, as a router.
    fn pass_on(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        inner: Inner,
        to: PeerId,
        receive: &[u8],
        out: &mut Output,
    ) -> Result<(), DropReason> {
        // A copy, because both buffers stay borrowed while a packet is sent; no peer does this by the dozen.
        let mut packet = inner.bytes(receive, &out.plain).to_vec();
        let mut headers = parse(&packet)?;
        if headers.hop_limit <= 1 {
            self.tell_peer(now, snapshot, inner, IcmpError::TimeExceeded, receive, out);
            return Err(DropReason::HopLimit);
        }
        rewrite::decrement_hop_limit(&mut packet)?;
        headers.hop_limit -= 1;
        complete_owed(&mut packet, &headers);
        self.count_received(now, inner.peer, headers.total_len);
        self.send_to_peer(now, snapshot, to, &VnetHdr::default(), &mut packet, &headers, out)
    }

    fn count_received(&mut self, now: Instant, peer: PeerId, bytes: u32) {
        self.counters.add(Total::PacketsReceived, 1);
        if let Some(traffic) = self.traffic.get_mut(peer.0 as usize) {
            traffic.packets_received += 1;
            traffic.bytes_received += u64::from(bytes);
            traffic.last_received = Some(now);
        }
    }

    /// Ends the TUN batch: tracks and translates each frame's flow and completes the joined headers.
    pub fn finish_tun(&mut self, now: Instant, receive: &mut [u8], out: &mut Output) {
        for index in 0..out.tun.count() {
            let Some(head) = out.tun.head(index) else { continue };
            if head.tag == OWN {
                continue;
            }
            // 6 translate
            let (piece, packets) = (head.piece, usize::from(head.packets));
            let mut headers = Headers { total_len: head.bytes, ..*head.headers };
            let (peer, known) = (PeerId((head.tag & !MUST_TRANSLATE) - 1), head.tag & MUST_TRANSLATE != 0);
            let changed = match self.track_from_peer(now, &headers, packets, peer, known) {
                Ok(None) => Ok(()),
                Ok(Some(change)) => {
                    let mut memory = Memory { receive, plain: &mut out.plain };
                    headers.total_len = piece.len;
                    memory.get_mut(piece).ok_or(DropReason::Truncated).and_then(|packet| {
                        rewrite::rewrite(packet, &mut headers, &change, ChecksumState::Complete)
                    })
                }
                Err(reason) => Err(reason),
            };
            if let Err(reason) = changed {
                out.tun.discard(index);
                self.counters.count_drops(reason, packets);
            }
        }
        out.tun.finish(&mut Memory { receive, plain: &mut out.plain });
    }

    /// Answers the sender of a packet that came out of a tunnel with an ICMP error, through that tunnel.
    fn tell_peer(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        inner: Inner,
        error: IcmpError,
        receive: &[u8],
        out: &mut Output,
    ) {
        let mut room = [0; MAX_ANSWER];
        let packet = inner.bytes(receive, &out.plain);
        let Ok(headers) = parse(packet) else { return };
        let Some(answer) = self.icmp_error(now, snapshot, packet, &headers, error, &mut room) else { return };
        let Ok(headers) = parse(answer) else { return };
        let Some(peer) = snapshot.mesh.peer(inner.peer) else { return };
        let Some(encap) = peer.encap else { return };
        if let Err(reason) = self.seal(now, snapshot, peer, encap, &headers, &answer, out) {
            self.counters.count_drop(reason);
        }
    }
}
