//! One kind of object, followed for ever: all of them, then every change.
//!
//! The first list comes as a stream where the server has that (`sendInitialEvents`), else in pages. kube's watcher
//! knows how to resume, and starts over with a list when the server has forgotten what we last saw (410). What
//! is added here: the fall-back to pages, bounded waiting, growing pauses, objects that cannot be read, and words for
//! what is wrong.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::Api;
use kube::runtime::watcher::{self, Event, InitialListStrategy, watcher};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::client::{Cluster, is_silence, reason};
use super::loose::{Loose, Readable};
use super::{Pauses, random, setting};
use crate::state::problem::{Problem, ProblemKind};
use crate::state::source::manifest::is_dns_name;
use crate::state::source::{Key, Kind, Object, SourceEvent};

/// How long the objects of a streaming list may pause: a server that does not know such lists would let us wait for
/// the end for ever.
pub(super) const STREAM_SILENCE: Duration = Duration::from_secs(20);
/// How long anything else may take until it is all there: to find the server, and one page.
pub(super) const PAGE_SILENCE: Duration = Duration::from_secs(60);
/// The server ends a watch after so long (plus a part of it by chance), which spreads agents over servers.
const WATCH_SECONDS: u32 = 240;
/// A watch that was refused, was begun again and has not failed for so long, goes on.
const RESUMED: Duration = Duration::from_secs(3);
/// How soon a kind that the server does not have is looked for again.
const ABSENT: Duration = Duration::from_secs(600);
/// Most objects that cannot be read of which each is named.
const NAMED: usize = 16;

/// What to follow, and what to make of it.
pub(super) struct Watch<K> {
    pub(super) api: Api<Loose<K>>,
    pub(super) kind: Kind,
    /// The plural, as RBAC names it.
    pub(super) resource: &'static str,
    pub(super) labels: Option<&'static str>,
    /// Whether a server that does not have it is only older.
    pub(super) optional: bool,
    /// [`STREAM_SILENCE`].
    pub(super) stream_silence: Duration,
    /// [`PAGE_SILENCE`].
    pub(super) page_silence: Duration,
    /// Whom to tell of a server whose answers stop.
    pub(super) cluster: Cluster,
    /// What the state line calls it.
    pub(super) object: fn(K) -> Object,
}

/// Why a watch began anew.
enum Restart {
    /// Nobody listens any more.
    Closed,
    /// The server does not stream lists.
    NoStreaming,
    /// The list stopped in the middle.
    Stalled,
    /// The server does not have the kind.
    Absent,
}

impl<K: Readable> Watch<K> {
    /// Follows until nobody listens. `tap` sees every event first.
    pub(super) async fn run(self, events: mpsc::Sender<SourceEvent>, mut tap: impl AsyncFnMut(&SourceEvent)) {
        let origin = format!("watch of {}", self.resource);
        let mut teller = Teller {
            origin,
            told: false,
            listed: false,
            unread: BTreeMap::new(),
            nameless: 0,
            told_unread: Vec::new(),
            events,
        };
        let mut streaming = true;
        let mut pauses = Pauses::default();
        let mut absent = false;
        loop {
            match self.follow(streaming, &mut teller, &mut pauses, &mut tap).await {
                Restart::Closed => return,
                Restart::NoStreaming => {
                    tracing::debug!(
                        "the API server does not stream lists of {}: they come in pages",
                        self.resource
                    );
                    streaming = false;
                }
                Restart::Stalled => {
                    tracing::debug!("the list of {} stopped in the middle: once more", self.resource);
                    // Where streaming ended like that, pages may not.
                    streaming = !streaming;
                    sleep(pauses.next()).await;
                }
                Restart::Absent => {
                    if !std::mem::replace(&mut absent, true) {
                        tracing::info!("the API server has no {}: it is older than them", self.resource);
                    }
                    let none = SourceEvent::Reset {
                        kind: self.kind,
                        objects: Vec::new(),
                        complete: true,
                        unread: Vec::new(),
                    };
                    if !teller.tell(none, &mut tap).await {
                        return;
                    }
                    sleep(ABSENT + ABSENT.mul_f64(chance())).await;
                }
            }
            if teller.events.is_closed() {
                return;
            }
        }
    }

