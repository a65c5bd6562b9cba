//! `table inet warren-services`: how connections to NodePorts, load-balancer addresses and external
//! addresses get into the loop.
//!
//! | chain | hook, priority | what for |
//! |---|---|---|
//! | `prerouting` | nat, dstnat - 5 | what comes in from outside and from pods |
//! | `output` | nat output, dstnat - 5 | what the node's own processes send |
//! | `services` | (both jump there) | exact external addresses first, then node ports on local addresses |
//! | `postrouting` | nat, srcnat - 5 | clients with an address of the node that the loop does not know for one |
//! | `untracked` | filter prerouting, raw | while the connection table is nearly full: pods' flows to ClusterIPs stay out of it |
//! | `greedy` | filter prerouting, mangle | meanwhile: who has more than its share of it opens no flows |
//! | `loopback` | filter input, filter | 127/8 is answered out of the tunnel, never called (`--nodeport-localhost`) |
//!
//! Before dstnat, because within one hook the first chain that binds a destination wins: kube-proxy puts
//! its jump before everything in dstnat too, so a Service's address goes before a `hostPort` of the
//! portmap plugin or a published port of Docker here as it does there; and rules that a stopped
//! kube-proxy left behind do not take new connections away.
//!
//! A table of its own: its sets hold tens of thousands of elements, and comparing `table inet warren`
//! must not list them. `elements` fills them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use nlink::netlink::nftables::config::{DeclaredTableBuilder, NftablesConfig, SetElementMode};
use nlink::netlink::nftables::{
    BaseChain, ChainName, CtDirection, CtState, Expr, Family, FibFlags, Field, FilterHook, LookupExpr, Match,
    MetaKey, NFTA_NAT_FAMILY, NFTA_NAT_FLAGS, NFTA_NAT_REG_ADDR_MAX, NFTA_NAT_REG_ADDR_MIN,
    NFTA_NAT_REG_PROTO_MAX, NFTA_NAT_REG_PROTO_MIN, NFTA_NAT_TYPE, NatHook, PayloadBase, Policy, Priority,
    RawExpr, Register, Rule, SetDataType, SetElement, SetKeyType, Verdict,
};
use nlink::netlink::types::route::RouteType;

use super::HostConfig;
use super::elements::node_port;
use super::nft::{address_set, addresses, families};
use super::nla::attribute;
use crate::snapshot::service::Protocol;

/// The table's name.
pub(super) const NAME: &str = "warren-services";
/// Its set of ports that the node needs for itself.
const PROTECTED: &str = "protected";
/// Its set of node ports.
pub(super) const NODE_PORTS: &str = "nodeports";

/// `table inet warren-services`, complete, or its absence. `pressed`: the kernel's connection table is nearly
/// full, and these pods have too much of it.
pub(super) fn table(config: &HostConfig, pressed: Option<&BTreeSet<IpAddr>>) -> NftablesConfig {
    if !config.services {
        return NftablesConfig::new().absent_table(NAME, Family::Inet);
    }
    NftablesConfig::new().table(NAME, Family::Inet, |table| {
        let table = chains(sets(table, config), config);
        let table = families(config).fold(protected(table), |table, v6| translations(table, config, v6));
        let table = families(config).fold(table, |table, v6| mesh_addresses(table, config, v6));
        let table = families(config).fold(table, |table, v6| strange_sources(table, config, v6));
        let table = match pressed {
            Some(pods) => greedy(untracked(table, config), config, pods),
            None => table,
        };
        if config.nodeport_localhost { loopback(table, config) } else { table }
    })
}

fn sets(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    // Their elements are kept right by `elements`: too many for one message, and for listing every time.
    let mut table =
        table.set(NODE_PORTS, |set| set.key_type(node_port_key()).element_mode(SetElementMode::Ensure));
    for v6 in families(config) {
        table = table.set(externals_name(v6), |set| {
            let set = set.key_type(external_key(v6)).map(SetDataType::Value(SetKeyType::InetService));
            set.element_mode(SetElementMode::Ensure)
        });
    }
    let services: Vec<IpNet> = config.service_routes.iter().map(|route| route.range).collect();
    let ranges = node_ranges(config);
    let known: Vec<IpNet> =
        config.node_addresses.iter().chain(&config.host_addresses).copied().map(IpNet::from).collect();
    let table = address_set(table, ("known4", "known6"), &known);
    let ports: Vec<SetElement> = config.protected_ports.iter().map(node_port).collect();
    let table = table.set(PROTECTED, |set| set.key_type(node_port_key()).elements(ports));
    let table = address_set(table, ("pods4", "pods6"), &config.pod_ranges);
    let table = address_set(table, ("services4", "services6"), &services);
    address_set(table, ("nodes4", "nodes6"), &ranges)
}

