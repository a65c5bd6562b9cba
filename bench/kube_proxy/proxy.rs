//! kube-proxy of Kubernetes, in nftables mode unless told otherwise, in a namespace.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::api;
use crate::lab::netns::Netns;
use crate::lab::peer::binary;

const METRICS: u16 = 10_249;

/// A running kube-proxy; dropping it kills it. Its rules go with the namespace.
#[derive(Debug)]
pub struct KubeProxy {
    child: Child,
    log: PathBuf,
}

impl KubeProxy {
    /// The command line, after the node's name.
    pub const ARGUMENTS: [&'static str; 7] = [
        "--proxy-mode=nftables",
        "--cluster-cidr=10.244.0.0/16",
        "--healthz-bind-address=127.0.0.1:10256",
        "--metrics-bind-address=127.0.0.1:10249",
        // Of the whole machine, which measurements leave alone.
        "--conntrack-max-per-core=0",
        "--conntrack-min=0",
        "--oom-score-adj=0",
    ];

    /// Starts it beside an API server.
    pub fn start(ns: &Netns, node: &str, log: PathBuf) -> KubeProxy {
        KubeProxy::start_with(ns, node, log, &[])
    }

    /// The same with more arguments; of two that say the same the last one counts.
    pub fn start_with(ns: &Netns, node: &str, log: PathBuf, more: &[&str]) -> KubeProxy {
        let out = File::create(&log).expect("make a log");
        let child = ns
            .command(binary("kube-proxy"))
            .arg(format!("--master=http://127.0.0.1:{}", api::PORT))
            .arg(format!("--hostname-override={node}"))
            .args(KubeProxy::ARGUMENTS)
            .args(more)
            .stdout(out.try_clone().expect("duplicate the log"))
            .stderr(out)
            .stdin(Stdio::null())
            .spawn()
            .expect("start kube-proxy");
        KubeProxy { child, log }
    }

    /// Panics when it has ended by itself.
    pub fn assert_running(&mut self) {
        let ended = self.child.try_wait().expect("look after kube-proxy");
        assert!(ended.is_none(), "kube-proxy ended by itself: {ended:?}");
    }

    /// One of its metrics, without labels or with the ones given; 0 while there is none.
    pub fn metric(ns: &Netns, name: &str) -> f64 {
        let text = ns.enter(|| get(SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS)), "/metrics"));
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse().ok()).unwrap_or(0.0)
    }

    /// The most memory it ever had, in MiB.
    pub fn peak_mib(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.unwrap_or(0.0) / 1024.0
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("--- log of kube-proxy (last part)\n{}\n---", &log[log.len().saturating_sub(4000)..]);
        }
    }
}

/// What it calls itself.
pub fn version() -> String {
    let output = Command::new(binary("kube-proxy")).arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.trim().to_owned()
}

fn get(from: SocketAddr, path: &str) -> String {
    let mut text = String::new();
    if let Ok(mut stream) = TcpStream::connect(from) {
        let _ = write!(stream, "GET {path} HTTP/1.0\r\nHost: {from}\r\n\r\n");
        let _ = stream.read_to_string(&mut text);
    }
    text
}
