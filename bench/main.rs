//! Side by side: Warren, other people's userspace WireGuard, and the kernel's VXLAN, on one machine.
//!
//! ```text
//! bench/run                                  everything, 5 rounds of 5 s: about 50 minutes
//! bench/run --rounds 1 --seconds 1           a quick look
//! bench/run --only warren-wireguard,wireguard-go --tests tcp,ping-pong
//! WARREN=path/to/warren bench/run            another build of Warren
//! ```
//!
//! Two namespaces joined by one veth pair; both ends and both agents share the machine's processors. In every
//! round each contestant is set up anew and measured once, so that what the machine does meanwhile hits all of
//! them alike: ratios hold where absolute figures drift. Needs root, iperf3, sockperf and `tests/peers.sh`.

// The tests' laboratory, of which measurements need a part.
#[allow(dead_code)]
#[path = "../tests/kernel/lab/mod.rs"]
pub mod lab;

pub mod contestant;
pub mod measure;
pub mod report;

use std::process::ExitCode;

use clap::Parser;

use contestant::Contestant;
use measure::Figure;
use report::{Results, Sample};

/// What to measure, and how long.
#[derive(Debug, Parser)]
#[command(about = "Measures Warren beside other tunnels", long_about = None)]
struct Arguments {
    /// How often each contestant is measured; the table shows medians.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each measurement, after one second that does not count.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// MTU of the cable.
    #[arg(long, default_value_t = 1500)]
    mtu: u32,
    /// Lanes of Warren's agents; more than one is shown as a contestant of its own name.
    #[arg(long, default_value_t = 1)]
    lanes: u8,
    /// Only these contestants.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Contestant>,
    /// Only these figures.
    #[arg(long, value_delimiter = ',')]
    tests: Vec<Figure>,
    /// Where the results go: NAME.json and NAME.md.
    #[arg(long, default_value = "bench/results/latest")]
    output: std::path::PathBuf,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let contestants = or_all(&arguments.only, &Contestant::ALL);
    let figures = or_all(&arguments.tests, &Figure::ALL);
    let mut results = Results::new(arguments.rounds, arguments.seconds, arguments.mtu, arguments.lanes);
    for round in 1..=arguments.rounds {
        for &contestant in &contestants {
            let running = contestant.set_up(arguments.mtu, arguments.lanes);
            for &figure in &figures {
                let measured = figure.measure(&running, arguments.seconds);
                let shown = measured.as_ref().map_or_else(String::clone, |v| format!("{v:.2}"));
                eprintln!("round {round}: {}, {}: {shown}", contestant.name(), figure.name());
                results.add(Sample { round, contestant, figure, value: measured });
            }
        }
    }
    match results.write(&arguments.output) {
        Ok(table) => {
            println!("{table}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("cannot write the results to {}: {e}", arguments.output.display());
            ExitCode::FAILURE
        }
    }
}

fn or_all<T: Copy>(chosen: &[T], all: &[T]) -> Vec<T> {
    if chosen.is_empty() { all.to_vec() } else { chosen.to_vec() }
}
