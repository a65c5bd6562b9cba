//! Real packets through the node: what keeps its address, what is masqueraded, what never leaves in
//! clear, and where replies go. The test itself is the program behind the tunnel device.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use warren::io::host::{self, HostConfig, HostNetwork};

use crate::stage::{Namespace, Node, config, ip, sh, shell};

/// Long enough for a packet that comes, short enough to wait for one that must not.
pub(crate) const SOON: Duration = Duration::from_millis(1500);
pub(crate) const NEVER: Duration = Duration::from_millis(400);

#[test]
fn pods_keep_their_address_in_the_cluster_and_lose_it_to_the_world() {
    let stage = Stage::new(true);
    // What the `bridge` plugin does with ipMasq: everything that leaves the bridge.
    stage.node.0.enter(|| {
        sh("nft add table inet cni");
        sh("nft 'add chain inet cni post { type nat hook postrouting priority srcnat; }'");
        sh("nft add rule inet cni post ip saddr 10.244.1.0/24 ip daddr != 10.244.1.0/24 masquerade");
        sh("nft add rule inet cni post ip6 saddr fd00:1::/64 ip6 daddr != fd00:1::/64 masquerade");
    });
    stage.apply(&config());
    for family in FAMILIES {
        let pod = stage.pods[0].udp(family.pods[0], 0);
        let world = stage.world.udp(family.world, 7000);
        pod.send_to(b"out", (ip(family.world), 7000)).unwrap();
        let (text, from) = receive(&world).expect("a pod reaches the world");
        assert_eq!((text.as_slice(), from.ip()), (b"out".as_slice(), ip(family.node)), "masqueraded");
        // And the answer finds its way back.
        world.send_to(b"back", from).unwrap();
        assert_eq!(receive(&pod).expect("the world's answer").0, b"back");

        pod.send_to(b"over", (ip(family.remote_pod), 7000)).unwrap();
        let packet = stage.next_in_tunnel(SOON).expect("a pod's packet to another node's pod");
        assert_eq!((packet.from.ip(), packet.to.ip()), (ip(family.pods[0]), ip(family.remote_pod)));
    }
}

#[test]
fn without_masquerade_pods_keep_their_address_everywhere() {
    let stage = Stage::new(true);
    stage.apply(&HostConfig { masquerade: false, ..config() });
    for family in FAMILIES {
        let pod = stage.pods[0].udp(family.pods[0], 0);
        let world = stage.world.udp(family.world, 7000);
        pod.send_to(b"out", (ip(family.world), 7000)).unwrap();
        assert_eq!(receive(&world).unwrap().1.ip(), ip(family.pods[0]));
    }
}

#[test]
fn cluster_packets_do_not_leave_in_clear() {
    let stage = Stage::new(true);
    for encrypted in [false, true] {
        stage.apply(&HostConfig { encrypted, ..config() });
        stage.node.0.enter(|| sh("ip route del 10.244.0.0/16; ip -6 route del fd00::/16"));
        for family in FAMILIES {
            // The default route now leads to an owner of that address outside.
            let outside = stage.world.udp(family.remote_pod, 7000);
            let pod = stage.pods[0].udp(family.pods[0], 0);
            let host = stage.node.0.udp(family.node, 0);
            for sender in [&pod, &host] {
                // The host's own socket is told so (EPERM); a pod's packet just disappears.
                let _ = sender.send_to(b"secret", (ip(family.remote_pod), 7000));
                let arrived = receive_within(&outside, NEVER).is_some();
                assert_eq!(arrived, !encrypted, "{}, encrypted {encrypted}", family.remote_pod);
            }
        }
    }
}

