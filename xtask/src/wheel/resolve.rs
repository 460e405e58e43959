//! Makes a wheel lock. pip chooses the versions; this module runs it again until everything is
//! included that the target needs (not what this machine would need), and explains why when that is
//! impossible.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use pep508_rs::pep440_rs::Version;
use serde::Deserialize;

use super::archive::CheckedWheel;
use super::check::{BaseDistribution, DependencyClosure, check_wheels, follow_requirements};
use super::component::find_unfit_files;
use super::fetch::fetch_unsized_wheels;
use super::install::{InstallTarget, preview_files, tell_doubts};
use super::lock::{LockedWheel, WheelLock, describe_difference};
use super::metadata::{WheelMetadata, parse_lenient, parse_requirement, satisfies};
use super::pip::{Pip, wheel_file};
use super::target::{WheelName, WheelTarget, normalise_name};
use crate::artifact::hash_file;
use crate::progress::{ProgressStep, ProgressUnit, warn};

/// pip evaluates markers for the machine that it runs on; what only the target needs is added, and
/// pip is run again. Each round adds at least one requirement; more rounds than this do not occur
/// in practice.
const ROUNDS: usize = 20;

/// What to resolve.
#[derive(Debug, Clone)]
pub struct LockRequest {
    /// The distribution with its version: `opentrons==10.1.0`.
    pub requirement: String,
    /// The base's Python.
    pub target: WheelTarget,
    /// The distributions in the base; they need not be among the wheels, but may be.
    pub base: Vec<BaseDistribution>,
    /// The cache directory; the wheels are downloaded into it, for their sizes and their checks.
    pub cache: Utf8PathBuf,
    /// The log for pip's output.
    pub log: Option<Utf8PathBuf>,
}

#[derive(Debug, Deserialize)]
struct PipReport {
    install: Vec<ReportItem>,
}

#[derive(Debug, Deserialize)]
struct ReportItem {
    download_info: DownloadInfo,
    metadata: ReportMetadata,
}

#[derive(Debug, Deserialize)]
struct DownloadInfo {
    url: String,
    archive_info: Option<ArchiveInfo>,
}

