//! What should be, as typed values: told of changes, asked by [`compile`](super::compile).
//!
//! Nothing is removed for being absent before the first complete list of its kind has arrived: after a
//! restart the saved state stays in force until the source has spoken in full. What is in force without
//! the source's word is marked as unconfirmed, and goes with that list. What the source itself removes is
//! gone at once: one file that cannot be read must not keep a stolen laptop in the mesh.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{ServiceCIDR, ServiceCIDRSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use super::convert::{self, NodeInfo};
use super::problem::Problem;
use super::services::store::ServiceStore;
use super::source::{Key, Kind, Object};

/// Who comes first when two Nodes, or two Services, claim the same: the older, then the lower UID, then the
/// name. Never the order of arrival, so that two agents agree. In a folder, which has neither times nor
/// UIDs, the name decides; what has a time comes before what has none.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Precedence {
    untimed: bool,
    created: Option<Timestamp>,
    uid: String,
    name: String,
}

impl Precedence {
    /// That of a Node.
    pub fn of(node: &NodeInfo) -> Precedence {
        Precedence::new(node.created, node.uid.clone(), node.name.clone())
    }

    /// That of an object that was made then.
    pub fn new(created: Option<Timestamp>, uid: String, name: String) -> Precedence {
        Precedence { untimed: created.is_none(), created, uid, name }
    }

    /// When the object was made, and its UID.
    pub fn origin(&self) -> (Option<Timestamp>, &str) {
        (self.created, &self.uid)
    }
}

/// What a change came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Whether a compile could give something new.
    pub changed: bool,
    /// Whether that could be more than Services.
    pub mesh: bool,
    /// For each object that was looked at: its key, and what is wrong with it now.
    pub reports: Vec<(String, Vec<Problem>)>,
}

impl Outcome {
    fn of(key: &Key, changed: bool, problems: Vec<Problem>) -> Outcome {
        Outcome { changed, mesh: changed && is_mesh(key.kind), reports: vec![(key.to_string(), problems)] }
    }

    fn extend(&mut self, more: Outcome) {
        self.changed |= more.changed;
        self.mesh |= more.mesh;
        self.reports.extend(more.reports);
    }
}

/// The typed store.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    nodes: BTreeMap<Precedence, Arc<NodeInfo>>,
    by_name: HashMap<String, Precedence>,
    service_cidrs: BTreeMap<String, Vec<IpNet>>,
    services: ServiceStore,
    /// What the source has not shown: it was saved, or was in the source before its last list.
    unconfirmed: BTreeSet<Key>,
    listed: BTreeSet<Kind>,
    heard: BTreeSet<Kind>,
}

impl Desired {
    /// An object is new or has changed.
    pub fn apply(&mut self, object: &Object) -> Outcome {
        let key = object.key();
        self.unconfirmed.remove(&key);
        match object {
            Object::Node(node) => {
                let (info, problems) = convert::node(node);
                let changed = self.put_node(info);
                Outcome::of(&key, changed, problems)
            }
            Object::ServiceCidr(cidr) => {
                let (ranges, problems) = convert::service_cidr(cidr);
                let changed = self.service_cidrs.get(&key.name) != Some(&ranges);
                self.service_cidrs.insert(key.name.clone(), ranges);
                Outcome::of(&key, changed, problems)
            }
            Object::Service(service) => {
                let (changed, problems) = self.services.put_service(&key, service);
                Outcome::of(&key, changed, problems)
            }
            Object::EndpointSlice(slice) => {
                let (changed, problems) = self.services.put_slice(&key, slice);
                Outcome::of(&key, changed, problems)
            }
            Object::Pod(_) => Outcome::default(),
        }
    }

    /// What was known before a restart: in force until the source says otherwise.
    pub fn remember(&mut self, object: &Object) -> Outcome {
        let outcome = self.apply(object);
        self.heard.insert(object.kind());
        self.unconfirmed.insert(object.key());
        outcome
    }

    /// An object is gone.
    pub fn delete(&mut self, key: &Key) -> Outcome {
        self.unconfirmed.remove(key);
        let changed = match key.kind {
            Kind::Node => self.take_node(&key.name),
            Kind::ServiceCidr => self.service_cidrs.remove(&key.name).is_some(),
            Kind::Service | Kind::EndpointSlice => self.services.take(key),
            Kind::Pod => false,
        };
        Outcome::of(key, changed, Vec::new())
    }

