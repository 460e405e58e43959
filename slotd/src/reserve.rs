//! Space on `data` that is reserved for root: files in `/data/slotd/reserve` that occupy blocks and inodes. They are
//! released while a start prepares `data` or a record is written, if nothing else is free. ext4's own reserve for root
//! does not cover inodes, and cards in the field were created without it.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, StatVfs, fallocate, statvfs};
use serde::{Deserialize, Serialize};

use crate::condition::{DataCondition, DataState};
use crate::durable;
use crate::lock::private_dir;
use crate::root::RootDir;

/// Number of files, and bytes of each. Together 24 MiB and 96 inodes: the 16 MiB that the image's health check requires,
/// and space for what a start writes. The largest `resources` of an API so far are 17 files with 1.4 MiB; each record
/// of the agent has a few kilobytes.
const FILES: u64 = 96;
const BYTES: u64 = 256 << 10;

/// The free space when this start began to use `data`.
#[derive(Serialize, Deserialize)]
struct Before {
    /// Free bytes, including the reserve.
    free: u64,
}

fn reserve_dir(root: &RootDir) -> PathBuf {
    root.state().join("reserve")
}

fn free_space_path(root: &RootDir) -> PathBuf {
    root.run().join("before.json")
}

/// Bytes that are free for ordinary users.
fn free_bytes(about: &StatVfs) -> u64 {
    about.f_bavail.saturating_mul(about.f_frsize)
}

/// Whether less than the reserve is free for ordinary users; some file systems do not count inodes.
fn is_scarce(about: &StatVfs) -> bool {
    free_bytes(about) < FILES * BYTES || (about.f_files > 0 && about.f_favail < FILES)
}

/// Bytes that the reserve occupies.
fn reserved_bytes(root: &RootDir) -> u64 {
    let Ok(entries) = fs::read_dir(reserve_dir(root)) else { return 0 };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|about| about.blocks() * 512)
        .sum()
}

/// Records the free space before this start writes to `data`; [`check_free_space`] uses it.
pub(crate) fn record_free_space(root: &RootDir) {
    let Ok(about) = statvfs(root.data()) else { return };
    let before = Before { free: free_bytes(&about).saturating_add(reserved_bytes(root)) };
    if let Err(error) = durable::write_json(&free_space_path(root), &before) {
        crate::say!("slotd: cannot record the free space on data before this start: {error}");
    }
}

/// Runs `work` with the reserve released, if nothing else is free, and fills it again afterwards as far as possible.
/// During the start no other user's process can use the released space; later one may, so that `work` must then also
/// be able to fail.
pub(crate) fn with_reserve_released<T>(root: &RootDir, work: impl FnOnce() -> T) -> T {
    let scarce = statvfs(root.data()).is_ok_and(|about| is_scarce(&about));
    let given_up = if scarce { reserved_bytes(root) / BYTES } else { 0 };
    if scarce && let Err(error) = durable::remove(&reserve_dir(root)) {
        crate::say!("slotd: cannot release the reserve on data: {error}");
    }
    let done = work();
    if scarce {
        try_fill_reserve(root, given_up);
    }
    done
}

/// Fills the reserve, from at most half of the free space. Without free space there is no reserve.
pub(crate) fn fill_reserve(root: &RootDir) {
    try_fill_reserve(root, 0);
}

/// [`fill_reserve`], but the files that existed before are restored as long as there is any space.
fn try_fill_reserve(root: &RootDir, before: u64) {
    if let Err(error) = write_reserve(root, before)
        && error.kind() != io::ErrorKind::StorageFull
    {
        crate::say!("slotd: the reserve on data is incomplete: {error}");
    }
}

fn write_reserve(root: &RootDir, before: u64) -> io::Result<()> {
    // In memory a reserve does not last until the next start, and memory is scarce.
    if DataState::read(root).is_ok_and(|state| state.condition == DataCondition::Memory) {
        return Ok(());
    }
    let folder = reserve_dir(root);
    let about = statvfs(root.data())?;
    let mut room = free_bytes(&about) / 2 / BYTES;
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
            reserve_file(&path)?;
        }
    }
    Ok(())
}

fn is_whole(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|about| about.blocks() * 512 >= BYTES)
}

/// Reserves one file's space, or nothing.
fn reserve_file(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, BYTES).map_err(|error| {
        // An incomplete file would waste an inode; the first failure is reported.
        drop(fs::remove_file(path));
        error.into()
    })
}

/// Checks that the file system of `path` has `wanted` bytes free, including the reserve; or that it already had fewer
/// when this start began, so that no update has used them. `Err` says what is missing, human-readable.
pub(crate) fn check_free_space(root: &RootDir, path: &Path, wanted: u64) -> Result<String, String> {
    let at = root.path(path);
    let about = statvfs(&at).map_err(|error| format!("{}: {error}", path.display()))?;
    let of = |path: &Path| fs::metadata(path).ok().map(|about| about.dev());
    let is_data = of(&at).is_some() && of(&at) == of(&root.data());
    let bytes = free_bytes(&about).saturating_add(if is_data { reserved_bytes(root) } else { 0 });
    let text = format!("{} has {} MiB free", path.display(), bytes >> 20);
    if bytes >= wanted {
        return Ok(text);
    }
    let before: Option<Before> = durable::read_json(&free_space_path(root)).ok().flatten();
    match before.filter(|before| is_data && before.free < wanted) {
        Some(before) => Ok(format!(
            "{text}, expected {}; the file system had {} before this system's first write, so the update has not filled it",
            wanted >> 20,
            before.free >> 20
        )),
        None => Err(format!("{text}, expected {}", wanted >> 20)),
    }
}
