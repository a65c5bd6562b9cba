//! The underlay, the nodes and the pods: who they are, how they are wired, the processes that hold them.
//!
//! The stage's own namespace is the underlay: a bridge with one port per node, and the outside world's seat.
//! A node has `eth0` there, and `cbr0` with two pods, wired as the `bridge` CNI plugin does with `isGateway` and
//! `hairpinMode`. No node has a route to another node's pods.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::link::{End, configure, sysctl, within};
use super::sandbox::{FOLDER, OURSELVES};
use super::traffic::PORT;
use super::{DemoError, DemoOptions, agents, dns, services};

/// All pods of all nodes.
pub(super) const CLUSTER_RANGES: &str = "10.244.0.0/16,fd00:10:244::/48";
/// The bridge of the pods, as kubenet and the `bridge` plugin's examples call it.
const POD_BRIDGE: &str = "cbr0";
/// The outside world's address on the underlay, every node's default gateway.
const UNDERLAY_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// The bridge that joins the nodes.
const UNDERLAY: &str = "underlay";
/// The number of the machine beside the nodes, in both families.
const OUTSIDE_HOST: u8 = 200;
/// The number of the DNS pod on its node.
const DNS_HOST: u8 = 53;

/// Everything there is.
pub(super) struct World {
    /// The network between the nodes.
    pub underlay: File,
    /// Numbered from 1; `nodes[0]` is `node1`.
    pub nodes: Vec<Node>,
    /// A machine on the network between the nodes that is none of them.
    pub outside: Outside,
    /// What was asked for.
    pub options: DemoOptions,
    /// Whether this kernel has IPv6.
    pub v6: bool,
}

/// A machine that knows nothing of Warren, pods or Services.
pub(super) struct Outside {
    /// Keeps its namespaces.
    pub holder: Holder,
    /// Its address.
    pub v4: Ipv4Addr,
    /// And of the other family.
    pub v6: Ipv6Addr,
}

impl Outside {
    /// What to call it.
    pub(super) const NAME: &str = "outside";
}

/// A machine of the cluster.
pub(super) struct Node {
    /// From 1.
    pub number: u8,
    /// `node1`.
    pub name: String,
    /// Keeps its namespaces.
    pub holder: Holder,
    /// Its pods, `pod-1a` first.
    pub pods: Vec<Pod>,
    /// The cluster's DNS, on the last node.
    dns: Option<Pod>,
    /// Its agent, while it runs.
    pub agent: Option<Process>,
    /// What pods are wired with.
    pub pod_mtu: u16,
    /// Answers on the underlay, for comparison.
    _server: Process,
    /// Addresses are not used twice in a row, as host-local's are not.
    next_host: u8,
}

/// A pod: a network namespace and the containers in it.
pub(super) struct Pod {
    /// `pod-1a`: node 1, the first.
    pub name: String,
    /// Its own address.
    pub v4: Ipv4Addr,
    /// And of the other family.
    pub v6: Ipv6Addr,
    /// Keeps its namespaces, as the pause container does.
    pub holder: Holder,
    veth: String,
    _server: Process,
}

impl Pod {
    /// Its address of one family.
    pub(super) fn address(&self, v6: bool) -> IpAddr {
        if v6 { self.v6.into() } else { self.v4.into() }
    }

    /// Where it answers.
    pub(super) fn socket(&self, v6: bool) -> SocketAddr {
        SocketAddr::new(self.address(v6), PORT)
    }
}

impl Node {
    /// Its address on the underlay.
    pub(super) fn address(&self, v6: bool) -> IpAddr {
        if v6 { underlay_v6(10 + self.number).into() } else { underlay_v4(10 + self.number).into() }
    }

    /// Its pod ranges, as `spec.podCIDRs` says.
    pub(super) fn pod_ranges(&self, v6: bool) -> Vec<String> {
        let mut ranges = vec![format!("{}/24", pod_address_v4(self.number, 0))];
        ranges.extend(v6.then(|| format!("{}/64", pod_address_v6(self.number, 0))));
        ranges
    }

    /// Its folder: the agent's state and log, and `run`, which is the node's /run.
    pub(super) fn folder(&self) -> PathBuf {
        Path::new(FOLDER).join("nodes").join(&self.name)
    }

    /// All pods on it, the cluster's DNS too.
    pub(super) fn all_pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.iter().chain(&self.dns)
    }

    fn bridge_addresses(&self, v6: bool) -> Vec<(IpAddr, u8)> {
        let mut addresses = vec![(pod_address_v4(self.number, 1).into(), 24)];
        addresses.extend(v6.then(|| (pod_address_v6(self.number, 1).into(), 64)));
        addresses
    }
}

