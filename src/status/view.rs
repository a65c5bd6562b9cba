//! The view: snapshot, lanes' reports and counters put together. Pure: the clocks are arguments.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::handle::{LaneHandle, Live, NodeInfo};
use super::{meaning, pb};
use crate::datapath::{Counters, PeerTraffic, Total};
use crate::io::lane::{LaneOffloads, LaneReport};
use crate::packet::DropReason;
use crate::snapshot::{Encap, LaneId, Peer, PeerId, PublicKey, Snapshot};
use crate::state::problem::Problem;
use crate::state::run::StateReport;
use crate::tunnel::wireguard::{SessionReport, WireGuardStats};

/// A WireGuard session carries no data when its handshake is older (REJECT_AFTER_TIME, WireGuard paper
/// section 6.1); boringtun looks at its timers every 250 ms here, so allow a little more.
const SESSION_LIFE: Duration = Duration::from_secs(181);
/// A peer that we sent something to within this time is one that somebody wants to talk to.
const RECENT: Duration = Duration::from_secs(30);

/// What a view is made of.
#[derive(Debug)]
pub struct Parts<'a> {
    /// What never changes.
    pub info: &'a NodeInfo,
    /// What changes, and is not in the snapshot.
    pub live: &'a Live,
    /// The cluster.
    pub snapshot: &'a Snapshot,
    /// The lanes.
    pub lanes: &'a [LaneHandle],
    /// What each lane said, in the lanes' order; `None` for one that did not answer.
    pub reports: &'a [Option<LaneReport>],
    /// The monotonic clock.
    pub now: Instant,
    /// The wall clock.
    pub wall: SystemTime,
}

/// Puts the view together.
pub fn build(parts: &Parts<'_>) -> pb::NodeView {
    let Parts { info, live, snapshot, lanes, reports, now, wall } = *parts;
    let local = &snapshot.local;
    let addresses = [local.address_v4.map(|a| a.to_string()), local.address_v6.map(|a| a.to_string())];
    let all = || lanes.iter().map(|lane| &*lane.counters);
    pb::NodeView {
        node: info.name.clone(),
        version: info.version.clone(),
        pid: std::process::id(),
        collected_unix_ms: millis(wall.duration_since(UNIX_EPOCH).unwrap_or_default()),
        uptime_ms: millis(now.saturating_duration_since(info.started)),
        ready: live.not_ready.is_none(),
        not_ready_reason: live.not_ready.clone().unwrap_or_default(),
        tun: info.tun.clone(),
        pod_mtu: u32::from(live.pod_mtu),
        pod_ranges: live.pod_ranges.iter().map(ToString::to_string).collect(),
        generation: snapshot.generation,
        addresses: addresses.into_iter().flatten().collect(),
        settings: info
            .settings
            .iter()
            .map(|(name, value)| pb::Setting { name: name.clone(), value: value.clone() })
            .collect(),
        lanes: lanes.iter().enumerate().map(|(i, lane)| lane_view(lane, report_of(reports, i))).collect(),
        peers: peers(snapshot, reports, now),
        drops: drops(all),
        totals: totals(all),
        problems: live.problems.clone(),
        state: live.state.clone(),
        services_elsewhere: live.services_elsewhere.clone(),
        keys: live.keys.clone(),
        cni: live.cni.clone(),
        instance: info.instance.clone(),
    }
}

impl From<&Problem> for pb::Problem {
    fn from(problem: &Problem) -> pb::Problem {
        let Problem { kind, subject, field, reason } = problem;
        pb::Problem {
            kind: kind.name().to_owned(),
            subject: subject.clone(),
            field: field.clone(),
            reason: reason.clone(),
        }
    }
}

impl From<&StateReport> for pb::StateView {
    fn from(report: &StateReport) -> pb::StateView {
        pb::StateView {
            listed: report.listed,
            saved_unix_ms: report.from_checkpoint.map(|seconds| seconds.saturating_mul(1000)),
            nodes: u32::try_from(report.nodes).unwrap_or(u32::MAX),
            problem_totals: report
                .problems_seen
                .iter()
                .map(|(kind, seen)| count(kind.name(), *seen))
                .collect(),
            cluster_ranges: report.cluster_ranges.iter().map(ToString::to_string).collect(),
            cluster_ranges_guessed: report.cluster_ranges_guessed,
            services: u32::try_from(report.services).unwrap_or(u32::MAX),
            endpoints: u32::try_from(report.endpoints).unwrap_or(u32::MAX),
        }
    }
}

