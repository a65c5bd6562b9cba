//! From the TUN to a peer, in the order of the map in [`super`].

use std::time::Instant;

use super::fragments::Datagram;
use super::service::Passage;
use super::{Exit, Lane, Output, Total, parcel};
use crate::packet::coalesce::MAX_SEGMENTS;
use crate::packet::icmp::{self, IcmpError, MAX_ANSWER};
use crate::packet::parse::parse_any_address;
use crate::packet::rewrite::{self, ChecksumState};
use crate::packet::segment::{SuperPacket, fragment_v4, owes_checksum};
use crate::packet::vnet::{GSO_NONE, GSO_UDP_L4, VnetHdr};
use crate::packet::{DropReason, Fragment, Headers, L4, parse};
use crate::snapshot::service::loop_address;
use crate::snapshot::{Encap, Peer, PeerId, Snapshot};
use crate::tunnel::{Sealed, Segments};

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
        self.outbound_packet(now, snapshot, &vnet, packet, out)
    }

    fn outbound_packet(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        vnet: &VnetHdr,
        packet: &mut [u8],
        out: &mut Output,
    ) -> Result<(), DropReason> {
        let mut headers = parse_from_host(packet)?;
        let packets = SuperPacket::new(vnet, packet, &headers)?.count();

        // 2 decide; what the first fragment gets, the others get too
        let datagram = Datagram::of(&headers, None);
        let (decision, waited) = match datagram.map(|datagram| (headers.fragment, datagram)) {
            None | Some((Fragment::None, _)) => {
                (self.decide(now, snapshot, packet, &headers, packets, out), Vec::new())
            }
            Some((Fragment::First { .. }, datagram)) => {
                let decision = self.decide(now, snapshot, packet, &headers, packets, out);
                (decision, self.fragments.decide(now, datagram, decision))
            }
            Some((Fragment::Later { .. }, datagram)) => match self.fragments.decision(&datagram) {
                Some(decision) => (decision, Vec::new()),
                None => return self.fragments.wait(now, datagram, packet),
            },
        };

        // 3 translate
        let mut result = decision.and_then(|Passage { change, exit }| {
            if let Some(change) = change {
                rewrite::rewrite(packet, &mut headers, &change, checksum_state(vnet))?;
            }
            match exit {
                Exit::Peer(peer) => self.send_to_peer(now, snapshot, peer, vnet, packet, &headers, out),
                Exit::LocalPod | Exit::LocalNode | Exit::Outside => {
                    self.turn_round(vnet, packet, &headers, out)
                }
            }
        });
        for mut later in waited {
            if let Err(reason) = self.outbound_packet(now, snapshot, &VnetHdr::default(), &mut later, out) {
                result = self.also(result, reason);
            }
        }
        result
    }

    fn decide(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &mut [u8],
        headers: &Headers,
        packets: usize,
        out: &mut Output,
    ) -> Result<Passage, DropReason> {
        let decision = match self.sighting(headers, packets) {
            Some(sighting) => self.passage(now, snapshot, packet, headers, &sighting, out),
            None => match self.error_out(now, snapshot, packet, headers)? {
                Some(passage) => Ok(passage),
                None => self.as_it_is(snapshot, headers),
            },
        };
        if decision == Err(DropReason::NoRoute) {
            self.tell_sender(now, snapshot, packet, headers, IcmpError::HostUnreachable, out);
        }
        decision
    }

    /// Back into the TUN, for the kernel to forward. It takes a hop each time, so nothing turns for ever.
    fn turn_round(
        &mut self,
        vnet: &VnetHdr,
        packet: &[u8],
        headers: &Headers,
        out: &mut Output,
    ) -> Result<(), DropReason> {
        let segments = SuperPacket::new(vnet, packet, headers)?;
        let offloads = out.tun.offloads();
        let whole = match vnet.gso() {
            GSO_NONE => true,
            GSO_UDP_L4 => offloads.udp && segments.count() <= usize::from(MAX_SEGMENTS),
            _ => offloads.tcp,
        };
        if whole {
            return out.turn_round_whole(vnet, packet, headers, segments.count() as u16);
        }
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

        // 4 fit
        self.clamp(packet, headers, peer.mtu, checksum_state(vnet));
        let segments = SuperPacket::new(vnet, packet, headers)?;
        let fits = segments.max_len() <= usize::from(peer.mtu);
        if !fits && headers.dont_fragment {
            let too_big = IcmpError::TooBig { mtu: peer.mtu };
            self.tell_sender(now, snapshot, packet, headers, too_big, out);
            return Err(DropReason::TooBig);
        }

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
    pub(super) fn also(&self, before: Result<(), DropReason>, reason: DropReason) -> Result<(), DropReason> {
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
        match encap {
            Encap::WireGuard if self.is_unknown_to(peer) => {
                let put = parcel::put(&mut out.parcels, peer, packets);
                put.inspect_err(|reason| self.counters.count_drops(*reason, packets.count() - 1))
            }
            Encap::WireGuard => self.seal_for_wireguard(now, peer, packets, out),
            Encap::Vxlan => {
                let flow = headers.flow_hash(self.seed);
                let (local, target) = (&snapshot.local, headers.destination);
                let sealed = self.vxlan.seal(now, local, peer, flow, target, packets, &mut out.tx);
                self.count_sealed(now, peer, packets, &sealed)
            }
        }
    }

    pub(super) fn seal_for_wireguard(
        &mut self,
        now: Instant,
        peer: &Peer,
        packets: &impl Segments,
        out: &mut Output,
    ) -> Result<(), DropReason> {
        let sealed = self.wireguard.seal(now, peer, packets, &mut out.tx);
        self.count_sealed(now, peer, packets, &sealed)
    }

    fn count_sealed(
        &mut self,
        now: Instant,
        peer: &Peer,
        packets: &impl Segments,
        sealed: &Sealed,
    ) -> Result<(), DropReason> {
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
    pub(super) fn tell_sender(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &[u8],
        headers: &Headers,
        error: IcmpError,
        out: &mut Output,
    ) {
        let mut room = [0; MAX_ANSWER];
        let answer = self.icmp_error(now, snapshot, packet, headers, error, &mut room).map(<[u8]>::len);
        if let Some(answer) = answer.and_then(|len| room.get_mut(..len))
            && let Ok(mut headers) = parse(answer)
        {
            self.untranslate(now, answer, &mut headers);
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

/// What the host sends may come from its loopback addresses, as long as it goes to a NodePort
/// (`127.0.0.1:nodePort`); nothing may come from the loop itself.
fn parse_from_host(packet: &[u8]) -> Result<Headers, DropReason> {
    let headers = parse(packet).or_else(|reason| {
        let headers = parse_any_address(packet)?;
        let to_loop = headers.destination == loop_address(headers.destination);
        let local = headers.is_ipv4() && headers.source.is_loopback();
        if to_loop && local { Ok(headers) } else { Err(reason) }
    })?;
    if headers.source == loop_address(headers.source) {
        return Err(DropReason::ForeignSource);
    }
    Ok(headers)
}

fn checksum_state(vnet: &VnetHdr) -> ChecksumState {
    if owes_checksum(vnet) { ChecksumState::Partial } else { ChecksumState::Complete }
}
