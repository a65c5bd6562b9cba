//! The stage: namespaces that go with their test, and how to look and to break things in them.

use std::fs::File;
use std::future::Future;
use std::net::IpAddr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::sync::{mpsc, watch};
use warren::io::host::{HostConfig, HostEvent, HostNetwork, TunnelRoute};

/// A repair may take so long.
pub(crate) const REPAIR: Duration = Duration::from_secs(2);

/// A namespace with a tunnel device and a pod bridge in it.
pub(crate) struct Node(pub(crate) Namespace);

impl Node {
    pub(crate) fn new() -> Self {
        let namespace = Namespace::new();
        namespace.enter(|| {
            sh("ip link set lo up");
            sh("ip tuntap add dev warren0 mode tun");
            sh("ip link add cbr0 address 02:00:00:00:00:01 type bridge");
            sh("ip addr add 10.244.1.1/24 dev cbr0");
            sh("ip -6 addr add fd00:1::1/64 dev cbr0 nodad");
            sh("ip link set cbr0 up");
        });
        Self(namespace)
    }

    pub(crate) fn run<F: Future<Output = ()> + Send>(&self, test: F) {
        self.0.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test);
        });
    }
}

/// A network namespace that goes when the test ends, however it ends.
pub(crate) struct Namespace {
    pub(crate) name: String,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(nix::unistd::geteuid().is_root(), "these tests make network namespaces: run them as root");
        let name = format!("wh-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        sh(&format!("ip netns add {name}"));
        let namespace = Self { name };
        // A forwarder asks for neighbours from its link-local address, which duplicate detection
        // keeps back for the first two seconds.
        namespace.enter(|| sh("sysctl -w net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0"));
        namespace
    }

