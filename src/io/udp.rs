//! UDP with segmentation and receive offload, many messages a call.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, RawFd};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use thiserror::Error;

use crate::tunnel::TxBatch;
use crate::tunnel::batch::Run;

/// Bytes of one receive slot: the most that the kernel coalesces into one message.
pub const SLOT: usize = 65_536;
/// Messages received in one call.
pub const SLOTS: usize = 8;
/// Messages sent in one call.
const SEND_MESSAGES: usize = 64;
/// Receive buffer: 208 KiB, the usual default, costs 30 to 40 % of throughput.
pub(super) const RECEIVE_BYTES: usize = 8 << 20;
/// Send buffer, which the kernel doubles for its own overhead: room for one batch (1 MiB) while the last one
/// leaves. What does not fit stays in front of the lane, where it can be dropped.
pub(super) const SEND_BYTES: usize = 1 << 20;
/// include/uapi/linux/udp.h
const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;
/// include/uapi/linux/in.h; Linux 3.15 and later.
const IP_PMTUDISC_OMIT: libc::c_int = 5;

/// Why a socket could not be had.
#[derive(Debug, Error)]
pub enum UdpError {
    /// Somebody has the port.
    #[error(
        "UDP port {0} is taken by another program (`ss -lunp sport = :{0}` shows which): stop it, or choose another \
         with --port or --vxlan-port"
    )]
    PortTaken(u16),
    /// Ports below 1024.
    #[error("not allowed to bind UDP port {0}: choose a port above 1023, or run with CAP_NET_BIND_SERVICE")]
    NoPermission(u16),
    /// Anything else.
    #[error("cannot open a UDP socket on port {port}: {source}")]
    Io {
        /// The port.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How to open a socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct UdpOptions {
    /// The port; 0 for any.
    pub port: u16,
    /// Several lanes receive on one port.
    pub share_port: bool,
    /// Ask the kernel to join datagrams on receive.
    pub receive_offload: bool,
    /// Nobody reads: whatever arrives is dropped on arrival.
    pub send_only: bool,
}

/// A socket for both address families where the kernel has IPv6.
#[derive(Debug)]
pub struct UdpSocket {
    socket: Socket,
    v6: bool,
    receive_offload: bool,
    segmentation: bool,
}

impl UdpSocket {
    /// Opens, sizes and binds it; says which offloads the kernel took.
    pub fn bind(options: UdpOptions) -> Result<UdpSocket, UdpError> {
        let fail = |source: io::Error| match source.raw_os_error() {
            Some(libc::EADDRINUSE) => UdpError::PortTaken(options.port),
            Some(libc::EACCES | libc::EPERM) => UdpError::NoPermission(options.port),
            Some(_) | None => UdpError::Io { port: options.port, source },
        };
        let opened = match UdpSocket::open(Domain::IPV6, options) {
            // No IPv6 on this host: an IPv6 socket cannot be had, or exists but cannot be bound.
            Err(e) if e.raw_os_error() != Some(libc::EADDRINUSE) => UdpSocket::open(Domain::IPV4, options),
            opened => opened,
        };
        opened.map_err(fail)
    }

    fn open(domain: Domain, options: UdpOptions) -> io::Result<UdpSocket> {
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        let v6 = domain == Domain::IPV6;
        if v6 {
            socket.set_only_v6(false)?;
        }
        socket.set_nonblocking(true)?;
        if options.share_port {
            socket.set_reuse_port(true)?;
        }
        size_buffers(&socket, options);
        let any = match v6 {
            true => SocketAddr::from((Ipv6Addr::UNSPECIFIED, options.port)),
            false => SocketAddr::from((Ipv4Addr::UNSPECIFIED, options.port)),
        };
        socket.bind(&SockAddr::from(any))?;
        Ok(UdpSocket::finish(socket, v6, options))
    }

