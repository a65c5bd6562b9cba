//! The gate of instructions: what it lets through, and what `tests/run` makes of its answer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::committed::judge;
use crate::scaling::{self, Both};
use crate::verdict::Verdict;

/// What is committed, and counts that are the same.
fn committed() -> (Value, BTreeMap<String, u64>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/instructions.json");
    let text = fs::read_to_string(path).expect("bench/instructions.json");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let counts = json["instructions"].as_object().expect("counts").iter();
    let counts = counts.map(|(name, count)| (name.clone(), count.as_u64().expect("a count"))).collect();
    (json, counts)
}

fn verdict(json: &Value, counts: &BTreeMap<String, u64>) -> (Verdict, String) {
    let of = |key: &str| json[key].as_str().expect("text").to_owned();
    judge(json, counts, &of("compiler"), &of("processor"))
}

#[test]
fn what_is_committed_is_kept_and_what_costs_more_is_not() {
    let (json, mut counts) = committed();
    assert_eq!(verdict(&json, &counts).0, Verdict::Kept);
    for (percent, expected) in [(2, Verdict::Kept), (4, Verdict::Broken), (-9, Verdict::Kept)] {
        let before = committed().1["vxlan-small-in"] as i64;
        counts.insert("vxlan-small-in".to_owned(), (before + before * percent / 100) as u64);
        assert_eq!(verdict(&json, &counts).0, expected, "{percent} % more");
    }
    // Another compiler may cost more.
    counts.insert("vxlan-small-in".to_owned(), committed().1["vxlan-small-in"] * 108 / 100);
    let processor = json["processor"].as_str().expect("text");
    assert_eq!(judge(&json, &counts, "rustc 9", processor).0, Verdict::Kept);
}

#[test]
fn bursts_that_are_no_longer_counted_or_not_yet_committed_fail() {
    for is_here in [true, false] {
        let (json, mut counts) = committed();
        counts.remove("vxlan-small-out");
        let (verdict, table) = match is_here {
            true => verdict(&json, &counts),
            false => judge(&json, &counts, "rustc 9", "another"),
        };
        assert_eq!(verdict, Verdict::Broken, "{table}");
        assert!(table.contains("not the same ones: vxlan-small-out."), "{table}");
    }
    let (json, mut counts) = committed();
    counts.insert("vxlan-other-out".to_owned(), 1);
    assert_eq!(verdict(&json, &counts).0, Verdict::Broken);
}

#[test]
fn on_another_processor_nothing_is_compared_but_services() {
    let (json, mut counts) = committed();
    let (verdict, table) = judge(&json, &counts, "rustc 9", "aarch64");
    assert_eq!(verdict, Verdict::NotCompared, "{table}");
    assert!(table.contains("WARNING: NOT COMPARED: "), "{table}");
    let bulk = counts["vxlan-bulk-in"];
    counts.insert("vxlan-service-in".to_owned(), bulk * 104 / 100);
    assert_eq!(judge(&json, &counts, "rustc 9", "aarch64").0, Verdict::Broken);
    counts.retain(|name, _| !name.contains("-service-"));
    let without: Value = json!({ "instructions": counts, "processor": "x", "compiler": "y" });
    assert_eq!(judge(&without, &counts, "y", "x").0, Verdict::Broken, "no Service at all");
}

#[test]
fn lanes_that_do_not_scale_fail_where_the_processors_can() {
    let judged = |processors, shared, apart| scaling::judge(processors, 1.0, || Both { shared, apart }).0;
    let not_again = || panic!("enough is known");
    assert_eq!(scaling::judge(2, scaling::BAR, not_again).0, Verdict::Kept);
    assert_eq!(scaling::judge(1, 1.9, not_again).0, Verdict::NotCompared, "no pass on one processor");
    assert_eq!(judged(2, scaling::BAR, 2.0), Verdict::Kept, "the second time");
    assert_eq!(judged(2, 1.59, 1.9), Verdict::Broken);
    assert_eq!(judged(2, 1.0, 1.9), Verdict::Broken, "a lock");
    assert_eq!(judged(2, 0.95, 1.3), Verdict::Broken, "a lock, and two threads of one core");
    assert_eq!(judged(2, 1.3, 1.4), Verdict::NotCompared, "two threads of one core");
    assert_eq!(judged(2, 1.58, 1.61), Verdict::NotCompared, "and of a better one");
    assert_eq!(judged(64, 0.95, 1.0), Verdict::NotCompared, "busy");
    for processors in [1, 2] {
        let (_, text) = scaling::judge(processors, 1.0, || Both { shared: 1.3, apart: 1.4 });
        assert!(text.starts_with("WARNING: NOT COMPARED: "), "{text}");
    }
}

/// `tests/run instructions`, with a gate that ends so.
fn section(says: &str, ends: u8) -> (bool, String) {
    let gate = format!("echo '{says}'; exit {ends}");
    let tree = crate::scripts::Tree::of(
        &["tests/run", "Cargo.toml"],
        &[("bench/instructions", &gate), ("bench/scaling", "exit 0"), ("bench/micro", "exit 0")],
    );
    let output = tree.run("tests/run instructions", &[]);
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn what_was_not_compared_is_no_pass() {
    let (is_well, said) = section("all of it", 0);
    assert!(is_well && said.contains("\n3 passed, 0 failed"), "{said}");
    let (is_well, said) = section("WARNING: NOT COMPARED: another processor", 3);
    assert!(is_well && said.contains("\n2 passed, 0 failed"), "{said}");
    let (_, summary) = said.split_once("=== summary").expect("a summary");
    assert!(summary.contains("WARNING: NOT COMPARED: another processor"), "{said}");
    let (_, said) = section("not a word", 3);
    assert!(said.contains("WARNING: NOT COMPARED: bench/instructions"), "{said}");
    let (is_well, said) = section("FAILED: costs more", 1);
    assert!(!is_well && said.contains("\n2 passed, 1 failed"), "{said}");
}
