//! Every flag, environment variable and file key, in one place.
//!
//! A flag wins over its environment variable, that over the file (`--config`), that over the default.
//! The file's keys are the flags' names, so there is one schema, and it is the one that `--help` shows:
//!
//! ```yaml
//! source: dir:/etc/warren/objects
//! encap: auto
//! location: home
//! cluster-cidr: [10.244.0.0/16, "fd00:244::/56"]
//! no-udp-gso: true
//! ```

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::builder::BoolishValueParser;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use serde_json::Value;
use thiserror::Error;

use crate::demo::DemoArgs;
use crate::snapshot::{MAX_LANES, PeerLane, PublicKey};
use crate::state::annotations::{self, Announcement};
use crate::state::compile::{EncapPolicy, Settings};
use crate::state::convert::cluster_range;
use crate::state::durable;
use crate::state::problem::{nearest, quote};
use crate::state::source::manifest::is_dns_name;
use crate::status::client::{DEFAULT_RUN_DIR, PeersArgs, StatusArgs};
use crate::tunnel::vxlan::mac_from_key;

const EXAMPLES: &str = "\
Examples:
  warren demo                                      three nodes with pods on this machine, no Kubernetes
  warren agent --source dir:/etc/warren/objects    this machine joins the mesh that the folder describes
  warren status                                    what the agent on this machine is doing
  warren agent --cleanup                           take everything back out of the kernel";

const AGENT_EXAMPLES: &str = "\
Examples:
  Two machines at home, one folder kept in sync between them:
    warren agent --source dir:/srv/warren
  Plain VXLAN inside one location, WireGuard to all others:
    warren agent --source dir:/srv/warren --encap auto --location home
  Behind a router that forwards UDP port 51820 to this machine:
    warren agent --source dir:/srv/warren --endpoint 203.0.113.7:51820

Each option can also come from the environment (shown as [env: ...]) or, under the option's own name, from the \
YAML file that --config names. A flag wins over the environment, that over the file.";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "warren", version, after_help = EXAMPLES, max_term_width = 110)]
#[command(about = "Pod network for Kubernetes clusters whose nodes cannot route pod traffic to each other")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `warren` can be told to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run this node's part of the mesh
    #[command(after_help = AGENT_EXAMPLES)]
    Agent(Box<AgentArgs>),
    /// Show a mesh of several nodes on this one machine, with no Kubernetes
    Demo(DemoArgs),
    /// Say what the agent on this machine is doing
    Status(StatusArgs),
    /// List the other nodes, and how each is reached
    Peers(PeersArgs),
}

