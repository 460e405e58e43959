//! `lock`: resolves packages and wheels again and writes the lock files that builds use.

use anyhow::{Context, Result, bail};

use crate::build::{COMPILER_LOCK, load_mirrors, package_spec, python_target};
use crate::cache::Cache;
use crate::cli::LockArgs;
use crate::config::product::Engine;
use crate::config::reader::ConfigFindings;
use crate::plan;
use crate::progress::say;
use crate::rootfs::debian::{self, AptMirrors, PackagesLock};
use crate::tools::{self, ToolPurpose};
use crate::wheel::{self, LockRequest};
use crate::workspace::{BuildSelection, load_config};

/// `cargo xtask lock`.
///
/// # Errors
/// When there is no network or no solution, or a package or wheel does not exist for the target.
pub fn lock(options: &LockArgs) -> Result<()> {
    tools::require_tools(&[ToolPurpose::Build, ToolPurpose::Debian], true)?;
    let config = load_config(&BuildSelection { product: options.product.clone(), board: None })?;
    let cache = Cache::locate()?;
    let wants = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    if wants("compiler") {
        let new = debian::compiler::lock_compiler(&AptMirrors::from_host()?, &cache.root)?;
        new.save(&config.root.join(COMPILER_LOCK))?;
        say("lock", format!("{COMPILER_LOCK}: {} packages", new.package.len()));
    }
    let product = &config.product;
    let mut packages = None;
    if product.rootfs.engine.value == Engine::Debian {
        let path = product.rootfs.lock.as_ref().context("`rootfs.lock` is missing")?.value.clone();
        let full = config.root.join(&path);
        if wants("packages") {
            let (sources, wrong) = plan::plan_sources(&config);
            ConfigFindings(wrong).check()?;
            ConfigFindings(plan::check_package_names(product, &config.board)).check()?;
            let spec = package_spec(&config);
            let mirrors = load_mirrors(&config.root, &sources)?;
            let new = debian::lock::lock_packages(&spec, &mirrors, &cache.root)?;
            let old = PackagesLock::load(&full).ok();
            let changes = old.as_ref().map(|old| old.changes(&new));
            let count = changes.as_ref().map_or(new.package.len(), Vec::len);
            new.save(&full)?;
            say("lock", format!("{path}: {} packages, {count} changed", new.package.len()));
            for change in changes.into_iter().flatten() {
                say("", change);
            }
            packages = Some(new);
        } else {
            packages = Some(PackagesLock::load(&full)?);
        }
    }
    let Some(api) = product.api.as_ref().filter(|_| wants("wheels")) else { return Ok(()) };
    let target = python_target(&config, packages.as_ref())?;
    let request = LockRequest {
        requirement: api.package.value.clone(),
        target,
        base: Vec::new(),
        cache: cache.root.clone(),
        log: None,
    };
    let path = config.root.join(&api.lock.value);
    // An empty or missing file means that the lock was never made.
    if std::fs::metadata(&path).is_ok_and(|m| m.len() == 0) {
        std::fs::remove_file(&path).with_context(|| format!("removing the empty {path}"))?;
    }
    say("lock", format!("{}: querying the index", request.requirement));
    let (lock, changes) = wheel::update_lock(&request, &path)?;
    say("lock", format!("{}: {} wheels", api.lock.value, lock.wheels.len()));
    for change in changes {
        say("", change);
    }
    if lock.wheels.is_empty() {
        bail!("{} resolved to nothing", api.package.value);
    }
    Ok(())
}
