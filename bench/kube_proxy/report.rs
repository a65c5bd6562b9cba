//! The results: JSON, a section for each figure.

use std::path::Path;
use std::process::Command;
use std::{fs, io};

use serde_json::{Value, json};

use crate::{build, proxy, tables};

/// The middle of some values, and their ends.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The middle.
    pub median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Spread {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        let (least, most) = (values[0], values[values.len() - 1]);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Spread { median: f64::midpoint(low, high), least, most }
    }

    /// For the results.
    pub fn json(self) -> Value {
        json!({"median": self.median, "least": self.least, "most": self.most})
    }
}

/// The mean, and half the width of its 95 % interval (Student's t).
pub fn interval(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    // The 97.5 % point by n - 1 degrees of freedom: Cornish and Fisher's expansion, right to 0.01 from 5 on.
    let (z, v) = (1.959_964_f64, n - 1.0);
    let t = z + (z.powi(3) + z) / (4.0 * v) + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * v * v);
    (mean, t * (variance / n).sqrt())
}

/// What was measured, on what.
pub fn about(warren: &str) -> Value {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    json!({
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "processor": model.map_or("unknown", |(_, name)| name),
        "kernel": said("uname", &["-r"]).split('-').next(),
        "load_before": fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next(),
        "nft": said("nft", &["--version"]),
        "commit": said("git", &["describe", "--always", "--dirty"]),
        "warren": said(warren, &["--version"]),
        "kube_proxy": proxy::version(),
        // One version has many builds.
        "sha256": said("sha256sum", &[warren]).get(..12),
        "build": build::measured(),
        "debug_build": warren.contains("/debug/"),
        // Its work is system calls: optimizing it changes little.
        "bench_debug_build": cfg!(debug_assertions),
        "command": command(),
    })
}

/// The same where no agent is measured, but a program that `cargo bench` builds from this tree; its rows say whether it
/// is a debug build.
pub fn about_one_process() -> Value {
    let mut about = about(env!("CARGO_BIN_EXE_warren"));
    about["build"] = json!("cargo bench");
    about["sha256"] = Value::Null;
    about["debug_build"] = json!(false);
    about
}

/// What a person types for the same; what `bench/kube-proxy` adds is left out.
fn command() -> String {
    let mut words = vec!["bench/kube-proxy".to_owned()];
    let mut given = std::env::args().skip(1);
    while let Some(word) = given.next() {
        match word.as_str() {
            "--bench" => {}
            // Nor does it matter where the results go.
            "--beside" | "--note" | "--output" => drop(given.next()),
            "changes" | "instructions" => {
                words.push(word);
                drop(given.next());
            }
            _ => words.push(word),
        }
    }
    // Where no agent is measured, it does not matter which one was given.
    let has_agent = words.iter().any(|word| word == "connections" || word == "throughput");
    let prefix = if has_agent { build::prefix(&build::measured()) } else { String::new() };
    prefix + &words.join(" ")
}

/// Puts a section into `NAME.json`, if there is one, and makes `NAME.md` of all that are there; gives the tables.
pub fn write(name: &Path, section: &str, mut content: Value, note: &str) -> io::Result<String> {
    if let Some(folder) = name.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = name.with_extension("json");
    let old = fs::read_to_string(&file).ok().and_then(|text| serde_json::from_str(&text).ok());
    let mut all: Value = old.unwrap_or_else(|| json!({}));
    if !content.is_null() {
        content["about"]["note"] = json!(note);
        all[section] = content;
        fs::write(&file, serde_json::to_string_pretty(&all)? + "\n")?;
    }
    let tables = tables::all(&all, "#");
    fs::write(name.with_extension("md"), &tables)?;
    Ok(tables)
}

/// The first line that a program prints.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}
