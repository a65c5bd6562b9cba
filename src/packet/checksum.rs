//! The Internet checksum: sums, incremental updates, verification.
//!
//! Sums are ones' complement sums of 16-bit big-endian words, kept unfolded in a `u32` so that a few
//! of them can be added; [`fold`] brings one to 16 bits. What stands in a header is the complement.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use multiversion::multiversion;

use super::parse::protocol;
use super::{Fragment, Headers, L4};

/// The sum of `data` as 16-bit words (RFC 1071), at most 0xffff. An odd last byte counts as the
/// high half of a word, so only the last of several parts may have an odd length.
#[inline]
pub fn sum(data: &[u8]) -> u32 {
    let total = if data.len() < WIDE { narrow_sum(data) } else { wide_sum(data) };
    u32::from(u16::from_be(fold_wide(total)))
}

/// From so many bytes on, wide registers save more than asking for them costs.
const WIDE: usize = 256;

fn narrow_sum(data: &[u8]) -> u64 {
    native_sum(data)
}

/// Once for every processor, once for those with registers of 32 bytes; which, is found out at the first call.
#[multiversion(targets("x86_64+avx2"))]
fn wide_sum(data: &[u8]) -> u64 {
    native_sum(data)
}

/// The sum does not depend on the byte order in which it is computed (RFC 1071 section 2 B): this one adds
/// native 32-bit words in 64-bit lanes, which the compiler turns into vector instructions, and leaves the swap
/// to the caller. A lane takes 2^32 words before it could overflow.
#[inline(always)]
fn native_sum(data: &[u8]) -> u64 {
    let mut lanes = [0u64; LANES];
    let mut blocks = data.chunks_exact(4 * LANES);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let mut total = lanes.iter().fold(0, |total: u64, lane| total + (lane & 0xffff_ffff) + (lane >> 32));
    let (double_words, rest) = blocks.remainder().as_chunks::<4>();
    for word in double_words {
        total += u64::from(u32::from_ne_bytes(*word));
    }
    let (word, rest) = rest.as_chunks::<2>();
    for word in word {
        total += u64::from(u16::from_ne_bytes(*word));
    }
    if let [last] = rest {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    total
}

/// Brings a sum to 16 bits, adding the carries back in.
#[inline]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The checksum of `data`: what a header whose checksum field is zero gets.
pub fn checksum(data: &[u8]) -> u16 {
    !fold(sum(data))
}

/// The sum of the pseudo-header of either family; `len` is that of the transport header and what
/// follows. Addresses of two families count as nothing.
#[inline]
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, len: u32) -> u32 {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => pseudo_header_v4(source, destination, protocol, len),
        (IpAddr::V6(source), IpAddr::V6(destination)) => pseudo_header_v6(source, destination, protocol, len),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => 0,
    }
}

/// The sum of IPv4's pseudo-header (RFC 9293 section 3.1).
#[inline]
pub fn pseudo_header_v4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, len: u32) -> u32 {
    words(&source.octets()) + words(&destination.octets()) + u32::from(protocol) + split(len)
}

/// The sum of IPv6's pseudo-header (RFC 8200 section 8.1).
#[inline]
pub fn pseudo_header_v6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, len: u32) -> u32 {
    words(&source.octets()) + words(&destination.octets()) + u32::from(protocol) + split(len)
}

/// The difference that changed bytes make to a checksum that covers them (RFC 1624).
///
/// Only the change is counted, so a checksum that was wrong before stays wrong: corruption on the
/// way is still seen by the receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u32);

impl Delta {
    /// No difference.
    pub const fn new() -> Self {
        Delta(0)
    }

    /// Counts a 16-bit word that changed.
    #[inline]
    pub fn replace(&mut self, old: u16, new: u16) {
        self.0 = u32::from(fold(self.0 + u32::from(!old) + u32::from(new)));
    }

    /// Counts bytes that changed; both of the same even length, at an even offset.
    #[inline]
    pub fn replace_bytes(&mut self, old: &[u8], new: &[u8]) {
        debug_assert!(old.len() == new.len() && old.len().is_multiple_of(2));
        self.0 = u32::from(fold(self.0 + u32::from(!fold(sum(old))) + sum(new)));
    }

    /// Adds another difference.
    #[inline]
    pub fn add(&mut self, other: Delta) {
        self.0 = u32::from(fold(self.0 + other.0));
    }

