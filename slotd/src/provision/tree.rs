//! Trees of files as values: the tree that a package's `resources` require, the tree in a directory, and their
//! differences.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::refusal::{Refusal, Result};

/// The modes of files, and of programs and directories.
pub(super) const PLAIN: u32 = 0o644;
pub(super) const OPEN: u32 = 0o755;

/// Maximum number of entries, depth, and bytes of a tree: far beyond real packages, of which the largest so far
/// has 17 files and 1.4 MiB.
const MOST_ENTRIES: usize = 20_000;
const DEEPEST: usize = 64;
const MOST_BYTES: u64 = 1 << 30;

/// Bytes per read and comparison.
pub(super) const CHUNK: usize = 256 << 10;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ResourceKind {
    /// A directory.
    Folder { mode: u32 },
    /// A file.
    File { mode: u32, size: u64 },
    /// A symbolic link.
    Link(PathBuf),
    /// A pipe, a socket, a device.
    Other,
}

/// A tree: entries by their path, parents before their content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ResourceTree {
    pub(super) folder: PathBuf,
    pub(super) entries: BTreeMap<PathBuf, ResourceKind>,
    /// Names that were left out as junk.
    pub(super) junk: Vec<PathBuf>,
}

/// What differs at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ResourceDifference {
    /// The path below `/data/system`.
    pub path: PathBuf,
    /// How.
    pub how: DifferenceKind,
}

/// How a path differs from the package's resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DifferenceKind {
    /// The path is missing.
    Missing,
    /// The path exists, but the package does not have it.
    Superfluous,
    /// A file or link has different content.
    Content,
    /// The mode differs.
    Mode,
    /// The kind differs: a directory instead of a file.
    Kind,
}

impl DifferenceKind {
    /// Human-readable text.
    pub fn word(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Superfluous => "superfluous",
            Self::Content => "different content",
            Self::Mode => "different mode",
            Self::Kind => "different kind",
        }
    }
}

/// Files that systems and editors leave behind and that are never shipped on purpose: directory settings and
/// resource forks of macOS and Windows, compiled Python, and temporary files of editors (Vim's `.x.swp`, Emacs's
/// `#x#` and `.#x`, backups `x~`).
pub(super) fn is_junk(name: &OsStr) -> bool {
    const NAMES: [&[u8]; 6] =
        [b".DS_Store", b"__MACOSX", b"__pycache__", b"Thumbs.db", b"ehthumbs.db", b"desktop.ini"];
    let name = name.as_bytes();
    let hidden = name.strip_prefix(b".");
    let swap = |rest: &[u8]| matches!(rest, [_, .., b'.', b's', b'w', b'a'..=b'p']);
    NAMES.iter().any(|junk| name.eq_ignore_ascii_case(junk))
        || name.starts_with(b"._")
        || name.starts_with(b".#")
        || (name.len() > 2 && name.starts_with(b"#") && name.ends_with(b"#"))
        || name.ends_with(b"~")
        || [&b".pyc"[..], b".pyo"].iter().any(|end| name.ends_with(end))
        || hidden.is_some_and(swap)
}

/// Names in a directory, in order.
fn names_in(folder: &Path) -> io::Result<BTreeSet<std::ffi::OsString>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect()
}

fn bad(folder: &Path, why: impl std::fmt::Display) -> Refusal {
    Refusal::new(
        "bad-resources",
        format!("{}: {why}", folder.display()),
        "install a package whose resources are regular files; /data/system is unchanged",
    )
}

