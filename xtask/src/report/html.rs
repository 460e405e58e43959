//! The report as one self-contained HTML file. All numbers and drawings are computed here, so the
//! page reads the same without scripts; the template only arranges them.

use anyhow::{Context, Result};
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde::Serialize;

use super::disk_map::{self, shorten_text};
use super::treemap::{Rect, squarify};
use super::{
    BuildReport, PathSize, ReportDisk, ReportOutput, ReportPackage, ReportWheel, count_noun,
    format_seconds,
};
use crate::progress::format_bytes;
use crate::report::disk_map::DiskMap;
use crate::report::{ReportRegion, ReportStage};
use crate::time::civil_date;

/// The name ends in `.html.j2`: this enables escaping.
const TEMPLATE: &str = "report.html.j2";

/// The widths of the drawings: for wide windows and print, and for phones. The page shows one of
/// the two, so that the text keeps its size.
const WIDTHS: [(&str, f64, f64); 2] = [("wide", 1120.0, 460.0), ("narrow", 400.0, 520.0)];

/// The assumed width of a character in a tile's (bold) label.
const CHAR_WIDTH: f64 = 7.7;

/// Tiles with a smaller area than this are drawn as one.
const MIN_TILE: f64 = 220.0;

/// How many rows the tables of files and directories show.
const MOST_ROWS: usize = 25;

/// Renders the page. The same report gives the same bytes.
///
/// # Errors
/// Only when the built-in template has a mistake.
pub fn render_html(report: &BuildReport) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.add_filter("bytes", format_bytes);
    environment.add_filter("time", format_seconds);
    environment.add_filter("px", |n: f64| format!("{n:.2}"));
    environment
        .add_template(TEMPLATE, include_str!("report.html.j2"))
        .context("reading the report's template")?;
    let template = environment.get_template(TEMPLATE).context("reading the report's template")?;
    let page = Page {
        report,
        kind: report.product.kind.title(),
        made: format_date(report.epoch),
        image: report.output("image"),
        bundle: report.output("bundle"),
        cached: report.stages.iter().filter(|stage| stage.cached).count(),
        table: report.disk.as_ref().map(|disk| disk.table_kind.title()),
        maps: report.disk.as_ref().map(maps),
        rows: report.disk.as_ref().map(disk_rows),
        stages: stages(report),
        treemaps: treemaps(report),
        files: bars(&report.largest_files),
        folders: bars(&report.directories),
        packages: largest_first(&report.packages, |p| (p.installed_bytes, p.name.clone())),
        packages_total: report.packages.iter().map(|p| p.installed_bytes).sum(),
        packages_count: count_noun(report.packages.len(), "package"),
        wheels: largest_first(&report.wheels, |w| (w.bytes, w.name.clone())),
        wheels_total: report.wheels.iter().map(|w| w.bytes).sum(),
        wheels_count: count_noun(report.wheels.len(), "wheel"),
        warnings: warnings(report),
        outputs: report.outputs.iter().filter(|output| output.name != "report").collect(),
    };
    template.render(Serde(page)).context("rendering the report's template")
}

/// The variables of the template.
#[derive(Serialize)]
struct Page<'a> {
    report: &'a BuildReport,
    kind: &'static str,
    made: String,
    image: Option<&'a ReportOutput>,
    bundle: Option<&'a ReportOutput>,
    cached: usize,
    table: Option<&'static str>,
    maps: Option<Vec<(&'static str, DiskMap)>>,
    rows: Option<Vec<RegionRow<'a>>>,
    stages: Vec<StageRow<'a>>,
    treemaps: Vec<Treemap>,
    files: Vec<Bar<'a>>,
    folders: Vec<Bar<'a>>,
    packages: Vec<&'a ReportPackage>,
    packages_total: u64,
    packages_count: String,
    wheels: Vec<&'a ReportWheel>,
    wheels_total: u64,
    wheels_count: String,
    warnings: Vec<Warning<'a>>,
    /// Without the report itself: the page cannot contain its own size or hash.
    outputs: Vec<&'a ReportOutput>,
}

#[derive(Serialize)]
struct Warning<'a> {
    text: String,
    help: Option<&'a str>,
}

/// The warnings, each once; a line that starts with `help: ` is separate.
fn warnings(report: &BuildReport) -> Vec<Warning<'_>> {
    let root = report.root.as_ref().and_then(|root| root.warning.as_ref());
    let root = root.filter(|warning| !report.warnings.contains(warning));
    let all = report.warnings.iter().chain(root);
    all.map(|warning| match warning.split_once("\nhelp: ") {
        Some((text, help)) => Warning { text: text.to_owned(), help: Some(help) },
        None => Warning { text: warning.clone(), help: None },
    })
    .collect()
}

fn maps(disk: &ReportDisk) -> Vec<(&'static str, DiskMap)> {
    WIDTHS.iter().map(|(name, width, _)| (*name, disk_map::draw_map(disk, *width))).collect()
}

#[derive(Serialize)]
struct RegionRow<'a> {
    region: &'a ReportRegion,
    class: &'static str,
}

fn disk_rows(disk: &ReportDisk) -> Vec<RegionRow<'_>> {
    disk.regions
        .iter()
        .map(|region| RegionRow { region, class: disk_map::css_class(region) })
        .collect()
}

#[derive(Serialize)]
struct StageRow<'a> {
    stage: &'a ReportStage,
    percent: String,
}

fn stages(report: &BuildReport) -> Vec<StageRow<'_>> {
    let longest = report.stages.iter().map(|stage| stage.seconds).fold(0.0, f64::max);
    let row = |stage| StageRow { stage, percent: css_percent(stage_seconds(stage), longest) };
    report.stages.iter().map(row).collect()
}

