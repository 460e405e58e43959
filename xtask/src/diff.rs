//! What is in a root filesystem, and what changed between two of them: packages, wheels and files.
//! Reads ext4 inside an image without mounting anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use camino::Utf8Path;
use ext4_view::{Ext4, Ext4Read, FileType};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::artifact::hex;
use crate::progress::bytes;
use crate::report::printable;

/// The read-ahead window: the reader is asked for one block at a time, mostly in order.
const WINDOW: usize = 256 * 1024;

/// Metadata files (dpkg's status, a wheel's METADATA) larger than this are refused.
const MOST_METADATA: u64 = 64 << 20;

/// What a root filesystem holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inventory {
    /// The distribution's installed packages: name to version.
    pub packages: BTreeMap<String, String>,
    /// Python distributions: name to version.
    pub wheels: BTreeMap<String, String>,
    /// Everything but folders: absolute path to what lies there.
    pub files: BTreeMap<String, Entry>,
}

/// One file. Bytes that are not UTF-8 in a path or target appear as replacement characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u16,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// What it is made of.
    pub content: Content,
}

/// What a file is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// A regular file: SHA-256 of its bytes, lower-case hexadecimal.
    Sha256(String),
    /// A symbolic link: where it points.
    Link(String),
    /// A device node, FIFO or socket.
    Special(String),
}

/// What is new, gone and different in one kind of thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Changes<T> {
    /// Only in the new one.
    pub added: BTreeMap<String, T>,
    /// Only in the old one.
    pub removed: BTreeMap<String, T>,
    /// In both, but not the same.
    pub changed: BTreeMap<String, Change<T>>,
}

/// Two states of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Change<T> {
    /// What it was.
    pub old: T,
    /// What it is.
    pub new: T,
}

/// What changed from one inventory to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Difference {
    /// Packages, by version.
    pub packages: Changes<String>,
    /// Wheels, by version.
    pub wheels: Changes<String>,
    /// Files, by mode, owner and content.
    pub files: Changes<Entry>,
    /// By how many bytes the files grew together; negative when they shrank.
    pub bytes_delta: i64,
}

impl<T: Clone + PartialEq> Changes<T> {
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
            .map(|(name, old, new)| (name.clone(), Change { old: old.clone(), new: new.clone() }))
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

impl Difference {
    /// Compares two inventories.
    pub fn between(old: &Inventory, new: &Inventory) -> Self {
        let total = |of: &Inventory| of.files.values().map(|e| i128::from(e.size)).sum::<i128>();
        let delta = (total(new) - total(old)).clamp(i64::MIN.into(), i64::MAX.into());
        Self {
            packages: Changes::between(&old.packages, &new.packages),
            wheels: Changes::between(&old.wheels, &new.wheels),
            files: Changes::between(&old.files, &new.files),
            bytes_delta: i64::try_from(delta).unwrap_or_default(),
        }
    }

    /// Whether the two hold the same.
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

    /// Writes the difference for people: `+` added, `-` removed, `~` changed.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn render_terminal(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.is_empty() {
            return writeln!(out, "no difference");
        }
        versions("packages", &self.packages, out)?;
        versions("wheels", &self.wheels, out)?;
        let files = &self.files;
        heading("files", files, &format!(", {}", signed(i128::from(self.bytes_delta))), out)?;
        for path in files.names() {
            let name = printable(path);
            if let Some(entry) = files.added.get(path) {
                writeln!(out, "  + {name}  {}", bytes(entry.size))?;
            } else if let Some(entry) = files.removed.get(path) {
                writeln!(out, "  - {name}  {}", bytes(entry.size))?;
            } else if let Some(change) = files.changed.get(path) {
                writeln!(out, "  ~ {name}  {}", what_changed(change))?;
            }
        }
        Ok(())
    }
}

