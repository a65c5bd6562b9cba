//! VXLAN's end of a lane: whose frames are taken, and which MAC address a peer has.
//!
//! The wire format is in [`vxlan`]. A peer that announces its MAC address needs no more; for
//! one that does not (a kernel `vxlan` device set up by hand) the address is asked for and learnt, per
//! peer and never across peers, and packets wait for it in a small queue. Asked for are the packet's
//! destination and the node address of the range that holds it: a Linux router answers for its own
//! addresses, not for the pods behind it.
//!
//! All lanes read from one port, and the kernel picks the lane by the sender's address and port: the answer
//! comes to the lane that asked only by chance. So what one lane learns stands in [`Neighbours`] for all.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;

pub use super::neighbours::Neighbours;
use super::neighbours::{ASK_EVERY, Neighbour};
use super::vxlan::{self, HEADER, Inner, MAX_NEIGHBOUR, Mac};
use super::{Sealed, Segments, TxBatch, Via, Waited};
use crate::packet::DropReason;
use crate::snapshot::{Encap, LocalNode, Mesh, Owner, Peer, PeerId, Snapshot};

/// How often a lane with waiting packets looks whether another lane was told.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Packets that wait for one peer's MAC address.
const QUEUE_PACKETS: usize = 64;
/// A packet that has waited this long is of no use to anyone.
const QUEUE_AGE: Duration = Duration::from_secs(3);

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// An IP packet stands at this offset of the datagram.
    Packet {
        /// Who sent it.
        peer: PeerId,
        /// Where it begins.
        offset: usize,
    },
    /// A question was answered.
    Answered,
    /// A MAC address was told.
    Learnt,
    /// Refused.
    Drop(DropReason),
}

/// The VXLAN end of one lane.
#[derive(Debug)]
pub struct VxlanLink {
    sources: u8,
    learnt: Learnt,
    waiting: BTreeMap<PeerId, Waiting>,
    waited: Waited,
    mesh: Option<Arc<Mesh>>,
    /// The source of the last datagram, as `mesh` has it.
    last_sender: Option<(IpAddr, PeerId)>,
}

/// What peers have told. No packet clones a [`Neighbour`]'s `Arc`: the count of owners stands beside what
/// all lanes read, and would move from core to core.
#[derive(Debug)]
struct Learnt {
    shared: Arc<Neighbours>,
    /// What this lane has looked up in `shared`, good for one version of it.
    seen: HashMap<PeerId, Arc<Neighbour>>,
    version: u64,
}

#[derive(Debug)]
struct Waiting {
    asked: Instant,
    looked: Instant,
    packets: VecDeque<(Instant, Vec<u8>)>,
}

impl VxlanLink {
    /// An end that spreads its flows over this many source sockets.
    pub fn new(sources: u8, shared: Arc<Neighbours>) -> VxlanLink {
        VxlanLink {
            sources: sources.max(1),
            learnt: Learnt { shared, seen: HashMap::new(), version: 0 },
            waiting: BTreeMap::new(),
            waited: Waited::default(),
            mesh: None,
            last_sender: None,
        }
    }

    /// Forgets what it learnt about peers that have gone or moved.
    pub fn follow(&mut self, mesh: &Arc<Mesh>) {
        if self.mesh.as_ref().is_some_and(|old| Arc::ptr_eq(old, mesh)) {
            return;
        }
        let old = self.mesh.replace(Arc::clone(mesh));
        self.last_sender = None;
        let same = |id: &PeerId| {
            let before = old.as_ref().and_then(|m| m.peer(*id)).and_then(|p| p.vxlan.as_ref());
            let after = mesh.peer(*id).and_then(|p| p.vxlan.as_ref());
            after.is_some() && before == after
        };
        self.learnt.seen.retain(|id, _| same(id));
        let dropped = &mut self.waited.dropped;
        self.waiting.retain(|id, waiting| {
            let keep = same(id);
            *dropped += if keep { 0 } else { waiting.packets.len() };
            keep
        });
    }

    /// How many packets wait for a MAC address.
    pub fn waiting(&self) -> usize {
        self.waiting.values().map(|waiting| waiting.packets.len()).sum()
    }

    /// What became of packets that waited, since this was last asked.
    pub fn take_waited(&mut self) -> Waited {
        std::mem::take(&mut self.waited)
    }

