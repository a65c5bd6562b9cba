//! What `bench/` does beside measuring: who comes when, how a rate is searched for, and what pages say. Here and not
//! beside the code, as a measuring program has a `main` of its own instead of tests. And `warren bench` on a terminal.

#[allow(dead_code)] // the tests' laboratory, which nothing here starts
#[path = "../kernel/lab/mod.rs"]
pub mod lab;

#[path = "../../bench/build.rs"]
pub mod build;
#[path = "../../bench/packets/committed.rs"]
pub mod committed;
#[path = "../../bench/contestant.rs"]
pub mod contestant;
#[path = "../../bench/cpu.rs"]
pub mod cpu;
#[path = "../../bench/figure.rs"]
pub mod figure;
#[path = "../../bench/goals.rs"]
pub mod goals;
#[path = "../../bench/idle.rs"]
pub mod idle;
#[path = "../../bench/measure.rs"]
pub mod measure;
#[path = "../../bench/order.rs"]
pub mod order;
#[path = "../../bench/ping_pong.rs"]
pub mod ping_pong;
#[path = "../../bench/plot.rs"]
pub mod plot;
#[path = "../../bench/report.rs"]
pub mod report;
#[path = "../../bench/results.rs"]
pub mod results;
#[path = "../../bench/packets/scaling/judge.rs"]
pub mod scaling;
#[path = "../../bench/kube_proxy/tables.rs"]
pub mod service_tables;
#[path = "../../bench/packets/verdict.rs"]
pub mod verdict;

mod instructions;
mod scripts;
mod terminal;

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use contestant::Contestant;
use figure::{Figure, Work};
use measure::Attempt;
use results::{Reading, Results};

// --- who comes when ------------------------------------------------------------------------------

#[test]
fn everybody_has_every_place_and_follows_everybody_equally_often() {
    for n in 1..=12 {
        let rounds = if n % 2 == 0 { n } else { 2 * n };
        let times = rounds / n;
        let (mut places, mut pairs) = (vec![vec![0; n]; n], vec![vec![0; n]; n]);
        for round in 1..=rounds as u32 {
            let order = order::of(n, round);
            order.iter().enumerate().for_each(|(place, &who)| places[who][place] += 1);
            order.windows(2).for_each(|pair| pairs[pair[0]][pair[1]] += 1);
        }
        assert!(places.iter().flatten().all(|&count| count == times), "{n}: {places:?}");
        for (first, row) in pairs.iter().enumerate() {
            let mut others = row.iter().enumerate().filter(|(second, _)| *second != first);
            assert!(others.all(|(_, &count)| count == times), "{n}: {pairs:?}");
        }
    }
    assert!(order::of(0, 3).is_empty());
}

#[test]
fn a_few_rounds_put_nobody_always_late() {
    for n in 6..=12 {
        for who in 0..n {
            let places = (1..=5).map(|round| order::of(n, round).iter().position(|&w| w == who).unwrap_or(n));
            let mean = places.sum::<usize>() as f64 / 5.0 / (n - 1) as f64;
            assert!((0.2..=0.8).contains(&mean), "{who} of {n} stands at {mean:.2} on the average");
        }
    }
}

// --- a rate without loss -------------------------------------------------------------------------

/// A way that loses above `limit` Mbit/s, and a sender that sends at most `most`.
fn found(first: f64, limit: f64, most: f64) -> Reading {
    let attempt = |rate: f64| {
        let sent = rate.min(most);
        Ok(Attempt { sent: sent / 1e3, arrived: (sent <= limit).then_some(sent / 1e3) })
    };
    measure::search(first, attempt).expect("no error")
}

#[test]
fn the_search_ends_just_below_where_loss_begins() {
    for (first, limit) in [(400.0, 1290.0), (400.0, 90.0), (10.0, 66.0), (10.0, 9.0)] {
        let Reading { value, at_least } = found(first, limit, f64::MAX);
        let reached = value * 1e3 / limit;
        assert!(!at_least && (0.8..=1.0).contains(&reached), "{first}, {limit}: {reached}");
    }
    assert_eq!(found(400.0, 0.0, f64::MAX), 0.0.into(), "nothing without loss");
}

