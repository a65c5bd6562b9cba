//! Which API servers to try, as whom, and whom to believe.
//!
//! | from | tried | TLS name | credentials |
//! |---|---|---|---|
//! | `--kubeconfig` | alone (or the addresses of `--api-server`) | as it says | its own |
//! | `--api-server` | alone, in order | the host, else `kubernetes.default.svc` | the service account's |
//! | the kubelet's kubeconfig | 1st | as it says, else `kubernetes.default.svc` | the service account's |
//! | the endpoints of `kubernetes`, saved last time | 2nd | `kubernetes.default.svc` | the service account's |
//! | `KUBERNETES_SERVICE_HOST` | last: it may need our own data path | `kubernetes.default.svc` | the service account's |
//!
//! Every API server's certificate has `kubernetes.default.svc`, and only an API server's has it: what the cluster's
//! own authority signed for that name may be believed at any address. All files are read again for every
//! connection, because all of them change while the agent runs: tokens every hour, authorities sometimes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::http::{HeaderValue, Uri};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::config::Cluster as ClusterEntry;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use secrecy::ExposeSecret as _;
use tokio::time::Instant;

use super::files::{
    MAX_FILE, add_roots, authority_pem, has_authority, identity, read_file, read_kubeconfig, read_token, tls,
};
use crate::state::blocking::blocking;
use crate::state::durable;
use crate::state::problem::quote;

/// The name that every API server's certificate has.
pub(super) const IN_CLUSTER_NAME: &str = "kubernetes.default.svc";
/// Where Kubernetes puts a pod's token and the cluster's authority.
pub const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where kubelets keep theirs: kubeadm's, kube-up's and other scripts', k3s'.
pub const KUBELET_KUBECONFIGS: [&str; 3] = [
    "/etc/kubernetes/kubelet.conf",
    "/var/lib/kubelet/kubeconfig",
    "/var/lib/rancher/k3s/agent/kubelet.kubeconfig",
];
/// The label that a slice of `kubernetes` has beside its name.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Most saved endpoints; a control plane has three or five.
const MAX_SAVED: usize = 7;
/// How long a token is used before its file is read again: the kubelet replaces it long before it expires.
const TOKEN_LIFE: Duration = Duration::from_secs(20);
const SAVED_VERSION: u32 = 1;

/// An API server's address: `https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerUrl {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl ServerUrl {
    fn address(address: SocketAddr) -> ServerUrl {
        ServerUrl { host: address.ip().to_string(), port: address.port() }
    }

    /// `HOST:PORT`, as in a URL.
    pub(super) fn authority(&self) -> String {
        match self.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(_)) => format!("[{}]:{}", self.host, self.port),
            Ok(IpAddr::V4(_)) | Err(_) => format!("{}:{}", self.host, self.port),
        }
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority())
    }
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<ServerUrl, String> {
        let wrong = |why: &str| format!("{} is not https://HOST or https://HOST:PORT: {why}", quote(text));
        let uri: Uri = text.trim().parse().map_err(|_| wrong("it is no URL"))?;
        match uri.scheme_str() {
            Some("https") => {}
            Some("http") => return Err(wrong("without TLS a token would be given away")),
            Some(_) | None => return Err(wrong("it does not begin with https://")),
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong("it has a path, and an API server behind one is not supported"));
        }
        let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("it has a user"));
        }
        let host = authority.host();
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        // Whatever cannot be in a certificate cannot be verified.
        if host.is_empty() || ServerName::try_from(host).is_err() {
            return Err(wrong("that is no host's name or address"));
        }
        match authority.port_u16() {
            Some(0) => Err(wrong("port 0")),
            None if authority.port().is_some() => Err(wrong("that is no port")),
            port => Ok(ServerUrl { host: host.to_owned(), port: port.unwrap_or(443) }),
        }
    }
}

