//! Small files instead of those on a real card: each has only what a stage reads, in the real format. The system
//! tests read the real files.

use std::collections::BTreeMap;
use std::io::Write;

use bootmodel::chain::card::{
    BootStatePlaces, CardContent, CardSlot, DeviceFacts, FatVolume, MbrEntry,
};

/// The script that the real initrd has.
pub const INIT: &str = include_str!("../../../board/common/init");

/// A device tree from text: `path` opens a node, `name = value` sets a property; numbers in `<>`, strings in quotes.
pub fn tree(text: &str) -> Vec<u8> {
    let mut strings: Vec<u8> = Vec::new();
    let mut out: Vec<u8> = Vec::new();
    let word = |out: &mut Vec<u8>, n: usize| out.extend((n as u32).to_be_bytes());
    let padded = |out: &mut Vec<u8>, bytes: &[u8]| {
        out.extend(bytes);
        out.resize(out.len().div_ceil(4) * 4, 0);
    };
    let mut open: Vec<&str> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(" = ") {
            let mut bytes = Vec::new();
            if let Some(numbers) = value.strip_prefix('<') {
                for number in numbers.trim_end_matches('>').split(' ') {
                    bytes.extend(number.parse::<u32>().expect("a number").to_be_bytes());
                }
            } else {
                for part in value.split(", ") {
                    bytes.extend(part.trim_matches('"').as_bytes());
                    bytes.push(0);
                }
            }
            word(&mut out, 3);
            word(&mut out, bytes.len());
            word(&mut out, strings.len());
            padded(&mut out, &bytes);
            strings.extend(name.as_bytes());
            strings.push(0);
            continue;
        }
        let parts: Vec<&str> = line.split('/').collect();
        let wanted: Vec<&str> = if line == "/" { vec![""] } else { parts };
        let same = open.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
        for _ in same..open.len() {
            word(&mut out, 2);
        }
        open.truncate(same);
        for name in &wanted[same..] {
            word(&mut out, 1);
            let mut name_bytes = name.as_bytes().to_vec();
            name_bytes.push(0);
            padded(&mut out, &name_bytes);
            open.push(name);
        }
    }
    for _ in 0..open.len() {
        word(&mut out, 2);
    }
    word(&mut out, 9);
    let header = 40;
    let mut all = Vec::new();
    for n in
        [0xd00d_feed, header + out.len() + strings.len(), header, header + out.len(), header - 16]
    {
        word(&mut all, n);
    }
    for n in [17, 16, 0, strings.len(), out.len()] {
        word(&mut all, n);
    }
    all.extend(out);
    all.extend(strings);
    all
}

/// A kernel with built-in drivers for these devices.
pub fn kernel(version: &str, built_in: &[&str]) -> Vec<u8> {
    let mut image = vec![0; 64];
    image[16..24].copy_from_slice(&(48u64 << 20).to_le_bytes());
    image[56..60].copy_from_slice(b"ARM\x64");
    image.extend(format!("Linux version {version} (gcc)\0").as_bytes());
    // The same words outside of a match table are ignored.
    image.extend(b"regulator-fixed\0regulator-gpio\0");
    image.resize(1024, 0);
    for name in built_in {
        image.extend([0; 64]);
        image.extend(name.as_bytes());
        image.resize(image.len() + 128 - name.len(), 0);
        image.extend([1; 8]);
    }
    image
}

/// Stored uncompressed: flate2's compressor depends on what else is built, and golden messages contain lengths.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    out.write_all(bytes).expect("memory");
    out.finish().expect("memory")
}

/// An initrd with this script and these modules, each with its aliases.
pub fn initrd(init: &str, modules: &[(&str, &[&str])]) -> Vec<u8> {
    let mut files = vec![("init".to_owned(), init.as_bytes().to_vec())];
    let mut list = String::new();
    for (name, aliases) in modules {
        let path = format!("lib/modules/6/kernel/{name}.ko");
        list.push_str(&format!("/{path}\n"));
        let mut bytes = b"ELF\0".to_vec();
        for alias in *aliases {
            bytes.extend(format!("alias=of:N*T*C{alias}C*\0alias=of:N*T*C{alias}\0").as_bytes());
        }
        files.push((path, bytes));
    }
    files.push(("etc/modules".to_owned(), list.into_bytes()));
    let mut out = Vec::new();
    for (name, bytes) in files {
        let mut file =
            cpio::newc::Builder::new(&name).mode(0o100_644).write(&mut out, bytes.len() as u32);
        file.write_all(&bytes).expect("memory");
        file.finish().expect("memory");
    }
    gzip(&cpio::newc::trailer(out).expect("memory"))
}