/// `warren agent`. Everything is optional here, because it may come from the file.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub struct AgentArgs {
    /// A YAML file with more settings; its keys are the names of these options
    #[arg(long, value_name = "FILE", env = "WARREN_CONFIG", help_heading = "Cluster")]
    pub config: Option<PathBuf>,
    /// Where the cluster's objects come from: dir:PATH, a folder of Kubernetes YAML or JSON
    #[arg(long, value_name = "dir:PATH", env = "WARREN_SOURCE", help_heading = "Cluster")]
    pub source: Option<SourceSpec>,
    /// The name of this machine's Node object [default: the host name]
    #[arg(long, value_name = "NAME", env = "WARREN_NODE", help_heading = "Cluster")]
    pub node: Option<String>,
    /// Ranges that hold all pods of the cluster [default: the union of those seen]
    #[arg(long, value_name = "RANGE,...", env = "WARREN_CLUSTER_CIDR", value_delimiter = ',',
          value_parser = cluster_range, help_heading = "Cluster")]
    pub cluster_cidr: Option<Vec<IpNet>>,
    /// Ranges that hold all Services [default: what the ServiceCIDR objects say]
    #[arg(long, value_name = "RANGE,...", env = "WARREN_SERVICE_CIDR", value_delimiter = ',',
          value_parser = cluster_range, help_heading = "Cluster")]
    pub service_cidr: Option<Vec<IpNet>>,
    /// Where this node is: with --encap auto, nodes of one location use VXLAN among themselves
    #[arg(long, value_name = "WORD", env = "WARREN_LOCATION", value_parser = annotations::location,
          help_heading = "Cluster")]
    pub location: Option<String>,

    /// How packets to other nodes are wrapped [default: wireguard]
    #[arg(long, env = "WARREN_ENCAP", help_heading = "Tunnel")]
    pub encap: Option<EncapArg>,
    /// UDP port of WireGuard; lane n has the n-th port after it [default: 51820]
    // Not WARREN_PORT: Kubernetes sets that one in every pod beside a Service named `warren`.
    #[arg(long, env = "WARREN_LISTEN_PORT", value_parser = clap::value_parser!(u16).range(1..),
          help_heading = "Tunnel")]
    pub port: Option<u16>,
    /// UDP port of VXLAN, the same on all nodes [default: 8472]
    #[arg(long, value_name = "PORT", env = "WARREN_VXLAN_PORT", value_parser = clap::value_parser!(u16).range(1..),
          help_heading = "Tunnel")]
    pub vxlan_port: Option<u16>,
    /// VXLAN network identifier, the same on all nodes [default: 1]
    #[arg(long, env = "WARREN_VNI", value_parser = clap::value_parser!(u32).range(0..1 << 24),
          help_heading = "Tunnel")]
    pub vni: Option<u32>,
    /// How many threads move packets, each with its own port and key [default: 1]
    #[arg(long, value_name = "N", env = "WARREN_LANES",
          value_parser = clap::value_parser!(u16).range(1..=MAX_LANES as i64), help_heading = "Tunnel")]
    pub lanes: Option<u16>,
    /// Where other nodes reach this one, ADDRESS or ADDRESS:PORT [default: the Node's addresses]
    #[arg(
        long,
        value_name = "ADDRESS,...",
        env = "WARREN_ENDPOINT",
        value_delimiter = ',',
        help_heading = "Tunnel"
    )]
    pub endpoint: Option<Vec<EndpointArg>>,
    /// Seconds between keepalives that others send to this node (behind NAT: 25) [default: 0, none]
    #[arg(long, value_name = "SECONDS", env = "WARREN_KEEPALIVE",
          value_parser = clap::value_parser!(u16).range(0..=3600), help_heading = "Tunnel")]
    pub keepalive: Option<u16>,
    /// MTU of the network between the nodes, or auto [default: auto]
    #[arg(long, value_name = "auto|N", env = "WARREN_UNDERLAY_MTU", help_heading = "Tunnel")]
    pub underlay_mtu: Option<UnderlayMtu>,

    /// Name of the tunnel device [default: warren0]
    #[arg(long, value_name = "NAME", env = "WARREN_TUN_NAME", value_parser = device_name, help_heading = "Host")]
    pub tun_name: Option<String>,
    /// Whether pods talk to the world from the node's address; auto: unless somebody else does it
    /// [default: auto]
    #[arg(long, env = "WARREN_MASQUERADE", help_heading = "Host")]
    pub masquerade: Option<Masquerade>,
    /// Folder of what must survive a restart: keys, last state [default: /var/lib/warren]
    #[arg(long, value_name = "DIR", env = "WARREN_STATE_DIR", help_heading = "Host")]
    pub state_dir: Option<PathBuf>,
    /// Folder of sockets [default: /run/warren]
    #[arg(long, value_name = "DIR", env = "WARREN_RUN_DIR", help_heading = "Host")]
    pub run_dir: Option<PathBuf>,
    /// What to log: error, warn, info, debug, trace, or a filter like info,warren::state=debug
    /// [default: info]
    #[arg(long, value_name = "FILTER", env = "WARREN_LOG", help_heading = "Host")]
    pub log: Option<String>,
    /// Where metrics are served: ADDRESS:PORT or none [default: none]
    #[arg(long, value_name = "ADDRESS:PORT|none", env = "WARREN_METRICS", help_heading = "Host")]
    pub metrics: Option<MetricsArg>,
    /// Take everything that Warren ever put into this machine's kernel back out, say what, and end
    #[arg(long, help_heading = "Host")]
    pub cleanup: bool,

    /// Do not take or give super-packets on the tunnel device
    #[arg(long, env = "WARREN_NO_TUN_GSO", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = "Offloads (each is tried at start and left out by itself where it fails)")]
    pub no_tun_gso: Option<bool>,
    /// Do not let the kernel cut what is sent
    #[arg(long, env = "WARREN_NO_UDP_GSO", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = "Offloads (each is tried at start and left out by itself where it fails)")]
    pub no_udp_gso: Option<bool>,
    /// Do not let the kernel join what is received
    #[arg(long, env = "WARREN_NO_UDP_GRO", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = "Offloads (each is tried at start and left out by itself where it fails)")]
    pub no_udp_gro: Option<bool>,
    /// Do not join packets before they are written to the tunnel device
    #[arg(long, env = "WARREN_NO_COALESCING", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = "Offloads (each is tried at start and left out by itself where it fails)")]
    pub no_coalescing: Option<bool>,
    /// Do not join runs of pure TCP acknowledgements
    #[arg(long, env = "WARREN_NO_ACK_COALESCING", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = "Offloads (each is tried at start and left out by itself where it fails)")]
    pub no_ack_coalescing: Option<bool>,
}

