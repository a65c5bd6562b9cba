//! Tables of what was measured about Services, from the JSON alone.

use std::fmt::Write as _;

use serde_json::Value;

/// Everything that is there, under a heading of this level: `#`, `##`.
pub fn all(services: &Value, level: &str) -> String {
    let mut out = format!("{level} Services, beside kube-proxy\n");
    type Write = fn(&mut String, &Value);
    let sections: [(&str, &str, Write); 5] = [
        ("connections", "Connections per second through a ClusterIP", connections),
        ("throughput", "One TCP stream, pod to pod and through a ClusterIP", throughput),
        ("rules", "From nothing, and one change", rules),
        ("changes", "From nothing, and one change, in one process", changes),
        ("instructions", "Instructions of a burst through a ClusterIP", instructions),
    ];
    for (name, title, write) in sections {
        if let Some(section) = services.get(name) {
            let _ = writeln!(out, "\n{level}# {title}\n");
            write(&mut out, section);
            out.push('\n');
            footer(&mut out, section);
        }
    }
    out
}

/// The most important of it, for README.
pub fn short(services: &Value) -> String {
    let mut out = String::new();
    if let Some(section) = services.get("connections") {
        out.push_str("| through a ClusterIP | connections per second | of kube-proxy's |\n|---|---|---|\n");
        for row in rows(section) {
            let of = |beside: &Value| format!("{:.2} ({})", number(&beside["ratio"]), text(&beside["peer"]));
            let ratios: Vec<String> = besides(row).map(of).collect();
            let ratios = if ratios.is_empty() { "-".to_owned() } else { ratios.join(", ") };
            let name = name(text(&row["contestant"]));
            let _ = writeln!(out, "| {name} | {:.0} | {} |", number(&row["per_second"]["median"]), ratios);
        }
    }
    if let Some(section) = services.get("rules") {
        let last = |rows: &[Value]| rows.last().cloned().unwrap_or_default();
        let theirs = last(rows(section));
        let ours = last(section["warren"].as_array().map_or(&[], Vec::as_slice));
        let _ = write!(
            out,
            "\n| {} Services, {} endpoints | kube-proxy | Warren |\n|---|---|---|\n\
             | from nothing | {} | {} |\n| one Service's endpoints change: median | {} | {} |\n\
             | memory | {:.0} MiB | {:.0} MiB more |\n\n\
             This table compares unlike things: kube-proxy with a kernel, Warren's state and packet line in one process \
             without one.\n",
            theirs["services"],
            theirs["endpoints"],
            ms(&theirs["first_sync_ms"]),
            ms(&ours["from_nothing_ms"]),
            ms(&theirs["change_ms"]["median"]),
            ms(&ours["change_p50_ms"]),
            number(&theirs["peak_mib"]),
            number(&ours["memory_mib"]),
        );
    }
    if let Some(section) = services.get("throughput") {
        let of = |row: &Value| {
            let loss = &row["loss_percent"];
            let [mean, low, high] = ["mean", "low", "high"].map(|key| number(&loss[key]));
            format!("{mean:.1} % (95 % interval {low:.1} to {high:.1}) with {}", text(&row["contestant"]))
        };
        let rows: Vec<String> = rows(section).iter().map(of).collect();
        let _ = writeln!(out, "\nWhat a Service costs one TCP stream: {}.", rows.join(", "));
    }
    if let Some(section) = services.get("instructions") {
        let of = |row: &Value| {
            let [service, many] = ["service_to_pod", "many_to_ten"].map(|key| percent_more(&row[key]));
            let (encap, services) = (text(&row["encap"]), &row["services"]);
            format!("{service} with {encap}, and {many} at {services} Services beside 10")
        };
        let rows: Vec<String> = rows(section).iter().map(of).collect();
        let _ = writeln!(out, "What it adds to the instructions of a burst: {}.", rows.join("; "));
    }
    out
}

fn connections(out: &mut String, section: &Value) {
    let _ = writeln!(
        out,
        "Connect, one byte there and back, close; a pod of one node to a pod of the other. {} client threads, as many of \
         the server; ports {}. Median of {} interleaved rounds of {} s (least to most).\n",
        section["threads"],
        text(&section["ports"]),
        section["rounds"],
        section["seconds"],
    );
    out.push_str("| | per second | beside | ratio of medians | ratios of single rounds | bar |\n");
    out.push_str("|---|---|---|---|---|---|\n");
    for row in rows(section) {
        let mut head = format!("{} | {}", name(text(&row["contestant"])), spread(&row["per_second"], 0));
        for beside in besides(row) {
            let bar = if beside["bar"].is_null() { "-".to_owned() } else { beside["bar"].to_string() };
            let _ = writeln!(
                out,
                "| {head} | {} | {:.2} | {} | {bar} |",
                text(&beside["peer"]),
                number(&beside["ratio"]),
                spread(&beside["ratio_by_round"], 2),
            );
            // The next line is about the same.
            head = " | ".to_owned();
        }
        if besides(row).next().is_none() {
            let _ = writeln!(out, "| {head} | - | - | - | - |");
        }
    }
    let samples = section["samples"].as_array().map_or(&[][..], Vec::as_slice);
    let failed: u64 = samples.iter().filter_map(|s| s["failed"].as_u64()).sum();
    let _ = writeln!(out, "\nConnections that failed: {failed}.");
}

