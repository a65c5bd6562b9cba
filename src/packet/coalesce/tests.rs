//! Joined super-packets against what went in, and packets that must stay alone; each run by run and one by one.

use std::net::IpAddr;

use super::super::parse;
use super::super::segment::kit::*;
use super::super::segment::{SuperPacket, TCP_ACK, TCP_CWR, TCP_ECE, TCP_FIN, TCP_PSH, put};
use super::super::vnet::{DATA_VALID, GSO_ECN, GSO_TCPV4, VnetHdr};
use super::frame::{be32, tcp_flags};
use super::*;
use proptest::prelude::*;

const ALL: Offloads = Offloads { tcp: true, udp: true, acks: true };
const JOIN: Offloads = Offloads { tcp: true, udp: true, acks: false };

/// A frame as the kernel would get it.
#[derive(Clone, Debug, PartialEq)]
struct Out {
    vnet: VnetHdr,
    packet: Vec<u8>,
    packets: u16,
}

/// Pushes packets, alternating between the two regions, and gathers what comes out: the same, whether or not
/// runs take their short way.
fn run(offloads: Offloads, packets: &[Vec<u8>], translate: impl Fn(&mut [u8])) -> Vec<Out> {
    let (plain, _) = run_by(false, offloads, packets, &translate);
    let (quick, _) = run_by(true, offloads, packets, &translate);
    assert_eq!(plain, quick);
    quick
}

/// Also says how many took it.
fn run_by(
    quick: bool,
    offloads: Offloads,
    packets: &[Vec<u8>],
    translate: impl Fn(&mut [u8]),
) -> (Vec<Out>, usize) {
    let (mut receive, mut plain) = (vec![0xaa; 3], vec![0xbb; 7]);
    let mut places = Vec::new();
    for (i, packet) in packets.iter().enumerate() {
        let (region, buffer) =
            if i % 3 == 0 { (Region::Receive, &mut receive) } else { (Region::Plain, &mut plain) };
        places.push((region, buffer.len() as u32));
        buffer.extend(packet);
        buffer.extend([0xcc; 5]);
    }
    let mut memory = Memory { receive: &mut receive, plain: &mut plain };
    let mut batch = TunBatch::new(packets.len());
    batch.set_offloads(offloads);
    let mut repeated = 0;
    for ((region, offset), packet) in places.iter().zip(packets) {
        // What stands behind the packet does not count.
        let room = packet.len() + 5;
        assert_eq!(batch.repeat(*region, *offset as usize, room, &memory, 1), None, "another's");
        let short = if quick { batch.repeat(*region, *offset as usize, room, &memory, 0) } else { None };
        match short {
            Some(len) => {
                assert_eq!(len as usize, packet.len());
                repeated += 1;
            }
            None => {
                batch.push(*region, *offset, &parse(packet).unwrap(), &memory).unwrap();
            }
        }
    }
    for index in 0..batch.count() {
        let piece = batch.head(index).unwrap().piece;
        translate(memory.get_mut(piece).unwrap());
    }
    assert_eq!(batch.frames().count(), 0);
    batch.finish(&mut memory);
    assert_eq!(
        batch.heads().map(|head| head.bytes as usize).sum::<usize>(),
        packets.iter().map(Vec::len).sum::<usize>()
    );
    let mut out = vec![0; 70_000];
    let frames = batch.frames().map(|frame| {
        let len = frame.gather(&memory, &mut out);
        assert_eq!(len, frame.len());
        let vnet = VnetHdr::decode(&frame.vnet).unwrap().0;
        Out { vnet, packet: out[..len].to_vec(), packets: frame.packets }
    });
    (frames.collect(), repeated)
}

fn join(packets: &[Vec<u8>]) -> Vec<u16> {
    run(ALL, packets, |_| ()).iter().map(|out| out.packets).collect()
}

fn cut(out: &Out) -> Vec<Vec<u8>> {
    let headers = parse(&out.packet).unwrap();
    let whole = SuperPacket::new(&out.vnet, &out.packet, &headers).unwrap();
    let mut buffer = vec![0; 70_000];
    (0..whole.count())
        .map(|i| {
            let len = whole.write(i, &mut buffer);
            buffer[..len].to_vec()
        })
        .collect()
}

