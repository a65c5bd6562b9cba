//! Bar charts as SVG, legible on a light page and on a dark one: they bring their own ground, and its colours
//! follow the reader's.

use std::fmt::Write as _;

use crate::contestant::Contestant;
use crate::figure::Figure;
use crate::results::{ENOUGH, Results, Spread};

const WIDTH: f64 = 760.0;
/// Where bars begin, and how long the longest is.
const LEFT: f64 = 215.0;
const LENGTH: f64 = 405.0;
const ROW: f64 = 22.0;
const BAR: f64 = 14.0;
const TITLE: f64 = 30.0;
const MARGIN: f64 = 16.0;

const STYLE: &str = "
.ground { fill: #ffffff; stroke: #d1d9e0 }
text { fill: #1f2328; font: 13px system-ui, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif }
.title { font-weight: 600 }
.bar { fill: #afb8c1 }
.ours { fill: #0969da }
.more { fill: none; stroke: #1f2328; stroke-width: 1.2 }
.name-ours { font-weight: 600 }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; stroke: #3d444d }
  text { fill: #f0f6fc }
  .bar { fill: #6e7681 }
  .ours { fill: #4493f8 }
  .more { stroke: #f0f6fc }
}
";

/// One block of bars.
struct Panel {
    title: &'static str,
    figure: Figure,
    /// A further figure, marked on the same bar: a percentile beside the median.
    mark: Option<Figure>,
    logarithmic: bool,
}

const fn plain(title: &'static str, figure: Figure) -> Panel {
    Panel { title, figure, mark: None, logarithmic: false }
}

const fn latency(title: &'static str, figure: Figure, mark: Figure) -> Panel {
    Panel { title, figure, mark: Some(mark), logarithmic: true }
}

/// All charts that the results have figures for: file name and text.
pub fn all(results: &Results) -> Vec<(&'static str, String)> {
    let charts: [(&'static str, Vec<Panel>); 4] = [
        (
            "tcp.svg",
            vec![
                plain("1 TCP stream, Gbit/s", Figure::Tcp),
                plain("4 TCP streams, Gbit/s", Figure::Tcp4),
                plain("16 TCP streams, Gbit/s", Figure::Tcp16),
            ],
        ),
        (
            "udp.svg",
            vec![
                plain("UDP, 1372 bytes, under overload, Gbit/s", Figure::Udp),
                plain("UDP, 1372 bytes, less than 0.1 % lost, Gbit/s", Figure::UdpLossFree),
                plain("UDP, 64 bytes, under overload, thousands a second", Figure::UdpSmall),
                plain("UDP, 64 bytes, less than 0.1 % lost, thousands a second", Figure::UdpSmallLossFree),
            ],
        ),
        (
            "latency.svg",
            vec![
                latency("TCP ping-pong, us one way: p50, line to p99", Figure::TcpP50, Figure::TcpP99),
                latency(
                    "TCP ping-pong beside one TCP stream, us one way: p50, line to p99",
                    Figure::TcpLoadedP50,
                    Figure::TcpLoadedP99,
                ),
            ],
        ),
        (
            "cpu.svg",
            vec![plain(
                "Processor seconds of the whole machine for each GB of one TCP stream",
                Figure::CpuMachine,
            )],
        ),
    ];
    let drawn = charts.into_iter().map(|(name, panels)| (name, chart(results, &panels)));
    drawn.filter_map(|(name, svg)| Some((name, svg?))).collect()
}

fn chart(results: &Results, panels: &[Panel]) -> Option<String> {
    let mut body = String::new();
    let mut y = MARGIN;
    for panel in panels.iter().filter(|panel| results.has(panel.figure)) {
        y = draw(&mut body, results, panel, y) + MARGIN;
    }
    if body.is_empty() {
        return None;
    }
    if few(results, panels) {
        let _ = writeln!(
            body,
            "<text x=\"{MARGIN}\" y=\"{:.1}\">In brackets: of how many samples, where they are fewer than {ENOUGH}</text>",
            y + 4.0
        );
        y += MARGIN;
    }
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" width=\"{WIDTH}\" height=\"{y}\">\n\
         <style>{STYLE}</style>\n<rect class=\"ground\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"6\"/>\n{body}</svg>\n",
        WIDTH - 1.0,
        y - 1.0,
    ))
}

fn few(results: &Results, panels: &[Panel]) -> bool {
    let contestants = results.contestants();
    let of = |panel: &Panel| {
        contestants.iter().filter_map(|c| results.spread(*c, panel.figure)).collect::<Vec<_>>()
    };
    panels.iter().flat_map(of).any(|spread| !spread.mark().is_empty())
}

/// Draws a panel from `y` down; returns where it ends.
fn draw(out: &mut String, results: &Results, panel: &Panel, mut y: f64) -> f64 {
    let of = |c: Contestant| {
        let spread = results.spread(c, panel.figure)?;
        let mark = panel.mark.and_then(|mark| results.spread(c, mark)).map(|mark| mark.median);
        Some((c, spread, mark))
    };
    let rows: Vec<(Contestant, Spread, Option<f64>)> =
        results.contestants().into_iter().filter_map(of).collect();
    let furthest = |(_, spread, mark): &(Contestant, Spread, Option<f64>)| {
        f64::max(mark.unwrap_or(0.0), if panel.mark.is_some() { spread.median } else { spread.most })
    };
    let most = rows.iter().map(furthest).fold(f64::MIN_POSITIVE, f64::max);
    let least = rows.iter().map(|(_, spread, _)| spread.median).fold(f64::MAX, f64::min);
    // A logarithmic bar begins at the power of ten below the least.
    let floor = 10f64.powf(least.max(1e-3).log10().floor());
    let length = |value: f64| {
        let share = match panel.logarithmic {
            true => (value.max(floor) / floor).log10() / (most / floor).log10().max(1e-9),
            false => value / most,
        };
        (share * LENGTH).clamp(1.0, LENGTH)
    };
    let scale = if panel.logarithmic { " (logarithmic)" } else { "" };
    let _ = writeln!(
        out,
        "<text class=\"title\" x=\"{MARGIN}\" y=\"{:.1}\">{}{scale}</text>",
        y + 14.0,
        panel.title.replace('<', "&lt;")
    );
    y += TITLE;
    for (contestant, spread, mark) in rows {
        let (bar, name) = if contestant.is_ours() { ("bar ours", "name-ours") } else { ("bar", "name") };
        let (top, middle) = (y + (ROW - BAR) / 2.0, y + ROW / 2.0);
        let end = LEFT + length(spread.median);
        // From the least to the most, or to the further figure.
        let (from, to) = match mark {
            Some(mark) => (end, LEFT + length(mark)),
            None => (LEFT + length(spread.least), LEFT + length(spread.most)),
        };
        let value = spread.middle(panel.figure);
        let value =
            mark.map_or_else(|| value.clone(), |mark| format!("{value}, {}", panel.figure.show(mark)));
        let value = value + &spread.mark();
        let _ = writeln!(
            out,
            "<text class=\"{name}\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
             <rect class=\"{bar}\" x=\"{LEFT}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\"/>\n\
             <path class=\"more\" d=\"M{from:.1} {middle:.1}H{to:.1}M{to:.1} {:.1}v6\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\">{value}</text>",
            LEFT - 8.0,
            middle + 4.5,
            contestant.name(),
            end - LEFT,
            middle - 3.0,
            end.max(to) + 8.0,
            middle + 4.5,
        );
        y += ROW;
    }
    y
}
