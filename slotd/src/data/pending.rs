//! Factory reset, backup and restore. A change of everything on `data` cannot happen under running programs:
//! it is prepared completely, noted, and carried out early in the next start, where it goes on after a power
//! cut until it is done.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::archive;
use crate::durable;
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// What is to take the place of everything, complete but for its last flush.
const INCOMING: &str = ".incoming";

/// What had that place.
const OUTGOING: &str = ".outgoing";

/// Left free when an archive is unpacked.
const RESERVE: u64 = 16 << 20;

/// A change that waits for the next start, or was interrupted in this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pending {
    /// Everything goes.
    Reset,
    /// Everything goes, and what was unpacked comes.
    Restore,
    /// Everything has gone; what was unpacked is coming.
    Arriving,
}

impl Pending {
    /// The change that waits, if any.
    ///
    /// # Errors
    /// `io`.
    pub fn read(root: &Root) -> Result<Option<Self>> {
        let path = note(root);
        durable::read_json(&path).map_err(failed("reading", &path))
    }
}

fn note(root: &Root) -> PathBuf {
    root.state().join("pending.json")
}

/// Where the backup lies that a reset makes.
fn last_backup(root: &Root) -> PathBuf {
    root.state().join("before-reset.tar.zst")
}

fn failed(doing: &str, path: &Path) -> impl Fn(io::Error) -> Refusal {
    let doing = format!("{doing} {}", path.display());
    move |error| Refusal::io(&doing, &error)
}

/// Writes a backup: everything but the agent's own memory and the logs.
///
/// # Errors
/// `io`.
pub fn backup(root: &Root, out: impl Write) -> Result<()> {
    let data = root.data();
    archive::pack(&data, &archive::contents(&data)?, out)
}

/// Prepares a factory reset for the next start; `keep` makes a backup first, which stays on `data` and
/// returns where. What a robot has learned of bundles (its floor, its keys, its log) is never reset.
///
/// # Errors
/// `io`; `no-space` when the backup does not fit. Nothing is changed then.
pub fn reset(root: &Root, keep: bool) -> Result<Option<PathBuf>> {
    let path = last_backup(root);
    if keep {
        let partial = path.with_extension("partial");
        let written =
            File::create(&partial).map_err(failed("writing", &partial)).and_then(|file| {
                backup(root, &file)?;
                file.sync_all().map_err(failed("writing", &partial))
            });
        if let Err(refusal) = written {
            durable::remove(&partial).map_err(failed("removing", &partial))?;
            if free(&root.data())? < RESERVE {
                return Err(Refusal::new(
                    "no-space",
                    "there is no room on data for a backup of it",
                    "take a backup to another machine with `slotd backup`, then reset without one",
                ));
            }
            return Err(refusal);
        }
        fs::rename(&partial, &path).map_err(failed("renaming", &partial))?;
    }
    durable::write_json(&note(root), &Pending::Reset).map_err(failed("writing", &note(root)))?;
    Ok(keep.then_some(path))
}

/// Unpacks a backup beside what is there and prepares the exchange for the next start.
///
/// # Errors
/// `bad-archive`, `no-space`, `io`: nothing is changed then.
pub fn restore(root: &Root, input: impl Read) -> Result<()> {
    let incoming = root.data().join(INCOMING);
    clear(&incoming)?;
    fs::create_dir(&incoming).map_err(failed("creating", &incoming))?;
    let space = free(&root.data())?.saturating_sub(RESERVE);
    if let Err(refusal) = archive::unpack(input, &incoming, space) {
        clear(&incoming)?;
        return Err(refusal);
    }
    durable::write_json(&note(root), &Pending::Restore).map_err(failed("writing", &note(root)))
}

/// Carries out what waits, early in a start, before anything uses `data`. Returns what was done.
///
/// # Errors
/// `io`: the change goes on in the next start.
pub fn apply(root: &Root) -> Result<Option<Pending>> {
    let data = root.data();
    let (incoming, outgoing) = (data.join(INCOMING), data.join(OUTGOING));
    let pending = Pending::read(root)?;
    if let Some(pending) = pending {
        // The API's resources go, or come back from another time.
        crate::provision::forget(root, &crate::files::Disk)?;
        if pending != Pending::Arriving {
            fs::create_dir_all(&outgoing).map_err(failed("creating", &outgoing))?;
            let mut names = archive::contents(&data)?;
            if pending == Pending::Reset {
                names.push(PathBuf::from("var"));
            }
            for name in names.iter().filter(|name| data.join(name).symlink_metadata().is_ok()) {
                fs::rename(data.join(name), outgoing.join(name))
                    .map_err(failed("moving", &data.join(name)))?;
            }
            flush(&data)?;
        }
        if pending != Pending::Reset {
            // From here on nothing that lies in its place is old.
            durable::write_json(&note(root), &Pending::Arriving)
                .map_err(failed("writing", &note(root)))?;
            for name in archive::contents(&incoming).unwrap_or_default() {
                fs::rename(incoming.join(&name), data.join(&name))
                    .map_err(failed("moving", &incoming.join(&name)))?;
            }
            flush(&data)?;
        }
        durable::remove(&note(root)).map_err(failed("removing", &note(root)))?;
        flush(&root.state())?;
    }
    clear(&incoming)?;
    clear(&outgoing)?;
    Ok(pending)
}

fn flush(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("flushing", folder))
}

fn clear(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("removing", folder)(error))
        }
        _ => Ok(()),
    }
}

fn free(data: &Path) -> Result<u64> {
    let about = rustix::fs::statvfs(data)
        .map_err(|error| Refusal::io(format!("looking at {}", data.display()), &error.into()))?;
    Ok(about.f_bavail.saturating_mul(about.f_frsize))
}
