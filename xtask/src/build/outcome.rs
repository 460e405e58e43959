//! The output of a finished build: the report in its three forms, and the bill of materials.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::{BuildContext, BuildKeys, BuildOutputs};
use crate::artifact::{hash_bytes, write_atomically};
use crate::cache::CacheKey;
use crate::config::product::{BuildKind, Engine};
use crate::disk::layout::{GPT_HEAD_SECTORS, GPT_TAIL_SECTORS, SECTOR, TableKind};
use crate::failure::BuildFailure;
use crate::render::RenderedFiles;
use crate::report::{
    self, BuildReport, PathSize, ReportDisk, ReportKind, ReportOutput, ReportPackage,
    ReportProduct, ReportRegion, ReportRegionKind, ReportReplacement, ReportRoot, ReportSigner,
    ReportTableKind, ReportWheel,
};
use crate::rootfs::BasePackage;
use crate::sbom::{self, SbomComponent, SbomOrigin, SbomSubject};
use crate::time::format_timestamp;
use crate::wheel::metadata::License;

/// Records which stage failed, and the path of its log.
///
/// # Errors
/// When the note cannot be written.
pub fn write_failure(build: &BuildContext<'_>, error: &anyhow::Error) -> Result<()> {
    let stage = build.running.name();
    let log = build.log(&stage);
    let shown = log.strip_prefix(build.root).unwrap_or(&log).to_string();
    let failure =
        BuildFailure { stage, log: log.is_file().then_some(shown), error: format!("{error:#}") };
    failure.write(&build.dist)
}

/// Collects the report.
///
/// # Errors
/// When an output cannot be read.
pub fn collect_report(
    build: &BuildContext<'_>,
    made: &BuildOutputs,
    rendered: &RenderedFiles,
    signing: &BuildKeys,
    elapsed: Duration,
) -> Result<BuildReport> {
    let plan = build.plan;
    let components = collect_components(build, made)?;
    let sbom = build.dist.join("sbom.cdx.json");
    let meta = SbomSubject {
        product: plan.product.name.clone(),
        version: plan.product.version.to_string(),
        board: plan.board.name.clone(),
        epoch: plan.epoch,
    };
    sbom::write_sbom(&sbom, &components, &meta)?;
    let mut outputs = Vec::new();
    if let Some(card) = &made.card {
        outputs.push(report_output(build, "image", &card.image, None)?);
        let sha256 = Some(card.bmap.sha256.clone());
        outputs.push(report_output(build, "block map", &card.bmap.path, sha256)?);
    }
    if let Some(bundle) = &made.bundle {
        outputs.push(report_output(build, "bundle", &bundle.path, Some(bundle.sha256.clone()))?);
    }
    outputs.push(report_output(build, "sbom", &sbom, None)?);
    let sized = |list: &[(String, u64)]| {
        list.iter().map(|(path, bytes)| PathSize { path: path.clone(), bytes: *bytes }).collect()
    };
    let system = made.system.as_ref();
    let sizes = system.map(|s| s.sizes.clone()).unwrap_or_default();
    let version = |name: &str| {
        let package = made.base.system.packages.iter().find(|p| p.name == name);
        package.map_or_else(|| made.base.system.kernel_release.clone(), |p| p.version.clone())
    };
    Ok(BuildReport {
        schema: report::SCHEMA,
        product: ReportProduct {
            name: plan.product.name.clone(),
            title: plan.product.title.clone(),
            version: plan.product.version.to_string(),
            kind: report_kind(plan.product.kind),
        },
        board: plan.board.name.clone(),
        engine: made.base.system.engine.clone(),
        suite: Some(match &plan.rootfs.buildroot {
            Some(pinned) => pinned.release.clone(),
            None => plan.rootfs.suite.clone(),
        }),
        commit: plan.commit.clone(),
        epoch: plan.epoch,
        started_in: report::CacheUse::from_stages(&build.stages),
        seconds: elapsed.as_secs_f64(),
        stages: build.stages.clone(),
        outputs,
        signed_by: made.bundle.is_some().then(|| ReportSigner {
            key_id: signing.signer.key().id.clone(),
            kind: report_kind(signing.signer.key().kind),
        }),
        disk: made.card.is_some().then(|| report_disk(build, made)).transpose()?,
        root: system.map(|s| {
            let limit = plan.rootfs.fill_limit;
            ReportRoot::new(s.used, s.capacity, limit, s.warning.clone())
        }),
        packages: sizes
            .packages
            .iter()
            .map(|(name, bytes)| ReportPackage {
                name: name.clone(),
                version: version(name),
                installed_bytes: *bytes,
            })
            .collect(),
        wheels: made.wheels.iter().flat_map(|w| &w.distributions).map(report_wheel).collect(),
        largest_files: sized(&sizes.files),
        directories: sized(&sizes.directories),
        components: collect_parts(build, made, rendered)?,
        starts: made.card.as_ref().map_or(Vec::new(), |card| card.starts.models.clone()),
        warnings: {
            let starts = made.card.iter().map(|card| &card.starts);
            let told = starts.flat_map(|starts| starts.stops.iter().chain(&starts.degrades));
            let pinned = plan.rootfs.buildroot.iter().flat_map(|pinned| &pinned.overrides);
            let custom = pinned.map(|source| {
                let (package, version) = (&source.package, source.version());
                format!("{package} is {version}: this build cannot be released")
            });
            let warning = system.and_then(|s| s.warning.clone());
            custom.chain(warning).chain(told.cloned()).collect()
        },
        replaced_packages: made
            .base
            .replaced
            .iter()
            .map(|r| ReportReplacement {
                name: r.name.clone(),
                old: r.old.clone().unwrap_or_default(),
                new: r.new.clone().unwrap_or_default(),
            })
            .collect(),
        next: if made.card.is_some() { next_commands(build) } else { Vec::new() },
    })
}

