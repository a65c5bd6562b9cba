//! What somebody sees who listens on the network between the nodes: tunnel packets, and no pod's address.

use std::io::{self, Read};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::{EavesdropArgs, Tunnel};
use crate::demo::internal::say;

/// linux/if_ether.h: every protocol.
const ETH_P_ALL: u16 = 0x0003;
/// How often we look whether to end.
const GLANCE: Duration = Duration::from_millis(20);
/// Outer IP, UDP and some more: what it takes to tell packets apart.
const SNAP: usize = 128;
/// IANA protocol numbers.
const UDP: u8 = 17;

/// What passed, each packet once for every device it crossed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::demo) struct Overheard {
    /// UDP packets of the tunnel.
    pub tunnel: u64,
    /// Packets that say in clear which pod they come from or go to.
    pub clear: u64,
    /// The first of those.
    pub example: Option<String>,
}

/// Listens in this namespace until standard input ends.
pub(in crate::demo) fn listen(args: &EavesdropArgs) -> Result<Overheard, String> {
    overhear(args).map_err(|e| format!("cannot listen in: {e}"))
}

fn overhear(args: &EavesdropArgs) -> io::Result<Overheard> {
    // Not bound to a device: it hears all of them. In network byte order, packet(7).
    let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
    socket.set_read_timeout(Some(GLANCE))?;
    // A datagram socket's clothes, for std's safe `recv`.
    let socket = UdpSocket::from(OwnedFd::from(socket));
    let enough = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&enough);
    thread::spawn(move || {
        let _ = io::stdin().read(&mut [0u8; 1]);
        ended.store(true, Ordering::Relaxed);
    });
    say("listening");
    let mut overheard = Overheard::default();
    let mut packet = [0u8; SNAP];
    loop {
        match socket.recv(&mut packet) {
            Ok(length) => {
                let seen = packet.get(..length).and_then(Outer::read);
                if let Some(outer) = seen {
                    overheard.count(&outer, args);
                }
            }
            // Only when all that was there has been read.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && enough.load(Ordering::Relaxed) => {
                return Ok(overheard);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
}

impl Overheard {
    fn count(&mut self, outer: &Outer, args: &EavesdropArgs) {
        let ports = args.port..=args.port.saturating_add(args.ports.saturating_sub(1));
        if args.pods.iter().any(|range| range.contains(&outer.source) || range.contains(&outer.destination)) {
            self.clear += 1;
            self.example.get_or_insert_with(|| format!("{} -> {}", outer.source, outer.destination));
        } else if outer.udp.is_some_and(|(port, start)| ports.contains(&port) && begins(args.tunnel, start)) {
            self.tunnel += 1;
        }
    }
}

/// What an outer header says.
#[derive(Debug, PartialEq, Eq)]
struct Outer {
    source: IpAddr,
    destination: IpAddr,
    /// Destination port, and how the payload begins.
    udp: Option<(u16, [u8; 4])>,
}

/// Whether a tunnel's packet begins like that. WireGuard (wireguard.com/protocol): a type from 1 to 4, three
/// zeros. VXLAN (RFC 7348 section 5): the I flag alone, three zeros.
fn begins(tunnel: Tunnel, start: [u8; 4]) -> bool {
    match tunnel {
        Tunnel::Wireguard => matches!(start, [1..=4, 0, 0, 0]),
        Tunnel::Vxlan => start == [0x08, 0, 0, 0],
    }
}

impl Outer {
    fn read(packet: &[u8]) -> Option<Outer> {
        let (source, destination, protocol, payload): (IpAddr, IpAddr, _, _) = match packet.first()? >> 4 {
            4 => (
                part::<4>(packet, 12)?.into(),
                part::<4>(packet, 16)?.into(),
                *packet.get(9)?,
                packet.get(usize::from(packet.first()? & 0x0f) * 4..)?,
            ),
            6 => (
                part::<16>(packet, 8)?.into(),
                part::<16>(packet, 24)?.into(),
                *packet.get(6)?,
                packet.get(40..)?,
            ),
            _ => return None,
        };
        let port = part::<2>(payload, 2).map(u16::from_be_bytes).filter(|_| protocol == UDP);
        Some(Outer { source, destination, udp: port.zip(part::<4>(payload, 8)) })
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How WireGuard's transport data begins.
    const DATA: [u8; 4] = [4, 0, 0, 0];

    fn udp_v4(source: [u8; 4], destination: [u8; 4], port: u16, start: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, UDP, 0, 0];
        packet.extend(source);
        packet.extend(destination);
        packet.extend([0x30, 0x39]);
        packet.extend(port.to_be_bytes());
        packet.extend([0, 12, 0, 0]);
        packet.extend(start);
        packet
    }

    fn overheard(packet: &[u8]) -> Overheard {
        let mut overheard = Overheard::default();
        let pods = vec!["10.244.0.0/16".parse().expect("a range")];
        let args = EavesdropArgs { pods, tunnel: Tunnel::Wireguard, port: 51820, ports: 64 };
        if let Some(outer) = Outer::read(packet) {
            overheard.count(&outer, &args);
        }
        overheard
    }

    #[test]
    fn tunnel_packets_and_pods_in_clear_are_told_apart() {
        let tunnel = overheard(&udp_v4([10, 99, 0, 11], [10, 99, 0, 12], 51821, DATA));
        assert_eq!((tunnel.tunnel, tunnel.clear), (1, 0));
        let clear = overheard(&udp_v4([10, 244, 1, 2], [10, 244, 2, 2], 51820, DATA));
        assert_eq!((clear.tunnel, clear.clear), (0, 1));
        assert_eq!(clear.example.as_deref(), Some("10.244.1.2 -> 10.244.2.2"));
        let other = overheard(&udp_v4([10, 99, 0, 11], [10, 99, 0, 12], 53, DATA));
        assert_eq!(other, Overheard::default());
        let plain = overheard(&udp_v4([10, 99, 0, 11], [10, 99, 0, 12], 51820, [0x08, 0, 0, 0]));
        assert_eq!(plain, Overheard::default(), "VXLAN on WireGuard's port is not WireGuard");
    }

    #[test]
    fn scraps_are_ignored() {
        let whole = udp_v4([10, 99, 0, 11], [10, 99, 0, 12], 51820, DATA);
        for length in 0..20 {
            assert_eq!(Outer::read(&whole[..length]), None);
        }
        assert_eq!(Outer::read(&[0x60; 39]), None);
        assert_eq!(Outer::read(&[0x00; 64]), None);
    }
}
