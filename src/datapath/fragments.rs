//! Fragments: only a datagram's first one shows the ports by which its flow is known. What was decided
//! about it holds for the others; those that come before it wait for it, a few and not for long.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::packet::{DropReason, Fragment, Headers};
use crate::snapshot::PeerId;

/// How long fragments wait for each other, and a decision is kept. Linux gives a reassembly 30 s
/// (net.ipv4.ipfrag_time), but IPv4's identifications come again sooner than that.
const PATIENCE: Duration = Duration::from_secs(4);
/// Datagrams whose decision is kept.
const DECISIONS: usize = 4096;
/// Bytes that may wait, and fragments of one datagram (65,535 bytes in pieces of 1,280 are 52).
const WAITING_BYTES: usize = 512 << 10;
/// Bytes that may wait of one peer, or of this node.
const WAITING_OF_PEER: usize = WAITING_BYTES / 4;
const WAITING_OF_ONE: usize = 64;

/// What the fragments of one datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Datagram {
    from: Option<PeerId>,
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    id: u32,
}

impl Datagram {
    /// The datagram of a fragment; `None` for what is none. `from`: out of whose tunnel it came.
    pub(super) fn of(headers: &Headers, from: Option<PeerId>) -> Option<Datagram> {
        let (Fragment::First { id } | Fragment::Later { id }) = headers.fragment else { return None };
        // IPv6's later fragments name the header that follows theirs, which may be another extension.
        let protocol = if headers.is_ipv4() { headers.protocol } else { 0 };
        Some(Datagram { from, source: headers.source, destination: headers.destination, protocol, id })
    }
}

/// The fragments that a lane knows of; `P` is what was decided.
#[derive(Debug)]
pub(super) struct Fragments<P> {
    decided: HashMap<Datagram, Result<P, DropReason>>,
    waiting: HashMap<Datagram, Vec<Vec<u8>>>,
    /// When each of them is to be forgotten, first comes first.
    ends: VecDeque<(Instant, Datagram)>,
    bytes: usize,
    bytes_of: HashMap<Option<PeerId>, usize>,
}

impl<P> Default for Fragments<P> {
    fn default() -> Fragments<P> {
        Fragments {
            decided: HashMap::new(),
            waiting: HashMap::new(),
            ends: VecDeque::new(),
            bytes: 0,
            bytes_of: HashMap::new(),
        }
    }
}

impl<P: Copy> Fragments<P> {
    /// What was decided about a datagram's first fragment, if it was seen.
    pub(super) fn decision(&self, datagram: &Datagram) -> Option<Result<P, DropReason>> {
        self.decided.get(datagram).copied()
    }

    /// Notes what was decided about the first fragment; gives back those that waited for it, in order.
    pub(super) fn decide(
        &mut self,
        now: Instant,
        datagram: Datagram,
        decision: Result<P, DropReason>,
    ) -> Vec<Vec<u8>> {
        while self.decided.len() >= DECISIONS {
            let Some((_, oldest)) = self.ends.pop_front() else { break };
            self.forget(&oldest);
        }
        if self.decided.insert(datagram, decision).is_none() {
            self.ends.push_back((now + PATIENCE, datagram));
        }
        self.take_waiting(&datagram)
    }

    /// Lets a fragment wait for its first.
    pub(super) fn wait(&mut self, now: Instant, datagram: Datagram, packet: &[u8]) -> Result<(), DropReason> {
        let others = self.waiting.get(&datagram).map_or(0, Vec::len);
        let of_peer = self.bytes_of.get(&datagram.from).copied().unwrap_or(0) + packet.len();
        let full = self.bytes + packet.len() > WAITING_BYTES || of_peer > WAITING_OF_PEER;
        if full || others >= WAITING_OF_ONE {
            return Err(DropReason::AwaitingFragment);
        }
        self.bytes_of.insert(datagram.from, of_peer);
        if others == 0 {
            self.ends.push_back((now + PATIENCE, datagram));
        }
        self.bytes += packet.len();
        self.waiting.entry(datagram).or_default().push(packet.to_vec());
        Ok(())
    }

