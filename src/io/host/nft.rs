//! `table inet warren` and `table bridge warren`: what they hold and how they get into the kernel.
//!
//! | chain (inet) | hook, priority | what for |
//! |---|---|---|
//! | `prerouting` | filter, mangle | remember flows that came out of the tunnel; mark their replies |
//! | `output` | route, mangle | mark replies of the node's own processes, and route them again |
//! | `redirects` | filter output | no ICMP redirect towards a pod bridge |
//! | `leak` | filter postrouting | cluster packets leave by the tunnel or not at all (encrypted mode) |
//! | `pods` | nat postrouting, srcnat - 5 | pods keep their address in the cluster, are masqueraded to the world |
//!
//! | chain (bridge) | hook, priority | what for |
//! |---|---|---|
//! | `prerouting` | filter, -300 | same-node replies go up to the IP stack, so that the loop can reverse them |
//!
//! Services will add one map (`local address . proto . port` to loop address and port) with one rule
//! each in a dnat chain of prerouting and output; nothing here has to move for that.
//!
//! The kernel is compared with the wanted tables and changed in one transaction, at the generation
//! that was compared: packets see the old rules or the new ones, never a mixture.

use ipnet::IpNet;
use nlink::netlink::nftables::config::{DeclaredTableBuilder, NftablesConfig};
use nlink::netlink::nftables::{
    BaseChain, CtDirection, CtKey, Expr, Family, Field, FilterHook, Match, MetaKey, NFTA_NAT_FAMILY,
    NFTA_NAT_FLAGS, NFTA_NAT_REG_ADDR_MAX, NFTA_NAT_REG_ADDR_MIN, NFTA_NAT_TYPE, NatHook, PacketField,
    PayloadBase, PayloadCsum, PktType, Policy, Priority, RawExpr, Register, Rule, SetElement, SetKeyType,
    Value,
};
use nlink::netlink::{Connection, Nftables};

use super::links::PodBridge;
use super::nla::attribute;
use super::{HostConfig, HostError, MARK, Report};

/// The name of both tables.
pub(super) const NAME: &str = "warren";

/// Packets that another program has already promised to masquerade: the portmap plugin's mark
/// (0x2000) and kube-proxy's `--iptables-masquerade-bit` (14, 0x4000). Theirs must win.
const FOREIGN_MASQUERADE: u64 = 0x6000;

/// NFPROTO_IPV4 and NFPROTO_IPV6, include/uapi/linux/netfilter.h.
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
/// Priority names of `nft`: dstnat of the bridge family (NF_BR_PRI_NAT_DST_BRIDGED,
/// include/uapi/linux/netfilter_bridge.h). Before any bridge filter sees the frame.
const BRIDGE_DSTNAT: i32 = -300;
/// ICMP_REDIRECT (RFC 792) and NDISC_REDIRECT (RFC 4861 section 4.5).
const ICMP_REDIRECT: u8 = 5;
const ND_REDIRECT: u8 = 137;

/// Another commit can land between comparing and committing; then we compare again, so often.
const ATTEMPTS: usize = 8;

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

