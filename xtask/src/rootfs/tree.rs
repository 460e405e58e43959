//! A root filesystem as a sorted list of entries, merged from tars and single files and written as
//! a reproducible tar: numeric owners, times clamped, hard links refer to the first name. Contents
//! are not copied until then, so merging hundreds of megabytes is cheap.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use tar::{Archive, Builder, EntryType, Header};

/// The prefix of extended attributes in PAX headers.
const XATTR: &str = "SCHILY.xattr.";

/// The origin of an entry, for messages and for the report.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryOrigin {
    /// The engine's base system.
    Base,
    /// The API wheels.
    Api,
    /// An overlay file (its path in the workspace).
    Overlay(Utf8PathBuf),
    /// Created by the compose stage itself.
    Compose,
}

impl fmt::Display for EntryOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("the base system"),
            Self::Api => f.write_str("the API wheels"),
            Self::Overlay(path) => write!(f, "{path}"),
            Self::Compose => f.write_str("the compose stage"),
        }
    }
}

/// A path in the root: relative, without `.` and doubled slashes; empty for the root itself.
/// Ordered by components, so that a directory is directly before its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootPath(String);

impl RootPath {
    /// From a path with `/`; a leading `./` or `/` is ignored.
    pub fn new(path: &str) -> Self {
        Self(path_parts(path).collect::<Vec<_>>().join("/"))
    }

    /// With `/`, relative; empty for the root itself.
    pub fn path(&self) -> &str {
        &self.0
    }

    /// Its parent directories, outermost first, without the root.
    pub fn parents(&self) -> impl Iterator<Item = &str> {
        self.0.match_indices('/').filter_map(|(i, _)| self.0.get(..i))
    }
}

impl Ord for RootPath {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.split('/').cmp(other.0.split('/'))
    }
}

impl PartialOrd for RootPath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for RootPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The place of a regular file's bytes.
#[derive(Debug, Clone)]
pub enum FileData {
    /// In memory.
    Bytes(Vec<u8>),
    /// In one of the tars that were merged.
    Span {
        /// Index into the tree's list of tars.
        source: usize,
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// In another file of this length in bytes, which must exist until the tree is written.
    Path(Utf8PathBuf, u64),
}

impl FileData {
    /// Length in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Span { len, .. } | Self::Path(_, len) => *len,
        }
    }
}

/// The kind of an entry.
#[derive(Debug, Clone)]
pub enum RootEntryKind {
    /// A directory.
    Folder,
    /// A regular file.
    File(FileData),
    /// A symbolic link with its unmodified target.
    Symlink(String),
    /// A second name of a file: the name of the first.
    Hardlink(RootPath),
    /// A device node or pipe: tar type, major, minor.
    Special(u8, u32, u32),
}

/// One entry, without its name (which is the map's key).
#[derive(Debug, Clone)]
pub struct RootEntry {
    /// Permission bits.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Modification time, seconds since 1970; `None` means the build's epoch.
    pub mtime: Option<u64>,
    /// What it is.
    pub kind: RootEntryKind,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// Its origin.
    pub origin: EntryOrigin,
}

impl RootEntry {
    /// A root-owned entry of the build's epoch.
    pub fn new(mode: u32, kind: RootEntryKind, origin: EntryOrigin) -> Self {
        Self { mode, uid: 0, gid: 0, mtime: None, kind, xattrs: Vec::new(), origin }
    }

    /// Bytes of content; 0 for all but regular files.
    pub fn size(&self) -> u64 {
        if let RootEntryKind::File(data) = &self.kind { data.size() } else { 0 }
    }
}

/// Which entries of a tar are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TarSelection {
    /// Everything, device nodes and the root's own entry too.
    All,
    /// No device nodes (the kernel's devtmpfs makes them on the robot), and no entry for the root
    /// itself.
    Contents,
}

/// A root filesystem.
#[derive(Debug, Default)]
pub struct RootTree {
    /// All paths.
    pub(super) entries: BTreeMap<RootPath, RootEntry>,
    /// The tars that contain the spans.
    sources: Vec<File>,
}

impl RootTree {
    /// The tree of a tar, unmodified.
    ///
    /// # Errors
    /// As [`RootTree::add_tar`].
    pub fn from_tar(path: &Utf8Path) -> Result<Self> {
        let mut tree = Self::default();
        tree.add_tar(path, &EntryOrigin::Base, TarSelection::All)?;
        Ok(tree)
    }

