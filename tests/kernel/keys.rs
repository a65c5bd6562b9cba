//! `warren keys rotate`: a node's keys change under traffic, and nobody notices.

use std::process::Command;
use std::time::Duration;

use crate::lab::agent::{Agent, Mesh, warren};
use crate::lab::traffic::{Echo, Flow, PingTrain, reach};
use crate::lab::{Lab, wait_for};

/// Bytes a second, each way.
const RATE: u64 = 2 << 20;

fn keys(agent: &Agent, arguments: &[&str]) -> (bool, String) {
    let run = agent.folder().join("run");
    let mut command = Command::new(warren());
    command.arg("keys").args(["--run-dir".as_ref(), run.as_os_str()]).args(arguments);
    let output = command.output().expect("run warren keys");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// The public keys, and where a change stands.
fn shown(agent: &Agent) -> (Vec<String>, String) {
    let (_, text) = keys(agent, &["--json"]);
    let view: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let public = view["public_keys"].as_array().expect("a list of keys").iter();
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    (public.map(text).collect(), text(&view["change"]))
}

#[test]
fn keys_change_under_traffic_and_nobody_notices() {
    std::thread::scope(|scope| {
        for lanes in ["1", "2"] {
            scope.spawn(move || change_under_traffic(lanes));
        }
    });
}

fn change_under_traffic(lanes: &str) {
    let mesh = Mesh::start(Lab::two(), &["--encap", "wireguard", "--lanes", lanes]);
    let (a, b) = (mesh.pod(0), mesh.pod(1));
    reach(a, b);
    let echo = Echo::start(b);
    let flows = [0, 1].map(|family| Flow::start(a, b, family, echo.port, RATE));
    let trains = [PingTrain::start(a, b, 0), PingTrain::start(b, a, 1)];

    let (before, stands) = shown(&mesh.agents[0]);
    assert_eq!((before.len().to_string().as_str(), stands.as_str()), (lanes, ""));
    let (begun, text) = keys(&mesh.agents[0], &["rotate", "--overlap", "4"]);
    assert!(begun && text.contains("announced"), "{text}");
    let (again, text) = keys(&mesh.agents[0], &["rotate"]);
    assert!(!again && text.contains("a change is under way"), "{text}");
    assert_eq!(shown(&mesh.agents[0]).0, before, "not before the others have heard");
    wait_for("the next keys are in use", Duration::from_secs(15), || {
        (shown(&mesh.agents[0]).0 != before).then_some(())
    });
    wait_for("the last keys are gone", Duration::from_secs(30), || {
        shown(&mesh.agents[0]).1.is_empty().then_some(())
    });
    let (after, _) = shown(&mesh.agents[0]);
    assert!(after.iter().all(|key| !before.contains(key)), "{before:?} {after:?}");
    // Node 2 has no session with the old keys any more.
    let uapi = mesh.lab.nodes[1].ns.run("wg show warren0 peers");
    assert!(uapi.contains(&after[0]) && !uapi.contains(&before[0]), "{uapi}");

    for train in trains {
        let (sent, received) = train.finish();
        assert!(sent > 500, "{sent} pings");
        assert_eq!(sent, received, "{lanes} lanes: pings were lost");
    }
    for flow in flows {
        let pause = flow.longest_pause();
        let bytes = flow.finish();
        eprintln!("{lanes} lanes: {bytes} bytes whole, longest pause {pause:?}");
        assert!(pause < Duration::from_secs(1), "{pause:?} without a byte");
    }
    let kept =
        std::fs::read_dir(mesh.agents[0].folder().join("state/keys")).expect("a folder of keys").count();
    assert_eq!(kept.to_string(), lanes, "the last keys are gone from the disk");
}

#[test]
fn an_agent_that_dies_in_the_middle_of_a_change_goes_on_with_it() {
    let mut mesh = Mesh::start(Lab::two(), &["--encap", "wireguard"]);
    reach(mesh.pod(0), mesh.pod(1));
    let (before, _) = shown(&mesh.agents[0]);
    assert!(keys(&mesh.agents[0], &["rotate", "--overlap", "2"]).0);
    wait_for("the next keys are in use", Duration::from_secs(15), || {
        (shown(&mesh.agents[0]).0 != before).then_some(())
    });
    let (next, _) = shown(&mesh.agents[0]);
    mesh.agents[0].kill();
    let lab = &mesh.lab;
    mesh.agents[0].restart(lab, &lab.nodes[0]);
    assert_eq!(shown(&mesh.agents[0]).0, next);
    assert!(shown(&mesh.agents[0]).1.contains("the last ones end"), "{:?}", shown(&mesh.agents[0]));
    reach(mesh.pod(0), mesh.pod(1));
    reach(mesh.pod(1), mesh.pod(0));
}
