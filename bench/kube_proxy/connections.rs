//! Connections per second from a pod to a pod of another node, through a ClusterIP.
//!
//! One connection: connect, one byte there, one byte back, an ordinary close by the client. Client and server
//! are threads of this program in the pods' namespaces; the same for everybody.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use warren::io::clock;

use crate::lab::Station;
use crate::lab::agent::warren;
use crate::stand::{CLUSTER_IP, Contestant, PORTS, Stand};
use crate::{order, report};

/// How to measure.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// How often each contestant is measured; the table shows medians.
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Seconds of each measurement, after one second that does not count.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Client threads; the server has as many. Each has one connection at a time.
    #[arg(long, default_value_t = 16)]
    threads: usize,
    /// Only these contestants.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Contestant>,
}

/// A connection that takes longer has failed, and ends the thread's turn.
const PATIENCE: Duration = Duration::from_secs(3);

/// The section of the results.
pub fn measure(options: &Options) -> Value {
    let about = report::about(&warren());
    let all = Contestant::ALL.to_vec();
    let contestants = if options.only.is_empty() { all } else { options.only.clone() };
    let mut samples = Vec::new();
    for round in 1..=options.rounds {
        for index in order::of(contestants.len(), round) {
            let contestant = contestants[index];
            let stand = contestant.set_up();
            let (rate, failed) = run(&stand, options);
            eprintln!("round {round}: {}: {rate:.0}/s, {failed} failed", contestant.name());
            samples.push((contestant, round, rate, failed));
        }
    }
    let rates = |who: Contestant| samples.iter().filter(move |s| s.0 == who).map(|s| s.2).collect::<Vec<_>>();
    let row = |&who: &Contestant| {
        let mine = rates(who);
        let spread = report::Spread::of(&mine);
        let peers = who.peers().iter().filter(|(peer, _)| contestants.contains(peer));
        let beside: Vec<Value> = peers
            .map(|&(peer, bar)| {
                let theirs = rates(peer);
                let by_round: Vec<f64> = mine.iter().zip(&theirs).map(|(a, b)| a / b).collect();
                json!({
                    "peer": peer.name(), "ratio": spread.median / report::Spread::of(&theirs).median,
                    "bar": bar, "ratio_by_round": report::Spread::of(&by_round).json(),
                })
            })
            .collect();
        json!({
            "contestant": who.name(), "settings": who.settings(), "per_second": spread.json(), "beside": beside,
        })
    };
    let sample = |s: &(Contestant, u32, f64, u64)| json!({"round": s.1, "contestant": s.0.name(), "per_second": s.2, "failed": s.3});
    json!({
        "about": about,
        "rounds": options.rounds, "seconds": options.seconds, "threads": options.threads,
        "ports": "1024 to 65535 with tcp_tw_reuse=1 in the client's pod, so that TIME_WAIT does not limit",
        "rows": contestants.iter().map(row).collect::<Vec<_>>(), "samples": samples.iter().map(sample).collect::<Vec<_>>(),
    })
}

/// Connections per second, and how many failed.
fn run(stand: &Stand, options: &Options) -> (f64, u64) {
    let (client, server) = (stand.client().pod(), stand.server().pod());
    // A port may be used again a second after its connection ended (by its timestamps): 64,000 ports are
    // enough for 64,000 connections per second, and everybody closes as programs do.
    for setting in ["net.ipv4.ip_local_port_range=1024 65535", "net.ipv4.tcp_tw_reuse=1"] {
        let done = client.ns.command("sysctl").args(["-qw", setting]).status().expect("run sysctl");
        assert!(done.success(), "sysctl {setting}");
    }
    let stop = AtomicBool::new(false);
    let (done, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let listener = listen(server);
    stand.wait_served();
    std::thread::scope(|scope| {
        for _ in 0..options.threads {
            let listener = listener.try_clone().expect("share the listener");
            let stop = &stop;
            scope.spawn(move || serve(&listener, stop));
        }
        for _ in 0..options.threads {
            let (stop, done, failed) = (&stop, &done, &failed);
            scope.spawn(move || client.ns.enter(|| ask_on(stop, done, failed)));
        }
        std::thread::sleep(Duration::from_secs(1));
        let (before, begun) = (done.load(Ordering::Relaxed), clock::now());
        std::thread::sleep(Duration::from_secs(options.seconds));
        let after = done.load(Ordering::Relaxed);
        let seconds = clock::now().duration_since(begun).as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        // Servers that wait for a client get one each, so that they look up.
        std::thread::sleep(Duration::from_millis(100));
        let here = listener.local_addr().expect("where it listens");
        server.ns.enter(|| (0..options.threads).for_each(|_| drop(TcpStream::connect(here))));
        ((after - before) as f64 / seconds, failed.load(Ordering::Relaxed))
    })
}

fn listen(at: Station<'_>) -> TcpListener {
    let here = SocketAddr::new(at.addresses[0], PORTS[0].2);
    at.ns.enter(|| TcpListener::bind(here)).unwrap_or_else(|e| panic!("listen on {here}: {e}"))
}

fn serve(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        // Who goes away in the middle is counted by the client.
        let _ = listener.accept().and_then(|(stream, _)| answer(stream));
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut byte = [0];
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)?;
    // The client closes first: TIME_WAIT is its.
    stream.read(&mut byte).map(drop)
}

fn ask_on(stop: &AtomicBool, done: &AtomicU64, failed: &AtomicU64) {
    let target = SocketAddr::from((CLUSTER_IP, PORTS[0].1));
    while !stop.load(Ordering::Relaxed) {
        let counter = if ask(target).is_ok() { done } else { failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn ask(target: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[7])?;
    let mut byte = [0];
    stream.read_exact(&mut byte)
}
