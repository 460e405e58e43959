//! Fetches the packages of the lock. Mirrors drop superseded versions: then only the vanished
//! packages are resolved again with all others pinned, with a warning, unless `--locked` forbids
//! it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use camino::Utf8Path;
use serde::{Deserialize, Serialize};

use super::DebianSpec;
use super::apt::AptMirrors;
use super::host;
use super::lock::{self, LockedPackage, PackagesLock};
use crate::artifact::Artifact;
use crate::fetch::{Download, DownloadOutcome, Downloader};
use crate::progress;
use crate::rootfs::PackageRole;

/// What to do about versions that the mirror no longer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockPolicy {
    /// Replace only these.
    Replace,
    /// Refuse (`--locked`).
    Locked,
}

/// A locked package and its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockedDeb {
    /// The entry in the lock.
    pub package: LockedPackage,
    /// The file, checked.
    pub file: Artifact,
}

/// A version that replaced another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReplacedPackage {
    /// Binary package name.
    pub name: String,
    /// The locked version; `None` when the package is new.
    pub old: Option<String>,
    /// The new version; `None` when the package is no longer needed.
    pub new: Option<String>,
}

/// The packages for a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownloadedPackages {
    /// The lock of these packages; differs from the given lock where versions were replaced.
    pub lock: PackagesLock,
    /// Files for roles `root` and `extra`, in the lock's order.
    pub debs: Vec<LockedDeb>,
    /// What was replaced, for the report; usually empty.
    pub replaced: Vec<ReplacedPackage>,
}

/// The result of a plain fetch.
pub(super) struct PlainDownload {
    pub debs: Vec<LockedDeb>,
    /// What the mirror no longer has.
    pub gone: Vec<LockedPackage>,
}

/// Fetches the packages of a lock. Replaced versions are in [`DownloadedPackages::lock`]: save it.
///
/// `mirrors` may be absent when everything is in the store or the downloader is offline.
///
/// # Errors
/// When a file cannot be fetched, or has vanished and `policy` is [`LockPolicy::Locked`].
pub fn fetch_lock(
    lock: &PackagesLock,
    downloader: &Downloader,
    mirrors: Option<&AptMirrors>,
    policy: LockPolicy,
    cache: &Utf8Path,
) -> Result<DownloadedPackages> {
    let host_arch = host::needed_architecture();
    let wanted = |lock: &PackagesLock| -> Vec<LockedPackage> {
        let here =
            |p: &&LockedPackage| p.role != PackageRole::Host || Some(p.arch.as_str()) == host_arch;
        lock.package.iter().filter(here).cloned().collect()
    };
    let for_image = |mut debs: Vec<LockedDeb>| {
        debs.retain(|d| d.package.role != PackageRole::Host);
        debs
    };
    let first = fetch_without_replacing(&wanted(lock), downloader, mirrors)?;
    if first.gone.is_empty() {
        let debs = for_image(first.debs);
        return Ok(DownloadedPackages { lock: lock.clone(), debs, replaced: Vec::new() });
    }
    refuse_if_locked(&first.gone, policy)?;
    let mirrors = mirrors.context("no mirror to resolve vanished packages")?;
    let lock = replace_vanished(lock, &first.gone, &first.debs, mirrors, cache)?;
    let second = fetch_without_replacing(&wanted(&lock.lock), downloader, Some(mirrors))?;
    // The index was just fetched: a missing file is now the mirror's fault.
    if let Some(package) = second.gone.first() {
        bail!(
            "the mirror's index lists {}, but the mirror does not have the file\n\
             help: the mirror is being updated or is broken; try again later or use another mirror",
            package.name_and_version()
        );
    }
    Ok(DownloadedPackages {
        lock: lock.lock,
        debs: for_image(second.debs),
        replaced: lock.replaced,
    })
}

/// Fetches packages without replacing any: a vanished package is an error with [`LockPolicy::Locked`],
/// else it is listed.
pub(super) fn fetch_packages(
    packages: &[LockedPackage],
    downloader: &Downloader,
    mirrors: Option<&AptMirrors>,
    policy: LockPolicy,
) -> Result<PlainDownload> {
    let found = fetch_without_replacing(packages, downloader, mirrors)?;
    if !found.gone.is_empty() {
        refuse_if_locked(&found.gone, policy)?;
    }
    Ok(found)
}

