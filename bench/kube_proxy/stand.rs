//! Who is measured: two nodes with a pod each, a tunnel between them, and whoever does the Services.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::ValueEnum;
use serde_json::Value;

use crate::api::Api;
use crate::lab::agent::Agent;
use crate::lab::peer::{INTERFACE, KernelVxlan, PORT, Program, WireGuard};
use crate::lab::traffic::reach_family;
use crate::lab::{Lab, Node, Underlay, wait_for};
use crate::objects;
use crate::proxy::KubeProxy;

/// Services and a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contestant {
    /// kube-proxy, and the kernel's VXLAN device.
    KubeProxyKernelVxlan,
    /// kube-proxy in iptables mode, and the kernel's VXLAN device.
    KubeProxyIptablesKernelVxlan,
    /// kube-proxy, and the reference userspace WireGuard.
    KubeProxyWireguardGo,
    /// Warren, plain.
    WarrenVxlan,
    /// Warren, encrypted.
    WarrenWireguard,
}

/// The Service's address.
pub const CLUSTER_IP: [u8; 4] = [10, 96, 0, 10];
/// Name, port, target port: for connections, and for iperf3.
pub const PORTS: [(&str, u16, u16); 2] = [("web", 80, 8080), ("iperf", 5201, 5201)];

/// kube-proxy's other mode.
const IPTABLES: &str = "--proxy-mode=iptables";

/// A contestant that is up: the Service is answered from the first node's pod by the second's.
#[derive(Debug)]
pub struct Stand {
    // Programs go before the namespaces they run in.
    _agents: Vec<Agent>,
    _proxies: Vec<KubeProxy>,
    _apis: Vec<Api>,
    _programs: Vec<WireGuard>,
    lab: Lab,
}

impl Contestant {
    /// All: each of ours behind its peer.
    pub const ALL: [Contestant; 5] = [
        Contestant::KubeProxyKernelVxlan,
        Contestant::KubeProxyIptablesKernelVxlan,
        Contestant::WarrenVxlan,
        Contestant::KubeProxyWireguardGo,
        Contestant::WarrenWireguard,
    ];

    /// The name in tables and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Contestant::KubeProxyKernelVxlan => "kube-proxy-kernel-vxlan",
            Contestant::KubeProxyIptablesKernelVxlan => "kube-proxy-iptables-kernel-vxlan",
            Contestant::KubeProxyWireguardGo => "kube-proxy-wireguard-go",
            Contestant::WarrenVxlan => "warren-vxlan",
            Contestant::WarrenWireguard => "warren-wireguard",
        }
    }

    /// Whom ours is compared with, and what part of it must be reached, if one must.
    pub fn peers(self) -> &'static [(Contestant, Option<f64>)] {
        match self {
            Contestant::KubeProxyKernelVxlan
            | Contestant::KubeProxyIptablesKernelVxlan
            | Contestant::KubeProxyWireguardGo => &[],
            Contestant::WarrenVxlan => &[
                (Contestant::KubeProxyKernelVxlan, Some(0.5)),
                (Contestant::KubeProxyIptablesKernelVxlan, None),
            ],
            Contestant::WarrenWireguard => &[(Contestant::KubeProxyWireguardGo, Some(1.5))],
        }
    }

    /// What it runs with, for the report.
    pub fn settings(self) -> String {
        let proxy = || format!("kube-proxy {}", KubeProxy::ARGUMENTS.join(" "));
        match self {
            Contestant::KubeProxyKernelVxlan => {
                format!("{}; vxlan device, static neighbours as Flannel writes them, pod MTU 1450", proxy())
            }
            Contestant::KubeProxyIptablesKernelVxlan => {
                format!("the same with {IPTABLES}")
            }
            Contestant::KubeProxyWireguardGo => {
                format!("{}; wireguard-go with its defaults, pod MTU 1420", proxy())
            }
            Contestant::WarrenVxlan => "warren agent --encap vxlan --services on".to_owned(),
            Contestant::WarrenWireguard => "warren agent --encap wireguard --services on".to_owned(),
        }
    }

    /// Brings it up and waits until the Service is in the packets' way.
    pub fn set_up(self) -> Stand {
        let mut lab = Lab::cable(1500);
        lab.nodes.iter_mut().for_each(|node| node.add_pod(1500));
        let stand = match self {
            Contestant::KubeProxyKernelVxlan => kernel_vxlan(lab, &[]),
            Contestant::KubeProxyIptablesKernelVxlan => kernel_vxlan(lab, &[IPTABLES]),
            Contestant::KubeProxyWireguardGo => wireguard_go(lab),
            Contestant::WarrenVxlan => warren(lab, "vxlan"),
            Contestant::WarrenWireguard => warren(lab, "wireguard"),
        };
        reach_family(stand.client().pod(), stand.server().pod(), 0);
        stand
    }
}

impl Stand {
    /// The node of the client's pod.
    pub fn client(&self) -> &Node {
        &self.lab.nodes[0]
    }

