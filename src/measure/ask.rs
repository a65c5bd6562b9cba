//! `warren bench ADDRESS`: asks the other side, figure by figure, and puts them together.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use super::burrow::{Burrow, BurrowError, Draft, End, Ground};
use super::ending::Ending;
use super::line::{Line, SILENCE};
use super::message::{self, Answer, Ask, Flow, LONGEST, MessageError, Opening, Task, VERSION};
use super::message::{Welcome, Work, Wrap};
use super::meter::{Count, FIRST, Meter, Watcher};
use super::plan::{Figure, Way, figures};
use super::progress::Progress;
use super::report::{Report, Row, WayReport};
use super::secret::{Nonce, Prover, Token};
use super::site::Site;
use super::stats::Summary;
use super::{BenchArgs, INSIDE, MeasureError, streams, tunnel_ports};
use crate::io::underlay::path_mtu;
use crate::snapshot::Encap;
use crate::state::problem::one_line;

/// How long the other side may take to let us in.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the other side may take for an answer beyond what was agreed.
const ANSWER: Duration = Duration::from_secs(15);
/// Between two figures.
const BREATH: Duration = Duration::from_millis(250);

/// Measures everything that was asked for. What there is when it ends too early stands in the report all the same.
pub(super) fn ask(args: &BenchArgs, at: SocketAddr, end: &Ending) -> Result<Report, MeasureError> {
    let token = args.token.as_ref().ok_or_else(|| {
        MeasureError::Usage(
            "--token is missing: `warren bench serve` on the other side prints it (or WARREN_BENCH_TOKEN)"
                .to_owned(),
        )
    })?;
    let mut stream = connect(at, end)?;
    let welcome = introduce(&mut stream, token, end).map_err(MeasureError::Failed)?;
    let wrong = MeasureError::io("look at the control connection");
    let local = stream.local_addr().map_err(wrong)?;
    let own_mtu = path_mtu(&stream, at.is_ipv6()).unwrap_or(1280);
    let congestion = streams::congestion(&stream);
    let line = Line::start(stream, end.part()).map_err(MeasureError::io("keep the control connection"))?;
    let asker = Asker {
        line,
        at,
        main: if args.reverse { Flow::Back } else { Flow::There },
        seconds: args.seconds,
        streams: args.streams,
        port: args.port,
        mtu: own_mtu.min(welcome.mtu),
        congestion,
    };
    let mut report = Report {
        warren: env!("CARGO_PKG_VERSION").to_owned(),
        other_warren: one_line(&welcome.program),
        here: local.ip(),
        there: at.ip(),
        port: at.port(),
        reverse: args.reverse,
        seconds: args.seconds,
        streams: args.streams,
        congestion: asker.congestion.clone(),
        other_congestion: one_line(&welcome.congestion),
        ways: Vec::new(),
        stopped: None,
    };
    let wanted = |way: &Way| args.only.is_empty() || args.only.contains(way);
    let ways: Vec<Way> = Way::ALL.into_iter().filter(wanted).collect();
    let mut progress = Progress::new(asker.steps(&ways), args.seconds);
    for way in ways {
        if asker.line.end().is_raised() {
            break;
        }
        report.ways.push(asker.way(way, &mut progress));
    }
    progress.clear();
    report.stopped = asker.line.end().reason().map(|reason| one_line(&reason));
    asker.line.say(&Ask::Bye);
    Ok(report)
}

fn connect(at: SocketAddr, end: &Ending) -> Result<TcpStream, MeasureError> {
    Ground::Open.connect(at, CONNECT, end).map_err(|error| {
        let what = match error.kind() {
            io::ErrorKind::ConnectionRefused => {
                "nobody listens there: start `warren bench serve` on that side first".to_owned()
            }
            io::ErrorKind::TimedOut => format!(
                "no answer: is the address right, and TCP port {} open in its firewall? (`warren bench serve \
                 --listen` there and ADDRESS:PORT here choose another)",
                at.port()
            ),
            _ => error.to_string(),
        };
        MeasureError::Failed(format!("cannot reach {at}: {what}"))
    })
}

