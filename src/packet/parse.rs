//! The one place that looks into raw IP packets: [`parse`] checks once, [`Headers`] is trusted after.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use siphasher::sip::SipHasher13;

use super::DropReason;

/// Where a packet stands in a fragmented datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fragment {
    /// Whole.
    None,
    /// The first fragment: it carries the transport header.
    First {
        /// Identification, to find the others.
        id: u32,
    },
    /// A later one: no transport header in it.
    Later {
        /// Identification, to find the first.
        id: u32,
    },
}

/// What the packet carries above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L4 {
    /// TCP with a checked header length.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// The flags byte (CWR ECE URG ACK PSH RST SYN FIN).
        flags: u8,
        /// Header length with options, 20 to 60.
        header_len: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// SCTP.
    Sctp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// ICMP or ICMPv6.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// The identifier of an echo; 0 otherwise.
        id: u16,
    },
    /// A protocol we only route.
    Other,
    /// A later fragment: no transport header here.
    None,
}

/// The two halves of a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Echo {
    /// The asker's identifier stands on the source's side.
    Request,
    /// It stands on the destination's side.
    Reply,
}

impl Echo {
    /// What an ICMP type means (RFC 792, RFC 4443 section 4); each family's numbers mean other things in
    /// the other.
    pub const fn of(protocol: u8, kind: u8) -> Option<Echo> {
        match (protocol, kind) {
            (protocol::ICMP, 8) | (protocol::ICMPV6, 128) => Some(Echo::Request),
            (protocol::ICMP, 0) | (protocol::ICMPV6, 129) => Some(Echo::Reply),
            _ => None,
        }
    }
}

/// What [`parse`] found; offsets are checked against the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Offset of the transport header: IP header with options or extension headers.
    pub l4_offset: u16,
    /// Length of the packet as its IP header says; the buffer is at least this long. For a TUN
    /// super-packet this is the super-packet's length (up to 65,535 + 40).
    pub total_len: u32,
    /// The last protocol number (TCP 6, UDP 17, ...).
    pub protocol: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Traffic class or TOS byte.
    pub traffic_class: u8,
    /// IPv4's don't-fragment flag; always true for IPv6.
    pub dont_fragment: bool,
    /// Fragmentation.
    pub fragment: Fragment,
    /// Transport header.
    pub l4: L4,
}

/// Protocol numbers that we look into (IANA "Assigned Internet Protocol Numbers").
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// Checks a packet and says what it is.
///
/// The buffer may be longer than the packet (padding); it is the caller who cuts it to
/// [`Headers::total_len`]. The IPv4 header checksum is left to
/// [`super::checksum::verify_ipv4_header`], transport checksums to [`super::checksum::verify_transport`].
#[inline]
pub fn parse(packet: &[u8]) -> Result<Headers, DropReason> {
    let headers = parse_any_address(packet)?;
    if is_martian(&headers) {
        // The kernel speaks to groups from `::` on every new device (RFC 3810 section 5.2.13): nothing to find.
        let group = headers.destination.is_multicast();
        return Err(if group { DropReason::Multicast } else { DropReason::MartianAddress });
    }
    Ok(headers)
}

/// As [`parse`], but any address goes: for packets of this node's own host, where loopback
/// addresses are real (`127.0.0.1:nodePort`).
#[inline]
pub fn parse_any_address(packet: &[u8]) -> Result<Headers, DropReason> {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) => parse_v4::<WHOLE>(packet),
        Some(6) => parse_v6::<WHOLE>(packet),
        Some(_) => Err(DropReason::NotIp),
        None => Err(DropReason::Truncated),
    }
}

/// Reads a packet quoted inside an ICMP error: it may be cut anywhere after the first eight
/// bytes of its transport header (RFC 792), and its addresses are not judged.
///
/// [`Headers::total_len`] is what the quoted header claims, more than there is; a TCP header that
/// was cut has zero `flags` and the least `header_len`.
pub fn parse_quoted(packet: &[u8]) -> Option<Headers> {
    match packet.first()? >> 4 {
        4 => parse_v4::<QUOTED>(packet).ok(),
        6 => parse_v6::<QUOTED>(packet).ok(),
        _ => None,
    }
}

