//! Room on `data` that only root can use: files in `/data/slotd/reserve` that hold blocks and inodes while there are
//! some, and give them up while a start prepares `data` or a record is written, when nothing else is free. ext4's own reserve for root knows
//! no inodes, and cards in the field were made without one.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, StatVfs, fallocate, statvfs};
use serde::{Deserialize, Serialize};

use crate::data::{Condition, State as DataState};
use crate::durable;
use crate::lock::private_dir;
use crate::root::Root;

/// How many files, and bytes of each. Together 24 MiB and 96 inodes: the 16 MiB that the image's health check asks for,
/// and room for what a start writes. The largest `resources` of an API so far are 17 files with 1.4 MiB; every record of
/// the agent has a few kilobytes.
const FILES: u64 = 96;
const BYTES: u64 = 256 << 10;

/// What was free when this start began to use `data`.
#[derive(Serialize, Deserialize)]
struct Before {
    /// Bytes, those of the reserve included.
    free: u64,
}

fn folder(root: &Root) -> PathBuf {
    root.state().join("reserve")
}

fn note(root: &Root) -> PathBuf {
    root.run().join("before.json")
}

/// Bytes free for everybody.
fn free(about: &StatVfs) -> u64 {
    about.f_bavail.saturating_mul(about.f_frsize)
}

/// Whether what is free for everybody is less than the reserve; some file systems count no inodes.
fn is_scarce(about: &StatVfs) -> bool {
    free(about) < FILES * BYTES || (about.f_files > 0 && about.f_favail < FILES)
}

/// Bytes that the reserve holds.
fn held(root: &Root) -> u64 {
    let Ok(entries) = fs::read_dir(folder(root)) else { return 0 };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|about| about.blocks() * 512)
        .sum()
}

/// Notes what is free before anything of this start writes to `data`; [`fair`] asks it.
pub(crate) fn begin(root: &Root) {
    let Ok(about) = statvfs(root.data()) else { return };
    let before = Before { free: free(&about).saturating_add(held(root)) };
    if let Err(error) = durable::write_json(&note(root), &before) {
        crate::say!("slotd: what is free on data before this start cannot be noted: {error}");
    }
}

/// Does something with the reserve given up, if nothing else is free, and takes it again afterwards, as far as there is
/// room. In a start no other user's process can take what becomes free meanwhile; later one may, so that what is then
/// written with it must also do without.
pub(crate) fn with<T>(root: &Root, work: impl FnOnce() -> T) -> T {
    let scarce = statvfs(root.data()).is_ok_and(|about| is_scarce(&about));
    let given_up = if scarce { held(root) / BYTES } else { 0 };
    if scarce
        && let Err(error) = fs::remove_dir_all(folder(root))
        && error.kind() != io::ErrorKind::NotFound
    {
        crate::say!("slotd: the reserve on data cannot be given up: {error}");
    }
    let done = work();
    if scarce {
        take(root, given_up);
    }
    done
}

/// Fills the reserve up, from at most half of what is free. Without room there is none.
pub(crate) fn keep(root: &Root) {
    take(root, 0);
}

/// [`keep`], but for the files that were there before: these come back as long as there is any room.
fn take(root: &Root, before: u64) {
    if let Err(error) = fill(root, before)
        && error.kind() != io::ErrorKind::StorageFull
    {
        crate::say!("slotd: the reserve on data is not whole: {error}");
    }
}

fn fill(root: &Root, before: u64) -> io::Result<()> {
    // In memory there is nothing to hold for the next start, and memory is short.
    if DataState::read(root).is_ok_and(|state| state.condition == Condition::Memory) {
        return Ok(());
    }
    let folder = folder(root);
    let about = statvfs(root.data())?;
    let mut room = free(&about) / 2 / BYTES;
    if about.f_files > 0 {
        room = room.min(about.f_favail / 2);
    }
    room = room.max(before);
    if room == 0 {
        return Ok(());
    }
    private_dir(&root.state())?;
    private_dir(&folder)?;
    for number in 0..FILES {
        let path = folder.join(number.to_string());
        if room > 0 && !is_whole(&path) {
            room -= 1;
            hold(&path)?;
        }
    }
    Ok(())
}

fn is_whole(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|about| about.blocks() * 512 >= BYTES)
}

/// Holds one file's room, or none.
fn hold(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, BYTES).map_err(|error| {
        // Half of one holds an inode for nothing; the first failure is the one to tell.
        drop(fs::remove_file(path));
        error.into()
    })
}

/// Whether a file system with `path` has `wanted` bytes free, the reserve included; or had fewer already when this
/// start began, so that no update has taken them. `Err` is what is missing, for people.
pub(crate) fn fair(root: &Root, path: &Path, wanted: u64) -> Result<String, String> {
    let at = root.path(path);
    let about = statvfs(&at).map_err(|error| format!("{}: {error}", path.display()))?;
    let of = |path: &Path| fs::metadata(path).ok().map(|about| about.dev());
    let is_data = of(&at).is_some() && of(&at) == of(&root.data());
    let bytes = free(&about).saturating_add(if is_data { held(root) } else { 0 });
    let text = format!("{} has {} MiB free", path.display(), bytes >> 20);
    if bytes >= wanted {
        return Ok(text);
    }
    let before: Option<Before> = durable::read_json(&note(root)).ok().flatten();
    match before.filter(|before| is_data && before.free < wanted) {
        Some(before) => Ok(format!(
            "{text}, expected {}; it had {} before this system's first write: no update has filled it",
            wanted >> 20,
            before.free >> 20
        )),
        None => Err(format!("{text}, expected {}", wanted >> 20)),
    }
}
