//! A Service object to a typed, bounded value.
//!
//! Target ports are not read: the EndpointSlices hold their numbers, named ones too, under the Service
//! port's name.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{self, ServiceSpec};

use crate::snapshot::service::Protocol;
use crate::state::desired::Precedence;
use crate::state::problem::{Problem, ProblemKind, quote};
use crate::state::source::manifest::is_dns_name;

/// Most ports of one Service. The API sets no bound; etcd's object size ends near 10,000.
pub const MAX_PORTS: usize = 256;
/// Most external IPs, and most load-balancer addresses, of one Service.
pub const MAX_ADDRESSES: usize = 64;
/// Most `loadBalancerSourceRanges`.
pub const MAX_SOURCES: usize = 256;
/// Most problems that one object may have told of it.
const MAX_PROBLEMS: usize = 16;
/// Affinity's default and longest, in seconds (API: DefaultClientIPServiceAffinitySeconds, one day).
const AFFINITY: (u32, u32) = (10_800, 86_400);

const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// Its name; empty where there is only one.
    pub name: Box<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Where the ClusterIP listens.
    pub port: u16,
    /// Where nodes listen; 0 where they do not.
    pub node_port: u16,
}

/// A Service that is ours to serve. Two equal ones say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceInfo {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// Who comes first when two claim the same.
    pub precedence: Precedence,
    /// The ports.
    pub ports: Box<[PortInfo]>,
    /// One ClusterIP a family.
    pub cluster_ips: Box<[IpAddr]>,
    /// External IPs of these families.
    pub external_ips: Box<[IpAddr]>,
    /// Load-balancer addresses whose packets arrive unchanged (`ipMode: VIP`), of these families.
    pub load_balancers: Box<[IpAddr]>,
    /// `loadBalancerSourceRanges`.
    pub sources: Box<[IpNet]>,
    /// Seconds that a client keeps its endpoint; 0 for not at all.
    pub affinity: u32,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// Where the load balancer asks whether this node has endpoints; 0 for nowhere.
    pub health_check: u16,
    /// Whether every endpoint counts as ready.
    pub publish_not_ready: bool,
}

/// A Service, or `None` if it is none of ours (headless, `ExternalName`, another proxy's, unusable), and what
/// is wrong with it.
pub fn service(object: &v1::Service) -> (Option<ServiceInfo>, Vec<Problem>) {
    let metadata = &object.metadata;
    let namespace = metadata.namespace.as_deref().filter(|text| !text.is_empty()).unwrap_or("default");
    let name = metadata.name.as_deref().unwrap_or_default();
    let mut problems = Problems::of("Service", namespace, name);
    if !is_dns_name(namespace) || !is_dns_name(name) {
        problems.add(ProblemKind::Object, "metadata.name", "is not a valid name");
        return (None, problems.list);
    }
    let nothing = ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&nothing);
    if is_foreign(metadata.labels.as_ref()) || spec.type_.as_deref() == Some("ExternalName") {
        return (None, Vec::new());
    }
    let Some(cluster_ips) = cluster_ips(spec, &mut problems) else { return (None, problems.list) };
    let served = |address: &IpAddr| cluster_ips.iter().any(|ip| ip.is_ipv4() == address.is_ipv4());
    let addresses = |field: &str, texts: Vec<&str>, problems: &mut Problems| -> Box<[IpAddr]> {
        addresses(field, texts, problems).into_iter().filter(served).collect()
    };
    let external = spec.external_ips.iter().flatten().map(String::as_str).collect();
    let external_ips = addresses("spec.externalIPs", external, &mut problems);
    let load_balancers = addresses("status.loadBalancer.ingress", ingress(object), &mut problems);
    let full_name = format!("{namespace}/{name}");
    let created = metadata.creation_timestamp.as_ref().map(|time| time.0);
    let uid = metadata.uid.clone().unwrap_or_default();
    let external_local = policy("spec.externalTrafficPolicy", &spec.external_traffic_policy, &mut problems);
    let info = ServiceInfo {
        precedence: Precedence::new(created, uid, full_name.clone()),
        name: full_name.into(),
        ports: ports(spec, &mut problems),
        external_ips,
        load_balancers,
        sources: sources(spec, &mut problems),
        affinity: affinity(spec, &mut problems),
        internal_local: policy("spec.internalTrafficPolicy", &spec.internal_traffic_policy, &mut problems),
        external_local,
        health_check: match spec.type_.as_deref() {
            Some("LoadBalancer") if external_local => {
                number("spec.healthCheckNodePort", spec.health_check_node_port, &mut problems).unwrap_or(0)
            }
            Some(_) | None => 0,
        },
        publish_not_ready: spec.publish_not_ready_addresses == Some(true),
        cluster_ips,
    };
    (Some(info), problems.list)
}

