//! Flashing a card image to a file and to a loop device, compared with `cp --sparse=always`, `dd`
//! and `bmaptool copy`. The time of each ends when everything is on the disk, and they take turns.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::OFlags;
use xtask::disk::{assemble, compress, sum_image};
use xtask::exec::{self, Tool};
use xtask::flash::card::AlignedMemory;
use xtask::flash::source::ImageSource;
use xtask::flash::{device, write};
use xtask::progress::say;

use crate::disk::{cut_rootfs, disk_spec};
use crate::measure::median;

/// Bytes of a slot, as on the boards.
const SLOT: u64 = 1 << 30;

/// What is measured. `cp` is the reference; `cp` and `dd` write every byte of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FlashContender {
    Cp,
    DdSparse,
    Dd,
    Bmaptool,
    Ours,
    Read,
    OursReadBack,
    Unpack,
    OursUnpacking,
}

const ALL: [FlashContender; 9] = [
    FlashContender::Cp,
    FlashContender::DdSparse,
    FlashContender::Dd,
    FlashContender::Bmaptool,
    FlashContender::Ours,
    FlashContender::Read,
    FlashContender::OursReadBack,
    FlashContender::Unpack,
    FlashContender::OursUnpacking,
];

impl FlashContender {
    fn name(self) -> &'static str {
        match self {
            Self::Cp => "cp --sparse=always",
            Self::DdSparse => "dd conv=sparse",
            Self::Dd => "dd",
            Self::Bmaptool => "bmaptool copy",
            Self::Ours => "ours, --no-read-back",
            Self::Read => "reading what was written",
            Self::OursReadBack => "ours",
            Self::Unpack => "zstd --test",
            Self::OursUnpacking => "ours, .img.zst, --no-read-back",
        }
    }
}

/// The median of one contender on one target.
pub struct FlashRow {
    target: &'static str,
    who: FlashContender,
    seconds: f64,
}

/// Measures, with `repeats` turns for each contender, in a directory on the disk to be measured.
/// Without loop devices only the file is measured.
///
/// # Errors
/// When a contender fails or the directory has less than about 6 GiB of free space.
pub fn run(rootfs: &Utf8Path, folder: &Utf8Path, repeats: usize) -> Result<Vec<FlashRow>> {
    let root = folder.join("root.img");
    cut_rootfs(rootfs, &root, SLOT)?;
    let image = folder.join("card.img");
    let size = assemble(&disk_spec(sum_image(&root)?, SLOT)?, &image)?.size;
    compress::compress_image(&image, 3)?;
    let mut rows = measure(&FlashBench { target: "file", image: &image, size, folder }, repeats)?;
    match device::can_loop() {
        Ok(()) => rows.extend(measure(
            &FlashBench { target: "loop device", image: &image, size, folder },
            repeats,
        )?),
        Err(why) => say("bench", format!("skipping the loop device: {why:#}")),
    }
    Ok(rows)
}

/// The rows as a readable table.
pub fn table(rows: &[FlashRow]) -> String {
    let of = |target: &str, who: FlashContender| {
        rows.iter().find(|r| r.target == target && r.who == who).map_or(f64::NAN, |r| r.seconds)
    };
    let mut text = String::new();
    for row in rows {
        let ratio = match row.who {
            FlashContender::OursUnpacking => {
                let slower = of(row.target, FlashContender::Unpack)
                    .max(of(row.target, FlashContender::Ours));
                format!("{:.2}x the slower of unpacking and writing", row.seconds / slower)
            }
            FlashContender::OursReadBack => {
                let both =
                    of(row.target, FlashContender::Ours) + of(row.target, FlashContender::Read);
                let (cp, both) =
                    (row.seconds / of(row.target, FlashContender::Cp), row.seconds / both);
                format!("{cp:.2}x, {both:.2}x writing and reading one after the other")
            }
            _ => format!("{:.2}x", row.seconds / of(row.target, FlashContender::Cp)),
        };
        text.push_str(&format!(
            "{:<12} {:<31} {:>6.2} s  {ratio}\n",
            row.target,
            row.who.name(),
            row.seconds
        ));
    }
    text
}

