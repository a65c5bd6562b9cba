//! What the agent says of itself, for the plugin: a file in the run directory, written again every few seconds
//! while packets flow. It stays when the agent ends, so that a restart is not seen.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::io::clock;
use crate::state::durable;

/// How often the agent writes it.
pub const EVERY: Duration = Duration::from_secs(5);
/// How old it is when the data path counts as dead.
pub const DEAD: Duration = Duration::from_secs(30);
const FILE: &str = "data-path.json";
const MOST_BYTES: u64 = 1 << 16;

/// The data path of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPath {
    /// The node's name.
    pub node: String,
    /// The tunnel device.
    pub device: String,
    /// The MTU that pods get.
    pub pod_mtu: u16,
    /// Where this node's pods are.
    pub pod_ranges: Vec<IpNet>,
    /// Which boot of the machine it is about: a run directory may outlive one.
    boot: String,
    /// When packets flowed, in milliseconds since then.
    alive_ms: u64,
}

/// How it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Packets flow, or did a moment ago.
    Alive(DataPath),
    /// They did, so long ago.
    Dead(Duration),
    /// They never did since the machine was started.
    Never,
}

impl DataPath {
    /// Packets flow now.
    pub fn now(node: &str, device: &str, pod_mtu: u16, pod_ranges: &[IpNet]) -> DataPath {
        DataPath {
            node: node.to_owned(),
            device: device.to_owned(),
            pod_mtu,
            pod_ranges: pod_ranges.to_vec(),
            boot: boot(),
            alive_ms: clock::uptime_ms(),
        }
    }

    /// Puts it where the plugin looks. Not made to survive a power cut: it is about this boot.
    pub fn write(&self, run_dir: &Path) -> io::Result<()> {
        let path = path(run_dir);
        let next = path.with_extension("next");
        std::fs::write(&next, serde_json::to_vec(self)?)?;
        std::fs::rename(&next, &path)
    }

    fn health(self, boot: &str, now_ms: u64) -> Health {
        let age = Duration::from_millis(now_ms.saturating_sub(self.alive_ms));
        match (self.boot == boot, age <= DEAD) {
            (false, _) => Health::Never,
            (true, true) => Health::Alive(self),
            (true, false) => Health::Dead(age),
        }
    }
}

/// Where it is.
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join(FILE)
}

/// Looks how it is. A file that makes no sense is none.
pub fn look(run_dir: &Path) -> Health {
    let read = durable::read(&path(run_dir), MOST_BYTES).ok().flatten();
    let data_path: Option<DataPath> = read.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    data_path.map_or(Health::Never, |data_path| data_path.health(&boot(), clock::uptime_ms()))
}

fn boot() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_dies_of_silence_and_is_of_one_boot() {
        let at = |alive_ms| DataPath {
            node: "a".into(),
            device: "warren0".into(),
            pod_mtu: 1420,
            pod_ranges: vec!["10.244.1.0/24".parse().unwrap()],
            boot: "one".into(),
            alive_ms,
        };
        assert_eq!(at(5000).health("one", 35_000), Health::Alive(at(5000)));
        assert_eq!(at(5000).health("one", 35_001), Health::Dead(Duration::from_millis(30_001)));
        assert_eq!(at(5000).health("two", 5001), Health::Never);
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path()), Health::Never);
        let now = DataPath::now("a", "warren0", 1420, &["fd00::/64".parse().unwrap()]);
        now.write(dir.path()).unwrap();
        assert_eq!(look(dir.path()), Health::Alive(now));
        std::fs::write(path(dir.path()), "{}").unwrap();
        assert_eq!(look(dir.path()), Health::Never);
    }
}
