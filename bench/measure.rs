//! The runs: iperf3, and request and answer.

use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::contestant::Running;
use crate::cpu::Cpu;
use crate::figure::Work;
use crate::lab::wait_for;
use crate::ping_pong;
use crate::results::Reading;

/// Of the datagrams sent, what may be lost of a rate that counts as free of loss.
const LOSS_PERCENT: f64 = 0.1;
/// Halvings of the interval it is in.
const HALVINGS: u32 = 5;
const IPERF_PORT: u16 = 5201;
/// Seconds that iperf3 may take beyond those it measures.
const OVERDUE: u32 = 20;
/// cubic for all: the machine's default may be another.
const CUBIC: [&str; 2] = ["-C", "cubic"];

impl Work {
    /// Runs once: a value for each of [`Work::figures`], or the reason why not; `None` where the contestant
    /// has no such thing.
    pub fn measure(self, on: &Running, seconds: u32) -> Result<Vec<Option<Reading>>, String> {
        let stream = |more: &[&str]| {
            let traffic = iperf(on, seconds, &[&CUBIC, more].concat())?;
            Ok(vec![Some(traffic.gbits.into())])
        };
        match self {
            Work::Tcp => tcp(on, seconds),
            Work::TcpReverse => stream(&["-R"]),
            Work::Tcp4 => stream(&["-P", "4"]),
            Work::Tcp16 => stream(&["-P", "16"]),
            Work::Udp => {
                let traffic = iperf(on, seconds, &["-u", "-l", LARGE.length, "-b", "0"])?;
                Ok(vec![Some(traffic.gbits.into())])
            }
            Work::UdpSmall => {
                let traffic = iperf(on, seconds, &["-u", "-l", SMALL.length, "-b", "0"])?;
                Ok(vec![Some(thousands_of_small(traffic.gbits).into())])
            }
            Work::UdpLossFree => Ok(vec![Some(loss_free(on, LARGE)?)]),
            Work::UdpSmallLossFree => {
                let Reading { value, at_least } = loss_free(on, SMALL)?;
                Ok(vec![Some(Reading { value: thousands_of_small(value), at_least })])
            }
            Work::TcpLatency => latency(on, seconds, true),
            Work::UdpLatency => latency(on, seconds, false),
            Work::TcpLatencyLoaded | Work::UdpLatencyLoaded => {
                let mut load = Load::start(on, seconds);
                let before = load.acknowledged(on)?;
                let measured = latency(on, seconds, self == Work::TcpLatencyLoaded)?;
                // Beside a stream that died or stands still it is the figure of an idle tunnel.
                if load.acknowledged(on)? <= before {
                    return Err("the stream beside it stood still".to_owned());
                }
                Ok(measured)
            }
            Work::Idle => Err("has a laboratory of its own".to_owned()),
        }
    }
}

// --- servers -------------------------------------------------------------------------------------

/// A program that ends with the measurement.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(on: &Running, port: u16, words: &[&str]) -> Server {
    let ns = on.station(1).ns;
    let mut command = ns.command(words[0]);
    command.args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Server(command.spawn().unwrap_or_else(|e| panic!("start {}: {e}", words[0])));
    wait_for(&format!("{} listens", words[0]), Duration::from_secs(5), || {
        (!ns.run(&format!("ss -Hltn sport = :{port}")).trim().is_empty()).then_some(())
    });
    server
}

/// One TCP stream that goes on until it is dropped.
struct Load {
    client: Server,
    _server: Server,
}

impl Load {
    fn start(on: &Running, seconds: u32) -> Load {
        let (from, to) = (on.address(0).to_string(), on.address(1).to_string());
        let server = serve(on, IPERF_PORT, &["iperf3", "-s", "-1", "-B", &to]);
        let seconds = (seconds + 10).to_string();
        let mut command = on.station(0).ns.command("iperf3");
        command.args(["-c", &to, "-B", &from, "-t", &seconds]).args(CUBIC);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let client = Server(command.spawn().expect("start iperf3"));
        // Slow start is over.
        std::thread::sleep(Duration::from_secs(1));
        Load { client, _server: server }
    }

