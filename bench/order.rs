//! Who comes when: the contestants come in another order in each round, so that nobody is always the one whom the
//! machine's warmth, or what somebody left in its caches, meets.

/// The order of `n` contestants in a round (from 1 on): a row of a balanced Latin square (Williams 1949). Over `n`
/// rounds each has each place once and comes right behind each other once; over `2n`, twice, if `n` is odd.
pub fn of(n: usize, round: u32) -> Vec<usize> {
    let row = round.saturating_sub(1) as usize;
    let shift = row * stride(n) % n.max(1);
    // 0, 1, n-1, 2, n-2, ...: each step is another.
    let zigzag = (0..n).map(|place| if place % 2 == 1 { place.div_ceil(2) } else { n - place / 2 });
    let mut order: Vec<usize> = zigzag.map(|value| (value + shift) % n).collect();
    if row / n.max(1) % 2 == 1 {
        order.reverse();
    }
    order
}

/// Rows are taken some apart, so that a few rounds are balanced already: about the golden section of `n`.
fn stride(n: usize) -> usize {
    let from = (n * 382).div_ceil(1000).max(1);
    (from..).find(|&stride| gcd(stride, n) == 1).unwrap_or(1)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