/// Consecutive segments or datagrams.
fn train(spec: &Spec, lens: &[usize]) -> Vec<Spec> {
    let mut at = 0;
    let mut specs = Vec::new();
    for (i, len) in lens.iter().enumerate() {
        specs.push(Spec {
            id: spec.id.wrapping_add(i as u16),
            seq: spec.seq.wrapping_add(at as u32),
            payload: payload(*len, i as u32),
            ..spec.clone()
        });
        at += len;
    }
    specs
}

fn built(specs: &[Spec]) -> Vec<Vec<u8>> {
    specs.iter().map(Spec::build).collect()
}

#[test]
fn a_run_of_segments_becomes_the_super_packet_it_was() {
    for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
        let flags = if udp { 0 } else { TCP_ACK | TCP_PSH | TCP_FIN };
        let spec = Spec { v6, udp, flags, payload: payload(20_100, 8), ..Spec::default() };
        let mut packet = spec.build();
        let vnet = owed(&mut packet, 1200);
        let segments = cut(&Out { vnet, packet: packet.clone(), packets: 1 });
        let joined = run(JOIN, &segments, |_| ());
        let hdr_len = (packet.len() - spec.payload.len()) as u16;
        assert_eq!(joined, [Out { vnet: VnetHdr { hdr_len, ..vnet }, packet, packets: 17 }]);
    }
}

#[test]
fn all_but_the_first_of_a_frame_take_the_short_way() {
    for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
        let spec = Spec { v6, udp, flags: if udp { 0 } else { TCP_ACK }, ..Spec::default() };
        let mut specs = train(&spec, &[100; 20]);
        assert_eq!(run_by(true, JOIN, &built(&specs), |_| ()).1, 19);
        // A flow in between ends the run, not the frame.
        specs.insert(10, Spec { source_port: 9, ..spec.clone() });
        let (out, repeated) = run_by(true, JOIN, &built(&specs), |_| ());
        assert_eq!((out.len(), repeated), (2, 18));
    }
}

#[test]
fn pieces_lie_where_the_packets_came_in() {
    let specs = train(&Spec::default(), &[100, 100, 40]);
    let mut receive = built(&specs).concat();
    let headers: Vec<Headers> = specs.iter().map(|spec| parse(&spec.build()).unwrap()).collect();
    let mut memory = Memory { receive: &mut receive, plain: &mut [] };
    let mut batch = TunBatch::new(8);
    batch.set_offloads(JOIN);
    for (i, headers) in headers.iter().enumerate() {
        batch.push(Region::Receive, i as u32 * 152, headers, &memory).unwrap();
    }
    batch.finish(&mut memory);
    let pieces: Vec<(u32, u32)> =
        batch.frames().flat_map(|f| f.pieces.iter().map(|p| (p.offset, p.len)).collect::<Vec<_>>()).collect();
    assert_eq!(pieces, [(0, 152), (204, 100), (356, 40)]);
    batch.clear();
    assert!(batch.is_empty() && batch.frames().next().is_none());
}

#[test]
fn switched_off_every_packet_goes_alone_and_untouched() {
    let packets = built(&train(&Spec::default(), &[100, 100, 100]));
    let out = run(Offloads::default(), &packets, |_| ());
    assert_eq!(out.iter().map(|out| out.packet.clone()).collect::<Vec<_>>(), packets);
    assert!(out.iter().all(|out| out.vnet == VnetHdr::default()));
}

#[test]
fn a_shorter_segment_a_push_and_a_fin_end_a_frame() {
    let specs = train(&Spec::default(), &[100, 100, 40, 100, 100, 120, 120]);
    assert_eq!(join(&built(&specs)), [3, 2, 2]);
    for flag in [TCP_PSH, TCP_FIN] {
        let mut specs = train(&Spec::default(), &[100; 4]);
        specs[1].flags |= flag;
        let out = run(ALL, &built(&specs), |_| ());
        assert_eq!(out.iter().map(|out| out.packets).collect::<Vec<_>>(), [2, 2]);
        assert_eq!(out[0].packet[33], TCP_ACK | flag);
    }
}

