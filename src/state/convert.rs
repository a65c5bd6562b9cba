//! Kubernetes objects to typed, bounded values. Hostile input ends here.
//!
//! Pod ranges come from `spec.podCIDRs` and node addresses from `status.addresses`, never from
//! annotations: a node cannot attract pods by announcing them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{
    DaemonEndpoint, Node, NodeAddress, NodeDaemonEndpoints, NodeSpec, NodeStatus, Taint,
};
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;

use super::annotations::{self, Announcement, is_reachable, special};
use super::problem::{Problem, ProblemKind, quote};

/// Most pod ranges of one node. Kubernetes allows one a family; a peer written by hand may have more.
pub const MAX_RANGES: usize = 16;
/// Most addresses of one node.
pub const MAX_ADDRESSES: usize = 32;
/// Widest pod range of one node: a million IPv4 addresses.
const WIDEST_POD_RANGE: (u8, u8) = (12, 48);
/// Widest range of a whole cluster's pods or Services.
const WIDEST_CLUSTER_RANGE: (u8, u8) = (8, 8);

/// The label of a Node that names its zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// The cluster autoscaler's taint; kube-proxy and the cloud providers look for it too.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// A Node, checked. Two equal ones say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Name.
    pub name: String,
    /// UID; empty in a folder.
    pub uid: String,
    /// When it was made; `None` in a folder.
    pub created: Option<Timestamp>,
    /// `spec.podCIDRs`.
    pub pod_ranges: Vec<IpNet>,
    /// `InternalIP`s, then `ExternalIP`s, of `status.addresses`.
    pub addresses: Vec<IpAddr>,
    /// Its zone, by its label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// Where its kubelet listens: `status.daemonEndpoints.kubeletEndpoint.Port`.
    pub kubelet_port: Option<u16>,
    /// Whether it is about to go: it is being deleted, or the cluster autoscaler has chosen it.
    pub leaving: bool,
    /// What it announces.
    pub announcement: Announcement,
}

impl NodeInfo {
    /// The Node object that says just this: what a checkpoint holds.
    pub fn to_node(&self) -> Node {
        let address =
            |address: &IpAddr| NodeAddress { address: address.to_string(), type_: "InternalIP".to_owned() };
        Node {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                uid: Some(self.uid.clone()).filter(|uid| !uid.is_empty()),
                creation_timestamp: self.created.map(Time),
                annotations: Some(annotations::render(&self.announcement)),
                labels: self.zone.clone().map(|zone| BTreeMap::from([(ZONE.to_owned(), zone)])),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec {
                pod_cidrs: Some(self.pod_ranges.iter().map(IpNet::to_string).collect()),
                taints: self.leaving.then(|| vec![taint()]),
                ..NodeSpec::default()
            }),
            status: Some(NodeStatus {
                addresses: Some(self.addresses.iter().map(address).collect()),
                daemon_endpoints: self.kubelet_port.map(|port| NodeDaemonEndpoints {
                    kubelet_endpoint: Some(DaemonEndpoint { port: port.into() }),
                }),
                ..NodeStatus::default()
            }),
        }
    }
}

/// Whether the autoscaler is about to take the machine away.
fn is_chosen(object: &Node) -> bool {
    let taints = object.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    taints.iter().any(|taint| taint.key == TO_BE_DELETED)
}

fn taint() -> Taint {
    Taint { key: TO_BE_DELETED.to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() }
}

