//! Step 2 outbound: what the flow table and the Services say about a packet.
//!
//! ```text
//! known flow  ->  its translation, as long as its endpoint is there; else it is reset, or chosen anew
//! new flow    ->  to a Service: choose an endpoint, choose a source, enter the flow
//!                 else: where it was going, as it is
//! ```
//!
//! The client's address stays, wherever a reply finds its way back by itself ([`Lane::source_for`] names
//! the cases where it does not). Where the translated flow would be taken for another one, it gets another
//! source port ([`Lane::enter`]).

use std::hash::Hasher as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use siphasher::sip::SipHasher13;

use super::conntrack::{self, Direction, FlowKey, FlowRef, Sighting, Tracked, Translation, Untracked};
use super::odd::answers_a_stranger;
use super::route::{self, Entrance, Exit};
use super::{Lane, Output, Total};
use crate::packet::icmp::{self, IcmpError, MAX_ANSWER};
use crate::packet::{DropReason, Headers, L4, Rewrite, parse};
use crate::snapshot::service::{
    Endpoint, Frontend, Listen, Protocol, Refusal, ServiceTable, Way, loop_address,
};
use crate::snapshot::{Owner, Snapshot};

/// What becomes of a packet: how it is changed, and where it goes then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Passage {
    /// New addresses and ports.
    pub(super) change: Option<Rewrite>,
    /// The way out.
    pub(super) exit: Exit,
}

/// How many source ports are tried for a flow whose own is taken.
const PORT_TRIES: u16 = 128;
/// The ports to choose from (RFC 6056 section 3.2: all but the well-known ones).
const FIRST_PORT: u16 = 1024;
/// How often an entry is tried for that another lane holds at the moment.
const BUSY_TRIES: usize = 4;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// A flow of a Service that keeps its endpoint.
pub(super) struct Kept {
    services: Arc<ServiceTable>,
    flow: FlowRef,
    /// Whether the packet was one that opens.
    opens: bool,
}

impl Lane {
    /// Decides about a packet from the TUN that shows its ports.
    pub(super) fn passage(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &[u8],
        headers: &Headers,
        sighting: &Sighting,
        out: &mut Output,
    ) -> Result<Passage, DropReason> {
        match self.look_up(now, sighting) {
            Ok(Some(tracked)) => {
                if !self.keeps_endpoint(snapshot, &sighting.key, &tracked, headers) {
                    self.flows.remove(tracked.flow);
                    self.counters.add(Total::StaleFlows, 1);
                    // What has no connection to lose, or only begins one, finds another endpoint.
                    if opens(headers) {
                        return self.open(now, snapshot, packet, headers, sighting, out);
                    }
                    self.refuse(now, snapshot, packet, headers, out);
                    return Err(DropReason::EndpointGone);
                }
                self.known(snapshot, &tracked, headers)
            }
            Ok(None) => self.open(now, snapshot, packet, headers, sighting, out),
            Err(Untracked::Invalid { translated: true }) => Err(DropReason::InvalidTcp),
            // A flow that finds no place in the table is carried all the same, unless it must be translated.
            Err(
                Untracked::Invalid { translated: false }
                | Untracked::Full
                | Untracked::Quota
                | Untracked::Taken,
            ) => self.as_it_is(snapshot, headers),
            // Whether it must be translated is not known.
            Err(Untracked::Busy) => Err(DropReason::FlowTableBusy),
        }
    }

    /// The packet's flow; a place that another lane is writing at the moment is looked at again.
    pub(super) fn look_up(&self, now: Instant, sighting: &Sighting) -> Result<Option<Tracked>, Untracked> {
        let ms = self.boot_ms(now);
        let mut tries = 1;
        loop {
            match self.flows.lookup(ms, sighting) {
                Err(Untracked::Busy) if tries < BUSY_TRIES => tries += 1,
                result => return result,
            }
            std::hint::spin_loop();
        }
    }

    // --- known flows -----------------------------------------------------------------------------

    fn known(
        &mut self,
        snapshot: &Snapshot,
        tracked: &Tracked,
        headers: &Headers,
    ) -> Result<Passage, DropReason> {
        if let Some(peer) = answers_a_stranger(snapshot, tracked, headers.destination)
            && snapshot.mesh.is_ours(headers.source)
        {
            let change = tracked.rewrite.map(|rewrite| to(&rewrite.to));
            return Ok(Passage { change, exit: Exit::Peer(peer) });
        }
        let Some(rewrite) = tracked.rewrite else { return self.as_it_is(snapshot, headers) };
        let exit = self.routes.translated(&rewrite.to);
        Ok(Passage { change: Some(to(&rewrite.to)), exit })
    }

