//! A local archive made of fetched packages: a directory of links and an index of our own. apt
//! reads it without a signature, because every file in it was verified against the lock.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::download::LockedDeb;
use crate::exec::Tool;

/// The prefix of this archive's packages in apt's `--print-uris`.
pub(super) const URI_PREFIX: &str = "'copy:";

/// The line of `sources.list` for the archive.
pub(super) fn source_line(repository: &Utf8Path) -> String {
    // `copy:` rather than `file:`: apt would read `file:` packages in place, and their directory
    // may be inaccessible in a user namespace.
    format!("deb [trusted=yes] copy:{repository} ./\n")
}

/// The hash in a line of `--print-uris`.
pub(super) fn hash_in(line: &str) -> Option<&str> {
    let uri = line.split('\'').nth(1)?;
    uri.rsplit_once('/')?.1.strip_suffix(".deb")
}

/// Replaces the archive.
pub(super) fn write_archive(dir: &Utf8Path, debs: &[&LockedDeb]) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("removing {dir}"))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
    let mut index = String::new();
    for deb in debs {
        let hash = &deb.file.sha256;
        let link = dir.join(format!("{hash}.deb"));
        let target = deb.file.path.canonicalize_utf8();
        let target = target.with_context(|| format!("resolving {}", deb.file.path))?;
        symlink(&target, &link).with_context(|| format!("linking {link}"))?;
        index.push_str(&index_stanza(&target, &format!("./{hash}.deb"), deb.file.size, hash)?);
    }
    let path = dir.join("Packages");
    fs::write(&path, index).with_context(|| format!("writing {path}"))
}

/// One stanza of an index: the package's own control data, and its path.
pub(super) fn index_stanza(
    deb: &Utf8Path,
    filename: &str,
    size: u64,
    sha256: &str,
) -> Result<String> {
    let control = Tool::new("dpkg-deb").arg("--field").arg(deb).read()?;
    let control = control.trim_end();
    Ok(format!("{control}\nFilename: {filename}\nSize: {size}\nSHA256: {sha256}\n\n"))
}