const DEFAULT_STATE_DIR: &str = "/var/lib/warren";
const DEFAULT_VXLAN_PORT: u16 = 8472; // Linux's own default, and Flannel's; IANA's 4789 is rarer there
/// Largest configuration file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// `--encap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EncapArg {
    /// Encrypted, to everyone
    #[value(name = "wireguard")]
    WireGuard,
    /// Plain, to everyone: for networks that are trusted
    Vxlan,
    /// Plain inside a location, encrypted between locations
    Auto,
}

impl From<EncapArg> for EncapPolicy {
    fn from(arg: EncapArg) -> EncapPolicy {
        match arg {
            EncapArg::WireGuard => EncapPolicy::WireGuard,
            EncapArg::Vxlan => EncapPolicy::Vxlan,
            EncapArg::Auto => EncapPolicy::Auto,
        }
    }
}

/// `--masquerade`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Masquerade {
    /// Unless somebody else on this machine does it
    Auto,
    /// Always
    On,
    /// Never
    Off,
}

/// `--source`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// A folder.
    Dir(PathBuf),
}

impl FromStr for SourceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<SourceSpec, String> {
        match text.strip_prefix("dir:") {
            Some("") | None => {
                Err(format!("{} is not dir:PATH, a folder of Kubernetes objects", quote(text)))
            }
            Some(path) => Ok(SourceSpec::Dir(path.into())),
        }
    }
}

/// `--underlay-mtu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnderlayMtu {
    /// The smallest of the interfaces that lead to the peers.
    Auto,
    /// As given.
    Fixed(u16),
}

impl FromStr for UnderlayMtu {
    type Err = String;

    fn from_str(text: &str) -> Result<UnderlayMtu, String> {
        if text == "auto" {
            return Ok(UnderlayMtu::Auto);
        }
        // RFC 791 3.1: every host takes 576; a smaller link is a typing mistake.
        let mtu = text.parse().ok().filter(|mtu| *mtu >= 576);
        mtu.map(UnderlayMtu::Fixed).ok_or_else(|| "neither auto nor a number from 576 to 65535".to_owned())
    }
}

/// `--endpoint`: without a port, the one of lane 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointArg {
    address: IpAddr,
    port: Option<u16>,
}

impl FromStr for EndpointArg {
    type Err = String;

    fn from_str(text: &str) -> Result<EndpointArg, String> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse::<IpAddr>() {
            // Checked like one with a port; which port does not matter for that.
            annotations::endpoint(&SocketAddr::new(address, 1).to_string())?;
            return Ok(EndpointArg { address, port: None });
        }
        let endpoint = annotations::endpoint(text)?;
        Ok(EndpointArg { address: endpoint.ip(), port: Some(endpoint.port()) })
    }
}

/// `--metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsArg {
    /// Not served.
    None,
    /// Served here.
    At(SocketAddr),
}

impl FromStr for MetricsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<MetricsArg, String> {
        if text == "none" {
            return Ok(MetricsArg::None);
        }
        text.parse().map(MetricsArg::At).map_err(|_| "neither none nor ADDRESS:PORT".to_owned())
    }
}

/// Which offloads may be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// Super-packets on the tunnel device.
    pub tun_gso: bool,
    /// UDP segmentation on sending.
    pub udp_gso: bool,
    /// UDP coalescing on receiving.
    pub udp_gro: bool,
    /// Joining of packets before they are written to the tunnel device.
    pub coalescing: bool,
    /// Joining of pure TCP acknowledgements.
    pub ack_coalescing: bool,
}

