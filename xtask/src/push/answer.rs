//! The part of the agent's answers that a push reports.

use serde::Serialize;

/// The result of an install.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PushedSystem {
    /// Whether it resumed an interrupted install.
    pub resumed: bool,
    /// Bytes of all payloads.
    pub size: u64,
    /// Bytes that the slot already contained and that were not written again.
    pub held: u64,
    /// Bytes written.
    pub written: u64,
}

impl From<contract::answer::InstalledSystem> for PushedSystem {
    fn from(done: contract::answer::InstalledSystem) -> Self {
        Self { resumed: done.resumed, size: done.size, held: done.held, written: done.written }
    }
}

/// The result of an install of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PushedApi {
    /// The version that runs now.
    pub version: String,
    /// The previous version; `None`: the system's own.
    pub before: Option<String>,
    /// How many wheels it has.
    pub wheels: usize,
    /// How many of them were present already.
    pub reused: usize,
    /// Bytes written.
    pub written: u64,
    /// Milliseconds without an answer.
    pub down_ms: u64,
}

impl From<contract::answer::InstalledApi> for PushedApi {
    fn from(done: contract::answer::InstalledApi) -> Self {
        Self {
            version: done.version,
            before: done.before,
            wheels: done.wheels,
            reused: done.reused,
            written: done.written,
            down_ms: done.down_ms,
        }
    }
}
