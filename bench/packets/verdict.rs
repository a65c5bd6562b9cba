//! What a gate says, and how it ends.

use std::process::ExitCode;

/// What is to be said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is as it has to be.
    Kept,
    /// Here it cannot be seen: nothing is known.
    NotCompared,
    /// It is not.
    Broken,
}

impl Verdict {
    /// For `tests/run`: what was not compared did not pass.
    pub fn exit_code(self) -> ExitCode {
        match self {
            Verdict::Kept => ExitCode::SUCCESS,
            Verdict::Broken => ExitCode::FAILURE,
            Verdict::NotCompared => ExitCode::from(3),
        }
    }
}