    /// The node of the server's pod.
    pub fn server(&self) -> &Node {
        &self.lab.nodes[1]
    }

    /// The server's own address.
    pub fn pod(&self) -> IpAddr {
        self.server().pod().addresses[0]
    }

    /// Waits until the Service leads to a server that listens.
    pub fn wait_served(&self) {
        let target = SocketAddr::from((CLUSTER_IP, PORTS[0].1));
        let attempt = || std::net::TcpStream::connect_timeout(&target, Duration::from_millis(100)).ok();
        wait_for("the Service answers", Duration::from_secs(20), || self.client().pod().ns.enter(attempt));
    }
}

/// The Service, its endpoint in the second node's pod, and the nodes.
fn cluster(lab: &Lab) -> Vec<Value> {
    let endpoint = (lab.nodes[1].pod().addresses[0].to_string(), lab.nodes[1].name.clone());
    let node = |node: &Node| {
        let pods = format!("10.244.{}.0/24", node.number);
        objects::named_node(&node.name, &pods, &node.outer(Underlay::V4).to_string())
    };
    let mut all: Vec<Value> = lab.nodes.iter().map(node).collect();
    all.push(objects::named_service("server", CLUSTER_IP.into(), &PORTS));
    all.push(objects::named_slice("server", &PORTS, &[endpoint]));
    all
}

fn both_ways(lab: &Lab) -> [(&Node, &Node); 2] {
    let [a, b] = [&lab.nodes[0], &lab.nodes[1]];
    [(a, b), (b, a)]
}

fn kernel_vxlan(lab: Lab, arguments: &[&str]) -> Stand {
    for (node, other) in both_ways(&lab) {
        let (mac, their_mac) = (KernelVxlan::mac(node), KernelVxlan::mac(other));
        let ([address, _], [gateway, _]) = (node.inner(0), other.inner(0));
        node.ns.run_all(&format!(
            "ip link add vx0 address {mac} type vxlan id 1 local {} dev eth0 dstport 8472
             ip addr add {address}/32 dev vx0
             ip link set vx0 up
             bridge fdb append {their_mac} dev vx0 dst {}
             ip neigh add {gateway} lladdr {their_mac} dev vx0 nud permanent
             ip route add 10.244.{}.0/24 via {gateway} dev vx0 onlink",
            lab.outer(node),
            lab.outer(other),
            other.number
        ));
        node.set_pod_mtu(1450);
    }
    with_kube_proxy(lab, Vec::new(), arguments)
}

fn wireguard_go(lab: Lab) -> Stand {
    let programs: Vec<WireGuard> =
        lab.nodes.iter().map(|node| WireGuard::start_quietly(&lab, node, Program::WireguardGo)).collect();
    for (node, other) in both_ways(&lab) {
        let key = &programs[usize::from(other.number) - 1].public_key;
        programs[usize::from(node.number) - 1].add_peer(node, other, key, Some((lab.outer(other), PORT)));
        // The laboratory gives the interface the address that the pod has here; its routes go with it.
        let [v4, v6] = node.inner(10);
        node.ns.run_all(&format!(
            "ip addr del {v4}/32 dev {INTERFACE}
             ip addr del {v6}/128 dev {INTERFACE}
             ip route replace 10.244.{}.0/24 dev {INTERFACE}",
            other.number
        ));
        node.set_pod_mtu(1420);
    }
    with_kube_proxy(lab, programs, &[])
}

fn with_kube_proxy(lab: Lab, programs: Vec<WireGuard>, arguments: &[&str]) -> Stand {
    let objects = cluster(&lab);
    let apis = lab.nodes.iter().map(|node| Api::start(&node.ns, objects.clone())).collect();
    let start = |node: &Node| {
        let log = lab.path().join(format!("{}-kube-proxy.log", node.name));
        KubeProxy::start_with(&node.ns, &node.name, log, arguments)
    };
    let proxies = lab.nodes.iter().map(start).collect();
    Stand { _agents: vec![], _proxies: proxies, _apis: apis, _programs: programs, lab }
}

fn warren(lab: Lab, encap: &str) -> Stand {
    // The same objects: JSON is YAML.
    for (number, object) in cluster(&lab).iter().enumerate() {
        lab.write_object(&format!("{number}.yaml"), &object.to_string());
    }
    let arguments = ["--encap", encap, "--services", "on", "--service-cidr", "10.96.0.0/16"];
    let mut agents: Vec<Agent> = lab.nodes.iter().map(|node| Agent::launch(&lab, node, &arguments)).collect();
    agents.iter_mut().for_each(Agent::wait_ready);
    let mtu = agents.iter().map(Agent::pod_mtu).min().expect("agents");
    lab.nodes.iter().for_each(|node| node.set_pod_mtu(mtu));
    Stand { _agents: agents, _proxies: vec![], _apis: vec![], _programs: vec![], lab }
}