#[test]
fn what_cutting_could_not_give_back_is_not_joined() {
    type Change = fn(&mut Spec);
    let changes: [Change; 14] = [
        |s| s.seq = s.seq.wrapping_add(1),
        |s| s.ack += 1,
        |s| s.window += 1,
        |s| s.flags |= TCP_ECE,
        |s| s.flags |= TCP_CWR,
        |s| s.flags |= 0x20,
        |s| s.options = timestamps(2, 2),
        |s| s.options = Vec::new(),
        |s| s.hop_limit -= 1,
        |s| s.traffic_class = 3,
        |s| s.dont_fragment = false,
        |s| s.source_port += 1,
        |s| s.payload.push(1),
        |s| s.ip_options = vec![1; 4],
    ];
    for (i, change) in changes.iter().enumerate() {
        for v6 in [false, true] {
            let mut specs = train(&Spec { v6, ..Spec::default() }, &[100, 100]);
            assert_eq!(join(&built(&specs)), [2]);
            change(&mut specs[1]);
            let same = v6 && matches!(i, 10 | 13);
            assert_eq!(join(&built(&specs)).len(), if same { 1 } else { 2 }, "change {i}, v6 {v6}");
        }
    }
}

#[test]
fn identification_matters_where_fragmenting_is_allowed() {
    let spec = Spec { dont_fragment: false, ..Spec::default() };
    let mut specs = train(&spec, &[100; 3]);
    assert_eq!(join(&built(&specs)), [3]);
    specs[2].id += 1;
    assert_eq!(join(&built(&specs)), [2, 1]);
    let mut specs = train(&Spec::default(), &[100; 3]);
    specs[2].id = 7;
    assert_eq!(join(&built(&specs)), [3]);
}

#[test]
fn cwr_stands_in_the_first_segment_only() {
    let mut specs = train(&Spec::default(), &[100; 4]);
    specs[2].flags |= TCP_CWR;
    let out = run(ALL, &built(&specs), |_| ());
    assert_eq!(out.iter().map(|out| out.packets).collect::<Vec<_>>(), [2, 2]);
    assert_eq!(out[1].vnet.gso_type, GSO_TCPV4 | GSO_ECN);
    assert_eq!(cut(&out[1]), built(&specs)[2..]);
}

#[test]
fn a_wrong_checksum_is_left_to_the_kernel() {
    for udp in [false, true] {
        for bad in 0..3 {
            let mut packets = built(&train(&Spec { udp, ..Spec::default() }, &[100; 3]));
            packets[bad][70] ^= 1;
            let out = run(ALL, &packets, |_| ());
            let counts: Vec<u16> = out.iter().map(|out| out.packets).collect();
            assert_eq!(counts, [&[1, 2][..], &[1, 1, 1], &[2, 1]][bad]);
            let at = out.iter().position(|out| out.packet == packets[bad]).unwrap();
            assert_eq!(out[at].vnet, VnetHdr::default());
        }
    }
    let mut packets = built(&train(&Spec::default(), &[100; 2]));
    packets[1][10] ^= 1;
    assert_eq!(join(&packets), [1, 1], "IPv4 header checksum");
}

#[test]
fn datagrams_without_checksum_or_bound_for_a_tunnel_go_alone() {
    let mut packets = built(&train(&Spec { udp: true, ..Spec::default() }, &[100; 2]));
    assert_eq!(join(&packets), [2]);
    for packet in &mut packets {
        put(packet, 26, [0, 0]);
    }
    assert_eq!(join(&packets), [1, 1]);
    let mut packets = built(&train(&Spec { udp: true, ..Spec::default() }, &[100; 2]));
    for packet in &mut packets {
        put(packet, 22, 4789u16.to_be_bytes());
        let headers = parse(packet).unwrap();
        fill_checksum(packet, &headers);
    }
    assert_eq!(join(&packets), [1, 1]);
}

