//! The node's own network: everything that Warren puts into the kernel beside the tunnel device's
//! queues, made, compared, repaired and removed, all over netlink.
//!
//! 1. `links`: the tunnel device's MTU, addresses, and that it is up; where the pod bridges are.
//! 2. `sysctl`: forwarding, reverse-path filter, router advertisements.
//! 3. `routes`: what is routed into the tunnel, and the rule that sends marked replies there.
//! 4. `nft`: marks, masquerade, the filters against clear text; `services`: the ways in from outside;
//!    `foreign`: accepts in chains that drop.
//! 5. [`watch`](HostNetwork::watch): somebody removed something, it comes back.
//!
//! Before all, `proxy` looks whether kube-proxy has its rules here. [`HostNetwork::apply`] walks 1 to 4, compares before it writes, and says what it changed. The
//! socket belongs to the network namespace of the thread that called [`HostNetwork::open`], and so
//! do the sysctls of the thread that runs the futures: in a namespace, use a current-thread runtime.

mod elements;
mod error;
mod foreign;
mod greedy;
mod inherited;
mod legacy;
mod links;
mod nft;
mod nla;
mod proxy;
mod routes;
mod services;
mod stale;
mod sysctl;
mod watch;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use ipnet::IpNet;
use nlink::netlink::{Connection, Nftables};
use rtnetlink::packet_route::link::InfoKind;
use tokio::sync::watch as latest;
use tracing::debug;

pub use error::HostError;
pub use watch::HostEvent;

use crate::io::clock;
use crate::snapshot::Snapshot;
use crate::snapshot::service::{Listen, Protocol};
use elements::Elements;
use links::{Interfaces, PodBridge};

/// The bit of `ct mark` and packet mark that says: this flow came out of the tunnel.
///
/// Bit 12. Others' bits: the portmap plugin 0x2000, kube-proxy 0x4000 and 0x8000, Cilium 0x0f00 and
/// all above 0xffff, Calico 0xffff0000, Tailscale 0xff0000, AWS's plugin 0x80, Istio 0x539 and 0x111
/// as whole values, wg-quick 0xca6c as a whole value: none of them has this bit.
pub const MARK: u32 = 0x1000;

/// The routing table of marked packets: its only route is a default into the tunnel. Tailscale has
/// 52, wg-quick 51820, Cilium 2004 and 2005.
pub const TABLE: u32 = 22_354;

/// The policy rule's place: after `local` (0, or 100 where Cilium has moved it), before Tailscale's
/// rules (5210 to 5270) and the main table (32766).
pub const RULE_PRIORITY: u32 = 4_700;

/// The protocol number that our routes and rules carry (rtnetlink(7), RTPROT_*): free in
/// linux/rtnetlink.h and in iproute2's rt_protos.
pub const PROTOCOL: u8 = 87;

/// A range that is routed into the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelRoute {
    /// Where to: a cluster range, or one peer's pods.
    pub range: IpNet,
    /// The source of the node's own packets that go there.
    pub source: Option<IpAddr>,
    /// The largest packet that fits.
    pub mtu: u32,
}

/// The wanted state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// The tunnel device.
    pub tun: String,
    /// Its MTU.
    pub mtu: u32,
    /// The node addresses, on the device as /32 and /128.
    pub node_addresses: Vec<IpAddr>,
    /// Routed into the device, assigned to nothing: the loop's own address for same-node translations.
    pub loop_v4: Ipv4Addr,
    /// The same for IPv6; used only where something else here is IPv6.
    pub loop_v6: Ipv6Addr,
    /// This node's pod ranges.
    pub pod_ranges: Vec<IpNet>,
    /// What is routed into the device.
    pub tunnel_routes: Vec<TunnelRoute>,
    /// All pod ranges of the cluster: never masqueraded, never let out by another interface in encrypted
    /// mode. With `services` so are the ranges of `service_routes`.
    pub cluster_ranges: Vec<IpNet>,
    /// Whether pods are masqueraded when they talk to the world.
    pub masquerade: bool,
    /// Whether cluster traffic must not leave in clear.
    pub encrypted: bool,
    /// Whether Services are translated in the loop: then replies between two pods of this node must
    /// come up from the bridge to be reversed (`table bridge warren`).
    pub services: bool,
    /// Whether that is left to kube-proxy where its rules are found.
    pub yield_services: bool,
    /// The Service ranges, and ClusterIPs in none of them: routed into the device.
    pub service_routes: Vec<TunnelRoute>,
    /// Ports on every local address that lead into the loop, to the same port there.
    pub node_ports: Arc<BTreeSet<(Protocol, u16)>>,
    /// Addresses of load balancers and external ones, local or not, that lead into the loop: to which port
    /// of its own address.
    pub externals: Arc<BTreeMap<Listen, u16>>,
    /// The local addresses that have node ports; a family that is not named has them on all.
    pub nodeport_ranges: Vec<IpNet>,
    /// Ports of local addresses that never lead into the loop: the tunnels' own, the kubelet's, the API server's.
    pub protected_ports: BTreeSet<(Protocol, u16)>,
    /// The addresses that the node has outside the mesh and that the loop knows for its own.
    pub host_addresses: Vec<IpAddr>,
    /// Whether 127.0.0.0/8 has node ports too.
    pub nodeport_localhost: bool,
}

