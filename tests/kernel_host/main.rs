//! The node's own network against a real kernel: every test in network namespaces of its own, as
//! root. `ip`, `nft` and `iptables` are used to look and to break things; the library runs no program.

#![cfg(feature = "agent")]

mod agent;
mod packets;
mod services;
mod stage;

use std::time::Duration;

use warren::io::host::{self, HostError, HostEvent, HostNetwork};

use stage::*;

#[test]
fn apply_makes_everything_and_twice_changes_nothing() {
    let node = Node::new();
    node.run(async {
        let mut network = HostNetwork::open(None).unwrap();
        let report = network.apply(&config()).await.unwrap();
        assert!(report.warnings.is_empty(), "{report:?}");
        for (command, expected) in [
            ("ip -4 addr show dev warren0", "inet 10.244.1.0/32"),
            ("ip -6 addr show dev warren0", "inet6 fd00:1::/128"),
            ("ip link show dev warren0", "mtu 1400"),
            ("ip route show", "10.244.0.0/16 dev warren0 proto 87 scope link src 10.244.1.0 mtu 1380"),
            ("ip route show", "169.254.77.1 dev warren0"),
            ("ip -6 route show", "fd00::/16 dev warren0 proto 87 src fd00:1:: metric 1024 mtu 1380"),
            ("ip -6 route show", "fdff::77 dev warren0"),
            ("ip route show table 22354", "default dev warren0"),
            ("ip -6 route show table 22354", "default dev warren0"),
            ("ip rule", "4700:\tfrom all fwmark 0x1000/0x1000 lookup 22354 proto 87"),
            ("ip -6 rule", "4700:\tfrom all fwmark 0x1000/0x1000 lookup 22354 proto 87"),
            ("sysctl net.ipv4.ip_forward", "= 1"),
            ("sysctl net.ipv6.conf.all.forwarding", "= 1"),
            ("sysctl net.ipv4.conf.warren0.rp_filter", "= 2"),
            ("sysctl net.ipv4.conf.warren0.accept_local", "= 1"),
            ("sysctl net.ipv6.conf.warren0.addr_gen_mode", "= 1"),
            ("nft list table inet warren", "ct direction original ct mark set ct mark | 0x00001000"),
            ("nft list table inet warren", "snat ip to ip saddr"),
            ("nft list table inet warren", "snat ip6 to ip6 saddr"),
            ("nft list table inet warren", "masquerade"),
            ("nft list table inet warren", "icmp type redirect ip daddr @pods4 drop"),
            ("nft list table inet warren", "icmpv6 type nd-redirect ip6 daddr @pods6 drop"),
            ("nft list table bridge warren", "meta pkttype set host"),
        ] {
            let shown = sh(command);
            let shown = shown.replace(" linkdown", "");
            assert!(shown.contains(expected), "`{command}` lacks `{expected}`:\n{shown}");
        }
        assert!(!sh("ip -6 addr show dev warren0").contains("fe80"), "link-local address in the tunnel");
        let again = network.apply(&config()).await.unwrap();
        assert!(again.is_empty(), "the second time changed {again:?}");
        let other = HostNetwork::open(None).unwrap().apply(&config()).await.unwrap();
        assert!(other.is_empty(), "a new process changed {other:?}");
    });
}

#[test]
fn a_new_config_takes_the_place_of_the_old() {
    let node = Node::new();
    node.run(async {
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&config()).await.unwrap();
        let mut next = config();
        next.mtu = 1420;
        next.node_addresses = vec![ip("10.244.1.64"), ip("fd00:1::")];
        next.tunnel_routes[0].source = Some(ip("10.244.1.64"));
        next.tunnel_routes[1].mtu = 1300;
        next.cluster_ranges.push("10.96.0.0/12".parse().unwrap());
        next.masquerade = false;
        next.services = false;
        network.apply(&next).await.unwrap();
        assert!(sh("ip link show dev warren0").contains("mtu 1420"));
        assert!(!sh("ip addr show dev warren0").contains("10.244.1.0/32"));
        assert!(sh("ip route show").contains("src 10.244.1.64"));
        assert!(sh("ip -6 route show").contains("mtu 1300"));
        let rules = sh("nft list ruleset");
        assert!(rules.contains("10.96.0.0/12") && !rules.contains("masquerade"), "{rules}");
        assert!(!rules.contains("table bridge"), "{rules}");
        next.tunnel_routes.clear();
        network.apply(&next).await.unwrap();
        assert!(!sh("ip route show").contains("10.244.0.0/16"));
        assert!(network.apply(&next).await.unwrap().is_empty());
    });
}

