//! A tunnel of Warren's own lanes between the two processes, which nothing else on either machine notices.
//!
//! Each side makes a network namespace of its own, on a thread; in it is the TUN, and in it sockets for traffic are
//! opened. The lane's UDP socket was opened before, where the program was started, and a socket stays where it was
//! made. So packets go the way that an agent's go: socket, kernel, TUN, lane, UDP; and back. No route, rule or
//! device of the machine changes, no running agent is touched (a port that it has is refused, not shared), and
//! with the last thread and descriptor everything is gone, however the process ends.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::TryStreamExt;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{Handle, LinkUnspec};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use thiserror::Error;
use x25519_dalek::StaticSecret;

use super::ending::{Ending, LOOK_EVERY};
use super::message::{Offer, Wrap};
use super::secret::{NoRandom, draw};
use crate::datapath::affinity::Affinity;
use crate::datapath::conntrack::{FlowTable, Seed};
use crate::io::clock;
use crate::io::fleet::{self, Fleet, FleetConfig, FleetError, LaneSockets, Ports};
use crate::io::lane::LaneOffloads;
use crate::io::tun::TunError;
use crate::io::udp::UdpError;
use crate::snapshot::{Encap, LaneId, LocalNode, Mesh, Owner, Peer, PeerId, PeerLane, PeerVxlan, Snapshot};
use crate::tunnel::wireguard::Keys;

/// The TUN, which only this process sees.
const TUN: &str = "bench0";
/// RFC 2544 gave 198.18.0.0/15 to benchmarks: nobody's own network.
const ASKER: Ipv4Addr = Ipv4Addr::new(198, 19, 87, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 19, 87, 2);
const PREFIX: u8 = 30;
const VNI: u32 = 87;
/// As few as there may be: no packet of ours is translated.
const FLOWS: u32 = 1 << 10;
const CLIENTS: usize = 64;
/// RFC 791 3.1: every host takes that.
const MIN_MTU: u16 = 576;

/// Which end of the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Who asked for it.
    Asker,
    /// Who serves.
    Server,
}

impl End {
    /// The address inside.
    pub(super) const fn address(self) -> Ipv4Addr {
        match self {
            End::Asker => ASKER,
            End::Server => SERVER,
        }
    }

    const fn other(self) -> End {
        match self {
            End::Asker => End::Server,
            End::Server => End::Asker,
        }
    }
}

/// Why there is no tunnel, and what to do.
#[derive(Debug, Error)]
pub(super) enum BurrowError {
    /// No namespace.
    #[error(
        "a network namespace of its own needs CAP_SYS_ADMIN and CAP_NET_ADMIN: run warren bench as root, in a \
         container privileged"
    )]
    Forbidden,
    /// The kernel has none.
    #[error("no network namespace can be made: {0}")]
    Namespace(io::Error),
    /// No TUN.
    #[error("/dev/net/tun is missing: modprobe tun; a container needs to be privileged")]
    NoTun,
    /// It may not be used.
    #[error("/dev/net/tun may not be used: run warren bench as root, in a container privileged")]
    TunForbidden,
    /// The lanes.
    #[error(transparent)]
    Lanes(FleetError),
    /// Somebody has the port.
    #[error(
        "UDP port {0} is taken by another program (`ss -lunp sport = :{0}` shows which): choose another with --port, \
         of which WireGuard has the first and VXLAN the next"
    )]
    PortTaken(u16),
    /// Another trouble with a port.
    #[error(transparent)]
    Udp(UdpError),
    /// Netlink.
    #[error("cannot {doing}: {source}")]
    Network {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// Any other call.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// No random numbers.
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
    /// What the other side said of its end makes no sense.
    #[error("the other side's end of the tunnel makes no sense")]
    Nonsense,
}

impl From<UdpError> for BurrowError {
    fn from(error: UdpError) -> BurrowError {
        match error {
            UdpError::PortTaken(port) => BurrowError::PortTaken(port),
            UdpError::NoPermission(_) | UdpError::Io { .. } => BurrowError::Udp(error),
        }
    }
}

impl From<FleetError> for BurrowError {
    fn from(error: FleetError) -> BurrowError {
        match error {
            FleetError::Tun(TunError::Missing) => BurrowError::NoTun,
            FleetError::Tun(TunError::Forbidden | TunError::NoPermission(_)) => BurrowError::TunForbidden,
            FleetError::Tun(
                TunError::OtherKind(_) | TunError::Busy(_) | TunError::BadName(_) | TunError::Io { .. },
            )
            | FleetError::Udp(_)
            | FleetError::Io(_) => BurrowError::Lanes(error),
        }
    }
}