/// The agent's settings, all layers taken together and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    /// Where objects come from; `None` only with `cleanup`.
    pub source: Option<SourceSpec>,
    /// This node's name.
    pub node: String,
    /// `--cluster-cidr`.
    pub cluster_ranges: Vec<IpNet>,
    /// `--service-cidr`.
    pub service_ranges: Vec<IpNet>,
    /// This node's location.
    pub location: Option<String>,
    /// Which encapsulations may be used.
    pub encap: EncapPolicy,
    /// Lane 0's UDP port.
    pub port: u16,
    /// VXLAN's UDP port.
    pub vxlan_port: u16,
    /// VXLAN network identifier.
    pub vni: u32,
    /// How many lanes.
    pub lanes: u16,
    /// What is announced as endpoints instead of the Node's addresses.
    pub endpoints: Vec<SocketAddr>,
    /// Keepalive that is asked for.
    pub keepalive: u16,
    /// MTU of the underlay.
    pub underlay_mtu: UnderlayMtu,
    /// The tunnel device's name.
    pub tun_name: String,
    /// Masquerading of pods.
    pub masquerade: Masquerade,
    /// Folder of keys and state.
    pub state_dir: PathBuf,
    /// Folder of sockets.
    pub run_dir: PathBuf,
    /// Log filter.
    pub log: String,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Whether to clean up and end.
    pub cleanup: bool,
    /// Offloads.
    pub offloads: Offloads,
}

/// Why the settings cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The file is not YAML of the right shape.
    #[error("configuration file {path}: {reason}")]
    Syntax {
        /// The file.
        path: String,
        /// What is wrong, with its line.
        reason: String,
    },
    /// The file has a key that does not exist.
    #[error("configuration file {path}: there is no setting {key}{hint}")]
    UnknownKey {
        /// The file.
        path: String,
        /// The key.
        key: String,
        /// What was probably meant.
        hint: String,
    },
    /// A setting has a value that it cannot have.
    #[error("{setting}: {reason}")]
    Value {
        /// Which.
        setting: String,
        /// Why, and what to do.
        reason: String,
    },
}

impl AgentConfig {
    /// Takes flags and environment (`args`), the file and the defaults together.
    pub fn resolve(args: AgentArgs) -> Result<AgentConfig, ConfigError> {
        let args = match &args.config {
            Some(path) => merge(args.clone(), read_file(path)?),
            None => args,
        };
        let node = match args.node {
            Some(node) => node,
            None => host_name()?,
        };
        if !is_dns_name(&node) {
            let reason = format!("{} is no Node's name; give it with --node", quote(&node));
            return Err(ConfigError::Value { setting: "node".to_owned(), reason });
        }
        if args.source.is_none() && !args.cleanup {
            let reason = "where do the cluster's objects come from? Give --source dir:PATH".to_owned();
            return Err(ConfigError::Value { setting: "source".to_owned(), reason });
        }
        let port = args.port.unwrap_or(annotations::DEFAULT_PORT);
        let on = |no: Option<bool>| !no.unwrap_or(false);
        let endpoint = |arg: EndpointArg| SocketAddr::new(arg.address, arg.port.unwrap_or(port));
        let config = AgentConfig {
            source: args.source,
            node,
            cluster_ranges: args.cluster_cidr.unwrap_or_default(),
            service_ranges: args.service_cidr.unwrap_or_default(),
            location: args.location,
            encap: args.encap.unwrap_or(EncapArg::WireGuard).into(),
            port,
            vxlan_port: args.vxlan_port.unwrap_or(DEFAULT_VXLAN_PORT),
            vni: args.vni.unwrap_or(1),
            lanes: args.lanes.unwrap_or(1),
            endpoints: args.endpoint.unwrap_or_default().into_iter().map(endpoint).collect(),
            keepalive: args.keepalive.unwrap_or(0),
            underlay_mtu: args.underlay_mtu.unwrap_or(UnderlayMtu::Auto),
            tun_name: args.tun_name.unwrap_or_else(|| "warren0".to_owned()),
            masquerade: args.masquerade.unwrap_or(Masquerade::Auto),
            state_dir: args.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            run_dir: args.run_dir.unwrap_or_else(|| DEFAULT_RUN_DIR.into()),
            log: args.log.unwrap_or_else(|| "info".to_owned()),
            metrics: match args.metrics {
                Some(MetricsArg::At(address)) => Some(address),
                Some(MetricsArg::None) | None => None,
            },
            cleanup: args.cleanup,
            offloads: Offloads {
                tun_gso: on(args.no_tun_gso),
                udp_gso: on(args.no_udp_gso),
                udp_gro: on(args.no_udp_gro),
                coalescing: on(args.no_coalescing),
                ack_coalescing: on(args.no_ack_coalescing),
            },
        };
        config.check()?;
        Ok(config)
    }

