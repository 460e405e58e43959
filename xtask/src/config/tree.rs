//! `overlays/<name>/`: a root filesystem overlay, read as a list of files. Literal files, symbolic
//! links, and `*.j2` templates; `overlay.toml` lists the exceptions from the usual modes and
//! owners.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};
use camino::{Utf8Component, Utf8Path, Utf8PathBuf};

use super::content;
use super::file::read_source;
use super::overlay::{FileAttributes, Overlay, OverlayFile, OverlayFileKind};
use super::reader::{
    ConfigFinding, ConfigFindings, ConfigPlace, Located, TableFields, WholeNumber,
};
use super::units::SafeName;
use crate::artifact::hash_bytes;

/// The file of exceptions; it is not copied to the robot.
const EXCEPTIONS: &str = "overlay.toml";

/// Reads one overlay. Modes come from the git-visible executable bit only, never from the umask.
///
/// # Errors
/// A missing directory, or all findings of its `overlay.toml`.
pub fn read_overlay(root: &Utf8Path, name: &Located<SafeName>) -> Result<Overlay> {
    let base = Utf8Path::new("overlays").join(&name.value.0);
    let about = root.join(&base).symlink_metadata();
    if !about.as_ref().is_ok_and(|about| about.is_dir()) {
        let (message, help) = match about.is_ok_and(|about| about.is_symlink()) {
            true => (
                format!(
                    "the overlay `{}` is a symbolic link, and git does not store its target's files",
                    name.value.0
                ),
                "copy the directory, or make it a submodule",
            ),
            false => (
                format!("the overlay `{}` has no directory {base}", name.value.0),
                "create the directory, or remove the name from `overlays`",
            ),
        };
        return Err(ConfigFindings(vec![ConfigFinding::new(&name.place, message, help)]).into());
    }
    let exceptions = read_exceptions(root, &base)?;
    let mut found = Found::default();
    walk_overlay(root, &base, Utf8Path::new(""), &mut found)?;
    let Found { mut files, mut junk, mut findings } = found;
    files.sort_by(|a, b| a.target.cmp(&b.target));
    junk.sort();
    for (path, attributes, place) in exceptions.files {
        match files.iter_mut().find(|file| file.target == path) {
            Some(file) => file.attributes = attributes,
            None => findings.push(ConfigFinding::new(
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
            findings.push(ConfigFinding::new(&name.place, message, "remove one of the two"));
        }
    }
    ConfigFindings(findings).check()?;
    let directories = exceptions.directories.into_iter().map(|(p, a, _)| (p, a)).collect();
    Ok(Overlay { name: name.value.0.clone(), files, directories, junk })
}

/// The files of an overlay.
#[derive(Default)]
struct Found {
    files: Vec<OverlayFile>,
    junk: Vec<Utf8PathBuf>,
    findings: Vec<ConfigFinding>,
}

impl Found {
    fn add_problem(
        &mut self,
        source: &Utf8Path,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        let place = ConfigPlace { file: source.to_owned(), line: 0, text: String::new() };
        self.findings.push(ConfigFinding::new(&place, message, help));
    }
}

fn walk_overlay(
    root: &Utf8Path,
    base: &Utf8Path,
    inner: &Utf8Path,
    found: &mut Found,
) -> Result<()> {
    let dir = root.join(base).join(inner);
    for entry in dir.read_dir_utf8().with_context(|| format!("reading {dir}"))? {
        let entry = entry.with_context(|| format!("reading {dir}"))?;
        let target = inner.join(entry.file_name());
        let source = base.join(&target);
        let full = entry.path();
        // Git's own files in a submodule are not part of the overlay.
        if entry.file_name() == ".git" || (inner == "" && entry.file_name() == EXCEPTIONS) {
            continue;
        }
        if content::is_junk(entry.file_name()) {
            found.junk.push(source);
            continue;
        }
        let metadata = full.symlink_metadata().with_context(|| format!("reading {source}"))?;
        if metadata.is_dir() {
            walk_overlay(root, base, &target, found)?;
        } else if metadata.is_symlink() {
            let link = full.read_link_utf8().with_context(|| format!("reading {source}"))?;
            if link_leaves_overlay(root, &target, &link) {
                let message = format!("the link points to {link}, outside of the overlay");
                let help = "a link is copied unchanged: let it point to a path on the robot, or \
                 copy the file";
                found.add_problem(&source, message, help);
            }
            let attributes = FileAttributes { mode: 0o777, uid: 0, gid: 0 };
            let sha256 = hash_bytes(link.as_str().as_bytes());
            let kind = OverlayFileKind::Symlink;
            found.files.push(OverlayFile { source, target, kind, attributes, sha256 });
        } else if metadata.is_file() {
            let executable = metadata.permissions().mode() & 0o100 != 0;
            let mode = if executable { 0o755 } else { 0o644 };
            let (kind, target) = match target.as_str().strip_suffix(".j2") {
                Some(rendered) => (OverlayFileKind::Template, Utf8PathBuf::from(rendered)),
                None => (OverlayFileKind::Literal, target),
            };
            let bytes = std::fs::read(full).with_context(|| format!("reading {source}"))?;
            // The content of a template is checked when it is rendered.
            if kind == OverlayFileKind::Literal
                && let Some(problem) =
                    content::find_problem(content::FileDestination::Root(&target), &bytes)
            {
                found.add_problem(&source, problem.message, problem.help);
            }
            let sha256 = hash_bytes(&bytes);
            let attributes = FileAttributes { mode, uid: 0, gid: 0 };
            found.files.push(OverlayFile { source, target, kind, attributes, sha256 });
        } else {
            let help = "remove it; create such a file on the robot (tmpfiles.d(5))";
            let message = "a pipe, a socket or a device; expected a file, a directory or a link";
            found.add_problem(&source, message, help);
        }
    }
    Ok(())
}

/// Whether a link at that path of an overlay points to something on this machine: above the root,
/// or into the workspace.
fn link_leaves_overlay(root: &Utf8Path, target: &Utf8Path, link: &Utf8Path) -> bool {
    if link.is_absolute() {
        return root != "/" && link.starts_with(root);
    }
    let mut depth = target.components().count() as i64 - 1;
    link.components().any(|part| {
        depth += match part {
            Utf8Component::ParentDir => -1,
            Utf8Component::Normal(_) => 1,
            _ => 0,
        };
        depth < 0
    })
}

/// Modes and owners of files, and directories that the overlay requests.
#[derive(Default)]
struct Exceptions {
    files: Vec<(Utf8PathBuf, FileAttributes, ConfigPlace)>,
    directories: Vec<(Utf8PathBuf, FileAttributes, ConfigPlace)>,
}

fn read_exceptions(root: &Utf8Path, base: &Utf8Path) -> Result<Exceptions> {
    let shown = base.join(EXCEPTIONS);
    if !root.join(&shown).is_file() {
        return Ok(Exceptions::default());
    }
    read_source(root, &shown)?.parse(|f| {
        let files = f.tables("files", read_exception);
        let directories = f.tables("directories", read_exception);
        Some(Exceptions { files: files?, directories: directories? })
    })
}

/// Ids of ext4 have 32 bits, and the highest one means "none" (chown(2)).
const OWNER: WholeNumber = WholeNumber { of: "", from: 0, to: u32::MAX - 1 };

fn read_exception(f: &mut TableFields<'_>) -> Option<(Utf8PathBuf, FileAttributes, ConfigPlace)> {
    let path = f.required::<Utf8PathBuf>("path");
    let mode = f.required::<String>("mode");
    let uid = f.number_or("uid", OWNER, 0);
    let gid = f.number_or("gid", OWNER, 0);
    let mode = mode?;
    let Ok(bits @ 0..=0o7777) = u32::from_str_radix(&mode.value, 8) else {
        let message = format!(
            "`mode`: expected an octal mode from \"0000\" to \"7777\", found \"{}\"",
            mode.value
        );
        f.reject(&mode.place, message, "");
        return None;
    };
    Some((path?.value, FileAttributes { mode: bits, uid: uid?, gid: gid? }, f.place()))
}
