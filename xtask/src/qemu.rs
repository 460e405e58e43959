//! Boots a card image in QEMU: on the user's terminal, or driven by a test through the serial
//! console.
//!
//! The image is never written: the machine uses a qcow2 overlay. The machine is described by the
//! board's `[qemu]` table; the network listens on the loopback address only.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use crate::config::machine::{BootloaderOption, CardDrive, QemuMachine};
use crate::exec::Tool;
use crate::progress;
use bundle::bootstate::{BootState, SECTOR};

mod session;

pub use session::QemuSession;

/// The QEMU program.
pub const PROGRAM: &str = "qemu-system-aarch64";

/// The port of the guest's SSH server.
const GUEST_SSH: u16 = 22;

/// The files that a machine boots from; they are never written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineFiles {
    /// The card image.
    pub image: Utf8PathBuf,
    /// The boot loader.
    pub bootloader: Utf8PathBuf,
    /// The device tree, for a machine whose firmware provides one.
    pub device_tree: Option<Utf8PathBuf>,
    /// The changes to that tree, in source form: devices that the machine lacks or that are at
    /// other addresses than on the board.
    pub device_tree_changes: Option<Utf8PathBuf>,
}

impl MachineFiles {
    /// The device tree for the machine; a tree with changes is created in the directory `dir`.
    fn tree(&self, dir: &Utf8Path) -> Result<Option<Utf8PathBuf>> {
        let (Some(tree), Some(changes)) = (&self.device_tree, &self.device_tree_changes) else {
            return Ok(self.device_tree.clone());
        };
        let [base, all, out] = ["base.dts", "machine.dts", "machine.dtb"].map(|n| dir.join(n));
        let dtc = |from: &str, to: &str, input: &Utf8Path, output: &Utf8Path| {
            let tool = Tool::new("dtc").args(["-q", "-I", from, "-O", to, "-o"]);
            tool.args([output.as_str(), input.as_str()]).run()
        };
        let make = || -> Result<()> {
            dtc("dtb", "dts", tree, &base)?;
            let changes = changes.canonicalize_utf8()?;
            let text = format!("/include/ \"{base}\"\n/include/ \"{changes}\"\n");
            std::fs::write(&all, text).with_context(|| format!("writing {all}"))?;
            dtc("dts", "dtb", &all, &out)
        };
        make().with_context(|| format!("applying {changes} to {tree}"))?;
        Ok(Some(out))
    }
}

/// Whether this machine's QEMU supports the board's machine.
///
/// # Errors
/// When it does not, with the version that does; when QEMU is missing.
pub fn require_version(machine: &QemuMachine) -> Result<()> {
    let Some(since) = &machine.since else { return Ok(()) };
    let output = Tool::new(PROGRAM).arg("--version").read()?;
    let found =
        parse_version(&output).with_context(|| format!("parsing QEMU's version in {output:?}"))?;
    let wanted = parse_version(&format!("version {since}")).context("`since` is not a version")?;
    ensure!(
        found >= wanted,
        "QEMU {}.{} does not support the machine {}; QEMU {since} is the first version that does\n\
         help: Debian 12 has a newer QEMU in bookworm-backports: apt-get install -t \
         bookworm-backports qemu-system-arm",
        found.0,
        found.1,
        machine.machine
    );
    Ok(())
}

/// The numbers after the word `version`.
fn parse_version(output: &str) -> Option<(u32, u32)> {
    let (_, rest) = output.split_once("version ")?;
    let mut parts = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

/// The effect of a restart of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartEffect {
    /// The machine restarts.
    Restart,
    /// The machine stops, so that a test detects a panic at once.
    Exit,
}

/// A writable card: a qcow2 overlay of the image, which is not changed.
#[derive(Debug)]
pub struct CardOverlay {
    path: Utf8PathBuf,
}

