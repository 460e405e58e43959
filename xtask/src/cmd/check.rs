//! `check` and `test`: the same commands for a developer and for CI.

use std::num::NonZero;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::free_space;
use crate::cache::Cache;
use crate::cli::{Check, Format, Test};
use crate::config::{self, product, workspace_root};
use crate::exec::Tool;
use crate::flash::device;
use crate::fuzz;
use crate::mutants::{self, Fate};
use crate::progress::{bytes, say, warn};
use crate::rootfs::buildroot::tree::pinned_path;
use crate::tools::{self, Purpose};
use crate::{outln, text};

/// Enables the system tests that are too slow for every run.
pub const ALL: &str = "SLIPWAY_TEST_ALL";

/// The tests that need loop devices: their target and how their names begin.
const LOOP_TESTS: [&str; 2] = ["tests", "flash_loop::"];

/// The tests that need the pinned Buildroot tree.
const TREE_TESTS: [&str; 2] = ["buildroot_tree", ""];

/// Seconds for each fuzz target in `test --all`: enough to show that each of them still runs.
const FUZZ_SECONDS: u64 = 20;

/// `cargo xtask check`, or only the part that was asked for.
///
/// # Errors
/// As [`check`]; when a mutant survives; when a fuzz target finds something.
pub fn asked(options: &Check) -> Result<()> {
    let root = workspace_root()?;
    match (&options.mutants, options.fuzz) {
        (Some(filter), _) => notice_faults(&root, filter, options.format),
        (None, Some(seconds)) => fuzz::run(&root, seconds),
        (None, None) => check(),
    }
}

/// Checks that a test detects every deliberate fault.
fn notice_faults(root: &Utf8Path, filter: &str, format: Format) -> Result<()> {
    let tried = mutants::run(root, filter)?;
    if format == Format::Json {
        outln!("{}", text::json(&tried)?);
    } else {
        for one in &tried {
            outln!("{:<24} {:>5} s  {}: {}", one.name, one.seconds, one.fate.word(), one.means);
        }
    }
    let missed = tried.iter().filter(|one| one.fate != Fate::Caught);
    let missed: Vec<&str> = missed.map(|one| one.name.as_str()).collect();
    ensure!(
        missed.is_empty(),
        "{} of {} mutants are not detected by their test, or do not compile: {}\n\
         help: write a test that detects them, or name the one that does; correct the mutants that \
         do not compile in {}",
        missed.len(),
        tried.len(),
        missed.join(", "),
        mutants::LIST
    );
    say("mutants", format!("all {} mutants are detected", tried.len()));
    Ok(())
}

/// `check` without options.
///
/// # Errors
/// When formatting or a lint is wrong.
pub fn check() -> Result<()> {
    cargo("formatting", &["fmt", "--all", "--check"], false)?;
    // The system tests are not a default target, so that `cargo test` needs no images.
    for targets in
        [&["--workspace", "--all-targets"][..], &["--package", "xtask", "--test", "system"]]
    {
        let words = [&["clippy", "--quiet"], targets, &["--", "-D", "warnings"]].concat();
        cargo("lints", &words, false)?;
    }
    cargo("house rules", &["test", "--quiet", "--package", "xtask", "--test", "tidy"], false)
}

/// `cargo xtask test`.
///
/// # Errors
/// When something is missing or a test fails.
pub fn test(options: &Test) -> Result<()> {
    let mut purposes = super::doctor::purposes(false);
    if options.all {
        purposes.push(Purpose::TestAll);
    }
    let trees = pinned_trees()?;
    if trees.iter().any(|tree| tree.there) {
        purposes.push(Purpose::Buildroot);
    }
    tools::require(&purposes, !options.no_install)?;
    warn_of_space(if options.quick { QUICK_SPACE } else { SPACE })?;
    check()?;
    cargo("tests", &["test", "--workspace", "--no-fail-fast"], options.all)?;
    say_skipped(&trees)?;
    if options.all {
        let root = workspace_root()?;
        fuzz::run(&root, FUZZ_SECONDS)?;
        notice_faults(&root, "", Format::Text)?;
    }
    if options.quick { Ok(()) } else { system("system tests", &[], options.all) }
}

/// Disk space for `cargo xtask test` on a machine without any caches, with a reserve. Measured: 2.8
/// GiB for compiled code; about 10 GiB for the cache, the results for four boards and the files of
/// two tests at a time.
const SPACE: u64 = 14 << 30;
/// The same with `--quick`, which builds no image.
const QUICK_SPACE: u64 = 5 << 30;

