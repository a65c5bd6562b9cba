//! The MTU is not a knob: what does not fit is told so, TCP never sends it, and small underlays still carry IPv6.

use std::net::SocketAddr;

use socket2::SockRef;

use crate::lab::agent::Mesh;
use crate::lab::probe::too_big;
use crate::lab::traffic::{Echo, connect, tcp_bulk};
use crate::lab::{Lab, Underlay};

/// The inner MTU on an underlay of 1500: IPv4 20 or IPv6 40, UDP 8, WireGuard 32 or VXLAN 8 + Ethernet 14.
const INNER: [(&str, Underlay, u32); 4] = [
    ("wireguard", Underlay::V4, 1440),
    ("wireguard", Underlay::V6, 1420),
    ("vxlan", Underlay::V4, 1450),
    ("vxlan", Underlay::V6, 1430),
];

#[test]
fn a_packet_too_big_gets_its_icmp() {
    for (encap, underlay, inner) in INNER {
        let mesh = Mesh::start(Lab::new(2, underlay, 1500), &["--encap", encap]);
        // Pods may get less than fits (an underlay that may turn IPv6), never more.
        assert!(mesh.agents[0].pod_mtu() <= inner, "{encap} {underlay:?}: {}", mesh.agents[0].pod_mtu());
        mesh.lab.nodes[0].set_pod_mtu(1500);
        for (family, largest) in [(0, 1500 - 28), (1, 1500 - 48)] {
            let told = too_big(mesh.pod(0), mesh.pod(1), family, largest);
            let told = told.unwrap_or_else(|| panic!("{encap} {underlay:?}: an ICMP error, family {family}"));
            assert!(told <= inner && told > 1300, "{encap} {underlay:?}, family {family}: {told}");
        }
    }
}

#[test]
fn tcp_is_clamped_even_where_icmp_is_lost() {
    for (encap, underlay, inner) in INNER {
        let mesh = Mesh::start(Lab::new(2, underlay, 1500), &["--encap", encap]);
        for node in &mesh.lab.nodes {
            node.set_pod_mtu(1500);
            // A pod whose firewall drops every ICMP error: path MTU discovery cannot help.
            node.pods[0].run_all(
                "nft add table inet deaf
                 nft add chain inet deaf in { type filter hook input priority 0 ; }
                 nft add rule inet deaf in icmp type destination-unreachable drop
                 nft add rule inet deaf in icmpv6 type packet-too-big drop",
            );
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let echo = Echo::start(mesh.pod(to));
            for (family, headers) in [(0, 40), (1, 60)] {
                let (pod, target) = (mesh.pod(from), mesh.pod(to).addresses[family]);
                let target = SocketAddr::new(target, echo.port);
                let stream = connect(pod.ns, pod.addresses[family], target).expect("connect");
                let mss = SockRef::from(&stream).tcp_mss().expect("read the MSS");
                // The socket tells the MSS without TCP's own options, 12 bytes of timestamps (RFC 7323).
                assert!(mss <= inner - headers, "{encap} {underlay:?}, family {family}: MSS {mss}");
                assert!(mss > 1200, "{encap} {underlay:?}, family {family}: MSS {mss}");
                tcp_bulk(pod.ns, pod.addresses[family], target, 4 << 20);
            }
        }
    }
}

#[test]
fn a_jumbo_underlay_carries_jumbo_pods() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = Mesh::start(Lab::new(2, Underlay::V4, 9000), &["--encap", encap]);
        assert!(mesh.agents[0].pod_mtu() > 8900, "{encap}: {}", mesh.agents[0].pod_mtu());
        mesh.exchange(0, 1);
    }
}

/// RFC 8200 section 5: IPv6 needs 1280 everywhere. The outer packets are fragmented on such an underlay.
#[test]
fn a_small_underlay_still_carries_ipv6() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = Mesh::start(Lab::new(2, Underlay::V4, 1300), &["--encap", encap]);
        assert!(mesh.agents[0].pod_mtu() >= 1280, "{encap}: {}", mesh.agents[0].pod_mtu());
        mesh.exchange(0, 1);
    }
}
