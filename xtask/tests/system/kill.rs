//! `kill -9` at several moments of a build that is not cached: each file with its final name is complete, and the next
//! build completes.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::process::{Pid, Signal, kill_process_group};
use xtask::artifact::hash_file;
use xtask::cmd::check::ALL;

use crate::support::{
    Folder, Xtask, built, cache_sharing, copy_workspace, files, nothing_partial, say, stages,
};

const BOARD: &str = "qemu-arm64";

/// Chooses the moments: the same ones each time, as shares of the time of a whole build.
const SEED: u64 = 0x5eed_0f51_1b0a_7007;

/// xorshift64: enough to scatter them.
fn random(state: &mut u64) -> f64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as f64 / (1u64 << 53) as f64
}

/// Starts a build and kills its whole process group when the moment has come. Whether it was still running.
pub fn kill_when(tool: &Xtask, more: &[&str], moment: impl Fn() -> bool) -> Result<bool> {
    let arguments = ["build-image", "--no-install", "--board", BOARD];
    let mut child = tool.start(&[&arguments, more].concat())?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process id")?;
    while !moment() {
        if child.try_wait()?.is_some() {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    kill_process_group(group, Signal::KILL).context("killing the build")?;
    child.wait()?;
    Ok(true)
}

fn results(workspace: &Utf8Path) -> Result<Vec<(Utf8PathBuf, String)>> {
    let dist = files(&workspace.join("dist"))?.into_iter();
    let results = dist.filter(|p| matches!(p.extension(), Some("img" | "bmap" | "bundle")));
    results.map(|path| Ok((path.clone(), hash_file(&path)?.1))).collect()
}

#[test]
fn killed_at_any_moment() -> Result<()> {
    let epoch = built(BOARD)?.plan.epoch;
    let folder = Folder::new()?;
    let (copy, cache) = (folder.at("workspace"), folder.at("cache"));
    copy_workspace(&copy)?;
    // Minutes of compilation, and nothing that is killed is the agent's.
    let made = ["tools", "downloads", "stages/base", "stages/root", "stages/agent"];
    cache_sharing(&cache, &made)?;
    // Another epoch: everything after the base and the agent has work to do.
    let tool = |n: u64| {
        let tool = Xtask::new(&copy).env("SLIPWAY_CACHE", &cache);
        tool.env("SOURCE_DATE_EPOCH", (epoch + n).to_string())
    };
    let forget = |stage: &str| -> Result<()> {
        let dir = cache.join("stages").join(stage);
        fs::remove_dir_all(&dir).with_context(|| format!("removing {dir}"))
    };
    let report = tool(0).build(BOARD, &["--offline"])?;
    let kept: Vec<String> =
        stages(&report)?.into_iter().filter(|(_, kept)| *kept).map(|(name, _)| name).collect();
    ensure!(kept == ["base", "agent"], "kept: {kept:?}");
    let expected = results(&copy)?;
    ensure!(expected.len() == 3, "{expected:?}");

    // Again with the same work to do, except for the bytecode that the first one made.
    forget("api")?;
    let started = Instant::now();
    tool(99).build(BOARD, &["--offline"])?;
    let mut whole = started.elapsed();
    let moments: u64 = if std::env::var_os(ALL).is_some() { 20 } else { 6 };
    say(format!("{moments} moments of {:.1} s, seed {SEED:#x}", whole.as_secs_f64()));
    let mut state = SEED;
    let (mut interrupted, mut whole_files) = (0_u64, 0);
    for n in 1..=moments {
        // Every other time the wheels are installed again, and there is nothing from before.
        if n % 2 == 0 {
            forget("api")?;
            fs::remove_dir_all(copy.join("dist")).context("removing dist")?;
        }
        let moment = whole.mul_f64(random(&mut state));
        let (started, end) = (Instant::now(), Instant::now() + moment);
        let running = kill_when(&tool(n), &["--offline"], || Instant::now() >= end)?;
        if !running {
            // Other tests kept the machine busy before, and no longer do.
            whole = whole.min(started.elapsed());
        }
        interrupted += u64::from(running);
        say(format!("{n}: after {:.2} s, still running: {running}", moment.as_secs_f64()));
        whole_files += nothing_partial(&copy).with_context(|| format!("after kill {n}"))?;
    }
    say(format!("{interrupted} interrupted, {whole_files} whole results found in between"));
    ensure!(interrupted >= moments / 2, "only {interrupted} of {moments} builds were interrupted");

    // The same epoch as the first time, so the same bytes, whatever the killed builds left.
    for stage in ["compose", "image", "bundle"] {
        forget(stage)?;
    }
    tool(0).build(BOARD, &["--offline"])?;
    ensure!(nothing_partial(&copy)? == 2, "an image and a bundle were expected");
    ensure!(results(&copy)? == expected, "the results differ from those of an undisturbed build");
    let left: Vec<_> = files(&copy.join("dist"))?;
    let left: Vec<_> = left.iter().filter(|p| p.as_str().contains(".partial")).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}
