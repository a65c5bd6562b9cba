//! The queues of one TUN: what one lane gives up of its offloads, none asks for again.

use std::sync::Arc;

use warren::io::kernel::{Kernel, Linux, bell};
use warren::io::tun::{TunOffloads, TunQueues};
use warren::io::udp::{Receiver, Sender, UdpOptions, UdpSocket};

use crate::lab::netns::Netns;

const NAME: &str = "warren0";
const BOTH: TunOffloads = TunOffloads { tcp: true, udp: true };
const TCP: TunOffloads = TunOffloads { tcp: true, udp: false };
const UDP: TunOffloads = TunOffloads { tcp: false, udp: true };
const NEITHER: TunOffloads = TunOffloads { tcp: false, udp: false };

/// Two lanes of a device that is made for them.
fn lanes() -> [Linux; 2] {
    let queues = Arc::new(TunQueues::new(2));
    [0, 1].map(|lane| Linux {
        name: NAME.to_owned(),
        lane,
        tun: queues.open(NAME, lane, BOTH).expect("a queue"),
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
