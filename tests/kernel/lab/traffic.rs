//! Traffic in which every byte is checked: TCP, UDP and ICMP echo, of every size.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use warren::io::clock;

use super::netns::Netns;
use super::{Station, wait_for};

/// How long an answer may take. Long, because several tests share few processors.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a waiting server looks whether it should stop.
const GLANCE: Duration = Duration::from_millis(50);

/// Sizes around every border: one byte, the MSS and MTU of both encapsulations, pages, the largest datagram.
pub const SIZES: [usize; 16] =
    [1, 2, 63, 536, 1350, 1372, 1380, 1381, 1392, 1393, 1422, 1473, 4096, 9000, 32_768, 65_507];

/// Of the bytes of every stream: prime and larger than a packet, so that any loss, doubling or swap shows.
const PERIOD: u64 = 1_048_573;

/// `length` bytes of the stream from `start`.
pub fn pattern(start: u64, length: usize) -> Vec<u8> {
    static ONE_PERIOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
        (0..PERIOD).map(|position| (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
    });
    let mut bytes = Vec::with_capacity(length);
    let mut at = (start % PERIOD) as usize;
    while bytes.len() < length {
        let rest = &ONE_PERIOD[at..];
        bytes.extend(&rest[..rest.len().min(length - bytes.len())]);
        at = 0;
    }
    bytes
}

/// Echoes TCP and UDP on one station's addresses until dropped.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// The port, for both protocols and families.
    pub port: u16,
}

impl Echo {
    /// Starts it.
    pub fn start(at: Station<'_>) -> Echo {
        const PORT: u16 = 7;
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for address in at.addresses {
            let here = SocketAddr::new(address, PORT);
            let (tcp, udp) = at.ns.enter(|| {
                let tcp = TcpListener::bind(here).unwrap_or_else(|e| panic!("listen on {here}: {e}"));
                (tcp, UdpSocket::bind(here).unwrap_or_else(|e| panic!("bind {here}: {e}")))
            });
            let (stop_tcp, stop_udp) = (Arc::clone(&stop), Arc::clone(&stop));
            threads.push(std::thread::spawn(move || echo_tcp(&tcp, &stop_tcp)));
            threads.push(std::thread::spawn(move || echo_udp(&udp, &stop_udp)));
        }
        Echo { stop, threads, port: PORT }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn echo_tcp(listener: &TcpListener, stop: &Arc<AtomicBool>) {
    listener.set_nonblocking(true).expect("a listener that does not block");
    let mut open = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                let stop = Arc::clone(stop);
                open.push(std::thread::spawn(move || echo_stream(stream, &stop)));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    for thread in open {
        let _ = thread.join();
    }
}

fn echo_stream(mut stream: TcpStream, stop: &AtomicBool) {
    let prepared = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(GLANCE)));
    // Answers must go out while the client still sends, and the last ones too.
    let prepared = prepared.and_then(|()| stream.set_nodelay(true));
    let mut buffer = vec![0; 128 << 10];
    while prepared.is_ok() && !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) if stream.write_all(&buffer[..n]).is_ok() => {}
            Err(e) if is_timeout(&e) => {}
            Ok(_) | Err(_) => break,
        }
    }
}

fn echo_udp(socket: &UdpSocket, stop: &AtomicBool) {
    socket.set_read_timeout(Some(GLANCE)).expect("a socket that wakes up");
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..n], from);
        }
    }
}

/// Whether a read found nothing in its time.
pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// TCP, UDP and ICMP of every size, both families, from `a` to `b` and then from `b` to `a`.
pub fn exchange(a: Station<'_>, b: Station<'_>) {
    exchange_families(a, b, &[0, 1]);
}

/// The same for some families only: 0 is IPv4, 1 is IPv6.
pub fn exchange_families(a: Station<'_>, b: Station<'_>, families: &[usize]) {
    for (from, to) in [(a, b), (b, a)] {
        let echo = Echo::start(to);
        for &family in families {
            let (source, target) = (from.addresses[family], SocketAddr::new(to.addresses[family], echo.port));
            ping_sizes(from.ns, source, target.ip(), &SIZES);
            udp_sizes(from.ns, source, target, &SIZES);
            tcp_sizes(from.ns, source, target, &SIZES);
            tcp_bulk(from.ns, source, target, 8 << 20);
        }
    }
}