impl Headers {
    /// Whether the packet is IPv4.
    pub const fn is_ipv4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// Source and destination port of TCP, UDP and SCTP.
    pub const fn ports(&self) -> Option<(u16, u16)> {
        match self.l4 {
            L4::Tcp { source, destination, .. }
            | L4::Udp { source, destination }
            | L4::Sctp { source, destination } => Some((source, destination)),
            L4::Icmp { .. } | L4::Other | L4::None => None,
        }
    }

    /// Length of the transport header; 0 where there is none that we know.
    pub const fn l4_header_len(&self) -> usize {
        match self.l4 {
            L4::Tcp { header_len, .. } => header_len as usize,
            L4::Udp { .. } => UDP_LEN,
            L4::Sctp { .. } => SCTP_LEN,
            L4::Icmp { .. } => ICMP_LEN,
            L4::Other | L4::None => 0,
        }
    }

    /// Offset of what follows the transport header.
    pub const fn payload_offset(&self) -> usize {
        self.l4_offset as usize + self.l4_header_len()
    }

    /// Bytes from the transport header to the packet's end.
    pub const fn l4_len(&self) -> usize {
        (self.total_len as usize).saturating_sub(self.l4_offset as usize)
    }

    /// The transport header and what follows, up to the packet's end.
    #[inline]
    pub fn transport<'p>(&self, packet: &'p [u8]) -> &'p [u8] {
        packet.get(usize::from(self.l4_offset)..self.total_len as usize).unwrap_or(&[])
    }

    /// A hash of the flow, the same for every packet of one direction of it, seeded so that no
    /// sender can aim at a value. All fragments of two hosts share one, since only first fragments
    /// show ports: a datagram's fragments must take one path.
    pub fn flow_hash(&self, seed: u64) -> u64 {
        let (first, second) = match (self.fragment, self.l4) {
            (Fragment::First { .. } | Fragment::Later { .. }, _) => (0, 0),
            (Fragment::None, L4::Icmp { id, .. }) => (id, 0),
            (Fragment::None, _) => self.ports().unwrap_or((0, 0)),
        };
        let protocol = if self.fragment == Fragment::None { self.protocol } else { 0 };
        let mut key = [0; 37];
        let (addresses, rest) = key.split_at_mut(32);
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                addresses[..4].copy_from_slice(&source.octets());
                addresses[4..8].copy_from_slice(&destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                addresses[..16].copy_from_slice(&source.octets());
                addresses[16..].copy_from_slice(&destination.octets());
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {}
        }
        rest[..2].copy_from_slice(&first.to_be_bytes());
        rest[2..4].copy_from_slice(&second.to_be_bytes());
        rest[4] = protocol;
        SipHasher13::new_with_keys(seed, !seed).hash(&key)
    }
}

/// Parse a packet that is all there.
const WHOLE: bool = false;
/// Parse what an ICMP error quotes.
const QUOTED: bool = true;

const TCP_LEN: usize = 20;
const UDP_LEN: usize = 8;
const SCTP_LEN: usize = 12;
const ICMP_LEN: usize = 8;
const IPV6_LEN: usize = 40;

/// The largest datagram that fragments may add up to (RFC 791 section 3.1, RFC 8200 section 4.5).
const MAX_DATAGRAM: usize = 65_535;

/// Extension headers we walk: each of RFC 8200's may stand once, destination options twice, and
/// every header costs time per packet, so more than this is an attack (RFC 9098 section 4.2).
const MAX_EXTENSIONS: usize = 8;

// Extension headers that we walk over (RFC 8200 section 4); AH, ESP and the rest end the walk.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

