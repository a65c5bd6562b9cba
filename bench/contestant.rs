//! Who is measured, each with its own best settings.

use std::fs::File;
use std::net::IpAddr;
use std::process::{Child, Command};
use std::time::Duration;

use clap::ValueEnum;

use crate::figure::Work;
use crate::lab::agent::{Agent, warren};
use crate::lab::peer::{KernelVxlan, Neighbours, PORT, Program, WireGuard, binary};
use crate::lab::traffic::reach_family;
use crate::lab::{Lab, Node, Station, wait_for};

/// A way to carry packets between two namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contestant {
    /// No tunnel: the underlay itself.
    Bare,
    /// The kernel's VXLAN device.
    KernelVxlan,
    /// Flannel's userspace back end.
    FlannelUdp,
    /// The reference userspace WireGuard, in Go.
    WireguardGo,
    /// Mullvad's.
    Gotatun,
    /// Cloudflare's.
    Boringtun,
    /// Warren, encrypted.
    WarrenWireguard,
    /// The same with two lanes, whatever the machine.
    #[value(name = "warren-wireguard-2-lanes")]
    WarrenWireguard2,
    /// Warren, plain.
    WarrenVxlan,
    /// The same with two lanes.
    #[value(name = "warren-vxlan-2-lanes")]
    WarrenVxlan2,
}

/// A contestant that is up: traffic between the two stations goes through it.
#[derive(Debug)]
pub struct Running {
    // Programs go before the namespaces they run in.
    _agents: Vec<Agent>,
    _programs: Vec<WireGuard>,
    _flannels: Vec<Flannel>,
    lab: Lab,
    /// What carries the packets on each node, if it is a program.
    pids: [Option<u32>; 2],
    /// The host part of the address that is used on both sides; `None` for the underlay's.
    host: Option<u8>,
    /// Of each agent.
    lanes: Option<usize>,
}

impl Contestant {
    /// All, from the simplest to ours.
    pub const ALL: [Contestant; 10] = [
        Contestant::Bare,
        Contestant::KernelVxlan,
        Contestant::FlannelUdp,
        Contestant::WireguardGo,
        Contestant::Gotatun,
        Contestant::Boringtun,
        Contestant::WarrenWireguard,
        Contestant::WarrenWireguard2,
        Contestant::WarrenVxlan,
        Contestant::WarrenVxlan2,
    ];

