//! `warren bench serve`: waits for somebody who knows the token, and does what it is asked; one at a time.
//!
//! What may come from anybody is a connection and its first message, bounded in length, time and number (`door`).
//! Traffic is taken, sent and returned only with a ticket that was given on a control connection whose asker proved the
//! token, and only with that asker's address.

use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::burrow::{Burrow, Draft, End, Ground, listen};
use super::door::{self, Booking, Door, Guest};
use super::ending::Ending;
use super::line::Line;
use super::message::{self, Answer, Ask, Offer, Protocol, Task, Welcome, Work, Wrap};
use super::meter::{Count, Meter, PING, Pump, count};
use super::secret::{Nonce, Prover, Ticket, Token};
use super::{INSIDE, MeasureError, ServeArgs, datagrams, progress, streams, tunnel_ports};
use crate::io::clock;
use crate::io::underlay::path_mtu;
use crate::state::problem::one_line;

/// Measurements of one asker: three ways and a good deal more.
const MAX_TASKS: usize = 200;
/// However slowly it asks.
const MAX_SESSION: Duration = Duration::from_secs(3600);

/// Serves until told to stop, or with `--once` until one asker is done.
pub(super) fn serve(args: &ServeArgs, stop: &Ending) -> Result<(), MeasureError> {
    let at = args.listen.0;
    let listener = open(at)?;
    let at = listener.local_addr().map_err(MeasureError::io("listen"))?;
    let token = match &args.token {
        Some(token) => token.clone(),
        None => Token::draw().map_err(|e| MeasureError::Failed(e.to_string()))?,
    };
    let ports = tunnel_ports(args.port, at.port());
    announce(at, ports, &token, args.token.is_some());
    let (door, guests) = Door::new(token);
    let guard = {
        let (door, stop) = (Arc::clone(&door), stop.clone());
        thread::spawn(move || door::accept(&listener, &door, &stop, true))
    };
    while let Some(Guest { stream, peer, nonce }) = door::next(&guests, stop) {
        progress::write(&format!("{peer}: begins\n"));
        let how = session(stream, nonce, &door, ports, at.port(), stop);
        door.free();
        progress::write(&format!("{peer}: {}\n", one_line(&how)));
        if args.once {
            stop.raise("one asker was served");
        }
    }
    let _ = guard.join();
    Ok(())
}

fn open(at: SocketAddr) -> Result<TcpListener, MeasureError> {
    let taken = |what: &str, e: io::Error| {
        MeasureError::Failed(format!("cannot listen on {what} {at}: {e}; choose another port with --listen"))
    };
    let any_v4 = SocketAddr::from(([0, 0, 0, 0], at.port()));
    let unspecified = at.ip().is_unspecified();
    let listener = match listen(at) {
        // A machine without IPv6.
        Err(e) if unspecified && e.kind() != io::ErrorKind::AddrInUse => listen(any_v4),
        result => result,
    };
    let listener = listener.map_err(|e| taken("TCP", e))?;
    // The socket itself is opened when it is needed, at the address by which the asker came.
    let at = listener.local_addr().map_err(MeasureError::io("listen"))?;
    UdpSocket::bind(at).map_err(|e| taken("UDP", e))?;
    Ok(listener)
}

fn announce(at: SocketAddr, ports: [u16; 2], token: &Token, given: bool) {
    let mut address = at.ip().to_string();
    if at.ip().is_unspecified() {
        address = own_address().map_or_else(|| "ADDRESS".to_owned(), |own| own.to_string());
    }
    if at.port() != super::PORT {
        address = match address.contains(':') {
            true => format!("[{address}]:{}", at.port()),
            false => format!("{address}:{}", at.port()),
        };
    }
    let token = if given { "the same token" } else { token.reveal() };
    let [wireguard, vxlan] = ports;
    let mut out = io::stdout().lock();
    // Nobody reads it: then somebody gave the token.
    let _ = writeln!(
        out,
        "Waiting at TCP and UDP port {}; UDP {wireguard} for WireGuard, UDP {vxlan} for VXLAN.\n\
         On the other side:\n\n    warren bench {address} --token {token}\n",
        at.port()
    );
    let _ = out.flush();
}

/// The address that packets to the world would have; none is sent.
fn own_address() -> Option<IpAddr> {
    [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")].into_iter().find_map(|(any, world)| {
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(world).ok()?;
        socket.local_addr().ok().map(|at| at.ip())
    })
}

struct Session<'a> {
    line: Line<Answer, Ask>,
    door: &'a Arc<Door>,
    ports: [u16; 2],
    /// TCP and UDP.
    port: u16,
    /// TCP's congestion control on this side.
    congestion: String,
    inside: Option<Inside>,
    running: Option<Running>,
}

