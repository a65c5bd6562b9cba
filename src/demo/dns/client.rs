//! Asks one server one question, without the system's resolver: so that nothing else is tried when it is
//! silent.

use std::io;
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::time::Duration;

use super::server::{read_message, write_message};
use super::{LookedUp, LookupArgs, Record, message};
use crate::demo::traffic::client::{in_micros, in_words};
use crate::io::clock;

/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// Asks until there is an answer or the time is over; what the last try said.
pub(in crate::demo) fn look_up(args: &LookupArgs) -> Result<LookedUp, String> {
    let deadline = clock::now() + Duration::from_millis(args.retry_ms);
    let mut id = (std::process::id() & 0xffff) as u16;
    loop {
        id = id.wrapping_add(1);
        let asked = clock::now();
        match ask(args, id) {
            Ok((exists, addresses)) => {
                let micros = in_micros(clock::now().duration_since(asked));
                return Ok(LookedUp { exists, addresses, micros });
            }
            Err(error) if clock::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

fn ask(args: &LookupArgs, id: u16) -> Result<(bool, Vec<IpAddr>), String> {
    let question = message::ask(id, &args.name, args.record == Record::Aaaa)?;
    let exchange = if args.tcp { by_tcp } else { by_udp };
    let answer = exchange(args, &question).map_err(|e| in_words(&e))?;
    message::read(&answer, id)
}

fn by_udp(args: &LookupArgs, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = if args.server.is_ipv6() { [0u16; 8].into() } else { [0u8; 4].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(args.server)?;
    socket.set_read_timeout(Some(Duration::from_millis(args.timeout_ms)))?;
    socket.send(question)?;
    let mut answer = vec![0u8; 4096];
    let length = socket.recv(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

fn by_tcp(args: &LookupArgs, question: &[u8]) -> io::Result<Vec<u8>> {
    let timeout = Duration::from_millis(args.timeout_ms);
    let mut stream = TcpStream::connect_timeout(&args.server, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    write_message(&mut stream, question)?;
    read_message(&mut stream)
}