    fn finish(socket: Socket, v6: bool, options: UdpOptions) -> UdpSocket {
        let fd = socket.as_raw_fd();
        // Outer packets larger than the path are fragmented rather than lost: inner MTUs follow the path.
        // IPv4 routers do that on the way, so ICMP about it, which anyone can forge, is not needed: it would
        // make small fragments and keep runs from being cut for ten minutes (ip(7), udp(7)).
        if !set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, IP_PMTUDISC_OMIT) {
            set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT);
        }
        if v6 {
            // IPv6 routers do not fragment: only the sender can, and ICMPv6 alone tells it to.
            set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT);
        }
        let receive_offload = options.receive_offload && set_option(fd, libc::SOL_UDP, UDP_GRO, 1);
        // Linux 4.18 and later; setting 0 changes nothing and tells whether the option exists.
        let segmentation = set_option(fd, libc::SOL_UDP, UDP_SEGMENT, 0);
        UdpSocket { socket, v6, receive_offload, segmentation }
    }

    /// The port it is bound to.
    pub fn port(&self) -> u16 {
        self.socket.local_addr().ok().and_then(|a| a.as_socket()).map_or(0, |a| a.port())
    }

    /// What the kernel takes of its receive and its send buffer for less than was asked for, in bytes: it counts
    /// twice what it was asked for (socket(7)). `None` where both are as large as meant.
    pub fn small_buffers(&self) -> Option<[usize; 2]> {
        let [receive, send] = [self.socket.recv_buffer_size(), self.socket.send_buffer_size()];
        let [receive, send] = [receive.unwrap_or(0), send.unwrap_or(0)];
        (receive < 2 * RECEIVE_BYTES || send < 2 * SEND_BYTES).then_some([receive / 2, send / 2])
    }

    /// Whether the kernel joins datagrams for us.
    pub fn receive_offload(&self) -> bool {
        self.receive_offload
    }

    /// Whether the kernel cuts runs for us.
    pub fn segmentation(&self) -> bool {
        self.segmentation
    }

    fn raw_address(&self, to: SocketAddr) -> SockAddr {
        match to {
            SocketAddr::V4(a) if self.v6 => {
                SockAddr::from(SocketAddrV6::new(a.ip().to_ipv6_mapped(), a.port(), 0, 0))
            }
            SocketAddr::V4(_) | SocketAddr::V6(_) => SockAddr::from(to),
        }
    }
}

impl AsRawFd for UdpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Datagrams of one message: back to back in the receive buffer, `stride` bytes each but the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Who sent them.
    pub from: SocketAddr,
    /// Start in the receive buffer.
    pub offset: usize,
    /// Bytes in all.
    pub len: usize,
    /// Bytes of each.
    pub stride: usize,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 64]);

/// Everything that `recvmmsg` wants, made once.
pub struct Receiver {
    names: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    messages: Box<[libc::mmsghdr]>,
}

// SAFETY: the raw pointers inside are rewritten before each call and never followed outside it.
unsafe impl Send for Receiver {}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").finish_non_exhaustive()
    }
}

impl Default for Receiver {
    fn default() -> Receiver {
        // SAFETY: all-zero values are valid for these C structures.
        unsafe {
            Receiver {
                names: vec![std::mem::zeroed(); SLOTS].into_boxed_slice(),
                controls: vec![Control([0; 64]); SLOTS].into_boxed_slice(),
                vectors: vec![std::mem::zeroed(); SLOTS].into_boxed_slice(),
                messages: vec![std::mem::zeroed(); SLOTS].into_boxed_slice(),
            }
        }
    }
}

impl Receiver {
    /// Receives up to [`SLOTS`] messages into `buffer` (`SLOTS * SLOT` bytes) without waiting.
    pub fn receive(
        &mut self,
        socket: &UdpSocket,
        buffer: &mut [u8],
        out: &mut Vec<Received>,
    ) -> io::Result<usize> {
        assert!(buffer.len() >= SLOTS * SLOT);
        for i in 0..SLOTS {
            self.vectors[i] = libc::iovec { iov_base: buffer[i * SLOT..].as_mut_ptr().cast(), iov_len: SLOT };
            let header = &mut self.messages[i].msg_hdr;
            header.msg_name = (&raw mut self.names[i]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[i]).cast();
            header.msg_controllen = size_of::<Control>() as _;
            header.msg_flags = 0;
        }
        // SAFETY: every header points at storage of ours that outlives the call; the kernel writes at
        // most the lengths given.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.messages.as_mut_ptr(),
                SLOTS as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        for i in 0..count as usize {
            let len = (self.messages[i].msg_len as usize).min(SLOT);
            let Some(from) = address(&self.names[i]) else { continue };
            let stride = self.segment_size(i).filter(|s| *s > 0).unwrap_or(len);
            out.push(Received { from, offset: i * SLOT, len, stride });
        }
        Ok(count as usize)
    }

    /// The size of the datagrams that were joined, if they were.
    fn segment_size(&self, index: usize) -> Option<usize> {
        let header = &self.messages[index].msg_hdr;
        // SAFETY: the kernel filled the control buffer and its length; the macros stay inside it.
        unsafe {
            let mut control = libc::CMSG_FIRSTHDR(header);
            while !control.is_null() {
                if (*control).cmsg_level == libc::SOL_UDP && (*control).cmsg_type == UDP_GRO {
                    let size = libc::CMSG_DATA(control).cast::<libc::c_int>().read_unaligned();
                    return usize::try_from(size).ok();
                }
                control = libc::CMSG_NXTHDR(header, control);
            }
        }
        None
    }
}