/// The tunnel, and who listens in it.
struct Inside {
    burrow: Burrow,
    end: Ending,
    guard: Option<JoinHandle<()>>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.end.raise("the tunnel is gone");
        if let Some(guard) = self.guard.take() {
            let _ = guard.join();
        }
    }
}

/// A task that goes on.
struct Running {
    meters: Vec<Arc<Meter>>,
    counter: JoinHandle<Result<Count, String>>,
    pumps: Vec<JoinHandle<()>>,
}

/// Does what one asker wants; how it ended.
fn session(
    mut stream: TcpStream,
    (theirs, ours): (Nonce, Nonce),
    door: &Arc<Door>,
    ports: [u16; 2],
    port: u16,
    stop: &Ending,
) -> String {
    let v6 = stream.local_addr().is_ok_and(|at| at.ip().to_canonical().is_ipv6());
    let welcome = Welcome {
        proof: door.token.prove(Prover::Server, theirs, ours),
        program: env!("CARGO_PKG_VERSION").to_owned(),
        mtu: path_mtu(&stream, v6).unwrap_or(1280),
        congestion: streams::congestion(&stream),
    };
    let congestion = welcome.congestion.clone();
    if let Err(error) = message::write(&mut stream, &Answer::Welcome(welcome)) {
        return error.to_string();
    }
    let line = match Line::start(stream, stop.part()) {
        Ok(line) => line,
        Err(error) => return error.to_string(),
    };
    let mut session = Session { line, door, ports, port, congestion, inside: None, running: None };
    let how = session.run(clock::now() + MAX_SESSION);
    session.line.end().raise(&how);
    if let Some(running) = session.running.take() {
        // Nobody is left to hear of it.
        let _ = finish(running);
    }
    how
}

impl Session<'_> {
    fn run(&mut self, until: Instant) -> String {
        let mut tasks = 0;
        loop {
            let left = until.saturating_duration_since(clock::now());
            let ask = match self.line.hear(left) {
                Ok(ask) => ask,
                Err(reason) => return reason,
            };
            let answer = match ask {
                Ask::Prepare(task) if self.running.is_none() && tasks < MAX_TASKS => {
                    tasks += 1;
                    self.begin(task).map_or_else(Answer::Failed, Answer::Ready)
                }
                Ask::Finish => {
                    let Some(running) = self.running.take() else { return NONSENSE.to_owned() };
                    let counted = finish(running);
                    self.door.bookings().clear();
                    counted.map_or_else(Answer::Failed, Answer::Counted)
                }
                Ask::Tunnel(offer) if self.running.is_none() && self.inside.is_none() => {
                    self.tunnel(offer).map_or_else(Answer::Failed, Answer::Tunnel)
                }
                Ask::Close if self.running.is_none() => {
                    self.inside = None;
                    Answer::Closed
                }
                Ask::Bye => return "done".to_owned(),
                Ask::Proof(_) | Ask::Prepare(_) | Ask::Tunnel(_) | Ask::Close | Ask::Alive => {
                    return NONSENSE.to_owned();
                }
            };
            self.line.say(&answer);
        }
    }

    fn tunnel(&mut self, theirs: Offer) -> Result<Offer, String> {
        let [wireguard, vxlan] = self.ports;
        let port = match theirs.encap {
            Wrap::WireGuard => wireguard,
            Wrap::Vxlan => vxlan,
        };
        let made = Draft::new(theirs.encap, End::Server, port).and_then(|draft| {
            let ours = draft.offer(theirs.mtu);
            Ok((ours, draft.build(theirs, self.line.peer().ip(), self.line.end())?))
        });
        let (ours, burrow) = made.map_err(|e| e.to_string())?;
        let at = SocketAddr::new(End::Server.address().into(), INSIDE);
        let listener = Ground::Inside(&burrow).listen(at, &self.congestion).map_err(|e| e.to_string())?;
        let end = self.line.end().part();
        let guard = {
            let (door, end) = (Arc::clone(self.door), end.clone());
            thread::spawn(move || door::accept(&listener, &door, &end, false))
        };
        self.inside = Some(Inside { burrow, end, guard: Some(guard) });
        Ok(ours)
    }

    /// Gets ready for a task: books its connections, opens its datagram socket, counts from the first byte on.
    fn begin(&mut self, task: Task) -> Result<Vec<Ticket>, String> {
        let flows = task.flows().ok_or(NONSENSE)?;
        let tickets: Result<Vec<Ticket>, _> = (0..flows).map(|_| Ticket::draw()).collect();
        let tickets = tickets.map_err(|e| e.to_string())?;
        // With its scope, if it has one.
        let mut local = self.line.local();
        local.set_port(self.port);
        let (ground, local, from) = match &self.inside {
            None => (Ground::Open, local, self.line.peer().ip()),
            Some(inside) => (
                Ground::Inside(&inside.burrow),
                SocketAddr::new(End::Server.address().into(), INSIDE),
                End::Asker.address().into(),
            ),
        };
        let from = from.to_canonical();
        let meter = || Arc::new(Meter::new(self.line.end(), self.line.life()));
        let (main, beside) = (meter(), meter());
        let book = |ticket: &Ticket, pump, meter: &Arc<Meter>| {
            self.door.bookings().insert(*ticket, Booking { from, pump, meter: Arc::clone(meter) });
        };
        let mut pumps = Vec::new();
        let mut begin_datagrams = |ticket: &Ticket, pump, size: usize| -> Result<(), String> {
            let socket = datagram_socket(ground, local)?;
            let (ticket, meter) = (*ticket, Arc::clone(&main));
            pumps.push(thread::spawn(move || match datagrams::await_knock(&socket, ticket, from, &meter) {
                Ok(()) => datagrams::run(pump, &socket, ticket, size, &meter),
                Err(trouble) => meter.fail(trouble),
            }));
            Ok(())
        };
        match (task.work, tickets.as_slice()) {
            (Work::Tcp { flow, .. }, all) => {
                all.iter().for_each(|ticket| book(ticket, Pump::of_server(flow), &main));
            }
            (Work::Udp { flow, size }, [ticket, ..]) => {
                begin_datagrams(ticket, Pump::of_server(flow), size.into())?;
            }
            (Work::Ping { protocol, beside: load }, [ticket, more @ ..]) => {
                match protocol {
                    Protocol::Tcp => book(ticket, Pump::Echo, &main),
                    Protocol::Udp => begin_datagrams(ticket, Pump::Echo, PING)?,
                }
                if let (Some(flow), Some(ticket)) = (load, more.first()) {
                    book(ticket, Pump::of_server(flow), &beside);
                }
            }
            (Work::Udp { .. } | Work::Ping { .. }, []) => return Err(NONSENSE.to_owned()),
        }
        let counter = {
            let (meter, long) = (Arc::clone(&main), Duration::from_secs(task.seconds.into()));
            thread::spawn(move || count(&meter, long, &mut |_| {}))
        };
        self.running = Some(Running { meters: vec![main, beside], counter, pumps });
        Ok(tickets)
    }
}

