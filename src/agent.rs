//! `warren agent`: puts the state line and the packet line together on a real machine.
//!
//! 1. one agent per run directory (a lock), keys, the flow table, what the last agent knew
//! 2. the state line starts; the first plan says which pods are ours
//! 3. the lanes start: sockets, TUN queues, threads
//! 4. the host: addresses, routes, rules, nftables; from now on kept in repair
//! 5. peers that were active before a restart are called; `ready` appears in the run directory, and the CNI
//!    configuration where the runtime looks for it
//! 6. until a signal, or the end of a lane: follow plans, underlay and peers
//!
//! From the beginning `warren status` is answered, and `/livez` and `/readyz` where they are wanted.
//!
//! Ending leaves the TUN, routes and rules in place: the next agent takes over. `--cleanup` removes them.

mod bridge;
mod cni;
mod ends;
mod error;
mod feed;
mod health;
mod keys;
mod presence;
mod recent;
mod serve;
mod services;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{debug, error, info, warn};

pub use error::AgentError;

use crate::cni::conflist::BRIDGE;
use crate::config::{AgentConfig, Masquerade, ServicesArg, UnderlayMtu};
use crate::datapath::conntrack::FlowTable;
use crate::io::fleet::{Fleet, FleetConfig, FleetError, LaneSockets, Ports};
use crate::io::host::{self, HostConfig, HostError, HostEvent, HostNetwork, HostState, TunnelRoute};
use crate::io::lane::LaneOffloads;
use crate::io::{clock, flows};
use crate::snapshot::service::{LOOP_V4, LOOP_V6, Protocol};
use crate::snapshot::{Encap, LaneId, PeerId};
use crate::state::checkpoint::CheckpointFiles;
use crate::state::compile::{HostPlan, Settings};
use crate::state::durable::Loaded;
use crate::state::keys::{KeyRing, vxlan_mac};
use crate::state::run::{Clock, Outputs, StateLine, StateReport};
use crate::status::{Handle, RotateOrder, server};
use bridge::Removal;
use ends::Ends;
use health::Answers;
use keys::KeyChange;
use presence::{ReadyFile, make_dir};

/// How long the first full list of the source may take before we say that we wait for it.
const FIRST_LIST: Duration = Duration::from_secs(5);
/// How long a node may be missing from the source before that is an error.
const NODE_PATIENCE: Duration = Duration::from_secs(3);
/// How often the underlay's addresses and MTU are looked at, and active peers noted.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often it is looked whether a change of keys may go on.
const KEY_STEPS: Duration = Duration::from_secs(1);
/// How long the device may be missing before the lanes have had their chance to make it again.
const TUN_PATIENCE: Duration = Duration::from_secs(8);
/// How long the node's routes and rules may be other than planned before the node counts as not ready.
const HOST_PATIENCE: Duration = Duration::from_secs(60);
/// How long whoever stepped aside leaves the place to the one who asked for it.
const STEP_ASIDE: Duration = Duration::from_secs(1);
/// Events of the source that may wait.
const EVENTS: usize = 4096;

/// Runs the agent until it is told to stop.
pub fn run(config: AgentConfig) -> Result<(), AgentError> {
    allow_many_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| AgentError::Io { what: "cannot start the runtime", source })?;
    let result = runtime.block_on(agent(config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Every health check node port is a listener, and shells give 1,024 descriptors.
fn allow_many_files() {
    const WANTED: u64 = 1 << 16;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < WANTED.min(hard)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, WANTED.min(hard), hard)
    {
        debug!("no more than {soft} files can be open: {error}");
    }
}

/// What became of everything that an agent ever put into the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// What is gone.
    pub removed: Vec<String>,
    /// What is still there, and why.
    pub kept: Vec<String>,
}

