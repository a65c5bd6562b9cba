//! A connection to the first API server that answers: TCP, then TLS, each address for a short time. One that then
//! answers requests with errors, or not at all, comes after the others for a while ([`Standing`]).

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::CertificateError;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::access::{Access, Candidate, ServerUrl};
use crate::state::problem::one_line;

/// How long one address may take until TLS stands: the next one may be a millisecond away.
const EACH: Duration = Duration::from_secs(3);
/// How long all of them together: what is left then is tried next time.
const ALL: Duration = Duration::from_secs(28);
/// How long a name may take to resolve.
const RESOLVE: Duration = Duration::from_secs(4);
/// Most addresses of one name.
const MAX_ADDRESSES: usize = 4;
/// When nothing was said for so long, the kernel asks whether the other end is there; HTTP/2 asks too.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// After so long without an acknowledgement a connection is dead (RFC 5482).
const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// How many requests in a row a server may fail before the next one has its turn.
const FAILURES: u32 = 3;
/// How long it then comes after the others: at first, and at most. Also how long a server that is only used because
/// better ones did not answer is used before those are tried again.
const FIRST_REST: Duration = Duration::from_secs(30);
const LONGEST_REST: Duration = Duration::from_secs(600);
/// Servers of which it is known how they did; more than there are.
const MAX_KNOWN: usize = 64;

/// Connects to whichever API server answers; clones share what they remember.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    access: Arc<Access>,
    standing: Arc<Mutex<Standing>>,
}

/// Which server a connection goes to: comes with every answer.
#[derive(Clone, Debug)]
pub(super) struct Reached(pub(super) ServerUrl);

/// How the servers did.
#[derive(Debug, Default)]
struct Standing {
    /// The server that answered last: first among those of its rank.
    last: Option<ServerUrl>,
    bad: HashMap<ServerUrl, Bad>,
    /// When it is time to see whether a better one than the last is back, and how long that was waited for.
    look_again: Option<(Instant, Duration)>,
}

/// A server that answers TLS and fails after that.
#[derive(Clone, Copy, Debug, Default)]
struct Bad {
    /// Requests in a row.
    failures: u32,
    /// Until when the others come first, and how long that was.
    rest: Option<(Instant, Duration)>,
}

/// What to do about a server that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    No,
    Now,
    /// The others come first already.
    Again,
}

impl Bad {
    fn rests(&self, now: Instant) -> bool {
        self.rest.is_some_and(|(until, _)| now < until)
    }
}

impl Standing {
    /// A request failed at that server; `surely`: it need not fail again. Says whether to leave it, and whether that
    /// is news: behind one address there may be several, so it is left also where there is no other.
    fn failed(&mut self, server: &ServerUrl, surely: bool, now: Instant) -> Leave {
        if self.bad.len() >= MAX_KNOWN && !self.bad.contains_key(server) {
            self.bad.clear();
        }
        let bad = self.bad.entry(server.clone()).or_default();
        bad.failures = bad.failures.saturating_add(1);
        if bad.failures < FAILURES && !surely {
            return Leave::No;
        }
        bad.failures = 0;
        if bad.rests(now) {
            return Leave::Again;
        }
        let pause = bad.rest.map_or(FIRST_REST, |(_, pause)| (pause * 2).min(LONGEST_REST));
        bad.rest = Some((now + pause, pause));
        Leave::Now
    }

    /// A request was answered. Only an hour of that makes a server as good as new.
    fn worked(&mut self, server: &ServerUrl, now: Instant) {
        if let Some(bad) = self.bad.get_mut(server) {
            bad.failures = 0;
            if bad.rest.is_none_or(|(until, _)| now > until + 6 * LONGEST_REST) {
                self.bad.remove(server);
            }
        }
    }

    /// Until when the others come first, if they do.
    fn rest(&self, server: &ServerUrl, now: Instant) -> Option<Instant> {
        let bad = self.bad.get(server).filter(|bad| bad.rests(now))?;
        bad.rest.map(|(until, _)| until)
    }
}

