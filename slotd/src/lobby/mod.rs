//! The single entry point. Every client of this robot (the command line, the door of the user `update`, later a USB stick,
//! the local network, a web page) makes an [`AgentRequest`] and passes it to [`dispatch`] with its [`Caller`]. This
//! module checks whether the caller may make the request ([`policy::is_allowed`]) and whether the robot's state allows
//! it ([`admission::request_permit`]), and reports the progress ([`job`]).

pub mod detached;
pub mod job;

use std::fs;
use std::path::{Path, PathBuf};

use bundle::KeySet;
use contract::answer::{
    ApiRollback, CheckOutcome, InstallOutcome, Progress, RestartKind, RobotEvent, RobotStatus,
    SlotChange, VerifyOutcome,
};
use contract::job::JobState;
pub use contract::job::{Caller, CallerRights, InstallDone, Job};
pub use contract::request::{AgentRequest, AgentVerb};
use serde_json::{Value, json};

use crate::admission::{self, ChangePermit};
use crate::agent::Agent;
use crate::components::ApiVerifyOutcome;
use crate::data::grow::GrowOutcome;
use crate::data::seed::{self, AppliedSettings};
use crate::data::verbs;
use crate::events::EventLog;
use crate::health::TrialVerdict;
use crate::install::InstallOptions;
use crate::policy;
use crate::provision::{self, ProvisionReport};
use crate::refusal::{Refusal, Result};
use crate::report::{self, BoardReport};
use crate::root::RootDir;
use crate::source::{BundleSource, refuse_credentials};
use crate::startup::{self, PreparedData};

/// The answer to a request.
#[derive(Debug)]
#[expect(missing_docs, reason = "each is the answer to the request of its name")]
pub enum AgentResponse {
    Status(Box<RobotStatus>),
    Report {
        board: Box<BoardReport>,
        status: Result<Box<RobotStatus>>,
    },
    Log(Vec<RobotEvent>),
    Health(Vec<CheckOutcome>),
    /// `None`: no trial is running.
    Watched(Option<TrialVerdict>),
    Verified(VerifyOutcome),
    VerifiedApi(ApiVerifyOutcome),
    Installed(InstallDone),
    Changed {
        changed: SlotChange,
        restarts: bool,
    },
    WentBack(ApiRollback),
    Keys(KeySet),
    Reset {
        backup: Option<PathBuf>,
        restarts: bool,
    },
    /// `None`: the archive itself was the answer, on standard output.
    BackedUp(Option<String>),
    Restored {
        file: String,
        restarts: bool,
    },
    Provisioned(ProvisionReport),
    Grown(GrowOutcome),
    Prepared(PreparedData),
    Seeded(AppliedSettings),
    /// `None`: there was no job since the start.
    Job(Option<Box<Job>>),
}

impl AgentResponse {
    /// As one JSON object or list.
    pub fn json(&self) -> Value {
        fn refused(refusal: &Refusal) -> Value {
            json!({ "refused": refusal })
        }
        match self {
            Self::Status(status) => json!(status),
            Self::Report { board, status } => {
                let status = status.as_ref().map_or_else(refused, |status| json!(status));
                json!({ "board": board, "status": status })
            }
            Self::Log(events) => json!(events),
            Self::Health(outcomes) => json!(outcomes),
            Self::Watched(verdict) => json!({ "verdict": describe_verdict(verdict.as_ref()) }),
            Self::Verified(verified) => json!(verified),
            Self::VerifiedApi(checked) => json!(checked),
            Self::Installed(done) => json!(done.answer),
            Self::Changed { changed, .. } => json!(changed),
            Self::WentBack(back) => json!(back),
            Self::Keys(set) => json!(set),
            Self::Reset { backup, .. } => json!({ "backup": backup }),
            Self::BackedUp(file) => json!({ "backup": file }),
            Self::Restored { file, .. } => json!({ "restored": file }),
            Self::Provisioned(done) => json!(done),
            Self::Grown(grown) => json!({ "from": grown.from, "to": grown.to }),
            Self::Prepared(done) => json!(done),
            Self::Seeded(seeded) => json!(seeded),
            Self::Job(job) => json!(job),
        }
    }
}

/// The result of a watch, in a sentence.
pub fn describe_verdict(verdict: Option<&TrialVerdict>) -> String {
    match verdict {
        None => "no trial runs".to_owned(),
        Some(TrialVerdict::Committed) => "the trial is committed".to_owned(),
        Some(TrialVerdict::OutOfTime(state)) => state.why(),
    }
}

