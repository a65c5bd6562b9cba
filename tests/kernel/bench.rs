//! `warren bench`: every way gives figures, nothing stays behind, and nobody gets in without the token.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use warren::io::clock;

use crate::lab::agent::{Mesh, warren};
use crate::lab::netns::Netns;
use crate::lab::{Lab, Node, Underlay, wait_for};

/// Takes every power away from a program, though it runs as root.
const POWERLESS: [&str; 7] =
    ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--ambient-caps", "-all"];
/// Figures of one way.
const FIGURES: usize = 8;
/// A side that lost the other must have ended, or be free again, within 3 s; what is around it on a busy machine.
const ENDED: Duration = Duration::from_secs(6);

/// `warren bench serve` in a namespace; ends with the test.
struct Serving {
    child: Child,
    token: String,
}

impl Serving {
    fn start(ns: &Netns, arguments: &[&str]) -> Serving {
        Serving::start_as(ns, &[], arguments)
    }

    fn start_as(ns: &Netns, before: &[&str], arguments: &[&str]) -> Serving {
        let mut words = before.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        words.extend([warren(), "bench".to_owned(), "serve".to_owned()]);
        let mut command = ns.command(&words[0]);
        command.args(&words[1..]).args(arguments).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start warren bench serve");
        let out = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let lines = out.lines().map_while(Result::ok);
        let token =
            lines.filter_map(|line| line.split_once("--token ").map(|(_, token)| token.to_owned())).next();
        Serving { child, token: token.expect("serve says the other side's command line") }
    }

    fn stop(&mut self) {
        interrupt(&self.child);
        let ended = wait_for("serve ends by a signal", ENDED, || self.child.try_wait().expect("look"));
        assert!(ended.success(), "{ended}");
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn interrupt(child: &Child) {
    kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), Signal::SIGINT).expect("signal it");
}

fn bench(ns: &Netns, before: &[&str], to: &str, token: &str, arguments: &[&str]) -> Command {
    let mut words = before.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    words.extend([warren(), "bench".to_owned(), to.to_owned(), "--token".to_owned(), token.to_owned()]);
    let mut command = ns.command(&words[0]);
    command.args(&words[1..]).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(output)))
}

/// Everything of a namespace that a measurement might leave behind or change.
fn state(ns: &Netns) -> String {
    const LINES: [&str; 7] = [
        "ip link show",
        "ip address show",
        "ip route show table all",
        "ip -6 route show table all",
        "ip rule show",
        "nft list ruleset",
        "sysctl -n net.ipv4.ip_forward net.ipv4.tcp_congestion_control",
    ];
    LINES.map(|line| ns.run(line).lines().map(lasting).collect::<String>()).concat()
}

/// What does not change by itself: a bridge comes up late, and a route's age counts.
fn lasting(line: &str) -> String {
    let line = line.split(" expires ").next().unwrap_or(line);
    let line = line.replace(" state UP ", " ").replace(" state UNKNOWN ", " ");
    line + "\n"
}

