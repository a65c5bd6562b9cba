//! One agent per network namespace, and the files that say it is there.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};
use rtnetlink::Handle;
use tokio::time::sleep;
use tracing::{info, warn};

use super::AgentError;
use crate::cni::conflist::NETWORK;
use crate::config::AgentConfig;
use crate::io::underlay;
use crate::status::server;
use crate::status::socket::{OwnedSocket, SocketError};

/// How often one that stands by looks whether it may go on: packets wait for that.
const STANDBY_LOOK: Duration = Duration::from_millis(10);
/// After how many looks it asks again.
const ASK_EVERY: u64 = 100;
/// Written in the run directory by who asks.
const SUCCESSOR: &str = "successor";

/// Fails where not even the attempt makes sense, before a folder's permissions speak of something else.
pub(super) fn may_administrate() -> Result<(), AgentError> {
    /// linux/capability.h
    const CAP_NET_ADMIN: u32 = 12;
    let Ok(status) = fs::read_to_string("/proc/self/status") else { return Ok(()) };
    match capabilities(&status) {
        Some(effective) if effective & (1 << CAP_NET_ADMIN) == 0 => Err(AgentError::NotRoot),
        Some(_) | None => Ok(()),
    }
}

/// The effective ones (proc_pid_status(5)).
fn capabilities(status: &str) -> Option<u64> {
    let text = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(text.trim(), 16).ok()
}

/// Takes the run directory. If another agent has it and we may stand by, its end is waited for: what it leaves in the
/// kernel and in the directory is ours then, after no more time than it takes to start. With `ask` it is told that we
/// are here, and steps aside if it may stand by itself: should we fail, it goes on where we ended.
pub(super) async fn turn(config: &AgentConfig, ask: bool) -> Result<OwnedSocket, AgentError> {
    let successor = config.run_dir.join(SUCCESSOR);
    let mut waited = 0_u64;
    loop {
        match server::bind(&config.run_dir) {
            Err(SocketError::InUse { .. }) if config.standby => {}
            outcome => {
                let socket = outcome?;
                if waited > 0 {
                    // The descriptors of one that was killed are closed one after the other.
                    sleep(STANDBY_LOOK).await;
                }
                let _ = fs::remove_file(successor);
                return Ok(socket);
            }
        }
        if waited == 0 {
            info!("another agent is running; standing by until it ends");
        }
        // Again, because one that is just starting does not listen yet.
        if ask && waited.is_multiple_of(ASK_EVERY) {
            fs::write(&successor, "").map_err(|source| AgentError::Io {
                what: "cannot write the file `successor` in the run directory",
                source,
            })?;
        }
        waited += 1;
        sleep(STANDBY_LOOK).await;
    }
}

/// Ends when another agent has asked for our place, in this run directory; where there is none, never. Where nobody can
/// be heard, that one waits for our end.
pub(super) async fn asked(run_dir: Option<PathBuf>) {
    match run_dir.map(|run_dir| successors(&run_dir)) {
        Some(Ok(mut events)) => {
            while let Some(Ok(event)) = events.next().await {
                if event.name.as_deref() == Some(OsStr::new(SUCCESSOR)) {
                    return;
                }
            }
        }
        Some(Err(error)) => warn!("an agent that is to take over will not be heard: {error}"),
        None => {}
    }
    std::future::pending().await
}

fn successors(run_dir: &Path) -> io::Result<EventStream<[u8; 1024]>> {
    let inotify = Inotify::init()?;
    inotify.watches().add(run_dir, WatchMask::CLOSE_WRITE)?;
    inotify.into_event_stream([0; 1024])
}

/// Fails if another agent runs in this network namespace, with this device or with another one: routes, rules and
/// the nft table are one for all, and two would undo each other's. The lock in the run directory does not tell
/// when theirs is another one; the kernel knows, and only who may administrate the network can make it say so.
pub(super) async fn nobody_is_here(netlink: &Handle, tun: &str) -> Result<(), AgentError> {
    only_we_have(netlink, tun, 0).await?;
    match underlay::other_agents_tunnel(netlink, tun).await? {
        Some(other) => Err(AgentError::DeviceInUse(other)),
        None => Ok(()),
    }
}

/// Fails if anybody but us has queues of the device, of which we have `ours`.
pub(super) async fn only_we_have(netlink: &Handle, tun: &str, ours: usize) -> Result<(), AgentError> {
    let tunnels = underlay::tunnels(netlink).await?;
    match tunnels.iter().any(|tunnel| tunnel.name == tun && tunnel.queues as usize > ours) {
        true => Err(AgentError::DeviceInUse(tun.to_owned())),
        false => Ok(()),
    }
}

/// `ready` in the run directory: there while packets flow.
pub(super) struct ReadyFile(PathBuf);

impl ReadyFile {
    pub(super) fn new(run_dir: &Path) -> ReadyFile {
        let file = ReadyFile(run_dir.join("ready"));
        // One that a killed agent left says nothing about this one.
        let _ = fs::remove_file(&file.0);
        file
    }

    pub(super) fn write(&self, node: &str, pod_mtu: u16) -> Result<(), AgentError> {
        let text = serde_json::json!({ "node": node, "pod_mtu": pod_mtu }).to_string();
        let next = self.0.with_extension("next");
        fs::write(&next, text).and_then(|()| fs::rename(&next, &self.0)).map_err(|source| AgentError::Io {
            what: "cannot write the file `ready` in the run directory",
            source,
        })
    }

