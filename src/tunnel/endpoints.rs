//! Where a WireGuard peer is: what it announced, where it called from, and what last proved to work.

use std::collections::VecDeque;
use std::net::SocketAddr;

/// Most announced endpoints kept for one peer's lane, and most that it called from.
pub const MAX_ANNOUNCED: usize = 16;
const MAX_LEARNT: usize = 4;
/// Initiations to the endpoint that last worked before the others are tried too.
const LOYAL_ATTEMPTS: u32 = 2;

/// The endpoints of one lane of a peer.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    /// Where authenticated data last came from.
    confirmed: Option<SocketAddr>,
    announced: Vec<SocketAddr>,
    /// Where it called from without having announced it: NAT.
    learnt: VecDeque<SocketAddr>,
    attempts: u32,
}

impl Endpoints {
    /// What a peer announced, best first.
    pub fn new(announced: Vec<SocketAddr>) -> Endpoints {
        Endpoints { announced, ..Endpoints::default() }
    }

    /// Where to send: what last proved to work; after two unanswered initiations every endpoint in turn.
    pub fn target(&self) -> Option<SocketAddr> {
        let known = self.announced.len() + self.learnt.len();
        if let Some(confirmed) = self.confirmed
            && (self.attempts <= LOYAL_ATTEMPTS || known == 0)
        {
            return Some(confirmed);
        }
        let turn = self.attempts.saturating_sub(1) as usize % known.max(1);
        self.announced.iter().chain(&self.learnt).nth(turn).copied()
    }

    /// An initiation was sent.
    pub fn attempted(&mut self) {
        self.attempts = self.attempts.saturating_add(1);
    }

    /// Whether authenticated data last came from here.
    pub fn is_confirmed(&self, from: SocketAddr) -> bool {
        self.confirmed == Some(from)
    }

    /// Where authenticated data last came from, if that was not announced.
    pub fn unannounced(&self) -> Option<SocketAddr> {
        self.confirmed.filter(|at| !self.announced.contains(at))
    }

    /// Authenticated data came from here; whether that is another place than before.
    pub fn proved(&mut self, from: SocketAddr) -> bool {
        self.attempts = 0;
        if self.confirmed == Some(from) {
            return false;
        }
        self.called(from);
        self.confirmed.replace(from).is_some()
    }

    /// A handshake came from here: a peer without a reachable announcement may be answered there.
    pub fn called(&mut self, from: SocketAddr) {
        if self.announced.contains(&from) || self.learnt.contains(&from) {
            return;
        }
        if self.learnt.len() >= MAX_LEARNT {
            self.learnt.pop_front();
        }
        self.learnt.push_back(from);
    }

    /// Takes newly announced endpoints. One that worked but is no longer announced loses its preference; one
    /// that never was announced keeps it.
    pub fn follow(&mut self, announced: Vec<SocketAddr>) {
        if self.announced == announced {
            return;
        }
        let withdrawn = |at: &SocketAddr| self.announced.contains(at) && !announced.contains(at);
        self.confirmed = self.confirmed.filter(|confirmed| !withdrawn(confirmed));
        self.learnt.retain(|learnt| !announced.contains(learnt));
        self.announced = announced;
    }

    /// Lets go of what was found out about places that are `unfit` now.
    pub fn forget(&mut self, unfit: impl Fn(&SocketAddr) -> bool) {
        self.confirmed = self.confirmed.filter(|at| !unfit(at));
        self.learnt.retain(|at| !unfit(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, n], 51_820))
    }

    #[test]
    fn endpoints_are_tried_in_turn_until_one_works() {
        let mut endpoints = Endpoints::new(vec![at(1), at(2)]);
        endpoints.called(at(3));
        let mut tried = Vec::new();
        for _ in 0..6 {
            endpoints.attempted();
            tried.extend(endpoints.target());
        }
        assert_eq!(tried, [at(1), at(2), at(3), at(1), at(2), at(3)]);
        assert!(!endpoints.proved(at(2)), "the first place is no move");
        assert_eq!(endpoints.target(), Some(at(2)));
        assert!(endpoints.proved(at(9)), "roamed");
        for _ in 0..LOYAL_ATTEMPTS {
            endpoints.attempted();
            assert_eq!(endpoints.target(), Some(at(9)));
        }
        endpoints.attempted();
        assert_ne!(endpoints.target(), Some(at(9)));
    }

    #[test]
    fn a_new_announcement_forgets_what_was_withdrawn_but_not_what_was_learnt() {
        let mut endpoints = Endpoints::new(vec![at(1)]);
        endpoints.proved(at(1));
        endpoints.follow(vec![at(2)]);
        assert_eq!(endpoints.target(), Some(at(2)));
        endpoints.proved(at(7));
        endpoints.follow(vec![at(3)]);
        assert_eq!(endpoints.target(), Some(at(7)));
    }

    #[test]
    fn callers_are_bounded() {
        let mut endpoints = Endpoints::default();
        assert_eq!(endpoints.target(), None);
        (0..100).for_each(|n| endpoints.called(at(n)));
        assert_eq!(endpoints.learnt.len(), MAX_LEARNT);
        assert_eq!(endpoints.learnt.back(), Some(&at(99)));
    }
}
