//! Agents come and go; connections stay.

use std::time::Duration;

use crate::lab::agent::{Agent, Mesh};
use crate::lab::traffic::{Echo, Flow, exchange, reach};
use crate::lab::{Lab, wait_for};

/// After a gap TCP tries again at growing intervals; this is ample for an agent that starts at once.
const RESUMES: Duration = Duration::from_secs(10);
/// Bytes a second of the connection that must survive.
const RATE: u64 = 1 << 20;

#[test]
fn a_killed_agent_comes_back_and_connections_live_on() {
    for encap in ["wireguard", "vxlan"] {
        // Whoever sends, whoever receives: each side is killed in turn.
        for (killed, lanes) in [(0, "1"), (1, "1"), (0, "2")] {
            let mut mesh = Mesh::start(Lab::two(), &["--encap", encap, "--lanes", lanes]);
            let echo = Echo::start(mesh.pod(1));
            let flows = [0, 1].map(|family| Flow::start(mesh.pod(0), mesh.pod(1), family, echo.port, RATE));
            flows.iter().for_each(|flow| flow.assert_alive(RESUMES));
            mesh.agents[killed].wait_saved(&mesh.lab, &mesh.lab.nodes[1 - killed]);
            mesh.agents[killed].kill();
            let Mesh { agents, lab } = &mut mesh;
            agents[killed].restart(lab, &lab.nodes[killed]);
            flows.iter().for_each(|flow| flow.assert_alive(RESUMES));
            for flow in flows {
                let pause = flow.longest_pause();
                let bytes = flow.finish();
                eprintln!("{encap}, agent {killed} killed: longest pause {pause:?}, {bytes} bytes whole");
            }
        }
    }
}

#[test]
fn an_agent_that_is_stopped_leaves_the_network_and_goes_on_where_it_was() {
    let mut mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
    let echo = Echo::start(mesh.pod(1));
    let flow = Flow::start(mesh.pod(0), mesh.pod(1), 0, echo.port, RATE);
    flow.assert_alive(RESUMES);
    let status = mesh.agents[0].stop();
    assert!(status.success(), "a stop that was asked for is a success: {status}");
    let routes = mesh.lab.nodes[0].ns.run("ip route show");
    assert!(routes.contains("dev warren0"), "routes stay while the agent is away: {routes}");
    let Mesh { agents, lab } = &mut mesh;
    agents[0].restart(lab, &lab.nodes[0]);
    flow.assert_alive(RESUMES);
    flow.finish();
}

/// An update: the new agent is there before the old one goes, and the old one goes on if the new one fails.
#[test]
fn agents_hand_over_to_one_another() {
    for encap in ["wireguard", "vxlan"] {
        let arguments = ["--encap", encap, "--standby"];
        let mut mesh = Mesh::start(Lab::two(), &arguments);
        let echo = Echo::start(mesh.pod(1));
        let flow = Flow::start(mesh.pod(0), mesh.pod(1), 0, echo.port, RATE);
        flow.assert_alive(RESUMES);
        mesh.agents[0].wait_saved(&mesh.lab, &mesh.lab.nodes[1]);
        let began = |mesh: &Mesh, times: usize| {
            wait_for("one of the two has begun", RESUMES, || {
                (mesh.agents[0].log().matches("ready: packets flow").count() == times).then_some(())
            });
        };
        let mut new = Agent::launch(&mesh.lab, &mesh.lab.nodes[0], &arguments);
        began(&mesh, 2);
        flow.assert_alive(RESUMES);
        assert!(mesh.agents[0].is_running() && new.is_running(), "the old one stands by");
        assert!(mesh.agents[0].log().contains("another agent takes over"));
        let handed_over = flow.longest_pause();
        new.kill();
        began(&mesh, 3);
        flow.assert_alive(RESUMES);
        let mut newer = Agent::launch(&mesh.lab, &mesh.lab.nodes[0], &arguments);
        began(&mesh, 4);
        assert!(mesh.agents[0].stop().success(), "one that stands by ends when it is told to");
        flow.assert_alive(RESUMES);
        assert!(newer.is_running());
        let pause = flow.longest_pause();
        eprintln!("{encap}: longest pause {handed_over:?} when handed over, {pause:?} when killed");
        assert!(pause < Duration::from_secs(2), "{encap}: {pause:?}");
        flow.finish();
    }
}

/// The cluster's description is gone while the agent restarts: what was known last goes on.
#[test]
fn an_agent_restarts_without_its_source() {
    let mut mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
    mesh.agents[0].wait_saved(&mesh.lab, &mesh.lab.nodes[1]);
    mesh.agents[0].kill();
    let (cluster, aside) = (mesh.lab.cluster(), mesh.lab.path().join("aside"));
    std::fs::rename(&cluster, &aside).expect("take the folder away");
    let Mesh { agents, lab } = &mut mesh;
    agents[0].restart(lab, &lab.nodes[0]);
    reach(mesh.pod(0), mesh.pod(1));
    exchange(mesh.pod(0), mesh.pod(1));
    std::fs::rename(&aside, &cluster).expect("bring the folder back");
    reach(mesh.pod(1), mesh.pod(0));
}

/// The other side has been silent: it must not have to find out by itself that its session is dead.
#[test]
fn a_node_that_only_receives_is_told_of_the_restart() {
    let mut mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
    mesh.agents[1].wait_saved(&mesh.lab, &mesh.lab.nodes[0]);
    mesh.agents[1].kill();
    let Mesh { agents, lab } = &mut mesh;
    agents[1].restart(lab, &lab.nodes[1]);
    // WireGuard alone would need 15 s to give the old session up (KEEPALIVE + REKEY_TIMEOUT, whitepaper 6.2).
    let reached =
        (0..10).any(|_| crate::lab::traffic::pings(mesh.pod(0), mesh.pod(1), 0, Duration::from_millis(300)));
    assert!(reached, "the restarted node has begun a new session by itself");
}
