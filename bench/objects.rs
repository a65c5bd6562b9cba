//! A generated cluster, the same for everybody who is measured: nodes, Services, EndpointSlices, as an API
//! server holds them (its defaults filled in).

use std::net::IpAddr;

use serde_json::{Value, json};

/// Nodes of the generated cluster: n0, on which everybody runs who is measured, and those with endpoints.
pub const NODES: u32 = 10;
/// The last byte of an endpoint's address tells its set.
const FIRST: u32 = 10;
const SET: u32 = 80;

/// Node `n`.
pub fn node(n: u32) -> Value {
    named_node(&format!("n{n}"), &format!("10.244.{n}.0/24"), &format!("192.0.2.{}", n + 1))
}

/// Any node.
pub fn named_node(name: &str, pods: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDR": pods, "podCIDRs": [pods]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    })
}

/// The address of Service `n`.
pub fn cluster_ip(n: u32) -> [u8; 4] {
    (0x0a60_0000 + 10 + n).to_be_bytes()
}

/// Service `n`: TCP port 80 to 8080.
pub fn service(n: u32) -> Value {
    named_service(&format!("s{n}"), cluster_ip(n).into(), &[("web", 80, 8080)])
}

/// Any Service: its ports are name, port, target port.
pub fn named_service(name: &str, address: IpAddr, ports: &[(&str, u16, u16)]) -> Value {
    let port = |(name, port, target): &(&str, u16, u16)| json!({"name": name, "port": port, "protocol": "TCP", "targetPort": target});
    let address = address.to_string();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "bench"},
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "ports": ports.iter().map(port).collect::<Vec<_>>(),
        },
    })
}

/// The endpoints of Service `n`; another `set` shares none with this one.
pub fn slice(n: u32, endpoints: u32, set: u32) -> Value {
    let endpoint = |i: u32| {
        let node = (n + i) % (NODES - 1) + 1;
        (format!("10.244.{node}.{}", FIRST + (i + set * SET) % 240), format!("n{node}"))
    };
    let endpoints: Vec<_> = (0..endpoints).map(endpoint).collect();
    named_slice(&format!("s{n}"), &[("web", 80, 8080)], &endpoints)
}

/// The set that an endpoint's address is of.
pub fn set_of(address: [u8; 4]) -> u32 {
    (u32::from(address[3]) - FIRST) / SET
}

/// Any Service's endpoints: address and node.
pub fn named_slice(service: &str, ports: &[(&str, u16, u16)], endpoints: &[(String, String)]) -> Value {
    let endpoint = |(address, node): &(String, String)| {
        json!({
            "addresses": [address],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": node,
        })
    };
    let port =
        |(name, _, target): &(&str, u16, u16)| json!({"name": name, "port": target, "protocol": "TCP"});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("{service}-1"), "namespace": "bench",
            "labels": {"kubernetes.io/service-name": service},
        },
        "ports": ports.iter().map(port).collect::<Vec<_>>(),
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    })
}
