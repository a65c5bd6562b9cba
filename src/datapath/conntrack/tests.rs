//! The table against a simple model, under floods, between threads, and after a kill.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::snapshot::PeerId;

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
const SEED: Seed = Seed(1, 2);
/// Some time after boot, milliseconds.
const T0: u64 = 1_000_000;

fn table(capacity: u32) -> FlowTable {
    FlowTable::in_memory(capacity, SEED).unwrap()
}

fn key(protocol: u8, n: u32) -> FlowKey {
    let [a, b, c, d] = n.to_be_bytes();
    FlowKey {
        source: IpAddr::from([10, 1 + a, b, c]),
        destination: [10, 244, 2, 7].into(),
        source_port: 1024 + u16::from(d),
        destination_port: 80,
        protocol,
    }
}

fn sighting(key: FlowKey, tcp_flags: u8) -> Sighting {
    Sighting {
        key,
        from_peer: false,
        peer: Some(PeerId(3)),
        lane: 1,
        tcp_flags,
        packets: 2,
        bytes: 100,
        owner: 0,
    }
}

/// A whole handshake.
fn establish(table: &FlowTable, now: u64, key: FlowKey) -> FlowRef {
    table.track(now, &sighting(key, SYN)).unwrap();
    table.track(now, &sighting(key.reversed(), SYN_ACK)).unwrap();
    let tracked = table.track(now, &sighting(key, ACK)).unwrap();
    assert_eq!(tracked.state, FlowState::Established);
    tracked.flow
}

fn all(table: &FlowTable, now: u64) -> Vec<FlowRecord> {
    let (mut records, mut from) = (Vec::new(), Some(0));
    while let Some(place) = from {
        from = table.page(now, place, 100, &mut records);
    }
    records
}

fn shared(words: usize) -> &'static [AtomicU64] {
    Box::leak(std::iter::repeat_with(AtomicU64::default).take(words).collect::<Box<[_]>>())
}

#[test]
fn both_directions_are_one_flow() {
    let table = table(64);
    let opened = table.track(T0, &sighting(key(17, 1), 0)).unwrap();
    assert!(opened.new);
    let mut answer = sighting(key(17, 1).reversed(), 0);
    answer.lane = 2;
    let answered = table.track(T0 + 5, &answer).unwrap();
    assert_eq!((answered.flow, answered.new), (opened.flow, false));
    assert_eq!((answered.direction, answered.state), (Direction::Reply, FlowState::Replied));
    assert_eq!(answered.peer, Some(PeerId(3)));

    let record = table.record(opened.flow).unwrap();
    assert_eq!((record.original, record.reply), (key(17, 1), key(17, 1).reversed()));
    assert_eq!((record.packets, record.bytes), ([2, 2], [100, 100]));
    assert_eq!((record.lane, record.seen, record.created), (2, T0 + 5, 1000));
    assert_eq!((record.replied, record.from_peer, record.target), (true, false, None));
    assert_eq!(record.expires, T0 + 5 + 30_000);
    assert_eq!(all(&table, T0), vec![record]);
    assert_eq!(table.counters().entries, 1);

    assert!(table.remove(opened.flow));
    assert!(!table.remove(opened.flow));
    assert_eq!(table.record(opened.flow), None);
    assert_eq!(table.counters().entries, 0);
}

#[test]
fn ipv6_is_not_mapped_ipv4() {
    let table = table(64);
    let v4 = key(17, 1);
    let mut v6 = v4;
    for address in [&mut v6.source, &mut v6.destination] {
        if let IpAddr::V4(a) = *address {
            *address = a.to_ipv6_mapped().into();
        }
    }
    assert!(table.track(T0, &sighting(v4, 0)).unwrap().new);
    assert!(table.track(T0, &sighting(v6, 0)).unwrap().new);
    assert_eq!(all(&table, T0).len(), 2);
}

