//! Which places of boringtun's ring of sessions matter.
//!
//! Each answered initiation takes the next place, whether its sender ever proves himself or not, and so
//! recorded initiations that are new to a restarted node could push out the session in use. What would land on
//! one of the two sessions that last proved themselves is not answered there.

/// boringtun keeps this many sessions (noise/mod.rs, `N_SESSIONS`).
const PLACES: u8 = 8;

/// The ring of one `Tunn`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ring {
    last: u8,
    proven: [Option<u8>; 2],
}

impl Ring {
    /// A handshake message of ours carries the place it took, in the low byte of its sender index.
    pub fn sent(&mut self, message: &[u8]) {
        self.last = message.get(4).copied().unwrap_or(self.last);
    }

    /// The peer proved that it holds this place's keys.
    pub fn proved(&mut self, place: u8) {
        if self.proven[0] != Some(place) {
            self.proven = [Some(place), self.proven[0]];
        }
    }

    /// Whether the next place may be taken by a session that has proved nothing yet.
    pub fn has_room(&self) -> bool {
        let next = self.last.wrapping_add(1) % PLACES;
        self.proven.iter().flatten().all(|place| place % PLACES != next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_in_use_are_not_pushed_out() {
        let mut ring = Ring::default();
        ring.sent(&[1, 0, 0, 0, 1]);
        ring.proved(1);
        let mut answered = 0;
        while ring.has_room() {
            let next = ring.last.wrapping_add(1);
            ring.sent(&[2, 0, 0, 0, next]);
            answered += 1;
        }
        assert_eq!(answered, PLACES - 1);
        // One of them proves itself; the one before is still protected until the next does.
        ring.proved(8);
        assert!(!ring.has_room());
        ring.proved(7);
        assert!(ring.has_room());
    }
}
