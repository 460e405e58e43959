//! The pipeline: the only place that sequences stages. Each stage is a function of the values of
//! the stages before it; slow stages are cached under the hash of their inputs.

mod agent;
pub mod alias;
mod base;
mod buildroot;
mod compile;
mod component;
pub mod environment;
mod image;
mod key;
mod options;
mod outcome;
mod program;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::Artifact;
use crate::cache::{Cache, CacheKey, StageOrigin, StageResult};
use crate::config::product::{BuildKind, Engine, RootLogin};
use crate::failure::BuildFailure;
use crate::keys::{self, KeyDirectory, SigningKey};
use crate::plan::Plan;
use crate::progress::{format_duration, say, warn};
use crate::render::{RenderedFiles, render};
use crate::report::ReportStage;
use crate::rootfs::buildroot::overrides::apply_overrides;
use crate::rootfs::debian::DebianSpec;
use crate::shared;
use crate::tools::{self, ToolPurpose};
use crate::wheel::InstalledWheels;
use crate::workspace::{dist_dir, lock_dist_dir, resolve_nightly, resolve_plan, save_plan};

pub use agent::{BuiltAgent, LOCK as COMPILER_LOCK, SOURCES as AGENT_SOURCES};
pub use base::{BuiltBase, check_locks, load_mirrors, package_spec, python_target};
pub use buildroot::output_name;
pub use component::{ComponentBundle, build_component};
pub use image::{BuiltCard, ComposedSystem, qemu_files, wrap_script};
pub use options::{BuildOptions, BuildStage, BundleCompression};
pub use outcome::BuildSummary;
pub use program::{Program, TOOL_SOURCES, program, programs, programs_in};

/// The context of a build.
pub struct BuildContext<'a> {
    /// The resolved build.
    pub plan: &'a Plan,
    /// The workspace.
    pub root: &'a Utf8Path,
    /// The directory for results.
    pub dist: Utf8PathBuf,
    /// Cached stages and downloads.
    pub cache: &'a Cache,
    /// What was asked for.
    pub options: &'a BuildOptions,
    /// The request that the package lock must match.
    packages: DebianSpec,
    /// How each stage went, for the report.
    stages: Vec<ReportStage>,
    /// The current stage, for the note about a failure.
    running: BuildStage,
    /// Whether all tools are installed; locked while they are being installed.
    tools: Arc<Mutex<bool>>,
}

/// Builds as far as it is asked for; the report, unless the build ends before its first stage that makes something.
///
/// # Errors
/// Whatever a stage returns; nothing partial is left under a final name.
pub fn build_image(options: &BuildOptions) -> Result<Option<BuildSummary>> {
    let started = Instant::now();
    let (config, _, mut plan) = match options.nightly {
        true => resolve_nightly(&options.selection)?,
        false => resolve_plan(&options.selection)?,
    };
    let cache = Cache::locate()?;
    apply_overrides(&mut plan, &config.root, || Ok(cache.root.clone()), &options.overrides)?;
    let dist = dist_dir(&config.root, &plan);
    let _turn = lock_dist_dir(&dist)?;
    BuildFailure::forget(&dist)?;
    say("plan", describe_plan(&plan));
    save_plan(&plan, &dist)?;
    let until = options.until.unwrap_or(BuildStage::Bundle);
    if until == BuildStage::Plan {
        return Ok(None);
    }
    // Checks that can fail early, before the slow work: templates, engine, keys.
    let mut rendered = render(&config.root, &plan)?;
    rendered.write(&dist.join("rendered"))?;
    if until == BuildStage::Render {
        say("render", dist.join("rendered"));
        return Ok(None);
    }
    let asked = options.buildroot.is_some() || options.legal_info;
    if plan.rootfs.engine == Engine::Debian && asked {
        bail!(
            "--buildroot and --legal-info need the engine buildroot, but the engine of {} is \
             debian\n\
             help: choose another product with --product",
            plan.product.name
        );
    }
    // The wheels' lock would be read when the base is made, minutes from now.
    if until >= BuildStage::Api {
        check_locks(&config)?;
    }
    let signing = open_build_keys(&plan).context("choosing the signing key")?;
    developer_access(&plan, &mut rendered).context("finding who may log in")?;
    let cache =
        shared::attach_shared_cache(cache, plan.product.kind, &signing.signer, options.offline)?;
    let packages = package_spec(&config);
    let mut build = BuildContext::new(&plan, &config.root, dist, &cache, options, packages);
    let made = match run_stages(&mut build, &rendered, &signing, until) {
        Ok(made) => made,
        Err(error) => {
            // The first error is the one to report.
            if let Err(second) = outcome::write_failure(&build, &error) {
                warn(format!("{second:#}"));
            }
            return Err(error);
        }
    };
    let report = outcome::collect_report(&build, &made, &rendered, &signing, started.elapsed())?;
    outcome::write_report(&build, report).map(Some)
}

/// A composed system, for `run --local` (no card image).
pub struct LocalBuild {
    /// What was built.
    pub plan: Plan,
    /// The directory of the results.
    pub dist: Utf8PathBuf,
    /// The root filesystem.
    pub system: ComposedSystem,
}

