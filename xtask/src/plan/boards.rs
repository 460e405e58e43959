//! The rules of a board, and its part of the plan: partitions and roles, addresses in the smallest
//! machine's memory, the boot state's place on the card, what only one engine or one kernel can
//! boot.

use super::{BoardPlan, EarlierCardPlan, ListOrigin, cmdline};
use crate::config::board::{
    BoardConfig, BootFileFormat, BootFlowKind, BootSourceConfig, ConsoleConfig, DiskConfig,
    EarlierDiskConfig, MemoryAddress, PartitionConfig,
};
use crate::config::product::{Engine, ProductConfig};
use crate::config::reader::{ConfigFinding, FromToml, Located};
use crate::disk::layout::{self, DiskLayout, DiskRequest, Filesystem, PartitionRequest};

/// Alignment of partitions without a `start` of their own: erase blocks of cards are 4 MiB.
const ALIGNMENT: u64 = 4 << 20;

/// Checks the rules of a board, and of a product on it.
pub(super) fn check_board(
    product: &ProductConfig,
    board: &BoardConfig,
    out: &mut Vec<ConfigFinding>,
) {
    if board.arch.value != "arm64" {
        let message = format!("`arch`: expected \"arm64\", found \"{}\"", board.arch.value);
        out.push(ConfigFinding::new(
            &board.arch.place,
            message,
            "no engine supports another architecture yet",
        ));
    }
    let flow = board.boot_flow.value;
    let needed: &[&str] = match flow {
        BootFlowKind::Uboot => &["boot", "root-a", "root-b", "data"],
        BootFlowKind::Tryboot => &["boot", "boot-a", "boot-b", "root-a", "root-b", "data"],
    };
    let find = |role: &str| board.partitions.iter().find(|p| p.role.value.0 == role);
    for role in needed.iter().filter(|role| find(role).is_none()) {
        let message = format!("the partition `{role}` is missing");
        out.push(ConfigFinding::new(
            &board.boot_flow.place,
            message,
            "add a [[partitions]] table for it",
        ));
    }
    for partition in &board.partitions {
        let role = partition.role.value.0.as_str();
        if !needed.contains(&role) {
            let message = format!("this boot flow has no role `{role}`");
            out.push(ConfigFinding::new(
                &partition.role.place,
                message,
                format!("roles: {}", needed.join(", ")),
            ));
            continue;
        }
        let expected = if role.starts_with("boot") { Filesystem::Vfat } else { Filesystem::Ext4 };
        if partition.filesystem.value != expected {
            let message = format!(
                "`{role}` must be {}",
                if expected == Filesystem::Vfat { "vfat" } else { "ext4" }
            );
            out.push(ConfigFinding::new(&partition.filesystem.place, message, ""));
        }
    }
    for (a, b) in [("root-a", "root-b"), ("boot-a", "boot-b")] {
        if let (Some(first), Some(second)) = (find(a), find(b))
            && first.size.value != second.size.value
        {
            let message = format!(
                "`{a}` has {} and `{b}` {}: both slots must hold the same image",
                layout::exact_size(first.size.value.0),
                layout::exact_size(second.size.value.0)
            );
            out.push(ConfigFinding::new(&second.size.place, message, "give both the same size"));
        }
    }
    if (flow == BootFlowKind::Tryboot) != board.eeprom_since.is_some() {
        let place = board.eeprom_since.as_ref().map_or(&board.boot_flow.place, |s| &s.place);
        let (message, help) = match flow {
            BootFlowKind::Tryboot => (
                "the flow \"tryboot\" needs `eeprom-since`",
                "add the day of the oldest EEPROM release that can try a slot",
            ),
            BootFlowKind::Uboot => (
                "`eeprom-since` has no meaning with the flow \"uboot\"",
                "remove it: only the flow \"tryboot\" depends on the EEPROM's release",
            ),
        };
        out.push(ConfigFinding::new(place, message, help));
    }
    if let (Some(first), false) = (board.disk.trust.first(), board.disk.trust.len() == 2) {
        out.push(ConfigFinding::new(
            &first.place,
            format!("`disk.trust.offsets`: expected 2 copies, found {}", board.disk.trust.len()),
            "two copies are written alternately, so that one of them is always intact",
        ));
    }
    let expected = if flow == BootFlowKind::Uboot { 2 } else { 0 };
    let found = board.disk.boot_state.len();
    if found != expected {
        let place = board.disk.boot_state.first().map_or(&board.boot_flow.place, |s| &s.place);
        let message = format!(
            "`disk.boot-state.offsets`: expected {expected} sectors for this boot flow, found {found}"
        );
        out.push(ConfigFinding::new(
            place,
            message,
            "only the flow \"uboot\" uses a boot state, in two copies",
        ));
    }
    if flow == BootFlowKind::Uboot {
        let script = |s: &BootSourceConfig| {
            matches!(
                s,
                BootSourceConfig::Template { compile: Some(BootFileFormat::BootScript), .. }
            )
        };
        if !board.boot_files.iter().any(|file| script(&file.source)) {
            let message = "the flow \"uboot\" needs a boot script";
            let help = "add a [[boot-files]] table with `compile = \"boot-script\"`";
            out.push(ConfigFinding::new(&board.boot_flow.place, message, help));
        }
    }
    check_kernel(product, board, out);
    cmdline::check_cmdline(board, out);
    check_states(board, out);
    check_memory(board, out);
}

