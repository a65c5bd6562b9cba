//! Tests of [`super`]: from objects to snapshot and plan.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::snapshot::PeerVxlan;
use crate::snapshot::SourceOwner;
use crate::state::annotations::{key_text, special};
use crate::state::services::ServiceSettings;
use crate::state::source::{Object, manifest};

fn settings(encap: EncapPolicy) -> Settings {
    Settings {
        node: "a".to_owned(),
        encap,
        announcement: Announcement { encaps: encap.encaps(), ..Announcement::default() },
        vxlan_port: 8472,
        vni: 1,
        mac: [2, 0, 0, 0, 0, 1],
        underlay_mtu: 1500,
        cluster_ranges: Vec::new(),
        service_ranges: Vec::new(),
        services: ServiceSettings::default(),
    }
}

/// A Node with pod range 10.244.`number`.0/24, address 192.0.2.`number`, one key and these annotations.
fn node(name: &str, number: u8, annotations: &str) -> Object {
    let key = key_text(&[number; 32]);
    let text = format!(
        "{{apiVersion: v1, kind: Node, metadata: {{name: {name}, annotations: {{warren.dev/lanes: '{key}:51820'{annotations}}}}},\
         spec: {{podCIDRs: [10.244.{number}.0/24]}}, status: {{addresses: [{{type: InternalIP, address: 192.0.2.{number}}}]}}}}"
    );
    manifest::parse(text.as_bytes(), false).objects.remove(0)
}

fn desired(objects: &[Object]) -> Desired {
    let mut desired = Desired::default();
    desired.reset(Kind::Node, objects);
    desired
}

fn compile(objects: &[Object], settings: &Settings) -> Compiled {
    Compiler::default().compile(&desired(objects), settings)
}

fn peer<'a>(compiled: &'a Compiled, name: &str) -> &'a Peer {
    compiled.snapshot.mesh.peers.iter().flatten().find(|peer| peer.name == name).expect("no such peer")
}

#[test]
fn three_nodes_become_a_mesh() {
    let objects =
        [node("a", 1, ""), node("b", 2, ""), node("c", 3, ", warren.dev/endpoints: '198.51.100.3:4500'")];
    let compiled = compile(&objects, &settings(EncapPolicy::WireGuard));
    assert_eq!(compiled.problems.len(), 1, "a's announced key is not its own: {:?}", compiled.problems);
    let (b, c) = (peer(&compiled, "b"), peer(&compiled, "c"));
    assert_eq!(b.endpoints, ["192.0.2.2:51820".parse().unwrap()]);
    assert_eq!(c.endpoints, ["198.51.100.3:4500".parse().unwrap()]);
    assert_eq!((b.encap, b.mtu), (Some(Encap::WireGuard), 1420));

    let mesh = &compiled.snapshot.mesh;
    let owner = |address: &str| mesh.routes.lookup(address.parse().unwrap());
    assert_eq!(owner("10.244.2.9"), Some(Owner::PeerPod(b.id)));
    assert_eq!(owner("10.244.2.0"), Some(Owner::PeerNode(b.id)));
    assert_eq!(owner("192.0.2.3"), Some(Owner::PeerNode(c.id)));
    assert_eq!(owner("10.244.1.1"), Some(Owner::LocalPod));
    assert_eq!(owner("192.0.2.1"), Some(Owner::LocalNode));
    assert_eq!(mesh.source_owner(b.id, "10.244.3.1".parse().unwrap()), SourceOwner::Foreign);
    assert_eq!(mesh.keys.get(&[3; 32]), Some(&(c.id, LaneId(0))));
    assert!(mesh.vxlan_sources.is_empty());

    let plan = &compiled.plan;
    assert_eq!(plan.node_addresses, ["10.244.1.0".parse::<IpAddr>().unwrap()]);
    assert_eq!(plan.peer_ranges.len(), 2);
    assert_eq!(plan.cluster_ranges.len(), 2, "1, and 2 with 3 joined");
    assert!(plan.encrypted && plan.cluster_ranges_guessed);
    assert_eq!(plan.pod_mtu, 1420);
    assert_eq!(compiled.snapshot.local.address_v4, Some("10.244.1.0".parse().unwrap()));
}