fn fetch_without_replacing(
    packages: &[LockedPackage],
    downloader: &Downloader,
    mirrors: Option<&AptMirrors>,
) -> Result<PlainDownload> {
    let downloads: Vec<Download> = packages
        .iter()
        .map(|p| {
            Ok(Download {
                name: p.name_and_version(),
                url: mirrors.map(|m| p.url(m)).transpose()?.unwrap_or_default(),
                size: Some(p.size),
                sha256: p.sha256.clone(),
            })
        })
        .collect::<Result<_>>()?;
    let (mut debs, mut gone) = (Vec::new(), Vec::new());
    let outcomes = downloader.fetch("fetch", "Debian packages", &downloads)?;
    for (package, outcome) in packages.iter().zip(outcomes) {
        match outcome {
            DownloadOutcome::Ready(file) => debs.push(LockedDeb { package: package.clone(), file }),
            DownloadOutcome::Gone => gone.push(package.clone()),
        }
    }
    Ok(PlainDownload { debs, gone })
}

fn refuse_if_locked(gone: &[LockedPackage], policy: LockPolicy) -> Result<()> {
    if policy == LockPolicy::Replace {
        return Ok(());
    }
    let names: Vec<String> = gone.iter().map(LockedPackage::name_and_version).collect();
    bail!(
        "the mirror no longer has {} of the locked packages: {}\n\
         help: build without --locked to replace only these, or run cargo xtask lock",
        gone.len(),
        progress::list_names(&names)
    )
}

struct Replacement {
    lock: PackagesLock,
    replaced: Vec<ReplacedPackage>,
}

/// Resolves the vanished packages again; all others keep their versions where apt can.
///
/// The kept packages may also be missing in the index (only their files are available), so apt gets
/// them as a local archive with the highest pins.
fn replace_vanished(
    old: &PackagesLock,
    gone: &[LockedPackage],
    debs: &[LockedDeb],
    mirrors: &AptMirrors,
    cache: &Utf8Path,
) -> Result<Replacement> {
    let spec: &DebianSpec = &old.request;
    progress::warn(format!(
        "the mirror no longer has {} of the locked packages; replacing them: {}",
        gone.len(),
        progress::list_names(&gone.iter().map(LockedPackage::name_and_version).collect::<Vec<_>>())
    ));
    let (host_gone, gone): (Vec<&LockedPackage>, Vec<&LockedPackage>) =
        gone.iter().partition(|p| p.role == PackageRole::Host);
    if gone.is_empty() {
        let mut package: Vec<_> =
            old.package.iter().filter(|p| p.role != PackageRole::Host).cloned().collect();
        package.extend(
            host::lock_host_tools(mirrors, cache).context("replacing vanished host tools")?,
        );
        let lock = lock::finish_lock(spec, old.epoch, package)?;
        let replaced = lock_differences(old, &lock);
        return Ok(Replacement { lock, replaced });
    }
    // Binaries of one source depend on each other's exact version: they are replaced together, even
    // those whose old file is still in the store.
    let moving: BTreeSet<_> = gone.iter().map(|p| p.pool()).collect();
    let kept: Vec<LockedDeb> = debs
        .iter()
        .filter(|d| d.package.role != PackageRole::Host && !moving.contains(&d.package.pool()))
        .cloned()
        .collect();
    let mut solved = lock::solve_with_kept(spec, mirrors, cache, &kept);
    if let Err(error) = &solved {
        progress::warn(format!(
            "no solution keeps all other versions; resolving all packages again ({error:#})"
        ));
        solved = lock::solve_with_kept(spec, mirrors, cache, &[]);
    }
    let mut package = solved.context("replacing vanished packages")?;
    if host_gone.is_empty() {
        package.extend(old.of_role(PackageRole::Host).cloned());
    } else {
        package.extend(
            host::lock_host_tools(mirrors, cache).context("replacing vanished host tools")?,
        );
    }
    let lock = lock::finish_lock(spec, old.epoch, package)?;
    let replaced = lock_differences(old, &lock);
    for ReplacedPackage { name, old, new } in &replaced {
        let text = |v: &Option<String>| v.clone().unwrap_or_else(|| "none".to_owned());
        progress::warn(format!("{name}: {} replaced by {}", text(old), text(new)));
    }
    Ok(Replacement { lock, replaced })
}

/// What changed between two locks, by role, name and architecture.
pub fn lock_differences(old: &PackagesLock, new: &PackagesLock) -> Vec<ReplacedPackage> {
    let (old, new) = (old.by_key(), new.by_key());
    let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    keys.into_iter()
        .filter(|key| {
            let (old, new) = (old.get(*key), new.get(*key));
            old.map(|p| (&p.version, &p.sha256)) != new.map(|p| (&p.version, &p.sha256))
        })
        .map(|key| ReplacedPackage {
            name: key.1.to_owned(),
            old: old.get(key).map(|package| package.version.clone()),
            new: new.get(key).map(|package| package.version.clone()),
        })
        .collect()
}