/// The parts of the system, each with the digest of its content, without times and paths.
fn collect_parts(
    build: &BuildContext<'_>,
    made: &BuildOutputs,
    rendered: &RenderedFiles,
) -> Result<Vec<report::ReleaseComponent>> {
    let plan = build.plan;
    let mut parts = Vec::new();
    let mut add = |name: &str, version: String, digest: String| {
        parts.push(report::ReleaseComponent { name: name.to_owned(), version, digest });
    };
    let short = |digest: &str| digest.get(..12).unwrap_or_default().to_owned();
    let base = &made.base.system;
    let named = |files: &[crate::rootfs::NamedFile]| -> Vec<(String, String)> {
        files.iter().map(|f| (f.path.clone(), f.file.sha256.clone())).collect()
    };
    let loader = base.bootloader.as_ref().map(|file| file.sha256.clone());
    let digest = CacheKey::new("component", 1)
        .with("root", &base.rootfs.sha256)
        .with("kernel", &base.kernel.sha256)
        .with("busybox", &base.initrd_parts.busybox.sha256)
        .with("modules", &base.initrd_parts.modules.sha256)
        .finish();
    let version = match &plan.rootfs.buildroot {
        Some(pinned) => {
            let sources = pinned.overrides.iter();
            let custom = sources.map(|s| format!(", {} {}", s.package, s.version()));
            format!("{}{}", pinned.release, custom.collect::<String>())
        }
        None => format!("{} of {}", plan.rootfs.suite, format_timestamp(made.base.epoch)),
    };
    add("base", version, digest);
    if let (Some(wheels), Some(api)) = (&made.wheels, &plan.api) {
        let version = api.package.split_once("==").map_or(api.package.as_str(), |(_, v)| v);
        add("api", version.to_owned(), wheels.tar.sha256.clone());
    }
    if let Some(agent) = &made.agent {
        let own = agent.components.iter().find(|c| c.name == super::agent::PACKAGE);
        let version = own.map_or_else(String::new, |c| c.version.clone());
        add("agent", version, agent.binary.sha256.clone());
    }
    let texts: Vec<_> = rendered.boot.iter().map(|(name, b)| (name, hash_bytes(b))).collect();
    let digest = CacheKey::new("component", 1)
        .with_json("texts", &texts)?
        .with_json("firmware", &named(&base.firmware))?
        .with_json("device trees", &named(&base.dtbs))?
        .with_json("boot loader", &loader)?
        .finish();
    add("boot", short(&digest), digest);
    if let Some(system) = &made.system {
        let digest = CacheKey::new("component", 1).with_json("root", &system.root.ranges)?.finish();
        add("system", plan.product.version.to_string(), digest);
    }
    Ok(parts)
}

