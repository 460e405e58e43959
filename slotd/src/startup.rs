//! What a start does with `data`, in order: carries out a pending change, selects the API that serves, and migrates the
//! data to the system's version.

use std::process::Command;

use serde::Serialize;
use serde_json::json;

use crate::components;
use crate::condition::report_path;
use crate::data::{ChangeOutcome, MigrationOutcome, PendingChange, apply, migrate};
use crate::device::read_device_file;
use crate::durable;
use crate::events::EventLog;
use crate::files::DirectFileChanges;
use crate::lock::private_dir;
use crate::refusal::{Result, failed};
use crate::reserve;
use crate::root::RootDir;

/// The result of a start for `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PreparedData {
    /// The reset or restore that was carried out, or dropped.
    #[serde(flatten)]
    pub applied: ChangeOutcome,
    /// The result of the migration between versions.
    pub migrated: MigrationOutcome,
}

/// Carries out a pending change and migrates `data` to this system's version: in every start, after `data` is mounted
/// and before anything uses it. A failure is recorded in `/run/slotd/data.json` for the health check.
///
/// # Errors
/// As [`apply`] and [`migrate`].
pub fn prepare(root: &RootDir) -> Result<PreparedData> {
    // Before any other user has a process: older agents left both directories open to all users.
    for folder in [root.run(), root.state()] {
        if let Err(error) = private_dir(&folder) {
            crate::say!("slotd: restricting {} to root: {error}", folder.display());
        }
    }
    reserve::record_free_space(root);
    let result = reserve::with_reserve_released(root, || prepare_all(root));
    reserve::fill_reserve(root);
    match &result {
        Ok(done)
            if done.applied != ChangeOutcome::default() || !is_unremarkable(&done.migrated) =>
        {
            EventLog::new(root).add("data-prepared", json!(done));
        }
        Ok(_) => {}
        Err(refusal) => EventLog::new(root).add("data-not-prepared", json!(refusal)),
    }
    let note =
        result.as_ref().map_or_else(|refusal| json!({ "refused": refusal }), |done| json!(done));
    let path = report_path(root);
    durable::write_json(&path, &note).map_err(failed("writing", &path))?;
    result
}

fn is_unremarkable(migrated: &MigrationOutcome) -> bool {
    matches!(migrated, MigrationOutcome::Unchanged | MigrationOutcome::New)
}

fn prepare_all(root: &RootDir) -> Result<PreparedData> {
    let applied = apply(root)?;
    if applied.carried_out == Some(PendingChange::Reset) && root.is_system() {
        discard_free_blocks(root);
    }
    // The start does not depend on it: the built-in API can always serve.
    let events = EventLog::new(root);
    if let Err(refusal) = components::settle(root, &events, &DirectFileChanges) {
        events.add("api-not-settled", json!(refusal));
    }
    // Independent of the running slot, and of whether `/` is on a slot at all.
    let about = read_device_file(root)?;
    Ok(PreparedData { applied, migrated: migrate(root, &about.version)? })
}

/// Tells the card which blocks are free, so that it drops their content: copies that were replaced or removed before
/// a reset. Not every card supports this, and none guarantees it.
fn discard_free_blocks(root: &RootDir) {
    let trimmed = Command::new("fstrim").arg(root.data()).output();
    let why = match trimmed {
        Ok(output) if output.status.success() => return,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    EventLog::new(root).add("data-not-trimmed", json!({ "why": why }));
}
