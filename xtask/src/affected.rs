//! Finds what the changes since a commit affect: compares the inputs of every component of every
//! build by content. For CI, which only builds those.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use serde_json::Value;

use crate::artifact::{hash_bytes, hash_file};
// Each of them may change any component.
use crate::build::TOOL_SOURCES as BUILDER;
use crate::config::product::Engine;
use crate::config::{self, Config};
use crate::git;
use crate::plan::{self, CheckoutFacts, Plan};
use crate::render::INIT;
use crate::scratch::create_scratch_dir;

/// The directories of Buildroot.
const EXTERNAL: &str = "external";

/// One build: a product for a board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AffectedBuild {
    /// The product.
    pub product: String,
    /// The board.
    pub board: String,
    /// The engine.
    pub engine: Engine,
    /// The product's version.
    pub version: String,
    /// With a commit to compare with: the changed components, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<AffectedComponent>,
}

/// A component that must be rebuilt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AffectedComponent {
    /// `base`, `api`, `agent`, `boot`, `system` or `card`; `all` if the component is unknown.
    pub name: String,
    /// The inputs that changed: files, settings, and components that it depends on.
    pub reasons: Vec<String>,
}

/// The components, each after those that it depends on.
const COMPONENTS: [(&str, &[&str]); 6] = [
    ("base", &[]),
    ("api", &["base"]),
    ("agent", &[]),
    ("boot", &["base"]),
    ("system", &["base", "api", "agent", "boot"]),
    ("card", &["boot", "system"]),
];

/// Inputs by component: name and SHA-256 of each.
type ComponentInputs = BTreeMap<&'static str, BTreeMap<String, String>>;

/// All builds: every product for every one of its boards.
///
/// # Errors
/// When a product cannot be read.
pub fn list_builds(root: &Utf8Path, only: Option<&str>) -> Result<Vec<AffectedBuild>> {
    let mut builds = Vec::new();
    for name in config::list_products(root)? {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        let product = config::read_product(root, &name)?;
        for board in &product.boards {
            builds.push(AffectedBuild {
                product: name.clone(),
                board: board.value.0.clone(),
                engine: product.rootfs.engine.value,
                version: product.version.value.to_string(),
                components: Vec::new(),
            });
        }
    }
    Ok(builds)
}

/// The builds that changed since a commit, including uncommitted changes.
///
/// # Errors
/// When there is no such commit, or today's configuration is invalid. An old configuration that
/// cannot be read any more is a reason, not an error.
pub fn changed_since(
    root: &Utf8Path,
    revision: &str,
    only: Option<&str>,
) -> Result<Vec<AffectedBuild>> {
    let (_keep, old_root) = unpack_commit(root, revision)?;
    let old_builds = list_builds(&old_root, only).unwrap_or_default();
    let builder = differing_names(&hash_files(&old_root, &BUILDER)?, &hash_files(root, &BUILDER)?);
    let mut changed = Vec::new();
    for mut build in list_builds(root, only)? {
        let now = collect_inputs(root, &build)?;
        let same = |old: &&AffectedBuild| old.product == build.product && old.board == build.board;
        build.components = match old_builds.iter().find(same) {
            None => every_component("is new"),
            Some(old) => match collect_inputs(&old_root, old) {
                Ok(then) => compare_inputs(&then, &now, &builder),
                Err(error) => every_component(&format!("the old configuration: {error:#}")),
            },
        };
        if !build.components.is_empty() {
            changed.push(build);
        }
    }
    Ok(changed)
}

fn every_component(reason: &str) -> Vec<AffectedComponent> {
    vec![AffectedComponent { name: "all".to_owned(), reasons: vec![reason.to_owned()] }]
}

fn compare_inputs(
    then: &ComponentInputs,
    now: &ComponentInputs,
    builder: &BTreeSet<String>,
) -> Vec<AffectedComponent> {
    let empty = BTreeMap::new();
    let mut changed: Vec<AffectedComponent> = Vec::new();
    for (name, parts) in COMPONENTS {
        let of = |inputs: &ComponentInputs| inputs.get(name).unwrap_or(&empty).clone();
        let mut reasons: Vec<String> = differing_names(&of(then), &of(now)).into_iter().collect();
        // Cargo compiles the agent from its own sources, independently of the tool.
        if name != "agent" {
            reasons.extend(builder.iter().cloned());
        }
        let known = |part: &&&str| changed.iter().any(|c| c.name == **part);
        let made_of: Vec<_> =
            parts.iter().filter(known).map(|p| format!("component {p}")).collect();
        reasons.extend(made_of);
        if !reasons.is_empty() {
            changed.push(AffectedComponent { name: name.to_owned(), reasons });
        }
    }
    changed
}

fn differing_names(
    then: &BTreeMap<String, String>,
    now: &BTreeMap<String, String>,
) -> BTreeSet<String> {
    let names: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    names.into_iter().filter(|name| then.get(*name) != now.get(*name)).cloned().collect()
}

