//! An EndpointSlice object to a typed, bounded, compact value.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::{self, EndpointHints};

use super::service::{Problems, is_foreign, is_port_name, number, protocol};
use crate::snapshot::service::Protocol;
use crate::state::problem::{Problem, ProblemKind, quote};
use crate::state::source::manifest::is_dns_name;

/// Most endpoints of one slice, as the API has it.
pub const MAX_ENDPOINTS: usize = 1_000;
/// Most ports of one slice: as many as a Service may have.
const MAX_PORTS: usize = super::service::MAX_PORTS;
/// Most hints of one kind of one endpoint, as the API has it.
const MAX_HINTS: usize = 8;

/// The label that names a slice's Service.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Where an endpoint is meant to be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// In these zones.
    pub zones: Box<[Arc<str>]>,
    /// On these nodes.
    pub nodes: Box<[Arc<str>]>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// Whether it takes new connections.
    pub ready: bool,
    /// Whether it would, were it not going away.
    pub serving: bool,
    /// Whether it is going away.
    pub terminating: bool,
    /// The node it is on.
    pub node: Option<Arc<str>>,
    /// Where it is meant to be used.
    pub hints: Option<Arc<Hints>>,
}

/// A port that all endpoints of a slice have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the Service's port.
    pub name: Box<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The endpoints' port.
    pub port: u16,
}

/// A slice of a Service that may be ours. Two equal ones say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceInfo {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// `namespace/name` of the Service.
    pub service: Arc<str>,
    /// Whether its addresses are IPv4.
    pub ipv4: bool,
    /// The ports.
    pub ports: Box<[SlicePort]>,
    /// The endpoints.
    pub endpoints: Box<[SliceEndpoint]>,
}

/// Names that many objects share, kept once.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    names: HashSet<Arc<str>>,
    /// When there are as many, those that nobody uses go.
    sweep: usize,
}

impl Names {
    pub(super) fn share(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return Arc::clone(known);
        }
        if self.names.len() >= self.sweep {
            self.names.retain(|name| Arc::strong_count(name) > 1);
            self.sweep = (2 * self.names.len()).max(1024);
        }
        let name: Arc<str> = name.into();
        self.names.insert(Arc::clone(&name));
        name
    }
}

/// A slice, or `None` if it is of no use here (host names, no Service's, another proxy's), and what is wrong
/// with it.
pub(super) fn slice(object: &v1::EndpointSlice, names: &mut Names) -> (Option<SliceInfo>, Vec<Problem>) {
    let metadata = &object.metadata;
    let namespace = metadata.namespace.as_deref().filter(|text| !text.is_empty()).unwrap_or("default");
    let name = metadata.name.as_deref().unwrap_or_default();
    let mut problems = Problems::of("EndpointSlice", namespace, name);
    if !is_dns_name(namespace) || !is_dns_name(name) {
        problems.add(ProblemKind::Object, "metadata.name", "is not a valid name");
        return (None, problems.list);
    }
    let owner = metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
    let Some(owner) = owner.filter(|owner| !owner.is_empty() && !is_foreign(metadata.labels.as_ref())) else {
        return (None, Vec::new());
    };
    if !is_dns_name(owner) {
        problems.value("metadata.labels", format!("{SERVICE_NAME} {} is no Service's name", quote(owner)));
        return (None, problems.list);
    }
    let ipv4 = match object.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        "FQDN" => return (None, Vec::new()),
        other => {
            problems.value("addressType", format!("{} is not known", quote(other)));
            return (None, problems.list);
        }
    };
    let info = SliceInfo {
        name: format!("{namespace}/{name}").into(),
        service: names.share(&format!("{namespace}/{owner}")),
        ipv4,
        ports: ports(object, &mut problems),
        endpoints: endpoints(object, ipv4, names, &mut problems),
    };
    (Some(info), problems.list)
}