fn heading<T: Clone + PartialEq>(
    name: &str,
    changes: &Changes<T>,
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

/// Writes a list of versions for people.
///
/// # Errors
/// When `out` cannot be written.
pub(crate) fn versions(
    name: &str,
    changes: &Changes<String>,
    out: &mut dyn Write,
) -> io::Result<()> {
    heading(name, changes, "", out)?;
    for key in changes.names() {
        let shown = printable(key);
        if let Some(version) = changes.added.get(key) {
            writeln!(out, "  + {shown} {}", printable(version))?;
        } else if let Some(version) = changes.removed.get(key) {
            writeln!(out, "  - {shown} {}", printable(version))?;
        } else if let Some(Change { old, new }) = changes.changed.get(key) {
            writeln!(out, "  ~ {shown} {} -> {}", printable(old), printable(new))?;
        }
    }
    Ok(())
}

fn signed(delta: i128) -> String {
    let size = bytes(u64::try_from(delta.unsigned_abs()).unwrap_or(u64::MAX));
    format!("{}{size}", if delta < 0 { '-' } else { '+' })
}

/// What is different about a file, for people.
pub(crate) fn what_changed(Change { old, new }: &Change<Entry>) -> String {
    let mut said = Vec::new();
    if old.mode != new.mode {
        said.push(format!("mode {:04o} -> {:04o}", old.mode, new.mode));
    }
    if (old.uid, old.gid) != (new.uid, new.gid) {
        said.push(format!("owner {}:{} -> {}:{}", old.uid, old.gid, new.uid, new.gid));
    }
    match (&old.content, &new.content) {
        (a, b) if a == b => {}
        (Content::Sha256(_), Content::Sha256(_)) => {
            let delta = i128::from(new.size) - i128::from(old.size);
            said.push(format!("content, {}", signed(delta)));
        }
        (a, b) => said.push(format!("{} -> {}", kind(a), kind(b))),
    }
    said.join("; ")
}

fn kind(content: &Content) -> String {
    match content {
        Content::Sha256(_) => "file".to_owned(),
        Content::Link(target) => format!("link to {}", printable(target)),
        Content::Special(kind) => kind.clone(),
    }
}

/// A filesystem at an offset of a file, read through a window.
struct Slice {
    file: File,
    offset: u64,
    window: Vec<u8>,
    window_start: u64,
}

impl Ext4Read for Slice {
    fn read(
        &mut self,
        start: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let at = self.offset.checked_add(start).ok_or("an offset beyond 64 bits")?;
        if into.len() > WINDOW {
            return Ok(self.file.read_exact_at(into, at)?);
        }
        let in_window = |slice: &Self| {
            let from = usize::try_from(at.checked_sub(slice.window_start)?).ok()?;
            slice.window.get(from..from.checked_add(into.len())?).map(|_| from)
        };
        let from = match in_window(self) {
            Some(from) => from,
            None => {
                self.window.resize(WINDOW, 0);
                self.window_start = at;
                let mut filled = 0;
                while filled < into.len() {
                    match self.file.read_at(&mut self.window[filled..], at + filled as u64)? {
                        0 => return Err("the image ends within the filesystem".into()),
                        n => filled += n,
                    }
                }
                self.window.truncate(filled);
                0
            }
        };
        into.copy_from_slice(&self.window[from..from + into.len()]);
        Ok(())
    }
}

/// Opens the ext4 filesystem at a byte offset of an image, read-only.
pub(crate) fn open(image: &Utf8Path, offset: u64) -> Result<Ext4> {
    let file = File::open(image).with_context(|| format!("opening {image}"))?;
    let slice = Slice { file, offset, window: Vec::new(), window_start: 0 };
    Ext4::load(Box::new(slice))
        .with_context(|| format!("reading the ext4 filesystem at byte {offset} of {image}"))
}

impl Inventory {
    /// Lists the ext4 filesystem that begins `offset` bytes into a file. Every file is hashed, on
    /// all cores.
    ///
    /// # Errors
    /// When there is no readable ext4 filesystem, or its package database is malformed.
    pub fn of_ext4(image: &Utf8Path, offset: u64) -> Result<Self> {
        let filesystem = open(image, offset)?;
        let mut found = Walk::default();
        found
            .folder(&filesystem, b"/".to_vec())
            .with_context(|| format!("listing the filesystem at byte {offset} of {image}"))?;
        let mut inventory = Self { files: found.files, ..Self::default() };
        for (path, hash) in hash_all(image, offset, &found.regular)? {
            if let Some(entry) = inventory.files.get_mut(&path) {
                entry.content = Content::Sha256(hash);
            }
        }
        inventory.read_packages(&filesystem)?;
        inventory.read_wheels(&filesystem)?;
        Ok(inventory)
    }

    fn read_packages(&mut self, filesystem: &Ext4) -> Result<()> {
        const STATUS: &str = "/var/lib/dpkg/status";
        if !self.files.contains_key(STATUS) {
            return Ok(());
        }
        let text = metadata(filesystem, STATUS)?;
        for paragraph in text.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
            let name = field(paragraph, "Package");
            let (Some(name), Some(version)) = (name, field(paragraph, "Version")) else {
                // dpkg keeps a paragraph without a version for what was never installed.
                if name.is_some() {
                    continue;
                }
                bail!("reading {STATUS}: a paragraph has no `Package` field");
            };
            if field(paragraph, "Status").is_some_and(|status| status.ends_with(" installed")) {
                self.packages.insert(name.to_owned(), version.to_owned());
            }
        }
        Ok(())
    }

    fn read_wheels(&mut self, filesystem: &Ext4) -> Result<()> {
        let is_metadata = |path: &&String| {
            let mut parts = path.rsplit('/');
            parts.next() == Some("METADATA")
                && parts.next().is_some_and(|folder| folder.ends_with(".dist-info"))
                && matches!(parts.next(), Some("site-packages" | "dist-packages"))
        };
        for path in self.files.keys().filter(is_metadata) {
            let text = metadata(filesystem, path)?;
            // The header ends at the first empty line; a description may follow.
            let header = text.split("\n\n").next().unwrap_or_default();
            let (Some(name), Some(version)) = (field(header, "Name"), field(header, "Version"))
            else {
                bail!("reading {path}: expected the fields `Name` and `Version`");
            };
            self.wheels.insert(name.to_owned(), version.to_owned());
        }
        Ok(())
    }
}