/// The firmware's program with these keys.
pub fn firmware(day: &str, keys: &[&str]) -> Vec<u8> {
    let mut out = b"\0VC_BUILD_ID_TIME: 14:04:36\0".to_vec();
    out.extend(
        format!("VC_BUILD_ID_TIME: {day}\0initramfs %64s %i \0[all]\0[tryboot]\0cm4\0pi4\0")
            .as_bytes(),
    );
    for key in keys {
        out.extend(key.as_bytes());
        out.push(0);
    }
    out
}

pub const FIXUP: &[u8] = &[0x0f, 0x13, 0x03, 0x0f];

/// U-Boot with this environment and these names of boards.
pub fn uboot(version: &str, environment: &str, trees: &[&str]) -> Vec<u8> {
    let mut out = b"text\0".to_vec();
    for line in environment.lines() {
        out.extend(line.trim().as_bytes());
        out.push(0);
    }
    out.extend(b"\0uboot.env\0");
    for tree in trees {
        out.extend(format!("broadcom/{tree}\0").as_bytes());
    }
    out.extend(format!("U-Boot {version}+dfsg-2 (Jun 22 2026)\0").as_bytes());
    out
}

/// `uboot.env` with these lines.
pub fn environment(text: &str) -> Vec<u8> {
    let mut data = Vec::new();
    for line in text.lines() {
        data.extend(line.trim().as_bytes());
        data.push(0);
    }
    data.resize(0x4000 - 4, 0);
    let mut out = crc32fast::hash(&data).to_le_bytes().to_vec();
    out.extend(data);
    out
}

/// A script as `mkimage` wraps it.
pub fn script(text: &str) -> Vec<u8> {
    let mut body = (text.len() as u32).to_be_bytes().to_vec();
    body.extend([0; 4]);
    body.extend(text.as_bytes());
    let mut out = vec![0; 64];
    out[..4].copy_from_slice(&[0x27, 0x05, 0x19, 0x56]);
    out[12..16].copy_from_slice(&(body.len() as u32).to_be_bytes());
    out[24..28].copy_from_slice(&crc32fast::hash(&body).to_be_bytes());
    out[30] = 6;
    let head = crc32fast::hash(&out);
    out[4..8].copy_from_slice(&head.to_be_bytes());
    out.extend(body);
    out
}

const MIB: u64 = 1 << 20;

fn volume(number: u32, at: u64, kind: u8, clusters: u64) -> FatVolume {
    let width = if clusters < 65_525 { 16 } else { 32 };
    FatVolume {
        number,
        name: String::new(),
        offset: at * MIB,
        kind: Some(kind),
        says: format!("FAT{width}"),
        clusters,
        cluster_sectors: 1,
        sector: 512,
        files: BTreeMap::new(),
        left_out: Vec::new(),
        unread: None,
    }
}

fn put(files: &mut BTreeMap<String, Vec<u8>>, name: &str, bytes: impl AsRef<[u8]>) {
    files.insert(name.to_owned(), bytes.as_ref().to_vec());
}

fn slot(number: u32) -> CardSlot {
    let mut slot = CardSlot { number, files: BTreeMap::new() };
    let conf = "[Manager]\nRuntimeWatchdogSec=63s\nRebootWatchdogSec=127s\n";
    put(&mut slot.files, "etc/systemd/system.conf.d/10-slipway.conf", conf);
    let alias = "alias of:N*T*Cregulator-fixedC* fixed\nalias of:N*T*Cregulator-fixed fixed\n\
         alias of:N*T*Cregulator-gpio gpio_regulator\n";
    put(&mut slot.files, "usr/lib/modules/6/modules.alias", alias);
    put(
        &mut slot.files,
        "usr/lib/modules/6/modules.builtin",
        "kernel/drivers/clk/clk-raspberrypi.ko\n",
    );
    for name in [
        "3-model-b",
        "3-model-b-plus",
        "3-model-a-plus",
        "4-model-b",
        "400",
        "4-compute-module",
        "5-model-b",
        "500",
        "5-compute-module",
    ] {
        put(
            &mut slot.files,
            &format!("usr/lib/firmware/brcm/brcmfmac43455-sdio.raspberrypi,{name}.txt"),
            "",
        );
    }
    slot
}

