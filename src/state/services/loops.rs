//! Ports of the loop's own address, one for each load-balancer or external address, protocol and port.
//!
//! There are some 62,000 for a protocol and family. External IPs are anybody's to write, so a namespace has so
//! many and no more, and where all are taken they make room for load balancers.

use std::collections::HashMap;
use std::hash::Hasher;
use std::net::IpAddr;
use std::sync::Arc;

use siphasher::sip::SipHasher13;

use crate::snapshot::service::{Listen, Protocol};

/// Where NodePorts are by default (`--service-node-port-range`).
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;
/// Most ports that are tried for one address: beyond that all are as good as taken. Wider than the node ports.
const MOST_TRIED: u16 = 8_192;

/// Most ports for the external IPs of one namespace.
pub(super) const MAX_OF_NAMESPACE: usize = 4_096;

/// Why there is no port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// The namespace's external IPs have [`MAX_OF_NAMESPACE`].
    Namespace,
    /// All are taken.
    All,
}

/// Which stands for which. The port follows from the address; where two want the same, who came first keeps it,
/// so that connections in progress do.
#[derive(Debug, Default)]
pub(super) struct LoopPorts {
    ports: HashMap<Listen, Held>,
    taken: HashMap<Slot, Listen>,
    of_namespaces: HashMap<Arc<str>, usize>,
}

#[derive(Clone, Debug)]
struct Held {
    port: u16,
    /// Of an external IP; a load balancer's has none.
    namespace: Option<Arc<str>>,
}

/// Family (IPv4), protocol, port.
type Slot = (bool, Protocol, u16);

impl LoopPorts {
    /// The port for this, an old one if it has one, and what had to make room for it. `namespace`: of an
    /// external IP.
    pub(super) fn port(
        &mut self,
        of: Listen,
        namespace: Option<&str>,
        is_node_port: impl Fn(u16) -> bool,
    ) -> Result<(u16, Option<Listen>), Full> {
        let before = self.ports.get(&of);
        if let Some(held) = before
            && held.namespace.as_deref() == namespace
        {
            return Ok((held.port, None));
        }
        let before = before.map(|held| held.port);
        // Somebody else's from now on.
        self.free(&of);
        let namespace = namespace.map(|namespace| self.namespace(namespace)).transpose()?;
        let (port, evicted) = match before {
            Some(port) => (port, None),
            None => self.find(&of, namespace.is_none(), is_node_port).ok_or(Full::All)?,
        };
        if let Some(evicted) = &evicted {
            self.free(evicted);
        }
        if let Some(namespace) = &namespace {
            *self.of_namespaces.entry(Arc::clone(namespace)).or_default() += 1;
        }
        self.ports.insert(of, Held { port, namespace });
        self.taken.insert(slot(&of, port), of);
        Ok((port, evicted))
    }

    fn namespace(&self, name: &str) -> Result<Arc<str>, Full> {
        match self.of_namespaces.get_key_value(name) {
            Some((_, count)) if *count >= MAX_OF_NAMESPACE => Err(Full::Namespace),
            Some((name, _)) => Ok(Arc::clone(name)),
            None => Ok(name.into()),
        }
    }

    /// A port that is free, or else one of an external IP if this is a load balancer's.
    fn find(
        &self,
        of: &Listen,
        balancer: bool,
        is_node_port: impl Fn(u16) -> bool,
    ) -> Option<(u16, Option<Listen>)> {
        let first = hash(of);
        let usable = |port: &u16| *port != 0 && !NODE_PORTS.contains(port) && !is_node_port(*port);
        let tried = || (0..MOST_TRIED).map(|step| first.wrapping_add(step)).filter(usable);
        if let Some(free) = tried().find(|port| !self.taken.contains_key(&slot(of, *port))) {
            return Some((free, None));
        }
        let weak = |other: &&Listen| self.ports.get(*other).is_some_and(|held| held.namespace.is_some());
        let weak = |port: u16| Some((port, Some(*self.taken.get(&slot(of, port)).filter(weak)?)));
        balancer.then(|| tried().find_map(weak)).flatten()
    }