fn report_kind(kind: BuildKind) -> ReportKind {
    match kind {
        BuildKind::Development => ReportKind::Development,
        BuildKind::Release => ReportKind::Release,
    }
}

fn report_wheel(installed: &crate::wheel::InstalledDistribution) -> ReportWheel {
    ReportWheel {
        name: installed.name.clone(),
        version: installed.version.clone(),
        bytes: installed.installed_bytes,
    }
}

fn next_commands(build: &BuildContext<'_>) -> Vec<String> {
    let plan = build.plan;
    let mut options = String::new();
    if let Some(product) = &build.options.selection.product {
        options.push_str(&format!(" --product {product}"));
    }
    if let Some(board) = &build.options.selection.board {
        options.push_str(&format!(" --board {board}"));
    }
    let mut next = Vec::new();
    if plan.board.qemu.is_some() {
        next.push(format!("cargo xtask run{options}"));
    }
    let mut flash = "cargo xtask flash".to_owned();
    if let Some(product) = &build.options.selection.product {
        flash.push_str(&format!(" {product}"));
    }
    if let Some(board) = &build.options.selection.board {
        flash.push_str(&format!(" --board {board}"));
    }
    next.push(flash);
    let image = build.output("img");
    let image = image.strip_prefix(build.root).unwrap_or(&image);
    next.push(format!("cargo xtask inspect {image}"));
    next
}

fn report_output(
    build: &BuildContext<'_>,
    name: &str,
    path: &Utf8Path,
    sha256: Option<String>,
) -> Result<ReportOutput> {
    let metadata =
        std::fs::metadata(path).with_context(|| format!("reading the metadata of {path}"))?;
    Ok(ReportOutput {
        name: name.to_owned(),
        path: path.strip_prefix(build.root).unwrap_or(path).to_string(),
        size: metadata.len(),
        // st_blocks counts 512-byte units whatever the filesystem's block size (stat(2)).
        on_disk_size: metadata.blocks() * 512,
        sha256,
    })
}

fn report_disk(build: &BuildContext<'_>, made: &BuildOutputs) -> Result<ReportDisk> {
    let layout = &build.plan.disk;
    let region = |kind, role: &str, start, size| ReportRegion {
        kind,
        number: None,
        role: role.to_owned(),
        start,
        size,
        filesystem: None,
        used: None,
    };
    let mut regions = Vec::new();
    let (table_kind, head) = match layout.table {
        TableKind::Mbr => (ReportTableKind::Mbr, 1),
        TableKind::Gpt => (ReportTableKind::Gpt, GPT_HEAD_SECTORS),
        TableKind::Hybrid => (ReportTableKind::GptHybrid, GPT_HEAD_SECTORS),
    };
    regions.push(region(ReportRegionKind::Table, "partition table", 0, head * SECTOR));
    if layout.table.has_gpt() {
        let tail = GPT_TAIL_SECTORS * SECTOR;
        regions.push(region(ReportRegionKind::Table, "backup table", layout.size - tail, tail));
    }
    for record in layout.partitions.iter().filter_map(|placed| placed.record) {
        regions.push(region(
            ReportRegionKind::Table,
            "record of a logical partition",
            record,
            SECTOR,
        ));
    }
    for (i, state) in layout.states.iter().enumerate() {
        let role = format!("boot state {}", i + 1);
        regions.push(region(ReportRegionKind::BootState, &role, state.offset, SECTOR));
    }
    for (i, copy) in layout.trust.iter().enumerate() {
        let length = bundle::area::COPY as u64;
        regions.push(region(
            ReportRegionKind::Trust,
            &format!("trust {}", i + 1),
            copy.offset,
            length,
        ));
    }
    for placed in &layout.partitions {
        let mut partition =
            region(ReportRegionKind::Partition, &placed.name, placed.offset, placed.size);
        partition.number = Some(placed.number);
        partition.filesystem = serde_json::to_value(placed.filesystem)?.as_str().map(str::to_owned);
        partition.used = made
            .system
            .as_ref()
            .filter(|_| placed.name.starts_with("root-"))
            .map(|system| system.used);
        regions.push(partition);
    }
    ReportDisk::new(table_kind, layout.size, regions)
}

