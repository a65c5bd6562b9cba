//! What this node tells the others: its annotations, in a folder as `<node>.warren.yaml`, in Kubernetes on its Node
//! ([`node`]). [`events`]: what Kubernetes' users are told.
//!
//! The file is written only when it does not say what it should: after a change of ours, after somebody's
//! edit, after its removal. Our own writing is therefore never a reason to write again. If somebody keeps
//! changing it back (a second agent of that name), the pauses grow.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::annotations::{self, Announcement};
use super::durable;
use super::source::folder::PUBLISHED_SUFFIX;
use super::source::manifest::MAX_FILE_BYTES;

pub mod events;
pub mod node;

/// Where this node's announcement goes.
#[derive(Debug)]
pub enum Announcer {
    /// Into a folder.
    Folder(Publisher),
    /// To whoever keeps the Node right, who must not hold up the state line.
    Kubernetes(watch::Sender<Option<Announcement>>),
}

/// Longest pause between two repairs.
const LONGEST_PAUSE: Duration = Duration::from_secs(64);
/// After this long without a repair all is forgiven.
const FORGIVEN: Duration = Duration::from_secs(180);

/// What a look at the published file came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// It says what it should.
    Unchanged,
    /// It was written: for the first time, or because we have something new to say.
    Written,
    /// Somebody had edited or removed it; it is right again.
    Healed,
    /// It is wrong, but was repaired so often lately that we wait.
    Waiting,
}

/// The writer of `<node>.warren.yaml`.
#[derive(Debug)]
pub struct Publisher {
    path: PathBuf,
    node: String,
    last: Option<String>,
    repairs: Repairs,
}

impl Publisher {
    /// A publisher of this node in this folder.
    pub fn new(folder: &Path, node: &str) -> Publisher {
        Publisher {
            path: folder.join(format!("{node}{PUBLISHED_SUFFIX}")),
            node: node.to_owned(),
            last: None,
            repairs: Repairs::default(),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether something of that name is in the folder.
    pub fn exists(&self) -> bool {
        self.path.symlink_metadata().is_ok()
    }

    /// Makes the file say what it should.
    pub fn reconcile(&mut self, announcement: &Announcement, now: Instant) -> io::Result<Published> {
        let wanted = render(&self.node, announcement)?;
        // What cannot be read (a link, a folder, too large) is as wrong as other content.
        let found = durable::read(&self.path, MAX_FILE_BYTES).unwrap_or(Some(Vec::new()));
        if found.as_deref() == Some(wanted.as_bytes()) {
            self.last = Some(wanted);
            return Ok(Published::Unchanged);
        }
        let ours = self.last.as_ref() != Some(&wanted);
        if !ours && !self.repairs.left(now).is_zero() {
            return Ok(Published::Waiting);
        }
        durable::replace(&self.path, wanted.as_bytes(), 0o644)?;
        self.last = Some(wanted);
        if ours {
            return Ok(Published::Written);
        }
        self.repairs.done(now);
        Ok(Published::Healed)
    }
}

/// How often something was repaired lately.
#[derive(Clone, Copy, Debug, Default)]
struct Repairs {
    last: Option<Instant>,
    pause: Duration,
}

impl Repairs {
    /// How long the next repair has to wait.
    fn left(&mut self, now: Instant) -> Duration {
        let Some(last) = self.last else { return Duration::ZERO };
        let since = now.saturating_duration_since(last);
        if since >= FORGIVEN {
            self.pause = Duration::ZERO;
        }
        self.pause.saturating_sub(since)
    }

    fn done(&mut self, now: Instant) {
        self.last = Some(now);
        self.pause = (self.pause * 2).clamp(Duration::from_secs(1), LONGEST_PAUSE);
    }
}

fn render(node: &str, announcement: &Announcement) -> io::Result<String> {
    let mut text = format!(
        "# Written by the agent of this node, which undoes edits. What you have to say about the node\n\
         # belongs into another file of this folder: both are merged by name.\n\
         apiVersion: v1\nkind: Node\nmetadata:\n  name: {}\n  annotations:\n",
        serde_json::to_string(node)?
    );
    for (name, value) in annotations::render(announcement) {
        // A JSON string is a YAML string.
        text += &format!("    {name}: {}\n", serde_json::to_string(&value)?);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::PeerLane;
    use crate::state::source::folder::Folder;
    use crate::state::source::{Object, SourceEvent};
    use std::fs;

    fn announcement() -> Announcement {
        Announcement {
            lanes: vec![PeerLane { key: [7; 32], port: 51820 }],
            encaps: annotations::Encaps { wireguard: true, vxlan: false },
            location: Some("home".to_owned()),
            ..Announcement::default()
        }
    }

    #[test]
    fn writes_once_heals_and_waits_when_somebody_insists() {
        let dir = tempfile::tempdir().unwrap();
        let mut publisher = Publisher::new(dir.path(), "a");
        let mut said = announcement();
        #[expect(clippy::disallowed_methods, reason = "a start for the made-up clock")]
        let start = Instant::now();
        let mut look = |said: &Announcement, seconds: u64| {
            publisher.reconcile(said, start + Duration::from_secs(seconds)).unwrap()
        };
        let path = dir.path().join("a.warren.yaml");
        assert_eq!((look(&said, 0), look(&said, 0)), (Published::Written, Published::Unchanged));
        said.keepalive = 25;
        assert_eq!((look(&said, 0), look(&said, 0)), (Published::Written, Published::Unchanged));
        fs::remove_file(&path).unwrap();
        assert_eq!((look(&said, 0), look(&said, 0)), (Published::Healed, Published::Unchanged));
        let mut healed = 0;
        for second in 0..300 {
            fs::write(&path, "junk").unwrap();
            healed += usize::from(look(&said, second) == Published::Healed);
        }
        assert!((5..12).contains(&healed), "{healed} repairs in five minutes");
        fs::write(&path, "junk").unwrap();
        assert_eq!(look(&said, 1_000), Published::Healed);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_folder_source_reads_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut publisher = Publisher::new(dir.path(), "a");
        #[expect(clippy::disallowed_methods, reason = "any time will do")]
        publisher.reconcile(&announcement(), Instant::now()).unwrap();
        fs::write(dir.path().join("nodes.yaml"), "{apiVersion: v1, kind: Node, metadata: {name: a}}")
            .unwrap();
        let events = Folder::new(dir.path()).scan(true).unwrap();
        let node = events.iter().find_map(|event| match event {
            SourceEvent::Reset { objects, .. } => match objects.first() {
                Some(Object::Node(node)) => Some(node.clone()),
                Some(_) | None => None,
            },
            SourceEvent::Apply(_) | SourceEvent::Delete(_) | SourceEvent::Problems { .. } => None,
        });
        let annotations = node.unwrap().metadata.annotations.clone().unwrap();
        assert_eq!(annotations::parse(&annotations), (announcement(), Vec::new()));
    }
}
