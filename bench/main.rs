//! Side by side: Warren, other people's userspace tunnels, and the kernel's VXLAN, on one machine. What can be
//! said on the command line is in `bench/run`.
//!
//! Two namespaces joined by one veth pair; both ends and both agents share the machine's processors. In every
//! round each contestant is set up anew and measured once, so that what the machine does meanwhile hits all of
//! them alike: ratios hold where absolute figures drift. Needs root, iperf3 and `tests/peers.sh`.
//!
//! 1. `contestant`, `order`: who, how it is set up, and when it is its turn
//! 2. `figure`, `measure`, `ping_pong`, `cpu`, `idle`: what is run, and what is read off
//! 3. `results`: samples, medians, JSON
//! 4. `report`, `goals`, `service_tables`, `plot`: tables and charts, from the JSON alone
//!
//! Services are measured by `bench/kube-proxy`; `bench/run` calls it too, and its results are taken in here.

#[allow(dead_code)] // the tests' laboratory, of which measurements need a part
#[path = "../tests/kernel/lab/mod.rs"]
pub mod lab;

pub mod build;
pub mod contestant;
pub mod cpu;
pub mod figure;
pub mod goals;
pub mod idle;
pub mod measure;
pub mod order;
pub mod ping_pong;
pub mod plot;
pub mod report;
pub mod results;
#[path = "kube_proxy/tables.rs"]
pub mod service_tables;

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use clap::Parser;
use serde_json::json;

use contestant::{Contestant, Running};
use figure::{Figure, Work};
use results::{Reading, Results};

/// Idle programs are looked at until there are so many samples.
const IDLE_ROUNDS: usize = 5;

/// What to measure, and how long.
#[derive(Debug, Parser)]
#[command(about = "Measures Warren beside other tunnels", long_about = None)]
struct Arguments {
    /// How often each contestant is measured; the tables show medians.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each measurement, after one second that does not count.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// MTU of the cable.
    #[arg(long, default_value_t = 1500)]
    mtu: u32,
    /// Lanes of Warren's agents: a number, or `auto`, which is their default.
    #[arg(long, default_value = "auto")]
    lanes: String,
    /// Only these contestants.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Contestant>,
    /// Only these runs; also by those contestants who usually leave them out.
    #[arg(long, value_delimiter = ',')]
    tests: Vec<Work>,
    /// Where the results go: NAME.json and NAME.md.
    #[arg(long, default_value = "bench/results/latest")]
    output: PathBuf,
    /// Adds rounds to those that are there already, of the same build, machine and settings. Ratios are of rounds of one
    /// command: who is added alone has none.
    #[arg(long)]
    append: bool,
    /// Measures nothing: makes tables, plots, bench/RESULTS.md and README's part from these results.
    #[arg(long, value_name = "JSON")]
    render: Option<PathBuf>,
    /// Measures nothing: puts what `bench/kube-proxy --output NAME` has measured into the results.
    #[arg(long, value_name = "NAME.json", conflicts_with = "render")]
    take_services: Option<PathBuf>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match (&arguments.render, &arguments.take_services) {
        (Some(json), _) => report::render(json)
            .map(|files| files.iter().map(|file| format!("{}\n", file.display())).collect::<String>()),
        (None, Some(services)) => take_services(&arguments.output, services),
        (None, None) => begin(&arguments).and_then(|results| measure_all(&arguments, results)),
    };
    match done {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            let file = arguments.render.as_ref().unwrap_or(&arguments.output);
            eprintln!("{}: {e}", file.display());
            ExitCode::FAILURE
        }
    }
}

/// Results without samples, or with those of the rounds before.
fn begin(arguments: &Arguments) -> io::Result<Results> {
    let contestants = or_all(&arguments.only, &Contestant::ALL);
    let settings = json!({
        "seconds": arguments.seconds, "underlay_mtu": arguments.mtu, "lanes": arguments.lanes,
    });
    let mut results = Results::new(settings, &contestants);
    if arguments.append {
        let before = fs::read_to_string(arguments.output.with_extension("json"))?;
        results.continue_after(Results::read(&before)?)?;
    }
    Ok(results)
}

fn take_services(output: &Path, services: &Path) -> io::Result<String> {
    let mut results = Results::read(&fs::read_to_string(output.with_extension("json"))?)?;
    results.take_services(serde_json::from_str(&fs::read_to_string(services)?)?);
    report::write(&results, output)
}

/// Writes what there is after each contestant: an hour's work should not be lost with its last minute.
fn measure_all(arguments: &Arguments, mut results: Results) -> io::Result<String> {
    let contestants = or_all(&arguments.only, &Contestant::ALL);
    let last = results.last_round();
    let mut page = String::new();
    for round in last + 1..=last + arguments.rounds {
        for index in order::of(contestants.len(), round) {
            let contestant = contestants[index];
            let (idle, works): (Vec<Work>, Vec<Work>) =
                arguments.works_of(contestant).into_iter().partition(|work| *work == Work::Idle);
            if !works.is_empty() {
                let running = caught(|| Ok(contestant.set_up(arguments.mtu, &arguments.lanes)));
                if let Some(lanes) = running.as_ref().ok().and_then(Running::lanes) {
                    results.has_lanes(contestant, lanes);
                }
                for &work in &works {
                    let measured = running.as_ref().map_err(String::clone);
                    let measured = measured.and_then(|on| caught(|| work.measure(on, arguments.seconds)));
                    add(&mut results, round, contestant, work, measured);
                }
            }
            let is_known = results.count(contestant, Figure::IdleMemory) >= IDLE_ROUNDS;
            if !idle.is_empty() && !is_known && idle::is_measured(contestant) {
                let seconds = arguments.seconds * idle::TIMES;
                let measured = caught(|| idle::measure(contestant, &arguments.lanes, seconds));
                add(&mut results, round, contestant, Work::Idle, measured);
            }
            page = report::write(&results, &arguments.output)?;
        }
    }
    Ok(page)
}

impl Arguments {
    /// What is asked for, or what it usually does.
    fn works_of(&self, contestant: Contestant) -> Vec<Work> {
        match self.tests.as_slice() {
            [] => Work::ALL.into_iter().filter(|work| contestant.usually_does(*work)).collect(),
            asked => asked.to_vec(),
        }
    }
}

/// What goes wrong costs a sample, not the run: the laboratory panics, as tests do.
fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(text.unwrap_or_else(|| "panicked".to_owned()))
    })
}

fn add(
    results: &mut Results,
    round: u32,
    contestant: Contestant,
    work: Work,
    measured: Result<Vec<Option<Reading>>, String>,
) {
    for (index, &figure) in work.figures().iter().enumerate() {
        let value = match &measured {
            Ok(values) => match values.get(index).copied().flatten() {
                Some(value) => Ok(value),
                // It has no such thing.
                None => continue,
            },
            Err(error) => Err(error.clone()),
        };
        let shown = value.as_ref().map_or_else(String::clone, |reading| figure.show(reading.value));
        eprintln!("round {round}: {}, {}: {shown}", contestant.name(), figure.name());
        results.add(round, contestant, figure, value);
    }
}

fn or_all<T: Copy>(chosen: &[T], all: &[T]) -> Vec<T> {
    if chosen.is_empty() { all.to_vec() } else { chosen.to_vec() }
}