    async fn follow(
        &self,
        streaming: bool,
        teller: &mut Teller,
        pauses: &mut Pauses,
        tap: &mut impl AsyncFnMut(&SourceEvent),
    ) -> Restart {
        let config = watcher::Config {
            label_selector: self.labels.map(str::to_owned),
            timeout: Some(WATCH_SECONDS + u32::try_from(random(60)).unwrap_or_default()),
            initial_list_strategy: match streaming {
                true => InitialListStrategy::StreamingList,
                false => InitialListStrategy::ListWatch,
            },
            ..watcher::Config::default()
        };
        let mut stream = pin!(watcher(self.api.clone(), config));
        // What was listed so far; `None` once all was.
        let mut listing = Some(Vec::new());
        let (mut complete, mut begun, mut failed) = (true, false, false);
        loop {
            let patience = if streaming && begun { self.stream_silence } else { self.page_silence };
            let next = match &listing {
                Some(_) => match timeout(patience, stream.next()).await {
                    Ok(next) => next,
                    Err(_) => {
                        // A stream may stop where the server does not know such lists; a page may not.
                        if !streaming {
                            self.cluster.stalled();
                        }
                        return Restart::Stalled;
                    }
                },
                None => tokio::select! {
                    next = stream.next() => next,
                    () = teller.events.closed() => return Restart::Closed,
                    // It goes on where it was, and nothing has happened since.
                    () = sleep(RESUMED), if failed => {
                        pauses.reset();
                        failed = false;
                        match teller.well().await {
                            true => continue,
                            false => return Restart::Closed,
                        }
                    }
                },
            };
            let Some(next) = next else { return Restart::Stalled };
            let told = match next {
                Ok(Event::Init) => {
                    (listing, complete, begun) = (Some(Vec::new()), true, true);
                    teller.forget_unread();
                    true
                }
                Ok(Event::InitApply(object)) => {
                    listing.get_or_insert_default().extend(self.read(object, teller));
                    true
                }
                Ok(Event::InitDone) => {
                    let objects = listing.take().unwrap_or_default();
                    pauses.reset();
                    teller.listed = true;
                    // What has not even a name may be any of those that are not in the list.
                    let complete = complete && teller.nameless == 0;
                    let unread = teller.unread.keys().cloned().collect();
                    let all = SourceEvent::Reset { kind: self.kind, objects, complete, unread };
                    teller.tell(all, tap).await && teller.well().await && teller.unreadable(self.kind).await
                }
                Ok(Event::Apply(object)) => {
                    let news = self.read(object, teller).map(SourceEvent::Apply);
                    let told = match news {
                        Some(news) => teller.tell(news, tap).await,
                        None => true,
                    };
                    told && teller.well().await && teller.unreadable(self.kind).await
                }
                Ok(Event::Delete(object)) => match self.key(&object) {
                    Some(key) => {
                        teller.unread.remove(&key);
                        let told = teller.tell(SourceEvent::Delete(key), tap).await;
                        told && teller.well().await && teller.unreadable(self.kind).await
                    }
                    None => true,
                },
                Err(error) => {
                    if let Some(restart) = self.gives_up(&error, streaming && listing.is_some(), teller) {
                        return restart;
                    }
                    if is_unreadable(&error) {
                        // The next one may be well; what cannot be read is not gone.
                        complete = false;
                        teller.nameless += 1;
                        teller.unreadable(self.kind).await
                    } else {
                        let told = match self.problem(&error) {
                            Some(problem) => teller.wrong(problem).await,
                            None => true,
                        };
                        failed = true;
                        sleep(pauses.next()).await;
                        told
                    }
                }
            };
            if !told {
                return Restart::Closed;
            }
        }
    }

    /// The object; or notes that it cannot be read.
    fn read(&self, object: Loose<K>, teller: &mut Teller) -> Option<Object> {
        let key = self.key(&object);
        match (object.object, key) {
            (Ok(object), Some(key)) => {
                teller.unread.remove(&key);
                Some((self.object)(object))
            }
            (Err(reason), Some(key)) => {
                teller.unread.insert(key, reason);
                None
            }
            (_, None) => {
                teller.nameless += 1;
                None
            }
        }
    }

    /// What names it, as [`Object::key`]; `None`: not even that can be read.
    fn key(&self, object: &Loose<K>) -> Option<Key> {
        let (namespace, name) = object.names();
        let namespace = match (self.kind.namespaced(), namespace) {
            (false, _) => "",
            (true, "") => "default",
            (true, namespace) => namespace,
        };
        let valid = is_dns_name(name) && (namespace.is_empty() || is_dns_name(namespace));
        valid.then(|| Key { kind: self.kind, namespace: namespace.to_owned(), name: name.to_owned() })
    }

