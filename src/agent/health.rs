//! What kube-proxy answers over HTTP, for those who ask every node: cloud load balancers, monitoring and
//! Kubernetes' own tests.
//!
//! | where | who asks | answer |
//! |---|---|---|
//! | `:10256/healthz`, `/livez` | load balancers (`externalTrafficPolicy: Cluster`), probes | 200 while the host is kept right |
//! | `127.0.0.1:10249/proxyMode` | Kubernetes' end-to-end tests, scripts | `nftables` |
//! | `127.0.0.1:51820/readyz` | the kubelet's readiness probe | 200 while packets flow, else 503 and the reason |
//! | `127.0.0.1:51820/livez` | its liveness probe | 200 |
//! | each `healthCheckNodePort` | load balancers (`externalTrafficPolicy: Local`) | 200 where the Service has endpoints here |
//!
//! Listeners come and go with the plan. One that cannot be opened is said and tried again; nothing waits
//! for it. What an answer costs is bounded: so many connections, so long each, one request each; where more
//! come, the oldest goes, which is one that says nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::io::clock;
use crate::io::host::HostState;
use crate::state::services::HealthCheck;

/// kube-proxy's: twice its sync period of 30 s. The host is looked at every second.
const PATIENCE: Duration = Duration::from_secs(60);
/// How soon a listener that could not be opened is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// How many connections there are at a time at all listeners together, and from one address at one of them.
const CONNECTIONS: usize = 1_024;
const FROM_ONE: usize = 16;
/// How long each lasts, and how long it may take to say what it wants.
const CONNECTION_TIME: Duration = Duration::from_secs(5);
const REQUEST_TIME: Duration = Duration::from_secs(1);
/// The smallest buffer that hyper takes: a request has no more to say.
const REQUEST_BYTES: usize = 8192;
const BACKLOG: i32 = 128;
/// The names that are accepted are `iptables`, `ipvs`, `nftables` and `kernelspace`: who asks wants to know
/// how Services behave (ClusterIPs answer no other port, node ports are not on 127.0.0.1 unless asked for),
/// and that is as in kube-proxy's nftables mode.
const PROXY_MODE: &str = "nftables";

/// What is to be answered where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answers {
    /// `/healthz`.
    pub(super) healthz: Option<SocketAddr>,
    /// `/proxyMode`.
    pub(super) proxy_mode: Option<SocketAddr>,
    /// `healthCheckNodePort`s.
    pub(super) checks: Arc<BTreeMap<u16, HealthCheck>>,
    /// The local addresses that answer those; a family that is not named has them on all.
    pub(super) check_ranges: Vec<IpNet>,
    /// `/readyz` and `/livez` of the kubelet's probes.
    pub(super) probe: Option<SocketAddr>,
    /// Why packets do not flow, for `/readyz`.
    pub(super) not_ready: Option<String>,
    /// Whether this node is about to go: load balancers should look for another one.
    pub(super) leaving: bool,
}

impl Answers {
    /// Whether the page is answered at that local address.
    fn offers(&self, page: Page, local: SocketAddr) -> bool {
        let address = local.ip().to_canonical();
        let mut ranges = self.check_ranges.iter().filter(|range| range.addr().is_ipv4() == address.is_ipv4());
        match page {
            Page::Health | Page::ProxyMode | Page::Probe => true,
            Page::Check(_) => ranges.clone().next().is_none() || ranges.any(|range| range.contains(&address)),
        }
    }
}

/// What one listener answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Page {
    Health,
    ProxyMode,
    Probe,
    Check(u16),
}

/// Answers until `wanted`'s sender is gone.
pub(super) async fn serve(mut wanted: watch::Receiver<Answers>, host: watch::Receiver<HostState>) {
    let mut open: BTreeMap<(Page, SocketAddr), Listener> = BTreeMap::new();
    let mut said = BTreeMap::new();
    let connections = Arc::new(Connections::default());
    loop {
        let now = listeners(&wanted.borrow_and_update());
        open.retain(|at, _| now.contains(at));
        said.retain(|at, _| now.contains(at));
        for at @ (page, address) in
            now.iter().copied().filter(|at| !open.contains_key(at)).collect::<Vec<_>>()
        {
            match bind(address) {
                Ok(listener) => {
                    if said.remove(&at).is_some() {
                        info!("{} answers at {address} now", page.name());
                    }
                    let answering =
                        answer(listener, page, Arc::clone(&connections), wanted.clone(), host.clone());
                    open.insert(at, Listener(tokio::spawn(answering)));
                }
                Err(error) => {
                    let reason = error.to_string();
                    if said.insert(at, reason.clone()).as_ref() != Some(&reason) {
                        warn!("{} cannot answer at {address} and goes on trying: {reason}", page.name());
                    }
                }
            }
        }
        let retry = open.len() < now.len();
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = sleep(AGAIN), if retry => {}
        }
    }
}