fn chains(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    let early = Priority::Custom(Priority::DstNat.to_i32() - 5);
    let table = table
        .chain("services", |chain| chain.exclusive())
        .chain("prerouting", |chain| chain.base(BaseChain::nat(NatHook::Prerouting, early)).exclusive())
        .chain("output", |chain| chain.base(BaseChain::nat(NatHook::Output, early)).exclusive())
        .chain("postrouting", |chain| {
            let early = Priority::Custom(Priority::SrcNat.to_i32() - 5);
            chain.base(BaseChain::nat(NatHook::Postrouting, early)).exclusive()
        })
        // Whatever Services claim, the tunnels' own packets go where they are sent.
        .rule("output", |rule| {
            let rule = rule.match_l4proto(Protocol::Udp.number());
            port_key(rule, [Register::R0, Register::Reg32_01], SOURCE_PORT)
                .expr(LookupExpr::new(PROTECTED, Register::R0))
                .expr(Expr::Verdict(Verdict::Return))
        });
    match ChainName::new("services") {
        // What the loop has sent out must not come back into it, but for what `mesh_addresses` takes.
        Ok(services) => table
            .rule("prerouting", |rule| rule.match_iif_not(&config.tun).jump(services.clone()))
            .rule("output", |rule| rule.jump(services)),
        Err(_) => table,
    }
}

/// Where node ports are: the ranges of `--nodeport-addresses`; a family that it does not name has all
/// its local addresses, as kube-proxy has it.
fn node_ranges(config: &HostConfig) -> Vec<IpNet> {
    let mut ranges = config.nodeport_ranges.clone();
    if config.nodeport_localhost && !ranges.is_empty() {
        ranges.push(loopback_range());
    }
    ranges
}

fn loopback_range() -> IpNet {
    IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8))
}

/// What this node needs for itself, on every address that it has, whether or not anybody else knows of that.
fn protected(table: DeclaredTableBuilder) -> DeclaredTableBuilder {
    table.rule("services", |rule| {
        port_key(rule, [Register::R0, Register::Reg32_01], DESTINATION_PORT)
            .expr(LookupExpr::new(PROTECTED, Register::R0))
            .match_fib_type(FibFlags::DADDR, RouteType::Local)
            .expr(Expr::Verdict(Verdict::Return))
    })
}

/// A client here may have an address that is not in the Node's status (a bridge's, a second network's). The
/// loop would take it for somebody outside, whose replies a pod of this node sends straight back, past the
/// loop. So it gets the node address, which the loop knows.
fn strange_sources(table: DeclaredTableBuilder, config: &HostConfig, v6: bool) -> DeclaredTableBuilder {
    let strange = |rule: Rule| {
        let (saddr, _) = addresses(v6);
        let rule = family(rule, v6).match_oif(&config.tun).match_fib_type(FibFlags::SADDR, RouteType::Local);
        let rule = rule.match_not_in_set(saddr, if v6 { "known6" } else { "known4" });
        // That one the loop knows.
        if v6 { rule } else { rule.match_saddr_v4_not(Ipv4Addr::new(127, 0, 0, 0), 8) }
    };
    let (_, daddr) = addresses(v6);
    table
        .rule("postrouting", |rule| match v6 {
            false => strange(rule).match_daddr_v4(config.loop_v4, 32).masquerade(),
            true => strange(rule).match_daddr_v6(config.loop_v6, 128).masquerade(),
        })
        .rule("postrouting", |rule| {
            strange(rule).match_in_set(daddr, if v6 { "services6" } else { "services4" }).masquerade()
        })
}

