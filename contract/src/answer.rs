//! The agent's answers, as `slotd --format json` prints them: one object on standard output, and one line
//! `{"progress": …}` at a time on standard error. The agent writes these formats, `push` and every other client read them.
//!
//! A reader is lenient: it ignores unknown fields, and optional parts of [`RobotStatus`] that a later agent writes in
//! another format. Fields are never removed, renamed or given another meaning.

use std::path::PathBuf;

use bundle::bootstate::Slot;
use bundle::{SignedBy, Version};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// An optional part: `None` if a later agent writes it in a format that this reader does not understand.
fn if_understood<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).ok())
}

/// The robot's status.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RobotStatus {
    /// The product.
    #[serde(default)]
    pub product: String,
    /// The board.
    #[serde(default)]
    pub board: String,
    /// The running version.
    pub version: Version,
    /// The running slot.
    pub running: Slot,
    /// The kernel's boot id, which changes with every restart.
    pub boot_id: Option<String>,
    /// What the boot loader will do.
    pub boot: BootStatus,
    /// Whether a trial is still pending.
    pub pending: bool,
    /// Why a running trial is not committed yet, and the results of the checks.
    pub health: Option<TrialHealth>,
    /// The system that was installed into the other slot.
    pub other: Option<InstalledSlot>,
    /// The number of the job that is running.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "if_understood")]
    pub job: Option<u64>,
    /// An install that was interrupted, or that [`job`](Self::job) is running.
    #[serde(default, deserialize_with = "if_understood")]
    pub interrupted: Option<InstallJournal>,
    /// The lowest version and key epoch that are accepted.
    #[serde(default)]
    pub floor: Floor,
    /// How many keys are accepted.
    #[serde(default)]
    pub keys: usize,
    /// Which copy of the API serves, and why; `None`: this product has none.
    #[serde(default, deserialize_with = "if_understood")]
    pub api: Option<ApiStatus>,
    /// The condition of `data`.
    #[serde(default, deserialize_with = "if_understood")]
    pub data: Option<DataStatus>,
    /// Warnings for the user.
    #[serde(default, deserialize_with = "if_understood")]
    pub alarm: Option<String>,
}

/// What the boot loader will do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootStatus {
    /// The committed slot.
    pub active: Slot,
    /// The trial that was armed last, if it has neither been committed nor rolled back.
    pub trial: Option<SlotTrial>,
    /// Damage that does not stop the robot, human-readable: `copy 1: checksum mismatch`.
    #[serde(default)]
    pub damage: Vec<String>,
}

impl BootStatus {
    /// The trial that is not decided yet: it has starts left, or it is running. A trial without starts left,
    /// seen from the committed slot, has failed.
    pub fn pending(&self, running: Slot) -> Option<SlotTrial> {
        self.trial.filter(|trial| trial.tries > 0 || trial.slot == running)
    }
}

/// A slot that is started before it is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotTrial {
    /// The slot.
    pub slot: Slot,
    /// How many starts are left; 0 while the last one runs, and after it failed.
    #[serde(default)]
    pub tries: u32,
}

/// The status of the watch over a trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrialHealth {
    /// The status in a sentence.
    pub why: String,
    /// The whole state.
    #[serde(default, deserialize_with = "if_understood")]
    pub state: Option<TrialState>,
}

/// The phases of the watch over a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrialPhase {
    /// A check fails.
    Checking,
    /// All checks pass, and must keep passing for a while.
    Settling,
    /// All checks passed, but the commit itself failed.
    CommitFailed,
    /// The trial was committed.
    Committed,
    /// The deadline is reached: the robot restarts into its committed slot.
    OutOfTime,
}

/// The state of the watch over a trial; in `/run/slotd/health.json`, so it exists only during this start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrialState {
    /// The phase.
    pub phase: TrialPhase,
    /// Seconds until the deadline.
    pub seconds_left: u64,
    /// Whether the hardware watchdog enforces the deadline.
    pub watchdog: bool,
    /// The last round of checks.
    pub checks: Vec<CheckOutcome>,
    /// Why the commit failed.
    pub problem: Option<String>,
}

impl TrialState {
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
            TrialPhase::Checking => {
                format!("not healthy yet, {left} s left: {}", failing.join("; "))
            }
            TrialPhase::Settling => format!("healthy, observed for a moment longer; {left} s left"),
            TrialPhase::CommitFailed => format!(
                "healthy, but committing failed ({}); {left} s left",
                self.problem.as_deref().unwrap_or("unknown")
            ),
            TrialPhase::Committed => "committed".to_owned(),
            TrialPhase::OutOfTime => format!("out of time: {}", failing.join("; ")),
        }
    }
}

/// The result of one health check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckOutcome {
    /// The check's name.
    pub name: String,
    /// Whether the check passed.
    pub healthy: bool,
    /// What was found, human-readable.
    pub found: String,
}

/// The bundle that was installed into a slot; also `/data/slotd/slot-a.json` and `slot-b.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledSlot {
    /// SHA-256 of the bundle's manifest; empty for a system that was flashed.
    pub manifest: String,
    /// The bundle's version.
    pub version: Version,
    /// The lowest version that may follow once this one is committed.
    pub minimum_version: Version,
    /// The lowest key epoch that is accepted once this one is committed.
    pub key_epoch: u32,
    /// Ids of the keys whose signatures were accepted.
    pub signed_by: Vec<String>,
}

/// An install in progress; also `/data/slotd/journal.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstallJournal {
    /// SHA-256 of the bundle's manifest.
    pub manifest: String,
    /// The slot that is written.
    pub slot: Slot,
    /// The bundle's version, for display.
    pub version: Version,
    /// The payload that is being written, by its index in the manifest.
    pub payload: usize,
    /// Number of leading frames of that payload that are on the device, except for the first block.
    pub frames: u32,
}