#[test]
fn both_ends_choose_the_same_encapsulation() {
    let policies = [EncapPolicy::WireGuard, EncapPolicy::Vxlan, EncapPolicy::Auto];
    let text = |policy: EncapPolicy, place: &str| {
        let location =
            if place.is_empty() { String::new() } else { format!(", warren.dev/location: '{place}'") };
        format!(", warren.dev/encaps: '{}'{location}", policy.encaps())
    };
    let mut seen = Vec::new();
    for one in policies {
        for other in policies {
            for (here, there) in [("x", "x"), ("x", "y"), ("", ""), ("x", "")] {
                let objects = [node("a", 1, &text(one, here)), node("b", 2, &text(other, there))];
                let from_a = peer(&compile(&objects, &settings(one)), "b").encap;
                let mut settings = settings(other);
                settings.node = "b".to_owned();
                let from_b = peer(&compile(&objects, &settings), "a").encap;
                assert_eq!(from_a, from_b, "{one:?} {other:?} {here} {there}");
                if from_a == Some(Encap::Vxlan) {
                    let plain = one == EncapPolicy::Vxlan && other == EncapPolicy::Vxlan;
                    assert!(plain || (here, there) == ("x", "x"), "plain between locations");
                }
                seen.push(from_a);
            }
        }
    }
    assert!(
        seen.contains(&None) && seen.contains(&Some(Encap::Vxlan)) && seen.contains(&Some(Encap::WireGuard))
    );
}

#[test]
fn what_is_not_announced_is_never_plain() {
    let text = "{apiVersion: v1, kind: Node, metadata: {name: b}, spec: {podCIDRs: [10.244.2.0/24]}}";
    let silent = manifest::parse(text.as_bytes(), false).objects.remove(0);
    let compiled = compile(&[node("a", 1, ""), silent.clone()], &settings(EncapPolicy::Auto));
    assert_eq!(peer(&compiled, "b").encap, Some(Encap::WireGuard));
    let compiled = compile(&[node("a", 1, ""), silent], &settings(EncapPolicy::Vxlan));
    assert_eq!(peer(&compiled, "b").encap, None);
}

#[test]
fn a_peer_without_a_pod_range_is_a_problem() {
    let text = "{apiVersion: v1, kind: Node, metadata: {name: b}}";
    let bare = manifest::parse(text.as_bytes(), false).objects.remove(0);
    let compiled = compile(&[node("a", 1, ""), bare], &settings(EncapPolicy::WireGuard));
    let about: Vec<_> = compiled.problems.iter().filter(|problem| problem.subject == "Node/b").collect();
    assert_eq!(about.len(), 1);
    assert_eq!((about[0].kind, about[0].field.as_str()), (ProblemKind::Value, "spec.podCIDRs"));
}

#[test]
fn ranges_once_seen_are_guarded_after_their_node_went() {
    let settings_of = |cluster: &[&str]| {
        let cluster_ranges = cluster.iter().map(|range| range.parse().unwrap()).collect();
        Settings { cluster_ranges, ..settings(EncapPolicy::WireGuard) }
    };
    let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
    let mut desired = desired(&[node("a", 1, ""), node("b", 4, ""), node("c", 7, "")]);
    let mut compiler = Compiler::default();
    let all = ranges(&["10.244.1.0/24", "10.244.4.0/24", "10.244.7.0/24"]);
    assert_eq!(compiler.compile(&desired, &settings_of(&[])).plan.cluster_ranges, all);
    // One is removed, one loses its range to a typing mistake, and this node's own moves.
    desired.delete(&node("b", 4, "").key());
    let text = "{apiVersion: v1, kind: Node, metadata: {name: c}, spec: {podCidrs: [10.244.7.0/24]}}";
    desired.apply(&manifest::parse(text.as_bytes(), false).objects.remove(0));
    desired.apply(&node("a", 9, ""));
    let plan = compiler.compile(&desired, &settings_of(&[])).plan;
    assert_eq!(plan.peer_ranges, []);
    assert_eq!(plan.cluster_ranges, ranges(&["10.244.4.0/24", "10.244.7.0/24", "10.244.9.0/24"]));
    // Whoever says what the cluster's ranges are is believed.
    let said = compiler.compile(&desired, &settings_of(&["10.244.0.0/16"])).plan;
    assert_eq!(said.cluster_ranges, ranges(&["10.244.0.0/16"]));
}