impl World {
    /// Builds everything but the agents.
    pub(super) fn build(options: &DemoOptions, mut progress: impl FnMut(&str)) -> Result<World, DemoError> {
        let underlay = open_namespace("self")?;
        let v6 = Path::new("/proc/sys/net/ipv6").exists();
        progress("the network between the nodes");
        prepare(&underlay, v6, false)?;
        let mtu = options.mtu;
        configure(&underlay, async |links| {
            links.add_bridge(UNDERLAY, mac_of(UNDERLAY_GATEWAY), mtu).await?;
            for (address, length) in underlay_gateways(v6) {
                links.add_address(UNDERLAY, address, length).await?;
            }
            Ok(())
        })?;
        let outside = make_outside(&underlay, v6, mtu)?;
        let mut world = World { underlay, nodes: Vec::new(), outside, options: options.clone(), v6 };
        write_resolv_conf(v6)?;
        for number in 1..=options.nodes {
            progress(&format!("node{number} and its pods"));
            let mut node = world.make_node(number)?;
            for _ in 0..2 {
                add_pod(&mut node, v6)?;
            }
            if number == options.nodes {
                node.dns = Some(make_dns(&node, v6)?);
            }
            world.nodes.push(node);
        }
        Ok(world)
    }

    /// The pod that is the cluster's DNS, and its node.
    pub(super) fn dns(&self) -> Option<(&Node, &Pod)> {
        self.nodes.iter().find_map(|node| Some((node, node.dns.as_ref()?)))
    }

    /// Starts one more pod on a node, with a name and an address of its own.
    pub(super) fn add_pod(&mut self, node: usize) -> Result<(), DemoError> {
        let v6 = self.v6;
        add_pod(self.node_mut(node)?, v6)
    }

    /// Kills a pod with all its containers, and takes its veth away as CNI DEL would. That first: what is
    /// killed with connections open says nothing more to anybody, as if its machine had lost power.
    pub(super) fn kill_pod(&mut self, node: usize, pod: usize) -> Result<(), DemoError> {
        let node = self.node_mut(node)?;
        if pod >= node.pods.len() {
            return Err(DemoError::Usage(format!("{} has no such pod", node.name)));
        }
        let gone = node.pods.remove(pod);
        configure(&node.holder.network, async |links| links.remove(&gone.veth).await)
    }

    /// Gives the pods of a node the MTU that its agent says is safe.
    pub(super) fn set_pod_mtu(&mut self, node: usize, mtu: u16) -> Result<(), DemoError> {
        let node = self.node_mut(node)?;
        node.pod_mtu = mtu;
        for pod in node.all_pods() {
            configure(&pod.holder.network, async |links| links.set_mtu("eth0", mtu).await)?;
        }
        let veths: Vec<_> = node.all_pods().map(|pod| pod.veth.as_str()).collect();
        configure(&node.holder.network, async |links| {
            for veth in veths {
                links.set_mtu(veth, mtu).await?;
            }
            Ok(())
        })
    }

    fn node_mut(&mut self, index: usize) -> Result<&mut Node, DemoError> {
        self.nodes.get_mut(index).ok_or_else(|| DemoError::Usage(format!("there is no node {}", index + 1)))
    }

    fn make_node(&self, number: u8) -> Result<Node, DemoError> {
        let name = format!("node{number}");
        let folder = Path::new(FOLDER).join("nodes").join(&name);
        for sub in ["state", "run/warren", "run/warren-demo"] {
            let path = folder.join(sub);
            fs::create_dir_all(&path)
                .map_err(|e| DemoError::system(format!("making {}", path.display()), e))?;
        }
        let holder = Holder::start(&name, &[("--run-folder", &folder.join("run"))])?;
        prepare(&holder.network, self.v6, true)?;
        let (v6, mtu) = (self.v6, self.options.mtu);
        plug_in(&self.underlay, &name, &holder, mtu)?;
        let server = Process::serve(&name, holder.pid(), &[any_address(v6, PORT)], false)?;
        let node = Node {
            number,
            name,
            holder,
            pods: Vec::new(),
            dns: None,
            agent: None,
            pod_mtu: mtu,
            _server: server,
            next_host: 2,
        };
        configure(&node.holder.network, async |links| {
            links.up("eth0").await?;
            links.add_address("eth0", node.address(false), 24).await?;
            if v6 {
                links.add_address("eth0", node.address(true), 64).await?;
            }
            for (gateway, _) in underlay_gateways(v6) {
                links.add_default_route(gateway).await?;
            }
            links.add_bridge(POD_BRIDGE, mac_of(pod_address_v4(number, 1)), mtu).await?;
            for (address, length) in node.bridge_addresses(v6) {
                links.add_address(POD_BRIDGE, address, length).await?;
            }
            Ok(())
        })?;
        Ok(node)
    }
}

