//! Packets that get past the first checks: a valid one, bent a little, with or without right checksums.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use warren::packet::parse::protocol;
use warren::packet::{checksum, parse};

use super::Reader;

/// Addresses that mean something to the nodes of the fuzzed mesh: ours, the peers', nobody's, bad ones.
const V4: [[u8; 4]; 12] = [
    [10, 244, 0, 5],
    [10, 244, 1, 5],
    [10, 244, 2, 5],
    [10, 244, 3, 5],
    [10, 244, 4, 5],
    [10, 244, 0, 0],
    [192, 0, 2, 1],
    [10, 244, 9, 9],
    [203, 0, 113, 7],
    [127, 0, 0, 1],
    [224, 0, 0, 1],
    [10, 244, 5, 5],
];
const V6: [u128; 8] = [
    0xfd00_0010_0244_0000_0000_0000_0000_0005,
    0xfd00_0010_0244_0001_0000_0000_0000_0005,
    0xfd00_0010_0244_0002_0000_0000_0000_0005,
    0xfd00_0010_0244_0003_0000_0000_0000_0005,
    0xfd00_0010_0244_0004_0000_0000_0000_0005,
    0xfd00_0010_0244_0000_0000_0000_0000_0000,
    0xff02_0000_0000_0000_0000_0000_0000_0001,
    0x2001_0db8_0000_0000_0000_0000_0000_0007,
];

/// Builds packets one after the other, so that TCP segments can follow each other.
pub(crate) struct Builder {
    sequence: u32,
}

impl Builder {
    pub(crate) fn new() -> Builder {
        Builder { sequence: 0x7fff_fff0 }
    }

    /// The next packet, as the input says; `most` bounds its payload.
    pub(crate) fn packet(&mut self, input: &mut Reader<'_>, most: u16) -> Vec<u8> {
        let shape = input.byte();
        if shape & 0x80 != 0 {
            let len = usize::from(input.short());
            return input.bytes(len).to_vec();
        }
        let kind = input.one_of(&[
            protocol::TCP,
            protocol::UDP,
            protocol::ICMP,
            protocol::SCTP,
            protocol::ICMPV6,
            44, // IPv6 fragment header, or nothing known over IPv4
            0,  // hop-by-hop options
        ]);
        let (source, destination) = (input.byte(), input.byte());
        let transport = self.transport(kind, shape, input, most);
        let mut packet = if shape & 1 == 0 {
            v4(V4[usize::from(source) % V4.len()], V4[usize::from(destination) % V4.len()], kind, &transport)
        } else {
            v6(V6[usize::from(source) % V6.len()], V6[usize::from(destination) % V6.len()], kind, &transport)
        };
        for _ in 0..input.byte() % 4 {
            let (at, change) = (usize::from(input.byte()), input.byte());
            if let Some(byte) = packet.get_mut(at) {
                *byte ^= change;
            }
        }
        if shape & 2 == 0 {
            complete(&mut packet);
        }
        packet
    }

    fn transport(&mut self, kind: u8, shape: u8, input: &mut Reader<'_>, most: u16) -> Vec<u8> {
        let (ports, flags) = (input.byte(), input.byte());
        let payload = usize::from(input.short() % most.max(1));
        let mut out = Vec::new();
        match kind {
            protocol::TCP => {
                let options = usize::from(shape >> 2 & 3) * 4;
                out.extend([0x10, ports, 0x20, 0]);
                out.extend(self.sequence.to_be_bytes());
                out.extend([0, 0, 0, 1, 0x50 + (options as u8) * 4, flags, 1, 0, 0, 0, 0, 0]);
                // MSS, then timestamps.
                out.extend(&[2, 4, 5, 0xb4, 1, 1, 8, 10, 0, 0, 0, 1][..options]);
                self.sequence = self.sequence.wrapping_add(payload as u32);
            }
            protocol::UDP => {
                out.extend([0x10, ports, 0x20, 0]);
                out.extend((8 + payload as u16).to_be_bytes());
                out.extend([0, if flags & 1 == 0 { 1 } else { 0 }]);
            }
            protocol::SCTP => out.extend([0x10, ports, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
            _ => out.extend([ports, flags, 0, 0, 0, 1, 0, 1]),
        }
        let start = out.len();
        let given = usize::from(input.byte());
        let given = input.bytes(payload.min(given));
        out.extend_from_slice(given);
        out.resize(start + payload, 0x5a);
        out
    }
}

/// An address of the family, from the lists.
pub(crate) fn address(input: &mut Reader<'_>, ipv4: bool) -> IpAddr {
    if ipv4 {
        IpAddr::V4(Ipv4Addr::from(input.one_of(&V4)))
    } else {
        IpAddr::V6(Ipv6Addr::from(input.one_of(&V6)))
    }
}

fn v4(source: [u8; 4], destination: [u8; 4], kind: u8, transport: &[u8]) -> Vec<u8> {
    let mut out = vec![0x45, 0];
    out.extend((20 + transport.len() as u16).to_be_bytes());
    out.extend([0, 7, 0x40, 0, 64, kind, 0, 0]);
    out.extend(source);
    out.extend(destination);
    out.extend_from_slice(transport);
    out
}

fn v6(source: u128, destination: u128, kind: u8, transport: &[u8]) -> Vec<u8> {
    let mut out = vec![0x60, 0, 0, 0];
    out.extend((transport.len() as u16).to_be_bytes());
    out.extend([kind, 64]);
    out.extend(source.to_be_bytes());
    out.extend(destination.to_be_bytes());
    out.extend_from_slice(transport);
    out
}

/// Makes the checksums right, if the packet can be read at all.
fn complete(packet: &mut [u8]) {
    let Some(first) = packet.first() else { return };
    let header_len = usize::from(first & 0x0f) * 4;
    if first >> 4 == 4
        && header_len >= 20
        && let Some(header) = packet.get_mut(..header_len)
    {
        header[10..12].fill(0);
        let sum = checksum::checksum(header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    if let Ok(headers) = parse(packet) {
        checksum::fill_transport(packet, &headers);
    }
}
