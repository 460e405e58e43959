//! Backups: a zstd-compressed tar of the users' files on `data`. An archive to restore is not trusted: every
//! name, count and length is compared with its bound before anything of that size is held or written, and
//! nothing is written outside of its directory.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::durable::is_missing;
use crate::files::FileChanges;
use crate::refusal::{Refusal, Result};

/// Directories at the top of `data` that are neither backed up nor restored: the agent's own state (its floor
/// must not fall), logs, and the file system's own directory.
pub const OURS: [&str; 3] = ["slotd", "var", "lost+found"];

/// Left out below a backup's directories: trees that installed APIs link to; an archive does not keep links.
const LEFT_OUT: [&str; 1] = ["apps/api/.wheels"];

/// zstd level: a robot's processor is slow, and its data is mostly text.
const LEVEL: i32 = 3;

/// The largest window that is decoded: 8 MiB, as in zstd level 19. Archives of slotd have 2 MiB.
const WINDOW_LOG: u32 = 23;

/// Maximum number of entries in an archive: the number of inodes that `mke2fs` gives a file system of 2 GiB. Three
/// versions of an API with their wheels have about thirty thousand.
const MOST_ENTRIES: u64 = 1 << 17;

/// Maximum depth and length of an entry's path.
const DEEPEST: usize = 64;
const LONGEST: usize = 1024;

/// The longest target of a symbolic link in ext4.
const LONGEST_LINK: usize = 4095;

/// A file occupies blocks of this size, and an entry at least one: for itself and its name.
const BLOCK: u64 = 4096;

/// How often a path that changes while it is packed is examined again.
const LOOKS: u32 = 16;

/// Bytes per copy.
const PIECE: usize = 256 << 10;

/// Maximum number of zeros after the end of an archive: tools pad the last record, to 10 KiB by default.
const MOST_AFTER: usize = 64 << 10;

/// How much an archive may contain. Packing and unpacking count in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArchiveLimits {
    /// Bytes in whole blocks, plus one block per entry.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
}

impl ArchiveLimits {
    /// The maximum for a backup.
    pub const BACKUP: Self = Self { bytes: u64::MAX, entries: MOST_ENTRIES };

    /// The maximum for a backup of this file system. Files that are longer in total than the file system are sparse; an
    /// archive has no holes, and unpacking it would fill any file system.
    ///
    /// # Errors
    /// `io`.
    pub fn backup(folder: &Path) -> Result<Self> {
        let about = rustix::fs::statvfs(folder)
            .map_err(|error| failed("reading the size of", folder)(error.into()))?;
        let whole = about.f_blocks.saturating_mul(about.f_frsize);
        // Each entry is rounded up to a block, and occupies one more.
        Ok(Self { bytes: whole.saturating_add(MOST_ENTRIES * 2 * BLOCK), ..Self::BACKUP })
    }

    /// The free space in a file system.
    ///
    /// # Errors
    /// `io`.
    pub fn free_space(folder: &Path) -> Result<Self> {
        let about = rustix::fs::statvfs(folder)
            .map_err(|error| failed("reading the size of", folder)(error.into()))?;
        let bytes = about.f_bavail.saturating_mul(about.f_frsize);
        // Some file systems create inodes on demand and report 0.
        let entries = if about.f_files == 0 { u64::MAX } else { about.f_favail };
        Ok(Self { bytes, entries })
    }

    /// Uses the space of one more entry; `false` when there is none.
    #[must_use]
    fn take(&mut self, size: u64) -> bool {
        let cost = size.checked_next_multiple_of(BLOCK).and_then(|size| size.checked_add(BLOCK));
        let left = cost.and_then(|cost| self.bytes.checked_sub(cost));
        match (left, self.entries.checked_sub(1)) {
            (Some(bytes), Some(entries)) => {
                *self = Self { bytes, entries };
                true
            }
            _ => false,
        }
    }
}

