//! A small API server in this process: lists in pages or as a stream, watches with bookmarks and history, patches,
//! and every kind of misbehaviour that one has to live with.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::state::source::kube::AccessSettings;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// How it behaves.
#[derive(Clone, Debug)]
pub(in crate::state) struct Manners {
    /// Streaming lists: `Some(false)` refuses them as 1.32 does with the feature off, `None` ignores the parameter.
    pub(in crate::state) streaming: Option<bool>,
    pub(in crate::state) forbidden: BTreeSet<String>,
    pub(in crate::state) absent: BTreeSet<String>,
    /// The only token that is accepted.
    pub(in crate::state) token: String,
    pub(in crate::state) page: usize,
    pub(in crate::state) http1_only: bool,
    /// Refuses what is made, where this stands in it.
    pub(in crate::state) refusing: Option<String>,
    /// Answers nothing but this.
    pub(in crate::state) failing: Option<u16>,
    /// Never answers, after TLS.
    pub(in crate::state) hanging: bool,
    /// Ends every watch as soon as it has begun.
    pub(in crate::state) ending: bool,
    /// Begins answers to lists and never goes on.
    pub(in crate::state) stalling: bool,
    /// The only client certificate that is accepted, in place of a token.
    pub(in crate::state) client: Option<Vec<u8>>,
}

impl Default for Manners {
    fn default() -> Manners {
        Manners {
            streaming: Some(true),
            forbidden: BTreeSet::new(),
            absent: BTreeSet::new(),
            token: "token-1".to_owned(),
            page: 2,
            http1_only: false,
            refusing: None,
            failing: None,
            hanging: false,
            ending: false,
            stalling: false,
            client: None,
        }
    }
}

#[derive(Default)]
struct Store {
    version: u64,
    /// By resource, then `namespace/name`.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// What happened to which resource at which version.
    history: Vec<(u64, String, Value)>,
    /// Versions up to this are forgotten.
    forgotten: u64,
    requests: Vec<String>,
    patches: Vec<(String, Value)>,
    posted: Vec<Value>,
}

/// The server; ends with it.
pub(in crate::state) struct Fake {
    inner: Arc<Inner>,
    pub(in crate::state) address: SocketAddr,
    pub(in crate::state) folder: tempfile::TempDir,
    authority: Arc<Authority>,
    _tasks: JoinSet<()>,
}

struct Inner {
    store: Mutex<Store>,
    manners: Mutex<Manners>,
    /// Counts up when something happened.
    news: watch::Sender<u64>,
    /// Counts up when all watches are to be cut off.
    cut: watch::Sender<u64>,
    /// Connections of before stop moving, without a word.
    frozen: Mutex<Vec<Arc<AtomicBool>>>,
}

