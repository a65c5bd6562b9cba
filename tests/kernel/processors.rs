//! How many lanes an agent has by default follows the processors that it may use: of the machine, of its mask, of its
//! group's quota.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab::Lab;
use crate::lab::agent::Agent;

/// What an agent that is started like this says that it has: processors and lanes.
fn started_by(before: &[&str]) -> (usize, usize) {
    let lab = Lab::two();
    lab.write_nodes();
    let mut agent = Agent::launch_by(&lab, &lab.nodes[0], before, &["--lanes", "auto"]);
    agent.wait_ready();
    let view = agent.status();
    let setting = |name: &str| {
        let settings = view["settings"].as_array().expect("a list of settings").iter();
        let value = settings.filter(|setting| setting["name"] == name).find_map(|s| s["value"].as_str());
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name}: {view}"))
    };
    let lanes = view["lanes"].as_array().expect("a list of lanes").len();
    assert_eq!(setting("lanes"), lanes);
    (setting("processors"), lanes)
}

/// README.md: half of the processors, 1 to 4.
fn lanes(processors: usize) -> usize {
    (processors / 2).clamp(1, 4)
}

#[test]
fn of_the_machine() {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    assert_eq!(started_by(&[]), (all, lanes(all)));
}

#[test]
fn of_its_mask() {
    // The first that we may use ourselves, by the kernel's list of them ("0-3,8").
    let status = fs::read_to_string("/proc/self/status").expect("our own status");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("a list");
    let first = list.trim().split([',', '-']).next().expect("a processor");
    assert_eq!(started_by(&["taskset", "-c", first]), (1, 1));
}

#[test]
fn of_its_groups_quota() {
    let group = Group::with_one_processor();
    // What a container's runtime mounts for it; the agent's /sys is one without it.
    let script =
        format!("{} && echo $$ >{}/cgroup.procs && exec \"$@\"", group.mount, group.inside.display());
    assert_eq!(started_by(&["sh", "-c", &script, "sh"]), (1, 1));
}

/// A group of our own that may use as much time as one processor has; it goes when the test does.
struct Group {
    folder: PathBuf,
    /// How the hierarchy is mounted where an agent looks for it, and where the group is then.
    mount: String,
    inside: PathBuf,
}

impl Group {
    fn with_one_processor() -> Group {
        const HERE: &str = "/sys/fs/cgroup";
        let name = format!("warren-test-{}", std::process::id());
        let controllers = fs::read_to_string(Path::new(HERE).join("cgroup.controllers")).unwrap_or_default();
        if controllers.split_whitespace().any(|controller| controller == "cpu") {
            let root = Path::new(HERE);
            fs::write(root.join("cgroup.subtree_control"), "+cpu").expect("hand the processors' time on");
            let group = Group {
                folder: root.join(&name),
                mount: format!("mount -t cgroup2 cgroup2 {HERE}"),
                inside: root.join(&name),
            };
            group.make(&[("cpu.max", "100000 100000")]);
            return group;
        }
        // Version 1: a hierarchy for the processors' time, alone or with others.
        let groups = fs::read_to_string("/proc/self/cgroup").expect("our own groups");
        let mut with = groups.lines().filter_map(|line| line.split(':').nth(1));
        let with = with.find(|names| names.split(',').any(|name| name == "cpu"));
        let with = with.expect("the kernel shares out the processors' time by groups (CONFIG_CFS_BANDWIDTH)");
        let at = Path::new(HERE).join("cpu");
        let group = Group {
            folder: Path::new(HERE).join(with).join(&name),
            mount: format!(
                "mount -t tmpfs tmpfs {HERE} && mkdir {0} && mount -t cgroup -o {with} cgroup {0}",
                at.display()
            ),
            inside: at.join(&name),
        };
        group.make(&[("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "100000")]);
        group
    }

    fn make(&self, settings: &[(&str, &str)]) {
        fs::create_dir(&self.folder).unwrap_or_else(|e| panic!("{}: {e}", self.folder.display()));
        for (name, value) in settings {
            let file = self.folder.join(name);
            fs::write(&file, value).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Once nobody is in it any more.
        let _ = fs::remove_dir(&self.folder);
    }
}