#[test]
fn a_frame_has_at_most_64_packets_and_64_kilobytes() {
    assert_eq!(join(&built(&train(&Spec::default(), &[10; 130]))), [64, 64, 2]);
    assert_eq!(join(&built(&train(&Spec { udp: true, ..Spec::default() }, &[10; 130]))), [64, 64, 2]);
    // 47 whole segments, and what is left of the largest packet the kernel cuts.
    let mut lens = [1368; 48];
    lens[47] = 65_535 - 52 - 47 * 1368;
    assert_eq!(join(&built(&train(&Spec::default(), &lens))), [48]);
    lens[47] += 1;
    assert_eq!(join(&built(&train(&Spec::default(), &lens))), [47, 1]);
}

#[test]
fn translation_between_push_and_finish_reaches_the_whole_frame() {
    for v6 in [false, true] {
        let specs = train(&Spec { v6, ..Spec::default() }, &[100, 100, 40]);
        let out = run(ALL, &built(&specs), |packet| {
            let (address, port) = if v6 { (39, 42) } else { (19, 22) };
            packet[address] = 99;
            put(packet, port, 8080u16.to_be_bytes());
        });
        for segment in cut(&out[0]) {
            assert!(checksums_hold(&segment));
            let headers = parse(&segment).unwrap();
            assert_eq!(headers.ports(), Some((40_000, 8080)));
            assert!(headers.destination.to_string().ends_with(if v6 { ":63" } else { ".99" }));
        }
    }
}

#[test]
fn a_first_fragment_closes_its_flow() {
    let spec = Spec { udp: true, ..Spec::default() };
    let mut packets = built(&train(&spec, &[96; 4]));
    packets[1][6] = 0x20;
    let checksum = !slow_sum(0, &[&packets[1][..10], &[0, 0], &packets[1][12..20]].concat());
    put(&mut packets[1], 10, checksum.to_be_bytes());
    assert_eq!(join(&packets), [1, 1, 2]);
}

#[test]
fn acknowledgements_become_the_last_of_four() {
    let acks: Vec<Spec> =
        (0..6).map(|i| Spec { ack: 1000 + 2736 * i, window: 500 + i as u16, ..Spec::default() }).collect();
    let out = run(ALL, &built(&acks), |_| ());
    assert_eq!(out.iter().map(|out| out.packets).collect::<Vec<_>>(), [4, 2]);
    assert_eq!(out[0].packet, acks[3].build());
    assert_eq!(out[1].packet, acks[5].build());
    assert!(out.iter().all(|out| out.vnet == VnetHdr { flags: DATA_VALID, ..VnetHdr::default() }));
    assert_eq!(run(JOIN, &built(&acks), |_| ()).len(), 6);
}

#[test]
fn acknowledgements_that_say_more_are_kept() {
    type Change = fn(&mut [Spec]);
    let changes: [Change; 13] = [
        |s| s[1].ack = s[0].ack,
        |s| s[1].ack = s[0].ack.wrapping_sub(1),
        |s| s[1].ack = s[0].ack.wrapping_add((1 << 30) + 1),
        |s| s[1].seq += 1,
        |s| s[0].window = 0,
        |s| s[1].window = 0,
        |s| s[1].flags |= TCP_ECE,
        |s| s[0].flags |= TCP_ECE,
        |s| s[1].options = timestamps(1, 3),
        |s| s[1].hop_limit -= 1,
        |s| s[1].traffic_class = 3,
        |s| s[1].flags |= TCP_FIN,
        |s| {
            for spec in s {
                spec.options = vec![1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2];
            }
        },
    ];
    for (i, change) in changes.iter().enumerate() {
        let mut acks = [1000, 2000].map(|ack| Spec { ack, ..Spec::default() });
        assert_eq!(join(&built(&acks)), [2]);
        change(&mut acks);
        assert_eq!(join(&built(&acks)), [1, 1], "change {i}");
    }
    let mut acks = built(&[1000, 2000].map(|ack| Spec { ack, ..Spec::default() }));
    acks[1][36] ^= 1;
    assert_eq!(join(&acks), [1, 1], "a damaged one must not replace a good one");
}

