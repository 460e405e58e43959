//! The commands that change `data`, with logging; and what every start does with it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use super::grow::Grown;
use super::{grow, pending};
use crate::condition::State;
use crate::device::Device;
use crate::events::Events;
use crate::lock::{Lock, Turn};
use crate::refusal::{Refusal, Result};
use crate::root::Root;

fn logged<T>(root: &Root, event: &str, result: Result<T>, details: serde_json::Value) -> Result<T> {
    match &result {
        Ok(_) => Events::new(root).add(event, details),
        Err(refusal) => Events::new(root).add(&format!("{event}-refused"), json!(refusal)),
    }
    result
}

fn lock(root: &Root, verb: &str) -> Result<Lock> {
    let lock = Lock::take(root, Turn::Slots, verb)?;
    State::writable(root)?;
    Ok(lock)
}

/// Prepares a factory reset; the next start carries it out. Returns the path of the backup, if one was made.
///
/// # Errors
/// `busy`, `no-space`, `no-archive`, `io`.
pub fn reset(root: &Root, keep: bool) -> Result<Option<PathBuf>> {
    let _lock = lock(root, "reset")?;
    logged(root, "reset-prepared", pending::reset(root, keep), json!({ "backup": keep }))
}

/// Writes a backup.
///
/// # Errors
/// `io`.
pub fn backup(root: &Root, out: impl Write) -> Result<()> {
    logged(root, "backed-up", pending::backup(root, out), json!({}))
}

/// Prepares a restore; the next start carries it out.
///
/// # Errors
/// `busy`, `half-done`, `bad-archive`, `no-space`, `io`.
pub fn restore(root: &Root, input: impl Read) -> Result<()> {
    let _lock = lock(root, "restore")?;
    logged(root, "restore-prepared", pending::restore(root, input), json!({}))
}

/// Extends the partition `data` over the rest of the card: in every start, before it is mounted.
///
/// # Errors
/// `wrong-layout`, `bad-device`, `io`.
pub fn grow(root: &Root) -> Result<Grown> {
    let device = Device::read(root)?;
    let known = device.about.partitions.get("data").copied();
    let known = known.ok_or_else(|| {
        let help = "build the image again with a current `cargo xtask`";
        Refusal::new("bad-device", "device.toml lists no partition `data`", help)
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
        Refusal::new("source", format!("opening {file}: {error}"), "name a readable file")
    })?;
    Ok(Box::new(opened))
}