/// A listener, closed when dropped.
struct Listener(JoinHandle<()>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn listeners(wanted: &Answers) -> BTreeSet<(Page, SocketAddr)> {
    let everywhere = |port: &u16| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), *port);
    let health = wanted.healthz.map(|at| (Page::Health, at));
    let mode = wanted.proxy_mode.map(|at| (Page::ProxyMode, at));
    let checks = wanted.checks.keys().map(|port| (Page::Check(*port), everywhere(port)));
    let probe = wanted.probe.map(|at| (Page::Probe, at));
    health.into_iter().chain(mode).chain(probe).chain(checks).collect()
}

/// `[::]` takes IPv4 too; a kernel without IPv6 has `0.0.0.0`.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listen = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
        // Connections of an agent that ended linger; another listener is refused all the same.
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    match listen(address) {
        Err(e)
            if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && e.kind() != io::ErrorKind::AddrInUse =>
        {
            listen(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port())).map_err(|_| e)
        }
        outcome => outcome,
    }
}

async fn answer(
    listener: TcpListener,
    page: Page,
    connections: Arc<Connections>,
    wanted: watch::Receiver<Answers>,
    host: watch::Receiver<HostState>,
) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            // Out of descriptors, or a client that has gone again.
            Err(_) => {
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if !stream.local_addr().is_ok_and(|local| wanted.borrow().offers(page, local)) {
            continue;
        }
        let conversation = timeout(CONNECTION_TIME, converse(stream, page, wanted.clone(), host.clone()));
        connections.admit(page, from.ip(), || tokio::spawn(conversation).abort_handle());
    }
}

/// Those of all listeners, the oldest first.
#[derive(Default)]
struct Connections(Mutex<VecDeque<Connection>>);

struct Connection {
    page: Page,
    from: IpAddr,
    task: AbortHandle,
}

impl Connections {
    fn admit(&self, page: Page, from: IpAddr, start: impl FnOnce() -> AbortHandle) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|connection| !connection.task.is_finished());
        let same = |connection: &&Connection| connection.page == page && connection.from == from;
        let oldest = match () {
            () if open.iter().filter(same).count() >= FROM_ONE => open.iter().position(|one| same(&one)),
            () => (open.len() >= CONNECTIONS).then_some(0),
        };
        if let Some(oldest) = oldest.and_then(|at| open.remove(at)) {
            oldest.task.abort();
        }
        open.push_back(Connection { page, from, task: start() });
    }
}

async fn converse(
    stream: TcpStream,
    page: Page,
    wanted: watch::Receiver<Answers>,
    host: watch::Receiver<HostState>,
) {
    let respond = service_fn(move |request: Request<Incoming>| {
        let right = host.borrow().right;
        let healthy = is_healthy(right, clock::wall());
        let response = page.response(request.uri().path(), healthy, right, &wanted.borrow());
        async move { Ok::<_, Infallible>(response) }
    });
    let mut connection = http1::Builder::new();
    connection.keep_alive(false).max_buf_size(REQUEST_BYTES).timer(TokioTimer::new());
    connection.header_read_timeout(REQUEST_TIME);
    // A client that says nonsense or goes away is told so by hyper, and concerns nobody else.
    let _ = connection.serve_connection(TokioIo::new(stream), respond).await;
}

fn is_healthy(right: Option<SystemTime>, now: SystemTime) -> bool {
    // A clock that was set back says nothing against us.
    right.is_some_and(|right| now.duration_since(right).unwrap_or_default() < PATIENCE)
}

impl Page {
    fn name(self) -> String {
        match self {
            Page::Health => "/healthz".to_owned(),
            Page::ProxyMode => "/proxyMode".to_owned(),
            Page::Probe => "/readyz".to_owned(),
            Page::Check(port) => format!("the health check node port {port}"),
        }
    }

