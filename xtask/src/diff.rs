//! The contents of a root filesystem, and the differences between two: packages, wheels and files.
//! Reads ext4 inside an image without mounting anything.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;
use ext4_view::{Ext4, FileType};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::artifact::hex;
pub(crate) use crate::disk::ext4_read::open_ext4;
use crate::disk::ext4_read::{read_small, remaining_length};
use crate::parallel;
use crate::progress::format_bytes;
use crate::text::printable;

/// Metadata files (dpkg's status, a wheel's METADATA) larger than this are rejected. A Debian
/// system of 2,000 packages has a status of 3 MiB.
const MOST_METADATA: u64 = 16 << 20;
/// The longest name or version of a package, in bytes.
const LONGEST_FIELD: usize = 4096;
/// The maximum number of files and directories of a filesystem. With the limits below, the worst
/// image needs less than 512 MiB of memory.
const MOST_FILES: usize = 500_000;
/// The longest path, in bytes, and the longest target of a link: Linux' `PATH_MAX`. This limit ends
/// circular directories.
const LONGEST_PATH: usize = 4096;
/// The maximum total length of all paths and targets in bytes.
const MOST_NAMES: usize = 64 << 20;
/// The maximum total size of all files, as a multiple of the filesystem's size. Huge files with few
/// blocks (holes, shared blocks) would keep the reader busy for days.
const MOST_CLAIMED: u64 = 4;

/// The contents of a root filesystem.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inventory {
    /// The distribution's installed packages: name to version.
    pub packages: BTreeMap<String, String>,
    /// Python distributions: name to version.
    pub wheels: BTreeMap<String, String>,
    /// Everything except directories, by absolute path.
    pub files: BTreeMap<String, InventoryEntry>,
}

/// One file. Bytes that are not UTF-8 in a path or target appear as replacement characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InventoryEntry {
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u16,
    /// The owner's user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Its content.
    pub content: EntryContent,
}

/// The content of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryContent {
    /// A regular file: SHA-256 of its bytes, lower-case hexadecimal.
    Sha256(String),
    /// A symbolic link: its target.
    Link(String),
    /// A device node, FIFO or socket.
    Special(String),
}

/// The added, removed and changed entries of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangeSet<T> {
    /// Only in the new filesystem.
    pub added: BTreeMap<String, T>,
    /// Only in the old filesystem.
    pub removed: BTreeMap<String, T>,
    /// In both, but different.
    pub changed: BTreeMap<String, EntryChange<T>>,
}

/// The old and the new state of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct EntryChange<T> {
    /// The old state.
    pub old: T,
    /// The new state.
    pub new: T,
}

/// What changed from one inventory to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InventoryDifference {
    /// Packages, by version.
    pub packages: ChangeSet<String>,
    /// Wheels, by version.
    pub wheels: ChangeSet<String>,
    /// Files, by mode, owner and content.
    pub files: ChangeSet<InventoryEntry>,
    /// The growth of all files together in bytes; negative when they shrank.
    pub bytes_delta: i64,
}

impl<T: Clone + PartialEq> ChangeSet<T> {
    /// Compares two lists by name.
    pub fn between(old: &BTreeMap<String, T>, new: &BTreeMap<String, T>) -> Self {
        let only = |these: &BTreeMap<String, T>, those: &BTreeMap<String, T>| {
            these
                .iter()
                .filter(|(name, _)| !those.contains_key(*name))
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect()
        };
        let changed = old
            .iter()
            .filter_map(|(name, old)| Some((name, old, new.get(name)?)))
            .filter(|(_, old, new)| old != new)
            .map(|(name, old, new)| {
                (name.clone(), EntryChange { old: old.clone(), new: new.clone() })
            })
            .collect();
        Self { added: only(new, old), removed: only(old, new), changed }
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }

    fn names(&self) -> BTreeSet<&String> {
        self.added.keys().chain(self.removed.keys()).chain(self.changed.keys()).collect()
    }
}

