//! The flow table's memory: a file in the run directory, mapped, so that a killed agent leaves its flows
//! to the next one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use nix::fcntl::posix_fallocate;
use tracing::{debug, info, warn};

use super::clock;
use crate::datapath::affinity::Affinity;
use crate::datapath::conntrack::{AttachError, FlowMemory, FlowTable, Seed, Stage, Timeouts};

/// The kernel's defaults, with what kube-proxy and we set there ourselves: a half-closed connection may be
/// silent for an hour (nf_conntrack_tcp_timeout_close_wait).
const TIMEOUTS: Timeouts = Timeouts::KERNEL.with(Stage::CloseWait, 3_600);
/// Clients whose endpoints are remembered: 4 MiB.
const AFFINITY_CLIENTS: usize = 1 << 16;

/// Opens the table in `path`: the flows of the last agent if they are of this boot and this version, else
/// a new one. The caller holds the agent's lock: nobody else has the file.
pub fn open(path: &Path, seed: (u64, u64)) -> io::Result<FlowTable> {
    open_with(path, seed, |file, bytes| Ok(posix_fallocate(file, 0, bytes)?))
}

/// Opens the table of session affinity in `path`, in the same way.
pub fn open_affinity(path: &Path, seed: (u64, u64)) -> io::Result<Affinity> {
    let seed = Seed(seed.0, seed.1);
    let words = Affinity::words_for(AFFINITY_CLIENTS);
    let epoch = boot_id()?;
    let reserve = |file: &File, bytes| Ok(posix_fallocate(file, 0, bytes)?);
    let (memory, _) = memory(path, words, "session affinity", reserve)?;
    Ok(Affinity::open(memory, epoch, seed))
}

/// How long flows live here: no longer than in this network namespace's kernel, as it is set now.
pub fn timeouts() -> Timeouts {
    TIMEOUTS.at_most(|stage| {
        let seconds = |name: &&str| {
            let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        sysctls(stage).iter().filter_map(seconds).min()
    })
}

/// What the kernel calls it; the sysctl is there when the module is.
fn sysctls(stage: Stage) -> &'static [&'static str] {
    match stage {
        Stage::SynSent => &["tcp_timeout_syn_sent"],
        Stage::SynRecv => &["tcp_timeout_syn_recv"],
        Stage::Established => &["tcp_timeout_established"],
        Stage::Unacknowledged => &["tcp_timeout_unacknowledged"],
        Stage::FinWait => &["tcp_timeout_fin_wait"],
        Stage::CloseWait => &["tcp_timeout_close_wait"],
        Stage::LastAck => &["tcp_timeout_last_ack"],
        Stage::TimeWait => &["tcp_timeout_time_wait"],
        Stage::Close => &["tcp_timeout_close"],
        Stage::Udp => &["udp_timeout"],
        Stage::UdpStream => &["udp_timeout_stream"],
        Stage::Icmp => &["icmp_timeout", "icmpv6_timeout"],
        Stage::SctpOpening => &["sctp_timeout_cookie_wait"],
        Stage::Sctp => &["sctp_timeout_established"],
        Stage::Generic => &["generic_timeout"],
    }
}

fn open_with(
    path: &Path,
    seed: (u64, u64),
    reserve: impl Fn(&File, i64) -> io::Result<()>,
) -> io::Result<FlowTable> {
    let seed = Seed(seed.0, seed.1);
    let capacity = FlowTable::default_capacity(physical_memory());
    let words = FlowTable::words_for(capacity);
    let (epoch, timeouts) = (boot_id()?, timeouts());
    let new = |memory| FlowTable::create(memory, capacity, epoch, seed, timeouts).map_err(io::Error::other);
    let (first, known) = memory(path, words, "the flow table", &reserve)?;
    if !known {
        return new(first);
    }
    match FlowTable::attach(first, clock::since_boot_ms(), epoch, seed, timeouts) {
        Ok(table) => {
            info!(flows = table.counters().entries, "took over the flow table");
            return Ok(table);
        }
        Err(AttachError::NoTable) => {}
        Err(why) => debug!("the flow table starts empty: {why}"),
    }
    std::fs::remove_file(path)?;
    new(memory(path, words, "the flow table", &reserve)?.0)
}

