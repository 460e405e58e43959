//! The output of a finished build: the report in its three forms, and the bill of materials.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::{Build, Made, Signing};
use crate::artifact::{hash_bytes, write_atomically};
use crate::cache::Key;
use crate::config::product::{BuildKind, Engine};
use crate::disk::layout::{GPT_HEAD_SECTORS, GPT_TAIL_SECTORS, SECTOR, TableKind};
use crate::failure::Failure;
use crate::render::Rendered;
use crate::report::{self, Disk, Output, PathSize, Region, RegionKind, Report};
use crate::rootfs::Package;
use crate::sbom::{self, Component, Meta, Origin};
use crate::time::timestamp;
use crate::wheel::metadata::License;

/// Records which stage failed, and the path of its log.
///
/// # Errors
/// When the note cannot be written.
pub fn write_failure(build: &Build<'_>, error: &anyhow::Error) -> Result<()> {
    let stage = build.running.name();
    let log = build.log(&stage);
    let shown = log.strip_prefix(build.root).unwrap_or(&log).to_string();
    let failure =
        Failure { stage, log: log.is_file().then_some(shown), error: format!("{error:#}") };
    failure.write(&build.dist)
}

/// Collects the report.
///
/// # Errors
/// When an output cannot be read.
pub fn report(
    build: &Build<'_>,
    made: &Made,
    rendered: &Rendered,
    signing: &Signing,
    elapsed: Duration,
) -> Result<Report> {
    let plan = build.plan;
    let components = components(build, made)?;
    let sbom = build.dist.join("sbom.cdx.json");
    let meta = Meta {
        product: plan.product.name.clone(),
        version: plan.product.version.to_string(),
        board: plan.board.name.clone(),
        epoch: plan.epoch,
    };
    sbom::write(&sbom, &components, &meta)?;
    let mut outputs = Vec::new();
    if let Some(card) = &made.card {
        outputs.push(output(build, "image", &card.image, None)?);
        let sha256 = Some(card.bmap.sha256.clone());
        outputs.push(output(build, "block map", &card.bmap.path, sha256)?);
    }
    if let Some(bundle) = &made.bundle {
        outputs.push(output(build, "bundle", &bundle.path, Some(bundle.sha256.clone()))?);
    }
    outputs.push(output(build, "sbom", &sbom, None)?);
    let sized = |list: &[(String, u64)]| {
        list.iter().map(|(path, bytes)| PathSize { path: path.clone(), bytes: *bytes }).collect()
    };
    let system = made.system.as_ref();
    let sizes = system.map(|s| s.sizes.clone()).unwrap_or_default();
    let version = |name: &str| {
        let package = made.base.system.packages.iter().find(|p| p.name == name);
        package.map_or_else(|| made.base.system.kernel_release.clone(), |p| p.version.clone())
    };
    Ok(Report {
        schema: report::SCHEMA,
        product: report::Product {
            name: plan.product.name.clone(),
            title: plan.product.title.clone(),
            version: plan.product.version.to_string(),
            kind: kind(plan.product.kind),
        },
        board: plan.board.name.clone(),
        engine: made.base.system.engine.clone(),
        suite: Some(match &plan.rootfs.buildroot {
            Some(pinned) => pinned.release.clone(),
            None => plan.rootfs.suite.clone(),
        }),
        commit: plan.commit.clone(),
        epoch: plan.epoch,
        started_in: report::StartedIn::of(&build.stages),
        seconds: elapsed.as_secs_f64(),
        stages: build.stages.clone(),
        outputs,
        signed_by: made.bundle.is_some().then(|| report::Signer {
            key_id: signing.signer.key().id.clone(),
            kind: kind(signing.signer.key().kind),
        }),
        disk: made.card.is_some().then(|| disk(build, made)).transpose()?,
        root: system.map(|s| {
            let limit = plan.rootfs.fill_limit;
            report::Root::new(s.used, s.capacity, limit, s.warning.clone())
        }),
        packages: sizes
            .packages
            .iter()
            .map(|(name, bytes)| report::Package {
                name: name.clone(),
                version: version(name),
                installed_bytes: *bytes,
            })
            .collect(),
        wheels: made.wheels.iter().flat_map(|w| &w.distributions).map(wheel).collect(),
        largest_files: sized(&sizes.files),
        directories: sized(&sizes.directories),
        components: parts(build, made, rendered)?,
        starts: made.card.as_ref().map_or(Vec::new(), |card| card.starts.models.clone()),
        warnings: {
            let starts = made.card.iter().map(|card| &card.starts);
            let told = starts.flat_map(|starts| starts.stops.iter().chain(&starts.degrades));
            system.and_then(|s| s.warning.clone()).into_iter().chain(told.cloned()).collect()
        },
        replaced_packages: made
            .base
            .replaced
            .iter()
            .map(|r| report::Replaced {
                name: r.name.clone(),
                old: r.old.clone().unwrap_or_default(),
                new: r.new.clone().unwrap_or_default(),
            })
            .collect(),
        next: if made.card.is_some() { next(build) } else { Vec::new() },
    })
}

