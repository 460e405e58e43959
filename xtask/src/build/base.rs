//! The stages `base` and `api`: the engine's result, and the wheels installed for it.

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::{BuildContext, buildroot};
use crate::cache::CacheKey;
use crate::config::Config;
use crate::config::product::{Engine, ProductConfig};
use crate::ext4::Mke2fs;
use crate::fetch::Downloader;
use crate::plan::{self, AptSourcePlan};
use crate::progress::{format_bytes, warn};
use crate::rootfs::debian::{
    self, AptMirrors, AptSourceMirror, AptSourceSpec, BoardFilePatterns, DebianRequest, DebianSpec,
    DownloadedPackages, LockPolicy, PackagesLock, PruneRules, ReplacedPackage,
};
use crate::rootfs::kernel::ModuleRules;
use crate::rootfs::{BaseSystem, PackageRole};
use crate::text::describe_error;
use crate::wheel::base::BaseSource;
use crate::wheel::target::WheelTarget;
use crate::wheel::{self, BasePython, InstallRequest, InstallTarget, InstalledWheels, WheelLock};

/// Raised when a change of the engine's code changes its output.
const BASE_VERSION: u32 = 1;
/// Raised when a change of the installation of packages changes its output.
const ROOT_VERSION: u32 = 2;
/// Raised when a change of the installation of wheels changes its output.
const API_VERSION: u32 = 1;

/// The base system.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BuiltBase {
    /// The engine's result.
    pub system: BaseSystem,
    /// Packages that the mirror no longer had.
    pub replaced: Vec<ReplacedPackage>,
    /// The time of the base's files: the lock's time, so that a commit does not rebuild the base.
    pub epoch: u64,
    /// The stage's key, which identifies its content.
    pub key: String,
}

impl BuiltBase {
    /// The stage's outputs.
    pub(super) fn files(&self) -> Vec<Utf8PathBuf> {
        self.system.files()
    }

    /// A summary of the stage in one line.
    pub(super) fn describe(&self) -> String {
        let BaseSystem { packages, rootfs_bytes, kernel_release, .. } = &self.system;
        format!(
            "{} packages, {} unpacked, kernel {kernel_release}",
            packages.len(),
            format_bytes(*rootfs_bytes)
        )
    }
}

/// The packages that a product and its boards request.
pub fn package_spec(config: &Config) -> DebianSpec {
    let rootfs = &config.product.rootfs;
    DebianSpec {
        suite: rootfs.suite.as_ref().map_or(String::new(), |s| s.value.0.clone()),
        components: rootfs.components.iter().map(|l| l.value.clone()).collect(),
        arch: config.board.arch.value.clone(),
        packages: rootfs.packages.iter().map(|l| l.value.clone()).collect(),
        extra: config.extra_packages.clone(),
        sources: plan::plan_sources(config).0.into_iter().map(source_spec).collect(),
    }
}

fn source_spec(source: AptSourcePlan) -> AptSourceSpec {
    let AptSourcePlan { name, suite, components, packages, .. } = source;
    AptSourceSpec { name, suite, components, packages }
}

/// This machine's sources of packages, with the product's additional archives.
///
/// # Errors
/// As [`AptMirrors::from_host`].
pub fn load_mirrors(root: &Utf8Path, sources: &[AptSourcePlan]) -> Result<AptMirrors> {
    let mirror = |s: &AptSourcePlan| AptSourceMirror::new(&s.name, &s.address, root.join(&s.key));
    let sources = sources.iter().map(mirror).collect::<Result<_>>()?;
    Ok(AptMirrors::from_host()?.with_sources(sources))
}

/// Refuses a package lock that was made for another request than the product's.
fn check_packages(
    lock: &PackagesLock,
    path: &Utf8Path,
    spec: &DebianSpec,
    product: &str,
) -> Result<()> {
    let obey = || format!("obeying {path}");
    lock.check_request(spec, product).with_context(obey)
}

