//! The built images boot, through the real boot loader, to a login in the slot that was chosen; as
//! the serial console shows. Its output is in `dist/…/log`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bundle::bootstate::{BootState, Slot};
use camino::Utf8PathBuf;
use xtask::cmd::check::ALL;
use xtask::config::machine::QemuMachine;
use xtask::qemu::{self, CardOverlay, QemuSession, RestartEffect};

use crate::laptop::Laptop;
use crate::services;
use crate::support::{Built, Folder, built, built_of, logs_in, say, tool};

/// What a guest needs for one command, on a busy machine without hardware virtualisation.
pub const COMMAND: Duration = Duration::from_secs(120);

/// A machine on an overlay of the built image.
struct Guest {
    built: &'static Built,
    machine: QemuMachine,
    overlay: CardOverlay,
    log: Utf8PathBuf,
    /// At the other end of its cable, where the machine can have another device.
    laptop: Option<Laptop>,
    /// Another device tree than the board's own.
    tree: Option<Utf8PathBuf>,
    folder: Folder,
}

impl Guest {
    fn new(built: &'static Built, slot: Slot) -> Result<Self> {
        let qemu = built.plan.board.qemu.as_ref().context("the board has no machine")?;
        let folder = Folder::new()?;
        let files = built.qemu.as_ref().context("the board has no machine")?;
        let overlay = CardOverlay::create(&qemu.machine, &files.image, &folder.at("card.qcow2"))?;
        // Slot a is what the image starts by itself: its boot state was never written.
        if slot == Slot::B {
            let sector = built.plan.disk.states.first().context("the board keeps no boot state")?;
            let state = BootState { active: slot, ..BootState::first() };
            overlay.write_boot_state(sector.offset, &state)?;
        }
        let log = built.dist.join(format!("log/boot-{slot}.log"));
        let mut machine = qemu.machine.clone();
        let mut laptop = None;
        if let Some(device) = machine.network.clone().filter(|device| device.ends_with("-pci")) {
            let cable = Laptop::new()?;
            machine.arguments.extend(cable.arguments(&device)?);
            laptop = Some(cable);
        }
        Ok(Self { built, machine, overlay, log, laptop, tree: None, folder })
    }

    /// Starts the machine and waits for the shell of the console's login.
    fn start(&self, log: &str, hostname: &str) -> Result<QemuSession> {
        let log = self.log.with_file_name(log);
        say(format!("booting; the console goes to {log}"));
        let mut files = self.built.qemu.clone().context("the board has no machine")?;
        if self.tree.is_some() {
            files.device_tree.clone_from(&self.tree);
        }
        let mut session = QemuSession::start(
            &self.machine,
            &files,
            &self.overlay,
            &log,
            RestartEffect::Exit,
            None,
        )?;
        let timeout = Duration::from_secs(self.machine.boot_timeout);
        session.expect("slipway: starting slot ", timeout).context("no boot loader")?;
        session.expect("slipway-init: slot ", timeout).context("no initrd")?;
        logs_in(&mut session, hostname, timeout, COMMAND)?;
        Ok(session)
    }
}

/// The output of a command that must succeed.
pub fn output(session: &mut QemuSession, command: &str, timeout: Duration) -> Result<String> {
    let (code, printed) = session.run(command, timeout)?;
    say(format!("{command}: {printed}"));
    ensure!(code == 0, "`{command}` failed with {code}: {printed}");
    Ok(printed)
}

