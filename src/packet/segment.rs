//! Outbound: a super-packet from the TUN becomes whole IP packets that fit the path.
//!
//! The kernel hands over up to 64 KiB of one TCP or UDP flow with one header (TSO, USO). What differs from
//! one segment to the next is a few header fields, so [`SuperPacket::new`] sums the rest once, and
//! [`SuperPacket::write`] costs a copy and a sum of the payload.

use std::net::IpAddr;

use super::checksum::{fold, sum};
use super::vnet::{DATA_VALID, GSO_ACCECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHdr};
use super::{DropReason, Fragment, Headers, L4};

/// Where TCP's checksum is (RFC 9293 section 3.1).
pub(super) const TCP_CHECKSUM: usize = 16;
/// Where UDP's checksum is (RFC 768).
pub(super) const UDP_CHECKSUM: usize = 6;
/// Length of a UDP header.
pub(super) const UDP_HEADER: usize = 8;
/// Length of an IPv6 header without extensions.
pub(super) const IPV6_HEADER: usize = 40;

pub(super) const TCP_FIN: u8 = 0x01;
pub(super) const TCP_SYN: u8 = 0x02;
pub(super) const TCP_RST: u8 = 0x04;
pub(super) const TCP_PSH: u8 = 0x08;
pub(super) const TCP_ACK: u8 = 0x10;
pub(super) const TCP_ECE: u8 = 0x40;
pub(super) const TCP_CWR: u8 = 0x80;

/// A packet as the TUN gave it, checked against its virtio header and ready to be written out as one or
/// more IP packets with complete checksums.
///
/// Pseudo headers are summed here from the packet's own addresses: whoever translates addresses or ports
/// of a packet that [`owes_checksum`] or is to be cut need not touch its TCP or UDP checksum.
#[derive(Clone, Debug)]
pub struct SuperPacket<'a> {
    packet: &'a [u8],
    /// Bytes before the payload that is cut; the whole packet's length when nothing is.
    header_len: usize,
    /// Payload of each segment but the last.
    segment: usize,
    count: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Goes out as it is.
    Verbatim,
    /// One packet whose checksum is still owed: the sum from `start` on goes to `at`, begun with `pseudo`
    /// or else with what stands there.
    Checksum { start: usize, at: usize, pseudo: Option<u32> },
    /// Cut at `template`'s seams.
    Tcp { template: Template, seq: u32, first: u8, middle: u8, last: u8 },
    /// Likewise.
    Udp { template: Template },
}

/// What all segments have in common.
#[derive(Clone, Copy, Debug)]
struct Template {
    /// IPv4's identification of the first segment; `None` for IPv6.
    id: Option<u16>,
    /// IPv4 header without total length, identification and checksum.
    ip_sum: u32,
    l4: usize,
    /// Pseudo header without the length, and the transport header without the fields that change.
    l4_sum: u32,
}

/// Whether the checksum field of the packet behind this header is still incomplete.
pub fn owes_checksum(vnet: &VnetHdr) -> bool {
    vnet.flags & NEEDS_CSUM != 0 || vnet.gso_type != GSO_NONE
}

