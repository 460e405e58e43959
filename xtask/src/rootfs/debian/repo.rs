//! A local archive made of fetched packages: a folder of links and an index of our own. apt reads
//! it without a signature, because every file in it was checked against the lock.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::download::LockedDeb;
use crate::exec::Tool;

/// How a package of this archive begins in apt's `--print-uris`.
pub(super) const URI_PREFIX: &str = "'copy:";

/// The line of `sources.list` that brings the archive in.
pub(super) fn source_line(repository: &Utf8Path) -> String {
    // `copy:` rather than `file:`: apt would read `file:` packages in place, and inside a user
    // namespace that place may be out of reach.
    format!("deb [trusted=yes] copy:{repository} ./\n")
}

/// The hash that a line of `--print-uris` refers to.
pub(super) fn hash_in(line: &str) -> Option<&str> {
    let uri = line.split('\'').nth(1)?;
    uri.rsplit_once('/')?.1.strip_suffix(".deb")
}

/// Writes the archive afresh.
pub(super) fn write(folder: &Utf8Path, debs: &[&LockedDeb]) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("removing {folder}"))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("creating {folder}"))?;
    let mut index = String::new();
    for deb in debs {
        let hash = &deb.file.sha256;
        let link = folder.join(format!("{hash}.deb"));
        let target = deb.file.path.canonicalize_utf8();
        let target = target.with_context(|| format!("resolving {}", deb.file.path))?;
        symlink(&target, &link).with_context(|| format!("linking {link}"))?;
        index.push_str(&stanza(&target, &format!("./{hash}.deb"), deb.file.size, hash)?);
    }
    let path = folder.join("Packages");
    fs::write(&path, index).with_context(|| format!("writing {path}"))
}

/// One stanza of an index: what the package says about itself, and where it lies.
pub(super) fn stanza(deb: &Utf8Path, filename: &str, size: u64, sha256: &str) -> Result<String> {
    let control = Tool::new("dpkg-deb").arg("--field").arg(deb).read()?;
    let control = control.trim_end();
    Ok(format!("{control}\nFilename: {filename}\nSize: {size}\nSHA256: {sha256}\n\n"))
}
