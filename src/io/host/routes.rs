//! Routes into the tunnel and the policy rule that sends marked replies there.
//!
//! Everything we add carries our own protocol number ([`PROTOCOL`]), as routing daemons do: it is
//! how we know our routes and rules again, after a restart and at cleanup.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::error::errno;
use super::{HostConfig, HostError, MARK, PROTOCOL, RULE_PRIORITY, Report, TABLE};

/// One route of ours: all that we compare.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Route {
    to: IpNet,
    table: u32,
    oif: u32,
    source: Option<IpAddr>,
    mtu: Option<u32>,
}

/// Brings the routes to the wanted ones; returns how many routes the node has in all.
pub(super) async fn apply_routes(
    handle: &Handle,
    oif: u32,
    config: &HostConfig,
    report: &mut Report,
) -> Result<usize, HostError> {
    let wanted = wanted_routes(oif, config);
    let (all, ours) = read_routes(handle).await?;
    let places: HashSet<_> = wanted.iter().map(Route::place).collect();
    let mut have = HashSet::new();
    let mut different = HashSet::new();
    for (route, message) in ours {
        if wanted.contains(&route) && have.insert(route.clone()) {
            continue;
        }
        // Replaced below, with no moment without a route.
        if places.contains(&route.place()) {
            different.insert(route.place());
            continue;
        }
        delete_route(handle, message).await?;
        report.removed(format!("route {}", route.describe(&config.tun)));
    }
    for route in wanted.iter().filter(|route| !have.contains(*route)) {
        if different.contains(&route.place()) {
            replace_route(handle, route, &config.tun, report).await?;
        } else {
            add_route(handle, route, &config.tun, report).await?;
        }
    }
    Ok(all)
}

/// Brings the policy rules to the wanted ones: one per family in use.
pub(super) async fn apply_rules(
    handle: &Handle,
    config: &HostConfig,
    report: &mut Report,
) -> Result<(), HostError> {
    for version in [IpVersion::V4, IpVersion::V6] {
        let wanted = version == IpVersion::V4 || config.has_v6();
        let mut found = false;
        for message in our_rules(handle, version.clone()).await? {
            if wanted && !found && is_right(&message) {
                found = true;
                continue;
            }
            delete_rule(handle, message).await?;
            report.removed(format!("a rule of ours that was wrong ({})", family(&version)));
        }
        if wanted && !found {
            add_rule(handle, &version).await?;
            report.added(format!(
                "rule {RULE_PRIORITY}: fwmark {MARK:#x}/{MARK:#x} lookup {TABLE} ({})",
                family(&version)
            ));
        }
    }
    Ok(())
}

/// Removes every route and rule of ours, in all tables and families; says what.
pub(super) async fn remove_all(handle: &Handle, removed: &mut Vec<String>) -> Result<(), HostError> {
    for version in [IpVersion::V4, IpVersion::V6] {
        for message in our_rules(handle, version.clone()).await? {
            delete_rule(handle, message).await?;
            removed.push(format!("rule {RULE_PRIORITY} ({})", family(&version)));
        }
    }
    for (route, message) in read_routes(handle).await?.1 {
        delete_route(handle, message).await?;
        removed.push(format!("route {} in table {}", route.to, route.table));
    }
    Ok(())
}

/// The interfaces that got their IPv6 default route from a router advertisement.
pub(super) async fn advertised_uplinks(handle: &Handle) -> Result<HashSet<u32>, HostError> {
    let routes = dump(handle, RouteMessageBuilder::<Ipv6Addr>::new().build()).await?;
    Ok(routes
        .iter()
        .filter(|r| r.header.protocol == RouteProtocol::Ra && r.header.destination_prefix_length == 0)
        .filter_map(oif_of)
        .collect())
}