/// Each side proves the token to the other.
fn introduce(stream: &mut TcpStream, token: &Token, end: &Ending) -> Result<Welcome, String> {
    let text = |error: MessageError| error.to_string();
    let io_text = |error: io::Error| error.to_string();
    stream.set_write_timeout(Some(SILENCE)).map_err(io_text)?;
    let ours = Nonce::draw().map_err(|e| e.to_string())?;
    message::write(stream, &Opening::Control { version: VERSION, nonce: ours }).map_err(io_text)?;
    let theirs = match message::read(stream, LONGEST, CONNECT, end).map_err(text)? {
        Answer::Challenge(nonce) => nonce,
        other => return Err(refusal(other)),
    };
    let proof = token.prove(Prover::Asker, ours, theirs);
    message::write(stream, &Ask::Proof(proof)).map_err(io_text)?;
    match message::read(stream, LONGEST, CONNECT, end).map_err(text)? {
        Answer::Welcome(welcome) if token.is_known_to(Prover::Server, ours, theirs, welcome.proof) => {
            Ok(welcome)
        }
        Answer::Welcome(_) => Err("whoever listens there does not know the token".to_owned()),
        other => Err(refusal(other)),
    }
}

fn refusal(answer: Answer) -> String {
    match answer {
        Answer::Refused(reason) => format!("the other side refuses: {}", one_line(&reason)),
        Answer::Failed(reason) => format!("the other side says: {}", one_line(&reason)),
        Answer::Challenge(_)
        | Answer::Welcome(_)
        | Answer::Tunnel(_)
        | Answer::Ready(_)
        | Answer::Counted(_)
        | Answer::Closed
        | Answer::Alive => "the other side gives an answer that makes no sense".to_owned(),
    }
}

struct Asker {
    line: Line<Ask, Answer>,
    at: SocketAddr,
    main: Flow,
    seconds: u16,
    streams: u8,
    port: Option<u16>,
    /// Of the network between the two.
    mtu: u16,
    /// TCP's congestion control on this side.
    congestion: String,
}

/// What both sides counted.
struct Measured {
    here: Count,
    there: Count,
    trips: Option<Summary>,
}

impl Asker {
    fn figures(&self, mtu: u16, inside: bool) -> Vec<Figure> {
        figures(self.streams, self.main, mtu, !inside && self.at.is_ipv6())
    }

    fn steps(&self, ways: &[Way]) -> usize {
        ways.len() * self.figures(self.mtu, false).len()
    }

    fn way(&self, way: Way, progress: &mut Progress) -> WayReport {
        let mut report = WayReport { way, mtu: self.mtu, not_measured: None, rows: Vec::new() };
        let Some(wrap) = way.wrap() else {
            self.all(way, Ground::Open, &mut report, progress);
            return report;
        };
        let outer_v6 = match wrap {
            // As an agent has it, which leaves room for either family.
            Wrap::WireGuard => true,
            Wrap::Vxlan => self.at.is_ipv6(),
        };
        report.mtu = self.mtu.saturating_sub(Encap::from(wrap).overhead(outer_v6));
        match self.tunnel(wrap, report.mtu) {
            Ok(burrow) => {
                self.all(way, Ground::Inside(&burrow), &mut report, progress);
                drop(burrow);
                self.line.say(&Ask::Close);
                // That it is not heard ends the measurement anyway.
                let _ = self.line.hear(ANSWER);
            }
            Err(reason) => {
                progress.skip(way, self.figures(self.mtu, true).len(), &reason);
                report.not_measured = Some(reason);
            }
        }
        report
    }

    fn all(&self, way: Way, ground: Ground<'_>, report: &mut WayReport, progress: &mut Progress) {
        let inside = matches!(ground, Ground::Inside(_));
        for figure in self.figures(report.mtu, inside) {
            if !self.line.end().pause(BREATH) {
                return;
            }
            progress.begin(way, &figure);
            let measured = self.figure(ground, figure.work, &mut |look| progress.look(&look));
            // What was cut short is no figure.
            if measured.is_err() && self.line.end().is_raised() {
                return;
            }
            let row = match measured {
                Ok(Measured { here, there, trips }) => Row::new(&figure, here, there, trips),
                Err(reason) => Row::failed(&figure, one_line(&reason)),
            };
            progress.done(&row);
            report.rows.push(row);
        }
    }

    // --- the tunnel ------------------------------------------------------------------------------

    fn tunnel(&self, wrap: Wrap, mtu: u16) -> Result<Burrow, String> {
        let link_local = matches!(self.at.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local());
        if link_local {
            return Err("lanes do not go by link-local addresses: use another".to_owned());
        }
        let draft = self.draft(wrap).map_err(|e| format!("here: {e}"))?;
        let ours = draft.offer(mtu);
        self.line.say(&Ask::Tunnel(ours));
        let theirs = match self.line.hear(ANSWER)? {
            Answer::Tunnel(offer) => offer,
            Answer::Failed(reason) => return Err(format!("there: {}", one_line(&reason))),
            other => return Err(refusal(other)),
        };
        let built = draft.build(theirs, self.at.ip(), self.line.end()).map_err(|e| format!("here: {e}"));
        let tried = built.and_then(|burrow| {
            let to = SocketAddr::new(End::Server.address().into(), INSIDE);
            let end = self.line.end();
            match Ground::Inside(&burrow).connect(to, FIRST, end) {
                Ok(_) => Ok(burrow),
                Err(_) => {
                    let blocked = || blocked(wrap, self.at.ip(), theirs.port, ours.port);
                    Err(end.reason().unwrap_or_else(blocked))
                }
            }
        });
        if tried.is_err() && !self.line.end().is_raised() {
            self.line.say(&Ask::Close);
            let _ = self.line.hear(ANSWER);
        }
        tried
    }