/// Builds up to the root filesystem, without a report.
///
/// # Errors
/// Whatever a stage returns.
pub fn build_for_local(options: &BuildOptions) -> Result<LocalBuild> {
    let (config, _, mut plan) = resolve_plan(&options.selection)?;
    let cache = Cache::locate()?;
    apply_overrides(&mut plan, &config.root, || Ok(cache.root.clone()), &options.overrides)?;
    let dist = dist_dir(&config.root, &plan);
    say("plan", describe_plan(&plan));
    let mut rendered = render(&config.root, &plan)?;
    check_locks(&config)?;
    let signing = open_build_keys(&plan).context("choosing the signing key")?;
    developer_access(&plan, &mut rendered).context("finding who may log in")?;
    let packages = package_spec(&config);
    let mut build = BuildContext::new(&plan, &config.root, dist.clone(), &cache, options, packages);
    let made = run_stages(&mut build, &rendered, &signing, BuildStage::Compose)?;
    drop(build);
    let system = made.system.context("the stage compose returns a system")?;
    Ok(LocalBuild { plan, dist, system })
}

/// The results of a build up to the requested stage.
pub struct BuildOutputs {
    /// The base system.
    pub base: BuiltBase,
    /// The API wheels.
    pub wheels: Option<InstalledWheels>,
    /// The robot's agent.
    pub agent: Option<BuiltAgent>,
    /// The root filesystem image.
    pub system: Option<ComposedSystem>,
    /// The card image.
    pub card: Option<BuiltCard>,
    /// The bundle.
    pub bundle: Option<Artifact>,
}

/// The signing keys, and the keys that the robot trusts.
pub struct BuildKeys {
    /// The newest key; opened for this build only, like the others: no secret is ever printed.
    pub signer: SigningKey,
    /// With the earlier keys that are still valid: these sign bundles.
    pub signers: Vec<SigningKey>,
    /// The key set that goes into the image, as JSON.
    pub key_set: Vec<u8>,
}

impl BuildKeys {
    /// The ids of the keys that sign bundles.
    fn signer_ids(&self) -> Vec<&str> {
        self.signers.iter().map(|signer| signer.key().id.as_str()).collect()
    }
}

fn open_build_keys(plan: &Plan) -> Result<BuildKeys> {
    let kind = plan.product.kind;
    let mut keys = KeyDirectory::open(&keys::key_directory()?)?;
    let signers = keys.signers(kind)?;
    let signer = signers.first().context("no signing key")?.clone();
    let key_set =
        serde_json::to_vec_pretty(&keys.set_for(kind)).context("describing the key set")?;
    Ok(BuildKeys { signer, signers, key_set })
}

/// The developer who builds a development product may log in to it as root: `push` needs that. A
/// release product accepts no key from outside of the repository.
fn developer_access(plan: &Plan, rendered: &mut RenderedFiles) -> Result<()> {
    let closed =
        plan.product.kind == BuildKind::Release || plan.ssh.permit_root_login == RootLogin::No;
    let Some(root) = plan.users.iter().find(|user| user.uid == 0).filter(|_| !closed) else {
        return Ok(());
    };
    let dir = keys::key_directory()?;
    let own = keys::authorized_keys(&dir)?;
    if !own.is_empty() {
        let path = dir.join(keys::AUTHORIZED_KEYS);
        say("access", format!("{} accepts the SSH keys of {path}", root.name));
        rendered.authorized_keys.entry(root.name.clone()).or_default().push_str(&own);
    }
    Ok(())
}

fn run_stages(
    build: &mut BuildContext<'_>,
    rendered: &RenderedFiles,
    signing: &BuildKeys,
    until: BuildStage,
) -> Result<BuildOutputs> {
    let (base, wheels, agent) = build_foundations(build, until)?;
    let mut made = BuildOutputs { base, wheels, agent, system: None, card: None, bundle: None };
    if let (true, Some(agent)) = (until >= BuildStage::Compose, &made.agent) {
        build.running = BuildStage::Compose;
        let parts = key::ComposeInputs {
            rendered,
            base: &made.base,
            wheels: made.wheels.as_ref(),
            agent,
            signing,
        };
        made.system = Some(image::compose_system(build, &parts)?);
    }
    if let (true, Some(system)) = (until >= BuildStage::Image, &made.system) {
        build.running = BuildStage::Image;
        made.card = Some(image::build_card(build, rendered, &made.base, system)?);
        if until >= BuildStage::Bundle {
            build.running = BuildStage::Bundle;
            made.bundle = Some(image::build_bundle(build, rendered, &made.base, system, signing)?);
        }
    }
    Ok(made)
}

