//! The demo's Services, as ordinary objects in the folder that the agents watch. Kubernetes' controllers
//! would keep the EndpointSlices in step with the pods; here the scenes write them anew when a pod goes or
//! comes.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::agents::cluster_folder;
use super::dns::{CLUSTER_DOMAIN, PORT as DNS_PORT};
use super::traffic::PORT as POD_PORT;
use super::world::{Pod, World};
use super::{DemoError, dns};

/// All Services: what `--service-cidr` of kube-apiserver would be.
pub(super) const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:10:96::/112";
/// The Service of the scenes.
pub(super) const NAME: &str = "my-service";
/// And its namespace; the pods are in `default`.
pub(super) const NAMESPACE: &str = "my-namespace";
/// Its own port; the pods behind it have another one.
pub(super) const PORT: u16 = 80;
/// Where every node answers for it.
pub(super) const NODE_PORT: u16 = 30007;
/// More endpoints would only make the demo longer.
const MOST_ENDPOINTS: usize = 3;

/// The ClusterIPs' last numbers: of the Service, and of DNS, which is the tenth everywhere.
const SERVICE_HOST: u8 = 20;
const DNS_HOST: u8 = 10;

/// The Service's ClusterIP of one family.
pub(super) fn address(v6: bool) -> IpAddr {
    cluster_ip(SERVICE_HOST, v6)
}

/// Where the Service is spoken to by that.
pub(super) fn socket(v6: bool) -> SocketAddr {
    SocketAddr::new(address(v6), PORT)
}

/// Where the cluster's DNS is spoken to.
pub(super) fn dns_socket(v6: bool) -> SocketAddr {
    SocketAddr::new(cluster_ip(DNS_HOST, v6), DNS_PORT)
}

/// Its name in the whole cluster.
pub(super) fn full_name() -> String {
    format!("{NAME}.{NAMESPACE}.svc.{CLUSTER_DOMAIN}")
}

/// Its name for pods of any namespace, by their search domains.
pub(super) fn short_name() -> String {
    format!("{NAME}.{NAMESPACE}")
}

/// What the kubelet writes for a pod of namespace `default` with `dnsPolicy: ClusterFirst`.
pub(super) fn resolv_conf(v6: bool) -> String {
    let servers = families(v6).map(|v6| format!("nameserver {}\n", cluster_ip(DNS_HOST, v6)));
    let servers: String = servers.collect();
    format!(
        "search default.svc.{CLUSTER_DOMAIN} svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}\n{servers}options ndots:5\n"
    )
}

/// The pods behind the Service, with the index of each one's node: the second pod of the first nodes.
pub(super) fn endpoints(world: &World) -> Vec<(usize, &Pod)> {
    let nodes = world.nodes.iter().enumerate().take(MOST_ENDPOINTS);
    nodes.filter_map(|(index, node)| Some((index, node.pods.get(1)?))).collect()
}

/// Writes all Services, with the pods that there are now.
pub(super) fn write(world: &World) -> Result<(), DemoError> {
    let families: Vec<_> = families(world.v6).collect();
    let behind = endpoints(world);
    let behind: Vec<_> = behind.iter().map(|(node, pod)| (world.nodes[*node].name.as_str(), *pod)).collect();
    let served = [
        Port { name: "tcp", protocol: "TCP", port: PORT, target: POD_PORT, node_port: NODE_PORT },
        Port { name: "udp", protocol: "UDP", port: PORT, target: POD_PORT, node_port: NODE_PORT },
    ];
    let service =
        Service { namespace: NAMESPACE, name: NAME, app: "my-app", host: SERVICE_HOST, ports: &served };
    replace("my-service.yaml", &service.objects(&families, &behind))?;
    let Some((node, pod)) = world.dns() else { return Ok(()) };
    let spoken = [
        Port { name: "dns", protocol: "UDP", port: dns::PORT, target: dns::PORT, node_port: 0 },
        Port { name: "dns-tcp", protocol: "TCP", port: dns::PORT, target: dns::PORT, node_port: 0 },
    ];
    let service = Service {
        namespace: "kube-system",
        name: "kube-dns",
        app: "kube-dns",
        host: DNS_HOST,
        ports: &spoken,
    };
    replace("kube-dns.yaml", &service.objects(&families, &[(node.name.as_str(), pod)]))
}

/// A port of a Service.
struct Port {
    name: &'static str,
    protocol: &'static str,
    port: u16,
    target: u16,
    /// 0 for none.
    node_port: u16,
}

/// A Service.
struct Service<'a> {
    namespace: &'static str,
    name: &'static str,
    app: &'static str,
    host: u8,
    ports: &'a [Port],
}