#[test]
fn what_the_sender_could_not_send_is_said() {
    assert_eq!(found(10.0, f64::MAX, 127.0), Reading { value: 0.127, at_least: true });
    // Loss begins just below the most that it can send, or well below.
    assert!(found(10.0, 125.0, 127.0).at_least);
    assert!(!found(10.0, 100.0, 127.0).at_least);
}

// --- pages ---------------------------------------------------------------------------------------

const SETTINGS: [(&str, u32); 2] = [("seconds", 1), ("underlay_mtu", 1500)];

/// Results of some rounds; each contestant has ten times its place, and the round.
fn results(rounds: impl Iterator<Item = u32> + Clone, figure: Figure) -> Results {
    let contestants = [Contestant::WireguardGo, Contestant::WarrenWireguard, Contestant::WarrenWireguard2];
    let settings: Value = SETTINGS.into_iter().map(|(key, value)| (key.to_owned(), json!(value))).collect();
    let mut results = Results::new(settings, &contestants);
    for round in rounds {
        for (place, contestant) in contestants.into_iter().enumerate() {
            let reading = Reading { value: f64::from(round) + 10.0 * place as f64, at_least: place == 1 };
            results.add(round, contestant, figure, Ok(reading));
        }
    }
    results
}

fn read_again(results: &Results) -> Results {
    Results::read(&results.json().to_string()).expect("what was written can be read")
}

#[test]
fn every_result_that_was_kept_still_makes_a_page() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results");
    let (mut pages, mut pages_of_services) = (0, 0);
    for entry in fs::read_dir(folder).expect("results") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if !name.ends_with(".json") {
            continue;
        }
        let text = fs::read_to_string(&path).expect("results");
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        if name.ends_with("-services.json") {
            let page = service_tables::all(&json, "##") + &service_tables::short(&json);
            assert!(page.contains("\n### ") && page.contains("\n| "), "{name}: {page}");
            assert!(!page.contains("NaN"), "{name}: {page}");
            pages_of_services += 1;
        } else if json.pointer("/about/settings").is_some() {
            let results = Results::read(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
            let page = report::page(&results, &name, None);
            for part in ["## TCP", "**warren-wireguard**", "    bench/run "] {
                assert!(page.contains(part), "{name}: {page}");
            }
            pages += 1;
        }
        // What is older than the settings has kept its page.
    }
    assert!(pages > 0 && pages_of_services > 0, "no results");
}

/// Whatever is made from results and committed is what `--render` makes of them now.
#[test]
fn pages_and_charts_are_those_of_the_results_they_name() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("bench/RESULTS.md")).expect("bench/RESULTS.md");
    let json = report::source_of(&page).expect("the third line of bench/RESULTS.md names its results");
    let files = report::rendered(root, &root.join(json)).unwrap_or_else(|e| panic!("{json}: {e}"));
    let names: Vec<String> = files.iter().map(|(path, _)| path.display().to_string()).collect();
    for name in ["README.md", "bench/RESULTS.md", "tcp.svg", &json.replace(".json", ".md")] {
        assert!(names.iter().any(|made| made.ends_with(name)), "{name}: {names:?}");
    }
    for (path, made) in files {
        let committed = fs::read_to_string(&path).unwrap_or_default();
        let differs = committed.lines().zip(made.lines()).find(|(committed, made)| committed != made);
        assert!(
            committed == made,
            "{} is not what {json} and bench/instructions.json make: {differs:?}. `bench/run --render {json}` writes it.",
            path.display()
        );
    }
}

/// What is said to have changed is what the results say that are named beside it.
#[test]
fn the_profile_says_what_its_sources_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench");
    let text = fs::read_to_string(folder.join("PROFILE.md")).expect("bench/PROFILE.md");
    let (_, table) = text.split_once("| | before | after | how |").expect("a table of what has changed");
    let (mut kept, mut counted) = (0, 0);
    for row in table.lines().skip(2).take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let names: Vec<&str> = cells[1].split('`').skip(1).step_by(2).collect();
        for cell in &cells[2..4] {
            if let Some((said, link)) = cell.split_once(" ([") {
                let file = link.split(['(', ')']).nth(1).expect("a link");
                let json = fs::read_to_string(folder.join(file.replace(".md", ".json"))).expect(file);
                let results = Results::read(&json).expect(file);
                let contestant = Contestant::named(names[0]).expect(row);
                let figure = Figure::named(names[1]).expect(row);
                let spread = results.spread(contestant, figure).expect(row);
                assert_eq!(said, figure.show(spread.median), "{file} and {row}");
                kept += 1;
            } else {
                assert!(cell.contains(" (commit ") && names[0].ends_with("-in"), "no source: {row}");
                counted += 1;
            }
        }
    }
    assert!(kept >= 4 && counted >= 2, "{table}");
}

