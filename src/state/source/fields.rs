//! Fields that no object of its kind has. The typed parse passes over them, so a typing mistake
//! (`podCidrs`) would otherwise mean the same as nothing.
//!
//! Only the parts that Warren uses are looked at. The lists are the whole of Kubernetes 1.36 there; a field
//! of a later version shows as unknown, which it is, except in `status`, which programs write: there only
//! what looks like a typing mistake is said.

use serde_json::Value;

use super::Kind;
use crate::state::problem::{nearest, quote};

/// Most unknown fields that are named of one object.
const MOST: usize = 8;

/// A part of an object: where it is (`[]`: in each item of a list), and the fields that it may have.
type Part = (&'static [&'static str], &'static [&'static str]);

const METADATA: &[&str] = &[
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

const USUAL: &[&str] = &["apiVersion", "kind", "metadata", "spec", "status"];

const NODE: &[Part] = &[
    (&[], USUAL),
    (&["metadata"], METADATA),
    (
        &["spec"],
        &["configSource", "externalID", "podCIDR", "podCIDRs", "providerID", "taints", "unschedulable"],
    ),
    (
        &["status"],
        &[
            "addresses",
            "allocatable",
            "capacity",
            "conditions",
            "config",
            "daemonEndpoints",
            "declaredFeatures",
            "features",
            "images",
            "nodeInfo",
            "phase",
            "runtimeHandlers",
            "volumesAttached",
            "volumesInUse",
        ],
    ),
    (&["status", "addresses", "[]"], &["address", "type"]),
];

const SERVICE: &[Part] = &[
    (&[], USUAL),
    (&["metadata"], METADATA),
    (
        &["spec"],
        &[
            "allocateLoadBalancerNodePorts",
            "clusterIP",
            "clusterIPs",
            "externalIPs",
            "externalName",
            "externalTrafficPolicy",
            "healthCheckNodePort",
            "internalTrafficPolicy",
            "ipFamilies",
            "ipFamilyPolicy",
            "loadBalancerClass",
            "loadBalancerIP",
            "loadBalancerSourceRanges",
            "ports",
            "publishNotReadyAddresses",
            "selector",
            "sessionAffinity",
            "sessionAffinityConfig",
            "trafficDistribution",
            "type",
        ],
    ),
    (&["spec", "ports", "[]"], &["appProtocol", "name", "nodePort", "port", "protocol", "targetPort"]),
];

const ENDPOINT_SLICE: &[Part] = &[
    (&[], &["addressType", "apiVersion", "endpoints", "kind", "metadata", "ports"]),
    (&["metadata"], METADATA),
    (
        &["endpoints", "[]"],
        &[
            "addresses",
            "conditions",
            "deprecatedTopology",
            "hints",
            "hostname",
            "nodeName",
            "targetRef",
            "zone",
        ],
    ),
    (&["endpoints", "[]", "conditions"], &["ready", "serving", "terminating"]),
    (&["endpoints", "[]", "hints"], &["forNodes", "forZones"]),
    (&["ports", "[]"], &["appProtocol", "name", "port", "protocol"]),
];

const POD: &[Part] = &[(&[], USUAL), (&["metadata"], METADATA)];

const SERVICE_CIDR: &[Part] = &[(&[], USUAL), (&["metadata"], METADATA), (&["spec"], &["cidrs"])];

fn parts(kind: Kind) -> &'static [Part] {
    match kind {
        Kind::Node => NODE,
        Kind::Service => SERVICE,
        Kind::EndpointSlice => ENDPOINT_SLICE,
        Kind::Pod => POD,
        Kind::ServiceCidr => SERVICE_CIDR,
    }
}

/// A field that is not one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unknown {
    /// Where: `spec.podCidrs`.
    pub(super) field: String,
    /// What was probably meant.
    pub(super) reason: String,
}

/// The unknown fields of an object, the first few of them.
pub(super) fn unknown(kind: Kind, object: &Value) -> Vec<Unknown> {
    let mut found = Vec::new();
    for (path, known) in parts(kind) {
        look(object, path, String::new(), &mut |at, part| {
            let Value::Object(fields) = part else { return };
            for name in fields.keys().filter(|name| !known.contains(&name.as_str())) {
                let meant = nearest(name, known.iter().copied());
                if found.len() < MOST && (meant.is_some() || path.first() != Some(&"status")) {
                    let hint = meant.map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
                    let field = join(at, quote(name).trim_matches('"'));
                    let reason =
                        format!("Warren knows no such field of a {} and passes over it{hint}", kind.name());
                    found.push(Unknown { field, reason });
                }
            }
        });
    }
    found
}

/// Why an object has not even the shape of its kind, where that can be said better than by the typed parse,
/// which knows no names.
pub(super) fn misshapen(kind: Kind, object: &Value) -> Option<String> {
    let mut wrong = None;
    for (path, known) in parts(kind) {
        let example = match *path {
            ["spec"] if kind == Kind::Node => "podCIDRs: [10.244.1.0/24]",
            _ => known.first().map_or("name: value", |name| name),
        };
        look(object, path, String::new(), &mut |at, part| match part {
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                wrong.get_or_insert_with(|| {
                    format!("{at} must hold fields (like `{example}`), each with a colon after its name")
                });
            }
            Value::Null | Value::Object(_) => {}
        });
    }
    let spec = object.get("spec").filter(|_| kind == Kind::Node);
    let field = |name: &str| spec.and_then(|spec| spec.get(name));
    if field("podCIDR").is_some_and(Value::is_array) {
        wrong = Some("spec.podCIDR is one range; a list of them is spec.podCIDRs".to_owned());
    } else if field("podCIDRs").is_some_and(|ranges| !ranges.is_array() && !ranges.is_null()) {
        wrong = Some("spec.podCIDRs is a list, like [10.244.1.0/24]".to_owned());
    }
    wrong
}

