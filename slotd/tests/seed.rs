//! The first-boot settings from the flasher, on a real FAT: applied once, then erased to the last byte.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;
#[allow(dead_code)]
#[path = "common/crash.rs"]
mod crash;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use common::{Plan, Robot};
use slotd::RootDir;
use slotd::data::seed::{AppliedSettings, seed_with};
use slotd::files::{DirectFileChanges, FileChanges};

const SECTORS: u64 = 16 << 11;
const PASSWORD: &str = "pass \"with\" # marks";

fn robot() -> Robot {
    let robot = Plan {
        partitions: "boot = { number = 1, start-sector = 2048, sectors = 32768 }\n",
        ..Plan::default()
    }
    .make();
    let folder = "sys/devices/platform/disk/diskp1";
    robot.file(&format!("{folder}/partition"), "1\n");
    robot.file(&format!("{folder}/start"), "2048\n");
    robot.file(&format!("{folder}/size"), format!("{SECTORS}\n"));
    robot.file("dev/diskp1", vec![0; (SECTORS * 512) as usize]);
    robot.file("proc/sys/kernel/hostname", "robot");
    robot.file("data/identity/.keep", "");
    robot.file("run/slipway/data-state", "condition=clean\nwhy=\n");
    let mut volume = open(&robot);
    fatfs::format_volume(&mut volume, fatfs::FormatVolumeOptions::new()).unwrap();
    robot
}

fn open(robot: &Robot) -> fs::File {
    OpenOptions::new().read(true).write(true).open(robot.path("dev/diskp1")).unwrap()
}

fn plant(robot: &Robot, text: &[u8]) {
    let fat = fatfs::FileSystem::new(open(robot), fatfs::FsOptions::new()).unwrap();
    let mut file = fat.root_dir().create_file("slipway-seed.toml").unwrap();
    file.truncate().unwrap();
    file.write_all(text).unwrap();
    file.flush().unwrap();
}

fn planted(robot: &Robot) -> bool {
    let fat = fatfs::FileSystem::new(open(robot), fatfs::FsOptions::new()).unwrap();
    fat.root_dir().open_file("slipway-seed.toml").is_ok()
}

/// Whether the partition has these bytes anywhere.
fn has(robot: &Robot, what: &str) -> bool {
    let mut bytes = Vec::new();
    open(robot).read_to_end(&mut bytes).unwrap();
    bytes.windows(what.len()).any(|window| window == what.as_bytes())
}

fn all() -> String {
    let password = PASSWORD.replace('"', "\\\"");
    format!(
        "hostname = \"bench-7\"\nssh-keys = [\"ssh-ed25519 AAAA me\", \"ssh-ed25519 BBBB you\"]\n\
         [wifi]\nssid = \"Lab 2\"\npassword = \"{password}\"\n"
    )
}

