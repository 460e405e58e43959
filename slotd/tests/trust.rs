//! Revoked trust stays revoked, and the owner can always recover: keys, floors, and every file of the agent, when it
//! is lost, forged, damaged or truncated.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::fs;
use std::sync::Mutex;

use bundle::bootstate::{BootState, Slot};
use bundle::{BuildKind, KeySet, Version};
use common::bundles::{TestKey, mixed};
use common::{Plan, Robot, TRUST, bundle_of_version, keys_of, new_system, system, write};
use slotd::ratchet::{Ratchet, RatchetSectors};
use slotd::storage::Storage;

const DEVELOPMENT: BuildKind = BuildKind::Development;

/// Keys by seed, of the epoch of the same number; those with a minus are revoked.
fn set(serial: u32, keys: &[i8]) -> KeySet {
    let mut set = keys_of(
        &keys
            .iter()
            .map(|k| (k.unsigned_abs(), DEVELOPMENT, u32::from(k.unsigned_abs())))
            .collect::<Vec<_>>(),
    );
    set.serial = serial;
    set.keys.iter_mut().zip(keys).for_each(|(key, k)| key.revoked = *k < 0);
    set
}

fn json(set: &KeySet) -> Vec<u8> {
    serde_json::to_vec(set).unwrap()
}

/// Writes a key set with its signature, for `slotd keys`.
fn carried(robot: &Robot, set: &KeySet, signer: u8, comment: &str) -> String {
    let json = json(set);
    let signature = TestKey::new(signer).sign(&json, comment).text;
    write(robot.dir.path(), "carried.json.minisig", signature.as_bytes());
    write(robot.dir.path(), "carried.json", &json)
}

fn take(robot: &Robot, set: &KeySet, signer: u8) {
    robot.run(&["keys", &carried(robot, set, signer, "slipway keys 1")]);
}

/// The file of a bundle of 1.2.3 that this key has signed.
fn by(robot: &Robot, signer: u8) -> String {
    let bundle = system(&new_system(1 << 20, 3)).write(&[TestKey::new(signer)]);
    write(robot.dir.path(), &format!("by-{signer}.bundle"), &bundle)
}

/// Checks that of these keys exactly those in `good` may sign bundles.
fn only(robot: &Robot, good: &[u8], bad: &[u8]) {
    for signer in good {
        robot.run(&["verify", &by(robot, *signer)]);
    }
    for signer in bad {
        let (_, code) = robot.refused(&["verify", &by(robot, *signer)]);
        assert!(["not-trusted", "no-keys"].contains(&code.as_str()), "key {signer}: {code}");
    }
}

fn image_keys(robot: &Robot, set: &KeySet) {
    robot.file("usr/lib/slipway/keyset.json", json(set));
}

fn lose_data(robot: &Robot) {
    fs::remove_dir_all(robot.path("data")).unwrap();
}

fn alarm(robot: &Robot) -> String {
    robot.run(&["status"])["alarm"].as_str().unwrap_or_default().to_owned()
}

fn with_keys(keys: KeySet) -> Robot {
    Plan { keys, ..Plan::default() }.make()
}

#[test]
fn a_planted_key_set_counts_for_nothing_and_is_told() {
    let robot = with_keys(set(1, &[1]));
    fs::create_dir_all(robot.path("data/slotd")).unwrap();
    for signature in [None, Some(9)] {
        let planted = set(u32::MAX, &[9]);
        robot.file("data/slotd/keyset.json", json(&planted));
        if let Some(signer) = signature {
            let text = TestKey::new(signer).sign(&json(&planted), "slipway keys 2").text;
            robot.file("data/slotd/keyset.json.minisig", text);
        }
        only(&robot, &[1], &[9]);
        assert!(alarm(&robot).contains("no valid signature"), "{}", alarm(&robot));
    }
    // Also in the agent's own file, as a chain.
    let link = |signer: u8, set: &KeySet| {
        let text = String::from_utf8(json(set)).unwrap();
        let signature = TestKey::new(signer).sign(text.as_bytes(), "x").text;
        serde_json::json!({ "set": text, "signature": signature })
    };
    let planted =
        serde_json::json!({ "chain": [link(9, &set(7, &[9]))], "serial": u32::MAX, "counted": [] });
    robot.file("data/slotd/trust.json", planted.to_string());
    only(&robot, &[1], &[9]);
    // It does not block the owner's own set, with any serial, which repairs it.
    take(&robot, &set(2, &[-1, 2]), 1);
    only(&robot, &[2], &[1, 9]);
    assert_eq!(alarm(&robot), "");
    let events = robot.events();
    assert_eq!(events.iter().filter(|e| e["event"] == "damage-found").count(), 1);
}

