//! From the TUN to a peer, in the order of the map in [`super`].

use std::time::Instant;

use super::{Exit, Lane, Output, Total};
use crate::packet::icmp::{self, IcmpError, MAX_ANSWER};
use crate::packet::rewrite::{self, ChecksumState};
use crate::packet::segment::{SuperPacket, fragment_v4, owes_checksum};
use crate::packet::vnet::VnetHdr;
use crate::packet::{DropReason, Headers, L4, parse};
use crate::snapshot::{Encap, Peer, PeerId, Snapshot};
use crate::tunnel::Segments;

/// IPv4 header and TCP header, without options: what an MSS leaves out (RFC 6691).
const TCP_V4: u16 = 40;
/// The same for IPv6.
const TCP_V6: u16 = 60;

impl Segments for SuperPacket<'_> {
    fn count(&self) -> usize {
        SuperPacket::count(self)
    }

    fn len(&self, index: usize) -> usize {
        SuperPacket::len(self, index)
    }

    fn write(&self, index: usize, out: &mut [u8]) -> usize {
        SuperPacket::write(self, index, out)
    }
}

impl Lane {
    /// Takes one frame that was read from the TUN: virtio header and packet, whole or super.
    pub fn handle_tun(&mut self, now: Instant, snapshot: &Snapshot, frame: &mut [u8], out: &mut Output) {
        self.follow(&snapshot.mesh);
        self.counters.add(Total::TunReads, 1);
        self.counters.add(Total::TunReadBytes, frame.len());
        if let Err(reason) = self.outbound(now, snapshot, frame, out) {
            self.counters.count_drop(reason);
        }
        self.count_waited(now);
    }

    fn outbound(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        frame: &mut [u8],
        out: &mut Output,
    ) -> Result<(), DropReason> {
        // 1 parse
        let (vnet, _) = VnetHdr::decode(frame)?;
        let packet = &mut frame[crate::packet::vnet::VNET_HDR_LEN..];
        let headers = parse(packet)?;

        // 2 route
        let exit = match self.routes.outbound(headers.source, headers.destination) {
            Ok(exit) => exit,
            Err(reason) => {
                if reason == DropReason::NoRoute {
                    self.tell_sender(now, snapshot, packet, &headers, IcmpError::HostUnreachable, out);
                }
                return Err(reason);
            }
        };
        match exit {
            Exit::Peer(peer) => self.send_to_peer(now, snapshot, peer, &vnet, packet, &headers, out),
            Exit::LocalPod | Exit::LocalNode | Exit::Outside => self.turn_round(&vnet, packet, &headers, out),
        }
    }

    /// Back into the TUN, for the kernel to forward. It takes a hop each time, so nothing turns for ever.
    fn turn_round(
        &mut self,
        vnet: &VnetHdr,
        packet: &[u8],
        headers: &Headers,
        out: &mut Output,
    ) -> Result<(), DropReason> {
        // Cut, and joined again as what comes from peers: then its checksums are right whoever gets it.
        let segments = SuperPacket::new(vnet, packet, headers)?;
        let mut result = Ok(());
        for i in 0..segments.count() {
            if let Err(reason) = out.turn_round(&segments, i) {
                result = self.also(result, reason);
            }
        }
        result
    }

