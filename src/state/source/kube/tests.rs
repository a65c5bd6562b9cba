//! Tests of the source against an API server in this process.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::client::Timing;
use super::*;
use crate::state::source::Key;
use fake::{Fake, Manners, until};

pub(in crate::state) mod fake;
mod real;

#[expect(clippy::disallowed_methods, reason = "the agent would pass io::clock")]
const WALL: fn() -> SystemTime = SystemTime::now;
const NAMES: [&str; 1] = [access::IN_CLUSTER_NAME];

pub(in crate::state) fn quick() -> Timing {
    Timing {
        ping_after: Duration::from_millis(200),
        ping_answer: Duration::from_millis(200),
        answer: Duration::from_secs(2),
    }
}

pub(in crate::state) fn node(name: &str, range: &str) -> Value {
    json!({"kind": "Node", "apiVersion": "v1",
        "metadata": {"name": name, "uid": format!("uid-{name}"),
            "annotations": {"warren.dev/location": "home", "example.com/large": "x"},
            "managedFields": [{"manager": "kubelet", "operation": "Update"}]},
        "spec": {"podCIDRs": [range]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
            "images": [{"names": ["a"], "sizeBytes": 1}]}})
}

fn slice(name: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "https", "port": 6443}]})
}

/// What a listener of the source holds.
struct Heard {
    events: mpsc::Receiver<SourceEvent>,
    objects: BTreeMap<Kind, BTreeMap<String, Object>>,
    resets: BTreeMap<Kind, usize>,
    complete: BTreeMap<Kind, bool>,
    unread: BTreeMap<Kind, Vec<String>>,
    problems: BTreeMap<String, Vec<Problem>>,
    own: channel::Receiver<Option<Arc<Node>>>,
    contact: channel::Receiver<Contact>,
    source: JoinHandle<()>,
}

impl Drop for Heard {
    fn drop(&mut self) {
        self.source.abort();
    }
}

impl Heard {
    fn listen(settings: AccessSettings) -> Heard {
        let cluster = Cluster::with(settings, WALL, quick());
        let contact = cluster.contact();
        let (mut source, own) = KubeSource::new(cluster, "a", true);
        (source.stream_silence, source.page_silence) = (Duration::from_millis(500), Duration::from_secs(2));
        let (sender, events) = mpsc::channel(64);
        Heard {
            events,
            objects: BTreeMap::new(),
            resets: BTreeMap::new(),
            complete: BTreeMap::new(),
            unread: BTreeMap::new(),
            problems: BTreeMap::new(),
            own,
            contact,
            source: tokio::spawn(source.run(sender)),
        }
    }

    async fn until(&mut self, what: &str, is_so: impl Fn(&Heard) -> bool) {
        let wait = async {
            while !is_so(self) {
                let event = self.events.recv().await.expect("the source goes on");
                self.take(event);
            }
        };
        let waited = timeout(Duration::from_secs(30), wait).await.is_ok();
        assert!(waited, "not in time: {what}; {:?} {:?}", self.names(Kind::Node), self.problems);
    }

    fn take(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Apply(object) => {
                self.objects.entry(object.kind()).or_default().insert(object.key().name, object);
            }
            SourceEvent::Delete(key) => {
                self.objects.entry(key.kind).or_default().remove(&key.name);
            }
            SourceEvent::Reset { kind, objects, complete, unread } => {
                self.unread.insert(kind, unread.iter().map(Key::to_string).collect());
                let named = objects.into_iter().map(|object| (object.key().name, object));
                self.objects.insert(kind, named.collect());
                self.complete.insert(kind, complete);
                *self.resets.entry(kind).or_default() += 1;
            }
            SourceEvent::Problems { origin, problems } => {
                self.problems.insert(origin, problems);
            }
        }
    }

    fn names(&self, kind: Kind) -> Vec<&str> {
        self.objects.get(&kind).into_iter().flat_map(BTreeMap::keys).map(String::as_str).collect()
    }

    fn has(&self, kind: Kind, names: &[&str]) -> bool {
        self.resets.contains_key(&kind) && self.names(kind) == names
    }

    fn wrong(&self) -> String {
        self.problems.values().flatten().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }
}

