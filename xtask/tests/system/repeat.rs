//! Building again: nothing changed, one file changed, another machine.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use xtask::cmd::check::ALL;

use crate::kill::kill_when;
use crate::support::{
    Built, Folder, Xtask, built, cache_sharing, copy_workspace, root, same, say, snapshot, stages,
};

const BOARD: &str = "qemu-arm64";
/// The directory that is a team's shared cache.
const TEAM: &str = "shared cache";
const STAGES: [&str; 6] = ["base", "api", "agent", "compose", "image", "bundle"];

fn kept(report: &Value) -> Result<Vec<(String, bool)>> {
    let stages = stages(report)?;
    let names: Vec<&str> = stages.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(names == STAGES, "the stages are {names:?}");
    Ok(stages)
}

#[test]
fn nothing_changed_and_nothing_is_done() -> Result<()> {
    let built = built(BOARD)?;
    let look = || -> Result<BTreeMap<_, _>> {
        let mut files = snapshot(&built.dist)?;
        // The report says how long this build took.
        files.retain(|path, _| path.file_stem() != Some("report"));
        Ok(files)
    };
    let modified = |path: &Utf8Path| fs::metadata(path).and_then(|m| m.modified());
    let before = (look()?, modified(&built.image)?, modified(&built.bundle)?);
    let started = Instant::now();
    let report = Xtask::new(&root()).without_network().build(BOARD, &["--offline"])?;
    say(format!("nothing done in {:.1?}", started.elapsed()));
    for (name, kept) in kept(&report)? {
        ensure!(kept, "the stage {name} did its work again");
    }
    let after = (look()?, modified(&built.image)?, modified(&built.bundle)?);
    for (path, was) in &before.0 {
        ensure!(after.0.get(path) == Some(was), "{path} has changed or is gone");
    }
    ensure!(before.0.len() == after.0.len(), "there are new files in {}", built.dist);
    ensure!(before == after, "the image or the bundle was written again");
    Ok(())
}

/// One partition's bytes as a file of their own, as a person would get them.
fn slot_image(built: &Built, image: &Utf8Path, out: &Utf8Path) -> Result<()> {
    crate::foreign::extract(image, built.plan.disk.partition("root-a").context("root-a")?, out)
}

#[test]
fn a_changed_overlay_file_costs_no_base_and_no_download() -> Result<()> {
    let built = built(BOARD)?;
    let folder = Folder::new()?;
    let (copy, cache) = (folder.at("workspace"), folder.at("cache"));
    copy_workspace(&copy)?;
    // No downloads at hand and no network: what is not kept cannot be made.
    cache_sharing(&cache, &["tools", "stages/base", "stages/root", "stages/api", "stages/agent"])?;
    let motd = copy.join("overlays/base/etc/motd.j2");
    let text = fs::read_to_string(&motd)? + "Changed.\n";
    fs::write(&motd, text)?;
    let tool = Xtask::new(&copy).env("SLIPWAY_CACHE", &cache).without_network();
    let report = tool.build(BOARD, &["--offline"])?;
    for (name, kept) in kept(&report)? {
        let expected = ["base", "api", "agent"].contains(&name.as_str());
        ensure!(kept == expected, "the stage {name}: kept is {kept}, expected {expected}");
    }

    let [image, ..] = built.within(&copy)?;
    let (old, new) = (folder.at("old.ext4"), folder.at("new.ext4"));
    slot_image(built, &built.image, &old)?;
    slot_image(built, &image, &new)?;
    let compare = |old: &Utf8Path, new: &Utf8Path| -> Result<Value> {
        let printed =
            tool.run(&["inspect", "--diff", old.as_str(), new.as_str(), "--format=json"])?;
        Ok(serde_json::from_str(&printed.good()?)?)
    };
    for (old, new) in [(&old, &new), (&built.image, &image)] {
        let difference = compare(old, new)?;
        let changed = difference["files"]["changed"].as_object().context("no changed files")?;
        let changed: Vec<&String> = changed.keys().collect();
        let expected = ["/etc/motd", "/usr/lib/slipway/base-id"];
        ensure!(changed == expected, "changed: {changed:?}");
        for kind in ["files", "packages", "wheels"] {
            for what in ["added", "removed"] {
                let list = difference[kind][what].as_object().context("a list is missing")?;
                ensure!(list.is_empty(), "{kind} {what}: {list:?}");
            }
        }
        ensure!(difference["bytes-delta"] == 9, "bytes: {}", difference["bytes-delta"]);
    }
    let text = tool.run(&["inspect", "--diff", old.as_str(), new.as_str()])?.good()?;
    ensure!(text.contains("/etc/motd"), "{text}");
    Ok(())
}

/// Whether everything is asked for.
fn all() -> bool {
    std::env::var_os(ALL).is_some()
}

/// An empty cache, but for `given`. Only when everything is requested the agent is compiled again,
/// for minutes: what its bytes depend on is one compiler, whose version is in its key.
fn empty_cache(folder: &Folder, name: &str, given: &[&str]) -> Result<Utf8PathBuf> {
    let cache = folder.at(&format!("cache of {name}"));
    let agent: &[&str] = if all() { &[] } else { &["stages/agent"] };
    cache_sharing(&cache, &[given, agent].concat())?;
    Ok(cache)
}

