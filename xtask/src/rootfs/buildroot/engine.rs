//! Runs Buildroot: checks the configuration, downloads all sources first, cleans the packages that
//! a change affects, builds packages in parallel, and resumes interrupted builds.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{IsTerminal as _, Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use super::check;
use super::failure::{self, offline_help, plain_uri};
use super::info::BuildrootInfo;
use super::make::{BuildrootSetup, BuildrootSite};
use super::overrides;
use super::pending::PendingRebuild;
use super::rebuild::{OutputState, RebuildAction};
use super::tree::BuildrootTree;
use crate::artifact::none_if_missing;
use crate::exec::Tool;
use crate::fetch::url_without_login;
use crate::plan::BuildrootPlan;
use crate::progress::{ProgressStep, ProgressUnit, list_names, say, warn};

/// The interval of progress updates; a package takes seconds to minutes.
const INTERVAL: Duration = Duration::from_millis(500);

/// Parallel downloads: enough to use the connection, few enough for a mirror.
const DOWNLOADS: usize = 4;

/// One build.
#[derive(Debug)]
pub struct BuildrootRequest<'a> {
    /// Configuration.
    pub plan: &'a BuildrootPlan,
    /// The first line of the defconfig.
    pub title: &'a str,
    /// The tree.
    pub tree: &'a BuildrootTree,
    /// Directories.
    pub setup: &'a BuildrootSetup,
    /// Mirror and compiler cache.
    pub site: &'a BuildrootSite,
    /// The log of make's output; errors name it.
    pub log: &'a Utf8Path,
    /// Build everything again without asking.
    pub yes: bool,
}

/// Builds everything that is not finished yet.
///
/// # Errors
/// A request that Kconfig lost, a source that is not available, a package that fails; each with its
/// cause and the log's path.
pub fn run_build(request: &BuildrootRequest<'_>) -> Result<BuildrootInfo> {
    let setup = request.setup;
    let _lock = setup.lock()?;
    let (info, config) = configure(request)?;
    let state = OutputState::describe(setup, request.tree, &config, &info)?;
    prepare_output(request, &state, &info)?;
    download_sources(request, &info)?;
    let done = info.finished(&setup.output);
    let total = info.packages().count();
    if done > 0 && done < total {
        say("base", format!("{done} of {total} packages are already finished"));
    }
    let step = ProgressStep::new("base", "building packages", total as u64, ProgressUnit::Items);
    let jobs = crate::parallel::cores() + 1;
    let make = setup
        .fetching(request.site)
        .arg(format!("-j{jobs}"))
        // Print each step of a package as a whole, else the lines of several packages are mixed.
        .arg("--output-sync=recurse");
    watch_progress(&step, setup, &info, || run_make(request, make, &info, |_| {}))?;
    drop(step);
    Ok(info)
}

/// Collects sources and licence texts; returns their directory.
///
/// # Errors
/// A source that is not available; a licence text that does not match its hash.
pub fn legal_info(request: &BuildrootRequest<'_>) -> Result<Utf8PathBuf> {
    let setup = request.setup;
    let _lock = setup.lock()?;
    let (info, _) = configure(request)?;
    download_sources(request, &info)?;
    let make = setup.fetching(request.site).arg("legal-info");
    let step = ProgressStep::new("base", "collecting licences", 0, ProgressUnit::Items);
    run_make(request, make, &info, |line| step.note(failure::strip_colours(line)))?;
    Ok(setup.output.join("legal-info"))
}

/// Applies the defconfig, and asks Buildroot for its packages.
///
/// # Errors
/// A lost request; a dependency that is not selected; a source without a hash; a Python version or
/// a C library other than what the wheels are locked for.
pub fn configure(request: &BuildrootRequest<'_>) -> Result<(BuildrootInfo, String)> {
    let setup = request.setup;
    overrides::write_local_mk(setup)?;
    let verdict = check::check_defconfig(setup, &request.plan.defconfig, request.title)?;
    verdict.require().context("Kconfig would drop requests of fragments")?;
    // Query the sources as if there were a network, also when offline, in order to show them.
    let online = BuildrootSite { offline: false, ..request.site.clone() };
    let info = BuildrootInfo::read(setup, &online)?;
    overrides::require_known(&info, setup)?;
    require_packages(&info, &setup.tree, request.plan)?;
    Ok((info, verdict.config))
}

/// What must be right before anything is built: a hash for every source, and the Python and the C
/// library that the wheels are locked for.
///
/// # Errors
/// The first that is not.
pub fn require_packages(info: &BuildrootInfo, tree: &Utf8Path, plan: &BuildrootPlan) -> Result<()> {
    require_hashes(info, tree)?;
    let version = |name: &str| info.0.get(name).map(|entry| entry.version.as_str());
    if let Some(version) = version("python3")
        && version != plan.python
        && !version.starts_with(&format!("{}.", plan.python))
    {
        bail!(
            "this Buildroot has Python {version}, but the product's wheels are locked for {}\n\
             help: correct `rootfs.buildroot.python` and run cargo xtask lock --only wheels",
            plan.python
        );
    }
    // A prebuilt toolchain has its own library, and sources from elsewhere have the version `custom`:
    // these are read after the build.
    let glibc = version("glibc").filter(|version| *version != "custom");
    glibc.map_or(Ok(()), |version| require_libc(&plan.libc, version))
}