/// An error of the file system as a refusal.
fn failed(action: &str, path: &Path) -> impl Fn(io::Error) -> Refusal + use<> {
    let action = format!("{action} {}", path.display());
    move |error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Refusal::new(
            "no-space",
            format!("{action}: no space left on data"),
            "free space on data; `slotd backup` can write a backup to another machine",
        ),
        _ => Refusal::io(&action, &error),
    }
}

fn more_than_an_archive(path: &Path, why: &str) -> Refusal {
    Refusal::new(
        "no-archive",
        format!("packing {}: {why}", path.display()),
        "remove or shorten it: files that could not be restored are not packed",
    )
}

/// Writes `names` below `data`, with their parent directories, as an archive. Missing names are left out, and
/// so are sockets, pipes and devices. Returns the space that unpacking needs.
///
/// # Errors
/// `no-archive`: the content exceeds `room`, or has names that [`unpack`] would refuse. `no-space`, `io`. The output
/// is then not a valid archive.
pub fn pack(
    data: &Path,
    names: &[PathBuf],
    out: impl Write,
    room: ArchiveLimits,
) -> Result<ArchiveLimits> {
    let to_refusal = |path: &Path| failed("packing", path);
    let mut encoder = zstd::Encoder::new(out, LEVEL).map_err(to_refusal(data))?;
    encoder.include_checksum(true).map_err(to_refusal(data))?;
    let mut packer = Packer { tar: tar::Builder::new(encoder), data, left: room };
    let mut parents: Vec<&Path> = Vec::new();
    let mut waiting: Vec<PathBuf> = names.to_vec();
    for name in names {
        parents.extend(name.ancestors().skip(1).filter(|parent| *parent != Path::new("")));
    }
    parents.sort_unstable();
    parents.dedup();
    for parent in parents {
        if packer.add(parent)?.is_some_and(|folder| !folder) {
            return Err(more_than_an_archive(&data.join(parent), "not a directory"));
        }
    }
    waiting.sort_unstable_by(|a, b| b.cmp(a));
    while let Some(name) = waiting.pop() {
        if LEFT_OUT.iter().any(|out| name == Path::new(out)) {
            continue;
        }
        if packer.add(&name)? == Some(true) {
            let path = data.join(&name);
            // Data is in use: the file may have been removed.
            let Some(listing) = none_if_missing(fs::read_dir(&path)).map_err(to_refusal(&path))?
            else {
                continue;
            };
            for entry in listing {
                waiting.push(name.join(entry.map_err(to_refusal(&path))?.file_name()));
            }
        }
    }
    let Packer { tar, left, .. } = packer;
    let encoder = tar.into_inner().map_err(to_refusal(data))?;
    encoder.finish().and_then(|mut out| out.flush()).map_err(to_refusal(data))?;
    Ok(ArchiveLimits { bytes: room.bytes - left.bytes, entries: room.entries - left.entries })
}

struct Packer<'a, W: Write> {
    tar: tar::Builder<zstd::Encoder<'static, W>>,
    data: &'a Path,
    left: ArchiveLimits,
}

impl<W: Write> Packer<'_, W> {
    /// Adds the entry with this name. `None`: it does not belong into an archive; else whether it is a directory.
    fn add(&mut self, name: &Path) -> Result<Option<bool>> {
        let path = self.data.join(name);
        let to_refusal = failed("packing", &path);
        let Some((about, found)) = examine_entry(&path)? else { return Ok(None) };
        if name.as_os_str().len() > LONGEST || name.components().count() > DEEPEST {
            return Err(more_than_an_archive(&path, "the path is too long or too deep"));
        }
        let size = if matches!(found, Found::File(_)) { about.len() } else { 0 };
        if !self.left.take(size) {
            return Err(more_than_an_archive(&path, "too many files, or too large"));
        }
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&about);
        let is_folder = matches!(found, Found::Folder);
        let added = match found {
            // With the length from the header: a file that grows or shrinks meanwhile must not shift the entries after it.
            Found::File(file) => {
                let content = file.take(size).chain(io::repeat(0)).take(size);
                self.tar.append_data(&mut header, name, content)
            }
            Found::Folder => self.tar.append_data(&mut header, name, io::empty()),
            Found::Link(to) => self.tar.append_link(&mut header, name, to),
        };
        added.map_err(&to_refusal)?;
        Ok(Some(is_folder))
    }
}