fn ports(object: &v1::EndpointSlice, problems: &mut Problems) -> Box<[SlicePort]> {
    let mut found: Vec<SlicePort> = Vec::new();
    for (index, port) in object.ports.iter().flatten().enumerate() {
        let field = format!("ports[{index}]");
        if found.len() >= MAX_PORTS {
            problems.value(&field, format_args!("more than {MAX_PORTS} ports"));
            break;
        }
        // No number means every port, which no Service can use.
        if port.port.is_none() {
            continue;
        }
        let name = port.name.as_deref().unwrap_or_default();
        if !is_port_name(name) {
            problems.value(&field, format_args!("{} is no port's name", quote(name)));
            continue;
        }
        let Some(protocol) = protocol(&field, port.protocol.as_deref(), problems) else { continue };
        let Some(port) = number(&field, port.port, problems) else { continue };
        found.push(SlicePort { name: name.into(), protocol, port });
    }
    found.into()
}

fn endpoints(
    object: &v1::EndpointSlice,
    ipv4: bool,
    names: &mut Names,
    problems: &mut Problems,
) -> Box<[SliceEndpoint]> {
    let given = object.endpoints.as_deref().unwrap_or_default();
    let mut found: Vec<SliceEndpoint> = Vec::with_capacity(given.len().min(MAX_ENDPOINTS));
    for (index, endpoint) in given.iter().enumerate() {
        let field = || format!("endpoints[{index}]");
        if found.len() >= MAX_ENDPOINTS {
            problems.value(&field(), format_args!("more than {MAX_ENDPOINTS} endpoints in one slice"));
            break;
        }
        // Only the first address counts (API: Endpoint.addresses).
        let Some(text) = endpoint.addresses.first() else {
            problems.value(&field(), "has no address");
            continue;
        };
        let address = match text.parse::<IpAddr>() {
            Ok(address) if address.is_ipv4() == ipv4 => address,
            Ok(address) => {
                problems.value(&field(), format_args!("{address} is not of the slice's family"));
                continue;
            }
            Err(_) => {
                problems.value(&field(), format_args!("{} is not an address", quote(text)));
                continue;
            }
        };
        if let Some(reason) = super::no_ones(address) {
            problems.value(&field(), format_args!("{address} {reason}"));
            continue;
        }
        let conditions = endpoint.conditions.as_ref();
        let hints = endpoint.hints.as_ref().and_then(|given| {
            // All endpoints of a zone have the same.
            let hints = hints(given, names)?;
            let before = found.iter().rev().take(8).filter_map(|before| before.hints.as_ref());
            Some(
                before
                    .into_iter()
                    .find(|before| ***before == hints)
                    .cloned()
                    .unwrap_or_else(|| Arc::new(hints)),
            )
        });
        found.push(SliceEndpoint {
            address,
            // What is not said is as kube-proxy reads it.
            ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
            serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
            terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
            node: endpoint
                .node_name
                .as_deref()
                .filter(|name| is_dns_name(name))
                .map(|name| names.share(name)),
            hints,
        });
    }
    found.into()
}

