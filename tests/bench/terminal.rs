//! `warren bench` on a terminal: its live line is drawn over itself, and nothing of it is left when the table comes.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab::agent::warren;
use crate::lab::wait_for;

const TOKEN: &str = "on-a-terminal";
/// Figures of one way with one stream.
const FIGURES: usize = 7;
/// Narrower than some of the live lines, and than the table.
const COLUMNS: usize = 64;
/// Back to the line's beginning, and forget what stands there.
const AGAIN: &str = "\r\x1b[K";

/// `warren bench serve` for one asker; ends with the test.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_live_line_is_drawn_over_itself_and_leaves_a_clean_table() {
    // Free a moment ago, and so, most likely, is UDP's.
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let mut serve = Command::new(warren());
    serve
        .args(["bench", "serve", "--once", "--listen"])
        .arg(free.to_string())
        .env("WARREN_BENCH_TOKEN", TOKEN);
    let serve = serve.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _serving = Serving(serve.expect("start warren bench serve"));
    wait_for("it listens", Duration::from_secs(5), || {
        let listening = Command::new("ss").args(["-Hltn", &format!("sport = :{}", free.port())]).output();
        (!listening.expect("run ss").stdout.is_empty()).then_some(())
    });
    let words = format!("exec {} bench {free} --seconds 1 --streams 1 --only path", warren());
    let shell = format!("stty cols {COLUMNS} rows 24 && {words}");
    let mut terminal = Command::new("script");
    terminal.args(["-qec", &shell, "/dev/null"]).env("WARREN_BENCH_TOKEN", TOKEN).stdin(Stdio::null());
    let output = terminal.output().expect("run script(1)");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{text:?}");

    let drawn: Vec<&str> = text.split(AGAIN).collect();
    let live = |what: &str| drawn.iter().filter(|line| line.contains(what) && !line.contains('\n')).count();
    assert!(live("[1/7]  path       TCP, 1 stream  ") >= 2, "it begins, and is drawn again: {text:?}");
    assert!(live(" Gbit/s  (") > 0 && live(" us  (") > 0, "with what it sees meanwhile: {text:?}");

    let seen = Screen::show(&text);
    let of = |start: &str| seen.iter().filter(|line| line.starts_with(start)).count();
    for step in 1..=FIGURES {
        assert_eq!(of(&format!("[{step}/{FIGURES}]  path  ")), 1, "a line for each figure: {seen:#?}");
    }
    assert!(!seen.iter().any(|line| line.contains(" left")), "of the live line nothing is left: {seen:#?}");
    let table = seen.iter().position(|line| line.starts_with("From 127.0.0.1 to 127.0.0.1, "));
    assert_eq!(table, Some(FIGURES), "the table comes right after the figures: {seen:#?}");
    assert!(of("THROUGHPUT ") == 1 && of("ROUND TRIP ") == 1 && of("CPU  ") == 1, "{seen:#?}");
}

/// What a terminal of so many columns shows in the end.
#[derive(Default)]
struct Screen {
    /// What stands in each row, and whether it goes on with the one before.
    rows: Vec<(Vec<char>, bool)>,
    column: usize,
}

impl Screen {
    /// The lines, those that went on in a further row in one.
    fn show(text: &str) -> Vec<String> {
        let mut screen = Screen { rows: vec![Default::default()], column: 0 };
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            rest = match rest.strip_prefix("\x1b[K") {
                Some(after) => {
                    screen.forget();
                    after
                }
                None => {
                    screen.take(first);
                    &rest[first.len_utf8()..]
                }
            };
        }
        let mut lines: Vec<String> = Vec::new();
        for (row, goes_on) in screen.rows {
            let row: String = row.into_iter().collect();
            match lines.last_mut().filter(|_| goes_on) {
                Some(line) => line.push_str(&row),
                None => lines.push(row),
            }
        }
        lines
    }

    /// From the cursor on. What is drawn over a whole row goes on with nothing.
    fn forget(&mut self) {
        let column = self.column;
        self.row().truncate(column);
        if let Some((_, goes_on)) = self.rows.last_mut().filter(|_| column == 0) {
            *goes_on = false;
        }
    }

    fn row(&mut self) -> &mut Vec<char> {
        &mut self.rows.last_mut().expect("there is always one").0
    }

    fn take(&mut self, character: char) {
        match character {
            '\r' => self.column = 0,
            '\n' => self.rows.push(Default::default()),
            control if control.is_control() => panic!("{control:?} is not expected"),
            letter => {
                if self.column == COLUMNS {
                    self.rows.push((Vec::new(), true));
                    self.column = 0;
                }
                let column = self.column;
                let row = self.row();
                row.resize(row.len().max(column + 1), ' ');
                row[column] = letter;
                self.column += 1;
            }
        }
    }
}

#[test]
fn a_line_that_is_too_long_would_be_seen() {
    let full = "x".repeat(COLUMNS);
    assert_eq!(Screen::show(&format!("{full}x\r\n")), [format!("{full}x"), String::new()]);
    assert_eq!(Screen::show(&format!("{full}x{AGAIN}done")), [full.as_str(), "done"]);
    assert_eq!(Screen::show(&format!("short{AGAIN}done")), ["done"]);
}