#[test]
fn all_is_taken_over_and_nothing_stays_on_the_card() {
    let robot = robot();
    assert_eq!(robot.run(&["seed"])["taken"].as_array().unwrap().len(), 0);
    let keys = "data/identity/ssh/authorized_keys.d/root";
    robot.file(keys, "ssh-ed25519 BBBB you");
    robot.file("etc/passwd", "root:x:0:0:::\nupdate:x:1001:1001:::\n");
    plant(&robot, all().as_bytes());
    assert!(has(&robot, "with"));
    let taken = robot.run(&["seed"]);
    assert_eq!(taken["taken"], serde_json::json!(["hostname", "ssh-keys", "wifi"]));
    let text = |path: &str| fs::read_to_string(robot.path(path)).unwrap();
    assert_eq!(text("data/identity/hostname"), "bench-7\n");
    assert_eq!(text("proc/sys/kernel/hostname"), "bench-7");
    assert_eq!(text(keys), "ssh-ed25519 BBBB you\nssh-ed25519 AAAA me\n");
    assert_eq!(
        text(&keys.replace("root", "update")),
        "ssh-ed25519 AAAA me\nssh-ed25519 BBBB you\n"
    );
    let wifi = "data/network/wpa_supplicant-wlan0.conf";
    let expected =
        format!("network={{\n\tssid=4c61622032\n\tscan_ssid=1\n\tpsk=\"{PASSWORD}\"\n}}\n");
    assert_eq!(text(wifi), expected);
    let mode = fs::metadata(robot.path(wifi)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(!planted(&robot));
    for gone in ["with", "bench-7", "Lab 2"] {
        assert!(!has(&robot, gone), "{gone} is still on the card");
    }
    let events = robot.events();
    let last = events.last().unwrap().to_string();
    assert!(last.contains("seeded") && !last.contains("with"), "{last}");
    // Once.
    assert_eq!(robot.run(&["seed"])["taken"].as_array().unwrap().len(), 0);
    assert_eq!(text("data/identity/hostname"), "bench-7\n");
}

#[test]
fn an_open_network_has_no_key() {
    let robot = robot();
    plant(&robot, b"[wifi]\nssid = \"Open\"\n");
    robot.run(&["seed"]);
    let path = robot.path("data/network/wpa_supplicant-wlan0.conf");
    assert!(fs::read_to_string(path).unwrap().contains("key_mgmt=NONE"));
}

/// The derived key that `wpa_passphrase` and imagers write instead of a password: the supplicant accepts it only
/// without quotes.
#[test]
fn a_key_in_hexadecimal_is_one_and_no_password() {
    let robot = robot();
    let key = "0123456789abcdefABCDEF0123456789abcdefABCDEF0123456789abcdefABCD";
    plant(&robot, format!("[wifi]\nssid = \"Lab\"\npassword = \"{key}\"\n").as_bytes());
    robot.run(&["seed"]);
    let path = robot.path("data/network/wpa_supplicant-wlan0.conf");
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(&format!("\tpsk={key}\n")), "{text}");
}

#[test]
fn a_bad_seed_changes_nothing_and_shows_no_password() {
    let robot = robot();
    let cases: [&[u8]; 9] = [
        b"hostname = \"Bench_7\"",
        b"hostname = \"a\\nb\"",
        b"hostname = \"\"",
        b"ssh-keys = [\"command=x ssh-ed25519 AAAA\"]",
        b"ssh-keys = [\"ssh-ed25519 AAAA\\nssh-ed25519 BBBB\"]",
        b"[wifi]\nssid = \"\"",
        b"[wifi]\nssid = \"Lab\"\npassword = \"secret7\"",
        b"hostname = \"good\"\n[wifi]\nssid = \"Lab\"\npassword = \"secret-secret\"\nother = 1",
        b"hostname = \"good\"\npassword = secret-secret \xff",
    ];
    for text in cases {
        plant(&robot, text);
        let output = robot.command(&["seed"]).output().unwrap();
        let printed = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(5), "{printed}");
        assert!(printed.contains("bad-seed") && !printed.contains("secret"), "{printed}");
        assert!(planted(&robot), "{printed}");
    }
    plant(&robot, &vec![b'#'; 70_000]);
    assert_eq!(robot.refused(&["seed"]), (5, "bad-seed".to_owned()));
    assert!(!robot.path("data/identity/hostname").exists());
    assert!(!robot.path("data/network").exists());
}

#[test]
fn data_in_memory_takes_nothing() {
    let robot = robot();
    plant(&robot, all().as_bytes());
    robot.file("run/slipway/data-state", "condition=memory\nwhy=it is gone\n");
    assert_eq!(robot.refused(&["seed"]), (4, "no-data".to_owned()));
    assert!(planted(&robot));
    robot.file("run/slipway/data-state", "condition=clean\nwhy=\n");
    assert_eq!(robot.run(&["seed"])["taken"].as_array().unwrap().len(), 3);
}

/// A boot partition in memory, which records writes and flushes.
#[derive(Clone, Default)]
struct Volume(Rc<RefCell<Writes>>);

