//! The folder of configurations: what the agent writes, what it leaves alone, and that it takes all of it back.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::runtime::{OWN, Runtime, mtu};
use crate::lab::agent::{self, Agent, READY, warren};
use crate::lab::netns::Netns;
use crate::lab::{Lab, Node, wait_for};

fn lab() -> Lab {
    let lab = Lab::two();
    lab.write_nodes();
    lab
}

fn cleanup(lab: &Lab, node: &Node) -> String {
    let output = agent::command(lab, node, &["--cleanup"]).output().expect("run the cleanup");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("read the folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn log_says(agent: &Agent, word: &str) {
    wait_for(&format!("the log says {word:?}"), READY, || agent.log().contains(word).then_some(()));
}

#[test]
fn the_list_follows_the_node_and_goes_with_a_cleanup() {
    let lab = lab();
    let node = &lab.nodes[0];
    let runtime = Runtime::new(&lab, node);
    let mut agent = runtime.agent(&lab, &[]);
    let list = runtime.configured();
    // The bridge is there before the list, with an address that no pod's interface changes.
    let address = || {
        let link = node.ns.run("ip -o link show warren-br0");
        link.split_whitespace()
            .skip_while(|word| *word != "link/ether")
            .nth(1)
            .expect("an address")
            .to_owned()
    };
    let first = address();
    assert!(first.starts_with("02:"), "{first}");
    let bridge = |list: &Value| list["plugins"][0].clone();
    assert_eq!(bridge(&list)["mtu"], json!(agent.pod_mtu()));
    // Kept: somebody removes it, or writes nonsense into it.
    fs::remove_file(runtime.conf.join(OWN)).expect("remove the list");
    assert_eq!(runtime.configured(), list);
    // Followed: the network's MTU, and another pod range.
    node.ns.run("ip link set eth0 mtu 1400");
    let smaller = runtime.wait_for_file(OWN, |list| bridge(list)["mtu"].as_u64() < Some(1400));
    assert_eq!(bridge(&smaller)["mtu"], json!(agent.pod_mtu()));
    let moved = lab.node_object(node, &[]).replace("10.244.1.0/24", "10.244.77.0/24");
    lab.write_object("node1.yaml", &moved);
    let range = |list: &Value| bridge(list)["ipam"]["ranges"][0][0]["subnet"].clone();
    runtime.wait_for_file(OWN, |list| range(list) == "10.244.77.0/24");
    let pod = Netns::new("pod");
    assert!(runtime.add(&pod).addresses()[0].to_string().starts_with("10.244.77."));
    assert_eq!(mtu(&pod, "eth0"), agent.pod_mtu());
    assert_eq!(address(), first);
    // It stays when the agent ends, and goes with the cleanup, which was not told where it is.
    agent.stop();
    assert_eq!(names(&runtime.conf), [OWN]);
    let said = cleanup(&lab, node);
    assert!(said.contains(OWN), "{said}");
    assert_eq!(names(&runtime.conf), [""; 0]);
    // The pod keeps the bridge, and its address the record that nobody else gets it.
    assert!(said.contains("kept the bridge warren-br0, on which 1 pods hang"), "{said}");
    assert_eq!(names(&runtime.run_dir), ["ipam"]);
    drop(pod);
    wait_for("the pod's interface is gone", READY, || {
        let links = node.ns.run("ip -o link show master warren-br0");
        links.trim().is_empty().then_some(())
    });
    let said = cleanup(&lab, node);
    assert!(said.contains("removed bridge warren-br0") && !said.contains(OWN), "{said}");
    assert!(!runtime.run_dir.exists(), "{:?}", names(&runtime.run_dir));
    assert!(cleanup(&lab, node).contains("nothing of Warren's was found"));
}

/// To set a bridge's address, be it to what it is, takes every neighbour off it.
#[test]
fn a_bridge_that_is_right_is_not_touched() {
    let lab = lab();
    let node = &lab.nodes[0];
    let runtime = Runtime::new(&lab, node);
    let _agent = runtime.agent(&lab, &[]);
    runtime.configured();
    // The agent looks every few seconds, at the bridge before it writes the list.
    let look = || {
        fs::remove_file(runtime.conf.join(OWN)).expect("remove the list");
        runtime.configured();
    };
    let introduce = || {
        node.ns.run("ip neigh replace 10.244.1.99 lladdr 02:00:00:00:00:99 dev warren-br0 nud permanent");
    };
    let is_known = || node.ns.run("ip neigh show dev warren-br0 nud permanent").contains("10.244.1.99");
    introduce();
    look();
    assert!(is_known(), "a look costs no neighbours");
    node.ns.run("ip link set warren-br0 down");
    look();
    assert_eq!(node.ns.run("ip link show dev warren-br0 up"), "", "somebody took it down");
    // One that is not of our making: its address is fixed, once.
    let set = || node.ns.run("cat /sys/class/net/warren-br0/addr_assign_type").trim() == "3";
    node.ns.run_all(
        "ip link delete warren-br0
         ip link add warren-br0 type bridge
         ip link set warren-br0 up",
    );
    assert!(!set());
    look();
    assert!(set(), "its address does not follow the pods' interfaces");
    introduce();
    look();
    assert!(is_known(), "and is not set again");
}

#[test]
fn a_list_of_others_gets_one_entry_and_comes_back_as_it_was() {
    let lab = lab();
    let node = &lab.nodes[0];
    let runtime = Runtime::new(&lab, node);
    let text = "{\n \"plugins\": [\n   { \"type\": \"bridge\", \"bridge\": \"cbr0\", \"isGateway\":true, \"odd\": 1.50,\n     \
                \"ipam\": {\"type\":\"host-local\", \"ranges\": [[{\"subnet\":\"10.244.1.0/24\"}],\
                [{\"subnet\":\"fd00:10:244:1::/64\"}]], \"routes\":[{\"dst\":\"0.0.0.0/0\"}]} }\n ],\n \
                \"name\": \"theirs\", \"cniVersion\": \"1.0.0\" }\n";
    runtime.write("10-theirs.conflist", text);
    let mut agent = runtime.agent(&lab, &[]);
    let list = runtime.wait_for_file("10-theirs.conflist", |list| list["plugins"][1]["type"] == "warren-cni");
    assert_eq!((&list["name"], &list["plugins"][0]["odd"]), (&json!("theirs"), &json!(1.5)));
    assert_eq!(names(&runtime.conf), ["10-theirs.conflist", "10-theirs.conflist.before-warren"]);
    let pod = Netns::new("pod");
    runtime.add_to("theirs", &pod, &json!({}));
    assert_eq!(mtu(&pod, "eth0"), agent.pod_mtu());
    // Its owner writes it again, differently.
    let other = text.replace("1.50", "2.50");
    runtime.write("10-theirs.conflist", &other);
    runtime.wait_for_file("10-theirs.conflist", |list| {
        list["plugins"][1]["type"] == "warren-cni" && list["plugins"][0]["odd"] == json!(2.5)
    });
    agent.stop();
    cleanup(&lab, node);
    assert_eq!(fs::read_to_string(runtime.conf.join("10-theirs.conflist")).expect("it is there"), other);
    assert_eq!(names(&runtime.conf), ["10-theirs.conflist"]);
}

#[test]
fn a_single_plugins_file_stays_and_a_list_with_it_comes_first() {
    let lab = lab();
    let node = &lab.nodes[0];
    let runtime = Runtime::new(&lab, node);
    let text = r#"{"cniVersion":"0.4.0","name":"single","type":"bridge","bridge":"cbr0","isGateway":true,"ipMasq":true,
                   "ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}"#;
    runtime.write("10-single.conf", text);
    let mut agent = runtime.agent(&lab, &[]);
    let list = runtime.configured();
    assert_eq!((&list["name"], &list["cniVersion"]), (&json!("single"), &json!("0.4.0")));
    let pod = Netns::new("pod");
    runtime.do_it("add", "single", &pod);
    assert_eq!(mtu(&pod, "eth0"), agent.pod_mtu());
    agent.stop();
    cleanup(&lab, node);
    assert_eq!(names(&runtime.conf), ["10-single.conf"]);
    assert_eq!(fs::read_to_string(runtime.conf.join("10-single.conf")).expect("it is there"), text);
}

#[test]
fn other_networks_are_left_alone_and_named() {
    let lab = lab();
    let node = &lab.nodes[0];
    let runtime = Runtime::new(&lab, node);
    let flannel = r#"{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel","delegate":{}}]}"#;
    runtime.write("10-flannel.conflist", flannel);
    let agent = runtime.agent(&lab, &[]);
    log_says(&agent, "10-flannel.conflist belongs to another pod network (flannel)");
    assert_eq!(names(&runtime.conf), ["10-flannel.conflist"]);
    // It goes, but its bridge is still there: a second one would have the same subnet.
    node.ns
        .run_all("ip link add cni0 type bridge\n ip addr add 10.244.1.1/24 dev cni0\n ip link set cni0 up");
    fs::remove_file(runtime.conf.join("10-flannel.conflist")).expect("remove it");
    log_says(&agent, "ip link delete cni0");
    assert_eq!(names(&runtime.conf), [""; 0]);
    node.ns.run("ip link delete cni0");
    runtime.configured();
}

#[test]
fn the_list_is_of_the_newest_version_that_all_speak() {
    let lab = lab();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let agent = runtime.agent(&lab, &[]);
    let version = |list: &Value| list["cniVersion"].as_str().map(str::to_owned);
    assert_eq!(version(&runtime.configured()).as_deref(), Some("1.1.0"));
    let real = fs::read_link(runtime.bin.join("portmap")).expect("a plugin is a link here");
    let replace = |text: &str| {
        let draft = runtime.scratch("portmap", &format!("#!/bin/sh\n{text}\n"));
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).expect("make it a program");
        fs::rename(draft, runtime.bin.join("portmap")).expect("replace the plugin");
    };
    replace(r#"echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}'"#);
    runtime.wait_for_file(OWN, |list| version(list).as_deref() == Some("1.0.0"));
    // One that says nothing, this time: the list that pods were added with stays.
    replace("kill -KILL $$");
    log_says(&agent, "the CNI plugin portmap did not say which versions of CNI it speaks");
    let mtu = |list: &Value| list["plugins"][0]["mtu"].as_u64();
    runtime.node.ns.run("ip link set eth0 mtu 1400");
    let list = runtime.wait_for_file(OWN, |list| mtu(list) < Some(1400));
    assert_eq!(version(&list).as_deref(), Some("1.0.0"));
    // And it is asked again.
    fs::remove_file(runtime.bin.join("portmap")).expect("remove it");
    symlink(real, runtime.bin.join("portmap")).expect("put the real one back");
    runtime.wait_for_file(OWN, |list| version(list).as_deref() == Some("1.1.0"));
}

#[test]
fn missing_plugins_are_named_and_taken_when_they_come() {
    let lab = lab();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let [away, back] = ["away", "bin"].map(|name| lab.path().join("node1").join(name));
    fs::create_dir(&away).expect("make a folder");
    let shift = |from: &Path, to: &Path, name: &str| {
        fs::rename(from.join(name), to.join(name)).expect("move a plugin")
    };
    ["warren-cni", "bridge", "bandwidth"].iter().for_each(|name| shift(&back, &away, name));
    let agent = runtime.agent(&lab, &[]);
    log_says(&agent, "`warren install-cni` puts it there");
    let install = |arguments: &[&str]| {
        let output = Command::new(warren())
            .arg("install-cni")
            .arg("--cni-bin-dir")
            .arg(&back)
            .args(arguments)
            .output();
        let output = output.expect("run install-cni");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let said = install(&[]);
    assert!(said.contains("installed") && said.contains("bridge, bandwidth"), "{said}");
    assert!(install(&[]).contains("up to date"));
    log_says(&agent, "CNI plugins are missing");
    shift(&away, &back, "bridge");
    let types = |list: &Value| -> Vec<String> {
        let all = list["plugins"].as_array().expect("plugins");
        all.iter().map(|plugin| plugin["type"].as_str().expect("a type").to_owned()).collect()
    };
    assert_eq!(types(&runtime.configured()), ["bridge", "portmap", "warren-cni"]);
    log_says(&agent, "bandwidth limits of pods do nothing");
    shift(&away, &back, "bandwidth");
    runtime.wait_for_file(OWN, |list| types(list).len() == 4);
    let pod = Netns::new("pod");
    runtime.add(&pod);
    assert!(install(&["--remove"]).contains("removed"));
    assert!(!back.join("warren-cni").exists());
}
