//! One frame in the making: who may join it, and what its headers are in the end.

use std::ops::Range;

use super::{MAX_SEGMENTS, Offloads};
use crate::packet::checksum::{checksum, fold, verify_ipv4_header, verify_transport};
use crate::packet::segment::{
    IPV6_HEADER, TCP_ACK, TCP_CHECKSUM, TCP_CWR, TCP_ECE, TCP_FIN, TCP_PSH, UDP_CHECKSUM, pseudo, put,
};
use crate::packet::vnet::{
    DATA_VALID, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHdr,
};
use crate::packet::{Fragment, Headers, L4};

/// Geneve (RFC 8926), VXLAN (RFC 7348) and Linux's older VXLAN port: kernels up to 6.8.4 drop joined
/// datagrams that land in a tunnel device (`udp_unexpected_gso`), and a pod may run one.
const TUNNEL_PORTS: [u16; 3] = [6081, 4789, 8472];

/// Longest joined packet: IPv4's length field; for IPv6 the same, to be plain.
const MAX_LEN: u32 = 65_535;

/// A frame in the making.
#[derive(Debug)]
pub(super) struct Building {
    pub(super) headers: Headers,
    pub(super) hash: u32,
    pub(super) kind: Kind,
    pub(super) first: u16,
    pub(super) last: u16,
    pub(super) packets: u16,
    /// Payload of each packet but the last.
    size: u16,
    /// Length of the frame so far.
    pub(super) total_len: u32,
    /// Bytes of all packets, merged acknowledgements too.
    pub(super) bytes: u32,
    /// Where its packets came from, for the caller.
    pub(super) tag: u32,
    /// The sequence number that comes next.
    pub(super) next_seq: u32,
    /// The last packet's flags that the frame takes over.
    end_flags: u8,
    checked: Checked,
    pub(super) vnet: VnetHdr,
    /// Where its pieces are, once finished.
    pub(super) pieces: (u32, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing can join.
    Alone,
    /// Nothing can join, and nothing is to be completed.
    Ready,
    /// TCP payload.
    Tcp,
    /// A pure acknowledgement.
    Ack,
    /// A UDP datagram.
    Udp,
    /// Will not be written.
    Discarded,
}

/// What is known of the first packet's checksums. They are computed when a second packet comes along, not
/// before: the kernel checks lone packets itself, and would do so anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checked {
    NotYet,
    Right,
    Wrong,
}

/// What kind of frame a packet could begin or join.
pub(super) fn kind(packet: &[u8], headers: &Headers, offloads: Offloads) -> Kind {
    let plain_header = if headers.is_ipv4() { 20 } else { IPV6_HEADER };
    let l4 = usize::from(headers.l4_offset);
    if headers.fragment != Fragment::None || l4 != plain_header || headers.total_len > MAX_LEN {
        return Kind::Alone;
    }
    let payload = headers.total_len as usize > headers.payload_offset();
    match headers.l4 {
        // Urgent data, and whatever opens or resets a connection, goes alone.
        L4::Tcp { flags, .. } if flags & !(TCP_ECE | TCP_CWR | TCP_PSH | TCP_FIN) != TCP_ACK => Kind::Alone,
        L4::Tcp { .. } if payload && offloads.tcp => Kind::Tcp,
        L4::Tcp { .. } if !payload && offloads.acks && is_plain_ack(packet, headers) => Kind::Ack,
        L4::Udp { destination, .. } if TUNNEL_PORTS.contains(&destination) => Kind::Alone,
        L4::Udp { .. } if payload && offloads.udp && is_plain_datagram(packet, headers) => Kind::Udp,
        L4::Tcp { .. } | L4::Udp { .. } => Kind::Alone,
        L4::Sctp { .. } | L4::Icmp { .. } | L4::Other | L4::None => Kind::Alone,
    }
}

/// Whether an acknowledgement says nothing but "up to here"; [`Offloads::acks`] has the reasons.
fn is_plain_ack(packet: &[u8], headers: &Headers) -> bool {
    /// Two no-operations and the timestamps, as every sender lays them out (RFC 7323 appendix A).
    const TIMESTAMPS: [u8; 4] = [1, 1, 8, 10];
    let tcp = headers.transport(packet);
    let options = tcp.get(20..).unwrap_or(&[]);
    let known = options.is_empty() || (options.len() == 12 && options.starts_with(&TIMESTAMPS));
    let (Some(offset), Some(window)) = (tcp.get(12), tcp.get(14..16)) else { return false };
    // The low bits of the offset's byte: three reserved, one of Accurate ECN.
    known && tcp_flags(headers) == TCP_ACK && offset & 0x0f == 0 && window != [0, 0]
}

