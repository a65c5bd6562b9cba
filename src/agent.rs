//! `warren agent`: puts the state line and the packet line together on a real machine.
//!
//! 1. one agent per run directory (a lock), keys, the flow table, what the last agent knew
//! 2. the state line starts; the first plan says which pods are ours
//! 3. the lanes start: sockets, TUN queues, threads
//! 4. the host: addresses, routes, rules, nftables; from now on kept in repair
//! 5. peers that were active before a restart are called; `ready` appears in the run directory
//! 6. until a signal, or the end of a lane: follow plans, underlay and peers
//!
//! Ending leaves the TUN, routes and rules in place: the next agent takes over. `--cleanup` removes them.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{self, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{debug, error, info, warn};

use crate::config::{AgentConfig, Masquerade, SourceSpec, UnderlayMtu};
use crate::io::fleet::{Fleet, FleetConfig, FleetError};
use crate::io::host::{self, HostConfig, HostError, HostEvent, HostNetwork, TunnelRoute};
use crate::io::lane::LaneOffloads;
use crate::io::{clock, flows, underlay};
use crate::snapshot::{LaneId, PeerId, Snapshot};
use crate::state::checkpoint::{CheckpointFiles, RecentPeer};
use crate::state::compile::{HostPlan, Settings};
use crate::state::durable::Loaded;
use crate::state::keys::{self, KeyError};
use crate::state::publish::Publisher;
use crate::state::run::{Clock, Outputs, StateLine, StateReport};
use crate::state::source::dir::DirSource;
use crate::status::socket::{OwnedSocket, SocketError};
use crate::status::{Handle, LaneHandle, NodeInfo, pb, server, uapi};

/// The loop's own addresses: routed into the TUN, assigned to nothing, never seen outside the node.
const LOOP_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 87, 87);
const LOOP_V6: Ipv6Addr = Ipv6Addr::new(0xfd57, 0x4152, 0x5245, 0x4e00, 0, 0, 0, 1);
/// How long the first full list of the source may take before we say that we wait for it.
const FIRST_LIST: Duration = Duration::from_secs(5);
/// How long a node may be missing from the source before that is an error.
const NODE_PATIENCE: Duration = Duration::from_secs(3);
/// How often the underlay's addresses and MTU are looked at, and active peers noted.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A peer that sent or received within this time is called after a restart: WireGuard's REJECT_AFTER_TIME.
const RECENT: Duration = Duration::from_secs(180);
/// Events of the source that may wait.
const EVENTS: usize = 4096;

/// Why the agent ended, and what to do.
#[derive(Debug, Error)]
pub enum AgentError {
    /// A directory.
    #[error("cannot use the directory {path}: {source}; make it, or choose another with {flag}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// The flag that names it.
        flag: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The status socket, which is also what makes sure that there is only one of us.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Two agents would share one device's queues.
    #[error(
        "another agent is running in this network: it has the interface {0}; stop it first (to run two on one machine, \
         give each its own --run-dir, --state-dir, --tun-name and --port)"
    )]
    DeviceInUse(String),
    /// Not in the source.
    #[error(
        "there is no Node named `{node}` in {source_name}{}: write one (kind: Node, with spec.podCIDRs and \
         status.addresses), or say with --node which one this machine is",
        others(known)
    )]
    NoSuchNode {
        /// Our name.
        node: String,
        /// Where we looked.
        source_name: String,
        /// Who is there.
        known: Vec<String>,
    },
    /// No pods can live here.
    #[error(
        "Node `{node}` has no usable pod range: set spec.podCIDRs (for example [\"10.244.1.0/24\"]), different on \
         every node{}",
        reasons(problems)
    )]
    NoPodRange {
        /// Our name.
        node: String,
        /// What was wrong with the ranges it has.
        problems: Vec<String>,
    },
    /// Keys.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Lanes.
    #[error(transparent)]
    Lanes(#[from] FleetError),
    /// Routes, rules, nftables.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A lane failed: there is no data path any more.
    #[error("lane {} failed: {reason}; the data path is down, so the agent ends (its supervisor starts it again)", lane.0)]
    LaneFailed {
        /// Which.
        lane: LaneId,
        /// Why.
        reason: String,
    },
    /// Something of the machine.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What went wrong.
        source: io::Error,
    },
}