impl HostConfig {
    /// Whether anything of this node is IPv6.
    pub fn has_v6(&self) -> bool {
        self.node_addresses.iter().any(IpAddr::is_ipv6)
            || self.pod_ranges.iter().any(|range| range.addr().is_ipv6())
            || self.tunnel_routes.iter().any(|route| route.range.addr().is_ipv6())
    }

    /// What is to be done while Services are (`proxied`) somebody else's, or ours.
    fn effective(&self, proxied: bool) -> Cow<'_, HostConfig> {
        let mut config = self.clone();
        if !self.services || (self.yield_services && proxied) {
            config.services = false;
            config.nodeport_localhost = false;
            config.service_routes.clear();
            config.node_ports = Arc::default();
            config.externals = Arc::default();
            return Cow::Owned(config);
        }
        if self.service_routes.is_empty() {
            return Cow::Borrowed(self);
        }
        config.tunnel_routes.extend_from_slice(&self.service_routes);
        config.cluster_ranges.extend(self.service_routes.iter().map(|route| route.range));
        Cow::Owned(config)
    }

    /// Whether nothing differs but what stands in the sets of Services.
    fn same_but_elements(&self, other: &HostConfig) -> bool {
        let elements = (Arc::clone(&other.node_ports), Arc::clone(&other.externals));
        *other == HostConfig { node_ports: elements.0, externals: elements.1, ..self.clone() }
    }

    fn check(&self) -> Result<(), HostError> {
        check_name(&self.tun)?;
        // RFC 8200 section 5; the kernel removes IPv6 from a device below it (net/ipv6/addrconf.c).
        if self.has_v6() && self.mtu < 1280 {
            return Err(HostError::MtuTooSmall { mtu: self.mtu });
        }
        Ok(())
    }
}

/// One thing that was done to the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there.
    Added(String),
    /// It was there, and different.
    Changed(String),
    /// It was there and should not be.
    Removed(String),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Added(what) => write!(f, "added {what}"),
            Change::Changed(what) => write!(f, "changed {what}"),
            Change::Removed(what) => write!(f, "removed {what}"),
        }
    }
}

/// What one [`HostNetwork::apply`] did, and what a person should know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What was changed, in order; empty when all was right.
    pub changes: Vec<Change>,
    /// What could not be done or will not work, each with what to do; said once per process.
    pub warnings: Vec<String>,
}

impl Report {
    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.warnings.is_empty()
    }

    fn added(&mut self, what: impl Into<String>) {
        self.changes.push(Change::Added(what.into()));
    }

    fn changed(&mut self, what: impl Into<String>) {
        self.changes.push(Change::Changed(what.into()));
    }

    fn removed(&mut self, what: impl Into<String>) {
        self.changes.push(Change::Removed(what.into()));
    }

    fn warn(&mut self, what: impl Into<String>) {
        self.warnings.push(what.into());
    }
}

