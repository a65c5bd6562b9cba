//! Services and slices as they survive a restart: one object a line, as Kubernetes would write it, so that a
//! reload goes through the same conversion as everything else and never needs the whole file twice in memory.
//!
//! 10,000 Services with 25 endpoints each make about 17 MB.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{
    ClientIPConfig, LoadBalancerIngress, LoadBalancerStatus, Service, ServicePort, ServiceSpec,
    ServiceStatus, SessionAffinityConfig,
};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::service::ServiceInfo;
use super::slice::{SERVICE_NAME, SliceEndpoint, SliceInfo};
use super::store::ServiceStore;
use crate::state::checkpoint::too_large;
use crate::state::source::{Kind, Object};

/// Everything at one moment.
#[derive(Clone, Debug, Default)]
pub struct SavedServices {
    services: Vec<Arc<ServiceInfo>>,
    slices: Vec<Arc<SliceInfo>>,
}

impl SavedServices {
    /// What the store holds now.
    pub fn capture(store: &ServiceStore) -> SavedServices {
        SavedServices {
            services: store.services().cloned().collect(),
            slices: store.all_slices().cloned().collect(),
        }
    }

    /// Puts the lines after what is there. Fails where that would be more than `largest` bytes in all.
    pub fn write(&self, out: &mut Vec<u8>, largest: usize) -> io::Result<()> {
        let endpoints: usize = self.slices.iter().map(|slice| slice.endpoints.len()).sum();
        let guess = 256 * (self.services.len() + self.slices.len()) + 64 * endpoints;
        out.reserve(guess.min(largest));
        for info in &self.services {
            line(out, Kind::Service, &to_service(info), largest)?;
        }
        for info in &self.slices {
            line(out, Kind::EndpointSlice, &to_slice(info), largest)?;
        }
        Ok(())
    }
}

fn line(out: &mut Vec<u8>, kind: Kind, object: &impl Serialize, largest: usize) -> io::Result<()> {
    out.extend_from_slice(format!("{} ", kind.name()).as_bytes());
    serde_json::to_writer(&mut *out, object)?;
    out.push(b'\n');
    if out.len() > largest { Err(too_large(largest)) } else { Ok(()) }
}

/// The objects of such lines.
pub fn from_bytes(bytes: &[u8]) -> Result<Vec<Object>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let object = |line: &str| match line.split_once(' ') {
        Some(("Service", json)) => read(json).map(Object::Service),
        Some(("EndpointSlice", json)) => read(json).map(Object::EndpointSlice),
        Some(_) | None => Err("holds a line that says nothing of Services".to_owned()),
    };
    text.lines().map(object).collect()
}

fn read<T: DeserializeOwned>(json: &str) -> Result<Arc<T>, String> {
    serde_json::from_str(json).map(Arc::new).map_err(|error| error.to_string())
}

fn to_service(info: &ServiceInfo) -> Service {
    let texts = |list: &[IpAddr]| some(list.iter().map(IpAddr::to_string));
    let (created, uid) = info.precedence.origin();
    let policy = |local: bool| local.then(|| "Local".to_owned());
    let port = |port: &super::service::PortInfo| ServicePort {
        name: Some(port.name.to_string()).filter(|name| !name.is_empty()),
        protocol: Some(port.protocol.name().to_owned()),
        port: port.port.into(),
        node_port: Some(port.node_port.into()).filter(|port| *port != 0),
        ..ServicePort::default()
    };
    let affinity = (info.affinity > 0).then(|| SessionAffinityConfig {
        client_ip: Some(ClientIPConfig { timeout_seconds: i32::try_from(info.affinity).ok() }),
    });
    let ingress =
        |ip: &IpAddr| LoadBalancerIngress { ip: Some(ip.to_string()), ..LoadBalancerIngress::default() };
    let ingress: Vec<LoadBalancerIngress> = info.load_balancers.iter().map(ingress).collect();
    Service {
        metadata: ObjectMeta {
            uid: Some(uid.to_owned()).filter(|uid| !uid.is_empty()),
            creation_timestamp: created.map(Time),
            ..metadata(&info.name)
        },
        spec: Some(ServiceSpec {
            type_: (info.health_check > 0).then(|| "LoadBalancer".to_owned()),
            cluster_ips: texts(&info.cluster_ips),
            external_ips: texts(&info.external_ips),
            ports: Some(info.ports.iter().map(port).collect()),
            load_balancer_source_ranges: some(info.sources.iter().map(IpNet::to_string)),
            session_affinity: affinity.is_some().then(|| "ClientIP".to_owned()),
            session_affinity_config: affinity,
            internal_traffic_policy: policy(info.internal_local),
            external_traffic_policy: policy(info.external_local),
            health_check_node_port: Some(info.health_check.into()).filter(|port| *port != 0),
            publish_not_ready_addresses: info.publish_not_ready.then_some(true),
            ..ServiceSpec::default()
        }),
        status: (!ingress.is_empty()).then(|| ServiceStatus {
            load_balancer: Some(LoadBalancerStatus { ingress: Some(ingress) }),
            ..ServiceStatus::default()
        }),
    }
}

