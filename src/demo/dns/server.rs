//! The server: a thread per socket, and one per connection.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::DnsArgs;
use super::message::{self, Over};
use super::zone::{Found, Zone};
use crate::demo::DemoError;
use crate::demo::internal::say;

/// No question is longer: a name has 255 bytes.
const LONGEST_QUESTION: usize = 4096;
/// Who says nothing for so long is not waited for (RFC 7766 section 6.2.3: "a few seconds").
const PATIENCE: Duration = Duration::from_secs(5);
/// More at once are not served.
const MOST_CONNECTIONS: usize = 64;

type Names = Arc<Mutex<Zone>>;

/// Answers until killed.
pub(in crate::demo) fn serve(args: &DnsArgs) -> Result<(), DemoError> {
    let names: Names = Arc::new(Mutex::new(Zone::new(&args.objects)));
    for &address in &args.listen {
        let wrong = |e| DemoError::system(format!("the DNS server listening on {address}"), e);
        let listener = TcpListener::bind(address).map_err(wrong)?;
        let socket = UdpSocket::bind(address).map_err(wrong)?;
        let (for_tcp, for_udp) = (Arc::clone(&names), Arc::clone(&names));
        thread::spawn(move || accept(&listener, &for_tcp));
        thread::spawn(move || answer_datagrams(&socket, &for_udp));
    }
    say("listening");
    loop {
        thread::park();
    }
}

fn look_up(names: &Names, labels: &[String]) -> Found {
    let mut names = names.lock().unwrap_or_else(PoisonError::into_inner);
    names.refresh();
    names.look_up(labels)
}

fn answer_datagrams(socket: &UdpSocket, names: &Names) {
    let mut question = [0u8; LONGEST_QUESTION];
    loop {
        // An ICMP error from an earlier answer may surface here; the next question is not to blame.
        let Ok((length, from)) = socket.recv_from(&mut question) else { continue };
        let bytes = question.get(..length).unwrap_or_default();
        if let Some(answer) = message::answer(bytes, Over::Udp, |labels| look_up(names, labels)) {
            let _ = socket.send_to(&answer, from);
        }
    }
}

fn accept(listener: &TcpListener, names: &Names) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        if open.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (names, open) = (Arc::clone(names), Arc::clone(&open));
        thread::spawn(move || {
            // A client that goes away in the middle costs its own connection only.
            let _ = answer_stream(stream, &names);
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// RFC 1035 section 4.2.2: each message follows its length; any number of them.
fn answer_stream(mut stream: TcpStream, names: &Names) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    loop {
        let question = read_message(&mut stream)?;
        let found = message::answer(&question, Over::Tcp, |labels| look_up(names, labels));
        let Some(answer) = found else { return Ok(()) };
        write_message(&mut stream, &answer)?;
    }
}

/// One message of a connection.
pub(super) fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0u8; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0u8; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// Its length and itself in one write, so that they share a packet.
pub(super) fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat())
}
