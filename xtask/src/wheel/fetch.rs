//! Downloads locked wheels into the cache, by hash, each once, preferably from a team's shared
//! cache, else from the index; offline it only uses the local cache.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use super::lock::{LockedWheel, WheelLock};
use super::pip::Pip;
use super::target::WheelTarget;
use crate::artifact::{Artifact, hash_file};
use crate::cache::{Cache, RemoteDownloads};
use crate::progress::{self, ProgressStep, ProgressUnit};

/// A locked wheel in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownloadedWheel {
    /// The entry in the lock.
    pub locked: LockedWheel,
    /// The path of the file; its SHA-256 has been checked.
    pub path: Utf8PathBuf,
}

/// The path of a wheel in the cache: `downloads/sha256/<hash>`.
fn wheel_path(cache: &Utf8Path, wheel: &LockedWheel) -> Utf8PathBuf {
    cache.join("downloads/sha256").join(&wheel.sha256)
}

/// Downloads every wheel of a lock into the cache and checks its SHA-256. Only missing wheels are
/// downloaded; with `offline` nothing is.
///
/// # Errors
/// When `offline` and wheels are missing (the error names them); when pip cannot download a wheel,
/// or the index no longer has it.
pub fn fetch_wheels(
    lock: &WheelLock,
    cache: &Cache,
    offline: bool,
) -> Result<Vec<DownloadedWheel>> {
    let shared = cache.remote().filter(|_| !offline);
    let cache = cache.root.as_path();
    let mut missing = missing_wheels(&lock.wheels, cache)?;
    if let Some(shared) = &shared {
        missing = from_shared(shared.as_ref(), missing, cache)?;
    }
    if offline && !missing.is_empty() {
        let files: Vec<&str> = missing.iter().map(|wheel| wheel.file.as_str()).collect();
        bail!(
            "{} of {} wheels are not in the cache {cache}, and --offline forbids downloads:\n  \
             {}\nhelp: build once without --offline",
            files.len(),
            lock.wheels.len(),
            files.join("\n  ")
        );
    }
    if !missing.is_empty() {
        let pip = Pip::find(None)?;
        download_wheels(&pip, &missing, &lock.target, cache)
            .context("downloading the wheels that the lock names")?;
    }
    let mut fetched = Vec::new();
    for wheel in &lock.wheels {
        let path = wheel_path(cache, wheel);
        let size = std::fs::metadata(&path).with_context(|| format!("reading {path}"))?.len();
        ensure!(
            size == wheel.size,
            "{} has {size} bytes, but the lock has {}\n\
             help: update the lock with `cargo xtask lock`",
            wheel.file,
            wheel.size
        );
        fetched.push(DownloadedWheel { locked: wheel.clone(), path });
    }
    if let Some(shared) = &shared {
        let artifact = |wheel: &DownloadedWheel| {
            let DownloadedWheel { locked, path } = wheel;
            Artifact { path: path.clone(), size: locked.size, sha256: locked.sha256.clone() }
        };
        shared.offer("wheels", &fetched.iter().map(artifact).collect::<Vec<_>>());
    }
    Ok(fetched)
}

/// Fetches what the shared cache has; returns the wheels that it lacks.
fn from_shared<'a>(
    shared: &dyn RemoteDownloads,
    wheels: Vec<&'a LockedWheel>,
    cache: &Utf8Path,
) -> Result<Vec<&'a LockedWheel>> {
    let total = wheels.iter().map(|wheel| wheel.size).sum();
    let step = ProgressStep::new("wheels", "from the shared cache", total, ProgressUnit::Bytes);
    let dir = cache.join("downloads/sha256");
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {dir}"))?;
    let mut lacking = Vec::new();
    for wheel in wheels {
        step.note(&wheel.file);
        let temporary = tempfile::Builder::new()
            .prefix("wheel.partial.")
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(cache.join("downloads"))
            .with_context(|| format!("making a file in {cache}"))?
            .into_temp_path();
        let partial = Utf8Path::from_path(&temporary).context("the cache's path is not UTF-8")?;
        let advance = |n| step.advance(n);
        if !shared.download(&wheel.sha256, Some(wheel.size), partial, &advance) {
            lacking.push(wheel);
            continue;
        }
        let to = wheel_path(cache, wheel);
        temporary.persist(&to).with_context(|| format!("renaming to {to}"))?;
    }
    Ok(lacking)
}

