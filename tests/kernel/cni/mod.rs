//! Pods as a container runtime makes them: the real `bridge`, `ptp`, `host-local`, `portmap` and `bandwidth`,
//! `warren-cni` after them, and libcni's own `cnitool`.

mod folder;
mod input;
mod runtime;
mod trouble;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use warren::io::clock;

use crate::lab::netns::Netns;
use crate::lab::service::{BOTH, TARGET, Who, ask};
use crate::lab::traffic::{Echo, exchange, reach, tcp_bulk};
use crate::lab::{Lab, Underlay, wait_for};
use runtime::{Runtime, mtu, namespace};

/// Long enough for the first try of a session.
const SOON: Duration = Duration::from_secs(10);

#[test]
fn pods_of_two_nodes_reach_each_other_with_the_right_mtu() {
    for (encap, underlay) in [("wireguard", Underlay::V4), ("vxlan", Underlay::V6)] {
        let lab = Lab::new(2, underlay, 1500);
        lab.write_nodes();
        let runtimes: Vec<Runtime<'_>> = lab.nodes.iter().map(|node| Runtime::new(&lab, node)).collect();
        let agents: Vec<_> =
            runtimes.iter().map(|runtime| runtime.agent(&lab, &["--encap", encap])).collect();
        let pods = ["a", "b"].map(Netns::new);
        let mut added = Vec::new();
        for ((runtime, agent), pod) in runtimes.iter().zip(&agents).zip(&pods) {
            let list = runtime.configured();
            assert_eq!(list["cniVersion"], "1.1.0", "the newest that all of these plugins speak");
            let this = runtime.add(pod);
            let expected = agent.pod_mtu();
            assert_eq!([mtu(pod, "eth0"), mtu(&runtime.node.ns, this.veth())], [expected; 2]);
            assert_eq!(
                (&this.interface(true)["mtu"], &this.interface(false)["mtu"]),
                (&json!(expected), &json!(expected))
            );
            assert_eq!(mtu(&runtime.node.ns, "warren-br0"), expected);
            added.push(this);
        }
        let [a, b] = [added[0].station(&pods[0]), added[1].station(&pods[1])];
        reach(a, b);
        exchange(a, b);
        for (runtime, pod) in runtimes.iter().zip(&pods) {
            runtime.do_it("status", "warren", pod);
            runtime.do_it("check", "warren", pod);
            runtime.do_it("del", "warren", pod);
            runtime.do_it("del", "warren", pod);
            let left = runtime.node.ns.run("ip -o link show type veth");
            assert!(!left.contains("warren-br0"), "{left}");
        }
    }
}

/// A list of others, in every version that has chains.
#[test]
fn every_version_and_both_kinds_of_networks() {
    let lab = Lab::two();
    lab.write_nodes();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let agent = runtime.agent_without_list(&lab);
    let expected = agent.pod_mtu();
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        for kind in ["bridge", "ptp"] {
            let name = format!("{kind}-{version}");
            runtime.write("10-other.conflist", &other(&runtime, &name, version, kind, &json!({})));
            let pod = Netns::new(&name);
            let added = runtime.add_to(&name, &pod, &json!({}));
            assert_eq!(added.result["cniVersion"], version);
            assert_eq!([mtu(&pod, "eth0"), mtu(&runtime.node.ns, added.veth())], [expected; 2], "{name}");
            let says = added.interface(true).get("mtu").cloned();
            assert_eq!(says, (version == "1.1.0").then(|| json!(expected)), "{name}");
            // Whoever checks finds what was added; before 0.4.0 nobody can.
            let checked = runtime.attempt("check", &name, &pod);
            assert_eq!(checked.is_ok(), !version.starts_with("0.3"), "{name}: {checked:?}");
            runtime.do_it("del", &name, &pod);
            runtime.node.ns.attempt("ip link del cbr0");
        }
    }
}