impl CardOverlay {
    /// Creates a new overlay of `image` at `path` (replacing an old one), enlarged to a power of
    /// two where the machine needs that.
    ///
    /// # Errors
    /// When the image is missing or `qemu-img` fails.
    pub fn create(machine: &QemuMachine, image: &Utf8Path, path: &Utf8Path) -> Result<Self> {
        let size = std::fs::metadata(image)
            .with_context(|| format!("reading the card image {image}"))?
            .len();
        // The backing file's name is relative to the overlay, so it must be absolute.
        let image = image.canonicalize_utf8().with_context(|| format!("finding {image}"))?;
        let size = if machine.power_of_two_card { size.next_power_of_two() } else { size };
        Tool::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([image.as_str(), path.as_str(), &size.to_string()])
            .run()
            .with_context(|| format!("making the overlay {path}"))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Its path.
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Writes one copy of the boot state at `offset` bytes, as the robot would.
    ///
    /// # Errors
    /// When `qemu-io` fails, or a machine that uses the overlay is still running.
    pub fn write_boot_state(&self, offset: u64, state: &BootState) -> Result<()> {
        self.write(offset, &state.encode())
    }

    /// Writes bytes at an offset; both are whole sectors.
    ///
    /// # Errors
    /// When `qemu-io` fails, or a machine that uses the overlay is still running.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let aligned = offset.is_multiple_of(SECTOR as u64) && bytes.len().is_multiple_of(SECTOR);
        ensure!(aligned, "writing {} bytes at {offset} of a card: not whole sectors", bytes.len());
        let source = Utf8PathBuf::from(format!("{}.source", self.path));
        std::fs::write(&source, bytes).with_context(|| format!("writing {source}"))?;
        let done = Tool::new("qemu-io")
            .args(["-f", "qcow2", "-c"])
            .arg(format!("write -q -s {source} {offset} {}", bytes.len()))
            .arg(&self.path)
            .run()
            .with_context(|| format!("writing {} bytes at {offset} of {}", bytes.len(), self.path));
        std::fs::remove_file(&source).with_context(|| format!("removing {source}"))?;
        done
    }
}

/// How an interactive run differs from the image's own boot.
#[derive(Debug, Clone)]
pub struct InteractiveStart {
    /// A boot state to write first, and its byte offset: selects the slot.
    pub boot_state: Option<(u64, BootState)>,
    /// The port on the host's loopback address that is forwarded to the guest's SSH, if it is free.
    pub ssh_port: u16,
}

/// Boots the image with its serial console on this terminal until the user quits. Writes of the
/// guest are lost then.
///
/// # Errors
/// When the overlay cannot be made, or QEMU is missing, older than the machine, or fails.
pub fn run_interactive(
    machine: &QemuMachine,
    files: &MachineFiles,
    start: &InteractiveStart,
) -> Result<()> {
    require_version(machine)?;
    let dir = tempfile::tempdir().context("creating a directory for the overlay")?;
    let dir = Utf8Path::from_path(dir.path()).context("the temporary directory's name")?;
    let overlay = CardOverlay::create(machine, &files.image, &dir.join("card.qcow2"))?;
    if let Some((offset, state)) = &start.boot_state {
        overlay.write_boot_state(*offset, state)?;
    }
    let port = machine.network.as_ref().map(|_| free_port(start.ssh_port)).transpose()?;
    progress::say("run", format!("{} in {}", files.image, machine.machine));
    if let Some(port) = port {
        progress::say("ssh", format!("ssh -p {port} robot@127.0.0.1"));
    }
    progress::say("quit", "Ctrl-A, then X; the robot's writes are lost then");
    let tree = files.tree(dir)?;
    let (card, console) = (overlay.path(), "mon:stdio");
    let arguments = qemu_arguments(
        machine,
        files,
        tree.as_deref(),
        card,
        console,
        port,
        RestartEffect::Restart,
    );
    let tool = Tool::new(PROGRAM).args(arguments);
    let shown = tool.command_line();
    let mut command = tool.into_command();
    command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    let status = command.status().with_context(|| format!("running {shown}"))?;
    if !status.success() {
        bail!("{shown} failed: {status}");
    }
    Ok(())
}