fn to_slice(info: &SliceInfo) -> EndpointSlice {
    let owner = info.service.split_once('/').map(|(_, name)| name.to_owned()).unwrap_or_default();
    let port = |port: &super::slice::SlicePort| EndpointPort {
        name: Some(port.name.to_string()).filter(|name| !name.is_empty()),
        protocol: Some(port.protocol.name().to_owned()),
        port: Some(port.port.into()),
        ..EndpointPort::default()
    };
    EndpointSlice {
        metadata: ObjectMeta {
            labels: Some(BTreeMap::from([(SERVICE_NAME.to_owned(), owner)])),
            ..metadata(&info.name)
        },
        address_type: if info.ipv4 { "IPv4" } else { "IPv6" }.to_owned(),
        ports: Some(info.ports.iter().map(port).collect()),
        endpoints: Some(info.endpoints.iter().map(to_endpoint).collect()),
    }
}

fn to_endpoint(endpoint: &SliceEndpoint) -> Endpoint {
    let usual = endpoint.ready && endpoint.serving && !endpoint.terminating;
    Endpoint {
        addresses: vec![endpoint.address.to_string()],
        conditions: (!usual).then_some(EndpointConditions {
            ready: Some(endpoint.ready),
            serving: Some(endpoint.serving),
            terminating: Some(endpoint.terminating),
        }),
        node_name: endpoint.node.as_deref().map(str::to_owned),
        hints: endpoint.hints.as_ref().map(|hints| EndpointHints {
            for_zones: Some(hints.zones.iter().map(|name| ForZone { name: name.to_string() }).collect()),
            for_nodes: Some(hints.nodes.iter().map(|name| ForNode { name: name.to_string() }).collect()),
        }),
        ..Endpoint::default()
    }
}

fn metadata(full_name: &str) -> ObjectMeta {
    let (namespace, name) = full_name.split_once('/').unwrap_or_default();
    ObjectMeta { namespace: Some(namespace.to_owned()), name: Some(name.to_owned()), ..ObjectMeta::default() }
}

/// A list, unless it is empty.
fn some(list: impl Iterator<Item = String>) -> Option<Vec<String>> {
    let list: Vec<String> = list.collect();
    (!list.is_empty()).then_some(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::source::manifest;

    fn store(objects: &[Object]) -> ServiceStore {
        let mut store = ServiceStore::default();
        for object in objects {
            let key = object.key();
            match object {
                Object::Service(service) => drop(store.put_service(&key, service)),
                Object::EndpointSlice(slice) => drop(store.put_slice(&key, slice)),
                Object::Node(_) | Object::Pod(_) | Object::ServiceCidr(_) => panic!("{key}"),
            }
        }
        store
    }

    #[test]
    fn what_is_saved_says_the_same() {
        let text = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, uid: u, creationTimestamp: 2026-01-02T03:04:05Z}
spec: {type: LoadBalancer, clusterIPs: [10.96.0.5, 'fd00:96::5'], externalIPs: [203.0.113.9], sessionAffinity: ClientIP,
  externalTrafficPolicy: Local, internalTrafficPolicy: Local, healthCheckNodePort: 31000, publishNotReadyAddresses: true,
  loadBalancerSourceRanges: [all], ports: [{name: a, port: 80, nodePort: 30080}, {name: b, port: 53, protocol: UDP}]}
status: {loadBalancer: {ingress: [{ip: 198.51.100.1}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: plain}, spec: {clusterIP: 10.96.0.6, ports: [{port: 80}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: a, port: 8080}, {port: 9}]
endpoints:
- {addresses: ['fd00::1'], nodeName: n, hints: {forZones: [{name: z}], forNodes: [{name: n}]}}
- {addresses: ['fd00::2'], conditions: {ready: false, terminating: true}}
";
        let first = store(&manifest::parse(text.as_bytes(), false).objects);
        let saved = SavedServices::capture(&first);
        let mut bytes = Vec::new();
        saved.write(&mut bytes, usize::MAX).expect("JSON");
        assert!(saved.write(&mut Vec::new(), bytes.len() - 1).is_err());
        let second = store(&from_bytes(&bytes).expect("objects"));
        assert!(first.services().eq(second.services()) && first.services().count() == 2);
        assert!(first.all_slices().eq(second.all_slices()) && first.all_slices().count() == 1);
    }

    #[test]
    fn what_is_not_ours_is_not_obeyed() {
        for bad in [&b"Node {}\n"[..], b"x", b"Service {", b"\xff"] {
            assert!(from_bytes(bad).is_err(), "{bad:?}");
        }
        assert_eq!(from_bytes(b""), Ok(Vec::new()));
    }
}
