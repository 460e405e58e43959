//! Compares the boards with documented facts about their hardware: the watchdog's arithmetic, the firmware's choice of
//! files, the positions of the boot state, the environment of U-Boot. The sources are in the boards' files.

use crate::common::{copy_to, root};

use std::process::Command;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::build::environment;
use xtask::config;
use xtask::config::board::BootFlowKind;
use xtask::disk::{TableKind, layout::Filesystem};
use xtask::plan::{BootSourcePlan, Plan};
use xtask::render::{OverlayContent, RenderedFiles, render};
use xtask::rootfs::PackageRole;
use xtask::rootfs::debian::PackagesLock;
use xtask::workspace::{BuildSelection, resolve_plan};

/// Seconds that the hardware of a Raspberry Pi counts when it is given `seconds`: 20 bits of 1/65,536 s
/// (`bcm2835_wdt_start` in Linux, drivers/watchdog/bcm2835_wdt.c).
fn counted(seconds: u64) -> u64 {
    seconds % 16
}

/// How often the kernel feeds it: half of `max_hw_heartbeat_ms`, 15,999 (`watchdog_dev.c`).
const FED_EVERY: u64 = 8;

/// A driver that is given so many seconds resets no system that runs well.
fn holds(seconds: u64) -> bool {
    counted(seconds) > FED_EVERY + 3 || seconds < 16
}

/// Every product for every board of its list.
fn builds() -> Result<Vec<(Plan, RenderedFiles)>> {
    let root = root();
    let mut builds = Vec::new();
    for product in config::list_products(&root)? {
        for board in &config::read_product(&root, &product)?.boards {
            builds.push(build(&product, &board.value.0)?);
        }
    }
    Ok(builds)
}

fn build(product: &str, board: &str) -> Result<(Plan, RenderedFiles)> {
    let target =
        BuildSelection { product: Some(product.to_owned()), board: Some(board.to_owned()) };
    let (config, _, plan) = resolve_plan(&target)?;
    let rendered = render(&config.root, &plan)?;
    Ok((plan, rendered))
}

fn text(rendered: &RenderedFiles, role: &str, path: &str) -> Option<String> {
    let bytes = rendered.boot.get(&(role.to_owned(), path.to_owned()))?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

/// The settings of a file of the firmware: no comments, no sections.
fn settings(text: &str) -> Vec<(&str, &str)> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(|l| l.split_once('=')).collect()
}

fn is_pi(plan: &Plan) -> bool {
    plan.board.compatible.iter().any(|name| name.starts_with("raspberrypi,"))
}

#[test]
fn every_second_that_a_watchdog_is_given_is_one_that_it_can_count() -> Result<()> {
    for (plan, rendered) in builds()? {
        let name = plan.stem();
        let system = rendered.overlay.iter().find_map(|entry| match &entry.content {
            OverlayContent::File(bytes)
                if entry.target.ends_with("system.conf.d/10-slipway.conf") =>
            {
                Some(String::from_utf8_lossy(bytes).into_owned())
            }
            _ => None,
        });
        let system = system.context("systemd's settings")?;
        let watchdogs: Vec<_> =
            settings(&system).into_iter().filter(|(key, _)| key.ends_with("WatchdogSec")).collect();
        ensure!(watchdogs.len() == 2, "{watchdogs:?}");
        for (key, value) in watchdogs {
            let seconds = value.strip_suffix('s').context("seconds")?.parse()?;
            ensure!(holds(seconds), "{name}: {key} {value} is {} s", counted(seconds));
        }
        let config = text(&rendered, "boot-a", "config.txt").unwrap_or_default();
        for (_, value) in settings(&config).iter().filter(|(k, _)| k.contains("watchdog_timeout")) {
            ensure!(holds(value.parse()?), "{name}: kernel_watchdog_timeout={value}");
        }
    }
    Ok(())
}

