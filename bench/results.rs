//! Samples, what they say together, and their JSON.

use std::collections::BTreeMap;
use std::process::Command;
use std::{fs, io};

use serde_json::{Map, Value, json};

use crate::build;
use crate::contestant::{Contestant, first_line, kernel};
use crate::figure::Figure;
use crate::lab::agent::warren;

/// With fewer samples than these a median is said to be of so many.
pub const ENOUGH: usize = 5;

/// One measurement.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Which command made it, counted from 1 in the order of [`Results::runs`]; 0 where that cannot be told.
    pub run: usize,
    /// Counts from 1, on through all commands.
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
    /// Of how many.
    pub samples: usize,
}

impl Spread {
    fn of(mut readings: Vec<Reading>) -> Option<Spread> {
        let samples = readings.len();
        readings.sort_by(|a, b| a.value.total_cmp(&b.value));
        let (least, most) = (readings.first()?.value, readings.last()?.value);
        let (low, high) = (readings[(readings.len() - 1) / 2], readings[readings.len() / 2]);
        let median = f64::midpoint(low.value, high.value);
        Some(Spread { median, least, most, at_least: low.at_least || high.at_least, samples })
    }

    /// The middle as tables and charts have it.
    pub fn middle(self, figure: Figure) -> String {
        format!("{}{}", if self.at_least { "≥ " } else { "" }, figure.show(self.median))
    }

    /// How many samples there are, in brackets, where they are too few.
    pub fn mark(self) -> String {
        if self.samples < ENOUGH { format!(" ({})", self.samples) } else { String::new() }
    }

    /// What stands behind the middle: least and most, and how many samples there are where they are too few.
    pub fn ends(self, show: impl Fn(f64) -> String) -> String {
        let ends = format!("{} to {}", show(self.least), show(self.most));
        match self.samples {
            1 => " (1 sample)".to_owned(),
            n if n < ENOUGH => format!(" ({ends}, {n} samples)"),
            _ => format!(" ({ends})"),
        }
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

    /// One more, of the last command.
    pub fn add(
        &mut self,
        round: u32,
        contestant: Contestant,
        figure: Figure,
        value: Result<Reading, String>,
    ) {
        let run = self.runs().len();
        self.samples.push(Sample { run, round, contestant, figure, value });
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

    /// Whether each sample's command can be told. Where it cannot, rounds of the same number stand beside each other.
    pub fn knows_commands(&self) -> bool {
        self.samples.iter().all(|sample| sample.run != 0)
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

    /// The last round that there is.
    pub fn last_round(&self) -> u32 {
        self.samples.iter().map(|sample| sample.round).max().unwrap_or(0)
    }

    /// How many samples a contestant has of a figure.
    pub fn count(&self, contestant: Contestant, figure: Figure) -> usize {
        self.values(contestant, figure).len()
    }

    /// How many samples a cell of the tables has, as text: the least and the most.
    pub fn samples(&self) -> String {
        let cells = self.contestants().into_iter().flat_map(|c| Figure::ALL.map(|f| self.count(c, f)));
        let cells: Vec<usize> = cells.filter(|count| *count > 0).collect();
        match (cells.iter().min(), cells.iter().max()) {
            (Some(least), Some(most)) if least < most => format!("{least} to {most} samples"),
            (Some(1), _) => "1 sample".to_owned(),
            (_, most) => format!("{} samples", most.copied().unwrap_or(0)),
        }
    }

    /// Whether some cell has too few of them.
    pub fn has_few(&self) -> bool {
        let mut cells = self.contestants().into_iter().flat_map(|c| Figure::ALL.map(|f| self.count(c, f)));
        cells.any(|count| (1..ENOUGH).contains(&count))
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

    /// Each round's ratio of a contestant to another. What another command measured, at another time, has none, as far as
    /// that is known ([`Self::knows_commands`]).
    pub fn ratio(&self, contestant: Contestant, to: Contestant, figure: Figure) -> Option<Spread> {
        let others = self.values(to, figure);
        let ratio = |(at, own): ((usize, u32), Reading)| Some((own.value / others.get(&at)?.value).into());
        Spread::of(self.values(contestant, figure).into_iter().filter_map(ratio).collect())
    }

    /// What went wrong.
    pub fn failures(&self) -> impl Iterator<Item = (&Sample, &str)> {
        self.samples.iter().filter_map(|s| Some((s, s.value.as_ref().err()?.as_str())))
    }

    /// By command and round.
    fn values(&self, contestant: Contestant, figure: Figure) -> BTreeMap<(usize, u32), Reading> {
        let samples = self.samples.iter().filter(|s| s.contestant == contestant && s.figure == figure);
        samples.filter_map(|s| Some(((s.run, s.round), *s.value.as_ref().ok()?))).collect()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let samples: Vec<Value> = self.samples.iter().map(Sample::json).collect();
        let pairs = self.contestants().into_iter().flat_map(|c| Figure::ALL.map(|f| (c, f)));
        let medians: Vec<Value> = pairs
            .filter_map(|(c, f)| {
                let Spread { median, least, most, at_least, samples } = self.spread(c, f)?;
                Some(json!({
                    "contestant": c.name(), "figure": f.name(), "samples": samples,
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
        let mut results = Results { about, contestants, samples, services };
        let runs = results.runs();
        if results.samples.iter().all(|sample| sample.run == 0) {
            tell_runs(&mut results.samples, &runs);
        }
        Ok(results)
    }
}

/// Says of old samples which command made them, by what the commands ask for. It cannot be told where the first ones
/// were not kept: then all stay as they are.
fn tell_runs(samples: &mut [Sample], runs: &[Run]) {
    if runs.first().is_none_or(Run::is_continuation) {
        return;
    }
    let (mut run, mut before, mut so_far) = (0, BTreeMap::new(), BTreeMap::new());
    for sample in samples {
        let name = sample.contestant.name();
        let is_of = |run: &Run, before: &BTreeMap<&str, u32>| {
            run.asks_for(name) && sample.round <= before.get(name).unwrap_or(&0) + run.rounds()
        };
        while run + 1 < runs.len() && !is_of(&runs[run], &before) {
            run += 1;
            // Of old each contestant counted its own rounds.
            before.clone_from(&so_far);
        }
        sample.run = run + 1;
        so_far.insert(name, sample.round);
    }
}

impl Run {
    /// Whether it added its rounds to those of others.
    pub fn is_continuation(&self) -> bool {
        self.command.split(' ').any(|word| word == "--append")
    }

    /// How many rounds it makes.
    fn rounds(&self) -> u32 {
        self.option("--rounds").and_then(|rounds| rounds.parse().ok()).unwrap_or(5)
    }

    /// Whether it measures that contestant.
    fn asks_for(&self, contestant: &str) -> bool {
        self.option("--only").is_none_or(|only| only.split(',').any(|name| name == contestant))
    }

    fn option(&self, name: &str) -> Option<&str> {
        let words: Vec<&str> = self.command.split(' ').collect();
        let at = words.iter().position(|word| {
            word.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        })?;
        words[at].split_once('=').map(|(_, value)| value).or_else(|| words.get(at + 1).copied())
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
            "run": self.run, "round": self.round, "contestant": self.contestant.name(), "figure": self.figure.name(),
            "value": reading.map(|r| r.value), "at_least": reading.is_some_and(|r| r.at_least), "error": error,
        })
    }

    fn read(json: &Value) -> Option<Sample> {
        Some(Sample {
            run: json["run"].as_u64().and_then(|run| usize::try_from(run).ok()).unwrap_or(0),
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
