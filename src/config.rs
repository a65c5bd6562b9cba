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

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use thiserror::Error;

use crate::cni::install;
use crate::snapshot::service::Protocol;
use crate::snapshot::{PeerLane, PublicKey};
use crate::state::annotations::{self, Announcement};
use crate::state::compile::{EncapPolicy, Settings};
use crate::state::problem::quote;
use crate::state::services::ServiceSettings;
use crate::state::source::kube::access::{KUBELET_KUBECONFIGS, SERVICE_ACCOUNT};
use crate::state::source::kube::{AccessSettings, ServerUrl};
use crate::state::source::manifest::is_dns_name;
use crate::status::client::DEFAULT_RUN_DIR;

mod file;
mod flags;

pub use file::environment_warnings;
pub use flags::{
    AgentArgs, BindArg, Cli, Command, EncapArg, EndpointArg, FolderArg, LanesArg, Masquerade, ServicesArg,
    SourceSpec, Switch, UnderlayMtu,
};

use file::{merge, read_file};

const DEFAULT_STATE_DIR: &str = "/var/lib/warren";
const DEFAULT_CONF_DIR: &str = "/etc/cni/net.d";
const DEFAULT_CONF_NAME: &str = "05-warren.conflist";
/// kube-proxy's: `--healthz-bind-address` and `--metrics-bind-address`.
const DEFAULT_HEALTHZ: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 10256);
/// WireGuard's port, but TCP, and only for this node's kubelet.
const DEFAULT_PROBE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), annotations::DEFAULT_PORT);
const DEFAULT_PROXY_MODE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// Where a kubelet and an API server listen on a node's own address.
const KUBELET: u16 = 10_250;
const API_SERVER: u16 = 6_443;
const DEFAULT_VXLAN_PORT: u16 = 8472; // Linux's own default, and Flannel's; IANA's 4789 is rarer there

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
    /// How the API server is reached.
    pub access: AccessSettings,
    /// Where `/readyz` and `/livez` answer.
    pub probe: Option<SocketAddr>,
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
    /// How many processors this process may use.
    pub processors: usize,
    /// How many lanes.
    pub lanes: u16,
    /// Whether each keeps to one processor.
    pub pin_lanes: bool,
    /// What is announced as endpoints instead of the Node's addresses.
    pub endpoints: Vec<SocketAddr>,
    /// Keepalive that is asked for.
    pub keepalive: u16,
    /// From which age on keys are changed by themselves.
    pub rotate_keys: Option<Duration>,
    /// MTU of the underlay.
    pub underlay_mtu: UnderlayMtu,
    /// Who does Services.
    pub services: ServicesArg,
    /// Which local addresses have node ports; empty: all but loopback.
    pub nodeport_ranges: Vec<IpNet>,
    /// Whether 127.0.0.0/8 has them.
    pub nodeport_localhost: bool,
    /// Whether `spec.externalIPs` is obeyed.
    pub external_ips: bool,
    /// Where `/healthz` answers.
    pub healthz: Option<SocketAddr>,
    /// Where `/proxyMode` answers.
    pub proxy_mode: Option<SocketAddr>,
    /// The runtime's CNI folders.
    pub cni: CniConfig,
    /// The tunnel device's name.
    pub tun_name: String,
    /// Masquerading of pods.
    pub masquerade: Masquerade,
    /// Folder of keys and state.
    pub state_dir: PathBuf,
    /// Folder of sockets.
    pub run_dir: PathBuf,
    /// Whether to wait for another agent's end.
    pub standby: bool,
    /// Which agent this is, where several may stand by; empty where that cannot be.
    pub instance: String,
    /// Log filter.
    pub log: String,
    /// Whether to clean up and end.
    pub cleanup: bool,
    /// Whether to wait for a signal after that.
    pub stay: bool,
    /// Offloads.
    pub offloads: Offloads,
}

/// How Warren comes into the container runtime's network configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniConfig {
    /// Where a list of plugins is kept; `None`: nowhere.
    pub conf_dir: Option<PathBuf>,
    /// Where plugins are.
    pub bin_dir: PathBuf,
    /// Our own list's name.
    pub conf_name: String,
}

