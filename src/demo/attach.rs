//! `warren demo enter` and `warren demo stop`: for a demo that another terminal keeps up.
//!
//! There is no file that says where a demo is (it would stay behind after a SIGKILL): the process table says it.
//! Everybody can write into that (a command line is the process's own word), and `enter` and `stop` act with our
//! power: only processes of our own user count, and only a stage whose parent is a kept demo beside us.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Args;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, geteuid};

use super::DemoError;
use super::sandbox::FOLDER;
use crate::io::clock;

/// Where to go, and what to do there.
#[derive(Args, Clone, Debug)]
pub struct EnterArgs {
    /// A pod (pod-1a) or a node (node1).
    #[arg(value_name = "POD")]
    pub place: String,
    /// What to run there; a shell if nothing is said.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
    /// Which demo, if several are up: the process id of its `warren demo`.
    #[arg(long, value_name = "PID")]
    pub demo: Option<i32>,
}

/// Which demo to remove.
#[derive(Args, Clone, Debug)]
pub struct StopArgs {
    /// The process id of its `warren demo`, if several are up.
    #[arg(value_name = "PID")]
    pub demo: Option<i32>,
}

/// Runs a command, or a shell, in a pod or on a node.
pub(super) fn enter(args: &EnterArgs) -> Result<ExitCode, DemoError> {
    let demo = the_one(running(), args.demo)?.ok_or_else(none_is_up)?;
    let places = demo.places();
    let Some((_, pid)) = places.iter().find(|(name, _)| *name == args.place) else {
        let names: Vec<_> = places.iter().map(|(name, _)| name.as_str()).collect();
        return Err(DemoError::Usage(format!("there is no {}; there are: {}", args.place, names.join(", "))));
    };
    join(*pid)?;
    let mut command = match args.command.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        None => Command::new(
            std::env::var_os("SHELL").filter(|s| Path::new(s).exists()).unwrap_or("/bin/sh".into()),
        ),
    };
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    command
        .env("PATH", format!("{FOLDER}/bin:{path}"))
        .env("PS1", format!("{}:\\w\\$ ", args.place))
        .current_dir("/");
    let mut child = command
        .spawn()
        .map_err(|e| DemoError::system(format!("running {}", command.get_program().display()), e))?;
    // Ctrl-C is for what runs inside.
    let mut keys = SigSet::empty();
    keys.add(Signal::SIGINT);
    keys.add(Signal::SIGQUIT);
    keys.thread_block().map_err(|e| DemoError::system("blocking signals", e))?;
    let status = child.wait().map_err(|e| DemoError::system("waiting for the command", e))?;
    let code = status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Ends a demo that was started with `--keep`.