fn hints(given: &EndpointHints, names: &mut Names) -> Option<Hints> {
    let mut shared = |name: &String| (name.len() <= 253).then(|| names.share(name));
    let zones =
        given.for_zones.iter().flatten().take(MAX_HINTS).filter_map(|zone| shared(&zone.name)).collect();
    let nodes =
        given.for_nodes.iter().flatten().take(MAX_HINTS).filter_map(|node| shared(&node.name)).collect();
    let hints = Hints { zones, nodes };
    (hints != Hints::default()).then_some(hints)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(labels: &str, rest: &str) -> (Option<SliceInfo>, Vec<Problem>) {
        let text =
            format!(r#"{{"metadata":{{"name":"web-x","namespace":"shop","labels":{{{labels}}}}},{rest}}}"#);
        slice(&serde_json::from_str(&text).expect("JSON"), &mut Names::default())
    }

    const OURS: &str = r#""kubernetes.io/service-name":"web""#;

    #[test]
    fn a_slice_is_read_with_the_defaults_of_the_proxy() {
        let (info, problems) = parse(
            OURS,
            r#""addressType":"IPv4","ports":[{"name":"http","port":8080},{"name":"any"}],"endpoints":[
            {"addresses":["10.244.1.5","10.244.1.6"]},
            {"addresses":["10.244.2.5"],"nodeName":"b","conditions":{"ready":false,"terminating":true},
             "hints":{"forZones":[{"name":"z1"}],"forNodes":[{"name":"b"}]}},
            {"addresses":["10.244.2.6"],"nodeName":"b","conditions":{"ready":false,"serving":false},
             "hints":{"forZones":[{"name":"z1"}],"forNodes":[{"name":"b"}]}}]"#,
        );
        assert_eq!(problems, []);
        let info = info.expect("ours");
        assert_eq!((&*info.name, &*info.service, info.ports.len()), ("shop/web-x", "shop/web", 1));
        let states: Vec<_> = info.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
        assert_eq!(states, [(true, true, false), (false, true, true), (false, false, false)]);
        let hints: Vec<_> = info.endpoints.iter().map(|e| e.hints.as_ref()).collect();
        assert!(hints[0].is_none() && Arc::ptr_eq(hints[1].expect("hints"), hints[2].expect("hints")));
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let rest = r#""addressType":"IPv4""#;
        assert_eq!(parse("", rest), (None, Vec::new()));
        let headless = format!(r#"{OURS},"service.kubernetes.io/headless":"""#);
        assert_eq!(parse(&headless, rest), (None, Vec::new()));
        assert_eq!(parse(OURS, r#""addressType":"FQDN""#), (None, Vec::new()));
        assert_eq!(parse(OURS, r#""addressType":"IPX""#).1.len(), 1);
        assert_eq!(parse(r#""kubernetes.io/service-name":"../x""#, rest).1.len(), 1);
    }

    #[test]
    fn a_bad_endpoint_costs_itself() {
        for bad in [
            "127.0.0.1",
            "0.0.0.0",
            "169.254.1.1",
            "224.0.0.1",
            "255.255.255.255",
            "fd00::1",
            "x",
            "",
            "169.254.87.87",
        ] {
            let rest = format!(
                r#""addressType":"IPv4","endpoints":[{{"addresses":["{bad}"]}},{{"addresses":["10.244.1.5"]}}]"#
            );
            let (info, problems) = parse(OURS, &rest);
            assert_eq!((info.expect("ours").endpoints.len(), problems.len()), (1, 1), "{bad}");
            assert_eq!(problems[0].field, "endpoints[0]");
        }
        for bad in
            ["::1", "::", "fe80::1", "ff02::1", "10.0.0.1", "::ffff:10.0.0.1", "fd57:4152:5245:4e00::1"]
        {
            let rest = format!(r#""addressType":"IPv6","endpoints":[{{"addresses":["{bad}"]}}]"#);
            let (info, problems) = parse(OURS, &rest);
            assert_eq!((info.expect("ours").endpoints.len(), problems.len()), (0, 1), "{bad}");
        }
        let many: Vec<String> =
            (0..1_200).map(|n| format!(r#"{{"addresses":["10.0.{}.{}"]}}"#, n / 250, n % 250)).collect();
        let rest = format!(r#""addressType":"IPv4","endpoints":[{}]"#, many.join(","));
        let (info, problems) = parse(OURS, &rest);
        assert_eq!((info.expect("ours").endpoints.len(), problems.len()), (MAX_ENDPOINTS, 1));
    }

    #[test]
    fn names_that_nobody_uses_go() {
        let mut names = Names::default();
        let kept = names.share("kept");
        for number in 0..10_000 {
            names.share(&number.to_string());
        }
        assert!(names.names.len() < 2_000 && Arc::ptr_eq(&kept, &names.share("kept")));
    }
}
