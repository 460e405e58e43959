//! Factory reset, backup and restore. Everything on `data` cannot be replaced while programs run: the change is
//! prepared completely, recorded, and carried out early in the next start. After a power cut it resumes until it
//! is done.
//!
//! Each request is complete on the disk before its record is written; until then the previous request is valid.
//! Old files are moved into `.outgoing`, new files are in `.incoming`. Nothing is moved out before the new files are
//! present and marked as complete.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::archive::{self, ArchiveLimits, none_if_missing};
use super::migrate;
use crate::durable;
use crate::files::{DirectFileChanges, FileAppender, FileChanges};
use crate::refusal::{Refusal, Result, failed};
use crate::root::RootDir;

/// The files that will replace everything.
const INCOMING: &str = ".incoming";

/// Where they are unpacked: a waiting restore is not touched before the new one is complete.
const UNPACKED: &str = ".incoming.new";

/// In [`INCOMING`]: marks it as complete.
const COMPLETE: &str = ".complete";

/// The files that were replaced.
const OUTGOING: &str = ".outgoing";

/// In [`OUTGOING`]: its files are to be overwritten before they are removed.
const OVERWRITE: &str = ".overwrite";

/// In [`OUTGOING`]: name prefix of directories that were deeper than [`DEEPEST`].
const DEEP: &str = ".deep.";

/// Maximum depth of directories while they are overwritten and removed: with names of 255 bytes a path still fits into
/// PATH_MAX (4096, Linux' limits.h).
const DEEPEST: usize = 12;

/// Left free when an archive is packed or unpacked: bytes, and files.
const RESERVE: ArchiveLimits = ArchiveLimits { bytes: 16 << 20, entries: 1024 };

/// What a reset keeps in the agent's own directory: the state of slots, keys and floors, and its log. A reset removes
/// everything else there, so that no user data is left.
const KEPT: [&str; 10] = [
    "floor.json",
    "journal.json",
    "keyset.json",
    "keyset.json.minisig",
    "log",
    "pending.json",
    "slot-a.json",
    "slot-b.json",
    "trust.json",
    "tryboot.json",
];

/// Names in a backup that the agent and the system use as directories, and which must be directories.
const FOLDERS: [&str; 7] = ["apps", "apps/api", "boot.d", "home", "identity", "network", "system"];

/// A change that waits for the next start, or was interrupted in the current one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PendingChange {
    /// Everything is removed.
    Reset,
    /// Everything is removed and replaced by the unpacked backup.
    Restore,
    /// Everything has been removed; the unpacked backup is being moved in.
    Arriving,
}

impl PendingChange {
    /// The pending change, if any.
    ///
    /// # Errors
    /// `io`.
    pub fn read(root: &RootDir) -> Result<Option<Self>> {
        let path = record_path(root);
        durable::read_json(&path).map_err(failed("reading", &path))
    }
}

/// The result of a start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangeOutcome {
    /// The change that was carried out, if one was pending.
    pub carried_out: Option<PendingChange>,
    /// Whether an incomplete change was dropped; nothing is changed then.
    pub dropped: bool,
    /// Number of files that a reset removed but could not overwrite.
    pub not_overwritten: u64,
}

fn record_path(root: &RootDir) -> PathBuf {
    root.state().join("pending.json")
}

/// The directory of the backup that a reset makes.
fn backup_dir(root: &RootDir) -> PathBuf {
    root.state().join("backup")
}

/// The backup itself, and next to it the mark that the pending reset made it.
const BACKUP: &str = "before-reset.tar.zst";
const OF_THIS_RESET: &str = "keep";

fn is_there(path: &Path) -> Result<bool> {
    let found = none_if_missing(fs::symlink_metadata(path)).map_err(failed("reading", path))?;
    Ok(found.is_some())
}

fn entry_paths(folder: &Path) -> Result<Vec<PathBuf>> {
    let to_refusal = || failed("reading", folder);
    let Some(listing) = none_if_missing(fs::read_dir(folder)).map_err(to_refusal())? else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in listing {
        names.push(PathBuf::from(entry.map_err(to_refusal())?.file_name()));
    }
    names.sort();
    Ok(names)
}