#[tokio::test]
async fn lists_as_a_stream_and_follows_what_changes() {
    for http1_only in [false, true] {
        let fake = Fake::start(&NAMES, Manners { http1_only, ..Manners::default() }).await;
        fake.manners(|manners| {
            manners.absent.insert("servicecidrs".to_owned());
        });
        for (name, range) in [("a", "10.1.0.0/24"), ("b", "10.2.0.0/24"), ("c", "10.3.0.0/24")] {
            fake.put("nodes", node(name, range));
        }
        fake.put("endpointslices", slice("kubernetes", &["192.0.2.10", "192.0.2.11"]));
        fake.put(
            "services",
            json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": {"clusterIP": "10.96.0.1"}}),
        );
        let mut heard = Heard::listen(fake.access());
        heard
            .until("the first lists", |heard| {
                heard.has(Kind::Node, &["a", "b", "c"])
                    && heard.has(Kind::EndpointSlice, &["kubernetes"])
                    && heard.has(Kind::Service, &["web"])
                    && heard.has(Kind::ServiceCidr, &[])
            })
            .await;
        assert!(
            heard.complete.values().all(|complete| *complete),
            "a server without ServiceCIDRs is only older"
        );
        assert_eq!(*heard.contact.borrow(), Contact::Answers);

        // What nobody reads is left out.
        let Object::Node(first) = &heard.objects[&Kind::Node]["a"] else { panic!() };
        let annotations = first.metadata.annotations.clone().unwrap();
        assert_eq!(annotations.into_keys().collect::<Vec<_>>(), ["warren.dev/location"]);
        let status = first.status.clone().unwrap();
        assert!(first.metadata.managed_fields.is_none() && status.images.is_none());
        assert_eq!(status.addresses.unwrap().len(), 1);
        assert_eq!(heard.own.borrow().clone().unwrap().metadata.uid.as_deref(), Some("uid-a"));

        fake.put("nodes", node("d", "10.4.0.0/24"));
        fake.put("nodes", node("a", "10.9.0.0/24"));
        fake.remove("nodes", "b");
        heard.until("changes", |heard| heard.has(Kind::Node, &["a", "c", "d"])).await;
        let own = heard.own.borrow().clone().unwrap();
        assert_eq!(own.spec.clone().unwrap().pod_cidrs.unwrap(), ["10.9.0.0/24"]);
        assert_eq!(heard.resets[&Kind::Node], 1);
        fake.remove("nodes", "a");
        heard.until("our own Node gone", |heard| heard.has(Kind::Node, &["c", "d"])).await;
        assert!(heard.own.borrow().is_none());

        // The Services of others are not even asked for.
        let requests = fake.requests();
        let of = |what: &str| requests.iter().find(|line| line.contains(what)).unwrap();
        assert!(of("/services").contains("service-proxy-name") && of("/endpointslices").contains("headless"));
        assert!(of("/nodes").contains("sendInitialEvents=true") && !of("/nodes").contains("labelSelector"));
    }
}

#[tokio::test]
async fn lists_in_pages_where_the_server_does_not_stream() {
    for streaming in [Some(false), None] {
        let fake = Fake::start(&NAMES, Manners { streaming, ..Manners::default() }).await;
        for name in ["a", "b", "c", "d", "e"] {
            fake.put("nodes", node(name, "10.1.0.0/24"));
        }
        let mut heard = Heard::listen(fake.access());
        heard.until("all pages", |heard| heard.has(Kind::Node, &["a", "b", "c", "d", "e"])).await;
        fake.remove("nodes", "c");
        heard.until("a change", |heard| heard.has(Kind::Node, &["a", "b", "d", "e"])).await;
        assert_eq!((heard.resets[&Kind::Node], heard.complete[&Kind::Node]), (1, true));
        assert!(fake.requests().iter().any(|line| line.contains("/nodes") && line.contains("continue=4")));
    }
}

