//! Services at scale: how long a change takes from its event to the first packet that goes elsewhere, and
//! what a lookup costs.
//!
//! ```text
//! bench/services                     10,000 Services x 25 endpoints, beside 10
//! bench/services --services 1000
//! bench/services instructions        instructions per burst, counted by callgrind
//! bench/services ... --json          for programs, as `bench/kube-proxy` takes it in
//! ```
//!
//! State line and packet line of the agent, in one process, without a kernel: no root needed.

use std::hint::black_box;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[allow(dead_code)] // shared with the bench beside kube-proxy, which needs more of it
#[path = "objects.rs"]
pub mod objects;

use clap::{Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};
use warren::datapath::affinity::Affinity;
use warren::datapath::conntrack::{FlowKey, FlowTable, Seed, Sighting};
use warren::datapath::{Arrival, Lane, LaneConfig, Output};
use warren::io::clock;
use warren::packet::coalesce::Offloads;
use warren::packet::vnet::VnetHdr;
use warren::snapshot::{Encap, LaneId, PublicKey, Snapshot};
use warren::state::annotations::Announcement;
use warren::state::compile::{EncapPolicy, Settings};
use warren::state::run::{Outputs, StateLine};
use warren::state::services::ServiceSettings;
use warren::state::source::{Kind, Object, SourceEvent, manifest};
use warren::tunnel::vxlan_link::Neighbours;
use x25519_dalek::{PublicKey as Public, StaticSecret};

use objects::{NODES, cluster_ip};

const CHANGES: u32 = 100;
const PRIVATE: [[u8; 32]; 2] = [[1; 32], [2; 32]];

