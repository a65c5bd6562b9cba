//! What the two sides say to each other: JSON messages with their length in front.
//!
//! | line | from whom to whom | what |
//! |---|---|---|
//! | control, first | asker to server | [`Opening::Control`], then `Proof` after the server's `Challenge` |
//! | control | asker to server | [`Ask`] |
//! | control | server to asker | [`Answer`] |
//! | every other connection | asker to server | [`Opening::Data`], then bytes that mean nothing |
//!
//! What comes is hostile until the token is proven, and bounded for ever: in length here, in time by whoever reads.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::ending::{Ending, LOOK_EVERY};
use super::meter::{Count, is_passing};
use super::secret::{Nonce, Proof, Ticket};
use crate::io::clock;
use crate::snapshot::{Encap, PublicKey};

/// Both sides must speak the same: raised with every change of what they say or how they measure.
pub(super) const VERSION: u32 = 2;
/// The longest message.
pub(super) const LONGEST: usize = 8192;
/// The longest message of somebody who has proven nothing.
pub(super) const LONGEST_OPENING: usize = 512;
/// Most TCP streams of one task.
pub(super) const MAX_STREAMS: u8 = 64;
/// Smallest and largest datagram.
const MIN_DATAGRAM: u16 = 64;
const MAX_DATAGRAM: u16 = 9000;
/// Longest measurement of one task.
pub(super) const MAX_SECONDS: u16 = 60;

/// What a connection begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Opening {
    /// Somebody who wants to measure.
    Control {
        /// [`VERSION`].
        version: u32,
        /// The asker's half of what is proven.
        nonce: Nonce,
    },
    /// Traffic of a task that was agreed on.
    Data {
        /// Which.
        ticket: Ticket,
    },
}

/// What the asker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ask {
    /// It knows the token.
    Proof(Proof),
    /// Build a tunnel.
    Tunnel(Offer),
    /// Get ready for a measurement.
    Prepare(Task),
    /// Enough; what did you count?
    Finish,
    /// Take the tunnel down.
    Close,
    /// That was all.
    Bye,
    /// Still here.
    Alive,
}

/// What the server says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// No, and that is the end.
    Refused(String),
    /// Prove that you know the token.
    Challenge(Nonce),
    /// Well, and so do I.
    Welcome(Welcome),
    /// The tunnel stands here.
    Tunnel(Offer),
    /// It could not be built; or the measurement failed.
    Failed(String),
    /// Begin: one ticket for each flow.
    Ready(Vec<Ticket>),
    /// What was counted.
    Counted(Count),
    /// The tunnel is gone.
    Closed,
    /// Still here.
    Alive,
}

/// What the server says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Welcome {
    /// That it knows the token.
    pub proof: Proof,
    /// Its version of Warren.
    pub program: String,
    /// The MTU of its way to the asker.
    pub mtu: u16,
    /// Its TCP's congestion control.
    pub congestion: String,
}

/// One end of a tunnel, as the other end has to know it. The private key stays where it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offer {
    /// How packets are wrapped.
    pub encap: Wrap,
    /// The public key.
    pub key: PublicKey,
    /// The UDP port.
    pub port: u16,
    /// The MAC address of VXLAN's end.
    pub mac: [u8; 6],
    /// The MTU inside: the asker decides, as it has heard of both ways.
    pub mtu: u16,
}

/// [`Encap`] in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Wrap {
    /// WireGuard.
    WireGuard,
    /// VXLAN.
    Vxlan,
}

impl From<Wrap> for Encap {
    fn from(wrap: Wrap) -> Encap {
        match wrap {
            Wrap::WireGuard => Encap::WireGuard,
            Wrap::Vxlan => Encap::Vxlan,
        }
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Task {
    /// What kind.
    pub work: Work,
    /// For how long it counts.
    pub seconds: u16,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Work {
    /// As many bytes as go through.
    Tcp {
        /// Connections.
        streams: u8,
        /// Which way they flow.
        flow: Flow,
    },
    /// As many datagrams as go through.
    Udp {
        /// Bytes of each.
        size: u16,
        /// Which way they flow.
        flow: Flow,
    },
    /// A few bytes there and back, over and over.
    Ping {
        /// By what.
        protocol: Protocol,
        /// What flows beside it, if anything.
        beside: Option<Flow>,
    },
}

/// Which way payload flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Flow {
    /// From the asker to the server.
    There,
    /// From the server to the asker.
    Back,
}

impl Flow {
    /// The other way.
    pub(super) fn turned(self) -> Flow {
        match self {
            Flow::There => Flow::Back,
            Flow::Back => Flow::There,
        }
    }
}

/// By what something goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Protocol {
    /// A connection.
    Tcp,
    /// Datagrams.
    Udp,
}

impl Task {
    /// How many flows it has, each of which needs a ticket; `None` if nobody may ask for such a task.
    pub(super) fn flows(&self) -> Option<usize> {
        if self.seconds == 0 || self.seconds > MAX_SECONDS {
            return None;
        }
        match self.work {
            Work::Tcp { streams, .. } => (1..=MAX_STREAMS).contains(&streams).then_some(usize::from(streams)),
            Work::Udp { size, .. } => (MIN_DATAGRAM..=MAX_DATAGRAM).contains(&size).then_some(1),
            Work::Ping { beside, .. } => Some(1 + usize::from(beside.is_some())),
        }
    }
}

/// Why there is no message.
#[derive(Debug, Error)]
pub(super) enum MessageError {
    /// The connection.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It ended.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("the other side says nothing")]
    Silent,
    /// It is not one of ours.
    #[error("the other side does not speak this version of warren bench")]
    Nonsense,
}

/// Writes a message in one piece.
pub(super) fn write(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    to.write_all(&bytes)
}

/// Reads a message of at most `longest` bytes, all of which must have come in time, and before it is over.
pub(super) fn read<T: DeserializeOwned>(
    from: &mut TcpStream,
    longest: usize,
    within: Duration,
    end: &Ending,
) -> Result<T, MessageError> {
    let mut patient = Patient { stream: from, until: clock::now() + within, end };
    read_from(&mut patient, longest)
}

fn read_from<T: DeserializeOwned>(from: &mut impl Read, longest: usize) -> Result<T, MessageError> {
    let mut length = [0; 4];
    read_all(from, &mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > longest {
        return Err(MessageError::Nonsense);
    }
    let mut bytes = vec![0; length];
    read_all(from, &mut bytes)?;
    serde_json::from_slice(&bytes).map_err(|_| MessageError::Nonsense)
}

fn read_all(from: &mut impl Read, bytes: &mut [u8]) -> Result<(), MessageError> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => MessageError::Closed,
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => MessageError::Silent,
        _ => MessageError::Io(error),
    })
}

