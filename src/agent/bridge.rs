//! The bridge of our own list of plugins, `warren-br0`.
//!
//! The plugin `bridge` would make it with the first pod, with an address that follows whichever pod's interface has
//! the lowest one: the gateway's address would change under the other pods. So it is made here first, with an address
//! of its own that stays. It goes with `--cleanup`, unless pods still hang on it.

use std::hash::Hasher as _;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec};
use siphasher::sip::SipHasher24;

use crate::cni::conflist::BRIDGE;

/// What there is of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    /// Something else than a bridge.
    Other,
    Bridge {
        index: u32,
        address: Vec<u8>,
        /// How many interfaces hang on it.
        ports: usize,
    },
}

/// What became of the bridge at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    /// There was none.
    Absent,
    Removed,
    /// So many pods hang on it.
    Kept(usize),
}

/// Makes the bridge, or fixes the address of the one that is there. `fixed`: the interface whose address has been.
pub(super) async fn make(handle: &Handle, node: &str, fixed: &mut Option<u32>) -> Result<(), String> {
    let fail = |doing: &str, error: rtnetlink::Error| format!("cannot {doing} the bridge {BRIDGE}: {error}");
    let look = async || find(handle).await.map_err(|error| fail("look for", error));
    match look().await? {
        Found::Nothing => {
            let message = LinkBridge::new(BRIDGE).address(address(node).to_vec()).up().build();
            match handle.link().add(message).execute().await {
                // Somebody was faster: a pod, whose bridge is as good.
                Err(error) if look().await? == Found::Nothing => Err(fail("make", error)),
                Ok(()) | Err(_) => Ok(()),
            }
        }
        Found::Other => {
            Err(format!("{BRIDGE} is there and is no bridge: remove it (`ip link delete {BRIDGE}`)"))
        }
        Found::Bridge { index, address: found, .. } => {
            if !wants_fixing(index, &found, node, *fixed) {
                return Ok(());
            }
            // Set by somebody, be it to what it is, an address does not follow the ports any more (br_stp_if.c). Pods
            // know the one that it has.
            let message = LinkUnspec::new_with_index(index).address(found).build();
            handle.link().set(message).execute().await.map_err(|error| fail("set", error))?;
            *fixed = Some(index);
            Ok(())
        }
    }
}

/// Once for each bridge, and never for one that was made here: to set an address, be it to what it is, takes every
/// neighbour off the interface, the permanent ones too (arp_netdev_event in net/ipv4/arp.c).
fn wants_fixing(index: u32, found: &[u8], node: &str, fixed: Option<u32>) -> bool {
    fixed != Some(index) && found != address(node)
}

/// Takes it away, if no pod needs it.
pub(super) async fn remove(handle: &Handle) -> Result<Removal, rtnetlink::Error> {
    match find(handle).await? {
        Found::Nothing | Found::Other => Ok(Removal::Absent),
        Found::Bridge { ports: 0, index, .. } => {
            handle.link().del(index).execute().await.map(|()| Removal::Removed)
        }
        Found::Bridge { ports, .. } => Ok(Removal::Kept(ports)),
    }
}

async fn find(handle: &Handle) -> Result<Found, rtnetlink::Error> {
    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    Ok(found(&links))
}

fn found(links: &[LinkMessage]) -> Found {
    let named = |link: &&LinkMessage| link.attributes.contains(&LinkAttribute::IfName(BRIDGE.to_owned()));
    let Some(link) = links.iter().find(named) else { return Found::Nothing };
    let index = link.header.index;
    let is_bridge = link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    });
    if !is_bridge {
        return Found::Other;
    }
    let address = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => Some(address.clone()),
        _ => None,
    });
    let ports = links.iter().filter(|port| port.attributes.contains(&LinkAttribute::Controller(index)));
    Found::Bridge { index, address: address.unwrap_or_default(), ports: ports.count() }
}

/// Locally administered, and the same for the node each time.
fn address(node: &str) -> [u8; 6] {
    let mut hasher = SipHasher24::new_with_keys(0x7761_7272_656e, 0x6272_3000);
    hasher.write(node.as_bytes());
    let [a, b, c, d, e, ..] = hasher.finish().to_be_bytes();
    [0x02, a, b, c, d, e]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        (message.header.index, message.attributes) = (index, attributes);
        message
    }

    #[test]
    fn the_bridge_and_its_ports_are_found() {
        let name = |name: &str| LinkAttribute::IfName(name.to_owned());
        let kind = |kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
        let bridge = link(7, vec![name(BRIDGE), kind(InfoKind::Bridge), LinkAttribute::Address(vec![2; 6])]);
        let port =
            |index, on| link(index, vec![name("veth"), kind(InfoKind::Veth), LinkAttribute::Controller(on)]);
        assert_eq!(found(&[port(8, 7)]), Found::Nothing);
        assert_eq!(found(&[link(7, vec![name(BRIDGE), kind(InfoKind::Dummy)])]), Found::Other);
        let with = |ports| Found::Bridge { index: 7, address: vec![2; 6], ports };
        assert_eq!(found(&[bridge.clone(), port(8, 9)]), with(0));
        assert_eq!(found(&[port(8, 7), bridge, port(9, 7)]), with(2));
    }

    #[test]
    fn an_address_is_fixed_once_and_ours_never() {
        for (index, found, fixed, expected) in [
            (7, address("a"), None, false),
            (7, address("b"), None, true),
            (7, [2; 6], Some(7), false),
            // Somebody has made it anew.
            (8, [2; 6], Some(7), true),
        ] {
            assert_eq!(wants_fixing(index, &found, "a", fixed), expected, "{index} {found:?} {fixed:?}");
        }
    }

    #[test]
    fn each_node_has_its_own_unicast_address() {
        assert_eq!(address("a"), address("a"));
        assert_ne!(address("a"), address("b"));
        assert_eq!(address("a")[0] & 0b11, 0b10);
    }
}
