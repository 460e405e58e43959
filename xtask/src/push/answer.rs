//! What the robot's agent says in JSON, as far as a push needs it; other fields are passed over.

use std::fmt;

use bundle::Version;
use bundle::bootstate::Slot;
use serde::{Deserialize, Serialize};

/// How the robot stands.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    pub version: Version,
    pub running: Slot,
    pub boot_id: String,
    pub boot: Boot,
    pub pending: bool,
    pub health: Option<Health>,
    pub other: Option<OtherSlot>,
}

/// What the boot loader will do.
#[derive(Debug, Clone, Deserialize)]
pub struct Boot {
    pub active: Slot,
    pub trial: Option<Trial>,
}

/// A trial that was neither committed nor rolled back.
#[derive(Debug, Clone, Deserialize)]
pub struct Trial {}

/// Why a trial is not committed yet.
#[derive(Debug, Clone, Deserialize)]
pub struct Health {
    pub why: String,
}

/// What was installed into the slot that does not run.
#[derive(Debug, Clone, Deserialize)]
pub struct OtherSlot {
    pub manifest: String,
}

/// What an install did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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

/// What an install of the API did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledApi {
    /// The version that serves now.
    pub version: String,
    /// The version that served before; `None`: the system's own.
    pub before: Option<String>,
    /// How many wheels it has.
    pub wheels: u64,
    /// How many of them were there already.
    pub reused: u64,
    /// Bytes written.
    pub written: u64,
    /// Milliseconds during which nothing answered.
    pub down_ms: u64,
}

/// Why the agent refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Stable, for programs; docs/reference/slotd.md lists all.
    pub code: String,
    /// For people.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]\nhelp: {}", self.message, self.code, self.help)
    }
}

impl std::error::Error for Refused {}

/// One event of the robot's log.
#[derive(Debug, Clone, Deserialize)]
pub struct Event {
    pub event: String,
    pub why: Option<String>,
}

/// How far an install is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Progress {
    pub step: String,
    pub done: u64,
    pub total: u64,
}
