//! What `warren status` and `warren peers` print: plain text that a tired person can act on.
//!
//! Everything that came from elsewhere goes through [`clean`], so that no name can write to a terminal.

use std::fmt::Write as _;

use super::pb;

/// Cluster ranges that `warren status` lists; the others are counted.
const RANGES_IN_STATUS: usize = 4;
/// Peers that `warren status` lists; those that need attention first, the others are counted.
const PEERS_IN_STATUS: usize = 20;
/// Nodes that one line names.
const NODES_NAMED: usize = 3;

/// The node at a glance.
pub fn status(view: &pb::NodeView) -> String {
    let mut out = String::new();
    head(&mut out, view);
    problems(&mut out, view);
    lanes(&mut out, view);
    peers_at_a_glance(&mut out, view);
    drops(&mut out, view);
    out
}

/// The keys of this node's lanes.
pub fn keys(view: &pb::NodeView) -> String {
    let mut out = String::new();
    for lane in &view.lanes {
        let _ = writeln!(out, "lane {}  {}  port {}", lane.id, clean(&lane.public_key), lane.port);
    }
    match view.keys.as_str() {
        "" => {}
        stands => {
            let _ = writeln!(out, "{}", clean(stands));
        }
    }
    out
}

/// The peers, one a line.
pub fn peers(answer: &pb::PeersResponse) -> String {
    let mut out = String::new();
    if answer.peers.is_empty() {
        let _ = writeln!(out, "{} knows no peer.", clean(&answer.node));
    } else {
        peer_table(&mut out, "", answer.peers.iter());
    }
    silent_lanes(&mut out, &answer.silent_lanes);
    out
}

/// The peers, everything that is known of each.
pub fn peers_verbose(answer: &pb::PeersResponse) -> String {
    let mut out = String::new();
    for peer in &answer.peers {
        peer_in_full(&mut out, peer);
    }
    if answer.peers.is_empty() {
        let _ = writeln!(out, "{} knows no peer.", clean(&answer.node));
    }
    silent_lanes(&mut out, &answer.silent_lanes);
    out
}

