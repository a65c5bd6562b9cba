//! One pod that floods a Service, and everybody else.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use warren::io::clock;

use super::{NODE_PORT, asked, pods, service, services, vips};
use crate::lab::netns::Netns;
use crate::lab::raw::Raw;
use crate::lab::service::{BOTH, Over, PORT, Service, Who, ask};
use crate::lab::traffic::{Echo, Flow};
use crate::lab::{Station, Underlay};

/// Flows that the pod opens, at least.
const FLOWS: u64 = 1_000_000;
/// ClusterIPs to which they go.
const TARGETS: u8 = 18;
/// Datagrams in a burst, and how long after it the next one comes: a pod that sends all it can would show how
/// fast the loop is, and not who pays.
const BURST: u64 = 200;
const PAUSE: Duration = Duration::from_millis(5);

fn number(ns: &Netns, key: &str) -> u64 {
    ns.run(&format!("sysctl -n {key}")).trim().parse().expect("a number")
}

/// The n-th datagram of the flood: every one is a flow of its own.
fn datagram(n: u64) -> (u8, Vec<u8>) {
    const PORTS: u64 = 60_000;
    let port = 2_000 + (n % PORTS) as u16;
    let target = 10 + (n / PORTS) as u8 % TARGETS;
    // UDP over IPv4 need not have a checksum (RFC 768).
    (
        target,
        [port.to_be_bytes(), PORT.to_be_bytes(), [0, 9], [0, 0]].concat().into_iter().chain([7]).collect(),
    )
}

/// Ends the flood, also when a test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is flooded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    /// ClusterIPs: they need no place in the kernel's table.
    ClusterIps,
    /// Addresses of load balancers, which do.
    Balancers,
}

fn balancer(number: u8) -> IpAddr {
    [198, 51, 100, number].into()
}

#[test]
fn a_pods_flood_costs_itself() {
    a_flood_costs_the_pod(Door::ClusterIps);
}

#[test]
fn a_pods_flood_at_external_addresses_costs_itself() {
    a_flood_costs_the_pod(Door::Balancers);
}

fn a_flood_costs_the_pod(door: Door) {
    // Two floods at once would show how fast the machine is.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mesh = services(2, "vxlan", Underlay::V4);
    let [node1, node2] = [&mesh.lab.nodes[0], &mesh.lab.nodes[1]];
    let _servers = [
        Who::start("near", &node1.pods[1], &node1.inner(11)),
        Who::start("far", &node2.pods[0], &node2.inner(10)),
    ];
    let _echo = Echo::start(node2.pod());
    service("far", 1, pods(&mesh, &[(2, 10)])).write(&mesh.lab);
    service("bulk", 2, pods(&mesh, &[(2, 10)])).write_for_port(&mesh.lab, 7);
    let near = Service { ingress: vec![balancer(3)], ..service("near", 3, pods(&mesh, &[(1, 11)])) };
    Service { node_port: NODE_PORT, ..near }.write(&mesh.lab);
    const NAMES: [&str; TARGETS as usize] = [
        "t0", "t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8", "t9", "t10", "t11", "t12", "t13", "t14", "t15",
        "t16", "t17",
    ];
    for (number, name) in (10..).zip(NAMES) {
        // Nobody listens there: each datagram stays the only one of its flow. To one endpoint there could
        // not be more flows than ports.
        let ingress = vec![balancer(number)];
        let service = Service { ingress, ..service(name, number, pods(&mesh, &[(2, 11)])) };
        service.write_for_port(&mesh.lab, u16::from(number));
    }
    let far = SocketAddr::new(vips(1)[0], PORT);
    let node_port = SocketAddr::new(mesh.lab.outer(node1), NODE_PORT);
    // The victim is on the flooding pod's node.
    let victim = &node1.pods[1];
    for over in BOTH {
        asked(victim, None, far, over);
        asked(&mesh.lab.switch, None, node_port, over);
    }
    let bulk = [vips(2)[0], vips(2)[1]];
    asked(victim, None, far, Over::Tcp);
    let from = Station { ns: victim, addresses: node1.inner(11) };
    let flow = Flow::start(from, Station { ns: victim, addresses: bulk }, 0, PORT, 100_000);
    let most = number(&node1.ns, "net.netfilter.nf_conntrack_max");

    let (stop, sent, fullest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let asked = std::thread::scope(|scope| {
        let raw = Raw::new(&node1.pods[0], node1.inner(10)[0], 17);
        let (stop, sent) = (&stop, &sent);
        let _end = End(stop);
        scope.spawn(move || {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..BURST {
                    let (target, bytes) = datagram(n);
                    // A full queue is the flooder's own loss.
                    let to = match door {
                        Door::ClusterIps => vips(target)[0],
                        Door::Balancers => balancer(target),
                    };
                    let _ = raw.send(to, &bytes);
                    n += 1;
                }
                sent.store(n, Ordering::Relaxed);
                std::thread::sleep(PAUSE);
            }
        });
        let mut answered = 0;
        let began = clock::now();
        loop {
            for (client, target) in [
                (victim, far),
                (victim, node_port),
                (victim, SocketAddr::new(balancer(3), PORT)),
                (&node1.ns, far),
                (&node2.pods[1], node_port),
                (&mesh.lab.switch, node_port),
            ] {
                for over in BOTH {
                    let answer = (0..3).find_map(|_| ask(client, None, target, over, 100).ok());
                    assert!(answer.is_some(), "{} asks {target} over {over:?} in vain", client.name());
                    answered += 1;
                }
            }
            let count = number(&node1.ns, "net.netfilter.nf_conntrack_count");
            fullest.fetch_max(count, Ordering::Relaxed);
            let n = sent.load(Ordering::Relaxed);
            if n >= FLOWS {
                break;
            }
            assert!(clock::now().duration_since(began) < Duration::from_secs(120), "only {n} datagrams");
        }
        answered
    });
    let (sent, fullest) = (sent.into_inner(), fullest.into_inner());
    let quota = mesh.agents[0].dropped("flow-quota");
    eprintln!(
        "{sent} flows, {quota} dropped for the quota, {asked} questions answered, conntrack at most \
         {fullest} of {most}, longest pause {:?}",
        flow.longest_pause()
    );
    assert!(quota > 0, "nothing was dropped for the pod's quota");
    assert_eq!(mesh.agents[0].dropped("flow-table-full"), 0);
    // Left to itself the flood fills it in seven seconds.
    assert!(fullest < most / 20 * 19, "the kernel's connection table: {fullest} of {most}");
    let log = mesh.agents[0].log();
    let who = format!("pod {} has more than a quarter of the kernel's connection table", node1.inner(10)[0]);
    assert!(log.contains(&who), "{log}");
    flow.assert_alive(Duration::from_secs(5));
    assert!(flow.longest_pause() < Duration::from_secs(3), "{:?}", flow.longest_pause());
    flow.finish();
}