fn others(known: &[String]) -> String {
    match known {
        [] => " (there is no Node at all)".to_owned(),
        some => format!(" (there are: {})", some.join(", ")),
    }
}

fn reasons(problems: &[String]) -> String {
    problems.iter().map(|p| format!("; {p}")).collect()
}

/// Runs the agent until it is told to stop.
pub fn run(config: AgentConfig) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| AgentError::Io { what: "cannot start the runtime", source })?;
    let result = runtime.block_on(agent(config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Removes everything that an agent ever put into the kernel; says what.
pub fn cleanup(config: &AgentConfig) -> Result<Vec<String>, AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| AgentError::Io { what: "cannot start the runtime", source })?;
    make_dir(&config.run_dir, "--run-dir")?;
    let _only_one = {
        let _runtime = runtime.enter();
        server::bind(&config.run_dir)?
    };
    let saved = host_state(config);
    let _sole = sole_agent(&config.tun_name)?;
    let mut removed = runtime.block_on(host::cleanup(&config.tun_name, Some(&saved)))?;
    for file in ["ready", "flows"] {
        if fs::remove_file(config.run_dir.join(file)).is_ok() {
            removed.push(format!("file {}", config.run_dir.join(file).display()));
        }
    }
    Ok(removed)
}

/// Takes the device's name for us. The run directory does not tell who has the device when it is not the same one;
/// an abstract socket belongs to the network namespace, as the device does, and goes with its process (unix(7)).
fn sole_agent(tun: &str) -> Result<UnixListener, AgentError> {
    let address = net::SocketAddr::from_abstract_name(format!("warren/{tun}"));
    address.and_then(|address| UnixListener::bind_addr(&address)).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => AgentError::DeviceInUse(tun.to_owned()),
        _ => AgentError::Io { what: "cannot reserve the interface's name", source },
    })
}

fn host_state(config: &AgentConfig) -> PathBuf {
    config.state_dir.join("host.saved")
}

