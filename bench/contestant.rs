//! Who is measured, each with its own best settings.

use std::net::IpAddr;

use clap::ValueEnum;

use crate::lab::agent::Agent;
use crate::lab::peer::{KernelVxlan, Neighbours, PORT, Program, WireGuard};
use crate::lab::traffic::reach_family;
use crate::lab::{Lab, Node, Station};

/// A way to carry packets between two namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contestant {
    /// No tunnel: the underlay itself.
    Bare,
    /// The kernel's VXLAN device.
    KernelVxlan,
    /// The reference userspace WireGuard, in Go.
    WireguardGo,
    /// Mullvad's.
    Gotatun,
    /// Cloudflare's.
    Boringtun,
    /// Warren, encrypted.
    WarrenWireguard,
    /// Warren, plain.
    WarrenVxlan,
}

/// A contestant that is up: traffic between the two stations goes through it.
#[derive(Debug)]
pub struct Running {
    // Programs go before the namespaces they run in.
    _agents: Vec<Agent>,
    _programs: Vec<WireGuard>,
    lab: Lab,
    /// The host part of the address that is used on both sides; `None` for the underlay's.
    host: Option<u8>,
}

impl Contestant {
    /// All, from the simplest to ours.
    pub const ALL: [Contestant; 7] = [
        Contestant::Bare,
        Contestant::KernelVxlan,
        Contestant::WireguardGo,
        Contestant::Gotatun,
        Contestant::Boringtun,
        Contestant::WarrenWireguard,
        Contestant::WarrenVxlan,
    ];

    /// The name in tables and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Contestant::Bare => "bare",
            Contestant::KernelVxlan => "kernel-vxlan",
            Contestant::WireguardGo => "wireguard-go",
            Contestant::Gotatun => "gotatun",
            Contestant::Boringtun => "boringtun",
            Contestant::WarrenWireguard => "warren-wireguard",
            Contestant::WarrenVxlan => "warren-vxlan",
        }
    }

    /// What it runs with, for the report.
    pub fn settings(self) -> &'static str {
        match self {
            Contestant::Bare => "veth, all offloads on",
            Contestant::KernelVxlan => "vxlan device, static neighbours as Flannel writes them, MTU 1450",
            Contestant::WireguardGo => {
                "TUN and UDP offloads on (its default), one goroutine set per processor, MTU 1420"
            }
            Contestant::Gotatun => "default features (aws-lc-rs), log level error, MTU 1420",
            Contestant::Boringtun => {
                "one thread per processor, connected sockets, multi-queue (defaults), MTU 1420"
            }
            Contestant::WarrenWireguard | Contestant::WarrenVxlan => {
                "agent with all its routes, rules and nft tables in place; node address to node address"
            }
        }
    }

    /// Brings it up and waits until a packet has gone there and back.
    pub fn set_up(self, mtu: u32, lanes: u8) -> Running {
        let lab = Lab::cable(mtu);
        let running = match self {
            Contestant::Bare => Running { _agents: vec![], _programs: vec![], lab, host: None },
            Contestant::KernelVxlan => kernel_vxlan(lab),
            Contestant::WireguardGo => wireguard(lab, Program::WireguardGo),
            Contestant::Gotatun => wireguard(lab, Program::Gotatun),
            Contestant::Boringtun => wireguard(lab, Program::Boringtun),
            Contestant::WarrenWireguard => warren(lab, "wireguard", lanes),
            Contestant::WarrenVxlan => warren(lab, "vxlan", lanes),
        };
        reach_family(running.station(0), running.station(1), 0);
        running
    }
}

impl Running {
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
    Running { _agents: vec![], _programs: vec![], lab, host: Some(10) }
}

fn wireguard(lab: Lab, program: Program) -> Running {
    let programs: Vec<WireGuard> =
        lab.nodes.iter().map(|node| WireGuard::start_quietly(&lab, node, program)).collect();
    for (node, other) in both_ways(&lab) {
        let key = &programs[usize::from(other.number) - 1].public_key;
        programs[usize::from(node.number) - 1].add_peer(node, other, key, Some((lab.outer(other), PORT)));
    }
    Running { _agents: vec![], _programs: programs, lab, host: Some(10) }
}

fn warren(lab: Lab, encap: &str, lanes: u8) -> Running {
    lab.write_nodes();
    let arguments = ["--encap", encap, "--lanes", &lanes.to_string()];
    let mut agents: Vec<Agent> = lab.nodes.iter().map(|node| Agent::launch(&lab, node, &arguments)).collect();
    agents.iter_mut().for_each(Agent::wait_ready);
    // The node address, 10.244.N.0: as with the others, no bridge and no pod stands between.
    Running { _agents: agents, _programs: vec![], lab, host: Some(0) }
}
