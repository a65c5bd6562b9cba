//! One node of a mesh of 1,000 others, of which none says a word: what does its program cost?

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use crate::contestant::Contestant;
use crate::cpu;
use crate::lab::agent::{Agent, warren};
use crate::lab::peer::{INTERFACE, Program, WireGuard};
use crate::lab::{Lab, wait_for};
use crate::results::Reading;

/// Peers.
pub const PEERS: usize = 1000;
/// The first /26 of 10.244.0.0/16 that is a peer's; the node's own are before.
const FIRST: usize = 16;
/// For how many times the seconds of other measurements a program is looked at: idle ones do little at a time.
pub const TIMES: u32 = 6;
/// How long a program has to settle after it knows all peers.
const SETTLE: Duration = Duration::from_secs(5);

/// Whether a contestant has a program that knows peers: the kernel has none, flannel-udp is given one only, and
/// further lanes hold no peers of their own.
pub fn is_measured(contestant: Contestant) -> bool {
    carrier(contestant).is_some()
}

/// What is started.
enum Carrier {
    WireGuard(Program),
    Agent(&'static str),
}

fn carrier(contestant: Contestant) -> Option<Carrier> {
    match contestant {
        Contestant::Bare
        | Contestant::KernelVxlan
        | Contestant::FlannelUdp
        | Contestant::WarrenWireguard2
        | Contestant::WarrenVxlan2 => None,
        Contestant::WireguardGo => Some(Carrier::WireGuard(Program::WireguardGo)),
        Contestant::Gotatun => Some(Carrier::WireGuard(Program::Gotatun)),
        Contestant::Boringtun => Some(Carrier::WireGuard(Program::Boringtun)),
        Contestant::WarrenWireguard => Some(Carrier::Agent("wireguard")),
        Contestant::WarrenVxlan => Some(Carrier::Agent("vxlan")),
    }
}

/// MiB of memory and percent of one processor, over so many seconds.
pub fn measure(contestant: Contestant, lanes: &str, seconds: u32) -> Result<Vec<Option<Reading>>, String> {
    let lab = Lab::cable(1500);
    match carrier(contestant).ok_or("has no program that knows peers")? {
        Carrier::WireGuard(program) => wireguard(&lab, program, seconds),
        Carrier::Agent(encap) => agent(&lab, encap, lanes, seconds),
    }
}

fn agent(lab: &Lab, encap: &str, lanes: &str, seconds: u32) -> Result<Vec<Option<Reading>>, String> {
    let node = &lab.nodes[0];
    lab.write_node(node, &[]);
    for number in 0..PEERS {
        lab.write_object(&format!("peer{number}.yaml"), &object(number));
    }
    let agent = Agent::start(lab, node, &["--encap", encap, "--lanes", lanes]);
    let run = agent.folder().join("run").display().to_string();
    wait_for("the agent knows all peers", Duration::from_secs(20), || {
        let listed = node.ns.run(&format!("{} peers --run-dir {run}", warren()));
        (listed.lines().filter(|line| line.contains("peer")).count() >= PEERS).then_some(())
    });
    watch(agent.pid(), seconds)
}

/// One Node as an agent there would have announced itself.
fn object(number: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: peer{number}\n  annotations:\n    \
         warren.dev/protocol: \"1\"\n    warren.dev/lanes: \"{}:51820\"\n    \
         warren.dev/endpoints: \"{address}:51820\"\n    warren.dev/encaps: \"wireguard,vxlan\"\n    \
         warren.dev/vxlan-mac: \"02:00:00:00:{:02x}:{:02x}\"\nspec:\n  podCIDR: {pods}\n  podCIDRs:\n  - {pods}\n\
         status:\n  addresses:\n  - type: InternalIP\n    address: {address}\n",
        key(number),
        number >> 8,
        number & 255,
        address = address(number),
        pods = pods(number),
    )
}

fn wireguard(lab: &Lab, program: Program, seconds: u32) -> Result<Vec<Option<Reading>>, String> {
    let node = &lab.nodes[0];
    let running = WireGuard::start_quietly(lab, node, program);
    let mut peers = String::new();
    for number in 0..PEERS {
        let (key, address, pods) = (key(number), address(number), pods(number));
        let _ = writeln!(peers, "[Peer]\nPublicKey = {key}\nEndpoint = {address}:51820\nAllowedIPs = {pods}");
    }
    let file = lab.path().join("peers.conf");
    fs::write(&file, peers).expect("write the peers");
    node.ns.run(&format!("wg addconf {INTERFACE} {}", file.display()));
    let known = node.ns.run(&format!("wg show {INTERFACE} peers")).lines().count();
    assert_eq!(known, PEERS);
    watch(running.pid(), seconds)
}

fn watch(pid: u32, seconds: u32) -> Result<Vec<Option<Reading>>, String> {
    std::thread::sleep(SETTLE);
    let before = cpu::of(pid);
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let used = cpu::of(pid).saturating_sub(before).as_secs_f64();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(|e| e.to_string())?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: Option<f64> = resident.and_then(|text| text.split_whitespace().next()?.parse().ok());
    let mib = kib.ok_or("no VmRSS")? / 1024.0;
    Ok(vec![Some(mib.into()), Some((used / f64::from(seconds) * 100.0).into())])
}

/// Any 32 bytes are a public key.
fn key(number: usize) -> String {
    use base64::Engine as _;
    let mut key = [7; 32];
    key[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    base64::engine::general_purpose::STANDARD.encode(key)
}

fn address(number: usize) -> String {
    format!("10.98.{}.{}", number / 250, number % 250 + 1)
}

fn pods(number: usize) -> String {
    let at = (FIRST + number) * 64;
    format!("10.244.{}.{}/26", at >> 8, at & 255)
}