/// Removes everything that an agent ever put into the kernel, into the run directory and where the runtime looks for
/// its plugins.
pub fn cleanup(config: &AgentConfig) -> Result<Cleaned, AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| AgentError::Io { what: "cannot start the runtime", source })?;
    presence::may_administrate()?;
    // Where there is no such folder, there is no agent in it: none is made just for that.
    let only_one = match config.run_dir.exists() {
        true => {
            let _runtime = runtime.enter();
            Some(server::bind(&config.run_dir)?)
        }
        false => None,
    };
    let saved = host_state(config);
    let (cni::Taken { mut removed, mut kept }, lists, bridge) = runtime.block_on(async {
        let netlink = Ends::open(config)?;
        presence::nobody_is_here(&netlink.netlink, &config.tun_name).await?;
        // First, so that no pod is added meanwhile. What cannot be done there keeps nothing in the kernel.
        let (mut taken, lists) = cni::cleanup(config);
        taken.removed.extend(host::cleanup(&config.tun_name, Some(&saved)).await?);
        let bridge = bridge::remove(&netlink.netlink).await;
        Ok::<_, AgentError>((taken, lists, bridge))
    })?;
    let pods = match bridge {
        Ok(Removal::Absent) => 0,
        Ok(Removal::Removed) => {
            removed.push(format!("bridge {BRIDGE}"));
            0
        }
        Ok(Removal::Kept(pods)) => {
            kept.push(format!(
                "the bridge {BRIDGE}, on which {pods} pods hang, and the record of their addresses: when they are gone, \
                 `warren agent --cleanup` removes both"
            ));
            pods
        }
        Err(error) => {
            kept.push(format!("the bridge {BRIDGE}, if it is there: {error}"));
            1
        }
    };
    removed.extend(presence::empty(&config.run_dir, only_one, pods > 0));
    if let Err(error) = lists {
        removed.iter().for_each(|what| info!("removed {what}"));
        kept.iter().for_each(|what| info!("kept {what}"));
        return Err(error);
    }
    Ok(Cleaned { removed, kept })
}

fn host_state(config: &AgentConfig) -> PathBuf {
    config.state_dir.join("host.saved")
}

/// What runs until the agent ends.
struct Running {
    config: AgentConfig,
    plan: Arc<HostPlan>,
    settings: Settings,
    ends: Ends,
    outputs: Outputs,
    fleet: Fleet,
    lane_ends: mpsc::UnboundedReceiver<(LaneId, String)>,
    host_wanted: watch::Sender<HostConfig>,
    host_news: mpsc::Receiver<HostEvent>,
    host_watch: JoinHandle<Result<(), HostError>>,
    host_state: watch::Receiver<HostState>,
    /// What is answered for load balancers.
    answers: watch::Sender<Answers>,
    keys: KeyChange,
    rotations: mpsc::Receiver<RotateOrder>,
    /// What is answered for probes.
    probe: watch::Sender<Answers>,
    flows: Arc<FlowTable>,
    settings_sender: watch::Sender<Settings>,
    handle: Handle,
    files: CheckpointFiles,
    ready: ReadyFile,
    /// Whoever keeps our Node right waits for more of this.
    _ready: watch::Sender<bool>,
    cni: cni::Cni,
    /// Since when the device has been missing.
    tun_gone: Option<Instant>,
    _tasks: Tasks,
}

async fn agent(config: AgentConfig) -> Result<(), AgentError> {
    // As the first process of a container it would not end by a signal that it does not listen for.
    let mut stop = Signals::new()?;
    // Whoever stepped aside waits for the other one's end: asking in turn, both would do nothing else.
    let (mut ask, mut pause) = (config.standby, Duration::ZERO);
    loop {
        let begin = async {
            sleep(pause).await;
            start(config.clone(), ask).await
        };
        let running = tokio::select! {
            running = begin => running?,
            () = stop.wait() => {
                info!("stopping before packets flow");
                return Ok(());
            }
        };
        match running.follow(&mut stop).await? {
            End::Stopped => return Ok(()),
            End::SteppedAside => (ask, pause) = (false, STEP_ASIDE),
        }
    }
}

/// Why an agent ends without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By a signal.
    Stopped,
    /// For another agent, whose end is waited for.
    SteppedAside,
}

