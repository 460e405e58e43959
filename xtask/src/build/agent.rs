//! The stage `agent`: the robot's own program, compiled for the board's architecture into one static binary.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::BuildContext;
use super::compile::{Compilation, compile, hashes, linker_version, own_compiler};
use crate::artifact::{Artifact, write_atomically};
use crate::cache::CacheKey;
use crate::exec::{Tool, find_program};
use crate::fetch::Downloader;
use crate::progress::{format_bytes, warn};
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
    /// Debian's package of its static C library.
    static_libc: &'static str,
}

fn find_architecture(arch: &str) -> Result<Architecture> {
    match arch {
        "arm64" => Ok(Architecture {
            triple: "aarch64-unknown-linux-gnu",
            cross: "aarch64-linux-gnu-gcc",
            static_libc: "libc6-dev-arm64-cross",
        }),
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
                    let fetcher = Downloader::for_cache(build.cache, build.options.offline)?;
                    let unpacked = compiler::unpack_compiler(lock, &fetcher, &build.cache.root)?;
                    cargo = cargo.env("RUSTC", unpacked.rustc.as_str());
                    format!("rustc {}", unpacked.version)
                }
            };
            let into = build.cache.root.join("agent");
            let wanted = Compilation {
                root: build.root,
                package: PACKAGE,
                program: PACKAGE,
                triple: target.triple,
                cross_linker: (!native).then_some(linker),
                static_libc: target.static_libc,
                into: &into,
                offline: build.options.offline,
                log: build.log("agent"),
                step: "agent",
            };
            let content = compile(&wanted, cargo)?;
            let path = dir.join(PACKAGE);
            write_atomically(&path, |out| Ok(out.write_all(&content)?))?;
            let components = agent_components(build, &target)?;
            Ok(BuiltAgent { binary: Artifact::from_file(path)?, compiler, components })
        },
    )
}

fn agent_key(
    build: &BuildContext<'_>,
    target: &Architecture,
    linker: &str,
    compiler: &str,
) -> Result<CacheKey> {
    let sources = hashes(build.root, &SOURCES)?;
    let linker = linker_version(linker)?;
    CacheKey::new("agent", AGENT_VERSION)
        .with("target", target.triple)
        .with("compiler", compiler)
        .with("linker", linker)
        .with_json("sources", &sources)
}

/// Fetches the locked compiler; returns a new lock when the mirror no longer had all of its
/// packages.
fn fetch_compiler(
    build: &BuildContext<'_>,
    lock: &PackagesLock,
    path: &Utf8Path,
) -> Result<Option<PackagesLock>> {
    build.require_tools()?;
    let fetcher = Downloader::for_cache(build.cache, build.options.offline)?;
    let mirrors = if build.options.offline { None } else { Some(AptMirrors::from_host()?) };
    let policy = if build.options.locked { LockPolicy::Locked } else { LockPolicy::Replace };
    let fetched =
        compiler::fetch_compiler(lock, &fetcher, mirrors.as_ref(), policy, &build.cache.root)?;
    let Some((new, replaced)) = fetched else { return Ok(None) };
    let names: Vec<_> = replaced.iter().map(|r| r.name.as_str()).collect();
    warn(format!(
        "the mirror no longer has the locked compiler; replaced it and updated {LOCK}: {}",
        names.join(", ")
    ));
    new.save(path)?;
    Ok(Some(new))
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