/// Everything that a started slot must be.
fn check(guest: &Guest, session: &mut QemuSession, slot: Slot) -> Result<()> {
    let plan = &guest.built.plan;
    let long = Duration::from_secs(guest.machine.boot_timeout);
    let chosen = output(session, "cat /run/slipway/slot", COMMAND)?;
    ensure!(chosen == slot.name(), "slot {chosen} was started, expected {slot}");

    let role = format!("root-{slot}");
    let number = plan.disk.partition(&role).with_context(|| format!("no {role}"))?.number;
    let mounted = output(session, "grep ' / ' /proc/mounts", COMMAND)?;
    let mut fields = mounted.split(' ');
    let (device, options) = (fields.next().unwrap_or_default(), fields.nth(2).unwrap_or_default());
    let found = device.trim_start_matches(|c: char| !c.is_ascii_digit());
    let found = found.rsplit('p').next().unwrap_or_default();
    ensure!(found == number.to_string(), "/ is {device}, expected partition {number} ({role})");
    ensure!(options.split(',').any(|o| o == "ro"), "/ is mounted {options}");
    let (code, printed) = session.run("touch /usr/written", COMMAND)?;
    ensure!(
        code != 0 && printed.contains("Read-only file system"),
        "a write gave {code}: {printed}"
    );

    // Waits until everything has been started; also says when a unit has failed.
    let (_, state) = session.run("systemctl is-system-running --wait", long)?;
    let failed = output(session, "systemctl --failed --plain --no-legend --no-pager", COMMAND)?;
    ensure!(failed.is_empty(), "failed units: {failed}");
    ensure!(state == "running", "the system is {state}");

    // The API's resources have arrived, from where this Python would import the package.
    let api = plan.api.as_ref().context("the product has an API")?;
    let name = api.package.split("==").next().unwrap_or_default().replace('-', "_");
    let find = format!("import importlib.util as u; print(u.find_spec(\"{name}\").origin)");
    let origin = output(session, &format!("python3 -c '{find}'"), long)?;
    let printed = output(session, "slotd --format json provision --check", COMMAND)?;
    let package = origin.trim_end_matches("/__init__.py");
    ensure!(
        printed.contains(&format!("\"package\":\"{package}\"")),
        "not from {package}: {printed}"
    );
    services::api(session, plan)
}

/// Boots and checks a slot; then looks at its services, or restarts it and looks for the same machine.
fn boots(built: &'static Built, slot: Slot, restart: bool) -> Result<()> {
    let guest = Guest::new(built, slot)?;
    let plan = &guest.built.plan;
    let run = || -> Result<()> {
        let mut session = guest.start(&format!("boot-{slot}.log"), &plan.network.hostname)?;
        check(&guest, &mut session, slot)?;
        let first = services::identity(&mut session)?;
        if restart {
            let long = Duration::from_secs(guest.machine.boot_timeout);
            services::leave_things(&mut session)?;
            session.send_line("systemctl reboot")?;
            session.wait(long).context("restarting")?;
            drop(session);
            let mut session = guest.start(&format!("boot-{slot}-again.log"), services::NAME)?;
            let second = services::identity(&mut session)?;
            ensure!(first == second, "after a restart the identity {first} has become {second}");
            let chosen = output(&mut session, "cat /run/slipway/slot", COMMAND)?;
            ensure!(chosen == slot.name(), "the restart chose slot {chosen}, expected {slot}");
            services::find_things(&mut session, long)?;
        } else {
            services::proxy(&mut session)?;
            services::hidden(&mut session)?;
            if let Some(laptop) = &guest.laptop {
                services::link_local(&mut session, plan, laptop)?;
            }
        }
        Ok(())
    };
    let done = run().with_context(|| format!("the console's log is {}", guest.log));
    drop(guest.folder);
    done
}

#[test]
fn slot_a_boots() -> Result<()> {
    boots(built("qemu-arm64")?, Slot::A, false)
}

#[test]
fn slot_b_boots_and_keeps_its_identity() -> Result<()> {
    boots(built("qemu-arm64")?, Slot::B, true)
}

/// Says that a test is left out, unless all are asked for.
fn left_out(why: &str) -> bool {
    let left_out = std::env::var_os(ALL).is_none();
    if left_out {
        say(format!("left out: {why}; `cargo xtask test --all` does it"));
    }
    left_out
}