fn wanted_routes(oif: u32, config: &HostConfig) -> HashSet<Route> {
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let v6 = config.has_v6();
    let mut wanted: HashSet<Route> = config
        .tunnel_routes
        .iter()
        .map(|route| Route {
            to: route.range.trunc(),
            table: main,
            oif,
            source: route.source,
            mtu: Some(route.mtu),
        })
        .collect();
    wanted.insert(Route { to: IpAddr::V4(config.loop_v4).into(), table: main, oif, source: None, mtu: None });
    wanted.insert(Route { to: default_v4(), table: TABLE, oif, source: None, mtu: None });
    if v6 {
        let to = IpAddr::V6(config.loop_v6).into();
        wanted.insert(Route { to, table: main, oif, source: None, mtu: None });
        wanted.insert(Route { to: default_v6(), table: TABLE, oif, source: None, mtu: None });
    }
    wanted
}

async fn add_route(handle: &Handle, route: &Route, tun: &str, report: &mut Report) -> Result<(), HostError> {
    match handle.route().add(route.message()).execute().await {
        Ok(()) => report.added(format!("route {}", route.describe(tun))),
        // None of ours was there when we looked: it is somebody else's, and not touched.
        Err(e) if errno(&e) == Some(libc::EEXIST) => report.warn(format!(
            "another program holds the route to {}: traffic to it does not enter {tun}; \
             remove that route (`ip route show {}`)",
            route.to, route.to
        )),
        Err(e) => return Err(HostError::netlink(format!("add route {}", route.describe(tun)), e)),
    }
    Ok(())
}

async fn replace_route(
    handle: &Handle,
    route: &Route,
    tun: &str,
    report: &mut Report,
) -> Result<(), HostError> {
    let request = handle.route().add(route.message()).replace();
    let doing = || format!("replace route {}", route.describe(tun));
    request.execute().await.map_err(|e| HostError::netlink(doing(), e))?;
    report.changed(format!("route {}", route.describe(tun)));
    Ok(())
}

async fn delete_route(handle: &Handle, message: RouteMessage) -> Result<(), HostError> {
    match handle.route().del(message).execute().await {
        Err(e) if errno(&e) != Some(libc::ESRCH) => Err(HostError::netlink("remove a route", e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

async fn read_routes(handle: &Handle) -> Result<(usize, Vec<(Route, RouteMessage)>), HostError> {
    let mut all = dump(handle, RouteMessageBuilder::<Ipv4Addr>::new().build()).await?;
    all.extend(dump(handle, RouteMessageBuilder::<Ipv6Addr>::new().build()).await?);
    let total = all.len();
    let ours = all
        .into_iter()
        .filter(is_ours)
        .filter_map(|message| Some((Route::parse(&message)?, message)))
        .collect();
    Ok((total, ours))
}

/// Whether we added it.
pub(super) fn is_ours(message: &RouteMessage) -> bool {
    message.header.protocol == RouteProtocol::Other(PROTOCOL)
}

/// Where it leads; nothing for a default route.
pub(super) fn destination(message: &RouteMessage) -> Option<IpNet> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(to) => IpNet::new(ip(to)?, message.header.destination_prefix_length).ok(),
        _ => None,
    })
}

async fn dump(handle: &Handle, filter: RouteMessage) -> Result<Vec<RouteMessage>, HostError> {
    let family = filter.header.address_family;
    let routes: Vec<RouteMessage> = match handle.route().get(filter).execute().try_collect().await {
        Ok(routes) => routes,
        // A kernel without IPv6 has no IPv6 routes.
        Err(e) if family == AddressFamily::Inet6 && errno(&e) == Some(libc::EOPNOTSUPP) => Vec::new(),
        Err(e) => return Err(HostError::netlink("list the routes", e)),
    };
    Ok(routes.into_iter().filter(|route| route.header.address_family == family).collect())
}

async fn our_rules(handle: &Handle, version: IpVersion) -> Result<Vec<RuleMessage>, HostError> {
    let v6 = version == IpVersion::V6;
    let rules: Vec<RuleMessage> = match handle.rule().get(version).execute().try_collect().await {
        Ok(rules) => rules,
        Err(e) if v6 && matches!(errno(&e), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => Vec::new(),
        Err(e) => return Err(HostError::netlink("list the policy rules", e)),
    };
    let ours = RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL));
    Ok(rules.into_iter().filter(|rule| rule.attributes.contains(&ours)).collect())
}