/// Whether a datagram has a checksum and fills its packet.
fn is_plain_datagram(packet: &[u8], headers: &Headers) -> bool {
    let udp = headers.transport(packet);
    udp.get(6..8).is_some_and(|checksum| checksum != [0, 0])
        && udp.get(4..6).is_some_and(|len| usize::from(u16::from_be_bytes([len[0], len[1]])) == udp.len())
}

/// Whether the segment ends whatever frame it is in.
pub(super) fn ends_frame(headers: &Headers) -> bool {
    tcp_flags(headers) & (TCP_PSH | TCP_FIN) != 0
}

pub(super) fn tcp_flags(headers: &Headers) -> u8 {
    match headers.l4 {
        L4::Tcp { flags, .. } => flags,
        L4::Udp { .. } | L4::Sctp { .. } | L4::Icmp { .. } | L4::Other | L4::None => 0,
    }
}

pub(super) fn is_right(packet: &[u8], headers: &Headers) -> bool {
    (!headers.is_ipv4() || verify_ipv4_header(packet)) && verify_transport(packet, headers)
}

impl Building {
    /// A frame of one packet.
    pub(super) fn new(kind: Kind, hash: u32, item: u16, packet: &[u8], headers: &Headers) -> Building {
        let size = headers.total_len.saturating_sub(headers.payload_offset() as u32) as u16;
        let next_seq = match kind {
            Kind::Tcp | Kind::Ack => be32(packet, headers, 4).wrapping_add(size.into()),
            Kind::Alone | Kind::Ready | Kind::Udp | Kind::Discarded => 0,
        };
        Building {
            headers: *headers,
            hash,
            kind,
            first: item,
            last: item,
            packets: 1,
            size,
            total_len: headers.total_len,
            bytes: headers.total_len,
            tag: 0,
            next_seq,
            end_flags: 0,
            checked: Checked::NotYet,
            vnet: VnetHdr::default(),
            pieces: (0, 0),
        }
    }

    /// Takes over what a joined packet of `len` bytes of payload brings; says whether another may follow.
    pub(super) fn extend(&mut self, len: u32, flags: u8) -> bool {
        self.total_len += len;
        self.next_seq = self.next_seq.wrapping_add(len);
        self.end_flags = flags & (TCP_FIN | TCP_PSH);
        len == u32::from(self.size) && self.packets < MAX_SEGMENTS && self.end_flags == 0
    }

    /// Whether the first packet's checksums are right.
    pub(super) fn is_right(&mut self, head: &[u8]) -> bool {
        if self.checked == Checked::NotYet {
            let right = is_right(head, &self.headers);
            self.checked = if right { Checked::Right } else { Checked::Wrong };
        }
        self.checked == Checked::Right
    }

    /// `tcp_gro_receive`'s rules, and the window: the kernel lets a later segment's be lost.
    pub(super) fn takes_segment(&self, head: &[u8], packet: &[u8], headers: &Headers) -> bool {
        let flags = tcp_flags(&self.headers) ^ tcp_flags(headers);
        let (old, new) = (self.headers.transport(head), headers.transport(packet));
        self.takes_payload(payload_len(headers))
            && self.same_ip(head, packet, headers)
            // CWR is for the first alone; a later one begins the next frame.
            && flags & !(TCP_PSH | TCP_FIN | TCP_CWR) == 0
            && tcp_flags(headers) & TCP_CWR == 0
            && be32(packet, headers, 4) == self.next_seq
            // Acknowledgement, header length, window, urgent pointer, options.
            && same(old, new, 8..13)
            && same(old, new, 14..16)
            && same(old, new, 18..headers.l4_header_len())
    }

    pub(super) fn takes_datagram(&self, head: &[u8], packet: &[u8], headers: &Headers) -> bool {
        self.takes_payload(payload_len(headers)) && self.same_ip(head, packet, headers)
    }

