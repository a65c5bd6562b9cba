//! A connection to the first API server that answers: TCP, then TLS, each address for a short time.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
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

/// Connects to whichever API server answers; clones share what they remember.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    access: Arc<Access>,
    /// The server that answered last: first among those of its rank.
    last: Arc<Mutex<Option<ServerUrl>>>,
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
        Connector { access, last: Arc::default() }
    }

    /// Tries all in turn.
    pub(super) async fn connect(&self) -> Result<Stream, Unreachable> {
        let mut candidates = self.access.candidates().await;
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        candidates.list.sort_by_key(|one| (one.rank, Some(&one.server) != last.as_ref()));
        let (begin, mut tried) = (Instant::now(), Vec::new());
        for candidate in &candidates.list {
            if begin.elapsed() > ALL {
                candidates.left_out.push(format!("no time left for {}", candidate.server));
                continue;
            }
            match reach(candidate).await {
                Ok(stream) => {
                    let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
                    if last.as_ref() != Some(&candidate.server) {
                        tracing::info!("the API server at {} answers ({})", candidate.server, candidate.from);
                        *last = Some(candidate.server.clone());
                    }
                    return Ok(stream);
                }
                Err(reason) => tried.push(format!("{} ({}): {reason}", candidate.server, candidate.from)),
            }
        }
        Err(Unreachable { tried, left_out: candidates.left_out })
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
    Ok(Stream(TokioIo::new(tls)))
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
pub(super) struct Stream(TokioIo<TlsStream<TcpStream>>);

impl Connection for Stream {
    fn connected(&self) -> Connected {
        let (_, session) = self.0.inner().get_ref();
        match session.alpn_protocol() {
            Some(b"h2") => Connected::new().negotiated_h2(),
            Some(_) | None => Connected::new(),
        }
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, bytes)
    }
}