#[test]
fn a_set_that_a_key_has_signed_before_does_not_come_back() {
    let robot = with_keys(set(5, &[1, 3]));
    let older = set(3, &[1, 2]);
    robot.file("data/slotd/keyset.json", json(&older));
    let signature = TestKey::new(1).sign(&json(&older), "slipway keys 3").text;
    robot.file("data/slotd/keyset.json.minisig", signature);
    only(&robot, &[1, 3], &[2]);
    // A set that leaves no key is refused too, with the reason.
    let none = carried(&robot, &set(6, &[-1, -3]), 1, "slipway keys 6");
    let output = robot.command(&["keys", &none]).output().unwrap();
    let printed = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(printed.contains("would prevent all updates"), "{printed}");
}

#[test]
fn what_an_older_agent_has_taken_still_revokes_and_gives_nothing() {
    let robot = with_keys(set(1, &[1, 2]));
    robot.file("data/slotd/keyset.json", json(&set(2, &[-1, 2, 3])));
    only(&robot, &[2], &[1, 3]);
    // But an unsigned set cannot revoke everything.
    robot.file("data/slotd/keyset.json", json(&set(2, &[-1, -2])));
    only(&robot, &[1, 2], &[]);
    assert!(alarm(&robot).contains("they are ignored"));
    // With its signature, it applies in full.
    let newer = set(3, &[-1, 2, 3]);
    robot.file("data/slotd/keyset.json", json(&newer));
    robot.file(
        "data/slotd/keyset.json.minisig",
        TestKey::new(2).sign(&json(&newer), "by hand").text,
    );
    only(&robot, &[2, 3], &[1]);
    assert_eq!(alarm(&robot), "");
}

#[test]
fn a_chain_of_rotations_leads_from_any_image_to_the_newest_set() {
    let robot = with_keys(set(1, &[1]));
    let (second, third) = (set(2, &[-1, 2]), set(3, &[-1, -2, 3]));
    take(&robot, &second, 1);
    take(&robot, &third, 2);
    only(&robot, &[3], &[1, 2]);
    // An update installs an image with one of the intermediate sets, the newest, or a newer one.
    image_keys(&robot, &second);
    only(&robot, &[3], &[1, 2]);
    image_keys(&robot, &third);
    only(&robot, &[3], &[1, 2]);
    image_keys(&robot, &set(4, &[-3, 4]));
    only(&robot, &[4], &[1, 2, 3]);
    // A changed link of the chain is not followed.
    image_keys(&robot, &set(1, &[1]));
    let path = robot.path("data/slotd/trust.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("epoch\\\":3", "epoch\\\":9")).unwrap();
    only(&robot, &[3], &[1, 2]);
    fs::remove_file(robot.path("data/slotd/keyset.json")).unwrap();
    let raw = robot.path("dev/disk");
    let mut disk = fs::read(&raw).unwrap();
    disk[TRUST[0] as usize * 512..].fill(0);
    fs::write(&raw, disk).unwrap();
    only(&robot, &[], &[1, 3]);
}

#[test]
fn a_revocation_survives_the_loss_of_data_and_of_one_copy() {
    let robot = with_keys(set(1, &[1]));
    take(&robot, &set(2, &[-1, 2]), 1);
    lose_data(&robot);
    only(&robot, &[2], &[1]);
    // The older copy is overwritten, so that losing the newer one loses only one change.
    take(&robot, &set(3, &[-1, 2, 3]), 2);
    lose_data(&robot);
    only(&robot, &[2, 3], &[1]);
    let raw = robot.path("dev/disk");
    let disk = fs::read(&raw).unwrap();
    for sector in TRUST {
        let mut torn = disk.clone();
        torn[sector as usize * 512 + 100..][..412].fill(0xff);
        fs::write(&raw, torn).unwrap();
        only(&robot, &[2], &[1]);
        assert!(alarm(&robot).contains("trust area"), "{}", alarm(&robot));
        // The next commit repairs it.
        robot.run(&["commit"]);
        assert_eq!(alarm(&robot), "");
    }
}

