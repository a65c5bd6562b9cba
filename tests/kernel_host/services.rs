//! Ways into the loop: real packets, the sets that let them in, and who else may do Services.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use warren::io::clock;
use warren::io::host::{self, HostConfig, HostNetwork};
use warren::snapshot::service::{Listen, Protocol};

use crate::packets::{FAMILIES, NEVER, SOON, Stage, receive};
use crate::stage::{
    Node, config, config_v4, everything, ip, pretend, settle, sh, shell, until, watched_with,
};

const NODE_PORT: u16 = 30_007;

/// Node port 30007, and port 80 of an external address each in both families, at port 20080 of the loop.
fn with_services() -> HostConfig {
    let externals = ["198.51.100.9", "2001:db8:99::9"].map(|address| (listen(address, 80), 20_080));
    HostConfig {
        node_ports: Arc::new([(Protocol::Udp, NODE_PORT)].into()),
        externals: Arc::new(externals.into()),
        ..config()
    }
}

fn listen(address: &str, port: u16) -> Listen {
    Listen { address: ip(address), protocol: Protocol::Udp, port }
}

fn loop_of(v6: bool) -> std::net::IpAddr {
    let config = config();
    if v6 { config.loop_v6.into() } else { config.loop_v4.into() }
}

fn sets() -> String {
    ["nodeports", "external4", "external6"]
        .map(|set| {
            shell(&format!(
                "nft list set inet warren-services {set}; nft list map inet warren-services {set}"
            ))
        })
        .concat()
}

#[test]
fn services_are_made_once_and_compared() {
    let node = Node::new();
    node.run(async {
        let mut network = HostNetwork::open(None).unwrap();
        let report = network.apply(&with_services()).await.unwrap();
        assert!(report.warnings.is_empty(), "{report:?}");
        for (command, expected) in [
            ("ip route show", "10.96.0.0/16 dev warren0 proto 87 scope link src 10.244.1.0 mtu 1380"),
            ("ip -6 route show", "fd96::/108 dev warren0 proto 87 src fd00:1::"),
            ("nft list set inet warren cluster4", "10.96.0.0/16"),
            ("nft list set inet warren-services nodeports", "udp . 30007"),
            ("nft list map inet warren-services external4", "198.51.100.9 . udp . 80 : 20080"),
            ("nft list map inet warren-services external6", "2001:db8:99::9 . udp . 80 : 20080"),
            ("nft list table inet warren-services", "type nat hook prerouting priority dstnat - 5"),
            ("sysctl net.netfilter.nf_conntrack_tcp_timeout_close_wait", "= 3600"),
            ("sysctl net.ipv4.conf.warren0.route_localnet", "= 0"),
        ] {
            let shown = sh(command).replace(" linkdown", "");
            assert!(shown.contains(expected), "`{command}` lacks `{expected}`:\n{shown}");
        }
        let again = network.apply(&with_services()).await.unwrap();
        assert!(again.is_empty(), "the second time changed {again:?}");
        let other = HostNetwork::open(None).unwrap().apply(&with_services()).await.unwrap();
        assert!(other.is_empty(), "a new process changed {other:?}");
        let off = HostConfig { services: false, ..with_services() };
        network.apply(&off).await.unwrap();
        assert!(!shell("nft list tables").contains("warren-services"));
        assert!(
            !sh("ip route show").contains("10.96") && !sh("nft list table inet warren").contains("10.96")
        );
        assert!(network.apply(&off).await.unwrap().is_empty());
    });
}

#[test]
fn a_cluster_without_ipv6_has_no_services_there() {
    let node = Node::new();
    node.run(async {
        let four = HostConfig { node_ports: with_services().node_ports, ..config_v4() };
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&four).await.unwrap();
        assert!(!sh("nft list table inet warren-services").contains("ip6 "));
        assert!(network.apply(&four).await.unwrap().is_empty());
    });
}