#[test]
fn instructions_and_readme_are_part_of_what_is_rendered() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copy = tempfile::tempdir().expect("a folder");
    fs::create_dir_all(copy.path().join("bench/results")).expect("a folder");
    let files = ["README.md", "bench/RESULTS.md", "bench/instructions.json"];
    let text = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    files.iter().for_each(|name| fs::write(copy.path().join(name), text(name)).expect("a copy"));
    let page = text("bench/RESULTS.md");
    let json = root.join(report::source_of(&page).expect("its results"));
    let rendered = |name: &str| {
        let files = report::rendered(copy.path(), &json).expect("rendered");
        files.into_iter().find(|(path, _)| *path == copy.path().join(name)).expect("is made").1
    };
    let change = |name: &str, from: &str, to: &str| {
        let before = fs::read_to_string(copy.path().join(name)).expect("a copy");
        assert!(before.contains(from), "{name}");
        fs::write(copy.path().join(name), before.replace(from, to)).expect("a change");
    };
    let before = rendered("bench/RESULTS.md");
    change("bench/instructions.json", "\"vxlan-bulk-in\": ", "\"vxlan-bulk-in\": 1");
    assert_ne!(rendered("bench/RESULTS.md"), before);
    change("README.md", "| kernel-vxlan | ", "| kernel-vxlan | 9");
    assert_eq!(rendered("README.md"), text("README.md"));
    change("README.md", "<!-- speed: end -->", "");
    let error = report::rendered(copy.path(), &json).expect_err("no marks");
    assert!(error.to_string().contains("marks"), "{error}");
}

#[test]
fn all_commands_stand_on_the_page_and_what_was_not_kept_is_said() {
    let mut last = results(3..=3, Figure::Tcp);
    let mut before = results(1..=1, Figure::Tcp);
    before.continue_after(results(2..=2, Figure::Tcp)).expect("the same machine");
    before.has_lanes(Contestant::WarrenWireguard, 1);
    last.continue_after(read_again(&before)).expect("the same machine");
    let page = report::page(&read_again(&last), "here.json", None);
    assert_eq!(page.matches("    bench/run ").count(), 3, "{page}");
    assert!(page.contains("another order each round") && !page.contains("not kept"), "{page}");
    assert!(page.contains("; 1 lane\n"), "{page}");

    // As they were written before: the last command alone, always the same order, nothing of it beside samples.
    let mut old = last.json();
    let about = old["about"].as_object_mut().expect("an object");
    about.remove("runs");
    for (key, value) in [("command", "--rounds 1 --append"), ("date", "then"), ("commit", "abc1234")] {
        about.insert(key.to_owned(), json!(value));
    }
    about.insert("load_before".to_owned(), json!("0.42"));
    for sample in old["samples"].as_array_mut().expect("samples") {
        sample.as_object_mut().expect("an object").remove("run");
    }
    let old = Results::read(&old.to_string()).expect("old results are read");
    let page = report::page(&old, "here.json", None);
    let line = "    bench/run --rounds 1 --append  # then, commit abc1234, load 0.42\n";
    assert!(page.contains(line) && page.contains("not kept"), "{page}");
    assert!(page.contains("in the same order"), "{page}");
    assert!(page.contains("ratios are of rounds of the same number"), "{page}");
    assert!(!page.contains("rounds of one command") && !page.contains("the same command"), "{page}");
    let mut more = results(4..=4, Figure::Tcp);
    more.continue_after(old).expect("the same machine");
    assert_eq!(more.runs().len(), 2);
}