/// No API server answers: what was tried, why each failed, and what to do.
#[derive(Clone, Debug)]
pub(super) struct Unreachable {
    tried: Vec<String>,
    /// What could have been tried besides, and why it was not.
    left_out: Vec<String>,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tried.is_empty() {
            true => write!(f, "no API server to ask is known")?,
            false => write!(f, "no API server answers: {}", self.tried.join("; "))?,
        }
        if !self.left_out.is_empty() {
            write!(f, " ({})", self.left_out.join("; "))?;
        }
        write!(f, "; set --api-server to an address of it that this node reaches without Services")
    }
}

impl Error for Unreachable {}

impl Connector {
    pub(super) fn new(access: Arc<Access>) -> Connector {
        Connector { access, standing: Arc::default() }
    }

    /// Tries all in turn.
    pub(super) async fn connect(&self) -> Result<Stream, Unreachable> {
        let mut candidates = self.access.candidates().await;
        let (begin, mut tried) = (Instant::now(), Vec::new());
        self.order(&mut candidates.list, begin);
        let best = candidates.list.iter().map(|one| one.rank).min();
        for candidate in &candidates.list {
            if begin.elapsed() > ALL {
                candidates.left_out.push(format!("no time left for {}", candidate.server));
                continue;
            }
            match reach(candidate).await {
                Ok(stream) => {
                    self.reached(candidate, best != Some(candidate.rank));
                    return Ok(stream);
                }
                Err(reason) => tried.push(format!("{} ({}): {reason}", candidate.server, candidate.from)),
            }
        }
        Err(Unreachable { tried, left_out: candidates.left_out })
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, list: &mut [Candidate], now: Instant) {
        let standing = self.standing();
        list.sort_by_key(|one| {
            // Where all failed, the one that did so first has its turn again.
            let rest = standing.rest(&one.server, now);
            (rest, one.rank, Some(&one.server) != standing.last.as_ref())
        });
    }

    fn reached(&self, candidate: &Candidate, makeshift: bool) {
        let mut standing = self.standing();
        if standing.last.as_ref() != Some(&candidate.server) {
            tracing::info!("the API server at {} answers ({})", candidate.server, candidate.from);
            standing.last = Some(candidate.server.clone());
        }
        let waited = standing.look_again.map(|(_, pause)| (pause * 2).min(LONGEST_REST));
        let pause = waited.unwrap_or(FIRST_REST);
        standing.look_again = makeshift.then(|| (Instant::now() + pause, pause));
    }

    /// A server failed after TLS; `surely`: it need not fail again. Says whether to leave the connection to it.
    pub(super) fn failed(&self, server: &ServerUrl, surely: bool, why: &str) -> bool {
        let leave = self.standing().failed(server, surely, Instant::now());
        match leave {
            Leave::No => false,
            Leave::Now => {
                tracing::warn!("the API server at {server} is left for another one, if there is one: {why}");
                true
            }
            Leave::Again => true,
        }
    }

    /// A server answered a request.
    pub(super) fn worked(&self, server: &ServerUrl) {
        self.standing().worked(server, Instant::now());
    }

    /// Whether it is time to connect anew, because a better server may be back.
    pub(super) fn may_do_better(&self) -> bool {
        self.standing().look_again.is_some_and(|(at, _)| Instant::now() >= at)
    }

    /// The server that was reached last.
    pub(super) fn last(&self) -> Option<ServerUrl> {
        self.standing().last.clone()
    }
}

impl tower::Service<hyper::Uri> for Connector {
    type Response = Stream;
    type Error = Unreachable;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, Unreachable>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Unreachable>> {
        Poll::Ready(Ok(()))
    }

    /// The URI says what is asked; where to ask, the files say.
    fn call(&mut self, _: hyper::Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect().await })
    }
}

async fn reach(candidate: &Candidate) -> Result<Stream, String> {
    let addresses = resolve(&candidate.server).await?;
    let mut reasons: Vec<String> = Vec::new();
    for address in addresses {
        match timeout(EACH, handshakes(address, candidate)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(reason)) => reasons.push(reason),
            Err(_) => reasons.push(format!("no answer within {} s", EACH.as_secs())),
        }
    }
    reasons.dedup();
    Err(reasons.join(", "))
}

