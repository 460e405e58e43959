//! The stage `agent`: the robot's own program, compiled for the board's architecture into one static binary.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::BuildContext;
use crate::artifact::{Artifact, hash_bytes, write_atomically};
use crate::cache::CacheKey;
use crate::exec::{Tool, cargo_home, find_program};
use crate::fetch::Downloader;
use crate::progress::{ProgressStep, ProgressUnit, format_bytes, warn};
use crate::rootfs::debian::{AptMirrors, LockPolicy, PackagesLock, compiler};
use crate::sbom::{SbomComponent, SbomOrigin};
use crate::wheel::metadata::License;

/// Raised when compilation changes its output.
const AGENT_VERSION: u32 = 2;
/// The package, which is also the name of the binary.
pub const PACKAGE: &str = "slotd";
/// The path of the compiler's lock in the workspace; `cargo xtask lock` creates it.
pub const LOCK: &str = "slotd/compiler.lock";
/// The sources that are compiled, besides the crates in `Cargo.lock`.
pub const SOURCES: [&str; 8] = [
    "Cargo.lock",
    "Cargo.toml",
    "bundle/Cargo.toml",
    "bundle/src",
    "contract/Cargo.toml",
    "contract/src",
    "slotd/Cargo.toml",
    "slotd/src",
];

/// The compiled agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BuiltAgent {
    /// The binary.
    pub binary: Artifact,
    /// The compiler that built it.
    pub compiler: String,
    /// The agent and its crates, for the bill of materials.
    pub components: Vec<SbomComponent>,
}

impl BuiltAgent {
    /// The stage's outputs.
    fn files(&self) -> Vec<Utf8PathBuf> {
        vec![self.binary.path.clone()]
    }
}

/// The names of an architecture.
struct Architecture {
    /// Rust's target.
    triple: &'static str,
    /// The cross linker for it.
    cross: &'static str,
}

fn find_architecture(arch: &str) -> Result<Architecture> {
    match arch {
        "arm64" => {
            Ok(Architecture { triple: "aarch64-unknown-linux-gnu", cross: "aarch64-linux-gnu-gcc" })
        }
        other => bail!("the agent cannot be compiled for `{other}`; only arm64 is supported"),
    }
}

/// The stage `agent`.
///
/// # Errors
/// No compiler for the target; code that does not compile; a program that is not static.
pub fn build_agent(build: &mut BuildContext<'_>) -> Result<BuiltAgent> {
    let target = find_architecture(&build.plan.board.arch)?;
    let native = target.triple.starts_with(std::env::consts::ARCH);
    let linker = if native { "gcc" } else { target.cross };
    if find_program(linker).is_none() {
        build.require_tools()?;
    }
    let own = own_compiler(target.triple);
    let path = build.root.join(LOCK);
    let mut lock = None;
    let compiler = match own {
        Some(version) => version,
        None => {
            let locked = PackagesLock::load(&path)?;
            let identity = compiler::compiler_identity(&locked);
            lock = Some(locked);
            identity
        }
    };
    let mut key = agent_key(build, &target, linker, &compiler)?;
    if let Some(known) = &lock
        && !build.cache.has(
            "agent",
            &self::agent_key(build, &target, linker, &compiler)?.finish(),
            BuiltAgent::files,
        )?
        && let Some(new) = fetch_compiler(build, known, &path)?
    {
        key = self::agent_key(build, &target, linker, &compiler::compiler_identity(&new))?;
        lock = Some(new);
    }
    build.stage(
        "agent",
        key,
        BuiltAgent::files,
        |agent| format!("{PACKAGE} {}, {}", format_bytes(agent.binary.size), agent.compiler),
        |build, dir| {
            let mut cargo = Tool::cargo();
            let compiler = match &lock {
                None => compiler.clone(),
                Some(lock) => {
                    let downloader = Downloader::for_cache(build.cache, build.options.offline)?;
                    let unpacked = compiler::unpack_compiler(lock, &downloader, &build.cache.root)?;
                    cargo = cargo.env("RUSTC", unpacked.rustc.as_str());
                    format!("rustc {}", unpacked.version)
                }
            };
            let into = build.cache.root.join("agent");
            compile_agent(build, cargo, &target, (!native).then_some(linker), &into)?;
            let made = into.join(target.triple).join("release").join(PACKAGE);
            let content = std::fs::read(&made).with_context(|| format!("reading {made}"))?;
            check_static(&content).with_context(|| format!("reading the metadata of {made}"))?;
            let path = dir.join(PACKAGE);
            write_atomically(&path, |out| Ok(out.write_all(&content)?))?;
            let components = agent_components(build, &target)?;
            Ok(BuiltAgent { binary: Artifact::from_file(path)?, compiler, components })
        },
    )
}

