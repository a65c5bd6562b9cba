//! Services side by side: Warren, and kube-proxy over other people's tunnels.
//!
//! ```text
//! bench/kube-proxy                           everything: about 15 minutes
//! bench/kube-proxy connections               connections per second through a ClusterIP
//! bench/kube-proxy throughput                one TCP stream, to the pod and to its Service
//! bench/kube-proxy rules --services 1000     how long kube-proxy takes to program Services, and a change
//! bench/kube-proxy changes                   the same of Warren alone, in one process
//! bench/kube-proxy instructions              what a Service adds to a burst, counted
//! ```
//!
//! Each figure is written into the results on its own; those of the others stay. Needs root, iperf3, nft and
//! `tests/peers.sh kube-proxy`. kube-proxy reads its objects from a small API server of ours ([`api`]).

#[allow(dead_code)] // the tests' laboratory, of which measurements need a part
#[path = "../../tests/kernel/lab/mod.rs"]
pub mod lab;

pub mod api;
#[path = "../build.rs"]
pub mod build;
pub mod connections;
#[path = "../objects.rs"]
pub mod objects;
#[path = "../order.rs"]
pub mod order;
pub mod proxy;
pub mod report;
pub mod rules;
pub mod stand;
pub mod tables;
pub mod throughput;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use clap::{Parser, Subcommand};
use serde_json::{Value, json};

/// What to measure, and where the results go.
#[derive(Debug, Parser)]
#[command(about = "Measures Warren's Services beside kube-proxy", long_about = None)]
struct Arguments {
    #[command(subcommand)]
    figure: Figure,
    /// Where the results go: NAME.json and NAME.md.
    #[arg(long, global = true, default_value = "bench/results/latest-services")]
    output: PathBuf,
    /// A sentence to stand under the table: what else was going on, which build.
    #[arg(long, global = true, default_value = "")]
    note: String,
    /// Given by `cargo bench`.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum Figure {
    /// Connections per second: connect, one byte there and back, close.
    Connections(connections::Options),
    /// One TCP stream pod to pod, directly and through a ClusterIP.
    Throughput(throughput::Options),
    /// kube-proxy's time from nothing, and for one change.
    Rules(rules::Options),
    /// Nothing: takes in what `bench/services --json` has said.
    Changes {
        /// Where.
        said: PathBuf,
    },
    /// Nothing: takes in what `bench/services instructions --json` has said.
    Instructions {
        /// Where.
        said: PathBuf,
    },
    /// Nothing: makes NAME.md of NAME.json again.
    Tables,
}

/// What another program of ours has said, as a section of the results.
fn taken_in(said: &Path) -> io::Result<Value> {
    let rows: Value = serde_json::from_str(&fs::read_to_string(said)?)?;
    let mut about = report::about_one_process();
    // Nothing was measured from here.
    about["bench_debug_build"] = json!(false);
    Ok(json!({ "about": about, "rows": rows }))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (name, section) = match &arguments.figure {
        Figure::Connections(options) => ("connections", Ok(connections::measure(options))),
        Figure::Throughput(options) => ("throughput", Ok(throughput::measure(options))),
        Figure::Rules(options) => ("rules", Ok(rules::measure(options))),
        Figure::Changes { said } => ("changes", taken_in(said)),
        Figure::Instructions { said } => ("instructions", taken_in(said)),
        Figure::Tables => ("", Ok(Value::Null)),
    };
    let written =
        section.and_then(|section| report::write(&arguments.output, name, section, &arguments.note));
    match written {
        Ok(tables) => {
            println!("{tables}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("cannot write the results to {}: {e}", arguments.output.display());
            ExitCode::FAILURE
        }
    }
}
