//! The requests to a robot's agent. Every client (the command line, later a USB stick, the local network, a web page)
//! makes one of these, and the agent answers all of them in one place.

use std::fmt;
use std::path::PathBuf;

use bundle::bootstate::Slot;
use serde::{Deserialize, Serialize};

/// A request. A request with unknown fields is refused and never executed in part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum AgentRequest {
    /// The robot's status.
    Status,
    /// The board's own description, and the status.
    Report,
    /// The log of decisions and refusals, oldest first.
    Log {
        /// Only the last so many events; `None`: all.
        last: Option<usize>,
    },
    /// Run the health checks once.
    Health,
    /// Watch over a trial until it is committed or its deadline is reached.
    Watch,
    /// Verify a bundle to its last byte, or compare a slot with it.
    Verify {
        /// A file, `-` for standard input, or an address that begins with `http://` or `https://`.
        source: String,
        /// The slot to be compared with the bundle; `None`: the bundle alone is checked.
        slot: Option<Slot>,
    },
    /// Compare the files of the APIs on `data` with their stored hashes.
    VerifyApi,
    /// Install a bundle.
    Install {
        /// As in [`AgentRequest::Verify`].
        source: String,
        /// Do not restart: the trial begins with a later restart.
        no_restart: bool,
        /// Why a version below the floor is accepted this once.
        allow_downgrade: Option<String>,
    },
    /// Commit the running slot.
    Commit,
    /// End a trial.
    RollBack {
        /// Do not restart.
        no_restart: bool,
    },
    /// Go back to the previous API.
    RollBackApi,
    /// Try the other slot.
    BootOther {
        /// Do not restart.
        no_restart: bool,
        /// Why a version below the floor is accepted this once.
        allow_downgrade: Option<String>,
    },
    /// The accepted keys.
    Keys,
    /// Take a newer key set.
    TakeKeys {
        /// Its file; the signature is beside it, as FILE.minisig.
        file: PathBuf,
    },
    /// Prepare a factory reset for the next restart.
    Reset {
        /// Make a backup on `data` first.
        backup: bool,
        /// Do not restart.
        no_restart: bool,
    },
    /// Write a backup of everything on `data`.
    Backup {
        /// A file, or `-` for standard output.
        file: String,
    },
    /// Prepare a restore, which replaces everything on `data` with the next restart.
    Restore {
        /// A file, or `-` for standard input.
        file: String,
        /// Do not restart.
        no_restart: bool,
    },
    /// Update `/data/system` from the resources of the API's package.
    Provision,
    /// The same during a start: only in the first start of a base or of another API.
    ProvisionAtStart,
    /// Compare `/data/system` with the resources.
    CheckProvisioned,
    /// During a start: extend the partition `data` over the rest of the card.
    GrowData,
    /// During a start: carry out a pending change, and migrate `data` to the system's version.
    PrepareData,
    /// During a start: apply the settings from the flasher.
    TakeSeed,
    /// The job that is running, or that ran last since the start.
    Job,
    /// Cancel the running job.
    CancelJob,
}

/// The kind of a request, without its details: rights and rules are defined by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "as in `AgentRequest`")]
pub enum AgentVerb {
    Status,
    Report,
    Log,
    Health,
    Watch,
    Verify,
    VerifyApi,
    Install,
    Commit,
    RollBack,
    RollBackApi,
    BootOther,
    Keys,
    TakeKeys,
    Reset,
    Backup,
    Restore,
    Provision,
    ProvisionAtStart,
    CheckProvisioned,
    GrowData,
    PrepareData,
    TakeSeed,
    Job,
    CancelJob,
}

impl AgentVerb {
    /// All verbs.
    pub const ALL: [Self; 25] = [
        Self::Status,
        Self::Report,
        Self::Log,
        Self::Health,
        Self::Watch,
        Self::Verify,
        Self::VerifyApi,
        Self::Install,
        Self::Commit,
        Self::RollBack,
        Self::RollBackApi,
        Self::BootOther,
        Self::Keys,
        Self::TakeKeys,
        Self::Reset,
        Self::Backup,
        Self::Restore,
        Self::Provision,
        Self::ProvisionAtStart,
        Self::CheckProvisioned,
        Self::GrowData,
        Self::PrepareData,
        Self::TakeSeed,
        Self::Job,
        Self::CancelJob,
    ];
}

impl fmt::Display for AgentVerb {
    /// As on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Status => "status",
            Self::Report => "report",
            Self::Log => "log",
            Self::Health | Self::Watch => "health",
            Self::Verify | Self::VerifyApi => "verify",
            Self::Install => "install",
            Self::Commit => "commit",
            Self::RollBack | Self::RollBackApi => "roll-back",
            Self::BootOther => "boot-other",
            Self::Keys | Self::TakeKeys => "keys",
            Self::Reset => "reset",
            Self::Backup => "backup",
            Self::Restore => "restore",
            Self::Provision | Self::ProvisionAtStart | Self::CheckProvisioned => "provision",
            Self::GrowData | Self::PrepareData => "data",
            Self::TakeSeed => "seed",
            Self::Job | Self::CancelJob => "job",
        })
    }
}

impl AgentRequest {
    /// The kind of the request.
    pub fn verb(&self) -> AgentVerb {
        match self {
            Self::Status => AgentVerb::Status,
            Self::Report => AgentVerb::Report,
            Self::Log { .. } => AgentVerb::Log,
            Self::Health => AgentVerb::Health,
            Self::Watch => AgentVerb::Watch,
            Self::Verify { .. } => AgentVerb::Verify,
            Self::VerifyApi => AgentVerb::VerifyApi,
            Self::Install { .. } => AgentVerb::Install,
            Self::Commit => AgentVerb::Commit,
            Self::RollBack { .. } => AgentVerb::RollBack,
            Self::RollBackApi => AgentVerb::RollBackApi,
            Self::BootOther { .. } => AgentVerb::BootOther,
            Self::Keys => AgentVerb::Keys,
            Self::TakeKeys { .. } => AgentVerb::TakeKeys,
            Self::Reset { .. } => AgentVerb::Reset,
            Self::Backup { .. } => AgentVerb::Backup,
            Self::Restore { .. } => AgentVerb::Restore,
            Self::Provision => AgentVerb::Provision,
            Self::ProvisionAtStart => AgentVerb::ProvisionAtStart,
            Self::CheckProvisioned => AgentVerb::CheckProvisioned,
            Self::GrowData => AgentVerb::GrowData,
            Self::PrepareData => AgentVerb::PrepareData,
            Self::TakeSeed => AgentVerb::TakeSeed,
            Self::Job => AgentVerb::Job,
            Self::CancelJob => AgentVerb::CancelJob,
        }
    }
}
