//! Where objects come from. Whatever the source, the state line hears three verbs: apply, delete, reset.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::problem::Problem;

pub mod dir;
mod fields;
pub mod folder;
pub mod kube;
mod located;
pub mod manifest;

/// The kinds of object that Warren reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1/Node`.
    Node,
    /// `v1/Service`.
    Service,
    /// `discovery.k8s.io/v1/EndpointSlice`.
    EndpointSlice,
    /// `v1/Pod`.
    Pod,
    /// `networking.k8s.io/v1/ServiceCIDR`.
    ServiceCidr,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 5] = [Kind::Node, Kind::Service, Kind::EndpointSlice, Kind::Pod, Kind::ServiceCidr];

    /// The name in an object's `kind`.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Node => "Node",
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Pod => "Pod",
            Kind::ServiceCidr => "ServiceCIDR",
        }
    }

    /// The `apiVersion` that goes with it.
    pub const fn api_version(self) -> &'static str {
        match self {
            Kind::Node | Kind::Service | Kind::Pod => "v1",
            Kind::EndpointSlice => "discovery.k8s.io/v1",
            Kind::ServiceCidr => "networking.k8s.io/v1",
        }
    }

    /// Whether objects of this kind live in a namespace.
    pub const fn namespaced(self) -> bool {
        match self {
            Kind::Service | Kind::EndpointSlice | Kind::Pod => true,
            Kind::Node | Kind::ServiceCidr => false,
        }
    }
}

/// Which object: its kind, namespace (empty for those that have none) and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Kind.
    pub kind: Kind,
    /// Namespace; empty for Nodes and ServiceCIDRs.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.kind.namespaced() {
            write!(f, "{}/{}/{}", self.kind.name(), self.namespace, self.name)
        } else {
            write!(f, "{}/{}", self.kind.name(), self.name)
        }
    }
}

/// One Kubernetes object, as the source gave it: typed, but not yet trusted.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Node.
    Node(Arc<Node>),
    /// A Service.
    Service(Arc<Service>),
    /// An EndpointSlice.
    EndpointSlice(Arc<EndpointSlice>),
    /// A Pod.
    Pod(Arc<Pod>),
    /// A ServiceCIDR.
    ServiceCidr(Arc<ServiceCIDR>),
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::Node(_) => Kind::Node,
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Pod(_) => Kind::Pod,
            Object::ServiceCidr(_) => Kind::ServiceCidr,
        }
    }

    /// Its metadata.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Object::Node(object) => &object.metadata,
            Object::Service(object) => &object.metadata,
            Object::EndpointSlice(object) => &object.metadata,
            Object::Pod(object) => &object.metadata,
            Object::ServiceCidr(object) => &object.metadata,
        }
    }

    /// What names it; a namespaced object without a namespace is in `default`.
    pub fn key(&self) -> Key {
        let metadata = self.metadata();
        let kind = self.kind();
        let namespace = match (kind.namespaced(), metadata.namespace.as_deref()) {
            (false, _) => "",
            (true, None | Some("")) => "default",
            (true, Some(namespace)) => namespace,
        };
        Key { kind, namespace: namespace.to_owned(), name: metadata.name.clone().unwrap_or_default() }
    }
}

/// What a source tells the state line.
#[derive(Clone, Debug)]
pub enum SourceEvent {
    /// This object is new or has changed.
    Apply(Object),
    /// This object was in the source and is no more. That is so whether or not the source has told all
    /// that it holds.
    Delete(Key),
    /// These are the objects of this kind.
    Reset {
        /// Which kind.
        kind: Kind,
        /// All of them that could be read.
        objects: Vec<Object>,
        /// Whether that is all of them: what is not among them is gone. A source that cannot read a
        /// part of what it has says so, and gives a complete list when it can; until then nothing is gone
        /// for being absent.
        complete: bool,
        /// Those that are there and cannot be read: what was known of them stays in force.
        unread: Vec<Key>,
    },
    /// Replaces what `origin` has to report; an empty list means that all is well there now.
    Problems {
        /// A file, or the source itself.
        origin: String,
        /// What is wrong there.
        problems: Vec<Problem>,
    },
}
