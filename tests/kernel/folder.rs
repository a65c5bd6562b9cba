//! The folder of objects: edits take effect, broken ones are reported, nothing else is disturbed.

use std::time::Duration;

use crate::lab::agent::{Agent, Mesh};
use crate::lab::traffic::{Echo, Flow, pings, reach};
use crate::lab::{Lab, Underlay, wait_for};

/// How soon a change of the folder shows.
const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_half_written_file_disturbs_nothing() {
    let mesh = Mesh::start(Lab::two(), &[]);
    let echo = Echo::start(mesh.pod(1));
    let flow = Flow::start(mesh.pod(0), mesh.pod(1), 0, echo.port, 1 << 20);
    flow.assert_alive(SOON);
    let (node, whole) = (&mesh.lab.nodes[1], mesh.lab.node_object(&mesh.lab.nodes[1], &[]));
    let file = mesh.lab.cluster().join("node2.yaml");
    for length in [0, 1, whole.len() / 3, whole.len() / 2, whole.len() - 3] {
        // Written in place, as an editor or a slow copy does.
        std::fs::write(&file, &whole[..length]).expect("write a part");
        flow.assert_alive(SOON);
    }
    std::fs::write(&file, "spec: [\"half\nkind: {").expect("write what is no YAML");
    wait_for("the broken file is reported", SOON, || {
        mesh.agents[0].log().contains("node2.yaml").then_some(())
    });
    flow.assert_alive(SOON);
    assert!(pings(mesh.pod(0), mesh.pod(1), 1, SOON), "what was known last goes on");
    mesh.lab.write_node(node, &[]);
    flow.assert_alive(SOON);
    flow.finish();
}

#[test]
fn hostile_annotations_cost_only_their_node() {
    let lab = Lab::new(3, Underlay::V4, 1500);
    let mesh = Mesh::start(lab, &[]);
    let hostile = "a;rm -rf /;`reboot` $(id) \\u0000 ../../etc/passwd".repeat(50);
    mesh.lab.write_node(
        &mesh.lab.nodes[2],
        &[
            ("warren.dev/lanes", &hostile),
            ("warren.dev/endpoints", "127.0.0.1:1,[::1]:2,0.0.0.0:0,224.0.0.1:5"),
            ("warren.dev/vxlan-mac", "ff:ff:ff:ff:ff:ff"),
            ("warren.dev/encaps", "everything"),
        ],
    );
    wait_for("the bad annotations are reported", SOON, || {
        mesh.agents[0].log().contains("node3").then_some(())
    });
    mesh.exchange(0, 1);
}

#[test]
fn nodes_come_and_go() {
    let lab = Lab::new(3, Underlay::V4, 1500).with_pods();
    let late = lab.cluster().join("node3.yaml");
    let mut mesh = {
        lab.write_nodes();
        std::fs::remove_file(&late).expect("node3 is not there yet");
        let agents = lab.nodes[..2].iter().map(|node| Agent::start(&lab, node, &[])).collect();
        Mesh { agents, lab }
    };
    reach(mesh.pod(0), mesh.pod(1));
    let node3 = &mesh.lab.nodes[2];
    mesh.lab.write_node(node3, &[]);
    let third = Agent::start(&mesh.lab, node3, &[]);
    mesh.agents.push(third);
    for other in [0, 1] {
        reach(mesh.pod(other), mesh.pod(2));
    }
    std::fs::remove_file(&late).expect("node3 leaves");
    wait_for("node3's pods are no longer reached", SOON, || {
        (!pings(mesh.pod(0), mesh.pod(2), 0, Duration::from_millis(300))).then_some(())
    });
    assert!(pings(mesh.pod(0), mesh.pod(1), 0, SOON), "the others go on");
    mesh.lab.write_node(&mesh.lab.nodes[2], &[]);
    reach(mesh.pod(1), mesh.pod(2));
}

/// Two nodes claim one range: the one that owns it keeps it, whoever comes first.
#[test]
fn a_claim_on_anothers_pods_is_refused() {
    let mesh = Mesh::start(Lab::new(3, Underlay::V4, 1500), &[]);
    let (node2, node3) = (&mesh.lab.nodes[1], &mesh.lab.nodes[2]);
    let stolen = mesh.lab.node_object(node3, &[]).replace("10.244.3.0/24", "10.244.2.0/24");
    mesh.lab.write_object("node3.yaml", &stolen);
    wait_for("the claim is reported", SOON, || {
        let log = mesh.agents[0].log();
        (log.contains("node3") && log.contains("10.244.2.0/24")).then_some(())
    });
    assert!(pings(mesh.pod(0), node2.pod(), 0, SOON), "node2 keeps its pods");
    mesh.exchange(0, 1);
}
