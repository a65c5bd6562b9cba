//! What the packet line tells the flow table: one sighting per super-packet, not per packet.

use std::time::{Duration, Instant};

use super::Lane;
use super::conntrack::{FlowKey, Sighting};
use crate::packet::coalesce::Head;
use crate::packet::{Headers, L4};
use crate::snapshot::{Owner, PeerId, Snapshot};

/// How often expired flows are looked for, and how many entries at a time: a table of a million flows is
/// gone through in four minutes by one lane.
const SWEEP_EVERY: Duration = Duration::from_millis(250);
const SWEEP_ENTRIES: u32 = 1024;
/// SYN, FIN, RST: what changes the state of a connection.
const CONTROL: u8 = 0x01 | 0x02 | 0x04;

impl Lane {
    /// Notes a burst that goes to a peer.
    pub(super) fn track(
        &mut self,
        now: Instant,
        headers: &Headers,
        peer: Option<PeerId>,
        from_peer: bool,
        packets: usize,
    ) {
        let Some(key) = FlowKey::of(headers) else { return };
        let sighting = Sighting {
            key,
            from_peer,
            peer,
            lane: self.id.0,
            tcp_flags: tcp_flags(headers),
            packets: packets as u32,
            bytes: u64::from(headers.total_len),
            owner: 0,
        };
        // A flow that finds no place is carried all the same: nothing is translated yet.
        let _ = self.flows.track(self.boot_ms(now), &sighting);
        self.next_sweep.get_or_insert(now + SWEEP_EVERY);
    }

    /// Notes a packet that stands behind the head of its frame and opens or ends a connection; its bytes
    /// count with the frame.
    pub(super) fn track_control(&mut self, now: Instant, headers: &Headers, peer: PeerId) {
        if tcp_flags(headers) & CONTROL != 0 {
            let counted = Headers { total_len: 0, ..*headers };
            self.track(now, &counted, Some(peer), true, 0);
        }
    }

    /// Notes a frame from a peer, once all its packets are known.
    pub(super) fn track_frame(&mut self, now: Instant, snapshot: &Snapshot, head: &Head<'_>) {
        let peer = match snapshot.mesh.routes.lookup(head.headers.source) {
            Some(Owner::PeerPod(peer) | Owner::PeerNode(peer)) => peer,
            // An ICMP error of our own belongs to no flow.
            Some(Owner::LocalPod | Owner::LocalNode) | None => return,
        };
        let counted = Headers { total_len: head.bytes, ..*head.headers };
        self.track(now, &counted, Some(peer), true, usize::from(head.packets));
    }

    /// Forgets flows whose time is over, a few at a time.
    pub(super) fn sweep_flows(&mut self, now: Instant) {
        if self.next_sweep.is_none_or(|at| now < at) {
            return;
        }
        self.flows.sweep(self.boot_ms(now), SWEEP_ENTRIES);
        self.next_sweep = (self.flows.counters().entries > 0).then_some(now + SWEEP_EVERY);
    }

    fn boot_ms(&self, now: Instant) -> u64 {
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
