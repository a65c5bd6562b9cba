//! Which endpoints a client is led to: readiness, the way out when nothing is ready, and nearness.
//!
//! The meaning is that of kube-proxy (pkg/proxy/topology.go, v1.36): ready endpoints count; only where none is
//! left, those that go away but still serve (KEP-1669), for `Cluster` and `Local` each by itself. Hints
//! (KEP-2433, KEP-3015) narrow the ready ones down when every ready endpoint has them and one is for us: to
//! those for this node, else to those for its zone.

use super::slice::Hints;
use crate::snapshot::service::Endpoint;

/// An endpoint to choose from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) endpoint: Endpoint,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    /// Whether it is on this node.
    pub(super) local: bool,
    /// Whether its slice names no node.
    pub(super) nowhere: bool,
    pub(super) hints: Option<&'a Hints>,
}

/// Where the choice is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) node: &'a str,
    pub(super) zone: Option<&'a str>,
}

/// Which lists a Service uses at all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Uses {
    /// One that any endpoint may be in.
    pub(super) cluster: bool,
    /// One of this node's endpoints.
    pub(super) local: bool,
}

/// What was chosen; in the order of the candidates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) cluster: Vec<Endpoint>,
    pub(super) local: Vec<Endpoint>,
    /// Whether there is a usable endpoint on any node.
    pub(super) anywhere: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nearness {
    Anywhere,
    Zone,
    Node,
}