#[test]
fn a_revocation_that_came_with_an_image_holds_in_the_other_slot() {
    for area in [true, false] {
        let robot = Plan { keys: set(1, &[1, 2]), trust_area: area, ..Plan::default() }.make();
        // The image in slot b revokes a key, and changes nothing else.
        let file = by(&robot, 1);
        robot.run(&["install", &file]);
        robot.start(Slot::B);
        image_keys(&robot, &set(5, &[-1, 2]));
        robot.run(&["commit"]);
        // Slot a again, with the image's old set.
        robot.start(Slot::A);
        robot.set_state(BootState { sequence: 9, ..BootState::first() });
        image_keys(&robot, &set(1, &[1, 2]));
        only(&robot, &[2], &[1]);
        if area {
            lose_data(&robot);
            only(&robot, &[2], &[1]);
        }
    }
}

#[test]
fn a_revocation_that_came_with_an_image_on_trial_ends_with_it() {
    let robot = with_keys(set(1, &[1, 2]));
    robot.run(&["install", &by(&robot, 1)]);
    robot.start(Slot::B);
    image_keys(&robot, &set(5, &[-1, 2]));
    only(&robot, &[2], &[1]);
    // Every change of the trust also stores the requirements of the committed system.
    let old = carried(&robot, &set(4, &[1, 3]), 2, "slipway keys 4");
    assert_eq!(robot.refused(&["keys", &old]), (3, "old-key-set".to_owned()));
    robot.start(Slot::A);
    robot.set_state(BootState { sequence: 9, ..BootState::first() });
    image_keys(&robot, &set(1, &[1, 2]));
    only(&robot, &[1, 2], &[]);
}

#[test]
fn when_no_key_is_left_the_owner_s_newer_set_is_the_way_back() {
    let robot = with_keys(set(1, &[1]));
    robot.run(&["install", &by(&robot, 1)]);
    robot.start(Slot::B);
    image_keys(&robot, &set(5, &[-1, 2]));
    robot.run(&["commit"]);
    robot.start(Slot::A);
    robot.set_state(BootState { sequence: 9, ..BootState::first() });
    image_keys(&robot, &set(1, &[1]));
    only(&robot, &[], &[1, 2]);
    let old = carried(&robot, &set(4, &[1, 3]), 1, "slipway keys 4");
    assert_eq!(robot.refused(&["keys", &old]), (3, "old-key-set".to_owned()));
    take(&robot, &set(5, &[-1, 2]), 1);
    only(&robot, &[2], &[1]);
}

