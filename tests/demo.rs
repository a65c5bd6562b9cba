//! Runs the built `warren demo`: the scenes go well, and however it ends, nothing of it is left.
//!
//! Needs root, or a machine that lets ordinary users make user namespaces and open /dev/net/tun.

#![cfg(feature = "agent")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, geteuid};

const WARREN: &str = env!("CARGO_BIN_EXE_warren");
/// The uid of nobody, on every distribution, and how a shell becomes it.
const NOBODY_ID: u32 = 65534;
const NOBODY: &str = "setpriv --reuid 65534 --regid 65534 --clear-groups";
/// In a mount namespace: a /dev/net/tun that everybody may open, as on an ordinary machine.
const TUN_FOR_ALL: &str =
    "set -e; mount -t tmpfs none /dev/net; mknod /dev/net/tun c 10 200; chmod 666 /dev/net/tun; set +e";
/// What is said when everything is up: tunnels, rules, agents.
const BEGUN: &str = "different nodes talk";
/// What the issue promises.
const FIRST_REPLY_WITHIN_SECONDS: f64 = 15.0;

/// One at a time: they measure, and they look at what is left.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn every_scene_goes_well_with_both_encapsulations() {
    let _turn = alone();
    let before = footprint();
    let done = Command::new(WARREN).args(["demo", "--json"]).output().expect("the demo starts");
    let words = String::from_utf8_lossy(&done.stderr);
    let report: serde_json::Value = serde_json::from_slice(&done.stdout)
        .unwrap_or_else(|e| panic!("not JSON ({e}): {}\n{words}", String::from_utf8_lossy(&done.stdout)));
    assert!(done.status.success(), "{}: {words}", done.status);
    assert_eq!(report["ok"], true, "{words}");
    assert!(report["first_cross_node_reply_seconds"].as_f64().expect("a reply") < FIRST_REPLY_WITHIN_SECONDS);
    let paths: Vec<_> = report["figures"].as_array().expect("figures").iter().map(|f| &f["path"]).collect();
    assert_eq!(paths, ["node to node, bare", "pod to pod, wireguard", "pod to pod, vxlan"]);
    for figure in report["figures"].as_array().expect("figures") {
        assert!(figure["gbit_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{figure}");
    }
    for address in ["server saw 10.244.1.2 ", "server saw fd00:10:244:1::2 "] {
        assert!(words.contains(address), "the client's own address was not seen: {words}");
    }
    services_were_shown(&report);
    assert_nothing_left(&before);
}

/// That the scenes of Services are there, and each of their checks says what it must.
fn services_were_shown(report: &serde_json::Value) {
    let scenes = report["scenes"].as_array().expect("scenes");
    let seen = |title: &str, what: &str| -> Vec<String> {
        let scene = scenes.iter().find(|scene| scene["title"].as_str().is_some_and(|t| t.contains(title)));
        let checks =
            scene.unwrap_or_else(|| panic!("no scene {title:?}"))["checks"].as_array().expect("checks");
        let text = |check: &serde_json::Value, part: &str| check[part].as_str().expect("text").to_owned();
        let fitting = checks.iter().filter(|check| text(check, "what").contains(what));
        fitting.map(|check| text(check, "seen")).collect()
    };
    for (title, what, count, words) in [
        ("by its ClusterIP", "pod-1a -> my-service 10.96.0.20:80", 1, "pods saw 10.244.1.2 "),
        ("by its ClusterIP", "-> my-service", 6, "100 answers; all 3 pods saw "),
        ("by its ClusterIP", "who answered those 600", 1, "pod-3b "),
        ("by its ClusterIP", "10.96.0.20:81", 1, "connection refused"),
        ("same Service", "who answered those 600", 1, "pod-3c "),
        ("port 30007", "TCP  outside -> node1 10.99.0.11:30007", 1, "pods saw 10.99.0.200 "),
        ("port 30007", "outside -> node", 6, "all 3 pods saw "),
        ("by its name", "asks for A of my-service", 2, "10.96.0.20 "),
        ("by its name", "asks for AAAA of my-service", 1, "fd00:10:96::14 "),
        ("by its name", "of no-service", 1, "no such name"),
        ("by its name", "-> my-service.my-namespace.svc.cluster.local", 1, " saw "),
        ("by its name", "pod-2a -> my-service.my-namespace", 1, " saw "),
        ("dies", "downloads from pod-3b, killed", 3, "connection reset after "),
        ("dies", "downloads from pod-3b, killed", 3, " answers a new one in "),
        ("dies", "downloads from pod-1b and pod-2c", 3, "untouched, "),
    ] {
        let seen = seen(title, what);
        assert!(
            seen.len() == count && seen.iter().all(|seen| seen.contains(words)),
            "{title}, {what}: {seen:?} and not {count} times {words:?}"
        );
    }
}

