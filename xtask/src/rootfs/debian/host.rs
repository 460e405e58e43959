//! Tools that the build machine may lack: Debian 12's `mke2fs` cannot read a tar, so a newer one
//! from backports is unpacked into the cache and never installed.

use std::fs;

use anyhow::{Context, Result, bail};
use camino::Utf8Path;

use super::apt::{AptArchive, AptMirrors, PrivateApt};
use super::download::{self, LockPolicy};
use super::lock::{LockedPackage, PackagesLock, lock_unpacked};
use super::sources::AllowedPackages;
use super::unpack;
use crate::artifact::hash_bytes;
use crate::exec;
use crate::ext4::Mke2fs;
use crate::fetch::Downloader;
use crate::rootfs::PackageRole;

/// Architectures (with Debian's names) that a build can run on.
pub(super) const HOSTS: [&str; 2] = ["amd64", "arm64"];

/// The release of the programs for the build machine, independent of the image's release: the
/// oldest supported release, since a C library runs programs for older ones.
pub(super) const SUITE: &str = "bookworm";

/// Packages of its `-backports` with the tool and its libraries.
const FROM_BACKPORTS: [&str; 4] = ["e2fsprogs", "libcom-err2", "libext2fs2", "libss2"];

/// The libraries that the tool loads to read a tar, with dependencies that a minimal machine may
/// lack.
const FROM_SUITE: [&str; 4] = ["libarchive13", "libicu72", "libnettle8", "libxml2"];

/// Locks the host tools for every architecture that may build.
pub(super) fn lock_host_tools(
    mirrors: &AptMirrors,
    cache: &Utf8Path,
) -> Result<Vec<LockedPackage>> {
    let mut locked = Vec::new();
    for arch in HOSTS {
        let source = |uri: &str, suite: String| AptArchive { uri: uri.to_owned(), suite };
        let sources = [
            source(&mirrors.archive, SUITE.to_owned()),
            source(&mirrors.archive, format!("{SUITE}-updates")),
            source(&mirrors.security, format!("{SUITE}-security")),
            source(&mirrors.archive, format!("{SUITE}-backports")),
        ];
        let dir = cache.join(format!("apt/{SUITE}-host-{arch}"));
        let apt = PrivateApt::new(&dir, arch, &sources, &["main".to_owned()], &mirrors.keyring)?;
        apt.update()?;
        let names: Vec<String> = FROM_BACKPORTS
            .iter()
            .map(|name| format!("{name}/{SUITE}-backports"))
            .chain(FROM_SUITE.map(str::to_owned))
            .collect();
        locked.extend(
            lock_unpacked(&apt, &names, mirrors, &AllowedPackages::default(), PackageRole::Host)
                .with_context(|| format!("resolving e2fsprogs for {arch} machines"))?,
        );
    }
    Ok(locked)
}

/// The architecture of the host tools that this machine needs; `None` when its own `mke2fs` is
/// sufficient.
pub(super) fn needed_architecture() -> Option<&'static str> {
    let own = exec::find_program("mke2fs").map(|program| Mke2fs { program, libraries: Vec::new() });
    if own.is_some_and(|own| own.version().is_ok()) {
        return None;
    }
    Some(host_architecture())
}

/// Debian's name for this machine's architecture.
pub(super) fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// An `mke2fs` that reads tars: the machine's own, else the locked one, unpacked into `cache`.
///
/// # Errors
/// When the machine's is too old and the lock has none for its architecture, or it cannot be
/// fetched.
pub fn host_e2fs(
    lock: &PackagesLock,
    downloader: &Downloader,
    mirrors: Option<&AptMirrors>,
    cache: &Utf8Path,
) -> Result<Mke2fs> {
    let Some(arch) = needed_architecture() else {
        let program =
            exec::find_program("mke2fs").context("this machine's mke2fs no longer exists")?;
        return Ok(Mke2fs { program, libraries: Vec::new() });
    };
    let packages: Vec<LockedPackage> =
        lock.of_role(PackageRole::Host).filter(|p| p.arch == arch).cloned().collect();
    if packages.is_empty() {
        bail!(
            "this machine's e2fsprogs is older than 1.47.1, and the package lock has none for {arch}\n\
             help: install e2fsprogs 1.47.1 or newer, or run cargo xtask lock"
        );
    }
    let hashes: String = packages.iter().map(|p| p.sha256.as_str()).collect();
    let dir = cache.join(format!("tools/e2fsprogs-{}", &hash_bytes(hashes.as_bytes())[..16]));
    // With two first builds at once, the second one waits and finds the tools unpacked.
    fs::create_dir_all(cache.join("tools")).with_context(|| format!("creating {cache}/tools"))?;
    let lock_path = cache.join("tools/.lock");
    let waiting = fs::File::create(&lock_path).and_then(|file| file.lock().map(|()| file));
    let _held = waiting.with_context(|| format!("locking {lock_path}"))?;
    if !dir.is_dir() {
        let debs = download::fetch_packages(&packages, downloader, mirrors, LockPolicy::Locked)?;
        let partial = crate::artifact::partial_path(&dir);
        if partial.exists() {
            fs::remove_dir_all(&partial).with_context(|| format!("removing {partial}"))?;
        }
        for deb in &debs.debs {
            unpack::unpack_deb(&deb.file.path, &partial)?;
        }
        fs::rename(&partial, &dir).with_context(|| format!("renaming {partial}"))?;
    }
    let mke2fs = ["sbin/mke2fs", "usr/sbin/mke2fs"]
        .map(|path| dir.join(path))
        .into_iter()
        .find(|path| path.is_file());
    let Some(mke2fs) = mke2fs else {
        bail!("{dir} contains no mke2fs\nhelp: remove that directory")
    };
    let mut libraries = Vec::new();
    for below in ["lib", "usr/lib"] {
        let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
        let path = dir.join(below).join(triplet);
        if path.is_dir() {
            libraries.push(path);
        }
    }
    let unpacked = Mke2fs { program: mke2fs, libraries };
    unpacked.version().context("testing the unpacked mke2fs")?;
    Ok(unpacked)
}

/// Unpacks one package of the lock into `dir` without running any of its programs: tests get the
/// boot loader that ships from it.
///
/// # Errors
/// When the lock has no such package, or it cannot be fetched.
pub fn unpack_locked(
    lock: &PackagesLock,
    name: &str,
    downloader: &Downloader,
    mirrors: Option<&AptMirrors>,
    dir: &Utf8Path,
) -> Result<()> {
    let package = lock.of_role(PackageRole::Extra).find(|p| p.name == name).cloned();
    let package = package.with_context(|| format!("the package lock has no {name}"))?;
    let fetched = download::fetch_packages(&[package], downloader, mirrors, LockPolicy::Locked)?;
    fetched.debs.iter().try_for_each(|deb| unpack::unpack_deb(&deb.file.path, dir))
}