    /// Bytes that the other side has had, if the stream goes on.
    fn acknowledged(&mut self, on: &Running) -> Result<u64, String> {
        if let Some(ended) = self.client.0.try_wait().map_err(|e| e.to_string())? {
            return Err(format!("the stream beside it ended: iperf3: {ended}"));
        }
        let sockets = on.station(0).ns.run(&format!("ss -Htin state established dport = :{IPERF_PORT}"));
        let bytes = sockets.split_whitespace().filter_map(|word| word.strip_prefix("bytes_acked:"));
        Ok(bytes.filter_map(|bytes| bytes.parse::<u64>().ok()).sum())
    }
}

// --- throughput ----------------------------------------------------------------------------------

/// What iperf3 says.
struct Traffic {
    /// What arrived, without the first second.
    gbits: f64,
    /// What was sent.
    sent_gbits: f64,
    /// Of UDP.
    lost_percent: f64,
    /// GB of the whole run.
    gigabytes: f64,
}

fn iperf(on: &Running, seconds: u32, arguments: &[&str]) -> Result<Traffic, String> {
    // One second that does not count: slow start, and the tunnel's first handshake.
    run_iperf(on, seconds, &[&["-O", "1"], arguments].concat())
}

fn run_iperf(on: &Running, seconds: u32, arguments: &[&str]) -> Result<Traffic, String> {
    let (from, to) = (on.address(0).to_string(), on.address(1).to_string());
    let _server = serve(on, IPERF_PORT, &["iperf3", "-s", "-1", "-B", &to]);
    // Over a tunnel that is dead it would wait for ever; then it is told to end, and soon made to.
    let (limit, seconds) = ((seconds + OVERDUE).to_string(), seconds.to_string());
    let mut command = on.station(0).ns.command("timeout");
    command.args(["-k", "5", &limit, "setpriv", "--pdeathsig", "KILL", "iperf3"]);
    command.args(["-c", &to, "-B", &from, "-J", "-t", &seconds]).args(arguments);
    let output = command.output().map_err(|e| e.to_string())?;
    // What timeout(1) says of it.
    if matches!(output.status.code(), Some(124 | 137)) {
        return Err(format!("iperf3 had not ended after {limit} s"));
    }
    let json: Value = serde_json::from_slice(&output.stdout).map_err(|e| format!("iperf3: {e}"))?;
    if let Some(error) = json.get("error") {
        return Err(format!("iperf3: {error}"));
    }
    let received = json.pointer("/end/sum_received").ok_or("iperf3 gives no sum")?;
    let bits = received["bits_per_second"].as_f64().ok_or("iperf3 gives no rate")?;
    let sent = json.pointer("/end/sum_sent/bits_per_second").and_then(Value::as_f64).unwrap_or(bits);
    let intervals = json["intervals"].as_array().ok_or("iperf3 gives no intervals")?;
    let bytes: f64 = intervals.iter().filter_map(|interval| interval["sum"]["bytes"].as_f64()).sum();
    let lost = json.pointer("/end/sum/lost_percent").and_then(Value::as_f64);
    Ok(Traffic {
        gbits: bits / 1e9,
        sent_gbits: sent / 1e9,
        lost_percent: lost.unwrap_or(0.0),
        gigabytes: bytes / 1e9,
    })
}

fn tcp(on: &Running, seconds: u32) -> Result<Vec<Option<Reading>>, String> {
    let before = Cpu::read(on);
    let traffic = iperf(on, seconds, &CUBIC)?;
    let used = Cpu::read(on).since(before);
    let per_gb = |seconds: f64| Some(Reading::from(seconds / traffic.gigabytes));
    let [sender, receiver] = used.programs.map(|program| program.and_then(per_gb));
    Ok(vec![Some(traffic.gbits.into()), per_gb(used.machine), sender, receiver])
}

