//! The laboratory: nodes with pods in network namespaces on one machine, an underlay between them, one
//! folder of Kubernetes objects, agents and other people's programs, and traffic that checks every byte.

pub mod agent;
pub mod joined;
pub mod netns;
pub mod peer;
pub mod probe;
pub mod raw;
pub mod refuse;
pub mod service;
pub mod traffic;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use warren::io::clock;

use netns::{Netns, veth};

/// All pods of the laboratory.
pub const CLUSTER: &str = "10.244.0.0/16,fd00:10:244::/48";

/// Which addresses the underlay has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

/// Nodes on one underlay.
#[derive(Debug)]
pub struct Lab {
    /// Keeps the folder until the end.
    dir: TempDir,
    /// The nodes; node i has the pod ranges 10.244.i.0/24 and fd00:10:244:i::/64.
    pub nodes: Vec<Node>,
    /// Where the nodes' cables meet, and their default router.
    pub switch: Netns,
    /// The underlay's family.
    pub underlay: Underlay,
}

/// A node: its host network, and perhaps pods behind a bridge.
#[derive(Debug)]
pub struct Node {
    /// Its name in Kubernetes.
    pub name: String,
    /// Counts from 1.
    pub number: u8,
    /// Its host network.
    pub ns: Netns,
    /// Its pods.
    pub pods: Vec<Netns>,
}

impl Lab {
    /// Two nodes without pods on an IPv4 underlay of MTU 1500.
    pub fn two() -> Lab {
        Lab::new(2, Underlay::V4, 1500)
    }

    /// Nodes without pods.
    pub fn new(nodes: u8, underlay: Underlay, mtu: u32) -> Lab {
        require();
        let dir = TempDir::with_prefix("warren-kernel-").expect("make a scratch folder");
        fs::create_dir(dir.path().join("cluster")).expect("make the folder of objects");
        let switch = Netns::new("switch");
        switch.run_all("ip link add br0 type bridge mcast_snooping 0\n ip link set br0 up");
        let mut lab = Lab { dir, nodes: Vec::new(), switch, underlay };
        lab.switch.run_all(&match underlay {
            Underlay::V4 => "ip addr add 10.99.0.254/24 dev br0".to_owned(),
            Underlay::V6 => "ip addr add fd00:99::fe/64 dev br0 nodad".to_owned(),
        });
        for number in 1..=nodes {
            lab.add_node(number, mtu);
        }
        lab
    }

    /// Two nodes joined by one cable and nothing else, for measurements.
    pub fn cable(mtu: u32) -> Lab {
        let lab = Lab::new(2, Underlay::V4, mtu);
        let [a, b] = [&lab.nodes[0], &lab.nodes[1]];
        for node in [a, b] {
            node.ns.run("ip link del eth0");
        }
        veth((&a.ns, "eth0"), (&b.ns, "eth0"), mtu);
        for node in [a, b] {
            node.ns.run(&format!("ip addr add {}/24 dev eth0", node.outer(Underlay::V4)));
            node.ns.run("ip route add default dev eth0");
        }
        lab
    }

    fn add_node(&mut self, number: u8, mtu: u32) {
        let name = format!("node{number}");
        let ns = Netns::new(&name);
        let port = format!("port{number}");
        veth((&self.switch, &port), (&ns, "eth0"), mtu);
        self.switch.run(&format!("ip link set {port} master br0"));
        let node = Node { name, number, ns, pods: Vec::new() };
        node.ns.run_all(&match self.underlay {
            Underlay::V4 => format!(
                "ip addr add {}/24 dev eth0\n ip route add default via 10.99.0.254",
                node.outer(Underlay::V4)
            ),
            Underlay::V6 => format!(
                "ip addr add {}/64 dev eth0 nodad\n ip route add default via fd00:99::fe",
                node.outer(Underlay::V6)
            ),
        });
        self.nodes.push(node);
    }

    /// Gives every node one pod, as the `bridge` plugin would.
    pub fn with_pods(mut self) -> Lab {
        self.nodes.iter_mut().for_each(|node| node.add_pod(1500));
        self
    }

    /// The folder of Kubernetes objects that all agents watch.
    pub fn cluster(&self) -> PathBuf {
        self.dir.path().join("cluster")
    }

    /// The scratch folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The address that a node's peers know.
    pub fn outer(&self, node: &Node) -> IpAddr {
        node.outer(self.underlay)
    }

