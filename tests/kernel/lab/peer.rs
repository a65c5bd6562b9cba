//! Other people's programs: userspace WireGuard of three authors, and the kernel's own VXLAN.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{Lab, Node, wait_for};

/// A WireGuard program that is not Warren.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The reference in Go.
    WireguardGo,
    /// Cloudflare's.
    Boringtun,
    /// Mullvad's.
    Gotatun,
}

/// The interface of the other program.
pub const INTERFACE: &str = "wg0";
/// Where it listens.
pub const PORT: u16 = 51820;

impl Program {
    fn file(self) -> &'static str {
        match self {
            Program::WireguardGo => "wireguard-go",
            Program::Boringtun => "boringtun-cli",
            Program::Gotatun => "gotatun",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Program::WireguardGo => &["--foreground", INTERFACE],
            // Leaving privileges asks for a login name, which a machine's script has none of.
            Program::Boringtun | Program::Gotatun => {
                &["--foreground", "--disable-drop-privileges", INTERFACE]
            }
        }
    }
}

/// A running program with its interface `wg0`; dropping it kills it.
#[derive(Debug)]
pub struct WireGuard {
    name: String,
    child: Child,
    log: PathBuf,
    /// Its public key.
    pub public_key: String,
}

impl WireGuard {
    /// Starts it on a node, with a fresh key and no peers; the interface gets the node's 10th pod address.
    pub fn start(lab: &Lab, node: &Node, program: Program) -> WireGuard {
        WireGuard::launch(lab, node, program, "verbose")
    }

    /// The same with as little logging as it can, for measurements.
    pub fn start_quietly(lab: &Lab, node: &Node, program: Program) -> WireGuard {
        WireGuard::launch(lab, node, program, "error")
    }

    fn launch(lab: &Lab, node: &Node, program: Program, logging: &str) -> WireGuard {
        let log = lab.path().join(format!("{}-{}.log", node.name, program.file()));
        let out = File::create(&log).expect("make a log");
        let child = node
            .ns
            .command(binary(program.file()))
            .args(program.arguments())
            .env("LOG_LEVEL", logging)
            .env("WG_LOG_LEVEL", if logging == "error" { "error" } else { "info" })
            .env("WG_THREADS", std::thread::available_parallelism().map_or(4, usize::from).to_string())
            .stdout(out.try_clone().expect("duplicate the log"))
            .stderr(out)
            .spawn()
            .unwrap_or_else(|e| panic!("start {}: {e}", program.file()));
        let (private, public_key) = key_pair();
        let key_file = lab.path().join(format!("{}.key", node.name));
        fs::write(&key_file, private).expect("write the key");
        let peer = WireGuard { name: node.name.clone(), child, log, public_key };
        wait_for(&format!("{} has made {INTERFACE}", program.file()), Duration::from_secs(10), || {
            node.ns.attempt(&format!("wg show {INTERFACE}")).status.success().then_some(())
        });
        let [v4, v6] = node.inner(10);
        node.ns.run_all(&format!(
            "wg set {INTERFACE} private-key {} listen-port {PORT}
             ip addr add {v4}/32 dev {INTERFACE}
             ip addr add {v6}/128 dev {INTERFACE} nodad
             ip link set {INTERFACE} mtu 1420 up", // what wg-quick gives it, and Warren its pods
            key_file.display(),
        ));
        peer
    }

    /// Tells it about a node: key, endpoint, and the pods behind it.
    pub fn add_peer(&self, on: &Node, peer: &Node, key: &str, endpoint: Option<(IpAddr, u16)>) {
        let n = peer.number;
        let endpoint = match endpoint {
            Some((IpAddr::V4(address), port)) => format!("endpoint {address}:{port}"),
            Some((IpAddr::V6(address), port)) => format!("endpoint [{address}]:{port}"),
            None => String::new(),
        };
        let [v4, v6] = [format!("10.244.{n}.0/24"), format!("fd00:10:244:{n:x}::/64")];
        let [source4, source6] = on.inner(10);
        on.ns.run_all(&format!(
            "wg set {INTERFACE} peer {key} {endpoint} allowed-ips {v4},{v6}
             ip route add {v4} dev {INTERFACE} src {source4}
             ip route add {v6} dev {INTERFACE} src {source6}"
        ));
    }

    /// Its process.
    #[allow(dead_code)] // for those who measure it
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When its last handshake with anybody was, in seconds since 1970; 0 for never.
    pub fn last_handshake(on: &Node) -> u64 {
        last_handshake(on, INTERFACE)
    }
}