    /// Whether a flow goes on with its endpoint. Bursts of one flow follow each other: what was just found of it
    /// holds as long as the Services are the same.
    fn keeps_endpoint(
        &mut self,
        snapshot: &Snapshot,
        key: &FlowKey,
        tracked: &Tracked,
        headers: &Headers,
    ) -> bool {
        let Some(rewrite) = tracked.rewrite else { return true };
        if tracked.direction == Direction::Reply || rewrite.service == 0 {
            return true;
        }
        let opens = opens(headers);
        let just = self.kept.as_ref().filter(|kept| kept.flow == tracked.flow && kept.opens == opens);
        if just.is_some_and(|kept| Arc::ptr_eq(&kept.services, &snapshot.services)) {
            return true;
        }
        let keeps = !is_stale(snapshot, key, &rewrite, opens);
        if keeps {
            self.kept = Some(Kept { services: Arc::clone(&snapshot.services), flow: tracked.flow, opens });
        }
        keeps
    }

    // --- new flows -------------------------------------------------------------------------------

    fn open(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &[u8],
        headers: &Headers,
        sighting: &Sighting,
        out: &mut Output,
    ) -> Result<Passage, DropReason> {
        // Where a pod or a node is, no Service is.
        if snapshot.mesh.routes.lookup(headers.destination).is_some() {
            return self.plain(now, snapshot, headers, sighting);
        }
        if let Some(frontend) = snapshot.services.frontend_of(&sighting.key) {
            return self.serve(now, snapshot, packet, headers, sighting, frontend, out);
        }
        let to = headers.destination;
        if snapshot.services.is_cluster_ip(to) || to == loop_address(to) {
            // Before all is known, nobody is told that there is nothing.
            if snapshot.services.is_complete() {
                self.refuse(now, snapshot, packet, headers, out);
            }
            return Err(DropReason::ServicePortClosed);
        }
        self.as_it_is(snapshot, headers)
    }

    #[allow(clippy::too_many_arguments)] // one packet and everything that is known about it
    fn serve(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &[u8],
        headers: &Headers,
        sighting: &Sighting,
        frontend: &Frontend,
        out: &mut Output,
    ) -> Result<Passage, DropReason> {
        let inside = snapshot.mesh.is_ours(headers.source) || headers.source.is_loopback();
        let candidates = match frontend.candidates(headers.source, inside) {
            Ok(candidates) => candidates,
            Err(Refusal::NoEndpoints) => {
                self.refuse(now, snapshot, packet, headers, out);
                return Err(DropReason::NoServiceEndpoint);
            }
            Err(Refusal::NoneHere) => return Err(DropReason::NoLocalEndpoint),
            Err(Refusal::Source) => return Err(DropReason::ClientNotAllowed),
        };
        if !opens(headers) {
            // In the middle of a connection that nobody knows: whoever chose its endpoint has forgotten it.
            self.refuse(now, snapshot, packet, headers, out);
            return Err(DropReason::UnknownConnection);
        }
        let key = &sighting.key;
        let ms = self.boot_ms(now);
        let port = &frontend.port;
        let chosen = match port.affinity {
            0 => self.choose(key, candidates),
            seconds => self
                .affinity
                .find(ms, port.id, key.source, seconds)
                .filter(|found| candidates.binary_search(found).is_ok())
                .unwrap_or_else(|| self.choose(key, candidates)),
        };
        if port.affinity > 0 {
            self.affinity.note(ms, port.id, key.source, chosen);
        }
        let exit = route::exit(&snapshot.mesh, chosen.address);
        let source = self.source_for(snapshot, key.source, chosen.address, frontend.way, exit)?;
        let reply = FlowKey {
            source: chosen.address,
            source_port: chosen.port,
            destination: source,
            destination_port: key.source_port,
            protocol: key.protocol,
        };
        let sighting = Sighting { peer: exit.peer(), owner: self.owner(key.source), ..*sighting };
        let change = self.enter(now, &sighting, reply, port.id)?;
        Ok(Passage { change: Some(change), exit })
    }

    /// One of several, the same for every packet of a flow.
    fn choose(&self, key: &FlowKey, candidates: &[Endpoint]) -> Endpoint {
        let hash = flow_number(self.seed, key);
        // Multiply and shift: no modulo's bias, no division.
        let index = ((u128::from(hash) * candidates.len() as u128) >> 64) as usize;
        candidates[index.min(candidates.len() - 1)]
    }

