//! A built image of the firmware's boot flow: what would start from it, and what its bundle carries.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use bootmodel::chain::{BootFacts, CardContent, check};
use bootmodel::firmware::{Firmware, PreferredTable, ReadOnlyDisk, RestartFlags, select};
use xtask::start::check_card;

use crate::support::{Folder, built, built_for_the_firmware, root, tool};

#[test]
fn the_firmware_starts_either_slot_of_the_built_image() -> Result<()> {
    let built = built_for_the_firmware()?;
    let disk = File::open(&built.image)?;
    for table in [PreferredTable::Mbr, PreferredTable::Gpt] {
        for (walks, knows_a_b) in [(false, false), (false, true), (true, true)] {
            let firmware = Firmware { generation: 4, table, walks, knows_a_b };
            for (tryboot, role) in [(false, "boot-a"), (true, "boot-b")] {
                let restart = RestartFlags { partition: 0, tryboot };
                let start = select(&disk, firmware, restart).map_err(anyhow::Error::msg)?;
                let number = built.plan.disk.partition(role).context("a boot slot")?.number;
                ensure!(start.partition == number, "{firmware:?}, {restart:?}: {start:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn both_boot_slots_and_the_bundle_hold_the_same_bytes() -> Result<()> {
    let built = built_for_the_firmware()?;
    let disk = File::open(&built.image)?;
    let volume = |role: &str| -> Result<Vec<u8>> {
        let placed = built.plan.disk.partition(role).context("a boot slot")?;
        let mut bytes = vec![0; placed.size as usize];
        disk.read_exact_at(&mut bytes, placed.offset)?;
        Ok(bytes)
    };
    let first = volume("boot-a")?;
    ensure!(first == volume("boot-b")?, "boot-a and boot-b differ");

    // The payload as standard tools read it.
    let folder = Folder::new()?;
    let list = tool("tar").args(["-tf", built.bundle.as_str()]).read()?;
    let frames = list.lines().find(|name| name.contains("boot") && name.ends_with(".zst"));
    let frames = frames.with_context(|| format!("the bundle has no boot payload:\n{list}"))?;
    let (dir, payload) = (folder.at("bundle"), folder.at("boot.vfat"));
    fs::create_dir(&dir)?;
    tool("tar").args(["-xf", built.bundle.as_str(), "-C", dir.as_str(), frames]).run()?;
    let packed = dir.join(frames);
    tool("zstd").args(["-q", "-d", packed.as_str(), "-o", payload.as_str()]).run()?;
    ensure!(first == fs::read(&payload)?, "the bundle's boot payload differs from the slots");
    tool("fsck.fat").args(["-n", payload.as_str()]).run()
}

#[test]
fn every_model_starts_from_the_built_cards() -> Result<()> {
    for board in ["pi3", "pi4-uboot"] {
        let built = built(board)?;
        let starts = check_card(&built.image, Some((&root(), &built.plan)))?;
        ensure!(starts.stops.is_empty(), "{board}:\n{}", starts.stops.join("\n"));
        ensure!(starts.models.len() == built.plan.board.compatible.len(), "{starts:?}");
        for model in &starts.models {
            // What a second slot does again is not said again.
            let runs = model.steps.iter().any(|(_, what)| what.ends_with("runs /init"));
            ensure!(model.starts && runs, "{model:?}");
        }
    }
    Ok(())
}

/// A disk of which some bytes are others.
struct Changed {
    disk: File,
    at: u64,
    bytes: Vec<u8>,
}

impl ReadOnlyDisk for Changed {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.disk.read_exact_at(buffer, offset)?;
        for (place, byte) in (offset..).zip(buffer) {
            if let Some(new) = place.checked_sub(self.at).and_then(|n| self.bytes.get(n as usize)) {
                *byte = *new;
            }
        }
        Ok(())
    }
}

#[test]
fn a_real_card_that_is_changed_is_caught() -> Result<()> {
    let built = built("pi3")?;
    let facts = BootFacts::known().map_err(anyhow::Error::msg)?;
    let placed = built.plan.disk.partition("boot").context("a boot partition")?;
    let mut volume = vec![0; placed.size as usize];
    File::open(&built.image)?.read_exact_at(&mut volume, placed.offset)?;
    for (from, to, rule) in [
        ("\nenable_uart=1", "\ngpu_mem=16\n##", "firmware-file"),
        ("\nenable_uart=1", "\nenabel_uart=1", "config-key"),
        ("\nkernel=u-boot.bin", "\nkernel=u_boot.bin", "kernel-missing"),
        ("VC_BUILD_ID_TIME: Aug 26 2022", "VC_BUILD_ID_TIME: Aug 26 2025", "uboot-pair"),
        ("broadcom/bcm2837-rpi-3-a-plus.dtb", "broadcom/bcm2837-rpi-3-x-plus.dtb", "uboot-model"),
    ] {
        let found = volume.windows(from.len()).position(|part| part == from.as_bytes());
        let at = placed.offset + found.with_context(|| format!("the card has no {from:?}"))? as u64;
        let changed =
            Changed { disk: File::open(&built.image)?, at, bytes: to.as_bytes().to_vec() };
        let card = CardContent::read(Rc::new(changed)).map_err(anyhow::Error::msg)?;
        let verdict = check(&card, &facts);
        let rules: Vec<_> = verdict.stops().map(|finding| finding.rule).collect();
        ensure!(rules.contains(&rule), "{from:?} to {to:?}: {rules:?}, not {rule}");
    }
    Ok(())
}
