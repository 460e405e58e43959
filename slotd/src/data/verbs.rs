//! The commands that change `data`, with logging; and what every start does with it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::grow::GrowOutcome;
use super::{grow, pending};
use crate::admission::ChangePermit;
use crate::device::RobotDevice;
use crate::events::EventLog;
use crate::files::{DirectFileChanges, FileAppender, FileChanges};
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

fn log_result<T>(
    root: &RootDir,
    event: &str,
    result: Result<T>,
    details: serde_json::Value,
) -> Result<T> {
    match &result {
        Ok(_) => EventLog::new(root).add(event, details),
        Err(refusal) => EventLog::new(root).add(&format!("{event}-refused"), json!(refusal)),
    }
    result
}

/// Prepares a factory reset; the next start carries it out. Returns the path of the backup, if one was made.
///
/// # Errors
/// `no-space`, `no-archive`, `io`.
pub fn reset(root: &RootDir, _: &ChangePermit, keep: bool) -> Result<Option<PathBuf>> {
    log_result(root, "reset-prepared", pending::reset(root, keep), json!({ "backup": keep }))
}

/// Writes a backup.
///
/// # Errors
/// `io`.
pub fn backup(root: &RootDir, out: impl Write) -> Result<()> {
    log_result(root, "backed-up", pending::backup(root, out), json!({}))
}

/// Writes a backup into a file, which is complete or does not exist. Only its owner may read it, from its first byte on.
///
/// # Errors
/// `no-archive`, `io`.
pub fn backup_to(root: &RootDir, file: &str) -> Result<()> {
    let failed = |error: io::Error| Refusal::io(format!("writing {}", file.escape_debug()), &error);
    let partial = PathBuf::from(format!("{file}.partial"));
    DirectFileChanges
        .remove(&partial)
        .and_then(|()| DirectFileChanges.create(&partial))
        .map_err(failed)?;
    let mut out = FileAppender::new(&DirectFileChanges, &partial, u64::MAX);
    let written = backup(root, &mut out).and_then(|()| {
        let folder = Path::new(file).parent().filter(|folder| !folder.as_os_str().is_empty());
        let done = out.flush().and_then(|()| DirectFileChanges.sync(&partial));
        done.and_then(|()| DirectFileChanges.replace(&partial, Path::new(file)))
            .and_then(|()| DirectFileChanges.sync(folder.unwrap_or(Path::new("."))))
            .map_err(failed)
    });
    if written.is_err() {
        // The first failure is reported.
        drop(DirectFileChanges.remove(&partial));
    }
    written
}

/// Prepares a restore; the next start carries it out.
///
/// # Errors
/// `half-done`, `bad-archive`, `no-space`, `io`.
pub fn restore(root: &RootDir, _: &ChangePermit, input: impl Read) -> Result<()> {
    log_result(root, "restore-prepared", pending::restore(root, input), json!({}))
}

/// Extends the partition `data` over the rest of the card: in every start, before it is mounted.
///
/// # Errors
/// `wrong-layout`, `bad-device`, `io`.
pub fn grow(root: &RootDir) -> Result<GrowOutcome> {
    let device = RobotDevice::read(root)?;
    let known = device.about.partitions.get("data").copied();
    let known = known.ok_or_else(|| {
        Refusal::new("bad-device", "device.toml lists no partition `data`", crate::NEWER_IMAGE)
    })?;
    let disk = device.open_disk(true)?;
    let grown = grow::grow(&disk, known.number, known.start_sector)
        .map_err(|error| Refusal::io("growing the partition `data`", &error))?;
    if grown.to != grown.from {
        // Other partitions of the disk are in use: the kernel accepts a change of one partition, not a new table. Not
        // `partx --update`: it removes an unused partition and adds it again, and systemd then unmounts what was mounted
        // from it meanwhile.
        let status = Command::new("resizepart")
            .arg(device.disk_path())
            .args([known.number.to_string(), grown.to.to_string()])
            .status();
        let told = status.map_err(|error| Refusal::io("running resizepart", &error))?;
        if !told.success() {
            return Err(Refusal::new(
                "io",
                format!("telling the kernel the new size of the partition: resizepart: {told}"),
                "restart the robot: the kernel then reads the new size",
            ));
        }
    }
    Ok(grown)
}

/// Opens a backup file; `-` is standard input.
///
/// # Errors
/// `source`.
pub fn open(file: &str) -> Result<Box<dyn Read>> {
    if file == "-" {
        return Ok(Box::new(std::io::stdin()));
    }
    let opened = File::open(file).map_err(|error| {
        let file = file.escape_debug();
        Refusal::new("source", format!("opening {file}: {error}"), "name a readable file")
    })?;
    Ok(Box::new(opened))
}
