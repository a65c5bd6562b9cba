//! What came out: a table for people, JSON for programs.

use std::fmt::Write as _;
use std::net::IpAddr;

use serde::Serialize;

use super::message::{Flow, Protocol, Work};
use super::meter::Count;
use super::plan::{Figure, Way};
use super::stats::Summary;

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// This side's version.
    pub warren: String,
    /// The other side's.
    pub other_warren: String,
    /// This side's address.
    pub here: IpAddr,
    /// The other side's.
    pub there: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether the main direction is from there to here.
    pub reverse: bool,
    /// How long each figure counts.
    pub seconds: u16,
    /// Connections of the figure with many.
    pub streams: u8,
    /// TCP's congestion control, on this side.
    pub congestion: String,
    /// On the other.
    pub other_congestion: String,
    /// The ways.
    pub ways: Vec<WayReport>,
    /// Why it ended too early, if it did.
    pub stopped: Option<String>,
}

/// One way.
#[derive(Clone, Debug, Serialize)]
pub(super) struct WayReport {
    /// Which.
    pub way: Way,
    /// The MTU on it.
    pub mtu: u16,
    /// Why there are no figures.
    pub not_measured: Option<String>,
    /// The figures.
    pub rows: Vec<Row>,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    /// Its name.
    pub figure: String,
    /// Whether it is one of how much, or of how soon.
    pub kind: Kind,
    /// Payload that arrived, in 10^9 bits a second.
    pub gbit_per_s: Option<f64>,
    /// Datagrams or requests that were lost, of 1.
    pub lost: Option<f64>,
    /// Round trips, in microseconds.
    pub round_trip_us: Option<Summary>,
    /// Processor seconds for each 10^9 bytes of payload.
    pub cpu_s_per_gb: Option<Sides>,
    /// Processor microseconds for each round trip.
    pub cpu_us_per_round_trip: Option<Sides>,
    /// Why there is no figure.
    pub failed: Option<String>,
}

/// What a figure is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// How much.
    Throughput,
    /// How soon.
    RoundTrip,
}

/// A figure of each side.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Sides {
    /// This one's.
    pub here: f64,
    /// The other one's.
    pub there: f64,
}

impl Row {
    /// Out of what both sides counted.
    pub(super) fn new(figure: &Figure, here: Count, there: Count, trips: Option<Summary>) -> Row {
        let mut row = Row::empty(figure);
        let received = match figure.work {
            Work::Tcp { flow, .. } | Work::Udp { flow, .. } => match flow {
                Flow::There => there,
                Flow::Back => here,
            },
            Work::Ping { protocol, beside } => {
                let of_all = |trips: Summary| ratio(trips.lost, trips.lost + trips.count);
                row.lost = trips.filter(|_| protocol == Protocol::Udp).map(of_all);
                row.round_trip_us = trips;
                // Under load the load's own share is in it.
                row.cpu_us_per_round_trip = trips.filter(|_| beside.is_none()).map(|_| Sides {
                    here: ratio(here.cpu_micros, here.packets),
                    there: ratio(there.cpu_micros, there.packets),
                });
                return row;
            }
        };
        // Bits in a microsecond are 10^6 a second.
        row.gbit_per_s = Some(ratio(received.bytes, received.micros) * 8.0 / 1000.0);
        if matches!(figure.work, Work::Udp { .. }) {
            row.lost = Some(ratio(received.lost, received.lost.saturating_add(received.packets)));
        }
        let rate = ratio(received.bytes, received.micros);
        // Both by the time that each counted: its own clock ran for a little longer or shorter.
        let per_gb = |count: Count| ratio(count.cpu_micros, count.micros) / rate * 1000.0;
        let sides = Sides { here: per_gb(here), there: per_gb(there) };
        // Of nothing there is no cost.
        row.cpu_s_per_gb = Some(sides).filter(|sides| sides.here.is_finite() && sides.there.is_finite());
        row
    }

