//! Packages that are built from a source directory instead of their release (Buildroot's
//! `<PKG>_OVERRIDE_SRCDIR`): which ones, the content of the directories, and what must be built again
//! after a change in them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::info::BuildrootInfo;
use super::make::BuildrootSetup;
use crate::artifact::{hash_bytes, hash_file, none_if_missing, write_atomically};
use crate::config::product::Engine;
use crate::config::reader::{ConfigSource, nearest_name};
use crate::git;
use crate::parallel;
use crate::plan::{OverridePlan, Plan};
use crate::progress::{ProgressStep, ProgressUnit, list_names, warn};

/// The settings of this checkout only, which git ignores.
pub const LOCAL_FILE: &str = "slipway.local.toml";

/// The first line of the `local.mk` that this tool writes.
const HEADER: &str = "# Written by cargo xtask from --override and slipway.local.toml.";

/// The content of a directory: its files have records of their own.
const DIRECTORY: &str = "directory";

/// How the content of a link begins; its target follows.
const LINK: &str = "link ";

/// The kernel's headers, which the C library is built with.
const HEADERS: &str = "linux-headers";

/// What Buildroot does not copy (`RSYNC_VCS_EXCLUSIONS` in its Makefile).
const NOT_COPIED: [&str; 5] = [".svn", ".git", ".hg", ".bzr", "CVS"];

/// A file that was changed this shortly before it was hashed is hashed again: it may be changed
/// again without another time. The coarsest file systems (FAT) count in steps of two seconds.
const RECENT: Duration = Duration::from_secs(2);

/// A package and its source directory, as typed: `linux=../linux`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceOverride {
    /// The package, without the prefix `host-`.
    pub package: String,
    /// Its directory.
    pub directory: Utf8PathBuf,
}

impl std::str::FromStr for SourceOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((package, directory)) if !package.is_empty() && !directory.is_empty() => {
                Ok(Self { package: package.to_owned(), directory: directory.into() })
            }
            _ => Err("expected PKG=DIR, such as linux=../linux".to_owned()),
        }
    }
}

/// Adds source directories to a plan: those in [`LOCAL_FILE`], and those of the option `--override`.
/// A build with one is a development build, also of a release product. `locate_cache` is only called for them: a plan
/// without them needs no cache.
///
/// # Errors
/// An error in [`LOCAL_FILE`]; a directory that does not exist or that Buildroot cannot use; an
/// engine without packages that can be replaced.
pub fn apply_overrides(
    plan: &mut Plan,
    root: &Utf8Path,
    locate_cache: impl FnOnce() -> Result<Utf8PathBuf>,
    asked: &[SourceOverride],
) -> Result<()> {
    let Some(pinned) =
        plan.rootfs.buildroot.as_mut().filter(|_| plan.rootfs.engine == Engine::Buildroot)
    else {
        ensure!(
            asked.is_empty(),
            "--override needs the engine buildroot, but the engine of {} is debian\n\
             help: choose another product with --product",
            plan.product.name
        );
        return Ok(());
    };
    let mut chosen: BTreeMap<String, Utf8PathBuf> = BTreeMap::new();
    for (package, directory) in read_local(root)? {
        ensure!(
            !directory.is_empty(),
            "{LOCAL_FILE}: no directory is named for {package}\n\
             help: name one, or remove the line"
        );
        chosen.insert(package, root.join(directory));
    }
    for SourceOverride { package, directory } in asked {
        chosen.insert(package.clone(), directory.clone());
    }
    if chosen.is_empty() {
        return Ok(());
    }
    let cache = locate_cache()?;
    for (package, directory) in chosen {
        let taken = inspect_directory(&package, &directory, root, &cache)?;
        warn(format!(
            "{package} is built from {}: this is a development build and cannot be released",
            taken.directory
        ));
        pinned.overrides.push(taken);
    }
    plan.product.kind = crate::config::product::BuildKind::Development;
    Ok(())
}

/// Reads `[buildroot.override]` of [`LOCAL_FILE`].
fn read_local(root: &Utf8Path) -> Result<BTreeMap<String, String>> {
    let path = root.join(LOCAL_FILE);
    let Some(bytes) =
        none_if_missing(fs::read(&path)).with_context(|| format!("reading {path}"))?
    else {
        return Ok(BTreeMap::new());
    };
    ConfigSource::new(Utf8Path::new(LOCAL_FILE), bytes)?.parse(|f| {
        let buildroot = f.optional_table("buildroot", |f| {
            Some(f.optional_table("override", |f| Some(f.strings()))?.unwrap_or_default())
        });
        Some(buildroot?.unwrap_or_default())
    })
}