#[test]
fn cluster_packets_do_not_arrive_in_clear() {
    // Outside owns an address of another node's pod: with a filter of 2 the default route to it is enough.
    for (encrypted, rp_filter) in [(false, 0), (true, 0), (true, 2)] {
        let stage = Stage::new(true);
        stage.node.0.enter(|| {
            sh(&format!("sysctl -w net.ipv4.conf.all.rp_filter={rp_filter}"));
            sh(&format!("sysctl -w net.ipv4.conf.eth0.rp_filter={rp_filter}"));
        });
        stage.apply(&HostConfig { encrypted, services: false, ..config() });
        stage.world.enter(|| {
            sh("ip route add 10.244.1.0/24 via 192.0.2.1; ip route add fd00:1::/64 via 2001:db8::1")
        });
        for family in FAMILIES {
            let forger = stage.world.udp(family.remote_pod, 0);
            let honest = stage.world.udp(family.world, 0);
            let pod = stage.pods[0].udp(family.pods[0], 7000);
            let host = stage.node.0.udp(family.node, 7000);
            honest.send_to(b"world", (ip(family.pods[0]), 7000)).unwrap();
            assert_eq!(receive(&pod).expect("the world may talk to pods").0, b"world");
            forger.send_to(b"forged", (ip(family.pods[0]), 7000)).unwrap();
            let case = format!("{}, {encrypted} {rp_filter}", family.remote_pod);
            assert_eq!(receive_within(&pod, NEVER).is_some(), !encrypted, "to a pod: {case}");
            // Pods of a node that does not masquerade come to this one's own address as themselves.
            forger.send_to(b"honest", (ip(family.node), 7000)).unwrap();
            assert!(receive_within(&host, SOON).is_some(), "to the node: {case}");
            // What comes out of the tunnel and from the pod next door is as welcome as ever.
            stage.inject(
                SocketAddr::new(ip(family.remote_pod), 5000),
                SocketAddr::new(ip(family.pods[0]), 7000),
            );
            receive(&pod).expect("out of the tunnel");
            let neighbour = stage.pods[1].udp(family.pods[1], 0);
            neighbour.send_to(b"near", (ip(family.pods[0]), 7000)).unwrap();
            assert_eq!(receive(&pod).expect("from this node").0, b"near");
        }
        let chain = stage.node.0.enter(|| sh("nft list chain inet warren spoofed"));
        assert_eq!(chain.matches("counter packets").count(), if encrypted { 2 } else { 0 }, "{chain}");
        assert!(!chain.contains("counter packets 0 "), "{chain}");
    }
}

#[test]
fn replies_to_what_came_out_of_the_tunnel_go_back_into_it() {
    let stage = Stage::new(true);
    stage.apply(&config());
    for family in FAMILIES {
        let client = SocketAddr::new(ip(family.client), 5000);
        // A pod's reply to an address that no route leads into the tunnel, and the host's own.
        for (place, address) in [(&stage.pods[0], family.pods[0]), (&stage.node.0, family.node_address)] {
            let server = place.udp(address, 7000);
            stage.inject(client, SocketAddr::new(ip(address), 7000));
            let (_, from) = receive(&server).expect("a packet out of the tunnel");
            assert_eq!(from, client);
            server.send_to(b"reply", from).unwrap();
            let reply = stage
                .next_in_tunnel(SOON)
                .unwrap_or_else(|| panic!("{address}'s reply is not in the tunnel"));
            assert_eq!((reply.from, reply.to), (SocketAddr::new(ip(address), 7000), client));
        }
    }
}

#[test]
fn replies_go_into_the_tunnel_past_a_strict_filter_that_looks_at_marks() {
    let stage = Stage::new(true);
    // wg-quick's, for all devices; strict is many distributions' default.
    stage.node.0.enter(|| {
        sh("sysctl -w net.ipv4.conf.all.src_valid_mark=1 net.ipv4.conf.cbr0.rp_filter=1");
        sh("sysctl -w net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1");
    });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sysctl");
    stage.node.run(async {
        let mut network = HostNetwork::open(Some(file.clone())).unwrap();
        network.apply(&config()).await.unwrap();
        assert!(network.apply(&config()).await.unwrap().is_empty());
    });
    let family = &FAMILIES[0];
    // Somewhere in the world, and (what Services do) the pod next door.
    for client in [family.client, family.pods[1]] {
        let client = SocketAddr::new(ip(client), 5000);
        let server = stage.pods[0].udp(family.pods[0], 7000);
        stage.inject(client, server.local_addr().unwrap());
        assert_eq!(receive(&server).expect("a packet out of the tunnel").1, client);
        server.send_to(b"reply", client).unwrap();
        let reply = stage.next_in_tunnel(SOON).expect("the pod's reply passes the filter");
        assert_eq!((reply.from, reply.to), (server.local_addr().unwrap(), client));
    }
    stage.node.run(async {
        assert!(sh("sysctl net.ipv4.conf.eth0.rp_filter").contains("= 1"), "no pods there");
        host::cleanup("nothing0", Some(&file)).await.unwrap();
        assert!(sh("sysctl net.ipv4.conf.cbr0.rp_filter").contains("= 1"));
    });
}