    /// One that could not be measured.
    pub(super) fn failed(figure: &Figure, reason: String) -> Row {
        Row { failed: Some(reason), ..Row::empty(figure) }
    }

    fn empty(figure: &Figure) -> Row {
        let kind = match figure.work {
            Work::Tcp { .. } | Work::Udp { .. } => Kind::Throughput,
            Work::Ping { .. } => Kind::RoundTrip,
        };
        Row {
            figure: figure.to_string(),
            kind,
            gbit_per_s: None,
            lost: None,
            round_trip_us: None,
            cpu_s_per_gb: None,
            cpu_us_per_round_trip: None,
            failed: None,
        }
    }

    /// What is compared between ways.
    fn main(&self) -> Option<f64> {
        match self.kind {
            Kind::Throughput => self.gbit_per_s,
            Kind::RoundTrip => self.round_trip_us.map(|trips| trips.p50),
        }
    }

    /// In a few words, for who watches.
    pub(super) fn in_short(&self) -> String {
        if let Some(reason) = &self.failed {
            return format!("failed: {reason}");
        }
        match (self.gbit_per_s, self.round_trip_us) {
            (Some(rate), _) => match self.lost {
                Some(lost) => format!("{} Gbit/s, {} lost", number(rate), percent(lost)),
                None => format!("{} Gbit/s", number(rate)),
            },
            (None, Some(trips)) => {
                format!("{} us, p99 {} us", number(trips.p50), number(trips.p99))
            }
            (None, None) => String::new(),
        }
    }
}

impl Report {
    /// Whether every figure that was begun is there, at least one, and some of each way that was asked for by name:
    /// that a tunnel cannot be made is no failure where nobody insisted on one.
    pub(super) fn is_whole(&self, named: &[Way]) -> bool {
        let mut rows = self.ways.iter().flat_map(|way| &way.rows).peekable();
        let missing = self.ways.iter().any(|way| way.not_measured.is_some() && named.contains(&way.way));
        rows.peek().is_some() && self.stopped.is_none() && !missing && rows.all(|row| row.failed.is_none())
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut out = String::new();
        let (from, to) = match self.reverse {
            false => (self.here, self.there),
            true => (self.there, self.here),
        };
        let _ = writeln!(
            out,
            "From {from} to {to}, {} s each, TCP with {}, warren {}{}",
            self.seconds,
            self.congestion_controls(),
            self.warren,
            if self.warren == self.other_warren {
                String::new()
            } else {
                format!(" (there: {})", self.other_warren)
            },
        );
        let mut table = Table::default();
        table.add(&["THROUGHPUT", "", "Gbit/s", "of path", "lost", "CPU s/GB here", "there"]);
        self.section(&mut table, Kind::Throughput);
        table.gap();
        table.add(&[
            "ROUND TRIP",
            "",
            "p50 us",
            "p99 us",
            "p99.9 us",
            "of path",
            "lost",
            "CPU us here",
            "there",
        ]);
        self.section(&mut table, Kind::RoundTrip);
        let _ = write!(out, "\n{}", table.text());
        for way in &self.ways {
            let name = way.way.name();
            if let Some(reason) = &way.not_measured {
                let _ = writeln!(out, "\n{name} was not measured: {reason}");
            }
            for row in &way.rows {
                if let Some(reason) = &row.failed {
                    let _ = writeln!(out, "\n{name}, {}: {reason}", row.figure);
                }
            }
        }
        let _ = write!(out, "\n{NOTES}");
        if let Some(reason) = &self.stopped {
            let _ = writeln!(out, "\nNot all of it: {reason}");
        }
        out
    }

    fn congestion_controls(&self) -> String {
        let name = |name: &str| if name.is_empty() { "?".to_owned() } else { name.to_owned() };
        let (here, there) = (name(&self.congestion), name(&self.other_congestion));
        if here == there { here } else { format!("{here} here, {there} there") }
    }

