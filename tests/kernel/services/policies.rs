//! Who may answer: policies, nearness, readiness, slices. A table, and one mesh for each encapsulation.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use super::external::silent;
use super::{SOON, asked, refused, services, vips};
use crate::lab::agent::Mesh;
use crate::lab::netns::Netns;
use crate::lab::service::{BOTH, Over, PORT, TARGET, Who, ask};
use crate::lab::{Underlay, wait_for};

/// Where else a server listens.
const OTHER: u16 = 8081;
/// How often a row asks: that one of three is never met by chance is as likely as 1 in 10^7.
const TRIES: usize = 40;

/// The pods that may answer: node and host part. Nodes 1 and 2 are in the zone `east`, node 3 is in `west`.
const SERVERS: [(&str, u8, u8); 4] = [("a1", 1, 11), ("a2", 2, 10), ("b2", 2, 11), ("a3", 3, 10)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    /// The pod 10 of a node; on node 1 it serves nothing.
    Pod(usize),
    /// A node itself.
    Host(usize),
    /// Somebody outside of the cluster, by that node's port.
    Outside(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Each of these, and nobody else.
    By(&'static [&'static str]),
    /// The client hears at once that nobody is there.
    Refused,
    /// The client hears nothing.
    Silence,
    /// Warren has nothing to do with that address.
    Nothing,
}
use Outcome::{By, Nothing, Refused, Silence};

/// An endpoint of a slice: which server, ready, serving, terminating, further lines.
type Entry = (&'static str, [bool; 3], &'static str);

const READY: [bool; 3] = [true, true, false];
const NOT_READY: [bool; 3] = [false, false, false];
const LEAVING: [bool; 3] = [false, true, true];
const LEFT: [bool; 3] = [false, false, true];

const EAST: &str = "  hints:\n    forZones:\n    - name: east\n";
const WEST: &str = "  hints:\n    forZones:\n    - name: west\n";
const NORTH: &str = "  hints:\n    forZones:\n    - name: north\n";
const NODE1: &str = "  hints:\n    forNodes:\n    - name: node1\n    forZones:\n    - name: east\n";
const NODE2: &str = "  hints:\n    forNodes:\n    - name: node2\n    forZones:\n    - name: east\n";

struct Row {
    what: &'static str,
    labels: &'static str,
    spec: &'static str,
    /// Slices: the port of their endpoints, and those.
    slices: &'static [(u16, &'static [Entry])],
    expected: &'static [(Client, Outcome)],
}

