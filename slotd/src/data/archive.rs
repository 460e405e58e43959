//! Backups: a tar of zstd frames of what a robot's users have put on `data`. An archive that comes back is
//! not trusted: every name is looked at before a byte is written, and nothing leaves its folder.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use crate::refusal::{Refusal, Result};

/// Folders at the top of `data` that are no part of a backup and never come from one: the agent's own
/// memory (its floor must not fall), logs, and what belongs to the file system.
pub const OURS: [&str; 3] = ["slotd", "var", "lost+found"];

/// Within a backup's folders: trees that every installed API has links to, which no archive keeps.
const LEFT_OUT: [&str; 1] = ["apps/api/.wheels"];

/// zstd's level: a robot's processor is slow, its data mostly text.
const LEVEL: i32 = 3;

/// The most entries of an archive.
const MOST_ENTRIES: u64 = 1_000_000;

/// The deepest and the longest path of an entry.
const DEEPEST: usize = 64;
const LONGEST: usize = 1024;

/// Writes the folders `names` of `data` as an archive; folders that are not there are left out. Sockets,
/// pipes and devices are left out, too.
///
/// # Errors
/// `io`; what was written is then no archive.
pub fn pack(data: &Path, names: &[PathBuf], out: impl Write) -> Result<()> {
    let failed = |path: &Path| {
        let doing = format!("packing {}", path.display());
        move |error: io::Error| Refusal::io(doing, &error)
    };
    let encoder = zstd::Encoder::new(out, LEVEL).map_err(failed(data))?;
    let mut tar = tar::Builder::new(encoder);
    tar.follow_symlinks(false);
    tar.sparse(false);
    let mut waiting: Vec<PathBuf> = names.to_vec();
    waiting.sort_by(|a, b| b.cmp(a));
    while let Some(name) = waiting.pop() {
        if LEFT_OUT.iter().any(|out| name == Path::new(out)) {
            continue;
        }
        let path = data.join(&name);
        let about = match fs::symlink_metadata(&path) {
            Ok(about) => about,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&path)(error)),
        };
        let kind = about.file_type();
        if kind.is_dir() || kind.is_file() || kind.is_symlink() {
            tar.append_path_with_name(&path, &name).map_err(failed(&path))?;
        }
        if kind.is_dir() {
            let inside = fs::read_dir(&path).map_err(failed(&path))?;
            for entry in inside {
                waiting.push(name.join(entry.map_err(failed(&path))?.file_name()));
            }
        }
    }
    let encoder = tar.into_inner().map_err(failed(data))?;
    encoder.finish().and_then(|mut out| out.flush()).map_err(failed(data))
}

/// Everything at the top of `data` that belongs into a backup.
///
/// # Errors
/// `io`.
pub fn contents(data: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error: io::Error| Refusal::io(format!("reading {}", data.display()), &error);
    let mut names = Vec::new();
    for entry in fs::read_dir(data).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let ours = OURS.iter().any(|own| name == *own);
        // What begins with a dot there is a change of ours under way.
        if !ours && !name.to_string_lossy().starts_with('.') {
            names.push(PathBuf::from(name));
        }
    }
    names.sort();
    Ok(names)
}