    /// A tree with only the root's own entry (0755).
    pub fn with_root(origin: EntryOrigin) -> Self {
        let mut tree = Self::default();
        tree.entries
            .insert(RootPath::new(""), RootEntry::new(0o755, RootEntryKind::Folder, origin));
        tree
    }

    /// Merges a tar over the existing entries; file contents stay in the tar.
    ///
    /// # Errors
    /// An unreadable tar; an entry of an unknown type; a path that leaves the root; a path that runs
    /// through something that is not a directory.
    pub fn add_tar(
        &mut self,
        path: &Utf8Path,
        origin: &EntryOrigin,
        take: TarSelection,
    ) -> Result<()> {
        let file = File::open(path).with_context(|| format!("opening {path}"))?;
        let reader = file.try_clone().with_context(|| format!("opening {path}"))?;
        let source = self.sources.len();
        self.sources.push(file);
        let mut archive = Archive::new(reader);
        let entries = archive.entries_with_seek().with_context(|| format!("reading {path}"))?;
        for entry in entries {
            let placed = entry
                .map_err(anyhow::Error::from)
                .and_then(|mut entry| read_entry(&mut entry, source, origin));
            let (name, entry) = placed.with_context(|| format!("reading {path}"))?;
            if take == TarSelection::Contents
                && (name.0.is_empty() || matches!(entry.kind, RootEntryKind::Special(..)))
            {
                continue;
            }
            // Existing directories keep their mode: a later tar lists directories only to add files
            // to them.
            let keeps = |there: &RootEntry| {
                matches!((&there.kind, &entry.kind), (RootEntryKind::Folder, RootEntryKind::Folder))
                    && there.origin != entry.origin
            };
            if name.0.is_empty() && matches!(entry.kind, RootEntryKind::Folder) {
                self.entries.insert(name, entry);
            } else if !self.entries.get(&name).is_some_and(keeps) {
                self.insert(name.path(), entry).with_context(|| format!("merging {path}"))?;
            }
        }
        Ok(())
    }

    /// Inserts an entry and replaces an existing one; missing parent directories are created
    /// (0755).
    ///
    /// # Errors
    /// A path that leaves the root, runs through a file or a link, or replaces a directory by
    /// something else.
    pub fn insert(&mut self, path: &str, entry: RootEntry) -> Result<()> {
        let name = check_path(path)?;
        ensure!(!name.0.is_empty(), "an entry has no name");
        for parent in name.parents() {
            let key = RootPath(parent.to_owned());
            match self.entries.get(&key).map(|e| (&e.kind, &e.origin)) {
                Some((RootEntryKind::Folder, _)) => {}
                Some((kind, origin)) => {
                    let what = match kind {
                        RootEntryKind::Symlink(to) => format!("a symbolic link to {to}"),
                        _ => "not a directory".to_owned(),
                    };
                    bail!(
                        "placing /{name} from {}: /{parent} is {what} (from {origin})\n\
                         help: use the path behind the link",
                        entry.origin
                    );
                }
                None => {
                    let made = RootEntry::new(0o755, RootEntryKind::Folder, entry.origin.clone());
                    self.entries.insert(key, made);
                }
            }
        }
        if let Some(there) = self.entries.get(&name)
            && matches!(there.kind, RootEntryKind::Folder)
            && !matches!(entry.kind, RootEntryKind::Folder)
        {
            bail!(
                "placing /{name} from {}: a directory from {} exists already",
                entry.origin,
                there.origin
            );
        }
        self.entries.insert(name, entry);
        Ok(())
    }

