//! `sys.path` as `site.py` builds it: entries without duplicates, and the additions of `.pth` files in site
//! directories. Only lines that name a path are followed; a line that is code is reported.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use super::{Interpreter, PathEntryOrigin, SearchNote, editable};
use crate::root::RootDir;

/// The longest `.pth` file that is read; real ones have a few hundred bytes.
const MAX_PTH: u64 = 1 << 20;

/// `sys.path`, and the finders after it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SearchPath {
    /// The entries, absolute, in the order of the search.
    pub entries: Vec<PathBuf>,
    /// Modules of editable installs with their own finder: name, and directory or file.
    pub editable: Vec<(String, PathBuf)>,
    /// What could not be followed.
    pub notes: Vec<SearchNote>,
}

impl SearchPath {
    /// The path that an interpreter builds from these entries (`removeduppaths`, `addsitedir` in `Lib/site.py`).
    pub fn new(root: &RootDir, python: &Interpreter, entries: &[PathEntryOrigin]) -> Self {
        let mut path = Self::default();
        let mut known = BTreeSet::new();
        for entry in entries {
            if let PathEntryOrigin::Plain(folder) = entry {
                path.add(absolute_path(folder), &mut known);
            }
        }
        for entry in entries {
            if let PathEntryOrigin::Site(folder) = entry
                && root.path(folder).is_dir()
            {
                path.site(root, python, &absolute_path(folder), &mut known);
            }
        }
        path
    }

    fn add(&mut self, entry: PathBuf, known: &mut BTreeSet<PathBuf>) {
        if known.insert(entry.clone()) {
            self.entries.push(entry);
        }
    }

    fn note(&mut self, file: &Path, line: usize, what: impl Into<String>) {
        self.notes.push(SearchNote { file: file.to_owned(), line, what: what.into() });
    }

    fn site(
        &mut self,
        root: &RootDir,
        python: &Interpreter,
        folder: &Path,
        known: &mut BTreeSet<PathBuf>,
    ) {
        self.add(folder.to_owned(), known);
        // As in `addsitedir`: a directory that cannot be listed has no `.pth` files.
        let Ok(listing) = std::fs::read_dir(root.path(folder)) else { return };
        let names = listing.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        // Since 3.12 hidden files are skipped (CPython issue 113659).
        let hidden = (python.major, python.minor) >= (3, 12);
        let mut names: Vec<String> = names
            .filter(|name| name.ends_with(".pth") && !(hidden && name.starts_with('.')))
            .collect();
        names.sort();
        for name in names {
            self.pth(root, python, folder, &name, known);
        }
    }

    /// One `.pth` file (`addpackage`).
    fn pth(
        &mut self,
        root: &RootDir,
        python: &Interpreter,
        folder: &Path,
        name: &str,
        known: &mut BTreeSet<PathBuf>,
    ) {
        let file = folder.join(name);
        let mut bytes = Vec::new();
        // Files that cannot be opened are skipped. The kind is checked first: reading a pipe would never end.
        let opened = super::is_file(&root.path(&file)).then(|| File::open(root.path(&file)).ok());
        let Some(opened) = opened.flatten() else { return };
        match opened.take(MAX_PTH + 1).read_to_end(&mut bytes) {
            Ok(length) if length as u64 <= MAX_PTH => {}
            Ok(_) => {
                return self.note(&file, 0, format!("the file is longer than {MAX_PTH} bytes"));
            }
            Err(error) => return self.note(&file, 0, format!("the file cannot be read: {error}")),
        }
        let Ok(text) = std::str::from_utf8(&bytes) else {
            return self.note(&file, 0, "the file is not UTF-8: Python may not even start");
        };
        // A byte-order mark belongs to the first line before 3.13.
        let marked = (python.major, python.minor) >= (3, 13);
        let text = if marked { text.trim_start_matches('\u{feff}') } else { text };
        // Python's universal newlines.
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        for (number, line) in text.split('\n').enumerate() {
            let number = number + 1;
            let line = line.trim_end_matches(is_space);
            if line.starts_with('#') || line.is_empty() {
                continue;
            }
            // `rstrip` removes only trailing blanks: an `import` alone is a path.
            if line.starts_with("import ") || line.starts_with("import\t") {
                match editable::parse_mapping(root, folder, line) {
                    Some(Ok(modules)) => self.editable.extend(modules),
                    Some(Err(what)) => self.note(&file, number, what),
                    None => {
                        self.note(
                            &file,
                            number,
                            "the line is code, which is not run: what it adds to the path is unknown",
                        );
                    }
                }
                continue;
            }
            // Python skips paths that do not exist; a name with a NUL never exists.
            let entry = absolute_path(&folder.join(line));
            if !line.contains('\0') && root.path(&entry).exists() {
                self.add(entry, known);
            }
        }
    }
}

/// `str.isspace`: Unicode's white space, and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `os.path.abspath` for a process with the working directory `/`: lexical, without resolving links.
fn absolute_path(path: &Path) -> PathBuf {
    let mut result = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => {
                result.pop();
            }
            Component::RootDir => result = PathBuf::from("/"),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    result
}
