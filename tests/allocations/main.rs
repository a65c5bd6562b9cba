//! A packet that goes straight through costs no allocation: bursts of every kind, both ways, by each encapsulation,
//! through lanes that have seen such bursts before.

#[allow(dead_code, unreachable_pub)] // the measurements use the rest of it
#[path = "../../bench/packets/pair.rs"]
mod pair;

#[cfg(feature = "agent")]
mod turns;

use allocation_counter::measure;
use pair::{Carriage, Heading, Load, Pair};
use warren::snapshot::Encap;

/// Until every table, queue and buffer is as large as these bursts make it.
const WARM_UP: usize = 100;
const BURSTS: usize = 1_000;

#[test]
fn super_packets() {
    costs_none(Load::Bulk, false);
}

#[test]
fn super_packets_through_a_service() {
    costs_none(Load::Bulk, true);
}

#[test]
fn small_packets() {
    costs_none(Load::Small, false);
}

#[test]
fn small_packets_through_a_service() {
    costs_none(Load::Small, true);
}

/// What makes the tests above say something.
#[test]
fn an_allocation_is_counted() {
    assert_eq!(measure(|| drop(std::hint::black_box(Box::new(7)))).count_total, 1);
}

fn costs_none(load: Load, service: bool) {
    for encap in [Encap::WireGuard, Encap::Vxlan] {
        for heading in [Heading::Out, Heading::In] {
            let mut pair = Pair::new(Carriage { encap, service, load });
            for number in 0..WARM_UP + BURSTS {
                pair.prepare(heading);
                let cost = measure(|| pair.one_burst(heading));
                pair.check(heading);
                assert!(
                    cost.count_total == 0 || number < WARM_UP,
                    "{}, {heading:?}, {load:?}, Service {service}: {} allocations in burst {number}",
                    encap.name(),
                    cost.count_total
                );
            }
        }
    }
}