    /// When [`Self::expire`] has something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.ends.front().map(|(at, _)| *at)
    }

    /// Forgets what is too old; how many fragments waited in vain.
    pub(super) fn expire(&mut self, now: Instant) -> usize {
        let mut dropped = 0;
        while let Some((at, datagram)) = self.ends.front().copied()
            && at <= now
        {
            self.ends.pop_front();
            dropped += self.forget(&datagram);
        }
        dropped
    }

    fn forget(&mut self, datagram: &Datagram) -> usize {
        self.decided.remove(datagram);
        self.take_waiting(datagram).len()
    }

    fn take_waiting(&mut self, datagram: &Datagram) -> Vec<Vec<u8>> {
        let waited = self.waiting.remove(datagram).unwrap_or_default();
        let bytes = waited.iter().map(Vec::len).sum::<usize>();
        self.bytes -= bytes;
        if let Some(of_peer) = self.bytes_of.get_mut(&datagram.from) {
            *of_peer -= bytes;
            if *of_peer == 0 {
                self.bytes_of.remove(&datagram.from);
            }
        }
        waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(id: u32) -> Datagram {
        Datagram {
            from: None,
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            protocol: 17,
            id,
        }
    }

    #[allow(clippy::disallowed_methods)] // where time begins does not matter
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn later_fragments_wait_for_the_first_and_follow_it() {
        let (mut fragments, now) = (Fragments::<u8>::default(), start());
        fragments.wait(now, datagram(1), b"second").expect("room");
        fragments.wait(now, datagram(1), b"third").expect("room");
        fragments.wait(now, datagram(2), b"other").expect("room");
        assert_eq!(fragments.decision(&datagram(1)), None);
        assert_eq!(fragments.decide(now, datagram(1), Ok(7)), [b"second".to_vec(), b"third".to_vec()]);
        assert_eq!(fragments.decision(&datagram(1)), Some(Ok(7)));
        assert_eq!(fragments.bytes, 5);
    }

    #[test]
    fn what_never_comes_is_not_waited_for_for_ever() {
        let (mut fragments, now) = (Fragments::<u8>::default(), start());
        fragments.wait(now, datagram(1), b"second").expect("room");
        fragments.decide(now + Duration::from_secs(1), datagram(2), Err(DropReason::NoRoute));
        let at = fragments.poll_timeout().expect("a time");
        assert_eq!(fragments.expire(at), 1);
        assert_eq!(fragments.decision(&datagram(2)), Some(Err(DropReason::NoRoute)));
        assert_eq!(fragments.expire(at + Duration::from_secs(1)), 0);
        assert_eq!((fragments.decision(&datagram(2)), fragments.poll_timeout()), (None, None));
        assert_eq!(fragments.bytes, 0);
    }

    #[test]
    fn a_flood_costs_a_bounded_amount() {
        let (mut fragments, now) = (Fragments::<u8>::default(), start());
        let refused = (0..100_000).filter(|n| fragments.wait(now, datagram(*n), &[0; 1000]).is_err()).count();
        assert_eq!(refused, 100_000 - WAITING_OF_PEER / 1000, "one sender");
        let other = |n| Datagram { from: Some(PeerId(1)), ..datagram(n) };
        assert!(fragments.wait(now, other(0), &[0; 1000]).is_ok(), "another one");
        for n in 0..100_000 {
            fragments.decide(now, datagram(n), Ok(0));
        }
        assert!(
            fragments.decided.len() <= DECISIONS && fragments.ends.len() <= DECISIONS + WAITING_BYTES / 1000
        );
        let of_one = (0..100).filter(|_| fragments.wait(now, datagram(200_000), &[0]).is_ok()).count();
        assert_eq!(of_one, WAITING_OF_ONE);
        fragments.expire(now + PATIENCE);
        assert_eq!((fragments.bytes, fragments.ends.len(), fragments.waiting.len()), (0, 0, 0));
    }
}