#[test]
fn mtu_follows_underlay_and_encapsulation() {
    let with = |annotations: &str, mtu: u16, encap: EncapPolicy| {
        let own = format!(", warren.dev/encaps: '{}'", encap.encaps());
        let mut settings = settings(encap);
        settings.underlay_mtu = mtu;
        compile(&[node("a", 1, &own), node("b", 2, annotations)], &settings).plan.pod_mtu
    };
    assert_eq!(with("", 1500, EncapPolicy::WireGuard), 1420);
    assert_eq!(with(", warren.dev/endpoints: '[2001:db8::2]:1'", 1500, EncapPolicy::WireGuard), 1420);
    assert_eq!(with(", warren.dev/encaps: vxlan", 1500, EncapPolicy::Auto), 1420);
    assert_eq!(with(", warren.dev/encaps: vxlan", 1500, EncapPolicy::Vxlan), 1450);
    assert_eq!(with("", 9000, EncapPolicy::WireGuard), 8920);
    assert_eq!(with("", u16::MAX, EncapPolicy::WireGuard), 65455);
    assert_eq!(with("", 10, EncapPolicy::WireGuard), MIN_MTU_V4);
    let alone = compile(&[node("a", 1, "")], &settings(EncapPolicy::WireGuard));
    assert_eq!(alone.plan.pod_mtu, 1420);
    let six = "{apiVersion: v1, kind: Node, metadata: {name: a}, spec: {podCIDRs: ['fd00:1::/64']}}";
    let six = manifest::parse(six.as_bytes(), false).objects.remove(0);
    let mut small = settings(EncapPolicy::WireGuard);
    small.underlay_mtu = 1300;
    assert_eq!(compile(&[six, node("b", 2, "")], &small).plan.pod_mtu, MIN_MTU_V6);
}

#[test]
fn vxlan_takes_frames_from_the_peers_own_address_only() {
    let announced = ", warren.dev/encaps: vxlan, warren.dev/vxlan-mac: '02:00:00:00:00:02', \
                     warren.dev/endpoints: '198.51.100.1:1'";
    let compiled = compile(
        &[node("a", 1, ", warren.dev/encaps: vxlan"), node("b", 2, announced)],
        &settings(EncapPolicy::Vxlan),
    );
    let b = peer(&compiled, "b");
    let address: IpAddr = "192.0.2.2".parse().unwrap();
    assert_eq!(b.vxlan, Some(PeerVxlan { address, port: 8472, mac: Some([2, 0, 0, 0, 0, 2]) }));
    assert_eq!(compiled.snapshot.mesh.vxlan_sources, HashMap::from([(address, b.id)]));
    assert!(!compiled.plan.encrypted);
}

#[test]
fn what_did_not_change_is_not_made_again() {
    let settings = settings(EncapPolicy::WireGuard);
    let mut compiler = Compiler::default();
    let mut desired = desired(&[node("a", 1, ""), node("b", 2, ""), node("c", 3, "")]);
    let first = compiler.compile(&desired, &settings);
    let again = compiler.compile(&desired, &settings);
    assert!(Arc::ptr_eq(&first.snapshot, &again.snapshot) && Arc::ptr_eq(&first.plan, &again.plan));

    desired.apply(&node("b", 2, ", warren.dev/keepalive: '25'"));
    let changed = compiler.compile(&desired, &settings);
    assert_eq!(changed.snapshot.generation, first.snapshot.generation + 1);
    let arc = |compiled: &Compiled, id: PeerId| compiled.snapshot.mesh.peer(id).cloned().unwrap();
    let (b, c) = (peer(&first, "b").id, peer(&first, "c").id);
    assert_eq!((peer(&changed, "b").id, peer(&changed, "b").keepalive), (b, 25));
    let mut behind_nat = settings.clone();
    behind_nat.announcement.keepalive = 20;
    let ours = Compiler::default().compile(&desired, &behind_nat);
    assert_eq!((peer(&ours, "b").keepalive, peer(&ours, "c").keepalive), (20, 20));
    assert!(Arc::ptr_eq(&arc(&first, c), &arc(&changed, c)));
    assert!(Arc::ptr_eq(&first.plan, &changed.plan));
}