#[track_caller]
fn plausible(way: &Value, context: &str) {
    let rows = way["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), FIGURES, "{context}: {way:#}");
    for row in rows {
        assert!(row["failed"].is_null(), "{context}: {row:#}");
        if row["kind"] == "throughput" {
            let rate = row["gbit_per_s"].as_f64().expect("a rate");
            assert!(rate > 0.0001 && rate < 1000.0, "{context}: {row:#}");
            for side in ["here", "there"] {
                let cpu = row["cpu_s_per_gb"][side].as_f64().expect("a cost");
                assert!(cpu > 0.0 && cpu < 1000.0, "{context}: {row:#}");
            }
        } else {
            let trips = &row["round_trip_us"];
            let [p50, p99, p999] = ["p50", "p99", "p999"].map(|p| trips[p].as_f64().expect("a percentile"));
            assert!(p50 > 0.0 && p50 <= p99 && p99 <= p999, "{context}: {row:#}");
            // Behind a full queue, of a debug build on a busy machine, a round trip may take a good part of a second.
            let under_load = row["figure"].as_str().is_some_and(|figure| figure.ends_with("under load"));
            let least = if under_load { 1 } else { 10 };
            assert!(trips["count"].as_u64() >= Some(least), "{context}: {row:#}");
        }
        if let Some(lost) = row["lost"].as_f64() {
            assert!((0.0..1.0).contains(&lost), "{context}: {row:#}");
        }
    }
}

fn address(lab: &Lab, node: &Node) -> String {
    lab.outer(node).to_string()
}

#[test]
fn every_way_between_two_nodes_has_figures_and_nothing_stays_behind() {
    for underlay in [Underlay::V4, Underlay::V6] {
        let lab = Lab::new(2, underlay, 1500);
        let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
        if underlay == Underlay::V6 {
            there.ns.run("sysctl -w net.ipv4.tcp_congestion_control=reno");
        }
        let before = [here, there].map(|node| state(&node.ns));
        let mut serving = Serving::start(&there.ns, &[]);
        let arguments = match underlay {
            Underlay::V4 => vec!["--seconds", "1", "--json"],
            Underlay::V6 => vec!["--seconds", "1", "--json", "--reverse"],
        };
        let output = bench(&here.ns, &[], &address(&lab, there), &serving.token, &arguments).output();
        let output = output.expect("run warren bench");
        assert!(output.status.success(), "{}", said(&output));
        let report = json(&output);
        let ways = report["ways"].as_array().expect("ways");
        let names: Vec<_> = ways.iter().map(|way| way["way"].as_str().expect("a name")).collect();
        assert_eq!(names, ["path", "wireguard", "vxlan"]);
        let own = |ns: &Netns| ns.run("sysctl -n net.ipv4.tcp_congestion_control").trim().to_owned();
        let controls = ["congestion", "other_congestion"].map(|key| report[key].as_str().map(str::to_owned));
        assert_eq!(controls, [here, there].map(|node| Some(own(&node.ns))));
        for way in ways {
            assert!(way["not_measured"].is_null(), "{way:#}");
            plausible(way, &format!("{underlay:?}"));
        }
        let steps =
            String::from_utf8_lossy(&output.stderr).lines().filter(|line| line.contains("/24]")).count();
        assert_eq!(steps, 24, "a line for each figure: {}", said(&output));
        // Still there for the next one.
        let again = bench(&here.ns, &[], &address(&lab, there), "not-the-token", &[]).output();
        assert!(said(&again.expect("run warren bench")).contains("wrong token"));
        serving.stop();
        assert_eq!([here, there].map(|node| state(&node.ns)), before);
    }
}

#[test]
fn without_power_the_path_is_measured_and_the_table_says_why_not_the_rest() {
    let lab = Lab::two();
    let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
    // Neither side has it, or the serving side alone does not.
    for (mine, theirs) in [(&POWERLESS[..], &[][..]), (&[][..], &POWERLESS[..])] {
        let serving = Serving::start_as(&there.ns, theirs, &[]);
        let words = ["--seconds", "1", "--streams", "2"];
        let output = bench(&here.ns, mine, &address(&lab, there), &serving.token, &words).output();
        let output = output.expect("run warren bench");
        let said = said(&output);
        assert!(output.status.success(), "{said}");
        assert!(said.lines().any(|line| line.trim().starts_with("TCP, 2 streams")), "{said}");
        assert!(!said.contains("failed"), "{said}");
        for way in ["wireguard", "vxlan"] {
            let reason = said.lines().find(|line| line.starts_with(&format!("{way} was not measured")));
            let reason = reason.unwrap_or_else(|| panic!("{way}: {said}"));
            assert!(reason.contains("CAP_SYS_ADMIN") && reason.contains("CAP_NET_ADMIN"), "{reason}");
            assert_eq!(reason.contains("there: "), mine.is_empty(), "{reason}");
        }
    }
}

#[test]
fn a_running_agent_is_not_disturbed_and_the_mesh_is_what_path_measures() {
    let mesh = Mesh::start(Lab::two(), &["--encap", "auto", "--location", "here"]);
    let before = [0, 1].map(|node| state(&mesh.lab.nodes[node].ns));
    let pods = [0, 1].map(|node| mesh.pod(node));
    let serving = Serving::start(pods[1].ns, &["--once"]);
    let to = pods[1].addresses[0].to_string();
    let output = bench(pods[0].ns, &[], &to, &serving.token, &["--seconds", "1", "--only", "path", "--json"]);
    let output = { output }.output().expect("run warren bench");
    assert!(output.status.success(), "{}", said(&output));
    plausible(&json(&output)["ways"][0], "from pod to pod");
    // The agent's own ports are refused, not shared with it.
    let outer = mesh.lab.outer(&mesh.lab.nodes[1]).to_string();
    for (port, way) in [("51820", "wireguard"), ("8471", "vxlan")] {
        let serving = Serving::start(&mesh.lab.nodes[1].ns, &["--port", port, "--once"]);
        let words = ["--seconds", "1", "--only", way];
        let output = bench(&mesh.lab.nodes[0].ns, &[], &outer, &serving.token, &words).output();
        let said = said(&output.expect("run warren bench"));
        assert!(said.contains("is taken by another program"), "{said}");
    }
    assert_eq!([0, 1].map(|node| state(&mesh.lab.nodes[node].ns)), before);
    mesh.exchange(0, 1);
}

/// Whichever direction of UDP a firewall closes, TCP is measured and the table says what to open.
#[test]
fn a_blocked_port_is_named() {
    let path = ["--only", "path"];
    let reverse = ["--only", "path", "--reverse"];
    for (wall, what, words) in [(1, "dport", &[][..]), (0, "sport", &path), (0, "sport", &reverse)] {
        let lab = Lab::two();
        let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
        lab.nodes[wall].ns.run_all(&format!(
            "nft add table inet wall
             nft add chain inet wall in {{ type filter hook input priority 0 ; }}
             nft add rule inet wall in udp {what} {{ 5187-5189 }} drop"
        ));
        let serving = Serving::start(&there.ns, &[]);
        let words = [&["--seconds", "1", "--json"][..], words].concat();
        let output = bench(&here.ns, &[], &address(&lab, there), &serving.token, &words).output();
        let output = output.expect("run warren bench");
        let report = json(&output);
        assert!(report["stopped"].is_null(), "{words:?}: {report:#}");
        assert_eq!(output.status.code(), Some(1), "figures failed");
        let ways = report["ways"].as_array().expect("ways");
        let rows = ways[0]["rows"].as_array().expect("rows");
        assert_eq!(rows.len(), FIGURES, "{words:?}: {report:#}");
        let failed: Vec<&str> = rows.iter().filter_map(|row| row["failed"].as_str()).collect();
        assert_eq!(failed.len(), 3, "{words:?}, UDP alone: {report:#}");
        assert!(failed.iter().all(|reason| reason.contains("UDP port 5187")), "{failed:?}");
        for (way, port) in ways[1..].iter().zip(["5188", "5189"]) {
            let reason = way["not_measured"].as_str().expect("a reason");
            assert!(reason.contains(port) && reason.contains("--port"), "{reason}");
        }
    }
}

/// A tunnel that cannot be made is a failure for who asked for it by name.
#[test]
fn a_way_that_was_named_and_not_measured_is_told_by_the_status() {
    let lab = Lab::two();
    let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
    let serving = Serving::start_as(&there.ns, &POWERLESS, &[]);
    for (only, code) in [("path", 0), ("path,vxlan", 1)] {
        let words = ["--seconds", "1", "--streams", "1", "--only", only];
        let output = bench(&here.ns, &[], &address(&lab, there), &serving.token, &words).output();
        let output = output.expect("run warren bench");
        assert_eq!(output.status.code(), Some(code), "{only}: {}", said(&output));
    }
}

/// The network under the mesh may have nothing but link-local addresses between two nodes.
#[test]
fn the_path_between_link_local_addresses_is_measured() {
    let lab = Lab::two();
    let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
    let shown = there.ns.run("ip -6 -o address show dev eth0 scope link");
    let its = shown.split_whitespace().find(|word| word.starts_with("fe80:")).expect("a link-local address");
    let its = its.split('/').next().unwrap_or(its);
    let index = here.ns.run("cat /sys/class/net/eth0/ifindex");
    let serving = Serving::start(&there.ns, &[]);
    let to = format!("[{its}%{}]:5187", index.trim());
    let words = ["--seconds", "1", "--only", "path", "--json"];
    let output = bench(&here.ns, &[], &to, &serving.token, &words).output().expect("run warren bench");
    assert!(output.status.success(), "{}", said(&output));
    plausible(&json(&output)["ways"][0], "link-local");
}

/// One signal is enough, whoever is waited for.
#[test]
fn who_interrupts_before_anything_was_measured_need_not_wait() {
    let lab = Lab::two();
    let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
    there.ns.run_all(
        "nft add table inet wall
         nft add chain inet wall in { type filter hook input priority 0 ; }
         nft add rule inet wall in tcp dport 1 drop",
    );
    let outer = lab.outer(there);
    let silent = there.ns.enter(|| TcpListener::bind((outer, 2))).expect("a port");
    // Nothing comes back from the one, no word from the other.
    for port in [1, 2] {
        let mut command = bench(&here.ns, &[], &format!("{outer}:{port}"), "a-token-of-whom", &[]);
        let mut child = command.spawn().expect("start warren bench");
        wait_for("it has a connection to wait for", ENDED, || {
            let sockets = here.ns.run(&format!("ss -Htan dport = :{port}"));
            (!sockets.trim().is_empty()).then_some(())
        });
        interrupt(&child);
        let at = clock::now();
        let ended = wait_for("it ends by a signal", ENDED, || child.try_wait().expect("look"));
        assert_eq!(ended.code(), Some(130), "port {port}");
        assert!(clock::now() - at < Duration::from_secs(2), "port {port}");
    }
    drop(silent);
}

/// However one side ends, the other knows it soon; and serve stays for the next one.
#[test]
fn the_end_of_one_side_is_noticed_by_the_other() {
    let lab = Lab::two();
    let [here, there] = [&lab.nodes[0], &lab.nodes[1]];
    let mut serving = Serving::start(&there.ns, &[]);
    let to = address(&lab, there);
    let begin = |words: &[&str]| {
        let mut child = bench(&here.ns, &[], &to, &serving.token, words).spawn().expect("start warren bench");
        // A line of its own for each figure that is done: now the second one goes on.
        let mut err = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let mut line = String::new();
        err.read_line(&mut line).expect("read what it says");
        assert!(line.contains("[ 1/") || line.contains("[1/"), "{line}");
        (child, err)
    };
    let words = ["--seconds", "2", "--only", "wireguard"];

    // Interrupted: it says what it has.
    let (child, _err) = begin(&words);
    interrupt(&child);
    let at = clock::now();
    let output = child.wait_with_output().expect("it ends");
    assert!(clock::now() - at < ENDED);
    assert_eq!(output.status.code(), Some(130));
    let text = said(&output);
    let has = |words: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").contains(words);
    assert!(has("wireguard TCP, 1 stream") && has("Not all of it: stopped by a signal"), "{text}");

    // Killed: the other side is free for the next within 3 s.
    let (mut child, _err) = begin(&words);
    child.kill().expect("kill it");
    child.wait().expect("it is gone");
    let (mut child, _err) = begin(&["--seconds", "1", "--only", "path"]);
    let _ = child.wait();

    // The cable is cut while bytes flow, in either direction: both notice.
    for direction in [&[][..], &["--reverse"]] {
        let (mut child, _err) = begin(&[&words[..], direction].concat());
        // The second figure's connection stands, and its warm-up is over.
        std::thread::sleep(Duration::from_millis(1500));
        there.ns.run("ip link set eth0 down");
        let at = clock::now();
        let ended = wait_for("it ends without the other side", ENDED, || child.try_wait().expect("look"));
        assert!(!ended.success());
        wait_for("serve lets go of who is lost", ENDED.saturating_sub(clock::now() - at), || {
            there.ns.run("ss -Htn state established sport = :5187").trim().is_empty().then_some(())
        });
        there.ns.run("ip link set eth0 up");
        wait_for("the way is there again", ENDED, || {
            here.ns.attempt(&format!("ping -c 1 -W 1 {to}")).status.success().then_some(())
        });
    }

    // Serve is stopped: so is the other.
    let (mut child, _err) = begin(&words);
    serving.stop();
    let ended = wait_for("it ends with the other side", ENDED, || child.try_wait().expect("look"));
    assert!(!ended.success());
}