/// The parts of the system, each with the digest of its content, without times and paths.
fn parts(build: &Build<'_>, made: &Made, rendered: &Rendered) -> Result<Vec<report::Component>> {
    let plan = build.plan;
    let mut parts = Vec::new();
    let mut add = |name: &str, version: String, digest: String| {
        parts.push(report::Component { name: name.to_owned(), version, digest });
    };
    let short = |digest: &str| digest.get(..12).unwrap_or_default().to_owned();
    let base = &made.base.system;
    let named = |files: &[crate::rootfs::NamedFile]| -> Vec<(String, String)> {
        files.iter().map(|f| (f.path.clone(), f.file.sha256.clone())).collect()
    };
    let loader = base.bootloader.as_ref().map(|file| file.sha256.clone());
    let digest = Key::new("component", 1)
        .with("root", &base.rootfs.sha256)
        .with("kernel", &base.kernel.sha256)
        .with("busybox", &base.initrd_parts.busybox.sha256)
        .with("modules", &base.initrd_parts.modules.sha256)
        .finish();
    let version = match &plan.rootfs.buildroot {
        Some(pinned) => pinned.release.clone(),
        None => format!("{} of {}", plan.rootfs.suite, timestamp(made.base.epoch)),
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
    let digest = Key::new("component", 1)
        .with_json("texts", &texts)?
        .with_json("firmware", &named(&base.firmware))?
        .with_json("device trees", &named(&base.dtbs))?
        .with_json("boot loader", &loader)?
        .finish();
    add("boot", short(&digest), digest);
    if let Some(system) = &made.system {
        let digest = Key::new("component", 1).with_json("root", &system.root.ranges)?.finish();
        add("system", plan.product.version.to_string(), digest);
    }
    Ok(parts)
}

fn kind(kind: BuildKind) -> report::Kind {
    match kind {
        BuildKind::Development => report::Kind::Development,
        BuildKind::Release => report::Kind::Release,
    }
}

fn wheel(installed: &crate::wheel::InstalledDistribution) -> report::Wheel {
    report::Wheel {
        name: installed.name.clone(),
        version: installed.version.clone(),
        bytes: installed.installed_bytes,
    }
}

fn next(build: &Build<'_>) -> Vec<String> {
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

fn output(
    build: &Build<'_>,
    name: &str,
    path: &Utf8Path,
    sha256: Option<String>,
) -> Result<Output> {
    let metadata =
        std::fs::metadata(path).with_context(|| format!("reading the metadata of {path}"))?;
    Ok(Output {
        name: name.to_owned(),
        path: path.strip_prefix(build.root).unwrap_or(path).to_string(),
        size: metadata.len(),
        // st_blocks counts 512-byte units whatever the filesystem's block size (stat(2)).
        on_disk_size: metadata.blocks() * 512,
        sha256,
    })
}

fn disk(build: &Build<'_>, made: &Made) -> Result<Disk> {
    let layout = &build.plan.disk;
    let region = |kind, role: &str, start, size| Region {
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
        TableKind::Mbr => (report::TableKind::Mbr, 1),
        TableKind::Gpt => (report::TableKind::Gpt, GPT_HEAD_SECTORS),
        TableKind::Hybrid => (report::TableKind::GptHybrid, GPT_HEAD_SECTORS),
    };
    regions.push(region(RegionKind::Table, "partition table", 0, head * SECTOR));
    if layout.table.has_gpt() {
        let tail = GPT_TAIL_SECTORS * SECTOR;
        regions.push(region(RegionKind::Table, "backup table", layout.size - tail, tail));
    }
    for record in layout.partitions.iter().filter_map(|placed| placed.record) {
        regions.push(region(RegionKind::Table, "record of a logical partition", record, SECTOR));
    }
    for (i, state) in layout.states.iter().enumerate() {
        let role = format!("boot state {}", i + 1);
        regions.push(region(RegionKind::BootState, &role, state.offset, SECTOR));
    }
    for (i, copy) in layout.trust.iter().enumerate() {
        let length = bundle::area::COPY as u64;
        regions.push(region(RegionKind::Trust, &format!("trust {}", i + 1), copy.offset, length));
    }
    for placed in &layout.partitions {
        let mut partition = region(RegionKind::Partition, &placed.name, placed.offset, placed.size);
        partition.number = Some(placed.number);
        partition.filesystem = serde_json::to_value(placed.filesystem)?.as_str().map(str::to_owned);
        partition.used = made
            .system
            .as_ref()
            .filter(|_| placed.name.starts_with("root-"))
            .map(|system| system.used);
        regions.push(partition);
    }
    Disk::new(table_kind, layout.size, regions)
}

fn components(build: &Build<'_>, made: &Made) -> Result<Vec<Component>> {
    let rootfs = &build.plan.rootfs;
    let component = |package: &Package| -> Result<Component> {
        Ok(Component {
            name: package.name.clone(),
            version: package.version.clone(),
            origin: match rootfs.engine {
                Engine::Debian => sbom::debian_origin(package, &rootfs.suite, &rootfs.sources)?,
                Engine::Buildroot => Origin::Generic,
            },
            sha256: Some(package.sha256.clone()).filter(|sum| sum.len() == 64),
            license: license(&package.licences),
            summary: None,
            cpe: package.cpe.clone(),
            depends_on: Vec::new(),
        })
    };
    let packages = made.base.system.packages.iter();
    let mut components = packages.map(component).collect::<Result<Vec<Component>>>()?;
    let packages = &made.base.system.packages;
    let purls: BTreeMap<&str, String> = packages
        .iter()
        .map(|p| p.name.as_str())
        .zip(components.iter().map(Component::purl))
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
fn license(names: &[String]) -> Option<License> {
    (!names.is_empty()).then(|| License::Text(names.join(", ")))
}

/// What a finished build has to say.
#[derive(Debug)]
pub struct Finished {
    /// The report, as it is written to `report.json`.
    pub report: Report,
    /// The page `report.html`.
    pub page: Output,
}

/// Writes `report.json` and `report.html`.
///
/// # Errors
/// When one cannot be written.
pub fn write(build: &Build<'_>, report: Report) -> Result<Finished> {
    let json = report.to_json()?;
    let html_path = build.dist.join("report.html");
    let html = report::render_html(&report)?;
    write_atomically(&build.dist.join("report.json"), |out| Ok(out.write_all(json.as_bytes())?))?;
    write_atomically(&html_path, |out| Ok(out.write_all(html.as_bytes())?))?;
    let shown_path = html_path.strip_prefix(build.root).unwrap_or(&html_path);
    let page = Output {
        name: "report".to_owned(),
        path: shown_path.to_string(),
        size: html.len() as u64,
        on_disk_size: html.len() as u64,
        sha256: None,
    };
    Ok(Finished { report, page })
}