#[test]
fn a_number_is_not_given_again_at_once_and_survives_a_restart() {
    let settings = settings(EncapPolicy::WireGuard);
    let mut compiler = Compiler::default();
    let mut state = desired(&[node("a", 1, "")]);
    let mut last = None;
    let mut ever = HashMap::new();
    for round in 0..200_u32 {
        let name = format!("n{round}");
        let object = node(&name, 2, "");
        state.apply(&object);
        let id = peer(&compiler.compile(&state, &settings), &name).id;
        assert_ne!(Some(id), last);
        *ever.entry(id).or_insert(0) += 1;
        state.delete(&object.key());
        let compiled = compiler.compile(&state, &settings);
        assert!(compiled.snapshot.mesh.peer(id).is_none());
        last = Some(id);
    }
    assert!(ever.len() <= RESTING_IDS + 2 && ever.len() > RESTING_IDS / 2, "{} numbers", ever.len());

    let objects = [node("a", 1, ""), node("b", 2, ""), node("c", 3, "")];
    let saved =
        [("c".to_owned(), PeerId(7)), ("b".to_owned(), PeerId(3)), ("x".to_owned(), PeerId(u32::MAX))];
    let mut compiler = Compiler::with_ids(saved);
    // Before the first full list a saved peer that is not there yet keeps its number.
    let mut early = Desired::default();
    early.apply(&objects[1]);
    compiler.compile(&early, &settings);
    let compiled = compiler.compile(&desired(&objects), &settings);
    assert_eq!((peer(&compiled, "b").id, peer(&compiled, "c").id), (PeerId(3), PeerId(7)));

    // One that was seen and then removed does not.
    let mut compiler = Compiler::with_ids([("b".to_owned(), PeerId(3)), ("c".to_owned(), PeerId(7))]);
    compiler.compile(&early, &settings);
    early.delete(&objects[1].key());
    compiler.compile(&early, &settings);
    assert_eq!(compiler.ids().collect::<Vec<_>>(), [("c", PeerId(7))]);
}

#[test]
fn this_node_hears_what_is_wrong_with_it() {
    let text = "{apiVersion: v1, kind: Node, metadata: {name: a}}";
    let bare = manifest::parse(text.as_bytes(), false).objects.remove(0);
    let of = |objects: &[Object]| {
        let problems = compile(objects, &settings(EncapPolicy::WireGuard)).problems;
        problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
    };
    assert!(of(&[]).contains("no such Node"));
    assert!(of(&[bare]).contains("no pod range"));
}

/// A Node that is as old as the minute, with these annotations, ranges and addresses.
fn claimant(name: &str, minute: u8, annotations: &str, ranges: &str, addresses: &[&str]) -> Object {
    let addresses: Vec<String> =
        addresses.iter().map(|address| format!("{{type: InternalIP, address: '{address}'}}")).collect();
    let text = format!(
        "{{apiVersion: v1, kind: Node, metadata: {{name: {name}, uid: {name}, creationTimestamp: '2026-01-01T00:{minute:02}:00Z', \
         annotations: {{{annotations}}}}}, spec: {{podCIDRs: [{ranges}]}}, status: {{addresses: [{}]}}}}",
        addresses.join(", ")
    );
    manifest::parse(text.as_bytes(), false).objects.remove(0)
}

/// What the agent of `own` thinks of the others, by name.
fn opinions(own: &str, objects: &[Object]) -> BTreeMap<String, Peer> {
    let settings = Settings {
        node: own.to_owned(),
        cluster_ranges: vec!["10.244.0.0/16".parse().unwrap()],
        service_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        ..settings(EncapPolicy::WireGuard)
    };
    let compiled = compile(objects, &settings);
    let peers = compiled.snapshot.mesh.peers.iter().flatten();
    // A number is the agent's own affair, and the MTU that of its own path.
    peers.map(|peer| (peer.name.clone(), Peer { id: PeerId(0), mtu: 0, ..Peer::clone(peer) })).collect()
}

