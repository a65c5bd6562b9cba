//! The folder as a model: files, what each gave, and the objects that result. No watching here;
//! [`dir`](super::dir) says when to look.
//!
//! Rules, in the order in which they apply:
//! 1. A file counts if it ends in `.yaml`, `.yml` or `.json` and does not start with a dot. A copy that a
//!    sync program made of a conflict is reported and not read.
//! 2. A document that is wrong is reported. As long as a file holds one, nothing that the file gave
//!    earlier is withdrawn: a half-written file removes nothing. The same for a file that is empty (its
//!    writer may not be done, or a power cut took its content), too big, unreadable or a link to nowhere
//!    (a disk that is not mounted yet). What is no object, or one of another kind than ours, is reported
//!    and otherwise left alone; and a folder, a pipe or a device of such a name is no file, and holds
//!    nothing.
//! 3. The list is complete when every file was read whole once. Until then what a file may hold is not
//!    known, so the list says that it is incomplete, and everybody keeps what he knew from before. An
//!    object that was read and is then removed is gone all the same.
//! 4. `<node>.warren.yaml` gives only the `warren.dev/` annotations of that Node; they are merged into
//!    the Node that some other file holds, whose own annotations win. One that gives none is not whole.
//! 5. If several files hold the same object, one is used and the others are reported: a Node with pod
//!    ranges before one without, then the file whose name without its ending sorts first (`nodes.yaml`
//!    before `nodes (1).yaml` and `nodes-old.yaml`).

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::manifest::{self, Flaw, MAX_FILE_BYTES};
use super::{Key, Kind, Object, SourceEvent};
use crate::state::annotations::PREFIX;
use crate::state::problem::{Problem, ProblemKind};

/// Most files that are read; one per node and then some.
pub const MAX_FILES: usize = 20_000;
/// How the file that an agent writes about itself ends.
pub const PUBLISHED_SUFFIX: &str = ".warren.yaml";
/// The origin under which two files with the same object are reported.
const CONFLICTS: &str = "folder: same object twice";
/// How a file's name ends that counts.
const ENDINGS: [&str; 3] = [".yaml", ".yml", ".json"];
/// What is in the name, in small letters, of the copy that a sync program keeps when a file was changed in
/// two places: Syncthing; Dropbox and Nextcloud; ownCloud's older clients; Seafile.
const CONFLICT_COPIES: [&str; 4] = [".sync-conflict-", "conflicted copy", "_conflict-", "(sfconflict "];

/// What tells one content of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    device: u64,
    size: u64,
    modified: (i64, i64),
}

#[derive(Debug, Default)]
struct FileState {
    stamp: Option<Stamp>,
    /// Seen by the last rescan but not read yet: it may still be being written.
    unsettled: Option<Stamp>,
    /// Read without a gap, now or at any time before.
    whole: bool,
    objects: BTreeMap<Key, Object>,
    problems: Vec<Problem>,
}

/// How much of the folder is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    /// Nothing yet.
    Unread,
    /// All but what some files may hold.
    Partial,
    /// Everything, once. A file that breaks later keeps what it gave.
    Complete,
}

/// What the files that hold an object come to.
#[derive(Debug)]
enum Merged {
    /// This.
    Object(Object),
    /// Not known yet: what was told before stands.
    Withheld,
    /// There is no such object.
    Nothing,
}

/// The folder's files and the objects they add up to.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    files: BTreeMap<String, FileState>,
    /// Which files hold which object.
    holders: BTreeMap<Key, BTreeSet<String>>,
    /// What was last told.
    merged: BTreeMap<Key, Object>,
    /// Nodes that are not told, or not anew, as long as their announcement cannot be read.
    withheld: BTreeSet<Key>,
    conflicts: BTreeMap<Key, Vec<Problem>>,
    /// How many files were too many at the last scan.
    beyond: usize,
    listing: Listing,
}