#[test]
fn the_page_says_of_which_build_it_is() {
    let page = |builds: &[Value]| {
        let mut json = results(1..=1, Figure::Tcp).json();
        let run = json["about"]["runs"][0].clone();
        let runs = builds.iter().map(|build| {
            let mut run = run.clone();
            run["build"] = build.clone();
            run
        });
        json["about"]["runs"] = runs.collect();
        let results = Results::read(&json.to_string()).expect("valid");
        report::page(&read_again(&results), "here.json", None)
    };
    let shipped = page(&[json!("deploy/build-static"), json!("deploy/build-static")]);
    assert!(shipped.contains("Warren is what is shipped") && !shipped.contains("WARREN="), "{shipped}");
    let given = page(&[json!("deploy/build-static"), json!("WARREN=mine")]);
    assert!(given.contains("    WARREN=mine bench/run ") && given.contains("another build"), "{given}");
    assert!(page(&[json!("cargo")]).contains("another build"));
    let old = page(&[json!("deploy/build-static"), Value::Null]);
    assert!(old.contains("was not recorded"), "{old}");
    for page in [shipped, given, old] {
        assert!(page.contains(", sha256 ") && page.contains("under Who"), "{page}");
    }
}

#[test]
fn rounds_of_another_machine_are_refused() {
    let mut other = results(1..=1, Figure::Tcp).json();
    other["about"]["kernel"] = json!("1.0");
    let other = Results::read(&other.to_string()).expect("valid");
    let error = results(2..=2, Figure::Tcp).continue_after(other).expect_err("another kernel");
    assert!(error.to_string().contains("kernel"), "{error}");
}

/// What one command measured, and what another adds to it: one contestant alone.
fn of_two_commands(rounds: u32) -> Results {
    let mut both = results(std::iter::empty(), Figure::Tcp);
    both.continue_after(read_again(&results(1..=rounds, Figure::Tcp))).expect("the same machine");
    assert_eq!(both.last_round(), rounds);
    for round in rounds + 1..=rounds + 5 {
        both.add(round, Contestant::WarrenVxlan, Figure::Tcp, Ok(1.0.into()));
    }
    read_again(&both)
}

#[test]
fn ratios_are_of_rounds_of_one_command() {
    let both = of_two_commands(5);
    let ratio = |contestant| both.ratio(contestant, Contestant::WireguardGo, Figure::Tcp).map(|s| s.samples);
    assert_eq!(ratio(Contestant::WarrenWireguard), Some(5));
    assert_eq!(ratio(Contestant::WarrenVxlan), None);
    let page = report::page(&both, "here.json", None);
    let (_, ratios) = page.split_once("## Ratios to wireguard-go").expect("ratios");
    assert!(ratios.contains("| **warren-vxlan** | - |"), "{page}");
    assert!(page.contains("ratios are of rounds of one command"), "{page}");

    // The same number of a round does not make it the same round.
    let mut json = both.json();
    for sample in json["samples"].as_array_mut().expect("samples") {
        sample["round"] = json!(sample["round"].as_u64().map(|round| (round - 1) % 5 + 1));
    }
    let again = Results::read(&json.to_string()).expect("valid");
    assert!(again.ratio(Contestant::WarrenVxlan, Contestant::WireguardGo, Figure::Tcp).is_none());
    assert_eq!(again.count(Contestant::WarrenVxlan, Figure::Tcp), 5);
}

#[test]
fn commands_of_old_samples_are_told_by_what_they_asked_for() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results/2026-11-22b.json");
    let text = fs::read_to_string(path).expect("results");
    assert!(!text.contains("\"run\":"), "old results, which do not say it");
    let results = Results::read(&text).expect("results");
    let pairs =
        |contestant, to, figure| results.ratio(contestant, to, figure).map_or(0, |spread| spread.samples);
    use Contestant::{Bare, FlannelUdp, WarrenWireguard, WireguardGo};
    assert_eq!(pairs(WarrenWireguard, WireguardGo, Figure::Tcp), 5);
    assert_eq!(pairs(WarrenWireguard, WireguardGo, Figure::Tcp16), 1);
    assert_eq!(pairs(FlannelUdp, Bare, Figure::Tcp), 1);
    assert_eq!(pairs(Bare, WireguardGo, Figure::Tcp), 0, "forty minutes later");

    // Of these the commands of all but the last round are not known.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results/2026-11-22.json");
    let results = Results::read(&fs::read_to_string(path).expect("results")).expect("results");
    let ratio = results.ratio(WarrenWireguard, WireguardGo, Figure::Tcp).expect("pairs");
    assert_eq!(ratio.samples, 5);
}