#[test]
fn a_full_batch_and_a_place_outside_memory_are_refused() {
    let mut receive = Spec::default().build();
    let headers = parse(&receive).unwrap();
    let memory = Memory { receive: &mut receive, plain: &mut [] };
    let mut batch = TunBatch::new(1);
    assert_eq!(batch.push(Region::Plain, 0, &headers, &memory), Err(DropReason::Truncated));
    assert_eq!(batch.push(Region::Receive, 1, &headers, &memory), Err(DropReason::Truncated));
    assert_eq!(batch.push(Region::Receive, 0, &headers, &memory), Ok(false));
    assert_eq!(batch.push(Region::Receive, 0, &headers, &memory), Err(DropReason::NoBuffer));
}

#[test]
fn a_discarded_frame_is_not_written() {
    let mut receive = Spec::default().build();
    let headers = parse(&receive).unwrap();
    let mut memory = Memory { receive: &mut receive, plain: &mut [] };
    let mut batch = TunBatch::new(4);
    batch.push(Region::Receive, 0, &headers, &memory).unwrap();
    batch.push(Region::Receive, 0, &headers, &memory).unwrap();
    batch.discard(0);
    batch.discard(9);
    batch.finish(&mut memory);
    assert_eq!((batch.heads().count(), batch.frames().count()), (1, 1));
    assert!(batch.head(0).is_none());
}

/// What stays the same when packets are joined and cut again: all but an atomic packet's number.
fn lasting(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

fn flow(packet: &[u8]) -> (IpAddr, Option<(u16, u16)>, u8) {
    let headers = parse(packet).unwrap();
    (headers.source, headers.ports(), headers.protocol)
}

/// One step of a random conversation: which flow, what it sends.
type Step = (u16, u8, u16, bool);

/// Builds what `flows` senders, each in its own order, send.
fn conversation(steps: &[Step]) -> Vec<Vec<u8>> {
    let mut next: std::collections::HashMap<u16, (u32, u32, u16)> = std::collections::HashMap::new();
    let mut packets = Vec::new();
    for (i, &(flow, action, len, odd)) in steps.iter().enumerate() {
        let (seq, ack, id) = next.entry(flow).or_insert((u32::from(flow) << 20, 5, flow));
        let len = if odd { usize::from(len) } else { 200 };
        let udp = flow % 3 == 1;
        let mut spec = Spec {
            v6: flow % 2 == 1,
            udp,
            source_port: flow,
            dont_fragment: flow % 5 != 0,
            seq: *seq,
            ack: *ack,
            id: *id,
            payload: payload(len, i as u32),
            ..Spec::default()
        };
        match action {
            0..=5 => {}
            6 => spec.flags |= TCP_PSH,
            7 => spec.flags |= TCP_ECE,
            8 => spec.flags |= TCP_CWR,
            9 => spec.seq = spec.seq.wrapping_sub(300),
            10 => spec.window += 1,
            11 => spec.hop_limit = 9,
            12 => spec.flags = 0x02,
            _ if udp => {}
            _ => {
                spec.payload.clear();
                spec.ack = spec.ack.wrapping_add(if odd { 0 } else { 1448 });
            }
        }
        *ack = spec.ack;
        *seq = seq.wrapping_add(spec.payload.len() as u32);
        *id = id.wrapping_add(1);
        let mut packet = spec.build();
        if action == 5 && odd {
            let last = packet.len() - 1;
            packet[last] ^= 0x10;
        }
        packets.push(packet);
    }
    packets
}

fn steps(flows: u16) -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec((0..flows, 0u8..20, 1u16..300, proptest::bool::weighted(0.1)), 1..300)
}

