//! What a robot's agent can be asked for. Every client (the command line, later a USB stick, the local network, a web
//! page) makes one of these, and the agent answers all of them in one place.

use std::fmt;
use std::path::PathBuf;

use bundle::bootstate::Slot;
use serde::{Deserialize, Serialize};

/// A request. Strict: one that says more than this agent knows is refused, never done in part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The robot's status.
    Status,
    /// What the board says of itself, and the status.
    Report,
    /// What was decided and refused, oldest first.
    Log {
        /// Only the last so many events; `None`: all.
        last: Option<usize>,
    },
    /// The health checks, once.
    Health,
    /// The watch over a trial, until it is committed or out of time.
    Watch,
    /// A bundle, checked to its last byte; or a slot against it.
    Verify {
        /// A file, `-` for standard input, or an address that begins with `http://` or `https://`.
        source: String,
        /// The slot to be compared with the bundle; `None`: the bundle alone is checked.
        slot: Option<Slot>,
    },
    /// The files of the APIs on `data`, checked against the hashes that were kept of them.
    VerifyApi,
    /// A bundle, installed.
    Install {
        /// As in [`Request::Verify`].
        source: String,
        /// Leave the restart that begins a trial to somebody else.
        no_restart: bool,
        /// Why a version below the floor is accepted this once.
        allow_downgrade: Option<String>,
    },
    /// The running slot, kept.
    Commit,
    /// A trial, ended.
    RollBack {
        /// Leave the restart to somebody else.
        no_restart: bool,
    },
    /// The API before this one.
    RollBackApi,
    /// The other slot, tried.
    BootOther {
        /// Leave the restart to somebody else.
        no_restart: bool,
        /// Why a version below the floor is accepted this once.
        allow_downgrade: Option<String>,
    },
    /// The accepted keys.
    Keys,
    /// A newer key set.
    TakeKeys {
        /// Its file; the signature is beside it, as FILE.minisig.
        file: PathBuf,
    },
    /// A factory reset, with the next restart.
    Reset {
        /// Make a backup on `data` first.
        backup: bool,
        /// Leave the restart to somebody else.
        no_restart: bool,
    },
    /// A backup of everything on `data`.
    Backup {
        /// A file, or `-` for standard output.
        file: String,
    },
    /// A backup in the place of everything on `data`, with the next restart.
    Restore {
        /// A file, or `-` for standard input.
        file: String,
        /// Leave the restart to somebody else.
        no_restart: bool,
    },
    /// The resources of the API's package, made `/data/system`.
    Provision,
    /// The same for a start: only in the first one of a base or of another API.
    ProvisionAtStart,
    /// `/data/system`, compared with the resources.
    CheckProvisioned,
    /// For a start: the partition `data` takes the rest of the card.
    GrowData,
    /// For a start: what waits is carried out, and `data` comes to the system's version.
    PrepareData,
    /// For a start: what the flasher left is taken over.
    TakeSeed,
    /// The long operation that runs, or ran last in this start.
    Job,
    /// That operation, ended before its time.
    CancelJob,
}

/// What is asked for, without the details: what rights and rules go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "as in `Request`")]
pub enum Verb {
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

impl Verb {
    /// All of them.
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

impl fmt::Display for Verb {
    /// As it is typed.
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

impl Request {
    /// What is asked for.
    pub fn verb(&self) -> Verb {
        match self {
            Self::Status => Verb::Status,
            Self::Report => Verb::Report,
            Self::Log { .. } => Verb::Log,
            Self::Health => Verb::Health,
            Self::Watch => Verb::Watch,
            Self::Verify { .. } => Verb::Verify,
            Self::VerifyApi => Verb::VerifyApi,
            Self::Install { .. } => Verb::Install,
            Self::Commit => Verb::Commit,
            Self::RollBack { .. } => Verb::RollBack,
            Self::RollBackApi => Verb::RollBackApi,
            Self::BootOther { .. } => Verb::BootOther,
            Self::Keys => Verb::Keys,
            Self::TakeKeys { .. } => Verb::TakeKeys,
            Self::Reset { .. } => Verb::Reset,
            Self::Backup { .. } => Verb::Backup,
            Self::Restore { .. } => Verb::Restore,
            Self::Provision => Verb::Provision,
            Self::ProvisionAtStart => Verb::ProvisionAtStart,
            Self::CheckProvisioned => Verb::CheckProvisioned,
            Self::GrowData => Verb::GrowData,
            Self::PrepareData => Verb::PrepareData,
            Self::TakeSeed => Verb::TakeSeed,
            Self::Job => Verb::Job,
            Self::CancelJob => Verb::CancelJob,
        }
    }
}
