//! What changed between two releases: commits, components, packages, sizes; as a value and as Markdown.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use bundle::KeySet;
use camino::Utf8Path;
use serde::Serialize;

use super::collect::{CollectedBuild, read_packages};
use crate::diff::ChangeSet;
use crate::git;
use crate::progress::format_bytes;
use crate::publish;
use crate::scratch::create_scratch_dir;
use crate::store::ReleaseStore;
use crate::store::format::{ChannelEntry, ReleaseBoard, ReleaseComponent, ReleaseManifest};

/// The maximum number of listed commits.
const MOST_COMMITS: usize = 200;
/// The maximum number of listed packages.
const MOST_PACKAGES: usize = 100;

/// A release with its bills of materials.
#[derive(Debug)]
pub struct PastRelease {
    /// The release.
    pub manifest: ReleaseManifest,
    /// Names and versions by board.
    pub packages: BTreeMap<String, BTreeMap<String, String>>,
}

/// The changes for one board.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BoardChanges {
    /// The board.
    pub board: String,
    /// Components, by version and digest; without equal ones.
    pub components: ChangeSet<ReleaseComponent>,
    /// Packages, wheels and crates, by version.
    pub packages: ChangeSet<String>,
}

impl PastRelease {
    /// Reads a release and its bills of materials from a store.
    ///
    /// # Errors
    /// When a part is missing or damaged.
    pub fn read(store: &dyn ReleaseStore, entry: &ChannelEntry, keys: &KeySet) -> Result<Self> {
        let manifest = publish::load_manifest(store, entry, keys)?;
        let (_keep, dir) = create_scratch_dir()?;
        let mut found = BTreeMap::new();
        for board in &manifest.boards {
            let Some(sbom) = board.objects.iter().find(|o| o.role == "sbom") else { continue };
            let path = dir.join(&sbom.sha256);
            store.get(&sbom.sha256, sbom.size, &path, &|_| ())?;
            let text = std::fs::read(&path).with_context(|| format!("reading {path}"))?;
            found.insert(board.board.clone(), read_packages(&text)?);
        }
        Ok(Self { manifest, packages: found })
    }

    /// The changes from this release to another one, for each board.
    pub fn changes_to(&self, new: &Self) -> Vec<BoardChanges> {
        board_changes(&self.manifest.boards, &self.packages, &new.manifest.boards, &new.packages)
    }
}

type Packages = BTreeMap<String, BTreeMap<String, String>>;

fn board_changes(
    old: &[ReleaseBoard],
    old_p: &Packages,
    new: &[ReleaseBoard],
    new_p: &Packages,
) -> Vec<BoardChanges> {
    let empty = BTreeMap::new();
    let components = |board: &ReleaseBoard| -> BTreeMap<String, ReleaseComponent> {
        board.components.iter().map(|c| (c.name.clone(), c.clone())).collect()
    };
    let mut found = Vec::new();
    for board in new {
        let Some(before) = old.iter().find(|b| b.board == board.board) else { continue };
        let packages = |of: &Packages| of.get(&board.board).unwrap_or(&empty).clone();
        found.push(BoardChanges {
            board: board.board.clone(),
            components: ChangeSet::between(&components(before), &components(board)),
            packages: ChangeSet::between(&packages(old_p), &packages(new_p)),
        });
    }
    found
}

/// The notes of a release. The same inputs give the same text.
///
/// # Errors
/// When a bill of materials cannot be read.
pub fn write_notes(
    root: &Utf8Path,
    new: &CollectedBuild,
    past: Option<&PastRelease>,
) -> Result<String> {
    let mut text = format!("# {} {}\n", new.title, new.version);
    let commit = new.commit.as_deref();
    text.push_str(&format!("\nCommit {}.\n", commit.unwrap_or("unknown")));
    let mut new_packages = BTreeMap::new();
    for board in &new.boards {
        let sbom = board.objects.iter().find(|o| o.role == "sbom");
        let path = sbom.and_then(|o| new.sources.get(&o.sha256));
        let Some(path) = path else { continue };
        let sbom = std::fs::read(path).with_context(|| format!("reading {path}"))?;
        new_packages.insert(board.board.clone(), read_packages(&sbom)?);
    }
    match past {
        None => text.push_str("\nThe first release of this product in this store.\n"),
        Some(past) => {
            let old = &past.manifest;
            text.push_str(&format!("\nWhat changed since {}:\n", old.version));
            text.push_str("\n## Commits\n\n");
            text.push_str(&list_commits(root, old.commit.as_deref(), commit));
            let changed = board_changes(&old.boards, &past.packages, &new.boards, &new_packages);
            text.push_str(&components_table(&changed));
            text.push_str(&package_list(&changed));
        }
    }
    text.push_str("\n## Files\n\n| file | size | SHA-256 |\n|---|---|---|\n");
    for object in new.boards.iter().flat_map(|board| &board.objects) {
        let short = object.sha256.get(..16).unwrap_or_default();
        text.push_str(&format!("| {} | {} | {short}… |\n", object.name, format_bytes(object.size)));
    }
    Ok(text)
}