async fn start(config: AgentConfig, ask: bool) -> Result<Running, AgentError> {
    // 1 what there is
    presence::may_administrate()?;
    make_dir(&config.state_dir, "--state-dir")?;
    make_dir(&config.run_dir, "--run-dir")?;
    let status_socket = presence::turn(&config, ask).await?;
    let mut ends = Ends::open(&config)?;
    presence::nobody_is_here(&ends.netlink, &config.tun_name).await?;
    let ready = ReadyFile::new(&config.run_dir);
    let keys = KeyRing::open(&config.state_dir, usize::from(config.lanes))?;
    let mac = vxlan_mac(&config.state_dir, keys.public().first().unwrap_or(&[0; 32]))
        .map_err(|source| AgentError::Io { what: "cannot keep the VXLAN end's MAC address", source })?;
    let keys = KeyChange::new(keys, config.rotate_keys);
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
    let seed = crate::io::fleet::random_seed()
        .map_err(|source| AgentError::Io { what: "the kernel gives no random numbers", source })?;

    // 2 the state line
    let fixed_mtu = match config.underlay_mtu {
        UnderlayMtu::Fixed(mtu) => Some(mtu),
        UnderlayMtu::Auto => None,
    };
    let mut settings = config.settings(&keys.public(), mac, fixed_mtu.unwrap_or(1500));
    keys.announce_in(&mut settings.announcement);
    ends.look(&mut settings, &[]).await;
    let (line, mut outputs) = StateLine::new(settings.clone(), saved);
    let (events, source_events) = mpsc::channel(EVENTS);
    let (settings_sender, settings_reader) = watch::channel(settings.clone());
    let time = Clock { now: clock::now, wall: clock::wall };
    let feed = feed::start(&config, &outputs, events, time);
    let mut tasks = Tasks(feed.tasks);
    let line = line.run(source_events, settings_reader, Some(files.clone()), feed.announcer, time);
    tasks.0.push(tokio::spawn(line));
    let starting =
        Answers { probe: config.probe, not_ready: Some("starting".to_owned()), ..Answers::default() };
    let (probe, wanted_probe) = watch::channel(starting);
    tasks.0.push(tokio::spawn(health::serve(wanted_probe, watch::channel(HostState::default()).1)));
    let (orders, rotations) = mpsc::channel(4);
    let handle = serve::handle(&config, &outputs).taking(orders);
    tasks.0.push(serve::serve(handle.clone(), status_socket));
    tasks.0.push(tokio::spawn(serve::follow_reports(handle.clone(), outputs.report.clone())));
    let plan = feed::first_plan(&config, &mut outputs, &probe, &handle).await?;

    // 3 lanes
    let table = flows::open(&config.run_dir.join("flows"), seed).map_err(|source| AgentError::Io {
        what: "cannot open the flow table in the run directory",
        source,
    })?;
    let table = Arc::new(table);
    let affinity = flows::open_affinity(&config.run_dir.join("affinity"), seed).map_err(|source| {
        AgentError::Io { what: "cannot open the table of session affinity in the run directory", source }
    })?;
    let (ended, lane_ends) = mpsc::unbounded_channel();
    let (offloads, lane_keys) = (lane_offloads(&config), keys.lane_keys());
    let vxlan = config.encap.encaps().vxlan.then_some(config.vxlan_port);
    let ports = Ports { wireguard: config.port, vxlan, share_vxlan: true };
    // Ports first: one that is taken must not leave an interface behind.
    let sockets =
        LaneSockets::open(lane_keys.len(), ports, offloads.udp_receive).map_err(FleetError::from)?;
    let fleet = Fleet::start(
        FleetConfig {
            tun: config.tun_name.clone(),
            keys: lane_keys,
            sockets,
            pinned: config.pin_lanes,
            offloads,
            flows: Arc::clone(&table),
            affinity: Arc::new(affinity),
            snapshot: Arc::clone(&outputs.snapshot),
        },
        move |lane, reason| {
            let _ = ended.send((lane, reason));
        },
    )?;
    presence::only_we_have(&ends.netlink, &config.tun_name, fleet.lanes.len()).await?;

    // 4 the host
    let mut host_network =
        HostNetwork::open(Some(host_state(&config)))?.with_services(Arc::clone(&outputs.snapshot));
    let wanted = host_config(&config, &plan);
    let report = host_network.apply(&wanted).await?;
    report.changes.iter().for_each(|change| debug!("{change}"));
    report.warnings.iter().for_each(|warning| warn!("{warning}"));
    // Only now has the kernel what was set there, and the sysctls of what was loaded for it.
    table.set_timeouts(&flows::timeouts());
    let mut host_state = host_network.state();
    let kube_proxy = host_state.borrow_and_update().kube_proxy.clone();
    if let Some(place) = &kube_proxy {
        services::yielded(&config, place);
    }
    let (answers, wanted_answers) = watch::channel(services::answers(&config, &plan, kube_proxy.is_some()));
    let (host_wanted, host_reader) = watch::channel(wanted);
    let (host_events, host_news) = mpsc::channel(16);
    tasks.0.push(tokio::spawn(health::serve(wanted_answers, host_state.clone())));
    let host_watch = tokio::spawn(host_network.watch(host_reader, host_events));

    // 5 ready
    handle.start_lanes(serve::lanes(&fleet));
    tasks.0.extend(serve::serve_wireguard(&config, handle.clone()));
    handle.update(|live| {
        live.pod_mtu = plan.pod_mtu;
        live.pod_ranges.clone_from(&plan.pod_ranges);
        live.services_elsewhere = services::elsewhere(&config, kube_proxy.as_deref());
        live.not_ready = None;
    });
    recent::call(&files, &outputs.snapshot.load(), &fleet);
    ready.write(&config.node, plan.pod_mtu)?;
    probe.send_modify(|answers| answers.not_ready = None);
    feed.ready.send_replace(true);
    let confirmation = cni::Confirmation {
        report: outputs.report.clone(),
        contact: feed.contact,
        patience: cni::ANSWERS_WITHIN,
    };
    let netlink = ends.netlink.clone();
    let (cni, cni_tasks) =
        cni::Cni::start(&config, &plan, host_state.clone(), confirmation, netlink, handle.clone())?;
    tasks.0.extend(cni_tasks);
    info!(
        node = %config.node, pods = %list(&plan.pod_ranges), pod_mtu = plan.pod_mtu, lanes = fleet.lanes.len(),
        peers = outputs.snapshot.load().mesh.peers.iter().flatten().count(), encap = config.encap.name(),
        "ready: packets flow"
    );
    Ok(Running {
        config,
        plan,
        settings,
        ends,
        outputs,
        fleet,
        lane_ends,
        host_wanted,
        host_news,
        host_watch,
        host_state,
        answers,
        keys,
        rotations,
        probe,
        flows: table,
        settings_sender,
        handle,
        files,
        ready,
        _ready: feed.ready,
        cni,
        tun_gone: None,
        _tasks: tasks,
    })
}

