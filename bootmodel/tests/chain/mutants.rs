//! Cards that a board would not start, or could not roll back: earlier cards, then one change for each rule. Each is
//! detected by the named rule, and its message is a golden text.

use bootmodel::chain::card::{CardContent, FatVolume, GptLayout, MbrEntry};
use bootmodel::chain::{BootFacts, check};

use super::stand_in::{
    AUTOBOOT, CONFIG_3, CONFIG_4, DISTRO, ENVIRONMENT, INIT_GOOD, INIT_OLD, SCRIPT, TREE_3, TREE_4,
    card_3, card_4, card_5, environment, firmware, gzip, initrd, kernel, modules_4, script, tree,
    uboot,
};
use super::{attack, facts, golden, shown};

type Change = Box<dyn Fn(&mut CardContent, &mut BootFacts)>;

/// The change, the card, and the rules that must report it.
pub struct Mutant {
    name: &'static str,
    card: fn() -> CardContent,
    change: Change,
    rules: &'static [&'static str],
}

pub fn mutant(
    name: &'static str,
    card: fn() -> CardContent,
    rules: &'static [&'static str],
    change: impl Fn(&mut CardContent, &mut BootFacts) + 'static,
) -> Mutant {
    Mutant { name, card, change: Box::new(change), rules }
}

pub fn put(volume: &mut FatVolume, name: &str, bytes: impl AsRef<[u8]>) {
    volume.files.insert(name.to_owned(), bytes.as_ref().to_vec());
}

/// A file of every boot partition that has it.
pub fn boots(card: &mut CardContent, name: &str, bytes: impl AsRef<[u8]>) {
    for volume in card.volumes.iter_mut().filter(|volume| volume.files.contains_key(name)) {
        put(volume, name, &bytes);
    }
}

pub fn slots(card: &mut CardContent, name: &str, bytes: impl AsRef<[u8]>) {
    for slot in &mut card.slots {
        slot.files.insert(name.to_owned(), bytes.as_ref().to_vec());
    }
}

pub fn change_text(card: &mut CardContent, name: &str, from: &str, to: &str) {
    for volume in &mut card.volumes {
        if let Some(bytes) = volume.files.get_mut(name) {
            let text = String::from_utf8_lossy(bytes).into_owned();
            assert!(text.contains(from), "{name} has no {from}");
            *bytes = text.replace(from, to).into_bytes();
        }
    }
}

/// The script with a different text, and the words of a good command line.
pub fn rewrite(card: &mut CardContent, from: &str, to: &str) {
    let words = "console=tty0 console=ttyS1,115200 ro panic=10 watchdog.open_timeout=120 cfg80211.ieee80211_regdom=DE";
    let text = SCRIPT.replace("WORDS", words);
    assert!(text.contains(from), "the script has no {from}");
    boots(card, "boot.scr", script(&text.replace(from, to)));
}

fn gpt(card: &mut CardContent, hybrid: bool) {
    card.gpt = Some(GptLayout { first_usable: 34, entries: 2 });
    card.records.retain(|record| record.number < 4);
    if !hybrid {
        card.records.clear();
        card.volumes.iter_mut().for_each(|volume| volume.kind = None);
    }
    card.records.push(MbrEntry { number: 4, kind: 0xee, offset: 512, size: 1 << 20 });
}

const FEW_KEYS: [&str; 6] =
    ["arm_64bit", "kernel", "upstream_kernel", "enable_uart", "disable_splash", "initial_turbo"];