#[test]
fn node_ports_and_external_addresses_lead_into_the_loop() {
    let stage = Stage::new(true);
    stage.apply(&with_services());
    for (v6, family) in [false, true].into_iter().zip(FAMILIES) {
        let external = if v6 { "2001:db8:99::9" } else { "198.51.100.9" };
        let outside = stage.world.udp(family.world, 0);
        let host = stage.node.0.udp(family.node, 0);
        let pod = stage.pods[0].udp(family.pods[0], 0);
        for (client, name) in [(&outside, "outside"), (&host, "host"), (&pod, "pod")] {
            let from = client.local_addr().unwrap();
            for (to, port, inside) in [(family.node, NODE_PORT, NODE_PORT), (external, 80, 20_080)] {
                client.send_to(b"request", (ip(to), port)).unwrap();
                let packet = stage.next_in_tunnel(SOON);
                let packet = packet.unwrap_or_else(|| panic!("from {name} to {to}:{port}: not in the loop"));
                assert_eq!((packet.from, packet.to), (from, SocketAddr::new(loop_of(v6), inside)), "{name}");
                // The loop's reply gets the address back that was called.
                stage.inject(packet.to, packet.from);
                let (_, answers) = receive(client).unwrap_or_else(|| panic!("no reply to {name} from {to}"));
                assert_eq!(answers, SocketAddr::new(ip(to), port), "{name}");
            }
        }
        // Other ports stay as they are.
        let server = stage.node.0.udp(family.node, NODE_PORT - 1);
        outside.send_to(b"other", (ip(family.node), NODE_PORT - 1)).unwrap();
        assert!(receive(&server).is_some());
        // Out of the tunnel, only the node's address in the mesh has node ports: another node's pod calls them.
        let peer = SocketAddr::new(ip(family.client), 5000);
        stage.inject(peer, SocketAddr::new(ip(family.node_address), NODE_PORT));
        let packet = stage.next_in_tunnel(SOON).expect("a peer's call of a node port is in the loop");
        assert_eq!((packet.from, packet.to), (peer, SocketAddr::new(loop_of(v6), NODE_PORT)));
        let own = stage.node.0.udp(family.node_address, NODE_PORT - 1);
        stage.inject(peer, own.local_addr().unwrap());
        assert!(receive(&own).is_some(), "another port of the address in the mesh");
        let underlay = stage.node.0.udp(family.node, NODE_PORT);
        stage.inject(peer, underlay.local_addr().unwrap());
        assert!(receive(&underlay).is_some(), "what the loop has sent out came back into it");
    }
}

#[test]
fn a_clients_own_address_reaches_the_pod_and_the_loops_own_reaches_nobody_else() {
    let stage = Stage::new(true);
    stage.apply(&with_services());
    for (v6, family) in [false, true].into_iter().zip(FAMILIES) {
        let outside = stage.world.udp(family.world, 5000);
        let pod = stage.pods[0].udp(family.pods[0], 8080);
        outside.send_to(b"request", (ip(family.node), NODE_PORT)).unwrap();
        let packet = stage.next_in_tunnel(SOON).expect("in the loop");
        // The loop has chosen a pod of this node.
        stage.inject(packet.from, pod.local_addr().unwrap());
        assert_eq!(receive(&pod).expect("at the pod").1, packet.from, "not masqueraded");
        pod.send_to(b"reply", packet.from).unwrap();
        let reply = stage.next_in_tunnel(SOON).expect("the reply is in the loop");
        assert_eq!((reply.from, reply.to), (pod.local_addr().unwrap(), packet.from));
        // A pod that came to itself sees the loop, and can answer it.
        let loop_at = SocketAddr::new(loop_of(v6), 6000);
        stage.inject(loop_at, pod.local_addr().unwrap());
        assert_eq!(receive(&pod).expect("at the pod").1, loop_at);
        pod.send_to(b"reply", loop_at).unwrap();
        assert_eq!(stage.next_in_tunnel(SOON).expect("the reply is in the loop").to, loop_at);
        // Outside the mesh the loop is the node.
        let server = stage.world.udp(family.world, 7000);
        stage.inject(loop_at, server.local_addr().unwrap());
        let (_, from) = receive(&server).expect("at the endpoint outside");
        assert_eq!(from.ip(), ip(family.node));
        server.send_to(b"reply", from).unwrap();
        assert_eq!(stage.next_in_tunnel(SOON).expect("the reply is in the loop").to, loop_at);
        // Nobody outside gets at the loop by its own address, nor speaks in its name.
        stage.world.enter(|| {
            sh(&match v6 {
                false => format!("ip route add {}/32 via 192.0.2.1", loop_of(v6)),
                true => format!("ip route add {}/128 via 2001:db8::1", loop_of(v6)),
            })
        });
        outside.send_to(b"direct", (loop_of(v6), NODE_PORT)).unwrap();
        assert!(stage.next_in_tunnel(NEVER).is_none(), "the loop's address is open to the world");
    }
}

