//! Packets that do not show their own flow: ICMP errors, which quote a packet of it, and fragments, of which
//! only the first has ports. Both follow the flow that they belong to.

use std::net::IpAddr;
use std::time::Instant;

use super::conntrack::{Direction, FlowKey, Tracked};
use super::route::{self, Exit};
use super::service::{Passage, to};
use super::{Lane, Total};
use crate::packet::rewrite::rewrite_quoted;
use crate::packet::{ChecksumState, DropReason, Headers, L4, Rewrite, icmp, rewrite};
use crate::snapshot::{PeerId, Snapshot};

/// What an ICMP error is about.
pub(super) struct About {
    /// The flow, as it would see an answer to the quoted packet.
    pub(super) tracked: Tracked,
    /// New addresses of the error itself; what it quotes is translated already.
    pub(super) change: Option<Rewrite>,
}

impl About {
    /// The way of the error.
    pub(super) fn exit(&self, snapshot: &Snapshot, headers: &Headers) -> Exit {
        match &self.tracked.rewrite {
            Some(rewrite) => route::exit_translated(&snapshot.mesh, &rewrite.to),
            None => route::exit(&snapshot.mesh, headers.destination),
        }
    }
}

impl Lane {
    /// Finds the flow that an ICMP error is about, and translates what it quotes: to what its receiver sent.
    pub(super) fn about(
        &self,
        now: Instant,
        packet: &mut [u8],
        headers: &Headers,
    ) -> Result<Option<About>, DropReason> {
        let L4::Icmp { .. } = headers.l4 else { return Ok(None) };
        let Some(mut quoted) = icmp::quoted(packet, headers) else { return Ok(None) };
        // As a packet that goes where the error goes.
        let Some(key) = FlowKey::of(&quoted.headers).map(|key| key.reversed()) else { return Ok(None) };
        if key.destination != headers.destination {
            return Ok(None);
        }
        let Some(tracked) = self.flows.peek(self.boot_ms(now), &key) else { return Ok(None) };
        let Some(rewrite) = tracked.rewrite else { return Ok(Some(About { tracked, change: None })) };
        rewrite_quoted(packet, headers, &mut quoted, &to(&rewrite.to.reversed()))?;
        // A router on the way speaks for itself; the endpoint speaks for the Service.
        let source = if headers.source == key.source { rewrite.to.source } else { headers.source };
        let change =
            Rewrite { source: Some((source, None)), destination: Some((rewrite.to.destination, None)) };
        self.counters.add(Total::IcmpTranslated, 1);
        Ok(Some(About { tracked, change: Some(change) }))
    }

    /// Decides about an ICMP error from the TUN; `None` for what is none, or is about no flow.
    pub(super) fn error_out(
        &self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &mut [u8],
        headers: &Headers,
    ) -> Result<Option<Passage>, DropReason> {
        let Some(about) = self.about(now, packet, headers)? else { return Ok(None) };
        if let Some(peer) = answers_a_stranger(snapshot, &about.tracked, headers.destination) {
            return Ok(Some(Passage { change: about.change, exit: Exit::Peer(peer) }));
        }
        let Some(change) = about.change else { return Ok(None) };
        let exit = about.exit(snapshot, headers);
        Ok(Some(Passage { change: Some(change), exit }))
    }

    /// Turns an error of our own about a translated packet into one about the packet that was sent.
    pub(super) fn untranslate(&self, now: Instant, answer: &mut [u8], headers: &mut Headers) {
        if let Ok(Some(About { change: Some(change), .. })) = self.about(now, answer, headers) {
            // From ourselves, whoever it is about.
            let change = Rewrite { source: None, ..change };
            // Of the same family and without ports: nothing to refuse.
            let _ = rewrite::rewrite(answer, headers, &change, ChecksumState::Complete);
        }
    }
}

/// The peer through which a client outside the mesh came whom this flow's packets to `destination` answer.
pub(super) fn answers_a_stranger(
    snapshot: &Snapshot,
    tracked: &Tracked,
    destination: IpAddr,
) -> Option<PeerId> {
    // A translated one has at most another port.
    let same = tracked.rewrite.is_none_or(|rewrite| rewrite.service == 0);
    let answer = tracked.from_peer && tracked.direction == Direction::Reply && same;
    let outside = || snapshot.mesh.routes.lookup(destination).is_none();
    tracked.peer.filter(|_| answer && outside())
}