/// With whom a contestant is compared: one, in old results, or several.
fn besides(row: &Value) -> impl Iterator<Item = &Value> {
    let beside = &row["beside"];
    let many = beside.as_array().map_or(&[][..], Vec::as_slice);
    many.iter().chain(Some(beside).filter(|beside| beside.is_object()))
}

fn name(name: &str) -> String {
    if name.starts_with("warren") { format!("**{name}**") } else { name.to_owned() }
}

fn throughput(out: &mut String, section: &Value) {
    let _ = writeln!(
        out,
        "iperf3 (cubic), {} interleaved rounds of pod, \
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
            name(text(&row["contestant"])),
            spread(&row["pod_gbit"], 2),
            spread(&row["service_gbit"], 2),
            number(&loss["mean"]),
            number(&loss["low"]),
            number(&loss["high"]),
            loss["bar"],
        );
    }
}

fn rules(out: &mut String, section: &Value) {
    out.push_str(
        "kube-proxy: a process with a kernel; \"from nothing\" is its own first sync (its metric), and from the moment \
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
        let [from_nothing, median, p99] = own_times(row);
        let _ = writeln!(
            out,
            "| **Warren** | {} | {} | {from_nothing} | - | {median} | {p99} | {:.0} MiB (growth by the compiled state) |",
            row["services"],
            row["endpoints"],
            number(&row["memory_mib"]),
        );
    }
}

fn changes(out: &mut String, section: &Value) {
    out.push_str(
        "Warren's state line and packet line in one process (`bench/services.rs`), without kernel or watch: from objects \
         in memory to applied, and from the event of a change to the first packet that goes elsewhere. A change replaces \
         all endpoints of one Service.\n\n\
         | Services | endpoints | from nothing | change, median | change, p99 | memory |\n|---|---|---|---|---|---|\n",
    );
    for row in rows(section) {
        let [from_nothing, median, p99] = own_times(row);
        let _ = writeln!(
            out,
            "| {} | {} | {from_nothing} | {median} | {p99} | {:.0} MiB more |",
            row["services"],
            row["endpoints"],
            number(&row["memory_mib"]),
        );
    }
    if let [ten, .., many] = rows(section) {
        let ratio = number(&many["change_p99_ms"]) / number(&ten["change_p99_ms"]);
        let _ =
            writeln!(out, "\np99 of a change at {} Services: {ratio:.2} times that at 10.", many["services"]);
    }
}

fn own_times(row: &Value) -> [String; 3] {
    ["from_nothing_ms", "change_p50_ms", "change_p99_ms"].map(|key| ms(&row[key]))
}

fn instructions(out: &mut String, section: &Value) {
    out.push_str(
        "Counted by callgrind: one super-packet of 64,000 bytes, from the TUN to the datagrams. Bars: a Service at most \
         3 % above plain pod to pod (held by `bench/instructions`), many Services at most 10 % above 10.\n\n\
         | | pod to pod | a Service of 10 | a Service of many | Service to pod | many to 10 |\n|---|---|---|---|---|---|\n",
    );
    for row in rows(section) {
        let _ = writeln!(
            out,
            "| **{}**, {} Services | {} | {} | {} | {} | {} |",
            text(&row["encap"]),
            row["services"],
            row["pod"],
            row["of_ten"],
            row["of_many"],
            percent_more(&row["service_to_pod"]),
            percent_more(&row["many_to_ten"]),
        );
    }
}

fn percent_more(ratio: &Value) -> String {
    format!("{:+.2} %", (number(ratio) - 1.0) * 100.0)
}

fn footer(out: &mut String, section: &Value) {
    let about = &section["about"];
    let ours = section["warren"].as_array().into_iter().flatten();
    let a_debug_build = |row: &Value| row["debug_build"] == true;
    let means_nothing = a_debug_build(about) || ours.chain(rows(section)).any(a_debug_build);
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
        build(about),
        text(&about["kube_proxy"]),
        text(&about["nft"]),
        text(&about["commit"]),
        text(&about["command"]),
        if about["bench_debug_build"] == true { " The bench program was a debug build." } else { "" },
        if means_nothing { " **A debug build: these figures mean nothing.**" } else { "" },
        note,
    );
    for row in rows(section).iter().filter(|row| row["settings"].is_string()) {
        let _ = writeln!(out, "- {}: {}", text(&row["contestant"]), text(&row["settings"]));
    }
}

/// Warren's version, and of which build the figures are, where that was recorded.
fn build(about: &Value) -> String {
    let version = text(&about["warren"]);
    match (text(&about["build"]), text(&about["sha256"])) {
        ("", _) => version.to_owned(),
        (build, "") => format!("{version} ({build})"),
        (build, sum) => format!("{version} ({build}, sha256 {sum})"),
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