/// A commit's tree in a temporary directory.
fn unpack_commit(root: &Utf8Path, revision: &str) -> Result<(tempfile::TempDir, Utf8PathBuf)> {
    let git = || git::git_in(root);
    // A name that begins with a dash is not an option.
    let commit = git()
        .args(["rev-parse", "--verify", "--quiet", "--end-of-options"])
        .arg(format!("{revision}^{{commit}}"))
        .read()
        .with_context(|| {
            // When git refuses to read the repository at all, its own message explains why.
            let help = match git().args(["rev-parse", "--git-dir"]).read() {
                Ok(_) => "\nhelp: a shallow clone lacks history; CI needs `fetch-depth: 0`",
                Err(_) => "",
            };
            format!("finding the commit `{revision}`{help}")
        })?;
    let (keep, dir) = create_scratch_dir()?;
    git()
        .args(["archive", "--format=tar", commit.trim()])
        .stream(|out| Ok(tar::Archive::new(out).unpack(&dir)?))
        .with_context(|| format!("reading the tree of {revision}"))?;
    Ok((keep, dir))
}

/// The hashes of files and of all files below directories; missing ones are omitted.
fn hash_files(root: &Utf8Path, paths: &[&str]) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let mut waiting: Vec<Utf8PathBuf> = paths.iter().map(|path| Utf8PathBuf::from(*path)).collect();
    while let Some(path) = waiting.pop() {
        let full = root.join(&path);
        if full.is_dir() {
            for entry in full.read_dir_utf8().with_context(|| format!("reading {path}"))? {
                let entry = entry.with_context(|| format!("reading {path}"))?;
                waiting.push(path.join(entry.file_name()));
            }
        } else if full.is_file() {
            found.insert(path.to_string(), hash_file(&full)?.1);
        }
    }
    Ok(found)
}

fn collect_inputs(root: &Utf8Path, build: &AffectedBuild) -> Result<ComponentInputs> {
    let config = config::load(root, Some(&build.product), Some(&build.board))?;
    // The commit's time is in every output, and is not a change by itself.
    let facts = CheckoutFacts { commit: None, modified: false, epoch: 0 };
    let plan = plan::resolve(&config, &facts)?;
    let mut inputs = ComponentInputs::new();
    let mut add = |component: &'static str, name: String, hash: String| {
        inputs.entry(component).or_default().insert(name, hash);
    };
    let api = plan.api.as_ref().map(|api| &api.lock);
    for input in &plan.inputs {
        let path = &input.path;
        // The meaning of these two files is compared below.
        if *path == config.product.place.file || *path == config.board.place.file {
            continue;
        }
        let of_base = Some(path) == plan.rootfs.lock.as_ref()
            || is_fragment(&config, path)
            || config.source_keys.iter().any(|(key, _)| key == path);
        let component = if of_base {
            "base"
        } else if Some(path) == api {
            "api"
        } else if path.starts_with("board") {
            "boot"
        } else {
            "system"
        };
        add(component, path.to_string(), input.sha256.clone());
    }
    if plan.rootfs.engine == Engine::Buildroot {
        for (path, hash) in hash_files(root, &[EXTERNAL])? {
            add("base", path, hash);
        }
    }
    for (path, hash) in hash_files(
        root,
        &[&crate::build::AGENT_SOURCES[..], &[crate::build::COMPILER_LOCK]].concat(),
    )? {
        add("agent", path, hash);
    }
    for (path, hash) in hash_files(root, &[INIT])? {
        add("system", path, hash);
    }
    read_settings(&config, &plan, &mut add)?;
    Ok(inputs)
}

fn is_fragment(config: &Config, path: &Utf8Path) -> bool {
    config.fragments.iter().any(|(fragment, _)| fragment == path)
}

/// The settings of the product's and the board's file, by their meaning.
fn read_settings(
    config: &Config,
    plan: &Plan,
    add: &mut impl FnMut(&'static str, String, String),
) -> Result<()> {
    let value = serde_json::to_value(plan).context("describing the plan")?;
    let (product, board) = (&config.product.place.file, &config.board.place.file);
    let mut put = |component, file: &Utf8Path, name: &str, value: &Value| {
        add(component, format!("{file}: {name}"), hash_bytes(value.to_string().as_bytes()));
    };
    let fields = |of: &str| value[of].as_object().cloned().unwrap_or_default();
    for (name, value) in fields("board") {
        let component = match name.as_str() {
            "device-trees" | "modules-keep" | "firmware" | "bootloader" | "arch" => "base",
            "uboot" | "boot-flow" => "boot",
            // The settings of the virtual machine are not in any output.
            "qemu" => continue,
            _ => "system",
        };
        put(component, board, &name, &value);
    }
    for (name, value) in fields("rootfs") {
        let component = if name.starts_with("fill-") { "system" } else { "base" };
        put(component, product, &format!("rootfs.{name}"), &value);
    }
    for name in
        ["product", "identifiers", "overlay", "directories", "users", "ssh", "network", "update"]
    {
        put("system", product, name, &value[name]);
    }
    put("api", product, "api", &value["api"]);
    put("boot", board, "boot-files", &value["boot-files"]);
    put("card", board, "partitions", &value["disk"]);
    put("system", board, "partitions", &value["disk"]["partitions"]);
    // Not in the plan's JSON, which is for reading.
    let passwords: Vec<String> =
        plan.users.iter().map(|user| hash_bytes(user.password.as_bytes())).collect();
    put("system", product, "passwords", &serde_json::json!(passwords));
    Ok(())
}

/// The builds in human-readable form: one line each, then the components with their reasons.
pub fn describe_builds(builds: &[AffectedBuild]) -> String {
    let mut text = String::new();
    for build in builds {
        text.push_str(&format!("{} {}\n", build.product, build.board));
        for component in &build.components {
            let reasons = crate::progress::list_names(&component.reasons);
            text.push_str(&format!("  {:<7} {reasons}\n", component.name));
        }
    }
    text
}