async fn agent(config: AgentConfig) -> Result<(), AgentError> {
    // 1 what there is
    make_dir(&config.state_dir, "--state-dir")?;
    make_dir(&config.run_dir, "--run-dir")?;
    let status_socket = server::bind(&config.run_dir)?;
    let _sole = sole_agent(&config.tun_name)?;
    let ready = ReadyFile::new(&config.run_dir);
    let keys = keys::load_or_create(&config.state_dir, usize::from(config.lanes))?;
    let files = CheckpointFiles::new(&config.state_dir, config.node.clone());
    let saved = match files.load() {
        Ok(Loaded::Good(saved)) => Some(saved),
        Ok(Loaded::Missing) => None,
        Ok(Loaded::SetAside { reason, moved_to }) => {
            let moved = moved_to.map(|to| format!(" (moved to {})", to.display())).unwrap_or_default();
            warn!("the saved state is not obeyed: {reason}{moved}");
            None
        }
        Err(source) => return Err(AgentError::Io { what: "cannot read the saved state", source }),
    };

    // 2 the state line
    let public: Vec<_> = keys.iter().map(|key| key.public()).collect();
    let fixed_mtu = match config.underlay_mtu {
        UnderlayMtu::Fixed(mtu) => Some(mtu),
        UnderlayMtu::Auto => None,
    };
    let mut settings = config.settings(&public, fixed_mtu.unwrap_or(1500));
    let mut node = Node::open(&config).await?;
    node.follow_underlay(&mut settings, &[]).await;
    let (line, mut outputs) = StateLine::new(settings.clone(), saved);
    let (events, source_events) = mpsc::channel(EVENTS);
    let (settings_sender, settings_reader) = watch::channel(settings.clone());
    let folder = source_folder(&config);
    let publisher = Publisher::new(&folder, &config.node);
    let time = Clock { now: clock::now, wall: clock::wall };
    let source = tokio::spawn(DirSource::new(&folder).run(events));
    let line =
        tokio::spawn(line.run(source_events, settings_reader, Some(files.clone()), Some(publisher), time));
    let _tasks = Tasks(vec![source, line]);
    let plan = first_plan(&config, &mut outputs).await?;

    // 3 lanes
    let table = flows::open(&config.run_dir.join("flows"), seed()).map_err(|source| AgentError::Io {
        what: "cannot open the flow table in the run directory",
        source,
    })?;
    let (ended, mut ends) = mpsc::unbounded_channel();
    let fleet = Fleet::start(
        FleetConfig {
            tun: config.tun_name.clone(),
            port: config.port,
            vxlan_port: config.encap.encaps().vxlan.then_some(config.vxlan_port),
            keys: keys.iter().map(|key| key.secret().to_bytes()).collect(),
            offloads: lane_offloads(&config),
            flows: Arc::new(table),
            snapshot: Arc::clone(&outputs.snapshot),
        },
        move |lane, reason| {
            let _ = ended.send((lane, reason));
        },
    )?;

    // 4 the host
    let mut host_network = HostNetwork::open(Some(host_state(&config)))?;
    let wanted = host_config(&config, &plan);
    let report = host_network.apply(&wanted).await?;
    report.changes.iter().for_each(|change| debug!("{change}"));
    report.warnings.iter().for_each(|warning| warn!("{warning}"));
    let (host_sender, host_wanted) = watch::channel(wanted);
    let (host_events, mut host_news) = mpsc::channel(16);
    let _repair = Tasks(vec![tokio::spawn(async move {
        if let Err(error) = host_network.watch(host_wanted, host_events).await {
            error!("the node's routes and rules are no longer watched: {error}");
        }
    })]);

    // 5 ready
    let handle = status_handle(&config, &outputs, &fleet);
    let mut services = Tasks(serve_status(&config, handle.clone(), status_socket));
    services.0.push(tokio::spawn(follow_problems(handle.clone(), outputs.report.clone())));
    handle.update(|live| {
        live.pod_mtu = plan.pod_mtu;
        live.pod_ranges.clone_from(&plan.pod_ranges);
        live.not_ready = None;
    });
    call_recent_peers(&files, &outputs.snapshot.load(), &fleet);
    ready.write(&config.node, plan.pod_mtu)?;
    info!(
        node = %config.node, pods = %list(&plan.pod_ranges), pod_mtu = plan.pod_mtu, lanes = fleet.lanes.len(),
        peers = outputs.snapshot.load().mesh.peers.iter().flatten().count(), encap = config.encap.name(),
        "ready: packets flow"
    );

    // 6 until told to stop
    let mut stop = Signals::new()?;
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut plan = plan;
    loop {
        tokio::select! {
            () = stop.wait() => break,
            Some((lane, reason)) = ends.recv() => return Err(AgentError::LaneFailed { lane, reason }),
            changed = outputs.plan.changed() => {
                if changed.is_err() {
                    return Err(AgentError::Io { what: "the state line ended", source: io::Error::other("bug") });
                }
                let Some(next) = outputs.plan.borrow_and_update().clone() else { continue };
                fleet.ring();
                if next.pod_ranges.is_empty() {
                    warn!("this node has lost its pod range in the source: keeping the old one until there is another");
                    continue;
                }
                if next.pod_mtu != plan.pod_mtu {
                    info!(from = plan.pod_mtu, to = next.pod_mtu, "the MTU for new pods has changed");
                    ready.write(&config.node, next.pod_mtu)?;
                    handle.update(|live| live.pod_mtu = next.pod_mtu);
                }
                plan = next;
                host_sender.send_replace(host_config(&config, &plan));
                if node.follow_underlay(&mut settings, &plan.host_addresses).await {
                    settings_sender.send_replace(settings.clone());
                }
            }
            Some(news) = host_news.recv() => match news {
                HostEvent::Repaired(report) => {
                    report.changes.iter().for_each(|change| info!("repaired: {change}"));
                    report.warnings.iter().for_each(|warning| warn!("{warning}"));
                }
                HostEvent::TunGone { name } => {
                    debug!("the interface {name} is gone; its lanes make it again");
                    fleet.ring();
                }
                HostEvent::Failed(error) => error!("{error}"),
            },
            _ = look.tick() => {
                if node.follow_underlay(&mut settings, &plan.host_addresses).await {
                    settings_sender.send_replace(settings.clone());
                }
                note_recent_peers(&files, &handle).await;
            }
        }
    }
    info!(
        "stopping; the interface, routes and rules stay for the next agent (`warren agent --cleanup` removes them)"
    );
    note_recent_peers(&files, &handle).await;
    Ok(())
}

