//! Packets for tests, described by what they mean and built by etherparse, whose checksums know
//! nothing of ours.

use std::net::IpAddr;

use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header,
    Ipv6Extensions, Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, Ipv6RoutingExtensions, PacketBuilder,
    TcpHeader, TcpOptionElement, icmpv4,
};
use proptest::prelude::*;

use super::checksum::tests::crc32c;
use super::parse::protocol;

/// What a packet means; [`Sample::whole`] writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Ports, or the identifier of an echo in both.
    pub ports: (u16, u16),
    pub kind: Kind,
    /// IPv4 options, or IPv6 extension headers with a fragment header that fragments nothing.
    pub extensions: bool,
    pub hop_limit: u8,
    pub payload: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp { syn: bool, ack: bool, fin: bool, mss: Option<u16>, odd: bool },
    Udp,
    UdpUnsummed,
    Sctp,
    EchoRequest,
    EchoReply,
    Other,
}

/// A stretch of a packet's transport bytes, as a fragment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub offset: usize,
    pub len: usize,
    pub more: bool,
    pub id: u32,
}

impl Sample {
    pub(crate) fn is_ipv4(&self) -> bool {
        self.source.is_ipv4()
    }

    pub(crate) fn protocol(&self) -> u8 {
        match self.kind {
            Kind::Tcp { .. } => protocol::TCP,
            Kind::Udp | Kind::UdpUnsummed => protocol::UDP,
            Kind::Sctp => protocol::SCTP,
            Kind::EchoRequest | Kind::EchoReply if self.is_ipv4() => protocol::ICMP,
            Kind::EchoRequest | Kind::EchoReply => protocol::ICMPV6,
            Kind::Other => 47,
        }
    }

    /// Where its transport header starts.
    pub(crate) fn l4_offset(&self) -> usize {
        match (self.is_ipv4(), self.extensions) {
            (true, false) => 20,
            (true, true) => 24,
            (false, false) => 40,
            (false, true) => 40 + 8 + 16 + 8 + 8,
        }
    }

    /// The packet.
    pub(crate) fn whole(&self) -> Vec<u8> {
        let mut packet = Vec::new();
        let step = PacketBuilder::ip(self.ip(None));
        let written = match self.kind {
            Kind::Tcp { .. } => step.tcp_header(self.tcp()).write(&mut packet, &self.payload),
            Kind::Udp | Kind::UdpUnsummed => {
                step.udp(self.ports.0, self.ports.1).write(&mut packet, &self.payload)
            }
            Kind::EchoRequest | Kind::EchoReply => {
                let echo = IcmpEchoHeader { id: self.ports.0, seq: 7 };
                match (self.is_ipv4(), self.kind == Kind::EchoRequest) {
                    (true, true) => {
                        step.icmpv4(Icmpv4Type::EchoRequest(echo)).write(&mut packet, &self.payload)
                    }
                    (true, false) => {
                        step.icmpv4(Icmpv4Type::EchoReply(echo)).write(&mut packet, &self.payload)
                    }
                    (false, true) => {
                        step.icmpv6(Icmpv6Type::EchoRequest(echo)).write(&mut packet, &self.payload)
                    }
                    (false, false) => {
                        step.icmpv6(Icmpv6Type::EchoReply(echo)).write(&mut packet, &self.payload)
                    }
                }
            }
            Kind::Sctp | Kind::Other => {
                let number = IpNumber(self.protocol());
                step.write(&mut packet, number, &self.raw_transport())
            }
        };
        written.unwrap();
        if self.kind == Kind::UdpUnsummed {
            let at = self.l4_offset() + 6;
            packet[at..at + 2].fill(0);
        }
        packet
    }

    /// One fragment of it.
    pub(crate) fn fragment(&self, piece: Piece) -> Vec<u8> {
        let whole = self.whole();
        let part = &whole[self.l4_offset() + piece.offset..][..piece.len];
        let mut packet = Vec::new();
        let step = PacketBuilder::ip(self.ip(Some(piece)));
        step.write(&mut packet, IpNumber(self.protocol()), part).unwrap();
        packet
    }