/// Reads the tree that a package's `resources` require. Junk is left out, and so are empty directories (a wheel has
/// none).
///
/// # Errors
/// `bad-resources`: an entry that no package may have. `io`.
pub(super) fn read_resources(folder: &Path) -> Result<ResourceTree> {
    let mut tree =
        ResourceTree { folder: folder.to_owned(), entries: BTreeMap::new(), junk: Vec::new() };
    let whole = fs::canonicalize(folder).map_err(|error| read_error(folder, &error))?;
    let (mut bytes, mut folders) = (0, BTreeSet::new());
    let mut waiting = vec![PathBuf::new()];
    while let Some(inside) = waiting.pop() {
        let here = folder.join(&inside);
        if inside.components().count() > DEEPEST {
            return Err(bad(
                folder,
                format_args!("directories are nested more than {DEEPEST} deep"),
            ));
        }
        for name in names_in(&here).map_err(|error| read_error(&here, &error))? {
            let path = inside.join(&name);
            if is_junk(&name) {
                tree.junk.push(path);
                continue;
            }
            let full = folder.join(&path);
            let about = fs::symlink_metadata(&full).map_err(|error| read_error(&full, &error))?;
            let kind = about.file_type();
            let item = if kind.is_dir() {
                folders.insert(path.clone());
                waiting.push(path);
                continue;
            } else if kind.is_file() {
                bytes += about.len();
                let mode = if is_program(&full, &about)? { OPEN } else { PLAIN };
                ResourceKind::File { mode, size: about.len() }
            } else if kind.is_symlink() {
                ResourceKind::Link(link(folder, &whole, &path)?)
            } else {
                let what = "is neither a file, a directory nor a link";
                return Err(bad(folder, format_args!("`{}` {what}", escape_path(&path))));
            };
            tree.entries.insert(path, item);
            if tree.entries.len() + folders.len() > MOST_ENTRIES || bytes > MOST_BYTES {
                return Err(bad(
                    folder,
                    format_args!("more than {MOST_ENTRIES} entries or {} MiB", MOST_BYTES >> 20),
                ));
            }
        }
    }
    let parents: BTreeSet<PathBuf> = tree
        .entries
        .keys()
        .flat_map(|path| path.ancestors().skip(1))
        .filter(|path| !path.as_os_str().is_empty())
        .map(Path::to_owned)
        .collect();
    tree.entries
        .extend(parents.into_iter().map(|path| (path, ResourceKind::Folder { mode: OPEN })));
    tree.junk.sort();
    // A link to a file that is left out would be broken.
    for (path, item) in &tree.entries {
        if let ResourceKind::Link(_) = item {
            let to = fs::canonicalize(folder.join(path)).map_err(|e| read_error(folder, &e))?;
            let to = to.strip_prefix(&whole).unwrap_or(&to);
            if !to.as_os_str().is_empty() && !tree.entries.contains_key(to) {
                return Err(bad(
                    folder,
                    format_args!(
                        "the link `{}` points to a file that is left out as junk",
                        escape_path(path)
                    ),
                ));
            }
        }
    }
    Ok(tree)
}

/// Checks a link's target: it must be relative and exist in the tree.
fn link(folder: &Path, whole: &Path, path: &Path) -> Result<PathBuf> {
    let full = folder.join(path);
    let to = fs::read_link(&full).map_err(|error| read_error(&full, &error))?;
    let refused = |why: &str| {
        let (path, to) = (escape_path(path), escape_path(&to));
        bad(folder, format_args!("the link `{path}` -> `{to}` {why}"))
    };
    if to.is_absolute() {
        return Err(refused("is absolute, expected a target in the tree"));
    }
    match fs::canonicalize(&full) {
        Ok(real) if real.starts_with(whole) => Ok(to),
        Ok(_) => Err(refused("points outside of the tree")),
        Err(_) => Err(refused("points to a missing file")),
    }
}

/// Whether a file must be executable: it has the mode bit, begins with `#!`, or is an ELF file.
fn is_program(path: &Path, about: &Metadata) -> Result<bool> {
    if about.permissions().mode() & 0o111 != 0 {
        return Ok(true);
    }
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(4).read_to_end(&mut head));
    read.map_err(|error| read_error(path, &error))?;
    Ok(head.starts_with(b"#!") || head == b"\x7fELF")
}

