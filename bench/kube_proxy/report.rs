//! The results: JSON, a section for each figure, and tables made of it.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::{fs, io};

use serde_json::{Value, json};

use crate::proxy;

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
        "debug_build": warren.contains("/debug/"),
        // Its work is system calls: optimizing it changes little.
        "bench_debug_build": cfg!(debug_assertions),
        "command": command(),
    })
}

/// What a person types for the same; what `bench/kube-proxy` adds is left out.
fn command() -> String {
    let mut words = vec!["bench/kube-proxy".to_owned()];
    let mut given = std::env::args().skip(1);
    while let Some(word) = given.next() {
        match word.as_str() {
            "--bench" => {}
            "--beside" | "--note" => drop(given.next()),
            _ => words.push(word),
        }
    }
    words.join(" ")
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
    let tables = tables(&all);
    fs::write(name.with_extension("md"), &tables)?;
    Ok(tables)
}

fn tables(all: &Value) -> String {
    let mut out = String::from("# Services, beside kube-proxy in nftables mode\n");
    if let Some(section) = all.get("connections") {
        connections(&mut out, section);
    }
    if let Some(section) = all.get("throughput") {
        throughput(&mut out, section);
    }
    if let Some(section) = all.get("rules") {
        rules(&mut out, section);
    }
    out
}

fn connections(out: &mut String, section: &Value) {
    let _ = writeln!(
        out,
        "\n## Connections per second through a ClusterIP\n\nConnect, one byte there and back, close; a pod of one node \
         to a pod of the other. {} client threads, as many of the server; ports {}. Median of {} interleaved rounds \
         of {} s (least to most).\n",
        section["threads"],
        text(&section["ports"]),
        section["rounds"],
        section["seconds"],
    );
    out.push_str("| | per second | beside | ratio of medians | ratios of single rounds | bar |\n");
    out.push_str("|---|---|---|---|---|---|\n");
    for row in rows(section) {
        let beside = &row["beside"];
        let cells = match beside.is_null() {
            true => "- | - | - | -".to_owned(),
            false => format!(
                "{} | {:.2} | {} | {}",
                text(&beside["peer"]),
                number(&beside["ratio"]),
                spread(&beside["ratio_by_round"], 2),
                beside["bar"]
            ),
        };
        let _ =
            writeln!(out, "| {} | {} | {cells} |", text(&row["contestant"]), spread(&row["per_second"], 0));
    }
    let samples = section["samples"].as_array().map_or(&[][..], Vec::as_slice);
    let failed: u64 = samples.iter().filter_map(|s| s["failed"].as_u64()).sum();
    let _ = writeln!(out, "\nConnections that failed: {failed}.\n");
    footer(out, section);
}

fn throughput(out: &mut String, section: &Value) {
    let _ = writeln!(
        out,
        "\n## One TCP stream, pod to pod and through a ClusterIP\n\niperf3 (cubic), {} interleaved rounds of pod, \
         Service, Service, pod, {} s each; loss: mean over rounds, with its 95 % interval.\n",
        section["rounds"], section["seconds"],
    );
    out.push_str(
        "| | pod, Gbit/s | Service, Gbit/s | loss, % | upper end must be below |\n|---|---|---|---|---|\n",
    );
    for row in rows(section) {
        let loss = &row["loss_percent"];
        let _ = writeln!(
            out,
            "| {} | {} | {} | {:.1} ({:.1} to {:.1}) | {} |",
            text(&row["contestant"]),
            spread(&row["pod_gbit"], 2),
            spread(&row["service_gbit"], 2),
            number(&loss["mean"]),
            number(&loss["low"]),
            number(&loss["high"]),
            loss["bar"],
        );
    }
    out.push('\n');
    footer(out, section);
}

fn rules(out: &mut String, section: &Value) {
    out.push_str(
        "\n## From nothing, and one change\n\n\
         kube-proxy: a process with a kernel; \"from nothing\" is its own first sync (its metric), and from the moment \
         it had all objects to the first answer through the last Service; a change is from the event to the first \
         connection that goes elsewhere. Warren (`bench/services`): state line and packet line in one process, without \
         kernel or watch; from objects in memory to applied, and from the event to the first packet that goes elsewhere. \
         A change replaces all endpoints of one Service.\n\n",
    );
    out.push_str(
        "| | Services | endpoints | from nothing | objects there to first answer | change, median | change, worst (Warren: p99) | memory |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for row in rows(section) {
        let _ = writeln!(
            out,
            "| kube-proxy | {} | {} | {} | {} | {} | {} | {:.0} MiB (process) |",
            row["services"],
            row["endpoints"],
            ms(&row["first_sync_ms"]),
            ms(&row["answers_after_ms"]),
            ms(&row["change_ms"]["median"]),
            ms(&row["change_ms"]["most"]),
            number(&row["peak_mib"]),
        );
    }
    for row in section["warren"].as_array().into_iter().flatten() {
        let _ = writeln!(
            out,
            "| Warren | {} | {} | {} | - | {} | {} | {:.0} MiB (growth by the compiled state) |",
            row["services"],
            row["endpoints"],
            ms(&row["from_nothing_ms"]),
            ms(&row["change_p50_ms"]),
            ms(&row["change_p99_ms"]),
            number(&row["memory_mib"]),
        );
    }
    out.push('\n');
    footer(out, section);
}

fn footer(out: &mut String, section: &Value) {
    let about = &section["about"];
    let note = match text(&about["note"]) {
        "" => String::new(),
        note => format!(" {note}"),
    };
    let _ = writeln!(
        out,
        "{} processors ({}), Linux {}, load before {}; {}, {}, {}, commit {}; `{}`.{}{}{}",
        about["processors"],
        text(&about["processor"]),
        text(&about["kernel"]),
        text(&about["load_before"]),
        text(&about["warren"]),
        text(&about["kube_proxy"]),
        text(&about["nft"]),
        text(&about["commit"]),
        text(&about["command"]),
        if about["bench_debug_build"] == true { " The bench program was a debug build." } else { "" },
        if about["debug_build"] == true { " **A debug build: these figures mean nothing.**" } else { "" },
        note,
    );
    for row in rows(section).iter().filter(|row| row["settings"].is_string()) {
        let _ = writeln!(out, "- {}: {}", text(&row["contestant"]), text(&row["settings"]));
    }
}

fn rows(section: &Value) -> &[Value] {
    section["rows"].as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn spread(value: &Value, digits: usize) -> String {
    let [median, least, most] = ["median", "least", "most"].map(|key| number(&value[key]));
    format!("{median:.digits$} ({least:.digits$} to {most:.digits$})")
}

fn ms(value: &Value) -> String {
    match number(value) {
        long if long >= 5_000.0 => format!("{:.1} s", long / 1000.0),
        ms if ms >= 10.0 => format!("{ms:.0} ms"),
        ms => format!("{ms:.2} ms"),
    }
}

/// The first line that a program prints.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}
