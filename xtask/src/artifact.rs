//! `Artifact`: the only value that stages pass to each other. A file, its size and its SHA-256.

use std::fs::{File, FileType};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A finished file. It is never changed once it has become an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// The path of the file.
    pub path: Utf8PathBuf,
    /// Its length in bytes (holes count).
    pub size: u64,
    /// SHA-256 of its content, lower-case hexadecimal.
    pub sha256: String,
}

impl Artifact {
    /// Hashes a finished file.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn from_file(path: impl Into<Utf8PathBuf>) -> Result<Self> {
        let path = path.into();
        let (size, sha256) = hash_file(&path)?;
        Ok(Self { path, size, sha256 })
    }
}

/// SHA-256 of some bytes, lower-case hexadecimal.
pub fn hash_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Opens a regular file or a block device for reading. Anything else of that name would block, such as a FIFO, or never end.
///
/// # Errors
/// When it is something else, or cannot be opened.
pub fn open_file(path: &Utf8Path) -> Result<File> {
    open_kind(path, |kind| kind.is_file() || kind.is_block_device())
}

/// As [`open_file`], without block devices.
///
/// # Errors
/// As [`open_file`].
pub fn open_regular(path: &Utf8Path) -> Result<File> {
    open_kind(path, FileType::is_file)
}

fn open_kind(path: &Utf8Path, wanted: impl Fn(&FileType) -> bool) -> Result<File> {
    let context = || format!("opening {path}");
    let check = |about: std::fs::Metadata| {
        let kind = about.file_type();
        let name = match kind {
            _ if wanted(&kind) => return Ok(()),
            _ if kind.is_dir() => "a directory",
            _ if kind.is_fifo() => "a FIFO",
            _ if kind.is_socket() => "a socket",
            _ if kind.is_block_device() => "a block device",
            _ => "a character device",
        };
        bail!("{path} is {name}, expected a regular file\nhelp: name a regular file")
    };
    // Before it is opened: opening a device may change it.
    let about = std::fs::metadata(path);
    let is_missing = about.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    let help = if is_missing { "\nhelp: check the path" } else { "" };
    check(about.with_context(|| context() + help)?)?;
    let no_wait = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(no_wait).open(path).with_context(context)?;
    check(file.metadata().with_context(context)?)?;
    Ok(file)
}

/// Length and SHA-256 of a file.
///
/// # Errors
/// When the file cannot be read.
pub fn hash_file(path: &Utf8Path) -> Result<(u64, String)> {
    let mut file = File::open(path).with_context(|| format!("opening {path}"))?;
    hash_reader(&mut file, |error| error, |_| Ok(())).with_context(|| format!("reading {path}"))
}

/// Reads to the end, and passes each piece to `each`. Returns the number of bytes and their SHA-256.
///
/// # Errors
/// When reading fails, as `failed` describes it; the errors of `each`.
pub fn hash_reader<E>(
    reader: &mut impl Read,
    failed: impl Fn(io::Error) -> E,
    mut each: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(u64, String), E> {
    let (mut hasher, mut buffer, mut size) = (Sha256::new(), vec![0; 1 << 18], 0);
    loop {
        match reader.read(&mut buffer).map_err(&failed)? {
            0 => return Ok((size, hex(&hasher.finalize()))),
            n => {
                hasher.update(&buffer[..n]);
                each(&buffer[..n])?;
                size += n as u64;
            }
        }
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        write!(s, "{b:02x}").expect("writing to a String cannot fail");
        s
    })
}

/// The name of a file while it is being written: the final name plus `.partial`.
pub fn partial_path(path: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{path}.partial"))
}

/// Writes a file beside its final name, syncs it, and renames it when it is complete.
///
/// # Errors
/// When writing fails; nothing is left under the final name, and the partial file is removed.
pub fn write_atomically(
    path: &Utf8Path,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    write_and_rename(path, true, write)
}

/// Like [`write_atomically`], for large files: does not wait until the bytes are on the disk. The
/// caller must flush the file before its stage is marked as finished, or discard it.
///
/// # Errors
/// As [`write_atomically`].
pub fn write_large(
    path: &Utf8Path,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    write_and_rename(path, false, write)
}

/// Waits until a finished file is on the disk.
///
/// # Errors
/// When the disk reports one.
pub fn flush_file(path: &Utf8Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).with_context(|| format!("flushing {path}"))
}

fn write_and_rename(
    path: &Utf8Path,
    sync: bool,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
    }
    let temporary = partial_path(path);
    let attempt = || -> Result<()> {
        let file = File::create(&temporary).with_context(|| format!("creating {temporary}"))?;
        let mut writer = io::BufWriter::new(file);
        write(&mut writer).with_context(|| format!("writing {temporary}"))?;
        let file = writer
            .into_inner()
            .map_err(io::IntoInnerError::into_error)
            .with_context(|| format!("writing {temporary}"))?;
        if sync {
            file.sync_all().with_context(|| format!("writing {temporary}"))?;
        }
        std::fs::rename(&temporary, path).with_context(|| format!("renaming {temporary}"))
    };
    attempt().inspect_err(|_| {
        // Best effort: the first error is the one to report.
        drop(std::fs::remove_file(&temporary));
    })
}

/// `None` for a file that does not exist: for the result of reading or removing it.
///
/// # Errors
/// Every other error.
pub fn none_if_missing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// The free space for this user, in bytes, in a directory that may not exist yet.
///
/// # Errors
/// When the filesystem cannot be queried.
pub fn free_space(dir: &Utf8Path) -> Result<u64> {
    let dir = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Utf8Path::new("."));
    let system = rustix::fs::statvfs(dir.as_std_path())
        .with_context(|| format!("querying the filesystem of {dir}"))?;
    Ok(system.f_bavail.saturating_mul(system.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_free_space_of_a_directory_to_be_made_is_known() {
        let here = free_space(Utf8Path::new("/")).expect("a filesystem");
        assert!(here > 0);
        for dir in ["/no/such/directory", "no-such-directory/x"] {
            assert!(free_space(Utf8Path::new(dir)).expect("its filesystem") > 0, "{dir}");
        }
    }
}
