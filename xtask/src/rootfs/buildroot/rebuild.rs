//! What must be rebuilt after a change of the configuration. Buildroot itself does not check: it
//! builds what has no stamp. Exactly the packages that a change affects are cleaned; where these
//! are unknown, the whole output is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::expr::KconfigValues;
use super::info::BuildrootInfo;
use super::make::BuildrootSetup;
use super::overrides;
use super::tree::BuildrootTree;
use crate::artifact::{hash_bytes, hash_file, write_atomically};

/// The file in the output directory that describes what is being built there.
const STATE: &str = "slipway-state.json";

/// Everything that determines the content of an output directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct OutputState {
    /// The tree's commit and changes.
    pub tree: String,
    /// The tree's files with local changes: hash by path.
    #[serde(default)]
    pub tree_changed: BTreeMap<Utf8PathBuf, String>,
    /// `.config`: each symbol that is set.
    pub config: BTreeMap<String, String>,
    /// What each package needs.
    pub dependencies: BTreeMap<String, BTreeSet<String>>,
    /// Files that symbols refer to: hash by symbol and path.
    pub files: BTreeMap<String, BTreeMap<Utf8PathBuf, String>>,
    /// The external tree: hash by path, without the files above.
    pub external: BTreeMap<Utf8PathBuf, String>,
    /// Packages that are built from a source directory.
    #[serde(default)]
    pub overrides: BTreeMap<String, OverrideState>,
}

/// A source directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct OverrideState {
    /// The directory.
    pub directory: Utf8PathBuf,
    /// The hash of its content.
    pub content: String,
    /// Make can continue in the package's build directory.
    #[serde(skip)]
    pub can_continue: bool,
}

/// What to do before the next make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RebuildAction {
    /// Nothing: make continues.
    Nothing,
    /// Targets of make, `<package>-dirclean` or `<package>-reconfigure`, with the reasons.
    Targets(BTreeMap<String, BTreeSet<String>>),
    /// `make clean`, for this reason.
    Everything(String),
}

/// Packages with their own Kconfig: a changed fragment is merged again without building from
/// scratch (Buildroot manual, "Infrastructure for packages using kconfig").
const KCONFIG: [&str; 3] = ["linux", "uboot", "busybox"];

/// Symbols that affect only the last steps, which every make runs, or no file at all. Those of the
/// workspace (`BR2_EXTERNAL_SLIPWAY_VERSION` is its commit) and of the build machine are written by
/// Buildroot itself: the files of the external tree and the packages' dependencies are compared
/// instead.
const HARMLESS: [&str; 24] = [
    "BR2_BACKUP_SITE",
    "BR2_CCACHE",
    "BR2_DEFCONFIG",
    "BR2_DL_DIR",
    "BR2_DOWNLOAD_FORCE_CHECK_HASHES",
    "BR2_EXTERNAL_",
    "BR2_GLOBAL_PATCH_DIR",
    "BR2_HOST_CMAKE_AT_LEAST",
    "BR2_HOST_DIR",
    "BR2_HOST_GCC_",
    "BR2_JLEVEL",
    "BR2_KERNEL_MIRROR",
    "BR2_NEEDS_HOST_",
    "BR2_PRIMARY_SITE",
    "BR2_ROOTFS_OVERLAY",
    "BR2_ROOTFS_POST",
    "BR2_ROOTFS_PRE",
    "BR2_TARGET_GENERIC_GETTY",
    "BR2_TARGET_GENERIC_HOSTNAME",
    "BR2_TARGET_GENERIC_ISSUE",
    "BR2_TARGET_GENERIC_ROOT",
    "BR2_TARGET_ROOTFS_",
    "BR2_VERSION",
    "BR2_WGET",
];

/// Files of Buildroot's tree that no build reads, or only through a symbol that names them.
const UNUSED: [&str; 9] = [
    ".editorconfig",
    ".gitlab-ci.yml",
    ".gitignore",
    "CHANGES",
    "DEVELOPERS",
    "README",
    "configs",
    "docs",
    "support/testing",
];