/// The cards before these checks existed.
fn as_they_were() -> Vec<Mutant> {
    vec![
        mutant(
            "as it was: Pi 3",
            card_3,
            &[
                "firmware-file",
                "watchdog-deadline",
                "uboot-stops",
                "uboot-usb",
                "uboot-network",
                "memory-outside",
                "panic-halts",
                "shared-unit",
                "fat-kind",
                "watchdog-seconds",
                "console-screen",
            ],
            |card, _| {
                was_3(card);
                change_text(card, "config.txt", "initial_turbo=0", "gpu_mem=16");
            },
        ),
        // The findings after the firmware's choice appear only without B0.
        mutant("as it was: Pi 3 without gpu_mem", card_3, &["memory-outside"], |card, _| {
            was_3(card)
        }),
        mutant(
            "as it was: Pi 4",
            card_4,
            &[
                "initrd-supplier",
                "table-kind",
                "second-stage-gpt",
                "firmware-old",
                "config-key",
                "panic-halts",
                "tree-missing",
                "watchdog-deadline",
                "watchdog-seconds",
                "shared-unit",
            ],
            |card, _| {
                was(card);
                gpt(card, true);
                boots(card, "start4.elf", firmware("Aug 26 2022", &FEW_KEYS));
                boots(
                    card,
                    "config.txt",
                    CONFIG_4.replace("[cm4]\notg_mode=1\n[all]\n", "").replace("=63", "=120"),
                );
                let modules: Vec<_> = modules_4()
                    .into_iter()
                    .filter(|(name, _)| !name.contains("fixed") && !name.contains("regulator"))
                    .collect();
                boots(card, "initrd.img", initrd(INIT_OLD, &modules));
                slots(card, "usr/lib/modules/6/modules.alias", "");
                for volume in &mut card.volumes {
                    if let Some(bytes) = volume.files.remove("bcm2711-rpi-cm4.dtb") {
                        put(volume, "bcm2711-rpi-cm4-io.dtb", bytes);
                    }
                }
            },
        ),
        mutant("as it was: Pi 5", card_5, &["tree-missing", "watchdog-deadline"], |card, _| {
            was(card);
            for volume in &mut card.volumes {
                volume.files.retain(|name, _| !name.contains("cm5") && !name.contains("500"));
            }
            card.device.compatible.retain(|name| !name.ends_with("500"));
            let drivers = [
                "simple-bus",
                "brcm,bcm2835-cprman",
                "brcm,bcm2835-gpio",
                "brcm,bcm2712-sdhci",
                "regulator-fixed",
                "regulator-gpio",
            ];
            boots(card, "kernel8.img", gzip(&kernel("6.6.28-v8", &drivers)));
            boots(card, "initrd.img", initrd(INIT_OLD, &[]));
            // The 2023 board alone reaches the initrd's rule.
        }),
        mutant("B9: Debian's kernel on a Pi 5", card_5, &["initrd-supplier"], |card, _| {
            let drivers = [
                "simple-bus",
                "brcm,bcm2835-cprman",
                "brcm,bcm2835-gpio",
                "regulator-fixed",
                "regulator-gpio",
            ];
            boots(card, "kernel8.img", gzip(&kernel("6.12.117+deb13-arm64", &drivers)));
        }),
    ]
}

fn was(card: &mut CardContent) {
    let conf = "[Manager]\nRuntimeWatchdogSec=60s\nRebootWatchdogSec=2min\n";
    slots(card, "etc/systemd/system.conf.d/10-slipway.conf", conf);
    let first = card.volumes[0].number;
    card.partitions.insert(first, 4 << 20);
    card.partitions.insert(2, 20 << 20);
    card.volumes[0].offset = 4 << 20;
}

fn was_3(card: &mut CardContent) {
    was(card);
    card.device.boot_state.sectors = vec![2048, 2056];
    let boot = &mut card.volumes[0];
    (boot.clusters, boot.cluster_sectors, boot.kind, boot.says) =
        (32_000, 4, Some(0x0e), "FAT16".to_owned());
    boot.files.remove("uboot.env");
    let text = SCRIPT
        .replace("0x09000000", "0x18000000")
        .replace("0x0b000000", "0x17000000")
        .replace("0x10000000", "0x20000000")
        .replace("0x0c000000", "0x10000000")
        .replace("mw.l 0x3f100024 0x5a0fffff; mw.l 0x3f10001c 0x5a000020\n", "")
        .replace("WORDS", "console=ttyS1,115200 ro panic=10 watchdog.open_timeout=120");
    put(boot, "boot.scr", script(&text));
    slots(
        card,
        "boot/initrd.img",
        initrd(INIT_OLD, &[("bcm2835_wdt", &[]), ("bcm2835", &["brcm,bcm2835-sdhost"])]),
    );
}

