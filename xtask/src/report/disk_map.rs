//! The geometry of the partition map: every region to scale, tiny ones with a visible minimum, and
//! labels that never overlap. Pure; the template does the drawing.

use std::cmp::Ordering;

use serde::Serialize;

use super::{ReportDisk, ReportRegion, ReportRegionKind};
use crate::progress::format_bytes;

/// The minimum width of a region, so that one sector of a whole card is still visible.
const MIN_WIDTH: f64 = 3.0;

/// The assumed width of a character; generous for a 12-pixel sans-serif face.
const CHAR_WIDTH: f64 = 6.8;

/// Labels whose regions are closer together than this share one leader line.
const SHARED_LEADER: f64 = 8.0;

/// The space between two labels in one row.
const LABEL_GAP: f64 = 14.0;

/// One rectangle of the map.
#[derive(Debug, Serialize)]
pub(super) struct MapBlock {
    /// Where it begins, in the drawing's units.
    pub x: f64,
    /// Its width: to scale, but at least [`MIN_WIDTH`].
    pub width: f64,
    /// The width of the part that is in use.
    pub used: f64,
    /// The style for its role.
    pub class: &'static str,
    /// The text inside; empty when it does not fit.
    pub label: String,
    /// The second line inside; empty when it does not fit.
    pub detail: String,
    /// The tooltip.
    pub title: String,
    /// The exact position, for programs and tests.
    pub start: u64,
    /// The exact size, for programs and tests.
    pub size: u64,
}

/// A label outside of the map, with a line to its region.
#[derive(Debug, Serialize)]
pub(super) struct MapLabel {
    /// The position of its leader line.
    pub anchor: f64,
    /// The position of its text.
    pub x: f64,
    /// Its row below the map, from 0.
    pub row: usize,
    /// Its text.
    pub text: String,
}

/// A mark on the ruler.
#[derive(Debug, Serialize)]
pub(super) struct MapTick {
    pub x: f64,
    pub text: String,
}

/// The whole map at one width.
#[derive(Debug, Serialize)]
pub(super) struct DiskMap {
    pub width: f64,
    pub blocks: Vec<MapBlock>,
    pub labels: Vec<MapLabel>,
    pub rows: usize,
    pub ticks: Vec<MapTick>,
}

/// The style of a region. Roles are fixed nouns: `boot`, `root-a`, `boot-b`, `data`, ….
pub(super) fn css_class(region: &ReportRegion) -> &'static str {
    match region.kind {
        ReportRegionKind::Gap => "gap",
        ReportRegionKind::Table => "table",
        ReportRegionKind::BootState | ReportRegionKind::Trust => "state",
        ReportRegionKind::Partition => match region.role.split('-').next() {
            Some("boot") => "boot",
            Some("root") => "root",
            Some("data") => "data",
            _ => "other",
        },
    }
}

/// Draws the card over this width.
pub(super) fn draw_map(disk: &ReportDisk, width: f64) -> DiskMap {
    let scale = width / disk.size.max(1) as f64;
    let mut blocks = Vec::with_capacity(disk.regions.len());
    let mut outside: Vec<(f64, String)> = Vec::new();
    for region in &disk.regions {
        let block = draw_block(region, scale, width);
        if block.label.is_empty() && region.kind != ReportRegionKind::Gap {
            let anchor = block.x + block.width / 2.0;
            let name = outside_name(region);
            match outside.last_mut() {
                Some((last, text)) if anchor - *last < SHARED_LEADER => {
                    text.push_str(", ");
                    text.push_str(&name);
                }
                _ => outside.push((anchor, name)),
            }
        }
        blocks.push(block);
    }
    // The smallest go last, so that the minimum width of a tiny region is not painted over.
    blocks.sort_by_key(|block| (block.class != "gap", std::cmp::Reverse(block.size)));
    let labels = place_labels(outside, width);
    let rows = labels.iter().map(|label| label.row + 1).max().unwrap_or(0);
    DiskMap { width, blocks, labels, rows, ticks: place_ticks(disk.size, width) }
}

fn outside_name(region: &ReportRegion) -> String {
    match region.kind {
        ReportRegionKind::Partition => format!("{} {}", region.role, format_bytes(region.size)),
        _ => region.role.clone(),
    }
}

