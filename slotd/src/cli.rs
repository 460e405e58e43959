//! The command line's arguments, as a request to the lobby; [`text`] formats its answers.

pub mod text;

use std::path::PathBuf;

use bundle::bootstate::Slot;
use clap::{Args, Parser, Subcommand, ValueEnum};
use slotd::lobby::AgentRequest;
use slotd::{Refusal, Result};

/// Updates this robot and chooses which of its two systems runs.
#[derive(Debug, Parser)]
#[command(name = "slotd", version, after_help = EXIT_CODES)]
pub struct AgentCli {
    /// Form of the answer. json: one object on standard output, progress on standard error
    #[arg(long, global = true, value_enum, default_value_t = AnswerFormat::Text)]
    pub format: AnswerFormat,

    /// Work below this directory instead of `/`, and restart nothing
    #[arg(long, global = true, value_name = "DIR", default_value = "/", hide = true)]
    pub root: PathBuf,

    /// For the update user's door: grant that user's rights only
    #[arg(long, global = true, hide = true)]
    pub as_update: bool,

    /// What to do
    #[command(subcommand)]
    pub verb: CliVerb,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 the robot fails, 2 invalid arguments, 3 the bundle is refused, \
4 the robot's state does not allow it now, 5 the bundle's source fails.";

/// The forms of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AnswerFormat {
    /// Lines for a terminal.
    Text,
    /// One JSON object.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum CliVerb {
    /// Show which system runs, what is on trial, and what was interrupted
    Status,
    /// Check a whole bundle, as `install` would, or compare a slot with it, or check the installed API; nothing is
    /// written
    Verify {
        /// A file, `-` for standard input, or an http(s) address
        #[arg(required_unless_present = "component")]
        source: Option<String>,
        /// Compare the files of the installed API and of the older ones on data with their stored hashes
        #[arg(long, value_enum, conflicts_with_all = ["source", "slot"])]
        component: Option<ComponentName>,
        /// Compare this slot with the bundle, block by block; it may be the running one
        #[arg(long, value_enum)]
        slot: Option<SlotName>,
    },
    /// Write a bundle into the other slot, and restart into it on trial. A bundle of the API only is installed
    /// beside the running API and serves at once; if it is not healthy, the previous API serves again. The install
    /// continues when this command ends (Ctrl-C, a broken connection): see `job`
    Install {
        /// The bundle, and how to install it
        #[command(flatten)]
        install: InstallArgs,
        /// Install in this process: if it ends, the install is interrupted
        #[arg(long)]
        foreground: bool,
    },
    /// Keep the running system
    Commit,
    /// End a trial; restarts if its slot is running
    RollBack {
        /// Go back to the previous API, or to the built-in one, without a restart of the robot
        #[arg(long, value_enum, conflicts_with = "no_restart")]
        component: Option<ComponentName>,
        /// Do not restart
        #[arg(long)]
        no_restart: bool,
    },
    /// Restart into the other slot, on trial
    BootOther {
        /// Do not restart
        #[arg(long)]
        no_restart: bool,
        /// Accept a version below the floor this once; the reason goes into the log
        #[arg(long, value_name = "REASON", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        allow_downgrade: Option<String>,
    },
    /// Show the keys that this robot trusts, or take a newer set
    Keys {
        /// A key set; its signature is beside it, as FILE.minisig
        file: Option<PathBuf>,
    },
    /// Run the health checks
    Health {
        /// On a trial: check until all is well, then commit; shortly before the deadline, restart
        #[arg(long)]
        watch: bool,
    },
    /// Make a factory reset with the next restart: remove everything on data except the robot's records of
    /// bundles (floor, keys, log)
    Reset {
        /// Make no backup on data first
        #[arg(long)]
        no_backup: bool,
        /// Do not restart
        #[arg(long)]
        no_restart: bool,
    },
    /// Write everything on data into an archive (tar, zstd), except logs and the agent's own files
    Backup {
        /// A file, or `-` for standard output
        file: String,
    },
    /// Replace everything on data with a backup, with the next restart
    Restore {
        /// A file, or `-` for standard input
        file: String,
        /// Do not restart
        #[arg(long)]
        no_restart: bool,
    },
    /// Make /data/system equal to the resources of the API's package
    Provision {
        /// Only compare: refused as `drift` where they differ
        #[arg(long, conflicts_with = "boot")]
        check: bool,
        /// For the start of the system: only in the first start of a base or of another API
        #[arg(long)]
        boot: bool,
    },
    /// Show the install that is running, or that ran last since the robot's start
    Job {
        /// Wait for its end, and print its answer
        #[arg(long)]
        watch: bool,
        /// Cancel it; the next install of the same bundle resumes
        #[arg(long, conflicts_with = "watch")]
        cancel: bool,
    },
    /// For `install`: run it in this process, which no terminal can end
    #[command(hide = true)]
    Work {
        /// The caller, as JSON
        caller: String,
        /// The bundle, and how to install it
        #[command(flatten)]
        install: InstallArgs,
    },
    /// For the start of the system: grow data, then prepare it
    #[command(hide = true)]
    Data {
        /// Which of the two
        #[arg(value_enum)]
        step: StartupStep,
    },
    /// For the start of the system: apply the settings that the flasher left on the boot partition
    #[command(hide = true)]
    Seed,
    /// For SSH sessions of the user `update`: pass the command (SSH_ORIGINAL_COMMAND) to the agent
    #[command(hide = true)]
    Door {
        /// For systemd: answer the connection that is standard input
        #[arg(long)]
        serve: bool,
    },
    /// Show what kernel and firmware report about the board: model, firmware, card, watchdog, times of this start.
    /// The report has no secrets and no serial numbers, so that it can be sent to other people
    Report,
    /// Show decisions and refusals, oldest first
    Log {
        /// Only the last so many events
        #[arg(long, short = 'n', value_name = "NUMBER")]
        last: Option<usize>,
    },
}