impl OutputState {
    /// The description of what is about to be built.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn describe(
        setup: &BuildrootSetup,
        tree: &BuildrootTree,
        config: &str,
        info: &BuildrootInfo,
    ) -> Result<Self> {
        let config = KconfigValues::parse(config).0;
        let mut files: BTreeMap<String, BTreeMap<Utf8PathBuf, String>> = BTreeMap::new();
        let mut named = BTreeSet::new();
        let external = setup.external.as_str();
        for (symbol, value) in &config {
            let value = value.replace("$(BR2_EXTERNAL_SLIPWAY_PATH)", external);
            for word in value.split_whitespace() {
                let path = setup.tree.join(word);
                if word.contains('/') && path.is_file() {
                    let hash = hash_file(&path)?.1;
                    files.entry(symbol.clone()).or_default().insert(path.clone(), hash);
                    named.insert(path);
                }
            }
        }
        let mut list = BTreeMap::new();
        for path in list_files(&setup.external)?.into_iter().filter(|path| !named.contains(path)) {
            let hash = hash_file(&path)?.1;
            let inside = path.strip_prefix(&setup.external).unwrap_or(&path).to_owned();
            list.insert(inside, hash);
        }
        let dependencies =
            info.packages().map(|(n, e)| (n.to_owned(), e.dependencies.clone())).collect();
        let mut overrides = BTreeMap::new();
        for plan in &setup.overrides {
            let state = OverrideState {
                directory: plan.directory.clone(),
                content: plan.content.clone(),
                can_continue: overrides::can_continue(setup, info, plan)?,
            };
            overrides.insert(plan.package.clone(), state);
        }
        Ok(Self {
            overrides,
            tree: format!("{} {}", tree.commit, tree.changes),
            tree_changed: tree.changed.clone(),
            config,
            dependencies,
            files,
            external: list,
        })
    }

    /// The description of what was built there before.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn load(output: &Utf8Path) -> Result<Option<Self>> {
        let path = output.join(STATE);
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs::read(&path).with_context(|| format!("reading {path}"))?;
        // The file of another version of this tool is ignored: everything is rebuilt.
        Ok(serde_json::from_slice(&text).ok())
    }

    /// Saves it before make starts: after an interruption, the next build is compared with the one
    /// that was started.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, output: &Utf8Path) -> Result<()> {
        let json = serde_json::to_vec_pretty(self)
            .context("encoding the description of the output directory")?;
        write_atomically(&output.join(STATE), |out| Ok(out.write_all(&json)?))
    }

    /// Records that make is run with these source directories outside of a build: the next build
    /// cannot know what that leaves in the output directory, so it builds their packages again.
    /// Otherwise a build of the release could keep what was made from a source directory.
    ///
    /// # Errors
    /// When the description cannot be read or written.
    pub fn mark_sources(setup: &BuildrootSetup) -> Result<()> {
        // Without a description, everything is built again.
        let Some(mut state) = Self::load(&setup.output)? else { return Ok(()) };
        for plan in &setup.overrides {
            let source = state.overrides.entry(plan.package.clone()).or_insert_with(|| {
                OverrideState { directory: plan.directory.clone(), ..OverrideState::default() }
            });
            if source.directory != plan.directory {
                source.directory = Utf8PathBuf::new();
            }
        }
        if state.overrides.is_empty() {
            return Ok(());
        }
        for (package, source) in &mut state.overrides {
            source.content.clear();
            overrides::remove_record(setup, package)?;
        }
        state.save(&setup.output)
    }

    /// A hash of the whole description.
    ///
    /// # Errors
    /// When it has no JSON form.
    pub fn identity(&self) -> Result<String> {
        Ok(hash_bytes(
            &serde_json::to_vec(self)
                .context("encoding the description of the output directory")?,
        ))
    }
}

/// All files and links below a directory, sorted.
pub fn list_files(dir: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
    let mut found = Vec::new();
    for entry in dir.read_dir_utf8().with_context(|| format!("listing {dir}"))? {
        let entry = entry.with_context(|| format!("listing {dir}"))?;
        if entry.path().is_dir() {
            found.extend(list_files(entry.path())?);
        } else {
            found.push(entry.into_path());
        }
    }
    found.sort();
    Ok(found)
}

/// Why a package must be cleaned, and how.
#[derive(Default)]
struct CleanPlan {
    clean: BTreeMap<String, BTreeSet<String>>,
    reconfigure: BTreeMap<String, BTreeSet<String>>,
    everything: Option<String>,
}

/// Compares what was built with what is requested; another tree is built from scratch.
pub fn compare_states(old: &OutputState, new: &OutputState, info: &BuildrootInfo) -> RebuildAction {
    compare_trees(old, new, info, None)
}