#[test]
fn what_the_node_needs_for_itself_never_gets_into_the_loop() {
    let stage = Stage::new(true);
    // Nobody knows that the node has this address too, nor that there is a node at the world's.
    stage.node.0.enter(|| sh("ip addr add 192.0.2.77/24 dev eth0"));
    let externals = [(listen("192.0.2.77", 51_820), 20_081), (listen("192.0.2.2", 51_820), 20_082)];
    let taken = HostConfig { externals: Arc::new(externals.into()), ..config() };
    let family = &FAMILIES[0];
    let reached = |stage: &Stage| {
        let lane = stage.node.0.udp("0.0.0.0", 51_820);
        let peer = stage.world.udp(family.world, 51_820);
        peer.send_to(b"in", (ip("192.0.2.77"), 51_820)).unwrap();
        let inwards = crate::packets::receive_within(&lane, NEVER).is_some();
        lane.send_to(b"out", (ip(family.world), 51_820)).unwrap();
        (inwards, crate::packets::receive_within(&peer, NEVER).is_some())
    };
    stage.apply(&HostConfig { protected_ports: [(Protocol::Udp, 51_820)].into(), ..taken.clone() });
    assert_eq!(reached(&stage), (true, true));
    // Another port of the node's goes where the Service wants it.
    let other = stage.node.0.udp("0.0.0.0", 0);
    other.send_to(b"x", (ip(family.world), 51_820)).unwrap();
    assert_eq!(stage.next_in_tunnel(SOON).expect("in the loop").to.port(), 20_082);
}

#[test]
fn a_client_with_an_address_that_the_loop_does_not_know_comes_from_the_node() {
    let stage = Stage::new(true);
    stage.node.0.enter(|| {
        sh("ip addr add 192.0.2.77/24 dev eth0; ip addr add 2001:db8::77/64 dev eth0 nodad");
    });
    stage.apply(&with_services());
    for ((strange, cluster_ip), family) in
        [("192.0.2.77", "10.96.0.9"), ("2001:db8::77", "fd96::9")].into_iter().zip(FAMILIES)
    {
        for (address, seen) in [(strange, family.node_address), (family.node, family.node)] {
            for to in [(ip(address), NODE_PORT), (ip(cluster_ip), 80)] {
                let client = stage.node.0.udp(address, 0);
                client.send_to(b"request", to).unwrap();
                let packet = stage.next_in_tunnel(SOON).expect("in the loop");
                assert_eq!(packet.from.ip(), ip(seen), "{address} to {to:?}");
                stage.inject(packet.to, packet.from);
                assert_eq!(receive(&client).expect("the reply").1, SocketAddr::from(to));
            }
        }
    }
}

