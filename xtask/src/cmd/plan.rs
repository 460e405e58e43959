//! `plan` and `render`: show what a build would do, and every text that it would generate.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use crate::affected;
use crate::build::check_locks;
use crate::cache::Cache;
use crate::cli::{OutputFormat, PlanArgs, RenderArgs, TargetArgs};
use crate::config;
use crate::disk::layout::exact_size;
use crate::git;
use crate::plan::{AptSourcePlan, Plan};
use crate::progress::{list_names, say};
use crate::publish::pins::PinnedKinds;
use crate::render;
use crate::rootfs::buildroot::overrides::apply_overrides;
use crate::workspace::{dist_dir, lock_dist_dir, resolve_plan};
use crate::{out, outln, text};

/// `cargo xtask plan`.
///
/// # Errors
/// Everything that is wrong with the configuration; after the plan was printed, a lock that no build would obey.
pub fn plan(options: &PlanArgs) -> Result<()> {
    if options.all || options.changed_since.is_some() {
        return list_builds(options);
    }
    ensure!(
        options.channel.is_none(),
        "--channel filters a list of builds: add --all or --changed-since"
    );
    let (config, _, mut plan) = resolve_plan(&options.target.selection())?;
    apply_overrides(&mut plan, &config.root, || Ok(Cache::locate()?.root), &options.overrides)?;
    match options.format {
        OutputFormat::Json => outln!("{}", text::to_json(&plan)?),
        OutputFormat::Text => {
            out!("{}", describe_plan(&plan));
            if let (true, Some(commit)) = (plan.modified, &plan.commit) {
                let changes = git::changed_files(&config.root, commit)?;
                outln!(" {:<10} {}", "changes", list_names(&changes));
            }
        }
    }
    // Told after the plan, which is whole without the locks.
    check_locks(&config).context("comparing the locks with the product")
}

/// The builds for CI: all of them, or those that the changes since a commit affect.
fn list_builds(options: &PlanArgs) -> Result<()> {
    let root = config::workspace_root()?;
    let TargetArgs { product, board } = &options.target;
    let mut builds = match &options.changed_since {
        Some(revision) => affected::changed_since(&root, revision, product.as_deref())?,
        None => affected::list_builds(&root, product.as_deref())?,
    };
    builds.retain(|build| board.as_ref().is_none_or(|only| build.board == *only));
    if let Some(channel) = options.channel {
        let pins = PinnedKinds::read(&root)?;
        let mut told = BTreeSet::new();
        builds.retain(|build| match pins.check_new_release(channel, &build.product) {
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
        OutputFormat::Json => outln!("{}", text::to_json(&builds)?),
        OutputFormat::Text => out!("{}", affected::describe_builds(&builds)),
    }
    Ok(())
}

/// `cargo xtask render`.
///
/// # Errors
/// A mistake in the configuration or in a template.
pub fn render(options: &RenderArgs) -> Result<()> {
    let (config, _, mut plan) = resolve_plan(&options.target.selection())?;
    apply_overrides(&mut plan, &config.root, || Ok(Cache::locate()?.root), &[])?;
    let rendered = render::render(&config.root, &plan)?;
    let dist = dist_dir(&config.root, &plan);
    let _turn = lock_dist_dir(&dist)?;
    let dir = dist.join("rendered");
    rendered.write(&dir)?;
    match options.format {
        OutputFormat::Json => outln!("{}", serde_json::json!({ "rendered": dir })),
        OutputFormat::Text => outln!("{dir}"),
    }
    Ok(())
}

/// The plan in human-readable form.
pub fn describe_plan(plan: &Plan) -> String {
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
    for source in plan.rootfs.buildroot.iter().flat_map(|pinned| &pinned.overrides) {
        let directory = &source.directory;
        line("override", format!("{} {}, {directory}", source.package, source.version()));
    }
    for source in &plan.rootfs.sources {
        let AptSourcePlan { name, address, suite, packages, .. } = source;
        line("source", format!("{name}, {address} {suite}: {}", list_names(packages)));
    }
    if let Some(api) = &plan.api {
        line("api", api.package.clone());
    }
    line("disk", format!("{}, {}", exact_size(plan.disk.size), plan.disk.table.name()));
    for state in &plan.disk.states {
        line("", format!("{:>12}  {:>9}  boot state", state.offset, "512 B"));
    }
    for copy in &plan.disk.trust {
        line(
            "",
            format!("{:>12}  {:>9}  trust", copy.offset, exact_size(bundle::area::COPY as u64)),
        );
    }
    for p in &plan.disk.partitions {
        line("", format!("{:>12}  {:>9}  {} {}", p.offset, exact_size(p.size), p.number, p.name));
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
