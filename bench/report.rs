//! Tables for people: the results' own page, `bench/RESULTS.md`, and the part of README that is about speed. All of
//! them from the JSON alone, so that they can be made again.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde_json::Value;

use crate::build;
use crate::contestant::Contestant;
use crate::figure::Figure;
use crate::goals;
use crate::idle::PEERS;
use crate::plot;
use crate::results::{Results, Run, Spread};
use crate::service_tables;

/// Figures that are about one thing.
struct Group {
    title: &'static str,
    /// What was run, and what is counted.
    how: &'static str,
    figures: &'static [Figure],
    plot: Option<&'static str>,
}

const GROUPS: [Group; 6] = [
    Group {
        title: "TCP",
        how: "`iperf3 -C cubic -O 1`, `-R` for the reverse, `-P 4` and `-P 16`: what the receiver counts.",
        figures: &[Figure::Tcp, Figure::TcpReverse, Figure::Tcp4, Figure::Tcp16],
        plot: Some("tcp.svg"),
    },
    Group {
        title: "UDP",
        how: "`iperf3 -u -b 0 -l 1372` and `-l 64`: what arrives of as much as the sender can send. Free of loss: \
              a sample is a search for the highest `-b` of which less than 0.1 % is lost, in tries of 1 s, \
              whatever the seconds of the others (`--pacing-timer 100`; doubled from 400 Mbit/s, with 64 bytes \
              from 10, then five halvings, two tries each; `-w 2M` if the machine allows, so that what is lost is \
              lost on the way and not by iperf3). \"≥\": iperf3 itself, on these processors, could send hardly \
              more than that (a tenth at most); who was measured may carry more. `bare` is what iperf3 and the \
              kernel do without any tunnel.",
        figures: &[Figure::Udp, Figure::UdpLossFree, Figure::UdpSmall, Figure::UdpSmallLossFree],
        plot: Some("udp.svg"),
    },
    Group {
        title: "Latency, microseconds one way",
        how: "Request and answer of 64 bytes, one after the other (bench/ping_pong.rs): half of each round trip. A \
              datagram that is lost counts as a round trip of half a second.",
        figures: &[
            Figure::TcpP50,
            Figure::TcpP99,
            Figure::TcpP999,
            Figure::UdpP50,
            Figure::UdpP99,
            Figure::UdpP999,
        ],
        plot: Some("latency.svg"),
    },
    Group {
        title: "Latency under load, microseconds one way",
        how: "The same beside `iperf3 -C cubic`, one TCP stream the same way.",
        figures: &[
            Figure::TcpLoadedP50,
            Figure::TcpLoadedP99,
            Figure::TcpLoadedP999,
            Figure::UdpLoadedP50,
            Figure::UdpLoadedP99,
            Figure::UdpLoadedP999,
        ],
        plot: None,
    },
    Group {
        title: "Processor seconds for each GB of one TCP stream",
        how: "While the first `iperf3` of above ran. Whole machine: user, nice, system, irq and softirq time of \
              /proc/stat, so both ends, the kernel and iperf3 itself are in it. The tunnel's programs: user and \
              system time of the process, whole; what the kernel does for a tunnel outside of it (softirq, and all of \
              kernel VXLAN) is in the first column only.",
        figures: &[Figure::CpuMachine, Figure::CpuSender, Figure::CpuReceiver],
        plot: Some("cpu.svg"),
    },
    Group {
        title: "Idle, with 1,000 peers",
        how: "One node that knows 1,000 others, of which none says a word: resident memory and processor time of its \
              program, looked at for six times the seconds of the other samples. Warren has them as 1,000 Node \
              objects in a folder, the others by `wg addconf`.",
        figures: &[Figure::IdleMemory, Figure::IdleCpu],
        plot: None,
    },
];

/// How ratios of few rounds are marked.
const FEW: &str = " In brackets: of how many rounds, where they are fewer than five.";
/// What goes for ratios of samples whose command is not known.
const UNKNOWN_COMMANDS: &str = "Of which command a sample is was not kept for all: their ratios are of rounds of the \
                                same number, which may be of different commands.";

/// The figures of README's table and of the ratios, with the heads of their columns.
const HEADLINE: [(Figure, &str); 9] = [
    (Figure::Tcp, "TCP, 1 stream"),
    (Figure::TcpReverse, "reverse"),
    (Figure::Tcp4, "4 streams"),
    (Figure::Tcp16, "16 streams"),
    (Figure::Udp, "UDP 1372 B, overload"),
    (Figure::UdpLossFree, "UDP, < 0.1 % lost"),
    (Figure::TcpP50, "ping-pong p50"),
    (Figure::TcpLoadedP99, "p99 beside a stream"),
    (Figure::CpuMachine, "CPU s/GB"),
];

