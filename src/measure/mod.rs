//! `warren bench`: what the way between two nodes or pods carries, and what a tunnel of Warren's own lanes would.
//!
//! One side waits (`serve`), the other asks (`ask`), and decides what is done next:
//!
//! 1. `door`, `secret`: both prove, over one TCP connection, that they know the token that `serve` printed
//! 2. `line`, `message`: that connection is the control connection. It carries who wants what, public keys and
//!    counts; if it is silent for 2.5 s, both sides end (`ending`)
//! 3. `burrow`: for `wireguard` and `vxlan` both build one end of a private tunnel, in network namespaces of
//!    their own, out of the agent's own lanes (`io::fleet`); for `path` there is nothing to build
//! 4. `plan`: the figures of each way, one after the other; `streams` and `datagrams` make the traffic (the asker's
//!    in `site`), `meter` and `stats` count it
//! 5. `progress` while it goes on, `report` at the end
//!
//! Nothing is changed on either machine, and nothing stays behind.

mod ask;
mod burrow;
mod datagrams;
mod door;
mod ending;
mod line;
mod message;
mod meter;
mod plan;
mod progress;
mod report;
mod secret;
mod serve;
mod site;
mod stats;
mod streams;

use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::str::FromStr;
use std::thread;

use clap::{Args, Subcommand};
use nix::sys::signal::{SigSet, Signal};

use crate::state::problem::quote;
use ending::Ending;
use message::{MAX_SECONDS, MAX_STREAMS};
pub use plan::Way;
pub use secret::Token;

/// Where the serving side waits, TCP and UDP; the tunnels have the two UDP ports after it.
const PORT: u16 = 5187;
/// The same inside a tunnel.
const INSIDE: u16 = PORT;
/// How a shell calls an end by SIGINT.
const INTERRUPTED: u8 = 130;

const EXAMPLES: &str = "\
Examples:
  From node to node, as root (an agent may run or not, nothing of it is disturbed):
    cellar#  warren bench serve
    attic#   warren bench 192.168.1.12 --token TOKEN
  What the mesh carries, from pod to pod; only `path`, as such pods may not make tunnels:
    kubectl run bench-a --image=IMAGE --restart=Never -- bench serve
    kubectl logs bench-a                                   # says the token
    kubectl get pod bench-a -o wide                        # says address and node; let the other be elsewhere:
    kubectl run bench-b --image=IMAGE --restart=Never --rm -it \\
      --overrides='{\"spec\":{\"nodeName\":\"NODE-B\"}}' -- bench ADDRESS --token TOKEN
    kubectl delete pod bench-a
  From node to node of a cluster, everything: both pods with --privileged and
      --overrides='{\"spec\":{\"nodeName\":\"NODE\",\"hostNetwork\":true}}'
  Quickly, and only the tunnels, for a program:
    warren bench 192.168.1.12 --token TOKEN --seconds 1 --only wireguard,vxlan --json

Open in the firewall of the serving side: TCP 5187, UDP 5187 (path), 5188 (WireGuard), 5189 (VXLAN; in both \
sides'). The tunnels need root, or CAP_NET_ADMIN and CAP_SYS_ADMIN with /dev/net/tun, on both sides; without, the \
table says so and `path` is measured.

A tunnel has one lane on each side. Agents have one for every two processors, up to four, and `warren agent --lanes N` \
says otherwise: one stream goes over one lane there too, but several streams go over several, so where an agent has \
more than one, the mesh carries more of these than the tunnels here.

The token keeps strangers out. It does not make the way safe: who can change packets between the two could go on in \
your place once the token was proven. Run it inside a network that you trust.";

/// `warren bench`.
#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_help = EXAMPLES)]
pub struct BenchArgs {
    /// The serving side.
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    /// Where `warren bench serve` waits; an address, as names are not looked up
    #[arg(value_name = "ADDRESS[:PORT]", required = true)]
    pub address: Option<Target>,
    /// What `warren bench serve` printed
    #[arg(long, env = "WARREN_BENCH_TOKEN", hide_env_values = true)]
    pub token: Option<Token>,
    /// How long each figure is measured
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_SECONDS)))]
    pub seconds: u16,
    /// Connections of the figure with many
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_STREAMS)))]
    pub streams: u8,
    /// Only these ways, and exit status 1 if one of them cannot be measured [default: all, tunnels if they can be made]
    #[arg(long, value_name = "WAY,...", value_delimiter = ',', value_enum)]
    pub only: Vec<Way>,
    /// Send from there to here where it is the other way round, and the other way round
    #[arg(long)]
    pub reverse: bool,
    /// UDP port of this side's end of a WireGuard tunnel, VXLAN has the next [default: the next two after ADDRESS's
    /// port, or any if they are taken]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=65534))]
    pub port: Option<u16>,
    /// Print one JSON document on stdout; what is seen meanwhile goes to stderr
    #[arg(long)]
    pub json: bool,
}

/// The serving side.
#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// Wait for the other side, and do what it asks if it knows the token
    Serve(ServeArgs),
}

/// `warren bench serve`.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Where to wait, TCP and UDP [default: port 5187 of all addresses]
    #[arg(long, value_name = "[ADDRESS:]PORT", default_value = "5187", hide_default_value = true)]
    pub listen: Listen,
    /// UDP port of WireGuard, VXLAN has the next [default: the next after --listen's]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=65534))]
    pub port: Option<u16>,
    /// What the other side must know [default: a new one, printed]
    #[arg(long, env = "WARREN_BENCH_TOKEN", hide_env_values = true)]
    pub token: Option<Token>,
    /// End when one measurement is over
    #[arg(long)]
    pub once: bool,
}

