//! Ends a trial's deadline: systemd takes over the watchdog that the initrd has armed.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use super::trial::TrialRecord;
use crate::durable;
use crate::refusal::{Refusal, Result, failed};
use crate::root::RootDir;

/// The drop-in with which the initrd prevents systemd from feeding the watchdog.
const HOLD: &str = "run/systemd/system.conf.d/90-slipway-trial.conf";

/// How long systemd may take to open the watchdog after it has reloaded its configuration.
const PATIENCE: Duration = Duration::from_secs(20);

/// Hands the watchdog over to systemd: called only after a trial has been committed. Until this succeeds the
/// deadline stays, and the watchdog resets the robot into the slot that is now committed.
///
/// # Errors
/// `watchdog`: systemd does not take over. Calling it again is harmless.
pub fn hand_over(root: &RootDir) -> Result<()> {
    let Some(trial) = TrialRecord::read(root)? else { return Ok(()) };
    let path = root.path(HOLD);
    durable::remove(&path).map_err(failed("removing", &path))?;
    // Without a bus: systemd's own socket answers as long as process 1 does.
    let status = Command::new("systemctl").arg("daemon-reload").status();
    let failed = |why: String| {
        Refusal::new(
            "watchdog",
            format!("handing the watchdog over to systemd: {why}"),
            "the trial is committed; when its deadline passes, the robot restarts once",
        )
    };
    let status = status.map_err(|error| failed(format!("systemctl: {error}")))?;
    if !status.success() {
        return Err(failed(format!("systemctl daemon-reload: {status}")));
    }
    if trial.watchdog {
        let end = Instant::now() + PATIENCE;
        while !kept_by_systemd(root) {
            if Instant::now() >= end {
                return Err(failed("systemd has not opened /dev/watchdog0".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    TrialRecord::forget(root)
}

/// Whether process 1 has the watchdog open.
fn kept_by_systemd(root: &RootDir) -> bool {
    let Ok(open) = fs::read_dir(root.path("proc/1/fd")) else { return false };
    open.flatten().any(|entry| {
        fs::read_link(entry.path())
            .is_ok_and(|to| to.to_string_lossy().starts_with("/dev/watchdog"))
    })
}
