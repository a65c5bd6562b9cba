//! WireGuard's cross-platform interface (<https://www.wireguard.com/xplatform/>), its read side, so that
//! the ordinary `wg` program shows a Warren node: `wg show`, `wg show warren0 dump`, `wg showconf warren0`.
//!
//! One entry per node that WireGuard goes to: lane 0's key and endpoint, bytes summed over the lanes. The
//! private key is withheld, as `wg` allows. A change is refused: peers come from the cluster.

use std::fmt::Write as _;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::handle::Handle;
use super::pb;
use super::socket::{Lock, OwnedSocket, SocketError};
use crate::snapshot::Encap;

/// Where `wg` looks for `<interface>.sock`.
pub const DEFAULT_DIR: &str = "/var/run/wireguard";
/// Clients served at once; more wait in the backlog, each for no longer than the timeouts below.
const MAX_CLIENTS: usize = 16;
/// A client says what it wants, or reads its answer, within this time.
const PATIENCE: Duration = Duration::from_secs(3);
/// Requests on one connection; `wg` makes one.
const MAX_REQUESTS: usize = 64;
/// A whole request: `wg setconf` with thousands of peers is read to its end before it is refused, because
/// a client that is still writing would not see the answer.
const MAX_REQUEST: usize = 4 << 20;
/// The start of a request that is looked at: its operation is the first line.
const MAX_OPERATION: usize = 64;

/// The socket of this interface.
pub fn socket_path(dir: &Path, interface: &str) -> PathBuf {
    dir.join(format!("{interface}.sock"))
}

/// Takes the socket; `dir` is made if it is missing (0700, as other implementations make it).
pub fn bind(dir: &Path, interface: &str) -> Result<OwnedSocket, SocketError> {
    OwnedSocket::bind(&socket_path(dir, interface), 0o700, Lock::None)
}

/// Answers until `shutdown` is ready; the socket is removed then.
pub async fn serve(
    socket: OwnedSocket,
    handle: Handle,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let listener = socket.listener()?;
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let warned = Arc::new(AtomicBool::new(false));
    let accepting = async {
        loop {
            let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(e) => {
                    // Out of descriptors, most likely: that passes, or shows elsewhere.
                    debug!("accepting a UAPI client: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (handle, warned) = (handle.clone(), Arc::clone(&warned));
            tokio::spawn(async move {
                if let Err(e) = serve_client(stream, &handle, &warned).await {
                    debug!("UAPI client: {e}");
                }
                drop(permit);
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        () = shutdown => {}
    }
    Ok(())
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Get,
    Set,
    Unknown,
    TooLong,
}

async fn serve_client(mut stream: UnixStream, handle: &Handle, warned: &AtomicBool) -> io::Result<()> {
    let mut rest = Vec::new();
    for _ in 0..MAX_REQUESTS {
        let Some(operation) = timeout(PATIENCE, read_request(&mut stream, &mut rest)).await?? else {
            return Ok(());
        };
        let (answer, goes_on) = match operation {
            Operation::Get => match handle.collect_async().await {
                Ok(view) => (answer(&view), true),
                Err(_) => (refusal(libc::EIO), false),
            },
            Operation::Set => {
                if !warned.swap(true, Ordering::Relaxed) {
                    let tun = &handle.info().tun;
                    warn!("a WireGuard tool tried to change {tun}: refused, its peers come from the cluster");
                }
                (refusal(libc::EOPNOTSUPP), true)
            }
            Operation::Unknown => (refusal(libc::EINVAL), false),
            Operation::TooLong => (refusal(libc::E2BIG), false),
        };
        timeout(PATIENCE, stream.write_all(answer.as_bytes())).await??;
        if !goes_on {
            return Ok(());
        }
    }
    Ok(())
}

/// Reads up to the blank line that ends a request, keeping its first line only; `None` at the end of the
/// stream. What was read beyond the request stays in `rest`.
async fn read_request(stream: &mut UnixStream, rest: &mut Vec<u8>) -> io::Result<Option<Operation>> {
    let mut head = Vec::with_capacity(MAX_OPERATION);
    let (mut total, mut last) = (0, None);
    let mut buffer = [0; 4096];
    loop {
        let mut chunk = std::mem::take(rest);
        if chunk.is_empty() {
            let len = stream.read(&mut buffer).await?;
            if len == 0 {
                return Ok(None);
            }
            chunk.extend_from_slice(&buffer[..len]);
        }
        for (at, byte) in chunk.iter().enumerate() {
            if *byte == b'\n' && last == Some(b'\n') {
                rest.extend_from_slice(&chunk[at + 1..]);
                return Ok(Some(operation(&head)));
            }
            last = Some(*byte);
            if head.len() < MAX_OPERATION {
                head.push(*byte);
            }
        }
        total += chunk.len();
        if total > MAX_REQUEST {
            return Ok(Some(Operation::TooLong));
        }
    }
}

fn operation(head: &[u8]) -> Operation {
    match head.split(|b| *b == b'\n').next() {
        Some(b"get=1") => Operation::Get,
        Some(b"set=1") => Operation::Set,
        Some(_) | None => Operation::Unknown,
    }
}

/// Error numbers are negative, as wireguard-go's are; `wg` shows their text.
fn refusal(errno: i32) -> String {
    format!("errno={}\n\n", -errno)
}

/// The answer to `get=1`.
pub fn answer(view: &pb::NodeView) -> String {
    let mut out = String::with_capacity(128 + view.peers.len() * 512);
    if let Some(lane) = view.lanes.first() {
        line(&mut out, "listen_port", lane.port);
    }
    for peer in view.peers.iter().filter(|peer| peer.encap == Encap::WireGuard.name()) {
        // A node without a key yet is no WireGuard peer yet.
        if let Some(key) = hex(&peer.public_key) {
            peer_lines(&mut out, peer, &key, view.collected_unix_ms);
        }
    }
    out.push_str("errno=0\n\n");
    out
}

fn peer_lines(out: &mut String, peer: &pb::PeerView, key: &str, collected_unix_ms: u64) {
    line(out, "public_key", key);
    line(out, "protocol_version", 1);
    if !peer.endpoint.is_empty() {
        line(out, "endpoint", &peer.endpoint);
    }
    if let Some(age) = peer.handshake_age_ms {
        let at = collected_unix_ms.saturating_sub(age);
        line(out, "last_handshake_time_sec", at / 1000);
        line(out, "last_handshake_time_nsec", at % 1000 * 1_000_000);
    }
    line(out, "tx_bytes", peer.tx_bytes);
    line(out, "rx_bytes", peer.rx_bytes);
    line(out, "persistent_keepalive_interval", peer.keepalive);
    for range in &peer.pod_ranges {
        line(out, "allowed_ip", range);
    }
    for address in &peer.addresses {
        line(out, "allowed_ip", format_args!("{address}/{}", if address.contains(':') { 128 } else { 32 }));
    }
}

fn line(out: &mut String, key: &str, value: impl std::fmt::Display) {
    // Writing to a String does not fail.
    let _ = writeln!(out, "{key}={value}");
}

/// A key's base64 form as the hexadecimal that this interface uses.
fn hex(base64: &str) -> Option<String> {
    let key = STANDARD.decode(base64).ok().filter(|key| key.len() == 32)?;
    Some(key.iter().fold(String::with_capacity(64), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    }))
}