impl CniConfig {
    /// On Kubernetes a node has no network before there is such a list. A folder of objects may be used on machines
    /// that have a runtime for other things.
    fn resolve(
        dir: Option<FolderArg>,
        bin_dir: Option<PathBuf>,
        name: Option<String>,
        source: Option<&SourceSpec>,
    ) -> CniConfig {
        let usual = match source {
            Some(SourceSpec::Kube) => Some(PathBuf::from(DEFAULT_CONF_DIR)),
            Some(SourceSpec::Dir(_)) | None => None,
        };
        CniConfig {
            conf_dir: dir.map_or(usual, |dir| dir.0),
            bin_dir: bin_dir.unwrap_or_else(|| install::DEFAULT_BIN_DIR.into()),
            conf_name: name.unwrap_or_else(|| DEFAULT_CONF_NAME.to_owned()),
        }
    }
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
    /// No name was given, and the machine's does not serve.
    #[error("{reason}; give this machine's Node with --node")]
    HostName {
        /// Why not.
        reason: String,
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

impl ConfigError {
    /// Whether what was written makes no sense, so that trying again would not help. A file may still come (its
    /// disk is not mounted yet), and a host name too.
    pub fn is_usage(&self) -> bool {
        match self {
            ConfigError::Syntax { .. } | ConfigError::UnknownKey { .. } | ConfigError::Value { .. } => true,
            ConfigError::Read { .. } | ConfigError::HostName { .. } => false,
        }
    }
}

impl AgentConfig {
    /// Takes flags and environment (`args`), the file and the defaults together.
    pub fn resolve(args: AgentArgs) -> Result<AgentConfig, ConfigError> {
        let args = match &args.config {
            Some(path) => merge(args.clone(), read_file(path)?),
            None => args,
        };
        let node = match args.node {
            Some(node) => given_name(node)?,
            None => host_name()?,
        };
        let service = service_address();
        let in_pod = || service.is_some() || Path::new(SERVICE_ACCOUNT).join("token").exists();
        let source = match args.source {
            None if !args.cleanup && in_pod() => Some(SourceSpec::Kube),
            source => source,
        };
        if source.is_none() && !args.cleanup {
            let reason =
                "where do the cluster's objects come from? Give --source kube on a node of Kubernetes, or \
                          --source dir:PATH"
                    .to_owned();
            return Err(ConfigError::Value { setting: "source".to_owned(), reason });
        }
        let port = args.port.unwrap_or(annotations::DEFAULT_PORT);
        let vxlan_port = args.vxlan_port.unwrap_or(DEFAULT_VXLAN_PORT);
        let processors = processors();
        let lanes = match args.lanes.unwrap_or(LanesArg::Auto) {
            LanesArg::Fixed(lanes) => lanes,
            LanesArg::Auto => lanes_for(processors).min(free_ports(port, vxlan_port)),
        };
        let on = |no: Option<bool>| !no.unwrap_or(false);
        let endpoint = |arg: EndpointArg| SocketAddr::new(arg.address, arg.port.unwrap_or(port));
        let state_dir = args.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into());
        let access = AccessSettings {
            kubeconfig: args.kubeconfig,
            servers: args.api_server.unwrap_or_default(),
            kubelet: match args.kubelet_kubeconfig {
                Some(path) => vec![path],
                None => KUBELET_KUBECONFIGS.map(PathBuf::from).to_vec(),
            },
            service,
            account: SERVICE_ACCOUNT.into(),
            saved: state_dir.join("api-servers.json"),
        };
        let probe = match (args.probe_bind_address, &source) {
            (Some(arg), _) => arg.0,
            (None, Some(SourceSpec::Kube)) => Some(DEFAULT_PROBE),
            (None, Some(SourceSpec::Dir(_)) | None) => None,
        };
        let cni =
            CniConfig::resolve(args.cni_conf_dir, args.cni_bin_dir, args.cni_conf_name, source.as_ref());
        let config = AgentConfig {
            source,
            node,
            access,
            probe,
            cluster_ranges: args.cluster_cidr.unwrap_or_default(),
            service_ranges: args.service_cidr.unwrap_or_default(),
            location: args.location,
            encap: args.encap.unwrap_or(EncapArg::WireGuard).into(),
            port,
            vxlan_port,
            vni: args.vni.unwrap_or(1),
            processors,
            lanes,
            pin_lanes: args.pin_lanes.unwrap_or(false),
            endpoints: args.endpoint.unwrap_or_default().into_iter().map(endpoint).collect(),
            keepalive: args.keepalive.unwrap_or(0),
            rotate_keys: args
                .rotate_keys
                .filter(|days| *days > 0)
                .map(|days| Duration::from_secs(u64::from(days) * 86_400)),
            underlay_mtu: args.underlay_mtu.unwrap_or(UnderlayMtu::Auto),
            services: args.services.unwrap_or(ServicesArg::Auto),
            nodeport_ranges: args.nodeport_addresses.unwrap_or_default(),
            nodeport_localhost: args.nodeport_localhost.unwrap_or(false),
            external_ips: args.external_ips.unwrap_or(Switch::On) == Switch::On,
            healthz: args.healthz_bind_address.map_or(Some(DEFAULT_HEALTHZ), |arg| arg.0),
            proxy_mode: args.proxy_mode_bind_address.map_or(Some(DEFAULT_PROXY_MODE), |arg| arg.0),
            cni,
            tun_name: args.tun_name.unwrap_or_else(|| "warren0".to_owned()),
            masquerade: args.masquerade.unwrap_or(Masquerade::On),
            state_dir,
            run_dir: args.run_dir.unwrap_or_else(|| DEFAULT_RUN_DIR.into()),
            standby: args.standby.unwrap_or(false),
            instance: args.instance.unwrap_or_default(),
            log: args.log.unwrap_or_else(|| "info".to_owned()),
            cleanup: args.cleanup,
            stay: args.stay,
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
    pub fn settings(&self, keys: &[PublicKey], mac: [u8; 6], underlay_mtu: u16) -> Settings {
        let lanes = keys.iter().zip(self.port..).map(|(key, port)| PeerLane { key: *key, port });
        let encaps = self.encap.encaps();
        Settings {
            node: self.node.clone(),
            encap: self.encap,
            announcement: Announcement {
                lanes: lanes.collect(),
                ordinary: false,
                also: Vec::new(),
                endpoints: self.endpoints.clone(),
                location: self.location.clone(),
                encaps,
                vxlan_mac: encaps.vxlan.then_some(mac),
                keepalive: self.keepalive,
                services: self.services != ServicesArg::Off,
            },
            vxlan_port: self.vxlan_port,
            vni: self.vni,
            mac,
            underlay_mtu,
            cluster_ranges: self.cluster_ranges.clone(),
            service_ranges: self.service_ranges.clone(),
            services: ServiceSettings {
                enabled: self.services != ServicesArg::Off,
                external_ips: self.external_ips,
                protected_ports: self.protected_ports(),
            },
        }
    }

    /// Ports of a node's addresses that no Service may capture.
    pub(crate) fn protected_ports(&self) -> BTreeSet<(Protocol, u16)> {
        let lanes = (0..self.lanes).map(|lane| (Protocol::Udp, self.port.saturating_add(lane)));
        let vxlan = [(Protocol::Udp, self.vxlan_port)];
        let answers = [self.healthz, self.proxy_mode, self.probe].into_iter().flatten().map(|at| at.port());
        let tcp = [KUBELET, API_SERVER].into_iter().chain(answers).map(|port| (Protocol::Tcp, port));
        lanes.chain(vxlan).chain(tcp).collect()
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

/// What Kubernetes tells every container of the Service `kubernetes`.
fn service_address() -> Option<ServerUrl> {
    let host = std::env::var("KUBERNETES_SERVICE_HOST").ok()?;
    let port =
        std::env::var("KUBERNETES_SERVICE_PORT_HTTPS").or_else(|_| std::env::var("KUBERNETES_SERVICE_PORT"));
    // An address, unless somebody has put a name there.
    let host = match host.parse::<IpAddr>() {
        Ok(address) => address.to_string(),
        Err(_) => Some(host.to_lowercase()).filter(|name| is_dns_name(name))?,
    };
    let port = port.ok().and_then(|port| port.parse().ok()).filter(|port| *port > 0).unwrap_or(443);
    Some(ServerUrl { host, port })
}

/// How many lanes so many processors get: the other half is for the pods, and one lane does several Gbit/s.
fn lanes_for(processors: usize) -> u16 {
    const MOST: usize = 4;
    (processors / 2).clamp(1, MOST) as u16
}

/// How many processors this process may use, by its affinity and its CPU quota.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How many lanes have a port of their own from `port` on. What is too few for one is [`AgentConfig::check`]'s.
fn free_ports(port: u16, vxlan: u16) -> u16 {
    let end = if vxlan > port { vxlan } else { u16::MAX };
    (end - port).max(1)
}

fn given_name(name: String) -> Result<String, ConfigError> {
    let lower = name.to_lowercase();
    let reason = match (is_dns_name(&name), is_dns_name(&lower)) {
        (true, _) => return Ok(name),
        (false, true) => format!("{} is no Node's name: these are in lower case; {lower}?", quote(&name)),
        (false, false) => {
            format!("{} is no Node's name: these have letters, digits, hyphens and dots", quote(&name))
        }
    };
    Err(ConfigError::Value { setting: "node".to_owned(), reason })
}

/// The host name, in lower case as the kubelet registers it.
fn host_name() -> Result<String, ConfigError> {
    let read = std::fs::read_to_string("/proc/sys/kernel/hostname");
    let wrong = |reason| ConfigError::HostName { reason };
    let name = read.map_err(|error| wrong(format!("the host name cannot be read ({error})")))?;
    let name = name.trim().to_lowercase();
    match is_dns_name(&name) {
        true => Ok(name),
        false => Err(wrong(format!("the host name {} is no Node's name", quote(&name)))),
    }
}

#[cfg(test)]
mod tests;
