//! The whole agent, on a node of one: what its flags and the cluster's objects come to in the kernel, and
//! what it answers for load balancers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::stage::{Namespace, sh, shell, until};

const OBJECTS: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: a, uid: u}
spec: {podCIDRs: [10.244.1.0/24, "fd00:1::/64"]}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/16]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.5
  clusterIPs: [10.96.0.5]
  ipFamilies: [IPv4]
  externalTrafficPolicy: Local
  healthCheckNodePort: 32099
  ports: [{name: http, port: 80, protocol: TCP, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 198.51.100.9}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.244.1.5], nodeName: a, conditions: {ready: true}}]
"#;

struct Agent(Child);

impl Agent {
    fn start(folder: &Path, flags: &[&str]) -> Self {
        Self::run(Command::new(env!("CARGO_BIN_EXE_warren")), folder, flags)
    }

    /// With the rights that `deploy/warren.service` leaves it.
    fn confined(folder: &Path) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-all,+net_admin", env!("CARGO_BIN_EXE_warren")]);
        Self::run(command, folder, &[])
    }

    fn run(mut command: Command, folder: &Path, flags: &[&str]) -> Self {
        command.args(["agent", "--node", "a", "--log", "info"]).args(flags);
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run")] {
            command.arg(flag).arg(folder.join(name));
        }
        command.arg(format!("--source=dir:{}", folder.join("objects").display()));
        Self(command.stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is answered there, or nothing if nobody listens.
fn ask(port: u16, path: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
    let mut text = String::new();
    let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
    let _ = stream.read_to_string(&mut text);
    text
}

fn objects() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("objects")).unwrap();
    std::fs::write(folder.path().join("objects/all.yaml"), OBJECTS).unwrap();
    folder
}

/// A node before there was an agent, and a runtime to wait in.
fn on_a_node<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    Namespace::new().enter(|| {
        sh("ip link set lo up; ip link add eth0 type bridge; ip addr add 192.0.2.1/24 dev eth0; ip link set eth0 up");
        sh("ip route add default via 192.0.2.2");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
}

async fn soon(what: &str, holds: impl FnMut() -> bool, shown: impl Fn() -> String) {
    let mut holds = holds;
    for _ in 0..100 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{what}: {}", shown());
}

#[test]
fn services_come_from_objects_and_are_answered_for() {
    on_a_node(|| async {
        let folder = objects();
        let before = sh("nft list ruleset");
        let _agent = Agent::start(folder.path(), &[]);
        let table = || shell("nft list table inet warren-services");
        soon("the node port", || table().contains("tcp . 30080"), table).await;
        let health = || ask(10_256, "/healthz");
        soon("health", || health().starts_with("HTTP/1.1 200"), health).await;
        assert!(health().contains("lastUpdated"), "{}", health());
        assert!(ask(10_249, "/proxyMode").ends_with("nftables"));
        let check = || ask(32_099, "/");
        soon("the health check port", || check().starts_with("HTTP/1.1 200"), check).await;
        assert!(check().contains("\"localEndpoints\":1") && check().contains("\"namespace\":\"shop\""));
        assert!(table().contains("198.51.100.9 . tcp . 80"), "{}", table());
        assert!(sh("ip route show").contains("10.96.0.0/16 dev warren0"));
        // The endpoint goes; the load balancer hears of it.
        std::fs::write(
            folder.path().join("objects/all.yaml"),
            OBJECTS.replace("ready: true", "ready: false"),
        )
        .unwrap();
        until("no endpoint", || check().starts_with("HTTP/1.1 503"), check).await;
        // kube-proxy comes, and goes.
        sh("nft add table ip kube-proxy");
        until("kube-proxy has Services", || table().is_empty() && health().is_empty(), table).await;
        assert!(!sh("ip route show").contains("10.96.0.0/16") && check().is_empty());
        sh("nft delete table ip kube-proxy");
        let back = || table().contains("tcp . 30080") && health().starts_with("HTTP/1.1 200");
        until("Services go on", back, table).await;
        drop(_agent);
        let mut cleanup = Command::new(env!("CARGO_BIN_EXE_warren"));
        cleanup.args(["agent", "--cleanup"]).stdout(Stdio::null());
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run")] {
            cleanup.arg(flag).arg(folder.path().join(name));
        }
        assert!(cleanup.status().unwrap().success());
        assert_eq!(sh("nft list ruleset"), before);
    });
}

#[test]
fn kube_proxys_old_tables_are_seen_with_no_more_rights_than_the_unit_gives() {
    on_a_node(|| async {
        let folder = objects();
        sh("iptables-legacy -t nat -N KUBE-SERVICES");
        let _agent = Agent::confined(folder.path());
        let ready = || folder.path().join("run/ready").exists();
        soon("the agent", ready, String::new).await;
        let tables = || shell("nft list tables");
        assert!(!tables().contains("warren-services"), "{}", tables());
        sh("iptables-legacy -t nat -X KUBE-SERVICES");
        until("Services go on", || tables().contains("warren-services"), tables).await;
    });
}

#[test]
fn services_that_are_off_leave_nothing() {
    on_a_node(|| async {
        let folder = objects();
        let _agent = Agent::start(folder.path(), &["--services=off"]);
        let routes = || shell("ip route show table 22354");
        soon("the agent", || routes().contains("default dev warren0"), routes).await;
        soon("its table", || shell("nft list tables").contains("table inet warren"), String::new).await;
        assert!(!sh("nft list tables").contains("warren-services"));
        assert!(!sh("ip route show").contains("10.96") && ask(10_256, "/healthz").is_empty());
    });
}
