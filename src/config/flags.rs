//! The flags: their names, help, environment variables and what each accepts.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use tracing_subscriber::EnvFilter;

use crate::cni::install::{EXAMPLES as INSTALL_EXAMPLES, InstallArgs};
use crate::demo::DemoArgs;
use crate::measure::BenchArgs;
use crate::snapshot::MAX_LANES;
use crate::state::annotations;
use crate::state::compile::EncapPolicy;
use crate::state::convert::cluster_range;
use crate::state::problem::{nearest, one_line, quote};
use crate::state::source::kube::ServerUrl;
use crate::status::client::{KeysArgs, PeersArgs, StatusArgs};

const EXAMPLES: &str = "\
Examples:
  warren demo                                      three nodes with pods on this machine, no Kubernetes
  warren agent --source kube                       this node joins the pod network of its Kubernetes cluster
  warren agent --source dir:/etc/warren/objects    this machine joins the mesh that the folder describes
  warren status                                    what the agent on this machine is doing
  warren bench 192.168.1.12 --token TOKEN          how fast it is to where `warren bench serve` waits
  warren agent --cleanup                           take everything back out of the kernel";

const AGENT_EXAMPLES: &str = "\
Examples:
  Two machines at home, one folder kept in sync between them:
    warren agent --source dir:/srv/warren
  Plain VXLAN inside one location, WireGuard to all others:
    warren agent --source dir:/srv/warren --encap auto --location home
  A node of a Kubernetes cluster, with the credentials of a kubeconfig instead of a pod's:
    warren agent --source kube --kubeconfig /etc/warren/kubeconfig
  Behind a router that forwards UDP port 51820 to this machine:
    warren agent --source dir:/srv/warren --endpoint 203.0.113.7:51820

Each option can also come from the environment (shown as [env: ...]) or, under the option's own name, \
from the YAML file that --config names. A flag wins over the environment, that over the file.";

const KUBERNETES: &str = "Kubernetes (with --source kube)";
const CNI: &str = "CNI (k3s and MicroK8s have folders of their own: see warren install-cni --help)";
const OFFLOADS: &str = "Offloads (each is tried at start and left out by itself where it fails)";

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
    /// Change this node's WireGuard keys, or show them
    Keys(KeysArgs),
    /// Measure throughput, latency and processor time between two nodes or pods
    Bench(Box<BenchArgs>),
    /// Put the CNI plugin where this machine's container runtime looks for it
    #[command(after_help = INSTALL_EXAMPLES)]
    InstallCni(InstallArgs),
}