/// The latest handshake that `wg show` tells of.
pub fn last_handshake(on: &Node, interface: &str) -> u64 {
    let text = on.ns.run(&format!("wg show {interface} latest-handshakes"));
    text.split_whitespace().filter_map(|word| word.parse().ok()).max().unwrap_or(0)
}

impl Drop for WireGuard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let tail = log.get(log.len().saturating_sub(3000)..).unwrap_or(&log);
            eprintln!("--- log of the other program on {} (last part)\n{tail}\n---", self.name);
        }
    }
}

/// A private and a public key, made by `wg`.
fn key_pair() -> (String, String) {
    let private = Command::new("wg").arg("genkey").output().expect("run wg").stdout;
    let mut wg = Command::new("wg")
        .arg("pubkey")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run wg pubkey");
    let mut stdin = wg.stdin.take().expect("stdin is piped");
    std::io::Write::write_all(&mut stdin, &private).expect("give wg the key");
    drop(stdin);
    let public = wg.wait_with_output().expect("wait for wg").stdout;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("keys are base64").trim().to_owned();
    (text(private), text(public))
}

/// Where `tests/peers.sh` puts what it builds.
pub fn binary(name: &str) -> PathBuf {
    let folder = std::env::var_os("WARREN_PEERS").map(PathBuf::from).unwrap_or_else(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
        std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("warren-peers")
    });
    let path = folder.join("bin").join(name);
    assert!(path.is_file(), "{} is not built: run tests/peers.sh first", path.display());
    path
}

/// VXLAN of the kernel, as a node's end.
#[derive(Clone, Copy, Debug)]
pub struct KernelVxlan<'a> {
    node: &'a Node,
}

/// How the kernel's end finds out MAC addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbours<'a> {
    /// As Flannel does: routes via the node address, neighbour and forwarding entries written.
    Static {
        /// The other end's MAC address.
        mac: &'a str,
    },
    /// By ARP and neighbour discovery, flooded to the other end.
    Learnt,
}

impl<'a> KernelVxlan<'a> {
    /// The MAC address of a node's device.
    pub fn mac(node: &Node) -> String {
        format!("02:76:78:00:00:{:02x}", node.number)
    }

    /// The device `vx0`, without anybody at the other end.
    pub fn new(lab: &Lab, node: &'a Node, vni: u32, port: u16) -> KernelVxlan<'a> {
        let mac = KernelVxlan::mac(node);
        let [node4, node6] = node.inner(0);
        let [v4, v6] = node.inner(10);
        node.ns.run_all(&format!(
            "ip link add vx0 address {mac} type vxlan id {vni} local {} dev eth0 dstport {port}
             ip addr add {node4}/32 dev vx0
             ip addr add {node6}/128 dev vx0 nodad
             ip link set vx0 up
             ip addr add {v4}/32 dev vx0
             ip addr add {v6}/128 dev vx0 nodad",
            lab.outer(node)
        ));
        KernelVxlan { node }
    }

    /// Makes it sum its packets itself, as a network card would for it. On a cable between machines that is how
    /// they arrive; a veth pair hands on the kernel's promise to do so instead, and a program that reads the
    /// packet from a UDP socket sees the promise only.
    pub fn sum_by_itself(&self) {
        self.node.ns.run("ethtool -K vx0 tx off");
    }

    /// Lets it leave the sums to a card that is not there, packet by packet: what another container or virtual
    /// machine of the same host sends.
    pub fn owe_sums(&self) {
        self.node.ns.run("ethtool -K vx0 tx on tso off gso off");
    }

    /// Connects it with the other end.
    pub fn connect(&self, lab: &Lab, other: &Node, how: Neighbours<'_>) {
        let n = other.number;
        let to = lab.outer(other);
        let [gateway4, gateway6] = other.inner(0);
        let [source4, source6] = self.node.inner(10);
        let [range4, range6] = [format!("10.244.{n}.0/24"), format!("fd00:10:244:{n:x}::/64")];
        self.node.ns.run_all(&match how {
            Neighbours::Static { mac } => format!(
                "bridge fdb append {mac} dev vx0 dst {to}
                 ip neigh add {gateway4} lladdr {mac} dev vx0 nud permanent
                 ip neigh add {gateway6} lladdr {mac} dev vx0 nud permanent
                 ip route add {range4} via {gateway4} dev vx0 onlink src {source4}
                 ip route add {gateway6} dev vx0
                 ip route add {range6} via {gateway6} dev vx0 src {source6}"
            ),
            Neighbours::Learnt => format!(
                "bridge fdb append 00:00:00:00:00:00 dev vx0 dst {to}
                 ip route add {range4} dev vx0 src {source4}
                 ip route add {range6} dev vx0 src {source6}"
            ),
        });
    }
}
