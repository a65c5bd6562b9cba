//! The folder source: watches a folder with inotify and tells the state line what changed.
//!
//! inotify says when a file was closed after writing, renamed or removed; a burst of such news is waited
//! out, so that an editor's "remove, then write" is one change. A slow rescan catches what inotify cannot
//! see (NFS, files behind symbolic links, lost news). A missing folder is waited for, and what it gave
//! stays until it is back.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::SourceEvent;
use super::folder::Folder;
use crate::state::problem::{Problem, ProblemKind};

/// How long nothing may happen before a burst counts as over.
const QUIET: Duration = Duration::from_millis(40);
/// Most news in one burst; a writer that never pauses is not waited for longer.
const BURST: usize = 256;
/// How often everything is looked at whether or not inotify spoke.
const RESCAN: Duration = Duration::from_secs(5);
/// How often everything is looked at where inotify cannot be had.
const POLL: Duration = Duration::from_secs(1);
/// How often a missing folder is looked for.
const RETRY: Duration = Duration::from_millis(500);

/// A folder of Kubernetes objects, watched.
#[derive(Debug)]
pub struct DirSource {
    path: PathBuf,
    poll: bool,
}

impl DirSource {
    /// A source for this folder, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> DirSource {
        DirSource { path: path.into(), poll: false }
    }

    /// The same without inotify: it looks every second.
    pub fn polling(path: impl Into<PathBuf>) -> DirSource {
        DirSource { path: path.into(), poll: true }
    }

    /// Watches until nobody listens any more.
    pub async fn run(self, events: mpsc::Sender<SourceEvent>) {
        let origin = format!("folder {}", self.path.display());
        let mut folder = Some(Folder::new(self.path));
        loop {
            let outcome = watch(&mut folder, &events, &origin, self.poll).await;
            let reason = match outcome {
                Ok(Watch::Closed) => return,
                Ok(Watch::Gone) => "is gone; what it last held stays in force until it is back".to_owned(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    "does not exist; waiting for it".to_owned()
                }
                Err(error) => format!("cannot be watched: {error}; trying again"),
            };
            let problems = vec![problem(&origin, reason)];
            let news = SourceEvent::Problems { origin: origin.clone(), problems };
            if events.send(news).await.is_err() {
                return;
            }
            sleep(RETRY).await;
            if events.is_closed() {
                return;
            }
        }
    }
}

enum Watch {
    /// Nobody listens.
    Closed,
    /// The folder was removed, renamed or unmounted.
    Gone,
}

/// Watches the folder for as long as it is there.
async fn watch(
    folder: &mut Option<Folder>,
    events: &mpsc::Sender<SourceEvent>,
    origin: &str,
    poll: bool,
) -> io::Result<Watch> {
    let path = folder.as_ref().map(|folder| folder.path().to_owned()).unwrap_or_default();
    let (mut stream, complaint) = match open(&path) {
        _ if poll => (None, None),
        Ok(stream) => (Some(stream), None),
        // Out of inotify instances or watches (EMFILE, ENOSPC): the folder itself may be well.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOSPC)) => {
            let reason = format!(
                "inotify is used up ({error}), so it is looked at every second; raise \
                 fs.inotify.max_user_instances and max_user_watches"
            );
            (None, Some(problem(origin, reason)))
        }
        Err(error) => return Err(error),
    };

    // Only now, with the watch in place, is the first look complete: nothing falls in between.
    let first = work(folder, |folder| folder.scan(true)).await?;
    let well = SourceEvent::Problems { origin: origin.to_owned(), problems: complaint.into_iter().collect() };
    if !send(events, first?.into_iter().chain([well])).await {
        return Ok(Watch::Closed);
    }
    loop {
        let look = News { rescan: Some(false), ..News::default() };
        let news = match &mut stream {
            Some(stream) => timeout(RESCAN, burst(stream)).await.unwrap_or(Ok(look))?,
            None => {
                sleep(POLL).await;
                look
            }
        };
        if news.gone {
            return Ok(Watch::Gone);
        }
        let told = work(folder, move |folder| {
            let created =
                news.created.iter().filter(|name| folder.is_symlink(name)).cloned().collect::<Vec<_>>();
            let mut told = folder.reread(news.names.iter().chain(&created).map(String::as_str));
            if let Some(settled) = news.rescan {
                told.extend(folder.scan(settled)?);
            }
            Ok::<_, io::Error>(told)
        })
        .await?;
        if !send(events, told?).await {
            return Ok(Watch::Closed);
        }
    }
}

fn open(path: &Path) -> io::Result<EventStream<Vec<u8>>> {
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE
        | WatchMask::CREATE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    let inotify = Inotify::init()?;
    inotify.watches().add(path, mask)?;
    inotify.into_event_stream(vec![0_u8; 64 << 10])
}

fn problem(origin: &str, reason: String) -> Problem {
    Problem { kind: ProblemKind::File, subject: origin.to_owned(), field: String::new(), reason }
}

/// What a burst of inotify events comes to.
#[derive(Debug, Default)]
struct News {
    names: BTreeSet<String>,
    /// Appeared, perhaps still being written; a symbolic link is complete at once.
    created: BTreeSet<String>,
    /// Look at everything; true: right now, false: files still being written may wait.
    rescan: Option<bool>,
    gone: bool,
}