impl Folder {
    /// An unread folder.
    pub fn new(path: impl Into<PathBuf>) -> Folder {
        Folder {
            path: path.into(),
            files: BTreeMap::new(),
            holders: BTreeMap::new(),
            merged: BTreeMap::new(),
            withheld: BTreeSet::new(),
            conflicts: BTreeMap::new(),
            beyond: 0,
            listing: Listing::Unread,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks at every file. The first time that works, the answer is a reset of every kind, and once more
    /// when the list becomes complete; else it is what changed. `settled`: read every changed file now; otherwise a changed file is read when
    /// two scans saw it unchanged, as its writer may not be done.
    pub fn scan(&mut self, settled: bool) -> io::Result<Vec<SourceEvent>> {
        let mut found = BTreeSet::new();
        let mut events = Vec::new();
        let mut beyond = 0_usize;
        for entry in fs::read_dir(&self.path)? {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            if !counts(&name) {
                continue;
            }
            if found.len() >= MAX_FILES && !self.files.contains_key(&name) {
                beyond += 1;
                continue;
            }
            found.insert(name);
        }
        if beyond != self.beyond {
            self.beyond = beyond;
            let reason = format!("{beyond} files beyond {MAX_FILES} are not read");
            let problems = (beyond > 0).then(|| file_problem("folder", "", reason)).into_iter().collect();
            events.push(SourceEvent::Problems { origin: "folder: size".to_owned(), problems });
        }

        let gone: Vec<String> = self.files.keys().filter(|name| !found.contains(*name)).cloned().collect();
        let mut touched = BTreeSet::new();
        for name in gone {
            self.read(&name, &mut touched, &mut events);
        }
        for name in found {
            if self.is_due(&name, settled) {
                self.read(&name, &mut touched, &mut events);
            }
        }
        self.settle(touched, &mut events);
        self.list(true, &mut events);
        Ok(events)
    }

    /// Reads these files again (or notices that they are gone).
    pub fn reread<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) -> Vec<SourceEvent> {
        let (mut touched, mut events) = (BTreeSet::new(), Vec::new());
        for name in names {
            if counts(name) {
                self.read(name, &mut touched, &mut events);
            }
        }
        self.settle(touched, &mut events);
        self.list(false, &mut events);
        events
    }

    /// Whether a symbolic link of that name is in the folder: such a file appears whole.
    pub fn is_symlink(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path.join(name)).is_ok_and(|metadata| metadata.is_symlink())
    }

    /// Puts resets in the place of single changes when the list is new or has become complete.
    fn list(&mut self, scanned: bool, events: &mut Vec<SourceEvent>) {
        let complete = self.beyond == 0 && self.files.values().all(|file| file.whole);
        match self.listing {
            Listing::Complete => return,
            Listing::Partial if !complete => return,
            Listing::Unread if !scanned => return,
            Listing::Partial | Listing::Unread => {}
        }
        self.listing = if complete { Listing::Complete } else { Listing::Partial };
        let of_kind = |kind| {
            self.merged.values().filter(move |object| object.kind() == kind).cloned().collect::<Vec<_>>()
        };
        let reset = |kind| SourceEvent::Reset { kind, objects: of_kind(kind), complete, unread: Vec::new() };
        events.retain(|event| matches!(event, SourceEvent::Problems { .. }));
        events.splice(0..0, Kind::ALL.map(reset));
    }

    fn is_due(&mut self, name: &str, settled: bool) -> bool {
        let Ok(metadata) = fs::metadata(self.path.join(name)) else { return true };
        let now = Some(stamp(&metadata));
        let Some(state) = self.files.get_mut(name) else {
            if !settled {
                self.files.insert(name.to_owned(), FileState { unsettled: now, ..FileState::default() });
            }
            return settled;
        };
        if state.stamp == now {
            return false;
        }
        let due = settled || state.unsettled == now;
        state.unsettled = now;
        due
    }

