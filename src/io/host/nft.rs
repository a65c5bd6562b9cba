//! `table inet warren` and `table bridge warren`: what they hold and how they get into the kernel.
//!
//! | chain (inet) | hook, priority | what for |
//! |---|---|---|
//! | `prerouting` | filter, mangle | remember flows that came out of the tunnel; mark their replies |
//! | `output` | route, mangle | mark replies of the node's own processes, and route them again |
//! | `redirects` | filter output | no ICMP redirect to a pod of this node |
//! | `spoofed` | filter, raw | cluster packets arrive by the tunnel or not at all (encrypted mode), the loop's own address never by another way |
//! | `leak` | filter postrouting | and leave by the tunnel or not at all (encrypted mode) |
//! | `pods` | nat postrouting, srcnat - 5 | pods keep their address in the cluster, are masqueraded to the world |
//!
//! | chain (bridge) | hook, priority | what for |
//! |---|---|---|
//! | `prerouting` | filter, -300 | same-node replies go up to the IP stack, so that the loop can reverse them |
//!
//! Every packet of the node passes most of these, so a rule asks for interface and protocol before it looks into a set.
//!
//! What Services add to translation has a table of its own, see `services`.
//!
//! The kernel is compared with the wanted tables and changed in one transaction, at the generation
//! that was compared: packets see the old rules or the new ones, never a mixture.

use ipnet::IpNet;
use nlink::netlink::nftables::config::{DeclaredTableBuilder, NftablesConfig};
use nlink::netlink::nftables::{
    BaseChain, CtDirection, CtKey, Expr, Family, Field, FilterHook, Match, MetaKey, NFTA_NAT_FAMILY,
    NFTA_NAT_FLAGS, NFTA_NAT_REG_ADDR_MAX, NFTA_NAT_REG_ADDR_MIN, NFTA_NAT_TYPE, NatHook, PacketField,
    PayloadBase, PayloadCsum, PktType, Policy, Priority, RangeOp, RawExpr, Register, Rule, SetElement,
    SetKeyType, Value,
};
use nlink::netlink::{Connection, Nftables};

use super::links::PodBridge;
use super::nla::attribute;
use super::{HostConfig, HostError, MARK, Report, services};

/// The name of the tables here.
pub(super) const NAME: &str = "warren";

/// Packets that another program has already promised to masquerade: the portmap plugin's mark
/// (0x2000) and kube-proxy's `--iptables-masquerade-bit` (14, 0x4000). Theirs must win.
const FOREIGN_MASQUERADE: u64 = 0x6000;

/// NFPROTO_IPV4 and NFPROTO_IPV6, include/uapi/linux/netfilter.h.
pub(super) const NFPROTO_IPV4: u8 = 2;
pub(super) const NFPROTO_IPV6: u8 = 10;
/// Priority names of `nft`: dstnat of the bridge family (NF_BR_PRI_NAT_DST_BRIDGED,
/// include/uapi/linux/netfilter_bridge.h). Before any bridge filter sees the frame.
const BRIDGE_DSTNAT: i32 = -300;
/// ICMP_REDIRECT (RFC 792) and NDISC_REDIRECT (RFC 4861 section 4.5).
const ICMP_REDIRECT: u8 = 5;
const ND_REDIRECT: u8 = 137;
/// IPPROTO_ICMPV6, RFC 4443.
const IPPROTO_ICMPV6: u8 = 58;
/// All of neighbour discovery: router solicitation (133) to redirect (RFC 4861 section 4).
const ND_FIRST: u8 = 133;
const ND_LAST: u8 = ND_REDIRECT;

/// Another commit can land between comparing and committing; then we compare again, so often.
pub(super) const ATTEMPTS: usize = 8;

