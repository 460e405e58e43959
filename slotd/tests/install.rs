//! Installs with the real program, on files: the content of the slot, what is not transferred or written,
//! and the cost of an interruption.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use bundle::CompressionLevel;
use bundle::bootstate::Slot;
use common::bundles::{TestKey, noise};
use common::server::{Manners, Server};
use common::{
    Plan, Robot, answer, bundle_of, bundle_of_version, new_system, old_system, system, write,
};

const MIB: u64 = 1 << 20;

fn install(robot: &Robot, bundle: &[u8]) -> serde_json::Value {
    let file = write(robot.dir.path(), "update.bundle", bundle);
    robot.run(&["install", &file])
}

#[test]
fn a_slot_is_written_tried_and_committed_and_the_other_follows() {
    let robot = Plan::default().make();
    let (first, second) = (new_system(4 * MIB, 1), new_system(4 * MIB, 2));
    let outcome = install(&robot, &bundle_of(&first));
    assert_eq!(outcome["slot"], "b");
    assert_eq!(robot.slot(Slot::B), first);
    assert_eq!(robot.slot(Slot::A), old_system(Slot::A, 4 * MIB), "the running slot was touched");
    assert_eq!(robot.state().trial, Some(Slot::B));
    let status = robot.run(&["status"]);
    assert_eq!((&status["running"], &status["pending"]), (&"a".into(), &true.into()));

    robot.start(Slot::B);
    assert_eq!(robot.run(&["commit"])["slot"], "b");
    assert_eq!((robot.state().active, robot.state().trial), (Slot::B, None));
    // Installing again succeeds.
    robot.run(&["commit"]);

    let outcome = install(&robot, &bundle_of(&second));
    assert_eq!(outcome["slot"], "a");
    assert_eq!(robot.slot(Slot::A), second);
    assert_eq!(robot.slot(Slot::B), first);
    let kinds: Vec<String> =
        robot.events().iter().map(|e| e["event"].as_str().unwrap().to_owned()).collect();
    let expected = ["install-started", "installed", "committed", "install-started", "installed"];
    assert_eq!(kinds, expected);
}

#[test]
fn what_the_slot_holds_is_not_written_again() {
    let robot = Plan { size: 16 * MIB, ..Plan::default() }.make();
    let old = new_system(16 * MIB, 3);
    robot.fill(Slot::B, &old);
    let outcome = install(&robot, &bundle_of(&old));
    assert_eq!((&outcome["written"], &outcome["held"]), (&0.into(), &(16 * MIB).into()));
    robot.run(&["roll-back"]);

    // One block in a hundred; the first block stays.
    let mut new = old.clone();
    for block in (50..4096).step_by(100) {
        new[block * 4096..][..4096].copy_from_slice(&noise(4096, block as u64));
    }
    let outcome = install(&robot, &bundle_of(&new));
    assert_eq!(robot.slot(Slot::B), new);
    let written = outcome["written"].as_u64().unwrap();
    // The first block is cleared in two steps and written in two.
    assert_eq!(written, (41 + 4) * 4096);
    assert!(written * 50 < 16 * MIB);
}

#[test]
fn free_space_is_zero_afterwards_and_payloads_may_be_shorter_than_the_slot() {
    for size in [4 * MIB, 3 * MIB, 3 * MIB - 1000, 5000, 4096, 700] {
        let robot = Plan::default().make();
        let full = noise(4 * MIB as usize, 9);
        robot.fill(Slot::B, &full);
        let new = new_system(4 * MIB, 4)[..size as usize].to_vec();
        install(&robot, &bundle_of(&new));
        let slot = robot.slot(Slot::B);
        assert_eq!(slot[..size as usize], new, "{size}");
        // Nothing after the payload's last block is touched.
        let end = size.next_multiple_of(4096) as usize;
        assert_eq!(slot[end..], full[end..], "{size}");
    }
}