    /// The name in tables and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Contestant::Bare => "bare",
            Contestant::KernelVxlan => "kernel-vxlan",
            Contestant::FlannelUdp => "flannel-udp",
            Contestant::WireguardGo => "wireguard-go",
            Contestant::Gotatun => "gotatun",
            Contestant::Boringtun => "boringtun",
            Contestant::WarrenWireguard => "warren-wireguard",
            Contestant::WarrenWireguard2 => "warren-wireguard-2-lanes",
            Contestant::WarrenVxlan => "warren-vxlan",
            Contestant::WarrenVxlan2 => "warren-vxlan-2-lanes",
        }
    }

    /// The contestant of that name.
    pub fn named(name: &str) -> Option<Contestant> {
        Contestant::ALL.into_iter().find(|contestant| contestant.name() == name)
    }

    /// Whether it is ours.
    pub fn is_ours(self) -> bool {
        self.agent().is_some()
    }

    /// What an agent of ours is told: the encapsulation, and the lanes if they are not those of the run.
    fn agent(self) -> Option<(&'static str, Option<&'static str>)> {
        match self {
            Contestant::Bare
            | Contestant::KernelVxlan
            | Contestant::FlannelUdp
            | Contestant::WireguardGo
            | Contestant::Gotatun
            | Contestant::Boringtun => None,
            Contestant::WarrenWireguard => Some(("wireguard", None)),
            Contestant::WarrenWireguard2 => Some(("wireguard", Some("2"))),
            Contestant::WarrenVxlan => Some(("vxlan", None)),
            Contestant::WarrenVxlan2 => Some(("vxlan", Some("2"))),
        }
    }

    /// Whether a run belongs to it when none is asked for by name: of two lanes, what lanes are for, and what a
    /// second thread that waits for packets costs the latency of the first.
    pub fn usually_does(self, work: Work) -> bool {
        let has_set_lanes = self.agent().is_some_and(|(_, lanes)| lanes.is_some());
        match work {
            Work::Tcp | Work::Tcp4 | Work::Tcp16 | Work::Udp | Work::TcpLatency => true,
            Work::TcpReverse
            | Work::UdpSmall
            | Work::UdpLossFree
            | Work::UdpSmallLossFree
            | Work::UdpLatency
            | Work::TcpLatencyLoaded
            | Work::UdpLatencyLoaded
            | Work::Idle => !has_set_lanes,
        }
    }

    /// What it runs with, for the report.
    pub fn settings(self) -> &'static str {
        match self {
            Contestant::Bare => "the veth pair itself, all offloads on",
            Contestant::KernelVxlan => {
                "vxlan device, static neighbours as Flannel writes them, all offloads on, MTU 1450"
            }
            Contestant::FlannelUdp => {
                "the back end `udp` of flanneld, given its two leases by bench/flannel_udp.go; it has no settings; MTU 1472"
            }
            Contestant::WireguardGo => {
                "TUN and UDP offloads on (its default), as many workers as processors (its default), log level error, MTU 1420"
            }
            Contestant::Gotatun => "default features (aws-lc-rs), log level error, MTU 1420",
            Contestant::Boringtun => {
                "one thread for each processor, connected sockets, multi-queue (defaults), log level error, MTU 1420"
            }
            Contestant::WarrenWireguard | Contestant::WarrenVxlan => {
                "agent with all its routes, rules and nft tables in place; node address to node address"
            }
            Contestant::WarrenWireguard2 | Contestant::WarrenVxlan2 => {
                "the same with --lanes 2, whatever the machine; only some of the figures unless they are asked for"
            }
        }
    }

    /// The version that is measured.
    pub fn version(self) -> String {
        match self {
            Contestant::Bare | Contestant::KernelVxlan => {
                format!("Linux {}", kernel())
            }
            Contestant::FlannelUdp => recorded("flannel-udp"),
            Contestant::WireguardGo => recorded("wireguard-go"),
            Contestant::Gotatun => recorded("gotatun"),
            Contestant::Boringtun => recorded("boringtun-cli"),
            Contestant::WarrenWireguard
            | Contestant::WarrenWireguard2
            | Contestant::WarrenVxlan
            | Contestant::WarrenVxlan2 => {
                // One version has many builds.
                let sum = first_line(Command::new("sha256sum").arg(warren()));
                let version = first_line(Command::new(warren()).arg("--version"));
                format!("{version}, sha256 {}", sum.get(..12).unwrap_or("unknown"))
            }
        }
    }

    /// Brings it up and waits until a packet has gone there and back.
    pub fn set_up(self, mtu: u32, lanes: &str) -> Running {
        let lab = Lab::cable(mtu);
        let running = match self {
            Contestant::Bare => Running::of(lab, None),
            Contestant::KernelVxlan => kernel_vxlan(lab),
            Contestant::FlannelUdp => flannel(lab),
            Contestant::WireguardGo => wireguard(lab, Program::WireguardGo),
            Contestant::Gotatun => wireguard(lab, Program::Gotatun),
            Contestant::Boringtun => wireguard(lab, Program::Boringtun),
            Contestant::WarrenWireguard
            | Contestant::WarrenWireguard2
            | Contestant::WarrenVxlan
            | Contestant::WarrenVxlan2 => {
                let (encap, own) = self.agent().expect("an agent of ours");
                agents(lab, encap, own.unwrap_or(lanes))
            }
        };
        reach_family(running.station(0), running.station(1), 0);
        running
    }
}

impl Running {
    /// Nothing but the laboratory yet.
    fn of(lab: Lab, host: Option<u8>) -> Running {
        Running {
            _agents: vec![],
            _programs: vec![],
            _flannels: vec![],
            lab,
            pids: [None; 2],
            host,
            lanes: None,
        }
    }

    /// The processes that carry the packets, of each node.
    pub fn programs(&self) -> [Option<u32>; 2] {
        self.pids
    }

    /// How many lanes each agent has: `auto` is another number on another machine.
    pub fn lanes(&self) -> Option<usize> {
        self.lanes
    }