impl Service<'_> {
    /// The Service and its slices, one a family, as `kubectl get -o yaml` would show the parts that count.
    fn objects(&self, families: &[bool], behind: &[(&str, &Pod)]) -> String {
        let mut text = self.object(families);
        for &v6 in families {
            text.push_str(&self.slice(v6, behind));
        }
        text
    }

    fn object(&self, families: &[bool]) -> String {
        let Service { namespace, name, app, host, ports } = self;
        let kind = if ports.iter().any(|port| port.node_port != 0) { "NodePort" } else { "ClusterIP" };
        let first = cluster_ip(*host, families.first().is_some_and(|v6| *v6));
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {namespace}\nspec:\n  \
             type: {kind}\n  selector:\n    app: {app}\n  clusterIP: \"{first}\"\n  clusterIPs:\n"
        );
        for &v6 in families {
            let _ = writeln!(text, "  - \"{}\"", cluster_ip(*host, v6));
        }
        text.push_str("  ipFamilies:\n");
        for &v6 in families {
            let _ = writeln!(text, "  - {}", family(v6));
        }
        text.push_str("  ports:\n");
        for Port { name, protocol, port, target, node_port } in *ports {
            let _ = write!(
                text,
                "  - name: {name}\n    protocol: {protocol}\n    port: {port}\n    targetPort: {target}\n"
            );
            if *node_port != 0 {
                let _ = writeln!(text, "    nodePort: {node_port}");
            }
        }
        text
    }

    fn slice(&self, v6: bool, behind: &[(&str, &Pod)]) -> String {
        let Service { namespace, name, ports, .. } = self;
        let family = family(v6);
        let mut text = format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{low}\n  \
             namespace: {namespace}\n  labels:\n    kubernetes.io/service-name: {name}\naddressType: {family}\n\
             ports:\n",
            low = family.to_lowercase()
        );
        for Port { name, protocol, target, .. } in *ports {
            let _ = write!(text, "- name: {name}\n  protocol: {protocol}\n  port: {target}\n");
        }
        text.push_str(if behind.is_empty() { "endpoints: []\n" } else { "endpoints:\n" });
        for (node, pod) in behind {
            let _ = write!(
                text,
                "- addresses:\n  - \"{}\"\n  conditions:\n    ready: true\n  nodeName: {node}\n  targetRef:\n    \
                 kind: Pod\n    namespace: default\n    name: {}\n",
                pod.address(v6),
                pod.name
            );
        }
        text
    }
}

/// Whole at once: an agent that looks in between sees the old one.
fn replace(name: &str, text: &str) -> Result<(), DemoError> {
    let (path, new) = (cluster_folder().join(name), cluster_folder().join(format!(".{name}.new")));
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, &path))
        .map_err(|e| DemoError::system(format!("writing {}", path.display()), e))
}

fn families(v6: bool) -> impl Iterator<Item = bool> {
    [false, true].into_iter().take(if v6 { 2 } else { 1 })
}

fn family(v6: bool) -> &'static str {
    if v6 { "IPv6" } else { "IPv4" }
}

fn cluster_ip(host: u8, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host.into()).into()
    } else {
        Ipv4Addr::new(10, 96, 0, host).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::service::Protocol;
    use crate::state::services::service;
    use crate::state::source::Object;
    use crate::state::source::manifest;

    #[test]
    fn the_objects_are_read_as_they_are_meant() {
        let ports = [
            Port { name: "tcp", protocol: "TCP", port: PORT, target: POD_PORT, node_port: NODE_PORT },
            Port { name: "udp", protocol: "UDP", port: PORT, target: POD_PORT, node_port: NODE_PORT },
        ];
        let one =
            Service { namespace: NAMESPACE, name: NAME, app: "my-app", host: SERVICE_HOST, ports: &ports };
        let read = manifest::parse(one.objects(&[false, true], &[]).as_bytes(), false);
        assert_eq!((read.objects.len(), read.problems.len()), (3, 0), "{:?}", read.problems);
        for object in &read.objects {
            match object {
                Object::Service(object) => {
                    let (info, problems) = service::service(object);
                    let info = info.expect("a Service to serve");
                    assert_eq!(&*info.cluster_ips, [address(false), address(true)], "{problems:?}");
                    assert!(info.ports.iter().all(|port| (port.port, port.node_port) == (PORT, NODE_PORT)));
                    assert_eq!(info.ports[1].protocol, Protocol::Udp);
                }
                Object::EndpointSlice(object) => {
                    let labels = object.metadata.labels.clone().expect("labels");
                    assert_eq!(labels.get("kubernetes.io/service-name").map(String::as_str), Some(NAME));
                    assert_eq!(object.ports.as_ref().map(Vec::len), Some(ports.len()));
                }
                Object::Node(_) | Object::Pod(_) | Object::ServiceCidr(_) => panic!("{object:?}"),
            }
        }
    }

    #[test]
    fn resolv_conf_is_as_the_kubelet_writes_it() {
        let expected = "search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\n\
                        nameserver fd00:10:96::a\noptions ndots:5\n";
        assert_eq!(resolv_conf(true), expected);
        assert!(!resolv_conf(false).contains("fd00"));
    }
}
