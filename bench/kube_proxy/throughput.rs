//! One TCP stream pod to pod, to the pod itself and through a ClusterIP: what the translation costs.

use std::process::{Child, Stdio};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::lab::agent::warren;
use crate::lab::wait_for;
use crate::report;
use crate::stand::{CLUSTER_IP, Contestant, Stand};

/// How to measure.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Rounds: each is the pod, the Service, the Service, the pod.
    #[arg(long, default_value_t = 30)]
    rounds: u32,
    /// Seconds of each stream.
    #[arg(long, default_value_t = 1)]
    seconds: u32,
    /// Only these contestants; Warren's two if none is named.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Contestant>,
}

/// The section of the results.
pub fn measure(options: &Options) -> Value {
    let about = report::about(&warren());
    let ours = vec![Contestant::WarrenVxlan, Contestant::WarrenWireguard];
    let contestants = if options.only.is_empty() { ours } else { options.only.clone() };
    let stands: Vec<(Contestant, Stand)> = contestants.iter().map(|&who| (who, who.set_up())).collect();
    let _servers: Vec<Server> = stands.iter().map(|(_, stand)| Server::start(stand)).collect();
    let mut samples: Vec<(Contestant, f64, f64)> = Vec::new();
    for round in 1..=options.rounds {
        for (who, stand) in &stands {
            let (pod, service) = (stand.pod().to_string(), std::net::Ipv4Addr::from(CLUSTER_IP).to_string());
            // There and back again, so that what drifts hits both alike.
            let [a, b, c, d] = [&pod, &service, &service, &pod].map(|to| stream(stand, to, options.seconds));
            let (direct, through) = (f64::midpoint(a, d), f64::midpoint(b, c));
            eprintln!("round {round}: {}: pod {direct:.2}, Service {through:.2} Gbit/s", who.name());
            samples.push((*who, direct, through));
        }
    }
    let row = |who: &Contestant| {
        let mine = || samples.iter().filter(|s| s.0 == *who);
        let losses: Vec<f64> = mine().map(|(_, direct, through)| 100.0 * (1.0 - through / direct)).collect();
        let (mean, half) = report::interval(&losses);
        json!({
            "contestant": who.name(), "settings": who.settings(),
            "pod_gbit": report::Spread::of(&mine().map(|s| s.1).collect::<Vec<_>>()).json(),
            "service_gbit": report::Spread::of(&mine().map(|s| s.2).collect::<Vec<_>>()).json(),
            "loss_percent": {"mean": mean, "low": mean - half, "high": mean + half, "bar": 5.0},
        })
    };
    let sample =
        |s: &(Contestant, f64, f64)| json!({"contestant": s.0.name(), "pod_gbit": s.1, "service_gbit": s.2});
    json!({
        "about": about,
        "rounds": options.rounds, "seconds": options.seconds,
        "rows": contestants.iter().map(row).collect::<Vec<_>>(),
        "samples": samples.iter().map(sample).collect::<Vec<_>>(),
    })
}

fn stream(stand: &Stand, to: &str, seconds: u32) -> f64 {
    let seconds = seconds.to_string();
    // Its server may still be busy with the end of the stream before; then nothing was measured.
    wait_for(&format!("iperf3 measures to {to}"), Duration::from_secs(30), || {
        let mut command = stand.client().pod().ns.command("iperf3");
        let output = command.args(["-c", to, "-t", &seconds, "-C", "cubic", "-J"]).output();
        let json: Value = serde_json::from_slice(&output.ok()?.stdout).ok()?;
        if let Some(error) = json["error"].as_str() {
            eprintln!("iperf3 to {to}, once more: {error}");
            return None;
        }
        Some(json.pointer("/end/sum_received/bits_per_second")?.as_f64()? / 1e9)
    })
}

/// iperf3 in the server's pod.
#[derive(Debug)]
struct Server(Child);

impl Server {
    fn start(stand: &Stand) -> Server {
        let ns = stand.server().pod().ns;
        let mut command = ns.command("iperf3");
        command.arg("-s").stdout(Stdio::null()).stderr(Stdio::null());
        let server = Server(command.spawn().expect("start iperf3"));
        wait_for("iperf3 listens", Duration::from_secs(5), || {
            ns.run("ss -Hltn sport = :5201").contains("LISTEN").then_some(())
        });
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
