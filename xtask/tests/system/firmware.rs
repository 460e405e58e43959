//! A built image of the firmware's boot flow: what would start from it, and what its bundle carries.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use bootmodel::firmware::{Firmware, Restart, Table, select};

use crate::support::{Folder, built_for_the_firmware, tool};

#[test]
fn the_firmware_starts_either_slot_of_the_built_image() -> Result<()> {
    let built = built_for_the_firmware()?;
    let disk = File::open(&built.image)?;
    for table in [Table::Mbr, Table::Gpt] {
        for (walks, knows_a_b) in [(false, false), (false, true), (true, true)] {
            let firmware = Firmware { generation: 4, table, walks, knows_a_b };
            for (tryboot, role) in [(false, "boot-a"), (true, "boot-b")] {
                let restart = Restart { partition: 0, tryboot };
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
