//! `buildroot sources`: every source file once; fills and checks mirrors.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;

use super::{Case, board_names, product_name, resolve_releases};
use crate::cache::Cache;
use crate::cli::{BuildrootSourcesArgs, OutputFormat};
use crate::parallel;
use crate::progress::{ProgressStep, ProgressUnit, format_bytes, say};
use crate::render::defconfig_title;
use crate::rootfs::buildroot::check::check_defconfig;
use crate::rootfs::buildroot::engine::{self, BuildrootRequest};
use crate::rootfs::buildroot::info::BuildrootInfo;
use crate::rootfs::buildroot::make::{BuildrootSetup, BuildrootSite};
use crate::rootfs::buildroot::mirror;
use crate::rootfs::buildroot::sources::{SourceFile, SourcePlace, list_sources, locate_sources};
use crate::tools::{self, ToolPurpose};
use crate::{outln, text};

/// A board, with the packages of its system.
struct BoardSources {
    case: Case,
    info: BuildrootInfo,
}

/// `cargo xtask buildroot sources`.
///
/// # Errors
/// A source without a hash; with `--mirror-to` a source that is not available; with `--check`
/// a mirror that lacks a source, or has it damaged or misnamed.
pub(super) fn sources(options: &BuildrootSourcesArgs) -> Result<()> {
    ensure!(
        options.target.tree.overrides.is_empty(),
        "--override has no effect on the list of sources, which has the releases of all packages\n\
         help: remove --override"
    );
    if options.mirror_to.is_some() {
        tools::require_tools(&[ToolPurpose::Buildroot], true)?;
    }
    let product = product_name(&options.target)?;
    let mut boards = Vec::new();
    let mut infos = Vec::new();
    for board in board_names(&options.target, &product)? {
        let plan = resolve_releases(&product, Some(&board))?;
        let case = Case::new(&options.target, plan, Cache::locate()?)?;
        // Without the mirror, so that the addresses are those of the sources' authors.
        let info = case.with_check_setup(|setup| {
            let info = BuildrootInfo::read(setup, &BuildrootSite::default())?;
            engine::require_hashes(&info, &setup.tree)?;
            Ok(info)
        });
        let info = info.with_context(|| format!("listing the sources of {product} for {board}"))?;
        say("sources", format!("{board}: {} packages", info.packages().count()));
        infos.push((board, info.clone()));
        boards.push(BoardSources { case, info });
    }
    let case = &boards.first().context("the product has no boards")?.case;
    let mut list = list_sources(&infos, &case.tree.path)?;
    if let Some(mirror) = &options.check {
        return check(&list, mirror, options.format);
    }
    let downloads = case.setup()?.downloads;
    let site = BuildrootSite::of_machine(options.target.offline)?;
    if !options.from.is_empty() {
        take_from(&list, &options.from, &downloads)?;
    }
    for repository in &options.pack_git {
        let _turn = lock_directory(&downloads)?;
        let lacking = mirror::list_lacking(&list, &downloads)?;
        for path in mirror::pack_git(&lacking, repository, &downloads)? {
            say("sources", format!("made {path} from {repository}"));
        }
    }
    if let Some(mirror) = &options.mirror_to {
        return fill_mirror(&list, mirror, &boards, &site, options.format);
    }
    locate_sources(&mut list, &downloads, site.mirror.as_deref())?;
    print_list(&list, options.format)
}

impl Case {
    /// Works in the directory for checks, with the configuration of this board.
    fn with_check_setup<T>(&self, work: impl FnOnce(&BuildrootSetup) -> Result<T>) -> Result<T> {
        // Without source directories: a mirror has the releases of all packages.
        let (setup, _lock) = self.check_setup(&[])?;
        let title = defconfig_title(&self.plan);
        check_defconfig(&setup, &self.buildroot.defconfig, &title)?.require()?;
        work(&setup)
    }
}

fn print_list(list: &[SourceFile], format: OutputFormat) -> Result<()> {
    if format == OutputFormat::Json {
        outln!("{}", text::to_json(&list)?);
        return Ok(());
    }
    let (mut here, mut there) = (0, 0);
    for source in list {
        let place = match source.place {
            Some(SourcePlace::Downloads) => "downloads",
            Some(SourcePlace::Mirror) => "mirror",
            None => "missing",
        };
        here += usize::from(source.place == Some(SourcePlace::Downloads));
        there += usize::from(source.place == Some(SourcePlace::Mirror));
        let size = source.size.map_or(String::new(), |size| format!(", {}", format_bytes(size)));
        outln!("{}  ({place}{size})", source.path());
        let private = if source.redistributable { "" } else { ", not redistributable" };
        outln!("    {}{private}", source.describe());
        for (name, hash) in [("sha256", &source.hashes.sha256), ("sha512", &source.hashes.sha512)] {
            if let Some(hash) = hash {
                outln!("    {name} {hash}");
            }
        }
        for address in &source.addresses {
            outln!("    {address}");
        }
    }
    let missing = list.len() - here - there;
    outln!("{} sources: {here} in downloads, {there} on the mirror, {missing} missing", list.len());
    Ok(())
}

/// Waits until no other run writes to a directory of sources: all runs use the same temporary names.
fn lock_directory(dir: &Utf8Path) -> Result<File> {
    fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
    let lock = File::open(dir).with_context(|| format!("opening {dir}"))?;
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => {
            say("sources", format!("waiting for another run that writes to {dir}"));
            lock.lock().with_context(|| format!("locking {dir}"))?;
        }
        // File systems of other machines cannot lock a directory.
        Err(TryLockError::Error(_)) | Ok(()) => {}
    }
    Ok(lock)
}

