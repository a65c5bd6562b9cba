//! What the demo says: plain words while it runs, one JSON document for programs.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Silence of this length gets a sign of life.
const PATIENCE: Duration = Duration::from_secs(2);
/// Column in which what was seen begins.
const WHAT_WIDTH: usize = 52;

/// One thing that had to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// What was tried.
    pub what: String,
    /// What had to be seen.
    pub expected: String,
    /// What was seen.
    pub seen: String,
    /// Whether that is what had to be.
    pub ok: bool,
}

/// One row of the table of figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Figure {
    /// Over what.
    pub path: String,
    /// TCP, one stream, 10^9 bit/s.
    pub gbit_per_second: f64,
    /// One byte there and back, half were faster; the best of a few runs.
    pub round_trip_p50_us: f64,
    /// One in a hundred was slower.
    pub round_trip_p99_us: f64,
    /// Largest packet of a pod on it.
    pub mtu: u16,
}

#[derive(Debug, Serialize)]
struct Scene {
    title: String,
    seconds: f64,
    ok: bool,
    checks: Vec<Check>,
}

#[derive(Debug, Serialize)]
struct Document<'a> {
    ok: bool,
    seconds: f64,
    first_cross_node_reply_seconds: Option<f64>,
    nodes: &'a [String],
    scenes: &'a [Scene],
    figures: &'a [Figure],
}

/// Collects what happens and says it.
pub(super) struct Report {
    out: Box<dyn Write>,
    json: bool,
    colour: bool,
    live: bool,
    started: Instant,
    scene_started: Instant,
    spoke: Instant,
    /// The moving line now on the terminal: the second it shows.
    transient: Option<u64>,
    scenes: Vec<Scene>,
    figures: Vec<Figure>,
    nodes: Vec<String>,
    first_reply: Option<Duration>,
}

impl Report {
    /// Words go to stdout, or to stderr when stdout is for the JSON document.
    pub(super) fn new(json: bool, now: Instant) -> Report {
        let live = if json { io::stderr().is_terminal() } else { io::stdout().is_terminal() };
        Report {
            out: if json { Box::new(io::stderr()) } else { Box::new(io::stdout()) },
            json,
            // https://no-color.org
            colour: live && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
            live,
            started: now,
            scene_started: now,
            spoke: now,
            transient: None,
            scenes: Vec::new(),
            figures: Vec::new(),
            nodes: Vec::new(),
            first_reply: None,
        }
    }

    /// Says a line.
    pub(super) fn say(&mut self, line: &str) {
        self.clear();
        // A reader that went away (`| head`) must not stop the demo from cleaning up.
        let _ = writeln!(self.out, "{line}");
        let _ = self.out.flush();
    }

    /// Says it strongly.
    pub(super) fn headline(&mut self, line: &str) {
        let line = self.paint("1", line);
        self.say(&line);
    }

    /// Names a node and what it has.
    pub(super) fn node(&mut self, line: &str) {
        self.nodes.push(line.to_string());
        self.say(&format!("  {line}"));
    }

    /// Opens a scene: its title, and in plain words what happens in it.
    pub(super) fn scene(&mut self, title: &str, explanation: &str, now: Instant) {
        self.close_scene(now);
        self.scene_started = now;
        self.spoke = now;
        let number = self.scenes.len() + 1;
        self.say("");
        self.headline(&format!("{number}. {title}"));
        self.say(&format!("   {explanation}"));
        self.scenes.push(Scene { title: title.into(), seconds: 0.0, ok: true, checks: Vec::new() });
    }

    /// Records and says how one thing went.
    pub(super) fn check(&mut self, check: Check, now: Instant) {
        self.spoke = now;
        let line = if check.ok {
            format!("   {} {:WHAT_WIDTH$} {}", self.paint("32", "ok"), check.what, check.seen)
        } else {
            let failed = self.paint("1;31", "FAILED");
            format!(
                "   {failed} {}\n       expected {}\n       seen     {}",
                check.what, check.expected, check.seen
            )
        };
        self.say(&line);
        if let Some(scene) = self.scenes.last_mut() {
            scene.ok &= check.ok;
            scene.checks.push(check);
        }
    }

    /// Called while something takes its time: a moving line on a terminal, a line now and then elsewhere.
    pub(super) fn waiting(&mut self, for_what: &str, now: Instant) {
        let silent = now.duration_since(self.spoke);
        if silent < PATIENCE {
            return;
        }
        let seconds = now.duration_since(self.scene_started).as_secs();
        let text = format!("   ... {for_what} ({seconds} s)");
        if self.live {
            // Asked very often, by what is measuring: once a second is enough.
            if self.transient == Some(seconds) {
                return;
            }
            let _ = write!(self.out, "\r\x1b[K{text}");
            let _ = self.out.flush();
            self.transient = Some(seconds);
        } else {
            self.say(&text);
            self.spoke = now;
        }
    }

    /// A packet has come back from another node: only the first time counts.
    pub(super) fn cross_node_reply(&mut self, now: Instant) {
        self.first_reply.get_or_insert(now.duration_since(self.started));
    }