#[derive(Debug, Default, Deserialize)]
struct ArchiveInfo {
    hash: Option<String>,
    #[serde(default)]
    hashes: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
struct ReportMetadata {
    name: String,
    version: String,
    #[serde(default)]
    requires_dist: Vec<String>,
    requires_python: Option<String>,
}

/// Resolves a requirement for a target, downloads what was found, checks every wheel and returns
/// the lock.
///
/// # Errors
/// When there is no working pip or no index in reach; when a dependency has no wheel for the target (the
/// error says which tags exist); when requirements contradict each other; when a wheel breaks a rule.
pub fn lock_wheels(request: &LockRequest) -> Result<WheelLock> {
    let LockRequest { requirement, target, .. } = request;
    resolve_requirement(request).with_context(|| format!("resolving {requirement} for {target}"))
}

/// Resolves and writes the lock file, what `cargo xtask lock` does; returns the lock and what it
/// changes against the file that was there (nothing is written when nothing changes).
///
/// # Errors
/// As `lock`, or when the file cannot be written. An old file that cannot be read is ignored, since
/// writing a new one repairs it.
pub fn update_lock(request: &LockRequest, path: &Utf8Path) -> Result<(WheelLock, Vec<String>)> {
    let new = lock_wheels(request)?;
    let old = WheelLock::load(path).ok();
    let changes = describe_difference(old.as_ref(), &new);
    if old.as_ref() != Some(&new) {
        new.save(path)?;
    }
    Ok((new, changes))
}

fn resolve_requirement(request: &LockRequest) -> Result<WheelLock> {
    let target = &request.target;
    target.validate()?;
    let top = parse_requirement(&request.requirement)?;
    let markers = target.markers()?;
    let pip = Pip::find(request.log.as_deref())?;
    let step = ProgressStep::new(
        "lock",
        format!("resolving {} with pip {}", request.requirement, pip.version),
        0,
        ProgressUnit::Items,
    );
    let mut asked = vec![request.requirement.clone()];
    for _ in 0..ROUNDS {
        let items = pip_report(&pip, &asked, target)?;
        let mut found = BTreeMap::new();
        for item in &items {
            found
                .insert(normalise_name(&item.metadata.name), metadata_from_report(&item.metadata)?);
        }
        let wheels = found.iter().map(|(name, metadata)| (name.clone(), metadata)).collect();
        let closure = follow_requirements(&top, &wheels, &request.base, &markers)?;
        let missing: Vec<String> = closure
            .unmet
            .iter()
            .map(|unmet| unmet.requirement.clone())
            .filter(|requirement| !asked.contains(requirement))
            .collect();
        if !missing.is_empty() {
            step.note(format!("adding {}, which only the target needs", missing.join(", ")));
            asked.extend(missing);
            continue;
        }
        if let Some(unmet) = closure.unmet.first() {
            bail!(
                "{} needs {}, but pip chose {}",
                unmet.needed_by.as_deref().unwrap_or("the product"),
                unmet.requirement,
                unmet.found.as_deref().unwrap_or("none")
            );
        }
        drop(step);
        return finish_lock(request, &pip, &items, &closure);
    }
    bail!("pip found no complete set after {ROUNDS} rounds; the last request was {asked:?}")
}

/// Downloads, measures and checks what was chosen.
fn finish_lock(
    request: &LockRequest,
    pip: &Pip,
    items: &[ReportItem],
    closure: &DependencyClosure,
) -> Result<WheelLock> {
    let target = &request.target;
    let mut chosen = Vec::new();
    for item in items {
        let name = normalise_name(&item.metadata.name);
        // Needed only by this machine, because of a marker that is false on the target.
        let Some(needed_by) = closure.needed_by.get(&name) else { continue };
        let url = &item.download_info.url;
        chosen.push(LockedWheel {
            name,
            version: item.metadata.version.clone(),
            file: wheel_file(url)
                .with_context(|| format!("pip chose {url}, which is not a wheel"))?,
            size: 0,
            sha256: reported_hash(&item.download_info)?,
            requires_python: item.metadata.requires_python.clone(),
            needed_by: needed_by.iter().cloned().collect(),
        });
    }
    let paths = fetch_unsized_wheels(pip, &chosen, target, &request.cache)?;
    let mut wheels = Vec::new();
    for (locked, path) in chosen.iter_mut().zip(&paths) {
        locked.size = hash_file(path)?.0;
        wheels.push(CheckedWheel::open(path, &locked.file, Some(&locked.sha256))?);
    }
    check_wheels(&request.requirement, &wheels, target, &request.base)?;
    tell_doubts(&wheels);
    let top = normalise_name(parse_requirement(&request.requirement)?.name.as_ref());
    let files = preview_files(wheels, &InstallTarget::on_data(), &top)?;
    for why in find_unfit_files(&files) {
        warn(format!(
            "an image may contain this wheel, but robots would reject it as part of the component \
             api: {why}"
        ));
    }
    Ok(WheelLock::new(&request.requirement, target.clone(), chosen))
}

fn metadata_from_report(item: &ReportMetadata) -> Result<WheelMetadata> {
    let parse = || -> Result<WheelMetadata> {
        Ok(WheelMetadata {
            name: item.name.clone(),
            version: Version::from_str(&item.version).map_err(|error| anyhow!("{error}"))?,
            version_text: item.version.clone(),
            summary: None,
            license: None,
            requires_python: item.requires_python.clone(),
            requires: item
                .requires_dist
                .iter()
                // Its mistakes are reported when the wheel itself is read.
                .map(|requirement| parse_lenient(requirement, &mut Vec::new()))
                .collect::<Result<_>>()?,
            extras: Vec::new(),
            doubts: Vec::new(),
        })
    };
    parse().with_context(|| format!("reading the metadata of {} {}", item.name, item.version))
}

fn reported_hash(info: &DownloadInfo) -> Result<String> {
    let archive = info.archive_info.as_ref();
    let given = archive.and_then(|a| {
        let old = || a.hash.as_deref()?.strip_prefix("sha256=");
        a.hashes.get("sha256").map(String::as_str).or_else(old)
    });
    if let Some(sha256) = given {
        return Ok(sha256.to_owned());
    }
    // A directory of wheels (`find-links`) has no hashes.
    match info.url.strip_prefix("file://") {
        Some(path) => Ok(hash_file(Utf8Path::new(path))?.1),
        None => {
            bail!("the index has no sha256 for {}", wheel_file(&info.url).unwrap_or_default())
        }
    }
}

fn pip_report(pip: &Pip, requirements: &[String], target: &WheelTarget) -> Result<Vec<ReportItem>> {
    let scratch = tempfile::tempdir().context("making a temporary directory")?;
    let dir =
        Utf8Path::from_path(scratch.path()).context("the temporary directory is not UTF-8")?;
    let report = dir.join("report.json");
    let mut lines = Vec::new();
    let result = pip
        .tool("install", target)
        .args(["--dry-run", "--ignore-installed", "--no-compile", "--no-warn-conflicts"])
        .args(["--target", dir.join("nothing").as_str(), "--report", report.as_str()])
        .args(requirements)
        .run_lines(|line| lines.push(line.to_owned()));
    if let Err(error) = result {
        return Err(match missing_wheel(&lines) {
            Some((requirement, by)) => {
                explain_conflict(pip, &requirement, by.as_deref(), target, error)
            }
            None => error,
        });
    }
    let text = std::fs::read_to_string(&report).with_context(|| format!("reading {report}"))?;
    let report: PipReport = serde_json::from_str(&text).context("reading pip's report")?;
    ensure!(!report.install.is_empty(), "pip's report is empty");
    Ok(report.install)
}

/// Finds pip's message that a requirement has no candidate: the requirement and what requires it.
fn missing_wheel(lines: &[String]) -> Option<(String, Option<String>)> {
    const COMPLAINT: &str = "Could not find a version that satisfies the requirement ";
    let text = lines.iter().find_map(|line| line.split_once(COMPLAINT).map(|(_, rest)| rest))?;
    let text = text.split(" (from versions:").next()?;
    Some(match text.split_once(" (from ") {
        Some((requirement, by)) => {
            let by = by.trim_end_matches(')').split("->").last().map(str::to_owned);
            (requirement.to_owned(), by)
        }
        None => (text.to_owned(), None),
    })
}

fn explain_conflict(
    pip: &Pip,
    requirement: &str,
    by: Option<&str>,
    target: &WheelTarget,
    error: anyhow::Error,
) -> anyhow::Error {
    match pip.wheels_of(requirement, target) {
        Ok(wheels) if !wheels.is_empty() => {
            describe_missing(requirement, by, target, &wheels).unwrap_or_else(|failed| failed)
        }
        _ => error.context(format!(
            "{requirement} has no wheel, neither for {target} nor for other targets"
        )),
    }
}

/// The error for a requirement without a wheel: which tags exist.
///
/// # Errors
/// When the requirement cannot be read.
pub fn describe_missing(
    requirement: &str,
    by: Option<&str>,
    target: &WheelTarget,
    wheels: &[WheelName],
) -> Result<anyhow::Error> {
    let wanted = parse_requirement(requirement)?;
    let needed = by.map(|by| format!(", which {by} needs,")).unwrap_or_default();
    let mut versions: BTreeMap<Version, Vec<&WheelName>> = BTreeMap::new();
    for wheel in wheels {
        if let Ok(version) = Version::from_str(&wheel.version) {
            versions.entry(version).or_default().push(wheel);
        }
    }
    let head = format!("{requirement}{needed} has no wheel for {target}");
    let Some((version, newest)) =
        versions.iter().rev().find(|(version, _)| satisfies(&wanted, version))
    else {
        let newest = versions.keys().next_back().map(Version::to_string).unwrap_or_default();
        return Ok(anyhow!(
            "{head}: no version in that range has any wheel; the newest version is {newest}\n\
             help: require a version that exists"
        ));
    };
    let mut tags: Vec<String> =
        newest.iter().flat_map(|wheel| &wheel.tags).map(ToString::to_string).collect();
    tags.sort();
    tags.dedup();
    let usable = |tag: &&String| {
        let linux = tag.contains("linux") && tag.ends_with(&target.arch);
        linux || tag.ends_with("-any")
    };
    let near: Vec<&str> = tags.iter().filter(usable).map(String::as_str).collect();
    let (which, shown) = match near.is_empty() {
        true => (String::new(), tags.iter().map(String::as_str).collect()),
        false => (format!(" for Linux on {}", target.arch), near),
    };
    Ok(anyhow!(
        "{head}\n\
         {} {version}, the newest version in that range, has these tags{which}:\n  {}\n\
         help: use a base with one of these Pythons, or a version of {} that allows a newer {}",
        wanted.name,
        shown.join("\n  "),
        by.unwrap_or("the product's wheel"),
        wanted.name
    ))
}
