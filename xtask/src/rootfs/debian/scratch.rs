//! Directories for the base's intermediate files: some hundred megabytes, removed when the work is
//! done, or by the next build if the work was killed.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};

use crate::exec::Tool;
use crate::progress::warn;

const PREFIX: &str = "slipway-base-";

/// The prefix of a directory that is being created: empty, and never removed by others.
const UNFINISHED: &str = ".slipway-base-";

/// A directory under the system's temporary directory: inside a user namespace, a home directory
/// that only its owner may enter is inaccessible. It is removed when the value is dropped.
#[derive(Debug)]
pub(super) struct ScratchDirectory {
    path: Utf8PathBuf,
    /// The lock of the directory. Every program that is started inherits it: an `mmdebstrap` that
    /// outlives us (when we are killed) still holds it.
    _lock: File,
}

impl ScratchDirectory {
    /// Creates a directory, and removes those of killed processes.
    ///
    /// # Errors
    /// When it cannot be created.
    pub(super) fn new() -> Result<Self> {
        Self::below(
            &Utf8PathBuf::try_from(std::env::temp_dir()).context("the temporary directory")?,
        )
    }

    fn below(temporary: &Utf8Path) -> Result<Self> {
        remove_stale_dirs(temporary);
        let context = || format!("making a directory in {temporary}");
        let dir = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(temporary);
        let dir = dir.with_context(context)?;
        // Regardless of the umask: root in a user namespace must be able to read it.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).with_context(context)?;
        let lock = File::open(dir.path()).with_context(context)?;
        lock.lock().with_context(context)?;
        rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty()).with_context(context)?;
        let name = dir.path().file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let path = temporary.join(name.trim_start_matches('.'));
        fs::rename(dir.path(), &path).with_context(context)?;
        // The directory has another name now.
        drop(dir.keep());
        Ok(Self { path, _lock: lock })
    }

    pub(super) fn path(&self) -> &Utf8Path {
        &self.path
    }
}

impl Drop for ScratchDirectory {
    fn drop(&mut self) {
        remove_dir(&self.path);
    }
}

/// Removes the directories of killed builds of this user.
fn remove_stale_dirs(temporary: &Utf8Path) {
    let Ok(entries) = temporary.read_dir_utf8() else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().starts_with(PREFIX)) {
        let path = entry.path();
        // Other users may write here, too: never remove theirs, and never follow a link.
        let ours = path.symlink_metadata().is_ok_and(|about| {
            about.is_dir() && about.uid() == rustix::process::geteuid().as_raw()
        });
        if ours && File::open(path).is_ok_and(|dir| dir.try_lock().is_ok()) {
            remove_dir(path);
        }
    }
}

/// Removes a directory, and warns if it cannot, because it is large. Filesystems mounted below it
/// are not touched.
fn remove_dir(path: &Utf8Path) {
    let words = ["-rf", "--one-file-system", "--", path.as_str()];
    let whole = Tool::new("rm").args(words).run().or_else(|error| {
        if rustix::process::geteuid().is_root() {
            return Err(error);
        }
        // A killed `mmdebstrap` leaves files of a user's subordinate ids: only root of a namespace
        // with these ids may remove them.
        Tool::new("unshare").args(["--map-root-user", "--map-auto", "rm"]).args(words).run()
    });
    if let Err(error) = whole {
        warn(format!("{path} is left over and can be removed: {error:#}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_a_killed_build_has_left_goes_and_nothing_else() {
        let guard = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(guard.path()).unwrap();
        for name in ["slipway-base-left/a/b", "slipway-other", "target/kept"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        symlink("target", dir.join("slipway-base-link")).unwrap();
        fs::write(dir.join("slipway-base-file"), "").unwrap();
        let names = || -> Vec<String> {
            let entries = dir.read_dir_utf8().unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().to_owned()).collect();
            names.sort();
            names
        };
        let others = ["slipway-base-file", "slipway-base-link", "slipway-other", "target"];

        let used = ScratchDirectory::below(dir).unwrap();
        fs::write(used.path().join("file"), "").unwrap();
        assert_eq!(fs::metadata(used.path()).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(!dir.join("slipway-base-left").exists(), "the lock is free");
        let second = ScratchDirectory::below(dir).unwrap();
        assert!(used.path().join("file").exists(), "it is in use");
        drop((used, second));
        assert_eq!(names(), others);
        assert!(dir.join("target/kept").exists());
    }
}