pub(super) fn stop(args: &StopArgs) -> Result<ExitCode, DemoError> {
    let demo = the_one(running(), args.demo)?.ok_or_else(none_is_up)?;
    kill(Pid::from_raw(demo.supervisor), Signal::SIGTERM)
        .map_err(|e| DemoError::system(format!("stopping the demo of process {}", demo.supervisor), e))?;
    let deadline = clock::now() + Duration::from_secs(10);
    while demo.is_up() {
        if clock::now() > deadline {
            return Err(DemoError::Usage(format!(
                "process {} does not end; kill -9 is safe",
                demo.supervisor
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("The demo of process {} is gone, with its nodes and pods.", demo.supervisor);
    Ok(ExitCode::SUCCESS)
}

/// A demo that stays up.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Demo {
    supervisor: i32,
    stage: i32,
}

impl Demo {
    /// Its nodes and pods, each with the process that keeps it.
    fn places(&self) -> Vec<(String, i32)> {
        let ours = namespace(self.stage, "pid");
        let mut places: Vec<_> = processes()
            .filter_map(|(pid, words)| Some((held(&words)?, pid)))
            .filter(|(_, pid)| ours.is_some() && namespace(*pid, "pid") == ours)
            .collect();
        places.sort();
        places
    }

    /// The supervisor ends after everything else has; a zombie that its parent has not fetched has no words.
    fn is_up(&self) -> bool {
        processes().any(|(pid, words)| pid == self.supervisor && is_kept_demo(&words))
    }
}

fn the_one(demos: Vec<Demo>, wanted: Option<i32>) -> Result<Option<Demo>, DemoError> {
    let fitting: Vec<_> =
        demos.into_iter().filter(|d| wanted.is_none_or(|pid| pid == d.supervisor)).collect();
    match (fitting.as_slice(), wanted) {
        ([], Some(pid)) => {
            Err(DemoError::Usage(format!("process {pid} is no demo of yours that was started with --keep")))
        }
        ([], None) => Ok(None),
        ([one], _) => Ok(Some(one.clone())),
        (several, _) => {
            let pids: Vec<_> = several.iter().map(|d| d.supervisor.to_string()).collect();
            Err(DemoError::Usage(format!(
                "several demos are up, say which by its process id: {}",
                pids.join(", ")
            )))
        }
    }
}

/// Somebody else's command line is only his word, and enough for a hint.
fn none_is_up() -> DemoError {
    let theirs = everybodys_processes()
        .find(|(_, status, words)| !is_of_user(status, geteuid().as_raw()) && is_kept_demo(words));
    let hint = theirs.map(|(pid, status, _)| match user_of(&status) {
        Some(user) => {
            format!(" (process {pid} looks like one of the user with id {user}: do it as that user)")
        }
        None => String::new(),
    });
    let hint = hint.unwrap_or_default();
    DemoError::Usage(format!("no demo of yours is up{hint}; start one with: warren demo --keep"))
}

fn running() -> Vec<Demo> {
    processes()
        .filter(|(_, words)| is_kept_stage(words))
        // Only those whose namespaces we may look at are ours to touch.
        .filter(|(pid, _)| namespace(*pid, "pid").is_some())
        .filter_map(|(stage, _)| Some(Demo { supervisor: parent(stage)?, stage }))
        .filter(Demo::is_up)
        // A container's root is root as well, and may call its processes what it likes.
        .filter(|demo| ["pid", "mnt"].iter().all(|kind| is_beside_us(demo.supervisor, kind)))
        .collect()
}

/// Ids and command lines of our own user's processes; one that ends while we look is left out.
fn processes() -> impl Iterator<Item = (i32, Vec<String>)> {
    let ours = |(_, status, _): &(i32, String, Vec<String>)| is_of_user(status, geteuid().as_raw());
    everybodys_processes().filter(ours).map(|(pid, _, words)| (pid, words))
}

/// Ids, `status` files and command lines.
fn everybodys_processes() -> impl Iterator<Item = (i32, String, Vec<String>)> {
    fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| {
        let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words =
            line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        Some((pid, status, words))
    })
}

/// The real id.
fn user_of(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()
}

/// Real, effective, saved and filesystem id (proc_pid_status(5)): a set-user-id program that somebody else
/// started under a name of ours is not ours. The owner of /proc/PID would not do, root has those of the undumpable.
fn is_of_user(status: &str, user: u32) -> bool {
    let Some(ids) = status.lines().find_map(|line| line.strip_prefix("Uid:")) else { return false };
    ids.split_whitespace().count() == 4 && ids.split_whitespace().all(|id| id.parse() == Ok(user))
}

fn is_beside_us(pid: i32, kind: &str) -> bool {
    let ours = fs::read_link(format!("/proc/self/ns/{kind}")).ok();
    ours.is_some() && namespace(pid, kind) == ours
}

/// The supervisor: as the user has typed it.
fn is_kept_demo(words: &[String]) -> bool {
    matches!(words, [_, demo, options @ ..] if demo == "demo"
        && options.first().is_none_or(|word| word != "internal")
        && options.iter().any(|word| word == "--keep"))
}

fn is_kept_stage(words: &[String]) -> bool {
    part_of_demo(words) == Some("stage") && words.iter().any(|word| word == "--keep")
}

fn held(words: &[String]) -> Option<String> {
    if part_of_demo(words) == Some("hold") { words.get(4).cloned() } else { None }
}

fn part_of_demo(words: &[String]) -> Option<&str> {
    match words {
        [program, demo, internal, part, ..]
            if program == "warren" && demo == "demo" && internal == "internal" =>
        {
            Some(part)
        }
        _ => None,
    }
}

/// Field 4 of proc_pid_stat(5), after the name, which may hold anything.
fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn namespace(pid: i32, kind: &str) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

/// Everything the process lives in; the PID namespace is for the children we start then.
fn join(pid: i32) -> Result<(), DemoError> {
    let open = |kind: &str| {
        let path = format!("/proc/{pid}/ns/{kind}");
        File::open(&path).map_err(|e| DemoError::system(format!("opening {path}"), e))
    };
    let mut spaces = Vec::new();
    if namespace(pid, "user") != fs::read_link("/proc/self/ns/user").ok() {
        // First: in there we are root, and may enter the others.
        spaces.push((open("user")?, CloneFlags::CLONE_NEWUSER));
    }
    for (kind, flag) in [
        ("pid", CloneFlags::CLONE_NEWPID),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("net", CloneFlags::CLONE_NEWNET),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ] {
        spaces.push((open(kind)?, flag));
    }
    for (file, flag) in spaces {
        setns(file, flag)
            .map_err(|e| DemoError::system(format!("entering the namespaces of process {pid}"), e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(String::from).collect()
    }

    #[test]
    fn our_processes_are_known_by_their_command_lines() {
        assert!(is_kept_stage(&words("warren demo internal stage --nodes 3 --keep")));
        assert!(!is_kept_stage(&words("warren demo internal stage --nodes 3")));
        assert!(!is_kept_stage(&words("vi demo internal stage --keep")));
        assert!(is_kept_demo(&words("/usr/bin/warren demo --nodes 2 --keep")));
        assert!(!is_kept_demo(&words("warren demo --nodes 2")));
        assert!(!is_kept_demo(&words("sh -c sleep demo --keep")));
        assert!(!is_kept_demo(&words("warren demo internal stage --keep")));
        assert_eq!(held(&words("warren demo internal hold pod-1a")), Some("pod-1a".into()));
        assert_eq!(held(&words("warren demo internal serve")), None);
    }

    #[test]
    fn a_process_is_ours_only_with_all_its_ids() {
        assert!(is_of_user("Name:\tx\nUid:\t0\t0\t0\t0\nGid:\t1\t1\t1\t1\n", 0));
        assert!(!is_of_user("Name:\tx\nUid:\t1000\t0\t0\t0\n", 0), "a set-user-id program");
        assert!(!is_of_user("Uid:\t1000\t1000\t1000\t1000\n", 0));
        assert!(!is_of_user("Uid:\n", 0) && !is_of_user("", 0));
        assert_eq!((user_of("Name:\tx\nUid:\t1000\t0\t0\t0\n"), user_of("Uid:\tx\n")), (Some(1000), None));
    }

    #[test]
    fn several_demos_must_be_told_apart() {
        let demo = |pid| Demo { supervisor: pid, stage: pid + 1 };
        assert_eq!(the_one(vec![], None).expect("none is fine"), None);
        assert_eq!(the_one(vec![demo(5)], None).expect("one is clear"), Some(demo(5)));
        assert!(the_one(vec![demo(5), demo(9)], None).is_err());
        assert_eq!(the_one(vec![demo(5), demo(9)], Some(9)).expect("named"), Some(demo(9)));
        assert!(the_one(vec![demo(5)], Some(6)).is_err());
    }

    #[test]
    fn our_parent_is_found() {
        let us = i32::try_from(std::process::id()).expect("a pid");
        assert_eq!(parent(us), Some(nix::unistd::getppid().as_raw()));
    }
}
