//! Samples, what they say together, and their JSON.

use std::collections::BTreeMap;
use std::process::Command;
use std::{fs, io};

use serde_json::{Map, Value, json};

use crate::build;
use crate::contestant::{Contestant, first_line, kernel};
use crate::figure::Figure;
use crate::lab::agent::warren;

/// One measurement.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Counts from 1.
    pub round: u32,
    /// Whose.
    pub contestant: Contestant,
    /// Of what.
    pub figure: Figure,
    /// The value, or why there is none.
    pub value: Result<Reading, String>,
}

/// A value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// In the figure's unit.
    pub value: f64,
    /// What makes the load could hardly make more: who was measured can take so much, and perhaps more.
    pub at_least: bool,
}

impl From<f64> for Reading {
    fn from(value: f64) -> Reading {
        Reading { value, at_least: false }
    }
}

/// Everything that was measured, on what, and with which versions and settings.
#[derive(Debug)]
pub struct Results {
    about: Value,
    contestants: Value,
    samples: Vec<Sample>,
    /// What `bench/kube-proxy` has measured, if it has.
    services: Value,
}

/// One command that added rounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What followed `bench/run`.
    pub command: String,
    /// When it began.
    pub date: String,
    /// Of the tree.
    pub commit: String,
    /// Of Warren, as [`build::measured`] says it; of old it was not recorded.
    pub build: Option<String>,
    /// The machine's load when it began.
    pub load_before: String,
    /// Whether the contestants came in another order in each round.
    pub takes_turns: bool,
}

/// The middle of some values, and their ends.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The middle.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
    /// Whether the middle is one of [`Reading::at_least`].
    pub at_least: bool,
}

impl Spread {
    fn of(mut readings: Vec<Reading>) -> Option<Spread> {
        readings.sort_by(|a, b| a.value.total_cmp(&b.value));
        let (least, most) = (readings.first()?.value, readings.last()?.value);
        let (low, high) = (readings[(readings.len() - 1) / 2], readings[readings.len() / 2]);
        let median = f64::midpoint(low.value, high.value);
        Some(Spread { median, least, most, at_least: low.at_least || high.at_least })
    }

    /// The middle as tables and charts have it.
    pub fn middle(self, figure: Figure) -> String {
        format!("{}{}", if self.at_least { "≥ " } else { "" }, figure.show(self.median))
    }
}

impl Results {
    /// Nothing yet; asks the machine what it is. `settings` are those of the run.
    pub fn new(settings: Value, contestants: &[Contestant]) -> Results {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let said = |program: &str, arguments: &[&str]| first_line(Command::new(program).args(arguments));
        let run = json!({
            "command": std::env::args().skip(1).filter(|word| word != "--bench").collect::<Vec<_>>().join(" "),
            "date": said("date", &["-u", "+%F %H:%M UTC"]),
            "commit": said("git", &["describe", "--always", "--dirty"]),
            "build": build::measured(),
            "load_before": load.split_whitespace().next(),
            "takes_turns": true,
        });
        let about = json!({
            "settings": settings,
            "runs": [run],
            "processors": std::thread::available_parallelism().map_or(0, usize::from),
            "processor": model.map_or("unknown", |(_, name)| name),
            "kernel": kernel(),
            "iperf3": said("iperf3", &["--version"]),
            "debug_build": warren().contains("/debug/"),
        });
        let entry = |c: &Contestant| {
            (c.name().to_owned(), json!({ "version": c.version(), "settings": c.settings() }))
        };
        let contestants: Map<String, Value> = contestants.iter().map(entry).collect();
        Results { about, contestants: contestants.into(), samples: Vec::new(), services: Value::Null }
    }

    /// One more.
    pub fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// How many lanes its agents turned out to have.
    pub fn has_lanes(&mut self, contestant: Contestant, lanes: usize) {
        self.contestants[contestant.name()]["lanes"] = lanes.into();
    }

    /// And how many that was.
    pub fn lanes(&self, contestant: Contestant) -> Option<u64> {
        self.contestants[contestant.name()]["lanes"].as_u64()
    }

    /// Takes in the samples of rounds before, which must have been measured with the same, on the same machine.
    pub fn continue_after(&mut self, before: Results) -> io::Result<()> {
        const SAME: [&str; 6] = ["settings", "processors", "processor", "kernel", "iperf3", "debug_build"];
        for key in SAME {
            let (theirs, ours) = (&before.about[key], &self.about[key]);
            if theirs != ours {
                return Err(io::Error::other(format!(
                    "those rounds had another `{key}`: {theirs}, now {ours}"
                )));
            }
        }
        let mut runs = before.runs();
        runs.extend(self.runs());
        self.about["runs"] = runs.iter().map(Run::json).collect();
        for (name, contestant) in self.contestants.as_object().into_iter().flatten() {
            let known = &before.contestants[name];
            let is_same = ["version", "settings"].iter().all(|key| known[key] == contestant[key]);
            if !known.is_null() && !is_same {
                return Err(io::Error::other(format!("those rounds had another {name}")));
            }
        }
        if let (Value::Object(ours), Value::Object(theirs)) = (&mut self.contestants, before.contestants) {
            ours.extend(theirs);
        }
        self.samples = before.samples;
        self.services = before.services;
        Ok(())
    }

    /// The commands whose rounds these are, the first one first.
    pub fn runs(&self) -> Vec<Run> {
        match &self.about["runs"] {
            Value::Array(runs) => runs.iter().map(Run::read).collect(),
            // Of old, only the last one was kept.
            _ => vec![Run::read(&self.about)],
        }
    }

    /// What `bench/kube-proxy` has measured, if it has.
    pub fn services(&self) -> Option<&Value> {
        Some(&self.services).filter(|services| services.is_object())
    }