    fn gives_up(&self, error: &watcher::Error, streaming: bool, teller: &Teller) -> Option<Restart> {
        let status = match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status,
            watcher::Error::WatchError(status) => status,
            watcher::Error::InitialListFailed(_)
            | watcher::Error::WatchStartFailed(_)
            | watcher::Error::WatchFailed(_)
            | watcher::Error::NoResourceVersion => return None,
        };
        match status.code {
            // One that had it is not older than it: a server that is starting may not have it yet.
            404 if self.optional && !teller.listed => Some(Restart::Absent),
            // As an event it makes kube list anew; as the answer to a request it would be asked the same for ever.
            410 if matches!(error, watcher::Error::WatchStartFailed(_)) => Some(Restart::Stalled),
            // Before 1.34 the feature may be off, and the server says that the parameter is forbidden.
            400 | 422 if streaming => Some(Restart::NoStreaming),
            _ => None,
        }
    }

    /// `None`: it says nothing that is not said elsewhere, or it is the ordinary end of a watch.
    fn problem(&self, error: &watcher::Error) -> Option<Problem> {
        let resource = self.resource;
        let reason = match error {
            watcher::Error::WatchError(status) if status.code == 410 => return None,
            watcher::Error::WatchError(status) => status.message.clone(),
            watcher::Error::NoResourceVersion => "the answers have no resourceVersion".to_owned(),
            watcher::Error::InitialListFailed(error)
            | watcher::Error::WatchStartFailed(error)
            | watcher::Error::WatchFailed(error) => match error {
                error if is_silence(error) => return None,
                kube::Error::Api(status) if status.code == 410 => return None,
                kube::Error::Api(status) if status.code == 403 => {
                    format!("{}; its role must allow to list and watch {resource}", reason(error))
                }
                error => reason(error),
            },
        };
        Some(setting("API server", format!("{resource} cannot be followed: {reason}")))
    }
}

/// kube takes a line of a watch that is no event for a Status, of which it needs nothing to be there.
fn is_unreadable(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchFailed(kube::Error::SerdeError(_)) => true,
        watcher::Error::WatchFailed(kube::Error::Api(status)) => {
            status.code == 0 && status.message.is_empty()
        }
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchError(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => false,
    }
}

/// From 0 to 1.
fn chance() -> f64 {
    random(1000) as f64 / 1000.0
}

/// Says what happens to the state line, and what is wrong with the watch itself.
struct Teller {
    origin: String,
    /// Whether something wrong was said.
    told: bool,
    /// Whether there was ever a whole list.
    listed: bool,
    /// Objects that cannot be read, and why.
    unread: BTreeMap<Key, String>,
    /// How many there were of those without a name since the last list.
    nameless: usize,
    /// What was last said about them.
    told_unread: Vec<Problem>,
    events: mpsc::Sender<SourceEvent>,
}

impl Teller {
    /// `false`: nobody listens.
    async fn tell(&self, event: SourceEvent, tap: &mut impl AsyncFnMut(&SourceEvent)) -> bool {
        tap(&event).await;
        self.events.send(event).await.is_ok()
    }

    async fn wrong(&mut self, problem: Problem) -> bool {
        self.told = true;
        self.problems(&self.origin, vec![problem]).await
    }

    async fn well(&mut self) -> bool {
        match std::mem::take(&mut self.told) {
            true => self.problems(&self.origin, Vec::new()).await,
            false => true,
        }
    }

    fn forget_unread(&mut self) {
        self.unread.clear();
        self.nameless = 0;
    }

    /// Names the objects that cannot be read, if they are others than before.
    async fn unreadable(&mut self, kind: Kind) -> bool {
        let problem = |subject: String, reason: String| Problem {
            kind: ProblemKind::Object,
            subject,
            field: String::new(),
            reason,
        };
        let named = self.unread.iter().take(NAMED);
        let named = named.map(|(key, why)| {
            problem(key.to_string(), format!("cannot be read, what it was before stays in force: {why}"))
        });
        let mut problems: Vec<Problem> = named.collect();
        let more = self.unread.len().saturating_sub(NAMED) + self.nameless;
        if more > 0 {
            let reason = format!(
                "{more} {} of {} cannot be read: what they were before stays in force",
                match problems.is_empty() {
                    true => "objects",
                    false => "more objects",
                },
                kind.name()
            );
            problems.push(problem("API server".to_owned(), reason));
        }
        if problems == self.told_unread {
            return true;
        }
        self.told_unread.clone_from(&problems);
        self.problems(&format!("{}, objects", self.origin), problems).await
    }

    async fn problems(&self, origin: &str, problems: Vec<Problem>) -> bool {
        self.events.send(SourceEvent::Problems { origin: origin.to_owned(), problems }).await.is_ok()
    }
}