    /// The source that lets the reply find back into this loop. It stays the client's own but where
    /// - client and endpoint are both this node, or are one pod: the reply would never leave it;
    /// - the endpoint is no part of the mesh: the kernel brings the packet there, and must bring the reply
    ///   here (what came from a pod it masquerades, and remembers);
    /// - the client is another node, or a stranger with a pod's address, and the endpoint is on a third one,
    ///   which would answer it directly; or it is a stranger whom that node would not take: at a ClusterIP, or
    ///   where no Warren does Services.
    fn source_for(
        &self,
        snapshot: &Snapshot,
        client: IpAddr,
        endpoint: IpAddr,
        way: Way,
        exit: Exit,
    ) -> Result<IpAddr, DropReason> {
        let own = || Lane::own_address(snapshot, client).ok_or(DropReason::NoRoute);
        let mut owner = snapshot.mesh.routes.lookup(client);
        if client.is_loopback() {
            owner = Some(Owner::LocalNode);
        }
        let source = match (owner, exit) {
            (_, Exit::LocalPod | Exit::LocalNode | Exit::Outside) if client == endpoint => {
                loop_address(client)
            }
            (Some(Owner::LocalNode), Exit::LocalPod | Exit::LocalNode | Exit::Outside) => {
                loop_address(client)
            }
            (Some(Owner::LocalNode), Exit::Peer(_)) if client.is_loopback() => own()?,
            (Some(Owner::LocalNode), Exit::Peer(_)) => client,
            (Some(Owner::LocalPod), Exit::Peer(_) | Exit::LocalPod | Exit::LocalNode | Exit::Outside) => {
                client
            }
            (Some(Owner::PeerPod(_) | Owner::PeerNode(_)) | None, Exit::LocalPod | Exit::LocalNode) => client,
            (Some(Owner::PeerPod(_) | Owner::PeerNode(_)) | None, Exit::Outside) => loop_address(client),
            (Some(Owner::PeerPod(_) | Owner::PeerNode(_)), Exit::Peer(_)) => own()?,
            // Not every node takes strangers, and none but for what is shown to the world.
            (None, Exit::Peer(peer)) => {
                let takes = snapshot.mesh.peer(peer).is_some_and(|peer| peer.takes_strangers);
                if takes && way != Way::Cluster { client } else { own()? }
            }
        };
        if source != client {
            self.counters.add(Total::SourcesRewritten, 1);
        }
        Ok(source)
    }

    /// Enters a translated flow; if its replies could be taken for another's, with another source port.
    pub(super) fn enter(
        &mut self,
        now: Instant,
        sighting: &Sighting,
        mut reply: FlowKey,
        service: u32,
    ) -> Result<Rewrite, DropReason> {
        let ms = self.boot_ms(now);
        let own_port = reply.destination_port;
        let (mut tries, mut busy) = (0, 0);
        loop {
            let translation = Translation { reply, service, endpoint: 0 };
            match self.flows.insert(ms, sighting, Some(&translation)) {
                Ok(_) => break,
                Err(Untracked::Taken) if tries < PORT_TRIES => {
                    // Another lane may have entered this very flow meanwhile.
                    if tries == 0
                        && let Ok(Some(Tracked { rewrite: Some(rewrite), .. })) = self.look_up(now, sighting)
                    {
                        return Ok(to(&rewrite.to));
                    }
                    // From a place that nobody can foresee, one after the other (RFC 6056 section 3.3.3).
                    let span = u32::from(u16::MAX - FIRST_PORT) + 1;
                    let start = flow_number(!self.seed, &sighting.key) as u32 % span;
                    reply.destination_port = FIRST_PORT + ((start + u32::from(tries)) % span) as u16;
                    tries += 1;
                }
                Err(Untracked::Taken) => return Err(DropReason::NoSourcePort),
                Err(Untracked::Busy) if busy < BUSY_TRIES => busy += 1,
                Err(Untracked::Busy) => return Err(DropReason::FlowTableBusy),
                Err(Untracked::Full) => return Err(DropReason::FlowTableFull),
                Err(Untracked::Quota) => return Err(DropReason::FlowQuota),
                Err(Untracked::Invalid { .. }) => return Err(DropReason::InvalidTcp),
            }
        }
        if reply.destination_port != own_port {
            self.counters.add(Total::SourcePortsChanged, 1);
        }
        self.sweep_soon(now);
        Ok(to(&reply.reversed()))
    }