#[derive(Default)]
struct Writes {
    at: u64,
    bytes: Vec<u8>,
    first: Vec<u8>,
    /// Offset and bytes; `None`: a flush.
    log: Vec<Option<(usize, Vec<u8>)>>,
}

impl Volume {
    fn new(bytes: Vec<u8>) -> Self {
        Self(Rc::new(RefCell::new(Writes { first: bytes.clone(), bytes, ..Writes::default() })))
    }

    fn flushed(&self) -> std::io::Result<()> {
        self.0.borrow_mut().log.push(None);
        Ok(())
    }

    /// What a power cut may leave after this many writes and flushes: of the sectors written since the last flush, all,
    /// none, all but one, or only one.
    fn states(&self, point: usize) -> BTreeSet<Vec<u8>> {
        let writes = self.0.borrow();
        let log = &writes.log[..point];
        let flushed = log.iter().rposition(Option::is_none).map_or(0, |at| at + 1);
        let mut safe = writes.first.clone();
        for (at, bytes) in log[..flushed].iter().flatten() {
            safe[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let mut sectors: Vec<(usize, Vec<u8>)> = Vec::new();
        for (at, bytes) in log[flushed..].iter().flatten() {
            let (mut at, mut rest) = (*at, bytes.as_slice());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(512 - at % 512));
                sectors.push((at, now.to_vec()));
                (at, rest) = (at + now.len(), later);
            }
        }
        let with = |keep: &dyn Fn(usize) -> bool| {
            let mut bytes = safe.clone();
            for (_, (at, part)) in sectors.iter().enumerate().filter(|(n, _)| keep(*n)) {
                bytes[*at..at + part.len()].copy_from_slice(part);
            }
            bytes
        };
        let mut states = BTreeSet::from([with(&|_| true), with(&|_| false)]);
        for one in 0..sectors.len() {
            states.insert(with(&|n| n != one));
            states.insert(with(&|n| n == one));
            states.insert(with(&|n| n < one));
        }
        states
    }
}

impl Read for Volume {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut writes = self.0.borrow_mut();
        let at = writes.at as usize;
        let count = (&writes.bytes[at..]).read(buffer)?;
        writes.at += count as u64;
        Ok(count)
    }
}

impl Write for Volume {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let mut writes = self.0.borrow_mut();
        let at = writes.at as usize;
        writes.bytes[at..at + buffer.len()].copy_from_slice(buffer);
        writes.log.push(Some((at, buffer.to_vec())));
        writes.at += buffer.len() as u64;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Volume {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let mut writes = self.0.borrow_mut();
        writes.at = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) => writes.at.checked_add_signed(by).unwrap(),
            SeekFrom::End(by) => (writes.bytes.len() as u64).checked_add_signed(by).unwrap(),
        };
        Ok(writes.at)
    }
}

/// A start with this boot partition.
fn take_over(
    robot: &Robot,
    files: &dyn FileChanges,
    volume: &Volume,
) -> slotd::Result<AppliedSettings> {
    let root = RootDir::new(robot.dir.path());
    let flush = || volume.flushed();
    seed_with(&root, files, Path::new("boot"), volume.clone(), &flush)
}

/// A seed of several sectors: an RSA key is longer than one.
fn long_seed() -> String {
    let key = |name: &str| format!("ssh-rsa {} {name}", "A".repeat(700));
    all().replace("ssh-ed25519 AAAA me", &key("me")).replace("ssh-ed25519 BBBB you", &key("you"))
}

/// A robot with the directories that every start creates, and a small boot partition with a seed.
fn card_with(text: &str) -> (Robot, Vec<u8>) {
    let robot = robot();
    robot.file("data/identity/ssh/authorized_keys.d/root", "ssh-ed25519 CCCC old");
    robot.file("data/network/.keep", "");
    let mut volume = Cursor::new(vec![0; 128 << 10]);
    fatfs::format_volume(&mut volume, fatfs::FormatVolumeOptions::new()).unwrap();
    let fat = fatfs::FileSystem::new(&mut volume, fatfs::FsOptions::new()).unwrap();
    fat.root_dir().create_file("slipway-seed.toml").unwrap().write_all(text.as_bytes()).unwrap();
    fat.unmount().unwrap();
    (robot, volume.into_inner())
}