/// The wheels were locked for a C library: that of the system must not be older. `found` is a version
/// of glibc, such as `2.41` or Buildroot's `2.41-143-gfc7a48bc9e99`.
///
/// # Errors
/// When it is older, or another library.
pub fn require_libc(locked: &str, found: &str) -> Result<()> {
    let numbers = |version: &str| -> Option<(u32, u32)> {
        let (major, rest) = version.split_once('.')?;
        let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    let wanted = locked.strip_prefix("glibc ").and_then(numbers);
    ensure!(
        wanted.is_some() && numbers(found) >= wanted,
        "this Buildroot has glibc {found}, but the product's wheels are locked for {locked}\n\
         help: correct `rootfs.buildroot.libc` and run cargo xtask lock --only wheels"
    );
    Ok(())
}

/// Every download must have a line in a hash file: detected here in milliseconds, by Buildroot only
/// after the download.
///
/// # Errors
/// All downloads without one.
pub fn require_hashes(info: &BuildrootInfo, tree: &Utf8Path) -> Result<()> {
    let without = info.without_hash(tree)?;
    if without.is_empty() {
        return Ok(());
    }
    let list: String = without
        .iter()
        .map(|(package, source, files)| {
            let files: Vec<&str> = files.iter().map(|f| f.as_str()).collect();
            format!("\n  {package}: {source}, looked in {}", files.join(", "))
        })
        .collect();
    bail!(
        "no hash file contains a line for:{list}\n\
         help: add `sha256  <hash>  <file>` to external/patches/<package>/<package>.hash"
    );
}

/// Prepares the output directory so that make can continue: cleans what must be built again, and
/// records what is about to be built.
///
/// # Errors
/// A make that fails; a record that cannot be read or written.
pub fn prepare_output(
    request: &BuildrootRequest<'_>,
    state: &OutputState,
    info: &BuildrootInfo,
) -> Result<()> {
    let setup = request.setup;
    let pending = PendingRebuild::find(&setup.output, request.tree, state, info)?;
    let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    pending.require_permission(&setup.output, request.yes, terminal)?;
    match pending.action {
        RebuildAction::Nothing => {}
        RebuildAction::Everything(why) => {
            warn(format!("a full rebuild is necessary: {why}"));
            let step = ProgressStep::new("base", "make clean", 0, ProgressUnit::Items);
            run_make(request, setup.make().arg("clean"), info, |line| step.note(line))?;
            // `clean` removes everything except `.config`.
        }
        RebuildAction::Targets(targets) => {
            for (target, why) in &targets {
                let why: Vec<&str> = why.iter().map(String::as_str).collect();
                say("base", format!("{target}: {}", list_names(&why)));
            }
            run_make(request, setup.make().args(clean_goals(&targets, info)), info, |_| {})?;
            // Both are created again from the packages' own directories: files that a package no
            // longer installs must not remain.
            for dir in ["target", "images"].map(|name| setup.output.join(name)) {
                if dir.exists() {
                    fs::remove_dir_all(&dir).with_context(|| format!("clearing {dir}"))?;
                }
                // Buildroot creates them when it configures a package; one that only installs its
                // images again expects them (package/pkg-generic.mk, `.stamp_configured`).
                fs::create_dir_all(&dir).with_context(|| format!("creating {dir}"))?;
            }
        }
    }
    overrides::save_records(setup)?;
    state.save(&setup.output)
}

/// Targets of make that remove what must be rebuilt, and build nothing, since sources may be
/// missing. Packages that install files into `images`, which is emptied, install them again.
fn clean_goals(
    targets: &BTreeMap<String, BTreeSet<String>>,
    info: &BuildrootInfo,
) -> BTreeSet<String> {
    let mut goals: BTreeSet<String> = targets
        .keys()
        .map(|target| target.replace("-reconfigure", "-clean-for-reconfigure"))
        .collect();
    for (name, _) in info.packages().filter(|(_, entry)| entry.install_images) {
        if !targets.contains_key(&format!("{name}-dirclean")) {
            goals.insert(format!("{name}-clean-for-reinstall"));
        }
    }
    goals
}

/// Downloads all sources before building: a missing source is reported within seconds.
fn download_sources(request: &BuildrootRequest<'_>, info: &BuildrootInfo) -> Result<()> {
    let setup = request.setup;
    fs::create_dir_all(&setup.downloads)
        .with_context(|| format!("creating {}", setup.downloads))?;
    let missing = info.missing(&setup.downloads);
    if missing.is_empty() {
        return Ok(());
    }
    if request.site.offline && request.site.mirror.is_none() {
        let list: String = missing
            .iter()
            .map(|(package, entry, download)| {
                let from = download.uris.first().map_or("", |uri| plain_uri(uri));
                let from = url_without_login(from);
                format!("\n  {package}: {}/{} from {from}", entry.dl_dir, download.source)
            })
            .collect();
        bail!(
            "{} sources are not in {}, and --offline forbids downloads:{list}\n{}",
            missing.len(),
            setup.downloads,
            offline_help("<package>")
        );
    }
    let step =
        ProgressStep::new("base", "downloading sources", missing.len() as u64, ProgressUnit::Items);
    let make = setup
        .fetching(request.site)
        .arg(format!("-j{DOWNLOADS}"))
        .args(["--output-sync=target", "source"]);
    let all = missing.len();
    run_make(request, make, info, |line| {
        if line.contains(">>> ") {
            step.note(failure::strip_colours(line).trim_start_matches(">>> ").to_owned());
            let left = info.missing(&setup.downloads).len();
            step.set(all.saturating_sub(left) as u64);
        }
    })
    .with_context(|| format!("downloading {all} sources"))
}

/// Downloads the sources of these packages into the directory of downloads. Unlike in a build, one
/// that is not available does not stop the others.
///
/// # Errors
/// The first source that is not available, with its addresses.
pub fn download_available(
    request: &BuildrootRequest<'_>,
    info: &BuildrootInfo,
    packages: &BTreeSet<String>,
) -> Result<()> {
    let setup = request.setup;
    fs::create_dir_all(&setup.downloads)
        .with_context(|| format!("creating {}", setup.downloads))?;
    // Buildroot's mark says that the file was there once.
    for entry in packages.iter().filter_map(|name| info.0.get(name)) {
        let mark = setup.output.join(&entry.stamp_dir).join(".stamp_downloaded");
        none_if_missing(fs::remove_file(&mark)).with_context(|| format!("removing {mark}"))?;
    }
    let step = ProgressStep::new("sources", "downloading", 0, ProgressUnit::Items);
    let make = setup
        .fetching(request.site)
        .arg(format!("-j{DOWNLOADS}"))
        .args(["--output-sync=target", "--keep-going"])
        .args(packages.iter().map(|name| format!("{name}-source")));
    run_make(request, make, info, |line| {
        if line.contains(">>> ") {
            step.note(failure::strip_colours(line).trim_start_matches(">>> ").to_owned());
        }
    })
}

/// Runs make with the log; a failure is parsed from what this run wrote to it.
fn run_make(
    request: &BuildrootRequest<'_>,
    make: Tool,
    info: &BuildrootInfo,
    each: impl FnMut(&str),
) -> Result<()> {
    let log = request.log;
    let start = fs::metadata(log).map_or(0, |m| m.len());
    let Err(error) = make.log(log).run_lines(each) else { return Ok(()) };
    let mut bytes = Vec::new();
    let mut file =
        fs::File::open(log).with_context(|| format!("opening {log} after: {error:#}"))?;
    file.seek(SeekFrom::Start(start)).with_context(|| format!("reading {log}"))?;
    file.read_to_end(&mut bytes).with_context(|| format!("reading {log}"))?;
    let failure = failure::find_failure(&String::from_utf8_lossy(&bytes), info);
    bail!("{failure}\nfull log: {log}")
}

/// Shows progress while `work` runs: by Buildroot's own marks for finished packages, and by its log
/// of steps (`build-time.log`) for the current steps.
fn watch_progress<T>(
    step: &ProgressStep,
    setup: &BuildrootSetup,
    info: &BuildrootInfo,
    work: impl FnOnce() -> T,
) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                step.set(info.finished(&setup.output) as u64);
                if let Some(now) = at_work(&setup.output) {
                    step.note(now);
                }
                std::thread::sleep(INTERVAL);
            }
        });
        let result = work();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// The current steps, from the end of `build-time.log`.
