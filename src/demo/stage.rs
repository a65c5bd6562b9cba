//! Where the scenes are played: the world, the report, and the ways to try whether one place reaches another.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::DemoError;
use super::report::{Check, Report};
use super::traffic::{Answer, Protocol};
use super::world::{Node, Pod, Process, World, ourselves};
use crate::io::clock;

/// Where there is a way, an answer takes no longer, tunnel set-up included.
const ANSWER_WITHIN_MS: u64 = 8000;
/// Where there is none, we wait no longer to say so.
const SILENCE_MS: u64 = 500;
/// How often we look whether a process has ended.
const PAUSE: Duration = Duration::from_millis(5);

/// Where the scenes are played.
pub(super) struct Stage {
    /// Nodes and pods.
    pub world: World,
    /// What is said.
    pub report: Report,
}

/// Who asks: a name to say and a process whose namespaces to join.
#[derive(Clone)]
pub(super) struct Asker {
    /// What to call it.
    pub name: String,
    /// The process that keeps its namespaces.
    pub holder: u32,
    /// What a server has to see.
    pub v4: IpAddr,
    /// And over IPv6.
    pub v6: IpAddr,
}

impl Asker {
    /// A pod's own container.
    pub(super) fn pod(pod: &Pod) -> Asker {
        Asker { name: pod.name.clone(), holder: pod.holder.pid(), v4: pod.v4.into(), v6: pod.v6.into() }
    }

    /// A second container of the same pod: it talks over loopback.
    pub(super) fn beside(pod: &Pod) -> Asker {
        Asker { v4: Ipv4Addr::LOCALHOST.into(), v6: Ipv6Addr::LOCALHOST.into(), ..Asker::pod(pod) }
    }

    /// Of one family.
    pub(super) fn address(&self, v6: bool) -> IpAddr {
        if v6 { self.v6 } else { self.v4 }
    }
}

impl Stage {
    pub(super) fn all_protocols(
        &mut self,
        from: (usize, usize),
        to: (usize, usize),
    ) -> Result<(), DemoError> {
        let asker = Asker::pod(self.pod(from.0, from.1)?);
        for v6 in self.families() {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
                let (name, target) = self.whom(to.0, to.1, v6)?;
                let ok = self.must_answer(&asker, protocol, target, &name);
                if from.0 != to.0 && self.report.last_ok() {
                    self.report.cross_node_reply(clock::now());
                }
                ok?;
            }
        }
        Ok(())
    }

    /// The named server has to answer, and to have seen the asker's own address.
    pub(super) fn must_answer(
        &mut self,
        from: &Asker,
        protocol: Protocol,
        target: SocketAddr,
        name: &str,
    ) -> Result<(), DemoError> {
        let own = from.address(target.is_ipv6());
        let heard = self.ask(from, protocol, target, ANSWER_WITHIN_MS)?;
        let ok = heard.as_ref().is_ok_and(|answer| answer.by == name && answer.saw == own);
        let seen = match &heard {
            Ok(answer) if ok => {
                format!("server saw {} ({:.1} ms)", answer.saw, answer.micros as f64 / 1000.0)
            }
            Ok(answer) => format!("{} answered, and saw {}", answer.by, answer.saw),
            Err(error) => error.clone(),
        };
        let what = format!("{:4} {} -> {}", protocol.name(), from.name, place(protocol, target, name));
        let expected = format!("{name} answers, and saw {own}");
        self.report.check(Check { what, expected, seen, ok }, clock::now());
        Ok(())
    }

    /// Nobody may answer there.
    pub(super) fn must_not_answer(
        &mut self,
        from: &Asker,
        target: SocketAddr,
        name: &str,
        expected: &str,
    ) -> Result<(), DemoError> {
        let heard = self.ask(from, Protocol::Tcp, target, 0)?;
        let ok = heard.as_ref().is_err_and(|error| expected.contains(error.as_str()));
        let seen = match heard {
            Ok(answer) => format!("{} answered", answer.by),
            Err(error) if ok => format!("{error}, as it should be"),
            Err(error) => error,
        };
        let what = format!("TCP  {} -> {}", from.name, place(Protocol::Tcp, target, name));
        self.report.check(Check { what, expected: expected.into(), seen, ok }, clock::now());
        Ok(())
    }

    pub(super) fn ask(
        &mut self,
        from: &Asker,
        protocol: Protocol,
        target: SocketAddr,
        retry_ms: u64,
    ) -> Result<Result<Answer, String>, DemoError> {
        let timeout = if retry_ms == 0 { SILENCE_MS } else { 1000 };
        let words = [
            "ask".into(),
            protocol.flag().into(),
            target.to_string(),
            "--timeout-ms".into(),
            timeout.to_string(),
            "--retry-ms".into(),
            retry_ms.to_string(),
        ];
        self.tool(from.holder, &words, &format!("{} asks {target}", from.name))
    }

    /// Runs one of our small programs in a pod or node and reads what it says.
    pub(super) fn tool<T: DeserializeOwned>(
        &mut self,
        holder: u32,
        words: &[String],
        waiting: &str,
    ) -> Result<Result<T, String>, DemoError> {
        let doing = || format!("running {}", words.join(" "));
        let child = ourselves(Some(holder))
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| DemoError::system(doing(), e))?;
        self.answer_of(Process(child), &words.join(" "), waiting)
    }

    /// Waits for the end of one of our small programs, and reads what it said.
    pub(super) fn answer_of<T: DeserializeOwned>(
        &mut self,
        mut process: Process,
        who: &str,
        waiting: &str,
    ) -> Result<Result<T, String>, DemoError> {
        let wrong = |e| DemoError::system(format!("running {who}"), e);
        // What it says is shorter than a pipe is long: it can end before we read.
        while process.0.try_wait().map_err(wrong)?.is_none() {
            self.report.waiting(waiting, clock::now());
            std::thread::sleep(PAUSE);
        }
        let mut line = String::new();
        if let Some(out) = process.0.stdout.as_mut() {
            out.read_to_string(&mut line).map_err(wrong)?;
        }
        serde_json::from_str(&line).map_err(|_| DemoError::Process {
            who: who.into(),
            what: "gave no answer that can be read".into(),
            log: line,
        })
    }

    pub(super) fn open(&mut self, title: &str, explanation: &str) {
        self.report.scene(title, explanation, clock::now());
    }

    pub(super) fn families(&self) -> impl Iterator<Item = bool> + use<> {
        [false, true].into_iter().take(if self.world.v6 { 2 } else { 1 })
    }

    pub(super) fn whom(&self, node: usize, pod: usize, v6: bool) -> Result<(String, SocketAddr), DemoError> {
        let pod = self.pod(node, pod)?;
        Ok((pod.name.clone(), pod.socket(v6)))
    }

    pub(super) fn node(&self, index: usize) -> Result<&Node, DemoError> {
        self.world.nodes.get(index).ok_or_else(|| DemoError::Usage(format!("there is no node {}", index + 1)))
    }

    pub(super) fn pod(&self, node: usize, pod: usize) -> Result<&Pod, DemoError> {
        let missing = || DemoError::Usage(format!("node {} has no such pod", node + 1));
        self.node(node)?.pods.get(pod).ok_or_else(missing)
    }
}

fn place(protocol: Protocol, target: SocketAddr, name: &str) -> String {
    match protocol {
        Protocol::Tcp | Protocol::Udp => format!("{name} {target}"),
        Protocol::Icmp => format!("{name} {}", target.ip()),
    }
}