/// Assigns an offset to every partition.
pub(super) fn place_board_partitions(
    disk: &DiskConfig,
    partitions: &[PartitionConfig],
    out: &mut Vec<ConfigFinding>,
) -> Option<DiskLayout> {
    let request = DiskRequest {
        table: disk.table.value,
        size: disk.size.value.0,
        first_partition: disk.first_partition.value.0,
        alignment: ALIGNMENT,
        states: disk.boot_state.iter().map(|s| s.value.0).collect(),
        trust: disk.trust.iter().map(|s| s.value.0).collect(),
        partitions: partitions
            .iter()
            .map(|p| PartitionRequest {
                name: p.role.value.0.clone(),
                size: p.size.value.0,
                start: p.start.as_ref().map(|s| s.value.0),
                filesystem: p.filesystem.value,
                bootable: p.bootable,
                in_mbr: p.hybrid_mbr,
            })
            .collect(),
    };
    match layout::lay_out_disk(&request) {
        Ok(layout) => Some(layout),
        Err(messages) => {
            for message in messages {
                // The place of the finding is that of the first partition that it names.
                let named =
                    |p: &&PartitionConfig| message.contains(&format!("`{}`", p.role.value.0));
                let place =
                    partitions.iter().find(named).map_or(&disk.size.place, |p| &p.size.place);
                out.push(ConfigFinding::new(place, message, ""));
            }
            None
        }
    }
}

/// The board's part of the plan.
pub(super) fn plan_board(
    product: &ProductConfig,
    board: &BoardConfig,
    earlier: Vec<EarlierCardPlan>,
) -> BoardPlan {
    let debian = board.debian.as_ref();
    let buildroot = board.buildroot.as_ref();
    let (firmware, bootloader, machines) = match product.rootfs.engine.value {
        Engine::Debian => (
            debian.map(|d| &d.firmware),
            debian.and_then(|d| d.bootloader.as_ref()),
            debian.map(|d| &d.machines),
        ),
        Engine::Buildroot => (
            buildroot.map(|b| &b.firmware),
            buildroot.and_then(|b| b.bootloader.as_ref()),
            buildroot.map(|b| &b.machines),
        ),
    };
    let own = machines.map(|m| m.compatible.clone()).filter(|own| !own.is_empty());
    let compatible = own.unwrap_or_else(|| board.compatible.clone());
    let mut left_out_revisions = board.left_out_revisions.clone();
    left_out_revisions.extend(machines.iter().flat_map(|m| m.left_out_revisions.clone()));
    let console = choose_console(product, board);
    let kernel = &board.kernel;
    let mut cmdline = plain_values(&kernel.cmdline);
    // The last one is /dev/console.
    cmdline.extend(console.iter().map(|c| format!("console={},{}", c.device, c.baud)));
    // A module's parameter: modprobe reads it from the command line (kernel-parameters.txt).
    let country = product.network.country.iter();
    cmdline.extend(country.map(|code| format!("cfg80211.ieee80211_regdom={code}")));
    let lists = [
        ("kernel.cmdline", &kernel.cmdline),
        ("kernel.device-trees", &kernel.device_trees),
        ("kernel.initrd-modules", &kernel.initrd_modules),
        ("kernel.modules-keep", &kernel.modules_keep),
    ];
    BoardPlan {
        name: board.name.value.0.clone(),
        title: board.title.clone(),
        arch: board.arch.value.clone(),
        boot_flow: board.boot_flow.value,
        disk_bus: board.disk_bus.value,
        compatible,
        eeprom_since: board.eeprom_since.as_ref().map(|day| day.value.0.clone()),
        left_out_revisions,
        console_on_board: console.as_ref().is_some_and(|c| c.device == board.console.device),
        console,
        cmdline,
        device_trees: plain_values(&kernel.device_trees),
        initrd_modules: plain_values(&kernel.initrd_modules),
        modules_keep: plain_values(&kernel.modules_keep),
        firmware: firmware.map(|list| plain_values(list)).unwrap_or_default(),
        bootloader: bootloader.map(|located| located.value.clone()),
        uboot: board.uboot.clone(),
        qemu: board.qemu.clone(),
        earlier_cards: earlier,
        origins: lists.into_iter().flat_map(|(list, values)| list_origins(list, values)).collect(),
    }
}