fn has_file(bytes: &[u8]) -> bool {
    let volume = Cursor::new(bytes.to_vec());
    let fat = fatfs::FileSystem::new(volume, fatfs::FsOptions::new()).unwrap();
    fat.root_dir().open_file("slipway-seed.toml").is_ok()
}

fn taken_from(robot: &Robot) -> BTreeMap<PathBuf, String> {
    let agents = |path: &Path| path.starts_with("slotd");
    let all = crash::snapshot(&robot.path("data"));
    all.into_iter().filter(|(path, _)| !agents(path)).collect()
}

#[test]
fn a_power_cut_anywhere_in_the_boot_partition_leaves_no_password_behind() {
    for text in [all(), long_seed()] {
        let (robot, card) = card_with(&text);
        let volume = Volume::new(card);
        assert_eq!(take_over(&robot, &DirectFileChanges, &volume).unwrap().taken.len(), 3);
        let expected = taken_from(&robot);
        let (mut states, mut again) = (0, 0);
        let points = volume.0.borrow().log.len();
        for point in 0..=points {
            for state in volume.states(point) {
                states += 1;
                let holds = |bytes: &[u8]| {
                    ["with", "Lab 2", "bench-7"].iter().any(|word| {
                        bytes.windows(word.len()).any(|window| window == word.as_bytes())
                    })
                };
                let left = has_file(&state);
                assert!(left || !holds(&state), "point {point}: the password outlives its file");
                assert!(left || point > 0);
                let next = Volume::new(state);
                let seeded = take_over(&robot, &DirectFileChanges, &next)
                    .unwrap_or_else(|refusal| panic!("point {point} of {points}: {refusal}"));
                again += usize::from(!seeded.taken.is_empty());
                assert_eq!(taken_from(&robot), expected, "point {point}");
                let end = next.0.borrow().bytes.clone();
                assert!(!has_file(&end) && !holds(&end), "point {point}");
            }
        }
        println!("{points} writes and flushes, {states} states, {again} taken over again");
        assert!(again > 2 && states > 20, "{again} {states}");
    }
}

#[test]
fn a_power_cut_anywhere_on_data_is_taken_over_again() {
    let (robot, card) = card_with(&long_seed());
    let data = robot.path("data");
    let recorder = crash::Recorder::new(&data);
    take_over(&robot, &recorder, &Volume::new(card.clone())).unwrap();
    let expected = taken_from(&robot);
    let mut states = 0;
    for point in 0..recorder.points() {
        for state in recorder.states(point) {
            states += 1;
            state.write(&data);
            // The boot partition is changed only after all of this is durable.
            take_over(&robot, &DirectFileChanges, &Volume::new(card.clone())).unwrap();
            let mut found = taken_from(&robot);
            found.retain(|path, _| path.extension().is_none_or(|ending| ending != "partial"));
            assert_eq!(found, expected, "point {point}");
        }
    }
    // At its end everything is durable.
    for state in recorder.states(recorder.points() - 1) {
        state.write(&data);
        assert_eq!(taken_from(&robot), expected);
    }
    println!("{states} states");
    assert!(states > 40, "{states}");
}

#[test]
fn a_seed_in_another_encoding_is_not_taken_for_a_half_wiped_one() {
    let wide: Vec<u8> = all().encode_utf16().flat_map(u16::to_le_bytes).collect();
    let robot = robot();
    plant(&robot, &wide);
    assert_eq!(robot.refused(&["seed"]), (5, "bad-seed".to_owned()));
    assert!(planted(&robot));
}
