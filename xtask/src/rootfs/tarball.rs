//! Reads a root's tar into a sorted list of entries, and writes such a list as a reproducible tar:
//! numeric owners, times clamped, hard links turned towards the first name, attributes kept.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use tar::{EntryType, Header};

/// How PAX headers name extended attributes.
const XATTR: &str = "SCHILY.xattr.";

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File(Data),
    /// A folder.
    Folder,
    /// A symbolic link and its target, as it stands.
    Symlink(String),
    /// Another name of a file of the same tar.
    Hardlink(String),
    /// A device node or pipe: tar type, major, minor.
    Special(u8, u32, u32),
}

/// Where a file's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// In the tar that was read: offset and length in bytes.
    Span(u64, u64),
    /// Here.
    Bytes(Vec<u8>),
    /// In another file of this length.
    Path(Utf8PathBuf, u64),
}

impl Data {
    /// Length in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Span(_, size) | Self::Path(_, size) => *size,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// One path of a root, without its name (which is the map's key).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u64,
    /// Numeric group.
    pub gid: u64,
    /// Seconds since 1970.
    pub mtime: u64,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    /// Something that root owns.
    pub fn roots(kind: Kind, mode: u32, mtime: u64) -> Self {
        Self { kind, mode, uid: 0, gid: 0, mtime, xattrs: Vec::new() }
    }
}

/// A path as its components, so that a folder sorts right before what is in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Vec<String>);

impl Name {
    /// From a path with `/`; a leading `./` or `/` does not count.
    pub fn new(path: &str) -> Self {
        Self(path.split('/').filter(|p| !p.is_empty() && *p != ".").map(str::to_owned).collect())
    }

    /// With `/`, relative; empty for the root itself.
    pub fn path(&self) -> String {
        self.0.join("/")
    }
}

/// A root: the tar that its bytes are in, and its entries.
#[derive(Debug)]
pub struct Tree {
    source: File,
    /// All paths.
    pub entries: BTreeMap<Name, Entry>,
}

impl Tree {
    /// Reads a tar's headers; file contents stay where they are.
    ///
    /// # Errors
    /// When the tar is damaged, or a path is not UTF-8 or leads outside.
    pub fn read(path: &Utf8Path) -> Result<Self> {
        let source = File::open(path).with_context(|| format!("opening {path}"))?;
        let entries = read_entries(&source).with_context(|| format!("reading {path}"))?;
        Ok(Self { source, entries })
    }

    /// A tree without entries.
    ///
    /// # Errors
    /// When no temporary file can be made.
    pub fn empty() -> Result<Self> {
        let source = tempfile::tempfile().context("creating a temporary file")?;
        Ok(Self { source, entries: BTreeMap::new() })
    }

