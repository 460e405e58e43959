//! `check` and `test`: the same commands for a developer and for CI.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;

use anyhow::{Context, Result, ensure};
use camino::Utf8Path;
use serde::Deserialize;

use crate::artifact::free_space;
use crate::cache::Cache;
use crate::cli::{CheckArgs, OutputFormat, TestArgs};
use crate::config::{self, workspace_root};
use crate::exec::{Tool, find_program};
use crate::fuzz;
use crate::mutants::{self, MutantOutcome};
use crate::progress::{format_bytes, say, warn};
use crate::rootfs::buildroot::tree::pinned_path;
use crate::test_programs::{self, TestProgram};
use crate::tools::{self, ToolPurpose};
use crate::{out, outln, text};

/// Enables the system tests that are too slow for every run.
pub const ALL: &str = "SLIPWAY_TEST_ALL";

/// Names the file in which a test that this machine cannot run says so, a line of JSON each.
pub const SKIPPED: &str = "SLIPWAY_SKIPPED";

/// Seconds for each fuzz target in `test --all`: enough to show that each of them still runs.
const FUZZ_SECONDS: u64 = 20;

/// `cargo xtask check`, or only the part that was asked for.
///
/// # Errors
/// As [`check_all`]; when a mutant survives; when a fuzz target finds something.
pub fn check(options: &CheckArgs) -> Result<()> {
    let root = workspace_root()?;
    match (&options.mutants, options.fuzz) {
        (Some(filter), _) => notice_faults(&root, filter, options.format),
        (None, Some(seconds)) => fuzz::run_targets(&root, seconds),
        (None, None) => check_all(),
    }
}

