//! What stands in the sets of `table inet warren-services`: tens of thousands of elements.
//!
//! A change is written without reading anything back ([`change`]), at the generation of nftables at which
//! the sets were last known to be right; if anything else has changed since, the kernel refuses it. The
//! look at everything ([`compare`]) lists them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use nlink::netlink::nftables::{Family, Set, SetDataType, SetElement, SetElementData, SetKeyType};
use nlink::netlink::{Connection, Nftables};

use super::nft::{ATTEMPTS, families};
use super::services::{NAME, NODE_PORTS, external_key, externals_name, node_port_key};
use super::stale::Changed;
use super::{HostConfig, next_generation};
use crate::snapshot::service::{Listen, Protocol};

/// Elements in one netlink message: its nest holds 65,535 bytes, and an IPv6 element takes 68.
const CHUNK: usize = 512;
/// Chunks in one transaction, which goes out in one piece: it has to fit a socket's buffer, 212,992 bytes
/// where nobody has changed net.core.wmem_default.
const CHUNKS: usize = 4;

/// The elements of the sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Elements {
    node_ports: Arc<BTreeSet<(Protocol, u16)>>,
    externals: Arc<BTreeMap<Listen, u16>>,
    v6: bool,
}

/// One set, what is to be taken out of it and put into it.
struct Write {
    set: Set,
    gone: Vec<SetElement>,
    new: Vec<SetElement>,
}

impl Elements {
    pub(super) fn of(config: &HostConfig) -> Elements {
        let (node_ports, externals) = (Arc::clone(&config.node_ports), Arc::clone(&config.externals));
        Elements { node_ports, externals, v6: config.has_v6() }
    }
}

/// What was written.
#[derive(Debug)]
pub(super) struct Written {
    /// The generation after that.
    pub(super) generation: u32,
    /// How many elements it was.
    pub(super) count: usize,
}

/// Writes the difference, `from` being what the kernel had at `generation`. Fails with ERESTART where something
/// else has changed since. `udp`: what was changed of UDP, also before a failure.
pub(super) async fn change(
    connection: &Connection<Nftables>,
    generation: u32,
    from: &Elements,
    to: &Elements,
    udp: &mut Changed,
) -> Result<Written, nlink::Error> {
    let gone = from.node_ports.difference(&to.node_ports).map(node_port).collect();
    let new = to.node_ports.difference(&from.node_ports).map(node_port).collect();
    let mut writes = vec![Write { set: node_ports_set(), gone, new }];
    let same = Arc::ptr_eq(&from.externals, &to.externals);
    for v6 in [false, true].into_iter().filter(|v6| !same && (!v6 || to.v6)) {
        let differing = |one: &BTreeMap<Listen, u16>, other: &BTreeMap<Listen, u16>| -> Vec<SetElement> {
            let different = |(at, to): &(&Listen, &u16)| other.get(at) != Some(to);
            of_family(one, v6).filter(different).map(external).collect()
        };
        writes.push(Write {
            set: externals_set(v6),
            gone: differing(&from.externals, &to.externals),
            new: differing(&to.externals, &from.externals),
        });
    }
    write(connection, generation, &writes, udp).await
}

/// Lists the sets and makes them as they should be, again where somebody else changes something meanwhile.
pub(super) async fn compare(
    connection: &Connection<Nftables>,
    config: &HostConfig,
    udp: &mut Changed,
) -> Result<Written, nlink::Error> {
    let mut attempt = 1;
    loop {
        match compare_once(connection, config, udp).await {
            Err(e) if attempt < ATTEMPTS && (e.is_restart() || e.is_dump_interrupted()) => attempt += 1,
            outcome => return outcome,
        }
    }
}

async fn compare_once(
    connection: &Connection<Nftables>,
    config: &HostConfig,
    udp: &mut Changed,
) -> Result<Written, nlink::Error> {
    let generation = connection.generation().await?;
    let ports = config.node_ports.iter().map(node_port).collect();
    let mut writes = vec![difference(connection, NODE_PORTS, node_ports_set(), ports).await?];
    for v6 in families(config) {
        let wanted = of_family(&config.externals, v6).map(external).collect();
        writes.push(difference(connection, externals_name(v6), externals_set(v6), wanted).await?);
    }
    write(connection, generation, &writes, udp).await
}

async fn difference(
    connection: &Connection<Nftables>,
    name: &str,
    set: Set,
    wanted: Vec<SetElement>,
) -> Result<Write, nlink::Error> {
    let have = connection.list_set_elements(NAME, name, Family::Inet).await?;
    let mut have: HashMap<&[u8], &SetElement> = have.iter().map(|element| (element.key(), element)).collect();
    let (mut gone, mut new) = (Vec::new(), Vec::new());
    for element in wanted {
        match have.remove(element.key()) {
            Some(there) if same_value(there, &element) => {}
            Some(_) => {
                gone.push(element.clone());
                new.push(element);
            }
            None => new.push(element),
        }
    }
    gone.extend(have.into_values().cloned());
    Ok(Write { set, gone, new })
}