/// Asked for at the wrong moment, or too often.
const NONSENSE: &str = "asked for what makes no sense";

fn finish(running: Running) -> Result<Count, String> {
    let Running { meters, counter, pumps } = running;
    let counted = counter.join().unwrap_or_else(|_| Err("counting failed".to_owned()));
    meters.iter().for_each(|meter| meter.stop());
    for pump in pumps {
        let _ = pump.join();
    }
    counted
}

fn datagram_socket(ground: Ground<'_>, at: SocketAddr) -> Result<UdpSocket, String> {
    ground.datagrams(at).map_err(|e| format!("UDP port {} cannot be had: {e}", at.port()))
}

#[cfg(test)]
mod tests {
    use super::super::Listen;
    use super::super::message::{Flow, LONGEST, Opening, VERSION};
    use super::super::secret::Proof;
    use super::*;

    const LONG: Duration = Duration::from_secs(5);

    /// A server on a port of its own that ends with the test.
    struct Server {
        at: SocketAddr,
        token: Token,
        stop: Ending,
        thread: Option<JoinHandle<Result<(), MeasureError>>>,
    }

    impl Server {
        fn start() -> Server {
            // Free a moment ago.
            let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
            let (token, stop) = (Token::draw().expect("random"), Ending::default());
            let args =
                ServeArgs { listen: Listen(free), port: None, token: Some(token.clone()), once: false };
            let thread = {
                let stop = stop.clone();
                Some(thread::spawn(move || serve(&args, &stop)))
            };
            Server { at: free, token, stop, thread }
        }

        fn connect(&self) -> TcpStream {
            let until = clock::now() + LONG;
            loop {
                match TcpStream::connect(self.at) {
                    Ok(stream) => return stream,
                    Err(error) => assert!(clock::now() < until, "{error}"),
                }
                thread::sleep(Duration::from_millis(10));
            }
        }

        /// What it asks somebody who wants to measure.
        fn challenge(&self, version: u32, nonce: Nonce) -> (TcpStream, Answer) {
            let mut stream = self.connect();
            message::write(&mut stream, &Opening::Control { version, nonce }).expect("written");
            let answer = answer(&mut stream);
            (stream, answer)
        }

