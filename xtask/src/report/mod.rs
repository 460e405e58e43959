//! `BuildReport`: the results of one build as a value. It renders to the terminal, to JSON and to a
//! self-contained HTML page; nothing here reads the disk, the clock or the environment.

mod disk_map;
mod html;
mod terminal;
mod treemap;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

pub use crate::store::format::ReleaseComponent;
pub use html::render_html;
pub use terminal::{TerminalStyle, render_terminal};

/// The version of the JSON form. It is raised when a field changes its meaning or is removed; a new
/// field alone does not raise it.
pub const SCHEMA: u32 = 1;

/// The complete information about one build, for readers and for programs that read `report.json`.
///
/// Sizes are bytes, times are seconds. The lists keep the order that they are given in, except that
/// the renderers sort what they show by size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BuildReport {
    /// The version of this form: [`SCHEMA`].
    pub schema: u32,
    /// What was built.
    pub product: ReportProduct,
    /// The board that it was built for.
    pub board: String,
    /// The engine that made the base system.
    pub engine: String,
    /// The distribution or release that the engine used, such as `bookworm`.
    pub suite: Option<String>,
    /// The full commit of the product's sources; `None` outside of a repository.
    pub commit: Option<String>,
    /// The time in every output: seconds since 1970, UTC.
    pub epoch: u64,
    /// Whether earlier results were used.
    pub started_in: CacheUse,
    /// How long the whole build took, by the wall clock.
    pub seconds: f64,
    /// The stages in the order in which they ran.
    pub stages: Vec<ReportStage>,
    /// The files that the build writes to `dist/`.
    pub outputs: Vec<ReportOutput>,
    /// The key that signed the bundle; `None` without a bundle.
    pub signed_by: Option<ReportSigner>,
    /// The card image's layout; `None` when the build stopped before it.
    pub disk: Option<ReportDisk>,
    /// How full the root filesystem is; `None` when the build stopped before it.
    pub root: Option<ReportRoot>,
    /// The distribution's packages in the root filesystem.
    pub packages: Vec<ReportPackage>,
    /// The Python wheels in the root filesystem.
    pub wheels: Vec<ReportWheel>,
    /// The largest files of the root filesystem.
    pub largest_files: Vec<PathSize>,
    /// Directories of the root filesystem with everything below them; they may nest.
    pub directories: Vec<PathSize>,
    /// The components of the system, each with the digest of its content; empty when the build
    /// stopped before.
    #[serde(default)]
    pub components: Vec<ReleaseComponent>,
    /// How each model of the board boots, from its boot ROM to `/init`; empty when the build
    /// stopped before the card.
    #[serde(default)]
    pub starts: Vec<crate::start::ModelBoot>,
    /// Warnings for the user. Sentences, most important first.
    pub warnings: Vec<String>,
    /// Locked packages that the mirror no longer had, and their replacements.
    pub replaced_packages: Vec<ReportReplacement>,
    /// Useful next commands.
    pub next: Vec<String>,
}

/// The product that was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportProduct {
    /// The short name, as in file names.
    pub name: String,
    /// The human-readable name.
    pub title: String,
    /// The version.
    pub version: String,
    /// Development or release.
    pub kind: ReportKind,
}

/// Whether a product or a key is for development or for release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReportKind {
    /// For developers: may be signed with the development key, may have accounts without a
    /// password.
    Development,
    /// For robots in the field.
    Release,
}

/// Whether a build used earlier results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheUse {
    /// Every stage was built.
    Clean,
    /// At least one stage used an earlier result.
    Cached,
}

impl CacheUse {
    /// Derives the value from the stages.
    pub fn from_stages(stages: &[ReportStage]) -> Self {
        if stages.iter().any(|stage| stage.cached) { Self::Cached } else { Self::Clean }
    }
}

/// One stage of the build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportStage {
    /// The stage's name.
    pub name: String,
    /// How long it took.
    pub seconds: f64,
    /// Whether it used an earlier result.
    pub cached: bool,
    /// A short summary of the result; may be empty.
    pub note: String,
}

/// One file that the build created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportOutput {
    /// Its kind: `image`, `bmap`, `bundle`, `sbom`, …
    pub name: String,
    /// Its path, relative to the directory in which the build was started.
    pub path: String,
    /// Its length; holes count.
    pub size: u64,
    /// What it occupies on the disk of the machine that built it; less than `size` when sparse.
    pub on_disk_size: u64,
    /// SHA-256 of its content, lower-case hexadecimal, if it was computed.
    pub sha256: Option<String>,
}

/// The key that signed the bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportSigner {
    /// The key's id, as `minisign` prints it.
    pub key_id: String,
    /// Which kind of key it is.
    pub kind: ReportKind,
}

/// How partitions are recorded on the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReportTableKind {
    /// A master boot record.
    Mbr,
    /// A GUID partition table.
    Gpt,
    /// A GUID partition table with a master boot record that also lists partitions.
    GptHybrid,
}

impl ReportTableKind {
    /// The human-readable name.
    pub fn title(self) -> &'static str {
        match self {
            Self::Mbr => "MBR",
            Self::Gpt => "GPT",
            Self::GptHybrid => "GPT with hybrid MBR",
        }
    }
}

/// The card image from its first byte to its last. Created with [`ReportDisk::new`]: its regions are
/// sorted, do not overlap and cover the whole card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportDisk {
    /// The kind of partition table.
    pub table_kind: ReportTableKind,
    /// The image's length.
    pub size: u64,
    /// The regions.
    pub regions: Vec<ReportRegion>,
}

