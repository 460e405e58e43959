//! What the agent answers, as `slotd --format json` prints it: one object on standard output, and `{"progress": …}` a
//! line on standard error meanwhile. The agent writes these forms, `push` and every other client read them.
//!
//! A reader is lenient: it skips fields that it does not know, and of a part of [`Status`] that a later agent fills in
//! another way it knows only that it is there. Fields are never removed, renamed or given another meaning.

use std::path::PathBuf;

use bundle::bootstate::Slot;
use bundle::{SignedBy, Version};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// A part that a reader can do without: `None` when a later agent writes it in a form that is not understood.
fn if_understood<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).ok())
}

/// How a robot stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// The product.
    #[serde(default)]
    pub product: String,
    /// The board.
    #[serde(default)]
    pub board: String,
    /// The version that runs.
    pub version: Version,
    /// The slot that runs.
    pub running: Slot,
    /// The kernel's id of this start: whoever waits for a restart sees it change.
    pub boot_id: Option<String>,
    /// What the boot loader will do.
    pub boot: BootStatus,
    /// Whether a trial is not decided yet.
    pub pending: bool,
    /// Why a trial that runs is not committed yet, and what the checks found.
    pub health: Option<Health>,
    /// What was installed into the other slot.
    pub other: Option<InstalledSlot>,
    /// An install that was interrupted.
    #[serde(default, deserialize_with = "if_understood")]
    pub interrupted: Option<Journal>,
    /// The lowest that is accepted.
    #[serde(default)]
    pub floor: Floor,
    /// How many keys count.
    #[serde(default)]
    pub keys: usize,
    /// Which copy of the API serves, and why; `None`: this product has none.
    #[serde(default, deserialize_with = "if_understood")]
    pub api: Option<ApiStatus>,
    /// In which condition `data` is.
    #[serde(default, deserialize_with = "if_understood")]
    pub data: Option<DataStatus>,
    /// What a person must know, loudly.
    #[serde(default, deserialize_with = "if_understood")]
    pub alarm: Option<String>,
}

/// What the boot loader will do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootStatus {
    /// The committed slot.
    pub active: Slot,
    /// The trial that was armed last, if it has neither been committed nor rolled back.
    pub trial: Option<Trial>,
    /// What is damaged but does not stop the robot: `copy 1: its checksum does not fit`.
    #[serde(default)]
    pub damage: Vec<String>,
}

impl BootStatus {
    /// The trial that is not decided: one that has starts left, or the one that runs. A trial without
    /// starts left, seen from the committed slot, has failed.
    pub fn pending(&self, running: Slot) -> Option<Trial> {
        self.trial.filter(|trial| trial.tries > 0 || trial.slot == running)
    }
}

/// A slot that is started before it is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// Which.
    pub slot: Slot,
    /// How many starts are left; 0 while the last one runs, and after it failed.
    #[serde(default)]
    pub tries: u32,
}

/// What the watch over a trial says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Health {
    /// In a sentence.
    pub why: String,
    /// In full.
    #[serde(default, deserialize_with = "if_understood")]
    pub state: Option<WatchState>,
}

/// How far the watch over a trial is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Something is not well.
    Checking,
    /// All is well, and must stay so for a while.
    Settling,
    /// Everything was well, but the commit itself failed.
    CommitFailed,
    /// The trial was committed.
    Committed,
    /// The deadline is here: the robot restarts into its committed slot.
    OutOfTime,
}

/// What the watch over a trial knows; in `/run/slotd/health.json`, so it is of this start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WatchState {
    /// How far it is.
    pub phase: Phase,
    /// Seconds until the deadline.
    pub seconds_left: u64,
    /// Whether the hardware watchdog enforces the deadline.
    pub watchdog: bool,
    /// The last round of checks.
    pub checks: Vec<CheckOutcome>,
    /// Why the commit failed.
    pub problem: Option<String>,
}

