//! Parts of the packet line, timed by criterion, each as a lane calls it.
//!
//! ```text
//! bench/micro                     all of them: a few minutes
//! bench/micro seal                those whose name has `seal` in it
//! bench/micro --test              each once, untimed: whether they work
//! ```

pub mod pair;

use std::hint::black_box;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use etherparse::PacketBuilder;
use pair::{CLIENT, Carriage, ENDPOINT, Heading, Load, Pair, SERVICE, super_packet};
use warren::datapath::conntrack::{FlowKey, FlowTable, Seed, Sighting};
use warren::packet::coalesce::{Memory, Offloads, Region, TunBatch};
use warren::packet::rewrite::{ChecksumState, Rewrite, rewrite};
use warren::packet::segment::SuperPacket;
use warren::packet::vnet::{VNET_HDR_LEN, VnetHdr};
use warren::packet::{checksum, parse};
use warren::snapshot::service::{
    Endpoint, Frontend, Known, Listen, Protocol, ServicePort, ServiceTable, Way,
};
use warren::snapshot::{Encap, LaneId, Mesh, Owner, PeerId, RouteTable};
use warren::tunnel::TxBatch;
use warren::tunnel::wireguard::{Opened, WireGuard};
use x25519_dalek::StaticSecret;

/// Flows in the table that is looked into.
const FLOWS: u32 = 100_000;
/// Nodes, each with a pod range and an address.
const NODES: u32 = 1_000;
/// Services, each with a ClusterIP and ten endpoints.
const SERVICES: u32 = 10_000;

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    targets = headers, tables, crypto, segments, bursts
}
criterion_main!(benches);

// --- parse, checksum, rewrite --------------------------------------------------------------------

fn headers(c: &mut Criterion) {
    let mut group = c.benchmark_group("headers");
    for (name, packet) in [("parse/tcp-ipv4", tcp(1380)), ("parse/udp-ipv6", udp_v6(64))] {
        group.bench_function(name, |b| b.iter(|| parse(black_box(&packet))));
    }
    for (name, payload) in [("rewrite/40", 0), ("rewrite/1420", 1380)] {
        let mut packet = tcp(payload);
        let mut headers = parse(&packet).expect("a packet");
        // There and back, so that the packet stays the same.
        let there = Rewrite { destination: Some((SERVICE.0.into(), Some(SERVICE.1))), source: None };
        let back = Rewrite { destination: Some((ENDPOINT.0.into(), Some(ENDPOINT.1))), source: None };
        group.bench_function(name, |b| {
            b.iter(|| {
                for change in [&there, &back] {
                    rewrite(black_box(&mut packet), &mut headers, change, ChecksumState::Complete)
                        .expect("rewritten");
                }
            });
        });
    }
    for len in [64, 1420] {
        let bytes = vec![7; len];
        group.bench_function(format!("checksum/{len}"), |b| b.iter(|| checksum::sum(black_box(&bytes))));
    }
    group.finish();
}

// --- flows, routes, Services ---------------------------------------------------------------------