/// Shows every part of the object that is at that place.
fn look<'a>(value: &'a Value, path: &[&str], at: String, seen: &mut impl FnMut(&str, &'a Value)) {
    match path {
        [] => seen(&at, value),
        ["[]", rest @ ..] => {
            for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                look(item, rest, format!("{at}[{index}]"), seen);
            }
        }
        [name, rest @ ..] => {
            if let Some(part) = value.get(name) {
                look(part, rest, join(&at, name), seen);
            }
        }
    }
}

fn join(at: &str, name: &str) -> String {
    if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(kind: Kind, object: &Value) -> Vec<(String, String)> {
        unknown(kind, object)
            .into_iter()
            .map(|unknown| {
                let (_, meant) = unknown.reason.split_once("did you mean ").unwrap_or_default();
                (unknown.field, meant.trim_end_matches('?').to_owned())
            })
            .collect()
    }

    #[test]
    fn typing_mistakes_are_found_where_they_are() {
        let cases = [
            (Kind::Node, json!({"spec": {"podCidrs": []}}), "spec.podCidrs", "podCIDRs"),
            (Kind::Node, json!({"spec": {"podcidrs": []}}), "spec.podcidrs", "podCIDRs"),
            (Kind::Node, json!({"spec": {"podRanges": []}}), "spec.podRanges", ""),
            (Kind::Node, json!({"specs": {}}), "specs", "spec"),
            (Kind::Node, json!({"podCIDRs": []}), "podCIDRs", ""),
            (Kind::Node, json!({"metadata": {"anotations": {}}}), "metadata.anotations", "annotations"),
            (Kind::Node, json!({"status": {"adresses": []}}), "status.adresses", "addresses"),
            (
                Kind::Node,
                json!({"status": {"addresses": [{"type": "InternalIP"}, {"adress": "10.0.0.1"}]}}),
                "status.addresses[1].adress",
                "address",
            ),
            (Kind::Service, json!({"spec": {"clusterIp": ""}}), "spec.clusterIp", "clusterIP"),
            (
                Kind::Service,
                json!({"spec": {"ports": [{"nodeport": 1}]}}),
                "spec.ports[0].nodeport",
                "nodePort",
            ),
            (
                Kind::EndpointSlice,
                json!({"endpoints": [{"conditions": {"raedy": true}}]}),
                "endpoints[0].conditions.raedy",
                "ready",
            ),
            (Kind::ServiceCidr, json!({"spec": {"cidr": "10.96.0.0/16"}}), "spec.cidr", "cidrs"),
            (Kind::Pod, json!({"metdata": {}}), "metdata", "metadata"),
            (Kind::Node, json!({"spec": {"\u{1b}[2J": 1}}), "spec.\\u{1b}[2J", ""),
        ];
        for (kind, object, field, meant) in cases {
            assert_eq!(fields(kind, &object), [(field.to_owned(), meant.to_owned())], "{object}");
        }
    }

    #[test]
    fn what_is_right_or_a_newer_status_is_left_alone_and_the_answer_is_bounded() {
        let newer = json!({"status": {"somethingOfNextYear": {}}, "metadata": {"labels": {"podCidrs": "x"}}});
        assert_eq!(unknown(Kind::Node, &newer), []);
        let many: serde_json::Map<_, _> = (0..100).map(|i| (format!("{i}"), Value::Null)).collect();
        assert_eq!(unknown(Kind::Node, &json!({"spec": many})).len(), MOST);
        assert_eq!(unknown(Kind::Node, &json!([{"spec": 1}])), []);
    }

    /// The typed parse refuses a value of the wrong type only in a field that it knows.
    #[test]
    fn every_field_of_the_lists_is_one_of_kubernetes() {
        let wrong = [json!(true), json!("x"), json!(1), json!([]), json!({})];
        for kind in Kind::ALL {
            for (path, known) in parts(kind) {
                let object = |field: &str, value: &Value| {
                    let mut part = json!({field: value});
                    for step in path.iter().rev() {
                        part = if *step == "[]" { json!([part]) } else { json!({*step: part}) };
                    }
                    part["kind"] = if *field == *"kind" { value.clone() } else { json!(kind.name()) };
                    if field != "apiVersion" {
                        part["apiVersion"] = json!(kind.api_version());
                    }
                    if *path != ["metadata"] {
                        part["metadata"] = json!({"name": "a"});
                    }
                    part
                };
                for field in known.iter().filter(|field| **field != "metadata" && **field != "name") {
                    let taken = |value: &Value| {
                        let mut object = object(field, value);
                        if *path == ["metadata"] {
                            object["metadata"]["name"] = json!("a");
                        }
                        !crate::state::source::manifest::from_value(object).objects.is_empty()
                    };
                    assert!(!wrong.iter().all(taken), "{}: {path:?} {field}", kind.name());
                }
            }
        }
    }

    #[test]
    fn a_wrong_shape_is_named() {
        for (object, words) in [
            (json!({"spec": {"podCIDR": ["10.244.1.0/24"]}}), "spec.podCIDRs"),
            (json!({"spec": {"podCIDRs": "10.244.1.0/24"}}), "is a list"),
            (json!({"spec": "podCIDRs - 10.244.1.0/24"}), "spec must hold fields (like `podCIDRs:"),
            (json!({"status": {"addresses": ["10.0.0.1"]}}), "status.addresses[0] must hold fields"),
        ] {
            let reason = misshapen(Kind::Node, &object).expect("it is wrong");
            assert!(reason.contains(words), "{reason}");
        }
        assert_eq!(misshapen(Kind::Node, &json!({"spec": {"podCIDRs": null}, "status": null})), None);
    }
}