/// Waits for the first plan that names pods of ours; says what it waits for.
async fn first_plan(config: &AgentConfig, outputs: &mut Outputs) -> Result<Arc<HostPlan>, AgentError> {
    let mut waits = interval(FIRST_LIST);
    waits.tick().await;
    loop {
        let current = outputs.plan.borrow_and_update().clone();
        if let Some(plan) = current.filter(|plan| !plan.pod_ranges.is_empty()) {
            return Ok(plan);
        }
        let report = outputs.report.borrow().clone();
        if report.listed {
            // A file that is being written may become whole in a moment.
            let better = timeout(NODE_PATIENCE, async {
                while outputs.plan.borrow_and_update().as_ref().is_none_or(|p| p.pod_ranges.is_empty()) {
                    if outputs.plan.changed().await.is_err() {
                        return;
                    }
                }
            });
            if better.await.is_err() {
                return Err(missing(config, outputs));
            }
            continue;
        }
        tokio::select! {
            _ = outputs.plan.changed() => {}
            _ = outputs.report.changed() => {}
            _ = waits.tick() => {
                info!("waiting for the first full list of objects from {}", source_folder(config).display());
            }
        }
    }
}

/// Tells a node that is not there from one without a usable range.
fn missing(config: &AgentConfig, outputs: &Outputs) -> AgentError {
    let report: Arc<StateReport> = outputs.report.borrow().clone();
    let node = config.node.clone();
    let about = format!("Node/{node}");
    let known: Vec<String> =
        outputs.snapshot.load().mesh.peers.iter().flatten().map(|peer| peer.name.clone()).collect();
    if report.nodes > known.len() {
        let problems =
            report.problems.iter().filter(|p| p.subject == about).map(ToString::to_string).collect();
        return AgentError::NoPodRange { node, problems };
    }
    AgentError::NoSuchNode { node, source_name: source_folder(config).display().to_string(), known }
}

/// The folder that the objects come from.
fn source_folder(config: &AgentConfig) -> PathBuf {
    match &config.source {
        Some(SourceSpec::Dir(path)) => path.clone(),
        None => PathBuf::new(), // only with --cleanup, which reads no objects
    }
}

fn lane_offloads(config: &AgentConfig) -> LaneOffloads {
    let wanted = config.offloads;
    LaneOffloads {
        tun_tcp: wanted.tun_gso,
        tun_udp: wanted.tun_gso,
        joining: wanted.coalescing,
        udp_segmentation: wanted.udp_gso,
        udp_receive: wanted.udp_gro,
        ack_joining: wanted.ack_coalescing,
    }
}

/// The plan in the host's terms.
fn host_config(config: &AgentConfig, plan: &HostPlan) -> HostConfig {
    let source = |like: IpAddr| plan.node_addresses.iter().copied().find(|ip| ip.is_ipv4() == like.is_ipv4());
    let route =
        |range: ipnet::IpNet, mtu: u16| TunnelRoute { range, source: source(range.addr()), mtu: mtu.into() };
    let mut routes: Vec<TunnelRoute> =
        plan.peer_ranges.iter().map(|peer| route(peer.range, peer.mtu.min(plan.pod_mtu))).collect();
    // Pods of nodes that nobody has seen yet are answered by us, not sent out in clear.
    for range in &plan.cluster_ranges {
        let known = routes.iter().any(|r| r.range == *range) || plan.pod_ranges.contains(range);
        if !known {
            routes.push(route(*range, plan.pod_mtu));
        }
    }
    // The pods' MTU everywhere, also where a path takes more: with br_netfilter the kernel joins a pod's IPv6
    // fragments on the bridge, forgets how large they were, and cuts again only what exceeds the next device.
    // A packet between the two sizes would come out whole and be too big for the other node's bridge, for ever.
    HostConfig {
        tun: config.tun_name.clone(),
        mtu: plan.pod_mtu.into(),
        node_addresses: plan.node_addresses.clone(),
        loop_v4: LOOP_V4,
        loop_v6: LOOP_V6,
        pod_ranges: plan.pod_ranges.clone(),
        tunnel_routes: routes,
        cluster_ranges: plan.cluster_ranges.clone(),
        masquerade: match config.masquerade {
            // Whoever masquerades first wins, and ours leaves the cluster's ranges out: it does no harm beside others.
            Masquerade::On => true,
            Masquerade::Off => false,
        },
        encrypted: plan.encrypted,
        services: false,
    }
}