impl InventoryDifference {
    /// Compares two inventories.
    pub fn between(old: &Inventory, new: &Inventory) -> Self {
        let total = |of: &Inventory| of.files.values().map(|e| i128::from(e.size)).sum::<i128>();
        let delta = (total(new) - total(old)).clamp(i64::MIN.into(), i64::MAX.into());
        Self {
            packages: ChangeSet::between(&old.packages, &new.packages),
            wheels: ChangeSet::between(&old.wheels, &new.wheels),
            files: ChangeSet::between(&old.files, &new.files),
            bytes_delta: i64::try_from(delta).unwrap_or_default(),
        }
    }

    /// Whether both have the same contents.
    pub fn is_empty(&self) -> bool {
        self.packages.is_empty() && self.wheels.is_empty() && self.files.is_empty()
    }

    /// The difference as JSON: indented, sorted, with a final newline.
    ///
    /// # Errors
    /// When the value cannot be expressed in JSON.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self).context("writing the difference as JSON")?;
        Ok(text + "\n")
    }

    /// Writes the difference in human-readable form: `+` added, `-` removed, `~` changed.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn render_terminal(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.is_empty() {
            return writeln!(out, "no difference");
        }
        describe_versions("packages", &self.packages, out)?;
        describe_versions("wheels", &self.wheels, out)?;
        let files = &self.files;
        heading("files", files, &format!(", {}", signed(i128::from(self.bytes_delta))), out)?;
        for path in files.names() {
            let name = printable(path);
            if let Some(entry) = files.added.get(path) {
                writeln!(out, "  + {name}  {}", format_bytes(entry.size))?;
            } else if let Some(entry) = files.removed.get(path) {
                writeln!(out, "  - {name}  {}", format_bytes(entry.size))?;
            } else if let Some(change) = files.changed.get(path) {
                writeln!(out, "  ~ {name}  {}", what_changed(change))?;
            }
        }
        Ok(())
    }
}

fn heading<T: Clone + PartialEq>(
    name: &str,
    changes: &ChangeSet<T>,
    rest: &str,
    out: &mut dyn Write,
) -> io::Result<()> {
    if changes.is_empty() {
        return writeln!(out, "{name}: no difference");
    }
    let (added, removed) = (changes.added.len(), changes.removed.len());
    writeln!(
        out,
        "{name}: {added} added, {removed} removed, {} changed{rest}",
        changes.changed.len()
    )
}

/// Writes a list of versions in human-readable form.
///
/// # Errors
/// When `out` cannot be written.
pub(crate) fn describe_versions(
    name: &str,
    changes: &ChangeSet<String>,
    out: &mut dyn Write,
) -> io::Result<()> {
    heading(name, changes, "", out)?;
    for key in changes.names() {
        let shown = printable(key);
        if let Some(version) = changes.added.get(key) {
            writeln!(out, "  + {shown} {}", printable(version))?;
        } else if let Some(version) = changes.removed.get(key) {
            writeln!(out, "  - {shown} {}", printable(version))?;
        } else if let Some(EntryChange { old, new }) = changes.changed.get(key) {
            writeln!(out, "  ~ {shown} {} -> {}", printable(old), printable(new))?;
        }
    }
    Ok(())
}

fn signed(delta: i128) -> String {
    let size = format_bytes(u64::try_from(delta.unsigned_abs()).unwrap_or(u64::MAX));
    format!("{}{size}", if delta < 0 { '-' } else { '+' })
}

/// The differences of a file in human-readable form.
pub(crate) fn what_changed(EntryChange { old, new }: &EntryChange<InventoryEntry>) -> String {
    let mut changes = Vec::new();
    if old.mode != new.mode {
        changes.push(format!("mode {:04o} -> {:04o}", old.mode, new.mode));
    }
    if (old.uid, old.gid) != (new.uid, new.gid) {
        changes.push(format!("owner {}:{} -> {}:{}", old.uid, old.gid, new.uid, new.gid));
    }
    match (&old.content, &new.content) {
        (a, b) if a == b => {}
        (EntryContent::Sha256(_), EntryContent::Sha256(_)) => {
            let delta = i128::from(new.size) - i128::from(old.size);
            changes.push(format!("content, {}", signed(delta)));
        }
        (a, b) => changes.push(format!("{} -> {}", describe_kind(a), describe_kind(b))),
    }
    changes.join("; ")
}