/// The memory of a table: the file, mapped, and whether it was there before; our own where there is no room.
fn memory(
    path: &Path,
    words: usize,
    what: &str,
    reserve: impl Fn(&File, i64) -> io::Result<()>,
) -> io::Result<(FlowMemory, bool)> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let known = file.metadata()?.len() == words as u64 * 8;
    if !known {
        clear(&file, words)?;
    }
    // A hole in the file would be filled when something is written there; without room, that is a SIGBUS.
    if let Err(error) = reserve(&file, words as i64 * 8) {
        file.set_len(0)?;
        warn!(
            "no room for {what} ({} MiB in {}): {error}. It is kept in memory and forgotten when \
             the agent ends; make room there, or choose another folder with --run-dir, and start it again",
            (words * 8).div_ceil(1 << 20),
            path.display()
        );
        return Ok((FlowMemory::owned(words), false));
    }
    Ok((FlowMemory::Shared(map(&file, words)?), known))
}

/// To nothing and back: all zeroes.
fn clear(file: &File, words: usize) -> io::Result<()> {
    file.set_len(0)?;
    file.set_len(words as u64 * 8)
}

/// Maps the whole file for the rest of the process's life.
fn map(file: &File, words: usize) -> io::Result<&'static [AtomicU64]> {
    // SAFETY: a fresh shared mapping of a file that has at least `words * 8` bytes; the result is checked.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            words * 8,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: page-aligned, `words` words long, never unmapped; every access goes through atomics, and any
    // bits are a valid AtomicU64.
    Ok(unsafe { std::slice::from_raw_parts(address.cast::<AtomicU64>(), words) })
}

/// A number that differs between boots of this machine.
fn boot_id() -> io::Result<u64> {
    use std::hash::Hasher as _;
    let id = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    let mut hasher = siphasher::sip::SipHasher13::new_with_keys(0, 0);
    hasher.write(&id);
    Ok(hasher.finish() | 1)
}

fn physical_memory() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0) * u64::try_from(size).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_file_has_no_holes_that_a_full_disk_could_not_fill() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("flows");
        let bytes = FlowTable::words_for(FlowTable::default_capacity(physical_memory())) as u64 * 8;
        let solid = |what: &str| {
            let file = std::fs::metadata(&path).expect("the file");
            assert_eq!(file.len(), bytes);
            assert!(file.blocks() * 512 >= bytes, "{what}: {} of {bytes} bytes", file.blocks() * 512);
        };
        drop(open(&path, (1, 2)).expect("a table"));
        solid("new");
        drop(open(&path, (1, 2)).expect("a table"));
        solid("taken over");
        // As an older agent left it.
        let file = File::create(&path).expect("the file");
        file.set_len(bytes).expect("a hole");
        drop(open(&path, (1, 2)).expect("a table"));
        solid("sparse before");
    }

    #[test]
    fn what_this_kernel_says_is_known_by_its_name() {
        // Where there is one of them, the module is there, and then so are those of TCP, UDP and ICMP.
        let root = Path::new("/proc/sys/net/netfilter");
        if !root.join("nf_conntrack_generic_timeout").exists() {
            return;
        }
        for stage in Stage::ALL {
            for name in sysctls(stage).iter().filter(|name| !name.starts_with("sctp")) {
                assert!(root.join(format!("nf_conntrack_{name}")).exists(), "{stage:?}: {name}");
            }
        }
    }

    #[test]
    fn without_room_the_table_is_in_memory() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("flows");
        let full = |_: &File, _| Err(io::Error::from_raw_os_error(libc::ENOSPC));
        for _ in 0..2 {
            let table = open_with(&path, (1, 2), full).expect("a table");
            assert!(table.counters().capacity > 0);
            assert_eq!(std::fs::metadata(&path).expect("the file").len(), 0);
        }
    }
}
