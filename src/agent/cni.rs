//! CNI: what `warren-cni` reads of this agent, and the runtime's list of plugins.
//!
//! Both begin when packets flow and the source has shown this node's own Node, the list last: from then on the kubelet
//! calls the node ready. What was saved before a restart does for both only where no API server answers: the Node may
//! have been replaced by another of its name, with other pod ranges. Both stay when the agent ends; `--cleanup` takes
//! them away.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{info, warn};

use super::{AgentError, bridge};
use crate::cni::conflist::{self, BRIDGE, ConfFile, NEEDED, Own, Verdict, WELCOME};
use crate::cni::data_path::{self, DataPath};
use crate::cni::plugins::{self, Spoken};
use crate::cni::{PLUGIN, SpecVersion};
use crate::config::{AgentConfig, CniConfig};
use crate::io::clock;
use crate::io::host::HostState;
use crate::state::compile::HostPlan;
use crate::state::durable;
use crate::state::run::StateReport;
use crate::state::source::kube::Contact;
use crate::status::Handle;

/// How long the API server may take to show this node's Node, before what was saved counts: less than the word of the
/// agent before us is believed, which may be one of its beats old, so that a restart is not seen.
pub(super) const ANSWERS_WITHIN: Duration = Duration::from_secs(15);
const _: () = assert!(
    ANSWERS_WITHIN.as_secs() + data_path::EVERY.as_secs() < data_path::DEAD.as_secs(),
    "an agent's restart would be seen"
);
/// How often the folder of lists is looked at: somebody may have changed it.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// No list of plugins comes near.
const MOST_BYTES: u64 = 1 << 20;
const MOST_FILES: usize = 256;
/// In the state directory: which folders we have written to.
const RECORD: &str = "cni-folders.json";
/// What a file of others was before it was changed, beside it; a runtime does not read names that end so.
const BEFORE: &str = "before-warren";
/// Who may read a list of ours (CIS Kubernetes Benchmark 1.1.9).
const MODE: u32 = 0o600;

/// What pods get.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pods {
    mtu: u16,
    ranges: Vec<IpNet>,
}

impl Pods {
    fn of(plan: &HostPlan) -> Pods {
        Pods { mtu: plan.pod_mtu, ranges: plan.pod_ranges.clone() }
    }
}

/// Tells both tasks what pods get.
pub(super) struct Cni(watch::Sender<Pods>);

/// Whether this node's Node is known to be the one that the pod ranges are of.
pub(super) struct Confirmation {
    pub(super) report: watch::Receiver<Arc<StateReport>>,
    /// Whether the API server answers; `None` where there is none.
    pub(super) contact: Option<watch::Receiver<Contact>>,
    /// [`ANSWERS_WITHIN`].
    pub(super) patience: Duration,
}

impl Confirmation {
    /// `late`: an API server has had its time; one that says nothing but errors is as good as none.
    fn is_there(&mut self, late: bool) -> bool {
        let report = self.report.borrow_and_update();
        // Where nobody can say otherwise, what was saved holds.
        let alone = match self.contact.as_mut().map(|contact| contact.borrow_and_update().clone()) {
            None | Some(Contact::Silent { .. }) => true,
            Some(Contact::Unknown | Contact::Answers) => late && !report.heard,
        };
        report.own_confirmed || alone
    }

    async fn wait(mut self) {
        let late = sleep(self.patience);
        tokio::pin!(late);
        while !self.is_there(late.is_elapsed()) {
            let news = async {
                match &mut self.contact {
                    Some(contact) => tokio::select! {
                        changed = self.report.changed() => changed,
                        changed = contact.changed() => changed,
                    },
                    None => self.report.changed().await,
                }
            };
            let changed = tokio::select! {
                changed = news => changed,
                () = &mut late, if !late.is_elapsed() => Ok(()),
            };
            if changed.is_err() {
                return std::future::pending().await; // the agent ends
            }
        }
    }
}

