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
    failure: Option<String>,
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
        let v4 = self.v4.look("/proc/thread-self/net/ip_tables_names", Domain::IPV4, libc::IPPROTO_IP, chain);
        let v6 = "/proc/thread-self/net/ip6_tables_names";
        let v6 = self.v6.look(v6, Domain::IPV6, libc::IPPROTO_IPV6, chain);
        self.failure = v4.and(v6).err().map(|error| error.to_string());
    }

    /// Why the last look saw nothing: what was found before still counts.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
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
    fn look(&mut self, names: &str, domain: Domain, level: i32, chain: &str) -> io::Result<()> {
        // Asked about a table that is not there, the kernel would make it.
        let there = match std::fs::read_to_string(names) {
            Ok(names) => names.lines().any(|name| name == "nat"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if !there {
            *self = Table::default();
            return Ok(());
        }
        // Any socket of the family will do; a raw one, which iptables takes, would need CAP_NET_RAW.
        let socket = Socket::new(domain, Type::DGRAM, None)?;
        let info = match option(&socket, level, GET_INFO, named(INFO)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                *self = Table::default();
                return Ok(());
            }
            outcome => outcome?,
        };
        if self.info == info {
            return Ok(());
        }
        let size = info.get(INFO - 4..).and_then(|size| size.try_into().ok()).map_or(0, u32::from_ne_bytes);
        if size > LARGEST {
            *self = Table { info, size, found: true };
            return Ok(());
        }
        if self.found && size > LARGE && size > self.size / 2 {
            return Ok(());
        }
        let mut request = named(ENTRIES + size as usize);
        request[32..36].copy_from_slice(&size.to_ne_bytes());
        // A table that was changed between both questions answers EAGAIN: then the next look sees it.
        let entries = match option(&socket, level, GET_ENTRIES, request) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            outcome => outcome?,
        };
        // A chain begins with an entry that holds its name, padded with zeros.
        let name = [chain.as_bytes(), &[0]].concat();
        *self = Table { info, size, found: entries.windows(name.len()).any(|bytes| bytes == name) };
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_fails_changes_nothing_and_says_so() {
        let mut table = Table { found: true, ..Table::default() };
        let folder = "/proc/thread-self/net";
        assert!(table.look(folder, Domain::IPV4, libc::IPPROTO_IP, "KUBE-SERVICES").is_err());
        assert!(table.found);
        table.look("/no/such/file", Domain::IPV4, libc::IPPROTO_IP, "KUBE-SERVICES").expect("nothing there");
        assert!(!table.found);
    }
}
