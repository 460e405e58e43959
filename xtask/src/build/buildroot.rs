//! The stage `base` of the engine `buildroot`.

use anyhow::{Context, Result, bail};
use camino::Utf8Path;

use super::BuildContext;
use super::base::{self, BuiltBase, prune_rules};
use crate::artifact::{hash_bytes, hash_file, none_if_missing};
use crate::cache::CacheKey;
use crate::config;
use crate::config::product::Engine;
use crate::ext4::Mke2fs;
use crate::git;
use crate::plan::fragment;
use crate::progress::say;
use crate::render::defconfig_title;
use crate::rootfs::buildroot::collect::{CollectRequest, collect_base};
use crate::rootfs::buildroot::engine::{self, BuildrootRequest};
use crate::rootfs::buildroot::make::{BuildrootSetup, BuildrootSite};
use crate::rootfs::buildroot::overrides;
use crate::rootfs::buildroot::rebuild::list_files;
use crate::rootfs::buildroot::tree::{self, BuildrootTree, TreeChoice};
use crate::rootfs::debian::PackagesLock;

/// Raised when a change of the engine's code changes its output.
const BUILDROOT_VERSION: u32 = 2;

/// The name of the output directory: two checkouts of the workspace do not share output, since it
/// contains absolute paths to the external tree.
pub fn output_name(root: &Utf8Path, product: &str, board: &str) -> String {
    let id = hash_bytes(root.as_str().as_bytes());
    format!("{product}-{board}-{}", id.get(..8).unwrap_or(&id))
}

/// All inputs of Buildroot's output. Overlays, wheels and the agent are not part of it.
fn base_key(build: &BuildContext<'_>, tree: &BuildrootTree, epoch: u64) -> Result<CacheKey> {
    let plan = build.plan;
    let pinned = plan.rootfs.buildroot.as_ref().context("the engine has a pinned release")?;
    let requests: Vec<String> =
        pinned.defconfig.0.iter().map(fragment::SymbolRequest::line).collect();
    let external = build.root.join("external");
    let mut files = Vec::new();
    for path in list_files(&external)? {
        let inside = path.strip_prefix(&external).unwrap_or(&path).to_owned();
        files.push((inside, hash_file(&path)?.1));
    }
    let board = &plan.board;
    let mut key = CacheKey::new("buildroot", BUILDROOT_VERSION);
    // A directory's content decides, its name and commit are in the list of packages.
    for source in &pinned.overrides {
        let value = format!("{} {}", source.version(), source.content);
        key = key.with(&format!("source of {}", source.package), value);
    }
    key.with("commit", &tree.commit)
        .with("changes", &tree.changes)
        .with("epoch", epoch.to_string())
        .with_json("requests", &requests)?
        .with_json("external", &files)?
        .with_json("prune", &prune_rules(build)?)?
        .with_json("device trees", &board.device_trees)?
        .with_json("firmware", &board.firmware)?
        .with_json("boot loader", &board.bootloader)?
        .with_json("modules", &board.modules_keep)
}

/// The stage `base`.
///
/// # Errors
/// A tree that is not the pinned one; a failing engine; a file that the board needs and that was
/// not built.
pub fn build_base(build: &mut BuildContext<'_>) -> Result<BuiltBase> {
    let plan = build.plan;
    let pinned = plan.rootfs.buildroot.clone().context("the engine has a pinned release")?;
    let choice = TreeChoice {
        own: build.options.buildroot.clone(),
        allow_changes: build.options.allow_changes,
        offline: build.options.offline,
    };
    let tree = tree::obtain_tree(&pinned, &build.cache.root, &choice)?;
    let epoch = commit_time(&tree)?;
    let key = base_key(build, &tree, epoch)?;
    let name = output_name(build.root, &plan.product.name, &plan.board.name);
    let mut setup = BuildrootSetup::new(&build.cache.root, &tree.path, build.root, &name)?;
    setup.overrides.clone_from(&pinned.overrides);
    let (title, site) = (defconfig_title(plan), BuildrootSite::of_machine(build.options.offline)?);
    let log = build.log("base");
    let request = BuildrootRequest {
        plan: &pinned,
        title: &title,
        tree: &tree,
        setup: &setup,
        site: &site,
        log: &log,
        yes: build.options.yes,
    };
    let made = build.stage("base", key, BuiltBase::files, BuiltBase::describe, |build, dir| {
        // Fetched first, so that what comes later needs no network.
        host_tool(build)?;
        let info = engine::run_build(&request)?;
        overrides::require_unchanged(&setup)?;
        let wants = CollectRequest {
            device_trees: &plan.board.device_trees,
            firmware: &plan.board.firmware,
            bootloader: plan.board.bootloader.as_deref(),
            modules: &plan.board.modules_keep,
            prune: &prune_rules(build)?,
            arch: &plan.board.arch,
            epoch,
        };
        let system = collect_base(&setup, &info, &wants, dir)
            .context("collecting the output of Buildroot")?;
        engine::require_libc(&pinned.libc, &system.glibc)?;
        let key = dir.file_name().unwrap_or_default().to_owned();
        Ok(BuiltBase { system, replaced: Vec::new(), epoch, key })
    })?;
    if build.options.legal_info {
        legal_info(build, &request)?;
    }
    Ok(made)
}

/// Licence texts and sources, linked beside the other results: they are as large as the downloads.
fn legal_info(build: &BuildContext<'_>, request: &BuildrootRequest<'_>) -> Result<()> {
    let dir = engine::legal_info(request)?;
    let link = build.dist.join("legal-info");
    none_if_missing(std::fs::remove_file(&link)).with_context(|| format!("replacing {link}"))?;
    std::os::unix::fs::symlink(&dir, &link).with_context(|| format!("linking {link}"))?;
    say("legal", format!("{} -> {dir}", link.strip_prefix(build.root).unwrap_or(&link)));
    Ok(())
}

/// The time of the tree's commit: the files of a release have it on every build machine.
fn commit_time(tree: &BuildrootTree) -> Result<u64> {
    git::commit_time(&tree.path).context("reading the time of Buildroot's commit")
}

/// An `mke2fs` that reads tars: the machine's own if it is new enough, else the one in the package
/// lock of a product with the engine `debian`.
pub(super) fn host_tool(build: &BuildContext<'_>) -> Result<Mke2fs> {
    if let Some(program) = crate::exec::find_program("mke2fs") {
        let own = Mke2fs { program, libraries: Vec::new() };
        if own.version().is_ok() {
            return Ok(own);
        }
    }
    for name in crate::config::list_products(build.root)? {
        let Ok(product) = config::read_product(build.root, &name) else { continue };
        if product.rootfs.engine.value != Engine::Debian {
            continue;
        }
        if let Some(path) = &product.rootfs.lock {
            let lock = PackagesLock::load(&build.root.join(&path.value))?;
            return base::host_tool(build, &lock);
        }
    }
    bail!(
        "this machine's mke2fs is older than 1.47.1 and cannot create a filesystem from a tar\n\
         help: install e2fsprogs 1.47.1 or newer (Debian 13 has it)"
    )
}
