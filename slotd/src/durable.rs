//! Files on `data` that survive a power cut: each is complete, the old one or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files::{Disk, Files, make_dirs};
use crate::refusal::{Refusal, Result};

/// Most bytes of a file that is read whole; ours have a few kilobytes.
const MAX_FILE: u64 = 1 << 20;

/// Writes a file beside its name, flushes it, and renames it; its folder is made and flushed too. Everybody
/// may read it.
///
/// # Errors
/// When the file system fails or is full; the old file is then still there.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_with(&Disk, path, bytes)
}

/// [`write()`] with every change made through `files`.
///
/// # Errors
/// As [`write()`].
pub fn write_with(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    for made in make_dirs(files, folder)? {
        files.sync(made.parent().unwrap_or(folder))?;
    }
    let partial = path.with_extension("partial");
    files.remove(&partial)?;
    files.create(&partial)?;
    files.append(&partial, bytes)?;
    files.set_mode(&partial, 0o644)?;
    files.sync(&partial)?;
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
    fs::write(&partial, bytes)?;
    fs::rename(&partial, path)
}

/// [`write()`] of a value as indented JSON.
///
/// # Errors
/// As [`write()`].
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_json_with(&Disk, path, value)
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

/// Reads a file of at most 1 MiB; `None` when there is none.
///
/// # Errors
/// When it cannot be read, or is longer.
pub fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    if file.take(MAX_FILE + 1).read_to_end(&mut bytes)? as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it is longer than {MAX_FILE} bytes")));
    }
    Ok(Some(bytes))
}

/// A JSON file as a value; `None` when there is none.
///
/// # Errors
/// When it cannot be read, or is something else.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    Ok(read(path)?.map(|bytes| serde_json::from_slice(&bytes)).transpose()?)
}

/// Removes a file; that there is none is fine.
///
/// # Errors
/// When the file system fails.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The right to change slots and boot state; given back when it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, or says who has it.
    ///
    /// # Errors
    /// `busy`: another process has it. `no-data`: `data` refuses writes.
    pub fn take(path: &Path, verb: &str) -> Result<Self> {
        let failed = |error: io::Error| {
            if error.kind() == io::ErrorKind::ReadOnlyFilesystem {
                return Refusal::new(
                    "no-data",
                    format!("locking {}: data refuses writes", path.display()),
                    "restart the robot to have data checked, or replace the card; nothing was changed",
                );
            }
            Refusal::io(format!("locking {}", path.display()), &error)
        };
        fs::create_dir_all(path.parent().unwrap_or(path)).map_err(failed)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let known = file.take(100).read_to_string(&mut holder).is_ok();
                let holder = if known { holder.trim().escape_debug().to_string() } else { holder };
                return Err(Refusal::new(
                    "busy",
                    format!("`slotd {verb}` cannot start: another one is at work ({holder})"),
                    "wait until it has ended; `slotd log` shows what it does",
                ));
            }
            Err(error) => return Err(failed(error.into())),
        }
        // Only for people who meet the lock: a full disk must not keep anybody from updating.
        let note = format!("{verb}, process {}\n", std::process::id());
        let noted = file.set_len(0).and_then(|()| file.write_all(note.as_bytes()));
        drop(noted);
        Ok(Self { _file: file })
    }
}
