//! The nat tables of iptables' old kernel interface, which nftables cannot see: only whether they have a
//! certain chain. Read as `iptables-legacy -S` reads them, by socket option.

use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use socket2::{Domain, Socket, Type};

/// IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES (linux/netfilter_ipv4/ip_tables.h); IPv6 has the same numbers.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
/// `struct ipt_getinfo`: name, then valid_hooks, hook_entry[5], underflow[5], num_entries, size.
const INFO: usize = 32 + 4 * 13;
/// `struct ipt_get_entries`: name, size, then (aligned to 8) the entries.
const ENTRIES: usize = 40;
/// A table so large is read only when it has lost half of itself since: kube-proxy writes 200 MB for 10,000
/// Services, and again at every change.
const LARGE: u32 = 1 << 20;
/// One so large is not read at all: nobody else writes such.
const LARGEST: u32 = 256 << 20;

/// Both families' nat tables, as last read.
#[derive(Debug, Default)]
pub(super) struct Nat {
    v4: Table,
    v6: Table,
}

#[derive(Debug, Default)]
struct Table {
    /// As it was when it was read.
    info: Vec<u8>,
    size: u32,
    found: bool,
}

impl Nat {
    /// Looks again where a table has changed.
    pub(super) fn look(&mut self, chain: &str) {
        // /proc/net is the main thread's; thread-self is this thread's network namespace.
        self.v4.look("/proc/thread-self/net/ip_tables_names", Domain::IPV4, libc::IPPROTO_IP, chain);
        self.v6.look("/proc/thread-self/net/ip6_tables_names", Domain::IPV6, libc::IPPROTO_IPV6, chain);
    }

    /// The program that lists the chain.
    pub(super) fn found(&self) -> Option<&'static str> {
        match (self.v4.found, self.v6.found) {
            (true, _) => Some("iptables-legacy"),
            (false, true) => Some("ip6tables-legacy"),
            (false, false) => None,
        }
    }
}

impl Table {
    fn look(&mut self, names: &str, domain: Domain, level: i32, chain: &str) {
        // Asked about a table that is not there, the kernel would make it.
        let there = std::fs::read_to_string(names).is_ok_and(|names| names.lines().any(|name| name == "nat"));
        let open = || Socket::new(domain, Type::RAW, Some(socket2::Protocol::from(libc::IPPROTO_RAW)));
        let Some(socket) = there.then(open).and_then(Result::ok) else { return *self = Table::default() };
        let Ok(info) = option(&socket, level, GET_INFO, named(INFO)) else { return *self = Table::default() };
        if self.info == info {
            return;
        }
        let size = info.get(INFO - 4..).and_then(|size| size.try_into().ok()).map_or(0, u32::from_ne_bytes);
        if size > LARGEST {
            return *self = Table { info, size, found: true };
        }
        if self.found && size > LARGE && size > self.size / 2 {
            return;
        }
        let mut request = named(ENTRIES + size as usize);
        request[32..36].copy_from_slice(&size.to_ne_bytes());
        // A table that was changed between both questions answers EAGAIN: then the next look sees it.
        let Ok(entries) = option(&socket, level, GET_ENTRIES, request) else { return };
        // A chain begins with an entry that holds its name, padded with zeros.
        let name = [chain.as_bytes(), &[0]].concat();
        *self = Table { info, size, found: entries.windows(name.len()).any(|bytes| bytes == name) };
    }
}

fn named(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    bytes[..3].copy_from_slice(b"nat");
    bytes
}

/// `getsockopt` with a request in the buffer that becomes the answer.
fn option(socket: &Socket, level: i32, name: i32, mut buffer: Vec<u8>) -> io::Result<Vec<u8>> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: the buffer is valid for `length` bytes, which is its own length; the kernel writes at most so
    // many and says in `length` how many.
    let outcome = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut length)
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    buffer.truncate(length as usize);
    Ok(buffer)
}