fn device(flow: &str, compatible: &[&str]) -> DeviceFacts {
    DeviceFacts {
        board: "a-board".to_owned(),
        compatible: compatible.iter().map(|name| (*name).to_owned()).collect(),
        boot_flow: flow.to_owned(),
        eeprom_since: Some("2022-11-25".to_owned()),
        left_out_revisions: Vec::new(),
        boot_state: BootStatePlaces::default(),
    }
}

const WORDS: &str = "console=tty0 console=ttyS1,115200 ro panic=10 watchdog.open_timeout=120 cfg80211.ieee80211_regdom=DE";
const COMMON: [&str; 4] =
    ["simple-bus", "brcm,bcm2835-cprman", "brcm,bcm2835-dma", "brcm,bcm2835-gpio"];

/// A tree whose card hangs on a clock, a DMA channel and pins, as a Raspberry Pi 3's does; the clock names a port that is off.
pub const TREE_3: &str = r#"
/
/aliases
serial1 = "/soc/serial@7e215040"
/soc
compatible = "simple-bus"
/soc/cprman@7e101000
compatible = "brcm,bcm2835-cprman"
#clock-cells = <1>
phandle = <7>
clocks = <40 0>
/soc/dsi@7e700000
compatible = "brcm,bcm2835-dsi1"
#clock-cells = <1>
phandle = <40>
status = "disabled"
/soc/dma@7e007000
compatible = "brcm,bcm2835-dma"
#dma-cells = <1>
phandle = <11>
/soc/gpio@7e200000
compatible = "brcm,bcm2835-gpio"
/soc/gpio@7e200000/sdhost_gpio48
phandle = <12>
/soc/mmc@7e202000
compatible = "brcm,bcm2835-sdhost"
status = "okay"
clocks = <7 20>
dmas = <11 13>
pinctrl-0 = <12>
/soc/mmc@7e300000
compatible = "brcm,bcm2835-sdhci"
/soc/serial@7e215040
compatible = "brcm,bcm2835-aux-uart"
/soc/watchdog@7e100000
compatible = "brcm,bcm2835-pm", "brcm,bcm2835-pm-wdt"
"#;

pub const SCRIPT: &str = r#"
setenv slipway_boot 'part uuid ${slipway_from} slipway_uuid && run slipway_load_fdt && load ${slipway_from} 0x09000000 /boot/initrd.img && load ${slipway_from} 0x0c000000 /boot/vmlinuz && run slipway_start'
setenv slipway_load_fdt 'load ${slipway_from} 0x0b000000 /boot/dtbs/${fdtfile} && setenv slipway_fdt 0x0b000000'
setenv kernel_comp_addr_r 0x10000000
setenv kernel_comp_size 0x04000000
mw.l 0x3f100024 0x5a0fffff; mw.l 0x3f10001c 0x5a000020
setenv slipway_start 'setenv bootargs "root=PARTUUID=${slipway_uuid} slipway.slot=${slipway_slot} WORDS"; booti 0x0c000000 0x09000000:${slipway_initrd_size} ${slipway_fdt}'
reset
"#;

pub const ENVIRONMENT: &str =
    "bootdelay=-2\npreboot=\nbootcmd=load mmc 0:1 0x02400000 boot.scr && source 0x02400000; reset";
pub const DISTRO: &str = "bootcmd=run distro_bootcmd\nbootdelay=2\npreboot=usb start\nboot_targets=mmc0 usb0 pxe dhcp\ndistro_bootcmd=for target in ${boot_targets}; do run bootcmd_${target}; done";
pub const CONFIG_3: &str = "# Generated\narm_64bit=1\nkernel=u-boot.bin\nupstream_kernel=1\nenable_uart=1\ndisable_splash=1\ninitial_turbo=0\n";
const KEYS: [&str; 9] = [
    "arm_64bit",
    "kernel",
    "upstream_kernel",
    "enable_uart",
    "disable_splash",
    "initial_turbo",
    "dtoverlay",
    "dtparam",
    "otg_mode",
];
pub const MODELS_3: [&str; 3] = ["3-b", "3-b-plus", "3-a-plus"];