/// Kinds of entries in an archive.
enum Found {
    File(File),
    Folder,
    Link(PathBuf),
}

/// Examines the entry with this name and opens the file itself, not what has the name later: data is in use, and a user
/// may replace one kind by another at any time, to prevent a backup. An entry that changes all the time is left out.
fn examine_entry(path: &Path) -> Result<Option<(Metadata, Found)>> {
    let to_refusal = failed("packing", path);
    for _ in 0..LOOKS {
        let Some(about) = none_if_missing(fs::symlink_metadata(path)).map_err(&to_refusal)? else {
            return Ok(None);
        };
        let kind = about.file_type();
        if kind.is_dir() {
            return Ok(Some((about, Found::Folder)));
        }
        if kind.is_symlink() {
            match fs::read_link(path) {
                Ok(to) => return Ok(Some((about, Found::Link(to)))),
                // Not a link any more.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput || is_missing(&error) => {
                }
                Err(error) => return Err(to_refusal(error)),
            }
            continue;
        }
        if !kind.is_file() {
            return Ok(None);
        }
        let careful = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        match OpenOptions::new().read(true).custom_flags(careful).open(path) {
            Ok(file) => {
                let about = file.metadata().map_err(&to_refusal)?;
                if about.is_file() {
                    return Ok(Some((about, Found::File(file))));
                }
            }
            // It has become a link or a socket.
            Err(error)
                if [Errno::LOOP, Errno::NXIO]
                    .iter()
                    .any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) => {}
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(to_refusal(error)),
        }
    }
    Ok(None)
}

/// `None` for a missing file, also below a link that points to itself.
pub(super) fn none_if_missing<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    let loops = |error: &io::Error| error.raw_os_error() == Some(Errno::LOOP.raw_os_error());
    match found {
        Err(error) if is_missing(&error) || loops(&error) => Ok(None),
        found => found.map(Some),
    }
}

/// All names at the top of `data` that belong into a backup.
///
/// # Errors
/// `io`.
pub fn backup_names(data: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(data).map_err(failed("reading", data))? {
        let name = PathBuf::from(entry.map_err(failed("reading", data))?.file_name());
        // Names that begin with a dot belong to a change of slotd in progress.
        if safe_path(&name).is_some() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn bad(why: &str) -> Refusal {
    Refusal::new("bad-archive", format!("unpacking: {why}"), "use a file that `slotd backup` made")
}

fn damaged(error: io::Error) -> Refusal {
    bad(&format!("the archive is damaged: {error}"))
}

/// Unpacks an archive into an empty directory that only root may enter and that is not used before it is
/// complete. Uses at most `room`. Returns when everything would survive a power cut.
///
/// # Errors
/// `bad-archive`: the archive is damaged, or has an entry that [`pack`] does not write. `no-space`. `io`.
pub fn unpack(
    files: &dyn FileChanges,
    input: impl Read,
    into: &Path,
    room: ArchiveLimits,
) -> Result<()> {
    let mut decoder = zstd::Decoder::new(input).map_err(damaged)?;
    decoder.window_log_max(WINDOW_LOG).map_err(damaged)?;
    let mut unpacker = Unpacker {
        files,
        into,
        room,
        count: 0,
        parent: PathBuf::new(),
        open: Vec::new(),
        piece: vec![0; PIECE],
    };
    let mut archive = tar::Archive::new(&mut decoder);
    // Names that do not fit into a header are in a separate entry before it. The library's own reader would hold
    // such entries of any length, and those of other formats: here only these two kinds are accepted.
    let (mut long_name, mut long_link) = (None, None);
    for entry in archive.entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        match entry.header().entry_type() {
            tar::EntryType::GNULongName if long_name.is_none() => {
                long_name = Some(read_text(&mut entry, LONGEST)?);
            }
            tar::EntryType::GNULongLink if long_link.is_none() => {
                long_link = Some(read_text(&mut entry, LONGEST_LINK)?);
            }
            _ => unpacker.add(&mut entry, long_name.take(), long_link.take())?,
        }
    }
    if long_name.is_some() || long_link.is_some() {
        return Err(bad("the archive ends after a name"));
    }
    // Up to the checksum.
    let mut rest = Vec::new();
    decoder.take(MOST_AFTER as u64 + 1).read_to_end(&mut rest).map_err(damaged)?;
    if rest.len() > MOST_AFTER || rest.iter().any(|byte| *byte != 0) {
        return Err(bad("there are bytes after the archive's end"));
    }
    unpacker.close(Path::new(""))?;
    files.sync_all(into).map_err(failed("flushing", into))
}

/// The text of an entry that names the next one.
fn read_text(entry: &mut impl Read, longest: usize) -> Result<PathBuf> {
    let mut text = Vec::new();
    // One more byte for the zero at its end, and one to detect that it is too long.
    entry.take(longest as u64 + 2).read_to_end(&mut text).map_err(damaged)?;
    if text.last() == Some(&0) {
        text.pop();
    }
    if text.is_empty() || text.len() > longest || text.contains(&0) {
        return Err(bad(&format!("a name must be 1 to {longest} bytes long")));
    }
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(&text)))
}

