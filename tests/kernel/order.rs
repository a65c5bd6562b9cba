//! Packets of one flow come out of the tunnel in the order in which they went in, whatever the lanes do: numbered
//! datagrams both ways, alone and many to a segmented send, as fast as the machine can. With several lanes each flow
//! keeps its lane, whenever answers come and however long they stay away.
//!
//! ```text
//! tests/run bulk      # 10 GB each, in a release build
//! ```

use std::io::IoSlice;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use warren::io::clock;

use crate::interop::lane_zero;
use crate::lab::agent::{Agent, Mesh};
use crate::lab::peer::{PORT, Program, WireGuard};
use crate::lab::traffic::{is_timeout, reach, udp_socket};
use crate::lab::{Lab, Station, wait_for};

/// Flows, of each family as many.
const FLOWS: usize = 24;
/// Of a datagram; fits every path here.
const PAYLOAD: usize = 1200;
/// Datagrams of one segmented send.
const SEGMENTS: usize = 16;
/// Nothing may come for so long before a flow counts as dead.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often a flow to which nothing comes looks whether all is over.
const GLANCE: Duration = Duration::from_millis(100);
/// Longer than the kernel remembers the queue on which a flow was last written (TUN_FLOW_EXPIRE in drivers/net/tun.c,
/// and a second until it looks).
const FORGOTTEN: Duration = Duration::from_secs(5);
/// Some times that.
const LONG: Duration = Duration::from_secs(16);
/// Datagrams of a burst, and after how many of them it is answered for the first time.
const BURST: u64 = 1000;
const MIDDLE: u64 = 300;
/// How many times all flows are new.
const BURSTS: usize = 5;
/// Datagrams that show on which lane a flow is.
const SHOWN: u64 = 50;

#[test]
fn wireguard() {
    keeps_order("wireguard", ["1", "1"]);
}

#[test]
fn wireguard_on_several_lanes() {
    keeps_order("wireguard", ["2", "3"]);
}

#[test]
fn vxlan() {
    keeps_order("vxlan", ["1", "1"]);
}

#[test]
fn vxlan_on_several_lanes() {
    keeps_order("vxlan", ["3", "2"]);
}

#[test]
fn wireguard_with_rare_answers() {
    keeps_order_with_rare_answers("wireguard", ["2", "3"]);
}

#[test]
fn vxlan_with_rare_answers() {
    keeps_order_with_rare_answers("vxlan", ["3", "2"]);
}

#[test]
fn wireguard_with_answers_in_the_middle_of_bursts() {
    keeps_order_with_late_answers("wireguard", ["2", "3"]);
}

#[test]
fn vxlan_with_answers_in_the_middle_of_bursts() {
    keeps_order_with_late_answers("vxlan", ["3", "2"]);
}

#[test]
fn wireguard_flows_keep_their_lanes() {
    let mesh = several_lanes("wireguard", ["3", "2"]);
    keeps_lanes(&mesh.agents[0], mesh.pod(0), mesh.pod(1));
}

#[test]
fn vxlan_flows_keep_their_lanes() {
    let mesh = several_lanes("vxlan", ["3", "2"]);
    keeps_lanes(&mesh.agents[0], mesh.pod(0), mesh.pod(1));
}

/// The other program knows one key: what other lanes have for it they hand over to lane 0.
#[test]
fn to_an_ordinary_peer_from_several_lanes() {
    let ordinary = Ordinary::start();
    let (pod, host) = ordinary.ends();
    let ends = flows(pod, host);
    let mut before = vec![0; 3];
    let mut all_are_busy = |what| {
        let after = ordinary.agent.counted("tun-reads");
        let reads: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
        assert!(reads.iter().all(|reads| *reads > 100), "{what}: what each lane has read is {reads:?}");
        before = after;
    };
    nothing_is_overtaken(
        "to wireguard-go, 3 lanes",
        &ends,
        &one_way(Answers::Never, Until::Bytes(megabytes(64))),
    );
    all_are_busy("nobody answers");
    // Answers come to lane 0: what is sent stays where it was.
    ends.iter().for_each(greet);
    nothing_is_overtaken("with wireguard-go, 3 lanes", &ends, &both_ways(Until::Bytes(megabytes(64))));
    all_are_busy("both send");
}

#[test]
fn to_an_ordinary_peer_with_rare_answers() {
    let ordinary = Ordinary::start();
    let (pod, host) = ordinary.ends();
    rare_answers("to wireguard-go, 3 lanes", pod, host);
}

