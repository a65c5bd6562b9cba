//! Services in the folder, and servers that say who they are and whom they saw.

use std::fmt::Write as _;
use std::io::{self, Read, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::Lab;
use super::netns::Netns;

/// How long an answer may take: no longer, so that whoever asks too early asks again from another port.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How often a waiting server looks whether it should stop.
const GLANCE: Duration = Duration::from_millis(50);
/// Where servers listen, whatever the Service's own port is.
pub const TARGET: u16 = 8080;
/// The Service's own port.
pub const PORT: u16 = 80;

/// A Service with one port for TCP and one for UDP, perhaps for SCTP, as `kubectl apply` would take it.
#[derive(Clone, Debug, Default)]
pub struct Service {
    /// Its name.
    pub name: &'static str,
    /// ClusterIPs, of one or both families.
    pub cluster_ips: Vec<IpAddr>,
    /// The node port of all protocols; 0 for none.
    pub node_port: u16,
    /// Whether it has a port for SCTP as well.
    pub sctp: bool,
    /// Further lines of the spec, two blanks in.
    pub spec: String,
    /// Load-balancer addresses in its status.
    pub ingress: Vec<IpAddr>,
    /// Endpoints: address, the Node's name (empty for none), ready.
    pub endpoints: Vec<(IpAddr, String, bool)>,
}

impl Service {
    /// Writes the Service and its slices, one a family, into the folder.
    pub fn write(&self, lab: &Lab) {
        self.write_for_port(lab, TARGET);
    }

    /// The same, with servers on another port.
    pub fn write_for_port(&self, lab: &Lab, target: u16) {
        let file = format!("service-{}.yaml", self.name);
        lab.write_object(&file, &format!("{}{}", self.object(), self.slices(target)));
    }

    /// Takes it out of the folder.
    pub fn remove(&self, lab: &Lab) {
        let file = lab.cluster().join(format!("service-{}.yaml", self.name));
        std::fs::remove_file(file).expect("remove the Service");
    }

    fn protocols(&self) -> impl Iterator<Item = &'static str> {
        ["TCP", "UDP"].into_iter().chain(self.sctp.then_some("SCTP"))
    }

    fn object(&self) -> String {
        let kind = match (self.ingress.is_empty(), self.node_port) {
            (false, _) => "LoadBalancer",
            (true, 0) => "ClusterIP",
            (true, _) => "NodePort",
        };
        let addresses: String = self.cluster_ips.iter().map(|ip| format!("  - \"{ip}\"\n")).collect();
        let families: String = self.cluster_ips.iter().map(|ip| format!("  - {}\n", family(*ip))).collect();
        let first = self.cluster_ips.first().expect("a ClusterIP");
        let node_port = match self.node_port {
            0 => String::new(),
            port => format!("    nodePort: {port}\n"),
        };
        let ports: String = self
            .protocols()
            .map(|protocol| {
                let name = protocol.to_lowercase();
                format!(
                    "  - name: {name}\n    protocol: {protocol}\n    port: {PORT}\n    targetPort: web\n{node_port}"
                )
            })
            .collect();
        let ingress: String = self.ingress.iter().map(|ip| format!("    - ip: \"{ip}\"\n")).collect();
        let status = match ingress.is_empty() {
            true => String::new(),
            false => format!("status:\n  loadBalancer:\n    ingress:\n{ingress}"),
        };
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  \
             type: {kind}\n  clusterIP: \"{first}\"\n  clusterIPs:\n{addresses}  ipFamilies:\n{families}  \
             ports:\n{ports}{extra}{status}",
            name = self.name,
            extra = self.spec,
        )
    }

    fn slices(&self, target: u16) -> String {
        let mut text = String::new();
        let port = |protocol: &str| {
            let name = protocol.to_lowercase();
            format!("- name: {name}\n  protocol: {protocol}\n  port: {target}\n")
        };
        let ports: String = self.protocols().map(port).collect();
        for family_name in ["IPv4", "IPv6"] {
            let mut endpoints = String::new();
            for (address, node, ready) in self.endpoints.iter().filter(|e| family(e.0) == family_name) {
                let _ = write!(
                    endpoints,
                    "- addresses:\n  - \"{address}\"\n  conditions:\n    ready: {ready}\n    serving: {ready}\n"
                );
                if !node.is_empty() {
                    let _ = writeln!(endpoints, "  nodeName: {node}");
                }
            }
            let endpoints = if endpoints.is_empty() {
                "endpoints: []\n".to_owned()
            } else {
                format!("endpoints:\n{endpoints}")
            };
            let _ = write!(
                text,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{low}\n  \
                 namespace: default\n  labels:\n    kubernetes.io/service-name: {name}\naddressType: \
                 {family_name}\nports:\n{ports}{endpoints}",
                name = self.name,
                low = family_name.to_lowercase(),
            );
        }
        text
    }
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// A server for TCP and UDP that answers with its name and the address it saw, until it is dropped. What
/// comes behind the answer is the question, back again.
#[derive(Debug)]
pub struct Who {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Who {
    /// Starts it on [`TARGET`] of each address.
    pub fn start(name: &'static str, ns: &Netns, addresses: &[IpAddr]) -> Who {
        Who::start_at(TARGET, name, ns, addresses)
    }