/// A directory with its commit and the hash of its content.
fn inspect_directory(
    package: &str,
    directory: &Utf8Path,
    root: &Utf8Path,
    cache: &Utf8Path,
) -> Result<OverridePlan> {
    let real = directory.canonicalize_utf8().with_context(|| {
        format!(
            "looking for the source directory of {package}, {directory}\n\
             help: correct --override or {LOCAL_FILE}"
        )
    })?;
    ensure!(real.is_dir(), "the source of {package}, {real}, is not a directory");
    // Make and rsync would split a path at other characters, or interpret them.
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+@,=~".contains(&b);
    if let Some(odd) = real.as_str().chars().find(|c| !u8::try_from(*c).is_ok_and(plain)) {
        bail!(
            "Buildroot cannot use the path {real}: it contains {odd:?}\n\
             help: move the directory to a path of letters, digits and /._-+@,=~"
        );
    }
    ensure!(
        package.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b)),
        "invalid package name {package:?}"
    );
    // What a build writes would change while it is built.
    for (own, output) in [(cache.join("buildroot"), "output"), (root.join("dist"), "")] {
        let own = canonical_path(&own);
        ensure!(
            !own.join(output).starts_with(&real) && !real.starts_with(&own),
            "the source directory of {package}, {real}, contains build output or is inside of it\n\
             help: use a directory that neither contains {own} nor is inside of it"
        );
    }
    let tree = SourceTree::read(&real, cache)?;
    let leaving = tree.links_out_of(&real);
    if !leaving.is_empty() {
        warn(format!(
            "{package}: links lead out of {real}, and a change behind them is not noticed: {}",
            list_names(&leaving)
        ));
    }
    let (commit, modified) = checkout_state(&real);
    Ok(OverridePlan {
        package: package.to_owned(),
        name: real.file_name().unwrap_or("root").to_owned(),
        directory: real,
        commit,
        modified,
        content: tree.content(),
    })
}

/// The canonical form of a path whose last parts need not exist.
fn canonical_path(path: &Utf8Path) -> Utf8PathBuf {
    let mut all = path.ancestors();
    let found = all.find_map(|above| {
        let real = above.canonicalize_utf8().ok()?;
        let rest = path.strip_prefix(above).ok()?;
        Some(if rest.as_str().is_empty() { real } else { real.join(rest) })
    });
    found.unwrap_or_else(|| path.to_owned())
}

/// The commit of a git checkout, and whether files differ from it; only for names: what is built is
/// identified by its content.
fn checkout_state(dir: &Utf8Path) -> (Option<String>, bool) {
    let read = |args: &[&str]| git::git_in(dir).args(args).read().ok();
    let top = read(&["rev-parse", "--show-toplevel"]);
    if top.as_deref().map(str::trim) != Some(dir.as_str()) {
        return (None, false);
    }
    let commit = read(&["rev-parse", "HEAD"]).map(|text| text.trim().to_owned());
    let modified = read(&["status", "--porcelain"]).is_none_or(|text| !text.trim().is_empty());
    (commit, modified)
}

/// What Buildroot would copy of a directory: a record for each file, by path.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct SourceTree {
    files: BTreeMap<String, FileRecord>,
}

/// One file, link or directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileRecord {
    /// Kind and executable bit with the hash of the content, or with the target of a link.
    content: String,
    /// Inode, size, times of change and of modification in nanoseconds since 1970: a file in which
    /// none of them differs has the same content.
    stat: (u64, u64, i128, i128),
    /// It was changed shortly before it was hashed.
    recent: bool,
}

