//! Who gets how many connections: chi-squared over 10,000 of them, from objects to packets, over both families
//! and with fixed seeds. The bounds hold for what is even and not for what favours one of four by a tenth
//! ([`a_skew_of_a_tenth_would_be_seen`]).

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::objects::{Cluster, End, LOOP, address, ends_of, object, packet};
use crate::state::source::Object;

const CONNECTIONS: u32 = 10_000;
const SEEDS: std::ops::RangeInclusive<u64> = 1..=6;
const VIP: End = ([10, 96, 0, 10], 80);
const NODE_PORT: u16 = 30_080;

/// An endpoint: the last two octets of its address, its conditions (ready, serving, terminating), zone hint.
type Member = ([u8; 2], [bool; 3], Option<&'static str>);

const READY: [bool; 3] = [true, true, false];
const LEAVING: [bool; 3] = [false, true, true];
const GONE: [bool; 3] = [false, false, true];

fn service(more: Value) -> Object {
    let mut spec = json!({
        "type": "NodePort",
        "clusterIPs": [address(false, VIP.0), address(true, VIP.0)],
        "ports": [{"protocol": "UDP", "port": 80, "nodePort": NODE_PORT}],
    });
    for (key, value) in more.as_object().expect("fields") {
        spec[key] = value.clone();
    }
    object(
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"}, "spec": spec}),
    )
}

fn slice(v6: bool, members: &[Member]) -> Object {
    let endpoint = |([node, host], [ready, serving, terminating], zone): &Member| {
        let name = if *node == 9 { "here".to_owned() } else { format!("n{node}") };
        json!({
            "addresses": [address(v6, [10, 244, *node, *host])], "nodeName": name,
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            "hints": zone.map(|zone| json!({"forZones": [{"name": zone}]})),
        })
    };
    object(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "metadata": {
            "name": format!("web-{v6}"), "namespace": "default", "labels": {"kubernetes.io/service-name": "web"},
        },
        "ports": [{"protocol": "UDP", "port": 8080}],
        "endpoints": members.iter().map(endpoint).collect::<Vec<_>>(),
    }))
}

fn serve(cluster: &mut Cluster, members: &[Member]) {
    for v6 in [false, true] {
        cluster.apply(&slice(v6, members));
    }
    assert_eq!(cluster.compile(), Vec::<String>::new());
}

fn cluster(seed: u64, more: Value, members: &[Member]) -> Cluster {
    let mut cluster = Cluster::with(seed, 1 << 17);
    cluster.apply(&service(more));
    serve(&mut cluster, members);
    cluster
}

/// Where a datagram goes: the last octets of the endpoint's address.
fn led(cluster: &mut Cluster, v6: bool, from: End, to: End) -> [u8; 2] {
    let (frames, datagrams) = cluster.world.take_frame(&packet(v6, false, from, to, ""));
    let packets: Vec<Vec<u8>> =
        frames.into_iter().chain(datagrams.into_iter().map(|(_, packet)| packet)).collect();
    let [packet] = &packets[..] else { panic!("{from:?} to {to:?}: {packets:?}") };
    let (_, ([.., node, host], port)) = ends_of(packet);
    assert_eq!(port, 8080);
    [node, host]
}

/// The n-th client of many: a port of one of 50 pods.
fn pod(n: u32) -> End {
    ([10, 244, 9, 100 + (n % 50) as u8], 1024 + (n / 50) as u16)
}

/// The n-th client outside: one of so many addresses, always with the same port.
fn stranger(n: u32) -> End {
    ([198, 18 + (n >> 16) as u8, (n >> 8) as u8, n as u8], 4000)
}

type Shares = BTreeMap<[u8; 2], u32>;

/// How 10,000 new connections are shared out.
fn share(cluster: &mut Cluster, v6: bool, client: impl Fn(u32) -> End, to: End) -> Shares {
    let mut shares = Shares::new();
    // What was before is over.
    cluster.world.now += Duration::from_secs(200);
    for n in 0..CONNECTIONS {
        *shares.entry(led(cluster, v6, client(n), to)).or_default() += 1;
        cluster.world.now += Duration::from_millis(2);
    }
    shares
}

/// Pearson's sum for shares that should be even.
fn chi_squared(shares: &Shares) -> f64 {
    let expected = f64::from(shares.values().sum::<u32>()) / shares.len() as f64;
    shares.values().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum()
}

/// What a sum of that many degrees of freedom exceeds once in a thousand times (Wilson and Hilferty).
fn bound(freedom: usize) -> f64 {
    let part = 2.0 / (9.0 * freedom as f64);
    freedom as f64 * (1.0 - part + 3.09 * part.sqrt()).powi(3)
}