/// Answers a request. `watcher` receives the progress of a long one.
///
/// # Errors
/// `not-offered`: the caller may not make this request. The refusals of [`Agent::request_permit`] and of the verb
/// itself.
pub fn dispatch(
    root: &RootDir,
    caller: &Caller,
    request: &AgentRequest,
    watcher: &(dyn Fn(Progress) + Sync),
) -> Result<AgentResponse> {
    authorise(caller, request)?;
    if let Some(answered) = without_agent(root, request) {
        return answered;
    }
    let agent = Agent::open(root)?;
    Ok(match request {
        AgentRequest::Status => AgentResponse::Status(Box::new(status(&agent, root)?)),
        AgentRequest::Log { last } => {
            let events =
                agent.events().read().map_err(|error| Refusal::io("reading the log", &error))?;
            let skip = events.len().saturating_sub(last.unwrap_or(usize::MAX));
            AgentResponse::Log(events.into_iter().skip(skip).collect())
        }
        AgentRequest::Health => AgentResponse::Health(agent.health()?),
        AgentRequest::Watch => AgentResponse::Watched(agent.watch()?),
        AgentRequest::Verify { source, slot } => {
            let source = BundleSource::open(source, root)?;
            AgentResponse::Verified(match slot {
                None => agent.verify(source, &|_| {})?,
                Some(slot) => agent.verify_slot(source, *slot, watcher)?,
            })
        }
        AgentRequest::VerifyApi => {
            let permit = agent.request_permit(AgentVerb::VerifyApi)?;
            AgentResponse::VerifiedApi(agent.verify_api(&permit)?)
        }
        AgentRequest::Install { source, no_restart, allow_downgrade } => {
            // Before the install itself, which logs its own refusals.
            let unopened = |refusal: Refusal| {
                agent.events().add("install-refused", json!(refusal));
                refusal
            };
            // The job's record has the source.
            refuse_credentials(source).map_err(unopened)?;
            AgentResponse::Installed(job::run(root, request, caller, watcher, |job, at| {
                // Within the job: a server or a pipe may not answer for long, and the job can be seen and cancelled
                // meanwhile.
                let source = BundleSource::open(source, root).map_err(unopened)?;
                let options = InstallOptions {
                    allow_downgrade: allow_downgrade.clone(),
                    use_running_slot: source.transfers(),
                };
                let answer = agent.install(job.cancellable(source), &options, at)?;
                let restarts = matches!(answer, InstallOutcome::System(_))
                    && !no_restart
                    && agent.restart(RestartKind::Trial)?;
                Ok(InstallDone { answer, restarts })
            })?)
        }
        AgentRequest::Commit => {
            let permit = agent.request_permit(AgentVerb::Commit)?;
            AgentResponse::Changed { changed: agent.commit(permit)?, restarts: false }
        }
        AgentRequest::RollBack { no_restart } => {
            let permit = agent.request_permit(AgentVerb::RollBack)?;
            then_restart(&agent, agent.roll_back(&permit)?, *no_restart)?
        }
        AgentRequest::RollBackApi => {
            let permit = agent.request_permit(AgentVerb::RollBackApi)?;
            AgentResponse::WentBack(agent.api_back(&permit)?)
        }
        AgentRequest::BootOther { no_restart, allow_downgrade } => {
            let permit = agent.request_permit(AgentVerb::BootOther)?;
            let changed = agent.boot_other(&permit, allow_downgrade.as_deref())?;
            then_restart(&agent, changed, *no_restart)?
        }
        AgentRequest::Keys => AgentResponse::Keys(agent.keys()?),
        AgentRequest::TakeKeys { file } => {
            let permit = agent.request_permit(AgentVerb::TakeKeys)?;
            AgentResponse::Keys(agent.take_keys(&permit, file)?)
        }
        AgentRequest::Reset { backup, no_restart } => {
            let permit = agent.request_permit(AgentVerb::Reset)?;
            let backup = verbs::reset(root, &permit, *backup)?;
            let restarts = !no_restart && agent.restart(RestartKind::Committed)?;
            AgentResponse::Reset { backup, restarts }
        }
        AgentRequest::Restore { file, no_restart } => {
            let permit = agent.request_permit(AgentVerb::Restore)?;
            verbs::restore(root, &permit, verbs::open(file)?)?;
            let restarts = !no_restart && agent.restart(RestartKind::Committed)?;
            AgentResponse::Restored { file: file.clone(), restarts }
        }
        AgentRequest::Report
        | AgentRequest::Backup { .. }
        | AgentRequest::Provision
        | AgentRequest::ProvisionAtStart
        | AgentRequest::CheckProvisioned
        | AgentRequest::GrowData
        | AgentRequest::PrepareData
        | AgentRequest::TakeSeed
        | AgentRequest::Job
        | AgentRequest::CancelJob => {
            return Err(Refusal::new(
                "internal",
                "this request is answered elsewhere",
                "report this bug",
            ));
        }
    })
}

