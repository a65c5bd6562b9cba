//! What survives a restart: the last good state, and which peers were active.
//!
//! The state is saved as the Kubernetes objects that say it, so that a reload goes through the same
//! conversion as everything else. A torn, damaged or foreign file is set aside and not obeyed.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::desired::Desired;
use super::durable::{self, Loaded};
use super::services::saved::{self, SavedServices};
use super::source::{Object, manifest};
use crate::snapshot::PeerId;

/// Largest file that is read, and so that is written: 5,000 nodes make about 4 MiB.
pub(super) const MAX_BYTES: usize = 256 << 20;
/// Most peers in the list of active ones.
const MAX_RECENT: usize = 10_000;
const VERSION: u32 = 1;

/// The last good state of one node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    /// Every object.
    pub objects: Vec<Object>,
    /// Every peer's number, so that saved flows still mean the same peers.
    pub ids: Vec<(String, PeerId)>,
    /// When it was saved, in seconds since 1970.
    pub saved: u64,
}

/// A peer that traffic was exchanged with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecentPeer {
    /// The Node's name.
    pub name: String,
    /// When, in seconds since 1970.
    pub at: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    node: String,
    saved: u64,
    ids: BTreeMap<String, u32>,
    list: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecentBody {
    node: String,
    peers: Vec<RecentPeer>,
}

/// The files of one node in its state folder.
#[derive(Clone, Debug)]
pub struct CheckpointFiles {
    folder: PathBuf,
    node: String,
    /// [`MAX_BYTES`].
    largest: usize,
}

impl CheckpointFiles {
    /// Those of this node in this folder.
    pub fn new(folder: impl Into<PathBuf>, node: impl Into<String>) -> CheckpointFiles {
        CheckpointFiles { folder: folder.into(), node: node.into(), largest: MAX_BYTES }
    }

    /// Takes what a checkpoint holds out of the running state.
    pub fn capture<'a>(
        desired: &Desired,
        ids: impl Iterator<Item = (&'a str, PeerId)>,
        saved: u64,
    ) -> Checkpoint {
        let ids = ids.map(|(name, id)| (name.to_owned(), id)).collect();
        Checkpoint { objects: desired.objects(), ids, saved }
    }

    /// Saves the state.
    pub fn save(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        let items: Result<Vec<Value>, serde_json::Error> = checkpoint.objects.iter().map(to_value).collect();
        let body = Body {
            node: self.node.clone(),
            saved: checkpoint.saved,
            ids: checkpoint.ids.iter().map(|(name, id)| (name.clone(), id.0)).collect(),
            list: json!({"apiVersion": "v1", "kind": "List", "items": items?}),
        };
        self.write(&self.state_path(), "checkpoint", &serde_json::to_vec(&body)?)
    }

    /// Saves Services, in a file of their own: they change much more often than the mesh, and may be many.
    /// Returns how many bytes that took. [`FileTooLarge`](io::ErrorKind::FileTooLarge): what was saved before stays.
    pub fn save_services(&self, services: &SavedServices) -> io::Result<usize> {
        let mut body = format!("{}\n", self.node).into_bytes();
        services.write(&mut body, self.largest)?;
        self.write(&self.services_path(), "services", &body)?;
        Ok(body.len())
    }

    /// Loads the state with its Services. What is damaged is set aside.
    pub fn load(&self) -> io::Result<Loaded<Checkpoint>> {
        let mut loaded = self.load_mesh()?;
        if let Loaded::Good(checkpoint) = &mut loaded {
            // The mesh does without them.
            match self.load_services() {
                Ok(Loaded::Good(services)) => checkpoint.objects.extend(services),
                Ok(Loaded::Missing) => {}
                Ok(Loaded::SetAside { reason, .. }) => {
                    tracing::warn!("the saved Services are not used: the file {reason}")
                }
                Err(error) => tracing::warn!("the saved Services are not used: {error}"),
            }
        }
        Ok(loaded)
    }

    fn load_services(&self) -> io::Result<Loaded<Vec<Object>>> {
        load(&self.services_path(), "services", |bytes| {
            let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
            let (node, lines) = bytes.split_at(end);
            self.check_node(&String::from_utf8_lossy(node))?;
            saved::from_bytes(lines.get(1..).unwrap_or_default())
        })
    }

