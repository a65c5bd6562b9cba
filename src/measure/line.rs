//! The control connection: messages both ways, and the certainty that somebody is still there.
//!
//! Each side says something every half second; whoever hears nothing for [`SILENCE`] ends the measurement. While
//! datagrams flood the way, they would flood the control connection too, and TCP would wait longer and longer: both
//! sides are then hushed, and the datagrams and their acknowledgements are the sign of life (`datagrams`).
//!
//! Nothing on it is signed: who can change packets on the way between the two could, once the token was proven, go on
//! in the asker's place. `--help` says so.

use std::io;
use std::marker::PhantomData;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ending::{Ending, LOOK_EVERY};
use super::message::{self, Answer, Ask, LONGEST};
use crate::io::clock;

/// How often a side says that it is still there.
const BEAT: Duration = Duration::from_millis(500);
/// How long it may say nothing.
pub(super) const SILENCE: Duration = Duration::from_millis(2500);
/// Messages that may wait to be read: each side says one thing and waits for the answer.
const WAITING: usize = 8;

/// What one side says.
pub(super) trait Speech: Serialize + DeserializeOwned + Send + 'static {
    /// That it is still there.
    const ALIVE: Self;
    /// Whether this is that.
    fn is_alive(&self) -> bool;
}

impl Speech for Ask {
    const ALIVE: Ask = Ask::Alive;

    fn is_alive(&self) -> bool {
        *self == Ask::Alive
    }
}

impl Speech for Answer {
    const ALIVE: Answer = Answer::Alive;

    fn is_alive(&self) -> bool {
        *self == Answer::Alive
    }
}

/// Signs of life beside the control connection.
#[derive(Debug, Default)]
pub(super) struct Life {
    hushed: AtomicBool,
    pulse: AtomicU64,
}

impl Life {
    /// Whether the control connection keeps silent.
    pub(super) fn hush(&self, hushed: bool) {
        self.hushed.store(hushed, Ordering::Relaxed);
    }

    /// Whether it does.
    #[cfg(test)]
    pub(super) fn is_hushed(&self) -> bool {
        self.hushed.load(Ordering::Relaxed)
    }

    /// How often something came.
    #[cfg(test)]
    pub(super) fn beats(&self) -> u64 {
        self.pulse.load(Ordering::Relaxed)
    }

    /// Something came from the other side.
    pub(super) fn beat(&self) {
        self.pulse.fetch_add(1, Ordering::Relaxed);
    }
}

/// One side's end of the control connection: it says `Out` and hears `In`.
pub(super) struct Line<Out, In> {
    stream: Arc<Mutex<TcpStream>>,
    inbox: Receiver<In>,
    end: Ending,
    life: Arc<Life>,
    local: SocketAddr,
    peer: SocketAddr,
    threads: Vec<JoinHandle<()>>,
    says: PhantomData<Out>,
}

impl<Out: Speech, In: Speech> Line<Out, In> {
    /// Takes over a connection on which both sides know of each other.
    pub(super) fn start(stream: TcpStream, end: Ending) -> io::Result<Line<Out, In>> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(SILENCE))?;
        let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
        let (ears, mouth) = (stream.try_clone()?, Arc::new(Mutex::new(stream)));
        let (messages, inbox) = sync_channel(WAITING);
        let life = Arc::new(Life::default());
        let listener = {
            let (end, life) = (end.clone(), Arc::clone(&life));
            thread::Builder::new()
                .name("control-in".to_owned())
                .spawn(move || listen::<In>(ears, &messages, &end, &life))?
        };
        let beater = {
            let (mouth, end, life) = (Arc::clone(&mouth), end.clone(), Arc::clone(&life));
            thread::Builder::new().name("control-out".to_owned()).spawn(move || {
                while end.pause(BEAT) {
                    if !life.hushed.load(Ordering::Relaxed) {
                        say(&mouth, &end, &Out::ALIVE);
                    }
                }
            })?
        };
        let threads = vec![listener, beater];
        Ok(Line { stream: mouth, inbox, end, life, local, peer, threads, says: PhantomData })
    }

    /// Says something; that it could not be said ends the measurement.
    pub(super) fn say(&self, message: &Out) {
        say(&self.stream, &self.end, message);
    }

    /// What the other side says next; the error is why there is nothing.
    pub(super) fn hear(&self, within: Duration) -> Result<In, String> {
        let until = clock::now() + within;
        loop {
            match self.inbox.recv_timeout(LOOK_EVERY) {
                Ok(message) => return Ok(message),
                // Whatever was said before the end has been heard.
                Err(RecvTimeoutError::Timeout) if self.end.is_raised() => {}
                Err(RecvTimeoutError::Timeout) if clock::now() < until => continue,
                Err(RecvTimeoutError::Timeout) => return Err("the other side gives no answer".to_owned()),
                Err(RecvTimeoutError::Disconnected) => {}
            }
            return Err(self.end.reason().unwrap_or_else(|| "the control connection is gone".to_owned()));
        }
    }

    /// For signs of life.
    pub(super) fn life(&self) -> &Arc<Life> {
        &self.life
    }

    /// How it ends.
    pub(super) fn end(&self) -> &Ending {
        &self.end
    }

    /// This side's address.
    pub(super) fn local(&self) -> SocketAddr {
        self.local
    }

    /// The other side's.
    pub(super) fn peer(&self) -> SocketAddr {
        self.peer
    }
}

