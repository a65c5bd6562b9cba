//! A `warren agent` in a node's namespace.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use warren::packet::DropReason;

use super::traffic::{exchange, reach};
use super::{CLUSTER, Lab, Node, Station, wait_for};

/// The binary under test: `$WARREN`, or the one cargo has just built.
pub fn warren() -> String {
    std::env::var("WARREN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_warren").to_owned())
}

/// An agent that needs longer to start has a problem.
pub const READY: Duration = Duration::from_secs(20);
/// How much of a log is shown when a test fails.
const TAIL: usize = 6000;

/// A running agent; dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    name: String,
    child: Child,
    folder: PathBuf,
    before: Vec<String>,
    arguments: Vec<String>,
}

impl Agent {
    /// Starts the agent of a node and waits until it is ready.
    pub fn start(lab: &Lab, node: &Node, arguments: &[&str]) -> Agent {
        let mut agent = Agent::launch(lab, node, arguments);
        agent.wait_ready();
        agent
    }

    /// Starts it without waiting.
    pub fn launch(lab: &Lab, node: &Node, arguments: &[&str]) -> Agent {
        Agent::launch_by(lab, node, &[], arguments)
    }

    /// The same by a command that ends with running the words after it.
    pub fn launch_by(lab: &Lab, node: &Node, before: &[&str], arguments: &[&str]) -> Agent {
        let folder = folder(lab, node);
        fs::create_dir_all(&folder).expect("make the agent's folder");
        let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<String>>();
        let (before, arguments) = (owned(before), owned(arguments));
        let child = spawn(lab, node, &folder, &before, &arguments);
        Agent { name: node.name.clone(), child, folder, before, arguments }
    }

    /// Waits for `ready`; panics with the log when the agent ends first.
    pub fn wait_ready(&mut self) {
        let ready = self.folder.join("run/ready");
        let (child, name) = (&mut self.child, &self.name);
        wait_for(&format!("the agent of {name} is ready"), READY, || {
            let ended = child.try_wait().expect("look after the agent");
            assert!(ended.is_none(), "the agent of {name} ended by itself: {ended:?}");
            fs::read(&ready).ok().filter(|text| !text.is_empty())
        });
    }

    /// Kills it without warning, as the kernel's out-of-memory killer would.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill the agent");
        self.child.wait().expect("wait for the killed agent");
        // A new agent's readiness must not be read from the old one's file.
        let _ = fs::remove_file(self.folder.join("run/ready"));
    }

    /// Asks it to stop and waits.
    pub fn stop(&mut self) -> ExitStatus {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits"));
        kill(pid, Signal::SIGTERM).expect("signal the agent");
        wait_for("the agent stops", Duration::from_secs(10), || {
            self.child.try_wait().expect("look after the agent")
        })
    }

    /// Starts it again with the same arguments, and waits until it is ready.
    pub fn restart(&mut self, lab: &Lab, node: &Node) {
        let _ = fs::remove_file(self.folder.join("run/ready"));
        self.child = spawn(lab, node, &self.folder, &self.before, &self.arguments);
        self.wait_ready();
    }

    /// Does something while the agent stands still, so that what comes meanwhile comes to it at once.
    pub fn frozen<R>(&self, during: impl FnOnce() -> R) -> R {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits"));
        kill(pid, Signal::SIGSTOP).expect("stop the agent");
        wait_for("every thread of the agent stands still", Duration::from_secs(5), || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the agent's threads");
            let stands = |task: fs::DirEntry| {
                let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                // proc(5): the state comes behind the name, which is in brackets.
                stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
            };
            tasks.flatten().all(stands).then_some(())
        });
        let result = during();
        kill(pid, Signal::SIGCONT).expect("let the agent go on");
        result
    }

    /// Its process.
    #[allow(dead_code)] // for those who measure it
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("look after the agent").is_none()
    }

    /// Everything it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Waits until what the agent knows of another node, and that it is in touch with it, is on disk: from
    /// then on a restart must be seamless. (It saves every few seconds, and a kill may come between.)
    pub fn wait_saved(&self, lab: &Lab, other: &Node) {
        let read = |file| fs::read_to_string(self.folder.join("state").join(file)).unwrap_or_default();
        wait_for(&format!("the agent of {} has saved {}", self.name, other.name), READY, || {
            let lanes = lab.published(other, "warren.dev/lanes")?;
            let saved = read("checkpoint.json").contains(&lanes);
            (saved && read("recent-peers.json").contains(&other.name)).then_some(())
        });
    }

    /// What it answers to `warren status`.
    pub fn status(&self) -> serde_json::Value {
        let run = self.folder.join("run");
        let output = Command::new(warren()).args(["status", "--json", "--run-dir"]).arg(run).output();
        let output = output.expect("run warren status");
        let text = || String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("status is JSON: {e}: {}", text()))
    }

    /// What each of its lanes has counted under this name.
    pub fn counted(&self, total: &str) -> Vec<u64> {
        let view = self.status();
        let lanes = view["lanes"].as_array().expect("a list of lanes").iter();
        let found = lanes.map(|lane| {
            let totals = lane["totals"].as_array().expect("a list of totals").iter();
            let count =
                totals.filter(|count| count["name"] == total).find_map(|count| count["value"].as_u64());
            count.unwrap_or_else(|| panic!("no {total}: {lane}"))
        });
        found.collect()
    }

    /// How often it dropped packets for this reason.
    pub fn dropped(&self, reason: &str) -> u64 {
        assert!(DropReason::ALL.iter().any(|known| known.name() == reason), "no drop is called {reason}");
        let view = self.status();
        let drops = view["drops"].as_array().expect("a list of drops");
        let found = drops.iter().find(|drop| drop["name"] == reason);
        found.map_or(0, |drop| {
            let count = &drop["count"];
            count.as_u64().or_else(|| count.as_str()?.parse().ok()).expect("a count")
        })
    }

    /// What it wrote when it became ready.
    pub fn ready(&self) -> String {
        fs::read_to_string(self.folder.join("run/ready")).unwrap_or_default()
    }

    /// The MTU that its pods should have.
    pub fn pod_mtu(&self) -> u32 {
        let ready: serde_json::Value = serde_json::from_str(&self.ready()).expect("ready is JSON");
        let mtu = ready["pod_mtu"].as_u64().expect("ready has pod_mtu");
        u32::try_from(mtu).expect("an MTU fits")
    }

    /// The folder that holds its `state`, `run` and `log`.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let run = self.folder.join("run");
            let status = Command::new(warren()).arg("status").arg("--run-dir").arg(run).output();
            let status = status.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
            eprintln!("--- status of {}\n{}", self.name, status.unwrap_or_default());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(TAIL);
            let tail = log.get(from..).unwrap_or(&log);
            eprintln!("--- log of the agent of {} (last part)\n{tail}\n---", self.name);
        }
    }
}

