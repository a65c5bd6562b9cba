//! Changes packets in place: addresses, ports, hop limit, MSS. Every checksum follows the change
//! incrementally, so that damage done on the way is not covered up.

use std::net::IpAddr;

use super::checksum::{self, Delta, transport_field, update};
use super::icmp::Quoted;
use super::parse::protocol;
use super::{DropReason, Fragment, Headers, L4};

/// New addresses and ports; what is `None` stays.
///
/// An ICMP echo has one identifier in place of two ports: a request takes it from the source, a
/// reply from the destination. Where there is no port (later fragments, other protocols), the new
/// one is not used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// New source: address, and port if that changes too.
    pub source: Option<(IpAddr, Option<u16>)>,
    /// New destination.
    pub destination: Option<(IpAddr, Option<u16>)>,
}

/// What the transport checksum field of a packet holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChecksumState {
    /// The checksum.
    Complete,
    /// The folded sum of the pseudo-header, not complemented: whoever sends the packet completes it
    /// (virtio's NEEDS_CSUM, which a TUN sets on super-packets).
    Partial,
}

/// Changes addresses and ports, and `headers` with them.
///
/// An error leaves the packet as it was: [`DropReason::Untranslatable`] when a new address is of
/// the other family, or a port of a fragmented SCTP packet should change.
pub fn rewrite(
    packet: &mut [u8],
    headers: &mut Headers,
    change: &Rewrite,
    state: ChecksumState,
) -> Result<(), DropReason> {
    translate(packet, headers, change, state).map(|_| ())
}

/// Changes the packet that an ICMP error quotes, and the error's checksum with it. The quote may be
/// cut: what is there is changed.
///
/// The error's own addresses are changed by [`rewrite`], before or after.
pub fn rewrite_quoted(
    packet: &mut [u8],
    headers: &Headers,
    quoted: &mut Quoted,
    change: &Rewrite,
) -> Result<(), DropReason> {
    let range = usize::from(quoted.start)..headers.total_len as usize;
    let Some(inner) = packet.get_mut(range) else { return Err(DropReason::Untranslatable) };
    let delta = translate(inner, &mut quoted.headers, change, ChecksumState::Complete)?;
    let at = usize::from(headers.l4_offset) + ICMP_CHECKSUM;
    if let Some(old) = read16(packet, at) {
        write16(packet, at, delta.apply(old));
    }
    Ok(())
}

/// Counts the hop limit down as a router does, and fails where the packet must die here.
pub fn decrement_hop_limit(packet: &mut [u8]) -> Result<(), DropReason> {
    match packet {
        [first, ..] if *first >> 4 == 6 => match packet.get_mut(7) {
            Some(limit @ 2..) => *limit -= 1,
            Some(0 | 1) => return Err(DropReason::HopLimit),
            None => return Err(DropReason::Truncated),
        },
        [_, ..] => {
            let (Some(old), Some(field)) = (read16(packet, 8), read16(packet, IPV4_CHECKSUM)) else {
                return Err(DropReason::Truncated);
            };
            if old >> 8 <= 1 {
                return Err(DropReason::HopLimit);
            }
            let new = old - 0x100;
            write16(packet, 8, new);
            write16(packet, IPV4_CHECKSUM, update(field, old, new));
        }
        [] => return Err(DropReason::Truncated),
    }
    Ok(())
}

