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
use crate::cache::{Cache, Key, Origin, Staged};
use crate::config::product::{Engine, Kind, RootLogin};
use crate::failure::Failure;
use crate::keys::{self, Keys, Signer};
use crate::plan::Plan;
use crate::progress::{duration, say, warn};
use crate::render::{Rendered, render};
use crate::report;
use crate::rootfs::debian::DebianSpec;
use crate::shared;
use crate::tools::{self, Purpose};
use crate::workspace::{dist, resolve, resolve_nightly, save, turn};

pub use agent::{Agent, LOCK as COMPILER_LOCK, SOURCES as AGENT_SOURCES};
pub use base::{Base, Wheels, check_locks, mirrors, package_spec, python_target};
pub use buildroot::output_name;
pub use component::{ComponentBundle, build_component};
pub use image::{Card, System, qemu_files, wrap_script};
pub use options::{BuildOptions, Compression, Stage};
pub use outcome::Finished;
pub use program::{Program, TOOL_SOURCES, program, programs};

/// The context of a build.
pub struct Build<'a> {
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
    stages: Vec<report::Stage>,
    /// The current stage, for the note about a failure.
    running: Stage,
    /// Whether all tools are installed; locked while they are being installed.
    tools: Arc<Mutex<bool>>,
}

/// Builds as far as it is asked for; the report, unless the build ends before its first stage that makes something.
///
/// # Errors
/// Whatever a stage returns; nothing partial is left under a final name.
pub fn build_image(options: &BuildOptions) -> Result<Option<Finished>> {
    let started = Instant::now();
    let (config, _, plan) = match options.nightly {
        true => resolve_nightly(&options.selection)?,
        false => resolve(&options.selection)?,
    };
    let cache = Cache::locate()?;
    let dist = dist(&config.root, &plan);
    let _turn = turn(&dist)?;
    Failure::forget(&dist)?;
    say("plan", summary(&plan));
    save(&plan, &dist)?;
    let until = options.until.unwrap_or(Stage::Bundle);
    if until == Stage::Plan {
        return Ok(None);
    }
    // Checks that can fail early, before the slow work: templates, engine, keys.
    let mut rendered = render(&config.root, &plan)?;
    rendered.write(&dist.join("rendered"))?;
    if until == Stage::Render {
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
    if until >= Stage::Api {
        check_locks(&config)?;
    }
    let signing = signing(&plan).context("choosing the signing key")?;
    developer_access(&plan, &mut rendered).context("finding who may log in")?;
    let cache = shared::attach(cache, plan.product.kind, &signing.signer, options.offline)?;
    let packages = package_spec(&config);
    let mut build = Build::new(&plan, &config.root, dist, &cache, options, packages);
    let made = match stages(&mut build, &rendered, &signing, until) {
        Ok(made) => made,
        Err(error) => {
            // The first error is the one to report.
            if let Err(second) = outcome::write_failure(&build, &error) {
                warn(format!("{second:#}"));
            }
            return Err(error);
        }
    };
    let report = outcome::report(&build, &made, &rendered, &signing, started.elapsed())?;
    outcome::write(&build, report).map(Some)
}

/// A composed system, for `run --local` (no card image).
pub struct Composed {
    /// What was built.
    pub plan: Plan,
    /// The directory of the results.
    pub dist: Utf8PathBuf,
    /// The root filesystem.
    pub system: System,
}

/// Builds up to the root filesystem, without a report.
///
/// # Errors
/// Whatever a stage returns.
pub fn compose(options: &BuildOptions) -> Result<Composed> {
    let (config, _, plan) = resolve(&options.selection)?;
    let cache = Cache::locate()?;
    let dist = dist(&config.root, &plan);
    say("plan", summary(&plan));
    let mut rendered = render(&config.root, &plan)?;
    check_locks(&config)?;
    let signing = signing(&plan).context("choosing the signing key")?;
    developer_access(&plan, &mut rendered).context("finding who may log in")?;
    let packages = package_spec(&config);
    let mut build = Build::new(&plan, &config.root, dist.clone(), &cache, options, packages);
    let made = stages(&mut build, &rendered, &signing, Stage::Compose)?;
    drop(build);
    let system = made.system.context("the stage compose returns a system")?;
    Ok(Composed { plan, dist, system })
}

/// The results of a build up to the requested stage.
pub struct Made {
    /// The base system.
    pub base: Base,
    /// The API wheels.
    pub wheels: Option<Wheels>,
    /// The robot's agent.
    pub agent: Option<Agent>,
    /// The root filesystem image.
    pub system: Option<System>,
    /// The card image.
    pub card: Option<Card>,
    /// The bundle.
    pub bundle: Option<Artifact>,
}

/// The signing keys, and the keys that the robot trusts.
pub struct Signing {
    /// The newest key; opened for this build only, like the others: no secret is ever printed.
    pub signer: Signer,
    /// With the earlier keys that are still valid: these sign bundles.
    pub signers: Vec<Signer>,
    /// The key set that goes into the image, as JSON.
    pub key_set: Vec<u8>,
}

fn signing(plan: &Plan) -> Result<Signing> {
    let kind = plan.product.kind;
    let mut keys = Keys::open(&keys::directory()?)?;
    let signers = keys.signers(kind)?;
    let signer = signers.first().context("no signing key")?.clone();
    let key_set =
        serde_json::to_vec_pretty(&keys.set_for(kind)).context("describing the key set")?;
    Ok(Signing { signer, signers, key_set })
}

/// The developer who builds a development product may log in to it as root: `push` needs that. A
/// release product accepts no key from outside of the repository.
fn developer_access(plan: &Plan, rendered: &mut Rendered) -> Result<()> {
    let closed = plan.product.kind == Kind::Release || plan.ssh.permit_root_login == RootLogin::No;
    let Some(root) = plan.users.iter().find(|user| user.uid == 0).filter(|_| !closed) else {
        return Ok(());
    };
    let dir = keys::directory()?;
    let own = keys::authorized_keys(&dir)?;
    if !own.is_empty() {
        let path = dir.join(keys::AUTHORIZED_KEYS);
        say("access", format!("{} accepts the SSH keys of {path}", root.name));
        rendered.authorized_keys.entry(root.name.clone()).or_default().push_str(&own);
    }
    Ok(())
}

fn stages(
    build: &mut Build<'_>,
    rendered: &Rendered,
    signing: &Signing,
    until: Stage,
) -> Result<Made> {
    let (base, wheels, agent) = foundations(build, until)?;
    let mut made = Made { base, wheels, agent, system: None, card: None, bundle: None };
    if let (true, Some(agent)) = (until >= Stage::Compose, &made.agent) {
        build.running = Stage::Compose;
        let parts = key::Inputs {
            rendered,
            base: &made.base,
            wheels: made.wheels.as_ref(),
            agent,
            signing,
        };
        made.system = Some(image::compose(build, &parts)?);
    }
    if let (true, Some(system)) = (until >= Stage::Image, &made.system) {
        build.running = Stage::Image;
        made.card = Some(image::card(build, rendered, &made.base, system)?);
        if until >= Stage::Bundle {
            build.running = Stage::Bundle;
            made.bundle = Some(image::bundle(build, rendered, &made.base, system, signing)?);
        }
    }
    Ok(made)
}

/// Builds the inputs of the root filesystem. The agent does not depend on the base, so it is
/// compiled while packages are installed, which uses little more than one core.
fn foundations(
    build: &mut Build<'_>,
    until: Stage,
) -> Result<(Base, Option<Wheels>, Option<Agent>)> {
    let mut beside = build.beside(Stage::Agent);
    let (first, agent) = std::thread::scope(|scope| {
        let compile = || {
            agent::agent(&mut beside).inspect_err(|_| {
                warn(
                    "building the agent failed; waiting for the other stages so that their \
                 results are cached",
                );
            })
        };
        let compiling = (until >= Stage::Agent).then(|| scope.spawn(compile));
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
            build.running = Stage::Agent;
            build.stages.append(&mut beside.stages);
            Some(made?)
        }
    };
    Ok((base, wheels, agent))
}

fn base_and_wheels(build: &mut Build<'_>, until: Stage) -> Result<(Base, Option<Wheels>)> {
    let base = match build.plan.rootfs.engine {
        Engine::Debian => base::base(build)?,
        Engine::Buildroot => buildroot::base(build)?,
    };
    if until < Stage::Api {
        return Ok((base, None));
    }
    build.running = Stage::Api;
    let wheels = base::wheels(build, &base)?;
    Ok((base, wheels))
}

fn summary(plan: &Plan) -> String {
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

impl<'a> Build<'a> {
    fn new(
        plan: &'a Plan,
        root: &'a Utf8Path,
        dist: Utf8PathBuf,
        cache: &'a Cache,
        options: &'a BuildOptions,
        packages: DebianSpec,
    ) -> Self {
        let (stages, tools) = (Vec::new(), Arc::default());
        let running = Stage::Base;
        Self { plan, root, dist, cache, options, packages, stages, running, tools }
    }

    /// The same build, for a stage that runs in parallel with others.
    fn beside(&self, running: Stage) -> Self {
        let (dist, packages) = (self.dist.clone(), self.packages.clone());
        let (stages, tools) = (Vec::new(), Arc::clone(&self.tools));
        Self { dist, packages, stages, running, tools, ..*self }
    }

    /// Runs a stage, or uses its cached result; prints how long it took and records it for the
    /// report.
    fn stage<T: serde::Serialize + serde::de::DeserializeOwned>(
        &mut self,
        name: &str,
        key: Key,
        outputs: impl Fn(&T) -> Vec<Utf8PathBuf>,
        describe: impl Fn(&T) -> String,
        work: impl FnOnce(&Self, &Utf8Path) -> Result<T>,
    ) -> Result<T> {
        let started = Instant::now();
        let key = key.finish();
        let this = &*self;
        let Staged { value, origin } = self.cache.stage(name, &key, outputs, |dir| {
            this.require_tools()?;
            work(this, dir)
        })?;
        let seconds = started.elapsed();
        let note = describe(&value);
        let time = match origin {
            Origin::Made => duration(seconds),
            Origin::Kept => "kept".to_owned(),
            Origin::Shared => "from the shared cache".to_owned(),
        };
        say(name, format!("{note}  ({time})"));
        self.stages.push(report::Stage {
            name: name.to_owned(),
            seconds: seconds.as_secs_f64(),
            cached: origin != Origin::Made,
            note,
        });
        Ok(value)
    }

    /// All tools of the build, checked once, before the first stage that does any work.
    fn require_tools(&self) -> Result<()> {
        let mut there = self.tools.lock().unwrap_or_else(PoisonError::into_inner);
        if !*there {
            let engine = match self.plan.rootfs.engine {
                Engine::Debian => Purpose::Debian,
                Engine::Buildroot => Purpose::Buildroot,
            };
            tools::require(&[Purpose::Build, engine], !self.options.no_install)?;
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
