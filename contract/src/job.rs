//! A long operation of the agent: it goes on when whoever asked for it leaves, and everybody who may can watch it and
//! cancel it. Its record is `/run/slotd/job.json`, one for the whole robot, and ends with the start.

use serde::{Deserialize, Serialize};

use crate::answer::{Installed, Progress};
use crate::refusal::Refusal;
use crate::request::Request;

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Caller {
    /// The user's id.
    pub uid: u32,
    /// The unit of systemd that it runs in: `session-3.scope`, `slipway-update@1.service`.
    pub unit: Option<String>,
    /// The program and its arguments, shortened.
    pub command: String,
    /// What it may ask for.
    pub rights: Rights,
}

/// What a caller may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rights {
    /// Everything: root, and the units of a start.
    All,
    /// What the user `update` may: how the robot stands, and newer software.
    Update,
}

/// The record of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// Its name in this start: grows by one.
    pub id: u64,
    /// What was asked for.
    pub request: Request,
    /// Who asked.
    pub by: Caller,
    /// The process that does it.
    pub process: u32,
    /// Whether it can still be cancelled: everything that is asked for is not there yet.
    pub cancellable: bool,
    /// How far it is, twice a second.
    pub progress: Option<Progress>,
    /// How it stands.
    pub state: JobState,
}

/// How a job stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// It is being done.
    Runs,
    /// It is done.
    Done(Done),
    /// It was refused, or has failed, or was cancelled.
    Refused(Refusal),
    /// The process that did it has ended without a word: it was killed. Never written; a reader finds it out.
    Lost,
}

/// What came of an install.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Done {
    /// The answer.
    pub answer: Installed,
    /// Whether the robot restarts for it.
    pub restarts: bool,
}

/// What a job tells whoever waits for it, a line each: any number of the first, then one of the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// How far it is.
    Progress(Progress),
    /// It is done.
    Done(Done),
    /// It was refused, or has failed, or was cancelled.
    Refused(Refusal),
}