#[test]
fn an_ordinary_user_may_do_it_too() {
    let _turn = alone();
    let before = footprint();
    // The build's folder may be closed to others.
    let folder = tempfile::tempdir().expect("a scratch folder");
    let program = readable_copy(folder.path());
    let demo = format!("{} demo --encap vxlan --nodes 2", program.display());
    let _settings = UserNamespaces::allow();
    let mut command = if geteuid().is_root() {
        in_own_mounts(&format!("{TUN_FOR_ALL}; exec {NOBODY} {demo}"))
    } else {
        let mut command = Command::new("sh");
        command.args(["-c", &demo]);
        command
    };
    let done = command.current_dir("/").output().expect("the demo starts");
    let words = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    // What the machine forbids, the demo's own words say how to allow; it is no pass.
    assert!(done.status.success(), "an ordinary user could not run it: {}: {words}{errors}", done.status);
    assert_nothing_left(&before);
}

#[test]
fn a_machine_that_forbids_it_is_told_what_to_change() {
    let _turn = alone();
    assert!(geteuid().is_root(), "this test takes devices and namespaces away: run it as root");
    let folder = tempfile::tempdir().expect("a scratch folder");
    let demo = format!("{} demo", readable_copy(folder.path()).display());
    let no_power = "setpriv --bounding-set=-all --inh-caps=-all";
    for (what, line, advice) in [
        (
            "a device for root alone",
            format!("{TUN_FOR_ALL}; chmod 600 /dev/net/tun; {NOBODY} {demo}"),
            "sudo chmod 666 /dev/net/tun",
        ),
        ("no device", format!("mount -t tmpfs none /dev/net; {demo}"), "sudo modprobe tun"),
        // Limits belong to a user namespace: those of the machine stay as they are.
        (
            "no PID namespaces",
            format!(
                "unshare --user --map-root-user sh -c 'echo 0 > /proc/sys/user/max_pid_namespaces; {demo}'"
            ),
            "sudo sysctl -w user.max_pid_namespaces=",
        ),
        (
            "no user namespaces",
            format!(
                "{TUN_FOR_ALL}; unshare --user --map-root-user sh -c \
                 'echo 0 > /proc/sys/user/max_user_namespaces; {no_power} {demo}'"
            ),
            "sudo sysctl -w user.max_user_namespaces=",
        ),
    ] {
        let done = in_own_mounts(&line).output().expect("it starts");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && said.contains(advice), "{what}: {} {said}", done.status);
    }
}