    /// When [`Self::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.values().map(|waiting| waiting.looked + LOOK_EVERY).min()
    }

    /// Sends what need not wait any longer, asks again, and lets go of what has waited too long.
    pub fn handle_timeout(&mut self, now: Instant, local: &LocalNode, tx: &mut TxBatch) {
        if self.poll_timeout().is_none_or(|at| now < at) {
            return;
        }
        let Some(mesh) = self.mesh.clone() else { return };
        let ids: Vec<PeerId> = self.waiting.keys().copied().collect();
        for peer in ids.iter().filter_map(|id| mesh.peer(*id)) {
            if self.learnt.find(peer).is_some() {
                self.flush(now, local, peer, tx);
            }
        }
        let dropped = &mut self.waited.dropped;
        self.waiting.retain(|id, waiting| {
            *dropped += waiting.expire(now);
            let Some((_, packet)) = waiting.packets.front() else { return false };
            waiting.looked = now;
            if now.saturating_duration_since(waiting.asked) < ASK_EVERY {
                return true;
            }
            waiting.asked = now;
            if let (Some(peer), Ok(headers)) = (mesh.peer(*id), crate::packet::parse(packet)) {
                ask(local, peer, headers.destination, tx);
            }
            true
        });
    }

    /// Wraps packets for `peer` into `tx`; `flow` picks the source port.
    #[allow(clippy::too_many_arguments)] // one packet and everything that is known about it
    pub fn seal(
        &mut self,
        now: Instant,
        local: &LocalNode,
        peer: &Peer,
        flow: u64,
        destination: IpAddr,
        packets: &impl Segments,
        tx: &mut TxBatch,
    ) -> Sealed {
        let Some(remote) = &peer.vxlan else { return Sealed::refused(DropReason::NoEndpoint) };
        let to = SocketAddr::new(remote.address, remote.port);
        let Some(mac) = remote.mac.or_else(|| self.resolve(now, local, peer, destination, tx)) else {
            return self.ask_and_wait(now, local, peer, destination, packets, tx);
        };
        let via = Via::Vxlan(vxlan::source_port_index(flow, usize::from(self.sources)) as u8);
        let header = vxlan::header(local.vni, mac, local.mac, destination.is_ipv6());
        for i in 0..packets.count() {
            let Some(slot) = tx.reserve(HEADER + packets.len(i)) else {
                return Sealed { sent: i, waiting: 0, refused: Some(DropReason::NoBuffer) };
            };
            slot[..HEADER].copy_from_slice(&header);
            let len = HEADER + packets.write(i, &mut slot[HEADER..]);
            tx.commit(to, via, len);
        }
        Sealed { sent: packets.count(), waiting: 0, refused: None }
    }

    /// The MAC address that a peer has told; asks for it anew after silence.
    fn resolve(
        &mut self,
        now: Instant,
        local: &LocalNode,
        peer: &Peer,
        destination: IpAddr,
        tx: &mut TxBatch,
    ) -> Option<Mac> {
        let (shared, neighbour) = self.learnt.find(peer)?;
        let mac = neighbour.mac;
        if shared.is_to_be_asked(now, neighbour) {
            ask(local, peer, destination, tx);
        }
        Some(mac)
    }

    #[allow(clippy::too_many_arguments)] // the same as `seal`, split only for length
    fn ask_and_wait(
        &mut self,
        now: Instant,
        local: &LocalNode,
        peer: &Peer,
        destination: IpAddr,
        packets: &impl Segments,
        tx: &mut TxBatch,
    ) -> Sealed {
        let mut unasked = false;
        let waiting = self.waiting.entry(peer.id).or_insert_with(|| {
            unasked = true;
            Waiting { asked: now, looked: now, packets: VecDeque::new() }
        });
        self.waited.dropped += waiting.expire(now);
        let mut sealed = Sealed::default();
        for i in 0..packets.count() {
            if waiting.packets.len() >= QUEUE_PACKETS {
                sealed.refused = Some(DropReason::AwaitingMac);
                break;
            }
            let mut packet = vec![0; packets.len(i)];
            packets.write(i, &mut packet);
            waiting.packets.push_back((now, packet));
            sealed.waiting += 1;
        }
        if unasked {
            ask(local, peer, destination, tx);
        }
        sealed
    }

    /// Opens a datagram: only a known node's, only with our network identifier, and only if VXLAN is what
    /// we speak with that node.
    pub fn open(
        &mut self,
        now: Instant,
        snapshot: &Snapshot,
        from: SocketAddr,
        datagram: &[u8],
        tx: &mut TxBatch,
    ) -> Opened {
        let Some(peer) = self.sender(&snapshot.mesh, from.ip()) else {
            return Opened::Drop(DropReason::UnknownVxlanSource);
        };
        if peer.encap != Some(Encap::Vxlan) {
            return Opened::Drop(DropReason::UnknownVxlanSource);
        }
        let local = &snapshot.local;
        match vxlan::open(datagram, local.vni, &local.mac) {
            Ok(Inner::Ip { offset, source_mac }) => {
                self.learn(now, local, peer, source_mac, tx);
                Opened::Packet { peer: peer.id, offset }
            }
            Ok(Inner::Request(request)) => {
                self.learn(now, local, peer, request.source_mac, tx);
                let Some(to) = peer.vxlan.as_ref().map(|v| SocketAddr::new(v.address, v.port)) else {
                    return Opened::Drop(DropReason::NoEndpoint);
                };
                let Some(room) = tx.reserve(MAX_NEIGHBOUR) else {
                    return Opened::Drop(DropReason::NoBuffer);
                };
                match vxlan::answer(room, local.vni, local.mac, &request, |a| is_ours(&snapshot.mesh, a)) {
                    Ok(len) => {
                        tx.commit(to, Via::Vxlan(0), len);
                        Opened::Answered
                    }
                    Err(reason) => Opened::Drop(reason),
                }
            }
            Ok(Inner::Reply(reply)) => {
                self.learn(now, local, peer, reply.source_mac, tx);
                Opened::Learnt
            }
            Err(reason) => Opened::Drop(reason),
        }
    }

    /// Whose address this is. Datagrams come in runs: whoever sent the last one most likely sent this one too.
    fn sender<'a>(&mut self, mesh: &'a Arc<Mesh>, address: IpAddr) -> Option<&'a Arc<Peer>> {
        let followed = self.mesh.as_ref().is_some_and(|followed| Arc::ptr_eq(followed, mesh));
        let id = match self.last_sender {
            Some((last, id)) if last == address && followed => id,
            Some(_) | None => *mesh.vxlan_sources.get(&address)?,
        };
        self.last_sender = followed.then_some((address, id));
        mesh.peer(id)
    }

    /// Remembers the MAC address of a peer that announces none, and sends what waited for it.
    fn learn(&mut self, now: Instant, local: &LocalNode, peer: &Peer, mac: Mac, tx: &mut TxBatch) {
        let Some(remote) = peer.vxlan.as_ref().filter(|remote| remote.mac.is_none()) else { return };
        if let Some((shared, known)) = self.learnt.find(peer).filter(|(_, known)| known.mac == mac) {
            shared.confirm(now, known);
        } else if !self.learnt.shared.tell(now, peer.id, remote.address, mac) {
            // Another lane is at it: the next frame tells it again.
            return;
        }
        self.flush(now, local, peer, tx);
    }

    fn flush(&mut self, now: Instant, local: &LocalNode, peer: &Peer, tx: &mut TxBatch) {
        let Some(mut waiting) = self.waiting.remove(&peer.id) else { return };
        self.waited.dropped += waiting.expire(now);
        for (_, packet) in waiting.packets {
            let destination = match crate::packet::parse(&packet) {
                Ok(headers) => headers.destination,
                Err(_) => {
                    self.waited.dropped += 1;
                    continue;
                }
            };
            let sealed = self.seal(now, local, peer, 0, destination, &&packet[..], tx);
            if sealed.sent == 1 {
                self.waited.sent.push((peer.id, packet.len()));
            } else if sealed.waiting == 0 {
                self.waited.dropped += 1;
            }
        }
    }
}

