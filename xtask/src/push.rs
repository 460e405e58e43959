//! `push`: installs a bundle on robots over SSH and reports the result. Nothing is stored on the
//! way: `ssh` reads the file, and the robot's agent writes it to the idle slot.

mod answer;
pub(crate) mod ssh;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use bundle::Version;
use bundle::bootstate::Slot;
use bundle::component::API;
use camino::Utf8PathBuf;
use contract::Refusal;
use contract::answer::{self as agent, Progress, RobotEvent, RobotStatus};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::artifact::open_regular;
use crate::progress::{ProgressStep, ProgressUnit, format_bytes, say, warn};
use crate::update;
pub use answer::{PushedApi, PushedSystem};
use ssh::{RobotConnection, RobotReply};

/// Seconds before each attempt to reconnect; after this many attempts in a row without progress the
/// push fails. In total two minutes: enough for a robot that lost its power to restart.
const PAUSES: [u64; 8] = [1, 2, 4, 8, 15, 30, 30, 30];

/// The interval for polling a robot that restarts.
const POLL: Duration = Duration::from_secs(2);

/// How many of the robot's last events are searched for the reason of a failed trial.
const EVENTS: &str = "30";

/// The request: what to push to which robots.
#[derive(Debug, Clone)]
pub struct PushRequest {
    /// Robots, as ssh takes them; without a user: root.
    pub hosts: Vec<String>,
    /// The bundle.
    pub bundle: Utf8PathBuf,
    /// Options of ssh_config(5), `KEY=VALUE`; they precede our own, and ssh uses the first value.
    pub ssh_options: Vec<String>,
    /// The time limit for the decision about the trial, from the end of the install; `None`: do not
    /// wait.
    pub wait: Option<Duration>,
}

/// The agent's refusal code for an API that did not start: it was tried and rolled back.
const UNHEALTHY: &str = "api-unhealthy";

/// The result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PushVerdict {
    /// The bundle's version runs and is committed.
    Committed,
    /// It is installed; its trial begins with the restart, which was not waited for.
    Installed,
    /// The trial failed, and the previous system runs again.
    TakenBack,
    /// It is installed, but the trial was not decided in time.
    Undecided,
    /// The robot's agent rejected it.
    Refused,
    /// The host cannot be reached, or is not a robot.
    Failed,
}

/// The outcome for one robot.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PushOutcome {
    /// The robot, as given on the command line.
    pub host: String,
    /// The result.
    pub verdict: PushVerdict,
    /// The running slot; without waiting, the slot whose trial begins.
    pub slot: Option<Slot>,
    /// The version in that slot.
    pub version: Option<Version>,
    /// What the install did; `None` when its answer was lost with the connection.
    pub installed: Option<PushedSystem>,
    /// The same for a bundle of the API, with the version that runs now.
    pub api: Option<PushedApi>,
    /// How often the connection broke while the bundle was sent.
    pub breaks: u32,
    /// The agent's refusal.
    pub refused: Option<Refusal>,
    /// Another reason why it is not committed.
    pub why: Option<String>,
    /// The total time.
    pub seconds: f64,
}

/// Pushes to all robots in parallel; returns one outcome for each, in the order of the request.
///
/// # Errors
/// When the request is invalid, or the bundle cannot be read. Errors of a single robot are
/// outcomes.
pub fn push_to_robots(request: &PushRequest) -> Result<Vec<PushOutcome>> {
    let (manifest, sha256) = update::read_unverified(&request.bundle)?;
    ensure!(!request.hosts.is_empty(), "no robot was given");
    let mut known = BTreeSet::new();
    for host in &request.hosts {
        ensure!(known.insert(host), "the robot {host} was given twice");
    }
    let connections = request
        .hosts
        .iter()
        .map(|host| RobotConnection::new(host, &request.ssh_options))
        .collect::<Result<Vec<_>>>()?;
    let size = std::fs::metadata(&request.bundle).map_or(0, |meta| meta.len());
    let api = manifest.components.iter().find(|component| component.name == API);
    let (what, version) = match api {
        Some(api) => (format!("the API of {}", manifest.product), &api.version),
        None => (manifest.product.clone(), &manifest.version),
    };
    say("push", format!("{what} {version}, {}", format_bytes(size)));
    let api = api.is_some();
    Ok(std::thread::scope(|scope| {
        let threads: Vec<_> = connections
            .into_iter()
            .map(|connection| {
                let host = connection.host.clone();
                let (version, sha256) = (&manifest.version, &sha256);
                let thread = scope.spawn(move || {
                    RobotPush { request, version, sha256, api, connection, breaks: 0 }.push()
                });
                (host, thread)
            })
            .collect();
        threads
            .into_iter()
            .map(|(host, thread)| {
                thread.join().unwrap_or_else(|_| PushOutcome {
                    why: Some("a thread of this program panicked".to_owned()),
                    ..PushOutcome::new(host, PushVerdict::Failed)
                })
            })
            .collect()
    }))
}

