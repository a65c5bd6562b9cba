//! A kernel that refuses what an older one, or one with less trust, would: filters on the system calls of the test's
//! own thread, which every program inherits that is started from it.

use std::collections::BTreeMap;

use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, Ge, MaskedEq};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, apply_filter,
};

/// What is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// UDP super-packets on a TUN, as before Linux 6.2.
    TunUdp,
    /// Every offload of a TUN but none.
    Tun,
    /// Writing a packet that was joined, though the offload was taken: the virtio header and one piece for each packet
    /// that is in it, at least two.
    JoinedWrites,
    /// Cutting one send into datagrams, as before Linux 4.18.
    Segmentation,
    /// Joining datagrams on receive, as before Linux 5.0.
    ReceiveOffload,
    /// Socket buffers beyond the system's limit, as without CAP_NET_ADMIN in the first user namespace.
    LargeBuffers,
    /// UDP sockets for IPv6, as with `ipv6.disable=1`.
    Ipv6Sockets,
}

/// linux/if_tun.h
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_USO4: u32 = 0x20;
/// linux/udp.h
const UDP_SEGMENT: u32 = 103;
const UDP_GRO: u32 = 104;
/// asm-generic/socket.h
const SO_SNDBUFFORCE: u32 = 32;
const SO_RCVBUFFORCE: u32 = 33;

/// Runs a test on such a kernel. It has a thread of its own, whose filters end with it; programs that it starts
/// end with it too (see `netns`), so they are not to outlive it.
pub fn on_a_kernel_without<R: Send>(refused: &[Refused], test: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            for what in refused {
                apply_filter(&what.filter()).unwrap_or_else(|e| panic!("refuse {what:?}: {e}"));
            }
            test()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl Refused {
    fn filter(self) -> BpfProgram {
        let option = |level: i32, name: u32| vec![(1, Eq, level as u32), (2, Eq, name)];
        let offload = |flag: u32| vec![(1, Eq, TUNSETOFFLOAD), (2, MaskedEq(flag.into()), flag)];
        let (call, calls, error) = match self {
            Refused::TunUdp => (libc::SYS_ioctl, vec![offload(TUN_F_USO4)], libc::EINVAL),
            Refused::Tun => (libc::SYS_ioctl, vec![offload(TUN_F_CSUM)], libc::EINVAL),
            Refused::JoinedWrites => (libc::SYS_writev, vec![vec![(2, Ge, 3)]], libc::EINVAL),
            Refused::Segmentation => {
                (libc::SYS_setsockopt, vec![option(libc::SOL_UDP, UDP_SEGMENT)], libc::ENOPROTOOPT)
            }
            Refused::ReceiveOffload => {
                (libc::SYS_setsockopt, vec![option(libc::SOL_UDP, UDP_GRO)], libc::ENOPROTOOPT)
            }
            Refused::LargeBuffers => {
                let both = [SO_SNDBUFFORCE, SO_RCVBUFFORCE].map(|name| option(libc::SOL_SOCKET, name));
                (libc::SYS_setsockopt, both.into(), libc::EPERM)
            }
            Refused::Ipv6Sockets => {
                // The type has flags in its upper bits; a ping socket has the same.
                let datagrams = (1, MaskedEq(0xf), libc::SOCK_DGRAM as u32);
                (libc::SYS_socket, vec![vec![(0, Eq, libc::AF_INET6 as u32), datagrams]], libc::EAFNOSUPPORT)
            }
        };
        let rules = calls.into_iter().map(|arguments| {
            SeccompRule::new(arguments.into_iter().map(condition).collect()).expect("a rule")
        });
        SeccompFilter::new(
            BTreeMap::from([(call, rules.collect())]),
            SeccompAction::Allow,
            SeccompAction::Errno(error as u32),
            std::env::consts::ARCH.try_into().expect("an architecture that these filters know"),
        )
        .and_then(BpfProgram::try_from)
        .unwrap_or_else(|e| panic!("a filter for {self:?}: {e}"))
    }
}

/// An argument of the call, compared with a value.
fn condition((argument, how, value): (u8, SeccompCmpOp, u32)) -> SeccompCondition {
    SeccompCondition::new(argument, Dword, how, value.into()).expect("a condition")
}
