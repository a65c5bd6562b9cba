//! A node that nobody can call: behind NAT, or behind a firewall that lets in only answers.

use std::time::Duration;

use crate::lab::Lab;
use crate::lab::agent::Mesh;
use crate::lab::traffic::{pings, reach};

/// How long the firewall remembers that something went out.
const REMEMBERS: Duration = Duration::from_secs(3);
/// Longer than that: without keepalives the way in is closed.
const SILENCE: Duration = Duration::from_secs(8);
const SOON: Duration = Duration::from_secs(3);

fn shielded(arguments: &'static [&'static str]) -> Mesh {
    let lab = Lab::two().with_pods();
    let seconds = REMEMBERS.as_secs();
    lab.nodes[0].ns.run_all(&format!(
        "nft add table inet shield
         nft add chain inet shield in {{ type filter hook input priority 0 ; }}
         nft add rule inet shield in udp dport 51820 ct state new drop
         sysctl -qw net.netfilter.nf_conntrack_udp_timeout={seconds}
         sysctl -qw net.netfilter.nf_conntrack_udp_timeout_stream={seconds}",
    ));
    Mesh::start_each(lab, |number| if number == 1 { arguments.to_vec() } else { vec![] })
}

#[test]
fn with_keepalives_it_stays_reachable() {
    let mut mesh = shielded(&["--keepalive", "1"]);
    for _ in 0..2 {
        std::thread::sleep(SILENCE);
        assert!(pings(mesh.pod(1), mesh.pod(0), 0, SOON), "the way in is kept open");
    }
    // The other one forgets everything, and must not have to wait until somebody here wants something.
    mesh.agents[1].kill();
    std::thread::sleep(SILENCE);
    let Mesh { agents, lab } = &mut mesh;
    agents[1].restart(lab, &lab.nodes[1]);
    std::thread::sleep(SOON);
    reach(mesh.pod(1), mesh.pod(0));
}

/// What makes the test above one that can fail.
#[test]
fn without_keepalives_the_way_in_closes() {
    let mesh = shielded(&[]);
    std::thread::sleep(SILENCE);
    assert!(
        !pings(mesh.pod(1), mesh.pod(0), 0, Duration::from_secs(1)),
        "nothing should have kept the way open"
    );
    // And opens again with the first packet from inside.
    reach(mesh.pod(0), mesh.pod(1));
    assert!(pings(mesh.pod(1), mesh.pod(0), 0, SOON));
}
