//! Objects as the API server sends them: of each only what Warren reads, and one that cannot be read is a value too.
//!
//! The API server may hold what Kubernetes' own types for other languages refuse: `lastTransitionTime: null` in a
//! condition, or a field of the next release. What nobody reads here is passed over before it can be refused, and is
//! not kept in memory either: most of a Node is its images, and half of many an object is who wrote it. What is refused
//! all the same costs that object, in a list, a page or a watch.

use std::borrow::Cow;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Deserialize;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::state::annotations::PREFIX;
use crate::state::problem::one_line;

/// Which parts of an object are read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Keep {
    /// All of it.
    All,
    /// Of a map these fields.
    Fields(&'static [(&'static str, Keep)]),
    /// Of a map the fields whose names begin so.
    Prefix(&'static str),
    /// Of each item of a list.
    Each(&'static Keep),
}

/// A kind, and what is read of it.
pub(super) trait Readable:
    Resource<DynamicType = ()> + DeserializeOwned + Clone + fmt::Debug + Send + 'static
{
    const KEEP: Keep;
}

const METADATA: Keep = Keep::Fields(&[
    ("name", Keep::All),
    ("namespace", Keep::All),
    ("uid", Keep::All),
    ("resourceVersion", Keep::All),
    ("creationTimestamp", Keep::All),
    ("deletionTimestamp", Keep::All),
    ("labels", Keep::All),
    ("annotations", Keep::Prefix(PREFIX)),
]);

impl Readable for k8s_openapi::api::core::v1::Node {
    const KEEP: Keep = Keep::Fields(&[
        ("metadata", METADATA),
        (
            "spec",
            Keep::Fields(&[
                ("podCIDR", Keep::All),
                ("podCIDRs", Keep::All),
                ("taints", Keep::Each(&Keep::Fields(&[("key", Keep::All), ("effect", Keep::All)]))),
            ]),
        ),
        (
            "status",
            Keep::Fields(&[
                ("addresses", Keep::All),
                ("daemonEndpoints", Keep::All),
                ("conditions", Keep::Each(&Keep::Fields(&[("type", Keep::All), ("status", Keep::All)]))),
            ]),
        ),
    ]);
}

impl Readable for k8s_openapi::api::core::v1::Service {
    const KEEP: Keep = Keep::Fields(&[
        ("metadata", METADATA),
        ("spec", Keep::All),
        ("status", Keep::Fields(&[("loadBalancer", Keep::All)])),
    ]);
}

impl Readable for k8s_openapi::api::discovery::v1::EndpointSlice {
    const KEEP: Keep = Keep::Fields(&[
        ("metadata", METADATA),
        ("addressType", Keep::All),
        (
            "endpoints",
            Keep::Each(&Keep::Fields(&[
                ("addresses", Keep::All),
                ("conditions", Keep::All),
                ("hints", Keep::All),
                ("nodeName", Keep::All),
                ("zone", Keep::All),
            ])),
        ),
        ("ports", Keep::All),
    ]);
}

impl Readable for k8s_openapi::api::networking::v1::ServiceCIDR {
    const KEEP: Keep = Keep::Fields(&[("metadata", METADATA), ("spec", Keep::All)]);
}

/// An object, or why it cannot be read.
#[derive(Clone, Debug)]
pub(super) struct Loose<K> {
    /// Name, namespace and version: what a watch needs to go on.
    metadata: ObjectMeta,
    pub(super) object: Result<K, String>,
}

impl<K> Loose<K> {
    /// The namespace (none: empty) and the name; empty where even that cannot be read.
    pub(super) fn names(&self) -> (&str, &str) {
        let ObjectMeta { namespace, name, .. } = &self.metadata;
        (namespace.as_deref().unwrap_or_default(), name.as_deref().unwrap_or_default())
    }
}

impl<'de, K: Readable> Deserialize<'de> for Loose<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Loose<K>, D::Error> {
        let value = K::KEEP.deserialize(deserializer)?;
        let text = |name: &str| value.get("metadata")?.get(name)?.as_str().map(str::to_owned);
        let metadata = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        let object = K::deserialize(value).map_err(|error| one_line(&error.to_string()));
        Ok(Loose { metadata, object })
    }
}

