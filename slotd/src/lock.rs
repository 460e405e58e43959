//! The one way to take a lock: a file in `/run/slotd`, a folder that only root may enter. `flock` asks for no right to
//! write, so a lock that others could open is one that they could hold. `/run` needs nothing of `data`, which may be
//! full, in memory or read-only; and it ends with the start, as every holder does.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// The pause between two tries for a lock that somebody has.
const PAUSE: Duration = Duration::from_millis(20);

/// What only one process may change at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Slots, boot state, keys, the API, everything on `data`.
    Slots,
    /// `/data/system`.
    Provision,
    /// The log.
    Log,
}

impl Turn {
    /// The name of its file.
    fn name(self) -> &'static str {
        match self {
            Self::Slots => "lock",
            Self::Provision => "provision.lock",
            Self::Log => "log.lock",
        }
    }
}

/// A lock; given back when it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, or says who has it. Nobody is waited for.
    ///
    /// # Errors
    /// `busy`: another process has it. `io`: `/run` fails.
    pub fn take(root: &Root, turn: Turn, verb: &str) -> Result<Self> {
        let path = root.run().join(turn.name());
        let failed = |error: io::Error| Refusal::io(format!("locking {}", path.display()), &error);
        let mut file = open(root, turn).map_err(failed)?;
        if !held(&file).map_err(failed)? {
            let mut holder = String::new();
            let known = file.take(100).read_to_string(&mut holder).is_ok();
            let holder = if known { holder.trim().escape_debug().to_string() } else { holder };
            return Err(Refusal::new(
                "busy",
                format!("`slotd {verb}` cannot start: another one is at work ({holder})"),
                "wait until it has ended; `slotd log` shows what it does",
            ));
        }
        // Only for people who meet the lock: a full /run must not keep anybody from updating.
        let note = format!("{verb}, process {}\n", std::process::id());
        let noted = file.set_len(0).and_then(|()| file.write_all(note.as_bytes()));
        drop(noted);
        Ok(Self { _file: file })
    }

    /// Takes the lock within `patience`, which is left at what remains of it.
    ///
    /// # Errors
    /// `WouldBlock`: somebody had it all that time. When `/run` fails.
    pub fn wait(root: &Root, turn: Turn, patience: &mut Duration) -> io::Result<Self> {
        let file = open(root, turn)?;
        let started = Instant::now();
        loop {
            let had = held(&file)?;
            let waited = started.elapsed();
            if had || waited >= *patience {
                *patience = patience.saturating_sub(waited);
                let busy =
                    || io::Error::new(io::ErrorKind::WouldBlock, "another process has its lock");
                return if had { Ok(Self { _file: file }) } else { Err(busy()) };
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn open(root: &Root, turn: Turn) -> io::Result<File> {
    let folder = root.run();
    private_dir(&folder)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(folder.join(turn.name()))
}

/// Whether the lock is ours now.
fn held(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Makes a folder, or an older one, private: only its owner may enter it. What is below is then out of everybody
/// else's reach, whatever modes it has. The folders above are made for everybody.
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
        // Damage, or a link that would lead out of what is private.
        std::fs::remove_file(folder)?;
        return DirBuilder::new().mode(0o700).create(folder);
    }
    if about.mode() & 0o7777 != 0o700 {
        std::fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    }
    Ok(())
}