/// The agent's command line in the node's namespace, for runs that are to end by themselves.
pub fn command(lab: &Lab, node: &Node, arguments: &[&str]) -> Command {
    let folder = folder(lab, node);
    fs::create_dir_all(&folder).expect("make the agent's folder");
    let mut command = node.ns.command(warren());
    command.arg("agent").args(ordinary(lab, node, &folder)).args(arguments).env("WARREN_LANES", lanes());
    command
}

/// How many lanes an agent has unless a test says otherwise: one, wherever it runs, or what WARREN_TEST_LANES says.
fn lanes() -> String {
    std::env::var("WARREN_TEST_LANES").unwrap_or_else(|_| "1".to_owned())
}

fn folder(lab: &Lab, node: &Node) -> PathBuf {
    lab.path().join(&node.name)
}

fn spawn(lab: &Lab, node: &Node, folder: &Path, before: &[String], arguments: &[String]) -> Child {
    let log = File::options().create(true).append(true).open(folder.join("log")).expect("open the log");
    let program = [before, &[warren()]].concat();
    node.ns
        .command(&program[0])
        .args(&program[1..])
        .arg("agent")
        .args(ordinary(lab, node, folder))
        .args(arguments)
        .env("RUST_BACKTRACE", "1")
        .env("WARREN_LANES", lanes())
        // A log that is read by people and by tests needs no colours.
        .env("NO_COLOR", "1")
        .stdout(log.try_clone().expect("duplicate the log"))
        .stderr(log)
        .stdin(Stdio::null())
        .spawn()
        .unwrap_or_else(|e| panic!("start {}: {e}", warren()))
}

fn ordinary(lab: &Lab, node: &Node, folder: &Path) -> Vec<String> {
    let path = |name: &str| folder.join(name).display().to_string();
    [
        ("--source", format!("dir:{}", lab.cluster().display())),
        ("--node", node.name.clone()),
        ("--state-dir", path("state")),
        ("--run-dir", path("run")),
        ("--cluster-cidr", CLUSTER.to_owned()),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .collect()
}

/// A laboratory in which every node runs an agent and has a pod.
#[derive(Debug)]
pub struct Mesh {
    /// One per node; they go before their namespaces do.
    pub agents: Vec<Agent>,
    /// The nodes.
    pub lab: Lab,
}

impl Mesh {
    /// Starts an agent on every node and waits until the pods of the first two reach each other.
    pub fn start(lab: Lab, arguments: &[&str]) -> Mesh {
        Mesh::start_each(lab, |_| arguments.to_vec())
    }

    /// The same, with arguments for each node by its number.
    pub fn start_each<'a>(lab: Lab, arguments: impl Fn(u8) -> Vec<&'a str>) -> Mesh {
        let lab = if lab.nodes.iter().any(|node| node.pods.is_empty()) { lab.with_pods() } else { lab };
        lab.write_nodes();
        let mut agents: Vec<Agent> =
            lab.nodes.iter().map(|node| Agent::launch(&lab, node, &arguments(node.number))).collect();
        agents.iter_mut().for_each(Agent::wait_ready);
        let mesh = Mesh { agents, lab };
        for other in 1..mesh.lab.nodes.len() {
            reach(mesh.pod(0), mesh.pod(other));
        }
        mesh.fit_pods();
        mesh
    }

    /// Gives all pods the MTU that their agents name, once all have seen each other and name the same.
    fn fit_pods(&self) {
        let named = |agent: &Agent| agent.pod_mtu();
        let mtu = wait_for("all agents name one MTU", Duration::from_secs(5), || {
            let first = named(&self.agents[0]);
            self.agents.iter().all(|agent| named(agent) == first).then_some(first)
        });
        self.lab.nodes.iter().for_each(|node| node.set_pod_mtu(mtu));
    }

    /// The pod of a node, counted from 0.
    pub fn pod(&self, index: usize) -> Station<'_> {
        self.lab.nodes[index].pod()
    }

    /// Everything of every kind and size between two nodes' pods, both ways.
    pub fn exchange(&self, a: usize, b: usize) {
        reach(self.pod(a), self.pod(b));
        exchange(self.pod(a), self.pod(b));
    }
}