/// Refuses a wheel lock that was made for another API than the product's.
fn check_wheels(lock: &WheelLock, path: &Utf8Path, package: &str, product: &str) -> Result<()> {
    ensure!(
        lock.requirement == package,
        "the lock {path} was made for {}, the product asks for {package}\n\
         help: run `cargo xtask lock --product {product} --only wheels` and commit the result",
        lock.requirement
    );
    Ok(())
}

/// Compares a product's locks with what it and its boards ask for, as a build does; reads these files only.
///
/// # Errors
/// A lock that cannot be read or was made for something else, and the command that makes it again; of both locks, where
/// both are wrong.
pub fn check_locks(config: &Config) -> Result<()> {
    let ProductConfig { name, rootfs, api, .. } = &config.product;
    let product = name.value.0.as_str();
    let load = |path: &Utf8Path| PackagesLock::load(&config.root.join(path));
    let debian = rootfs.lock.as_ref().filter(|_| rootfs.engine.value == Engine::Debian);
    let packages = debian.map(|path| {
        let lock = load(&path.value)?;
        check_packages(&lock, &path.value, &package_spec(config), product)?;
        Ok::<_, anyhow::Error>(lock)
    });
    let wheels = api.as_ref().map_or(Ok(()), |api| {
        let path = &api.lock.value;
        let lock = WheelLock::load(&config.root.join(path))?;
        check_wheels(&lock, path, &api.package.value, product)?;
        // The Python of packages that are locked again is not known yet.
        let packages = match &packages {
            Some(Err(_)) => return Ok(()),
            Some(Ok(packages)) => Some(packages),
            None => None,
        };
        let (locked, base) = (&lock.target, python_target(config, packages)?);
        ensure!(
            (locked.python.short(), &locked.arch) == (base.python.short(), &base.arch),
            "the lock {path} was made for {locked}, the base is {base}\n\
             help: run `cargo xtask lock --product {product} --only wheels` and commit the result"
        );
        Ok(())
    });
    match (packages.transpose(), wheels) {
        (Ok(_), wheels) => wheels,
        (Err(packages), Ok(())) => Err(packages),
        (Err(packages), Err(wheels)) => {
            let message = |error| {
                let sentence = describe_error(&error);
                sentence.split("\nhelp: ").next().unwrap_or_default().to_owned()
            };
            let (packages, wheels) = (message(packages), message(wheels));
            bail!("{packages}\n{wheels}\nhelp: cargo xtask lock --product {product}")
        }
    }
}

/// The Python that wheels are locked for: the package lock's, or the pinned Buildroot's.
///
/// # Errors
/// When the lock has no Python or no C library.
pub fn python_target(config: &Config, lock: Option<&PackagesLock>) -> Result<WheelTarget> {
    let arch = match config.board.arch.value.as_str() {
        "arm64" => "aarch64",
        other => other,
    };
    let (python, libc) = match (lock, &config.product.rootfs.buildroot) {
        (Some(lock), _) => {
            let version = |name: &str| {
                let mut packages = lock.of_role(PackageRole::Root).filter(|p| p.name == name);
                let package = packages.next().with_context(|| {
                    format!(
                        "the package lock has no {name}\nhelp: add python3 to `rootfs.packages`"
                    )
                })?;
                // Debian's revision is ignored: `3.11.2-1+b1`.
                Ok::<_, anyhow::Error>(package.version.split('-').next().unwrap_or("").to_owned())
            };
            (version("python3")?, format!("glibc {}", version("libc6")?))
        }
        (None, Some(pinned)) => (pinned.python.value.clone(), pinned.libc.value.clone()),
        (None, None) => {
            bail!("`rootfs.buildroot` is missing in {}", config.product.place.file)
        }
    };
    let target = WheelTarget {
        python: python.parse().with_context(|| format!("the base's Python {python}"))?,
        implementation: "cp".to_owned(),
        arch: arch.to_owned(),
        libc: libc.parse().with_context(|| format!("the base's C library {libc}"))?,
    };
    target.validate()?;
    Ok(target)
}

pub(super) fn prune_rules(build: &BuildContext<'_>) -> Result<PruneRules> {
    let mut rules = PruneRules::standard()?;
    rules.drop.extend(build.plan.rootfs.prune.iter().cloned());
    rules.keep.extend(build.plan.rootfs.keep.iter().cloned());
    Ok(rules)
}

