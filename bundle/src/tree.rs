//! The rules for a wheel's tree in the component `api` of a bundle: which paths are allowed, and that the tar
//! archive matches its lock. The builder obeys them, `verify` checks them, and robots refuse everything else.

use std::collections::BTreeSet;

use crate::component::{ComponentWheel, LOCK_ROLE};
use crate::error::{Error, Result};
use crate::limits::{MAX_TREE_DEPTH, MAX_TREE_PATH};

/// What an entry of the tar is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeEntryKind {
    /// A directory.
    Folder,
    /// A regular file with this many bytes.
    File(u64),
    /// Anything else: a link, a device, an extension header.
    Other,
}

/// Walks over one wheel's tree, entry by entry.
#[derive(Debug)]
pub struct TreeRules<'w> {
    wheel: &'w ComponentWheel,
    /// Paths in lower case: on some file systems, two names that differ only in case are the same.
    known: BTreeSet<String>,
    files: u64,
    bytes: u64,
}

impl<'w> TreeRules<'w> {
    /// For the tree of a wheel, before its first entry.
    pub fn new(wheel: &'w ComponentWheel) -> Self {
        Self { wheel, known: BTreeSet::new(), files: 0, bytes: 0 }
    }

    /// The next entry, with its path as the tar has it.
    ///
    /// # Errors
    /// `bad-tree`: no robot accepts this entry.
    pub fn entry(&mut self, path: &str, kind: TreeEntryKind) -> Result<()> {
        let path = path.strip_suffix('/').filter(|_| kind == TreeEntryKind::Folder).unwrap_or(path);
        let escaped = path.escape_debug();
        if let Some(why) = wrong_path(path) {
            return Err(self.bad(format!("invalid path `{escaped}`: {why}")));
        }
        if !self.known.insert(path.to_lowercase()) {
            return Err(self.bad(format!(
                "`{escaped}` occurs twice (upper and lower case are not distinguished)"
            )));
        }
        match kind {
            TreeEntryKind::Folder => Ok(()),
            TreeEntryKind::Other => {
                Err(self.bad(format!("`{escaped}` is neither a file nor a directory")))
            }
            TreeEntryKind::File(size) => {
                (self.files, self.bytes) = (self.files + 1, self.bytes.saturating_add(size));
                match self.files > self.wheel.files || self.bytes > self.wheel.bytes {
                    true => Err(self.bad("more files or bytes than the lock lists".to_owned())),
                    false => Ok(()),
                }
            }
        }
    }

    /// After the last entry, with the SHA-256 of the whole tar in lower-case hexadecimal.
    ///
    /// # Errors
    /// `wrong-hash`: the tree differs from the locked one. `bad-tree`: an entry is missing.
    pub fn end(self, sha256: &str) -> Result<()> {
        if sha256 != self.wheel.tree {
            return Err(Error::WrongHash { what: format!("the tree of {}", self.wheel.name) });
        }
        match (self.files, self.bytes) == (self.wheel.files, self.wheel.bytes) {
            true => Ok(()),
            false => Err(self.bad("fewer files or bytes than the lock lists".to_owned())),
        }
    }

    fn bad(&self, reason: String) -> Error {
        let ComponentWheel { name, version, .. } = self.wheel;
        Error::BadTree { wheel: format!("{name} {version}"), reason }
    }
}

/// Why a file or directory of a tree may not have this path (relative, with `/`); `None` where it may.
pub fn wrong_path(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').collect();
    if path.len() > MAX_TREE_PATH {
        return Some(format!(
            "the path has {} bytes, at most {MAX_TREE_PATH} are allowed",
            path.len()
        ));
    }
    if parts.len() > MAX_TREE_DEPTH {
        return Some(format!(
            "the path has {} parts, at most {MAX_TREE_DEPTH} are allowed",
            parts.len()
        ));
    }
    if path.contains('\0') || parts.iter().any(|part| matches!(*part, "" | "." | "..")) {
        return Some("a part is empty, `.` or `..`, or has a NUL character".to_owned());
    }
    match parts.first() {
        // The robot keeps its own files there.
        Some(first) if first.starts_with('.') || *first == LOCK_ROLE => {
            Some(format!("the path begins with `{}`", first.escape_debug()))
        }
        _ => None,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    fn wheel() -> ComponentWheel {
        ComponentWheel {
            role: "foo".to_owned(),
            name: "foo".to_owned(),
            version: "1.0".to_owned(),
            sha256: "0".repeat(64),
            tree: "1".repeat(64),
            size: 4096,
            files: 2,
            bytes: 7,
            requires: Vec::new(),
            scripts: Vec::new(),
        }
    }

    fn walk(entries: &[(&str, TreeEntryKind)], sha256: &str) -> Result<()> {
        let wheel = wheel();
        let mut rules = TreeRules::new(&wheel);
        for (path, kind) in entries {
            rules.entry(path, *kind)?;
        }
        rules.end(sha256)
    }

    #[test]
    fn a_tree_that_is_what_its_lock_says_is_taken() {
        let deep = "d/".repeat(MAX_TREE_DEPTH - 1) + "f";
        let entries = [
            ("site/", TreeEntryKind::Folder),
            ("site/a.py", TreeEntryKind::File(3)),
            (deep.as_str(), TreeEntryKind::File(4)),
        ];
        walk(&entries, &"1".repeat(64)).unwrap();
    }

    #[test]
    fn each_rule_has_its_refusal() {
        let (deep, long) = ("d/".repeat(MAX_TREE_DEPTH) + "f", "f".repeat(MAX_TREE_PATH + 1));
        let cases: [(&[(&str, TreeEntryKind)], &str); 14] = [
            (&[(deep.as_str(), TreeEntryKind::File(1))], "33 parts, at most 32 are allowed"),
            (&[(long.as_str(), TreeEntryKind::File(1))], "513 bytes, at most 512 are allowed"),
            (
                &[("site/A.txt", TreeEntryKind::File(1)), ("site/a.txt", TreeEntryKind::File(1))],
                "occurs twice",
            ),
            (&[("site", TreeEntryKind::Folder), ("Site/", TreeEntryKind::Folder)], "occurs twice"),
            (&[("../x", TreeEntryKind::File(1))], "a part is empty"),
            (&[("/x", TreeEntryKind::File(1))], "a part is empty"),
            (&[("site//x", TreeEntryKind::File(1))], "a part is empty"),
            (&[("site/./x", TreeEntryKind::File(1))], "a part is empty"),
            (&[("site/x/", TreeEntryKind::File(1))], "a part is empty"),
            (&[(".sum", TreeEntryKind::File(1))], "begins with `.sum`"),
            (&[("component.json", TreeEntryKind::File(1))], "begins with `component.json`"),
            (&[("site/x", TreeEntryKind::Other)], "neither a file nor a directory"),
            (&[("site/x", TreeEntryKind::File(8))], "more files or bytes than the lock lists"),
            (&[("site/x", TreeEntryKind::File(7))], "fewer files or bytes than the lock lists"),
        ];
        for (entries, expected) in cases {
            let error = walk(entries, &"1".repeat(64)).unwrap_err();
            assert_eq!(error.code(), "bad-tree", "{entries:?}");
            assert!(error.to_string().contains(expected), "{expected}: {error}");
        }
        assert_eq!(walk(&[], &"2".repeat(64)).unwrap_err().code(), "wrong-hash");
    }
}