    /// Starts it on another port.
    pub fn start_at(port: u16, name: &'static str, ns: &Netns, addresses: &[IpAddr]) -> Who {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for address in addresses {
            let here = SocketAddr::new(*address, port);
            let (tcp, udp) = ns.enter(|| {
                let tcp = TcpListener::bind(here).unwrap_or_else(|e| panic!("listen on {here}: {e}"));
                (tcp, UdpSocket::bind(here).unwrap_or_else(|e| panic!("bind {here}: {e}")))
            });
            let (stop_tcp, stop_udp) = (Arc::clone(&stop), Arc::clone(&stop));
            threads.push(std::thread::spawn(move || serve_tcp(name, &tcp, &stop_tcp)));
            threads.push(std::thread::spawn(move || serve_udp(name, &udp, &stop_udp)));
        }
        Who { stop, threads }
    }
}

impl Drop for Who {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(name: &str, listener: &TcpListener, stop: &AtomicBool) {
    listener.set_nonblocking(true).expect("a listener that does not block");
    std::thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            let Ok((mut stream, from)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            };
            scope.spawn(move || {
                stream.set_nonblocking(false).expect("a stream that waits");
                stream.set_read_timeout(Some(GLANCE)).expect("a stream that wakes up");
                let mut greeting = format!("{name}|{from}|").into_bytes();
                let mut buffer = vec![0; 1 << 16];
                while !stop.load(Ordering::Relaxed) {
                    match stream.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(n) => {
                            greeting.extend_from_slice(&buffer[..n]);
                            if stream.write_all(&std::mem::take(&mut greeting)).is_err() {
                                break;
                            }
                        }
                        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                        }
                        Err(_) => break,
                    }
                }
            });
        }
    });
}

fn serve_udp(name: &str, socket: &UdpSocket, stop: &AtomicBool) {
    socket.set_read_timeout(Some(GLANCE)).expect("a socket that wakes up");
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let answer = [format!("{name}|{from}|").as_bytes(), &buffer[..n]].concat();
            let _ = socket.send_to(&answer, from);
        }
    }
}

/// Who answered, and whom he saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The server's name.
    pub server: String,
    /// The client as the server saw it.
    pub client: SocketAddr,
}

/// A question over one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Both.
pub const BOTH: [Over; 2] = [Over::Tcp, Over::Udp];

/// Asks once, with so many bytes; the source is the kernel's choice where none is given.
pub fn ask(
    ns: &Netns,
    source: Option<IpAddr>,
    target: SocketAddr,
    over: Over,
    bytes: usize,
) -> io::Result<Answer> {
    match over {
        Over::Tcp => {
            let mut stream = open(ns, source, target)?;
            ask_again(&mut stream, bytes)
        }
        Over::Udp => {
            let socket = udp(ns, source, target)?;
            ask_udp(&socket, bytes)
        }
    }
}

/// A connection from a free port.
pub fn open(ns: &Netns, source: Option<IpAddr>, target: SocketAddr) -> io::Result<TcpStream> {
    ns.enter(|| {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect_timeout(&target.into(), PATIENCE)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(TcpStream::from(socket))
    })
}

/// A UDP socket that is connected.
pub fn udp(ns: &Netns, source: Option<IpAddr>, target: SocketAddr) -> io::Result<UdpSocket> {
    ns.enter(|| {
        let any = if target.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        let socket = UdpSocket::bind(SocketAddr::new(source.unwrap_or(any), 0))?;
        socket.connect(target)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    })
}

/// The first question on a connection.
pub fn ask_again(stream: &mut TcpStream, bytes: usize) -> io::Result<Answer> {
    let question = super::traffic::pattern(0, bytes);
    stream.write_all(&question)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    understand(&answer, &question)
}

/// Asks on a socket that is connected, and may have asked before.
pub fn ask_udp(socket: &UdpSocket, bytes: usize) -> io::Result<Answer> {
    let question = super::traffic::pattern(0, bytes);
    socket.send(&question)?;
    let mut answer = vec![0; 65_536];
    let n = socket.recv(&mut answer)?;
    understand(&answer[..n], &question)
}

fn understand(answer: &[u8], question: &[u8]) -> io::Result<Answer> {
    let mut parts = answer.splitn(3, |byte| *byte == b'|');
    let mut text = || parts.next().and_then(|part| std::str::from_utf8(part).ok()).map(str::to_owned);
    let (Some(server), Some(client)) = (text(), text()) else {
        return Err(io::Error::other(format!("not an answer: {} bytes", answer.len())));
    };
    if parts.next() != Some(question) {
        return Err(io::Error::other(format!("{server} sent other bytes back")));
    }
    let client = client.parse().map_err(io::Error::other)?;
    Ok(Answer { server, client })
}
