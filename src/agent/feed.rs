//! Where objects come from and where this node's announcement goes: a folder, or Kubernetes.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{interval, timeout};
use tracing::info;

use super::error::reasons;
use super::health::Answers;
use super::{AgentError, FIRST_LIST, NODE_PATIENCE, alive, missing};
use crate::config::{AgentConfig, ServicesArg, SourceSpec};
use crate::state::compile::HostPlan;
use crate::state::publish::events::Teller;
use crate::state::publish::node::NodeKeeper;
use crate::state::publish::{Announcer, Publisher};
use crate::state::run::{Clock, Outputs};
use crate::state::source::SourceEvent;
use crate::state::source::dir::DirSource;
use crate::state::source::kube::{Cluster, Contact, KubeSource};
use crate::status::Handle;

/// How often it is said that we still wait, when it is for the same.
const STILL: u32 = 12;

/// What was started.
pub(super) struct Feed {
    /// For the state line.
    pub(super) announcer: Option<Announcer>,
    pub(super) tasks: Vec<JoinHandle<()>>,
    /// Says that packets flow.
    pub(super) ready: watch::Sender<bool>,
    /// Whether the API server answers, where there is one.
    pub(super) contact: Option<watch::Receiver<Contact>>,
}

/// Starts the source, and whoever tells Kubernetes what this node has to say.
pub(super) fn start(
    config: &AgentConfig,
    outputs: &Outputs,
    events: mpsc::Sender<SourceEvent>,
    clock: Clock,
) -> Feed {
    let (ready, is_ready) = watch::channel(false);
    let mut contact = None;
    let (announcer, tasks) = match &config.source {
        None => (None, Vec::new()), // only with --cleanup, which reads no objects
        Some(SourceSpec::Dir(folder)) => {
            let publisher = Publisher::new(folder, &config.node);
            (Some(Announcer::Folder(publisher)), vec![tokio::spawn(DirSource::new(folder).run(events))])
        }
        Some(SourceSpec::Kube) => {
            let cluster = Cluster::new(config.access.clone(), clock.wall);
            contact = Some(cluster.contact());
            let services = config.services != ServicesArg::Off;
            let (source, own) = KubeSource::new(cluster.clone(), &config.node, services);
            let (announcement, wanted) = watch::channel(None);
            let keeper = NodeKeeper {
                cluster: cluster.clone(),
                node: config.node.clone(),
                own,
                wanted,
                ready: is_ready,
                events: events.downgrade(),
                clock,
            };
            let teller = Teller {
                cluster,
                node: config.node.clone(),
                report: outputs.report.clone(),
                snapshot: Arc::clone(&outputs.snapshot),
                clock,
            };
            let tasks = vec![
                tokio::spawn(source.run(events)),
                tokio::spawn(keeper.run()),
                tokio::spawn(teller.run()),
            ];
            (Some(Announcer::Kubernetes(announcement)), tasks)
        }
    };
    Feed { announcer, tasks, ready, contact }
}

/// Waits for the first plan that names pods of ours; says what it waits for. A folder without this node is a mistake.
/// A Node of Kubernetes comes when the kubelet registers, and its range after that.
pub(super) async fn first_plan(
    config: &AgentConfig,
    outputs: &mut Outputs,
    probe: &watch::Sender<Answers>,
    handle: &Handle,
) -> Result<Arc<HostPlan>, AgentError> {
    let mut waits = interval(FIRST_LIST);
    waits.tick().await;
    let (mut said, mut still) = (String::new(), 0_u32);
    loop {
        let current = outputs.plan.borrow_and_update().clone();
        if let Some(plan) = current.filter(|plan| !plan.pod_ranges.is_empty()) {
            return Ok(plan);
        }
        let report = outputs.report.borrow_and_update().clone();
        if report.listed && !waits_for_its_node(config) {
            // A file that is being written may become whole in a moment.
            let better = timeout(NODE_PATIENCE, async {
                while outputs.plan.borrow_and_update().as_ref().is_none_or(|p| p.pod_ranges.is_empty()) {
                    alive(outputs.plan.changed().await)?;
                }
                Ok::<(), AgentError>(())
            });
            match better.await {
                Ok(result) => result?,
                Err(_) => return Err(missing(config, outputs)),
            }
            continue;
        }
        let waiting = waiting_for(config, outputs);
        if probe.borrow().not_ready.as_ref() != Some(&waiting) {
            probe.send_modify(|answers| answers.not_ready = Some(waiting.clone()));
            handle.update(|live| live.not_ready = Some(waiting.clone()));
        }
        tokio::select! {
            changed = outputs.plan.changed() => alive(changed)?,
            changed = outputs.report.changed() => alive(changed)?,
            _ = waits.tick() => {
                let waiting = waiting_for(config, outputs);
                still = if waiting == said { still + 1 } else { 0 };
                if still.is_multiple_of(STILL) {
                    info!("{waiting}");
                }
                said = waiting;
            }
        }
    }
}