/// Like `fetch`, for wheels whose size is not known yet; the paths are in the order of the wheels.
pub(super) fn fetch_unsized_wheels(
    pip: &Pip,
    wheels: &[LockedWheel],
    target: &WheelTarget,
    cache: &Utf8Path,
) -> Result<Vec<Utf8PathBuf>> {
    let missing = missing_wheels(wheels, cache)?;
    if !missing.is_empty() {
        download_wheels(pip, &missing, target, cache)?;
    }
    Ok(wheels.iter().map(|wheel| wheel_path(cache, wheel)).collect())
}

/// The wheels that are not in the cache. A file there with the wrong content is removed.
fn missing_wheels<'a>(wheels: &'a [LockedWheel], cache: &Utf8Path) -> Result<Vec<&'a LockedWheel>> {
    let mut missing = Vec::new();
    for wheel in wheels {
        let path = wheel_path(cache, wheel);
        if !path.exists() {
            missing.push(wheel);
        } else if hash_file(&path)?.1 != wheel.sha256 {
            progress::warn(format!("{path} ({}) is damaged; downloading it again", wheel.file));
            std::fs::remove_file(&path).with_context(|| format!("removing {path}"))?;
            missing.push(wheel);
        }
    }
    Ok(missing)
}

fn download_wheels(
    pip: &Pip,
    wheels: &[&LockedWheel],
    target: &WheelTarget,
    cache: &Utf8Path,
) -> Result<()> {
    let directory = cache.join("downloads/sha256");
    std::fs::create_dir_all(&directory).with_context(|| format!("creating {directory}"))?;
    // In the cache's own filesystem, so that a finished file can be renamed to its final path.
    let scratch = tempfile::Builder::new()
        .prefix("wheels.partial.")
        .tempdir_in(cache.join("downloads"))
        .with_context(|| format!("making a directory in {cache}"))?;
    let dir = Utf8Path::from_path(scratch.path()).context("the cache's path is not UTF-8")?;
    let list = dir.join("requirements.txt");
    let text: String = wheels
        .iter()
        .map(|w| format!("{}=={} --hash=sha256:{}\n", w.name, w.version, w.sha256))
        .collect();
    std::fs::write(&list, text).with_context(|| format!("writing {list}"))?;

    let sizes: BTreeMap<&str, u64> = wheels.iter().map(|w| (w.file.as_str(), w.size)).collect();
    let total: u64 = sizes.values().sum();
    let step = match total {
        // The sizes are not known while a lock is being made.
        0 => ProgressStep::new(
            "wheels",
            "downloading wheels",
            wheels.len() as u64,
            ProgressUnit::Items,
        ),
        _ => ProgressStep::new("wheels", "downloading wheels", total, ProgressUnit::Bytes),
    };
    let mut current = 0;
    pip.tool("download", target)
        .args(["--no-deps", "--require-hashes", "--dest", dir.as_str(), "--requirement"])
        .arg(&list)
        .run_lines(|line| {
            // pip announces a file, then downloads it: the previous one is complete by then.
            let line = line.trim_start();
            let file = line
                .strip_prefix("Downloading ")
                .or_else(|| line.strip_prefix("Using cached "))
                .and_then(|rest| rest.split_whitespace().next())
                .map(|file| file.rsplit('/').next().unwrap_or(file));
            if let Some(file) = file.filter(|file| file.ends_with(".whl")) {
                step.advance(current);
                current = if total == 0 { 1 } else { sizes.get(file).copied().unwrap_or(0) };
                step.note(file);
            }
        })?;
    for wheel in wheels {
        let from = dir.join(&wheel.file);
        ensure!(
            from.exists(),
            "pip downloaded another file than {} for {} {}",
            wheel.file,
            wheel.name,
            wheel.version
        );
        let (_, found) = hash_file(&from)?;
        ensure!(
            found == wheel.sha256,
            "{} has the sha256 {found}, expected {}",
            wheel.file,
            wheel.sha256
        );
        let to = wheel_path(cache, wheel);
        std::fs::rename(&from, &to).with_context(|| format!("renaming {from} to {to}"))?;
    }
    Ok(())
}
