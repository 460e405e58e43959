//! A `data` without free blocks or inodes, filled by an unprivileged user, does not prevent a system update: it is
//! installed, started and committed on both boot flows, on a card with the agent's reserve and on an older one. On a
//! real ext4 with a loop device if available; otherwise on a file system in memory.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by panicking"
)]

mod common;

use std::fs;
use std::io::{self, Cursor, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use bundle::bootstate::Slot;
use common::rights::{NOBODY, is_root};
use common::{Plan, Robot, bundle_of_version, new_system, write};
use slotd::boot::{BootControl, SlotTrial, Tryboot};
use slotd::device::RobotDevice;
use slotd::events::EventLog;
use slotd::files::DirectFileChanges;
use slotd::health;
use slotd::install::InstallOptions;
use slotd::machine::RobotContext;
use slotd::storage::Storage;

/// What runs out.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Out {
    Blocks,
    Inodes,
}

/// A small file system as a robot's `data`, unmounted at the end of the test.
struct Data(PathBuf);

impl Data {
    /// 80 MiB and 512 inodes, without a reserve for root, as cards in the field are.
    fn mount(robot: &Robot) -> Self {
        let (image, data) = (robot.path("data.img"), robot.path("data"));
        fs::create_dir_all(&data).unwrap();
        fs::set_permissions(robot.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let run = |program: &str, words: &[&str], last: &[&Path]| {
            let mut command = Command::new(program);
            command.args(words).args(last).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        fs::File::create(&image).unwrap().set_len(80 << 20).unwrap();
        let ext4 = run("mke2fs", &["-q", "-F", "-t", "ext4", "-m", "0", "-N", "512"], &[&image])
            && run("mount", &["-t", "ext4", "-o", "loop,nodev,nosuid"], &[&image, &data]);
        let options = ["-t", "tmpfs", "-o", "size=80m,nr_inodes=512,mode=0755,nodev", "tmpfs"];
        assert!(
            ext4 || run("mount", &options, &[&data]),
            "root can mount neither a loop device nor a file system in memory\n\
             help: in a container the test needs the right to mount (--privileged)"
        );
        println!("on {}", if ext4 { "ext4" } else { "tmpfs" });
        Self(data)
    }

    /// A user's home uses all free space.
    fn fill(&self, out: Out) {
        let home = self.0.join("home/robot");
        fs::create_dir_all(&home).unwrap();
        chown(&home, Some(NOBODY), Some(NOBODY)).unwrap();
        let script = match out {
            // With one file some space stays free because of delayed allocation.
            Out::Blocks => {
                "for n in 1 2 3 4; do cat /dev/zero >large$n; sync large$n; done
                 n=0; while dd if=/dev/zero of=small$n bs=1k count=1 conv=fsync; do n=$((n+1)); done"
            }
            Out::Inodes => "n=0; while : >$n; do n=$((n+1)); done",
        };
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(&home).uid(NOBODY).gid(NOBODY);
        command.stderr(Stdio::null()).status().unwrap();
        // Root has no free space either.
        let full = fs::File::create(self.0.join("root"))
            .and_then(|mut file| file.write_all(&[1; 64 << 10]).and_then(|()| file.sync_all()))
            .unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull, "{out:?}");
        fs::remove_file(self.0.join("root")).ok();
    }

    fn reserve(&self) -> usize {
        fs::read_dir(self.0.join("slotd/reserve")).map_or(0, Iterator::count)
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(status.unwrap().success());
    }
}

fn robot() -> Robot {
    let robot = Plan::default().make();
    // The files of every image.
    let check = "overlays/base/etc/slotd/health.d/10-data.toml";
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    robot.file("etc/slotd/health.d/10-data.toml", fs::read(workspace.join(check)).unwrap());
    robot
}

fn prepare(robot: &Robot) {
    let output = robot.command(&["data", "prepare"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// A start into a slot: content in memory is lost.
fn start(robot: &Robot, slot: Slot, version: &str) {
    fs::remove_dir_all(robot.path("run")).ok();
    robot.start(slot);
    let device = fs::read_to_string(robot.path("usr/lib/slipway/device.toml")).unwrap();
    let lines = device.lines().map(|line| match line.split(' ').next() {
        Some("version") => format!("version = '{version}'\n"),
        // As in the bundle: the image has the same values.
        Some("minimum-version") => "minimum-version = '1.1.0'\n".to_owned(),
        _ => format!("{line}\n"),
    });
    robot.file("usr/lib/slipway/device.toml", lines.collect::<String>());
}

fn room(robot: &Robot) -> health::CheckOutcome {
    let checks = health::load_checks(&robot.root());
    checks.iter().find(|check| check.name == "10-data").unwrap().run(&robot.root())
}

/// A card with the reserve, or one that an agent from before it has filled with its files.
fn filled(robot: &Robot, data: &Data, out: Out, reserve: bool) {
    if reserve {
        prepare(robot);
        assert_eq!(data.reserve(), 96);
    } else {
        robot.file("data/data-version.json", r#"{"version":"1.0.0","taken":[],"under-way":null}"#);
    }
    data.fill(out);
}

fn update(robot: &Robot) -> Vec<u8> {
    bundle_of_version(&new_system(robot.size / 2, 3), "1.2.0", "1.1.0")
}

const CASES: [(Out, bool); 4] =
    [(Out::Blocks, true), (Out::Blocks, false), (Out::Inodes, true), (Out::Inodes, false)];

#[test]
fn a_full_data_keeps_no_update_out_with_uboot() {
    if !is_root("a_full_data_keeps_no_update_out_with_uboot") {
        return;
    }
    for (out, reserve) in CASES {
        let robot = robot();
        let data = Data::mount(&robot);
        filled(&robot, &data, out, reserve);
        let file = write(robot.dir.path(), "update.bundle", &update(&robot));
        robot.run(&["install", "--no-restart", &file]);
        assert_eq!(robot.state().trial, Some(Slot::B), "{out:?} {reserve}");
        start(&robot, Slot::B, "1.2.0");
        prepare(&robot);
        // The user continues to write as soon as there is space.
        data.fill(out);
        let found = room(&robot);
        assert!(found.healthy, "{out:?} {reserve}: {}", found.found);
        robot.run(&["commit"]);
        assert_eq!((robot.state().active, robot.state().trial), (Slot::B, None));
        if reserve {
            let version = fs::read_to_string(robot.path("data/data-version.json")).unwrap();
            assert!(version.contains("1.2.0"), "{out:?}: {version}");
            let floor = fs::read_to_string(robot.path("data/slotd/floor.json")).unwrap();
            assert!(floor.contains("1.1.0"), "{out:?}: {floor}");
            assert!(data.reserve() > 90, "{out:?}: {} of 96 are there again", data.reserve());
        }
        assert_eq!(robot.run(&["status"])["floor"]["version"], "1.1.0", "{out:?} {reserve}");
    }
}

/// The boot partition, in memory.
struct Boot<'a>(&'a Mutex<Vec<u8>>);

impl Storage for Boot<'_> {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let all = self.0.lock().unwrap();
        buffer.copy_from_slice(all.get(offset as usize..).unwrap().get(..buffer.len()).unwrap());
        Ok(())
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut all = self.0.lock().unwrap();
        all.get_mut(offset as usize..)
            .unwrap()
            .get_mut(..bytes.len())
            .unwrap()
            .copy_from_slice(bytes);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fn boot_partition() -> Vec<u8> {
    let mut bytes = Cursor::new(vec![0; 5 << 20]);
    fatfs::format_volume(&mut bytes, fatfs::FormatVolumeOptions::new()).unwrap();
    let volume = fatfs::FileSystem::new(&mut bytes, fatfs::FsOptions::new()).unwrap();
    let text = "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n";
    volume.root_dir().create_file("autoboot.txt").unwrap().write_all(text.as_bytes()).unwrap();
    volume.unmount().unwrap();
    bytes.into_inner()
}

#[test]
fn a_full_data_keeps_no_update_out_with_tryboot() {
    if !is_root("a_full_data_keeps_no_update_out_with_tryboot") {
        return;
    }
    let told = |robot: &Robot, partition: u32, trial: u32| {
        let folder = "proc/device-tree/chosen/bootloader";
        robot.file(&format!("{folder}/build-timestamp"), 1_715_613_301_u32.to_be_bytes());
        robot.file(&format!("{folder}/partition"), partition.to_be_bytes());
        robot.file(&format!("{folder}/tryboot"), trial.to_be_bytes());
        robot.file("dev/vcio", "");
        robot.file("proc/sys/kernel/random/boot_id", format!("boot-{partition}-{trial}\n"));
    };
    for (out, reserve) in CASES {
        let robot = robot();
        let data = Data::mount(&robot);
        filled(&robot, &data, out, reserve);
        told(&robot, 2, 0);
        let (root, boot) = (robot.root(), Mutex::new(boot_partition()));
        let flow = |slot| Tryboot::new(Boot(&boot), [2, 3], "2022-11-25", slot, &root).unwrap();
        let device = RobotDevice::read(&root).unwrap();
        let first = flow(Slot::A);
        let machine = RobotContext {
            root: &root,
            about: &device.about,
            running: Slot::A,
            flow: &first,
            slots: &device,
            files: &DirectFileChanges,
            events: &EventLog::new(&root),
        };
        let bundle = bundle::StreamInput(Cursor::new(update(&robot)));
        slotd::update::install(&machine, bundle, &InstallOptions::default(), &|_| {})
            .unwrap_or_else(|refusal| panic!("{out:?} {reserve}: {refusal}"));
        let armed = Some(SlotTrial { slot: Slot::B, tries: 1 });
        assert_eq!(first.status().unwrap().trial, armed, "{out:?} {reserve}");
        // A user may end the trial and arm it again.
        first.roll_back().unwrap();
        assert_eq!(first.status().unwrap().trial, None, "{out:?} {reserve}");
        first.arm_trial(Slot::B).unwrap();
        start(&robot, Slot::B, "1.2.0");
        told(&robot, 3, 1);
        prepare(&robot);
        data.fill(out);
        assert!(room(&robot).healthy, "{out:?} {reserve}");
        let second = flow(Slot::B);
        let runs = Some(SlotTrial { slot: Slot::B, tries: 0 });
        assert_eq!(second.status().unwrap().pending(Slot::B), runs, "{out:?} {reserve}");
        second.commit().unwrap();
        let status = second.status().unwrap();
        assert_eq!((status.active, status.trial), (Slot::B, None), "{out:?} {reserve}");
    }
}

#[test]
fn an_update_that_fills_data_itself_is_not_one_to_keep() {
    if !is_root("an_update_that_fills_data_itself_is_not_one_to_keep") {
        return;
    }
    let robot = robot();
    let data = Data::mount(&robot);
    prepare(&robot);
    assert!(room(&robot).healthy);
    // Only root can do this: the reserve is removed too.
    fs::remove_dir_all(robot.path("data/slotd/reserve")).unwrap();
    data.fill(Out::Blocks);
    let found = room(&robot);
    assert!(!found.healthy && found.found.contains("MiB free, expected 16"), "{}", found.found);
}