    /// Inserts a file with these bytes from the compose stage.
    ///
    /// # Errors
    /// As [`RootTree::insert`].
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) -> Result<()> {
        let kind = RootEntryKind::File(FileData::Bytes(bytes.into()));
        self.insert(path, RootEntry::new(mode, kind, EntryOrigin::Compose))
    }

    /// Removes an entry and everything below it.
    pub fn remove(&mut self, path: &str) {
        let gone = RootPath::new(path);
        self.entries.retain(|name, _| *name != gone && !name.parents().any(|p| p == gone.0));
    }

    /// The entry of that exact path.
    pub fn get(&self, path: &str) -> Option<&RootEntry> {
        self.entries.get(&RootPath::new(path))
    }

    /// All entries, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &RootEntry)> {
        self.entries.iter().map(|(name, entry)| (name.path(), entry))
    }

    /// Sum of the lengths of regular files, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.entries.values().map(RootEntry::size).sum()
    }

    /// Follows symbolic links, as the kernel would, to the entry that a path names on the robot.
    pub fn resolve(&self, path: &str) -> Option<(&str, &RootEntry)> {
        let mut rest: Vec<String> = path_parts(path).rev().map(str::to_owned).collect();
        let mut at = RootPath(String::new());
        // 40 links is Linux's own limit (path_resolution(7)).
        let mut links = 0;
        while let Some(part) = rest.pop() {
            if part == ".." {
                at = RootPath(at.0.rsplit_once('/').map_or(String::new(), |(up, _)| up.to_owned()));
                continue;
            }
            let next = RootPath(if at.0.is_empty() { part } else { format!("{at}/{part}") });
            match &self.entries.get(&next)?.kind {
                RootEntryKind::Symlink(target) => {
                    links += 1;
                    if links > 40 {
                        return None;
                    }
                    if target.starts_with('/') {
                        at = RootPath(String::new());
                    }
                    rest.extend(path_parts(target).rev().map(str::to_owned));
                }
                _ => at = next,
            }
        }
        self.entries.get_key_value(&at).map(|(name, entry)| (name.path(), entry))
    }

    /// The content of the file that a path names, links followed.
    ///
    /// # Errors
    /// When there is no such file, or it cannot be read.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let (_, entry) = self.resolve(path).with_context(|| format!("/{path} does not exist"))?;
        match &entry.kind {
            RootEntryKind::File(data) => {
                self.content(data).with_context(|| format!("reading /{path}"))
            }
            RootEntryKind::Hardlink(first) => self.read(first.path()),
            _ => bail!("/{path} is not a file"),
        }
    }

    /// The content of the regular file of that exact path; `None` when there is no such file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn bytes(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(RootEntry { kind: RootEntryKind::File(data), .. }) = self.get(path) else {
            return Ok(None);
        };
        self.content(data).with_context(|| format!("reading /{path}")).map(Some)
    }

    fn content(&self, data: &FileData) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(usize::try_from(data.size())?);
        self.open(data)?.read_to_end(&mut bytes)?;
        let (size, found) = (data.size(), bytes.len());
        ensure!(found as u64 == size, "expected {size} bytes, found {found}");
        Ok(bytes)
    }

    fn open<'a>(&'a self, data: &'a FileData) -> Result<Box<dyn Read + 'a>> {
        Ok(match data {
            FileData::Bytes(bytes) => Box::new(bytes.as_slice()),
            FileData::Span { source, offset, len } => {
                let file =
                    self.sources.get(*source).context("a file is not in any tar of this tree")?;
                Box::new(Span { file, at: *offset, left: *len })
            }
            FileData::Path(path, len) => {
                let file = File::open(path).with_context(|| format!("opening {path}"))?;
                Box::new(file.take(*len))
            }
        })
    }

    /// Writes everything as one tar, sorted, with no time later than `epoch`.
    ///
    /// # Errors
    /// When writing fails, or a hard link's file is not in the tree.
    pub fn write(&self, epoch: u64, out: &mut dyn Write) -> Result<()> {
        let mut builder = Builder::new(out);
        let firsts = self.first_names()?;
        for (name, entry) in &self.entries {
            let file = if let RootEntryKind::Hardlink(file) = &entry.kind { file } else { name };
            let first = firsts.get(file).copied().filter(|first| *first != name);
            // All names of a file have that file's attributes.
            self.entries
                .get(file)
                .context("the file of a hard link exists")
                .and_then(|entry| self.append(&mut builder, name, entry, first, epoch))
                .with_context(|| format!("writing /{name}"))?;
        }
        builder.finish().context("finishing the tar")
    }

    /// For each file with several names, the first name in our order: it must have the content,
    /// whichever name had it in the tar.
    fn first_names(&self) -> Result<BTreeMap<&RootPath, &RootPath>> {
        let mut firsts: BTreeMap<&RootPath, &RootPath> = BTreeMap::new();
        for (name, entry) in &self.entries {
            let RootEntryKind::Hardlink(file) = &entry.kind else { continue };
            ensure!(
                self.entries.get(file).is_some_and(|e| matches!(e.kind, RootEntryKind::File(_))),
                "/{name} is a hard link to /{file}, which is not a file of this tree"
            );
            firsts.entry(file).or_insert(name.min(file));
        }
        Ok(firsts)
    }

    fn append(
        &self,
        builder: &mut Builder<&mut dyn Write>,
        name: &RootPath,
        entry: &RootEntry,
        first: Option<&RootPath>,
        epoch: u64,
    ) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(entry.uid.into());
        header.set_gid(entry.gid.into());
        header.set_mtime(entry.mtime.unwrap_or(epoch).min(epoch));
        header.set_size(0);
        if let Some(first) = first {
            header.set_entry_type(EntryType::Link);
            builder.append_link(&mut header, name.path(), first.path())?;
            return Ok(());
        }
        if !entry.xattrs.is_empty() {
            let keys: Vec<_> =
                entry.xattrs.iter().map(|(key, _)| format!("{XATTR}{key}")).collect();
            let values = entry.xattrs.iter().map(|(_, value)| value.as_slice());
            builder.append_pax_extensions(keys.iter().map(String::as_str).zip(values))?;
        }
        match &entry.kind {
            RootEntryKind::Folder => {
                header.set_entry_type(EntryType::Directory);
                let shown = if name.0.is_empty() { "." } else { name.path() };
                builder.append_data(&mut header, format!("{shown}/"), io::empty())?;
            }
            RootEntryKind::File(data) => {
                header.set_entry_type(EntryType::Regular);
                header.set_size(data.size());
                builder.append_data(&mut header, name.path(), self.open(data)?)?;
            }
            RootEntryKind::Symlink(target) => {
                header.set_entry_type(EntryType::Symlink);
                builder.append_link(&mut header, name.path(), target)?;
            }
            RootEntryKind::Special(kind, major, minor) => {
                header.set_entry_type(EntryType::new(*kind));
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                builder.append_data(&mut header, name.path(), io::empty())?;
            }
            RootEntryKind::Hardlink(file) => bail!("hard link to /{file}, which is a link"),
        }
        Ok(())
    }
}

