//! Assembling a card image from finished filesystems, compared with `genimage`, `cp
//! --sparse=always` and a copy of the same extents inside the kernel. Every contender writes the
//! same bytes to the same disk without syncing it, and they take turns.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{SeekFrom, copy_file_range, seek};
use rustix::io::Errno;
use uuid::Uuid;
use xtask::disk::{
    ChecksummedImage, DiskRequest, DiskSpec, FatFile, FileSource, Filesystem, PartitionContent,
    PartitionRequest, PartitionSpec, TableKind, assemble, lay_out_disk, sum_image,
};
use xtask::exec::{self, Tool};
use xtask::progress;

use crate::measure::{MIB, SIZES, median};

/// Bytes of firmware in the boot partition, about the size for a Raspberry Pi.
const FIRMWARE: usize = 24 << 20;
/// Offset of the magic number in an ext4 volume.
const EXT4_MAGIC: u64 = 1024 + 56;

/// The result for one size.
pub struct DiskRow {
    /// Bytes of the rootfs image.
    rootfs: u64,
    /// The disk usage of the finished card image in bytes.
    written: u64,
    /// Median seconds of a copy of the image's extents in the kernel: the reference.
    extent_copy: f64,
    /// Median seconds of `cp --sparse=always`.
    cp: f64,
    /// Median seconds of `genimage`, when it is installed.
    genimage: Option<f64>,
    /// Median seconds of Slipway, including the FAT and the block map.
    ours: f64,
    /// Median seconds for the rootfs's checksums in the block map, which the compose stage does
    /// once on all cores; the others create no block map.
    sum: f64,
}

/// Measures, with `repeats` turns for each contender, in a directory on the disk to be measured.
///
/// # Errors
/// When a contender fails or the directory has less than about 8 GiB of free space.
pub fn run(rootfs: &Utf8Path, folder: &Utf8Path, repeats: usize) -> Result<Vec<DiskRow>> {
    SIZES.iter().map(|&mib| measure(rootfs, folder, mib * MIB, repeats)).collect()
}

/// The rows as a readable table.
pub fn table(rows: &[DiskRow]) -> String {
    let mut text = String::from(
        "rootfs    on disk   extent copy   cp --sparse     genimage        ours            sums\n",
    );
    for row in rows {
        let cell = |seconds: f64| format!("{seconds:.2} s {:.2}x", seconds / row.extent_copy);
        text.push_str(&format!(
            "{:<9} {:<9} {:<13} {:<15} {:<15} {:<15} {:.2} s\n",
            progress::format_bytes(row.rootfs),
            progress::format_bytes(row.written),
            format!("{:.2} s", row.extent_copy),
            cell(row.cp),
            row.genimage.map_or("not installed".to_owned(), cell),
            cell(row.ours),
            row.sum,
        ));
    }
    text
}

fn measure(rootfs: &Utf8Path, folder: &Utf8Path, size: u64, repeats: usize) -> Result<DiskRow> {
    let root = folder.join("root.img");
    cut_rootfs(rootfs, &root, size)?;
    let ours = folder.join("ours.img");
    let spec = disk_spec(sum_image(&root)?, size)?;
    // The first turn fills the page cache for all contenders and creates the source of the copies.
    assemble(&spec, &ours)?;
    let genimage = exec::find_program("genimage");
    if genimage.is_some() {
        prepare_genimage(folder, &ours)?;
    }
    // The first contender changes with each turn: writing to memory that was unused for a while is
    // slower (a virtual machine returns it to its host), and would always affect the same
    // contender.
    let mut times: [Vec<f64>; 5] = Default::default();
    let (copy, again) = (folder.join("copy.img"), folder.join("again.img"));
    for turn in 0..repeats {
        for contender in 0..times.len() {
            let which = (turn + contender) % times.len();
            let seconds = match which {
                0 => time_work(&copy, || copy_extents(&ours, &copy))?,
                1 => time_work(&copy, || {
                    Tool::new("cp").args(["--sparse=always", ours.as_str(), copy.as_str()]).run()
                })?,
                2 => match &genimage {
                    Some(program) => time_work(&folder.join("genimage-out/card.img"), || {
                        run_genimage(program, folder)
                    })?,
                    None => continue,
                },
                3 => time_work(&again, || assemble(&spec, &again).map(drop))?,
                _ => {
                    let start = Instant::now();
                    sum_image(&root)?;
                    start.elapsed().as_secs_f64()
                }
            };
            times[which].push(seconds);
        }
    }
    let [extent_copy, cp, genimage, seconds, sum] = times.map(median);
    Ok(DiskRow {
        rootfs: size,
        written: allocated_bytes(&ours)?,
        extent_copy: extent_copy.context("no turn")?,
        cp: cp.context("no turn")?,
        genimage,
        ours: seconds.context("no turn")?,
        sum: sum.context("no turn")?,
    })
}

/// The time of `work`, which writes `out`. Data of earlier turns is written first, outside of the
/// measured time: else it would slow down the next contender.
fn time_work(out: &Utf8Path, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    Tool::new("sync").run()?;
    let start = Instant::now();
    work()?;
    let time: Duration = start.elapsed();
    std::fs::remove_file(out).with_context(|| format!("removing {out}"))?;
    Ok(time.as_secs_f64())
}

