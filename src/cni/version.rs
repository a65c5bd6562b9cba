//! Versions of the CNI specification.

use std::fmt;

use serde_json::{Value, json};

/// A version that we speak. Older ones have no chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpecVersion {
    /// 0.3.0: chains.
    V0_3_0,
    /// 0.3.1: a typing mistake less.
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: addresses no longer say their family.
    V1_0_0,
    /// 1.1.0: STATUS, GC, and the MTU of interfaces.
    V1_1_0,
}

impl SpecVersion {
    /// All, the oldest first.
    pub const ALL: [SpecVersion; 5] = [
        SpecVersion::V0_3_0,
        SpecVersion::V0_3_1,
        SpecVersion::V0_4_0,
        SpecVersion::V1_0_0,
        SpecVersion::V1_1_0,
    ];
    /// The newest.
    pub const NEWEST: SpecVersion = SpecVersion::V1_1_0;

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            SpecVersion::V0_3_0 => "0.3.0",
            SpecVersion::V0_3_1 => "0.3.1",
            SpecVersion::V0_4_0 => "0.4.0",
            SpecVersion::V1_0_0 => "1.0.0",
            SpecVersion::V1_1_0 => "1.1.0",
        }
    }

    /// `None`: we do not speak it.
    pub fn parse(text: &str) -> Option<SpecVersion> {
        SpecVersion::ALL.into_iter().find(|version| version.name() == text)
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What VERSION prints.
pub(super) fn answer() -> Value {
    json!({
        "cniVersion": SpecVersion::NEWEST.name(),
        "supportedVersions": SpecVersion::ALL.map(SpecVersion::name),
    })
}
