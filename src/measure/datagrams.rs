//! UDP: pumps that push, take and return datagrams, and round trips.
//!
//! A flow begins with a knock: the asker repeats it until the server answers, and the server answers nobody else's
//! address and ticket. Who takes says then that it is here, and later that datagrams come; who pushes sends nothing
//! before the first, and relies on datagrams as a sign of life (`line`) only after the second. So a way that is
//! closed in either direction costs a figure, and not the control connection.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};

use super::ending::LOOK_EVERY;
use super::meter::{self, Count, FIRST, Meter, PATIENCE, PING, Pump, Watcher, is_passing};
use super::secret::Ticket;
use super::stats::Trips;
use crate::io::clock;

/// Ticket and number, which every datagram begins with.
const MARK: usize = Ticket::LEN + 8;
/// Numbers of datagrams that are none of the flow: somebody wants to come in,
const KNOCK: u64 = u64::MAX;
/// who takes is here,
const HERE: u64 = u64::MAX - 1;
/// and datagrams have come.
const COMING: u64 = u64::MAX - 2;
/// How often the last two are said.
const HERE_EVERY: Duration = Duration::from_millis(200);
/// Datagrams that are sent between two looks at what comes back.
const BURST: u32 = 256;
/// Those that come between two looks at the clock: a slow way has few in the time of a sign of life.
const TAKEN: u32 = 16;

/// Knocks until the other side is there: nobody is flooded who has not said so.
pub(super) fn knock(socket: &UdpSocket, ticket: Ticket, meter: &Meter) -> Result<(), String> {
    socket.set_read_timeout(Some(LOOK_EVERY)).map_err(|e| e.to_string())?;
    let until = clock::now() + FIRST / 2;
    let mut bytes = [0; MARK];
    while clock::now() < until {
        meter.check()?;
        // Refused by ICMP, perhaps: the other side may be there the next time.
        let _ = socket.send(&mark(ticket, KNOCK));
        if let Ok(came) = socket.recv(&mut bytes)
            && number_of(bytes.get(..came), ticket).is_some()
        {
            return Ok(());
        }
    }
    Err("no datagram comes back".to_owned())
}

/// Waits for the one who knocks, who must have this address and ticket; nobody else is heard or answered.
pub(super) fn await_knock(
    socket: &UdpSocket,
    ticket: Ticket,
    from: IpAddr,
    meter: &Meter,
) -> Result<(), String> {
    let text = |e: io::Error| e.to_string();
    socket.set_read_timeout(Some(LOOK_EVERY)).map_err(text)?;
    let mut bytes = [0; MARK];
    while meter.goes_on() {
        let Ok((came, sender)) = socket.recv_from(&mut bytes) else { continue };
        if sender.ip().to_canonical() == from && number_of(bytes.get(..came), ticket).is_some() {
            socket.connect(sender).map_err(text)?;
            let _ = socket.send(&mark(ticket, HERE));
            return Ok(());
        }
    }
    meter.check()
}

/// Does its part with a socket that the other side has knocked at, until the meter says stop; `size` is for pushing.
pub(super) fn run(pump: Pump, socket: &UdpSocket, ticket: Ticket, size: usize, meter: &Meter) {
    match pump {
        Pump::Take => take(socket, ticket, meter),
        Pump::Push => push(socket, ticket, size, meter),
        Pump::Echo => echo(socket, ticket, meter),
    }
}

/// Sends datagrams of this size as fast as it goes, once the other side is here.
fn push(socket: &UdpSocket, ticket: Ticket, size: usize, meter: &Meter) {
    let _ = socket.set_write_timeout(Some(LOOK_EVERY));
    let mut bytes = vec![0x57; size.max(MARK)];
    let (mut number, mut refused) = (0_u64, 0);
    if !await_taker(socket, ticket, meter) {
        return;
    }
    while meter.goes_on() {
        for _ in 0..BURST {
            bytes[..MARK].copy_from_slice(&mark(ticket, number));
            match socket.send(&bytes) {
                Ok(sent) => {
                    meter.add(sent);
                    meter.add_packet();
                    number += 1;
                }
                Err(error) if is_passing(&error) => break,
                // The device's queue is full, or ICMP came back: the receiver will say what arrived.
                Err(_) if refused < 10_000 => {
                    refused += 1;
                    std::thread::sleep(Duration::from_millis(1));
                    break;
                }
                Err(error) => {
                    meter.fail(format!("datagrams cannot be sent: {error}"));
                    break;
                }
            }
        }
        let mut answer = [0; MARK];
        while let Ok(came) = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) {
            match number_of(answer.get(..came), ticket) {
                Some(HERE) => meter.life().beat(),
                Some(COMING) => {
                    meter.life().beat();
                    meter.life().hush(true);
                }
                Some(_) | None => {}
            }
        }
    }
    meter.life().hush(false);
}