/// Lowers the maximum segment size that a SYN announces to `mss`; says whether it had to.
///
/// Without the option the other end assumes 536 or 1,220 (RFC 9293 section 3.7.1), which fits
/// everywhere we go, so none is added.
pub fn clamp_mss(packet: &mut [u8], headers: &Headers, mss: u16, state: ChecksumState) -> bool {
    const SYN: u8 = 0x02;
    let L4::Tcp { flags, header_len, .. } = headers.l4 else { return false };
    if flags & SYN == 0 {
        return false;
    }
    let start = usize::from(headers.l4_offset);
    let Some(tcp) = packet.get_mut(start..start + usize::from(header_len)) else { return false };
    let Some(at) = mss_option(tcp) else { return false };
    let (Some(old), Some(field)) = (read16(tcp, at), read16(tcp, TCP_CHECKSUM)) else { return false };
    if old <= mss {
        return false;
    }
    write16(tcp, at, mss);
    match state {
        ChecksumState::Complete => {
            // At an odd offset the value straddles two words of the sum; swapped it counts the same
            // (RFC 1071 section 2 B).
            let (old, new) =
                if at.is_multiple_of(2) { (old, mss) } else { (old.swap_bytes(), mss.swap_bytes()) };
            write16(tcp, TCP_CHECKSUM, update(field, old, new));
        }
        ChecksumState::Partial => {}
    }
    true
}

const IPV4_CHECKSUM: usize = 10;
const IPV4_ADDRESSES: (usize, usize) = (12, 16);
const IPV6_ADDRESSES: (usize, usize) = (8, 24);
const TCP_CHECKSUM: usize = 16;
const ICMP_CHECKSUM: usize = 2;
const ICMP_ID: usize = 4;
const SCTP_CRC: usize = 8;
const ECHO_REQUESTS: [u8; 2] = [8, 128];
const ECHO_REPLIES: [u8; 2] = [0, 129];

/// Does the work of [`rewrite`]; returns the difference of all bytes that changed, for a checksum
/// that covers the whole packet.
fn translate(
    packet: &mut [u8],
    headers: &mut Headers,
    change: &Rewrite,
    state: ChecksumState,
) -> Result<Delta, DropReason> {
    let source = change.source.map_or(headers.source, |(address, _)| address);
    let destination = change.destination.map_or(headers.destination, |(address, _)| address);
    if source.is_ipv4() != headers.is_ipv4() || destination.is_ipv4() != headers.is_ipv4() {
        return Err(DropReason::Untranslatable);
    }
    let ports = new_ports(headers, change);
    if ports.is_some() && headers.protocol == protocol::SCTP && headers.fragment != Fragment::None {
        return Err(DropReason::Untranslatable);
    }

    let mut addresses = Delta::new();
    let (source_at, destination_at) = if headers.is_ipv4() { IPV4_ADDRESSES } else { IPV6_ADDRESSES };
    write_address(packet, source_at, source, &mut addresses);
    write_address(packet, destination_at, destination, &mut addresses);
    let mut all = addresses;
    if headers.is_ipv4() {
        write_counted(packet, IPV4_CHECKSUM, &mut all, |field| addresses.apply(field));
    }
    (headers.source, headers.destination) = (source, destination);
    let transport = packet.get_mut(usize::from(headers.l4_offset)..).unwrap_or_default();
    translate_transport(transport, headers, ports, addresses, state, &mut all);
    Ok(all)
}

/// The words that [`Rewrite`] puts where the ports stand, if they differ from what is there: source
/// and destination, or the identifier of an echo twice.
fn new_ports(headers: &Headers, change: &Rewrite) -> Option<(u16, u16)> {
    let source = change.source.and_then(|(_, port)| port);
    let destination = change.destination.and_then(|(_, port)| port);
    let old = match headers.l4 {
        L4::Tcp { source, destination, .. }
        | L4::Udp { source, destination }
        | L4::Sctp { source, destination } => (source, destination),
        L4::Icmp { kind, id, .. } if ECHO_REQUESTS.contains(&kind) => {
            return source.filter(|new| *new != id).map(|new| (new, new));
        }
        L4::Icmp { kind, id, .. } if ECHO_REPLIES.contains(&kind) => {
            return destination.filter(|new| *new != id).map(|new| (new, new));
        }
        L4::Icmp { .. } | L4::Other | L4::None => return None,
    };
    let new = (source.unwrap_or(old.0), destination.unwrap_or(old.1));
    (new != old).then_some(new)
}

