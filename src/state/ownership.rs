//! Who owns which range, address and key, when several Nodes claim it.
//!
//! Nodes are asked in the order of [`Precedence`](super::desired::Precedence); what an earlier one was
//! given, a later one cannot have. So the answer depends on the Nodes alone, never on when they came.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use super::convert::NodeInfo;
use super::problem::{Problem, ProblemKind};
use crate::snapshot::{PeerLane, PublicKey};

/// Ranges that belong to the cluster as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterRanges {
    /// Pod ranges must lie in these; empty when they were not configured.
    pub pods: Vec<IpNet>,
    /// Service ranges.
    pub services: Vec<IpNet>,
}

/// What one Node was given of what it claims.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// Its pod ranges.
    pub ranges: Vec<IpNet>,
    /// Its node addresses.
    pub addresses: Vec<IpAddr>,
    /// Its lanes: all, or none if another node has one of the keys (lanes are counted by position).
    pub lanes: Vec<PeerLane>,
    /// Second keys of its lanes, while they change.
    pub also: Vec<PublicKey>,
    /// Where it may be reached, without addresses that are inside the mesh.
    pub endpoints: Vec<SocketAddr>,
}

/// The grants of all Nodes, in their order, and the claims that were refused.
#[derive(Debug, Default)]
pub struct Ownership {
    /// One for each Node, in the order in which they were asked.
    pub grants: Vec<Grant>,
    /// Why the others were refused.
    pub problems: Vec<Problem>,
}

/// Settles all claims. `nodes` come in the order of precedence.
pub fn settle(nodes: &[&Arc<NodeInfo>], cluster: &ClusterRanges) -> Ownership {
    let mut claims = Claims { cluster, ranges: RangeMap::default(), problems: Vec::new() };
    let mut grants = vec![Grant::default(); nodes.len()];
    // All ranges first: an address is judged by every range, also those of younger nodes.
    for (index, (node, grant)) in nodes.iter().zip(&mut grants).enumerate() {
        grant.ranges = claims.ranges_of(index, node, nodes);
    }
    let mut addresses: HashMap<IpAddr, usize> = HashMap::with_capacity(nodes.len());
    let mut keys: HashMap<PublicKey, usize> = HashMap::with_capacity(nodes.len());
    for (index, (node, grant)) in nodes.iter().zip(&mut grants).enumerate() {
        grant.addresses = claims.addresses_of(index, node, nodes, &mut addresses);
        grant.lanes = claims.lanes_of(index, node, nodes, &mut keys);
        grant.endpoints = claims.endpoints_of(node, nodes, grant);
    }
    // Only now: what a node will use or has used takes no key from one that uses it.
    for (index, (node, grant)) in nodes.iter().zip(&mut grants).enumerate() {
        grant.also = claims.also_of(index, node, nodes, grant, &mut keys);
    }
    Ownership { grants, problems: claims.problems }
}

struct Claims<'a> {
    cluster: &'a ClusterRanges,
    ranges: RangeMap,
    problems: Vec<Problem>,
}

