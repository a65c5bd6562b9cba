//! Which addresses a name has: Services and EndpointSlices of a folder, read again when a file has changed.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::CLUSTER_DOMAIN;
use crate::state::source::folder::Folder;
use crate::state::source::{Key, Kind, Object, SourceEvent};

/// The label that names a slice's Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What is known of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// It exists, and has these addresses; perhaps none.
    Name(Vec<IpAddr>),
    /// It is ours to know, and there is none.
    Nothing,
    /// It is not under the cluster's domain: somebody else knows.
    Elsewhere,
}

/// The names of a folder's Services.
pub(super) struct Zone {
    folder: Folder,
    services: BTreeMap<Key, Arc<Service>>,
    slices: BTreeMap<Key, Arc<EndpointSlice>>,
}

impl Zone {
    /// Of this folder, which is read at the first question.
    pub(super) fn new(folder: &Path) -> Zone {
        Zone { folder: Folder::new(folder), services: BTreeMap::new(), slices: BTreeMap::new() }
    }

    /// Reads what has changed. A folder that cannot be read leaves what is known.
    pub(super) fn refresh(&mut self) {
        for event in self.folder.scan(true).unwrap_or_default() {
            match event {
                SourceEvent::Apply(object) => self.apply(object),
                SourceEvent::Delete(key) => {
                    self.services.remove(&key);
                    self.slices.remove(&key);
                }
                SourceEvent::Reset { kind, objects, complete, .. } => {
                    if complete {
                        self.services.retain(|key, _| key.kind != kind);
                        self.slices.retain(|key, _| key.kind != kind);
                    }
                    objects.into_iter().for_each(|object| self.apply(object));
                }
                // The agents read the same folder, and report.
                SourceEvent::Problems { .. } => {}
            }
        }
    }

    /// A name by its labels, from the left, in small letters. In the zone are
    /// `SERVICE.NAMESPACE.svc.cluster.local` and the names above it.
    pub(super) fn look_up(&self, labels: &[String]) -> Found {
        let zone: Vec<_> = CLUSTER_DOMAIN.split('.').collect();
        let Some((inside, end)) = labels.len().checked_sub(zone.len()).map(|at| labels.split_at(at)) else {
            return Found::Elsewhere;
        };
        if end != zone {
            return Found::Elsewhere;
        }
        let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
        match inside.as_slice() {
            [] | ["svc"] => Found::Name(Vec::new()),
            [namespace, "svc"] if self.services.keys().any(|key| key.namespace == *namespace) => {
                Found::Name(Vec::new())
            }
            [name, namespace, "svc"] => self.service(namespace, name),
            _ => Found::Nothing,
        }
    }

    fn service(&self, namespace: &str, name: &str) -> Found {
        let key = Key { kind: Kind::Service, namespace: namespace.to_owned(), name: name.to_owned() };
        let Some(spec) = self.services.get(&key).map(|service| service.spec.as_ref()) else {
            return Found::Nothing;
        };
        let listed = spec.and_then(|spec| spec.cluster_ips.clone()).filter(|ips| !ips.is_empty());
        let ips = listed.or_else(|| Some(vec![spec?.cluster_ip.clone()?])).unwrap_or_default();
        if ips.first().is_some_and(|ip| ip == "None") {
            return Found::Name(self.endpoints(namespace, name));
        }
        Found::Name(ips.iter().filter_map(|ip| ip.parse().ok()).collect())
    }

    /// A headless Service's name stands for its ready endpoints.
    fn endpoints(&self, namespace: &str, name: &str) -> Vec<IpAddr> {
        let of_service = |key: &Key, slice: &EndpointSlice| {
            let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
            key.namespace == namespace && label.is_some_and(|label| label == name)
        };
        let slices = self.slices.iter().filter(|(key, slice)| of_service(key, slice));
        let endpoints = slices.flat_map(|(_, slice)| slice.endpoints.iter().flatten());
        // What does not say is ready, as the API has it.
        let ready = endpoints.filter(|e| e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true));
        let mut addresses: Vec<IpAddr> =
            ready.flat_map(|e| e.addresses.iter().filter_map(|address| address.parse().ok())).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    fn apply(&mut self, object: Object) {
        let key = object.key();
        match object {
            Object::Service(service) => drop(self.services.insert(key, service)),
            Object::EndpointSlice(slice) => drop(self.slices.insert(key, slice)),
            Object::Node(_) | Object::Pod(_) | Object::ServiceCidr(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec:\n  \
                       clusterIP: 10.96.0.20\n  clusterIPs: [10.96.0.20, 'fd00:10:96::14']\n";
    const ONE_FAMILY: &str =
        "apiVersion: v1\nkind: Service\nmetadata: {name: plain}\nspec: {clusterIP: 10.96.0.21}\n";
    const HEADLESS: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: all, namespace: shop}\nspec: \
                            {clusterIP: None, clusterIPs: [None]}\n---\napiVersion: discovery.k8s.io/v1\nkind: \
                            EndpointSlice\nmetadata: {name: all-1, namespace: shop, labels: \
                            {kubernetes.io/service-name: all}}\naddressType: IPv4\nports: []\nendpoints:\n- \
                            addresses: [10.244.1.3]\n- addresses: [10.244.2.3]\n  conditions: {ready: false}\n";

    fn addresses(list: &[&str]) -> Found {
        Found::Name(list.iter().map(|text| text.parse().expect("an address")).collect())
    }

    fn ask(zone: &mut Zone, name: &str) -> Found {
        zone.refresh();
        zone.look_up(&name.split('.').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn names_are_those_of_the_folder() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
        write("web.yaml", WEB);
        write("plain.yaml", ONE_FAMILY);
        write("all.yaml", HEADLESS);
        let mut zone = Zone::new(folder.path());
        for (name, expected) in [
            ("web.shop.svc.cluster.local", addresses(&["10.96.0.20", "fd00:10:96::14"])),
            ("plain.default.svc.cluster.local", addresses(&["10.96.0.21"])),
            ("all.shop.svc.cluster.local", addresses(&["10.244.1.3"])),
            ("shop.svc.cluster.local", addresses(&[])),
            ("svc.cluster.local", addresses(&[])),
            ("cluster.local", addresses(&[])),
            ("web.default.svc.cluster.local", Found::Nothing),
            ("street.svc.cluster.local", Found::Nothing),
            ("web.shop.pod.cluster.local", Found::Nothing),
            ("x.web.shop.svc.cluster.local", Found::Nothing),
            ("web.shop.svc.cluster.example", Found::Elsewhere),
            ("local", Found::Elsewhere),
        ] {
            assert_eq!(ask(&mut zone, name), expected, "{name}");
        }
        write("web.yaml", &WEB.replace("0.20", "0.30"));
        let changed = addresses(&["10.96.0.30", "fd00:10:96::14"]);
        assert_eq!(ask(&mut zone, "web.shop.svc.cluster.local"), changed);
        fs::remove_file(folder.path().join("web.yaml")).expect("removed");
        assert_eq!(ask(&mut zone, "web.shop.svc.cluster.local"), Found::Nothing);
    }
}
