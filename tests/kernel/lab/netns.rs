//! Network namespaces that cannot outlive the test.
//!
//! A namespace is held by a `cat` that waits on a pipe from us: however the test process ends, the pipe
//! closes, `cat` ends, and the kernel takes the namespace with all interfaces, routes and nft tables in
//! it. Programs started inside die with the thread that started them. Nothing has a name on the machine.
//! `/run` is private to each namespace, so that sockets of two nodes do not meet.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use nix::sched::{CloneFlags, setns};

/// A network namespace with a mount namespace of its own.
#[derive(Debug)]
pub struct Netns {
    name: String,
    holder: Child,
}

/// `lo` is up; forwarding is left as the kernel has it; `root` may open ping sockets; addresses are usable at
/// once (no duplicate address detection); sysfs shows this namespace's devices.
const PREPARE: &str = "set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/wireguard /run/lock
mount -t sysfs sysfs /sys
ip link set lo up
echo '0 0' > /proc/sys/net/ipv4/ping_group_range
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
echo ready
exec cat";

impl Netns {
    /// Makes one; `name` is for messages only.
    pub fn new(name: &str) -> Netns {
        let mut holder = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net", "--mount", "sh", "-c", PREPARE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start setpriv and unshare (package util-linux)");
        let mut line = String::new();
        let out = holder.stdout.take().expect("stdout is piped");
        BufReader::new(out).read_line(&mut line).expect("read from the namespace's holder");
        assert_eq!(line, "ready\n", "cannot make a network namespace: see the message above; root is needed");
        Netns { name: name.to_owned(), holder }
    }

    /// The name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process that holds the namespace: `ip link ... netns PID`.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// A program in the namespace; its process id is the program's own.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter"]);
        for kind in ["net", "mount"] {
            let file = if kind == "mount" { "mnt" } else { kind };
            command.arg(format!("--{kind}=/proc/{}/ns/{file}", self.pid()));
        }
        command.arg("--").arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a command line (words split at spaces) and returns what it printed; panics if it fails.
    pub fn run(&self, line: &str) -> String {
        let output = self.attempt(line);
        assert!(
            output.status.success(),
            "in {}: `{line}`: {}{}",
            self.name,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a command line that may fail.
    pub fn attempt(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let program = words.next().expect("a command line has a program");
        self.command(program).args(words).output().unwrap_or_else(|e| panic!("`{line}`: {e}"))
    }

    /// Runs several command lines, one per line of text.
    pub fn run_all(&self, lines: &str) {
        lines.lines().map(str::trim).filter(|l| !l.is_empty()).for_each(|line| {
            self.run(line);
        });
    }

    /// Runs code inside, on a thread of its own (a namespace belongs to a thread). Sockets opened there
    /// stay in the namespace and may be used anywhere.
    pub fn enter<R: Send>(&self, code: impl FnOnce() -> R + Send) -> R {
        let pid = self.pid();
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let file = File::open(format!("/proc/{pid}/ns/net")).expect("open the namespace");
                setns(file, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                code()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Connects two namespaces by a veth pair; each end's name is given.
pub fn veth(a: (&Netns, &str), b: (&Netns, &str), mtu: u32) {
    let (ns_a, name_a) = a;
    let (ns_b, name_b) = b;
    let line = format!(
        "ip link add {name_a} mtu {mtu} netns {} type veth peer name {name_b} mtu {mtu} netns {}",
        ns_a.pid(),
        ns_b.pid()
    );
    let words: Vec<&str> = line.split_whitespace().collect();
    let done = Command::new(words[0]).args(&words[1..]).output().expect("run ip (package iproute2)");
    assert!(done.status.success(), "`{line}`: {}", String::from_utf8_lossy(&done.stderr));
    ns_a.run(&format!("ip link set {name_a} up"));
    ns_b.run(&format!("ip link set {name_b} up"));
}