/// QEMU's arguments. `console` is the character device of the console's serial port.
fn qemu_arguments(
    machine: &QemuMachine,
    files: &MachineFiles,
    tree: Option<&Utf8Path>,
    overlay: &Utf8Path,
    console: &str,
    ssh_port: Option<u16>,
    on_restart: RestartEffect,
) -> Vec<String> {
    let mut list: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| list.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["-M", &machine.machine]);
    if let Some(cpu) = &machine.cpu {
        add(&["-cpu", cpu]);
    }
    add(&["-m", &format!("{}M", machine.memory >> 20), "-smp", &machine.cpus.to_string()]);
    match machine.bootloader {
        BootloaderOption::Bios => add(&["-bios", files.bootloader.as_str()]),
        BootloaderOption::Kernel => add(&["-kernel", files.bootloader.as_str()]),
    }
    if let Some(tree) = tree {
        add(&["-dtb", tree.as_str()]);
    }
    // A comma in a file name would end the name; QEMU requires doubling it.
    let card = format!("file={},format=qcow2", overlay.as_str().replace(',', ",,"));
    match machine.drive {
        CardDrive::Sd => add(&["-drive", &format!("{card},if=sd")]),
        CardDrive::Virtio => {
            add(&["-drive", &format!("{card},if=none,id=card")]);
            add(&["-device", "virtio-blk-pci,drive=card"]);
        }
    }
    match (&machine.network, ssh_port) {
        (Some(device), Some(port)) => {
            add(&["-netdev", &format!("user,id=lan,hostfwd=tcp:127.0.0.1:{port}-:{GUEST_SSH}")]);
            // A PCI network device needs a boot ROM from another package; nothing boots from the
            // network.
            let rom = if device.ends_with("-pci") { ",romfile=" } else { "" };
            add(&["-device", &format!("{device},netdev=lan{rom}")]);
        }
        _ => add(&["-nic", "none"]),
    }
    for _ in 0..machine.serial_port {
        add(&["-serial", "null"]);
    }
    add(&["-serial", console, "-display", "none"]);
    if console != "mon:stdio" {
        add(&["-monitor", "none"]);
    }
    if on_restart == RestartEffect::Exit {
        add(&["-no-reboot"]);
    }
    list.extend(machine.arguments.iter().cloned());
    list
}