    /// The checksum after the change (RFC 1624 equation 3). Never a new 0xffff: a complete computation
    /// yields it only for a message of nothing but zeros.
    #[inline]
    pub const fn apply(self, checksum: u16) -> u16 {
        if self.0 == 0 {
            return checksum;
        }
        match !fold(!checksum as u32 + self.0) {
            0xffff => 0,
            new => new,
        }
    }

    /// UDP's checksum after the change: zero means that there is none and stays; a sum that comes
    /// out as zero is sent as 0xffff (RFC 768).
    #[inline]
    pub const fn apply_udp(self, checksum: u16) -> u16 {
        if checksum == 0 {
            return 0;
        }
        match self.apply(checksum) {
            0 => 0xffff,
            new => new,
        }
    }

    /// The field of a packet whose checksum is still to be completed (virtio's NEEDS_CSUM): it
    /// holds the folded, uncomplemented sum of the pseudo-header. `self` counts that header only.
    #[inline]
    pub const fn apply_partial(self, field: u16) -> u16 {
        fold(field as u32 + self.0)
    }
}

/// The checksum after one 16-bit word changed from `old` to `new`.
#[inline]
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    let mut delta = Delta::new();
    delta.replace(old, new);
    delta.apply(checksum)
}

/// Whether an IPv4 packet's header checksum is right; false for what is no IPv4 header.
pub fn verify_ipv4_header(packet: &[u8]) -> bool {
    let Some(&first) = packet.first() else { return false };
    let header_len = usize::from(first & 0x0f) * 4;
    match packet.get(..header_len) {
        Some(header) if first >> 4 == 4 && header_len >= 20 => fold(sum(header)) == 0xffff,
        Some(_) | None => false,
    }
}

/// What is known of a transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Computed and right, or a UDP datagram that says it has none (IPv4 only).
    Right,
    /// Computed and wrong.
    Wrong,
    /// Not computed: a fragment, a protocol we only route, SCTP, whose CRC is end to end, or UDP over
    /// IPv6 that says it has none.
    Unknown,
}

/// Checks the transport checksum of a whole packet.
pub fn check_transport(packet: &[u8], headers: &Headers) -> Verdict {
    if headers.fragment != Fragment::None {
        return Verdict::Unknown;
    }
    let transport = headers.transport(packet);
    let covered = match headers.l4 {
        L4::Tcp { .. } => transport,
        L4::Udp { .. } => match udp(transport) {
            Some((0, _)) if headers.is_ipv4() => return Verdict::Right,
            // Over IPv6 only tunnels may leave it out (RFC 6935), which their receiver must know of.
            Some((0, _)) => return Verdict::Unknown,
            None => return Verdict::Wrong,
            Some((_, datagram)) => datagram,
        },
        L4::Icmp { .. } => transport,
        L4::Sctp { .. } | L4::Other | L4::None => return Verdict::Unknown,
    };
    let total = covering_pseudo_header(headers, covered.len()) + sum(covered);
    if fold(total) == 0xffff { Verdict::Right } else { Verdict::Wrong }
}

/// Whether the transport checksum is known to be right ([`Verdict::Right`]). False is no reason to
/// drop a packet, only not to vouch for it: ask [`check_transport`] whether it is wrong.
#[inline]
pub fn verify_transport(packet: &[u8], headers: &Headers) -> bool {
    check_transport(packet, headers) == Verdict::Right
}

/// Computes TCP's, UDP's or ICMP's checksum of a whole packet anew and writes it: for packets that
/// were built here. (What came from outside is changed with [`Delta`], so that damage shows.)
pub fn fill_transport(packet: &mut [u8], headers: &Headers) {
    let Some(at) = transport_field(headers) else { return };
    if headers.fragment != Fragment::None {
        return;
    }
    let offset = usize::from(headers.l4_offset);
    let Some(transport) = packet.get_mut(offset..headers.total_len as usize) else { return };
    let len = match (headers.l4, udp(transport)) {
        (L4::Udp { .. }, Some((_, datagram))) => datagram.len(),
        (_, _) => transport.len(),
    };
    let Some(field) = transport.get_mut(at..at + 2) else { return };
    field.fill(0);
    let new = !fold(covering_pseudo_header(headers, len) + sum(&transport[..len]));
    let new = if matches!(headers.l4, L4::Udp { .. }) && new == 0 { 0xffff } else { new };
    transport[at..at + 2].copy_from_slice(&new.to_be_bytes());
}