/// Finds missing sources in directories by their hash, and copies them to the directory of downloads.
fn take_from(list: &[SourceFile], dirs: &[Utf8PathBuf], downloads: &Utf8Path) -> Result<()> {
    let _turn = lock_directory(downloads)?;
    let lacking = mirror::list_lacking(list, downloads)?;
    let found = mirror::find_by_hash(&lacking, dirs, &BTreeSet::new())?;
    for source in &lacking {
        if let Some(file) = found.get(&source.path()) {
            mirror::copy_source(source, file, downloads)?;
            say("sources", format!("{} is {}", file.display(), source.path()));
        }
    }
    say("sources", format!("found {} of {} missing sources", found.len(), lacking.len()));
    Ok(())
}

/// A filled mirror in machine-readable form.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct FilledMirror {
    directory: Utf8PathBuf,
    index: Utf8PathBuf,
    files: usize,
    copied: usize,
    missing: Vec<Utf8PathBuf>,
}

fn fill_mirror(
    list: &[SourceFile],
    to: &Utf8Path,
    boards: &[BoardSources],
    site: &BuildrootSite,
    format: OutputFormat,
) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("creating {to}"))?;
    let to = to.canonicalize_utf8().with_context(|| format!("looking up {to}"))?;
    let _turn = lock_directory(&to)?;
    let lacking: Vec<SourceFile> = mirror::list_lacking(list, &to)?.into_iter().cloned().collect();
    let downloads = boards.first().context("the product has no boards")?.case.setup()?.downloads;
    let mut failure = None;
    for board in boards {
        let missing = mirror::list_lacking(&lacking, &downloads)?;
        if missing.is_empty() || (site.offline && site.mirror.is_none()) {
            break;
        }
        let named: BTreeSet<String> =
            missing.iter().flat_map(|source| &source.packages).cloned().collect();
        failure = board.download(&named, site)?.err().or(failure);
    }
    let missing = mirror::list_lacking(&lacking, &downloads)?;
    let copies: Vec<&SourceFile> =
        lacking.iter().filter(|source| !missing.contains(source)).collect();
    let step = ProgressStep::new("sources", "copying", copies.len() as u64, ProgressUnit::Items);
    parallel::map(&copies, parallel::cores(), |source| {
        mirror::copy_source(source, downloads.join(source.path()).as_std_path(), &to)?;
        step.advance(1);
        Ok(())
    })?;
    drop(step);
    let filled = FilledMirror {
        index: mirror::write_index(list, &to)?,
        files: list.len() - missing.len(),
        copied: copies.len(),
        missing: missing.iter().map(|source| source.path()).collect(),
        directory: to,
    };
    match format {
        OutputFormat::Json => outln!("{}", text::to_json(&filled)?),
        OutputFormat::Text => outln!(
            "{}: {} of {} sources, {} copied; index {}",
            filled.directory,
            filled.files,
            list.len(),
            filled.copied,
            mirror::INDEX
        ),
    }
    if missing.is_empty() {
        return Ok(());
    }
    let lines: String = missing
        .iter()
        .map(|source| {
            let from = source.addresses.first().map_or("", String::as_str);
            format!("\n  {}: {}, from {from}", source.path(), source.describe())
        })
        .collect();
    let why = failure.map_or(String::new(), |error| format!("\nthe last failure: {error:#}"));
    bail!(
        "{} sources are not available, so the mirror is incomplete:{lines}{why}\n\
         help: name directories that have them, under any names, with --from",
        missing.len()
    );
}

impl BoardSources {
    /// Downloads what this board needs of these packages. The inner result says which source was
    /// not available.
    fn download(&self, packages: &BTreeSet<String>, site: &BuildrootSite) -> Result<Result<()>> {
        let own: BTreeSet<String> =
            packages.iter().filter(|name| self.info.0.contains_key(*name)).cloned().collect();
        if own.is_empty() {
            return Ok(Ok(()));
        }
        self.case.with_check_setup(|setup| {
            let request = BuildrootRequest {
                plan: &self.case.buildroot,
                title: &defconfig_title(&self.case.plan),
                tree: &self.case.tree,
                setup,
                site,
                log: &setup.output.join("slipway-make.log"),
                // The directory is for checks only: no finished package is removed.
                yes: true,
            };
            Ok(engine::download_available(&request, &self.info, &own))
        })
    }
}

fn check(list: &[SourceFile], dir: &Utf8Path, format: OutputFormat) -> Result<()> {
    let dir = dir.canonicalize_utf8().with_context(|| format!("looking for the mirror {dir}"))?;
    let findings = mirror::check_mirror(list, &dir)?;
    match format {
        OutputFormat::Json => outln!("{}", text::to_json(&findings)?),
        OutputFormat::Text => findings.iter().for_each(|finding| outln!("{finding}")),
    }
    if findings.is_empty() {
        say("sources", format!("{dir}: all {} sources are complete", list.len()));
        return Ok(());
    }
    bail!(
        "{dir}: {} of {} sources are missing, damaged or misnamed\n\
         help: cargo xtask buildroot sources --mirror-to {dir} --from {dir} repairs it",
        findings.len(),
        list.len()
    );
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_run_at_a_time_writes_to_a_directory_of_sources() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = Utf8PathBuf::try_from(dir.path().join("new")).expect("UTF-8");
        let first = lock_directory(&dir).expect("locked");
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let second = lock_directory(&dir).expect("locked");
                sender.send(()).expect("sent");
                drop(second);
            });
            receiver.recv_timeout(Duration::from_millis(200)).expect_err("two at once");
            drop(first);
            receiver.recv_timeout(Duration::from_secs(60)).expect("the second waits no longer");
        });
    }
}
