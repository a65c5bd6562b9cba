//! The queues of one TUN: what one lane gives up of its offloads, none asks for again; and a flow has one of them.

use std::io::IoSlice;
use std::net::{Ipv4Addr, UdpSocket as UdpClient};
use std::sync::Arc;
use std::time::Duration;

use warren::io::clock;
use warren::io::kernel::{Kernel, Linux, bell};
use warren::io::tun::{READ_BYTES, TunOffloads, TunQueues};
use warren::io::udp::{Receiver, Sender, UdpOptions, UdpSocket};
use warren::packet::vnet::VNET_HDR_LEN;

use crate::lab::netns::Netns;

const NAME: &str = "warren0";
const BOTH: TunOffloads = TunOffloads { tcp: true, udp: true };
const TCP: TunOffloads = TunOffloads { tcp: true, udp: false };
const UDP: TunOffloads = TunOffloads { tcp: false, udp: true };
const NEITHER: TunOffloads = TunOffloads { tcp: false, udp: false };

/// Two lanes of a device that is made for them.
fn lanes() -> [Linux; 2] {
    let queues = Arc::new(TunQueues::new(2));
    [0, 1].map(|_| Linux {
        name: NAME.to_owned(),
        tun: queues.open(NAME, BOTH).expect("a queue"),
        queues: Arc::clone(&queues),
        wireguard: UdpSocket::bind(UdpOptions::default()).expect("a socket"),
        vxlan: None,
        vxlan_sources: Vec::new(),
        bell: Arc::new(bell().expect("a bell")),
        receiver: Receiver::default(),
        sender: Sender::default(),
    })
}

/// What the kernel says that the device does.
fn offloads(ns: &Netns) -> TunOffloads {
    let features = ns.run(&format!("ethtool -k {NAME}"));
    let on = |feature: &str| {
        let state = features.lines().find_map(|line| line.trim().strip_prefix(feature)?.strip_prefix(": "));
        state.unwrap_or_else(|| panic!("no {feature}: {features}")).starts_with("on")
    };
    TunOffloads { tcp: on("tx-tcp-segmentation"), udp: on("tx-udp-segmentation") }
}

#[test]
fn what_one_lane_has_given_up_no_lane_asks_for_again() {
    let ns = Netns::new("queues");
    ns.enter(|| {
        let [mut first, mut second] = lanes();
        assert_eq!(offloads(&ns), BOTH);
        first.limit_tun_offloads(UDP);
        assert_eq!(offloads(&ns), UDP);
        // The other lane has not been refused anything: it wants both.
        assert_eq!(second.reopen_tun(BOTH).expect("a queue"), UDP);
        assert_eq!(offloads(&ns), UDP);
        // Then it is refused the other kind.
        second.limit_tun_offloads(TCP);
        assert_eq!(offloads(&ns), NEITHER);
        ns.run(&format!("ip link del {NAME}"));
        for lane in [&mut second, &mut first] {
            assert_eq!(lane.reopen_tun(BOTH).expect("a queue"), NEITHER);
            assert_eq!(offloads(&ns), NEITHER);
        }
    });
}

#[test]
fn a_device_that_is_gone_has_refused_nothing() {
    let ns = Netns::new("queues");
    ns.enter(|| {
        let [mut first, mut second] = lanes();
        ns.run(&format!("ip link del {NAME}"));
        first.limit_tun_offloads(TCP);
        for lane in [&mut first, &mut second] {
            assert_eq!(lane.reopen_tun(BOTH).expect("a queue"), TCP);
            assert_eq!(offloads(&ns), TCP);
        }
    });
}

/// Flows that are watched.
const FLOWS: u16 = 32;
/// Ours, on the device.
const OURS: &str = "10.9.0.1";
/// What is routed to it.
const THEIRS: [u8; 4] = [10, 9, 0, 2];

/// The kernel leads a flow to the queue that was written to last, and forgets that after three seconds; lanes write
/// in a way that leaves nothing to forget.
#[test]
fn answers_never_move_a_flow_to_another_queue() {
    let ns = Netns::new("queues");
    ns.enter(|| {
        let mut lanes = lanes();
        ns.run(&format!("ip addr add {OURS}/24 dev {NAME}"));
        ns.run(&format!("ip link set {NAME} up"));
        let flows: Vec<UdpClient> = (0..FLOWS).map(|flow| client(5000 + flow)).collect();
        let before = seen_by(&mut lanes, &flows);
        for lane in [0, 1] {
            assert!(
                before.iter().filter(|seen| **seen == lane).count() > 2,
                "a hash spreads flows: {before:?}"
            );
        }
        // Each lane answers each flow: one of the two is not where it is.
        for (lane, wait) in [(0, 0), (1, 0), (0, 5000), (1, 5000)] {
            for flow in &flows {
                let builder = etherparse::PacketBuilder::ipv4(THEIRS, [10, 9, 0, 1], 64);
                let port = flow.local_addr().expect("an address").port();
                let mut frame = vec![0; VNET_HDR_LEN];
                builder.udp(port, port).write(&mut frame, b"answer").expect("a packet");
                lanes[lane].write_tun(&[IoSlice::new(&frame)]).expect("a frame is written");
                let length = flow.recv(&mut [0; 64]).expect("the answer arrives");
                assert_eq!(length, b"answer".len());
            }
            std::thread::sleep(Duration::from_millis(wait));
            assert_eq!(seen_by(&mut lanes, &flows), before, "after answers by lane {lane}, {wait} ms later");
        }
    });
}

/// Its port is the other side's too.
fn client(port: u16) -> UdpClient {
    let socket = UdpClient::bind((OURS, port)).expect("bind");
    socket.connect((Ipv4Addr::from(THEIRS), port)).expect("a route");
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("set a timeout");
    socket
}

/// Which lane a datagram of each flow comes by.
fn seen_by(lanes: &mut [Linux; 2], flows: &[UdpClient]) -> Vec<usize> {
    let mut frame = vec![0; READ_BYTES];
    let lane_of = |flow: &UdpClient| {
        flow.send(b"question").expect("send");
        let port = flow.local_addr().expect("an address").port();
        let deadline = clock::now() + Duration::from_secs(5);
        while clock::now() < deadline {
            for (lane, kernel) in lanes.iter_mut().enumerate() {
                // What the kernel says by itself, of neighbours and groups, is none of ours.
                if let Ok(length) = kernel.read_tun(&mut frame)
                    && length == VNET_HDR_LEN + 28 + b"question".len()
                    && frame[VNET_HDR_LEN + 20..][..2] == port.to_be_bytes()
                {
                    return lane;
                }
            }
            std::thread::yield_now();
        }
        panic!("port {port}: nothing came");
    };
    flows.iter().map(lane_of).collect()
}
