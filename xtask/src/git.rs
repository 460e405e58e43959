//! The only place that calls git: the user's configuration does not change what is read, and
//! differences from a commit are found by reading the files, independently of git's ignore
//! settings.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::hash_file;
use crate::config::content::is_junk;
use crate::exec::Tool;

/// Overrides of settings that change git's output or files. `exec` handles the environment: GIT_DIR
/// and other variables of hooks that select another repository are not passed to programs.
const SETTINGS: [&str; 13] = [
    // Output of gpg before the requested output (git-log(1)).
    "log.showSignature=false",
    "i18n.logOutputEncoding=UTF-8",
    "color.ui=false",
    "core.quotePath=false",
    // Do not ask a daemon whether files have changed.
    "core.fsmonitor=false",
    "core.untrackedCache=false",
    // The user's excluded names.
    "core.excludesFile=/dev/null",
    "status.showUntrackedFiles=all",
    // Files are written exactly as committed.
    "core.autocrlf=false",
    "core.eol=lf",
    "core.attributesFile=/dev/null",
    "core.fileMode=true",
    "core.hooksPath=/dev/null",
];

/// git for the repository that contains a directory.
pub fn git_in(dir: &Utf8Path) -> Tool {
    git_without_repository().args(["-C", dir.as_str()])
}

/// git without a repository.
pub fn git_without_repository() -> Tool {
    let tool = Tool::new("git")
        .env("GIT_TERMINAL_PROMPT", "0") //
        // Do not write while reading.
        .env("GIT_OPTIONAL_LOCKS", "0")
        .env("GIT_NO_REPLACE_OBJECTS", "1")
        .env("GIT_ATTR_NOSYSTEM", "1")
        .env("GIT_LITERAL_PATHSPECS", "1");
    tool.args_unshown(SETTINGS.iter().flat_map(|setting| ["-c", *setting]))
}

/// When a commit was made, in seconds since 1970.
///
/// # Errors
/// When there is no commit.
pub fn commit_time(dir: &Utf8Path) -> Result<u64> {
    let output = git_in(dir).args(["log", "-1", "--format=%ct"]).read()?;
    output
        .trim()
        .parse()
        .with_context(|| format!("git returned \"{}\" as the commit's time", output.trim()))
}

/// Creates another checkout of a repository, which contains only that commit.
///
/// # Errors
/// When git cannot create it.
pub fn create_checkout(root: &Utf8Path, commit: &str, to: &Utf8Path) -> Result<()> {
    let clone = ["clone", "--quiet", "--no-checkout", "--template="];
    git_without_repository().args(clone).args([root.as_str(), to.as_str()]).run()?;
    git_in(to).args(["checkout", "--quiet", "--detach", commit]).run()
}

/// Directories and files of a workspace that builds read, including untracked ones.
const INPUTS: [&str; 16] = [
    ".cargo",
    "Cargo.lock",
    "Cargo.toml",
    "board",
    "bootmodel",
    "bundle",
    "configs",
    "contract",
    "external",
    "overlays",
    "rust-toolchain",
    "rust-toolchain.toml",
    "slotd",
    "xtask/Cargo.toml",
    "xtask/build.rs",
    "xtask/src",
];

/// Directories whose children a build reads whole or not at all: it names the one that it needs, and ends where that one is
/// not there.
const NAMED: [&str; 2] = ["board", "overlays"];

/// How many names are passed to git at once.
const AT_ONCE: usize = 400;

/// The files of a workspace that differ from the commit, sorted: each tracked file is compared byte
/// by byte, independently of index, filters and ignore rules; untracked files where builds read are
/// pass over count as nothing. Nor do files that a sparse checkout leaves out (git-sparse-checkout(1)), where no build
/// would read them: outside of what builds read, and the whole directory of a board or an overlay.
///
/// # Errors
/// When git or a file cannot be read.
pub fn changed_files(root: &Utf8Path, commit: &str) -> Result<Vec<String>> {
    Ok(changed_inputs(root, commit, &INPUTS)?.into_iter().collect())
}