fn at_work(output: &Utf8Path) -> Option<String> {
    let text = fs::read_to_string(output.join("build/build-time.log")).ok()?;
    let running = running_steps(&text);
    (!running.is_empty()).then(|| running.join(", "))
}

/// Steps that began and did not end, from lines `time:start:step : package`, newest first. An
/// interrupted build leaves such steps behind, so only the last step of a package is used.
pub fn running_steps(log: &str) -> Vec<String> {
    let mut last: Vec<(&str, &str, bool)> = Vec::new();
    for line in log.lines() {
        let fields: Vec<&str> = line.splitn(4, ':').map(str::trim).collect();
        let [_, edge, step, package] = fields.as_slice() else { continue };
        last.retain(|(known, ..)| known != package);
        last.push((package, step, *edge == "start"));
    }
    let running = last.iter().rev().filter(|(.., open)| *open);
    running.take(3).map(|(package, step, _)| format!("{package} ({step})")).collect()
}

#[cfg(test)]
mod tests {
    use super::running_steps;

    #[test]
    fn what_is_at_work_is_read_from_the_log_of_steps() {
        let log = "1795.1:start:extract             : zlib\n1795.2:end  :extract             : zlib\n\
                   1795.3:start:build               : host-gcc\n1795.4:start:configure           : zlib\n";
        assert_eq!(running_steps(log), ["zlib (configure)", "host-gcc (build)"]);
        assert!(running_steps("").is_empty() && running_steps("broken\n").is_empty());
    }
}
