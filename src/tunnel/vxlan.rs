//! VXLAN (RFC 7348) without any I/O: the eight bytes of header, the inner Ethernet frame, and the
//! neighbour talk (ARP, IPv6 neighbour discovery) that Ethernet needs and a pod network does not.
//!
//! An inner frame goes through [`open`] in this order:
//!
//! 1. VXLAN header: I flag, our VNI;
//! 2. Ethernet: sent by one machine, to our MAC address or to a group;
//! 3. neighbour talk comes out as [`Inner::Request`] or [`Inner::Reply`];
//! 4. what is left must be IP to our MAC address: [`Inner::Ip`].
//!
//! A MAC address belongs to a *peer*, and a peer is known by its outer address. So whatever a frame says
//! about MAC addresses, it can only change the one of the peer that sent it: there is no table that a
//! gratuitous ARP could poison. Frames whose parts disagree about who sent them are refused.
//!
//! IPv4 over IPv6, IPv6 over IPv4: the outer packet is the socket's concern and does not appear here.

use std::hash::Hasher as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::{
    NdpOptionSlice, NeighborAdvertisementHeader, NeighborAdvertisementPayloadSlice,
    NeighborSolicitationPayloadSlice, TYPE_NEIGHBOR_ADVERTISEMENT, TYPE_NEIGHBOR_SOLICITATION,
    TYPE_REDIRECT_MESSAGE, TYPE_ROUTER_ADVERTISEMENT, TYPE_ROUTER_SOLICITATION,
};
use etherparse::{
    ArpEthIpv4Packet, ArpHardwareId, ArpOperation, ArpPacketSlice, EtherType, Ethernet2Slice, Icmpv6Header,
    Icmpv6Slice, Icmpv6Type, IpNumber, Ipv6Header, Ipv6HeaderSlice,
};
use siphasher::sip::SipHasher24;

use crate::packet::DropReason;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The UDP port of Linux's `vxlan` device and of Flannel (drivers/net/vxlan/vxlan_core.c, `vxlan_port`).
pub const PORT: u16 = 8472;
/// The port that IANA gave to VXLAN later (RFC 7348 section 8).
pub const PORT_IANA: u16 = 4789;

/// VXLAN header and inner Ethernet header, in front of the inner IP packet.
pub const HEADER: usize = VXLAN + ETHERNET;

/// The longest datagram that [`answer`], [`ask_v4`] and [`ask_v6`] write: a neighbour advertisement.
pub const MAX_NEIGHBOUR: usize = HEADER + Ipv6Header::LEN + ND_LEN;

const VXLAN: usize = 8;
const ETHERNET: usize = 14;
/// Neighbour solicitation or advertisement with one link-layer address option (RFC 4861 section 4.3, 4.4).
const ND_LEN: usize = 8 + 16 + 8;
/// "The I flag MUST be set to 1" (RFC 7348 section 5); the other seven are ignored on receipt.
const FLAG_VNI: u8 = 0x08;
/// A neighbour discovery packet that crossed a router has a lower one (RFC 4861 section 7.1).
const ND_HOP_LIMIT: u8 = 255;
const BROADCAST: Mac = [0xff; 6];

/// What a datagram carries, from [`open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inner {
    /// An IP packet for us, from this offset of the datagram on (Ethernet padding may follow it).
    Ip {
        /// Where the IP header begins.
        offset: usize,
        /// The sending peer's MAC address.
        source_mac: Mac,
    },
    /// The peer asks who has an address.
    Request(NeighbourRequest),
    /// The peer says that it has an address: the answer to our question, or unasked.
    Reply(NeighbourReply),
}

/// "Who has this address?": an ARP request or a neighbour solicitation, by the family of the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourRequest {
    /// The address asked for.
    pub target: IpAddr,
    /// Who asks; `None` for the probe of a machine that does not have its address yet (RFC 5227, RFC 4862).
    pub sender: Option<IpAddr>,
    /// The sending peer's MAC address.
    pub source_mac: Mac,
}

/// "I have this address": an ARP reply, a gratuitous ARP, or a neighbour advertisement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourReply {
    /// The address it speaks of.
    pub address: IpAddr,
    /// The sending peer's MAC address.
    pub source_mac: Mac,
}