/// Like [`changed_files`]; `inputs` must contain only files of the commit.
fn changed_inputs(root: &Utf8Path, commit: &str, inputs: &[&str]) -> Result<BTreeSet<String>> {
    let mut changed = BTreeSet::new();
    let tracked = tracked_files(root, commit)?;
    compare_files(root, &tracked, inputs, &mut changed)?;
    let canonical = root.canonicalize_utf8().with_context(|| format!("resolving {root}"))?;
    let mut waiting: Vec<Utf8PathBuf> = inputs.iter().map(Utf8PathBuf::from).collect();
    while let Some(path) = waiting.pop() {
        let full = root.join(&path);
        let Ok(about) = full.symlink_metadata() else { continue };
        let name = path.file_name().unwrap_or_default();
        let entry = tracked.get(path.as_str());
        if name == ".git" || (is_junk(name) && entry.is_none()) {
            continue;
        }
        if about.is_dir() {
            // A submodule's files belong to its own commit.
            if entry.is_none() {
                let children = full.read_dir_utf8().with_context(|| format!("reading {path}"))?;
                for child in children {
                    let child = child.with_context(|| format!("reading {path}"))?;
                    waiting.push(path.join(child.file_name()));
                }
            }
        } else if entry.is_none() {
            changed.insert(path.to_string());
        } else if about.is_symlink() && !path.starts_with("overlays") {
            // git stores the link, but a build reads its target. An overlay's links stay links.
            let inside = |target: &Utf8Path| {
                let target = target.strip_prefix(&canonical).ok()?;
                let below = |name: &String| Utf8Path::new(name).starts_with(target);
                tracked.keys().any(below).then_some(())
            };
            if full.canonicalize_utf8().is_ok_and(|target| inside(&target).is_none()) {
                changed.insert(path.to_string());
            }
        }
    }
    Ok(changed)
}

/// git's mode of a submodule.
const SUBMODULE: &str = "160000";

/// A file in a commit.
struct Entry {
    /// git's own: `100644`, `100755`, `120000` (a link), `160000` (a submodule).
    mode: String,
    /// The hash of its content.
    id: String,
    /// Its path, below the same directory; its name may not be UTF-8.
    path: PathBuf,
}

/// The files of a commit by their paths below a directory.
fn tracked_files(root: &Utf8Path, commit: &str) -> Result<BTreeMap<String, Entry>> {
    let listed = git_in(root).args(["ls-tree", "-r", "-z", commit]).read_bytes()?;
    let mut files = BTreeMap::new();
    for line in listed.split(|byte| *byte == 0).filter(|line| !line.is_empty()) {
        let tab = line.iter().position(|byte| *byte == b'\t');
        let parts = tab.and_then(|tab| {
            let mut words = std::str::from_utf8(&line[..tab]).ok()?.split(' ');
            let (mode, id) = (words.next()?.to_owned(), words.nth(1)?.to_owned());
            Some((mode, id, OsStr::from_bytes(&line[tab + 1..])))
        });
        let shown =
            || format!("git listed the unexpected entry \"{}\"", String::from_utf8_lossy(line));
        let (mode, id, path) = parts.with_context(shown)?;
        files.insert(path.to_string_lossy().into_owned(), Entry { mode, id, path: path.into() });
    }
    Ok(files)
}

/// The files that are marked as left out of this checkout (`skip-worktree`), below a directory.
fn left_out(root: &Utf8Path) -> Result<BTreeSet<PathBuf>> {
    let listed = git_in(root).args(["ls-files", "-t", "-z"]).read_bytes()?;
    // git-ls-files(1): `S` and a blank before the name.
    let names = listed.split(|byte| *byte == 0).filter_map(|line| line.strip_prefix(b"S "));
    Ok(names.map(|name| PathBuf::from(OsStr::from_bytes(name))).collect())
}

/// Whether a build would read a file that is not there, or notice that it is not.
fn is_wanted(root: &Utf8Path, path: &str, inputs: &[&str]) -> bool {
    let path = Utf8Path::new(path);
    let mut parts = path.components().map(|part| part.as_str());
    let whole = parts.next().filter(|top| NAMED.contains(top) && inputs.contains(top));
    let whole = whole.zip(parts.next()).map(|(top, name)| root.join(top).join(name));
    let is_left_whole = whole.is_some_and(|whole| whole.symlink_metadata().is_err());
    inputs.iter().any(|input| path.starts_with(input)) && !is_left_whole
}

