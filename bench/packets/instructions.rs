//! Instructions that the packet line spends on one burst, counted by callgrind and compared with the committed
//! figures: a gate, because times on a shared machine say nothing about a few percent.
//!
//! ```text
//! bench/instructions              compares with bench/instructions.json (`committed`); fails where one costs more
//!                                 than allowed, and ends with 3 where the processor is another: nothing is known
//! bench/instructions --renew      writes that file
//! ```
//!
//! A burst is what one turn of a lane works on (`pair.rs`): what the kernel does for it is not counted, and no
//! kernel is needed. The counts differ by some hundredths of a percent from run to run (keyed hashes), by more
//! with another compiler: then more is allowed.

pub mod committed;
pub mod pair;
pub mod verdict;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};

use pair::{Carriage, Heading, Load, Pair};
use serde_json::{Value, json};
use warren::snapshot::Encap;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/instructions.json");
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

fn compare(counts: &BTreeMap<String, u64>) -> ExitCode {
    let text = std::fs::read_to_string(Path::new(FILE)).unwrap_or_else(|e| panic!("{FILE}: {e}"));
    let committed: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{FILE}: {e}"));
    let (verdict, table) = committed::judge(&committed, counts, &compiler(), processor());
    print!("{table}");
    verdict.exit_code()
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