/// An end that has its key, sockets and namespace, and waits to hear of the other end.
pub(super) struct Draft {
    wrap: Wrap,
    end: End,
    secret: StaticSecret,
    mac: [u8; 6],
    sockets: Vec<LaneSockets>,
    room: Room,
}

impl Draft {
    /// Makes one. `port` 0 is any; nobody else may have it.
    pub(super) fn new(wrap: Wrap, end: End, port: u16) -> Result<Draft, BurrowError> {
        // First what is refused most often.
        let room = Room::new()?;
        let ports = match wrap {
            Wrap::WireGuard => Ports { wireguard: port, vxlan: None, share_vxlan: false },
            Wrap::Vxlan => Ports { wireguard: 0, vxlan: Some(port), share_vxlan: false },
        };
        let sockets = LaneSockets::open(1, ports, LaneOffloads::default().udp_receive)?;
        let mut mac: [u8; 6] = draw()?;
        // Locally administered, and one machine's (IEEE 802).
        mac[0] = mac[0] & 0xfc | 0x02;
        Ok(Draft { wrap, end, secret: StaticSecret::random(), mac, sockets, room })
    }

    /// What the other side has to know.
    pub(super) fn offer(&self, mtu: u16) -> Offer {
        let port = self.sockets.first().map_or(0, |lane| match self.wrap {
            Wrap::WireGuard => lane.wireguard_port(),
            Wrap::Vxlan => lane.vxlan_port().unwrap_or(0),
        });
        let key = x25519_dalek::PublicKey::from(&self.secret).to_bytes();
        Offer { encap: self.wrap, key, port, mac: self.mac, mtu }
    }

    /// Joins it to the other end, which is at that address.
    pub(super) fn build(self, theirs: Offer, at: IpAddr, ending: &Ending) -> Result<Burrow, BurrowError> {
        let Draft { wrap, end, secret, mac, sockets, room } = self;
        let sane =
            theirs.port != 0 && theirs.encap == wrap && theirs.key != [0; 32] && theirs.mac[0] & 1 == 0;
        if !sane || theirs.mtu < MIN_MTU {
            return Err(BurrowError::Nonsense);
        }
        let snapshot = snapshot(end, mac, &theirs, at.to_canonical());
        let seed = fleet::random_seed().map_err(io_error("draw random numbers"))?;
        let table = FlowTable::in_memory(FLOWS, Seed(seed.0, seed.1)).map_err(|e| BurrowError::Io {
            doing: "make a flow table",
            source: io::Error::other(e.to_string()),
        })?;
        let config = FleetConfig {
            tun: TUN.to_owned(),
            keys: vec![Keys { current: secret, also: None }],
            sockets,
            pinned: false,
            offloads: LaneOffloads::default(),
            flows: Arc::new(table),
            affinity: Arc::new(Affinity::in_memory(CLIENTS)),
            snapshot: Arc::new(ArcSwap::from_pointee(snapshot)),
        };
        let ending = ending.clone();
        let ended = move |_, reason: String| ending.raise(format!("a lane of the tunnel ended: {reason}"));
        // The lane's thread is begun in the namespace: where it would make its TUN anew, should that go.
        let fleet = room.within(move || Fleet::start(config, ended).map_err(BurrowError::from))??;
        room.within(move || configure(end.address(), theirs.mtu))??;
        Ok(Burrow { _fleet: fleet, room })
    }
}

/// One end of a tunnel.
pub(super) struct Burrow {
    /// Before the room: the lane lives in it.
    _fleet: Fleet,
    room: Room,
}

/// Where the traffic of a task is: the machine's own network, or inside a tunnel. Threads need not go there: only
/// sockets must have been opened there.
#[derive(Clone, Copy)]
pub(super) enum Ground<'a> {
    /// Where the program was started.
    Open,
    /// Inside.
    Inside(&'a Burrow),
}

impl Ground<'_> {
    /// Opens a connection, unless it is over before that.
    pub(super) fn connect(self, to: SocketAddr, within: Duration, end: &Ending) -> io::Result<TcpStream> {
        // Only the socket must be made there.
        let socket = self.open(move || begin_connection(to))?;
        finish_connection(socket, within, end)
    }

    /// Opens a socket for datagrams.
    pub(super) fn datagrams(self, at: SocketAddr) -> io::Result<UdpSocket> {
        self.open(move || UdpSocket::bind(at))
    }

    /// Listens for connections, which get this congestion control: a namespace of its own may begin with another
    /// than there is outside.
    pub(super) fn listen(self, at: SocketAddr, congestion: &str) -> io::Result<TcpListener> {
        let listener = self.open(move || listen(at))?;
        let _ = SockRef::from(&listener).set_tcp_congestion(congestion.as_bytes());
        Ok(listener)
    }

    fn open<T: Send + 'static>(self, open: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        match self {
            Ground::Open => open(),
            Ground::Inside(burrow) => {
                burrow.room.within(open).map_err(|e| io::Error::other(e.to_string()))?
            }
        }
    }
}

