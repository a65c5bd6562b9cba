//! Datagrams on their way out: one buffer, filled in place, cut into runs that a single
//! segmentation-offload send can carry.

use std::net::SocketAddr;

/// Most bytes of one offloaded UDP send: 65,535 less IPv4 and UDP headers (udp(7)).
pub const MAX_RUN_BYTES: usize = 65_507;
/// Most segments of one offloaded send: UDP_MAX_SEGMENTS was 64 until Linux 6.9 (include/linux/udp.h).
pub const MAX_RUN_SEGMENTS: usize = 64;

/// Which of a lane's sockets sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Via {
    /// The lane's WireGuard socket.
    WireGuard,
    /// One of the VXLAN source sockets: its port carries the flow's entropy (RFC 7348 section 4.1).
    Vxlan(u8),
}

/// Datagrams of equal size (the last may be shorter) to one destination, back to back in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where to.
    pub to: SocketAddr,
    /// Through which socket.
    pub via: Via,
    /// Start in the buffer.
    pub offset: usize,
    /// Bytes of all its datagrams.
    pub len: usize,
    /// Bytes of each but the last.
    pub segment: usize,
    /// How many.
    pub count: usize,
}

/// The batch: reserve a slot, write into it, commit what was used. A reservation that is not
/// committed costs nothing.
pub struct TxBatch {
    buffer: Box<[u8]>,
    used: usize,
    runs: Vec<Run>,
    open: bool,
}

impl std::fmt::Debug for TxBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TxBatch").field("used", &self.used).field("runs", &self.runs.len()).finish()
    }
}

impl TxBatch {
    /// A batch of `capacity` bytes.
    pub fn new(capacity: usize) -> TxBatch {
        TxBatch {
            buffer: vec![0; capacity].into_boxed_slice(),
            used: 0,
            runs: Vec::with_capacity(256),
            open: false,
        }
    }

    /// Room for a datagram of up to `len` bytes, if there is.
    pub fn reserve(&mut self, len: usize) -> Option<&mut [u8]> {
        self.buffer.get_mut(self.used..self.used.checked_add(len)?)
    }

    /// Keeps the first `len` bytes of the last reservation as a datagram.
    pub fn commit(&mut self, to: SocketAddr, via: Via, len: usize) {
        debug_assert!(self.used + len <= self.buffer.len());
        let offset = self.used;
        self.used += len;
        if self.open
            && let Some(run) = self.runs.last_mut()
            && run.to == to
            && run.via == via
            && len <= run.segment
            && run.count < MAX_RUN_SEGMENTS
            && run.len + len <= MAX_RUN_BYTES
        {
            run.len += len;
            run.count += 1;
            self.open = len == run.segment;
            return;
        }
        self.runs.push(Run { to, via, offset, len, segment: len, count: 1 });
        self.open = true;
    }

    /// The runs, in the order in which they were written.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The bytes of one run.
    pub fn bytes(&self, run: &Run) -> &[u8] {
        &self.buffer[run.offset..run.offset + run.len]
    }

    /// Bytes still free.
    pub fn free(&self) -> usize {
        self.buffer.len() - self.used
    }

    /// Bytes written.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Whether nothing waits to be sent.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Lets no run grow any more: what is committed next starts another one.
    pub fn close(&mut self) {
        self.open = false;
    }

    /// Forgets all datagrams.
    pub fn clear(&mut self) {
        self.used = 0;
        self.runs.clear();
        self.open = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(batch: &mut TxBatch, to: &str, len: usize) {
        batch.reserve(len).expect("room").fill(7);
        batch.commit(to.parse().expect("address"), Via::WireGuard, len);
    }

    #[test]
    fn equal_datagrams_make_one_run_and_a_short_one_closes_it() {
        let mut batch = TxBatch::new(100_000);
        for _ in 0..3 {
            put(&mut batch, "10.0.0.1:1", 1452);
        }
        put(&mut batch, "10.0.0.1:1", 100);
        put(&mut batch, "10.0.0.1:1", 100);
        let shape: Vec<_> = batch.runs().iter().map(|r| (r.count, r.segment, r.len)).collect();
        assert_eq!(shape, [(4, 1452, 3 * 1452 + 100), (1, 100, 100)]);
    }

    #[test]
    fn a_run_ends_at_another_destination_at_64_segments_and_at_65507_bytes() {
        let mut batch = TxBatch::new(1_000_000);
        put(&mut batch, "10.0.0.1:1", 10);
        put(&mut batch, "10.0.0.2:1", 10);
        assert_eq!(batch.runs().len(), 2);
        batch.clear();
        (0..65).for_each(|_| put(&mut batch, "10.0.0.1:1", 10));
        assert_eq!(batch.runs().iter().map(|r| r.count).collect::<Vec<_>>(), [64, 1]);
        batch.clear();
        (0..3).for_each(|_| put(&mut batch, "10.0.0.1:1", 30_000));
        assert_eq!(batch.runs().iter().map(|r| r.count).collect::<Vec<_>>(), [2, 1]);
    }

    #[test]
    fn a_closed_run_does_not_grow() {
        let mut batch = TxBatch::new(1000);
        put(&mut batch, "10.0.0.1:1", 100);
        batch.close();
        put(&mut batch, "10.0.0.1:1", 100);
        put(&mut batch, "10.0.0.1:1", 100);
        assert_eq!(batch.runs().iter().map(|r| r.count).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_longer_datagram_starts_a_new_run_and_a_full_buffer_reserves_nothing() {
        let mut batch = TxBatch::new(300);
        put(&mut batch, "10.0.0.1:1", 100);
        put(&mut batch, "10.0.0.1:1", 200);
        assert_eq!(batch.runs().len(), 2);
        assert!(batch.reserve(1).is_none());
    }
}