#[test]
fn few_samples_are_marked_and_counted_by_cell() {
    let page = |results: &Results| report::page(&read_again(results), "here.json", None);
    let enough = page(&results(1..=5, Figure::Tcp));
    assert!(
        enough.contains("of 5 samples, each of 1 s where its section does not say otherwise, interleaved"),
        "{enough}"
    );
    assert!(enough.contains("`bench/scaling`"), "what these tables cannot show: {enough}");
    assert!(enough.contains("| wireguard-go | 3.00 (1.00 to 5.00) |"), "{enough}");
    assert!(!enough.contains("sample)") && !enough.contains("fewer than five"), "{enough}");

    let mut few = results(1..=5, Figure::Tcp);
    for round in 1..=6 {
        few.add(round, Contestant::WireguardGo, Figure::Tcp4, Ok(f64::from(round).into()));
    }
    few.add(1, Contestant::WarrenWireguard, Figure::Tcp4, Ok(7.0.into()));
    few.add(2, Contestant::WarrenWireguard, Figure::Tcp4, Err("did not start".to_owned()));
    let page = page(&few);
    assert!(page.contains("of 1 to 6 samples, each of 1 s where"), "{page}");
    assert!(page.contains("Those of fewer than five say so."), "{page}");
    assert!(page.contains("| wireguard-go | 3.00 (1.00 to 5.00) | 3.50 (1.00 to 6.00) |"), "{page}");
    assert!(page.contains("| **warren-wireguard** | ≥ 13.00 (11.00 to 15.00) | 7.00 (1 sample) |"), "{page}");
    assert!(page.contains("| 4.33 | 7.00 (1) |"), "the ratios: {page}");
    assert!(page.contains("In brackets: of how many rounds"), "{page}");
    assert!(page.contains("4 TCP streams, to wireguard-go | 7.00 (1 sample) |"), "{page}");
    let charts = plot::all(&few);
    let marked =
        charts.iter().any(|(_, svg)| svg.contains(">7.00 (1)</text>") && svg.contains("In brackets"));
    assert!(marked, "{charts:?}");
}

/// A legend is for what stands in the table below it.
#[test]
fn ratios_say_of_how_many_rounds_they_are_by_their_own_counts() {
    let page = |results: &Results| report::page(&read_again(results), "here.json", None);
    let ratios = |page: &str| page.split_once("## Ratios to wireguard-go").expect("ratios").1.to_owned();
    // Samples enough, of which few are of the same round.
    let mut few = results(1..=5, Figure::Tcp);
    for round in 1..=5 {
        few.add(round, Contestant::WireguardGo, Figure::Tcp4, Ok(1.0.into()));
        few.add(round + 3, Contestant::WarrenWireguard, Figure::Tcp4, Ok(2.0.into()));
    }
    let few = page(&few);
    assert!(!few.contains("Those of fewer than five") && ratios(&few).contains("| 2.00 (2) |"), "{few}");
    assert!(ratios(&few).contains("In brackets: of how many rounds"), "{few}");
    // Few samples, of a figure that has no ratios.
    let mut other = results(1..=5, Figure::Tcp);
    other.add(1, Contestant::WireguardGo, Figure::UdpSmall, Ok(1.0.into()));
    let other = page(&other);
    assert!(other.contains("Those of fewer than five") && !ratios(&other).contains("In brackets"), "{other}");
}

#[test]
fn sections_say_how_long_their_samples_are_where_it_is_otherwise() {
    let page = |figure| report::page(&results(1..=5, figure), "here.json", None);
    assert!(page(Figure::UdpLossFree).contains("in tries of 1 s, whatever the seconds of the others"));
    assert_eq!(idle::TIMES, 6);
    assert!(page(Figure::IdleCpu).contains("for six times the seconds of the other samples"));
}

#[test]
fn a_figure_that_the_sender_limits_is_marked() {
    let page = report::page(&read_again(&results(1..=3, Figure::UdpSmallLossFree)), "here.json", None);
    assert!(page.contains("| **warren-wireguard** | ≥ 12 (11 to 13, 3 samples) |"), "{page}");
    assert!(page.contains("| wireguard-go | 2 (1 to 3, 3 samples) |"), "{page}");
    assert!(page.contains("| **warren-wireguard-2-lanes** | 22 (21 to 23, 3 samples) |"), "{page}");
    let charts = plot::all(&results(1..=3, Figure::UdpSmallLossFree));
    assert!(
        charts.iter().any(|(name, svg)| *name == "udp.svg" && svg.contains(">≥ 12 (3)</text>")),
        "{charts:?}"
    );
}