/// The same table as `tests/kubernetes/checks hostile_node`, which asks the agents of a real cluster.
#[test]
fn a_node_that_lies_gains_nothing_and_all_agree_about_it() {
    let key = |byte: u8| key_text(&[byte; 32]);
    let lanes = |byte: u8| format!("warren.dev/lanes: '{}:51820'", key(byte));
    let honest = |name, minute, number: u8| {
        let (range, address) = (format!("10.244.{number}.0/24"), format!("192.0.2.{number}"));
        claimant(name, minute, &lanes(number), &range, &[&address])
    };
    let (range, address) = ("10.244.9.0/24", &["192.0.2.9"][..]);
    let with = |more: &str| format!("{}, {more}", lanes(9));
    let long = with(&format!("warren.dev/endpoints: '{}'", "192.0.2.9:1,".repeat(40_000)));
    let lies: Vec<(&str, String, &str, &[&str])> = vec![
        ("nothing", String::new(), "", &[]),
        ("another's key", lanes(1), range, address),
        ("another's next key", with(&format!("warren.dev/also-keys: '{}'", key(1))), range, address),
        ("an endpoint in a pod range", with("warren.dev/endpoints: '10.244.1.9:51820'"), range, address),
        ("an endpoint in a Service range", with("warren.dev/endpoints: '10.96.0.1:443'"), range, address),
        ("another's endpoint", with("warren.dev/endpoints: '192.0.2.1:51820'"), range, address),
        ("ranges in an annotation", with("warren.dev/podCIDRs: '10.244.1.0/24'"), range, address),
        (
            "control characters",
            "warren.dev/lanes: \"\\e[2J\\r\\n:1\", warren.dev/location: \"\\e[31m\"".into(),
            range,
            address,
        ),
        ("half a megabyte", long, range, address),
        ("a protocol of tomorrow", with("warren.dev/protocol: '99'"), range, address),
        ("another's address", lanes(9), range, &["192.0.2.1"]),
        ("an address in a pod range", lanes(9), range, &["10.244.1.7"]),
        ("a Service's address", lanes(9), range, &["10.96.0.1"]),
        ("another's range", lanes(9), "10.244.1.0/24", address),
        ("a part of another's range", lanes(9), "10.244.1.128/25", address),
        ("everybody's range", lanes(9), "10.244.0.0/16", address),
        ("the Services' range", lanes(9), "10.96.0.0/16", address),
        ("the world", lanes(9), "0.0.0.0/0", address),
        ("no range", lanes(9), "", address),
    ];
    let others = [honest("a", 1, 1), honest("b", 2, 2), honest("c", 3, 3)];
    for (what, annotations, range, addresses) in &lies {
        // Younger than all; and older than all, where it can take a name but must not divide the others.
        for (minute, younger) in [(50, true), (0, false)] {
            let liar = claimant("m", minute, annotations, range, addresses);
            let after: Vec<Object> = others.iter().chain([&liar]).cloned().collect();
            let before: Vec<Object> = [&liar].into_iter().chain(others.iter().rev()).cloned().collect();
            let mut about: Vec<(String, Peer)> = Vec::new();
            for own in ["a", "b", "c"] {
                let says = opinions(own, &after);
                assert_eq!(says, opinions(own, &before), "{what}: {own}, by the order of arrival");
                about.extend(says.clone());
                if younger {
                    let alone: BTreeMap<String, Peer> =
                        says.into_iter().filter(|(name, _)| name != "m").collect();
                    assert_eq!(alone, opinions(own, &others), "{what}: {own} thinks otherwise of others");
                }
            }
            for (name, peer) in &about {
                let same = |(other, opinion): &&(String, Peer)| other != name || opinion == peer;
                assert!(about.iter().all(|one| same(&one)), "{what}: they disagree about {name}");
            }
        }
    }
}

