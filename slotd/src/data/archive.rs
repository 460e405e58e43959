//! Backups: a tar of zstd frames of what a robot's users have put on `data`. An archive that comes back is
//! not trusted: every name, count and length meets its bound before anything of that size is held or written,
//! and nothing leaves its folder.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::durable::is_missing;
use crate::files::Files;
use crate::refusal::{Refusal, Result};

/// Folders at the top of `data` that are no part of a backup and never come from one: the agent's own
/// memory (its floor must not fall), logs, and what belongs to the file system.
pub const OURS: [&str; 3] = ["slotd", "var", "lost+found"];

/// Within a backup's folders: trees that every installed API has links to, which no archive keeps.
const LEFT_OUT: [&str; 1] = ["apps/api/.wheels"];

/// zstd's level: a robot's processor is slow, its data mostly text.
const LEVEL: i32 = 3;

/// The largest window that is decoded: 8 MiB, that of zstd's level 19. Ours have 2 MiB.
const WINDOW_LOG: u32 = 23;

/// The most entries of an archive: as many inodes as `mke2fs` gives a file system of 2 GiB. Three versions of an
/// API with their wheels have some thirty thousand.
const MOST_ENTRIES: u64 = 1 << 17;

/// The deepest and the longest path of an entry.
const DEEPEST: usize = 64;
const LONGEST: usize = 1024;

/// The longest text of a symbolic link that ext4 takes.
const LONGEST_LINK: usize = 4095;

/// A file takes blocks of this size, and an entry at least one: for itself and its name.
const BLOCK: u64 = 4096;

/// How often what changes while it is packed is looked at again.
const LOOKS: u32 = 16;

/// Bytes that are copied at once.
const PIECE: usize = 256 << 10;

/// The most zeros after the end of an archive: tools fill their last record, 10 KiB unless told otherwise.
const MOST_AFTER: usize = 64 << 10;

/// How much an archive may hold or become. Packing and unpacking count the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes in whole blocks, one more for each entry.
    pub bytes: u64,
    /// Files, folders and links.
    pub entries: u64,
}

impl Room {
    /// As much as a backup may hold.
    pub const BACKUP: Self = Self { bytes: u64::MAX, entries: MOST_ENTRIES };

    /// As much as a backup of a file system may become: what is longer than the file system itself has holes, which an
    /// archive has not, and would fill any other one.
    ///
    /// # Errors
    /// `io`.
    pub fn backup(folder: &Path) -> Result<Self> {
        let about = rustix::fs::statvfs(folder).map_err(|error| {
            Refusal::io(format!("looking at {}", folder.display()), &error.into())
        })?;
        let whole = about.f_blocks.saturating_mul(about.f_frsize);
        // Each entry is rounded up to a block, and takes one of its own.
        Ok(Self { bytes: whole.saturating_add(MOST_ENTRIES * 2 * BLOCK), ..Self::BACKUP })
    }

    /// What is free in a file system.
    ///
    /// # Errors
    /// `io`.
    pub fn free(folder: &Path) -> Result<Self> {
        let about = rustix::fs::statvfs(folder).map_err(|error| {
            Refusal::io(format!("looking at {}", folder.display()), &error.into())
        })?;
        let bytes = about.f_bavail.saturating_mul(about.f_frsize);
        // Some file systems make inodes as they need them, and say 0.
        let entries = if about.f_files == 0 { u64::MAX } else { about.f_favail };
        Ok(Self { bytes, entries })
    }

    /// Takes the room of one more entry; `false` when there is none.
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
fn failed(doing: &str, path: &Path) -> impl Fn(io::Error) -> Refusal + use<> {
    let doing = format!("{doing} {}", path.display());
    move |error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Refusal::new(
            "no-space",
            format!("{doing}: there is no room on data"),
            "make room on data; a backup can be taken to another machine with `slotd backup`",
        ),
        _ => Refusal::io(&doing, &error),
    }
}

fn more_than_an_archive(path: &Path, why: &str) -> Refusal {
    Refusal::new(
        "no-archive",
        format!("packing {}: {why}", path.display()),
        "remove or shorten it: what could not be unpacked again is not packed",
    )
}