#[test]
fn a_bridge_that_is_not_the_gateway_is_refused() {
    let lab = Lab::two();
    lab.write_nodes();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let _agent = runtime.agent_without_list(&lab);
    let pod = Netns::new("pod");
    runtime
        .write("10-other.conflist", &other(&runtime, "x", "1.0.0", "bridge", &json!({ "isGateway": false })));
    let said = runtime.attempt("add", "x", &pod).expect_err("refused");
    assert!(said.contains("isGateway") && said.contains("10.244.1.1"), "{said}");
    runtime.do_it("del", "x", &pod);

    // Addresses that no other node looks for here.
    let foreign = json!({ "isGateway": true, "bridge": "cbr1", "ipam": { "type": "host-local", "subnet": "10.88.0.0/16" } });
    runtime.write("10-other.conflist", &other(&runtime, "y", "1.0.0", "bridge", &foreign));
    let said = runtime.attempt("add", "y", &pod).expect_err("refused");
    assert!(said.contains("10.88.0.2") && said.contains("10.244.1.0/24"), "{said}");
}

#[test]
fn host_ports_bandwidth_and_one_localhost_for_all_containers() {
    let lab = Lab::two();
    lab.write_nodes();
    let runtimes: Vec<Runtime<'_>> = lab.nodes.iter().map(|node| Runtime::new(&lab, node)).collect();
    let _agents: Vec<_> = runtimes.iter().map(|runtime| runtime.agent(&lab, &[])).collect();
    runtimes.iter().for_each(|runtime| drop(runtime.configured()));
    let [open, slow, client] = ["open", "slow", "client"].map(Netns::new);
    // 8 Mbit/s are 1 MB/s.
    let limit = json!({ "ingressRate": 8_000_000, "ingressBurst": 800_000 });
    let ports = |protocol: &str| json!({ "hostPort": 18080, "containerPort": TARGET, "protocol": protocol });
    let of_open =
        runtimes[0].add_to("warren", &open, &json!({ "portMappings": [ports("tcp"), ports("udp")] }));
    let of_slow = runtimes[0].add_to("warren", &slow, &json!({ "bandwidth": limit }));
    let of_client = runtimes[1].add(&client);
    let from = of_client.station(&client);
    reach(from, of_open.station(&open));
    reach(from, of_slow.station(&slow));

    // hostPort: from outside, from the other node, and from its pods.
    let server = Who::start("open", &open, &of_open.addresses());
    let port = SocketAddr::new(lab.outer(&lab.nodes[0]), 18080);
    for (name, ns) in
        [("outside", &lab.switch), ("the other node", &lab.nodes[1].ns), ("a pod there", &client)]
    {
        for over in BOTH {
            let answer = wait_for(&format!("{name} reaches the hostPort over {over:?}"), SOON, || {
                ask(ns, None, port, over, 100).ok()
            });
            assert_eq!(answer.server, "open");
        }
    }
    drop(server);
    runtimes[0].do_it("del", "warren", &open);
    let gone = ask(&lab.switch, None, port, BOTH[0], 1);
    assert!(gone.is_err(), "the port goes with the pod: {gone:?}");

    // The limit holds into the pod, and only there.
    let seconds = |to: &runtime::Added, ns: &Netns| {
        let echo = Echo::start(to.station(ns));
        let before = clock::now();
        tcp_bulk(from.ns, from.addresses[0], SocketAddr::new(to.addresses()[0], echo.port), 4 << 20);
        clock::now().duration_since(before).as_secs_f64()
    };
    let took = seconds(&of_slow, &slow);
    // 4 MiB at 1 MB/s, of which 0.1 MB may come at once.
    assert!((3.0..30.0).contains(&took), "4 MiB at 8 Mbit/s took {took} s");

    // Two containers of a pod are two processes in its namespace.
    let loopback: [IpAddr; 2] = [[127, 0, 0, 1].into(), "::1".parse().expect("an address")];
    let _other_container = Who::start_at(7070, "sidecar", &slow, &loopback);
    for address in loopback {
        let answer =
            ask(&slow, None, SocketAddr::new(address, 7070), BOTH[0], 10).expect("localhost is shared");
        assert_eq!(answer.server, "sidecar");
        assert!(ask(&client, None, SocketAddr::new(address, 7070), BOTH[0], 10).is_err(), "by one pod only");
    }
}