impl Claims<'_> {
    fn refuse(&mut self, kind: ProblemKind, node: &NodeInfo, field: &str, reason: String) {
        self.problems.push(Problem::node(kind, &node.name, field, reason));
    }

    fn ranges_of(&mut self, index: usize, node: &NodeInfo, nodes: &[&Arc<NodeInfo>]) -> Vec<IpNet> {
        let mut granted = Vec::with_capacity(node.pod_ranges.len());
        for range in &node.pod_ranges {
            let overlaps = |other: &&IpNet| other.contains(range) || range.contains(*other);
            let refusal = if let Some(service) = self.cluster.services.iter().find(overlaps) {
                Some(format!("{range} overlaps the Service range {service}"))
            } else if !self.cluster.pods.is_empty()
                && !self.cluster.pods.iter().any(|pods| pods.contains(range))
            {
                Some(format!("{range} lies outside the configured cluster ranges"))
            } else {
                let owner = self.ranges.overlapping(*range);
                owner.map(|(owned, owner)| {
                    format!("{range} overlaps {owned}, which {} owns", name_of(nodes, owner))
                })
            };
            match refusal {
                Some(reason) => self.refuse(ProblemKind::Conflict, node, "spec.podCIDRs", reason),
                None => {
                    self.ranges.insert(*range, index);
                    granted.push(*range);
                }
            }
        }
        granted
    }

    fn addresses_of(
        &mut self,
        index: usize,
        node: &NodeInfo,
        nodes: &[&Arc<NodeInfo>],
        owners: &mut HashMap<IpAddr, usize>,
    ) -> Vec<IpAddr> {
        let mut granted = Vec::with_capacity(node.addresses.len());
        for address in &node.addresses {
            let refusal = match owners.get(address) {
                Some(owner) => Some(format!("{address} is an address of {}", name_of(nodes, *owner))),
                None => self.inside_mesh(*address, nodes),
            };
            match refusal {
                Some(reason) => self.refuse(ProblemKind::Conflict, node, "status.addresses", reason),
                None => {
                    owners.insert(*address, index);
                    granted.push(*address);
                }
            }
        }
        granted
    }

    fn lanes_of(
        &mut self,
        index: usize,
        node: &NodeInfo,
        nodes: &[&Arc<NodeInfo>],
        owners: &mut HashMap<PublicKey, usize>,
    ) -> Vec<PeerLane> {
        let lanes = &node.announcement.lanes;
        let taken = lanes.iter().enumerate().find_map(|(lane, l)| Some((lane, *owners.get(&l.key)?)));
        if let Some((lane, owner)) = taken {
            let reason = format!("the key of lane {lane} is one of {}; none is used", name_of(nodes, owner));
            self.refuse(ProblemKind::Conflict, node, "warren.dev/lanes", reason);
            return Vec::new();
        }
        owners.extend(lanes.iter().map(|lane| (lane.key, index)));
        lanes.clone()
    }

    /// The second keys of its lanes: all or none, like the first.
    fn also_of(
        &mut self,
        index: usize,
        node: &NodeInfo,
        nodes: &[&Arc<NodeInfo>],
        grant: &Grant,
        owners: &mut HashMap<PublicKey, usize>,
    ) -> Vec<PublicKey> {
        let also = &node.announcement.also;
        if grant.lanes.is_empty() || also.is_empty() {
            return Vec::new();
        }
        if let Some((lane, owner)) = also.iter().enumerate().find_map(|(n, key)| Some((n, *owners.get(key)?)))
        {
            let reason = format!("the key of lane {lane} is one of {}; none is used", name_of(nodes, owner));
            self.refuse(ProblemKind::Conflict, node, "warren.dev/also-keys", reason);
            return Vec::new();
        }
        owners.extend(also.iter().map(|key| (*key, index)));
        also.clone()
    }

    /// What it announces; if that is nothing, its addresses at lane 0's port.
    fn endpoints_of(&mut self, node: &NodeInfo, nodes: &[&Arc<NodeInfo>], grant: &Grant) -> Vec<SocketAddr> {
        let Some(first) = grant.lanes.first() else { return Vec::new() };
        if node.announcement.endpoints.is_empty() {
            return grant.addresses.iter().map(|address| SocketAddr::new(*address, first.port)).collect();
        }
        let mut granted = Vec::with_capacity(node.announcement.endpoints.len());
        for endpoint in &node.announcement.endpoints {
            match self.inside_mesh(endpoint.ip(), nodes) {
                Some(reason) => {
                    let reason = format!("{reason}: a tunnel through the tunnel");
                    self.refuse(ProblemKind::Annotation, node, "warren.dev/endpoints", reason);
                }
                None => granted.push(*endpoint),
            }
        }
        granted
    }

    /// Why an address cannot be outside the mesh, if it cannot.
    fn inside_mesh(&self, address: IpAddr, nodes: &[&Arc<NodeInfo>]) -> Option<String> {
        if let Some((range, owner)) = self.ranges.overlapping(address.into()) {
            return Some(format!("{address} lies in {range}, a pod range of {}", name_of(nodes, owner)));
        }
        let holds = |range: &&IpNet| range.contains(&address);
        if let Some(range) = self.cluster.services.iter().find(holds) {
            return Some(format!("{address} lies in the Service range {range}"));
        }
        let range = self.cluster.pods.iter().find(holds)?;
        Some(format!("{address} lies in the cluster range {range}"))
    }
}