fn base_key(build: &BuildContext<'_>, lock: &PackagesLock) -> Result<CacheKey> {
    let board = &build.plan.board;
    CacheKey::new("base", BASE_VERSION)
        // The installed packages are a part of the key.
        .with("root", ROOT_VERSION.to_string())
        .with_json("lock", lock)?
        .with_json("prune", &prune_rules(build)?)?
        .with_json("device trees", &board.device_trees)?
        .with_json("firmware", &board.firmware)?
        .with_json("boot loader", &board.bootloader)?
        .with_json("modules", &board.modules_keep)
}

/// The stage `base`.
///
/// # Errors
/// A lock that does not match the product; no network; a package that is not available; a failing
/// engine.
pub fn build_base(build: &mut BuildContext<'_>) -> Result<BuiltBase> {
    let path = build.plan.rootfs.lock.clone().context("the engine debian has a package lock")?;
    let full = build.root.join(&path);
    let mut lock = PackagesLock::load(&full)?;
    check_packages(&lock, &path, &build.packages, &build.plan.product.name)?;
    let mut replaced = Vec::new();
    let mut fetched = None;
    if !build.cache.has("base", &base_key(build, &lock)?.finish(), BuiltBase::files)? {
        build.require_tools()?;
        let found = fetch_packages(build, &lock)?;
        if !found.replaced.is_empty() {
            announce_replaced(&found, &path);
            found.lock.save(&full)?;
            lock = found.lock.clone();
            replaced.clone_from(&found.replaced);
        }
        fetched = Some(found);
    }
    let key = base_key(build, &lock)?;
    build.stage("base", key, BuiltBase::files, BuiltBase::describe, |build, dir| {
        let fetched = match fetched {
            Some(fetched) => fetched,
            None => fetch_packages(build, &lock)?,
        };
        // Fetched with the packages, so that the later stages need no network.
        host_tool(build, &lock)?;
        let board = &build.plan.board;
        let log = build.log("base");
        let root = build_root(build, &lock, &fetched, &log)?;
        let system = debian::build_base_system(
            &DebianRequest {
                debs: &fetched.debs,
                epoch: lock.epoch,
                prune: &prune_rules(build)?,
                board: &BoardFilePatterns {
                    dtbs: board.device_trees.clone(),
                    firmware: board.firmware.clone(),
                    modules: ModuleRules { keep: board.modules_keep.clone(), drop: Vec::new() },
                    bootloader: board.bootloader.clone(),
                },
                root: &root,
            },
            dir,
        )?;
        let key = dir.file_name().unwrap_or_default().to_owned();
        Ok(BuiltBase { system, replaced, epoch: lock.epoch, key })
    })
}

/// The installed packages, without any files for a board: a separate stage, so that all boards of a
/// product share the slowest step.
fn build_root(
    build: &BuildContext<'_>,
    lock: &PackagesLock,
    fetched: &DownloadedPackages,
    log: &Utf8Path,
) -> Result<Utf8PathBuf> {
    let installed: Vec<_> = lock.of_role(PackageRole::Root).collect();
    let key = CacheKey::new("root", ROOT_VERSION)
        .with("epoch", lock.epoch.to_string())
        .with("suite", &lock.request.suite)
        .with_json("packages", &installed)?
        .finish();
    let staged = build.cache.stage(
        "root",
        &key,
        |tar: &Utf8PathBuf| vec![tar.clone()],
        |dir| {
            let tar = dir.join("root.tar");
            debian::install_packages(&lock.request, &fetched.debs, lock.epoch, log, &tar)?;
            Ok(tar)
        },
    )?;
    Ok(staged.value)
}

fn fetch_packages(build: &BuildContext<'_>, lock: &PackagesLock) -> Result<DownloadedPackages> {
    let offline = build.options.offline;
    let downloader = Downloader::for_cache(build.cache, offline)?;
    let sources = &build.plan.rootfs.sources;
    let mirrors = if offline { None } else { Some(load_mirrors(build.root, sources)?) };
    let policy = if build.options.locked { LockPolicy::Locked } else { LockPolicy::Replace };
    debian::fetch_lock(lock, &downloader, mirrors.as_ref(), policy, &build.cache.root)
}