    /// The bytes of a regular file; none where there is no such file.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn bytes(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(Entry { kind: Kind::File(data), .. }) = self.entries.get(&Name::new(path)) else {
            return Ok(None);
        };
        let data = data.clone();
        let mut bytes = Vec::new();
        open(&self.source, &data)?
            .read_to_end(&mut bytes)
            .with_context(|| format!("reading {path}"))?;
        Ok(Some(bytes))
    }

    /// Adds parents that nothing made (root's, 0755).
    pub fn add_parents(&mut self, epoch: u64) {
        let names: Vec<Name> = self.entries.keys().cloned().collect();
        for Name(parts) in names {
            for end in 0..parts.len() {
                self.entries
                    .entry(Name(parts[..end].to_vec()))
                    .or_insert_with(|| Entry::roots(Kind::Folder, 0o755, epoch));
            }
        }
    }

    /// Sum of the lengths of regular files, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.entries.values().map(size_of).sum()
    }

    /// Writes everything, sorted, with no time later than `epoch`.
    ///
    /// # Errors
    /// When writing fails, or a hard link's file is not in the tree.
    pub fn write(&self, epoch: u64, out: &mut dyn Write) -> Result<()> {
        let mut builder = tar::Builder::new(out);
        for (name, entry) in &self.turned_links()? {
            let path = name.path();
            self.append(&mut builder, &path, entry, epoch)
                .with_context(|| format!("writing {path}"))?;
        }
        builder.finish().context("finishing the tar")
    }

    /// Hard links point at the first name in our order, whatever order they were read in.
    fn turned_links(&self) -> Result<BTreeMap<Name, Entry>> {
        let mut entries = self.entries.clone();
        let mut groups: HashMap<Name, Vec<Name>> = HashMap::new();
        for (name, entry) in &self.entries {
            if let Kind::Hardlink(target) = &entry.kind {
                groups.entry(Name::new(target)).or_default().push(name.clone());
            }
        }
        for (target, mut names) in groups {
            let file = self.entries.get(&target);
            let Some(file @ Entry { kind: Kind::File(_), .. }) = file else {
                bail!("{} is a hard link to {}, which is no file", names[0].path(), target.path());
            };
            names.push(target);
            names.sort();
            let (first, rest) = names.split_first().context("a link without names")?;
            entries.insert(first.clone(), file.clone());
            for name in rest {
                let link = Entry { kind: Kind::Hardlink(first.path()), ..file.clone() };
                entries.insert(name.clone(), link);
            }
        }
        Ok(entries)
    }

    fn append(
        &self,
        builder: &mut tar::Builder<&mut dyn Write>,
        path: &str,
        entry: &Entry,
        epoch: u64,
    ) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.gid);
        header.set_mtime(entry.mtime.min(epoch));
        header.set_size(0);
        if !entry.xattrs.is_empty() && !matches!(entry.kind, Kind::Hardlink(_)) {
            let named: Vec<(String, &[u8])> = entry
                .xattrs
                .iter()
                .map(|(key, value)| (format!("{XATTR}{key}"), value.as_slice()))
                .collect();
            builder.append_pax_extensions(named.iter().map(|(k, v)| (k.as_str(), *v)))?;
        }
        let shown = if path.is_empty() { "./" } else { path };
        match &entry.kind {
            Kind::File(data) => {
                header.set_entry_type(EntryType::Regular);
                header.set_size(data.size());
                builder.append_data(&mut header, shown, open(&self.source, data)?)?;
            }
            Kind::Folder => {
                header.set_entry_type(EntryType::Directory);
                let shown = format!("{}/", shown.trim_end_matches('/'));
                builder.append_data(&mut header, shown, std::io::empty())?;
            }
            Kind::Symlink(target) => {
                header.set_entry_type(EntryType::Symlink);
                builder.append_link(&mut header, shown, target)?;
            }
            Kind::Hardlink(target) => {
                header.set_entry_type(EntryType::Link);
                builder.append_link(&mut header, shown, target)?;
            }
            Kind::Special(kind, major, minor) => {
                header.set_entry_type(EntryType::new(*kind));
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                builder.append_data(&mut header, shown, std::io::empty())?;
            }
        }
        Ok(())
    }
}

/// Length of a regular file, 0 for everything else.
pub fn size_of(entry: &Entry) -> u64 {
    if let Kind::File(data) = &entry.kind { data.size() } else { 0 }
}

fn open<'a>(source: &'a File, data: &'a Data) -> Result<Box<dyn Read + 'a>> {
    Ok(match data {
        Data::Bytes(bytes) => Box::new(bytes.as_slice()),
        Data::Path(path, size) => {
            let file = File::open(path).with_context(|| format!("opening {path}"))?;
            Box::new(file.take(*size))
        }
        Data::Span(offset, size) => {
            let mut file = source;
            file.seek(SeekFrom::Start(*offset)).context("seeking in the tar")?;
            Box::new(file.take(*size))
        }
    })
}

fn read_entries(source: &File) -> Result<BTreeMap<Name, Entry>> {
    let mut entries = BTreeMap::new();
    let mut archive = tar::Archive::new(source);
    for entry in archive.entries_with_seek()? {
        let mut entry = entry?;
        let raw = entry.path_bytes().into_owned();
        let path = String::from_utf8(raw).context("a path is not UTF-8")?;
        if path.split('/').any(|part| part == "..") {
            bail!("'{path}' leads outside the root");
        }
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
        let target = match entry.link_name_bytes() {
            Some(bytes) => String::from_utf8(bytes.into_owned())
                .with_context(|| format!("the target of {path} is not UTF-8"))?,
            None => String::new(),
        };
        let header = entry.header();
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                Kind::File(Data::Span(entry.raw_file_position(), entry.size()))
            }
            EntryType::Directory => Kind::Folder,
            EntryType::Symlink => Kind::Symlink(target),
            EntryType::Link => Kind::Hardlink(Name::new(&target).path()),
            special @ (EntryType::Char | EntryType::Block | EntryType::Fifo) => Kind::Special(
                special.as_byte(),
                header.device_major()?.unwrap_or(0),
                header.device_minor()?.unwrap_or(0),
            ),
            other => bail!("{path} has the unknown type {other:?}"),
        };
        let made = Entry {
            kind,
            mode: header.mode()? & 0o7777,
            uid: header.uid()?,
            gid: header.gid()?,
            mtime: header.mtime()?,
            xattrs,
        };
        entries.insert(Name::new(&path), made);
    }
    Ok(entries)
}