#[test]
fn floors_survive_the_loss_of_data_and_a_hostile_one_has_a_way_out() {
    let robot = with_keys(set(1, &[1, 2]));
    let mut parts = system(&new_system(1 << 20, 2));
    parts.manifest.version = Version::parse("2.1.0").unwrap();
    parts.manifest.minimum_version = Version::parse("2.0.0").unwrap();
    parts.manifest.key_epoch = 2;
    let two = write(robot.dir.path(), "two.bundle", &parts.write(&[TestKey::new(2)]));
    let old = bundle_of_version(&mixed(9000), "1.5.0", "1.0.0");
    let old = write(robot.dir.path(), "old.bundle", &old);
    robot.run(&["install", &two]);
    robot.start(Slot::B);
    // A running trial does not raise the floor: after a rollback the older version may be installed again.
    assert_eq!(robot.run(&["status"])["floor"]["version"], "1.0.0");
    robot.run(&["verify", &old]);
    assert_eq!(robot.run(&["status"])["floor"]["version"], "1.0.0");
    robot.run(&["commit"]);
    lose_data(&robot);
    let floor = robot.run(&["status"])["floor"].clone();
    assert_eq!((&floor["version"], &floor["key-epoch"]), (&"2.0.0".into(), &2.into()));
    assert_eq!(robot.refused(&["verify", &old]), (3, "below-floor".to_owned()));

    // An epoch higher than any key's: the highest existing one is required, and the owner's key still installs.
    robot.file("data/slotd/trust.json", r#"{"key-epoch": 4000000000, "later": [1]}"#);
    assert!(alarm(&robot).contains("2 is required instead"), "{}", alarm(&robot));
    robot.run(&["verify", &two]);
    robot.run(&["commit"]);
    assert_eq!(alarm(&robot), "");
    lose_data(&robot);
    assert_eq!(robot.run(&["status"])["floor"]["key-epoch"], 2);

    // A claim that only `data` makes (a flipped bit is enough) applies as long as it is there, and spreads no further.
    robot.file("data/slotd/floor.json", r#"{"version": "9.0.0", "key-epoch": 2}"#);
    robot.run(&["commit"]);
    assert_eq!(robot.run(&["status"])["floor"]["version"], "9.0.0");
    lose_data(&robot);
    assert_eq!(robot.run(&["status"])["floor"]["version"], "2.0.0");
}

#[test]
fn the_image_itself_asks_for_a_key_epoch() {
    let robot = Plan { keys: set(1, &[1, 2]), key_epoch: 2, ..Plan::default() }.make();
    only(&robot, &[2], &[1]);
    // A key set signed by a key of an epoch below the floor is refused too.
    let file = carried(&robot, &set(2, &[1, 2, 3]), 1, "x");
    assert_eq!(robot.refused(&["keys", &file]), (3, "not-trusted".to_owned()));
    take(&robot, &set(2, &[1, 2, 3]), 2);
}

#[test]
fn a_release_robot_takes_no_key_set_of_a_development_key() {
    let keys = keys_of(&[(1, BuildKind::Development, 1), (2, BuildKind::Release, 1)]);
    let robot = Plan { kind: "release", keys: keys.clone(), ..Plan::default() }.make();
    let next = KeySet { serial: 1, ..keys };
    // With any content of `data`: empty or damaged.
    for damage in [None, Some("{")] {
        if let Some(damage) = damage {
            for name in ["keyset.json", "trust.json"] {
                robot.file(&format!("data/slotd/{name}"), damage);
            }
        }
        let file = carried(&robot, &next, 1, "x");
        assert_eq!(robot.refused(&["keys", &file]), (3, "not-trusted".to_owned()));
    }
    take(&robot, &next, 2);
}

#[test]
fn older_software_is_started_only_for_a_reason() {
    let robot = Plan::default().make();
    let two = bundle_of_version(&new_system(1 << 20, 2), "2.1.0", "2.0.0");
    let two = write(robot.dir.path(), "two.bundle", &two);
    robot.run(&["install", &two]);
    robot.start(Slot::B);
    robot.run(&["commit"]);
    // Slot a was flashed: its version was recorded during the install.
    let state = robot.state();
    let (exit, code) = robot.refused(&["boot-other"]);
    assert_eq!((exit, code.as_str(), robot.state()), (3, "below-floor", state));
    let output = robot.command(&["boot-other"]).output().unwrap();
    let answer = String::from_utf8(output.stdout).unwrap();
    assert!(answer.contains("slot a is 1.0.0") && answer.contains("2.0.0 or later"), "{answer}");
    robot.run(&["boot-other", "--allow-downgrade", "field test"]);
    assert_eq!(robot.state().trial, Some(Slot::A));
    let events = robot.events();
    let allowed = events.iter().find(|event| event["event"] == "downgrade-allowed").unwrap();
    assert_eq!((&allowed["version"], &allowed["reason"]), (&"1.0.0".into(), &"field test".into()));
    // Ending a trial has no requirements.
    robot.run(&["roll-back"]);
    // A slot above the floor starts as usual.
    let robot = Plan::default().make();
    let one = bundle_of_version(&new_system(1 << 20, 2), "1.1.0", "1.0.0");
    robot.run(&["install", &write(robot.dir.path(), "one.bundle", &one)]);
    robot.start(Slot::B);
    robot.run(&["commit"]);
    robot.run(&["boot-other"]);
}

#[test]
fn a_signature_is_good_for_one_purpose() {
    let robot = with_keys(set(1, &[1]));
    let next = set(2, &[1, 2]);
    for other in ["bundle", "release", "channel", "stage"] {
        let file = carried(&robot, &next, 1, &format!("slipway {other} robot 1.0.0"));
        assert_eq!(robot.refused(&["keys", &file]), (3, "not-trusted".to_owned()), "{other}");
    }
    // The default comment of `minisign -S`.
    robot.run(&[
        "keys",
        &carried(&robot, &next, 1, "timestamp:1700000000\tfile:keyset.json\thashed"),
    ]);
}

/// Every file of the agent.
const KEPT: [&str; 10] = [
    "slotd/trust.json",
    "slotd/floor.json",
    "slotd/keyset.json",
    "slotd/keyset.json.minisig",
    "slotd/slot-a.json",
    "slotd/slot-b.json",
    "slotd/journal.json",
    "slotd/tryboot.json",
    "slotd/provisioned.json",
    "apps/api/.state.json",
];

#[test]
fn whatever_is_damaged_on_data_the_robot_updates_and_heals() {
    let damages: [(&str, Option<Vec<u8>>); 7] = [
        ("missing", None),
        ("empty", Some(Vec::new())),
        ("half", Some(b"{\"version\": \"1.".to_vec())),
        ("zeros", Some(vec![0; 4096])),
        ("of another form", Some(b"[1, 2]".to_vec())),
        ("too long", Some(vec![b' '; (1 << 20) + 1])),
        ("a directory", None),
    ];
    let mut rounds = 0;
    for file in KEPT.iter().chain(&["slotd/log/events.jsonl"]) {
        for (damage, content) in &damages {
            // A robot that has installed a key set and committed an update.
            let robot = Plan { in_memory: true, keys: set(1, &[1]), ..Plan::default() }.make();
            take(&robot, &set(2, &[-1, 2]), 1);
            let update = by(&robot, 2);
            robot.run(&["install", &update]);
            robot.start(Slot::B);
            robot.run(&["commit"]);
            let path = robot.path("data").join(file);
            drop(fs::remove_file(&path));
            match content {
                Some(content) => robot.file(&format!("data/{file}"), content),
                None if *damage == "a directory" => {
                    fs::create_dir_all(path.join("sub")).unwrap();
                }
                None => {}
            }
            let what = format!("{file}, {damage}");
            // A missing file is not always damage, and neither is a log without lines.
            let told = *damage != "missing" && !file.contains("log/") && !file.ends_with("minisig");
            assert_eq!(!alarm(&robot).is_empty(), told, "{what}: {}", alarm(&robot));
            only(&robot, &[2], &[1]);
            robot.run(&["install", &update]);
            robot.start(Slot::A);
            robot.run(&["commit"]);
            assert_eq!(robot.state().active, Slot::A, "{what}");
            assert_eq!(alarm(&robot), "", "{what}: not healed");
            only(&robot, &[2], &[1]);
            let found = robot.events().iter().filter(|e| e["event"] == "damage-found").count();
            assert_eq!(found, usize::from(told), "{what}");
            rounds += 1;
        }
    }
    assert_eq!(rounds, 77);
}

#[test]
fn what_a_later_agent_has_written_is_understood() {
    let robot = with_keys(set(1, &[1]));
    let later = [
        (
            "trust.json",
            r#"{"version":"1.1.0","key-epoch":1,"serial":1,"counted":[],"chain":[],"later":{}}"#,
        ),
        ("floor.json", r#"{"version":"1.1.0","key-epoch":1,"later":7}"#),
    ];
    for (name, text) in later {
        robot.file(&format!("data/slotd/{name}"), text);
    }
    assert_eq!(robot.run(&["status"])["floor"]["version"], "1.1.0");
    assert!(!alarm(&robot).contains("damaged"), "{}", alarm(&robot));
}

#[test]
fn a_commit_is_done_whatever_cannot_be_kept() {
    let robot = Plan::default().make();
    robot.run(&["install", &by(&robot, 1)]);
    robot.start(Slot::B);
    // The image's key set is damaged, and the trust area is after the disk's end.
    robot.file("usr/lib/slipway/keyset.json", "{");
    let device = robot.path("usr/lib/slipway/device.toml");
    let text = fs::read_to_string(&device).unwrap();
    fs::write(&device, text.replace("[256, 512]", "[99999, 999999]")).unwrap();
    robot.run(&["commit"]);
    assert_eq!(robot.state().active, Slot::B);
    assert!(alarm(&robot).contains("trust area"));
}

/// A disk with a cache: unflushed writes may be lost or torn.
struct Cached {
    durable: Mutex<Vec<u8>>,
    volatile: Mutex<Vec<(usize, Vec<u8>)>>,
}

impl Storage for &Cached {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let mut bytes = self.durable.lock().unwrap().clone();
        for (at, written) in &*self.volatile.lock().unwrap() {
            bytes[*at..*at + written.len()].copy_from_slice(written);
        }
        buffer.copy_from_slice(&bytes[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        buffer.copy_from_slice(&self.durable.lock().unwrap()[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.volatile.lock().unwrap().push((offset as usize, bytes.to_vec()));
        Ok(())
    }

    fn flush(&self) -> std::io::Result<()> {
        let mut bytes = self.durable.lock().unwrap();
        for (at, written) in self.volatile.lock().unwrap().drain(..) {
            bytes[at..at + written.len()].copy_from_slice(&written);
        }
        Ok(())
    }
}

#[test]
fn a_torn_write_of_the_trust_area_leaves_the_old_or_the_new() {
    let disk = Cached { durable: Mutex::new(vec![0; 1 << 20]), volatile: Mutex::new(Vec::new()) };
    let ratchet = |n: u32| Ratchet {
        serial: n,
        counted: vec![format!("{n:016X}"); 100],
        ..Ratchet::default()
    };
    let area = RatchetSectors::new(&disk, TRUST);
    assert_eq!((area.read().ratchet, area.read().damage.len()), (None, 0));
    let mut cuts = 0;
    for n in 1..=6 {
        let before = disk.durable.lock().unwrap().clone();
        // Durable when it returns: a cut right afterwards loses nothing.
        area.write(&ratchet(n)).unwrap();
        disk.volatile.lock().unwrap().clear();
        assert_eq!(area.read().ratchet, Some(ratchet(n)));
        let after = disk.durable.lock().unwrap().clone();
        // A cut inside: any sector of the write is old, new, or torn.
        let changed: Vec<usize> =
            (0..2048).filter(|s| before[s * 512..][..512] != after[s * 512..][..512]).collect();
        assert!(changed.len() > 2, "{changed:?}");
        for mask in 0_u32..1 << changed.len() {
            let mut cut = before.clone();
            for (bit, sector) in changed.iter().enumerate() {
                if mask >> bit & 1 == 1 {
                    let place = sector * 512;
                    // The last sector that was reached is torn in its middle.
                    let torn = mask >> bit == 1 && mask & 1 == 0;
                    let length = if torn { 256 } else { 512 };
                    cut[place..place + length].copy_from_slice(&after[place..place + length]);
                }
            }
            let cut = Cached { durable: Mutex::new(cut), volatile: Mutex::new(Vec::new()) };
            let found = RatchetSectors::new(&cut, TRUST).read().ratchet;
            let old = (n > 1).then(|| ratchet(n - 1));
            assert!(found == old || found == Some(ratchet(n)), "{n}, {mask:b}");
            cuts += 1;
        }
    }
    assert!(cuts >= 90, "{cuts}");
}

/// A disk that acknowledges writes but drops them.
struct Deaf<'a>(&'a Cached);

impl Storage for Deaf<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, buffer)
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.read_back(offset, buffer)
    }

    fn write_at(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_that_keeps_nothing_is_not_believed() {
    let disk = Cached { durable: Mutex::new(vec![0; 1 << 20]), volatile: Mutex::new(Vec::new()) };
    let why = RatchetSectors::new(&Deaf(&disk), TRUST)
        .write(&Ratchet::default())
        .unwrap_err()
        .to_string();
    assert!(why.contains("reads back differently than written"), "{why}");
}