/// Writes `NAME.json` and `NAME.md`; gives the page.
pub fn write(results: &Results, name: &Path) -> io::Result<String> {
    if let Some(folder) = name.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(name.with_extension("json"), serde_json::to_string_pretty(&results.json())? + "\n")?;
    let page = page(results, &file_name(name, "json"), None);
    fs::write(name.with_extension("md"), &page)?;
    Ok(page)
}

/// Makes everything anew that is made from results; gives what it has written.
pub fn render(json: &Path) -> io::Result<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut written = Vec::new();
    for (path, text) in rendered(root, json)? {
        if fs::read_to_string(&path).is_ok_and(|before| before == text) {
            continue;
        }
        fs::write(&path, text)?;
        written.push(path);
    }
    Ok(written)
}

/// What results make: their page, the plots, `bench/RESULTS.md`, and README with its part of them.
pub fn rendered(root: &Path, json: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let results = Results::read(&fs::read_to_string(json)?)?;
    let folder = root.join("bench/results");
    let mut files = vec![(json.with_extension("md"), page(&results, &file_name(json, "json"), None))];
    files.extend(plot::all(&results).into_iter().map(|(name, svg)| (folder.join(name), svg)));
    let source = format!("results/{}", file_name(json, "json"));
    let mut page = page(&results, &source, Some("results/"));
    if results.services().is_none()
        && let Some(services) = newest_of_services(&folder)?
    {
        let _ = write!(page, "\n## Services\n\nBeside kube-proxy: [{services}](results/{services}).\n");
    }
    page.push_str(&instructions(&fs::read_to_string(root.join("bench/instructions.json"))?)?);
    files.push((root.join("bench/RESULTS.md"), page));
    let readme = root.join("README.md");
    let text = fs::read_to_string(&readme)?;
    let no_marks = || io::Error::other("README.md has lost the marks around its part of the results");
    let mut text = between_marks(&text, SPEED, &short(&results)).ok_or_else(no_marks)?;
    if let Some(services) = results.services() {
        text = between_marks(&text, SERVICES, &service_tables::short(services)).ok_or_else(no_marks)?;
    }
    files.push((readme, text));
    Ok(files)
}

/// The results that `bench/RESULTS.md` says it is made of, as its first lines name them.
pub fn source_of(page: &str) -> Option<&str> {
    page.lines().nth(2)?.strip_prefix("Made by `bench/run --render ")?.split('`').next()
}

/// What `bench/instructions` has counted.
fn instructions(text: &str) -> io::Result<String> {
    let json: Value = serde_json::from_str(text)?;
    let mut out = format!(
        "\n## Instructions of one burst\n\nThe packet line alone, counted by callgrind: `bench/instructions`, which CI \
         runs too ({}, {}). `bulk` is one TCP super-packet of 64,000 bytes, `service` the same through a ClusterIP, \
         `small` sixteen UDP datagrams of 64 bytes; `out` from the TUN to the network, `in` the other way.\n\n| | \
         instructions |\n|---|---|\n",
        json["compiler"].as_str().unwrap_or_default(),
        json["processor"].as_str().unwrap_or_default(),
    );
    for (name, count) in json["instructions"].as_object().into_iter().flatten() {
        let _ = writeln!(out, "| {name} | {count} |");
    }
    Ok(out)
}

/// What `bench/kube-proxy` has written last, by its name, which begins with the day.
fn newest_of_services(folder: &Path) -> io::Result<Option<String>> {
    let mut newest = None;
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with("-services.md") {
            newest = newest.max(Some(name));
        }
    }
    Ok(newest)
}