#[test]
fn silence_ends_a_flow() {
    let table = table(64);
    let udp = sighting(key(17, 1), 0);
    let first = table.track(T0, &udp).unwrap().flow;
    assert_eq!(table.track(T0 + 29_999, &udp).unwrap().flow, first);
    let second = table.track(T0 + 60_000, &udp).unwrap();
    assert!(second.new && second.flow != first);
    assert_eq!(table.counters().expired, 1);

    // Answered for seconds: a stream, which may be silent for longer.
    let back = sighting(key(17, 1).reversed(), 0);
    assert_eq!(table.track(T0 + 60_001, &back).unwrap().state, FlowState::Replied);
    assert_eq!(table.track(T0 + 63_001, &udp).unwrap().state, FlowState::Stream);
    assert!(!table.track(T0 + 63_001 + 119_999, &udp).unwrap().new);

    let tcp = establish(&table, T0, key(6, 2));
    table.sweep(T0 + 400_000_000, 64);
    assert_eq!(all(&table, T0 + 400_000_000).len(), 1);
    table.sweep(T0 + 432_000_000, 64);
    assert_eq!((table.record(tcp), table.counters().entries), (None, 0));
}

#[test]
fn a_flow_opened_by_its_answer_keeps_its_sides() {
    let table = table(64);
    let mut answer = sighting(key(6, 1).reversed(), SYN_ACK);
    answer.from_peer = true;
    let tracked = table.track(T0, &answer).unwrap();
    assert_eq!((tracked.direction, tracked.state), (Direction::Reply, FlowState::SynRecv));
    let record = table.record(tracked.flow).unwrap();
    assert_eq!((record.original, record.from_peer), (key(6, 1), false));
    assert_eq!((record.packets, record.bytes), ([0, 2], [0, 100]));
}

#[test]
fn invalid_tcp_makes_no_flow_and_harms_none() {
    let table = table(64);
    for flags in [0, SYN | 1, RST, 0x11] {
        assert_eq!(
            table.track(T0, &sighting(key(6, 1), flags)),
            Err(Untracked::Invalid { translated: false })
        );
    }
    let flow = establish(&table, T0, key(6, 1));
    let before = table.record(flow);
    assert_eq!(table.track(T0, &sighting(key(6, 1), SYN | 1)), Err(Untracked::Invalid { translated: false }));
    assert_eq!(table.record(flow), before);
    assert_eq!(table.counters().invalid, 5);
    // A repeated SYN passes but does not keep a flow alive.
    table.track(T0 + 10, &sighting(key(6, 1), SYN)).unwrap();
    assert_eq!(table.record(flow).unwrap().seen, T0);
}

#[test]
fn ports_are_used_again() {
    let table = table(64);
    let flow = establish(&table, T0, key(6, 1));
    table.track(T0, &sighting(key(6, 1), RST)).unwrap();
    let again = table.track(T0 + 1, &sighting(key(6, 1), SYN)).unwrap();
    assert!(again.new && again.flow != flow);
    assert_eq!((again.state, table.counters().entries), (FlowState::SynSent, 1));
}

/// Client 10.1.0.1 to the Service 10.96.0.1:80, endpoint 10.244.2.7:8080.
fn service() -> (FlowKey, Translation) {
    let client = FlowKey { destination: [10, 96, 0, 1].into(), ..key(6, 0x100) };
    let reply = FlowKey {
        source: [10, 244, 2, 7].into(),
        destination: client.source,
        source_port: 8080,
        destination_port: client.source_port,
        protocol: 6,
    };
    (client, Translation { reply, service: 11, endpoint: 12 })
}