fn describe_kind(content: &EntryContent) -> String {
    match content {
        EntryContent::Sha256(_) => "file".to_owned(),
        EntryContent::Link(target) => format!("link to {}", printable(target)),
        EntryContent::Special(kind) => kind.clone(),
    }
}

impl Inventory {
    /// Lists the ext4 filesystem that begins `offset` bytes into a file. Every file is hashed, on
    /// all cores.
    ///
    /// # Errors
    /// When there is no readable ext4 filesystem, or its package database is malformed.
    pub fn of_ext4(image: &Utf8Path, offset: u64) -> Result<Self> {
        let filesystem = open_ext4(image, offset)?;
        let mut found = Walk { length: remaining_length(image, offset)?, ..Walk::default() };
        found
            .folder(&filesystem, b"/".to_vec())
            .with_context(|| format!("listing the filesystem at byte {offset} of {image}"))?;
        let mut inventory = Self { files: found.files, ..Self::default() };
        for (path, hash) in hash_all(image, offset, &found.regular)? {
            if let Some(entry) = inventory.files.get_mut(&path) {
                entry.content = EntryContent::Sha256(hash);
            }
        }
        let context = || format!("in the filesystem at byte {offset} of {image}");
        inventory.read_packages(&filesystem).with_context(context)?;
        inventory.read_wheels(&filesystem).with_context(context)?;
        Ok(inventory)
    }

    fn read_packages(&mut self, filesystem: &Ext4) -> Result<()> {
        const STATUS: &str = "/var/lib/dpkg/status";
        if !self.files.contains_key(STATUS) {
            return Ok(());
        }
        let text = read_metadata(filesystem, STATUS)?;
        for paragraph in text.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
            let name = header_field(paragraph, "Package");
            let (Some(name), Some(version)) = (name, header_field(paragraph, "Version")) else {
                // dpkg keeps a paragraph without a version for packages that were never installed.
                if name.is_some() {
                    continue;
                }
                bail!("reading {STATUS}: a paragraph has no `Package` field");
            };
            if header_field(paragraph, "Status")
                .is_some_and(|status| status.ends_with(" installed"))
            {
                self.packages.insert(name.to_owned(), version.to_owned());
            }
        }
        Ok(())
    }

    fn read_wheels(&mut self, filesystem: &Ext4) -> Result<()> {
        let is_metadata = |path: &&String| {
            let mut parts = path.rsplit('/');
            parts.next() == Some("METADATA")
                && parts.next().is_some_and(|dir| dir.ends_with(".dist-info"))
                && matches!(parts.next(), Some("site-packages" | "dist-packages"))
        };
        for path in self.files.keys().filter(is_metadata) {
            let text = read_metadata(filesystem, path)?;
            // The header ends at the first empty line; a description may follow.
            let header = text.split("\n\n").next().unwrap_or_default();
            let (Some(name), Some(version)) =
                (header_field(header, "Name"), header_field(header, "Version"))
            else {
                bail!("reading {path}: expected the fields `Name` and `Version`");
            };
            self.wheels.insert(name.to_owned(), version.to_owned());
        }
        Ok(())
    }
}

fn read_metadata(filesystem: &Ext4, path: &str) -> Result<String> {
    let content = read_small(filesystem, path, MOST_METADATA)?;
    Ok(String::from_utf8_lossy(&content).replace("\r\n", "\n"))
}

/// A field of a header in the format of Debian's and Python's metadata; `None` if it is longer than
/// any real one.
fn header_field<'a>(header: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim());
    header.lines().find_map(value).filter(|value| value.len() <= LONGEST_FIELD)
}

#[derive(Default)]
struct Walk {
    files: BTreeMap<String, InventoryEntry>,
    /// The regular files: as shown, as stored.
    regular: Vec<(String, Vec<u8>)>,
    /// Bytes of the filesystem.
    length: u64,
    /// The total size of the files and directories in bytes.
    claimed: u64,
    /// Bytes of all paths and targets.
    names: usize,
    /// Files and directories.
    count: usize,
}