#[inline]
fn parse_v4<const Q: bool>(packet: &[u8]) -> Result<Headers, DropReason> {
    let Some(ip) = packet.first_chunk::<20>() else { return Err(DropReason::Truncated) };
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    let total_len = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    if header_len < 20 || total_len < header_len {
        return Err(DropReason::MalformedHeader);
    }
    if !Q && total_len > packet.len() || header_len > packet.len() {
        return Err(DropReason::Truncated);
    }
    if header_len > 20 && !Q {
        check_options(&packet[20..header_len])?;
    }
    let protocol = ip[9];
    let flags = u16::from_be_bytes([ip[6], ip[7]]);
    let (offset, more) = (usize::from(flags & 0x1fff) * 8, flags & 0x2000 != 0);
    let mut fragment = Fragment::None;
    if offset != 0 || more {
        check_fragment(offset, more, total_len - header_len, protocol)?;
        let id = u32::from(u16::from_be_bytes([ip[4], ip[5]]));
        fragment = if offset == 0 { Fragment::First { id } } else { Fragment::Later { id } };
    }
    let view = &packet[..total_len.min(packet.len())];
    Ok(Headers {
        source: IpAddr::V4(Ipv4Addr::new(ip[12], ip[13], ip[14], ip[15])),
        destination: IpAddr::V4(Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19])),
        l4_offset: header_len as u16,
        total_len: total_len as u32,
        protocol,
        hop_limit: ip[8],
        traffic_class: ip[1],
        dont_fragment: flags & 0x4000 != 0,
        fragment,
        l4: parse_l4::<Q>(view, header_len, protocol, protocol::ICMP, fragment)?,
    })
}

#[inline]
fn parse_v6<const Q: bool>(packet: &[u8]) -> Result<Headers, DropReason> {
    let Some(ip) = packet.first_chunk::<IPV6_LEN>() else { return Err(DropReason::Truncated) };
    // A jumbogram (RFC 2675) has length 0 and fails at its hop-by-hop header: none comes from a TUN.
    let total_len = IPV6_LEN + usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    if !Q && total_len > packet.len() {
        return Err(DropReason::Truncated);
    }
    let view = &packet[..total_len.min(packet.len())];
    let mut chain = Chain { offset: IPV6_LEN, protocol: ip[6], fragment: Fragment::None };
    if matches!(chain.protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS) {
        chain = walk_extensions::<Q>(view, chain.protocol, total_len)?;
    }
    Ok(Headers {
        source: IpAddr::V6(address_v6(ip, 8)),
        destination: IpAddr::V6(address_v6(ip, 24)),
        l4_offset: chain.offset as u16,
        total_len: total_len as u32,
        protocol: chain.protocol,
        hop_limit: ip[7],
        traffic_class: ip[0] << 4 | ip[1] >> 4,
        dont_fragment: true,
        fragment: chain.fragment,
        l4: parse_l4::<Q>(view, chain.offset, chain.protocol, protocol::ICMPV6, chain.fragment)?,
    })
}

#[inline]
fn address_v6(ip: &[u8; IPV6_LEN], at: usize) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&ip[at..at + 16]);
    Ipv6Addr::from(octets)
}

/// Where the walk over IPv6 extension headers ended.
struct Chain {
    offset: usize,
    protocol: u8,
    fragment: Fragment,
}

/// Walks RFC 8200's extension headers. A fragment header that fragments nothing (RFC 6946) is
/// walked over like any other; a later fragment ends the walk.
fn walk_extensions<const Q: bool>(view: &[u8], first: u8, total_len: usize) -> Result<Chain, DropReason> {
    let mut chain = Chain { offset: IPV6_LEN, protocol: first, fragment: Fragment::None };
    let mut fragment_seen = false;
    for count in 0..=MAX_EXTENSIONS {
        if !matches!(chain.protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS) {
            return Ok(chain);
        }
        let Some(header) = view.get(chain.offset..).and_then(<[u8]>::first_chunk::<8>) else {
            return Err(DropReason::MalformedHeader);
        };
        let this = chain.protocol;
        chain.protocol = header[0];
        chain.offset += if this == FRAGMENT { 8 } else { (usize::from(header[1]) + 1) * 8 };
        if chain.offset > view.len() {
            return Err(DropReason::MalformedHeader);
        }
        match this {
            // RFC 8200 section 4.1: hop-by-hop options stand first or nowhere.
            HOP_BY_HOP if count > 0 => return Err(DropReason::MalformedHeader),
            ROUTING if !Q && header[3] != 0 => return Err(DropReason::SourceRouted),
            FRAGMENT if fragment_seen => return Err(DropReason::MalformedHeader),
            FRAGMENT => {
                fragment_seen = true;
                let flags = u16::from_be_bytes([header[2], header[3]]);
                let (offset, more) = (usize::from(flags & 0xfff8), flags & 1 != 0);
                if offset == 0 && !more {
                    continue;
                }
                check_fragment(offset, more, total_len - chain.offset, chain.protocol)?;
                let id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                if offset > 0 {
                    chain.fragment = Fragment::Later { id };
                    return Ok(chain);
                }
                chain.fragment = Fragment::First { id };
            }
            _ => {}
        }
    }
    Err(DropReason::TooManyExtensions)
}

