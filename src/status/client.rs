//! `warren status` and `warren peers`: ask the agent on this machine, print its answer.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use super::pb::status_client::StatusClient;
use super::{pb, render, server};

/// Where the agent keeps its socket unless told otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/warren";
/// Connecting and one answer; the agent's own deadlines are shorter.
const PATIENCE: Duration = Duration::from_secs(10);
/// Thousands of peers fit; a broken agent cannot fill our memory.
const LARGEST_ANSWER: usize = 64 << 20;

/// Which agent to ask.
#[derive(Args, Clone, Debug)]
pub struct Target {
    /// The agent's run directory
    #[arg(long, value_name = "DIR", env = "WARREN_RUN_DIR", default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,
    /// The agent's socket, instead of warren.sock in the run directory
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print the agent's whole answer as JSON
    #[arg(long)]
    pub json: bool,
}

impl Target {
    /// The socket to ask.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| server::socket_path(&self.run_dir))
    }
}

/// Show this node: lanes, peers, drops, offloads, and what is wrong
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    /// Say only whether packets flow by this agent, and fail with the reason if not: for probes. In the agent's own pod
    /// one that stands by, while another agent has the node's network, is not ready
    #[arg(long, conflicts_with = "json")]
    pub ready: bool,
    /// The agent that is meant; any, if not given
    #[arg(long, value_name = "NAME", env = "WARREN_INSTANCE", hide = true, default_value = "")]
    pub instance: String,
    /// Which agent to ask
    #[command(flatten)]
    pub target: Target,
}

/// Show the other nodes: endpoint, encapsulation, MTU, last handshake, traffic
#[derive(Args, Clone, Debug)]
pub struct PeersArgs {
    /// Only peers whose name contains this
    #[arg(value_name = "NAME", default_value = "")]
    pub name: String,
    /// Show everything that is known of each peer
    #[arg(long, short)]
    pub verbose: bool,
    /// Which agent to ask
    #[command(flatten)]
    pub target: Target,
}

/// Change this node's WireGuard keys, or show them
#[derive(Args, Clone, Debug)]
pub struct KeysArgs {
    /// What to do [default: show]
    #[command(subcommand)]
    pub verb: Option<KeysVerb>,
    /// Which agent to ask
    #[command(flatten)]
    pub target: Target,
}

/// What `warren keys` can do.
#[derive(Subcommand, Clone, Debug)]
pub enum KeysVerb {
    /// Show the public key of each lane, and where a change stands
    Show,
    /// Begin a change: no packet is lost, no connection notices. The next keys are announced first, and used once
    /// the other nodes have had time to hear of them. A peer that is no Warren node has to be given the new key
    Rotate {
        /// How long the next keys are announced before they are used; the last ones are answered three times as long
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(2..=86_400))]
        overlap: u32,
    },
}

/// Why a command got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no agent is running here: nobody answers on {}\nStart it with `warren agent`; if it runs with a \
         --run-dir of its own, give the same here",
        .socket.display()
    )]
    NotRunning {
        /// The socket that was tried.
        socket: PathBuf,
    },
    /// Not allowed to ask.
    #[error("not allowed to ask the agent on {}: run this as the agent's user (root, usually)", .socket.display())]
    NotAllowed {
        /// The socket that was tried.
        socket: PathBuf,
    },
    /// The socket is there but cannot be used.
    #[error("cannot ask the agent on {}: {source}", .socket.display())]
    Connect {
        /// The socket that was tried.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something answered, but not as an agent does.
    #[error("the agent on {} gave no proper answer: {reason}\nIs it of another version, or overloaded?", .socket.display())]
    Answer {
        /// The socket that was tried.
        socket: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The agent knows nobody of that name.
    #[error("{node} knows no peer whose name contains \"{name}\"; `warren peers` lists all")]
    NoSuchPeer {
        /// The node that was asked.
        node: String,
        /// What was asked for.
        name: String,
    },
    /// The agent will not do it.
    #[error("the agent refuses: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
    },
    /// Packets do not flow by the agent that is meant.
    #[error("not ready: {reason}")]
    NotReady {
        /// Why.
        reason: String,
    },
    /// The answer could not be printed.
    #[error("cannot print the answer: {0}")]
    Print(#[from] io::Error),
}

/// Runs `warren status`.
pub fn status(args: &StatusArgs) -> Result<(), ClientError> {
    let socket = args.target.socket();
    let view = block_on(within(PATIENCE, &socket, fetch_view(&socket)))??;
    if args.ready {
        return ready(&view, &args.instance).and_then(print);
    }
    if args.target.json { print_json(&view) } else { print(&render::status(&view)) }
}

/// A word for a probe.
fn ready(view: &pb::NodeView, instance: &str) -> Result<&'static str, ClientError> {
    let reason = match view.ready {
        _ if !instance.is_empty() && view.instance != instance => {
            "another agent has this node's network, and this one stands by".to_owned()
        }
        true => return Ok("ready\n"),
        false => render::clean(&view.not_ready_reason),
    };
    Err(ClientError::NotReady { reason })
}