/// A public key in WireGuard's text form.
pub fn key_text(key: &PublicKey) -> String {
    STANDARD.encode(key)
}

/// What lane `index` said; a list that is too short counts as no answer.
fn report_of(reports: &[Option<LaneReport>], index: usize) -> Option<&LaneReport> {
    reports.get(index).and_then(Option::as_ref)
}

// --- lanes ---------------------------------------------------------------------------------------

fn lane_view(lane: &LaneHandle, report: Option<&LaneReport>) -> pb::LaneView {
    let counters = &*lane.counters;
    let mut totals: Vec<pb::Count> =
        Total::ALL.iter().map(|total| count(total.name(), counters.total(*total))).collect();
    let mut view = pb::LaneView {
        id: u32::from(lane.id.0),
        public_key: key_text(&lane.public_key),
        port: u32::from(lane.port),
        answered: report.is_some(),
        drops: DropReason::ALL
            .iter()
            .map(|reason| count(reason.name(), counters.dropped(*reason)))
            .filter(|c| c.value > 0)
            .collect(),
        ..pb::LaneView::default()
    };
    if let Some(report) = report {
        view.public_key = key_text(&report.public_key);
        view.sessions = report.sessions.len() as u32;
        view.sessions_established = report.sessions.iter().filter(|s| is_live(s)).count() as u32;
        view.rx_bytes = report.traffic.iter().map(|t| t.bytes_received).sum();
        view.tx_bytes = report.traffic.iter().map(|t| t.bytes_sent).sum();
        view.offloads = offloads(&lane.offloads, &report.offloads);
        totals.extend(wireguard_totals(&report.wireguard));
    }
    view.totals = totals;
    view
}

fn offloads(started: &LaneOffloads, now: &LaneOffloads) -> Vec<pb::Offload> {
    // Taken apart, so that a new offload cannot be forgotten here.
    let LaneOffloads { tun_tcp, tun_udp, udp_segmentation, udp_receive, joining, ack_joining } = *now;
    [
        ("tun-tcp", started.tun_tcp, tun_tcp),
        ("tun-udp", started.tun_udp, tun_udp),
        ("joining", started.joining, joining),
        ("udp-segmentation", started.udp_segmentation, udp_segmentation),
        ("udp-receive", started.udp_receive, udp_receive),
        ("ack-joining", started.ack_joining, ack_joining),
    ]
    .into_iter()
    .map(|(name, at_start, in_use)| {
        let state = match (at_start, in_use) {
            (_, true) => "on",
            (true, false) => "fallen-back",
            (false, false) => "off",
        };
        pb::Offload { name: name.to_owned(), state: state.to_owned() }
    })
    .collect()
}

fn wireguard_totals(stats: &WireGuardStats) -> Vec<pb::Count> {
    // Those that waited in vain are counted as drops ("awaiting-session"): the lane takes them from here.
    let WireGuardStats {
        initiations_sent,
        initiations_answered,
        handshakes_completed,
        roamed,
        old_timestamps,
        queued,
        queue_dropped: _,
    } = *stats;
    vec![
        count("wireguard-initiations-sent", initiations_sent),
        count("wireguard-initiations-answered", initiations_answered),
        count("wireguard-handshakes-completed", handshakes_completed),
        count("wireguard-roamed", roamed),
        count("wireguard-old-timestamps", old_timestamps),
        count("wireguard-queued", queued),
    ]
}

fn count(name: &str, value: u64) -> pb::Count {
    pb::Count { name: name.to_owned(), value }
}

fn drops<'a, I: Iterator<Item = &'a Counters>>(all: impl Fn() -> I) -> Vec<pb::Drop> {
    let mut drops: Vec<pb::Drop> = DropReason::ALL
        .iter()
        .map(|reason| pb::Drop {
            name: reason.name().to_owned(),
            count: all().map(|c| c.dropped(*reason)).fold(0, u64::wrapping_add),
            meaning: meaning::of_drop(*reason).to_owned(),
        })
        .filter(|drop| drop.count > 0)
        .collect();
    drops.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.name.cmp(&b.name)));
    drops
}

fn totals<'a, I: Iterator<Item = &'a Counters>>(all: impl Fn() -> I) -> Vec<pb::Count> {
    Total::ALL
        .iter()
        .map(|total| count(total.name(), all().map(|c| c.total(*total)).fold(0, u64::wrapping_add)))
        .collect()
}