    fn ip(&self, piece: Option<Piece>) -> IpHeaders {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let ttl = self.hop_limit;
                let mut ip =
                    Ipv4Header::new(0, ttl, IpNumber::UDP, source.octets(), destination.octets()).unwrap();
                if self.extensions {
                    // Router alert (RFC 2113).
                    ip.options = [0x94, 4, 0, 0].into();
                }
                if let Some(piece) = piece {
                    ip.dont_fragment = false;
                    ip.more_fragments = piece.more;
                    ip.fragment_offset = offset(piece);
                    ip.identification = piece.id as u16;
                }
                IpHeaders::Ipv4(ip, Ipv4Extensions::default())
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let ip = Ipv6Header {
                    hop_limit: self.hop_limit,
                    source: source.octets(),
                    destination: destination.octets(),
                    traffic_class: 0x2e,
                    ..Ipv6Header::default()
                };
                let mut extensions = Ipv6Extensions::default();
                if self.extensions {
                    extensions.hop_by_hop_options = Some(padding(6));
                    let routing = Ipv6RawExtHeader::new_raw(IpNumber::UDP, &[4, 0, 0, 0, 0, 0]).unwrap();
                    // Those stand behind the fragment header: part of what is cut into fragments.
                    let final_destination_options = piece.is_none().then(|| padding(14));
                    extensions.routing = Some(Ipv6RoutingExtensions { routing, final_destination_options });
                    extensions.fragment =
                        Some(fragment_header(Piece { offset: 0, len: 0, more: false, id: 9 }));
                }
                if let Some(piece) = piece {
                    extensions.fragment = Some(fragment_header(piece));
                }
                IpHeaders::Ipv6(ip, extensions)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => panic!("two families"),
        }
    }

    fn tcp(&self) -> TcpHeader {
        let Kind::Tcp { syn, ack, fin, mss, odd } = self.kind else { panic!("not TCP") };
        let mut tcp = TcpHeader::new(self.ports.0, self.ports.1, 0x8000_0001, 512);
        (tcp.syn, tcp.ack, tcp.fin) = (syn, ack, fin);
        tcp.acknowledgment_number = if ack { 77 } else { 0 };
        let mut options = vec![TcpOptionElement::WindowScale(7)];
        if odd {
            options.push(TcpOptionElement::Noop);
        }
        options.extend(mss.map(TcpOptionElement::MaximumSegmentSize));
        tcp.set_options(&options).unwrap();
        tcp
    }

    fn raw_transport(&self) -> Vec<u8> {
        let mut transport = Vec::new();
        if self.kind == Kind::Sctp {
            transport.extend(self.ports.0.to_be_bytes());
            transport.extend(self.ports.1.to_be_bytes());
            transport.extend([0xaa, 0xbb, 0xcc, 0xdd, 0, 0, 0, 0]);
        }
        transport.extend(&self.payload);
        if self.kind == Kind::Sctp {
            let crc = crc32c(&transport);
            transport[8..12].copy_from_slice(&crc.to_le_bytes());
        }
        transport
    }
}

/// An ICMP error around `quote`.
pub(crate) fn icmp_error(source: IpAddr, destination: IpAddr, quote: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let kind = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1400 };
            PacketBuilder::ipv4(source.octets(), destination.octets(), 64)
                .icmpv4(Icmpv4Type::DestinationUnreachable(kind))
                .write(&mut packet, quote)
                .unwrap();
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            PacketBuilder::ipv6(source.octets(), destination.octets(), 64)
                .icmpv6(Icmpv6Type::PacketTooBig { mtu: 1400 })
                .write(&mut packet, quote)
                .unwrap();
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => panic!("two families"),
    }
    packet
}

/// Any sample, of either family.
pub(crate) fn samples() -> impl Strategy<Value = Sample> {
    any::<bool>().prop_flat_map(|ipv4| samples_of(addresses(ipv4), addresses(ipv4)))
}

/// A sample, and two addresses of its family.
pub(crate) fn samples_and_addresses() -> impl Strategy<Value = (Sample, IpAddr, IpAddr)> {
    any::<bool>().prop_flat_map(|ipv4| {
        (samples_of(addresses(ipv4), addresses(ipv4)), addresses(ipv4), addresses(ipv4))
    })
}

/// Kinds of TCP packets alone.
pub(crate) fn tcp_kinds() -> impl Strategy<Value = Kind> {
    (any::<[bool; 4]>(), proptest::option::of(any::<u16>()))
        .prop_map(|([syn, ack, fin, odd], mss)| Kind::Tcp { syn, ack, fin, mss, odd })
}

fn samples_of(
    source: impl Strategy<Value = IpAddr>,
    destination: impl Strategy<Value = IpAddr>,
) -> impl Strategy<Value = Sample> {
    let kind = prop_oneof![
        tcp_kinds(),
        Just(Kind::Udp),
        Just(Kind::UdpUnsummed),
        Just(Kind::Sctp),
        Just(Kind::EchoRequest),
        Just(Kind::EchoReply),
        Just(Kind::Other),
    ];
    let payload = proptest::collection::vec(any::<u8>(), 0..200);
    (source, destination, any::<(u16, u16)>(), kind, any::<bool>(), 1..=255u8, payload).prop_map(
        |(source, destination, mut ports, kind, extensions, hop_limit, payload)| {
            if matches!(kind, Kind::EchoRequest | Kind::EchoReply) {
                ports.1 = ports.0;
            }
            Sample { source, destination, ports, kind, extensions, hop_limit, payload }
        },
    )
}

/// Addresses that are not martians; few enough bits set that sums of zero come up.
fn addresses(ipv4: bool) -> BoxedStrategy<IpAddr> {
    if ipv4 {
        (1..=126u8, any::<[u8; 3]>()).prop_map(|(a, [b, c, d])| IpAddr::from([a, b, c, d])).boxed()
    } else {
        any::<[u8; 15]>()
            .prop_map(|rest| {
                let mut octets = [0x20; 16];
                octets[1..].copy_from_slice(&rest);
                IpAddr::from(octets)
            })
            .boxed()
    }
}

fn padding(len: u8) -> Ipv6RawExtHeader {
    let mut options = vec![0; usize::from(len)];
    (options[0], options[1]) = (1, len - 2);
    Ipv6RawExtHeader::new_raw(IpNumber::UDP, &options).unwrap()
}

fn fragment_header(piece: Piece) -> Ipv6FragmentHeader {
    Ipv6FragmentHeader::new(IpNumber::UDP, offset(piece), piece.more, piece.id)
}

fn offset(piece: Piece) -> IpFragOffset {
    IpFragOffset::try_new((piece.offset / 8) as u16).unwrap()
}
