//! Stage 5, device trees by model: the firmware's names and U-Boot's.
//!
//! Sources: strings of start.elf and start4.elf (`bcm%d-rpi-%s.dtb`); `upstream_kernel` in the documentation of
//! config.txt (the firmware's own names where the kernel's do not exist); U-Boot: the table `rpi_models` in board/raspberrypi/rpi/rpi.c, whose names are in the binary.

use super::card::CardSlot;
use super::uboot::BootScript;
use super::{Boot, CardLocation, Run};

/// The file that the firmware starts: `kernel=`, else the first of its default names that exists.
pub(super) fn kernel_name(run: &Run<'_>, boot: &Boot<'_>) -> String {
    if let Some(name) = boot.value("kernel") {
        return boot.os_file(name);
    }
    let names = || run.soc.kernel.iter().map(|name| boot.os_file(name));
    let there = names().find(|name| boot.volume.file(name).is_some());
    there.or_else(|| names().next_back()).unwrap_or_default()
}

/// Device trees that the firmware loads on this model, each with its fallback.
fn tree_names(run: &Run<'_>, boot: &Boot<'_>) -> Vec<(String, Option<String>)> {
    if let Some(name) = boot.value("device_tree") {
        return vec![(name.to_owned(), None)];
    }
    let own = || run.model.firmware_dtbs.iter().cloned();
    if !boot.is_on("upstream_kernel") || run.model.upstream_dtbs.is_empty() {
        return own().map(|name| (name, None)).collect();
    }
    run.model.upstream_dtbs.iter().cloned().zip(own().map(Some)).collect()
}

/// The prefix of the names of the operating system's files: `os_prefix`, which is ignored unless it has both the kernel
/// and the tree (documentation of config.txt, `os_prefix`, `upstream_kernel`).
pub(super) fn find_prefix(run: &Run<'_>, boot: &Boot<'_>) -> String {
    let upstream = boot.is_on("upstream_kernel").then_some("upstream/");
    let prefix = boot.value("os_prefix").or(upstream).unwrap_or_default();
    let there = |name: &str| boot.volume.file(&format!("{prefix}{name}")).is_some();
    let kernel = match boot.value("kernel") {
        Some(name) => name.starts_with('/') || there(name),
        None => run.soc.kernel.iter().any(|name| there(name)),
    };
    let trees = tree_names(run, boot);
    let tree = trees.iter().any(|(name, other)| there(name) || other.as_deref().is_some_and(there));
    if kernel && tree { prefix.to_owned() } else { String::new() }
}

/// The tree that the firmware uses. All trees that this model may ask for must exist.
pub(super) fn firmware_tree(run: &mut Run<'_>, boot: &Boot<'_>) -> Option<String> {
    let number = boot.volume.number;
    let mut found = None;
    for (name, other) in tree_names(run, boot) {
        let path = boot.os_file(&name);
        let there = |path: &String| boot.volume.file(path).is_some_and(|bytes| !bytes.is_empty());
        let taken = [Some(path.clone()), other.map(|other| boot.os_file(&other))];
        if let Some(taken) = taken.into_iter().flatten().find(there) {
            found = found.or(Some(taken));
            continue;
        }
        let near: Vec<&String> =
            boot.volume.files.keys().filter(|file| file.ends_with(".dtb")).take(20).collect();
        run.stop(
            "tree-missing",
            CardLocation::partition(number),
            format!(
                "the firmware loads {path} on this model, which does not exist; similar files: {}",
                if near.is_empty() { "none".to_owned() } else { format!("{near:?}") }
            ),
            format!("`kernel.device-trees` in board.toml must match {name}, or a boot file must have that path"),
        );
    }
    if let Some(path) = &found {
        run.step("firmware", format!("device tree {path} of partition {number}"));
    }
    found
}

/// The files of a slot that a start uses.
pub(super) struct SlotFiles {
    pub(super) kernel: String,
    pub(super) initrd: String,
    pub(super) tree: String,
}

/// The values that U-Boot's table has for `${fdtfile}`.
fn fdtfile_values(program: &[u8]) -> Vec<String> {
    let texts = program.split(|byte| *byte == 0);
    let texts = texts.filter(|text| text.ends_with(b".dtb") && text.len() < 64 && text.is_ascii());
    texts.map(|text| String::from_utf8_lossy(text).into_owned()).collect()
}