impl WatchState {
    /// Why the trial is not committed yet, in a sentence.
    pub fn why(&self) -> String {
        let failing: Vec<String> = self
            .checks
            .iter()
            .filter(|outcome| !outcome.healthy)
            .map(|outcome| format!("{}: {}", outcome.name, outcome.found))
            .collect();
        let left = self.seconds_left;
        match self.phase {
            Phase::Checking => format!("not healthy yet, {left} s left: {}", failing.join("; ")),
            Phase::Settling => format!("healthy, and watched a moment longer; {left} s left"),
            Phase::CommitFailed => format!(
                "healthy, but committing failed ({}); {left} s left",
                self.problem.as_deref().unwrap_or("unknown")
            ),
            Phase::Committed => "committed".to_owned(),
            Phase::OutOfTime => format!("out of time: {}", failing.join("; ")),
        }
    }
}

/// How one health check went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckOutcome {
    /// The check's name.
    pub name: String,
    /// Whether all is well.
    pub healthy: bool,
    /// What was found, in words.
    pub found: String,
}

/// What was installed into a slot; also `/data/slotd/slot-a.json` and `slot-b.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledSlot {
    /// SHA-256 of the bundle's manifest; empty for a system that was flashed.
    pub manifest: String,
    /// The bundle's version.
    pub version: Version,
    /// The lowest version that may follow once this one is committed.
    pub minimum_version: Version,
    /// The lowest key epoch that counts once this one is committed.
    pub key_epoch: u32,
    /// Ids of the keys whose signatures counted.
    pub signed_by: Vec<String>,
}

/// An install under way; also `/data/slotd/journal.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Journal {
    /// SHA-256 of the bundle's manifest.
    pub manifest: String,
    /// The slot that is written.
    pub slot: Slot,
    /// The bundle's version, for messages.
    pub version: Version,
    /// The payload that is being written, by its place in the manifest.
    pub payload: usize,
    /// Frames of that payload, from its first, that are on the device, except for the first block.
    pub frames: u32,
}

/// The lowest that is accepted. It only ever rises. Also `/data/slotd/floor.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Floor {
    /// The lowest version; `None`: any.
    pub version: Option<Version>,
    /// The lowest key epoch.
    pub key_epoch: u32,
}

impl Floor {
    /// Raises it to what another floor asks.
    #[must_use]
    pub fn raised(self, version: Option<&Version>, key_epoch: u32) -> Self {
        // `None` sorts below every version.
        let version = self.version.max(version.cloned());
        Self { version, key_epoch: self.key_epoch.max(key_epoch) }
    }
}

/// Which copy of the API serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Serves {
    /// The one that was installed on `data`.
    Installed,
    /// The base's own.
    BuiltIn,
}

/// How the API stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiStatus {
    /// The distribution.
    pub package: String,
    /// Which copy serves.
    pub serves: Serves,
    /// The version that serves.
    pub version: String,
    /// The version that is built in.
    pub built_in: String,
    /// Why, in a sentence.
    pub why: String,
    /// SHA-256 of the manifest of the bundle that it came from.
    pub manifest: Option<String>,
    /// Those that were healthy and are kept, the last one first.
    pub good: Vec<GoodApi>,
    /// Whether a change is not confirmed yet.
    pub pending: bool,
}

/// An API that was healthy once; also in `/data/apps/api/.state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GoodApi {
    /// Its directory.
    pub folder: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of its bundle's manifest.
    pub manifest: String,
    /// Ids of the keys whose signatures counted.
    pub signed_by: Vec<String>,
}

/// What the start has made of `data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// As it was left.
    Clean,
    /// It was damaged and is repaired; files may be in its `lost+found`.
    Repaired,
    /// It was set aside as it is, beyond repair or missing; memory is in its place.
    Memory,
    /// Its file system has failed since and refuses writes.
    ReadOnly,
    /// Nobody has said.
    Unknown,
}

/// The condition of `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DataStatus {
    /// In a word.
    pub condition: Condition,
    /// Why, in words.
    pub why: Option<String>,
    /// Bytes of the file system.
    pub size: u64,
    /// Bytes free for everybody.
    pub free: u64,
}

/// How far a long operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// What is being done.
    pub step: Step,
    /// Bytes done of this step.
    pub done: u64,
    /// Bytes of this step.
    pub total: u64,
}