#[test]
fn node_ports_are_where_they_were_asked_for() {
    let stage = Stage::new(true);
    stage.node.0.enter(|| sh("ip addr add 192.0.2.77/24 dev eth0"));
    let family = &FAMILIES[0];
    let outside = stage.world.udp(family.world, 0);
    let local = stage.node.0.udp("127.0.0.1", 0);
    let within = |time, client: &std::net::UdpSocket, to: &str| {
        client.send_to(b"x", (ip(to), NODE_PORT)).unwrap();
        stage.next_in_tunnel(time)
    };
    let reached = |client: &std::net::UdpSocket, to: &str| within(SOON, client, to);
    let closed = |client: &std::net::UdpSocket, to: &str| within(NEVER, client, to).is_none();
    let all = with_services();
    stage.apply(&all);
    assert!(reached(&outside, "192.0.2.77").is_some() && reached(&outside, "192.0.2.1").is_some());
    assert!(closed(&local, "127.0.0.1"));
    let some = HostConfig { nodeport_ranges: vec!["192.0.2.1/32".parse().unwrap()], ..all.clone() };
    stage.apply(&some);
    let fresh = stage.world.udp(family.world, 0);
    assert!(closed(&fresh, "192.0.2.77") && reached(&fresh, "192.0.2.1").is_some());
    for ranges in [Vec::new(), some.nodeport_ranges] {
        let local = stage.node.0.udp("127.0.0.1", 0);
        stage.apply(&HostConfig { nodeport_localhost: true, nodeport_ranges: ranges, ..all.clone() });
        let packet = reached(&local, "127.0.0.1").expect("localhost has node ports");
        assert_eq!(packet.from, local.local_addr().unwrap());
        stage.inject(packet.to, packet.from);
        assert_eq!(receive(&local).expect("the reply").1, "127.0.0.1:30007".parse().unwrap());
        // But the tunnel does not get at what listens there.
        let private = stage.node.0.udp("127.0.0.1", 0);
        stage.inject("10.244.2.9:5000".parse().unwrap(), private.local_addr().unwrap());
        assert!(crate::packets::receive_within(&private, NEVER).is_none(), "127.0.0.1 is open to the mesh");
    }
}

#[test]
fn a_change_of_elements_touches_nothing_else_and_is_quick() {
    const PORTS: u16 = 10_000;
    const EXTERNALS: u16 = 5_000;
    let node = Node::new();
    node.run(async {
        let many = |ports: u16, externals: u16| {
            let ports = (0..ports).map(|n| (Protocol::Tcp, 20_000 + n)).collect();
            let external = |n: u16| {
                let [high, low] = n.to_be_bytes();
                let at = listen(&format!("198.{}.{high}.{low}", 18 + n % 2), 443);
                (Listen { protocol: Protocol::Tcp, ..at }, 1 + n)
            };
            let externals: BTreeMap<Listen, u16> = (0..externals).map(external).collect();
            HostConfig { node_ports: Arc::new(ports), externals: Arc::new(externals), ..config() }
        };
        let mut network = HostNetwork::open(None).unwrap();
        let begun = clock::now();
        network.apply(&many(PORTS, EXTERNALS)).await.unwrap();
        println!(
            "{PORTS} node ports and {EXTERNALS} external addresses: {:?}",
            clock::now().duration_since(begun)
        );
        let begun = clock::now();
        assert!(network.apply(&many(PORTS, EXTERNALS)).await.unwrap().is_empty());
        println!("all compared and found right: {:?}", clock::now().duration_since(begun));
        let (wanted, mut events) = watched_with(network, many(PORTS, EXTERNALS));
        settle(&mut events).await;
        let count = || {
            let sets = sets();
            let externals = sets.matches("tcp . 443 :").count();
            (sets.matches("tcp .").count() - externals, externals)
        };
        assert_eq!(count(), (PORTS.into(), EXTERNALS.into()));
        let handles =
            || sh("nft -a list table inet warren-services | grep handle | sed 's/packets.*bytes [0-9]*//'");
        let before = handles();
        let mut took = Vec::new();
        for round in 1..=20_u16 {
            let next = many(PORTS - round, EXTERNALS + round % 2);
            let generation = generation();
            let begun = clock::now();
            wanted.send_replace(next);
            while self::generation() == generation {
                assert!(clock::now().duration_since(begun) < Duration::from_secs(5), "round {round}");
                tokio::task::yield_now().await;
            }
            took.push(clock::now().duration_since(begun));
            tokio::time::sleep(Duration::from_millis(u64::from(round) * 10)).await;
        }
        took.sort();
        let (middle, worst) = (took[took.len() / 2], took[took.len() - 1]);
        println!("one change at that size: {middle:?}, at most {worst:?}");
        assert!(worst < Duration::from_millis(250), "{worst:?}");
        until(
            "the last one",
            || count() == (usize::from(PORTS) - 20, EXTERNALS.into()),
            || format!("{:?}", count()),
        )
        .await;
        assert_eq!(handles(), before, "rules or sets were made anew");
        settle(&mut events).await;
        // What somebody else removes comes back by the long way.
        sh("nft flush set inet warren-services nodeports");
        settle(&mut events).await;
        until("repair", || count().0 == usize::from(PORTS) - 20, || format!("{:?}", count())).await;
        settle(&mut events).await;
        sh("nft 'delete element inet warren-services nodeports { tcp . 20000 }'");
        wanted.send_replace(many(1, 0));
        settle(&mut events).await;
        until("a change at the same time", || count() == (1, 0), || format!("{:?}", count())).await;
        host::cleanup("warren0", None).await.unwrap();
        assert!(!sh("nft list tables").contains("warren"));
    });
}

