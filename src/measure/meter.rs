//! The counting of traffic that pumps make.
//!
//! A pump (`streams`, `datagrams`) knows nothing of time: it goes on until its [`Meter`] says stop. [`count`] looks at
//! the meter: it waits for the first bytes, lets a warm-up pass, and takes the difference of what stands there at the
//! two ends of the time. Whoever receives counts what arrived; both count their own processor time.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};

use super::ending::{Ending, LOOK_EVERY};
use super::line::Life;
use super::message::Flow;
use super::stats::Trips;
use crate::io::clock;

/// What does not count: slow start, the tunnel's first handshake.
pub(super) const WARM_UP: Duration = Duration::from_millis(500);
/// How long the first bytes may take: a WireGuard handshake that is lost is tried again after 5 s.
pub(super) const FIRST: Duration = Duration::from_secs(6);

/// A request and its answer, as sockperf's.
pub(super) const PING: usize = 64;
/// A datagram that took longer is lost; a connection that stands for so long is broken.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// What a thread does with a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pump {
    /// Takes what comes.
    Take,
    /// Sends as much as goes.
    Push,
    /// Sends back what comes.
    Echo,
}

impl Pump {
    /// The asker's part of a flow.
    pub(super) fn of_asker(flow: Flow) -> Pump {
        match flow {
            Flow::There => Pump::Push,
            Flow::Back => Pump::Take,
        }
    }

    /// The server's.
    pub(super) fn of_server(flow: Flow) -> Pump {
        Pump::of_asker(flow.turned())
    }
}

/// What the threads of a task share.
#[derive(Debug)]
pub(super) struct Meter {
    bytes: AtomicU64,
    packets: AtomicU64,
    /// The number after the highest that came.
    numbers: AtomicU64,
    stop: AtomicBool,
    trouble: Mutex<Option<String>>,
    end: Ending,
    life: Arc<Life>,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Count {
    /// Payload.
    pub bytes: u64,
    /// Datagrams, or round trips.
    pub packets: u64,
    /// Datagrams that were sent and did not come.
    pub lost: u64,
    /// For how long it was counted.
    pub micros: u64,
    /// Processor time of the whole process meanwhile, user and system.
    pub cpu_micros: u64,
}

/// What somebody who watches is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Now.
    pub now: Instant,
    /// Bytes until now.
    pub bytes: u64,
    /// Datagrams or round trips until now.
    pub packets: u64,
}

/// Somebody who watches, several times a second.
pub(super) type Watcher<'a> = &'a mut dyn FnMut(Look);

impl Meter {
    /// At zero.
    pub(super) fn new(end: &Ending, life: &Arc<Life>) -> Meter {
        Meter {
            bytes: AtomicU64::new(0),
            packets: AtomicU64::new(0),
            numbers: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            trouble: Mutex::new(None),
            end: end.clone(),
            life: Arc::clone(life),
        }
    }

    /// Ends the pumps.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether pumps go on.
    pub(super) fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed) && !self.end.is_raised()
    }

    /// The first trouble that a pump had before it was told to stop.
    pub(super) fn fail(&self, trouble: impl std::fmt::Display) {
        if self.goes_on() {
            let mut held = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            held.get_or_insert_with(|| trouble.to_string());
        }
    }

    /// Why it does not go on, if it does not.
    pub(super) fn check(&self) -> Result<(), String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        trouble.or_else(|| self.end.reason()).map_or(Ok(()), Err)
    }

    /// Bytes passed.
    pub(super) fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A datagram or a round trip passed.
    pub(super) fn add_packet(&self) {
        self.packets.fetch_add(1, Ordering::Relaxed);
    }

    /// So many datagrams were sent, as far as their numbers tell.
    pub(super) fn note_sent(&self, numbers: u64) {
        self.numbers.store(numbers, Ordering::Relaxed);
    }

    /// For signs of life.
    pub(super) fn life(&self) -> &Life {
        &self.life
    }

    fn look(&self, now: Instant) -> Look {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Look { now, bytes: read(&self.bytes), packets: read(&self.packets) }
    }
}

/// Counts what passes a meter, from the first bytes and the warm-up on.
pub(super) fn count(meter: &Meter, long: Duration, watcher: Watcher<'_>) -> Result<Count, String> {
    await_bytes(meter)?;
    watch(meter, WARM_UP, watcher)?;
    let (begun, numbers, cpu) =
        (meter.look(clock::now()), meter.numbers.load(Ordering::Relaxed), cpu_micros());
    watch(meter, long, watcher)?;
    let (ended, cpu) = (meter.look(clock::now()), cpu_micros().saturating_sub(cpu));
    let sent = meter.numbers.load(Ordering::Relaxed).saturating_sub(numbers);
    let packets = ended.packets - begun.packets;
    let count = Count {
        bytes: ended.bytes - begun.bytes,
        packets,
        lost: sent.saturating_sub(packets),
        micros: in_micros(ended.now - begun.now),
        cpu_micros: cpu,
    };
    match count.bytes {
        0 => Err(format!("nothing went through for {} s", long.as_secs())),
        _ => Ok(count),
    }
}

/// Waits for the first bytes.
pub(super) fn await_bytes(meter: &Meter) -> Result<(), String> {
    let until = clock::now() + FIRST;
    while meter.look(until).bytes == 0 {
        meter.check()?;
        if clock::now() >= until {
            return Err(format!("nothing came through within {} s", FIRST.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn watch(meter: &Meter, long: Duration, watcher: Watcher<'_>) -> Result<(), String> {
    let until = clock::now() + long;
    loop {
        meter.check()?;
        let now = clock::now();
        watcher(meter.look(now));
        let left = until.saturating_duration_since(now);
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(LOOK_EVERY));
    }
}

/// User and system time of this process, with all its threads.
fn cpu_micros() -> u64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return 0 };
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    u64::try_from(micros).unwrap_or(0)
}

fn in_micros(long: Duration) -> u64 {
    u64::try_from(long.as_micros()).unwrap_or(u64::MAX)
}

/// Repeats `trip`, which gets a number and says whether it came back.
pub(super) fn ping(
    meter: &Meter,
    long: Duration,
    watcher: Watcher<'_>,
    mut trip: impl FnMut(&Meter, u64) -> Result<bool, String>,
) -> Result<(Trips, Count), String> {
    let mut trips = Trips::default();
    let begun = clock::now();
    let (from, until) = (begun + WARM_UP, begun + WARM_UP + long);
    let (mut now, mut next_look, mut cpu) = (begun, begun, cpu_micros());
    for number in 0.. {
        let back = trip(meter, number)?;
        let after = clock::now();
        meter.add_packet();
        match back {
            _ if now < from => cpu = cpu_micros(),
            true => trips.add(after - now),
            false => trips.lose(),
        }
        now = after;
        if now >= next_look {
            meter.check()?;
            watcher(meter.look(now));
            next_look = now + LOOK_EVERY;
        }
        if now >= until {
            break;
        }
    }
    let packets = trips.len() as u64;
    let cpu_micros = cpu_micros().saturating_sub(cpu);
    let count = Count { packets, micros: in_micros(long), cpu_micros, ..Count::default() };
    Ok((trips, count))
}

/// Whether it was only the time to look around.
pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}
