//! WireGuard changes its keys after two minutes, under traffic: not one byte may be lost.

use std::net::SocketAddr;
use std::time::Duration;

use warren::io::clock;

use crate::lab::agent::{Agent, Mesh};
use crate::lab::peer::{PORT, Program, WireGuard, last_handshake};
use crate::lab::traffic::{Echo, Flow, reach};
use crate::lab::{Lab, Station, wait_for};

/// REKEY_AFTER_TIME is 120 s, REJECT_AFTER_TIME 180 s (whitepaper section 6.1): the session in use at the
/// start is refused by both sides before this has passed.
const LONG: Duration = Duration::from_secs(190);
/// Bytes a second, each way.
const RATE: u64 = 2 << 20;

/// All at once, because each takes as long as the others: Warren begins, wireguard-go begins, Warren with itself.
#[test]
fn two_minutes_and_more_without_a_lost_byte() {
    std::thread::scope(|scope| {
        scope.spawn(|| with_wireguard_go(true));
        scope.spawn(|| with_wireguard_go(false));
        scope.spawn(with_itself);
    });
}

fn with_wireguard_go(warren_begins: bool) {
    let mut lab = Lab::two();
    lab.nodes[0].add_pod(1500);
    let [warren, other] = [&lab.nodes[0], &lab.nodes[1]];
    let peer = WireGuard::start(&lab, other, Program::WireguardGo);
    let endpoint = SocketAddr::new(lab.outer(other), PORT).to_string();
    lab.write_node(warren, &[]);
    lab.write_node(other, &[("warren.dev/public-key", &peer.public_key), ("warren.dev/endpoint", &endpoint)]);
    let agent = Agent::start(&lab, warren, &["--encap", "wireguard"]);
    warren.set_pod_mtu(agent.pod_mtu());
    let lanes = wait_for("node1 has published its lanes", Duration::from_secs(5), || {
        lab.published(warren, "warren.dev/lanes")
    });
    let (key, port) = lanes.split(',').next().and_then(|l| l.rsplit_once(':')).expect("KEY:PORT");
    peer.add_peer(other, warren, key, Some((lab.outer(warren), port.parse().expect("a port"))));
    let (pod, host) = (warren.pod(), other.host(10));
    let (from, to) = if warren_begins { (pod, host) } else { (host, pod) };
    let name = if warren_begins { "Warren begins" } else { "wireguard-go begins" };
    carry(name, from, to, || WireGuard::last_handshake(other));
}

fn with_itself() {
    let mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
    carry("Warren with itself", mesh.pod(0), mesh.pod(1), || last_handshake(&mesh.lab.nodes[0], "warren0"));
}

/// Carries numbered bytes over both families until the first keys are long dead.
fn carry(name: &str, from: Station<'_>, to: Station<'_>, handshake: impl Fn() -> u64) {
    reach(from, to);
    let echo = Echo::start(to);
    let flows = [0, 1].map(|family| Flow::start(from, to, family, echo.port, RATE));
    let mut handshakes = vec![handshake()];
    let end = clock::now() + LONG;
    while clock::now() < end {
        flows.iter().for_each(|flow| flow.assert_alive(Duration::from_secs(20)));
        let latest = handshake();
        if handshakes.last() != Some(&latest) {
            handshakes.push(latest);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    for flow in flows {
        let pause = flow.longest_pause();
        let bytes = flow.finish();
        eprintln!("{name}: {bytes} bytes whole, longest pause {pause:?}, handshakes at {handshakes:?}");
        // A rekey that stalls traffic shows as a retransmission time-out or more.
        assert!(pause < Duration::from_secs(5), "{name}: {pause:?} without a byte");
    }
    assert!(handshakes.len() >= 2, "{name}: keys were changed: {handshakes:?}");
}
