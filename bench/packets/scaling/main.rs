//! Whether the packet line scales with processors: two lanes of a node on two threads, beside one lane on one.
//!
//! ```text
//! bench/scaling                  all; ends with 3 where this machine cannot show it
//! bench/scaling --one-lock       the same with a lock around each turn: fails, as it should
//! ```
//!
//! As in [`pair`] all is in memory: the lanes share what lanes of a node share (the table of flows, affinity, MAC
//! addresses, the snapshot), each sends a flow of its own through the Service, and works on bursts out and in by turns.
//! What comes in is its own flow's, or, `crossed`, the other's: each node chooses the sending lane by its own hash, so
//! a flow mostly leaves by one lane and comes back by another, and two threads write to its entry of the table.
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

use judge::Both;
use pair::{Bursts, Carriage, Load, Pair, Shared};
use verdict::Verdict;
use warren::snapshot::Encap;

/// Tries of each, at least. Each takes about a millisecond, in which other programs seldom come between.
const TRIES: usize = 40;
/// How long it goes on beside lanes that share nothing, where the bar is not reached.
const PATIENCE: Duration = Duration::from_secs(5);

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
    println!("{:<26} {:>16} {:>16} {:>7}", "packets a second", "1 lane", "2 lanes", "ratio");
    for encap in [Encap::WireGuard, Encap::Vxlan] {
        for (load, bursts) in [(Load::Bulk, bulk(encap)), (Load::Small, 100)] {
            for between in [Between::Node, Between::NodeCrossed] {
                let work = Work { carriage: Carriage { encap, service: true, load }, bursts };
                let verdict = measure(work, between, one_lock);
                worst = match (worst, verdict) {
                    (Verdict::Broken, _) | (_, Verdict::Broken) => Verdict::Broken,
                    (Verdict::NotCompared, _) | (_, Verdict::NotCompared) => Verdict::NotCompared,
                    (Verdict::Kept, Verdict::Kept) => Verdict::Kept,
                };
            }
        }
    }
    worst.exit_code()
}

/// Measures, says and judges it.
fn measure(work: Work, between: Between, one_lock: bool) -> Verdict {
    let mut shared = Tries::of(work, between, one_lock);
    for number in 0..TRIES {
        shared.make(number);
    }
    shared.best.say(&work.name(between));
    let again = || {
        // Both anew, by turns: what the machine does meanwhile hits both.
        let mut shared = Tries::of(work, between, one_lock);
        let mut apart = Tries::of(work, Between::Nothing, false);
        let begun = now();
        for number in 0.. {
            shared.make(number);
            apart.make(number);
            let is_enough = shared.best.ratio() >= judge::BAR || now().duration_since(begun) > PATIENCE;
            if number >= TRIES && is_enough {
                break;
            }
        }
        shared.best.say("  once more");
        apart.best.say("  and sharing nothing");
        Both { shared: shared.best.ratio(), apart: apart.best.ratio() }
    };
    let (verdict, text) = judge::judge(processors(), shared.best.ratio(), again);
    if verdict != Verdict::Kept {
        println!("{text}");
    }
    verdict
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

/// What is carried in one try.
#[derive(Clone, Copy)]
struct Work {
    carriage: Carriage,
    bursts: usize,
}

impl Work {
    fn name(self, between: Between) -> String {
        let load = match self.carriage.load {
            Load::Bulk => "bulk",
            Load::Small => "small",
        };
        let crossed = match between {
            Between::NodeCrossed => " crossed",
            Between::Node | Between::Nothing => "",
        };
        format!("{}-{load}{crossed}", self.carriage.encap.name())
    }
}

/// What two lanes have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    /// They are of one node, each with a flow of its own.
    Node,
    /// They are of one node; what one sends, the other one receives the answers to.
    NodeCrossed,
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

    fn say(self, what: &str) {
        println!("{what:<26} {:>16.0} {:>16.0} {:>7.2}", self.one, self.two, self.ratio());
    }
}

/// Two lanes, and what was measured of them.
struct Tries {
    lanes: [Pair; 2],
    bursts: usize,
    /// If they may not work at the same time.
    lock: Option<Mutex<()>>,
    best: Rates,
}

impl Tries {
    fn of(Work { carriage, bursts }: Work, between: Between, one_lock: bool) -> Tries {
        let node = || [0, 1].map(|number| Shared::of(number, carriage.encap, 2));
        let first = node();
        let second = match between {
            Between::Node | Between::NodeCrossed => first.clone(),
            Between::Nothing => node(),
        };
        let mut lanes = [(0, &first), (1, &second)].map(|(lane, of)| Pair::of_lane(carriage, lane, of));
        if between == Between::NodeCrossed {
            lanes[0].cross(1);
            lanes[1].cross(0);
            for (lane, number) in lanes.iter_mut().zip(0..) {
                let mut once = lane.prepare_many(1);
                lane.run(&mut once);
                assert_eq!(
                    first[0].seen_by(),
                    [number; 2],
                    "a lane sees both flows, and there are no others"
                );
            }
        }
        Tries { lanes, bursts, lock: one_lock.then(Mutex::default), best: Rates::default() }
    }

    /// One try of one lane, and one of two.
    fn make(&mut self, number: usize) {
        let (bursts, lock, best) = (self.bursts, self.lock.as_ref(), &mut self.best);
        // Which of the lanes is the one alone does not matter: they take turns.
        best.one = best.one.max(packets_a_second(&mut self.lanes[number % 2..][..1], bursts, lock));
        best.two = best.two.max(packets_a_second(&mut self.lanes, bursts, lock));
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