/// Where the API server and the credentials may be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessSettings {
    /// `--kubeconfig`: instead of the service account.
    pub kubeconfig: Option<PathBuf>,
    /// `--api-server`: instead of looking for it.
    pub servers: Vec<ServerUrl>,
    /// The kubelet's kubeconfigs, the first that serves: for address and authority, never credentials.
    pub kubelet: Vec<PathBuf>,
    /// `KUBERNETES_SERVICE_HOST` and `_PORT`.
    pub service: Option<ServerUrl>,
    /// The folder of the service account's `token` and `ca.crt`.
    pub account: PathBuf,
    /// Where the endpoints of `kubernetes` are saved.
    pub saved: PathBuf,
}

/// One API server to try.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) server: ServerUrl,
    /// The names that its certificate may have, the first one being asked for first.
    pub(super) names: Vec<ServerName<'static>>,
    pub(super) tls: Arc<ClientConfig>,
    /// Where we have it from, in words.
    pub(super) from: String,
    /// Those of a lower rank come first.
    pub(super) rank: u8,
}

/// What to try, and what there would have been to try.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    pub(super) list: Vec<Candidate>,
    /// Why others are not in it.
    pub(super) left_out: Vec<String>,
}

/// Knows the settings, and what the files say now.
#[derive(Debug)]
pub(super) struct Access {
    settings: AccessSettings,
    token: Mutex<Option<(Instant, Option<HeaderValue>)>>,
    /// The endpoints of `kubernetes`, by slice.
    known: Mutex<BTreeMap<String, BTreeSet<SocketAddr>>>,
}

impl Access {
    pub(super) fn new(settings: AccessSettings) -> Access {
        Access { settings, token: Mutex::default(), known: Mutex::default() }
    }

    /// What requests call the server; the connection's own checks use other names.
    pub(super) fn authority(&self) -> String {
        self.settings.servers.first().map_or_else(|| IN_CLUSTER_NAME.to_owned(), ServerUrl::authority)
    }

    /// What there is to try now.
    pub(super) async fn candidates(&self) -> Candidates {
        let settings = self.settings.clone();
        blocking(move || settings.candidates()).await
    }

    /// The header that says who we are; none where a client certificate does.
    pub(super) async fn authorization(&self) -> Result<Option<HeaderValue>, String> {
        let fresh = |(read, header): &(Instant, Option<HeaderValue>)| {
            (read.elapsed() < TOKEN_LIFE).then(|| header.clone())
        };
        let known = self.token.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(fresh);
        if let Some(header) = known {
            return Ok(header);
        }
        let settings = self.settings.clone();
        let header = blocking(move || settings.authorization()).await?;
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), header.clone()));
        Ok(header)
    }

    /// The server does not know us: the next request reads the token again.
    pub(super) fn refused(&self) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Learns the endpoints in slices of `default/kubernetes` (none: the slice is gone), and saves what changed.
    pub(super) async fn learn(&self, news: Vec<(String, BTreeSet<SocketAddr>)>, all: bool) -> io::Result<()> {
        let addresses: BTreeSet<SocketAddr> = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let before = known.clone();
            if all {
                known.clear();
            }
            for (name, found) in news {
                known.remove(&name);
                if !found.is_empty() && known.len() < MAX_SAVED {
                    known.insert(name, found);
                }
            }
            match *known == before {
                true => return Ok(()),
                false => known.values().flatten().copied().take(MAX_SAVED).collect(),
            }
        };
        // A control plane that has no endpoint at the moment will have one of these again.
        if addresses.is_empty() {
            return Ok(());
        }
        let path = self.settings.saved.clone();
        blocking(move || match read_saved(&path) {
            Ok(saved) if saved == addresses => Ok(()),
            Ok(_) | Err(_) => save(&path, &addresses),
        })
        .await
    }
}