/// Unpacks an archive into an empty folder, for nobody to use before all of it is there. At most `space`
/// bytes are written.
///
/// # Errors
/// `bad-archive`: it is damaged, or an entry is not one that [`pack`] makes. `no-space`. `io`.
pub fn unpack(input: impl Read, into: &Path, space: u64) -> Result<()> {
    let bad = |why: String| {
        Refusal::new(
            "bad-archive",
            format!("unpacking: {why}"),
            "use a file that `slotd backup` made",
        )
    };
    let damaged = |error: io::Error| bad(format!("the archive is damaged: {error}"));
    let failed =
        |path: &Path, error: &io::Error| Refusal::io(format!("writing {}", path.display()), error);
    let decoder = zstd::Decoder::new(input).map_err(damaged)?;
    let mut archive = tar::Archive::new(decoder);
    let mut left = space;
    // Folders get their modes at the end, links are made at the end: nothing is written through a link.
    let (mut folders, mut links) = (BTreeMap::new(), BTreeMap::new());
    let mut count = 0u64;
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        count += 1;
        let name = entry.path().map_err(damaged)?.into_owned();
        let shown = name.to_string_lossy().escape_debug().to_string();
        let name =
            safe(&name).ok_or_else(|| bad(format!("`{shown}` is no path that may be written")))?;
        let size = entry.size();
        left = left.checked_sub(size.next_multiple_of(4096)).ok_or_else(|| {
            Refusal::new(
                "no-space",
                format!("unpacking needs more than the {} MiB that are free", space >> 20),
                "make room on data, or leave something out of the backup",
            )
        })?;
        let (mode, owner, group) = {
            let header = entry.header();
            let id = |number: io::Result<u64>| number.ok().and_then(|n| u32::try_from(n).ok());
            let mode = header.mode().map_err(damaged)? & 0o7777;
            let (owner, group) = (id(header.uid()), id(header.gid()));
            let none = || bad(format!("`{shown}` has no owner"));
            (mode, owner.ok_or_else(none)?, group.ok_or_else(none)?)
        };
        let path = into.join(&name);
        if count > MOST_ENTRIES || links.contains_key(&name) {
            return Err(bad(format!("`{shown}` is one too many")));
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| failed(parent, &error))?;
        }
        match entry.header().entry_type() {
            tar::EntryType::Directory => {
                fs::create_dir_all(&path).map_err(|error| failed(&path, &error))?;
                folders.insert(name, (mode, owner, group));
            }
            tar::EntryType::Regular => {
                // New, so that nothing is written twice.
                let mut file = File::create_new(&path).map_err(|error| failed(&path, &error))?;
                let copied = io::copy(&mut entry, &mut file).map_err(damaged)?;
                if copied != size {
                    return Err(bad(format!("`{shown}` ends too early")));
                }
                let done = lchown(&path, Some(owner), Some(group))
                    .and_then(|()| file.set_permissions(Permissions::from_mode(mode)))
                    .and_then(|()| file.sync_all());
                done.map_err(|error| failed(&path, &error))?;
            }
            tar::EntryType::Symlink => {
                let to = entry.link_name().map_err(damaged)?;
                let to = to.ok_or_else(|| bad(format!("`{shown}` leads nowhere")))?.into_owned();
                links.insert(name, (to, owner, group));
            }
            _ => return Err(bad(format!("`{shown}` is neither a file, a folder nor a link"))),
        }
    }
    for (name, (to, owner, group)) in links {
        let path = into.join(&name);
        symlink(to, &path)
            .and_then(|()| lchown(&path, Some(owner), Some(group)))
            .map_err(|error| failed(&path, &error))?;
    }
    // The deepest first: one without the right to write would refuse its own content.
    for (name, (mode, owner, group)) in folders.into_iter().rev() {
        let path = into.join(&name);
        lchown(&path, Some(owner), Some(group))
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
            .and_then(|()| File::open(&path)?.sync_all())
            .map_err(|error| failed(&path, &error))?;
    }
    File::open(into).and_then(|folder| folder.sync_all()).map_err(|error| failed(into, &error))
}

/// A path of plain names, which does not begin with one of ours.
pub(super) fn safe(name: &Path) -> Option<PathBuf> {
    let mut parts = Vec::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => parts.push(part),
            Component::CurDir if parts.is_empty() => {}
            _ => return None,
        }
    }
    let first = parts.first()?.to_string_lossy();
    let long = name.as_os_str().len() > LONGEST || parts.len() > DEEPEST;
    let ours = OURS.contains(&first.as_ref()) || first.starts_with('.');
    (!long && !ours).then(|| parts.iter().collect())
}