/// `warren agent`. Everything is optional here, because it may come from the file.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub struct AgentArgs {
    /// A YAML file with more settings; its keys are the names of these options
    #[arg(long, value_name = "FILE", env = "WARREN_CONFIG", help_heading = "Cluster")]
    pub config: Option<PathBuf>,
    /// Where the cluster's objects come from: kube, the Kubernetes API; or dir:PATH, a folder of Kubernetes YAML or
    /// JSON [default: kube in a pod, else none]
    #[arg(long, value_name = "kube|dir:PATH", env = "WARREN_SOURCE", help_heading = "Cluster")]
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

    /// Use the address, authority and credentials of this kubeconfig's current context [default: the pod's
    /// service account]
    #[arg(long, value_name = "FILE", env = "WARREN_KUBECONFIG", help_heading = KUBERNETES)]
    pub kubeconfig: Option<PathBuf>,
    /// API servers to try in turn. They must be reachable without Services, whose packets this agent carries
    /// [default: the server in the kubelet's kubeconfig, then the endpoints of the Service `kubernetes` seen last
    /// time, then KUBERNETES_SERVICE_HOST]
    #[arg(
        long,
        value_name = "https://HOST:PORT,...",
        env = "WARREN_API_SERVER",
        value_delimiter = ',',
        help_heading = KUBERNETES
    )]
    pub api_server: Option<Vec<ServerUrl>>,
    /// The kubelet's kubeconfig: the address and authority of the API server are read from it, never its
    /// credentials [default: the first there is of /etc/kubernetes/kubelet.conf, /var/lib/kubelet/kubeconfig,
    /// /var/lib/rancher/k3s/agent/kubelet.kubeconfig]
    #[arg(long, value_name = "FILE", env = "WARREN_KUBELET_KUBECONFIG", help_heading = KUBERNETES)]
    pub kubelet_kubeconfig: Option<PathBuf>,
    /// Where /readyz (200 once packets flow) and /livez answer, for a DaemonSet's probes; empty: nowhere
    /// [default: 127.0.0.1:51820 with --source kube, else nowhere]
    #[arg(long, value_name = "ADDRESS:PORT", env = "WARREN_PROBE_BIND_ADDRESS", help_heading = KUBERNETES)]
    pub probe_bind_address: Option<BindArg>,

    /// How packets to other nodes are wrapped [default: wireguard]
    #[arg(long, env = "WARREN_ENCAP", help_heading = "Tunnel")]
    pub encap: Option<EncapArg>,
    /// UDP port of WireGuard; lane n has the n-th port after it [default: 51820]
    // Not WARREN_PORT: Kubernetes sets that one in every pod beside a Service named `warren`.
    #[arg(long, env = "WARREN_LISTEN_PORT", value_parser = clap::value_parser!(u16).range(1..),
          help_heading = "Tunnel")]
    pub port: Option<u16>,
    /// UDP port of VXLAN, the same on all nodes [default: 8472]
    #[arg(long, value_name = "PORT", env = "WARREN_VXLAN_PORT",
          value_parser = clap::value_parser!(u16).range(1..), help_heading = "Tunnel")]
    pub vxlan_port: Option<u16>,
    /// VXLAN network identifier, the same on all nodes [default: 1]
    #[arg(long, env = "WARREN_VNI", value_parser = clap::value_parser!(u32).range(0..1 << 24),
          help_heading = "Tunnel")]
    pub vni: Option<u32>,
    /// How many threads move packets, each with its own port and key: 1 to 64, or auto for half of the processors
    /// that this process may use, 4 at most. Firewalls must let the port of each through [default: auto]
    #[arg(long, value_name = "auto|N", env = "WARREN_LANES", help_heading = "Tunnel")]
    pub lanes: Option<LanesArg>,
    /// Keep each lane on one processor, lane 0 on the first that this process may use. For machines with processors
    /// set apart for it; elsewhere the kernel finds better places
    #[arg(long, env = "WARREN_PIN_LANES", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = "Tunnel")]
    pub pin_lanes: Option<bool>,
    /// Where other nodes reach this one, ADDRESS or ADDRESS:PORT [default: the Node's addresses]
    #[arg(
        long,
        value_name = "ADDRESS,...",
        env = "WARREN_ENDPOINT",
        value_delimiter = ',',
        help_heading = "Tunnel"
    )]
    pub endpoint: Option<Vec<EndpointArg>>,
    /// Behind NAT or a stateful firewall, 25: seconds between keepalives, both ways, with every node, which this
    /// node then calls by itself [default: 0, none]
    #[arg(long, value_name = "SECONDS", env = "WARREN_KEEPALIVE",
          value_parser = clap::value_parser!(u16).range(0..=3600), help_heading = "Tunnel")]
    pub keepalive: Option<u16>,
    /// Change the node's WireGuard keys when they are so many days old; 0: only by `warren keys rotate`
    /// [default: 0]
    #[arg(long, value_name = "DAYS", env = "WARREN_ROTATE_KEYS",
          value_parser = clap::value_parser!(u16).range(0..=3650), help_heading = "Tunnel")]
    pub rotate_keys: Option<u16>,
    /// MTU of the network between the nodes, or auto [default: auto]
    #[arg(long, value_name = "auto|N", env = "WARREN_UNDERLAY_MTU", help_heading = "Tunnel")]
    pub underlay_mtu: Option<UnderlayMtu>,

    /// Who does Services: Warren (on), kube-proxy (off), or Warren where no kube-proxy has its rules (auto)
    /// [default: auto]
    #[arg(long, env = "WARREN_SERVICES", help_heading = "Services")]
    pub services: Option<ServicesArg>,
    /// Ranges of the node's addresses that have node ports [default: all its addresses but loopback]
    #[arg(long, value_name = "RANGE,...", env = "WARREN_NODEPORT_ADDRESSES", value_delimiter = ',',
          value_parser = nodeport_range, help_heading = "Services")]
    pub nodeport_addresses: Option<Vec<IpNet>>,
    /// Let 127.0.0.1 have node ports too, for programs on this machine; ::1 cannot
    #[arg(long, env = "WARREN_NODEPORT_LOCALHOST", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = "Services")]
    pub nodeport_localhost: Option<bool>,
    /// Whether spec.externalIPs of Services is obeyed. Whoever may write Services can take over the traffic of
    /// any address with it (CVE-2020-8554): off, unless you know who may [default: on]
    #[arg(long, value_name = "on|off", env = "WARREN_EXTERNAL_IPS", help_heading = "Services")]
    pub external_ips: Option<Switch>,
    /// Where /healthz and /livez answer, as kube-proxy's do; empty: nowhere [default: port 10256 of all addresses]
    #[arg(long, value_name = "ADDRESS:PORT", env = "WARREN_HEALTHZ_BIND_ADDRESS", help_heading = "Services")]
    pub healthz_bind_address: Option<BindArg>,
    /// Where /proxyMode answers, as kube-proxy's does; empty: nowhere [default: 127.0.0.1:10249]
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "WARREN_PROXY_MODE_BIND_ADDRESS",
        help_heading = "Services"
    )]
    pub proxy_mode_bind_address: Option<BindArg>,

    /// Where the container runtime looks for CNI configurations: the agent writes one there when packets flow, or
    /// puts warren-cni into the `bridge` or `ptp` one it finds; empty: leave it alone [default: empty]
    #[arg(long, value_name = "DIR", env = "WARREN_CNI_CONF_DIR", help_heading = CNI)]
    pub cni_conf_dir: Option<FolderArg>,
    /// Where the container runtime looks for CNI plugins [default: /opt/cni/bin]
    #[arg(long, value_name = "DIR", env = "WARREN_CNI_BIN_DIR", help_heading = CNI)]
    pub cni_bin_dir: Option<PathBuf>,
    /// The file that the agent writes there; a runtime takes the first by name [default: 05-warren.conflist]
    #[arg(long, value_name = "FILE", env = "WARREN_CNI_CONF_NAME", value_parser = conflist_name,
          help_heading = CNI)]
    pub cni_conf_name: Option<String>,

    /// Name of the tunnel device [default: warren0]
    #[arg(long, value_name = "NAME", env = "WARREN_TUN_NAME", value_parser = device_name,
          help_heading = "Host")]
    pub tun_name: Option<String>,
    /// Whether pods talk to the world from the node's address, also where nobody else sees to it
    /// [default: on]
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
    #[arg(long, value_name = "FILTER", env = "WARREN_LOG", value_parser = log_filter, help_heading = "Host")]
    pub log: Option<String>,
    /// If an agent already runs here, wait until it ends and go on then, instead of failing: in an update the new
    /// agent is there before the old one goes
    #[arg(long, env = "WARREN_STANDBY", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = "Host")]
    pub standby: Option<bool>,
    /// Which agent this is, where several may stand by on one machine: `warren status --ready` with the same answers
    /// for this one only. In Kubernetes the pod's UID
    #[arg(long, value_name = "NAME", env = "WARREN_INSTANCE", help_heading = "Host")]
    pub instance: Option<String>,
    /// Take everything that Warren ever put into this machine's kernel back out, say what, and end
    #[arg(long, help_heading = "Host")]
    pub cleanup: bool,
    /// With --cleanup: wait for a signal afterwards. A DaemonSet would start what ends again
    #[arg(long, requires = "cleanup", help_heading = "Host")]
    pub stay: bool,

    /// Do not take or give super-packets on the tunnel device
    #[arg(long, env = "WARREN_NO_TUN_GSO", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = OFFLOADS)]
    pub no_tun_gso: Option<bool>,
    /// Do not let the kernel cut what is sent
    #[arg(long, env = "WARREN_NO_UDP_GSO", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = OFFLOADS)]
    pub no_udp_gso: Option<bool>,
    /// Do not let the kernel join what is received
    #[arg(long, env = "WARREN_NO_UDP_GRO", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = OFFLOADS)]
    pub no_udp_gro: Option<bool>,
    /// Do not join packets before they are written to the tunnel device
    #[arg(long, env = "WARREN_NO_COALESCING", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = OFFLOADS)]
    pub no_coalescing: Option<bool>,
    /// Do not join runs of pure TCP acknowledgements
    #[arg(long, env = "WARREN_NO_ACK_COALESCING", num_args = 0..=1, default_missing_value = "true",
          require_equals = true, value_parser = BoolishValueParser::new(), value_name = "BOOL",
          hide_possible_values = true, help_heading = OFFLOADS)]
    pub no_ack_coalescing: Option<bool>,
}

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
    /// From the node's address; between pods of the cluster they keep their own
    On,
    /// Not by Warren: another program does it, or the network outside routes pods
    Off,
}