/// An entry's owner and mode.
#[derive(Debug, Clone, Copy)]
struct Rights {
    mode: u32,
    owner: u32,
    group: u32,
}

struct Unpacker<'a> {
    files: &'a dyn FileChanges,
    into: &'a Path,
    room: ArchiveLimits,
    count: u64,
    /// The directory of the previous entry. It stays a directory: nothing that was unpacked is ever replaced.
    parent: PathBuf,
    /// Directories whose content is being unpacked, each within the previous one. They get their mode when their
    /// content is complete: a read-only directory would refuse it.
    open: Vec<(PathBuf, Rights)>,
    piece: Vec<u8>,
}

impl Unpacker<'_> {
    fn add<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        long_name: Option<PathBuf>,
        long_link: Option<PathBuf>,
    ) -> Result<()> {
        let given = match long_name {
            Some(name) => name,
            None => entry.path().map_err(damaged)?.into_owned(),
        };
        let escaped = given.to_string_lossy().escape_debug().to_string();
        let wrong = |why: &str| bad(&format!("`{escaped}` {why}"));
        let name = safe_path(&given).ok_or_else(|| wrong("is not a valid path"))?;
        let size = entry.size();
        let header = entry.header();
        let kind = header.entry_type();
        let regular = kind == tar::EntryType::Regular;
        if !regular && !kind.is_dir() && !kind.is_symlink() {
            return Err(wrong("is neither a file, a directory nor a link"));
        }
        if !regular && size != 0 {
            return Err(wrong("has content but is not a file"));
        }
        let id = |number: io::Result<u64>| number.ok().and_then(|n| u32::try_from(n).ok());
        let rights = Rights {
            mode: header.mode().map_err(damaged)? & 0o7777,
            owner: id(header.uid()).ok_or_else(|| wrong("has no owner"))?,
            group: id(header.gid()).ok_or_else(|| wrong("has no group"))?,
        };
        self.take(size)?;
        let parent = name.parent().unwrap_or(Path::new(""));
        self.close(parent)?;
        self.enter(parent)?;
        let path = self.into.join(&name);
        let twice = |error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists => wrong("occurs twice"),
            _ => failed("writing", &path)(error),
        };
        if kind.is_dir() {
            let found =
                none_if_missing(fs::symlink_metadata(&path)).map_err(failed("reading", &path))?;
            if !found.is_some_and(|found| found.is_dir()) {
                self.files.create_dir(&path).map_err(twice)?;
            }
            self.open.push((name, rights));
            return Ok(());
        }
        if regular {
            self.files.create(&path).map_err(twice)?;
            self.copy(entry, &path, size, &wrong)?;
            return self.finish(&path, rights);
        }
        let to = match long_link {
            Some(to) => Some(to),
            None => entry.link_name().map_err(damaged)?.map(std::borrow::Cow::into_owned),
        };
        let to = to.filter(|to| !to.as_os_str().is_empty());
        let to = to.ok_or_else(|| wrong("is a link without a target"))?;
        self.files.symlink(&to, &path).map_err(twice)?;
        let Rights { owner, group, .. } = rights;
        self.files.set_owner(&path, owner, group).map_err(failed("writing", &path))
    }

    /// Counts one more entry.
    fn take(&mut self, size: u64) -> Result<()> {
        self.count += 1;
        if self.count > MOST_ENTRIES {
            return Err(bad(&format!("more than {MOST_ENTRIES} entries")));
        }
        if self.room.take(size) {
            return Ok(());
        }
        Err(Refusal::new(
            "no-space",
            "not enough free blocks or inodes on data to unpack the backup",
            "free space on data, or use a smaller backup",
        ))
    }

    /// Creates the directory of an entry, unless it exists. Nothing is ever written through a link.
    fn enter(&mut self, folder: &Path) -> Result<()> {
        if folder == self.parent {
            return Ok(());
        }
        let mut path = self.into.to_owned();
        for part in folder.components() {
            path.push(part);
            match none_if_missing(fs::symlink_metadata(&path)).map_err(failed("reading", &path))? {
                Some(found) if found.is_dir() => {}
                Some(_) => {
                    let escaped = folder.to_string_lossy().escape_debug().to_string();
                    return Err(bad(&format!("`{escaped}` is not a directory but has content")));
                }
                None => {
                    self.take(0)?;
                    let made = self.files.create_dir(&path);
                    made.and_then(|()| self.files.set_mode(&path, 0o755))
                        .map_err(failed("creating", &path))?;
                }
            }
        }
        self.parent = folder.to_owned();
        Ok(())
    }

    /// Sets owner and mode of complete directories: all except the parents of `inside`.
    fn close(&mut self, inside: &Path) -> Result<()> {
        while let Some((name, rights)) = self.open.pop_if(|(name, _)| !inside.starts_with(name)) {
            self.finish(&self.into.join(name), rights)?;
        }
        Ok(())
    }

    fn finish(&self, path: &Path, rights: Rights) -> Result<()> {
        // The mode is set last: changing the owner clears bits of it.
        self.files
            .set_owner(path, rights.owner, rights.group)
            .and_then(|()| self.files.set_mode(path, rights.mode))
            .map_err(failed("writing", path))
    }

    fn copy(
        &mut self,
        entry: &mut impl Read,
        path: &Path,
        size: u64,
        wrong: &dyn Fn(&str) -> Refusal,
    ) -> Result<()> {
        let mut left = size;
        while left > 0 {
            let most = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
            let piece = self.piece.get_mut(..most).unwrap_or_default();
            let mut filled = 0;
            while let Some(room) = piece.get_mut(filled..).filter(|room| !room.is_empty()) {
                match entry.read(room).map_err(damaged)? {
                    0 => return Err(wrong("ends too early")),
                    read => filled += read,
                }
            }
            self.files.append(path, piece).map_err(failed("writing", path))?;
            left = left.saturating_sub(most as u64);
        }
        Ok(())
    }
}

/// A path of plain names that does not begin with one of [`OURS`].
pub(super) fn safe_path(name: &Path) -> Option<PathBuf> {
    let mut parts = Vec::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => parts.push(part),
            Component::CurDir if parts.is_empty() => {}
            _ => return None,
        }
    }
    let first = parts.first()?.to_string_lossy();
    let long = name.as_os_str().len() > LONGEST || parts.len() > DEEPEST;
    let ours = OURS.contains(&first.as_ref()) || first.starts_with('.');
    (!long && !ours).then(|| parts.iter().collect())
}