    /// Adds a row to the table of figures.
    pub(super) fn figure(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    /// Whether there is one already.
    pub(super) fn has_figures(&self) -> bool {
        !self.figures.is_empty()
    }

    /// Whether the last check went well.
    pub(super) fn last_ok(&self) -> bool {
        self.scenes.last().and_then(|scene| scene.checks.last()).is_some_and(|check| check.ok)
    }

    /// Says the table: each path beside the first, the bare one.
    pub(super) fn say_figures(&mut self) {
        for line in table(&self.figures) {
            self.say(&line);
        }
    }

    /// The demo cannot go on: that fails the scene which is on.
    pub(super) fn broke_off(&mut self, why: &str, now: Instant) {
        if self.scenes.is_empty() {
            self.scene("Before the first scene", "", now);
        }
        let (what, expected) = ("the demo broke off".into(), "it goes on".into());
        self.check(Check { what, expected, seen: why.into(), ok: false }, now);
    }

    /// Ends the last scene, says how it all went, prints the document; whether all is well.
    pub(super) fn finish(&mut self, now: Instant) -> bool {
        self.close_scene(now);
        let failed: Vec<_> = self.scenes.iter().filter(|s| !s.ok).map(|s| s.title.clone()).collect();
        let checks: usize = self.scenes.iter().map(|s| s.checks.len()).sum();
        let seconds = now.duration_since(self.started).as_secs_f64();
        self.say("");
        if let Some(first) = self.first_reply {
            self.say(&format!(
                "First reply from a pod on another node: {:.1} s after the start.",
                first.as_secs_f64()
            ));
        }
        if failed.is_empty() {
            let line = format!(
                "All {} scenes went as they should: {checks} checks, {seconds:.1} s.",
                self.scenes.len()
            );
            let line = self.paint("1;32", &line);
            self.say(&line);
        } else {
            let line = format!("{} of {} scenes FAILED:", failed.len(), self.scenes.len());
            let line = self.paint("1;31", &line);
            self.say(&line);
            for title in &failed {
                self.say(&format!("  {title}"));
            }
        }
        if self.json {
            self.print_document(failed.is_empty(), seconds);
        }
        failed.is_empty()
    }

    fn print_document(&self, ok: bool, seconds: f64) {
        let document = Document {
            ok,
            seconds,
            first_cross_node_reply_seconds: self.first_reply.map(|t| t.as_secs_f64()),
            nodes: &self.nodes,
            scenes: &self.scenes,
            figures: &self.figures,
        };
        let mut out = io::stdout().lock();
        // Plain data always has a JSON form; a closed stdout has no reader to tell.
        let _ = serde_json::to_writer_pretty(&mut out, &document);
        let _ = writeln!(out);
    }

    fn close_scene(&mut self, now: Instant) {
        if let Some(scene) = self.scenes.last_mut()
            && scene.seconds == 0.0
        {
            scene.seconds = now.duration_since(self.scene_started).as_secs_f64();
        }
    }

    fn clear(&mut self) {
        if self.transient.take().is_some() {
            let _ = write!(self.out, "\r\x1b[K");
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }
}

fn table(figures: &[Figure]) -> Vec<String> {
    let Some(bare) = figures.first() else { return Vec::new() };
    let mut lines = vec![format!(
        "   {:28} {:>6} {:>14} {:>8}   {:>14} {:>9} {:>8}",
        "path", "MTU", "TCP, 1 stream", "of bare", "round trip p50", "p99", "of bare"
    )];
    let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    for figure in figures {
        lines.push(format!(
            "   {:28} {:>6} {:>7.2} Gbit/s {:>8.2}   {:>11.1} us {:>6.1} us {:>8.2}",
            figure.path,
            figure.mtu,
            figure.gbit_per_second,
            ratio(figure.gbit_per_second, bare.gbit_per_second),
            figure.round_trip_p50_us,
            figure.round_trip_p99_us,
            ratio(figure.round_trip_p50_us, bare.round_trip_p50_us),
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock;

    fn figure(path: &str, gbit: f64, p50: f64) -> Figure {
        Figure {
            path: path.into(),
            gbit_per_second: gbit,
            round_trip_p50_us: p50,
            round_trip_p99_us: p50,
            mtu: 1500,
        }
    }

    #[test]
    fn the_table_compares_with_the_bare_underlay() {
        let lines = table(&[figure("bare", 20.0, 50.0), figure("WireGuard", 5.0, 150.0)]);
        assert_eq!(lines.len(), 3);
        assert!(lines[2].contains("0.25") && lines[2].contains("3.00"), "{}", lines[2]);
        assert!(table(&[]).is_empty());
    }

    #[test]
    fn nothing_measured_divides_by_nothing() {
        assert!(table(&[figure("bare", 0.0, 0.0)])[1].contains("0.00"));
    }

    #[test]
    fn one_failed_check_fails_the_scene_and_the_whole() {
        let now = clock::now();
        let mut report = Report::new(false, now);
        report.out = Box::new(io::sink());
        report.scene("first", "", now);
        report.check(Check { what: "a".into(), expected: "b".into(), seen: "b".into(), ok: true }, now);
        report.scene("second", "", now);
        report.check(Check { what: "a".into(), expected: "b".into(), seen: "c".into(), ok: false }, now);
        assert!(!report.finish(now));
        assert!(report.scenes[0].ok && !report.scenes[1].ok);
    }
}