impl SourceTree {
    /// Reads a directory; hashes only what is not known from the last time.
    fn read(dir: &Utf8Path, cache: &Utf8Path) -> Result<Self> {
        let id = hash_bytes(dir.as_str().as_bytes());
        let known_path = cache.join("buildroot/overrides").join(format!("{id}.json"));
        let known = Self::load(&known_path)?;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut found = Vec::new();
        list_entries(dir, "", &mut found)?;
        let reusable = |path: &str, about: &Metadata| {
            known.files.get(path).filter(|old| !old.recent && old.stat == stat_of(about))
        };
        let fresh: u64 = found
            .iter()
            .filter(|(path, about)| about.is_file() && reusable(path, about).is_none())
            .map(|(_, about)| about.len())
            .sum();
        let what = format!("hashing {}", dir.file_name().unwrap_or("sources"));
        let step = ProgressStep::new("sources", what, fresh, ProgressUnit::Bytes);
        let records = parallel::map(&found, parallel::cores(), |(path, about)| {
            if let Some(old) = reusable(path, about) {
                return Ok(old.clone());
            }
            let content = content_of(&dir.join(path), about)?;
            if about.is_file() {
                step.advance(about.len());
            }
            let changed = Duration::new(
                u64::try_from(about.ctime()).unwrap_or_default(),
                u32::try_from(about.ctime_nsec()).unwrap_or_default(),
            );
            let recent = changed + RECENT >= started;
            Ok(FileRecord { content, stat: stat_of(about), recent })
        })?;
        drop(step);
        let files = found.into_iter().map(|(path, _)| path).zip(records).collect();
        let tree = Self { files };
        // Without this file the next build reads everything again, and finds the same.
        if tree.files != known.files
            && let Err(error) = tree.save(&known_path)
        {
            warn(format!("{error:#}"));
        }
        Ok(tree)
    }

    /// The records in a file; none where it does not exist or has another form.
    fn load(path: &Utf8Path) -> Result<Self> {
        let text = none_if_missing(fs::read(path)).with_context(|| format!("reading {path}"))?;
        Ok(text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default())
    }

    fn save(&self, path: &Utf8Path) -> Result<()> {
        let json = serde_json::to_vec(self).context("describing a source directory")?;
        write_atomically(path, |out| Ok(out.write_all(&json)?))
    }

    /// The links to something outside of the directory.
    fn links_out_of(&self, dir: &Utf8Path) -> Vec<&str> {
        let links = self.files.iter().filter(|(_, file)| file.content.starts_with(LINK));
        let leaves =
            |path: &str| dir.join(path).canonicalize_utf8().is_ok_and(|end| !end.starts_with(dir));
        links.map(|(path, _)| path.as_str()).filter(|path| leaves(path)).collect()
    }

    /// The hash of all names and contents.
    fn content(&self) -> String {
        let lines: String =
            self.files.iter().map(|(path, file)| format!("{path}\0{}\n", file.content)).collect();
        hash_bytes(lines.as_bytes())
    }
}

/// All files, links and directories below a directory, without what Buildroot does not copy.
fn list_entries(dir: &Utf8Path, below: &str, found: &mut Vec<(String, Metadata)>) -> Result<()> {
    let here = dir.join(below);
    for entry in fs::read_dir(&here).with_context(|| format!("listing {here}"))? {
        let entry = entry.with_context(|| format!("listing {here}"))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            bail!(
                "the name of {} is not UTF-8\nhelp: rename or remove the file",
                entry.path().display()
            );
        };
        if NOT_COPIED.contains(&name) {
            continue;
        }
        let path = match below {
            "" => name.to_owned(),
            below => format!("{below}/{name}"),
        };
        // Editors make files for a moment.
        let about = none_if_missing(entry.metadata());
        let about = about.with_context(|| format!("reading {}", dir.join(&path)))?;
        let Some(about) = about else { continue };
        let is_dir = about.is_dir();
        found.push((path.clone(), about));
        if is_dir {
            list_entries(dir, &path, found)?;
        }
    }
    Ok(())
}

fn stat_of(about: &Metadata) -> (u64, u64, i128, i128) {
    let time = |seconds: i64, nanoseconds: i64| {
        i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
    };
    // The size and the times of a directory change with its files, which have their own records.
    if about.is_dir() {
        return (about.ino(), 0, 0, 0);
    }
    let changed = time(about.ctime(), about.ctime_nsec());
    (about.ino(), about.len(), changed, time(about.mtime(), about.mtime_nsec()))
}

fn content_of(path: &Utf8Path, about: &Metadata) -> Result<String> {
    Ok(if about.is_symlink() {
        let target = path.read_link_utf8().with_context(|| format!("reading {path}"))?;
        format!("{LINK}{target}")
    } else if about.is_file() {
        // Buildroot copies no other bits (`--chmod=u=rwX,go=rX`).
        let kind = if about.mode() & 0o111 == 0 { "file" } else { "program" };
        format!("{kind} {}", hash_file(path)?.1)
    } else if about.is_dir() {
        DIRECTORY.to_owned()
    } else {
        "special file".to_owned()
    })
}