/// The initrd's own lines, run by a shell: for every start and every deadline the hardware is given what it can count, and
/// a hang ends no later than the deadline and what the hardware still counts.
#[test]
fn a_trial_is_given_to_the_watchdog_in_whole_turns_of_its_counter() -> Result<()> {
    let init = std::fs::read_to_string(root().join("board/common/init"))?;
    let begin = init.find("    left=$((deadline - $(seconds)))").context("begin_trial")?;
    let lines = &init[begin..begin + init[begin..].find("    watched=no").context("its end")?];
    let deadlines = (20..=1800).step_by(89).chain([60, 120, 300, 600, 1800]);
    let script = format!(
        "for deadline in {}; do now=0; while [ $now -le 120 ]; do seconds() {{ echo $now; }}\n{lines}\
         echo \"$deadline $now $left\"; now=$((now + 1)); done; done",
        deadlines.map(|d| d.to_string()).collect::<Vec<_>>().join(" ")
    );
    // The initrd's shell is busybox's; any that POSIX describes counts the same.
    let output = Command::new("sh").args(["-c", &script]).output().context("running a shell")?;
    let printed = String::from_utf8(output.stdout)?;
    let mut tried = 0;
    for line in printed.lines() {
        let numbers: Vec<u64> = line.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let [deadline, now, left] = numbers[..] else { anyhow::bail!("{line}") };
        ensure!(
            holds(left),
            "deadline {deadline}, started at {now}: {left} s are {} s",
            counted(left)
        );
        let wanted = deadline.saturating_sub(now).max(10);
        ensure!(left <= wanted && left + 16 > wanted, "deadline {deadline}, at {now}: {left} s");
        tried += 1;
    }
    ensure!(tried > 2_000, "only {tried}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// `bootcode.bin` takes `start_cd.elf` and `fixup_cd.dat` for less than 32 MiB, and reads neither sections nor comments of
/// a line (raspberrypi/documentation, memory options).
#[test]
fn the_firmware_asks_for_no_file_that_the_card_lacks() -> Result<()> {
    for (plan, rendered) in builds()?.iter().filter(|(plan, _)| is_pi(plan)) {
        let name = plan.stem();
        for role in ["boot", "boot-a", "boot-b"] {
            let Some(config) = text(rendered, role, "config.txt") else { continue };
            for (key, value) in settings(&config) {
                let small = key.starts_with("gpu_mem") && value.parse::<u32>()? < 32;
                ensure!(!small, "{name}: {key}={value} asks for start_cd.elf");
                let other = ["start_x", "start_debug", "start_file", "fixup_file"].contains(&key);
                ensure!(!other, "{name}: {key} asks for another start file");
            }
            let long = config.lines().find(|line| line.len() > 98);
            ensure!(long.is_none(), "{name}: the firmware cuts {long:?}");
            ensure!(settings(&config).contains(&("arm_64bit", "1")), "{name}");
        }
    }
    Ok(())
}

#[test]
fn cards_have_a_table_that_old_firmware_reads() -> Result<()> {
    for (plan, _) in builds()?.iter().filter(|(plan, _)| is_pi(plan)) {
        let name = plan.stem();
        ensure!(plan.disk.table == TableKind::Mbr, "{name}: {:?}", plan.disk.table);
        let fats = plan.disk.partitions.iter().filter(|p| p.filesystem == Filesystem::Vfat);
        ensure!(fats.clone().all(|p| p.number <= 3), "{name}: a FAT is not a primary partition");
        ensure!(
            !plan.board.cmdline.contains(&"gpt".to_owned()),
            "{name}: a GPT left on the card counts"
        );
        if plan.board.boot_flow == BootFlowKind::Tryboot {
            let boot = plan.boot_files.iter().filter(|file| file.partition == "boot");
            let only: Vec<&str> = boot.map(|file| file.path.as_str()).collect();
            ensure!(only == ["autoboot.txt"], "{name}: `boot` holds {only:?}");
        }
    }
    Ok(())
}

/// Cards of November 2026: what they have must be what device.toml lists for them.
#[test]
fn earlier_cards_are_listed_as_they_were_flashed() -> Result<()> {
    for (plan, rendered) in builds()? {
        let name = plan.stem();
        let device = rendered.overlay.iter().find_map(|entry| match &entry.content {
            OverlayContent::File(bytes) if entry.target.ends_with("slipway/device.toml") => {
                Some(String::from_utf8_lossy(bytes).into_owned())
            }
            _ => None,
        });
        let device: toml::Table = device.context("device.toml")?.parse()?;
        let cards = device["earlier-cards"].as_array().context("earlier cards")?;
        ensure!(cards.len() == 1, "{name}: {} kinds", cards.len());
        let at = |role: &str| {
            let partition = &cards[0]["partitions"][role];
            let number = |key: &str| partition[key].as_integer().expect("a number");
            (number("number"), number("start-sector"), number("sectors"))
        };
        // From the images of that time, by sfdisk.
        let states = cards[0]["boot-state"]["sectors"].as_array().context("sectors")?.len();
        match plan.board.boot_flow {
            BootFlowKind::Uboot => {
                ensure!(at("boot") == (1, 8192, 131_072), "{name}: {:?}", at("boot"));
                ensure!(at("root-a") == (2, 139_264, 2_097_152), "{name}: {:?}", at("root-a"));
                ensure!(at("root-b") == (3, 2_236_416, 2_097_152), "{name}: {:?}", at("root-b"));
                ensure!(at("data") == (4, 4_333_568, 524_288), "{name}: {:?}", at("data"));
                ensure!(states == 2, "{name}");
            }
            BootFlowKind::Tryboot => {
                ensure!(at("boot") == (1, 8192, 32_768), "{name}: {:?}", at("boot"));
                ensure!(at("boot-a") == (2, 40_960, 196_608), "{name}: {:?}", at("boot-a"));
                ensure!(at("boot-b") == (3, 237_568, 196_608), "{name}: {:?}", at("boot-b"));
                ensure!(at("root-a") == (4, 434_176, 2_097_152), "{name}: {:?}", at("root-a"));
                ensure!(at("root-b") == (5, 2_531_328, 2_097_152), "{name}: {:?}", at("root-b"));
                ensure!(at("data") == (6, 4_628_480, 524_288), "{name}: {:?}", at("data"));
                ensure!(states == 0, "{name}");
            }
        }
        // The new image's partitions fit the old card's: an update writes whole partitions.
        for role in ["root-a", "root-b", "boot-a"] {
            if let Some(now) = plan.disk.partition(role) {
                ensure!(at(role).2 == now.sectors as i64, "{name}: {role} has another size");
            }
        }
    }
    Ok(())
}

/// Nothing but our script starts, and no input stops it; the same for a U-Boot that reads a file and one that is built here.
#[test]
fn u_boot_starts_our_script_and_nothing_else() -> Result<()> {
    let built = std::fs::read_to_string(root().join("external/u-boot/raspberrypi.fragment"))?
        + &std::fs::read_to_string(root().join("external/u-boot/common.fragment"))?;
    for line in
        ["CONFIG_BOOTDELAY=-2", "CONFIG_ENV_IS_NOWHERE=y", "# CONFIG_USE_PREBOOT is not set"]
    {
        ensure!(built.lines().any(|found| found == line), "the fragments lack {line}");
    }
    let boot = built.lines().find_map(|line| line.strip_prefix("CONFIG_BOOTCOMMAND="));
    let compiled = boot.context("CONFIG_BOOTCOMMAND")?.trim_matches('"');
    let mut read = 0;
    for (plan, rendered) in builds()?.iter().filter(|(plan, _)| is_pi(plan)) {
        let name = plan.stem();
        let Some(text) = text(rendered, "boot", "uboot.env") else { continue };
        read += 1;
        let variables = settings(&text);
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| *v);
        ensure!(get("bootdelay") == Some("-2"), "{name}: a key stops it");
        ensure!(get("stdin") == Some("nulldev"), "{name}: Ctrl-C stops the script");
        ensure!(get("preboot").is_none(), "{name}: {:?}", get("preboot"));
        let boot = get("bootcmd").context("bootcmd")?;
        ensure!(boot.ends_with("; reset"), "{name}: a prompt follows: {boot}");
        for foreign in ["usb", "pxe", "dhcp", "distro", "bootflow"] {
            ensure!(!text.contains(foreign), "{name}: {foreign} in {text}");
        }
        let head = "setenv stdin nulldev; setenv devtype mmc; setenv devnum 0; mmc dev 0; ";
        let same = compiled.strip_prefix(head).context("another head")?;
        ensure!(boot.strip_prefix("mmc dev 0; ") == Some(same), "{name}: {boot}\n{compiled}");
        let packed = environment::pack_environment(text.as_bytes())?;
        ensure!(packed.len() == 0x4000, "{} bytes", packed.len());
    }
    ensure!(read == 2, "{read} boards of Debian's U-Boot");
    Ok(())
}

/// A kernel that hangs or panics before its own driver is there is reset: on a trial only, and not where QEMU runs it.
#[test]
fn a_trial_starts_the_watchdog_before_the_kernel() -> Result<()> {
    for (plan, rendered) in builds()?.iter().filter(|(plan, _)| is_pi(plan)) {
        if plan.board.boot_flow != BootFlowKind::Uboot {
            continue;
        }
        let name = plan.stem();
        let script = text(rendered, "boot", "boot.scr").context("a script")?;
        let start = plan.board.uboot.get("watchdog-start").context("watchdog-start")?;
        let lines: Vec<&str> = script.lines().map(str::trim).collect();
        let at = |wanted: &str| {
            let mut found = lines.iter().enumerate().filter(|(_, line)| **line == wanted);
            found.next().map(|(n, _)| n).with_context(|| format!("{name}: no line {wanted}"))
        };
        let (armed, trial) =
            (at(&format!("setenv slipway_guard '{start}'"))?, at("run slipway_boot")?);
        ensure!(armed < trial, "{name}: started too late");
        ensure!(
            lines[armed - 1] == "if test -z \"${slipway_extra}\"; then",
            "{name}: in QEMU, too"
        );
        let disarmed = lines.iter().rposition(|line| *line == "setenv slipway_guard 'true'");
        let committed = at("setenv slipway_slot ${slipway_active}")?;
        ensure!(disarmed.is_some_and(|n| n > trial && n < committed), "{name}: for every start");
        ensure!(
            script.contains("run slipway_guard; booti "),
            "{name}: not right before the kernel"
        );
        ensure!(
            plan.board.initrd_modules[0] == "bcm2835_wdt",
            "{name}: the driver must come first"
        );
    }
    Ok(())
}

/// In a lab robot that line drives the motors.
#[test]
fn a_product_without_a_console_is_silent_on_the_serial_line() -> Result<()> {
    let root = root();
    let boards =
        [("robot-dev", "pi3"), ("robot-dev", "pi4-uboot"), ("robot", "pi4"), ("robot", "pi5")];
    // None, or one on another port.
    for device in [None, Some("ttyUSB0")] {
        for (product, board) in boards {
            let mut config = config::load(&root, Some(product), Some(board))?;
            let place = config.product.place.clone();
            let value = config::product::ConsoleDevice(device.map(str::to_owned));
            config.product.console = Some(config::reader::Located { value, place });
            let facts =
                xtask::plan::CheckoutFacts { commit: None, modified: false, epoch: 1_700_000_000 };
            let plan = xtask::plan::resolve(&config, &facts)?;
            let rendered = render(&root, &plan)?;
            for (file, bytes) in &rendered.boot {
                let text = String::from_utf8_lossy(bytes);
                let words = text.split([' ', '"', '\n', ',']);
                let mut serial = words.clone().filter_map(|word| word.strip_prefix("console="));
                let serial = serial.find(|port| *port != "tty0" && Some(*port) != device);
                ensure!(serial.is_none(), "{board}: {file:?} has {serial:?}");
                ensure!(!words.clone().any(|word| word == "enable_uart=1"), "{board}: {file:?}");
                ensure!(!text.contains("stdout=serial"), "{board}: {file:?}");
            }
            ensure!(
                plan.board.cmdline.contains(&"console=tty0".to_owned()),
                "{:?}",
                plan.board.cmdline
            );
        }
    }
    Ok(())
}

#[test]
fn the_radios_country_and_another_console_reach_the_kernel() -> Result<()> {
    let root = root();
    let mut config = config::load(&root, Some("robot-dev"), Some("pi3"))?;
    let place = config.product.place.clone();
    let other = config::product::ConsoleDevice(Some("ttyUSB0".to_owned()));
    config.product.console = Some(config::reader::Located { value: other, place });
    config.product.network.country = Some("DE".to_owned());
    let facts = xtask::plan::CheckoutFacts { commit: None, modified: false, epoch: 1_700_000_000 };
    let plan = xtask::plan::resolve(&config, &facts)?;
    let script = text(&render(&root, &plan)?, "boot", "boot.scr").context("a script")?;
    let words = " console=tty0 console=ttyUSB0,115200 cfg80211.ieee80211_regdom=DE ";
    ensure!(script.contains(words), "{:?}", plan.board.cmdline);
    Ok(())
}

/// Lines that several boards share are written once.
#[test]
fn no_module_is_listed_twice_and_every_list_says_where_it_comes_from() -> Result<()> {
    for (plan, _) in builds()? {
        let mut seen = std::collections::BTreeSet::new();
        for module in &plan.board.modules_keep {
            ensure!(seen.insert(module), "{}: {module} twice", plan.board.name);
        }
        let told: usize = plan
            .board
            .origins
            .iter()
            .filter(|o| o.list == "kernel.modules-keep")
            .map(|o| o.count)
            .sum();
        ensure!(
            told == plan.board.modules_keep.len(),
            "{}: {:?}",
            plan.board.name,
            plan.board.origins
        );
        let shared = plan.board.origins.iter().any(|o| o.file == "board/common/linux.toml");
        ensure!(shared, "{}: {:?}", plan.board.name, plan.board.origins);
        ensure!(plan.inputs.iter().any(|i| i.path == "board/common/linux.toml"), "not an input");
        let scripts =
            plan.boot_files.iter().filter(|f| matches!(f.source, BootSourcePlan::Template { .. }));
        ensure!(scripts.count() > 0, "{}: no templates", plan.board.name);
    }
    Ok(())
}

/// The examples lack nothing but what their files say that the owner adds; with that, they are products like all others. What
/// becomes of them on recorded names: `raspberrypi/`.
#[test]
fn an_example_is_a_product_but_for_its_key_and_its_lock() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let root = Utf8Path::from_path(folder.path()).context("UTF-8")?;
    copy_to(root)?;
    let examples = config::list_examples(root)?;
    ensure!(!examples.is_empty(), "no examples");
    let facts = xtask::plan::CheckoutFacts { commit: None, modified: false, epoch: 1_700_000_000 };
    for name in &examples {
        ensure!(
            !config::list_products(root)?.contains(name),
            "{name} would be built with all others"
        );
        let config = config::load(root, Some(name), None)?;
        let rootfs = &config.product.rootfs;
        let lock = rootfs.lock.as_ref().context("a lock")?.value.clone();
        let keys: Vec<Utf8PathBuf> = rootfs.sources.iter().map(|s| s.key.value.clone()).collect();
        // Who uses the example has them.
        for path in keys.iter().chain([&lock]).map(|path| root.join(path)) {
            drop(std::fs::remove_file(path));
        }
        let config = config::load(root, Some(name), None)?;
        let error = xtask::plan::resolve(&config, &facts).expect_err("incomplete").to_string();
        ensure!(error.matches(" does not exist").count() == keys.len() + 1, "{error}");
        ensure!(error.matches("  help: ").count() == keys.len() + 1, "{error}");
        let named = error.matches("the OpenPGP public key of https://").count();
        ensure!(named == keys.len(), "{error}");

        for key in &keys {
            std::fs::write(root.join(key), [0xc6, 4, 4, 1, 2, 0xff])?;
        }
        std::fs::write(root.join(&lock), "")?;
        let config = config::load(root, Some(name), None)?;
        let plan = xtask::plan::resolve(&config, &facts)?;
        render(root, &plan)?;
        let is_input = |key: &Utf8PathBuf| plan.inputs.iter().any(|input| input.path == *key);
        ensure!(keys.iter().all(is_input), "a key is not an input");
        // The rest is about a vendor's kernel.
        if keys.is_empty() {
            continue;
        }
        let shown = xtask::cmd::plan::describe_plan(&plan);
        for source in &plan.rootfs.sources {
            ensure!(shown.contains(&format!("{}, {}", source.name, source.address)), "{shown}");
            let listed = xtask::rootfs::glob::compile_globs(&source.packages)?;
            let kernel = |name: &&String| name.starts_with("linux-image-");
            let asked = plan.rootfs.extra_packages.iter().find(kernel).context("a kernel")?;
            ensure!(listed.is_match(asked) && !listed.is_match("libc6"), "{:?}", source.packages);
            // What the metapackage means is listed, and no other kernel of that archive.
            ensure!(listed.is_match("linux-image-6.12.25+rpt-rpi-v8"), "{:?}", source.packages);
            ensure!(!listed.is_match("linux-image-6.12.25+rpt-rpi-2712"), "{:?}", source.packages);
        }
    }
    Ok(())
}