impl<Out, In> Drop for Line<Out, In> {
    fn drop(&mut self) {
        self.end.raise("the measurement is over");
        let _ = self.stream.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn say(stream: &Mutex<TcpStream>, end: &Ending, message: &impl Serialize) {
    let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = message::write(&mut *stream, message) {
        end.raise(format!("lost the other side: {error}"));
    }
}

fn listen<In: Speech>(mut stream: TcpStream, inbox: &SyncSender<In>, end: &Ending, life: &Life) {
    let mut pulse = 0;
    let mut heard = clock::now();
    while !end.is_raised() {
        // Looked for before it is read: a message is read as a whole or not at all.
        match stream.set_read_timeout(Some(LOOK_EVERY)).and_then(|()| stream.peek(&mut [0])) {
            Ok(_) => match message::read::<In>(&mut stream, LONGEST, SILENCE, end) {
                Ok(message) => {
                    heard = clock::now();
                    if !message.is_alive() && inbox.try_send(message).is_err() {
                        end.raise("the other side talks without waiting for answers");
                    }
                }
                Err(error) => end.raise(format!("lost the other side: {error}")),
            },
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => end.raise(format!("lost the other side: {error}")),
        }
        let now = clock::now();
        let sign = life.pulse.load(Ordering::Relaxed);
        if sign != pulse {
            (pulse, heard) = (sign, now);
        }
        if now.saturating_duration_since(heard) > SILENCE {
            end.raise("lost the other side: it says nothing any more");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let one = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        (one, listener.accept().expect("accepted").0)
    }

    type Asker = Line<Ask, Answer>;
    type Server = Line<Answer, Ask>;

    #[test]
    fn both_sides_hear_each_other_and_stay_for_longer_than_silence() {
        let (one, other) = pair();
        let asker = Asker::start(one, Ending::default()).expect("a line");
        let server = Server::start(other, Ending::default()).expect("a line");
        asker.say(&Ask::Finish);
        assert_eq!(server.hear(SILENCE), Ok(Ask::Finish));
        assert!(asker.end().pause(SILENCE + BEAT), "{:?}", asker.end().reason());
        server.say(&Answer::Closed);
        assert_eq!(asker.hear(SILENCE), Ok(Answer::Closed));
        drop(asker);
        assert!(server.hear(SILENCE).is_err());
        assert!(server.end().reason().expect("over").contains("closed"), "{:?}", server.end().reason());
    }

    #[test]
    fn somebody_who_falls_silent_is_lost_within_three_seconds_unless_there_are_signs_of_life() {
        let (one, _silent) = pair();
        let line = Asker::start(one, Ending::default()).expect("a line");
        let begun = clock::now();
        for _ in 0..10 {
            line.life().beat();
            assert!(line.end().pause(Duration::from_millis(100)));
        }
        let beaten = clock::now();
        assert!(!line.end().pause(Duration::from_secs(10)));
        let lost = clock::now();
        assert!(lost - beaten < Duration::from_secs(3), "{:?}", lost - beaten);
        assert!(lost - begun > SILENCE + Duration::from_millis(800));
        assert!(line.hear(SILENCE).expect_err("over").contains("nothing any more"));
    }

    #[test]
    fn what_was_said_before_the_end_is_heard() {
        let (one, mut other) = pair();
        let asker = Asker::start(one, Ending::default()).expect("a line");
        message::write(&mut other, &Answer::Refused("busy".to_owned())).expect("written");
        drop(other);
        assert!(!asker.end().pause(SILENCE));
        assert_eq!(asker.hear(SILENCE), Ok(Answer::Refused("busy".to_owned())));
        assert!(asker.hear(SILENCE).is_err());
    }

    #[test]
    fn who_talks_without_end_is_cut_off() {
        let (one, mut other) = pair();
        let asker = Asker::start(one, Ending::default()).expect("a line");
        for _ in 0..=WAITING {
            let _ = message::write(&mut other, &Answer::Closed);
        }
        assert!(!asker.end().pause(SILENCE));
        assert!(asker.end().reason().expect("over").contains("without waiting"));
    }
}