/// The open sockets, and what was said already.
pub struct HostNetwork {
    route: rtnetlink::Handle,
    nft: Connection<Nftables>,
    saved: sysctl::Saved,
    warned: HashSet<String>,
    /// Cleared when the kernel turned out to have no nftables for bridges.
    bridge_family: bool,
    /// The ruleset generation after our last look: unchanged means nobody touched nftables since.
    generation: Option<u32>,
    /// The pod bridges and the wanted state at that time.
    bridges: Vec<PodBridge>,
    applied: Option<HostConfig>,
    /// Where the kernel's connection table was nearly full at that time: the pods that had too much of it.
    pressed: Option<Arc<BTreeSet<IpAddr>>>,
    counter: greedy::Counter,
    /// How many routes the node had at the last look.
    routes: usize,
    proxy: proxy::Look,
    forgetter: stale::Forgetter,
    /// The Services, to know what becomes of kube-proxy's flows; and those, while there may be any.
    services: Option<Arc<ArcSwap<Snapshot>>>,
    inherited: Option<inherited::Inherited>,
    news: latest::Sender<HostState>,
}

/// What others follow of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// When all was last found or made right: every second, unless something is wrong.
    pub right: Option<SystemTime>,
    /// Where kube-proxy's rules were found: Services are then left to it if the settings say so.
    pub kube_proxy: Option<String>,
}

impl HostNetwork {
    /// Opens the sockets, in the calling thread's network namespace. `state` is the file that
    /// remembers the node's earlier settings for [`cleanup`]. Call it inside a tokio runtime.
    pub fn open(state: Option<PathBuf>) -> Result<Self, HostError> {
        let (connection, route, _) =
            rtnetlink::new_connection().map_err(|e| HostError::io("open a route netlink socket", e))?;
        tokio::spawn(connection);
        Ok(Self {
            route,
            nft: Connection::<Nftables>::new().map_err(|_| HostError::NoNftables)?,
            saved: sysctl::Saved::load(state)?,
            warned: HashSet::new(),
            bridge_family: true,
            generation: None,
            bridges: Vec::new(),
            applied: None,
            pressed: None,
            counter: greedy::Counter::start(),
            routes: 0,
            proxy: proxy::Look::default(),
            forgetter: stale::Forgetter::start(),
            services: None,
            inherited: Some(inherited::Inherited::default()),
            news: latest::channel(HostState::default()).0,
        })
    }

    /// Lets UDP flows that kube-proxy has translated go when their endpoints do.
    pub fn with_services(self, services: Arc<ArcSwap<Snapshot>>) -> Self {
        Self { services: Some(services), ..self }
    }

    /// When all was last right, and whether kube-proxy is here; only news of the latter wake the reader.
    pub fn state(&self) -> latest::Receiver<HostState> {
        self.news.subscribe()
    }

    /// Brings the node to the wanted state. What is right already is not touched, so calling it
    /// again reports nothing.
    pub async fn apply(&mut self, config: &HostConfig) -> Result<Report, HostError> {
        self.generation = None;
        self.reconcile(config, true).await
    }

    /// [`apply`](Self::apply), looking only where something may have changed: nftables when its
    /// generation moved, routes when `routes` says so.
    async fn reconcile(&mut self, config: &HostConfig, routes: bool) -> Result<Report, HostError> {
        config.check()?;
        let generation = self.nft_generation().await?;
        let kube_proxy = self.proxy.find(&self.nft, generation).await?;
        let config = &*config.effective(kube_proxy.is_some());
        let mut report = Report::default();
        let interfaces = Interfaces::read(&self.route).await?;
        let tun = interfaces.by_name(&config.tun).ok_or_else(|| no_tun(&config.tun))?;
        sysctl::apply_node(&self.route, &interfaces, config, &mut self.saved, &mut report).await?;
        let before = report.changes.len();
        links::apply_mtu(&self.route, tun, config.mtu, &mut report).await?;
        sysctl::apply_device(&self.route, tun, config, &mut report).await?;
        links::apply(&self.route, &interfaces, tun, config, &mut report).await?;
        // A link or address that was wrong took routes with it.
        let other = self.applied.as_ref().is_none_or(|applied| applied.tunnel_routes != config.tunnel_routes);
        if routes || other || report.changes.len() > before {
            self.routes = routes::apply_routes(&self.route, tun.index, config, &mut report).await?;
        }
        routes::apply_rules(&self.route, config, &mut report).await?;
        let bridges = interfaces.pod_bridges(&config.tun, &config.pod_ranges);
        sysctl::apply_bridges(&self.route, &interfaces, &bridges, &mut self.saved, &mut report).await?;
        self.reconcile_nft(generation, config, bridges, &mut report).await?;
        self.see_to_the_inherited(config);
        report.warnings.extend(foreign::legacy_warning(config));
        report.warnings.extend(self.proxy.warning());
        report.warnings.retain(|warning| self.warned.insert(warning.clone()));
        // Who waits for news waits for kube-proxy; the time is there to be read.
        self.news.send_if_modified(|state| {
            let before = std::mem::replace(state, HostState { right: Some(clock::wall()), kube_proxy });
            before.kube_proxy != state.kube_proxy
        });
        Ok(report)
    }