/// Whether the slice is one of the Service `default/kubernetes`.
pub(super) fn is_api_server(slice: &EndpointSlice) -> bool {
    let labels = slice.metadata.labels.as_ref();
    slice.metadata.namespace.as_deref() == Some("default")
        && labels.and_then(|labels| labels.get(SERVICE_NAME)).is_some_and(|name| name == "kubernetes")
}

/// Where such a slice says that they are.
pub(super) fn endpoints(slice: &EndpointSlice) -> BTreeSet<SocketAddr> {
    let ports = slice.ports.iter().flatten();
    let port =
        ports.filter(|port| port.name.as_deref().is_none_or(|name| name == "https" || name.is_empty()));
    let Some(port) = port.filter_map(|port| u16::try_from(port.port?).ok()).find(|port| *port > 0) else {
        return BTreeSet::new();
    };
    let addresses = slice.endpoints.iter().flatten().flat_map(|endpoint| &endpoint.addresses);
    let addresses = addresses.filter_map(|address| address.parse::<IpAddr>().ok());
    addresses.take(MAX_SAVED).map(|address| SocketAddr::new(address, port)).collect()
}

fn save(path: &Path, addresses: &BTreeSet<SocketAddr>) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        durable::private_folder(folder)?;
    }
    let body = serde_json::to_vec(addresses)?;
    durable::replace(path, &durable::seal("api-servers", SAVED_VERSION, &body), 0o600)
}

fn read_saved(path: &Path) -> Result<BTreeSet<SocketAddr>, String> {
    let bytes = durable::read(path, MAX_FILE).map_err(|error| error.to_string())?;
    let Some(bytes) = bytes else { return Ok(BTreeSet::new()) };
    let body = durable::unseal("api-servers", SAVED_VERSION, &bytes)?;
    let addresses: BTreeSet<SocketAddr> = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    Ok(addresses.into_iter().filter(|address| address.port() > 0).take(MAX_SAVED).collect())
}

impl AccessSettings {
    fn candidates(&self) -> Candidates {
        let mut found = Candidates::default();
        match &self.kubeconfig {
            Some(path) => self.those_of_kubeconfig(path, &mut found),
            None => self.those_of_pod(&mut found),
        }
        found
    }

    fn those_of_kubeconfig(&self, path: &Path, found: &mut Candidates) {
        let from = path.display().to_string();
        let read = || {
            let (cluster, user) = read_kubeconfig(path)?;
            let mut roots = RootCertStore::empty();
            add_roots(&mut roots, &authority_pem(&cluster)?)?;
            let identity = identity(&user)?;
            Ok::<_, String>((cluster, tls(roots, identity)?))
        };
        let (cluster, tls) = match read() {
            Ok(read) => read,
            Err(reason) => return found.left_out.push(format!("{from}: {reason}")),
        };
        if self.servers.is_empty() {
            return found.entry(&cluster, &from, 0, &tls);
        }
        for server in &self.servers {
            found.add(server, None, "--api-server", 0, &tls);
        }
    }

    fn those_of_pod(&self, found: &mut Candidates) {
        let authority = self.account.join("ca.crt");
        let roots = read_file(&authority).and_then(|pem| {
            let mut roots = RootCertStore::empty();
            add_roots(&mut roots, &pem).map(|()| roots)
        });
        let (roots, plain) = match roots.and_then(|roots| Ok((roots.clone(), tls(roots, None)?))) {
            Ok(both) => both,
            Err(reason) => return found.left_out.push(format!("{}: {reason}", authority.display())),
        };
        for server in &self.servers {
            found.add(server, None, "--api-server", 0, &plain);
        }
        if !self.servers.is_empty() {
            return;
        }
        self.those_of_kubelet(found, &roots);
        match read_saved(&self.saved) {
            Ok(saved) => {
                for address in turned(saved.into_iter().collect()) {
                    let server = ServerUrl::address(address);
                    found.add(&server, Some(IN_CLUSTER_NAME), "the endpoints seen last time", 1, &plain);
                }
            }
            Err(reason) => found.left_out.push(format!("{}: {reason}", self.saved.display())),
        }
        match &self.service {
            Some(server) => found.add(server, Some(IN_CLUSTER_NAME), "KUBERNETES_SERVICE_HOST", 2, &plain),
            None => found.left_out.push("KUBERNETES_SERVICE_HOST is not set".to_owned()),
        }
    }