/// A good card for the Raspberry Pi 3: MBR, U-Boot, two slots.
pub fn card_3() -> CardContent {
    let mut boot = volume(1, 32, 0x0c, 130_000);
    put(
        &mut boot.files,
        "bootcode.bin",
        b"\0gpu_mem\0gpu_mem_1024\0start_x\0start_file\0fixup_file\0",
    );
    put(&mut boot.files, "start.elf", firmware("Aug 26 2022", &KEYS));
    put(&mut boot.files, "fixup.dat", FIXUP);
    put(&mut boot.files, "config.txt", CONFIG_3);
    put(&mut boot.files, "uboot.env", environment(ENVIRONMENT));
    put(&mut boot.files, "boot.scr", script(&SCRIPT.replace("WORDS", WORDS)));
    let names: Vec<String> =
        MODELS_3.iter().map(|name| format!("bcm2837-rpi-{name}.dtb")).collect();
    let refs: Vec<&str> = names.iter().map(String::as_str).collect();
    put(&mut boot.files, "u-boot.bin", uboot("2023.01", DISTRO, &refs));
    let mut slots = vec![slot(2), slot(3)];
    let image = gzip(&kernel("6.1.0-56-arm64", &COMMON));
    let modules: [(&str, &[&str]); 3] =
        [("bcm2835_wdt", &[]), ("bcm2835", &["brcm,bcm2835-sdhost"]), ("ext4", &[])];
    for slot in &mut slots {
        put(&mut slot.files, "boot/vmlinuz", &image);
        put(&mut slot.files, "boot/initrd.img", initrd(INIT_GOOD, &modules));
    }
    for name in &names {
        put(&mut boot.files, name, tree(TREE_3));
        for slot in &mut slots {
            put(&mut slot.files, &format!("boot/dtbs/broadcom/{name}"), tree(TREE_3));
        }
    }
    let compatible =
        ["raspberrypi,3-model-b", "raspberrypi,3-model-b-plus", "raspberrypi,3-model-a-plus"];
    let mut device = device("uboot", &compatible);
    device.boot_state.sectors = vec![16_384, 32_768];
    let record = |number: u32, kind: u8, at: u64| MbrEntry {
        number,
        kind,
        offset: at * MIB,
        size: 64 * MIB,
    };
    CardContent {
        records: vec![record(1, 0x0c, 32), record(2, 0x83, 96), record(3, 0x83, 1120)],
        gpt: None,
        partitions: [(1, 32 * MIB), (2, 96 * MIB), (3, 1120 * MIB)].into(),
        volumes: vec![boot],
        slots,
        device,
    }
}

/// The rule of `/init` as it must be, with the lines around it.
pub const INIT_GOOD: &str = r#"#!/bin/busybox sh
begin_trial() {
    left=$((deadline - $(seconds)))
    [ "$left" -gt 10 ] || left=10
    [ "$left" -lt 16 ] || left=$(((left + 1) / 16 * 16 - 1))
    watched=no
}
deadline=300
"#;

/// The earlier rule.
pub const INIT_OLD: &str = r#"#!/bin/busybox sh
begin_trial() {
    left=$((deadline - $(seconds)))
    [ "$left" -gt 10 ] || left=10
    watched=no
}
deadline=300
"#;

/// A tree whose card hangs on two regulators, as a Raspberry Pi 4's does; the clock and a port wait for each other.
pub const TREE_4: &str = r#"
/
/aliases
serial1 = "/soc/serial@7e215040"
/soc
compatible = "simple-bus"
/soc/cprman@7e101000
compatible = "brcm,bcm2835-cprman"
#clock-cells = <1>
phandle = <7>
clocks = <40 0>
/soc/dsi@7e700000
compatible = "brcm,bcm2711-dsi1"
#clock-cells = <1>
phandle = <40>
clocks = <7 35>
/soc/gpio@7e200000
compatible = "brcm,bcm2835-gpio"
#gpio-cells = <2>
phandle = <11>
/soc/serial@7e215040
compatible = "brcm,bcm2835-aux-uart"
/soc/watchdog@7e100000
compatible = "brcm,bcm2711-pm", "brcm,bcm2835-pm-wdt"
/emmc2bus
compatible = "simple-bus"
/emmc2bus/mmc@7e340000
compatible = "brcm,bcm2711-emmc2"
clocks = <7 51>
vqmmc-supply = <32>
vmmc-supply = <33>
/sd_io_1v8_reg
compatible = "regulator-gpio"
phandle = <32>
gpios = <11 4 0>
/sd_vcc_reg
compatible = "regulator-fixed"
phandle = <33>
gpio = <11 6 0>
"#;

pub const CONFIG_4: &str = "arm_64bit=1\nkernel=kernel8.img\ninitramfs initrd.img followkernel\nupstream_kernel=1\nenable_uart=1\n[cm4]\notg_mode=1\n[all]\n[tryboot]\nkernel_watchdog_timeout=63\ndtparam=watchdog=on\n[all]\n";
pub const AUTOBOOT: &str = "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n";
const CLOCKS: [(&str, &[&str]); 4] = [
    ("bcm2835_wdt", &[]),
    ("fixed", &["regulator-fixed"]),
    ("gpio-regulator", &["regulator-gpio"]),
    ("sdhci-iproc", &["brcm,bcm2711-emmc2"]),
];