fn stage_seconds(stage: &ReportStage) -> f64 {
    if stage.seconds.is_finite() { stage.seconds.max(0.0) } else { 0.0 }
}

/// `part` of `whole` as a CSS percentage without the sign.
fn css_percent(part: f64, whole: f64) -> String {
    let share = if whole > 0.0 { part / whole * 100.0 } else { 0.0 };
    format!("{:.2}", share.clamp(0.0, 100.0))
}

#[derive(Serialize)]
struct Bar<'a> {
    path: &'a str,
    bytes: u64,
    percent: String,
}

/// The largest, with bars relative to the very largest.
fn bars(sizes: &[PathSize]) -> Vec<Bar<'_>> {
    let sizes = largest_first(sizes, |size| (size.bytes, size.path.clone()));
    let largest = sizes.first().map_or(0, |size| size.bytes) as f64;
    let bar = |size: &&'_ PathSize| css_percent(size.bytes as f64, largest);
    sizes
        .iter()
        .take(MOST_ROWS)
        .map(|size| Bar { path: &size.path, bytes: size.bytes, percent: bar(size) })
        .collect()
}

/// Largest first, then by name.
fn largest_first<T>(items: &[T], key: impl Fn(&T) -> (u64, String)) -> Vec<&T> {
    let mut items: Vec<&T> = items.iter().collect();
    items.sort_by_cached_key(|item| {
        let (size, name) = key(item);
        (std::cmp::Reverse(size), name)
    });
    items
}

#[derive(Serialize)]
struct Treemap {
    name: &'static str,
    width: f64,
    height: f64,
    tiles: Vec<Tile>,
}

#[derive(Serialize)]
struct Tile {
    rect: Rect,
    class: &'static str,
    label: String,
    detail: String,
    title: String,
}

/// The subject of a tile.
struct Item {
    name: String,
    title: String,
    size: u64,
}

fn treemaps(report: &BuildReport) -> Vec<Treemap> {
    let packages = report.packages.iter().map(|package| Item {
        name: package.name.clone(),
        title: format!(
            "{} {}: {}",
            package.name,
            package.version,
            format_bytes(package.installed_bytes)
        ),
        size: package.installed_bytes,
    });
    let wheels = report.wheels.iter().map(|wheel| Item {
        name: wheel.name.clone(),
        title: format!("{} {}: {}", wheel.name, wheel.version, format_bytes(wheel.bytes)),
        size: wheel.bytes,
    });
    let groups = [("package", packages.collect::<Vec<_>>()), ("wheel", wheels.collect())];
    let total: u64 = groups.iter().flat_map(|(_, items)| items).map(|item| item.size).sum();
    if total == 0 {
        return Vec::new();
    }
    let draw = |&(name, width, height): &(&'static str, f64, f64)| {
        let area = Rect { x: 0.0, y: 0.0, width, height };
        let mut groups: Vec<(&'static str, u64, &[Item])> = groups
            .iter()
            .map(|(class, items)| (*class, items.iter().map(|i| i.size).sum(), items.as_slice()))
            .filter(|(_, size, _)| *size > 0)
            .collect();
        groups.sort_by_key(|(_, size, _)| std::cmp::Reverse(*size));
        let sizes: Vec<u64> = groups.iter().map(|(_, size, _)| *size).collect();
        let areas = squarify(&sizes, area);
        let smallest = (total as f64 * MIN_TILE / area.area()) as u64;
        let tiles = groups
            .iter()
            .zip(areas)
            .flat_map(|((class, _, items), area)| tiles(class, items, area, smallest))
            .collect();
        Treemap { name, width, height, tiles }
    };
    WIDTHS.iter().map(draw).collect()
}

/// The tiles of one group; what is smaller than `smallest` becomes one tile.
fn tiles(class: &'static str, items: &[Item], area: Rect, smallest: u64) -> Vec<Tile> {
    let (large, small): (Vec<&Item>, Vec<&Item>) =
        items.iter().filter(|item| item.size > 0).partition(|item| item.size >= smallest);
    let mut shown: Vec<(u64, String, String)> =
        large.iter().map(|item| (item.size, item.name.clone(), item.title.clone())).collect();
    match small.as_slice() {
        [] => {}
        [one] => shown.push((one.size, one.name.clone(), one.title.clone())),
        many => {
            let size = many.iter().map(|item| item.size).sum();
            let name = format!("{} smaller", many.len());
            let title = format!(
                "{}: {}",
                count_noun(many.len(), &format!("smaller {class}")),
                format_bytes(size)
            );
            shown.push((size, name, title));
        }
    }
    shown.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let sizes: Vec<u64> = shown.iter().map(|(size, ..)| *size).collect();
    let tile = |(rect, (size, name, title)): (Rect, (u64, String, String))| {
        let room = ((rect.width - 14.0) / CHAR_WIDTH).max(0.0) as usize;
        let fits = rect.height >= 22.0 && (room >= name.chars().count() || room >= 6);
        let label = if fits { shorten_text(&name, room) } else { String::new() };
        let size = format_bytes(size);
        let detail_fits = fits && rect.height >= 40.0 && room >= size.len();
        let detail = if detail_fits { size } else { String::new() };
        Tile { rect, class, label, detail, title }
    };
    squarify(&sizes, area).into_iter().zip(shown).map(tile).collect()
}

/// Seconds since 1970 as `2026-11-05 00:00 UTC`.
fn format_date(epoch: u64) -> String {
    let ((year, month, day), seconds) = (civil_date(epoch / 86_400), epoch % 86_400);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(format_date(0), "1970-01-01 00:00 UTC");
        assert_eq!(format_date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(format_date(1_735_689_599), "2024-12-31 23:59 UTC");
        assert_eq!(format_date(4_107_542_400), "2100-03-01 00:00 UTC");
    }
}
