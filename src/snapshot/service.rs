//! Services as the packet line reads them: where each listens, and what may answer.
//!
//! A change of one Service makes a new [`ServiceTable`] that shares everything else with the one before,
//! so that its cost follows the change and not the size of the cluster.

use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use rpds::HashTrieMapSync;

/// The loop's own IPv4 address: routed into the TUN, assigned to nothing, never seen outside the node. It
/// stands for the node where a reply must come back into the loop, and is what NodePorts, load-balancer
/// addresses and external addresses are turned into before they enter it.
pub const LOOP_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 87, 87);
/// The same for IPv6.
pub const LOOP_V6: Ipv6Addr = Ipv6Addr::new(0xfd57, 0x4152, 0x5245, 0x4e00, 0, 0, 0, 1);

/// The loop's own address of the family of `like`.
pub const fn loop_address(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(LOOP_V4),
        IpAddr::V6(_) => IpAddr::V6(LOOP_V6),
    }
}

/// What a Service can be spoken to with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

    /// The protocol number in an IP header.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    /// The protocol of that number, if Services can have it.
    pub fn of(number: u8) -> Option<Protocol> {
        Protocol::ALL.into_iter().find(|protocol| protocol.number() == number)
    }

    /// The name that Kubernetes uses.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        }
    }
}

/// An address, a protocol and a port: where a Service listens, or where an endpoint does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Listen {
    /// The address.
    pub address: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// What answers for a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// An endpoint that is in some EndpointSlice, ready or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Known {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Whether it still serves: where it does not, UDP flows move on, while TCP may come to its own end.
    pub serving: bool,
}

/// One port of one Service in one family: what its addresses and node ports have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Made from the name and the family alone, so that flows mean the same Service after a restart.
    pub id: u32,
    /// `namespace/name:port`, for people.
    pub name: Box<str>,
    /// Seconds for which a client keeps its endpoint; 0 for not at all.
    pub affinity: u32,
    /// Whether ClusterIPs lead to endpoints of this node only.
    pub internal_local: bool,
    /// Whether the ways in from outside lead to endpoints of this node only.
    pub external_local: bool,
    /// Endpoints for everybody, as readiness and topology have it. Sorted.
    pub cluster: Box<[Endpoint]>,
    /// Endpoints of this node, for who may only use those. Sorted.
    pub local: Box<[Endpoint]>,
    /// Whether there is a usable endpoint on any node: then a packet that finds none here is dropped, as
    /// the sender may have another way in; else it is refused.
    pub anywhere: bool,
    /// Every endpoint in the Service's slices, sorted.
    pub known: Box<[Known]>,
    /// `loadBalancerSourceRanges`; empty when everybody may come.
    pub sources: Box<[IpNet]>,
}

/// Why a Service has no endpoint for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody answers: tell the client so.
    NoEndpoints,
    /// Nobody on this node, and another one must not be asked: be silent.
    NoneHere,
    /// The client's address is not among those that may come: be silent.
    Source,
}

/// Which way a client came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// By a ClusterIP.
    Cluster,
    /// By a NodePort.
    NodePort,
    /// By an address of a load balancer.
    LoadBalancer,
    /// By an external IP.
    ExternalIp,
}

/// Where a Service listens.
#[derive(Clone, Debug)]
pub struct Frontend {
    /// Which way in this is.
    pub way: Way,
    /// The port behind it.
    pub port: Arc<ServicePort>,
}

impl Frontend {
    /// The endpoints for a client; `inside`: it is this node or one of its pods, which no external policy
    /// concerns (they would not have another node to go to).
    pub fn candidates(&self, client: IpAddr, inside: bool) -> Result<&[Endpoint], Refusal> {
        let port = &*self.port;
        let local = match self.way {
            Way::Cluster => port.internal_local,
            Way::NodePort | Way::LoadBalancer | Way::ExternalIp => port.external_local && !inside,
        };
        if self.way == Way::LoadBalancer && !port.sources.is_empty() {
            let holds = |range: &IpNet| range.contains(&client);
            if !port.sources.iter().any(holds) {
                return Err(Refusal::Source);
            }
        }
        let endpoints = if local { &port.local } else { &port.cluster };
        match endpoints.is_empty() {
            false => Ok(endpoints),
            true if local && port.anywhere => Err(Refusal::NoneHere),
            true => Err(Refusal::NoEndpoints),
        }
    }
}

