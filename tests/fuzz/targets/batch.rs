//! Runs of packets through the TUN batch: what is joined and cut again is what was put in.

use std::collections::BTreeMap;
use std::net::IpAddr;

use warren::packet::coalesce::{Memory, Offloads, Region, TunBatch};
use warren::packet::segment::SuperPacket;
use warren::packet::vnet::VnetHdr;
use warren::packet::{Headers, checksum, parse};

use super::Reader;
use super::build::Builder;

/// Who speaks to whom: packets of one flow keep their order.
type Flow = (IpAddr, IpAddr, u8, Option<(u16, u16)>);

pub(crate) fn run(data: &[u8]) {
    let mut input = Reader::new(data);
    let switches = input.byte();
    let offloads = Offloads { tcp: switches & 1 != 0, udp: switches & 2 != 0, acks: switches & 4 != 0 };
    let mut batch = TunBatch::new(96);
    batch.set_offloads(offloads);
    let mut builder = Builder::new();
    let (mut receive, mut plain) = (Vec::new(), Vec::new());
    let mut given: BTreeMap<Flow, Vec<Vec<u8>>> = BTreeMap::new();
    while !input.is_empty() && plain.len() + receive.len() < 400_000 {
        let in_plain = input.byte() & 1 == 0;
        let packet = builder.packet(&mut input, 1500);
        let Ok(headers) = parse(&packet) else { continue };
        let (region, room) =
            if in_plain { (Region::Plain, &mut plain) } else { (Region::Receive, &mut receive) };
        let offset = room.len() as u32;
        room.extend_from_slice(&packet);
        let full = batch.free() == 0;
        let memory = &Memory { receive: &mut receive, plain: &mut plain };
        let pushed = batch.push(region, offset, &headers, memory);
        assert_eq!(pushed.is_err(), full);
        if pushed.is_ok() {
            given.entry(flow(&headers)).or_default().push(normal(&packet[..headers.total_len as usize]));
        }
    }
    let heads: usize = batch.heads().map(|head| usize::from(head.packets)).sum();
    assert_eq!(heads, given.values().map(Vec::len).sum::<usize>(), "every packet is in one frame");
    let mut memory = Memory { receive: &mut receive, plain: &mut plain };
    batch.finish(&mut memory);
    let taken = cut_again(&batch, &memory);
    if offloads.acks {
        let count = |all: &BTreeMap<Flow, Vec<Vec<u8>>>| all.values().map(Vec::len).sum::<usize>();
        assert!(count(&taken) <= count(&given));
        assert!(taken.keys().eq(given.keys()), "no flow loses everything");
    } else {
        assert_eq!(taken, given, "what is cut again is what was joined");
    }
}

fn cut_again(batch: &TunBatch, memory: &Memory<'_>) -> BTreeMap<Flow, Vec<Vec<u8>>> {
    let mut out: BTreeMap<Flow, Vec<Vec<u8>>> = BTreeMap::new();
    let mut room = vec![0; 70_000];
    for frame in batch.frames() {
        let len = frame.gather(memory, &mut room);
        assert_eq!(len, frame.len());
        assert!(len <= 65_575, "the kernel takes no longer frame");
        let (vnet, _) = VnetHdr::decode(&frame.vnet).expect("our own header");
        let headers = parse(&room[..len]).expect("our own frame");
        let segments = SuperPacket::new(&vnet, &room[..len], &headers).expect("our own frame can be cut");
        for i in 0..segments.count() {
            let mut packet = vec![0; segments.len(i)];
            assert_eq!(segments.write(i, &mut packet), packet.len());
            out.entry(flow(&headers)).or_default().push(normal(&packet));
        }
    }
    out
}

fn flow(headers: &Headers) -> Flow {
    (headers.source, headers.destination, headers.protocol, headers.ports())
}

/// An identification that means nothing (RFC 6864: the packet may not be fragmented) may change on the way.
fn normal(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 && checksum::verify_ipv4_header(&packet) {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}
