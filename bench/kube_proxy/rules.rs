//! How long kube-proxy takes to program many Services from nothing, and one change then.
//!
//! A namespace with kube-proxy and its API server, and one that has all endpoints' addresses and says to each
//! client which of them it reached. Complete is what the packets say: a connection to the last Service comes
//! about (kube-proxy's first sync is one transaction), and then the elements of its map are counted.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use warren::io::clock;

use crate::api::Api;
use crate::lab::netns::{Netns, veth};
use crate::lab::wait_for;
use crate::objects::{self, NODES};
use crate::proxy::KubeProxy;
use crate::report;

/// How to measure.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// How many Services; measured beside 10.
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// How many endpoints each has.
    #[arg(long, default_value_t = 25)]
    endpoints: u32,
    /// Changes, one after the other.
    #[arg(long, default_value_t = 20)]
    changes: u32,
    /// What `bench/services --json` said, to stand beside.
    #[arg(long)]
    beside: Option<PathBuf>,
}

/// How long the first sync may take.
const FIRST_SYNC: Duration = Duration::from_secs(1200);
/// How long a change may take.
const CHANGE: Duration = Duration::from_secs(120);
/// Between two changes: longer than the pause that kube-proxy makes after a sync (minSyncPeriod, 1 s), which
/// is not what is measured.
const PAUSE: Duration = Duration::from_millis(1500);
/// Between two looks.
const GLANCE: Duration = Duration::from_millis(1);
const TARGET: u16 = 8080;

/// The section of the results.
pub fn measure(options: &Options) -> Value {
    // kube-proxy is beside no agent here, but beside what `--beside` has of Warren.
    let about = report::about_one_process();
    let beside = options.beside.as_ref().map(|file| fs::read_to_string(file).expect("read --beside"));
    let beside: Value =
        beside.map_or(Value::Null, |text| serde_json::from_str(&text).expect("--beside is JSON"));
    let rows: Vec<Value> = [10, options.services].iter().map(|&services| run(services, options)).collect();
    json!({"about": about, "changes": options.changes, "rows": rows, "warren": beside})
}

fn run(services: u32, options: &Options) -> Value {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let (node, pods) = (Netns::new("node"), Netns::new("pods"));
    connect(&node, &pods);
    let stop = AtomicBool::new(false);
    let listener = pods.enter(|| TcpListener::bind(("0.0.0.0", TARGET))).expect("listen");
    listener.set_nonblocking(true).expect("a listener that does not block");
    std::thread::scope(|scope| {
        scope.spawn(|| say_who(&listener, &stop));
        let _stop = StopAtEnd(&stop);
        let mut all: Vec<Value> = (0..NODES).map(objects::node).collect();
        all.extend((0..services).map(objects::service));
        all.extend((0..services).map(|n| objects::slice(n, options.endpoints, 0)));
        let api = Api::start(&node, all);
        let started = clock::now();
        let mut proxy = KubeProxy::start(&node, "n0", scratch.path().join("log"));
        let answered = wait_for("kube-proxy's rules", FIRST_SYNC, || {
            proxy.assert_running();
            reached(&node, services - 1).map(|_| clock::now())
        });
        let had_all = ["Service", "EndpointSlice"].into_iter().filter_map(|kind| api.served(kind)).max();
        let answers_after = answered.duration_since(had_all.expect("lists were asked for"));
        // Written once the sync is over.
        let sync = wait_for("the metric of the first sync", FIRST_SYNC, || first_sync(&node));
        let elements = count(&node);
        assert_eq!(elements, services as usize, "all Services are in kube-proxy's map");
        eprintln!("{services} Services: first sync {sync:.2} s, answers after {answers_after:?}");

        let mut sets = vec![0; services as usize];
        let changes: Vec<f64> = (0..options.changes)
            .map(|round| {
                let chosen = round * 97 % services;
                // Another set of pods than it has.
                let set = &mut sets[chosen as usize];
                *set = *set % 2 + 1;
                std::thread::sleep(PAUSE);
                let time = change(&node, &api, chosen, *set, options.endpoints);
                eprintln!("{services} Services, change {}: {time:?}", round + 1);
                time.as_secs_f64() * 1000.0
            })
            .collect();
        json!({
            "services": services, "endpoints": services * options.endpoints, "elements": elements,
            "first_sync_ms": sync * 1000.0,
            "answers_after_ms": answers_after.as_secs_f64() * 1000.0,
            "answers_after_start_ms": answered.duration_since(started).as_secs_f64() * 1000.0,
            "change_ms": report::Spread::of(&changes).json(), "changes_ms": changes,
            "sync_failures": KubeProxy::metric(&node, "kubeproxy_sync_proxy_rules_nftables_sync_failures_total"),
            "peak_mib": proxy.peak_mib(),
        })
    })
}

/// The threads of a scope must end when the measurement fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Everything goes from the node to `pods`, which holds every address; what no rule translates is refused there.
fn connect(node: &Netns, pods: &Netns) {
    veth((node, "eth0"), (pods, "eth0"), 1500);
    node.run_all("ip addr add 192.0.2.1/24 dev eth0\n ip route add default via 192.0.2.254");
    pods.run_all(
        "ip addr add 192.0.2.254/24 dev eth0
         ip route add local 10.244.0.0/16 dev lo
         ip route add local 10.96.0.0/12 dev lo",
    );
}

/// Tells clients which address they reached.
fn say_who(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((mut stream, _)) => {
                if let Ok(SocketAddr::V4(here)) = stream.local_addr() {
                    let _ = stream.write_all(&here.ip().octets());
                }
            }
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// The endpoint that a new connection to a Service reaches.
fn reached(node: &Netns, service: u32) -> Option<[u8; 4]> {
    node.enter(|| reached_from_here(service))
}

fn reached_from_here(service: u32) -> Option<[u8; 4]> {
    let target = SocketAddr::new(IpAddr::from(objects::cluster_ip(service)), 80);
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_millis(500)).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(500))).ok()?;
    let mut address = [0; 4];
    std::io::Read::read_exact(&mut stream, &mut address).ok()?;
    Some(address)
}

fn change(node: &Netns, api: &Api, service: u32, set: u32, endpoints: u32) -> Duration {
    let changed = objects::slice(service, endpoints, set);
    node.enter(|| {
        let before = reached_from_here(service).expect("the Service answers");
        assert_ne!(objects::set_of(before), set, "the change is one");
        let begun: Instant = clock::now();
        api.change(changed);
        while reached_from_here(service).is_none_or(|to| objects::set_of(to) != set) {
            assert!(clock::now().duration_since(begun) < CHANGE, "the change does not arrive");
            std::thread::sleep(GLANCE);
        }
        clock::now().duration_since(begun)
    })
}

/// Seconds of the first sync, by kube-proxy's own clock: both families' proxies, of which one has no Services.
fn first_sync(node: &Netns) -> Option<f64> {
    let name = "kubeproxy_sync_full_proxy_rules_duration_seconds";
    let of = |what: &str, family: &str| {
        KubeProxy::metric(node, &format!("{name}_{what}{{ip_family=\"{family}\"}}"))
    };
    (of("count", "IPv4") >= 1.0).then(|| of("sum", "IPv4"))
}

/// The elements of kube-proxy's map of Services.
fn count(node: &Netns) -> usize {
    let text = node.run("nft -j list map ip kube-proxy service-ips");
    let json: Value = serde_json::from_str(&text).expect("nft prints JSON");
    let maps = json["nftables"].as_array().expect("a list").iter();
    maps.filter_map(|entry| entry["map"]["elem"].as_array()).map(Vec::len).sum()
}
