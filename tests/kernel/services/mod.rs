//! Services on real kernels: one row for everything that a Service can be.

mod affinity;
mod balancers;
mod clients;
mod external;
mod flood;
mod handover;
mod hosts;
mod meetings;
mod path;
mod policies;
mod sctp;
mod trouble;
mod turned;
mod unsummed;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use warren::io::clock;

use crate::lab::agent::Mesh;
use crate::lab::netns::Netns;
use crate::lab::service::{Answer, Over, Service, ask, ask_udp, open, udp};
use crate::lab::{Lab, Underlay};

/// The Service ranges of the laboratory.
pub(crate) const SERVICES: &str = "10.96.0.0/16,fd00:10:96::/112";
/// How soon a change of an object must have reached the packets.
pub(crate) const SOON: Duration = Duration::from_secs(5);
pub(crate) const NODE_PORT: u16 = 30_007;

/// Nodes with two pods each, Services switched on.
pub(crate) fn services(nodes: u8, encap: &str, underlay: Underlay) -> Mesh {
    services_with(nodes, encap, underlay, &[])
}

/// The same with more arguments for the agents.
pub(crate) fn services_with(nodes: u8, encap: &str, underlay: Underlay, more: &[&str]) -> Mesh {
    let mut lab = Lab::new(nodes, underlay, 1500);
    for node in &mut lab.nodes {
        node.add_pod(1500);
        node.add_pod(1500);
    }
    let ordinary = ["--encap", encap, "--services", "on", "--service-cidr", SERVICES];
    Mesh::start(lab, &[&ordinary[..], more].concat())
}

pub(crate) fn vips(number: u8) -> Vec<IpAddr> {
    vec![IpAddr::from([10, 96, 0, number]), format!("fd00:10:96::{number:x}").parse().expect("an address")]
}

/// Endpoints of both families: the host-th pod addresses of nodes, by their number.
pub(crate) fn pods(mesh: &Mesh, which: &[(u8, u8)]) -> Vec<(IpAddr, String, bool)> {
    let of = |(node, host): &(u8, u8)| {
        let node = &mesh.lab.nodes[usize::from(*node) - 1];
        node.inner(*host).map(|address| (address, node.name.clone(), true))
    };
    which.iter().flat_map(of).collect()
}

pub(crate) fn service(name: &'static str, number: u8, endpoints: Vec<(IpAddr, String, bool)>) -> Service {
    Service { name, cluster_ips: vips(number), endpoints, ..Service::default() }
}

/// Asks until it is answered: objects take a moment.
pub(crate) fn asked(ns: &Netns, source: Option<IpAddr>, target: SocketAddr, over: Over) -> Answer {
    let deadline = clock::now() + SOON;
    loop {
        match ask(ns, source, target, over, 100) {
            Ok(answer) => return answer,
            Err(error) if clock::now() > deadline => {
                panic!("{} is not answered by {target} over {over:?}: {error}", ns.name())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Whether the client is told at once that nobody is there.
pub(crate) fn refused(ns: &Netns, target: SocketAddr, over: Over) -> bool {
    let before = clock::now();
    let result = match over {
        Over::Tcp => open(ns, None, target).map(drop),
        Over::Udp => udp(ns, None, target).and_then(|socket| ask_udp(&socket, 10)).map(drop),
    };
    let quick = clock::now().duration_since(before) < Duration::from_secs(1);
    quick && result.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
