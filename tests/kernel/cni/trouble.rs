//! Agents that are not there, plugins that are killed, and pods that somebody has changed.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};
use warren::io::clock;

use super::runtime::{Runtime, refused};
use crate::lab::agent::Agent;
use crate::lab::netns::Netns;
use crate::lab::{Lab, wait_for};

#[test]
fn status_and_add_follow_the_data_path() {
    let lab = Lab::two();
    lab.write_nodes();
    let node = &lab.nodes[0];
    let runtime = Runtime::new(&lab, node);
    let pod = Netns::new("pod");
    let asked = runtime.input("1.1.0", &Value::Null);
    let status = || runtime.call("STATUS", &pod, &asked);

    assert_eq!(refused(&status()).0, 50, "never ready since the machine was started");
    let mut agent = runtime.agent(&lab, &[]);
    runtime.configured();
    assert!(status().status.success());
    let added = runtime.add(&pod);

    // An agent that is killed, or stopped, for a moment: nobody notices, and pods are added all the same.
    for stop in [Agent::kill, |agent: &mut Agent| assert!(agent.stop().success())] {
        stop(&mut agent);
        assert!(status().status.success(), "a restart is not seen");
        let other = Netns::new("other");
        runtime.add(&other);
        runtime.do_it("check", "warren", &other);
        runtime.do_it("del", "warren", &other);
        agent.restart(&lab, node);
        assert!(status().status.success());
    }

    // Dead for longer: as if it were half a minute ago.
    agent.kill();
    let word = runtime.run_dir.join("data-path.json");
    let alive = fs::read_to_string(&word).expect("the agent's word stays");
    let mut dead: Value = serde_json::from_str(&alive).expect("it is JSON");
    let then = dead["alive_ms"].as_u64().expect("a time").saturating_sub(31_000);
    dead["alive_ms"] = then.into();
    fs::write(&word, dead.to_string()).expect("age it");
    assert_eq!(refused(&status()).0, 51);
    let input = runtime.input("1.1.0", &added.result);
    let before = clock::now();
    let (code, said) = refused(&runtime.call("ADD", &pod, &input));
    let waited = clock::now().duration_since(before);
    assert_eq!(code, 11, "{said}");
    assert!(
        (Duration::from_secs(9)..Duration::from_secs(20)).contains(&waited),
        "it waits first: {waited:?}"
    );
    assert_eq!(refused(&runtime.call("CHECK", &pod, &input)).0, 11);

    // One that comes back while ADD waits.
    std::thread::scope(|scope| {
        let adding = scope.spawn(|| runtime.call("ADD", &pod, &input));
        agent.restart(&lab, node);
        let output = adding.join().expect("ADD ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    });
    assert!(status().status.success());
}

#[test]
fn check_finds_what_is_different() {
    let lab = Lab::two();
    lab.write_nodes();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let agent = runtime.agent(&lab, &[]);
    runtime.configured();
    let pod = Netns::new("pod");
    let added = runtime.add(&pod);
    let veth = added.veth();
    let good = agent.pod_mtu();
    let [v4, v6] = added.addresses();
    let host = &runtime.node.ns;
    for version in ["1.1.0", "1.0.0", "0.4.0"] {
        let mut result = added.result.clone();
        for entry in result["interfaces"].as_array_mut().expect("interfaces") {
            if version != "1.1.0" {
                entry.as_object_mut().expect("an object").remove("mtu");
            }
        }
        let input = runtime.input(version, &result);
        let check = || runtime.call("CHECK", &pod, &input);
        assert!(check().status.success(), "{version}: {:?}", check());
        let changes = [
            (&pod, "ip link set eth0 mtu 1300".to_owned(), format!("ip link set eth0 mtu {good}"), "1300"),
            (host, format!("ip link set {veth} mtu 1300"), format!("ip link set {veth} mtu {good}"), "1300"),
            (
                &pod,
                format!("ip addr del {v4}/24 dev eth0"),
                format!("ip addr add {v4}/24 dev eth0"),
                "has no",
            ),
            (
                &pod,
                format!("ip addr del {v6}/64 dev eth0"),
                format!("ip addr add {v6}/64 dev eth0 nodad"),
                "has no",
            ),
            (host, format!("ip link set {veth} down"), format!("ip link set {veth} up"), "is down"),
        ];
        for (ns, breaks, heals, word) in changes {
            ns.run(&breaks);
            let (code, said) = refused(&check());
            assert!(code == 100 && said.contains(word), "{version}, {breaks}: {said}");
            ns.run(&heals);
            assert!(check().status.success(), "{version}, {heals}: {:?}", check());
        }
        // Larger than what fits through is told in every version.
        pod.run("ip link set eth0 mtu 1500");
        host.run(&format!("ip link set {veth} mtu 1500"));
        assert_eq!(refused(&check()).0, 100, "{version}");
        pod.run(&format!("ip link set eth0 mtu {good}"));
        host.run(&format!("ip link set {veth} mtu {good}"));
    }
    // The gateway's address, and another pod's result.
    host.run("ip addr del 10.244.1.1/24 dev warren-br0");
    assert_eq!(refused(&runtime.call("CHECK", &pod, &runtime.input("1.1.0", &added.result))).0, 7);
    host.run("ip addr add 10.244.1.1/24 dev warren-br0");
    let stranger = Netns::new("stranger");
    assert_eq!(refused(&runtime.call("CHECK", &stranger, &runtime.input("1.1.0", &added.result))).0, 100);
}

/// Whatever was killed when: the next call puts it right, and no address is lost.
#[test]
fn a_chain_that_is_killed_is_put_right_by_the_next_call() {
    let lab = Lab::two();
    lab.write_nodes();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let agent = runtime.agent(&lab, &[]);
    runtime.configured();
    let pod = Netns::new("pod");
    for step in 0..24_u64 {
        // cnitool is the group's first; its plugins die with it, at a moment that moves.
        let mut command = runtime.cnitool("add", "warren", &pod, &json!({}));
        let mut child = command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("start cnitool");
        std::thread::sleep(Duration::from_millis(step * 8));
        kill_with_children(child.id());
        let _ = child.wait();
        runtime.do_it("del", "warren", &pod);
        assert!(!pod.attempt("ip link show eth0").status.success(), "step {step}: the interface is gone");
    }
    let added = runtime.add(&pod);
    runtime.do_it("check", "warren", &pod);
    // Our own part, alone.
    let input = runtime.input("1.1.0", &added.result).to_string();
    let veth = added.veth();
    for step in 0..16_u64 {
        pod.run("ip link set eth0 mtu 1300");
        runtime.node.ns.run(&format!("ip link set {veth} mtu 1300"));
        let file = runtime.scratch("input", &input);
        let line = format!(
            "CNI_COMMAND=ADD CNI_CONTAINERID=c CNI_IFNAME=eth0 CNI_NETNS={} timeout -s KILL 0.{step:03} {} <{}",
            super::namespace(&pod),
            runtime.bin.join("warren-cni").display(),
            file.display(),
        );
        let script = runtime.scratch("script", &line);
        let _ = runtime.node.ns.attempt(&format!("sh {}", script.display()));
        let again = runtime.call("ADD", &pod, &runtime.input("1.1.0", &added.result));
        assert!(again.status.success(), "{again:?}");
        assert_eq!(super::mtu(&pod, "eth0"), agent.pod_mtu());
        runtime.do_it("check", "warren", &pod);
    }
    runtime.do_it("del", "warren", &pod);
    let kept = fs::read_dir(runtime.run_dir.join("ipam/warren")).expect("the IPAM plugin's folder");
    let kept: Vec<_> = kept.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    assert!(!kept.iter().any(|name| name.starts_with("10.244.") || name.starts_with("fd00")), "{kept:?}");
}

/// GC takes what no container has any more, and leaves the others alone.
#[test]
fn garbage_is_collected() {
    let lab = Lab::two();
    lab.write_nodes();
    let runtime = Runtime::new(&lab, &lab.nodes[0]);
    let _agent = runtime.agent(&lab, &[]);
    runtime.configured();
    let pods = ["a", "b"].map(Netns::new);
    pods.iter().for_each(|pod| drop(runtime.add(pod)));
    // The runtime of the tool knows of no container at all.
    runtime.do_it("gc", "warren", &pods[0]);
    runtime.do_it("gc", "warren", &pods[0]);
    for pod in &pods {
        wait_for("the interface is gone", Duration::from_secs(5), || {
            (!pod.attempt("ip link show eth0").status.success()).then_some(())
        });
        runtime.add(pod);
        runtime.do_it("check", "warren", pod);
    }
}

/// Kills a process and what it has started, the children first stopped so that none gets away.
fn kill_with_children(pid: u32) {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    let send = |pid: u32, signal| {
        let _ = kill(Pid::from_raw(i32::try_from(pid).expect("a process id fits")), signal);
    };
    send(pid, Signal::SIGSTOP);
    let path = format!("/proc/{pid}/task/{pid}/children");
    // Threads of a Go program start children too.
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> = lists
        .chain(fs::read_to_string(path))
        .flat_map(|list| list.split_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<u32>>())
        .collect();
    children.into_iter().for_each(|child| {
        if child != pid {
            kill_with_children(child);
        }
    });
    send(pid, Signal::SIGKILL);
}
