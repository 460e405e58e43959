//! Writes a card image and its block map: once, in place and sparse.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;
use uuid::Uuid;

use super::bmap::{self, BlockMap};
use super::copy::{self, ImageRegion, RegionContent};
use super::layout::{BLOCK, PlacedPartition, SECTOR};
use super::pages::SparsePages;
use super::spec::{DiskImage, DiskSpec, PartitionContent};
use super::sums::{ALWAYS_MAPPED, ChecksummedImage};
use super::{fat, table};
use crate::artifact;
use crate::disk::copy::CopyResult;
use crate::progress::{self, ProgressStep, ProgressUnit};

/// Writes the image and, beside it, its block map. The image is the last to get its name and the
/// first to lose it: whenever a build is killed, an image always has its matching map beside it.
///
/// It does not sync the files to the disk, which would take several times as long as everything
/// else: after a power cut on the build machine the block map detects an incomplete image
/// ([`bmap::check_image`]).
///
/// # Errors
/// When an input is missing, something does not fit its partition, or the disk is full; the file
/// under the image's name is the previous one, or nothing.
pub fn assemble(spec: &DiskSpec, out: &Utf8Path) -> Result<DiskImage> {
    assemble_checked(spec, out, |_| Ok(())).map(|(made, ())| made)
}

/// Like [`assemble`], but calls `check` with the finished image before it gets its name, and
/// returns its result.
///
/// # Errors
/// Those of [`assemble`] and of `check`: the file under the image's name is the previous one.
pub fn assemble_checked<T>(
    spec: &DiskSpec,
    out: &Utf8Path,
    check: impl FnOnce(&Utf8Path) -> Result<T>,
) -> Result<(DiskImage, T)> {
    let map_path = bmap::path_for(out);
    if let Some(parent) = out.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
    }
    let temporary = artifact::partial_path(out);
    let attempt = || -> Result<(DiskImage, T)> {
        let (map, written) = write_image(spec, &temporary)?;
        let found = check(&temporary)?;
        // The old image is kept until the new one is complete, and is removed before its map.
        artifact::none_if_missing(std::fs::remove_file(out))
            .with_context(|| format!("removing the old {out}"))?;
        let mapped = map.mapped_blocks() * BLOCK;
        let bmap = map.write(&map_path)?;
        std::fs::rename(&temporary, out).with_context(|| format!("renaming {temporary}"))?;
        let path = out.to_owned();
        Ok((DiskImage { path, size: spec.layout.size, mapped, written, bmap }, found))
    };
    attempt().with_context(|| format!("assembling {out}")).inspect_err(|_| {
        // Best effort: the first error is the one to report.
        drop(std::fs::remove_file(&temporary));
    })
}

fn write_image(spec: &DiskSpec, temporary: &Utf8Path) -> Result<(BlockMap, u64)> {
    let layout = &spec.layout;
    ensure!(
        spec.partitions.len() == layout.partitions.len(),
        "the layout has {} partitions, but contents are given for {}",
        layout.partitions.len(),
        spec.partitions.len()
    );
    let guids: Vec<Uuid> = spec.partitions.iter().map(|p| p.guid).collect();
    let tables = table::make_tables(layout, spec.disk_guid, spec.mbr_signature, &guids)?;
    let logical = table::logical_sectors(layout)?;
    let states = state_sectors(spec)?;
    let volumes = fat_volumes(spec)?;
    let sources = collect_filesystems(spec)?;

    let mut regions = vec![
        ImageRegion { payload: RegionContent::Memory(&tables.head), places: vec![0] },
        ImageRegion {
            payload: RegionContent::Memory(&tables.tail),
            places: vec![tables.tail_offset()],
        },
    ];
    for (state, pages) in layout.states.iter().zip(&states) {
        regions.push(ImageRegion {
            payload: RegionContent::Memory(pages),
            places: vec![state.offset],
        });
    }
    // Flashing a card resets its trust records: nothing is trusted because of its old contents.
    for copy in &layout.trust {
        let blocks = bundle::area::COPY as u64 / BLOCK;
        regions
            .push(ImageRegion { payload: RegionContent::Zeros(blocks), places: vec![copy.offset] });
    }
    for (offset, pages) in &logical {
        regions.push(ImageRegion { payload: RegionContent::Memory(pages), places: vec![*offset] });
    }
    for (placed, pages) in &volumes {
        regions.push(ImageRegion {
            payload: RegionContent::Memory(pages),
            places: vec![placed.offset],
        });
    }
    for (placed, wanted) in layout.partitions.iter().zip(&spec.partitions) {
        if matches!(wanted.content, PartitionContent::Empty) {
            let blocks = placed.size.min(ALWAYS_MAPPED) / BLOCK;
            regions.push(ImageRegion {
                payload: RegionContent::Zeros(blocks),
                places: vec![placed.offset],
            });
        }
    }
    for source in &sources {
        let payload = RegionContent::Image(&source.file, source.summed);
        regions.push(ImageRegion { payload, places: source.places.clone() });
    }
    let total = total_bytes(&regions);
    let step = ProgressStep::new(
        "image",
        temporary.file_stem().unwrap_or("image"),
        total,
        ProgressUnit::Bytes,
    );
    let image = File::create(temporary).with_context(|| format!("creating {temporary}"))?;
    let write = || -> Result<CopyResult> {
        image.set_len(layout.size)?;
        let written = copy::write_regions(&regions, &image, &step)?;
        Ok(written)
    };
    let written = write().map_err(|error| explain_full_disk(error, temporary, total))?;
    let map = BlockMap { image_size: layout.size, block_size: BLOCK, ranges: written.ranges };
    Ok((map, written.bytes))
}

