//! Cards changed in ways that prevent a start according to public sources, cards that look wrong but start, and
//! malicious bytes.

use bootmodel::chain::check;
use bootmodel::chain::fdt::DeviceTree;

use super::mutants::{KEYS_4, Mutant, boots, change_text, for_trees, mutant, put, rewrite, slots};
use super::stand_in::{
    CONFIG_3, CONFIG_4, ENVIRONMENT, TREE_3, card_3, card_4, card_5, environment, firmware, kernel,
    script,
};
use super::{facts, shown};

const KEYS_3: [&str; 8] = [
    "arm_64bit",
    "kernel",
    "upstream_kernel",
    "enable_uart",
    "disable_splash",
    "initial_turbo",
    "kernel_old",
    "kernel_address",
];

fn more_keys(more: &[&str]) -> Vec<u8> {
    firmware("May  7 2025", &[&KEYS_4[..], more].concat())
}

/// One mutant for each way, with the rule that reports it.
pub fn mutants() -> Vec<Mutant> {
    vec![
        mutant("no tryboot_a_b", card_4, &["autoboot-a-b"], |card, _| {
            change_text(card, "autoboot.txt", "tryboot_a_b=1\n", "")
        }),
        mutant("tryboot_a_b for trials alone", card_5, &["autoboot-a-b"], |card, _| {
            boots(
                card,
                "autoboot.txt",
                "boot_partition=2\n[tryboot]\ntryboot_a_b=0\nboot_partition=3\n",
            )
        }),
        mutant("a trial from the usual partition", card_4, &["autoboot-partition"], |card, _| {
            change_text(card, "autoboot.txt", "boot_partition=3", "boot_partition=2")
        }),
        mutant("recovery.bin", card_4, &["rom-recovery"], |card, _| {
            put(&mut card.volumes[0], "RECOVERY.BIN", "x")
        }),
        mutant("autoboot.txt on a Pi 3", card_3, &["rom-autoboot"], |card, _| {
            put(&mut card.volumes[0], "autoboot.txt", "boot_partition=2\n")
        }),
        mutant("boot_ramdisk", card_4, &["boot-ramdisk"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_4}boot_ramdisk=1\n"))
        }),
        mutant("no arm_64bit on a Pi 3", card_3, &["config-mode"], |card, _| {
            change_text(card, "config.txt", "arm_64bit=1\n", "")
        }),
        mutant("arm_64bit=0", card_3, &["config-mode"], |card, _| {
            change_text(card, "config.txt", "arm_64bit=1", "arm_64bit=0")
        }),
        mutant("kernel_old", card_3, &["config-address"], |card, _| {
            boots(card, "start.elf", firmware("Aug 26 2022", &KEYS_3));
            boots(card, "config.txt", format!("{CONFIG_3}kernel_old=1\n"))
        }),
        mutant("U-Boot at the kernel's address", card_3, &["config-address"], |card, _| {
            boots(card, "start.elf", firmware("Aug 26 2022", &KEYS_3));
            boots(card, "config.txt", format!("{CONFIG_3}kernel_address=0x200000\n"))
        }),
        mutant("a kernel of an included file", card_4, &["kernel-missing"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_4}include user.txt\n"));
            card.volumes.iter_mut().skip(1).for_each(|v| put(v, "user.txt", "\nkernel=mine.img\n"));
        }),
        mutant("an included file that is not there", card_4, &["config-include"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_4}include user.txt\n"))
        }),
        mutant("files that include each other", card_4, &["config-include"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_4}include a.txt\n"));
            for volume in card.volumes.iter_mut().skip(1) {
                put(volume, "a.txt", "include b.txt\ninclude b.txt\n");
                put(volume, "b.txt", "include a.txt\ninclude a.txt\n");
            }
        }),
        mutant("an included file on a Pi 5", card_5, &["config-include"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_4}include user.txt\n"));
            card.volumes.iter_mut().skip(1).for_each(|v| put(v, "user.txt", "\n"));
        }),
        mutant("UTF-16 without a mark", card_5, &["config-bytes"], |card, _| {
            boots(card, "config.txt", CONFIG_4.replace('\n', "\n\0").replace('=', "=\0"))
        }),
        mutant("a Pi 5's own kernel beside", card_5, &["system-unreadable"], |card, _| {
            change_text(card, "config.txt", "kernel=kernel8.img\n", "");
            card.volumes.iter_mut().skip(1).for_each(|v| put(v, "kernel_2712.img", "no kernel"));
        }),
        mutant("a kernel packed with zstd", card_4, &["kernel-packed"], |card, _| {
            let image = kernel("6.12.25-v8", &["simple-bus"]);
            boots(card, "kernel8.img", zstd::encode_all(&image[..], 1).expect("memory"))
        }),
        mutant("total_mem below the script's addresses", card_3, &["memory-outside"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_3}total_mem=350\n"))
        }),
        mutant("the GPU's share of a 3A+", card_3, &["memory-outside"], |card, _| {
            boots(card, "config.txt", format!("{CONFIG_3}gpu_mem_512=230\n"))
        }),
        mutant("bootcmd that does nothing", card_3, &["uboot-command"], |card, _| {
            boots(card, "uboot.env", environment("bootdelay=-2\npreboot=\nbootcmd=reset"))
        }),
        mutant("bootcmd with another partition", card_3, &["uboot-command"], |card, _| {
            boots(card, "uboot.env", environment(&ENVIRONMENT.replace("0:1", "0:2")))
        }),
        mutant("a boot.scr with a damaged header", card_3, &["script-damaged"], |card, _| {
            let bytes = card.volumes[0].files.get_mut("boot.scr").expect("the script");
            bytes[40] ^= 1;
        }),
        mutant("another kind of image as boot.scr", card_3, &["script-damaged"], |card, _| {
            let mut bytes = script("reset\n");
            bytes[30] = 2;
            bytes[4..8].fill(0);
            let sum = crc32fast::hash(&bytes[..64]);
            bytes[4..8].copy_from_slice(&sum.to_be_bytes());
            boots(card, "boot.scr", bytes)
        }),
        mutant("no panic=", card_4, &["words-panic"], |card, _| {
            change_text(card, "cmdline.txt", "panic=10 ", "")
        }),
        mutant("panic=0", card_3, &["words-panic"], |card, _| {
            rewrite(card, "panic=10", "panic=10 panic=0")
        }),
        mutant("open_timeout=0", card_4, &["words-watchdog"], |card, _| {
            change_text(card, "cmdline.txt", "open_timeout=120", "open_timeout=0")
        }),
        mutant("handle_boot_enabled=0", card_4, &["words-watchdog"], |card, _| {
            change_text(card, "cmdline.txt", "ro ", "ro watchdog.handle_boot_enabled=0 ")
        }),
        mutant("no-watchdog", card_3, &["words-watchdog"], |card, _| {
            rewrite(card, "panic=10", "panic=10 slipway.no-watchdog")
        }),
        mutant("a partition that belongs to no slot", card_4, &["words-slot"], |card, _| {
            change_text(card, "cmdline.txt", "2:a,3:b", "1:a,2:b")
        }),
        mutant("the slots' numbers exchanged", card_4, &["words-slot"], |card, _| {
            change_text(card, "cmdline.txt", "2:a,3:b", "2:a:6,3:b:5")
        }),
        mutant("no root=", card_3, &["words-slot"], |card, _| {
            rewrite(card, "root=PARTUUID=${slipway_uuid} ", "")
        }),
        mutant("the watchdog is off", card_3, &["watchdog-node"], |card, _| {
            let mark = "\"brcm,bcm2835-pm-wdt\"";
            for_trees(card, &TREE_3.replace(mark, &format!("{mark}\nstatus = \"disabled\"")))
        }),
        mutant("dtparam=watchdog=off", card_4, &["watchdog-node"], |card, _| {
            boots(card, "start4.elf", more_keys(&["dtparam"]));
            boots(card, "config.txt", format!("{CONFIG_4}dtparam=audio=on,watchdog=off\n"))
        }),
        mutant("kernel_watchdog_timeout=yes", card_4, &["watchdog-seconds"], |card, _| {
            change_text(card, "config.txt", "timeout=63", "timeout=yes")
        }),
        mutant("kernel_watchdog_timeout=0", card_4, &["watchdog-seconds"], |card, _| {
            change_text(card, "config.txt", "timeout=63", "timeout=0")
        }),
        mutant("kernel_watchdog_partition", card_4, &["watchdog-partition"], |card, _| {
            boots(card, "start4.elf", more_keys(&["kernel_watchdog_partition"]));
            boots(card, "config.txt", format!("{CONFIG_4}kernel_watchdog_partition=3\n"))
        }),
        mutant("systemd's settings in /usr/lib", card_3, &["watchdog-seconds"], |card, _| {
            let conf = "[Manager]\nRuntimeWatchdogSec=120000ms\n";
            slots(card, "usr/lib/systemd/system.conf.d/90-other.conf", conf)
        }),
        mutant("one slot", card_3, &["slot-alone"], |card, _| card.slots.truncate(1)),
        mutant("a FAT that cannot be read", card_3, &["fat-unreadable"], |card, _| {
            card.volumes[0].unread = Some("it is damaged".to_owned())
        }),
        mutant("sectors of 4 KiB", card_3, &["fat-sector"], |card, _| {
            card.volumes[0].sector = 4096
        }),
    ]
}