#[test]
fn a_translated_flow_is_found_from_both_sides() {
    let table = table(64);
    let (client, translation) = service();
    let opened = table.insert(T0, &sighting(client, SYN), Some(&translation)).unwrap();
    let there = Rewrite { to: translation.reply.reversed(), service: 11, endpoint: 12 };
    assert_eq!(opened.rewrite, Some(there));
    let answer = table.track(T0, &sighting(translation.reply, SYN_ACK)).unwrap();
    assert_eq!((answer.flow, answer.direction), (opened.flow, Direction::Reply));
    assert_eq!(answer.rewrite, Some(Rewrite { to: client.reversed(), ..there }));
    let ack = table.track(T0, &sighting(client, ACK)).unwrap();
    assert_eq!((ack.rewrite, ack.state), (Some(there), FlowState::Established));
    assert_eq!(table.record(opened.flow).unwrap().target, Some((11, 12)));

    // The Service's own address answers nothing: the reply key is another one.
    let stranger = table.lookup(T0, &sighting(client.reversed(), ACK)).unwrap();
    assert_eq!(stranger, None);
    // Removal takes both slots.
    assert!(table.remove(opened.flow));
    for key in [client, translation.reply] {
        assert_eq!(table.lookup(T0, &sighting(key, ACK)), Ok(None));
    }
}

#[test]
fn translations_never_share_a_reply() {
    let table = table(64);
    let (client, translation) = service();
    // A direct connection to the same endpoint from the same port is there first.
    table.track(T0, &sighting(translation.reply.reversed(), SYN)).unwrap();
    let refused = table.insert(T0, &sighting(client, SYN), Some(&translation));
    assert_eq!(refused, Err(Untracked::Taken));
    let mut moved = translation;
    moved.reply.destination_port += 1;
    table.insert(T0, &sighting(client, SYN), Some(&moved)).unwrap();
    // The same Service connection a second time.
    assert_eq!(table.insert(T0, &sighting(client, SYN), Some(&translation)), Err(Untracked::Taken));
    // Only a SYN may choose an endpoint.
    let late = FlowKey { source_port: 9, ..client };
    assert_eq!(
        table.insert(T0, &sighting(late, ACK), Some(&moved)),
        Err(Untracked::Invalid { translated: true })
    );
    assert_eq!(table.counters().entries, 2);

    // Once the direct connection is forgotten its key is free, swept or not.
    let again = FlowKey { source_port: 10, ..client };
    let much_later = T0 + 500_000_000;
    table.insert(much_later, &sighting(again, SYN), Some(&translation)).unwrap();
    assert_eq!(table.counters().expired, 1);
}

#[test]
fn one_pod_fills_no_more_than_its_share() {
    let table = table(1024);
    let from = |n: u16, owner| Sighting { owner, ..sighting(key(17, u32::from(n) | 0x0100_0000), 0) };
    let kept = establish(&table, T0, key(6, 1));
    let results: Vec<_> = (0..2000).map(|n| table.track(T0, &from(n, 7))).collect();
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 256);
    assert_eq!(results.last(), Some(&Err(Untracked::Quota)));
    assert_eq!((table.owned_by(7), table.owned_by(8)), (256, 0));
    assert!(table.track(T0, &from(5000, 8)).is_ok() && table.record(kept).is_some());
    // What it has goes on, and what expires makes room.
    assert!(table.track(T0, &from(0, 7)).is_ok());
    let later = T0 + 31_000;
    while table.sweep(later, 1024) > 0 {}
    assert_eq!(table.owned_by(7), 0);
    assert!(table.track(later, &from(9000, 7)).is_ok());
}

#[test]
fn a_flood_leaves_established_flows_alone() {
    let table = table(8192);
    let mut now = T0;
    let kept: Vec<FlowRef> = (0..2000).map(|n| establish(&table, now, key(6, n))).collect();
    // SYNs that nobody answers, bare ACKs that look like open connections, and UDP.
    for n in 0..200_000u32 {
        now += u64::from(n % 8 == 0);
        let (protocol, flags) = [(6, SYN), (6, ACK), (17, 0)][n as usize % 3];
        table.track(now, &sighting(key(protocol, 0x0100_0000 + n), flags)).unwrap();
    }
    for flow in &kept {
        assert!(table.record(*flow).is_some());
    }
    let counters = table.counters();
    assert!(counters.evicted > 190_000 - 8192, "{counters:?}");
    assert!(counters.entries <= counters.capacity);
    // A newcomer still gets in and can be answered.
    establish(&table, now, key(6, 0x0200_0000));
}