/// What makes a fragment one that no honest sender makes.
fn check_fragment(offset: usize, more: bool, data: usize, protocol: u8) -> Result<(), DropReason> {
    let ragged = data == 0 || more && !data.is_multiple_of(8);
    // RFC 1858 and RFC 3128: a fragment that overwrites TCP's header behind a filter's back.
    let overlaps = protocol == protocol::TCP && offset > 0 && offset < TCP_LEN;
    if ragged || overlaps || offset + data > MAX_DATAGRAM {
        return Err(DropReason::MalformedHeader);
    }
    Ok(())
}

/// IPv4 options are carried as they are, but for source routes: they would let a sender reach, by
/// way of a pod, what the checks on its destination forbid (RFC 7126 section 4.3).
fn check_options(mut options: &[u8]) -> Result<(), DropReason> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const LOOSE_SOURCE_ROUTE: u8 = 131;
    const STRICT_SOURCE_ROUTE: u8 = 137;
    while let Some(&kind) = options.first() {
        let len = match kind {
            END => return Ok(()),
            NO_OPERATION => 1,
            _ => usize::from(options.get(1).copied().unwrap_or(0)),
        };
        if kind != NO_OPERATION && len < 2 || len > options.len() {
            return Err(DropReason::MalformedHeader);
        }
        if matches!(kind, LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE) {
            return Err(DropReason::SourceRouted);
        }
        options = &options[len..];
    }
    Ok(())
}

/// Reads the transport header. `icmp` is the number under which this IP version carries its ICMP.
#[inline]
fn parse_l4<const Q: bool>(
    view: &[u8],
    offset: usize,
    protocol: u8,
    icmp: u8,
    fragment: Fragment,
) -> Result<L4, DropReason> {
    if let Fragment::Later { .. } = fragment {
        return Ok(L4::None);
    }
    let known = matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP) || protocol == icmp;
    if !known {
        return Ok(L4::Other);
    }
    let transport = view.get(offset..).unwrap_or(&[]);
    let Some(&head) = transport.first_chunk::<8>() else { return Err(DropReason::MalformedTransport) };
    let source = u16::from_be_bytes([head[0], head[1]]);
    let destination = u16::from_be_bytes([head[2], head[3]]);
    match protocol {
        protocol::TCP => {
            let Some(tcp) = transport.first_chunk::<TCP_LEN>() else {
                return if Q {
                    Ok(L4::Tcp { source, destination, flags: 0, header_len: TCP_LEN as u8 })
                } else {
                    Err(DropReason::MalformedTransport)
                };
            };
            let header_len = (tcp[12] >> 4) * 4;
            if usize::from(header_len) < TCP_LEN || !Q && usize::from(header_len) > transport.len() {
                return Err(DropReason::MalformedTransport);
            }
            Ok(L4::Tcp { source, destination, flags: tcp[13], header_len })
        }
        protocol::UDP => {
            let len = usize::from(u16::from_be_bytes([head[4], head[5]]));
            // The length is the whole datagram's; only an unfragmented one can be held against it.
            let whole = !Q && fragment == Fragment::None;
            if len < UDP_LEN || whole && len > transport.len() {
                return Err(DropReason::MalformedTransport);
            }
            Ok(L4::Udp { source, destination })
        }
        protocol::SCTP if !Q && transport.len() < SCTP_LEN => Err(DropReason::MalformedTransport),
        protocol::SCTP => Ok(L4::Sctp { source, destination }),
        _ => {
            let (kind, code) = (head[0], head[1]);
            let id = if Echo::of(icmp, kind).is_some() { u16::from_be_bytes([head[4], head[5]]) } else { 0 };
            Ok(L4::Icmp { kind, code, id })
        }
    }
}