/// The ruleset's generation, as a program would ask for it.
fn generation() -> u32 {
    thread_local! {
        static SOCKET: nix_netlink::Socket = nix_netlink::Socket::open();
    }
    SOCKET.with(|socket| socket.generation())
}

/// Just enough netlink to ask for the generation without a process per question.
mod nix_netlink {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

    pub(super) struct Socket(File);

    impl Socket {
        pub(super) fn open() -> Self {
            let protocol = SockProtocol::NetlinkNetFilter;
            let socket: OwnedFd =
                socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), protocol).unwrap();
            Self(File::from(socket))
        }

        pub(super) fn generation(&self) -> u32 {
            // NFT_MSG_GETGEN of NFNL_SUBSYS_NFTABLES; NLM_F_REQUEST; struct nfgenmsg.
            let mut request = 20_u32.to_ne_bytes().to_vec();
            request.extend((10_u16 << 8 | 16).to_ne_bytes());
            request.extend(1_u16.to_ne_bytes());
            request.extend([0; 12]);
            (&self.0).write_all(&request).unwrap();
            let mut answer = [0; 256];
            let length = (&self.0).read(&mut answer).unwrap();
            assert!(length >= 28, "{:?}", &answer[..length]);
            // NFTA_GEN_ID comes first.
            u32::from_be_bytes(answer[24..28].try_into().unwrap())
        }
    }
}

#[test]
fn cleanup_takes_services_out_too() {
    let node = Node::new();
    node.run(async {
        sh("ip link del warren0");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        let looked = || everything() + &sh("sysctl net.netfilter.nf_conntrack_tcp_timeout_close_wait");
        let before = looked();
        sh("ip tuntap add dev warren0 mode tun");
        let mut network = HostNetwork::open(Some(file.clone())).unwrap();
        network.apply(&HostConfig { nodeport_localhost: true, ..with_services() }).await.unwrap();
        assert_ne!(looked(), before);
        drop(network);
        let removed = host::cleanup("warren0", Some(&file)).await.unwrap();
        assert_eq!(looked(), before, "removed only {removed:?}");
    });
}

