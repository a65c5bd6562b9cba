//! Load balancers: the addresses that are theirs, those that are not ours, and what they ask.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};

use super::{SOON, asked, pods, refused, services, vips};
use crate::lab::agent::Mesh;
use crate::lab::netns::Netns;
use crate::lab::service::{BOTH, Over, PORT, TARGET, Who, ask, open};
use crate::lab::{Node, Underlay, wait_for};

const HEALTH: u16 = 32_100;

/// A Service of type LoadBalancer without node ports, of a class, with one address of each kind, and `Local`.
fn write(mesh: &Mesh, which: &[(u8, u8)]) {
    let vip = vips(1)[0];
    let endpoints: String = pods(mesh, which)
        .iter()
        .filter(|(address, ..)| address.is_ipv4())
        .map(|(address, node, _)| {
            format!("- {{addresses: [{address}], conditions: {{ready: true}}, nodeName: {node}}}\n")
        })
        .collect();
    let endpoints = if endpoints.is_empty() { "  []\n".to_owned() } else { endpoints };
    mesh.lab.write_object(
        "service-lb.yaml",
        &format!(
            "apiVersion: v1
kind: Service
metadata: {{name: lb, namespace: default}}
spec:
  type: LoadBalancer
  loadBalancerClass: example.org/some
  allocateLoadBalancerNodePorts: false
  externalTrafficPolicy: Local
  healthCheckNodePort: {HEALTH}
  clusterIP: {vip}
  clusterIPs: [{vip}]
  ipFamilies: [IPv4]
  ports:
  - {{name: tcp, protocol: TCP, port: {PORT}}}
  - {{name: udp, protocol: UDP, port: {PORT}}}
status:
  loadBalancer:
    ingress:
    - {{ip: 192.0.2.10}}
    - {{ip: 192.0.2.11, ipMode: VIP}}
    - {{ip: 192.0.2.12, ipMode: Proxy}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: lb-1
  namespace: default
  labels: {{kubernetes.io/service-name: lb}}
addressType: IPv4
ports:
- {{name: tcp, protocol: TCP, port: {TARGET}}}
- {{name: udp, protocol: UDP, port: {TARGET}}}
endpoints:
{endpoints}"
        ),
    );
}

/// What a node answers to a load balancer's question.
fn health(from: &Netns, mesh: &Mesh, node: &Node, port: u16) -> Option<String> {
    let mut stream = open(from, None, SocketAddr::new(mesh.lab.outer(node), port)).ok()?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn load_balancers_of_every_kind() {
    for encap in ["wireguard", "vxlan"] {
        let mesh = services(2, encap, Underlay::V4);
        let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
        let outside = &mesh.lab.switch;
        let _server = Who::start("far", &node2.pods[0], &node2.inner(10));
        // The balancer itself: its own address is with it.
        outside.run("ip addr add 192.0.2.12/32 dev br0");
        let _proxy = Who::start_at(PORT, "the proxy", outside, &[IpAddr::from([192, 0, 2, 12])]);
        write(&mesh, &[(2, 10)]);
        outside.run(&format!("ip route add 192.0.2.8/30 via {}", mesh.lab.outer(node2)));
        for over in BOTH {
            for last in [10, 11] {
                let target = SocketAddr::new(IpAddr::from([192, 0, 2, last]), PORT);
                let answer = asked(outside, None, target, over);
                assert_eq!((answer.server.as_str(), answer.client.ip()), ("far", mesh.lab.outside()));
                // Who is inside needs no other node, whatever the policy says.
                let pod = asked(&node1.pods[0], None, target, over);
                assert_eq!(pod.client.ip(), node1.inner(10)[0]);
                assert_eq!(asked(&node1.ns, None, target, over).server, "far");
            }
            let proxy = SocketAddr::new(IpAddr::from([192, 0, 2, 12]), PORT);
            assert_eq!(asked(&node1.pods[0], None, proxy, over).server, "the proxy", "{over:?}");
        }
        // No node port was asked for.
        assert!(refused(outside, SocketAddr::new(mesh.lab.outer(node2), PORT), Over::Tcp));

        let answers = |node: &Node, status: &str, weight: &str| {
            let what = format!("{} answers {status}, {encap}", node.name);
            wait_for(&what, SOON, || {
                health(outside, &mesh, node, HEALTH)
                    .filter(|text| text.contains(status) && text.contains(weight))
            });
        };
        answers(node1, "HTTP/1.1 503", "\"localEndpoints\":0");
        answers(node2, "HTTP/1.1 200", "\"localEndpoints\":1");
        write(&mesh, &[(1, 11)]);
        answers(node1, "HTTP/1.1 200", "\"localEndpoints\":1");
        answers(node2, "HTTP/1.1 503", "\"localEndpoints\":0");
        for node in [node1, node2] {
            let text = health(outside, &mesh, node, 10_256).expect("an answer of the proxy's own health");
            assert!(text.contains("HTTP/1.1 200") && text.contains("lastUpdated"), "{text}");
        }
        std::fs::remove_file(mesh.lab.cluster().join("service-lb.yaml")).expect("remove the Service");
        wait_for("nobody asks for a Service that is gone", SOON, || {
            health(outside, &mesh, node1, HEALTH).is_none().then_some(())
        });
        let gone = SocketAddr::new(IpAddr::from([192, 0, 2, 10]), PORT);
        assert!(ask(outside, None, gone, Over::Tcp, 10).is_err());
    }
}