// --- peers ---------------------------------------------------------------------------------------

/// A session and the lane of ours that holds it.
type Held<'a> = (usize, &'a SessionReport);

fn peers(snapshot: &Snapshot, reports: &[Option<LaneReport>], now: Instant) -> Vec<pb::PeerView> {
    let mut held: HashMap<PeerId, Vec<Held<'_>>> = HashMap::new();
    for (lane, report) in reports.iter().enumerate() {
        for session in report.iter().flat_map(|r| &r.sessions) {
            held.entry(session.peer).or_default().push((lane, session));
        }
    }
    let mut peers: Vec<pb::PeerView> = snapshot
        .mesh
        .peers
        .iter()
        .flatten()
        .map(|peer| {
            let sessions = held.get(&peer.id).map_or(&[][..], Vec::as_slice);
            peer_view(peer, sessions, &traffic_with(peer.id, reports), now)
        })
        .collect();
    peers.sort_by(|a, b| a.name.cmp(&b.name));
    peers
}

fn traffic_with(peer: PeerId, reports: &[Option<LaneReport>]) -> PeerTraffic {
    let mut sum = PeerTraffic::default();
    for traffic in reports.iter().flatten().filter_map(|r| r.traffic.get(peer.0 as usize)) {
        sum.packets_sent += traffic.packets_sent;
        sum.bytes_sent += traffic.bytes_sent;
        sum.packets_received += traffic.packets_received;
        sum.bytes_received += traffic.bytes_received;
        sum.last_received = sum.last_received.max(traffic.last_received);
        sum.last_sent = sum.last_sent.max(traffic.last_sent);
    }
    sum
}

fn peer_view(peer: &Peer, sessions: &[Held<'_>], traffic: &PeerTraffic, now: Instant) -> pb::PeerView {
    let age = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at));
    let (received, sent) = (age(traffic.last_received), age(traffic.last_sent));
    let handshake = sessions.iter().filter_map(|(_, s)| s.handshake_age).min();
    let endpoint = match peer.encap {
        Some(Encap::WireGuard) => wireguard_endpoint(peer, sessions),
        Some(Encap::Vxlan) => peer.vxlan.as_ref().map(|v| SocketAddr::new(v.address, v.port).to_string()),
        None => None,
    }
    .unwrap_or_default();
    let (state, why) = peer_state(peer, sessions, received, sent, &endpoint);
    let bypassed = bypassed(peer, state, &endpoint);
    pb::PeerView {
        id: peer.id.0,
        name: peer.name.clone(),
        state: state.to_owned(),
        why,
        encap: peer.encap.map_or("", Encap::name).to_owned(),
        public_key: peer.lanes.first().map(|lane| key_text(&lane.key)).unwrap_or_default(),
        endpoint,
        candidates: peer.endpoints.iter().map(ToString::to_string).collect(),
        pod_ranges: peer.pod_ranges.iter().map(ToString::to_string).collect(),
        addresses: peer.addresses.iter().map(ToString::to_string).collect(),
        mtu: u32::from(peer.mtu),
        keepalive: u32::from(peer.keepalive),
        lanes: peer.lanes.len() as u32,
        sessions: sessions.len() as u32,
        sessions_established: sessions.iter().filter(|(_, s)| is_live(s)).count() as u32,
        handshake_age_ms: handshake.map(millis),
        rx_bytes: traffic.bytes_received,
        tx_bytes: traffic.bytes_sent,
        rx_packets: traffic.packets_received,
        tx_packets: traffic.packets_sent,
        last_received_age_ms: received.map(millis),
        last_sent_age_ms: sent.map(millis),
        bypassed,
    }
}

/// The addresses of the peer's Node, if the tunnel stands and goes to none of them.
fn bypassed(peer: &Peer, state: &str, endpoint: &str) -> Vec<String> {
    let Ok(endpoint) = endpoint.parse::<SocketAddr>() else { return Vec::new() };
    // Those on its tunnel device are inside the tunnel.
    let inside = |ip: &&IpAddr| peer.pod_ranges.iter().any(|range| range.network() == **ip);
    let outside: Vec<&IpAddr> = peer.addresses.iter().filter(|ip| !inside(ip)).collect();
    match state == "up" && !outside.contains(&&endpoint.ip().to_canonical()) {
        true => outside.into_iter().map(ToString::to_string).collect(),
        false => Vec::new(),
    }
}

