//! Changes packets in place: addresses, ports, hop limit, MSS. Every checksum follows the change
//! incrementally, so that damage done on the way is not covered up.

use std::net::IpAddr;

use super::checksum::{self, Delta, transport_field, update};
use super::icmp::Quoted;
use super::parse::{Echo, protocol};
use super::{DropReason, Fragment, Headers, L4};

/// New addresses and ports; what is `None` stays.
///
/// An ICMP echo has one identifier in place of two ports: a request takes it from the source, a
/// reply from the destination. Where there is no port (later fragments, other protocols), the new
/// one is not used; protocols that we only route get new addresses, no new checksum.
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

/// Counts the hop limit of a parsed packet down as a router does, and fails where it must die here.
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
        L4::Icmp { kind, id, .. } => {
            let new = match Echo::of(headers.protocol, kind)? {
                Echo::Request => source,
                Echo::Reply => destination,
            };
            return new.filter(|new| *new != id).map(|new| (new, new));
        }
        L4::Other | L4::None => return None,
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
    // The one message whose checksum is 0xffff: an echo reply with nothing in it.
    let nothing = || transport.get(..len).is_some_and(|message| message.iter().all(|byte| *byte == 0));
    if headers.protocol == protocol::ICMP && ports.is_some() && nothing() {
        write_counted(transport, ICMP_CHECKSUM, all, |_| 0xffff);
    }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::parse::parse_quoted;
    use crate::packet::testing::{
        Kind, Piece, Sample, icmp_error, samples, samples_and_addresses, tcp_kinds,
    };
    use crate::packet::{icmp, parse};
    use etherparse::{Icmpv6Type, PacketBuilder};

    /// What a rewrite makes of a sample; bytes are then built anew.
    fn changed(sample: &Sample, change: &Rewrite) -> Sample {
        let mut new = sample.clone();
        if let Some((address, port)) = change.source {
            new.source = address;
            new.ports.0 = port.unwrap_or(new.ports.0);
        }
        if let Some((address, port)) = change.destination {
            new.destination = address;
            new.ports.1 = port.unwrap_or(new.ports.1);
        }
        match new.kind {
            Kind::EchoRequest => new.ports.1 = new.ports.0,
            Kind::EchoReply => new.ports.0 = new.ports.1,
            Kind::Tcp { .. } | Kind::Udp | Kind::UdpUnsummed | Kind::Sctp | Kind::Other => {}
        }
        new
    }

    fn changes(source: IpAddr, destination: IpAddr) -> impl Strategy<Value = Rewrite> {
        (any::<(bool, bool)>(), any::<(Option<u16>, Option<u16>)>()).prop_map(move |(which, ports)| Rewrite {
            source: which.0.then_some((source, ports.0)),
            destination: which.1.then_some((destination, ports.1)),
        })
    }

    fn cases() -> impl Strategy<Value = (Sample, Rewrite)> {
        samples_and_addresses()
            .prop_flat_map(|(sample, source, destination)| (Just(sample), changes(source, destination)))
    }

    /// The same packet with its checksum left to be completed.
    fn partial(mut packet: Vec<u8>, headers: &Headers) -> Vec<u8> {
        let at = usize::from(headers.l4_offset) + transport_field(headers).unwrap();
        let (source, destination) = (headers.source, headers.destination);
        let sum = checksum::pseudo_header(source, destination, headers.protocol, headers.l4_len() as u32);
        packet[at..at + 2].copy_from_slice(&checksum::fold(sum).to_be_bytes());
        packet
    }

    #[test]
    fn an_echo_reply_of_nothing_keeps_its_checksum() {
        let (from, to) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let reply = |id| {
            let mut packet = Vec::new();
            let builder = PacketBuilder::ipv4(from, to, 64).icmpv4_echo_reply(id, 0);
            builder.write(&mut packet, &[0; 6]).unwrap();
            let headers = parse(&packet).unwrap();
            checksum::fill_transport(&mut packet, &headers);
            (packet, headers)
        };
        for (before, after) in [(0, 0), (0, 9), (9, 0)] {
            let (mut packet, mut headers) = reply(before);
            let change = Rewrite { source: None, destination: Some((to.into(), Some(after))) };
            rewrite(&mut packet, &mut headers, &change, ChecksumState::Complete).unwrap();
            assert_eq!(packet, reply(after).0, "from {before} to {after}");
        }
    }

    /// Type 0 is IPv4's echo reply and nothing in ICMPv6: no identifier to change there.
    #[test]
    fn an_echo_is_one_in_its_own_family_only() {
        let (from, to): (IpAddr, IpAddr) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        let mut whole = Vec::new();
        let (IpAddr::V6(source), IpAddr::V6(destination)) = (from, to) else { unreachable!() };
        let unknown = Icmpv6Type::Unknown { type_u8: 0, code_u8: 0, bytes5to8: [5, 6, 0, 1] };
        let builder = PacketBuilder::ipv6(source.octets(), destination.octets(), 64).icmpv6(unknown);
        builder.write(&mut whole, b"").unwrap();
        let (mut packet, mut headers) = (whole.clone(), parse(&whole).unwrap());
        let change = Rewrite { source: Some((from, Some(9))), destination: Some((to, Some(9))) };
        rewrite(&mut packet, &mut headers, &change, ChecksumState::Complete).unwrap();
        assert_eq!((packet, Ok(headers)), (whole.clone(), parse(&whole)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn rewriting_is_building_anew((sample, change) in cases()) {
            let mut packet = sample.whole();
            let mut headers = parse(&packet).unwrap();
            rewrite(&mut packet, &mut headers, &change, ChecksumState::Complete).unwrap();
            prop_assert_eq!(&packet, &changed(&sample, &change).whole());
            prop_assert_eq!(Ok(headers), parse(&packet));
        }

        #[test]
        fn there_and_back((sample, change) in cases(), damage in any::<(u8, u8)>()) {
            let mut packet = sample.whole();
            // Damage to the payload survives too: nothing is repaired on the way.
            if let Some(at) = usize::from(damage.0).checked_rem(sample.payload.len()) {
                let at = packet.len() - 1 - at;
                packet[at] ^= damage.1;
            }
            let before = packet.clone();
            let mut headers = parse(&packet).unwrap();
            rewrite(&mut packet, &mut headers, &change, ChecksumState::Complete).unwrap();
            let back = Rewrite {
                source: Some((sample.source, Some(sample.ports.0))),
                destination: Some((sample.destination, Some(sample.ports.1))),
            };
            rewrite(&mut packet, &mut headers, &back, ChecksumState::Complete).unwrap();
            prop_assert_eq!(packet, before);
        }

        #[test]
        fn fragments_follow_their_datagram((mut sample, change) in cases(), cut in 8..20usize) {
            let cut = cut * 8;
            sample.payload.resize(sample.payload.len().max(cut + 1), 7);
            let len = sample.whole().len() - sample.l4_offset();
            let new = changed(&sample, &change);
            for piece in [
                Piece { offset: 0, len: cut, more: true, id: 3 },
                Piece { offset: cut, len: len - cut, more: false, id: 3 },
            ] {
                let mut packet = sample.fragment(piece);
                let mut headers = parse(&packet).unwrap();
                let before = packet.clone();
                match rewrite(&mut packet, &mut headers, &change, ChecksumState::Complete) {
                    Ok(()) => prop_assert_eq!(&packet, &new.fragment(piece)),
                    Err(reason) => {
                        prop_assert_eq!(reason, DropReason::Untranslatable);
                        prop_assert!(sample.kind == Kind::Sctp && new.ports != sample.ports);
                        prop_assert_eq!(&packet, &before);
                    }
                }
            }
        }

        #[test]
        fn partial_checksums_stay_partial((sample, change) in cases()) {
            let kind = if let Kind::Tcp { .. } = sample.kind { sample.kind } else { Kind::Udp };
            let sample = Sample { kind, ..sample };
            let packet = sample.whole();
            let mut headers = parse(&packet).unwrap();
            let mut packet = partial(packet, &headers);
            rewrite(&mut packet, &mut headers, &change, ChecksumState::Partial).unwrap();
            let expected = partial(changed(&sample, &change).whole(), &headers);
            prop_assert_eq!(packet, expected);
        }

        #[test]
        fn quotes_follow((sample, change) in cases(), router in 0..2usize, cut in 8..300usize) {
            let whole = sample.whole();
            prop_assume!(whole.len() - sample.l4_offset() >= 8);
            let cut = (sample.l4_offset() + cut).min(whole.len());
            let to = [sample.source, sample.destination][router];
            let mut error = icmp_error(sample.destination, to, &whole[..cut]);
            let headers = parse(&error).unwrap();
            let mut quoted = icmp::quoted(&error, &headers).unwrap();
            rewrite_quoted(&mut error, &headers, &mut quoted, &change).unwrap();
            let mut expected = changed(&sample, &change).whole();
            let (at, len) = match sample.kind {
                Kind::Tcp { .. } => (sample.l4_offset() + 16, 2),
                Kind::Sctp => (sample.l4_offset() + 8, 4),
                Kind::Udp | Kind::UdpUnsummed | Kind::EchoRequest | Kind::EchoReply | Kind::Other => (0, 0),
            };
            // Half of a checksum is not changed to anything meaningful; the sums around it still hold.
            prop_assume!(!(at + 1..at + len).contains(&cut));
            expected.truncate(cut);
            prop_assert_eq!(error, icmp_error(sample.destination, to, &expected));
            prop_assert_eq!((quoted.headers.source, quoted.headers.ports()), {
                let new = changed(&sample, &change);
                let ports = matches!(sample.kind, Kind::Tcp { .. } | Kind::Udp | Kind::UdpUnsummed | Kind::Sctp);
                (new.source, ports.then_some(new.ports))
            });
        }

        #[test]
        fn hop_limits_count_down(sample in samples()) {
            let mut packet = sample.whole();
            let expected = match sample.hop_limit {
                0 | 1 => Err(DropReason::HopLimit),
                limit => Ok(Sample { hop_limit: limit - 1, ..sample.clone() }.whole()),
            };
            prop_assert_eq!(decrement_hop_limit(&mut packet).map(|()| packet), expected);
        }

        #[test]
        fn mss_is_clamped((sample, kind) in (samples(), tcp_kinds()), most in any::<u16>()) {
            let sample = Sample { kind, ..sample };
            let Kind::Tcp { syn, ack, fin, mss, odd } = kind else { panic!("not TCP") };
            let mut packet = sample.whole();
            let headers = parse(&packet).unwrap();
            let lowered = syn && mss.is_some_and(|mss| mss > most);
            prop_assert_eq!(clamp_mss(&mut packet, &headers, most, ChecksumState::Complete), lowered);
            let expected = Kind::Tcp { syn, ack, fin, odd, mss: if lowered { Some(most) } else { mss } };
            prop_assert_eq!(packet, Sample { kind: expected, ..sample }.whole());
        }

        #[test]
        fn nothing_panics(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
            start in prop_oneof![Just(0x45), Just(0x46), Just(0x60), any::<u8>()],
            next in prop_oneof![Just(6u8), Just(17), Just(132), Just(1), Just(58), Just(44), Just(43), Just(0)],
            change in samples_and_addresses().prop_flat_map(|(_, a, b)| changes(a, b)),
            mss in any::<u16>(),
        ) {
            let len = bytes.len();
            if len >= 40 {
                bytes[0] = start;
                bytes[if start == 0x60 { 6 } else { 9 }] = next;
                let claimed = if start == 0x60 { len - 40 } else { len } as u16;
                let at = if start == 0x60 { 4 } else { 2 };
                bytes[at..at + 2].copy_from_slice(&claimed.to_be_bytes());
                (bytes[6], bytes[7]) = if start == 0x60 { (next, 64) } else { (0x40, 0) };
            }
            let _ = parse_quoted(&bytes);
            let Ok(mut headers) = parse(&bytes) else { return Ok(()) };
            let mut out = [0; icmp::MAX_ANSWER];
            let error = icmp::IcmpError::TooBig { mtu: mss };
            let _ = icmp::build_error(&mut out, error, headers.destination, &bytes, &headers);
            let _ = icmp::build_reset(&mut out, &bytes, &headers);
            let _ = checksum::check_transport(&bytes, &headers);
            checksum::fill_transport(&mut bytes.clone(), &headers);
            let _ = clamp_mss(&mut bytes, &headers, mss, ChecksumState::Complete);
            let _ = decrement_hop_limit(&mut bytes);
            if let Some(mut quoted) = icmp::quoted(&bytes, &headers) {
                let _ = rewrite_quoted(&mut bytes, &headers, &mut quoted, &change);
            }
            let _ = rewrite(&mut bytes, &mut headers, &change, ChecksumState::Complete);
        }
    }

    #[test]
    fn a_udp_checksum_never_becomes_none() {
        // The port is chosen so that the sum comes out as zero.
        let source = IpAddr::from([10, 0, 0, 1]);
        let destination = IpAddr::from([10, 0, 0, 2]);
        let mut sample = Sample {
            source,
            destination,
            ports: (0, 9),
            kind: Kind::Udp,
            extensions: false,
            hop_limit: 64,
            payload: vec![],
        };
        let packet = sample.whole();
        let sum = u16::from_be_bytes([packet[26], packet[27]]);
        let mut packet = sample.whole();
        let mut headers = parse(&packet).unwrap();
        let change = Rewrite { source: Some((source, Some(sum))), destination: None };
        rewrite(&mut packet, &mut headers, &change, ChecksumState::Complete).unwrap();
        sample.ports.0 = sum;
        assert_eq!(packet, sample.whole());
        assert_eq!(packet[26..28], [0xff, 0xff]);
    }

    #[test]
    fn the_other_family_is_refused() {
        let mut packet = icmp_error([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), &[]);
        let before = packet.clone();
        let mut headers = parse(&packet).unwrap();
        let change = Rewrite { source: None, destination: Some(("fd00::1".parse().unwrap(), None)) };
        let refused = rewrite(&mut packet, &mut headers, &change, ChecksumState::Complete);
        assert_eq!((refused, packet), (Err(DropReason::Untranslatable), before));
    }
}
