//! `overlays/<name>/`: a root filesystem overlay, read as a list of files. Literal files, symbolic
//! links, and `*.j2` templates; `overlay.toml` beside them lists the exceptions from the usual
//! modes and owners.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};

use super::reader::{Fields, Finding, Findings, Located, Place, Source};
use super::units::Name;
use crate::artifact::{hash_bytes, hash_file};

/// The file of exceptions; it is not copied to the robot.
const EXCEPTIONS: &str = "overlay.toml";

/// One overlay.
#[derive(Debug)]
pub struct Overlay {
    /// Its name, which is its folder's.
    pub name: String,
    /// Its files and links, sorted by target.
    pub files: Vec<OverlayFile>,
    /// Directories that it asks for with a mode or owner of their own.
    pub directories: Vec<(Utf8PathBuf, Attributes)>,
}

/// Mode and numeric owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// Numeric user id.
    pub uid: u32,
    /// Numeric group id.
    pub gid: u32,
}

/// What an overlay file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryKind {
    /// Copied as it is.
    Literal,
    /// Rendered; the target's name lacks the `.j2`.
    Template,
    /// A symbolic link, copied as a link.
    Symlink,
}

/// One file of an overlay.
#[derive(Debug)]
pub struct OverlayFile {
    /// Path relative to the workspace.
    pub source: Utf8PathBuf,
    /// Path on the robot, without the leading slash.
    pub target: Utf8PathBuf,
    /// What it is.
    pub kind: EntryKind,
    /// Mode and owner on the robot.
    pub attributes: Attributes,
    /// SHA-256 of the content (of the link's target for a link).
    pub sha256: String,
}

/// Reads one overlay. Modes come from the git-visible executable bit only, never from the umask.
///
/// # Errors
/// A missing folder, or all findings of its `overlay.toml`.
pub fn read(root: &Utf8Path, name: &Located<Name>) -> Result<Overlay> {
    let base = Utf8Path::new("overlays").join(&name.value.0);
    if !root.join(&base).is_dir() {
        let message = format!("the overlay `{}` has no folder {base}", name.value.0);
        let help = "make the folder, or take the name out of `overlays`";
        return Err(Findings(vec![Finding::new(&name.place, message, help)]).into());
    }
    let exceptions = read_exceptions(root, &base)?;
    let mut files = Vec::new();
    walk(root, &base, Utf8Path::new(""), &mut files)?;
    files.sort_by(|a, b| a.target.cmp(&b.target));
    let mut findings = Vec::new();
    for (path, attributes, place) in exceptions.files {
        match files.iter_mut().find(|file| file.target == path) {
            Some(file) => file.attributes = attributes,
            None => findings.push(Finding::new(
                &place,
                format!("the overlay has no file {path}"),
                "name the file as on the robot, without `.j2`",
            )),
        }
    }
    for pair in files.windows(2) {
        if let [first, second] = pair
            && first.target == second.target
        {
            let message =
                format!("{} and {} are both /{}", first.source, second.source, first.target);
            findings.push(Finding::new(&name.place, message, "remove one of the two"));
        }
    }
    Findings(findings).check()?;
    let directories = exceptions.directories.into_iter().map(|(p, a, _)| (p, a)).collect();
    Ok(Overlay { name: name.value.0.clone(), files, directories })
}

fn walk(
    root: &Utf8Path,
    base: &Utf8Path,
    inner: &Utf8Path,
    files: &mut Vec<OverlayFile>,
) -> Result<()> {
    let dir = root.join(base).join(inner);
    for entry in dir.read_dir_utf8().with_context(|| format!("reading {dir}"))? {
        let entry = entry.with_context(|| format!("reading {dir}"))?;
        let target = inner.join(entry.file_name());
        let source = base.join(&target);
        let full = entry.path();
        let metadata = full.symlink_metadata().with_context(|| format!("reading {source}"))?;
        if inner == "" && entry.file_name() == EXCEPTIONS {
            continue;
        }
        if metadata.is_dir() {
            walk(root, base, &target, files)?;
        } else if metadata.is_symlink() {
            let link = full.read_link_utf8().with_context(|| format!("reading {source}"))?;
            let attributes = Attributes { mode: 0o777, uid: 0, gid: 0 };
            let sha256 = hash_bytes(link.as_str().as_bytes());
            files.push(OverlayFile {
                source,
                target,
                kind: EntryKind::Symlink,
                attributes,
                sha256,
            });
        } else {
            let executable = metadata.permissions().mode() & 0o100 != 0;
            let mode = if executable { 0o755 } else { 0o644 };
            let (kind, target) = match target.as_str().strip_suffix(".j2") {
                Some(rendered) => (EntryKind::Template, Utf8PathBuf::from(rendered)),
                None => (EntryKind::Literal, target),
            };
            let sha256 = hash_file(full)?.1;
            let attributes = Attributes { mode, uid: 0, gid: 0 };
            files.push(OverlayFile { source, target, kind, attributes, sha256 });
        }
    }
    Ok(())
}

/// Modes and owners of files, and directories that the overlay asks for.
#[derive(Default)]
struct Exceptions {
    files: Vec<(Utf8PathBuf, Attributes, Place)>,
    directories: Vec<(Utf8PathBuf, Attributes, Place)>,
}

fn read_exceptions(root: &Utf8Path, base: &Utf8Path) -> Result<Exceptions> {
    let shown = base.join(EXCEPTIONS);
    if !root.join(&shown).is_file() {
        return Ok(Exceptions::default());
    }
    Source::read(root, &shown)?.parse(|f| {
        let files = f.tables("files", exception);
        let directories = f.tables("directories", exception);
        Some(Exceptions { files: files?, directories: directories? })
    })
}

fn exception(f: &mut Fields<'_>) -> Option<(Utf8PathBuf, Attributes, Place)> {
    let path = f.required::<Utf8PathBuf>("path");
    let mode = f.required::<String>("mode");
    let uid = f.or("uid", 0u32);
    let gid = f.or("gid", 0u32);
    let mode = mode?;
    let Ok(bits @ 0..=0o7777) = u32::from_str_radix(&mode.value, 8) else {
        let message =
            format!("`mode`: expected an octal mode such as \"0600\", found \"{}\"", mode.value);
        f.reject(&mode.place, message, "");
        return None;
    };
    Some((path?.value, Attributes { mode: bits, uid: uid?, gid: gid? }, f.place()))
}