    /// These are all objects of the kind.
    pub fn reset(&mut self, kind: Kind, objects: &[Object]) -> Outcome {
        let mut outcome = self.list(kind, objects);
        outcome.extend(self.complete(kind));
        outcome
    }

    /// These are objects of the kind, and there may be more: nothing goes.
    pub fn list(&mut self, kind: Kind, objects: &[Object]) -> Outcome {
        let mut outcome = Outcome::default();
        self.unconfirmed.extend(self.keys(kind));
        self.heard.insert(kind);
        for object in objects.iter().filter(|object| object.kind() == kind) {
            outcome.extend(self.apply(object));
        }
        outcome
    }

    /// The source has this object and cannot read it: what is known of it stays.
    pub fn confirm(&mut self, key: &Key) {
        self.unconfirmed.remove(key);
    }

    /// The source has said all about the kind: what it did not confirm goes.
    pub fn complete(&mut self, kind: Kind) -> Outcome {
        let first = self.listed.insert(kind);
        let mut outcome = Outcome { changed: first, mesh: first && is_mesh(kind), reports: Vec::new() };
        let gone: Vec<Key> = self.unconfirmed_keys(kind).cloned().collect();
        for key in gone {
            outcome.extend(self.delete(&key));
        }
        outcome
    }

    /// What is in force without the source's word was somebody else's: all of it goes.
    pub fn forget(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        for key in self.unconfirmed.clone() {
            outcome.extend(self.delete(&key));
        }
        outcome
    }

    /// Whether the object is in force without the source's word.
    pub fn is_unconfirmed(&self, key: &Key) -> bool {
        self.unconfirmed.contains(key)
    }

    /// The names of the objects of a kind that are in force without the source's word.
    pub fn unconfirmed(&self, kind: Kind) -> impl Iterator<Item = &str> {
        self.unconfirmed_keys(kind).map(|key| key.name.as_str())
    }

    fn unconfirmed_keys(&self, kind: Kind) -> impl Iterator<Item = &Key> {
        let first = Key { kind, namespace: String::new(), name: String::new() };
        self.unconfirmed.range(first..).take_while(move |key| key.kind == kind)
    }

    /// Whether a complete list of that kind has arrived.
    pub fn is_listed(&self, kind: Kind) -> bool {
        self.listed.contains(&kind)
    }

    /// Whether anything of that kind was listed or remembered.
    pub fn is_heard(&self, kind: Kind) -> bool {
        self.heard.contains(&kind)
    }

    /// All Nodes, those first that win when two claim the same.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<NodeInfo>> {
        self.nodes.values()
    }

    /// One Node.
    pub fn node(&self, name: &str) -> Option<&Arc<NodeInfo>> {
        self.nodes.get(self.by_name.get(name)?)
    }

    /// The ranges of all ServiceCIDRs.
    pub fn service_ranges(&self) -> Vec<IpNet> {
        let mut ranges: Vec<IpNet> = self.service_cidrs.values().flatten().copied().collect();
        ranges.sort();
        ranges.dedup();
        ranges
    }

    /// The objects that say all this: what a checkpoint holds.
    pub fn objects(&self) -> Vec<Object> {
        let nodes = self.nodes.values().map(|node| Object::Node(Arc::new(node.to_node())));
        let cidrs = self.service_cidrs.iter().map(|(name, ranges)| {
            let cidrs = Some(ranges.iter().map(IpNet::to_string).collect());
            Object::ServiceCidr(Arc::new(ServiceCIDR {
                metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
                spec: Some(ServiceCIDRSpec { cidrs }),
                status: None,
            }))
        });
        nodes.chain(cidrs).collect()
    }

    /// Services and their slices.
    pub fn services(&self) -> &ServiceStore {
        &self.services
    }

    /// The keys of all objects of a kind.
    fn keys(&self, kind: Kind) -> Vec<Key> {
        let alone = |name: &String| Key { kind, namespace: String::new(), name: name.clone() };
        let split = |name: &Arc<str>| {
            let (namespace, name) = name.split_once('/').unwrap_or_default();
            Key { kind, namespace: namespace.to_owned(), name: name.to_owned() }
        };
        match kind {
            Kind::Node => self.by_name.keys().map(alone).collect(),
            Kind::ServiceCidr => self.service_cidrs.keys().map(alone).collect(),
            Kind::Service | Kind::EndpointSlice => self.services.names(kind).map(split).collect(),
            Kind::Pod => Vec::new(),
        }
    }

    fn put_node(&mut self, info: NodeInfo) -> bool {
        if self.node(&info.name).is_some_and(|before| **before == info) {
            return false;
        }
        self.take_node(&info.name);
        let precedence = Precedence::of(&info);
        self.by_name.insert(info.name.clone(), precedence.clone());
        self.nodes.insert(precedence, Arc::new(info));
        true
    }

    fn take_node(&mut self, name: &str) -> bool {
        let before = self.by_name.remove(name);
        before.and_then(|precedence| self.nodes.remove(&precedence)).is_some()
    }
}