/// Runs `warren peers`.
pub fn peers(args: &PeersArgs) -> Result<(), ClientError> {
    let socket = args.target.socket();
    let answer = block_on(within(PATIENCE, &socket, fetch_peers(&socket, &args.name)))??;
    if answer.peers.is_empty() && !args.name.is_empty() {
        return Err(ClientError::NoSuchPeer { node: render::clean(&answer.node), name: args.name.clone() });
    }
    if args.target.json {
        return print_json(&answer);
    }
    print(&if args.verbose { render::peers_verbose(&answer) } else { render::peers(&answer) })
}

/// Runs `warren keys`.
pub fn keys(args: &KeysArgs) -> Result<(), ClientError> {
    let socket = args.target.socket();
    if let Some(KeysVerb::Rotate { overlap }) = args.verb {
        let stands = block_on(within(PATIENCE, &socket, rotate(&socket, overlap)))??;
        return match args.target.json {
            true => print_json(&stands),
            false => print(&format!("{}\n", render::clean(&stands.stands))),
        };
    }
    let view = block_on(within(PATIENCE, &socket, fetch_view(&socket)))??;
    if args.target.json {
        let lanes: Vec<_> = view.lanes.iter().map(|lane| &lane.public_key).collect();
        return print_json(&serde_json::json!({ "public_keys": lanes, "change": view.keys }));
    }
    print(&render::keys(&view))
}

/// Asks the agent on this socket for new keys.
pub async fn rotate(socket: &Path, overlap_seconds: u32) -> Result<pb::RotateKeysResponse, ClientError> {
    let mut client = connect(socket).await?;
    let answer = client.rotate_keys(pb::RotateKeysRequest { overlap_seconds }).await;
    match answer {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) if status.code() == tonic::Code::FailedPrecondition => {
            Err(ClientError::Refused { reason: render::clean(status.message()) })
        }
        Err(status) => Err(bad_answer(socket, &status)),
    }
}

/// Asks the agent on this socket for everything.
pub async fn fetch_view(socket: &Path) -> Result<pb::NodeView, ClientError> {
    let mut client = connect(socket).await?;
    let answer = client.get(pb::GetRequest {}).await.map_err(|status| bad_answer(socket, &status))?;
    answer
        .into_inner()
        .view
        .ok_or_else(|| ClientError::Answer { socket: socket.to_owned(), reason: "it is empty".to_owned() })
}

/// Asks the agent on this socket for its peers; only those whose name contains `name`.
pub async fn fetch_peers(socket: &Path, name: &str) -> Result<pb::PeersResponse, ClientError> {
    let mut client = connect(socket).await?;
    let request = pb::PeersRequest { name: name.to_owned() };
    let answer = client.peers(request).await.map_err(|status| bad_answer(socket, &status))?;
    Ok(answer.into_inner())
}

/// Whatever answers there, or does not, a command ends.
async fn within<T>(
    patience: Duration,
    socket: &Path,
    asking: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    let answer = tokio::time::timeout(patience, asking).await;
    answer.unwrap_or_else(|_| {
        let reason = format!("nothing came within {} s", patience.as_secs());
        Err(ClientError::Answer { socket: socket.to_owned(), reason })
    })
}

