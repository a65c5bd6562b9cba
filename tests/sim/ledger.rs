//! The reference model: what was sent, and so what may arrive. A packet arrives at most once, at the node it
//! was meant for, bit by bit as a router would leave it; what was never sent arrives nowhere.

use std::collections::HashMap;
use std::time::Duration;

#[derive(Debug, Default)]
pub(crate) struct Ledger {
    sent: HashMap<u64, Sent>,
    numbers: u64,
}

#[derive(Debug)]
struct Sent {
    /// `None`: nowhere.
    to: Option<usize>,
    expected: Vec<u8>,
    at: Duration,
    arrived: Option<Duration>,
    /// If the network doubles it, nothing in between notices.
    twice: bool,
}

impl Ledger {
    pub(crate) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(crate) fn sent(&mut self, id: u64, to: usize, expected: Vec<u8>, at: Duration, twice: bool) {
        let old = self.sent.insert(id, Sent { to: Some(to), expected, at, arrived: None, twice });
        assert!(old.is_none(), "number {id} used twice");
    }

    pub(crate) fn forbidden(&mut self, id: u64) {
        let nothing =
            Sent { to: None, expected: Vec::new(), at: Duration::ZERO, arrived: None, twice: false };
        self.sent.insert(id, nothing);
    }

    pub(crate) fn arrived(&mut self, id: u64, node: usize, packet: &[u8], now: Duration, doubled: bool) {
        let Some(sent) = self.sent.get_mut(&id) else { panic!("packet {id} was never sent") };
        assert_eq!(sent.to, Some(node), "packet {id} arrived at node {node}");
        assert!(
            same(&sent.expected, packet),
            "packet {id} arrived changed: {packet:02x?}, not {:02x?}",
            sent.expected
        );
        let again = sent.arrived.replace(now).is_some();
        assert!(!again || (sent.twice && doubled), "packet {id} arrived twice");
    }

    pub(crate) fn has(&self, id: u64) -> bool {
        self.sent.get(&id).is_some_and(|sent| sent.arrived.is_some())
    }

    /// How many of these arrived.
    pub(crate) fn count(&self, ids: &[u64]) -> usize {
        ids.iter().filter(|id| self.has(**id)).count()
    }

    #[track_caller]
    pub(crate) fn assert_all(&self, ids: &[u64]) {
        let missing: Vec<_> =
            ids.iter().filter(|id| !self.has(**id)).map(|id| (id, self.sent[id].at)).collect();
        assert!(missing.is_empty(), "{} of {} did not arrive: {missing:?}", missing.len(), ids.len());
    }

    #[track_caller]
    pub(crate) fn assert_none(&self, ids: &[u64]) {
        let there: Vec<_> = ids.iter().filter(|id| self.has(**id)).collect();
        assert!(there.is_empty(), "arrived against all expectation: {there:?}");
    }

    /// From sending to arrival.
    pub(crate) fn latency(&self, id: u64) -> Option<Duration> {
        let sent = self.sent.get(&id)?;
        Some(sent.arrived? - sent.at)
    }
}

/// Whether this is the packet that was sent. The identification of an IPv4 packet that may not be fragmented
/// means nothing (RFC 6864), and joining packets for the TUN makes use of that.
fn same(expected: &[u8], packet: &[u8]) -> bool {
    if packet.len() < 20 || packet[0] >> 4 != 4 || packet[6] & 0x40 == 0 {
        return expected == packet;
    }
    let [mut expected, mut packet] = [expected, packet].map(<[u8]>::to_vec);
    let right = warren::packet::checksum::verify_ipv4_header(&packet);
    for bytes in [&mut expected, &mut packet] {
        bytes[4..6].fill(0);
        bytes[10..12].fill(0);
    }
    right && expected == packet
}
