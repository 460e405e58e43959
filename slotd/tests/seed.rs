//! What the flasher left for the first boot, on a real FAT: taken over once, then gone to its last byte.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use common::{Plan, Robot};

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
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(5), "{said}");
        assert!(said.contains("bad-seed") && !said.contains("secret"), "{said}");
        assert!(planted(&robot), "{said}");
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