async fn connect(socket: &Path) -> Result<StatusClient<Channel>, ClientError> {
    // Once by hand, because the transport hides why it could not connect.
    UnixStream::connect(socket).await.map_err(|source| {
        let socket = socket.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning { socket },
            io::ErrorKind::PermissionDenied => ClientError::NotAllowed { socket },
            _ => ClientError::Connect { socket, source },
        }
    })?;
    let path = socket.to_owned();
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is not used: the connector knows where to go.
    let endpoint = Endpoint::from_static("http://warren.local");
    let channel = endpoint.connect_with_connector(connector).await;
    let channel = channel.map_err(|e| ClientError::Answer {
        socket: socket.to_owned(),
        reason: format!("it speaks no gRPC ({e})"),
    })?;
    Ok(StatusClient::new(channel).max_decoding_message_size(LARGEST_ANSWER))
}

fn bad_answer(socket: &Path, status: &tonic::Status) -> ClientError {
    ClientError::Answer {
        socket: socket.to_owned(),
        reason: format!("{}: {}", status.code(), render::clean(status.message())),
    }
}

fn block_on<F: Future>(future: F) -> io::Result<F::Output> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future))
}

fn print_json(message: &impl Serialize) -> Result<(), ClientError> {
    let mut text = serde_json::to_string_pretty(message).map_err(io::Error::from)?;
    text.push('\n');
    print(&text)
}

/// A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> Result<(), ClientError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    enum Cli {
        Status(StatusArgs),
        Peers(PeersArgs),
    }

    #[test]
    fn flags_as_a_person_gives_them() {
        Cli::command().debug_assert();
        let Ok(Cli::Peers(args)) =
            Cli::try_parse_from(["warren", "peers", "node-b", "--run-dir", "/x", "-v"])
        else {
            panic!("peers")
        };
        assert_eq!((args.name.as_str(), args.verbose), ("node-b", true));
        assert_eq!(args.target.socket(), Path::new("/x/warren.sock"));
        let Ok(Cli::Status(args)) =
            Cli::try_parse_from(["warren", "status", "--json", "--socket", "/y/z", "--run-dir", "/x"])
        else {
            panic!("status")
        };
        assert!(args.target.json);
        assert_eq!(args.target.socket(), Path::new("/y/z"));
    }

    #[test]
    fn the_commands_end_with_a_reason_whatever_listens() {
        let dir = tempfile::tempdir().unwrap();
        let target =
            |socket: &Path| Target { run_dir: PathBuf::new(), socket: Some(socket.to_owned()), json: false };
        let nobody = target(&dir.path().join("none.sock"));
        let missing =
            status(&StatusArgs { ready: true, instance: String::new(), target: nobody }).unwrap_err();
        assert!(matches!(missing, ClientError::NotRunning { .. }), "{missing}");

        // Not an agent: it takes the connection and hangs up.
        let path = dir.path().join("other.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let other = std::thread::spawn(move || {
            for stream in listener.incoming().take(2) {
                drop(stream);
            }
        });
        let args = PeersArgs { name: String::new(), verbose: false, target: target(&path) };
        let error = peers(&args).unwrap_err();
        assert!(matches!(error, ClientError::Answer { .. }), "{error}");
        other.join().unwrap();
    }

    #[test]
    fn a_probe_hears_of_its_own_agent_only() {
        let view = |ready, instance: &str| pb::NodeView {
            ready,
            instance: instance.to_owned(),
            not_ready_reason: "no pod range".to_owned(),
            ..pb::NodeView::default()
        };
        assert!(ready(&view(true, "one"), "one").is_ok() && ready(&view(true, ""), "").is_ok());
        for (agent, instance, word) in [
            (view(true, "one"), "two", "stands by"),
            (view(false, "one"), "one", "no pod range"),
            (view(true, ""), "two", "stands by"),
        ] {
            let error = ready(&agent, instance).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[tokio::test]
    async fn a_silent_agent_does_not_hang_the_command() {
        let asking = std::future::pending::<Result<(), ClientError>>();
        let error = within(Duration::ZERO, Path::new("/run/warren/warren.sock"), asking).await.unwrap_err();
        assert!(error.to_string().contains("nothing came within 0 s"), "{error}");
    }
}
