//! Lanes on a kernel that refuses things.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::sync_channel;

use super::*;
use crate::datapath::conntrack::{FlowTable, Seed};
use crate::datapath::{Counters, LaneConfig};
use crate::snapshot::{LaneId, LocalNode, Mesh, Owner, Peer, PeerLane, PeerVxlan};
use crate::tunnel::batch::Run;
use crate::tunnel::vxlan;
use crate::tunnel::{TxBatch, Via};

const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
const PEER: &str = "192.0.2.2:8472";

/// A kernel whose every answer the test chooses.
#[derive(Default)]
struct Fake {
    frames: VecDeque<Vec<u8>>,
    datagrams: VecDeque<Vec<Vec<u8>>>,
    written: Vec<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    tun_limits: Vec<TunOffloads>,
    /// Whether the sockets take nothing.
    full: bool,
    waits: Vec<Watch>,
    /// How often the TUN cannot be opened again.
    no_tun: usize,
    /// Set once it was waited for that often.
    stop_after: Option<(usize, Arc<AtomicBool>)>,
    /// What a send of more than one datagram gets.
    refuse_runs: Option<i32>,
    /// How many sends were refused for that.
    refused: usize,
    /// What a write of a joined frame gets.
    refuse_joined: Option<i32>,
    /// Errors for the next sends, whatever they are.
    next_sends: VecDeque<i32>,
    /// Most datagrams and most bytes of one run.
    largest_run: (usize, usize),
    /// How often it yielded before it slept, and after.
    yields: [usize; 2],
}

impl Kernel for Fake {
    fn now(&self) -> Instant {
        crate::io::clock::now()
    }

