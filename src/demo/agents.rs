//! One agent per node: the same `warren agent` that runs on real machines, fed from a folder of Node objects.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

use super::DemoError;
use super::sandbox::{FOLDER, OURSELVES};
use super::services::SERVICE_RANGES;
use super::world::{CLUSTER_RANGES, Node, Process, World, ourselves};
use crate::io::clock;
use crate::snapshot::Encap;

/// WireGuard's usual port; every node has its own network, so all may use it.
pub(super) const WIREGUARD_PORT: u16 = 51820;
/// Flannel's and the kernel's VXLAN port, the agent's default.
pub(super) const VXLAN_PORT: u16 = 8472;
/// An agent that needs longer has a problem.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// Then each node's pods get what its own agent says: on a real cluster nodes may well differ.
const AGREED_WITHIN: Duration = Duration::from_secs(2);
/// After that it is killed.
const STOPPED_WITHIN: Duration = Duration::from_secs(5);
/// How often we look.
const PAUSE: Duration = Duration::from_millis(20);
/// How much of a log is shown when something went wrong.
const TAIL: usize = 2000;

/// What an agent writes to `<run-dir>/ready` once packets flow. Newer ones may say more.
#[derive(Debug, Deserialize)]
struct Ready {
    pod_mtu: u16,
}

/// The folder all agents watch.
pub(super) fn cluster_folder() -> PathBuf {
    Path::new(FOLDER).join("cluster")
}

/// Writes the Node objects that a cluster's control plane would hold.
pub(super) fn write_nodes(world: &World) -> Result<(), DemoError> {
    let folder = cluster_folder();
    fs::create_dir_all(&folder).map_err(|e| DemoError::system("making the folder of objects", e))?;
    for node in &world.nodes {
        let path = folder.join(format!("{}.yaml", node.name));
        fs::write(&path, node_object(node, world.v6))
            .map_err(|e| DemoError::system(format!("writing {}", path.display()), e))?;
    }
    Ok(())
}

/// Starts an agent on every node and waits until packets flow; gives the pods their MTU.
pub(super) fn start(world: &mut World, encap: Encap, mut tick: impl FnMut()) -> Result<(), DemoError> {
    for node in &mut world.nodes {
        node.agent = Some(start_one(node, encap)?);
    }
    let deadline = clock::now() + READY_WITHIN;
    for node in &mut world.nodes {
        while read_ready(node).is_none() {
            still_there(node)?;
            if clock::now() >= deadline {
                return Err(failed(node, format!("was not ready after {} s", READY_WITHIN.as_secs())));
            }
            tick();
            std::thread::sleep(PAUSE);
        }
    }
    // What an agent says first may rest on what another said before a restart: wait until all say the same.
    let deadline = clock::now() + AGREED_WITHIN;
    let mut said = all_say(world);
    while said.windows(2).any(|pair| pair[0] != pair[1]) && clock::now() < deadline {
        tick();
        std::thread::sleep(PAUSE);
        said = all_say(world);
    }
    said.into_iter().enumerate().try_for_each(|(node, mtu)| world.set_pod_mtu(node, mtu))
}

/// The pod MTU of every node; where a file is just being replaced, what its pods have.
fn all_say(world: &World) -> Vec<u16> {
    world.nodes.iter().map(|node| read_ready(node).map_or(node.pod_mtu, |ready| ready.pod_mtu)).collect()
}

/// Stops all agents, politely first.
pub(super) fn stop(world: &mut World, mut tick: impl FnMut()) -> Result<(), DemoError> {
    for agent in world.nodes.iter().filter_map(|node| node.agent.as_ref()) {
        if let Ok(pid) = i32::try_from(agent.0.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
    let deadline = clock::now() + STOPPED_WITHIN;
    for node in &mut world.nodes {
        let Some(mut agent) = node.agent.take() else { continue };
        while clock::now() < deadline && matches!(agent.0.try_wait(), Ok(None)) {
            tick();
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// An error if an agent has ended by itself.
pub(super) fn all_there(world: &mut World) -> Result<(), DemoError> {
    world.nodes.iter_mut().try_for_each(still_there)
}

fn start_one(node: &Node, encap: Encap) -> Result<Process, DemoError> {
    // A stale one would tell us of the agent before this one.
    let _ = fs::remove_file(ready_path(node));
    let log = File::options()
        .create(true)
        .append(true)
        .open(log_path(node))
        .map_err(|e| DemoError::system(format!("opening the log of {}", node.name), e))?;
    let log_too = log.try_clone().map_err(|e| DemoError::system("duplicating a log", e))?;
    let mut command = ourselves(Some(node.holder.pid()));
    // The agents are the demo's: what is set for another one must not reach them.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"WARREN_")) {
        command.env_remove(name);
    }
    let child = command
        .args(["exec", OURSELVES, "agent", "--node", &node.name, "--encap", encap.name()])
        .arg("--source")
        .arg(format!("dir:{}", cluster_folder().display()))
        .arg("--state-dir")
        .arg(node.folder().join("state"))
        // In the node's own /run, where `warren status` looks.
        .args(["--run-dir", "/run/warren"])
        .args(["--port", &WIREGUARD_PORT.to_string(), "--cluster-cidr", CLUSTER_RANGES])
        .args(["--services", "on", "--service-cidr", SERVICE_RANGES])
        // The log is a file.
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        .spawn()
        .map_err(|e| DemoError::system(format!("starting the agent of {}", node.name), e))?;
    Ok(Process(child))
}

fn read_ready(node: &Node) -> Option<Ready> {
    serde_json::from_slice(&fs::read(ready_path(node)).ok()?).ok()
}

fn still_there(node: &mut Node) -> Result<(), DemoError> {
    let Some(agent) = node.agent.as_mut() else { return Ok(()) };
    match agent.0.try_wait() {
        Ok(None) => Ok(()),
        Ok(Some(status)) => Err(failed(node, format!("ended by itself ({status})"))),
        Err(e) => Err(DemoError::system("looking after an agent", e)),
    }
}

fn failed(node: &Node, what: String) -> DemoError {
    DemoError::Process { who: format!("the agent of {}", node.name), what, log: log_tail(&log_path(node)) }
}

fn ready_path(node: &Node) -> PathBuf {
    node.folder().join("run/warren/ready")
}

fn log_path(node: &Node) -> PathBuf {
    node.folder().join("agent.log")
}

fn log_tail(path: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL as u64)))?;
        let mut end = Vec::new();
        file.take(TAIL as u64).read_to_end(&mut end)?;
        Ok(end)
    };
    read().map(|end| String::from_utf8_lossy(&end).trim_end().to_string()).unwrap_or_default()
}

fn node_object(node: &Node, v6: bool) -> String {
    let ranges = node.pod_ranges(v6);
    let mut addresses = vec![("InternalIP", node.address(false).to_string())];
    addresses.extend(v6.then(|| ("InternalIP", node.address(true).to_string())));
    addresses.push(("Hostname", node.name.clone()));
    let listed = |lines: Vec<String>| lines.concat();
    format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\n  labels:\n    kubernetes.io/hostname: {name}\n\
         spec:\n  podCIDR: {first}\n  podCIDRs:\n{ranges}status:\n  addresses:\n{addresses}",
        name = node.name,
        first = ranges.first().map_or("", String::as_str),
        ranges = listed(ranges.iter().map(|range| format!("  - {range}\n")).collect()),
        addresses = listed(
            addresses
                .iter()
                .map(|(kind, value)| format!("  - type: {kind}\n    address: {value}\n"))
                .collect()
        ),
    )
}