impl<'a> SuperPacket<'a> {
    /// Checks the virtio header against the packet. `headers` is what [`super::parse()`] said of `packet`.
    pub fn new(vnet: &VnetHdr, packet: &'a [u8], headers: &Headers) -> Result<SuperPacket<'a>, DropReason> {
        let packet = packet.get(..headers.total_len as usize).ok_or(DropReason::Truncated)?;
        // Other flags and types belong to features that were not asked for: such a header is not ours.
        if vnet.flags & !(NEEDS_CSUM | DATA_VALID) != 0 {
            return Err(DropReason::BadVirtioHeader);
        }
        match (vnet.gso(), headers.l4, headers.source) {
            (GSO_NONE, _, _) if vnet.gso_type == GSO_NONE => SuperPacket::whole(vnet, packet, headers),
            (GSO_TCPV4, L4::Tcp { flags, header_len, .. }, IpAddr::V4(_))
            | (GSO_TCPV6, L4::Tcp { flags, header_len, .. }, IpAddr::V6(_)) => {
                SuperPacket::tcp(vnet, packet, headers, flags, header_len)
            }
            (GSO_UDP_L4, L4::Udp { .. }, _) if vnet.gso_type == GSO_UDP_L4 => {
                SuperPacket::udp(vnet, packet, headers)
            }
            _ => Err(DropReason::BadVirtioHeader),
        }
    }

    /// How many packets [`write`](SuperPacket::write) makes of it; at least 1.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Length of the longest of them, headers included.
    pub fn max_len(&self) -> usize {
        self.len(0)
    }

    /// Length of the i-th packet; 0 past the last.
    pub fn len(&self, i: usize) -> usize {
        if i >= self.count {
            return 0;
        }
        let payload = self.packet.len() - self.header_len;
        self.header_len + self.segment.min(payload - i * self.segment)
    }

    /// Never: there is at least one packet.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Writes the i-th packet to the front of `out` and says how long it is: [`len`](SuperPacket::len), or
    /// 0 (and nothing written) when there is no such packet or `out` is too short.
    pub fn write(&self, i: usize, out: &mut [u8]) -> usize {
        let len = self.len(i);
        let Some(out) = out.get_mut(..len) else { return 0 };
        if len == 0 {
            return 0;
        }
        match self.kind {
            Kind::Verbatim => out.copy_from_slice(self.packet),
            Kind::Checksum { start, at, pseudo } => {
                out.copy_from_slice(self.packet);
                if pseudo.is_some() {
                    put(out, at, [0, 0]);
                }
                let sum = pseudo.unwrap_or(0) + sum(&out[start..]);
                put(out, at, complement_not_zero(sum));
            }
            Kind::Tcp { template, seq, first, middle, last } => {
                let flags = match i {
                    _ if self.count == 1 => first | last,
                    0 => first,
                    _ if i + 1 == self.count => last,
                    _ => middle,
                };
                let sum = self.write_common(&template, i, out);
                let l4 = template.l4;
                let seq = seq.wrapping_add((i * self.segment) as u32);
                out[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
                out[l4 + 13] = flags;
                let sum = sum + words(seq) + u32::from(flags) + words((len - l4) as u32);
                put(out, l4 + TCP_CHECKSUM, complement(sum));
            }
            Kind::Udp { template } => {
                let sum = self.write_common(&template, i, out);
                let l4 = template.l4;
                let udp_len = (len - l4) as u16;
                put(out, l4 + 4, udp_len.to_be_bytes());
                // The length stands in the pseudo header and in the header.
                let sum = sum + 2 * u32::from(udp_len);
                put(out, l4 + UDP_CHECKSUM, complement_not_zero(sum));
            }
        }
        len
    }

    /// Headers, IP fields and payload of the i-th segment; returns template plus payload sum.
    fn write_common(&self, template: &Template, i: usize, out: &mut [u8]) -> u32 {
        let len = out.len();
        let (header, payload) = out.split_at_mut(self.header_len);
        header.copy_from_slice(&self.packet[..self.header_len]);
        let from = self.header_len + i * self.segment;
        payload.copy_from_slice(&self.packet[from..from + payload.len()]);
        match template.id {
            Some(id) => {
                let id = id.wrapping_add(i as u16);
                put(header, 2, (len as u16).to_be_bytes());
                put(header, 4, id.to_be_bytes());
                put(header, 10, complement(template.ip_sum + len as u32 + u32::from(id)));
            }
            None => put(header, 4, ((len - IPV6_HEADER) as u16).to_be_bytes()),
        }
        template.l4_sum + sum(payload)
    }

    fn whole(vnet: &VnetHdr, packet: &'a [u8], headers: &Headers) -> Result<SuperPacket<'a>, DropReason> {
        let mut whole =
            SuperPacket { packet, header_len: packet.len(), segment: 0, count: 1, kind: Kind::Verbatim };
        if vnet.flags & NEEDS_CSUM == 0 {
            return Ok(whole);
        }
        let (start, offset) = (usize::from(vnet.csum_start), usize::from(vnet.csum_offset));
        let l4 = usize::from(headers.l4_offset);
        let at = start + offset;
        // A checksum can be owed for a header further inside (a tunnel of the pod's own), never for the IP
        // header, nor for a fragment, whose sum covers bytes that are elsewhere.
        if start < l4 || at + 2 > packet.len() || headers.fragment != Fragment::None {
            return Err(DropReason::BadVirtioHeader);
        }
        let (length, field) = match headers.l4 {
            L4::Tcp { .. } => ((packet.len() - l4) as u32, TCP_CHECKSUM),
            L4::Udp { .. } => ((packet.len() - l4) as u32, UDP_CHECKSUM),
            L4::Sctp { .. } | L4::Icmp { .. } | L4::Other | L4::None => (0, offset),
        };
        let pseudo = if start > l4 || length == 0 {
            // The pseudo header's sum that the kernel left in the field is all we know of it.
            None
        } else if offset == field {
            Some(pseudo(packet, headers).ok_or(DropReason::BadVirtioHeader)? + words(length))
        } else {
            return Err(DropReason::BadVirtioHeader);
        };
        whole.kind = Kind::Checksum { start, at, pseudo };
        Ok(whole)
    }

    fn tcp(
        vnet: &VnetHdr,
        packet: &'a [u8],
        headers: &Headers,
        flags: u8,
        tcp_len: u8,
    ) -> Result<SuperPacket<'a>, DropReason> {
        let l4 = usize::from(headers.l4_offset);
        let header_len = l4 + usize::from(tcp_len);
        // A SYN or reset in the middle of a run would mean something else in each segment.
        if tcp_len < 20 || flags & (TCP_SYN | TCP_RST) != 0 {
            return Err(DropReason::BadVirtioHeader);
        }
        let (segment, count) = cut(vnet, packet, headers, header_len, TCP_CHECKSUM)?;
        // Summed without sequence number, flags and checksum.
        let mut fields = [0u8; 60];
        let fields = fields.get_mut(..usize::from(tcp_len)).ok_or(DropReason::BadVirtioHeader)?;
        fields.copy_from_slice(&packet[l4..header_len]);
        let seq = u32::from_be_bytes([fields[4], fields[5], fields[6], fields[7]]);
        fields[4..8].fill(0);
        fields[13] = 0;
        put(fields, TCP_CHECKSUM, [0, 0]);
        let template = Template::new(packet, headers, sum(fields))?;
        // As tcp_gso_segment (net/ipv4/tcp_offload.c) has it.
        let later = if vnet.gso_type & GSO_ACCECN != 0 { flags } else { flags & !TCP_CWR };
        let end = TCP_FIN | TCP_PSH;
        let kind = Kind::Tcp { template, seq, first: flags & !end, middle: later & !end, last: later };
        Ok(SuperPacket { packet, header_len, segment, count, kind })
    }

    fn udp(vnet: &VnetHdr, packet: &'a [u8], headers: &Headers) -> Result<SuperPacket<'a>, DropReason> {
        let l4 = usize::from(headers.l4_offset);
        let header_len = l4 + UDP_HEADER;
        let (segment, count) = cut(vnet, packet, headers, header_len, UDP_CHECKSUM)?;
        // Only the ports stay as they are.
        let template = Template::new(packet, headers, sum(&packet[l4..l4 + 4]))?;
        Ok(SuperPacket { packet, header_len, segment, count, kind: Kind::Udp { template } })
    }
}

/// Cuts an IPv4 packet into fragments of at most `mtu` bytes, as a router does (RFC 791 section 3.2), and
/// returns how many. Its transport checksum must be complete. Works in place: each fragment's header
/// overwrites the end of the fragment before it, which has been handed out by then, so the packet is spent
/// afterwards. `TooBig` when the sender forbids it (or it is IPv6): answer with ICMP.
pub fn fragment_v4(
    packet: &mut [u8],
    headers: &Headers,
    mtu: u16,
    mut each: impl FnMut(&[u8]),
) -> Result<usize, DropReason> {
    let packet = packet.get_mut(..headers.total_len as usize).ok_or(DropReason::Truncated)?;
    if packet.len() <= usize::from(mtu) {
        each(packet);
        return Ok(1);
    }
    if headers.dont_fragment || headers.source.is_ipv6() {
        return Err(DropReason::TooBig);
    }
    let header_len = usize::from(packet.first().ok_or(DropReason::Truncated)? & 0x0f) * 4;
    if header_len < 20 || header_len >= packet.len() {
        return Err(DropReason::MalformedHeader);
    }
    // Offsets count in units of 8 bytes.
    let room = usize::from(mtu).saturating_sub(header_len) & !7;
    if room == 0 {
        return Err(DropReason::TooBig);
    }
    let mut saved = [0u8; 60];
    let header = &mut saved[..header_len];
    header.copy_from_slice(&packet[..header_len]);
    let field = u16::from_be_bytes([header[6], header[7]]);
    let payload = packet.len() - header_len;
    if usize::from(field & OFFSET_MASK) + payload / 8 > usize::from(OFFSET_MASK) {
        return Err(DropReason::MalformedHeader);
    }
    let mut count = 0;
    for start in (0..payload).step_by(room) {
        let len = room.min(payload - start);
        let more = if start + len < payload { MORE_FRAGMENTS } else { 0 };
        put(header, 2, ((header_len + len) as u16).to_be_bytes());
        put(header, 6, ((field | more) + (start / 8) as u16).to_be_bytes());
        put(header, 10, [0, 0]);
        let checksum = complement(sum(header));
        put(header, 10, checksum);
        packet[start..start + header_len].copy_from_slice(header);
        each(&packet[start..start + header_len + len]);
        if start == 0 {
            drop_uncopied_options(&mut header[20..]);
        }
        count += 1;
    }
    Ok(count)
}

const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET_MASK: u16 = 0x1fff;

/// Overwrites the options that belong to the first fragment only (RFC 791: copied flag clear) with
/// no-operation, as the kernel's `ip_options_fragment` does: the header keeps its length.
fn drop_uncopied_options(mut options: &mut [u8]) {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const COPIED: u8 = 0x80;
    loop {
        let len = match *options {
            [] | [END, ..] => return,
            [NO_OPERATION, ..] => 1,
            [_, len, ..] if len >= 2 && usize::from(len) <= options.len() => usize::from(len),
            _ => return,
        };
        let (option, rest) = options.split_at_mut(len);
        if option[0] & COPIED == 0 {
            option.fill(NO_OPERATION);
        }
        options = rest;
    }
}

impl Template {
    fn new(packet: &[u8], headers: &Headers, l4_fields: u32) -> Result<Template, DropReason> {
        let l4 = usize::from(headers.l4_offset);
        let l4_sum = pseudo(packet, headers).ok_or(DropReason::BadVirtioHeader)? + l4_fields;
        let v6 = headers.source.is_ipv6();
        if l4 < if v6 { IPV6_HEADER } else { 20 } {
            return Err(DropReason::BadVirtioHeader);
        }
        if v6 {
            return Ok(Template { id: None, ip_sum: 0, l4, l4_sum });
        }
        let mut fields = [0u8; 60];
        let fields = fields.get_mut(..l4).ok_or(DropReason::BadVirtioHeader)?;
        fields.copy_from_slice(&packet[..l4]);
        let id = u16::from_be_bytes([fields[4], fields[5]]);
        fields[2..6].fill(0);
        put(fields, 10, [0, 0]);
        Ok(Template { id: Some(id), ip_sum: sum(fields), l4, l4_sum })
    }
}

/// Checks what cutting TCP and UDP have in common; returns segment size and count.
fn cut(
    vnet: &VnetHdr,
    packet: &[u8],
    headers: &Headers,
    header_len: usize,
    checksum: usize,
) -> Result<(usize, usize), DropReason> {
    let l4 = usize::from(headers.l4_offset);
    let owed = vnet.flags & NEEDS_CSUM != 0;
    let misplaced = usize::from(vnet.csum_start) != l4 || usize::from(vnet.csum_offset) != checksum;
    // Both length fields of an IP header hold 16 bits.
    let base = if headers.source.is_ipv6() { IPV6_HEADER } else { 0 };
    let fits = header_len <= packet.len() && packet.len().saturating_sub(base) <= usize::from(u16::MAX);
    if !fits || (owed && misplaced) || vnet.gso_size == 0 || headers.fragment != Fragment::None {
        return Err(DropReason::BadVirtioHeader);
    }
    let segment = usize::from(vnet.gso_size);
    Ok((segment, (packet.len() - header_len).div_ceil(segment).max(1)))
}

/// Sum of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) without its length.
pub(super) fn pseudo(packet: &[u8], headers: &Headers) -> Option<u32> {
    let addresses = match headers.source {
        IpAddr::V4(_) => packet.get(12..20)?,
        IpAddr::V6(_) => packet.get(8..40)?,
    };
    Some(sum(addresses) + u32::from(headers.protocol))
}

/// Writes two bytes.
pub(super) fn put(bytes: &mut [u8], at: usize, value: [u8; 2]) {
    bytes[at..at + 2].copy_from_slice(&value);
}

/// A 32-bit number as part of a sum.
fn words(value: u32) -> u32 {
    (value >> 16) + (value & 0xffff)
}

/// A sum as the checksum that goes into a packet.
fn complement(sum: u32) -> [u8; 2] {
    (!fold(sum)).to_be_bytes()
}

/// The same where 0 would mean "no checksum" (RFC 768; the kernel's CSUM_MANGLED_0).
fn complement_not_zero(sum: u32) -> [u8; 2] {
    match complement(sum) {
        [0, 0] => [0xff, 0xff],
        checksum => checksum,
    }
}

#[cfg(test)]
pub(super) mod kit;

#[cfg(test)]
mod tests {
    use super::kit::*;
    use super::*;
    use proptest::prelude::*;

    fn segments(vnet: &VnetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
        let whole = SuperPacket::new(vnet, packet, &headers_of(packet)).unwrap();
        let mut out = vec![0xee; 70_000];
        (0..whole.count())
            .map(|i| {
                let len = whole.write(i, &mut out);
                assert_eq!(len, whole.len(i));
                assert!(len > 0 && len <= whole.max_len());
                out[..len].to_vec()
            })
            .collect()
    }

    #[test]
    fn tcp_is_cut_as_the_kernel_would() {
        let flags = TCP_ACK | TCP_PSH | TCP_FIN | TCP_CWR | TCP_ECE;
        for v6 in [false, true] {
            let spec = Spec { v6, flags, payload: payload(3000, 1), ..Spec::default() };
            let mut packet = spec.build();
            let cut = segments(&owed(&mut packet, 1368), &packet);
            let expected = [
                (0, 1368, TCP_ACK | TCP_ECE | TCP_CWR),
                (1368, 1368, TCP_ACK | TCP_ECE),
                (2736, 264, TCP_ACK | TCP_ECE | TCP_PSH | TCP_FIN),
            ];
            assert_eq!(cut.len(), 3);
            for (i, (from, len, flags)) in expected.into_iter().enumerate() {
                let single = Spec {
                    id: spec.id.wrapping_add(i as u16),
                    seq: spec.seq.wrapping_add(from as u32),
                    flags,
                    payload: spec.payload[from..from + len].to_vec(),
                    ..spec.clone()
                };
                assert_eq!(cut[i], single.build(), "segment {i}, v6 {v6}");
            }
        }
    }

    #[test]
    fn accurate_ecn_keeps_its_bit_in_every_segment() {
        let spec = Spec { flags: TCP_ACK | TCP_CWR, payload: payload(300, 1), ..Spec::default() };
        let mut packet = spec.build();
        let mut vnet = owed(&mut packet, 100);
        vnet.gso_type |= GSO_ACCECN;
        for segment in segments(&vnet, &packet) {
            assert_eq!(headers_flags(&segment), TCP_ACK | TCP_CWR);
        }
    }

    fn headers_flags(packet: &[u8]) -> u8 {
        let L4::Tcp { flags, .. } = headers_of(packet).l4 else { panic!("not TCP") };
        flags
    }

    #[test]
    fn udp_is_cut_into_datagrams() {
        for v6 in [false, true] {
            let spec = Spec { v6, udp: true, payload: payload(2500, 9), ..Spec::default() };
            let mut packet = spec.build();
            let cut = segments(&owed(&mut packet, 1000), &packet);
            let lens: Vec<usize> = cut.iter().map(|p| p.len() - if v6 { 48 } else { 28 }).collect();
            assert_eq!(lens, [1000, 1000, 500]);
            for (i, segment) in cut.iter().enumerate() {
                let chunk = spec.payload.chunks(1000).nth(i).unwrap().to_vec();
                let single = Spec { id: spec.id.wrapping_add(i as u16), payload: chunk, ..spec.clone() };
                assert_eq!(*segment, single.build());
            }
        }
    }

    #[test]
    fn a_udp_checksum_of_zero_is_sent_as_ffff() {
        // Two bytes of payload are chosen so that the sum comes out as 0xffff.
        let mut spec = Spec { udp: true, payload: vec![0; 2], ..Spec::default() };
        let packet = spec.build();
        spec.payload = packet[26..28].to_vec();
        let mut packet = spec.build();
        assert_eq!(packet[26..28], [0xff, 0xff]);
        let whole = packet.clone();
        let vnet = owed(&mut packet, 0);
        assert_eq!(segments(&vnet, &packet)[0], whole);
        let mut packet = whole.clone();
        let vnet = owed(&mut packet, 100);
        assert_eq!(segments(&vnet, &packet), [whole]);
    }

    #[test]
    fn one_packet_gets_its_checksum_or_is_left_alone() {
        for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
            let packet = Spec { v6, udp, payload: payload(777, 3), ..Spec::default() }.build();
            let mut half = packet.clone();
            let vnet = owed(&mut half, 0);
            assert_eq!(segments(&vnet, &half)[0], packet);
            assert_eq!(segments(&VnetHdr { flags: DATA_VALID, ..VnetHdr::default() }, &half), [half]);
        }
    }

    #[test]
    fn a_checksum_owed_further_inside_is_completed_from_its_seed() {
        // A pod's own tunnel: UDP around something whose field at 40 holds its pseudo header's sum.
        let mut packet = Spec { udp: true, payload: payload(200, 5), ..Spec::default() }.build();
        put(&mut packet, 60, [0x12, 0x34]);
        let vnet = VnetHdr { flags: NEEDS_CSUM, csum_start: 44, csum_offset: 16, ..VnetHdr::default() };
        let out = &segments(&vnet, &packet)[0];
        assert_eq!(out[..60], packet[..60]);
        put(&mut packet, 60, [0, 0]);
        assert_eq!(out[60..62], (!slow_sum(0x1234, &packet[44..])).to_be_bytes());
    }

    #[test]
    fn a_virtio_header_that_does_not_fit_is_refused() {
        let mut tcp = Spec { payload: payload(3000, 1), ..Spec::default() }.build();
        let good = owed(&mut tcp, 1000);
        let headers = headers_of(&tcp);
        let refuse = |vnet: VnetHdr, headers: &Headers| {
            assert_eq!(
                SuperPacket::new(&vnet, &tcp, headers).err(),
                Some(DropReason::BadVirtioHeader),
                "{vnet:?}"
            );
        };
        assert!(SuperPacket::new(&good, &tcp, &headers).is_ok());
        refuse(VnetHdr { flags: 0x80, ..good }, &headers);
        refuse(VnetHdr { gso_type: GSO_TCPV6, ..good }, &headers);
        refuse(VnetHdr { gso_type: GSO_UDP_L4, ..good }, &headers);
        refuse(VnetHdr { gso_type: super::super::vnet::GSO_UDP, ..good }, &headers);
        refuse(VnetHdr { gso_type: super::super::vnet::GSO_ECN, ..good }, &headers);
        refuse(VnetHdr { gso_size: 0, ..good }, &headers);
        refuse(VnetHdr { csum_start: 24, ..good }, &headers);
        refuse(VnetHdr { csum_offset: 6, ..good }, &headers);
        refuse(VnetHdr { gso_type: GSO_NONE, csum_start: 0, ..good }, &headers);
        refuse(VnetHdr { gso_type: GSO_NONE, csum_offset: 6, ..good }, &headers);
        refuse(VnetHdr { gso_type: GSO_NONE, csum_start: 3051, csum_offset: 1, ..good }, &headers);
        refuse(good, &Headers { fragment: Fragment::First { id: 1 }, ..headers });
        let longer = Headers { total_len: 3053, ..headers };
        assert_eq!(SuperPacket::new(&good, &tcp, &longer).err(), Some(DropReason::Truncated));
        let syn = Spec { flags: TCP_SYN, payload: payload(3000, 1), ..Spec::default() }.build();
        assert!(SuperPacket::new(&good, &syn, &headers_of(&syn)).is_err());
    }

    #[test]
    fn nothing_is_written_where_it_does_not_fit() {
        let mut packet = Spec { payload: payload(300, 1), ..Spec::default() }.build();
        let vnet = owed(&mut packet, 100);
        let whole = SuperPacket::new(&vnet, &packet, &headers_of(&packet)).unwrap();
        assert_eq!((whole.count(), whole.max_len()), (3, 152));
        assert_eq!(whole.write(0, &mut [0; 151]), 0);
        assert_eq!(whole.write(3, &mut [0; 200]), 0);
    }

    #[test]
    fn router_fragments_come_together_again() {
        // Record route (RFC 791 section 3.1, not copied) and security (copied).
        let ip_options = vec![7, 7, 4, 1, 2, 3, 4, 130, 7, 4, 5, 6, 7, 8, 1, 0];
        let spec = Spec {
            udp: true,
            dont_fragment: false,
            ip_options: ip_options.clone(),
            payload: payload(3001, 4),
            ..Spec::default()
        };
        let packet = spec.build();
        let headers = headers_of(&packet);
        let mut seen = vec![0u8; packet.len() - 36];
        let mut end = None;
        let count = fragment_v4(&mut packet.clone(), &headers, 1400, |fragment| {
            assert!(fragment.len() <= 1400);
            assert_eq!(slow_sum(0, &fragment[..36]), 0xffff);
            assert_eq!(usize::from(u16::from_be_bytes([fragment[2], fragment[3]])), fragment.len());
            assert_eq!(fragment[4..6], packet[4..6]);
            let field = u16::from_be_bytes([fragment[6], fragment[7]]);
            let at = usize::from(field & OFFSET_MASK) * 8;
            seen[at..at + fragment.len() - 36].copy_from_slice(&fragment[36..]);
            let first_len = if at == 0 { &ip_options[..7] } else { &[1; 7][..] };
            assert_eq!(fragment[20..27], *first_len);
            assert_eq!(fragment[27..36], ip_options[7..]);
            if field & MORE_FRAGMENTS == 0 {
                end = Some(at + fragment.len() - 36);
            }
        });
        assert_eq!(count, Ok(3));
        assert_eq!(end, Some(seen.len()));
        assert_eq!(seen, packet[36..]);
    }

    #[test]
    fn fragments_are_refused_where_they_must_be() {
        let packet = Spec { payload: payload(3000, 4), ..Spec::default() }.build();
        let headers = headers_of(&packet);
        let none = |_: &[u8]| panic!("no fragment");
        assert_eq!(fragment_v4(&mut packet.clone(), &headers, 1400, none), Err(DropReason::TooBig));
        let allowed = Headers { dont_fragment: false, ..headers };
        assert_eq!(fragment_v4(&mut packet.clone(), &allowed, 27, none), Err(DropReason::TooBig));
        assert_eq!(fragment_v4(&mut [], &allowed, 27, none), Err(DropReason::Truncated));
        let mut sent = 0;
        assert_eq!(fragment_v4(&mut packet.clone(), &headers, 3052, |p| sent = p.len()), Ok(1));
        assert_eq!(sent, 3052);
    }

    proptest! {
        #[test]
        fn every_cut_is_whole(
            v6: bool, udp: bool, len in 1usize..20_000, gso in 1u16..3000, id: u16, seq: u32, seed: u32,
        ) {
            let spec = Spec { v6, udp, id, seq, payload: payload(len, seed), ..Spec::default() };
            let mut packet = spec.build();
            let vnet = owed(&mut packet, gso);
            let header_len = packet.len() - len;
            let mut joined = Vec::new();
            for segment in segments(&vnet, &packet) {
                prop_assert!(checksums_hold(&segment));
                joined.extend_from_slice(&segment[header_len..]);
            }
            prop_assert_eq!(joined, spec.payload);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            mut packet in proptest::collection::vec(any::<u8>(), 0..200),
            flags in 0u8..4, gso_type in proptest::sample::select(vec![0u8, 1, 3, 4, 5, 0x81, 0x14, 0x85]),
            gso_size in 0u16..100, csum_start in 0u16..120, at_l4: bool, csum_offset in 0u16..20,
            total_len in 0u32..210, l4_offset in 0u16..120, tcp_len in 0u8..80, v6: bool, udp: bool, mtu: u16,
        ) {
            let source: IpAddr =
                if v6 { std::net::Ipv6Addr::LOCALHOST.into() } else { std::net::Ipv4Addr::LOCALHOST.into() };
            let l4 = if udp {
                L4::Udp { source: 1, destination: 2 }
            } else {
                L4::Tcp { source: 1, destination: 2, flags: 0x10, header_len: tcp_len }
            };
            let headers = Headers {
                source, destination: source, l4_offset, total_len, protocol: 6, hop_limit: 1,
                traffic_class: 0, dont_fragment: false, fragment: Fragment::None, l4,
            };
            let (csum_start, csum_offset) =
                if at_l4 { (l4_offset, if udp { 6 } else { 16 }) } else { (csum_start, csum_offset) };
            let vnet = VnetHdr { flags, gso_type, hdr_len: 0, gso_size, csum_start, csum_offset };
            let mut out = [0u8; 300];
            if let Ok(whole) = SuperPacket::new(&vnet, &packet, &headers) {
                for i in 0..whole.count() {
                    whole.write(i, &mut out);
                }
            }
            let _ = fragment_v4(&mut packet, &headers, mtu % 300, |_| ());
        }
    }
}