/// Computes a checksum that the sender's kernel has left to its network card, and that no card has
/// touched on the way (two containers or virtual machines of one host): the field then holds the sum of
/// the pseudo-header, not complemented (CHECKSUM_PARTIAL, include/linux/skbuff.h). Says whether it did.
///
/// A computed checksum looks the same once in 65,536 packets; computing it again gives the same.
pub fn complete_owed(packet: &mut [u8], headers: &Headers) -> bool {
    if headers.fragment != Fragment::None || !matches!(headers.l4, L4::Tcp { .. } | L4::Udp { .. }) {
        return false;
    }
    let transport = headers.transport(packet);
    let Some(at) = transport_field(headers) else { return false };
    let Some(field) = transport.get(at..).and_then(|rest| rest.first_chunk::<2>()) else { return false };
    let len = match (headers.l4, udp(transport)) {
        (L4::Udp { .. }, Some((_, datagram))) => datagram.len(),
        (_, _) => transport.len(),
    };
    let owed = u16::from_be_bytes(*field) == fold(covering_pseudo_header(headers, len));
    if owed {
        fill_transport(packet, headers);
    }
    owed
}

/// Where the checksum stands in the transport header of TCP, UDP and ICMP.
#[inline]
pub const fn transport_field(headers: &Headers) -> Option<usize> {
    match headers.l4 {
        L4::Tcp { .. } => Some(16),
        L4::Udp { .. } => Some(6),
        L4::Icmp { .. } => Some(2),
        L4::Sctp { .. } | L4::Other | L4::None => None,
    }
}

/// The difference that a changed four-byte word makes to SCTP's CRC32c (RFC 9260 appendix A), to be
/// XORed into it; `behind` is the number of bytes from the word to the packet's end.
///
/// A CRC is linear, so the change is the CRC of the difference of old and new, moved past what
/// follows: no byte of the payload is read, and damage done before still shows.
pub fn sctp_difference(old: [u8; 4], new: [u8; 4], behind: usize) -> u32 {
    let mut crc = u32::from_le_bytes(old) ^ u32::from_le_bytes(new);
    for _ in 0..32 {
        crc = crc32c_times_x(crc);
    }
    for (bit, power) in CRC32C_SHIFTS.iter().enumerate() {
        if behind >> bit & 1 == 1 {
            crc = crc32c_multiply(crc, *power);
        }
    }
    crc
}

/// Four vectors of four words on a machine with 16-byte vectors: enough to keep its adders busy.
const LANES: usize = 16;

#[inline]
fn fold_wide(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    fold(sum as u32)
}

/// The sum of a short, even number of bytes.
#[inline]
fn words(data: &[u8]) -> u32 {
    data.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum()
}

/// A 32-bit length as two words.
#[inline]
const fn split(len: u32) -> u32 {
    (len >> 16) + (len & 0xffff)
}

/// The pseudo-header's sum, where the checksum covers one: all but IPv4's ICMP.
#[inline]
fn covering_pseudo_header(headers: &Headers, len: usize) -> u32 {
    if headers.protocol == protocol::ICMP {
        return 0;
    }
    pseudo_header(headers.source, headers.destination, headers.protocol, len as u32)
}

/// The checksum field of a UDP datagram, and the datagram as its length field cuts it.
#[inline]
fn udp(transport: &[u8]) -> Option<(u16, &[u8])> {
    let header = transport.first_chunk::<8>()?;
    let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    Some((u16::from_be_bytes([header[6], header[7]]), transport.get(..len)?))
}

/// CRC32c's polynomial, lowest power in the highest bit (RFC 9260 appendix A).
const CRC32C_POLYNOMIAL: u32 = 0x82f6_3b78;

/// Entry i moves a CRC past 2^i bytes: x^(8 * 2^i). Enough for any packet.
const CRC32C_SHIFTS: [u32; 17] = {
    let mut shifts = [1 << 23; 17];
    let mut i = 1;
    while i < shifts.len() {
        shifts[i] = crc32c_multiply(shifts[i - 1], shifts[i - 1]);
        i += 1;
    }
    shifts
};

const fn crc32c_times_x(a: u32) -> u32 {
    a >> 1 ^ if a & 1 == 1 { CRC32C_POLYNOMIAL } else { 0 }
}