    fn load_mesh(&self) -> io::Result<Loaded<Checkpoint>> {
        load(&self.state_path(), "checkpoint", |bytes| {
            let body: Body = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
            self.check_node(&body.node)?;
            let parsed = manifest::from_value(body.list);
            if let Some(problem) = parsed.problems.first() {
                return Err(format!("holds an object that cannot be used: {}", problem.reason));
            }
            let ids = body.ids.into_iter().map(|(name, id)| (name, PeerId(id))).collect();
            Ok(Checkpoint { objects: parsed.objects, ids, saved: body.saved })
        })
    }

    /// Saves the list of active peers, the most recent first; what is too much is left out.
    pub fn save_recent(&self, peers: &[RecentPeer]) -> io::Result<()> {
        let mut peers = peers.to_vec();
        peers.sort_by(|a, b| b.at.cmp(&a.at).then_with(|| a.name.cmp(&b.name)));
        peers.truncate(MAX_RECENT);
        let body = RecentBody { node: self.node.clone(), peers };
        self.write(&self.recent_path(), "recent", &serde_json::to_vec(&body)?)
    }

    /// Loads the list of active peers.
    pub fn load_recent(&self) -> io::Result<Loaded<Vec<RecentPeer>>> {
        load(&self.recent_path(), "recent", |bytes| {
            let body: RecentBody = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
            self.check_node(&body.node)?;
            let named = |peer: &RecentPeer| manifest::is_dns_name(&peer.name);
            Ok(body.peers.into_iter().filter(named).take(MAX_RECENT).collect())
        })
    }

    fn state_path(&self) -> PathBuf {
        self.folder.join("checkpoint.json")
    }

    fn services_path(&self) -> PathBuf {
        self.folder.join("services.jsonl")
    }

    fn recent_path(&self) -> PathBuf {
        self.folder.join("recent-peers.json")
    }

    fn write(&self, path: &Path, kind: &str, body: &[u8]) -> io::Result<()> {
        durable::private_folder(&self.folder)?;
        let sealed = durable::seal(kind, VERSION, body);
        if sealed.len() > self.largest {
            return Err(too_large(self.largest));
        }
        durable::replace(path, &sealed, 0o600)
    }

    /// A state folder copied from another machine must not make this node act for that one.
    fn check_node(&self, node: &str) -> Result<(), String> {
        if node == self.node {
            Ok(())
        } else {
            Err(format!("belongs to node {node}, this one is {}", self.node))
        }
    }
}

/// What would not be read again is not written.
pub(super) fn too_large(largest: usize) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("it would take more than {largest} bytes"))
}