/// The preferred port of the loopback address, or any free one (0: no preference). This process
/// returns each port once: it is free until a machine listens on it, and two machines that start
/// together must not share it.
///
/// # Errors
/// When no port is free.
pub fn free_port(preferred: u16) -> Result<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut wanted = preferred;
    loop {
        let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, wanted))
            .or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = bound.context("finding a free port on 127.0.0.1")?;
        let port = listener.local_addr().context("finding a free port on 127.0.0.1")?.port();
        if given.insert(port) {
            return Ok(port);
        }
        wanted = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> QemuMachine {
        QemuMachine {
            machine: "virt".into(),
            since: None,
            cpu: Some("cortex-a53".into()),
            memory: 1 << 30,
            cpus: 2,
            bootloader: BootloaderOption::Bios,
            drive: CardDrive::Virtio,
            power_of_two_card: true,
            serial_port: 1,
            network: Some("virtio-net-pci".into()),
            arguments: vec!["-device".into(), "i6300esb".into()],
            boot_timeout: 60,
        }
    }

    #[test]
    fn arguments_follow_the_machine() {
        let files = MachineFiles {
            image: "card.img".into(),
            bootloader: "u-boot.bin".into(),
            device_tree: None,
            device_tree_changes: None,
        };
        let tree = Some(Utf8Path::new("board.dtb"));
        let line = |machine: &QemuMachine, port| {
            let card = Utf8Path::new("a,b.qcow2");
            qemu_arguments(machine, &files, tree, card, "stdio", port, RestartEffect::Exit)
                .join(" ")
        };
        assert_eq!(
            line(&machine(), Some(2222)),
            "-M virt -cpu cortex-a53 -m 1024M -smp 2 -bios u-boot.bin -dtb board.dtb \
             -drive file=a,,b.qcow2,format=qcow2,if=none,id=card -device virtio-blk-pci,drive=card \
             -netdev user,id=lan,hostfwd=tcp:127.0.0.1:2222-:22 \
             -device virtio-net-pci,netdev=lan,romfile= -serial null -serial stdio -display none \
             -monitor none -no-reboot -device i6300esb"
        );
        let pi = QemuMachine {
            bootloader: BootloaderOption::Kernel,
            drive: CardDrive::Sd,
            network: None,
            ..machine()
        };
        let line = line(&pi, None);
        assert!(line.contains("-kernel u-boot.bin"), "{line}");
        assert!(line.contains("-drive file=a,,b.qcow2,format=qcow2,if=sd -nic none"), "{line}");
    }

    #[test]
    fn an_older_qemu_is_named() {
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)"), Some((7, 2)));
        assert_eq!(parse_version("version 9.0"), Some((9, 0)));
        let newer = QemuMachine { since: Some("9000.0".into()), ..machine() };
        let error = require_version(&newer).unwrap_err().to_string();
        assert!(
            error.contains("does not support the machine virt; QEMU 9000.0 is the first"),
            "{error}"
        );
        assert!(require_version(&QemuMachine { since: Some("1.0".into()), ..machine() }).is_ok());
    }

    #[test]
    fn a_device_tree_is_changed_for_the_machine() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let at = |name: &str| dir.join(name);
        let dtc = |from: &str, to: &str, input: &str, output: &str| {
            let tool = Tool::new("dtc").args(["-q", "-I", from, "-O", to, "-o"]);
            tool.args([at(output), at(input)]).run().unwrap();
        };
        let text = "/dts-v1/; / { card@1 { supply = <&{/vcc}>; broken; }; vcc { gpio = <1>; }; };";
        std::fs::write(at("board.dts"), text).unwrap();
        dtc("dts", "dtb", "board.dts", "board.dtb");
        std::fs::write(at("changes.dtsi"), "&{/card@1} { /delete-property/ broken; };\n").unwrap();
        let mut files = MachineFiles {
            image: "card.img".into(),
            bootloader: "u-boot.bin".into(),
            device_tree: Some(at("board.dtb")),
            device_tree_changes: None,
        };
        assert_eq!(files.tree(dir).unwrap(), Some(at("board.dtb")));
        files.device_tree_changes = Some(at("changes.dtsi"));
        assert_eq!(files.tree(dir).unwrap(), Some(at("machine.dtb")));
        dtc("dtb", "dts", "machine.dtb", "found.dts");
        let found = std::fs::read_to_string(at("found.dts")).unwrap();
        assert!(found.contains("supply = <") && !found.contains("broken"), "{found}");
        std::fs::write(at("changes.dtsi"), "&{/card@2} { };\n").unwrap();
        let error = format!("{:#}", files.tree(dir).unwrap_err());
        assert!(error.contains("changes.dtsi") && error.contains("card@2"), "{error}");
    }

    #[test]
    fn an_overlay_takes_the_boot_state_and_leaves_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let image = dir.join("card.img");
        std::fs::write(&image, vec![0; 3 << 20]).unwrap();
        let overlay = CardOverlay::create(&machine(), &image, &dir.join("card.qcow2")).unwrap();
        let state = BootState::first();
        overlay.write_boot_state(1 << 20, &state).unwrap();
        let refused = overlay.write(100, &[0; SECTOR]).unwrap_err().to_string();
        assert!(refused.contains("not whole sectors"), "{refused}");

        let raw = dir.join("raw.img");
        Tool::new("qemu-img")
            .args(["convert", "-O", "raw", overlay.path().as_str(), raw.as_str()])
            .run()
            .unwrap();
        let card = std::fs::read(&raw).unwrap();
        assert_eq!(card.len(), 4 << 20, "the card's size is a power of two");
        assert_eq!(BootState::decode(&card[1 << 20..][..SECTOR]), Ok(state));
        assert_eq!(std::fs::read(&image).unwrap(), vec![0; 3 << 20], "the image was written");
    }

    #[test]
    fn a_taken_port_is_replaced() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert_ne!(free_port(port).unwrap(), port);
        // Nothing listens there yet, but it is not returned again.
        let given = free_port(0).unwrap();
        assert_ne!(free_port(given).unwrap(), given);
    }
}