/// Fails at once on a disk that would be full after half an hour.
fn warn_of_space(needed: u64) -> Result<()> {
    let (root, cache) = (workspace_root()?, Cache::locate()?.root);
    let free = |folder| Ok::<_, anyhow::Error>((free_space(folder)?, folder));
    let (least, folder) = free(&root)?.min(free(&cache)?);
    if least < needed {
        warn(format!(
            "{} are free in {folder}, but the tests need about {} on a machine without caches\n\
             help: `cargo xtask clean --dry-run` shows what can be removed; SLIPWAY_CACHE and \
             CARGO_TARGET_DIR select other disks",
            bytes(least),
            bytes(needed)
        ));
    }
    Ok(())
}

/// `cargo xtask e2e`.
///
/// # Errors
/// When something is missing or a test fails.
pub fn e2e() -> Result<()> {
    tools::require(&[Purpose::Build, Purpose::Debian, Purpose::Run, Purpose::Test], true)?;
    system("updates from end to end", &["update::"], false)
}

/// How many system tests run in parallel at most: each may boot a machine with a gigabyte of
/// memory.
const SYSTEM_TESTS: usize = 4;

/// The system tests with these names, one for each core: each builds an image or boots one, reports
/// its progress, and is idle for much of its time.
fn system(what: &str, names: &[&str], all: bool) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = format!("--test-threads={}", cores.min(SYSTEM_TESTS));
    let words = ["test", "--package", "xtask", "--test", "system", "--", "--nocapture", &threads];
    cargo(what, &[&words[..], names].concat(), all)
}

/// A product's pinned Buildroot.
struct PinnedTree {
    product: String,
    pinned: product::Buildroot,
    path: Utf8PathBuf,
    /// Whether the tree is in the cache.
    there: bool,
}

fn pinned_trees() -> Result<Vec<PinnedTree>> {
    let (root, cache) = (workspace_root()?, Cache::locate()?);
    let mut trees = Vec::new();
    for product in config::products(&root)? {
        if let Some(pinned) = product::read(&root, &product)?.rootfs.buildroot {
            let path = pinned_path(&cache.root, &pinned.release.value);
            let there = path.join("Makefile").is_file();
            trees.push(PinnedTree { product, pinned, path, there });
        }
    }
    Ok(trees)
}

/// Tests that need a pinned Buildroot tree or loop devices return at once without them: they are
/// counted and listed, so that they are not mistaken for passed tests.
fn say_skipped(trees: &[PinnedTree]) -> Result<()> {
    if let Err(why) = device::can_loop() {
        let tests = tests_of(LOOP_TESTS)?;
        warn(format!(
            "skipped {} tests, because there are no loop devices ({why:#}): {}\n\
             help: run them as root, on a kernel with loop devices",
            tests.len(),
            tests.join(", ")
        ));
    }
    for PinnedTree { product, pinned, path, .. } in trees.iter().filter(|tree| !tree.there) {
        let tests = tests_of(TREE_TESTS)?;
        warn(format!(
            "skipped {} tests, because {path} does not exist: {}\n\
             help: clone {} by the tag {} to that directory, as `build-image --product {product}` does",
            tests.len(),
            tests.join(", "),
            pinned.url.value,
            pinned.release.value
        ));
    }
    Ok(())
}

/// The names of a target's tests with this prefix.
fn tests_of([target, start]: [&str; 2]) -> Result<Vec<String>> {
    let list = ["test", "--quiet", "--package", "xtask", "--test", target, "--", "--list", start];
    let listed = Tool::cargo().with_tests().args(list).current_dir(&workspace_root()?).read()?;
    Ok(listed.lines().filter_map(|l| l.strip_suffix(": test")).map(str::to_owned).collect())
}

fn cargo(what: &str, arguments: &[&str], all: bool) -> Result<()> {
    say("test", what);
    // The backtrace of an error that a test returns would hide its message; backtraces of panics
    // follow RUST_BACKTRACE.
    let mut tool = Tool::cargo().with_tests().args(arguments).env("RUST_LIB_BACKTRACE", "0");
    if all {
        tool = tool.env(ALL, "1");
    }
    // Its output is the result, so it inherits this terminal.
    tool.current_dir(&workspace_root()?).run_on_terminal().context(what.to_owned())
}