#[test]
fn the_card_image_of_a_pi_boots() -> Result<()> {
    if left_out("takes 5 to 15 minutes") {
        return Ok(());
    }
    boots(built("pi3")?, Slot::A, false)
}

/// An example product: what the engine makes of the next Debian, with all that a started slot must be.
#[test]
fn the_next_debian_boots() -> Result<()> {
    if left_out("another base, some 5 minutes") {
        return Ok(());
    }
    boots(built_of(Some("robot-trixie"), "qemu-arm64")?, Slot::A, false)
}

/// The smallest machine of the board: half a gigabyte, and a device tree of its own. QEMU's raspi3ap stops the kernel at a read of
/// a register that it lacks (`asb` of brcm,bcm2835-pm), which its raspi3b answers with nothing: that node is off here.
#[test]
fn the_card_image_of_the_smallest_pi_boots() -> Result<()> {
    const TREE: &str = "bcm2837-rpi-3-a-plus.dtb";
    if left_out("takes 5 to 15 minutes") {
        return Ok(());
    }
    let mut guest = Guest::new(built("pi3")?, Slot::A)?;
    let built = guest.built;
    let card = guest.folder.at("card.img");
    tool("cp").args(["--sparse=always", built.image.as_str(), card.as_str()]).run()?;
    let boot = built.plan.disk.partition("boot").context("a boot partition")?;
    let root = built.plan.disk.partition("root-a").context("a slot")?;
    let (tree, changed) = (guest.folder.at(TREE), guest.folder.at("changed.dtb"));
    let volume = format!("{card}@@{}", boot.offset);
    tool("mcopy").args(["-n", "-i", &volume, &format!("::{TREE}"), tree.as_str()]).run()?;
    tool("cp").args([tree.as_str(), changed.as_str()]).run()?;
    let words = ["-t", "s", changed.as_str(), "/soc/watchdog@7e100000", "status", "disabled"];
    tool("fdtput").args(words).run()?;
    let (commands, inside) = (guest.folder.at("debugfs"), format!("/boot/dtbs/broadcom/{TREE}"));
    std::fs::write(&commands, format!("rm {inside}\nwrite {changed} {inside}\n"))?;
    let device = format!("{card}?offset={}", root.offset);
    tool("debugfs").args(["-w", "-f", commands.as_str(), &device]).run()?;

    guest.machine.machine = "raspi3ap".to_owned();
    guest.machine.memory = 512 << 20;
    guest.overlay = CardOverlay::create(&guest.machine, &card, &guest.folder.at("3ap.qcow2"))?;
    guest.tree = Some(tree);
    let mut session = guest.start("boot-3ap.log", &built.plan.network.hostname)?;
    let model = output(&mut session, "tr -d '\\0' </proc/device-tree/model", COMMAND)?;
    ensure!(model == "Raspberry Pi 3 Model A+", "it is a {model}");
    let memory = output(&mut session, "grep MemTotal /proc/meminfo", COMMAND)?;
    let kibibytes: u64 = memory.split_whitespace().nth(1).context("a size")?.parse()?;
    ensure!(kibibytes < 512 << 10, "it has {memory}");
    Ok(())
}

#[test]
fn the_card_image_of_a_pi_4_boots() -> Result<()> {
    if left_out("takes 10 to 20 minutes") {
        return Ok(());
    }
    let built = built("pi4-uboot")?;
    let machine = &built.plan.board.qemu.as_ref().context("the board has a machine")?.machine;
    if let Err(older) = qemu::require_version(machine) {
        say(format!("left out: {older}"));
        return Ok(());
    }
    boots(built, Slot::A, false)?;
    let guest = Guest::new(built, Slot::B)?;
    let mut session = guest.start("boot-b.log", &built.plan.network.hostname)?;
    let chosen = output(&mut session, "cat /run/slipway/slot", COMMAND)?;
    ensure!(chosen == "b", "slot {chosen} was started, expected b");
    Ok(())
}