/// A Node, and what is wrong with it.
pub fn node(object: &Node) -> (NodeInfo, Vec<Problem>) {
    let metadata = &object.metadata;
    let mut info = NodeInfo {
        name: metadata.name.clone().unwrap_or_default(),
        uid: metadata.uid.clone().unwrap_or_default(),
        created: metadata.creation_timestamp.as_ref().map(|time| time.0),
        pod_ranges: Vec::new(),
        addresses: Vec::new(),
        zone: None,
        kubelet_port: None,
        leaving: metadata.deletion_timestamp.is_some() || is_chosen(object),
        announcement: Announcement::default(),
    };
    let name = info.name.clone();
    let mut problems = Vec::new();
    let value = |field: &str, reason: String| Problem::node(ProblemKind::Value, &name, field, reason);

    for (field, text) in pod_cidrs(object) {
        match range(&text, WIDEST_POD_RANGE) {
            Ok(range) if info.pod_ranges.contains(&range) => {}
            Ok(_) if info.pod_ranges.len() >= MAX_RANGES => {
                problems.push(value(&field, format!("more than {MAX_RANGES} ranges")));
                break;
            }
            Ok(range) => info.pod_ranges.push(range),
            Err(reason) => problems.push(value(&field, reason)),
        }
    }
    let addresses = object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    for wanted in ["InternalIP", "ExternalIP"] {
        for (index, address) in addresses.iter().enumerate().filter(|(_, address)| address.type_ == wanted) {
            let field = format!("status.addresses[{index}]");
            match address.address.parse::<IpAddr>() {
                Ok(ip) if !is_reachable(ip) => {
                    problems.push(value(&field, format!("{ip} can be no node's address")))
                }
                Ok(ip) if info.addresses.contains(&ip) => {}
                Ok(_) if info.addresses.len() >= MAX_ADDRESSES => {
                    problems.push(value(&field, format!("more than {MAX_ADDRESSES} addresses")));
                    break;
                }
                Ok(ip) => info.addresses.push(ip),
                Err(_) => {
                    problems.push(value(&field, format!("{} is not an address", quote(&address.address))))
                }
            }
        }
    }
    let daemons = object.status.as_ref().and_then(|status| status.daemon_endpoints.as_ref());
    let kubelet = daemons.and_then(|daemons| daemons.kubelet_endpoint.as_ref()).map(|kubelet| kubelet.port);
    match kubelet.map(u16::try_from) {
        None | Some(Ok(0)) => {}
        Some(Ok(port)) => info.kubelet_port = Some(port),
        Some(Err(_)) => problems.push(value(
            "status.daemonEndpoints.kubeletEndpoint.Port",
            format!("{} is no port", kubelet.unwrap_or_default()),
        )),
    }
    match metadata.labels.as_ref().and_then(|labels| labels.get(ZONE)) {
        Some(zone) if is_label_value(zone) => info.zone = Some(zone.clone()),
        Some(zone) if !zone.is_empty() => {
            let field = format!("metadata.labels, {ZONE}");
            problems.push(value(&field, format!("{} is no zone's name", quote(zone))));
        }
        Some(_) | None => {}
    }
    let none = BTreeMap::new();
    let (announcement, wrong) = annotations::parse(metadata.annotations.as_ref().unwrap_or(&none));
    info.announcement = announcement;
    problems.extend(
        wrong.into_iter().map(|p| Problem::node(ProblemKind::Annotation, &name, &p.annotation, p.reason)),
    );
    (info, problems)
}

/// The ranges of a ServiceCIDR, and what is wrong with them.
pub fn service_cidr(object: &ServiceCIDR) -> (Vec<IpNet>, Vec<Problem>) {
    let (mut ranges, mut problems) = (Vec::new(), Vec::new());
    let given = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    // The API allows one a family.
    for (index, text) in given.iter().enumerate().take(MAX_RANGES) {
        match range(text, WIDEST_CLUSTER_RANGE) {
            Ok(range) => ranges.push(range),
            Err(reason) => problems.push(Problem {
                kind: ProblemKind::Value,
                subject: format!("ServiceCIDR/{}", object.metadata.name.as_deref().unwrap_or_default()),
                field: format!("spec.cidrs[{index}]"),
                reason,
            }),
        }
    }
    (ranges, problems)
}

/// A range that a person configured for the whole cluster (`--cluster-cidr`, `--service-cidr`).
pub fn cluster_range(text: &str) -> Result<IpNet, String> {
    range(text, WIDEST_CLUSTER_RANGE)
}

/// A label's value as the API has it, and not empty.
fn is_label_value(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let end = |c: char| c.is_ascii_alphanumeric();
    text.len() <= 63 && text.starts_with(end) && text.ends_with(end) && text.chars().all(inner)
}

/// `podCIDRs`, or the older `podCIDR` where that is all there is.
fn pod_cidrs(object: &Node) -> Vec<(String, String)> {
    let Some(spec) = &object.spec else { return Vec::new() };
    let plural = spec.pod_cidrs.as_deref().unwrap_or_default();
    if plural.is_empty() {
        return spec.pod_cidr.iter().map(|text| ("spec.podCIDR".to_owned(), text.clone())).collect();
    }
    let field = |index| format!("spec.podCIDRs[{index}]");
    plural.iter().enumerate().take(4 * MAX_RANGES).map(|(index, text)| (field(index), text.clone())).collect()
}