fn draw_block(region: &ReportRegion, scale: f64, whole: f64) -> MapBlock {
    let exact = region.size as f64 * scale;
    let width = if region.kind == ReportRegionKind::Gap { exact } else { exact.max(MIN_WIDTH) };
    let x = (region.start as f64 * scale).min(whole - width).max(0.0);
    let share = region.used.unwrap_or(0) as f64 / region.size.max(1) as f64;
    let size = format_bytes(region.size);
    let fits = |text: &str| text.chars().count() as f64 * CHAR_WIDTH + 16.0 <= width;
    let label = if fits(&region.role) { region.role.clone() } else { String::new() };
    let detail = if !label.is_empty() && fits(&size) { size.clone() } else { String::new() };
    let mut title = format!("{}: {size} at {}", region.role, format_bytes(region.start));
    if let Some(filesystem) = &region.filesystem {
        title.push_str(&format!(", {filesystem}"));
    }
    if let Some(used) = region.used {
        title.push_str(&format!(", {} used", format_bytes(used)));
    }
    MapBlock {
        x,
        width,
        used: exact * share.clamp(0.0, 1.0),
        class: css_class(region),
        label,
        detail,
        title,
        start: region.start,
        size: region.size,
    }
}

/// Places labels to the right of their leader lines, from right to left. A label is placed in the
/// first row in which it neither overlaps another label nor covers the leader of one in a deeper
/// row. Only where many labels are at the right edge, and are pushed left over their leaders, a
/// line may cross behind a label.
fn place_labels(outside: Vec<(f64, String)>, width: f64) -> Vec<MapLabel> {
    let mut rows = 0;
    let mut labels: Vec<MapLabel> = Vec::new();
    for (anchor, text) in outside.into_iter().rev() {
        let room = (width / CHAR_WIDTH) as usize;
        let text = shorten_text(&text, room.saturating_sub(2));
        let length = text.chars().count() as f64 * CHAR_WIDTH;
        let x = (anchor + 6.0).min(width - length).max(0.0);
        let end = x + length + LABEL_GAP;
        let free = |row: &usize| {
            labels.iter().all(|other| match other.row.cmp(row) {
                Ordering::Less => true,
                Ordering::Equal => end <= other.x.min(other.anchor),
                Ordering::Greater => end <= other.anchor,
            })
        };
        let row = (0..rows).find(free).unwrap_or(rows);
        rows = rows.max(row + 1);
        labels.push(MapLabel { anchor, x, row, text });
    }
    labels.reverse();
    labels
}

/// At most this many characters; the last is an ellipsis when the text is cut.
pub(super) fn shorten_text(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(room.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// Marks at round sizes, far enough apart for their texts.
fn place_ticks(size: u64, width: f64) -> Vec<MapTick> {
    const APART: f64 = 76.0;
    let most = (width / APART).max(1.0);
    let mut step = 512_u64;
    while size as f64 / step as f64 > most && step < 1 << 62 {
        step *= 2;
    }
    let mark = |n: u64| MapTick { x: n as f64 * width / size.max(1) as f64, text: format_bytes(n) };
    (0..=size / step).map(|n| mark(n * step)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ReportTableKind;

    fn partition(role: &str, start: u64, size: u64) -> ReportRegion {
        ReportRegion {
            kind: ReportRegionKind::Partition,
            number: Some(1),
            role: role.to_owned(),
            start,
            size,
            filesystem: None,
            used: Some(size / 2),
        }
    }

    #[test]
    fn labels_do_not_overlap_and_leaders_cross_no_text() {
        let regions =
            (0..12).map(|n| partition(&format!("partition-{n}"), n * 3000, 512)).collect();
        let disk = ReportDisk::new(ReportTableKind::Gpt, 40_000, regions).unwrap();
        let map = draw_map(&disk, 400.0);
        assert!(map.labels.len() > 5, "{map:?}");
        for a in &map.labels {
            let end = |l: &MapLabel| l.x + l.text.chars().count() as f64 * CHAR_WIDTH;
            assert!(end(a) <= map.width + 0.001, "{a:?} leaves the drawing");
            for b in &map.labels {
                if std::ptr::eq(a, b) {
                    continue;
                }
                assert!(a.row != b.row || end(a) <= b.x || end(b) <= a.x, "{a:?} overlaps {b:?}");
                assert!(
                    b.row <= a.row || b.anchor >= end(a) || b.anchor < a.x || a.x < a.anchor,
                    "the leader of {b:?} crosses {a:?}"
                );
            }
        }
    }

    #[test]
    fn ticks_are_round_and_few() {
        let texts: Vec<String> =
            place_ticks(4 << 30, 1120.0).into_iter().map(|tick| tick.text).collect();
        assert_eq!(texts.first().map(String::as_str), Some("0 B"));
        assert_eq!(texts.last().map(String::as_str), Some("4.0 GiB"));
        assert_eq!(texts.len(), 9, "{texts:?}");
    }
}