/// Compares `wanted` with the kernel and commits the difference; says what in `report`.
pub(super) async fn apply(
    connection: &Connection<Nftables>,
    wanted: &NftablesConfig,
    report: &mut Report,
) -> Result<(), nlink::Error> {
    let mut attempt = 1;
    loop {
        let diff = wanted.diff(connection).await?;
        if diff.is_empty() {
            return Ok(());
        }
        match diff.apply(connection).await {
            Err(e) if attempt < ATTEMPTS && (e.is_restart() || e.is_dump_interrupted()) => attempt += 1,
            Err(e) => return Err(e),
            Ok(_) => {
                for table in wanted.tables() {
                    let name = format!("nft table {} {}", table.family(), table.name());
                    if diff.tables().next().is_some() {
                        report.added(name);
                    } else {
                        let (chains, rules) = (diff.chains().count(), diff.rules().count());
                        let sets = diff.sets().count() + diff.elements().count();
                        report.changed(format!("{name}: {chains} chains, {rules} rules, {sets} sets"));
                    }
                }
                return Ok(());
            }
        }
    }
}

/// Removes all tables; says which were there.
pub(super) async fn remove(
    connection: &Connection<Nftables>,
    removed: &mut Vec<String>,
) -> Result<(), HostError> {
    for (family, name) in [(Family::Bridge, NAME), (Family::Inet, services::NAME), (Family::Inet, NAME)] {
        match connection.del_table_if_exists(name, family).await {
            Ok(true) => removed.push(format!("nft table {family} {name}")),
            Ok(false) => {}
            Err(e) if unsupported(&e) => {}
            Err(e) => return Err(HostError::nft(format!("delete nft table {family} {name}"), e)),
        }
    }
    Ok(())
}

/// Whether the kernel says that it has no such family or no nftables at all.
pub(super) fn unsupported(error: &nlink::Error) -> bool {
    error.is_not_supported()
        || matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT | libc::EOPNOTSUPP))
}

/// `table inet warren`, complete.
pub(super) fn inet_table(config: &HostConfig) -> NftablesConfig {
    NftablesConfig::new().table(NAME, Family::Inet, |table| {
        let table = sets(table, config);
        let table = marks(table, config);
        let table = redirects(table, config);
        let table = spoofed(table, config);
        let table = leak(table, config);
        pods(table, config)
    })
}

/// `table bridge warren`, or its absence when nothing needs it.
pub(super) fn bridge_table(config: &HostConfig, bridges: &[PodBridge]) -> NftablesConfig {
    let bridged: Vec<(IpNet, [u8; 6])> = bridges
        .iter()
        .filter_map(|bridge| Some((bridge, bridge.bridge_mac?)))
        .flat_map(|(bridge, mac)| bridge.subnets.iter().map(move |subnet| (*subnet, mac)))
        .collect();
    if !config.services || bridged.is_empty() {
        return NftablesConfig::new().absent_table(NAME, Family::Bridge);
    }
    NftablesConfig::new().table(NAME, Family::Bridge, |table| {
        let mut table =
            address_set(table, ("pods4", "pods6"), &config.pod_ranges).chain("prerouting", |chain| {
                let base = BaseChain::filter(FilterHook::Prerouting, Priority::Custom(BRIDGE_DSTNAT));
                chain.base(base.policy(Policy::Accept)).exclusive()
            });
        if config.has_v6() {
            // Neighbours answer from pod to pod, unicast; a router in between would spoil it (hop
            // limit 255, RFC 4861 section 7.1).
            table = table.rule("prerouting", |rule| {
                rule.match_l4proto(IPPROTO_ICMPV6)
                    .expr(Expr::Payload {
                        dreg: Register::R0,
                        base: PayloadBase::Transport,
                        offset: 0,
                        len: 1,
                    })
                    .expr(Expr::Range {
                        sreg: Register::R0,
                        op: RangeOp::Eq,
                        from: vec![ND_FIRST],
                        to: vec![ND_LAST],
                    })
                    .accept()
            });
        }
        for (subnet, mac) in bridged {
            table = table.rule("prerouting", |rule| take_up(rule, subnet, mac));
        }
        table
    })
}

