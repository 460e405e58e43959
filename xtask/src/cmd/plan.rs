//! `plan` and `render`: show what a build would do, and every text that it would generate.

use std::collections::BTreeSet;
use std::fs::File;

use anyhow::{Context, Result, ensure};
use bundle::Version;
use camino::{Utf8Path, Utf8PathBuf};

use crate::affected;
use crate::artifact::write_atomically;
use crate::cli::{Format, PlanOptions, Show, Target};
use crate::config::{self, Config};
use crate::disk::layout::exact;
use crate::facts::Facts;
use crate::git;
use crate::plan::{self, Plan, SourcePlan};
use crate::progress::{names, say};
use crate::release::pins::Pins;
use crate::render;
use crate::sbom::timestamp;
use crate::{out, outln, text};

/// Loads the selected product and board, without resolving them.
///
/// # Errors
/// Everything that is wrong with the files.
pub fn load(target: &Target) -> Result<Config> {
    let (product, board) = (target.product.as_deref(), target.board.as_deref());
    let config = config::load(&config::workspace_root()?, product, board)?;
    let junk: Vec<&Utf8PathBuf> = config.overlays.iter().flat_map(|o| &o.junk).collect();
    if !junk.is_empty() {
        say("overlay", format!("ignored (left by an editor or a desktop): {}", names(&junk)));
    }
    Ok(config)
}

/// Loads and resolves the selected product and board.
///
/// # Errors
/// Everything that is wrong with the configuration.
pub fn resolve(target: &Target) -> Result<(Config, Facts, Plan)> {
    let config = load(target)?;
    let facts = Facts::collect(&config.root)?;
    let plan = plan::resolve(&config, &facts)?;
    Ok((config, facts, plan))
}

/// Like [`resolve`], but for a nightly: with a version that is higher than the product's and than
/// those of all earlier commits.
///
/// # Errors
/// Everything that is wrong with the configuration.
pub fn resolve_nightly(target: &Target) -> Result<(Config, Facts, Plan)> {
    let mut config = load(target)?;
    let facts = Facts::collect(&config.root)?;
    let version = &mut config.product.version.value;
    *version = nightly(version, facts.epoch)?;
    let plan = plan::resolve(&config, &facts)?;
    Ok((config, facts, plan))
}

/// The nightly's version: a pre-release of the next patch version, numbered by the commit's time in
/// UTC.
fn nightly(version: &Version, epoch: u64) -> Result<Version> {
    let digits: String = timestamp(epoch).chars().filter(char::is_ascii_digit).collect();
    let next = match version.as_str().split_once('-') {
        // Of a pre-release, nightlies sort after it and before the next one. One more word would
        // exceed the length of a version.
        Some(_) => format!("{version}.{digits}"),
        None => {
            let (major_minor, patch) =
                version.as_str().rsplit_once('.').context("a version has three numbers")?;
            let patch = patch.parse::<u64>().context("a version has three numbers")?;
            let patch =
                patch.checked_add(1).context("cannot increment the patch version any further")?;
            format!("{major_minor}.{patch}-nightly.{digits}")
        }
    };
    Version::parse(&next).with_context(|| format!("naming the nightly of {version}"))
}

/// The directory for the results of a build.
pub fn dist(root: &Utf8Path, plan: &Plan) -> Utf8PathBuf {
    root.join("dist").join(&plan.product.name).join(&plan.board.name)
}

/// Waits until no other build writes results there; the returned guard grants exclusive use, since
/// all builds write the same temporary names.
///
/// # Errors
/// When the directory cannot be made or locked.
pub fn turn(dist: &Utf8Path) -> Result<File> {
    let doing = || format!("locking {dist}");
    std::fs::create_dir_all(dist).with_context(doing)?;
    let folder = File::open(dist).with_context(doing)?;
    if folder.try_lock().is_err() {
        say("plan", format!("waiting for another build in {dist}"));
        folder.lock().with_context(doing)?;
    }
    Ok(folder)
}

/// `cargo xtask plan`.
///
/// # Errors
/// Everything that is wrong with the configuration.
pub fn plan(options: &PlanOptions) -> Result<()> {
    if options.all || options.changed_since.is_some() {
        return builds(options);
    }
    ensure!(
        options.channel.is_none(),
        "--channel filters a list of builds: add --all or --changed-since"
    );
    let (config, _, plan) = resolve(&options.target)?;
    match options.format {
        Format::Json => outln!("{}", text::json(&plan)?),
        Format::Text => {
            out!("{}", describe(&plan));
            if let (true, Some(commit)) = (plan.modified, &plan.commit) {
                let changes = git::changes(&config.root, commit)?;
                outln!(" {:<10} {}", "changes", names(&changes));
            }
        }
    }
    Ok(())
}