fn allocated_bytes(path: &Utf8Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Makes a rootfs image of this size from a real one: its start, or several copies in a row.
pub fn cut_rootfs(rootfs: &Utf8Path, out: &Utf8Path, size: u64) -> Result<()> {
    let source = File::open(rootfs).with_context(|| format!("opening {rootfs}"))?;
    let whole = source.metadata()?.len();
    let target = File::create(out).with_context(|| format!("creating {out}"))?;
    target.set_len(size)?;
    for start in (0..size).step_by(usize::try_from(whole)?) {
        copy_data_range(&source, &target, start, (size - start).min(whole))?;
    }
    if size < whole {
        // A truncated volume is not a valid filesystem; it is only data.
        target.write_all_at(&[0, 0], EXT4_MAGIC)?;
    }
    Ok(())
}

fn copy_extents(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let source = File::open(from).with_context(|| format!("opening {from}"))?;
    let size = source.metadata()?.len();
    let target = File::create(to).with_context(|| format!("creating {to}"))?;
    target.set_len(size)?;
    copy_data_range(&source, &target, 0, size)
}

/// Copies the data extents of the first `length` bytes to `shift` and beyond, in the kernel.
fn copy_data_range(source: &File, target: &File, shift: u64, length: u64) -> Result<()> {
    let mut at = 0;
    while at < length {
        let start = match seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error).context("looking for data"),
        };
        let end = seek(source, SeekFrom::Hole(start)).context("looking for a hole")?.min(length);
        let (mut from, mut to) = (start, start + shift);
        while from < end {
            let count = usize::try_from(end - from)?;
            let done = copy_file_range(source, Some(&mut from), target, Some(&mut to), count)
                .context("copying in the kernel")?;
            ensure!(done > 0, "the kernel copied nothing at {from}");
        }
        at = end.max(start + 1);
    }
    Ok(())
}

pub fn disk_spec(root: ChecksummedImage, size: u64) -> Result<DiskSpec> {
    let partition = |name: &str, size: u64, filesystem: Filesystem| PartitionRequest {
        name: name.to_owned(),
        size,
        start: None,
        filesystem,
        bootable: false,
        in_mbr: false,
    };
    let layout = lay_out_disk(&DiskRequest {
        table: TableKind::Gpt,
        size: (2 * size + 256 * MIB).next_power_of_two(),
        first_partition: 4 * MIB,
        alignment: 4 * MIB,
        states: vec![MIB, 2 * MIB],
        trust: vec![3 * MIB],
        partitions: vec![
            partition("boot", 64 * MIB, Filesystem::Vfat),
            partition("root-a", size, Filesystem::Ext4),
            partition("root-b", size, Filesystem::Ext4),
            partition("data", 64 * MIB, Filesystem::Ext4),
        ],
    })
    .map_err(|findings| anyhow::anyhow!(findings.join("\n")))?;
    // Nonzero bytes, so that every contender writes all of them.
    let firmware = (0..FIRMWARE).map(|n| (n % 251) as u8 | 1).collect();
    let fat = PartitionContent::Fat {
        label: "BOOT".to_owned(),
        volume_id: 1,
        placed: true,
        files: vec![FatFile { path: "start.elf".to_owned(), source: FileSource::Bytes(firmware) }],
    };
    let image = PartitionContent::Image(root);
    let partitions = [fat, image.clone(), image, PartitionContent::Empty]
        .into_iter()
        .zip(1u128..)
        .map(|(content, n)| PartitionSpec {
            guid: Uuid::from_u128(n),
            content,
            size_key: "the benchmark".to_owned(),
        })
        .collect();
    Ok(DiskSpec {
        layout,
        disk_guid: Uuid::from_u128(9),
        mbr_signature: 9,
        epoch: 1_700_000_000,
        states: Vec::new(),
        partitions,
    })
}

/// Gives genimage a finished FAT volume (ours), so that it only has to copy it.
fn prepare_genimage(folder: &Utf8Path, ours: &Utf8Path) -> Result<()> {
    let input = folder.join("genimage-in");
    for path in [&input, &folder.join("genimage-root")] {
        std::fs::create_dir_all(path).with_context(|| format!("creating {path}"))?;
    }
    let mut boot = vec![0; (64 * MIB) as usize];
    File::open(ours)?.read_exact_at(&mut boot, 4 * MIB)?;
    std::fs::write(input.join("boot.vfat"), &boot)?;
    let link = input.join("root.img");
    if !link.is_symlink() {
        std::os::unix::fs::symlink(std::fs::canonicalize(folder.join("root.img"))?, &link)?;
    }
    let config = r#"image card.img {
    hdimage { partition-table-type = "gpt" align = 4M }
    partition boot { image = "boot.vfat" offset = 4M }
    partition root-a { image = "root.img" }
    partition root-b { image = "root.img" }
    partition data { size = 64M }
}
"#;
    let mut file = File::create(folder.join("genimage.cfg"))?;
    Ok(file.write_all(config.as_bytes())?)
}

fn run_genimage(program: &Utf8Path, folder: &Utf8Path) -> Result<()> {
    let at = |name: &str| Utf8PathBuf::from(folder).join(name).into_string();
    Tool::new(program)
        .args(["--config", &at("genimage.cfg"), "--inputpath", &at("genimage-in")])
        .args(["--outputpath", &at("genimage-out"), "--tmppath", &at("genimage-tmp")])
        .args(["--rootpath", &at("genimage-root")])
        .run()
}