/// The `mke2fs` for filesystems: the machine's own, or one that is unpacked into the cache.
///
/// # Errors
/// When there is none, and it cannot be fetched.
pub(super) fn find_mke2fs(build: &BuildContext<'_>) -> Result<Mke2fs> {
    let rootfs = &build.plan.rootfs;
    match rootfs.engine {
        Engine::Debian => {
            let path = rootfs.lock.as_ref().context("the engine debian has a package lock")?;
            host_tool(build, &PackagesLock::load(&build.root.join(path))?)
        }
        Engine::Buildroot => buildroot::host_tool(build),
    }
}

pub(super) fn host_tool(build: &BuildContext<'_>, lock: &PackagesLock) -> Result<Mke2fs> {
    let offline = build.options.offline;
    let downloader = Downloader::for_cache(build.cache, offline)?;
    let mirrors = if offline { None } else { Some(AptMirrors::from_host()?) };
    debian::host_e2fs(lock, &downloader, mirrors.as_ref(), &build.cache.root)
}

fn announce_replaced(fetched: &DownloadedPackages, path: &camino::Utf8Path) {
    let none = "none".to_owned();
    let list: Vec<String> = fetched
        .replaced
        .iter()
        .map(|r| {
            let (old, new) = (r.old.as_ref().unwrap_or(&none), r.new.as_ref().unwrap_or(&none));
            format!("\n  {}: {old} -> {new}", r.name)
        })
        .collect();
    warn(format!(
        "the mirror no longer has {} locked packages; replaced them and updated {path}:{}",
        list.len(),
        list.concat()
    ));
}

/// The product's wheel lock, if it has an API; it must match the product's requirement.
///
/// # Errors
/// A lock that cannot be read, or was created for another requirement.
pub(super) fn wheel_lock(build: &BuildContext<'_>) -> Result<Option<(WheelLock, String)>> {
    let Some(api) = &build.plan.api else { return Ok(None) };
    let lock = WheelLock::load(&build.root.join(&api.lock))?;
    check_wheels(&lock, &api.lock, &api.package, &build.plan.product.name)?;
    Ok(Some((lock, api.package.clone())))
}

/// The stage `api`: the wheels, installed into a separate tar.
///
/// # Errors
/// A wheel that does not match the base, is damaged, or has requirements that the base does not
/// meet.
pub fn install_wheels(
    build: &mut BuildContext<'_>,
    base: &BuiltBase,
) -> Result<Option<InstalledWheels>> {
    let Some((lock, package)) = wheel_lock(build)? else { return Ok(None) };
    let key = CacheKey::new("api", API_VERSION)
        .with("wheels", wheel::lock_identity(&lock))
        .with("base", &base.system.rootfs.sha256)
        .with("epoch", base.epoch.to_string());
    let base = base.clone();
    let installed = build.stage(
        "api",
        key,
        |installed: &InstalledWheels| vec![installed.tar.path.clone()],
        |installed| {
            let size = installed.distributions.iter().map(|d| d.installed_bytes).sum();
            let count = installed.distributions.len();
            format!("{package} and {count} wheels in all, {}", format_bytes(size))
        },
        |build, dir| {
            let cache: &Utf8PathBuf = &build.cache.root;
            let wheels = wheel::fetch_wheels(&lock, build.cache, build.options.offline)?;
            let python = BasePython::read(BaseSource::Tar(base.system.rootfs.path.clone()))?;
            let log = build.log("api");
            wheel::install_wheels(&InstallRequest {
                lock: &lock,
                wheels: &wheels,
                base: &python,
                target: &InstallTarget::for_base(&python, base.system.engine == "debian"),
                cache,
                epoch: base.epoch,
                out: &dir.join("wheels.tar"),
                log: Some(&log),
            })
        },
    )?;
    Ok(Some(installed))
}
