//! UDP over IPv4 without a checksum, which RFC 768 allows: it has none on the other side either, straight and
//! through a Service, alone and in a burst that could be joined.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use super::{SOON, pods, service, services, vips};
use crate::lab::raw::Raw;
use crate::lab::service::{PORT, TARGET};
use crate::lab::{Underlay, wait_for};

const UDP: u8 = 17;

fn datagram(from: u16, port: u16, number: u8) -> Vec<u8> {
    let data = [number; 500];
    let length = 8 + data.len() as u16;
    [&from.to_be_bytes()[..], &port.to_be_bytes(), &length.to_be_bytes(), &[0, 0], &data].concat()
}

#[test]
fn a_checksum_of_zero_stays_zero() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        let [near, far] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        service("far", 1, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
        let server: IpAddr = far.inner(10)[0];
        let client = Raw::new(&near.pods[0], near.inner(10)[0], UDP);
        let wire = Raw::new(&far.pods[0], server, UDP);
        let socket = far.pods[0].enter(|| UdpSocket::bind((server, TARGET)).expect("bind a UDP socket"));
        socket.set_read_timeout(Some(SOON)).expect("set a timeout");
        // From two ports: one that reaches the endpoint by both ways would be given another.
        for (from, to, port) in [(42_000_u16, server, TARGET), (42_001, vips(1)[0], PORT)] {
            let what = format!("{encap}, by {to}");
            let send =
                |number| client.send(to, &datagram(from, port, number)).expect("send without a checksum");
            let heard = |within| wire.hear(within, |came| came.payload[..2] == from.to_be_bytes());
            // Until the Service is known.
            wait_for(&what, SOON, || {
                send(0);
                heard(Duration::from_millis(100))
            });
            (1..=20).for_each(send);
            let mut numbers = Vec::new();
            while numbers.last() != Some(&20) {
                let came = heard(SOON).unwrap_or_else(|| panic!("{what}: of 20 came {numbers:?}"));
                assert_eq!(came.payload.len(), 508, "{what}");
                assert_eq!(came.payload[6..8], [0, 0], "{what}: the checksum");
                assert_eq!(came.payload[2..4], TARGET.to_be_bytes(), "{what}: the port");
                assert!(came.payload[8..].iter().all(|byte| *byte == came.payload[8]), "{what}: the data");
                numbers.push(came.payload[8]);
            }
            // And the kernel there has believed it.
            let mut data = [0; 600];
            while data[0] != 20 {
                assert_eq!(socket.recv(&mut data).unwrap_or_else(|e| panic!("{what}: {e}")), 500);
            }
        }
    }
}