const ROWS: &[Row] = &[
    Row {
        what: "internalTrafficPolicy: Local",
        labels: "",
        spec: "  internalTrafficPolicy: Local\n",
        slices: &[(TARGET, &[("a1", READY, ""), ("a2", READY, ""), ("b2", READY, "")])],
        expected: &[
            (Client::Pod(1), By(&["a1"])),
            (Client::Host(1), By(&["a1"])),
            (Client::Pod(2), By(&["a2", "b2"])),
            (Client::Pod(3), Silence),
        ],
    },
    Row {
        what: "internalTrafficPolicy: Local, nobody anywhere",
        labels: "",
        spec: "  internalTrafficPolicy: Local\n",
        slices: &[(TARGET, &[("a1", NOT_READY, "")])],
        expected: &[(Client::Pod(1), Refused), (Client::Pod(3), Refused)],
    },
    Row {
        what: "internalTrafficPolicy: Local, one of this node leaving",
        labels: "",
        spec: "  internalTrafficPolicy: Local\n",
        slices: &[(TARGET, &[("a1", LEAVING, ""), ("a2", READY, "")])],
        expected: &[(Client::Pod(1), By(&["a1"])), (Client::Pod(2), By(&["a2"]))],
    },
    Row {
        what: "externalTrafficPolicy: Local",
        labels: "",
        spec: "  externalTrafficPolicy: Local\n",
        slices: &[(TARGET, &[("a1", READY, ""), ("a2", READY, ""), ("b2", READY, "")])],
        expected: &[
            (Client::Outside(1), By(&["a1"])),
            (Client::Outside(2), By(&["a2", "b2"])),
            (Client::Outside(3), Silence),
            // By its ClusterIP it is a Service like any other.
            (Client::Pod(3), By(&["a1", "a2", "b2"])),
        ],
    },
    Row {
        what: "externalTrafficPolicy: Local, all of a node leaving",
        labels: "",
        spec: "  externalTrafficPolicy: Local\n",
        slices: &[(TARGET, &[("a1", LEAVING, ""), ("a2", READY, ""), ("b2", LEAVING, ""), ("a3", LEFT, "")])],
        expected: &[
            (Client::Outside(1), By(&["a1"])),
            (Client::Outside(2), By(&["a2"])),
            (Client::Outside(3), Silence),
        ],
    },
    Row {
        what: "externalTrafficPolicy: Local, all leaving",
        labels: "",
        spec: "  externalTrafficPolicy: Local\n",
        slices: &[(TARGET, &[("a1", LEAVING, ""), ("a2", LEFT, "")])],
        expected: &[(Client::Outside(1), By(&["a1"])), (Client::Outside(2), Silence)],
    },
    Row {
        what: "externalTrafficPolicy: Local, nobody anywhere",
        labels: "",
        spec: "  externalTrafficPolicy: Local\n",
        slices: &[(TARGET, &[("a1", NOT_READY, ""), ("a2", LEFT, "")])],
        expected: &[(Client::Outside(1), Refused), (Client::Outside(3), Refused)],
    },
    Row {
        what: "externalTrafficPolicy: Cluster",
        labels: "",
        spec: "  externalTrafficPolicy: Cluster\n",
        slices: &[(TARGET, &[("a1", LEAVING, ""), ("a2", READY, ""), ("b2", NOT_READY, "")])],
        expected: &[(Client::Outside(1), By(&["a2"])), (Client::Outside(3), By(&["a2"]))],
    },
    Row {
        what: "both policies: Local",
        labels: "",
        spec: "  externalTrafficPolicy: Local\n  internalTrafficPolicy: Local\n",
        slices: &[(TARGET, &[("a1", READY, ""), ("a2", READY, "")])],
        expected: &[
            (Client::Outside(2), By(&["a2"])),
            (Client::Outside(3), Silence),
            (Client::Pod(1), By(&["a1"])),
            (Client::Pod(3), Silence),
        ],
    },
    Row {
        what: "hints for zones",
        labels: "",
        spec: "  trafficDistribution: PreferSameZone\n",
        slices: &[(TARGET, &[("a1", READY, EAST), ("a2", READY, EAST), ("a3", READY, WEST)])],
        expected: &[
            (Client::Pod(1), By(&["a1", "a2"])),
            (Client::Host(1), By(&["a1", "a2"])),
            (Client::Pod(3), By(&["a3"])),
        ],
    },
    Row {
        what: "hints for zones, one without",
        labels: "",
        spec: "  trafficDistribution: PreferClose\n",
        slices: &[(TARGET, &[("a1", READY, EAST), ("a2", READY, ""), ("a3", READY, WEST)])],
        expected: &[(Client::Pod(1), By(&["a1", "a2", "a3"]))],
    },
    Row {
        what: "hints for zones, none for ours",
        labels: "",
        spec: "  trafficDistribution: PreferClose\n",
        slices: &[(TARGET, &[("a1", READY, EAST), ("a3", READY, NORTH)])],
        expected: &[(Client::Pod(1), By(&["a1"])), (Client::Pod(3), By(&["a1", "a3"]))],
    },
    Row {
        what: "hints for nodes, else for zones, else all",
        labels: "",
        spec: "  trafficDistribution: PreferSameNode\n",
        slices: &[(TARGET, &[("a1", READY, NODE1), ("a2", READY, NODE2), ("b2", READY, NODE2)])],
        expected: &[
            (Client::Pod(1), By(&["a1"])),
            (Client::Pod(2), By(&["a2", "b2"])),
            (Client::Pod(3), By(&["a1", "a2", "b2"])),
        ],
    },
    Row {
        what: "the zone's only endpoint is leaving",
        labels: "",
        spec: "  trafficDistribution: PreferSameZone\n",
        slices: &[(TARGET, &[("a1", READY, EAST), ("a3", LEAVING, WEST)])],
        expected: &[(Client::Pod(3), By(&["a1"]))],
    },
    Row {
        what: "publishNotReadyAddresses: whoever fills the slices says ready",
        labels: "",
        spec: "  publishNotReadyAddresses: true\n",
        slices: &[(TARGET, &[("a1", [true, false, false], ""), ("a2", [true, false, true], "")])],
        expected: &[(Client::Pod(1), By(&["a1", "a2"]))],
    },
    Row {
        what: "not ready",
        labels: "",
        spec: "",
        slices: &[(TARGET, &[("a1", NOT_READY, ""), ("a2", READY, "")])],
        expected: &[(Client::Pod(1), By(&["a2"]))],
    },
    Row {
        what: "leaving while others are ready",
        labels: "",
        spec: "",
        slices: &[(TARGET, &[("a1", LEAVING, ""), ("a2", READY, ""), ("a3", LEFT, "")])],
        expected: &[(Client::Pod(1), By(&["a2"]))],
    },
    Row {
        what: "leaving, nobody else",
        labels: "",
        spec: "",
        slices: &[(TARGET, &[("a1", LEAVING, ""), ("a2", NOT_READY, ""), ("a3", LEFT, "")])],
        expected: &[(Client::Pod(1), By(&["a1"])), (Client::Pod(3), By(&["a1"]))],
    },
    Row {
        what: "left",
        labels: "",
        spec: "",
        slices: &[(TARGET, &[("a3", LEFT, "")])],
        expected: &[(Client::Pod(1), Refused), (Client::Host(1), Refused)],
    },
    Row {
        what: "several slices, one endpoint in two of them",
        labels: "",
        spec: "",
        slices: &[
            (TARGET, &[("a1", READY, ""), ("a2", READY, "")]),
            (TARGET, &[("a1", READY, ""), ("a3", READY, "")]),
            (TARGET, &[("a1", READY, "")]),
        ],
        expected: &[(Client::Pod(1), By(&["a1", "a2", "a3"]))],
    },
    Row {
        what: "a named port with another number in each slice",
        labels: "",
        spec: "",
        slices: &[(TARGET, &[("a1", READY, "")]), (OTHER, &[("a2", READY, ""), ("a3", READY, "")])],
        expected: &[(Client::Pod(1), By(&["a1", "a2 on the other port", "a3 on the other port"]))],
    },
    Row {
        what: "another proxy's",
        labels: "  labels:\n    service.kubernetes.io/service-proxy-name: somebody\n",
        spec: "",
        slices: &[(TARGET, &[("a1", READY, "")])],
        expected: &[(Client::Pod(1), Nothing), (Client::Host(1), Nothing)],
    },
];