/// The same, where the files are known that differ between the two trees.
pub fn compare_trees(
    old: &OutputState,
    new: &OutputState,
    info: &BuildrootInfo,
    differ: Option<&BTreeSet<Utf8PathBuf>>,
) -> RebuildAction {
    let mut plan = CleanPlan::default();
    if old.tree != new.tree && differ.is_none() {
        return RebuildAction::Everything("the Buildroot tree changed".to_owned());
    }
    let added = |name: &str| !old.dependencies.contains_key(name);
    for path in differ.into_iter().flatten() {
        plan.tree_file(path, info, &added);
    }
    for name in old.dependencies.keys().filter(|name| !new.dependencies.contains_key(*name)) {
        plan.clean(name, "no longer configured".to_owned());
    }
    for (name, needs) in &new.dependencies {
        if let Some(before) = old.dependencies.get(name).filter(|before| *before != needs) {
            let changes: Vec<&str> =
                needs.symmetric_difference(before).map(String::as_str).collect();
            plan.clean(name, format!("its dependencies changed: {}", changes.join(", ")));
        }
    }
    let symbols: BTreeSet<&String> = old.config.keys().chain(new.config.keys()).collect();
    for symbol in symbols.into_iter().filter(|s| old.config.get(*s) != new.config.get(*s)) {
        plan.symbol(symbol, &format!("{symbol} changed"), info, &added);
    }
    for (symbol, files) in &new.files {
        let before = old.files.get(symbol);
        for (path, hash) in files {
            // A symbol that refers to another file now was handled above.
            if before.and_then(|b| b.get(path)).is_some_and(|old| old != hash) {
                plan.file(symbol, path, info);
            }
        }
    }
    let names: BTreeSet<&String> = old.overrides.keys().chain(new.overrides.keys()).collect();
    for package in names {
        plan.source(package, old.overrides.get(package), new.overrides.get(package), info);
    }
    let paths: BTreeSet<&Utf8PathBuf> = old.external.keys().chain(new.external.keys()).collect();
    for path in paths.into_iter().filter(|p| old.external.get(*p) != new.external.get(*p)) {
        plan.external(path, info, &added);
    }
    plan.finish(info)
}

impl CleanPlan {
    fn clean(&mut self, package: &str, why: String) {
        self.clean.entry(package.to_owned()).or_default().insert(why);
    }

    fn symbol(
        &mut self,
        symbol: &str,
        why: &str,
        info: &BuildrootInfo,
        added: &dyn Fn(&str) -> bool,
    ) {
        if HARMLESS.iter().any(|h| symbol.starts_with(h)) {
            return;
        }
        match owning_package(symbol, info) {
            Some(package) if added(&package) => {}
            Some(package) => self.clean(&package, why.to_owned()),
            // A symbol of a package that is not built, or one that summarises others; its effect on
            // packages that are built is in their dependencies.
            None if symbol.starts_with("BR2_PACKAGE_") => {}
            None => {
                self.everything.get_or_insert_with(|| why.to_owned());
            }
        }
    }

    fn file(&mut self, symbol: &str, path: &Utf8Path, info: &BuildrootInfo) {
        let why = format!("{path} changed");
        match owning_package(symbol, info) {
            Some(package) if KCONFIG.contains(&package.as_str()) => {
                self.reconfigure.entry(package).or_default().insert(why);
            }
            Some(package) => self.clean(&package, why),
            None if HARMLESS.iter().any(|h| symbol.starts_with(h)) => {}
            None => {
                self.everything.get_or_insert(why);
            }
        }
    }

    /// A file of Buildroot's own tree.
    fn tree_file(&mut self, path: &Utf8Path, info: &BuildrootInfo, added: &dyn Fn(&str) -> bool) {
        let why = format!("Buildroot's {path} changed");
        let name = path.file_name().unwrap_or_default();
        // The effect of the menus is in `.config`; the source that was built had the right hash.
        let harmless = UNUSED.iter().any(|unused| path.starts_with(unused))
            || name.starts_with("Config.")
            || name.ends_with(".hash");
        if harmless {
            return;
        }
        let parts: Vec<&str> = path.components().map(|c| c.as_str()).collect();
        let (["package" | "boot" | "toolchain", _, _, ..] | ["linux", ..]) = parts.as_slice()
        else {
            self.everything.get_or_insert(why);
            return;
        };
        // Its package, and packages in directories below, which share the file.
        let dir = path.parent().unwrap_or(path);
        let owns = |recipe: &Utf8Path| path.starts_with(recipe) || recipe.starts_with(dir);
        for (name, entry) in info.packages().filter(|(_, e)| !e.package_dir.as_str().is_empty()) {
            if owns(&entry.package_dir) && !added(name) {
                self.clean(name, why.clone());
            }
        }
    }