impl ServicePort {
    /// Whether a flow may go on with this endpoint.
    pub fn keeps(&self, protocol: u8, endpoint: Endpoint) -> bool {
        let found = self.known.binary_search_by_key(&endpoint, |known| known.endpoint);
        // A connection may end in peace with who takes no new ones; datagrams have no end to wait for.
        found.is_ok_and(|at| protocol != Protocol::Udp.number() || self.known[at].serving)
    }
}

/// All Services.
#[derive(Clone, Debug, Default)]
pub struct ServiceTable {
    frontends: HashTrieMapSync<Listen, Frontend>,
    /// ClusterIPs, and how many frontends each has: their other ports are closed.
    addresses: HashTrieMapSync<IpAddr, u32>,
    ports: HashTrieMapSync<u32, Arc<ServicePort>, BuildHasherDefault<IdHasher>>,
    /// Endpoints of this node that the world may reach through any node.
    exposed: HashTrieMapSync<Listen, u32>,
    complete: bool,
}

impl ServiceTable {
    /// Who listens there.
    pub fn frontend(&self, listen: &Listen) -> Option<&Frontend> {
        self.frontends.get(listen)
    }

    /// Whether the address is a ClusterIP.
    pub fn is_cluster_ip(&self, address: IpAddr) -> bool {
        self.addresses.contains_key(&address)
    }

    /// The port of that id, if the Service is still there.
    pub fn port(&self, id: u32) -> Option<&Arc<ServicePort>> {
        self.ports.get(&id)
    }

    /// Whether a client from outside may have been sent to this endpoint of ours by another node.
    pub fn is_exposed(&self, endpoint: &Listen) -> bool {
        self.exposed.contains_key(endpoint)
    }

    /// Whether the source has said all: only then does a missing Service mean that it is gone.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// How many frontends there are.
    pub fn len(&self) -> usize {
        self.frontends.size()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty()
    }

    /// Says that the source has said all.
    pub fn set_complete(&mut self) {
        self.complete = true;
    }

    /// Says that it has not, as after a restart.
    #[cfg(test)]
    pub(crate) fn set_incomplete(&mut self) {
        self.complete = false;
    }

    /// Lets a Service listen; returns who did before.
    pub fn listen(&mut self, at: Listen, frontend: Frontend) -> Option<Frontend> {
        let cluster = frontend.way == Way::Cluster;
        let before = self.frontends.get(&at).cloned();
        self.frontends.insert_mut(at, frontend);
        let was_cluster = before.as_ref().is_some_and(|before| before.way == Way::Cluster);
        match (was_cluster, cluster) {
            (false, true) => add(&mut self.addresses, at.address),
            (true, false) => subtract(&mut self.addresses, &at.address),
            (true, true) | (false, false) => {}
        }
        before
    }

    /// Ends that.
    pub fn unlisten(&mut self, at: &Listen) -> Option<Frontend> {
        let before = self.frontends.get(at).cloned()?;
        self.frontends.remove_mut(at);
        if before.way == Way::Cluster {
            subtract(&mut self.addresses, &at.address);
        }
        Some(before)
    }

    /// Makes a port known by its id.
    pub fn put_port(&mut self, port: Arc<ServicePort>) {
        self.ports.insert_mut(port.id, port);
    }

    /// Forgets it.
    pub fn take_port(&mut self, id: u32) {
        self.ports.remove_mut(&id);
    }

    /// One more Service shows this endpoint of ours to the world.
    pub fn expose(&mut self, endpoint: Listen) {
        add(&mut self.exposed, endpoint);
    }

    /// One less does.
    pub fn hide(&mut self, endpoint: &Listen) {
        subtract(&mut self.exposed, endpoint);
    }
}