fn translate_transport(
    transport: &mut [u8],
    headers: &mut Headers,
    ports: Option<(u16, u16)>,
    addresses: Delta,
    state: ChecksumState,
    all: &mut Delta,
) {
    let mut ports_delta = Delta::new();
    let len = headers.l4_len();
    match (&mut headers.l4, ports) {
        (
            L4::Tcp { source, destination, .. }
            | L4::Udp { source, destination }
            | L4::Sctp { source, destination },
            Some(new),
        ) => {
            let old_words = transport.first_chunk::<4>().copied();
            write_counted(transport, 0, &mut ports_delta, |_| new.0);
            write_counted(transport, 2, &mut ports_delta, |_| new.1);
            (*source, *destination) = new;
            if headers.protocol == protocol::SCTP && state == ChecksumState::Complete {
                update_crc(transport, old_words, len, all);
            }
        }
        (L4::Icmp { id, .. }, Some(new)) => {
            write_counted(transport, ICMP_ID, &mut ports_delta, |_| new.0);
            *id = new.0;
        }
        (_, None) | (L4::Other | L4::None, Some(_)) => {}
    }
    all.add(ports_delta);
    let Some(at) = transport_field(headers) else { return };
    // IPv4's ICMP is the one checksum here that covers no addresses.
    let covered = if headers.protocol == protocol::ICMP { Delta::new() } else { addresses };
    write_counted(transport, at, all, |field| match state {
        ChecksumState::Partial => covered.apply_partial(field),
        ChecksumState::Complete => {
            let mut delta = covered;
            delta.add(ports_delta);
            if matches!(headers.l4, L4::Udp { .. }) { delta.apply_udp(field) } else { delta.apply(field) }
        }
    });
}

/// Lets SCTP's CRC32c follow changed ports. It stands in the packet with its low byte first.
fn update_crc(transport: &mut [u8], old: Option<[u8; 4]>, len: usize, all: &mut Delta) {
    let (Some(old), Some(new)) = (old, transport.first_chunk::<4>().copied()) else { return };
    let difference = checksum::sctp_difference(old, new, len.saturating_sub(4));
    let [a, b, c, d] = difference.to_le_bytes();
    // A quote that was cut inside the CRC keeps the half that is there.
    write_counted(transport, SCTP_CRC, all, |field| field ^ u16::from_be_bytes([a, b]));
    write_counted(transport, SCTP_CRC + 2, all, |field| field ^ u16::from_be_bytes([c, d]));
}

/// Where the value of a TCP header's MSS option stands.
fn mss_option(tcp: &[u8]) -> Option<usize> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const MSS: u8 = 2;
    let mut at = 20;
    loop {
        match (*tcp.get(at)?, tcp.get(at + 1).copied()) {
            (END, _) => return None,
            (NO_OPERATION, _) => at += 1,
            (MSS, Some(4)) => return Some(at + 2),
            (_, Some(len @ 2..)) => at += usize::from(len),
            (_, Some(0 | 1) | None) => return None,
        }
    }
}

fn write_address(packet: &mut [u8], at: usize, new: IpAddr, delta: &mut Delta) {
    match new {
        IpAddr::V4(new) => write_bytes(packet, at, &new.octets(), delta),
        IpAddr::V6(new) => write_bytes(packet, at, &new.octets(), delta),
    }
}

fn write_bytes(packet: &mut [u8], at: usize, new: &[u8], delta: &mut Delta) {
    let Some(field) = packet.get_mut(at..at + new.len()) else { return };
    if field != new {
        delta.replace_bytes(field, new);
        field.copy_from_slice(new);
    }
}

/// Replaces the word at `at`, if it is there, and counts the change.
fn write_counted(packet: &mut [u8], at: usize, delta: &mut Delta, new: impl FnOnce(u16) -> u16) {
    let Some(old) = read16(packet, at) else { return };
    let new = new(old);
    delta.replace(old, new);
    write16(packet, at, new);
}

#[inline]
fn read16(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk::<2>()?))
}

#[inline]
fn write16(packet: &mut [u8], at: usize, value: u16) {
    if let Some(field) = packet.get_mut(at..).and_then(<[u8]>::first_chunk_mut::<2>) {
        *field = value.to_be_bytes();
    }
}
