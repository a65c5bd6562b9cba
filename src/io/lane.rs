//! The lane's thread: reads what there is, lets the packet line work on it, sends what came out.
//!
//! 1. TUN -> packet line -> datagrams, until the TUN is empty or the batch is full; on lane 0 in turn with what the
//!    other lanes have handed over to it
//! 2. datagrams -> packet line -> TUN, one receive call's worth per encapsulation
//! 3. commands, timers, and what is to be handed over
//! 4. nothing to do: yield for as long as that has paid off (`io::spin`), then sleep
//!
//! Each turn is bounded and waits for nothing; the snapshot is loaded once per turn. While a socket is full,
//! 1 stands still: the TUN's own queue fills and drops, and what peers send is received all the same.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use nix::sys::eventfd::EventFd;
use tracing::warn;

use super::kernel::{Kernel, Watch};
use super::outbox::Outbox;
use super::spin::Spin;
use super::tun::{READ_BYTES, TunOffloads};
use super::udp::{Received, SLOT, SLOTS};
use crate::datapath::{Arrival, Lane, Output, Parcel, PeerTraffic, Total};
use crate::packet::DropReason;
use crate::packet::coalesce::{Frame, MAX_SEGMENTS, Memory, Offloads, Region};
use crate::packet::parse;
use crate::packet::segment::SuperPacket;
use crate::packet::vnet::{GSO_UDP_L4, VNET_HDR_LEN, VnetHdr};
use crate::snapshot::{Encap, PeerId, PublicKey, Snapshot};
use crate::tunnel::wireguard::{Keys, SessionReport, WireGuardStats};

/// Frames read from the TUN before the network gets its turn.
const TUN_FRAMES: usize = 16;
/// Parcels taken from other lanes in one turn.
const PARCELS: usize = 16;
/// A TCP super-packet of so many bytes tells of a stream; see `io::spin`.
const BULK_BYTES: usize = 32 * 1024;
/// Sessions begun in one turn: each costs three scalar multiplications, about 0.1 ms.
const INITIATIONS: usize = 16;
/// How long a lane tries to open the TUN again after somebody removed it, and how often.
const TUN_RETRIES: u32 = 50;
const TUN_RETRY_EVERY: Duration = Duration::from_millis(100);
/// Most pieces of one write: the virtio header, and 64 packets (coalesce.rs joins no more).
const MAX_PIECES: usize = 1 + MAX_SEGMENTS as usize;

/// What others may ask of a running lane.
#[derive(Debug)]
pub enum Command {
    /// Start sessions with these peers.
    Initiate(Vec<PeerId>),
    /// Use these keys from now on.
    Keys(Keys),
    /// Say how things are.
    Report(SyncSender<LaneReport>),
}

/// How things are.
#[derive(Clone, Debug, Default)]
pub struct LaneReport {
    /// Its public key, the one in use.
    pub public_key: PublicKey,
    /// WireGuard sessions.
    pub sessions: Vec<SessionReport>,
    /// Traffic per peer, indexed by [`PeerId`].
    pub traffic: Vec<PeerTraffic>,
    /// WireGuard's own counters.
    pub wireguard: WireGuardStats,
    /// Offloads in use.
    pub offloads: LaneOffloads,
}

/// Which offloads a lane uses; each is given up on its own when the kernel refuses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneOffloads {
    /// TCP super-packets to and from the TUN.
    pub tun_tcp: bool,
    /// UDP super-packets to and from the TUN.
    pub tun_udp: bool,
    /// Joining packets before they are written to the TUN.
    pub joining: bool,
    /// One send for many datagrams.
    pub udp_segmentation: bool,
    /// One receive for many datagrams.
    pub udp_receive: bool,
    /// Joining pure ACKs.
    pub ack_joining: bool,
}

impl Default for LaneOffloads {
    fn default() -> LaneOffloads {
        LaneOffloads {
            tun_tcp: true,
            tun_udp: true,
            joining: true,
            udp_segmentation: true,
            udp_receive: true,
            ack_joining: true,
        }
    }
}

/// What a lane shares with the rest of the agent.
#[derive(Clone, Debug)]
pub struct Shared {
    /// What the packet line reads.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Set to end the lane.
    pub stop: Arc<AtomicBool>,
}

/// Where parcels change hands.
#[derive(Debug, Default)]
pub struct Desk {
    /// Of lane 0: what the others have put there.
    pub taking: Option<Receiver<Parcel>>,
    /// Of the others: to lane 0, and its bell.
    pub putting: Option<(SyncSender<Parcel>, Arc<EventFd>)>,
}