/// A process that keeps a pod's or a node's namespaces alive.
pub(super) struct Holder {
    process: Process,
    /// The network namespace.
    pub network: File,
}

impl Holder {
    fn start(name: &str, own: &[(&str, &Path)]) -> Result<Holder, DemoError> {
        let mut command = ourselves(None);
        command.args(["hold", name]);
        for (flag, path) in own {
            command.arg(flag).arg(path);
        }
        let process = Process::start(command, &format!("{name}'s holder"), "ready")?;
        let network = open_namespace(&process.id().to_string())?;
        Ok(Holder { process, network })
    }

    /// Its process id, for others to join.
    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }
}

/// A process of ours that ends when this goes.
pub(super) struct Process(pub(super) Child);

impl Process {
    /// Starts it and waits for the line that says it is up.
    pub(super) fn start(mut command: Command, who: &str, awaited: &str) -> Result<Process, DemoError> {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| DemoError::system(format!("starting {who}"), e))?;
        let mut process = Process(child);
        let mut line = String::new();
        if let Some(out) = process.0.stdout.as_mut() {
            // No byte more than the line: what follows is for somebody else.
            BufReader::with_capacity(1, out)
                .read_line(&mut line)
                .map_err(|e| DemoError::system(format!("hearing {who}"), e))?;
        }
        if line.trim_end() == awaited {
            return Ok(process);
        }
        Err(DemoError::Process { who: who.into(), what: "did not come up".into(), log: line })
    }

    /// Starts a container that answers, in the pod or node that `holder` keeps.
    pub(super) fn serve(
        name: &str,
        holder: u32,
        on: &[SocketAddr],
        pings: bool,
    ) -> Result<Process, DemoError> {
        let mut command = ourselves(Some(holder));
        command.args(["serve", "--name", name]);
        for address in on {
            command.arg("--listen").arg(address.to_string());
        }
        if pings {
            command.arg("--pings");
        }
        Process::start(command, &format!("{name}'s server"), "listening")
    }

    fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Our own program as one of the demo's processes, in the pod or node that process `join` keeps.
pub(super) fn ourselves(join: Option<u32>) -> Command {
    let mut command = Command::new(OURSELVES);
    command.arg0("warren").args(["demo", "internal"]);
    if let Some(pid) = join {
        command.arg("--join").arg(pid.to_string());
    }
    // A group of its own: Ctrl-C is the supervisor's business, which ends all at once.
    command.process_group(0);
    command
}

fn add_pod(node: &mut Node, v6: bool) -> Result<(), DemoError> {
    let host = node.next_host;
    let full = || DemoError::Usage(format!("{} is full", node.name));
    // The DNS pod's number is passed by.
    let next = if host + 1 == DNS_HOST { DNS_HOST.checked_add(1) } else { host.checked_add(1) };
    node.next_host = next.ok_or_else(full)?;
    let letter = char::from(b'a' + (host - 2) % 26);
    let (name, veth) = (format!("pod-{}{letter}", node.number), format!("veth{}{letter}", node.number));
    let serve = |holder: u32| Process::serve(&name, holder, &[any_address(v6, PORT)], true);
    let pod = make_pod(node, &name, veth, host, v6, serve)?;
    node.pods.push(pod);
    Ok(())
}

/// The cluster's DNS, as CoreDNS would be: a pod like any other, known by its Service's address.
fn make_dns(node: &Node, v6: bool) -> Result<Pod, DemoError> {
    let serve = |holder: u32| {
        let mut command = ourselves(Some(holder));
        command.args(["dns", "--listen", &any_address(v6, dns::PORT).to_string()]);
        command.arg("--objects").arg(agents::cluster_folder());
        Process::start(command, "the DNS server", "listening")
    };
    make_pod(node, "dns", "vethdns".into(), DNS_HOST, v6, serve)
}

