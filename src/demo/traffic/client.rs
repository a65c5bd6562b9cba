//! A container that asks, and one that measures. What it hears goes to the stage as JSON.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use super::{Answer, AskArgs, MeasureArgs, Protocol, RoundTrips, Sunk, ping, read_greeting};
use crate::io::clock;

/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(20);
/// Long enough for a tunnel that is just being set up.
const PATIENCE: Duration = Duration::from_secs(5);
/// Big enough that the writer is never the bottleneck.
const CHUNK: usize = 256 * 1024;
/// Round trips before counting: first packet, caches, the tunnel's session.
const WARM_UP: usize = 50;

/// Asks until there is an answer or the time is over; what the last try said.
pub(in crate::demo) fn ask(args: &AskArgs) -> Result<Answer, String> {
    let deadline = clock::now() + Duration::from_millis(args.retry_ms);
    let timeout = Duration::from_millis(args.timeout_ms);
    loop {
        match ask_by_name(args, timeout) {
            Ok(answer) => return Ok(answer),
            Err(error) if clock::now() >= deadline => return Err(in_words(&error)),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Sends as fast as it goes; what arrived, as the server counted it.
pub(in crate::demo) fn throughput(args: &MeasureArgs) -> Result<Sunk, String> {
    send_for(args).map_err(|e| in_words(&e))
}

/// One byte there and back, again and again.
pub(in crate::demo) fn latency(args: &MeasureArgs) -> Result<RoundTrips, String> {
    round_trips(args).map_err(|e| in_words(&e))
}

/// Who answered, whom it saw, and how long it took if not all of it counts.
type Heard = (String, IpAddr, Option<u64>);

/// One conversation.
pub(in crate::demo) fn ask_once(
    protocol: Protocol,
    target: SocketAddr,
    timeout: Duration,
) -> io::Result<Heard> {
    match protocol {
        Protocol::Tcp => ask_stream(target, "who", timeout),
        Protocol::Udp => ask_datagram(target, timeout),
        Protocol::Icmp => ask_ping(target, 1, timeout),
    }
}

/// The system's resolver turns a name into addresses, as in any program; the first that answers counts.
fn ask_by_name(args: &AskArgs, timeout: Duration) -> io::Result<Answer> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    let begun = clock::now();
    for to in args.target.to_socket_addrs()? {
        match ask_once(args.protocol, to, timeout) {
            Ok((by, saw, micros)) => {
                let whole = clock::now().duration_since(begun);
                return Ok(Answer { by, saw, micros: micros.unwrap_or(in_micros(whole)), to });
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn ask_stream(target: SocketAddr, question: &str, timeout: Duration) -> io::Result<Heard> {
    let mut stream = TcpStream::connect_timeout(&target, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.write_all(format!("{question}\n").as_bytes())?;
    let mut text = String::new();
    stream.take(256).read_to_string(&mut text)?;
    understood(&text, None)
}

fn ask_datagram(target: SocketAddr, timeout: Duration) -> io::Result<Heard> {
    let any: IpAddr = if target.is_ipv6() { [0u16; 8].into() } else { [0u8; 4].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.send(b"who\n")?;
    let mut text = [0u8; 256];
    let length = socket.recv(&mut text)?;
    understood(&String::from_utf8_lossy(text.get(..length).unwrap_or_default()), None)
}

/// A ping, and then the question whom the target saw pinging: a reply alone would not say.
fn ask_ping(target: SocketAddr, sequence: u16, timeout: Duration) -> io::Result<Heard> {
    let id = (std::process::id() & 0xffff) as u16;
    let took = ping::ping(target.ip(), id, sequence, timeout)?;
    let (by, saw, _) = ask_stream(target, &format!("pinged {id}"), timeout)?;
    Ok((by, saw, Some(in_micros(took))))
}

fn understood(text: &str, micros: Option<u64>) -> io::Result<Heard> {
    let (by, saw) = read_greeting(text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("not an answer: {text:?}")))?;
    Ok((by, saw, micros))
}

fn send_for(args: &MeasureArgs) -> io::Result<Sunk> {
    let mut stream = TcpStream::connect_timeout(&args.target, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"sink\n")?;
    let chunk = vec![0x57; CHUNK];
    let end = clock::now() + Duration::from_millis(args.for_ms);
    while clock::now() < end {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(PATIENCE * 2))?;
    let mut text = String::new();
    stream.take(256).read_to_string(&mut text)?;
    serde_json::from_str(&text).map_err(io::Error::from)
}

fn round_trips(args: &MeasureArgs) -> io::Result<RoundTrips> {
    let mut stream = TcpStream::connect_timeout(&args.target, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"echo\n")?;
    let mut byte = [0u8; 1];
    for _ in 0..WARM_UP {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    let mut trips = Vec::new();
    let mut now = clock::now();
    let end = now + Duration::from_millis(args.for_ms);
    while now < end {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        let back = clock::now();
        trips.push(u64::try_from(back.duration_since(now).as_nanos()).unwrap_or(u64::MAX));
        now = back;
    }
    summary(trips).ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))
}

fn summary(mut trips: Vec<u64>) -> Option<RoundTrips> {
    trips.sort_unstable();
    let at =
        |percent: usize| trips.get((trips.len() * percent / 100).min(trips.len().saturating_sub(1))).copied();
    Some(RoundTrips { count: trips.len(), p50: at(50)?, p99: at(99)? })
}

/// For a report.
pub(in crate::demo) fn in_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// For people.
pub(in crate::demo) fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "no reply".into(),
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::ConnectionReset => "connection reset".into(),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "unreachable".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_round_trips() {
        assert_eq!(summary(vec![]), None);
        assert_eq!(summary(vec![5]), Some(RoundTrips { count: 1, p50: 5, p99: 5 }));
        let hundred = summary((0..100).rev().collect()).expect("not empty");
        assert_eq!((hundred.p50, hundred.p99), (50, 99));
    }

    #[test]
    fn a_timeout_is_no_reply() {
        assert_eq!(in_words(&io::ErrorKind::WouldBlock.into()), "no reply");
        assert_eq!(in_words(&io::ErrorKind::ConnectionRefused.into()), "connection refused");
    }
}
