//! The same for whole turns of the lane's thread, on a kernel that is memory: what reads, batches, sends and
//! writes around the packet line costs nothing either.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use allocation_counter::measure;
use arc_swap::ArcSwap;
use warren::io::clock;
use warren::io::kernel::{Kernel, Watch};
use warren::io::lane::{Desk, LaneLoop, LaneOffloads, Shared};
use warren::io::tun::TunOffloads;
use warren::io::udp::{Received, SLOT, SLOTS};
use warren::snapshot::Encap;
use warren::tunnel::TxBatch;
use warren::tunnel::batch::Run;

use crate::pair::{BULK, CLIENT, ENDPOINT, Socket, lane, mtu, outer, snapshot, super_packet};
use crate::{BURSTS, WARM_UP};

/// IPv4 and TCP header.
const HEADERS: usize = 40;
/// Of a small packet.
const SMALL: usize = 64;

/// What a node's kernel holds.
#[derive(Default)]
struct Memory {
    /// To be read from the TUN.
    frames: VecDeque<Vec<u8>>,
    /// To be received: messages of datagrams back to back, with the size of each.
    messages: VecDeque<(Vec<u8>, usize)>,
    /// Where from.
    peer: Option<(Encap, SocketAddr)>,
    /// What was sent, and the length and datagram size of each message in it.
    sent: Vec<u8>,
    runs: Vec<(usize, usize)>,
    /// Bytes written to the TUN, virtio headers left out.
    written: usize,
}

struct End(Rc<RefCell<Memory>>);

impl Kernel for End {
    fn now(&self) -> Instant {
        clock::now()
    }

    fn read_tun(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let frame = self.0.borrow_mut().frames.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        buffer[..frame.len()].copy_from_slice(&frame);
        Ok(frame.len())
    }

    fn write_tun(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let [header, packet @ ..] = pieces else { return Err(io::ErrorKind::InvalidInput.into()) };
        let len: usize = packet.iter().map(|piece| piece.len()).sum();
        self.0.borrow_mut().written += len;
        Ok(header.len() + len)
    }

    fn reopen_tun(&mut self, wanted: TunOffloads) -> io::Result<TunOffloads> {
        Ok(wanted)
    }

    fn limit_tun_offloads(&mut self, _offloads: TunOffloads) {}

    fn receive(&mut self, encap: Encap, buffer: &mut [u8], out: &mut Vec<Received>) -> io::Result<usize> {
        let mut memory = self.0.borrow_mut();
        let Some((_, from)) = memory.peer.filter(|peer| peer.0 == encap && !memory.messages.is_empty())
        else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let count = memory.messages.len().min(SLOTS);
        for (slot, (bytes, stride)) in memory.messages.drain(..count).enumerate() {
            let (offset, len) = (slot * SLOT, bytes.len());
            buffer[offset..offset + len].copy_from_slice(&bytes);
            out.push(Received { from, offset, len, stride });
        }
        Ok(count)
    }

    fn send(&mut self, batch: &TxBatch, runs: &[Run]) -> io::Result<usize> {
        let memory = &mut *self.0.borrow_mut();
        for run in runs {
            memory.sent.extend_from_slice(batch.bytes(run));
            memory.runs.push((run.len, run.segment));
        }
        Ok(runs.len())
    }

    fn wait(&mut self, _timeout: Option<Duration>, _watch: Watch) -> io::Result<()> {
        Ok(())
    }

    fn yield_now(&mut self) {}
}

struct Node {
    thread: LaneLoop<End>,
    memory: Rc<RefCell<Memory>>,
}

impl Node {
    fn new(number: usize, encap: Encap, now: Instant) -> Node {
        let port = if encap == Encap::WireGuard { 51820 } else { 8472 };
        let memory = Memory {
            peer: Some((encap, SocketAddr::new(outer(1 - number), port))),
            // Memory of the test's own, which must not be counted.
            sent: Vec::with_capacity(8 << 20),
            runs: Vec::with_capacity(4096),
            ..Memory::default()
        };
        let memory = Rc::new(RefCell::new(memory));
        let shared = Shared {
            snapshot: Arc::new(ArcSwap::from_pointee(snapshot(number, encap))),
            stop: Arc::new(AtomicBool::new(false)),
        };
        let (_, orders) = sync_channel(1);
        let (end, lane) = (End(Rc::clone(&memory)), lane(number, now));
        let thread = LaneLoop::new(end, lane, shared, orders, Desk::default(), LaneOffloads::default());
        Node { thread, memory }
    }

    /// Turns until there is nothing to do.
    fn run(&mut self, now: Instant) {
        while self.thread.turn(now).expect("a turn") {}
    }
}

/// What one has sent is there for the other.
fn fly(from: &Node, to: &Node) {
    let (sender, receiver) = (&mut *from.memory.borrow_mut(), &mut *to.memory.borrow_mut());
    let mut rest = &sender.sent[..];
    for (len, stride) in sender.runs.drain(..) {
        let (message, after) = rest.split_at(len);
        receiver.messages.push_back((message.to_vec(), stride));
        rest = after;
    }
    sender.sent.clear();
}

#[test]
fn one_super_packet_a_turn() {
    turns_cost_none(1, BULK, BURSTS);
}

#[test]
fn as_many_super_packets_as_a_turn_takes() {
    turns_cost_none(16, BULK, BURSTS / 10);
}

#[test]
fn small_packets() {
    turns_cost_none(16, SMALL, BURSTS);
}

/// Node 0's turns are counted: what its pod sends, then what it receives for it.
fn turns_cost_none(frames: usize, payload: usize, bursts: usize) {
    for encap in [Encap::WireGuard, Encap::Vxlan] {
        let mss = usize::from(mtu(encap)) - HEADERS;
        let mut now = clock::now();
        let mut nodes = [0, 1].map(|number| Node::new(number, encap, now));
        let frame = |from: Socket, to, flags, payload| super_packet(from, to, flags, payload, mss);
        nodes[0].memory.borrow_mut().frames.push_back(frame(CLIENT, ENDPOINT, "S", 0));
        // Until the handshake is over, and the first packet has come through.
        for _ in 0..4 {
            exchange(&mut nodes, now);
        }
        nodes[1].memory.borrow_mut().frames.push_back(frame(ENDPOINT, CLIENT, "SA", 0));
        exchange(&mut nodes, now);

        let [out, back] = [frame(CLIENT, ENDPOINT, "A", payload), frame(ENDPOINT, CLIENT, "A", payload)];
        for number in 0..WARM_UP + bursts {
            now += Duration::from_micros(500);
            for (node, frame) in [&out, &back].into_iter().enumerate() {
                nodes[node].memory.borrow_mut().frames.extend((0..frames).map(|_| frame.clone()));
                nodes[node].memory.borrow_mut().written = 0;
            }
            let (first, second) = nodes.split_at_mut(1);
            let (counted, other) = (&mut first[0], &mut second[0]);
            other.run(now);
            fly(other, counted);
            let cost = measure(|| counted.run(now));
            fly(counted, other);
            other.run(now);
            for node in [&*counted, &*other] {
                assert!(
                    node.memory.borrow().written >= frames * payload,
                    "{encap:?}: the burst came through"
                );
            }
            assert!(
                cost.count_total == 0 || number < WARM_UP,
                "{}: {} allocations in burst {number} of {frames} frames",
                encap.name(),
                cost.count_total
            );
        }
    }
}

fn exchange(nodes: &mut [Node; 2], now: Instant) {
    nodes.iter_mut().for_each(|node| node.run(now));
    let [a, b] = &*nodes;
    fly(a, b);
    fly(b, a);
}