fn metadata(filesystem: &Ext4, path: &str) -> Result<String> {
    let size = filesystem.metadata(path).with_context(|| format!("reading {path}"))?.len();
    if size > MOST_METADATA {
        bail!("reading {path}: it has {size} bytes, expected at most {MOST_METADATA}");
    }
    let content = filesystem.read(path).with_context(|| format!("reading {path}"))?;
    Ok(String::from_utf8_lossy(&content).replace("\r\n", "\n"))
}

/// A field of a header such as Debian's and Python's metadata use.
fn field<'a>(header: &'a str, name: &str) -> Option<&'a str> {
    header.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

#[derive(Default)]
struct Walk {
    files: BTreeMap<String, Entry>,
    /// The regular files: as shown, as stored.
    regular: Vec<(String, Vec<u8>)>,
}

impl Walk {
    /// Lists this folder and all below; a list of what is still to do, so that no depth of folders
    /// exhausts the stack.
    fn folder(&mut self, filesystem: &Ext4, path: Vec<u8>) -> Result<()> {
        let mut todo = vec![path];
        while let Some(folder) = todo.pop() {
            for entry in filesystem.read_dir(folder.as_slice())? {
                let entry = entry?;
                if matches!(entry.file_name().as_ref(), b"." | b"..") {
                    continue;
                }
                let path = entry.path();
                let stored = path.as_ref().to_vec();
                let metadata = entry.metadata()?;
                let shown = String::from_utf8_lossy(&stored).into_owned();
                let content = match metadata.file_type() {
                    FileType::Directory => {
                        todo.push(stored);
                        continue;
                    }
                    FileType::Symlink => {
                        let target = filesystem.read_link(&path)?;
                        Content::Link(String::from_utf8_lossy(target.as_ref()).into_owned())
                    }
                    FileType::Regular => {
                        self.regular.push((shown.clone(), stored));
                        Content::Sha256(String::new())
                    }
                    FileType::BlockDevice => Content::Special("block device".to_owned()),
                    FileType::CharacterDevice => Content::Special("character device".to_owned()),
                    FileType::Fifo => Content::Special("FIFO".to_owned()),
                    FileType::Socket => Content::Special("socket".to_owned()),
                };
                let found = Entry {
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
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(String, String)>> {
        let filesystem = open(image, offset)?;
        let mut done = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        while let Some((shown, stored)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let hash = hash(&filesystem, stored, &mut buffer)
                .with_context(|| format!("reading {shown} in {image}"))?;
            done.push((shown.clone(), hash));
        }
        Ok(done)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::with_capacity(files.len());
        for worker in workers {
            match worker.join() {
                Ok(done) => all.extend(done?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(all)
    })
}

fn hash(filesystem: &Ext4, path: &[u8], buffer: &mut [u8]) -> Result<String> {
    let mut file = filesystem.open(path)?;
    let mut hasher = Sha256::new();
    loop {
        match file.read_bytes(buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}
