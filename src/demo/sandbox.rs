//! The box that the demo runs in: made without leaving a trace, gone whatever happens to its maker.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{getegid, geteuid};

use super::{DemoError, DemoOptions};

/// Our own program, even after a rebuild has replaced the file it was started from.
pub(super) const OURSELVES: &str = "/proc/self/exe";
/// Where the demo's files live: on a tmpfs that only its own processes see.
pub(super) const FOLDER: &str = "/run/warren-demo";

/// Makes the box, starts the stage in it and waits; what `warren demo` itself does.
pub(super) fn supervise(options: &DemoOptions) -> Result<ExitCode, DemoError> {
    check_tun_device()?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    // Blocked, so that they wait in the descriptor instead of ending us before the stage is gone.
    signals.thread_block().map_err(|e| DemoError::system("blocking signals", e))?;
    let signals = SignalFd::new(&signals).map_err(|e| DemoError::system("opening a signal descriptor", e))?;
    own_pid_namespace()?;
    let (line, theirs) = UnixStream::pair().map_err(|e| DemoError::system("making a socket pair", e))?;
    let stage = Command::new(OURSELVES)
        .arg0("warren")
        .args(stage_arguments(options))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .map_err(|e| DemoError::system("starting the stage", e))?;
    watch(Stage(stage), &signals, &line, options)
}

/// What the stage does first: its own mounts and network, and death with its maker.
pub(super) fn settle() -> Result<(), DemoError> {
    SigSet::all().thread_unblock().map_err(|e| DemoError::system("unblocking signals", e))?;
    set_pdeathsig(Signal::SIGKILL).map_err(|e| DemoError::system("asking to die with the demo", e))?;
    // Only as the first process of a PID namespace do we take the rest along.
    if std::process::id() != 1 || maker_is_gone() {
        return Err(DemoError::Usage("this is a part of `warren demo` and cannot run alone".into()));
    }
    let spaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    unshare(spaces).map_err(|e| refused("network and mount namespaces", e))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|e| refused("a private view of the mounts", e))?;
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), hardened, none)
        .map_err(|e| refused("a /proc of its own", e))?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))
        .map_err(|e| refused("a /run of its own", e))?;
    fs::create_dir_all(FOLDER).map_err(|e| DemoError::system(format!("making {FOLDER}"), e))
}

/// What a process that keeps a pod's or a node's namespaces alive does first; `run_folder` becomes its /run,
/// `resolv_conf` its /etc/resolv.conf.
pub(super) fn settle_in_place(
    name: &str,
    run_folder: Option<&Path>,
    resolv_conf: Option<&Path>,
) -> Result<(), DemoError> {
    let spaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS;
    unshare(spaces).map_err(|e| refused("namespaces for a pod", e))?;
    nix::unistd::sethostname(name).map_err(|e| DemoError::system(format!("naming {name}"), e))?;
    let none = None::<&str>;
    // So that /sys/class/net shows this namespace's devices; some sandboxes forbid it, and nothing needs it.
    let _ = mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, none);
    if let Some(folder) = run_folder {
        own_run(folder).map_err(|e| DemoError::system(format!("giving {name} a /run of its own"), e))?;
    }
    if let Some(file) = resolv_conf {
        own_resolv_conf(name, file)
            .map_err(|e| DemoError::system(format!("giving {name} a resolv.conf of its own"), e))?;
    }
    Ok(())
}

/// Tells the supervisor that everything was shown and the demo now stays up.
pub(super) fn report_kept(all_well: bool) {
    if let Ok(line) = io::stdin().as_fd().try_clone_to_owned() {
        // Nobody to tell means the supervisor is gone, and we with it.
        let _ = UnixStream::from(line).write_all(&[u8::from(all_well)]);
    }
}

