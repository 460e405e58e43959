//! The JSON answers of the robot's agent, as far as a push needs them; other fields are ignored.

use std::fmt;

use bundle::Version;
use bundle::bootstate::Slot;
use serde::{Deserialize, Serialize};

/// The robot's status.
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

/// The boot loader's next choice.
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

/// What was installed into the idle slot.
#[derive(Debug, Clone, Deserialize)]
pub struct OtherSlot {
    pub manifest: String,
}

/// The result of an install.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Installed {
    /// Whether it resumed an interrupted install.
    pub resumed: bool,
    /// Bytes of all payloads.
    pub size: u64,
    /// Bytes that the slot already contained and that were not written again.
    pub held: u64,
    /// Bytes written.
    pub written: u64,
}

/// The result of an install of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledApi {
    /// The version that runs now.
    pub version: String,
    /// The previous version; `None`: the system's own.
    pub before: Option<String>,
    /// How many wheels it has.
    pub wheels: u64,
    /// How many of them were present already.
    pub reused: u64,
    /// Bytes written.
    pub written: u64,
    /// Milliseconds without an answer.
    pub down_ms: u64,
}

/// A refusal of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Stable, for programs; docs/reference/slotd.md lists all.
    pub code: String,
    /// The message.
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

/// The progress of an install.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Progress {
    pub step: String,
    pub done: u64,
    pub total: u64,
}