    /// What the state line needs of this, with what only the running agent knows.
    pub fn settings(&self, keys: &[PublicKey], underlay_mtu: u16) -> Settings {
        let lanes = keys.iter().zip(self.port..).map(|(key, port)| PeerLane { key: *key, port });
        let encaps = self.encap.encaps();
        let mac = mac_from_key(keys.first().unwrap_or(&[0; 32]));
        Settings {
            node: self.node.clone(),
            encap: self.encap,
            announcement: Announcement {
                lanes: lanes.collect(),
                next_lanes: Vec::new(),
                endpoints: self.endpoints.clone(),
                location: self.location.clone(),
                encaps,
                vxlan_mac: encaps.vxlan.then_some(mac),
                keepalive: self.keepalive,
            },
            vxlan_port: self.vxlan_port,
            vni: self.vni,
            mac,
            underlay_mtu,
            cluster_ranges: self.cluster_ranges.clone(),
            service_ranges: self.service_ranges.clone(),
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong =
            |setting: &str, reason: String| Err(ConfigError::Value { setting: setting.to_owned(), reason });
        let last = u32::from(self.port) + u32::from(self.lanes) - 1;
        if last > u32::from(u16::MAX) {
            return wrong("port", format!("{} lanes from port {} on go beyond 65535", self.lanes, self.port));
        }
        let encaps = self.encap.encaps();
        let vxlan = u32::from(self.vxlan_port);
        if encaps.wireguard && encaps.vxlan && (u32::from(self.port)..=last).contains(&vxlan) {
            return wrong(
                "vxlan-port",
                format!("{vxlan} is one of WireGuard's ports ({} to {last})", self.port),
            );
        }
        let overlaps = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
        for range in &self.cluster_ranges {
            if let Some(service) = self.service_ranges.iter().find(|service| overlaps(range, service)) {
                return wrong("service-cidr", format!("{service} overlaps the cluster range {range}"));
            }
        }
        if self.endpoints.len() > annotations::MAX_ENDPOINTS {
            return wrong("endpoint", format!("more than {}", annotations::MAX_ENDPOINTS));
        }
        Ok(())
    }
}

/// Environment variables that look like ours and are not: probably typing mistakes. Others may be
/// Kubernetes' own (every Service named `warren...` makes some) and are left alone.
pub fn environment_warnings(names: impl IntoIterator<Item = OsString>) -> Vec<String> {
    let known: Vec<String> = Cli::command()
        .get_subcommands()
        .flat_map(|command| command.get_arguments())
        .filter_map(|argument| argument.get_env()?.to_str().map(str::to_owned))
        .collect();
    let mut warnings: Vec<String> = names
        .into_iter()
        .filter_map(|name| name.into_string().ok())
        .filter(|name| name.starts_with("WARREN_") && !known.contains(name))
        .filter_map(|name| {
            let meant = nearest(&name, known.iter().map(String::as_str))?;
            Some(format!("environment variable {name} is not known; did you mean {meant}?"))
        })
        .collect();
    warnings.sort();
    warnings
}

/// The agent's arguments alone, so that the file goes through the same parser as the command line.
#[derive(Debug, Parser)]
#[command(name = "file", no_binary_name = true, disable_help_flag = true)]
struct FileArgs {
    #[command(flatten)]
    args: AgentArgs,
}

/// What may not stand in the file: it makes no sense there.
const NOT_IN_FILE: [&str; 2] = ["config", "cleanup"];

fn read_file(path: &Path) -> Result<AgentArgs, ConfigError> {
    let name = path.display().to_string();
    let read = std::fs::canonicalize(path).and_then(|real| durable::read(&real, MAX_FILE_BYTES));
    let bytes = match read {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Err(ConfigError::Read { path: name, error: io::ErrorKind::NotFound.into() }),
        Err(error) => return Err(ConfigError::Read { path: name, error }),
    };
    let text = String::from_utf8(bytes)
        .map_err(|_| ConfigError::Syntax { path: name.clone(), reason: "not UTF-8".to_owned() })?;
    parse_file(&name, &text)
}

fn parse_file(path: &str, text: &str) -> Result<AgentArgs, ConfigError> {
    let syntax = |reason: String| ConfigError::Syntax { path: path.to_owned(), reason };
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 8, max_aliases: 0, max_documents: 1 },
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        strict_booleans: true, // YAML 1.2: `on` and `off` are words, as --masquerade has them
        with_snippet: false,
    };
    let value: Value =
        serde_saphyr::from_str_with_options(text, options).map_err(|e| syntax(e.to_string()))?;
    let settings = match value {
        Value::Null => serde_json::Map::new(),
        Value::Object(settings) => settings,
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            return Err(syntax("must be settings like `encap: auto`".to_owned()));
        }
    };
    let known: Vec<String> = FileArgs::command()
        .get_arguments()
        .filter_map(|argument| argument.get_long().map(str::to_owned))
        .filter(|name| !NOT_IN_FILE.contains(&name.as_str()))
        .collect();
    let mut arguments = Vec::with_capacity(settings.len());
    for (key, value) in &settings {
        if !known.contains(key) {
            let hint = nearest(key, known.iter().map(String::as_str));
            let hint = hint.map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
            return Err(ConfigError::UnknownKey { path: path.to_owned(), key: quote(key), hint });
        }
        let text = scalar_or_list(value)
            .ok_or_else(|| syntax(format!("{key} must be one value or a list of them")))?;
        arguments.push(format!("--{key}={text}"));
    }
    let parsed = FileArgs::try_parse_from(arguments).map_err(|error| {
        // The first paragraph says what is wrong; the rest tells about a command line.
        let text = error.to_string();
        let reason = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        syntax(reason.replace("'--", "'"))
    })?;
    Ok(parsed.args)
}

