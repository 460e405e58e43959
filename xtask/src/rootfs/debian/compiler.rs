//! A Rust compiler for the robot's architecture, for machines whose own compiler lacks this target:
//! Debian's packages, locked like all others, unpacked into the cache and never installed.

use std::fs;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use super::apt::{AptMirrors, PrivateApt};
use super::download::{self, LockPolicy, ReplacedPackage};
use super::lock::{
    LockedPackage, PackagesLock, finish_lock, lock_unpacked, split_stanzas, target_apt,
};
use super::sources::AllowedPackages;
use super::{DebianSpec, host, unpack};
use crate::artifact::{hash_bytes, partial_path};
use crate::fetch::Downloader;
use crate::progress::say;
use crate::rootfs::PackageRole;

/// The compiler that Debian updates in a stable release, since its browsers need it.
const COMPILER: &str = "rustc-web";
/// The standard library for programs, for this machine's and the target's architecture.
const LIBRARY: &str = "libstd-rust-web-dev";
/// The libraries of the compiler and its LLVM, without the C library, which every machine has.
const LOADED: [&str; 12] = [
    "libbsd0",
    "libedit2",
    "libffi8",
    "libicu72",
    "liblzma5",
    "libmd0",
    "libstdc++6",
    "libtinfo6",
    "libxml2",
    "libz3-4",
    "libzstd1",
    "zlib1g",
];
/// Debian's name for the robot's architecture.
const TARGET: &str = "arm64";

/// An unpacked compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackedCompiler {
    /// Its `rustc`, a script that sets the library path.
    pub rustc: Utf8PathBuf,
    /// Version of the package.
    pub version: String,
}

/// The request of the lock: independent of products.
fn compiler_spec() -> DebianSpec {
    DebianSpec {
        suite: host::SUITE.to_owned(),
        components: vec!["main".to_owned()],
        arch: TARGET.to_owned(),
        packages: Vec::new(),
        extra: Vec::new(),
        sources: Vec::new(),
    }
}

/// Locks the compiler for every architecture that may build.
///
/// # Errors
/// When a mirror is unreachable or has no such compiler.
pub fn lock_compiler(mirrors: &AptMirrors, cache: &Utf8Path) -> Result<PackagesLock> {
    say("lock", format!("{}'s Rust compiler for {TARGET}: querying the mirrors", host::SUITE));
    let spec = compiler_spec();
    let mut package = Vec::new();
    for arch in host::HOSTS {
        let apt =
            target_apt(&DebianSpec { arch: arch.to_owned(), ..spec.clone() }, mirrors, cache)?;
        apt.pin("")?;
        apt.update()?;
        let mut names: Vec<String> = LOADED.map(str::to_owned).to_vec();
        names.extend([COMPILER.to_owned(), LIBRARY.to_owned()]);
        // The names of these two contain versions.
        let library = find_dependency(&apt, LIBRARY, "libstd-rust-")?;
        names.push(find_dependency(&apt, &library, "libllvm")?);
        names.push(library);
        package.extend(
            lock_unpacked(&apt, &names, mirrors, &AllowedPackages::default(), PackageRole::Host)
                .with_context(|| format!("resolving a Rust compiler for {arch} machines"))?,
        );
    }
    finish_lock(&spec, 0, package)
}

/// The dependency of a package whose name has this prefix.
fn find_dependency(apt: &PrivateApt, package: &str, start: &str) -> Result<String> {
    let text = apt.cache(["show", "--no-all-versions", package])?;
    let depends = split_stanzas(&text).into_iter().find_map(|s| s.get("Depends").cloned());
    let found = depends.as_deref().unwrap_or_default().split(',').find_map(|item| {
        item.split_whitespace().next().filter(|name| name.starts_with(start)).map(str::to_owned)
    });
    found.with_context(|| format!("{package} has no dependency {start}…"))
}

/// The packages of the lock for this machine.
fn packages_for_host(lock: &PackagesLock) -> Vec<LockedPackage> {
    let own = host::host_architecture();
    let here = |p: &&LockedPackage| p.arch == own || (p.arch == TARGET && p.name == LIBRARY);
    lock.of_role(PackageRole::Host).filter(here).cloned().collect()
}

/// A hash of a machine's packages in the lock: the identity of the compiler.
pub fn compiler_identity(lock: &PackagesLock) -> String {
    let hashes: String = packages_for_host(lock).iter().map(|p| p.sha256.as_str()).collect();
    hash_bytes(hashes.as_bytes())
}

/// The current locked packages of this machine, fetched into the store; and, when the mirror
/// dropped one, a new lock and the changes.
///
/// # Errors
/// When a file cannot be fetched, or has vanished and `policy` forbids a replacement.
pub fn fetch_compiler(
    lock: &PackagesLock,
    downloader: &Downloader,
    mirrors: Option<&AptMirrors>,
    policy: LockPolicy,
    cache: &Utf8Path,
) -> Result<Option<(PackagesLock, Vec<ReplacedPackage>)>> {
    if download::fetch_packages(&packages_for_host(lock), downloader, mirrors, LockPolicy::Replace)?
        .gone
        .is_empty()
    {
        return Ok(None);
    }
    let mirrors = mirrors.context("no mirror to resolve vanished packages")?;
    if policy == LockPolicy::Locked {
        download::fetch_packages(&packages_for_host(lock), downloader, Some(mirrors), policy)?;
    }
    let new = self::lock_compiler(mirrors, cache)?;
    download::fetch_packages(
        &packages_for_host(&new),
        downloader,
        Some(mirrors),
        LockPolicy::Locked,
    )?;
    let replaced = download::lock_differences(lock, &new);
    Ok(Some((new, replaced)))
}

/// Unpacks the compiler into the cache, once. Its packages must have been fetched.
///
/// # Errors
/// When the lock has none for this machine, or a package is damaged.
pub fn unpack_compiler(
    lock: &PackagesLock,
    downloader: &Downloader,
    cache: &Utf8Path,
) -> Result<UnpackedCompiler> {
    let packages = packages_for_host(lock);
    let Some(version) = packages.iter().find(|p| p.name == COMPILER).map(|p| p.version.clone())
    else {
        bail!(
            "the lock has no Rust compiler for {} machines\n\
             help: add the target to your own compiler: rustup target add \
             aarch64-unknown-linux-gnu",
            host::host_architecture()
        );
    };
    let dir = cache.join(format!("tools/rustc-{}", &compiler_identity(lock)[..16]));
    fs::create_dir_all(cache.join("tools")).with_context(|| format!("creating {cache}/tools"))?;
    let lock_path = cache.join("tools/.lock");
    let waiting = fs::File::create(&lock_path).and_then(|file| file.lock().map(|()| file));
    let _held = waiting.with_context(|| format!("locking {lock_path}"))?;
    let rustc = dir.join("rustc");
    if !dir.is_dir() {
        let made = partial_path(&dir);
        if made.exists() {
            fs::remove_dir_all(&made).with_context(|| format!("removing {made}"))?;
        }
        for package in &packages {
            unpack::unpack_deb(&downloader.path_of(&package.sha256), &made)?;
        }
        let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
        let script = format!(
            "#!/bin/sh\n\
             here=${{0%/*}}\n\
             LD_LIBRARY_PATH=$here/usr/lib/{triplet}:$here/lib/{triplet} exec \"$here/usr/bin/rustc\" \"$@\"\n"
        );
        let path = made.join("rustc");
        fs::write(&path, script).with_context(|| format!("writing {path}"))?;
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        fs::rename(&made, &dir).with_context(|| format!("renaming {made}"))?;
    }
    Ok(UnpackedCompiler { rustc, version })
}