/// Writes `names` below `data`, with the folders that they lie in, as an archive; what is not there is left
/// out. Sockets, pipes and devices are left out, too. Returns the room that unpacking it takes.
///
/// # Errors
/// `no-archive`: it is more than `room`, or has names that [`unpack`] would refuse. `no-space`, `io`. What was
/// written is then no archive.
pub fn pack(data: &Path, names: &[PathBuf], out: impl Write, room: Room) -> Result<Room> {
    let doing = |path: &Path| failed("packing", path);
    let mut encoder = zstd::Encoder::new(out, LEVEL).map_err(doing(data))?;
    encoder.include_checksum(true).map_err(doing(data))?;
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
            return Err(more_than_an_archive(&data.join(parent), "it is no folder"));
        }
    }
    waiting.sort_unstable_by(|a, b| b.cmp(a));
    while let Some(name) = waiting.pop() {
        if LEFT_OUT.iter().any(|out| name == Path::new(out)) {
            continue;
        }
        if packer.add(&name)? == Some(true) {
            let path = data.join(&name);
            // Data are in use: it may be gone by now.
            let Some(listing) = there(fs::read_dir(&path)).map_err(doing(&path))? else { continue };
            for entry in listing {
                waiting.push(name.join(entry.map_err(doing(&path))?.file_name()));
            }
        }
    }
    let Packer { tar, left, .. } = packer;
    let encoder = tar.into_inner().map_err(doing(data))?;
    encoder.finish().and_then(|mut out| out.flush()).map_err(doing(data))?;
    Ok(Room { bytes: room.bytes - left.bytes, entries: room.entries - left.entries })
}

struct Packer<'a, W: Write> {
    tar: tar::Builder<zstd::Encoder<'static, W>>,
    data: &'a Path,
    left: Room,
}

impl<W: Write> Packer<'_, W> {
    /// Adds what has a name; `None`: nothing that belongs into an archive has it, else whether it is a folder.
    fn add(&mut self, name: &Path) -> Result<Option<bool>> {
        let path = self.data.join(name);
        let doing = failed("packing", &path);
        let Some((about, found)) = look(&path)? else { return Ok(None) };
        if name.as_os_str().len() > LONGEST || name.components().count() > DEEPEST {
            return Err(more_than_an_archive(&path, "its path is too long or too deep"));
        }
        let size = if matches!(found, Found::File(_)) { about.len() } else { 0 };
        if !self.left.take(size) {
            return Err(more_than_an_archive(&path, "it is one too many, or too large"));
        }
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&about);
        let is_folder = matches!(found, Found::Folder);
        let added = match found {
            // As long as it was: one that grows or shrinks meanwhile must not shift what follows.
            Found::File(file) => {
                let content = file.take(size).chain(io::repeat(0)).take(size);
                self.tar.append_data(&mut header, name, content)
            }
            Found::Folder => self.tar.append_data(&mut header, name, io::empty()),
            Found::Link(to) => self.tar.append_link(&mut header, name, to),
        };
        added.map_err(&doing)?;
        Ok(Some(is_folder))
    }
}

/// What belongs into an archive.
enum Found {
    File(File),
    Folder,
    Link(PathBuf),
}

/// Looks at what has a name, and opens the file itself, whatever has its name later: data are in use, and a user may
/// exchange one kind for another at any time, to keep everybody from a backup. What is exchanged all the time is left out.
fn look(path: &Path) -> Result<Option<(Metadata, Found)>> {
    let doing = failed("packing", path);
    for _ in 0..LOOKS {
        let Some(about) = there(fs::symlink_metadata(path)).map_err(&doing)? else {
            return Ok(None);
        };
        let kind = about.file_type();
        if kind.is_dir() {
            return Ok(Some((about, Found::Folder)));
        }
        if kind.is_symlink() {
            match fs::read_link(path) {
                Ok(to) => return Ok(Some((about, Found::Link(to)))),
                // No link any more.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput || is_missing(&error) => {
                }
                Err(error) => return Err(doing(error)),
            }
            continue;
        }
        if !kind.is_file() {
            return Ok(None);
        }
        let careful = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        match OpenOptions::new().read(true).custom_flags(careful).open(path) {
            Ok(file) => {
                let about = file.metadata().map_err(&doing)?;
                if about.is_file() {
                    return Ok(Some((about, Found::File(file))));
                }
            }
            // A link or a socket by now.
            Err(error)
                if [Errno::LOOP, Errno::NXIO]
                    .iter()
                    .any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) => {}
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(doing(error)),
        }
    }
    Ok(None)
}

/// `None` for what is not there. Below a link that leads to itself nothing is.
pub(super) fn there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    let loops = |error: &io::Error| error.raw_os_error() == Some(Errno::LOOP.raw_os_error());
    match found {
        Err(error) if is_missing(&error) || loops(&error) => Ok(None),
        found => found.map(Some),
    }
}