#[test]
fn a_table_full_of_open_flows_refuses_newcomers_until_some_are_idle() {
    let table = table(256);
    let mut open = 0;
    for n in 0..256 {
        let syn = table.track(T0, &sighting(key(6, n), SYN));
        if syn.is_ok() {
            table.track(T0, &sighting(key(6, n).reversed(), SYN_ACK)).unwrap();
            table.track(T0, &sighting(key(6, n), ACK)).unwrap();
            open += 1;
        }
    }
    assert_eq!(open, 256);
    assert_eq!(table.track(T0, &sighting(key(6, 999), SYN)), Err(Untracked::Full));
    assert_eq!((table.counters().entries, table.counters().full), (256, 1));
    table.track(T0 + IDLE_ENOUGH, &sighting(key(6, 999), SYN)).unwrap();
    assert_eq!((table.counters().entries, table.counters().evicted), (256, 1));
}

#[test]
fn the_sweeper_gets_round_within_its_budget() {
    let table = table(1024);
    for n in 0..1000 {
        table.track(T0, &sighting(key(17, n), 0)).unwrap();
    }
    assert_eq!(table.sweep(T0 + 29_999, 1024), 0);
    let swept: u32 = (0..16).map(|_| table.sweep(T0 + 30_000, 64)).sum();
    assert_eq!((swept, table.counters().entries, table.counters().expired), (1000, 0, 1000));
    // And everything can be used again.
    for n in 0..1000 {
        table.track(T0 + 30_000, &sighting(key(17, n), 0)).unwrap();
    }
    assert_eq!((table.counters().entries, table.counters().evicted), (1000, 0));
}

#[test]
fn flows_outlive_the_process() {
    let memory = shared(FlowTable::words_for(10_000));
    let create = || FlowTable::create(FlowMemory::Shared(memory), 10_000, 5, SEED, Timeouts::KERNEL).unwrap();
    let attach = |now, epoch, seed| {
        FlowTable::attach(FlowMemory::Shared(memory), now, epoch, Seed(seed, 0), Timeouts::KERNEL)
    };
    let before = create();
    let mut flows: Vec<FlowRef> = (0..900).map(|n| establish(&before, T0, key(6, n))).collect();
    let (client, translation) = service();
    flows.push(before.insert(T0, &sighting(client, SYN), Some(&translation)).unwrap().flow);
    for n in 0..100 {
        before.track(T0, &sighting(key(17, n), 0)).unwrap();
    }
    let gone = flows.remove(0);
    before.remove(gone);
    let records: Vec<_> = flows.iter().map(|flow| before.record(*flow)).collect();
    // Killed while it writes one entry, frees another and holds a bucket's lock.
    for flow in flows.drain(..2) {
        before.slab.entry(flow.index).unwrap()[entry::SEQUENCE].fetch_add(1, Ordering::Relaxed);
    }
    for bucket in 0..50 {
        before.slab.bucket(bucket).0.store(1, Ordering::Relaxed);
    }
    drop(before);

    // 40 seconds later, with another seed: TCP is there as it was, UDP has expired.
    let after = attach(T0 + 40_000, 5, 99).unwrap();
    let found: Vec<_> = flows.iter().map(|flow| after.record(*flow)).collect();
    assert_eq!(found, records[2..]);
    assert_eq!((after.counters().entries, after.counters().recovered), (flows.len() as u64, 2));
    for n in 3..900 {
        assert!(!after.track(T0 + 40_000, &sighting(key(6, n), ACK)).unwrap().new);
    }
    let answer = after.track(T0 + 40_000, &sighting(translation.reply, SYN_ACK)).unwrap();
    assert_eq!(answer.rewrite.unwrap().to, client.reversed());
    // Everything else is free: the table can be filled.
    for n in 0..8000 {
        after.track(T0 + 40_000, &sighting(key(17, n), 0)).unwrap();
    }
    assert_eq!(after.counters().evicted, 0);
    drop(after);

    // Flows from the future are of another boot; so is another epoch.
    assert_eq!(attach(T0, 5, 1).unwrap().counters().entries, 0);
    assert_eq!(attach(T0, 6, 1).unwrap_err(), AttachError::OtherBoot);
}