/// The cost is what `warren-cni` itself uses, start of the program included.
#[test]
fn twenty_pods_at_once_cost_little() {
    const PODS: usize = 20;
    let lab = Lab::two();
    lab.write_nodes();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let agent = runtime.agent(&lab, &[]);
    runtime.configured();
    // Where several make the bridge, the `bridge` plugin returns a MAC that it has for a moment only, and its own CHECK
    // then finds another one.
    let first = Netns::new("first");
    runtime.add(&first);
    let pods: Vec<Netns> = (0..PODS).map(|i| Netns::new(&format!("pod{i}"))).collect();
    let added: Vec<runtime::Added> = std::thread::scope(|scope| {
        let all: Vec<_> = pods.iter().map(|pod| scope.spawn(|| runtime.add(pod))).collect();
        all.into_iter().map(|one| one.join().expect("the pod was added")).collect()
    });
    let addresses: std::collections::BTreeSet<IpAddr> =
        added.iter().flat_map(|pod| pod.addresses()).collect();
    assert_eq!(addresses.len(), 2 * PODS);
    for (pod, this) in pods.iter().zip(&added) {
        assert_eq!([mtu(pod, "eth0"), mtu(&runtime.node.ns, this.veth())], [agent.pod_mtu(); 2]);
        runtime.do_it("check", "warren", pod);
    }

    // Once more, by itself, with both ends wrong so that there is something to do.
    let mut script = String::new();
    for (number, (pod, this)) in pods.iter().zip(&added).enumerate() {
        pod.run("ip link set eth0 mtu 1300");
        runtime.node.ns.run(&format!("ip link set {} mtu 1300", this.veth()));
        let input =
            runtime.scratch(&format!("in{number}"), &runtime.input("1.1.0", &this.result).to_string());
        script += &format!(
            "CNI_COMMAND=ADD CNI_CONTAINERID=c{number} CNI_IFNAME=eth0 CNI_NETNS={} {} <{} >{}.out &\n",
            namespace(pod),
            runtime.bin.join("warren-cni").display(),
            input.display(),
            input.display(),
        );
    }
    script += "wait\ntimes\n";
    let script = runtime.scratch("script", &script);
    let times = runtime.node.ns.run(&format!("bash {}", script.display()));
    for (pod, this) in pods.iter().zip(&added) {
        assert_eq!([mtu(pod, "eth0"), mtu(&runtime.node.ns, this.veth())], [agent.pod_mtu(); 2]);
    }
    // Two lines of user and system time, of the shell and of its children: 0m0.010s 0m0.023s.
    let seconds = |text: &str| {
        let (minutes, seconds) = text.trim_end_matches('s').split_once('m').expect("minutes and seconds");
        minutes.parse::<f64>().expect("minutes") * 60.0 + seconds.parse::<f64>().expect("seconds")
    };
    let children = times.lines().nth(1).expect("a line for the children");
    let each = children.split_whitespace().map(seconds).sum::<f64>() / PODS as f64;
    eprintln!("{:.1} ms of processor time each, {PODS} at once", each * 1000.0);
    // A build for debugging, ten times as large, takes twice as long to start as a shipped one takes in all.
    let bound = if std::env::var_os("WARREN").is_none() && cfg!(debug_assertions) { 0.020 } else { 0.010 };
    assert!(each < bound, "{each} s of processor time each: {times}");
}

/// A list of somebody else with `warren-cni` at its end.
fn other(runtime: &Runtime<'_>, name: &str, version: &str, kind: &str, more: &Value) -> String {
    let mut first = json!({
        "type": kind,
        "isGateway": true,
        "ipam": {
            "type": "host-local",
            "ranges": [[{ "subnet": "10.244.1.0/24" }], [{ "subnet": "fd00:10:244:1::/64" }]],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        },
    });
    if kind == "bridge" {
        first["bridge"] = "cbr0".into();
    }
    for (key, value) in more.as_object().expect("an object") {
        first[key] = value.clone();
    }
    let last = json!({ "type": "warren-cni", "runDir": runtime.run_dir.display().to_string() });
    json!({ "cniVersion": version, "name": name, "plugins": [first, last] }).to_string()
}