impl PushOutcome {
    fn new(host: String, verdict: PushVerdict) -> Self {
        Self {
            host,
            verdict,
            slot: None,
            version: None,
            installed: None,
            api: None,
            breaks: 0,
            refused: None,
            why: None,
            seconds: 0.0,
        }
    }
}

/// The push to one robot.
struct RobotPush<'a> {
    request: &'a PushRequest,
    version: &'a Version,
    /// SHA-256 of the bundle's manifest.
    sha256: &'a str,
    /// Whether it is a bundle of the API alone.
    api: bool,
    connection: RobotConnection,
    breaks: u32,
}

/// An install that the robot has completed.
struct CompletedInstall {
    /// The robot's status before its restart.
    before: RobotStatus,
    /// `None` when the answer was lost.
    installed: Option<PushedSystem>,
}

impl RobotPush<'_> {
    fn push(mut self) -> PushOutcome {
        let started = Instant::now();
        let host = self.connection.host.clone();
        let outcome = self.install().unwrap_or_else(|error| match error.downcast::<Refusal>() {
            Ok(refused) if refused.code == UNHEALTHY => PushOutcome {
                why: Some(refused.message.clone()),
                refused: Some(refused),
                ..PushOutcome::new(host.clone(), PushVerdict::TakenBack)
            },
            Ok(refused) => PushOutcome {
                refused: Some(refused),
                ..PushOutcome::new(host.clone(), PushVerdict::Refused)
            },
            Err(error) => PushOutcome {
                why: Some(format!("{error:#}")),
                ..PushOutcome::new(host.clone(), PushVerdict::Failed)
            },
        });
        let outcome = PushOutcome {
            breaks: self.breaks,
            seconds: started.elapsed().as_secs_f64(),
            ..outcome
        };
        if self.request.hosts.len() > 1 {
            say("push", format!("{host}: {}", describe_outcome(&outcome)));
        }
        outcome
    }

    fn install(&mut self) -> Result<PushOutcome> {
        if self.api {
            // The robot does not restart.
            let (_, api) = self.send::<agent::InstalledApi>()?;
            let host = self.connection.host.clone();
            return Ok(PushOutcome {
                api: api.map(PushedApi::from),
                ..PushOutcome::new(host, PushVerdict::Committed)
            });
        }
        let (before, installed) = self.send::<agent::InstalledSystem>()?;
        let done = CompletedInstall { before, installed: installed.map(PushedSystem::from) };
        match self.request.wait {
            None => Ok(self.not_waited(done)),
            Some(timeout) => self.wait(done, timeout),
        }
    }

    /// Sends the bundle until the agent has installed or rejected it: what has arrived before a broken
    /// connection is not written again. Returns the robot's status before the install, and the answer;
    /// `None` when the answer was lost.
    fn send<T: DeserializeOwned>(&mut self) -> Result<(RobotStatus, Option<T>)> {
        let mut before = self.connection.first()?;
        let mut farthest = 0;
        let mut pauses = PAUSES.iter();
        loop {
            let bundle = &self.request.bundle;
            let file = open_regular(bundle)?;
            let mut shown = InstallDisplay::new(&self.connection.host);
            let reply = self
                .connection
                .request(&["install", "-"], Some(file), |at| shown.show_progress(at))?;
            let why = match reply {
                RobotReply::Said(answer) => return Ok((before, Some(answer))),
                // The agent has not noticed yet that the previous connection is gone.
                RobotReply::Refused(refused) if refused.code == "busy" && self.breaks > 0 => {
                    refused.message
                }
                RobotReply::Refused(refused) => return Err(refused.into()),
                RobotReply::Broken(why) => {
                    self.breaks += 1;
                    why
                }
            };
            if shown.written > farthest {
                (farthest, pauses) = (shown.written, PAUSES.iter());
            }
            drop(shown);
            if self.pause(&mut before, &mut pauses, why)? {
                return Ok((before, None));
            }
        }
    }

    /// After a broken connection: waits until the robot answers again, and returns whether the
    /// install of a system was completed already.
    fn pause(
        &self,
        before: &mut RobotStatus,
        pauses: &mut std::slice::Iter<'_, u64>,
        mut why: String,
    ) -> Result<bool> {
        let host = &self.connection.host;
        loop {
            let Some(seconds) = pauses.next() else {
                bail!(
                    "the connection broke {} times, the last time: {why}\n\
                     help: push again; the install will resume",
                    self.breaks
                );
            };
            warn(format!("{host}: {why}; retrying in {seconds} s"));
            std::thread::sleep(Duration::from_secs(*seconds));
            let status = match self.connection.status()? {
                RobotReply::Said(status) => status,
                RobotReply::Refused(refused) => return Err(refused.into()),
                RobotReply::Broken(again) => {
                    why = again;
                    continue;
                }
            };
            // The connection may have broken because the robot restarts into the installed system.
            let ours = status.other.as_ref().is_some_and(|other| other.manifest == self.sha256);
            let restarted = status.boot_id != before.boot_id;
            let armed = status.boot.trial.is_some() && (status.pending || restarted);
            if !self.api && (status.running != before.running || ours && armed) {
                return Ok(true);
            }
            *before = status;
            return Ok(false);
        }
    }

    fn not_waited(&self, done: CompletedInstall) -> PushOutcome {
        PushOutcome {
            slot: Some(other_slot(done.before.running)),
            version: Some(self.version.clone()),
            installed: done.installed,
            ..PushOutcome::new(self.connection.host.clone(), PushVerdict::Installed)
        }
    }

    /// Polls until the robot has restarted and reports the result of the trial.
    fn wait(&self, done: CompletedInstall, timeout: Duration) -> Result<PushOutcome> {
        let started = Instant::now();
        let host = &self.connection.host;
        let target = other_slot(done.before.running);
        let step = ProgressStep::new("push", format!("{host}: restarting"), 0, ProgressUnit::Items);
        step.note(format!("{host}: restarting"));
        let mut last: Option<RobotStatus> = None;
        let mut note = "the robot has not restarted yet".to_owned();
        while started.elapsed() < timeout {
            std::thread::sleep(POLL);
            let status = match self.connection.status()? {
                RobotReply::Said(status) => status,
                RobotReply::Broken(why) => {
                    step.note(format!("{host}: {why}"));
                    note = format!("the robot cannot be reached: {why}");
                    continue;
                }
                // An agent that cannot report its status may be able to after the next restart.
                RobotReply::Refused(refused) => {
                    note = refused.in_full();
                    continue;
                }
            };
            let verdict = if status.boot_id == done.before.boot_id {
                note = "the robot has not restarted yet".to_owned();
                None
            } else if status.running != target {
                note = "the trial waits for the next restart".to_owned();
                (!status.pending).then_some(PushVerdict::TakenBack)
            } else if status.boot.active == target && !status.pending {
                // Another install may have replaced this one in the meantime.
                let ours = status.version == *self.version;
                Some(if ours { PushVerdict::Committed } else { PushVerdict::TakenBack })
            } else {
                note = status.health.as_ref().map_or("on trial".to_owned(), |h| h.why.clone());
                None
            };
            step.note(format!("{host}: {note}"));
            if let Some(verdict) = verdict {
                let why = (verdict == PushVerdict::TakenBack).then(|| self.reason(target));
                return Ok(self.ended(verdict, Some(&status), done.installed, why));
            }
            last = Some(status);
        }
        let why = format!("not decided after {} s: {note}", timeout.as_secs());
        Ok(self.ended(PushVerdict::Undecided, last.as_ref(), done.installed, Some(why)))
    }

    fn ended(
        &self,
        verdict: PushVerdict,
        status: Option<&RobotStatus>,
        installed: Option<PushedSystem>,
        why: Option<String>,
    ) -> PushOutcome {
        PushOutcome {
            slot: status.map(|status| status.running),
            version: status.map(|status| status.version.clone()),
            installed,
            why,
            ..PushOutcome::new(self.connection.host.clone(), verdict)
        }
    }

    /// Why the robot rolled back, as far as its log tells.
    fn reason(&self, target: Slot) -> String {
        let events =
            self.connection.request::<Vec<RobotEvent>>(&["log", "--last", EVENTS], None, |_| {});
        let logged = match events {
            Ok(RobotReply::Said(events)) => {
                let since = events.iter().rposition(|event| event.event == "installed");
                let events = events.get(since.map_or(0, |at| at + 1)..).unwrap_or_default();
                events.iter().rev().find_map(|event| event.why().map(str::to_owned))
            }
            _ => None,
        };
        logged.unwrap_or_else(|| {
            format!("slot {target} did not boot far enough to report a reason; see its console")
        })
    }
}

