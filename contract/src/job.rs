//! A long operation of the agent. It continues when its client disconnects, and every permitted client can watch it and
//! cancel it. Its record is `/run/slotd/job.json`, one for the whole robot; a restart removes it.

use serde::{Deserialize, Serialize};

use crate::answer::{InstallOutcome, Progress};
use crate::refusal::Refusal;
use crate::request::AgentRequest;

/// The client that makes a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Caller {
    /// The user's id.
    pub uid: u32,
    /// Its systemd unit: `session-3.scope`, `slipway-update@1.service`.
    pub unit: Option<String>,
    /// The program and its arguments, shortened.
    pub command: String,
    /// Its rights.
    pub rights: CallerRights,
}

/// The rights of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CallerRights {
    /// Everything: root, and the units of a start.
    All,
    /// Those of the user `update`: it may read the status and install newer software.
    Update,
}

/// The record of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// Its number in this start: grows by one.
    pub id: u64,
    /// The request.
    pub request: AgentRequest,
    /// The client that made it.
    pub by: Caller,
    /// The id of the process that executes it.
    pub process: u32,
    /// Whether it can still be cancelled: its bundle was not read to the end yet.
    pub cancellable: bool,
    /// The progress, written twice a second.
    pub progress: Option<Progress>,
    /// The state.
    pub state: JobState,
}

/// The state of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// It is running.
    Runs,
    /// It is done.
    Done(InstallDone),
    /// It was refused, failed, or was cancelled.
    Refused(Refusal),
    /// Its process ended without leaving its result: it was killed, or `/run` is full. Never written: the reader detects it.
    Lost,
}

/// The result of an install.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstallDone {
    /// The answer.
    pub answer: InstallOutcome,
    /// Whether the robot restarts now.
    pub restarts: bool,
}

/// A message from a job to the waiting client, one per line: any number of the first kind, then one of the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobMessage {
    /// The progress.
    Progress(Progress),
    /// It is done.
    Done(InstallDone),
    /// It was refused, failed, or was cancelled.
    Refused(Refusal),
}