    /// Takes in one file; `touched` collects the objects that may have changed.
    fn read(&mut self, name: &str, touched: &mut BTreeSet<Key>, events: &mut Vec<SourceEvent>) {
        let state = self.files.entry(name.to_owned()).or_default();
        let before = std::mem::take(&mut state.objects);
        let mut problems = Vec::new();
        let read = read_file(&self.path.join(name));
        let gone = matches!(&read, Ok(None));
        let mut after = BTreeMap::new();
        let mut keep = false;
        match read {
            Ok(None) => {}
            Ok(Some((stamp, bytes))) => {
                state.stamp = Some(stamp);
                if is_conflict_copy(name) {
                    let reason = "is what a sync program made of two versions of a file: not read; \
                                  see which one is right, and remove this one";
                    problems.push(file_problem(name, "", reason));
                } else if bytes.trim_ascii().is_empty() {
                    let reason = "is empty; remove the file if that is meant";
                    problems.push(file_problem(name, "", reason));
                    keep = true;
                } else {
                    let parsed = manifest::parse(&bytes, name.ends_with(".json"));
                    (after, problems, keep) = take(name, parsed);
                    if after.is_empty() && name.ends_with(PUBLISHED_SUFFIX) {
                        if problems.is_empty() {
                            problems.push(file_problem(name, "", "announces nothing of its node"));
                        }
                        keep = true;
                    }
                }
            }
            Err(Unreadable { stamp, is_file, reason }) => {
                state.stamp = stamp;
                problems.push(file_problem(name, "", reason));
                keep = is_file && !is_conflict_copy(name);
            }
        }
        state.whole |= !keep;
        if keep {
            for (key, object) in &before {
                after.entry(key.clone()).or_insert_with(|| object.clone());
            }
        }
        for key in before.keys().filter(|key| !after.contains_key(*key)) {
            if let Some(holders) = self.holders.get_mut(key) {
                holders.remove(name);
            }
        }
        for key in after.keys().filter(|key| !before.contains_key(*key)) {
            self.holders.entry(key.clone()).or_default().insert(name.to_owned());
        }
        touched.extend(before.into_keys());
        touched.extend(after.keys().cloned());
        if let Some(node) = name.strip_suffix(PUBLISHED_SUFFIX) {
            // That Node may have waited for this file.
            touched.insert(Key { kind: Kind::Node, namespace: String::new(), name: node.to_owned() });
        }
        if state.problems != problems || gone {
            events.push(SourceEvent::Problems { origin: format!("file {name}"), problems: problems.clone() });
        }
        state.objects = after;
        state.problems = problems;
        if gone {
            self.files.remove(name);
        }
    }

    /// Works out what the touched objects are now and tells what changed.
    fn settle(&mut self, touched: BTreeSet<Key>, events: &mut Vec<SourceEvent>) {
        let mut conflicts_changed = false;
        for key in touched {
            let (merged, conflicts) = self.merge(&key);
            let before = if conflicts.is_empty() {
                self.conflicts.remove(&key)
            } else {
                self.conflicts.insert(key.clone(), conflicts.clone())
            };
            conflicts_changed |= before.unwrap_or_default() != conflicts;
            match merged {
                Merged::Object(object) => {
                    self.withheld.remove(&key);
                    if self.merged.get(&key) != Some(&object) {
                        self.merged.insert(key, object.clone());
                        events.push(SourceEvent::Apply(object));
                    }
                }
                Merged::Withheld => drop(self.withheld.insert(key)),
                Merged::Nothing => {
                    // One that was withheld is known to others from before.
                    let withheld = self.withheld.remove(&key);
                    if self.merged.remove(&key).is_some() || withheld {
                        events.push(SourceEvent::Delete(key));
                    }
                }
            }
        }
        if conflicts_changed {
            let problems = self.conflicts.values().flatten().cloned().collect();
            events.push(SourceEvent::Problems { origin: CONFLICTS.to_owned(), problems });
        }
    }

    /// Whether what this Node announces is in a file that could not be read yet. To tell the Node without
    /// it would take the keys away that everybody still has of it.
    fn awaits_announcement(&self, key: &Key) -> bool {
        let unread = || {
            let published = self.files.get(&format!("{}{PUBLISHED_SUFFIX}", key.name));
            published.is_some_and(|file| !file.whole)
        };
        key.kind == Kind::Node && self.listing != Listing::Complete && unread()
    }

    fn merge(&mut self, key: &Key) -> (Merged, Vec<Problem>) {
        let mut problems = Vec::new();
        let Some(holders) = self.holders.get(key).filter(|holders| !holders.is_empty()) else {
            self.holders.remove(key);
            return (Merged::Nothing, problems);
        };
        let held =
            holders.iter().filter_map(|name| Some((name.as_str(), self.files.get(name)?.objects.get(key)?)));
        let (published, mut written): (Vec<_>, Vec<_>) =
            held.partition(|(name, _)| name.ends_with(PUBLISHED_SUFFIX));
        let published = published.first().copied();
        written.sort_by_key(|(name, object)| (!says_enough(object), stem(name), *name));
        let base = written.first().copied();
        for (name, _) in written.iter().skip(1) {
            let first = base.map_or("", |(first, _)| first);
            problems.push(file_problem(
                name,
                "",
                format!("{key} is in {first} already; this one is not used"),
            ));
        }
        if published.is_none() && self.awaits_announcement(key) {
            return (Merged::Withheld, problems);
        }
        let merged = match (base, published) {
            (Some((base_name, Object::Node(node))), Some((_, Object::Node(announced)))) => {
                let mut node = node.as_ref().clone();
                let own = node.metadata.annotations.get_or_insert_default();
                for (annotation, value) in announced.metadata.annotations.iter().flatten() {
                    match own.get(annotation) {
                        None => drop(own.insert(annotation.clone(), value.clone())),
                        Some(written) if written != value => {
                            let reason = format!("{annotation} hides what {} publishes itself", key.name);
                            problems.push(file_problem(base_name, "", reason));
                        }
                        Some(_) => {}
                    }
                }
                Merged::Object(Object::Node(Arc::new(node)))
            }
            (Some((_, object)), _) => Merged::Object(object.clone()),
            (None, Some((name, _))) => {
                let reason =
                    format!("no other file holds {key} yet: its pod range and addresses are not known");
                problems.push(file_problem(name, "", reason));
                Merged::Nothing
            }
            (None, None) => Merged::Nothing,
        };
        (merged, problems)
    }
}