impl Walk {
    /// Counts a file or directory before it is used.
    fn claim(&mut self, path: &[u8], size: u64) -> Result<()> {
        let shown = || String::from_utf8_lossy(path.get(..200).unwrap_or(path)).into_owned();
        ensure!(
            path.len() <= LONGEST_PATH,
            "the path {}… has {} bytes, expected at most {LONGEST_PATH}",
            shown(),
            path.len()
        );
        ensure!(
            size <= self.length,
            "{} claims {size} bytes, but the filesystem has {}",
            shown(),
            self.length
        );
        self.claimed = self.claimed.saturating_add(size);
        self.names += path.len();
        self.count += 1;
        ensure!(
            self.claimed <= self.length.saturating_mul(MOST_CLAIMED),
            "the files up to {} claim {} bytes together, but the filesystem has {}",
            shown(),
            self.claimed,
            self.length
        );
        ensure!(
            self.count <= MOST_FILES && self.names <= MOST_NAMES,
            "the filesystem lists more than {MOST_FILES} files, or more than {MOST_NAMES} bytes of \
             names, at {}",
            shown()
        );
        Ok(())
    }

    /// Lists this directory and all below; uses a work list, so that deep directories cannot
    /// exhaust the stack.
    fn folder(&mut self, filesystem: &Ext4, path: Vec<u8>) -> Result<()> {
        let mut todo = vec![path];
        while let Some(dir) = todo.pop() {
            for entry in filesystem.read_dir(dir.as_slice())? {
                let entry = entry?;
                if matches!(entry.file_name().as_ref(), b"." | b"..") {
                    continue;
                }
                let path = entry.path();
                let stored = path.as_ref().to_vec();
                let metadata = entry.metadata()?;
                self.claim(&stored, metadata.len())?;
                let shown = String::from_utf8_lossy(&stored).into_owned();
                let content = match metadata.file_type() {
                    FileType::Directory => {
                        todo.push(stored);
                        continue;
                    }
                    FileType::Symlink => {
                        ensure!(
                            metadata.len() <= LONGEST_PATH as u64,
                            "the link {shown} claims a target of {} bytes",
                            metadata.len()
                        );
                        self.names += usize::try_from(metadata.len()).unwrap_or(LONGEST_PATH);
                        let target = filesystem.read_link(&path)?;
                        EntryContent::Link(String::from_utf8_lossy(target.as_ref()).into_owned())
                    }
                    FileType::Regular => {
                        self.regular.push((shown.clone(), stored));
                        EntryContent::Sha256(String::new())
                    }
                    FileType::BlockDevice => EntryContent::Special("block device".to_owned()),
                    FileType::CharacterDevice => {
                        EntryContent::Special("character device".to_owned())
                    }
                    FileType::Fifo => EntryContent::Special("FIFO".to_owned()),
                    FileType::Socket => EntryContent::Special("socket".to_owned()),
                };
                let found = InventoryEntry {
                    mode: metadata.mode() & 0o7777,
                    uid: metadata.uid(),
                    gid: metadata.gid(),
                    size: metadata.len(),
                    content,
                };
                self.files.insert(shown, found);
            }
        }
        Ok(())
    }
}

/// Hashes these files; each thread has its own handle, as the reader is for one thread only.
fn hash_all(
    image: &Utf8Path,
    offset: u64,
    files: &[(String, Vec<u8>)],
) -> Result<Vec<(String, String)>> {
    let open = || Ok((open_ext4(image, offset)?, vec![0; 64 * 1024]));
    parallel::map_with(files, parallel::cores(), open, |(filesystem, buffer), (shown, stored)| {
        let hash = hash_file(filesystem, stored, buffer)
            .with_context(|| format!("reading {shown} in {image}"))?;
        Ok((shown.clone(), hash))
    })
}

fn hash_file(filesystem: &Ext4, path: &[u8], buffer: &mut [u8]) -> Result<String> {
    let mut file = filesystem.open(path)?;
    let mut hasher = Sha256::new();
    loop {
        match file.read_bytes(buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}
