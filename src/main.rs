//! The `warren` binary: parses the command line and calls the library.

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use tracing_subscriber::EnvFilter;
use warren::config::{AgentConfig, Cli, Command, environment_warnings};
use warren::measure::MeasureError;
use warren::{agent, cni, demo, measure, status};

/// How clap ends for a command line that makes no sense, and so do we.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // The CNI plugin is the same file under another name.
    if std::env::args_os().next().is_some_and(|name| Path::new(&name).ends_with(cni::PLUGIN)) {
        return cni::main();
    }
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Agent(args) => match AgentConfig::resolve(*args) {
            Ok(config) => run_agent(config),
            Err(error) if error.is_usage() => {
                fail(&error);
                return ExitCode::from(USAGE);
            }
            Err(error) => Err(error.into()),
        },
        Command::Demo(args) => return demo::run(args).unwrap_or_else(|error| fail(&error)),
        Command::Bench(args) => match measure::run(&args) {
            Ok(code) => return code,
            Err(error @ MeasureError::Usage(_)) => {
                fail(&error);
                return ExitCode::from(USAGE);
            }
            Err(error) => Err(error.into()),
        },
        Command::Status(args) => status::client::status(&args).map_err(Into::into),
        Command::Peers(args) => status::client::peers(&args).map_err(Into::into),
        Command::Keys(args) => status::client::keys(&args).map_err(Into::into),
        Command::InstallCni(args) => cni::install::run(&args).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&*error),
    }
}

fn run_agent(config: AgentConfig) -> Result<(), Box<dyn std::error::Error>> {
    start_log(&config.log)?;
    for warning in environment_warnings(std::env::vars_os()) {
        tracing::warn!("{warning}");
    }
    if !config.cleanup {
        return Ok(agent::run(config)?);
    }
    let cleaned = agent::cleanup(&config)?;
    match cleaned.removed.as_slice() {
        [] if cleaned.kept.is_empty() => println!("nothing of Warren's was found"),
        some => some.iter().for_each(|what| println!("removed {what}")),
    }
    cleaned.kept.iter().for_each(|what| println!("kept {what}"));
    if config.stay { wait_to_be_stopped() } else { Ok(()) }
}

/// By waiting for the signal and not by its default action, which the first process of a container does not have.
fn wait_to_be_stopped() -> Result<(), Box<dyn std::error::Error>> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    println!("waiting to be stopped");
    signals.wait()?;
    Ok(())
}

/// boringtun logs every expired session as an error, kube whatever a server answers, and the netlink crates that
/// nobody listens when the agent ends; what matters of that, Warren counts and says itself.
fn start_log(filter: &str) -> Result<(), Box<dyn std::error::Error>> {
    let filter = EnvFilter::try_new(format!(
        "boringtun=off,kube_client=off,kube_runtime=off,netlink_proto=error,{filter}"
    ))
    .map_err(|e| format!("--log {filter}: {e}; for example info, or warn,warren::state=debug"))?;
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(colours).with_target(false).init();
    Ok(())
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("warren: {error}");
    ExitCode::FAILURE
}
