//! Shared by the tests: a robot on files in a test directory, bundles made by the bundle crate's writer, and
//! a card that records every write.
#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../../../bundle/tests/common/mod.rs"]
pub mod bundles;
pub mod card;
pub mod rights;
pub mod server;
pub mod wheels;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bundle::bootstate::{BootState, Slot};
use bundle::{BuildKind, KeySet, Version};
use bundles::{Parts, TestKey, noise, parts};
use serde_json::Value;

/// Sectors of the boot state's copies.
pub const SECTORS: [u64; 2] = [8, 16];

/// The position of the trust area on its disk.
pub const TRUST: [u64; 2] = [256, 512];

/// The robot's disk: not a name that any board has.
const DISK: &str = "disk";

/// A robot on files.
pub struct Robot {
    pub dir: tempfile::TempDir,
    pub size: u64,
}

/// The options of a robot.
pub struct Plan {
    pub running: Slot,
    pub kind: &'static str,
    pub version: &'static str,
    pub keys: KeySet,
    pub size: u64,
    pub state: BootState,
    /// On a file system in memory: for many robots whose own files do not matter.
    pub in_memory: bool,
    /// Whether the image has a trust area besides `data`.
    pub trust_area: bool,
    /// The lowest key epoch that the image requires.
    pub key_epoch: u32,
    /// Further lines of `device.toml`'s list of partitions.
    pub partitions: &'static str,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            running: Slot::A,
            kind: "development",
            version: "1.0.0",
            keys: bundles::keys(),
            size: 4 << 20,
            state: BootState::first(),
            in_memory: false,
            trust_area: true,
            key_epoch: 0,
            partitions: "",
        }
    }
}

impl Plan {
    pub fn make(self) -> Robot {
        let memory = Path::new("/dev/shm");
        let place =
            if self.in_memory && memory.is_dir() { memory.into() } else { std::env::temp_dir() };
        let robot = Robot { dir: tempfile::tempdir_in(place).unwrap(), size: self.size };
        let sectors = self.size / 512;
        robot.file(
            "usr/lib/slipway/device.toml",
            format!(
                "product = 'robot-test'\nversion = '{}'\nminimum-version = '1.0.0'\nkind = '{}'\nkey-epoch = {}\nboard = 'board-one'\n\
                 boot-flow = 'uboot'\ncompatible = ['maker,board-one']\nlater = 'ignored'\n\
                 [boot-state]\nsectors = [{}, {}]\n[trust]\nsectors = {:?}\n[partitions]\n\
                 root-a = {{ number = 2, start-sector = 8192, sectors = {sectors} }}\n\
                 root-b = {{ number = 3, start-sector = 99999, sectors = {sectors} }}\n{}",
                self.version,
                self.kind,
                self.key_epoch,
                SECTORS[0],
                SECTORS[1],
                if self.trust_area { TRUST.to_vec() } else { Vec::new() },
                self.partitions
            ),
        );
        robot.file("usr/lib/slipway/keyset.json", serde_json::to_vec(&self.keys).unwrap());
        robot.file("proc/device-tree/compatible", "maker,board-one-b\0maker,board-one\0soc\0");
        robot.file("proc/sys/kernel/random/boot_id", "01234567-89ab\n");
        for (number, start) in [(2, 8192), (3, 99999)] {
            let folder = format!("sys/devices/platform/{DISK}/{DISK}p{number}");
            robot.file(&format!("{folder}/partition"), format!("{number}\n"));
            robot.file(&format!("{folder}/start"), format!("{start}\n"));
            robot.file(&format!("{folder}/size"), format!("{sectors}\n"));
        }
        robot.file("sys/dev/block/README", "");
        for number in [2, 3] {
            let link = format!("../../devices/platform/{DISK}/{DISK}p{number}");
            symlink(link, robot.path(&format!("sys/dev/block/179:{number}"))).unwrap();
        }
        let mut disk = vec![0; 1 << 20];
        disk[SECTORS[0] as usize * 512..][..512].copy_from_slice(&self.state.encode());
        robot.file(&format!("dev/{DISK}"), disk);
        for slot in [Slot::A, Slot::B] {
            robot.fill(slot, &old_system(slot, self.size));
        }
        robot.start(self.running);
        robot
    }
}

/// The content of a slot before the test: a separate system, with a first block.
pub fn old_system(slot: Slot, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    let half = size as usize / 2;
    bytes[..half].copy_from_slice(&noise(half, if slot == Slot::A { 71 } else { 72 }));
    // As in ext4.
    bytes[..1024].fill(0);
    bytes
}