/// The modules of a good Raspberry Pi 4's initrd.
pub fn modules_4() -> Vec<(&'static str, &'static [&'static str])> {
    CLOCKS.to_vec()
}

/// A good card for the Raspberry Pi 4 with the firmware's own choice of a slot: MBR with logical partitions.
pub fn card_4() -> CardContent {
    let mut keys = KEYS.to_vec();
    keys.push("kernel_watchdog_timeout");
    let mut first = volume(1, 32, 0x0e, 32_000);
    put(&mut first.files, "autoboot.txt", AUTOBOOT);
    let mut volumes = vec![first];
    for (number, at) in [(2, 48), (3, 144)] {
        let mut boot = volume(number, at, 0x0c, 190_000);
        put(&mut boot.files, "start4.elf", firmware("May  7 2025", &keys));
        put(&mut boot.files, "fixup4.dat", FIXUP);
        put(&mut boot.files, "config.txt", CONFIG_4);
        put(&mut boot.files, "cmdline.txt", format!("{WORDS} slipway.tryboot=2:a,3:b\n"));
        put(&mut boot.files, "kernel8.img", gzip(&kernel("6.12.25-v8", &COMMON)));
        put(&mut boot.files, "initrd.img", initrd(INIT_GOOD, &CLOCKS));
        for name in ["4-b", "400", "cm4"] {
            put(&mut boot.files, &format!("bcm2711-rpi-{name}.dtb"), tree(TREE_4));
        }
        volumes.push(boot);
    }
    let record =
        |number: u32, kind: u8, at: u64| MbrEntry { number, kind, offset: at * MIB, size: 8 * MIB };
    let compatible = ["raspberrypi,4-model-b", "raspberrypi,400", "raspberrypi,4-compute-module"];
    CardContent {
        records: vec![
            record(1, 0x0e, 32),
            record(2, 0x0c, 48),
            record(3, 0x0c, 144),
            record(4, 0x0f, 240),
            record(5, 0x83, 248),
        ],
        gpt: None,
        partitions: [(1, 32 * MIB), (2, 48 * MIB), (3, 144 * MIB), (5, 248 * MIB), (6, 1272 * MIB)]
            .into(),
        volumes,
        slots: vec![slot(5), slot(6)],
        device: device("tryboot", &compatible),
    }
}

/// A good card for the Raspberry Pi 5: as the 4's, without firmware.
pub fn card_5() -> CardContent {
    let mut card = card_4();
    let tree_5 = tree(
        &TREE_4
            .replace("brcm,bcm2711-emmc2", "brcm,bcm2712-sdhci")
            .replace("serial1", "serial10")
            .replace("brcm,bcm2835-aux-uart", "arm,pl011"),
    );
    let names = ["5-b", "500", "cm5-cm5io", "cm5-cm4io", "cm5l-cm5io", "cm5l-cm4io"];
    for volume in card.volumes.iter_mut().skip(1) {
        volume.files.retain(|name, _| {
            !name.ends_with(".dtb") && !name.ends_with("4.elf") && !name.ends_with("4.dat")
        });
        for name in names {
            put(&mut volume.files, &format!("bcm2712-rpi-{name}.dtb"), &tree_5);
        }
        put(&mut volume.files, "bcm2712d0-rpi-5-b.dtb", &tree_5);
        put(
            &mut volume.files,
            "cmdline.txt",
            format!("{} slipway.tryboot=2:a,3:b\n", WORDS.replace("ttyS1", "ttyAMA10")),
        );
        let mut built_in = COMMON.to_vec();
        built_in.extend(["brcm,bcm2712-sdhci", "regulator-fixed", "regulator-gpio"]);
        put(&mut volume.files, "kernel8.img", gzip(&kernel("6.12.25-v8", &built_in)));
        put(&mut volume.files, "initrd.img", initrd(INIT_GOOD, &[("ext4", &[])]));
    }
    for slot in &mut card.slots {
        put(
            &mut slot.files,
            "usr/lib/modules/6/modules.builtin",
            "kernel/drivers/watchdog/bcm2835_wdt.ko\n",
        );
    }
    card.device.compatible =
        ["raspberrypi,5-model-b", "raspberrypi,500", "raspberrypi,5-compute-module"]
            .map(str::to_owned)
            .to_vec();
    card
}