#[test]
fn whatever_is_removed_comes_back() {
    let node = Node::new();
    node.run(async {
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&config()).await.unwrap();
        let (_config, mut events) = watched(network);
        settle(&mut events).await;
        let good = state();
        for harm in [
            "ip route del 10.244.0.0/16",
            "ip -6 route del fd00::/16",
            "ip route del default table 22354",
            "ip -6 route del default dev warren0 table 22354",
            "ip route del 169.254.77.1",
            "ip route replace 10.244.0.0/16 dev warren0 proto 87 mtu 900",
            "ip rule del pref 4700",
            "ip -6 rule del pref 4700",
            "ip addr del 10.244.1.0/32 dev warren0",
            "ip addr del fd00:1::/128 dev warren0",
            "ip addr add 10.9.9.9/32 dev warren0",
            "ip addr flush dev warren0",
            "ip link set warren0 mtu 1350",
            "ip link set warren0 down",
            "ip link set warren0 mtu 1000",
            "nft delete table inet warren",
            "nft delete table bridge warren",
            "nft delete table inet warren-services",
            "nft flush chain inet warren-services services",
            "nft 'add element inet warren-services nodeports { tcp . 1 }'",
            "ip route del 10.96.0.0/16",
            "nft flush table inet warren",
            "nft flush chain inet warren pods",
            "nft 'flush chain inet warren leak; delete chain inet warren leak'",
            "nft insert rule inet warren prerouting drop",
            "nft flush set inet warren cluster4",
            "nft flush ruleset",
            "sysctl -w net.ipv4.ip_forward=0",
            "sysctl -w net.ipv6.conf.all.forwarding=0",
            "sysctl -w net.ipv4.conf.warren0.rp_filter=1",
            "sysctl -w net.ipv4.conf.warren0.route_localnet=1",
        ] {
            sh(harm);
            until(&format!("repair of `{harm}`"), || state() == good, || format!("{}\nwas\n{good}", state()))
                .await;
            let said = tokio::time::timeout(REPAIR, events.recv()).await;
            assert!(matches!(said, Ok(Some(HostEvent::Repaired(_)))), "after `{harm}`: {said:?}");
            settle(&mut events).await;
        }
    });
}

#[test]
fn the_watcher_applies_a_new_config_and_ends_with_its_sender() {
    let node = Node::new();
    node.run(async {
        let (config_out, mut events) = watched(HostNetwork::open(None).unwrap());
        // It also makes what was never applied before.
        until("the first config", || sh("ip link show dev warren0").contains("mtu 1400"), String::new).await;
        settle(&mut events).await;
        config_out.send_modify(|config| config.mtu = 1300);
        until("the second", || sh("ip link show dev warren0").contains("mtu 1300"), String::new).await;
        let said = tokio::time::timeout(REPAIR, events.recv()).await;
        assert!(matches!(said, Ok(Some(HostEvent::Changed(_)))), "no repair: {said:?}");
        config_out.send_modify(|config| config.mtu = 1000);
        let said = tokio::time::timeout(REPAIR, async {
            loop {
                match events.recv().await {
                    Some(HostEvent::Repaired(_) | HostEvent::Changed(_)) => {}
                    other => return other,
                }
            }
        });
        assert!(matches!(said.await, Ok(Some(HostEvent::Failed(HostError::MtuTooSmall { mtu: 1000 })))));
        drop(config_out);
        let end = tokio::time::timeout(REPAIR, events.recv()).await;
        assert!(matches!(end, Ok(None)), "{end:?}");
    });
}

#[test]
fn the_tun_gone_is_said_once_and_all_returns_with_it() {
    let node = Node::new();
    node.run(async {
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&config()).await.unwrap();
        let (_config, mut events) = watched(network);
        settle(&mut events).await;
        let good = state();
        sh("ip link del warren0");
        let said = tokio::time::timeout(REPAIR, events.recv()).await.unwrap();
        assert!(matches!(&said, Some(HostEvent::TunGone { name }) if name == "warren0"), "{said:?}");
        let more = tokio::time::timeout(Duration::from_millis(2500), events.recv()).await;
        assert!(more.is_err(), "said more than once: {more:?}");
        sh("ip tuntap add dev warren0 mode tun");
        until("return of everything", || state() == good, || format!("{}\nwas\n{good}", state())).await;
    });
}

