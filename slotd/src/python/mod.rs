//! Finds a module as Python would: the search of `site.py` and `importlib`, reimplemented on files. Python does not
//! run, no module is imported, nothing is written.
//!
//! Results that depend on running code (an `import` line in a `.pth` file) are reported, not guessed.

mod archive;
mod editable;
mod site;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::refusal::{Refusal, Result};
use crate::root::RootDir;
use archive::ModuleArchive;

pub use site::SearchPath;

/// The interpreter whose rules apply.
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
    /// CPython with a version such as `3.11`, on the processor of this program.
    pub fn parse(version: &str) -> Option<Self> {
        let (major, minor) = version.split_once('.')?;
        let platform = format!("{}-linux-gnu", std::env::consts::ARCH);
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()?, platform })
    }

    /// The suffixes of modules in the order in which `importlib` tries them: compiled modules, source, bytecode
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

/// The origin of an entry of `sys.path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathEntryOrigin {
    /// A plain entry: `PYTHONPATH`, the standard library. Its `.pth` files are ignored.
    Plain(PathBuf),
    /// A site directory: the entries named by its `.pth` files follow it.
    Site(PathBuf),
}

/// What a module is, and where. All paths are the robot's, as Python would spell them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum PythonModule {
    /// A directory with an `__init__`.
    Package {
        /// The directory.
        folder: PathBuf,
        /// Its `__init__`.
        init: PathBuf,
    },
    /// One file.
    File {
        /// The file.
        path: PathBuf,
    },
    /// Directories without an `__init__`, which together are one package (PEP 420).
    Namespace {
        /// The directories, in the order of the path.
        folders: Vec<PathBuf>,
    },
    /// In a zip archive on the path.
    Archived {
        /// Python's name for its location: the archive's path and the path in it.
        path: PathBuf,
    },
}

/// Something that the search could not determine or had to skip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SearchNote {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; 0 for the whole file.
    pub line: usize,
    /// What was found.
    pub what: String,
}

impl fmt::Display for SearchNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.what),
            line => write!(f, "{}:{line}: {}", self.file.display(), self.what),
        }
    }
}

/// Finds a top-level module as `importlib.util.find_spec` would: the path's entries in order, in each the package
/// before the module before the namespace; then the modules of editable installs.
///
/// # Errors
/// `misuse`: not the name of a top-level module. `io`.
pub fn find(
    root: &RootDir,
    python: &Interpreter,
    path: &SearchPath,
    name: &str,
) -> Result<Option<PythonModule>> {
    if name.is_empty() || name.contains(['.', '/', '\0']) {
        let help = "this is a bug in the agent; report it";
        return Err(Refusal::new("misuse", format!("`{name}` is not a top-level module"), help));
    }
    let mut portions = Vec::new();
    for entry in &path.entries {
        match in_entry(root, python, entry, name)? {
            Some(PythonModule::Namespace { folders }) => portions.extend(folders),
            None => {}
            found => return Ok(found),
        }
    }
    if !portions.is_empty() {
        return Ok(Some(PythonModule::Namespace { folders: portions }));
    }
    // Editable finders come after the path's own finder (`sys.meta_path.append`).
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
fn in_entry(
    root: &RootDir,
    python: &Interpreter,
    entry: &Path,
    name: &str,
) -> Result<Option<PythonModule>> {
    if let Some(archive) = ModuleArchive::open(root, entry)? {
        return Ok(archive.find(name));
    }
    if !is_dir(&root.path(entry)) {
        return Ok(None);
    }
    // The listing decides, not opening the name: a file system may be case-insensitive.
    let names = list_names(&root.path(entry))?;
    let suffixes = python.suffixes();
    let base = entry.join(name);
    let mut namespace = false;
    if names.contains(name) {
        for suffix in &suffixes {
            let init = base.join(format!("__init__{suffix}"));
            if is_file(&root.path(&init)) {
                return Ok(Some(PythonModule::Package { folder: base, init }));
            }
        }
        namespace = is_dir(&root.path(&base));
    }
    for suffix in &suffixes {
        let file = format!("{name}{suffix}");
        let path = entry.join(&file);
        if names.contains(&file) && is_file(&root.path(&path)) {
            return Ok(Some(PythonModule::File { path }));
        }
    }
    Ok(namespace.then(|| PythonModule::Namespace { folders: vec![base] }))
}

/// The names in a directory; names that are not UTF-8 cannot be modules. A missing or inaccessible directory is
/// treated as empty, as in Python.
fn list_names(folder: &Path) -> Result<BTreeSet<String>> {
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

/// Whether a path is a file; as in Python, an inaccessible path is neither a file nor a directory.
fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|about| about.is_file())
}

fn is_dir(path: &Path) -> bool {
    path.metadata().is_ok_and(|about| about.is_dir())
}