/// The use of a region of the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReportRegionKind {
    /// A partition.
    Partition,
    /// A partition table or its backup.
    Table,
    /// One copy of the boot state, in raw sectors outside of every partition.
    BootState,
    /// One copy of the trust record, also in raw sectors.
    Trust,
    /// Unused.
    Gap,
}

/// A range of bytes of the card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportRegion {
    /// Its use.
    pub kind: ReportRegionKind,
    /// A partition's number, from 1.
    pub number: Option<u32>,
    /// A partition's role, such as `root-a`; for other regions, their name.
    pub role: String,
    /// Its offset from the start of the card.
    pub start: u64,
    /// Its length.
    pub size: u64,
    /// The filesystem in it.
    pub filesystem: Option<String>,
    /// How much of the filesystem is in use, if known.
    pub used: Option<u64>,
}

impl ReportRegion {
    /// Where it ends: the first byte after it.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

impl ReportDisk {
    /// Sorts the regions and adds regions for the gaps.
    ///
    /// # Errors
    /// When two regions overlap or one reaches beyond the card's end; the message names them.
    pub fn new(
        table_kind: ReportTableKind,
        size: u64,
        mut regions: Vec<ReportRegion>,
    ) -> Result<Self> {
        regions.retain(|region| region.kind != ReportRegionKind::Gap && region.size > 0);
        regions.sort_by_key(|region| (region.start, region.size));
        let mut all: Vec<ReportRegion> = Vec::with_capacity(regions.len() * 2 + 1);
        for region in regions {
            let free_from = all.last().map_or(0, ReportRegion::end);
            if region.start < free_from {
                let before = all.last().map_or("", |region| region.role.as_str());
                bail!(
                    "describing the card: `{}` starts at byte {}, but `{before}` ends at byte {free_from}",
                    region.role,
                    region.start
                );
            }
            if region.end() > size {
                bail!(
                    "describing the card: `{}` ends at byte {}, but the card has {size} bytes",
                    region.role,
                    region.end()
                );
            }
            push_gap(&mut all, free_from, region.start);
            all.push(region);
        }
        let free_from = all.last().map_or(0, ReportRegion::end);
        push_gap(&mut all, free_from, size);
        Ok(Self { table_kind, size, regions: all })
    }
}

fn push_gap(regions: &mut Vec<ReportRegion>, start: u64, end: u64) {
    if start < end {
        regions.push(ReportRegion {
            kind: ReportRegionKind::Gap,
            number: None,
            role: "unused".to_owned(),
            start,
            size: end - start,
            filesystem: None,
            used: None,
        });
    }
}

/// How full the root filesystem is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportRoot {
    /// Bytes in use.
    pub used: u64,
    /// Bytes that the slot holds.
    pub capacity: u64,
    /// `used` in percent of `capacity`, rounded up: 100 means full.
    pub fill_percent: u32,
    /// The product's limit, in percent of `capacity`; a build that exceeds it fails.
    pub limit_percent: u32,
    /// A warning when the limit is near.
    pub warning: Option<String>,
}

impl ReportRoot {
    /// Computes how full the filesystem is.
    pub fn new(used: u64, capacity: u64, limit_percent: u32, warning: Option<String>) -> Self {
        let percent = (u128::from(used) * 100).div_ceil(u128::from(capacity.max(1)));
        let fill_percent = u32::try_from(percent).unwrap_or(u32::MAX);
        Self { used, capacity, fill_percent, limit_percent, warning }
    }
}

/// One package of the distribution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportPackage {
    /// The package's name.
    pub name: String,
    /// The package's version.
    pub version: String,
    /// Its installed size in bytes.
    pub installed_bytes: u64,
}

/// One Python wheel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportWheel {
    /// The project's name.
    pub name: String,
    /// The project's version.
    pub version: String,
    /// Its installed size in bytes.
    pub bytes: u64,
}

/// A path and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PathSize {
    /// The path within the root filesystem, with a leading `/`.
    pub path: String,
    /// Its size; for a directory, of everything under it.
    pub bytes: u64,
}

/// A locked package that was no longer available.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReportReplacement {
    /// The package's name.
    pub name: String,
    /// The version that was locked.
    pub old: String,
    /// The version that was used.
    pub new: String,
}

impl BuildReport {
    /// The report as JSON: indented, in the order of the fields, with a final newline.
    ///
    /// # Errors
    /// When the value cannot be expressed in JSON.
    pub fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self).context("writing the report as JSON")?;
        text.push('\n');
        Ok(text)
    }

    /// Reads a report that [`BuildReport::to_json`] wrote.
    ///
    /// # Errors
    /// When the text is not a report, or has another schema.
    pub fn from_json(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            schema: u32,
        }
        let head: Head = serde_json::from_str(text).context("reading a build report")?;
        if head.schema != SCHEMA {
            bail!(
                "reading a build report: its schema is {}, but this tool reads {SCHEMA}\n\
                 help: use the version of the tool that created the report, or build again",
                head.schema
            );
        }
        serde_json::from_str(text).context("reading a build report")
    }

    /// The output of this name (`image`, `bundle`, …).
    pub fn output(&self, name: &str) -> Option<&ReportOutput> {
        self.outputs.iter().find(|output| output.name == name)
    }
}

impl ReportKind {
    /// The human-readable name.
    pub fn title(self) -> &'static str {
        match self {
            Self::Development => "development",
            Self::Release => "release",
        }
    }
}

/// `1 package`, `2 packages`: a number with its noun.
fn count_noun(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// A time in seconds in human-readable form. An invalid time (negative, not a number) is shown as
/// zero.
fn format_seconds(seconds: f64) -> String {
    let duration = std::time::Duration::try_from_secs_f64(seconds).unwrap_or_default();
    crate::progress::format_duration(duration)
}