#[test]
fn nobody_makes_root_stop_a_process_by_its_name() {
    let _turn = alone();
    assert!(geteuid().is_root(), "it takes root to act for somebody else: run this test as root");
    let folder = tempfile::tempdir().expect("a scratch folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("opened to all");
    // `cat` under our name, waiting at a pipe that is called like an argument of a stage. Its parent is a shell
    // whose command line is that of a kept demo, or is not.
    let script = "PATH=.:$PATH; warren demo internal stage -- --keep; true\n";
    for name in ["demo", "other"] {
        fs::write(folder.path().join(name), script).expect("written");
    }
    std::os::unix::fs::symlink("/bin/cat", folder.path().join("warren")).expect("linked");
    nix::unistd::mkfifo(&folder.path().join("internal"), nix::sys::stat::Mode::from_bits_truncate(0o644))
        .expect("a pipe");
    for (name, user) in [("demo", NOBODY_ID), ("other", 0)] {
        let mut command = Command::new("sh");
        command.args([name, "--keep"]).current_dir(folder.path()).uid(user).stdout(Stdio::null());
        let mut imitation = Imitation(command.process_group(0).spawn().expect("it starts"));
        let shell = pid_of(&imitation.0);
        wait_until("the imitation is up", || {
            let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"));
            let child = children.unwrap_or_default().trim().to_owned();
            fs::read(format!("/proc/{child}/cmdline"))
                .is_ok_and(|line| line.starts_with(b"warren\0demo\0internal"))
        });
        let pid = shell.to_string();
        for words in [["stop", &pid].as_slice(), &["enter", "--demo", &pid, "pod-1a", "true"]] {
            let done = Command::new(WARREN).arg("demo").args(words).output().expect("it starts");
            assert!(
                String::from_utf8_lossy(&done.stderr).contains("is no demo of yours"),
                "{name}: {done:?}"
            );
        }
        assert!(imitation.0.try_wait().expect("its state").is_none(), "{name}: it was stopped");
    }
}

#[test]
fn without_a_demo_enter_and_stop_say_so_and_whose_there_is() {
    let _turn = alone();
    let folder = tempfile::tempdir().expect("a scratch folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("opened to all");
    fs::write(folder.path().join("demo"), "sleep 60; true\n").expect("written");
    for words in ["stop", "enter pod-1a true"] {
        // With processes of its own: `stop` must not find a demo that somebody has up on this machine.
        let line = format!("{NOBODY} sh demo --keep & sleep 0.5; {WARREN} demo {words}");
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &line]);
        let done = command.current_dir(folder.path()).output().expect("it starts");
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{said}");
        assert!(said.contains("no demo of yours is up (process "), "{said}");
        assert!(said.contains(&format!("the user with id {NOBODY_ID}")), "{said}");
    }
}

#[test]
fn ctrl_c_leaves_nothing() {
    ends_without_a_trace(BEGUN, |demo| killpg(demo, Signal::SIGINT), Some(130));
}

#[test]
fn ctrl_c_in_the_middle_of_downloads_leaves_nothing() {
    ends_without_a_trace("dies in the middle", |demo| killpg(demo, Signal::SIGINT), Some(130));
}

#[test]
fn sigterm_leaves_nothing() {
    ends_without_a_trace(BEGUN, |demo| kill(demo, Signal::SIGTERM), Some(143));
}

#[test]
fn sigkill_leaves_nothing() {
    ends_without_a_trace(BEGUN, |demo| kill(demo, Signal::SIGKILL), None);
}

#[test]
fn a_stage_that_is_killed_takes_everything_along() {
    ends_without_a_trace(BEGUN, |demo| kill(stage_of(demo), Signal::SIGKILL), Some(1));
}

