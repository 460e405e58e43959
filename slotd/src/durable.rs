//! Files on `data` that survive a power cut: each is complete, either the old one or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files::{DirectFileChanges, FileChanges, make_dirs};

/// Maximum bytes of a file that is read as a whole; slotd's files have a few kilobytes.
const MAX_FILE: u64 = 1 << 20;

/// Writes a file under a temporary name, flushes it, and renames it; its directory is created and flushed too. All
/// users may read it.
///
/// # Errors
/// When the file system fails or is full; the old file then still exists.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_with(&DirectFileChanges, path, bytes)
}

/// [`write()`] with every change made through `files`.
///
/// # Errors
/// As [`write()`].
pub fn write_with(files: &dyn FileChanges, path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_mode_with(files, path, bytes, 0o644)
}

/// [`write_with`] for a file that only root may read, from its first byte on.
///
/// # Errors
/// As [`write()`].
pub fn write_secret_with(files: &dyn FileChanges, path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_mode_with(files, path, bytes, 0o600)
}

fn write_mode_with(
    files: &dyn FileChanges,
    path: &Path,
    bytes: &[u8],
    mode: u32,
) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    for made in make_dirs(files, folder)? {
        files.sync(made.parent().unwrap_or(folder))?;
    }
    let partial = path.with_extension("partial");
    files.remove(&partial)?;
    files.create(&partial)?;
    files.append(&partial, bytes)?;
    files.set_mode(&partial, mode)?;
    files.sync(&partial)?;
    // A directory with the file's name is damage, and would prevent the rename.
    if is_folder(path) {
        files.remove(path)?;
    }
    files.replace(&partial, path)?;
    files.sync(folder)
}

/// Writes a file under a temporary name and renames it, without waiting for the disk. Other processes see a
/// complete file at once, but after a power cut it may be the old one, or damaged.
///
/// # Errors
/// When the file system fails or is full.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let partial = path.with_extension("partial");
    for place in [&partial, path] {
        if is_folder(place) {
            fs::remove_dir_all(place)?;
        }
    }
    fs::write(&partial, bytes)?;
    fs::rename(&partial, path)
}

/// Whether a directory has this name.
fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|about| about.is_dir())
}

/// [`write()`] of a value as indented JSON.
///
/// # Errors
/// As [`write()`].
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_json_with(&DirectFileChanges, path, value)
}

/// [`write_json`] with every change made through `files`.
///
/// # Errors
/// As [`write()`].
pub fn write_json_with(
    files: &dyn FileChanges,
    path: &Path,
    value: &impl Serialize,
) -> io::Result<()> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    write_with(files, path, &json)
}

/// Opens a file for reading, without blocking if there is a pipe or a device instead.
///
/// # Errors
/// When it cannot be opened. `InvalidData`: it is not a regular file.
pub fn open(path: &Path) -> io::Result<File> {
    let damaged = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
    let no_wait = OFlags::NONBLOCK.bits().cast_signed();
    let is = |error: &io::Error, errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
    match OpenOptions::new().read(true).custom_flags(no_wait).open(path) {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(damaged("not a regular file")),
        Err(error) if is(&error, Errno::LOOP) => Err(damaged("a link to itself")),
        Err(error) if is(&error, Errno::NXIO) => Err(damaged("not a regular file")),
        Err(error) => Err(error),
    }
}

/// Reads a file of at most 1 MiB; `None` when there is none.
///
/// # Errors
/// When it cannot be read. `InvalidData`: it is longer, or not a regular file.
pub fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match open(path) {
        Err(error) if is_missing(&error) => return Ok(None),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    if file.take(MAX_FILE + 1).read_to_end(&mut bytes)? as u64 > MAX_FILE {
        let why = format!("longer than {MAX_FILE} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(Some(bytes))
}

/// [`read`] for a file whose damage must not stop the start: a longer file, or not a regular file, is read as empty.
///
/// # Errors
/// When the file system fails.
pub fn read_or_damaged(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match read(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Some(Vec::new())),
        read => read,
    }
}

/// The paths in a directory, sorted; none when the directory does not exist.
///
/// # Errors
/// When it cannot be read.
pub fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// Whether the error means that the file does not exist; this includes a path below something that is not a directory.
pub fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// A JSON file as a value; `None` when there is none.
///
/// # Errors
/// When it cannot be read or parsed.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    Ok(read(path)?.map(|bytes| serde_json::from_slice(&bytes)).transpose()?)
}

/// Removes a file, or a directory that damage has put in its place, if it exists.
///
/// # Errors
/// When the file system fails.
pub fn remove(path: &Path) -> io::Result<()> {
    if is_folder(path) {
        return fs::remove_dir_all(path);
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