#[test]
fn cards_that_look_wrong_and_start_all_the_same() {
    // An `os_prefix` that is ignored (documentation of config.txt, `os_prefix`).
    let mut card = card_4();
    boots(&mut card, "start4.elf", more_keys(&["os_prefix"]));
    boots(&mut card, "config.txt", format!("{CONFIG_4}os_prefix=nothing-there/\n"));
    assert_eq!(shown(&check(&card, &facts())), "", "os_prefix");
    // Raspberry Pi's own names where the kernel's names do not exist (ibid., `upstream_kernel`).
    let mut card = card_3();
    for name in super::stand_in::MODELS_3 {
        let boot = &mut card.volumes[0].files;
        let tree = boot.remove(&format!("bcm2837-rpi-{name}.dtb")).expect("the tree");
        boot.insert(format!("bcm2710-rpi-{name}.dtb"), tree);
    }
    let stops = check(&card, &facts());
    assert_eq!(stops.stops().count(), 0, "{}", shown(&stops));
    // Section names in upper case, a setting for the second port, and one that a later file corrects.
    let mut card = card_4();
    boots(&mut card, "start4.elf", more_keys(&["hdmi_group"]));
    boots(&mut card, "config.txt", format!("[ALL]\n{CONFIG_4}hdmi_group:1=2\n"));
    slots(
        &mut card,
        "etc/systemd/system.conf.d/05-old.conf",
        "[Manager]\nRuntimeWatchdogSec=60s\n",
    );
    assert_eq!(shown(&check(&card, &facts())), "");
    // The kernel's own values for no console.
    for console in ["null", "uart8250,mmio32,0xfe215040"] {
        let mut card = card_4();
        change_text(
            &mut card,
            "cmdline.txt",
            "console=ttyS1,115200",
            &format!("console={console}"),
        );
        assert_eq!(shown(&check(&card, &facts())), "", "{console}");
    }
    // The second slot's files are too large to be checked, on a partition that nothing starts from.
    let mut card = card_3();
    let mut extra = card.volumes[0].clone();
    (extra.number, extra.offset, extra.unread) = (4, 4 << 30, Some("an exFAT".to_owned()));
    extra.files.clear();
    card.volumes.push(extra);
    let verdict = check(&card, &facts());
    assert_eq!(verdict.stops().count(), 0, "{}", shown(&verdict));
}