/// The header in front of an IP packet: the same for every packet to one peer, so it can be kept.
pub const fn header(vni: u32, destination: Mac, source: Mac, v6: bool) -> [u8; HEADER] {
    let kind = if v6 { EtherType::IPV6 } else { EtherType::IPV4 };
    framing(vni, destination, source, kind)
}

/// Writes [`header`] to the first [`HEADER`] bytes of `out`, which must have them.
pub fn write_header(out: &mut [u8], vni: u32, destination: Mac, source: Mac, v6: bool) {
    out[..HEADER].copy_from_slice(&header(vni, destination, source, v6));
}

/// Checks one datagram of a known peer and says what is in it.
pub fn open(datagram: &[u8], vni: u32, our_mac: &Mac) -> Result<Inner, DropReason> {
    let (head, frame) = datagram.split_first_chunk::<VXLAN>().ok_or(DropReason::Truncated)?;
    let theirs = u32::from_be_bytes([0, head[4], head[5], head[6]]);
    if head[0] & FLAG_VNI == 0 || theirs != vni {
        return Err(DropReason::WrongVni);
    }

    let frame = Ethernet2Slice::from_slice_without_fcs(frame).map_err(|_| DropReason::Truncated)?;
    let (source_mac, destination) = (frame.source(), frame.destination());
    let to_group = is_group(&destination);
    if is_group(&source_mac) || source_mac == [0; 6] || (!to_group && destination != *our_mac) {
        return Err(DropReason::BadInnerFrame);
    }

    let payload = frame.payload_slice();
    let version = payload.first().ok_or(DropReason::Truncated)? >> 4;
    match (frame.ether_type(), version) {
        (EtherType::ARP, _) => return open_arp(payload, source_mac),
        (EtherType::IPV6, 6) if is_neighbour_message(payload) => return open_discovery(payload, source_mac),
        // A Linux machine solicits routers on every device: no more remarkable than other multicast.
        (EtherType::IPV4, 4) | (EtherType::IPV6, 6) if to_group => return Err(DropReason::Multicast),
        (EtherType::IPV6, 6) if is_router_message(payload) => return Err(DropReason::BadInnerFrame),
        (EtherType::IPV4, 4) | (EtherType::IPV6, 6) => {}
        _ => return Err(DropReason::BadInnerFrame),
    }
    Ok(Inner::Ip { offset: HEADER, source_mac })
}

/// Answers a request for one of our addresses with a whole datagram in `out`; returns its length.
/// [`DropReason::NotOurs`] when the address is somebody else's: silence, as in Ethernet.
pub fn answer(
    out: &mut [u8],
    vni: u32,
    our_mac: Mac,
    request: &NeighbourRequest,
    is_ours: impl Fn(IpAddr) -> bool,
) -> Result<usize, DropReason> {
    if !is_ours(request.target) {
        return Err(DropReason::NotOurs);
    }
    match (request.target, request.sender) {
        (IpAddr::V4(target), sender) => {
            let asker = match sender {
                Some(IpAddr::V4(asker)) => asker,
                Some(IpAddr::V6(_)) | None => Ipv4Addr::UNSPECIFIED,
            };
            let arp = arp(ArpOperation::REPLY, our_mac, target, request.source_mac, asker);
            emit(out, &framing(vni, request.source_mac, our_mac, EtherType::ARP), &[&arp])
        }
        (IpAddr::V6(target), Some(IpAddr::V6(asker))) => {
            let nd = discovery(target, asker, advertisement(true), target, our_mac);
            emit(out, &framing(vni, request.source_mac, our_mac, EtherType::IPV6), &[&nd])
        }
        // To a machine without an address the answer goes to all nodes, unsolicited (RFC 4861 section 7.2.4).
        (IpAddr::V6(target), Some(IpAddr::V4(_)) | None) => {
            const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            let nd = discovery(target, ALL_NODES, advertisement(false), target, our_mac);
            emit(out, &framing(vni, group_mac(ALL_NODES), our_mac, EtherType::IPV6), &[&nd])
        }
    }
}

/// Writes an ARP request for a peer's address; returns the length of the datagram.
pub fn ask_v4(
    out: &mut [u8],
    vni: u32,
    our_mac: Mac,
    ours: Ipv4Addr,
    target: Ipv4Addr,
) -> Result<usize, DropReason> {
    let arp = arp(ArpOperation::REQUEST, our_mac, ours, [0; 6], target);
    emit(out, &framing(vni, BROADCAST, our_mac, EtherType::ARP), &[&arp])
}

