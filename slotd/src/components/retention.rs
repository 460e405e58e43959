//! Decides what is kept on `data`: the API that serves, the last good versions within a budget, and their
//! wheels.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bundle::component::{ComponentLock, ComponentWheel};
use serde_json::json;

use super::state::{self, ApiState};
use super::{ApiDir, NEW, failed, is_version, whole};
use crate::durable;
use crate::events::EventLog;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// How many good versions are kept besides the one that serves.
const KEPT: usize = 2;

/// They are kept only while at least this share of the file system is free, in percent.
const FREE: u64 = 20;

/// Bytes that an install leaves free for other uses.
const RESERVE: u64 = 16 << 20;

/// Bytes of a file system block, the smallest unit of a file.
const BLOCK: u64 = 4096;

/// Removes unfinished directories of an interrupted change.
///
/// # Errors
/// `io`.
pub(super) fn remove_unfinished(place: &ApiDir<'_>) -> Result<()> {
    for folder in [place.folder().to_owned(), place.wheels()] {
        for name in names_in(&folder)?.into_iter().filter(|name| name.ends_with(NEW)) {
            place.clear(&folder.join(name))?;
        }
    }
    Ok(())
}

/// Removes good versions beyond the budget, versions that were never good, and wheels that no version uses.
/// A failed removal is only logged: it costs space but breaks nothing.
pub(super) fn remove_unneeded(root: &RootDir, place: &ApiDir<'_>, events: &EventLog) {
    let mut state = ApiState::read(place);
    let mut kept = KEPT;
    loop {
        match limit_versions(place, &mut state, kept).and_then(|()| free_and_total_bytes(root)) {
            Ok((free, size)) if free.saturating_mul(100) >= size.saturating_mul(FREE) => break,
            Ok(_) if kept == 0 => break,
            Ok(_) => kept -= 1,
            Err(refusal) => {
                events.add("api-not-tidied", json!(refusal));
                break;
            }
        }
    }
}

/// Keeps the version that serves and `others` more.
fn limit_versions(place: &ApiDir<'_>, state: &mut ApiState, others: usize) -> Result<()> {
    let chosen = state.chosen.clone();
    let mut left = others;
    let before = state.good.len();
    state.good.retain(|good| {
        let serves = chosen.as_ref() == Some(&good.folder);
        let keep = serves || left > 0;
        left -= usize::from(keep && !serves);
        keep
    });
    // Removed from the state first, so that the state never lists a half-removed version.
    if state.good.len() != before {
        state.write(place)?;
    }
    let mut known: BTreeSet<&str> = state.good.iter().map(|good| good.folder.as_str()).collect();
    known.extend(chosen.as_deref());
    let serving = place.serving();
    known.extend(serving.as_deref());
    for name in installed_versions(place)? {
        if !known.contains(name.as_str()) {
            // Renamed first, so that a half-removed version never has its final name.
            let (path, old) = (place.version(&name), place.version(&format!("{name}{NEW}")));
            place.clear(&old)?;
            place.rename(&path, &old)?;
            place.clear(&old)?;
        }
    }
    let mut used = BTreeSet::new();
    for name in known {
        if let Ok(lock) = state::read_lock(place, name) {
            used.extend(lock.wheels.into_iter().map(|wheel| wheel.tree));
        }
    }
    for name in names_in(&place.wheels())? {
        if !used.contains(&name) {
            place.clear(&place.wheels().join(name))?;
        }
    }
    Ok(())
}

/// Makes room for an API on `data` by removing older ones. Returns the roles of its wheels that are present and
/// intact. This reads all of their files, so it is done once.
///
/// # Errors
/// `no-space`, with nothing written; `io`.
pub(super) fn make_room(
    root: &RootDir,
    place: &ApiDir<'_>,
    lock: &ComponentLock,
) -> Result<BTreeSet<String>> {
    let mut state = ApiState::read(place);
    let whole = lock.wheels.iter().filter(|wheel| whole::is_unchanged(place, wheel));
    let mut whole: BTreeSet<String> = whole.map(|wheel| wheel.role.clone()).collect();
    for others in [usize::MAX, 1, 0] {
        if others != usize::MAX {
            limit_versions(place, &mut state, others)?;
            // Removing a version may also remove wheels that only the new API shares with it.
            let gone = |wheel: &&ComponentWheel| !place.wheels().join(&wheel.tree).is_dir();
            lock.wheels.iter().filter(gone).for_each(|wheel| drop(whole.take(&wheel.role)));
        }
        let missing = |wheel: &&ComponentWheel| !whole.contains(&wheel.role);
        let sizes = lock.wheels.iter().filter(missing).map(|w| w.bytes + w.files * BLOCK);
        // A version has its own directories; a wheel has fewer directories than files.
        let folders: u64 = lock.wheels.iter().map(|wheel| wheel.files * BLOCK / 4).sum();
        let need = sizes.sum::<u64>() + folders + RESERVE;
        let (free, _) = free_and_total_bytes(root)?;
        if free >= need {
            return Ok(whole);
        }
        if others == 0 {
            return Err(Refusal::new(
                "no-space",
                format!(
                    "the API {} needs {} MiB on data, but {} MiB are free",
                    lock.version,
                    need.div_ceil(1 << 20),
                    free >> 20
                ),
                "free space on data (`slotd status` shows it); the API that serves is unchanged",
            ));
        }
    }
    Ok(whole)
}

/// The names of the directories of installed versions.
///
/// # Errors
/// `io`.
pub(super) fn installed_versions(place: &ApiDir<'_>) -> Result<Vec<String>> {
    Ok(names_in(place.folder())?.into_iter().filter(|name| is_version(name)).collect())
}

/// Free bytes (available to ordinary users) and total bytes.
fn free_and_total_bytes(root: &RootDir) -> Result<(u64, u64)> {
    let about = rustix::fs::statvfs(root.data())
        .map_err(|error| Refusal::io("reading the size of data", &error.into()))?;
    Ok((
        about.f_bavail.saturating_mul(about.f_frsize),
        about.f_blocks.saturating_mul(about.f_frsize),
    ))
}

/// Names in a directory; empty when it does not exist.
fn names_in(folder: &Path) -> Result<Vec<String>> {
    let paths = durable::list(folder).map_err(failed("reading", folder))?;
    let name = |path: &PathBuf| Some(path.file_name()?.to_str()?.to_owned());
    Ok(paths.iter().filter_map(name).collect())
}