/// One small ping there and back, tried until it works: sessions are made when first needed.
pub fn reach(from: Station<'_>, to: Station<'_>) {
    for family in [0, 1] {
        reach_family(from, to, family);
    }
}

/// The same for one family.
pub fn reach_family(from: Station<'_>, to: Station<'_>, family: usize) {
    let target = to.addresses[family];
    let socket = ping_socket(from.ns, from.addresses[family], target, Duration::from_millis(300));
    wait_for(&format!("{} reaches {target}", from.ns.name()), PATIENCE, || {
        ping_once(&socket, target, 1, 56).ok()
    });
}

/// Whether one ping comes back within the time.
pub fn pings(from: Station<'_>, to: Station<'_>, family: usize, within: Duration) -> bool {
    let target = to.addresses[family];
    let socket = ping_socket(from.ns, from.addresses[family], target, within);
    ping_once(&socket, target, 1, 56).is_ok()
}

/// Pings every 10 ms until it is finished, and counts.
#[derive(Debug)]
pub struct PingTrain {
    stop: Arc<AtomicBool>,
    threads: [JoinHandle<u64>; 2],
}

impl PingTrain {
    /// Departs.
    pub fn start(from: Station<'_>, to: Station<'_>, family: usize) -> PingTrain {
        const EVERY: Duration = Duration::from_millis(10);
        let target = to.addresses[family];
        let socket = ping_socket(from.ns, from.addresses[family], target, GLANCE);
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_sending, stop_receiving) = (Arc::clone(&stop), Arc::clone(&stop));
        let mut answers = socket.try_clone().expect("a second handle");
        let sender = std::thread::spawn(move || {
            let request = if target.is_ipv4() { 8 } else { 128 };
            let mut sent: u64 = 0;
            while !stop_sending.load(Ordering::Relaxed) {
                let message = [&[request, 0, 0, 0, 0, 0][..], &(sent as u16).to_be_bytes()].concat();
                socket.send_to(&message, &SocketAddr::new(target, 0).into()).expect("send a ping");
                sent += 1;
                std::thread::sleep(EVERY);
            }
            sent
        });
        let receiver = std::thread::spawn(move || {
            let reply = if target.is_ipv4() { 0 } else { 129 };
            let (mut received, mut answer) = (0, [0; 64]);
            // The last ones are still under way when the sender stops.
            let mut silent = 0;
            while silent < 20 {
                match answers.read(&mut answer) {
                    Ok(n) if n >= 8 && answer[0] == reply => (received, silent) = (received + 1, 0),
                    Ok(_) | Err(_) => silent += u32::from(stop_receiving.load(Ordering::Relaxed)),
                }
            }
            received
        });
        PingTrain { stop, threads: [sender, receiver] }
    }

    /// Stops; how many were sent, and how many came back.
    pub fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let [sent, received] = self.threads.map(|thread| thread.join().expect("a train that arrives"));
        (sent, received)
    }
}

fn ping_sizes(ns: &Netns, source: IpAddr, target: IpAddr, sizes: &[usize]) {
    let socket = ping_socket(ns, source, target, PATIENCE);
    for (sequence, &size) in (2u16..).zip(sizes) {
        ping_once(&socket, target, sequence, size)
            .unwrap_or_else(|e| panic!("{}: ping {source} -> {target}, {size} bytes: {e}", ns.name()));
    }
}

fn ping_socket(ns: &Netns, source: IpAddr, target: IpAddr, patience: Duration) -> Socket {
    ns.enter(|| {
        let (domain, protocol) = match target {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).expect("open a ping socket");
        socket.bind(&SocketAddr::new(source, 0).into()).unwrap_or_else(|e| panic!("bind {source}: {e}"));
        socket.set_read_timeout(Some(patience)).expect("set a timeout");
        socket.set_send_buffer_size(1 << 20).expect("room for the largest ping");
        socket
    })
}