/// Text from elsewhere made fit for a terminal: control and invisible formatting characters escaped.
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // U+200B..F, U+2028..E, U+2066..9: line breaks and direction changes that Unicode calls formatting.
        let invisible =
            matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || invisible {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

/// A span as people say it: the two largest units.
pub fn span(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => "now".to_owned(),
        1..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// Bytes in powers of 1024, three digits at least.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {}", UNITS[unit])
}

// --- parts of `warren status` --------------------------------------------------------------------

fn head(out: &mut String, view: &pb::NodeView) {
    let ready =
        if view.ready { "ready".to_owned() } else { format!("NOT READY: {}", clean(&view.not_ready_reason)) };
    let _ = writeln!(out, "{}: {ready}", clean(&view.node));
    let mtu = view.pod_mtu;
    let pods = match view.pod_ranges.join(" ") {
        ranges if ranges.is_empty() => format!("MTU {mtu}"),
        ranges => format!("{}, MTU {mtu}", clean(&ranges)),
    };
    let mut rows = vec![
        vec![
            "agent".to_owned(),
            format!("warren {}, up {}, pid {}", clean(&view.version), span(view.uptime_ms), view.pid),
        ],
        vec!["tunnel".to_owned(), format!("{} {}", clean(&view.tun), clean(&view.addresses.join(" ")))],
        vec!["pods".to_owned(), pods],
        vec!["peers".to_owned(), peer_summary(&view.peers)],
        vec!["offloads".to_owned(), offload_summary(&view.lanes)],
    ];
    if !view.cni.is_empty() {
        rows.push(vec!["cni".to_owned(), format!("NO PODS YET: {}", clean(&view.cni))]);
    }
    rows.extend(bypassed(&view.peers).map(|text| vec!["bypassed".to_owned(), text]));
    if let Some(state) = &view.state {
        rows.push(vec!["state".to_owned(), state_summary(view, state)]);
        rows.push(vec!["cluster".to_owned(), cluster_summary(state)]);
        rows.push(vec!["services".to_owned(), service_summary(view, state)]);
        if !view.keys.is_empty() {
            rows.push(vec!["keys".to_owned(), clean(&view.keys)]);
        }
        rows.push(vec!["problems".to_owned(), problem_summary(view.problems.len(), state)]);
    }
    if !view.settings.is_empty() {
        let settings: Vec<String> =
            view.settings.iter().map(|s| format!("{}={}", clean(&s.name), clean(&s.value))).collect();
        rows.push(vec!["settings".to_owned(), settings.join(" ")]);
    }
    table(out, "  ", &rows);
}

fn peer_summary(peers: &[pb::PeerView]) -> String {
    if peers.is_empty() {
        return "none known".to_owned();
    }
    let parts: Vec<String> = ["up", "idle", "connecting", "silent", "unusable"]
        .iter()
        .map(|state| (peers.iter().filter(|p| p.state == **state).count(), state))
        .filter(|(count, _)| *count > 0)
        .map(|(count, state)| format!("{count} {state}"))
        .collect();
    format!("{} known: {}", peers.len(), parts.join(", "))
}

/// Nodes whose own addresses may not be reachable from here, though their pods are.
fn bypassed(peers: &[pb::PeerView]) -> Option<String> {
    let mut named = peers.iter().filter(|peer| !peer.bypassed.is_empty());
    let mut text = String::new();
    for peer in named.by_ref().take(NODES_NAMED) {
        let (name, own) = (clean(&peer.name), clean(&peer.bypassed.join(" ")));
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{name} ({own}, reached at {})", clean(&peer.endpoint));
    }
    match named.count() {
        0 => {}
        more => {
            let _ = write!(text, " and {more} more");
        }
    }
    let what = "the tunnel goes to none of the Node's own addresses, so this node may have no way to those: what is \
                sent to them (the kubelet, another node's node ports) is not carried inside the tunnel";
    (!text.is_empty()).then(|| format!("{text}: {what}"))
}

/// How many nodes are known, and on whose word.
fn state_summary(view: &pb::NodeView, state: &pb::StateView) -> String {
    let nodes = format!("{} node{}", state.nodes, if state.nodes == 1 { "" } else { "s" });
    let word = match (state.saved_unix_ms, state.listed) {
        (Some(saved), _) => {
            let age = ago(view.collected_unix_ms.saturating_sub(saved));
            format!("AS SAVED {age}: the source has not given a complete list with a pod range of this node")
        }
        (None, false) => "so far: the source has not given a complete list".to_owned(),
        (None, true) => return format!("{nodes}, generation {}", view.generation),
    };
    format!("{nodes}, generation {}, {word}", view.generation)
}

fn service_summary(view: &pb::NodeView, state: &pb::StateView) -> String {
    match view.services_elsewhere.as_str() {
        "" => format!("{}, {} endpoints", state.services, state.endpoints),
        why => clean(why),
    }
}

fn cluster_summary(state: &pb::StateView) -> String {
    let mut ranges =
        state.cluster_ranges.iter().take(RANGES_IN_STATUS).map(|range| clean(range)).collect::<Vec<_>>();
    if ranges.is_empty() {
        return "no pod range known".to_owned();
    }
    let more = state.cluster_ranges.len() - ranges.len();
    if more > 0 {
        ranges.push(format!("and {more} more"));
    }
    let guessed = match state.cluster_ranges_guessed {
        true => {
            ", GUESSED from the nodes seen so far; to pods of nodes that are not known yet packets leave outside \
             the tunnel: set --cluster-cidr"
        }
        false => "",
    };
    format!("{}{guessed}", ranges.join(" "))
}

/// "2 now, 9 since the start: 7 file, 2 annotation".
fn problem_summary(now: usize, state: &pb::StateView) -> String {
    let seen: Vec<&pb::Count> = state.problem_totals.iter().filter(|total| total.value > 0).collect();
    let sum = seen.iter().fold(0_u64, |sum, total| sum.wrapping_add(total.value));
    let kinds: Vec<String> =
        seen.iter().map(|total| format!("{} {}", total.value, clean(&total.name))).collect();
    match (now, sum) {
        (0, 0) => "none".to_owned(),
        (now, 0) => format!("{now} now"),
        (0, sum) => format!("none now, {sum} since the start: {}", kinds.join(", ")),
        (now, sum) => format!("{now} now, {sum} since the start: {}", kinds.join(", ")),
    }
}

/// "all on", or only what is not, with the lanes it is about.
fn offload_summary(lanes: &[pb::LaneView]) -> String {
    let mut exceptions: Vec<(String, Vec<u32>)> = Vec::new();
    let mut known = false;
    for lane in lanes {
        for offload in &lane.offloads {
            known = true;
            let what = match offload.state.as_str() {
                "on" => continue,
                "fallen-back" => format!("{} given up (the kernel refused it)", clean(&offload.name)),
                state => format!("{} {}", clean(&offload.name), clean(state)),
            };
            match exceptions.iter_mut().find(|(known, _)| *known == what) {
                Some((_, ids)) => ids.push(lane.id),
                None => exceptions.push((what, vec![lane.id])),
            }
        }
    }
    if exceptions.is_empty() {
        return if known { "all on" } else { "unknown: no lane answers" }.to_owned();
    }
    let answered = lanes.iter().filter(|lane| lane.answered).count();
    let parts: Vec<String> = exceptions
        .into_iter()
        .map(
            |(what, ids)| if ids.len() == answered { what } else { format!("{what} on {}", lane_list(&ids)) },
        )
        .collect();
    format!("all on, but: {}", parts.join("; "))
}

fn problems(out: &mut String, view: &pb::NodeView) {
    let silent: Vec<u32> = view.lanes.iter().filter(|lane| !lane.answered).map(|lane| lane.id).collect();
    if view.problems.is_empty() && silent.is_empty() {
        return;
    }
    let _ = writeln!(out, "\nPROBLEMS");
    silent_lanes(out, &silent);
    for problem in &view.problems {
        let _ = write!(out, "  {}", clean(&problem.subject));
        if !problem.field.is_empty() {
            let _ = write!(out, ", {}", clean(&problem.field));
        }
        let _ = writeln!(out, " ({}): {}", clean(&problem.kind), clean(&problem.reason));
    }
}

fn silent_lanes(out: &mut String, lanes: &[u32]) {
    if !lanes.is_empty() {
        let _ = writeln!(
            out,
            "  {} did not answer within 1 s, its figures are missing. Overloaded, or stuck? See the agent's log.",
            lane_list(lanes)
        );
    }
}

fn lane_list(lanes: &[u32]) -> String {
    let ids: Vec<String> = lanes.iter().map(u32::to_string).collect();
    format!("lane{} {}", if lanes.len() == 1 { "" } else { "s" }, ids.join(", "))
}

fn lanes(out: &mut String, view: &pb::NodeView) {
    let mut rows = vec![row(["LANE", "PORT", "STATE", "SESSIONS", "RECEIVED", "SENT", "DROPPED"])];
    for lane in &view.lanes {
        let dropped: u64 = lane.drops.iter().map(|d| d.value).fold(0, u64::wrapping_add);
        let known = |text: String| if lane.answered { text } else { "?".to_owned() };
        rows.push(vec![
            lane.id.to_string(),
            lane.port.to_string(),
            if lane.answered { "ok" } else { "no answer" }.to_owned(),
            known(format!("{} of {}", lane.sessions_established, lane.sessions)),
            known(bytes(lane.rx_bytes)),
            known(bytes(lane.tx_bytes)),
            dropped.to_string(),
        ]);
    }
    out.push('\n');
    table(out, "", &rows);
}

/// How much a state needs a person; the most urgent first.
fn urgency(state: &str) -> u8 {
    match state {
        "silent" => 0,
        "connecting" => 1,
        "unusable" => 2,
        "up" => 4,
        "idle" => 5,
        _ => 3, // of a newer agent: better seen than hidden
    }
}

fn peers_at_a_glance(out: &mut String, view: &pb::NodeView) {
    if view.peers.is_empty() {
        return;
    }
    let mut sorted: Vec<&pb::PeerView> = view.peers.iter().collect();
    sorted.sort_by_key(|peer| urgency(&peer.state)); // stable: by name within a state
    out.push('\n');
    peer_table(out, "", sorted.iter().take(PEERS_IN_STATUS).copied());
    if sorted.len() > PEERS_IN_STATUS {
        let _ = writeln!(out, "... and {} more: `warren peers` lists all.", sorted.len() - PEERS_IN_STATUS);
    }
}

fn drops(out: &mut String, view: &pb::NodeView) {
    if view.drops.is_empty() {
        let _ = writeln!(out, "\nNo packet was dropped since the agent started.");
        return;
    }
    let mut rows = vec![row(["DROPPED", "REASON", "MEANING"])];
    for drop in &view.drops {
        rows.push(vec![drop.count.to_string(), clean(&drop.name), clean(&drop.meaning)]);
    }
    out.push('\n');
    table(out, "", &rows);
}

// --- peers ---------------------------------------------------------------------------------------

fn peer_table<'a>(out: &mut String, indent: &str, peers: impl Iterator<Item = &'a pb::PeerView>) {
    let mut rows = vec![row(["PEER", "STATE", "ENCAP", "ENDPOINT", "MTU", "HANDSHAKE", "RECEIVED", "SENT"])];
    let mut whys = Vec::new();
    for peer in peers {
        rows.push(vec![
            clean(&peer.name),
            clean(&peer.state),
            or_dash(&peer.encap),
            or_dash(&peer.endpoint),
            peer.mtu.to_string(),
            peer.handshake_age_ms.map_or_else(|| "-".to_owned(), ago),
            bytes(peer.rx_bytes),
            bytes(peer.tx_bytes),
        ]);
        if !peer.why.is_empty() {
            whys.push(format!("{indent}  {}: {}\n", clean(&peer.name), clean(&peer.why)));
        }
    }
    table(out, indent, &rows);
    out.extend(whys);
}

