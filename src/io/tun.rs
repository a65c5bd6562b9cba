//! The TUN device: its queues are opened by our own ioctls, with the virtio header, several queues and
//! no packet information from the first day (a persistent device keeps these flags for life), and
//! handed to the `tun` crate, which owns and reads the descriptor.

use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

/// Largest read: a virtio header and a super-packet of 64 KiB with IPv6 header.
pub const READ_BYTES: usize = 10 + 65_535 + 40;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
/// include/uapi/linux/if_tun.h
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;
const TUN_F_USO4: libc::c_uint = 0x20;
const TUN_F_USO6: libc::c_uint = 0x40;

/// Why the TUN could not be had, and what to do.
#[derive(Debug, Error)]
pub enum TunError {
    /// The device file is not there.
    #[error(
        "/dev/net/tun is missing: load the module (`modprobe tun`) or give the container the device /dev/net/tun"
    )]
    Missing,
    /// The device file may not be opened.
    #[error("/dev/net/tun may not be opened: run as root, or allow it with `chmod 666 /dev/net/tun`")]
    Forbidden,
    /// Not allowed to make the interface.
    #[error("not allowed to make the interface {0}: the agent needs root or the capability CAP_NET_ADMIN")]
    NoPermission(String),
    /// The interface exists with other properties.
    #[error(
        "the interface {0} exists and is no multi-queue TUN with virtio headers: choose another name with --tun-name \
         (only if `ip -d link show {0}` says that it is a tun which nobody uses, you may remove it instead)"
    )]
    OtherKind(String),
    /// Something holds all queues.
    #[error(
        "the interface {0} is in use by another program: stop it, or choose another name with --tun-name"
    )]
    Busy(String),
    /// Interface names have at most 15 bytes.
    #[error("`{0}` is no interface name: 1 to 15 characters, no slash and no space")]
    BadName(String),
    /// Anything else the kernel said.
    #[error("cannot open a queue of the TUN {name}: {source}")]
    Io {
        /// The interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What the kernel hands over in one piece and takes back in one piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunOffloads {
    /// TCP super-packets.
    pub tcp: bool,
    /// UDP super-packets (Linux 6.2 and later).
    pub udp: bool,
}

impl TunOffloads {
    /// What both have.
    fn and(self, other: TunOffloads) -> TunOffloads {
        TunOffloads { tcp: self.tcp && other.tcp, udp: self.udp && other.udp }
    }
}

/// One lane's queue of the TUN.
///
/// With several queues the kernel leads what is sent on a flow to the queue that was written to last on it, and
/// after three seconds without a write to the one that its hash of the flow says (`tun_automq_select_queue`): a flow
/// would change its lane, and overtake itself, with each answer that comes late or in the middle of a burst. What is
/// written by a descriptor that is detached from its queue leaves no such trace (`tun_get_user`): then the hash alone
/// decides, for as long as there are the same queues. It is of addresses and ports, of fragments and what has no ports
/// of addresses alone, and so of all IPv6 with a flow label on kernels before a5e2151ff9d5 (September 2023).
pub struct TunQueue {
    reader: tun::Device,
    /// Detached; `None` where there is only one queue.
    writer: Option<tun::Device>,
    offloads: TunOffloads,
}

impl std::fmt::Debug for TunQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TunQueue").field("fd", &self.as_raw_fd()).field("offloads", &self.offloads).finish()
    }
}

impl TunQueue {
    /// What this queue did when it was opened.
    pub fn offloads(&self) -> TunOffloads {
        self.offloads
    }

    /// Reads one frame: virtio header and packet.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.recv(buffer)
    }

    /// Writes one frame from pieces.
    pub fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        // SAFETY: IoSlice is guaranteed to have the layout of iovec, the slices outlive the call, and
        // the descriptor is open for as long as `self` is.
        let written = unsafe {
            libc::writev(
                self.writer.as_ref().unwrap_or(&self.reader).as_raw_fd(),
                pieces.as_ptr().cast::<libc::iovec>(),
                pieces.len().min(libc::UIO_MAXIOV as usize) as libc::c_int,
            )
        };
        if written < 0 { Err(io::Error::last_os_error()) } else { Ok(written as usize) }
    }
}

/// What the queues of all lanes have in common.
#[derive(Debug)]
pub struct TunQueues {
    several: bool,
    /// What no lane has given up. Offloads are the device's, not a queue's: whoever sets them sets those of all.
    /// Locked only for that and to open a queue, never for a packet.
    left: Mutex<TunOffloads>,
}

impl TunQueues {
    /// For so many lanes.
    pub fn new(lanes: usize) -> TunQueues {
        TunQueues { several: lanes > 1, left: Mutex::new(TunOffloads { tcp: true, udp: true }) }
    }

