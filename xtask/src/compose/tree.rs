//! A root filesystem as a sorted list of entries, merged from tars and single files. Contents stay
//! where they are until the merged tar is written, so merging hundreds of megabytes costs nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use tar::{Archive, Builder, EntryType, Header};

/// Where an entry came from, for messages and for the report.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The engine's base system.
    Base,
    /// The API wheels.
    Api,
    /// An overlay file (its path in the workspace).
    Overlay(Utf8PathBuf),
    /// Made by the compose stage itself.
    Compose,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Base => f.write_str("the base system"),
            Self::Api => f.write_str("the API wheels"),
            Self::Overlay(path) => write!(f, "{path}"),
            Self::Compose => f.write_str("the compose stage"),
        }
    }
}

/// What a regular file contains.
#[derive(Debug, Clone)]
pub enum Data {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A range of one of the merged tars.
    Span {
        /// Index into the tree's list of tars.
        tar: usize,
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// What an entry is.
#[derive(Debug, Clone)]
pub enum Node {
    /// A directory.
    Directory,
    /// A regular file.
    File(Data),
    /// A symbolic link and its target.
    Symlink(String),
    /// A second name of a file: the path of the first.
    Hardlink(String),
}

/// One entry.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Permission bits.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Modification time, seconds since 1970; `None` means the build's epoch.
    pub mtime: Option<u64>,
    /// What it is.
    pub node: Node,
    /// Extended attributes, as the tar's PAX records hold them.
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// Where it came from.
    pub origin: Origin,
}

impl Entry {
    /// A root-owned entry of the build's epoch.
    pub fn new(mode: u32, node: Node, origin: Origin) -> Self {
        Self { mode, uid: 0, gid: 0, mtime: None, node, xattrs: Vec::new(), origin }
    }

    /// Bytes of content; 0 for all but regular files.
    pub fn len(&self) -> u64 {
        match &self.node {
            Node::File(Data::Bytes(bytes)) => bytes.len() as u64,
            Node::File(Data::Span { len, .. }) => *len,
            _ => 0,
        }
    }

    /// Whether there is no content.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A root filesystem; paths have no leading slash.
#[derive(Debug, Default)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
    tars: Vec<File>,
}

impl Tree {
    /// Merges a tar over what is there.
    ///
    /// # Errors
    /// An unreadable tar; an entry that is not a file, directory or link; a path that leaves the
    /// root; a path that runs through something that is not a directory.
    pub fn add_tar(&mut self, path: &Utf8Path, origin: &Origin) -> Result<()> {
        let file = File::open(path).with_context(|| format!("opening {path}"))?;
        let reader = file.try_clone().with_context(|| format!("opening {path}"))?;
        let tar = self.tars.len();
        self.tars.push(file);
        let mut archive = Archive::new(io::BufReader::with_capacity(1 << 16, reader));
        let entries = archive.entries_with_seek().with_context(|| format!("reading {path}"))?;
        for entry in entries {
            let mut entry = entry.with_context(|| format!("reading {path}"))?;
            let name = clean(
                &String::from_utf8(entry.path_bytes().into_owned())
                    .with_context(|| format!("{path} has a name that is not UTF-8"))?,
            )
            .with_context(|| format!("merging {path}"))?;
            if name.is_empty() {
                continue;
            }
            let link = |entry: &tar::Entry<'_, _>| -> Result<String> {
                let bytes = entry.link_name_bytes().context("a link has no target")?;
                String::from_utf8(bytes.into_owned()).context("a link's target is not UTF-8")
            };
            let node = match entry.header().entry_type() {
                EntryType::Directory => Node::Directory,
                EntryType::Regular | EntryType::Continuous => Node::File(Data::Span {
                    tar,
                    offset: entry.raw_file_position(),
                    len: entry.size(),
                }),
                EntryType::Symlink => Node::Symlink(link(&entry)?),
                EntryType::Link => Node::Hardlink(clean(&link(&entry)?)?),
                // Device nodes: the kernel's devtmpfs makes them on the robot.
                EntryType::Char | EntryType::Block | EntryType::Fifo => continue,
                other => bail!("{path}: {name} is of a kind that cannot be merged: {other:?}"),
            };
            let mut xattrs = Vec::new();
            if let Some(extensions) = entry.pax_extensions()? {
                for extension in extensions {
                    let extension = extension.with_context(|| format!("reading {path}"))?;
                    let key = extension.key().unwrap_or_default();
                    if key.starts_with("SCHILY.xattr.") {
                        xattrs.push((key.to_owned(), extension.value_bytes().to_vec()));
                    }
                }
            }
            let header = entry.header();
            let merged = Entry {
                mode: header.mode()? & 0o7777,
                uid: u32::try_from(header.uid()?).context("a user id is too large")?,
                gid: u32::try_from(header.gid()?).context("a group id is too large")?,
                mtime: Some(header.mtime()?),
                node,
                xattrs,
                origin: origin.clone(),
            };
            // What is there keeps its mode: a later tar lists folders only to place files in them.
            let is_directory = |e: &Entry| matches!(e.node, Node::Directory);
            if is_directory(&merged) && self.entries.get(&name).is_some_and(is_directory) {
                continue;
            }
            self.insert(&name, merged)?;
        }
        Ok(())
    }

