//! All builds in `dist/` as one page of Markdown: shown by CI after a nightly build.

use std::fs;

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::create::local_store;
use super::notes::escape_markdown;
use crate::config;
use crate::failure::BuildFailure;
use crate::progress::{format_bytes, format_duration};
use crate::publish::{SigningAuthority, load_channel, load_manifest};
use crate::report::BuildReport;
use crate::scratch::create_scratch_dir;
use crate::store::FileStore;
use crate::store::format::Channel;

/// Writes a table of builds, each failure with its stage and log, and the newest nightlies' notes.
///
/// # Errors
/// When a report or the local store cannot be read.
pub fn summarise_builds(root: &Utf8Path) -> Result<String> {
    let mut rows = String::new();
    let mut failures = String::new();
    let mut products = Vec::new();
    for product in config::list_products(root)? {
        for board in config::list_boards(root)? {
            let dir = root.join("dist").join(&product).join(&board);
            if let Some(failure) = BuildFailure::read(&dir)? {
                rows.push_str(&format!("| {product} | {board} | **failed** | | | | |\n"));
                failures.push_str(&format_failure(&product, &board, &failure));
                continue;
            }
            let path = dir.join("report.json");
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let report =
                BuildReport::from_json(&text).with_context(|| format!("reading {path}"))?;
            rows.push_str(&format_row(&product, &board, &report));
            products.push(product.clone());
        }
    }
    products.dedup();
    let mut text = String::from(
        "# Builds\n\n| product | board | version | image on disk | bundle | root | time |\n\
         |---|---|---|---|---|---|---|\n",
    );
    text.push_str(if rows.is_empty() { "| none | | | | | | |\n" } else { &rows });
    if !failures.is_empty() {
        text.push_str("\n# Failures\n");
        text.push_str(&failures);
    }
    for product in products {
        text.push_str(&newest_notes(root, &product)?);
    }
    Ok(text)
}

fn format_row(product: &str, board: &str, report: &BuildReport) -> String {
    let size = |name: &str| {
        let output = report.outputs.iter().find(|output| output.name == name);
        output.map_or(String::new(), |output| format_bytes(output.on_disk_size))
    };
    let bundle = report.outputs.iter().find(|output| output.name == "bundle");
    let bundle = bundle.map_or(String::new(), |output| format_bytes(output.size));
    let root = report.root.as_ref().map_or(String::new(), |root| format_bytes(root.used));
    let slowest: Vec<String> = report
        .stages
        .iter()
        .filter(|stage| !stage.cached)
        .map(|stage| {
            let took = std::time::Duration::from_secs_f64(stage.seconds.max(0.0));
            format!("{} {}", stage.name, format_duration(took))
        })
        .collect();
    let time = format_duration(std::time::Duration::from_secs_f64(report.seconds.max(0.0)));
    let made = if slowest.is_empty() { "all kept".to_owned() } else { slowest.join(", ") };
    format!(
        "| {product} | {board} | {} | {} | {bundle} | {root} | {time} ({made}) |\n",
        report.product.version,
        size("image")
    )
}

fn format_failure(product: &str, board: &str, failure: &BuildFailure) -> String {
    let log = failure.log.as_ref().map_or("no log".to_owned(), |log| format!("log `{log}`"));
    // Four backticks: an error may contain three.
    let error = failure.error.replace("````", "'''");
    format!(
        "\n**{product} for {board}**: stage `{}`, {log}\n\n````\n{error}\n````\n",
        escape_markdown(&failure.stage)
    )
}

/// The notes of the product's newest nightly, which say what changed since the one before.
fn newest_notes(root: &Utf8Path, product: &str) -> Result<String> {
    let store = local_store(root);
    if store.read(&Channel::Nightly.path())?.is_none() {
        return Ok(String::new());
    }
    let authority = SigningAuthority::open(false)?;
    let (index, _) = load_channel(&store, Channel::Nightly, &authority)?;
    let Some(entry) = index.releases_of(product).next_back() else { return Ok(String::new()) };
    let manifest = load_manifest(&store, entry, authority.keys())?;
    let (_keep, dir) = create_scratch_dir()?;
    let path = dir.join("notes.md");
    store.get(&manifest.notes.sha256, manifest.notes.size, &path, &|_| ())?;
    Ok("\n".to_owned() + &fs::read_to_string(&path).with_context(|| format!("reading {path}"))?)
}
