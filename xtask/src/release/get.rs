//! `release get`: files of a release from a store, each verified, under the names that the release gives them.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;

use crate::artifact::{Artifact, hash_file, partial_path};
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

/// Fetches the files that are not in the directory yet. A program is executable there.
///
/// # Errors
/// When the release has no such file, there are several boards and none was named, or a file is missing or damaged in the
/// store.
pub fn get(
    store: &dyn ReleaseStore,
    manifest: &ReleaseManifest,
    request: &Request<'_>,
) -> Result<Vec<Artifact>> {
    let objects = select(manifest, request)?;
    let into = request.into;
    fs::create_dir_all(into).with_context(|| format!("creating {into}"))?;
    let what = format!("{} {} from {}", manifest.product, manifest.version, store.name());
    let step =
        ProgressStep::new("get", what, objects.iter().map(|o| o.size).sum(), ProgressUnit::Bytes);
    let mut files = Vec::new();
    for ReleaseObject { role, name, size, sha256, .. } in objects {
        let path = into.join(name);
        step.note(name);
        if path.is_file() && hash_file(&path)?.1 == *sha256 {
            step.advance(*size);
        } else {
            let unfinished = partial_path(&path);
            store
                .get(sha256, *size, &unfinished, &|bytes| step.advance(bytes))
                .with_context(|| format!("fetching {name}"))?;
            if role == "program" {
                fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o755))
                    .with_context(|| format!("making {name} executable"))?;
            }
            fs::rename(&unfinished, &path).with_context(|| format!("renaming {unfinished}"))?;
        }
        files.push(Artifact { path, size: *size, sha256: sha256.clone() });
    }
    Ok(files)
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
                "the release has no files for {board}\nhelp: it has files for {}",
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
