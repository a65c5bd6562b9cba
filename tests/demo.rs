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
/// The uid of nobody, on every distribution.
const NOBODY: u32 = 65534;
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
    assert_nothing_left(&before);
}

#[test]
fn an_ordinary_user_may_do_it_too() {
    let _turn = alone();
    let before = footprint();
    // The build's folder may be closed to others.
    let folder = tempfile::tempdir().expect("a scratch folder");
    let program = readable_copy(folder.path());
    let mut command = Command::new(program);
    command.args(["demo", "--encap", "vxlan", "--nodes", "2"]).current_dir("/");
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let done = command.output().expect("the demo starts");
    let words = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    if errors.contains("/dev/net/tun") {
        assert!(!done.status.success());
        assert!(errors.contains("chmod 666 /dev/net/tun") || errors.contains("modprobe tun"), "{errors}");
        return;
    }
    if errors.contains("this machine does not let you") {
        assert!(errors.contains("Change it: sudo sysctl") || errors.contains("privileged"), "{errors}");
        return;
    }
    assert!(done.status.success(), "{}: {words}{errors}", done.status);
    assert_nothing_left(&before);
}

#[test]
fn ctrl_c_leaves_nothing() {
    ends_without_a_trace(|demo| killpg(demo, Signal::SIGINT), Some(130));
}

#[test]
fn sigterm_leaves_nothing() {
    ends_without_a_trace(|demo| kill(demo, Signal::SIGTERM), Some(143));
}

#[test]
fn sigkill_leaves_nothing() {
    ends_without_a_trace(|demo| kill(demo, Signal::SIGKILL), None);
}

#[test]
fn a_stage_that_is_killed_takes_everything_along() {
    ends_without_a_trace(|demo| kill(stage_of(demo), Signal::SIGKILL), Some(1));
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
    let nowhere =
        Command::new(WARREN).args(["demo", "enter", "--demo", &pid, "pod-9z"]).output().expect("it starts");
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("pod-1a"), "the pods there are must be named");
    let code = Command::new(WARREN)
        .args(["demo", "enter", "--demo", &pid, "node1", "sh", "-c", "exit 7"])
        .status()
        .expect("it starts");
    assert_eq!(code.code(), Some(7), "the command's own exit code");
    let space = pid_namespace(stage_of(pid_of(&demo)));
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

fn ends_without_a_trace(end: impl Fn(Pid) -> nix::Result<()>, code: Option<i32>) {
    let _turn = alone();
    let before = footprint();
    let mut demo = start(&["--encap", "wireguard"]);
    // Now everything is up: tunnels, rules, agents.
    read_until(&mut demo, "different nodes talk");
    let pid = pid_of(&demo);
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

fn pid_of(demo: &Demo) -> Pid {
    Pid::from_raw(i32::try_from(demo.0.id()).expect("a pid"))
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
    const LINKS: [&str; 6] = ["underlay", "cbr0", "warren0", "node1", "veth1a", "veth2b"];
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let links = LINKS.map(|name| format!("/sys/class/net/{name}"));
    let named = ["node1", "pod-1a"].map(|name| format!("/run/netns/{name}"));
    let paths = FILES.iter().map(|path| path.to_string()).chain(links).chain(named);
    paths
        .filter(|path| fs::symlink_metadata(path).is_ok())
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