fn of_the_card() -> Vec<Mutant> {
    vec![
        mutant("hybrid table", card_4, &["table-kind"], |card, _| gpt(card, true)),
        mutant("GPT with old firmware", card_4, &["second-stage-gpt"], |card, _| {
            gpt(card, false);
            boots(card, "start4.elf", firmware("Nov 26 2024", &KEYS_4));
        }),
        mutant("GPT whose entries were moved", card_5, &["gpt-moved"], |card, _| {
            gpt(card, false);
            card.gpt = Some(GptLayout { first_usable: 2048, entries: 2016 });
        }),
        mutant("GPT on a Pi 3", card_3, &["table-kind"], |card, _| gpt(card, false)),
        mutant("FAT32 with 65,000 clusters", card_3, &["fat-width"], |card, _| {
            card.volumes[0].clusters = 65_000
        }),
        mutant("FAT32 under a FAT16's type", card_3, &["fat-type"], |card, _| {
            card.volumes[0].kind = Some(0x0e)
        }),
        mutant("FAT under Linux's type", card_3, &["fat-type"], |card, _| {
            card.volumes[0].kind = Some(0x83)
        }),
        mutant("clusters of 4 KiB", card_3, &["fat-clusters"], |card, _| {
            card.volumes[0].cluster_sectors = 8
        }),
        mutant("no FAT at all", card_3, &["no-fat"], |card, _| card.volumes.clear()),
        mutant("copies in one unit", card_3, &["shared-unit"], |card, _| {
            card.device.boot_state.sectors = vec![16_384, 16_392]
        }),
        mutant("a copy beside the table", card_3, &["shared-unit"], |card, _| {
            card.device.boot_state.sectors[0] = 2048
        }),
        mutant("a boot partition of 12 MiB", card_4, &["shared-unit"], |card, _| {
            card.partitions.insert(2, 44 << 20);
        }),
        mutant("no bootcode.bin", card_3, &["rom-file"], |card, _| {
            drop(card.volumes[0].files.remove("bootcode.bin"))
        }),
        mutant("no fixup.dat", card_3, &["firmware-file"], |card, _| {
            drop(card.volumes[0].files.remove("fixup.dat"))
        }),
        mutant("another file as fixup.dat", card_3, &["firmware-fixup"], |card, _| {
            boots(card, "fixup.dat", "no")
        }),
        mutant("another file as start.elf", card_3, &["firmware-date"], |card, _| {
            boots(card, "start.elf", "no\0")
        }),
        mutant("no start4.elf in boot-b", card_4, &["firmware-file"], |card, _| {
            drop(card.volumes[2].files.remove("start4.elf"))
        }),
        mutant("firmware beside autoboot.txt", card_4, &["autoboot-firmware"], |card, _| {
            put(&mut card.volumes[0], "start4.elf", "x")
        }),
        mutant("autoboot.txt of 600 bytes", card_4, &["autoboot-length"], |card, _| {
            boots(card, "autoboot.txt", format!("{AUTOBOOT}#{}\n", "x".repeat(600)))
        }),
        mutant(
            "a trial from a partition that is not there",
            card_4,
            &["autoboot-partition"],
            |card, _| change_text(card, "autoboot.txt", "boot_partition=3", "boot_partition=7"),
        ),
        mutant("an EEPROM that reads no sections", card_4, &["eeprom-sections"], |card, _| {
            card.device.eeprom_since = Some("2021-04-29".to_owned())
        }),
        mutant("any EEPROM", card_5, &["eeprom-sections"], |card, _| {
            card.device.eeprom_since = None
        }),
        mutant("a model without facts", card_3, &["model-unknown"], |card, _| {
            card.device.compatible.push("raspberrypi,6-model-b".to_owned())
        }),
    ]
}

pub const KEYS_4: [&str; 9] = [
    "arm_64bit",
    "kernel",
    "upstream_kernel",
    "enable_uart",
    "disable_splash",
    "initial_turbo",
    "otg_mode",
    "dtparam",
    "kernel_watchdog_timeout",
];