/// Whether the mesh is made from objects of this kind.
fn is_mesh(kind: Kind) -> bool {
    match kind {
        Kind::Node | Kind::ServiceCidr => true,
        Kind::Service | Kind::EndpointSlice | Kind::Pod => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::source::manifest;

    fn objects(text: &str) -> Vec<Object> {
        let parsed = manifest::parse(text.as_bytes(), false);
        assert_eq!(parsed.problems, []);
        parsed.objects
    }

    fn node(name: &str) -> Object {
        objects(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}")).remove(0)
    }

    #[test]
    fn before_the_first_full_list_only_that_goes_which_the_source_removes() {
        let mut desired = Desired::default();
        desired.remember(&node("c"));
        assert!(desired.apply(&node("a")).changed);
        assert!(desired.apply(&node("b")).changed);
        assert!(!desired.apply(&node("a")).changed);
        assert!(desired.delete(&node("a").key()).changed);
        assert!(!desired.delete(&node("a").key()).changed && !desired.is_unconfirmed(&node("a").key()));
        assert_eq!(desired.nodes().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!(desired.unconfirmed(Kind::Node).collect::<Vec<_>>(), ["c"]);
        assert!(desired.reset(Kind::Node, &[node("a")]).changed);
        assert_eq!(desired.nodes().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["a"]);
        assert!(desired.delete(&node("a").key()).changed);
        assert!(desired.is_listed(Kind::Node) && !desired.is_listed(Kind::ServiceCidr));
    }

    #[test]
    fn what_the_source_does_not_confirm_goes_with_the_first_complete_list() {
        let mut desired = Desired::default();
        let names = |desired: &Desired| desired.nodes().map(|n| n.name.clone()).collect::<Vec<_>>();
        for saved in ["a", "b", "c"] {
            desired.remember(&node(saved));
        }
        desired.list(Kind::Node, &[node("a"), node("d")]);
        assert_eq!(names(&desired), ["a", "b", "c", "d"]);
        assert!(desired.is_unconfirmed(&node("b").key()) && !desired.is_unconfirmed(&node("a").key()));
        desired.apply(&node("b"));
        desired.delete(&node("d").key());
        desired.delete(&node("x").key());
        assert_eq!(names(&desired), ["a", "b", "c"]);
        let outcome = desired.complete(Kind::Node);
        assert!(outcome.changed);
        assert_eq!(outcome.reports.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["Node/c"]);
        assert_eq!(names(&desired), ["a", "b"]);
        // Later an incomplete list removes nobody either.
        desired.list(Kind::Node, &[node("a")]);
        assert_eq!(names(&desired), ["a", "b"]);
        desired.reset(Kind::Node, &[node("a")]);
        assert_eq!(names(&desired), ["a"]);
    }

    #[test]
    fn the_saved_objects_say_the_same() {
        let text = "apiVersion: v1\nkind: Node\nmetadata: {name: a, uid: u, creationTimestamp: 2026-01-02T03:04:05Z,\n  \
                    annotations: {warren.dev/location: x}}\nspec: {podCIDRs: [10.1.0.0/24]}\n\
                    status: {addresses: [{type: InternalIP, address: 10.0.0.1}]}\n---\n\
                    apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: k}\nspec: {cidrs: [10.96.0.0/16]}\n";
        let mut first = Desired::default();
        for object in objects(text) {
            first.apply(&object);
        }
        let mut second = Desired::default();
        for object in first.objects() {
            second.apply(&object);
        }
        assert!(first.nodes().eq(second.nodes()));
        assert_eq!(second.service_ranges(), first.service_ranges());
        assert_eq!(second.service_ranges().len(), 1);
    }
}
