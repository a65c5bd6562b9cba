//! Who comes in to `warren bench serve`: connections that have not yet said what they want, and the proof of the
//! token.
//!
//! Anybody may connect. So there is room for few, for fewer from one address, for a short time; but whose connections
//! were announced on the control connection has room of its own, which strangers cannot take.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::ending::{Ending, LOOK_EVERY};
use super::line::SILENCE;
use super::message::{self, Answer, Ask, LONGEST_OPENING, MAX_STREAMS, Opening, VERSION};
use super::meter::{Meter, Pump};
use super::secret::{Nonce, Prover, Ticket, Token};
use super::{progress, streams};
use crate::io::clock;
use crate::state::problem::one_line;

/// Strangers' connections that may be about to say what they want.
const STRANGERS: usize = 16;
/// Of one address.
const OF_ONE: usize = 4;
/// Of the address whose connections were announced: the streams of a task, and what goes beside them.
const EXPECTED: usize = MAX_STREAMS as usize + OF_ONE;
/// How often a refusal is told.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// What the threads that greet share.
pub(super) struct Door {
    /// What an asker must know.
    pub token: Token,
    bookings: Mutex<HashMap<Ticket, Booking>>,
    busy: AtomicBool,
    greetings: Mutex<Greetings>,
    refusals: Mutex<Refusals>,
    sessions: SyncSender<Guest>,
}

/// Somebody who has proven the token.
pub(super) struct Guest {
    /// Its control connection.
    pub stream: TcpStream,
    /// Its address.
    pub peer: SocketAddr,
    /// The asker's nonce and ours.
    pub nonce: (Nonce, Nonce),
}

/// What is to be done with a connection.
pub(super) struct Booking {
    /// The address it will come from.
    pub from: IpAddr,
    /// What to do.
    pub pump: Pump,
    /// Where to count.
    pub meter: Arc<Meter>,
}

impl Door {
    /// One that is open, and where guests come out, one at a time.
    pub(super) fn new(token: Token) -> (Arc<Door>, Receiver<Guest>) {
        let (sessions, guests) = sync_channel(1);
        let door = Door {
            token,
            bookings: Mutex::default(),
            busy: AtomicBool::new(false),
            greetings: Mutex::default(),
            refusals: Mutex::default(),
            sessions,
        };
        (Arc::new(door), guests)
    }

