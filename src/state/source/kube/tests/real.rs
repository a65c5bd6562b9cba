//! What only a real API server can say: whether it takes what we write. Run by hand, or by the lab, with the
//! kubeconfig of an administrator: `WARREN_TEST_KUBECONFIG=FILE cargo test --lib real -- --ignored`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::super::*;
use crate::snapshot::{LocalNode, PeerLane, Snapshot};
use crate::state::annotations::Announcement;
use crate::state::problem::{Problem, ProblemKind};
use crate::state::publish::events::Teller;
use crate::state::publish::node::NodeKeeper;
use crate::state::run::{Clock, StateReport};

const NAME: &str = "warren-test-node";

/// Waits until the Node is as wanted.
async fn until(nodes: &Api<Node>, what: &str, is_so: impl Fn(&Node) -> bool) -> Node {
    let wait = async {
        loop {
            if let Some(node) = nodes.get_opt(NAME).await.unwrap().filter(&is_so) {
                return node;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(30), wait).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

fn says(node: &Node, name: &str) -> Option<String> {
    node.metadata.annotations.as_ref()?.get(name).cloned()
}

#[tokio::test]
#[ignore = "needs a Kubernetes API server and WARREN_TEST_KUBECONFIG"]
async fn a_real_api_server_takes_what_we_write() {
    let folder = tempfile::tempdir().unwrap();
    let settings = AccessSettings {
        kubeconfig: Some(std::env::var("WARREN_TEST_KUBECONFIG").unwrap().into()),
        servers: Vec::new(),
        kubelet: Vec::new(),
        service: None,
        account: folder.path().into(),
        saved: folder.path().join("saved"),
    };
    #[expect(clippy::disallowed_methods, reason = "the agent would pass io::clock")]
    let clock = Clock { now: Instant::now, wall: std::time::SystemTime::now };
    let cluster = Cluster::new(settings, clock.wall);
    let nodes: Api<Node> = Api::all(cluster.client());
    let events: Api<Event> = Api::namespaced(cluster.client(), "default");
    let fresh = |range: &str| -> Node {
        serde_json::from_value(
            json!({"metadata": {"name": NAME}, "spec": {"podCIDRs": [range], "podCIDR": range}}),
        )
        .unwrap()
    };
    let _ = nodes.delete(NAME, &DeleteParams::default()).await;

    let (source, own) = KubeSource::new(cluster.clone(), NAME, true);
    let (sender, mut objects) = mpsc::channel(64);
    let (wanted, wants) = watch::channel(None);
    let (ready, is_ready) = watch::channel(false);
    let keeper = NodeKeeper {
        cluster: cluster.clone(),
        node: NAME.to_owned(),
        own,
        wanted: wants,
        ready: is_ready,
        events: sender.downgrade(),
        clock,
    };
    let local = LocalNode { name: NAME.to_owned(), address_v4: None, address_v6: None, vni: 1, mac: [2; 6] };
    let snapshot =
        Snapshot { generation: 1, local: Arc::new(local), mesh: Arc::default(), services: Arc::default() };
    let problem = Problem::node(ProblemKind::Annotation, NAME, "warren.dev/lanes", "\"x\" is no key");
    let report = StateReport { listed: true, problems: vec![problem], ..StateReport::default() };
    let (_reports, report) = watch::channel(Arc::new(report));
    let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
    let teller = Teller { cluster: cluster.clone(), node: NAME.to_owned(), report, snapshot, clock };
    let mut tasks = JoinSet::new();
    tasks.spawn(source.run(sender));
    tasks.spawn(keeper.run());
    tasks.spawn(teller.run());
    tasks.spawn(async move {
        while let Some(event) = objects.recv().await {
            if let SourceEvent::Problems { problems, .. } = &event {
                problems.iter().for_each(|problem| println!("{problem}"));
            }
        }
    });

    let said = Announcement {
        lanes: vec![PeerLane { key: [7; 32], port: 51820 }],
        keepalive: 25,
        ..Announcement::default()
    };
    wanted.send_replace(Some(said.clone()));
    sleep(Duration::from_millis(500)).await;
    assert!(nodes.get_opt(NAME).await.unwrap().is_none(), "no Node is made");
    nodes.create(&PostParams::default(), &fresh("10.250.1.0/24")).await.unwrap();
    let keepalive = |node: &Node| says(node, "warren.dev/keepalive");
    let node = until(&nodes, "the annotations", |node| keepalive(node).as_deref() == Some("25")).await;
    let managed = node.metadata.managed_fields.unwrap();
    let ours = managed.iter().find(|entry| entry.manager.as_deref() == Some("warren")).unwrap();
    assert_eq!(ours.operation.as_deref(), Some("Apply"));
    assert_eq!(ours.fields_v1.as_ref().unwrap().0.as_object().unwrap().len(), 1, "nothing but annotations");

    // Edited, removed, added to; and what we do not say any more goes.
    let edit = json!({"metadata": {"annotations": {
        "warren.dev/keepalive": "7", "warren.dev/lanes": null, "example.com/x": "y"}}});
    let version = nodes.patch(NAME, &PatchParams::default(), &Patch::Merge(&edit)).await.unwrap();
    let node = until(&nodes, "the repair", |node| {
        keepalive(node).as_deref() == Some("25") && says(node, "warren.dev/lanes").is_some()
    })
    .await;
    assert_eq!(says(&node, "example.com/x").as_deref(), Some("y"));
    assert_ne!(node.metadata.resource_version, version.metadata.resource_version);
    wanted.send_replace(Some(Announcement { keepalive: 0, ..said }));
    until(&nodes, "an annotation less", |node| keepalive(node).is_none()).await;

    ready.send_replace(true);
    let network = |node: &Node| {
        let conditions = node.status.clone()?.conditions?;
        conditions.into_iter().find(|one| one.type_ == NETWORK_UNAVAILABLE)
    };
    let node = until(&nodes, "the condition", |node| network(node).is_some()).await;
    assert_eq!(network(&node).unwrap().status, "False");

    let of_ours = ListParams::default().fields(&format!("regarding.name={NAME}"));
    let mut told = Vec::new();
    for _ in 0..200 {
        told = events.list(&of_ours).await.unwrap().items;
        if told.iter().any(|event| event.reason.as_deref() == Some("BadAnnotation")) {
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    assert!(told.iter().any(|event| event.reason.as_deref() == Some("BadAnnotation")), "{told:?}");

    // Another Node of that name is told the same, and quickly.
    nodes.delete(NAME, &DeleteParams::default()).await.unwrap();
    nodes.create(&PostParams::default(), &fresh("10.250.2.0/24")).await.unwrap();
    until(&nodes, "the next Node's annotations", |node| {
        says(node, "warren.dev/lanes").is_some() && network(node).is_some()
    })
    .await;
    tasks.abort_all();
    nodes.delete(NAME, &DeleteParams::default()).await.unwrap();
    for event in told {
        let _ = events.delete(&event.metadata.name.unwrap_or_default(), &DeleteParams::default()).await;
    }
}
