//! What the node has under the tunnels: its addresses there, and the MTU.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use futures_util::TryStreamExt;
use rtnetlink::packet_core::Nla as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeader, AddressHeaderFlags, AddressScope};
use rtnetlink::packet_route::link::{InfoData, InfoTun, LinkAttribute, LinkInfo};
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteProtocol};
use rtnetlink::{Handle, RouteMessageBuilder};
use thiserror::Error;

use super::host::PROTOCOL;

/// What everybody assumes of Ethernet.
const DEFAULT_MTU: u16 = 1500;

/// The underlay cannot be looked at.
#[derive(Debug, Error)]
#[error("cannot read the node's addresses and links: {0}")]
pub struct UnderlayError(#[from] rtnetlink::Error);

/// The node's network below the tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// Addresses of the interface that the default route uses, IPv4 first; for nodes whose object says none.
    pub addresses: Vec<IpAddr>,
    /// The smallest MTU of the interfaces that tunnels may use.
    pub mtu: u16,
}

/// Looks at the interfaces that hold `announced` addresses; without any, at the one of the default route.
pub async fn look(handle: &Handle, announced: &[IpAddr], skip: &str) -> Result<Underlay, UnderlayError> {
    let mut held: Vec<(u32, IpAddr)> = Vec::new();
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses.try_next().await? {
        if message.header.scope != AddressScope::Universe || is_passing(&message.header) {
            continue;
        }
        let local = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let address = local.or_else(|| {
            message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            })
        });
        held.extend(address.map(|ip| (message.header.index, ip)));
    }
    let mut links: Vec<u32> =
        held.iter().filter(|(_, ip)| announced.contains(ip)).map(|(index, _)| *index).collect();
    if links.is_empty() {
        links = default_route_links(handle).await?;
    }
    let mut mtu = None;
    let mut stream = handle.link().get().execute();
    while let Some(link) = stream.try_next().await? {
        let name = link.attributes.iter().find_map(|a| match a {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
        if !links.contains(&link.header.index) || name == Some(skip) {
            continue;
        }
        let this = link.attributes.iter().find_map(|a| match a {
            LinkAttribute::Mtu(mtu) => Some((*mtu).min(u32::from(u16::MAX)) as u16),
            _ => None,
        });
        mtu = mtu.into_iter().chain(this).min();
    }
    held.retain(|(index, _)| links.contains(index));
    let mut addresses: Vec<IpAddr> = held.into_iter().map(|(_, ip)| ip).collect();
    addresses.sort();
    Ok(Underlay { addresses, mtu: mtu.unwrap_or(DEFAULT_MTU) })
}

/// The MTU of the way to whom a socket is connected with, as the kernel knows it now.
pub fn path_mtu(socket: &impl AsRawFd, v6: bool) -> io::Result<u16> {
    let (level, name) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_MTU) } else { (libc::IPPROTO_IP, libc::IP_MTU) };
    let (mut mtu, mut len) = (0 as libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the kernel writes one int and its length, both on our stack.
    let got =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut mtu).cast(), &raw mut len) };
    match got {
        0 => Ok(u16::try_from(mtu).unwrap_or(u16::MAX)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A multi-queue TUN device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    index: u32,
    /// Its name.
    pub name: String,
    /// How many queues somebody has open.
    pub queues: u32,
}

/// The multi-queue TUN devices of this network namespace.
pub async fn tunnels(handle: &Handle) -> Result<Vec<Tunnel>, UnderlayError> {
    /// linux/if_link.h
    const IFLA_TUN_NUM_QUEUES: u16 = 8;
    let mut tunnels = Vec::new();
    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await? {
        let infos = link.attributes.iter().filter_map(|a| match a {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
        let data = infos.flatten().filter_map(|info| match info {
            LinkInfo::Data(InfoData::Tun(data)) => Some(data),
            _ => None,
        });
        let queues = data.flatten().find_map(|item| match item {
            InfoTun::Other(nla) if nla.kind() == IFLA_TUN_NUM_QUEUES => {
                let mut value = [0; 4];
                (nla.value_len() == 4).then(|| nla.emit_value(&mut value))?;
                Some(u32::from_ne_bytes(value))
            }
            _ => None,
        });
        let name = link.attributes.iter().find_map(|a| match a {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        if let (Some(queues), Some(name)) = (queues, name) {
            tunnels.push(Tunnel { index: link.header.index, name, queues });
        }
    }
    Ok(tunnels)
}

/// A device beside `own` that somebody has open and that routes of ours lead into: another agent's.
pub async fn other_agents_tunnel(handle: &Handle, own: &str) -> Result<Option<String>, UnderlayError> {
    let mut others = tunnels(handle).await?;
    others.retain(|tunnel| tunnel.name != own && tunnel.queues > 0);
    if others.is_empty() {
        return Ok(None);
    }
    let ours = route_links(handle, |route| route.protocol == RouteProtocol::Other(PROTOCOL)).await?;
    Ok(others.into_iter().find(|tunnel| ours.contains(&tunnel.index)).map(|tunnel| tunnel.name))
}

/// Addresses that others should not be told: they are about to go, or not yet ours.
fn is_passing(header: &AddressHeader) -> bool {
    // IPv4 calls each further address of a subnet "secondary", by the bit that is "temporary" in IPv6.
    let temporary =
        header.family == AddressFamily::Inet6 && header.flags.contains(AddressHeaderFlags::Secondary);
    let unsettled =
        AddressHeaderFlags::Deprecated | AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
    temporary || header.flags.intersects(unsettled)
}

async fn default_route_links(handle: &Handle) -> Result<Vec<u32>, UnderlayError> {
    let is_default = |route: &RouteHeader| {
        route.destination_prefix_length == 0 && route.table == RouteHeader::RT_TABLE_MAIN
    };
    route_links(handle, is_default).await
}

/// The interfaces of such routes.
async fn route_links(
    handle: &Handle,
    wanted: impl Fn(&RouteHeader) -> bool,
) -> Result<Vec<u32>, UnderlayError> {
    let mut links = Vec::new();
    let queries = [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ];
    for query in queries {
        let mut routes = handle.route().get(query).execute();
        while let Some(route) = routes.try_next().await? {
            if !wanted(&route.header) {
                continue;
            }
            links.extend(route.attributes.iter().find_map(|a| match a {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            }));
        }
    }
    Ok(links)
}
