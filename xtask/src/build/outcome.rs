//! What a build says at its end: the report in its three forms, and the bill of materials.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::{Build, Made, Signing};
use crate::artifact::write_atomically;
use crate::cli::Format;
use crate::config::product::{Engine, Kind};
use crate::disk::layout::{GPT_HEAD_SECTORS, GPT_TAIL_SECTORS, SECTOR, TableKind};
use crate::report::{self, Disk, Output, PathSize, Region, RegionKind, Report};
use crate::sbom::{self, Component, Meta, Origin};
use crate::wheel::metadata::License;

/// Collects the report.
///
/// # Errors
/// When an output cannot be looked at.
pub fn report(
    build: &Build<'_>,
    made: &Made,
    signing: &Signing,
    elapsed: Duration,
) -> Result<Report> {
    let plan = build.plan;
    let components = components(build, made);
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
        warnings: system.and_then(|s| s.warning.clone()).into_iter().collect(),
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

fn kind(kind: Kind) -> report::Kind {
    match kind {
        Kind::Development => report::Kind::Development,
        Kind::Release => report::Kind::Release,
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
    if let Some(product) = &build.options.target.product {
        options.push_str(&format!(" --product {product}"));
    }
    if let Some(board) = &build.options.target.board {
        options.push_str(&format!(" --board {board}"));
    }
    let mut next = Vec::new();
    if plan.board.qemu.is_some() {
        next.push(format!("cargo xtask run{options}"));
    }
    let mut flash = "cargo xtask flash".to_owned();
    if let Some(product) = &build.options.target.product {
        flash.push_str(&format!(" {product}"));
    }
    if let Some(board) = &build.options.target.board {
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
    let metadata = std::fs::metadata(path).with_context(|| format!("looking at {path}"))?;
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
    for (i, state) in layout.states.iter().enumerate() {
        let role = format!("boot state {}", i + 1);
        regions.push(region(RegionKind::BootState, &role, state.offset, SECTOR));
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

fn components(build: &Build<'_>, made: &Made) -> Vec<Component> {
    let mut components: Vec<Component> = made
        .base
        .system
        .packages
        .iter()
        .map(|package| Component {
            name: package.name.clone(),
            version: package.version.clone(),
            origin: match build.plan.rootfs.engine {
                Engine::Debian => Origin::Debian {
                    arch: package.arch.clone(),
                    release: build.plan.rootfs.suite.clone(),
                },
                Engine::Buildroot => Origin::Generic,
            },
            sha256: Some(package.sha256.clone()).filter(|sum| sum.len() == 64),
            license: license(&package.licences),
            summary: None,
            cpe: package.cpe.clone(),
            depends_on: Vec::new(),
        })
        .collect();
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
    components
}

/// Debian names licences in words of its own, so they stay text.
fn license(names: &[String]) -> Option<License> {
    (!names.is_empty()).then(|| License::Text(names.join(", ")))
}

/// Writes `report.json` and `report.html`, and prints the summary.
///
/// # Errors
/// When one cannot be written.
pub fn write(build: &Build<'_>, report: &Report, format: Format) -> Result<()> {
    let json = report.to_json()?;
    let html_path = build.dist.join("report.html");
    let html = report::render_html(report)?;
    write_atomically(&build.dist.join("report.json"), |out| Ok(out.write_all(json.as_bytes())?))?;
    write_atomically(&html_path, |out| Ok(out.write_all(html.as_bytes())?))?;
    let mut out = std::io::stdout().lock();
    match format {
        Format::Json => println!("{json}"),
        Format::Text => {
            let mut shown = report.clone();
            let shown_path = html_path.strip_prefix(build.root).unwrap_or(&html_path);
            shown.outputs.push(Output {
                name: "report".to_owned(),
                path: shown_path.to_string(),
                size: html.len() as u64,
                on_disk_size: html.len() as u64,
                sha256: None,
            });
            let style = report::Style::of(&out);
            report::render_terminal(&shown, &mut out, style).context("printing the report")?;
        }
    }
    Ok(())
}
