//! Packets that say who they are: built and read by etherparse, which knows nothing of ours.

use std::net::IpAddr;

use etherparse::{
    IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6Header, PacketBuilder, SlicedPacket,
    TransportSlice,
};

const MAGIC: &[u8; 8] = b"burrow01";

/// A UDP packet with a number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    pub id: u64,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ports: (u16, u16),
    /// Bytes of the whole packet; at least the headers and 16.
    pub len: usize,
    pub hop_limit: u8,
    pub dont_fragment: bool,
}

impl Probe {
    pub(crate) fn build(&self) -> Vec<u8> {
        let headers = if self.source.is_ipv4() { 28 } else { 48 };
        let mut payload = vec![0; self.len.saturating_sub(headers).max(16)];
        payload[..8].copy_from_slice(MAGIC);
        payload[8..16].copy_from_slice(&self.id.to_be_bytes());
        for (i, byte) in payload[16..].iter_mut().enumerate() {
            *byte = (self.id as usize).wrapping_mul(31).wrapping_add(i) as u8;
        }
        let mut packet = Vec::new();
        let ip = ip(self.source, self.destination, self.hop_limit, self.dont_fragment);
        let step = PacketBuilder::ip(ip).udp(self.ports.0, self.ports.1);
        step.write(&mut packet, &payload).expect("built");
        packet
    }
}

/// A TCP SYN that offers an MSS.
pub(crate) fn syn(source: IpAddr, destination: IpAddr, mss: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ip(ip(source, destination, 64, true))
        .tcp(40_000, 80, 1, 65_535)
        .syn()
        .options(&[etherparse::TcpOptionElement::MaximumSegmentSize(mss)])
        .expect("option")
        .write(&mut packet, &[])
        .expect("built");
    packet
}

/// The MSS that a SYN offers, if its checksums are right.
pub(crate) fn offered_mss(packet: &[u8]) -> Option<u16> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { return None };
    assert!(whole(packet), "a SYN with a wrong checksum");
    tcp.options_iterator().find_map(|option| match option {
        Ok(etherparse::TcpOptionElement::MaximumSegmentSize(mss)) => Some(mss),
        _ => None,
    })
}

/// One TCP segment of `len` payload bytes, as a frame with a virtio header that asks to cut it at `mss`.
pub(crate) fn super_segment(source: IpAddr, destination: IpAddr, len: usize, mss: u16) -> Vec<u8> {
    let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    let mut packet = Vec::new();
    PacketBuilder::ip(ip(source, destination, 64, true))
        .tcp(40_001, 80, 1000, 65_535)
        .ack(1)
        .write(&mut packet, &payload)
        .expect("built");
    let l4 = if source.is_ipv4() { 20 } else { 40 };
    let vnet = warren::packet::vnet::VnetHdr {
        flags: warren::packet::vnet::NEEDS_CSUM,
        gso_type: if source.is_ipv4() { 1 } else { 4 },
        hdr_len: l4 + 20,
        gso_size: mss,
        csum_start: l4,
        csum_offset: 16,
    };
    // The kernel leaves the pseudo header's sum there, not complemented.
    let sum = warren::packet::checksum::pseudo_header(source, destination, 6, (len + 20) as u32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
    packet[usize::from(l4) + 16..usize::from(l4) + 18].copy_from_slice(&sum.to_be_bytes());
    [&vnet.encode()[..], &packet].concat()
}

/// The sequence number and payload of a TCP segment.
pub(crate) fn segment(packet: &[u8]) -> Option<(u32, Vec<u8>)> {
    match SlicedPacket::from_ip(packet).ok()?.transport? {
        TransportSlice::Tcp(tcp) => Some((tcp.sequence_number(), tcp.payload().to_vec())),
        _ => None,
    }
}

/// The number of a probe.
pub(crate) fn probe_id(packet: &[u8]) -> Option<u64> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    let Some(TransportSlice::Udp(udp)) = sliced.transport else { return None };
    let payload = udp.payload();
    let id = payload.get(8..16)?.try_into().ok()?;
    (payload.get(..8)? == MAGIC).then(|| u64::from_be_bytes(id))
}

/// An ICMP error: who sent it, type, code and the two or four bytes that carry an MTU.
pub(crate) fn icmp_error(packet: &[u8]) -> Option<(IpAddr, u8, u8, u32)> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    assert!(whole(packet), "an ICMP error with a wrong checksum");
    let from = addresses(packet)?.0;
    match sliced.transport? {
        TransportSlice::Icmpv4(icmp) => {
            let [_, _, a, b] = icmp.bytes5to8();
            Some((from, icmp.type_u8(), icmp.code_u8(), u32::from(u16::from_be_bytes([a, b]))))
        }
        TransportSlice::Icmpv6(icmp) => {
            Some((from, icmp.type_u8(), icmp.code_u8(), u32::from_be_bytes(icmp.bytes5to8())))
        }
        _ => None,
    }
}

pub(crate) fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match SlicedPacket::from_ip(packet).ok()?.net? {
        etherparse::NetSlice::Ipv4(ip) => {
            Some((ip.header().source_addr().into(), ip.header().destination_addr().into()))
        }
        etherparse::NetSlice::Ipv6(ip) => {
            Some((ip.header().source_addr().into(), ip.header().destination_addr().into()))
        }
        _ => None,
    }
}

/// Whether every checksum of a packet is right.
fn whole(packet: &[u8]) -> bool {
    let headers = warren::packet::parse(packet).expect("a packet that parses");
    warren::packet::checksum::verify_ipv4_header(packet) | packet[0].eq(&0x60)
        && warren::packet::checksum::verify_transport(packet, &headers)
}

fn ip(source: IpAddr, destination: IpAddr, hop_limit: u8, dont_fragment: bool) -> IpHeaders {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut ip = Ipv4Header::new(0, hop_limit, IpNumber::UDP, source.octets(), destination.octets())
                .expect("header");
            ip.dont_fragment = dont_fragment;
            ip.identification = 7;
            IpHeaders::Ipv4(ip, Ipv4Extensions::default())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => IpHeaders::Ipv6(
            Ipv6Header {
                hop_limit,
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv6Header::default()
            },
            Ipv6Extensions::default(),
        ),
        _ => panic!("two families"),
    }
}