/// Everything at the top of `data` that belongs into a backup.
///
/// # Errors
/// `io`.
pub fn contents(data: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(data).map_err(failed("reading", data))? {
        let name = PathBuf::from(entry.map_err(failed("reading", data))?.file_name());
        // What begins with a dot there is a change of ours under way.
        if safe(&name).is_some() {
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

/// Unpacks an archive into an empty folder, which only root may enter and nobody uses before all of it is
/// there. At most `room` is taken. Returns when all of it would survive a power cut.
///
/// # Errors
/// `bad-archive`: it is damaged, or an entry is not one that [`pack`] makes. `no-space`. `io`.
pub fn unpack(files: &dyn Files, input: impl Read, into: &Path, room: Room) -> Result<()> {
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
    // Names that do not fit a header come in an entry of their own before it. The library's own reader
    // would hold such an entry whatever its length, and those of other formats: here none but these two is taken.
    let (mut long_name, mut long_link) = (None, None);
    for entry in archive.entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        match entry.header().entry_type() {
            tar::EntryType::GNULongName if long_name.is_none() => {
                long_name = Some(text(&mut entry, LONGEST)?);
            }
            tar::EntryType::GNULongLink if long_link.is_none() => {
                long_link = Some(text(&mut entry, LONGEST_LINK)?);
            }
            _ => unpacker.add(&mut entry, long_name.take(), long_link.take())?,
        }
    }
    if long_name.is_some() || long_link.is_some() {
        return Err(bad("it ends after a name"));
    }
    // To the checksum of what was read.
    let mut rest = Vec::new();
    decoder.take(MOST_AFTER as u64 + 1).read_to_end(&mut rest).map_err(damaged)?;
    if rest.len() > MOST_AFTER || rest.iter().any(|byte| *byte != 0) {
        return Err(bad("something follows its end"));
    }
    unpacker.close(Path::new(""))?;
    files.sync_all(into).map_err(failed("flushing", into))
}

/// The text of an entry that is a name for the next one.
fn text(entry: &mut impl Read, longest: usize) -> Result<PathBuf> {
    let mut text = Vec::new();
    // One more for the zero at its end, and one to see that it is too long.
    entry.take(longest as u64 + 2).read_to_end(&mut text).map_err(damaged)?;
    if text.last() == Some(&0) {
        text.pop();
    }
    if text.is_empty() || text.len() > longest || text.contains(&0) {
        return Err(bad(&format!("a name has not 1 to {longest} bytes")));
    }
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(&text)))
}

/// Who owns an entry, and its mode.
#[derive(Debug, Clone, Copy)]
struct Rights {
    mode: u32,
    owner: u32,
    group: u32,
}

struct Unpacker<'a> {
    files: &'a dyn Files,
    into: &'a Path,
    room: Room,
    count: u64,
    /// The folder of the entry before, which is one: nothing that was unpacked is ever replaced.
    parent: PathBuf,
    /// Folders whose content is being unpacked, each within the one before. They get their rights when it is
    /// there: one that refuses writes would refuse its own content.
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
        let shown = given.to_string_lossy().escape_debug().to_string();
        let wrong = |why: &str| bad(&format!("`{shown}` {why}"));
        let name = safe(&given).ok_or_else(|| wrong("is no path that may be written"))?;
        let size = entry.size();
        let header = entry.header();
        let kind = header.entry_type();
        let regular = kind == tar::EntryType::Regular;
        if !regular && !kind.is_dir() && !kind.is_symlink() {
            return Err(wrong("is neither a file, a folder nor a link"));
        }
        if !regular && size != 0 {
            return Err(wrong("has content, though it is no file"));
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
            io::ErrorKind::AlreadyExists => wrong("comes twice"),
            _ => failed("writing", &path)(error),
        };
        if kind.is_dir() {
            let found = there(fs::symlink_metadata(&path)).map_err(failed("reading", &path))?;
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
        let to = to.ok_or_else(|| wrong("leads nowhere"))?;
        self.files.symlink(&to, &path).map_err(twice)?;
        let Rights { owner, group, .. } = rights;
        self.files.set_owner(&path, owner, group).map_err(failed("writing", &path))
    }

    /// Counts one more entry.
    fn take(&mut self, size: u64) -> Result<()> {
        self.count += 1;
        if self.count > MOST_ENTRIES {
            return Err(bad(&format!("it has more than {MOST_ENTRIES} entries")));
        }
        if self.room.take(size) {
            return Ok(());
        }
        Err(Refusal::new(
            "no-space",
            "unpacking needs more blocks or inodes than are free on data",
            "make room on data, or leave something out of the backup",
        ))
    }

    /// Makes the folder of an entry, unless it is there. Nothing is ever written through a link.
    fn enter(&mut self, folder: &Path) -> Result<()> {
        if folder == self.parent {
            return Ok(());
        }
        let mut path = self.into.to_owned();
        for part in folder.components() {
            path.push(part);
            match there(fs::symlink_metadata(&path)).map_err(failed("reading", &path))? {
                Some(found) if found.is_dir() => {}
                Some(_) => {
                    let shown = folder.to_string_lossy().escape_debug().to_string();
                    return Err(bad(&format!("`{shown}` is no folder, and has content")));
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

    /// Gives the folders that are complete their rights: all but those that `inside` lies in.
    fn close(&mut self, inside: &Path) -> Result<()> {
        while let Some((name, rights)) = self.open.pop_if(|(name, _)| !inside.starts_with(name)) {
            self.finish(&self.into.join(name), rights)?;
        }
        Ok(())
    }

    fn finish(&self, path: &Path, rights: Rights) -> Result<()> {
        // The mode comes last: a change of the owner takes bits of it away.
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

/// A path of plain names, which does not begin with one of ours.
pub(super) fn safe(name: &Path) -> Option<PathBuf> {
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