impl Fake {
    /// A server whose certificate has these names.
    pub(in crate::state) async fn start(names: &[&str], manners: Manners) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Fake::on(listener, Arc::new(Authority::new()), names, manners).await
    }

    /// Another server of the same cluster.
    pub(in crate::state) async fn start_beside(other: &Fake, names: &[&str], manners: Manners) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Fake::on(listener, Arc::clone(&other.authority), names, manners).await
    }

    async fn on(listener: TcpListener, authority: Arc<Authority>, names: &[&str], manners: Manners) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let tls = authority.server(names, manners.http1_only);
        std::fs::write(folder.path().join("ca.crt"), &authority.pem).unwrap();
        std::fs::write(folder.path().join("token"), format!("{}\n", manners.token)).unwrap();
        let inner = Arc::new(Inner {
            store: Mutex::default(),
            manners: Mutex::new(manners),
            news: watch::channel(0).0,
            cut: watch::channel(0).0,
            frozen: Mutex::default(),
        });
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        // The thaw: clients talk to a relay, which can stop moving bytes as a dead machine does.
        let back = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let behind = back.local_addr().unwrap();
        tasks.spawn(serve(back, Arc::clone(&inner), tls));
        tasks.spawn(relay(listener, behind, Arc::clone(&inner)));
        Fake { inner, address, folder, authority, _tasks: tasks }
    }

    /// How a pod reaches it: by `--api-server` and its service account.
    pub(in crate::state) fn access(&self) -> AccessSettings {
        AccessSettings {
            kubeconfig: None,
            servers: vec![format!("https://{}", self.address).parse().unwrap()],
            kubelet: Vec::new(),
            service: None,
            account: self.folder.path().to_owned(),
            saved: self.saved(),
        }
    }

    pub(in crate::state) fn saved(&self) -> PathBuf {
        self.folder.path().join("state/api-servers.json")
    }

    pub(in crate::state) fn path(&self, name: &str) -> PathBuf {
        Path::new(self.folder.path()).join(name)
    }

    pub(in crate::state) fn manners(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.inner.manners.lock().unwrap());
    }

    /// Makes or changes an object.
    pub(in crate::state) fn put(&self, resource: &str, object: Value) {
        self.inner.put(resource, object);
    }

    pub(in crate::state) fn remove(&self, resource: &str, key: &str) {
        let mut store = self.inner.store.lock().unwrap();
        let Some(mut object) = store.objects.get_mut(resource).and_then(|all| all.remove(key)) else {
            return;
        };
        store.version += 1;
        let version = store.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        store.history.push((version, resource.to_owned(), json!({"type": "DELETED", "object": object})));
        drop(store);
        self.inner.news.send_modify(|count| *count += 1);
    }

    pub(in crate::state) fn get(&self, resource: &str, key: &str) -> Value {
        self.inner.store.lock().unwrap().objects[resource][key].clone()
    }

    /// Forgets what happened: who asks for older versions is told that they are gone.
    pub(in crate::state) fn forget(&self) {
        let mut store = self.inner.store.lock().unwrap();
        store.version += 10;
        store.forgotten = store.version;
        store.history.clear();
    }

    /// Cuts all watches off.
    pub(in crate::state) fn cut(&self) {
        self.inner.cut.send_modify(|count| *count += 1);
    }

    /// Sends a line as it is to all who watch the resource.
    pub(in crate::state) fn say(&self, resource: &str, event: Value) {
        let mut store = self.inner.store.lock().unwrap();
        store.version += 1;
        let version = store.version;
        store.history.push((version, resource.to_owned(), event));
        drop(store);
        self.inner.news.send_modify(|count| *count += 1);
    }

    /// The connections that there are say nothing any more; others work.
    pub(in crate::state) fn freeze(&self) {
        self.inner.frozen.lock().unwrap().iter().for_each(|one| one.store(true, Ordering::SeqCst));
    }

    /// A client certificate of the cluster's authority in these files; its DER.
    pub(in crate::state) fn client_certificate(&self, certificate: &Path, key: &Path) -> Vec<u8> {
        let pair = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec!["client".to_owned()]).unwrap();
        let made = parameters.signed_by(&pair, &self.authority.issuer).unwrap();
        std::fs::write(certificate, made.pem()).unwrap();
        std::fs::write(key, pair.serialize_pem()).unwrap();
        made.der().to_vec()
    }

    /// Stops; the files stay as long as the folder.
    pub(in crate::state) fn stop(self) -> tempfile::TempDir {
        self.folder
    }

    pub(in crate::state) fn requests(&self) -> Vec<String> {
        self.inner.store.lock().unwrap().requests.clone()
    }

    pub(in crate::state) fn patches(&self) -> Vec<(String, Value)> {
        self.inner.store.lock().unwrap().patches.clone()
    }

    pub(in crate::state) fn posted(&self) -> Vec<Value> {
        self.inner.store.lock().unwrap().posted.clone()
    }
}

/// Who vouches for the server, and for clients.
struct Authority {
    pem: String,
    der: rustls::pki_types::CertificateDer<'static>,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
        let key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::<String>::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = authority.self_signed(&key).unwrap();
        Authority { pem: root.pem(), der: root.der().clone(), issuer: Issuer::new(authority, key) }
    }

    /// A server's end that it vouches for under these names. Clients come with a certificate of its, or with none.
    fn server(&self, names: &[&str], http1_only: bool) -> Arc<rustls::ServerConfig> {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate =
            rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&provider),
        );
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(clients.allow_unauthenticated().build().unwrap())
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        if !http1_only {
            tls.alpn_protocols.insert(0, b"h2".to_vec());
        }
        Arc::new(tls)
    }
}

async fn relay(listener: TcpListener, behind: SocketAddr, inner: Arc<Inner>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let Ok(server) = TcpStream::connect(behind).await else { continue };
        let frozen = Arc::new(AtomicBool::new(false));
        inner.frozen.lock().unwrap().push(Arc::clone(&frozen));
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        connections.spawn(pump(from_client, to_server, Arc::clone(&frozen)));
        connections.spawn(pump(from_server, to_client, frozen));
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    frozen: Arc<AtomicBool>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if frozen.load(Ordering::SeqCst) {
            // Neither read nor closed from now on.
            std::future::pending::<()>().await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    if frozen.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
}

async fn serve(listener: TcpListener, inner: Arc<Inner>, tls: Arc<rustls::ServerConfig>) {
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, inner) = (acceptor.clone(), Arc::clone(&inner));
        connections.spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let client = stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(|chain| chain.first())
                .map(|one| one.to_vec());
            let service = service_fn(move |request| answer(Arc::clone(&inner), client.clone(), request));
            let io = TokioIo::new(stream);
            let _ = match is_h2 {
                true => {
                    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    builder.serve_connection(io, service).await
                }
                false => hyper::server::conn::http1::Builder::new().serve_connection(io, service).await,
            };
        });
    }
}

