//! One kind of object, followed for ever: all of them, then every change.
//!
//! The first list comes as a stream where the server has that (`sendInitialEvents`), else in pages. kube's watcher
//! knows how to resume, and starts over with a list when the server has forgotten what we last saw (410). What
//! is added here: the fall-back to pages, bounded waiting, growing pauses, and words for what is wrong.

use std::fmt::Debug;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::runtime::watcher::{self, Event, InitialListStrategy, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::client::{is_silence, reason};
use super::{Pauses, random, setting};
use crate::state::problem::Problem;
use crate::state::source::{Kind, Object, SourceEvent};

/// How long the objects of a streaming list may pause: a server that does not know such lists would let us wait for
/// the end for ever.
pub(super) const STREAM_SILENCE: Duration = Duration::from_secs(20);
/// How long anything else may take until it is all there: to find the server, and one page.
const PAGE_SILENCE: Duration = Duration::from_secs(90);
/// The server ends a watch after so long (plus a part of it by chance), which spreads agents over servers.
const WATCH_SECONDS: u32 = 240;
/// A watch that was refused, was begun again and has not failed for so long, goes on.
const RESUMED: Duration = Duration::from_secs(3);
/// How soon a kind that the server does not have is looked for again.
const ABSENT: Duration = Duration::from_secs(600);

/// What to follow, and what to make of it.
pub(super) struct Watch<K> {
    pub(super) api: Api<K>,
    pub(super) kind: Kind,
    /// The plural, as RBAC names it.
    pub(super) resource: &'static str,
    pub(super) labels: Option<&'static str>,
    /// Whether a server that does not have it is only older.
    pub(super) optional: bool,
    /// [`STREAM_SILENCE`].
    pub(super) stream_silence: Duration,
    /// Leaves out what nobody reads.
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

impl<K> Watch<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// Follows until nobody listens. `tap` sees every event first.
    pub(super) async fn run(self, events: mpsc::Sender<SourceEvent>, mut tap: impl AsyncFnMut(&SourceEvent)) {
        let mut teller =
            Teller { origin: format!("watch of {}", self.resource), told: false, unreadable: false, events };
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
                    let none = SourceEvent::Reset { kind: self.kind, objects: Vec::new(), complete: true };
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
            let patience = if streaming && begun { self.stream_silence } else { PAGE_SILENCE };
            let next = match &listing {
                Some(_) => match timeout(patience, stream.next()).await {
                    Ok(next) => next,
                    Err(_) => return Restart::Stalled,
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
                    true
                }
                Ok(Event::InitApply(object)) => {
                    listing.get_or_insert_default().push((self.object)(object));
                    true
                }
                Ok(Event::InitDone) => {
                    let objects = listing.take().unwrap_or_default();
                    pauses.reset();
                    let all = SourceEvent::Reset { kind: self.kind, objects, complete };
                    teller.tell(all, tap).await && teller.well().await && teller.readable(complete).await
                }
                Ok(Event::Apply(object)) => {
                    teller.tell(SourceEvent::Apply((self.object)(object)), tap).await && teller.well().await
                }
                Ok(Event::Delete(object)) => {
                    let key = (self.object)(object).key();
                    teller.tell(SourceEvent::Delete(key), tap).await && teller.well().await
                }
                Err(error) => {
                    if let Some(restart) = self.gives_up(&error, streaming && listing.is_some()) {
                        return restart;
                    }
                    if is_unreadable(&error) {
                        // The next one may be well; what cannot be read is not gone.
                        complete = false;
                        teller.unreadable(self.resource).await
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

    fn gives_up(&self, error: &watcher::Error, streaming: bool) -> Option<Restart> {
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
            404 if self.optional => Some(Restart::Absent),
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
    /// Whether an object could not be read since the last complete list.
    unreadable: bool,
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

    async fn unreadable(&mut self, resource: &str) -> bool {
        self.unreadable = true;
        let reason = format!("one of the {resource} cannot be read: what it was before stays in force");
        self.problems(&format!("{}, objects", self.origin), vec![setting("API server", reason)]).await
    }

    async fn readable(&mut self, complete: bool) -> bool {
        match complete && std::mem::take(&mut self.unreadable) {
            true => self.problems(&format!("{}, objects", self.origin), Vec::new()).await,
            false => true,
        }
    }

    async fn problems(&self, origin: &str, problems: Vec<Problem>) -> bool {
        self.events.send(SourceEvent::Problems { origin: origin.to_owned(), problems }).await.is_ok()
    }
}