fn range(text: &str, widest: (u8, u8)) -> Result<IpNet, String> {
    let range: IpNet =
        text.parse().map_err(|_| format!("{} is not a range like 10.244.1.0/24", quote(text)))?;
    if range != range.trunc() {
        return Err(format!("{range} has bits set behind its prefix; write {}", range.trunc()));
    }
    let widest = match range {
        IpNet::V4(_) => widest.0,
        IpNet::V6(_) => widest.1,
    };
    if range.prefix_len() < widest {
        return Err(format!("{range} is too wide; /{widest} is the widest that is accepted"));
    }
    if let Some(special) = special(range) {
        return Err(format!("{range} overlaps {special}, which no pod or Service may have"));
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (NodeInfo, Vec<Problem>) {
        node(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn reads_ranges_addresses_and_identity() {
        let (info, problems) = parse(
            r#"{"metadata":{"name":"a","uid":"u-1","creationTimestamp":"2026-01-02T03:04:05Z",
                "labels":{"topology.kubernetes.io/zone":"eu-1a"},
                "annotations":{"warren.dev/location":"x","kubernetes.io/other":"y"}},
              "spec":{"podCIDR":"10.244.1.0/24","podCIDRs":["10.244.1.0/24","fd00:1::/64"]},
              "status":{"addresses":[{"type":"ExternalIP","address":"203.0.113.1"},
                {"type":"InternalIP","address":"10.0.0.1"},{"type":"Hostname","address":"a"},
                {"type":"InternalIP","address":"fd00::1"}],
                "daemonEndpoints":{"kubeletEndpoint":{"Port":10350}}}}"#,
        );
        assert_eq!(problems, []);
        assert_eq!(info.kubelet_port, Some(10_350));
        assert_eq!(info.pod_ranges, ["10.244.1.0/24", "fd00:1::/64"].map(|r| r.parse().unwrap()));
        assert_eq!(
            info.addresses,
            ["10.0.0.1", "fd00::1", "203.0.113.1"].map(|r| r.parse::<IpAddr>().unwrap())
        );
        assert_eq!((info.uid.as_str(), info.created.is_some()), ("u-1", true));
        assert_eq!(info.announcement.location.as_deref(), Some("x"));
        assert_eq!(info.zone.as_deref(), Some("eu-1a"));
        let (again, problems) = node(&info.to_node());
        assert_eq!((again, problems), (info, Vec::new()));
    }

    #[test]
    fn a_node_that_is_about_to_go_is_known() {
        for (text, leaving) in [
            (r#"{"metadata":{"name":"a"}}"#, false),
            (r#"{"metadata":{"name":"a"},"spec":{"taints":[{"key":"other","effect":"NoSchedule"}]}}"#, false),
            (r#"{"metadata":{"name":"a","deletionTimestamp":"2026-01-02T03:04:05Z"}}"#, true),
            (
                r#"{"metadata":{"name":"a"},
                    "spec":{"taints":[{"key":"ToBeDeletedByClusterAutoscaler","effect":"NoSchedule"}]}}"#,
                true,
            ),
        ] {
            let (info, _) = parse(text);
            assert_eq!(info.leaving, leaving, "{text}");
            assert_eq!(node(&info.to_node()).0.leaving, leaving);
        }
    }

    #[test]
    fn falls_back_to_the_older_field() {
        let (info, _) = parse(r#"{"metadata":{"name":"a"},"spec":{"podCIDR":"10.244.1.0/24"}}"#);
        assert_eq!(info.pod_ranges.len(), 1);
    }

    #[test]
    fn refuses_ranges_that_would_take_what_is_not_theirs() {
        for bad in [
            "0.0.0.0/0",
            "10.0.0.0/8",
            "127.0.0.0/24",
            "169.254.0.0/16",
            "224.0.0.0/12",
            "255.255.255.255/32",
            "10.244.1.7/24",
            "::/0",
            "fe80::/64",
            "ff00::/64",
            "::1/128",
            "::ffff:10.0.0.0/120",
            "10.244.1.0",
            "x",
            "",
        ] {
            let text =
                format!(r#"{{"metadata":{{"name":"a"}},"spec":{{"podCIDRs":["{bad}","10.9.0.0/24"]}}}}"#);
            let (info, problems) = parse(&text);
            assert_eq!((info.pod_ranges.len(), problems.len()), (1, 1), "{bad}");
            assert_eq!(problems[0].field, "spec.podCIDRs[0]");
        }
        for bad in ["127.0.0.1", "::1", "169.254.169.254", "0.0.0.0", "255.255.255.255", "fe80::1", "a"] {
            let text = format!(
                r#"{{"metadata":{{"name":"a"}},"status":{{"addresses":[{{"type":"InternalIP","address":"{bad}"}}]}}}}"#
            );
            let (info, problems) = parse(&text);
            assert_eq!((info.addresses.len(), problems.len()), (0, 1), "{bad}");
        }
    }

    #[test]
    fn lists_are_bounded() {
        let ranges: Vec<String> = (0..100).map(|i| format!("\"10.9.{i}.0/24\"")).collect();
        let (info, problems) =
            parse(&format!(r#"{{"metadata":{{"name":"a"}},"spec":{{"podCIDRs":[{}]}}}}"#, ranges.join(",")));
        assert_eq!((info.pod_ranges.len(), problems.len()), (MAX_RANGES, 1));
    }

    #[test]
    fn service_ranges() {
        let object: ServiceCIDR = serde_json::from_str(
            r#"{"metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/16","fd00:2::/108","0.0.0.0/0"]}}"#,
        )
        .unwrap();
        let (ranges, problems) = service_cidr(&object);
        assert_eq!((ranges.len(), problems.len()), (2, 1));
        assert_eq!(problems[0].subject, "ServiceCIDR/kubernetes");
    }
}