fn compare_files(
    root: &Utf8Path,
    tracked: &BTreeMap<String, Entry>,
    inputs: &[&str],
    changed: &mut BTreeSet<String>,
) -> Result<()> {
    let mut absent: Vec<(&String, &Entry)> = Vec::new();
    let links = tempfile::tempdir().context("making a directory")?;
    let links = Utf8Path::from_path(links.path()).context("the directory's path")?;
    // The files to hash, with their expected entries.
    let mut hashed: Vec<(Utf8PathBuf, &String, &Entry)> = Vec::new();
    for (path, entry) in tracked {
        let about = root.as_std_path().join(&entry.path).symlink_metadata().ok();
        let about = about.as_ref();
        if about.is_none() && entry.mode != SUBMODULE {
            absent.push((path, entry));
            continue;
        }
        let full = match Utf8Path::from_path(&entry.path) {
            Some(path) => root.join(path),
            // Files with other names are copied for git.
            None => {
                let copy = links.join(hashed.len().to_string());
                let from = root.as_std_path().join(&entry.path);
                if about.is_some_and(std::fs::Metadata::is_file) {
                    std::fs::copy(&from, &copy).with_context(|| format!("reading {path}"))?;
                }
                copy
            }
        };
        let fits = match entry.mode.as_str() {
            SUBMODULE => {
                // A submodule that was not fetched has no content; git cannot tell whether a build
                // needs it.
                let there = full.join(".git").exists();
                let wanted = is_wanted(root, path, inputs);
                let inside: &[&str] = if wanted { &[""] } else { &[] };
                if there { changed_inputs(&full, &entry.id, inside)?.is_empty() } else { !wanted }
            }
            "120000" => match full.read_link_utf8() {
                Ok(target) => {
                    let file = links.join(hashed.len().to_string());
                    std::fs::write(&file, target.as_str())
                        .with_context(|| format!("writing {file}"))?;
                    hashed.push((file, path, entry));
                    true
                }
                Err(_) => false,
            },
            mode => {
                let executable = |about: &&std::fs::Metadata| {
                    (about.permissions().mode() & 0o100 != 0) == (mode == "100755")
                };
                let fits =
                    about.filter(|about| about.is_file()).is_some_and(|about| executable(&about));
                if fits {
                    hashed.push((full, path, entry));
                }
                fits
            }
        };
        if !fits {
            changed.insert(path.clone());
        }
    }
    if !absent.is_empty() {
        let left_out = left_out(root)?;
        let is_read = |path: &str, entry: &Entry| {
            !left_out.contains(&entry.path) || is_wanted(root, path, inputs)
        };
        let read = absent.into_iter().filter(|(path, entry)| is_read(path, entry));
        changed.extend(read.map(|(path, _)| path.clone()));
    }
    for some in hashed.chunks(AT_ONCE) {
        let names = some.iter().map(|(file, _, _)| file.as_str());
        let output = git_in(root).args(["hash-object", "--no-filters", "--"]).args(names).read()?;
        let ids: Vec<&str> = output.lines().collect();
        ensure!(ids.len() == some.len(), "git hashed {} of {} files", ids.len(), some.len());
        for ((file, path, entry), id) in some.iter().zip(ids) {
            if id != entry.id && !is_fetched(root, entry, file)? {
                changed.insert((*path).clone());
            }
        }
    }
    Ok(())
}

/// Whether git-lfs has replaced the pointer by this file: the pointer is in the commit, and
/// contains the file's SHA-256 ("Git LFS Specification", docs/spec.md of git-lfs).
fn is_fetched(root: &Utf8Path, entry: &Entry, file: &Utf8Path) -> Result<bool> {
    // A pointer has less than 1024 bytes.
    let size = git_in(root).args(["cat-file", "-s", &entry.id]).read()?;
    if size.trim().parse::<u64>().is_ok_and(|size| size >= 1024) {
        return Ok(false);
    }
    let pointer = git_in(root).args(["cat-file", "blob", &entry.id]).read_bytes()?;
    let pointer = String::from_utf8_lossy(&pointer);
    let mut lines = pointer.lines();
    let is_pointer = lines
        .next()
        .is_some_and(|line| line.starts_with("version https://git-lfs.github.com/spec/"));
    let Some(sum) = lines.find_map(|line| line.strip_prefix("oid sha256:")) else {
        return Ok(false);
    };
    Ok(is_pointer && hash_file(file)?.1 == sum)
}