    /// One of the two ends.
    pub fn station(&self, index: usize) -> Station<'_> {
        let node = &self.lab.nodes[index];
        match self.host {
            Some(host) => node.host(host),
            None => Station { ns: &node.ns, addresses: [self.lab.outer(node); 2] },
        }
    }

    /// Its IPv4 address.
    pub fn address(&self, index: usize) -> IpAddr {
        self.station(index).addresses[0]
    }
}

fn both_ways(lab: &Lab) -> [(&Node, &Node); 2] {
    let [a, b] = [&lab.nodes[0], &lab.nodes[1]];
    [(a, b), (b, a)]
}

fn kernel_vxlan(lab: Lab) -> Running {
    for (node, other) in both_ways(&lab) {
        let device = KernelVxlan::new(&lab, node, 1, 8472);
        let mac = KernelVxlan::mac(other);
        device.connect(&lab, other, Neighbours::Static { mac: &mac });
    }
    Running::of(lab, Some(10))
}

/// One end of Flannel's userspace back end; dropping it kills it.
#[derive(Debug)]
struct Flannel(Child);

impl Drop for Flannel {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn flannel(lab: Lab) -> Running {
    let mut flannels = Vec::new();
    for (node, other) in both_ways(&lab) {
        let lease = |node: &Node| [format!("10.244.{}.0/24", node.number), lab.outer(node).to_string()];
        let log = File::create(lab.path().join(format!("{}-flannel.log", node.name))).expect("make a log");
        let mut command = node.ns.command(binary("flannel-udp"));
        command.args(["eth0", "10.244.0.0/16"]).args(lease(node)).args(lease(other));
        command.stdout(log.try_clone().expect("duplicate the log")).stderr(log);
        flannels.push(Flannel(command.spawn().expect("start flannel-udp")));
        wait_for("flannel-udp has made flannel0", Duration::from_secs(10), || {
            node.ns.attempt("ip link show dev flannel0 up").status.success().then_some(())
        });
    }
    let pids = [0, 1].map(|i: usize| Some(flannels[i].0.id()));
    Running { _flannels: flannels, pids, ..Running::of(lab, Some(0)) }
}

fn wireguard(lab: Lab, program: Program) -> Running {
    let programs: Vec<WireGuard> =
        lab.nodes.iter().map(|node| WireGuard::start_quietly(&lab, node, program)).collect();
    for (node, other) in both_ways(&lab) {
        let key = &programs[usize::from(other.number) - 1].public_key;
        programs[usize::from(node.number) - 1].add_peer(node, other, key, Some((lab.outer(other), PORT)));
    }
    let pids = [0, 1].map(|i: usize| Some(programs[i].pid()));
    Running { _programs: programs, pids, ..Running::of(lab, Some(10)) }
}

fn agents(lab: Lab, encap: &str, lanes: &str) -> Running {
    lab.write_nodes();
    let arguments = ["--encap", encap, "--lanes", lanes];
    let mut agents: Vec<Agent> = lab.nodes.iter().map(|node| Agent::launch(&lab, node, &arguments)).collect();
    agents.iter_mut().for_each(Agent::wait_ready);
    // The node address, 10.244.N.0: as with the others, no bridge and no pod stands between.
    let pids = [0, 1].map(|i: usize| Some(agents[i].pid()));
    let lanes = lab.published(&lab.nodes[0], "warren.dev/lanes").map(|lanes| lanes.split(',').count());
    Running { _agents: agents, pids, lanes, ..Running::of(lab, Some(0)) }
}

/// The version that tests/peers.sh has built.
fn recorded(program: &str) -> String {
    let bin = binary(program);
    let folder = bin.parent().and_then(std::path::Path::parent).expect("the peers' folder");
    let text = std::fs::read_to_string(folder.join(format!("{program}.version"))).unwrap_or_default();
    // Behind it may stand what else a new build depends on.
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}

/// The kernel's version, without what its builder has added.
pub fn kernel() -> String {
    let release = first_line(Command::new("uname").arg("-r"));
    release.split('-').next().unwrap_or_default().to_owned()
}

/// The first line that a program prints, if it is not empty.
pub fn first_line(command: &mut Command) -> String {
    let text = command.output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().find(|line| !line.is_empty()).unwrap_or("unknown").to_owned()
}