/// What to measure.
#[derive(Debug, Parser)]
#[command(about = "Measures Services at scale", long_about = None)]
struct Arguments {
    /// How many Services; measured beside 10.
    #[arg(long, default_value_t = 10_000, global = true)]
    services: u32,
    /// How many endpoints each has.
    #[arg(long, default_value_t = 25)]
    endpoints: u32,
    /// Prints JSON, in milliseconds and MiB, instead of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: Option<What>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Counts the instructions of a burst with callgrind: to a pod, to a Service of 10, to one of many.
    Instructions,
    /// Sends bursts and says nothing: what callgrind looks at.
    #[command(hide = true)]
    Bursts { encap: Wrap, to: To },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wrap {
    Wireguard,
    Vxlan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum To {
    Pod,
    Service,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.what {
        Some(What::Instructions) => instructions(arguments.services, arguments.json),
        Some(What::Bursts { encap, to }) => {
            bursts(encap, to, arguments.services);
            ExitCode::SUCCESS
        }
        None => changes(arguments.services, arguments.endpoints, arguments.json),
    }
}

// --- changes -----------------------------------------------------------------------------------------

fn changes(services: u32, endpoints: u32, as_json: bool) -> ExitCode {
    let measured = [10, services].map(|services| (services, measure(services, endpoints)));
    if as_json {
        let entry = |(services, m): &(u32, Measured)| {
            json!({
                "services": services, "endpoints": services * endpoints, "changes": CHANGES,
                "from_nothing_ms": ms(m.from_nothing), "change_p50_ms": ms(m.median),
                "change_p99_ms": ms(m.p99), "memory_mib": m.memory_kib as f64 / 1024.0,
                "debug_build": cfg!(debug_assertions),
            })
        };
        println!("{:#}", json!(measured.iter().map(entry).collect::<Vec<_>>()));
        return held(&bars(&measured));
    }
    println!(
        "{:>9} {:>10} {:>14} {:>16} {:>12} {:>12}",
        "Services", "endpoints", "from nothing", "one change p50", "p99", "memory"
    );
    for (services, measured) in &measured {
        let [from_nothing, median, worst] = [measured.from_nothing, measured.median, measured.p99].map(ms);
        let memory = measured.memory_kib as f64 / 1024.0;
        println!(
            "{services:>9} {:>10} {from_nothing:>11.1} ms {median:>13.3} ms {worst:>9.3} ms {memory:>8.1} MiB",
            services * endpoints
        );
    }
    let ratio = measured[1].1.p99.as_secs_f64() / measured[0].1.p99.as_secs_f64();
    println!("p99 of a change at {services} Services is {ratio:.2} times that at 10");
    held(&bars(&measured))
}

/// What was measured, and the most that it may be; for more Services than 10,000 there are no bars.
fn bars(measured: &[(u32, Measured); 2]) -> Vec<(&'static str, f64, f64)> {
    let [(_, small), (services, large)] = measured;
    if *services > 10_000 {
        return Vec::new();
    }
    vec![
        ("from nothing, ms", ms(large.from_nothing), 2_000.0),
        ("p99 of a change, ms", ms(large.p99), 50.0),
        (
            "p99 of a change, times that at 10 Services",
            large.p99.as_secs_f64() / small.p99.as_secs_f64(),
            3.0,
        ),
        ("memory, MiB", large.memory_kib as f64 / 1024.0, 100.0),
    ]
}

/// Says which figures are above their bar.
fn held(figures: &[(&str, f64, f64)]) -> ExitCode {
    let missed: Vec<_> = figures.iter().filter(|(_, value, bar)| value.is_nan() || value > bar).collect();
    for (name, value, bar) in &missed {
        eprintln!("MISSED: {name}: {value:.3}, and at most {bar} is wanted");
    }
    if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Measured {
    from_nothing: Duration,
    median: Duration,
    p99: Duration,
    memory_kib: u64,
}

fn measure(services: u32, endpoints: u32) -> Measured {
    let (mut line, outputs) = state_line();
    let mut objects: Vec<Object> = (0..services).map(service).collect();
    let slices: Vec<Object> = (0..services).map(|n| slice(n, endpoints, 0)).collect();
    objects.extend(slices);
    let memory = resident_kib();
    let begun = clock::now();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        let objects = objects.iter().filter(|object| object.kind() == kind).cloned().collect();
        line.handle(SourceEvent::Reset { kind, objects, complete: true, unread: Vec::new() });
    }
    line.compile();
    let from_nothing = clock::now().duration_since(begun);
    let memory_kib = resident_kib().saturating_sub(memory);

    let mut world = World::new(Encap::Vxlan, outputs.snapshot.load_full());
    let mut sets = vec![0; services as usize];
    let mut times: Vec<Duration> = (0..CHANGES)
        .map(|round| {
            let chosen = round * 97 % services;
            // Another set of pods than it has: no packet goes where it went before.
            let set = &mut sets[chosen as usize];
            *set = *set % 2 + 1;
            let changed = slice(chosen, endpoints, *set);
            let before = world.ask(chosen, round);
            let begun = clock::now();
            line.handle(SourceEvent::Apply(changed));
            line.compile();
            world.snapshot = outputs.snapshot.load_full();
            let after = world.ask(chosen, round);
            let time = clock::now().duration_since(begun);
            assert_ne!(before, after, "the packet goes elsewhere");
            time
        })
        .collect();
    times.sort();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    Measured { from_nothing, median: at(50), p99: at(99), memory_kib }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

// --- instructions ------------------------------------------------------------------------------------

fn instructions(services: u32, as_json: bool) -> ExitCode {
    let this = std::env::current_exe().expect("our own path");
    if !as_json {
        println!(
            "{:<10} {:>14} {:>16} {:>18} {:>8} {:>8}",
            "",
            "pod to pod",
            "10 Services",
            format!("{services} Services"),
            "ratio",
            "ratio"
        );
    }
    let (mut figures, mut rows) = (Vec::new(), Vec::new());
    for encap in ["vxlan", "wireguard"] {
        let many = services.to_string();
        let counts = [("pod", "10"), ("service", "10"), ("service", &many)].map(|(to, services)| {
            let output = Command::new("valgrind")
                .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
                .arg("--toggle-collect=*one_burst*")
                .arg(&this)
                .args(["bursts", encap, to, "--services", services])
                .output()
                .expect("valgrind is needed: apt-get install valgrind");
            let log = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{log}");
            let count = log.lines().find_map(|line| line.split("Collected :").nth(1));
            count.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or_else(|| panic!("{log}"))
        });
        let [pod, ten, many] = counts.map(|count| count / u64::from(BURSTS));
        let ratio = |a: u64, b: u64| a as f64 / b as f64;
        let (service_to_pod, many_to_ten) = (ratio(ten, pod), ratio(many, ten));
        if !as_json {
            println!("{encap:<10} {pod:>14} {ten:>16} {many:>18} {service_to_pod:>8.4} {many_to_ten:>8.4}");
        }
        rows.push(json!({
            "encap": encap, "services": services, "pod": pod, "of_ten": ten, "of_many": many,
            "service_to_pod": service_to_pod, "many_to_ten": many_to_ten,
            "debug_build": cfg!(debug_assertions),
        }));
        // What a Service adds to a burst is held by `bench/instructions`.
        figures.push(("many Services to 10", many_to_ten, 1.1));
    }
    match as_json {
        true => println!("{:#}", json!(rows)),
        false => println!("ratios: a Service to plain pod to pod, and {services} Services to 10"),
    }
    held(&figures)
}

const BURSTS: u32 = 200;

fn bursts(encap: Wrap, to: To, services: u32) {
    let (mut line, outputs) = state_line();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        // The Service that is spoken to has one endpoint: the pod of the plain bursts.
        let endpoint = [("10.244.1.10".to_owned(), "n1".to_owned())];
        let chosen =
            || object(objects::named_slice(&format!("s{}", services / 2), &[("web", 80, 8080)], &endpoint));
        let make = |n| match kind {
            Kind::Service => service(n),
            _ if n == services / 2 => chosen(),
            _ => slice(n, 25, 0),
        };
        let objects = (0..services).map(make).collect();
        line.handle(SourceEvent::Reset { kind, objects, complete: true, unread: Vec::new() });
    }
    line.compile();
    let encap = if encap == Wrap::Wireguard { Encap::WireGuard } else { Encap::Vxlan };
    let mut world = World::new(encap, outputs.snapshot.load_full());
    let target = match to {
        To::Pod => ([10, 244, 1, 10], 8080),
        To::Service => (cluster_ip(services / 2), 80),
    };
    world.connect(target);
    let frame = super_packet(target);
    for round in 0..BURSTS {
        let mut frame = frame.clone();
        world.now += Duration::from_micros(50 * u64::from(round % 2));
        world.one_burst(&mut frame);
        world.out.tx.clear();
    }
}

// --- the cluster -------------------------------------------------------------------------------------

/// A state line of node n0, with the mesh of [`NODES`] nodes.
fn state_line() -> (StateLine, Outputs) {
    let settings = Settings {
        node: "n0".to_owned(),
        encap: EncapPolicy::Auto,
        announcement: Announcement::default(),
        vxlan_port: 8472,
        vni: 1,
        mac: [2, 0, 0, 0, 0, 0],
        underlay_mtu: 1500,
        cluster_ranges: vec!["10.244.0.0/16".parse().expect("range")],
        service_ranges: vec!["10.96.0.0/12".parse().expect("range")],
        services: ServiceSettings { enabled: true, ..ServiceSettings::default() },
    };
    let (mut line, outputs) = StateLine::new(settings, None);
    for kind in Kind::ALL {
        let objects = if kind == Kind::Node { (0..NODES).map(node).collect() } else { Vec::new() };
        line.handle(SourceEvent::Reset { kind, objects, complete: true, unread: Vec::new() });
    }
    line.compile();
    (line, outputs)
}

fn object(value: Value) -> Object {
    let mut manifest = manifest::from_value(value);
    assert!(manifest.problems.is_empty(), "{:?}", manifest.problems);
    manifest.objects.pop().expect("an object")
}

fn node(n: u32) -> Object {
    object(objects::node(n))
}

fn service(n: u32) -> Object {
    object(objects::service(n))
}

fn slice(n: u32, endpoints: u32, set: u32) -> Object {
    object(objects::slice(n, endpoints, set))
}

// --- the packet line ---------------------------------------------------------------------------------

struct World {
    flows: Arc<FlowTable>,
    lane: Lane,
    snapshot: Arc<Snapshot>,
    out: Output,
    now: Instant,
    encap: Encap,
}

impl World {
    fn new(encap: Encap, snapshot: Arc<Snapshot>) -> World {
        let now = clock::now();
        let flows = Arc::new(FlowTable::in_memory(1 << 16, Seed(1, 2)).expect("a table"));
        let lane = lane(0, now, Arc::clone(&flows));
        let mut world = World { flows, lane, snapshot, out: output(), now, encap };
        world.snapshot = world.reachable();
        world
    }

    /// The snapshot with peers that have keys, MAC addresses and the encapsulation that is measured.
    fn reachable(&self) -> Arc<Snapshot> {
        let mut mesh =
            warren::snapshot::Mesh { routes: self.snapshot.mesh.routes.clone(), ..Default::default() };
        for peer in &self.snapshot.mesh.peers {
            mesh.peers.push(peer.as_ref().map(|peer| {
                let mut peer = (**peer).clone();
                peer.encap = Some(self.encap);
                peer.lanes = vec![warren::snapshot::PeerLane { key: public(1), port: 51820 }];
                let address = peer.addresses[0];
                peer.endpoints = vec![SocketAddr::new(address, 51820)];
                let mac = Some([2, 0, 0, 0, 0, 1]);
                peer.vxlan = Some(warren::snapshot::PeerVxlan { address, port: 8472, mac });
                Arc::new(peer)
            }));
        }
        if let Some(peer) = mesh.peers.iter().flatten().next() {
            mesh.keys.insert(public(1), (peer.id, LaneId(0)));
        }
        Arc::new(Snapshot { mesh: Arc::new(mesh), ..(*self.snapshot).clone() })
    }

    /// Sends a SYN to a Service; where it went, and as what.
    fn ask(&mut self, service: u32, port: u32) -> Vec<u8> {
        self.snapshot = self.reachable();
        self.syn((cluster_ip(service), 80), 1024 + (port % 60_000) as u16);
        let tx = &self.out.tx;
        let sent = tx.runs().first().map(|run| tx.bytes(run)[..].to_vec()).expect("a packet");
        self.out.tx.clear();
        // Behind the VXLAN header: the inner destination.
        sent[warren::tunnel::vxlan::HEADER + 16..][..4].to_vec()
    }

    fn syn(&mut self, to: ([u8; 4], u16), port: u16) {
        let mut packet = Vec::new();
        let builder = etherparse::PacketBuilder::ipv4([10, 244, 0, 10], to.0, 64).tcp(port, to.1, 1, 64_000);
        builder.syn().write(&mut packet, &[]).expect("a packet");
        let mut frame = [&VnetHdr::default().encode()[..], &packet].concat();
        self.lane.handle_tun(self.now, &self.snapshot, &mut frame, &mut self.out);
    }

    /// A session with the other end, if the encapsulation has such, and an open connection.
    fn connect(&mut self, to: ([u8; 4], u16)) {
        self.syn(to, 1000);
        if self.encap == Encap::WireGuard {
            let mut other =
                lane(1, self.now, Arc::new(FlowTable::in_memory(64, Seed(3, 4)).expect("a table")));
            let mut mesh = warren::snapshot::Mesh::default();
            let mut peer = (**self.snapshot.mesh.peers.iter().flatten().next().expect("a peer")).clone();
            peer.lanes = vec![warren::snapshot::PeerLane { key: public(0), port: 51820 }];
            mesh.keys.insert(public(0), (peer.id, LaneId(0)));
            while mesh.peers.len() < peer.id.0 as usize {
                mesh.peers.push(None);
            }
            mesh.peers.push(Some(Arc::new(peer)));
            let theirs = Snapshot { mesh: Arc::new(mesh), ..(*self.snapshot).clone() };
            let mut out = output();
            for _ in 0..4 {
                carry(&mut self.out, &mut other, self.now, &theirs, &mut out);
                carry(&mut out, &mut self.lane, self.now, &self.snapshot, &mut self.out);
            }
        }
        self.out.tx.clear();
        // The answer, as far as the flow table is concerned: the connection is open.
        let (pod, endpoint) = (IpAddr::from([10, 244, 0, 10]), IpAddr::from([10, 244, 1, 10]));
        let (source_port, destination_port) = (8080, 1000);
        let key = FlowKey { source: endpoint, destination: pod, source_port, destination_port, protocol: 6 };
        let (packets, bytes, tcp_flags) = (1, 40, 0x12);
        let answer =
            Sighting { key, from_peer: true, peer: None, lane: 0, tcp_flags, packets, bytes, owner: 0 };
        self.flows.lookup(0, &answer).expect("a table").expect("the flow of the SYN");
    }

    /// What is counted: one super-packet from the TUN, to the datagrams.
    #[inline(never)]
    fn one_burst(&mut self, frame: &mut [u8]) {
        self.lane.handle_tun(self.now, &self.snapshot, frame, &mut self.out);
        assert!(black_box(self.out.tx.runs()).iter().map(|run| run.count).sum::<usize>() > 20);
    }
}

fn carry(from: &mut Output, to: &mut Lane, now: Instant, snapshot: &Snapshot, out: &mut Output) {
    let datagrams: Vec<Vec<u8>> = from.tx.runs().iter().map(|run| from.tx.bytes(run).to_vec()).collect();
    from.tx.clear();
    for mut datagram in datagrams {
        let source =
            snapshot.mesh.peers.iter().flatten().next().map(|peer| peer.endpoints[0]).expect("a peer");
        let len = datagram.len();
        let arrival = Arrival { encap: Encap::WireGuard, from: source, offset: 0, len, stride: len };
        to.handle_udp(now, snapshot, arrival, &mut datagram, out);
        out.clear_tun();
    }
}

fn output() -> Output {
    Output::new(Offloads { tcp: true, udp: true, acks: true })
}

fn public(number: usize) -> PublicKey {
    Public::from(&StaticSecret::from(PRIVATE[number])).to_bytes()
}

fn lane(number: usize, now: Instant, flows: Arc<FlowTable>) -> Lane {
    Lane::new(LaneConfig {
        id: LaneId(0),
        private: PRIVATE[number],
        seed: (1, 2),
        vxlan_sources: 1,
        neighbours: Arc::new(Neighbours::default()),
        flows,
        affinity: Arc::new(Affinity::in_memory(1024)),
        epoch: (now, 0),
    })
}

/// A full super-packet of TCP as a TUN gives it.
fn super_packet(to: ([u8; 4], u16)) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder =
        etherparse::PacketBuilder::ipv4([10, 244, 0, 10], to.0, 64).tcp(1000, to.1, 2, 64_000).ack(1);
    builder.write(&mut packet, &[7; 64_000]).expect("a packet");
    let vnet =
        VnetHdr { flags: 1, gso_type: 1, hdr_len: 40, gso_size: 1380, csum_start: 20, csum_offset: 16 };
    [&vnet.encode()[..], &packet].concat()
}