/// Where our lane 0 sends to; before it has a session, the best that was announced.
fn wireguard_endpoint(peer: &Peer, sessions: &[Held<'_>]) -> Option<String> {
    let in_use = sessions
        .iter()
        .filter(|(lane, s)| *lane == 0 && s.lane == LaneId(0))
        // The session in use, rather than a candidate that proved nothing yet.
        .min_by_key(|(_, s)| (!s.established, s.handshake_age.unwrap_or(Duration::MAX)))
        .and_then(|(_, s)| s.endpoint);
    in_use.or_else(|| peer.endpoints.first().copied()).map(|at| at.to_string())
}

fn is_live(session: &SessionReport) -> bool {
    session.established && session.handshake_age.is_some_and(|age| age < SESSION_LIFE)
}

/// The peer's state and, where a person should look at it, why.
fn peer_state(
    peer: &Peer,
    sessions: &[Held<'_>],
    received: Option<Duration>,
    sent: Option<Duration>,
    endpoint: &str,
) -> (&'static str, String) {
    let wanted = sent.is_some_and(|age| age < RECENT);
    let Some(encap) = peer.encap else {
        return ("unusable", "no common encapsulation: compare --encap here and there".to_owned());
    };
    match encap {
        Encap::WireGuard if peer.lanes.is_empty() => {
            let reason = format!(
                "has announced no WireGuard key: is its agent running, and has its {}.warren.yaml arrived in this \
                 node's folder?",
                peer.name
            );
            ("unusable", reason)
        }
        Encap::WireGuard if endpoint.is_empty() => {
            ("unusable", "has announced no endpoint and has not called us".to_owned())
        }
        Encap::WireGuard if sessions.iter().any(|(_, s)| is_live(s)) => ("up", String::new()),
        Encap::WireGuard if sessions.iter().any(|(_, s)| !s.established) => {
            let mut reason = format!("handshakes to {endpoint} have no answer: does UDP get there and back?");
            let ip = endpoint.parse().map(|endpoint: SocketAddr| endpoint.ip());
            if ip.is_ok_and(|ip| peer.addresses.contains(&ip)) {
                reason += " That is its Node's own address; if it is not routable from here, give its agent --endpoint \
                           or --keepalive 25";
            }
            ("connecting", reason)
        }
        Encap::WireGuard if wanted && !sessions.is_empty() => {
            ("silent", format!("it stopped answering handshakes at {endpoint}"))
        }
        Encap::WireGuard => ("idle", String::new()),
        Encap::Vxlan if peer.vxlan.is_none() => {
            ("unusable", "has no address that VXLAN could be sent to".to_owned())
        }
        Encap::Vxlan if received.is_some_and(|age| age < SESSION_LIFE) => ("up", String::new()),
        Encap::Vxlan if wanted => {
            ("silent", format!("packets go to {endpoint}, none come back: does UDP get there and back?"))
        }
        Encap::Vxlan => ("idle", String::new()),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::snapshot::Mesh;
    use crate::status::fake;

    #[test]
    fn lanes_are_summed_and_lane_0_says_where_packets_go() {
        let view = fake::view();
        let b = &view.peers[0];
        assert_eq!((b.name.as_str(), b.state.as_str(), b.why.as_str()), ("node-b", "up", ""));
        assert_eq!((b.rx_bytes, b.tx_bytes, b.rx_packets, b.tx_packets), (1024, 2 << 20, 3, 4));
        assert_eq!((b.sessions, b.sessions_established, b.lanes), (2, 2, 2));
        assert_eq!((b.endpoint.as_str(), b.handshake_age_ms), ("192.0.2.2:51820", Some(31_000)));
        assert_eq!((b.last_received_age_ms, b.last_sent_age_ms), (Some(2000), Some(0)));
        assert_eq!(view.collected_unix_ms, fake::WALL_MS);
        assert_eq!(
            view.drops.iter().map(|d| (d.name.as_str(), d.count)).collect::<Vec<_>>(),
            [("no-route", 5), ("hop-limit", 2)]
        );
        assert_eq!(
            view.lanes[0].totals.iter().find(|c| c.name == "wireguard-initiations-sent").unwrap().value,
            4
        );
    }

    #[test]
    fn a_roamed_endpoint_is_shown_and_an_unproven_candidate_is_not() {
        let peer = fake::peer(0, "b");
        let used = fake::session(0, 0, [2; 32], "203.0.113.9:40000");
        let candidate = SessionReport {
            established: false,
            handshake_age: None,
            ..fake::session(0, 0, [2; 32], "203.0.113.66:6666")
        };
        let other_lane = fake::session(0, 1, [102; 32], "203.0.113.9:40001");
        let held = [(0, &candidate), (1, &other_lane), (0, &used)];
        assert_eq!(wireguard_endpoint(&peer, &held).as_deref(), Some("203.0.113.9:40000"));
        assert_eq!(wireguard_endpoint(&peer, &[(1, &other_lane)]).as_deref(), Some("192.0.2.2:51820"));
    }

    #[test]
    fn every_state_has_its_reason() {
        let s = |secs| Some(Duration::from_secs(secs));
        let peer = fake::peer(0, "b");
        let up = fake::session(0, 0, [2; 32], "192.0.2.2:1");
        let old = SessionReport { handshake_age: s(200), ..up.clone() };
        let unanswered = SessionReport { established: false, handshake_age: None, ..up.clone() };
        let wg = |sessions: &[&SessionReport], sent| {
            let held: Vec<Held<'_>> = sessions.iter().map(|s| (0, *s)).collect();
            peer_state(&peer, &held, None, sent, "192.0.2.2:1").0
        };
        assert_eq!(wg(&[], None), "idle");
        assert_eq!(wg(&[&up], None), "up");
        assert_eq!(wg(&[&unanswered, &up], s(0)), "up");
        assert_eq!(wg(&[&unanswered], s(0)), "connecting");
        assert_eq!(wg(&[&old], s(100)), "idle");
        assert_eq!(wg(&[&old], s(1)), "silent");

        let vxlan = Peer {
            encap: Some(Encap::Vxlan),
            vxlan: fake::snapshot().mesh.peers[1].as_ref().unwrap().vxlan.clone(),
            ..peer.clone()
        };
        let state = |peer: &Peer, received, sent| peer_state(peer, &[], received, sent, "192.0.2.2:8472");
        assert_eq!(state(&vxlan, s(5), s(1)).0, "up");
        assert_eq!(state(&vxlan, None, s(1)).0, "silent");
        assert_eq!(state(&vxlan, None, None).0, "idle");

        let hopeless = [
            Peer { encap: None, ..peer.clone() },
            Peer { lanes: Vec::new(), ..peer.clone() },
            Peer { vxlan: None, ..vxlan },
        ];
        for peer in &hopeless {
            let (state, why) = state(peer, s(1), s(1));
            assert!(state == "unusable" && !why.is_empty(), "{state}");
        }
        assert_eq!(peer_state(&peer, &[], None, None, "").0, "unusable");
    }

    #[test]
    fn a_node_whose_own_address_is_not_where_the_tunnel_goes_is_named() {
        let peer = fake::peer(0, "b");
        let at = |state, endpoint| bypassed(&peer, state, endpoint);
        assert_eq!(at("up", "192.0.2.2:51820"), [""; 0]);
        assert_eq!(at("up", "203.0.113.9:40000"), ["192.0.2.2"]);
        assert_eq!(at("up", "[2001:db8::9]:40000"), ["192.0.2.2"]);
        assert_eq!(at("connecting", "203.0.113.9:40000"), [""; 0]);
        assert_eq!(at("idle", ""), [""; 0]);
        let unknown = Peer { addresses: vec!["10.244.2.0".parse().unwrap()], ..peer };
        assert_eq!(bypassed(&unknown, "up", "203.0.113.9:1"), [""; 0]);
    }

    #[test]
    fn reports_older_than_the_snapshot_do_no_harm() {
        let mut snapshot = fake::snapshot();
        let now = crate::io::clock::now() + Duration::from_secs(10_000);
        let reports: Vec<_> = fake::reports(now).into_iter().map(Some).collect();
        // Sessions and traffic of peers that are gone, and a new peer that no report knows.
        let peers = vec![None, None, None, None, Some(Arc::new(fake::peer(4, "node-e")))];
        snapshot.mesh = Arc::new(Mesh { peers, ..Mesh::default() });
        let peers = super::peers(&snapshot, &reports, now);
        assert_eq!(
            peers.iter().map(|p| (p.name.as_str(), p.state.as_str())).collect::<Vec<_>>(),
            [("node-e", "idle")]
        );
    }
}
