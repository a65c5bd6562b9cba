//! What a network person would look at: who sends ICMP errors, how large a packet may be.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{SockaddrLike, SockaddrStorage, recvfrom, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use warren::io::clock;

use super::Station;
use super::netns::Netns;

/// An ICMP error as a host sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IcmpError {
    /// Who sent it.
    pub from: IpAddr,
    /// ICMP or ICMPv6 type.
    pub kind: u8,
    /// Its code.
    pub code: u8,
    /// The second word: the MTU of "too big" messages.
    pub word: u32,
}

impl IcmpError {
    /// The MTU it tells, if it says that a packet was too big (RFC 1191 section 4, RFC 4443 section 3.2).
    pub fn mtu(&self) -> Option<u32> {
        match (self.from, self.kind, self.code) {
            (IpAddr::V4(_), 3, 4) => Some(self.word & 0xffff),
            (IpAddr::V6(_), 2, 0) => Some(self.word),
            (IpAddr::V4(_) | IpAddr::V6(_), _, _) => None,
        }
    }
}

/// Hears every ICMP error that reaches a namespace.
#[derive(Debug)]
pub struct Ear {
    socket: Socket,
    v4: bool,
}

impl Ear {
    /// Starts to listen for one family.
    pub fn new(ns: &Netns, v4: bool) -> Ear {
        let (domain, protocol) =
            if v4 { (Domain::IPV4, Protocol::ICMPV4) } else { (Domain::IPV6, Protocol::ICMPV6) };
        let socket = ns.enter(|| Socket::new(domain, Type::RAW, Some(protocol)).expect("open a raw socket"));
        Ear { socket, v4 }
    }

    /// The next error that quotes a UDP packet to `port`; `None` when there is none within the time.
    pub fn hear(&self, port: u16, within: Duration) -> Option<IcmpError> {
        let deadline = clock::now() + within;
        let mut buffer = vec![0; 4096];
        loop {
            let left = deadline.checked_duration_since(clock::now()).filter(|d| !d.is_zero())?;
            self.socket.set_read_timeout(Some(left)).expect("set a timeout");
            let (n, from) = recvfrom::<SockaddrStorage>(self.socket.as_raw_fd(), &mut buffer).ok()?;
            let from = address(&from?)?;
            if let Some(error) = self.read(&buffer[..n], from, port) {
                return Some(error);
            }
        }
    }

    fn read(&self, bytes: &[u8], from: IpAddr, port: u16) -> Option<IcmpError> {
        // A raw IPv4 socket shows the IP header, a raw IPv6 socket does not (raw(7), RFC 3542).
        let icmp = if self.v4 { bytes.get(usize::from(bytes.first()? & 15) * 4..)? } else { bytes };
        let is_error = if self.v4 { matches!(icmp.first()?, 3 | 11) } else { *icmp.first()? < 128 };
        let quoted = icmp.get(8..)?;
        let header = if self.v4 { usize::from(quoted.first()? & 15) * 4 } else { 40 };
        let to = quoted.get(header + 2..header + 4)?;
        (is_error && to == port.to_be_bytes()).then(|| IcmpError {
            from,
            kind: icmp[0],
            code: icmp[1],
            word: u32::from_be_bytes([icmp[4], icmp[5], icmp[6], icmp[7]]),
        })
    }
}

fn address(storage: &SockaddrStorage) -> Option<IpAddr> {
    debug_assert!(storage.len() > 0);
    let v4 = storage.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
}

/// Who answers at each hop on the way; the last one is the target itself.
pub fn traceroute(from: Station<'_>, to: Station<'_>, family: usize) -> Vec<Option<IpAddr>> {
    // The port that traceroute counts up from: nobody listens there.
    const FIRST_PORT: u16 = 33_434;
    const MOST_HOPS: u16 = 8;
    let target = to.addresses[family];
    let ear = Ear::new(from.ns, target.is_ipv4());
    let socket = from
        .ns
        .enter(|| UdpSocket::bind(SocketAddr::new(from.addresses[family], 0)).expect("bind a UDP socket"));
    let mut hops = Vec::new();
    for hop in 1..=MOST_HOPS {
        let port = FIRST_PORT + hop;
        match target {
            IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4Ttl, &i32::from(hop)).expect("set the TTL"),
            IpAddr::V6(_) => {
                setsockopt(&socket, sockopt::Ipv6Ttl, &i32::from(hop)).expect("set the hop limit")
            }
        }
        // Errors are rate-limited, and an earlier one may be reported by this very call: ask twice.
        let heard = (0..2).find_map(|_| {
            let _ = socket.send_to(&[0; 32], SocketAddr::new(target, port));
            ear.hear(port, Duration::from_millis(1500))
        });
        let who = heard.map(|error| error.from);
        hops.push(who);
        if who == Some(target) {
            break;
        }
    }
    hops
}

/// Sends UDP of that size, which must fit the station's own device, and gives the MTU of the ICMP error that
/// comes back. Linux sets "don't fragment" on its own: it looks for the path's MTU (ip(7), IP_MTU_DISCOVER).
pub fn too_big(from: Station<'_>, to: Station<'_>, family: usize, size: usize) -> Option<u32> {
    const PORT: u16 = 40_001;
    let target = SocketAddr::new(to.addresses[family], PORT);
    let ear = Ear::new(from.ns, target.is_ipv4());
    let socket = from.ns.enter(|| UdpSocket::bind(SocketAddr::new(from.addresses[family], 0))).expect("bind");
    (0..3).find_map(|_| {
        let _ = socket.send_to(&vec![0; size], target);
        ear.hear(PORT, Duration::from_secs(1)).and_then(|error| error.mtu())
    })
}

/// Counts the UDP packets that a namespace receives for some ports.
#[derive(Debug)]
pub struct Meter<'a> {
    ns: &'a Netns,
}

impl<'a> Meter<'a> {
    /// Counts from now on.
    pub fn new(ns: &'a Netns, ports: &[u16]) -> Meter<'a> {
        ns.run("nft add table inet probe");
        // Before every other hook, so that nobody's drop hides a packet.
        ns.run("nft add chain inet probe in { type filter hook prerouting priority -350 ; }");
        for port in ports {
            ns.run(&format!("nft add rule inet probe in udp dport {port} counter"));
        }
        Meter { ns }
    }

    /// How many there were for a port.
    pub fn packets(&self, port: u16) -> u64 {
        let text = self.ns.run("nft list table inet probe");
        let line = text.lines().find(|line| line.contains(&format!("udp dport {port} ")));
        let count = line.and_then(|line| line.split("packets ").nth(1)?.split(' ').next()?.parse().ok());
        count.unwrap_or_else(|| panic!("no counter for port {port} in: {text}"))
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        self.ns.attempt("nft delete table inet probe");
    }
}