/// Writes a neighbour solicitation for a peer's address; returns the length of the datagram.
pub fn ask_v6(
    out: &mut [u8],
    vni: u32,
    our_mac: Mac,
    ours: Ipv6Addr,
    target: Ipv6Addr,
) -> Result<usize, DropReason> {
    let group = solicited_node(target);
    let nd = discovery(ours, group, Icmpv6Type::NeighborSolicitation, target, our_mac);
    emit(out, &framing(vni, group_mac(group), our_mac, EtherType::IPV6), &[&nd])
}

/// Which of `n` sending sockets a flow uses: the outer source port is what routers and network cards
/// spread load by (RFC 7348 section 5), and one flow must stay on one.
pub fn source_port_index(flow_hash: u64, n: usize) -> usize {
    // Fibonacci hashing spreads hashes whose entropy sits in few bits; the product's top half picks the socket.
    let mixed = flow_hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((u128::from(mixed) * n as u128) >> 64) as usize
}

/// A MAC address of our own, always the same for the same key or name: unicast, locally administered
/// (IEEE 802, second bit of the first octet), so that it survives a restart and collides with no hardware.
pub fn mac_from_key(key: &[u8]) -> Mac {
    // Fixed keys on purpose: the address must be the same after a restart and is no secret.
    let mut hasher = SipHasher24::new_with_keys(0x7761_7272_656e, 0x0076_786c_616e);
    hasher.write(key);
    let [a, b, c, d, e, f, ..] = hasher.finish().to_be_bytes();
    [(a | 0x02) & !0x01, b, c, d, e, f]
}

// --- reading -------------------------------------------------------------------------------------

fn open_arp(payload: &[u8], source_mac: Mac) -> Result<Inner, DropReason> {
    let arp = ArpPacketSlice::from_slice(payload).map_err(|_| DropReason::Truncated)?;
    let (Ok(mac), Ok(sender), Ok(target)) = (
        Mac::try_from(arp.sender_hw_addr()),
        <[u8; 4]>::try_from(arp.sender_protocol_addr()),
        <[u8; 4]>::try_from(arp.target_protocol_addr()),
    ) else {
        return Err(DropReason::BadInnerFrame);
    };
    let ethernet_ipv4 =
        arp.hw_addr_type() == ArpHardwareId::ETHERNET && arp.proto_addr_type() == EtherType::IPV4;
    let (sender, target) = (Ipv4Addr::from(sender), Ipv4Addr::from(target));
    if !ethernet_ipv4 || mac != source_mac || sender.is_multicast() || sender.is_broadcast() {
        return Err(DropReason::BadInnerFrame);
    }
    match arp.operation() {
        // Asking for one's own address is announcing it (RFC 5227 section 3).
        ArpOperation::REQUEST if sender != target => Ok(Inner::Request(NeighbourRequest {
            target: target.into(),
            sender: (!sender.is_unspecified()).then_some(sender.into()),
            source_mac,
        })),
        ArpOperation::REQUEST | ArpOperation::REPLY if !sender.is_unspecified() => {
            Ok(Inner::Reply(NeighbourReply { address: sender.into(), source_mac }))
        }
        _ => Err(DropReason::BadInnerFrame),
    }
}

/// The ICMPv6 type of a packet that could be neighbour discovery, which has no extension headers (RFC 6980).
fn icmpv6_type(packet: &[u8]) -> Option<u8> {
    let icmp = packet.get(6) == Some(&IpNumber::IPV6_ICMP.0);
    packet.get(Ipv6Header::LEN).copied().filter(|_| icmp)
}

fn is_neighbour_message(packet: &[u8]) -> bool {
    matches!(icmpv6_type(packet), Some(TYPE_NEIGHBOR_SOLICITATION | TYPE_NEIGHBOR_ADVERTISEMENT))
}

/// Routers have no business on this link: their messages, and the default routes that forged ones plant
/// (CVE-2020-10749), must not reach our kernel.
fn is_router_message(packet: &[u8]) -> bool {
    matches!(
        icmpv6_type(packet),
        Some(TYPE_ROUTER_SOLICITATION | TYPE_ROUTER_ADVERTISEMENT | TYPE_REDIRECT_MESSAGE)
    )
}