fn is_right(rule: &RuleMessage) -> bool {
    let has = |attribute: RuleAttribute| rule.attributes.contains(&attribute);
    // Nothing that narrows it: the kernel adds attributes only for what was asked.
    let narrowed = rule.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            RuleAttribute::Destination(_)
                | RuleAttribute::Source(_)
                | RuleAttribute::Iifname(_)
                | RuleAttribute::Oifname(_)
                | RuleAttribute::IpProtocol(_)
        )
    });
    rule.header.action == RuleAction::ToTable
        && !narrowed
        && has(RuleAttribute::Priority(RULE_PRIORITY))
        && has(RuleAttribute::FwMark(MARK))
        && has(RuleAttribute::FwMask(MARK))
        && has(RuleAttribute::Table(TABLE))
}

async fn add_rule(handle: &Handle, version: &IpVersion) -> Result<(), HostError> {
    let mut request = handle.rule().add().table_id(TABLE).action(RuleAction::ToTable);
    request = request.priority(RULE_PRIORITY).fw_mark(MARK);
    let attributes = &mut request.message_mut().attributes;
    attributes.push(RuleAttribute::FwMask(MARK));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    let result = match version {
        IpVersion::V4 => request.v4().execute().await,
        IpVersion::V6 => request.v6().execute().await,
    };
    match result {
        Err(e) if errno(&e) != Some(libc::EEXIST) => {
            Err(HostError::netlink(format!("add the policy rule ({})", family(version)), e))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

async fn delete_rule(handle: &Handle, message: RuleMessage) -> Result<(), HostError> {
    match handle.rule().del(message).execute().await {
        Err(e) if errno(&e) != Some(libc::ENOENT) => Err(HostError::netlink("remove a policy rule", e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Route {
    /// Where only one can stand.
    fn place(&self) -> (IpNet, u32) {
        (self.to, self.table)
    }

    fn parse(message: &RouteMessage) -> Option<Self> {
        let v4 = message.header.address_family == AddressFamily::Inet;
        let mut route = Route {
            to: if v4 { default_v4() } else { default_v6() },
            table: u32::from(message.header.table),
            oif: oif_of(message)?,
            source: None,
            mtu: None,
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(to) => {
                    route.to = IpNet::new(ip(to)?, message.header.destination_prefix_length).ok()?;
                }
                RouteAttribute::PrefSource(source) => route.source = ip(source),
                RouteAttribute::Table(table) => route.table = *table,
                RouteAttribute::Metrics(metrics) => {
                    route.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Some(route)
    }

    fn message(&self) -> RouteMessage {
        let mut message = match self.to {
            IpNet::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to.network(), to.prefix_len())
                .output_interface(self.oif)
                .table_id(self.table)
                // On the device, with no gateway: what `ip route add ... dev` does.
                .scope(RouteScope::Link)
                .build(),
            IpNet::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to.network(), to.prefix_len())
                .output_interface(self.oif)
                .table_id(self.table)
                .build(),
        };
        message.header.protocol = RouteProtocol::Other(PROTOCOL);
        match self.source {
            Some(IpAddr::V4(a)) => {
                message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet(a)));
            }
            Some(IpAddr::V6(a)) => {
                message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet6(a)));
            }
            None => {}
        }
        if let Some(mtu) = self.mtu {
            message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        }
        message
    }

    fn describe(&self, tun: &str) -> String {
        let mut text = format!("{} dev {tun}", self.to);
        if self.table != u32::from(RouteHeader::RT_TABLE_MAIN) {
            text.push_str(&format!(" table {}", self.table));
        }
        if let Some(source) = self.source {
            text.push_str(&format!(" src {source}"));
        }
        if let Some(mtu) = self.mtu {
            text.push_str(&format!(" mtu {mtu}"));
        }
        text
    }
}

fn oif_of(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    }
}

fn default_v4() -> IpNet {
    IpNet::V4(ipnet::Ipv4Net::default())
}

fn default_v6() -> IpNet {
    IpNet::V6(ipnet::Ipv6Net::default())
}

fn family(version: &IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "IPv4",
        IpVersion::V6 => "IPv6",
    }
}