    fn those_of_kubelet(&self, found: &mut Candidates, roots: &RootCertStore) {
        for path in &self.kubelet {
            let from = path.display().to_string();
            match path.try_exists() {
                Ok(true) => {}
                Ok(false) => {
                    found.left_out.push(format!("{from} is not there"));
                    continue;
                }
                Err(error) => {
                    found.left_out.push(format!("{from}: {error}"));
                    continue;
                }
            }
            let cluster = match read_kubeconfig(path) {
                Ok((cluster, _)) => cluster,
                Err(reason) => {
                    found.left_out.push(format!("{from}: {reason}"));
                    continue;
                }
            };
            // The service account names the cluster's authority too: where the kubelet's is a file that cannot be read
            // from here, the address is good all the same.
            let mut all = roots.clone();
            let more = match has_authority(&cluster) {
                true => authority_pem(&cluster).and_then(|pem| add_roots(&mut all, &pem)),
                false => Ok(()),
            };
            if let Err(reason) = more {
                found.left_out.push(format!("the authority in {from}: {reason}"));
            }
            match tls(all, None) {
                Ok(tls) => return found.entry(&cluster, &from, 0, &tls),
                Err(reason) => found.left_out.push(format!("{from}: {reason}")),
            }
        }
    }

    fn authorization(&self) -> Result<Option<HeaderValue>, String> {
        let token = match &self.kubeconfig {
            None => Some(read_token(&self.account.join("token"))?),
            Some(path) => {
                let (_, user) = read_kubeconfig(path)?;
                match (&user.token, &user.token_file) {
                    (Some(token), _) => Some(token.expose_secret().to_owned()),
                    (None, Some(file)) => Some(read_token(Path::new(file))?),
                    (None, None) => None,
                }
            }
        };
        let Some(token) = token else { return Ok(None) };
        let mut header = HeaderValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| "the token has characters that no token has".to_owned())?;
        header.set_sensitive(true);
        Ok(Some(header))
    }
}

impl Candidates {
    fn entry(&mut self, cluster: &ClusterEntry, from: &str, rank: u8, tls: &Arc<ClientConfig>) {
        match cluster.server.as_deref().unwrap_or_default().parse() {
            Ok(server) => self.add(&server, cluster.tls_server_name.as_deref(), from, rank, tls),
            Err(reason) => self.left_out.push(format!("{from}: {reason}")),
        }
    }

    fn add(&mut self, server: &ServerUrl, name: Option<&str>, from: &str, rank: u8, tls: &Arc<ClientConfig>) {
        if self.list.iter().any(|known| known.server == *server) {
            return;
        }
        let mut names: Vec<ServerName<'static>> = Vec::new();
        for name in [name.unwrap_or(&server.host), IN_CLUSTER_NAME] {
            match ServerName::try_from(name.to_owned()) {
                Ok(name) if names.contains(&name) => {}
                Ok(name) => names.push(name),
                Err(_) => self.left_out.push(format!("{from}: {} can be no server's name", quote(name))),
            }
        }
        let (server, tls) = (server.clone(), Arc::clone(tls));
        self.list.push(Candidate { server, names, tls, from: from.to_owned(), rank });
    }
}

/// Begins at a place of its own, so that a thousand agents do not all ask the first of three servers.
fn turned(mut addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    if let Some(first) = usize::try_from(super::random(addresses.len() as u64)).ok().filter(|at| *at > 0) {
        addresses.rotate_left(first);
    }
    addresses
}