#[test]
fn without_the_tun_the_error_says_what_to_do() {
    let node = Node::new();
    node.run(async {
        sh("ip link del warren0");
        let error = HostNetwork::open(None).unwrap().apply(&config()).await.unwrap_err();
        assert!(matches!(&error, HostError::NoTun { name } if name == "warren0"), "{error}");
        let mut small = config();
        small.mtu = 1200;
        let error = HostNetwork::open(None).unwrap().apply(&small).await.unwrap_err();
        assert!(matches!(error, HostError::MtuTooSmall { mtu: 1200 }), "{error}");
    });
}

#[test]
fn the_bridges_mac_is_followed() {
    let node = Node::new();
    node.run(async {
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&config()).await.unwrap();
        let (_config, mut events) = watched(network);
        settle(&mut events).await;
        sh("ip link set cbr0 address 02:00:00:00:be:ef");
        until(
            "the new MAC",
            || shell("nft list table bridge warren").contains("02:00:00:00:be:ef"),
            || shell("nft list table bridge warren"),
        )
        .await;
        sh("ip link del cbr0");
        until(
            "no bridge, no rule that names it",
            || !sh("nft list ruleset").contains("cbr0"),
            || sh("nft list ruleset"),
        )
        .await;
    });
}

#[test]
fn cleanup_leaves_nothing() {
    let node = Node::new();
    node.run(async {
        sh("ip link del warren0");
        iptables_policy_drop();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        let before = everything();
        sh("ip tuntap add dev warren0 mode tun");
        let mut network = HostNetwork::open(Some(file.clone())).unwrap();
        network.apply(&config()).await.unwrap();
        assert_ne!(everything(), before);
        drop(network);
        let removed = host::cleanup("warren0", Some(&file)).await.unwrap();
        assert_eq!(everything(), before, "removed only {removed:?}");
        assert!(
            removed.iter().any(|what| what.contains("sysctl net.ipv4.ip_forward back to 0")),
            "{removed:?}"
        );
        assert!(!file.exists());
        assert!(host::cleanup("warren0", Some(&file)).await.unwrap().is_empty());
    });
}

#[test]
fn a_foreign_chain_that_drops_lets_pod_traffic_through() {
    let node = Node::new();
    node.run(async {
        iptables_policy_drop();
        sh("nft add table inet firewall");
        sh("nft 'add chain inet firewall forwarding { type filter hook forward priority 10; policy accept; }'");
        sh("nft add rule inet firewall forwarding ct state established accept");
        sh("nft add rule inet firewall forwarding counter reject");
        sh("nft add table inet fine");
        sh("nft 'add chain inet fine forwarding { type filter hook forward priority 20; policy accept; }'");
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&config()).await.unwrap();
        let count = |listing: &str| listing.matches("warren: pod traffic").count();
        // The tunnel, in and out; the bridge, out of it and answers into it.
        assert_eq!(count(&sh("nft list chain ip filter FORWARD")), 4);
        assert_eq!(count(&sh("nft list chain inet firewall forwarding")), 4);
        assert_eq!(count(&sh("nft list chain inet fine forwarding")), 0);
        let listing = sh("nft list chain inet firewall forwarding");
        assert!(listing.find("warren:").unwrap() < listing.find("reject").unwrap(), "{listing}");
        // iptables must still understand its own table, and its save and restore keep ours known.
        let rules = sh("iptables -S FORWARD");
        assert!(rules.contains("-A FORWARD -i warren0"), "{rules}");
        let answers = rules.lines().find(|rule| rule.contains("-o cbr0")).unwrap();
        assert!(answers.contains("-m conntrack --ctstate RELATED,ESTABLISHED"), "{answers}");
        let native = listing.lines().find(|rule| rule.contains("oifname \"cbr0\"")).unwrap();
        assert!(native.contains("ct state established,related"), "{native}");
        sh("iptables-save > /tmp/wh-$$ && iptables-restore < /tmp/wh-$$; rm -f /tmp/wh-$$");
        let again = network.apply(&config()).await.unwrap();
        assert!(again.is_empty(), "{again:?}");
        let (_config, mut events) = watched(network);
        settle(&mut events).await;
        let ours = || sh("iptables -S FORWARD").matches("warren: pod traffic").count();
        sh("iptables -F FORWARD");
        until("our rules after a flush", || ours() == 4, || sh("iptables -S FORWARD")).await;
        // Loosened: then nothing of ours has to be there.
        sh("iptables -P FORWARD ACCEPT");
        until("our rules gone", || ours() == 0, || sh("iptables -S FORWARD")).await;
        host::cleanup("warren0", None).await.unwrap();
        assert!(!sh("nft list ruleset").contains("warren"));
    });
}

