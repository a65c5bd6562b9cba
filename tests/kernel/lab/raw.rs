//! Packets made by hand, for what the kernel has no sockets for.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{SockaddrStorage, recvfrom};
use socket2::{Domain, Protocol, Socket, Type};
use warren::io::clock;

use super::netns::Netns;

/// A raw socket for one protocol at one address.
#[derive(Debug)]
pub struct Raw {
    socket: Socket,
    /// Where it hears, and sends from.
    pub address: IpAddr,
}

/// What came, and from whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Came {
    /// The sender.
    pub from: IpAddr,
    /// Behind the IP header.
    pub payload: Vec<u8>,
}

impl Raw {
    /// Opens it; it hears what is sent to this address.
    pub fn new(ns: &Netns, address: IpAddr, protocol: u8) -> Raw {
        let here = SocketAddr::new(address, 0);
        let socket = ns.enter(|| {
            let protocol = Some(Protocol::from(i32::from(protocol)));
            let socket =
                Socket::new(Domain::for_address(here), Type::RAW, protocol).expect("open a raw socket");
            socket.bind(&here.into()).unwrap_or_else(|e| panic!("bind {address}: {e}"));
            socket
        });
        Raw { socket, address }
    }

    /// One that writes the IP headers too.
    pub fn with_headers(ns: &Netns, v4: bool) -> Raw {
        let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
        let any = if v4 { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        // IPPROTO_RAW: the header is the sender's, in both families (raw(7), net/ipv6/raw.c).
        let socket = ns.enter(|| Socket::new(domain, Type::RAW, Some(Protocol::from(255))));
        Raw { socket: socket.expect("open a raw socket"), address: any }
    }

    /// Sends the payload of an IP packet, or all of it.
    pub fn send(&self, to: IpAddr, bytes: &[u8]) -> io::Result<()> {
        self.socket.send_to(bytes, &SocketAddr::new(to, 0).into()).map(drop)
    }

    /// The first packet that is wanted; `None` when there is none within the time.
    pub fn hear(&self, within: Duration, wanted: impl Fn(&Came) -> bool) -> Option<Came> {
        let deadline = clock::now() + within;
        let mut room = vec![0; 1 << 16];
        loop {
            let left = deadline.checked_duration_since(clock::now()).filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).expect("set a timeout");
            let (n, from) = recvfrom::<SockaddrStorage>(self.socket.as_raw_fd(), &mut room).ok()?;
            let from = from?;
            let v4 = from.as_sockaddr_in().map(|from| IpAddr::V4(from.ip()));
            let from = v4.or_else(|| from.as_sockaddr_in6().map(|from| IpAddr::V6(from.ip())))?;
            // A raw IPv4 socket shows the IP header, a raw IPv6 socket does not (raw(7), RFC 3542).
            let header = if from.is_ipv4() { usize::from(room[0] & 15) * 4 } else { 0 };
            let came = Came { from, payload: room.get(header..n)?.to_vec() };
            if wanted(&came) {
                return Some(came);
            }
        }
    }
}

/// An SCTP packet (RFC 9260 section 3) with one chunk, as the wire has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sctp {
    /// Source and destination port.
    pub ports: (u16, u16),
    /// The tag that the receiver has chosen; 0 with an INIT.
    pub tag: u32,
    /// Its one chunk's type.
    pub chunk: u8,
    /// And what it holds.
    pub value: Vec<u8>,
}

impl Sctp {
    /// The protocol number.
    pub const PROTOCOL: u8 = 132;
    /// Chunks of the handshake, in its order.
    pub const INIT: u8 = 1;
    /// The answer to INIT.
    pub const INIT_ACK: u8 = 2;
    /// The answer to that.
    pub const COOKIE_ECHO: u8 = 10;
    /// And the last.
    pub const COOKIE_ACK: u8 = 11;

    /// What INIT and INIT ACK say: our tag, window, streams out and in, first TSN (section 3.3.2).
    pub fn offer(tag: u32) -> Vec<u8> {
        [&tag.to_be_bytes()[..], &65_536_u32.to_be_bytes(), &[0, 10, 0, 10], &1_u32.to_be_bytes()].concat()
    }

    /// As bytes, with the right checksum.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.ports.0.to_be_bytes(), self.ports.1.to_be_bytes()].concat();
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.chunk, 0]);
        bytes.extend((self.value.len() as u16 + 4).to_be_bytes());
        bytes.extend(&self.value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        // Appendix A: the least significant byte first.
        let crc = crc32c(&bytes).to_le_bytes();
        bytes[8..12].copy_from_slice(&crc);
        bytes
    }

    /// From bytes; `None` where the checksum is wrong.
    pub fn read(bytes: &[u8]) -> Option<Sctp> {
        let word = |at: usize| bytes.get(at..at + 4).map(|four| [four[0], four[1], four[2], four[3]]);
        let short = |at: usize| bytes.get(at..at + 2).map(|two| u16::from_be_bytes([two[0], two[1]]));
        let mut zeroed = bytes.to_vec();
        zeroed.get_mut(8..12)?.fill(0);
        if word(8)? != crc32c(&zeroed).to_le_bytes() {
            return None;
        }
        Some(Sctp {
            ports: (short(0)?, short(2)?),
            tag: u32::from_be_bytes(word(4)?),
            chunk: *bytes.get(12)?,
            value: bytes.get(16..12 + usize::from(short(14)?))?.to_vec(),
        })
    }
}

/// Castagnoli's polynomial, a bit at a time: a second opinion on what the packet line computes.
fn crc32c(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0_u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit))
}
