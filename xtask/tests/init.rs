//! Which disk the initrd selects: the shipped script, run by busybox in a separate root, whose disks are files and whose
//! `/sys` names the bus of each. Only what would change this machine (mounts, modules, the restart) is
//! replaced; the step after the search, `switch_root`, refuses to run here, which ends the script.

use crate::common::{find, make_program};

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};

const STUBS: &str =
    "mount() { :; }\numount() { :; }\ninsmod() { :; }\nsync() { :; }\nreboot() { exit 9; }\n";
/// Longer than anything takes here.
const LONG: Duration = Duration::from_secs(60);
/// The signature of the MBR, and the start of root a's number.
const MBR: [u8; 4] = [0x78, 0x56, 0x34, 0x12];

/// Where a disk hangs, as the kernel's path says.
const CARD: &str = "platform/emmc2bus/fe340000.mmc/mmc_host/mmc0/mmc0:aaaa";
const SECOND: &str = "platform/soc/fe202000.mmc/mmc_host/mmc1/mmc1:0001";
const STICK: &str =
    "platform/scb/fd500000.pcie/pci0000:00/0000:01:00.0/usb2/2-1/2-1:1.0/host0/target0:0:0";
/// A reader that is an mmc host behind USB.
const READER: &str =
    "platform/scb/fd500000.pcie/usb1/1-1/1-1:1.0/rtsx_usb_sdmmc.0/mmc_host/mmc1/mmc1:0001";
const VIRTUAL: &str = "pci0000:00/0000:00:02.0/virtio1";

struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new(bus: &str, cmdline: &str) -> Self {
        let machine = Self { dir: tempfile::tempdir().expect("a directory") };
        let script = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../board/common/init");
        let script = fs::read_to_string(script).expect("the script");
        machine.put("init", STUBS.to_owned() + &script);
        machine.put("etc/modules", "");
        machine.put("etc/disk", format!("{bus}\n"));
        machine.put("proc/cmdline", format!("{cmdline} panic=1\n"));
        machine.clock(5);
        machine.put("dev/null", "");
        for folder in
            ["sys/block", "sys/class/block", "root/dev", "root/proc", "root/sys", "root/run"]
        {
            fs::create_dir_all(machine.at(folder)).expect("made");
        }
        // What it says comes out on standard output.
        fs::create_dir_all(machine.at("dev/kmsg")).expect("made");
        machine.put("root/sbin/init", "");
        fs::set_permissions(machine.at("root/sbin/init"), fs::Permissions::from_mode(0o755))
            .expect("a mode");
        let busybox = find("busybox");
        fs::create_dir_all(machine.at("bin")).expect("made");
        make_program(&machine.at("bin/busybox"), fs::read(busybox).expect("read"));
        machine
    }

    fn at(&self, path: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.dir.path()).expect("UTF-8").join(path)
    }

    fn put(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }

    /// Seconds since the kernel's start: time passes here when the test says so.
    fn clock(&self, seconds: u32) {
        // As one step: the script may be reading it.
        self.put("proc/uptime.new", format!("{seconds}.00 1.00\n"));
        fs::rename(self.at("proc/uptime.new"), self.at("proc/uptime")).expect("renamed");
    }

    /// A disk with the identifiers that all cards of a version have: as MBR, and with the GPT's names.
    fn plug(&self, name: &str, place: &str) {
        let separator = if name.ends_with(|c: char| c.is_ascii_digit()) { "p" } else { "" };
        let mut disk = vec![0; 1 << 20];
        disk[440..444].copy_from_slice(&MBR);
        self.put(&format!("dev/{name}"), disk);
        let folder = format!("sys/devices/{place}/block/{name}");
        self.put(&format!("{folder}/size"), "2048\n");
        for (number, label) in [(1, "boot"), (2, "root-a"), (3, "root-b"), (4, "data")] {
            let part = format!("{name}{separator}{number}");
            // ext4's magic, and the label that data has.
            let mut bytes = vec![0; 4096];
            bytes[1080..1082].copy_from_slice(&[0x53, 0xef]);
            bytes[1144..1144 + label.len()].copy_from_slice(label.as_bytes());
            self.put(&format!("dev/{part}"), bytes);
            self.put(
                &format!("{folder}/{part}/uevent"),
                format!("PARTN={number}\nPARTNAME={label}\n"),
            );
            self.put(&format!("{folder}/{part}/partition"), format!("{number}\n"));
            symlink(
                format!("../../devices/{place}/block/{name}/{part}"),
                self.at(&format!("sys/class/block/{part}")),
            )
            .expect("linked");
        }
        // Last: what the kernel shows is there completely.
        symlink(format!("../devices/{place}/block/{name}"), self.at(&format!("sys/block/{name}")))
            .expect("linked");
    }

    fn start(&self) -> Child {
        let root = rustix::process::geteuid().is_root();
        let mut command = Command::new(if root { "chroot" } else { "unshare" });
        if !root {
            command.args(["--user", "--map-root-user", "--", "chroot"]);
        }
        command.arg(self.at("")).args(["/bin/busybox", "sh", "/init"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("chroot runs")
    }

    /// The partition that was taken for the root, and what was said.
    fn ended(&self, child: Child) -> (Option<String>, String) {
        let Output { stdout, stderr, .. } = child.wait_with_output().expect("it ends");
        let printed = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
        let read = |name: &str| fs::read_to_string(self.at(&format!("run/slipway/{name}"))).ok();
        let root = read("root").map(|text| text.trim().to_owned());
        if let (Some(root), Some(disk)) = (&root, read("disk")) {
            assert!(root.starts_with(disk.trim()), "{root} is not on {disk}");
            let data = root.trim_end_matches(['2', '3']).to_owned() + "4";
            assert!(printed.contains(&format!("data {data}")), "{printed}");
        }
        (root, printed)
    }

    /// Runs it with all disks there.
    fn chosen(&self) -> Option<String> {
        self.ended(self.start()).0
    }
}

const UBOOT: &str = "root=PARTUUID=12345678-02 slipway.slot=a";
const TRYBOOT: &str = "slipway.tryboot=2:a,3:b";

fn firmware(machine: &Machine, mode: Option<u8>) {
    let folder = "proc/device-tree/chosen/bootloader";
    machine.put(&format!("{folder}/partition"), [0, 0, 0, 2]);
    if let Some(mode) = mode {
        machine.put(&format!("{folder}/boot-mode"), [0, 0, 0, mode]);
    }
}

#[test]
fn a_copy_of_the_card_on_usb_is_never_taken() {
    for (flow, cmdline) in [("u-boot", UBOOT), ("tryboot", TRYBOOT)] {
        for (name, place) in [("sda", STICK), ("mmcblk0", READER)] {
            let machine = Machine::new("mmc", cmdline);
            firmware(&machine, Some(1));
            machine.plug(name, place);
            machine.plug("mmcblk2", CARD);
            assert_eq!(machine.chosen().as_deref(), Some("/dev/mmcblk2p2"), "{flow}, {name}");
        }
    }
}

#[test]
fn the_card_is_waited_for_although_a_copy_is_there_first() {
    for (cmdline, name, place) in [(UBOOT, "sda", STICK), (TRYBOOT, "mmcblk0", READER)] {
        let machine = Machine::new("mmc", cmdline);
        firmware(&machine, Some(1));
        machine.plug(name, place);
        let mut child = machine.start();
        // It had every chance to use the copy: the clock is stopped, and it polls ten times a
        // second.
        std::thread::sleep(Duration::from_secs(2));
        assert!(child.try_wait().expect("a child").is_none(), "{:?}", machine.ended(child));
        assert!(!machine.at("run/slipway/root").exists());
        machine.plug("mmcblk1", CARD);
        assert_eq!(machine.ended(child).0.as_deref(), Some("/dev/mmcblk1p2"));
    }
}

#[test]
fn without_its_card_a_robot_does_not_start_from_a_copy() {
    let machine = Machine::new("mmc", UBOOT);
    machine.plug("sda", STICK);
    machine.plug("mmcblk0", READER);
    machine.plug("vda", VIRTUAL);
    let mut child = machine.start();
    let began = Instant::now();
    // Its patience ends after 30 s of the kernel's clock.
    while child.try_wait().expect("a child").is_none() {
        assert!(began.elapsed() < LONG, "it waits for ever");
        std::thread::sleep(Duration::from_millis(200));
        machine.clock(5 + 31);
        machine.clock(5 + 62);
    }
    let (root, printed) = machine.ended(child);
    assert_eq!(root, None, "{printed}");
    assert!(
        printed.contains("cannot start: no partition is PARTUUID=12345678-02; there are:"),
        "{printed}"
    );
}

#[test]
fn of_two_cards_the_first_controllers_counts() {
    let machine = Machine::new("mmc", UBOOT);
    machine.plug("mmcblk1", SECOND);
    machine.plug("mmcblk0", CARD);
    assert_eq!(machine.chosen().as_deref(), Some("/dev/mmcblk0p2"));
    let machine = Machine::new("virtio", TRYBOOT);
    firmware(&machine, None);
    machine.plug("vdb", VIRTUAL);
    machine.plug("vda", "pci0000:00/0000:00:01.0/virtio0");
    machine.plug("mmcblk0", CARD);
    assert_eq!(machine.chosen().as_deref(), Some("/dev/vda2"));
}

#[test]
fn what_the_firmware_started_from_elsewhere_is_refused() {
    for (mode, starts) in
        [(Some(1), true), (None, true), (Some(4), false), (Some(5), false), (Some(6), false)]
    {
        let machine = Machine::new("mmc", TRYBOOT);
        firmware(&machine, mode);
        machine.plug("mmcblk0", CARD);
        let (root, printed) = machine.ended(machine.start());
        assert_eq!(root.is_some(), starts, "boot-mode {mode:?}: {printed}");
        assert_eq!(printed.contains("another medium than the card"), !starts, "{printed}");
    }
}

#[test]
fn without_a_bus_nothing_is_taken() {
    for bus in ["", "usb", "*"] {
        let machine = Machine::new(bus, UBOOT);
        machine.plug("mmcblk0", CARD);
        let (root, printed) = machine.ended(machine.start());
        assert_eq!(root, None, "{printed}");
        assert!(printed.contains("does not know from which bus the board starts"), "{printed}");
    }
}
