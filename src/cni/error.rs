//! What the runtime is told when a call fails.

use std::io;

/// Kinds of failures; the runtime acts on the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The configuration is of a version that we do not speak, or that has no such verb.
    IncompatibleVersion,
    /// The environment lacks a variable, or one has no meaning.
    InvalidEnvironment,
    /// The system refused.
    Io,
    /// The input is no JSON, or not of the right shape.
    Decode,
    /// The input is understood and cannot work.
    InvalidConfig,
    /// It may work in a moment.
    TryAgainLater,
    /// No pod can be added.
    NotAvailable,
    /// No pod can be added, and those that are there may have lost their connections.
    LimitedConnectivity,
    /// The pod's network is not what the result says.
    Differs,
    /// A bug of ours.
    Internal,
}

impl Code {
    /// SPEC.md, "Error codes": 0 to 99 are the specification's, from 100 on a plugin has its own.
    pub const fn number(self) -> u32 {
        match self {
            Code::IncompatibleVersion => 1,
            Code::InvalidEnvironment => 4,
            Code::Io => 5,
            Code::Decode => 6,
            Code::InvalidConfig => 7,
            Code::TryAgainLater => 11,
            Code::NotAvailable => 50,
            Code::LimitedConnectivity => 51,
            Code::Differs => 100,
            Code::Internal => 999,
        }
    }
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CniError {
    /// What kind of failure.
    pub code: Code,
    /// What is wrong.
    pub message: String,
    /// What to do about it, or empty.
    pub details: String,
}

impl CniError {
    pub(super) fn new(code: Code, message: impl Into<String>) -> CniError {
        CniError { code, message: message.into(), details: String::new() }
    }

    pub(super) fn io(doing: impl Into<String>, error: &io::Error) -> CniError {
        CniError::new(Code::Io, format!("{}: {error}", doing.into()))
    }

    pub(super) fn with(mut self, details: impl Into<String>) -> CniError {
        self.details = details.into();
        self
    }
}
