//! What a push tells of the agent's answers: the part of each that matters to whoever pushes.

use serde::Serialize;

/// What an install did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Installed {
    /// Whether it went on where an interrupted one had stopped.
    pub resumed: bool,
    /// Bytes of all payloads.
    pub size: u64,
    /// Bytes that the slot held already, and that were not written again.
    pub held: u64,
    /// Bytes written.
    pub written: u64,
}

impl From<contract::answer::InstalledSystem> for Installed {
    fn from(done: contract::answer::InstalledSystem) -> Self {
        Self { resumed: done.resumed, size: done.size, held: done.held, written: done.written }
    }
}

/// What an install of the API did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledApi {
    /// The version that serves now.
    pub version: String,
    /// The version that served before; `None`: the system's own.
    pub before: Option<String>,
    /// How many wheels it has.
    pub wheels: usize,
    /// How many of them were there already.
    pub reused: usize,
    /// Bytes written.
    pub written: u64,
    /// Milliseconds during which nothing answered.
    pub down_ms: u64,
}

impl From<contract::answer::InstalledApi> for InstalledApi {
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