impl Cni {
    /// Packets flow: says so from now on, and lets the runtime know of us. The first word is written when this
    /// returns, if nothing is waited for.
    pub(super) fn start(
        config: &AgentConfig,
        plan: &HostPlan,
        host: watch::Receiver<HostState>,
        mut confirmation: Confirmation,
        netlink: rtnetlink::Handle,
        handle: Handle,
    ) -> Result<(Cni, Vec<JoinHandle<()>>), AgentError> {
        let (sender, pods) = watch::channel(Pods::of(plan));
        let beat = Beat {
            node: config.node.clone(),
            device: config.tun_name.clone(),
            run_dir: config.run_dir.clone(),
        };
        let confirmed = confirmation.is_there(false);
        if confirmed {
            beat.write(&pods.borrow()).map_err(|source| AgentError::Io {
                what: "cannot write data-path.json in the run directory",
                source,
            })?;
        }
        let (open, gate) = watch::channel(confirmed);
        let mut tasks = vec![
            tokio::spawn(async move {
                confirmation.wait().await;
                open.send_replace(true);
                std::future::pending().await
            }),
            tokio::spawn({
                let (gate, pods) = (gate.clone(), pods.clone());
                async move {
                    passed(gate).await;
                    beat.go_on(pods, host).await;
                }
            }),
        ];
        if let Some(folder) = config.cni.conf_dir.clone() {
            let keeper = Keeper {
                folder,
                config: config.cni.clone(),
                node: config.node.clone(),
                run_dir: std::path::absolute(&config.run_dir).unwrap_or_else(|_| config.run_dir.clone()),
                record: config.state_dir.join(RECORD),
                tun: config.tun_name.clone(),
                netlink,
                handle,
                bridge: None,
                asked: BTreeMap::new(),
                said: BTreeSet::new(),
            };
            if !confirmed {
                keeper.tell(Some(
                    "the API server has not shown this node's Node yet, whose pod ranges may have changed"
                        .to_owned(),
                ));
            }
            tasks.push(tokio::spawn(async move {
                passed(gate).await;
                keeper.keep(pods).await;
            }));
        }
        Ok((Cni(sender), tasks))
    }

    pub(super) fn obey(&self, plan: &HostPlan) {
        let next = Pods::of(plan);
        self.0.send_if_modified(|now| std::mem::replace(now, next) != *now);
    }
}

async fn passed(mut gate: watch::Receiver<bool>) {
    if gate.wait_for(|open| *open).await.is_err() {
        std::future::pending().await // the agent ends
    }
}

/// What became of the folders of configurations at the end.
#[derive(Debug, Default)]
pub(super) struct Taken {
    pub(super) removed: Vec<String>,
    /// What may be worth something to somebody.
    pub(super) kept: Vec<String>,
}

/// Takes lists of ours away and ourselves out of those of others; says what, and what could not be done.
pub(super) fn cleanup(config: &AgentConfig) -> (Taken, Result<(), AgentError>) {
    let record = config.state_dir.join(RECORD);
    let mut folders = recorded(&record);
    folders.extend(config.cni.conf_dir.clone());
    let mut taken = Taken::default();
    let mut done = Ok(());
    for folder in &folders {
        done = done.and(taken.clean(folder, &config.cni.conf_name));
    }
    // The folders are known for as long as there is something left in them.
    if done.is_ok() {
        done = match fs::remove_file(&record) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        };
    }
    let word = data_path::path(&config.run_dir);
    if fs::remove_file(&word).is_ok() {
        taken.removed.push(format!("file {}", word.display()));
    }
    let what = "cannot clean up the CNI configuration";
    (taken, done.map_err(|source| AgentError::Io { what, source }))
}