fn tables(c: &mut Criterion) {
    let mut group = c.benchmark_group("tables");
    flows(&mut group);
    let routes = routes();
    let mut addresses = (0..).map(|n: u32| pod(n.wrapping_mul(7_919) % NODES, n));
    group.bench_function("route/1000-nodes", |b| {
        b.iter_batched(
            || addresses.next().expect("endless"),
            |address| routes.lookup(black_box(address)),
            BatchSize::SmallInput,
        );
    });
    let services = services();
    let mut listens = (0..).map(|n: u32| listen(n.wrapping_mul(7_919) % SERVICES));
    group.bench_function("service/10000-services", |b| {
        b.iter_batched(
            || listens.next().expect("endless"),
            |at| services.frontend(black_box(&at)).is_some(),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn flows(group: &mut BenchmarkGroup<'_, WallTime>) {
    let table = FlowTable::in_memory(1 << 18, Seed(1, 2)).expect("a table");
    for number in 0..FLOWS {
        table.insert(0, &sighting(number), None).expect("room for a flow");
    }
    for (name, first) in [("flow/hit-of-100000", 0), ("flow/miss", FLOWS)] {
        let mut sightings = (0..).map(|n: u32| sighting(first + n.wrapping_mul(7_919) % FLOWS));
        group.bench_function(name, |b| {
            b.iter_batched(
                || sightings.next().expect("endless"),
                |sighting| table.lookup(1, black_box(&sighting)).expect("no other lane").is_some(),
                BatchSize::SmallInput,
            );
        });
    }
}

fn sighting(number: u32) -> Sighting {
    let key = FlowKey {
        source: IpAddr::from([10, 244, 0, 10]),
        destination: pod(number / 50_000, number),
        source_port: (number % 50_000) as u16,
        destination_port: 8080,
        protocol: 17,
    };
    Sighting { key, from_peer: false, peer: None, lane: 0, tcp_flags: 0, packets: 1, bytes: 100, owner: 0 }
}

fn pod(node: u32, number: u32) -> IpAddr {
    IpAddr::from([10, (node >> 8) as u8, node as u8, number as u8])
}

fn routes() -> RouteTable {
    let mut routes = RouteTable::default();
    for node in 0..NODES {
        let pods = format!("10.{}.{}.0/24", node >> 8, node & 255).parse().expect("a range");
        routes.insert(pods, Owner::PeerPod(PeerId(node)));
        let address: IpAddr = IpAddr::from([192, 168, (node >> 8) as u8, node as u8]);
        routes.insert(address.into(), Owner::PeerNode(PeerId(node)));
    }
    routes
}

fn listen(number: u32) -> Listen {
    let address = IpAddr::from((0x0a60_0000 + number).to_be_bytes());
    Listen { address, protocol: Protocol::Tcp, port: 80 }
}

fn services() -> ServiceTable {
    let mut table = ServiceTable::default();
    for number in 0..SERVICES {
        let endpoints = (0..10).map(|n| Endpoint { address: pod(number % NODES, n), port: 8080 });
        let cluster: Box<[Endpoint]> = endpoints.collect();
        let port = Arc::new(ServicePort {
            id: number + 1,
            name: format!("bench/s{number}:web").into(),
            affinity: 0,
            internal_local: false,
            external_local: false,
            local: Box::new([]),
            anywhere: true,
            known: cluster.iter().map(|endpoint| Known { endpoint: *endpoint, serving: true }).collect(),
            cluster,
            sources: Box::new([]),
        });
        table.put_port(Arc::clone(&port));
        table.listen(listen(number), Frontend { way: Way::Cluster, port });
    }
    table
}

// --- seal and open -------------------------------------------------------------------------------

/// Packets sealed or opened at a time.
const SEALED: usize = 45;

fn crypto(c: &mut Criterion) {
    let mut group = c.benchmark_group("wireguard");
    for len in [64, 1420] {
        let mut ends = Ends::connected();
        let packet = vec![0x45; len];
        group.throughput(Throughput::Bytes((len * SEALED) as u64));
        group.bench_function(format!("seal/{SEALED}x{len}"), |b| {
            b.iter(|| {
                ends.tx.clear();
                ends.seal(&packet);
            });
        });
        // Each datagram can be opened once.
        group.bench_function(format!("open/{SEALED}x{len}"), |b| {
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    ends.tx.clear();
                    ends.seal(&packet_of(len));
                    spent += ends.open();
                }
                spent
            });
        });
    }
    group.finish();
}

/// Two ends of a WireGuard session.
struct Ends {
    ends: [WireGuard; 2],
    meshes: [Mesh; 2],
    tx: TxBatch,
    plain: Vec<u8>,
    now: Instant,
}

impl Ends {
    fn connected() -> Ends {
        let end = |n: usize| WireGuard::new(StaticSecret::from(pair::PRIVATE[n]), LaneId(0), (1, 2));
        let mesh = |other: usize| {
            let mut mesh = Mesh::default();
            mesh.peers.push(Some(Arc::new(pair::peer(other, Encap::WireGuard))));
            mesh.keys.insert(pair::public(other), (PeerId(0), LaneId(0)));
            mesh
        };
        let mut ends = Ends {
            ends: [end(0), end(1)],
            meshes: [mesh(1), mesh(0)],
            tx: TxBatch::new(1 << 20),
            plain: vec![0; 1 << 16],
            now: now(),
        };
        let peer = Arc::clone(ends.meshes[0].peer(PeerId(0)).expect("the peer"));
        ends.ends[0].initiate(ends.now, &peer, &mut ends.tx).expect("a handshake");
        for to in [1, 0, 1] {
            let datagrams = ends.take();
            for datagram in datagrams {
                let from = SocketAddr::new(pair::outer(1 - to), 51820);
                let opened = ends.ends[to].open(
                    ends.now,
                    &ends.meshes[to],
                    from,
                    &datagram,
                    &mut ends.plain,
                    &mut ends.tx,
                );
                assert!(!matches!(opened, Opened::Drop(_)), "{opened:?}");
            }
        }
        ends
    }

    fn take(&mut self) -> Vec<Vec<u8>> {
        let tx = &self.tx;
        let datagrams =
            tx.runs().iter().flat_map(|run| tx.bytes(run).chunks(run.segment).map(<[u8]>::to_vec));
        let datagrams = datagrams.collect();
        self.tx.clear();
        datagrams
    }

    fn seal(&mut self, packet: &[u8]) {
        let peer = self.meshes[0].peer(PeerId(0)).expect("the peer");
        for _ in 0..SEALED {
            let sealed = self.ends[0].seal(self.now, peer, &packet, &mut self.tx);
            assert_eq!(sealed.sent, 1);
        }
    }

    /// Opens what was sealed; how long that took.
    fn open(&mut self) -> Duration {
        let datagrams = self.take();
        let from = SocketAddr::new(pair::outer(0), 51820);
        let begun = now();
        for datagram in &datagrams {
            let opened =
                self.ends[1].open(self.now, &self.meshes[1], from, datagram, &mut self.plain, &mut self.tx);
            assert!(matches!(black_box(opened), Opened::Packet { .. }));
        }
        now().duration_since(begun)
    }
}

// --- split and join ------------------------------------------------------------------------------

fn segments(c: &mut Criterion) {
    let mut group = c.benchmark_group("segments");
    group.throughput(Throughput::Bytes(pair::BULK as u64));
    let frame = super_packet(CLIENT, ENDPOINT, "A", pair::BULK, 1380);
    let packet = &frame[VNET_HDR_LEN..];
    let (vnet, _) = VnetHdr::decode(&frame).expect("a header");
    let headers = parse(packet).expect("a packet");
    let mut room = vec![0; 2048];
    group.bench_function("split/64000", |b| {
        b.iter(|| {
            let segments = SuperPacket::new(&vnet, black_box(packet), &headers).expect("segments");
            for i in 0..segments.count() {
                black_box(segments.write(i, &mut room));
            }
        });
    });

    let segments = SuperPacket::new(&vnet, packet, &headers).expect("segments");
    let mut plain = Vec::new();
    let mut places = Vec::new();
    for i in 0..segments.count() {
        let len = segments.write(i, &mut room);
        places.push((plain.len(), len));
        plain.extend_from_slice(&room[..len]);
    }
    let mut batch = TunBatch::new(256);
    batch.set_offloads(Offloads { tcp: true, udp: true, acks: true });
    // Joining writes the first header: each time from the same packets.
    group.bench_function("join/64000", |b| {
        b.iter_batched_ref(
            || plain.clone(),
            |plain| {
                for &(at, len) in &places {
                    let headers = parse(&plain[at..at + len]).expect("a packet");
                    let memory = &Memory { receive: &mut [], plain };
                    batch.push(Region::Plain, at as u32, &headers, memory).expect("room");
                }
                batch.finish(&mut Memory { receive: &mut [], plain });
                assert_eq!(batch.count(), 1, "all in one frame");
                batch.clear();
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

// --- a lane as a whole ---------------------------------------------------------------------------

fn bursts(c: &mut Criterion) {
    let mut group = c.benchmark_group("burst");
    for encap in [Encap::WireGuard, Encap::Vxlan] {
        for (name, service, load) in
            [("bulk", false, Load::Bulk), ("service", true, Load::Bulk), ("small", false, Load::Small)]
        {
            for (way, heading) in [("out", Heading::Out), ("in", Heading::In)] {
                let mut pair = Pair::new(Carriage { encap, service, load });
                group.throughput(Throughput::Bytes(pair.bytes() as u64));
                group.bench_function(format!("{}/{name}/{way}", encap.name()), |b| {
                    b.iter_custom(|times| {
                        let mut spent = Duration::ZERO;
                        for _ in 0..times {
                            pair.prepare(heading);
                            let begun = now();
                            pair.one_burst(heading);
                            spent += now().duration_since(begun);
                            pair.check(heading);
                        }
                        spent
                    });
                });
            }
        }
    }
    group.finish();
}

// --- packets -------------------------------------------------------------------------------------

fn tcp(payload: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(CLIENT.0, ENDPOINT.0, 64).tcp(CLIENT.1, ENDPOINT.1, 1, 64_000).ack(1);
    builder.write(&mut packet, &vec![7; payload]).expect("a packet");
    packet
}

fn udp_v6(payload: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let address = |node: u8| [0xfd, 0, 0x10, 0, 0, node, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10];
    let builder = PacketBuilder::ipv6(address(0), address(1), 64).udp(CLIENT.1, ENDPOINT.1);
    builder.write(&mut packet, &vec![7; payload]).expect("a packet");
    packet
}

fn packet_of(len: usize) -> Vec<u8> {
    tcp(len - 40)
}

#[allow(clippy::disallowed_methods)] // a benchmark reads the clock; io::clock is not part of the core
fn now() -> Instant {
    Instant::now()
}