#[test]
fn standard_input_does_as_well_as_a_file() {
    let robot = Plan::default().make();
    let new = new_system(4 * MIB, 5);
    let mut child = robot.command(&["install", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&bundle_of(&new)).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(answer(&output)["slot"], "b");
    assert_eq!(robot.slot(Slot::B), new);
    let progress = String::from_utf8(output.stderr).unwrap();
    assert!(
        progress.contains(r#"{"progress":{"done":4194304,"step":"read-back","total":4194304}}"#),
        "{progress}"
    );
}

/// Blocks of a slot that differ from the new system.
fn wrong_blocks(found: &[u8], expected: &[u8]) -> u64 {
    let pairs = found.chunks(4096).zip(expected.chunks(4096));
    pairs.filter(|(found, expected)| found != expected).count() as u64
}

#[test]
fn killed_at_fifty_moments_it_goes_on_and_rewrites_nothing_that_was_in_place() {
    let size = 48 * MIB;
    let robot = Plan { size, ..Plan::default() }.make();
    let (old, new) = (old_system(Slot::B, size), new_system(size, 6));
    let bundle = bundle_of(&new);
    let file = write(robot.dir.path(), "update.bundle", &bundle);
    let first_state = robot.state();
    let (mut early, mut resumed, mut late) = (0, 0, 0);
    for round in 0..50 {
        robot.fill(Slot::B, &old);
        robot.set_state(first_state);
        drop(fs::remove_dir_all(robot.path("data")));
        let mut child =
            robot.command(&["install", "--foreground", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        // Random, and the same in every run: somewhere in the stream, or soon after its end.
        let luck = u64::from_le_bytes(noise(8, 1000 + round)[..8].try_into().unwrap());
        let until = (luck % (bundle.len() as u64 * 5 / 4)) as usize;
        let mut input = child.stdin.take().unwrap();
        // The child may have ended with a refusal; then the test fails below.
        drop(input.write_all(&bundle[..until.min(bundle.len())]));
        if until > bundle.len() {
            drop(input);
            std::thread::sleep(Duration::from_micros(luck >> 20 & 0x3_ffff));
        } else {
            std::thread::sleep(Duration::from_micros(luck >> 20 & 0xfff));
            // Killed while it waits for more, or works: the pipe stays open until then.
            child.kill().unwrap();
        }
        // SIGKILL.
        drop(child.kill());
        child.wait().unwrap();
        let slot = robot.slot(Slot::B);
        if robot.state().trial.is_some() {
            assert_eq!(slot, new, "armed before it was complete");
            late += 1;
            continue;
        }
        let wrong = wrong_blocks(&slot, &new);
        // Without the sector of ext4's superblock nothing mistakes the slot for a system; the other sectors of the
        // first block are cleared after it and written before it.
        assert!(
            slot == old || slot == new || slot[1024..1536].iter().all(|byte| *byte == 0),
            "a half-written slot looks like a system"
        );
        let journal = robot.path("data/slotd/journal.json").exists();
        if journal {
            resumed += 1
        } else {
            early += 1
        };
        let outcome = robot.run(&["install", &file]);
        assert_eq!(robot.slot(Slot::B), new);
        assert_eq!(outcome["resumed"], journal);
        let written = outcome["written"].as_u64().unwrap();

        // The first block may be cleared in two steps and is written in two.
        assert!(written <= (wrong + 4) * 4096, "{written} bytes for {wrong} wrong blocks");
        assert_eq!(robot.state().trial, Some(Slot::B));
    }
    println!("killed before the first write {early}, in between {resumed}, when armed {late}");
    assert!(resumed >= 25, "too few kills hit: {early} early, {resumed} in between, {late} late");
}

#[test]
fn killed_again_and_again_it_still_ends() {
    let size = 96 * MIB;
    let robot = Plan { size, ..Plan::default() }.make();
    let new = new_system(size, 7);
    let bundle = bundle_of(&new);
    let file = write(robot.dir.path(), "update.bundle", &bundle);
    let mut frames = 0;
    for round in 1..=8 {
        let mut child =
            robot.command(&["install", "--foreground", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(&bundle[..bundle.len() / 9 * round]).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        child.kill().unwrap();
        child.wait().unwrap();
        let journal = fs::read(robot.path("data/slotd/journal.json")).unwrap();
        let journal: serde_json::Value = serde_json::from_slice(&journal).unwrap();
        let now = journal["frames"].as_u64().unwrap();
        assert!(now >= frames, "round {round}: the journal went back from {frames} to {now}");
        frames = now;
    }
    assert!(frames >= 2, "no checkpoint was kept");
    let outcome = robot.run(&["install", &file]);
    assert_eq!(outcome["resumed"], true);
    assert_eq!(robot.slot(Slot::B), new);
}

#[test]
fn another_bundle_after_an_interruption_starts_anew() {
    let robot = Plan { size: 48 * MIB, ..Plan::default() }.make();
    let (first, second) = (new_system(48 * MIB, 8), new_system(48 * MIB, 9));
    let bundle = bundle_of(&first);
    let mut child = robot.command(&["install", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&bundle[..bundle.len() - 9000]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert_eq!(answer(&output)["refused"]["code"], "truncated");
    let status = robot.run(&["status"]);
    assert_eq!(status["interrupted"]["slot"], "b");
    let other = bundle_of_version(&second, "1.3.0", "1.0.0");
    assert_eq!(install(&robot, &other)["resumed"], false);
    assert_eq!(robot.slot(Slot::B), second);
    assert_eq!(robot.run(&["status"])["interrupted"], serde_json::Value::Null);
}

#[test]
fn a_server_that_breaks_every_connection_is_enough() {
    for no_ranges in [false, true] {
        let robot = Plan::default().make();
        let new = new_system(4 * MIB, 10);
        let bundle = bundle_of(&new);
        // Without ranges each connection must get further than the one before.
        let break_after = if no_ranges { None } else { Some(600_000) };
        let manners = Manners { break_after, no_ranges, ..Manners::default() };
        let server = Server::start(bundle, manners);
        robot.run(&["install", &server.address]);
        assert_eq!(robot.slot(Slot::B), new);
        let requests = server.requests.lock().unwrap();
        assert_eq!(requests.len() > 3, !no_ranges, "{} requests", requests.len());
        if !no_ranges {
            assert!(requests[1].iter().any(|line| line == "range: bytes=600000-"), "{requests:?}");
            assert!(requests[1].iter().any(|line| line == "if-range: \"one\""), "{requests:?}");
        }
    }
}

#[test]
fn a_server_with_another_file_by_now_is_refused() {
    let robot = Plan::default().make();
    let manners =
        Manners { break_after: Some(600_000), changes_after: Some(2), ..Manners::default() };
    let server = Server::start(bundle_of(&new_system(4 * MIB, 11)), manners);
    assert_eq!(robot.refused(&["install", &server.address]), (5, "source".to_owned()));
    assert_eq!(robot.state().trial, None);
    let missing = server.address.replace("update", "other");
    assert_eq!(robot.refused(&["install", &missing]), (5, "source".to_owned()));
}

#[test]
fn a_server_that_says_nothing_will_do_while_it_lasts() {
    let robot = Plan::default().make();
    let new = new_system(4 * MIB, 12);
    let manners = Manners { says_nothing: true, ..Manners::default() };
    let server = Server::start(bundle_of(&new), manners);
    robot.run(&["install", &server.address]);
    assert_eq!(robot.slot(Slot::B), new);
}

#[test]
fn blocks_of_the_running_slot_are_neither_sent_nor_read() {
    let size = 64 * MIB;
    let robot = Plan { size, ..Plan::default() }.make();
    let new = new_system(size, 13);
    // The running slot has everything, at other positions, except the last frame.
    let mut running = vec![0; size as usize];
    running[4096..].copy_from_slice(&new[..new.len() - 4096]);
    let cut = 40 * MIB as usize;
    running[cut..].fill(0);
    robot.fill(Slot::A, &running);
    let bundle = bundle_of(&new);
    let server = Server::start(bundle.clone(), Manners::default());
    let outcome = robot.run(&["install", &server.address]);
    assert_eq!(robot.slot(Slot::B), new);
    assert_eq!(robot.slot(Slot::A), running);
    let taken = outcome["taken"].as_u64().unwrap();
    assert!(taken > 20 * MIB, "{taken} bytes taken");
    let sent = server.sent.load(std::sync::atomic::Ordering::Relaxed);
    assert!(sent < bundle.len() as u64 / 2, "{sent} of {} bytes sent", bundle.len());
}

#[test]
fn a_server_without_ranges_sends_what_is_there_once_more_and_no_more() {
    let size = 128 * MIB;
    let new = new_system(size, 18);
    // The running slot has every other frame of 16 MiB.
    let mut running = new.clone();
    for frame in running.chunks_mut(16 * MIB as usize).step_by(2) {
        frame.fill(0);
    }
    let bundle = bundle_of(&new);
    let install = |manners: Manners| {
        let robot = Plan { size, ..Plan::default() }.make();
        robot.fill(Slot::A, &running);
        let server = Server::start(bundle.clone(), manners);
        robot.run(&["install", &server.address]);
        assert_eq!(robot.slot(Slot::B), new);
        let sent = server.sent.load(std::sync::atomic::Ordering::Relaxed);
        (server.requests.lock().unwrap().len() as u64, sent)
    };
    let with = install(Manners::default());
    let without = install(Manners { no_ranges: true, ..Manners::default() });
    let told = install(Manners { no_ranges: true, says_so: true, ..Manners::default() });
    let size = bundle.len() as u64;
    println!(
        "a bundle of {size} bytes, (requests, bytes): ranges {with:?}, none {without:?}, none and told {told:?}"
    );
    assert!(with.0 > 2 && with.1 < size, "{with:?}");
    // The first skipped part shows that the server starts again from the beginning; what it has sent is discarded.
    assert!(without.0 == 2 && without.1 < size * 2, "{without:?}");
    assert!(told.0 == 1 && told.1 <= size, "{told:?}");
}

#[test]
fn blocks_that_only_seem_right_are_read_from_the_bundle() {
    // The running slot changes between the survey and the copy: a block no longer has the right hash. A file
    // cannot change at the right moment, so the copy finds a truncated slot.
    let size = 48 * MIB;
    let robot = Plan { size, ..Plan::default() }.make();
    let new = new_system(size, 14);
    let mut running = new.clone();
    for block in (0..running.len()).step_by(40 * 4096) {
        running[block] ^= 1;
    }
    robot.fill(Slot::A, &running);
    let server = Server::start(bundle_of(&new), Manners::default());
    let outcome = robot.run(&["install", &server.address]);
    assert_eq!(robot.slot(Slot::B), new);
    assert_eq!(outcome["taken"], 0, "every frame has a block that is nowhere");
}

/// The most demanding level for the robot: a window of 16 MiB, frames of 64 MiB.
fn slow_bundle(content: &[u8]) -> Vec<u8> {
    let mut parts = system(&[]);
    let mut data = Vec::new();
    let done =
        bundle::compress(content, CompressionLevel::Slow, 2, &mut data, &mut |_| {}).unwrap();
    parts.manifest.components[0].payloads[0] = done.describe("root");
    parts.payloads[0] = (done.index, data);
    parts.write(&[TestKey::new(1)])
}

#[test]
fn memory_stays_below_the_bound() {
    let size = 512 * MIB;
    let robot = Plan { size, ..Plan::default() }.make();
    let mut new = vec![0; size as usize];
    new[..64 << 20].copy_from_slice(&noise(64 << 20, 15));
    let bundle = slow_bundle(&new);
    let mut child =
        robot.command(&["install", "--foreground", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&bundle[..bundle.len() - 1]).unwrap();
    let peak = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    // The slot is read back before the archive's end is read; only its last byte is missing.
    let written = || fs::read(robot.slot_path(Slot::B)).unwrap()[4096..] == new[4096..];
    while !written() {
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(Duration::from_millis(500));
    let before_the_end = peak();
    input.write_all(&bundle[bundle.len() - 1..]).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    println!("{before_the_end} KiB");
    assert!(before_the_end < 32 * 1024, "{before_the_end} KiB");
    assert_eq!(robot.slot(Slot::B), new);
}