#[test]
fn services_are_left_to_kube_proxy_while_its_rules_are_there() {
    for (made, gone, said) in [
        ("nft add table ip kube-proxy", "nft delete table ip kube-proxy", "nft table ip kube-proxy"),
        ("nft add table ip6 kube-proxy", "nft delete table ip6 kube-proxy", "nft table ip6 kube-proxy"),
        (
            "iptables-nft -t nat -N KUBE-SERVICES",
            "iptables-nft -t nat -X KUBE-SERVICES",
            "chain KUBE-SERVICES of nft table ip nat",
        ),
        (
            "iptables-legacy -t nat -N KUBE-SERVICES",
            "iptables-legacy -t nat -X KUBE-SERVICES",
            "chain KUBE-SERVICES of iptables-legacy's table nat",
        ),
        (
            "ip6tables-legacy -t nat -N KUBE-SERVICES",
            "ip6tables-legacy -t nat -X KUBE-SERVICES",
            "chain KUBE-SERVICES of ip6tables-legacy's table nat",
        ),
    ] {
        let node = Node::new();
        node.run(async {
            // The kubelet's, and a chain that only begins the same way.
            sh("iptables-nft -t nat -N KUBE-KUBELET-CANARY; iptables-legacy -t nat -N KUBE-SERVICES-X");
            sh(made);
            let yielding = HostConfig { yield_services: true, ..with_services() };
            let mut network = HostNetwork::open(None).unwrap();
            let state = network.state();
            network.apply(&yielding).await.unwrap();
            assert_eq!(state.borrow().kube_proxy.as_deref(), Some(said));
            let ours = || {
                let routes = shell("ip route show").contains("10.96.0.0/16");
                let table = shell("nft list tables").contains("warren-services");
                assert_eq!(routes, table);
                table
            };
            assert!(!ours(), "beside {said}");
            assert!(sh("ip route show").contains("10.244.0.0/16 dev warren0"), "pods go on");
            let (wanted, mut events) = watched_with(network, yielding.clone());
            settle(&mut events).await;
            sh(gone);
            until("Services go on", || shell("nft list tables").contains("warren-services"), String::new)
                .await;
            until("all of them", ours, String::new).await;
            assert_eq!(state.borrow().kube_proxy, None);
            settle(&mut events).await;
            sh(made);
            until("it is back", || !shell("nft list tables").contains("warren-services"), String::new).await;
            until("it has all", || !shell("ip route show").contains("10.96.0.0/16"), String::new).await;
            settle(&mut events).await;
            // Told to, we do them all the same.
            wanted.send_replace(with_services());
            until("on means on", || shell("nft list tables").contains("warren-services"), String::new).await;
        });
    }
}

#[test]
fn flows_to_cluster_ips_stay_out_of_a_table_that_is_nearly_full() {
    let stage = Stage::new(true);
    let folder = tempfile::tempdir().unwrap();
    let count = folder.path().join("count");
    let max: u32 =
        std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").unwrap().trim().parse().unwrap();
    let apply_at = |entries: u32| {
        std::fs::write(&count, entries.to_string()).unwrap();
        stage.node.run(async {
            pretend("/proc/sys/net/netfilter/nf_conntrack_count", &count);
            HostNetwork::open(None).unwrap().apply(&with_services()).await.unwrap();
        });
    };
    for (entries, tracked) in [(10, true), (max - 10, false), (max / 2, true)] {
        apply_at(entries);
        for (family, cluster_ip) in FAMILIES.iter().zip(["10.96.0.10", "fd96::10"]) {
            let client = stage.pods[0].udp(family.pods[0], 0);
            let [client_at, service] = [client.local_addr().unwrap(), SocketAddr::new(ip(cluster_ip), 53)];
            client.send_to(b"request", service).unwrap();
            let packet = stage.next_in_tunnel(SOON).expect("in the loop");
            assert_eq!((packet.from, packet.to), (client_at, service));
            stage.inject(service, client_at);
            assert_eq!(receive(&client).expect("a reply").1, service);
            let table = stage.node.0.enter(|| sh("cat /proc/thread-self/net/nf_conntrack"));
            let port = format!("sport={} dport=53", client_at.port());
            assert_eq!(table.contains(&port), tracked, "{entries}: {table}");
            // What needs its entry has one.
            client.send_to(b"request", (ip(family.node), NODE_PORT)).unwrap();
            let packet = stage.next_in_tunnel(SOON).expect("in the loop");
            stage.inject(packet.to, packet.from);
            assert_eq!(receive(&client).expect("a reply").1, SocketAddr::new(ip(family.node), NODE_PORT));
        }
    }
}

