//! The tunnel device and the pod bridges: what there is, and the device brought up with its
//! addresses and MTU.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkUnspec};

use super::error::errno;
use super::{HostConfig, HostError, Report};

/// One interface, as far as we care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) kind: Option<InfoKind>,
    pub(super) mac: Option<[u8; 6]>,
}

/// An interface that holds an address of this node's pod ranges: where its pods are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodBridge {
    pub(super) name: String,
    /// Set when it is a bridge: same-node frames cross it without meeting the IP stack.
    pub(super) bridge_mac: Option<[u8; 6]>,
    /// The pods behind it, as far as its own addresses tell.
    pub(super) subnets: Vec<IpNet>,
}

/// All interfaces and addresses at one moment.
#[derive(Debug)]
pub(super) struct Interfaces {
    pub(super) links: Vec<Link>,
    addresses: Vec<(u32, IpAddr, u8, AddressMessage)>,
}

impl Interfaces {
    pub(super) async fn read(handle: &Handle) -> Result<Self, HostError> {
        let links: Vec<LinkMessage> = handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| HostError::netlink("list the interfaces", e))?;
        let addresses: Vec<AddressMessage> = handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| HostError::netlink("list the addresses", e))?;
        Ok(Self {
            links: links.into_iter().filter_map(link).collect(),
            addresses: addresses.into_iter().filter_map(address).collect(),
        })
    }

    pub(super) fn by_name(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// The interfaces, other than `tun`, that hold an address of the pod ranges, sorted by name.
    pub(super) fn pod_bridges(&self, tun: &str, pod_ranges: &[IpNet]) -> Vec<PodBridge> {
        let mut found: BTreeMap<&str, PodBridge> = BTreeMap::new();
        for (index, address, prefix, _) in &self.addresses {
            let Some(range) = pod_ranges.iter().find(|range| range.contains(address)) else { continue };
            let Some(link) = self.links.iter().find(|l| l.index == *index && l.name != tun) else { continue };
            let bridge = found.entry(&link.name).or_insert_with(|| PodBridge {
                name: link.name.clone(),
                bridge_mac: link.mac.filter(|_| link.kind == Some(InfoKind::Bridge)),
                subnets: Vec::new(),
            });
            // A gateway with a host prefix says nothing of the pods behind it.
            let subnet = IpNet::new(*address, *prefix).map(|net| net.trunc());
            let wide = subnet.ok().filter(|net| net.prefix_len() < net.max_prefix_len());
            bridge.subnets.push(wide.filter(|net| range.contains(net)).unwrap_or(*range).trunc());
        }
        found.into_values().collect()
    }

    fn on(&self, index: u32) -> impl Iterator<Item = &(u32, IpAddr, u8, AddressMessage)> {
        self.addresses.iter().filter(move |(on, _, _, _)| *on == index)
    }
}

/// Sets the MTU. First of all: below 1,280 the device has no IPv6, nor any IPv6 setting.
pub(super) async fn apply_mtu(
    handle: &Handle,
    tun: &Link,
    mtu: u32,
    report: &mut Report,
) -> Result<(), HostError> {
    if tun.mtu == mtu {
        return Ok(());
    }
    let message = LinkUnspec::new_with_index(tun.index).mtu(mtu).build();
    let doing = format!("set the MTU of {} to {mtu}", tun.name);
    handle.link().set(message).execute().await.map_err(|e| HostError::netlink(doing, e))?;
    report.changed(format!("MTU of {} from {} to {mtu}", tun.name, tun.mtu));
    Ok(())
}

/// Brings the device up with its addresses. They come before routes: a route's preferred source must
/// already be local.
pub(super) async fn apply(
    handle: &Handle,
    interfaces: &Interfaces,
    tun: &Link,
    config: &HostConfig,
    report: &mut Report,
) -> Result<(), HostError> {
    if !tun.up {
        let message = LinkUnspec::new_with_index(tun.index).up().build();
        let doing = format!("bring {} up", tun.name);
        handle.link().set(message).execute().await.map_err(|e| HostError::netlink(doing, e))?;
        report.changed(format!("link {} up", tun.name));
    }
    addresses(handle, interfaces, tun, config, report).await
}

/// Removes the tunnel device. Its addresses and routes go with it.
pub(super) async fn remove(handle: &Handle, tun: &Link) -> Result<(), HostError> {
    let doing = format!("delete {}", tun.name);
    handle.link().del(tun.index).execute().await.map_err(|e| HostError::netlink(doing, e))
}