/// A lane and everything it drives.
pub struct LaneLoop<K> {
    kernel: K,
    lane: Lane,
    shared: Shared,
    commands: Receiver<Command>,
    desk: Desk,
    offloads: LaneOffloads,
    out: Output,
    frame: Box<[u8]>,
    receive: Box<[u8]>,
    received: Vec<Received>,
    outbox: Outbox,
    /// Peers that wait for [`Command::Initiate`] to come to them.
    initiate: VecDeque<PeerId>,
    /// Whether TCP super-packets went through this turn.
    bulk: bool,
    /// Whether what other lanes handed over came before what the TUN has, last turn.
    parcels_first: bool,
}

impl<K> std::fmt::Debug for LaneLoop<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LaneLoop").field("lane", &self.lane).field("offloads", &self.offloads).finish()
    }
}

impl<K: Kernel> LaneLoop<K> {
    /// Puts a lane together with its kernel.
    pub fn new(
        kernel: K,
        lane: Lane,
        shared: Shared,
        commands: Receiver<Command>,
        desk: Desk,
        offloads: LaneOffloads,
    ) -> LaneLoop<K> {
        LaneLoop {
            kernel,
            lane,
            shared,
            commands,
            desk,
            offloads,
            out: Output::new(batch_offloads(&offloads)),
            frame: vec![0; READ_BYTES].into_boxed_slice(),
            receive: vec![0; SLOTS * SLOT].into_boxed_slice(),
            received: Vec::with_capacity(SLOTS),
            outbox: Outbox::default(),
            initiate: VecDeque::new(),
            bulk: false,
            parcels_first: false,
        }
    }

    /// Runs until asked to stop; an error is the end of the data path.
    pub fn run(&mut self) -> io::Result<()> {
        let mut spin = Spin::default();
        while !self.stopping() {
            let now = self.kernel.now();
            match self.turn(now) {
                Ok(true) => {
                    spin.worked(now, self.bulk);
                    continue;
                }
                Ok(false) => {}
                // Somebody removed the TUN: the sessions go on with another one.
                Err(e) if e.raw_os_error() == Some(libc::EBADFD) => {
                    self.reopen_tun()?;
                    continue;
                }
                Err(e) => return Err(e),
            }
            if spin.goes_on(now) {
                self.kernel.yield_now();
                continue;
            }
            let timers = [self.lane.poll_timeout(), self.outbox.poll_timeout()];
            let next = timers.into_iter().flatten().min();
            let watch = self.outbox.full().map_or(Watch::Everything, Watch::AllButTun);
            self.kernel.wait(next.map(|at| at.saturating_duration_since(now)), watch)?;
        }
        Ok(())
    }