fn scalar_or_list(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(on) => Some(on.to_string()),
        Value::Array(items) if items.iter().any(Value::is_array) => None,
        Value::Array(items) => {
            items.iter().map(scalar_or_list).collect::<Option<Vec<_>>>().map(|items| items.join(","))
        }
        Value::Null | Value::Object(_) => None,
    }
}

/// Each setting from `first` where it has it, else from `second`.
fn merge(first: AgentArgs, second: AgentArgs) -> AgentArgs {
    macro_rules! either {
        ($($field:ident),*) => {
            AgentArgs { cleanup: first.cleanup, $($field: first.$field.or(second.$field),)* }
        };
    }
    either!(
        config,
        source,
        node,
        cluster_cidr,
        service_cidr,
        location,
        encap,
        port,
        vxlan_port,
        vni,
        lanes,
        endpoint,
        keepalive,
        underlay_mtu,
        tun_name,
        masquerade,
        state_dir,
        run_dir,
        log,
        metrics,
        no_tun_gso,
        no_udp_gso,
        no_udp_gro,
        no_coalescing,
        no_ack_coalescing
    )
}

/// The host name, in lower case as the kubelet registers it.
fn host_name() -> Result<String, ConfigError> {
    let read = std::fs::read_to_string("/proc/sys/kernel/hostname");
    read.map(|name| name.trim().to_lowercase()).map_err(|error| ConfigError::Value {
        setting: "node".to_owned(),
        reason: format!("the host name cannot be read ({error}); give --node"),
    })
}

/// A name that the kernel accepts for a device (net/core/dev.c, dev_valid_name), and nft without quotes.
fn device_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good =
        !text.is_empty() && text.len() <= 15 && text != "." && text != ".." && text.chars().all(allowed);
    if good {
        Ok(text.to_owned())
    } else {
        Err("not a device name of at most 15 letters, digits and -_.".to_owned())
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