struct FlashBench<'a> {
    target: &'static str,
    image: &'a Utf8Path,
    size: u64,
    folder: &'a Utf8Path,
}

fn measure(bench: &FlashBench<'_>, repeats: usize) -> Result<Vec<FlashRow>> {
    let mut times: [Vec<f64>; ALL.len()] = Default::default();
    // The first turn fills the page cache for all contenders and is not measured.
    bench.turn(FlashContender::Cp)?;
    for turn in 0..repeats {
        for contender in 0..ALL.len() {
            let which = (turn + contender) % ALL.len();
            times[which].push(bench.turn(ALL[which])?);
        }
    }
    ALL.into_iter()
        .zip(times)
        .map(|(who, times)| {
            let seconds = median(times).context("no turn")?;
            Ok(FlashRow { target: bench.target, who, seconds })
        })
        .collect()
}

impl FlashBench<'_> {
    /// One turn on a fresh target: its seconds until everything is on the disk.
    fn turn(&self, who: FlashContender) -> Result<f64> {
        let file = self.folder.join("target");
        File::create(&file)?.set_len(self.size)?;
        let attached = self.target != "file";
        let target = if attached {
            let attach = Tool::new("losetup").args(["--find", "--show", file.as_str()]);
            Utf8PathBuf::from(attach.read()?.trim())
        } else {
            file.clone()
        };
        if who == FlashContender::Read {
            self.work(FlashContender::Ours, &target)?;
        }
        Tool::new("sync").run()?;
        let start = Instant::now();
        let result = self.work(who, &target);
        let flushed = Tool::new("sync").arg(target.as_str()).run();
        let seconds = start.elapsed().as_secs_f64();
        if attached {
            Tool::new("losetup").args(["--detach", target.as_str()]).run()?;
        }
        std::fs::remove_file(&file).with_context(|| format!("removing {file}"))?;
        result.and(flushed)?;
        Ok(seconds)
    }

    fn work(&self, who: FlashContender, target: &Utf8Path) -> Result<()> {
        let (image, target) = (self.image.as_str(), target.as_str());
        let packed = compress::path_for(self.image);
        let dd = |conv: &str| {
            Tool::new("dd")
                .args([&format!("if={image}"), &format!("of={target}"), "bs=4M"])
                .args([&format!("conv={conv}"), "status=none"])
                .run()
        };
        let ours = |image: &str, more: &[&str]| -> Result<()> {
            let own = Utf8PathBuf::try_from(std::env::current_exe()?)?;
            Tool::new(own).args(["flash", image, target, "--yes"]).args(more).run()
        };
        match who {
            FlashContender::Cp => Tool::new("cp").args(["--sparse=always", image, target]).run(),
            FlashContender::DdSparse => dd("sparse,notrunc"),
            FlashContender::Dd => dd("notrunc"),
            FlashContender::Bmaptool => {
                let program =
                    exec::find_program("bmaptool").context("bmaptool is not installed")?;
                Tool::new(program).args(["copy", image, target]).run()
            }
            FlashContender::Ours => ours(image, &["--no-read-back"]),
            FlashContender::Read => self.read(target.into()),
            FlashContender::OursReadBack => ours(image, &[]),
            // Unpacks everything without writing the output, not even to a pipe.
            FlashContender::Unpack => {
                Tool::new("zstd").args(["--test", "--quiet", packed.as_str()]).run()
            }
            FlashContender::OursUnpacking => ours(packed.as_str(), &["--no-read-back"]),
        }
    }

    /// Reads every mapped byte from the medium itself: the minimum for any verification.
    fn read(&self, target: &Utf8Path) -> Result<()> {
        let direct = i32::try_from(OFlags::DIRECT.bits())?;
        let file = File::options().read(true).custom_flags(direct).open(target)?;
        let mut buffer = AlignedMemory::new(usize::try_from(write::PIECE)?);
        for piece in write::cut_into_pieces(&ImageSource::open(self.image)?) {
            file.read_exact_at(buffer.part(piece.size), piece.offset)?;
        }
        Ok(())
    }
}