    /// Puts one entry in, over what may be there; missing parent directories are made (0755).
    ///
    /// # Errors
    /// A path that leaves the root, runs through a file or a link, or replaces a directory by
    /// something else.
    pub fn insert(&mut self, path: &str, entry: Entry) -> Result<()> {
        let path = clean(path)?;
        ensure!(!path.is_empty(), "an entry has no name");
        for (i, _) in path.match_indices('/') {
            let parent = path.get(..i).unwrap_or_default();
            match self.entries.get(parent).map(|e| (&e.node, &e.origin)) {
                Some((Node::Directory, _)) => {}
                Some((node, origin)) => {
                    let what = match node {
                        Node::Symlink(to) => format!("a symbolic link to {to}"),
                        _ => "not a directory".to_owned(),
                    };
                    bail!(
                        "placing /{path} from {}: /{parent} is {what} (from {origin})\n\
                         help: use the path behind the link",
                        entry.origin
                    );
                }
                None => {
                    let made = Entry::new(0o755, Node::Directory, entry.origin.clone());
                    self.entries.insert(parent.to_owned(), made);
                }
            }
        }
        if let Some(there) = self.entries.get(&path) {
            let both = matches!((&there.node, &entry.node), (Node::Directory, Node::Directory));
            if matches!(there.node, Node::Directory) && !both {
                bail!(
                    "placing /{path} from {}: a directory from {} is there already",
                    entry.origin,
                    there.origin
                );
            }
        }
        self.entries.insert(path, entry);
        Ok(())
    }