/// Where somebody serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target(pub SocketAddr);

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        let alone = || bare.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, PORT));
        let target =
            text.parse().ok().or_else(alone).filter(|at| at.port() != 0 && !at.ip().is_unspecified());
        target.map(Target).ok_or_else(|| {
            format!("{} is not ADDRESS or ADDRESS:PORT, like 192.0.2.7 or [2001:db8::7]:5187", quote(text))
        })
    }
}

/// Where to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen(pub SocketAddr);

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        let any = |port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
        let at = text.parse().ok().or_else(|| text.parse().ok().map(any));
        // The tunnels have the two ports after it.
        let at = at.filter(|at| (1..=65533).contains(&at.port()));
        at.map(Listen).ok_or_else(|| {
            format!("{} is not PORT or ADDRESS:PORT, like 5187 or 192.0.2.7:5187", quote(text))
        })
    }
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// It did not work, and what to do.
    #[error("{0}")]
    Failed(String),
    /// The system refused a call.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl MeasureError {
    fn io(doing: &'static str) -> impl Fn(io::Error) -> MeasureError {
        move |source| MeasureError::System { doing, source }
    }
}

/// Runs either side. To be called before the program has started any thread: signals are blocked for all.
pub fn run(args: &BenchArgs) -> Result<ExitCode, MeasureError> {
    let end = Ending::default();
    follow_signals(&end)?;
    if let Some(BenchCommand::Serve(serve)) = &args.command {
        serve::serve(serve, &end)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(Target(at)) = args.address else {
        return Err(MeasureError::Usage("where does `warren bench serve` wait? See --help".to_owned()));
    };
    let report = match ask::ask(args, at, &end) {
        Ok(report) => report,
        // Before anything was measured.
        Err(error) if end.is_raised() => {
            progress::write(&format!("{error}\n"));
            return Ok(ExitCode::from(INTERRUPTED));
        }
        Err(error) => return Err(error),
    };
    let text = match args.json {
        false => report.table(),
        true => {
            let json = serde_json::to_string_pretty(&report);
            json.map_err(io::Error::from).map_err(MeasureError::io("write JSON"))? + "\n"
        }
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(MeasureError::io("write to stdout"))?;
    Ok(match end.is_raised() {
        true => ExitCode::from(INTERRUPTED),
        false if report.is_whole(&args.only) => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// The first signal ends the measurement, the second the program. Waited for rather than handled, as the first
/// process of a container has no default action.
fn follow_signals(end: &Ending) -> Result<(), MeasureError> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    let wrong = MeasureError::io("wait for signals");
    signals.thread_block().map_err(|e| wrong(e.into()))?;
    let end = end.clone();
    let follow = move || {
        if signals.wait().is_ok() {
            end.raise("stopped by a signal");
        }
        if signals.wait().is_ok() {
            std::process::exit(i32::from(INTERRUPTED));
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(follow).map(drop).map_err(wrong)
}

/// UDP ports of WireGuard and VXLAN.
fn tunnel_ports(wanted: Option<u16>, control: u16) -> [u16; 2] {
    let first = wanted.unwrap_or(control.saturating_add(1));
    [first, first.saturating_add(1)]
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Outer {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn parse(words: &[&str]) -> Result<BenchArgs, clap::Error> {
        Outer::try_parse_from(std::iter::once(&"bench").chain(words)).map(|outer| outer.bench)
    }

    #[test]
    fn an_address_is_all_that_is_needed_beside_the_token() {
        let args = parse(&["192.0.2.7", "--token", "twelve-chars"]).expect("valid");
        assert_eq!(args.address, Some(Target("192.0.2.7:5187".parse().expect("an address"))));
        assert_eq!((args.seconds, args.streams, args.only.len()), (5, 4, 0));
        let only = parse(&["[2001:db8::7]:9", "--only", "vxlan,path"]).expect("valid");
        assert_eq!(only.only, [Way::Vxlan, Way::Path]);
        assert!(parse(&[]).is_err(), "nobody to ask");
    }

    #[test]
    fn serve_needs_nothing() {
        let args = parse(&["serve"]).expect("valid");
        let Some(BenchCommand::Serve(serve)) = args.command else { panic!("not serve: {args:?}") };
        assert_eq!(serve.listen, Listen("[::]:5187".parse().expect("an address")));
        assert!(!serve.once && serve.token.is_none());
        assert!(parse(&["serve", "--listen", "192.0.2.7:9000", "--once", "--port", "7000"]).is_ok());
        assert!(parse(&["192.0.2.7", "serve"]).is_err(), "both sides at once");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for words in [
            &["example.org"][..],
            &["0.0.0.0"],
            &["192.0.2.7:0"],
            &["192.0.2.7", "--seconds", "0"],
            &["192.0.2.7", "--seconds", "61"],
            &["192.0.2.7", "--streams", "65"],
            &["192.0.2.7", "--only", "geneve"],
            &["192.0.2.7", "--token", "short"],
            &["serve", "--listen", "65534"],
            &["serve", "--listen", "0"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn ports_follow_one_another() {
        assert_eq!(tunnel_ports(None, PORT), [5188, 5189]);
        assert_eq!(tunnel_ports(Some(7000), PORT), [7000, 7001]);
    }
}