/// `--services`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ServicesArg {
    /// Warren, unless kube-proxy has its rules on this machine
    Auto,
    /// Warren, whoever else does
    On,
    /// Somebody else: only pods and nodes are connected
    Off,
}

impl ServicesArg {
    /// Its name in flags and reports.
    pub const fn name(self) -> &'static str {
        match self {
            ServicesArg::Auto => "auto",
            ServicesArg::On => "on",
            ServicesArg::Off => "off",
        }
    }
}

/// A setting that is on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Obeyed
    On,
    /// Not obeyed
    Off,
}

/// An address to listen on, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindArg(pub(super) Option<SocketAddr>);

impl FromStr for BindArg {
    type Err = String;

    fn from_str(text: &str) -> Result<BindArg, String> {
        if text.is_empty() {
            return Ok(BindArg(None));
        }
        let address: Option<SocketAddr> = text.parse().ok();
        let address = address.filter(|address| address.port() != 0);
        address.map(|address| BindArg(Some(address))).ok_or_else(|| {
            format!("{} is not ADDRESS:PORT like 0.0.0.0:10256 or [::]:10256, nor empty", quote(text))
        })
    }
}

/// A folder, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderArg(pub(super) Option<PathBuf>);

impl FromStr for FolderArg {
    type Err = String;