/// Whether the labels say that this Service or slice is left alone: another proxy's, or headless.
pub(super) fn is_foreign(labels: Option<&BTreeMap<String, String>>) -> bool {
    labels.is_some_and(|labels| labels.contains_key(PROXY_NAME) || labels.contains_key(HEADLESS))
}

/// What is wrong with one object: at most [`MAX_PROBLEMS`].
pub(super) struct Problems {
    subject: String,
    pub(super) list: Vec<Problem>,
}

impl Problems {
    pub(super) fn of(kind: &str, namespace: &str, name: &str) -> Problems {
        Problems { subject: format!("{kind}/{namespace}/{name}"), list: Vec::new() }
    }

    /// Pass `format_args!` where there may be many: what is too much is not even written out.
    pub(super) fn add(&mut self, kind: ProblemKind, field: &str, reason: impl fmt::Display) {
        if self.list.len() > MAX_PROBLEMS {
            return;
        }
        let (subject, field, reason) = (self.subject.clone(), field.to_owned(), reason.to_string());
        let problem = Problem { kind, subject, field, reason };
        match self.list.len() {
            _ if self.list.contains(&problem) => {}
            0..MAX_PROBLEMS => self.list.push(problem),
            _ => {
                let reason = "more is wrong than is told here".to_owned();
                self.list.push(Problem { field: String::new(), reason, ..problem });
            }
        }
    }

    pub(super) fn value(&mut self, field: &str, reason: impl fmt::Display) {
        self.add(ProblemKind::Value, field, reason);
    }
}

/// One ClusterIP a family; `None` for a headless Service, or one that has none.
fn cluster_ips(spec: &ServiceSpec, problems: &mut Problems) -> Option<Box<[IpAddr]>> {
    let mut texts: Vec<&str> = spec.cluster_ips.iter().flatten().map(String::as_str).collect();
    if texts.is_empty() {
        texts = spec.cluster_ip.as_deref().into_iter().filter(|text| !text.is_empty()).collect();
    }
    if texts.contains(&"None") || spec.cluster_ip.as_deref() == Some("None") {
        return None;
    }
    if texts.is_empty() {
        problems.value("spec.clusterIP", "is missing: write an address of the Service range, or None");
        return None;
    }
    let mut found: Vec<IpAddr> = Vec::with_capacity(2);
    for address in addresses("spec.clusterIPs", texts, problems) {
        match found.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            true => problems.value("spec.clusterIPs", format!("{address} is a second one of its family")),
            false => found.push(address),
        }
    }
    (!found.is_empty()).then(|| found.into())
}

fn addresses(field: &str, texts: Vec<&str>, problems: &mut Problems) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::with_capacity(texts.len().min(MAX_ADDRESSES));
    for (index, text) in texts.into_iter().enumerate() {
        let field = format!("{field}[{index}]");
        match text.parse::<IpAddr>() {
            Ok(ip) if found.contains(&ip) => {}
            Ok(_) if found.len() >= MAX_ADDRESSES => {
                problems.value(&field, format!("more than {MAX_ADDRESSES} addresses"));
                break;
            }
            Ok(ip) => found.push(ip),
            Err(_) => problems.value(&field, format!("{} is not an address", quote(text))),
        }
    }
    found
}

/// Addresses of load balancers that pass packets on unchanged. One that is a proxy (`ipMode: Proxy`) wants its
/// packets to go through itself. `ipMode` missing means VIP.
fn ingress(object: &v1::Service) -> Vec<&str> {
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_deref()).unwrap_or_default();
    let vips = ingress.iter().filter(|one| one.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
    vips.filter_map(|one| one.ip.as_deref()).filter(|ip| !ip.is_empty()).collect()
}

fn ports(spec: &ServiceSpec, problems: &mut Problems) -> Box<[PortInfo]> {
    let mut found: Vec<PortInfo> = Vec::new();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let field = format!("spec.ports[{index}]");
        if found.len() >= MAX_PORTS {
            problems.value(&field, format!("more than {MAX_PORTS} ports"));
            break;
        }
        let name = port.name.as_deref().unwrap_or_default();
        let Some(protocol) = protocol(&field, port.protocol.as_deref(), problems) else { continue };
        let Some(number) = number(&field, Some(port.port), problems) else { continue };
        if !is_port_name(name) {
            problems.value(&field, format!("{} is no port's name", quote(name)));
            continue;
        }
        let same =
            |other: &PortInfo| *other.name == *name || (other.protocol == protocol && other.port == number);
        if found.iter().any(same) {
            problems.value(&field, "has the name, or the protocol and number, of an earlier port");
            continue;
        }
        let node_port = match port.node_port {
            None | Some(0) => 0,
            given @ Some(_) => self::number(&format!("{field}.nodePort"), given, problems).unwrap_or(0),
        };
        found.push(PortInfo { name: name.into(), protocol, port: number, node_port });
    }
    found.into()
}