/// Builds the inputs of the root filesystem. The agent does not depend on the base, so it is
/// compiled while packages are installed, which uses little more than one core.
fn build_foundations(
    build: &mut BuildContext<'_>,
    until: BuildStage,
) -> Result<(BuiltBase, Option<InstalledWheels>, Option<BuiltAgent>)> {
    let mut beside = build.beside(BuildStage::Agent);
    let (first, agent) = std::thread::scope(|scope| {
        let compile = || {
            agent::build_agent(&mut beside).inspect_err(|_| {
                warn(
                    "building the agent failed; waiting for the other stages so that their \
                 results are cached",
                );
            })
        };
        let compiling = (until >= BuildStage::Agent).then(|| scope.spawn(compile));
        let first = base_and_wheels(build, until);
        if let (Err(error), Some(false)) = (&first, compiling.as_ref().map(|c| c.is_finished())) {
            warn(format!(
                "{error:#}\nwaiting for the agent's compilation so that its result is cached"
            ));
        }
        (first, compiling.map(|thread| thread.join()))
    });
    let (base, wheels) = first?;
    let agent = match agent {
        None => None,
        Some(Err(_)) => bail!("the thread that compiles the agent panicked"),
        Some(Ok(made)) => {
            build.running = BuildStage::Agent;
            build.stages.append(&mut beside.stages);
            Some(made?)
        }
    };
    Ok((base, wheels, agent))
}

fn base_and_wheels(
    build: &mut BuildContext<'_>,
    until: BuildStage,
) -> Result<(BuiltBase, Option<InstalledWheels>)> {
    let base = match build.plan.rootfs.engine {
        Engine::Debian => base::build_base(build)?,
        Engine::Buildroot => buildroot::build_base(build)?,
    };
    if until < BuildStage::Api {
        return Ok((base, None));
    }
    build.running = BuildStage::Api;
    let wheels = base::install_wheels(build, &base)?;
    Ok((base, wheels))
}

fn describe_plan(plan: &Plan) -> String {
    let mut text =
        format!("{} {} for {}", plan.product.name, plan.product.version, plan.board.name);
    match plan.rootfs.engine {
        Engine::Debian => text.push_str(&format!(" · debian {}", plan.rootfs.suite)),
        Engine::Buildroot => {
            let release = plan.rootfs.buildroot.as_ref().map_or("", |b| b.release.as_str());
            text.push_str(&format!(" · buildroot {release}"));
        }
    }
    if let Some(api) = &plan.api {
        text.push_str(&format!(" · {}", api.package));
    }
    text
}

impl<'a> BuildContext<'a> {
    fn new(
        plan: &'a Plan,
        root: &'a Utf8Path,
        dist: Utf8PathBuf,
        cache: &'a Cache,
        options: &'a BuildOptions,
        packages: DebianSpec,
    ) -> Self {
        let (stages, tools) = (Vec::new(), Arc::default());
        let running = BuildStage::Base;
        Self { plan, root, dist, cache, options, packages, stages, running, tools }
    }

    /// The same build, for a stage that runs in parallel with others.
    fn beside(&self, running: BuildStage) -> Self {
        let (dist, packages) = (self.dist.clone(), self.packages.clone());
        let (stages, tools) = (Vec::new(), Arc::clone(&self.tools));
        Self { dist, packages, stages, running, tools, ..*self }
    }

    /// Runs a stage, or uses its cached result; prints how long it took and records it for the
    /// report.
    fn stage<T: serde::Serialize + serde::de::DeserializeOwned>(
        &mut self,
        name: &str,
        key: CacheKey,
        outputs: impl Fn(&T) -> Vec<Utf8PathBuf>,
        describe: impl Fn(&T) -> String,
        work: impl FnOnce(&Self, &Utf8Path) -> Result<T>,
    ) -> Result<T> {
        let started = Instant::now();
        let key = key.finish();
        let this = &*self;
        let StageResult { value, origin } = self.cache.stage(name, &key, outputs, |dir| {
            this.require_tools()?;
            work(this, dir)
        })?;
        let seconds = started.elapsed();
        let note = describe(&value);
        let time = match origin {
            StageOrigin::Made => format_duration(seconds),
            StageOrigin::Kept => "kept".to_owned(),
            StageOrigin::Shared => "from the shared cache".to_owned(),
        };
        say(name, format!("{note}  ({time})"));
        self.stages.push(ReportStage {
            name: name.to_owned(),
            seconds: seconds.as_secs_f64(),
            cached: origin != StageOrigin::Made,
            note,
        });
        Ok(value)
    }

    /// All tools of the build, checked once, before the first stage that does any work.
    fn require_tools(&self) -> Result<()> {
        let mut there = self.tools.lock().unwrap_or_else(PoisonError::into_inner);
        if !*there {
            let engine = match self.plan.rootfs.engine {
                Engine::Debian => ToolPurpose::Debian,
                Engine::Buildroot => ToolPurpose::Buildroot,
            };
            tools::require_tools(&[ToolPurpose::Build, engine], !self.options.no_install)?;
            *there = true;
        }
        Ok(())
    }

    /// The log of a stage; errors name it.
    fn log(&self, stage: &str) -> Utf8PathBuf {
        self.dist.join("log").join(format!("{stage}.log"))
    }

    /// An output's final path.
    fn output(&self, extension: &str) -> Utf8PathBuf {
        self.dist.join(format!("{}.{extension}", self.plan.stem()))
    }
}