fn file_name(path: &Path, extension: &str) -> String {
    let name = path.with_extension(extension);
    name.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

// --- the page ------------------------------------------------------------------------------------

/// The page; `source` is its JSON's name. `plots`: the folder in which they are, if they are to be shown.
pub fn page(results: &Results, source: &str, plots: Option<&str>) -> String {
    let mut out = String::from("# Side by side\n\n");
    if plots.is_some() {
        let _ = writeln!(out, "Made by `bench/run --render bench/{source}`; do not edit.\n");
    }
    about(&mut out, results, source);
    goals::write(&mut out, results);
    for group in &GROUPS {
        let figures: Vec<Figure> = group.figures.iter().copied().filter(|f| results.has(*f)).collect();
        if figures.is_empty() {
            continue;
        }
        let _ = writeln!(out, "\n## {}\n\n{}\n", group.title, group.how);
        if let (Some(folder), Some(plot)) = (plots, group.plot) {
            let _ = writeln!(out, "![{}]({folder}{plot})\n", group.title);
        }
        let columns: Vec<(Figure, &str)> = figures.iter().map(|figure| (*figure, figure.title())).collect();
        table(&mut out, results, &columns, |c, f| results.spread(c, f).map(|s| with_ends(s, f)));
    }
    let headline = headline(results);
    for reference in [Contestant::WireguardGo, Contestant::KernelVxlan] {
        if !headline.is_empty() && results.contestants().contains(&reference) {
            let _ = writeln!(
                out,
                "\n## Ratios to {}\n\nMedian of each round's ratio. `-`: not measured in the same round{}.{}\n",
                reference.name(),
                if results.knows_commands() { " of the same command" } else { "" },
                if few(results, &headline, |c, f| results.ratio(c, reference, f)) { FEW } else { "" },
            );
            table(&mut out, results, &headline, |c, f| {
                results.ratio(c, reference, f).map(|s| format!("{:.2}{}", s.median, s.mark()))
            });
        }
    }
    if let Some(services) = results.services() {
        out.push('\n');
        out.push_str(&service_tables::all(services, "##"));
    }
    out.push_str("\n## Who\n\n");
    for contestant in results.contestants() {
        let of = |key| results.of_contestant(contestant, key);
        let lanes = match results.lanes(contestant) {
            None => String::new(),
            Some(1) => "; 1 lane".to_owned(),
            Some(lanes) => format!("; {lanes} lanes"),
        };
        let _ = writeln!(out, "- **{}** ({}): {}{lanes}", contestant.name(), of("version"), of("settings"));
    }
    let failures: Vec<_> = results.failures().collect();
    if !failures.is_empty() {
        out.push_str("\n## What failed\n\n");
    }
    for (sample, error) in failures {
        let (who, what) = (sample.contestant.name(), sample.figure.name());
        let _ = writeln!(out, "- {who}, {what}, round {}: {}", sample.round, error.trim().replace('\n', " "));
    }
    out
}

fn about(out: &mut String, results: &Results, source: &str) {
    let (a, s) = (|key: &str| results.about(key), |key: &str| results.setting(key));
    let runs = results.runs();
    let order = match runs.iter().all(|run| run.takes_turns) {
        true => {
            "in another order each round (a balanced Latin square: everybody's place and predecessor change)"
        }
        false => "in the same order in each round, or in some of them",
    };
    let few = if results.has_few() { "Those of fewer than five say so. " } else { "" };
    let times = match (results.knows_commands(), runs.len()) {
        (false, _) => UNKNOWN_COMMANDS,
        (true, 1) => "",
        (true, _) => {
            "What several commands measured was measured at different times: ratios are of rounds of one command."
        }
    };
    let _ = writeln!(
        out,
        "Two namespaces joined by a veth pair, both ends, both agents and the load on the same processors. Each \
         contestant is set up anew in every round, so that what the machine does meanwhile hits all alike: compare \
         rows, not runs. Each figure is the median (least to most) of {}, each of {} s where its section does not say \
         otherwise, interleaved, {order}. {few}{times}\n",
        results.samples(),
        s("seconds"),
    );
    out.push_str(
        "As everything shares the processors, no table here can show how the packet loop scales with them: two lanes \
         beside one are measured in memory, by `bench/scaling`, and `tests/run instructions` holds them to 1.6 times as \
         much.\n\n",
    );
    if results.is_debug_build() {
        out.push_str("**A debug build: these figures mean nothing.**\n\n");
    }
    let _ = writeln!(
        out,
        "{} processors ({}), Linux {}, veth MTU {}. {}. Warren's lanes: {}. All samples: [{source}]({source}). {}:\n",
        a("processors"),
        a("processor"),
        a("kernel"),
        s("underlay_mtu"),
        a("iperf3"),
        s("lanes"),
        if runs.len() > 1 {
            "Commands, each with when, what and how busy the machine was before"
        } else {
            "Command"
        },
    );
    for run in &runs {
        command(out, run);
    }
    if runs.first().is_some_and(Run::is_continuation) {
        out.push_str("\nThe commands of the rounds before were not kept.\n");
    }
    let _ = writeln!(out, "\n{}", builds(&runs));
}

/// Of which build the figures are: it should be the one that users run.
fn builds(runs: &[Run]) -> &'static str {
    let is = |wanted: &str| runs.iter().all(|run| run.build.as_deref() == Some(wanted));
    if is(build::SHIPPED) {
        "Warren is what is shipped: built by `deploy/build-static`. Its sum is below, under Who."
    } else if runs.iter().any(|run| run.build.is_none()) {
        "Which build of Warren this is was not recorded for all of them, but for its sum (below, under Who)."
    } else {
        "Warren is another build than the shipped one: that which stands in front of a command, or else cargo's. Its \
         sum is below, under Who."
    }
}