#[test]
fn foreign_memory_is_refused() {
    let attach = |memory: &'static [AtomicU64]| {
        FlowTable::attach(FlowMemory::Shared(memory), T0, 0, SEED, Timeouts::KERNEL).unwrap_err()
    };
    assert!(matches!(attach(shared(3)), AttachError::TooSmall { .. }));
    assert_eq!(attach(shared(4096)), AttachError::NoTable);

    let words = FlowTable::words_for(64);
    let memory = shared(words);
    let small = FlowTable::create(FlowMemory::Shared(&memory[..words - 1]), 64, 0, SEED, Timeouts::KERNEL);
    assert!(matches!(small, Err(AttachError::TooSmall { .. })));
    FlowTable::create(FlowMemory::Shared(memory), 64, 0, SEED, Timeouts::KERNEL).unwrap();
    assert!(matches!(attach(&memory[..words - 1]), AttachError::TooSmall { .. }));
    memory[head::PER_SHARD].store(u64::MAX, Ordering::Relaxed);
    assert_eq!(attach(memory), AttachError::Damaged);
    memory[head::VERSION].store(7, Ordering::Relaxed);
    assert_eq!(attach(memory), AttachError::Version { found: 7 });
}

#[test]
fn two_lanes_share_the_table() {
    const FLOWS: u32 = 2000;
    let table = table(16_384);
    let tracked: u64 = std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..2u32)
            .map(|lane| {
                let table = &table;
                scope.spawn(move || {
                    let mut tracked = 0;
                    for n in 0..100_000u32 {
                        let key = key(17, n.wrapping_mul(7919 + lane * 2) % FLOWS);
                        let key = if n % 3 == 0 { key.reversed() } else { key };
                        tracked += u64::from(table.track(T0, &sighting(key, 0)).is_ok());
                    }
                    tracked
                })
            })
            .collect();
        lanes.into_iter().map(|lane| lane.join().unwrap()).sum()
    });
    let records = all(&table, T0);
    let keys: std::collections::HashSet<_> = records.iter().map(|r| r.original.source).collect();
    assert_eq!(records.len(), FLOWS as usize, "{:?}", table.counters());
    assert!(!keys.is_empty());
    let packets: u64 = records.iter().flat_map(|r| r.packets).map(u64::from).sum();
    let bytes: u64 = records.iter().flat_map(|r| r.bytes).sum();
    assert_eq!((packets, bytes), (2 * tracked, 100 * tracked));
    assert!(table.counters().busy < 2000, "{:?}", table.counters());
}

#[test]
fn lanes_that_fight_over_a_full_table_lose_no_entry() {
    let table = table(256);
    let barrier = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        for lane in 0..2u32 {
            let (table, barrier) = (&table, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for n in 0..60_000u32 {
                    let now = T0 + u64::from(n);
                    let key = key(17, n.wrapping_mul(2_654_435_761 + lane) % 1500);
                    let mut expected = key.reversed();
                    let packet = sighting(key, 0);
                    // Every seventh destination is a Service.
                    let tracked = if key.source_port.is_multiple_of(7) {
                        expected.source = [10, 244, 3, 3].into();
                        let translation = Translation { reply: expected, service: 1, endpoint: 2 };
                        match table.lookup(now, &packet) {
                            Ok(None) => table.insert(now, &packet, Some(&translation)),
                            found => found.map(|found| found.unwrap()),
                        }
                    } else {
                        table.track(now, &packet)
                    };
                    if let Ok(tracked) = tracked {
                        if n % 5 == 0 {
                            table.remove(tracked.flow);
                        }
                        if let Some(record) = table.record(tracked.flow) {
                            assert_eq!((record.original, record.reply), (key, expected));
                        }
                        if let Some(rewrite) = tracked.rewrite {
                            assert_eq!(rewrite.to, expected.reversed());
                        }
                    }
                    if n % 64 == 0 {
                        table.sweep(now, 16);
                    }
                }
            });
        }
    });
    let end = T0 + 60_000;
    let records = all(&table, 0);
    let keys: std::collections::HashSet<_> = records.iter().map(|r| r.original).collect();
    assert_eq!(keys.len(), records.len(), "a flow is in twice");
    assert_eq!(table.counters().entries, records.len() as u64);
    table.sweep(end + 1_000_000, 256);
    assert_eq!((all(&table, 0).len(), table.counters().entries), (0, 0));
    // No slot may be left behind, and all entries are free again.
    for bucket in 0..table.slab.layout().buckets {
        assert!(table.slab.bucket(bucket).1.iter().all(|slot| slot.load(Ordering::Relaxed) == 0));
    }
    let mut seen = std::collections::HashSet::new();
    while let Some(index) = table.slab.take(0) {
        assert!(seen.insert(index));
    }
    assert_eq!(seen.len(), 256);
}