fn begin_connection(to: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => Err(error),
        Ok(()) | Err(_) => Ok(socket),
    }
}

/// Looks around while it waits.
fn finish_connection(socket: Socket, within: Duration, end: &Ending) -> io::Result<TcpStream> {
    let until = clock::now() + within;
    loop {
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        // Interrupted: looked at once more.
        if poll(&mut ready, PollTimeout::from(LOOK_EVERY.as_millis() as u8)).is_ok_and(|ready| ready > 0) {
            break;
        }
        if let Some(reason) = end.reason() {
            return Err(io::Error::other(reason));
        }
        if clock::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}

/// For both families where it is any address, so that it need not be told twice.
pub(super) fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    if at.is_ipv6() {
        socket.set_only_v6(!at.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(at))?;
    socket.listen(128)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with the thread that keeps it.
struct Room {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Room {
    fn new() -> Result<Room, BurrowError> {
        let (jobs, orders) = sync_channel::<Job>(1);
        let (report, done) = sync_channel(1);
        let live = move || {
            let made = unshare(CloneFlags::CLONE_NEWNET);
            let _ = report.send(made);
            while made.is_ok()
                && let Ok(job) = orders.recv()
            {
                job();
            }
        };
        let thread = thread::Builder::new().name("burrow".to_owned()).spawn(live);
        let thread = Some(thread.map_err(io_error("start a thread"))?);
        let room = Room { jobs: Some(jobs), thread };
        match done.recv() {
            Ok(Ok(())) => Ok(room),
            Ok(Err(Errno::EPERM)) => Err(BurrowError::Forbidden),
            Ok(Err(error)) => Err(BurrowError::Namespace(error.into())),
            Err(_) => Err(io_error("start a thread")(io::ErrorKind::Other.into())),
        }
    }

    /// Does something on the thread.
    fn within<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T, BurrowError> {
        let (report, done) = sync_channel(1);
        let job = Box::new(move || {
            let _ = report.send(job());
        });
        let gone = || io_error("work in a network namespace")(io::Error::other("its thread is gone"));
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or_else(gone)?;
        done.recv().map_err(|_| gone())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> BurrowError {
    move |source| BurrowError::Io { doing, source }
}

/// A mesh of two: what an agent compiles out of Node objects for a peer with one address and no pods.
fn snapshot(end: End, mac: [u8; 6], theirs: &Offer, at: IpAddr) -> Snapshot {
    let (id, encap) = (PeerId(0), Encap::from(theirs.encap));
    let inside = IpAddr::from(end.other().address());
    let vxlan = PeerVxlan { address: at, port: theirs.port, mac: Some(theirs.mac) };
    let peer = Peer {
        id,
        name: "the other side".to_owned(),
        encap: Some(encap),
        lanes: vec![PeerLane { key: theirs.key, port: theirs.port }],
        endpoints: vec![SocketAddr::new(at, theirs.port)],
        vxlan: (encap == Encap::Vxlan).then_some(vxlan),
        pod_ranges: Vec::new(),
        addresses: vec![inside],
        mtu: theirs.mtu,
        keepalive: 0,
        ordinary: false,
        takes_strangers: false,
        also: Vec::new(),
    };
    let mut mesh = Mesh::default();
    mesh.routes.insert(IpAddr::from(end.address()).into(), Owner::LocalNode);
    mesh.routes.insert(inside.into(), Owner::PeerNode(id));
    mesh.keys.insert(theirs.key, (id, LaneId(0)));
    if encap == Encap::Vxlan {
        mesh.vxlan_sources.insert(at, id);
    }
    mesh.peers.push(Some(Arc::new(peer)));
    let local = LocalNode {
        name: "this side".to_owned(),
        address_v4: Some(end.address()),
        address_v6: None,
        vni: VNI,
        mac,
    };
    Snapshot { generation: 1, local: Arc::new(local), mesh: Arc::new(mesh), services: Arc::default() }
}

/// The TUN up, with its address and MTU; the route comes with the address.
fn configure(address: Ipv4Addr, mtu: u16) -> Result<(), BurrowError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    runtime.map_err(io_error("start a runtime"))?.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(io_error("open netlink"))?;
        tokio::spawn(connection);
        let tun = index(&handle).await?;
        let wrong = |doing| move |source| BurrowError::Network { doing, source };
        // The name of the loopback device in a new namespace is fixed, and so is its index.
        let up = LinkUnspec::new_with_index(1).up().build();
        handle.link().set(up).execute().await.map_err(wrong("bring the loopback device up"))?;
        let request = handle.address().add(tun, address.into(), PREFIX);
        request.execute().await.map_err(wrong("give the tunnel device its address"))?;
        let up = LinkUnspec::new_with_index(tun).mtu(u32::from(mtu)).up().build();
        handle.link().set(up).execute().await.map_err(wrong("bring the tunnel device up"))
    })
}

async fn index(handle: &Handle) -> Result<u32, BurrowError> {
    let found = handle.link().get().match_name(TUN.to_owned()).execute().try_next().await;
    let found = found.map_err(|source| BurrowError::Network { doing: "find the tunnel device", source })?;
    let missing = || io_error("find the tunnel device")(io::ErrorKind::NotFound.into());
    Ok(found.ok_or_else(missing)?.header.index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::streams;

    fn offer(encap: Wrap) -> Offer {
        Offer { encap, key: [7; 32], port: 5188, mac: [2, 0, 0, 0, 0, 2], mtu: 1420 }
    }

    #[test]
    fn each_end_knows_the_other_and_nobody_else() {
        let at: IpAddr = "192.0.2.7".parse().expect("an address");
        for end in [End::Asker, End::Server] {
            for wrap in [Wrap::WireGuard, Wrap::Vxlan] {
                let snapshot = snapshot(end, [2; 6], &offer(wrap), at);
                let mesh = &snapshot.mesh;
                let owner = |address: Ipv4Addr| mesh.routes.lookup(address.into());
                assert_eq!(owner(end.address()), Some(Owner::LocalNode));
                assert_eq!(owner(end.other().address()), Some(Owner::PeerNode(PeerId(0))));
                assert_eq!(owner(Ipv4Addr::new(10, 0, 0, 1)), None);
                let peer = mesh.peer(PeerId(0)).expect("there");
                assert_eq!(peer.encap, Some(wrap.into()));
                assert_eq!(mesh.vxlan_sources.contains_key(&at), wrap == Wrap::Vxlan);
                assert_eq!(peer.vxlan.is_some(), wrap == Wrap::Vxlan);
            }
        }
    }

    #[test]
    fn any_address_is_listened_to_in_both_families() {
        let Ok(listener) = listen("[::]:0".parse().expect("an address")) else {
            return assert!(listen("0.0.0.0:0".parse().expect("an address")).is_ok(), "no IPv6 here");
        };
        let port = listener.local_addr().expect("bound").port();
        for address in ["127.0.0.1", "::1"] {
            let to = SocketAddr::new(address.parse().expect("an address"), port);
            assert!(TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_ok(), "{to}");
        }
    }

    #[test]
    fn what_is_accepted_has_the_congestion_control_that_was_given() {
        let at = "127.0.0.1:0".parse().expect("an address");
        // Both are in every kernel, and one of them is not its default.
        for wanted in ["reno", "cubic"] {
            let listener = Ground::Open.listen(at, wanted).expect("a port");
            let to = listener.local_addr().expect("bound");
            let client = TcpStream::connect(to).expect("connected");
            let (accepted, _) = listener.accept().expect("accepted");
            assert_eq!(streams::congestion(&accepted), wanted);
            drop(client);
        }
    }

    #[test]
    fn a_connection_that_nobody_takes_ends_with_the_rest() {
        // Room for one connection: who asks for another gets no answer.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SockAddr::from(SocketAddr::from(([127, 0, 0, 1], 0)))).expect("a port");
        socket.listen(0).expect("listening");
        let to = socket.local_addr().expect("bound").as_socket().expect("IPv4");
        let (end, second) = (Ending::default(), Duration::from_secs(1));
        let mut queued = Vec::new();
        let refused = loop {
            match Ground::Open.connect(to, second / 4, &end) {
                Ok(stream) => queued.push(stream),
                Err(error) => break error,
            }
            assert!(queued.len() < 10, "no limit");
        };
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(second / 4);
                end.raise("stopped by a signal");
            });
            let begun = clock::now();
            let error = Ground::Open.connect(to, 60 * second, &end).expect_err("nobody takes it");
            assert_eq!(error.to_string(), "stopped by a signal");
            assert!(clock::now() - begun < 10 * second);
        });
        drop(socket);
        let error = Ground::Open.connect(to, second, &Ending::default()).expect_err("nobody is there");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_port_that_is_taken_is_told_by_a_flag_that_there_is() {
        let text = BurrowError::from(UdpError::PortTaken(5188)).to_string();
        assert!(text.contains("is taken by another program") && text.contains("--port,"), "{text}");
        assert!(!text.contains("--vxlan-port"), "{text}");
    }
}