/// A frame from pod to pod of this node is handed to the IP stack instead of being bridged.
/// `other` leaves out broadcast and multicast. The source's subnet says which bridge it is: `meta ibrname` needs CONFIG_NFT_BRIDGE_META, which not
/// every kernel has.
fn take_up(rule: Rule, subnet: IpNet, mac: [u8; 6]) -> Rule {
    let v6 = subnet.addr().is_ipv6();
    let (_, daddr) = addresses(v6);
    rule.then(Match::eq(Field::PktType, PktType::OtherHost))
        .match_saddr(subnet.addr(), subnet.prefix_len())
        .match_in_set(daddr, set_name("pods", v6))
        .expr(Expr::Immediate { dreg: Register::R0, data: vec![PktType::Host as u8] })
        .expr(Expr::MetaSet { key: MetaKey::PktType, sreg: Register::R0 })
        .expr(Expr::Immediate { dreg: Register::R0, data: mac.to_vec() })
        .expr(Expr::PayloadSet {
            sreg: Register::R0,
            base: PayloadBase::LinkLayer,
            offset: 0, // destination MAC
            len: 6,
            csum: PayloadCsum::None,
            csum_offset: 0,
            l4_pseudo_header: false,
        })
}

fn sets(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    let table = address_set(table, ("pods4", "pods6"), &config.pod_ranges);
    // This node's pods are of the cluster even if nobody said so yet.
    let cluster = [config.cluster_ranges.as_slice(), &config.pod_ranges].concat();
    address_set(table, ("cluster4", "cluster6"), &cluster)
}

/// A flow that came out of the tunnel is remembered in the connection's mark; its replies, and only
/// they, carry the packet mark that the policy rule sends into the tunnel. A mark on every packet
/// from the tunnel would loop.
fn marks(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    let tun = config.tun.as_str();
    table
        .chain("prerouting", |chain| {
            chain.base(BaseChain::filter(FilterHook::Prerouting, Priority::Mangle)).exclusive()
        })
        .rule("prerouting", |rule| {
            rule.match_iif(tun)
                .match_ct_direction(CtDirection::Original)
                .expr(Expr::Ct { dreg: Register::R0, key: CtKey::Mark })
                .expr(Expr::Bitwise {
                    sreg: Register::R0,
                    dreg: Register::R0,
                    len: 4,
                    mask: (!MARK).to_ne_bytes().to_vec(),
                    xor: MARK.to_ne_bytes().to_vec(),
                })
                .expr(Expr::CtSet { key: CtKey::Mark, sreg: Register::R0 })
        })
        .rule("prerouting", |rule| mark_reply(rule.match_iif_not(tun)))
        .chain("output", |chain| chain.base(BaseChain::route(Priority::Mangle)).exclusive())
        .rule("output", mark_reply)
}

fn mark_reply(rule: Rule) -> Rule {
    rule.match_ct_direction(CtDirection::Reply)
        .then(Match::eq(Field::CtMark, Value::Masked { value: u64::from(MARK), mask: u64::from(MARK) }))
        .set_mark_masked(MARK, MARK)
}

/// Packets that the loop sends back out of the bridge they came from make the kernel tell the pod a
/// "better" way that goes round the loop. IPv6 has no sysctl against it.
fn redirects(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    let table = table
        .chain("redirects", |chain| {
            let base = BaseChain::filter(FilterHook::Output, Priority::Filter);
            chain.base(base.policy(Policy::Accept)).exclusive()
        })
        .rule("redirects", |rule| {
            rule.match_icmp_type(ICMP_REDIRECT).match_in_set(PacketField::Ip4Daddr, "pods4").drop()
        });
    if !config.has_v6() {
        return table;
    }
    table.rule("redirects", |rule| {
        rule.match_icmpv6_type(ND_REDIRECT).match_in_set(PacketField::Ip6Daddr, "pods6").drop()
    })
}