/// RFC 4861 sections 7.1.1 and 7.1.2.
fn open_discovery(packet: &[u8], source_mac: Mac) -> Result<Inner, DropReason> {
    let ip = Ipv6HeaderSlice::from_slice(packet).map_err(|_| DropReason::Truncated)?;
    let body = packet
        .get(Ipv6Header::LEN..Ipv6Header::LEN + usize::from(ip.payload_length()))
        .ok_or(DropReason::Truncated)?;
    let icmp = Icmpv6Slice::from_slice(body).map_err(|_| DropReason::Truncated)?;
    if ip.hop_limit() != ND_HOP_LIMIT {
        return Err(DropReason::BadInnerFrame);
    }
    if !icmp.is_checksum_valid(ip.source(), ip.destination()) {
        return Err(DropReason::BadChecksum);
    }
    let (source, destination) = (ip.source_addr(), ip.destination_addr());
    if source.is_multicast() {
        return Err(DropReason::BadInnerFrame);
    }
    match icmp.icmp_type() {
        Icmpv6Type::NeighborSolicitation => {
            let message = NeighborSolicitationPayloadSlice::from_slice(icmp.payload())
                .map_err(|_| DropReason::Truncated)?;
            let named = link_layer_options_agree(message.options_iterator(), &source_mac)?;
            let target = message.target_address();
            let probe = source.is_unspecified();
            // A probe goes to the group and cannot name a link-layer address for no address.
            let bad_probe = probe && (named || destination != solicited_node(target));
            if target.is_multicast() || bad_probe {
                return Err(DropReason::BadInnerFrame);
            }
            let sender = (!probe).then_some(IpAddr::V6(source));
            Ok(Inner::Request(NeighbourRequest { target: target.into(), sender, source_mac }))
        }
        Icmpv6Type::NeighborAdvertisement(flags) => {
            let message = NeighborAdvertisementPayloadSlice::from_slice(icmp.payload())
                .map_err(|_| DropReason::Truncated)?;
            link_layer_options_agree(message.options_iterator(), &source_mac)?;
            let address = message.target_address();
            if address.is_multicast() || (flags.solicited && destination.is_multicast()) {
                return Err(DropReason::BadInnerFrame);
            }
            Ok(Inner::Reply(NeighbourReply { address: address.into(), source_mac }))
        }
        _ => Err(DropReason::BadInnerFrame),
    }
}

/// Whether a link-layer address is named; an error if it is another than the frame's, or an option is broken.
fn link_layer_options_agree(
    options: etherparse::icmpv6::NdpOptionsIterator<'_>,
    source_mac: &Mac,
) -> Result<bool, DropReason> {
    let mut named = false;
    for option in options {
        let bytes = match option.map_err(|_| DropReason::BadInnerFrame)? {
            NdpOptionSlice::SourceLinkLayerAddress(option) => option.as_bytes(),
            NdpOptionSlice::TargetLinkLayerAddress(option) => option.as_bytes(),
            _ => continue,
        };
        if bytes.get(2..) != Some(source_mac.as_slice()) {
            return Err(DropReason::BadInnerFrame);
        }
        named = true;
    }
    Ok(named)
}

const fn is_group(mac: &Mac) -> bool {
    mac[0] & 1 != 0
}

// --- writing -------------------------------------------------------------------------------------

const fn framing(vni: u32, to: Mac, from: Mac, kind: EtherType) -> [u8; HEADER] {
    let [_, v0, v1, v2] = vni.to_be_bytes();
    let [k0, k1] = kind.0.to_be_bytes();
    [
        FLAG_VNI, 0, 0, 0, v0, v1, v2, 0, // VXLAN
        to[0], to[1], to[2], to[3], to[4], to[5], // Ethernet: destination
        from[0], from[1], from[2], from[3], from[4], from[5], k0, k1,
    ]
}

fn arp(
    operation: ArpOperation,
    sender_mac: Mac,
    sender: Ipv4Addr,
    target_mac: Mac,
    target: Ipv4Addr,
) -> [u8; ArpEthIpv4Packet::LEN] {
    let (sender_ipv4, target_ipv4) = (sender.octets(), target.octets());
    ArpEthIpv4Packet { operation, sender_mac, sender_ipv4, target_mac, target_ipv4 }.to_bytes()
}

/// The router flag is set because a node does forward, for its pods: a receiver that took us for a
/// plain host would forget routes through us (RFC 4861 section 7.2.5).
const fn advertisement(solicited: bool) -> Icmpv6Type {
    Icmpv6Type::NeighborAdvertisement(NeighborAdvertisementHeader {
        router: true,
        solicited,
        r#override: true,
    })
}

