//! A bundle of the component `api` alone: the base's root from the cache, the wheels as trees, the
//! bundle. No agent and no image: for the repeated builds of an API developer.

use anyhow::{Context, Result};
use camino::Utf8PathBuf;
use serde::Serialize;

use super::{BuildContext, BuildOptions, BuiltBase, base, buildroot, image, open_build_keys};
use crate::artifact::Artifact;
use crate::build::BuildKeys;
use crate::cache::{Cache, CacheKey};
use crate::config::product::Engine;
use crate::progress::{format_bytes, say};
use crate::rootfs::buildroot::overrides::apply_overrides;
use crate::shared;
use crate::update::{ComponentRequest, PayloadRequest};
use crate::wheel::base::BaseSource;
use crate::wheel::{self, BasePython, WheelComponent};
use crate::workspace::{dist_dir, lock_dist_dir, resolve_plan};

/// Raised when a change of the component's layout changes its output.
const COMPONENT_VERSION: u32 = 1;
/// Raised when a change of packing changes its output.
const BUNDLE_VERSION: u32 = 1;

/// A bundle of a component.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ComponentBundle {
    /// The component's name.
    pub component: String,
    /// Its version, as its own metadata spells it.
    pub version: String,
    /// The bundle.
    pub bundle: Artifact,
}

/// Builds the bundle of the product's component `api`.
///
/// # Errors
/// The error of a stage, or a product without an API; no incomplete file has its final name then.
pub fn build_component(options: &BuildOptions) -> Result<ComponentBundle> {
    let (config, _, mut plan) = resolve_plan(&options.selection)?;
    let cache = Cache::locate()?;
    apply_overrides(&mut plan, &config.root, || Ok(cache.root.clone()), &options.overrides)?;
    say("plan", super::describe_plan(&plan));
    base::check_locks(&config)?;
    let signing = open_build_keys(&plan).context("choosing the signing key")?;
    let cache =
        shared::attach_shared_cache(cache, plan.product.kind, &signing.signer, options.offline)?;
    let dist = dist_dir(&config.root, &plan);
    let _turn = lock_dist_dir(&dist)?;
    let packages = base::package_spec(&config);
    let mut build = BuildContext::new(&plan, &config.root, dist, &cache, options, packages);
    let made = match plan.rootfs.engine {
        Engine::Debian => base::build_base(&mut build)?,
        Engine::Buildroot => buildroot::build_base(&mut build)?,
    };
    let component = run_component_stage(&mut build, &made)?;
    let (api, version) = (bundle::component::API, component.lock.version.clone());
    let artifact = pack_component(&mut build, &component, &signing)?;
    Ok(ComponentBundle { component: api.to_owned(), version, bundle: artifact })
}

/// The stage `component`: each wheel as a separate tree.
fn run_component_stage(build: &mut BuildContext<'_>, base: &BuiltBase) -> Result<WheelComponent> {
    let (lock, package) = base::wheel_lock(build)?.with_context(|| {
        format!(
            "the product {} has no API\nhelp: add [api] to configs/{}.toml",
            build.plan.product.name, build.plan.product.name
        )
    })?;
    let key = CacheKey::new("component", COMPONENT_VERSION)
        .with("wheels", wheel::lock_identity(&lock))
        .with("base", &base.system.rootfs.sha256);
    let root = base.system.rootfs.path.clone();
    build.stage(
        "component",
        key,
        wheel::component::component_files,
        |component| {
            let wheels = &component.lock.wheels;
            let size = wheels.iter().map(|wheel| wheel.bytes).sum();
            format!("{package} and {} wheels in all, {}", wheels.len(), format_bytes(size))
        },
        |build, dir| {
            let cache: &Utf8PathBuf = &build.cache.root;
            let wheels = wheel::fetch_wheels(&lock, build.cache, build.options.offline)?;
            let python = BasePython::read(BaseSource::Tar(root))?;
            let log = build.log("component");
            wheel::component::make_payloads(&wheel::WheelComponentRequest {
                lock: &lock,
                wheels: &wheels,
                base: &python,
                cache,
                out: dir,
                log: Some(&log),
            })
        },
    )
}

/// The stage `bundle` for it.
fn pack_component(
    build: &mut BuildContext<'_>,
    component: &WheelComponent,
    signing: &BuildKeys,
) -> Result<Artifact> {
    let plan = build.plan;
    let api = bundle::component::API;
    let (product, board) = (&plan.product, &plan.board.name);
    let name = format!("{}-{}-{board}.{api}.bundle", product.name, component.version);
    let out = build.dist.join(name);
    let level = image::compression_level(build.options.compression);
    let hashes: Vec<&str> = component.payloads.iter().map(|(_, a)| a.sha256.as_str()).collect();
    let key = CacheKey::new("component bundle", BUNDLE_VERSION)
        .with("out", out.as_str())
        .with_json("payloads", &hashes)?
        .with("epoch", plan.epoch.to_string())
        .with("signer", signing.signer_ids().join(" "))
        .with_json("product", &(product, board, &plan.update))?
        .with("level", format!("{level:?}"));
    let version =
        bundle::Version::parse(&component.version).context("converting the API's version")?;
    image::pack_component(build, signing, key, &out, |_, _| {
        let payloads = component
            .payloads
            .iter()
            .map(|(role, artifact)| PayloadRequest {
                role: role.clone(),
                path: artifact.path.clone(),
            })
            .collect();
        Ok(ComponentRequest { name: api.to_owned(), version, payloads })
    })
}
