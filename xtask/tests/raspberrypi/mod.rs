//! Boards and examples with Raspberry Pi's kernel, on packages with the names that its archive has
//! (`fixtures/raspberrypi/packages.toml`): locked from a signed archive of our own, built by the engine, written to a card, and
//! started by the model of the firmware. A wrong name in a board or an example ends in a message that has it.
//!
//! Not shown here: what is in the real packages. Needs apt, dpkg-deb, gpg, depmod, xz, mke2fs, tar.

mod attempt;
mod packages;
// The forms of what boot loaders read are written once.
#[allow(dead_code)]
#[path = "../../../bootmodel/tests/chain/stand_in.rs"]
mod stand_in;

use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use attempt::{Change, attempt};
use packages::{VENDOR, World};
use xtask::rootfs::debian::ArchiveName;
use xtask::rootfs::tree::RootTree;
use xtask::sbom::{self, SbomComponent};

/// One for all tests: its archives are only read.
fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| World::new().expect("archives of our own"))
}

/// Which packages are to come from the archive, and which files the engine takes for the board.
const EXAMPLES: [(&str, &[&str], &[&str]); 2] = [
    (
        "robot-pi4",
        &["firmware-brcm80211", "linux-image-6.12.109+rpt-rpi-v8", "raspi-firmware"],
        &["usr/lib/raspi-firmware/fixup4.dat", "usr/lib/raspi-firmware/start4.elf"],
    ),
    ("robot-pi5", &["firmware-brcm80211", "linux-image-6.12.109+rpt-rpi-v8"], &[]),
];