#[test]
fn same_node_replies_come_up_from_the_bridge_when_services_need_them() {
    for (services, br_netfilter) in [(true, 1), (true, 0), (false, 1)] {
        let stage = Stage::new(false);
        stage.node.0.enter(|| {
            for family in ["ip", "ip6"] {
                // Absent where the kernel has no br_netfilter: then it is like 0.
                shell(&format!("sysctl -w net.bridge.bridge-nf-call-{family}tables={br_netfilter}"));
            }
        });
        stage.apply(&HostConfig { services, ..config() });
        for family in FAMILIES {
            let client = stage.pods[0].udp(family.pods[0], 5000);
            let server = stage.pods[1].udp(family.pods[1], 7000);
            let [client_at, server_at] = [client.local_addr().unwrap(), server.local_addr().unwrap()];
            // The loop has translated a Service to the pod next door: the client's address stays.
            stage.inject(client_at, server_at);
            assert_eq!(receive(&server).expect("the loop's packet").1, client_at);
            server.send_to(b"reply", client_at).unwrap();
            if services {
                let reply = stage.next_in_tunnel(SOON).expect("the reply comes up");
                assert_eq!((reply.from, reply.to), (server_at, client_at));
            } else {
                assert_eq!(receive(&client).expect("the reply stays on the bridge").1, server_at);
            }
            // Pod to pod directly works either way, and no redirect tells the pod otherwise.
            let other = stage.pods[0].udp(family.pods[0], 5001);
            other.send_to(b"direct", server_at).unwrap();
            let (text, from) = receive(&server).expect("pod to pod on one node");
            assert_eq!((text.as_slice(), from), (b"direct".as_slice(), other.local_addr().unwrap()));
            server.send_to(b"direct reply", from).unwrap();
            assert_eq!(receive(&other).expect("and back").0, b"direct reply");
        }
        let redirected = stage.pods[1].enter(|| shell("ip route show cache; ip -6 route show cache"));
        assert_eq!(redirected, "", "the kernel redirected a pod");
    }
}

#[test]
fn a_dropping_forward_policy_does_not_stop_pods() {
    let stage = Stage::new(true);
    // Both shapes of our rules have to let it through, one after the other.
    stage.node.0.enter(|| {
        sh("iptables -P FORWARD DROP; ip6tables -P FORWARD DROP");
        sh("nft add table inet firewall");
        sh("nft 'add chain inet firewall fw { type filter hook forward priority 10; policy drop; }'");
    });
    stage.apply(&config());
    stage
        .world
        .enter(|| sh("ip route add 10.244.1.0/24 via 192.0.2.1; ip route add fd00:1::/64 via 2001:db8::1"));
    for family in FAMILIES {
        let pod = stage.pods[0].udp(family.pods[0], 7000);
        let world = stage.world.udp(family.world, 7000);
        pod.send_to(b"out", (ip(family.world), 7000)).unwrap();
        let (_, from) = receive(&world).expect("to the world");
        world.send_to(b"back", from).unwrap();
        receive(&pod).expect("and back");
        pod.send_to(b"over", (ip(family.remote_pod), 7000)).unwrap();
        stage.next_in_tunnel(SOON).expect("into the tunnel");
        stage.inject(SocketAddr::new(ip(family.remote_pod), 5000), SocketAddr::new(ip(family.pods[0]), 7000));
        receive(&pod).expect("out of the tunnel");
        // What the firewall closes stays closed: the neighbourhood does not get at pods.
        let closed = stage.pods[0].udp(family.pods[0], 7001);
        world.send_to(b"uninvited", (ip(family.pods[0]), 7001)).unwrap();
        assert!(receive_within(&closed, NEVER).is_none(), "a pod was opened to the neighbourhood");
    }
    stage.node.run(async {
        host::cleanup("nothing0", None).await.unwrap();
    });
    let pod = stage.pods[0].udp(FAMILIES[0].pods[0], 0);
    let world = stage.world.udp(FAMILIES[0].world, 7001);
    pod.send_to(b"out", (ip(FAMILIES[0].world), 7001)).unwrap();
    assert!(receive_within(&world, NEVER).is_none(), "the policy does drop without us");
}

// ---- the stage: a node with two pods and a neighbour outside -----------------------------------------

pub(crate) struct Family {
    pub(crate) pods: [&'static str; 2],
    /// The node on its uplink, and on the tunnel device.
    pub(crate) node: &'static str,
    pub(crate) node_address: &'static str,
    /// Outside: on the link, and an owner of an address that belongs to another node's pod.
    pub(crate) world: &'static str,
    pub(crate) remote_pod: &'static str,
    /// Somewhere behind the tunnel, in no range of the cluster.
    pub(crate) client: &'static str,
}

pub(crate) const FAMILIES: [Family; 2] = [
    Family {
        pods: ["10.244.1.5", "10.244.1.6"],
        node: "192.0.2.1",
        node_address: "10.244.1.0",
        world: "192.0.2.2",
        remote_pod: "10.244.2.9",
        client: "203.0.113.7",
    },
    Family {
        pods: ["fd00:1::5", "fd00:1::6"],
        node: "2001:db8::1",
        node_address: "fd00:1::",
        world: "2001:db8::2",
        remote_pod: "fd00:2::9",
        client: "2001:db8:77::7",
    },
];

pub(crate) struct Stage {
    pub(crate) node: Node,
    pub(crate) pods: [Namespace; 2],
    pub(crate) world: Namespace,
    tun: tun::Device,
}

/// A UDP packet as it stands in the tunnel device.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
}