/// These endpoints alone, and each as often as the others.
fn assert_even(what: &str, shares: &Shares, expected: &[[u8; 2]]) {
    let mut expected = expected.to_vec();
    expected.sort();
    assert_eq!(shares.keys().copied().collect::<Vec<_>>(), expected, "{what}");
    let chi = chi_squared(shares);
    assert!(shares.len() == 1 || chi < bound(shares.len() - 1), "{what}: {chi} {shares:?}");
}

const FOUR: [Member; 4] =
    [([0, 5], READY, None), ([0, 6], READY, None), ([1, 5], READY, None), ([9, 5], READY, None)];

fn places(members: &[Member]) -> Vec<[u8; 2]> {
    members.iter().map(|(place, _, _)| *place).collect()
}

#[test]
fn connections_are_shared_evenly() {
    let mut sums = [0.0; 2];
    for seed in SEEDS {
        let v6 = seed % 2 == 0;
        let mut cluster = cluster(seed, json!({}), &FOUR);
        // Many clients, and one with many ports.
        let one = |n: u32| ([10, 244, 9, 77], 1024 + n as u16);
        let both = [share(&mut cluster, v6, pod, VIP), share(&mut cluster, v6, one, VIP)];
        for (shares, sum) in both.iter().zip(&mut sums) {
            assert_even("one seed", shares, &places(&FOUR));
            *sum += chi_squared(shares);
        }
    }
    let freedom = SEEDS.count() * (FOUR.len() - 1);
    assert!(sums.iter().all(|sum| *sum < bound(freedom)), "{sums:?} of {}", bound(freedom));
    // And over as many as a large Service has.
    let many: Vec<Member> = (0..97).map(|n| ([n % 2, 10 + n], READY, None)).collect();
    let mut cluster = cluster(7, json!({}), &many);
    assert_even("97", &share(&mut cluster, false, pod, VIP), &places(&many));
}

/// The bounds above are worth something.
#[test]
fn a_skew_of_a_tenth_would_be_seen() {
    use siphasher::sip::SipHasher13;
    use std::hash::Hasher as _;
    let sum = |weights: [u64; 4]| -> f64 {
        let sum = SEEDS.map(|seed| {
            let mut shares = Shares::new();
            for n in 0..CONNECTIONS {
                let mut hasher = SipHasher13::new_with_keys(seed, 0);
                hasher.write_u32(n);
                let mut at = hasher.finish() % weights.iter().sum::<u64>();
                let chosen = weights.iter().position(|weight| {
                    let here = at < *weight;
                    at = at.wrapping_sub(*weight);
                    here
                });
                *shares.entry([0, chosen.expect("one of them") as u8]).or_default() += 1;
            }
            chi_squared(&shares)
        });
        sum.sum()
    };
    let bound = bound(SEEDS.count() * 3);
    assert!(sum([10, 10, 10, 10]) < bound);
    for skewed in [[11, 10, 10, 10], [10, 10, 10, 9], [11, 9, 10, 10]] {
        assert!(sum(skewed) > bound, "{skewed:?}: {} is within {bound}", sum(skewed));
    }
}

#[test]
fn a_new_endpoint_moves_no_flow_and_gets_its_share() {
    for v6 in [false, true] {
        let mut cluster = cluster(3, json!({}), &FOUR);
        let before: Vec<[u8; 2]> = (0..CONNECTIONS).map(|n| led(&mut cluster, v6, pod(n), VIP)).collect();
        let five = [&FOUR[..], &[([1, 9], READY, None)]].concat();
        serve(&mut cluster, &five);
        let after: Vec<[u8; 2]> = (0..CONNECTIONS).map(|n| led(&mut cluster, v6, pod(n), VIP)).collect();
        assert!(before == after, "flows in progress moved");
        assert_even("the five", &share(&mut cluster, v6, pod, VIP), &places(&five));
    }
}