/// The kernel shows a value in whole words.
fn same_value(one: &SetElement, other: &SetElement) -> bool {
    fn value(element: &SetElement) -> Option<&[u8]> {
        match element.data() {
            Some(SetElementData::Value(value)) => Some(value.get(..2).unwrap_or(value)),
            _ => None,
        }
    }
    value(one) == value(other)
}

async fn write(
    connection: &Connection<Nftables>,
    mut generation: u32,
    writes: &[Write],
    udp: &mut Changed,
) -> Result<Written, nlink::Error> {
    // An element that leads elsewhere now is in both: first all out, then all in.
    let gone = writes.iter().flat_map(|write| chunks(write, &write.gone, true));
    let chunks: Vec<_> =
        gone.chain(writes.iter().flat_map(|write| chunks(write, &write.new, false))).collect();
    for chunks in chunks.chunks(CHUNKS) {
        let transaction = connection.transaction().expect_generation(generation);
        let transaction = chunks.iter().fold(transaction, |transaction, (set, elements, gone)| match gone {
            true => transaction.del_set_elements(set, elements),
            false => transaction.add_set_elements(set, elements),
        });
        transaction.commit(connection).await?;
        chunks.iter().flat_map(|(_, elements, _)| *elements).for_each(|element| note_udp(element.key(), udp));
        generation = next_generation(generation);
    }
    let count = writes.iter().map(|write| write.gone.len() + write.new.len()).sum();
    Ok(Written { generation, count })
}

/// A key ends in the protocol and the port, a word each; before them stands an address, or nothing.
fn note_udp(key: &[u8], udp: &mut Changed) {
    let Some((address, &[protocol, _, _, _, high, low, _, _])) = key.split_last_chunk::<8>() else { return };
    if Protocol::of(protocol) != Some(Protocol::Udp) {
        return;
    }
    let port = u16::from_be_bytes([high, low]);
    if address.is_empty() {
        udp.ports.insert(port);
    } else if let Ok(four) = <[u8; 4]>::try_from(address) {
        udp.externals.insert((IpAddr::from(four), port));
    } else if let Ok(six) = <[u8; 16]>::try_from(address) {
        udp.externals.insert((IpAddr::from(six), port));
    }
}

fn chunks<'a>(
    write: &'a Write,
    elements: &'a [SetElement],
    gone: bool,
) -> impl Iterator<Item = (&'a Set, &'a [SetElement], bool)> {
    elements.chunks(CHUNK).map(move |chunk| (&write.set, chunk, gone))
}

fn of_family(externals: &BTreeMap<Listen, u16>, v6: bool) -> impl Iterator<Item = (&Listen, &u16)> {
    externals.iter().filter(move |(at, _)| at.address.is_ipv6() == v6)
}

fn node_ports_set() -> Set {
    Set::new(NAME, NODE_PORTS).key_type(node_port_key())
}

fn externals_set(v6: bool) -> Set {
    let set = Set::new(NAME, externals_name(v6)).key_type(external_key(v6));
    set.map(SetDataType::Value(SetKeyType::InetService))
}

pub(super) fn node_port((protocol, port): &(Protocol, u16)) -> SetElement {
    SetElement::concat([SetElement::inet_proto(protocol.number()), SetElement::port(*port)])
}

fn external((at, to): (&Listen, &u16)) -> SetElement {
    let address = match at.address {
        IpAddr::V4(address) => SetElement::ipv4(address),
        IpAddr::V6(address) => SetElement::ipv6(address),
    };
    let port = [SetElement::inet_proto(at.protocol.number()), SetElement::port(at.port)];
    SetElement::concat([address].into_iter().chain(port)).value(SetElement::port(*to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generation_leaves_zero_out() {
        assert_eq!(next_generation(7), 8);
        assert_eq!(next_generation(u32::MAX), 1);
    }

    #[test]
    fn udp_is_read_from_the_keys() {
        let mut udp = Changed::default();
        for protocol in Protocol::ALL {
            note_udp(node_port(&(protocol, 30_007)).key(), &mut udp);
            for address in ["192.0.2.1", "2001:db8::1"] {
                let at = Listen { address: address.parse().expect("address"), protocol, port: 53 };
                note_udp(external((&at, &1)).key(), &mut udp);
            }
        }
        let externals = ["192.0.2.1", "2001:db8::1"].map(|ip| (ip.parse().expect("address"), 53));
        assert_eq!(udp, Changed { ports: [30_007].into(), externals: externals.into() });
    }

    #[test]
    fn an_element_fits_what_a_chunk_allows_it() {
        // Attributes of an IPv6 element: itself, key and its value, data and its value, and their headers.
        const LARGEST: usize = 4 + (4 + 4 + 24) + (4 + 4 + 4) + 4 + 16;
        const { assert!(CHUNK * LARGEST < u16::MAX as usize && CHUNK * CHUNKS * LARGEST < 212_992) };
        let at =
            Listen { address: IpAddr::V6(std::net::Ipv6Addr::LOCALHOST), protocol: Protocol::Sctp, port: 1 };
        assert_eq!(external((&at, &2)).key().len(), 24);
    }
}
