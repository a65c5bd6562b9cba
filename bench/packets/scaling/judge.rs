//! Whether lanes scale, by what was measured.

use crate::verdict::Verdict;

/// Two lanes have to carry so many times as much as one.
pub const BAR: f64 = 1.6;
/// Where these processors do not let two lanes reach the bar, so much of what two lanes that share nothing reach shows
/// that sharing is not what is in the way.
pub const OF_APART: f64 = 0.9;

/// What two lanes carry, so many times as much as one.
#[derive(Clone, Copy, Debug)]
pub struct Both {
    /// Lanes of one node.
    pub shared: f64,
    /// Lanes that share nothing.
    pub apart: f64,
}

/// `shared`: two lanes of one node beside one. Where that is too little, `again` measures both by turns. What is
/// missing is held against the lanes only as far as two that share nothing reach more: processors that are busy, or two
/// threads of one core, let neither reach the bar.
pub fn judge(processors: usize, shared: f64, again: impl FnOnce() -> Both) -> (Verdict, String) {
    if processors < 2 {
        return (
            Verdict::NotCompared,
            "WARNING: NOT COMPARED: one processor cannot show two lanes".to_owned(),
        );
    }
    let kept = || (Verdict::Kept, format!("two lanes carry at least {BAR} times as much as one"));
    if shared >= BAR {
        return kept();
    }
    let Both { shared, apart } = again();
    if shared >= BAR {
        return kept();
    }
    let text = format!(
        "two lanes carry {shared:.2} times as much as one, which should be {BAR}; two that share nothing {apart:.2} times"
    );
    if shared < OF_APART * apart {
        return (Verdict::Broken, format!("FAILED: {text}"));
    }
    let why = "these processors are busy, or threads of one core";
    (Verdict::NotCompared, format!("WARNING: NOT COMPARED: {text}: {why}"))
}