/// This node's underlay: where it may be reached, and the MTU there.
struct Node {
    handle: rtnetlink::Handle,
    tun: String,
    port: u16,
    fixed_endpoints: bool,
    fixed_mtu: bool,
    _connection: Tasks,
}

impl Node {
    async fn open(config: &AgentConfig) -> Result<Node, AgentError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| AgentError::Io { what: "cannot open a route netlink socket", source })?;
        Ok(Node {
            handle,
            tun: config.tun_name.clone(),
            port: config.port,
            fixed_endpoints: !config.endpoints.is_empty(),
            fixed_mtu: config.underlay_mtu != UnderlayMtu::Auto,
            _connection: Tasks(vec![tokio::spawn(connection)]),
        })
    }

    /// Brings endpoints and MTU up to date; whether anything changed.
    async fn follow_underlay(&mut self, settings: &mut Settings, announced: &[IpAddr]) -> bool {
        let found = match underlay::look(&self.handle, announced, &self.tun).await {
            Ok(found) => found,
            Err(error) => {
                warn!("{error}");
                return false;
            }
        };
        let before = settings.clone();
        if !self.fixed_mtu {
            settings.underlay_mtu = found.mtu;
        }
        if !self.fixed_endpoints {
            let from = if announced.is_empty() { &found.addresses[..] } else { announced };
            settings.announcement.endpoints = from.iter().map(|ip| SocketAddr::new(*ip, self.port)).collect();
        }
        before != *settings
    }
}

/// Calls peers that were active when the last agent ended: they may be waiting for us.
fn call_recent_peers(files: &CheckpointFiles, snapshot: &Snapshot, fleet: &Fleet) {
    let recent = match files.load_recent() {
        Ok(Loaded::Good(recent)) => recent,
        Ok(Loaded::Missing) => return,
        Ok(Loaded::SetAside { reason, .. }) => {
            return warn!("the list of active peers was not usable: {reason}");
        }
        Err(error) => return warn!("the list of active peers cannot be read: {error}"),
    };
    let now = unix_seconds();
    let fresh = |peer: &&RecentPeer| now.saturating_sub(peer.at) <= RECENT.as_secs();
    let ids: Vec<PeerId> = recent
        .iter()
        .filter(fresh)
        .filter_map(|peer| snapshot.mesh.peers.iter().flatten().find(|p| p.name == peer.name).map(|p| p.id))
        .collect();
    if !ids.is_empty() {
        info!(peers = ids.len(), "calling peers that were active before the restart");
        fleet.initiate(&ids);
    }
}

/// Saves who is active now.
async fn note_recent_peers(files: &CheckpointFiles, handle: &Handle) {
    let Ok(view) = handle.collect_async().await else { return };
    let wall = unix_seconds();
    let mut recent = Vec::new();
    for peer in &view.peers {
        let ages = [peer.last_received_age_ms, peer.last_sent_age_ms];
        let age = ages.into_iter().flatten().min().map(Duration::from_millis);
        let at = age.filter(|age| *age <= RECENT).map(|age| wall.saturating_sub(age.as_secs()));
        recent.extend(at.map(|at| RecentPeer { name: peer.name.clone(), at }));
    }
    let files = files.clone();
    let saved = tokio::task::spawn_blocking(move || files.save_recent(&recent)).await;
    if let Ok(Err(error)) = saved {
        debug!("the list of active peers cannot be saved: {error}");
    }
}

