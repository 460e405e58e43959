//! What the Raspberry Pi's firmware would start from the boards with the flow `tryboot`: their real templates and
//! partition tables, read by `bootmodel::firmware`. The system tests do the same with a built image.

use std::fs::File;

use anyhow::{Context, Result, ensure};
use bootmodel::firmware::{Firmware, PreferredTable, RestartFlags, select};
use camino::Utf8Path;
use uuid::Uuid;
use xtask::disk::{
    DiskSpec, FatFile, FileSource, Filesystem, PartitionContent, PartitionSpec, assemble,
};
use xtask::plan::{BootSourcePlan, Plan};
use xtask::render::render;
use xtask::workspace::{BuildSelection, resolve_plan};

/// The files of a boot partition, with a few bytes for what a build would bring.
fn files(root: &Utf8Path, plan: &Plan, role: &str) -> Result<Vec<FatFile>> {
    let rendered = render(root, plan)?;
    let mut files = Vec::new();
    for file in plan.boot_files.iter().filter(|file| file.partition == role) {
        let built = b"built".to_vec();
        let (path, bytes) = match &file.source {
            BootSourcePlan::Template { .. } => {
                let key = (role.to_owned(), file.path.clone());
                (file.path.clone(), rendered.boot.get(&key).context("rendered")?.clone())
            }
            BootSourcePlan::Firmware => ("start4.elf".to_owned(), built),
            BootSourcePlan::DeviceTrees => ("board.dtb".to_owned(), built),
            _ => (file.path.clone(), built),
        };
        files.push(FatFile { path, source: FileSource::Bytes(bytes) });
    }
    Ok(files)
}

fn check(product: &str, board: &str, generation: u32) -> Result<()> {
    let target =
        BuildSelection { product: Some(product.to_owned()), board: Some(board.to_owned()) };
    let (config, _, plan) = resolve_plan(&target)?;
    let folder = tempfile::tempdir()?;
    let image = Utf8Path::from_path(folder.path()).context("UTF-8")?.join("card.img");
    let mut partitions = Vec::new();
    for (n, placed) in (1u128..).zip(&plan.disk.partitions) {
        let content = match placed.filesystem {
            Filesystem::Vfat => PartitionContent::Fat {
                label: placed.name.clone(),
                volume_id: n as u32,
                placed: placed.name == "boot",
                files: files(&config.root, &plan, &placed.name)?,
            },
            _ => PartitionContent::Empty,
        };
        let (guid, size_key) = (Uuid::from_u128(n), "this test".to_owned());
        partitions.push(PartitionSpec { guid, content, size_key });
    }
    let spec = DiskSpec {
        layout: plan.disk.clone(),
        disk_guid: Uuid::from_u128(0xd15c),
        mbr_signature: 1,
        epoch: 1_700_000_000,
        states: Vec::new(),
        partitions,
    };
    let disk = File::open(assemble(&spec, &image)?.path)?;
    let number = |role: &str| plan.disk.partition(role).map(|placed| placed.number);
    for table in [PreferredTable::Mbr, PreferredTable::Gpt] {
        for walks in [false, true] {
            for knows_a_b in [false, true] {
                let firmware = Firmware { generation, table, walks, knows_a_b };
                for (tryboot, role, slot) in [(false, "boot-a", "a"), (true, "boot-b", "b")] {
                    let restart = RestartFlags { partition: 0, tryboot };
                    let start = select(&disk, firmware, restart).map_err(anyhow::Error::msg)?;
                    let context = format!("{board}, {firmware:?}, {restart:?}: {start:?}");
                    ensure!(Some(start.partition) == number(role), "{context}");
                    ensure!(start.kernel == "kernel8.img", "{context}");
                    ensure!(start.initramfs.as_deref() == Some("initrd.img"), "{context}");
                    // How the initrd learns the slot from the partition's number.
                    let words = start.cmdline.split(' ');
                    let map = words.filter_map(|word| word.strip_prefix("slipway.tryboot=")).next();
                    let root = number(&format!("root-{slot}")).context("a root")?;
                    let pair = format!("{}:{slot}:{root}", start.partition);
                    ensure!(map.is_some_and(|map| map.split(',').any(|p| p == pair)), "{context}");
                    let guarded =
                        start.settings.iter().any(|(k, _)| k == "kernel_watchdog_timeout");
                    ensure!(guarded == tryboot, "{context}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_pi_4_starts_slot_a_and_tries_slot_b() -> Result<()> {
    check("robot", "pi4", 4)
}

#[test]
fn a_pi_5_starts_slot_a_and_tries_slot_b() -> Result<()> {
    check("robot", "pi5", 5)
}
