//! UDP flows that kube-proxy has translated and left to us.
//!
//! The kernel goes on translating them as kube-proxy once did, whatever becomes of the endpoint, for as long
//! as the client does not pause. So from the hand-over on, until none is left, the connection table is
//! searched for those whose endpoint is none of the Service's any more, and they are forgotten: the next
//! packet is a new flow, and the loop's. TCP needs none of that: its clients hear of it, and begin anew.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nlink::netlink::netfilter::{ConntrackEntry, ConntrackTuple};

use super::{HostConfig, MARK};
use crate::snapshot::service::{Endpoint, Listen, Protocol, ServiceTable, Way, loop_address};

/// How often it is looked whether any is left, where nothing has changed.
const ANY_LEFT: Duration = Duration::from_secs(10);

/// What is left of kube-proxy's flows, as far as known.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    /// Cleared by who has looked, and found none.
    none_left: Arc<AtomicBool>,
    /// When it was looked for last, and by what.
    last: Option<(Instant, Heirs)>,
}

impl Inherited {
    /// What is to be looked at now, if anything: at most once for each call, so each second.
    pub(super) fn next(&mut self, now: Instant, heirs: Heirs) -> Option<Search> {
        if self.none_left.load(Ordering::Relaxed) {
            return None;
        }
        let same = |(at, last): &(Instant, Heirs)| last.same(&heirs) && now.duration_since(*at) < ANY_LEFT;
        if self.last.as_ref().is_some_and(same) {
            return None;
        }
        self.last = Some((now, heirs.clone()));
        Some(Search { heirs, none_left: Arc::clone(&self.none_left) })
    }

    /// Whether there is nothing to look for any more.
    pub(super) fn is_over(&self) -> bool {
        self.none_left.load(Ordering::Relaxed)
    }
}

/// One search, and where to say that there was nothing.
#[derive(Debug)]
pub(super) struct Search {
    pub(super) heirs: Heirs,
    none_left: Arc<AtomicBool>,
}

impl Search {
    /// How many there are that may still lose their endpoints.
    pub(super) fn found(&self, count: usize) {
        self.none_left.store(count == 0, Ordering::Relaxed);
    }
}

/// Services as they are now.
#[derive(Clone, Debug)]
pub(super) struct Heirs {
    table: Arc<ServiceTable>,
    externals: Arc<BTreeMap<Listen, u16>>,
    ranges: Vec<IpNet>,
}

impl Heirs {
    pub(super) fn new(table: Arc<ServiceTable>, config: &HostConfig) -> Heirs {
        let ranges = config.service_routes.iter().map(|route| route.range).collect();
        Heirs { table, externals: Arc::clone(&config.externals), ranges }
    }

    fn same(&self, other: &Heirs) -> bool {
        Arc::ptr_eq(&self.table, &other.table)
            && Arc::ptr_eq(&self.externals, &other.externals)
            && self.ranges == other.ranges
    }

    /// Of a UDP flow that somebody else has led from a Service's address to another one: whether that still is
    /// an endpoint of it. `None` for every other flow.
    pub(super) fn keep(&self, entry: &ConntrackEntry) -> Option<bool> {
        let (to, from) = (place(entry.orig.dst_ip, entry.orig.dst_port)?, source(&entry.reply)?);
        let ours =
            entry.mark.is_some_and(|mark| mark & MARK != 0) || from.address == loop_address(from.address);
        if ours || from == to {
            return None;
        }
        let at = Listen { address: to.address, protocol: Protocol::Udp, port: to.port };
        let inside = Listen { address: loop_address(to.address), ..at };
        let external = self.externals.get(&at).map(|port| Listen { port: *port, ..inside });
        let node_port = || self.table.frontend(&inside).filter(|frontend| frontend.way == Way::NodePort);
        let frontend = match external {
            Some(external) => self.table.frontend(&external),
            None => self.table.frontend(&at).or_else(node_port),
        };
        match frontend {
            Some(frontend) => Some(frontend.port.keeps(Protocol::Udp.number(), from)),
            // Of a Service that is gone.
            None => {
                let service = self.ranges.iter().any(|range| range.contains(&to.address));
                (service && self.table.is_complete()).then_some(false)
            }
        }
    }
}

fn source(tuple: &ConntrackTuple) -> Option<Endpoint> {
    place(tuple.src_ip, tuple.src_port)
}