/// Everything that `sendmmsg` wants, made once.
pub struct Sender {
    names: Vec<SockAddr>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    messages: Box<[libc::mmsghdr]>,
}

// SAFETY: the raw pointers inside are rewritten before each call and never followed outside it.
unsafe impl Send for Sender {}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

impl Default for Sender {
    fn default() -> Sender {
        // SAFETY: all-zero values are valid for these C structures.
        unsafe {
            Sender {
                names: Vec::with_capacity(SEND_MESSAGES),
                controls: vec![Control([0; 64]); SEND_MESSAGES].into_boxed_slice(),
                vectors: vec![std::mem::zeroed(); SEND_MESSAGES].into_boxed_slice(),
                messages: vec![std::mem::zeroed(); SEND_MESSAGES].into_boxed_slice(),
            }
        }
    }
}

impl Sender {
    /// Sends runs of `batch` through `socket`, each as one message (the kernel cuts it). Returns how many
    /// runs were sent; an error is about the first run only.
    pub fn send(&mut self, socket: &UdpSocket, batch: &TxBatch, runs: &[Run]) -> io::Result<usize> {
        let count = runs.len().min(SEND_MESSAGES);
        self.names.clear();
        self.names.extend(runs[..count].iter().map(|run| socket.raw_address(run.to)));
        for (i, run) in runs[..count].iter().enumerate() {
            let bytes = batch.bytes(run);
            self.vectors[i] =
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            let header = &mut self.messages[i].msg_hdr;
            header.msg_name = self.names[i].as_ptr().cast_mut().cast();
            header.msg_namelen = self.names[i].len();
            header.msg_iov = &raw mut self.vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = std::ptr::null_mut();
            header.msg_controllen = 0;
            if run.count > 1 {
                set_segment(header, &mut self.controls[i], run.segment as u16);
            }
        }
        // SAFETY: every header points at storage that outlives the call; the kernel only reads it.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.messages.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
    }
}

fn set_segment(header: &mut libc::msghdr, control: &mut Control, segment: u16) {
    header.msg_control = (&raw mut *control).cast();
    // SAFETY: the control buffer is 64 bytes, aligned, and holds one header with two bytes of data.
    unsafe {
        header.msg_controllen = libc::CMSG_SPACE(size_of::<u16>() as u32) as _;
        let message = libc::CMSG_FIRSTHDR(header);
        (*message).cmsg_level = libc::SOL_UDP;
        (*message).cmsg_type = UDP_SEGMENT;
        (*message).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as u32) as _;
        libc::CMSG_DATA(message).cast::<u16>().write_unaligned(segment);
    }
}

/// Asks for large buffers beyond the system's limit, which needs CAP_NET_ADMIN; else up to the limit.
fn size_buffers(socket: &Socket, options: UdpOptions) {
    let fd = socket.as_raw_fd();
    if options.send_only {
        // The kernel makes of it the least that it allows.
        let _ = socket.set_recv_buffer_size(1);
        drop_all(fd);
    } else if !set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BYTES as libc::c_int) {
        let _ = socket.set_recv_buffer_size(RECEIVE_BYTES);
    }
    if !set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, SEND_BYTES as libc::c_int) {
        let _ = socket.set_send_buffer_size(SEND_BYTES);
    }
}

/// A socket filter of one instruction: keep nothing of any datagram. Where it is refused, the buffer fills.
fn drop_all(fd: RawFd) {
    let mut code = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    // SAFETY: the kernel reads one sock_fprog and the one instruction it points at; both outlive the call.
    unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as u32,
        );
    }
}