proptest! {
    #[test]
    fn any_super_packet_survives(
        v6: bool, udp: bool, gso in 20u16..3000, count in 1usize..=64, last: u16, id: u16, seq: u32,
    ) {
        let len = (usize::from(gso) * (count - 1) + 1 + usize::from(last % gso)).min(65_000);
        let count = len.div_ceil(gso.into());
        let flags = if udp { 0 } else { TCP_ACK | TCP_PSH };
        let spec = Spec { v6, udp, id, seq, flags, payload: payload(len, seq), ..Spec::default() };
        let mut packet = spec.build();
        let vnet = owed(&mut packet, gso);
        let segments = cut(&Out { vnet, packet: packet.clone(), packets: 1 });
        let joined = run(ALL, &segments, |_| ());
        prop_assert_eq!(joined.len(), 1);
        prop_assert_eq!(usize::from(joined[0].packets), count);
        if count > 1 {
            prop_assert_eq!(&joined[0].packet, &packet);
            prop_assert_eq!(VnetHdr { hdr_len: 128, ..joined[0].vnet }, vnet);
        }
        prop_assert_eq!(cut(&joined[0]), segments);
    }

    #[test]
    fn every_flow_keeps_its_order_and_its_bytes(steps in prop_oneof![steps(3), steps(40), steps(2000)]) {
        let packets = conversation(&steps);
        let mut out: Vec<Vec<u8>> = run(JOIN, &packets, |_| ()).iter().flat_map(cut).collect();
        let mut sent = packets;
        // Stable: only the order inside a flow counts.
        out.sort_by_key(|packet| flow(packet));
        sent.sort_by_key(|packet| flow(packet));
        prop_assert_eq!(out.len(), sent.len());
        for (out, sent) in out.iter().zip(&sent) {
            prop_assert_eq!(lasting(out), lasting(sent));
        }
    }

    #[test]
    fn only_replaced_acknowledgements_are_missing(steps in steps(6)) {
        let packets = conversation(&steps);
        let mut out: Vec<Vec<u8>> = run(ALL, &packets, |_| ()).iter().flat_map(cut).collect();
        let mut sent = packets;
        out.sort_by_key(|packet| flow(packet));
        sent.sort_by_key(|packet| flow(packet));
        let mut out = out.iter().peekable();
        let mut missing = 0;
        for (i, packet) in sent.iter().enumerate() {
            if out.peek().is_some_and(|out| lasting(out) == lasting(packet)) {
                out.next();
                missing = 0;
                continue;
            }
            missing += 1;
            prop_assert!(missing < MAX_ACKS);
            let (this, next) = (parse(packet).unwrap(), &sent[i + 1]);
            prop_assert_eq!(this.total_len as usize, this.payload_offset());
            prop_assert_eq!(tcp_flags(&this), TCP_ACK);
            prop_assert_eq!(flow(packet), flow(next));
            let next_headers = parse(next).unwrap();
            prop_assert_eq!(next_headers.total_len as usize, next_headers.payload_offset());
            prop_assert!(be32(next, &next_headers, 8) > be32(packet, &this, 8));
        }
        prop_assert_eq!(out.next(), None);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 60..400),
        shapes in proptest::collection::vec((0u8..6, 0usize..300, 0u16..120), 1..40),
        tcp: bool, udp: bool, acks: bool,
    ) {
        let mut batch = TunBatch::new(30);
        batch.set_offloads(Offloads { tcp, udp, acks });
        for (shape, at, len) in shapes {
            // Now and then something that gets past the first look.
            let Some(ip) = bytes.get_mut(at..) else { continue };
            match (shape, ip.len()) {
                (0..=2, 20..) => {
                    ip[..4].copy_from_slice(&[0x45, 0, 0, len as u8]);
                    ip[6..10].copy_from_slice(&[0x40, 0, 9, [6, 17, 1][usize::from(shape)]]);
                }
                (3..=4, 40..) => {
                    ip[..4].copy_from_slice(&[0x60, 0, 0, 0]);
                    ip[4..8].copy_from_slice(&[0, len as u8, [6, 17][usize::from(shape) - 3], 9]);
                }
                (_, _) => {}
            }
            let Ok(headers) = parse(ip) else { continue };
            let memory = Memory { receive: &mut bytes, plain: &mut [] };
            let _ = batch.push(Region::Receive, at as u32, &headers, &memory);
        }
        let mut memory = Memory { receive: &mut bytes, plain: &mut [] };
        batch.finish(&mut memory);
        let mut out = [0; 2000];
        for frame in batch.frames() {
            frame.gather(&memory, &mut out);
        }
    }
}