    #[allow(clippy::too_many_arguments)] // one packet and everything that is known about it
    pub(super) fn send_to_peer(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        peer: PeerId,
        vnet: &VnetHdr,
        packet: &mut [u8],
        headers: &Headers,
        out: &mut Output,
    ) -> Result<(), DropReason> {
        let peer = snapshot.mesh.peer(peer).ok_or(DropReason::NoRoute)?;
        let encap = peer.encap.ok_or(DropReason::NoEncapsulation)?;

        // 3 fit
        let checksum = if owes_checksum(vnet) { ChecksumState::Partial } else { ChecksumState::Complete };
        self.clamp(packet, headers, peer.mtu, checksum);
        let segments = SuperPacket::new(vnet, packet, headers)?;
        let fits = segments.max_len() <= usize::from(peer.mtu);
        if !fits && headers.dont_fragment {
            let too_big = IcmpError::TooBig { mtu: peer.mtu };
            self.tell_sender(now, snapshot, packet, headers, too_big, out);
            return Err(DropReason::TooBig);
        }

        // 4 track
        self.track(now, headers, Some(peer.id), false, segments.count());

        // 5 seal
        if fits {
            return self.seal(now, snapshot, peer, encap, headers, &segments, out);
        }
        self.counters.add(Total::Fragmented, segments.count());
        let mut whole = std::mem::take(&mut self.scratch);
        let mut result = Ok(());
        for i in 0..segments.count() {
            let len = segments.write(i, &mut whole);
            let headers = match parse(&whole[..len]) {
                Ok(headers) => headers,
                Err(reason) => {
                    result = self.also(result, reason);
                    continue;
                }
            };
            let sealed = fragment_v4(&mut whole[..len], &headers, peer.mtu, |fragment| {
                if let Err(reason) = self.seal(now, snapshot, peer, encap, &headers, &fragment, out) {
                    result = self.also(result, reason);
                }
            });
            if let Err(reason) = sealed {
                result = self.also(result, reason);
            }
        }
        self.scratch = whole;
        result
    }

    /// One more drop: the caller counts one, those before it are counted here.
    fn also(&self, before: Result<(), DropReason>, reason: DropReason) -> Result<(), DropReason> {
        if let Err(before) = before {
            self.counters.count_drop(before);
        }
        Err(reason)
    }

    #[allow(clippy::too_many_arguments)] // as above
    pub(super) fn seal(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        peer: &Peer,
        encap: Encap,
        headers: &Headers,
        packets: &impl Segments,
        out: &mut Output,
    ) -> Result<(), DropReason> {
        let sealed = match encap {
            Encap::WireGuard => self.wireguard.seal(now, peer, packets, &mut out.tx),
            Encap::Vxlan => {
                let flow = headers.flow_hash(self.seed);
                let local = &snapshot.local;
                self.vxlan.seal(now, local, peer, flow, headers.destination, packets, &mut out.tx)
            }
        };
        let bytes = (0..sealed.sent).map(|i| packets.len(i)).sum();
        self.count_sent(now, peer.id, sealed.sent, bytes);
        let Some(reason) = sealed.refused else { return Ok(()) };
        // The caller counts one drop; the others are counted here.
        let dropped = packets.count().saturating_sub(sealed.sent + sealed.waiting);
        self.counters.count_drops(reason, dropped.saturating_sub(1));
        Err(reason)
    }

    /// Lowers the MSS that a SYN offers to what the path carries.
    pub(super) fn clamp(&self, packet: &mut [u8], headers: &Headers, mtu: u16, checksum: ChecksumState) {
        const SYN: u8 = 0x02;
        let L4::Tcp { flags, .. } = headers.l4 else { return };
        if flags & SYN == 0 {
            return;
        }
        let mss = mtu.saturating_sub(if headers.is_ipv4() { TCP_V4 } else { TCP_V6 });
        if rewrite::clamp_mss(packet, headers, mss, checksum) {
            self.counters.add(Total::MssClamped, 1);
        }
    }

    /// Answers a pod or process of this node with an ICMP error, through our own TUN.
    fn tell_sender(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &[u8],
        headers: &Headers,
        error: IcmpError,
        out: &mut Output,
    ) {
        let mut room = [0; MAX_ANSWER];
        if let Some(answer) = self.icmp_error(now, snapshot, packet, headers, error, &mut room)
            && let Ok(headers) = parse(answer)
        {
            self.answer_into_tun(answer, &headers, out);
        }
    }

    /// Builds an ICMP error about a packet, if one is due and the rate allows it.
    pub(super) fn icmp_error<'a>(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &[u8],
        headers: &Headers,
        error: IcmpError,
        room: &'a mut [u8],
    ) -> Option<&'a [u8]> {
        let from = Lane::own_address(snapshot, headers.source)?;
        if !icmp::may_answer(headers) {
            return None;
        }
        if !self.icmp.allow(error, headers, now) {
            self.counters.count_drop(DropReason::IcmpRateLimited);
            return None;
        }
        let len = icmp::build_error(room, error, from, packet, headers)?;
        self.counters.add(Total::IcmpSent, 1);
        Some(&room[..len])
    }
}
