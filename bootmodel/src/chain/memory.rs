//! Stage 8, the script's addresses against the memory of the smallest board of a model.
//!
//! Sources: cmd/booti.c of U-Boot ("kernel_comp_addr_r is outside of DRAM range!"; a packed kernel is unpacked there
//! and moved back to where it was loaded); the GPU's share is taken from the top of the first GiB; `gpu_mem_512` and similar keys
//! take precedence over `gpu_mem`, and `total_mem` (128 MiB or more) reduces the memory (memory.adoc); the
//! kernel's requirements: Documentation/arch/arm64/booting.rst.

use super::system::BootSystem;
use super::{Boot, CardLocation, Run};

/// What U-Boot uses at the top of its memory: its code, heap, stack and copies of trees. The largest heap in a
/// Raspberry Pi configuration is 32 MiB (CONFIG_SYS_MALLOC_LEN), and the rest is below 8 MiB.
const UBOOT_AT_TOP: u64 = 40 << 20;
/// How far a tree grows when U-Boot completes it (CONFIG_SYS_FDT_PAD and the command line).
const TREE_GROWS: u64 = 16 << 10;

struct Area {
    what: String,
    start: u64,
    size: u64,
}

impl Area {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

pub(super) fn check(run: &mut Run<'_>, boot: &Boot<'_>, program: &[u8], system: &BootSystem<'_>) {
    let (Some(script), Ok(parts)) = (system.script, system.parts) else { return };
    let mib = |key: &str| boot.value(key).and_then(|mib| mib.parse::<u64>().ok());
    let ram = run.model.ram.iter().min().map_or(0, |ram| ram.0).min(run.soc.memory_top.0);
    // The firmware allows no less than 128 MiB.
    let told = mib("total_mem").map_or(ram, |mib| mib.clamp(128, 1 << 20) << 20);
    let ram = ram.min(told);
    // The key for this memory size takes precedence over the general one.
    let gpu = mib(&format!("gpu_mem_{}", ram >> 20)).or_else(|| mib("gpu_mem"));
    let gpu = gpu.map(|mib| mib.min(1 << 20) << 20);
    let top = ram.saturating_sub(gpu.unwrap_or(run.soc.gpu_memory.0));
    let usable = top.saturating_sub(UBOOT_AT_TOP);
    let place = CardLocation::file(script.partition, "boot.scr");
    let mut areas = vec![Area {
        what: "U-Boot".to_owned(),
        start: run.soc.u_boot_address.0,
        size: program.len() as u64,
    }];
    for load in &script.loads {
        let size = match load.path.as_str() {
            path if path.contains("vmlinuz") => {
                parts.packed.max(parts.in_memory.saturating_add(parts.text_offset))
            }
            path if path.contains("initrd") => parts.initrd_size,
            _ => parts.tree_size + TREE_GROWS,
        };
        areas.push(Area { what: load.path.clone(), start: load.address, size });
    }
    if parts.is_packed {
        let (Some(start), Some(room)) = (script.unpacked_at, script.unpacked_size) else {
            run.stop(
                "memory-unpack",
                place,
                "the kernel is compressed, but the script does not set kernel_comp_addr_r and kernel_comp_size: booti does not start it".to_owned(),
                "set `decompression-address` and `decompression-size` in board.toml".to_owned(),
            );
            return;
        };
        if room < parts.packed {
            run.stop(
                "memory-unpack",
                place.clone(),
                format!(
                    "kernel_comp_size is {room:#x}, but the compressed kernel has {:#x} bytes",
                    parts.packed
                ),
                "set a larger `decompression-size` in board.toml".to_owned(),
            );
        }
        areas.push(Area {
            what: "the decompressed kernel".to_owned(),
            start,
            size: parts.unpacked,
        });
    }
    for area in &areas {
        if area.end() > usable {
            run.stop(
                "memory-outside",
                place.clone(),
                format!(
                    "{} is at {:#x} to {:#x}, but the smallest board of this model has {:#x} bytes, and U-Boot itself begins at {usable:#x}",
                    area.what, area.start, area.end(), ram
                ),
                "use lower addresses in [u-boot] of board.toml".to_owned(),
            );
        }
    }
    areas.sort_by_key(|area| area.start);
    for pair in areas.windows(2) {
        if pair[0].end() > pair[1].start {
            run.stop(
                "memory-overlap",
                place.clone(),
                format!(
                    "{} ({:#x} to {:#x}) overlaps {} (at {:#x})",
                    pair[0].what,
                    pair[0].start,
                    pair[0].end(),
                    pair[1].what,
                    pair[1].start
                ),
                "move the addresses in [u-boot] of board.toml apart".to_owned(),
            );
        }
    }
    run.step(
        "U-Boot",
        format!("everything that it loads is below {usable:#x}, the smallest usable memory of this model"),
    );
}