/// The version of the machine's own compiler, if it supports the target.
fn own_compiler(triple: &str) -> Option<String> {
    let ask = |arguments: &[&str]| Tool::new("rustc").args(arguments).read().ok();
    let dir = ask(&["--print", "target-libdir", "--target", triple])?;
    let there = Utf8Path::new(dir.trim()).is_dir();
    if there { ask(&["--version"]).map(|text| text.trim().to_owned()) } else { None }
}

fn agent_key(
    build: &BuildContext<'_>,
    target: &Architecture,
    linker: &str,
    compiler: &str,
) -> Result<CacheKey> {
    let mut sources = BTreeMap::new();
    for source in SOURCES {
        hash_sources(build.root, Utf8Path::new(source), &mut sources)?;
    }
    let linker = Tool::new(linker).arg("--version").read()?;
    CacheKey::new("agent", AGENT_VERSION)
        .with("target", target.triple)
        .with("compiler", compiler)
        .with("linker", linker.lines().next().unwrap_or_default())
        .with_json("sources", &sources)
}

/// Hashes a file, or all files below a directory.
fn hash_sources(
    root: &Utf8Path,
    path: &Utf8Path,
    into: &mut BTreeMap<Utf8PathBuf, String>,
) -> Result<()> {
    let full = root.join(path);
    if full.is_dir() {
        for entry in full.read_dir_utf8().with_context(|| format!("reading {path}"))? {
            hash_sources(root, &path.join(entry?.file_name()), into)?;
        }
    } else {
        let content = std::fs::read(&full).with_context(|| format!("reading {path}"))?;
        into.insert(path.to_owned(), hash_bytes(&content));
    }
    Ok(())
}

/// Fetches the locked compiler; returns a new lock when the mirror no longer had all of its
/// packages.
fn fetch_compiler(
    build: &BuildContext<'_>,
    lock: &PackagesLock,
    path: &Utf8Path,
) -> Result<Option<PackagesLock>> {
    build.require_tools()?;
    let downloader = Downloader::for_cache(build.cache, build.options.offline)?;
    let mirrors = if build.options.offline { None } else { Some(AptMirrors::from_host()?) };
    let policy = if build.options.locked { LockPolicy::Locked } else { LockPolicy::Replace };
    let fetched =
        compiler::fetch_compiler(lock, &downloader, mirrors.as_ref(), policy, &build.cache.root)?;
    let Some((new, replaced)) = fetched else { return Ok(None) };
    let names: Vec<_> = replaced.iter().map(|r| r.name.as_str()).collect();
    warn(format!(
        "the mirror no longer has the locked compiler; replaced it and updated {LOCK}: {}",
        names.join(", ")
    ));
    new.save(path)?;
    Ok(Some(new))
}

fn compile_agent(
    build: &BuildContext<'_>,
    mut cargo: Tool,
    target: &Architecture,
    linker: Option<&str>,
    into: &Utf8Path,
) -> Result<()> {
    let home = cargo_home()?;
    let variable = target.triple.to_uppercase().replace('-', "_");
    if let Some(linker) = linker {
        cargo = cargo
            .env(&format!("CARGO_TARGET_{variable}_LINKER"), linker)
            .env(&format!("CC_{}", variable.to_lowercase()), linker);
    }
    // The binary must not contain the paths of sources.
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={}=/slipway", build.root),
        format!("--remap-path-prefix={home}=/cargo"),
    ];
    // The crate `cc` splits these like a shell (its variable below), so directories may contain
    // spaces.
    let quoted = |flag: String| format!("'{}'", flag.replace('\'', r"'\''"));
    let c_flags = [
        quoted(format!("-ffile-prefix-map={home}=/cargo")),
        quoted(format!("-ffile-prefix-map={into}=/build")),
    ];
    cargo = cargo
        .args(["build", "--locked", "--package", PACKAGE, "--release"])
        .args(["--target", target.triple])
        .env("CARGO_TARGET_DIR", into.as_str())
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CC_SHELL_ESCAPED_FLAGS", "1")
        .env(&format!("CFLAGS_{}", variable.to_lowercase()), c_flags.join(" "))
        .env_remove("RUSTFLAGS")
        .current_dir(build.root)
        .log(&build.log("agent"));
    if build.options.offline {
        cargo = cargo.arg("--offline");
    }
    let step = ProgressStep::new("agent", "compiling", 0, ProgressUnit::Items);
    cargo
        .run_lines(|line| {
            if let Some(name) = line.trim_start().strip_prefix("Compiling ") {
                step.note(name);
                step.advance(1);
            }
        })
        .with_context(|| format!("compiling {PACKAGE} for {}", target.triple))
}

