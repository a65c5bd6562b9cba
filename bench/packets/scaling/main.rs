//! Whether the packet line scales with processors: two lanes of a node on two threads, beside one lane on one.
//!
//! ```text
//! bench/scaling                  all; ends with 3 where this machine cannot show it
//! bench/scaling --one-lock       the same with a lock around each turn: fails, as it should
//! ```
//!
//! As in [`pair`] all is in memory: the lanes share what lanes of a node share (the table of flows, affinity, MAC
//! addresses, the snapshot), each has a flow of its own through the Service, and works on bursts out and in by turns.
//! One lane and two are measured by turns; the best of several short tries counts, as other programs can only take
//! away.

pub mod judge;
#[path = "../pair.rs"]
pub mod pair;
#[path = "../verdict.rs"]
pub mod verdict;

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pair::{Bursts, Carriage, Load, Pair, Shared};
use verdict::Verdict;
use warren::snapshot::Encap;

/// Tries of each, at least. Each takes about a millisecond, in which other programs seldom come between.
const TRIES: usize = 40;
/// How long it goes on where the bar is not reached and two processors could reach it.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let one_lock = match words[..] {
        [] => false,
        ["--one-lock"] => true,
        _ => {
            eprintln!("bench/scaling [--one-lock]");
            return ExitCode::from(2);
        }
    };
    let mut worst = Verdict::Kept;
    println!("{:<18} {:>16} {:>16} {:>7}", "packets a second", "1 lane", "2 lanes", "ratio");
    for encap in [Encap::WireGuard, Encap::Vxlan] {
        for (name, load, bursts) in [("bulk", Load::Bulk, bulk(encap)), ("small", Load::Small, 100)] {
            let carriage = Carriage { encap, service: true, load };
            let mut rates = Rates::of(carriage, bursts, Between::Node { one_lock });
            println!(
                "{:<18} {:>16.0} {:>16.0} {:>7.2}",
                format!("{}-{name}", encap.name()),
                rates.one,
                rates.two,
                rates.ratio()
            );
            let apart = || Rates::of(carriage, bursts, Between::Nothing).ratio();
            let (mut verdict, mut text) = judge::judge(processors(), rates.ratio(), apart);
            if verdict == Verdict::Broken {
                // The others may have had the quieter moment.
                rates = Rates::of(carriage, bursts, Between::Node { one_lock });
                println!(
                    "{:<18} {:>16.0} {:>16.0} {:>7.2}",
                    "once more",
                    rates.one,
                    rates.two,
                    rates.ratio()
                );
                (verdict, text) = judge::judge(processors(), rates.ratio(), apart);
            }
            if verdict != Verdict::Kept {
                println!("{text}");
            }
            worst = match (worst, verdict) {
                (Verdict::Broken, _) | (_, Verdict::Broken) => Verdict::Broken,
                (Verdict::NotCompared, _) | (_, Verdict::NotCompared) => Verdict::NotCompared,
                (Verdict::Kept, Verdict::Kept) => Verdict::Kept,
            };
        }
    }
    worst.exit_code()
}

/// That this process may use.
fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Super-packets of one try.
fn bulk(encap: Encap) -> usize {
    match encap {
        Encap::WireGuard => 15,
        Encap::Vxlan => 100,
    }
}

/// What two lanes have in common.
#[derive(Clone, Copy)]
enum Between {
    /// They are of one node.
    Node {
        /// And may not work at the same time.
        one_lock: bool,
    },
    /// Nothing: they are of two nodes.
    Nothing,
}

/// Packets a second, the best of all tries.
#[derive(Clone, Copy, Default)]
struct Rates {
    one: f64,
    two: f64,
}

impl Rates {
    fn ratio(self) -> f64 {
        self.two / self.one
    }

    fn of(carriage: Carriage, bursts: usize, between: Between) -> Rates {
        let node = || [0, 1].map(|number| Shared::of(number, carriage.encap, 2));
        let first = node();
        let second = match between {
            Between::Node { .. } => first.clone(),
            Between::Nothing => node(),
        };
        let mut lanes = [(0, &first), (1, &second)].map(|(lane, of)| Pair::of_lane(carriage, lane, of));
        let lock = match between {
            Between::Node { one_lock: true } => Some(Mutex::new(())),
            Between::Node { one_lock: false } | Between::Nothing => None,
        };
        let mut best = Rates::default();
        let begun = now();
        for number in 0.. {
            // Which of the lanes is the one alone does not matter: they take turns.
            best.one = best.one.max(packets_a_second(&mut lanes[number % 2..][..1], bursts, lock.as_ref()));
            best.two = best.two.max(packets_a_second(&mut lanes, bursts, lock.as_ref()));
            let is_settled = best.ratio() >= judge::BAR || processors() < 2;
            if number >= TRIES && (is_settled || now().duration_since(begun) > PATIENCE) {
                break;
            }
        }
        best
    }
}

/// All lanes at once, each on a thread: from when the first begins until the last has ended.
fn packets_a_second(lanes: &mut [Pair], bursts: usize, lock: Option<&Mutex<()>>) -> f64 {
    let expected = lanes.iter().map(Pair::packets).sum::<usize>() * bursts * 2;
    let threads = lanes.len();
    let (prepared, ready) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = |lane: &mut Pair| {
        let mut work = lane.prepare_many(bursts);
        prepared.fetch_add(1, Ordering::SeqCst);
        while prepared.load(Ordering::SeqCst) < threads {
            thread::yield_now();
        }
        // Who waits here does so on a processor: when it begins, all of them have one.
        ready.fetch_add(1, Ordering::SeqCst);
        while ready.load(Ordering::SeqCst) < threads {
            std::hint::spin_loop();
        }
        let begun = now();
        let packets = run(lane, &mut work, lock);
        (begun, now(), packets)
    };
    let done: Vec<(Instant, Instant, usize)> = thread::scope(|scope| {
        let threads: Vec<_> = lanes.iter_mut().map(|lane| scope.spawn(|| work(lane))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a lane that works")).collect()
    });
    assert_eq!(done.iter().map(|(_, _, packets)| packets).sum::<usize>(), expected, "packets came through");
    let begun = done.iter().map(|(begun, _, _)| *begun).min().expect("a lane");
    let ended = done.iter().map(|(_, ended, _)| *ended).max().expect("a lane");
    expected as f64 / ended.duration_since(begun).as_secs_f64()
}

fn run(lane: &mut Pair, bursts: &mut Bursts, lock: Option<&Mutex<()>>) -> usize {
    let _turn = lock.map(|lock| lock.lock().expect("no lane has died"));
    lane.run(bursts)
}

#[allow(clippy::disallowed_methods)] // a benchmark reads the clock; io::clock is not part of the core
fn now() -> Instant {
    Instant::now()
}