/// Checks that a test detects every deliberate fault.
fn notice_faults(root: &Utf8Path, filter: &str, format: OutputFormat) -> Result<()> {
    let tried = mutants::run_mutants(root, filter)?;
    if format == OutputFormat::Json {
        outln!("{}", text::to_json(&tried)?);
    } else {
        for one in &tried {
            outln!("{:<24} {:>5} s  {}: {}", one.name, one.seconds, one.fate.word(), one.means);
        }
    }
    let missed = tried.iter().filter(|one| one.fate != MutantOutcome::Caught);
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
/// When formatting, a lint or a dependency is wrong.
pub fn check_all() -> Result<()> {
    run_cargo("formatting", &["fmt", "--all", "--check"], false)?;
    // The system tests are not a default target, so that `cargo test` needs no images.
    for targets in
        [&["--workspace", "--all-targets"][..], &["--package", "xtask", "--test", "system"]]
    {
        let words = [&["clippy", "--quiet"], targets, &["--", "-D", "warnings"]].concat();
        run_cargo("lints", &words, false)?;
    }
    run_cargo("house rules", &["test", "--quiet", "--package", "xtask", "--test", "tidy"], false)?;
    check_dependencies()
}

/// Checks licences, sources and versions of dependencies (`deny.toml`) with cargo-deny, if it is installed. Compiling
/// cargo-deny takes minutes, so without it a warning is printed instead. Advisories are checked by CI only: they need
/// the network, and change without a change in this repository.
fn check_dependencies() -> Result<()> {
    if find_program("cargo-deny").is_none() {
        warn(
            "skipped the licences and sources of dependencies (deny.toml): cargo-deny is not installed\n\
             help: cargo install --locked cargo-deny",
        );
        return Ok(());
    }
    let words = ["deny", "--log-level", "error", "check", "bans", "licenses", "sources"];
    run_cargo("dependencies", &words, false)
}

/// `cargo xtask test`.
///
/// # Errors
/// When something is missing or a test fails.
pub fn test(options: &TestArgs) -> Result<()> {
    let mut purposes = super::doctor::required_purposes(false);
    if options.all {
        purposes.push(ToolPurpose::TestAll);
    }
    if has_pinned_tree()? {
        purposes.push(ToolPurpose::Buildroot);
    }
    tools::require_tools(&purposes, !options.no_install)?;
    warn_of_space(if options.quick { QUICK_SPACE } else { SPACE })?;
    check_all()?;
    let skipped = tempfile::NamedTempFile::new().context("making the list of skipped tests")?;
    let list = Utf8Path::from_path(skipped.path()).context("TMPDIR is not UTF-8")?;
    let programs = compile_tests(options)?;
    let (quick, system) = std::thread::scope(|scope| {
        // These wait for much of their time, too: for archives, for the kernel, for each other's stages.
        let system = scope.spawn(|| {
            if options.quick { Ok(()) } else { run_system_tests("system tests", &[], options.all) }
        });
        let configure = |tool: Tool| for_tests(tool, options.all).env(SKIPPED, list);
        let quick = test_programs::run_programs(&programs, configure, |output| out!("{output}"));
        (quick, system.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    // What was not tried is as good to know when another test has failed.
    say_skipped(list)?;
    let failed: Vec<String> = [quick, system]
        .into_iter()
        .filter_map(|outcome| outcome.err().map(|error| format!("{error:#}")))
        .collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    if options.all {
        let root = workspace_root()?;
        fuzz::run_targets(&root, FUZZ_SECONDS)?;
        notice_faults(&root, "", OutputFormat::Text)?;
    }
    Ok(())
}

/// Compiles all tests; returns those other than the system tests.
fn compile_tests(options: &TestArgs) -> Result<Vec<TestProgram>> {
    let compile = ["test", "--workspace", "--no-run"];
    run_cargo("compiling the tests", &compile, options.all)?;
    if !options.quick {
        let words = ["test", "--package", "xtask", "--test", "system", "--no-run"];
        run_cargo("compiling the system tests", &words, options.all)?;
    }
    // Nothing is compiled any more: this only lists them.
    let list = [&compile[..], &["--quiet", "--message-format", "json"]].concat();
    test_programs::parse_messages(&cargo_tool(&list, options.all)?.read()?)
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
    let free = |dir| Ok::<_, anyhow::Error>((free_space(dir)?, dir));
    let (least, dir) = free(&root)?.min(free(&cache)?);
    if least < needed {
        warn(format!(
            "{} are free in {dir}, but the tests need about {} on a machine without caches\n\
             help: `cargo xtask clean --dry-run` shows what can be removed; SLIPWAY_CACHE and \
             CARGO_TARGET_DIR select other disks",
            format_bytes(least),
            format_bytes(needed)
        ));
    }
    Ok(())
}

/// `cargo xtask e2e`.
///
/// # Errors
/// When something is missing or a test fails.
pub fn e2e() -> Result<()> {
    tools::require_tools(
        &[ToolPurpose::Build, ToolPurpose::Debian, ToolPurpose::Run, ToolPurpose::Test],
        true,
    )?;
    run_system_tests("updates from end to end", &["update::"], false)
}

/// How many system tests run in parallel at most: each may boot a machine with a gigabyte of
/// memory.
const SYSTEM_TESTS: usize = 4;

/// The system tests with these names, one for each core: each builds an image or boots one, reports
/// its progress, and is idle for much of its time.
fn run_system_tests(what: &str, names: &[&str], all: bool) -> Result<()> {
    let cores = crate::parallel::cores();
    let threads = format!("--test-threads={}", cores.min(SYSTEM_TESTS));
    let words = ["test", "--package", "xtask", "--test", "system", "--", "--nocapture", &threads];
    run_cargo(what, &[&words[..], names].concat(), all)
}

/// Whether a product's pinned Buildroot is in the cache.
fn has_pinned_tree() -> Result<bool> {
    let (root, cache) = (workspace_root()?, Cache::locate()?);
    for product in config::list_products(&root)? {
        if let Some(pinned) = config::read_product(&root, &product)?.rootfs.buildroot {
            let path = pinned_path(&cache.root, &pinned.release.value);
            if path.join("Makefile").is_file() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// A test that was not run.
#[derive(Debug, Deserialize)]
struct Skipped {
    test: String,
    why: String,
    help: String,
}

/// Reports the tests that this machine cannot run, by name, so that they are not mistaken for passed ones.
fn say_skipped(list: &Utf8Path) -> Result<()> {
    let text = std::fs::read_to_string(list).with_context(|| format!("reading {list}"))?;
    for line in skipped_tests(&text)? {
        warn(line);
    }
    Ok(())
}

/// A sentence for each reason.
fn skipped_tests(list: &str) -> Result<Vec<String>> {
    let mut reasons: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for line in list.lines() {
        let Skipped { test, why, help } =
            serde_json::from_str(line).with_context(|| format!("reading `{line}`"))?;
        reasons.entry((why, help)).or_default().insert(test);
    }
    let told = reasons.into_iter().map(|((why, help), tests)| {
        let names: Vec<String> = tests.into_iter().collect();
        format!("skipped {} tests, because {why}: {}\nhelp: {help}", names.len(), names.join(", "))
    });
    Ok(told.collect())
}

fn run_cargo(what: &str, arguments: &[&str], all: bool) -> Result<()> {
    say("test", what);
    // Its output is the result, so it inherits this terminal.
    cargo_tool(arguments, all)?.run_on_terminal().context(what.to_owned())
}

fn cargo_tool(arguments: &[&str], all: bool) -> Result<Tool> {
    let tool = for_tests(Tool::cargo().with_tests(), all);
    Ok(tool.args(arguments).current_dir(&workspace_root()?))
}

fn for_tests(tool: Tool, all: bool) -> Tool {
    // The backtrace of an error that a test returns would hide its message; backtraces of panics
    // follow RUST_BACKTRACE.
    let tool = tool.env("RUST_LIB_BACKTRACE", "0");
    if all { tool.env(ALL, "1") } else { tool }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipped_tests_are_counted_and_named_by_reason() {
        let line = |test: &str, why: &str| {
            serde_json::json!({ "test": test, "why": why, "help": "do it" }).to_string()
        };
        let list =
            [line("b", "no disk"), line("a", "no disk"), line("b", "no disk"), line("c", "x")];
        assert_eq!(
            skipped_tests(&list.join("\n")).expect("a list"),
            [
                "skipped 2 tests, because no disk: a, b\nhelp: do it",
                "skipped 1 tests, because x: c\nhelp: do it"
            ]
        );
        assert_eq!(skipped_tests("").expect("empty"), [""; 0]);
        skipped_tests("half").expect_err("no line of ours");
    }
}
