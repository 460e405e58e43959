//! The stage `program`: `slipway` for machines without a checkout, as one static binary for each platform that `releases.toml`
//! names.

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::agent::LOCK;
use super::compile::{Compilation, compile, hashes, linker_version, own_compiler};
use crate::artifact::{Artifact, write_atomically};
use crate::cache::{Cache, CacheKey, StageOrigin};
use crate::exec::{Tool, find_program};
use crate::facts;
use crate::fetch::Downloader;
use crate::program::STANDALONE;
use crate::progress::{format_bytes, say};
use crate::publish::pins::{self, Platform};
use crate::rootfs::debian::{AptMirrors, LockPolicy, PackagesLock, compiler};

/// Raised when compilation changes its output.
const PROGRAM_VERSION: u32 = 1;
/// The package of the program.
const PACKAGE: &str = "xtask";
/// The sources of `cargo xtask` and of the program, besides the crates in `Cargo.lock`.
pub const TOOL_SOURCES: [&str; 12] = [
    ".cargo",
    "Cargo.lock",
    "Cargo.toml",
    "bootmodel/Cargo.toml",
    "bootmodel/facts",
    "bootmodel/src",
    "bundle/Cargo.toml",
    "bundle/src",
    "contract/Cargo.toml",
    "contract/src",
    "xtask/Cargo.toml",
    "xtask/src",
];

/// A compiled program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    /// The name to save it under: `slipway-<version>-<architecture>`, the latter as `uname -m` prints it.
    pub name: String,
    /// The binary.
    pub binary: Artifact,
    /// The compiler that built it.
    pub compiler: String,
}

impl Program {
    /// The stage's outputs.
    fn files(&self) -> Vec<Utf8PathBuf> {
        vec![self.binary.path.clone()]
    }
}

/// The compiler for a platform.
enum Rustc {
    /// This machine's own, with its version.
    Own(String),
    /// The one of the lock.
    Locked(PackagesLock),
}

/// What compiling for a platform needs.
struct Target {
    /// Rust's target.
    triple: &'static str,
    /// The architecture, as `uname -m` and Rust name it.
    arch: &'static str,
    /// The linker on a machine of another architecture, and its Debian package.
    cross: (&'static str, &'static str),
    /// Debian's package of the static C library there.
    cross_libc: &'static str,
}

fn target(platform: Platform) -> Target {
    match platform {
        Platform::X86_64 => Target {
            triple: "x86_64-unknown-linux-gnu",
            arch: "x86_64",
            cross: ("x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"),
            cross_libc: "libc6-dev-amd64-cross",
        },
        Platform::Arm64 => Target {
            triple: "aarch64-unknown-linux-gnu",
            arch: "aarch64",
            cross: ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
            cross_libc: "libc6-dev-arm64-cross",
        },
    }
}

/// The programs for a release of this commit: those that the workspace's `releases.toml` names.
///
/// # Errors
/// When the checkout is not this commit (with `allow_changes`: this commit with changes); as [`program`].
pub fn programs(
    root: &Utf8Path,
    commit: Option<&str>,
    allow_changes: bool,
) -> Result<Vec<Program>> {
    if pins::programs(root)?.is_empty() {
        return Ok(Vec::new());
    }
    let facts = facts::collect(root)?;
    let commit = commit.context("the results name no commit to compile the programs from")?;
    ensure!(
        facts.commit.as_deref() == Some(commit) && (!facts.modified || allow_changes),
        "the results are of the commit {commit}, but the programs would be compiled from {}{}\n\
         help: check that commit out, or build again",
        facts.commit.as_deref().unwrap_or("no commit"),
        if facts.modified { " with changes" } else { "" }
    );
    let named = if facts.modified { format!("{commit} with changes") } else { commit.to_owned() };
    programs_in(root, &Cache::locate()?, &named)
}

/// The programs that the `releases.toml` of a checkout names, compiled with this cache. `commit` is what their `--version`
/// prints.
///
/// # Errors
/// As [`program`].
pub fn programs_in(root: &Utf8Path, cache: &Cache, commit: &str) -> Result<Vec<Program>> {
    let platforms = pins::programs(root)?;
    platforms.into_iter().map(|platform| program(root, cache, platform, commit)).collect()
}

/// Compiles the program for a platform, or uses its kept binary. `commit` is what its `--version` prints.
///
/// # Errors
/// No compiler or linker for the platform; code that does not compile; a program that is not static.
pub fn program(
    root: &Utf8Path,
    cache: &Cache,
    platform: Platform,
    commit: &str,
) -> Result<Program> {
    let Target { triple, arch, cross, cross_libc } = target(platform);
    let native = arch == std::env::consts::ARCH;
    let (linker, package) = if native { ("gcc", "gcc") } else { cross };
    ensure!(
        find_program(linker).is_some(),
        "there is no linker for {arch}: {linker} is missing\nhelp: sudo apt-get install {package}"
    );
    let rustc = match own_compiler(triple) {
        Some(version) => Rustc::Own(version),
        // The lock has the standard library of robots.
        None if platform == Platform::Arm64 => Rustc::Locked(PackagesLock::load(&root.join(LOCK))?),
        None => bail!(
            "this machine's Rust compiler has no standard library for {triple}\n\
             help: rustup target add {triple}"
        ),
    };
    let identity = match &rustc {
        Rustc::Own(version) => version.clone(),
        Rustc::Locked(lock) => compiler::compiler_identity(lock),
    };
    let key = CacheKey::new("program", PROGRAM_VERSION)
        .with("target", triple)
        .with("compiler", &identity)
        .with("linker", linker_version(linker)?)
        .with("commit", commit)
        .with_json("sources", &hashes(root, &TOOL_SOURCES)?)?;
    let name = format!("{STANDALONE}-{}-{arch}", env!("CARGO_PKG_VERSION"));
    let staged = cache.stage("program", &key.finish(), Program::files, |dir| {
        let mut cargo = Tool::cargo().env("SLIPWAY_COMMIT", commit);
        let compiler = match &rustc {
            Rustc::Own(version) => version.clone(),
            Rustc::Locked(lock) => {
                let fetcher = Downloader::for_cache(cache, false)?;
                let mirrors = AptMirrors::from_host()?;
                compiler::fetch_compiler(
                    lock,
                    &fetcher,
                    Some(&mirrors),
                    LockPolicy::Locked,
                    &cache.root,
                )?;
                let unpacked = compiler::unpack_compiler(lock, &fetcher, &cache.root)?;
                cargo = cargo.env("RUSTC", unpacked.rustc.as_str());
                format!("rustc {}", unpacked.version)
            }
        };
        let wanted = Compilation {
            root,
            package: PACKAGE,
            program: STANDALONE,
            triple,
            cross_linker: (!native).then_some(linker),
            static_libc: if native { "libc6-dev" } else { cross_libc },
            // The agent's: what both are made of is compiled once.
            into: &cache.root.join("agent"),
            offline: false,
            log: dir.join("program.log"),
            step: "program",
        };
        let content = compile(&wanted, cargo)?;
        let path = dir.join(STANDALONE);
        write_atomically(&path, |out| Ok(out.write_all(&content)?))?;
        Ok(Program { name: name.clone(), binary: Artifact::from_file(path)?, compiler })
    })?;
    let how = if staged.origin == StageOrigin::Made { "made" } else { "kept" };
    let Program { binary, compiler, .. } = &staged.value;
    say("program", format!("{name}  {}, {compiler} ({how})", format_bytes(binary.size)));
    Ok(staged.value)
}
