//! How a node's keys change, without a packet lost:
//!
//! 1. [`KeyRing::announce`]: the next keys are made, and announced beside those in use; peers answer to both
//! 2. [`KeyRing::switch`]: the next keys are those in use, and sessions are made anew between them; the last ones are
//!    announced and answered still, for whoever has not heard
//! 3. [`KeyRing::retire`]: the last keys are no more
//!
//! Each step is on disk before it is done. One that was interrupted is finished by the next agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use zeroize::Zeroizing;

use super::{KeyError, LaneKey, at, load, load_or_create, one, path_of};
use crate::snapshot::PublicKey;
use crate::state::durable;

/// Where a change of keys stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// There is one key for each lane.
    Steady,
    /// There are the next ones too.
    Announced,
    /// There are the last ones too.
    Switched,
}

/// A node's keys, on disk and in memory.
#[derive(Debug)]
pub struct KeyRing {
    folder: PathBuf,
    current: Vec<LaneKey>,
    also: Vec<LaneKey>,
    phase: Phase,
}

impl KeyRing {
    /// The keys in this state folder; what is missing is made, what was interrupted is finished.
    pub fn open(state_folder: &Path, lanes: usize) -> Result<KeyRing, KeyError> {
        let folder = state_folder.join("keys");
        let mut current = load_or_create(state_folder, lanes)?;
        let of = |suffix: &str| {
            let keys = (0..lanes).map(|lane| load(&named(&folder, lane, suffix)));
            keys.collect::<Result<Vec<Option<LaneKey>>, _>>()
        };
        let (next, last) = (of("next")?, of("last")?);
        if last.iter().any(Option::is_some) {
            if next.iter().any(Option::is_some) {
                switch_files(&folder, &next)?;
                current = load_or_create(state_folder, lanes)?;
            }
            let also: Option<Vec<LaneKey>> = of("last")?.into_iter().collect();
            // Incomplete: an end that was interrupted, or more lanes than there were.
            let mut ring = KeyRing { folder, current, also: Vec::new(), phase: Phase::Switched };
            match also.filter(|also| ring.differ(also)) {
                Some(also) => ring.also = also,
                None => ring.retire()?,
            }
            return Ok(ring);
        }
        let mut ring = KeyRing { folder, current, also: Vec::new(), phase: Phase::Steady };
        if next.iter().any(Option::is_some) {
            ring.announce()?;
        }
        Ok(ring)
    }

    /// The keys in use, lane 0 first.
    pub fn current(&self) -> &[LaneKey] {
        &self.current
    }

    /// The second ones: the next or the last, one for each lane; none in between.
    pub fn also(&self) -> &[LaneKey] {
        &self.also
    }

    /// The public keys in use.
    pub fn public(&self) -> Vec<PublicKey> {
        self.current.iter().map(LaneKey::public).collect()
    }

    /// Where a change stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// When the keys in use were made, if the file system knows.
    pub fn made(&self) -> Option<SystemTime> {
        fs::metadata(path_of(&self.folder, 0)).and_then(|metadata| metadata.modified()).ok()
    }

    /// Step 1: makes the next keys.
    pub fn announce(&mut self) -> Result<(), KeyError> {
        let lanes = 0..self.current.len();
        let next =
            lanes.map(|lane| one(&named(&self.folder, lane, "next"))).collect::<Result<Vec<_>, _>>()?;
        if !self.differ(&next) {
            let path = named(&self.folder, 0, "next").display().to_string();
            return Err(KeyError::Corrupt { path, reason: "a key that is in use already".to_owned() });
        }
        (self.also, self.phase) = (next, Phase::Announced);
        Ok(())
    }

    /// Step 2: the next keys come into use.
    pub fn switch(&mut self) -> Result<(), KeyError> {
        if self.phase != Phase::Announced {
            return Ok(());
        }
        let next: Vec<_> = self.also.iter().cloned().map(Some).collect();
        switch_files(&self.folder, &next)?;
        std::mem::swap(&mut self.current, &mut self.also);
        self.phase = Phase::Switched;
        Ok(())
    }