impl Taken {
    /// `own`: the name of our list.
    fn clean(&mut self, folder: &Path, own: &str) -> io::Result<()> {
        let mut names = BTreeSet::from([own.to_owned()]);
        // What cannot be read was not written by us.
        for file in read_folder(folder)?.into_iter().flatten() {
            self.removed.extend(take_out(folder, &file)?);
            if file.name == own && !conflist::is_readable(&file) {
                self.kept.push(format!(
                    "the file {}, which has the name of our list and is none any more: remove it",
                    folder.join(own).display()
                ));
            }
            names.insert(file.name);
        }
        for name in names {
            let path = folder.join(name);
            let backup = backup_of(&path);
            // Of one of us who was killed.
            for draft in [&path, &backup].into_iter().filter_map(|path| durable::draft_of(path).ok()) {
                if fs::remove_file(&draft).is_ok() {
                    self.removed.push(format!("file {}", draft.display()));
                }
            }
            if backup.exists() {
                self.kept.push(format!(
                    "the file {}: what {} was before Warren came, which it is not now",
                    backup.display(),
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

/// Says every few seconds that packets flow.
struct Beat {
    node: String,
    device: String,
    run_dir: PathBuf,
}

impl Beat {
    fn write(&self, pods: &Pods) -> io::Result<()> {
        DataPath::now(&self.node, &self.device, pods.mtu, &pods.ranges).write(&self.run_dir)
    }

    /// The lanes run as long as the agent does; whether the node's routes and rules are right, the host's state says.
    async fn go_on(self, mut pods: watch::Receiver<Pods>, host: watch::Receiver<HostState>) {
        let mut every = interval(data_path::EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said = false;
        loop {
            tokio::select! {
                _ = every.tick() => {}
                changed = pods.changed() => if changed.is_err() { return },
            }
            let right = host.borrow().right;
            // A time in the future is one of before the clock was set back.
            let age = right.map(|right| clock::wall().duration_since(right).unwrap_or_default());
            if age.is_none_or(|age| age > data_path::EVERY) {
                continue;
            }
            let pods = pods.borrow_and_update().clone();
            match self.write(&pods) {
                Ok(()) => said = false,
                Err(error) if !said => {
                    warn!(
                        "{PLUGIN} will take this agent for dead: cannot write into the run directory: {error}"
                    );
                    said = true;
                }
                Err(_) => {}
            }
        }
    }
}

/// Keeps the list of plugins.
struct Keeper {
    folder: PathBuf,
    config: CniConfig,
    run_dir: PathBuf,
    record: PathBuf,
    tun: String,
    node: String,
    netlink: rtnetlink::Handle,
    handle: Handle,
    /// The bridge whose address we have fixed.
    bridge: Option<u32>,
    /// What each plugin speaks, as long as its file stays the same.
    asked: BTreeMap<&'static str, (FileId, Spoken)>,
    said: BTreeSet<String>,
}

/// Which file it is: device, inode, size, time of change.
type FileId = (u64, u64, u64, i64, i64);

impl Keeper {
    async fn keep(mut self, mut pods: watch::Receiver<Pods>) {
        loop {
            let now = pods.borrow_and_update().clone();
            let problem = match self.look(now).await {
                Ok(Some(done)) => {
                    info!("CNI: {done}");
                    None
                }
                Ok(None) => None,
                Err(problem) => {
                    self.say(format!("no pod network for this node's runtime yet: {problem}"));
                    Some(problem)
                }
            };
            self.tell(problem);
            if let Ok(Err(_)) = timeout(LOOK_EVERY, pods.changed()).await {
                return;
            }
        }
    }

    /// Lets `warren status` say why pods cannot be added.
    fn tell(&self, problem: Option<String>) {
        let problem = problem.unwrap_or_default();
        if self.handle.live().cni != problem {
            self.handle.update(|live| live.cni.clone_from(&problem));
        }
    }

    /// Makes it right; says what was done, or why it cannot be.
    async fn look(&mut self, pods: Pods) -> Result<Option<String>, String> {
        if pods.ranges.is_empty() {
            return Err("this node has no pod range".to_owned());
        }
        let (folder, record) = (self.folder.clone(), self.record.clone());
        let files = blocking(move || {
            fs::create_dir_all(&folder)?;
            remember(&record, &folder)?;
            read_folder(&folder)?.into_iter().collect::<io::Result<Vec<_>>>()
        });
        let files = files.await.map_err(|e| format!("{}: {e}", self.folder.display()))?;
        let verdict = conflist::judge(&files, &self.config.conf_name, &pods.ranges);
        if !plugins::is_installed(&self.config.bin_dir, PLUGIN) {
            return Err(format!(
                "there is no {PLUGIN} in {}: `warren install-cni` puts it there",
                self.config.bin_dir.display()
            ));
        }
        let own = self.config.conf_name.clone();
        let run_dir = self.run_dir.to_string_lossy().into_owned();
        let unreadable =
            |file: &ConfFile| format!("{} cannot be changed: put {PLUGIN} into it yourself", file.name);
        match verdict {
            Verdict::Refuse(why) => Err(why),
            Verdict::Own => {
                let text = self.own_list(&files, &pods, &run_dir).await?;
                // The list last: once it is there pods come.
                bridge::make(&self.netlink, &self.node, &mut self.bridge).await?;
                self.write(&files, own, text, None).await
            }
            Verdict::Wrap(file) => {
                let text = conflist::wrap(&file, &run_dir).ok_or_else(|| unreadable(&file))?;
                self.write(&files, own, text, None).await
            }
            Verdict::Chain(file) => {
                let text = conflist::chain(&file.text, &run_dir).ok_or_else(|| unreadable(&file))?;
                let before = conflist::unchain(&file.text).ok_or_else(|| unreadable(&file))?;
                let done = self.write(&files, file.name, text, Some(before)).await?;
                // One around a single plugin's file, from before there was this one.
                if files.iter().any(|file| file.name == own && conflist::is_ours(file)) {
                    let path = self.folder.join(own);
                    blocking(move || fs::remove_file(path)).await.map_err(|e| e.to_string())?;
                }
                Ok(done)
            }
        }
    }

    async fn own_list(&mut self, files: &[ConfFile], pods: &Pods, run_dir: &str) -> Result<String, String> {
        let (bin, name) = (self.config.bin_dir.clone(), self.config.conf_name.clone());
        let get = "get them from https://github.com/containernetworking/plugins/releases (Debian: \
                   containernetworking-plugins)";
        let missing: Vec<&str> =
            NEEDED.into_iter().filter(|plugin| !plugins::is_installed(&bin, plugin)).collect();
        if !missing.is_empty() {
            return Err(format!(
                "CNI plugins are missing in {}: {}; {get}",
                bin.display(),
                missing.join(", ")
            ));
        }
        let present = files.iter().find(|file| file.name == name && conflist::is_own_network(file));
        if present.is_none() {
            self.nobody_else_has_pods(&pods.ranges)?;
        }
        let present = present.and_then(conflist::version_of);
        let mut extras = Vec::new();
        for (plugin, loss) in WELCOME {
            if plugins::is_installed(&bin, plugin) {
                extras.push(plugin);
            } else {
                self.say(format!(
                    "the CNI plugin {plugin} is missing in {}, so {loss}; {get}",
                    bin.display()
                ));
            }
        }
        let mut spoken = Vec::new();
        for plugin in NEEDED.into_iter().filter(|plugin| *plugin != PLUGIN).chain(extras.iter().copied()) {
            spoken.push((plugin, self.ask(plugin, present).await));
        }
        let all = |version: &SpecVersion| spoken.iter().all(|(_, spoken)| spoken.has(*version));
        let Some(version) = SpecVersion::ALL.into_iter().rev().find(all) else {
            return Err(format!(
                "the CNI plugins in {} have no version of CNI in common; {get}",
                bin.display()
            ));
        };
        Ok(Own { version, ranges: &pods.ranges, mtu: pods.mtu, run_dir, extras: &extras }.render())
    }

    /// Two interfaces with one subnet, and one address given to two pods: that is what a second network on the range
    /// would make.
    fn nobody_else_has_pods(&self, ranges: &[IpNet]) -> Result<(), String> {
        let addresses =
            nix::ifaddrs::getifaddrs().map_err(|e| format!("the interfaces cannot be listed: {e}"))?;
        let found = addresses
            .filter(|held| held.interface_name != self.tun && held.interface_name != BRIDGE)
            .find_map(|held| {
                let address = held.address?;
                let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
                let ip =
                    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))?;
                ranges.iter().any(|range| range.contains(&ip)).then_some((held.interface_name, ip))
            });
        match found {
            Some((name, address)) => Err(format!(
                "the interface {name} holds {address}, of this node's pod range: pods of an earlier network are \
                 still here. Drain the node and remove it (`ip link delete {name}`), or restart the machine"
            )),
            None => Ok(()),
        }
    }

    /// What it speaks. One that does not answer this time is taken to speak what the list that is there is written in.
    async fn ask(&mut self, plugin: &'static str, present: Option<SpecVersion>) -> Spoken {
        let id = fs::metadata(self.config.bin_dir.join(plugin)).map_or((0, 0, 0, 0, 0), |file| {
            (file.dev(), file.ino(), file.size(), file.ctime(), file.ctime_nsec())
        });
        if let Some((known, spoken)) = self.asked.get(plugin)
            && *known == id
        {
            return spoken.clone();
        }
        let spoken = match plugins::ask(&self.config.bin_dir, plugin).await {
            Ok(spoken) => spoken,
            Err(why) => {
                let version = present.unwrap_or(plugins::ASSUMED);
                self.say(format!(
                    "the CNI plugin {plugin} did not say which versions of CNI it speaks ({why}): it is asked again, \
                     and until then {version} is assumed"
                ));
                return Spoken::Assumed(version, why);
            }
        };
        if let Spoken::Assumed(version, why) = &spoken {
            self.say(format!(
                "which versions of CNI the plugin {plugin} speaks cannot be asked ({why}); {version} is assumed, which \
                 all of them have spoken since 2019. Versions before 1.1.0 have no STATUS: the node's Ready condition \
                 will not say when packets stop. Statically linked plugins can be asked"
            ));
        }
        self.asked.insert(plugin, (id, spoken.clone()));
        spoken
    }

    /// Writes a file unless it is right; `before`: what it was without us, when it is somebody else's.
    async fn write(
        &mut self,
        files: &[ConfFile],
        name: String,
        text: String,
        before: Option<String>,
    ) -> Result<Option<String>, String> {
        let old = files.iter().find(|file| file.name == name);
        if old.is_some_and(|old| old.text == text) {
            return Ok(None);
        }
        let verb = match (&before, old) {
            (Some(_), _) => "added warren-cni to",
            (None, Some(_)) => "rewrote",
            (None, None) => "wrote",
        };
        let path = self.folder.join(name);
        let done = format!("{verb} {}: this node's runtime can add pods", path.display());
        let write = move || -> io::Result<()> {
            let mut mode = MODE;
            if let Some(before) = before {
                let file = fs::symlink_metadata(&path)?;
                if !file.is_file() {
                    return Err(io::Error::other("not a regular file; put warren-cni into it yourself"));
                }
                mode = file.permissions().mode() & 0o777;
                durable::replace(&backup_of(&path), before.as_bytes(), mode)?;
            }
            durable::replace(&path, text.as_bytes(), mode)
        };
        blocking(write).await.map_err(|e| format!("{}: {e}", self.folder.display()))?;
        self.said.clear();
        Ok(Some(done))
    }

    /// Once, until something has changed.
    fn say(&mut self, what: String) {
        if !self.said.contains(&what) {
            warn!("{what}");
            self.said.insert(what);
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.unwrap_or_else(|panic| Err(io::Error::other(panic)))
}

/// The files that a runtime would look at, sorted by name as it does. One that cannot be read from here may be another
/// pod network's, and is an error.
fn read_folder(folder: &Path) -> io::Result<Vec<io::Result<ConfFile>>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let is_conf = |name: &str| [".conflist", ".conf", ".json"].iter().any(|end| name.ends_with(end));
        names.extend(name.into_string().ok().filter(|name| is_conf(name)));
        if names.len() > MOST_FILES {
            return Err(io::Error::other(format!("more than {MOST_FILES} files")));
        }
    }
    names.sort();
    let read = |name: String| {
        let bytes = fs::canonicalize(folder.join(&name)).and_then(|path| durable::read(&path, MOST_BYTES));
        match bytes {
            Ok(Some(bytes)) => Ok(ConfFile { name, text: String::from_utf8(bytes).unwrap_or_default() }),
            Ok(None) => Err(io::Error::other(format!("{name} went away while the folder was read"))),
            Err(error) => Err(io::Error::other(format!(
                "{name} cannot be read from here ({error}), so nobody can tell whether it is another pod network's"
            ))),
        }
    };
    Ok(names.into_iter().map(read).collect())
}

/// Takes us out of one file; says what was done.
fn take_out(folder: &Path, file: &ConfFile) -> io::Result<Option<String>> {
    let path = folder.join(&file.name);
    if conflist::is_ours(file) {
        fs::remove_file(&path)?;
        return Ok(Some(format!("file {}", path.display())));
    }
    if !file.name.ends_with(".conflist") {
        return Ok(None);
    }
    let Some(before) = conflist::unchain(&file.text).filter(|before| *before != file.text) else {
        return Ok(None);
    };
    durable::replace(&path, before.as_bytes(), fs::metadata(&path)?.permissions().mode() & 0o777)?;
    // One that differs is from before somebody changed the file, and may be worth something to him.
    let backup = backup_of(&path);
    if durable::read(&backup, MOST_BYTES).ok().flatten().is_some_and(|kept| kept == before.as_bytes()) {
        fs::remove_file(&backup)?;
    }
    Ok(Some(format!("{PLUGIN} from {}", path.display())))
}

fn backup_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(BEFORE);
    name.into()
}

/// The folders that we have written to; a record that makes no sense names none.
fn recorded(record: &Path) -> BTreeSet<PathBuf> {
    let read = durable::read(record, MOST_BYTES).ok().flatten();
    read.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Before anything is written there.
fn remember(record: &Path, folder: &Path) -> io::Result<()> {
    let mut folders = recorded(record);
    if !folders.insert(folder.to_owned()) {
        return Ok(());
    }
    durable::replace(record, &serde_json::to_vec(&folders)?, MODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_in_a_folder_but_what_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let clean = || {
            let mut taken = Taken::default();
            taken.clean(dir.path(), "05-warren.conflist").unwrap();
            taken
        };
        let left = || {
            let entries = fs::read_dir(dir.path()).unwrap();
            let mut names: Vec<String> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let theirs = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}"#;
        write("10-theirs.conflist", &conflist::chain(theirs, "/run/warren").unwrap());
        write("10-theirs.conflist.before-warren", "{}");
        // An agent was killed while it wrote these.
        for name in
            [".05-warren.conflist.tmp", ".10-theirs.conflist.tmp", ".10-theirs.conflist.before-warren.tmp"]
        {
            write(name, "{");
        }
        write(".somebody.tmp", "");
        let taken = clean();
        assert_eq!(left(), [".somebody.tmp", "10-theirs.conflist", "10-theirs.conflist.before-warren"]);
        assert_eq!((taken.removed.len(), taken.kept.len()), (3, 1), "{taken:?}");
        assert!(taken.kept[0].contains("10-theirs.conflist.before-warren"), "{taken:?}");
        assert_eq!(fs::read_to_string(dir.path().join("10-theirs.conflist")).unwrap(), theirs);
        // Half of our list, by somebody's editor.
        fs::remove_file(dir.path().join("10-theirs.conflist.before-warren")).unwrap();
        write("05-warren.conflist", r#"{"cniVersion":"1.0.0","name":"warren","#);
        let taken = clean();
        assert_eq!((taken.removed.len(), taken.kept.len()), (0, 1), "{taken:?}");
        assert!(taken.kept[0].contains("05-warren.conflist"), "{taken:?}");
    }

    #[tokio::test]
    async fn what_was_saved_counts_only_where_nobody_can_say_otherwise() {
        let (reports, report) = watch::channel(Arc::new(StateReport::default()));
        let (contacts, contact) = watch::channel(Contact::Unknown);
        let patience = Duration::from_millis(50);
        let new = || Confirmation { report: report.clone(), contact: Some(contact.clone()), patience };
        let mut there = new();
        assert!(!there.is_there(false) && Confirmation { contact: None, ..new() }.is_there(false));
        // One that answers nothing but errors, as one without its etcd.
        contacts.send_replace(Contact::Answers);
        assert!(!there.is_there(false) && there.is_there(true));
        timeout(100 * patience, new().wait()).await.expect("it has had its time");
        // One that lists, and has no such Node.
        reports.send_modify(|report| Arc::make_mut(report).heard = true);
        assert!(!there.is_there(true));
        timeout(4 * patience, new().wait()).await.expect_err("another Node may come");
        reports.send_modify(|report| Arc::make_mut(report).own_confirmed = true);
        assert!(there.is_there(false));
        new().wait().await;
        reports.send_replace(Arc::default());
        contacts.send_replace(Contact::Silent { since: std::time::UNIX_EPOCH, reason: String::new() });
        assert!(there.is_there(false));
    }
}