/// Addresses that no packet on a wire may carry (RFC 1812 section 5.3.7, RFC 4291 section 2.5).
#[inline]
fn is_martian(headers: &Headers) -> bool {
    match (headers.source, headers.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            source.is_multicast()
                || source.is_broadcast()
                || [source, destination].iter().any(|a| a.is_unspecified() || a.is_loopback())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            source.is_multicast()
                || [source, destination].iter().any(|a| {
                    // IPv4-mapped addresses are an API's notation; on a wire they are IPv4 addresses
                    // that slip past IPv4's checks (the kernel's ip6_rcv_core drops them too).
                    a.is_unspecified() || a.is_loopback() || a.to_ipv4_mapped().is_some()
                })
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::checksum::{self, Verdict};
    use crate::packet::testing::{Kind, Piece, samples};

    /// A SYN with the options that Linux sends.
    const SYN: [u8; 60] = [
        0x45, 0x00, 0x00, 0x3c, 0x1c, 0x46, 0x40, 0x00, 0x40, 0x06, 0xb1, 0xe6, 0xac, 0x10, 0x0a, 0x63, 0xac,
        0x10, 0x0a, 0x0c, 0xd4, 0x31, 0x00, 0x50, 0x3e, 0x4c, 0x4b, 0x40, 0x00, 0x00, 0x00, 0x00, 0xa0, 0x02,
        0xfa, 0xf0, 0x00, 0x00, 0x00, 0x00, 0x02, 0x04, 0x05, 0xb4, 0x04, 0x02, 0x08, 0x0a, 0x00, 0x9c, 0x27,
        0x24, 0x00, 0x00, 0x00, 0x00, 0x01, 0x03, 0x03, 0x07,
    ];

    #[test]
    fn tcp_over_ipv4() {
        let headers = parse(&SYN).unwrap();
        assert!(checksum::verify_ipv4_header(&SYN));
        assert_eq!(headers.source.to_string(), "172.16.10.99");
        assert_eq!(headers.destination.to_string(), "172.16.10.12");
        assert_eq!((headers.l4_offset, headers.total_len, headers.hop_limit), (20, 60, 64));
        assert_eq!(headers.l4, L4::Tcp { source: 54321, destination: 80, flags: 0x02, header_len: 40 });
        assert_eq!((headers.ports(), headers.payload_offset()), (Some((54321, 80)), 60));
        assert!(headers.dont_fragment && headers.fragment == Fragment::None);
    }

    #[test]
    fn every_cut_is_refused() {
        for len in 0..SYN.len() {
            assert_eq!(parse(&SYN[..len]), Err(DropReason::Truncated), "{len}");
        }
    }

    #[test]
    fn lengths_that_contradict_each_other() {
        let with = |at: usize, value: u8| {
            let mut packet = SYN;
            packet[at] = value;
            parse(&packet)
        };
        assert_eq!(with(0, 0x44), Err(DropReason::MalformedHeader), "header length below 20");
        assert_eq!(with(0, 0x4f), Err(DropReason::MalformedHeader), "options of garbage");
        assert_eq!(with(3, 19), Err(DropReason::MalformedHeader), "total length below the header");
        assert_eq!(with(3, 61), Err(DropReason::Truncated));
        assert_eq!(with(3, 39), Err(DropReason::MalformedTransport), "half a TCP header");
        assert_eq!(with(32, 0x40), Err(DropReason::MalformedTransport), "data offset below 5");
        assert_eq!(with(32, 0xb0), Err(DropReason::MalformedTransport), "data offset beyond the end");
        assert_eq!(with(0, 0x55), Err(DropReason::NotIp));
        assert_eq!(with(12, 127), Err(DropReason::MartianAddress));
        assert_eq!(with(16, 127), Err(DropReason::MartianAddress));
        assert_eq!(with(12, 224), Err(DropReason::MartianAddress));
        assert!(with(16, 224).is_ok(), "multicast destinations are the route's to judge");
    }

    #[test]
    fn extension_headers_end_somewhere() {
        let mut packet = vec![0; 40 + 9 * 8 + 8];
        packet[0] = 0x60;
        packet[5] = (packet.len() - 40) as u8;
        packet[6] = DESTINATION_OPTIONS;
        (packet[8], packet[24]) = (0x20, 0x20);
        for header in 0..9 {
            packet[40 + header * 8] = DESTINATION_OPTIONS;
        }
        assert_eq!(parse(&packet), Err(DropReason::TooManyExtensions));
        packet[40 + 7 * 8] = protocol::UDP;
        packet[40 + 8 * 8 + 5] = 8;
        let headers = parse(&packet).unwrap();
        assert_eq!((headers.l4_offset, headers.protocol), (40 + 64, protocol::UDP));
        packet[40 + 8] = HOP_BY_HOP;
        assert_eq!(parse(&packet), Err(DropReason::MalformedHeader), "hop-by-hop options not first");
        packet[40] = ROUTING;
        packet[40 + 8] = DESTINATION_OPTIONS;
        assert!(parse(&packet).is_ok(), "a routing header that is done");
        packet[40 + 8 + 3] = 1;
        assert_eq!(parse(&packet), Err(DropReason::SourceRouted));
    }

    #[test]
    fn one_fragment_header_at_most() {
        let mut packet = vec![0; 40 + 16];
        (packet[0], packet[5], packet[6], packet[8], packet[24]) = (0x60, 16, FRAGMENT, 0x20, 0x20);
        packet[40] = FRAGMENT;
        packet[48] = 59;
        assert_eq!(parse(&packet), Err(DropReason::MalformedHeader));
        packet[40] = DESTINATION_OPTIONS;
        assert_eq!(parse(&packet).map(|headers| headers.fragment), Ok(Fragment::None), "an atomic fragment");
        packet[43] = 1;
        assert_eq!(parse(&packet).map(|headers| headers.fragment), Ok(Fragment::First { id: 0 }));
        packet[42] = 1;
        let later = parse(&packet).unwrap();
        assert_eq!((later.fragment, later.l4_offset), (Fragment::Later { id: 0 }, 48));
    }

    #[test]
    fn source_routes_of_ipv4() {
        let mut packet = [0; 28];
        packet[..4].copy_from_slice(&[0x47, 0, 0, 28]);
        (packet[9], packet[12], packet[16]) = (47, 10, 10);
        packet[20..28].copy_from_slice(&[1, 131, 7, 4, 10, 0, 0, 1]);
        assert_eq!(parse(&packet), Err(DropReason::SourceRouted));
        packet[21] = 7;
        assert!(parse(&packet).is_ok(), "recording the route is harmless");
        packet[22] = 1;
        assert_eq!(parse(&packet), Err(DropReason::MalformedHeader), "an option shorter than itself");
    }

    #[test]
    fn martians_of_ipv6() {
        let with = |source: &str, destination: &str| {
            let mut packet = vec![0; 40];
            (packet[0], packet[6]) = (0x60, 59);
            packet[8..24].copy_from_slice(&source.parse::<Ipv6Addr>().unwrap().octets());
            packet[24..40].copy_from_slice(&destination.parse::<Ipv6Addr>().unwrap().octets());
            parse(&packet).map(|headers| headers.l4)
        };
        assert_eq!(with("fd00::1", "fd00::2"), Ok(L4::Other));
        assert_eq!(with("fd00::1", "ff02::1"), Ok(L4::Other));
        for (source, destination) in
            [("::", "fd00::2"), ("::1", "fd00::2"), ("fd00::1", "::1"), ("ff02::1", "fd00::2")]
        {
            assert_eq!(with(source, destination), Err(DropReason::MartianAddress), "{source} {destination}");
        }
        assert_eq!(with("::ffff:127.0.0.1", "fd00::2"), Err(DropReason::MartianAddress));
        assert_eq!(with("::", "ff02::16"), Err(DropReason::Multicast));
    }

    #[test]
    fn fragments_no_honest_sender_makes() {
        let fragment = |offset, data, more, protocol| check_fragment(offset, more, data, protocol).is_ok();
        assert!(fragment(0, 1480, true, protocol::UDP));
        assert!(fragment(1480, 1, false, protocol::UDP));
        assert!(!fragment(1480, 1, true, protocol::UDP), "not a multiple of eight, and not the last");
        assert!(!fragment(0, 0, true, protocol::UDP), "without data");
        assert!(!fragment(8, 100, false, protocol::TCP), "overlaps the TCP header");
        assert!(!fragment(65_528, 8, false, protocol::UDP), "beyond the largest datagram");
    }

    /// Addresses, whether it is a fragment, ports, transport header length.
    type Facts = (IpAddr, IpAddr, bool, Option<(u16, u16)>, Option<usize>);

    /// What etherparse says of a packet, as far as both of us say it.
    fn by_etherparse(packet: &[u8]) -> Option<Facts> {
        use etherparse::{NetSlice, SlicedPacket, TransportSlice};
        let sliced = SlicedPacket::from_ip(packet).ok()?;
        let (source, destination): (IpAddr, IpAddr) = match sliced.net.as_ref()? {
            NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            NetSlice::Arp(_) => return None,
        };
        let (ports, header_len) = match &sliced.transport {
            Some(TransportSlice::Tcp(tcp)) => {
                (Some((tcp.source_port(), tcp.destination_port())), Some(usize::from(tcp.data_offset()) * 4))
            }
            Some(TransportSlice::Udp(udp)) => (Some((udp.source_port(), udp.destination_port())), Some(8)),
            Some(TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_)) => (None, Some(8)),
            Some(TransportSlice::Igmp(_)) | None => (None, None),
        };
        Some((source, destination, sliced.is_ip_payload_fragmented(), ports, header_len))
    }

    proptest! {
        #[test]
        fn parses_what_was_meant(sample in samples(), padding in 0..20usize) {
            let mut packet = sample.whole();
            let len = packet.len();
            packet.resize(len + padding, 0xee);
            let headers = parse(&packet).unwrap();
            prop_assert_eq!((headers.source, headers.destination), (sample.source, sample.destination));
            prop_assert_eq!(usize::from(headers.l4_offset), sample.l4_offset());
            prop_assert_eq!(headers.total_len as usize, len);
            prop_assert_eq!((headers.protocol, headers.hop_limit), (sample.protocol(), sample.hop_limit));
            prop_assert_eq!(headers.traffic_class, if sample.is_ipv4() { 0 } else { 0x2e });
            prop_assert_eq!(headers.fragment, Fragment::None);
            prop_assert_eq!(headers.payload_offset(), len - sample.payload.len());
            match (sample.kind, headers.l4) {
                (Kind::Tcp { syn, ack, fin, .. }, L4::Tcp { flags, .. }) => {
                    let expected = u8::from(ack) << 4 | u8::from(syn) << 1 | u8::from(fin);
                    prop_assert_eq!((flags, headers.ports()), (expected, Some(sample.ports)));
                }
                (Kind::Udp | Kind::UdpUnsummed, L4::Udp { .. }) | (Kind::Sctp, L4::Sctp { .. }) => {
                    prop_assert_eq!(headers.ports(), Some(sample.ports));
                }
                (Kind::EchoRequest | Kind::EchoReply, L4::Icmp { id, .. }) => {
                    prop_assert_eq!(id, sample.ports.0);
                }
                (Kind::Other, L4::Other) => {}
                (kind, l4) => prop_assert!(false, "{:?} read as {:?}", kind, l4),
            }
            let verdict = checksum::check_transport(&packet, &headers);
            match sample.kind {
                Kind::Sctp | Kind::Other => prop_assert_eq!(verdict, Verdict::Unknown),
                Kind::UdpUnsummed if !sample.is_ipv4() => prop_assert_eq!(verdict, Verdict::Unknown),
                _ => prop_assert_eq!(verdict, Verdict::Right),
            }
            prop_assert!(!sample.is_ipv4() || checksum::verify_ipv4_header(&packet));
        }

        #[test]
        fn parses_fragments(mut sample in samples(), cut in 8..20usize, id in any::<u32>()) {
            let cut = cut * 8;
            sample.payload.resize(sample.payload.len().max(cut + 1), 7);
            let len = sample.whole().len() - sample.l4_offset();
            let id = if sample.is_ipv4() { id & 0xffff } else { id };
            let first = parse(&sample.fragment(Piece { offset: 0, len: cut, more: true, id })).unwrap();
            let later =
                parse(&sample.fragment(Piece { offset: cut, len: len - cut, more: false, id })).unwrap();
            prop_assert_eq!((first.fragment, later.fragment), (Fragment::First { id }, Fragment::Later { id }));
            prop_assert_eq!(first.l4, parse(&sample.whole()).unwrap().l4);
            prop_assert_eq!((later.l4, later.protocol), (L4::None, sample.protocol()));
            prop_assert_eq!(first.flow_hash(5), later.flow_hash(5));
        }

        #[test]
        fn agrees_with_etherparse(
            sample in samples(),
            damage in proptest::collection::vec((0..120usize, any::<u8>()), 0..4),
            cut in 0..40usize,
        ) {
            let mut packet = sample.whole();
            for (at, value) in damage {
                let len = packet.len();
                packet[at % len] = value;
            }
            packet.truncate(packet.len().saturating_sub(cut.saturating_sub(20)));
            let Ok(ours) = parse_any_address(&packet) else { return Ok(()) };
            // etherparse reads on behind an authentication header, and wants more than the eight
            // bytes of some ICMP types; we carry both as they are.
            prop_assume!(ours.protocol != 51 && !matches!(ours.l4, L4::Icmp { kind: 13 | 14, .. }));
            let theirs = by_etherparse(&packet);
            prop_assert!(theirs.is_some(), "only we accept {:?} as {:?}", packet, ours);
            let (source, destination, fragmented, ports, header_len) = theirs.unwrap();
            prop_assert_eq!((ours.source, ours.destination), (source, destination));
            prop_assert_eq!(ours.fragment != Fragment::None, fragmented);
            if !fragmented && !matches!(ours.l4, L4::Sctp { .. } | L4::Other) {
                prop_assert_eq!((ours.ports(), Some(ours.l4_header_len())), (ports, header_len));
            }
        }

        #[test]
        fn a_quote_names_its_flow_from_eight_bytes_on(sample in samples(), cut in 8..40usize) {
            let packet = sample.whole();
            let whole = parse(&packet).unwrap();
            let cut = (sample.l4_offset() + cut).min(packet.len());
            let quoted = parse_quoted(&packet[..cut]);
            if packet.len() - sample.l4_offset() >= 8 {
                let quoted = quoted.unwrap();
                prop_assert_eq!((quoted.source, quoted.destination), (whole.source, whole.destination));
                prop_assert_eq!((quoted.ports(), quoted.l4_offset), (whole.ports(), whole.l4_offset));
                prop_assert_eq!(quoted.total_len, whole.total_len);
            }
        }
    }

    #[test]
    fn a_seed_changes_the_hash_of_a_flow() {
        let headers = parse(&SYN).unwrap();
        assert_eq!(headers.flow_hash(1), headers.flow_hash(1));
        assert_ne!(headers.flow_hash(1), headers.flow_hash(2));
        let mut other = SYN;
        other[21] += 1;
        assert_ne!(headers.flow_hash(1), parse(&other).unwrap().flow_hash(1));
    }
}