    fn stopping(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    fn reopen_tun(&mut self) -> io::Result<()> {
        let wanted = TunOffloads { tcp: self.offloads.tun_tcp, udp: self.offloads.tun_udp };
        for tries in 0.. {
            match self.kernel.reopen_tun(wanted) {
                Ok(TunOffloads { tcp, udp }) => {
                    (self.offloads.tun_tcp, self.offloads.tun_udp) = (tcp, udp);
                    self.out.tun.set_offloads(batch_offloads(&self.offloads));
                    return Ok(());
                }
                Err(e) if tries >= TUN_RETRIES => return Err(e),
                Err(_) if self.stopping() => return Ok(()),
                Err(_) => self.kernel.wait(Some(TUN_RETRY_EVERY), Watch::Bell)?,
            }
        }
        Ok(())
    }

    /// One bounded turn; whether there was anything to do.
    pub fn turn(&mut self, now: Instant) -> io::Result<bool> {
        let snapshot = self.shared.snapshot.load();
        self.bulk = false;
        let mut worked = self.flush_datagrams(now);
        // Whoever comes second may find the socket full.
        self.parcels_first = !self.parcels_first;
        for parcels in [self.parcels_first, !self.parcels_first] {
            if self.outbox.full().is_none() {
                worked |= if parcels {
                    self.take_parcels(now, &snapshot)
                } else {
                    self.take_frames(now, &snapshot)?
                };
            }
        }
        for encap in [Encap::WireGuard, Encap::Vxlan] {
            worked |= self.take_datagrams(now, &snapshot, encap)?;
        }
        worked |= self.commands(now, &snapshot);
        worked |= self.initiate(now, &snapshot);
        self.put_parcels();
        if self.lane.poll_timeout().is_some_and(|at| at <= now) {
            self.lane.handle_timeout(now, &snapshot, &mut self.out);
        }
        self.flush_datagrams(now);
        Ok(worked)
    }

    // --- 1 ---------------------------------------------------------------------------------------

    fn take_frames(&mut self, now: Instant, snapshot: &Snapshot) -> io::Result<bool> {
        let mut frames = 0;
        while frames < TUN_FRAMES && self.out.has_room() {
            match self.kernel.read_tun(&mut self.frame) {
                Ok(len) => {
                    self.bulk |= is_bulk(&self.frame, len);
                    self.lane.handle_tun(now, snapshot, &mut self.frame[..len], &mut self.out);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // Down, but not gone: whoever repairs the interface sets it up again.
                Err(e) if e.raw_os_error() == Some(libc::EIO) => break,
                // Gone: the caller opens it again.
                Err(e) if e.raw_os_error() == Some(libc::EBADFD) => return Err(e),
                Err(e) => return Err(io::Error::new(e.kind(), format!("reading the TUN: {e}"))),
            }
            frames += 1;
        }
        self.flush_datagrams(now);
        self.flush_tun(now);
        Ok(frames > 0)
    }

    // --- 2 ---------------------------------------------------------------------------------------

    fn take_datagrams(&mut self, now: Instant, snapshot: &Snapshot, encap: Encap) -> io::Result<bool> {
        self.received.clear();
        match self.kernel.receive(encap, &mut self.receive, &mut self.received) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            // An ICMP error about an earlier datagram, or a signal: not about this socket.
            Err(e) if is_passing(&e) => return Ok(false),
            Err(e) => return Err(io::Error::new(e.kind(), format!("receiving {}: {e}", encap.name()))),
        }
        for i in 0..self.received.len() {
            let r = self.received[i];
            let arrival = Arrival { encap, from: r.from, offset: r.offset, len: r.len, stride: r.stride };
            self.lane.handle_udp(now, snapshot, arrival, &mut self.receive, &mut self.out);
        }
        self.flush_tun(now);
        self.flush_datagrams(now);
        Ok(true)
    }

    // --- 3 ---------------------------------------------------------------------------------------

    fn commands(&mut self, now: Instant, snapshot: &Snapshot) -> bool {
        let mut any = false;
        while let Ok(command) = self.commands.try_recv() {
            any = true;
            match command {
                Command::Initiate(peers) => {
                    self.initiate.extend(peers);
                    // No more than there are, however often we are told.
                    self.initiate.truncate(snapshot.mesh.peers.len());
                }
                Command::Keys(keys) => self.lane.set_keys(now, keys),
                Command::Report(answer) => {
                    // Whoever asked may have gone.
                    let _ = answer.try_send(self.report(now));
                }
            }
        }
        any
    }

    fn initiate(&mut self, now: Instant, snapshot: &Snapshot) -> bool {
        let count = self.initiate.len().min(INITIATIONS);
        for peer in self.initiate.drain(..count) {
            self.lane.initiate(now, snapshot, peer, &mut self.out);
        }
        count > 0
    }

    /// Puts down what only lane 0 can send.
    fn put_parcels(&mut self) {
        let Some((first, bell)) = self.desk.putting.as_ref().filter(|_| !self.out.parcels.is_empty()) else {
            return;
        };
        for parcel in self.out.parcels.drain(..) {
            if let Err(TrySendError::Full(parcel) | TrySendError::Disconnected(parcel)) =
                first.try_send(parcel)
            {
                self.lane.counters().count_drops(DropReason::HandOver, parcel.packets());
            }
        }
        // Full is rung already.
        let _ = bell.write(1);
    }

    /// Sends what the other lanes have put down.
    fn take_parcels(&mut self, now: Instant, snapshot: &Snapshot) -> bool {
        let Some(parcels) = &self.desk.taking else { return false };
        let mut taken = 0;
        while taken < PARCELS && self.out.has_room() {
            let Ok(parcel) = parcels.try_recv() else { break };
            self.lane.take_parcel(now, snapshot, &parcel, &mut self.out);
            taken += 1;
        }
        if taken > 0 {
            self.flush_datagrams(now);
        }
        taken > 0
    }

    fn report(&self, now: Instant) -> LaneReport {
        LaneReport {
            public_key: self.lane.wireguard().public_key(),
            sessions: self.lane.wireguard().report(now),
            traffic: self.lane.traffic().to_vec(),
            wireguard: self.lane.wireguard().stats,
            offloads: self.offloads,
        }
    }

    // --- what came out ---------------------------------------------------------------------------

    fn flush_tun(&mut self, now: Instant) {
        if self.out.tun.is_empty() {
            return;
        }
        self.lane.finish_tun(now, &mut self.receive, &mut self.out);
        let counters = self.lane.counters();
        let mut refused = None;
        for frame in self.out.tun.frames() {
            match write_frame(&mut self.kernel, &frame, &self.receive, &self.out.plain) {
                Ok(len) => {
                    counters.add(Total::TunWrites, 1);
                    counters.add(Total::TunWriteBytes, len);
                    self.bulk |= is_bulk(&frame.vnet, len);
                }
                // Some kernels refuse joined packets: nothing is lost but the speed.
                Err(e) if frame.packets > 1 && e.raw_os_error() == Some(libc::EINVAL) => {
                    refused = Some(frame.vnet);
                    let memory = Memory { receive: &mut self.receive, plain: &mut self.out.plain };
                    let lost = write_apart(&mut self.kernel, &frame, &memory, &mut self.frame);
                    counters.count_drops(DropReason::TunWriteFailed, lost);
                }
                Err(_) => counters.count_drops(DropReason::TunWriteFailed, usize::from(frame.packets)),
            }
        }
        self.out.clear_tun();
        if let Some(vnet) = refused {
            self.give_up_tun_offload(&vnet);
        }
    }

    fn give_up_tun_offload(&mut self, vnet: &[u8]) {
        let udp = is_udp(vnet);
        if udp {
            self.offloads.tun_udp = false;
        } else {
            self.offloads.tun_tcp = false;
        }
        self.out.tun.set_offloads(batch_offloads(&self.offloads));
        let left = TunOffloads { tcp: self.offloads.tun_tcp, udp: self.offloads.tun_udp };
        self.kernel.limit_tun_offloads(left);
        self.lane.counters().add(Total::OffloadFallbacks, 1);
        let what = if udp { "UDP" } else { "TCP" };
        warn!("the kernel refuses joined {what} packets on the TUN: writing them one by one from now on");
    }

    fn flush_datagrams(&mut self, now: Instant) -> bool {
        let segmentation = &mut self.offloads.udp_segmentation;
        let counters = &self.lane.counters();
        self.outbox.flush(now, &mut self.kernel, &mut self.out.tx, segmentation, counters)
    }
}

/// Whether a frame is a TCP super-packet worth a wake-up.
fn is_bulk(frame: &[u8], len: usize) -> bool {
    len >= BULK_BYTES && !is_udp(frame)
}

/// Whether a frame is made of UDP datagrams.
fn is_udp(vnet: &[u8]) -> bool {
    VnetHdr::decode(vnet).is_ok_and(|(header, _)| header.gso() == GSO_UDP_L4)
}

/// Writes one frame in one call.
fn write_frame<K: Kernel>(
    kernel: &mut K,
    frame: &Frame<'_>,
    receive: &[u8],
    plain: &[u8],
) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); MAX_PIECES];
    slices[0] = IoSlice::new(&frame.vnet);
    let mut count = 1;
    for piece in frame.pieces.iter().take(MAX_PIECES - 1) {
        let from = match piece.region {
            Region::Receive => receive,
            Region::Plain => plain,
        };
        let at = piece.offset as usize;
        slices[count] = IoSlice::new(&from[at..at + piece.len as usize]);
        count += 1;
    }
    kernel.write_tun(&slices[..count])
}

