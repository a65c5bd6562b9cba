//! As much of a Kubernetes API server as kube-proxy asks for: lists and watches of a few kinds, in JSON over
//! plain HTTP, from memory. What it does not know is 404, which kube-proxy bears (its events).

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use warren::io::clock;

use crate::lab::netns::Netns;

/// Where it listens, in the loopback of a namespace.
pub const PORT: u16 = 8001;
/// How often a waiting thread looks whether it should stop.
const GLANCE: Duration = Duration::from_millis(50);

/// The kinds that are served: path and kind.
const KINDS: [(&str, &str); 5] = [
    ("/api/v1/nodes", "Node"),
    ("/api/v1/services", "Service"),
    ("/api/v1/namespaces", "Namespace"),
    ("/apis/discovery.k8s.io/v1/endpointslices", "EndpointSlice"),
    ("/apis/networking.k8s.io/v1/servicecidrs", "ServiceCIDR"),
];

/// A running API server; it ends when dropped.
#[derive(Debug)]
pub struct Api {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    store: Mutex<Store>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Store {
    version: u64,
    /// By kind, in the order given.
    objects: HashMap<&'static str, Vec<Value>>,
    /// Every change since the start: its version, kind and the line of a watch.
    log: Vec<(u64, &'static str, Arc<str>)>,
    /// When the last full list of a kind was handed over.
    served: HashMap<&'static str, Instant>,
}

/// A request as far as it matters here.
#[derive(Debug)]
struct Request {
    kind: &'static str,
    /// `metadata.name=` of the field selector.
    name: Option<String>,
    watch: bool,
    /// The list comes as the beginning of the watch (KEP-3157).
    initial_events: bool,
    version: u64,
}

impl Api {
    /// Serves these objects in a namespace.
    pub fn start(ns: &Netns, objects: impl IntoIterator<Item = Value>) -> Api {
        let mut store = Store { version: 1, ..Store::default() };
        for mut object in objects {
            let kind = known(object["kind"].as_str().unwrap_or_default()).expect("a kind that is served");
            object["metadata"]["resourceVersion"] = json!("1");
            store.objects.entry(kind).or_default().push(object);
        }
        let here = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let listener =
            ns.enter(|| TcpListener::bind(here)).unwrap_or_else(|e| panic!("listen on {here}: {e}"));
        listener.set_nonblocking(true).expect("a listener that does not block");
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            store: Mutex::new(store),
            changed: Condvar::new(),
        });
        let ours = Arc::clone(&shared);
        let acceptor = std::thread::spawn(move || accept(&listener, &ours));
        Api { shared, acceptor: Some(acceptor) }
    }

    /// Replaces an object of this name, and tells every watch.
    pub fn change(&self, mut object: Value) {
        let mut store = self.shared.store();
        store.version += 1;
        let version = store.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let kind = known(object["kind"].as_str().unwrap_or_default()).expect("a kind that is served");
        let line = json!({"type": "MODIFIED", "object": object}).to_string() + "\n";
        let objects = store.objects.entry(kind).or_default();
        let place = objects.iter().position(|o| o["metadata"]["name"] == object["metadata"]["name"]);
        objects[place.expect("an object of this name")] = object;
        store.log.push((version, kind, line.into()));
        drop(store);
        self.shared.changed.notify_all();
    }