impl Stage {
    pub(crate) fn new(uplink: bool) -> Self {
        let stage_node = Node::new();
        let node = &stage_node.0.name;
        let pods = [Namespace::new(), Namespace::new()];
        for (number, pod) in pods.iter().enumerate() {
            let [four, six] = [FAMILIES[0].pods[number], FAMILIES[1].pods[number]];
            sh(&format!("ip -n {node} link add pod{number} type veth peer name eth0 netns {}", pod.name));
            sh(&format!("ip -n {node} link set pod{number} master cbr0 up"));
            pod.enter(|| {
                sh(&format!("ip addr add {four}/24 dev eth0; ip addr add {six}/64 dev eth0 nodad"));
                sh("ip link set lo up; ip link set eth0 up");
                sh("ip route add default via 10.244.1.1; ip route add default via fd00:1::1");
            });
        }
        let world = Namespace::new();
        sh(&format!("ip -n {node} link add eth0 type veth peer name eth0 netns {}", world.name));
        world.enter(|| {
            sh("ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8::2/64 dev eth0 nodad");
            sh("ip addr add 10.244.2.9/32 dev lo; ip addr add fd00:2::9/128 dev lo nodad");
            sh("ip link set lo up; ip link set eth0 up");
            sh("ip route add default via 192.0.2.1; ip route add default via 2001:db8::1");
        });
        let tun = stage_node.0.enter(|| {
            sh("ip addr add 192.0.2.1/24 dev eth0; ip addr add 2001:db8::1/64 dev eth0 nodad");
            sh("ip link set eth0 up");
            if uplink {
                sh("ip route add default via 192.0.2.2; ip route add default via 2001:db8::2");
            }
            let mut wanted = tun::Configuration::default();
            wanted.tun_name("warren0").platform_config(|config| {
                config.ensure_root_privileges(false);
            });
            tun::create(&wanted).unwrap()
        });
        Self { node: stage_node, pods, world, tun }
    }

    pub(crate) fn apply(&self, config: &HostConfig) {
        self.node.run(async {
            HostNetwork::open(None).unwrap().apply(config).await.unwrap();
        });
    }

    /// The next UDP packet that the node sends into the tunnel.
    pub(crate) fn next_in_tunnel(&self, within: Duration) -> Option<Packet> {
        let mut buffer = [0; 2048];
        // What else comes (a multicast report of a socket) is read over; it is never much.
        for _ in 0..32 {
            let length = self.tun.recv_timeout(&mut buffer, within).ok()?;
            if let Some(packet) = parse(&buffer[..length]) {
                return Some(packet);
            }
        }
        None
    }

    pub(crate) fn inject(&self, from: SocketAddr, to: SocketAddr) {
        let mut bytes = Vec::new();
        let builder = match (from.ip(), to.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => PacketBuilder::ipv4(a.octets(), b.octets(), 63),
            (IpAddr::V6(a), IpAddr::V6(b)) => PacketBuilder::ipv6(a.octets(), b.octets(), 63),
            mixed => panic!("two families in one packet: {mixed:?}"),
        };
        builder.udp(from.port(), to.port()).write(&mut bytes, b"hello").unwrap();
        assert_eq!(self.tun.send(&bytes).unwrap(), bytes.len());
    }
}

fn parse(bytes: &[u8]) -> Option<Packet> {
    let packet = SlicedPacket::from_ip(bytes).ok()?;
    let (from, to) = match packet.net? {
        NetSlice::Ipv4(four) => {
            (four.header().source_addr().into(), IpAddr::V4(four.header().destination_addr()))
        }
        NetSlice::Ipv6(six) => {
            (six.header().source_addr().into(), IpAddr::V6(six.header().destination_addr()))
        }
        NetSlice::Arp(_) => return None,
    };
    let TransportSlice::Udp(udp) = packet.transport? else { return None };
    Some(Packet {
        from: SocketAddr::new(from, udp.source_port()),
        to: SocketAddr::new(to, udp.destination_port()),
    })
}

impl Namespace {
    pub(crate) fn udp(&self, address: &str, port: u16) -> UdpSocket {
        self.enter(|| UdpSocket::bind((ip(address), port)).unwrap())
    }
}

pub(crate) fn receive(socket: &UdpSocket) -> Option<(Vec<u8>, SocketAddr)> {
    receive_within(socket, SOON)
}

pub(crate) fn receive_within(socket: &UdpSocket, within: Duration) -> Option<(Vec<u8>, SocketAddr)> {
    socket.set_read_timeout(Some(within)).unwrap();
    let mut buffer = [0; 2048];
    match socket.recv_from(&mut buffer) {
        Ok((length, from)) => Some((buffer[..length].to_vec(), from)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
        Err(e) => panic!("receive: {e}"),
    }
}
