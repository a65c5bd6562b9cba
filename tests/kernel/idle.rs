//! Nodes that have spoken and now have nothing to say cost next to nothing: looking for packets ends when none come.

use std::fs;
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::lab::Lab;
use crate::lab::agent::{Agent, Mesh};
use crate::lab::traffic::pings;

/// How long nobody speaks. Shorter than what WireGuard's timers would begin again.
const SILENCE: Duration = Duration::from_secs(10);
/// Until what the traffic left behind is done: answers, flows, the agent's own news.
const CALM: Duration = Duration::from_secs(2);
/// Of one processor, in a build for debugging: three lanes with the timers of their sessions, about a quarter of
/// that; and the whole agent, which looks after the node too. A lane that does not sleep takes all it can get.
const LANES_AT_MOST: f64 = 0.01;
const AGENT_AT_MOST: f64 = 0.02;

#[test]
fn wireguard() {
    costs_nothing("wireguard");
}

#[test]
fn vxlan() {
    costs_nothing("vxlan");
}

fn costs_nothing(encap: &str) {
    let mesh = Mesh::start(Lab::two(), &["--encap", encap, "--lanes", "3"]);
    mesh.exchange(0, 1);
    std::thread::sleep(CALM);
    if encap == "wireguard" {
        assert!(mesh.agents.iter().all(|agent| sessions(agent) > 0), "no session: this shows nothing");
    }
    let before: Vec<[Duration; 2]> = mesh.agents.iter().map(used).collect();
    std::thread::sleep(SILENCE);
    for (agent, before) in mesh.agents.iter().zip(before) {
        let after = used(agent);
        let [lanes, all] = [0, 1].map(|i| (after[i] - before[i]).as_secs_f64() / SILENCE.as_secs_f64());
        println!("{encap}: {:.3} % of a processor, the lanes {:.3} %", 100.0 * all, 100.0 * lanes);
        assert!(lanes < LANES_AT_MOST, "{encap}: idle lanes use {:.2} % of a processor", 100.0 * lanes);
        assert!(all < AGENT_AT_MOST, "{encap}: an idle agent uses {:.2} % of a processor", 100.0 * all);
    }
    assert!(pings(mesh.pod(0), mesh.pod(1), 0, Duration::from_secs(1)), "they speak again at once");
}

/// Processor time until now of an agent's lanes, and of all of it.
fn used(agent: &Agent) -> [Duration; 2] {
    let threads = fs::read_dir(format!("/proc/{}/task", agent.pid())).expect("the agent's threads");
    let lanes: Duration = threads
        .map(|thread| thread.expect("a thread").path())
        .filter(|thread| fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.starts_with("lane-")))
        .map(|thread| {
            // Nanoseconds on a processor come first: Documentation/scheduler/sched-stats.rst.
            let times = fs::read_to_string(thread.join("schedstat")).expect("a lane runs until the end");
            let first = times.split(' ').next().and_then(|time| time.parse().ok());
            Duration::from_nanos(first.unwrap_or_else(|| panic!("times of a lane: {times:?}")))
        })
        .sum();
    assert!(!lanes.is_zero(), "a lane that has carried something has used time");
    let pid = Pid::from_raw(i32::try_from(agent.pid()).expect("a process id fits"));
    [lanes, clock_getcpuclockid(pid).and_then(clock_gettime).expect("the agent's clock").into()]
}

/// Sessions that the agent says are up.
fn sessions(agent: &Agent) -> u64 {
    let view = agent.status();
    let lanes = view["lanes"].as_array().expect("a list of lanes").iter();
    lanes.map(|lane| lane["sessions_established"].as_u64().expect("a count")).sum()
}