/// How U-Boot's table may name this model: the kernel's names without their end, which is missing for some
/// (`bcm2837-rpi-zero-2.dtb` for `…-zero-2-w.dtb`, `bcm2711-rpi-cm4.dtb` for `…-cm4-io.dtb`).
fn of_model(run: &Run<'_>, table: &[String]) -> Option<String> {
    let names = run.model.upstream_dtbs.iter().chain(&run.model.firmware_dtbs);
    let stems: Vec<&str> = names.map(|name| name.trim_end_matches(".dtb")).collect();
    let file = |entry: &String| {
        entry.rsplit('/').next().unwrap_or_default().trim_end_matches(".dtb").to_owned()
    };
    let exact = table.iter().find(|entry| stems.contains(&file(entry).as_str()));
    let longest = || {
        let shorter = table.iter().filter(|entry| {
            let file = file(entry);
            stems
                .iter()
                .any(|stem| stem.strip_prefix(&file).is_some_and(|rest| rest.starts_with('-')))
        });
        shorter.max_by_key(|entry| entry.len())
    };
    exact.or_else(longest).cloned()
}

/// The files that the script loads from a slot on this model; all must exist.
pub(super) fn slot_files(
    run: &mut Run<'_>,
    slot: &CardSlot,
    script: &BootScript,
    program: &[u8],
    own_tree: bool,
) -> Option<SlotFiles> {
    let table = fdtfile_values(program);
    let fdtfile = of_model(run, &table);
    if own_tree && fdtfile.is_none() {
        run.stop(
            "uboot-model",
            CardLocation::card(),
            format!(
                "this U-Boot does not know the {}: it treats the model as an unknown board",
                run.model.title
            ),
            "use a newer U-Boot, or remove the model from `compatible` in board.toml".to_owned(),
        );
        return None;
    }
    let fdtfile = fdtfile.unwrap_or_default();
    let path = |wanted: &str| {
        let load = script.loads.iter().find(|load| load.path.contains(wanted));
        load.map(|load| load.path.replace("${fdtfile}", &fdtfile))
    };
    let mut missing = false;
    let mut take = |what: &str, path: Option<String>| {
        let path = path.unwrap_or_default();
        let name = path.trim_start_matches('/');
        if slot.files.get(name).is_none_or(Vec::is_empty) {
            missing = true;
            run.stop(
                "slot-file",
                CardLocation::partition(slot.number),
                match path.as_str() {
                    "" => format!("boot.scr loads no {what}"),
                    _ => format!("U-Boot loads {path} as the {what} of this model, which does not exist"),
                },
                match what {
                    "device tree" => "`kernel.device-trees` in board.toml must match it; U-Boot's name may differ from the kernel's".to_owned(),
                    _ => "build the image again".to_owned(),
                },
            );
        }
        path
    };
    let kernel = take("kernel", path("vmlinuz"));
    let initrd = take("initrd", path("initrd"));
    let tree = match own_tree {
        true => take("device tree", path("dtbs/")),
        false => String::new(),
    };
    (!missing).then_some(SlotFiles { kernel, initrd, tree })
}

/// The Wi-Fi settings that the kernel loads on this model (brcmfmac's firmware.c: `<chip>-sdio.<compatible>.txt`, else
/// `<chip>-sdio.txt`).
pub(super) fn check_wifi(run: &mut Run<'_>, slot: &CardSlot) {
    let wanted = format!("-sdio.{}.txt", run.model.wifi);
    let of_chips: Vec<String> =
        run.model.wifi_chips.iter().map(|chip| format!("/brcmfmac{chip}-sdio.txt")).collect();
    let fits = |name: &String| {
        name.contains(&wanted) || of_chips.iter().any(|of_chip| name.contains(of_chip))
    };
    if !slot.files.keys().any(|name| name.contains("/firmware/brcm/") && fits(name)) {
        run.degrade(
            "wifi-settings",
            CardLocation::partition(slot.number),
            format!("usr/lib/firmware/brcm has no brcmfmac…{wanted}: this model has no Wi-Fi"),
            format!(
                "install the package firmware-brcm80211, and keep that file or the chip's, brcmfmac{}-sdio.txt, in the prune rules",
                run.model.wifi_chips.join("-sdio.txt or brcmfmac")
            ),
        );
    }
}