#[tokio::test]
async fn a_watch_that_is_cut_off_resumes_and_one_that_is_too_old_lists_again() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    fake.put("nodes", node("b", "10.2.0.0/24"));
    let mut heard = Heard::listen(fake.access());
    heard.until("the first list", |heard| heard.has(Kind::Node, &["a", "b"])).await;
    fake.cut();
    fake.put("nodes", node("c", "10.3.0.0/24"));
    heard.until("a Node that came meanwhile", |heard| heard.has(Kind::Node, &["a", "b", "c"])).await;
    assert_eq!(heard.resets[&Kind::Node], 1, "it went on where it was");

    fake.remove("nodes", "b");
    fake.forget();
    fake.cut();
    heard.until("a list without the Node that went", |heard| heard.has(Kind::Node, &["a", "c"])).await;
    fake.put("nodes", node("d", "10.4.0.0/24"));
    heard.until("a change after that", |heard| heard.has(Kind::Node, &["a", "c", "d"])).await;
    assert_eq!(heard.wrong(), "");
}

#[tokio::test]
async fn a_server_that_ends_every_watch_is_not_asked_all_the_time() {
    let fake = Fake::start(&NAMES, Manners { streaming: Some(false), ..Manners::default() }).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    let mut heard = Heard::listen(fake.access());
    heard.until("the first list", |heard| heard.has(Kind::Node, &["a"])).await;
    fake.manners(|manners| manners.ending = true);
    fake.cut();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let asked = fake.requests().iter().filter(|line| line.contains("watch=")).count();
    assert!((8..60).contains(&asked), "{asked} watches");
    fake.manners(|manners| manners.ending = false);
    fake.put("nodes", node("b", "10.2.0.0/24"));
    heard.until("the Node that came after", |heard| heard.has(Kind::Node, &["a", "b"])).await;
}

#[tokio::test]
async fn a_kind_that_was_there_and_is_not_found_is_not_gone() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    let cidr = |name: &str| json!({"metadata": {"name": name}, "spec": {"cidrs": ["10.96.0.0/16"]}});
    fake.put("servicecidrs", cidr("kubernetes"));
    let mut heard = Heard::listen(fake.access());
    heard.until("the first list", |heard| heard.has(Kind::ServiceCidr, &["kubernetes"])).await;
    fake.manners(|manners| {
        manners.absent.insert("servicecidrs".to_owned());
    });
    fake.cut();
    heard.until("that it is not found", |heard| heard.wrong().contains("servicecidrs")).await;
    assert!(heard.has(Kind::ServiceCidr, &["kubernetes"]));
    fake.manners(|manners| manners.absent.clear());
    fake.put("servicecidrs", cidr("more"));
    let both = ["kubernetes", "more"];
    heard
        .until("that it is there", |heard| heard.has(Kind::ServiceCidr, &both) && heard.wrong().is_empty())
        .await;
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_noticed() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    let mut heard = Heard::listen(fake.access());
    heard.until("the first list", |heard| heard.has(Kind::Node, &["a"])).await;
    fake.freeze();
    fake.put("nodes", node("b", "10.2.0.0/24"));
    heard.until("the Node that came after", |heard| heard.has(Kind::Node, &["a", "b"])).await;
}

#[tokio::test]
async fn what_is_not_allowed_is_said_until_it_is() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    fake.manners(|manners| {
        manners.forbidden.insert("nodes".to_owned());
    });
    fake.put("nodes", node("a", "10.1.0.0/24"));
    let mut heard = Heard::listen(fake.access());
    heard
        .until("a reason", |heard| heard.wrong().contains("its role must allow to list and watch nodes"))
        .await;
    assert!(!heard.resets.contains_key(&Kind::Node));
    fake.manners(|manners| manners.forbidden.clear());
    heard.until("the list", |heard| heard.has(Kind::Node, &["a"]) && heard.wrong().is_empty()).await;
}

#[tokio::test]
async fn what_kubernetes_own_types_refuse_and_nobody_reads_does_no_harm() {
    for streaming in [Some(true), Some(false)] {
        let fake = Fake::start(&NAMES, Manners { streaming, ..Manners::default() }).await;
        let condition =
            json!({"type": "x", "status": "True", "reason": "x", "message": "", "lastTransitionTime": null});
        let service = |name: &str| {
            json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {"clusterIP": "10.96.0.1"},
                "status": {"loadBalancer": {}, "conditions": [condition]}})
        };
        let cidr = |name: &str| {
            json!({"metadata": {"name": name}, "spec": {"cidrs": ["10.96.0.0/16"]},
                "status": {"conditions": [condition]}})
        };
        ["a", "b", "c"].iter().for_each(|name| fake.put("services", service(name)));
        fake.put("servicecidrs", cidr("kubernetes"));
        let mut heard = Heard::listen(fake.access());
        heard
            .until("the lists", |heard| {
                heard.has(Kind::Service, &["a", "b", "c"]) && heard.has(Kind::ServiceCidr, &["kubernetes"])
            })
            .await;
        fake.put("services", service("d"));
        heard.until("a change", |heard| heard.has(Kind::Service, &["a", "b", "c", "d"])).await;
        assert!(heard.complete[&Kind::Service] && heard.complete[&Kind::ServiceCidr]);
        assert_eq!(heard.wrong(), "");
    }
}