async fn burst(stream: &mut EventStream<Vec<u8>>) -> io::Result<News> {
    let mut news = News::default();
    let mut next = stream.next().await;
    for _ in 0..BURST {
        let Some(event) = next else { return Err(io::Error::other("inotify ended")) };
        let event = event?;
        let name = event.name.and_then(|name| name.into_string().ok()).unwrap_or_default();
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT;
        if event.mask.intersects(gone) {
            news.gone = true;
            return Ok(news);
        }
        if event.mask.contains(EventMask::Q_OVERFLOW) || (name.starts_with("..") && !name.is_empty()) {
            // News was lost; or a ConfigMap volume has swapped its `..data`, and with it every file.
            news.rescan = Some(true);
        } else if event.mask.contains(EventMask::CREATE) {
            news.created.insert(name);
        } else {
            news.names.insert(name);
        }
        match timeout(QUIET, stream.next()).await {
            Ok(more) => next = more,
            Err(_) => break,
        }
    }
    Ok(news)
}

/// Runs file work where it may block.
async fn work<T: Send + 'static>(
    folder: &mut Option<Folder>,
    task: impl FnOnce(&mut Folder) -> T + Send + 'static,
) -> io::Result<T> {
    let Some(mut inner) = folder.take() else { return Err(io::Error::other("the folder is in use")) };
    let (inner, result) = tokio::task::spawn_blocking(move || {
        let result = task(&mut inner);
        (inner, result)
    })
    .await
    .map_err(io::Error::other)?;
    *folder = Some(inner);
    Ok(result)
}

async fn send(events: &mpsc::Sender<SourceEvent>, news: impl IntoIterator<Item = SourceEvent>) -> bool {
    for event in news {
        if events.send(event).await.is_err() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::source::Kind;
    use std::fs;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn node(name: &str) -> String {
        format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n")
    }

    /// Waits until an event answers the question.
    async fn until(events: &mut mpsc::Receiver<SourceEvent>, wanted: impl Fn(&SourceEvent) -> bool) {
        let wait = async {
            loop {
                match events.recv().await {
                    Some(event) if wanted(&event) => return,
                    Some(_) => {}
                    None => panic!("the source ended"),
                }
            }
        };
        timeout(DEADLINE, wait).await.expect("no such event in time");
    }

    fn applies(event: &SourceEvent, wanted: &str) -> bool {
        matches!(event, SourceEvent::Apply(object) if object.key().to_string() == wanted)
    }

    fn deletes(event: &SourceEvent, wanted: &str) -> bool {
        matches!(event, SourceEvent::Delete(key) if key.to_string() == wanted)
    }

    fn complains(event: &SourceEvent, text: &str) -> bool {
        matches!(event, SourceEvent::Problems { problems, .. } if problems.iter().any(|p| p.to_string().contains(text)))
    }

    #[tokio::test]
    async fn edits_renames_and_removals_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (sender, mut events) = mpsc::channel(64);
        let task = tokio::spawn(DirSource::new(dir.path()).run(sender));
        until(&mut events, |e| matches!(e, SourceEvent::Reset { kind: Kind::ServiceCidr, .. })).await;

        fs::write(path("a.yaml"), node("a")).unwrap();
        until(&mut events, |e| applies(e, "Node/a")).await;
        // An atomic replacement, as editors and configuration management do it.
        fs::write(path(".b.tmp"), node("b")).unwrap();
        fs::rename(path(".b.tmp"), path("a.yaml")).unwrap();
        until(&mut events, |e| deletes(e, "Node/a")).await;
        fs::write(path("a.yaml"), "apiVersion: [").unwrap();
        until(&mut events, |e| complains(e, "a.yaml, document 1, line 1")).await;
        fs::write(path("a.yaml"), node("c")).unwrap();
        until(&mut events, |e| deletes(e, "Node/b")).await;
        std::os::unix::fs::symlink("a.yaml", path("d.yaml")).unwrap();
        until(&mut events, |e| complains(e, "Node/c is in a.yaml already")).await;
        fs::remove_file(path("a.yaml")).unwrap();
        until(&mut events, |e| complains(e, "cannot be read")).await;
        fs::remove_file(path("d.yaml")).unwrap();
        until(&mut events, |e| deletes(e, "Node/c")).await;
        task.abort();
    }

    #[tokio::test]
    async fn without_inotify_it_is_looked_at_now_and_then() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("objects");
        let (sender, mut events) = mpsc::channel(64);
        let task = tokio::spawn(DirSource::polling(&path).run(sender));
        until(&mut events, |e| complains(e, "does not exist")).await;
        fs::create_dir(&path).unwrap();
        until(&mut events, |e| matches!(e, SourceEvent::Reset { kind: Kind::Node, .. })).await;
        fs::write(path.join("a.yaml"), node("a")).unwrap();
        until(&mut events, |e| applies(e, "Node/a")).await;
        fs::remove_file(path.join("a.yaml")).unwrap();
        until(&mut events, |e| deletes(e, "Node/a")).await;
        task.abort();
    }

    #[tokio::test]
    async fn a_missing_folder_is_waited_for_and_its_loss_removes_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("objects");
        let (sender, mut events) = mpsc::channel(64);
        let task = tokio::spawn(DirSource::new(&path).run(sender));
        until(&mut events, |e| complains(e, "does not exist")).await;
        fs::create_dir(&path).unwrap();
        until(&mut events, |e| matches!(e, SourceEvent::Reset { kind: Kind::Node, .. })).await;
        fs::write(path.join("a.yaml"), node("a")).unwrap();
        until(&mut events, |e| applies(e, "Node/a")).await;

        let away = parent.path().join("away");
        fs::rename(&path, &away).unwrap();
        until(&mut events, |e| {
            assert!(!deletes(e, "Node/a"));
            complains(e, "is gone")
        })
        .await;
        fs::remove_file(away.join("a.yaml")).unwrap();
        fs::rename(&away, &path).unwrap();
        until(&mut events, |e| deletes(e, "Node/a")).await;
        task.abort();
    }
}
