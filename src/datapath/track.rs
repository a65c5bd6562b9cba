//! What the packet line tells the flow table: one sighting per super-packet, not per packet.

use std::time::{Duration, Instant};

use super::Lane;
use super::conntrack::{FlowKey, Sighting, Untracked};
use super::service::{opens, to};
use crate::packet::{DropReason, Headers, L4, Rewrite};
use crate::snapshot::PeerId;

/// How often expired flows are looked for, and how many entries at a time: a table of a million flows is
/// gone through in four minutes by one lane.
const SWEEP_EVERY: Duration = Duration::from_millis(250);
const SWEEP_ENTRIES: u32 = 1024;
/// SYN, FIN, RST: what changes the state of a connection.
const CONTROL: u8 = 0x01 | 0x02 | 0x04;

impl Lane {
    /// What the flow table wants to know of packets from the TUN; `None` where they show no flow.
    pub(super) fn sighting(&self, headers: &Headers, packets: usize) -> Option<Sighting> {
        Some(Sighting {
            key: FlowKey::of(headers)?,
            from_peer: false,
            peer: None,
            lane: self.id.0,
            tcp_flags: tcp_flags(headers),
            packets: packets as u32,
            bytes: u64::from(headers.total_len),
            owner: 0,
        })
    }

    /// Notes a packet of a peer that stands behind the head of its frame and opens or ends a connection; its
    /// bytes count with the frame.
    pub(super) fn track_control(&mut self, now: Instant, headers: &Headers, peer: PeerId) {
        if tcp_flags(headers) & CONTROL == 0 {
            return;
        }
        let Some(sighting) = self.sighting(headers, 0) else { return };
        let sighting = Sighting { from_peer: true, peer: Some(peer), bytes: 0, ..sighting };
        // Its frame is noted after it; where that finds no place, neither does this.
        let _ = self.flows.lookup(self.boot_ms(now), &sighting);
    }

    /// Notes packets that came from a peer together; says how they are to be changed. `known`: only as
    /// packets of a flow that is translated here may they pass.
    pub(super) fn track_from_peer(
        &mut self,
        now: Instant,
        headers: &Headers,
        packets: usize,
        peer: PeerId,
        known: bool,
    ) -> Result<Option<Rewrite>, DropReason> {
        let Some(sighting) = self.sighting(headers, packets) else { return Ok(None) };
        let sighting = Sighting { from_peer: true, peer: Some(peer), ..sighting };
        let ms = self.boot_ms(now);
        let tracked = match self.look_up(now, &sighting) {
            Ok(None) if !known => {
                self.sweep_soon(now);
                self.flows.insert(ms, &sighting, None).map(Some)
            }
            result => result,
        };
        match tracked {
            Ok(Some(tracked)) if !known || tracked.rewrite.is_some() => {
                Ok(tracked.rewrite.map(|rewrite| to(&rewrite.to)))
            }
            Ok(_) => Err(DropReason::NotOurs),
            // The same client came another way already: its answers are that flow's.
            Err(Untracked::Taken) if opens(headers) => {
                self.enter(now, &sighting, sighting.key.reversed(), 0).map(Some)
            }
            Err(Untracked::Taken) => Err(DropReason::NoSourcePort),
            Err(Untracked::Invalid { translated: true }) => Err(DropReason::InvalidTcp),
            Err(Untracked::Busy) => Err(DropReason::FlowTableBusy),
            // A flow that finds no place in the table is carried all the same.
            Err(Untracked::Invalid { translated: false } | Untracked::Full | Untracked::Quota) if !known => {
                Ok(None)
            }
            Err(_) => Err(DropReason::NotOurs),
        }
    }

    /// Sees to it that what was entered now is forgotten some day.
    pub(super) fn sweep_soon(&mut self, now: Instant) {
        self.next_sweep.get_or_insert(now + SWEEP_EVERY);
    }

    /// Forgets flows whose time is over, a few at a time.
    pub(super) fn sweep_flows(&mut self, now: Instant) {
        if self.next_sweep.is_none_or(|at| now < at) {
            return;
        }
        self.flows.sweep(self.boot_ms(now), SWEEP_ENTRIES);
        self.next_sweep = (self.flows.counters().entries > 0).then_some(now + SWEEP_EVERY);
    }

    pub(super) fn boot_ms(&self, now: Instant) -> u64 {
        let (instant, ms) = self.epoch;
        ms + now.saturating_duration_since(instant).as_millis() as u64
    }
}

fn tcp_flags(headers: &Headers) -> u8 {
    match headers.l4 {
        L4::Tcp { flags, .. } => flags,
        L4::Udp { .. } | L4::Sctp { .. } | L4::Icmp { .. } | L4::Other | L4::None => 0,
    }
}
