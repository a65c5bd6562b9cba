//! A Service whose endpoint is on the client's own node: what its super-packets are cut into for the way back into the
//! TUN is more than one batch holds, and none of it is lost.

use std::io::{IoSlice, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use super::{SOON, pods, service, services_with, vips};
use crate::lab::agent::Mesh;
use crate::lab::service::{PORT, TARGET};
use crate::lab::traffic::{Checked, connect, pattern, udp_socket};
use crate::lab::{Underlay, wait_for};

/// Bytes that wait for the agent at once, several times what a turn takes of the largest packets that there are; and
/// how often.
const BURST: u64 = 4 << 20;
const BURSTS: u64 = 8;
/// Of the sockets' buffers.
const ROOM: usize = 16 << 20;
/// Bytes of a datagram, of which this many fit into one send.
const PAYLOAD: usize = 400;
/// The most that a kernel cuts one send into: since Linux 6.9, and before (UDP_MAX_SEGMENTS in linux/udp.h).
const SEGMENTS: [usize; 2] = [128, 64];
/// Sends that the agent finds waiting, as many as it takes in one turn.
const SENDS: usize = 16;

/// Nothing may be joined: every super-packet is cut. A connection whose window is open sends far more at once than a
/// turn takes.
#[test]
fn tcp_without_joining() {
    let mesh = local_service(&["--no-coalescing"]);
    let (node, agent) = (&mesh.lab.nodes[0], &mesh.agents[0]);
    for family in [0, 1] {
        let here = SocketAddr::new(node.inner(11)[family], TARGET);
        let listener = node.pods[1].enter(|| {
            let socket = Socket::new(Domain::for_address(here), Type::STREAM, None).expect("a socket");
            setsockopt(&socket, sockopt::RcvBufForce, &ROOM).expect("room for a burst");
            socket.bind(&here.into()).unwrap_or_else(|e| panic!("bind {here}: {e}"));
            socket.listen(8).expect("listen");
            TcpListener::from(socket)
        });
        let vip = SocketAddr::new(vips(1)[family], PORT);
        let client = || connect(&node.pods[0], node.inner(10)[family], vip).ok();
        let mut client = wait_for("the Service is known", SOON, client);
        setsockopt(&client, sockopt::SndBufForce, &ROOM).expect("room for a burst");
        // Others look at delays, and open the window more slowly.
        setsockopt(&client, sockopt::TcpCongestion, &"reno".into()).expect("every kernel has it");
        client.set_write_timeout(Some(SOON)).expect("set a timeout");
        let mut server = Checked::new(listener.accept().expect("a connection").0);
        let before = [agent.counted("tun-reads")[0], agent.counted("tun-writes")[0]];
        for burst in 0..BURSTS {
            let bytes = pattern(burst * BURST, BURST as usize);
            agent.frozen(|| client.write_all(&bytes).expect("send a burst"));
            server.read_until((burst + 1) * BURST, SOON);
        }
        let [reads, writes] =
            [agent.counted("tun-reads")[0] - before[0], agent.counted("tun-writes")[0] - before[1]];
        println!("IPv{}: {reads} reads, {writes} writes", [4, 6][family]);
        assert!(
            writes > BURSTS * BURST / 1400,
            "not cut, this shows nothing: {reads} reads, {writes} writes"
        );
        assert_eq!(agent.dropped("no-buffer"), 0, "IPv{}: {writes} writes", [4, 6][family]);
    }
}

#[test]
fn udp_without_joining() {
    udp_bursts(&["--no-coalescing"]);
}

/// A send of more than 64 datagrams is more than the TUN takes in one piece.
#[test]
fn udp() {
    udp_bursts(&[]);
}

fn udp_bursts(more: &[&str]) {
    let mesh = local_service(more);
    let node = &mesh.lab.nodes[0];
    for family in [0, 1] {
        let server = SocketAddr::new(node.inner(11)[family], TARGET);
        let server = node.pods[1].enter(|| UdpSocket::bind(server).expect("bind a UDP socket"));
        setsockopt(&server, sockopt::RcvBufForce, &ROOM).expect("room for all of it");
        let client =
            udp_socket(&node.pods[0], node.inner(10)[family], SocketAddr::new(vips(1)[family], PORT));
        wait_for("the Service is known", SOON, || {
            let _ = client.send(&[0]);
            server.set_read_timeout(Some(Duration::from_millis(50))).expect("set a timeout");
            server.recv(&mut [0]).ok()
        });
        while server.recv(&mut [0]).is_ok() {}
        server.set_read_timeout(Some(SOON)).expect("set a timeout");
        let sent = mesh.agents[0].frozen(|| (0..SENDS).map(|send| send_run(&client, send)).sum());
        println!("{more:?}, IPv{}: {sent} datagrams in {SENDS} sends", [4, 6][family]);
        let mut bytes = [0; PAYLOAD + 1];
        for number in 0..sent {
            let mut receive = || {
                server.recv(&mut bytes).unwrap_or_else(|e| {
                    let dropped = mesh.agents[0].dropped("no-buffer");
                    panic!("{more:?}: of {sent} came {number}, dropped for want of room {dropped}: {e}")
                })
            };
            // A late one of those that asked for the Service has one byte.
            let length = std::iter::repeat_with(&mut receive).find(|length| *length != 1);
            assert_eq!(length, Some(PAYLOAD), "{more:?}: datagram {number}");
            let came = u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"));
            assert_eq!(came as usize, number, "{more:?}: another datagram");
        }
    }
    assert_eq!(mesh.agents[0].dropped("no-buffer"), 0, "{more:?}");
}

/// One send of as many numbered datagrams as the kernel cuts; how many.
fn send_run(from: &UdpSocket, send: usize) -> usize {
    let sent = SEGMENTS.into_iter().find(|segments| {
        let numbers = send * segments..(send + 1) * segments;
        let datagram = |number: usize| [&(number as u32).to_be_bytes()[..], &[0; PAYLOAD - 4]].concat();
        let bytes: Vec<u8> = numbers.flat_map(datagram).collect();
        let cut = [ControlMessage::UdpGsoSegments(&(PAYLOAD as u16))];
        // An older kernel refuses the larger number.
        sendmsg::<()>(from.as_raw_fd(), &[IoSlice::new(&bytes)], &cut, MsgFlags::empty(), None).is_ok()
    });
    sent.unwrap_or_else(|| panic!("the kernel sends neither of {SEGMENTS:?} datagrams at once"))
}

/// One node, with a client and the only endpoint.
fn local_service(more: &[&str]) -> Mesh {
    let mesh = services_with(1, "vxlan", Underlay::V4, more);
    service("near", 1, pods(&mesh, &[(1, 11)])).write(&mesh.lab);
    mesh
}