#[test]
fn to_an_ordinary_peer_with_answers_in_the_middle_of_bursts() {
    let ordinary = Ordinary::start();
    let (pod, host) = ordinary.ends();
    late_answers("to wireguard-go, 3 lanes", pod, host);
}

#[test]
fn flows_to_an_ordinary_peer_keep_their_lanes() {
    let ordinary = Ordinary::start();
    let (pod, host) = ordinary.ends();
    keeps_lanes(&ordinary.agent, pod, host);
}

/// A node with three lanes, and another with wireguard-go.
struct Ordinary {
    agent: Agent,
    _peer: WireGuard,
    lab: Lab,
}

impl Ordinary {
    fn start() -> Ordinary {
        let mut lab = Lab::two();
        lab.nodes[0].add_pod(1500);
        let [warren, other] = [&lab.nodes[0], &lab.nodes[1]];
        let peer = WireGuard::start_quietly(&lab, other, Program::WireguardGo);
        let endpoint = SocketAddr::new(lab.outer(other), PORT).to_string();
        lab.write_node(warren, &[]);
        let known = [("warren.dev/public-key", peer.public_key.as_str()), ("warren.dev/endpoint", &endpoint)];
        lab.write_node(other, &known);
        let agent = Agent::start(&lab, warren, &["--encap", "wireguard", "--lanes", "3"]);
        warren.set_pod_mtu(agent.pod_mtu());
        let (key, port) = lane_zero(&lab);
        peer.add_peer(other, warren, &key, Some((lab.outer(warren), port)));
        steer(&lab);
        let ordinary = Ordinary { agent, _peer: peer, lab };
        let (pod, host) = ordinary.ends();
        reach(pod, host);
        ordinary
    }

    fn ends(&self) -> (Station<'_>, Station<'_>) {
        (self.lab.nodes[0].pod(), self.lab.nodes[1].host(10))
    }
}

fn megabytes(default: u64) -> u64 {
    std::env::var("WARREN_BULK_MB").map_or(default, |text| text.parse().expect("a number"))
}

/// A mesh in which each flow has one processor everywhere but in the agents.
fn several_lanes(encap: &str, lanes: [&str; 2]) -> Mesh {
    let mesh =
        Mesh::start_each(Lab::two(), |node| vec!["--encap", encap, "--lanes", lanes[usize::from(node) - 1]]);
    steer(&mesh.lab);
    mesh
}

fn keeps_order(encap: &str, lanes: [&str; 2]) {
    let mesh = several_lanes(encap, lanes);
    let ends = flows(mesh.pod(0), mesh.pod(1));
    ends.iter().for_each(greet);
    let what = format!("{encap}, lanes {lanes:?}");
    nothing_is_overtaken(&what, &ends, &both_ways(Until::Bytes(megabytes(256))));
}

fn keeps_order_with_rare_answers(encap: &str, lanes: [&str; 2]) {
    let mesh = several_lanes(encap, lanes);
    rare_answers(&format!("{encap}, lanes {lanes:?}"), mesh.pod(0), mesh.pod(1));
}

fn keeps_order_with_late_answers(encap: &str, lanes: [&str; 2]) {
    let mesh = several_lanes(encap, lanes);
    late_answers(&format!("{encap}, lanes {lanes:?}"), mesh.pod(0), mesh.pod(1));
}

/// The kernel has forgotten a flow's last answer before the next one comes.
fn rare_answers(what: &str, from: Station<'_>, to: Station<'_>) {
    let trial = one_way(Answers::Every(FORGOTTEN), Until::Later(LONG));
    nothing_is_overtaken(&format!("{what}, rare answers"), &flows(from, to), &trial);
}

/// Nobody has answered on any of these flows before they are at their fastest.
fn late_answers(what: &str, from: Station<'_>, to: Station<'_>) {
    for burst in 1..=BURSTS {
        let trial = one_way(Answers::Once(MIDDLE), Until::Each(BURST));
        nothing_is_overtaken(&format!("{what}, late answers, burst {burst}"), &flows(from, to), &trial);
    }
}

/// On which lane a flow is sent does not depend on answers, nor on how long ago they came.
fn keeps_lanes(agent: &Agent, from: Station<'_>, to: Station<'_>) {
    let ends = &flows(from, to);
    let lanes = || -> Vec<usize> { ends.iter().map(|pair| lane_of(agent, &pair[0])).collect() };
    let before = lanes();
    assert!(before.iter().any(|lane| *lane != before[0]), "all on one lane, this shows nothing: {before:?}");
    for pair in ends {
        pair[1].send(&[0; PAYLOAD]).expect("answer");
        pair[0].set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        pair[0].recv(&mut [0; PAYLOAD + 1]).expect("an answer arrives");
    }
    assert_eq!(lanes(), before, "after an answer");
    std::thread::sleep(FORGOTTEN);
    assert_eq!(lanes(), before, "long after an answer");
}