fn set_option(fd: RawFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> bool {
    // SAFETY: the option's value is one int on our stack.
    unsafe {
        libc::setsockopt(fd, level, name, (&raw const value).cast(), size_of::<libc::c_int>() as u32) == 0
    }
}

/// The address in a `sockaddr_storage`; IPv4 addresses that came through an IPv6 socket become IPv4 again.
fn address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that this is a sockaddr_in, which fits into the storage.
            let raw = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
            Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(raw.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that this is a sockaddr_in6, which fits into the storage.
            let raw = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            let port = u16::from_be(raw.sin6_port);
            Some(match ip.to_ipv4_mapped() {
                Some(v4) => SocketAddr::V4(SocketAddrV4::new(v4, port)),
                None => SocketAddr::V6(SocketAddrV6::new(ip, port, 0, raw.sin6_scope_id)),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket as Plain;

    use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

    use super::*;

    fn queued(socket: &UdpSocket) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit(); 1];
        socket.socket.peek(&mut byte).is_ok()
    }

    #[test]
    fn a_socket_that_only_sends_keeps_nothing_that_arrives() {
        let sender = Plain::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        for send_only in [true, false] {
            let socket =
                UdpSocket::bind(UdpOptions { send_only, ..UdpOptions::default() }).expect("a socket");
            // Over the loopback a datagram has arrived, or been dropped, when the call returns.
            let sent = sender.send_to(&[7; 100], (Ipv4Addr::LOCALHOST, socket.port()));
            assert!(sent.is_ok());
            assert_eq!(queued(&socket), !send_only);
            let room = socket.socket.recv_buffer_size().expect("a size");
            assert_eq!(room < 8192, send_only, "{room} bytes of receive buffer");
        }
    }

    /// Sends `count` datagrams of `size` bytes and a shorter one in one call, filled with their numbers.
    fn send_run(from: &Plain, to: SocketAddr, count: u8, size: usize) -> Vec<Vec<u8>> {
        let last = if count > 1 { size.div_ceil(3) } else { size };
        let datagrams: Vec<Vec<u8>> =
            (1..=count).map(|i| vec![i; if i == count { last } else { size }]).collect();
        let (all, segment) = (datagrams.concat(), size as u16);
        let cut = [ControlMessage::UdpGsoSegments(&segment)];
        let (cut, bytes) = (if count > 1 { &cut[..] } else { &[] }, [io::IoSlice::new(&all)]);
        let to = SockaddrStorage::from(to);
        let sent = sendmsg(from.as_raw_fd(), &bytes, cut, MsgFlags::empty(), Some(&to)).expect("send a run");
        assert_eq!(sent, all.len());
        datagrams
    }

    /// Two senders, IPv4 and IPv6, whose runs alternate.
    #[test]
    fn one_call_receives_several_runs_each_with_its_sender_and_its_size() {
        let v4 = Plain::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        let v6 = Plain::bind((Ipv6Addr::LOCALHOST, 0)).expect("a socket");
        for receive_offload in [true, false] {
            let options = UdpOptions { receive_offload, ..UdpOptions::default() };
            let socket = UdpSocket::bind(options).expect("a socket");
            assert_eq!(socket.receive_offload(), receive_offload);
            let mut expected = Vec::new();
            for (from, count, size) in
                [(&v4, 40, 1200), (&v6, 3, 90), (&v4, 1, 700), (&v6, 60, 1000), (&v4, 2, 1), (&v6, 5, 8000)]
            {
                let address = from.local_addr().expect("an address");
                let datagrams = send_run(from, SocketAddr::new(address.ip(), socket.port()), count, size);
                expected.extend(datagrams.into_iter().map(|datagram| (address, datagram)));
            }
            let (mut receiver, mut buffer) = (Receiver::default(), vec![0; SLOTS * SLOT]);
            let (mut seen, mut calls) = (Vec::new(), 0);
            while seen.len() < expected.len() {
                let mut received = Vec::new();
                let count = receiver.receive(&socket, &mut buffer, &mut received).expect("more to receive");
                assert_eq!(count, received.len());
                for message in received {
                    let bytes = &buffer[message.offset..message.offset + message.len];
                    let cut = bytes.chunks(message.stride).map(|bytes| (message.from, bytes.to_vec()));
                    seen.extend(cut);
                }
                calls += 1;
            }
            assert!(seen == expected, "receive offload {receive_offload}: other datagrams, or by others");
            let least = if receive_offload { 1 } else { expected.len().div_ceil(SLOTS) };
            assert_eq!(calls, least, "receive offload {receive_offload}");
            let more = receiver.receive(&socket, &mut buffer, &mut Vec::new()).map_err(|e| e.kind());
            assert_eq!(more, Err(io::ErrorKind::WouldBlock));
        }
    }

    #[test]
    fn icmp_does_not_lower_what_an_ipv4_path_carries() {
        let socket = UdpSocket::bind(UdpOptions::default()).expect("a socket");
        let (mut value, mut len) = (0 as libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: the kernel writes one int and its length, both on our stack.
        let got = unsafe {
            let value = (&raw mut value).cast();
            libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value, &raw mut len)
        };
        assert_eq!((got, value), (0, IP_PMTUDISC_OMIT));
    }
}