/// `dnat to LOOP : . map @external` and `daddr local, @nodeports: dnat to LOOP`.
fn translations(table: DeclaredTableBuilder, config: &HostConfig, v6: bool) -> DeclaredTableBuilder {
    let table = table.rule("services", |rule| external_rule(family(rule, v6), config, v6));
    let restricted = config.nodeport_ranges.iter().any(|range| range.addr().is_ipv6() == v6);
    table.rule("services", |rule| {
        let mut rule = family(rule, v6).match_fib_type(FibFlags::DADDR, RouteType::Local);
        if v6 {
            // No reply to ::1 can come from another device, and a link-local address does not say by which.
            rule = rule.match_daddr_v6_not(Ipv6Addr::LOCALHOST, 128);
            rule = rule.match_daddr_v6_not(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);
        } else if !config.nodeport_localhost {
            rule = rule.match_daddr_v4_not(Ipv4Addr::new(127, 0, 0, 0), 8);
        }
        if restricted {
            let (_, daddr) = addresses(v6);
            rule = rule.match_in_set(daddr, if v6 { "nodes6" } else { "nodes4" });
        }
        let rule = port_key(rule, [Register::R0, Register::Reg32_01], DESTINATION_PORT);
        let rule = rule.expr(LookupExpr::new(NODE_PORTS, Register::R0));
        if v6 { rule.dnat_v6(config.loop_v6, None) } else { rule.dnat(config.loop_v4, None) }
    })
}

/// The address that this node has inside the mesh has node ports too. Other nodes' pods call it through the
/// tunnel; the loop never sends anything of its own making there, for at a node port no process listens. The
/// node's own pods call it through their bridge, where over IPv6 the kernel takes it for a subnet's anycast address
/// (RFC 4291 section 2.6.1) and not for a local one.
fn mesh_addresses(table: DeclaredTableBuilder, config: &HostConfig, v6: bool) -> DeclaredTableBuilder {
    let own = |ip: &&IpAddr| ip.is_ipv6() == v6;
    let inside = |ip: &IpAddr| config.nodeport_ranges.iter().any(|range| range.contains(ip));
    let restricted = config.nodeport_ranges.iter().any(|range| range.addr().is_ipv6() == v6);
    let called = config.node_addresses.iter().filter(own).filter(|ip| !restricted || inside(ip));
    called.fold(table, |table, address| {
        table.rule("prerouting", |rule| {
            let rule = family(rule, v6);
            let rule = match address {
                IpAddr::V4(v4) => rule.match_daddr_v4(*v4, 32),
                IpAddr::V6(v6) => rule.match_daddr_v6(*v6, 128),
            };
            let rule = port_key(rule, [Register::R0, Register::Reg32_01], DESTINATION_PORT);
            let rule = rule.expr(LookupExpr::new(NODE_PORTS, Register::R0));
            if v6 { rule.dnat_v6(config.loop_v6, None) } else { rule.dnat(config.loop_v4, None) }
        })
    })
}

/// The address is one and the same, so the map holds only the port.
fn external_rule(rule: Rule, config: &HostConfig, v6: bool) -> Rule {
    /// NFT_NAT_DNAT, NF_NAT_RANGE_MAP_IPS and NF_NAT_RANGE_PROTO_SPECIFIED
    /// (include/uapi/linux/netfilter/nf_tables.h, nf_nat.h).
    const DNAT: u32 = 1;
    const MAP_IPS_AND_PORT: u32 = 1 | 2;
    let (offset, len, keys, nfproto, to) = if v6 {
        let keys = [Register::Reg32_04, Register::Reg32_05];
        (24, 16, keys, super::nft::NFPROTO_IPV6, config.loop_v6.octets().to_vec())
    } else {
        let keys = [Register::Reg32_01, Register::Reg32_02];
        (16, 4, keys, super::nft::NFPROTO_IPV4, config.loop_v4.octets().to_vec())
    };
    let number = |kind: u16, value: u32| attribute(kind, &value.to_be_bytes());
    let (address, port) = (Register::R2.wire(), Register::R3.wire());
    let nat = [
        number(NFTA_NAT_TYPE, DNAT),
        number(NFTA_NAT_FAMILY, u32::from(nfproto)),
        number(NFTA_NAT_REG_ADDR_MIN, address),
        number(NFTA_NAT_REG_ADDR_MAX, address),
        number(NFTA_NAT_REG_PROTO_MIN, port),
        number(NFTA_NAT_REG_PROTO_MAX, port),
        number(NFTA_NAT_FLAGS, MAP_IPS_AND_PORT),
    ];
    let rule = rule.expr(Expr::Payload { dreg: Register::R0, base: PayloadBase::Network, offset, len });
    port_key(rule, keys, DESTINATION_PORT)
        .expr(LookupExpr::new(externals_name(v6), Register::R0).dreg(Register::R3))
        .expr(Expr::Immediate { dreg: Register::R2, data: to })
        .expr(RawExpr::new("nat", nat.concat()))
}