fn ping_once(socket: &Socket, target: IpAddr, sequence: u16, size: usize) -> io::Result<()> {
    // Echo request: type 8 (RFC 792) or 128 (RFC 4443); checksum and identifier are the kernel's.
    let (request, reply) = if target.is_ipv4() { (8, 0) } else { (128, 129) };
    let mut message = vec![request, 0, 0, 0, 0, 0];
    message.extend(sequence.to_be_bytes());
    message.extend(pattern(u64::from(sequence) * 7, size));
    socket.send_to(&message, &SocketAddr::new(target, 0).into())?;
    let mut answer = vec![0; message.len() + 1];
    let mut reader = socket;
    loop {
        let n = reader.read(&mut answer)?;
        // An answer that came too late for an earlier try is not ours.
        if n >= 8 && answer[0] == reply && answer[6..8] == sequence.to_be_bytes() && n == message.len() {
            return match answer[8..n] == message[8..] {
                true => Ok(()),
                false => Err(io::Error::other("the answer has other bytes")),
            };
        }
    }
}

/// A UDP socket that talks to one address.
pub fn udp_socket(ns: &Netns, source: IpAddr, target: SocketAddr) -> UdpSocket {
    ns.enter(|| {
        let socket = UdpSocket::bind(SocketAddr::new(source, 0)).expect("bind a UDP socket");
        socket.connect(target).unwrap_or_else(|e| panic!("connect to {target}: {e}"));
        socket
    })
}

fn udp_sizes(ns: &Netns, source: IpAddr, target: SocketAddr, sizes: &[usize]) {
    let socket = udp_socket(ns, source, target);
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    let mut answer = vec![0; 65_536];
    for &size in sizes {
        let message = pattern(size as u64, size);
        let at = || format!("{}: UDP {source} -> {target}, {size} bytes", ns.name());
        socket.send(&message).unwrap_or_else(|e| panic!("{}: {e}", at()));
        let n = socket.recv(&mut answer).unwrap_or_else(|e| panic!("{}: no answer: {e}", at()));
        assert!(answer[..n] == message, "{}: the answer has other bytes ({n} of them)", at());
    }
}

/// A TCP connection from one address.
pub fn connect(ns: &Netns, source: IpAddr, target: SocketAddr) -> io::Result<TcpStream> {
    ns.enter(|| {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        socket.connect_timeout(&target.into(), PATIENCE)?;
        socket.set_tcp_nodelay(true)?;
        Ok(TcpStream::from(socket))
    })
}

fn tcp_sizes(ns: &Netns, source: IpAddr, target: SocketAddr, sizes: &[usize]) {
    for &size in sizes {
        let at = || format!("{}: TCP {source} -> {target}, {size} bytes", ns.name());
        let mut stream = connect(ns, source, target).unwrap_or_else(|e| panic!("{}: {e}", at()));
        stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        let message = pattern(size as u64, size);
        stream.write_all(&message).unwrap_or_else(|e| panic!("{}: {e}", at()));
        let mut answer = vec![0; size];
        stream.read_exact(&mut answer).unwrap_or_else(|e| panic!("{}: no answer: {e}", at()));
        assert!(answer == message, "{}: the answer has other bytes", at());
    }
}

/// As many bytes as said, both ways at once, then the end of the stream both ways.
pub fn tcp_bulk(ns: &Netns, source: IpAddr, target: SocketAddr, bytes: u64) {
    let stream = connect(ns, source, target).unwrap_or_else(|e| panic!("TCP {source} -> {target}: {e}"));
    // A writer whom nobody reads would wait for many minutes, and the reader's failure with it.
    stream.set_write_timeout(Some(PATIENCE)).expect("set a timeout");
    let mut writer = stream.try_clone().expect("a second handle");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut sent = 0;
            while sent < bytes {
                let chunk = pattern(sent, (bytes - sent).min(1 << 16) as usize);
                writer.write_all(&chunk).unwrap_or_else(|e| panic!("{source} -> {target} at {sent}: {e}"));
                sent += chunk.len() as u64;
            }
            writer.shutdown(Shutdown::Write).expect("end the stream");
        });
        let mut reader = Checked::new(stream);
        let seen = reader.to_the_end(PATIENCE);
        assert_eq!(seen, bytes, "{source} -> {target}: bytes that came back");
    });
}

/// Reads a stream and checks each byte against its position.
#[derive(Debug)]
pub struct Checked {
    stream: TcpStream,
    position: u64,
}

impl Checked {
    /// From position 0.
    pub fn new(stream: TcpStream) -> Checked {
        Checked { stream, position: 0 }
    }