/// Empty, or a DNS label, as the API has it.
pub(super) fn is_port_name(name: &str) -> bool {
    name.is_empty() || (name.len() <= 63 && is_dns_name(name) && !name.contains('.'))
}

pub(super) fn protocol(field: &str, name: Option<&str>, problems: &mut Problems) -> Option<Protocol> {
    let name = name.filter(|name| !name.is_empty()).unwrap_or("TCP");
    let found = Protocol::ALL.into_iter().find(|protocol| protocol.name() == name);
    if found.is_none() {
        problems.value(field, format!("{} is no protocol of Services (TCP, UDP, SCTP)", quote(name)));
    }
    found
}

pub(super) fn number(field: &str, number: Option<i32>, problems: &mut Problems) -> Option<u16> {
    let number = number.unwrap_or(0);
    let port = u16::try_from(number).ok().filter(|port| *port > 0);
    if port.is_none() {
        problems.value(field, format!("{number} is no port"));
    }
    port
}

fn sources(spec: &ServiceSpec, problems: &mut Problems) -> Box<[IpNet]> {
    let mut found = Vec::new();
    let given = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    for (index, text) in given.iter().enumerate() {
        let field = format!("spec.loadBalancerSourceRanges[{index}]");
        // The API lets white space pass here.
        match text.trim().parse::<IpNet>() {
            Ok(_) if found.len() >= MAX_SOURCES => {
                problems.value(&field, format!("more than {MAX_SOURCES} ranges"));
                break;
            }
            Ok(range) => found.push(range.trunc()),
            Err(_) => {
                problems.value(&field, format!("{} is not a range like 192.0.2.0/24", quote(text)));
                // What cannot be read must not open the door of a family to all: nobody comes from these.
                found.extend([IpNet::from(IpAddr::from([0; 4])), IpNet::from(IpAddr::from([0; 16]))]);
            }
        }
    }
    found.sort();
    found.dedup();
    found.into()
}

fn affinity(spec: &ServiceSpec, problems: &mut Problems) -> u32 {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return 0,
        Some("ClientIP") => {}
        Some(other) => {
            let reason = format!("{} is not known: taken for None", quote(other));
            problems.value("spec.sessionAffinity", reason);
            return 0;
        }
    }
    let (default, longest) = AFFINITY;
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(given) = config.and_then(|config| config.timeout_seconds) else { return default };
    match u32::try_from(given) {
        Ok(seconds) if (1..=longest).contains(&seconds) => seconds,
        Ok(_) | Err(_) => {
            let reason = format!("{given} s is not between 1 and {longest}: taken for {default}");
            problems.value("spec.sessionAffinityConfig.clientIP.timeoutSeconds", reason);
            default
        }
    }
}