/// Writes or removes the output directory's `local.mk`.
///
/// # Errors
/// A `local.mk` that was written by hand; a file that cannot be read or written.
pub fn write_local_mk(setup: &BuildrootSetup) -> Result<()> {
    let path = setup.output.join("local.mk");
    let old =
        none_if_missing(fs::read_to_string(&path)).with_context(|| format!("reading {path}"))?;
    if let Some(old) = &old
        && !old.starts_with(HEADER)
    {
        bail!(
            "{path} was written by hand: builds would not notice changes in the directories that it names\n\
             help: move its entries to [buildroot.override] in {LOCAL_FILE}, and remove the file"
        );
    }
    let mut text = format!("{HEADER}\n");
    for OverridePlan { package, directory, .. } in &setup.overrides {
        let name = package.to_uppercase().replace(['-', '.'], "_");
        let line = format!("{name}_OVERRIDE_SRCDIR = {directory}\n");
        // If the headers are those of the kernel, Buildroot takes them from the kernel's directory, and
        // refuses a separate one.
        text.push_str(&match package.as_str() {
            HEADERS => format!("ifneq ($(BR2_KERNEL_HEADERS_AS_KERNEL),y)\n{line}endif\n"),
            _ => line,
        });
    }
    let named = |name| setup.overrides.iter().any(|source| source.package == name);
    if named("linux") && !named(HEADERS) {
        // Otherwise a change in the kernel would rebuild the C library and everything that uses it.
        text.push_str("override LINUX_HEADERS_OVERRIDE_SRCDIR :=\n");
    }
    match (&old, setup.overrides.is_empty()) {
        (Some(_), true) => fs::remove_file(&path).with_context(|| format!("removing {path}")),
        (None, true) => Ok(()),
        (Some(old), false) if *old == text => Ok(()),
        (_, false) => write_atomically(&path, |out| Ok(out.write_all(text.as_bytes())?)),
    }
}

/// Each package that has a source directory must exist.
///
/// # Errors
/// A name that neither this configuration nor the tree has.
pub fn require_known(info: &BuildrootInfo, setup: &BuildrootSetup) -> Result<()> {
    for OverridePlan { package, directory, .. } in &setup.overrides {
        if affected(package, info).next().is_some() {
            continue;
        }
        // `slipway.local.toml` applies to all boards, and this board may not need the package.
        if has_recipe(&setup.tree, package) || has_recipe(&setup.external, package) {
            warn(format!("this board does not build {package}: {directory} is not used"));
            continue;
        }
        let names = info.packages().map(|(name, _)| name.strip_prefix("host-").unwrap_or(name));
        let near = nearest_name(package, names);
        bail!(
            "Buildroot has no package {package}, for which a source directory was given\n\
             help: {}",
            near.map_or("correct --override or slipway.local.toml".to_owned(), |near| format!(
                "did you mean {near}?"
            ))
        );
    }
    Ok(())
}

/// Whether a tree has a recipe `<name>/<name>.mk`, at most three directories deep.
fn has_recipe(tree: &Utf8Path, name: &str) -> bool {
    let own = Utf8Path::new(name).join(format!("{name}.mk"));
    ["", "boot", "toolchain", "package"].iter().any(|dir| tree.join(dir).join(&own).is_file())
        || tree
            .join("package")
            .read_dir_utf8()
            .is_ok_and(|dirs| dirs.flatten().any(|dir| dir.path().join(&own).is_file()))
}

/// The packages of a configuration that a source directory is used for: the one for the target and
/// the one for the host.
pub(super) fn affected<'a>(
    package: &'a str,
    info: &'a BuildrootInfo,
) -> impl Iterator<Item = &'a str> {
    let host = format!("host-{package}");
    info.packages().map(|(name, _)| name).filter(move |name| *name == package || *name == host)
}

