//! Services and slices as they should be, and which Services changed since when.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::service::{self, ServiceInfo};
use super::slice::{self, Names, SliceInfo};
use crate::state::problem::{Problem, ProblemKind};
use crate::state::source::{Key, Kind};

/// Most Services; Kubernetes is tested with 10,000.
pub const MAX_SERVICES: usize = 100_000;
/// Most slices.
pub const MAX_SLICES: usize = 400_000;
/// Most changes that are remembered; a compiler that missed more looks at everything.
const JOURNAL: usize = 1 << 16;

/// The store.
#[derive(Clone, Debug, Default)]
pub struct ServiceStore {
    services: BTreeMap<Arc<str>, Arc<ServiceInfo>>,
    /// By Service, then by slice.
    slices: HashMap<Arc<str>, BTreeMap<Arc<str>, Arc<SliceInfo>>>,
    /// The Service of each slice.
    owners: HashMap<Arc<str>, Arc<str>>,
    names: Names,
    /// Services that changed, the latest last; as many changes came before the first of them.
    journal: VecDeque<Arc<str>>,
    forgotten: u64,
}

impl ServiceStore {
    /// A Service is new or has changed; whether that says anything new.
    pub(in crate::state) fn put_service(&mut self, key: &Key, object: &Service) -> (bool, Vec<Problem>) {
        let (info, mut problems) = service::service(object);
        let Some(mut info) = info else { return (self.take_service(key), problems) };
        info.name = self.names.share(&info.name);
        let before = self.services.get(&info.name);
        if before.is_some_and(|before| **before == info) {
            return (false, problems);
        }
        if before.is_none() && self.services.len() >= MAX_SERVICES {
            problems.push(too_many(key, MAX_SERVICES));
            return (false, problems);
        }
        let name = Arc::clone(&info.name);
        self.services.insert(Arc::clone(&name), Arc::new(info));
        self.note(name);
        (true, problems)
    }

    /// A slice is new or has changed; whether that says anything new.
    pub(in crate::state) fn put_slice(&mut self, key: &Key, object: &EndpointSlice) -> (bool, Vec<Problem>) {
        let (info, mut problems) = slice::slice(object, &mut self.names);
        let Some(info) = info else { return (self.take_slice(key), problems) };
        let owner = self.owners.get(&info.name).cloned();
        let before = owner.as_ref().and_then(|owner| self.slices.get(owner)?.get(&info.name));
        if before.is_some_and(|before| **before == info) {
            return (false, problems);
        }
        if before.is_none() && self.owners.len() >= MAX_SLICES {
            problems.push(too_many(key, MAX_SLICES));
            return (false, problems);
        }
        if owner.is_some_and(|owner| owner != info.service) {
            self.take_slice(key);
        }
        let service = Arc::clone(&info.service);
        self.owners.insert(Arc::clone(&info.name), Arc::clone(&service));
        let slices = self.slices.entry(Arc::clone(&service)).or_default();
        slices.insert(Arc::clone(&info.name), Arc::new(info));
        self.note(service);
        (true, problems)
    }

    /// The object is gone; whether there was one.
    pub(in crate::state) fn take(&mut self, key: &Key) -> bool {
        match key.kind {
            Kind::Service => self.take_service(key),
            Kind::EndpointSlice => self.take_slice(key),
            Kind::Node | Kind::Pod | Kind::ServiceCidr => false,
        }
    }

    /// The `namespace/name`s of all objects of a kind.
    pub(in crate::state) fn names(&self, kind: Kind) -> Box<dyn Iterator<Item = &Arc<str>> + '_> {
        match kind {
            Kind::Service => Box::new(self.services.keys()),
            Kind::EndpointSlice => Box::new(self.owners.keys()),
            Kind::Node | Kind::Pod | Kind::ServiceCidr => Box::new(std::iter::empty()),
        }
    }

    /// All Services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceInfo>> {
        self.services.values()
    }

    /// One Service.
    pub fn service(&self, name: &str) -> Option<&Arc<ServiceInfo>> {
        self.services.get(name)
    }

    /// The slices of a Service, by name.
    pub fn slices(&self, service: &str) -> impl Iterator<Item = &Arc<SliceInfo>> {
        self.slices.get(service).into_iter().flat_map(BTreeMap::values)
    }

    /// All slices.
    pub fn all_slices(&self) -> impl Iterator<Item = &Arc<SliceInfo>> {
        self.slices.values().flat_map(BTreeMap::values)
    }

    /// The Services of which a slice is so.
    pub(super) fn services_with(&self, mut holds: impl FnMut(&SliceInfo) -> bool) -> Vec<Arc<str>> {
        let mut found = Vec::new();
        for (service, slices) in &self.slices {
            if slices.values().any(|slice| holds(slice)) {
                found.push(Arc::clone(service));
            }
        }
        found
    }

    /// How many changes there ever were.
    pub(super) fn revision(&self) -> u64 {
        self.forgotten + self.journal.len() as u64
    }

    /// Which Services changed since; `None`: too much to tell.
    pub(super) fn changed_since(&self, revision: u64) -> Option<BTreeSet<Arc<str>>> {
        let from = usize::try_from(revision.checked_sub(self.forgotten)?).ok()?;
        Some(self.journal.iter().skip(from).cloned().collect())
    }

    fn note(&mut self, service: Arc<str>) {
        if self.journal.len() >= JOURNAL {
            self.journal.pop_front();
            self.forgotten += 1;
        }
        self.journal.push_back(service);
    }

    fn take_service(&mut self, key: &Key) -> bool {
        let name = full_name(key);
        let Some((name, _)) = self.services.remove_entry(name.as_str()) else { return false };
        self.note(name);
        true
    }

    fn take_slice(&mut self, key: &Key) -> bool {
        let name = full_name(key);
        let Some(service) = self.owners.remove(name.as_str()) else { return false };
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.remove(name.as_str());
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
        self.note(service);
        true
    }
}

fn full_name(key: &Key) -> String {
    format!("{}/{}", key.namespace, key.name)
}

fn too_many(key: &Key, most: usize) -> Problem {
    Problem {
        kind: ProblemKind::Object,
        subject: key.to_string(),
        field: String::new(),
        reason: format!("more than {most} objects of this kind"),
    }
}