#[tokio::test]
async fn an_object_that_cannot_be_read_costs_itself() {
    for streaming in [Some(true), Some(false)] {
        let fake = Fake::start(&NAMES, Manners { streaming, ..Manners::default() }).await;
        let mut odd = node("c", "10.3.0.0/24");
        odd["spec"]["podCIDRs"] = json!({});
        // In the first list, also where it comes in pages of two.
        for object in
            [node("a", "10.1.0.0/24"), node("b", "10.2.0.0/24"), odd.clone(), node("d", "10.4.0.0/24")]
        {
            fake.put("nodes", object);
        }
        let mut heard = Heard::listen(fake.access());
        heard.until("the first list", |heard| heard.has(Kind::Node, &["a", "b", "d"])).await;
        heard.until("a reason", |heard| heard.wrong().contains("Node/c: cannot be read")).await;
        assert!(heard.complete[&Kind::Node], "what is not there at all is gone");
        assert_eq!(heard.unread[&Kind::Node], ["Node/c"]);

        // In a watch what it was before stays, and the others go on.
        let mut other = node("a", "10.1.0.0/24");
        other["status"]["addresses"] = json!("192.0.2.1");
        fake.put("nodes", other);
        heard.until("a second reason", |heard| heard.wrong().contains("Node/a: cannot be read")).await;
        fake.put("nodes", node("e", "10.5.0.0/24"));
        heard.until("the next one", |heard| heard.has(Kind::Node, &["a", "b", "d", "e"])).await;
        fake.put("nodes", node("a", "10.9.0.0/24"));
        heard.until("one is well", |heard| !heard.wrong().contains("Node/a")).await;

        // Gone or mended, nothing is said of it any more.
        fake.remove("nodes", "c");
        heard.until("all well", |heard| heard.wrong().is_empty()).await;
        fake.put("nodes", odd.clone());
        heard.until("once more", |heard| heard.wrong().contains("Node/c: cannot be read")).await;
        odd["spec"]["podCIDRs"] = json!(["10.3.0.0/24"]);
        fake.put("nodes", odd);
        fake.forget();
        fake.cut();
        heard.until("a list of all", |heard| heard.has(Kind::Node, &["a", "b", "c", "d", "e"])).await;
        heard.until("all well", |heard| heard.wrong().is_empty()).await;
        assert_eq!(heard.unread[&Kind::Node], [""; 0]);
    }
}

#[tokio::test]
async fn what_has_not_even_a_name_is_taken_for_none_that_is_gone() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    let mut heard = Heard::listen(fake.access());
    heard.until("the first list", |heard| heard.has(Kind::Node, &["a"])).await;
    let nameless = json!({"metadata": {"name": 7, "resourceVersion": "9"}});
    fake.say("nodes", json!({"type": "MODIFIED", "object": nameless}));
    heard.until("a reason", |heard| heard.wrong().contains("1 objects of Node cannot be read")).await;
    fake.say("nodes", json!({"no": "event"}));
    heard.until("a second one", |heard| heard.wrong().contains("2 objects of Node cannot be read")).await;
    fake.put("nodes", node("b", "10.2.0.0/24"));
    heard.until("the next one", |heard| heard.has(Kind::Node, &["a", "b"])).await;
    fake.forget();
    fake.cut();
    heard.until("a list", |heard| heard.resets[&Kind::Node] == 2 && heard.wrong().is_empty()).await;
}

