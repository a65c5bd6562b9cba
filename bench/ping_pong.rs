//! Request and answer, over and over: half of each round trip, by TCP and by UDP.
//!
//! Both ends are threads of this process that block on sockets of the two namespaces, so the same code waits for
//! everybody's packets.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use warren::io::clock;

use crate::contestant::Running;

/// Bytes of a request, and of its answer.
pub const MESSAGE: usize = 64;
/// Round trips that do not count, first of all.
const WARM_UP: Duration = Duration::from_millis(300);
/// A TCP connection that stands for so long is broken.
const BROKEN: Duration = Duration::from_secs(10);
/// How long an answer to a datagram is waited for. One that is lost counts as having taken so long.
const PATIENCE: Duration = Duration::from_millis(500);

/// Microseconds one way: the median, what one of a hundred exceeds, and what one of a thousand does.
pub fn measure(on: &Running, seconds: u32, tcp: bool) -> io::Result<[f64; 3]> {
    let stop = AtomicBool::new(false);
    let mut trips = std::thread::scope(|scope| {
        let trips =
            if tcp { over_tcp(on, seconds, &stop, scope) } else { over_udp(on, seconds, &stop, scope) };
        stop.store(true, Ordering::Relaxed);
        trips
    })?;
    trips.sort_unstable();
    let at = |share: f64| {
        let index = ((trips.len() as f64 * share) as usize).min(trips.len().saturating_sub(1));
        let trip = trips.get(index).copied().ok_or(io::ErrorKind::TimedOut)?;
        Ok::<f64, io::Error>(trip.as_secs_f64() * 1e6 / 2.0)
    };
    Ok([at(0.5)?, at(0.99)?, at(0.999)?])
}

fn over_tcp<'scope>(
    on: &'scope Running,
    seconds: u32,
    stop: &'scope AtomicBool,
    scope: &'scope std::thread::Scope<'scope, '_>,
) -> io::Result<Vec<Duration>> {
    let address = on.address(1);
    let listener = on.station(1).ns.enter(|| TcpListener::bind((address, 0)))?;
    let to = listener.local_addr()?;
    let mut stream = on.station(0).ns.enter(|| TcpStream::connect_timeout(&to, BROKEN))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(BROKEN))?;
    stream.set_write_timeout(Some(BROKEN))?;
    let (mut other, _) = listener.accept()?;
    other.set_nodelay(true)?;
    other.set_read_timeout(Some(PATIENCE))?;
    other.set_write_timeout(Some(PATIENCE))?;
    scope.spawn(move || -> io::Result<()> {
        let mut bytes = [0; MESSAGE];
        // That the client has gone is not heard through a tunnel that is dead.
        while !stop.load(Ordering::Relaxed) {
            match other.read(&mut bytes) {
                Ok(0) => break,
                Ok(came) => other.write_all(&bytes[..came])?,
                Err(e) if is_passing(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    });
    let mut message = [7; MESSAGE];
    repeat(seconds, |_| {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)
    })
}

fn over_udp<'scope>(
    on: &'scope Running,
    seconds: u32,
    stop: &'scope AtomicBool,
    scope: &'scope std::thread::Scope<'scope, '_>,
) -> io::Result<Vec<Duration>> {
    let open = |index: usize| {
        let address: IpAddr = on.address(index);
        let socket = on.station(index).ns.enter(|| UdpSocket::bind((address, 0)))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok::<UdpSocket, io::Error>(socket)
    };
    let (client, server) = (open(0)?, open(1)?);
    client.connect(server.local_addr()?)?;
    scope.spawn(move || {
        let mut message = [0; MESSAGE];
        while !stop.load(Ordering::Relaxed) {
            // A request that is not answered is a lost one.
            if let Ok((len, from)) = server.recv_from(&mut message) {
                let _ = server.send_to(&message[..len], from);
            }
        }
    });
    let mut message = [0; MESSAGE];
    repeat(seconds, |number: u64| {
        message[..8].copy_from_slice(&number.to_le_bytes());
        client.send(&message)?;
        let mut answer = [0; MESSAGE];
        // An answer that came too late is not this one's.
        while answer[..8] != message[..8] {
            match client.recv(&mut answer) {
                Ok(_) => {}
                Err(e) if is_passing(&e) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    })
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// How long each round trip takes, for so many seconds.
fn repeat(seconds: u32, mut trip: impl FnMut(u64) -> io::Result<()>) -> io::Result<Vec<Duration>> {
    let begun = clock::now();
    let counts = begun + WARM_UP;
    let end = counts + Duration::from_secs(seconds.into());
    let mut trips = Vec::with_capacity(1 << 20);
    let mut sent: Instant = begun;
    let mut number = 1;
    while sent < end {
        trip(number)?;
        number += 1;
        let now = clock::now();
        if sent >= counts {
            trips.push(now - sent);
        }
        sent = now;
    }
    Ok(trips)
}
