//! ICMP echo, both families, over raw sockets (root of the demo's own namespaces may open them).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use crate::io::clock;

/// RFC 792 and RFC 4443 section 4: types of echo request and reply.
const ECHO_V4: (u8, u8) = (8, 0);
const ECHO_V6: (u8, u8) = (128, 129);
/// Type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;
/// As ping(8) sends.
const PAYLOAD: usize = 56;

/// Sends one echo request and waits for its reply; how long that took.
pub(super) fn ping(target: IpAddr, id: u16, sequence: u16, timeout: Duration) -> io::Result<Duration> {
    let v6 = target.is_ipv6();
    let socket = raw_socket(v6)?;
    // Connected, so that only the target's packets come in, and unreachable errors as errors.
    socket.connect(SocketAddr::new(target, 0))?;
    let asked = clock::now();
    socket.send(&request(v6, id, sequence))?;
    let (_, reply) = if v6 { ECHO_V6 } else { ECHO_V4 };
    let deadline = asked + timeout;
    let mut packet = [0u8; 2048];
    loop {
        socket.set_read_timeout(Some(left(deadline)?))?;
        let length = match socket.recv(&mut packet) {
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e),
        };
        let message = packet.get(..length).and_then(|p| icmp_of(p, v6));
        if message.and_then(echo_of) == Some((reply, id, sequence)) {
            return Ok(clock::now().duration_since(asked));
        }
    }
}

/// A socket that hears every ICMP message of its namespace.
pub(super) fn listener(v6: bool) -> io::Result<UdpSocket> {
    raw_socket(v6)
}

/// Tells `seen` of every echo request: identifier and source.
pub(super) fn watch(socket: &UdpSocket, v6: bool, seen: impl Fn(u16, IpAddr)) {
    let (request, _) = if v6 { ECHO_V6 } else { ECHO_V4 };
    let mut packet = [0u8; 2048];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut packet) else { return };
        let message = packet.get(..length).and_then(|p| icmp_of(p, v6));
        if let Some((kind, id, _)) = message.and_then(echo_of)
            && kind == request
        {
            seen(id, from.ip());
        }
    }
}

/// A raw socket in a datagram socket's clothes: std has no raw one, and the calls are the same.
fn raw_socket(v6: bool) -> io::Result<UdpSocket> {
    let (domain, protocol, any): (_, _, IpAddr) = if v6 {
        (Domain::IPV6, Protocol::ICMPV6, Ipv6Addr::UNSPECIFIED.into())
    } else {
        (Domain::IPV4, Protocol::ICMPV4, Ipv4Addr::UNSPECIFIED.into())
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.bind(&SocketAddr::new(any, 0).into())?;
    Ok(UdpSocket::from(OwnedFd::from(socket)))
}

fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(clock::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

fn request(v6: bool, id: u16, sequence: u16) -> [u8; HEADER + PAYLOAD] {
    let mut message = [0u8; HEADER + PAYLOAD];
    message[0] = if v6 { ECHO_V6.0 } else { ECHO_V4.0 };
    message[4..6].copy_from_slice(&id.to_be_bytes());
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    for (n, byte) in message[HEADER..].iter_mut().enumerate() {
        *byte = n as u8;
    }
    // The kernel fills in ICMPv6's, which covers the addresses (RFC 3542 section 3.1).
    if !v6 {
        let sum = internet_checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| (u32::from(pair[0]) << 8) | pair.get(1).copied().map_or(0, u32::from))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Raw IPv4 sockets hand over the IP header too, IPv6 ones do not (raw(7), RFC 3542 section 3).
fn icmp_of(packet: &[u8], v6: bool) -> Option<&[u8]> {
    if v6 {
        return Some(packet);
    }
    let header = usize::from(packet.first()? & 0x0f) * 4;
    packet.get(header..)
}

/// Type, identifier, sequence number.
fn echo_of(message: &[u8]) -> Option<(u8, u16, u16)> {
    match message {
        [kind, 0, _, _, i1, i2, s1, s2, ..] => {
            Some((*kind, u16::from_be_bytes([*i1, *i2]), u16::from_be_bytes([*s1, *s2])))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_carries_its_numbers_and_a_right_checksum() {
        let message = request(false, 0x1234, 7);
        assert_eq!(echo_of(&message), Some((8, 0x1234, 7)));
        assert_eq!(internet_checksum(&message), 0, "the sum over everything, checksum included, is zero");
        assert_eq!(echo_of(&request(true, 1, 2)), Some((128, 1, 2)));
    }

    #[test]
    fn short_packets_are_nothing() {
        assert_eq!(icmp_of(&[], false), None);
        assert_eq!(icmp_of(&[0x4f, 0, 0], false), None);
        assert_eq!(echo_of(&[8, 0, 0]), None);
    }

    #[test]
    fn the_ip_header_is_skipped_with_its_options() {
        let mut packet = vec![0u8; 24];
        packet[0] = 0x46;
        packet.extend(request(false, 9, 1));
        assert_eq!(icmp_of(&packet, false).and_then(echo_of), Some((8, 9, 1)));
    }
}