const fn crc32c_multiply(a: u32, mut b: u32) -> u32 {
    let (mut product, mut bit) = (0, 32);
    while bit > 0 {
        bit -= 1;
        if a >> bit & 1 == 1 {
            product ^= b;
        }
        b = crc32c_times_x(b);
    }
    product
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::parse;

    /// The definition, word by word.
    fn plain_sum(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            sum += u32::from(word);
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn example_of_rfc_1071() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0x220d);
    }

    #[test]
    fn example_of_rfc_1624() {
        // Section 4: where the older equation yields 0xffff, this one yields 0.
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn largest_packet_of_ones_does_not_overflow() {
        assert_eq!(sum(&vec![0xff; 65_575]), u32::from(plain_sum(&vec![0xff; 65_575])));
    }

    #[test]
    fn an_owed_checksum_is_computed_and_no_other_touched() {
        // UDP 192.168.0.1 to 192.168.0.199, 2 bytes: pseudo-header 0xc0a8 + 0x0001 + 0xc0a8 + 0x00c7 + 17 + 10.
        let mut packet = [
            0x45, 0x00, 0x00, 0x1e, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0xb6, 0xc0, 0xa8, 0x00, 0x01,
            0xc0, 0xa8, 0x00, 0xc7, 0x04, 0xd2, 0x00, 0x35, 0x00, 0x0a, 0x82, 0x34, 0x68, 0x69,
        ];
        let headers = parse(&packet).unwrap();
        assert!(complete_owed(&mut packet, &headers));
        assert_eq!(check_transport(&packet, &headers), Verdict::Right);
        assert!(!complete_owed(&mut packet, &headers), "it is computed now");
        packet[29] ^= 1;
        assert!(!complete_owed(&mut packet, &headers), "damage is not repaired");
        assert_eq!(check_transport(&packet, &headers), Verdict::Wrong);
    }

    #[test]
    fn udp_over_ipv4() {
        let mut packet = [
            0x45, 0x00, 0x00, 0x1e, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0xb6, 0xc0, 0xa8, 0x00, 0x01,
            0xc0, 0xa8, 0x00, 0xc7, 0x04, 0xd2, 0x00, 0x35, 0x00, 0x0a, 0x00, 0x00, 0x68, 0x69,
        ];
        let headers = parse(&packet).unwrap();
        assert!(verify_ipv4_header(&packet));
        assert!(verify_transport(&packet, &headers), "UDP over IPv4 needs no checksum");
        fill_transport(&mut packet, &headers);
        assert!(packet[26..28] != [0, 0] && verify_transport(&packet, &headers));
        packet[29] ^= 1;
        assert!(!verify_transport(&packet, &headers));
        packet[8] -= 1;
        assert!(!verify_ipv4_header(&packet));
    }

    /// CRC32c bit by bit.
    pub(crate) fn crc32c(data: &[u8]) -> u32 {
        let mut crc = !0;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = crc32c_times_x(crc);
            }
        }
        !crc
    }

    #[test]
    fn crc32c_of_the_usual_check_string() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn a_crc_difference_is_a_new_computation(
            mut data in proptest::collection::vec(any::<u8>(), 4..3000),
            new in any::<[u8; 4]>(),
        ) {
            let before = crc32c(&data);
            let old = *data.first_chunk::<4>().unwrap();
            data[..4].copy_from_slice(&new);
            prop_assert_eq!(before ^ sctp_difference(old, new, data.len() - 4), crc32c(&data));
        }

        #[test]
        fn sum_is_its_definition(data in proptest::collection::vec(any::<u8>(), 0..1600)) {
            let expected = plain_sum(&data);
            prop_assert_eq!(sum(&data), u32::from(expected));
            // Both ways, whatever the length is and this processor has.
            for total in [narrow_sum(&data), wide_sum(&data)] {
                prop_assert_eq!(u16::from_be(fold_wide(total)), expected);
            }
        }

        #[test]
        fn a_delta_is_a_new_computation(
            mut data in proptest::collection::vec(any::<u8>(), 2..80),
            new in any::<[u8; 4]>(),
            at in any::<prop::sample::Index>(),
        ) {
            data.resize(data.len().max(6) & !1, 1);
            data[0] = data[0].max(1);
            let at = (2 + at.index(data.len() - 5)) & !1;
            let before = checksum(&data);
            let mut delta = Delta::new();
            delta.replace_bytes(&data[at..at + 4], &new);
            data[at..at + 4].copy_from_slice(&new);
            prop_assert_eq!(delta.apply(before), checksum(&data));
        }
    }
}