fn place(address: Option<IpAddr>, port: Option<u16>) -> Option<Endpoint> {
    Some(Endpoint { address: address?, port: port? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::service::{Frontend, Known, ServicePort};

    const LOOP: &str = "169.254.87.87";

    fn heirs() -> Heirs {
        let known = |address: &str, serving| {
            let endpoint = Endpoint { address: address.parse().expect("address"), port: 53 };
            Known { endpoint, serving }
        };
        let port = Arc::new(ServicePort {
            id: 1,
            name: "default/dns:dns".into(),
            affinity: 0,
            internal_local: false,
            external_local: false,
            cluster: Box::default(),
            local: Box::default(),
            anywhere: true,
            known: [known("10.244.1.5", true), known("10.244.1.6", false)].into(),
            sources: Box::default(),
        });
        let udp = |address: &str, port| Listen {
            address: address.parse().expect("address"),
            protocol: Protocol::Udp,
            port,
        };
        let mut table = ServiceTable::default();
        let ways = [
            (udp("10.96.0.10", 53), Way::Cluster),
            (udp(LOOP, 30_053), Way::NodePort),
            (udp(LOOP, 1_024), Way::LoadBalancer),
        ];
        for (at, way) in ways {
            table.listen(at, Frontend { way, port: Arc::clone(&port) });
        }
        table.set_complete();
        Heirs {
            table: Arc::new(table),
            externals: Arc::new([(udp("203.0.113.9", 53), 1_024)].into()),
            ranges: vec!["10.96.0.0/16".parse().expect("range")],
        }
    }

    #[test]
    fn a_flow_stays_as_long_as_its_endpoint() {
        let heirs = heirs();
        let place = |text: &str| text.parse::<std::net::SocketAddr>().expect("address");
        for (to, from, mark, expected) in [
            ("10.96.0.10:53", "10.244.1.5:53", 0, Some(true)),
            ("192.0.2.1:30053", "10.244.1.5:53", 0, Some(true)),
            ("203.0.113.9:53", "10.244.1.5:53", 0x4000, Some(true)),
            // Not serving, of another port, or never heard of.
            ("10.96.0.10:53", "10.244.1.6:53", 0, Some(false)),
            ("10.96.0.10:53", "10.244.1.5:54", 0, Some(false)),
            ("192.0.2.1:30053", "10.244.1.7:53", 0, Some(false)),
            ("203.0.113.9:53", "10.244.1.7:53", 0, Some(false)),
            // A Service that is gone.
            ("10.96.0.99:53", "10.244.1.5:53", 0, Some(false)),
            // Not translated, ours, or nothing to do with Services.
            ("10.96.0.10:53", "10.96.0.10:53", 0, None),
            ("192.0.2.1:30053", "169.254.87.87:30053", 0, None),
            ("10.96.0.10:53", "10.244.1.7:53", MARK, None),
            ("192.0.2.1:8053", "172.17.0.2:53", 0, None),
            ("192.0.2.1:1024", "172.17.0.2:53", 0, None),
        ] {
            let mut entry = ConntrackEntry::default();
            (entry.orig.dst_ip, entry.orig.dst_port) = (Some(place(to).ip()), Some(place(to).port()));
            (entry.reply.src_ip, entry.reply.src_port) = (Some(place(from).ip()), Some(place(from).port()));
            entry.mark = Some(mark);
            assert_eq!(heirs.keep(&entry), expected, "{to} {from} {mark:#x}");
        }
        assert_eq!(heirs.keep(&ConntrackEntry::default()), None);
    }

    #[test]
    fn it_is_looked_when_something_has_changed_until_none_is_left() {
        let (mut inherited, first) = (Inherited::default(), heirs());
        let begin = crate::io::clock::now();
        let search = inherited.next(begin, first.clone()).expect("the first search");
        let second = Duration::from_secs(1);
        assert!(inherited.next(begin + second, first.clone()).is_none(), "nothing has changed");
        search.found(2);
        let other = heirs();
        assert!(inherited.next(begin + 2 * second, other.clone()).is_some(), "endpoints have changed");
        assert!(inherited.next(begin + 3 * second, other.clone()).is_none());
        let search = inherited.next(begin + 2 * second + ANY_LEFT, other.clone()).expect("now and then");
        search.found(0);
        assert!(inherited.is_over() && inherited.next(begin + 9 * ANY_LEFT, heirs()).is_none());
    }
}