/// Any change of a few bytes in any file of a good card is checked without a panic and in reasonable time.
#[test]
fn damaged_files_are_judged_without_a_panic() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed >> 33).unwrap_or(0) % below.max(1)
    };
    for round in 0..300 {
        let mut card = [card_3, card_4, card_5][round % 3]();
        for _ in 0..1 + random(4) {
            let (volumes, all) = (card.volumes.len(), card.volumes.len() + card.slots.len());
            let files = match random(all) {
                at if at < volumes => &mut card.volumes[at].files,
                at => &mut card.slots[at - volumes].files,
            };
            let at = random(files.len());
            let Some((_, bytes)) = files.iter_mut().nth(at) else { continue };
            match random(5) {
                0 => bytes.truncate(random(bytes.len() + 1)),
                1 => bytes.extend(vec![[0, 0xff, b'('][random(3)]; random(70_000)]),
                2 => {
                    let half = bytes.len() / 2;
                    bytes.extend_from_within(half..)
                }
                _ => {
                    for _ in 0..1 + random(8) {
                        let at = random(bytes.len());
                        if let Some(byte) = bytes.get_mut(at) {
                            *byte = [0, 0xff, b'9', 0x80, b'='][random(5)];
                        }
                    }
                }
            }
        }
        check(&card, &facts());
    }
}

#[test]
fn trees_that_refer_to_themselves_have_an_end() {
    // Each of 400 clocks waits for all others.
    let numbers: Vec<String> = (1..=60).map(|n| n.to_string()).collect();
    let clocks = format!("clocks = <{}>", numbers.join(" "));
    let mut text = TREE_3.replace("clocks = <7 20>", &clocks);
    for n in 100..500 {
        text.push_str(&format!(
            "/soc/clock@{n}\ncompatible = \"a-clock\"\nphandle = <{}>\n{clocks}\n",
            n - 99
        ));
    }
    let bytes = super::stand_in::tree(&text);
    assert!(DeviceTree::read(&bytes).is_ok());
    let mut card = card_3();
    for_trees(&mut card, &text);
    assert!(check(&card, &facts()).stops().next().is_some());
}
