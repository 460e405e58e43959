//! Changes of files and directories. Code that must leave a consistent tree at every moment makes its changes
//! through this trait, one call for each change, so that a test can record them and simulate a power cut
//! between any two.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{CWD, OFlags, RenameFlags};

/// Bytes per write of zeros.
const ZEROS: usize = 256 << 10;

/// Bytes that [`FileAppender`] collects for one change.
const GATHERED: usize = 256 << 10;

/// The changes. A change is only guaranteed to survive a power cut after [`FileChanges::sync`]: a file's content after
/// the file is synced, a name after its directory is synced.
pub trait FileChanges: Sync {
    /// Creates a directory that only its owner may enter.
    ///
    /// # Errors
    /// When the file system fails or is full; when the name exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates an empty file that only its owner may read.
    ///
    /// # Errors
    /// As [`FileChanges::create_dir`].
    fn create(&self, path: &Path) -> io::Result<()>;

    /// Adds bytes to a file.
    ///
    /// # Errors
    /// When the file system fails or is full.
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Sets a file's or directory's mode, independent of the process's umask.
    ///
    /// # Errors
    /// When the file system fails.
    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()>;

    /// Sets the owner and the group of a file, a directory, or a link itself.
    ///
    /// # Errors
    /// When the file system fails; when the process lacks the permission.
    fn set_owner(&self, path: &Path, user: u32, group: u32) -> io::Result<()>;

    /// Overwrites a file's content with zeros in place; its length stays. The zeros are durable once the file is synced,
    /// and lost if it is removed before. A link is not followed.
    ///
    /// # Errors
    /// When the file system fails.
    fn overwrite(&self, path: &Path) -> io::Result<()>;

    /// Sets the time of a file's last change.
    ///
    /// # Errors
    /// When the file system fails.
    fn set_modified(&self, path: &Path, time: SystemTime) -> io::Result<()>;

    /// Gives a file a second name: a hard link.
    ///
    /// # Errors
    /// As [`FileChanges::create_dir`].
    fn link(&self, file: &Path, path: &Path) -> io::Result<()>;

    /// Creates a symbolic link.
    ///
    /// # Errors
    /// As [`FileChanges::create_dir`].
    fn symlink(&self, to: &Path, path: &Path) -> io::Result<()>;

    /// Returns when a file's content, or a directory's names, would survive a power cut.
    ///
    /// # Errors
    /// When the file system fails.
    fn sync(&self, path: &Path) -> io::Result<()>;

    /// Returns when all changes in a directory's file system would survive a power cut: one wait instead of
    /// one for each of thousands of files.
    ///
    /// # Errors
    /// When the file system fails.
    fn sync_all(&self, folder: &Path) -> io::Result<()>;

    /// Renames a file or a link within a directory, and replaces what had that name, in one step.
    ///
    /// # Errors
    /// When the file system fails, or a directory has the name.
    fn replace(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Renames to a name that must not exist, in any directory of the file system. A move between two
    /// directories is durable once both are synced.
    ///
    /// # Errors
    /// When the file system fails, or the name exists.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Exchanges two names in one step.
    ///
    /// # Errors
    /// When the file system fails, or does not support this.
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()>;

    /// Removes a file, or a directory with everything in it, if it exists.
    ///
    /// # Errors
    /// When the file system fails.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The file system itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct DirectFileChanges;

impl FileChanges for DirectFileChanges {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(path)
    }

    fn create(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop)
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let no_link = OFlags::NOFOLLOW.bits().cast_signed();
        OpenOptions::new().append(true).custom_flags(no_link).open(path)?.write_all(bytes)
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        fs::set_permissions(path, Permissions::from_mode(mode))
    }

    fn set_owner(&self, path: &Path, user: u32, group: u32) -> io::Result<()> {
        lchown(path, Some(user), Some(group))
    }

    fn overwrite(&self, path: &Path) -> io::Result<()> {
        let no_link = OFlags::NOFOLLOW.bits().cast_signed();
        let mut file = OpenOptions::new().write(true).custom_flags(no_link).open(path)?;
        let zeros = vec![0; ZEROS];
        let mut left = file.metadata()?.len();
        while left > 0 {
            let now = usize::try_from(left).map_or(ZEROS, |left| left.min(ZEROS));
            file.write_all(zeros.get(..now).unwrap_or(&zeros))?;
            left = left.saturating_sub(now as u64);
        }
        Ok(())
    }

    fn set_modified(&self, path: &Path, time: SystemTime) -> io::Result<()> {
        File::open(path)?.set_modified(time)
    }

    fn link(&self, file: &Path, path: &Path) -> io::Result<()> {
        fs::hard_link(file, path)
    }

    fn symlink(&self, to: &Path, path: &Path) -> io::Result<()> {
        std::os::unix::fs::symlink(to, path)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_all(&self, folder: &Path) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(folder)?)?)
    }

    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let removed = match fs::symlink_metadata(path) {
            Ok(about) if about.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// A writer that appends to a file, in large pieces, through [`FileChanges`].
pub struct FileAppender<'a> {
    files: &'a dyn FileChanges,
    path: &'a Path,
    gathered: Vec<u8>,
    left: u64,
}

impl<'a> FileAppender<'a> {
    /// A writer to an existing file; at most `most` bytes.
    pub fn new(files: &'a dyn FileChanges, path: &'a Path, most: u64) -> Self {
        Self { files, path, gathered: Vec::new(), left: most }
    }
}

impl Write for FileAppender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let more = bytes.len() as u64;
        self.left = self.left.checked_sub(more).ok_or(io::ErrorKind::StorageFull)?;
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() >= GATHERED {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.gathered.is_empty() {
            self.files.append(self.path, &self.gathered)?;
            self.gathered.clear();
        }
        Ok(())
    }
}

/// Creates a directory that all users may enter, with its missing parents. Returns the new directories, the outermost
/// first; their names are not synced.
///
/// # Errors
/// As [`FileChanges::create_dir`].
pub fn make_dirs(files: &dyn FileChanges, folder: &Path) -> io::Result<Vec<PathBuf>> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut made = match folder.parent() {
        Some(parent) => make_dirs(files, parent)?,
        None => Vec::new(),
    };
    match files.create_dir(folder) {
        // Another process was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
        created => {
            created?;
            files.set_mode(folder, 0o755)?;
            made.push(folder.to_owned());
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_made_is_its_owner_s_from_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("file"), dir.path().join("folder"));
        DirectFileChanges.create(&file).unwrap();
        DirectFileChanges.create_dir(&folder).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(&folder)), (0o600, 0o700));
    }

    #[test]
    fn zeros_take_the_place_of_a_file_and_follow_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        let content = vec![7; ZEROS + 3];
        fs::write(&file, &content).unwrap();
        DirectFileChanges.symlink(&file, &link).unwrap();
        assert!(DirectFileChanges.overwrite(&link).is_err());
        assert!(DirectFileChanges.append(&link, b"x").is_err());
        assert_eq!(fs::read(&file).unwrap(), content);
        DirectFileChanges.overwrite(&file).unwrap();
        assert_eq!(fs::read(&file).unwrap(), vec![0; ZEROS + 3]);
    }
}
