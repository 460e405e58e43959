//! Creates the new tree next to the old one, flushes it, and exchanges the two.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::tree::{self, CHUNK, OPEN, ResourceKind, ResourceTree};
use crate::files::FileChanges;
use crate::refusal::{Refusal, Result};

/// The allocation unit of file systems.
const BLOCK: u64 = 4096;

/// Bytes of `data` that are left free for other uses.
const RESERVE: u64 = 1 << 20;

/// Removes the files of an interrupted run.
///
/// # Errors
/// `io`.
pub(super) fn remove_staging(files: &dyn FileChanges, staging: &Path) -> Result<()> {
    files
        .remove(staging)
        .map_err(|error| Refusal::io(format!("removing {}", staging.display()), &error))
}

/// Checks that there is space for a second tree next to the first.
///
/// # Errors
/// `no-space`, `io`.
pub(super) fn check_space(wanted: &ResourceTree, data: &Path) -> Result<()> {
    let about = rustix::fs::statvfs(data)
        .map_err(|error| failed("reading the size of", data, &error.into()))?;
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    let sizes = wanted.entries.values().map(|item| match item {
        ResourceKind::File { size, .. } => size.next_multiple_of(BLOCK),
        _ => BLOCK,
    });
    let needed = sizes.sum::<u64>().saturating_add(RESERVE);
    if free < needed {
        return Err(no_space(format!(
            "they need {} KiB, but {} KiB are free",
            needed >> 10,
            free >> 10
        )));
    }
    Ok(())
}

fn no_space(why: impl std::fmt::Display) -> Refusal {
    Refusal::new(
        "no-space",
        format!("not enough space on data for the API's resources: {why}"),
        "free space on data; /data/system is unchanged",
    )
}

/// Creates the tree at `staging`, which does not exist, and replaces `target` with it.
///
/// # Errors
/// `no-space`, `io`: `target` is the old tree or the new one.
pub(super) fn replace(
    files: &dyn FileChanges,
    wanted: &ResourceTree,
    staging: &Path,
    target: &Path,
) -> Result<()> {
    let data = target.parent().unwrap_or(target);
    let flush = || files.sync(data).map_err(|error| failed("flushing", data, &error));
    let exchanged = stage_tree(files, wanted, staging).and_then(|()| {
        // The exchange must not reach the disk before the new tree's name.
        flush()?;
        let exists = std::fs::symlink_metadata(target).is_ok();
        if exists { files.exchange(staging, target) } else { files.rename(staging, target) }
            .map_err(|error| failed("exchanging", target, &error))
    });
    if let Err(refusal) = exchanged {
        // The first failure is reported; the next run removes leftovers.
        drop(files.remove(staging));
        return Err(refusal);
    }
    flush()?;
    // The old tree. If its removal is interrupted, the next run continues. It is removed before provisioning is
    // recorded as done.
    drop(files.remove(staging).and_then(|()| files.sync(data)));
    Ok(())
}

pub(super) fn failed(action: &str, path: &Path, error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => no_space(error),
        _ => Refusal::io(format!("{action} {}", path.display()), error),
    }
}

fn stage_tree(files: &dyn FileChanges, wanted: &ResourceTree, staging: &Path) -> Result<()> {
    let folder = |path: &Path| files.create_dir(path).map_err(|e| failed("creating", path, &e));
    folder(staging)?;
    for (path, item) in &wanted.entries {
        let to = staging.join(path);
        match item {
            ResourceKind::Folder { .. } => folder(&to)?,
            ResourceKind::File { mode, .. } => {
                copy_file(files, &wanted.folder.join(path), &to, *mode)?
            }
            ResourceKind::Link(target) => {
                files.symlink(target, &to).map_err(|e| failed("creating", &to, &e))?;
            }
            ResourceKind::Other => {}
        }
    }
    // The deepest first: a directory's content is durable before its own name.
    let inner = wanted.entries.iter().filter_map(|(path, item)| match item {
        ResourceKind::Folder { mode } => Some((staging.join(path), *mode)),
        _ => None,
    });
    let mut folders: Vec<_> = inner.collect();
    folders.insert(0, (staging.to_owned(), OPEN));
    for (path, mode) in folders.iter().rev() {
        files
            .set_mode(path, *mode)
            .and_then(|()| files.sync(path))
            .map_err(|error| failed("flushing", path, &error))?;
    }
    // The package's files may have changed while they were read.
    let changes = tree::compare_trees(wanted, tree::read_present(staging)?.as_ref())?;
    match changes.first() {
        None => Ok(()),
        Some(first) => Err(Refusal::new(
            "io",
            format!("{} reads back differently than written", tree::escape_path(&first.path)),
            "do not change the package meanwhile; otherwise the card is failing and must be replaced",
        )),
    }
}

fn copy_file(files: &dyn FileChanges, from: &Path, to: &Path, mode: u32) -> Result<()> {
    let mut source = File::open(from).map_err(|error| tree::read_error(from, &error))?;
    files.create(to).map_err(|error| failed("creating", to, &error))?;
    let mut chunk = Vec::new();
    loop {
        chunk.clear();
        let read = (&mut source).take(CHUNK as u64).read_to_end(&mut chunk);
        if read.map_err(|error| tree::read_error(from, &error))? == 0 {
            break;
        }
        files.append(to, &chunk).map_err(|error| failed("writing", to, &error))?;
    }
    files
        .set_mode(to, mode)
        .and_then(|()| files.sync(to))
        .map_err(|error| failed("flushing", to, &error))
}
