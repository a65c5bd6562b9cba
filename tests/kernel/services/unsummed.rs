//! UDP over IPv4 without a checksum, which RFC 768 allows: it has none on the other side either, straight and
//! through a Service, alone and in a burst in which others, that have one, are joined.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

use super::{SOON, pods, service, services, vips};
use crate::lab::joined::{self, Pieces};
use crate::lab::raw::Raw;
use crate::lab::service::{PORT, TARGET};
use crate::lab::{Underlay, wait_for};

const UDP: u8 = 17;
/// Datagrams of a burst.
const BURST: u8 = 20;
/// Bytes of each; of these, `lab::joined` sees four and more in one piece.
const DATA: usize = 500;

fn datagram(from: u16, port: u16, number: u8) -> Vec<u8> {
    let data = [number; DATA];
    let length = 8 + data.len() as u16;
    [&from.to_be_bytes()[..], &port.to_be_bytes(), &length.to_be_bytes(), &[0, 0], &data].concat()
}

/// The same with its checksum (RFC 768).
fn summed(source: Ipv4Addr, to: Ipv4Addr, mut datagram: Vec<u8>) -> Vec<u8> {
    let length = datagram.len() as u16;
    let pseudo = [&source.octets()[..], &to.octets(), &[0, UDP], &length.to_be_bytes()].concat();
    let words = pseudo.chunks(2).chain(datagram.chunks(2));
    let sum = words.fold(0_u32, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
    let folded = (sum & 0xffff) + (sum >> 16);
    let sum = !((folded & 0xffff) + (folded >> 16)) as u16;
    // That would have to be written as ffff.
    assert_ne!(sum, 0);
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    datagram
}

#[test]
fn a_checksum_of_zero_stays_zero() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        let [near, far] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        service("far", 1, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        joined::watch(far);
        let server: IpAddr = far.inner(10)[0];
        let client = Raw::new(&near.pods[0], near.inner(10)[0], UDP);
        let wire = Raw::new(&far.pods[0], server, UDP);
        let socket = far.pods[0].enter(|| UdpSocket::bind((server, TARGET)).expect("bind a UDP socket"));
        socket.set_read_timeout(Some(SOON)).expect("set a timeout");
        // From two ports: one that reaches the endpoint by both ways would be given another.
        for (from, to, port) in [(42_000_u16, server, TARGET), (42_001, vips(1)[0], PORT)] {
            let what = format!("{encap}, by {to}");
            let send = |bytes: &[u8]| client.send(to, bytes).expect("send what was made by hand");
            let heard = |within| wire.hear(within, |came| came.payload[..2] == from.to_be_bytes());
            // Until the Service is known.
            wait_for(&what, SOON, || {
                send(&datagram(from, port, 0));
                heard(Duration::from_millis(100))
            });
            let before = joined::seen(far, Pieces::Udp);
            let expected: Vec<u8> = (1..=BURST).collect();
            let plain: Vec<Vec<u8>> = expected.iter().map(|n| datagram(from, port, *n)).collect();
            mesh.agents[0].frozen(|| plain.iter().for_each(|bytes| send(bytes)));
            let mut numbers = Vec::new();
            while numbers.len() < expected.len() {
                let came = heard(SOON).unwrap_or_else(|| panic!("{what}: of {BURST} came {numbers:?}"));
                assert_eq!(came.payload.len(), 8 + DATA, "{what}");
                assert_eq!(came.payload[6..8], [0, 0], "{what}: the checksum");
                assert_eq!(came.payload[2..4], TARGET.to_be_bytes(), "{what}: the port");
                assert!(came.payload[8..].iter().all(|byte| *byte == came.payload[8]), "{what}: the data");
                numbers.extend((came.payload[8] != 0).then_some(came.payload[8]));
            }
            // A sender that changes processors overtakes itself.
            numbers.sort_unstable();
            assert_eq!(numbers, expected, "{what}: on the wire");
            // And the kernel there has believed it.
            let believed = || {
                let (mut data, mut numbers) = ([0; DATA + 1], Vec::new());
                while numbers.len() < expected.len() {
                    let length =
                        socket.recv(&mut data).unwrap_or_else(|e| panic!("{what}: {e}: {numbers:?}"));
                    assert_eq!(length, DATA, "{what}");
                    numbers.extend((data[0] != 0).then_some(data[0]));
                }
                numbers.sort_unstable();
                numbers
            };
            assert_eq!(believed(), expected, "{what}: in the socket");
            assert_eq!(joined::seen(far, Pieces::Udp), before, "{what}: joined without a checksum");
            // What makes that say something: the same burst with checksums is joined.
            let (IpAddr::V4(source), IpAddr::V4(target)) = (near.inner(10)[0], to) else {
                panic!("IPv4 was meant")
            };
            let sums: Vec<Vec<u8>> =
                plain.iter().map(|bytes| summed(source, target, bytes.clone())).collect();
            mesh.agents[0].frozen(|| sums.iter().for_each(|bytes| send(bytes)));
            assert_eq!(believed(), expected, "{what}: with checksums");
            assert!(joined::seen(far, Pieces::Udp) > before, "{what}: nothing is joined with checksums");
            // Those are in the way of the next round.
            while heard(Duration::from_millis(50)).is_some() {}
        }
    }
}