    /// Runs `work` on a thread of its own inside: a namespace belongs to a thread.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

pub(crate) fn config() -> HostConfig {
    let route = |range: &str, source: &str| TunnelRoute {
        range: range.parse().unwrap(),
        source: Some(ip(source)),
        mtu: 1380,
    };
    HostConfig {
        tun: "warren0".to_owned(),
        mtu: 1400,
        node_addresses: vec![ip("10.244.1.0"), ip("fd00:1::")],
        loop_v4: "169.254.77.1".parse().unwrap(),
        loop_v6: "fdff::77".parse().unwrap(),
        pod_ranges: vec!["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        tunnel_routes: vec![route("10.244.0.0/16", "10.244.1.0"), route("fd00::/16", "fd00:1::")],
        // One inside the other, as settings and what is seen may be.
        cluster_ranges: ["10.244.0.0/16", "10.244.1.0/24", "fd00::/16"].map(|r| r.parse().unwrap()).to_vec(),
        masquerade: true,
        encrypted: true,
        services: true,
        yield_services: false,
        service_routes: vec![route("10.96.0.0/16", "10.244.1.0"), route("fd96::/108", "fd00:1::")],
        node_ports: Default::default(),
        externals: Default::default(),
        nodeport_ranges: Vec::new(),
        protected_ports: Default::default(),
        host_addresses: vec![ip("192.0.2.1"), ip("2001:db8::1")],
        nodeport_localhost: false,
    }
}

pub(crate) fn config_v4() -> HostConfig {
    let mut config = config();
    config.node_addresses.retain(IpAddr::is_ipv4);
    config.pod_ranges.retain(|range| range.addr().is_ipv4());
    config.tunnel_routes.retain(|route| route.range.addr().is_ipv4());
    config.cluster_ranges.retain(|range| range.addr().is_ipv4());
    config.service_routes.retain(|route| route.range.addr().is_ipv4());
    config
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn watched(network: HostNetwork) -> (watch::Sender<HostConfig>, mpsc::Receiver<HostEvent>) {
    watched_with(network, config())
}

pub(crate) fn watched_with(
    network: HostNetwork,
    config: HostConfig,
) -> (watch::Sender<HostConfig>, mpsc::Receiver<HostEvent>) {
    let (config, receiver) = watch::channel(config);
    let (sender, events) = mpsc::channel(16);
    tokio::spawn(network.watch(receiver, sender));
    (config, events)
}

/// Waits until the watcher has had nothing to say for a while.
pub(crate) async fn settle(events: &mut mpsc::Receiver<HostEvent>) {
    while let Ok(event) = tokio::time::timeout(Duration::from_millis(400), events.recv()).await {
        assert!(matches!(event, Some(HostEvent::Repaired(_) | HostEvent::Changed(_))), "{event:?}");
    }
}

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool, shown: impl Fn() -> String) {
    let waited = tokio::time::timeout(REPAIR, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what} took more than two seconds:\n{}", shown());
}

/// All that the watcher answers for. Chains and sets one by one: what came back stands last in its
/// table, which means nothing.
pub(crate) fn state() -> String {
    const RULES: &str = "for chain in prerouting output redirects spoofed leak pods; do
        nft list chain inet warren $chain | sed 's/packets [0-9]* bytes [0-9]*//'; done
        for set in pods4 pods6 cluster4 cluster6; do nft list set inet warren $set; done
        for chain in prerouting output services; do nft list chain inet warren-services $chain; done
        for set in nodeports services4 services6 nodes4 nodes6; do nft list set inet warren-services $set; done
        for map in external4 external6; do nft list map inet warren-services $map; done
        nft list chain bridge warren prerouting";
    [
        "ip -br addr show dev warren0",
        "ip -o link show dev warren0 | sed 's/^[0-9]*//'",
        "ip route show table all proto 87 | sort",
        "ip -6 route show table all proto 87 | sort",
        "ip rule",
        "ip -6 rule",
        RULES,
        "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.conf.warren0.rp_filter \
         net.ipv4.conf.warren0.route_localnet",
    ]
    .map(shell)
    .concat()
}

/// All that cleanup answers for.
pub(crate) fn everything() -> String {
    [
        "nft list ruleset | sed 's/packets [0-9]* bytes [0-9]*//'",
        "ip rule",
        "ip -6 rule",
        "ip route show table all | sort",
        "ip -6 route show table all | sort",
        "ip -br link",
        "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding",
    ]
    .map(shell)
    .concat()
}

pub(crate) fn iptables_policy_drop() {
    sh("iptables -P FORWARD DROP");
    sh("iptables -A FORWARD -i docker0 -j ACCEPT");
}

/// A mount namespace for this thread alone, in which /proc/sys cannot be written.
pub(crate) fn read_only_proc_sys() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("/proc/sys"), "/proc/sys", none, MsFlags::MS_BIND, none).unwrap();
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, "/proc/sys", none, read_only, none).unwrap();
}

/// The folder for the mount that the DaemonSet makes; it goes again if the machine did not have it.
pub(crate) struct SecondPlace(bool);

impl SecondPlace {
    const FOLDER: &str = "/host";

    pub(crate) fn new() -> Self {
        Self(std::fs::create_dir(Self::FOLDER).is_ok())
    }

    /// For this thread alone: /proc/sys cannot be written, but /proc/sys/net can, in the second place.
    pub(crate) fn mount(&self) {
        use nix::mount::{MsFlags, mount};
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("tmpfs"), Self::FOLDER, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let net = std::path::Path::new(Self::FOLDER).join("proc/sys/net");
        std::fs::create_dir_all(&net).unwrap();
        mount(Some("/proc/sys/net"), &net, none, MsFlags::MS_BIND, none).unwrap();
        read_only_proc_sys();
    }
}

impl Drop for SecondPlace {
    fn drop(&mut self) {
        if self.0 {
            let _ = std::fs::remove_dir(Self::FOLDER);
        }
    }
}

/// Lets this thread alone read `what` at the place of a file of the kernel.
pub(crate) fn pretend(file: &str, what: &std::path::Path) {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some(what), file, none, MsFlags::MS_BIND, none).unwrap();
}

/// Runs a command line in this thread's namespace; it must succeed.
pub(crate) fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same for looking at something that may not be there at the moment.
pub(crate) fn shell(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}
