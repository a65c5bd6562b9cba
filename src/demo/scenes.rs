//! What is shown: each kind of traffic that a cluster's users know, run for real, in plain words.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, fs};

use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};

use super::report::{Check, Figure, Report};
use super::sandbox::{self, FOLDER};
use super::stage::{Asker, Stage};
use super::traffic::eavesdrop::Overheard;
use super::traffic::{PORT, Protocol, RoundTrips, Sunk};
use super::world::{CLUSTER_RANGES, Node, Outside, Process, World, ourselves};
use super::{DemoError, DemoOptions, agents, services};
use crate::io::clock;
use crate::snapshot::{Encap, MAX_LANES};

/// Only inside a pod: no other pod can reach it.
const SIDECAR_PORT: u16 = 9000;
/// How long a throughput measurement sends.
const THROUGHPUT_MS: u64 = 2000;
/// How long a latency measurement asks.
const LATENCY_MS: u64 = 300;
/// How often it is repeated. The best counts: where the scheduler happens to put the two ends (one core, two
/// cores, one asleep) changes a round trip more than any tunnel does.
const LATENCY_TRIES: usize = 5;

/// Builds the world and plays all scenes in it; what the stage process does.
pub(super) fn play(options: &DemoOptions) -> Result<ExitCode, DemoError> {
    let mut report = Report::new(options.json, clock::now());
    report.headline(&format!(
        "Warren demo: {} nodes with two pods each, in network namespaces of this machine.",
        options.nodes
    ));
    let world = World::build(options, |what| report.waiting(&format!("making {what}"), clock::now()))?;
    agents::write_nodes(&world)?;
    services::write(&world)?;
    let mut stage = Stage { world, report };
    stage.introduce();
    // What went well until then is said too, and in the document.
    if let Err(error) = stage.play_all(options) {
        stage.report.broke_off(&error.to_string(), clock::now());
    }
    let all_well = stage.report.finish(clock::now());
    if options.keep {
        stage.keep(options, all_well)?;
    }
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Stage {
    fn play_all(&mut self, options: &DemoOptions) -> Result<(), DemoError> {
        self.without_warren()?;
        self.inside_one_pod()?;
        self.on_one_node()?;
        for (turn, &encap) in options.encap.shown().iter().enumerate() {
            self.start_agents(encap)?;
            self.across_nodes(encap)?;
            if turn == 0 {
                self.pod_replaced()?;
            }
            self.service_by_address(turn > 0)?;
            if turn == 0 {
                self.service_from_outside()?;
                self.service_by_name()?;
                self.endpoint_dies()?;
            }
            self.measure(encap)?;
            agents::all_there(&mut self.world)?;
        }
        self.compare();
        Ok(())
    }

    fn introduce(&mut self) {
        let v6 = self.world.v6;
        if !v6 {
            self.report.say("  (this kernel has no IPv6: IPv4 only)");
        }
        for node in &self.world.nodes {
            let pods: Vec<_> = node.all_pods().map(|pod| pod.name.as_str()).collect();
            self.report.node(&format!(
                "{:7} {}   pods {} in {}",
                node.name,
                node.address(false),
                pods.join(", "),
                node.pod_ranges(v6).join(", ")
            ));
        }
        let outside = self.world.outside.v4;
        self.report.say(&format!("  {:7} {outside}  no node: it knows nothing of all this", Outside::NAME));
    }

    fn without_warren(&mut self) -> Result<(), DemoError> {
        self.open(
            "Before Warren: the nodes reach each other, their pods do not",
            "The network between the nodes knows nothing of pods, as in most clouds and homes.",
        );
        let (node, far) = (self.node(0)?, self.node(1)?);
        let from = Asker {
            name: node.name.clone(),
            holder: node.holder.pid(),
            v4: node.address(false),
            v6: node.address(true),
        };
        let (name, target) = (far.name.clone(), SocketAddr::new(far.address(false), PORT));
        self.must_answer(&from, Protocol::Tcp, target, &name)?;
        let from = Asker::pod(self.pod(0, 0)?);
        for v6 in self.families() {
            let (name, target) = self.whom(1, 0, v6)?;
            self.must_not_answer(&from, target, &name, "no reply or unreachable")?;
        }
        Ok(())
    }

    fn inside_one_pod(&mut self) -> Result<(), DemoError> {
        self.open(
            "Two containers of one pod talk over localhost",
            "They share the pod's network; nothing of Warren is in between, and no other pod can listen in.",
        );
        let pod = self.pod(0, 0)?;
        let (from, name) = (Asker::beside(pod), format!("{}'s sidecar", pod.name));
        let holder = pod.holder.pid();
        let on: Vec<_> = self.families().map(|v6| SocketAddr::new(from.address(v6), SIDECAR_PORT)).collect();
        let _sidecar = Process::serve(&name, holder, &on, false)?;
        for &target in &on {
            self.must_answer(&from, Protocol::Tcp, target, &name)?;
            self.must_answer(&from, Protocol::Udp, target, &name)?;
        }
        let neighbour = Asker::pod(self.pod(0, 1)?);
        let outside = SocketAddr::new(self.pod(0, 0)?.address(false), SIDECAR_PORT);
        self.must_not_answer(&neighbour, outside, &name, "connection refused")
    }

    fn on_one_node(&mut self) -> Result<(), DemoError> {
        self.open(
            "Two pods of one node talk over the node's bridge",
            "The kernel carries it from veth to veth; it never enters userspace.",
        );
        self.all_protocols((0, 0), (0, 1))
    }

    fn across_nodes(&mut self, encap: Encap) -> Result<(), DemoError> {
        let (title, explanation) = match encap {
            Encap::WireGuard => (
                "Pods on different nodes talk through WireGuard",
                "Encrypted by Warren in userspace. No NAT: the server sees the client pod's own address.",
            ),
            Encap::Vxlan => (
                "Pods on different nodes talk through VXLAN",
                "Plain, for networks that are trusted. No NAT here either.",
            ),
        };
        self.open(title, explanation);
        let eavesdropper = self.start_eavesdropper(encap)?;
        self.all_protocols((0, 0), (1, 0))?;
        let nodes = self.world.nodes.len();
        for from in 1..nodes {
            let to = (from + 1) % nodes;
            let asker = Asker::pod(self.pod(from, 1)?);
            let (name, target) = self.whom(to, 1, self.world.v6 && from % 2 == 1)?;
            self.must_answer(&asker, Protocol::Tcp, target, &name)?;
        }
        self.hear_eavesdropper(eavesdropper, encap)
    }

    /// Listens on the network between the nodes: that the pods' packets arrive does not say how they went.
    fn start_eavesdropper(&self, encap: Encap) -> Result<Process, DemoError> {
        let (port, ports) = match encap {
            Encap::WireGuard => (agents::WIREGUARD_PORT, MAX_LANES),
            Encap::Vxlan => (agents::VXLAN_PORT, 1),
        };
        let mut command = ourselves(None);
        command.args(["eavesdrop", "--pods", CLUSTER_RANGES, "--tunnel", encap.name()]);
        command.args(["--port", &port.to_string(), "--ports", &ports.to_string()]);
        Process::start(command, "the eavesdropper", "listening")
    }

    fn hear_eavesdropper(&mut self, mut process: Process, encap: Encap) -> Result<(), DemoError> {
        // The end of its input asks for its answer.
        drop(process.0.stdin.take());
        let heard = self.answer_of::<Overheard>(process, "the eavesdropper", "hearing the eavesdropper")?;
        let ok = heard.as_ref().is_ok_and(|heard| heard.tunnel > 0 && heard.clear == 0);
        let name = match encap {
            Encap::WireGuard => "WireGuard",
            Encap::Vxlan => "VXLAN",
        };
        let seen = match heard {
            Ok(Overheard { tunnel, clear: 0, .. }) => {
                format!("{tunnel} {name} packets, no pod's address outside")
            }
            Ok(Overheard { tunnel, clear, example }) => {
                let example = example.unwrap_or_default();
                format!("{tunnel} {name} packets, but {clear} with a pod's address, as {example}")
            }
            Err(error) => error,
        };
        let expected = format!("{name} packets only, no pod's address outside");
        let check = Check { what: "who listens between the nodes sees".into(), expected, seen, ok };
        self.report.check(check, clock::now());
        Ok(())
    }

    fn pod_replaced(&mut self) -> Result<(), DemoError> {
        self.open(
            "A pod is killed and replaced",
            "As a Deployment would do it: the old address falls silent, the new pod answers on a new one.",
        );
        let from = Asker::pod(self.pod(0, 0)?);
        let (name, target) = self.whom(1, 1, false)?;
        self.must_answer(&from, Protocol::Tcp, target, &name)?;
        self.world.kill_pod(1, 1)?;
        services::write(&self.world)?;
        self.must_not_answer(&from, target, &format!("{name}, killed,"), "no reply or unreachable")?;
        self.world.add_pod(1)?;
        services::write(&self.world)?;
        for v6 in self.families() {
            let (name, target) = self.whom(1, 1, v6)?;
            self.must_answer(&from, Protocol::Tcp, target, &name)?;
        }
        let back = Asker::pod(self.pod(1, 1)?);
        let (name, target) = self.whom(0, 0, false)?;
        self.must_answer(&back, Protocol::Udp, target, &name)
    }

    /// Throughput and latency; the first time of the bare underlay too, for comparison.
    fn measure(&mut self, encap: Encap) -> Result<(), DemoError> {
        let title = match encap {
            Encap::WireGuard => "How fast is that through WireGuard?",
            Encap::Vxlan => "How fast is that through VXLAN?",
        };
        let seconds = (THROUGHPUT_MS + LATENCY_MS * LATENCY_TRIES as u64).div_ceil(1000);
        self.open(
            title,
            &format!("One TCP connection, all nodes on this one machine; {seconds} s a measurement."),
        );
        if !self.report.has_figures() {
            let (near, far) = (self.node(0)?, self.node(1)?);
            let (holder, target) = (near.holder.pid(), SocketAddr::new(far.address(false), PORT));
            self.measure_path("node to node, bare", holder, target, self.world.options.mtu)?;
        }
        let (_, target) = self.whom(1, 0, false)?;
        let (holder, mtu) = (self.pod(0, 0)?.holder.pid(), self.node(0)?.pod_mtu);
        self.measure_path(&format!("pod to pod, {}", encap.name()), holder, target, mtu)
    }

    fn measure_path(
        &mut self,
        path: &str,
        holder: u32,
        target: SocketAddr,
        mtu: u16,
    ) -> Result<(), DemoError> {
        let (seen, ok) = match self.throughput_and_latency(path, holder, target)? {
            Ok((sunk, trips)) => {
                let figure = Figure {
                    path: path.into(),
                    gbit_per_second: sunk.bytes as f64 * 8.0 / 1000.0 / sunk.micros.max(1) as f64,
                    round_trip_p50_us: trips.p50 as f64 / 1000.0,
                    round_trip_p99_us: trips.p99 as f64 / 1000.0,
                    mtu,
                };
                let (rate, trip) = (figure.gbit_per_second, figure.round_trip_p50_us);
                self.report.figure(figure);
                (format!("{rate:.2} Gbit/s, {trip:.0} us there and back"), sunk.bytes > 0)
            }
            Err(error) => (error, false),
        };
        let check = Check { what: path.into(), expected: "a figure".into(), seen, ok };
        self.report.check(check, clock::now());
        Ok(())
    }

    fn throughput_and_latency(
        &mut self,
        path: &str,
        holder: u32,
        target: SocketAddr,
    ) -> Result<Result<(Sunk, RoundTrips), String>, DemoError> {
        let waiting = format!("measuring {path}");
        let words =
            |tool: &str, ms: u64| [tool.into(), target.to_string(), "--for-ms".into(), ms.to_string()];
        let sunk = match self.tool::<Sunk>(holder, &words("throughput", THROUGHPUT_MS), &waiting)? {
            Ok(sunk) => sunk,
            Err(error) => return Ok(Err(error)),
        };
        let mut best: Option<RoundTrips> = None;
        for _ in 0..LATENCY_TRIES {
            match self.tool::<RoundTrips>(holder, &words("latency", LATENCY_MS), &waiting)? {
                Ok(new) if best.is_none_or(|best| new.p50 < best.p50) => best = Some(new),
                Ok(_) => {}
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(best.map(|trips| (sunk, trips)).ok_or_else(|| "not measured".into()))
    }

    fn compare(&mut self) {
        self.report.say("");
        self.report.headline("What the tunnel costs, beside the bare network between the nodes");
        self.report.say_figures();
    }

    fn start_agents(&mut self, encap: Encap) -> Result<(), DemoError> {
        let report = &mut self.report;
        let restart = self.world.nodes.iter().any(|node| node.agent.is_some());
        let verb = if restart { "restart with" } else { "start:" };
        report.say("");
        report.say(&format!("The agents {verb} `warren agent --encap {}`, one per node.", encap.name()));
        agents::stop(&mut self.world, || report.waiting("waiting for the agents to stop", clock::now()))?;
        agents::start(&mut self.world, encap, || report.waiting("waiting for the agents", clock::now()))
    }

    fn keep(&mut self, options: &DemoOptions, all_well: bool) -> Result<(), DemoError> {
        if let [first, _, ..] = options.encap.shown() {
            // Back to the default; a failure has been reported by the scenes.
            if let Err(error) = self.start_agents(*first) {
                self.report.say(&error.to_string());
            }
        }
        let (first, far) = (self.pod(0, 0)?, self.pod(1, 0)?);
        let (pod, socket) = (&first.name, far.socket(false));
        let (name, node) = (services::short_name(), self.node(0)?.address(false));
        let tries = [
            (pod.clone(), "a shell in that pod"),
            (format!("{pod} ping {}", far.v4), "where ping is installed"),
            (format!("{pod} curl http://{socket}"), "where curl is"),
            (format!("{pod} warren demo internal ask tcp {socket}"), ""),
            (format!("{pod} warren demo internal ask tcp {name}:{}", services::PORT), "by its name in DNS"),
            (
                format!("{} curl http://{node}:{}", Outside::NAME, services::NODE_PORT),
                "from no node of the mesh",
            ),
            ("node1".to_owned(), "a shell on that node; try: ip route; warren status"),
            (format!("node1 cat {FOLDER}/nodes/node1/agent.log"), ""),
            (format!("node1 ls {FOLDER}/cluster"), "what the agents watch"),
        ];
        let (program, width) = (called(), tries.iter().map(|(what, _)| what.len()).max().unwrap_or(0));
        self.report.say("");
        self.report.say("The nodes and pods stay up. From another terminal:");
        for (what, note) in tries {
            self.report.say(format!("  {program} demo enter {what:width$}  {note}").trim_end());
        }
        self.report.say(&format!("Remove it with Ctrl-C here, or: {program} demo stop"));
        let bin = format!("{FOLDER}/bin");
        fs::create_dir_all(&bin).map_err(|e| DemoError::system(format!("making {bin}"), e))?;
        // The first process of the PID namespace is us: the program is there even if its file is not.
        symlink("/proc/1/exe", format!("{bin}/warren"))
            .map_err(|e| DemoError::system("linking warren", e))?;
        sandbox::report_kept(all_well);
        loop {
            std::thread::sleep(Duration::from_millis(500));
            if let Err(error) = agents::all_there(&mut self.world) {
                self.report.say(&format!("{error}"));
                self.world.nodes.iter_mut().for_each(drop_ended_agent);
            }
            reap_strangers(&self.world);
        }
    }
}

fn drop_ended_agent(node: &mut Node) {
    if node.agent.as_mut().is_some_and(|agent| !matches!(agent.0.try_wait(), Ok(None))) {
        node.agent = None;
    }
}

/// How a person calls this program: by its name where the PATH leads to it, else by its path from here.
fn called() -> String {
    let named = || "warren".to_owned();
    let Ok(program) = env::current_exe().and_then(fs::canonicalize) else { return named() };
    let leads_here = |folder: PathBuf| fs::canonicalize(folder.join("warren")).is_ok_and(|at| at == program);
    if env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(leads_here)) {
        return named();
    }
    let here = env::current_dir().and_then(fs::canonicalize).ok();
    match here.and_then(|here| program.strip_prefix(here).ok()) {
        Some(below) => format!("./{}", below.display()),
        None => program.display().to_string(),
    }
}

/// We are the first process of the namespace: orphans of shells that entered it end up with us.
fn reap_strangers(world: &World) {
    let agents: HashSet<i32> = world
        .nodes
        .iter()
        .filter_map(|node| node.agent.as_ref())
        .filter_map(|agent| i32::try_from(agent.0.id()).ok())
        .collect();
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, look) {
        let Some(pid) = status.pid() else { return };
        // An agent's end is for `all_there` to find.
        if agents.contains(&pid.as_raw()) || waitpid(pid, Some(WaitPidFlag::WNOHANG)).is_err() {
            return;
        }
    }
}