#[tokio::test]
async fn tokens_are_read_again_and_silence_is_dated() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    let mut heard = Heard::listen(fake.access());
    heard.until("the first list", |heard| heard.has(Kind::Node, &["a"])).await;
    fake.manners(|manners| manners.token = "token-2".to_owned());
    fake.cut();
    heard.until("a reason", |heard| heard.wrong().contains("Unauthorized")).await;
    std::fs::write(fake.path("token"), "token-2").unwrap();
    fake.put("nodes", node("b", "10.2.0.0/24"));
    heard
        .until("the next Node", |heard| heard.has(Kind::Node, &["a", "b"]) && heard.wrong().is_empty())
        .await;

    let address = fake.address;
    let _folder = fake.stop();
    heard.until("silence", |heard| heard.wrong().contains("silent since 20")).await;
    let said = heard.wrong();
    assert!(said.contains(&format!("https://{address} (--api-server): ")), "{said}");
    assert!(said.contains("set --api-server"), "{said}");
    assert_eq!(heard.names(Kind::Node), ["a", "b"]);
}

#[tokio::test]
async fn servers_are_tried_in_turn_and_only_the_clusters_own_are_believed() {
    let good = Fake::start(&NAMES, Manners::default()).await;
    let other = Fake::start(&NAMES, Manners::default()).await;
    let misnamed = Fake::start(&["somebody.example"], Manners::default()).await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = |address: std::net::SocketAddr| format!("https://{address}").parse().unwrap();

    // Nobody, then one of another authority, then the right one, whose certificate has no 127.0.0.1.
    good.put("nodes", node("a", "10.1.0.0/24"));
    let mut access = good.access();
    access.servers = vec![url(closed), url(other.address), url(good.address)];
    let mut heard = Heard::listen(access.clone());
    heard.until("the list", |heard| heard.has(Kind::Node, &["a"])).await;
    assert_eq!(other.requests(), [""; 0], "it got no token");

    access.servers = vec![url(closed), url(other.address)];
    let mut heard = Heard::listen(access);
    heard.until("reasons", |heard| heard.wrong().contains("no API server answers")).await;
    let said = heard.wrong();
    assert!(
        said.contains("refused") && said.contains("invalid peer certificate") && !said.contains('\n'),
        "{said}"
    );

    let mut heard = Heard::listen(misnamed.access());
    heard.until("the wrong name", |heard| heard.wrong().contains("not valid for name")).await;
    assert_eq!(misnamed.requests(), [""; 0]);
}

#[tokio::test]
async fn a_server_that_answers_tls_and_nothing_else_is_left_for_the_next() {
    type Fault = fn(&mut Manners);
    let faults: [(&str, Fault); 3] = [
        ("errors", |manners| manners.failing = Some(503)),
        ("silence", |manners| manners.hanging = true),
        ("half an answer", |manners| manners.stalling = true),
    ];
    for (what, fault) in faults {
        let bad = Fake::start(&NAMES, Manners::default()).await;
        // One authority for both, as a cluster has it.
        let good = Fake::start_beside(&bad, &NAMES, Manners::default()).await;
        for fake in [&bad, &good] {
            fake.put("nodes", node("a", "10.1.0.0/24"));
        }
        bad.manners(fault);
        let url = |fake: &Fake| format!("https://{}", fake.address).parse().unwrap();
        let access = AccessSettings { servers: vec![url(&bad), url(&good)], ..bad.access() };
        let mut heard = Heard::listen(access);
        heard.until(what, |heard| heard.has(Kind::Node, &["a"]) && heard.wrong().is_empty()).await;
        assert!(!bad.requests().is_empty() && !good.requests().is_empty(), "{what}");
        good.put("nodes", node("b", "10.2.0.0/24"));
        heard.until("a change", |heard| heard.has(Kind::Node, &["a", "b"])).await;
        // The same the other way, in the middle of everything. A watch that says nothing is like one where nothing happens.
        if what == "half an answer" {
            continue;
        }
        bad.manners(|manners| (manners.failing, manners.hanging, manners.stalling) = (None, false, false));
        // Both count changes for themselves: this one is later than all that the other one had.
        (0..9).for_each(|_| bad.put("nodes", node("c", "10.3.0.0/24")));
        good.manners(fault);
        good.cut();
        heard.until("the first one again", |heard| heard.names(Kind::Node).contains(&"c")).await;
    }
}

