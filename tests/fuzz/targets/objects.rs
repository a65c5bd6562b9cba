//! A file of Kubernetes objects, all the way to what the packet line reads.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use warren::snapshot::{Owner, Snapshot};
use warren::state::annotations::Announcement;
use warren::state::compile::{Compiler, EncapPolicy, Settings};
use warren::state::desired::Desired;
use warren::state::services::ServiceSettings;
use warren::state::source::{Kind, Object, manifest};

pub(crate) fn run(data: &[u8]) {
    let (json, text) = match data.split_first() {
        Some((b'{' | b'[', _)) => (true, data),
        Some((_, _)) => (false, data),
        None => return,
    };
    let manifest = manifest::parse(text, json);
    for problem in &manifest.problems {
        assert!(
            !problem.reason.chars().any(char::is_control),
            "control characters reach a terminal: {problem:?}"
        );
    }
    let forward = compile(&manifest.objects);
    exclusive(&forward);
    // The order of arrival decides nothing, or two agents would disagree. (Of one object the later version counts.)
    let names: BTreeSet<_> = manifest.objects.iter().map(Object::key).collect();
    if names.len() == manifest.objects.len() {
        let reverse: Vec<Object> = manifest.objects.iter().rev().cloned().collect();
        assert_eq!(owners(&forward), owners(&compile(&reverse)), "the order of arrival decides");
    }
}

fn compile(objects: &[Object]) -> Snapshot {
    let mut desired = Desired::default();
    for kind in [Kind::Node, Kind::ServiceCidr, Kind::Service, Kind::EndpointSlice] {
        for (key, problems) in desired.reset(kind, objects).reports {
            assert!(!key.is_empty());
            for problem in problems {
                assert!(
                    !problem.to_string().chars().any(char::is_control),
                    "control characters: {problem:?}"
                );
            }
        }
    }
    let settings = Settings {
        node: "a".to_owned(),
        encap: EncapPolicy::Auto,
        announcement: Announcement::default(),
        vxlan_port: 8472,
        vni: 1,
        mac: [2, 0, 0, 0, 0, 1],
        underlay_mtu: 1500,
        cluster_ranges: Vec::new(),
        service_ranges: Vec::new(),
        services: ServiceSettings { enabled: true, ..ServiceSettings::default() },
    };
    let compiled = Compiler::default().compile(&desired, &settings);
    for (_, problems) in &compiled.service_reports {
        let said = problems.iter().map(ToString::to_string);
        assert!(!said.collect::<String>().chars().any(char::is_control), "control characters: {problems:?}");
    }
    (*compiled.snapshot).clone()
}

/// No range, key or VXLAN source belongs to two peers, and the routes say whose each is.
fn exclusive(snapshot: &Snapshot) {
    let mesh = &snapshot.mesh;
    let peers: Vec<_> = mesh.peers.iter().flatten().collect();
    for (index, peer) in peers.iter().enumerate() {
        assert!(peer.mtu >= 576, "{peer:?}");
        for other in &peers[index + 1..] {
            let clash = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
            assert!(!peer.pod_ranges.iter().any(|a| other.pod_ranges.iter().any(|b| clash(a, b))));
            assert!(!peer.addresses.iter().any(|a| other.addresses.contains(a)));
            assert!(!peer.lanes.iter().any(|a| other.lanes.iter().any(|b| a.key == b.key)));
        }
        for range in &peer.pod_ranges {
            let owner = mesh.routes.lookup(range.broadcast());
            assert!(
                matches!(owner, Some(Owner::PeerPod(id) | Owner::PeerNode(id)) if id == peer.id),
                "{range} of {} goes to {owner:?}",
                peer.name
            );
        }
    }
    assert!(mesh.vxlan_sources.values().all(|id| mesh.peer(*id).is_some()));
    assert!(mesh.keys.values().all(|(id, lane)| {
        mesh.peer(*id).is_some_and(|peer| peer.lanes.get(usize::from(lane.0)).is_some())
    }));
}

/// Who has what, by name.
fn owners(snapshot: &Snapshot) -> BTreeMap<String, String> {
    let peers = snapshot.mesh.peers.iter().flatten();
    peers
        .map(|peer| {
            let mut addresses = peer.addresses.clone();
            addresses.sort();
            let said = format!("{:?} {:?} {:?} {:?}", peer.pod_ranges, addresses, peer.lanes, peer.encap);
            (peer.name.clone(), said)
        })
        .collect()
}