/// Whether make can continue in a package's build directory after Buildroot copies the changes from
/// the source directory: no file was removed, and each changed file is newer than everything that was
/// built. Otherwise make would keep results of the former content.
///
/// # Errors
/// When a directory cannot be read.
pub(super) fn can_continue(
    setup: &BuildrootSetup,
    info: &BuildrootInfo,
    plan: &OverridePlan,
) -> Result<bool> {
    let new = SourceTree::read(&plan.directory, setup.cache_root())?;
    let old = SourceTree::load(&record_path(setup, &plan.package))?;
    if old.files.keys().any(|path| !new.files.contains_key(path)) {
        return Ok(false);
    }
    let changed: Vec<(&String, &FileRecord)> = new
        .files
        .iter()
        .filter(|(path, file)| old.files.get(*path).is_none_or(|old| old.content != file.content))
        .filter(|(_, file)| file.content != DIRECTORY)
        .collect();
    if changed.is_empty() {
        return Ok(true);
    }
    for name in affected(&plan.package, info) {
        let Some(entry) = info.0.get(name) else { continue };
        let built = setup.output.join(&entry.stamp_dir);
        let mut files = Vec::new();
        if built.is_dir() {
            list_entries(&built, "", &mut files)?;
        }
        let newest = files.iter().filter(|(_, a)| !a.is_dir()).map(|(_, a)| stat_of(a).3).max();
        let newest = newest.unwrap_or(i128::MIN);
        for (path, file) in &changed {
            // Buildroot may have copied it after it was hashed last.
            let copy = built.join(path);
            let same =
                copy.symlink_metadata().ok().and_then(|about| content_of(&copy, &about).ok());
            if same.as_ref() != Some(&file.content) && file.stat.3 <= newest {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Records what is about to be built, for the next comparison.
///
/// # Errors
/// When a record cannot be written.
pub(super) fn save_records(setup: &BuildrootSetup) -> Result<()> {
    for plan in &setup.overrides {
        let tree = SourceTree::read(&plan.directory, setup.cache_root())?;
        tree.save(&record_path(setup, &plan.package))?;
    }
    Ok(())
}

/// Removes a record: then the build directory itself is compared.
///
/// # Errors
/// When it cannot be removed.
pub(super) fn remove_record(setup: &BuildrootSetup, package: &str) -> Result<()> {
    let path = record_path(setup, package);
    none_if_missing(fs::remove_file(&path)).with_context(|| format!("removing {path}"))?;
    Ok(())
}

fn record_path(setup: &BuildrootSetup, package: &str) -> Utf8PathBuf {
    setup.output.join(format!("slipway-override-{package}.json"))
}

/// Each directory must have the content that the build began with.
///
/// # Errors
/// A directory that was changed while it was built.
pub fn require_unchanged(setup: &BuildrootSetup) -> Result<()> {
    let mut changed = BTreeSet::new();
    for plan in &setup.overrides {
        if SourceTree::read(&plan.directory, setup.cache_root())?.content() != plan.content {
            changed.insert(plan.directory.as_str());
        }
    }
    let list: Vec<&str> = changed.into_iter().collect();
    ensure!(
        list.is_empty(),
        "source directories were changed during the build: {}\n\
         help: run the same command again; it builds the changed packages",
        list.join(", ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use super::*;

    fn folder(dir: &tempfile::TempDir) -> Utf8PathBuf {
        let path = Utf8PathBuf::try_from(dir.path().to_owned()).expect("UTF-8");
        path.canonicalize_utf8().expect("a directory")
    }

    #[test]
    fn links_to_what_is_not_copied_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let (src, cache) = (folder(&dir).join("src"), folder(&dir).join("cache"));
        fs::create_dir_all(src.join("drivers")).expect("a directory");
        fs::write(folder(&dir).join("mine.c"), "x").expect("written");
        for (target, link) in [
            ("../mine.c", "out"),
            ("../../mine.c", "drivers/mine.c"),
            ("drivers/../drivers", "inside"),
            ("../none", "dangling"),
            ("loop", "loop"),
        ] {
            symlink(target, src.join(link)).expect("a link");
        }
        let tree = SourceTree::read(&src, &cache).expect("read");
        assert_eq!(tree.links_out_of(&src), ["drivers/mine.c", "out"]);
        assert_eq!(canonical_path(&src.join("a/b")), src.join("a/b"));
        assert_eq!(canonical_path(&src.join("inside/x")), src.join("drivers/x"));
    }

    #[test]
    fn a_name_that_is_not_utf_8_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join(OsStr::from_bytes(b"a\xff")), "").expect("written");
        let error = list_entries(&folder(&dir), "", &mut Vec::new()).expect_err("a name");
        assert!(error.to_string().contains("is not UTF-8\nhelp: rename"), "{error}");
    }
}