impl Learnt {
    /// What a peer has told any of the lanes, and the table it stands in.
    fn find(&mut self, peer: &Peer) -> Option<(&Neighbours, &Neighbour)> {
        let version = self.shared.version();
        if version != self.version {
            self.version = version;
            self.seen.clear();
        }
        let address = peer.vxlan.as_ref()?.address;
        let neighbour: &Arc<Neighbour> = match self.seen.entry(peer.id) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => {
                place.insert(self.shared.find(peer.id).filter(|told| told.address == address)?)
            }
        };
        Some((self.shared.as_ref(), neighbour.as_ref()))
    }
}

impl Waiting {
    /// Drops what has waited too long; returns how many.
    fn expire(&mut self, now: Instant) -> usize {
        let before = self.packets.len();
        while self
            .packets
            .front()
            .is_some_and(|(since, _)| now.saturating_duration_since(*since) >= QUEUE_AGE)
        {
            self.packets.pop_front();
        }
        before - self.packets.len()
    }
}

/// Asks who has the destination, and who the node address of the range that holds it (its network address).
fn ask(local: &LocalNode, peer: &Peer, destination: IpAddr, tx: &mut TxBatch) {
    let Some(remote) = &peer.vxlan else { return };
    let to = SocketAddr::new(remote.address, remote.port);
    let range = peer.pod_ranges.iter().find(|range| range.contains(&destination));
    let node = range.map(IpNet::network).filter(|node| *node != destination);
    for target in [Some(destination), node].into_iter().flatten() {
        let Some(room) = tx.reserve(MAX_NEIGHBOUR) else { return };
        let written = match (target, local.address_v4, local.address_v6) {
            (IpAddr::V4(target), Some(ours), _) => vxlan::ask_v4(room, local.vni, local.mac, ours, target),
            (IpAddr::V6(target), _, Some(ours)) => vxlan::ask_v6(room, local.vni, local.mac, ours, target),
            (IpAddr::V4(_), None, _) | (IpAddr::V6(_), _, None) => return,
        };
        if let Ok(len) = written {
            tx.commit(to, Via::Vxlan(0), len);
        }
    }
}