/// A whole IPv6 packet with a neighbour message that names our MAC address.
fn discovery(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    kind: Icmpv6Type,
    target: Ipv6Addr,
    our_mac: Mac,
) -> [u8; Ipv6Header::LEN + ND_LEN] {
    // Option 1 is the solicitation's source, 2 the advertisement's target (RFC 4861 section 4.6.1); 1 unit of 8.
    let option = if matches!(kind, Icmpv6Type::NeighborSolicitation) { 1 } else { 2 };
    let mut body = [0; 24];
    body[..16].copy_from_slice(&target.octets());
    body[16..18].copy_from_slice(&[option, 1]);
    body[18..].copy_from_slice(&our_mac);

    let mut icmp = Icmpv6Header::new(kind);
    // The sum fails only for payloads of 4 GiB; a zero would be refused by the receiver, not trusted.
    icmp.checksum =
        icmp.icmp_type.calc_checksum(source.octets(), destination.octets(), &body).unwrap_or_default();
    let ip = Ipv6Header {
        payload_length: ND_LEN as u16,
        next_header: IpNumber::IPV6_ICMP,
        hop_limit: ND_HOP_LIMIT,
        source: source.octets(),
        destination: destination.octets(),
        ..Ipv6Header::default()
    };
    let mut packet = [0; Ipv6Header::LEN + ND_LEN];
    packet[..Ipv6Header::LEN].copy_from_slice(&ip.to_bytes());
    packet[Ipv6Header::LEN..Ipv6Header::LEN + 8].copy_from_slice(&icmp.to_bytes());
    packet[Ipv6Header::LEN + 8..].copy_from_slice(&body);
    packet
}

/// ff02::1:ffXX:XXXX (RFC 4291 section 2.7.1).
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (a & 0xff), b)
}

/// 33:33 and the last four bytes of the group (RFC 2464 section 7).
fn group_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

