//! A pod's interface and the other end of its veth pair: what the kernel says, held against what the plugins
//! before us say.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ipnet::IpNet;

use super::call::Call;
use super::error::{CniError, Code};
use super::input::Previous;
use super::netlink::{Link, Netlink};

/// Both ends, and the ways to ask about them.
pub(super) struct Attachment {
    host: Netlink,
    inside: Netlink,
    /// The end in the pod.
    pub(super) pod: Link,
    /// The end on the node.
    pub(super) veth: Link,
    /// Which interface of the result is the pod's.
    pub(super) entry: usize,
}

impl Attachment {
    /// Finds both ends.
    pub(super) fn find(call: &Call, previous: &Previous) -> Result<Attachment, CniError> {
        let inside =
            |interface: &super::input::Interface| interface.inside && interface.name == call.interface;
        let entry = previous.interfaces.iter().position(inside).ok_or_else(|| {
            CniError::new(
                Code::InvalidConfig,
                format!("the plugins before this one made no interface {} in the pod", call.interface),
            )
            .with(ORDER)
        })?;
        let namespace = open_namespace(call)?;
        let mut host = Netlink::here().map_err(|e| CniError::io("cannot open netlink", &e))?;
        let mut inside = Netlink::within(&namespace)
            .map_err(|e| CniError::io("cannot enter the network namespace of CNI_NETNS", &e))?;
        let asking = |e: io::Error| CniError::io("cannot ask the kernel about links", &e);
        let pod = inside.link_by_name(&call.interface).map_err(asking)?;
        let pod = pod.ok_or_else(|| differs(format!("the pod has no interface {}", call.interface)))?;
        let other = match pod.peer.filter(|_| pod.veth) {
            Some(peer) => host.link_by_index(peer).map_err(asking)?,
            None => None,
        };
        // Indices count in each namespace from 1: the other end may be in a third one.
        let veth = other.filter(|other| other.veth && other.peer == Some(pod.index));
        let veth = veth.ok_or_else(|| {
            let what = format!("the pod's {} is not one end of a veth pair to this node", pod.name);
            CniError::new(Code::InvalidConfig, what).with(ORDER)
        })?;
        Ok(Attachment { host, inside, pod, veth, entry })
    }

    /// Fails unless the node itself is the pod's gateway: packets to other nodes and to Services must come to its
    /// IP stack, and a bridge without the gateway's address hands them to somebody else, or to nobody.
    pub(super) fn check_gateway(&mut self, previous: &Previous) -> Result<(), CniError> {
        let asking = |e: io::Error| CniError::io("cannot ask the kernel about the bridge", &e);
        let gateway = match self.veth.bridge {
            Some(index) => self.host.link_by_index(index).map_err(asking)?,
            None => None,
        };
        let gateway = gateway.unwrap_or_else(|| self.veth.clone());
        let held = self.host.addresses(gateway.index).map_err(asking)?;
        for address in previous.addresses_of(self.entry) {
            let found = match address.gateway {
                Some(gateway) => held.iter().any(|net| net.addr() == gateway),
                None => held.iter().any(|net| address.net.contains(&net.addr())),
            };
            if !found {
                let pod = address.net;
                let what = match address.gateway {
                    Some(address) => {
                        format!("{} does not have {address}, the gateway of the pod ({pod})", gateway.name)
                    }
                    None => format!("{} has no address in the pod's subnet ({pod})", gateway.name),
                };
                return Err(CniError::new(Code::InvalidConfig, what).with(
                    "the node must be the pods' gateway: set \"isGateway\": true in the `bridge` plugin's part of \
                     the CNI configuration",
                ));
            }
        }
        Ok(())
    }

    /// Fails if the pod has an address that other nodes do not look for here.
    pub(super) fn check_ranges(&self, previous: &Previous, ranges: &[IpNet]) -> Result<(), CniError> {
        let strange = previous.addresses_of(self.entry).find(|address| {
            let inside = |range: &IpNet| range.contains(&address.net.addr());
            !ranges.iter().any(inside)
        });
        let Some(strange) = strange else { return Ok(()) };
        let known: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        let what = format!(
            "the pod's address {} is in no pod range of this node ({})",
            strange.net.addr(),
            known.join(", ")
        );
        Err(CniError::new(Code::InvalidConfig, what)
            .with("no other node would find it: give the IPAM plugin the Node's spec.podCIDRs"))
    }

    /// Gives both ends this MTU.
    pub(super) fn set_mtu(&mut self, mtu: u16) -> Result<(), CniError> {
        let setting = |e: io::Error| CniError::io(format!("cannot set the MTU to {mtu}"), &e);
        let mtu = mtu.into();
        if self.pod.mtu != mtu {
            self.inside.set_mtu(self.pod.index, mtu).map_err(setting)?;
        }
        if self.veth.mtu != mtu {
            self.host.set_mtu(self.veth.index, mtu).map_err(setting)?;
        }
        Ok(())
    }