fn is_ours(mesh: &Mesh, address: IpAddr) -> bool {
    match mesh.routes.lookup(address) {
        Some(Owner::LocalPod | Owner::LocalNode) => true,
        Some(Owner::PeerPod(_) | Owner::PeerNode(_)) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::PeerVxlan;

    const OURS: Mac = [2, 0, 0, 0, 0, 1];
    const OLD: Mac = [2, 0, 0, 0, 0, 2];
    const NEW: Mac = [2, 0, 0, 0, 0, 3];

    /// One lane of a node, and a peer that announces no MAC address.
    struct Pair {
        now: Instant,
        link: VxlanLink,
        snapshot: Snapshot,
        tx: TxBatch,
    }

    impl Pair {
        fn new() -> Pair {
            let peer = Peer {
                id: PeerId(0),
                name: "router".into(),
                encap: Some(Encap::Vxlan),
                lanes: Vec::new(),
                endpoints: Vec::new(),
                vxlan: Some(PeerVxlan { address: ip("192.0.2.2"), port: 8472, mac: None }),
                pod_ranges: ["10.244.2.0/24", "fd00:2::/64"].map(|r| r.parse().expect("range")).to_vec(),
                addresses: ["192.0.2.2", "10.244.2.0", "fd00:2::"].map(ip).to_vec(),
                mtu: 1450,
                keepalive: 0,
                ordinary: false,
                takes_strangers: true,
                also: Vec::new(),
            };
            let mut mesh = Mesh::default();
            mesh.vxlan_sources.insert(ip("192.0.2.2"), peer.id);
            mesh.peers.push(Some(Arc::new(peer)));
            let local = LocalNode {
                name: "us".into(),
                address_v4: Some([10, 244, 1, 0].into()),
                address_v6: Some("fd00:1::".parse().expect("address")),
                vni: 1,
                mac: OURS,
            };
            let snapshot = Snapshot {
                generation: 1,
                local: Arc::new(local),
                mesh: Arc::new(mesh),
                services: Arc::default(),
            };
            let mut link = VxlanLink::new(1, Arc::default());
            link.follow(&snapshot.mesh);
            #[allow(clippy::disallowed_methods)] // a test's starting point, not a clock in the code
            let now = Instant::now();
            Pair { now, link, snapshot, tx: TxBatch::new(1 << 16) }
        }

        fn wait(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
            self.link.handle_timeout(self.now, &self.snapshot.local, &mut self.tx);
        }

        fn send(&mut self, destination: &str) -> Sealed {
            let destination = ip(destination);
            let mut packet = Vec::new();
            let step = match destination {
                IpAddr::V4(to) => etherparse::PacketBuilder::ipv4([10, 244, 1, 9], to.octets(), 64),
                IpAddr::V6(to) => etherparse::PacketBuilder::ipv6([0xfd; 16], to.octets(), 64),
            };
            step.udp(1, 2).write(&mut packet, b"hello").expect("built");
            let peer = Arc::clone(self.snapshot.mesh.peer(PeerId(0)).expect("the peer"));
            let local = Arc::clone(&self.snapshot.local);
            self.link.seal(self.now, &local, &peer, 0, destination, &&packet[..], &mut self.tx)
        }

        /// The peer says that an address of its own has this MAC address.
        fn tell(&mut self, address: &str, mac: Mac) {
            let mut room = [0; MAX_NEIGHBOUR];
            let asker = vxlan::NeighbourRequest {
                target: ip(address),
                sender: Some(ip(if ip(address).is_ipv4() { "10.244.1.0" } else { "fd00:1::" })),
                source_mac: OURS,
            };
            let len = vxlan::answer(&mut room, 1, mac, &asker, |_| true).expect("an answer");
            let from = SocketAddr::new(ip("192.0.2.2"), 8472);
            let opened = self.link.open(self.now, &self.snapshot, from, &room[..len], &mut self.tx);
            assert_eq!(opened, Opened::Learnt);
        }

        /// What was sent: the addresses asked for, and the MAC addresses that packets went to.
        fn sent(&mut self) -> (Vec<IpAddr>, Vec<Mac>) {
            let (mut asked, mut went) = (Vec::new(), Vec::new());
            for run in self.tx.runs() {
                for datagram in self.tx.bytes(run).chunks(run.segment) {
                    let to: Mac = datagram[8..14].try_into().expect("six bytes");
                    match vxlan::open(datagram, 1, &to).expect("our own frame") {
                        Inner::Request(request) => asked.push(request.target),
                        Inner::Ip { .. } => went.push(to),
                        Inner::Reply(reply) => panic!("{reply:?}"),
                    }
                }
            }
            self.tx.clear();
            (asked, went)
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    #[test]
    fn a_router_is_found_by_its_own_address() {
        for (pod, node, foreign) in
            [("10.244.2.9", "10.244.2.0", "10.244.9.9"), ("fd00:2::9", "fd00:2::", "fd00:9::9")]
        {
            let mut pair = Pair::new();
            assert_eq!(pair.send(pod).waiting, 1);
            assert_eq!(pair.sent(), (vec![ip(pod), ip(node)], vec![]));
            // Asked again while the packet waits.
            pair.wait(1);
            assert_eq!(pair.sent(), (vec![ip(pod), ip(node)], vec![]));
            pair.tell(node, OLD);
            assert_eq!(pair.sent(), (vec![], vec![OLD]));
            assert_eq!(pair.send(pod).sent, 1);
            assert_eq!(pair.link.waiting(), 0);

            // An address outside its ranges, and the node address itself, are asked for alone.
            for alone in [foreign, node] {
                let mut pair = Pair::new();
                pair.send(alone);
                assert_eq!(pair.sent().0, [ip(alone)]);
            }
        }
    }

    #[test]
    fn what_was_told_long_ago_is_asked_for_while_it_is_used() {
        let mut pair = Pair::new();
        pair.send("10.244.2.9");
        pair.tell("10.244.2.0", OLD);
        pair.sent();
        let asked = vec![ip("10.244.2.9"), ip("10.244.2.0")];
        for _ in 0..3 {
            pair.wait(29);
            pair.send("10.244.2.9");
            assert_eq!(pair.sent(), (vec![], vec![OLD]), "young enough");
            pair.wait(1);
            pair.send("10.244.2.9");
            pair.send("10.244.2.9");
            assert_eq!(pair.sent(), (asked.clone(), vec![OLD, OLD]), "asked once");
            pair.wait(1);
            pair.send("10.244.2.9");
            assert_eq!(pair.sent(), (asked.clone(), vec![OLD]), "asked again");
            pair.tell("10.244.2.0", OLD);
        }
    }

    #[test]
    fn a_device_that_never_answers_is_sent_to_and_one_made_anew_is_found_again() {
        let mut pair = Pair::new();
        pair.send("10.244.2.9");
        pair.tell("10.244.2.0", OLD);
        pair.wait(600);
        pair.sent();
        let asked = vec![ip("10.244.2.9"), ip("10.244.2.0")];
        for _ in 0..100 {
            assert_eq!((pair.send("10.244.2.9").sent, pair.send("10.244.2.9").sent), (1, 1));
            assert_eq!(pair.sent(), (asked.clone(), vec![OLD, OLD]), "asked once a second");
            pair.wait(1);
        }
        pair.tell("10.244.2.0", NEW);
        assert_eq!(pair.send("10.244.2.9").sent, 1);
        assert_eq!(pair.sent(), (vec![], vec![NEW]));
    }

    #[test]
    fn a_peer_that_moved_is_forgotten_by_all_lanes() {
        let mut pair = Pair::new();
        pair.send("10.244.2.9");
        pair.tell("10.244.2.0", OLD);
        assert_eq!(pair.send("10.244.2.9").sent, 1);
        let mut moved = Peer::clone(pair.snapshot.mesh.peer(PeerId(0)).expect("the peer"));
        moved.vxlan = Some(PeerVxlan { address: ip("192.0.2.3"), port: 8472, mac: None });
        let mesh = Arc::new(Mesh { peers: vec![Some(Arc::new(moved.clone()))], ..Mesh::default() });
        for mut link in [VxlanLink::new(1, Arc::clone(&pair.link.learnt.shared)), pair.link] {
            link.follow(&mesh);
            assert!(link.learnt.find(&moved).is_none());
        }
    }
}
