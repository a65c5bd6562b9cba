//! What Warren is to reach, and what it has reached.

use std::fmt::Write as _;

use crate::contestant::Contestant;
use crate::figure::Figure;
use crate::results::{Results, Spread};

/// One of them.
struct Goal {
    what: &'static str,
    contestant: Contestant,
    beside: Option<Contestant>,
    figure: Figure,
    /// The bar and the aim; `None`: shown beside what is judged.
    limits: Option<(f64, f64)>,
    /// Whether less is better.
    less: bool,
}

const GOALS: [Goal; 13] = {
    use Contestant::{Boringtun, Gotatun, KernelVxlan, WarrenVxlan, WarrenWireguard, WireguardGo};
    const fn more(
        what: &'static str,
        contestant: Contestant,
        beside: Contestant,
        figure: Figure,
        bar: f64,
        aim: f64,
    ) -> Goal {
        Goal { what, contestant, beside: Some(beside), figure, limits: Some((bar, aim)), less: false }
    }
    const fn shown(what: &'static str, figure: Figure) -> Goal {
        let (contestant, beside) = (WarrenWireguard, Some(WireguardGo));
        Goal { what, contestant, beside, figure, limits: None, less: true }
    }
    const fn less(goal: Goal) -> Goal {
        Goal { less: true, ..goal }
    }
    [
        more("1 TCP stream", WarrenWireguard, WireguardGo, Figure::Tcp, 1.8, 3.0),
        more("4 TCP streams", WarrenWireguard, WireguardGo, Figure::Tcp4, 2.1, 3.0),
        more("1 TCP stream", WarrenWireguard, Gotatun, Figure::Tcp, 5.0, 8.0),
        more("1 TCP stream", WarrenWireguard, Boringtun, Figure::Tcp, 8.0, 14.0),
        more("UDP 1372 B, overload", WarrenWireguard, WireguardGo, Figure::Udp, 3.5, 5.0),
        less(more("TCP ping-pong p50", WarrenWireguard, WireguardGo, Figure::TcpP50, 0.5, 0.2)),
        less(more("TCP ping-pong p50", WarrenWireguard, KernelVxlan, Figure::TcpP50, 1.3, 1.0)),
        more("1 TCP stream", WarrenVxlan, KernelVxlan, Figure::Tcp, 0.55, 0.8),
        less(more(
            "processor seconds of the whole machine for each GB",
            WarrenWireguard,
            WireguardGo,
            Figure::CpuMachine,
            0.5,
            0.3,
        )),
        shown("processor seconds of the sender's program for each GB", Figure::CpuSender),
        shown("processor seconds of the receiver's program for each GB", Figure::CpuReceiver),
        Goal {
            what: "idle with 1,000 peers, MiB",
            contestant: WarrenWireguard,
            beside: None,
            figure: Figure::IdleMemory,
            limits: Some((100.0, 64.0)),
            less: true,
        },
        Goal {
            what: "idle with 1,000 peers, % of a processor",
            contestant: WarrenWireguard,
            beside: None,
            figure: Figure::IdleCpu,
            limits: Some((0.5, 0.2)),
            less: true,
        },
    ]
};

/// Writes the table of those that were measured.
pub fn write(out: &mut String, results: &Results) {
    let mut rows = String::new();
    for goal in &GOALS {
        let measured = match goal.beside {
            Some(other) => results.ratio(goal.contestant, other, goal.figure),
            None => results.spread(goal.contestant, goal.figure),
        };
        let Some(spread) = measured else { continue };
        let Spread { median, .. } = spread;
        let limits = match goal.limits {
            None => "- | - | ".to_owned(),
            Some((bar, aim)) => {
                let reached = |limit: f64| if goal.less { median <= limit } else { median >= limit };
                let verdict = match (reached(bar), reached(aim)) {
                    (_, true) => "aim reached",
                    (true, false) => "reached",
                    (false, false) => "**missed**",
                };
                format!("{bar} | {aim} | {verdict}")
            }
        };
        let to = goal.beside.map_or_else(String::new, |other| format!(", to {}", other.name()));
        let _ = writeln!(
            rows,
            "| {}, {}{to} | {median:.2}{} | {limits} |",
            goal.contestant.name(),
            goal.what,
            spread.ends(|value| format!("{value:.2}")),
        );
    }
    if !rows.is_empty() {
        let _ = write!(
            out,
            "\n## What Warren is to reach\n\nMedian of each round's ratio (least to most).\n\n| | measured | bar | aim | \
             |\n|---|---|---|---|---|\n{rows}\nWhere the time goes, and what would get there: `bench/PROFILE.md`.\n"
        );
    }
}