/// The long parts of an install.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Comparing the slot with the bundle.
    Survey,
    /// Verifying and writing.
    Write,
    /// Reading the slot back from the device.
    ReadBack,
    /// One that only a later agent has; never written.
    #[serde(other)]
    Unknown,
}

impl Step {
    /// What is being done, in a word or two.
    pub fn doing(self) -> &'static str {
        match self {
            Self::Survey => "comparing",
            Self::Write => "writing",
            Self::ReadBack => "reading back",
            Self::Unknown => "working",
        }
    }
}

/// What an install of a system did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledSystem {
    /// The slot that was written.
    pub slot: Slot,
    /// The version in it now.
    pub version: Version,
    /// SHA-256 of the bundle's manifest.
    pub manifest: String,
    /// Whether it went on where an interrupted one had stopped.
    pub resumed: bool,
    /// Bytes of all payloads.
    pub size: u64,
    /// Bytes that the slot held already.
    pub held: u64,
    /// Bytes taken from the running slot.
    pub taken: u64,
    /// Bytes written to the slot.
    pub written: u64,
    /// Milliseconds until everything was written and flushed.
    pub write_ms: u64,
    /// Milliseconds of reading the slot back.
    pub read_back_ms: u64,
}

/// What an install of an API did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledApi {
    /// The component: `api`.
    pub component: String,
    /// The version that serves now.
    pub version: String,
    /// Its directory in `/data/apps/api`.
    pub folder: String,
    /// SHA-256 of the bundle's manifest.
    pub manifest: String,
    /// The version that served before; `None`: the base's own.
    pub before: Option<String>,
    /// How many wheels it has.
    pub wheels: usize,
    /// How many of them were there already.
    pub reused: usize,
    /// Bytes of all payloads.
    pub size: u64,
    /// Bytes of those that were there already.
    pub held: u64,
    /// Bytes written.
    pub written: u64,
    /// Milliseconds until everything was written and flushed.
    pub write_ms: u64,
    /// Milliseconds during which nothing answered.
    pub down_ms: u64,
}

/// What an install has put where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Installed {
    /// A system, into the idle slot.
    System(InstalledSystem),
    /// An API, which serves.
    Api(InstalledApi),
}

impl Installed {
    /// What was put into the idle slot, if that is what was installed.
    pub fn system(self) -> Option<InstalledSystem> {
        match self {
            Self::System(system) => Some(system),
            Self::Api(_) => None,
        }
    }
}

/// What a bundle turned out to be, or a slot.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verified {
    /// The slot that was compared with it; `None`: all of the bundle itself was read.
    pub slot: Option<Slot>,
    /// Its version.
    pub version: Version,
    /// SHA-256 of its manifest.
    pub manifest: String,
    /// Whose signatures count.
    pub signed_by: Vec<SignedBy>,
    /// Bytes of all payloads.
    pub size: u64,
}

/// What a change of the slot leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Changed {
    /// The slot that is committed, rolled back to, or tried next.
    pub slot: Slot,
    /// How the robot must restart for it; `None`: not at all.
    pub restart: Option<Restart>,
}

/// The two kinds of restart: a firmware may have to be told that a trial begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Into the trial that is armed.
    Trial,
    /// Into the committed slot.
    Committed,
}

/// What going back to an earlier API has done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiWentBack {
    /// The component: `api`.
    pub component: String,
    /// The version that serves now; `None`: the base's own.
    pub version: Option<String>,
    /// Milliseconds during which nothing answered.
    pub down_ms: u64,
}

/// Where a reset's backup is; `None`: none was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackedUp {
    /// The file.
    pub backup: Option<PathBuf>,
}

/// One event of the robot's log; also a line of `/data/slotd/log/events.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one; shows where lines are missing.
    pub number: u64,
    /// Seconds since 1970 by the robot's clock, which may be wrong: a robot may have none.
    pub time: u64,
    /// First characters of the kernel's boot id: events with the same one are of one start.
    pub boot: String,
    /// Which kind, in kebab-case.
    pub event: String,
    /// What else there is to say.
    #[serde(flatten)]
    pub details: Map<String, Value>,
}

impl Event {
    /// Why it happened, where an event says so in words.
    pub fn why(&self) -> Option<&str> {
        self.details.get("why")?.as_str()
    }
}
