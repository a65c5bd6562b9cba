//! Packets of one flow come out of the tunnel in the order in which they went in, whatever the lanes do: numbered
//! datagrams both ways, alone and many to a segmented send, as fast as the machine can.
//!
//! ```text
//! WARREN=target/release/warren WARREN_BULK_MB=10240 cargo test --test kernel order -- --nocapture
//! ```

use std::io::IoSlice;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use warren::io::clock;

use crate::interop::lane_zero;
use crate::lab::agent::{Agent, Mesh};
use crate::lab::peer::{PORT, Program, WireGuard};
use crate::lab::traffic::{is_timeout, reach, udp_socket};
use crate::lab::{Lab, Station};

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

/// The other program knows one key: what other lanes have for it they hand over to lane 0.
#[test]
fn to_an_ordinary_peer_from_several_lanes() {
    let mut lab = Lab::two();
    lab.nodes[0].add_pod(1500);
    let [warren, other] = [&lab.nodes[0], &lab.nodes[1]];
    let peer = WireGuard::start_quietly(&lab, other, Program::WireguardGo);
    let endpoint = SocketAddr::new(lab.outer(other), PORT).to_string();
    lab.write_node(warren, &[]);
    lab.write_node(other, &[("warren.dev/public-key", &peer.public_key), ("warren.dev/endpoint", &endpoint)]);
    let agent = Agent::start(&lab, warren, &["--encap", "wireguard", "--lanes", "3"]);
    warren.set_pod_mtu(agent.pod_mtu());
    let (key, port) = lane_zero(&lab);
    peer.add_peer(other, warren, &key, Some((lab.outer(warren), port)));
    steer(&lab);
    let (pod, host) = (warren.pod(), other.host(10));
    reach(pod, host);
    // Nobody answers: every lane has flows.
    let ends: Vec<[UdpSocket; 2]> = (0..FLOWS).map(|flow| join(pod, host, flow)).collect();
    nothing_is_overtaken("to wireguard-go, 3 lanes", &ends, &[0], megabytes(64));
    let busy: Vec<bool> = agent.counted("tun-reads").into_iter().map(|reads| reads > 100).collect();
    assert_eq!(busy, [true; 3], "lanes that had something to hand over or to send");
    // Answers come to lane 0, and move nothing. Other flows: the numbers begin anew, and late datagrams of these are
    // still there.
    let ends: Vec<[UdpSocket; 2]> = (FLOWS..2 * FLOWS).map(|flow| join(pod, host, flow)).collect();
    ends.iter().for_each(greet);
    let before = agent.counted("tun-reads");
    nothing_is_overtaken("with wireguard-go, 3 lanes", &ends, &[0, 1], megabytes(64));
    let reads = agent.counted("tun-reads").into_iter().zip(before).map(|(after, before)| after - before);
    let busy: Vec<bool> = reads.map(|reads| reads > 100).collect();
    assert_eq!(busy, [true; 3], "lanes that still have what they had");
}

fn megabytes(default: u64) -> u64 {
    std::env::var("WARREN_BULK_MB").map_or(default, |text| text.parse().expect("a number"))
}

fn keeps_order(encap: &str, lanes: [&str; 2]) {
    let mesh =
        Mesh::start_each(Lab::two(), |node| vec!["--encap", encap, "--lanes", lanes[usize::from(node) - 1]]);
    steer(&mesh.lab);
    let ends: Vec<[UdpSocket; 2]> = (0..FLOWS).map(|flow| join(mesh.pod(0), mesh.pod(1), flow)).collect();
    ends.iter().for_each(greet);
    nothing_is_overtaken(&format!("{encap}, lanes {lanes:?}"), &ends, &[0, 1], megabytes(256));
}

/// These ends of the flows send as much as they can, until so much has arrived.
fn nothing_is_overtaken(what: &str, ends: &[[UdpSocket; 2]], senders: &[usize], megabytes: u64) {
    let began = clock::now();
    let stop = AtomicBool::new(false);
    let received = AtomicU64::new(0);
    let swapped: u64 = std::thread::scope(|scope| {
        let _end = Ends(&stop);
        for &side in senders {
            let stop = &stop;
            scope.spawn(move || send(ends.iter().map(|pair| &pair[side]), stop));
        }
        let listening = senders.iter().flat_map(|side| ends.iter().map(move |pair| &pair[1 - side]));
        let listeners: Vec<_> = listening
            .map(|socket| scope.spawn(|| out_of_order(socket, &stop, &received, megabytes << 20)))
            .collect();
        listeners.into_iter().map(|listener| listener.join().expect("a listener that ends")).sum()
    });
    let datagrams = received.load(Ordering::Relaxed) / PAYLOAD as u64;
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
    let mut flows: Vec<(&UdpSocket, u64)> = flows.map(|socket| (socket, 0)).collect();
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

/// Counts datagrams that came after a later one of their flow, or twice, until all flows together have the bytes.
fn out_of_order(socket: &UdpSocket, stop: &AtomicBool, received: &AtomicU64, wanted: u64) -> u64 {
    socket.set_read_timeout(Some(GLANCE)).expect("set a timeout");
    let _end = Ends(stop);
    let (mut last, mut swapped) = (0, 0);
    let mut bytes = [0; PAYLOAD + 1];
    let mut latest = clock::now();
    while !stop.load(Ordering::Relaxed) {
        let length = match socket.recv(&mut bytes) {
            Ok(length) => length,
            Err(e) if is_timeout(&e) && clock::now().duration_since(latest) < PATIENCE => continue,
            Err(e) => panic!("a flow is dead: {e}"),
        };
        latest = clock::now();
        assert_eq!(length, PAYLOAD, "a datagram of another length");
        let number = u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
        swapped += u64::from(number <= last);
        last = last.max(number);
        if received.fetch_add(PAYLOAD as u64, Ordering::Relaxed) + PAYLOAD as u64 >= wanted {
            stop.store(true, Ordering::Relaxed);
        }
    }
    assert!(last > 0, "a flow without a datagram shows nothing");
    swapped
}