impl Running {
    // 6 until told to stop
    async fn follow(mut self, stop: &mut Signals) -> Result<End, AgentError> {
        let asked = presence::asked(self.config.standby.then(|| self.config.run_dir.clone()));
        tokio::pin!(asked);
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut key_steps = interval(KEY_STEPS);
        key_steps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let recent = recent::keep(self.files.clone(), self.handle.clone());
        tokio::pin!(recent);
        let keepalive = self.config.keepalive;
        let mut call = interval(Duration::from_secs(keepalive.max(1).into()));
        call.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            tokio::select! {
                () = stop.wait() => break End::Stopped,
                () = &mut asked => break End::SteppedAside,
                Some((lane, reason)) = self.lane_ends.recv() => {
                    return Err(AgentError::LaneFailed { lane, reason });
                }
                changed = self.outputs.plan.changed() => {
                    alive(changed)?;
                    let next = self.outputs.plan.borrow_and_update().clone();
                    if let Some(next) = next {
                        self.obey(next).await?;
                    }
                }
                ended = &mut self.host_watch => return Err(unwatched(ended)),
                Some(news) = self.host_news.recv() => self.host_says(news),
                Ok(()) = self.host_state.changed() => self.kube_proxy_comes_or_goes(),
                Some(order) = self.rotations.recv() => {
                    let news = self.keys.obey(order, &self.fleet);
                    self.announce_keys(news);
                }
                _ = key_steps.tick() => {
                    let shown = self.outputs.report.borrow().keys_shown;
                    let news = self.keys.step(&self.fleet, shown);
                    self.announce_keys(news);
                }
                _ = look.tick() => {
                    self.flows.set_timeouts(&flows::timeouts());
                    self.is_the_device_back()?;
                    self.look().await;
                    self.is_it_ready()?;
                }
                _ = call.tick(), if keepalive > 0 => self.call_everybody(),
                () = &mut recent => {}
            }
        };
        match end {
            End::Stopped => info!(
                "stopping; the interface, routes and rules stay for the next agent (`warren agent --cleanup` \
                 removes them)"
            ),
            End::SteppedAside => info!("another agent takes over, with the interface, routes and rules"),
        }
        recent::note(&self.files, &self.handle).await;
        // The other tasks end with what they belong to; this one would go on for as long as the process does.
        self.host_watch.abort();
        Ok(end)
    }

    async fn obey(&mut self, next: Arc<HostPlan>) -> Result<(), AgentError> {
        self.fleet.ring();
        if next.pod_mtu != self.plan.pod_mtu {
            info!(from = self.plan.pod_mtu, to = next.pod_mtu, "the MTU for new pods has changed");
            if self.probe.borrow().not_ready.is_none() {
                self.ready.write(&self.config.node, next.pod_mtu)?;
            }
        }
        self.handle.update(|live| {
            live.pod_mtu = next.pod_mtu;
            live.pod_ranges.clone_from(&next.pod_ranges);
        });
        self.cni.obey(&next);
        self.plan = next;
        let wanted = host_config(&self.config, &self.plan);
        self.host_wanted.send_if_modified(|now| std::mem::replace(now, wanted) != *now);
        self.answer();
        self.look().await;
        Ok(())
    }

    fn kube_proxy_comes_or_goes(&mut self) {
        match &self.host_state.borrow_and_update().kube_proxy {
            Some(place) => services::yielded(&self.config, place),
            None => services::taken(&self.config),
        }
        let place = self.host_state.borrow().kube_proxy.clone();
        let elsewhere = services::elsewhere(&self.config, place.as_deref());
        self.handle.update(|live| live.services_elsewhere.clone_from(&elsewhere));
        self.answer();
    }

    fn answer(&self) {
        let kube_proxy = self.host_state.borrow().kube_proxy.is_some();
        let answers = services::answers(&self.config, &self.plan, kube_proxy);
        self.answers.send_if_modified(|now| std::mem::replace(now, answers) != *now);
    }

    /// Tells the others of new keys, after the lanes.
    fn announce_keys(&mut self, news: bool) {
        let stands = self.keys.describe();
        if self.handle.live().keys != stands {
            self.handle.update(|live| live.keys.clone_from(&stands));
        }
        if news && self.keys.announce_in(&mut self.settings.announcement) {
            self.settings_sender.send_replace(self.settings.clone());
        }
    }

    async fn look(&mut self) {
        if self.ends.look(&mut self.settings, &self.plan.host_addresses).await {
            self.settings_sender.send_replace(self.settings.clone());
        }
    }

    /// Behind NAT nobody can call us: sessions that are not there are begun from here, and begun again after a
    /// peer was away. Those that are there notice nothing.
    fn call_everybody(&self) {
        let snapshot = self.outputs.snapshot.load();
        let peers = snapshot.mesh.peers.iter().flatten();
        let callable =
            peers.filter(|peer| peer.encap == Some(Encap::WireGuard) && !peer.endpoints.is_empty());
        let ids: Vec<PeerId> = callable.map(|peer| peer.id).collect();
        if !ids.is_empty() {
            self.fleet.initiate(&ids);
        }
    }

    fn host_says(&mut self, news: HostEvent) {
        match news {
            HostEvent::Repaired(report) => {
                self.tun_gone = None;
                report.changes.iter().for_each(|change| info!("repaired: {change}"));
                report.warnings.iter().for_each(|warning| warn!("{warning}"));
            }
            HostEvent::Changed(report) => {
                self.tun_gone = None;
                report.changes.iter().for_each(|change| info!("changed: {change}"));
                report.warnings.iter().for_each(|warning| warn!("{warning}"));
            }
            HostEvent::TunGone { name } => {
                warn!("the interface {name} is gone; its lanes make it again");
                self.tun_gone = Some(clock::now());
                self.fleet.ring();
            }
            HostEvent::Failed(error) => error!("{error}"),
        }
    }

    /// Ready means that packets flow: the device is there, and the host is as planned.
    fn is_it_ready(&mut self) -> Result<(), AgentError> {
        let right = self.host_state.borrow().right;
        let wrong =
            right.is_none_or(|right| clock::wall().duration_since(right).unwrap_or_default() > HOST_PATIENCE);
        let why = match (self.tun_gone, wrong) {
            (Some(_), _) => Some(format!("the interface {} is gone", self.config.tun_name)),
            (None, true) => Some("the node's routes and rules cannot be kept right".to_owned()),
            (None, false) => None,
        };
        let before = self.probe.borrow().not_ready.clone();
        if before == why {
            return Ok(());
        }
        match &why {
            Some(why) => {
                warn!("not ready: {why}");
                self.ready.remove();
            }
            None => {
                info!("ready again");
                self.ready.write(&self.config.node, self.plan.pod_mtu)?;
            }
        }
        self.handle.update(|live| live.not_ready.clone_from(&why));
        self.probe.send_modify(|answers| answers.not_ready = why);
        Ok(())
    }

    /// A device that was renamed or moved to another namespace keeps its queues, so the lanes notice nothing.
    fn is_the_device_back(&self) -> Result<(), AgentError> {
        let gone = self.tun_gone.map(|since| clock::now().saturating_duration_since(since));
        match gone {
            Some(gone) if gone > TUN_PATIENCE => Err(AgentError::DeviceTaken(self.config.tun_name.clone())),
            Some(_) | None => Ok(()),
        }
    }
}