    fn from_str(text: &str) -> Result<FolderArg, String> {
        match text {
            "" => Ok(FolderArg(None)),
            // A relative one would depend on where the agent was started.
            _ if !text.starts_with('/') => Err(format!("{} does not begin with a slash", quote(text))),
            _ => Ok(FolderArg(Some(text.into()))),
        }
    }
}

/// A runtime reads only files whose names end so, and none of a folder below.
fn conflist_name(text: &str) -> Result<String, String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match text.strip_suffix(".conflist") {
        Some(stem)
            if !stem.is_empty() && !stem.starts_with('.') && text.len() <= 100 && stem.chars().all(fine) =>
        {
            Ok(text.to_owned())
        }
        Some(_) | None => Err("not a file name like 05-warren.conflist".to_owned()),
    }
}

/// Unlike a range of the cluster it may be a single address, or all.
fn nodeport_range(text: &str) -> Result<IpNet, String> {
    let single = || text.parse::<IpAddr>().map(IpNet::from);
    let range: IpNet = text
        .parse()
        .or_else(|_| single())
        .map_err(|_| format!("{} is not a range like 192.0.2.0/24, nor an address", quote(text)))?;
    match range.trunc() == range {
        true => Ok(range),
        false => Err(format!("{range} is not the beginning of its range; did you mean {}?", range.trunc())),
    }
}

/// `--source`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// A folder.
    Dir(PathBuf),
    /// The Kubernetes API.
    Kube,
}

impl std::fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SourceSpec::Dir(path) => write!(f, "dir:{}", path.display()),
            SourceSpec::Kube => f.write_str("kube"),
        }
    }
}

impl FromStr for SourceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<SourceSpec, String> {
        if text == "kube" {
            return Ok(SourceSpec::Kube);
        }
        match text.strip_prefix("dir:") {
            Some("") | None => Err(format!(
                "{} is neither kube, the Kubernetes API, nor dir:PATH, a folder of its objects",
                quote(text)
            )),
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

/// `--lanes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LanesArg {
    /// By the processors that this process may use.
    Auto,
    /// As given.
    Fixed(u16),
}

impl FromStr for LanesArg {
    type Err = String;

    fn from_str(text: &str) -> Result<LanesArg, String> {
        if text == "auto" {
            return Ok(LanesArg::Auto);
        }
        let lanes = text.parse().ok().filter(|lanes| (1..=MAX_LANES).contains(&usize::from(*lanes)));
        lanes.map(LanesArg::Fixed).ok_or_else(|| format!("neither auto nor a number from 1 to {MAX_LANES}"))
    }
}

/// `--endpoint`: without a port, the one of lane 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointArg {
    pub(super) address: IpAddr,
    pub(super) port: Option<u16>,
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

/// The filter's own parser takes every word that is no level for the name of a module.
fn log_filter(text: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let level = match part.rsplit_once('=') {
            // A value inside of a span's fields: `[span{field=value}]`.
            Some((_, value)) if value.contains([']', '}']) => continue,
            Some((_, level)) => level,
            None => part,
        };
        if !LEVELS.contains(&level.to_ascii_lowercase().as_str()) {
            let meant = nearest(level, LEVELS).map(|meant| format!("; did you mean {meant}?"));
            let meant = meant.unwrap_or_default();
            return Err(format!("{} is no level; there are: {}{meant}", quote(level), LEVELS.join(", ")));
        }
    }
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| one_line(&error.to_string()))
}
