//! Randomness from a seed: the same seed is the same run.

use std::ops::Range;

/// SplitMix64: small, and good enough to pick faults with.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed ^ 0x5eed_5eed_5eed_5eed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start).max(1)
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        self.within(0..len as u64) as usize
    }

    /// True this many times in a thousand.
    pub(crate) fn permille(&mut self, chance: u32) -> bool {
        self.within(0..1000) < u64::from(chance)
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.next() as u8)
    }
}

/// Runs a scenario for several seeds. `WARREN_SIM_SEED` replays one, `WARREN_SIM_RUNS` says how many; the
/// seed of a run that fails is printed with the command that repeats it.
pub(crate) fn for_seeds(name: &str, runs: u64, scenario: impl Fn(u64)) {
    if let Some(seed) = number("WARREN_SIM_SEED") {
        return scenario(seed);
    }
    for seed in 1..=number("WARREN_SIM_RUNS").unwrap_or(runs) {
        let _reprint = Reprint { name, seed };
        scenario(seed);
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}: a number")))
}

struct Reprint<'a> {
    name: &'a str,
    seed: u64,
}

impl Drop for Reprint<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "seed {} failed; again: WARREN_SIM_SEED={} cargo test --no-default-features --features sim \
                 --test sim {}",
                self.seed, self.seed, self.name
            );
        }
    }
}
