//! A tiny server and client: what stands in for the programs of a cluster's users.
//!
//! The server answers on TCP and UDP and says whom it saw; the client asks and prints what it heard as JSON.
//! On TCP the first line says what is wanted:
//!
//! | line | answer |
//! |---|---|
//! | `who` | the server's name and the address it saw |
//! | `pinged ID` | from which address the ICMP echo requests with that identifier came |
//! | `sink` | reads until the end, then says how much came in how long |
//! | `echo` | every byte back |
//! | `source BYTES` | as `who`, then that many bytes, at a steady pace |
//! | `GET ...` | as `who`, for curl and browsers |

pub(super) mod client;
pub(super) mod download;
pub(super) mod eavesdrop;
pub(super) mod ping;
pub(super) mod server;
pub(super) mod spread;

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};

use clap::{Args, ValueEnum};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Where every pod answers.
pub(super) const PORT: u16 = 8080;
/// Longest question: hostile or lost bytes cost no more than this.
const LONGEST_LINE: usize = 64;

/// How to serve.
#[derive(Args, Clone, Debug)]
pub(super) struct ServeArgs {
    /// Who answers.
    #[arg(long)]
    pub name: String,
    /// Where, TCP and UDP.
    #[arg(long, required = true)]
    pub listen: Vec<SocketAddr>,
    /// Remember who sends ICMP echo requests.
    #[arg(long)]
    pub pings: bool,
}

/// What to ask.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct AskArgs {
    /// Over which protocol.
    #[arg(value_enum)]
    pub protocol: Protocol,
    /// Whom: an address or a name, and a port.
    pub target: String,
    /// How long one try may take.
    #[arg(long, default_value_t = 1000)]
    pub timeout_ms: u64,
    /// For how long to try again.
    #[arg(long, default_value_t = 0)]
    pub retry_ms: u64,
}

/// What to measure.
#[derive(Args, Clone, Debug)]
pub(super) struct MeasureArgs {
    /// Towards whom.
    pub target: SocketAddr,
    /// For how long.
    #[arg(long, default_value_t = 3000)]
    pub for_ms: u64,
}

/// What to listen for.
#[derive(Args, Clone, Debug)]
pub(super) struct EavesdropArgs {
    /// Addresses of pods: nobody may see them.
    #[arg(long, value_delimiter = ',')]
    pub pods: Vec<IpNet>,
    /// What the tunnel's packets look like.
    #[arg(long, value_enum)]
    pub tunnel: Tunnel,
    /// The tunnel's UDP port, of its first lane.
    #[arg(long)]
    pub port: u16,
    /// How many lanes may follow.
    #[arg(long, default_value_t = 1)]
    pub ports: u16,
}

/// Formats of tunnel packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Tunnel {
    /// Encrypted.
    Wireguard,
    /// Plain.
    Vxlan,
}

/// Protocols of the demo's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Protocol {
    /// A connection.
    Tcp,
    /// A datagram.
    Udp,
    /// A ping.
    Icmp,
}

impl Protocol {
    /// As a person calls it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Icmp => "ping",
        }
    }

    /// As the command line calls it.
    pub(super) const fn flag(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Icmp => "icmp",
        }
    }
}

/// What a server said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    /// Its name.
    pub by: String,
    /// The address it saw the question come from.
    pub saw: IpAddr,
    /// From question to answer, in microseconds; of the try that succeeded.
    pub micros: u64,
    /// Where the question went.
    pub to: SocketAddr,
}

/// What went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sunk {
    /// Bytes the server read.
    pub bytes: u64,
    /// From its first byte to its last.
    pub micros: u64,
}

/// Round trips of one byte over one TCP connection, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RoundTrips {
    /// How many.
    pub count: usize,
    /// Half were faster.
    pub p50: u64,
    /// One in a hundred was slower.
    pub p99: u64,
}

/// The words in which a server answers `who`, and any datagram.
fn greeting(name: &str, saw: IpAddr) -> String {
    format!("{name} saw {saw}\n")
}

/// Reads those words.
fn read_greeting(text: &str) -> Option<(String, IpAddr)> {
    let (name, saw) = text.trim_end().split_once(" saw ")?;
    Some((name.to_string(), saw.parse().ok()?))
}

/// Byte by byte, so that nothing of what follows the line is swallowed.
fn read_line(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::with_capacity(LONGEST_LINE);
    let mut byte = [0u8; 1];
    while line.len() < LONGEST_LINE && stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// What a download consists of: each byte says where it belongs, within a period that fits no packet's
/// length.
struct Pattern(Vec<u8>);

impl Pattern {
    /// A prime.
    const PERIOD: usize = 251;

    /// For pieces of at most that length.
    fn new(longest: usize) -> Pattern {
        Pattern((0..longest + Self::PERIOD).map(|n| (n % Self::PERIOD) as u8).collect())
    }

    /// A piece, from a place on; empty if it is longer than was said.
    fn piece(&self, from: u64, length: usize) -> &[u8] {
        let start = (from % Self::PERIOD as u64) as usize;
        self.0.get(start..start + length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_is_understood() {
        let saw = "fd00:10:244:1::2".parse().expect("an address");
        assert_eq!(read_greeting(&greeting("pod-1a", saw)), Some(("pod-1a".into(), saw)));
    }

    #[test]
    fn a_pattern_goes_on_where_it_was_left() {
        let pattern = Pattern::new(1000);
        let whole = pattern.piece(0, 1000);
        for at in [0, 1, 250, 251, 252, 600] {
            assert_eq!(pattern.piece(at as u64, 1000 - at), &whole[at..], "{at}");
        }
        assert_eq!(pattern.piece(251, 10), pattern.piece(0, 10));
        assert_ne!(pattern.piece(1, 10), pattern.piece(0, 10));
        assert!(pattern.piece(0, 2000).is_empty());
    }

    #[test]
    fn nonsense_is_not_a_greeting() {
        assert_eq!(read_greeting("pod-1a saw nothing"), None);
        assert_eq!(read_greeting(""), None);
    }
}