/// Objects that must change nothing.
const LEFT_ALONE: &str = "apiVersion: v1
kind: Service
metadata:
  name: headless
  namespace: default
spec:
  clusterIP: None
  clusterIPs: [None]
  ports:
  - {name: tcp, protocol: TCP, port: 80}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: headless-1
  namespace: default
  labels: {kubernetes.io/service-name: headless, service.kubernetes.io/headless: ''}
addressType: IPv4
ports: [{name: tcp, protocol: TCP, port: 80}]
endpoints: [{addresses: [10.244.1.11], conditions: {ready: true}, nodeName: node1}]
---
apiVersion: v1
kind: Service
metadata:
  name: outside
  namespace: default
spec:
  type: ExternalName
  externalName: example.org
";

impl Row {
    /// Every row has a node port of its own.
    fn node_port(&self, number: u8) -> u16 {
        31_000 + u16::from(number)
    }

    /// Whether it is about clients from outside.
    fn is_external(&self) -> bool {
        self.expected.iter().any(|(client, _)| matches!(client, Client::Outside(_)))
    }

    /// The objects; every row has ClusterIPs of its own.
    fn objects(&self, mesh: &Mesh, number: u8) -> String {
        let [v4, v6] = [0, 1].map(|family| vips(number)[family]);
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: row{number}\n  namespace: default\n{}spec:\n  \
             type: NodePort\n  clusterIP: \"{v4}\"\n  clusterIPs:\n  - \"{v4}\"\n  - \"{v6}\"\n  ipFamilies:\n  - IPv4\n  - IPv6\n  \
             ports:\n",
            self.labels
        );
        for (name, protocol) in [("tcp", "TCP"), ("udp", "UDP")] {
            let _ = writeln!(
                text,
                "  - name: {name}\n    protocol: {protocol}\n    port: {PORT}\n    targetPort: {name}\n    \
                 nodePort: {}",
                self.node_port(number)
            );
        }
        text.push_str(self.spec);
        for (index, (port, entries)) in self.slices.iter().enumerate() {
            for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
                let low = name.to_lowercase();
                let _ = write!(
                    text,
                    "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  \
                     name: row{number}-{index}-{low}\n  namespace: default\n  labels:\n    kubernetes.io/service-name: row{number}\naddressType: {name}\n\
                     ports:\n- name: tcp\n  protocol: TCP\n  port: {port}\n- name: udp\n  protocol: UDP\n  port: \
                     {port}\nendpoints:\n",
                );
                for (server, [ready, serving, terminating], more) in *entries {
                    let (address, node) = place(mesh, server, family);
                    let _ = write!(
                        text,
                        "- addresses:\n  - \"{address}\"\n  nodeName: {node}\n  conditions:\n    ready: {ready}\n    \
                         serving: {serving}\n    terminating: {terminating}\n{more}",
                    );
                }
            }
        }
        text
    }
}

