//! Runs the fuzz targets (`fuzz/`): instrumented by the stable compiler, each for a limited time,
//! with limits on memory and on the time of an input.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;

use crate::exec::Tool;
use crate::progress::say;

/// The options of `cargo fuzz`, without a sanitizer: our code has no unsafe parts.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg=fuzzing";

/// The memory limits of a target in megabytes: in total and for one allocation; those of an install
/// are 32 and 8.
const MEMORY: [&str; 2] = ["-rss_limit_mb=512", "-malloc_limit_mb=64"];

/// The time limit of an input in seconds.
const TIMEOUT: &str = "-timeout=10";

/// Runs every target for `seconds`.
///
/// # Errors
/// When a target cannot be built; when a failing input was found: its path is printed, and it is
/// kept in `fuzz/target/findings`.
pub fn run_targets(root: &Utf8Path, seconds: u64) -> Result<()> {
    let fuzz = root.join("fuzz");
    // The machine's own target is given explicitly, so that build scripts are not instrumented.
    let machine = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    say("fuzz", "building the targets");
    Tool::cargo()
        .args(["build", "--quiet", "--release", "--bins", "--target", &machine])
        .env("RUSTFLAGS", FLAGS)
        .current_dir(&fuzz)
        .run()?;
    let built = fuzz.join("target").join(&machine).join("release");
    let corpus = fuzz.join("target/corpus");
    Tool::cargo()
        .args(["run", "--quiet", "--example", "seeds", "--", corpus.as_str()])
        .current_dir(&fuzz)
        .run()?;
    let mut targets = Vec::new();
    for entry in corpus.read_dir_utf8().with_context(|| format!("reading {corpus}"))? {
        targets.push(entry.context("reading a directory")?.file_name().to_owned());
    }
    targets.sort();
    ensure!(!targets.is_empty(), "no fuzz target is built");
    let mut findings = Vec::new();
    for target in &targets {
        let found = fuzz.join("target/findings").join(target);
        fs::create_dir_all(&found).with_context(|| format!("making {found}"))?;
        let kept = fuzz.join("corpus").join(target);
        let dirs = [Some(corpus.join(target)), kept.is_dir().then_some(kept)];
        let (mut done, mut reached, mut artefact) = (String::new(), String::new(), None);
        let ran = Tool::new(built.join(target))
            .args(dirs.iter().flatten())
            .arg(format!("-artifact_prefix={found}/"))
            .arg(format!("-max_total_time={seconds}"))
            .args(["-print_final_stats=1", TIMEOUT, "-max_len=65536"])
            .args(MEMORY)
            .run_lines(|line| {
                if let Some(count) = line.strip_prefix("stat::number_of_executed_units:") {
                    done = count.trim().to_owned();
                }
                if let Some((_, rest)) = line.split_once(" cov: ") {
                    reached = rest.split(" corp:").next().unwrap_or_default().trim().to_owned();
                }
                if let Some((_, path)) = line.split_once("Test unit written to ") {
                    artefact = Some(path.to_owned());
                }
            });
        say("fuzz", format!("{target}: {done} executions, coverage {reached}"));
        if let Err(error) = ran {
            let path = artefact.unwrap_or_else(|| "no input was written".to_owned());
            findings.push(format!("{target}: {path}\n{error:#}"));
        }
    }
    if !findings.is_empty() {
        bail!(
            "found failing inputs:\n{}\n\
             help: correct the fault, and add the input to fuzz/corpus/TARGET: the tests replay it",
            findings.join("\n")
        );
    }
    Ok(())
}
