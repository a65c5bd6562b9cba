//! A container runtime as far as CNI is concerned: folders of plugins and configurations on a node, libcni's own
//! `cnitool` that runs the chain, and single calls of `warren-cni` as libcni would make them.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::lab::agent::{Agent, READY, warren};
use crate::lab::netns::Netns;
use crate::lab::peer::binary;
use crate::lab::{Lab, Node, Station, wait_for};

/// The file that the agent writes.
pub(super) const OWN: &str = "05-warren.conflist";

/// One node's runtime.
pub(super) struct Runtime<'a> {
    pub(super) node: &'a Node,
    /// Where configurations are.
    pub(super) conf: PathBuf,
    /// Where plugins are.
    pub(super) bin: PathBuf,
    /// The agent's run directory.
    pub(super) run_dir: PathBuf,
    cache: PathBuf,
}

impl<'a> Runtime<'a> {
    /// With all plugins installed and no configuration.
    pub(super) fn new(lab: &Lab, node: &'a Node) -> Runtime<'a> {
        let folder = lab.path().join(&node.name);
        let [conf, bin, cache] = ["net.d", "bin", "cache"].map(|name| folder.join(name));
        for made in [&conf, &bin, &cache] {
            fs::create_dir_all(made).expect("make the runtime's folders");
        }
        for plugin in ["bridge", "ptp", "host-local", "portmap", "bandwidth", "loopback"] {
            symlink(binary(&format!("cni/{plugin}")), bin.join(plugin)).expect("install a plugin");
        }
        symlink(warren(), bin.join("warren-cni")).expect("install warren-cni");
        // libcni and host-local keep what they know in there, and it is the machine's own.
        node.ns.run("mount -t tmpfs tmpfs /var/lib");
        Runtime { node, conf, bin, run_dir: folder.join("run"), cache }
    }

    /// The agent's flags for these folders.
    pub(super) fn flags(&self) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        [("--cni-conf-dir", path(&self.conf)), ("--cni-bin-dir", path(&self.bin))]
            .into_iter()
            .flat_map(|(flag, value)| [flag.to_owned(), value])
            .collect()
    }

    /// Starts the node's agent with these folders.
    pub(super) fn agent(&self, lab: &Lab, more: &[&str]) -> Agent {
        let flags = self.flags();
        let all: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Agent::start(lab, self.node, &all)
    }

    /// Starts it without: lists are written by hand.
    pub(super) fn agent_without_list(&self, lab: &Lab) -> Agent {
        Agent::start(lab, self.node, &[])
    }

    /// Waits for the agent's configuration.
    pub(super) fn configured(&self) -> Value {
        self.wait_for_file(OWN, |_| true)
    }

    /// Waits for a configuration that is as it should be.
    pub(super) fn wait_for_file(&self, name: &str, good: impl Fn(&Value) -> bool) -> Value {
        wait_for(&format!("{name} is as it should be"), READY, || {
            let list: Value = serde_json::from_str(&fs::read_to_string(self.conf.join(name)).ok()?).ok()?;
            good(&list).then_some(list)
        })
    }

    /// Writes a configuration as a person would.
    pub(super) fn write(&self, name: &str, text: &str) {
        fs::write(self.conf.join(name), text).expect("write a configuration");
    }

    /// libcni's tool.
    pub(super) fn cnitool(&self, verb: &str, network: &str, pod: &Netns, capabilities: &Value) -> Command {
        let mut command = self.node.ns.command(binary("cnitool"));
        command
            .args([verb, network, &namespace(pod)])
            .env("CNI_PATH", &self.bin)
            .env("NETCONFPATH", &self.conf)
            .env("CAP_ARGS", capabilities.to_string());
        command
    }

    /// Runs it; what it printed, or what was wrong.
    pub(super) fn attempt(&self, verb: &str, network: &str, pod: &Netns) -> Result<String, String> {
        said(self.cnitool(verb, network, pod, &json!({})).output().expect("run cnitool"))
    }

    /// Runs it; it must succeed.
    pub(super) fn do_it(&self, verb: &str, network: &str, pod: &Netns) -> String {
        let done = self.attempt(verb, network, pod);
        done.unwrap_or_else(|error| panic!("{verb} of {} on {}: {error}", pod.name(), self.node.name))
    }

