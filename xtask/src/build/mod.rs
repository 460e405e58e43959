//! The pipeline: the only place that sequences stages. Each stage is a function of the values of
//! the stages before it; slow ones are kept in the cache under the hash of their inputs.

mod base;
mod image;
mod outcome;

use std::cell::OnceCell;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::Artifact;
use crate::cache::{Cache, Key, Staged};
use crate::cli::{BuildImage, Stage};
use crate::cmd::plan::{dist, resolve, save};
use crate::config::product::Engine;
use crate::keys::{self, Keys, Signer};
use crate::plan::Plan;
use crate::progress::{duration, say};
use crate::render::{Rendered, render};
use crate::report;
use crate::rootfs::debian::DebianSpec;
use crate::tools::{self, Purpose};

pub use base::{Base, Wheels, package_spec, python_target};
pub use image::{Card, System, qemu_files};

/// What a build has at hand besides the plan.
pub struct Build<'a> {
    /// The resolved build.
    pub plan: &'a Plan,
    /// The workspace.
    pub root: &'a Utf8Path,
    /// Where results go.
    pub dist: Utf8PathBuf,
    /// Kept stages and downloads.
    pub cache: &'a Cache,
    /// What was typed.
    pub options: &'a BuildImage,
    /// What the package lock must have been made for.
    packages: DebianSpec,
    /// How each stage went, for the report.
    stages: Vec<report::Stage>,
    tools: OnceCell<()>,
}

/// `cargo xtask build-image`.
///
/// # Errors
/// Whatever a stage returns; nothing partial is left under a final name.
pub fn build_image(options: &BuildImage) -> Result<()> {
    let started = Instant::now();
    let (config, _, plan) = resolve(&options.target)?;
    let cache = Cache::locate()?;
    let dist = dist(&config.root, &plan);
    say("plan", summary(&plan));
    save(&plan, &dist)?;
    let until = options.until.unwrap_or(Stage::Bundle);
    if until == Stage::Plan {
        return Ok(());
    }
    // Everything that can go wrong at once, before the slow work: templates, engine, keys.
    let rendered = render(&config.root, &plan)?;
    rendered.write(&dist.join("rendered"))?;
    if until == Stage::Render {
        say("render", dist.join("rendered"));
        return Ok(());
    }
    if plan.rootfs.engine == Engine::Buildroot {
        bail!(
            "building {} for {}: the engine buildroot renders its defconfig but does not build yet\n\
             help: cargo xtask render --product {} writes it; a product with engine = \"debian\" builds",
            plan.product.name,
            plan.board.name,
            plan.product.name
        );
    }
    let signing = signing(&plan).context("choosing the signing key")?;
    let mut build = Build {
        plan: &plan,
        root: &config.root,
        dist,
        cache: &cache,
        options,
        packages: package_spec(&config),
        stages: Vec::new(),
        tools: OnceCell::new(),
    };
    let made = stages(&mut build, &rendered, &signing, until)?;
    let report = outcome::report(&build, &made, &signing, started.elapsed())?;
    outcome::write(&build, &report, options.format)
}

/// What a build made, as far as it was asked to go.
pub struct Made {
    /// The base system.
    pub base: Base,
    /// The API wheels.
    pub wheels: Option<Wheels>,
    /// The root filesystem image.
    pub system: Option<System>,
    /// The card image.
    pub card: Option<Card>,
    /// The bundle.
    pub bundle: Option<Artifact>,
}

/// Who signs, and whom the robot trusts.
pub struct Signing {
    /// Opened for this build only; its secret is never printed.
    pub signer: Signer,
    /// The key set that goes into the image, as JSON.
    pub key_set: Vec<u8>,
}

fn signing(plan: &Plan) -> Result<Signing> {
    let kind = plan.product.kind;
    let mut keys = Keys::open(&keys::directory()?)?;
    let signer = keys.signer(kind)?;
    let key_set =
        serde_json::to_vec_pretty(&keys.set_for(kind)).context("describing the key set")?;
    Ok(Signing { signer, key_set })
}

fn stages(
    build: &mut Build<'_>,
    rendered: &Rendered,
    signing: &Signing,
    until: Stage,
) -> Result<Made> {
    let base = base::base(build)?;
    let mut made = Made { base, wheels: None, system: None, card: None, bundle: None };
    if until >= Stage::Api {
        made.wheels = base::wheels(build, &made.base)?;
    }
    if until >= Stage::Compose {
        let system = image::compose(build, rendered, &made.base, made.wheels.as_ref(), signing)?;
        made.system = Some(system);
    }
    if let (true, Some(system)) = (until >= Stage::Image, &made.system) {
        made.card = Some(image::card(build, rendered, &made.base, system)?);
        if until >= Stage::Bundle {
            made.bundle = Some(image::bundle(build, system, signing)?);
        }
    }
    Ok(made)
}

fn summary(plan: &Plan) -> String {
    let mut text =
        format!("{} {} for {}", plan.product.name, plan.product.version, plan.board.name);
    match plan.rootfs.engine {
        Engine::Debian => text.push_str(&format!(" · debian {}", plan.rootfs.suite)),
        Engine::Buildroot => text.push_str(" · buildroot"),
    }
    if let Some(api) = &plan.api {
        text.push_str(&format!(" · {}", api.package));
    }
    text
}

impl Build<'_> {
    /// Runs a stage, or takes its kept result; says how long it took and notes it for the report.
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
        let Staged { value, cached } = self.cache.stage(name, &key, outputs, |dir| {
            this.require_tools()?;
            work(this, dir)
        })?;
        let seconds = started.elapsed();
        let note = describe(&value);
        let time = if cached { "kept".to_owned() } else { duration(seconds) };
        say(name, format!("{note}  ({time})"));
        self.stages.push(report::Stage {
            name: name.to_owned(),
            seconds: seconds.as_secs_f64(),
            cached,
            note,
        });
        Ok(value)
    }

    /// All tools of the build, checked once, before the first stage that does any work.
    fn require_tools(&self) -> Result<()> {
        if self.tools.get().is_none() {
            tools::require(&[Purpose::Build], !self.options.no_install)?;
            self.tools.get_or_init(|| ());
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