fn collect_components(build: &BuildContext<'_>, made: &BuildOutputs) -> Result<Vec<SbomComponent>> {
    let rootfs = &build.plan.rootfs;
    let component = |package: &BasePackage| -> Result<SbomComponent> {
        Ok(SbomComponent {
            name: package.name.clone(),
            version: package.version.clone(),
            origin: match rootfs.engine {
                Engine::Debian => sbom::debian_origin(package, &rootfs.suite, &rootfs.sources)?,
                Engine::Buildroot => SbomOrigin::Generic,
            },
            sha256: Some(package.sha256.clone()).filter(|sum| sum.len() == 64),
            license: license_from_names(&package.licences),
            summary: None,
            cpe: package.cpe.clone(),
            depends_on: Vec::new(),
        })
    };
    let packages = made.base.system.packages.iter();
    let mut components = packages.map(component).collect::<Result<Vec<SbomComponent>>>()?;
    let packages = &made.base.system.packages;
    let purls: BTreeMap<&str, String> = packages
        .iter()
        .map(|p| p.name.as_str())
        .zip(components.iter().map(SbomComponent::purl))
        .collect();
    for (component, package) in components.iter_mut().zip(packages) {
        component.depends_on =
            package.needs.iter().filter_map(|name| purls.get(name.as_str()).cloned()).collect();
    }
    if let (Some(wheels), Some(api)) = (&made.wheels, &build.plan.api)
        && let Ok(lock) = crate::wheel::WheelLock::load(&build.root.join(&api.lock))
    {
        components.extend(sbom::wheel_components(wheels, &lock));
    }
    if let Some(agent) = &made.agent {
        components.extend(agent.components.iter().cloned());
    }
    Ok(components)
}

/// Debian's licence names are not SPDX identifiers, so they stay text.
fn license_from_names(names: &[String]) -> Option<License> {
    (!names.is_empty()).then(|| License::Text(names.join(", ")))
}

/// What a finished build has to say.
#[derive(Debug)]
pub struct BuildSummary {
    /// The report, as it is written to `report.json`.
    pub report: BuildReport,
    /// The page `report.html`.
    pub page: ReportOutput,
}

/// Writes `report.json` and `report.html`.
///
/// # Errors
/// When one cannot be written.
pub fn write_report(build: &BuildContext<'_>, report: BuildReport) -> Result<BuildSummary> {
    let json = report.to_json()?;
    let html_path = build.dist.join("report.html");
    let html = report::render_html(&report)?;
    write_atomically(&build.dist.join("report.json"), |out| Ok(out.write_all(json.as_bytes())?))?;
    write_atomically(&html_path, |out| Ok(out.write_all(html.as_bytes())?))?;
    let shown_path = html_path.strip_prefix(build.root).unwrap_or(&html_path);
    let page = ReportOutput {
        name: "report".to_owned(),
        path: shown_path.to_string(),
        size: html.len() as u64,
        on_disk_size: html.len() as u64,
        sha256: None,
    };
    Ok(BuildSummary { report, page })
}