async fn answer(
    inner: Arc<Inner>,
    client: Option<Vec<u8>>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let query: BTreeMap<String, String> = parts
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let manners = inner.manners.lock().unwrap().clone();
    let line = format!("{} {path} {}", parts.method, parts.uri.query().unwrap_or_default());
    inner.store.lock().unwrap().requests.push(line);
    let token = parts.headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    if manners.hanging {
        std::future::pending::<()>().await;
    }
    if let Some(code) = manners.failing {
        return Ok(failure(StatusCode::from_u16(code).unwrap(), "etcd is not there"));
    }
    let is_known = match &manners.client {
        Some(_) => client == manners.client,
        None => token == format!("Bearer {}", manners.token),
    };
    if !is_known {
        return Ok(failure(StatusCode::UNAUTHORIZED, "Unauthorized"));
    }
    let words: Vec<&str> = path.trim_matches('/').split('/').collect();
    let known = ["nodes", "services", "endpointslices", "servicecidrs", "events"];
    let Some(at) = words.iter().position(|word| known.contains(word)) else {
        return Ok(failure(StatusCode::NOT_FOUND, "no such path"));
    };
    let resource = words[at];
    if manners.absent.contains(resource) {
        return Ok(failure(StatusCode::NOT_FOUND, "the server could not find the requested resource"));
    }
    if manners.forbidden.contains(resource) {
        let reason = format!("{resource} is forbidden: User \"x\" cannot do that");
        return Ok(failure(StatusCode::FORBIDDEN, &reason));
    }
    let sent = match parts.method {
        Method::PATCH | Method::POST => {
            serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap()
        }
        _ => Value::Null,
    };
    Ok(match (parts.method, words.get(at + 1)) {
        (Method::PATCH, Some(name)) => inner.patch(resource, name, words.get(at + 2).copied(), sent),
        (Method::POST, None)
            if manners.refusing.as_ref().is_some_and(|part| sent.to_string().contains(part)) =>
        {
            failure(StatusCode::FORBIDDEN, "a policy does not want it")
        }
        (Method::POST, None) => {
            let mut store = inner.store.lock().unwrap();
            let name = sent["metadata"]["name"].clone();
            if store.posted.iter().any(|before| before["metadata"]["name"] == name) {
                return Ok(failure(StatusCode::CONFLICT, "AlreadyExists"));
            }
            store.posted.push(sent.clone());
            text(StatusCode::CREATED, &sent)
        }
        (Method::GET, None) if manners.stalling => {
            let endless = futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>();
            Response::new(StreamBody::new(endless).boxed_unsync())
        }
        (Method::GET, None) if manners.ending && query.contains_key("watch") => {
            Response::new(Full::default().boxed_unsync())
        }
        (Method::GET, None) if query.get("watch").is_some_and(|watch| watch == "true") => {
            inner.watch(resource, &query, &manners)
        }
        (Method::GET, None) => inner.list(resource, &query, &manners),
        _ => failure(StatusCode::METHOD_NOT_ALLOWED, "not here"),
    })
}

impl Inner {
    fn put(&self, resource: &str, mut object: Value) -> Value {
        let mut store = self.store.lock().unwrap();
        store.version += 1;
        let version = store.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let metadata = &object["metadata"];
        let key = match metadata["namespace"].as_str() {
            Some(namespace) => format!("{namespace}/{}", metadata["name"].as_str().unwrap()),
            None => metadata["name"].as_str().unwrap().to_owned(),
        };
        let before = store.objects.entry(resource.to_owned()).or_default().insert(key, object.clone());
        let verb = if before.is_some() { "MODIFIED" } else { "ADDED" };
        store.history.push((version, resource.to_owned(), json!({"type": verb, "object": object})));
        drop(store);
        self.news.send_modify(|count| *count += 1);
        object
    }

