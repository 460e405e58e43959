//! Compares a slot with its signed bundle, by the real program: one flipped bit is found and named at any position;
//! only the indexes are read, and nothing is written.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::PathBuf;

use bundle::bootstate::Slot;
use common::bundles::{TestKey, noise, parts};
use common::server::{Manners, Server};
use common::{Plan, Robot, bundle_of, new_system, write};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Expects `slot-differs`; returns the message.
fn differs(robot: &Robot, bundle: &str, slot: &str) -> (String, String) {
    let output = robot.command(&["verify", bundle, "--slot", slot]).output().unwrap();
    let refused = &common::answer(&output)["refused"];
    assert_eq!((output.status.code(), &refused["code"]), (Some(4), &Value::from("slot-differs")));
    let word = |name: &str| refused[name].as_str().unwrap().to_owned();
    (word("message"), word("help"))
}

/// Flips the lowest bit of a byte.
fn flip(path: &PathBuf, byte: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[byte as usize] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn one_flipped_bit_is_found_and_named_in_either_slot() {
    let robot = Plan::default().make();
    let new = new_system(4 * MIB - 5000, 1);
    let file = write(robot.dir.path(), "update.bundle", &bundle_of(&new));
    let outcome = robot.run(&["install", &file]);
    let path = robot.slot_path(Slot::B);
    let check = || {
        let verified = robot.run(&["verify", &file, "--slot", "b"]);
        assert_eq!((&verified["slot"], &verified["size"]), (&"b".into(), &new.len().into()));
        assert_eq!(verified["manifest"], outcome["manifest"]);
    };
    check();
    // In the first block, in content, in a hole, in free space, in the last and shorter block.
    let last = new.len() as u64 - 1;
    let hole = (0..4).find(|n| new[(n * 5 + 3) * 4096..][..4096] == [0; 4096]).unwrap() as u64;
    let places = [1024, 40 * 4096 + 77, (hole * 5 + 3) * 4096, last - 100_000, last];
    for slot in [Slot::A, Slot::B] {
        // The second time it is the running slot, below its floor by then, with a trial pending or without.
        robot.start(slot);
        for place in places {
            flip(&path, place);
            let before = fs::read(&path).unwrap();
            let (message, help) = differs(&robot, &file, "b");
            let block = place / 4096 * 4096;
            let length = 4096.min(new.len() as u64 - block);
            let expected = format!(
                "slot b differs from 1.2.3 in 1 of 1023 blocks of 4 KiB\n  root-b: {length} bytes from byte {block}"
            );
            assert_eq!(message, expected);
            assert_eq!(help.contains("boot-other"), slot == Slot::B, "{help}");
            assert_eq!(fs::read(&path).unwrap(), before, "something was written");
            flip(&path, place);
        }
        check();
    }
    // Data after the payload does not belong to the bundle.
    flip(&path, last + 1);
    check();
    // Adjacent blocks are one place; of many places only the first are listed.
    for place in [0, 1, 2, 4].map(|block| block * 4096 + 5).into_iter().chain([last]) {
        flip(&path, place);
    }
    let (message, _) = differs(&robot, &file, "b");
    let lines: Vec<&str> = message.lines().skip(1).map(str::trim).collect();
    let end = format!("root-b: {} bytes from byte {}", last % 4096 + 1, last / 4096 * 4096);
    let expected =
        ["root-b: 12288 bytes from byte 0", "root-b: 4096 bytes from byte 16384", end.as_str()];
    assert_eq!(lines, expected);
    robot.fill(Slot::B, &noise(4 << 20, 5));
    let (message, _) = differs(&robot, &file, "b");
    assert_eq!(message.lines().count(), 2, "{message}");
    // The other slot has another system, and no record says that it should be this one.
    let (message, _) = differs(&robot, &file, "a");
    assert!(message.starts_with("slot a differs from 1.2.3"), "{message}");
    // The record names another bundle: the message says so.
    let other = write(robot.dir.path(), "other.bundle", &bundle_of(&new_system(4 * MIB, 9)));
    let (_, help) = differs(&robot, &other, "b");
    assert!(help.contains(outcome["manifest"].as_str().unwrap()), "{help}");
}

#[test]
fn a_slot_of_two_partitions_is_compared_in_both() {
    let partitions = "boot-a = { number = 4, start-sector = 200000, sectors = 512 }\n\
                      boot-b = { number = 5, start-sector = 300000, sectors = 512 }\n";
    let robot = Plan { size: MIB, partitions, ..Plan::default() }.make();
    for (number, start) in [(4, 200_000), (5, 300_000)] {
        let folder = format!("sys/devices/platform/disk/diskp{number}");
        robot.file(&format!("{folder}/partition"), format!("{number}\n"));
        robot.file(&format!("{folder}/start"), format!("{start}\n"));
        robot.file(&format!("{folder}/size"), "512\n");
        robot.file(&format!("dev/diskp{number}"), vec![0; 512 * 512]);
    }
    let (boot, root) = (noise(200_000, 1), new_system(MIB, 2));
    let mut parts = parts(&[&boot, &root], 1);
    for (payload, role) in parts.manifest.components[0].payloads.iter_mut().zip(["boot", "root"]) {
        payload.role = role.to_owned();
    }
    let file = write(robot.dir.path(), "update.bundle", &parts.write(&[TestKey::new(1)]));
    robot.run(&["install", &file]);
    robot.run(&["verify", &file, "--slot", "b"]);
    flip(&robot.path("dev/diskp5"), 199_999);
    flip(&robot.slot_path(Slot::B), 8192);
    let (message, _) = differs(&robot, &file, "b");
    let lines: Vec<&str> = message.lines().skip(1).map(str::trim).collect();
    let expected = ["boot-b: 3392 bytes from byte 196608", "root-b: 4096 bytes from byte 8192"];
    assert_eq!(lines, expected);
}

#[test]
fn only_the_indexes_are_transferred_and_trust_comes_first() {
    let robot = Plan { size: 32 * MIB, ..Plan::default() }.make();
    let new = noise((32 * MIB) as usize, 3);
    robot.fill(Slot::B, &new);
    let bundle = bundle_of(&new);
    let server = Server::start(bundle.clone(), Manners::default());
    let verified = robot.run(&["verify", &server.address, "--slot", "b"]);
    assert_eq!(verified["slot"], "b");
    let sent = server.sent.load(std::sync::atomic::Ordering::Relaxed);
    assert!(sent * 4 < bundle.len() as u64, "{sent} of {} bytes", bundle.len());
    let mut forged = bundle.clone();
    let at = forged.windows(10).position(|bytes| bytes == b"robot-test").unwrap();
    forged[at] = b'R';
    let file = write(robot.dir.path(), "forged.bundle", &forged);
    let refused = robot.refused(&["verify", &file, "--slot", "b"]);
    assert_eq!(refused, (3, "bad-signature".to_owned()));
    let file = write(robot.dir.path(), "short.bundle", &bundle[..bundle.len() - 600]);
    let refused = robot.refused(&["verify", &file, "--slot", "b"]);
    assert_eq!(refused, (5, "truncated".to_owned()));
    let api = write(robot.dir.path(), "api.bundle", &common::wheels::api("10.0.0"));
    let refused = robot.refused(&["verify", &api, "--slot", "b"]);
    assert_eq!(refused, (3, "unknown-payload".to_owned()));
}
