//! Whether lanes scale, by what was measured.

use crate::verdict::Verdict;

/// Two lanes have to carry so many times as much as one.
pub const BAR: f64 = 1.6;

/// `shared`: two lanes of one node beside one. `apart`: two lanes that share nothing, asked for where it matters: where
/// not even these reach the bar, the processors cannot, as they are busy or two threads of one core.
pub fn judge(processors: usize, shared: f64, apart: impl FnOnce() -> f64) -> (Verdict, String) {
    if processors < 2 {
        return (
            Verdict::NotCompared,
            "WARNING: NOT COMPARED: one processor cannot show two lanes".to_owned(),
        );
    }
    if shared >= BAR {
        return (Verdict::Kept, format!("two lanes carry at least {BAR} times as much as one"));
    }
    let apart = apart();
    if apart < BAR {
        let text = format!(
            "WARNING: NOT COMPARED: two lanes carry {shared:.2} times as much as one, but two that share nothing \
             {apart:.2} times: these processors are busy, or threads of one core"
        );
        return (Verdict::NotCompared, text);
    }
    let text = format!(
        "FAILED: two lanes carry {shared:.2} times as much as one, which should be {BAR}; two that share nothing \
         {apart:.2} times"
    );
    (Verdict::Broken, text)
}
