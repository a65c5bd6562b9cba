//! Ports of the loop's own address, one for each load-balancer or external address, protocol and port.

use std::collections::HashMap;
use std::hash::Hasher;
use std::net::IpAddr;

use siphasher::sip::SipHasher13;

use crate::snapshot::service::{Listen, Protocol};

/// Where NodePorts are by default (`--service-node-port-range`).
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;
/// Most ports that are tried for one address: beyond that all are as good as taken. Wider than the node ports.
const MOST_TRIED: u16 = 8_192;

/// Which stands for which. The port follows from the address; where two want the same, who came first keeps it,
/// so that connections in progress do.
#[derive(Debug, Default)]
pub(super) struct LoopPorts {
    ports: HashMap<Listen, u16>,
    taken: HashMap<Slot, Listen>,
}

/// Family (IPv4), protocol, port.
type Slot = (bool, Protocol, u16);

impl LoopPorts {
    /// The port for this, an old one if it has one; `None`: all are taken.
    pub(super) fn port(&mut self, of: Listen, is_node_port: impl Fn(u16) -> bool) -> Option<u16> {
        if let Some(port) = self.ports.get(&of) {
            return Some(*port);
        }
        let first = hash(&of);
        let free = |port: &u16| {
            let slot = slot(&of, *port);
            *port != 0
                && !NODE_PORTS.contains(port)
                && !self.taken.contains_key(&slot)
                && !is_node_port(*port)
        };
        let port = (0..MOST_TRIED).map(|step| first.wrapping_add(step)).find(free)?;
        self.ports.insert(of, port);
        self.taken.insert(slot(&of, port), of);
        Some(port)
    }

    /// It stands for nothing any more.
    pub(super) fn free(&mut self, of: &Listen) {
        if let Some(port) = self.ports.remove(of) {
            self.taken.remove(&slot(of, port));
        }
    }

    /// The port is a node port from now on: what it stood for needs another.
    pub(super) fn evict(&mut self, protocol: Protocol, port: u16) -> Vec<Listen> {
        let found = [true, false].into_iter().filter_map(|ipv4| self.taken.remove(&(ipv4, protocol, port)));
        let found: Vec<Listen> = found.collect();
        for of in &found {
            self.ports.remove(of);
        }
        found
    }
}

fn slot(of: &Listen, port: u16) -> Slot {
    (of.address.is_ipv4(), of.protocol, port)
}

fn hash(of: &Listen) -> u16 {
    let mut hasher = SipHasher13::new_with_keys(0x7761_7272_656e, 0x6c6f_6f70);
    match of.address {
        IpAddr::V4(address) => hasher.write(&address.octets()),
        IpAddr::V6(address) => hasher.write(&address.octets()),
    }
    hasher.write(&[of.protocol.number()]);
    hasher.write(&of.port.to_be_bytes());
    hasher.finish() as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(number: u16) -> Listen {
        Listen { address: "203.0.113.1".parse().expect("address"), protocol: Protocol::Tcp, port: number }
    }

    #[test]
    fn every_port_is_its_own_and_none_is_a_node_port() {
        let mut loops = LoopPorts::default();
        let mut seen = std::collections::HashSet::new();
        for number in 1..=20_000 {
            let port = loops.port(listen(number), |port| port == 8080).expect("there is room");
            assert!(port != 0 && port != 8080 && !NODE_PORTS.contains(&port) && seen.insert(port));
            assert_eq!(loops.port(listen(number), |_| false), Some(port));
        }
        // Another family and protocol have ports of their own.
        let other = Listen { protocol: Protocol::Udp, ..listen(1) };
        let alone = LoopPorts::default().port(other, |_| false);
        assert_eq!(loops.port(other, |_| false), alone);
    }

    #[test]
    fn what_is_full_says_so_and_what_is_freed_is_free() {
        let mut loops = LoopPorts::default();
        let first = hash(&listen(1));
        let mut only = |number| loops.port(listen(number), |port| port != first).is_some();
        assert!(only(1) && !only(2));
        loops.free(&listen(1));
        let near = |port: u16| port != first;
        let mut found = (2..2_000).filter(|number| loops.port(listen(*number), near).is_some());
        assert!(found.next().is_some() && found.next().is_none());
    }

    #[test]
    fn a_new_node_port_drives_out_who_is_there() {
        let mut loops = LoopPorts::default();
        let port = loops.port(listen(80), |_| false).expect("there is room");
        assert_eq!(loops.evict(Protocol::Udp, port), []);
        assert_eq!(loops.evict(Protocol::Tcp, port), [listen(80)]);
        assert_ne!(loops.port(listen(80), |other| other == port), Some(port));
    }
}