/// Whether who takes is here; who still knocks has not heard the answer, and gets another.
fn await_taker(socket: &UdpSocket, ticket: Ticket, meter: &Meter) -> bool {
    let mut bytes = [0; MARK];
    while meter.goes_on() {
        let Ok(came) = socket.recv(&mut bytes) else { continue };
        match number_of(bytes.get(..came), ticket) {
            Some(KNOCK) => {
                let _ = socket.send(&mark(ticket, HERE));
            }
            Some(HERE | COMING) => return true,
            Some(_) | None => {}
        }
    }
    false
}

/// Takes datagrams, and says now and then whether they come.
fn take(socket: &UdpSocket, ticket: Ticket, meter: &Meter) {
    let mut bytes = vec![0; 1 << 16];
    let mut said = clock::now();
    let (mut since, mut highest) = (0_u32, 0);
    let _ = socket.send(&mark(ticket, HERE));
    while meter.goes_on() {
        let waited = match socket.recv(&mut bytes) {
            Ok(came) => {
                match number_of(bytes.get(..came), ticket) {
                    Some(KNOCK) => {
                        let _ = socket.send(&mark(ticket, HERE));
                    }
                    // The other side's: it takes nothing.
                    Some(HERE | COMING) => {}
                    Some(number) => {
                        if highest == 0 {
                            meter.life().hush(true);
                        }
                        highest = highest.max(number.saturating_add(1));
                        meter.add(came);
                        meter.add_packet();
                        meter.note_sent(highest);
                        meter.life().beat();
                    }
                    None => {}
                }
                false
            }
            Err(_) => true,
        };
        since += 1;
        if waited || since >= TAKEN {
            since = 0;
            let now = clock::now();
            if now - said >= HERE_EVERY {
                said = now;
                let _ = socket.send(&mark(ticket, if highest == 0 { HERE } else { COMING }));
            }
        }
    }
    meter.life().hush(false);
}

/// Sends every datagram back.
fn echo(socket: &UdpSocket, ticket: Ticket, meter: &Meter) {
    let mut bytes = [0; PING];
    while meter.goes_on() {
        let Ok(came) = socket.recv(&mut bytes) else { continue };
        let Some(datagram) = bytes.get(..came) else { continue };
        if number_of(Some(datagram), ticket).is_some() && socket.send(datagram).is_ok() {
            meter.add(came);
            meter.add_packet();
        }
    }
}

/// A datagram there and back, over and over.
pub(super) fn ping(
    socket: &UdpSocket,
    ticket: Ticket,
    meter: &Meter,
    long: Duration,
    watcher: Watcher<'_>,
) -> Result<(Trips, Count), String> {
    socket.set_read_timeout(Some(LOOK_EVERY)).map_err(|e| e.to_string())?;
    let (mut request, mut answer) = ([0x57; PING], [0; PING]);
    meter::ping(meter, long, watcher, |meter, number| {
        request[..MARK].copy_from_slice(&mark(ticket, number));
        socket.send(&request).map_err(|e| format!("a datagram cannot be sent: {e}"))?;
        let until = clock::now() + PATIENCE;
        loop {
            match socket.recv(&mut answer) {
                Ok(came) if number_of(answer.get(..came), ticket) == Some(number) => return Ok(true),
                // An answer to an earlier one is late: that one was lost.
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(format!("datagrams do not come back: {error}")),
            }
            // Also while late ones come without end.
            meter.check()?;
            if clock::now() >= until {
                return Ok(false);
            }
        }
    })
}