/// Cuts a joined frame again and writes its packets one by one; returns how many were lost.
fn write_apart<K: Kernel>(kernel: &mut K, frame: &Frame<'_>, memory: &Memory<'_>, room: &mut [u8]) -> usize {
    let all = usize::from(frame.packets);
    let len = frame.gather(memory, room);
    let Ok((vnet, _)) = VnetHdr::decode(&frame.vnet) else { return all };
    let Ok(headers) = parse(&room[..len]) else { return all };
    let Ok(segments) = SuperPacket::new(&vnet, &room[..len], &headers) else { return all };
    let header = [0; VNET_HDR_LEN];
    let mut packet = vec![0; segments.max_len()];
    let mut lost = 0;
    for i in 0..segments.count() {
        let len = segments.write(i, &mut packet);
        let slices = [IoSlice::new(&header), IoSlice::new(&packet[..len])];
        lost += usize::from(kernel.write_tun(&slices).is_err());
    }
    lost
}

/// Errors that an earlier datagram left on the socket.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EINTR
                | libc::ECONNREFUSED
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::ENETDOWN
                | libc::EMSGSIZE
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENOBUFS
                | libc::ENOMEM
        )
    )
}

fn batch_offloads(offloads: &LaneOffloads) -> Offloads {
    Offloads {
        tcp: offloads.tun_tcp && offloads.joining,
        udp: offloads.tun_udp && offloads.joining,
        acks: offloads.ack_joining,
    }
}

#[cfg(test)]
#[path = "lane_tests.rs"]
mod tests;