/// Writes a backup: everything except the agent's own state and the logs.
///
/// # Errors
/// `no-archive`: the content exceeds what [`restore`] accepts. `no-space`, `io`.
pub fn backup(root: &RootDir, out: impl Write) -> Result<()> {
    let data = root.data();
    archive::pack(&data, &archive::backup_names(&data)?, out, ArchiveLimits::backup(&data)?)
        .map(drop)
}

/// Prepares a factory reset for the next start. With `keep` it makes a backup first, which stays on `data`, and
/// returns its path. The robot's floor, keys and log are never reset.
///
/// # Errors
/// `no-space` when the backup does not fit. `no-archive`, `io`. An earlier pending change stays pending.
pub fn reset(root: &RootDir, keep: bool) -> Result<Option<PathBuf>> {
    reset_with(root, keep, &DirectFileChanges)
}

/// [`reset`] with every change made through `files`.
///
/// # Errors
/// As [`reset`].
pub fn reset_with(root: &RootDir, keep: bool, files: &dyn FileChanges) -> Result<Option<PathBuf>> {
    let before = read_valid(root)?;
    let folder = backup_dir(root);
    let (path, mark) = (folder.join(BACKUP), folder.join(OF_THIS_RESET));
    let written = |done: io::Result<()>| done.map_err(failed("writing", &folder));
    if keep {
        private_folder(files, &folder)?;
        let partial = folder.join("backup.partial");
        if let Err(refusal) = write_backup(root, files, &partial) {
            files.remove(&partial).map_err(failed("removing", &partial))?;
            return Err(refusal);
        }
        written(files.replace(&partial, &path))?;
        if !is_there(&mark)? {
            written(files.create(&mark))?;
        }
        written(files.sync(&folder))?;
    } else if is_there(&mark)? {
        written(files.remove(&mark).and_then(|()| files.sync(&folder)))?;
    }
    record_request(root, files, PendingChange::Reset, before)?;
    Ok(keep.then_some(path))
}

fn write_backup(root: &RootDir, files: &dyn FileChanges, path: &Path) -> Result<()> {
    let to_refusal = failed("writing", path);
    files.remove(path).and_then(|()| files.create(path)).map_err(&to_refusal)?;
    // A reset must not fill the disk.
    let most = ArchiveLimits::free_space(&root.data())?.bytes.saturating_sub(RESERVE.bytes);
    let mut out = FileAppender::new(files, path, most);
    backup(root, &mut out)?;
    out.flush().and_then(|()| files.sync(path)).map_err(&to_refusal)
}

/// Durably creates a directory that only root may enter; an existing directory gets that mode.
pub(super) fn private_folder(files: &dyn FileChanges, folder: &Path) -> Result<()> {
    let to_refusal = failed("creating", folder);
    let parent = folder.parent().unwrap_or(folder);
    let made = crate::files::make_dirs(files, parent).map_err(&to_refusal)?;
    for made in made {
        files.sync(made.parent().unwrap_or(parent)).map_err(&to_refusal)?;
    }
    let done = match none_if_missing(fs::symlink_metadata(folder)).map_err(&to_refusal)? {
        None => files.create_dir(folder).and_then(|()| files.sync(parent)),
        // Damage: this is not a directory, so it has nothing that belongs here.
        Some(about) if !about.is_dir() => files
            .remove(folder)
            .and_then(|()| files.create_dir(folder))
            .and_then(|()| files.sync(parent)),
        Some(about) if about.mode() & 0o777 == 0o700 => Ok(()),
        Some(_) => files.set_mode(folder, 0o700).and_then(|()| files.sync(folder)),
    };
    done.map_err(&to_refusal)
}

/// Records a request, or keeps the previous one: a request that was refused must not be carried out.
fn record_request(
    root: &RootDir,
    files: &dyn FileChanges,
    new: PendingChange,
    before: Option<PendingChange>,
) -> Result<()> {
    let path = record_path(root);
    let written = durable::write_json_with(files, &path, &new);
    if written.is_err() {
        // Report the original failure.
        drop(match before {
            Some(before) => durable::write_json_with(files, &path, &before),
            None => files.remove(&path).and_then(|()| files.sync(&root.state())),
        });
    }
    written.map_err(failed("writing", &path))
}

