//! `check` and `test`: the same commands for a developer and for CI.

use std::num::NonZero;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::free_space;
use crate::cache::Cache;
use crate::cli::{Check, Format, Test};
use crate::config::{self, product, workspace_root};
use crate::exec::{Tool, find};
use crate::flash::device;
use crate::fuzz;
use crate::mutants::{self, Fate};
use crate::progress::{bytes, say, warn};
use crate::rootfs::buildroot::tree::pinned_path;
use crate::tools::{self, Purpose};
use crate::{outln, text};

/// Asks the system tests for what is too slow for every run.
pub const ALL: &str = "SLIPWAY_TEST_ALL";

/// The tests that need loop devices: their target and how their names begin.
const LOOP_TESTS: [&str; 2] = ["tests", "flash_loop::"];

/// The tests that need the pinned Buildroot tree.
const TREE_TESTS: [&str; 2] = ["buildroot_tree", ""];

/// Seconds of each fuzz target in `test --all`: enough to see that all of them still run.
const FUZZ_SECONDS: u64 = 20;

/// `cargo xtask check`, or the one thing that was asked for.
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

/// Every deliberate fault is noticed by a test.
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
        "{} of {} faults are not noticed by the test that is named for them, or do not compile: {}\n\
         help: write a test that notices, or name the one that does; a fault that does not compile is an error of {}",
        missed.len(),
        tried.len(),
        missed.join(", "),
        mutants::LIST
    );
    say("mutants", format!("all {} faults are noticed", tried.len()));
    Ok(())
}

/// `check` without options.
///
/// # Errors
/// When formatting, a lint or a dependency is wrong.
pub fn check() -> Result<()> {
    cargo("formatting", &["fmt", "--all", "--check"], false)?;
    // The system tests are no default target, so that `cargo test` does without images.
    for targets in
        [&["--workspace", "--all-targets"][..], &["--package", "xtask", "--test", "system"]]
    {
        let words = [&["clippy", "--quiet"], targets, &["--", "-D", "warnings"]].concat();
        cargo("lints", &words, false)?;
    }
    cargo("house rules", &["test", "--quiet", "--package", "xtask", "--test", "tidy"], false)?;
    dependencies()
}

/// What `deny.toml` says of licences, sources and versions of dependencies, with cargo-deny where it is installed. Compiling it
/// takes minutes, so a machine that does not have it is told, and not made to wait. Advisories are left to CI: they need
/// the network, and change without a change here.
fn dependencies() -> Result<()> {
    if find("cargo-deny").is_none() {
        warn(
            "skipped the licences and sources of dependencies (deny.toml): cargo-deny is not installed\n\
             help: cargo install --locked cargo-deny",
        );
        return Ok(());
    }
    let words = ["deny", "--log-level", "error", "check", "bans", "licenses", "sources"];
    cargo("dependencies", &words, false)
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

/// Room for `cargo xtask test` on a machine that has nothing yet, with a reserve: compiled code was measured to take 2.8 GiB; the
/// cache, the results for four boards and what two tests hold at a time some 10.
const SPACE: u64 = 14 << 30;
/// The same with `--quick`, which builds no image.
const QUICK_SPACE: u64 = 5 << 30;

/// A disk that gets full after half an hour is said at once.
fn warn_of_space(needed: u64) -> Result<()> {
    let (root, cache) = (workspace_root()?, Cache::locate()?.root);
    let free = |folder| Ok::<_, anyhow::Error>((free_space(folder)?, folder));
    let (least, folder) = free(&root)?.min(free(&cache)?);
    if least < needed {
        warn(format!(
            "{} are free in {folder}; from nothing the tests need some {}\n\
             help: `cargo xtask clean` shows what it could remove; SLIPWAY_CACHE and CARGO_TARGET_DIR name other disks",
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

/// How many system tests run beside each other at most: each may boot a machine with a gigabyte of memory.
const SYSTEM_TESTS: usize = 4;

/// The system tests with these names, one for each core: each builds an image or boots one, says what it does
/// meanwhile, and waits for much of its time.
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
    /// Whether it is in the cache.
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

/// Tests that need a pinned Buildroot tree or loop devices end at once where there are none: they are
/// counted and named, so that nobody takes them for passed.
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
             help: clone {} by the tag {} to that folder, as `build-image --product {product}` does",
            tests.len(),
            tests.join(", "),
            pinned.url.value,
            pinned.release.value
        ));
    }
    Ok(())
}

/// The names of a target's tests that begin so.
fn tests_of([target, start]: [&str; 2]) -> Result<Vec<String>> {
    let list = ["test", "--quiet", "--package", "xtask", "--test", target, "--", "--list", start];
    let listed = Tool::cargo().with_tests().args(list).current_dir(&workspace_root()?).read()?;
    Ok(listed.lines().filter_map(|l| l.strip_suffix(": test")).map(str::to_owned).collect())
}

fn cargo(what: &str, arguments: &[&str], all: bool) -> Result<()> {
    say("test", what);
    // The stack of an error that a test returns hides its words; that of a panic is as asked for.
    let mut tool = Tool::cargo().with_tests().args(arguments).env("RUST_LIB_BACKTRACE", "0");
    if all {
        tool = tool.env(ALL, "1");
    }
    // What it prints is the result, so it goes to this very terminal.
    tool.current_dir(&workspace_root()?).run_on_terminal().context(what.to_owned())
}