/// What a datagram begins with.
fn mark(ticket: Ticket, number: u64) -> [u8; MARK] {
    let mut bytes = [0; MARK];
    bytes[..Ticket::LEN].copy_from_slice(&ticket.0);
    bytes[Ticket::LEN..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// The number of a datagram, if it is one of ours.
fn number_of(datagram: Option<&[u8]>, ticket: Ticket) -> Option<u64> {
    let (head, _) = datagram?.split_first_chunk::<MARK>()?;
    let (its, number) = head.split_first_chunk::<{ Ticket::LEN }>()?;
    (*its == ticket.0).then(|| number.try_into().map(u64::from_be_bytes).ok())?
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::ending::Ending;
    use super::*;

    const TICKET: Ticket = Ticket([7; Ticket::LEN]);
    const LONG: Duration = Duration::from_millis(300);

    fn meter() -> Meter {
        Meter::new(&Ending::default(), &Arc::default())
    }

    /// The asker's socket and the server's, which has not heard of the asker.
    fn sockets() -> (UdpSocket, UdpSocket) {
        let server = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let asker = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        asker.connect(server.local_addr().expect("bound")).expect("connected");
        (asker, server)
    }

    fn local() -> IpAddr {
        [127, 0, 0, 1].into()
    }

    #[test]
    fn only_who_was_announced_is_answered() {
        for (ticket, from, answered) in [
            (TICKET, local(), true),
            (Ticket([8; 16]), local(), false),
            (TICKET, [127, 0, 0, 2].into(), false),
        ] {
            let (asker, server) = sockets();
            let (one, other) = (&meter(), &meter());
            std::thread::scope(|scope| {
                let door = scope.spawn(move || await_knock(&server, TICKET, from, other));
                let knocked = match answered {
                    true => knock(&asker, ticket, one),
                    // As long as it takes to be sure.
                    false => {
                        asker.set_read_timeout(Some(LONG)).expect("a timeout");
                        asker.send(&mark(ticket, KNOCK)).expect("sent");
                        asker.recv(&mut [0; MARK]).map(drop).map_err(|e| e.to_string())
                    }
                };
                assert_eq!(knocked.is_ok(), answered, "{knocked:?}");
                other.stop();
                assert_eq!(door.join().expect("no panic"), Ok(()));
            });
        }
    }

    #[test]
    fn what_is_lost_on_the_way_is_counted() {
        let (asker, server) = sockets();
        let meter = &meter();
        server.connect(asker.local_addr().expect("bound")).expect("connected");
        server.set_read_timeout(Some(LOOK_EVERY)).expect("a timeout");
        std::thread::scope(|scope| {
            scope.spawn(move || take(&server, TICKET, meter));
            // Every fourth does not come, and some are not ours.
            let sender = scope.spawn(move || {
                for number in (0_u64..).take_while(|_| meter.goes_on()) {
                    if number % 4 != 3 {
                        let _ = asker.send(&mark(TICKET, number));
                        let _ = asker.send(&mark(Ticket([9; 16]), number));
                        let _ = asker.send(&[1, 2, 3]);
                    }
                    std::thread::sleep(Duration::from_micros(50));
                }
            });
            let count = meter::count(meter, LONG, &mut |_| {}).expect("datagrams came");
            meter.stop();
            sender.join().expect("no panic");
            assert_eq!(count.bytes, count.packets * MARK as u64);
            let share = count.lost as f64 / (count.lost + count.packets) as f64;
            assert!((0.2..0.3).contains(&share), "{count:?}");
        });
    }

    #[test]
    fn a_flood_and_its_receiver_keep_each_other_alive() {
        let (asker, server) = sockets();
        let (out, into) = (&meter(), &meter());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                await_knock(&server, TICKET, local(), into).expect("somebody knocks");
                take(&server, TICKET, into);
            });
            knock(&asker, TICKET, out).expect("answered");
            let socket = &asker;
            scope.spawn(move || push(socket, TICKET, 1372, out));
            let count = meter::count(into, LONG, &mut |_| {}).expect("datagrams came");
            assert!(count.bytes >= 1372 && count.bytes.is_multiple_of(1372), "{count:?}");
            assert!(out.life().beats() > 0, "the receiver says that it is there");
            assert!(into.life().beats() > 0);
            out.stop();
            into.stop();
        });
        assert!(!out.life().is_hushed() && !into.life().is_hushed());
    }

    /// A way that is closed in one direction: the control connection must not fall silent for it.
    #[test]
    fn nobody_is_flooded_or_hushed_before_both_directions_are_open() {
        for pump in [Pump::Push, Pump::Take] {
            let (asker, server) = sockets();
            let there = &meter();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    await_knock(&server, TICKET, local(), there).expect("somebody knocks");
                    run(pump, &server, TICKET, 1372, there);
                });
                asker.set_read_timeout(Some(LOOK_EVERY)).expect("a timeout");
                // Who knocks again has heard nothing.
                for _ in 0..4 {
                    asker.send(&mark(TICKET, KNOCK)).expect("sent");
                    std::thread::sleep(LOOK_EVERY);
                }
                let mut bytes = [0; 2000];
                let numbers = || {
                    let came = asker.recv(&mut bytes).ok()?;
                    number_of(bytes.get(..came), TICKET)
                };
                let quiet = std::iter::from_fn(numbers).all(|number| number == HERE);
                let hushed = there.life().is_hushed();
                // Now the way is open.
                let mark = |number| asker.send(&mark(TICKET, number)).expect("sent");
                mark(if pump == Pump::Push { COMING } else { 0 });
                let until = clock::now() + 10 * LONG;
                while !there.life().is_hushed() && clock::now() < until {
                    std::thread::sleep(LOOK_EVERY / 10);
                    // The first is the beginning, the second the sign.
                    mark(if pump == Pump::Push { COMING } else { 1 });
                }
                let later = there.life().is_hushed();
                there.stop();
                assert!(quiet && !hushed, "{pump:?}: quiet {quiet}, hushed {hushed}");
                assert!(later, "{pump:?}");
            });
        }
    }

    #[test]
    fn old_answers_without_end_do_not_hold_a_round_trip() {
        let (asker, server) = sockets();
        server.connect(asker.local_addr().expect("bound")).expect("connected");
        let one = &meter();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while one.goes_on() {
                    let _ = server.send(&mark(TICKET, u64::MAX / 2));
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            // What would hold it for ever ends the test all the same.
            let guard = scope.spawn(move || {
                let until = clock::now() + 5 * PATIENCE;
                while one.goes_on() && clock::now() < until {
                    std::thread::sleep(LOOK_EVERY / 10);
                }
                one.fail("it holds for ever");
                one.stop();
                clock::now() < until
            });
            let pinged = ping(&asker, TICKET, one, LONG, &mut |_| {});
            one.stop();
            let (trips, count) = pinged.expect("it ends");
            assert!(guard.join().expect("no panic"), "in time");
            assert_eq!((trips.len(), count.packets), (0, 0));
        });
    }

    #[test]
    fn round_trips_are_counted_and_what_is_late_is_lost() {
        let (asker, server) = sockets();
        let (one, other) = (&meter(), &meter());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                await_knock(&server, TICKET, local(), other).expect("somebody knocks");
                echo(&server, TICKET, other);
            });
            knock(&asker, TICKET, one).expect("answered");
            let (trips, count) = ping(&asker, TICKET, one, LONG, &mut |_| {}).expect("round trips");
            other.stop();
            assert!(count.packets > 0 && trips.len() as u64 == count.packets);
            let summary = trips.summary().expect("some");
            assert!(summary.p50 > 0.0 && summary.p50 <= summary.p999);
        });
    }

    #[test]
    fn a_mark_is_read_as_it_was_written_and_nothing_else_is() {
        assert_eq!(number_of(Some(&mark(TICKET, 77)), TICKET), Some(77));
        assert_eq!(number_of(Some(&[&mark(TICKET, 3)[..], &[0; 99]].concat()), TICKET), Some(3));
        assert_eq!(number_of(Some(&mark(TICKET, 77)[..MARK - 1]), TICKET), None);
        assert_eq!(number_of(Some(&mark(Ticket([0; 16]), 77)), TICKET), None);
        assert_eq!(number_of(None, TICKET), None);
    }
}
