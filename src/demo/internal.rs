//! The processes that the demo is made of: our own program again, under a hidden command.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Args, Subcommand};
use nix::sched::{CloneFlags, setns};

use super::dns::{self, DnsArgs, LookupArgs};
use super::traffic::download::{self, DownloadArgs};
use super::traffic::spread::{self, SpreadArgs};
use super::traffic::{AskArgs, EavesdropArgs, MeasureArgs, ServeArgs, client, eavesdrop, server};
use super::{DemoError, DemoOptions, sandbox, scenes};

/// One process of the demo.
#[derive(Args, Clone, Debug)]
pub struct InternalArgs {
    /// The process whose network, mounts and host name this one shares.
    #[arg(long, value_name = "PID")]
    join: Option<i32>,
    #[command(subcommand)]
    part: Part,
}

/// Which one.
#[derive(Subcommand, Clone, Debug)]
enum Part {
    /// Builds the world and plays the scenes; the first process of the PID namespace.
    Stage(DemoOptions),
    /// Keeps the namespaces of a pod or node alive, as Kubernetes' pause container does.
    Hold {
        /// Pod or node.
        name: String,
        /// A node's own /run.
        #[arg(long)]
        run_folder: Option<PathBuf>,
        /// A pod's own /etc/resolv.conf.
        #[arg(long)]
        resolv_conf: Option<PathBuf>,
    },
    /// Becomes another program.
    Exec {
        /// Program and arguments.
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// A container that answers.
    Serve(ServeArgs),
    /// A container that asks one that answers.
    Ask(AskArgs),
    /// Somebody who listens in between the nodes.
    Eavesdrop(EavesdropArgs),
    /// Asks one address many times, and counts who answers.
    Spread(SpreadArgs),
    /// Downloads through a Service, one from each endpoint.
    Download(DownloadArgs),
    /// The cluster's DNS.
    Dns(DnsArgs),
    /// Asks a DNS server for the addresses of a name.
    Lookup(LookupArgs),
    /// How much fits through.
    Throughput(MeasureArgs),
    /// How long one byte takes there and back.
    Latency(MeasureArgs),
}

/// Runs one process of the demo.
pub(super) fn run(args: InternalArgs) -> Result<ExitCode, DemoError> {
    if let Some(pid) = args.join {
        join(pid)?;
    }
    match args.part {
        Part::Stage(options) => {
            sandbox::settle()?;
            scenes::play(&options)
        }
        Part::Hold { name, run_folder, resolv_conf } => {
            hold(&name, run_folder.as_deref(), resolv_conf.as_deref())
        }
        Part::Exec { command } => exec(&command),
        Part::Serve(args) => server::serve(&args).map(|()| ExitCode::SUCCESS),
        Part::Ask(args) => answer(&client::ask(&args)),
        Part::Eavesdrop(args) => answer(&eavesdrop::listen(&args)),
        Part::Spread(args) => answer(&spread::spread(&args)),
        Part::Download(args) => answer(&download::download(&args)),
        Part::Dns(args) => dns::server::serve(&args).map(|()| ExitCode::SUCCESS),
        Part::Lookup(args) => answer(&dns::client::look_up(&args)),
        Part::Throughput(args) => answer(&client::throughput(&args)),
        Part::Latency(args) => answer(&client::latency(&args)),
    }
}

fn join(pid: i32) -> Result<(), DemoError> {
    let open = |kind: &str| {
        let path = format!("/proc/{pid}/ns/{kind}");
        File::open(&path).map_err(|e| DemoError::system(format!("opening {path}"), e))
    };
    // All opened first: after the mount namespace has changed, /proc may be another one.
    let spaces = [
        (open("net")?, CloneFlags::CLONE_NEWNET),
        (open("uts")?, CloneFlags::CLONE_NEWUTS),
        (open("mnt")?, CloneFlags::CLONE_NEWNS),
    ];
    for (file, kind) in spaces {
        setns(file, kind).map_err(|e| DemoError::system(format!("joining process {pid}"), e))?;
    }
    Ok(())
}

fn hold(name: &str, run_folder: Option<&Path>, resolv_conf: Option<&Path>) -> Result<ExitCode, DemoError> {
    sandbox::settle_in_place(name, run_folder, resolv_conf)?;
    say("ready");
    // Until the stage lets go of the other end.
    let _ = io::stdin().read(&mut [0u8; 1]);
    Ok(ExitCode::SUCCESS)
}

fn exec(command: &[OsString]) -> Result<ExitCode, DemoError> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(DemoError::Usage("nothing to execute".into()));
    };
    let mut program_call = Command::new(program);
    if program == sandbox::OURSELVES {
        program_call.arg0("warren");
    }
    let error = program_call.args(arguments).exec();
    Err(DemoError::system(format!("executing {}", program.display()), error))
}

/// The answer for the stage: one line of JSON. A failure is an answer too.
fn answer<T: serde::Serialize>(result: &Result<T, String>) -> Result<ExitCode, DemoError> {
    let line = serde_json::to_string(result)
        .map_err(|e| DemoError::system("writing an answer", io::Error::from(e)))?;
    say(&line);
    Ok(ExitCode::SUCCESS)
}

/// Writes a line for the process that started us; if that is gone, so are we soon.
pub(super) fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}