/// Reads an entry of a tar; its content becomes a span of the source with that index.
fn read_entry(
    entry: &mut tar::Entry<'_, File>,
    source: usize,
    origin: &EntryOrigin,
) -> Result<(RootPath, RootEntry)> {
    let path = String::from_utf8(entry.path_bytes().into_owned()).context("a name is not UTF-8")?;
    let name = check_path(&path)?;
    let mut xattrs = Vec::new();
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            if let Some(key) = extension.key()?.strip_prefix(XATTR) {
                xattrs.push((key.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    xattrs.sort();
    let target = || {
        let bytes =
            entry.link_name_bytes().with_context(|| format!("the link {path} has no target"))?;
        String::from_utf8(bytes.into_owned())
            .with_context(|| format!("the target of {path} is not UTF-8"))
    };
    let header = entry.header();
    let kind = match header.entry_type() {
        EntryType::Directory => RootEntryKind::Folder,
        EntryType::Regular | EntryType::Continuous => RootEntryKind::File(FileData::Span {
            source,
            offset: entry.raw_file_position(),
            len: entry.size(),
        }),
        EntryType::Symlink => RootEntryKind::Symlink(target()?),
        EntryType::Link => RootEntryKind::Hardlink(check_path(&target()?)?),
        special @ (EntryType::Char | EntryType::Block | EntryType::Fifo) => RootEntryKind::Special(
            special.as_byte(),
            header.device_major()?.unwrap_or(0),
            header.device_minor()?.unwrap_or(0),
        ),
        other => bail!("{path} has a type that cannot be merged: {other:?}"),
    };
    let made = RootEntry {
        mode: header.mode()? & 0o7777,
        uid: u32::try_from(header.uid()?).context("a user id is too large")?,
        gid: u32::try_from(header.gid()?).context("a group id is too large")?,
        mtime: Some(header.mtime()?),
        kind,
        xattrs,
        origin: origin.clone(),
    };
    Ok((name, made))
}

/// A range of a file, read without moving the file's own position.
struct Span<'f> {
    file: &'f File,
    at: u64,
    left: u64,
}

impl Read for Span<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

fn path_parts(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
}

/// A name that does not leave the root.
fn check_path(path: &str) -> Result<RootPath> {
    ensure!(path_parts(path).all(|part| part != ".."), "the path {path} contains `..`");
    Ok(RootPath::new(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(to: &str) -> RootEntry {
        RootEntry::new(0o777, RootEntryKind::Symlink(to.into()), EntryOrigin::Base)
    }

    #[test]
    fn resolves_as_the_kernel_would() {
        let mut tree = RootTree::default();
        tree.file("usr/lib/systemd/systemd", 0o755, "x").expect("placed");
        tree.insert("lib", link("usr/lib")).expect("placed");
        tree.insert("usr/sbin/init", link("../../lib/systemd/systemd")).expect("placed");
        tree.insert("sbin", link("/usr/sbin")).expect("placed");
        tree.insert("loop", link("loop")).expect("placed");
        assert_eq!(tree.resolve("sbin/init").expect("found").0, "usr/lib/systemd/systemd");
        assert!(tree.resolve("loop").is_none());
        assert!(tree.resolve("sbin/nothing").is_none());
    }

    #[test]
    fn refuses_to_write_through_a_link_or_out_of_the_root() {
        let mut tree = RootTree::default();
        tree.insert("lib", link("usr/lib")).expect("placed");
        let error = tree.file("lib/x", 0o644, "").expect_err("through a link").to_string();
        assert!(error.contains("/lib is a symbolic link to usr/lib"), "{error}");
        let error = tree.file("a/../../x", 0o644, "").expect_err("out of the root").to_string();
        assert!(error.contains("contains `..`"), "{error}");
    }

    #[test]
    fn a_hard_link_that_sorts_first_carries_the_content() {
        let mut tree = RootTree::default();
        tree.file("z", 0o644, "same").expect("placed");
        let second =
            RootEntry::new(0o644, RootEntryKind::Hardlink(RootPath::new("z")), EntryOrigin::Base);
        tree.insert("a", second).expect("placed");
        let mut bytes = Vec::new();
        tree.write(0, &mut bytes).expect("written");
        let mut archive = Archive::new(bytes.as_slice());
        let kinds: Vec<_> = archive
            .entries()
            .expect("a tar")
            .map(|e| e.expect("an entry").header().entry_type())
            .collect();
        assert_eq!(kinds, [EntryType::Regular, EntryType::Link]);
    }

    #[test]
    fn a_folder_stands_right_before_what_is_in_it_and_goes_with_it() {
        let mut tree = RootTree::with_root(EntryOrigin::Base);
        for path in ["a-b", "a.d/x", "a/x/y", "ab"] {
            tree.file(path, 0o644, "").expect("placed");
        }
        let names = |tree: &RootTree| tree.iter().map(|(p, _)| p.to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&tree), ["", "a", "a/x", "a/x/y", "a-b", "a.d", "a.d/x", "ab"]);
        tree.remove("a");
        assert_eq!(names(&tree), ["", "a-b", "a.d", "a.d/x", "ab"]);
    }

    #[test]
    fn a_directory_stays_a_directory_and_keeps_its_mode_when_another_tar_lists_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = Utf8Path::from_path(dir.path()).expect("UTF-8");
        let mut later = RootTree::with_root(EntryOrigin::Api);
        later.file("d/x", 0o644, "content").expect("placed");
        let null = RootEntry::new(0o666, RootEntryKind::Special(b'3', 1, 3), EntryOrigin::Api);
        later.insert("null", null).expect("placed");
        let tar = dir.join("later.tar");
        later.write(7, &mut File::create(&tar).expect("created")).expect("written");

        let mut tree = RootTree::default();
        tree.insert("d", RootEntry::new(0o700, RootEntryKind::Folder, EntryOrigin::Base))
            .expect("placed");
        tree.add_tar(&tar, &EntryOrigin::Api, TarSelection::Contents).expect("merged");
        assert_eq!(tree.get("d").map(|e| e.mode), Some(0o700));
        assert_eq!(tree.read("d/x").expect("there"), b"content");
        assert!(tree.get("").is_none() && tree.get("null").is_none());
        let error = tree.file("d", 0o644, "").expect_err("a directory exists").to_string();
        let both = "/d from the compose stage: a directory from the base system exists already";
        assert!(error.contains(both), "{error}");

        let all = RootTree::from_tar(&tar).expect("read");
        assert!(all.get("").is_some());
        assert!(matches!(
            all.get("null").map(|e| &e.kind),
            Some(RootEntryKind::Special(b'3', 1, 3))
        ));
    }
}