/// The builds for CI: all of them, or those that the changes since a commit affect.
fn builds(options: &PlanOptions) -> Result<()> {
    let root = config::workspace_root()?;
    let Target { product, board } = &options.target;
    let mut builds = match &options.changed_since {
        Some(revision) => affected::changed_since(&root, revision, product.as_deref())?,
        None => affected::all(&root, product.as_deref())?,
    };
    builds.retain(|build| board.as_ref().is_none_or(|only| build.board == *only));
    if let Some(channel) = options.channel {
        let pins = Pins::read(Some(&root))?;
        let mut told = BTreeSet::new();
        builds.retain(|build| match pins.takes(channel, &build.product) {
            Ok(()) => true,
            Err(why) => {
                if told.insert(build.product.clone()) {
                    say("plan", format!("without {}: {why:#}", build.product));
                }
                false
            }
        });
    }
    match options.format {
        Format::Json => outln!("{}", text::json(&builds)?),
        Format::Text => out!("{}", affected::describe(&builds)),
    }
    Ok(())
}

/// `cargo xtask render`.
///
/// # Errors
/// A mistake in the configuration or in a template.
pub fn render(options: &Show) -> Result<()> {
    let (config, _, plan) = resolve(&options.target)?;
    let rendered = render::render(&config.root, &plan)?;
    let dist = dist(&config.root, &plan);
    let _turn = turn(&dist)?;
    let dir = dist.join("rendered");
    rendered.write(&dir)?;
    match options.format {
        Format::Json => outln!("{}", serde_json::json!({ "rendered": dir })),
        Format::Text => outln!("{dir}"),
    }
    Ok(())
}

/// Writes `plan.json` beside the results.
///
/// # Errors
/// When it cannot be written.
pub fn save(plan: &Plan, dist: &Utf8Path) -> Result<()> {
    let json = serde_json::to_vec_pretty(plan).context("describing the plan")?;
    write_atomically(&dist.join("plan.json"), |out| Ok(out.write_all(&json)?))
}

/// The plan in human-readable form.
pub fn describe(plan: &Plan) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| out.push_str(&format!(" {name:<10} {text}\n"));
    let kind = serde_json::to_value(plan.product.kind).unwrap_or_default();
    line(
        "product",
        format!("{} {} ({})", plan.product.name, plan.product.version, kind.as_str().unwrap_or("")),
    );
    line("board", format!("{}, {}", plan.board.name, plan.board.title));
    let commit = plan.commit.as_deref().unwrap_or("none");
    let modified = if plan.modified { ", with changes" } else { "" };
    line("commit", format!("{commit}{modified}; epoch {}", plan.epoch));
    let engine = serde_json::to_value(plan.rootfs.engine).unwrap_or_default();
    line("engine", format!("{} {}", engine.as_str().unwrap_or(""), plan.rootfs.suite));
    for source in &plan.rootfs.sources {
        let SourcePlan { name, address, suite, packages, .. } = source;
        line("source", format!("{name}, {address} {suite}: {}", names(packages)));
    }
    if let Some(api) = &plan.api {
        line("api", api.package.clone());
    }
    line("disk", format!("{}, {}", exact(plan.disk.size), plan.disk.table.name()));
    for state in &plan.disk.states {
        line("", format!("{:>12}  {:>9}  boot state", state.offset, "512 B"));
    }
    for copy in &plan.disk.trust {
        line("", format!("{:>12}  {:>9}  trust", copy.offset, exact(bundle::area::COPY as u64)));
    }
    for p in &plan.disk.partitions {
        line("", format!("{:>12}  {:>9}  {} {}", p.offset, exact(p.size), p.number, p.name));
    }
    for (n, card) in plan.board.earlier_cards.iter().enumerate() {
        let name = if n == 0 { "also" } else { "" };
        let table = card.disk.table.name();
        line(name, format!("cards of images until {}: {table}, as they were flashed", card.until));
    }
    let mut list = "";
    for origin in &plan.board.origins {
        let shown = if origin.list == list { "" } else { origin.list };
        line(
            if list.is_empty() { "lists" } else { "" },
            format!("{shown:<22} {:>3} from {}", origin.count, origin.file),
        );
        list = origin.list;
    }
    line("overlay", format!("{} files", plan.overlay.len()));
    line("inputs", format!("{} files of the workspace", plan.inputs.len()));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nightlies_grow_with_time_and_lie_between_releases() {
        let version = |text: &str| Version::parse(text).expect("a version");
        let night = |text: &str, epoch| nightly(&version(text), epoch).expect("a nightly");
        let one = night("0.1.0", 1_795_222_196);
        assert_eq!(one.as_str(), "0.1.1-nightly.20261121004956");
        assert!(version("0.1.0") < one && one < night("0.1.0", 1_795_222_197));
        assert!(night("0.1.0", 1_795_222_197) < version("0.1.1"));
        let pre = night("2.0.0-rc.1", 0);
        assert!(version("2.0.0-rc.1") < pre && pre < version("2.0.0-rc.2"), "{pre}");
    }
}
