//! The single entry point. Every client of this robot (the command line, the door of the user `update`, later a USB stick,
//! the local network, a web page) makes a [`Request`] and passes it to [`dispatch`] with its [`Caller`]. This module checks
//! whether the caller may make the request ([`policy::may`]) and whether the robot's state allows it
//! ([`admission::enter`]), and reports the progress ([`job`]).

pub mod detached;
pub mod job;

use std::fs;
use std::path::{Path, PathBuf};

use bundle::KeySet;
use contract::answer::{
    ApiWentBack, Changed, CheckOutcome, Event, Installed, Progress, Restart, Status, Verified,
};
pub use contract::job::{Caller, Done, Job, Rights};
pub use contract::request::{Request, Verb};
use serde_json::{Value, json};

use crate::admission::{self, Admitted};
use crate::agent::Agent;
use crate::components::Checked;
use crate::data::grow::Grown;
use crate::data::seed::{self, Seeded};
use crate::data::verbs;
use crate::events::Events;
use crate::health::Verdict;
use crate::install::Options;
use crate::policy;
use crate::provision::{self, Provisioned};
use crate::refusal::{Refusal, Result};
use crate::report::{self, Report};
use crate::root::Root;
use crate::source::Source;
use crate::startup::{self, Prepared};

/// The answer to a request.
#[derive(Debug)]
#[expect(missing_docs, reason = "each is the answer to the request of its name")]
pub enum Response {
    Status(Box<Status>),
    Report {
        board: Box<Report>,
        status: Result<Box<Status>>,
    },
    Log(Vec<Event>),
    Health(Vec<CheckOutcome>),
    /// `None`: no trial is running.
    Watched(Option<Verdict>),
    Verified(Verified),
    VerifiedApi(Checked),
    Installed(Done),
    Changed {
        changed: Changed,
        restarts: bool,
    },
    WentBack(ApiWentBack),
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
    Provisioned(Provisioned),
    Grown(Grown),
    Prepared(Prepared),
    Seeded(Seeded),
    /// `None`: there was no job since the start.
    Job(Option<Box<Job>>),
}