    /// A package whose source directory is another one, or has another content.
    fn source(
        &mut self,
        package: &str,
        old: Option<&OverrideState>,
        new: Option<&OverrideState>,
        info: &BuildrootInfo,
    ) {
        let (why, can_continue) = match (old, new) {
            (Some(old), Some(new)) if old.directory == new.directory => {
                if old.content == new.content {
                    return;
                }
                (format!("files in {} changed", new.directory), new.can_continue)
            }
            (_, Some(new)) => (format!("its source is now {}", new.directory), false),
            (_, None) => ("its source is the release again".to_owned(), false),
        };
        for name in overrides::affected(package, info) {
            if can_continue {
                self.reconfigure.entry(name.to_owned()).or_default().insert(why.clone());
            } else {
                self.clean(name, why.clone());
            }
        }
    }

    fn external(&mut self, path: &Utf8Path, info: &BuildrootInfo, added: &dyn Fn(&str) -> bool) {
        let why = format!("external/{path} changed");
        let parts: Vec<&str> = path.components().map(|c| c.as_str()).collect();
        match parts.as_slice() {
            // Changed hash files need no rebuild: the source that was built had the right hash
            // already.
            [.., file] if file.ends_with(".hash") => {}
            ["package" | "patches", package, ..] => {
                for name in [(*package).to_owned(), format!("host-{package}")] {
                    if info.0.contains_key(&name) && !added(&name) {
                        self.clean(&name, why.clone());
                    }
                }
            }
            // The menus: their effect is in `.config`.
            ["Config.in" | "external.desc"] => {}
            ["external.mk"] => {
                self.everything.get_or_insert(why);
            }
            // A file that no symbol refers to has no effect.
            _ => {}
        }
    }

    fn finish(self, info: &BuildrootInfo) -> RebuildAction {
        if let Some(why) = self.everything {
            return RebuildAction::Everything(why);
        }
        let toolchain = self.clean.iter().find(|(name, _)| is_toolchain(name));
        if let Some((name, why)) = toolchain {
            let why: Vec<&str> = why.iter().map(String::as_str).collect();
            return RebuildAction::Everything(format!("{name}: {}", why.join(", ")));
        }
        let mut targets: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (name, why) in &self.clean {
            targets.entry(format!("{name}-dirclean")).or_default().extend(why.iter().cloned());
        }
        // With per-package directories each package has a copy of its dependencies; those of
        // packages that need a changed package are outdated.
        for (name, why) in self.clean.iter().chain(&self.reconfigure) {
            for dependent in info.dependents([name.as_str()]).into_iter().filter(|d| d != name) {
                let why = format!("needs {name}, which is rebuilt ({})", first_reason(why));
                targets.entry(format!("{dependent}-dirclean")).or_default().insert(why);
            }
        }
        for (name, why) in &self.reconfigure {
            if !targets.contains_key(&format!("{name}-dirclean")) {
                targets.insert(format!("{name}-reconfigure"), why.clone());
            }
        }
        if targets.is_empty() { RebuildAction::Nothing } else { RebuildAction::Targets(targets) }
    }
}

fn first_reason(why: &BTreeSet<String>) -> &str {
    why.first().map_or("", String::as_str)
}

/// A changed compiler or C library affects everything.
fn is_toolchain(package: &str) -> bool {
    let name = package.strip_prefix("host-").unwrap_or(package);
    ["toolchain", "gcc-", "glibc", "musl", "uclibc", "binutils", "linux-headers", "skeleton"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// The package of a symbol: the longest package name that the symbol begins with.
fn owning_package(symbol: &str, info: &BuildrootInfo) -> Option<String> {
    let upper = |name: &str| name.to_uppercase().replace(['-', '.'], "_");
    let matches = |rest: &str, name: &str| {
        let own = upper(name);
        rest == own || rest.strip_prefix(&own).is_some_and(|r| r.starts_with('_'))
    };
    if symbol.starts_with("BR2_LINUX_KERNEL") {
        return Some("linux".to_owned());
    }
    let rest = ["BR2_PACKAGE_", "BR2_TARGET_"].iter().find_map(|p| symbol.strip_prefix(p))?;
    info.packages()
        .map(|(name, _)| name)
        .filter(|name| matches(rest, name))
        .max_by_key(|name| name.len())
        .map(str::to_owned)
}
