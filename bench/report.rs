//! Medians with their spread, as JSON for programs and a table for people.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::{fs, io};

use serde_json::{Value, json};

use crate::contestant::Contestant;
use crate::lab::agent::warren;
use crate::measure::Figure;

/// One measurement.
#[derive(Debug)]
pub struct Sample {
    /// Counts from 1.
    pub round: u32,
    /// Whose.
    pub contestant: Contestant,
    /// Of what.
    pub figure: Figure,
    /// The value, or why there is none.
    pub value: Result<f64, String>,
}

/// Everything that was measured, and on what.
#[derive(Debug)]
pub struct Results {
    about: Value,
    samples: Vec<Sample>,
}

/// The middle of some values, and their ends.
#[derive(Clone, Copy, Debug)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Results {
    /// Nothing yet; asks the machine what it is.
    pub fn new(rounds: u32, seconds: u32, mtu: u32, lanes: u8) -> Results {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let about = json!({
            "rounds": rounds,
            "seconds": seconds,
            "underlay_mtu": mtu,
            "lanes": lanes,
            "processors": std::thread::available_parallelism().map_or(0, usize::from),
            "processor": model.map_or("unknown", |(_, name)| name),
            "kernel": said("uname", &["-r"]),
            "iperf3": said("iperf3", &["--version"]),
            "commit": said("git", &["describe", "--always", "--dirty"]),
            "warren": said(&warren(), &["--version"]),
            "debug_build": warren().contains("/debug/"),
        });
        Results { about, samples: Vec::new() }
    }

    /// One more.
    pub fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// Writes `NAME.json` and `NAME.md`; gives the table.
    pub fn write(&self, name: &Path) -> io::Result<String> {
        if let Some(folder) = name.parent() {
            fs::create_dir_all(folder)?;
        }
        let table = self.table();
        fs::write(name.with_extension("md"), &table)?;
        fs::write(name.with_extension("json"), serde_json::to_string_pretty(&self.json())? + "\n")?;
        Ok(table)
    }

    fn spread(&self, contestant: Contestant, figure: Figure) -> Option<Spread> {
        let samples = self.samples.iter().filter(|s| s.contestant == contestant && s.figure == figure);
        let mut values: Vec<f64> = samples.filter_map(|s| s.value.as_ref().ok().copied()).collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Spread { median: f64::midpoint(low, high), least, most })
    }

    fn contestants(&self) -> Vec<Contestant> {
        let present = |c: &Contestant| self.samples.iter().any(|s| s.contestant == *c);
        Contestant::ALL.into_iter().filter(present).collect()
    }

    fn figures(&self) -> Vec<Figure> {
        let present = |f: &Figure| self.samples.iter().any(|s| s.figure == *f);
        Figure::ALL.into_iter().filter(present).collect()
    }

    fn json(&self) -> Value {
        let samples: Vec<Value> = self
            .samples
            .iter()
            .map(|s| {
                let (value, error) = match &s.value {
                    Ok(value) => (Some(value), None),
                    Err(error) => (None, Some(error)),
                };
                json!({
                    "round": s.round, "contestant": s.contestant.name(), "figure": s.figure.name(),
                    "value": value, "error": error,
                })
            })
            .collect();
        let medians: Vec<Value> = self
            .contestants()
            .into_iter()
            .flat_map(|c| self.figures().into_iter().map(move |f| (c, f)))
            .filter_map(|(c, f)| {
                let s = self.spread(c, f)?;
                let (median, least, most) = (s.median, s.least, s.most);
                Some(json!({
                    "contestant": c.name(), "figure": f.name(),
                    "median": median, "least": least, "most": most,
                }))
            })
            .collect();
        json!({ "about": self.about, "medians": medians, "samples": samples })
    }

    fn table(&self) -> String {
        let mut out = String::from("# Side by side\n\n");
        let about = &self.about;
        let _ = writeln!(
            out,
            "Median of {} rounds of {} s (least to most), interleaved. {} processors ({}), Linux {}, veth MTU {}, \
             Warren {} with {} lane(s), commit {}.{}\n",
            about["rounds"],
            about["seconds"],
            about["processors"],
            about["processor"].as_str().unwrap_or_default(),
            about["kernel"].as_str().unwrap_or_default(),
            about["underlay_mtu"],
            about["warren"].as_str().unwrap_or_default(),
            about["lanes"],
            about["commit"].as_str().unwrap_or_default(),
            if about["debug_build"] == true { " **A debug build: these figures mean nothing.**" } else { "" },
        );
        self.rows(&mut out, |c, f| self.spread(c, f).map(|s| show(s, f)));
        for reference in [Contestant::WireguardGo, Contestant::KernelVxlan] {
            if self.contestants().contains(&reference) {
                let _ = writeln!(out, "\nRatio of medians to {}:\n", reference.name());
                self.rows(&mut out, |c, f| {
                    let (mine, its) = (self.spread(c, f)?, self.spread(reference, f)?);
                    Some(format!("{:.2}", mine.median / its.median))
                });
            }
        }
        out.push_str("\nSettings:\n\n");
        for contestant in self.contestants() {
            let _ = writeln!(out, "- {}: {}", contestant.name(), contestant.settings());
        }
        let failed = self.samples.iter().filter_map(|s| Some((s, s.value.as_ref().err()?)));
        for (sample, error) in failed {
            let (who, what) = (sample.contestant.name(), sample.figure.name());
            let _ = writeln!(out, "- failed: {who}, {what}, round {}: {}", sample.round, error.trim());
        }
        out
    }

    fn rows(&self, out: &mut String, cell: impl Fn(Contestant, Figure) -> Option<String>) {
        let figures = self.figures();
        let titles: Vec<&str> = figures.iter().map(|f| f.title()).collect();
        let _ = writeln!(out, "| | {} |\n|---|{}", titles.join(" | "), "---|".repeat(figures.len()));
        for contestant in self.contestants() {
            let cells: Vec<String> =
                figures.iter().map(|f| cell(contestant, *f).unwrap_or_else(|| "-".to_owned())).collect();
            let _ = writeln!(out, "| {} | {} |", contestant.name(), cells.join(" | "));
        }
    }
}

fn show(spread: Spread, figure: Figure) -> String {
    let Spread { median, least, most } = spread;
    match figure {
        Figure::PingPong => format!("{median:.0} ({least:.0} to {most:.0})"),
        Figure::Tcp | Figure::TcpReverse | Figure::Tcp4 | Figure::Udp => {
            format!("{median:.2} ({least:.2} to {most:.2})")
        }
    }
}

/// The first line that a program prints.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}
