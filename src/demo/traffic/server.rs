//! A container that answers.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

use super::{Pattern, ServeArgs, Sunk, greeting, ping, read_greeting, read_line};
use crate::demo::DemoError;
use crate::demo::internal::say;
use crate::io::clock;

/// How many echo requests are remembered.
const REMEMBERED_PINGS: usize = 64;
/// Big enough that the reader is never the bottleneck.
const CHUNK: usize = 256 * 1024;
/// A request with more than that is cut off.
const MOST_HEADER_LINES: usize = 256;
/// A download's pace, 3.2 MB/s: many at once are no measurement.
const DOWNLOAD_CHUNK: u64 = 32 * 1024;
const DOWNLOAD_PAUSE: Duration = Duration::from_millis(10);
/// A client that says nothing for so long has gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// Answers until killed.
pub(in crate::demo) fn serve(args: &ServeArgs) -> Result<(), DemoError> {
    let pings = Pings::default();
    let name: Arc<str> = args.name.as_str().into();
    for &address in &args.listen {
        let wrong = |e| DemoError::system(format!("{name} listening on {address}"), e);
        let listener = TcpListener::bind(address).map_err(wrong)?;
        let socket = UdpSocket::bind(address).map_err(wrong)?;
        let (name_tcp, name_udp, seen) = (Arc::clone(&name), Arc::clone(&name), pings.clone());
        thread::spawn(move || accept(&listener, &name_tcp, &seen));
        thread::spawn(move || answer_datagrams(&socket, &name_udp));
    }
    if args.pings {
        for v6 in [false, true] {
            // A kernel without IPv6 refuses the second; nobody will ask it for those.
            if let Ok(socket) = ping::listener(v6) {
                let seen = pings.clone();
                thread::spawn(move || ping::watch(&socket, v6, |id, from| seen.remember(id, from)));
            }
        }
    }
    say("listening");
    loop {
        thread::park();
    }
}

/// Who sent echo requests lately.
#[derive(Clone, Default)]
struct Pings(Arc<Mutex<VecDeque<(u16, IpAddr)>>>);

impl Pings {
    fn remember(&self, id: u16, from: IpAddr) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() == REMEMBERED_PINGS {
            seen.pop_front();
        }
        seen.push_back((id, from));
    }

    fn last(&self, id: u16) -> Option<IpAddr> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().rev().find(|(known, _)| *known == id).map(|(_, from)| *from)
    }
}

fn accept(listener: &TcpListener, name: &Arc<str>, pings: &Pings) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let (name, pings) = (Arc::clone(name), pings.clone());
        // A client that goes away in the middle costs its own connection only.
        thread::spawn(move || drop(answer_stream(stream, &name, &pings)));
    }
}

fn answer_stream(mut stream: TcpStream, name: &str, pings: &Pings) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let from = stream.peer_addr()?.ip().to_canonical();
    let line = read_line(&mut stream)?;
    match line.split_once(' ').unwrap_or((line.as_str(), "")) {
        ("who", _) => stream.write_all(greeting(name, from).as_bytes()),
        ("pinged", id) => {
            let seen = id.parse().ok().and_then(|id| pings.last(id));
            let text = seen.map_or_else(|| "nobody\n".to_string(), |from| greeting(name, from));
            stream.write_all(text.as_bytes())
        }
        ("sink", _) => {
            let sunk = sink(&mut stream)?;
            stream.write_all(serde_json::to_string(&sunk)?.as_bytes())
        }
        ("echo", _) => echo(&mut stream),
        ("source", bytes) => {
            stream.write_all(greeting(name, from).as_bytes())?;
            source(&mut stream, bytes.parse().unwrap_or(0))
        }
        ("GET", _) => answer_browser(&mut stream, &greeting(name, from)),
        (_, _) => Ok(()),
    }
}

/// So that curl and browsers can ask too. The rest of the request is read first: closing a socket with unread
/// bytes resets the connection, and the answer may be lost.
fn answer_browser(stream: &mut TcpStream, text: &str) -> io::Result<()> {
    for _ in 0..MOST_HEADER_LINES {
        if read_line(stream)?.trim_end().is_empty() {
            break;
        }
    }
    let length = text.len();
    stream.write_all(format!("HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n{text}").as_bytes())
}

fn sink(stream: &mut TcpStream) -> io::Result<Sunk> {
    let mut chunk = vec![0u8; CHUNK];
    let mut bytes = stream.read(&mut chunk)? as u64;
    let first = clock::now();
    loop {
        let more = stream.read(&mut chunk)?;
        if more == 0 {
            let micros = clock::now().duration_since(first).as_micros();
            return Ok(Sunk { bytes, micros: u64::try_from(micros).unwrap_or(u64::MAX) });
        }
        bytes += more as u64;
    }
}

fn echo(stream: &mut TcpStream) -> io::Result<()> {
    let mut some = [0u8; 64];
    loop {
        let got = stream.read(&mut some)?;
        if got == 0 {
            return Ok(());
        }
        stream.write_all(some.get(..got).unwrap_or_default())?;
    }
}

fn source(stream: &mut TcpStream, bytes: u64) -> io::Result<()> {
    // A pod that is killed says nothing more, and its kernel does not go on for it.
    SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
    let pattern = Pattern::new(DOWNLOAD_CHUNK as usize);
    let begun = clock::now();
    let mut sent = 0;
    while sent < bytes {
        let length = DOWNLOAD_CHUNK.min(bytes - sent);
        stream.write_all(pattern.piece(sent, length as usize))?;
        sent += length;
        let due = DOWNLOAD_PAUSE * (sent / DOWNLOAD_CHUNK) as u32;
        thread::sleep(due.saturating_sub(clock::now().duration_since(begun)));
    }
    // It went well: now the kernel may take its time with what it still has to send.
    SockRef::from(&*stream).set_linger(None)
}

fn answer_datagrams(socket: &UdpSocket, name: &str) {
    let mut question = [0u8; 2048];
    loop {
        // An ICMP error from an earlier answer may surface here; the next question is not to blame.
        let Ok((length, from)) = socket.recv_from(&mut question) else { continue };
        let text = String::from_utf8_lossy(question.get(..length).unwrap_or_default());
        // Two servers that answer each other's answers would never stop.
        if read_greeting(&text).is_none() {
            let _ = socket.send_to(greeting(name, seen_address(from)).as_bytes(), from);
        }
    }
}

fn seen_address(from: SocketAddr) -> IpAddr {
    from.ip().to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_remembered_up_to_a_bound() {
        let pings = Pings::default();
        let from = |n: u16| IpAddr::from([10, 0, (n >> 8) as u8, n as u8]);
        for n in 0..100 {
            pings.remember(n, from(n));
        }
        assert_eq!(pings.last(99), Some(from(99)));
        assert_eq!(pings.last(0), None);
        assert_eq!(pings.0.lock().expect("no panic above").len(), REMEMBERED_PINGS);
    }

    #[test]
    fn the_latest_ping_counts() {
        let pings = Pings::default();
        pings.remember(7, IpAddr::from([10, 0, 0, 1]));
        pings.remember(7, IpAddr::from([10, 0, 0, 2]));
        assert_eq!(pings.last(7), Some(IpAddr::from([10, 0, 0, 2])));
    }
}
