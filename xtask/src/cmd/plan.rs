//! `plan` and `render`: what a build would do, and every text that it would generate.

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::write_atomically;
use crate::cli::{Format, Show, Target};
use crate::config::{self, Config};
use crate::disk::layout::exact;
use crate::facts::Facts;
use crate::plan::{self, Plan};
use crate::render;

/// Loads what was asked for, without resolving it.
///
/// # Errors
/// Everything that is wrong with the files.
pub fn load(target: &Target) -> Result<Config> {
    config::load(&config::workspace_root()?, target.product.as_deref(), target.board.as_deref())
}

/// Loads and resolves what was asked for.
///
/// # Errors
/// Everything that is wrong with the configuration.
pub fn resolve(target: &Target) -> Result<(Config, Facts, Plan)> {
    let config = load(target)?;
    let facts = Facts::collect(&config.root)?;
    let plan = plan::resolve(&config, &facts)?;
    Ok((config, facts, plan))
}

/// Where the results of a build lie.
pub fn dist(root: &Utf8Path, plan: &Plan) -> Utf8PathBuf {
    root.join("dist").join(&plan.product.name).join(&plan.board.name)
}

/// `cargo xtask plan`.
///
/// # Errors
/// Everything that is wrong with the configuration.
pub fn plan(options: &Show) -> Result<()> {
    let (_, _, plan) = resolve(&options.target)?;
    match options.format {
        Format::Json => println!("{}", serde_json::to_string_pretty(&plan)?),
        Format::Text => print!("{}", describe(&plan)),
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
    let dir = dist(&config.root, &plan).join("rendered");
    rendered.write(&dir)?;
    match options.format {
        Format::Json => println!("{}", serde_json::json!({ "rendered": dir })),
        Format::Text => println!("{dir}"),
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

/// The plan for people.
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
    if let Some(api) = &plan.api {
        line("api", api.package.clone());
    }
    line("disk", format!("{}, {}", exact(plan.disk.size), plan.disk.table.name()));
    for state in &plan.disk.states {
        line("", format!("{:>12}  {:>9}  boot state", state.offset, "512 B"));
    }
    for p in &plan.disk.partitions {
        line("", format!("{:>12}  {:>9}  {} {}", p.offset, exact(p.size), p.number, p.name));
    }
    line("overlay", format!("{} files", plan.overlay.len()));
    line("inputs", format!("{} files of the workspace", plan.inputs.len()));
    out
}
