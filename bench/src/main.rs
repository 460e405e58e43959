//! `cargo xtask bench`: compares our stages with the usual tools in one run, as ratios. Tests never
//! depend on times.

mod bundle;
mod cold;
mod disk;
mod flash;
mod install;
mod measure;

use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use clap::{Parser, Subcommand};
use xtask::build::BundleCompression;
use xtask::cache::Cache;
use xtask::cli::{BenchArgs, FlashArgs};
use xtask::config::workspace_root;
use xtask::progress::say;
use xtask::tools::{self, ToolPurpose};
use xtask::{cmd, out, program};

/// How often each contender runs; the table shows medians.
const TURNS: usize = 5;

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct CommandLine {
    #[command(subcommand)]
    child: Option<ChildCommand>,
    #[command(flatten)]
    options: BenchArgs,
}

/// What this program does as its own child, so that the kernel measures its time and memory separately.
#[derive(Subcommand)]
enum ChildCommand {
    /// One bundle of one payload.
    Pack { payload: Utf8PathBuf, level: BundleCompression, out: Utf8PathBuf },
    /// The verb `flash`.
    Flash(FlashArgs),
}

fn main() -> ExitCode {
    let line = CommandLine::parse();
    program::exit_code(match &line.child {
        None => bench(&line.options),
        Some(ChildCommand::Pack { payload, level, out }) => bundle::pack(payload, *level, out),
        Some(ChildCommand::Flash(options)) => cmd::flash::flash(options),
    })
}

/// Fails when there is no root filesystem to measure with, or when a contender fails.
fn bench(options: &BenchArgs) -> Result<()> {
    if options.only.as_deref() == Some("cold") {
        tools::require_tools(&[ToolPurpose::Debian], true)?;
        // Not in the cache: another disk may be faster, and the root must not be below a home
        // directory that others cannot enter.
        let folder = tempfile::Builder::new().prefix("slipway-bench-").tempdir()?;
        let folder = Utf8Path::from_path(folder.path()).context("a path that is not UTF-8")?;
        out!("{}", cold::table(&cold::run(&workspace_root()?, folder)?));
        return Ok(());
    }
    tools::require_tools(&[ToolPurpose::Test, ToolPurpose::Bench], true)?;
    let cache = Cache::locate()?;
    let payload = match &options.payload {
        Some(path) => path.clone(),
        None => newest_root(&cache)?,
    };
    // Two measurements at once disturb each other, but must not remove each other's files. Where
    // `clean` finds what is left after an interruption.
    let parent = cache.root.join("bench");
    std::fs::create_dir_all(&parent).with_context(|| format!("creating {parent}"))?;
    let folder = tempfile::tempdir_in(&parent)
        .with_context(|| format!("creating a directory in {parent}"))?;
    let folder = Utf8Path::from_path(folder.path()).context("a path that is not UTF-8")?;
    let wants = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    say(
        "bench",
        format!("{payload}, medians of {TURNS}; the ratios are valid on an idle machine only"),
    );
    if wants("disk") {
        out!("{}", disk::table(&disk::run(&payload, folder, TURNS)?));
    }
    if wants("flash") {
        out!("{}", flash::table(&flash::run(&payload, folder, TURNS)?));
    }
    if wants("install") {
        out!("{}", install::table(&install::run(&payload, folder, TURNS)?));
    }
    if wants("bundle") {
        out!("{}", bundle::table(&bundle::run(&payload, folder, TURNS, options.slow)?));
    }
    Ok(())
}

/// The root filesystem that was composed last.
fn newest_root(cache: &Cache) -> Result<Utf8PathBuf> {
    let modified =
        |path: &Utf8Path| -> Option<SystemTime> { path.metadata().ok()?.modified().ok() };
    let composed = cache.stages().join("compose");
    let folders = composed.read_dir_utf8().into_iter().flatten().flatten();
    folders
        .map(|folder| folder.path().join("root.ext4"))
        .filter_map(|path| Some((modified(&path)?, path)))
        .max()
        .map(|(_, path)| path)
        .context(
            "there is no root filesystem to measure with\n\
             help: run `cargo xtask build-image` first, or name one with --payload",
        )
}
