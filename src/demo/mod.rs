//! `warren demo`: several nodes with pods on this one machine, in network namespaces, no Kubernetes needed.
//!
//! How it stands up, and why nothing of it can stay behind:
//!
//! 1. `sandbox`: the process that the user started makes a PID namespace (as an ordinary user inside a user
//!    namespace) and starts its first process, the *stage*. It only waits from then on. When either of the two
//!    ends, however it ends, the kernel kills everything in the PID namespace, and with the last process the
//!    anonymous namespaces, their devices, nft tables and the tmpfs that holds the files are gone.
//! 2. `world`: the stage builds the underlay, the nodes and the pods with `link`, and starts one
//!    `agents` process per node, fed from a folder of Kubernetes YAML, which `services` keeps in step. One
//!    more pod is the cluster's `dns`.
//! 3. `scenes` and `service_scenes`: what is shown, on the `stage`, in plain words through `report`; the
//!    packets come from `traffic`, a tiny server and client that run inside the pods.
//! 4. `attach`: `warren demo enter POD` and `warren demo stop`, for a demo that was started with `--keep`.

mod agents;
mod attach;
mod dns;
mod internal;
mod link;
mod report;
mod sandbox;
mod scenes;
mod service_scenes;
mod services;
mod stage;
mod traffic;
mod world;

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

use crate::snapshot::Encap;

/// Several nodes with pods on this one machine, in network namespaces; no Kubernetes needed.
#[derive(Args, Clone, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  \
        warren demo                          three nodes, both encapsulations, then everything is gone again\n  \
        warren demo --nodes 5 --encap vxlan  five nodes, VXLAN only\n  \
        warren demo --keep                   leave it up until Ctrl-C or `warren demo stop`\n  \
        warren demo enter pod-1a             a shell inside a pod of a demo that was started with --keep\n  \
        warren demo enter outside            and on a machine beside the nodes, which knows no pods\n  \
        warren demo --json > report.json     for programs; the words go to stderr\n\n\
        Nothing of it is visible outside: it all lives in namespaces of its own and ends with this command."
)]
pub struct DemoArgs {
    /// What to do with a demo that is already up.
    #[command(subcommand)]
    pub command: Option<DemoCommand>,
    /// What the demo looks like.
    #[command(flatten)]
    pub options: DemoOptions,
}

/// What the demo looks like.
#[derive(Args, Clone, Debug)]
pub struct DemoOptions {
    /// How many nodes, with two pods each.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=32))]
    pub nodes: u8,
    /// How packets between nodes are wrapped; `auto` shows one after the other.
    #[arg(long, value_enum, default_value_t = DemoEncap::Auto)]
    pub encap: DemoEncap,
    /// MTU of the network between the nodes.
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u16).range(1280..))]
    pub mtu: u16,
    /// Leave the nodes and pods up until Ctrl-C or `warren demo stop`.
    #[arg(long)]
    pub keep: bool,
    /// Print one JSON document on stdout; the words go to stderr.
    #[arg(long)]
    pub json: bool,
}

/// Which encapsulations are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DemoEncap {
    /// Encrypted.
    Wireguard,
    /// Plain.
    Vxlan,
    /// Both, one after the other.
    Auto,
}

impl DemoEncap {
    /// The encapsulations to show, in order.
    const fn shown(self) -> &'static [Encap] {
        match self {
            DemoEncap::Wireguard => &[Encap::WireGuard],
            DemoEncap::Vxlan => &[Encap::Vxlan],
            DemoEncap::Auto => &[Encap::WireGuard, Encap::Vxlan],
        }
    }
}

/// What to do with a demo that is already up.
#[derive(Subcommand, Clone, Debug)]
pub enum DemoCommand {
    /// Run a shell, or a command, inside a pod or node of a demo that was started with --keep.
    Enter(attach::EnterArgs),
    /// Remove a demo that was started with --keep.
    Stop(attach::StopArgs),
    /// The processes that the demo itself is made of.
    #[command(hide = true)]
    Internal(internal::InternalArgs),
}

/// Why there is no demo.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The machine does not let this user build it.
    #[error("{what}\n  {fix}")]
    Forbidden {
        /// What was refused.
        what: String,
        /// What to do about it.
        fix: String,
    },
    /// A request that cannot be met as it stands.
    #[error("{0}")]
    Usage(String),
    /// The system refused a call.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The kernel refused a change of links, addresses or routes.
    #[error("{doing}: {source}")]
    Network {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        source: Box<rtnetlink::Error>,
    },
    /// A process of the demo did not do what it is for.
    #[error("{who} {what}{}", tail(.log))]
    Process {
        /// Which one.
        who: String,
        /// What happened.
        what: String,
        /// The last lines it wrote.
        log: String,
    },
}

impl DemoError {
    fn system(doing: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        DemoError::System { doing: doing.into(), source: source.into() }
    }
}

fn tail(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("; the last it wrote:\n{log}") }
}

/// Runs the demo, or one of its parts.
///
/// To be called before the program has started any thread: the kernel lets only a single-threaded process
/// enter a user namespace, and a process that made a PID namespace start no thread afterwards.
pub fn run(args: DemoArgs) -> Result<ExitCode, DemoError> {
    match args.command {
        None => sandbox::supervise(&args.options),
        Some(DemoCommand::Enter(enter)) => attach::enter(&enter),
        Some(DemoCommand::Stop(stop)) => attach::stop(&stop),
        Some(DemoCommand::Internal(part)) => internal::run(part),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Outer {
        #[command(flatten)]
        demo: DemoArgs,
    }

    fn parse(words: &[&str]) -> Result<DemoArgs, clap::Error> {
        Outer::try_parse_from(std::iter::once(&"demo").chain(words)).map(|outer| outer.demo)
    }

    #[test]
    fn defaults_are_three_nodes_and_both_encapsulations() {
        let args = parse(&[]).expect("no flag is needed");
        assert_eq!(args.options.nodes, 3);
        assert_eq!(args.options.encap.shown(), &[Encap::WireGuard, Encap::Vxlan]);
        assert_eq!(args.options.mtu, 1500);
        assert!(!args.options.keep && !args.options.json && args.command.is_none());
    }

    #[test]
    fn one_node_and_a_tiny_mtu_are_refused() {
        assert!(parse(&["--nodes", "1"]).is_err());
        assert!(parse(&["--mtu", "1279"]).is_err());
        assert!(parse(&["--encap", "geneve"]).is_err());
    }

    #[test]
    fn enter_takes_a_command_with_its_own_flags() {
        let args = parse(&["enter", "pod-1a", "ping", "-c", "1", "10.244.2.2"]).expect("valid");
        let Some(DemoCommand::Enter(enter)) = args.command else { panic!("not enter: {args:?}") };
        assert_eq!(enter.place, "pod-1a");
        assert_eq!(enter.command, ["ping", "-c", "1", "10.244.2.2"]);
    }

    #[test]
    fn flags_of_the_demo_do_not_mix_with_stop() {
        assert!(parse(&["--nodes", "3", "stop"]).is_err());
    }
}
