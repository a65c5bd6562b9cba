//! One agent per network namespace, and the files that say it is there.

use std::fs;
use std::path::{Path, PathBuf};

use rtnetlink::Handle;

use super::AgentError;
use crate::io::underlay;

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
    use super::*;

    #[test]
    fn capabilities_are_read() {
        assert_eq!(capabilities("Name:\tx\nCapPrm:\t1\nCapEff:\t0000000000001000\n"), Some(1 << 12));
        assert_eq!(capabilities("CapEff:\tx\n"), None);
    }
}