    fn section(&self, table: &mut Table, kind: Kind) {
        let path = self.ways.iter().find(|way| way.way == Way::Path);
        for way in &self.ways {
            let mut name = way.way.name();
            for row in way.rows.iter().filter(|row| row.kind == kind) {
                // Datagrams may be of another size there: the place counts, not the name.
                let same = way.rows.iter().position(|other| other == row);
                let of_path = path.filter(|path| path.way != way.way).zip(same);
                let of_path = of_path.and_then(|(path, at)| path.rows.get(at)).and_then(Row::main);
                let of_path =
                    of_path.zip(row.main()).map(|(path, own)| own / path).filter(|of| of.is_finite());
                table.add(&cells(name, row, of_path).each_ref().map(String::as_str));
                name = "";
            }
            if way.not_measured.is_some() {
                table.add(&[name, "not measured, see below"]);
            }
        }
    }
}

const NOTES: &str = "\
path       the way as it is between the two addresses: from pod to pod the mesh, from node to node the network under it
wireguard  a tunnel of its own between the two processes, with Warren's packet loop on both sides; nothing else of the
vxlan      machines takes part. It has one lane: an agent has one for every two processors, up to four (--lanes), and
           carries several streams on all of them
lost       of the datagrams, as many as the sender can send; of the requests
CPU        user and system time of the two `warren bench` processes, traffic and tunnel together. Not in it: what the
           kernel does in interrupts, and, where path goes through a mesh, its agents
";

fn cells(way: &str, row: &Row, of_path: Option<f64>) -> [String; 9] {
    let mut cells = <[String; 9]>::default();
    let (head, tail) = cells.split_at_mut(2);
    head[0] = way.to_owned();
    head[1].clone_from(&row.figure);
    if row.failed.is_some() {
        tail[0] = "failed".to_owned();
        return cells;
    }
    let text = |number: Option<f64>| number.map(self::number).unwrap_or_default();
    let of_path = of_path.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
    let lost = row.lost.map(percent).unwrap_or_default();
    let sides = |sides: Option<Sides>| [text(sides.map(|s| s.here)), text(sides.map(|s| s.there))];
    let values: Vec<String> = match row.kind {
        Kind::Throughput => {
            [vec![text(row.gbit_per_s), of_path, lost], sides(row.cpu_s_per_gb).into()].concat()
        }
        Kind::RoundTrip => {
            let trips = row.round_trip_us;
            let trips = [trips.map(|t| t.p50), trips.map(|t| t.p99), trips.map(|t| t.p999)].map(text);
            [trips.to_vec(), vec![of_path, lost], sides(row.cpu_us_per_round_trip).into()].concat()
        }
    };
    tail.iter_mut().zip(values).for_each(|(cell, value)| *cell = value);
    cells
}

/// Lines of cells, the first two of each on the left.
#[derive(Default)]
struct Table {
    /// A gap begins columns of other widths.
    blocks: Vec<Vec<Vec<String>>>,
}

impl Table {
    fn add(&mut self, cells: &[&str]) {
        if self.blocks.is_empty() {
            self.gap();
        }
        if let Some(block) = self.blocks.last_mut() {
            block.push(cells.iter().map(|cell| (*cell).to_owned()).collect());
        }
    }

    fn gap(&mut self) {
        self.blocks.push(Vec::new());
    }