/// Under each name that the certificate may have: some have only their own, some only the cluster's.
async fn handshakes(address: SocketAddr, candidate: &Candidate) -> Result<Stream, String> {
    let mut reason = String::new();
    for name in &candidate.names {
        match handshake(address, candidate, name).await {
            Ok(stream) => return Ok(stream),
            Err(error) if is_wrong_name(&error) => {
                if reason.is_empty() {
                    reason = one_line(&error.to_string());
                }
            }
            Err(error) => return Err(one_line(&error.to_string())),
        }
    }
    Err(reason)
}

async fn handshake(address: SocketAddr, to: &Candidate, name: &ServerName<'static>) -> io::Result<Stream> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(&tcp);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(KEEPALIVE).with_interval(Duration::from_secs(5)).with_retries(3),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    let tls = TlsConnector::from(Arc::clone(&to.tls)).connect(name.clone(), tcp).await?;
    Ok(Stream { tls: TokioIo::new(tls), server: to.server.clone() })
}

fn is_wrong_name(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(
        inner,
        Some(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
        ))
    )
}

/// By /etc/hosts and the servers of /etc/resolv.conf, as they are now.
async fn resolve(server: &ServerUrl) -> Result<Vec<SocketAddr>, String> {
    if let Ok(address) = server.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, server.port)]);
    }
    let resolver = TokioResolver::builder_tokio().and_then(|builder| builder.build());
    let resolver = resolver.map_err(|error| format!("/etc/resolv.conf: {}", one_line(&error.to_string())))?;
    let found = timeout(RESOLVE, resolver.lookup_ip(server.host.as_str())).await;
    let found = found.map_err(|_| format!("no name server answers within {} s", RESOLVE.as_secs()))?;
    let found = found.map_err(|error| one_line(&error.to_string()))?;
    let addresses: Vec<SocketAddr> =
        found.iter().take(MAX_ADDRESSES).map(|address| SocketAddr::new(address, server.port)).collect();
    match addresses.is_empty() {
        true => Err("the name has no address".to_owned()),
        false => Ok(addresses),
    }
}

/// A verified TLS connection.
#[derive(Debug)]
pub(super) struct Stream {
    tls: TokioIo<TlsStream<TcpStream>>,
    server: ServerUrl,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        let (_, session) = self.tls.inner().get_ref();
        let connected = Connected::new().extra(Reached(self.server.clone()));
        match session.alpn_protocol() {
            Some(b"h2") => connected.negotiated_h2(),
            Some(_) | None => connected,
        }
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(context, buffer)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(context, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_fails_comes_after_the_others_for_a_while_that_grows() {
        let server: ServerUrl = "https://192.0.2.1".parse().unwrap();
        let other: ServerUrl = "https://192.0.2.2".parse().unwrap();
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut standing = Standing::default();
        for _ in 1..FAILURES {
            assert_eq!(standing.failed(&server, false, at(0)), Leave::No);
        }
        standing.worked(&server, at(0));
        for expected in [Leave::No, Leave::No, Leave::Now, Leave::No, Leave::No, Leave::Again] {
            assert_eq!(standing.failed(&server, false, at(1)), expected, "three in a row");
        }
        assert!(standing.rest(&server, at(30)).is_some() && standing.rest(&other, at(30)).is_none());
        assert_eq!(standing.failed(&server, true, at(30)), Leave::Again);
        assert!(standing.rest(&server, at(31)).is_none(), "it has its turn again");
        // It answers once and fails again: longer, up to the longest.
        let mut now = 31;
        for expected in [60, 120, 240, 480, 600, 600] {
            standing.worked(&server, at(now));
            assert_eq!(standing.failed(&server, true, at(now)), Leave::Now);
            assert!(standing.rest(&server, at(now + expected - 1)).is_some());
            assert!(standing.rest(&server, at(now + expected)).is_none());
            now += expected;
        }
        standing.worked(&server, at(now + 3601));
        assert!(standing.bad.is_empty(), "an hour later it is as good as new");
    }

    #[test]
    fn what_is_known_of_servers_is_bounded() {
        let mut standing = Standing::default();
        #[expect(clippy::disallowed_methods, reason = "any time will do")]
        let now = Instant::from_std(std::time::Instant::now());
        for port in 1..1000_u16 {
            standing.failed(&ServerUrl { host: "a".to_owned(), port }, true, now);
        }
        assert!(standing.bad.len() <= MAX_KNOWN);
    }
}