/// Which lane reads what is sent here.
fn lane_of(agent: &Agent, socket: &UdpSocket) -> usize {
    let before = agent.counted("tun-reads");
    (0..SHOWN).for_each(|_| assert!(socket.send(&[0; PAYLOAD]).is_ok()));
    wait_for("a lane that has read them", PATIENCE, || {
        let after = agent.counted("tun-reads");
        // Some other packet may come in between.
        after.iter().zip(&before).position(|(after, before)| after - before >= SHOWN * 4 / 5)
    })
}

/// Which ends send as much as they can, what the others say to it, and how long that goes on.
#[derive(Clone, Copy, Debug)]
struct Trial {
    senders: &'static [usize],
    answers: Answers,
    until: Until,
}

/// What those who listen say.
#[derive(Clone, Copy, Debug)]
enum Answers {
    Never,
    /// Something on each flow every so often, on one after the other.
    Every(Duration),
    /// Something once so many datagrams have come, and no more.
    Once(u64),
}

#[derive(Clone, Copy, Debug)]
enum Until {
    /// All flows together have so many megabytes.
    Bytes(u64),
    /// Each has so many datagrams.
    Each(u64),
    /// So much time has passed.
    Later(Duration),
}

fn one_way(answers: Answers, until: Until) -> Trial {
    Trial { senders: &[0], answers, until }
}

fn both_ways(until: Until) -> Trial {
    Trial { senders: &[0, 1], answers: Answers::Never, until }
}

fn nothing_is_overtaken(what: &str, ends: &[[UdpSocket; 2]], trial: &Trial) {
    let began = clock::now();
    let (stop, received, counted) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let swapped: u64 = std::thread::scope(|scope| {
        let _end = Ends(&stop);
        for &side in trial.senders {
            let stop = &stop;
            scope.spawn(move || send(ends.iter().map(|pair| &pair[side]), stop));
        }
        let sockets = trial.senders.iter().flat_map(|side| ends.iter().map(move |pair| &pair[1 - side]));
        let listeners: Vec<Listener<'_>> = sockets
            .enumerate()
            .map(|(flow, socket)| Listener {
                socket,
                first_answer: began + FORGOTTEN * flow as u32 / ends.len() as u32,
                stop: &stop,
                received: &received,
                counted: &counted,
            })
            .collect();
        // The most that each listener counts, and what they count together.
        let (most, wanted) = match trial.until {
            Until::Bytes(megabytes) => (u64::MAX, (megabytes << 20).div_ceil(PAYLOAD as u64)),
            Until::Each(datagrams) => (datagrams, datagrams * listeners.len() as u64),
            Until::Later(_) => (0, u64::MAX),
        };
        let threads: Vec<_> = listeners
            .into_iter()
            .map(|listener| scope.spawn(move || listener.out_of_order(trial.answers, most, wanted)))
            .collect();
        if let Until::Later(time) = trial.until {
            std::thread::sleep(time);
            stop.store(true, Ordering::Relaxed);
        }
        threads.into_iter().map(|thread| thread.join().expect("a listener that ends")).sum()
    });
    let datagrams = received.load(Ordering::Relaxed);
    println!(
        "{what}: {datagrams} datagrams in {:.1} s, {swapped} out of order",
        clock::now().duration_since(began).as_secs_f64()
    );
    assert_eq!(swapped, 0, "{what}: of {datagrams} datagrams so many came after a later one");
}

/// A veth hands packets to the processor on which their sender happens to run, and one that changes processors
/// would be overtaken by itself: each flow gets one processor, everywhere but in the agents.
fn steer(lab: &Lab) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(31);
    let all = format!("{:x}", (1_u32 << processors) - 1);
    let nodes = lab.nodes.iter().flat_map(|node| node.pods.iter().chain([&node.ns]));
    for place in nodes.chain([&lab.switch]) {
        let script = format!(
            "for d in /sys/class/net/*; do \
             case ${{d##*/}} in eth*|veth*|port*) echo {all} > $d/queues/rx-0/rps_cpus || exit 1;; esac; done"
        );
        let output = place.command("sh").args(["-c", &script]).output().expect("start sh");
        assert!(output.status.success(), "{}: {}", place.name(), String::from_utf8_lossy(&output.stderr));
    }
}

fn flows(a: Station<'_>, b: Station<'_>) -> Vec<[UdpSocket; 2]> {
    (0..FLOWS).map(|flow| join(a, b, flow)).collect()
}

