//! Helpers for engines to create a `BaseSystem` from their output.

use std::fs;
use std::io::Write as _;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use super::{NamedFile, glob};
use crate::artifact::{Artifact, write_atomically};

/// Regular files below a directory, sorted; links are not followed.
///
/// # Errors
/// When a directory cannot be listed.
pub fn files_below(dir: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
    let mut found = Vec::new();
    for entry in dir.read_dir_utf8().with_context(|| format!("listing {dir}"))? {
        let entry = entry.with_context(|| format!("listing {dir}"))?;
        let kind = entry.file_type().with_context(|| format!("listing {dir}"))?;
        if kind.is_dir() {
            found.extend(files_below(entry.path())?);
        } else if kind.is_file() {
            found.push(entry.into_path());
        }
    }
    found.sort();
    Ok(found)
}

/// Copies the files that the patterns match; each pattern must match one. `what` (the kind of the
/// files) and `missing` (the help when the directory does not exist) are for messages.
///
/// # Errors
/// When a pattern matches nothing, or a file cannot be copied.
pub fn copy_matches(
    from: &Utf8Path,
    patterns: &[String],
    to: &Utf8Path,
    what: &str,
    missing: &str,
) -> Result<Vec<NamedFile>> {
    if patterns.is_empty() {
        return Ok(Vec::new());
    }
    if !from.is_dir() {
        bail!("there are no {what} files: {from} does not exist\nhelp: {missing}");
    }
    let mut names = Vec::new();
    for path in files_below(from)? {
        names.push(path.strip_prefix(from).with_context(|| format!("placing {path}"))?.to_string());
    }
    for pattern in patterns {
        let one = glob::compile_globs(&[pattern])?;
        if !names.iter().any(|name| one.is_match(name)) {
            bail!(
                "no {what} matches '{pattern}'\nhelp: correct the pattern in the board's board.toml"
            );
        }
    }
    let mut files = Vec::new();
    let wanted = glob::compile_globs(patterns)?;
    for name in names.into_iter().filter(|name| wanted.is_match(name)) {
        let file = copy_file(&from.join(&name), &to.join(&name))?;
        files.push(NamedFile { path: name, file });
    }
    Ok(files)
}

/// Copies one file into a result.
///
/// # Errors
/// When it cannot be read or written.
pub fn copy_file(from: &Utf8Path, to: &Utf8Path) -> Result<Artifact> {
    let mut source = fs::File::open(from).with_context(|| format!("opening {from}"))?;
    write_atomically(to, |out| {
        std::io::copy(&mut source, out).with_context(|| format!("copying {from}"))?;
        Ok(())
    })?;
    Artifact::from_file(to)
}

/// The kernel as gzip (it may be compressed already), and its length in bytes when unpacked.
///
/// # Errors
/// When it cannot be read or written.
pub fn compress_kernel(image: &Utf8Path, out: &Utf8Path) -> Result<(Artifact, u64)> {
    let bytes = fs::read(image).with_context(|| format!("reading {image}"))?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = flate2::read::GzDecoder::new(bytes.as_slice());
        let size = std::io::copy(&mut plain, &mut std::io::sink())
            .with_context(|| format!("unpacking {image}"))?;
        return Ok((copy_file(image, out)?, size));
    }
    write_atomically(out, |writer| {
        let level = flate2::Compression::best();
        let mut gzip = flate2::GzBuilder::new().mtime(0).write(writer, level);
        gzip.write_all(&bytes)?;
        gzip.finish()?;
        Ok(())
    })?;
    Ok((Artifact::from_file(out)?, bytes.len() as u64))
}