    fn read_tun(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.no_tun > 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADFD));
        }
        let frame = self.frames.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        buffer[..frame.len()].copy_from_slice(&frame);
        Ok(frame.len())
    }

    fn write_tun(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let frame: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).collect();
        if let Some(error) = self.refuse_joined.filter(|_| frame[1] != 0) {
            return Err(io::Error::from_raw_os_error(error));
        }
        self.written.push(frame.clone());
        Ok(frame.len())
    }

    fn reopen_tun(&mut self, wanted: TunOffloads) -> io::Result<TunOffloads> {
        self.no_tun -= 1;
        if self.no_tun > 0 {
            return Err(io::Error::other("no TUN"));
        }
        Ok(TunOffloads { udp: false, ..wanted })
    }

    fn limit_tun_offloads(&mut self, offloads: TunOffloads) {
        self.tun_limits.push(offloads);
    }

    fn receive(&mut self, encap: Encap, buffer: &mut [u8], out: &mut Vec<Received>) -> io::Result<usize> {
        if encap == Encap::WireGuard {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let run = self.datagrams.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let bytes = run.concat();
        buffer[..bytes.len()].copy_from_slice(&bytes);
        let from = PEER.parse().expect("address");
        out.push(Received { from, offset: 0, len: bytes.len(), stride: run[0].len() });
        Ok(1)
    }

    fn send(&mut self, batch: &TxBatch, runs: &[Run]) -> io::Result<usize> {
        if let Some(error) = self.next_sends.pop_front() {
            return Err(io::Error::from_raw_os_error(error));
        }
        if self.full {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut sent = 0;
        for run in runs {
            let (count, bytes) = self.largest_run;
            self.largest_run = (count.max(run.count), bytes.max(batch.bytes(run).len()));
            match self.refuse_runs {
                Some(_) if run.count > 1 && sent > 0 => return Ok(sent),
                Some(error) if run.count > 1 => {
                    self.refused += 1;
                    return Err(io::Error::from_raw_os_error(error));
                }
                Some(_) | None => {
                    self.sent.extend(batch.bytes(run).chunks(run.segment).map(<[u8]>::to_vec));
                    sent += 1;
                }
            }
        }
        Ok(sent)
    }

    fn wait(&mut self, _timeout: Option<Duration>, watch: Watch) -> io::Result<()> {
        self.waits.push(watch);
        if let Some((after, stop)) = &self.stop_after
            && self.waits.len() >= *after
        {
            stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn yield_now(&mut self) {
        self.yields[usize::from(!self.waits.is_empty())] += 1;
    }
}

fn snapshot() -> Snapshot {
    snapshot_of(1)
}

/// Peers at 192.0.2.2 and on, with 10.244.1.0/24 and on.
fn snapshot_of(peers: u8) -> Snapshot {
    let port = PEER.parse::<SocketAddr>().expect("address").port();
    let mut mesh = Mesh::default();
    mesh.routes.insert("10.244.0.0/24".parse().expect("range"), Owner::LocalPod);
    for i in 0..peers {
        let (id, address) = (PeerId(u32::from(i)), IpAddr::from([192, 0, 2, 2 + i]));
        let range = format!("10.244.{}.0/24", 1 + i).parse().expect("range");
        mesh.routes.insert(range, Owner::PeerPod(id));
        mesh.vxlan_sources.insert(address, id);
        mesh.peers.push(Some(Arc::new(Peer {
            id,
            name: format!("peer-{i}"),
            encap: Some(Encap::Vxlan),
            lanes: Vec::new(),
            endpoints: Vec::new(),
            vxlan: Some(PeerVxlan { address, port, mac: Some(MACS[1]) }),
            pod_ranges: Vec::new(),
            addresses: Vec::new(),
            mtu: 1450,
            keepalive: 0,
            ordinary: false,
            takes_strangers: true,
            also: Vec::new(),
        })));
    }
    let local = LocalNode {
        name: "me".to_owned(),
        address_v4: Some("10.244.0.0".parse().expect("address")),
        address_v6: None,
        vni: 1,
        mac: MACS[0],
    };
    Snapshot { generation: 1, local: Arc::new(local), mesh: Arc::new(mesh), services: Arc::default() }
}

fn lane_on(kernel: Fake) -> (LaneLoop<Fake>, Arc<Counters>) {
    lane_of(0, kernel, snapshot(), Desk::default())
}

fn lane_of(id: u8, kernel: Fake, snapshot: Snapshot, desk: Desk) -> (LaneLoop<Fake>, Arc<Counters>) {
    let lane = Lane::new(LaneConfig {
        id: LaneId(id),
        private: [7; 32],
        seed: (1, 2),
        vxlan_sources: 1,
        neighbours: Arc::default(),
        flows: Arc::new(FlowTable::in_memory(1024, Seed(1, 2)).expect("a table")),
        affinity: Arc::new(crate::datapath::affinity::Affinity::in_memory(1024)),
        epoch: (crate::io::clock::now(), 0),
    });
    let counters = lane.counters();
    let shared = Shared {
        snapshot: Arc::new(ArcSwap::from_pointee(snapshot)),
        stop: Arc::new(AtomicBool::new(false)),
    };
    let (_, orders) = sync_channel(1);
    (LaneLoop::new(kernel, lane, shared, orders, desk, LaneOffloads::default()), counters)
}

/// TCP segments of one flow, back to back; the last is short.
fn segments(from: &str, to: &str, count: usize) -> Vec<Vec<u8>> {
    let ip = |text: &str| text.parse::<std::net::Ipv4Addr>().expect("address").octets();
    (0..count)
        .map(|i| {
            let payload = vec![i as u8; if i + 1 == count { 100 } else { 1000 }];
            let builder = etherparse::PacketBuilder::ipv4(ip(from), ip(to), 64)
                .tcp(40_000, 80, 1 + 1000 * i as u32, 4096)
                .ack(1);
            let mut packet = Vec::new();
            builder.write(&mut packet, &payload).expect("a packet");
            packet[6] |= 0x40; // don't fragment; then the header's checksum again
            packet[10..12].fill(0);
            let sum = crate::packet::checksum::checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet
        })
        .collect()
}

/// What the TUN hands over for `packets`.
fn frames(packets: &[Vec<u8>]) -> VecDeque<Vec<u8>> {
    packets.iter().map(|packet| [&[0; VNET_HDR_LEN][..], packet].concat()).collect()
}

/// What the peer sends for `packets`.
fn datagrams(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let header = vxlan::header(1, MACS[0], MACS[1], false);
    packets.iter().map(|packet| [&header[..], packet].concat()).collect()
}

fn now() -> Instant {
    crate::io::clock::now()
}

#[test]
fn cards_that_cannot_cut_cost_one_batch_nothing_and_the_offload_if_none_can() {
    let packets: Vec<_> =
        (1..=10).flat_map(|i| segments("10.244.0.2", &format!("10.244.{i}.2"), 2)).collect();
    // Whether a run got through before all others were refused; how many asked the kernel then.
    for (one_can, asked) in [(false, 8), (true, 10)] {
        let (mut lane, counters) = lane_on(Fake::default());
        lane.shared.snapshot.store(Arc::new(snapshot_of(10)));
        if one_can {
            lane.kernel.frames = frames(&packets[..2]);
            lane.turn(now()).expect("a turn");
            assert_eq!(std::mem::take(&mut lane.kernel.sent).len(), 2);
        }
        lane.kernel.refuse_runs = Some(libc::EIO);
        lane.kernel.frames = frames(&packets);
        while lane.turn(now()).expect("a turn") {}
        assert_eq!(lane.kernel.refused, asked);
        let payloads: Vec<_> = lane.kernel.sent.iter().map(|d| d[vxlan::HEADER..].to_vec()).collect();
        assert_eq!(payloads, packets);
        assert_eq!(lane.offloads.udp_segmentation, one_can);
        assert_eq!(counters.total(Total::OffloadFallbacks), asked as u64);
        assert_eq!(counters.dropped(DropReason::SendFailed), 0);
    }
}

#[test]
fn a_path_that_takes_no_runs_costs_its_own_destination_the_offload_and_only_for_a_while() {
    for error in [libc::EINVAL, libc::EMSGSIZE, libc::EIO] {
        let packets = segments("10.244.0.2", "10.244.1.2", 6);
        let fake = Fake { frames: frames(&packets), refuse_runs: Some(error), ..Fake::default() };
        let (mut lane, counters) = lane_on(fake);
        let start = now();
        lane.turn(start).expect("a turn");
        let payloads: Vec<_> = lane.kernel.sent.iter().map(|d| d[vxlan::HEADER..].to_vec()).collect();
        assert_eq!(payloads, packets);
        assert!(lane.offloads.udp_segmentation, "other peers go on with it");
        assert_eq!(counters.total(Total::OffloadFallbacks), 1);
        assert_eq!(counters.dropped(DropReason::SendFailed), 0);

        // The kernel is not asked again, then it is.
        for (later, asked) in [(30, 0), (61, 1), (90, 0)] {
            lane.kernel.frames = frames(&packets);
            lane.kernel.refused = 0;
            lane.turn(start + Duration::from_secs(later)).expect("a turn");
            assert_eq!(lane.kernel.refused, asked, "after {later} s");
        }
        assert_eq!(lane.kernel.sent.len(), 4 * packets.len());

        // However often: it is one destination.
        for minute in 3..20 {
            lane.kernel.frames = frames(&packets);
            lane.turn(start + Duration::from_secs(61 * minute)).expect("a turn");
        }
        assert_eq!(lane.kernel.refused, 17);
        assert!(lane.offloads.udp_segmentation);
    }
}

#[test]
fn an_unreachable_peer_costs_its_run() {
    let packets = segments("10.244.0.2", "10.244.1.2", 6);
    let fake = Fake { frames: frames(&packets), next_sends: [libc::EINTR].into(), ..Fake::default() };
    let (mut lane, counters) = lane_on(fake);
    lane.turn(now()).expect("a turn");
    assert_eq!(lane.kernel.sent.len(), 6);

    lane.kernel.frames = frames(&packets);
    lane.kernel.next_sends = [libc::ENETUNREACH].into();
    lane.turn(now()).expect("a turn");
    assert_eq!(lane.kernel.sent.len(), 6);
    assert_eq!(counters.dropped(DropReason::SendFailed), 6);
    assert!(lane.offloads.udp_segmentation);
}

#[test]
fn a_full_socket_stops_what_goes_out_and_nothing_that_comes_in() {
    let outbound = segments("10.244.0.2", "10.244.1.2", 6);
    let inbound = segments("10.244.1.2", "10.244.0.2", 6);
    let fake = Fake { frames: frames(&outbound), full: true, ..Fake::default() };
    let (mut lane, counters) = lane_on(fake);
    let start = now();
    lane.turn(start).expect("a turn");
    lane.kernel.frames = frames(&outbound);
    for turn in 1..=10 {
        lane.kernel.datagrams = [datagrams(&inbound)].into();
        assert!(lane.turn(start + Duration::from_millis(turn)).expect("a turn"));
        assert_eq!(counters.total(Total::PacketsReceived), 6 * turn);
        assert_eq!(lane.kernel.frames.len(), 6, "frames stay in the TUN's own queue");
    }
    assert!(!lane.turn(start + Duration::from_millis(11)).expect("a turn"), "nothing to do: it may sleep");
    assert_eq!(lane.outbox.full(), Some(Via::Vxlan(0)));
    assert!(lane.outbox.poll_timeout().is_some_and(|at| at <= start + Duration::from_millis(20)));

    // Room again: in order, and nothing was lost.
    lane.kernel.full = false;
    lane.turn(start + Duration::from_millis(12)).expect("a turn");
    let payloads: Vec<_> = lane.kernel.sent.iter().map(|d| d[vxlan::HEADER..].to_vec()).collect();
    assert_eq!(payloads, [&outbound[..], &outbound].concat());
    assert_eq!(counters.dropped(DropReason::UplinkFull), 0);

    // No room for too long: what waits is dropped, and there is a next try.
    lane.kernel.full = true;
    lane.kernel.frames = frames(&outbound);
    lane.turn(start + Duration::from_millis(13)).expect("a turn");
    lane.turn(start + Duration::from_millis(33)).expect("a turn");
    assert_eq!(counters.dropped(DropReason::UplinkFull), 6);
    lane.kernel.full = false;
    lane.kernel.frames = frames(&outbound);
    lane.turn(start + Duration::from_millis(34)).expect("a turn");
    assert_eq!(lane.kernel.sent.len(), 18);
}

#[test]
fn a_full_socket_is_slept_for_without_looking_at_the_tun() {
    let packets = segments("10.244.0.2", "10.244.1.2", 2);
    let (mut lane, _) = lane_on(Fake { frames: frames(&packets), full: true, ..Fake::default() });
    lane.kernel.stop_after = Some((1, Arc::clone(&lane.shared.stop)));
    lane.run().expect("told to stop");
    assert_eq!(lane.kernel.waits, [Watch::AllButTun(Via::Vxlan(0))]);
}

#[test]
fn sessions_are_begun_a_few_at_a_time() {
    let (mut lane, _) = lane_on(Fake::default());
    let mut many = snapshot();
    Arc::get_mut(&mut many.mesh).expect("ours alone").peers.resize(100, None);
    lane.shared.snapshot.store(Arc::new(many));
    let (commands, orders) = sync_channel(4);
    lane.commands = orders;
    for _ in 0..3 {
        commands.try_send(Command::Initiate((0..5_000).map(PeerId).collect())).expect("room");
    }
    assert!(lane.turn(now()).expect("a turn"));
    assert_eq!(lane.initiate.len(), 100 - INITIATIONS, "no more than there are peers");
    for _ in 0..100 / INITIATIONS {
        assert!(lane.turn(now()).expect("a turn"));
    }
    assert!(lane.initiate.is_empty());
    assert!(!lane.turn(now()).expect("a turn"));
}

#[test]
fn joined_packets_that_the_tun_refuses_are_written_apart() {
    let packets = segments("10.244.1.2", "10.244.0.2", 6);
    let fake = Fake {
        datagrams: [datagrams(&packets), datagrams(&packets[..1])].into(),
        refuse_joined: Some(libc::EINVAL),
        ..Fake::default()
    };
    let (mut lane, counters) = lane_on(fake);
    lane.turn(now()).expect("a turn");
    assert_eq!(lane.kernel.written.len(), packets.len());
    for (written, packet) in lane.kernel.written.iter().zip(&packets) {
        let inner = &written[VNET_HDR_LEN..];
        assert_eq!(inner[8], packet[8], "the kernel takes the hop");
        assert_eq!(inner[20..], packet[20..], "transport and payload untouched");
        let headers = parse(inner).expect("a packet");
        assert!(crate::packet::checksum::verify_transport(inner, &headers));
    }
    assert!(!lane.offloads.tun_tcp && lane.offloads.tun_udp);
    assert_eq!(lane.kernel.tun_limits, [TunOffloads { tcp: false, udp: true }]);
    assert_eq!(counters.total(Total::OffloadFallbacks), 1);
    assert_eq!(counters.dropped(DropReason::TunWriteFailed), 0);
}

/// UDP datagrams of one flow, all but the last of one size.
fn updates(from: &str, to: &str, count: usize) -> Vec<Vec<u8>> {
    let ip = |text: &str| text.parse::<std::net::Ipv4Addr>().expect("address").octets();
    (0..count)
        .map(|i| {
            let builder = etherparse::PacketBuilder::ipv4(ip(from), ip(to), 64).udp(40_000, 80);
            let mut packet = Vec::new();
            let size = if i + 1 == count { 100 } else { 1000 };
            builder.write(&mut packet, &vec![i as u8; size]).expect("a packet");
            packet
        })
        .collect()
}

#[test]
fn joined_datagrams_that_the_tun_refuses_are_written_apart() {
    let packets = updates("10.244.1.2", "10.244.0.2", 6);
    let fake = Fake {
        datagrams: [datagrams(&packets)].into(),
        refuse_joined: Some(libc::EINVAL),
        ..Fake::default()
    };
    let (mut lane, counters) = lane_on(fake);
    lane.turn(now()).expect("a turn");
    assert_eq!(lane.kernel.written.len(), packets.len());
    for (written, packet) in lane.kernel.written.iter().zip(&packets) {
        assert_eq!(written[VNET_HDR_LEN + 20..], packet[20..], "transport and payload untouched");
    }
    assert!(lane.offloads.tun_tcp && !lane.offloads.tun_udp);
    assert_eq!(lane.kernel.tun_limits, [TunOffloads { tcp: true, udp: false }]);
    assert_eq!(counters.total(Total::OffloadFallbacks), 1);
    assert_eq!(counters.dropped(DropReason::TunWriteFailed), 0);
    // And what comes next is not joined in the first place.
    lane.kernel.datagrams = [datagrams(&packets)].into();
    lane.kernel.written.clear();
    lane.turn(now()).expect("a turn");
    assert_eq!(lane.kernel.written.len(), packets.len());
    assert_eq!(counters.total(Total::OffloadFallbacks), 1);
}

/// One frame of the TUN in which a sender with this MSS has put so many bytes.
fn super_frame(mss: u16, bytes: usize) -> Vec<u8> {
    super_frame_to([10, 244, 1, 2], mss, bytes)
}

fn super_frame_to(to: [u8; 4], mss: u16, bytes: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..bytes).map(|i| (i / 7) as u8).collect();
    let builder = etherparse::PacketBuilder::ipv4([10, 244, 0, 2], to, 64).tcp(40_000, 80, 1, 4096).ack(1);
    let mut packet = Vec::new();
    builder.write(&mut packet, &payload).expect("a packet");
    packet[6] |= 0x40;
    packet[10..12].fill(0);
    let sum = crate::packet::checksum::checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    // include/uapi/linux/virtio_net.h: NEEDS_CSUM, TCPv4, header length, segment size, where the sum starts and is.
    let vnet = [1, 1, 40, 0, mss as u8, (mss >> 8) as u8, 20, 0, 16, 0];
    [&vnet[..], &packet].concat()
}

#[test]
fn a_frame_of_very_many_segments_leaves_in_runs_that_the_kernel_takes() {
    // With 48 a peer can make the kernel send the smallest: 36 bytes beside timestamps.
    for mss in [36, 88, 89, 536, 1379] {
        let bytes = 64_000;
        let fake = Fake { frames: (0..3).map(|_| super_frame(mss, bytes)).collect(), ..Fake::default() };
        let (mut lane, counters) = lane_on(fake);
        while lane.turn(now()).expect("a turn") {}
        let count = bytes.div_ceil(usize::from(mss));
        assert_eq!(lane.kernel.sent.len(), 3 * count, "MSS {mss}");
        let (count_most, bytes_most) = lane.kernel.largest_run;
        assert!(
            count_most <= 64 && bytes_most <= 65_507,
            "MSS {mss}: {count_most} datagrams, {bytes_most} bytes"
        );
        for whole in lane.kernel.sent.chunks(count) {
            let payload: Vec<u8> = whole.iter().flat_map(|d| d[vxlan::HEADER + 40..].to_vec()).collect();
            assert!(payload.iter().enumerate().all(|(i, byte)| *byte == (i / 7) as u8), "MSS {mss}");
        }
        assert_eq!(DropReason::ALL.iter().map(|reason| counters.dropped(*reason)).sum::<u64>(), 0);
    }
}

#[test]
fn what_other_lanes_hand_over_leaves_a_lane_its_own_turn() {
    let mut snapshot = snapshot_of(2);
    let mesh = Arc::get_mut(&mut snapshot.mesh).expect("nobody has it yet");
    let ordinary = mesh.peers[0].as_mut().and_then(Arc::get_mut).expect("nobody has it yet");
    (ordinary.encap, ordinary.ordinary) = (Some(Encap::WireGuard), true);
    // Any 32 bytes are a public key.
    ordinary.lanes = vec![PeerLane { key: [9; 32], port: 51820 }];
    ordinary.endpoints = vec!["192.0.2.2:51820".parse().expect("address")];
    let (put, take) = sync_channel(100);
    let bell = Arc::new(crate::io::kernel::bell().expect("a bell"));
    let putting = Desk { taking: None, putting: Some((put, bell)) };
    let (mut other, _) = lane_of(1, Fake::default(), snapshot.clone(), putting);
    for _ in 0..100 {
        other.kernel.frames.push_back(super_frame_to([10, 244, 1, 2], 1379, 1000));
        other.turn(now()).expect("a turn");
    }
    let taking = Desk { taking: Some(take), putting: None };
    let frames = (0..5).map(|_| super_frame_to([10, 244, 2, 2], 1379, 1000)).collect();
    let (mut first, _) = lane_of(0, Fake { frames, ..Fake::default() }, snapshot, taking);
    let frames_left = |first: &LaneLoop<Fake>| first.kernel.frames.len();
    // The handshake finds the socket full, and so there is no looking at the TUN;
    first.kernel.next_sends = [libc::EAGAIN].into();
    first.turn(now()).expect("a turn");
    assert_eq!((first.lane.waiting(), frames_left(&first)), (PARCELS, 5));
    // then it is the TUN's turn, which finds it full too.
    first.kernel.next_sends = [libc::EAGAIN].into();
    first.turn(now()).expect("a turn");
    assert_eq!((first.lane.waiting(), frames_left(&first)), (PARCELS, 0));
    while first.turn(now()).expect("a turn") {}
    let handshakes = 1;
    assert_eq!((first.lane.waiting(), first.kernel.sent.len()), (100, handshakes + 5));
}

#[test]
fn an_idle_lane_looks_for_a_while_and_a_timer_does_not_begin_it_again() {
    let (mut lane, _) = lane_on(Fake::default());
    lane.kernel.stop_after = Some((3, Arc::clone(&lane.shared.stop)));
    lane.run().expect("told to stop");
    assert_eq!(lane.kernel.waits, [Watch::Everything; 3]);
    let [before, after] = lane.kernel.yields;
    assert!(before > 0 && after == 0, "yields before the first sleep {before}, between sleeps {after}");
}

#[test]
fn what_can_be_joined_is_one_write() {
    let packets = segments("10.244.1.2", "10.244.0.2", 6);
    let (mut lane, counters) = lane_on(Fake { datagrams: [datagrams(&packets)].into(), ..Fake::default() });
    lane.turn(now()).expect("a turn");
    assert_eq!(lane.kernel.written.len(), 1);
    assert_eq!(counters.total(Total::PacketsReceived), 6);
    assert_eq!(lane.kernel.written[0].len(), VNET_HDR_LEN + 40 + 5 * 1000 + 100);
}

#[test]
fn a_tun_that_was_removed_is_opened_again() {
    let (mut lane, _) = lane_on(Fake { no_tun: 3, ..Fake::default() });
    // Two tries fail; the third wait is that of a lane with nothing to do.
    lane.kernel.stop_after = Some((3, Arc::clone(&lane.shared.stop)));
    lane.run().expect("told to stop");
    assert_eq!(lane.kernel.waits, [Watch::Bell, Watch::Bell, Watch::Everything]);
    assert!(lane.offloads.tun_tcp && !lane.offloads.tun_udp, "the new queue has less");
}

#[test]
fn a_tun_that_stays_away_ends_the_loop_with_its_reason() {
    let (mut lane, _) = lane_on(Fake { no_tun: usize::MAX, ..Fake::default() });
    assert_eq!(lane.run().expect_err("gone").to_string(), "no TUN");
    assert_eq!(lane.kernel.waits.len(), TUN_RETRIES as usize);
}

#[test]
fn a_lane_without_tun_stops_when_told() {
    let (mut lane, _) = lane_on(Fake { no_tun: usize::MAX, ..Fake::default() });
    lane.kernel.stop_after = Some((1, Arc::clone(&lane.shared.stop)));
    lane.run().expect("told to stop");
    assert_eq!(lane.kernel.waits, [Watch::Bell]);
}