/// Two ends of a flow.
fn join(a: Station<'_>, b: Station<'_>, flow: usize) -> [UdpSocket; 2] {
    let family = flow % 2;
    let far = SocketAddr::new(b.addresses[family], 40_000 + flow as u16);
    let near = udp_socket(a.ns, a.addresses[family], far);
    let other = b.ns.enter(|| UdpSocket::bind(far).unwrap_or_else(|e| panic!("bind {far}: {e}")));
    other.connect(near.local_addr().expect("an address")).expect("answer where it came from");
    [near, other]
}

/// Twice there and back.
fn greet([near, other]: &[UdpSocket; 2]) {
    for (from, to) in [(near, other), (other, near), (near, other), (other, near)] {
        to.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        from.send(&[0; PAYLOAD]).expect("send a greeting");
        let length = to.recv(&mut [0; PAYLOAD + 1]).expect("a greeting arrives");
        assert_eq!(length, PAYLOAD, "a greeting of another length");
    }
}

/// Sends numbered datagrams on all flows until told to stop: on every other flow many at once.
fn send<'a>(flows: impl Iterator<Item = &'a UdpSocket>, stop: &AtomicBool) {
    // Beyond those of earlier trials, of which some may still be on their way.
    let first = clock::since_boot_ms() << 20;
    let mut flows: Vec<(&UdpSocket, u64)> = flows.map(|socket| (socket, first)).collect();
    let size = PAYLOAD as u16;
    let mut bytes = vec![0; SEGMENTS * PAYLOAD];
    while !stop.load(Ordering::Relaxed) {
        for (index, (socket, next)) in flows.iter_mut().enumerate() {
            for datagram in bytes.chunks_mut(PAYLOAD) {
                *next += 1;
                datagram[..8].copy_from_slice(&next.to_be_bytes());
            }
            // Full queues are what this is about; what is not sent is not missed.
            if index / 2 % 2 == 0 {
                let together = [ControlMessage::UdpGsoSegments(&size)];
                let _ = sendmsg::<()>(
                    socket.as_raw_fd(),
                    &[IoSlice::new(&bytes)],
                    &together,
                    MsgFlags::empty(),
                    None,
                );
            } else {
                for datagram in bytes.chunks(PAYLOAD) {
                    let _ = socket.send(datagram);
                }
            }
        }
    }
}

/// Whatever ends ends all: senders that nobody stops would never.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One end of a flow that hears the other, and all flows' count.
struct Listener<'a> {
    socket: &'a UdpSocket,
    first_answer: Instant,
    stop: &'a AtomicBool,
    received: &'a AtomicU64,
    /// Of `received`, those of which the end depends.
    counted: &'a AtomicU64,
}

impl Listener<'_> {
    /// Counts datagrams that came after a later one of their flow, or twice, until all flows together have so many,
    /// of each at most so many.
    fn out_of_order(&self, answers: Answers, most: u64, wanted: u64) -> u64 {
        self.socket.set_read_timeout(Some(GLANCE)).expect("set a timeout");
        let _end = Ends(self.stop);
        let (mut last, mut swapped, mut came) = (0, 0, 0);
        let mut next_answer = self.first_answer;
        let mut bytes = [0; PAYLOAD + 1];
        let mut latest = clock::now();
        while !self.stop.load(Ordering::Relaxed) {
            let length = match self.socket.recv(&mut bytes) {
                Ok(length) => length,
                Err(e) if is_timeout(&e) && clock::now().duration_since(latest) < PATIENCE => continue,
                Err(e) => panic!("a flow is dead: {e}"),
            };
            latest = clock::now();
            assert_eq!(length, PAYLOAD, "a datagram of another length");
            let number = u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
            if number == 0 {
                // A greeting, an answer: not of those that are sent as fast as can be.
                continue;
            }
            swapped += u64::from(number <= last);
            last = last.max(number);
            came += 1;
            let due = match answers {
                Answers::Never => false,
                Answers::Every(pause) => {
                    let due = latest >= next_answer;
                    next_answer = if due { latest + pause } else { next_answer };
                    due
                }
                Answers::Once(after) => came == after,
            };
            if due {
                self.socket.send(&[0; PAYLOAD]).expect("answer");
            }
            self.received.fetch_add(1, Ordering::Relaxed);
            if came <= most && self.counted.fetch_add(1, Ordering::Relaxed) + 1 >= wanted {
                self.stop.store(true, Ordering::Relaxed);
            }
        }
        assert!(last > 0, "a flow without a datagram shows nothing");
        swapped
    }
}