/// Chooses.
pub(super) fn choose(candidates: &[Candidate<'_>], uses: Uses, place: Place<'_>) -> Chosen {
    let pick = |which: &dyn Fn(&Candidate<'_>) -> bool| -> Vec<Endpoint> {
        candidates.iter().filter(|candidate| which(candidate)).map(|candidate| candidate.endpoint).collect()
    };
    let mut chosen = Chosen::default();
    if uses.cluster {
        let nearness = nearness(candidates, place);
        chosen.cluster = pick(&|candidate| candidate.ready && near(candidate, nearness, place));
        // Nearness never leaves nothing of what is ready, so here nothing is ready.
        if chosen.cluster.is_empty() {
            chosen.cluster = pick(&leaving);
        }
        chosen.anywhere = !chosen.cluster.is_empty();
    }
    if uses.local {
        chosen.local = pick(&|candidate| candidate.local && candidate.ready);
        if chosen.local.is_empty() {
            chosen.local = pick(&|candidate| candidate.local && leaving(candidate));
        }
        chosen.anywhere |= candidates.iter().any(|candidate| candidate.ready || leaving(candidate));
    }
    chosen
}

fn leaving(candidate: &Candidate<'_>) -> bool {
    candidate.serving && candidate.terminating
}

/// How near endpoints have to be.
fn nearness(candidates: &[Candidate<'_>], place: Place<'_>) -> Nearness {
    let ready = || candidates.iter().filter(|candidate| candidate.ready);
    let usable = |nearness: Nearness| {
        let hinted = |candidate: &Candidate<'_>| match (nearness, candidate.hints) {
            (Nearness::Node, Some(hints)) => !hints.nodes.is_empty(),
            (Nearness::Zone, Some(hints)) => !hints.zones.is_empty(),
            (Nearness::Anywhere, _) | (_, None) => false,
        };
        ready().all(hinted) && ready().any(|candidate| near(candidate, nearness, place))
    };
    [Nearness::Node, Nearness::Zone]
        .into_iter()
        .find(|nearness| usable(*nearness))
        .unwrap_or(Nearness::Anywhere)
}

fn near(candidate: &Candidate<'_>, nearness: Nearness, place: Place<'_>) -> bool {
    match nearness {
        Nearness::Anywhere => true,
        Nearness::Node => {
            candidate.hints.is_some_and(|hints| hints.nodes.iter().any(|node| **node == *place.node))
        }
        Nearness::Zone => candidate
            .hints
            .zip(place.zone)
            .is_some_and(|(hints, zone)| hints.zones.iter().any(|other| **other == *zone)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const CLUSTER: Uses = Uses { cluster: true, local: false };
    const LOCAL: Uses = Uses { cluster: false, local: true };
    const BOTH: Uses = Uses { cluster: true, local: true };

    /// Per endpoint: `r`eady, `s`erving, `t`erminating, `l`ocal; then its zones and nodes: `rsl za nx`.
    fn run(uses: Uses, zone: Option<&str>, endpoints: &[&str]) -> (Vec<u16>, Vec<u16>, bool) {
        let hints: Vec<Option<Hints>> = endpoints
            .iter()
            .map(|text| {
                let of = |letter: char| -> Box<[Arc<str>]> {
                    text.split(' ')
                        .skip(1)
                        .filter_map(|word| word.strip_prefix(letter))
                        .map(Arc::from)
                        .collect()
                };
                let hints = Hints { zones: of('z'), nodes: of('n') };
                (hints != Hints::default()).then_some(hints)
            })
            .collect();
        let candidates: Vec<Candidate<'_>> = endpoints
            .iter()
            .zip(&hints)
            .zip(1..)
            .map(|((text, hints), port)| {
                let state = text.split(' ').next().unwrap_or_default();
                Candidate {
                    endpoint: Endpoint { address: "10.244.0.1".parse().expect("address"), port },
                    ready: state.contains('r'),
                    serving: state.contains('s'),
                    terminating: state.contains('t'),
                    local: state.contains('l'),
                    nowhere: false,
                    hints: hints.as_ref(),
                }
            })
            .collect();
        let chosen = choose(&candidates, uses, Place { node: "here", zone });
        let ports = |list: &[Endpoint]| list.iter().map(|endpoint| endpoint.port).collect::<Vec<_>>();
        (ports(&chosen.cluster), ports(&chosen.local), chosen.anywhere)
    }

    #[test]
    fn readiness_and_policies() {
        for (what, uses, endpoints, cluster, local, anywhere) in [
            ("nothing", BOTH, &[][..], &[][..], &[][..], false),
            ("ready ones", CLUSTER, &["rs", "rsl", ""], &[1, 2], &[], true),
            ("local only", LOCAL, &["rs", "rsl"], &[], &[2], true),
            ("local only, none here", LOCAL, &["rs"], &[], &[], true),
            ("local only, none at all", LOCAL, &["", "l"], &[], &[], false),
            ("both", BOTH, &["rs", "rsl"], &[1, 2], &[2], true),
            ("all go away", CLUSTER, &["st", "t", "stl"], &[1, 3], &[], true),
            ("one is ready", CLUSTER, &["st", "rs"], &[2], &[], true),
            ("not ready, not going", CLUSTER, &["s", ""], &[], &[], false),
            ("here all go, elsewhere one is ready", BOTH, &["stl", "rs"], &[2], &[1], true),
            ("here one is ready, elsewhere all go", BOTH, &["rsl", "st"], &[1], &[1], true),
            ("here one goes and one is ready", LOCAL, &["stl", "rsl"], &[], &[2], true),
            ("all gone", BOTH, &["tl", "t"], &[], &[], false),
            ("published though going", CLUSTER, &["rst", "rs"], &[1, 2], &[], true),
        ] {
            let expected = (cluster.to_vec(), local.to_vec(), anywhere);
            assert_eq!(run(uses, Some("a"), endpoints), expected, "{what}");
        }
    }

    #[test]
    fn hints_narrow_down_only_where_all_ready_ones_have_them() {
        for (what, zone, endpoints, cluster) in [
            ("zone", Some("a"), &["rs za", "rs zb", "rs za"][..], &[1, 3][..]),
            ("a zone with none", Some("c"), &["rs za", "rs zb"], &[1, 2]),
            ("one without hints", Some("a"), &["rs za", "rs"], &[1, 2]),
            ("an unready one without hints", Some("a"), &["rs za", "s", "rs zb"], &[1]),
            ("a node without zone", None, &["rs za", "rs zb"], &[1, 2]),
            ("several zones", Some("b"), &["rs za zb", "rs za"], &[1]),
            ("node", Some("a"), &["rs nhere za", "rs nthere za"], &[1]),
            ("no endpoint for this node: zone", Some("a"), &["rs nx za", "rs ny zb"], &[1]),
            ("neither", Some("c"), &["rs nx za", "rs ny zb"], &[1, 2]),
            ("one without a node hint: zone", Some("a"), &["rs nhere za", "rs za", "rs nx zb"], &[1, 2]),
            ("only nodes hinted, none here", Some("a"), &["rs nx", "rs ny"], &[1, 2]),
            ("nearest unready: the zone has another", Some("a"), &["s za", "rs za", "rs zb"], &[2]),
            ("nearest all unready: everybody", Some("a"), &["s za", "rs zb"], &[2]),
            ("nothing ready: those that go, wherever", Some("a"), &["st za", "st zb"], &[1, 2]),
        ] {
            assert_eq!(run(CLUSTER, zone, endpoints).0, cluster, "{what}");
        }
        // Topology is no concern of Local.
        assert_eq!(run(BOTH, Some("a"), &["rsl zb", "rs za"]), (vec![2], vec![1], true));
    }
}