/// Where a transport header has its ports.
const SOURCE_PORT: u32 = 0;
const DESTINATION_PORT: u32 = 2;

/// `meta l4proto . th dport` (or `sport`) into two words of a key. After defragmentation, so every packet has
/// ports.
fn port_key(rule: Rule, [protocol, port]: [Register; 2], offset: u32) -> Rule {
    rule.expr(Expr::Meta { dreg: protocol, key: MetaKey::L4Proto }).expr(Expr::Payload {
        dreg: port,
        base: PayloadBase::Transport,
        offset,
        len: 2,
    })
}

/// What a pod sends to a ClusterIP needs no entry in the kernel's connection table: nothing is translated
/// before the loop, and its replies go nowhere but out of the tunnel device. It has one all the same, because
/// others' rules ask for it (`ct state established`), unless the table is filling up: then a pod that floods
/// a Service leaves it to others, and the loop's own quota deals with the flood.
fn untracked(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    let mut table = table.chain("untracked", |chain| {
        let base = BaseChain::filter(FilterHook::Prerouting, Priority::Raw);
        chain.base(base.policy(Policy::Accept)).exclusive()
    });
    for v6 in families(config) {
        let (saddr, daddr) = addresses(v6);
        let [pods, services] = if v6 { ["pods6", "services6"] } else { ["pods4", "services4"] };
        table = table
            .rule("untracked", |rule| {
                rule.match_in_set(saddr, pods).match_in_set(daddr, services).counter().notrack()
            })
            .rule("untracked", |rule| {
                let replies = rule.match_iif(&config.tun).match_in_set(saddr, services);
                replies.match_in_set(daddr, pods).counter().notrack()
            });
    }
    table
}

/// Before its address is translated; what it has already goes on.
fn greedy(table: DeclaredTableBuilder, config: &HostConfig, pods: &BTreeSet<IpAddr>) -> DeclaredTableBuilder {
    const NAMES: (&str, &str) = ("greedy4", "greedy6");
    let pods: Vec<IpNet> = pods.iter().copied().map(IpNet::from).collect();
    let table = address_set(table, NAMES, &pods).chain("greedy", |chain| {
        let base = BaseChain::filter(FilterHook::Prerouting, Priority::Mangle);
        chain.base(base.policy(Policy::Accept)).exclusive()
    });
    families(config).fold(table, |table, v6| {
        let (saddr, _) = addresses(v6);
        table.rule("greedy", |rule| {
            let rule =
                rule.match_iif_not(&config.tun).match_in_set(saddr, if v6 { NAMES.1 } else { NAMES.0 });
            rule.match_ct_state(CtState::NEW).counter().drop()
        })
    })
}

/// With `route_localnet` a packet out of the tunnel could reach what listens on 127.0.0.1 only.
fn loopback(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    table
        .chain("loopback", |chain| {
            let base = BaseChain::filter(FilterHook::Input, Priority::Filter);
            chain.base(base.policy(Policy::Accept)).exclusive()
        })
        .rule("loopback", |rule| {
            rule.match_iif(&config.tun)
                .match_daddr_v4(Ipv4Addr::new(127, 0, 0, 0), 8)
                .match_ct_direction(CtDirection::Original)
                .counter()
                .drop()
        })
}

fn family(rule: Rule, v6: bool) -> Rule {
    let number = if v6 { super::nft::NFPROTO_IPV6 } else { super::nft::NFPROTO_IPV4 };
    rule.then(Match::eq(Field::NfProto, number))
}

/// `meta l4proto . th dport`.
pub(super) fn node_port_key() -> SetKeyType {
    SetKeyType::Concat(vec![SetKeyType::InetProto, SetKeyType::InetService])
}

/// `ip daddr . meta l4proto . th dport`.
pub(super) fn external_key(v6: bool) -> SetKeyType {
    let address = if v6 { SetKeyType::Ipv6Addr } else { SetKeyType::Ipv4Addr };
    SetKeyType::Concat(vec![address, SetKeyType::InetProto, SetKeyType::InetService])
}

/// The map of a family's external addresses.
pub(super) fn externals_name(v6: bool) -> &'static str {
    if v6 { "external6" } else { "external4" }
}
