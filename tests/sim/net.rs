//! The network between the nodes: loss, reorder, duplicates, delay, MTU, partitions, NAT boxes.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::rng::Rng;

/// A machine on the network.
pub(crate) type Host = usize;

/// What goes wrong; chances are in a thousand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    pub loss: u32,
    pub duplicate: u32,
    /// Datagrams held back long enough that later ones overtake them.
    pub reorder: u32,
    pub delay: Duration,
    pub jitter: Duration,
    /// The largest IP packet; a larger one vanishes (a path whose ICMP is filtered).
    pub mtu: usize,
}

impl Faults {
    pub(crate) const NONE: Faults = Faults {
        loss: 0,
        duplicate: 0,
        reorder: 0,
        delay: Duration::from_millis(5),
        jitter: Duration::ZERO,
        mtu: 1500,
    };
}

#[derive(Clone, Debug)]
pub(crate) struct Datagram {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

/// Where a datagram ends up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Landing {
    pub host: Host,
    pub port: u16,
    /// The sender's address as the receiver sees it.
    pub from: SocketAddr,
}

/// A NAT box with endpoint-dependent mapping and filtering (RFC 4787: the strictest kind), or, if `cone`,
/// endpoint-independent mapping and filtering.
#[derive(Debug)]
struct Nat {
    address: IpAddr,
    timeout: Duration,
    cone: bool,
    next_port: u16,
    mappings: Vec<Mapping>,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    inside: SocketAddr,
    remote: SocketAddr,
    port: u16,
    used: Duration,
}

#[derive(Debug)]
pub(crate) struct Net {
    pub faults: Faults,
    /// Everything that was sent, if anybody listens.
    pub tap: Option<Vec<Datagram>>,
    pub lost: u64,
    /// Whether it has ever doubled a datagram.
    pub doubled: bool,
    pub too_big: u64,
    pub unroutable: u64,
    addresses: HashMap<IpAddr, Host>,
    behind: HashMap<Host, usize>,
    nats: Vec<Nat>,
    cut: HashSet<(Host, Host)>,
}

impl Net {
    pub(crate) fn new() -> Net {
        Net {
            faults: Faults::NONE,
            tap: None,
            lost: 0,
            doubled: false,
            too_big: 0,
            unroutable: 0,
            addresses: HashMap::new(),
            behind: HashMap::new(),
            nats: Vec::new(),
            cut: HashSet::new(),
        }
    }

    pub(crate) fn attach(&mut self, host: Host, address: IpAddr) {
        self.addresses.insert(address, host);
    }

    pub(crate) fn detach(&mut self, address: IpAddr) {
        self.addresses.remove(&address);
    }

    /// Puts a host behind a NAT box of its own.
    pub(crate) fn hide(&mut self, host: Host, address: IpAddr, timeout: Duration, cone: bool) {
        self.behind.insert(host, self.nats.len());
        self.nats.push(Nat { address, timeout, cone, next_port: 30_000, mappings: Vec::new() });
    }

    /// The box forgets all its mappings and gives others from now on, as after a reboot.
    pub(crate) fn reboot_nat(&mut self, host: Host) {
        let Some(&nat) = self.behind.get(&host) else { return };
        self.nats[nat].mappings.clear();
        self.nats[nat].next_port += 1000;
    }

    pub(crate) fn cut(&mut self, a: Host, b: Host) {
        self.cut.extend([(a, b), (b, a)]);
    }

    pub(crate) fn cut_one_way(&mut self, from: Host, to: Host) {
        self.cut.insert((from, to));
    }

    pub(crate) fn heal(&mut self) {
        self.cut.clear();
    }

    /// What becomes of a datagram: where it lands, and after how long; twice if it is duplicated.
    pub(crate) fn carry(
        &mut self,
        now: Duration,
        host: Host,
        datagram: &Datagram,
        rng: &mut Rng,
    ) -> Vec<(Duration, Landing)> {
        let Some(landing) = self.route(now, host, datagram) else {
            self.unroutable += 1;
            return Vec::new();
        };
        let overhead = if datagram.to.is_ipv4() { 28 } else { 48 };
        if datagram.bytes.len() + overhead > self.faults.mtu {
            self.too_big += 1;
            return Vec::new();
        }
        if self.cut.contains(&(host, landing.host)) || rng.permille(self.faults.loss) {
            self.lost += 1;
            return Vec::new();
        }
        let copies = 1 + usize::from(rng.permille(self.faults.duplicate));
        self.doubled |= copies > 1;
        (0..copies)
            .map(|_| {
                let jitter = rng.within(0..self.faults.jitter.as_micros() as u64 + 1);
                let late = if rng.permille(self.faults.reorder) { 40 } else { 0 };
                (self.faults.delay + Duration::from_micros(jitter) + Duration::from_millis(late), landing)
            })
            .collect()
    }

    fn route(&mut self, now: Duration, host: Host, datagram: &Datagram) -> Option<Landing> {
        let from = match self.behind.get(&host) {
            Some(&nat) => self.nats[nat].out(now, datagram.from, datagram.to),
            None => datagram.from,
        };
        self.land(now, from, datagram.to)
    }

    /// Where a datagram from a public address lands.
    pub(crate) fn land(&mut self, now: Duration, from: SocketAddr, to: SocketAddr) -> Option<Landing> {
        if let Some(nat) = self.nats.iter_mut().find(|nat| nat.address == to.ip()) {
            let inside = nat.back(now, from, to.port())?;
            let host = *self.addresses.get(&inside.ip())?;
            return Some(Landing { host, port: inside.port(), from });
        }
        let host = *self.addresses.get(&to.ip())?;
        (!self.behind.contains_key(&host)).then_some(Landing { host, port: to.port(), from })
    }
}

impl Nat {
    fn out(&mut self, now: Duration, inside: SocketAddr, remote: SocketAddr) -> SocketAddr {
        let (timeout, cone) = (self.timeout, self.cone);
        self.mappings.retain(|m| now - m.used < timeout);
        let known = self.mappings.iter_mut().find(|m| m.inside == inside && (cone || m.remote == remote));
        let port = match known {
            Some(mapping) => {
                mapping.used = now;
                mapping.port
            }
            None => {
                self.next_port += 1;
                self.mappings.push(Mapping { inside, remote, port: self.next_port, used: now });
                self.next_port
            }
        };
        SocketAddr::new(self.address, port)
    }

    fn back(&mut self, now: Duration, from: SocketAddr, port: u16) -> Option<SocketAddr> {
        let (timeout, cone) = (self.timeout, self.cone);
        let fits = |m: &&Mapping| m.port == port && now - m.used < timeout && (cone || m.remote == from);
        self.mappings.iter().find(fits).map(|m| m.inside)
    }
}
