//! Whether counts are those that were committed. Pure, so that tests can show it what no machine here has.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use crate::verdict::Verdict;

/// Percent that a burst may cost more than committed.
const TOLERANCE: f64 = 3.0;
/// The same where the compiler is not the one that the figures were made with.
const TOLERANCE_OTHER_COMPILER: f64 = 10.0;
/// Percent that a Service may add to a burst from pod to pod.
const SERVICE_MORE: f64 = 3.0;

/// Compares, and says in a table how.
pub fn judge(
    committed: &Value,
    counts: &BTreeMap<String, u64>,
    compiler: &str,
    processor: &str,
) -> (Verdict, String) {
    let same_processor = committed["processor"] == processor;
    let same_compiler = committed["compiler"] == compiler;
    let allowed = if same_compiler { TOLERANCE } else { TOLERANCE_OTHER_COMPILER };
    let (mut worse, mut better, mut unknown) = (Vec::new(), Vec::new(), Vec::new());

    let mut out = format!("{:<24} {:>14} {:>14} {:>9}\n", "one burst", "instructions", "committed", "change");
    for (name, count) in counts {
        let Some(before) = committed["instructions"][name].as_u64() else {
            let _ = writeln!(out, "{name:<24} {count:>14} {:>14}", "none");
            unknown.push(name.as_str());
            continue;
        };
        let change = (*count as f64 / before as f64 - 1.0) * 100.0;
        let _ = writeln!(out, "{name:<24} {count:>14} {before:>14} {change:>+7.2} %");
        if change > allowed {
            worse.push(name.as_str());
        } else if change < -TOLERANCE {
            better.push(name.as_str());
        }
    }
    for (name, before) in committed["instructions"].as_object().into_iter().flatten() {
        if !counts.contains_key(name) {
            let _ = writeln!(out, "{name:<24} {:>14} {before:>14}", "none");
            unknown.push(name);
        }
    }
    let _ = writeln!(out, "allowed: {allowed} % more");

    // Whatever the processor: which bursts there are, and what a Service adds, is seen here and now.
    let mut broken = false;
    if !unknown.is_empty() {
        let _ = writeln!(
            out,
            "FAILED: committed and counted bursts are not the same ones: {}. If they are meant to change, \
             `bench/instructions --renew` writes them, and the commit says why.",
            unknown.join(", ")
        );
        broken = true;
    }
    broken |= services_cost_too_much(counts, &mut out);
    if !same_compiler {
        let theirs = &committed["compiler"];
        let _ = writeln!(
            out,
            "WARNING: the figures were made with {theirs}, this is {compiler}: {allowed} % are allowed"
        );
    }
    if !same_processor {
        let theirs = &committed["processor"];
        let _ =
            writeln!(out, "WARNING: NOT COMPARED: the instructions are for {theirs}, this is {processor}");
        return (if broken { Verdict::Broken } else { Verdict::NotCompared }, out);
    }
    if !better.is_empty() && same_compiler {
        let _ = writeln!(out, "cheaper now: {}; `bench/instructions --renew` keeps it so", better.join(", "));
    }
    if !worse.is_empty() {
        let _ = writeln!(
            out,
            "FAILED: costs more than committed: {}. Where that is worth it, `bench/instructions --renew` writes the \
             new figures, and the commit says why.",
            worse.join(", ")
        );
        broken = true;
    }
    (if broken { Verdict::Broken } else { Verdict::Kept }, out)
}

/// Bursts from pod to pod beside the same ones through a Service.
fn services_cost_too_much(counts: &BTreeMap<String, u64>, out: &mut String) -> bool {
    let services: Vec<(&String, &u64)> =
        counts.iter().filter(|(name, _)| name.contains("-service-")).collect();
    let mut too_much = services.is_empty();
    if too_much {
        out.push_str("FAILED: no burst through a Service was counted\n");
    }
    for (service, count) in services {
        let plain = service.replace("-service-", "-bulk-");
        let Some(&before) = counts.get(&plain) else {
            let _ = writeln!(out, "FAILED: {plain} was not counted, with which {service} is compared");
            too_much = true;
            continue;
        };
        let more = (*count as f64 / before as f64 - 1.0) * 100.0;
        let _ = writeln!(out, "{service}: {more:+.2} % to {plain}, allowed {SERVICE_MORE} %");
        if more > SERVICE_MORE {
            out.push_str("FAILED: a Service costs too much\n");
            too_much = true;
        }
    }
    too_much
}