/// For ports' ids, which are hashes already, and of which no two are the same: every packet of a known flow asks.
#[derive(Clone, Copy, Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(self.0 as u32 ^ u32::from(*byte)));
    }

    fn write_u32(&mut self, id: u32) {
        // Neighbours are no neighbours after this (Knuth, The Art of Computer Programming, section 6.4).
        self.0 = u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

fn add<K: Clone + Eq + Hash>(counts: &mut HashTrieMapSync<K, u32>, key: K) {
    let count = counts.get(&key).copied().unwrap_or(0);
    counts.insert_mut(key, count + 1);
}

fn subtract<K: Clone + Eq + Hash>(counts: &mut HashTrieMapSync<K, u32>, key: &K) {
    match counts.get(key).copied() {
        Some(count @ 2..) => counts.insert_mut(key.clone(), count - 1),
        Some(0 | 1) => drop(counts.remove_mut(key)),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(
        internal_local: bool,
        external_local: bool,
        cluster: &[&str],
        local: &[&str],
    ) -> Arc<ServicePort> {
        let endpoints = |list: &[&str]| {
            let endpoint = |text: &&str| Endpoint { address: text.parse().expect("address"), port: 8080 };
            list.iter().map(endpoint).collect::<Box<[Endpoint]>>()
        };
        let cluster = endpoints(cluster);
        Arc::new(ServicePort {
            id: 1,
            name: "default/web:http".into(),
            affinity: 0,
            internal_local,
            external_local,
            anywhere: !cluster.is_empty(),
            known: cluster.iter().map(|endpoint| Known { endpoint: *endpoint, serving: true }).collect(),
            cluster,
            local: endpoints(local),
            sources: Box::new(["192.0.2.0/24".parse().expect("range")]),
        })
    }

    #[test]
    fn policies_choose_between_all_and_local() {
        use Way::{Cluster, LoadBalancer, NodePort};
        let (near, far) = ("10.244.0.5", "10.244.1.5");
        let client: IpAddr = "192.0.2.9".parse().expect("address");
        for (way, internal, external, local, inside, expected) in [
            (Cluster, false, true, true, false, Ok(2)),
            (Cluster, true, false, true, true, Ok(1)),
            (Cluster, true, false, false, true, Err(Refusal::NoneHere)),
            (NodePort, true, false, false, false, Ok(2)),
            (NodePort, false, true, true, false, Ok(1)),
            (NodePort, false, true, false, false, Err(Refusal::NoneHere)),
            (NodePort, false, true, false, true, Ok(2)),
            (LoadBalancer, false, true, false, true, Ok(2)),
        ] {
            let here: &[&str] = if local { &[near] } else { &[] };
            let port = port(internal, external, &[near, far], here);
            let frontend = Frontend { way, port };
            let found = frontend.candidates(client, inside).map(<[Endpoint]>::len);
            assert_eq!(found, expected, "{way:?} {internal} {external} {local} {inside}");
        }
        let nobody = Frontend { way: Cluster, port: port(true, true, &[], &[]) };
        assert_eq!(nobody.candidates(client, true), Err(Refusal::NoEndpoints));
        let stranger: IpAddr = "198.51.100.1".parse().expect("address");
        let guarded = Frontend { way: LoadBalancer, port: port(false, false, &[near], &[near]) };
        assert_eq!(guarded.candidates(stranger, false), Err(Refusal::Source));
        let open = Frontend { way: NodePort, ..guarded };
        assert!(open.candidates(stranger, false).is_ok());
    }

    #[test]
    fn a_cluster_ip_is_one_as_long_as_it_has_a_port() {
        let mut table = ServiceTable::default();
        let port = port(false, false, &[], &[]);
        let at =
            |port| Listen { address: "10.96.0.1".parse().expect("address"), protocol: Protocol::Tcp, port };
        for number in [80, 443, 80] {
            table.listen(at(number), Frontend { way: Way::Cluster, port: Arc::clone(&port) });
        }
        let before = table.clone();
        table.unlisten(&at(80));
        assert!(table.is_cluster_ip(at(80).address));
        table.unlisten(&at(443));
        assert!(!table.is_cluster_ip(at(80).address));
        assert!(before.is_cluster_ip(at(80).address), "an older table does not change");
        assert_eq!((before.len(), table.len()), (2, 0));
    }

    #[test]
    fn an_exposed_endpoint_is_counted() {
        let mut table = ServiceTable::default();
        let at =
            Listen { address: "10.244.0.5".parse().expect("address"), protocol: Protocol::Udp, port: 53 };
        table.expose(at);
        table.expose(at);
        table.hide(&at);
        assert!(table.is_exposed(&at));
        table.hide(&at);
        assert!(!table.is_exposed(&at));
    }
}