    /// The short way, for what changes all the time: true if `config` differs from what stands in the
    /// kernel by elements of sets alone and they are written now. Looks at nothing else.
    async fn change_elements(&mut self, config: &HostConfig) -> bool {
        let (Some(applied), Some(generation)) = (&self.applied, self.generation) else { return false };
        let config = config.effective(self.proxy.found());
        if !applied.same_but_elements(&config) {
            return false;
        }
        let (from, to) = (Elements::of(applied), Elements::of(&config));
        if from == to {
            return true;
        }
        let mut udp = stale::Changed::default();
        let outcome = elements::change(&self.nft, generation, &from, &to, &mut udp).await;
        self.forgetter.forget(udp, &config);
        match outcome {
            Ok(written) => {
                debug!("changed {} elements of nft table inet {}", written.count, services::NAME);
                self.generation = Some(written.generation);
                self.applied = Some(config.into_owned());
                true
            }
            // Somebody else has changed something, perhaps just this; the long way looks.
            Err(error) => {
                debug!("nft table inet {} is looked at as a whole: {error}", services::NAME);
                self.generation = None;
                false
            }
        }
    }

    async fn reconcile_nft(
        &mut self,
        generation: u32,
        config: &HostConfig,
        bridges: Vec<PodBridge>,
        report: &mut Report,
    ) -> Result<(), HostError> {
        let pressed = self.pressure(config);
        if let Some(greedy) = &pressed {
            if self.pressed.is_none() {
                report.changed(
                    "the kernel's connection table is nearly full (nf_conntrack_count, nf_conntrack_max): until it \
                     is half empty, flows of pods to ClusterIPs are kept out of it, and a pod that has a quarter of \
                     it opens no more",
                );
            }
            for pod in
                greedy.iter().filter(|pod| !self.pressed.as_ref().is_some_and(|was| was.contains(*pod)))
            {
                report.changed(format!("pod {pod} has more than a quarter of the kernel's connection table"));
            }
        }
        let same = self.pressed == pressed;
        self.pressed = pressed;
        let seen = same && self.generation == Some(generation) && self.bridges == bridges;
        if seen && self.applied.as_ref() == Some(config) {
            return Ok(());
        }
        self.generation = None;
        nft::apply(&self.nft, &nft::inet_table(config), report)
            .await
            .map_err(|e| HostError::nft("write nft table inet warren", e))?;
        self.reconcile_services(config, report).await?;
        if self.bridge_family {
            match nft::apply(&self.nft, &nft::bridge_table(config, &bridges), report).await {
                Ok(()) => {}
                Err(e) if nft::unsupported(&e) => {
                    self.bridge_family = false;
                    report.warn(
                        "the kernel has no nftables for bridges (CONFIG_NF_TABLES_BRIDGE): a Service \
                         whose client and backend are pods of this same node will not answer",
                    );
                }
                Err(e) => return Err(HostError::nft("write nft table bridge warren", e)),
            }
        }
        foreign::apply(&self.nft, config, &bridges, report).await?;
        self.bridges = bridges;
        self.applied = Some(config.clone());
        // Read before: a change by somebody else in between moves it on and is looked at next time;
        // our own commits cost one more look that finds nothing.
        self.generation = Some(generation);
        Ok(())
    }

    /// Flows of kube-proxy's may be there since Services are ours: since it went, or since an agent began that
    /// has not seen it.
    fn see_to_the_inherited(&mut self, config: &HostConfig) {
        let Some(services) = &self.services else { return };
        if !config.services {
            self.inherited = Some(inherited::Inherited::default());
            return;
        }
        let Some(inherited) = &mut self.inherited else { return };
        let table = Arc::clone(&services.load().services);
        if let Some(search) = inherited.next(clock::now(), inherited::Heirs::new(table, config)) {
            self.forgetter.search(search);
        } else if inherited.is_over() {
            self.inherited = None;
        }
    }

