//! The nightly script as CI calls it, in a clone, with warm caches.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xtask::cmd::check::ALL;
use xtask::config::default_product;
use xtask::progress::format_duration;

use crate::support::{Folder, Xtask, copy_workspace, root, say, tool};

const BOARD: &str = "qemu-arm64";

#[test]
fn the_nightly_script_builds_releases_and_publishes() -> Result<()> {
    // It compiles this tool again, for another checkout.
    if std::env::var_os(ALL).is_none() {
        say(format!("skipped without {ALL}: the nightly script"));
        return Ok(());
    }
    let folder = Folder::new()?;
    let (copy, target) = (folder.at("clone"), folder.at("stick"));
    copy_workspace(&copy)?;
    // A release is made of commits only.
    let git = || {
        let who = ["-c", "user.name=A", "-c", "user.email=a@example.org"];
        tool("git").args(["-C", copy.as_str()]).args(who)
    };
    git().args(["add", "--all"]).run()?;
    git().args(["commit", "--quiet", "--allow-empty", "--message", "What is tried"]).run()?;
    let product = default_product(&root())?;
    let night = || -> Result<String> {
        let started = Instant::now();
        let summary = tool("bash")
            .arg("ci/nightly")
            .args([product.as_str(), target.as_str(), BOARD])
            .current_dir(&copy)
            .env("CARGO_TARGET_DIR", root().join("target/nightly").as_str())
            .read()?;
        say(format!("a night of {product} for {BOARD}: {}", format_duration(started.elapsed())));
        Ok(summary)
    };
    let first = night()?;
    ensure!(first.contains(&format!("| {product} | {BOARD} | ")), "{first}");
    ensure!(first.contains("The first release"), "{first}");
    let index = target.join("channels/nightly.json");
    let before = fs::read(&index).with_context(|| format!("reading {index}"))?;
    // Nothing changed: the same release, no new one.
    night()?;
    ensure!(fs::read(&index)? == before, "the index changed without a commit");
    let tool = Xtask::new(&copy);
    let list = tool.run(&["release", "list", "--store", target.as_str()])?.good()?;
    ensure!(list.lines().count() == 2 && list.contains("-nightly."), "{list}");
    let show = ["release", "show", "latest", "--product", &product, "--store", target.as_str()];
    let shown = tool.run(&show)?.good()?;
    ensure!(shown.contains("-x86_64  objects/") && shown.contains("-aarch64  objects/"), "{shown}");
    Ok(())
}
