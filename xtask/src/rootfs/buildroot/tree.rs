//! The Buildroot tree: cloned once by tag into the cache, and checked against the pinned commit
//! before every use; or a local checkout.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::hash_file;
use crate::git;
use crate::plan::BuildrootPlan;
use crate::progress::{say, warn};

/// A tree that can be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildrootTree {
    /// Its path.
    pub path: Utf8PathBuf,
    /// The commit that is checked out.
    pub commit: String,
    /// A hash of local changes, empty without any; part of every cache key.
    pub changes: String,
    /// The files with local changes: hash by path, empty for one that was removed.
    pub changed: BTreeMap<Utf8PathBuf, String>,
}

/// Which tree to use.
#[derive(Debug, Clone, Default)]
pub struct TreeChoice {
    /// A local checkout instead of the pinned one.
    pub own: Option<Utf8PathBuf>,
    /// Accept local changes.
    pub allow_changes: bool,
    /// Never clone.
    pub offline: bool,
}

/// The path of the pinned tree.
pub fn pinned_path(cache: &Utf8Path, release: &str) -> Utf8PathBuf {
    cache.join("buildroot").join(release)
}

/// The tree to build from.
///
/// # Errors
/// No git, no network, a tag that is not the pinned commit, local changes.
pub fn obtain_tree(
    plan: &BuildrootPlan,
    cache: &Utf8Path,
    choice: &TreeChoice,
) -> Result<BuildrootTree> {
    if let Some(own) = &choice.own {
        let path = own
            .canonicalize_utf8()
            .with_context(|| format!("looking for the Buildroot tree {own}"))?;
        return inspect_checkout(&path, choice.allow_changes);
    }
    let path = pinned_path(cache, &plan.release);
    if !path.join("Makefile").is_file() {
        clone_tag(plan, &path, choice.offline)?;
    }
    let tree = inspect_checkout(&path, false)?;
    if tree.commit != plan.commit {
        bail!(
            "the tree {path} is at commit {}, but the product pins {} as {}\n\
             help: remove the directory to clone it again; if upstream moved the tag, find \
             out why \
             before you change `rootfs.buildroot.commit`",
            tree.commit,
            plan.release,
            plan.commit
        );
    }
    Ok(tree)
}

/// Clones the tag beside its final place, checks the commit, and renames.
fn clone_tag(plan: &BuildrootPlan, path: &Utf8Path, offline: bool) -> Result<()> {
    let BuildrootPlan { url, release, commit, .. } = plan;
    if offline {
        bail!(
            "Buildroot {release} is not in the cache, and --offline forbids downloads\n\
             help: clone {url} at the tag {release} to {path} on a machine with a network and copy it \
             here, or use a checkout with --buildroot"
        );
    }
    let parent = path.parent().context("the cache has a directory")?;
    fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
    // With two builds at once, the second one waits and finds the tree.
    let lock_path = Utf8PathBuf::from(format!("{path}.lock"));
    let lock = File::create(&lock_path).with_context(|| format!("creating {lock_path}"))?;
    lock.lock().with_context(|| format!("locking {lock_path}"))?;
    if path.join("Makefile").is_file() {
        return Ok(());
    }
    let partial = crate::artifact::partial_path(path);
    for leftover in [&partial, path] {
        if leftover.exists() {
            fs::remove_dir_all(leftover).with_context(|| format!("clearing {leftover}"))?;
        }
    }
    say("base", format!("cloning Buildroot {release} from {url}"));
    git::git_without_repository()
        .args(["-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1"])
        .args(["--branch", release, "--", url])
        .arg(&partial)
        .run()
        .with_context(|| {
            format!(
                "cloning Buildroot {release}\n\
                 help: if {url} is not reachable, set `rootfs.buildroot.url` to a mirror, clone \
                 the tag \
                 to {path} manually, or use a checkout with --buildroot"
            )
        })?;
    let tag = format!("refs/tags/{release}^{{commit}}");
    let found = git::git_in(&partial).args(["rev-parse", "--verify", &tag]).read()?;
    if found.trim() != commit {
        let found = found.trim().to_owned();
        fs::remove_dir_all(&partial).with_context(|| format!("removing {partial}"))?;
        bail!(
            "{url}: the tag {release} is commit {found}, but the product pins {commit}\n\
             help: if upstream moved the tag, find out why; else correct `rootfs.buildroot.commit`"
        );
    }
    fs::rename(&partial, path).with_context(|| format!("renaming {partial}"))
}