#[test]
fn a_new_mtu_for_thousands_of_peers_is_no_matter_of_minutes() {
    const PEERS: u16 = 3_000;
    let node = Node::new();
    node.run(async {
        let mut wanted = config_v4();
        let peer = |number: u16| {
            let mut route = wanted.tunnel_routes[0].clone();
            let [high, low] = number.to_be_bytes();
            route.range = format!("10.{}.{low}.0/24", 100 + high).parse().unwrap();
            route
        };
        wanted.tunnel_routes = (0..PEERS).map(peer).collect();
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&wanted).await.unwrap();
        wanted.tunnel_routes.iter_mut().for_each(|route| route.mtu = 1280);
        // A listing of all routes for each of them took minutes.
        let applied = tokio::time::timeout(Duration::from_secs(10), network.apply(&wanted)).await;
        let report = applied.expect("routes are listed once").unwrap();
        assert_eq!(report.changes.len(), usize::from(PEERS), "{:?}", report.changes.first());
        assert_eq!(sh("ip route show").matches("mtu 1280").count(), usize::from(PEERS));
    });
}

#[test]
fn among_hundreds_of_routes_one_that_goes_or_is_taken_is_back_at_once() {
    const PEERS: u8 = 250;
    let node = Node::new();
    node.run(async {
        let mut wanted = config_v4();
        let like = wanted.tunnel_routes[0].clone();
        wanted.tunnel_routes = (0..PEERS)
            .map(|number| {
                let mut route = like.clone();
                route.range = format!("10.100.{number}.0/24").parse().unwrap();
                route
            })
            .collect();
        let (_config, mut events) = watched_with(HostNetwork::open(None).unwrap(), wanted);
        let ours = || sh("ip route show proto 87").matches("10.100.").count();
        until("all routes", || ours() == usize::from(PEERS), || ours().to_string()).await;
        settle(&mut events).await;
        for harm in [
            "ip route del 10.100.7.0/24",
            "ip route replace 10.100.7.0/24 dev lo proto static; sleep 0.3; ip route del 10.100.7.0/24",
        ] {
            sh(harm);
            until(&format!("repair of `{harm}`"), || ours() == usize::from(PEERS), || ours().to_string())
                .await;
        }
    });
}

#[test]
fn a_route_of_somebody_else_is_named_and_left_alone() {
    let node = Node::new();
    node.run(async {
        sh("ip route add 10.244.0.0/16 via 10.244.1.7");
        let mut network = HostNetwork::open(None).unwrap();
        let report = network.apply(&config()).await.unwrap();
        assert!(report.warnings.iter().any(|w| w.contains("10.244.0.0/16")), "{report:?}");
        assert!(sh("ip route show").contains("10.244.0.0/16 via 10.244.1.7"));
        assert!(network.apply(&config()).await.unwrap().is_empty(), "said twice");
    });
}

#[test]
fn with_proc_sys_read_only_device_settings_go_by_netlink() {
    let node = Node::new();
    node.run(async {
        sh("sysctl -w net.ipv6.conf.all.forwarding=1 net.ipv6.conf.warren0.accept_ra=0");
        read_only_proc_sys();
        assert!(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").is_err());
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&config()).await.unwrap();
        for (key, value) in [
            ("net.ipv4.conf.warren0.rp_filter", "= 2"),
            ("net.ipv4.conf.warren0.accept_local", "= 1"),
            ("net.ipv4.conf.warren0.send_redirects", "= 0"),
            ("net.ipv4.conf.warren0.forwarding", "= 1"),
            ("net.ipv4.conf.cbr0.forwarding", "= 1"),
            ("net.ipv6.conf.warren0.addr_gen_mode", "= 1"),
        ] {
            let shown = sh(&format!("sysctl {key}"));
            assert!(shown.contains(value), "{shown}");
        }
        assert!(network.apply(&config()).await.unwrap().is_empty());
    });
}

