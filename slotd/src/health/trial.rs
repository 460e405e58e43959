//! The watch over a trial: checks until all pass for a while, then the commit.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use contract::answer::{TrialPhase, TrialState};

use super::check::{CheckOutcome, HealthCheck};
use crate::durable;
use crate::refusal::{Refusal, Result, failed};
use crate::root::RootDir;

/// How long all checks must pass before a trial is committed: long enough to notice a service that dies
/// right after its start, short enough not to delay the boot.
const SETTLE: Duration = Duration::from_secs(10);

/// The pause between two rounds of checks.
const PAUSE: Duration = Duration::from_secs(2);

/// How long before the deadline an orderly restart begins, so that `data` is unmounted. If it hangs, the
/// watchdog ends it.
const ORDERLY: Duration = Duration::from_secs(15);

/// The initrd's record of a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrialRecord {
    /// Seconds after the kernel's start at which the watchdog resets the robot.
    pub deadline: u64,
    /// Whether the hardware watchdog is armed; otherwise only this program ends the trial.
    pub watchdog: bool,
}

impl TrialRecord {
    fn file(root: &RootDir) -> PathBuf {
        root.path("run/slipway/trial")
    }

    /// The running trial, as recorded by the initrd; `None` for a committed system, or after the commit.
    ///
    /// # Errors
    /// `io`, when the file exists and cannot be read.
    pub fn read(root: &RootDir) -> Result<Option<Self>> {
        let path = Self::file(root);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Refusal::io(format!("reading {}", path.display()), &error)),
        };
        let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        // Even a damaged file means a trial. A deadline in the past ends it soon.
        let deadline = value("deadline").and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok(Some(Self { deadline, watchdog: value("watchdog") == Some("yes") }))
    }

    /// Removes the record: the trial was committed.
    ///
    /// # Errors
    /// `io`.
    pub(super) fn forget(root: &RootDir) -> Result<()> {
        let path = Self::file(root);
        durable::remove(&path).map_err(failed("removing", &path))
    }
}

fn state_file(root: &RootDir) -> PathBuf {
    root.run().join("health.json")
}

/// The last state of the watch; `None` when no watch has run since the start.
///
/// # Errors
/// `io`, when the file cannot be read.
pub fn read_state(root: &RootDir) -> Result<Option<TrialState>> {
    let path = state_file(root);
    durable::read_json(&path).map_err(failed("reading", &path))
}

/// The result of the watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrialVerdict {
    /// The trial was committed.
    Committed,
    /// It was not committed, and the deadline is near: restart in an orderly way while there is time.
    OutOfTime(TrialState),
}

/// A watch over a trial.
#[derive(Debug)]
pub struct TrialWatch<'a> {
    root: &'a RootDir,
    checks: &'a [HealthCheck],
    trial: TrialRecord,
    settle: Duration,
    pause: Duration,
}

impl<'a> TrialWatch<'a> {
    /// A watch with the default times.
    pub fn new(root: &'a RootDir, checks: &'a [HealthCheck], trial: TrialRecord) -> Self {
        Self { root, checks, trial, settle: SETTLE, pause: PAUSE }
    }

    /// Runs the checks until the trial is committed or its time is over. `commit` may fail and is then tried
    /// again. `changed` is called for every change of the state, for the log.
    ///
    /// # Errors
    /// `io`, when the kernel's uptime cannot be read.
    pub fn run(
        &self,
        mut commit: impl FnMut() -> Result<()>,
        mut changed: impl FnMut(&TrialState),
    ) -> Result<TrialVerdict> {
        let started = Instant::now();
        let uptime = uptime(self.root)?;
        let left = || {
            let now = uptime + started.elapsed();
            Duration::from_secs(self.trial.deadline).saturating_sub(now)
        };
        let mut well_since: Option<Instant> = None;
        let mut told: Option<(TrialPhase, Vec<(String, bool)>)> = None;
        loop {
            let checks: Vec<CheckOutcome> = self.checks.iter().map(|c| c.run(self.root)).collect();
            let mut state = TrialState {
                phase: TrialPhase::Checking,
                seconds_left: left().as_secs(),
                watchdog: self.trial.watchdog,
                checks,
                problem: None,
            };
            if state.checks.iter().all(|outcome| outcome.healthy) {
                let since = *well_since.get_or_insert_with(Instant::now);
                state.phase = TrialPhase::Settling;
                if since.elapsed() >= self.settle {
                    match commit() {
                        Ok(()) => state.phase = TrialPhase::Committed,
                        Err(refusal) => {
                            state.phase = TrialPhase::CommitFailed;
                            state.problem = Some(refusal.to_string());
                        }
                    }
                }
            } else {
                well_since = None;
            }
            if state.phase != TrialPhase::Committed && left() <= ORDERLY {
                state.phase = TrialPhase::OutOfTime;
            }
            self.write_state(&state);
            let summary: Vec<_> =
                state.checks.iter().map(|o| (o.name.clone(), o.healthy)).collect();
            if told.as_ref() != Some(&(state.phase, summary.clone())) {
                changed(&state);
                told = Some((state.phase, summary));
            }
            match state.phase {
                TrialPhase::Committed => return Ok(TrialVerdict::Committed),
                TrialPhase::OutOfTime => return Ok(TrialVerdict::OutOfTime(state)),
                _ => std::thread::sleep(self.pause),
            }
        }
    }

