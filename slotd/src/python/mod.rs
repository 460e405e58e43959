//! Where Python finds a module: the search of `site.py` and `importlib`, redone on files alone. No Python
//! runs, no module is imported, nothing is written.
//!
//! What only running code could tell (an `import` line of a `.pth` file) is noted, not guessed.

mod archive;
mod editable;
mod site;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::refusal::{Refusal, Result};
use crate::root::Root;
use archive::Archive;

pub use site::SearchPath;

/// The interpreter whose rules count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interpreter {
    /// 3.
    pub major: u32,
    /// 11 of 3.11.
    pub minor: u32,
    /// `aarch64-linux-gnu`: part of the names of compiled modules.
    pub platform: String,
}

impl Interpreter {
    /// CPython of a version such as `3.11`, on the processor that this program runs on.
    pub fn parse(version: &str) -> Option<Self> {
        let (major, minor) = version.split_once('.')?;
        let platform = format!("{}-linux-gnu", std::env::consts::ARCH);
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()?, platform })
    }

    /// The endings of modules in the order in which `importlib` tries them: compiled ones, source, bytecode
    /// (`_get_supported_file_loaders` in `importlib/_bootstrap_external.py`; `_PyImport_DynLoadFiletab` in
    /// `Python/dynload_shlib.c`).
    fn suffixes(&self) -> [String; 5] {
        let Self { major, minor, platform } = self;
        [
            format!(".cpython-{major}{minor}-{platform}.so"),
            format!(".abi{major}.so"),
            ".so".to_owned(),
            ".py".to_owned(),
            ".pyc".to_owned(),
        ]
    }
}

/// How an entry of `sys.path` comes about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// Named as it is: `PYTHONPATH`, the standard library. Its `.pth` files mean nothing.
    Plain(PathBuf),
    /// A site folder: entries that its `.pth` files name come after it.
    Site(PathBuf),
}

/// What a module is, and where. All paths are the robot's, as Python would spell them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Module {
    /// A folder with an `__init__`.
    Package {
        /// The folder.
        folder: PathBuf,
        /// Its `__init__`.
        init: PathBuf,
    },
    /// One file.
    File {
        /// The file.
        path: PathBuf,
    },
    /// Folders without an `__init__`, which are one package together (PEP 420).
    Namespace {
        /// The folders, in the order of the path.
        folders: Vec<PathBuf>,
    },
    /// In a zip archive on the path.
    Archived {
        /// What Python calls its place: the archive's path and the path in it.
        path: PathBuf,
    },
}

/// Something that the search had to leave open or pass over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Note {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; 0 when it is the file as a whole.
    pub line: usize,
    /// What it is about.
    pub what: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.what),
            line => write!(f, "{}:{line}: {}", self.file.display(), self.what),
        }
    }
}

/// Finds a top-level module as `importlib.util.find_spec` would: the path's entries in their order, in each
/// the package before the module before the namespace; then what editable installs have declared.
///
/// # Errors
/// `misuse`: the name is no top-level module's. `io`.
pub fn find(
    root: &Root,
    python: &Interpreter,
    path: &SearchPath,
    name: &str,
) -> Result<Option<Module>> {
    if name.is_empty() || name.contains(['.', '/', '\0']) {
        let help = "this is a mistake in the agent; report it";
        return Err(Refusal::new("misuse", format!("`{name}` is no top-level module"), help));
    }
    let mut portions = Vec::new();
    for entry in &path.entries {
        match in_entry(root, python, entry, name)? {
            Some(Module::Namespace { folders }) => portions.extend(folders),
            None => {}
            found => return Ok(found),
        }
    }
    if !portions.is_empty() {
        return Ok(Some(Module::Namespace { folders: portions }));
    }
    // Editable finders stand behind the path's own (`sys.meta_path.append`).
    for (module, place) in &path.editable {
        if module == name
            && let Some(found) = editable::find(root, python, place)
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// One entry of the path: `zipimporter`, then `FileFinder.find_spec`.
fn in_entry(root: &Root, python: &Interpreter, entry: &Path, name: &str) -> Result<Option<Module>> {
    if let Some(archive) = Archive::open(root, entry)? {
        return Ok(archive.find(name));
    }
    if !is_dir(&root.path(entry)) {
        return Ok(None);
    }
    // The listing counts, not what opening a name finds: a file system may not tell cases apart.
    let names = listing(&root.path(entry))?;
    let suffixes = python.suffixes();
    let base = entry.join(name);
    let mut namespace = false;
    if names.contains(name) {
        for suffix in &suffixes {
            let init = base.join(format!("__init__{suffix}"));
            if is_file(&root.path(&init)) {
                return Ok(Some(Module::Package { folder: base, init }));
            }
        }
        namespace = is_dir(&root.path(&base));
    }
    for suffix in &suffixes {
        let file = format!("{name}{suffix}");
        let path = entry.join(&file);
        if names.contains(&file) && is_file(&root.path(&path)) {
            return Ok(Some(Module::File { path }));
        }
    }
    Ok(namespace.then(|| Module::Namespace { folders: vec![base] }))
}

/// The names in a folder; those that are not UTF-8 can be no module's. Python takes a folder that is gone or
/// closed to it for an empty one, and so does this.
fn listing(folder: &Path) -> Result<BTreeSet<String>> {
    let passed =
        [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied, io::ErrorKind::NotADirectory];
    let failed = |error| Refusal::io(format!("reading {}", folder.display()), &error);
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if passed.contains(&error.kind()) => return Ok(BTreeSet::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = BTreeSet::new();
    for entry in entries {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    Ok(names)
}

/// Whether a path leads to a file or a folder: as in Python, what cannot be looked at is neither.
fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|about| about.is_file())
}

fn is_dir(path: &Path) -> bool {
    path.metadata().is_ok_and(|about| about.is_dir())
}