// --- status --------------------------------------------------------------------------------------

fn status_handle(config: &AgentConfig, outputs: &Outputs, fleet: &Fleet) -> Handle {
    let lanes = fleet.lanes.iter().map(|lane| LaneHandle {
        id: lane.id,
        public_key: lane.public_key,
        port: lane.port,
        commands: lane.commands.clone(),
        bell: Arc::clone(&lane.bell),
        counters: Arc::clone(&lane.counters),
        offloads: lane.offloads,
    });
    let info = NodeInfo {
        name: config.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        tun: config.tun_name.clone(),
        settings: vec![
            ("source".to_owned(), format!("dir:{}", source_folder(config).display())),
            ("encap".to_owned(), config.encap.name().to_owned()),
            ("port".to_owned(), config.port.to_string()),
            ("lanes".to_owned(), config.lanes.to_string()),
            ("cluster-cidr".to_owned(), or(list(&config.cluster_ranges), "from the nodes seen")),
            ("service-cidr".to_owned(), or(list(&config.service_ranges), "from ServiceCIDR objects")),
            ("location".to_owned(), or(config.location.clone().unwrap_or_default(), "none")),
        ],
        started: clock::now(),
    };
    Handle::new(info, Arc::clone(&outputs.snapshot), lanes.collect())
}

fn serve_status(config: &AgentConfig, handle: Handle, socket: OwnedSocket) -> Vec<JoinHandle<()>> {
    let grpc = handle.clone();
    let mut tasks = vec![tokio::spawn(async move {
        if let Err(error) = server::serve(socket, grpc, std::future::pending()).await {
            error!("`warren status` does not work any more: {error}");
        }
    })];
    match uapi::bind(Path::new(uapi::DEFAULT_DIR), &config.tun_name) {
        Ok(socket) => tasks.push(tokio::spawn(async move {
            if let Err(error) = uapi::serve(socket, handle, std::future::pending()).await {
                warn!("`wg show` does not work any more: {error}");
            }
        })),
        // The mesh works without it.
        Err(error) => warn!("`wg show` will not work: {error}"),
    }
    tasks
}

/// Hands what the state line finds wrong to whoever asks.
async fn follow_problems(handle: Handle, mut report: watch::Receiver<Arc<StateReport>>) {
    loop {
        let problems: Vec<_> = report.borrow_and_update().problems.iter().map(pb::Problem::from).collect();
        handle.update(|live| live.problems.clone_from(&problems));
        if report.changed().await.is_err() {
            return;
        }
    }
}

// --- small things --------------------------------------------------------------------------------

/// Tasks that end with the agent.
struct Tasks(Vec<JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Signals, AgentError> {
        let listen = |kind| {
            signal(kind).map_err(|source| AgentError::Io { what: "cannot listen for signals", source })
        };
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// `ready` in the run directory: there while packets flow.
struct ReadyFile(PathBuf);

impl ReadyFile {
    fn new(run_dir: &Path) -> ReadyFile {
        let file = ReadyFile(run_dir.join("ready"));
        // One that a killed agent left says nothing about this one.
        let _ = fs::remove_file(&file.0);
        file
    }

    fn write(&self, node: &str, pod_mtu: u16) -> Result<(), AgentError> {
        let text = serde_json::json!({ "node": node, "pod_mtu": pod_mtu }).to_string();
        let next = self.0.with_extension("next");
        fs::write(&next, text).and_then(|()| fs::rename(&next, &self.0)).map_err(|source| AgentError::Io {
            what: "cannot write the file `ready` in the run directory",
            source,
        })
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn make_dir(path: &Path, flag: &'static str) -> Result<(), AgentError> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| AgentError::Directory {
        path: path.to_owned(),
        flag,
        source,
    })
}

fn unix_seconds() -> u64 {
    clock::wall().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn seed() -> (u64, u64) {
    crate::io::fleet::random_seed().unwrap_or((1, 1))
}

fn list(ranges: &[ipnet::IpNet]) -> String {
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn or(text: String, otherwise: &str) -> String {
    if text.is_empty() { otherwise.to_owned() } else { text }
}
