//! `release get`: files of a release from a store, each verified, under the names that the release gives them.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;

use crate::artifact::{Artifact, hash_file, partial};
use crate::progress::{Step, Unit, names};
use crate::store::Store;
use crate::store::format::{Manifest, Object};

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
pub fn get(store: &dyn Store, manifest: &Manifest, request: &Request<'_>) -> Result<Vec<Artifact>> {
    let objects = select(manifest, request)?;
    let into = request.into;
    fs::create_dir_all(into).with_context(|| format!("creating {into}"))?;
    let what = format!("{} {} from {}", manifest.product, manifest.version, store.name());
    let step = Step::new("get", what, objects.iter().map(|o| o.size).sum(), Unit::Bytes);
    let mut files = Vec::new();
    for Object { role, name, size, sha256, .. } in objects {
        let path = into.join(name);
        step.note(name);
        if path.is_file() && hash_file(&path)?.1 == *sha256 {
            step.advance(*size);
        } else {
            let unfinished = partial(&path);
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

fn select<'a>(manifest: &'a Manifest, request: &Request<'_>) -> Result<Vec<&'a Object>> {
    let roles: Vec<&str> = match request.roles {
        [] => vec!["image", "bundle"],
        roles => roles.iter().map(String::as_str).collect(),
    };
    let is_wanted = |object: &&Object| {
        let role = if object.role == "block-map" { "image" } else { object.role.as_str() };
        roles.contains(&role)
    };
    let general = std::iter::once(&manifest.notes).chain(&manifest.programs);
    let mut found: Vec<&Object> = general.filter(is_wanted).collect();
    if roles.iter().any(|role| !["notes", "program"].contains(role)) {
        let boards: Vec<&str> = manifest.boards.iter().map(|b| b.board.as_str()).collect();
        let board = match (request.board, boards.as_slice()) {
            (Some(board), _) => board,
            (None, [only]) => only,
            (None, _) => bail!(
                "the release has files for {}\nhelp: name a board with --board",
                names(&boards)
            ),
        };
        let part = manifest.boards.iter().find(|part| part.board == board);
        let part = part.with_context(|| {
            format!(
                "the release has no files for {board}\nhelp: it has files for {}",
                names(&boards)
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