/// A connection that is read until an instant: somebody who sends byte after byte gets no more time for it.
struct Patient<'a> {
    stream: &'a mut TcpStream,
    until: Instant,
    end: &'a Ending,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.until.saturating_duration_since(clock::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left.min(LOOK_EVERY)))?;
            match self.stream.read(buffer) {
                Err(error) if is_passing(&error) => {}
                result => return result,
            }
            // Not before: what has come is read.
            if let Some(reason) = self.end.reason() {
                return Err(io::Error::other(reason));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    fn framed(bytes: &[u8]) -> Vec<u8> {
        [&u32::try_from(bytes.len()).expect("short").to_be_bytes(), bytes].concat()
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let task = Task { work: Work::Tcp { streams: 4, flow: Flow::Back }, seconds: 5 };
        let offer = Offer { encap: Wrap::Vxlan, key: [7; 32], port: 9, mac: [2, 0, 0, 0, 0, 1], mtu: 1420 };
        for message in [Ask::Prepare(task), Ask::Tunnel(offer), Ask::Proof(Proof([9; 32])), Ask::Bye] {
            let mut bytes = Vec::new();
            write(&mut bytes, &message).expect("memory takes it");
            assert!(bytes.len() < LONGEST);
            let read: Ask = read_from(&mut Cursor::new(bytes), LONGEST).expect("ours");
            assert_eq!(read, message);
        }
        // The longest that there is.
        let mut bytes = Vec::new();
        let tickets = vec![Ticket([255; 16]); usize::from(MAX_STREAMS) + 1];
        write(&mut bytes, &Answer::Ready(tickets)).expect("memory takes it");
        assert!(bytes.len() <= LONGEST, "{}", bytes.len());
        bytes.clear();
        write(&mut bytes, &Opening::Control { version: u32::MAX, nonce: Nonce([255; 16]) }).expect("memory");
        assert!(bytes.len() < LONGEST_OPENING);
    }

    #[test]
    fn what_is_too_long_or_nonsense_is_refused() {
        let long = framed(&vec![b' '; LONGEST + 1]);
        assert!(matches!(read_from::<Ask>(&mut Cursor::new(long), LONGEST), Err(MessageError::Nonsense)));
        for text in
            ["", "{}", "\"Hello\"", "{\"Prepare\":{\"work\":\"Tcp\",\"seconds\":1}}", "GET / HTTP/1.1"]
        {
            let read = read_from::<Ask>(&mut Cursor::new(framed(text.as_bytes())), LONGEST);
            assert!(matches!(read, Err(MessageError::Nonsense)), "{text}: {read:?}");
        }
        // An HTTP request's first four bytes are a length that nobody has.
        let read = read_from::<Opening>(&mut Cursor::new(b"GET / HTTP/1.1\r\n\r\n"), LONGEST_OPENING);
        assert!(matches!(read, Err(MessageError::Nonsense)));
        let read = read_from::<Ask>(&mut Cursor::new([0, 0, 0, 9, b'"']), LONGEST);
        assert!(matches!(read, Err(MessageError::Closed)));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = read_from::<Opening>(&mut Cursor::new(&bytes), LONGEST_OPENING);
            let _ = read_from::<Ask>(&mut Cursor::new(framed(&bytes)), LONGEST);
            let _ = read_from::<Answer>(&mut Cursor::new(framed(&bytes)), LONGEST);
        }
    }

    #[test]
    fn who_sends_byte_after_byte_gets_no_more_time() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let mut slow = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (mut stream, _) = listener.accept().expect("accepted");
        let writer = std::thread::spawn(move || {
            for byte in [0, 0, 1, 0].into_iter().chain([b' '; 100]) {
                if slow.write_all(&[byte]).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let begun = clock::now();
        let read =
            read::<Opening>(&mut stream, LONGEST_OPENING, Duration::from_millis(200), &Ending::default());
        assert!(matches!(read, Err(MessageError::Silent)), "{read:?}");
        assert!(clock::now() - begun < Duration::from_millis(800));
        drop(stream);
        writer.join().expect("the writer ends");
    }

    #[test]
    fn only_tasks_within_bounds_have_flows() {
        let tcp = |streams, seconds| Task { work: Work::Tcp { streams, flow: Flow::There }, seconds }.flows();
        assert_eq!((tcp(1, 1), tcp(64, 60)), (Some(1), Some(64)));
        assert_eq!([tcp(0, 1), tcp(65, 1), tcp(1, 0), tcp(1, 61)], [None; 4]);
        let ping = |beside| Task { work: Work::Ping { protocol: Protocol::Udp, beside }, seconds: 1 }.flows();
        assert_eq!((ping(None), ping(Some(Flow::There))), (Some(1), Some(2)));
    }
}