/// The state line feeds everything; without it the agent would go on with what it knew, for ever.
fn alive(changed: Result<(), watch::error::RecvError>) -> Result<(), AgentError> {
    changed.map_err(|_| AgentError::StateLineEnded)
}

fn unwatched(ended: Result<Result<(), HostError>, JoinError>) -> AgentError {
    let source = match ended {
        Ok(Ok(())) => io::Error::other("its task ended"),
        Ok(Err(error)) => return AgentError::Host(error),
        Err(panic) => io::Error::other(panic),
    };
    AgentError::Io { what: "the node's routes and rules are no longer watched", source }
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
    AgentError::NoSuchNode { node, source_name: feed::source_name(config), known }
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
    let mtu = plan.pod_mtu.into();
    let route = |range: ipnet::IpNet| TunnelRoute { range, source: source(range.addr()), mtu };
    let mut routes: Vec<TunnelRoute> = plan.peer_ranges.iter().map(|peer| route(peer.range)).collect();
    // Pods of nodes that nobody has seen yet are answered by us, not sent out in clear.
    for range in &plan.cluster_ranges {
        let known = routes.iter().any(|r| r.range == *range) || plan.pod_ranges.contains(range);
        if !known {
            routes.push(route(*range));
        }
    }
    // The pods' MTU everywhere, also where a path takes more: with br_netfilter the kernel joins a pod's IPv6
    // fragments on the bridge, forgets how large they were, and cuts again only what exceeds the next device.
    // A packet between the two sizes would come out whole and be too big for the other node's bridge, for ever.
    HostConfig {
        tun: config.tun_name.clone(),
        mtu,
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
        services: config.services != ServicesArg::Off,
        yield_services: config.services == ServicesArg::Auto,
        service_routes: services::ranges(plan).into_iter().map(route).collect(),
        node_ports: Arc::clone(&plan.services.node_ports),
        externals: Arc::clone(&plan.services.externals),
        nodeport_ranges: config.nodeport_ranges.clone(),
        protected_ports: protected_ports(config, plan),
        host_addresses: plan.host_addresses.clone(),
        nodeport_localhost: config.nodeport_localhost,
    }
}

/// What the settings say, and the kubelet's port where the Node says it.
fn protected_ports(config: &AgentConfig, plan: &HostPlan) -> BTreeSet<(Protocol, u16)> {
    let mut ports = config.protected_ports();
    ports.extend(plan.kubelet_port.map(|port| (Protocol::Tcp, port)));
    ports
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

fn list(ranges: &[ipnet::IpNet]) -> String {
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn or(text: String, otherwise: &str) -> String {
    if text.is_empty() { otherwise.to_owned() } else { text }
}