/// Reads the tree at a path, of any kind; `None` when nothing exists there.
///
/// # Errors
/// `io`.
pub(super) fn read_present(folder: &Path) -> Result<Option<ResourceTree>> {
    let mut entries = BTreeMap::new();
    match fs::symlink_metadata(folder) {
        Ok(about) => drop(entries.insert(PathBuf::new(), read_kind(folder, &about)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read_error(folder, &error)),
    }
    let top = entries.first_entry().map(|entry| entry.get().clone());
    let mut waiting = Vec::new();
    if let Some(ResourceKind::Folder { .. }) = top {
        waiting.push(PathBuf::new());
    }
    while let Some(inside) = waiting.pop() {
        let here = folder.join(&inside);
        for name in names_in(&here).map_err(|error| read_error(&here, &error))? {
            let path = inside.join(name);
            let full = folder.join(&path);
            let about = fs::symlink_metadata(&full).map_err(|error| read_error(&full, &error))?;
            if about.is_dir() {
                waiting.push(path.clone());
            }
            entries.insert(path, read_kind(&full, &about)?);
        }
    }
    Ok(Some(ResourceTree { folder: folder.to_owned(), entries, junk: Vec::new() }))
}

fn read_kind(path: &Path, about: &Metadata) -> Result<ResourceKind> {
    let mode = about.permissions().mode() & 0o7777;
    let kind = about.file_type();
    Ok(if kind.is_dir() {
        ResourceKind::Folder { mode }
    } else if kind.is_file() {
        ResourceKind::File { mode, size: about.len() }
    } else if kind.is_symlink() {
        ResourceKind::Link(fs::read_link(path).map_err(|error| read_error(path, &error))?)
    } else {
        ResourceKind::Other
    })
}

/// The differences between the wanted and the present tree, by path.
///
/// # Errors
/// `io`.
pub(super) fn compare_trees(
    wanted: &ResourceTree,
    present: Option<&ResourceTree>,
) -> Result<Vec<ResourceDifference>> {
    let nothing = BTreeMap::new();
    let found = present.map_or(&nothing, |tree| &tree.entries);
    let mut differences = Vec::new();
    let mut differs = |path: &Path, how| {
        differences.push(ResourceDifference { path: path.to_owned(), how });
    };
    let top = ResourceKind::Folder { mode: OPEN };
    let top = [(Path::new(""), &top)];
    let all = wanted.entries.iter().map(|(path, item)| (path.as_path(), item));
    for (path, want) in top.into_iter().chain(all) {
        let Some(have) = found.get(path) else {
            if !path.as_os_str().is_empty() {
                differs(path, DifferenceKind::Missing);
            }
            continue;
        };
        match (want, have) {
            (ResourceKind::Folder { mode: a }, ResourceKind::Folder { mode: b }) if a != b => {
                differs(path, DifferenceKind::Mode);
            }
            (ResourceKind::File { mode: a, size }, ResourceKind::File { mode: b, size: other }) => {
                let same = size == other
                    && match present {
                        Some(tree) => {
                            have_equal_content(&wanted.folder.join(path), &tree.folder.join(path))?
                        }
                        None => false,
                    };
                if !same {
                    differs(path, DifferenceKind::Content);
                } else if a != b {
                    differs(path, DifferenceKind::Mode);
                }
            }
            (ResourceKind::Link(a), ResourceKind::Link(b)) if a != b => {
                differs(path, DifferenceKind::Content)
            }
            (ResourceKind::Folder { .. }, ResourceKind::Folder { .. })
            | (ResourceKind::Link(_), ResourceKind::Link(_)) => {}
            _ => differs(path, DifferenceKind::Kind),
        }
    }
    for path in found.keys() {
        if !path.as_os_str().is_empty() && !wanted.entries.contains_key(path) {
            differs(path, DifferenceKind::Superfluous);
        }
    }
    differences.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(differences)
}

/// Whether two files of the same length have the same bytes.
fn have_equal_content(one: &Path, other: &Path) -> Result<bool> {
    let open = |path: &Path| File::open(path).map_err(|error| read_error(path, &error));
    let (mut a, mut b) = (open(one)?, open(other)?);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    loop {
        left.clear();
        right.clear();
        let limit = CHUNK as u64;
        let read = (&mut a).take(limit).read_to_end(&mut left);
        read.map_err(|error| read_error(one, &error))?;
        let read = (&mut b).take(limit).read_to_end(&mut right);
        read.map_err(|error| read_error(other, &error))?;
        if left != right {
            return Ok(false);
        }
        if left.is_empty() {
            return Ok(true);
        }
    }
}

pub(super) fn read_error(path: &Path, error: &io::Error) -> Refusal {
    Refusal::io(format!("reading {}", path.display()), error)
}

/// An untrusted path, escaped for display.
pub(super) fn escape_path(path: &Path) -> String {
    path.to_string_lossy().escape_debug().to_string()
}