/// Removes both tables; says which were there.
pub(super) async fn remove(
    connection: &Connection<Nftables>,
    removed: &mut Vec<String>,
) -> Result<(), HostError> {
    for family in [Family::Bridge, Family::Inet] {
        match connection.del_table_if_exists(NAME, family).await {
            Ok(true) => removed.push(format!("nft table {family} {NAME}")),
            Ok(false) => {}
            Err(e) if unsupported(&e) => {}
            Err(e) => return Err(HostError::nft(format!("delete nft table {family} {NAME}"), e)),
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
pub(super) fn inet_table(config: &HostConfig, bridges: &[PodBridge]) -> NftablesConfig {
    NftablesConfig::new().table(NAME, Family::Inet, |table| {
        let table = sets(table, config);
        let table = marks(table, config);
        let table = redirects(table, bridges);
        let table = leak(table, config);
        pods(table, config, bridges)
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
        let mut table = address_set(table, "pods", &config.pod_ranges).chain("prerouting", |chain| {
            let base = BaseChain::filter(FilterHook::Prerouting, Priority::Custom(BRIDGE_DSTNAT));
            chain.base(base.policy(Policy::Accept)).exclusive()
        });
        for (subnet, mac) in bridged {
            table = table.rule("prerouting", |rule| take_up(rule, subnet, mac));
        }
        table
    })
}

/// A frame from pod to pod of this node is handed to the IP stack instead of being bridged.
/// `other` leaves out broadcast and multicast; ARP and ND have no pod source or are multicast. The
/// source's subnet says which bridge it is: `meta ibrname` needs CONFIG_NFT_BRIDGE_META, which not
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
    let table = address_set(table, "pods", &config.pod_ranges);
    address_set(table, "cluster", &config.cluster_ranges)
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
fn redirects(table: DeclaredTableBuilder, bridges: &[PodBridge]) -> DeclaredTableBuilder {
    let mut table = table.chain("redirects", |chain| {
        chain.base(BaseChain::filter(FilterHook::Output, Priority::Filter).policy(Policy::Accept)).exclusive()
    });
    for bridge in bridges {
        table = table
            .rule("redirects", |rule| rule.match_oif(&bridge.name).match_icmp_type(ICMP_REDIRECT).drop())
            .rule("redirects", |rule| rule.match_oif(&bridge.name).match_icmpv6_type(ND_REDIRECT).drop());
    }
    table
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
    for v6 in [false, true] {
        let (_, daddr) = addresses(v6);
        table = table.rule("leak", |rule| {
            rule.match_in_set(daddr, set_name("cluster", v6))
                .match_not_in_set(daddr, set_name("pods", v6))
                .match_oif_not(&config.tun)
                .match_oif_not("lo")
                .counter()
                .drop()
                .comment("cluster traffic leaves encrypted or not at all")
        });
    }
    table
}

/// Source translation of pods. Within one hook the first chain that binds a source wins, so this
/// stands before srcnat (100), where the `bridge` plugin's ipMasq and kube-proxy have theirs.
fn pods(table: DeclaredTableBuilder, config: &HostConfig, bridges: &[PodBridge]) -> DeclaredTableBuilder {
    let priority = Priority::Custom(Priority::SrcNat.to_i32() - 5);
    let mut table =
        table.chain("pods", |chain| chain.base(BaseChain::nat(NatHook::Postrouting, priority)).exclusive());
    for v6 in [false, true] {
        let (saddr, daddr) = addresses(v6);
        let from_pod = |rule: Rule| {
            rule.match_in_set(saddr, set_name("pods", v6))
                .then(Match::eq(Field::Mark, Value::Masked { value: 0, mask: FOREIGN_MASQUERADE }))
        };
        table = table
            .rule("pods", |rule| keep_source(from_pod(rule).match_oif(&config.tun), v6))
            .rule("pods", |rule| {
                keep_source(from_pod(rule).match_in_set(daddr, set_name("cluster", v6)), v6)
            });
        if config.masquerade {
            table = table.rule("pods", |mut rule| {
                rule = from_pod(rule);
                for bridge in bridges {
                    rule = rule.match_oif_not(&bridge.name);
                }
                no_multicast(rule, v6).masquerade()
            });
        }
    }
    table
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

fn addresses(v6: bool) -> (PacketField, PacketField) {
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
fn address_set(table: DeclaredTableBuilder, base: &str, ranges: &[IpNet]) -> DeclaredTableBuilder {
    let joined = IpNet::aggregate(&ranges.to_vec());
    let element = |range: &IpNet| match range {
        IpNet::V4(net) => SetElement::ipv4_prefix(net.network(), net.prefix_len()).ok(),
        IpNet::V6(net) => SetElement::ipv6_prefix(net.network(), net.prefix_len()).ok(),
    };
    let of = |v6: bool| joined.iter().filter(move |range| range.addr().is_ipv6() == v6).filter_map(element);
    table
        .set(set_name(base, false), |set| {
            set.key_type(SetKeyType::Ipv4Addr).interval().elements(of(false).collect::<Vec<_>>())
        })
        .set(set_name(base, true), |set| {
            set.key_type(SetKeyType::Ipv6Addr).interval().elements(of(true).collect::<Vec<_>>())
        })
}
