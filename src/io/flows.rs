//! The flow table's memory: a file in the run directory, mapped, so that a killed agent leaves its flows
//! to the next one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use tracing::{debug, info};

use super::clock;
use crate::datapath::conntrack::{AttachError, FlowMemory, FlowTable, Seed, Timeouts};

/// Opens the table in `path`: the flows of the last agent if they are of this boot and this version, else
/// a new one. The caller holds the agent's lock: nobody else has the file.
pub fn open(path: &Path, seed: (u64, u64)) -> io::Result<FlowTable> {
    let seed = Seed(seed.0, seed.1);
    let capacity = FlowTable::default_capacity(physical_memory());
    let words = FlowTable::words_for(capacity);
    let epoch = boot_id()?;
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.len() == words as u64 * 8 {
        let now = clock::since_boot_ms();
        match FlowTable::attach(FlowMemory::Shared(map(&file, words)?), now, epoch, seed, Timeouts::KERNEL) {
            Ok(table) => {
                info!(flows = table.counters().entries, "took over the flow table");
                return Ok(table);
            }
            Err(AttachError::NoTable) => {}
            Err(why) => debug!("the flow table starts empty: {why}"),
        }
    }
    // To nothing and back: all zeroes.
    file.set_len(0)?;
    file.set_len(words as u64 * 8)?;
    FlowTable::create(FlowMemory::Shared(map(&file, words)?), capacity, epoch, seed, Timeouts::KERNEL)
        .map_err(io::Error::other)
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
