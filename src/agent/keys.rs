//! Changing the node's keys while it runs: `warren keys rotate`, or by age (`--rotate-keys`).
//!
//! The steps are those of [`KeyRing`]. Each is told to the lanes before anybody else hears of it, and waits until
//! this node's own Node, as the source gives it back, says so: then the others hear it too.

use std::time::{Duration, Instant};

use tokio::task::block_in_place;
use tracing::{error, info};

use crate::io::clock;
use crate::io::fleet::Fleet;
use crate::snapshot::PublicKey;
use crate::state::annotations::Announcement;
use crate::state::keys::{KeyError, KeyRing, LaneKey, Phase};
use crate::status::RotateOrder;
use crate::tunnel::wireguard::Keys;

/// How long the others have to hear of the next keys, and what the last ones get three times.
const OVERLAP: Duration = Duration::from_secs(60);
const LAST_KEYS: u32 = 3;

/// The node's keys, and the change under way.
#[derive(Debug)]
pub(super) struct KeyChange {
    ring: KeyRing,
    /// From which age on keys are changed by themselves.
    every: Option<Duration>,
    overlap: Duration,
    /// Since when the source has shown what we announce.
    shown: Option<Instant>,
    /// Whether a lane was too busy to be told.
    untold: bool,
    /// What was said last to be in the way.
    complaint: Option<String>,
}

impl KeyChange {
    pub(super) fn new(ring: KeyRing, every: Option<Duration>) -> KeyChange {
        KeyChange { ring, every, overlap: OVERLAP, shown: None, untold: false, complaint: None }
    }

    /// The public keys in use.
    pub(super) fn public(&self) -> Vec<PublicKey> {
        self.ring.public()
    }

    /// What the lanes need.
    pub(super) fn lane_keys(&self) -> Vec<Keys> {
        let also = |lane: usize| self.ring.also().get(lane).map(|key: &LaneKey| key.secret().clone());
        let keys = self.ring.current().iter().enumerate();
        keys.map(|(lane, key)| Keys { current: key.secret().clone(), also: also(lane) }).collect()
    }

    /// Puts the keys into what this node announces; says whether that is news.
    pub(super) fn announce_in(&self, announcement: &mut Announcement) -> bool {
        let also: Vec<PublicKey> = self.ring.also().iter().map(LaneKey::public).collect();
        let mut news = std::mem::replace(&mut announcement.also, also.clone()) != also;
        for (lane, key) in announcement.lanes.iter_mut().zip(self.ring.public()) {
            news |= std::mem::replace(&mut lane.key, key) != key;
        }
        news
    }

    /// Somebody asks for new keys.
    pub(super) fn obey(&mut self, order: RotateOrder, fleet: &Fleet) -> bool {
        let begun = match self.ring.phase() {
            Phase::Steady => {
                self.overlap = order.overlap.unwrap_or(OVERLAP);
                self.begin(fleet)
            }
            Phase::Announced | Phase::Switched => Err(format!("a change is under way: {}", self.describe())),
        };
        let news = begun.is_ok();
        // Whoever asked may have gone.
        let _ = order.answer.send(begun.map(|()| self.describe()));
        news
    }

    /// Takes the next step, if it is time. `shown`: whether the source shows what we announce. Says whether there is
    /// something new to announce.
    pub(super) fn step(&mut self, fleet: &Fleet, shown: bool) -> bool {
        if std::mem::take(&mut self.untold) {
            self.tell(fleet);
        }
        let now = clock::now();
        self.shown = if shown { Some(self.shown.unwrap_or(now)) } else { None };
        let waited = self.shown.map(|since| now.saturating_duration_since(since));
        let result = match self.ring.phase() {
            Phase::Steady if self.is_old() => self.begin(fleet).map(|()| true),
            Phase::Announced if waited.is_some_and(|waited| waited >= self.overlap) => {
                let switched = block_in_place(|| self.ring.switch()).map_err(|error| error.to_string());
                switched.map(|()| {
                    info!("the next keys are in use now; the last ones are answered for a while");
                    self.proceed(fleet)
                })
            }
            Phase::Switched if waited.is_some_and(|waited| waited >= self.overlap * LAST_KEYS) => {
                let retired = block_in_place(|| self.ring.retire()).map_err(|error| error.to_string());
                retired.map(|()| {
                    info!("the last keys are gone: the change of keys is complete");
                    self.proceed(fleet)
                })
            }
            Phase::Steady | Phase::Announced | Phase::Switched => Ok(false),
        };
        match result {
            Ok(news) => {
                self.complaint = None;
                news
            }
            Err(reason) => {
                if self.complaint.as_ref() != Some(&reason) {
                    error!("the keys cannot be changed: {reason}; trying again");
                }
                self.complaint = Some(reason);
                false
            }
        }
    }

    /// Where the change stands, for a person.
    pub(super) fn describe(&self) -> String {
        let left = |all: Duration| match self.shown {
            Some(since) => {
                let left = all.saturating_sub(clock::now().saturating_duration_since(since));
                format!("in about {} s", left.as_secs().max(1))
            }
            None => "once this node's own Node shows them".to_owned(),
        };
        match self.ring.phase() {
            Phase::Steady => String::new(),
            Phase::Announced => {
                format!("the next keys are announced, and will be used {}", left(self.overlap))
            }
            Phase::Switched => {
                format!("new keys are in use; the last ones end {}", left(self.overlap * LAST_KEYS))
            }
        }
    }

    fn begin(&mut self, fleet: &Fleet) -> Result<(), String> {
        block_in_place(|| self.ring.announce()).map_err(|error: KeyError| error.to_string())?;
        info!("the next keys are made; they are announced, and used when the others have heard");
        self.proceed(fleet);
        Ok(())
    }

    fn proceed(&mut self, fleet: &Fleet) -> bool {
        self.shown = None;
        self.tell(fleet);
        true
    }

    fn tell(&mut self, fleet: &Fleet) {
        self.untold = !fleet.change_keys(&self.lane_keys());
    }

    fn is_old(&self) -> bool {
        let Some(every) = self.every else { return false };
        let age = self.ring.made().and_then(|made| clock::wall().duration_since(made).ok());
        age.is_some_and(|age| age >= every)
    }
}
