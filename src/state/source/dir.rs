//! The folder source: watches a folder with inotify and tells the state line what changed.
//!
//! inotify says when a file was closed after writing, renamed or removed; a burst of such news is waited
//! out, so that an editor's "remove, then write" is one change. A slow rescan catches what inotify cannot
//! see (NFS, files behind symbolic links, lost news). A missing folder is waited for, and what it gave
//! stays until it is back.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::SourceEvent;
use super::folder::Folder;
use crate::state::blocking::blocking;
use crate::state::problem::{Problem, ProblemKind};

/// How long nothing may happen before a burst counts as over.
const QUIET: Duration = Duration::from_millis(40);
/// Most news in one burst; a writer that never pauses is not waited for longer.
const BURST: usize = 256;
/// How often everything is looked at whether or not inotify spoke: a large folder seldom, as such a look may take
/// [`RESCAN_SHARE`] of a processor.
const RESCAN: Duration = Duration::from_secs(5);
const RESCAN_SHARE: u32 = 2000;
const RESCAN_LONGEST: Duration = Duration::from_secs(60);
/// How often everything is looked at where inotify cannot be had.
const POLL: Duration = Duration::from_secs(1);
/// How often a missing folder is looked for.
const RETRY: Duration = Duration::from_millis(500);

/// A folder of Kubernetes objects, watched.
#[derive(Debug)]
pub struct DirSource {
    path: PathBuf,
    /// How inotify is asked for; a test may say no.
    open: fn(&Path) -> io::Result<EventStream<Vec<u8>>>,
}

impl DirSource {
    /// A source for this folder, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> DirSource {
        DirSource { path: path.into(), open }
    }

    /// Watches until nobody listens any more.
    pub async fn run(self, events: mpsc::Sender<SourceEvent>) {
        let origin = format!("folder {}", self.path.display());
        let folder = Arc::new(Mutex::new(Folder::new(&self.path)));
        loop {
            let outcome = self.watch(&folder, &events, &origin).await;
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

    /// Watches the folder for as long as it is there.
    async fn watch(
        &self,
        folder: &Arc<Mutex<Folder>>,
        events: &mpsc::Sender<SourceEvent>,
        origin: &str,
    ) -> io::Result<Watch> {
        let (mut stream, complaint) = match (self.open)(&self.path) {
            Ok(stream) => (Some(stream), None),
            // Out of inotify instances or watches (EMFILE, ENOSPC): the folder itself may be well.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOSPC)) =>
            {
                let reason = format!(
                    "inotify is used up ({error}), so it is looked at every second; raise \
                     fs.inotify.max_user_instances and max_user_watches"
                );
                (None, Some(problem(origin, reason)))
            }
            Err(error) => return Err(error),
        };

        let mut pause = RESCAN;
        // Only now, with the watch in place, is the first look complete: nothing falls in between.
        let first = work(folder, |folder| folder.scan(true)).await?;
        let problems = complaint.into_iter().collect();
        let well = SourceEvent::Problems { origin: origin.to_owned(), problems };
        if !send(events, first.into_iter().chain([well])).await {
            return Ok(Watch::Closed);
        }
        loop {
            let look = News { rescan: Some(false), ..News::default() };
            let news = match &mut stream {
                Some(stream) => timeout(pause, burst(stream)).await.unwrap_or(Ok(look))?,
                None => {
                    sleep(POLL).await;
                    look
                }
            };
            if news.gone {
                return Ok(Watch::Gone);
            }
            // What was read counts as told: it is sent before a scan that fails is complained of.
            let rescan = news.rescan;
            let told = work(folder, move |folder| {
                let created =
                    news.created.iter().filter(|name| folder.is_symlink(name)).cloned().collect::<Vec<_>>();
                folder.reread(news.names.iter().chain(&created).map(String::as_str))
            })
            .await;
            if !send(events, told).await {
                return Ok(Watch::Closed);
            }
            if let Some(settled) = rescan {
                let began = Instant::now();
                let told = work(folder, move |folder| folder.scan(settled)).await?;
                pause = rescan_after(Instant::now().duration_since(began));
                if !send(events, told).await {
                    return Ok(Watch::Closed);
                }
            }
        }
    }
}

/// How long to wait after a look that took so long.
fn rescan_after(took: Duration) -> Duration {
    (took * RESCAN_SHARE).clamp(RESCAN, RESCAN_LONGEST)
}

enum Watch {
    /// Nobody listens.
    Closed,
    /// The folder was removed, renamed or unmounted.
    Gone,
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

/// Runs file work where it may block. The folder stays where it is: nothing that happens here can lose it.
async fn work<T: Send + 'static>(
    folder: &Arc<Mutex<Folder>>,
    task: impl FnOnce(&mut Folder) -> T + Send + 'static,
) -> T {
    let folder = Arc::clone(folder);
    // Poisoned by a panic that is on its way up already: nobody asks again.
    blocking(move || task(&mut folder.lock().unwrap_or_else(PoisonError::into_inner))).await
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

    #[test]
    fn a_large_folder_is_looked_at_seldom() {
        for (took, pause) in [(0, 5_000), (2, 5_000), (10, 20_000), (1_000, 60_000)] {
            assert_eq!(rescan_after(Duration::from_millis(took)), Duration::from_millis(pause));
        }
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
        let used_up = |_: &Path| Err(io::Error::from_raw_os_error(libc::EMFILE));
        let task = tokio::spawn(DirSource { path: path.clone(), open: used_up }.run(sender));
        until(&mut events, |e| complains(e, "does not exist")).await;
        fs::create_dir(&path).unwrap();
        until(&mut events, |e| matches!(e, SourceEvent::Reset { kind: Kind::Node, .. })).await;
        until(&mut events, |e| complains(e, "max_user_instances")).await;
        fs::write(path.join("a.yaml"), node("a")).unwrap();
        until(&mut events, |e| applies(e, "Node/a")).await;
        fs::remove_file(path.join("a.yaml")).unwrap();
        until(&mut events, |e| deletes(e, "Node/a")).await;
        task.abort();
    }

    #[tokio::test]
    async fn a_panic_over_a_file_ends_the_source_and_is_not_taken_for_a_lost_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Arc::new(Mutex::new(Folder::new(dir.path())));
        let asking = {
            let folder = Arc::clone(&folder);
            tokio::spawn(async move { work(&folder, |_| panic!("a bug")).await })
        };
        assert!(asking.await.unwrap_err().is_panic());
        assert_eq!(work(&folder, |folder| folder.path().to_owned()).await, dir.path());
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
