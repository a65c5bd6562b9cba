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
    let single = |address: &String| format!("{address}/{}", if address.contains(':') { 128 } else { 32 });
    // The network address of a range of one address is that address.
    let addresses = peer.addresses.iter().map(single).filter(|address| !peer.pod_ranges.contains(address));
    for allowed in peer.pod_ranges.iter().cloned().chain(addresses) {
        line(out, "allowed_ip", allowed);
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::status::fake;

    #[test]
    fn a_range_of_one_address_is_named_once() {
        let ranges = vec!["10.244.9.1/32".to_owned(), "fd00::1/128".to_owned()];
        let addresses = ["10.244.9.1", "fd00::1", "192.0.2.9"].map(str::to_owned).to_vec();
        let peer = pb::PeerView { pod_ranges: ranges, addresses, ..pb::PeerView::default() };
        let mut out = String::new();
        peer_lines(&mut out, &peer, "00", 0);
        let allowed: Vec<_> = out.lines().filter_map(|line| line.strip_prefix("allowed_ip=")).collect();
        assert_eq!(allowed, ["10.244.9.1/32", "fd00::1/128", "192.0.2.9/32"]);
    }

    #[test]
    fn the_answer_in_full() {
        let at = fake::WALL_MS - 31_000;
        let expected = format!(
            "\
listen_port=51820
public_key=0202020202020202020202020202020202020202020202020202020202020202
protocol_version=1
endpoint=192.0.2.2:51820
last_handshake_time_sec={}
last_handshake_time_nsec=250000000
tx_bytes=2097152
rx_bytes=1024
persistent_keepalive_interval=25
allowed_ip=10.244.2.0/24
allowed_ip=fd00:2::/64
allowed_ip=192.0.2.2/32
allowed_ip=10.244.2.0/32
public_key=0505050505050505050505050505050505050505050505050505050505050505
protocol_version=1
endpoint=[2001:db8::4]:7
tx_bytes=300
rx_bytes=0
persistent_keepalive_interval=25
allowed_ip=10.244.5.0/24
allowed_ip=fd00:5::/64
allowed_ip=192.0.2.5/32
allowed_ip=10.244.5.0/32
errno=0

",
            at / 1000
        );
        assert_eq!(answer(&fake::view()), expected);
    }

    #[test]
    fn a_node_without_key_or_endpoint_is_left_out_or_bare() {
        let mut view = fake::view();
        view.lanes.clear();
        view.peers[0].public_key.clear();
        view.peers[2].endpoint.clear();
        let text = answer(&view);
        assert!(!text.contains("private_key") && !text.contains("listen_port"), "{text}");
        assert!(text.starts_with("public_key=05") && !text.contains("endpoint="), "{text}");
        assert_eq!(answer(&pb::NodeView::default()), "errno=0\n\n");
    }

    /// A served socket; everything ends with the guard.
    async fn serving() -> (tempfile::TempDir, PathBuf, tokio::task::JoinHandle<io::Result<()>>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = bind(&dir.path().join("wireguard"), "warren0").unwrap();
        let path = socket.path().to_owned();
        let task = tokio::spawn(serve(socket, fake::living_handle(), std::future::pending()));
        (dir, path, task)
    }

    async fn ask(path: &Path, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(request).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn requests_are_answered_each_on_its_own() {
        let (_dir, path, task) = serving().await;
        let get = ask(&path, b"get=1\n\n").await;
        assert!(get.starts_with("listen_port=51820\n") && get.ends_with("errno=0\n\n"), "{get}");
        assert_eq!(ask(&path, b"set=1\nprivate_key=00\n\n").await, "errno=-95\n\n");
        assert_eq!(ask(&path, b"hello\n\nget=1\n\n").await, "errno=-22\n\n");
        let both = ask(&path, b"set=1\n\nget=1\n\n").await;
        assert!(both.starts_with("errno=-95\n\nlisten_port") && both.ends_with("errno=0\n\n"), "{both}");
        assert_eq!(ask(&path, b"get=1\n").await, "", "a request without its end is none");
        assert_eq!(ask(&path, &[0xff; 5000]).await, "");
        task.abort();
    }

    #[tokio::test]
    async fn a_large_change_is_read_to_its_end_and_a_huge_one_is_not() {
        let (_dir, path, task) = serving().await;
        let mut request = b"set=1\n".to_vec();
        request.extend(b"public_key=00\n".repeat(100_000));
        request.push(b'\n');
        assert_eq!(ask(&path, &request).await, "errno=-95\n\n");

        let mut stream = UnixStream::connect(&path).await.unwrap();
        let huge = b"public_key=00\n".repeat(1_000_000);
        // The other end answers and hangs up before it is through.
        assert!(stream.write_all(&huge).await.is_err());
        task.abort();
    }

    #[tokio::test]
    async fn silent_clients_do_not_keep_others_out() {
        let (_dir, path, task) = serving().await;
        let mut silent = Vec::new();
        for _ in 0..MAX_CLIENTS * 2 {
            silent.push(UnixStream::connect(&path).await.unwrap());
        }
        // Two rounds of silent clients are ahead in the queue.
        let answer = timeout(PATIENCE * 3, ask(&path, b"get=1\n\n")).await.unwrap();
        assert!(answer.ends_with("errno=0\n\n"), "{answer}");
        task.abort();
    }

    #[tokio::test]
    async fn the_socket_goes_with_the_server_and_a_stale_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_path(dir.path(), "warren0");
        drop(UnixListener::bind(&path).unwrap());
        let socket = bind(dir.path(), "warren0").unwrap();
        assert!(matches!(bind(dir.path(), "warren0"), Err(SocketError::Taken { .. })));
        serve(socket, fake::living_handle(), std::future::ready(())).await.unwrap();
        assert!(!path.exists());
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
