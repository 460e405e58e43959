//! Files on `data` that survive a power cut: each is complete, the old one or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files::{Files, RealFiles, make_dirs};

/// Most bytes of a file that is read whole; ours have a few kilobytes.
const MAX_FILE: u64 = 1 << 20;

/// Writes a file beside its name, flushes it, and renames it; its folder is made and flushed too. Everybody
/// may read it.
///
/// # Errors
/// When the file system fails or is full; the old file is then still there.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_with(&RealFiles, path, bytes)
}

/// [`write()`] with every change made through `files`.
///
/// # Errors
/// As [`write()`].
pub fn write_with(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_mode_with(files, path, bytes, 0o644)
}

/// [`write_with`] for what only root may read, from its first byte.
///
/// # Errors
/// As [`write()`].
pub fn write_secret_with(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_mode_with(files, path, bytes, 0o600)
}

fn write_mode_with(files: &dyn Files, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
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
    // A folder in the file's place is damage, and no file takes its name.
    if is_folder(path) {
        files.remove(path)?;
    }
    files.replace(&partial, path)?;
    files.sync(folder)
}

/// Writes a file beside its name and renames it, without waiting for the disk: whole for every other
/// process at once, but after a power cut perhaps the old one, or damaged.
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

/// Whether a folder has this name.
fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|about| about.is_dir())
}

/// [`write()`] of a value as indented JSON.
///
/// # Errors
/// As [`write()`].
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_json_with(&RealFiles, path, value)
}

/// [`write_json`] with every change made through `files`.
///
/// # Errors
/// As [`write()`].
pub fn write_json_with(files: &dyn Files, path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    write_with(files, path, &json)
}

/// Opens a file for reading; a pipe or a device in its place makes nobody wait.
///
/// # Errors
/// When it cannot be opened. `InvalidData`: it is no file.
pub fn open(path: &Path) -> io::Result<File> {
    let damaged = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
    let no_wait = OFlags::NONBLOCK.bits().cast_signed();
    let is = |error: &io::Error, errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
    match OpenOptions::new().read(true).custom_flags(no_wait).open(path) {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(damaged("it is no file")),
        Err(error) if is(&error, Errno::LOOP) => Err(damaged("it is a link to itself")),
        Err(error) if is(&error, Errno::NXIO) => Err(damaged("it is no file")),
        Err(error) => Err(error),
    }
}

/// Reads a file of at most 1 MiB; `None` when there is none.
///
/// # Errors
/// When it cannot be read. `InvalidData`: it is longer, or no file.
pub fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match open(path) {
        Err(error) if is_missing(&error) => return Ok(None),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    if file.take(MAX_FILE + 1).read_to_end(&mut bytes)? as u64 > MAX_FILE {
        let why = format!("it is longer than {MAX_FILE} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(Some(bytes))
}

/// [`read`] for a file whose damage must not end the start: what is longer, or no file, is as good as an empty one.
///
/// # Errors
/// When the file system fails.
pub fn read_or_damaged(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match read(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Some(Vec::new())),
        read => read,
    }
}

/// Whether nothing has the name: nothing can, below what is no folder.
pub fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// A JSON file as a value; `None` when there is none.
///
/// # Errors
/// When it cannot be read, or is something else.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    Ok(read(path)?.map(|bytes| serde_json::from_slice(&bytes)).transpose()?)
}

/// Removes a file, or the folder that damage has put in its place; that there is none is fine.
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