fn plain_values(list: &[Located<String>]) -> Vec<String> {
    list.iter().map(|located| located.value.clone()).collect()
}

/// The product decides about the device, the board about the speed.
fn choose_console(product: &ProductConfig, board: &BoardConfig) -> Option<ConsoleConfig> {
    let baud = board.console.baud;
    match &product.console {
        None => Some(board.console.clone()),
        Some(own) => own.value.0.clone().map(|device| ConsoleConfig { device, baud }),
    }
}

/// How many of a list's elements are from which file, in order.
fn list_origins(list: &'static str, values: &[Located<String>]) -> Vec<ListOrigin> {
    let mut origins: Vec<ListOrigin> = Vec::new();
    for value in values {
        match origins.iter_mut().find(|origin| origin.file == value.place.file) {
            Some(origin) => origin.count += 1,
            None => origins.push(ListOrigin { list, file: value.place.file.clone(), count: 1 }),
        }
    }
    origins
}

/// The layouts of cards that were flashed earlier. They had the same partitions.
pub(super) fn plan_earlier_cards(
    board: &BoardConfig,
    out: &mut Vec<ConfigFinding>,
) -> Vec<EarlierCardPlan> {
    let mut cards = Vec::new();
    for card in &board.earlier {
        for partition in &board.partitions {
            let role = &partition.role.value.0;
            if !card.partitions.iter().any(|p| p.role.value.0 == *role) {
                let message = format!("`earlier-cards` until {} have no `{role}`", card.until);
                let help = "every card has all roles: define the missing one";
                out.push(ConfigFinding::new(&card.place, message, help));
            }
        }
        if card.disk.boot_state.len() != board.disk.boot_state.len() {
            let message = format!("`earlier-cards` until {} have no boot state", card.until);
            out.push(ConfigFinding::new(
                &card.place,
                message,
                "add [earlier-cards.disk.boot-state]",
            ));
        }
        if card.disk.trust.len() != board.disk.trust.len() {
            let message = format!("`earlier-cards` until {} have no trust area", card.until);
            out.push(ConfigFinding::new(&card.place, message, "add [earlier-cards.disk.trust]"));
        }
        if let Some(disk) = place_board_partitions(&card.disk, &card.partitions, out) {
            if let Some(now) =
                place_board_partitions(&board.disk, &board.partitions, &mut Vec::new())
            {
                check_told_apart(card, &disk, &now, out);
            }
            cards.push(EarlierCardPlan { until: card.until.clone(), disk });
        }
    }
    cards
}

/// A robot recognises the layout of its card by the number and the offset of the slot that it runs
/// from.
fn check_told_apart(
    card: &EarlierDiskConfig,
    earlier: &DiskLayout,
    now: &DiskLayout,
    out: &mut Vec<ConfigFinding>,
) {
    let slots = |layout: &'_ DiskLayout| -> Vec<(u32, u64)> {
        let slots = layout.partitions.iter().filter(|p| p.name.starts_with("root-"));
        slots.map(|p| (p.number, p.offset)).collect()
    };
    let (before, after) = (slots(earlier), slots(now));
    if before.iter().any(|slot| after.contains(slot)) {
        let message = format!(
            "`earlier-cards` until {} have a slot at the same offset as the board",
            card.until
        );
        let help =
            "the robot could not distinguish the cards: move the slots, or remove this table";
        out.push(ConfigFinding::new(&card.place, message, help));
    }
}

/// Some boards need a kernel of their own.
fn check_kernel(product: &ProductConfig, board: &BoardConfig, out: &mut Vec<ConfigFinding>) {
    let Some(debian) = board.debian.as_ref().filter(|d| !d.kernels.is_empty()) else { return };
    let rootfs = &product.rootfs;
    let has = |kernel: &Located<String>| {
        rootfs.unpacked.iter().any(|package| package.value == kernel.value)
    };
    if rootfs.engine.value == Engine::Debian && !debian.kernels.iter().any(has) {
        let names = plain_values(&debian.kernels).join(" or ");
        let message = format!("the board {} needs the kernel {names}", board.name.value.0);
        let help = "name it in `rootfs.unpacked`, and its archive in [[rootfs.sources]]; the board's file says why";
        let place = rootfs.unpacked.first().map_or(&rootfs.engine.place, |p| &p.place);
        out.push(ConfigFinding::new(place, message, help));
    }
}

