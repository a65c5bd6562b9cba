//! The asker's part of one figure: the sockets, the pumps, the counting.

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

use super::burrow::Ground;
use super::ending::Ending;
use super::message::{self, Flow, Opening, Protocol};
use super::meter::{Count, FIRST, Meter, Pump, Watcher, await_bytes, count};
use super::secret::Ticket;
use super::stats::Summary;
use super::{datagrams, streams};

/// How much longer than it counts a flood of datagrams goes on: the other side's clock began a little later.
const TAIL: Duration = Duration::from_millis(400);

/// What was counted here.
pub(super) type Here = Result<(Count, Option<Summary>), String>;

/// Where one figure's traffic is made.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    /// Where sockets are opened.
    pub ground: Ground<'a>,
    /// The other side's address for traffic.
    pub target: SocketAddr,
    /// How long it counts.
    pub long: Duration,
    /// TCP's congestion control on this side.
    pub congestion: &'a str,
    /// When it ends too early.
    pub end: &'a Ending,
    /// Of what is measured.
    pub main: &'a Meter,
    /// Of what flows beside it.
    pub beside: &'a Meter,
}

/// To be called once, when the other side may stop counting: its connections are open until it has.
type Finish<'a> = &'a mut dyn FnMut();

impl Site<'_> {
    fn connect(&self, ticket: Ticket) -> Result<TcpStream, String> {
        let to = self.target;
        let open = || {
            let mut stream = self.ground.connect(to, FIRST, self.end)?;
            // A namespace of its own may begin with another.
            let _ = SockRef::from(&stream).set_tcp_congestion(self.congestion.as_bytes());
            message::write(&mut stream, &Opening::Data { ticket })?;
            streams::prepare(&stream)?;
            Ok(stream)
        };
        open().map_err(|e: io::Error| format!("no TCP connection to {to}: {e}"))
    }

    fn socket(&self, ticket: Ticket) -> Result<UdpSocket, String> {
        let to = self.target;
        let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
        let any = any.parse().map_err(|_| "no address to bind to".to_owned())?;
        let open = || {
            let socket = self.ground.datagrams(any)?;
            socket.connect(to).map(|()| socket)
        };
        let socket = open().map_err(|e: io::Error| format!("no UDP socket towards {to}: {e}"))?;
        datagrams::knock(&socket, ticket, self.main).map_err(|reason| match self.ground {
            Ground::Open => format!(
                "{reason}: is UDP port {} of {} open in its firewall? (--listen there chooses another)",
                to.port(),
                to.ip()
            ),
            Ground::Inside(_) => reason,
        })?;
        Ok(socket)
    }

    /// As many bytes as go through connections.
    pub(super) fn streams(
        &self,
        tickets: &[Ticket],
        flow: Flow,
        watcher: Watcher<'_>,
        finish: Finish<'_>,
    ) -> Here {
        let streams: Result<Vec<TcpStream>, String> = tickets.iter().map(|t| self.connect(*t)).collect();
        let streams = streams?;
        let main = self.main;
        thread::scope(|scope| {
            for stream in streams {
                scope.spawn(move || streams::run(Pump::of_asker(flow), stream, main));
            }
            let here = count(self.main, self.long, watcher);
            // They go on until the other side has counted too.
            finish();
            self.main.stop();
            here.map(|count| (count, None))
        })
    }

    /// As many datagrams as go through.
    pub(super) fn datagrams(
        &self,
        ticket: Ticket,
        size: u16,
        flow: Flow,
        watcher: Watcher<'_>,
        finish: Finish<'_>,
    ) -> Here {
        let socket = &self.socket(ticket)?;
        let main = self.main;
        thread::scope(|scope| {
            let pump =
                scope.spawn(move || datagrams::run(Pump::of_asker(flow), socket, ticket, size.into(), main));
            let here = count(self.main, self.long, watcher);
            if flow == Flow::There {
                // The flood ends first: what is said of it would drown in it.
                self.end.pause(TAIL);
                self.main.stop();
                let _ = pump.join();
            }
            finish();
            self.main.stop();
            here.map(|count| (count, None))
        })
    }

    /// Round trips, with or without something beside them.
    pub(super) fn ping(
        &self,
        protocol: Protocol,
        ticket: Ticket,
        load: Option<(Ticket, Flow)>,
        watcher: Watcher<'_>,
        finish: Finish<'_>,
    ) -> Here {
        let load =
            load.map(|(ticket, flow)| self.connect(ticket).map(|stream| (stream, flow))).transpose()?;
        let beside = self.beside;
        thread::scope(|scope| {
            let under_load = load.is_some();
            if let Some((stream, flow)) = load {
                scope.spawn(move || streams::run(Pump::of_asker(flow), stream, beside));
            }
            let pinged = match under_load {
                true => await_bytes(self.beside),
                false => Ok(()),
            };
            let pinged = pinged.and_then(|()| match protocol {
                Protocol::Tcp => {
                    let stream = self.connect(ticket)?;
                    let pinged = streams::ping(&stream, self.main, self.long, watcher);
                    let pinged = pinged.and_then(|pinged| self.beside.check().map(|()| pinged));
                    // Open until the other side has counted; it is closed there, and so is what is beside it.
                    finish();
                    pinged
                }
                Protocol::Udp => {
                    let socket = self.socket(ticket)?;
                    let pinged = datagrams::ping(&socket, ticket, self.main, self.long, watcher);
                    let pinged = pinged.and_then(|pinged| self.beside.check().map(|()| pinged));
                    finish();
                    pinged
                }
            });
            self.beside.stop();
            let (trips, count) = pinged?;
            let summary = trips.summary().ok_or("no request came back")?;
            Ok((count, Some(summary)))
        })
    }
}