/// A build from nothing but the downloads, elsewhere and otherwise.
fn build_elsewhere(folder: &Folder, name: &str, strange: bool) -> Result<()> {
    let copy = folder.at(name);
    copy_workspace(&copy)?;
    let cache = empty_cache(folder, name, &["downloads"])?;
    let mut tool = Xtask::new(&copy).env("SLIPWAY_CACHE", &cache);
    if strange {
        // What it makes goes to its team.
        tool = tool
            .env("SLIPWAY_SHARED_CACHE", folder.at(TEAM))
            .env("SLIPWAY_SHARED_CACHE_WRITE", "1")
            .umask("077")
            .env("TZ", "Strange-13:45")
            .env("LANG", "tr_TR.UTF-8")
            .env("LC_ALL", "tr_TR.UTF-8")
            .env("USER", "nobody");
        tool_permissions(&copy)?;
    }
    // Inside a user namespace, a directory below a home directory may be closed.
    let temporary = tempfile::Builder::new()
        .prefix("slipway-test-")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir()?;
    let temporary = Utf8Path::from_path(temporary.path()).context("a path")?;
    tool = tool.env("TMPDIR", temporary);
    if strange && all() {
        killed_in_the_base(&tool, temporary)?;
    }
    let report = tool.build(BOARD, &[])?;
    for (name, kept) in kept(&report)? {
        let given = name == "agent" && !all();
        ensure!(kept == given, "the stage {name}: kept is {kept} in an empty cache");
    }
    let left = intermediate(temporary);
    ensure!(left.is_empty(), "left over: {left:?}");
    fs::remove_dir_all(&cache).with_context(|| format!("removing {cache}"))
}

/// The directories of the base's intermediate files.
fn intermediate(temporary: &Utf8Path) -> Vec<Utf8PathBuf> {
    let entries = temporary.read_dir_utf8().into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().starts_with("slipway-base-"));
    named.map(|entry| entry.path().to_owned()).collect()
}

/// A build that is killed while packages are being installed, their root mounted: what is large the next build
/// removes, and nothing stays mounted.
fn killed_in_the_base(tool: &Xtask, temporary: &Utf8Path) -> Result<()> {
    let installs = || {
        let roots = intermediate(temporary).into_iter().flat_map(|path| path.read_dir_utf8());
        let mut entries = roots.flatten().flatten();
        entries.any(|entry| entry.path().join("var/lib/dpkg/info/libc-bin.list").exists())
    };
    let killed = kill_when(tool, &[], installs)?;
    say(format!("killed while it installed packages: {killed}"));
    ensure!(killed && intermediate(temporary).len() == 1, "it was killed too late");
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let left: Vec<&str> = mounts.lines().filter(|l| l.contains(temporary.as_str())).collect();
    ensure!(left.is_empty(), "still mounted: {left:?}");
    Ok(())
}

/// A build on a machine with an empty cache, no mirror and no index: all is in the shared cache, or made.
fn build_in_a_team(folder: &Folder, name: &str) -> Result<()> {
    let copy = folder.at(name);
    copy_workspace(&copy)?;
    let cache = empty_cache(folder, name, &[])?;
    let tool = Xtask::new(&copy).env("SLIPWAY_CACHE", &cache).without_network();
    let report = tool.env("SLIPWAY_SHARED_CACHE", folder.at(TEAM)).build(BOARD, &[])?;
    for (name, kept) in kept(&report)? {
        let expected = ["base", "api", "agent"].contains(&name.as_str());
        ensure!(kept == expected, "the stage {name}: fetched is {kept}, expected {expected}");
    }
    let root = cache.join("stages/root");
    ensure!(!root.exists(), "the stage root was fetched for nothing");
    Ok(())
}

/// A checkout as it is under umask 077.
fn tool_permissions(copy: &Utf8Path) -> Result<()> {
    crate::support::tool("chmod").args(["-R", "go-rwx", copy.as_str()]).run()
}

/// The other side is the build that all tests share: another directory, another time, umask 022. On
/// a fresh machine it is clean as well; where the cache was warm, it was clean at some earlier
/// time, and a difference means that a stage's code changed without its version. `test --all` makes
/// two, compiles the agent for each, and kills one before. A third machine takes from the second
/// one's shared cache what is slow, and must come to the same.
#[test]
fn two_clean_builds_are_equal() -> Result<()> {
    let built = built(BOARD)?;
    let folder = Folder::new()?;
    build_elsewhere(&folder, "a second place", true)?;
    let second = built.within(&folder.at("a second place"))?;
    let first = if all() {
        build_elsewhere(&folder, "first", false)?;
        built.within(&folder.at("first"))?
    } else {
        built.within(&root())?
    };
    build_in_a_team(&folder, "a third place")?;
    let third = built.within(&folder.at("a third place"))?;
    for (one, other) in first.iter().zip(&second).chain(first.iter().zip(&third)) {
        say(format!("comparing {one} and {other}"));
        same(one, other)?;
    }
    Ok(())
}