// --- the model -----------------------------------------------------------------------------------

/// What a flow is, in the plainest form.
#[derive(Clone, Debug)]
struct Model {
    original: FlowKey,
    state: FlowState,
    replied: bool,
    seen: u64,
    created: u64,
    packets: [u32; 2],
    bytes: [u64; 2],
}

#[derive(Clone, Debug)]
enum Action {
    Track { flow: u32, protocol: u8, back: bool, flags: u8, wait: u64 },
    Sweep { budget: u32 },
    Remove { nth: usize },
}

fn action() -> impl Strategy<Value = Action> {
    let flags = prop_oneof![
        8 => prop::sample::select(vec![SYN, SYN_ACK, ACK, ACK, ACK | 8, 0x11, RST, RST | ACK]),
        1 => any::<u8>(),
    ];
    let wait = prop_oneof![6 => 0u64..2_000, 2 => 2_000u64..70_000, 1 => 70_000u64..500_000];
    prop_oneof![
        20 => (0u32..6, prop::sample::select(vec![6u8, 6, 6, 17, 17, 1, 132, 50]), any::<bool>(), flags, wait)
            .prop_map(|(flow, protocol, back, flags, wait)| Action::Track { flow, protocol, back, flags, wait }),
        2 => (1u32..200).prop_map(|budget| Action::Sweep { budget }),
        1 => (0usize..8).prop_map(|nth| Action::Remove { nth }),
    ]
}

fn model_track(flows: &mut HashMap<FlowKey, Model>, now: u64, packet: &Sighting) -> Result<bool, Untracked> {
    let life = |m: &Model| m.seen + Timeouts::KERNEL.of(m.state, m.original.protocol, m.replied);
    flows.retain(|_, m| life(m) > now);
    let tcp = packet.key.protocol == 6;
    let known = [packet.key, packet.key.reversed()].into_iter().find(|key| flows.contains_key(key));
    if let Some(original) = known {
        let m = flows.get_mut(&original).unwrap();
        let direction = if original == packet.key { Direction::Original } else { Direction::Reply };
        let back = direction == Direction::Reply;
        let step = if tcp {
            state::tcp_step(m.state, direction, packet.tcp_flags)
        } else if m.replied && packet.key.protocol == 17 && now / 1000 - m.created >= 3 {
            Step::To(FlowState::Stream)
        } else if m.replied || back {
            Step::To(FlowState::Replied)
        } else {
            Step::To(FlowState::Unreplied)
        };
        match step {
            Step::Invalid => return Err(Untracked::Invalid { translated: false }),
            Step::Restart => {
                flows.remove(&original);
            }
            Step::Ignore | Step::To(_) => {
                if let Step::To(state) = step {
                    (m.state, m.seen, m.replied) = (state, now, m.replied || back);
                }
                m.packets[usize::from(back)] += packet.packets;
                m.bytes[usize::from(back)] += packet.bytes;
                return Ok(false);
            }
        }
    }
    let opening = if tcp {
        state::tcp_open(packet.tcp_flags).ok_or(Untracked::Invalid { translated: false })?
    } else {
        state::Opening { state: FlowState::Unreplied, direction: Direction::Original }
    };
    let back = opening.direction == Direction::Reply;
    let original = if back { packet.key.reversed() } else { packet.key };
    let (mut packets, mut bytes) = ([0; 2], [0; 2]);
    (packets[usize::from(back)], bytes[usize::from(back)]) = (packet.packets, packet.bytes);
    let created = now / 1000;
    let new = Model { original, state: opening.state, replied: back, seen: now, created, packets, bytes };
    flows.insert(original, new);
    Ok(true)
}