fn name_of<'a>(nodes: &[&'a Arc<NodeInfo>], index: usize) -> &'a str {
    nodes.get(index).copied().map_or("another node", |node| &node.name)
}

/// Ranges and whose they are; no two of them overlap.
#[derive(Debug, Default)]
struct RangeMap {
    v4: PrefixMap<Ipv4Net, usize>,
    v6: PrefixMap<Ipv6Net, usize>,
}

impl RangeMap {
    fn insert(&mut self, range: IpNet, owner: usize) {
        match range {
            IpNet::V4(range) => drop(self.v4.insert(range, owner)),
            IpNet::V6(range) => drop(self.v6.insert(range, owner)),
        }
    }

    /// A range that holds this one or lies in it: as none overlap, one answer is enough.
    fn overlapping(&self, range: IpNet) -> Option<(IpNet, usize)> {
        match range {
            IpNet::V4(range) => {
                let around = self.v4.get_lpm(&range);
                around.or_else(|| self.v4.children(&range).next()).map(|(r, owner)| (r.into(), *owner))
            }
            IpNet::V6(range) => {
                let around = self.v6.get_lpm(&range);
                around.or_else(|| self.v6.children(&range).next()).map(|(r, owner)| (r.into(), *owner))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::desired::Desired;
    use crate::state::source::{Kind, Object, manifest};
    use proptest::prelude::*;

    fn object(name: &str, created: Option<u8>, uid: &str, range: &str, address: &str, key: u8) -> Object {
        let created =
            created.map(|s| format!("creationTimestamp: 2026-01-01T00:00:{s:02}Z, ")).unwrap_or_default();
        let key = crate::state::annotations::key_text(&[key; 32]);
        let text = format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {name}, uid: '{uid}', {created} \
             annotations: {{warren.dev/lanes: '{key}:1'}}}}, spec: {{podCIDRs: ['{range}']}}, \
             status: {{addresses: [{{type: InternalIP, address: '{address}'}}]}}}}"
        );
        manifest::parse(text.as_bytes(), false).objects.remove(0)
    }

    fn settled(objects: &[Object], cluster: &ClusterRanges) -> (Vec<(String, Grant)>, Vec<Problem>) {
        let mut desired = Desired::default();
        for object in objects {
            desired.apply(object);
        }
        desired.reset(Kind::Node, objects);
        let nodes: Vec<_> = desired.nodes().collect();
        let ownership = settle(&nodes, cluster);
        let names = nodes.iter().map(|node| node.name.clone());
        let mut problems = ownership.problems;
        problems.sort();
        (names.zip(ownership.grants).collect(), problems)
    }

    #[test]
    fn the_older_then_the_lower_uid_then_the_name_keeps_it() {
        let none = ClusterRanges::default();
        for (first, second) in [
            (
                object("b", Some(1), "u2", "10.1.0.0/16", "192.0.2.1", 1),
                object("a", Some(2), "u1", "10.1.2.0/24", "192.0.2.1", 1),
            ),
            (
                object("b", Some(1), "u1", "10.1.0.0/24", "192.0.2.1", 1),
                object("a", Some(1), "u2", "10.1.0.0/16", "192.0.2.1", 1),
            ),
            (
                object("a", None, "", "10.1.0.0/24", "192.0.2.1", 1),
                object("b", None, "", "10.1.0.0/24", "192.0.2.1", 1),
            ),
            (
                object("z", Some(1), "u9", "10.1.0.0/24", "192.0.2.1", 1),
                object("a", None, "", "10.1.0.0/24", "192.0.2.1", 1),
            ),
        ] {
            let (grants, problems) = settled(&[second.clone(), first.clone()], &none);
            let [(winner, won), (loser, lost)] = grants.as_slice() else { panic!() };
            assert_eq!((winner, loser), (&first.key().name, &second.key().name));
            assert_eq!(
                (won.ranges.len(), won.addresses.len(), won.lanes.len(), won.endpoints.len()),
                (1, 1, 1, 1)
            );
            assert_eq!(lost, &Grant::default());
            assert_eq!(problems.len(), 3, "{problems:?}");
            assert!(
                problems
                    .iter()
                    .all(|p| p.subject == format!("Node/{loser}") && p.reason.contains(winner.as_str()))
            );
        }
    }

    #[test]
    fn a_second_key_takes_no_key_from_anybody() {
        let object = |name: &str, created: u8, key: u8, also: u8| {
            let mut object = object(
                name,
                Some(created),
                name,
                &format!("10.{created}.0.0/24"),
                &format!("192.0.2.{created}"),
                key,
            );
            let Object::Node(node) = &mut object else { panic!() };
            let annotations = std::sync::Arc::make_mut(node).metadata.annotations.as_mut().unwrap();
            annotations
                .insert("warren.dev/also-keys".to_owned(), crate::state::annotations::key_text(&[also; 32]));
            object
        };
        // The oldest claims what the youngest uses, and one that the second claims too.
        let objects = [object("old", 1, 1, 3), object("mid", 2, 2, 9), object("new", 3, 3, 9)];
        let (grants, problems) = settled(&objects, &ClusterRanges::default());
        let found: Vec<_> =
            grants.iter().map(|(name, g)| (name.as_str(), g.lanes.len(), g.also.len())).collect();
        assert_eq!(found, [("old", 1, 0), ("mid", 1, 1), ("new", 1, 0)]);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems.iter().all(|p| p.field == "warren.dev/also-keys"), "{problems:?}");
    }

    #[test]
    fn node_addresses_stay_out_of_pod_and_service_ranges() {
        let cluster = ClusterRanges {
            pods: vec!["10.0.0.0/12".parse().unwrap()],
            services: vec!["10.8.0.0/16".parse().unwrap()],
        };
        let objects = [
            object("a", None, "", "10.1.0.0/24", "10.2.0.9", 1), // in b's range
            object("b", None, "", "10.2.0.0/24", "10.8.0.1", 2), // a Service
            object("c", None, "", "10.8.3.0/24", "10.9.9.9", 3), // overlaps Services; in the cluster range
            object("d", None, "", "10.99.0.0/24", "192.0.2.9", 4), // outside of the cluster range
        ];
        let (grants, problems) = settled(&objects, &cluster);
        let counts: Vec<_> = grants.iter().map(|(_, g)| (g.ranges.len(), g.addresses.len())).collect();
        assert_eq!(counts, [(1, 0), (1, 0), (0, 0), (0, 1)]);
        assert_eq!(problems.len(), 5, "{problems:?}");
    }

    prop_compose! {
        fn any_node()(
            created in proptest::option::of(0..3_u8), uid in "[ab]?", third in 0..4_u8, length in 14..26_u8,
            address in 0..6_u8, key in 1..5_u8,
        ) -> (Option<u8>, String, u8, u8, u8, u8) {
            (created, uid, third, length, address, key)
        }
    }

    proptest! {
        #[test]
        fn the_order_of_arrival_does_not_matter(
            (objects, shuffled) in proptest::collection::vec(any_node(), 1..8).prop_flat_map(|nodes| {
                let objects: Vec<Object> = nodes.into_iter().enumerate().map(|(i, (created, uid, third, length, address, key))| {
                    let range: IpNet = format!("10.{}.{third}.0/{length}", third % 2).parse().unwrap();
                    object(&format!("n{i}"), created, &uid, &range.trunc().to_string(), &format!("10.0.{address}.1"), key)
                }).collect();
                (Just(objects.clone()), Just(objects).prop_shuffle())
            })
        ) {
            let none = ClusterRanges::default();
            let (grants, problems) = settled(&objects, &none);
            prop_assert_eq!(settled(&shuffled, &none), (grants.clone(), problems));
            let ranges: Vec<IpNet> = grants.iter().flat_map(|(_, grant)| grant.ranges.clone()).collect();
            for (i, a) in ranges.iter().enumerate() {
                prop_assert!(ranges.iter().skip(i + 1).all(|b| !a.contains(b) && !b.contains(a)));
            }
        }
    }
}