impl Robot {
    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    pub fn file(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub fn root(&self) -> slotd::RootDir {
        slotd::RootDir::new(self.dir.path())
    }

    pub fn slot_path(&self, slot: Slot) -> PathBuf {
        self.path(&format!("dev/{DISK}p{}", if slot == Slot::A { 2 } else { 3 }))
    }

    pub fn fill(&self, slot: Slot, bytes: &[u8]) {
        fs::write(self.slot_path(slot), bytes).unwrap();
    }

    pub fn slot(&self, slot: Slot) -> Vec<u8> {
        fs::read(self.slot_path(slot)).unwrap()
    }

    /// This slot runs from now on.
    pub fn start(&self, slot: Slot) {
        let number = if slot == Slot::A { 2 } else { 3 };
        self.file(
            "proc/self/mountinfo",
            format!(
                "20 1 0:2 / / rw - rootfs none rw\n\
                 24 20 179:{number} / / ro,relatime - ext4 /dev/{DISK}p{number} ro\n\
                 25 24 0:22 / /sys rw - sysfs sysfs rw\n"
            ),
        );
    }

    /// The effective boot state.
    pub fn state(&self) -> BootState {
        let disk = fs::read(self.path(&format!("dev/{DISK}"))).unwrap();
        let copies = SECTORS.map(|sector| disk[sector as usize * 512..][..512].to_vec());
        bundle::bootstate::find_newest(copies.iter().map(Vec::as_slice)).unwrap().1
    }

    pub fn set_state(&self, state: BootState) {
        let path = self.path(&format!("dev/{DISK}"));
        let mut disk = fs::read(&path).unwrap();
        for sector in SECTORS {
            disk[sector as usize * 512..][..512].fill(0);
        }
        disk[SECTORS[1] as usize * 512..][..512].copy_from_slice(&state.encode());
        fs::write(path, disk).unwrap();
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slotd"));
        command.args(["--format", "json", "--root"]).arg(self.dir.path()).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs `slotd`, and expects success.
    pub fn run(&self, args: &[&str]) -> Value {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        answer(&output)
    }

    /// Runs `slotd`, and expects a refusal with this exit code and refusal code.
    pub fn refused(&self, args: &[&str]) -> (i32, String) {
        let output = self.command(args).output().unwrap();
        let refusal = answer(&output)["refused"].clone();
        for part in ["message", "help"] {
            assert!(!refusal[part].as_str().unwrap_or_default().is_empty(), "{args:?}: {output:?}");
        }
        (output.status.code().unwrap(), refusal["code"].as_str().unwrap().to_owned())
    }

    /// Kinds of the events in the log, oldest first.
    pub fn events(&self) -> Vec<Value> {
        self.run(&["log"]).as_array().unwrap().clone()
    }
}

pub fn answer(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// A bundle for [`Robot`], before it is signed.
pub fn system(content: &[u8]) -> Parts {
    let mut parts = parts(&[content], 2);
    parts.manifest.components[0].payloads[0].role = "root".to_owned();
    parts
}

/// The signed bundle.
pub fn bundle_of(content: &[u8]) -> Vec<u8> {
    system(content).write(&[TestKey::new(1)])
}

/// A bundle with a version and a floor.
pub fn bundle_of_version(content: &[u8], version: &str, minimum: &str) -> Vec<u8> {
    let mut parts = system(content);
    parts.manifest.version = Version::parse(version).unwrap();
    parts.manifest.minimum_version = Version::parse(minimum).unwrap();
    parts.write(&[TestKey::new(1)])
}

/// A system: a first block, content with zeros and noise, and free space at the end.
pub fn new_system(size: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    let used = size as usize / 4 * 3;
    for (at, block) in bytes[..used].chunks_mut(4096).enumerate() {
        if at % 5 != 3 {
            block.copy_from_slice(&noise(block.len(), seed << 32 | at as u64));
        }
    }
    // As in ext4; a FAT begins at once.
    if !seed.is_multiple_of(5) {
        bytes[..1024].fill(0);
    }
    bytes
}

pub fn write(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

pub fn keys_of(seeds: &[(u8, BuildKind, u32)]) -> KeySet {
    let keys = seeds.iter().map(|(seed, kind, epoch)| TestKey::new(*seed).trusted(*kind, *epoch));
    KeySet { serial: 0, keys: keys.collect() }
}