/// Reads commit and changes of a checkout.
fn inspect_checkout(path: &Utf8Path, allow_changes: bool) -> Result<BuildrootTree> {
    if !path.join("Makefile").is_file() || !path.join("package/Config.in").is_file() {
        bail!("{path} is not a Buildroot tree (no Makefile or no package/Config.in)");
    }
    let top = git::git_in(path).args(["rev-parse", "--show-toplevel"]).read().unwrap_or_default();
    if top.trim() != path {
        bail!(
            "{path} is not a git checkout of Buildroot, so its content cannot be identified\n\
             help: use a clone, or run `git init` and commit the files"
        );
    }
    let commit = git::git_in(path).args(["rev-parse", "HEAD"]).read()?.trim().to_owned();
    let status = git::git_in(path).args(["status", "--porcelain"]).read()?;
    if status.trim().is_empty() {
        let (path, changes) = (path.to_owned(), String::new());
        return Ok(BuildrootTree { path, commit, changes, changed: BTreeMap::new() });
    }
    let lines: Vec<&str> = status.lines().collect();
    if !allow_changes {
        bail!(
            "the Buildroot tree {path} has local changes:\n{}\n\
             help: put patches into external/patches. Commit or undo the changes; for a trial, \
             --buildroot with --allow-changes accepts a changed tree",
            lines.iter().take(10).map(|l| format!("  | {l}")).collect::<Vec<_>>().join("\n")
        );
    }
    warn(format!("the Buildroot tree {path} has {} changed files", lines.len()));
    let mut text = git::git_in(path)
        .args(["diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD"])
        .read_bytes()?;
    let list = ["ls-files", "-z", "--others", "--exclude-standard"];
    let others = git::git_in(path).args(list).read()?;
    for name in others.split('\0').filter(|name| !name.is_empty()) {
        let content = fs::read(path.join(name)).with_context(|| format!("reading {name}"))?;
        text.extend_from_slice(name.as_bytes());
        text.extend_from_slice(&content);
    }
    let changes = crate::artifact::hash_bytes(&text);
    let modified = list_changed(path, "HEAD")?;
    let names = modified.iter().map(String::as_str).chain(others.split('\0'));
    let mut changed = BTreeMap::new();
    for name in names.filter(|name| !name.is_empty()) {
        changed.insert(Utf8PathBuf::from(name), hash_or_empty(&path.join(name))?);
    }
    Ok(BuildrootTree { path: path.to_owned(), commit, changes, changed })
}

/// The hash of a file; empty when there is none.
fn hash_or_empty(path: &Utf8Path) -> Result<String> {
    if path.is_file() { Ok(hash_file(path)?.1) } else { Ok(String::new()) }
}

/// The files of the checkout that differ from a commit, apart from new ones.
fn list_changed(path: &Utf8Path, commit: &str) -> Result<Vec<String>> {
    let text = git::git_in(path)
        .args(["diff", "--name-only", "--no-renames", "--no-ext-diff", "-z", commit])
        .read()?;
    Ok(text.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

impl BuildrootTree {
    /// The files that differ from an earlier state of the checkout: its commit, and its files with
    /// local changes. `None` when the checkout does not contain that commit.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn changed_since(
        &self,
        commit: &str,
        changed: &BTreeMap<Utf8PathBuf, String>,
    ) -> Result<Option<BTreeSet<Utf8PathBuf>>> {
        let Ok(differ) = list_changed(&self.path, commit) else { return Ok(None) };
        let differ = differ.into_iter().map(Utf8PathBuf::from);
        let mut found: BTreeSet<Utf8PathBuf> =
            differ.chain(self.changed.keys().cloned()).chain(changed.keys().cloned()).collect();
        // A change that was there before, committed now or not.
        for (path, hash) in changed {
            if hash_or_empty(&self.path.join(path))? == *hash {
                found.remove(path);
            }
        }
        Ok(Some(found))
    }
}