    fn response(
        self,
        path: &str,
        healthy: bool,
        right: Option<SystemTime>,
        answers: &Answers,
    ) -> Response<Full<Bytes>> {
        match (self, path) {
            (Page::Health, "/healthz") => {
                let eligible = !answers.leaving;
                let body = times(healthy, right, &format!(", \"nodeEligible\": {eligible}"));
                json_response(healthy && eligible, &body)
            }
            (Page::Health, "/livez") => json_response(healthy, &times(healthy, right, "")),
            (Page::ProxyMode, "/proxyMode") => Response::new(Full::from(PROXY_MODE)),
            (Page::Probe, "/readyz") => match &answers.not_ready {
                None => Response::new(Full::from("ok\n")),
                Some(reason) => {
                    let mut response = Response::new(Full::from(format!("not ready: {reason}\n")));
                    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                    response
                }
            },
            // Whatever keeps packets from flowing, another start would not help, or the agent ends by itself.
            (Page::Probe, "/livez") => Response::new(Full::from("ok\n")),
            (Page::Health | Page::ProxyMode | Page::Probe, _) => not_found(),
            (Page::Check(port), _) => {
                answers.checks.get(&port).map_or_else(not_found, |check| service(check, healthy))
            }
        }
    }
}

/// `lastUpdated` is now as long as all is well: older kube-proxies gave the time of their last look.
fn times(healthy: bool, right: Option<SystemTime>, more: &str) -> String {
    let now = clock::wall();
    let text = |time: SystemTime| {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        let timestamp = i64::try_from(since).ok().and_then(|since| Timestamp::from_millisecond(since).ok());
        timestamp.unwrap_or_default().to_string()
    };
    let last = if healthy { now } else { right.unwrap_or(SystemTime::UNIX_EPOCH) };
    format!("{{\"lastUpdated\": \"{}\",\"currentTime\": \"{}\"{more}}}", text(last), text(now))
}

fn service(check: &HealthCheck, healthy: bool) -> Response<Full<Bytes>> {
    /// How much of the traffic this node should get.
    const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");
    let (namespace, name) = check.name.split_once('/').unwrap_or(("", &check.name));
    let body = json!({
        "service": { "namespace": namespace, "name": name },
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": healthy,
    });
    let mut response = json_response(healthy && check.local_endpoints > 0, &body.to_string());
    response.headers_mut().insert(WEIGHT, HeaderValue::from(check.local_endpoints));
    response
}

fn json_response(good: bool, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_owned()));
    *response.status_mut() = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}