    /// When the last full list of a kind was handed over.
    pub fn served(&self, kind: &str) -> Option<Instant> {
        self.shared.store().served.get(kind).copied()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn known(kind: &str) -> Option<&'static str> {
    KINDS.iter().find(|(_, k)| *k == kind).map(|(_, k)| *k)
}

impl Shared {
    fn store(&self) -> std::sync::MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn accept(listener: &TcpListener, shared: &Shared) {
    std::thread::scope(|scope| {
        while !shared.stopped() {
            let Ok((stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            // Whoever goes away in the middle is no fault of the measurement.
            scope.spawn(move || converse(&stream, shared));
        }
    });
}

/// Answers requests on one connection, until its end or a watch's.
fn converse(stream: &TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GLANCE))?;
    let mut input = BufReader::new(stream);
    let mut output = BufWriter::with_capacity(1 << 16, stream);
    while let Some(head) = head(&mut input, shared)? {
        let Some(request) = understand(&head) else {
            output.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
            return output.flush();
        };
        if request.watch {
            return watch(&request, &mut output, shared);
        }
        list(&request, &mut output, shared)?;
    }
    Ok(())
}

/// The lines of a request's head; `None` at the end of the connection.
fn head(input: &mut BufReader<&TcpStream>, shared: &Shared) -> io::Result<Option<String>> {
    let mut head = String::new();
    loop {
        match input.read_line(&mut head) {
            Ok(0) => return Ok(None),
            Ok(_) if head.ends_with("\r\n\r\n") => return Ok(Some(head)),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                if shared.stopped() {
                    return Ok(None);
                }
            }
            Err(e) => return Err(e),
        }
    }
}

fn understand(head: &str) -> Option<Request> {
    let target = head.strip_prefix("GET ")?.split(' ').next()?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let kind = KINDS.iter().find(|(p, _)| *p == path)?.1;
    let mut request = Request { kind, name: None, watch: false, initial_events: false, version: 0 };
    for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        match key {
            "watch" => request.watch = matches!(value, "true" | "1"),
            "sendInitialEvents" => request.initial_events = value == "true",
            "resourceVersion" => request.version = value.parse().unwrap_or(0),
            "fieldSelector" => request.name = value.strip_prefix("metadata.name%3D").map(str::to_owned),
            _ => {}
        }
    }
    Some(request)
}

impl Request {
    fn wants(&self, object: &Value) -> bool {
        self.name.as_deref().is_none_or(|name| object["metadata"]["name"] == name)
    }

    fn api_version(&self) -> &'static str {
        match self.kind {
            "EndpointSlice" => "discovery.k8s.io/v1",
            "ServiceCIDR" => "networking.k8s.io/v1",
            _ => "v1",
        }
    }
}

fn list(request: &Request, output: &mut impl Write, shared: &Shared) -> io::Result<()> {
    let body = {
        let store = shared.store();
        let items: Vec<&Value> =
            store.objects.get(request.kind).into_iter().flatten().filter(|o| request.wants(o)).collect();
        json!({
            "kind": format!("{}List", request.kind), "apiVersion": request.api_version(),
            "metadata": {"resourceVersion": store.version.to_string()}, "items": items,
        })
        .to_string()
    };
    write!(
        output,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    output.flush()?;
    shared.store().served.insert(request.kind, clock::now());
    Ok(())
}

fn watch(request: &Request, output: &mut impl Write, shared: &Shared) -> io::Result<()> {
    write!(
        output,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json;stream=watch\r\nTransfer-Encoding: chunked\r\n\r\n"
    )?;
    output.flush()?;
    let mut version = request.version;
    if request.initial_events {
        let lines: Vec<String> = {
            let store = shared.store();
            version = store.version;
            let objects = store.objects.get(request.kind).into_iter().flatten().filter(|o| request.wants(o));
            let added = objects.map(|o| json!({"type": "ADDED", "object": o}).to_string() + "\n");
            added.chain([bookmark(request, version)]).collect()
        };
        for line in lines {
            chunk(output, &line)?;
        }
        output.flush()?;
        shared.store().served.insert(request.kind, clock::now());
    }
    while !shared.stopped() {
        let news: Vec<Arc<str>> = {
            let store = shared.store();
            let waited = shared.changed.wait_timeout_while(store, GLANCE, |store| store.version == version);
            let (store, _) = waited.unwrap_or_else(PoisonError::into_inner);
            let from = store.log.partition_point(|(v, _, _)| *v <= version);
            version = version.max(store.version);
            store.log[from..]
                .iter()
                .filter(|(_, k, _)| *k == request.kind)
                .map(|e| Arc::clone(&e.2))
                .collect()
        };
        for line in &news {
            chunk(output, line)?;
        }
        output.flush()?;
    }
    Ok(())
}

fn bookmark(request: &Request, version: u64) -> String {
    let event = json!({
        "type": "BOOKMARK",
        "object": {
            "kind": request.kind, "apiVersion": request.api_version(),
            "metadata": {
                "resourceVersion": version.to_string(),
                "annotations": {"k8s.io/initial-events-end": "true"},
            },
        },
    });
    event.to_string() + "\n"
}

fn chunk(output: &mut impl Write, line: &str) -> io::Result<()> {
    write!(output, "{:x}\r\n{line}\r\n", line.len())
}