/// The pending change. An invalid record is ignored: slotd did not write it, or the card has damaged it.
fn read_valid(root: &RootDir) -> Result<Option<PendingChange>> {
    let path = record_path(root);
    let bytes = durable::read_or_damaged(&path).map_err(failed("reading", &path))?;
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

/// Unpacks a backup next to the current files and prepares the exchange for the next start.
///
/// # Errors
/// `half-done`: another restore is in progress. `bad-archive`, `no-space`, `io`. An earlier pending change stays pending.
pub fn restore(root: &RootDir, input: impl Read) -> Result<()> {
    restore_with(root, input, &DirectFileChanges)
}

/// [`restore`] with every change made through `files`.
///
/// # Errors
/// As [`restore`].
pub fn restore_with(root: &RootDir, input: impl Read, files: &dyn FileChanges) -> Result<()> {
    let data = root.data();
    let before = read_valid(root)?;
    if before == Some(PendingChange::Arriving) {
        return Err(Refusal::new(
            "half-done",
            "preparing a restore: an earlier restore was interrupted and is incomplete",
            "restart the robot, which resumes the earlier restore, then restore again; or reset the robot",
        ));
    }
    let unpacked = data.join(UNPACKED);
    files.remove(&unpacked).map_err(failed("removing", &unpacked))?;
    if let Err(refusal) = unpack(root, files, input, &unpacked) {
        files.remove(&unpacked).map_err(failed("removing", &unpacked))?;
        return Err(refusal);
    }
    replace_restore(root, files, before)
}

/// Everything of a restore except its record; at the end it is complete on the disk.
fn unpack(root: &RootDir, files: &dyn FileChanges, input: impl Read, into: &Path) -> Result<()> {
    let to_refusal = failed("writing", into);
    let data = root.data();
    files.create_dir(into).map_err(&to_refusal)?;
    let free = ArchiveLimits::free_space(&data)?;
    let room = ArchiveLimits {
        bytes: free.bytes.saturating_sub(RESERVE.bytes),
        entries: free.entries.saturating_sub(RESERVE.entries),
    };
    archive::unpack(files, input, into, room)?;
    for name in FOLDERS {
        let path = into.join(name);
        let found =
            none_if_missing(fs::symlink_metadata(&path)).map_err(failed("reading", &path))?;
        if found.is_some_and(|found| !found.is_dir()) {
            let help = "use a file that `slotd backup` made";
            return Err(Refusal::new("bad-archive", format!("`{name}` is not a directory"), help));
        }
    }
    migrate::only_the_version(files, into)?;
    files.create(&into.join(COMPLETE)).and_then(|()| files.sync(into)).map_err(&to_refusal)
}

/// Replaces a pending restore by the unpacked backup.
fn replace_restore(
    root: &RootDir,
    files: &dyn FileChanges,
    before: Option<PendingChange>,
) -> Result<()> {
    let data = root.data();
    let (unpacked, incoming) = (data.join(UNPACKED), data.join(INCOMING));
    let to_refusal = failed("writing", &incoming);
    let waits = is_there(&incoming)?;
    if waits {
        files.exchange(&unpacked, &incoming).map_err(&to_refusal)?;
    } else {
        files.rename(&unpacked, &incoming).map_err(&to_refusal)?;
    }
    let noted = files
        .sync(&data)
        .map_err(&to_refusal)
        .and_then(|()| record_request(root, files, PendingChange::Restore, before));
    if noted.is_err() && waits {
        // Report the original failure.
        drop(files.exchange(&unpacked, &incoming).and_then(|()| files.sync(&data)));
    }
    noted?;
    // The previous pending restore. The new request is already valid; the next start removes leftovers.
    drop(files.remove(&unpacked));
    Ok(())
}

/// Carries out a pending change early in a start, before anything uses `data`.
///
/// # Errors
/// `io`: the change resumes in the next start.
pub fn apply(root: &RootDir) -> Result<ChangeOutcome> {
    apply_with(root, &DirectFileChanges)
}

/// [`apply`] with every change made through `files`.
///
/// # Errors
/// As [`apply`].
pub fn apply_with(root: &RootDir, files: &dyn FileChanges) -> Result<ChangeOutcome> {
    let data = root.data();
    let (incoming, outgoing) = (data.join(INCOMING), data.join(OUTGOING));
    let mut applied = ChangeOutcome::default();
    let noted = is_there(&record_path(root))?;
    let pending = match read_valid(root)? {
        None if noted => by_what_is_there(&data)?,
        // Nothing is removed unless its replacement is complete.
        Some(PendingChange::Restore) if !is_there(&incoming.join(COMPLETE))? => None,
        known => known,
    };
    if let Some(pending) = pending {
        // The API's resources are removed, or replaced by older ones.
        crate::provision::forget(root, files)?;
        match pending {
            PendingChange::Reset => move_out(root, files, &removed_paths(root)?, true)?,
            PendingChange::Restore => {
                let names = archive::backup_names(&data)?;
                let paths: Vec<PathBuf> = names.iter().map(|name| data.join(name)).collect();
                move_out(root, files, &paths, false)?;
                // From here on, no old files are left in place.
                durable::write_json_with(files, &record_path(root), &PendingChange::Arriving)
                    .map_err(failed("writing", &record_path(root)))?;
                move_in(root, files)?;
            }
            PendingChange::Arriving => move_in(root, files)?,
        }
    }
    if noted {
        files
            .remove(&record_path(root))
            .and_then(|()| files.sync(&root.state()))
            .map_err(failed("removing", &record_path(root)))?;
    }
    applied.carried_out = pending;
    applied.dropped = noted && pending.is_none();
    for folder in [&incoming, &data.join(UNPACKED)] {
        if is_there(folder)? {
            files.remove(folder).map_err(failed("removing", folder))?;
        }
    }
    if is_there(&outgoing.join(OVERWRITE))? {
        let flush = || files.sync_all(&data).map_err(failed("flushing", &data));
        applied.not_overwritten = overwrite(files, &outgoing)?;
        // A file system does not write the blocks of a removed file.
        flush()?;
        empty_directory(files, &outgoing)?;
        flush()?;
    }
    if is_there(&outgoing)? {
        files.remove(&outgoing).map_err(failed("removing", &outgoing))?;
    }
    Ok(applied)
}

/// Determines the change in progress when its record is damaged. If nothing was moved yet, there is none.
fn by_what_is_there(data: &Path) -> Result<Option<PendingChange>> {
    let outgoing = data.join(OUTGOING);
    Ok(if is_there(&outgoing.join(OVERWRITE))? {
        Some(PendingChange::Reset)
    } else if is_there(&outgoing)? && is_there(&data.join(INCOMING).join(COMPLETE))? {
        Some(PendingChange::Arriving)
    } else {
        None
    })
}

/// Everything that a reset removes: all of `data` except [`KEPT`].
fn removed_paths(root: &RootDir) -> Result<Vec<PathBuf>> {
    let (data, state, backup) = (root.data(), root.state(), backup_dir(root));
    let mut paths = Vec::new();
    let mut add = |folder: &Path, but: &dyn Fn(&Path) -> bool| -> Result<()> {
        let names = entry_paths(folder)?.into_iter().filter(|name| !but(name));
        paths.extend(names.map(|name| folder.join(name)));
        Ok(())
    };
    let found = data.join("lost+found");
    add(&data, &|name| [OUTGOING, "slotd", "lost+found"].iter().any(|own| name == Path::new(own)))?;
    // The directory itself belongs to the file system, but a repair may have put user files into it.
    add(&found, &|_| false)?;
    let of_this_reset = is_there(&backup.join(OF_THIS_RESET))?;
    add(&state, &|name| {
        let kept = KEPT.iter().any(|kept| name == Path::new(kept));
        kept || (of_this_reset && name == Path::new("backup"))
    })?;
    if of_this_reset {
        add(&backup, &|name| [BACKUP, OF_THIS_RESET].iter().any(|own| name == Path::new(own)))?;
    }
    Ok(paths)
}

/// Moves files out, and returns when this would survive a power cut.
fn move_out(
    root: &RootDir,
    files: &dyn FileChanges,
    paths: &[PathBuf],
    overwrite: bool,
) -> Result<()> {
    let outgoing = root.data().join(OUTGOING);
    let to_refusal = failed("creating", &outgoing);
    let found =
        none_if_missing(fs::symlink_metadata(&outgoing)).map_err(failed("reading", &outgoing))?;
    if !found.is_some_and(|found| found.is_dir()) {
        files.remove(&outgoing).and_then(|()| files.create_dir(&outgoing)).map_err(&to_refusal)?;
    }
    let mark = outgoing.join(OVERWRITE);
    if overwrite {
        if !is_there(&mark)? {
            files.create(&mark).map_err(&to_refusal)?;
        }
        // Before any file is there that could be removed without being overwritten.
        files.sync(&outgoing).and_then(|()| files.sync(&root.data())).map_err(&to_refusal)?;
    }
    for path in paths {
        let Some(name) = path.file_name() else { continue };
        let mut to = outgoing.join(name);
        // An earlier, failed attempt may have left a file with this name.
        for number in 1u32.. {
            if !is_there(&to)? {
                break;
            }
            let mut other = name.to_owned();
            other.push(format!(".{number}"));
            to = outgoing.join(other);
        }
        files.rename(path, &to).map_err(failed("moving", path))?;
    }
    let mut folders: Vec<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
    folders.dedup();
    for folder in folders.into_iter().chain([outgoing.as_path()]) {
        files.sync(folder).map_err(failed("flushing", folder))?;
    }
    Ok(())
}

/// Moves the new files into place. Files that already exist there were created after the removal, by services of a
/// start in which this failed.
fn move_in(root: &RootDir, files: &dyn FileChanges) -> Result<()> {
    let data = root.data();
    let incoming = data.join(INCOMING);
    if !is_there(&incoming)? {
        return Ok(());
    }
    for name in archive::backup_names(&incoming)? {
        let (from, to) = (incoming.join(&name), data.join(&name));
        if is_there(&to)? {
            move_out(root, files, std::slice::from_ref(&to), false)?;
        }
        files.rename(&from, &to).map_err(failed("moving", &from))?;
    }
    for folder in [&incoming, &data] {
        files.sync(folder).map_err(failed("flushing", folder))?;
    }
    Ok(())
}

/// Overwrites with zeros every file below a directory, except files with a hard link outside of it. The zeros are not
/// flushed yet. Returns how many files could not be overwritten.
fn overwrite(files: &dyn FileChanges, folder: &Path) -> Result<u64> {
    let (mut not_overwritten, mut moved) = (0, 0);
    // How many names of each file were found, by inode: a file with several names is overwritten at the last one. A file
    // with a name elsewhere is left unchanged.
    let mut shared: BTreeMap<u64, u64> = BTreeMap::new();
    let (mut folders, mut at) = (vec![(folder.to_owned(), 0)], 0);
    while let Some((inside, depth)) = folders.get(at).cloned() {
        at += 1;
        for name in entry_paths(&inside)? {
            let mut path = inside.join(name);
            let found =
                none_if_missing(fs::symlink_metadata(&path)).map_err(failed("reading", &path))?;
            let Some(found) = found else { continue };
            if found.is_dir() {
                let mut below = depth + 1;
                if below > DEEPEST {
                    // Directories may be nested deeper than the longest path that the kernel opens.
                    let free = loop {
                        let free = folder.join(format!("{DEEP}{moved}"));
                        moved += 1;
                        if !is_there(&free)? {
                            break free;
                        }
                    };
                    files.rename(&path, &free).map_err(failed("moving", &path))?;
                    (path, below) = (free, 1);
                }
                folders.push((path, below));
                continue;
            }
            if !found.is_file() {
                continue;
            }
            let met = shared.entry(found.ino()).or_default();
            *met += 1;
            if *met == found.nlink() {
                shared.remove(&found.ino());
                not_overwritten += u64::from(files.overwrite(&path).is_err());
            }
        }
    }
    Ok(not_overwritten)
}

/// Removes everything in a directory except the mark [`OVERWRITE`].
fn empty_directory(files: &dyn FileChanges, folder: &Path) -> Result<()> {
    for name in entry_paths(folder)?.into_iter().filter(|name| name != Path::new(OVERWRITE)) {
        let path = folder.join(name);
        files.remove(&path).map_err(failed("removing", &path))?;
    }
    Ok(())
}
