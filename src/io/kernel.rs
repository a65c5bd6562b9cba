//! The seam between a lane and the kernel: every system call of the packet loop, and its clock, goes
//! through [`Kernel`], so that a test can refuse, lose or delay any of them.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::EventFd;
use tracing::warn;

use super::tun::{TunOffloads, TunQueue, TunQueues};
use super::udp::{Received, Receiver, Sender, UdpSocket};
use crate::snapshot::Encap;
use crate::tunnel::batch::Run;
use crate::tunnel::{TxBatch, Via};

/// What a lane asks of the kernel.
pub trait Kernel {
    /// The monotonic clock.
    fn now(&self) -> Instant;
    /// Reads one frame from the TUN without waiting.
    fn read_tun(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes one frame to the TUN from pieces.
    fn write_tun(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize>;
    /// Opens the TUN again after somebody removed it; which of the wanted offloads it has.
    fn reopen_tun(&mut self, wanted: TunOffloads) -> io::Result<TunOffloads>;
    /// Uses only these TUN offloads from now on.
    fn limit_tun_offloads(&mut self, offloads: TunOffloads);
    /// Receives datagrams of one encapsulation without waiting.
    fn receive(&mut self, encap: Encap, buffer: &mut [u8], out: &mut Vec<Received>) -> io::Result<usize>;
    /// Sends runs that share a socket without waiting; returns how many, an error is about the first.
    fn send(&mut self, batch: &TxBatch, runs: &[Run]) -> io::Result<usize>;
    /// Sleeps until something happens that is watched, or the time is over.
    fn wait(&mut self, timeout: Option<Duration>, watch: Watch) -> io::Result<()>;
    /// Lets other threads run.
    fn yield_now(&mut self);
}

/// What wakes a lane that sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Something to read, or the bell.
    Everything,
    /// Datagrams to read, the bell, or room in this socket, which was full: the TUN has to wait for that.
    AllButTun(Via),
    /// The bell.
    Bell,
}

/// The real kernel.
#[derive(Debug)]
pub struct Linux {
    /// The interface.
    pub name: String,
    /// The lane's TUN queue.
    pub tun: TunQueue,
    /// What all lanes' queues have in common.
    pub queues: Arc<TunQueues>,
    /// The lane's WireGuard socket.
    pub wireguard: UdpSocket,
    /// VXLAN's receiving socket, if the node speaks it.
    pub vxlan: Option<UdpSocket>,
    /// VXLAN's sending sockets.
    pub vxlan_sources: Vec<UdpSocket>,
    /// Rung to wake the lane.
    pub bell: Arc<EventFd>,
    /// Reused by every receive.
    pub receiver: Receiver,
    /// Reused by every send.
    pub sender: Sender,
}

impl Kernel for Linux {
    fn now(&self) -> Instant {
        super::clock::now()
    }

    fn read_tun(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tun.read(buffer)
    }

    fn write_tun(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.tun.write(pieces)
    }

    fn reopen_tun(&mut self, wanted: TunOffloads) -> io::Result<TunOffloads> {
        let queue = self.queues.open(&self.name, wanted);
        self.tun = queue.map_err(|e| io::Error::other(e.to_string()))?;
        warn!("somebody removed the interface {}: it was made again", self.name);
        Ok(self.tun.offloads())
    }

    fn limit_tun_offloads(&mut self, offloads: TunOffloads) {
        self.queues.limit(&self.tun, offloads);
    }

    fn receive(&mut self, encap: Encap, buffer: &mut [u8], out: &mut Vec<Received>) -> io::Result<usize> {
        let socket = match encap {
            Encap::WireGuard => Some(&self.wireguard),
            Encap::Vxlan => self.vxlan.as_ref(),
        };
        match socket {
            Some(socket) => self.receiver.receive(socket, buffer, out),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn send(&mut self, batch: &TxBatch, runs: &[Run]) -> io::Result<usize> {
        let Some(first) = runs.first() else { return Ok(0) };
        let socket = match first.via {
            Via::WireGuard => &self.wireguard,
            Via::Vxlan(index) => {
                self.vxlan_sources.get(usize::from(index)).ok_or(io::ErrorKind::NotConnected)?
            }
        };
        self.sender.send(socket, batch, runs)
    }

    fn wait(&mut self, timeout: Option<Duration>, watch: Watch) -> io::Result<()> {
        let reading = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let bell = self.bell.as_fd();
        let wireguard = borrow(&self.wireguard);
        let vxlan = self.vxlan.as_ref().map_or(bell, |s| borrow(s));
        let mut fds = match watch {
            Watch::Everything => [bell, wireguard, vxlan, borrow(&self.tun)].map(reading),
            Watch::AllButTun(via) => {
                let full =
                    self.socket(via).map_or(reading(bell), |s| PollFd::new(borrow(s), PollFlags::POLLOUT));
                [reading(bell), reading(wireguard), reading(vxlan), full]
            }
            Watch::Bell => [bell; 4].map(reading),
        };
        match nix::poll::poll(&mut fds, poll_timeout(timeout)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        if fds[0].revents().is_some_and(|e| e.contains(PollFlags::POLLIN)) {
            let _ = self.bell.read();
        }
        Ok(())
    }

    fn yield_now(&mut self) {
        std::thread::yield_now();
    }
}

impl Linux {
    fn socket(&self, via: Via) -> Option<&UdpSocket> {
        match via {
            Via::WireGuard => Some(&self.wireguard),
            Via::Vxlan(index) => self.vxlan_sources.get(usize::from(index)),
        }
    }
}

fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to the value that is borrowed for as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Rounded up, so that a timer is not polled for just before it is due.
fn poll_timeout(timeout: Option<Duration>) -> PollTimeout {
    match timeout {
        None => PollTimeout::NONE,
        Some(t) => {
            let ms = t.as_micros().div_ceil(1000).min(60_000) as u16;
            PollTimeout::from(ms)
        }
    }
}

/// A bell that wakes a lane.
pub fn bell() -> io::Result<EventFd> {
    use nix::sys::eventfd::EfdFlags;
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}