/// The lowest accepted version and key epoch. It only ever rises. Also `/data/slotd/floor.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Floor {
    /// The lowest version; `None`: any.
    pub version: Option<Version>,
    /// The lowest key epoch.
    pub key_epoch: u32,
}

impl Floor {
    /// The maximum of this floor and another one.
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
pub enum ServingApi {
    /// The one installed on `data`.
    Installed,
    /// The one built into the base.
    BuiltIn,
}

/// The API's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiStatus {
    /// The distribution.
    pub package: String,
    /// Which copy serves.
    pub serves: ServingApi,
    /// The version that serves.
    pub version: String,
    /// The version that is built in.
    pub built_in: String,
    /// Why this copy serves, in a sentence.
    pub why: String,
    /// SHA-256 of the manifest of the bundle that it came from.
    pub manifest: Option<String>,
    /// Versions that were healthy and are kept, the latest first.
    pub good: Vec<KnownGoodApi>,
    /// Whether a change is not confirmed yet.
    pub pending: bool,
}

/// An API that was healthy once; also in `/data/apps/api/.state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct KnownGoodApi {
    /// Its directory.
    pub folder: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of its bundle's manifest.
    pub manifest: String,
    /// Ids of the keys whose signatures were accepted.
    pub signed_by: Vec<String>,
}

/// The condition of `data` after the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataCondition {
    /// Undamaged.
    Clean,
    /// It was damaged and has been repaired; files may be in its `lost+found`.
    Repaired,
    /// It cannot be repaired or is missing, and was set aside unchanged; memory is used instead.
    Memory,
    /// Its file system has failed since the start and is read-only.
    ReadOnly,
    /// The start has not recorded it.
    Unknown,
}

/// The condition of `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DataStatus {
    /// The condition.
    pub condition: DataCondition,
    /// Why, human-readable.
    pub why: Option<String>,
    /// Bytes of the file system.
    pub size: u64,
    /// Bytes that are free for ordinary users.
    pub free: u64,
}

/// The progress of a long operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// The current step.
    pub step: InstallStep,
    /// Bytes done of this step.
    pub done: u64,
    /// Bytes of this step.
    pub total: u64,
}

/// The long parts of an install.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstallStep {
    /// Comparing the slot with the bundle.
    Survey,
    /// Verifying and writing.
    Write,
    /// Reading the slot back from the device.
    ReadBack,
    /// A step of a later agent; never written.
    #[serde(other)]
    Unknown,
}

impl InstallStep {
    /// A short description of the step.
    pub fn describe(self) -> &'static str {
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
    /// Whether it resumed an interrupted install.
    pub resumed: bool,
    /// Bytes of all payloads.
    pub size: u64,
    /// Bytes that were already in the slot.
    pub held: u64,
    /// Bytes copied from the running slot.
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
    /// The version that served before; `None`: the built-in API.
    pub before: Option<String>,
    /// How many wheels it has.
    pub wheels: usize,
    /// How many of them were already present.
    pub reused: usize,
    /// Bytes of all payloads.
    pub size: u64,
    /// Bytes of payloads that were already present.
    pub held: u64,
    /// Bytes written.
    pub written: u64,
    /// Milliseconds until everything was written and flushed.
    pub write_ms: u64,
    /// Milliseconds during which no API answered.
    pub down_ms: u64,
}

/// The result of an install.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum InstallOutcome {
    /// A system was written to the idle slot.
    System(InstalledSystem),
    /// An API was installed and serves.
    Api(InstalledApi),
}

impl InstallOutcome {
    /// The system that was written to the idle slot, if there is one.
    pub fn system(self) -> Option<InstalledSystem> {
        match self {
            Self::System(system) => Some(system),
            Self::Api(_) => None,
        }
    }
}

/// The result of verifying a bundle or a slot.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VerifyOutcome {
    /// The slot that was compared with the bundle; `None`: the bundle itself was read completely.
    pub slot: Option<Slot>,
    /// Its version.
    pub version: Version,
    /// SHA-256 of its manifest.
    pub manifest: String,
    /// The keys whose signatures were accepted.
    pub signed_by: Vec<SignedBy>,
    /// Bytes of all payloads.
    pub size: u64,
}

/// The result of a change of the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SlotChange {
    /// The slot that is committed, rolled back to, or tried next.
    pub slot: Slot,
    /// How the robot must restart for it; `None`: not at all.
    pub restart: Option<RestartKind>,
}

/// The two kinds of restart: a firmware may have to be told that a trial begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartKind {
    /// Into the trial that is armed.
    Trial,
    /// Into the committed slot.
    Committed,
}

/// The result of going back to an earlier API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiRollback {
    /// The component: `api`.
    pub component: String,
    /// The version that serves now; `None`: the built-in API.
    pub version: Option<String>,
    /// Milliseconds during which no API answered.
    pub down_ms: u64,
}

/// Where a reset's backup is; `None`: none was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetBackup {
    /// The file.
    pub backup: Option<PathBuf>,
}

/// One event of the robot's log; also a line of `/data/slotd/log/events.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RobotEvent {
    /// Grows by one, so that missing lines can be noticed.
    pub number: u64,
    /// Seconds since 1970 by the robot's clock. It may be wrong: a robot may have no battery-backed clock.
    pub time: u64,
    /// First characters of the kernel's boot id: events with the same id belong to one start.
    pub boot: String,
    /// The event's name, in kebab-case.
    pub event: String,
    /// The event's details.
    #[serde(flatten)]
    pub details: Map<String, Value>,
}

impl RobotEvent {
    /// Why it happened, if the event says so.
    pub fn why(&self) -> Option<&str> {
        self.details.get("why")?.as_str()
    }
}