/// Every node has its own /run, as machines do (sockets, locks); the demo's folder is seen through it.
fn own_run(folder: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    mount(Some(FOLDER), &folder.join("warren-demo"), none, MsFlags::MS_BIND, none)?;
    mount(Some(folder), "/run", none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
}

/// Mounted over what the machine has; nothing of the machine's own /etc changes.
fn own_resolv_conf(name: &str, file: &Path) -> io::Result<()> {
    const PLACE: &str = "/etc/resolv.conf";
    let none = None::<&str>;
    let mut place = Path::new("/etc").join(fs::read_link(PLACE).unwrap_or_else(|_| PLACE.into()));
    if !place.exists() {
        // systemd-resolved's is a link into /run, which here is the demo's own.
        let inside = place.strip_prefix("/etc/../run").or(place.strip_prefix("/run")).ok();
        if let Some(inside) = inside {
            place = Path::new("/run").join(inside);
            if let Some(folder) = place.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(&place, "")?;
        } else {
            // There is none (small containers): a layer over /etc has room for it.
            let layer = file.with_file_name(format!("etc-{name}"));
            let (upper, work) = (layer.join("upper"), layer.join("work"));
            fs::create_dir_all(&upper)?;
            fs::create_dir_all(&work)?;
            let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
            mount(Some("overlay"), "/etc", Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
            place = PLACE.into();
            let _ = fs::remove_file(&place);
            fs::write(&place, "")?;
        }
    }
    Ok(mount(Some(file), &place, none, MsFlags::MS_BIND, none)?)
}

/// The stage, killed with everything in its PID namespace when this goes.
struct Stage(Child);

impl Stage {
    fn end(&mut self) {
        // Killing the first process of a PID namespace kills the rest; `wait` returns after the last.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.end();
    }
}

fn watch(
    mut stage: Stage,
    signals: &SignalFd,
    line: &UnixStream,
    options: &DemoOptions,
) -> Result<ExitCode, DemoError> {
    loop {
        let mut ready = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(DemoError::system("waiting", e)),
        }
        let signal = signals.read_signal().map_err(|e| DemoError::system("reading a signal", e))?;
        let Some(number) = signal.and_then(|s| i32::try_from(s.ssi_signo).ok()) else { continue };
        if number == Signal::SIGCHLD as i32 {
            let ended = stage.0.try_wait().map_err(|e| DemoError::system("waiting for the stage", e))?;
            let Some(status) = ended else { continue };
            return Ok(match (status.code(), status.signal()) {
                (Some(code), _) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
                (None, signal) => {
                    eprintln!("warren demo: the stage was killed (signal {})", signal.unwrap_or_default());
                    ExitCode::FAILURE
                }
            });
        }
        stage.end();
        let kept = kept_verdict(line);
        eprintln!("\nStopped. Nodes, pods, tunnels, rules and files went with their namespaces.");
        // To end a kept demo by hand is its ordinary end; anything else was cut short (128 + signal, as shells say).
        return Ok(match kept {
            Some(true) if options.keep => ExitCode::SUCCESS,
            Some(false) if options.keep => ExitCode::FAILURE,
            Some(_) | None => ExitCode::from(u8::try_from(128 + number).unwrap_or(1)),
        });
    }
}

fn kept_verdict(line: &UnixStream) -> Option<bool> {
    line.set_nonblocking(true).ok()?;
    let mut verdict = [0u8; 1];
    let mut reader = line;
    (reader.read(&mut verdict).ok()? == 1).then_some(verdict[0] == 1)
}

fn stage_arguments(options: &DemoOptions) -> Vec<OsString> {
    let encap = match options.encap {
        super::DemoEncap::Wireguard => "wireguard",
        super::DemoEncap::Vxlan => "vxlan",
        super::DemoEncap::Auto => "auto",
    };
    let mut words: Vec<OsString> = ["demo", "internal", "stage", "--encap", encap].map(Into::into).to_vec();
    words.extend(["--nodes".into(), options.nodes.to_string().into()]);
    words.extend(["--mtu".into(), options.mtu.to_string().into()]);
    words.extend(options.keep.then(|| "--keep".into()));
    words.extend(options.json.then(|| "--json".into()));
    words
}

/// The other end of our standard input closes when the supervisor dies: seen even if it died before we could
/// ask for its death signal.
fn maker_is_gone() -> bool {
    let input = io::stdin();
    let mut ready = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    match poll(&mut ready, PollTimeout::ZERO) {
        Ok(0) => false,
        Ok(_) | Err(_) => true,
    }
}

/// A PID namespace for the processes that we start from now on; inside a user namespace where root's power is
/// not ours.
fn own_pid_namespace() -> Result<(), DemoError> {
    match unshare(CloneFlags::CLONE_NEWPID) {
        Ok(()) => return Ok(()),
        Err(Errno::EPERM) => {}
        Err(e) => return Err(refused("a PID namespace", e)),
    }
    // Asked before: in a user namespace without a map nobody is root.
    let (user, group, root) = (geteuid(), getegid(), is_real_root());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|e| refused_to(root, "a user namespace", e))?;
    // user_namespaces(7): an unprivileged process may map its own ids only, and its group only without setgroups.
    for (file, content) in [
        ("/proc/self/setgroups", "deny".to_string()),
        ("/proc/self/uid_map", format!("0 {user} 1")),
        ("/proc/self/gid_map", format!("0 {group} 1")),
    ] {
        fs::write(file, content).map_err(|e| match e.raw_os_error() {
            Some(code) => refused_to(root, "a user namespace", Errno::from_raw(code)),
            None => DemoError::system(format!("writing {file}"), e),
        })?;
    }
    unshare(CloneFlags::CLONE_NEWPID).map_err(|e| refused_to(root, "a PID namespace", e))
}

fn check_tun_device() -> Result<(), DemoError> {
    const DEVICE: &str = "/dev/net/tun";
    let Err(error) = fs::OpenOptions::new().read(true).write(true).open(DEVICE) else { return Ok(()) };
    Err(tun_refused(&error))
}