    /// Reads once; 0 at the end.
    pub fn read(&mut self, patience: Duration) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(patience))?;
        let mut buffer = vec![0; 1 << 16];
        let n = self.stream.read(&mut buffer)?;
        assert!(buffer[..n] == pattern(self.position, n), "wrong bytes at {}", self.position);
        self.position += n as u64;
        Ok(n)
    }

    /// Reads until there were so many bytes in all.
    pub fn read_until(&mut self, position: u64, patience: Duration) {
        while self.position < position {
            match self.read(patience) {
                Ok(0) => panic!("the stream ended at byte {}", self.position),
                Ok(_) => {}
                Err(e) => panic!("the stream broke at byte {}: {e}", self.position),
            }
        }
    }

    /// Reads until the end; how many bytes there were.
    pub fn to_the_end(&mut self, patience: Duration) -> u64 {
        loop {
            match self.read(patience) {
                Ok(0) => return self.position,
                Ok(_) => {}
                Err(e) => panic!("the stream broke at byte {}: {e}", self.position),
            }
        }
    }
}

/// A TCP connection to an [`Echo`] that carries numbered bytes all the time, until it is finished.
#[derive(Debug)]
pub struct Flow {
    stop: Arc<AtomicBool>,
    back: Arc<AtomicU64>,
    longest_pause_ms: Arc<AtomicU64>,
    thread: Option<JoinHandle<(u64, u64)>>,
}

impl Flow {
    /// Starts it; `rate` is bytes a second.
    pub fn start(from: Station<'_>, to: Station<'_>, family: usize, port: u16, rate: u64) -> Flow {
        let target = SocketAddr::new(to.addresses[family], port);
        let stream = connect(from.ns, from.addresses[family], target).expect("connect the flow");
        let (stop, back) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let pause = Arc::new(AtomicU64::new(0));
        let (s, b, p) = (Arc::clone(&stop), Arc::clone(&back), Arc::clone(&pause));
        let thread = std::thread::spawn(move || run_flow(stream, &s, &b, &p, rate));
        Flow { stop, back, longest_pause_ms: pause, thread: Some(thread) }
    }

    /// Bytes that have come back so far.
    pub fn echoed(&self) -> u64 {
        self.back.load(Ordering::Relaxed)
    }

    /// The longest time in which nothing came back.
    pub fn longest_pause(&self) -> Duration {
        Duration::from_millis(self.longest_pause_ms.load(Ordering::Relaxed))
    }

    /// Panics unless bytes come back within the time from now.
    pub fn assert_alive(&self, within: Duration) {
        let before = self.echoed();
        wait_for("the TCP connection goes on", within, || {
            assert!(self.thread.as_ref().is_some_and(|t| !t.is_finished()), "the TCP connection broke");
            (self.echoed() > before).then_some(())
        });
    }

    /// Ends it; panics unless every byte that was sent came back. Returns how many there were.
    pub fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let (sent, back) =
            self.thread.take().expect("finished once").join().expect("the TCP connection broke");
        assert_eq!(sent, back, "bytes sent and bytes that came back");
        back
    }
}

fn run_flow(
    stream: TcpStream,
    stop: &AtomicBool,
    back: &AtomicU64,
    pause: &AtomicU64,
    rate: u64,
) -> (u64, u64) {
    const TICK: Duration = Duration::from_millis(10);
    /// A connection that is silent for this long has lost something that will not come again.
    const SILENCE: Duration = Duration::from_secs(40);
    let mut writer = stream.try_clone().expect("a second handle");
    let mut reader = Checked::new(stream);
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                let chunk = pattern(sent, (rate / 100).max(1) as usize);
                writer
                    .write_all(&chunk)
                    .unwrap_or_else(|e| panic!("the TCP connection broke at {sent}: {e}"));
                sent += chunk.len() as u64;
                std::thread::sleep(TICK);
            }
            writer.shutdown(Shutdown::Write).expect("end the stream");
            sent
        });
        let mut last = clock::now();
        loop {
            let n = reader.read(SILENCE).unwrap_or_else(|e| panic!("the TCP connection broke: {e}"));
            let now = clock::now();
            let gap = u64::try_from(now.duration_since(last).as_millis()).unwrap_or(u64::MAX);
            pause.fetch_max(gap, Ordering::Relaxed);
            last = now;
            if n == 0 {
                break;
            }
            back.fetch_add(n as u64, Ordering::Relaxed);
        }
        (sending.join().expect("the sending half"), reader.position)
    })
}