    /// The address of the switch, who is a stranger to the mesh.
    pub fn outside(&self) -> IpAddr {
        match self.underlay {
            Underlay::V4 => Ipv4Addr::new(10, 99, 0, 254).into(),
            Underlay::V6 => Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0xfe).into(),
        }
    }

    /// Writes every node's object, without annotations.
    pub fn write_nodes(&self) {
        self.nodes.iter().for_each(|node| self.write_node(node, &[]));
    }

    /// Writes one node's object as a control plane would hold it, atomically.
    pub fn write_node(&self, node: &Node, annotations: &[(&str, &str)]) {
        self.write_object(&format!("{}.yaml", node.name), &self.node_object(node, annotations));
    }

    /// Writes any file into the folder, atomically.
    pub fn write_object(&self, file: &str, text: &str) {
        let draft = self.path().join(format!(".{file}.draft"));
        fs::write(&draft, text).expect("write an object");
        fs::rename(&draft, self.cluster().join(file)).expect("move the object into place");
    }

    /// One node's object.
    pub fn node_object(&self, node: &Node, annotations: &[(&str, &str)]) -> String {
        let listed: String = annotations.iter().map(|(k, v)| format!("    {k}: {v:?}\n")).collect();
        let annotated = if listed.is_empty() { String::new() } else { format!("  annotations:\n{listed}") };
        let n = node.number;
        format!(
            "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\n{annotated}spec:\n  \
             podCIDR: 10.244.{n}.0/24\n  podCIDRs:\n  - 10.244.{n}.0/24\n  - fd00:10:244:{n:x}::/64\n\
             status:\n  addresses:\n  - type: InternalIP\n    address: {outer}\n  - type: Hostname\n    \
             address: {name}\n",
            name = node.name,
            outer = self.outer(node),
        )
    }

    /// What a node has published about itself: the value of one annotation.
    pub fn published(&self, node: &Node, annotation: &str) -> Option<String> {
        let text = fs::read_to_string(self.cluster().join(format!("{}.warren.yaml", node.name))).ok()?;
        let key = format!("{annotation}:");
        let line = text.lines().map(|l| l.trim().replace('"', "")).find(|l| l.starts_with(&key))?;
        Some(line[key.len()..].trim().trim_matches('\'').to_owned())
    }
}

impl Node {
    /// Its address on the underlay.
    pub fn outer(&self, underlay: Underlay) -> IpAddr {
        match underlay {
            Underlay::V4 => Ipv4Addr::new(10, 99, 0, self.number).into(),
            Underlay::V6 => Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, self.number.into()).into(),
        }
    }

    /// The host-th address of its pod range, in both families. 0 is the node address.
    pub fn inner(&self, host: u8) -> [IpAddr; 2] {
        let n = self.number;
        [
            Ipv4Addr::new(10, 244, n, host).into(),
            Ipv6Addr::new(0xfd00, 0x10, 0x244, n.into(), 0, 0, 0, host.into()).into(),
        ]
    }

    /// Adds a pod behind the bridge `cbr0`: address 10 for the first, 11 for the next.
    pub fn add_pod(&mut self, mtu: u32) {
        let host = 10 + self.pods.len() as u8;
        let [gateway4, gateway6] = self.inner(1);
        if self.pods.is_empty() {
            self.ns.run_all(&format!(
                "ip link add cbr0 type bridge mcast_snooping 0
                 ip link set cbr0 up
                 ip addr add {gateway4}/24 dev cbr0
                 ip addr add {gateway6}/64 dev cbr0 nodad
                 sysctl -qw net.ipv4.ip_forward=1
                 sysctl -qw net.ipv6.conf.all.forwarding=1"
            ));
        }
        let pod = Netns::new(&format!("{}-pod{host}", self.name));
        let port = format!("veth{host}");
        veth((&self.ns, &port), (&pod, "eth0"), mtu);
        self.ns.run(&format!("ip link set {port} master cbr0"));
        let [v4, v6] = self.inner(host);
        pod.run_all(&format!(
            "ip addr add {v4}/24 dev eth0
             ip addr add {v6}/64 dev eth0 nodad
             ip route add default via {gateway4}
             ip route add default via {gateway6}"
        ));
        self.pods.push(pod);
    }

    /// Gives the pods' ends and the bridge's the MTU that the agent said.
    pub fn set_pod_mtu(&self, mtu: u32) {
        for (host, pod) in (10..).zip(&self.pods) {
            pod.run(&format!("ip link set eth0 mtu {mtu}"));
            self.ns.run(&format!("ip link set veth{host} mtu {mtu}"));
        }
    }

    /// Where traffic to and from the node's first pod is made.
    pub fn pod(&self) -> Station<'_> {
        let ns = self.pods.first().expect("the node has a pod");
        Station { ns, addresses: self.inner(10) }
    }

    /// The host-th address, which the node itself holds.
    pub fn host(&self, host: u8) -> Station<'_> {
        Station { ns: &self.ns, addresses: self.inner(host) }
    }
}

/// Where traffic starts or ends.
#[derive(Clone, Copy, Debug)]
pub struct Station<'a> {
    /// The namespace.
    pub ns: &'a Netns,
    /// Its IPv4 and IPv6 address.
    pub addresses: [IpAddr; 2],
}

/// Polls until the probe gives something; panics when it has not within the time.
pub fn wait_for<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = clock::now() + within;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(clock::now() < deadline, "not within {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Panics, saying what to install, when the machine lacks what these tests need. They are never skipped.
fn require() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make network namespaces: run them as root (sudo -E env \"PATH=$PATH\" cargo test --test kernel)"
    );
    for (program, package) in [
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("wg", "wireguard-tools"),
        ("unshare", "util-linux"),
        ("sysctl", "procps"),
        ("ethtool", "ethtool"),
    ] {
        let found = std::env::var_os("PATH")
            .is_some_and(|paths| std::env::split_paths(&paths).any(|folder| folder.join(program).is_file()));
        assert!(found, "`{program}` is not installed: apt-get install {package}");
    }
    assert!(Path::new("/dev/net/tun").exists(), "/dev/net/tun is missing: modprobe tun");
}
