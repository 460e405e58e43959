//! A zip archive on Python's path, as `zipimport` reads it: only the names in its central directory.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{PythonModule, is_file};
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// The end record without its comment (APPNOTE.TXT 4.3.16), and its signature.
const END: usize = 22;
const END_SIGNATURE: [u8; 4] = *b"PK\x05\x06";
/// The longest comment: a 16-bit length.
const MAX_COMMENT: u64 = 0xffff;
/// A central directory entry without its names (4.3.12), and its signature.
const HEADER: usize = 46;
const HEADER_SIGNATURE: [u8; 4] = *b"PK\x01\x02";
/// The largest central directory that is read: about 200,000 members.
const MAX_DIRECTORY: usize = 16 << 20;

/// An archive, and the directory in it that is on the path.
pub(super) struct ModuleArchive {
    path: PathBuf,
    inside: PathBuf,
    names: BTreeSet<String>,
}

impl ModuleArchive {
    /// Opens a path entry: an archive, or a directory in one (`lib.zip/folder`). `None` when it is not an archive, or one
    /// that Python cannot read either.
    ///
    /// # Errors
    /// `io`.
    pub(super) fn open(root: &RootDir, entry: &Path) -> Result<Option<Self>> {
        // The first existing path, from the whole entry upwards (`zipimporter.__init__`).
        let mut above = entry.ancestors();
        let Some(path) = above.find(|path| root.path(path).exists()) else { return Ok(None) };
        if !is_file(&root.path(path)) {
            return Ok(None);
        }
        let failed = |error| Refusal::io(format!("reading {}", path.display()), &error);
        let file = match File::open(root.path(path)) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let size = file.metadata().map_err(failed)?.len();
        let tail = size.min(END as u64 + MAX_COMMENT);
        let mut bytes = vec![0; usize::try_from(tail).unwrap_or(0)];
        file.read_exact_at(&mut bytes, size - tail).map_err(failed)?;
        let Some((offset, length)) = find_directory(&bytes, size - tail) else { return Ok(None) };
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).map_err(failed)?;
        let names = read_names(&bytes);
        let inside = entry.strip_prefix(path).unwrap_or(Path::new("")).to_owned();
        Ok(Some(Self { path: path.to_owned(), inside, names }))
    }

    /// `zipimporter.find_spec`: bytecode before source, the package before the module, and a directory that the
    /// archive lists as a portion of a namespace. Bytecode of another interpreter, which Python would skip, is not
    /// distinguished: it is in the same place as its source.
    pub(super) fn find(&self, name: &str) -> Option<PythonModule> {
        let inside = self.inside.join(name);
        let inside = inside.to_str()?;
        for suffix in ["/__init__.pyc", "/__init__.py", ".pyc", ".py"] {
            let member = format!("{inside}{suffix}");
            if self.names.contains(&member) {
                return Some(PythonModule::Archived { path: self.path.join(member) });
            }
        }
        let listed = self.names.contains(&format!("{inside}/"));
        listed.then(|| PythonModule::Namespace { folders: vec![self.path.join(inside)] })
    }
}

fn read_number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    Some(bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte)))
}

/// The position and length of the central directory, from the file's tail, which begins at `start`.
fn find_directory(tail: &[u8], start: u64) -> Option<(u64, usize)> {
    let at = tail.windows(END).rposition(|window| window.starts_with(&END_SIGNATURE))?;
    let length = read_number(tail, at + 12, 4)?;
    // Calculated backwards from the end record: bytes before the archive shift every offset in it.
    let offset = (start + at as u64).checked_sub(length)?;
    let length = usize::try_from(length).ok().filter(|length| *length <= MAX_DIRECTORY)?;
    Some((offset, length))
}

fn read_names(mut bytes: &[u8]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    while bytes.starts_with(&HEADER_SIGNATURE) {
        let field =
            |at| read_number(bytes, at, 2).and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let (name, extra, comment) = (field(28), field(30), field(32));
        if let Some(Ok(name)) = bytes.get(HEADER..HEADER + name).map(str::from_utf8) {
            names.insert(name.to_owned());
        }
        bytes = bytes.get(HEADER + name + extra + comment..).unwrap_or(&[]);
    }
    names
}