fn of_config() -> Vec<Mutant> {
    vec![
        mutant("gpu_mem=16", card_3, &["firmware-file"], |card, _| {
            change_text(card, "config.txt", "initial_turbo=0", "gpu_mem=16")
        }),
        mutant(
            "gpu_mem in a section that bootcode.bin does not read",
            card_3,
            &["firmware-file"],
            |card, _| boots(card, "config.txt", format!("{CONFIG_3}[pi4]\ngpu_mem=16\n[all]\n")),
        ),
        mutant("gpu_mem for this size of memory", card_3, &["firmware-file"], |card, _| {
            boots(card, "config.txt", format!("gpu_mem_1024=16\n{CONFIG_3}"))
        }),
        mutant("start_x=1", card_3, &["firmware-file"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_3}start_x=1\n"))
        }),
        mutant("start_file", card_3, &["firmware-file"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_3}start_file=s.elf\nfixup_file=f.dat\n"))
        }),
        mutant("no config.txt", card_4, &["config-missing"], |card, _| {
            drop(card.volumes[1].files.remove("config.txt"))
        }),
        mutant("a line of 99 characters", card_3, &["config-line"], |card, _| {
            boots(
                card,
                "config.txt",
                format!("{CONFIG_3}kernel={}\nkernel=u-boot.bin\n", "x".repeat(92)),
            )
        }),
        mutant("CR LF", card_3, &["config-bytes"], |card, _| {
            boots(card, "config.txt", CONFIG_3.replace("arm_64bit=1\n", "arm_64bit=1\r\n"))
        }),
        mutant("an umlaut", card_3, &["config-bytes"], |card, _| {
            boots(card, "config.txt", CONFIG_3.replace("kernel=u-boot.bin", "kernel=ü-boot.bin"))
        }),
        mutant("initramfs with =", card_4, &["config-initramfs"], |card, _| {
            change_text(card, "config.txt", "initramfs initrd.img", "initramfs=initrd.img")
        }),
        mutant("an initrd that is not there", card_4, &["initrd-missing"], |card, _| {
            change_text(card, "config.txt", "initramfs initrd.img", "initramfs initrd.gz")
        }),
        mutant("a misspelt key", card_3, &["config-key"], |card, _| {
            change_text(card, "config.txt", "enable_uart=1", "enabel_uart=1")
        }),
        mutant("kernel_watchdog_timeout for old firmware", card_4, &["config-key"], |card, _| {
            boots(card, "start4.elf", firmware("May  7 2025", &KEYS_4[..7]))
        }),
        mutant("[tryboot] for firmware of 2022", card_4, &["config-section"], |card, _| {
            for volume in &mut card.volumes {
                let Some(bytes) = volume.files.get_mut("start4.elf") else { continue };
                let at = bytes.windows(9).position(|part| part == b"[tryboot]").expect("it");
                bytes[at] = b'x';
            }
        }),
        mutant("a section that never ends", card_4, &["config-all"], |card, _| {
            boots(card, "config.txt", CONFIG_4.trim_end_matches("[all]\n"))
        }),
        mutant("the watchdog's line below [cm4]", card_4, &["panic-halts"], |card, _| {
            change_text(card, "config.txt", "otg_mode=1\n[all]\n", "otg_mode=1\n")
        }),
        mutant("no otg_mode for the CM4", card_4, &["config-usb"], |card, _| {
            change_text(card, "config.txt", "otg_mode=1", "disable_splash=1")
        }),
        mutant("an overlay that is not there", card_4, &["overlay-missing"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_4}dtoverlay=disable-bt\n"));
            boots(
                card,
                "start4.elf",
                firmware("May  7 2025", &[&KEYS_4[..], &["dtoverlay"]].concat()),
            )
        }),
        mutant("an overlay that the kernel never sees", card_3, &["overlay-lost"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_3}dtparam=i2c_arm=on\n"))
        }),
        mutant("a kernel that is not there", card_3, &["kernel-missing"], |card, _| {
            change_text(card, "config.txt", "u-boot.bin", "uboot.bin")
        }),
        mutant("Raspberry Pi's names without its trees", card_3, &["tree-missing"], |card, _| {
            change_text(card, "config.txt", "upstream_kernel=1\n", "")
        }),
        mutant(
            "os_prefix with a kernel and trees alone",
            card_4,
            &["initrd-missing"],
            |card, _| {
                boots(card, "config.txt", format!("{CONFIG_4}os_prefix=a/\n"));
                boots(
                    card,
                    "start4.elf",
                    firmware("May  7 2025", &[&KEYS_4[..], &["os_prefix"]].concat()),
                );
                for volume in &mut card.volumes {
                    let files = volume.files.clone();
                    for (name, bytes) in files.iter().filter(|(name, _)| name.ends_with(".dtb")) {
                        put(volume, &format!("a/{name}"), bytes);
                    }
                    if let Some(kernel) = files.get("kernel8.img") {
                        put(volume, "a/kernel8.img", kernel);
                    }
                }
            },
        ),
        mutant("newer firmware without initial_turbo=0", card_3, &["turbo"], |card, facts| {
            facts.releases.pairs.clear();
            boots(card, "start.elf", firmware("Mar  5 2025", &FEW_KEYS));
            change_text(card, "config.txt", "initial_turbo=0\n", "");
        }),
    ]
}