/// The idle slot is the one that is written.
fn other_slot(running: Slot) -> Slot {
    if running == Slot::A { Slot::B } else { Slot::A }
}

/// Progress of one install, step by step.
struct InstallDisplay {
    host: String,
    step: Option<(Progress, ProgressStep)>,
    /// The highest number of written bytes so far.
    written: u64,
}

impl InstallDisplay {
    fn new(host: &str) -> Self {
        Self { host: host.to_owned(), step: None, written: 0 }
    }

    fn show_progress(&mut self, at: Progress) {
        let same = |(last, _): &(Progress, ProgressStep)| {
            last.step == at.step && last.total == at.total && last.done <= at.done
        };
        if !self.step.as_ref().is_some_and(same) {
            let what = at.step.describe();
            // Remove the previous bar first.
            self.step = None;
            let step = ProgressStep::new(
                "push",
                format!("{}: {what}", self.host),
                at.total,
                ProgressUnit::Bytes,
            );
            self.step = Some((at, step));
        }
        if at.step == agent::InstallStep::Write {
            self.written = self.written.max(at.done);
        }
        if let Some((last, step)) = &mut self.step {
            step.set(at.done);
            last.done = at.done;
        }
    }
}

/// An outcome as a sentence.
pub fn describe_outcome(outcome: &PushOutcome) -> String {
    let runs = match (&outcome.slot, &outcome.version) {
        (Some(slot), Some(version)) => format!("slot {slot} with {version}"),
        _ => "an unknown system".to_owned(),
    };
    let mut text = match outcome.verdict {
        PushVerdict::Committed if outcome.api.is_some() => String::new(),
        PushVerdict::TakenBack if outcome.refused.is_some() => "rolled back".to_owned(),
        PushVerdict::Committed => format!("{runs} runs and is committed"),
        PushVerdict::Installed => format!("installed; the next restart tries {runs}"),
        PushVerdict::TakenBack => format!("the trial failed; {runs} runs"),
        PushVerdict::Undecided => format!("installed; {runs} runs"),
        PushVerdict::Refused => "refused".to_owned(),
        PushVerdict::Failed => "failed".to_owned(),
    };
    if let Some(installed) = &outcome.installed {
        text.push_str(&format!("; {} written", format_bytes(installed.written)));
        if installed.held > 0 {
            text.push_str(&format!(", {} skipped (unchanged)", format_bytes(installed.held)));
        }
    }
    if let Some(api) = &outcome.api {
        text.push_str(&format!(
            "the API {} is running, previously {}; {} written, {} of {} wheels were present; {:.1} \
             s without an answer",
            api.version,
            api.before.as_deref().unwrap_or("the system's own"),
            format_bytes(api.written),
            api.reused,
            api.wheels,
            api.down_ms as f64 / 1000.0
        ));
    }
    match outcome.breaks {
        0 => {}
        1 => text.push_str("; the connection broke once"),
        n => text.push_str(&format!("; the connection broke {n} times")),
    }
    if let Some(refused) = &outcome.refused {
        text.push_str(&format!(": {}", refused.in_full()));
    }
    if let Some(why) = outcome.why.as_ref().filter(|_| outcome.refused.is_none()) {
        text.push_str(&format!(": {why}"));
    }
    text
}