fn command(out: &mut String, run: &Run) {
    let Run { command, date, commit, build, load_before, .. } = run;
    let prefix = build.as_deref().map(build::prefix).unwrap_or_default();
    let _ = writeln!(out, "    {prefix}bench/run {command}  # {date}, commit {commit}, load {load_before}");
}

fn table(
    out: &mut String,
    results: &Results,
    columns: &[(Figure, &str)],
    cell: impl Fn(Contestant, Figure) -> Option<String>,
) {
    let titles: Vec<String> = columns.iter().map(|(_, title)| title.replace('<', "&lt;")).collect();
    let _ = writeln!(out, "| | {} |\n|---|{}", titles.join(" | "), "---|".repeat(columns.len()));
    for contestant in results.contestants() {
        let cells: Vec<Option<String>> =
            columns.iter().map(|(figure, _)| cell(contestant, *figure)).collect();
        // A row without a ratio stays: that there is none should be seen.
        if columns.iter().all(|(figure, _)| results.count(contestant, *figure) == 0) {
            continue;
        }
        let cells: Vec<String> = cells.into_iter().map(|c| c.unwrap_or_else(|| "-".to_owned())).collect();
        let name = contestant.name();
        let name = if contestant.is_ours() { format!("**{name}**") } else { name.to_owned() };
        let _ = writeln!(out, "| {name} | {} |", cells.join(" | "));
    }
}

/// Whether some cell of a table has few samples, as [`Spread::mark`] says there.
fn few(
    results: &Results,
    columns: &[(Figure, &str)],
    cell: impl Fn(Contestant, Figure) -> Option<Spread>,
) -> bool {
    let contestants = results.contestants();
    let mut cells =
        contestants.iter().flat_map(|c| columns.iter().filter_map(|(figure, _)| cell(*c, *figure)));
    cells.any(|spread| !spread.mark().is_empty())
}

fn headline(results: &Results) -> Vec<(Figure, &'static str)> {
    HEADLINE.into_iter().filter(|(figure, _)| results.has(*figure)).collect()
}

fn with_ends(spread: Spread, figure: Figure) -> String {
    spread.middle(figure) + &spread.ends(|value| figure.show(value))
}

// --- README --------------------------------------------------------------------------------------

/// Around what is made here: where it begins, and where it ends.
type Marks = (&'static str, &'static str);
const SPEED: Marks = ("<!-- speed: made by bench/run --render -->", "<!-- speed: end -->");
const SERVICES: Marks = ("<!-- services: made by bench/run --render -->", "<!-- services: end -->");

fn between_marks(text: &str, (begin, end): Marks, part: &str) -> Option<String> {
    let begin = text.find(begin)? + begin.len();
    let end = begin + text[begin..].find(end)?;
    Some(format!("{}\n{part}{}", &text[..begin], &text[end..]))
}

fn short(results: &Results) -> String {
    let mut out = String::new();
    let headline = headline(results);
    let _ = writeln!(
        out,
        "![TCP throughput](bench/results/tcp.svg)\n\nBoth ends, both agents and iperf3 (cubic) on the same {} \
         processors ({}, Linux {}), veth MTU {}, medians of {}{}; Gbit/s, and microseconds one way:\n",
        results.about("processors"),
        results.about("processor"),
        results.about("kernel"),
        results.setting("underlay_mtu"),
        results.samples(),
        if few(results, &headline, |c, f| results.spread(c, f)) {
            " (in brackets: of how many, where they are fewer than five)"
        } else {
            ""
        },
    );
    table(&mut out, results, &headline, |contestant, figure| {
        results.spread(contestant, figure).map(|spread| spread.middle(figure) + &spread.mark())
    });
    out.push_str(
        "\nAbsolute figures drift with the machine and the hour; compare rows of one run. Spread, more figures, \
         everybody's version and settings, and how each is measured: [bench/RESULTS.md](bench/RESULTS.md).\n",
    );
    let idle = [Figure::IdleMemory, Figure::IdleCpu].map(|f| results.spread(Contestant::WarrenWireguard, f));
    if let [Some(memory), Some(cpu)] = idle {
        let _ = writeln!(
            out,
            "An idle agent with {PEERS} peers has {:.0} MiB of memory and uses {:.2} % of one processor.",
            memory.median, cpu.median
        );
    }
    out
}
