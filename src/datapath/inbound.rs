//! From a peer to the TUN, in the order of the map in [`super`].

use std::time::Instant;

use super::{Arrival, Exit, Lane, Output, Total};
use crate::packet::checksum::complete_owed;
use crate::packet::coalesce::{Memory, Region};
use crate::packet::icmp::{IcmpError, MAX_ANSWER};
use crate::packet::rewrite::{self, ChecksumState};
use crate::packet::vnet::VnetHdr;
use crate::packet::{DropReason, parse};
use crate::snapshot::{Encap, PeerId, Snapshot};
use crate::tunnel::{vxlan_link, wireguard};

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
        while at < end {
            let len = arrival.stride.max(1).min(end - at);
            self.counters.add(Total::DatagramsReceived, 1);
            if let Err(reason) = self.inbound(now, snapshot, &arrival, at, len, receive, out) {
                self.counters.count_drop(reason);
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
    ) -> Result<(), DropReason> {
        // 1 open
        let datagram = &receive[at..at + len];
        let opened = match arrival.encap {
            Encap::WireGuard => self.open_wireguard(now, snapshot, arrival, datagram, out)?,
            Encap::Vxlan => self.open_vxlan(now, snapshot, arrival, datagram, at, out)?,
        };
        let Some(inner) = opened else { return Ok(()) };
        self.deliver(now, snapshot, inner, receive, out)
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
        let packet = match inner.region {
            Region::Plain => &mut out.plain[inner.offset..inner.offset + inner.len],
            Region::Receive => &mut receive[inner.offset..inner.offset + inner.len],
        };
        // 2 parse
        let headers = parse(packet)?;

        // 3 admit
        let exit = self.routes.inbound(inner.peer, headers.source, headers.destination)?;

        // 4 hop: a node is one hop. The kernel takes it where it forwards from the TUN, and tells the sender
        // when none is left; what goes out again by a tunnel never passes there.
        match exit {
            Exit::LocalPod | Exit::LocalNode | Exit::Outside => {}
            Exit::Peer(to) => return self.pass_on(now, snapshot, inner, to, receive, out),
        }
        // What another kernel's VXLAN sends within one host may still owe its checksum.
        if inner.region == Region::Receive {
            complete_owed(packet, &headers);
        }
        if let Some(peer) = snapshot.mesh.peer(inner.peer) {
            self.clamp(packet, &headers, peer.mtu, ChecksumState::Complete);
        }

        // 5 join
        let used = if inner.region == Region::Plain { inner.len } else { 0 };
        let memory = &Memory { receive, plain: &mut out.plain };
        let joined = out.tun.push(inner.region, inner.offset as u32, &headers, memory)?;
        out.plain_used += used;
        self.count_received(now, inner.peer, headers.total_len);
        // The head of a frame is tracked with the frame; what opens or ends a connection may stand behind it.
        if joined {
            self.track_control(now, &headers, inner.peer);
        }
        Ok(())
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

    /// Ends the TUN batch: tracks each frame's flow and completes the joined headers.
    pub fn finish_tun(&mut self, now: Instant, snapshot: &Snapshot, receive: &mut [u8], out: &mut Output) {
        for head in out.tun.heads() {
            // 6 track
            self.track_frame(now, snapshot, &head);
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