#[test]
fn an_example_starts_on_every_model_of_its_board() -> Result<()> {
    for (product, vendors, firmware) in EXAMPLES {
        let made = attempt(world(), product, None).with_context(|| format!("trying {product}"))?;
        let from_vendor =
            |archive: &ArchiveName| *archive == ArchiveName::Source(VENDOR.to_owned());
        let mut found: Vec<&str> = Vec::new();
        for package in made.lock.package.iter().filter(|p| from_vendor(&p.archive)) {
            found.push(&package.name);
            let recorded = world().recorded.package.iter().find(|p| p.name == package.name);
            ensure!(recorded.is_some_and(|p| p.version == package.version), "{package:?}");
        }
        found.sort_unstable();
        ensure!(found == vendors, "{product}: {found:?}");

        let taken: Vec<&str> = made.system.firmware.iter().map(|f| f.path.as_str()).collect();
        ensure!(taken == firmware, "{product}: {taken:?}");
        let kernel = world().recorded.kernel()?;
        let release = kernel.name.trim_start_matches("linux-image-");
        ensure!(made.system.kernel_release == release, "{product}: {}", made.system.kernel_release);

        // Modules are kept by the names of rules although they are packed, and others go.
        let modules = RootTree::from_tar(&made.system.initrd_parts.modules.path)?;
        for (path, kept) in [("drivers/net/tun.ko.xz", true), ("drivers/md/dm-crypt.ko.xz", false)]
        {
            let found = modules.get(&format!("kernel/{path}")).is_some();
            ensure!(found == kept, "{product}: {path} is {}kept", if found { "" } else { "not " });
        }

        let told = format!("{:#?}", made.starts);
        ensure!(
            made.starts.stops.is_empty() && made.starts.degrades.is_empty(),
            "{product}: {told}"
        );
        let models: Vec<&str> = made.starts.models.iter().map(|m| m.model.as_str()).collect();
        ensure!(models == made.plan.board.compatible, "{product}: {told}");
        for model in &made.starts.models {
            ensure!(model.starts, "{product}: {told}");
            for step in [format!("Linux {release} runs /init"), "card at ".to_owned()] {
                ensure!(model.steps.iter().any(|(_, what)| what.contains(&step)), "{step}: {told}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_bill_of_materials_says_whose_a_package_is() -> Result<()> {
    let made = attempt(world(), "robot-pi5", None)?;
    let mut vendors = 0;
    for package in &made.system.packages {
        let rootfs = &made.plan.rootfs;
        let component = SbomComponent {
            name: package.name.clone(),
            version: package.version.clone(),
            origin: sbom::debian_origin(package, &rootfs.suite, &rootfs.sources)?,
            sha256: None,
            license: None,
            summary: None,
            cpe: None,
            depends_on: Vec::new(),
        };
        let purl = component.purl();
        let locked =
            made.lock.package.iter().find(|p| p.sha256 == package.sha256).context("locked")?;
        let ours = locked.archive == ArchiveName::Source(VENDOR.to_owned());
        vendors += usize::from(ours);
        let tail = "&distro=bookworm&repository_url=https:%2F%2Farchive.raspberrypi.com%2Fdebian";
        ensure!(purl.starts_with("pkg:deb/raspberrypi/") == ours, "{purl}");
        ensure!(
            purl.ends_with(tail) == ours && purl.starts_with("pkg:deb/debian/") != ours,
            "{purl}"
        );
    }
    ensure!(vendors == 2, "{vendors} packages of the archive");
    Ok(())
}

const PI_4: &str = "board/pi4/board.toml";
const PI_5: &str = "board/pi5/board.toml";
const EXAMPLE_4: &str = "configs/examples/robot-pi4.toml";
const EXAMPLE_5: &str = "configs/examples/robot-pi5.toml";

/// Product, the edit, and the expected message.
const WRONG: [(&str, Change<'_>, &str); 15] = [
    (
        "robot-pi5",
        (PI_5, "bcm2712*.dtb", "bcm2713*.dtb"),
        "no device tree matches 'broadcom/bcm2713*.dtb'",
    ),
    ("robot-pi5", (PI_5, "bcm2712*.dtb", "bcm2712-rpi-5-b.dtb"), "loads bcm2712-rpi-500.dtb"),
    ("robot-pi5", (PI_5, "\"sdhci_brcmstb\"", "\"sdhci_brcm\""), "module sdhci_brcm is neither"),
    (
        "robot-pi5",
        (PI_5, "ethernet/cadence", "ethernet/cadance"),
        "matches 'drivers/net/ethernet/cadance'",
    ),
    (
        "robot-pi5",
        (PI_5, "ttyAMA10", "ttyAMA0"),
        "console=ttyAMA0, but the device tree has no serial0",
    ),
    (
        "robot-pi5",
        ("board/common/raspberrypi.toml", "spi-bcm2835.ko", "spi-bcm2836.ko"),
        "spi-bcm2836.ko'",
    ),
    ("robot-pi5", ("board/common/linux.toml", "\"net/llc\"", "\"net/unix\""), "matches 'net/unix'"),
    (
        "robot-pi4",
        (PI_4, "rpi-cm4*.dtb", "rpi-cm5*.dtb"),
        "no device tree matches 'broadcom/bcm2711-rpi-cm5",
    ),
    (
        "robot-pi4",
        (PI_4, "firmware/start4.elf", "firmware/start5.elf"),
        "no firmware matches 'usr/lib/raspi",
    ),
    (
        "robot-pi4",
        (PI_4, "\"usr/lib/raspi-firmware/fixup4.dat\", ", ""),
        "fixup4.dat, but fixup4.dat does not exist",
    ),
    ("robot-pi4", (PI_4, "\"sdhci_iproc\"", "\"sdhci_iprok\""), "module sdhci_iprok is neither"),
    // Debian's firmware of 2022 takes the archive's place.
    ("robot-pi4", (EXAMPLE_4, "\"raspi-firmware\", ", ""), "is from 2022-08-26 and does not start"),
    ("robot-pi5", (EXAMPLE_5, "-*-rpi-v8\"", "-*-rpi-v9\""), "has no package linux-image-*-rpi-v9"),
    ("robot-pi5", (EXAMPLE_5, "[\"linux-image-rpi-v8\", ", "["), "looking up linux-image-rpi-v8"),
    // Debian's own, which knows no Pi 5.
    ("robot-pi5", (EXAMPLE_5, ", \"firmware-brcm80211\"]", "]"), "this model has no Wi-Fi"),
];

#[test]
fn a_wrong_name_is_told() {
    for (product, change, message) in WRONG {
        let told = match attempt(world(), product, Some(change)) {
            Err(error) => format!("{error:#}"),
            Ok(made) => format!("{:#?}", made.starts),
        };
        assert!(told.contains(message), "{product}, {change:?}: no '{message}' in: {told}");
    }
}
