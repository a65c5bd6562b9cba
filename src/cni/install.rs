//! `warren install-cni`: puts this program where the container runtime looks for plugins, under the plugin's name.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::{PLUGIN, conflist, plugins, version};

/// Where plugins are, unless the runtime was told otherwise.
pub const DEFAULT_BIN_DIR: &str = "/opt/cni/bin";

/// One name for all: what an installation that was killed has left is overwritten by the next.
const DRAFT: &str = ".warren-cni.next";
const BUSY_TRIES: u32 = 50;
const BUSY_WAIT: Duration = Duration::from_millis(20);

/// For `--help`.
pub const EXAMPLES: &str = "\
Where the runtime looks for plugins, and for the agent's --cni-conf-dir:
  kubeadm and most others   /opt/cni/bin                     /etc/cni/net.d
  k3s                       /var/lib/rancher/k3s/data/cni    /var/lib/rancher/k3s/agent/etc/cni/net.d
  MicroK8s                  /var/snap/microk8s/current/opt/cni/bin
                                                             /var/snap/microk8s/current/args/cni-network
The other plugins that pods need (bridge, host-local, portmap, bandwidth, loopback) come with the runtime, or from
https://github.com/containernetworking/plugins/releases (Debian: containernetworking-plugins).";

/// Where to put it.
#[derive(Args, Clone, Debug)]
pub struct InstallArgs {
    /// Where the container runtime looks for CNI plugins
    #[arg(long, value_name = "DIR", env = "WARREN_CNI_BIN_DIR", default_value = DEFAULT_BIN_DIR)]
    pub cni_bin_dir: PathBuf,
    /// Take the plugin away again
    #[arg(long)]
    pub remove: bool,
}

/// Why it is not in place.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Made by whoever installs the runtime.
    #[error(
        "there is no folder {}: is this where the runtime looks for CNI plugins? Make it, or name another with \
         --cni-bin-dir",
        .0.display()
    )]
    NoFolder(PathBuf),
    /// The system refused.
    #[error("cannot {doing} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It was copied and does not run there.
    #[error(
        "{} was copied and does not run there: {reason}; is the file system mounted `noexec`?",
        .path.display()
    )]
    DoesNotRun {
        /// The plugin.
        path: PathBuf,
        /// What came of it.
        reason: String,
    },
}

/// Does it, and says what it did.
pub fn run(args: &InstallArgs) -> Result<(), InstallError> {
    let target = args.cni_bin_dir.join(PLUGIN);
    if args.remove {
        let removed = remove(&target)?;
        let what = if removed { "removed" } else { "there was no" };
        println!("{what} {}", target.display());
        return Ok(());
    }
    let source = Path::new("/proc/self/exe");
    let what = if install(source, &args.cni_bin_dir)? { "installed" } else { "is up to date:" };
    println!("{what} {}", target.display());
    let others =
        conflist::NEEDED.into_iter().chain(conflist::WELCOME.map(|(name, _)| name)).chain(["loopback"]);
    let missing: Vec<&str> = others.filter(|name| !plugins::is_installed(&args.cni_bin_dir, name)).collect();
    if !missing.is_empty() {
        println!(
            "missing beside it: {} (https://github.com/containernetworking/plugins/releases, or Debian's \
             containernetworking-plugins, which has them in /usr/lib/cni)",
            missing.join(", ")
        );
    }
    Ok(())
}

/// Whether there was one.
fn remove(target: &Path) -> Result<bool, InstallError> {
    let _ = fs::remove_file(target.with_file_name(DRAFT)); // of an installation that was killed
    match fs::remove_file(target) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(InstallError::Io { doing: "remove", path: target.to_owned(), source }),
    }
}