    /// Takes that in, instead of what was there.
    pub fn take_services(&mut self, services: Value) {
        self.services = services;
    }

    /// How many rounds a contestant has.
    pub fn rounds_of(&self, contestant: Contestant) -> u32 {
        let own = self.samples.iter().filter(|sample| sample.contestant == contestant);
        own.map(|sample| sample.round).max().unwrap_or(0)
    }

    /// How many rounds there are, as text: not everybody need have as many.
    pub fn rounds(&self) -> String {
        let rounds = self.contestants().into_iter().map(|contestant| self.rounds_of(contestant));
        let (least, most) = rounds.fold((u32::MAX, 0), |(least, most), n| (least.min(n), most.max(n)));
        if least < most { format!("{least} to {most}") } else { most.to_string() }
    }

    /// What was said about the machine, as text.
    pub fn about(&self, key: &str) -> String {
        text(&self.about[key])
    }

    /// A setting of the run.
    pub fn setting(&self, key: &str) -> String {
        text(&self.about["settings"][key])
    }

    /// Whether a debug build was measured.
    pub fn is_debug_build(&self) -> bool {
        self.about["debug_build"] == true
    }

    /// A contestant's `version` or `settings`.
    pub fn of_contestant(&self, contestant: Contestant, key: &str) -> String {
        text(&self.contestants[contestant.name()][key])
    }

    /// Who was measured, in the order of the tables.
    pub fn contestants(&self) -> Vec<Contestant> {
        let present = |c: &Contestant| self.samples.iter().any(|s| s.contestant == *c);
        Contestant::ALL.into_iter().filter(present).collect()
    }

    /// Whether anybody has this figure.
    pub fn has(&self, figure: Figure) -> bool {
        self.samples.iter().any(|s| s.figure == figure && s.value.is_ok())
    }

    /// What a contestant's rounds say of a figure.
    pub fn spread(&self, contestant: Contestant, figure: Figure) -> Option<Spread> {
        Spread::of(self.values(contestant, figure).into_values().collect())
    }

    /// Each round's ratio of a contestant to another.
    pub fn ratio(&self, contestant: Contestant, to: Contestant, figure: Figure) -> Option<Spread> {
        let others = self.values(to, figure);
        let ratio = |(round, own): (u32, Reading)| Some((own.value / others.get(&round)?.value).into());
        Spread::of(self.values(contestant, figure).into_iter().filter_map(ratio).collect())
    }

    /// What went wrong.
    pub fn failures(&self) -> impl Iterator<Item = (&Sample, &str)> {
        self.samples.iter().filter_map(|s| Some((s, s.value.as_ref().err()?.as_str())))
    }

    fn values(&self, contestant: Contestant, figure: Figure) -> BTreeMap<u32, Reading> {
        let samples = self.samples.iter().filter(|s| s.contestant == contestant && s.figure == figure);
        samples.filter_map(|s| Some((s.round, *s.value.as_ref().ok()?))).collect()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let samples: Vec<Value> = self.samples.iter().map(Sample::json).collect();
        let pairs = self.contestants().into_iter().flat_map(|c| Figure::ALL.map(|f| (c, f)));
        let medians: Vec<Value> = pairs
            .filter_map(|(c, f)| {
                let Spread { median, least, most, at_least } = self.spread(c, f)?;
                Some(json!({
                    "contestant": c.name(), "figure": f.name(),
                    "median": median, "least": least, "most": most, "at_least": at_least,
                }))
            })
            .collect();
        json!({
            "about": self.about, "contestants": self.contestants, "medians": medians, "samples": samples,
            "services": self.services,
        })
    }

    /// Reads what [`Self::json`] wrote.
    pub fn read(text: &str) -> io::Result<Results> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let json: Value = serde_json::from_str(text)?;
        let samples = json["samples"].as_array().ok_or_else(|| wrong("no samples"))?;
        let samples: Option<Vec<Sample>> = samples.iter().map(Sample::read).collect();
        let samples = samples.ok_or_else(|| wrong("a sample of a contestant or figure that is not known"))?;
        let [about, contestants, services] =
            ["about", "contestants", "services"].map(|key| json[key].clone());
        Ok(Results { about, contestants, samples, services })
    }
}

impl Run {
    /// Whether it added its rounds to those of others.
    pub fn is_continuation(&self) -> bool {
        self.command.split(' ').any(|word| word == "--append")
    }

    fn json(&self) -> Value {
        json!({
            "command": self.command, "date": self.date, "commit": self.commit, "build": self.build,
            "load_before": self.load_before, "takes_turns": self.takes_turns,
        })
    }

    fn read(json: &Value) -> Run {
        let [command, date, commit, load_before] =
            ["command", "date", "commit", "load_before"].map(|key| text(&json[key]));
        let build = json["build"].as_str().map(str::to_owned);
        Run { command, date, commit, build, load_before, takes_turns: json["takes_turns"] == true }
    }
}

impl Sample {
    fn json(&self) -> Value {
        let (reading, error) = match &self.value {
            Ok(reading) => (Some(reading), None),
            Err(error) => (None, Some(error)),
        };
        json!({
            "round": self.round, "contestant": self.contestant.name(), "figure": self.figure.name(),
            "value": reading.map(|r| r.value), "at_least": reading.is_some_and(|r| r.at_least), "error": error,
        })
    }

    fn read(json: &Value) -> Option<Sample> {
        Some(Sample {
            round: u32::try_from(json["round"].as_u64()?).ok()?,
            contestant: Contestant::named(json["contestant"].as_str()?)?,
            figure: Figure::named(json["figure"].as_str()?)?,
            value: match json["value"].as_f64() {
                Some(value) => Ok(Reading { value, at_least: json["at_least"] == true }),
                None => Err(text(&json["error"])),
            },
        })
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