/// Whether a file of that name is one of ours.
fn counts(name: &str) -> bool {
    !name.starts_with('.') && ENDINGS.iter().any(|end| name.ends_with(end))
}

/// The name without its ending.
fn stem(name: &str) -> &str {
    ENDINGS.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name)
}

fn is_conflict_copy(name: &str) -> bool {
    let name = name.to_lowercase();
    CONFLICT_COPIES.iter().any(|mark| name.contains(mark))
}

/// Whether an object says what only a person can say about it: a Node's pod ranges.
fn says_enough(object: &Object) -> bool {
    match object {
        Object::Node(node) => node.spec.as_ref().is_some_and(|spec| {
            spec.pod_cidr.is_some() || spec.pod_cidrs.as_ref().is_some_and(|ranges| !ranges.is_empty())
        }),
        Object::Service(_) | Object::EndpointSlice(_) | Object::Pod(_) | Object::ServiceCidr(_) => true,
    }
}

fn stamp(metadata: &fs::Metadata) -> Stamp {
    Stamp {
        inode: metadata.ino(),
        device: metadata.dev(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    }
}

/// What cannot be read.
struct Unreadable {
    /// What it looked like, if that is known.
    stamp: Option<Stamp>,
    /// Whether it is, or may become, a file that holds something.
    is_file: bool,
    /// Why.
    reason: String,
}

/// The file's content; `None` when there is no such file.
fn read_file(path: &Path) -> Result<Option<(Stamp, Vec<u8>)>, Unreadable> {
    let fail = |stamp| {
        move |error: io::Error| Unreadable {
            stamp,
            is_file: true,
            reason: format!("cannot be read: {error}"),
        }
    };
    // O_NONBLOCK: opening a FIFO that somebody put here must not hang the agent.
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
            return Ok(None);
        }
        Err(error) => return Err(fail(None)(error)),
    };
    let metadata = file.metadata().map_err(fail(None))?;
    let stamp = stamp(&metadata);
    if !metadata.is_file() {
        let reason = "is not a regular file".to_owned();
        return Err(Unreadable { stamp: Some(stamp), is_file: false, reason });
    }
    if metadata.len() > MAX_FILE_BYTES {
        let reason = format!("is larger than {} MiB", MAX_FILE_BYTES >> 20);
        return Err(Unreadable { stamp: Some(stamp), is_file: true, reason });
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(fail(Some(stamp)))?;
    Ok(Some((stamp, bytes)))
}

fn file_problem(name: &str, field: &str, reason: impl Into<String>) -> Problem {
    Problem {
        kind: ProblemKind::File,
        subject: name.to_owned(),
        field: field.to_owned(),
        reason: reason.into(),
    }
}

/// The usable objects of a file, its problems, and whether it may hold more of ours than could be read.
fn take(name: &str, parsed: manifest::Manifest) -> (BTreeMap<Key, Object>, Vec<Problem>, bool) {
    let bad = parsed.problems.iter().any(|problem| match problem.flaw {
        Flaw::Syntax | Flaw::Object => true,
        Flaw::Foreign => false,
    });
    let mut problems: Vec<Problem> = parsed
        .problems
        .into_iter()
        .map(|problem| Problem {
            kind: match problem.flaw {
                Flaw::Syntax => ProblemKind::File,
                Flaw::Object | Flaw::Foreign => ProblemKind::Object,
            },
            subject: name.to_owned(),
            field: place(problem.document, problem.line),
            reason: problem.reason,
        })
        .collect();
    problems.extend(parsed.unknown.into_iter().map(|mut problem| {
        problem.reason += &format!(" (in {name})");
        problem
    }));
    let mut objects = BTreeMap::new();
    for object in parsed.objects {
        let key = object.key();
        let object = match name.strip_suffix(PUBLISHED_SUFFIX) {
            None => object,
            Some(node) => match announced(node, &object) {
                Ok(object) => object,
                Err(reason) => {
                    problems.push(file_problem(name, "", format!("{key} is not used: {reason}")));
                    continue;
                }
            },
        };
        match objects.entry(key) {
            Entry::Vacant(entry) => drop(entry.insert(object)),
            Entry::Occupied(entry) => {
                let reason = format!("holds {} twice; the first is used", entry.key());
                problems.push(file_problem(name, "", reason));
            }
        }
    }
    (objects, problems, bad)
}