    /// Where the kernel's connection table is nearly full: the pods that have too much of it, as far as known.
    fn pressure(&self, config: &HostConfig) -> Option<Arc<BTreeSet<IpAddr>>> {
        let fullness = config.services.then(sysctl::Fullness::read).flatten();
        let pressed = fullness.filter(|fullness| fullness.is_pressed(self.pressed.is_some()));
        let census = |fullness: sysctl::Fullness| greedy::Census {
            pods: config.pod_ranges.clone(),
            max: fullness.max,
        };
        self.counter.want(pressed.map(census));
        pressed.map(|_| self.counter.found())
    }

    /// Whether what `table inet warren-services` does under pressure is to begin, to end, or to be another.
    fn pressure_changes(&self) -> bool {
        self.applied.as_ref().is_some_and(|applied| self.pressure(applied) != self.pressed)
    }

    async fn reconcile_services(
        &mut self,
        config: &HostConfig,
        report: &mut Report,
    ) -> Result<(), HostError> {
        let doing = || format!("write nft table inet {}", services::NAME);
        let table = services::table(config, self.pressed.as_deref());
        match nft::apply(&self.nft, &table, report).await {
            Ok(()) => {}
            // Pods and ClusterIPs go on without.
            Err(e) if nft::unsupported(&e) || e.errno() == Some(libc::ENOENT) => {
                report.warn(format!(
                    "the kernel cannot lead node ports, load-balancer and external addresses to Services \
                     (CONFIG_NFT_FIB_INET, CONFIG_NFT_NAT): {e}"
                ));
                return Ok(());
            }
            Err(e) => return Err(HostError::nft(doing(), e)),
        }
        if !config.services {
            return Ok(());
        }
        let mut udp = stale::Changed::default();
        let outcome = elements::compare(&self.nft, config, &mut udp).await;
        self.forgetter.forget(udp, config);
        let written = outcome.map_err(|e| HostError::nft(doing(), e))?;
        if written.count > 0 {
            report.changed(format!("nft table inet {}: {} elements", services::NAME, written.count));
        }
        Ok(())
    }

    /// Whether nobody but us has touched nftables since our last look.
    async fn knows_generation(&self) -> bool {
        self.generation.is_some() && self.nft_generation().await.ok() == self.generation
    }

    async fn nft_generation(&self) -> Result<u32, HostError> {
        self.nft.generation().await.map_err(|e| {
            if nft::unsupported(&e) {
                HostError::NoNftables
            } else {
                HostError::nft("read the nft generation", e)
            }
        })
    }
}

/// Removes everything that Warren ever put into this network namespace's kernel, whether or not an
/// agent ran before: nft tables, rules in foreign chains, policy rules, routes, the tunnel device;
/// and puts back the settings remembered in `state`. Returns what was removed.
pub async fn cleanup(tun: &str, state: Option<&Path>) -> Result<Vec<String>, HostError> {
    check_name(tun)?;
    let host = HostNetwork::open(None)?;
    let mut removed = Vec::new();
    routes::remove_all(&host.route, &mut removed).await?;
    let interfaces = Interfaces::read(&host.route).await?;
    if let Some(link) = interfaces.by_name(tun).filter(|link| link.kind == Some(InfoKind::Tun)) {
        links::remove(&host.route, link).await?;
        removed.push(format!("tunnel device {tun}"));
    }
    match host.nft_generation().await {
        Ok(_) => {
            foreign::remove(&host.nft, &mut removed).await?;
            nft::remove(&host.nft, &mut removed).await?;
        }
        // Then there is nothing of ours in it.
        Err(HostError::NoNftables) => {}
        Err(e) => return Err(e),
    }
    if let Some(state) = state {
        sysctl::restore(&host.route, &interfaces, state, &mut removed).await?;
    }
    Ok(removed)
}

/// A commit moves the generation on by one; zero is left out (nf_tables_commit, net/netfilter/nf_tables_api.c).
fn next_generation(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(1)
}

fn no_tun(name: &str) -> HostError {
    HostError::NoTun { name: name.to_owned() }
}

/// What the kernel takes as a name (dev_valid_name, net/core/dev.c). It also becomes part of a path.
fn check_name(name: &str) -> Result<(), HostError> {
    let fine = !matches!(name, "" | "." | "..")
        && name.len() < libc::IFNAMSIZ
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if fine { Ok(()) } else { Err(HostError::BadName { name: name.to_owned() }) }
}