/// An install.
#[derive(Debug, Args)]
#[group(skip)]
pub struct InstallArgs {
    /// A file, `-` for standard input, or an http(s) address
    pub source: String,
    /// Do not restart: the trial begins with the next restart, whenever that is
    #[arg(long)]
    pub no_restart: bool,
    /// Accept a version below the floor this once; the reason goes into the log
    #[arg(long, value_name = "REASON", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub allow_downgrade: Option<String>,
}

impl InstallArgs {
    /// As a request.
    pub fn request(&self) -> AgentRequest {
        AgentRequest::Install {
            source: self.source.clone(),
            no_restart: self.no_restart,
            allow_downgrade: self.allow_downgrade.clone(),
        }
    }
}

impl AgentCli {
    /// What is asked for.
    ///
    /// # Errors
    /// `internal`: the verb is not a request itself.
    pub fn request(&self) -> Result<AgentRequest> {
        Ok(match &self.verb {
            CliVerb::Status => AgentRequest::Status,
            CliVerb::Verify { source: None, .. } => AgentRequest::VerifyApi,
            CliVerb::Verify { source: Some(source), slot, .. } => {
                AgentRequest::Verify { source: source.clone(), slot: slot.map(Slot::from) }
            }
            CliVerb::Install { install, .. } => install.request(),
            CliVerb::Commit => AgentRequest::Commit,
            CliVerb::RollBack { component: Some(ComponentName::Api), .. } => {
                AgentRequest::RollBackApi
            }
            CliVerb::RollBack { no_restart, .. } => {
                AgentRequest::RollBack { no_restart: *no_restart }
            }
            CliVerb::BootOther { no_restart, allow_downgrade } => AgentRequest::BootOther {
                no_restart: *no_restart,
                allow_downgrade: allow_downgrade.clone(),
            },
            CliVerb::Keys { file: None } => AgentRequest::Keys,
            CliVerb::Keys { file: Some(file) } => AgentRequest::TakeKeys { file: file.clone() },
            CliVerb::Health { watch: true } => AgentRequest::Watch,
            CliVerb::Health { watch: false } => AgentRequest::Health,
            CliVerb::Reset { no_backup, no_restart } => {
                AgentRequest::Reset { backup: !no_backup, no_restart: *no_restart }
            }
            CliVerb::Backup { file } => AgentRequest::Backup { file: file.clone() },
            CliVerb::Restore { file, no_restart } => {
                AgentRequest::Restore { file: file.clone(), no_restart: *no_restart }
            }
            CliVerb::Provision { check: true, .. } => AgentRequest::CheckProvisioned,
            CliVerb::Provision { boot: true, .. } => AgentRequest::ProvisionAtStart,
            CliVerb::Provision { .. } => AgentRequest::Provision,
            CliVerb::Job { cancel: true, .. } => AgentRequest::CancelJob,
            CliVerb::Job { .. } => AgentRequest::Job,
            CliVerb::Data { step: StartupStep::Grow } => AgentRequest::GrowData,
            CliVerb::Data { step: StartupStep::Prepare } => AgentRequest::PrepareData,
            CliVerb::Seed => AgentRequest::TakeSeed,
            CliVerb::Report => AgentRequest::Report,
            CliVerb::Log { last } => AgentRequest::Log { last: *last },
            CliVerb::Work { .. } | CliVerb::Door { .. } => {
                return Err(Refusal::new(
                    "internal",
                    "this request is answered elsewhere",
                    "report this bug",
                ));
            }
        })
    }
}

/// The slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SlotName {
    /// The first.
    A,
    /// The second.
    B,
}

impl From<SlotName> for Slot {
    fn from(name: SlotName) -> Self {
        match name {
            SlotName::A => Self::A,
            SlotName::B => Self::B,
        }
    }
}

/// The components that are installed on their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ComponentName {
    /// The API.
    Api,
}

/// What the start of the system does with `data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StartupStep {
    /// Before it is mounted: extend the partition over the rest of the card.
    Grow,
    /// After: carry out a pending change, and migrate the data to the system's version.
    Prepare,
}