fn emit(out: &mut [u8], head: &[u8; HEADER], parts: &[&[u8]]) -> Result<usize, DropReason> {
    let mut len = 0;
    for part in std::iter::once(head.as_slice()).chain(parts.iter().copied()) {
        out.get_mut(len..len + part.len()).ok_or(DropReason::NoBuffer)?.copy_from_slice(part);
        len += part.len();
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VNI: u32 = 1;
    const OURS: Mac = [0x02, 0xaa, 0, 0, 0, 1];
    const THEIRS: Mac = [0x5e, 0xbb, 0, 0, 0, 2];
    const OUR_V4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 0);
    const THEIR_V4: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 0);
    const OUR_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 1, 0, 0, 0, 0xab12, 0x3456);
    const THEIR_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 2, 0, 0, 0, 0, 1);

    /// What a kernel `vxlan` device sends (VNI 1) when it wants the MAC address of 10.244.1.0.
    const ARP_WHO_HAS: [u8; 50] = [
        0x08, 0, 0, 0, 0, 0, 1, 0, // VXLAN
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x5e, 0xbb, 0, 0, 0, 2, 0x08, 0x06, // Ethernet
        0, 1, 0x08, 0, 6, 4, 0, 1, // request
        0x5e, 0xbb, 0, 0, 0, 2, 10, 244, 2, 0, // sender
        0, 0, 0, 0, 0, 0, 10, 244, 1, 0, // target
    ];

    fn is_ours(address: IpAddr) -> bool {
        address == IpAddr::V4(OUR_V4) || address == IpAddr::V6(OUR_V6)
    }

    fn frame(destination: Mac, source: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = framing(VNI, destination, source, EtherType(kind)).to_vec();
        frame.extend_from_slice(payload);
        frame
    }

    fn opened(datagram: &[u8]) -> Result<Inner, DropReason> {
        open(datagram, VNI, &OURS)
    }

    /// RFC 1071, the slow way: 0 when the checksum inside is right.
    fn icmp_residue(packet: &[u8]) -> u16 {
        let mut data = packet[8..40].to_vec();
        data.extend_from_slice(&((packet.len() - 40) as u32).to_be_bytes());
        data.extend_from_slice(&[0, 0, 0, 58]);
        data.extend_from_slice(&packet[40..]);
        let mut sum: u32 = data.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    /// Puts the right checksum into an ICMPv6 packet.
    fn fix_icmp(packet: &mut [u8]) {
        packet[42..44].fill(0);
        let sum = icmp_residue(packet);
        packet[42..44].copy_from_slice(&sum.to_be_bytes());
    }

    /// The solicitation that THEIRS sends for one of our addresses, without the framing.
    fn solicitation(target: Ipv6Addr) -> Vec<u8> {
        let mut out = [0; MAX_NEIGHBOUR];
        let len = ask_v6(&mut out, VNI, THEIRS, THEIR_V6, target).unwrap();
        out[HEADER..len].to_vec()
    }

    #[test]
    fn header_is_rfc_7348() {
        let mut out = [0xee; HEADER + 1];
        write_header(&mut out, 0x0a0b0c, THEIRS, OURS, false);
        let expected =
            [8, 0, 0, 0, 0x0a, 0x0b, 0x0c, 0, 0x5e, 0xbb, 0, 0, 0, 2, 0x02, 0xaa, 0, 0, 0, 1, 8, 0, 0xee];
        assert_eq!(out, expected);
        assert_eq!(&header(VNI, THEIRS, OURS, true)[20..], &[0x86, 0xdd]);
    }

    #[test]
    fn ip_for_us_is_opened() {
        let ip = Ok(Inner::Ip { offset: HEADER, source_mac: THEIRS });
        assert_eq!(opened(&frame(OURS, THEIRS, 0x0800, &[0x45, 0])), ip);
        assert_eq!(opened(&frame(OURS, THEIRS, 0x86dd, &[0x60, 0])), ip);
        // Flags that we do not know are ignored on receipt (RFC 7348 section 5).
        let mut flags = frame(OURS, THEIRS, 0x0800, &[0x45]);
        flags[0] = 0xff;
        assert_eq!(opened(&flags), ip);
    }

    #[test]
    fn foreign_frames_are_refused() {
        let ip = [0x45, 0];
        let other = [0x02, 0, 0, 0, 0, 9];
        assert_eq!(opened(&frame(other, THEIRS, 0x0800, &ip)), Err(DropReason::BadInnerFrame));
        assert_eq!(opened(&frame(OURS, BROADCAST, 0x0800, &ip)), Err(DropReason::BadInnerFrame));
        assert_eq!(opened(&frame(OURS, [0; 6], 0x0800, &ip)), Err(DropReason::BadInnerFrame));
        assert_eq!(opened(&frame(BROADCAST, THEIRS, 0x0800, &ip)), Err(DropReason::Multicast));
        assert_eq!(opened(&frame(OURS, THEIRS, 0x8100, &ip)), Err(DropReason::BadInnerFrame));
        assert_eq!(opened(&frame(OURS, THEIRS, 0x86dd, &ip)), Err(DropReason::BadInnerFrame));
        assert_eq!(opened(&frame(OURS, THEIRS, 0x0800, &[])), Err(DropReason::Truncated));
        assert_eq!(opened(&frame(OURS, THEIRS, 0x0800, &ip)[..21]), Err(DropReason::Truncated));
        assert_eq!(opened(&[8; 7]), Err(DropReason::Truncated));

        let mut wrong = frame(OURS, THEIRS, 0x0800, &ip);
        wrong[6] = 2;
        assert_eq!(opened(&wrong), Err(DropReason::WrongVni));
        wrong[6] = 1;
        wrong[0] = 0;
        assert_eq!(opened(&wrong), Err(DropReason::WrongVni));
    }

    #[test]
    fn arp_request_is_answered() {
        let Ok(Inner::Request(request)) = opened(&ARP_WHO_HAS) else { panic!("no request") };
        let expected =
            NeighbourRequest { target: OUR_V4.into(), sender: Some(THEIR_V4.into()), source_mac: THEIRS };
        assert_eq!(request, expected);

        let mut out = [0; MAX_NEIGHBOUR];
        let len = answer(&mut out, VNI, OURS, &request, is_ours).unwrap();
        let reply = [
            0x08, 0, 0, 0, 0, 0, 1, 0, // VXLAN
            0x5e, 0xbb, 0, 0, 0, 2, 0x02, 0xaa, 0, 0, 0, 1, 0x08, 0x06, // Ethernet
            0, 1, 0x08, 0, 6, 4, 0, 2, // reply
            0x02, 0xaa, 0, 0, 0, 1, 10, 244, 1, 0, // sender
            0x5e, 0xbb, 0, 0, 0, 2, 10, 244, 2, 0, // target
        ];
        assert_eq!(&out[..len], &reply);
        assert_eq!(
            open(&out[..len], VNI, &THEIRS),
            Ok(Inner::Reply(NeighbourReply { address: OUR_V4.into(), source_mac: OURS }))
        );
        assert_eq!(answer(&mut out, VNI, OURS, &request, |_| false), Err(DropReason::NotOurs));
        assert_eq!(answer(&mut out[..49], VNI, OURS, &request, is_ours), Err(DropReason::NoBuffer));
    }

    #[test]
    fn arp_cannot_speak_for_another_mac() {
        let mut forged = ARP_WHO_HAS;
        forged[35] = 9; // last byte of the sender's MAC address inside ARP
        assert_eq!(opened(&forged), Err(DropReason::BadInnerFrame));

        let mut gratuitous = ARP_WHO_HAS;
        gratuitous[46..50].copy_from_slice(&THEIR_V4.octets());
        let reply = Inner::Reply(NeighbourReply { address: THEIR_V4.into(), source_mac: THEIRS });
        assert_eq!(opened(&gratuitous), Ok(reply));

        let mut probe = ARP_WHO_HAS;
        probe[36..40].fill(0);
        let Ok(Inner::Request(request)) = opened(&probe) else { panic!("no request") };
        assert_eq!(request.sender, None);
        let mut out = [0; MAX_NEIGHBOUR];
        assert_eq!(answer(&mut out, VNI, OURS, &request, is_ours), Ok(50));

        for (at, value) in [(23, 6), (25, 0xdd), (26, 5), (27, 3), (29, 3), (36, 224)] {
            let mut broken = ARP_WHO_HAS;
            broken[at] = value;
            let result = opened(&broken);
            assert!(
                matches!(result, Err(DropReason::BadInnerFrame | DropReason::Truncated)),
                "{at}: {result:?}"
            );
        }
        assert_eq!(opened(&ARP_WHO_HAS[..49]), Err(DropReason::Truncated));
    }

    #[test]
    fn solicitation_is_answered() {
        let packet = solicitation(OUR_V6);
        assert_eq!(icmp_residue(&packet), 0);
        assert_eq!(&packet[24..40], &[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0x12, 0x34, 0x56]);
        assert_eq!(&packet[64..], &[1, 1, 0x5e, 0xbb, 0, 0, 0, 2]);

        let datagram = frame([0x33, 0x33, 0xff, 0x12, 0x34, 0x56], THEIRS, 0x86dd, &packet);
        let Ok(Inner::Request(request)) = opened(&datagram) else { panic!("no request") };
        assert_eq!((request.target, request.sender), (OUR_V6.into(), Some(THEIR_V6.into())));

        let mut out = [0; MAX_NEIGHBOUR];
        let len = answer(&mut out, VNI, OURS, &request, is_ours).unwrap();
        assert_eq!(len, MAX_NEIGHBOUR);
        assert_eq!(icmp_residue(&out[HEADER..len]), 0);
        assert_eq!(out[HEADER + 7], 255);
        assert_eq!(&out[HEADER + 40..HEADER + 42], &[136, 0]);
        assert_eq!(out[HEADER + 44], 0b1110_0000); // router, solicited, override
        assert_eq!(
            open(&out[..len], VNI, &THEIRS),
            Ok(Inner::Reply(NeighbourReply { address: OUR_V6.into(), source_mac: OURS }))
        );
        // A unicast probe of a neighbour that is known already (RFC 4861 section 7.3).
        assert!(matches!(opened(&frame(OURS, THEIRS, 0x86dd, &packet)), Ok(Inner::Request(_))));
    }

    #[test]
    fn duplicate_address_probe_is_answered_to_all_nodes() {
        let mut packet = solicitation(OUR_V6);
        packet[8..24].fill(0);
        fix_icmp(&mut packet);
        let to = [0x33, 0x33, 0xff, 0x12, 0x34, 0x56];
        assert_eq!(opened(&frame(to, THEIRS, 0x86dd, &packet)), Err(DropReason::BadInnerFrame));
        // Without the link-layer option it is a proper probe (RFC 4862 section 5.4.2).
        packet.truncate(64);
        packet[5] = 24;
        fix_icmp(&mut packet);
        let Ok(Inner::Request(request)) = opened(&frame(to, THEIRS, 0x86dd, &packet)) else {
            panic!("no request")
        };
        assert_eq!(request.sender, None);
        let mut out = [0; MAX_NEIGHBOUR];
        let len = answer(&mut out, VNI, OURS, &request, is_ours).unwrap();
        assert_eq!(&out[8..14], &[0x33, 0x33, 0, 0, 0, 1]);
        assert!(matches!(open(&out[..len], VNI, &THEIRS), Ok(Inner::Reply(_))));
    }

    #[test]
    fn bad_discovery_is_refused() {
        let to = [0x33, 0x33, 0xff, 0x12, 0x34, 0x56];
        let good = solicitation(OUR_V6);
        let changed = |edit: &dyn Fn(&mut Vec<u8>)| {
            let mut packet = good.clone();
            edit(&mut packet);
            opened(&frame(to, THEIRS, 0x86dd, &packet))
        };
        assert_eq!(changed(&|p| p[7] = 254), Err(DropReason::BadInnerFrame));
        assert_eq!(changed(&|p| p[50] ^= 1), Err(DropReason::BadChecksum));
        assert_eq!(changed(&|p| p.truncate(60)), Err(DropReason::Truncated));
        let fixed = |edit: &dyn Fn(&mut Vec<u8>)| {
            changed(&|p| {
                edit(p);
                fix_icmp(p);
            })
        };
        assert!(fixed(&|_| ()).is_ok());
        assert_eq!(fixed(&|p| p[71] = 9), Err(DropReason::BadInnerFrame)); // another MAC address
        assert_eq!(fixed(&|p| p[65] = 0), Err(DropReason::BadInnerFrame)); // option of no length
        assert_eq!(fixed(&|p| p[41] = 1), Err(DropReason::BadInnerFrame)); // code
        assert_eq!(fixed(&|p| p[48] = 0xff), Err(DropReason::BadInnerFrame)); // multicast target
        for kind in [133, 134, 137] {
            assert_eq!(fixed(&|p| p[40] = kind), Err(DropReason::Multicast));
            let mut packet = good.clone();
            packet[40] = kind;
            assert_eq!(opened(&frame(OURS, THEIRS, 0x86dd, &packet)), Err(DropReason::BadInnerFrame));
        }
        // Other ICMPv6 in a group frame is multicast, in a frame of ours an ordinary packet.
        assert_eq!(fixed(&|p| p[40] = 128), Err(DropReason::Multicast));
    }

    #[test]
    fn mac_is_local_unicast_and_stable() {
        let mac = mac_from_key(b"node-1");
        assert_eq!(mac[0] & 0x03, 0x02);
        assert_eq!(mac, mac_from_key(b"node-1"));
        assert_ne!(mac, mac_from_key(b"node-2"));
    }

    #[test]
    fn flows_spread_over_the_sockets() {
        let mut hits = [0; 4];
        for hash in 0..4000 {
            hits[source_port_index(hash, 4)] += 1;
        }
        assert!(hits.iter().all(|n| (900..1100).contains(n)), "{hits:?}");
        assert_eq!(source_port_index(u64::MAX, 1), 0);
        assert_eq!(source_port_index(7, 0), 0);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = opened(&bytes);
        }

        #[test]
        fn arbitrary_payloads_never_panic(
            kind in prop::sample::select(vec![0x0800u16, 0x0806, 0x86dd]),
            group in any::<bool>(),
            bytes in proptest::collection::vec(any::<u8>(), 0..120),
        ) {
            let to = if group { BROADCAST } else { OURS };
            if let Ok(Inner::Request(request)) = opened(&frame(to, THEIRS, kind, &bytes)) {
                let _ = answer(&mut [0; MAX_NEIGHBOUR], VNI, OURS, &request, |_| true);
            }
        }

        #[test]
        fn damaged_neighbour_messages_never_panic(
            at in 0usize..MAX_NEIGHBOUR, value in any::<u8>(), v6 in any::<bool>(), cut in 0usize..MAX_NEIGHBOUR,
        ) {
            let mut datagram = if v6 {
                frame([0x33, 0x33, 0xff, 0x12, 0x34, 0x56], THEIRS, 0x86dd, &solicitation(OUR_V6))
            } else {
                ARP_WHO_HAS.to_vec()
            };
            if let Some(byte) = datagram.get_mut(at) {
                *byte = value;
            }
            let _ = opened(&datagram);
            datagram.truncate(cut);
            let _ = opened(&datagram);
        }
    }
}