    /// A new flow that no Service has to do with.
    fn plain(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        headers: &Headers,
        sighting: &Sighting,
    ) -> Result<Passage, DropReason> {
        let passage = self.as_it_is(snapshot, headers)?;
        let Exit::Peer(peer) = passage.exit else { return Ok(passage) };
        let ms = self.boot_ms(now);
        let owner = self.owner(headers.source);
        let sighting = Sighting { peer: Some(peer), owner, ..*sighting };
        let inserted = self.flows.insert(ms, &sighting, None);
        self.sweep_soon(now);
        match inserted {
            // A Service's flow has the same addresses and ports already, and was here first.
            Err(Untracked::Taken) if opens(headers) => {
                let change = self.enter(now, &sighting, sighting.key.reversed(), 0)?;
                Ok(Passage { change: Some(change), ..passage })
            }
            // A flow that finds no place in the table is carried all the same.
            Ok(_) | Err(_) => Ok(passage),
        }
    }

    /// Who pays for a flow from this address: only pods of this node have a quota.
    fn owner(&self, source: IpAddr) -> u16 {
        let owner = self.mesh.as_ref().and_then(|mesh| mesh.routes.lookup(source));
        if owner == Some(Owner::LocalPod) { Sighting::owner_of(source) } else { 0 }
    }

    /// Where it was going, as it is.
    pub(super) fn as_it_is(&mut self, snapshot: &Snapshot, headers: &Headers) -> Result<Passage, DropReason> {
        debug_assert!(self.mesh.as_ref().is_some_and(|mesh| std::sync::Arc::ptr_eq(mesh, &snapshot.mesh)));
        let exit = self.routes.outbound(headers.source, headers.destination)?;
        Ok(Passage { change: None, exit: route::untranslated(Entrance::Tun, exit)? })
    }

    // --- answers ---------------------------------------------------------------------------------

    /// Says at once that nobody is there: a reset to TCP, unreachable to everything else.
    fn refuse(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        packet: &[u8],
        headers: &Headers,
        out: &mut Output,
    ) {
        let L4::Tcp { .. } = headers.l4 else {
            return self.tell_sender(now, snapshot, packet, headers, IcmpError::PortUnreachable, out);
        };
        let mut room = [0; MAX_ANSWER];
        if let Some(len) = icmp::build_reset(&mut room, packet, headers)
            && let Ok(headers) = parse(&room[..len])
        {
            self.counters.add(Total::ResetsSent, 1);
            self.answer_into_tun(&room[..len], &headers, out);
        }
    }
}

/// Whether a flow's endpoint is no longer one of its Service, or the Service not what is called.
fn is_stale(snapshot: &Snapshot, key: &FlowKey, rewrite: &conntrack::Rewrite, opens: bool) -> bool {
    let endpoint = Endpoint { address: rewrite.to.destination, port: rewrite.to.destination_port };
    // What was saved before a restart may be older than the flow.
    if !snapshot.services.is_complete() {
        return false;
    }
    let tcp = rewrite.to.protocol == Protocol::Tcp.number();
    // What only begins may still turn to who takes new ones.
    let protocol = if tcp && opens { Protocol::Udp.number() } else { rewrite.to.protocol };
    // Its Service is gone, or another one has its port now: a connection may come to its own end, as it may
    // under kube-proxy; datagrams, and who begins anew, go by what is there now.
    let Some(port) = snapshot.services.port(rewrite.service) else { return opens };
    let theirs = || snapshot.services.frontend_of(key).is_some_and(|now| now.port.id == rewrite.service);
    !port.keeps(protocol, endpoint) || opens && !theirs()
}

/// Whether the packet may begin something: for TCP that is a SYN alone.
pub(super) fn opens(headers: &Headers) -> bool {
    match headers.l4 {
        L4::Tcp { flags, .. } => flags & (SYN | ACK) == SYN,
        L4::Udp { .. } | L4::Sctp { .. } | L4::Icmp { .. } | L4::Other | L4::None => true,
    }
}

/// The change that gives a packet these addresses and ports.
pub(super) fn to(key: &FlowKey) -> Rewrite {
    Rewrite {
        source: Some((key.source, Some(key.source_port))),
        destination: Some((key.destination, Some(key.destination_port))),
    }
}

/// A number that a client cannot choose, the same for every packet of its flow.
fn flow_number(seed: u64, key: &FlowKey) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(seed, !seed);
    for address in [key.source, key.destination] {
        match address {
            IpAddr::V4(v4) => hasher.write_u32(v4.to_bits()),
            IpAddr::V6(v6) => hasher.write_u128(v6.to_bits()),
        }
    }
    hasher.write_u16(key.source_port);
    hasher.write_u16(key.destination_port);
    hasher.write_u8(key.protocol);
    hasher.finish()
}

impl crate::snapshot::service::ServiceTable {
    fn frontend_of(&self, key: &FlowKey) -> Option<&Frontend> {
        let protocol = Protocol::of(key.protocol)?;
        self.frontend(&Listen { address: key.destination, protocol, port: key.destination_port })
    }
}
