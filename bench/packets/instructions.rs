//! Instructions that the packet line spends on one burst, counted by callgrind and compared with the committed
//! figures: a gate, because times on a shared machine say nothing about a few percent.
//!
//! ```text
//! bench/instructions              compares with bench/instructions.json; fails where one costs more than allowed
//! bench/instructions --renew      writes that file
//! ```
//!
//! A burst is what one turn of a lane works on (`pair.rs`): what the kernel does for it is not counted, and no
//! kernel is needed. The counts differ by some hundredths of a percent from run to run (keyed hashes), by more
//! with another compiler: then more is allowed.

pub mod pair;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};

use pair::{Carriage, Heading, Load, Pair};
use serde_json::{Value, json};
use warren::snapshot::Encap;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/instructions.json");
/// Percent that a burst may cost more than committed.
const TOLERANCE: f64 = 3.0;
/// The same where the compiler is not the one that the figures were made with.
const TOLERANCE_OTHER_COMPILER: f64 = 10.0;
/// Percent that a Service may add to a burst from pod to pod.
const SERVICE_MORE: f64 = 3.0;
/// Bursts of one count.
const BURSTS: u64 = 50;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [] => compare(&count_all()),
        ["--renew"] => renew(&count_all()),
        ["bursts", name] => bursts(name),
        _ => {
            eprintln!("bench/instructions [--renew]");
            ExitCode::from(2)
        }
    }
}

// --- what is counted -----------------------------------------------------------------------------

/// One line of the table.
struct Case {
    name: String,
    carriage: Carriage,
    heading: Heading,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for encap in [Encap::WireGuard, Encap::Vxlan] {
        for (what, service, load) in
            [("bulk", false, Load::Bulk), ("service", true, Load::Bulk), ("small", false, Load::Small)]
        {
            for (way, heading) in [("out", Heading::Out), ("in", Heading::In)] {
                let name = format!("{}-{what}-{way}", encap.name());
                cases.push(Case { name, carriage: Carriage { encap, service, load }, heading });
            }
        }
    }
    cases
}

/// What callgrind looks at: it counts in `one_burst`, and only there.
fn bursts(name: &str) -> ExitCode {
    let Some(case) = cases().into_iter().find(|case| case.name == name) else {
        eprintln!("no case is named {name}");
        return ExitCode::from(2);
    };
    let mut pair = Pair::new(case.carriage);
    for _ in 0..BURSTS {
        pair.prepare(case.heading);
        pair.one_burst(case.heading);
        pair.check(case.heading);
    }
    ExitCode::SUCCESS
}

fn count_all() -> BTreeMap<String, u64> {
    cases().into_iter().map(|case| (case.name.clone(), count(&case.name))).collect()
}

/// Instructions of one burst.
fn count(case: &str) -> u64 {
    let this = std::env::current_exe().expect("our own path");
    let mut valgrind = Command::new("valgrind");
    valgrind
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
        .arg("--toggle-collect=*one_burst*")
        .arg(&this)
        .args(["bursts", case]);
    let output = valgrind.output().expect("valgrind is needed: apt-get install valgrind");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    let count = log.lines().find_map(|line| line.split("Collected :").nth(1));
    let count: Option<u64> = count.and_then(|count| count.trim().parse().ok());
    count.filter(|count| *count > 0).unwrap_or_else(|| panic!("callgrind has counted nothing: {log}"))
        / BURSTS
}

// --- what it is compared with --------------------------------------------------------------------

fn renew(counts: &BTreeMap<String, u64>) -> ExitCode {
    let file = json!({
        "about": "Instructions of one burst, counted by callgrind. Written by `bench/instructions --renew`, checked by `tests/run instructions`.",
        "compiler": compiler(),
        "processor": processor(),
        "instructions": counts,
    });
    match std::fs::write(FILE, format!("{file:#}\n")) {
        Ok(()) => {
            println!("written to {FILE}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("cannot write {FILE}: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Bursts from pod to pod, and the same ones through a Service.
fn pairs(counts: &BTreeMap<String, u64>) -> Vec<(String, String)> {
    let services = counts.keys().filter(|name| name.contains("-service-"));
    services.map(|name| (name.replace("-service-", "-bulk-"), name.clone())).collect()
}

fn compare(counts: &BTreeMap<String, u64>) -> ExitCode {
    let text = std::fs::read_to_string(Path::new(FILE)).unwrap_or_else(|e| panic!("{FILE}: {e}"));
    let committed: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{FILE}: {e}"));
    let same_processor = committed["processor"] == processor();
    let same_compiler = committed["compiler"] == compiler();
    let allowed = if same_compiler { TOLERANCE } else { TOLERANCE_OTHER_COMPILER };

    println!("{:<24} {:>14} {:>14} {:>9}", "one burst", "instructions", "committed", "change");
    let (mut worse, mut better) = (Vec::new(), Vec::new());
    for (name, count) in counts {
        let Some(before) = committed["instructions"][name].as_u64() else {
            println!("{name:<24} {count:>14} {:>14}", "none");
            worse.push(name.as_str());
            continue;
        };
        let change = (*count as f64 / before as f64 - 1.0) * 100.0;
        println!("{name:<24} {count:>14} {before:>14} {change:>+7.2} %");
        if change > allowed {
            worse.push(name.as_str());
        } else if change < -TOLERANCE {
            better.push(name.as_str());
        }
    }
    println!("allowed: {allowed} % more");
    // Whatever the processor: both are counted here and now.
    let pairs = pairs(counts);
    assert!(!pairs.is_empty(), "no burst through a Service was counted");
    for (plain, service) in pairs {
        let more = (counts[&service] as f64 / counts[&plain] as f64 - 1.0) * 100.0;
        println!("{service}: {more:+.2} % to {plain}, allowed {SERVICE_MORE} %");
        if more > SERVICE_MORE {
            println!("FAILED: a Service costs too much");
            return ExitCode::FAILURE;
        }
    }
    if !same_compiler {
        let (theirs, ours) = (&committed["compiler"], compiler());
        println!("WARNING: the figures were made with {theirs}, this is {ours}: {allowed} % are allowed");
    }
    if !same_processor {
        println!(
            "WARNING: NOT COMPARED: the figures are for {}, this is {}",
            committed["processor"],
            processor()
        );
        return ExitCode::SUCCESS;
    }
    if !better.is_empty() && same_compiler {
        println!("cheaper now: {}; `bench/instructions --renew` keeps it so", better.join(", "));
    }
    if worse.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!(
        "FAILED: costs more than committed: {}. Where that is worth it, `bench/instructions --renew` writes the \
         new figures, and the commit says why.",
        worse.join(", ")
    );
    ExitCode::FAILURE
}

fn compiler() -> String {
    let output = Command::new("rustc").arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.trim().to_owned()
}

/// What the count depends on: valgrind gives all processors of a kind the same face, without AVX-512.
fn processor() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("bmi2") {
            "x86_64 with AVX2"
        } else {
            "x86_64 without AVX2"
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH
}