/// An example that needs nothing of its owner is as complete as a product: its lock is of what it asks for.
#[test]
fn an_example_without_further_archives_can_be_built_as_it_is() -> Result<()> {
    let root = root();
    let mut complete = 0;
    for name in config::list_examples(&root)? {
        let config = config::load(&root, Some(&name), None)?;
        if !config.product.rootfs.sources.is_empty() {
            continue;
        }
        complete += 1;
        let lock = config.product.rootfs.lock.as_ref().context("a lock")?;
        let lock = PackagesLock::load(&root.join(&lock.value))?;
        lock.check_request(&xtask::build::package_spec(&config), &name).context(name.clone())?;
        // Whatever release the robot has: the machine that builds may have an older one.
        for arch in ["amd64", "arm64"] {
            let tool =
                lock.of_role(PackageRole::Host).any(|p| p.name == "e2fsprogs" && p.arch == arch);
            ensure!(tool, "{name}: no file systems can be made on {arch}");
        }
        for board in &config.product.boards {
            let config = config::load(&root, Some(&name), Some(&board.value.0))?;
            let facts =
                xtask::plan::CheckoutFacts { commit: None, modified: false, epoch: 1_700_000_000 };
            render(&root, &xtask::plan::resolve(&config, &facts)?)?;
        }
    }
    ensure!(complete > 0, "no example is complete");
    Ok(())
}