fn of_dates() -> Vec<Mutant> {
    vec![
        mutant("firmware before Pi 4 1.5", card_4, &["firmware-old"], |card, _| {
            boots(card, "start4.elf", firmware("May 15 2024", &KEYS_4))
        }),
        mutant("a fact changes: one line", card_4, &["firmware-old"], |_, facts| {
            let model = facts
                .models
                .iter_mut()
                .find(|model| model.compatible == "raspberrypi,400")
                .expect("the 400");
            let revision = facts_revision("c03131", "2026-01-01");
            model.revisions.push(revision);
        }),
        mutant("newer firmware with U-Boot 2023.01", card_3, &["uboot-pair"], |card, _| {
            boots(card, "start.elf", firmware("Mar  5 2025", &FEW_KEYS))
        }),
        mutant("U-Boot 2023.01 with 8 GiB", card_uboot_4, &["uboot-pair"], |card, _| {
            boots(
                card,
                "u-boot.bin",
                uboot(
                    "2023.01",
                    DISTRO,
                    &["bcm2711-rpi-4-b.dtb", "bcm2711-rpi-400.dtb", "bcm2711-rpi-cm4.dtb"],
                ),
            )
        }),
        mutant("a kernel before the board", card_5, &["kernel-old"], |card, _| {
            let drivers = [
                "simple-bus",
                "brcm,bcm2835-cprman",
                "brcm,bcm2835-gpio",
                "brcm,bcm2712-sdhci",
                "regulator-fixed",
                "regulator-gpio",
            ];
            boots(card, "kernel8.img", gzip(&kernel("6.6.28-v8", &drivers)));
        }),
    ]
}

fn facts_revision(code: &str, since: &str) -> bootmodel::chain::facts::BoardRevision {
    bootmodel::chain::facts::BoardRevision {
        code: code.to_owned(),
        title: "400 1.1".to_owned(),
        firmware_since: since.to_owned(),
        certain: true,
        source: "this test".to_owned(),
    }
}

/// A Pi 4's card with U-Boot's choice of a slot.
fn card_uboot_4() -> CardContent {
    let mut card = card_3();
    let four = card_4();
    let boot = &mut card.volumes[0];
    for (name, bytes) in four.volumes[1]
        .files
        .iter()
        .filter(|(name, _)| name.contains('4') && !name.starts_with("kernel"))
    {
        put(boot, name, bytes);
    }
    let names = ["bcm2711-rpi-4-b.dtb", "bcm2711-rpi-400.dtb", "bcm2711-rpi-cm4.dtb"];
    put(boot, "u-boot.bin", uboot("2025.01", DISTRO, &names));
    let aliased = TREE_4.replace("serial1 =", "mmc0 = \"/emmc2bus/mmc@7e340000\"\nserial1 =");
    for name in names {
        put(&mut card.volumes[0], name, tree(&aliased));
        slots(&mut card, &format!("boot/dtbs/broadcom/{name}"), tree(&aliased));
    }
    let config = format!("{CONFIG_3}[cm4]\notg_mode=1\n[all]\n");
    boots(&mut card, "config.txt", config);
    rewrite(
        &mut card,
        "mw.l 0x3f100024 0x5a0fffff; mw.l 0x3f10001c 0x5a000020",
        "mw.l 0xfe100024 0x5a0fffff; mw.l 0xfe10001c 0x5a000020",
    );
    slots(&mut card, "boot/initrd.img", initrd(INIT_GOOD, &modules_4()));
    card.device.compatible = four.device.compatible;
    card
}