impl<K: Readable> Resource for Loose<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind(_: &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl<'de> DeserializeSeed<'de> for Keep {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self {
            Keep::All => Value::deserialize(deserializer),
            Keep::Fields(_) | Keep::Prefix(_) | Keep::Each(_) => deserializer.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for Keep {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut kept = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let keep = match self {
                Keep::Fields(fields) => {
                    fields.iter().find(|(field, _)| *field == name).map(|(_, keep)| *keep)
                }
                Keep::Prefix(prefix) => name.starts_with(prefix).then_some(Keep::All),
                // Of another shape than it should be: whoever reads it will say so.
                Keep::All | Keep::Each(_) => Some(Keep::All),
            };
            match keep {
                Some(keep) => drop(kept.insert(name, map.next_value_seed(keep)?)),
                None => drop(map.next_value::<serde::de::IgnoredAny>()?),
            }
        }
        Ok(Value::Object(kept))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let keep = match self {
            Keep::Each(keep) => *keep,
            Keep::All | Keep::Fields(_) | Keep::Prefix(_) => Keep::All,
        };
        let mut items = Vec::new();
        while let Some(item) = list.next_element_seed(keep)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Node, Service};
    use k8s_openapi::api::discovery::v1::EndpointSlice;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read<K: Readable>(value: Value) -> Loose<K> {
        serde_json::from_str(&value.to_string()).unwrap()
    }

    #[test]
    fn what_nobody_reads_cannot_be_refused() {
        let node: Loose<Node> = read(json!({
            "apiVersion": 7, "kind": [],
            "metadata": {"name": "a", "uid": "u", "creationTimestamp": null, "managedFields": [{"time": 7}],
                "ownerReferences": 7, "finalizers": {}, "labels": {"x": "y"},
                "annotations": {"warren.dev/location": "home", "example.com/large": "x"}},
            "spec": {"podCIDRs": ["10.1.0.0/24"], "unschedulable": "x",
                "taints": [{"key": "k", "effect": "NoSchedule", "timeAdded": "never"}]},
            "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": 7}],
                "images": 7, "nodeInfo": {"kernelVersion": 7}, "somethingNew": {}},
        }));
        let node = node.object.unwrap();
        assert_eq!(
            node.metadata.annotations.unwrap().into_keys().collect::<Vec<_>>(),
            ["warren.dev/location"]
        );
        assert_eq!(node.spec.unwrap().pod_cidrs.unwrap(), ["10.1.0.0/24"]);
        assert_eq!(node.status.unwrap().conditions.unwrap()[0].type_, "Ready");

        let service: Loose<Service> = read(json!({
            "metadata": {"name": "s", "namespace": "n"}, "spec": {"clusterIP": "10.96.0.1"},
            "status": {"conditions": [{"type": "x", "status": "True", "reason": "x", "message": "",
                "lastTransitionTime": null}], "loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}},
        }));
        let status = service.object.unwrap().status.unwrap();
        assert_eq!(status.load_balancer.unwrap().ingress.unwrap().len(), 1);

        let slice: Loose<EndpointSlice> = read(json!({
            "metadata": {"name": "s", "namespace": "n"}, "addressType": "IPv4", "endpoints": [
                {"addresses": ["10.0.0.1"], "targetRef": 7, "hostname": {}, "conditions": {"ready": null}}],
            "ports": null,
        }));
        assert_eq!(slice.object.unwrap().endpoints.unwrap()[0].addresses, ["10.0.0.1"]);
    }

    #[test]
    fn what_is_read_and_wrong_is_said() {
        let bad: Loose<Node> = read(json!({
            "metadata": {"name": "a", "resourceVersion": "7"}, "spec": {"podCIDRs": {"x": "\n"}}}));
        assert_eq!((bad.names(), bad.metadata.resource_version.as_deref()), (("", "a"), Some("7")));
        assert!(bad.object.unwrap_err().contains("expected"));
        for odd in
            [json!(7), json!(null), json!([]), json!({"metadata": 7}), json!({"metadata": {"name": {}}})]
        {
            let odd: Loose<Node> = read(odd);
            assert_eq!((odd.names(), odd.object.is_err()), (("", ""), true), "{odd:?}");
        }
    }

    proptest! {
        #[test]
        fn no_object_spoils_its_list(text in "[\\[\\]{}:,\"a-e0-9 .-]{0,60}") {
            let Ok(odd) = serde_json::from_str::<Value>(&text) else { return Ok(()) };
            for spot in [json!(odd), json!({"metadata": odd}), json!({"spec": odd}), json!({"status": odd})] {
                read::<Node>(spot.clone());
                read::<Service>(spot);
            }
        }
    }
}
