//! TCP: pumps that push, take and return bytes, and round trips.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::ending::LOOK_EVERY;
use super::meter::{self, Count, Meter, PATIENCE, PING, Pump, Watcher, is_passing};
use super::stats::Trips;
use crate::io::clock;

/// What is written at once: large enough that calls cost nothing.
const CHUNK: usize = 128 << 10;

/// What every data connection is set to. When it is closed it is forgotten, with what is still in its buffers: the
/// next measurement must not share the way with that.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOOK_EVERY))?;
    stream.set_write_timeout(Some(LOOK_EVERY))?;
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

/// The congestion control of a connection; nothing if it has none that is text.
pub(super) fn congestion(stream: &TcpStream) -> String {
    let name = SockRef::from(stream).tcp_congestion().unwrap_or_default();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8(name.to_vec()).unwrap_or_default()
}

/// Does its part with a connection until the meter says stop.
pub(super) fn run(pump: Pump, stream: TcpStream, meter: &Meter) {
    match pump {
        Pump::Take => take(stream, meter),
        Pump::Push => push(stream, meter),
        Pump::Echo => echo(stream, meter),
    }
}

/// Sends as fast as it goes.
fn push(mut stream: TcpStream, meter: &Meter) {
    let chunk = vec![0x57; CHUNK];
    while meter.goes_on() {
        match stream.write(&chunk) {
            Ok(sent) => meter.add(sent),
            Err(error) if is_passing(&error) => {}
            Err(error) => return meter.fail(format!("a TCP stream broke: {error}")),
        }
    }
}

/// Takes whatever comes.
fn take(mut stream: TcpStream, meter: &Meter) {
    let mut chunk = vec![0; CHUNK];
    while meter.goes_on() {
        match stream.read(&mut chunk) {
            Ok(0) => return meter.fail("a TCP stream was closed too early"),
            Ok(came) => {
                meter.add(came);
                meter.life().beat();
            }
            // That nothing came is no sign of life.
            Err(error) if is_passing(&error) => {}
            Err(error) => return meter.fail(format!("a TCP stream broke: {error}")),
        }
    }
}

/// Sends every byte back.
fn echo(mut stream: TcpStream, meter: &Meter) {
    let mut bytes = [0; PING];
    while let Some(came) = take_some(&stream, &mut bytes, None, meter) {
        let Some(bytes) = bytes.get(..came) else { return };
        if let Err(error) = stream.write_all(bytes) {
            return meter.fail(format!("a TCP stream broke: {error}"));
        }
        meter.add(came);
        meter.add_packet();
    }
}

fn take_some(
    mut stream: &TcpStream,
    bytes: &mut [u8],
    until: Option<Instant>,
    meter: &Meter,
) -> Option<usize> {
    while meter.goes_on() {
        match stream.read(bytes) {
            Ok(0) => meter.fail("a TCP stream was closed too early"),
            Ok(came) => return Some(came),
            Err(error) if is_passing(&error) => match until {
                Some(until) if clock::now() > until => meter.fail("a TCP stream stands still"),
                Some(_) | None => continue,
            },
            Err(error) => meter.fail(format!("a TCP stream broke: {error}")),
        }
        return None;
    }
    None
}

/// A few bytes there and back, over and over.
pub(super) fn ping(
    stream: &TcpStream,
    meter: &Meter,
    long: Duration,
    watcher: Watcher<'_>,
) -> Result<(Trips, Count), String> {
    let mut bytes = [0; PING];
    let mut out = stream;
    meter::ping(meter, long, watcher, |meter, _| {
        out.write_all(&bytes).map_err(|e| format!("a TCP stream broke: {e}"))?;
        let (until, mut have) = (clock::now() + 10 * PATIENCE, 0);
        while have < PING {
            let Some(came) = take_some(stream, &mut bytes[have..], Some(until), meter) else {
                meter.check()?;
                return Err("the measurement was stopped".to_owned());
            };
            have += came;
        }
        Ok(true)
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;

    use super::super::ending::Ending;
    use super::*;

    const LONG: Duration = Duration::from_millis(300);

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let one = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let other = listener.accept().expect("accepted").0;
        prepare(&one).expect("ours");
        prepare(&other).expect("ours");
        (one, other)
    }

    fn meter() -> Meter {
        Meter::new(&Ending::default(), &Arc::default())
    }

    #[test]
    fn what_is_pushed_is_taken_and_both_end_when_told() {
        let (one, other) = pair();
        let (out, into) = (&meter(), &meter());
        std::thread::scope(|scope| {
            scope.spawn(move || push(one, out));
            scope.spawn(move || take(other, into));
            let count = meter::count(into, LONG, &mut |_| {}).expect("bytes came");
            assert!(count.bytes > 0 && count.lost == 0 && count.cpu_micros > 0, "{count:?}");
            assert!(count.micros >= 300_000);
            out.stop();
            into.stop();
        });
        assert_eq!((out.check(), into.check()), (Ok(()), Ok(())));
    }

    #[test]
    fn a_stream_that_breaks_is_no_figure() {
        let (one, other) = pair();
        let into = &meter();
        std::thread::scope(|scope| {
            scope.spawn(move || take(other, into));
            (&one).write_all(&[1; 1000]).expect("written");
            drop(one);
            let count = meter::count(into, LONG, &mut |_| {});
            assert!(count.expect_err("it broke").contains("TCP stream"));
        });
    }

    #[test]
    fn only_bytes_are_a_sign_of_life() {
        let (one, other) = pair();
        let into = &meter();
        std::thread::scope(|scope| {
            scope.spawn(move || run(Pump::Take, other, into));
            // Several looks long.
            std::thread::sleep(4 * LOOK_EVERY);
            let silent = into.life().beats();
            (&one).write_all(&[1; 1000]).expect("written");
            let until = clock::now() + Duration::from_secs(5);
            while into.life().beats() == 0 && clock::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            into.stop();
            assert_eq!(silent, 0);
            assert!(into.life().beats() > 0);
        });
    }

    #[test]
    fn round_trips_are_as_many_as_came_back() {
        let (one, other) = pair();
        let (here, there) = (&meter(), &meter());
        std::thread::scope(|scope| {
            scope.spawn(move || echo(other, there));
            let (trips, count) = ping(&one, here, LONG, &mut |_| {}).expect("round trips");
            there.stop();
            assert_eq!(trips.len() as u64, count.packets);
            let summary = trips.summary().expect("some");
            assert!(summary.p50 > 0.0 && summary.lost == 0);
        });
    }

    #[test]
    fn the_end_of_all_ends_a_round_trip_that_nobody_answers() {
        let (one, _silent) = pair();
        let end = Ending::default();
        let meter = Meter::new(&end, &Arc::default());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(LONG);
                end.raise("stopped by a signal");
            });
            let begun = clock::now();
            let error = ping(&one, &meter, 100 * LONG, &mut |_| {}).map(|_| ()).expect_err("nobody answers");
            assert_eq!(error, "stopped by a signal");
            assert!(clock::now() - begun < 10 * LONG);
        });
    }
}