/// Adds help to the error of a full disk.
fn explain_full_disk(error: anyhow::Error, path: &Utf8Path, total: u64) -> anyhow::Error {
    let full = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::StorageFull);
    if !full {
        return error.context(format!("writing {path}"));
    }
    let dir = path.parent().filter(|p| !p.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    let free = artifact::free_space(dir).unwrap_or_default();
    error.context(format!(
        "writing {path}: the disk is full; the image needs up to {}, {} are free in {dir}\n\
         help: free some space there; `cargo xtask clean --dry-run` shows what it would remove",
        progress::format_bytes(total),
        progress::format_bytes(free),
    ))
}

fn total_bytes(regions: &[ImageRegion<'_>]) -> u64 {
    let each = regions.iter().map(|region| {
        let bytes = match &region.payload {
            RegionContent::Memory(pages) => pages.written() * BLOCK,
            RegionContent::Image(file, summed) => allocated_bytes(file).min(summed.size),
            RegionContent::Zeros(_) => 0,
        };
        bytes * region.places.len() as u64
    });
    each.sum()
}

fn allocated_bytes(file: &File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    /// The unit of `st_blocks`, whatever the filesystem's block size.
    const STAT_BLOCK: u64 = 512;
    file.metadata().map_or(0, |m| m.blocks() * STAT_BLOCK)
}

fn state_sectors(spec: &DiskSpec) -> Result<Vec<SparsePages>> {
    let states = &spec.layout.states;
    ensure!(
        spec.states.len() <= states.len(),
        "the layout has {} boot-state sectors, but contents are given for {}",
        states.len(),
        spec.states.len()
    );
    let nothing = Vec::new();
    let contents = spec.states.iter().chain(std::iter::repeat(&nothing));
    let pages = states.iter().zip(contents).map(|(state, content)| {
        let bytes = content.len();
        ensure!(
            bytes as u64 <= SECTOR,
            "the boot state at sector {} has {bytes} bytes, but a sector has {SECTOR}",
            state.sector
        );
        let mut pages = SparsePages::new(BLOCK);
        pages.write_at(0, &[0; BLOCK as usize])?;
        pages.write_at(0, content)?;
        Ok(pages)
    });
    pages.collect()
}

fn fat_volumes(spec: &DiskSpec) -> Result<Vec<(&PlacedPartition, SparsePages)>> {
    let mut volumes = Vec::new();
    for (placed, wanted) in spec.layout.partitions.iter().zip(&spec.partitions) {
        let PartitionContent::Fat { label, volume_id, placed: says_where, files } = &wanted.content
        else {
            continue;
        };
        let pages = fat::make_fat(
            placed,
            label,
            *volume_id,
            *says_where,
            files,
            spec.epoch,
            &wanted.size_key,
        )?;
        volumes.push((placed, pages));
    }
    Ok(volumes)
}

/// A filesystem image and every place where it belongs.
struct PlacedFilesystem<'a> {
    summed: &'a ChecksummedImage,
    file: File,
    places: Vec<u64>,
}

fn collect_filesystems(spec: &DiskSpec) -> Result<Vec<PlacedFilesystem<'_>>> {
    let mut sources: Vec<PlacedFilesystem<'_>> = Vec::new();
    for (placed, wanted) in spec.layout.partitions.iter().zip(&spec.partitions) {
        let PartitionContent::Image(summed) = &wanted.content else { continue };
        let context = || format!("placing {} in `{}`", summed.path, placed.name);
        if summed.size > placed.size {
            bail!(
                "{}: the image has {}, but the partition has {}\nhelp: raise {}",
                context(),
                progress::format_bytes(summed.size),
                progress::format_bytes(placed.size),
                wanted.size_key
            );
        }
        match sources.iter_mut().find(|source| source.summed.path == summed.path) {
            Some(source) => source.places.push(placed.offset),
            None => {
                let file = File::open(&summed.path).with_context(context)?;
                let size = file.metadata().with_context(context)?.len();
                ensure!(
                    size == summed.size,
                    "{}: the image has {size} bytes, but had {} when its checksums were computed",
                    context(),
                    summed.size
                );
                sources.push(PlacedFilesystem { summed, file, places: vec![placed.offset] });
            }
        }
    }
    Ok(sources)
}
