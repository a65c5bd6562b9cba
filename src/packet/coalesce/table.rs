//! Which flow's frame is open.

use std::net::IpAddr;

use super::NONE;
use super::frame::Building;
use crate::packet::Headers;

/// The flows whose last frame is still open. A flow that finds no place pushes out the oldest of its set,
/// whose frame is then closed: nothing is lost but a join.
#[derive(Debug)]
pub(super) struct Table {
    sets: [[u16; WAYS]; SETS],
}

const SETS: usize = 64;
const WAYS: usize = 4;

impl Table {
    pub(super) fn new() -> Table {
        Table { sets: [[NONE; WAYS]; SETS] }
    }

    pub(super) fn clear(&mut self) {
        self.sets = [[NONE; WAYS]; SETS];
    }

    /// The flow's place, and its open frame.
    pub(super) fn find(&self, hash: u32, headers: &Headers, frames: &[Building]) -> Option<(usize, u16)> {
        let set = Table::set(hash);
        self.sets[set].iter().find_map(|&index| {
            let frame = frames.get(usize::from(index))?;
            (frame.hash == hash && same_flow(&frame.headers, headers)).then_some((set, index))
        })
    }

    /// Gives an open frame a place.
    pub(super) fn remember(&mut self, hash: u32, index: u16) {
        let set = &mut self.sets[Table::set(hash)];
        set.rotate_right(1);
        set[0] = index;
    }

    /// Where flows of this hash are.
    pub(super) fn set(hash: u32) -> usize {
        hash as usize % SETS
    }

    /// Closes the frame at that place.
    pub(super) fn forget(&mut self, place: Option<(usize, u16)>) {
        let Some((set, index)) = place else { return };
        for way in &mut self.sets[set] {
            if *way == index {
                *way = NONE;
            }
        }
    }
}

fn same_flow(a: &Headers, b: &Headers) -> bool {
    a.protocol == b.protocol
        && a.ports() == b.ports()
        && a.source == b.source
        && a.destination == b.destination
}

/// Spreads flows over the table. Not seeded: who aims at a place only stops packets of this batch from
/// being joined.
pub(super) fn flow_hash(headers: &Headers) -> u32 {
    let (source, destination) = headers.ports().unwrap_or((0, 0));
    let ports = u64::from(source) << 24 | u64::from(destination) << 8 | u64::from(headers.protocol);
    let addresses = match (headers.source, headers.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            u64::from(source.to_bits()) << 32 | u64::from(destination.to_bits())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let (source, destination) = (source.to_bits(), destination.to_bits());
            mix(
                (source >> 64) as u64 ^ mix(source as u64, 1),
                (destination >> 64) as u64 ^ mix(destination as u64, 0),
            )
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => 0,
    };
    mix(addresses, ports) as u32
}

/// A wide multiplication, folded.
fn mix(a: u64, b: u64) -> u64 {
    // Odd constants with no pattern in their bits: the golden ratio and the square root of two.
    let wide = u128::from(a ^ 0x9e37_79b9_7f4a_7c15) * u128::from(b ^ 0x6a09_e667_f3bc_c909);
    (wide >> 64) as u64 ^ wide as u64
}