#[test]
fn a_kept_demo_can_be_entered_and_stopped() {
    let _turn = alone();
    let before = footprint();
    let mut demo = start(&["--keep", "--encap", "wireguard", "--nodes", "2"]);
    let said = read_until(&mut demo, "warren demo stop");
    let pid = demo.0.id().to_string();
    let ask = ["warren", "demo", "internal", "ask", "tcp", "10.244.2.2:8080"];
    let entered = Command::new(WARREN)
        .args(["demo", "enter", "--demo", &pid, "pod-1a"])
        .args(ask)
        .output()
        .expect("enter starts");
    let answer = String::from_utf8_lossy(&entered.stdout);
    assert!(answer.contains(r#""by":"pod-2a","saw":"10.244.1.2""#), "{answer} {entered:?} {said}");
    // By name, as every program there looks names up; and from a machine that is no node.
    for (place, target, saw) in [
        ("pod-1a", "my-service.my-namespace.svc.cluster.local:80", &["10.244.1.2", "fd00:10:244:1::2"][..]),
        ("pod-2a", "my-service.my-namespace:80", &["10.244.2.2", "fd00:10:244:2::2"]),
        ("outside", "10.99.0.12:30007", &["10.99.0.200"]),
    ] {
        let entered = Command::new(WARREN)
            .args([
                "demo", "enter", "--demo", &pid, place, "warren", "demo", "internal", "ask", "tcp", target,
            ])
            .output()
            .expect("enter starts");
        let answer = String::from_utf8_lossy(&entered.stdout);
        let seen = |address: &&str| answer.contains(&format!(r#""saw":"{address}""#));
        assert!(saw.iter().any(seen), "{place} to {target}: {answer} {entered:?}");
    }
    for (place, has) in [("pod-1a", true), ("node1", false)] {
        let file = Command::new(WARREN)
            .args(["demo", "enter", "--demo", &pid, place, "cat", "/etc/resolv.conf"])
            .output()
            .expect("enter starts");
        let text = String::from_utf8_lossy(&file.stdout);
        assert_eq!(
            text.contains("svc.cluster.local cluster.local\nnameserver 10.96.0.10\n"),
            has,
            "{place}: {text}"
        );
    }
    let nowhere =
        Command::new(WARREN).args(["demo", "enter", "--demo", &pid, "pod-9z"]).output().expect("it starts");
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("pod-1a"), "the pods there are must be named");
    let code = Command::new(WARREN)
        .args(["demo", "enter", "--demo", &pid, "node1", "sh", "-c", "exit 7"])
        .status()
        .expect("it starts");
    assert_eq!(code.code(), Some(7), "the command's own exit code");
    let space = pid_namespace(stage_of(pid_of(&demo.0)));
    let stopped = Command::new(WARREN).args(["demo", "stop", &pid]).output().expect("stop starts");
    assert!(stopped.status.success(), "{stopped:?}");
    assert_eq!(demo.0.wait().expect("it ended").code(), Some(0));
    assert_eq!(inhabitants(&space), Vec::<i32>::new());
    assert_nothing_left(&before);
}

#[test]
fn impossible_wishes_are_refused() {
    for words in [["--nodes", "1"], ["--mtu", "600"], ["--encap", "ipip"]] {
        let refused = Command::new(WARREN).arg("demo").args(words).output().expect("it starts");
        assert!(!refused.status.success() && !refused.stderr.is_empty(), "{words:?}");
    }
}

fn ends_without_a_trace(when: &str, end: impl Fn(Pid) -> nix::Result<()>, code: Option<i32>) {
    let _turn = alone();
    let before = footprint();
    let mut demo = start(&["--encap", "wireguard"]);
    read_until(&mut demo, when);
    let pid = pid_of(&demo.0);
    let space = pid_namespace(stage_of(pid));
    assert!(inhabitants(&space).len() > 10, "the stage, holders, servers and agents");
    end(pid).expect("it can be signalled");
    assert_eq!(demo.0.wait().expect("it ended").code(), code);
    // The kernel kills the rest by itself; nobody is left who could wait for it.
    wait_until("the last process has ended", || inhabitants(&space).is_empty());
    assert_nothing_left(&before);
}

/// A demo that is killed with its test.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Killed with its test, and what it has started too.
struct Imitation(Child);

impl Drop for Imitation {
    fn drop(&mut self) {
        let _ = killpg(pid_of(&self.0), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// What keeps ordinary users from user namespaces, switched off and back on again; only root can.
struct UserNamespaces(Vec<(&'static str, String)>);

impl UserNamespaces {
    fn allow() -> Self {
        let wanted = [
            ("/proc/sys/kernel/unprivileged_userns_clone", "0", "1"),
            ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
            ("/proc/sys/user/max_user_namespaces", "0", "10000"),
        ];
        let change = |(path, bad, good): (&'static str, &str, &str)| {
            let before = fs::read_to_string(path).ok().filter(|value| value.trim() == bad)?;
            fs::write(path, good).ok()?;
            Some((path, before))
        };
        Self(wanted.into_iter().filter_map(change).collect())
    }
}

impl Drop for UserNamespaces {
    fn drop(&mut self) {
        for (path, before) in &self.0 {
            let _ = fs::write(path, before);
        }
    }
}

/// A shell line in a mount namespace of its own.
fn in_own_mounts(line: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", line]);
    command
}

fn start(words: &[&str]) -> Demo {
    let mut command = Command::new(WARREN);
    command.arg("demo").args(words).stdout(Stdio::piped()).stdin(Stdio::null());
    // As a shell does, so that Ctrl-C's signal to the group reaches the demo and not the tests.
    Demo(command.process_group(0).spawn().expect("the demo starts"))
}

fn read_until(demo: &mut Demo, text: &str) -> String {
    let mut lines = BufReader::new(demo.0.stdout.take().expect("piped"));
    let mut said = String::new();
    while !said.contains(text) {
        assert!(lines.read_line(&mut said).expect("readable") > 0, "it ended before {text:?}: {said}");
    }
    // The rest is read too, or the demo would stop at a full pipe.
    thread::spawn(move || lines.read_to_end(&mut Vec::new()));
    said
}

fn pid_of(process: &Child) -> Pid {
    Pid::from_raw(i32::try_from(process.id()).expect("a pid"))
}

fn stage_of(demo: Pid) -> Pid {
    let children = fs::read_to_string(format!("/proc/{demo}/task/{demo}/children")).expect("it runs");
    Pid::from_raw(children.split_whitespace().next().expect("it has a child").parse().expect("a pid"))
}

fn pid_namespace(process: Pid) -> PathBuf {
    fs::read_link(format!("/proc/{process}/ns/pid")).expect("it runs")
}

fn inhabitants(space: &Path) -> Vec<i32> {
    let processes =
        fs::read_dir("/proc").expect("/proc").filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    processes
        .filter(|pid| fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|link| link == space))
        .collect()
}

/// What the demo could leave on the machine, by the names it gives: other work may go on beside the tests.
fn footprint() -> BTreeSet<String> {
    const FILES: [&str; 6] = [
        "/run/warren",
        "/run/warren-demo",
        "/run/wireguard",
        "/var/lib/warren",
        "/var/run/warren",
        "/tmp/warren-demo",
    ];
    const LINKS: [&str; 7] = ["underlay", "cbr0", "warren0", "node1", "outside", "veth1a", "veth2b"];
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let links = LINKS.map(|name| format!("/sys/class/net/{name}"));
    let named = ["node1", "pod-1a"].map(|name| format!("/run/netns/{name}"));
    let paths = FILES.iter().map(|path| path.to_string()).chain(links).chain(named);
    paths
        .filter(|path| fs::symlink_metadata(path).is_ok())
        .chain([format!("/etc/resolv.conf: {:?}", fs::read("/etc/resolv.conf"))])
        .chain(mounts.lines().filter(|line| line.contains("warren-demo")).map(String::from))
        .collect()
}

/// Nothing that was not there before.
fn assert_nothing_left(before: &BTreeSet<String>) {
    let left: Vec<_> = footprint().difference(before).cloned().collect();
    assert_eq!(left, Vec::<String>::new(), "left behind");
}

fn readable_copy(folder: &Path) -> PathBuf {
    let program = folder.join("warren");
    fs::copy(WARREN, &program).expect("copied");
    for path in [folder, &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("opened to all");
    }
    program
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("five seconds passed, but not: {what}");
}