fn make_pod(
    node: &Node,
    name: &str,
    veth: String,
    host: u8,
    v6: bool,
    serve: impl FnOnce(u32) -> Result<Process, DemoError>,
) -> Result<Pod, DemoError> {
    let (v4_address, v6_address) = (pod_address_v4(node.number, host), pod_address_v6(node.number, host));
    let holder = Holder::start(name, &[("--resolv-conf", &resolv_conf())])?;
    prepare(&holder.network, v6, false)?;
    let mtu = node.pod_mtu;
    configure(&node.holder.network, async |links| {
        let far = End { name: "eth0", namespace: Some(&holder.network) };
        links.add_veth(&veth, far, mtu).await?;
        links.attach(&veth, POD_BRIDGE, true).await
    })?;
    let gateways = node.bridge_addresses(v6);
    configure(&holder.network, async |links| {
        links.up("eth0").await?;
        links.add_address("eth0", v4_address.into(), 24).await?;
        if v6 {
            links.add_address("eth0", v6_address.into(), 64).await?;
        }
        for (gateway, _) in gateways {
            links.add_default_route(gateway).await?;
        }
        Ok(())
    })?;
    let server = serve(holder.pid())?;
    Ok(Pod { name: name.into(), v4: v4_address, v6: v6_address, holder, veth, _server: server })
}

fn make_outside(underlay: &File, v6: bool, mtu: u16) -> Result<Outside, DemoError> {
    let holder = Holder::start(Outside::NAME, &[])?;
    prepare(&holder.network, v6, false)?;
    plug_in(underlay, Outside::NAME, &holder, mtu)?;
    let outside = Outside { holder, v4: underlay_v4(OUTSIDE_HOST), v6: underlay_v6(OUTSIDE_HOST) };
    configure(&outside.holder.network, async |links| {
        links.up("eth0").await?;
        links.add_address("eth0", outside.v4.into(), 24).await?;
        if v6 {
            links.add_address("eth0", outside.v6.into(), 64).await?;
        }
        Ok(())
    })?;
    Ok(outside)
}

/// Connects a machine to the network between the nodes.
fn plug_in(underlay: &File, name: &str, holder: &Holder, mtu: u16) -> Result<(), DemoError> {
    configure(underlay, async |links| {
        let far = End { name: "eth0", namespace: Some(&holder.network) };
        links.add_veth(name, far, mtu).await?;
        links.attach(name, UNDERLAY, false).await
    })
}

/// One file for all pods: they are all of one namespace.
fn resolv_conf() -> PathBuf {
    Path::new(FOLDER).join("resolv.conf")
}

fn write_resolv_conf(v6: bool) -> Result<(), DemoError> {
    fs::write(resolv_conf(), services::resolv_conf(v6))
        .map_err(|e| DemoError::system("writing the pods' resolv.conf", e))
}

/// What every new namespace needs before its first device: loopback, and addresses that work at once.
fn prepare(network: &File, v6: bool, router: bool) -> Result<(), DemoError> {
    within(network, || {
        if v6 {
            sysctl("net/ipv6/conf/all/disable_ipv6", "0")?;
            sysctl("net/ipv6/conf/default/disable_ipv6", "0")?;
            // Nobody else can have our addresses: no second of waiting for duplicate detection.
            sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        }
        if router {
            // As the `bridge` plugin does when it is the gateway.
            sysctl("net/ipv4/ip_forward", "1")?;
            if v6 {
                sysctl("net/ipv6/conf/all/forwarding", "1")?;
            }
        }
        Ok(())
    })?;
    configure(network, async |links| links.up("lo").await)
}

fn open_namespace(process: &str) -> Result<File, DemoError> {
    let path = format!("/proc/{process}/ns/net");
    File::open(&path).map_err(|e| DemoError::system(format!("opening {path}"), e))
}

fn underlay_gateways(v6: bool) -> Vec<(IpAddr, u8)> {
    let mut gateways = vec![(UNDERLAY_GATEWAY.into(), 24)];
    gateways.extend(v6.then(|| (Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 1).into(), 64)));
    gateways
}

fn underlay_v4(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, host)
}

fn underlay_v6(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, reads_as(host))
}

fn pod_address_v4(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, host)
}

fn pod_address_v6(node: u8, host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, reads_as(node), 0, 0, 0, reads_as(host))
}

/// A locally administered MAC that says whose it is: 0a:58 and the IPv4 address, as kubenet's bridge had.
fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

/// The number whose hexadecimal form reads as `decimal` does: node 12 has fd00:10:244:12::/64.
fn reads_as(decimal: u8) -> u16 {
    let decimal = u16::from(decimal);
    ((decimal / 100) << 8) | ((decimal / 10 % 10) << 4) | (decimal % 10)
}

fn any_address(v6: bool, port: u16) -> SocketAddr {
    let any: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_alike_in_both_families() {
        assert_eq!(pod_address_v6(2, 3).to_string(), "fd00:10:244:2::3");
        assert_eq!(pod_address_v6(32, 117).to_string(), "fd00:10:244:32::117");
        assert_eq!(pod_address_v4(32, 117).to_string(), "10.244.32.117");
    }
}