fn load<T>(path: &Path, kind: &str, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> io::Result<Loaded<T>> {
    let Some(bytes) = durable::read(path, MAX_BYTES as u64)? else { return Ok(Loaded::Missing) };
    Ok(match durable::unseal(kind, VERSION, &bytes).and_then(parse) {
        Ok(value) => Loaded::Good(value),
        Err(reason) => durable::set_aside(path, reason),
    })
}

fn to_value(object: &Object) -> Result<Value, serde_json::Error> {
    match object {
        Object::Node(object) => serde_json::to_value(object.as_ref()),
        Object::Service(object) => serde_json::to_value(object.as_ref()),
        Object::EndpointSlice(object) => serde_json::to_value(object.as_ref()),
        Object::Pod(object) => serde_json::to_value(object.as_ref()),
        Object::ServiceCidr(object) => serde_json::to_value(object.as_ref()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn objects() -> Vec<Object> {
        let text = "apiVersion: v1\nkind: Node\nmetadata: {name: b, uid: u, creationTimestamp: 2026-01-02T03:04:05Z,\n  \
                    annotations: {warren.dev/location: x}}\nspec: {podCIDRs: [10.1.0.0/24]}\n---\n\
                    apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: k}\nspec: {cidrs: [10.96.0.0/16]}\n";
        manifest::parse(text.as_bytes(), false).objects
    }

    #[test]
    fn the_state_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::new(dir.path().join("deep/state"), "a");
        assert_eq!(files.load().unwrap(), Loaded::Missing);
        let mut desired = Desired::default();
        for object in objects() {
            desired.apply(&object);
        }
        let saved = CheckpointFiles::capture(&desired, [("b", PeerId(4))].into_iter(), 77);
        files.save(&saved).unwrap();
        let Loaded::Good(loaded) = files.load().unwrap() else { panic!() };
        assert_eq!(loaded, saved);
        let mut again = Desired::default();
        for object in &loaded.objects {
            again.apply(object);
        }
        assert!(again.nodes().eq(desired.nodes()));
    }

    #[test]
    fn services_come_back_and_a_bad_file_of_them_costs_only_them() {
        let dir = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::new(dir.path(), "a");
        let text = "{apiVersion: v1, kind: Service, metadata: {name: s}, spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}}";
        let mut desired = Desired::default();
        desired.apply(&manifest::parse(text.as_bytes(), false).objects[0]);
        files.save(&Checkpoint { objects: objects(), ..Checkpoint::default() }).unwrap();
        files.save_services(&SavedServices::capture(desired.services())).unwrap();
        let names = || match files.load().unwrap() {
            Loaded::Good(loaded) => loaded.objects.iter().map(|object| object.key().to_string()).collect(),
            Loaded::Missing | Loaded::SetAside { .. } => Vec::new(),
        };
        assert_eq!(names(), ["Node/b", "ServiceCIDR/k", "Service/default/s"]);
        CheckpointFiles::new(dir.path(), "other").save_services(&SavedServices::default()).unwrap();
        assert_eq!(names(), ["Node/b", "ServiceCIDR/k"]);
        assert!(dir.path().join("services.jsonl.bad").exists());
    }

    #[test]
    fn too_many_services_are_neither_read_nor_written() {
        let dir = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::new(dir.path(), "a");
        files.save(&Checkpoint { objects: objects(), ..Checkpoint::default() }).unwrap();
        let large = fs::File::create(files.services_path()).unwrap();
        large.set_len(MAX_BYTES as u64 + 1).unwrap();
        let Loaded::Good(loaded) = files.load().unwrap() else { panic!() };
        assert_eq!(loaded.objects.len(), 2);
        // The next one to be saved takes its place, unless it would be too large itself.
        let written = files.save_services(&SavedServices::default()).unwrap();
        let before = fs::read(files.services_path()).unwrap();
        let small = CheckpointFiles { largest: written, ..files.clone() };
        let error = small.save_services(&SavedServices::default()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(fs::read(files.services_path()).unwrap(), before);
    }

    #[test]
    fn a_torn_or_foreign_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::new(dir.path(), "a");
        let checkpoint = Checkpoint { objects: objects(), ..Checkpoint::default() };
        for spoil in [
            |path: &Path, good: &[u8]| fs::write(path, &good[..good.len() / 2]).unwrap(),
            |path: &Path, _: &[u8]| fs::write(path, "{}").unwrap(),
            |path: &Path, _: &[u8]| fs::write(path, "").unwrap(),
            |path: &Path, _: &[u8]| {
                let other = CheckpointFiles::new(path.parent().unwrap(), "other");
                other.save(&Checkpoint::default()).unwrap();
            },
        ] {
            files.save(&checkpoint).unwrap();
            let good = fs::read(files.state_path()).unwrap();
            spoil(&files.state_path(), &good);
            let Loaded::SetAside { moved_to: Some(moved), .. } = files.load().unwrap() else { panic!() };
            assert!(moved.exists());
            assert_eq!(files.load().unwrap(), Loaded::Missing);
        }
    }

    #[test]
    fn active_peers_come_back_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::new(dir.path(), "a");
        let peer = |name: &str, at| RecentPeer { name: name.to_owned(), at };
        files.save_recent(&[peer("b", 1), peer("c", 9), peer("../x", 5)]).unwrap();
        assert_eq!(files.load_recent().unwrap(), Loaded::Good(vec![peer("c", 9), peer("b", 1)]));
    }
}