async fn addresses(
    handle: &Handle,
    interfaces: &Interfaces,
    tun: &Link,
    config: &HostConfig,
    report: &mut Report,
) -> Result<(), HostError> {
    for &wanted in &config.node_addresses {
        let prefix = if wanted.is_ipv4() { 32 } else { 128 };
        if interfaces.on(tun.index).any(|(_, have, length, _)| *have == wanted && *length == prefix) {
            continue;
        }
        let mut request = handle.address().add(tun.index, wanted, prefix);
        if wanted.is_ipv6() {
            // A tunnel has no neighbours to ask; a tentative address could not be a route's source.
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        match request.execute().await {
            Ok(()) => report.added(format!("address {wanted}/{prefix} on {}", tun.name)),
            // Another packet of ours, or a person, was faster: it is there.
            Err(e) if errno(&e) == Some(libc::EEXIST) => {}
            Err(e) => {
                return Err(HostError::netlink(format!("add address {wanted} to {}", tun.name), e));
            }
        }
    }
    // The device is ours alone: whatever else is on it is an older node address of ours, or a
    // link-local one that would make the kernel talk (MLD, RS) into the tunnel.
    for (_, have, length, message) in interfaces.on(tun.index) {
        let prefix = if have.is_ipv4() { 32 } else { 128 };
        if *length == prefix && config.node_addresses.contains(have) {
            continue;
        }
        match handle.address().del(message.clone()).execute().await {
            Ok(()) => report.removed(format!("address {have}/{length} from {}", tun.name)),
            Err(e) if errno(&e) == Some(libc::EADDRNOTAVAIL) => {}
            Err(e) => {
                return Err(HostError::netlink(format!("remove address {have} from {}", tun.name), e));
            }
        }
    }
    Ok(())
}

fn link(message: LinkMessage) -> Option<Link> {
    let mut found = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        kind: None,
        mac: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name = name,
            LinkAttribute::Mtu(mtu) => found.mtu = mtu,
            LinkAttribute::Address(mac) => found.mac = mac.try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                found.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (!found.name.is_empty()).then_some(found)
}

fn address(message: AddressMessage) -> Option<(u32, IpAddr, u8, AddressMessage)> {
    // IFA_LOCAL is the address itself; IFA_ADDRESS is the far end of a point-to-point link, and for
    // IPv6 the only one there is (rtnetlink(7)).
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let far = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    let ip = local.or(far)?;
    Some((message.header.index, ip, message.header.prefix_len, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interfaces(links: &[(u32, &str, InfoKind)], addresses: &[(u32, &str)]) -> Interfaces {
        let link = |(index, name, kind): &(u32, &str, InfoKind)| Link {
            index: *index,
            name: (*name).to_owned(),
            mtu: 1500,
            up: true,
            kind: Some(kind.clone()),
            mac: Some([2, 0, 0, 0, 0, 1]),
        };
        let address = |(index, net): &(u32, &str)| {
            let net: IpNet = net.parse().unwrap();
            (*index, net.addr(), net.prefix_len(), AddressMessage::default())
        };
        Interfaces {
            links: links.iter().map(link).collect(),
            addresses: addresses.iter().map(address).collect(),
        }
    }

    #[test]
    fn a_pod_bridge_is_what_holds_an_address_of_the_pod_ranges() {
        let ranges: Vec<IpNet> = ["10.244.1.0/24", "fd00:1::/64"].map(|r| r.parse().unwrap()).to_vec();
        let found = interfaces(
            &[(1, "warren0", InfoKind::Tun), (2, "cbr0", InfoKind::Bridge), (3, "docker0", InfoKind::Bridge)],
            &[(1, "10.244.1.0/32"), (2, "10.244.1.1/24"), (2, "fd00:1::1/64"), (3, "172.17.0.1/16")],
        )
        .pod_bridges("warren0", &ranges);
        let wanted =
            PodBridge { name: "cbr0".to_owned(), bridge_mac: Some([2, 0, 0, 0, 0, 1]), subnets: ranges };
        assert_eq!(found, [wanted]);
    }

    #[test]
    fn an_interface_per_pod_is_not_bridged_and_a_wide_gateway_covers_no_more_than_our_pods() {
        let ranges: Vec<IpNet> = vec!["10.244.1.0/24".parse().unwrap()];
        let found = interfaces(
            &[(2, "veth1", InfoKind::Veth), (3, "br0", InfoKind::Bridge)],
            &[(2, "10.244.1.1/32"), (3, "10.244.1.1/16")],
        )
        .pod_bridges("warren0", &ranges);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|bridge| bridge.subnets == ranges));
        assert!(found.iter().any(|bridge| bridge.name == "veth1" && bridge.bridge_mac.is_none()));
    }
}