#[test]
fn with_proc_sys_net_mounted_in_the_second_place_everything_is_written_and_put_back() {
    let node = Node::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sysctl");
    let place = SecondPlace::new();
    node.run(async {
        sh("sysctl -w net.ipv6.conf.default.accept_ra=2");
        place.mount();
        assert!(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").is_err());
        let mut network = HostNetwork::open(Some(file.clone())).unwrap();
        let report = network.apply(&config()).await.unwrap();
        assert!(!report.changes.iter().any(|change| change.to_string().contains("by netlink")), "{report:?}");
        for (key, value) in [
            ("net.ipv4.ip_forward", "= 1"),
            ("net.ipv6.conf.all.forwarding", "= 1"),
            ("net.ipv6.conf.warren0.accept_ra", "= 0"),
        ] {
            let shown = sh(&format!("sysctl {key}"));
            assert!(shown.contains(value), "{shown}");
        }
        assert!(network.apply(&config()).await.unwrap().is_empty());
        host::cleanup("warren0", Some(&file)).await.unwrap();
        let back = sh("sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding");
        assert!(back.lines().all(|line| line.ends_with("= 0")), "{back}");
    });
}

#[test]
fn what_went_by_netlink_goes_back_by_netlink() {
    let node = Node::new();
    node.run(async {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        sh("sysctl -w net.ipv6.conf.all.forwarding=1 net.ipv6.conf.warren0.accept_ra=0");
        sh("sysctl -w net.ipv4.conf.lo.forwarding=1");
        read_only_proc_sys();
        HostNetwork::open(Some(file.clone())).unwrap().apply(&config()).await.unwrap();
        assert!(sh("sysctl net.ipv4.conf.cbr0.forwarding").contains("= 1"));
        let restored = host::cleanup("warren0", Some(&file)).await.unwrap();
        assert!(sh("sysctl net.ipv4.conf.cbr0.forwarding").contains("= 0"), "{restored:?}");
        assert!(sh("sysctl net.ipv4.conf.lo.forwarding").contains("= 1"), "never ours: {restored:?}");
    });
}

#[test]
fn settings_of_an_earlier_boot_are_not_put_back() {
    let node = Node::new();
    node.run(async {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        HostNetwork::open(Some(file.clone())).unwrap().apply(&config()).await.unwrap();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace(boot.trim(), "another-boot")).unwrap();
        // Since then it is somebody else who wants it on.
        host::cleanup("warren0", Some(&file)).await.unwrap();
        assert!(sh("sysctl net.ipv4.ip_forward").contains("= 1"));
    });
}

#[test]
fn a_setting_that_cannot_be_written_is_named() {
    let node = Node::new();
    node.run(async {
        read_only_proc_sys();
        let error = HostNetwork::open(None).unwrap().apply(&config()).await.unwrap_err();
        assert!(error.to_string().contains("net.ipv6.conf.all.forwarding"), "{error}");
    });
}

#[test]
fn a_cluster_without_ipv6_gets_none() {
    let node = Node::new();
    node.run(async {
        let mut network = HostNetwork::open(None).unwrap();
        network.apply(&config_v4()).await.unwrap();
        assert!(!sh("ip -6 rule").contains("4700"));
        assert!(!sh("nft list table inet warren").contains("ip6 "));
        assert!(sh("sysctl net.ipv6.conf.all.forwarding").contains("= 0"));
        assert!(network.apply(&config_v4()).await.unwrap().is_empty());
        // And one that loses it loses what we made of it.
        network.apply(&config()).await.unwrap();
        network.apply(&config_v4()).await.unwrap();
        assert!(!sh("ip -6 rule").contains("4700") && !sh("ip -6 route show table all").contains("proto 87"));
    });
}

#[test]
fn an_uplink_that_lives_from_router_advertisements_keeps_them() {
    let node = Node::new();
    node.run(async {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        sh("ip link add eth0 type veth peer name eth1; ip link set eth0 up; ip link set eth1 up");
        sh("sysctl -w net.ipv6.conf.eth0.accept_ra=1 net.ipv6.conf.eth1.accept_ra=1");
        sh("ip -6 route add default via fe80::1 dev eth0 proto ra");
        HostNetwork::open(Some(file.clone())).unwrap().apply(&config()).await.unwrap();
        assert!(sh("sysctl net.ipv6.conf.eth0.accept_ra").contains("= 2"));
        assert!(sh("sysctl net.ipv6.conf.eth1.accept_ra").contains("= 1"), "it had no such route");
        host::cleanup("warren0", Some(&file)).await.unwrap();
        assert!(sh("sysctl net.ipv6.conf.eth0.accept_ra").contains("= 1"));
    });
}

#[test]
fn without_permission_the_error_says_so() {
    const PROBE: &str = "WARREN_TEST_PERMISSION_PROBE";
    if std::env::var_os(PROBE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let outcome = runtime.block_on(async { HostNetwork::open(None)?.apply(&config()).await });
        let error = outcome.unwrap_err();
        assert!(matches!(error, HostError::NoPermission { .. }), "{error}");
        return;
    }
    let node = Node::new();
    // The program itself may lie where only root can read.
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("probe");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let status = node.0.enter(|| {
        let mut probe = std::process::Command::new(&program);
        probe.args(["--exact", "without_permission_the_error_says_so"]).env(PROBE, "1");
        std::os::unix::process::CommandExt::uid(&mut probe, 65534).status().unwrap()
    });
    assert!(status.success());
}
