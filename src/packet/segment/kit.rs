//! Packets for the tests of this room, built and summed with the plainest code there is.

use super::super::vnet::{GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHdr};
use super::{Headers, TCP_ACK, TCP_CHECKSUM, UDP_CHECKSUM, put};

/// A TCP or UDP packet to be built with the plainest code there is.
#[derive(Clone, Debug)]
pub(in crate::packet) struct Spec {
    pub v6: bool,
    pub udp: bool,
    pub source_port: u16,
    pub id: u16,
    pub dont_fragment: bool,
    pub hop_limit: u8,
    pub traffic_class: u8,
    pub ip_options: Vec<u8>,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Default for Spec {
    fn default() -> Spec {
        Spec {
            v6: false,
            udp: false,
            source_port: 40_000,
            id: 0xfffe,
            dont_fragment: true,
            hop_limit: 63,
            traffic_class: 0,
            ip_options: Vec::new(),
            seq: 0xffff_f000,
            ack: 77,
            flags: TCP_ACK,
            window: 500,
            options: timestamps(1, 2),
            payload: Vec::new(),
        }
    }
}

pub(in crate::packet) fn timestamps(value: u32, echo: u32) -> Vec<u8> {
    [&[1, 1, 8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat()
}

/// Bytes that differ from place to place.
pub(in crate::packet) fn payload(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
}

impl Spec {
    pub(in crate::packet) fn build(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(self.source_port.to_be_bytes());
        l4.extend(5201u16.to_be_bytes());
        if self.udp {
            l4.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            l4.extend([0, 0]);
        } else {
            l4.extend(self.seq.to_be_bytes());
            l4.extend(self.ack.to_be_bytes());
            l4.extend([((20 + self.options.len()) as u8 / 4) << 4, self.flags]);
            l4.extend(self.window.to_be_bytes());
            l4.extend([0, 0, 0, 0]);
            l4.extend(&self.options);
        }
        l4.extend(&self.payload);
        let protocol = if self.udp { 17 } else { 6 };
        let mut packet =
            if self.v6 { self.ip_v6(protocol, l4.len()) } else { self.ip_v4(protocol, l4.len()) };
        packet.extend(l4);
        let headers = headers_of(&packet);
        fill_checksum(&mut packet, &headers);
        packet
    }

    fn ip_v4(&self, protocol: u8, l4_len: usize) -> Vec<u8> {
        let header_len = 20 + self.ip_options.len();
        let mut ip = vec![0x40 | (header_len / 4) as u8, self.traffic_class];
        ip.extend(((header_len + l4_len) as u16).to_be_bytes());
        ip.extend(self.id.to_be_bytes());
        ip.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, self.hop_limit, protocol, 0, 0]);
        ip.extend([10, 244, 1, 9, 10, 244, 2, 7]);
        ip.extend(&self.ip_options);
        let checksum = !slow_sum(0, &ip);
        put(&mut ip, 10, checksum.to_be_bytes());
        ip
    }

    fn ip_v6(&self, protocol: u8, l4_len: usize) -> Vec<u8> {
        let mut ip = vec![0x60 | self.traffic_class >> 4, self.traffic_class << 4 | 0x3, 0x21, 0x43];
        ip.extend((l4_len as u16).to_be_bytes());
        ip.extend([protocol, self.hop_limit]);
        for host in [0x19u16, 0x27] {
            ip.extend([0xfd, 0x10, 0x24, 0x40, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
            ip.extend(host.to_be_bytes());
        }
        ip
    }
}

/// RFC 1071, two bytes at a time.
pub(in crate::packet) fn slow_sum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn checksum_at(headers: &Headers) -> usize {
    let field = if headers.protocol == 6 { TCP_CHECKSUM } else { UDP_CHECKSUM };
    usize::from(headers.l4_offset) + field
}

pub(in crate::packet) fn slow_pseudo(packet: &[u8], headers: &Headers) -> u16 {
    let addresses = if headers.source.is_ipv6() { &packet[8..40] } else { &packet[12..20] };
    let length = headers.total_len - u32::from(headers.l4_offset);
    slow_sum(slow_sum(length + u32::from(headers.protocol), addresses).into(), &[])
}

pub(in crate::packet) fn fill_checksum(packet: &mut [u8], headers: &Headers) {
    let at = checksum_at(headers);
    put(packet, at, [0, 0]);
    let sum = slow_sum(slow_pseudo(packet, headers).into(), &packet[usize::from(headers.l4_offset)..]);
    let checksum = if headers.protocol == 17 && sum == 0xffff { 0xffff } else { !sum };
    put(packet, at, checksum.to_be_bytes());
}

/// Whether every checksum of a TCP or UDP packet is right.
pub(in crate::packet) fn checksums_hold(packet: &[u8]) -> bool {
    let headers = headers_of(packet);
    let ip = headers.source.is_ipv6() || slow_sum(0, &packet[..usize::from(headers.l4_offset)]) == 0xffff;
    let l4 = slow_sum(slow_pseudo(packet, &headers).into(), &packet[usize::from(headers.l4_offset)..]);
    ip && l4 == 0xffff
}

/// The packet as the kernel would hand it over: one header, the checksum owed.
pub(in crate::packet) fn owed(packet: &mut [u8], gso_size: u16) -> VnetHdr {
    let headers = headers_of(packet);
    let pseudo = slow_pseudo(packet, &headers);
    put(packet, checksum_at(&headers), pseudo.to_be_bytes());
    let gso_type = match (gso_size, headers.protocol, headers.source.is_ipv6()) {
        (0, _, _) => GSO_NONE,
        (_, 17, _) => GSO_UDP_L4,
        (_, _, true) => GSO_TCPV6,
        (_, _, false) => GSO_TCPV4,
    };
    VnetHdr {
        flags: NEEDS_CSUM,
        gso_type,
        hdr_len: 128,
        gso_size,
        csum_start: headers.l4_offset,
        csum_offset: if headers.protocol == 6 { 16 } else { 6 },
    }
}

pub(in crate::packet) fn headers_of(packet: &[u8]) -> Headers {
    crate::packet::parse(packet).unwrap()
}