    fn text(&self) -> String {
        let mut out = String::new();
        for (index, block) in self.blocks.iter().enumerate() {
            if index > 0 {
                out.push('\n');
            }
            let widths: Vec<usize> = (0..9)
                .map(|column| {
                    // A line of two cells says something else: its width does not count.
                    let cells =
                        block.iter().filter(|line| line.len() > 2).filter_map(|line| line.get(column));
                    cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
                })
                .collect();
            for line in block {
                let mut text = String::new();
                for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
                    let _ = match column {
                        0 => write!(text, "{cell:<width$}"),
                        1 => write!(text, "  {cell:<width$}"),
                        _ => write!(text, "  {cell:>width$}"),
                    };
                }
                let _ = writeln!(out, "{}", text.trim_end());
            }
        }
        out
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Three digits that mean something.
pub(super) fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.2}"),
        v => format!("{v:.4}"),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::plan::figures;

    fn count(bytes: u64, cpu_micros: u64) -> Count {
        Count { bytes, packets: 90, lost: 10, micros: 1_000_000, cpu_micros }
    }

    fn trips() -> Summary {
        Summary { count: 99, lost: 1, p50: 51.5, p99: 210.0, p999: 1234.5 }
    }

    fn way(way: Way, factor: u64) -> WayReport {
        let figures = figures(4, Flow::There, 1500, false);
        let rows = figures.iter().map(|figure| match figure.work {
            Work::Ping { .. } => Row::new(figure, count(0, 900), count(0, 1800), Some(trips())),
            Work::Tcp { .. } | Work::Udp { .. } => {
                let bytes = factor * 125_000_000;
                Row::new(figure, count(bytes, 250_000), count(bytes, 500_000), None)
            }
        });
        WayReport { way, mtu: 1500, not_measured: None, rows: rows.collect() }
    }

    fn report() -> Report {
        let missing = WayReport {
            way: Way::Vxlan,
            mtu: 1450,
            not_measured: Some("there: no /dev/net/tun".to_owned()),
            rows: Vec::new(),
        };
        Report {
            warren: "0.1.0".to_owned(),
            other_warren: "0.1.0".to_owned(),
            here: "192.0.2.1".parse().expect("an address"),
            there: "192.0.2.2".parse().expect("an address"),
            port: 5187,
            reverse: false,
            seconds: 1,
            streams: 4,
            congestion: "cubic".to_owned(),
            other_congestion: "cubic".to_owned(),
            ways: vec![way(Way::Path, 4), way(Way::WireGuard, 2), missing],
            stopped: None,
        }
    }

    #[test]
    fn figures_come_from_who_received() {
        let [there, back, ..] = &figures(4, Flow::There, 1500, false)[..] else { panic!("two figures") };
        let (one, two) = (count(125_000_000, 250_000), count(250_000_000, 500_000));
        let row = Row::new(there, one, two, None);
        assert_eq!(row.gbit_per_s, Some(2.0));
        assert_eq!(row.cpu_s_per_gb, Some(Sides { here: 1.0, there: 2.0 }));
        assert_eq!(row.lost, None, "TCP loses nothing");
        let row = Row::new(back, one, two, None);
        assert_eq!(row.gbit_per_s, Some(1.0));
        assert_eq!(row.cpu_s_per_gb, Some(Sides { here: 2.0, there: 4.0 }));
    }

    #[test]
    fn what_counted_nothing_or_too_much_is_no_accident() {
        let most = Count {
            bytes: u64::MAX,
            packets: u64::MAX,
            lost: u64::MAX,
            micros: u64::MAX,
            cpu_micros: u64::MAX,
        };
        // Time without bytes, bytes without time, and everything at once.
        let counts = [Count::default(), Count { bytes: 0, ..most }, Count { micros: 0, ..most }, most];
        for figure in figures(4, Flow::There, 1500, false) {
            for (here, there) in counts.into_iter().flat_map(|here| counts.map(|there| (here, there))) {
                let row = Row::new(&figure, here, there, None);
                let text = [vec![row.in_short()], cells("path", &row, None).to_vec()].concat().join(" ");
                assert!(!text.contains("inf") && !text.contains("NaN"), "{text}: {row:?}");
            }
        }
        let mut empty = report();
        let there = &figures(4, Flow::There, 1500, false)[0];
        for way in &mut empty.ways {
            way.rows = vec![Row::new(there, Count::default(), Count::default(), None)];
        }
        let text = empty.table();
        assert!(!text.contains("inf") && !text.contains("NaN"), "{text}");
    }

    #[test]
    fn the_table() {
        let text = report().table();
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let line = |start: &str| {
            let found = text.lines().find(|line| words(line).starts_with(start));
            found.unwrap_or_else(|| panic!("{start} in:\n{text}"))
        };
        assert_eq!(line("From"), "From 192.0.2.1 to 192.0.2.2, 1 s each, TCP with cubic, warren 0.1.0");
        assert_eq!(words(line("path TCP, 1")), "path TCP, 1 stream 4.00 0.50 1.00");
        assert_eq!(words(line("wireguard TCP, 1")), "wireguard TCP, 1 stream 2.00 0.50 1.00 2.00");
        assert_eq!(words(line("wireguard TCP 5")), "wireguard TCP 51.5 210 1234 1.00 10.0 20.0");
        assert!(text.contains("10.0 %") && text.contains("1.0 %"), "{text}");
        assert_eq!(words(line("vxlan not")), "vxlan not measured, see below");
        assert!(text.contains("\nvxlan was not measured: there: no /dev/net/tun\n"), "{text}");
        for line in text.lines() {
            assert!(line.chars().count() <= 120 && line == line.trim_end(), "{line:?}");
        }
        // Columns stand below one another.
        let at = |line: &str, word: &str| line.find(word).map(|at| at + word.len());
        assert_eq!(at(line("THROUGHPUT"), "Gbit/s"), at(line("path TCP, 1"), "4.00"));
    }

    #[test]
    fn what_failed_is_said_and_told_by_the_status() {
        let mut broken = report();
        assert!(broken.is_whole(&[]) && broken.is_whole(&[Way::Path, Way::WireGuard]));
        assert!(!broken.is_whole(&[Way::WireGuard, Way::Vxlan]), "one that was named is missing");
        let figure = figures(4, Flow::There, 1500, false)[0];
        broken.ways[0].rows[0] = Row::failed(&figure, "no datagram comes back".to_owned());
        broken.stopped = Some("stopped by a signal".to_owned());
        assert!(!broken.is_whole(&[]));
        let text = broken.table();
        assert!(text.contains("path, TCP, 1 stream: no datagram comes back\n"), "{text}");
        assert!(text.ends_with("Not all of it: stopped by a signal\n"), "{text}");
        broken.ways.clear();
        broken.stopped = None;
        assert!(!broken.is_whole(&[]), "nothing is no success");
    }

    #[test]
    fn congestion_controls_that_differ_are_said() {
        let mut report = report();
        report.other_congestion = "reno".to_owned();
        let text = report.table();
        assert!(
            text.starts_with("From 192.0.2.1 to 192.0.2.2, 1 s each, TCP with cubic here, reno there, "),
            "{text}"
        );
        report.other_congestion.clear();
        assert!(report.table().contains("TCP with cubic here, ? there"));
    }

    #[test]
    fn json_has_every_figure_by_its_unit() {
        let json = serde_json::to_value(report()).expect("JSON");
        let row = &json["ways"][0]["rows"][0];
        assert_eq!(json["ways"][1]["way"], "wireguard");
        assert_eq!((row["kind"].as_str(), row["gbit_per_s"].as_f64()), (Some("throughput"), Some(4.0)));
        assert_eq!(row["cpu_s_per_gb"]["there"], 1.0);
        assert_eq!(json["ways"][0]["rows"][4]["round_trip_us"]["p999"], 1234.5);
        assert_eq!(json["ways"][2]["not_measured"], "there: no /dev/net/tun");
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in
            [(0.012_34, "0.0123"), (0.5, "0.50"), (9.87, "9.87"), (41.26, "41.3"), (987.6, "988")]
        {
            assert_eq!(number(value), text);
        }
    }
}