/// Copies the program; `false`: the same one is there. It gets its name when it is whole, so a runtime that starts
/// it meanwhile gets the old one or the new one, and one that runs goes on.
fn install(program: &Path, folder: &Path) -> Result<bool, InstallError> {
    if !folder.is_dir() {
        return Err(InstallError::NoFolder(folder.to_owned()));
    }
    let target = folder.join(PLUGIN);
    if is_executable(&target) && same(program, &target) {
        return Ok(false);
    }
    let draft = folder.join(DRAFT);
    let fail = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| InstallError::Io { doing, path, source }
    };
    let _ = fs::remove_file(&draft);
    let copy = || -> io::Result<()> {
        let mut from = File::open(program)?;
        let mut to = OpenOptions::new().write(true).create_new(true).mode(0o755).open(&draft)?;
        io::copy(&mut from, &mut to)?;
        // Whatever the umask took away.
        to.set_permissions(fs::Permissions::from_mode(0o755))?;
        to.sync_all()
    };
    let outcome = copy().map_err(fail("write", &draft)).and_then(|()| try_out(&draft));
    let outcome = outcome.and_then(|()| fs::rename(&draft, &target).map_err(fail("replace", &target)));
    if outcome.is_err() {
        let _ = fs::remove_file(&draft); // the first error is the one to tell
    }
    outcome?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail("write", folder))?;
    Ok(true)
}

/// Runs it as a runtime would, with the verb that does nothing.
fn try_out(program: &Path) -> Result<(), InstallError> {
    use std::os::unix::process::CommandExt as _;
    let wrong = |reason: String| InstallError::DoesNotRun { path: program.to_owned(), reason };
    let mut command = Command::new(program);
    command.arg0(PLUGIN).env_clear().env("CNI_COMMAND", "VERSION").stdin(Stdio::null());
    let mut tries = 0;
    let output = loop {
        match command.output() {
            // A process that somebody has just forked may still have our file open for writing.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                tries += 1;
                std::thread::sleep(BUSY_WAIT);
            }
            output => break output.map_err(|e| wrong(e.to_string()))?,
        }
    };
    match serde_json::from_slice::<Value>(&output.stdout) {
        Ok(answer) if answer == version::answer() => Ok(()),
        Ok(_) | Err(_) => Err(wrong(format!("it ended with {}", output.status))),
    }
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.permissions().mode() & 0o777 == 0o755)
}

fn same(one: &Path, other: &Path) -> bool {
    let open = |path| Some((File::open(path).ok()?, fs::metadata(path).ok()?.len()));
    let (Some((mut one, length)), Some((mut other, other_length))) = (open(one), open(other)) else {
        return false;
    };
    if length != other_length {
        return false;
    }
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let Ok(count) = one.read(&mut left) else { return false };
        if count == 0 {
            return true;
        }
        let (Some(left), Some(right)) = (left.get(..count), right.get_mut(..count)) else { return false };
        if other.read_exact(right).is_err() || left != right {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the real one answers.
    fn stand_in(folder: &Path, more: &str) -> PathBuf {
        let path = folder.join("program");
        let text = format!("#!/bin/sh\n# {more}\ncat <<'X'\n{}\nX\n", version::answer());
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn it_is_put_in_place_once_and_replaced_and_removed() {
        let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = bin.path().join(PLUGIN);
        let program = stand_in(dir.path(), "one");
        assert!(install(&program, bin.path()).unwrap());
        assert!(!install(&program, bin.path()).unwrap(), "the same one");
        fs::set_permissions(&target, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(install(&program, bin.path()).unwrap(), "cannot be executed");
        let program = stand_in(dir.path(), "two");
        assert!(install(&program, bin.path()).unwrap());
        assert_eq!(fs::read(&target).unwrap(), fs::read(&program).unwrap());
        assert_eq!(fs::read_dir(bin.path()).unwrap().count(), 1, "no drafts");
        fs::write(bin.path().join(".warren-cni.next"), "half").unwrap();
        assert_eq!((remove(&target).unwrap(), remove(&target).unwrap()), (true, false));
        assert_eq!(fs::read_dir(bin.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_does_not_run_does_not_replace_what_does() {
        let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        install(&stand_in(dir.path(), "good"), bin.path()).unwrap();
        let bad = dir.path().join("bad");
        fs::write(&bad, "#!/bin/sh\nexit 1\n").unwrap();
        let error = install(&bad, bin.path()).unwrap_err().to_string();
        assert!(error.contains("does not run"), "{error}");
        assert!(fs::read_to_string(bin.path().join(PLUGIN)).unwrap().contains("good"));
        assert_eq!(fs::read_dir(bin.path()).unwrap().count(), 1, "no drafts");
        let error = install(&bad, &dir.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("--cni-bin-dir"), "{error}");
    }
}