fn place(mesh: &Mesh, server: &str, family: usize) -> (IpAddr, String) {
    let (_, node, host) = SERVERS.into_iter().find(|(name, ..)| *name == server).expect("a server");
    let node = &mesh.lab.nodes[usize::from(node) - 1];
    (node.inner(host)[family], node.name.clone())
}

#[test]
fn who_answers_with_wireguard() {
    who_answers("wireguard", Underlay::V4);
}

#[test]
fn who_answers_with_vxlan() {
    who_answers("vxlan", Underlay::V4);
}

#[test]
fn who_answers_strangers_with_ipv6() {
    for encap in ["wireguard", "vxlan"] {
        who_answers(encap, Underlay::V6);
    }
}

/// All rows; over IPv6 only those where the underlay's family makes a difference.
fn who_answers(encap: &str, underlay: Underlay) {
    let rows = || (1..).zip(ROWS).filter(|(_, row)| underlay == Underlay::V4 || row.is_external());
    let mesh = services(3, encap, underlay);
    for (node, zone) in mesh.lab.nodes.iter().zip(["east", "east", "west"]) {
        let object = mesh.lab.node_object(node, &[]);
        let label = format!("metadata:\n  labels:\n    topology.kubernetes.io/zone: {zone}\n");
        mesh.lab.write_object(&format!("{}.yaml", node.name), &object.replacen("metadata:\n", &label, 1));
    }
    let mut servers = Vec::new();
    for (name, node, host) in SERVERS {
        let node = &mesh.lab.nodes[usize::from(node) - 1];
        let ns = &node.pods[usize::from(host) - 10];
        servers.push(Who::start(name, ns, &node.inner(host)));
        let other = match name {
            "a2" => "a2 on the other port",
            "a3" => "a3 on the other port",
            _ => "nobody asked for",
        };
        servers.push(Who::start_at(OTHER, other, ns, &node.inner(host)));
    }
    mesh.lab.write_object("left-alone.yaml", LEFT_ALONE);
    for (number, row) in rows() {
        mesh.lab.write_object(&format!("row{number}.yaml"), &row.objects(&mesh, number));
    }
    let outer = usize::from(underlay == Underlay::V6);
    for (number, row) in rows() {
        for (client, outcome) in row.expected {
            if let Client::Outside(node) = *client {
                let target =
                    SocketAddr::new(mesh.lab.outer(&mesh.lab.nodes[node - 1]), row.node_port(number));
                let what = format!("{}: {client:?}, {underlay:?}, {encap}", row.what);
                check(&what, &mesh.lab.switch, target, *outcome);
                continue;
            }
            let ns = match *client {
                Client::Pod(node) => &mesh.lab.nodes[node - 1].pods[0],
                Client::Host(node) => &mesh.lab.nodes[node - 1].ns,
                Client::Outside(_) => continue,
            };
            for family in [0, 1].into_iter().filter(|family| underlay == Underlay::V4 || *family == outer) {
                let what = format!("{}: {client:?}, family {family}, {encap}", row.what);
                check(&what, ns, SocketAddr::new(vips(number)[family], PORT), *outcome);
            }
        }
    }
}

fn check(what: &str, ns: &Netns, target: SocketAddr, outcome: Outcome) {
    match outcome {
        By(expected) => {
            let share = TRIES / expected.len();
            // The zones of the nodes may be news to the agents, and the endpoint's node may hear of the Service after the
            // one that was asked: until then it takes a stranger's packets for forged ones.
            wait_for(what, SOON, || {
                for over in BOTH {
                    asked(ns, None, target, over);
                }
                let mut seen = BTreeMap::new();
                for number in 0..TRIES {
                    let over = if number % 8 == 0 { Over::Tcp } else { Over::Udp };
                    let asked = ask(ns, None, target, over, 20);
                    let answer = asked.inspect_err(|error| eprintln!("{what}: {error}")).ok()?;
                    *seen.entry(answer.server).or_insert(0) += 1;
                }
                let right = seen.keys().map(String::as_str).eq(expected.iter().copied());
                // Nobody counts twice, however often he is named.
                let fair = seen.values().all(|count| *count <= share * 2 || expected.len() == 1);
                (right && fair).then_some(()).or_else(|| {
                    eprintln!("{what}: {seen:?}");
                    None
                })
            });
        }
        Refused => {
            for over in BOTH {
                wait_for(what, SOON, || refused(ns, target, over).then_some(()));
            }
        }
        Silence => {
            for over in BOTH {
                wait_for(what, SOON, || silent(ns, target, over).then_some(()));
            }
        }
        Nothing => {
            for over in BOTH {
                assert!(ask(ns, None, target, over, 10).is_err(), "{what}: answered");
                assert!(!refused(ns, target, over), "{what}: refused as a closed port of a Service");
            }
        }
    }
}