fn not_found() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from("404 page not found\n"));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A port that nobody has at the moment.
    fn free() -> SocketAddr {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    fn right_now() -> watch::Sender<HostState> {
        watch::channel(HostState { right: Some(clock::wall()), kube_proxy: None }).0
    }

    fn check(name: &str, local_endpoints: usize) -> HealthCheck {
        HealthCheck { name: name.into(), local_endpoints }
    }

    /// The whole answer; waits for the listener as long as it takes.
    async fn ask(port: u16, path: &str) -> String {
        let answer = timeout(Duration::from_secs(20), async {
            loop {
                let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)).await else {
                    sleep(Duration::from_millis(10)).await;
                    continue;
                };
                stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).await.unwrap();
                return text;
            }
        });
        answer.await.unwrap_or_else(|_| panic!("no answer at {port}{path}"))
    }

    #[tokio::test]
    async fn health_is_answered_as_kube_proxy_does() {
        let (healthz, mode) = (free(), free());
        let wanted = Answers { healthz: Some(healthz), proxy_mode: Some(mode), ..Answers::default() };
        let (wanted, reader) = watch::channel(wanted);
        let host = right_now();
        let _server = Listener(tokio::spawn(serve(reader, host.subscribe())));
        let text = ask(healthz.port(), "/healthz").await;
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.contains("content-type: application/json") && text.contains("nosniff"), "{text}");
        let body: serde_json::Value = serde_json::from_str(text.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!((&body["nodeEligible"], body["lastUpdated"].is_string()), (&json!(true), true));
        let live = ask(healthz.port(), "/livez").await;
        assert!(live.starts_with("HTTP/1.1 200") && !live.contains("nodeEligible"), "{live}");
        assert!(ask(healthz.port(), "/metrics").await.starts_with("HTTP/1.1 404"));
        assert!(ask(mode.port(), "/proxyMode").await.ends_with("\r\n\r\nnftables"));
        // The node is about to go.
        wanted.send_modify(|answers| answers.leaving = true);
        let text = ask(healthz.port(), "/healthz").await;
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("\"nodeEligible\": false"), "{text}");
        assert!(ask(healthz.port(), "/livez").await.starts_with("HTTP/1.1 200"));
        wanted.send_modify(|answers| answers.leaving = false);
        // The host has not been right for longer than is good.
        host.send_replace(HostState { right: Some(clock::wall() - 2 * PATIENCE), kube_proxy: None });
        assert!(ask(healthz.port(), "/healthz").await.starts_with("HTTP/1.1 503"));
        assert!(ask(healthz.port(), "/livez").await.starts_with("HTTP/1.1 503"));
    }

    #[tokio::test]
    async fn load_balancers_hear_of_local_endpoints() {
        let port = free().port();
        let plan = |count: usize| Answers {
            checks: Arc::new([(port, check("default/web", count))].into()),
            ..Answers::default()
        };
        let (wanted, reader) = watch::channel(plan(2));
        let host = right_now();
        let server = Listener(tokio::spawn(serve(reader, host.subscribe())));
        let text = ask(port, "/").await;
        assert!(
            text.starts_with("HTTP/1.1 200") && text.contains("x-load-balancing-endpoint-weight: 2"),
            "{text}"
        );
        let body: serde_json::Value = serde_json::from_str(text.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        let expected = json!({
            "service": { "namespace": "default", "name": "web" }, "localEndpoints": 2, "serviceProxyHealthy": true,
        });
        assert_eq!(body, expected);
        wanted.send_replace(plan(0));
        let text = ask(port, "/healthz").await;
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("weight: 0"), "{text}");
        // Gone with the Service.
        wanted.send_replace(Answers::default());
        let closed = timeout(Duration::from_secs(10), async {
            while TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                sleep(Duration::from_millis(10)).await;
            }
        });
        closed.await.expect("the listener is closed");
        drop(server);
    }

    #[tokio::test]
    async fn who_says_nothing_holds_nobody_up() {
        let healthz = free();
        let (_wanted, reader) = watch::channel(Answers { healthz: Some(healthz), ..Answers::default() });
        let host = right_now();
        let _server = Listener(tokio::spawn(serve(reader, host.subscribe())));
        ask(healthz.port(), "/healthz").await;
        let mut idle = Vec::new();
        for _ in 0..3 * FROM_ONE {
            idle.push(TcpStream::connect(healthz).await.unwrap());
        }
        let begin = clock::now();
        assert!(ask(healthz.port(), "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(clock::now() - begin < REQUEST_TIME, "the oldest go at once");
        // And the others soon.
        for mut stream in idle {
            let _ = timeout(CONNECTION_TIME - REQUEST_TIME, stream.read(&mut [0])).await.expect("closed");
        }
    }

    #[tokio::test]
    async fn probes_are_told_whether_packets_flow() {
        let at = free();
        let starting =
            Answers { probe: Some(at), not_ready: Some("waiting".to_owned()), ..Answers::default() };
        let (wanted, reader) = watch::channel(starting);
        let _server = Listener(tokio::spawn(serve(reader, watch::channel(HostState::default()).1)));
        let answer = ask(at.port(), "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("not ready: waiting"), "{answer}");
        assert!(ask(at.port(), "/livez").await.starts_with("HTTP/1.1 200"));
        wanted.send_modify(|answers| answers.not_ready = None);
        assert!(ask(at.port(), "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(ask(at.port(), "/healthz").await.starts_with("HTTP/1.1 404"));
    }

    #[test]
    fn checks_are_answered_where_node_ports_are() {
        let ranges = vec!["192.0.2.0/24".parse().unwrap()];
        let answers = Answers { check_ranges: ranges, ..Answers::default() };
        for (local, expected) in [
            ("192.0.2.7:1", true),
            ("[::ffff:192.0.2.7]:1", true),
            ("[::ffff:198.51.100.7]:1", false),
            ("127.0.0.1:1", false),
            ("[2001:db8::1]:1", true),
        ] {
            assert_eq!(answers.offers(Page::Check(1), local.parse().unwrap()), expected, "{local}");
            assert!(answers.offers(Page::Health, local.parse().unwrap()));
            assert!(Answers::default().offers(Page::Check(1), local.parse().unwrap()));
        }
    }

    #[tokio::test]
    async fn a_port_in_use_keeps_nothing_else_and_is_taken_later() {
        let taken = std::net::TcpListener::bind("[::]:0").unwrap();
        let (port, other) = (taken.local_addr().unwrap().port(), free());
        let checks = Arc::new([(port, check("default/web", 1))].into());
        let wanted = Answers { healthz: Some(other), checks, ..Answers::default() };
        let (_wanted, reader) = watch::channel(wanted);
        let host = right_now();
        let _server = Listener(tokio::spawn(serve(reader, host.subscribe())));
        assert!(ask(other.port(), "/healthz").await.starts_with("HTTP/1.1 200"));
        drop(taken);
        assert!(ask(port, "/").await.starts_with("HTTP/1.1 200"));
    }
}
