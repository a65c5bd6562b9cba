//! What a person sees of objects that cannot be obeyed, and that everybody else's go on.

use std::net::SocketAddr;
use std::process::Command;

use super::{SOON, asked, pods, service, services, vips};
use crate::lab::agent::{Mesh, warren};
use crate::lab::service::{Over, PORT, Who};
use crate::lab::{Underlay, wait_for};

/// A Service that asks for a pod's address, and a slice with an endpoint that can be none.
const BAD: &str = "apiVersion: v1
kind: Service
metadata: {name: greedy, namespace: default}
spec:
  clusterIP: 10.96.0.77
  clusterIPs: [10.96.0.77]
  ipFamilies: [IPv4]
  externalIPs: [10.244.1.10]
  ports: [{name: tcp, protocol: TCP, port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: greedy-1
  namespace: default
  labels: {kubernetes.io/service-name: greedy}
addressType: IPv4
ports: [{name: tcp, protocol: TCP, port: 8080}]
endpoints:
- {addresses: [127.0.0.1], conditions: {ready: true}}
";

fn status(mesh: &Mesh, more: &[&str]) -> String {
    let run = mesh.agents[0].folder().join("run");
    let output = Command::new(warren()).arg("status").args(more).arg("--run-dir").arg(run).output();
    String::from_utf8_lossy(&output.expect("run warren status").stdout).into_owned()
}

#[test]
fn status_says_what_is_wrong_with_a_service_and_with_a_slice() {
    let mesh = services(2, "vxlan", Underlay::V4);
    let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
    service("web", 1, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
    mesh.lab.write_object("bad.yaml", BAD);
    let of =
        |text: &str, words: [&str; 3]| text.lines().any(|line| words.iter().all(|word| line.contains(word)));
    let service = ["greedy", "10.244.1.10", "pod range"];
    let slice = ["greedy", "127.0.0.1", "of this host"];
    wait_for("status names both", SOON, || {
        let said = status(&mesh, &[]);
        (of(&said, service) && of(&said, slice)).then_some(()).or_else(|| {
            eprintln!("{said}");
            None
        })
    });
    let json: serde_json::Value = serde_json::from_str(&status(&mesh, &["--json"])).expect("status is JSON");
    let said = json.to_string();
    assert!(said.contains("spec.externalIPs") && said.contains("EndpointSlice"), "{said}");
    asked(&node1.pods[0], None, SocketAddr::new(vips(1)[0], PORT), Over::Tcp);
    // What is right again is not spoken of.
    std::fs::remove_file(mesh.lab.cluster().join("bad.yaml")).expect("remove the objects");
    wait_for("status is silent", SOON, || (!status(&mesh, &[]).contains("greedy")).then_some(()));
}