    /// See [`Offloads::acks`].
    pub(super) fn takes_ack(&self, head: &[u8], packet: &[u8], headers: &Headers) -> bool {
        /// The largest window there can be (RFC 7323 section 2.3): what goes further is not to be believed.
        const MAX_WINDOW: u32 = 1 << 30;
        let (old, new) = (self.headers.transport(head), headers.transport(packet));
        let progress = be32(packet, headers, 8).wrapping_sub(be32(head, &self.headers, 8));
        (1..=MAX_WINDOW).contains(&progress)
            && be32(packet, headers, 4) == self.next_seq
            && self.same_hop(head, packet, headers)
            && same(old, new, 12..14)
            && same(old, new, 18..headers.l4_header_len())
    }

    pub(super) fn takes_payload(&self, len: u32) -> bool {
        len <= self.size.into() && self.total_len + len <= MAX_LEN && self.packets < MAX_SEGMENTS
    }

    /// Whether the IP headers agree in all that cutting would copy.
    fn same_ip(&self, head: &[u8], packet: &[u8], headers: &Headers) -> bool {
        // Without the flag, the identification tells fragments of different packets apart, and cutting
        // counts it up.
        let id = |packet: &[u8]| packet.get(4..6).map(|id| u16::from_be_bytes([id[0], id[1]]));
        self.same_hop(head, packet, headers)
            && (headers.dont_fragment || id(packet) == id(head).map(|first| first.wrapping_add(self.packets)))
    }

    fn same_hop(&self, head: &[u8], packet: &[u8], headers: &Headers) -> bool {
        self.headers.hop_limit == headers.hop_limit
            && if headers.is_ipv4() {
                // Type of service, then the flags (the offset is zero).
                same(head, packet, 1..2) && same(head, packet, 6..8)
            } else {
                // Traffic class and flow label.
                same(head, packet, 0..4)
            }
    }

    /// Makes the virtio header, and the joined packet's own. Addresses and ports are read from the packet,
    /// which may have been translated since it was pushed.
    pub(super) fn complete(&mut self, packet: &mut [u8]) {
        if self.kind == Kind::Ready {
            return;
        }
        let headers = &self.headers;
        let joined = self.packets > 1 && self.kind != Kind::Ack;
        let (Some(pseudo), true) = (pseudo(packet, headers), joined) else {
            let flags = if self.checked == Checked::Right { DATA_VALID } else { 0 };
            self.vnet = VnetHdr { flags, ..VnetHdr::default() };
            return;
        };
        let l4 = usize::from(headers.l4_offset);
        if headers.is_ipv4() {
            put(packet, 2, (self.total_len as u16).to_be_bytes());
            put(packet, 10, [0, 0]);
            let checksum = checksum(&packet[..l4]);
            put(packet, 10, checksum.to_be_bytes());
        } else {
            put(packet, 4, ((self.total_len as usize - IPV6_HEADER) as u16).to_be_bytes());
        }
        let l4_len = self.total_len - u32::from(headers.l4_offset);
        let (gso_type, field) = if self.kind == Kind::Udp {
            put(packet, l4 + 4, (l4_len as u16).to_be_bytes());
            (GSO_UDP_L4, UDP_CHECKSUM)
        } else {
            packet[l4 + 13] |= self.end_flags;
            let ecn = if packet[l4 + 13] & TCP_CWR != 0 { GSO_ECN } else { GSO_NONE };
            (ecn | if headers.is_ipv4() { GSO_TCPV4 } else { GSO_TCPV6 }, TCP_CHECKSUM)
        };
        put(packet, l4 + field, fold(pseudo + l4_len).to_be_bytes());
        self.vnet = VnetHdr {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: headers.payload_offset() as u16,
            gso_size: self.size,
            csum_start: headers.l4_offset,
            csum_offset: field as u16,
        };
    }
}

fn payload_len(headers: &Headers) -> u32 {
    headers.total_len.saturating_sub(headers.payload_offset() as u32)
}

pub(super) fn same(old: &[u8], new: &[u8], range: Range<usize>) -> bool {
    match (old.get(range.clone()), new.get(range)) {
        (Some(old), Some(new)) => old == new,
        (_, _) => false,
    }
}

pub(super) fn be32(packet: &[u8], headers: &Headers, at: usize) -> u32 {
    headers
        .transport(packet)
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |b| u32::from_be_bytes(*b))
}