fn of_uboot() -> Vec<Mutant> {
    vec![
        mutant(
            "no uboot.env",
            card_3,
            &["uboot-stops", "uboot-usb", "uboot-network", "uboot-prompt"],
            |card, _| drop(card.volumes[0].files.remove("uboot.env")),
        ),
        mutant(
            "a uboot.env with a wrong checksum",
            card_3,
            &["uboot-env", "uboot-stops"],
            |card, _| {
                let bytes = card.volumes[0].files.get_mut("uboot.env").expect("the file");
                bytes[100] ^= 1;
            },
        ),
        mutant("a uboot.env of 8 KiB", card_3, &["uboot-env"], |card, _| {
            card.volumes[0].files.get_mut("uboot.env").expect("the file").truncate(0x2000)
        }),
        mutant(
            "U-Boot of 2025 without uboot.env",
            card_3,
            &["uboot-network", "uboot-prompt"],
            |card, _| {
                drop(card.volumes[0].files.remove("uboot.env"));
                let names =
                    ["bcm2837-rpi-3-b.dtb", "bcm2837-rpi-3-b-plus.dtb", "bcm2837-rpi-3-a-plus.dtb"];
                let environment =
                    "bootcmd=bootflow scan\nbootdelay=2\nboot_targets=mmc usb pxe dhcp";
                boots(card, "u-boot.bin", uboot("2025.01", environment, &names));
            },
        ),
        mutant("bootdelay=0", card_3, &["uboot-stops"], |card, _| {
            boots(card, "uboot.env", environment(&ENVIRONMENT.replace("-2", "0")))
        }),
        mutant("usb start first", card_3, &["uboot-usb"], |card, _| {
            boots(
                card,
                "uboot.env",
                environment(&ENVIRONMENT.replace("preboot=", "preboot=usb start")),
            )
        }),
        mutant("the network last", card_3, &["uboot-network"], |card, _| {
            boots(card, "uboot.env", environment(&ENVIRONMENT.replace("; reset", "; dhcp; reset")))
        }),
        mutant("no reset at the end", card_3, &["uboot-prompt"], |card, _| {
            boots(card, "uboot.env", environment(&ENVIRONMENT.replace("; reset", "")))
        }),
        mutant("the card is not mmc 0", card_uboot_4, &["uboot-device"], |card, _| {
            for name in ["4-b", "400", "cm4"] {
                boots(
                    card,
                    &format!("bcm2711-rpi-{name}.dtb"),
                    tree(&TREE_4.replace(
                        "/emmc2bus\n",
                        "/soc/mmc@7e300000\ncompatible = \"brcm,bcm2835-sdhci\"\n/emmc2bus\n",
                    )),
                );
            }
        }),
        mutant("no boot.scr", card_3, &["script-missing"], |card, _| {
            drop(card.volumes[0].files.remove("boot.scr"))
        }),
        mutant("a boot.scr that is a text", card_3, &["script-damaged"], |card, _| {
            boots(card, "boot.scr", SCRIPT)
        }),
        mutant("a model that U-Boot does not know", card_3, &["uboot-model"], |card, _| {
            boots(
                card,
                "u-boot.bin",
                uboot("2023.01", DISTRO, &["bcm2837-rpi-3-b.dtb", "bcm2837-rpi-3-b-plus.dtb"]),
            )
        }),
        mutant("a tree under another name than U-Boot's", card_3, &["slot-file"], |card, _| {
            boots(
                card,
                "u-boot.bin",
                uboot(
                    "2023.01",
                    DISTRO,
                    &["bcm2837-rpi-3-b.dtb", "bcm2837-rpi-3-b-plus.dtb", "bcm2837-rpi-3-a.dtb"],
                ),
            )
        }),
        mutant("no initrd in slot b", card_3, &["slot-file"], |card, _| {
            drop(card.slots[1].files.remove("boot/initrd.img"))
        }),
        mutant("the script's old addresses", card_3, &["memory-outside"], |card, _| {
            rewrite(card, "kernel_comp_addr_r 0x10000000", "kernel_comp_addr_r 0x20000000")
        }),
        mutant("the initrd in the kernel", card_3, &["memory-overlap"], |card, _| {
            rewrite(card, "0x09000000 /boot/initrd.img", "0x0d000000 /boot/initrd.img")
        }),
        mutant("U-Boot overwritten", card_3, &["memory-overlap"], |card, _| {
            rewrite(card, "0x0b000000 /boot/dtbs", "0x00080010 /boot/dtbs")
        }),
        mutant("too little room for the packed kernel", card_3, &["memory-unpack"], |card, _| {
            rewrite(card, "kernel_comp_size 0x04000000", "kernel_comp_size 0x00000010")
        }),
        mutant("no room for unpacking", card_3, &["memory-unpack"], |card, _| {
            rewrite(card, "setenv kernel_comp_addr_r 0x10000000", "")
        }),
        mutant("half of the memory for the GPU", card_3, &["memory-outside"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_3}gpu_mem=256\n"))
        }),
        mutant("a watchdog that is never started", card_3, &["panic-halts"], |card, _| {
            rewrite(card, "mw.l 0x3f10001c 0x5a000020", "")
        }),
        mutant("the watchdog's registers of another chip", card_3, &["panic-halts"], |card, _| {
            rewrite(card, "0x3f1000", "0xfe1000")
        }),
    ]
}