fn waits_for_its_node(config: &AgentConfig) -> bool {
    match &config.source {
        Some(SourceSpec::Kube) => true,
        Some(SourceSpec::Dir(_)) | None => false,
    }
}

fn waiting_for(config: &AgentConfig, outputs: &Outputs) -> String {
    let (node, report) = (&config.node, outputs.report.borrow().clone());
    let about = format!("Node/{node}");
    if !report.listed {
        let why = reasons(&report.problems.iter().map(ToString::to_string).collect::<Vec<_>>());
        return format!("waiting for the first full list of objects from {}{why}", source_name(config));
    }
    if report.nodes <= outputs.snapshot.load().mesh.peers.iter().flatten().count() {
        return format!("waiting for Node {node}: the kubelet makes it; is --node right?");
    }
    // Wrong ranges are named; that there are none is what we are saying.
    let wrong = report.problems.iter().filter(|p| p.subject == about && p.field.contains('['));
    let why = reasons(&wrong.map(ToString::to_string).collect::<Vec<_>>());
    format!(
        "waiting for spec.podCIDRs of Node {node}: the controller manager gives them with --allocate-node-cidrs{why}"
    )
}

/// Where the objects come from, in words.
pub(super) fn source_name(config: &AgentConfig) -> String {
    match &config.source {
        Some(SourceSpec::Dir(path)) => path.display().to_string(),
        Some(SourceSpec::Kube) => "the Kubernetes API".to_owned(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::config::{Cli, Command};
    use crate::state::run::StateLine;
    use crate::state::source::{Kind, manifest};

    #[test]
    fn what_is_waited_for_is_said() {
        let line = ["warren", "agent", "--source", "kube", "--node", "a"];
        let Command::Agent(args) = Cli::try_parse_from(line).unwrap().command else { panic!() };
        let config = AgentConfig::resolve(*args).unwrap();
        let (mut line, outputs) = StateLine::new(config.settings(&[[1; 32]], [2; 6], 1500), None);
        let mut list = |kind, text: &str| {
            let objects = manifest::parse(text.as_bytes(), false).objects;
            line.handle(SourceEvent::Reset { kind, objects, complete: true, unread: Vec::new() });
            line.compile();
            waiting_for(&config, &outputs)
        };
        let first = list(Kind::ServiceCidr, "");
        assert!(first.contains("first full list of objects from the Kubernetes API"), "{first}");
        let node = |name: &str, spec: &str| {
            format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n---\n")
        };
        let other = node("b", "podCIDRs: [10.244.2.0/24]");
        let none = list(Kind::Node, &other);
        assert!(none.contains("waiting for Node a: the kubelet makes it"), "{none}");
        let bare = list(Kind::Node, &(node("a", "") + &other));
        assert!(bare.contains("waiting for spec.podCIDRs of Node a: the controller manager"), "{bare}");
        assert!(bare.ends_with("--allocate-node-cidrs"), "nothing is wrong: {bare}");
        let wrong = list(Kind::Node, &(node("a", "podCIDRs: [10.244.1.0/33]") + &other));
        assert!(wrong.contains("--allocate-node-cidrs") && wrong.contains("10.244.1.0/33"), "{wrong}");
    }
}
