//! Long downloads through a Service, one from each endpoint, and what becomes of each.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};
use socket2::{SockRef, TcpKeepalive};

use super::client::{ask_once, in_micros, in_words};
use super::{Pattern, Protocol, read_greeting};
use crate::demo::internal::say;
use crate::io::clock;

/// A connection that is silent for so long asks whether the other end is still there, and so often again: as
/// programs do that only read, though most are more patient (Go 15 s, curl 60 s).
const KEEPALIVE: Duration = Duration::from_secs(1);
/// A download that gives nothing for so long has failed.
const PATIENCE: Duration = Duration::from_secs(8);
/// Read at once.
const CHUNK: usize = 64 * 1024;
/// How long one connection may take.
const TIMEOUT: Duration = Duration::from_millis(1000);
/// With three endpoints this fails once in 10^34 times.
const MOST_TRIES: u32 = 200;
/// For whose connection was reset: within this it must have found another endpoint.
const AGAIN_WITHIN: Duration = Duration::from_secs(3);

/// What to download.
#[derive(Args, Clone, Debug)]
pub(in crate::demo) struct DownloadArgs {
    /// From where.
    pub target: SocketAddr,
    /// One from each of these.
    #[arg(long, value_delimiter = ',', required = true)]
    pub from: Vec<String>,
    /// How much.
    #[arg(long)]
    pub bytes: u64,
}

/// What became of one download.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::demo) struct Download {
    /// Who gave it.
    pub from: String,
    /// Which client address it saw.
    pub saw: Option<IpAddr>,
    /// How much came.
    pub bytes: u64,
    /// Whether each byte was the right one.
    pub right: bool,
    /// Why it ended early.
    pub error: Option<String>,
    /// The longest silence; where it ended early, not counting the one before its end.
    pub longest_pause: u64,
    /// How long after the last byte the end came.
    pub ended_after: u64,
    /// If it ended early: who answered a new connection, and how long that took, from the end on.
    pub again: Option<(String, u64)>,
}

/// Opens them all, says so, and reads them to their ends. Times are in microseconds.
pub(in crate::demo) fn download(args: &DownloadArgs) -> Result<Vec<Download>, String> {
    let opened = open_all(args);
    // Said even if not: then the answer says why.
    say("downloading");
    let streams = opened?;
    let (bytes, target) = (args.bytes, args.target);
    let readers: Vec<_> = streams
        .into_iter()
        .map(|(from, (saw, stream))| thread::spawn(move || read_to_end(stream, from, saw, bytes, target)))
        .collect();
    readers.into_iter().map(|reader| reader.join().map_err(|_| "a reader failed".to_string())).collect()
}

type Streams = BTreeMap<String, (IpAddr, TcpStream)>;

/// Which endpoint a connection gets is not the client's choice: those too many are closed.
fn open_all(args: &DownloadArgs) -> Result<Streams, String> {
    let mut streams = Streams::new();
    for _ in 0..MOST_TRIES {
        if args.from.iter().all(|name| streams.contains_key(name)) {
            return Ok(streams);
        }
        let (from, saw, stream) = open(args).map_err(|e| in_words(&e))?;
        if args.from.contains(&from) {
            streams.entry(from).or_insert((saw, stream));
        }
    }
    Err(format!("of {}, only {} answered", args.from.join(", "), streams.len()))
}

fn open(args: &DownloadArgs) -> io::Result<(String, IpAddr, TcpStream)> {
    let mut stream = TcpStream::connect_timeout(&args.target, TIMEOUT)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    SockRef::from(&stream)
        .set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))?;
    stream.write_all(format!("source {}\n", args.bytes).as_bytes())?;
    let line = super::read_line(&mut stream)?;
    let (from, saw) = read_greeting(&line).ok_or(io::ErrorKind::InvalidData)?;
    Ok((from, saw, stream))
}

fn read_to_end(mut stream: TcpStream, from: String, saw: IpAddr, bytes: u64, target: SocketAddr) -> Download {
    let mut done = Download { from, saw: Some(saw), right: true, ..Download::default() };
    let mut chunk = vec![0u8; CHUNK];
    let pattern = Pattern::new(CHUNK);
    let mut last = clock::now();
    let end = loop {
        match stream.read(&mut chunk) {
            Ok(0) if done.bytes == bytes => break None,
            Ok(0) => break Some("ended early".to_string()),
            Ok(length) => {
                let now = clock::now();
                done.longest_pause = done.longest_pause.max(in_micros(now.duration_since(last)));
                last = now;
                done.right &= chunk.get(..length) == Some(pattern.piece(done.bytes, length));
                done.bytes += length as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => break Some(in_words(&e)),
        }
    };
    let ended = clock::now();
    done.ended_after = in_micros(ended.duration_since(last));
    if end.is_some() {
        done.again = connect_again(target, ended);
    }
    done.error = end;
    done
}

fn connect_again(target: SocketAddr, ended: Instant) -> Option<(String, u64)> {
    while clock::now().duration_since(ended) < AGAIN_WITHIN {
        if let Ok((by, _, _)) = ask_once(Protocol::Tcp, target, TIMEOUT) {
            return Some((by, in_micros(clock::now().duration_since(ended))));
        }
    }
    None
}