impl Response {
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
            Self::Watched(verdict) => json!({ "verdict": watched(verdict.as_ref()) }),
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
pub fn watched(verdict: Option<&Verdict>) -> String {
    match verdict {
        None => "no trial runs".to_owned(),
        Some(Verdict::Committed) => "the trial is committed".to_owned(),
        Some(Verdict::OutOfTime(state)) => state.why(),
    }
}

/// Answers a request. `watcher` receives the progress of a long one.
///
/// # Errors
/// `not-offered`: the caller may not make this request. The refusals of [`Agent::enter`] and of the verb itself.
pub fn dispatch(
    root: &Root,
    caller: &Caller,
    request: &Request,
    watcher: &(dyn Fn(Progress) + Sync),
) -> Result<Response> {
    authorise(caller, request)?;
    if let Some(answered) = without_agent(root, request) {
        return answered;
    }
    let agent = Agent::open(root)?;
    Ok(match request {
        Request::Status => Response::Status(Box::new(agent.status()?)),
        Request::Log { last } => {
            let events =
                agent.events().read().map_err(|error| Refusal::io("reading the log", &error))?;
            let skip = events.len().saturating_sub(last.unwrap_or(usize::MAX));
            Response::Log(events.into_iter().skip(skip).collect())
        }
        Request::Health => Response::Health(agent.health()?),
        Request::Watch => Response::Watched(agent.watch()?),
        Request::Verify { source, slot } => {
            let source = Source::open(source, root)?;
            Response::Verified(match slot {
                None => agent.verify(source, &|_| {})?,
                Some(slot) => agent.verify_slot(source, *slot, watcher)?,
            })
        }
        Request::VerifyApi => {
            let admitted = agent.enter(Verb::VerifyApi)?;
            Response::VerifiedApi(agent.verify_api(&admitted)?)
        }
        Request::Install { source, no_restart, allow_downgrade } => {
            let source = Source::open(source, root)?;
            let options = Options {
                allow_downgrade: allow_downgrade.clone(),
                use_running_slot: source.transfers(),
            };
            Response::Installed(job::run(root, request, caller, source, watcher, |source, at| {
                let answer = agent.install(source, &options, at)?;
                let restarts = matches!(answer, Installed::System(_))
                    && !no_restart
                    && agent.restart(Restart::Trial)?;
                Ok(Done { answer, restarts })
            })?)
        }
        Request::Commit => {
            let admitted = agent.enter(Verb::Commit)?;
            Response::Changed { changed: agent.commit(admitted)?, restarts: false }
        }
        Request::RollBack { no_restart } => {
            let admitted = agent.enter(Verb::RollBack)?;
            then_restart(&agent, agent.roll_back(&admitted)?, *no_restart)?
        }
        Request::RollBackApi => {
            let admitted = agent.enter(Verb::RollBackApi)?;
            Response::WentBack(agent.api_back(&admitted)?)
        }
        Request::BootOther { no_restart, allow_downgrade } => {
            let admitted = agent.enter(Verb::BootOther)?;
            let changed = agent.boot_other(&admitted, allow_downgrade.as_deref())?;
            then_restart(&agent, changed, *no_restart)?
        }
        Request::Keys => Response::Keys(agent.keys()?),
        Request::TakeKeys { file } => {
            let admitted = agent.enter(Verb::TakeKeys)?;
            Response::Keys(agent.take_keys(&admitted, file)?)
        }
        Request::Reset { backup, no_restart } => {
            let admitted = agent.enter(Verb::Reset)?;
            let backup = verbs::reset(root, &admitted, *backup)?;
            let restarts = !no_restart && agent.restart(Restart::Committed)?;
            Response::Reset { backup, restarts }
        }
        Request::Restore { file, no_restart } => {
            let admitted = agent.enter(Verb::Restore)?;
            verbs::restore(root, &admitted, verbs::open(file)?)?;
            let restarts = !no_restart && agent.restart(Restart::Committed)?;
            Response::Restored { file: file.clone(), restarts }
        }
        Request::Report
        | Request::Backup { .. }
        | Request::Provision
        | Request::ProvisionAtStart
        | Request::CheckProvisioned
        | Request::GrowData
        | Request::PrepareData
        | Request::TakeSeed
        | Request::Job
        | Request::CancelJob => {
            return Err(Refusal::new(
                "internal",
                "this request is answered elsewhere",
                "report this bug",
            ));
        }
    })
}

/// Answers the requests that must also work on a robot that cannot update: during a start, or with a wrong layout.
fn without_agent(root: &Root, request: &Request) -> Option<Result<Response>> {
    let events = || Events::new(root);
    Some(match request {
        Request::Report => {
            let status = Agent::open(root).and_then(|agent| agent.status()).map(Box::new);
            Ok(Response::Report { board: Box::new(report::collect(root)), status })
        }
        Request::Backup { file } if file == "-" => {
            verbs::backup(root, std::io::stdout().lock()).map(|()| Response::BackedUp(None))
        }
        Request::Backup { file } => {
            verbs::backup_to(root, file).map(|()| Response::BackedUp(Some(file.clone())))
        }
        Request::Provision => admission::take_turn(root, Verb::Provision)
            .and_then(|_admitted: Admitted| provision::run(root, &events()))
            .map(Response::Provisioned),
        Request::ProvisionAtStart => provision::boot(root, &events()).map(Response::Provisioned),
        Request::CheckProvisioned => provision::check(root).map(Response::Provisioned),
        Request::GrowData => verbs::grow(root).map(Response::Grown),
        Request::PrepareData => startup::prepare(root).map(Response::Prepared),
        Request::TakeSeed => seed::seed(root).map(Response::Seeded),
        Request::Job => job::read(root).map(|job| Response::Job(job.map(Box::new))),
        Request::CancelJob => job::cancel(root).map(|job| Response::Job(Some(Box::new(job)))),
        _ => return None,
    })
}

fn then_restart(agent: &Agent, changed: Changed, stay: bool) -> Result<Response> {
    let restarts = match changed.restart {
        Some(into) if !stay => agent.restart(into)?,
        _ => false,
    };
    Ok(Response::Changed { changed, restarts })
}

/// Refuses a request that the caller may not make.
///
/// # Errors
/// `not-offered`.
pub fn authorise(caller: &Caller, request: &Request) -> Result<()> {
    match policy::may(caller.rights, request) {
        true => Ok(()),
        false => Err(policy::not_offered(&request.verb().to_string())),
    }
}

/// Maximum number of characters of a caller's command line that are recorded.
const LONGEST_COMMAND: usize = 200;

/// This process as a caller, from the kernel's information.
pub fn this_process(root: &Root, rights: Rights) -> Caller {
    let groups = fs::read_to_string(root.path("proc/self/cgroup")).unwrap_or_default();
    let words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    Caller {
        uid: rustix::process::getuid().as_raw(),
        unit: unit(&groups),
        command: words.join(" ").chars().take(LONGEST_COMMAND).collect(),
        rights,
    }
}

/// The unit of systemd in a list of control groups (cgroups(7)): the last part of a path that is a service or a scope.
fn unit(groups: &str) -> Option<String> {
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
            assert_eq!(unit(text).as_deref(), expected, "{text}");
        }
    }
}
