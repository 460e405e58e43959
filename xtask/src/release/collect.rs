//! Collects the parts of a release from `dist/`: every file is verified before it is used.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use bundle::{BuildKind, BundlePolicy, KeySet, Version};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::artifact::{Artifact, hash_file};
use crate::cache::{Cache, CacheKey, StageOrigin};
use crate::config;
use crate::disk::{bmap, compress};
use crate::progress::say;
use crate::report::{BuildReport, ReportKind};
use crate::store::format::{ReleaseBoard, ReleaseObject, UnpackedObject};
use crate::update;
use crate::verify::verify_image;

/// zstd's level for images: there are more downloads than releases.
const LEVEL: i32 = 9;
/// Raised when a change of the compression changes its output.
const COMPRESSED_VERSION: u32 = 1;

/// The verified results of a product.
#[derive(Debug)]
pub struct CollectedBuild {
    /// The product.
    pub product: String,
    /// The product's human-readable name.
    pub title: String,
    /// The version of all boards.
    pub version: Version,
    /// Development or release.
    pub kind: BuildKind,
    /// The commit that was built.
    pub commit: Option<String>,
    /// The time in all outputs.
    pub epoch: u64,
    /// The results for each board, sorted by name.
    pub boards: Vec<ReleaseBoard>,
    /// The path of each object, by SHA-256.
    pub sources: BTreeMap<String, Utf8PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct Compressed {
    artifact: Artifact,
    image_size: u64,
    image_sha256: String,
}

/// The part of `plan.json` that a release needs.
#[derive(Deserialize)]
struct Planned {
    modified: bool,
    #[serde(default)]
    rootfs: PlannedRootfs,
}

#[derive(Default, Deserialize)]
struct PlannedRootfs {
    buildroot: Option<PlannedBuildroot>,
}

#[derive(Deserialize)]
struct PlannedBuildroot {
    #[serde(default)]
    overrides: Vec<PlannedOverride>,
}

#[derive(Deserialize)]
struct PlannedOverride {
    package: String,
}

/// Collects and verifies the results for these boards (empty: all boards of the product).
///
/// # Errors
/// When a result is missing or damaged, the boards were built from different commits or as
/// different versions, or from uncommitted changes.
pub fn collect_builds(
    root: &Utf8Path,
    product: &str,
    boards: &[String],
    keys: &KeySet,
    allow_changes: bool,
) -> Result<CollectedBuild> {
    let configured = config::read_product(root, product)?;
    let mut names: Vec<String> = match boards {
        [] => configured.boards.iter().map(|board| board.value.0.clone()).collect(),
        named => named.to_vec(),
    };
    names.sort();
    names.dedup();
    let mut collected: Option<CollectedBuild> = None;
    for name in &names {
        let dir = root.join("dist").join(product).join(name);
        let part = collect_board(root, &dir, product, name, keys, allow_changes)
            .with_context(|| format!("verifying the results of {product} for {name}"))?;
        match &mut collected {
            None => collected = Some(part),
            Some(all) => {
                ensure!(
                    (&all.version, &all.commit, all.epoch)
                        == (&part.version, &part.commit, part.epoch),
                    "{product} was built for {name} as {} from commit {}, but for {} as {} from {}\n\
                     help: build all boards again from one commit",
                    part.version,
                    part.commit.as_deref().unwrap_or("none"),
                    all.boards.first().map_or("", |b| b.board.as_str()),
                    all.version,
                    all.commit.as_deref().unwrap_or("none")
                );
                all.boards.extend(part.boards);
                all.sources.extend(part.sources);
            }
        }
    }
    collected.with_context(|| format!("the product {product} has no boards"))
}

/// A build's report.
///
/// # Errors
/// When there is none.
pub fn read_report(dir: &Utf8Path, product: &str, board: &str) -> Result<BuildReport> {
    let path = dir.join("report.json");
    let text = fs::read_to_string(&path).with_context(|| {
        format!("reading {path}\nhelp: cargo xtask build-image --product {product} --board {board}")
    })?;
    BuildReport::from_json(&text).with_context(|| format!("reading {path}"))
}

fn collect_board(
    root: &Utf8Path,
    dir: &Utf8Path,
    product: &str,
    board: &str,
    keys: &KeySet,
    allow_changes: bool,
) -> Result<CollectedBuild> {
    let report = read_report(dir, product, board)?;
    ensure!(
        report.product.name == product && report.board == board,
        "{dir}/report.json belongs to {} for {}",
        report.product.name,
        report.board
    );
    let kind = match report.product.kind {
        ReportKind::Development => BuildKind::Development,
        ReportKind::Release => BuildKind::Release,
    };
    let plan = dir.join("plan.json");
    let text = fs::read(&plan).with_context(|| format!("reading {plan}"))?;
    let planned: Planned =
        serde_json::from_slice(&text).with_context(|| format!("reading {plan}"))?;
    ensure!(
        !planned.modified || (allow_changes && kind == BuildKind::Development),
        "built from uncommitted changes; the release would not be reproducible\n\
         help: commit the changes and build again (for a development product: --allow-changes)"
    );
    let custom = planned.rootfs.buildroot.iter().flat_map(|buildroot| &buildroot.overrides);
    let custom: Vec<&str> = custom.map(|source| source.package.as_str()).collect();
    ensure!(
        custom.is_empty(),
        "built from source directories of one machine instead of releases: {}\n\
         help: build again without --override and without [buildroot.override] in \
         slipway.local.toml",
        custom.join(", ")
    );
    let version = Version::parse(&report.product.version).context("reading the version")?;
    let stem = format!("{product}-{version}-{board}");
    let file = |extension: &str| -> Result<Utf8PathBuf> {
        let path = dir.join(format!("{stem}.{extension}"));
        ensure!(
            path.is_file(),
            "{path} does not exist\n\
             help: cargo xtask build-image --product {product} --board {board}"
        );
        Ok(path)
    };
    let (image, bundle) = (file("img")?, file("bundle")?);
    let map = bmap::path_for(&image);
    verify_image(&image)?;
    let policy =
        BundlePolicy { product: Some(product), board: Some(board), floor: None, key_epoch: 0 };
    let verified = update::verify_bundle(&bundle, keys, &policy)?;
    ensure!(
        verified.manifest.version == version,
        "{bundle} has the version {}, expected {version}",
        verified.manifest.version
    );
    let mut sources = BTreeMap::new();
    let mut objects = Vec::new();
    let compressed = compress_once(&image, &Artifact::from_file(&map)?)?;
    let mut add =
        |role: &str, name: String, artifact: Artifact, unpacked: Option<UnpackedObject>| {
            let Artifact { path, size, sha256 } = artifact;
            sources.insert(sha256.clone(), path);
            objects.push(ReleaseObject { role: role.to_owned(), name, size, sha256, unpacked });
        };
    let unpacked = UnpackedObject {
        name: format!("{stem}.img"),
        size: compressed.image_size,
        sha256: compressed.image_sha256,
    };
    add("image", format!("{stem}.img.zst"), compressed.artifact, Some(unpacked));
    add("block-map", format!("{stem}.img.bmap"), Artifact::from_file(map)?, None);
    add("bundle", format!("{stem}.bundle"), Artifact::from_file(bundle)?, None);
    let sbom = dir.join("sbom.cdx.json");
    read_packages(&fs::read(&sbom).with_context(|| format!("reading {sbom}"))?)
        .with_context(|| format!("reading {sbom}"))?;
    add("sbom", format!("{stem}.sbom.cdx.json"), Artifact::from_file(sbom)?, None);
    for output in &report.outputs {
        let Some(expected) = &output.sha256 else { continue };
        let path = root.join(&output.path);
        let found = sources.iter().find(|(_, source)| **source == path);
        if let Some((found, _)) = found.filter(|(found, _)| *found != expected) {
            bail!(
                "{path} has the SHA-256 {found}, but the report has {expected}\nhelp: build again"
            );
        }
    }
    let engine = report.engine.clone();
    let components = report.components.clone();
    let boards = vec![ReleaseBoard { board: board.to_owned(), engine, objects, components }];
    Ok(CollectedBuild {
        product: product.to_owned(),
        title: report.product.title.clone(),
        version,
        kind,
        commit: report.commit.clone(),
        epoch: report.epoch,
        boards,
        sources,
    })
}

/// The image as one zstd file, created once for each image: its block map contains the hashes of
/// all mapped bytes.
fn compress_once(image: &Utf8Path, map: &Artifact) -> Result<Compressed> {
    let key = CacheKey::new("compressed", COMPRESSED_VERSION)
        .with("block map", &map.sha256)
        .with("level", LEVEL.to_string())
        .finish();
    let staged = Cache::locate()?.stage(
        "compressed",
        &key,
        |compressed: &Compressed| vec![compressed.artifact.path.clone()],
        |dir| {
            let artifact = compress::compress_to(image, &dir.join("image.zst"), LEVEL)?;
            let (image_size, image_sha256) = hash_file(image)?;
            Ok(Compressed { artifact, image_size, image_sha256 })
        },
    )?;
    let how = if staged.origin == StageOrigin::Kept { "kept" } else { "compressed" };
    let size = crate::progress::format_bytes(staged.value.artifact.size);
    say("release", format!("{}  {size} ({how})", image.file_name().unwrap_or_default()));
    Ok(staged.value)
}

/// The names and versions in a CycloneDX bill of materials.
///
/// # Errors
/// When it is invalid.
pub fn read_packages(sbom: &[u8]) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Bom {
        bom_format: String,
        components: Vec<Part>,
    }
    #[derive(Deserialize)]
    struct Part {
        name: String,
        #[serde(default)]
        version: String,
    }
    let bom: Bom = serde_json::from_slice(sbom).context("not a bill of materials")?;
    ensure!(
        bom.bom_format == "CycloneDX",
        "the bill of materials has the format {}",
        bom.bom_format
    );
    let mut packages: BTreeMap<String, String> = BTreeMap::new();
    for part in bom.components {
        // A crate may be present in two versions.
        let versions = packages.entry(part.name).or_default();
        if !versions.is_empty() {
            versions.push_str(", ");
        }
        versions.push_str(&part.version);
    }
    Ok(packages)
}