/// Whether the policy is `Local`.
fn policy(field: &str, text: &Option<String>, problems: &mut Problems) -> bool {
    match text.as_deref() {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            problems.value(field, format!("{} is not known: taken for Cluster", quote(other)));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(spec: &str) -> (Option<ServiceInfo>, Vec<Problem>) {
        let text = format!("{{\"metadata\":{{\"name\":\"web\",\"namespace\":\"shop\"}},{spec}}}");
        service(&serde_json::from_str(&text).expect("JSON"))
    }

    #[test]
    fn a_whole_service_is_read() {
        let (info, problems) = parse(
            r#""spec":{"type":"LoadBalancer","clusterIP":"10.96.0.5","clusterIPs":["10.96.0.5","fd00:96::5"],
            "ports":[{"name":"http","port":80,"targetPort":"web","nodePort":30080},
                     {"name":"dns","port":53,"protocol":"UDP"},{"name":"s","port":53,"protocol":"SCTP"}],
            "externalIPs":["203.0.113.9"],"loadBalancerSourceRanges":[" 192.0.2.7/24 "],
            "sessionAffinity":"ClientIP","internalTrafficPolicy":"Local","externalTrafficPolicy":"Local",
            "healthCheckNodePort":31000,"publishNotReadyAddresses":true},
            "status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.1"},{"ip":"198.51.100.2","ipMode":"Proxy"},
            {"ip":"2001:db8::2","ipMode":"VIP"},{"hostname":"x"}]}}"#,
        );
        assert_eq!(problems, []);
        let info = info.expect("ours");
        assert_eq!((&*info.name, info.ports.len(), info.affinity), ("shop/web", 3, 10_800));
        assert_eq!((info.ports[0].node_port, info.ports[1].protocol), (30080, Protocol::Udp));
        let text = |list: &[IpAddr]| list.iter().map(IpAddr::to_string).collect::<Vec<_>>();
        assert_eq!(text(&info.cluster_ips), ["10.96.0.5", "fd00:96::5"]);
        assert_eq!(text(&info.load_balancers), ["198.51.100.1", "2001:db8::2"]);
        assert_eq!(info.sources[0].to_string(), "192.0.2.0/24");
        assert!(info.internal_local && info.external_local && info.publish_not_ready);
        assert_eq!(info.health_check, 31000);
    }

    #[test]
    fn what_is_not_ours_is_left_alone_without_a_word() {
        for spec in [
            r#""spec":{"clusterIP":"None","ports":[{"port":80}]}"#,
            r#""spec":{"clusterIPs":["None"]}"#,
            r#""spec":{"type":"ExternalName","externalName":"example.com"}"#,
        ] {
            assert_eq!(parse(spec), (None, Vec::new()), "{spec}");
        }
        for label in [PROXY_NAME, HEADLESS] {
            let text = format!(
                r#"{{"metadata":{{"name":"a","labels":{{"{label}":""}}}},"spec":{{"clusterIP":"10.96.0.1"}}}}"#
            );
            assert_eq!(service(&serde_json::from_str(&text).expect("JSON")), (None, Vec::new()));
        }
    }

    #[test]
    fn a_bad_value_costs_itself() {
        let base = r#""clusterIP":"10.96.0.5","#;
        for (spec, field) in [
            (r#""ports":[{"port":0},{"name":"a","port":1}]"#, "spec.ports[0]"),
            (r#""ports":[{"port":70000},{"name":"a","port":1}]"#, "spec.ports[0]"),
            (r#""ports":[{"name":"a","port":1},{"name":"b","port":1}]"#, "spec.ports[1]"),
            (r#""ports":[{"name":"a","port":1},{"name":"a","port":2}]"#, "spec.ports[1]"),
            (r#""ports":[{"name":"a","port":1},{"name":"b","port":2,"protocol":"ICMP"}]"#, "spec.ports[1]"),
            (r#""ports":[{"name":"\u001b","port":1},{"name":"a","port":1}]"#, "spec.ports[0]"),
            (r#""ports":[{"name":"a","port":1,"nodePort":-1}]"#, "spec.ports[0].nodePort"),
            (r#""ports":[{"name":"a","port":1}],"externalIPs":["x"]"#, "spec.externalIPs[0]"),
            (r#""ports":[{"name":"a","port":1}],"sessionAffinity":"Cookie""#, "spec.sessionAffinity"),
            (r#""ports":[{"name":"a","port":1}],"internalTrafficPolicy":"x""#, "spec.internalTrafficPolicy"),
        ] {
            let (info, problems) = parse(&format!("\"spec\":{{{base}{spec}}}"));
            assert_eq!(info.expect(spec).ports.len(), 1, "{spec}");
            assert_eq!(problems.iter().map(|p| p.field.as_str()).collect::<Vec<_>>(), [field], "{spec}");
            assert_eq!(problems[0].subject, "Service/shop/web");
        }
        let (info, problems) = parse(r#""spec":{"clusterIP":"10.96.0.300"}"#);
        assert_eq!((info, problems.len()), (None, 1));
        let (info, _) = parse(&format!("\"spec\":{{{base}\"loadBalancerSourceRanges\":[\"all\"]}}"));
        assert!(!info.expect("ours").sources.is_empty(), "a range that cannot be read lets nobody in");
    }

    #[test]
    fn affinity_is_bounded() {
        for (given, expected) in
            [("1", 1), ("86400", 86_400), ("86401", 10_800), ("0", 10_800), ("-5", 10_800)]
        {
            let spec = format!(
                r#""spec":{{"clusterIP":"10.96.0.5","sessionAffinity":"ClientIP",
                "sessionAffinityConfig":{{"clientIP":{{"timeoutSeconds":{given}}}}}}}"#
            );
            assert_eq!(parse(&spec).0.expect("ours").affinity, expected, "{given}");
        }
    }

    #[test]
    fn an_enormous_service_is_trimmed() {
        let ports: Vec<String> = (1..400).map(|n| format!(r#"{{"name":"p{n}","port":{n}}}"#)).collect();
        let wrong: Vec<String> = (0..400).map(|n| format!("\"x{n}\"")).collect();
        let (info, problems) = parse(&format!(
            r#""spec":{{"clusterIP":"10.96.0.5","ports":[{}],"externalIPs":[{}]}}"#,
            ports.join(","),
            wrong.join(",")
        ));
        assert_eq!(info.expect("ours").ports.len(), MAX_PORTS);
        assert_eq!(problems.len(), MAX_PROBLEMS + 1);
    }
}