    /// Adds a pod to the agent's network.
    pub(super) fn add(&self, pod: &Netns) -> Added {
        self.add_to("warren", pod, &json!({}))
    }

    pub(super) fn add_to(&self, network: &str, pod: &Netns, capabilities: &Value) -> Added {
        let output = self.cnitool("add", network, pod, capabilities).output().expect("run cnitool");
        let text = said(output).unwrap_or_else(|error| panic!("add {}: {error}", pod.name()));
        Added { result: serde_json::from_str(&text).expect("a result is JSON") }
    }

    /// One call of `warren-cni` alone.
    pub(super) fn call(&self, verb: &str, pod: &Netns, input: &Value) -> Output {
        self.call_with(verb, &[("CNI_NETNS", &namespace(pod))], input.to_string().as_bytes())
    }

    /// The same with any environment and any bytes.
    pub(super) fn call_with(&self, verb: &str, environment: &[(&str, &str)], input: &[u8]) -> Output {
        let mut command = self.node.ns.command(self.bin.join("warren-cni"));
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", "c1").env("CNI_IFNAME", "eth0");
        command.envs(environment.iter().copied());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start warren-cni");
        // It may answer without reading all.
        let _ = child.stdin.take().expect("stdin is piped").write_all(input);
        child.wait_with_output().expect("wait for warren-cni")
    }

    /// The input of a single call.
    pub(super) fn input(&self, version: &str, previous: &Value) -> Value {
        let run_dir = self.run_dir.display().to_string();
        json!({ "cniVersion": version, "name": "warren", "type": "warren-cni", "runDir": run_dir, "prevResult": previous })
    }

    /// A file for a script.
    pub(super) fn scratch(&self, name: &str, text: &str) -> PathBuf {
        let path = self.cache.join(name);
        fs::write(&path, text).expect("write a scratch file");
        path
    }
}

/// A pod that was added.
pub(super) struct Added {
    /// What the chain returned.
    pub(super) result: Value,
}

impl Added {
    /// Its addresses, IPv4 first.
    pub(super) fn addresses(&self) -> [IpAddr; 2] {
        let of = |v4: bool| {
            let all = self.result["ips"].as_array().expect("addresses");
            let texts = all.iter().filter_map(|ip| ip["address"].as_str());
            let mut parsed = texts.map(|text| text.split('/').next().unwrap_or_default().parse::<IpAddr>());
            parsed.find_map(|ip| ip.ok().filter(|ip| ip.is_ipv4() == v4)).expect("an address of each family")
        };
        [of(true), of(false)]
    }

    /// Where its traffic is made.
    pub(super) fn station<'a>(&self, pod: &'a Netns) -> Station<'a> {
        Station { ns: pod, addresses: self.addresses() }
    }

    /// An interface of the result: the pod's, or the other end of its veth pair.
    pub(super) fn interface(&self, inside: bool) -> &Value {
        let all = self.result["interfaces"].as_array().expect("interfaces");
        let wanted = |entry: &&Value| {
            let name = entry["name"].as_str().unwrap_or_default();
            entry["sandbox"].as_str().is_some_and(|s| !s.is_empty()) == inside
                && (inside || name.starts_with("veth"))
        };
        all.iter().find(wanted).expect("both ends are in the result")
    }

    /// The name of the end on the node.
    pub(super) fn veth(&self) -> &str {
        self.interface(false)["name"].as_str().expect("a name")
    }
}

/// A pod's namespace as a runtime names it.
pub(super) fn namespace(pod: &Netns) -> String {
    format!("/proc/{}/ns/net", pod.pid())
}

/// The MTU of an interface.
pub(super) fn mtu(ns: &Netns, name: &str) -> u32 {
    let line = ns.run(&format!("ip -o link show dev {name}"));
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "mtu").expect("ip shows the MTU");
    words[at + 1].parse().expect("an MTU is a number")
}

/// The error object of a call that failed: its code, and all that it says.
pub(super) fn refused(output: &Output) -> (u64, String) {
    let text = String::from_utf8_lossy(&output.stdout);
    let error: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (error["code"].as_u64().expect("a code"), error.to_string())
}

fn said(output: Output) -> Result<String, String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(text),
        false => Err(text + &String::from_utf8_lossy(&output.stderr)),
    }
}