fn of_the_system() -> Vec<Mutant> {
    vec![
        mutant("one regulator's module is missing", card_4, &["initrd-supplier"], |card, _| {
            boots(card, "initrd.img", initrd(INIT_GOOD, &modules_4()[..2]))
        }),
        mutant("a built-in driver goes", card_3, &["initrd-supplier"], |card, _| {
            slots(
                card,
                "boot/vmlinuz",
                gzip(&kernel("6.1.0", &["simple-bus", "brcm,bcm2835-cprman", "brcm,bcm2835-dma"])),
            )
        }),
        mutant("the card's controller is off", card_3, &["storage-node"], |card, _| {
            for_trees(card, &TREE_3.replace("\"okay\"", "\"disabled\""))
        }),
        mutant("the console is off", card_3, &["console-port"], |card, _| {
            for_trees(
                card,
                &TREE_3.replace(
                    "compatible = \"brcm,bcm2835-aux-uart\"",
                    "compatible = \"brcm,bcm2835-aux-uart\"\nstatus = \"disabled\"",
                ),
            )
        }),
        mutant("another number of the console", card_3, &["console-port"], |card, _| {
            rewrite(card, "console=ttyS1", "console=ttyS0")
        }),
        mutant("the other kind of console", card_4, &["console-port"], |card, _| {
            change_text(card, "cmdline.txt", "console=ttyS1", "console=ttyAMA1")
        }),
        mutant("no settings of Wi-Fi", card_3, &["wifi-settings"], |card, _| {
            card.slots
                .iter_mut()
                .for_each(|slot| slot.files.retain(|name, _| !name.contains("3-model-a-plus")));
        }),
        mutant("nothing on the screen", card_4, &["console-screen"], |card, _| {
            change_text(card, "cmdline.txt", "console=tty0 ", "")
        }),
        mutant("a truncated device tree", card_3, &["system-unreadable"], |card, _| {
            for slot in &mut card.slots {
                slot.files
                    .iter_mut()
                    .filter(|(name, _)| name.ends_with(".dtb"))
                    .for_each(|(_, bytes)| bytes.truncate(200));
            }
        }),
        mutant("a kernel for another machine", card_4, &["system-unreadable"], |card, _| {
            boots(card, "kernel8.img", "MZ")
        }),
        mutant("no watchdog's module", card_4, &["watchdog-missing"], |card, _| {
            boots(card, "initrd.img", initrd(INIT_GOOD, &modules_4()[1..]))
        }),
        mutant("no open_timeout", card_4, &["watchdog-open"], |card, _| {
            change_text(card, "cmdline.txt", "watchdog.open_timeout=120 ", "")
        }),
        mutant("/init's old rule", card_4, &["watchdog-deadline"], |card, _| {
            boots(card, "initrd.img", initrd(INIT_OLD, &modules_4()))
        }),
        mutant(
            "a rule of /init that cannot be parsed",
            card_4,
            &["watchdog-deadline"],
            |card, _| {
                boots(
                    card,
                    "initrd.img",
                    initrd(
                        &INIT_GOOD.replace("] || left=$(((left", "] || left=$(round $(((left"),
                        &modules_4(),
                    ),
                )
            },
        ),
        mutant("RebootWatchdogSec=2min", card_4, &["watchdog-seconds"], |card, _| {
            slots(
                card,
                "etc/systemd/system.conf.d/20-other.conf",
                "[Manager]\nRebootWatchdogSec=2min\n",
            )
        }),
        mutant("no dtparam=watchdog=on", card_4, &["watchdog-early"], |card, _| {
            change_text(card, "config.txt", "dtparam=watchdog=on\n", "")
        }),
        mutant("kernel_watchdog_timeout=120", card_4, &["watchdog-seconds"], |card, _| {
            change_text(card, "config.txt", "timeout=63", "timeout=120")
        }),
    ]
}