    /// It stands for nothing any more.
    pub(super) fn free(&mut self, of: &Listen) {
        let Some(held) = self.ports.remove(of) else { return };
        self.taken.remove(&slot(of, held.port));
        if let Some(namespace) = held.namespace
            && let Some(count) = self.of_namespaces.get_mut(&namespace)
        {
            *count -= 1;
            if *count == 0 {
                self.of_namespaces.remove(&namespace);
            }
        }
    }

    /// The port is a node port from now on: what it stood for needs another.
    pub(super) fn evict(&mut self, protocol: Protocol, port: u16) -> Vec<Listen> {
        let slots = [true, false].map(|ipv4| self.taken.get(&(ipv4, protocol, port)).copied());
        let found: Vec<Listen> = slots.into_iter().flatten().collect();
        found.iter().for_each(|of| self.free(of));
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

    fn balancer(loops: &mut LoopPorts, of: Listen, is_node_port: impl Fn(u16) -> bool) -> Option<u16> {
        loops.port(of, None, is_node_port).ok().map(|(port, _)| port)
    }

    #[test]
    fn every_port_is_its_own_and_none_is_a_node_port() {
        let mut loops = LoopPorts::default();
        let mut seen = std::collections::HashSet::new();
        for number in 1..=20_000 {
            let port = balancer(&mut loops, listen(number), |port| port == 8080).expect("there is room");
            assert!(port != 0 && port != 8080 && !NODE_PORTS.contains(&port) && seen.insert(port));
            assert_eq!(balancer(&mut loops, listen(number), |_| false), Some(port));
        }
        // Another family and protocol have ports of their own.
        let other = Listen { protocol: Protocol::Udp, ..listen(1) };
        let alone = balancer(&mut LoopPorts::default(), other, |_| false);
        assert_eq!(balancer(&mut loops, other, |_| false), alone);
    }

    #[test]
    fn what_is_full_says_so_and_what_is_freed_is_free() {
        let mut loops = LoopPorts::default();
        let first = hash(&listen(1));
        let mut only = |number| balancer(&mut loops, listen(number), |port| port != first).is_some();
        assert!(only(1) && !only(2));
        loops.free(&listen(1));
        let near = |port: u16| port != first;
        let mut found = (2..2_000).filter(|number| balancer(&mut loops, listen(*number), near).is_some());
        assert!(found.next().is_some() && found.next().is_none());
    }

    #[test]
    fn a_new_node_port_drives_out_who_is_there() {
        let mut loops = LoopPorts::default();
        let port = balancer(&mut loops, listen(80), |_| false).expect("there is room");
        assert_eq!(loops.evict(Protocol::Udp, port), []);
        assert_eq!(loops.evict(Protocol::Tcp, port), [listen(80)]);
        assert_ne!(balancer(&mut loops, listen(80), |other| other == port), Some(port));
    }

    #[test]
    fn external_ips_have_so_many_and_make_room_for_load_balancers() {
        let mut loops = LoopPorts::default();
        for number in 0..MAX_OF_NAMESPACE as u16 {
            assert!(loops.port(listen(number), Some("a"), |_| false).is_ok());
        }
        assert_eq!(loops.port(listen(9_999), Some("a"), |_| false), Err(Full::Namespace));
        assert!(loops.port(listen(9_999), Some("b"), |_| false).is_ok());
        // What a load balancer takes over counts for the namespace no more.
        let (port, _) = loops.port(listen(7), Some("a"), |_| false).expect("its own");
        assert_eq!(loops.port(listen(7), None, |_| false), Ok((port, None)));
        assert!(loops.port(listen(9_998), Some("a"), |_| false).is_ok());

        let mut loops = LoopPorts::default();
        let first = hash(&listen(1));
        let only = |port: u16| port != first;
        assert_eq!(loops.port(listen(1), Some("a"), only), Ok((first, None)));
        let near =
            |number: &u16| hash(&listen(*number)).abs_diff(first) < 4_000 && hash(&listen(*number)) <= first;
        let other = (2..2_000).find(near).expect("one in sixteen");
        assert_eq!(loops.port(listen(other), Some("b"), only), Err(Full::All));
        assert_eq!(loops.port(listen(other), None, only), Ok((first, Some(listen(1)))));
        assert_eq!(loops.port(listen(1), None, only), Err(Full::All));
        assert!(loops.of_namespaces.is_empty());
    }
}
