//! `release get`: files of a release from a store, each verified, under the names that the release gives them.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::NamedTempFile;

use crate::artifact::{Artifact, hash_file, none_if_missing};
use crate::progress::{ProgressStep, ProgressUnit, list_names};
use crate::store::ReleaseStore;
use crate::store::format::{ReleaseManifest, ReleaseObject};

/// What is fetched, and where to.
#[derive(Debug)]
pub struct Request<'a> {
    /// The board; `None`: the only one that the release has.
    pub board: Option<&'a str>,
    /// The roles of the files; empty: image and bundle. An image comes with its block map.
    pub roles: &'a [String],
    /// The target directory.
    pub into: &'a Utf8Path,
}

/// Fetches the files that are not in the directory yet. Their mode is 0644, a program's 0755, less the umask.
///
/// # Errors
/// When the release has no such file, there are several boards and none was named, a directory has a file's name, or a file is
/// missing or damaged in the store. Files that were verified before stay.
pub fn get(
    store: &dyn ReleaseStore,
    manifest: &ReleaseManifest,
    request: &Request<'_>,
) -> Result<Vec<Artifact>> {
    let objects = select(manifest, request)?;
    let into = request.into;
    fs::create_dir_all(into).with_context(|| format!("creating {into}"))?;
    for object in &objects {
        let path = into.join(&object.name);
        let about = none_if_missing(fs::symlink_metadata(&path));
        ensure!(
            !about.with_context(|| format!("looking at {path}"))?.is_some_and(|m| m.is_dir()),
            "{path} is a directory, but the release has a file of this name\n\
             help: move the directory away, or name another one with --into"
        );
    }
    objects.iter().try_for_each(|object| remove_abandoned(object, into))?;
    let what = format!("{} {} from {}", manifest.product, manifest.version, store.name());
    let total = objects.iter().map(|o| o.size).sum();
    let step = ProgressStep::new("get", what, total, ProgressUnit::Bytes);
    let mut files = Vec::new();
    for object in objects {
        let ReleaseObject { name, size, sha256, .. } = object;
        let path = into.join(name);
        step.note(name);
        if path.is_file() && hash_file(&path)?.1 == *sha256 {
            correct_mode(object, into)?;
            step.advance(*size);
        } else {
            let unfinished = create_unfinished(object, into)?;
            let file = Utf8Path::from_path(unfinished.path()).context("the name is not UTF-8")?;
            store
                .get(sha256, *size, file, &|bytes| step.advance(bytes))
                .with_context(|| format!("fetching {name}"))?;
            unfinished.persist(&path).with_context(|| format!("renaming to {path}"))?;
        }
        files.push(Artifact { path, size: *size, sha256: sha256.clone() });
    }
    Ok(files)
}

/// The mode before the umask.
fn mode_of(object: &ReleaseObject) -> u32 {
    if object.role == "program" { 0o755 } else { 0o644 }
}

/// The number of random letters and digits at the end of an unfinished file's name.
const RANDOM: usize = 6;

/// The beginning of the names of an object's unfinished files.
fn unfinished_prefix(object: &ReleaseObject) -> String {
    format!("{}.partial-", object.name)
}

/// A new file beside the object's final name. Its own name is unique: another process may fetch the same object, and whatever
/// has that name already, such as a link, is not ours to write to. It is locked: only an unfinished file without a lock is
/// abandoned.
fn create_unfinished(object: &ReleaseObject, into: &Utf8Path) -> Result<NamedTempFile> {
    let context = || format!("creating a file in {into}");
    loop {
        let file = tempfile::Builder::new()
            .prefix(&unfinished_prefix(object))
            .rand_bytes(RANDOM)
            .permissions(Permissions::from_mode(mode_of(object)))
            .tempfile_in(into)
            .with_context(context)?;
        let lock = flock(file.as_file(), FlockOperation::NonBlockingLockExclusive);
        // Another process may have removed it before it was locked. A filesystem without locks has no such process.
        let about = file.as_file().metadata().with_context(context)?;
        if lock != Err(Errno::WOULDBLOCK) && about.nlink() > 0 {
            return Ok(file);
        }
    }
}

/// Removes the unfinished files that interrupted processes have left.
fn remove_abandoned(object: &ReleaseObject, into: &Utf8Path) -> Result<()> {
    let context = || format!("reading {into}");
    let prefix = unfinished_prefix(object);
    let is_random =
        |end: &str| end.len() == RANDOM && end.chars().all(|c| c.is_ascii_alphanumeric());
    for entry in into.read_dir_utf8().with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = entry.path();
        let is_ours = entry.file_name().strip_prefix(&prefix).is_some_and(is_random)
            && entry.file_type().with_context(context)?.is_file();
        // Network filesystems lock only files that are open for writing.
        let Some(Ok(file)) = is_ours.then(|| File::options().write(true).open(path)) else {
            continue;
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            none_if_missing(fs::remove_file(path)).with_context(|| format!("removing {path}"))?;
        }
    }
    Ok(())
}

/// Gives a file that was there before the mode that it would get now. A file that more users can read, within the mode of its
/// role, stays as it is.
fn correct_mode(object: &ReleaseObject, into: &Utf8Path) -> Result<()> {
    let (path, most) = (into.join(&object.name), mode_of(object));
    let mode = |path: &Path| -> Result<u32> {
        let about = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
        Ok(about.permissions().mode() & 0o7777)
    };
    let found = mode(path.as_std_path())?;
    if found == most {
        return Ok(());
    }
    // The umask, and what the filesystem makes of it: FAT has no modes.
    let expected = mode(create_unfinished(object, into)?.path())?;
    if found == expected || (found & expected == expected && found & !most == 0) {
        return Ok(());
    }
    fs::set_permissions(&path, Permissions::from_mode(expected))
        .with_context(|| format!("changing the mode of {path} from {found:04o} to {expected:04o}"))
}

fn select<'a>(
    manifest: &'a ReleaseManifest,
    request: &Request<'_>,
) -> Result<Vec<&'a ReleaseObject>> {
    let roles: Vec<&str> = match request.roles {
        [] => vec!["image", "bundle"],
        roles => roles.iter().map(String::as_str).collect(),
    };
    let is_wanted = |object: &&ReleaseObject| {
        let role = if object.role == "block-map" { "image" } else { object.role.as_str() };
        roles.contains(&role)
    };
    let general = std::iter::once(&manifest.notes).chain(&manifest.programs);
    let mut found: Vec<&ReleaseObject> = general.filter(is_wanted).collect();
    if roles.iter().any(|role| !["notes", "program"].contains(role)) {
        let boards: Vec<&str> = manifest.boards.iter().map(|b| b.board.as_str()).collect();
        let board = match (request.board, boards.as_slice()) {
            (Some(board), _) => board,
            (None, [only]) => only,
            (None, _) => bail!(
                "the release has files for {}\nhelp: name a board with --board",
                list_names(&boards)
            ),
        };
        let part = manifest.boards.iter().find(|part| part.board == board);
        let part = part.with_context(|| {
            format!(
                "the release has no files for {board}\nhelp: choose one of these boards: {}",
                list_names(&boards)
            )
        })?;
        found.extend(part.objects.iter().filter(is_wanted));
    }
    ensure!(
        !found.is_empty(),
        "the release has no file of the role {}\nhelp: `release show` lists its files",
        roles.join(" or ")
    );
    Ok(found)
}