/// A packet in clear from another node's pod to the cluster: no node of ours sends one, so a neighbour
/// on the underlay has made it up. Before connection tracking, so that it cannot even take the place of
/// a flow. Sources of this node are left alone, whatever wires its pods; encapsulated packets carry a
/// node's address. To a node's own address on the underlay pods do come in clear, and as themselves
/// where their node does not masquerade, whatever this one does. In plain mode whoever can forge this
/// can forge the outer packet too.
fn spoofed(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    let mut table = table.chain("spoofed", |chain| {
        chain
            .base(BaseChain::filter(FilterHook::Prerouting, Priority::Raw).policy(Policy::Accept))
            .exclusive()
    });
    if config.services {
        table = families(config).fold(table, |table, v6| loop_address(table, config, v6));
    }
    if !config.encrypted {
        return table;
    }
    for v6 in families(config) {
        let (saddr, daddr) = addresses(v6);
        table = table.rule("spoofed", |rule| {
            rule.match_iif_not(&config.tun)
                .match_iif_not("lo")
                .match_in_set(saddr, set_name("cluster", v6))
                .match_not_in_set(saddr, set_name("pods", v6))
                .match_in_set(daddr, set_name("cluster", v6))
                .counter()
                .drop()
                .comment("cluster traffic arrives encrypted or not at all")
        });
    }
    table
}

/// The loop's own address is nobody's: as a source it comes out of the tunnel device only, and as a
/// destination from there and from this node's pods (they answer it). Anybody else would get at NodePorts
/// past `--nodeport-addresses`.
fn loop_address(table: DeclaredTableBuilder, config: &HostConfig, v6: bool) -> DeclaredTableBuilder {
    let (saddr, _) = addresses(v6);
    let elsewhere = |rule: Rule| rule.match_iif_not(&config.tun);
    let dropped =
        |rule: Rule| rule.counter().drop().comment("the loop's own address does not come from outside");
    let from = |rule: Rule| match v6 {
        false => rule.match_saddr_v4(config.loop_v4, 32),
        true => rule.match_saddr_v6(config.loop_v6, 128),
    };
    let to = |rule: Rule| match v6 {
        false => rule.match_daddr_v4(config.loop_v4, 32),
        true => rule.match_daddr_v6(config.loop_v6, 128),
    };
    table
        .rule("spoofed", |rule| dropped(elsewhere(from(rule))))
        .rule("spoofed", |rule| dropped(elsewhere(to(rule).match_not_in_set(saddr, set_name("pods", v6)))))
}

/// A packet for another node's pods that finds no way into the tunnel (device gone, route gone) would
/// follow the default route in clear. Destinations on this node are left alone, whatever wires them.
fn leak(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    let mut table = table.chain("leak", |chain| {
        chain
            .base(BaseChain::filter(FilterHook::Postrouting, Priority::Filter).policy(Policy::Accept))
            .exclusive()
    });
    if !config.encrypted {
        return table;
    }
    for v6 in families(config) {
        let (_, daddr) = addresses(v6);
        table = table.rule("leak", |rule| {
            rule.match_oif_not(&config.tun)
                .match_oif_not("lo")
                .match_in_set(daddr, set_name("cluster", v6))
                .match_not_in_set(daddr, set_name("pods", v6))
                .counter()
                .drop()
                .comment("cluster traffic leaves encrypted or not at all")
        });
    }
    table
}

/// Source translation of pods. Within one hook the first chain that binds a source wins, so this
/// stands before srcnat (100), where the `bridge` plugin's ipMasq and kube-proxy have theirs.
fn pods(table: DeclaredTableBuilder, config: &HostConfig) -> DeclaredTableBuilder {
    let priority = Priority::Custom(Priority::SrcNat.to_i32() - 5);
    let mut table =
        table.chain("pods", |chain| chain.base(BaseChain::nat(NatHook::Postrouting, priority)).exclusive());
    for v6 in families(config) {
        let (saddr, daddr) = addresses(v6);
        let from_pod = |rule: Rule| {
            rule.match_in_set(saddr, set_name("pods", v6))
                .then(Match::eq(Field::Mark, Value::Masked { value: 0, mask: FOREIGN_MASQUERADE }))
        };
        if config.services {
            table = table.rule("pods", |rule| from_loop(rule, config, v6).masquerade());
        }
        table = table
            .rule("pods", |rule| keep_source(from_pod(rule).match_oif(&config.tun), v6))
            .rule("pods", |rule| {
                keep_source(from_pod(rule).match_in_set(daddr, set_name("cluster", v6)), v6)
            });
        if config.masquerade {
            table = table.rule("pods", |rule| no_multicast(from_pod(rule), v6).masquerade());
        }
    }
    table
}