/// `document 2, line 14`; 0 is not known, and not said.
fn place(document: usize, line: u64) -> String {
    let parts = [("document", document as u64), ("line", line)].into_iter().filter(|(_, number)| *number > 0);
    parts.map(|(what, number)| format!("{what} {number}")).collect::<Vec<_>>().join(", ")
}

/// What `<node>.warren.yaml` may say: annotations of ours, of that Node, and nothing else.
fn announced(node: &str, object: &Object) -> Result<Object, String> {
    let Object::Node(given) = object else { return Err("such a file holds one Node only".to_owned()) };
    if given.metadata.name.as_deref() != Some(node) {
        return Err(format!("the file's name says that it speaks for {node}"));
    }
    let mut kept = k8s_openapi::api::core::v1::Node::default();
    kept.metadata.name = Some(node.to_owned());
    let ours = given.metadata.annotations.iter().flatten().filter(|(name, _)| name.starts_with(PREFIX));
    kept.metadata.annotations = Some(ours.map(|(name, value)| (name.clone(), value.clone())).collect());
    Ok(Object::Node(Arc::new(kept)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, range: &str) -> String {
        format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{range}]}}\n")
    }

    /// Every change in short form: `+key`, `-key`, `=kind:count` for a reset (`~kind:count` if it is not
    /// complete), `!origin:count` for problems.
    fn short(events: &[SourceEvent]) -> Vec<String> {
        events
            .iter()
            .filter_map(|event| match event {
                SourceEvent::Apply(object) => Some(format!("+{}", object.key())),
                SourceEvent::Delete(key) => Some(format!("-{key}")),
                SourceEvent::Reset { objects, .. } if objects.is_empty() => None,
                SourceEvent::Reset { kind, objects, complete, .. } => {
                    let sign = if *complete { '=' } else { '~' };
                    Some(format!("{sign}{}:{}", kind.name(), objects.len()))
                }
                SourceEvent::Problems { origin, problems } => Some(format!("!{origin}:{}", problems.len())),
            })
            .collect()
    }

    fn setup(files: &[(&str, &str)]) -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let folder = Folder::new(dir.path());
        (dir, folder)
    }

    #[test]
    fn first_scan_resets_then_changes_are_told_once() {
        let text = format!("{}---\n{}", node("a", "10.1.0.0/24"), node("b", "10.2.0.0/24"));
        let (dir, mut folder) = setup(&[("n.yaml", &text), (".n.yaml.swp", "junk"), ("README", "[")]);
        let first = folder.scan(true).unwrap();
        assert_eq!(first.iter().filter(|e| matches!(e, SourceEvent::Reset { .. })).count(), Kind::ALL.len());
        assert_eq!(short(&first), ["=Node:2"]);
        assert!(short(&folder.scan(true).unwrap()).is_empty());
        assert!(short(&folder.reread(["n.yaml"])).is_empty());

        fs::write(dir.path().join("n.yaml"), node("a", "10.3.0.0/24")).unwrap();
        assert_eq!(short(&folder.reread(["n.yaml"])), ["+Node/a", "-Node/b"]);
        fs::remove_file(dir.path().join("n.yaml")).unwrap();
        assert_eq!(short(&folder.reread(["n.yaml"])), ["!file n.yaml:0", "-Node/a"]);
    }

    #[test]
    fn a_half_written_file_keeps_what_it_gave() {
        let text = format!("{}---\n{}", node("a", "10.1.0.0/24"), node("b", "10.2.0.0/24"));
        let (dir, mut folder) = setup(&[("n.yaml", &text)]);
        folder.scan(true).unwrap();
        let path = dir.path().join("n.yaml");
        fs::write(&path, format!("{}---\napiVersion: v1\nkind: {{", node("a", "10.9.0.0/24"))).unwrap();
        assert_eq!(short(&folder.reread(["n.yaml"])), ["!file n.yaml:1", "+Node/a"]);
        fs::write(&path, "").unwrap();
        assert_eq!(short(&folder.reread(["n.yaml"])), ["!file n.yaml:1"]);
        fs::write(&path, &text).unwrap();
        assert_eq!(short(&folder.reread(["n.yaml"])), ["!file n.yaml:0", "+Node/a"]);
    }

    #[test]
    fn the_list_is_complete_when_every_file_was_read_whole_once() {
        let foreign = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n";
        for broken in ["", "kind: [", "apiVersion: v1\nkind: Node\nmetadata: 7\n", "apiVersion: v1\nkind: No"]
        {
            let good = format!("{foreign}---\n{}", node("a", "10.1.0.0/24"));
            let (dir, mut folder) = setup(&[("a.yaml", &good), ("b.yaml", broken)]);
            let events = short(&folder.scan(true).unwrap());
            assert_eq!(events, ["~Node:1", "!file a.yaml:1", "!file b.yaml:1"], "{broken:?}");
            // Incomplete as it is, it follows what can be read.
            fs::write(dir.path().join("c.yaml"), node("c", "10.3.0.0/24")).unwrap();
            assert_eq!(short(&folder.reread(["c.yaml"])), ["+Node/c"]);
            fs::write(dir.path().join("c.yaml"), "kind: [").unwrap();
            assert_eq!(short(&folder.reread(["c.yaml"])), ["!file c.yaml:1"]);
            fs::write(dir.path().join("b.yaml"), node("b", "10.2.0.0/24")).unwrap();
            assert_eq!(short(&folder.reread(["b.yaml"])), ["=Node:3", "!file b.yaml:0"]);
            fs::write(dir.path().join("b.yaml"), broken).unwrap();
            assert_eq!(short(&folder.reread(["b.yaml"])), ["!file b.yaml:1"]);
        }
        let (dir, mut folder) = setup(&[("a.yaml", &node("a", "10.1.0.0/24"))]);
        std::os::unix::fs::symlink("nowhere", dir.path().join("b.yaml")).unwrap();
        assert_eq!(short(&folder.scan(true).unwrap()), ["~Node:1", "!file b.yaml:1"]);
        fs::write(dir.path().join("nowhere"), node("b", "10.2.0.0/24")).unwrap();
        assert_eq!(short(&folder.scan(true).unwrap()), ["=Node:2", "!file b.yaml:0"]);
    }

    #[test]
    fn what_can_hold_none_of_our_objects_does_not_keep_the_list_from_being_complete() {
        let (dir, mut folder) =
            setup(&[("a.yaml", &node("a", "10.1.0.0/24")), ("values.yaml", "replicas: 2\n")]);
        fs::create_dir(dir.path().join("d.yaml")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("f.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join("n.yaml")).unwrap();
        let events = short(&folder.scan(true).unwrap());
        let said = ["d", "f", "n", "values"].map(|name| format!("!file {name}.yaml:1"));
        assert_eq!(events.first().map(String::as_str), Some("=Node:1"));
        assert_eq!(events[1..], said);
        // In the place of a file it is that file's removal, now as after a restart.
        fs::remove_file(dir.path().join("a.yaml")).unwrap();
        fs::create_dir(dir.path().join("a.yaml")).unwrap();
        assert_eq!(short(&folder.scan(true).unwrap()), ["!file a.yaml:1", "-Node/a"]);
    }

    #[test]
    fn what_is_removed_is_gone_also_from_an_incomplete_list() {
        let files = [
            ("a.yaml", node("a", "10.1.0.0/24")),
            ("b.yaml", node("b", "10.2.0.0/24")),
            ("b.warren.yaml", "# half a comment".to_owned()),
            ("c.yaml", node("c", "10.3.0.0/24")),
            ("x.yaml", "kind: [".to_owned()),
        ];
        let (dir, mut folder) = setup(&files.each_ref().map(|(name, text)| (*name, text.as_str())));
        let events = short(&folder.scan(true).unwrap());
        assert_eq!(events, ["~Node:2", "!file b.warren.yaml:1", "!file x.yaml:1"]);
        // Read, though not told: others may know it from before.
        for gone in ["a", "b"] {
            fs::remove_file(dir.path().join(format!("{gone}.yaml"))).unwrap();
            let events = short(&folder.reread([format!("{gone}.yaml").as_str()]));
            assert_eq!(events, [format!("!file {gone}.yaml:0"), format!("-Node/{gone}")]);
        }
        // A Node that was told stays as it was when its announcement turns up and cannot be read.
        fs::write(dir.path().join("c.warren.yaml"), "kind: [").unwrap();
        assert_eq!(short(&folder.reread(["c.warren.yaml"])), ["!file c.warren.yaml:1"]);
    }

    #[test]
    fn a_node_is_not_told_without_its_announcement_while_that_cannot_be_read() {
        let text = format!("{}---\n{}", node("a", "10.1.0.0/24"), node("b", "10.2.0.0/24"));
        let (dir, mut folder) = setup(&[("n.yaml", &text), ("b.warren.yaml", "kind: [")]);
        assert_eq!(short(&folder.scan(true).unwrap()), ["~Node:1", "!file b.warren.yaml:1"]);
        fs::remove_file(dir.path().join("b.warren.yaml")).unwrap();
        assert_eq!(short(&folder.reread(["b.warren.yaml"])), ["=Node:2", "!file b.warren.yaml:0"]);
        // From then on the folder's word counts.
        fs::write(dir.path().join("b.warren.yaml"), "kind: [").unwrap();
        assert_eq!(short(&folder.reread(["b.warren.yaml"])), ["!file b.warren.yaml:1"]);
    }

    #[test]
    fn copies_that_sync_programs_make_are_named_and_not_read() {
        for copy in [
            "b.warren.sync-conflict-20261121-120000-ABCDEFG.yaml",
            "b (Jo's conflicted copy 2026-11-21).yaml",
            "b (conflicted copy 2026-11-21 120000).yaml",
            "b_conflict-20261121-120000.yaml",
            "b (SFConflict jo@example.com 2026-11-21).yaml",
        ] {
            let (_dir, mut folder) =
                setup(&[("b.yaml", &node("b", "10.2.0.0/24")), (copy, &node("b", "10.9.0.0/24"))]);
            let events = folder.scan(true).unwrap();
            assert_eq!(short(&events), ["=Node:1".to_owned(), format!("!file {copy}:1")]);
            assert!(short(&folder.scan(true).unwrap()).is_empty());
        }
    }

    #[test]
    fn a_node_with_pod_ranges_comes_before_one_without_and_a_file_before_its_copies() {
        let bare = "apiVersion: v1\nkind: Node\nmetadata: {name: a}\n";
        let range = |folder: &Folder| {
            let Some(Object::Node(node)) = folder.merged.values().next() else { panic!() };
            node.spec.as_ref().unwrap().pod_cidrs.clone().unwrap().remove(0)
        };
        let good = node("a", "10.1.0.0/24");
        let (_dir, mut folder) = setup(&[("a.yaml", bare), ("nodes.yaml", &good)]);
        folder.scan(true).unwrap();
        assert_eq!(range(&folder), "10.1.0.0/24");
        let old = node("a", "10.9.0.0/24");
        let copies = ["nodes (1).yaml", "nodes - Copy.yaml", "nodes copy.yaml", "nodes-laptop.yaml"];
        for copy in copies {
            let (_dir, mut folder) = setup(&[("nodes.yaml", &good), (copy, &old)]);
            assert_eq!(short(&folder.scan(true).unwrap()), ["=Node:1", "!folder: same object twice:1"]);
            assert_eq!(range(&folder), "10.1.0.0/24", "{copy}");
        }
    }

    #[test]
    fn a_misspelt_field_is_said_and_the_object_counts() {
        let wrong = node("a", "10.244.1.0/24").replace("podCIDRs", "podCidrs");
        let (dir, mut folder) = setup(&[("machines.yaml", &wrong)]);
        let events = folder.scan(true).unwrap();
        assert_eq!(short(&events), ["=Node:1", "!file machines.yaml:1"]);
        let said = events.iter().find_map(|event| match event {
            SourceEvent::Problems { problems, .. } => problems.first(),
            _ => None,
        });
        let said = said.unwrap();
        assert_eq!((said.kind, said.field.as_str()), (ProblemKind::Value, "spec.podCidrs"));
        assert_eq!(
            said.to_string(),
            "Node/a, spec.podCidrs: Warren knows no such field of a Node and passes over it; did you mean podCIDRs? \
             (in machines.yaml)"
        );
        fs::write(dir.path().join("machines.yaml"), node("a", "10.244.1.0/24")).unwrap();
        assert_eq!(short(&folder.reread(["machines.yaml"])), ["!file machines.yaml:0", "+Node/a"]);
    }

    #[test]
    fn what_is_not_known_of_a_place_is_not_said() {
        assert_eq!((place(2, 14).as_str(), place(0, 3).as_str()), ("document 2, line 14", "line 3"));
        assert_eq!((place(2, 0).as_str(), place(0, 0).as_str()), ("document 2", ""));
    }

    #[test]
    fn an_unsettled_file_waits_for_the_second_scan() {
        let (dir, mut folder) = setup(&[]);
        folder.scan(true).unwrap();
        fs::write(dir.path().join("n.yaml"), node("a", "10.1.0.0/24")).unwrap();
        assert!(short(&folder.scan(false).unwrap()).is_empty());
        assert_eq!(short(&folder.scan(false).unwrap()), ["+Node/a"]);
    }

    #[test]
    fn published_annotations_join_the_written_node() {
        let published = "apiVersion: v1\nkind: Node\nmetadata:\n  name: a\n  annotations:\n    warren.dev/location: x\n    \
                         other/annotation: y\nspec: {podCIDRs: [0.0.0.0/0]}\n";
        let (dir, mut folder) = setup(&[("a.warren.yaml", published)]);
        assert_eq!(short(&folder.scan(true).unwrap()), ["!folder: same object twice:1"]);
        fs::write(dir.path().join("n.yaml"), node("a", "10.1.0.0/24")).unwrap();
        let events = folder.reread(["n.yaml"]);
        assert_eq!(short(&events), ["+Node/a", "!folder: same object twice:0"]);
        let Some(SourceEvent::Apply(Object::Node(merged))) = events.first() else { panic!() };
        let annotations = merged.metadata.annotations.clone().unwrap();
        assert_eq!(annotations.into_iter().collect::<Vec<_>>(), [("warren.dev/location".into(), "x".into())]);
        let ranges = merged.spec.as_ref().unwrap().pod_cidrs.clone();
        assert_eq!(ranges, Some(vec!["10.1.0.0/24".to_owned()]));

        // It speaks for `a` only, and withdraws its annotations when it goes.
        fs::write(dir.path().join("b.warren.yaml"), published).unwrap();
        assert_eq!(short(&folder.reread(["b.warren.yaml"])), ["!file b.warren.yaml:1"]);
        fs::remove_file(dir.path().join("a.warren.yaml")).unwrap();
        assert_eq!(short(&folder.reread(["a.warren.yaml"])), ["!file a.warren.yaml:0", "+Node/a"]);
    }

    #[test]
    fn the_first_name_wins_whatever_the_order_of_arrival() {
        let (dir, mut folder) = setup(&[("b.yaml", &node("a", "10.2.0.0/24"))]);
        folder.scan(true).unwrap();
        fs::write(dir.path().join("a.yaml"), node("a", "10.1.0.0/24")).unwrap();
        assert_eq!(short(&folder.reread(["a.yaml"])), ["+Node/a", "!folder: same object twice:1"]);
        fs::remove_file(dir.path().join("a.yaml")).unwrap();
        let events = short(&folder.reread(["a.yaml"]));
        assert_eq!(events, ["!file a.yaml:0", "+Node/a", "!folder: same object twice:0"]);
    }

    #[test]
    fn what_is_no_regular_file_is_refused_without_hanging() {
        let (dir, mut folder) = setup(&[]);
        nix::unistd::mkfifo(&dir.path().join("f.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir(dir.path().join("d.yaml")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("z.yaml")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("n.yaml")).unwrap();
        let events = short(&folder.scan(true).unwrap());
        assert_eq!(events, ["!file d.yaml:1", "!file f.yaml:1", "!file n.yaml:1", "!file z.yaml:1"]);
    }

    #[test]
    fn a_config_map_volume_swaps_all_its_files_at_once() {
        let (dir, mut folder) = setup(&[]);
        let path = |name: &str| dir.path().join(name);
        for (version, range) in [("..1", "10.1.0.0/24"), ("..2", "10.2.0.0/24")] {
            fs::create_dir(path(version)).unwrap();
            fs::write(path(version).join("n.yaml"), node("a", range)).unwrap();
        }
        std::os::unix::fs::symlink("..1", path("..data")).unwrap();
        std::os::unix::fs::symlink("..data/n.yaml", path("n.yaml")).unwrap();
        assert_eq!(short(&folder.scan(true).unwrap()), ["=Node:1"]);
        std::os::unix::fs::symlink("..2", path("..data_tmp")).unwrap();
        fs::rename(path("..data_tmp"), path("..data")).unwrap();
        assert_eq!(short(&folder.scan(true).unwrap()), ["+Node/a"]);
    }
}