fn peer_in_full(out: &mut String, peer: &pb::PeerView) {
    let why = if peer.why.is_empty() { String::new() } else { format!(": {}", clean(&peer.why)) };
    let _ = writeln!(out, "{}: {}{why}", clean(&peer.name), clean(&peer.state));
    let traffic = |packets: u64, count: u64, age: Option<u64>| {
        let last = age.map_or_else(|| "never".to_owned(), |age| format!("last {}", ago(age)));
        format!("{}, {packets} packets, {last}", bytes(count))
    };
    let keepalive = match peer.keepalive {
        0 => "none".to_owned(),
        s => format!("every {s} s"),
    };
    let rows: Vec<Vec<String>> = [
        ("encapsulation", or_dash(&peer.encap)),
        ("endpoint", or_dash(&peer.endpoint)),
        ("announced", or_dash(&peer.candidates.join(" "))),
        ("key of lane 0", or_dash(&peer.public_key)),
        ("lanes", peer.lanes.to_string()),
        ("sessions", format!("{} of {} carry data", peer.sessions_established, peer.sessions)),
        ("last handshake", peer.handshake_age_ms.map_or_else(|| "none".to_owned(), ago)),
        ("keepalive", keepalive),
        ("MTU", peer.mtu.to_string()),
        ("pod ranges", or_dash(&peer.pod_ranges.join(" "))),
        ("addresses", or_dash(&peer.addresses.join(" "))),
        ("received", traffic(peer.rx_packets, peer.rx_bytes, peer.last_received_age_ms)),
        ("sent", traffic(peer.tx_packets, peer.tx_bytes, peer.last_sent_age_ms)),
    ]
    .into_iter()
    .map(|(name, value)| vec![name.to_owned(), value])
    .collect();
    table(out, "  ", &rows);
}

