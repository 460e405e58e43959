//! What a robot can be asked to do with `data`, logged; and what its start does by itself.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use serde_json::json;

use super::grow::Grown;
use super::{Applied, Migrated, Pending, migrate, pending, state};
use crate::admission::Admitted;
use crate::components;
use crate::device::description;
use crate::events::Events;
use crate::files::{Files, RealFiles, Writer};
use crate::lock::private_dir;
use crate::refusal::{Refusal, Result};
use crate::reserve;
use crate::root::Root;

fn logged<T>(root: &Root, event: &str, result: Result<T>, details: serde_json::Value) -> Result<T> {
    match &result {
        Ok(_) => Events::new(root).add(event, details),
        Err(refusal) => Events::new(root).add(&format!("{event}-refused"), json!(refusal)),
    }
    result
}

/// Prepares a factory reset; the next start carries it out. Returns where the backup lies, if one was made.
///
/// # Errors
/// `no-space`, `no-archive`, `io`.
pub fn reset(root: &Root, _: &Admitted, keep: bool) -> Result<Option<PathBuf>> {
    logged(root, "reset-prepared", pending::reset(root, keep), json!({ "backup": keep }))
}

/// Writes a backup.
///
/// # Errors
/// `io`.
pub fn backup(root: &Root, out: impl Write) -> Result<()> {
    logged(root, "backed-up", pending::backup(root, out), json!({}))
}

/// Writes a backup into a file: complete under its name, or not there; and for its owner only from its first byte.
///
/// # Errors
/// `no-archive`, `io`.
pub fn backup_to(root: &Root, file: &str) -> Result<()> {
    let failed = |error: io::Error| Refusal::io(format!("writing {file}"), &error);
    let partial = PathBuf::from(format!("{file}.partial"));
    RealFiles.remove(&partial).and_then(|()| RealFiles.create(&partial)).map_err(failed)?;
    let mut out = Writer::new(&RealFiles, &partial, u64::MAX);
    let written = backup(root, &mut out).and_then(|()| {
        let folder = Path::new(file).parent().filter(|folder| !folder.as_os_str().is_empty());
        let done = out.flush().and_then(|()| RealFiles.sync(&partial));
        done.and_then(|()| RealFiles.replace(&partial, Path::new(file)))
            .and_then(|()| RealFiles.sync(folder.unwrap_or(Path::new("."))))
            .map_err(failed)
    });
    if written.is_err() {
        // The first failure is the one to tell.
        drop(RealFiles.remove(&partial));
    }
    written
}

/// Prepares a restore; the next start carries it out.
///
/// # Errors
/// `half-done`, `bad-archive`, `no-space`, `io`.
pub fn restore(root: &Root, _: &Admitted, input: impl Read) -> Result<()> {
    logged(root, "restore-prepared", pending::restore(root, input), json!({}))
}

/// Extends the partition `data` over the rest of the card: in every start, before it is mounted.
///
/// # Errors
/// `wrong-layout`, `bad-device`, `io`.
pub fn grow(root: &Root) -> Result<Grown> {
    state::grow_partition(root)
}

/// What a start has done with `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Prepared {
    /// The reset or restore that was carried out, or dropped.
    #[serde(flatten)]
    pub applied: Applied,
    /// The steps between versions.
    pub migrated: Migrated,
}

/// Carries out what waits and brings `data` to this system's version: in every start, after it is mounted
/// and before anything uses it. What fails is left in `/run/slotd/data.json`, where a health check finds it.
///
/// # Errors
/// As [`pending::apply`] and [`migrate`].
pub fn prepare(root: &Root) -> Result<Prepared> {
    // Before any other user has a process: an agent before this one left both open to everybody.
    for folder in [root.run(), root.state()] {
        if let Err(error) = private_dir(&folder) {
            crate::say!("slotd: {} is not for root alone: {error}", folder.display());
        }
    }
    reserve::begin(root);
    let result = reserve::with(root, || prepare_all(root));
    reserve::keep(root);
    match &result {
        Ok(done) if done.applied != Applied::default() || !quiet(&done.migrated) => {
            Events::new(root).add("data-prepared", json!(done));
        }
        Ok(_) => {}
        Err(refusal) => Events::new(root).add("data-not-prepared", json!(refusal)),
    }
    let note =
        result.as_ref().map_or_else(|refusal| json!({ "refused": refusal }), |done| json!(done));
    let path = report(root);
    crate::durable::write_json(&path, &note)
        .map_err(|error| Refusal::io(format!("writing {}", path.display()), &error))?;
    result
}

fn quiet(migrated: &Migrated) -> bool {
    matches!(migrated, Migrated::Unchanged | Migrated::New)
}

fn prepare_all(root: &Root) -> Result<Prepared> {
    let applied = pending::apply(root)?;
    if applied.carried_out == Some(Pending::Reset) && root.is_system() {
        trim(root);
    }
    // Nothing of the start depends on it: the system's own API can always serve.
    let events = Events::new(root);
    if let Err(refusal) = components::settle(root, &events, &RealFiles) {
        events.add("api-not-settled", json!(refusal));
    }
    // Which slot runs does not matter here, nor whether `/` is on a slot at all.
    let about = description(root)?;
    Ok(Prepared { applied, migrated: migrate(root, &about.version)? })
}

/// Tells the card which blocks are free, so that it forgets what they held: copies that were replaced or
/// removed before a reset. Not every card takes that, and none promises it.
fn trim(root: &Root) {
    let trimmed = Command::new("fstrim").arg(root.data()).output();
    let why = match trimmed {
        Ok(output) if output.status.success() => return,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    Events::new(root).add("data-not-trimmed", json!({ "why": why }));
}

fn report(root: &Root) -> PathBuf {
    root.path("run/slotd/data.json")
}

/// Why `data` is not fit for this system, as [`prepare`] has found; for the health check.
pub(crate) fn unfit(root: &Root) -> Option<String> {
    let note: Option<serde_json::Value> = crate::durable::read_json(&report(root)).ok().flatten();
    let message = note?.get("refused")?.get("message")?.as_str()?.to_owned();
    Some(message)
}

/// Opens a backup's file, `-` being standard input.
///
/// # Errors
/// `source`.
pub fn open(file: &str) -> Result<Box<dyn Read>> {
    if file == "-" {
        return Ok(Box::new(std::io::stdin()));
    }
    let opened = File::open(file).map_err(|error| {
        Refusal::new("source", format!("opening {file}: {error}"), "name a file that can be read")
    })?;
    Ok(Box::new(opened))
}