/// Text that is nearly right: parts of good values and bad ones, so that the checks behind the first are met.
fn hostile() -> impl Strategy<Value = String> {
    let parts = vec![
        "10.244.1.0/24",
        "10.244.0.0/16",
        "fd00::/64",
        "0.0.0.0/0",
        "192.0.2.2",
        "192.0.2.1:51820",
        "[2001:db8::1]:1",
        "::1",
        "/",
        ",",
        ":",
        "-1",
        "wireguard",
        "vxlan",
        "02:00:00:00:00:01",
        "=",
        "\0",
        "\u{1b}",
        "99999",
        "1",
        "..",
        "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
    ];
    proptest::collection::vec(proptest::sample::select(parts), 0..3).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn no_object_panics_or_takes_what_is_not_its_own(
        nodes in proptest::collection::vec(
            (0..4_u8, proptest::collection::vec(hostile(), 7), 0..5_u8, 0..2_u8), 1..6),
        policy in proptest::sample::select(vec![EncapPolicy::WireGuard, EncapPolicy::Vxlan, EncapPolicy::Auto]),
        underlay: u16,
    ) {
        let mut desired = Desired::default();
        let mut compiler = Compiler::default();
        let mut settings = settings(policy);
        settings.underlay_mtu = underlay;
        for (name, values, annotation, listed) in nodes {
            let given = ["lanes", "endpoints", "encaps", "public-key", "endpoint"][usize::from(annotation)];
            let name = ["a", "b", "c", "d"][usize::from(name)];
            let annotations = serde_json::json!({
                "warren.dev/vxlan-mac": values[1], (format!("warren.dev/{given}")): values[2],
            });
            let value = serde_json::json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "uid": values[0], "annotations": annotations},
                "spec": {"podCIDRs": [values[3], values[4]]},
                "status": {"addresses": [
                    {"type": "InternalIP", "address": values[5]}, {"type": "ExternalIP", "address": values[6]},
                ]},
            });
            let objects = manifest::from_value(value).objects;
            if listed == 0 {
                desired.reset(Kind::Node, &objects);
            } else {
                objects.iter().for_each(|object| drop(desired.apply(object)));
            }
            let compiled = compiler.compile(&desired, &settings);
            let mesh = &compiled.snapshot.mesh;
            for peer in mesh.peers.iter().flatten() {
                prop_assert_eq!(mesh.peer(peer.id), Some(peer));
                prop_assert!(peer.pod_ranges.iter().all(|range| special(*range).is_none()));
                for address in &peer.addresses {
                    prop_assert_eq!(mesh.routes.lookup(*address), Some(Owner::PeerNode(peer.id)));
                }
                for endpoint in &peer.endpoints {
                    prop_assert!(!matches!(mesh.routes.lookup(endpoint.ip()), Some(Owner::PeerPod(_) | Owner::LocalPod)));
                }
                prop_assert!(peer.encap != Some(Encap::Vxlan) || peer.vxlan.is_some());
                prop_assert!(compiled.plan.pod_mtu == peer.mtu);
            }
            prop_assert!(compiled.problems.iter().all(|problem| !problem.to_string().contains(char::is_control)));
        }
    }
}

/// The desired state of 5,000 nodes, and a change of one of them.
fn five_thousand() -> Vec<Object> {
    let object = |number: usize| {
        let (high, low) = (number / 250, number % 250);
        let mut key = [1; 32];
        key[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
        let text = format!(
            r#"{{"apiVersion":"v1","kind":"Node","metadata":{{"name":"node-{number}","uid":"{number}",
            "annotations":{{"warren.dev/lanes":"{}:51820","warren.dev/endpoints":"198.18.{high}.{low}:51820"}}}},
            "spec":{{"podCIDRs":["10.{}.{low}.0/24"]}},
            "status":{{"addresses":[{{"type":"InternalIP","address":"172.16.{high}.{low}"}}]}}}}"#,
            key_text(&key),
            100 + high,
        );
        manifest::parse(text.as_bytes(), true).objects.remove(0)
    };
    (0..5_000).map(object).collect()
}

#[test]
#[expect(clippy::disallowed_methods, reason = "this test measures")]
fn five_thousand_nodes_compile_quickly() {
    let objects = five_thousand();
    let mut settings = settings(EncapPolicy::WireGuard);
    settings.node = "node-0".to_owned();
    let mut desired = desired(&objects);
    let mut compiler = Compiler::default();
    let first = compiler.compile(&desired, &settings);
    assert_eq!(first.plan.peer_ranges.len(), 4_999);
    assert_eq!(first.problems.len(), 1);
    let mut best = std::time::Duration::MAX;
    for round in 0..5 {
        let change = five_thousand_changed(&objects[2_500], round);
        desired.apply(&change);
        let before = std::time::Instant::now();
        let compiled = compiler.compile(&desired, &settings);
        best = best.min(before.elapsed());
        assert_eq!(compiled.snapshot.generation, round + 2);
    }
    println!("5,000 nodes, one changed: compiled in {best:?}");
    // Unoptimised builds are about ten times slower than what ships.
    let most = if cfg!(debug_assertions) { 500 } else { 50 };
    assert!(best.as_millis() < most, "{best:?}");
}

fn five_thousand_changed(object: &Object, round: u64) -> Object {
    let Object::Node(node) = object else { panic!() };
    let mut node = node.as_ref().clone();
    let annotations = node.metadata.annotations.get_or_insert_default();
    annotations.insert("warren.dev/keepalive".to_owned(), (round + 1).to_string());
    Object::Node(Arc::new(node))
}