pub fn for_trees(card: &mut CardContent, text: &str) {
    for slot in &mut card.slots {
        slot.files
            .iter_mut()
            .filter(|(name, _)| name.ends_with(".dtb"))
            .for_each(|(_, bytes)| *bytes = tree(text));
    }
}

#[test]
fn every_mutant_is_caught_with_its_message() {
    let all = [
        as_they_were(),
        of_the_card(),
        of_config(),
        of_dates(),
        of_uboot(),
        of_the_system(),
        attack::mutants(),
    ];
    let mut text = String::new();
    let mut missed = Vec::new();
    let mut count = 0;
    for mutant in all.into_iter().flatten() {
        let (mut card, mut facts) = ((mutant.card)(), facts());
        (mutant.change)(&mut card, &mut facts);
        let mut verdict = check(&card, &facts);
        let found: Vec<_> = verdict.findings.iter().map(|finding| finding.rule).collect();
        for rule in mutant.rules.iter().filter(|rule| !found.contains(rule)) {
            missed.push(format!("{}: no finding {rule} among {found:?}", mutant.name));
        }
        // Every good card has this warning.
        verdict.findings.retain(|f| f.rule != "firmware-old" || mutant.rules.contains(&f.rule));
        text.push_str(&format!("## {}\n{}\n", mutant.name, shown(&verdict)));
        count += 1;
    }
    assert_eq!(missed, [""; 0]);
    assert!(count >= 40, "{count} mutants");
    golden("mutants.txt", &text);
}

#[test]
fn the_other_base_card_is_good() {
    let verdict = check(&card_uboot_4(), &facts());
    assert_eq!(shown(&verdict), "");
}

#[test]
fn a_revision_that_is_left_out_on_purpose_stops_nothing() {
    let mut card = card_4();
    boots(&mut card, "start4.elf", firmware("May 15 2024", &KEYS_4));
    card.device.left_out_revisions = ["a03115", "d03115", "d03141"].map(str::to_owned).to_vec();
    assert_eq!(shown(&check(&card, &facts())), "");
}

#[test]
fn a_key_may_be_unknown_when_a_line_says_why() {
    let mut card = card_3();
    boots(
        &mut card,
        "config.txt",
        format!(
            "{CONFIG_3}# may be unknown: hdmi_new: only newer firmware has screens\nhdmi_new=1\n"
        ),
    );
    assert!(check(&card, &facts()).stops().next().is_none());
}

/// The driver uses the chip's settings if there are none for the model; settings of another chip do not apply.
#[test]
fn settings_of_a_chip_are_wi_fi_for_its_models() {
    for (chip, finding) in [("43455", false), ("43430", true)] {
        let mut card = card_3();
        for slot in &mut card.slots {
            slot.files.retain(|name, _| !name.contains("3-model-a-plus"));
        }
        slots(&mut card, &format!("usr/lib/firmware/brcm/brcmfmac{chip}-sdio.txt"), "");
        let verdict = check(&card, &facts());
        assert_eq!(shown(&verdict).contains("wifi-settings"), finding, "{chip}");
    }
}