fn tun_refused(error: &io::Error) -> DemoError {
    let fix = match error.kind() {
        io::ErrorKind::PermissionDenied if geteuid().is_root() => {
            "This container may not use it: give it the device (docker run --device /dev/net/tun)."
        }
        io::ErrorKind::PermissionDenied => {
            "Run `warren demo` as root, or let everyone use the device (they still need their own network \
             namespace for it): sudo chmod 666 /dev/net/tun"
        }
        io::ErrorKind::NotFound => {
            "Load the driver: sudo modprobe tun. In a container: docker run --device /dev/net/tun"
        }
        _ => "The tun driver does not answer: is it loaded? sudo modprobe tun",
    };
    DemoError::Forbidden { what: format!("cannot open /dev/net/tun: {error}"), fix: fix.into() }
}

/// Says which setting forbids it. Debian's switch, the kernel's limit, Ubuntu's AppArmor rule, then containers.
fn refused(what: &str, error: Errno) -> DemoError {
    refused_to(is_real_root(), what, error)
}

fn refused_to(root: bool, what: &str, error: Errno) -> DemoError {
    let forbidden = |fix: String| DemoError::Forbidden {
        what: format!("this machine does not let you make {what}: {}", io::Error::from(error)),
        fix,
    };
    let setting = |name: &str| {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::read_to_string(path).ok().and_then(|value| value.trim().parse::<i64>().ok())
    };
    explain(error, root, &setting)
        .map_or_else(|| DemoError::system(format!("making {what}"), error), forbidden)
}

/// Root of the machine or container, not of a user namespace that we made (user_namespaces(7): there the map
/// of the first one covers every id).
fn is_real_root() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    geteuid().is_root() && map.split_whitespace().nth(2).is_none_or(|count| count != "1")
}

fn explain(error: Errno, root: bool, setting: &dyn Fn(&str) -> Option<i64>) -> Option<String> {
    let change =
        |name: &str, value: &str| Some(format!("Change it: sudo sysctl -w {name}={value}; or run as root."));
    if !matches!(error, Errno::EPERM | Errno::ENOSPC | Errno::EACCES | Errno::EUSERS | Errno::EINVAL) {
        return None;
    }
    if setting("kernel.unprivileged_userns_clone") == Some(0) {
        return change("kernel.unprivileged_userns_clone", "1");
    }
    for limit in ["user", "pid", "net", "mnt", "uts", "ipc"] {
        let name = format!("user.max_{limit}_namespaces");
        if setting(&name) == Some(0) {
            return change(&name, "10000");
        }
    }
    if setting("kernel.apparmor_restrict_unprivileged_userns") == Some(1) {
        return change("kernel.apparmor_restrict_unprivileged_userns", "0");
    }
    match (error, root) {
        (Errno::EINVAL, _) => Some("Does this kernel have namespaces (CONFIG_USER_NS, CONFIG_PID_NS, CONFIG_NET_NS)?".into()),
        (Errno::ENOSPC | Errno::EUSERS, _) => {
            Some("A limit on namespaces is reached: look at the user.max_*_namespaces settings (sysctl user).".into())
        }
        (_, true) => Some(
            "You are root without the power to do so, as in a container: start it privileged (docker run --privileged)."
                .into(),
        ),
        (_, false) => Some("Run it as root; in a container, start that privileged (docker run --privileged).".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fix(error: Errno, root: bool, settings: &[(&str, i64)]) -> String {
        explain(error, root, &|name| settings.iter().find(|(n, _)| *n == name).map(|(_, v)| *v))
            .expect("an explanation")
    }

    #[test]
    fn the_setting_that_forbids_it_is_named() {
        assert!(
            fix(Errno::EPERM, false, &[("kernel.unprivileged_userns_clone", 0)]).contains("userns_clone=1")
        );
        assert!(
            fix(Errno::ENOSPC, false, &[("user.max_user_namespaces", 0)]).contains("max_user_namespaces=")
        );
        assert!(fix(Errno::ENOSPC, true, &[("user.max_net_namespaces", 0)]).contains("max_net_namespaces="));
        let ubuntu = [("kernel.apparmor_restrict_unprivileged_userns", 1), ("user.max_user_namespaces", 9)];
        assert!(fix(Errno::EPERM, false, &ubuntu).contains("apparmor_restrict_unprivileged_userns=0"));
        assert!(fix(Errno::EPERM, true, &[]).contains("privileged"));
    }

    #[test]
    fn other_errors_keep_their_own_words() {
        assert_eq!(explain(Errno::ENOMEM, false, &|_| None), None);
    }

    #[test]
    fn a_closed_device_says_what_to_do() {
        let error = tun_refused(&io::Error::from(io::ErrorKind::NotFound)).to_string();
        assert!(error.contains("modprobe tun"), "{error}");
    }
}