#[test]
fn a_client_that_never_pauses_is_led_the_new_way() {
    let stage = Stage::new(true);
    let outside = stage.world.udp(FAMILIES[0].world, 0);
    let send = || outside.send_to(b"again", (ip(FAMILIES[0].node), NODE_PORT)).unwrap();
    let led = || {
        (0..20).any(|_| {
            send();
            stage.next_in_tunnel(Duration::from_millis(100)).is_some()
        })
    };
    let without = HostConfig { node_ports: Arc::default(), ..with_services() };
    stage.node.run(async {
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&without).await.unwrap();
        // Nobody answers there yet; the kernel remembers that.
        send();
        let (wanted, mut events) = watched_with(network, without.clone());
        settle(&mut events).await;
        send();
        wanted.send_replace(with_services());
        settle(&mut events).await;
        assert!(led(), "still led past the Service");
        wanted.send_replace(without.clone());
        settle(&mut events).await;
        let server = stage.node.0.udp(FAMILIES[0].node, NODE_PORT);
        send();
        assert!(receive(&server).is_some(), "still led into the loop");
    });
}

#[test]
fn a_pod_with_too_much_of_a_table_that_is_nearly_full_opens_no_more() {
    const MAX: usize = 200;
    let stage = Stage::new(true);
    let folder = tempfile::tempdir().unwrap();
    let [count, max] = ["count", "max"].map(|name| folder.path().join(name));
    let full = |entries: usize| std::fs::write(&count, entries.to_string()).unwrap();
    full(10);
    std::fs::write(&max, MAX.to_string()).unwrap();
    stage.node.run(async {
        pretend("/proc/sys/net/netfilter/nf_conntrack_count", &count);
        pretend("/proc/sys/net/netfilter/nf_conntrack_max", &max);
        // The agent would have a larger one.
        sh("mount -o remount,bind,ro /proc/sys/net/netfilter/nf_conntrack_max");
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&with_services()).await.unwrap();
        let (_wanted, mut events) = watched_with(network, with_services());
        settle(&mut events).await;
        let into_the_loop = |client: &std::net::UdpSocket, to: &str| {
            client.send_to(b"request", (ip(to), NODE_PORT)).unwrap();
            stage.next_in_tunnel(NEVER)
        };
        let goes_in = |client: &std::net::UdpSocket, to: &str| into_the_loop(client, to).is_some();
        // As many as are a quarter, and some.
        let mut opened = Vec::new();
        for family in &FAMILIES {
            for _ in 0..MAX / 4 + 5 {
                let client = stage.pods[0].udp(family.pods[0], 0);
                let packet = into_the_loop(&client, family.node).expect("in the loop");
                // To the kernel a flow is a new one until it is answered.
                stage.inject(packet.to, packet.from);
                opened.push((client, family));
            }
        }
        let listed =
            || ["greedy4", "greedy6"].map(|set| shell(&format!("nft list set inet warren-services {set}")));
        full(MAX - 10);
        let both = || listed().iter().zip(&FAMILIES).all(|(set, family)| set.contains(family.pods[0]));
        until("the greedy pod is known", both, || listed().concat()).await;
        assert!(!listed().concat().contains(FAMILIES[0].pods[1]));
        for family in &FAMILIES {
            let open = |pod: usize| goes_in(&stage.pods[pod].udp(family.pods[pod], 0), family.node);
            assert!(!open(0), "it opens another one");
            assert!(open(1), "another pod opens none");
        }
        for (client, family) in [&opened[0], &opened[opened.len() - 1]] {
            assert!(goes_in(client, family.node), "what it has ends");
        }
        full(MAX / 2 - 10);
        until("the pressure is over", || listed().concat().is_empty(), || listed().concat()).await;
        for family in &FAMILIES {
            assert!(goes_in(&stage.pods[0].udp(family.pods[0], 0), family.node), "it may open flows again");
        }
    });
}