/// Answers the requests that must also work on a robot that cannot update: during a start, or with a wrong layout.
fn without_agent(root: &RootDir, request: &AgentRequest) -> Option<Result<AgentResponse>> {
    let events = || EventLog::new(root);
    Some(match request {
        AgentRequest::Report => {
            let status = Agent::open(root).and_then(|agent| status(&agent, root)).map(Box::new);
            Ok(AgentResponse::Report { board: Box::new(report::collect(root)), status })
        }
        AgentRequest::Backup { file } if file == "-" => {
            verbs::backup(root, std::io::stdout().lock()).map(|()| AgentResponse::BackedUp(None))
        }
        AgentRequest::Backup { file } => {
            verbs::backup_to(root, file).map(|()| AgentResponse::BackedUp(Some(file.clone())))
        }
        AgentRequest::Provision => admission::request_lock(root, AgentVerb::Provision)
            .and_then(|_admitted: ChangePermit| provision::run(root, &events()))
            .map(AgentResponse::Provisioned),
        AgentRequest::ProvisionAtStart => {
            provision::provision_at_start(root, &events()).map(AgentResponse::Provisioned)
        }
        AgentRequest::CheckProvisioned => provision::check(root).map(AgentResponse::Provisioned),
        AgentRequest::GrowData => verbs::grow(root).map(AgentResponse::Grown),
        AgentRequest::PrepareData => startup::prepare(root).map(AgentResponse::Prepared),
        AgentRequest::TakeSeed => seed::apply_seed(root).map(AgentResponse::Seeded),
        AgentRequest::Job => job::read(root).map(|job| AgentResponse::Job(job.map(Box::new))),
        AgentRequest::CancelJob => {
            job::cancel(root).map(|job| AgentResponse::Job(Some(Box::new(job))))
        }
        _ => return None,
    })
}

/// The robot's status, with the job that is running.
fn status(agent: &Agent, root: &RootDir) -> Result<RobotStatus> {
    // Without a readable record, `slotd job` says what is wrong with it.
    let job = job::read(root).ok().flatten();
    let running = job.filter(|job| job.state == JobState::Runs).map(|job| job.id);
    Ok(RobotStatus { job: running, ..agent.status()? })
}

fn then_restart(agent: &Agent, changed: SlotChange, stay: bool) -> Result<AgentResponse> {
    let restarts = match changed.restart {
        Some(into) if !stay => agent.restart(into)?,
        _ => false,
    };
    Ok(AgentResponse::Changed { changed, restarts })
}

/// Refuses a request that the caller may not make.
///
/// # Errors
/// `not-offered`.
pub fn authorise(caller: &Caller, request: &AgentRequest) -> Result<()> {
    match policy::is_allowed(caller.rights, request) {
        true => Ok(()),
        false => Err(policy::not_offered(&request.verb().to_string())),
    }
}

/// Maximum number of characters of a caller's command line that are recorded.
const LONGEST_COMMAND: usize = 200;

/// This process as a caller, from the kernel's information.
pub fn this_process(root: &RootDir, rights: CallerRights) -> Caller {
    let groups = fs::read_to_string(root.path("proc/self/cgroup")).unwrap_or_default();
    let words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    Caller {
        uid: rustix::process::getuid().as_raw(),
        unit: unit_of(&groups),
        command: words.join(" ").chars().take(LONGEST_COMMAND).collect(),
        rights,
    }
}

/// The unit of systemd in a list of control groups (cgroups(7)): the last part of a path that is a service or a scope.
fn unit_of(groups: &str) -> Option<String> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let is_unit = |name: &&str| {
        let kind = Path::new(name).extension().and_then(|kind| kind.to_str());
        matches!(kind, Some("service" | "scope"))
    };
    path.split('/').rfind(is_unit).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_of_a_process_is_in_its_control_groups() {
        for (text, expected) in [
            (
                "0::/system.slice/system-slipway\\x2dupdate.slice/slipway-update@1.service\n",
                Some("slipway-update@1.service"),
            ),
            (
                "1:name=systemd:/x.service\n0::/user.slice/user-0.slice/session-3.scope/app\n",
                Some("session-3.scope"),
            ),
            ("0::/init\n", None),
            ("", None),
        ] {
            assert_eq!(unit_of(text).as_deref(), expected, "{text}");
        }
    }
}