fn list_commits(root: &Utf8Path, old: Option<&str>, new: Option<&str>) -> String {
    let (Some(old), Some(new)) = (old, new) else {
        return "Not known: one of the two was built outside of a repository.\n".to_owned();
    };
    if old == new {
        return "None: both are of one commit.\n".to_owned();
    }
    let git = git::git_in(root).args(["log", "--no-merges"]);
    let range = format!("{old}..{new}");
    let Ok(log) = git.args(["--format=%h %s", "--abbrev=12", &range]).read() else {
        return format!("Not known: this checkout lacks the history since {old}.\n");
    };
    let lines: Vec<&str> = log.lines().collect();
    let mut text = String::new();
    for line in lines.iter().take(MOST_COMMITS) {
        let (hash, subject) = line.split_once(' ').unwrap_or((line, ""));
        text.push_str(&format!("- {} ({hash})\n", escape_markdown(subject)));
    }
    if let Some(more) = lines.len().checked_sub(MOST_COMMITS).filter(|n| *n > 0) {
        text.push_str(&format!("- and {more} more\n"));
    }
    if lines.is_empty() {
        text.push_str("None.\n");
    }
    text
}

fn components_table(changed: &[BoardChanges]) -> String {
    let mut text = String::from("\n## Components\n\n");
    let mut rows = String::new();
    for board in changed {
        let name = &board.board;
        let short = |c: &ReleaseComponent| {
            let digest = c.digest.get(..12).unwrap_or_default();
            format!("{} ({digest})", escape_markdown(&c.version))
        };
        for (component, change) in &board.components.changed {
            let (old, new) = (short(&change.old), short(&change.new));
            rows.push_str(&format!("| {name} | {component} | {old} | {new} |\n"));
        }
        for (component, new) in &board.components.added {
            rows.push_str(&format!("| {name} | {component} | | {} |\n", short(new)));
        }
        for (component, old) in &board.components.removed {
            rows.push_str(&format!("| {name} | {component} | {} | |\n", short(old)));
        }
    }
    if rows.is_empty() {
        text.push_str("None changed.\n");
    } else {
        text.push_str("| board | component | before | now |\n|---|---|---|---|\n");
        text.push_str(&rows);
    }
    text
}

/// Boards mostly have the same changes, so each change is listed once.
fn package_list(changed: &[BoardChanges]) -> String {
    let mut lines = BTreeSet::new();
    for packages in changed.iter().map(|board| &board.packages) {
        lines.extend(
            packages
                .added
                .iter()
                .map(|(n, v)| format!("- {} {} is new", escape_markdown(n), escape_markdown(v))),
        );
        lines.extend(packages.removed.keys().map(|n| format!("- {} is gone", escape_markdown(n))));
        lines.extend(packages.changed.iter().map(|(name, change)| {
            format!(
                "- {} {} → {}",
                escape_markdown(name),
                escape_markdown(&change.old),
                escape_markdown(&change.new)
            )
        }));
    }
    let mut text = String::from("\n## Packages\n\n");
    if lines.is_empty() {
        text.push_str("None changed.\n");
    }
    for line in lines.iter().take(MOST_PACKAGES) {
        text.push_str(line);
        text.push('\n');
    }
    if let Some(more) = lines.len().checked_sub(MOST_PACKAGES).filter(|n| *n > 0) {
        text.push_str(&format!("- and {more} more\n"));
    }
    text
}

/// Escapes external text for Markdown: one line without any markup.
pub(super) fn escape_markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            c if c.is_control() => out.push(' '),
            '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '|' | '#' | '!' | '&' => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_cannot_become_markup() {
        assert_eq!(escape_markdown("a|b <img src=x>\n# c"), r"a\|b \<img src=x\> \# c");
    }
}