/// Without an address that somebody gave: the kubelet's, those of last time, and the Service at last.
#[tokio::test]
async fn a_pod_asks_first_who_needs_no_data_path_and_comes_back_to_it() {
    let kubelets = Fake::start(&NAMES, Manners::default()).await;
    let saved = Fake::start_beside(&kubelets, &NAMES, Manners::default()).await;
    let service = Fake::start_beside(&kubelets, &NAMES, Manners::default()).await;
    let mut seen = slice("kubernetes", &["127.0.0.1"]);
    seen["ports"][0]["port"] = json!(saved.address.port());
    // Each counts changes for itself: the later it is asked, the later are its own.
    for (fake, name, times) in [(&kubelets, "k", 1), (&saved, "s", 20), (&service, "v", 40)] {
        fake.put("endpointslices", seen.clone());
        (0..times).for_each(|_| fake.put("nodes", node(name, "10.1.0.0/24")));
    }
    let path = kubelets.path("kubelet.conf");
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts:\n- name: c\n  context: {{cluster: k, user: u}}\n\
         clusters:\n- name: k\n  cluster: {{server: 'https://{}', certificate-authority: ca.crt}}\n\
         users:\n- name: u\n  user: {{token: none}}\n",
        kubelets.address
    );
    std::fs::write(&path, kubeconfig).unwrap();
    let at = format!("https://{}", service.address).parse().unwrap();
    let access =
        AccessSettings { servers: Vec::new(), kubelet: vec![path], service: Some(at), ..kubelets.access() };
    let mut heard = Heard::listen(access);
    heard.until("the kubelet's", |heard| heard.has(Kind::Node, &["k"])).await;
    heard.until("the slice", |heard| heard.has(Kind::EndpointSlice, &["kubernetes"])).await;
    until("the file", || kubelets.saved().exists()).await;
    let fails = |fake: &Fake| {
        fake.manners(|manners| manners.failing = Some(503));
        fake.cut();
    };
    fails(&kubelets);
    heard.until("that of last time", |heard| heard.names(Kind::Node).contains(&"s")).await;
    assert_eq!(service.requests(), [""; 0], "one that needs no data path answers");
    fails(&saved);
    heard.until("the Service", |heard| heard.names(Kind::Node).contains(&"v")).await;
    kubelets.manners(|manners| manners.failing = None);
    (0..80).for_each(|_| kubelets.put("nodes", node("again", "10.2.0.0/24")));
    fails(&service);
    heard.until("the kubelet's again", |heard| heard.names(Kind::Node).contains(&"again")).await;
}

#[tokio::test]
async fn a_client_certificate_that_was_replaced_is_read_again() {
    for http1_only in [false, true] {
        let fake = Fake::start(&NAMES, Manners { http1_only, ..Manners::default() }).await;
        fake.put("nodes", node("a", "10.1.0.0/24"));
        let (certificate, key) = (fake.path("client.crt"), fake.path("client.key"));
        let first = fake.client_certificate(&certificate, &key);
        fake.manners(|manners| manners.client = Some(first));
        let kubeconfig = fake.path("kubelet.conf");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts:\n- name: c\n  context: {{cluster: k, user: u}}\n\
             clusters:\n- name: k\n  cluster: {{server: 'https://{}', certificate-authority: ca.crt, tls-server-name: {}}}\n\
             users:\n- name: u\n  user: {{client-certificate: {}, client-key: {}}}\n",
            fake.address,
            NAMES[0],
            certificate.display(),
            key.display(),
        );
        std::fs::write(&kubeconfig, text).unwrap();
        let access = AccessSettings { kubeconfig: Some(kubeconfig), servers: Vec::new(), ..fake.access() };
        let mut heard = Heard::listen(access);
        heard.until("the list", |heard| heard.has(Kind::Node, &["a"])).await;
        // The first one has expired; the kubelet has written the next one over it.
        let second = fake.client_certificate(&certificate, &key);
        fake.manners(|manners| manners.client = Some(second));
        fake.cut();
        fake.put("nodes", node("b", "10.2.0.0/24"));
        heard.until("the next Node", |heard| heard.has(Kind::Node, &["a", "b"])).await;
        heard.until("all well", |heard| heard.wrong().is_empty()).await;
    }
}