/// What the loop sends as itself to an endpoint outside the mesh: nobody there could answer it. A pod of
/// this node can.
fn from_loop(rule: Rule, config: &HostConfig, v6: bool) -> Rule {
    let (_, daddr) = addresses(v6);
    let rule = match v6 {
        false => rule.match_saddr_v4(config.loop_v4, 32),
        true => rule.match_saddr_v6(config.loop_v6, 128),
    };
    rule.match_not_in_set(daddr, set_name("pods", v6)).match_oif_not(&config.tun).match_oif_not("lo")
}

/// Multicast keeps its sender's address, as the `bridge` plugin's own masquerade leaves it.
fn no_multicast(rule: Rule, v6: bool) -> Rule {
    if v6 {
        rule.match_daddr_v6_not(std::net::Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8)
    } else {
        rule.match_daddr_v4_not(std::net::Ipv4Addr::new(224, 0, 0, 0), 4)
    }
}

/// `snat to ip saddr`: binds the source to what it already is, so that no later chain changes it.
fn keep_source(rule: Rule, v6: bool) -> Rule {
    /// NFT_NAT_SNAT and NF_NAT_RANGE_MAP_IPS (include/uapi/linux/netfilter/nf_tables.h, nf_nat.h).
    const SNAT: u32 = 0;
    const MAP_IPS: u32 = 1;
    let (nfproto, offset, len) = if v6 { (NFPROTO_IPV6, 8, 16) } else { (NFPROTO_IPV4, 12, 4) };
    let number = |kind: u16, value: u32| attribute(kind, &value.to_be_bytes());
    let mut sent = number(NFTA_NAT_TYPE, SNAT);
    sent.extend(number(NFTA_NAT_FAMILY, u32::from(nfproto)));
    sent.extend(number(NFTA_NAT_REG_ADDR_MIN, Register::R0.wire()));
    // The kernel fills in the end of the range and the flag, and shows both.
    let mut shown = sent.clone();
    shown.extend(number(NFTA_NAT_REG_ADDR_MAX, Register::R0.wire()));
    shown.extend(number(NFTA_NAT_FLAGS, MAP_IPS));
    rule.expr(Expr::Payload { dreg: Register::R0, base: PayloadBase::Network, offset, len })
        .expr(RawExpr::new("nat", sent).echo(shown))
}

/// IPv6 rules only where there is IPv6: a kernel built without it refuses them.
pub(super) fn families(config: &HostConfig) -> impl Iterator<Item = bool> {
    std::iter::once(false).chain(config.has_v6().then_some(true))
}

pub(super) fn addresses(v6: bool) -> (PacketField, PacketField) {
    if v6 {
        (PacketField::Ip6Saddr, PacketField::Ip6Daddr)
    } else {
        (PacketField::Ip4Saddr, PacketField::Ip4Daddr)
    }
}

fn set_name(base: &str, v6: bool) -> &'static str {
    match (base, v6) {
        ("pods", false) => "pods4",
        ("pods", true) => "pods6",
        (_, false) => "cluster4",
        (_, true) => "cluster6",
    }
}