    /// The entries of both ends in the result.
    pub(super) fn entries(&self, previous: &Previous) -> Vec<usize> {
        let veth =
            |interface: &super::input::Interface| !interface.inside && interface.name == self.veth.name;
        previous.interfaces.iter().position(veth).into_iter().chain([self.entry]).collect()
    }

    /// Fails unless both ends and the addresses are as the result says.
    pub(super) fn check(&mut self, previous: &Previous, most: u16) -> Result<(), CniError> {
        for (link, entry) in [(&self.pod, Some(self.entry)), (&self.veth, self.entry_of_veth(previous))] {
            let name = &link.name;
            if !link.up {
                return Err(differs(format!("{name} is down")));
            }
            let Some(wanted) = entry.and_then(|entry| previous.interfaces.get(entry)) else { continue };
            if !wanted.mac.is_empty() && !wanted.mac.eq_ignore_ascii_case(&link.mac) {
                return Err(differs(format!("{name} has the MAC {}, not {}", link.mac, wanted.mac)));
            }
            if let Some(mtu) = wanted.mtu.filter(|mtu| *mtu != link.mtu) {
                return Err(differs(format!("{name} has the MTU {}, not {mtu}", link.mtu)));
            }
        }
        // Before 1.1.0 a result does not say the MTU. The paths' may have grown since the pod was added.
        let said = previous.interfaces.get(self.entry).is_some_and(|entry| entry.mtu.is_some());
        if self.pod.mtu != self.veth.mtu {
            let (pod, veth) = (&self.pod, &self.veth);
            let what = format!(
                "the two ends have different MTUs: {} {}, {} {}",
                pod.name, pod.mtu, veth.name, veth.mtu
            );
            return Err(differs(what));
        }
        if !said && self.pod.mtu > most.into() {
            let what = format!("{} has the MTU {}, and {most} fits through", self.pod.name, self.pod.mtu);
            return Err(differs(what));
        }
        let held = self.inside.addresses(self.pod.index);
        let held = held.map_err(|e| CniError::io("cannot ask the kernel about the pod's addresses", &e))?;
        match previous.addresses_of(self.entry).find(|address| !held.contains(&address.net)) {
            Some(missing) => Err(differs(format!("the pod's {} has no {}", self.pod.name, missing.net))),
            None => Ok(()),
        }
    }

    /// Fails unless the node has this device, up.
    pub(super) fn check_device(&mut self, name: &str) -> Result<(), CniError> {
        let link = self.host.link_by_name(name);
        let link = link.map_err(|e| CniError::io("cannot ask the kernel about links", &e))?;
        match link {
            Some(link) if link.up => Ok(()),
            Some(_) => Err(differs(format!("the node's interface {name} is down"))),
            None => Err(differs(format!("the node has no interface {name}"))),
        }
    }

    fn entry_of_veth(&self, previous: &Previous) -> Option<usize> {
        self.entries(previous).into_iter().find(|entry| *entry != self.entry)
    }
}

const ORDER: &str =
    "put warren-cni after `bridge` or `ptp` in the list of plugins: it completes what they make";

fn differs(what: impl Into<String>) -> CniError {
    CniError::new(Code::Differs, what)
}

/// The pod's namespace, which is never our own: there we would change the node's interfaces.
fn open_namespace(call: &Call) -> Result<File, CniError> {
    let path = call.namespace.as_deref().unwrap_or(Path::new(""));
    let wrong = |reason: String| {
        let path: String = path.display().to_string().chars().take(200).collect();
        CniError::new(Code::InvalidEnvironment, format!("CNI_NETNS {path:?}: {reason}"))
    };
    // Looked at first: opening a pipe or a device could wait, or do something.
    let there = fs::metadata(path).map_err(|e| wrong(e.to_string()))?;
    if !there.is_file() {
        return Err(wrong("is no network namespace".to_owned()));
    }
    let file = File::open(path).map_err(|e| wrong(e.to_string()))?;
    let there = file.metadata().map_err(|e| wrong(e.to_string()))?;
    let own =
        fs::metadata("/proc/self/ns/net").map_err(|e| CniError::io("cannot read /proc/self/ns/net", &e))?;
    if there.dev() != own.dev() {
        return Err(wrong("is no network namespace".to_owned()));
    }
    if there.ino() == own.ino() && !call.namespace_may_be_ours {
        return Err(wrong("is the node's own network namespace".to_owned()));
    }
    Ok(file)
}