    /// Step 3: the last keys are forgotten, on disk too.
    pub fn retire(&mut self) -> Result<(), KeyError> {
        if self.phase != Phase::Switched {
            return Ok(());
        }
        for lane in 0..crate::snapshot::MAX_LANES {
            let path = named(&self.folder, lane, "last");
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(at(&path)(error)),
                Ok(()) | Err(_) => {}
            }
        }
        (self.also, self.phase) = (Vec::new(), Phase::Steady);
        Ok(())
    }

    fn differ(&self, also: &[LaneKey]) -> bool {
        let all: std::collections::BTreeSet<PublicKey> =
            self.current.iter().chain(also).map(LaneKey::public).collect();
        all.len() == self.current.len() + also.len()
    }
}

/// First every last key is written, then every next one takes its place: at any moment all are there.
fn switch_files(folder: &Path, next: &[Option<LaneKey>]) -> Result<(), KeyError> {
    for lane in (0..next.len()).filter(|lane| next[*lane].is_some()) {
        let (from, to) = (path_of(folder, lane), named(folder, lane, "last"));
        let bytes = Zeroizing::new(fs::read(&from).map_err(at(&from))?);
        // One that is there was written before the interruption.
        durable::create(&to, &bytes, 0o600).map_err(at(&to))?;
    }
    for lane in (0..next.len()).filter(|lane| next[*lane].is_some()) {
        let from = named(folder, lane, "next");
        fs::rename(&from, path_of(folder, lane)).map_err(at(&from))?;
    }
    fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))
}

fn named(folder: &Path, lane: usize, suffix: &str) -> PathBuf {
    folder.join(format!("lane-{lane}.{suffix}.key"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publics(keys: &[LaneKey]) -> Vec<PublicKey> {
        keys.iter().map(LaneKey::public).collect()
    }

    #[test]
    fn a_change_goes_through_its_steps_and_every_agent_finds_it_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let mut ring = KeyRing::open(dir.path(), 2).unwrap();
        let first = ring.public();
        assert_eq!((ring.phase(), ring.also().len()), (Phase::Steady, 0));
        ring.announce().unwrap();
        let next = publics(ring.also());
        let found = |phase, current: &[PublicKey], also: &[PublicKey]| {
            let ring = KeyRing::open(dir.path(), 2).unwrap();
            assert_eq!(
                (ring.phase(), ring.public(), publics(ring.also())),
                (phase, current.to_vec(), also.to_vec())
            );
        };
        found(Phase::Announced, &first, &next);
        ring.switch().unwrap();
        assert_eq!((ring.public(), publics(ring.also())), (next.clone(), first.clone()));
        found(Phase::Switched, &next, &first);
        ring.retire().unwrap();
        found(Phase::Steady, &next, &[]);
        assert_eq!(fs::read_dir(dir.path().join("keys")).unwrap().count(), 2, "the last keys are gone");
    }

    #[test]
    fn an_interrupted_switch_is_finished() {
        for renamed in 0..=2 {
            let dir = tempfile::tempdir().unwrap();
            let folder = dir.path().join("keys");
            let mut ring = KeyRing::open(dir.path(), 2).unwrap();
            ring.announce().unwrap();
            let (first, next) = (ring.public(), publics(ring.also()));
            for lane in 0..2 {
                let bytes = fs::read(path_of(&folder, lane)).unwrap();
                // Nothing renamed yet: the second copy is missing as well.
                if renamed > 0 || lane == 0 {
                    durable::create(&named(&folder, lane, "last"), &bytes, 0o600).unwrap();
                }
            }
            for lane in 0..renamed {
                fs::rename(named(&folder, lane, "next"), path_of(&folder, lane)).unwrap();
            }
            let ring = KeyRing::open(dir.path(), 2).unwrap();
            assert_eq!(
                (ring.phase(), ring.public(), publics(ring.also())),
                (Phase::Switched, next, first),
                "{renamed}"
            );
        }
    }

    #[test]
    fn more_lanes_in_the_middle_of_a_change_are_no_trouble() {
        let dir = tempfile::tempdir().unwrap();
        let mut ring = KeyRing::open(dir.path(), 1).unwrap();
        ring.announce().unwrap();
        let next = ring.also()[0].public();
        let mut ring = KeyRing::open(dir.path(), 2).unwrap();
        assert_eq!((ring.phase(), ring.also().len(), ring.also()[0].public()), (Phase::Announced, 2, next));
        ring.switch().unwrap();
        // No last key of the third lane: they all go.
        let ring = KeyRing::open(dir.path(), 3).unwrap();
        assert_eq!((ring.phase(), ring.also().len(), ring.public()[0]), (Phase::Steady, 0, next));
        assert_eq!(fs::read_dir(dir.path().join("keys")).unwrap().count(), 3);
    }
}
