//! What is measured, with iperf3 and sockperf.

use std::process::{Child, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use serde_json::Value;

use crate::contestant::Running;
use crate::lab::wait_for;

/// One column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Figure {
    /// One TCP stream.
    Tcp,
    /// One TCP stream in the other direction.
    TcpReverse,
    /// Four TCP streams at once.
    Tcp4,
    /// What arrives of as much UDP as the sender can send, 1372 bytes each.
    Udp,
    /// A TCP request and its answer, over and over: half the round trip.
    PingPong,
}

impl Figure {
    /// All, in the order of the table.
    pub const ALL: [Figure; 5] =
        [Figure::Tcp, Figure::TcpReverse, Figure::Tcp4, Figure::Udp, Figure::PingPong];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Figure::Tcp => "tcp",
            Figure::TcpReverse => "tcp-reverse",
            Figure::Tcp4 => "tcp4",
            Figure::Udp => "udp",
            Figure::PingPong => "ping-pong",
        }
    }

    /// The head of its column.
    pub fn title(self) -> &'static str {
        match self {
            Figure::Tcp => "TCP 1 stream, Gbit/s",
            Figure::TcpReverse => "reverse, Gbit/s",
            Figure::Tcp4 => "4 streams, Gbit/s",
            Figure::Udp => "UDP 1372 B goodput, Gbit/s",
            Figure::PingPong => "TCP ping-pong, us one way",
        }
    }

    /// Measures it once; the error says what went wrong, and costs this sample only.
    pub fn measure(self, on: &Running, seconds: u32) -> Result<f64, String> {
        match self {
            // cubic for all: the machine's default may be another.
            Figure::Tcp => iperf(on, seconds, &["-C", "cubic"], "/end/sum_received"),
            Figure::TcpReverse => iperf(on, seconds, &["-C", "cubic", "-R"], "/end/sum_received"),
            Figure::Tcp4 => iperf(on, seconds, &["-C", "cubic", "-P", "4"], "/end/sum_received"),
            Figure::Udp => iperf(on, seconds, &["-u", "-l", "1372", "-b", "0"], "/end/sum_received"),
            Figure::PingPong => sockperf(on, seconds),
        }
    }
}

/// A server that ends with the measurement.
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
        ns.run(&format!("ss -Hltn sport = :{port}")).contains("LISTEN").then_some(())
    });
    server
}

fn iperf(on: &Running, seconds: u32, arguments: &[&str], pointer: &str) -> Result<f64, String> {
    let (from, to) = (on.address(0).to_string(), on.address(1).to_string());
    let _server = serve(on, 5201, &["iperf3", "-s", "-1", "-B", &to]);
    let seconds = seconds.to_string();
    let mut command = on.station(0).ns.command("iperf3");
    // One second that does not count: slow start, and the tunnel's first handshake.
    command.args(["-c", &to, "-B", &from, "-t", &seconds, "-O", "1", "-J"]).args(arguments);
    let output = command.output().map_err(|e| e.to_string())?;
    let json: Value = serde_json::from_slice(&output.stdout).map_err(|e| format!("iperf3: {e}"))?;
    if let Some(error) = json.get("error") {
        return Err(format!("iperf3: {error}"));
    }
    let end = json.pointer(pointer).ok_or("iperf3 gives no sum")?;
    let bits = end["bits_per_second"].as_f64().ok_or("iperf3 gives no rate")?;
    Ok(bits / 1e9)
}

fn sockperf(on: &Running, seconds: u32) -> Result<f64, String> {
    const PORT: u16 = 11_111;
    let (to, port) = (on.address(1).to_string(), PORT.to_string());
    let _server = serve(on, PORT, &["sockperf", "server", "--tcp", "-i", &to, "-p", &port]);
    let seconds = seconds.to_string();
    let mut command = on.station(0).ns.command("sockperf");
    command.args(["ping-pong", "--tcp", "-i", &to, "-p", &port, "-t", &seconds, "-m", "64"]);
    let output = command.output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    // "sockperf: Summary: Latency is 27.310 usec"
    let summary = text.split("Latency is ").nth(1).and_then(|rest| rest.split_whitespace().next());
    // It colours its summary.
    let digits: Option<String> =
        summary.map(|word| word.chars().filter(|c| c.is_ascii_digit() || *c == '.').collect());
    digits.and_then(|d| d.parse().ok()).ok_or_else(|| format!("sockperf gives no latency: {text}"))
}