#[tokio::test]
async fn an_authority_that_cannot_be_read_from_here_costs_no_address() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    for authority in [
        "certificate-authority: /nonexistent/ca.crt",
        "certificate-authority-data: '!'",
        "insecure-skip-tls-verify: true",
    ] {
        let path = fake.path("kubelet.conf");
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: k\n  cluster: {{server: 'https://{}', {authority}}}\n",
            fake.address
        );
        std::fs::write(&path, text).unwrap();
        let access = AccessSettings { servers: Vec::new(), kubelet: vec![path], ..fake.access() };
        let mut heard = Heard::listen(access);
        heard.until(authority, |heard| heard.has(Kind::Node, &["a"])).await;
    }
}

#[tokio::test]
async fn where_the_api_servers_are_is_remembered() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    fake.put("endpointslices", slice("kubernetes", &["127.0.0.1"]));
    let mut object = fake.get("endpointslices", "default/kubernetes");
    object["ports"][0]["port"] = json!(fake.address.port());
    fake.put("endpointslices", object);
    let mut heard = Heard::listen(fake.access());
    heard.until("the slice", |heard| heard.has(Kind::EndpointSlice, &["kubernetes"])).await;
    until("the file", || fake.saved().exists()).await;

    // Without anything else that is enough.
    let access = AccessSettings { servers: Vec::new(), ..fake.access() };
    drop(heard);
    let mut heard = Heard::listen(access.clone());
    let all =
        |heard: &Heard| heard.has(Kind::Node, &["a"]) && heard.has(Kind::EndpointSlice, &["kubernetes"]);
    heard.until("the lists", all).await;
    drop(heard);
    std::fs::write(fake.saved(), "torn").unwrap();
    let mut heard = Heard::listen(access);
    heard.until("reasons", |heard| heard.wrong().contains("no API server to ask is known")).await;
}

#[tokio::test]
async fn a_kubelets_kubeconfig_gives_the_address_and_never_its_credentials() {
    let fake = Fake::start(&NAMES, Manners::default()).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    let kubeconfig = |token: &str| {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts:\n- name: c\n  context: {{cluster: k, user: u}}\n\
             clusters:\n- name: k\n  cluster: {{server: 'https://{}', certificate-authority: ca.crt}}\n\
             users:\n- name: u\n  user: {{token: {token}}}\n",
            fake.address
        )
    };
    let path = fake.path("kubelet.conf");
    std::fs::write(&path, kubeconfig("the-kubelets")).unwrap();
    let kubelet = vec![fake.path("none"), path.clone()];
    let access = AccessSettings { servers: Vec::new(), kubelet, ..fake.access() };
    let mut heard = Heard::listen(access);
    heard.until("the list", |heard| heard.has(Kind::Node, &["a"])).await;

    // As --kubeconfig it is obeyed whole.
    std::fs::write(&path, kubeconfig("token-1")).unwrap();
    let account = "/nonexistent".into();
    let access = AccessSettings { kubeconfig: Some(path), account, servers: Vec::new(), ..fake.access() };
    let mut heard = Heard::listen(access);
    heard.until("the list", |heard| heard.has(Kind::Node, &["a"])).await;
}

#[tokio::test]
async fn names_are_found_in_the_hosts_file() {
    // The one name that every machine has there.
    let fake = Fake::start(&["localhost"], Manners::default()).await;
    fake.put("nodes", node("a", "10.1.0.0/24"));
    let server = format!("https://localhost:{}", fake.address.port()).parse().unwrap();
    let mut heard = Heard::listen(AccessSettings { servers: vec![server], ..fake.access() });
    heard.until("the list", |heard| heard.has(Kind::Node, &["a"])).await;
}

#[test]
fn pauses_grow_and_are_never_the_same_for_all() {
    let mut pauses = Pauses::default();
    let all: Vec<Duration> = (0..12).map(|_| pauses.next()).collect();
    assert!(all[0] <= Pauses::FIRST && all[11] >= Pauses::LONGEST / 2 && all[11] <= Pauses::LONGEST);
    let some: std::collections::BTreeSet<u64> = (0..32).map(|_| random(1 << 40)).collect();
    assert!(some.len() > 16);
    assert_eq!((random(0), random(1)), (0, 0));
}