    /// Opens one more queue of the interface, which is made if it is not there and outlives us. It has those of the
    /// wanted offloads that are left; what the kernel refuses is not used, by no lane.
    pub fn open(&self, name: &str, wanted: TunOffloads) -> Result<TunQueue, TunError> {
        let mut left = self.left();
        // Before the queue itself: then both have the same number, and what is written bears one that exists, as long as
        // nobody else has queues of the device (`agent::presence` sees to that).
        let writer = self.several.then(|| detached(name)).transpose()?;
        let reader = attached(name)?;
        // SAFETY: TUNSETPERSIST takes its argument by value.
        if unsafe { libc::ioctl(reader.as_raw_fd(), TUNSETPERSIST as _, 1 as libc::c_ulong) } < 0 {
            return Err(TunError::Io { name: name.to_owned(), source: io::Error::last_os_error() });
        }
        let offloads = set_offloads(reader.as_raw_fd(), left.and(wanted));
        *left = offloads;
        Ok(TunQueue { reader, writer, offloads })
    }

    /// Gives up offloads that turned out not to work, for the whole device and for every queue to come.
    pub fn limit(&self, queue: &TunQueue, wanted: TunOffloads) {
        let mut left = self.left();
        *left = set_offloads(queue.as_raw_fd(), left.and(wanted));
    }

    fn left(&self) -> MutexGuard<'_, TunOffloads> {
        // A lane that panicked has left it whole.
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for TunQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.reader.as_raw_fd()
    }
}

/// Opens a queue of the interface, which is made if it is not there.
fn attached(name: &str) -> Result<tun::Device, TunError> {
    if name.is_empty() || name.len() > 15 || name.contains(['/', ' ', '\0']) {
        return Err(TunError::BadName(name.to_owned()));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::Missing,
            Some(libc::EACCES | libc::EPERM) => TunError::Forbidden,
            Some(_) | None => TunError::Io { name: name.to_owned(), source: e },
        })?;
    set_interface(file.as_raw_fd(), name)?;
    let mut config = tun::Configuration::default();
    config.raw_fd(file.into_raw_fd()).close_fd_on_drop(true).tun_name(name);
    tun::Device::new(&config)
        .map_err(|e| TunError::Io { name: name.to_owned(), source: io::Error::other(e.to_string()) })
}

/// A descriptor that can write, but is led nothing to read: but for the moment before it is detached, what the kernel
/// leads there is lost.
fn detached(name: &str) -> Result<tun::Device, TunError> {
    let device = attached(name)?;
    let request = request("", libc::IFF_DETACH_QUEUE);
    // SAFETY: TUNSETQUEUE reads one ifreq, which lives on our stack.
    if unsafe { libc::ioctl(device.as_raw_fd(), TUNSETQUEUE as _, &raw const request) } < 0 {
        return Err(TunError::Io { name: name.to_owned(), source: io::Error::last_os_error() });
    }
    Ok(device)
}

fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

fn set_interface(fd: RawFd, name: &str) -> Result<(), TunError> {
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let mut request = request(name, flags);
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives on our stack.
    if unsafe { libc::ioctl(fd, TUNSETIFF as _, &raw mut request) } < 0 {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => TunError::NoPermission(name.to_owned()),
            Some(libc::EINVAL) => TunError::OtherKind(name.to_owned()),
            Some(libc::EBUSY | libc::E2BIG) => TunError::Busy(name.to_owned()),
            Some(_) | None => TunError::Io { name: name.to_owned(), source: error },
        });
    }
    Ok(())
}

/// Tries the wanted offloads, then less, until the kernel agrees.
fn set_offloads(fd: RawFd, wanted: TunOffloads) -> TunOffloads {
    let without_udp = TunOffloads { tcp: wanted.tcp, udp: false };
    for offloads in [wanted, without_udp] {
        let mut flags = 0;
        if offloads.tcp || offloads.udp {
            flags |= TUN_F_CSUM;
        }
        if offloads.tcp {
            flags |= TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        }
        if offloads.udp {
            flags |= TUN_F_USO4 | TUN_F_USO6;
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        if unsafe { libc::ioctl(fd, TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) } >= 0 {
            return offloads;
        }
        // Not refused: the device is gone. Whoever opens it again asks again.
        if io::Error::last_os_error().raw_os_error() == Some(libc::EBADFD) {
            return wanted;
        }
    }
    // SAFETY: as above; without any flag the call cannot be refused.
    unsafe { libc::ioctl(fd, TUNSETOFFLOAD as _, 0 as libc::c_ulong) };
    TunOffloads::default()
}