        /// What it says to somebody with this token and version.
        fn introduce(&self, token: &Token, version: u32) -> (TcpStream, Answer) {
            let nonce = Nonce([1; 16]);
            let (mut stream, answer) = self.challenge(version, nonce);
            let Answer::Challenge(theirs) = answer else { return (stream, answer) };
            let proof = token.prove(Prover::Asker, nonce, theirs);
            message::write(&mut stream, &Ask::Proof(proof)).expect("written");
            let answer = self::answer(&mut stream);
            if let Answer::Welcome(welcome) = &answer {
                assert!(token.is_known_to(Prover::Server, nonce, theirs, welcome.proof));
            }
            (stream, answer)
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            self.stop.raise("the test is over");
            if let Some(thread) = self.thread.take() {
                let ended = thread.join().expect("no panic");
                assert!(ended.is_ok(), "{ended:?}");
            }
        }
    }

    fn answer(stream: &mut TcpStream) -> Answer {
        message::read(stream, LONGEST, LONG, &Ending::default()).expect("an answer")
    }

    fn is_closed(stream: &mut TcpStream) -> bool {
        stream.set_read_timeout(Some(LONG)).expect("a timeout");
        match io::Read::read(stream, &mut [0]) {
            Ok(came) => came == 0,
            // What it did not read is thrown away.
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    #[test]
    fn whoever_does_not_know_the_token_gets_nothing_and_the_next_is_served() {
        let server = Server::start();
        let refused = |answer: Answer| match answer {
            Answer::Refused(reason) => reason,
            other => panic!("{other:?}"),
        };
        let wrong = "not-the-token".parse().expect("a token");
        assert!(refused(server.introduce(&wrong, VERSION).1).contains("wrong token"));
        assert!(refused(server.introduce(&server.token, VERSION + 1).1).contains("version"));
        for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0, 0, 2, b'{', b'}'], &[255; 64]] {
            let mut stream = server.connect();
            io::Write::write_all(&mut stream, nonsense).expect("written");
            assert!(is_closed(&mut stream), "{nonsense:?}");
        }
        let mut stream = server.connect();
        message::write(&mut stream, &Opening::Data { ticket: Ticket([0; 16]) }).expect("written");
        assert!(is_closed(&mut stream), "no such ticket");

        let (guest, answer) = server.introduce(&server.token, VERSION);
        assert!(matches!(answer, Answer::Welcome(_)), "{answer:?}");
        assert!(refused(server.introduce(&server.token, VERSION).1).contains("busy"));
        drop(guest);
        let until = clock::now() + LONG;
        while !matches!(server.introduce(&server.token, VERSION).1, Answer::Welcome(_)) {
            assert!(clock::now() < until, "served again after the first one went");
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_proof_of_another_connection_is_worth_nothing() {
        let server = Server::start();
        let nonce = Nonce([1; 16]);
        let (mut first, answered) = server.challenge(VERSION, nonce);
        let Answer::Challenge(theirs) = answered else { panic!("{answered:?}") };
        let proof = Ask::Proof(server.token.prove(Prover::Asker, nonce, theirs));
        // Somebody who has heard it says the same.
        let (mut second, answered) = server.challenge(VERSION, nonce);
        assert!(matches!(answered, Answer::Challenge(other) if other != theirs), "{answered:?}");
        message::write(&mut second, &proof).expect("written");
        assert_eq!(answer(&mut second), Answer::Refused("wrong token".to_owned()));
        message::write(&mut first, &proof).expect("written");
        assert!(matches!(answer(&mut first), Answer::Welcome(_)));
    }

    #[test]
    fn what_makes_no_sense_ends_the_session() {
        let server = Server::start();
        let task = Task { work: Work::Tcp { streams: 200, flow: Flow::There }, seconds: 1 };
        for asked in [Ask::Finish, Ask::Proof(Proof([0; 32])), Ask::Prepare(task)] {
            let until = clock::now() + LONG;
            let stream = loop {
                let (stream, answer) = server.introduce(&server.token, VERSION);
                if matches!(answer, Answer::Welcome(_)) {
                    break stream;
                }
                assert!(clock::now() < until, "{answer:?}");
                thread::sleep(Duration::from_millis(20));
            };
            let line = Line::<Ask, Answer>::start(stream, Ending::default()).expect("a line");
            line.say(&asked);
            let heard = line.hear(LONG);
            if asked == Ask::Prepare(task) {
                assert_eq!(heard, Ok(Answer::Failed(NONSENSE.to_owned())), "only the figure fails");
            } else {
                assert!(heard.is_err() && line.end().is_raised(), "{asked:?}: {heard:?}");
            }
        }
    }
}
