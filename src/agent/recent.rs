//! The peers that were active lately: saved, and called after a restart.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, info, warn};

use crate::io::clock;
use crate::io::fleet::Fleet;
use crate::snapshot::{PeerId, Snapshot};
use crate::state::checkpoint::{CheckpointFiles, RecentPeer};
use crate::state::durable::Loaded;
use crate::status::Handle;

/// A peer that sent or received within this time is called after a restart: WireGuard's REJECT_AFTER_TIME.
const RECENT: Duration = Duration::from_secs(180);
/// How often it is looked who is active.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How many looks a list of the same peers may be old on disk: rarely written, for the sake of memory cards.
const LOOKS_PER_SAVE: u32 = 12;

/// Keeps the list on disk, beside everything else: a slow disk holds nobody up.
pub(super) async fn keep(files: CheckpointFiles, handle: Handle) {
    let mut every = interval(LOOK_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut names, mut looks) = (Vec::new(), 0);
    loop {
        every.tick().await;
        looks += 1;
        let Some(recent) = active(&handle).await else { continue };
        let now: Vec<String> = recent.iter().map(|peer| peer.name.clone()).collect();
        if now != names || looks >= LOOKS_PER_SAVE {
            save(&files, recent).await;
            (names, looks) = (now, 0);
        }
    }
}

/// Saves who is active now.
pub(super) async fn note(files: &CheckpointFiles, handle: &Handle) {
    if let Some(recent) = active(handle).await {
        save(files, recent).await;
    }
}

/// Calls peers that were active when the last agent ended: they may be waiting for us.
pub(super) fn call(files: &CheckpointFiles, snapshot: &Snapshot, fleet: &Fleet) {
    let recent = match files.load_recent() {
        Ok(Loaded::Good(recent)) => recent,
        Ok(Loaded::Missing) => return,
        Ok(Loaded::SetAside { reason, .. }) => {
            return warn!("the list of active peers was not usable: {reason}");
        }
        Err(error) => return warn!("the list of active peers cannot be read: {error}"),
    };
    let now = unix_seconds();
    let fresh = |peer: &&RecentPeer| now.saturating_sub(peer.at) <= RECENT.as_secs();
    let ids: Vec<PeerId> = recent
        .iter()
        .filter(fresh)
        .filter_map(|peer| snapshot.mesh.peers.iter().flatten().find(|p| p.name == peer.name).map(|p| p.id))
        .collect();
    if !ids.is_empty() {
        info!(peers = ids.len(), "calling peers that were active before the restart");
        fleet.initiate(&ids);
    }
}

async fn active(handle: &Handle) -> Option<Vec<RecentPeer>> {
    let view = handle.collect_async().await.ok()?;
    let wall = unix_seconds();
    let mut recent = Vec::new();
    for peer in view.peers {
        let ages = [peer.last_received_age_ms, peer.last_sent_age_ms];
        let age = ages.into_iter().flatten().min().map(Duration::from_millis);
        let at = age.filter(|age| *age <= RECENT).map(|age| wall.saturating_sub(age.as_secs()));
        recent.extend(at.map(|at| RecentPeer { name: peer.name, at }));
    }
    Some(recent)
}

async fn save(files: &CheckpointFiles, recent: Vec<RecentPeer>) {
    let files = files.clone();
    let saved = tokio::task::spawn_blocking(move || files.save_recent(&recent)).await;
    if let Ok(Err(error)) = saved {
        debug!("the list of active peers cannot be saved: {error}");
    }
}

fn unix_seconds() -> u64 {
    clock::wall().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