proptest! {
    #[test]
    fn the_table_agrees_with_the_model(
        actions in prop::collection::vec(action(), 1..120),
        seed: (u64, u64),
    ) {
        let memory = shared(FlowTable::words_for(128));
        let seed = Seed(seed.0, seed.1);
        let mut table =
            FlowTable::create(FlowMemory::Shared(memory), 128, 0, seed, Timeouts::KERNEL).unwrap();
        let mut flows = HashMap::new();
        let mut now = T0;
        for (n, action) in actions.into_iter().enumerate() {
            match action {
                Action::Track { flow, protocol, back, flags, wait } => {
                    now += wait;
                    let key = key(protocol, flow);
                    let packet = sighting(if back { key.reversed() } else { key }, flags);
                    let expected = model_track(&mut flows, now, &packet);
                    let result = table.track(now, &packet);
                    prop_assert_eq!(result.map(|t| t.new), expected);
                }
                Action::Sweep { budget } => { table.sweep(now, budget); }
                Action::Remove { nth } => {
                    if let Some(record) = all(&table, now).get(nth) {
                        prop_assert!(table.remove(record.flow));
                        flows.remove(&record.original);
                    }
                }
            }
            // Now and then the process is replaced.
            if n % 40 == 39 {
                table = FlowTable::attach(
                    FlowMemory::Shared(memory), now, 0, Seed(n as u64, 7), Timeouts::KERNEL,
                ).unwrap();
            }
            let life = |m: &Model| m.seen + Timeouts::KERNEL.of(m.state, m.original.protocol, m.replied);
            flows.retain(|_, m| life(m) > now);
            let records = all(&table, now);
            prop_assert_eq!(records.len(), flows.len());
            for r in records {
                let m = &flows[&r.original];
                prop_assert_eq!((r.state, r.replied, r.seen), (m.state, m.replied, m.seen));
                prop_assert_eq!((r.packets, r.bytes, r.expires), (m.packets, m.bytes, life(m)));
            }
        }
    }

    /// Whatever a damaged file holds, attaching it and using it neither panics nor hangs.
    #[test]
    fn damaged_memory_never_panics(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 0..60),
    ) {
        let words = FlowTable::words_for(64);
        let memory = shared(words);
        let make = || FlowTable::create(FlowMemory::Shared(memory), 64, 0, SEED, Timeouts::KERNEL);
        let table = make().unwrap();
        for n in 0..60 {
            let _ = table.track(T0, &sighting(key(17, n), 0));
        }
        for (at, value) in damage {
            // The header's checksum has its own test; here everything behind it is hit.
            memory[head::CHECKSUM + 1 + at.index(words - head::CHECKSUM - 1)].store(value, Ordering::Relaxed);
        }
        let table = FlowTable::attach(FlowMemory::Shared(memory), T0, 0, SEED, Timeouts::KERNEL).unwrap();
        for n in 0..200 {
            let _ = table.track(T0, &sighting(key(17, n), 0));
        }
        let records = all(&table, T0);
        prop_assert!(records.len() <= 64);
        table.sweep(T0 + 1_000_000_000_000, 64);
        prop_assert_eq!(table.counters().entries, 0);
    }
}