    /// A file with these bytes.
    ///
    /// # Errors
    /// As [`Tree::insert`].
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) -> Result<()> {
        let node = Node::File(Data::Bytes(bytes.into()));
        self.insert(path, Entry::new(mode, node, Origin::Compose))
    }

    /// Removes an entry and everything below it.
    pub fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.entries.retain(|name, _| name != path && !name.starts_with(&below));
    }

    /// The entry of that exact path.
    pub fn get(&self, path: &str) -> Option<&Entry> {
        self.entries.get(path)
    }

    /// All entries, sorted by path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(path, entry)| (path.as_str(), entry))
    }

    /// Follows symbolic links, as the kernel would, to the entry that a path names on the robot.
    pub fn resolve(&self, path: &str) -> Option<(String, &Entry)> {
        let mut rest: Vec<String> = parts(path).rev().map(str::to_owned).collect();
        let mut at = String::new();
        // 40 links is Linux's own limit (path_resolution(7)).
        let mut links = 0;
        while let Some(part) = rest.pop() {
            if part == ".." {
                at = at.rsplit_once('/').map_or(String::new(), |(up, _)| up.to_owned());
                continue;
            }
            let next = if at.is_empty() { part } else { format!("{at}/{part}") };
            match &self.entries.get(&next)?.node {
                Node::Symlink(target) => {
                    links += 1;
                    if links > 40 {
                        return None;
                    }
                    if target.starts_with('/') {
                        at.clear();
                    }
                    rest.extend(parts(target).rev().map(str::to_owned));
                }
                _ => at = next,
            }
        }
        self.entries.get(&at).map(|entry| (at, entry))
    }

    /// The content of the file that a path names, links followed.
    ///
    /// # Errors
    /// When there is no such file, or its tar cannot be read.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let (_, entry) = self.resolve(path).with_context(|| format!("there is no /{path}"))?;
        match &entry.node {
            Node::File(data) => self.bytes(data),
            Node::Hardlink(first) => self.read(first),
            _ => bail!("/{path} is not a file"),
        }
    }

    fn bytes(&self, data: &Data) -> Result<Vec<u8>> {
        match data {
            Data::Bytes(bytes) => Ok(bytes.clone()),
            Data::Span { tar, offset, len } => {
                let mut bytes = vec![0; usize::try_from(*len)?];
                self.tars[*tar].read_exact_at(&mut bytes, *offset).context("reading a tar")?;
                Ok(bytes)
            }
        }
    }

    /// Writes everything as one tar in sorted order.
    ///
    /// # Errors
    /// When writing fails or a hard link's first name is missing.
    pub fn write(&self, out: &mut dyn Write, epoch: u64) -> Result<()> {
        let mut builder = Builder::new(out);
        // The first name of a hard link must come first in the tar; where sorting puts the second
        // name before it, the two change places.
        let mut moved: BTreeMap<&str, &str> = BTreeMap::new();
        for (path, entry) in &self.entries {
            if let Node::Hardlink(first) = &entry.node {
                ensure!(
                    self.entries.get(first).is_some_and(|e| matches!(e.node, Node::File(_))),
                    "/{path} is a hard link to /{first}, which is not there"
                );
                if path < first {
                    moved.entry(first).or_insert(path);
                }
            }
        }
        for (path, entry) in &self.entries {
            self.write_entry(&mut builder, path, entry, epoch, &moved)
                .with_context(|| format!("writing /{path}"))?;
        }
        builder.finish().context("finishing the tar")
    }

    fn write_entry(
        &self,
        builder: &mut Builder<&mut dyn Write>,
        path: &str,
        entry: &Entry,
        epoch: u64,
        moved: &BTreeMap<&str, &str>,
    ) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(entry.uid.into());
        header.set_gid(entry.gid.into());
        header.set_mtime(entry.mtime.unwrap_or(epoch).min(epoch));
        header.set_size(0);
        if !entry.xattrs.is_empty() {
            let pairs = entry.xattrs.iter().map(|(k, v)| (k.as_str(), v.as_slice()));
            builder.append_pax_extensions(pairs)?;
        }
        match &entry.node {
            Node::Directory => {
                header.set_entry_type(EntryType::Directory);
                builder.append_data(&mut header, format!("./{path}/"), io::empty())?;
            }
            Node::Symlink(target) => {
                header.set_entry_type(EntryType::Symlink);
                builder.append_link(&mut header, format!("./{path}"), target)?;
            }
            Node::Hardlink(first) => match moved.get(first.as_str()) {
                Some(name) if *name == path => {
                    let content = &self.entries[first.as_str()].node;
                    self.write_file(builder, header, path, content)?;
                }
                other => {
                    let target = other.map_or(first.as_str(), |name| name);
                    header.set_entry_type(EntryType::Link);
                    builder.append_link(&mut header, format!("./{path}"), format!("./{target}"))?;
                }
            },
            node @ Node::File(_) => match moved.get(path) {
                Some(name) => {
                    header.set_entry_type(EntryType::Link);
                    builder.append_link(&mut header, format!("./{path}"), format!("./{name}"))?;
                }
                None => self.write_file(builder, header, path, node)?,
            },
        }
        Ok(())
    }

    fn write_file(
        &self,
        builder: &mut Builder<&mut dyn Write>,
        mut header: Header,
        path: &str,
        node: &Node,
    ) -> Result<()> {
        let Node::File(data) = node else { bail!("a hard link points at something not a file") };
        header.set_entry_type(EntryType::Regular);
        match data {
            Data::Bytes(bytes) => {
                header.set_size(bytes.len() as u64);
                builder.append_data(&mut header, format!("./{path}"), bytes.as_slice())?;
            }
            Data::Span { tar, offset, len } => {
                header.set_size(*len);
                let span = Span { file: &self.tars[*tar], at: *offset, left: *len };
                builder.append_data(&mut header, format!("./{path}"), span)?;
            }
        }
        Ok(())
    }
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

fn parts(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
}

/// A path without `./`, leading or doubled slashes.
fn clean(path: &str) -> Result<String> {
    ensure!(parts(path).all(|part| part != ".."), "the path {path} contains `..`");
    Ok(parts(path).collect::<Vec<_>>().join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(to: &str) -> Entry {
        Entry::new(0o777, Node::Symlink(to.into()), Origin::Base)
    }

    #[test]
    fn resolves_as_the_kernel_would() {
        let mut tree = Tree::default();
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
        let mut tree = Tree::default();
        tree.insert("lib", link("usr/lib")).expect("placed");
        let error = tree.file("lib/x", 0o644, "").expect_err("through a link").to_string();
        assert!(error.contains("/lib is a symbolic link to usr/lib"), "{error}");
        let error = tree.file("a/../../x", 0o644, "").expect_err("out of the root").to_string();
        assert!(error.contains("contains `..`"), "{error}");
    }

    #[test]
    fn a_hard_link_that_sorts_first_carries_the_content() {
        let mut tree = Tree::default();
        tree.file("z", 0o644, "same").expect("placed");
        let second = Entry::new(0o644, Node::Hardlink("z".into()), Origin::Base);
        tree.insert("a", second).expect("placed");
        let mut bytes = Vec::new();
        tree.write(&mut bytes, 0).expect("written");
        let mut archive = Archive::new(bytes.as_slice());
        let kinds: Vec<_> = archive
            .entries()
            .expect("a tar")
            .map(|e| e.expect("an entry").header().entry_type())
            .collect();
        assert_eq!(kinds, [EntryType::Regular, EntryType::Link]);
    }
}
