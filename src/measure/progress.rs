//! What is seen on stderr while it goes on: on a terminal one line that is drawn again every second, and always a
//! line for each figure that is done. How it looks on a terminal is tested in `tests/bench/terminal.rs`.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use terminal_size::{Width, terminal_size_of};

use super::meter::{Look, WARM_UP};
use super::plan::{Figure, Way};
use super::report::{Row, number};
use crate::io::clock;

/// How often the line is drawn.
const EVERY: Duration = Duration::from_secs(1);
/// What a figure takes beside its own time: warm-up, agreement, breath.
const AROUND: Duration = Duration::from_millis(1000);
/// Back to the line's beginning, and forget what stands there (ECMA-48 CR, EL).
const AGAIN: &str = "\r\x1b[K";

/// The live display.
pub(super) struct Progress {
    terminal: bool,
    steps: usize,
    step: usize,
    seconds: u16,
    now: Option<Step>,
}

struct Step {
    way: Way,
    name: String,
    begun: Instant,
    drawn: Option<Look>,
}

impl Progress {
    /// For so many figures of so many seconds.
    pub(super) fn new(steps: usize, seconds: u16) -> Progress {
        Progress { terminal: io::stderr().is_terminal(), steps, step: 0, seconds, now: None }
    }

    /// A figure begins.
    pub(super) fn begin(&mut self, way: Way, figure: &Figure) {
        self.step += 1;
        let step = Step { way, name: figure.to_string(), begun: clock::now(), drawn: None };
        self.now = Some(step);
        self.draw("");
    }

    /// It goes on.
    pub(super) fn look(&mut self, look: &Look) {
        let Some(step) = &mut self.now else { return };
        let Some(last) = step.drawn else {
            step.drawn = Some(*look);
            return;
        };
        let since = look.now.saturating_duration_since(last.now);
        if since >= EVERY {
            step.drawn = Some(*look);
            let rate = rate(&last, look, since);
            self.draw(&rate);
        }
    }

    /// It is done.
    pub(super) fn done(&mut self, row: &Row) {
        let Some(step) = self.now.take() else { return };
        self.line(&format!("{}  {:<10} {}: {}", self.count(), step.way.name(), step.name, row.in_short()));
    }

    /// So many figures are left out.
    pub(super) fn skip(&mut self, way: Way, figures: usize, reason: &str) {
        self.step += figures;
        self.line(&format!("{}  {:<10} not measured: {reason}", self.count(), way.name()));
    }

    /// Nothing more is to be seen.
    pub(super) fn clear(&mut self) {
        self.now = None;
        if self.terminal {
            write(AGAIN);
        }
    }

    fn count(&self) -> String {
        let width = self.steps.to_string().len();
        format!("[{:>width$}/{}]", self.step, self.steps)
    }

    fn line(&self, text: &str) {
        let again = if self.terminal { AGAIN } else { "" };
        write(&format!("{again}{text}\n"));
    }

    fn draw(&self, rate: &str) {
        let Some(step) = self.now.as_ref().filter(|_| self.terminal) else { return };
        let own = WARM_UP + Duration::from_secs(self.seconds.into());
        let left = own.saturating_sub(clock::now().saturating_duration_since(step.begun));
        let after = self.steps.saturating_sub(self.step) as u32;
        let all = left + after * (AROUND + Duration::from_secs(self.seconds.into()));
        let line = format!(
            "{}  {:<10} {}  {} s  {rate}  (in all {} left)",
            self.count(),
            step.way.name(),
            step.name,
            left.as_secs() + 1,
            in_words(all),
        );
        // Of a line that goes on in the next row, only that row would be forgotten.
        let row: String = line.chars().take(columns().saturating_sub(1)).collect();
        write(&format!("{AGAIN}{row}"));
    }
}

/// How wide the terminal is, now: a person may have changed it.
fn columns() -> usize {
    const USUAL: usize = 80;
    terminal_size_of(io::stderr()).map_or(USUAL, |(Width(columns), _)| columns.into())
}

/// Bytes if they flow, else round trips.
fn rate(last: &Look, look: &Look, since: Duration) -> String {
    let seconds = since.as_secs_f64();
    match look.bytes.saturating_sub(last.bytes) {
        0 => match look.packets.saturating_sub(last.packets) {
            0 => "nothing".to_owned(),
            trips => format!("{} us", number(since.as_secs_f64() * 1e6 / trips as f64)),
        },
        bytes => format!("{} Gbit/s", number(bytes as f64 * 8.0 / 1e9 / seconds)),
    }
}

fn in_words(long: Duration) -> String {
    match long.as_secs() {
        seconds @ 0..=99 => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}

/// Says something on stderr.
pub(super) fn write(text: &str) {
    let mut err = io::stderr().lock();
    // Whoever watched has gone; the measurement goes on.
    let _ = err.write_all(text.as_bytes());
    let _ = err.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_bytes_or_of_round_trips() {
        let now = clock::now();
        let look = |bytes, packets| Look { now, bytes, packets };
        let second = Duration::from_secs(1);
        assert_eq!(rate(&look(0, 0), &look(125_000_000, 100), second), "1.00 Gbit/s");
        assert_eq!(rate(&look(0, 10), &look(0, 20_010), second), "50.0 us");
        assert_eq!(rate(&look(7, 7), &look(7, 7), second), "nothing");
    }

    #[test]
    fn long_times_are_minutes() {
        assert_eq!(in_words(Duration::from_secs(99)), "99 s");
        assert_eq!(in_words(Duration::from_secs(121)), "3 min");
    }
}