    /// Connections that are expected.
    pub(super) fn bookings(&self) -> MutexGuard<'_, HashMap<Ticket, Booking>> {
        locked(&self.bookings)
    }

    /// The guest has gone: the next one may come.
    pub(super) fn free(&self) {
        self.bookings().clear();
        self.busy.store(false, Ordering::Relaxed);
    }

    fn tell_refusal(&self, peer: SocketAddr, reason: &str) {
        if let Some(untold) = locked(&self.refusals).tell(clock::now()) {
            let more = if untold == 0 { String::new() } else { format!(" (and {untold} more before)") };
            progress::write(&format!("{peer}: refused: {}{more}\n", one_line(reason)));
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next guest; `None` when it is over.
pub(super) fn next(guests: &Receiver<Guest>, stop: &Ending) -> Option<Guest> {
    while !stop.is_raised() {
        match guests.recv_timeout(LOOK_EVERY) {
            Ok(guest) => return Some(guest),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
    None
}

/// Lets connections in until it is over; `control`: not only such with a ticket.
pub(super) fn accept(listener: &TcpListener, door: &Arc<Door>, end: &Ending, control: bool) {
    while !end.is_raised() {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(_) => {
                let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
                let waited = poll(&mut ready, PollTimeout::from(LOOK_EVERY.as_millis() as u8));
                // Out of descriptors, perhaps: then it is ready all the time.
                if waited != Ok(0) {
                    thread::sleep(Duration::from_millis(1));
                }
                continue;
            }
        };
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let Some(greeting) = Greeting::begin(door, peer.ip()) else { continue };
        let end = end.clone();
        let _ = thread::Builder::new()
            .name("guest".to_owned())
            .spawn(move || greet(stream, peer, greeting, &end, control));
    }
}

/// Those who have not said yet what they want, by address.
#[derive(Debug, Default)]
struct Greetings {
    strangers: HashMap<IpAddr, usize>,
    expected: usize,
}

impl Greetings {
    /// Whether there is room for one more.
    fn enter(&mut self, from: IpAddr, expected: bool) -> bool {
        if expected {
            let room = self.expected < EXPECTED;
            self.expected += usize::from(room);
            return room;
        }
        let of_one = self.strangers.get(&from).copied().unwrap_or(0);
        let room = of_one < OF_ONE && self.strangers.values().sum::<usize>() < STRANGERS;
        if room {
            self.strangers.insert(from, of_one + 1);
        }
        room
    }

    fn leave(&mut self, from: IpAddr, expected: bool) {
        if expected {
            self.expected = self.expected.saturating_sub(1);
        } else if let Some(count) = self.strangers.get_mut(&from) {
            *count -= 1;
            if *count == 0 {
                self.strangers.remove(&from);
            }
        }
    }
}

/// A place among them.
struct Greeting {
    door: Arc<Door>,
    from: IpAddr,
    expected: bool,
}

impl Greeting {
    fn begin(door: &Arc<Door>, from: IpAddr) -> Option<Greeting> {
        let expected = door.bookings().values().any(|booking| booking.from == from);
        let entered = locked(&door.greetings).enter(from, expected);
        entered.then(|| Greeting { door: Arc::clone(door), from, expected })
    }
}

impl Drop for Greeting {
    fn drop(&mut self) {
        locked(&self.door.greetings).leave(self.from, self.expected);
    }
}

/// Refusals that are told: whoever knocks on and on must not fill a disk.
#[derive(Debug, Default)]
struct Refusals {
    told: Option<Instant>,
    untold: u64,
}

impl Refusals {
    /// Whether this one is told, and how many were not before it.
    fn tell(&mut self, now: Instant) -> Option<u64> {
        if self.told.is_some_and(|told| now.saturating_duration_since(told) < TELL_EVERY) {
            self.untold += 1;
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

fn greet(mut stream: TcpStream, peer: SocketAddr, greeting: Greeting, end: &Ending, control: bool) {
    let _ = stream.set_write_timeout(Some(SILENCE));
    match message::read(&mut stream, LONGEST_OPENING, SILENCE, end) {
        Ok(Opening::Data { ticket }) => {
            let mut bookings = greeting.door.bookings();
            if bookings.get(&ticket).is_some_and(|booking| booking.from == peer.ip())
                && let Some(Booking { pump, meter, .. }) = bookings.remove(&ticket)
            {
                drop(bookings);
                drop(greeting);
                match streams::prepare(&stream) {
                    Ok(()) => streams::run(pump, stream, &meter),
                    Err(error) => meter.fail(error),
                }
            }
        }
        Ok(Opening::Control { version, nonce }) if control => {
            if let Err(reason) = admit(stream, peer, (version, nonce), &greeting.door, end) {
                greeting.door.tell_refusal(peer, &reason);
            }
        }
        Ok(Opening::Control { .. }) | Err(_) => {}
    }
}

fn admit(
    mut stream: TcpStream,
    peer: SocketAddr,
    (version, theirs): (u32, Nonce),
    door: &Door,
    end: &Ending,
) -> Result<(), String> {
    let refuse = |stream: &mut TcpStream, reason: String| {
        let _ = message::write(stream, &Answer::Refused(reason.clone()));
        Err(reason)
    };
    if version != VERSION {
        let own = env!("CARGO_PKG_VERSION");
        let reason = format!(
            "this side is warren {own}, whose bench speaks version {VERSION}, the other side's version {version}: \
             use the same program on both"
        );
        return refuse(&mut stream, reason);
    }
    let ours = Nonce::draw().map_err(|e| e.to_string())?;
    message::write(&mut stream, &Answer::Challenge(ours)).map_err(|e| e.to_string())?;
    let proof = match message::read(&mut stream, LONGEST_OPENING, SILENCE, end) {
        Ok(Ask::Proof(proof)) => proof,
        Ok(_) => return Err("did not prove that it knows the token".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    if !door.token.is_known_to(Prover::Asker, theirs, ours, proof) {
        return refuse(&mut stream, "wrong token".to_owned());
    }
    // The last asker may be about to go, or lost and soon noticed.
    let until = clock::now() + SILENCE;
    while door.busy.swap(true, Ordering::Relaxed) {
        if clock::now() >= until {
            return refuse(&mut stream, "busy with another measurement: try again later".to_owned());
        }
        thread::sleep(LOOK_EVERY);
    }
    match door.sessions.try_send(Guest { stream, peer, nonce: (theirs, ours) }) {
        Ok(()) => Ok(()),
        Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err("about to end".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_leaves_room_for_others_and_strangers_for_whom_is_expected() {
        let address = |last: u8| IpAddr::from([192, 0, 2, last]);
        let mut greetings = Greetings::default();
        let one = (0..OF_ONE * 2).filter(|_| greetings.enter(address(1), false)).count();
        assert_eq!(one, OF_ONE, "of one address");
        assert!(greetings.enter(address(2), false), "the next has room");
        greetings.leave(address(2), false);
        let all = (2..=255).filter(|last| greetings.enter(address(*last), false)).count();
        assert_eq!(one + all, STRANGERS);
        let announced = (0..EXPECTED * 2).filter(|_| greetings.enter(address(1), true)).count();
        assert_eq!(announced, EXPECTED);
        greetings.leave(address(1), true);
        assert!(greetings.enter(address(1), true) && !greetings.enter(address(1), false));
        for last in 1..=255 {
            (0..OF_ONE).for_each(|_| greetings.leave(address(last), false));
        }
        assert!(greetings.strangers.is_empty(), "nobody is kept in mind");
        assert!(greetings.enter(address(1), false));
    }

    #[test]
    fn a_storm_of_refusals_is_one_line_a_second() {
        let mut refusals = Refusals::default();
        let begun = clock::now();
        let told = |refusals: &mut Refusals, millis| refusals.tell(begun + Duration::from_millis(millis));
        assert_eq!(told(&mut refusals, 0), Some(0));
        assert!((1..1000).all(|millis| told(&mut refusals, millis).is_none()));
        assert_eq!(told(&mut refusals, 1000), Some(999));
        assert_eq!(told(&mut refusals, 2000), Some(0));
    }
}