    /// Good enough for us: apply sets the annotations, and a strategic patch one condition.
    fn patch(&self, resource: &str, name: &str, sub: Option<&str>, sent: Value) -> Response<Body> {
        let found = self.store.lock().unwrap().objects.get(resource).and_then(|all| all.get(name)).cloned();
        let path = [resource, name].into_iter().chain(sub).collect::<Vec<_>>().join("/");
        self.store.lock().unwrap().patches.push((path, sent.clone()));
        let uid = &sent["metadata"]["uid"];
        let Some(mut object) = found.filter(|found| uid.is_null() || found["metadata"]["uid"] == *uid) else {
            return failure(StatusCode::CONFLICT, "uid mismatch");
        };
        if let Some(annotations) = sent["metadata"]["annotations"].as_object() {
            for (name, value) in annotations {
                object["metadata"]["annotations"][name] = value.clone();
            }
        }
        if let Some(condition) = sent["status"]["conditions"].get(0) {
            object["status"]["conditions"] = json!([condition]);
        }
        text(StatusCode::OK, &self.put(resource, object))
    }

    fn list(&self, resource: &str, query: &BTreeMap<String, String>, manners: &Manners) -> Response<Body> {
        let store = self.store.lock().unwrap();
        let none = BTreeMap::new();
        let all: Vec<&Value> = store.objects.get(resource).unwrap_or(&none).values().collect();
        let from: usize = query.get("continue").map_or(0, |text| text.parse().unwrap());
        let page: Vec<&Value> = all.iter().skip(from).take(manners.page).copied().collect();
        let more = (from + page.len() < all.len()).then(|| (from + page.len()).to_string());
        let metadata = json!({"resourceVersion": store.version.to_string(), "continue": more});
        text(
            StatusCode::OK,
            &json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": page}),
        )
    }

    fn watch(
        self: &Arc<Self>,
        resource: &str,
        query: &BTreeMap<String, String>,
        manners: &Manners,
    ) -> Response<Body> {
        let wants_all = query.get("sendInitialEvents").is_some_and(|wants| wants == "true");
        if wants_all && manners.streaming == Some(false) {
            let reason = "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the \
                          WatchList feature gate is enabled";
            return failure(StatusCode::UNPROCESSABLE_ENTITY, reason);
        }
        let (sender, receiver) = mpsc::channel::<Value>(16);
        let mut from: u64 =
            query.get("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or_default();
        let (inner, resource) = (Arc::clone(self), resource.to_owned());
        let (mut news, mut cut) = (self.news.subscribe(), self.cut.subscribe());
        let marks_end = manners.streaming == Some(true);
        tokio::spawn(async move {
            let first: Vec<Value> = {
                let store = inner.store.lock().unwrap();
                let mut first = Vec::new();
                if from == 0 {
                    let all = store.objects.get(&resource).into_iter().flat_map(BTreeMap::values);
                    first.extend(all.map(|object| json!({"type": "ADDED", "object": object})));
                    from = store.version;
                    if wants_all && marks_end {
                        first.push(json!({"type": "BOOKMARK", "object": {"kind": "X", "apiVersion": "v1", "metadata": {
                            "resourceVersion": from.to_string(),
                            "annotations": {"k8s.io/initial-events-end": "true"}}}}));
                    }
                } else if from < store.forgotten {
                    first.push(json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1",
                        "status": "Failure", "code": 410, "reason": "Expired", "message": "too old resource version"}}));
                }
                first
            };
            for event in first {
                let is_end = event["type"] == "ERROR";
                if sender.send(event).await.is_err() || is_end {
                    return;
                }
            }
            loop {
                news.borrow_and_update();
                let later: Vec<(u64, Value)> = {
                    let store = inner.store.lock().unwrap();
                    let of = store.history.iter().filter(|(at, of, _)| *at > from && *of == resource);
                    of.map(|(at, _, event)| (*at, event.clone())).collect()
                };
                for (at, event) in later {
                    from = at;
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    _ = news.changed() => {}
                    _ = cut.changed() => return,
                    () = sender.closed() => return,
                }
            }
        });
        let lines = futures_util::stream::unfold(receiver, |mut receiver| async move {
            let event = receiver.recv().await?;
            Some((Ok(Frame::data(Bytes::from(format!("{event}\n")))), receiver))
        });
        Response::new(StreamBody::new(lines).boxed_unsync())
    }
}

fn failure(code: StatusCode, message: &str) -> Response<Body> {
    let reason = code.canonical_reason().unwrap_or_default().replace(' ', "");
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16()});
    text(code, &status)
}

fn text(code: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::from(value.to_string()).boxed_unsync());
    *response.status_mut() = code;
    response
}

/// Waits until it is so.
pub(in crate::state) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(30), wait).await.is_ok(), "not in time: {what}");
}