    pub(super) fn remove(&self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Takes what agents leave in the run directory away, and the directory; not what belongs to `pods` that are there
/// still. Says what is gone. The directory stays where somebody else's file is in it, or where it is a mount.
pub(super) fn empty(run_dir: &Path, socket: Option<OwnedSocket>, pods: bool) -> Vec<String> {
    /// The tables are worth naming; the others nobody would look for.
    const NAMED: [&str; 2] = ["flows", "affinity"];
    const OTHERS: [&str; 4] = ["ready", "ready.next", "data-path.next", SUCCESSOR];
    let mut removed = Vec::new();
    let file = |name: &str| fs::remove_file(run_dir.join(name)).is_ok();
    for name in OTHERS {
        let _ = file(name);
    }
    removed.extend(
        NAMED
            .into_iter()
            .filter(|name| file(name))
            .map(|name| format!("file {}", run_dir.join(name).display())),
    );
    let addresses = run_dir.join("ipam").join(NETWORK);
    if !pods && fs::remove_dir_all(&addresses).is_ok() {
        removed.push(format!("the record of pods' addresses, {}", addresses.display()));
    }
    let _ = fs::remove_dir(run_dir.join("ipam"));
    if let Some(socket) = socket {
        let _ = fs::remove_file(socket.path().with_extension("lock")); // as long as it is held
        drop(socket);
    }
    if fs::remove_dir(run_dir).is_ok() {
        removed.push(format!("directory {}", run_dir.display()));
    }
    removed
}

pub(super) fn make_dir(path: &Path, flag: &'static str) -> Result<(), AgentError> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| AgentError::Directory {
        path: path.to_owned(),
        flag,
        source,
    })
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::config::AgentArgs;

    fn config(run_dir: &Path, standby: bool) -> AgentConfig {
        let run_dir = Some(run_dir.to_owned());
        let source = Some("dir:/nowhere".parse().unwrap());
        let node = Some("a".to_owned());
        let args = AgentArgs { run_dir, source, node, standby: Some(standby), ..AgentArgs::default() };
        AgentConfig::resolve(args).unwrap()
    }

    #[tokio::test]
    async fn one_that_stands_by_waits_for_the_other_ones_end() {
        let dir = tempfile::tempdir().unwrap();
        let first = turn(&config(dir.path(), true), true).await.unwrap();
        let refused = turn(&config(dir.path(), false), true).await.unwrap_err();
        assert!(refused.to_string().contains("another agent is running"), "{refused}");
        let waiting = config(dir.path(), true);
        let second = tokio::spawn(async move { turn(&waiting, false).await });
        sleep(5 * STANDBY_LOOK).await;
        assert!(!second.is_finished());
        assert!(!dir.path().join(SUCCESSOR).exists(), "it did not ask");
        drop(first);
        let second = timeout(Duration::from_secs(5), second).await.unwrap().unwrap().unwrap();
        assert!(second.path().exists());
    }

    #[tokio::test]
    async fn who_asks_is_heard_by_who_may_stand_by() {
        let dir = tempfile::tempdir().unwrap();
        let both = config(dir.path(), true);
        let first = turn(&both, true).await.unwrap();
        let asking = both.clone();
        // Asked once before anybody listened, and again.
        let second = tokio::spawn(async move { turn(&asking, true).await });
        while !dir.path().join(SUCCESSOR).exists() {
            sleep(STANDBY_LOOK).await;
        }
        tokio::select! {
            () = asked(Some(both.run_dir.clone())) => {}
            () = asked(None) => panic!("it would end for good"),
            () = sleep(Duration::from_secs(5)) => panic!("not heard"),
        }
        drop(first);
        timeout(Duration::from_secs(5), second).await.unwrap().unwrap().unwrap();
        assert!(!dir.path().join(SUCCESSOR).exists(), "what was asked for was given");
    }

    #[tokio::test]
    async fn the_run_directory_goes_with_all_that_is_ours() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let write = |name: &str| {
            let path = run.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        };
        for (more, pods, gone) in
            [(None, false, true), (None, true, false), (Some("somebody's"), false, false)]
        {
            for name in ["ready", "flows", "affinity", "ipam/warren/10.244.1.2", "ipam/warren/lock"] {
                write(name);
            }
            more.into_iter().for_each(write);
            let socket = server::bind(&run).unwrap();
            let removed = empty(&run, Some(socket), pods);
            assert_eq!(run.exists(), !gone, "{removed:?}");
            assert_eq!(run.join("ipam/warren/10.244.1.2").exists(), pods);
            assert!(!run.join("flows").exists() && !run.join("warren.lock").exists());
            assert_eq!(removed.last().unwrap().contains("directory"), gone, "{removed:?}");
            let _ = fs::remove_dir_all(&run);
        }
        assert_eq!(empty(&run, None, false), [""; 0]);
    }

    #[test]
    fn capabilities_are_read() {
        assert_eq!(capabilities("Name:\tx\nCapPrm:\t1\nCapEff:\t0000000000001000\n"), Some(1 << 12));
        assert_eq!(capabilities("CapEff:\tx\n"), None);
    }
}