#[test]
fn the_judged_cost_is_the_machines_and_the_programs_stand_beside_it() {
    let goals = |figure| {
        let mut text = String::new();
        goals::write(&mut text, &results(1..=1, figure));
        text
    };
    let machine = goals(Figure::CpuMachine);
    assert!(machine.contains("11.00 (1 sample) | 0.5 | 0.3 | **missed** |"), "{machine}");
    for figure in [Figure::CpuSender, Figure::CpuReceiver] {
        let program = goals(figure);
        assert!(
            program.contains("s program for each GB, to wireguard-go | 11.00 (1 sample) | - | - |  |"),
            "{program}"
        );
    }
}

#[test]
fn what_services_gave_stays_with_the_results_and_stands_on_the_page() {
    let services = json!({"connections": {
        "about": {}, "threads": 16, "rounds": 1, "seconds": 1, "ports": "all", "samples": [],
        "rows": [
            {"contestant": "kube-proxy-kernel-vxlan", "per_second": {"median": 10_000.0, "least": 9_000.0, "most": 11_000.0},
             "beside": []},
            {"contestant": "warren-vxlan", "per_second": {"median": 6_000.0, "least": 5_000.0, "most": 7_000.0},
             "beside": [
                {"peer": "kube-proxy-kernel-vxlan", "ratio": 0.6, "bar": 0.5,
                 "ratio_by_round": {"median": 0.6, "least": 0.5, "most": 0.7}},
                {"peer": "kube-proxy-iptables-kernel-vxlan", "ratio": 0.7, "bar": null,
                 "ratio_by_round": {"median": 0.7, "least": 0.6, "most": 0.8}},
             ]},
        ],
    }});
    let mut before = results(1..=1, Figure::Tcp);
    before.take_services(services.clone());
    let mut after = results(2..=2, Figure::Tcp);
    after.continue_after(read_again(&before)).expect("the same machine");
    assert_eq!(after.services(), Some(&services));
    let page = report::page(&read_again(&after), "here.json", None);
    for line in [
        "## Services, beside kube-proxy\n",
        "| kube-proxy-kernel-vxlan | 10000 (9000 to 11000) | - | - | - | - |\n",
        "| **warren-vxlan** | 6000 (5000 to 7000) | kube-proxy-kernel-vxlan | 0.60 | 0.60 (0.50 to 0.70) | 0.5 |\n",
        "|  |  | kube-proxy-iptables-kernel-vxlan | 0.70 | 0.70 (0.60 to 0.80) | - |\n",
    ] {
        assert!(page.contains(line), "{line}{page}");
    }
    let short = service_tables::short(&services);
    let both = "0.60 (kube-proxy-kernel-vxlan), 0.70 (kube-proxy-iptables-kernel-vxlan)";
    assert!(short.contains(&format!("| **warren-vxlan** | 6000 | {both} |")), "{short}");
    assert!(results(1..=1, Figure::Tcp).services().is_none());
}

#[test]
fn lanes_that_are_set_are_measured_where_lanes_matter() {
    for contestant in Contestant::ALL {
        assert_eq!(Contestant::named(contestant.name()), Some(contestant));
        let works = Work::ALL.into_iter().filter(|work| contestant.usually_does(*work)).count();
        let set = contestant.name().ends_with("-2-lanes");
        assert_eq!(works, if set { 5 } else { Work::ALL.len() }, "{contestant:?}");
        assert!(!set || contestant.is_ours());
    }
}

#[test]
fn the_help_of_the_script_knows_every_option() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let help = Command::new(root.join("bench/run")).arg("--help").output().expect("bench/run --help");
    let help = String::from_utf8(help.stdout).expect("text");
    for option in [
        "--rounds",
        "--seconds",
        "--append",
        "--output",
        "--lanes",
        "--mtu",
        "--only",
        "--tests",
        "--render",
        "--no-services",
        "--services",
        "--services-only",
    ] {
        assert!(help.contains(option), "{option}: {help}");
    }
}