fn ago(ms: u64) -> String {
    if ms < 1000 { "now".to_owned() } else { format!("{} ago", span(ms)) }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { clean(text) }
}

// --- tables --------------------------------------------------------------------------------------

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.iter().map(|&cell| cell.to_owned()).collect()
}

/// Columns as wide as their widest cell, two blanks apart; nothing trails.
fn table(out: &mut String, indent: &str, rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (i, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(i) {
                Some(known) => *known = (*known).max(width),
                None => widths.push(width),
            }
        }
    }
    for row in rows {
        out.push_str(indent);
        for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
            if i + 1 == row.len() {
                out.push_str(cell);
            } else {
                let _ = write!(out, "{cell:<width$}  ");
            }
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::run::StateReport;
    use crate::status::fake;

    #[test]
    fn a_healthy_node_fits_on_a_screen() {
        let expected = "\
node-a: ready
  agent     warren 0.1.0, up 2 h 3 min, pid 4711
  tunnel    warren0 10.244.1.0 fd00:1::
  pods      10.244.1.0/24 fd00:1::/64, MTU 1420
  peers     3 known: 1 up, 1 idle, 1 connecting
  offloads  all on, but: tun-udp off; udp-segmentation given up (the kernel refused it) on lane 1
  state     4 nodes, generation 9
  cluster   10.244.0.0/16
  services  7, 40 endpoints
  problems  none now, 4 since the start: 3 file, 1 annotation
  settings  encap=auto port=51820

LANE  PORT   STATE  SESSIONS  RECEIVED  SENT      DROPPED
0     51820  ok     1 of 2    1.00 KiB  2.00 MiB  7
1     51821  ok     1 of 1    1 B       1 B       0

PEER    STATE       ENCAP      ENDPOINT           MTU   HANDSHAKE  RECEIVED  SENT
node-d  connecting  wireguard  [2001:db8::4]:7    1400  -          0 B       300 B
node-b  up          wireguard  192.0.2.2:51820    1420  31 s ago   1.00 KiB  2.00 MiB
node-c  idle        vxlan      198.51.100.3:8472  1450  -          1 B       2 B
\x20\x20node-d: handshakes to [2001:db8::4]:7 have no answer: does UDP get there and back?

DROPPED  REASON     MEANING
5        no-route   in the cluster's ranges, but no node owns the address: a pod or node that is gone?
2        hop-limit  hop limit ran out between two tunnels; elsewhere the kernel counts it
";
        let got = status(&fake::view());
        assert_eq!(got, expected, "\n{got}");
    }

    #[test]
    fn what_keeps_pods_away_and_what_the_tunnel_does_not_carry_is_said() {
        let mut view = fake::view();
        view.cni = "CNI plugins are missing in /opt/cni/bin: bridge".to_owned();
        for peer in &mut view.peers {
            peer.bypassed = vec!["10.0.0.5".to_owned()];
        }
        view.peers.extend(vec![view.peers[0].clone(); 2]);
        let got = status(&view);
        assert!(got.contains("  cni       NO PODS YET: CNI plugins are missing"), "{got}");
        assert!(
            got.contains("bypassed  node-b (10.0.0.5, reached at 192.0.2.2:51820), node-c (10.0.0.5,"),
            "{got}"
        );
        assert!(got.contains(" and 2 more: the tunnel goes to none"), "{got}");
    }

    #[test]
    fn what_is_wrong_comes_first_and_with_its_reason() {
        let mut view = fake::view();
        view.ready = false;
        view.not_ready_reason = "no pod range yet".to_owned();
        view.lanes[1].answered = false;
        view.problems.push(pb::Problem {
            kind: "annotation".to_owned(),
            subject: "Node/b".to_owned(),
            field: "warren.dev/lanes".to_owned(),
            reason: "key 2 has 31 bytes".to_owned(),
        });
        let got = status(&view);
        assert!(got.starts_with("node-a: NOT READY: no pod range yet\n"), "{got}");
        let lane = got.find("lane 1 did not answer within 1 s").expect(&got);
        let problem = got.find("Node/b, warren.dev/lanes (annotation): key 2 has 31 bytes").expect(&got);
        assert!(lane < problem && problem < got.find("LANE").expect(&got), "{got}");
        assert!(got.contains("1     51821  no answer  ?"), "{got}");
    }

    #[test]
    fn on_whose_word_the_state_is_and_what_is_only_guessed_is_said() {
        let row = |report: &StateReport, name: &str| {
            let view = pb::NodeView { state: Some(report.into()), ..fake::view() };
            let text = status(&view);
            text.lines().find_map(|line| line.trim().strip_prefix(name)).unwrap().trim().to_owned()
        };
        let saved = Some(fake::WALL_MS / 1000 - 7200);
        let mut report = StateReport { from_checkpoint: saved, ..fake::state() };
        assert!(
            row(&report, "state").starts_with("4 nodes, generation 9, AS SAVED 2 h 0 min ago: the source")
        );
        report = StateReport { listed: false, nodes: 1, ..fake::state() };
        assert!(
            row(&report, "state").starts_with("1 node, generation 9, so far"),
            "{}",
            row(&report, "state")
        );
        report.cluster_ranges = (0..9).map(|i| format!("10.{i}.1.0/24").parse().unwrap()).collect();
        report.cluster_ranges_guessed = true;
        let cluster = row(&report, "cluster");
        assert!(
            cluster.starts_with("10.0.1.0/24 10.1.1.0/24 10.2.1.0/24 10.3.1.0/24 and 5 more, GUESSED"),
            "{cluster}"
        );
        assert!(cluster.ends_with("set --cluster-cidr"), "{cluster}");
        report.problems_seen.clear();
        assert_eq!(row(&report, "problems"), "none");
        assert!(!status(&pb::NodeView::default()).contains("cluster"));
    }

    #[test]
    fn thousands_of_peers_are_counted_and_the_troubled_ones_shown() {
        let mut view = fake::view();
        let idle = view.peers.iter().find(|p| p.state == "idle").cloned().expect("there is one");
        for i in 0..5000 {
            view.peers.push(pb::PeerView { name: format!("a{i:04}"), ..idle.clone() });
        }
        let got = status(&view);
        assert!(got.contains("5003 known: 1 up, 5001 idle, 1 connecting"), "{got}");
        assert!(got.contains("\nnode-d  connecting") && got.contains("... and 4983 more"), "{got}");
    }

    #[test]
    fn names_from_elsewhere_cannot_write_to_the_terminal() {
        let mut view = fake::view();
        let nasty = "\u{1b}[2Jx\r\n\u{202e}y";
        view.peers[0].name = nasty.to_owned();
        view.peers[0].why = nasty.to_owned();
        view.node = nasty.to_owned();
        let answer = fake::peers_of(&view);
        for text in [status(&view), peers(&answer), peers_verbose(&answer)] {
            assert!(!text.contains(['\u{1b}', '\r', '\u{202e}']), "{text:?}");
        }
        assert_eq!(clean("node-\u{e9}"), "node-\u{e9}");
    }

    #[test]
    fn a_peer_in_full() {
        let view = fake::view();
        let got = peers_verbose(&fake::peers_of(&view));
        let expected = "\
node-b: up
  encapsulation   wireguard
  endpoint        192.0.2.2:51820
  announced       192.0.2.2:51820
  key of lane 0   AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=
  lanes           2
  sessions        2 of 2 carry data
  last handshake  31 s ago
  keepalive       every 25 s
  MTU             1420
  pod ranges      10.244.2.0/24 fd00:2::/64
  addresses       192.0.2.2 10.244.2.0
  received        1.00 KiB, 3 packets, last 2 s ago
  sent            2.00 MiB, 4 packets, last now
";
        assert!(got.starts_with(expected), "{got}");
    }

    #[test]
    fn nobody_there_is_said() {
        let answer =
            pb::PeersResponse { node: "a".to_owned(), silent_lanes: vec![0, 2], ..Default::default() };
        let got = peers(&answer);
        assert!(got.starts_with("a knows no peer.\n  lanes 0, 2 did not answer"), "{got}");
        assert!(status(&pb::NodeView::default()).contains("No packet was dropped"));
    }

    #[test]
    fn spans_and_sizes_as_people_say_them() {
        for (ms, text) in [
            (999, "now"),
            (59_999, "59 s"),
            (61_000, "1 min 1 s"),
            (7_380_000, "2 h 3 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(span(ms), text);
        }
        for (count, text) in [
            (1023, "1023 B"),
            (1536, "1.50 KiB"),
            (20 << 10, "20.0 KiB"),
            (1000 << 20, "1000 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