/// Datagrams of a search for the highest rate without loss.
#[derive(Clone, Copy)]
struct Datagrams {
    /// Bytes of each, as iperf3 is told.
    length: &'static str,
    /// Where the search begins, Mbit/s of payload.
    first_rate: f64,
}

const LARGE: Datagrams = Datagrams { length: "1372", first_rate: 400.0 };
const SMALL: Datagrams = Datagrams { length: "64", first_rate: 10.0 };

/// Thousands of datagrams of 64 bytes a second.
fn thousands_of_small(gbits: f64) -> f64 {
    gbits * 1e9 / (64.0 * 8.0) / 1e3
}

/// One rate that was tried: Gbit/s.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// What was sent of what should have been.
    pub sent: f64,
    /// What arrived, if hardly anything was lost.
    pub arrived: Option<f64>,
}

/// The highest rate, in Gbit/s, that loses less than [`LOSS_PERCENT`]: doubled until it loses more, then by halving.
fn loss_free(on: &Running, of: Datagrams) -> Result<Reading, String> {
    search(of.first_rate, |rate| attempt(on, of, rate))
}

/// The same by itself; `attempt` is given rates in Mbit/s.
pub fn search(
    first_rate: f64,
    mut attempt: impl FnMut(f64) -> Result<Attempt, String>,
) -> Result<Reading, String> {
    let (mut best, mut most_sent, mut low, mut high) = (0.0_f64, 0.0_f64, 0.0, None);
    let mut rate = first_rate;
    let mut halvings = 0;
    while halvings < HALVINGS {
        let Attempt { sent, arrived } = attempt(rate)?;
        most_sent = most_sent.max(sent);
        match arrived {
            Some(gbits) => {
                best = best.max(gbits);
                low = rate;
                // The sender itself cannot send more.
                if gbits * 1e3 < rate * 0.9 {
                    break;
                }
            }
            None => high = Some(rate),
        }
        rate = match high {
            None => rate * 2.0,
            Some(high) => {
                halvings += 1;
                f64::midpoint(low, high)
            }
        };
    }
    // Also where it lost some at the very most that it could send.
    Ok(Reading { value: best, at_least: best > 0.0 && most_sent < best * 1.1 })
}

/// What becomes of this rate, in the better of two tries of a second: a machine with other things to do loses some now
/// and then at any rate.
fn attempt(on: &Running, of: Datagrams, mbits: f64) -> Result<Attempt, String> {
    let (rate, buffer) = (format!("{mbits:.0}M"), socket_buffer().to_string());
    let mut sent = 0.0_f64;
    for _ in 0..2 {
        // Paced every 0.1 ms: iperf3's own 1 ms makes bursts that fill the socket at the other end by themselves.
        let pace = ["--pacing-timer", "100", "-w", &buffer];
        let arguments = [&["-u", "-l", of.length, "-b", &rate][..], &pace].concat();
        let traffic = run_iperf(on, 1, &arguments)?;
        sent = sent.max(traffic.sent_gbits);
        if traffic.lost_percent < LOSS_PERCENT {
            return Ok(Attempt { sent, arrived: Some(traffic.gbits) });
        }
    }
    Ok(Attempt { sent, arrived: None })
}

/// Bytes of the sockets of a search for loss in the tunnel: iperf3 itself must lose nothing while it waits for a
/// processor.
fn socket_buffer() -> u64 {
    let most = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/net/core/{name}")).unwrap_or_default();
        text.trim().parse().unwrap_or(212_992)
    };
    most("rmem_max").min(most("wmem_max")).min(2 << 20)
}

fn latency(on: &Running, seconds: u32, tcp: bool) -> Result<Vec<Option<Reading>>, String> {
    let percentiles = ping_pong::measure(on, seconds, tcp).map_err(|e| format!("ping-pong: {e}"))?;
    Ok(percentiles.map(|p| Some(p.into())).to_vec())
}
