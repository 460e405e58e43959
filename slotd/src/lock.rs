//! Locks: files in `/run/slotd`, a directory that only root may enter. `flock` needs no write permission, so any user
//! who could open a lock could hold it. `/run` does not depend on `data`, which may be full, in memory or read-only,
//! and it is empty after a restart, when no process can hold a lock.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// The pause between two attempts to take a lock that is held.
const PAUSE: Duration = Duration::from_millis(20);

/// Things that only one process may change at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockScope {
    /// Slots, boot state, keys, the API, everything on `data`.
    Slots,
    /// `/data/system`.
    Provision,
    /// The log.
    Log,
}

impl LockScope {
    /// The name of its file.
    fn name(self) -> &'static str {
        match self {
            Self::Slots => "lock",
            Self::Provision => "provision.lock",
            Self::Log => "log.lock",
        }
    }
}

/// A lock; released when it is dropped or the process ends.
#[derive(Debug)]
pub struct ProcessLock {
    _file: File,
}

impl ProcessLock {
    /// Takes the lock without waiting, or says which process holds it.
    ///
    /// # Errors
    /// `busy`: another process holds it. `io`: `/run` fails.
    pub fn acquire(root: &RootDir, scope: LockScope, verb: &str) -> Result<Self> {
        let path = root.run().join(scope.name());
        let failed = |error: io::Error| Refusal::io(format!("locking {}", path.display()), &error);
        let mut file = open_lock_file(root, scope).map_err(failed)?;
        if !try_lock(&file).map_err(failed)? {
            let mut holder = String::new();
            let known = file.take(100).read_to_string(&mut holder).is_ok();
            let holder = if known { holder.trim().escape_debug().to_string() } else { holder };
            return Err(Refusal::new(
                "busy",
                format!("`slotd {verb}` cannot start: another slotd is running ({holder})"),
                "wait until the other process has ended; `slotd log` shows what it does",
            ));
        }
        // Only for the message above: a full /run must not prevent an update.
        let note = format!("{verb}, process {}\n", std::process::id());
        let noted = file.set_len(0).and_then(|()| file.write_all(note.as_bytes()));
        drop(noted);
        Ok(Self { _file: file })
    }

    /// Takes the lock within `patience`, and reduces `patience` by the time waited.
    ///
    /// # Errors
    /// `WouldBlock`: another process held it all that time. When `/run` fails.
    pub fn acquire_within(
        root: &RootDir,
        scope: LockScope,
        patience: &mut Duration,
    ) -> io::Result<Self> {
        let file = open_lock_file(root, scope)?;
        let started = Instant::now();
        loop {
            let had = try_lock(&file)?;
            let waited = started.elapsed();
            if had || waited >= *patience {
                *patience = patience.saturating_sub(waited);
                let busy =
                    || io::Error::new(io::ErrorKind::WouldBlock, "another process holds the lock");
                return if had { Ok(Self { _file: file }) } else { Err(busy()) };
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn open_lock_file(root: &RootDir, scope: LockScope) -> io::Result<File> {
    let folder = root.run();
    private_dir(&folder)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(folder.join(scope.name()))
}

/// Tries to take the lock; returns whether this process holds it now.
fn try_lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Creates a directory that only its owner may enter, or changes an existing one. Other users then cannot reach
/// anything below it, whatever its modes. Parent directories are created for all users.
///
/// # Errors
/// When the file system fails.
pub fn private_dir(folder: &Path) -> io::Result<()> {
    if let Some(above) = folder.parent() {
        std::fs::create_dir_all(above)?;
    }
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => return created,
    }
    let about = std::fs::symlink_metadata(folder)?;
    if !about.is_dir() {
        // Damage, or a link to a directory that is not private.
        std::fs::remove_file(folder)?;
        return DirBuilder::new().mode(0o700).create(folder);
    }
    if about.mode() & 0o7777 != 0o700 {
        std::fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    }
    Ok(())
}