#[test]
fn clients_with_affinity_are_shared_evenly_and_stay() {
    const SECONDS: u64 = 3_600;
    let sticky = json!({
        "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": SECONDS}},
    });
    for v6 in [false, true] {
        let mut cluster = cluster(4, sticky.clone(), &FOUR);
        let to = (LOOP, NODE_PORT);
        // Another connection of each client each time.
        let mut port = 4000;
        let mut all = |cluster: &mut Cluster| -> Vec<[u8; 2]> {
            port += 1;
            cluster.world.now += Duration::from_secs(100);
            (0..CONNECTIONS).map(|n| led(cluster, v6, (stranger(n).0, port), to)).collect()
        };
        let shares = |of: &mut dyn Iterator<Item = [u8; 2]>| {
            let mut shares = Shares::new();
            of.for_each(|place| *shares.entry(place).or_default() += 1);
            shares
        };
        let first = all(&mut cluster);
        assert_even("clients", &shares(&mut first.iter().copied()), &places(&FOUR));
        for _ in 0..3 {
            assert!(all(&mut cluster) == first, "a client changed its endpoint");
        }
        // One dies: its clients alone move, to all the others alike; and they stay there when it is back.
        let (dead, rest) = (FOUR[0].0, &FOUR[1..]);
        serve(&mut cluster, rest);
        let second = all(&mut cluster);
        let mut moved = Vec::new();
        for (before, after) in first.iter().zip(&second) {
            if *before == dead { moved.push(*after) } else { assert_eq!(before, after) }
        }
        assert_even("who had the dead one", &shares(&mut moved.iter().copied()), &places(rest));
        serve(&mut cluster, &FOUR);
        assert!(all(&mut cluster) == second, "a client moved back");
        // Their time is over: all choose anew, and the last choice has no say.
        cluster.world.now += Duration::from_secs(SECONDS + 1);
        let third = all(&mut cluster);
        for place in places(rest) {
            let of =
                second.iter().zip(&third).filter(|(before, _)| **before == place).map(|(_, after)| *after);
            assert_even("chosen anew", &shares(&mut { of }), &places(&FOUR));
        }
    }
}

/// KEP-1669.
#[test]
fn those_that_leave_serve_when_nothing_else_is_left() {
    let leaving = [([0, 7], LEAVING, None), ([1, 7], LEAVING, None), ([9, 7], LEAVING, None)];
    let gone = [([0, 8], GONE, None), ([9, 8], GONE, None)];
    for v6 in [false, true] {
        let mut cluster = cluster(5, json!({}), &[&FOUR[..], &leaving, &gone].concat());
        assert_even("the ready ones", &share(&mut cluster, v6, pod, VIP), &places(&FOUR));
        serve(&mut cluster, &[&leaving[..], &gone].concat());
        assert_even("all leave", &share(&mut cluster, v6, pod, VIP), &places(&leaving));
        serve(&mut cluster, &[&leaving[..], &gone, &FOUR[1..2]].concat());
        assert_even("one is back", &share(&mut cluster, v6, pod, VIP), &places(&FOUR[1..2]));
        // With `Local` the same is asked about this node's alone.
        cluster.apply(&service(json!({"externalTrafficPolicy": "Local"})));
        let here =
            [([9, 5], READY, None), ([9, 6], READY, None), ([0, 5], READY, None), ([9, 7], LEAVING, None)];
        serve(&mut cluster, &here);
        let outside = |cluster: &mut Cluster| share(cluster, v6, stranger, (LOOP, NODE_PORT));
        assert_even("those of this node", &outside(&mut cluster), &places(&here[..2]));
        serve(&mut cluster, &[([0, 5], READY, None), ([9, 7], LEAVING, None), ([9, 9], LEAVING, None)]);
        assert_even("all of this node leave", &outside(&mut cluster), &[[9, 7], [9, 9]]);
        let all = [[0, 5]];
        assert_even("who is inside asks all nodes", &share(&mut cluster, v6, pod, (LOOP, NODE_PORT)), &all);
    }
}

/// `trafficDistribution`, as its hints say it; this node is in zone `a`.
#[test]
fn the_zone_comes_first_while_it_has_one() {
    let of = |places: &[[u8; 2]], zone, conditions| -> Vec<Member> {
        places.iter().map(|place| (*place, conditions, zone)).collect()
    };
    let (near, far) = ([[9, 5], [0, 5], [0, 6]], [[1, 5], [1, 6], [1, 7], [1, 8]]);
    let (a, b) = (Some("a"), Some("b"));
    for v6 in [false, true] {
        let mut cluster = cluster(6, json!({}), &[of(&near, a, READY), of(&far, b, READY)].concat());
        assert_even("our zone", &share(&mut cluster, v6, pod, VIP), &near);
        serve(
            &mut cluster,
            &[of(&near[..2], a, READY), of(&near[2..], a, LEAVING), of(&far, b, READY)].concat(),
        );
        assert_even("what is ready of it", &share(&mut cluster, v6, pod, VIP), &near[..2]);
        serve(&mut cluster, &[of(&near, a, LEAVING), of(&far, b, READY)].concat());
        assert_even("nothing of it is ready", &share(&mut cluster, v6, pod, VIP), &far);
        serve(
            &mut cluster,
            &[of(&near, a, READY), of(&far[..3], b, READY), of(&far[3..], None, READY)].concat(),
        );
        assert_even("one has no hint", &share(&mut cluster, v6, pod, VIP), &[&near[..], &far].concat());
        serve(&mut cluster, &[of(&near, a, LEAVING), of(&far, b, LEAVING)].concat());
        assert_even("all leave", &share(&mut cluster, v6, pod, VIP), &[&near[..], &far].concat());
    }
}