    fn draft(&self, wrap: Wrap) -> Result<Draft, BurrowError> {
        let [wireguard, vxlan] = tunnel_ports(self.port, self.at.port());
        let port = match wrap {
            Wrap::WireGuard => wireguard,
            Wrap::Vxlan => vxlan,
        };
        match Draft::new(wrap, End::Asker, port) {
            // Nobody asked for that one: any other will do as well.
            Err(BurrowError::PortTaken(_)) if self.port.is_none() => Draft::new(wrap, End::Asker, 0),
            result => result,
        }
    }

    // --- one figure ------------------------------------------------------------------------------

    fn figure(&self, ground: Ground<'_>, work: Work, watcher: Watcher<'_>) -> Result<Measured, String> {
        self.line.say(&Ask::Prepare(Task { work, seconds: self.seconds }));
        let tickets = match self.line.hear(ANSWER)? {
            Answer::Ready(tickets) => tickets,
            other => return Err(refusal(other)),
        };
        let meter = || Meter::new(self.line.end(), self.line.life());
        let (main, beside) = (meter(), meter());
        let site = Site {
            ground,
            target: match ground {
                Ground::Open => self.at,
                Ground::Inside(_) => SocketAddr::new(End::Server.address().into(), INSIDE),
            },
            long: Duration::from_secs(self.seconds.into()),
            congestion: &self.congestion,
            end: self.line.end(),
            main: &main,
            beside: &beside,
        };
        let finish = || self.finish();
        let mut there = None;
        let here = match (work, tickets.as_slice()) {
            (Work::Tcp { streams, flow }, all) if all.len() == usize::from(streams) => {
                site.streams(all, flow, watcher, &mut || there = Some(finish()))
            }
            (Work::Udp { size, flow }, [ticket]) => {
                site.datagrams(*ticket, size, flow, watcher, &mut || there = Some(finish()))
            }
            (Work::Ping { protocol, beside: None }, [ticket]) => {
                site.ping(protocol, *ticket, None, watcher, &mut || there = Some(finish()))
            }
            (Work::Ping { protocol, beside: Some(flow) }, [ticket, load]) => {
                site.ping(protocol, *ticket, Some((*load, flow)), watcher, &mut || there = Some(finish()))
            }
            (Work::Tcp { .. } | Work::Udp { .. } | Work::Ping { .. }, _) => {
                Err("the other side gives an answer that makes no sense".to_owned())
            }
        };
        main.stop();
        // The other side has to hear that it is over also when it failed here.
        let there = there.unwrap_or_else(finish);
        let (here, trips) = here?;
        Ok(Measured { here, there: there?, trips })
    }

    fn finish(&self) -> Result<Count, String> {
        self.line.say(&Ask::Finish);
        match self.line.hear(Duration::from_secs(self.seconds.into()) + ANSWER)? {
            Answer::Counted(count) => Ok(count),
            other => Err(refusal(other)),
        }
    }
}

fn blocked(wrap: Wrap, there: IpAddr, theirs: u16, ours: u16) -> String {
    match wrap {
        Wrap::WireGuard => format!(
            "no packet comes through: is UDP port {theirs} of {there} open in its firewall? (--port there chooses \
             another)"
        ),
        Wrap::Vxlan => format!(
            "no packet comes through: is UDP port {theirs} of {there} open in its firewall, and {ours} in this \
             side's? VXLAN does not pass NAT (--port chooses others)"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::io::clock;

    #[test]
    fn who_stops_it_before_it_has_begun_waits_for_nobody() {
        let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
        let args = BenchArgs {
            command: None,
            address: None,
            token: Some(Token::draw().expect("random")),
            seconds: 1,
            streams: 1,
            only: Vec::new(),
            reverse: false,
            port: None,
            json: false,
        };
        let end = Ending::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(CONNECT / 20);
                end.raise("stopped by a signal");
            });
            let begun = clock::now();
            let asked = ask(&args, silent.local_addr().expect("bound"), &end);
            assert_eq!(asked.map(drop).expect_err("nobody answers").to_string(), "stopped by a signal");
            assert!(clock::now() - begun < CONNECT / 2);
        });
    }
}