/// Two interval sets, one per family. Ranges that overlap or touch are joined first: the kernel
/// refuses an element that overlaps another.
pub(super) fn address_set(
    table: DeclaredTableBuilder,
    (four, six): (&str, &str),
    ranges: &[IpNet],
) -> DeclaredTableBuilder {
    let joined = IpNet::aggregate(&ranges.to_vec());
    let element = |range: &IpNet| match range {
        IpNet::V4(net) => SetElement::ipv4_prefix(net.network(), net.prefix_len()).ok(),
        IpNet::V6(net) => SetElement::ipv6_prefix(net.network(), net.prefix_len()).ok(),
    };
    let of = |v6: bool| joined.iter().filter(move |range| range.addr().is_ipv6() == v6).filter_map(element);
    table
        .set(four, |set| {
            set.key_type(SetKeyType::Ipv4Addr).interval().elements(of(false).collect::<Vec<_>>())
        })
        .set(six, |set| set.key_type(SetKeyType::Ipv6Addr).interval().elements(of(true).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::super::TunnelRoute;
    use super::*;

    fn config(v6: bool) -> HostConfig {
        let all = ["10.244.0.0/16", "10.244.1.0/24", "fd00::/16", "fd00:1::/64"];
        let ranges = |wanted: [usize; 2]| -> Vec<IpNet> {
            wanted
                .iter()
                .map(|i| all[*i].parse().unwrap())
                .filter(|r: &IpNet| v6 || r.addr().is_ipv4())
                .collect()
        };
        let routes = ranges([0, 2]);
        HostConfig {
            tun: "warren0".to_owned(),
            mtu: 1420,
            node_addresses: Vec::new(),
            loop_v4: std::net::Ipv4Addr::new(169, 254, 77, 1),
            loop_v6: std::net::Ipv6Addr::LOCALHOST,
            pod_ranges: ranges([1, 3]),
            tunnel_routes: routes
                .iter()
                .map(|range| TunnelRoute { range: *range, source: None, mtu: 1400 })
                .collect(),
            cluster_ranges: routes,
            masquerade: true,
            encrypted: true,
            services: true,
            yield_services: false,
            service_routes: Vec::new(),
            node_ports: Default::default(),
            externals: Default::default(),
            nodeport_ranges: Vec::new(),
            protected_ports: [(crate::snapshot::service::Protocol::Udp, 51_820)].into(),
            host_addresses: vec!["192.0.2.1".parse().unwrap()],
            nodeport_localhost: false,
        }
    }

    fn bridge() -> PodBridge {
        let subnets = vec!["10.244.1.0/24".parse().unwrap()];
        PodBridge { name: "cbr0".to_owned(), bridge_mac: Some([2, 0, 0, 0, 0, 1]), subnets }
    }

    #[test]
    fn the_tables_are_valid_and_have_ipv6_only_where_there_is_any() {
        for v6 in [false, true] {
            let config = config(v6);
            let config = HostConfig { nodeport_localhost: true, ..config };
            let greedy = ["10.244.1.5", "fd00:1::5"].map(|pod| pod.parse().unwrap()).into();
            let services = [None, Some(&greedy)].map(|pressed| services::table(&config, pressed));
            let tables = [inet_table(&config), bridge_table(&config, &[bridge()])];
            for table in tables.into_iter().chain(services) {
                table.validate().unwrap();
                let rules = table.tables()[0].rules();
                let six = |rule: &Rule| rule.nft_syntax().is_some_and(|text| text.contains("v6 "));
                assert!(v6 || !rules.iter().any(|rule| six(rule.body())), "IPv6 in an IPv4 cluster");
            }
        }
    }

    #[test]
    fn without_services_or_a_bridge_there_is_no_bridge_table() {
        let with = config(true);
        let without = HostConfig { services: false, ..config(true) };
        let routed = PodBridge { bridge_mac: None, ..bridge() };
        for table in [
            bridge_table(&without, &[bridge()]),
            bridge_table(&with, &[]),
            // The `ptp` plugin's: an interface per pod, nothing to bridge.
            bridge_table(&with, &[routed]),
        ] {
            assert!(table.tables().is_empty());
            assert_eq!(table.absent_tables(), [(Family::Bridge, NAME.to_owned())]);
        }
    }
}