    /// Writes the state, for `status` only: a failure must not prevent the commit of a trial.
    fn write_state(&self, state: &TrialState) {
        if let Err(error) = durable::write_json(&state_file(self.root), state) {
            crate::say!("slotd: cannot write the state of the health checks: {error}");
        }
    }
}

/// How long the kernel has been running.
fn uptime(root: &RootDir) -> Result<Duration> {
    let path = root.path("proc/uptime");
    let failed = |error: io::Error| Refusal::io(format!("reading {}", path.display()), &error);
    let text = fs::read_to_string(&path).map_err(failed)?;
    let seconds = text.split(['.', ' ']).next().and_then(|word| word.parse().ok());
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| failed(io::Error::other(format!("`{text}` is not a time"))))
}

#[cfg(test)]
#[expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by panicking"
)]
mod tests {
    use super::*;
    use crate::health::check::CheckKind;

    fn root(trial: &str) -> (tempfile::TempDir, RootDir) {
        let dir = tempfile::tempdir().unwrap();
        let root = RootDir::new(dir.path());
        for folder in ["proc", "run/slipway"] {
            fs::create_dir_all(root.path(folder)).unwrap();
        }
        fs::write(root.path("proc/uptime"), "100.25 180.00\n").unwrap();
        fs::write(root.path("run/slipway/trial"), trial).unwrap();
        (dir, root)
    }

    fn check(name: &str, words: &[&str]) -> HealthCheck {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        HealthCheck {
            name: name.to_owned(),
            kind: Ok(CheckKind::Command(words)),
            timeout: Duration::from_secs(5),
        }
    }

    fn watch<'a>(root: &'a RootDir, checks: &'a [HealthCheck]) -> TrialWatch<'a> {
        let trial = TrialRecord::read(root).unwrap().unwrap();
        let (settle, pause) = (Duration::from_millis(150), Duration::from_millis(20));
        TrialWatch { settle, pause, ..TrialWatch::new(root, checks, trial) }
    }

    #[test]
    fn a_healthy_trial_is_committed_after_a_while() {
        let (_dir, root) = root("deadline=400\nwatchdog=yes\n");
        let checks = [check("good", &["true"])];
        let (mut commits, mut phases) = (0, Vec::new());
        let started = Instant::now();
        let commit = || {
            commits += 1;
            Ok(())
        };
        let verdict = watch(&root, &checks).run(commit, |state| phases.push(state.phase)).unwrap();
        assert_eq!((verdict, commits), (TrialVerdict::Committed, 1));
        assert_eq!(phases, [TrialPhase::Settling, TrialPhase::Committed]);
        assert!(started.elapsed() >= Duration::from_millis(150));
        let state = read_state(&root).unwrap().unwrap();
        assert_eq!((state.phase, state.watchdog), (TrialPhase::Committed, true));
    }

    #[test]
    fn one_failure_starts_the_while_again() {
        let (dir, root) = root("deadline=400\nwatchdog=yes\n");
        // Fails in the second round, long before the settle time is over, even on a busy machine.
        let counter = dir.path().join("looks");
        let script = format!("echo x >>{0}; [ $(wc -l <{0}) -ne 2 ]", counter.display());
        let checks = [check("flapping", &["sh", "-c", &script])];
        let mut phases = Vec::new();
        let watch = TrialWatch { settle: Duration::from_secs(2), ..watch(&root, &checks) };
        watch.run(|| Ok(()), |state| phases.push(state.phase)).unwrap();
        assert_eq!(
            phases,
            [
                TrialPhase::Settling,
                TrialPhase::Checking,
                TrialPhase::Settling,
                TrialPhase::Committed
            ]
        );
    }

    #[test]
    fn an_unhealthy_trial_runs_out_of_time_and_says_why() {
        // Two seconds beyond the orderly end.
        let (_dir, root) = root("deadline=117\nwatchdog=no\n");
        let checks =
            [check("good", &["true"]), check("api", &["sh", "-c", "echo no answer; exit 1"])];
        let never = || panic!("committed an unhealthy trial");
        let TrialVerdict::OutOfTime(state) = watch(&root, &checks).run(never, |_| {}).unwrap()
        else {
            panic!("committed");
        };
        assert_eq!(state.phase, TrialPhase::OutOfTime);
        assert!(state.why().contains("api: sh: exit status: 1: no answer"), "{}", state.why());
        assert!(!state.why().contains("good"));
        assert_eq!(super::read_state(&root).unwrap(), Some(state));
    }

    #[test]
    fn a_commit_that_fails_is_tried_again() {
        let (_dir, root) = root("deadline=400\nwatchdog=yes\n");
        let checks = [check("good", &["true"])];
        let mut attempts = 0;
        let commit = || {
            attempts += 1;
            if attempts < 3 { Err(Refusal::new("io", "the card fails", "")) } else { Ok(()) }
        };
        let mut problems = Vec::new();
        let verdict =
            watch(&root, &checks).run(commit, |state| problems.push(state.problem.clone()));
        assert_eq!((verdict.unwrap(), attempts), (TrialVerdict::Committed, 3));
        assert_eq!(problems[1].as_deref(), Some("the card fails"));
    }

    #[test]
    fn without_the_initrds_word_there_is_no_trial() {
        let (_dir, root) = root("nonsense");
        assert_eq!(
            TrialRecord::read(&root).unwrap(),
            Some(TrialRecord { deadline: 0, watchdog: false })
        );
        TrialRecord::forget(&root).unwrap();
        assert_eq!(TrialRecord::read(&root).unwrap(), None);
    }
}