/// The metadata of the crates in the agent: all its dependencies, except those that are only used
/// to build it (build scripts, procedural macros).
fn agent_components(build: &BuildContext<'_>, target: &Architecture) -> Result<Vec<SbomComponent>> {
    // All crates were already fetched for the compilation.
    let text = Tool::cargo()
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        .args(["--filter-platform", target.triple])
        .current_dir(build.root)
        .read()
        .context("reading the agent's crates from cargo")?;
    let graph: Metadata = serde_json::from_str(&text).context("parsing the output of cargo")?;
    let packages: BTreeMap<&str, &Package> =
        graph.packages.iter().map(|package| (package.id.as_str(), package)).collect();
    let nodes: BTreeMap<&str, &Node> =
        graph.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let runs = |id: &str| {
        packages.get(id).is_some_and(|package| {
            !package.targets.iter().any(|target| target.kind.iter().any(|k| k == "proc-macro"))
        })
    };
    let needs = |id: &str| -> Vec<&str> {
        let dependencies = nodes.get(id).map_or(&[][..], |node| &node.deps);
        let normal = |d: &&Dependency| d.dep_kinds.iter().any(|k| k.kind.is_none());
        let ids = dependencies.iter().filter(normal).map(|d| d.pkg.as_str());
        ids.filter(|id| runs(id)).collect()
    };
    let component = |id: &str| -> Option<SbomComponent> {
        let package = packages.get(id)?;
        Some(SbomComponent {
            name: package.name.clone(),
            version: package.version.clone(),
            origin: if package.source.is_some() { SbomOrigin::Crate } else { SbomOrigin::Generic },
            sha256: None,
            license: package.license.clone().map(License::Expression),
            summary: package.description.as_ref().map(|d| d.trim().to_owned()),
            cpe: None,
            depends_on: Vec::new(),
        })
    };
    let first = graph.packages.iter().find(|package| package.name == PACKAGE);
    let mut waiting =
        vec![first.context("the output of cargo does not contain the agent")?.id.as_str()];
    let mut found = BTreeMap::new();
    while let Some(id) = waiting.pop() {
        if found.contains_key(id) {
            continue;
        }
        let mut this =
            component(id).with_context(|| format!("the output of cargo does not describe {id}"))?;
        this.depends_on =
            needs(id).into_iter().filter_map(|id| Some(component(id)?.purl())).collect();
        found.insert(id, this);
        waiting.extend(needs(id));
    }
    Ok(found.into_values().collect())
}

/// The part of `cargo metadata` that is used here (The Cargo Book, "cargo-metadata(1)").
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    description: Option<String>,
    source: Option<String>,
    targets: Vec<CrateTarget>,
}

#[derive(Deserialize)]
struct CrateTarget {
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    kind: Option<String>,
}

/// Rejects an ELF that needs a dynamic loader: the robot's libraries are not this machine's.
fn check_static(content: &[u8]) -> Result<()> {
    /// `PT_INTERP` (System V ABI, chapter 5, "Program Header"): names the dynamic loader.
    const INTERPRETER: u32 = 3;
    let number = |at: usize, length: usize| -> Option<usize> {
        let bytes = content.get(at..at + length)?;
        Some(bytes.iter().rev().fold(0, |all, byte| all << 8 | usize::from(*byte)))
    };
    let headers = || -> Option<Vec<u32>> {
        // ELF64, little-endian: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
        let (offset, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        (0..count).map(|n| u32::try_from(number(offset + n * size, 4)?).ok()).collect()
    };
    if !content.starts_with(b"\x7fELF\x02\x01") {
        bail!("not a 64-bit ELF file");
    }
    let headers = headers().context("the program headers are truncated")?;
    if headers.contains(&INTERPRETER) {
        bail!(
            "the program is not statically linked\n\
             help: install the static C library (on Debian: libc6-dev-arm64-cross)"
        );
    }
    Ok(())
}