/// A power cut during a write may destroy neighbouring data in the same erase unit of the card's
/// flash: 4 MiB is common, 8 MiB is the distance that other tools with raw state on cards keep
/// (Mender, rpi-image-gen).
const APART: u64 = 8 << 20;

/// Each copy of the boot state and of the trust record must be alone in its erase unit: without
/// another copy, the partition table or a partition.
fn check_states(board: &BoardConfig, out: &mut Vec<ConfigFinding>) {
    let mut taken = vec![(0, "the partition table".to_owned())];
    let first = (board.disk.first_partition.value.0, "the first partition".to_owned());
    let states = board.disk.boot_state.iter().enumerate().map(|(n, s)| (s, "boot-state", n + 1));
    let trust = board.disk.trust.iter().enumerate().map(|(n, s)| (s, "trust", n + 1));
    for (state, what, number) in states.chain(trust) {
        let here = state.value.0;
        let this = format!("{what} copy {number}");
        let near = taken.iter().chain([&first]);
        for (other, name) in near.filter(|(other, _)| here.abs_diff(*other) < APART) {
            let message = format!(
                "{this} (at {}) is {} away from {name}, expected {} or more",
                layout::exact_size(here),
                layout::exact_size(here.abs_diff(*other)),
                layout::exact_size(APART)
            );
            let help = "a power cut while one of them is written may destroy the other: they share \
             an erase unit";
            out.push(ConfigFinding::new(&state.place, message, help));
        }
        taken.push((here, this));
    }
}

/// What a boot script loads: its key, and its maximum size.
const LOADED: [(&str, u64); 4] = [
    // Including a copy for comparison, at 0x1000.
    ("state-address", 0x2000),
    // Slipway's initrd has about 2 MiB.
    ("initrd-address", 32 << 20),
    ("fdt-address", 1 << 20),
    // Debian's has 14 MiB compressed, Buildroot's is uncompressed and has 24 MiB.
    ("kernel-address", 48 << 20),
];

/// Everything that the boot script loads fits into the smallest machine and does not overlap.
fn check_memory(board: &BoardConfig, out: &mut Vec<ConfigFinding>) {
    let Some(memory) = &board.memory else { return };
    let place = &memory.smallest.place;
    let number = |key: &str| {
        let digits = board.uboot.get(key).and_then(|text| text.strip_prefix("0x"));
        digits.and_then(|digits| u64::from_str_radix(digits, 16).ok())
    };
    let mut regions = Vec::new();
    for (key, size) in LOADED {
        match (number(key), board.uboot.get(key)) {
            (Some(address), _) => regions.push((key, address, size)),
            // The address of the machine's own tree is fixed.
            (None, None) if key == "fdt-address" => {}
            (None, found) => {
                let found = found.map_or("none".to_owned(), |text| format!("\"{text}\""));
                let message =
                    format!("`u-boot.{key}`: expected {}, found {found}", MemoryAddress::EXPECTED);
                out.push(ConfigFinding::new(place, message, ""));
            }
        }
    }
    let unpacked = "decompression-address";
    if let (Some(address), Some(size)) = (number(unpacked), number("decompression-size")) {
        regions.push((unpacked, address, size));
    }
    regions.sort_by_key(|region| region.1);
    let (start, smallest) = (memory.start.value.0, memory.smallest.value.0);
    let end = start.saturating_add(smallest.saturating_sub(memory.reserved.value.0));
    for (key, address, size) in &regions {
        let after = address.saturating_add(*size);
        if *address < start || after > end {
            let message = format!(
                "`u-boot.{key}`: {address:#010x} to {after:#010x} is outside of {start:#010x} to {end:#010x}, \
                 the free memory of the smallest machine"
            );
            let help = format!(
                "the smallest machine of `compatible` has {} of memory",
                layout::exact_size(smallest)
            );
            out.push(ConfigFinding::new(place, message, help));
        }
    }
    for pair in regions.windows(2) {
        let [(first, address, size), (second, next, _)] = pair else { continue };
        let after = address.saturating_add(*size);
        if after > *next {
            let message = format!(
                "`u-boot.{first}` needs {address:#010x} to {after:#010x}, but `u-boot.{second}` is {next:#010x}"
            );
            out.push(ConfigFinding::new(place, message, "move them apart"));
        }
    }
}
