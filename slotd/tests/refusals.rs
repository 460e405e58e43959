//! Every refusal: its code, its exit code, and that nothing was written.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::Stdio;

use bundle::bootstate::{BootState, Slot};
use bundle::{BuildKind, BundleComponent, KeySet, Version};
use common::bundles::{TestKey, mixed, parts};
use common::{
    Plan, Robot, bundle_of, bundle_of_version, keys_of, new_system, old_system, system, write,
};
use slotd::refusal::{CODES, RefusalKind};

/// The bundle is refused with this code, and no slot and no boot state has changed.
fn refuses(robot: &Robot, bundle: &[u8], exit: i32, code: &str) {
    let before = (robot.slot(Slot::A), robot.slot(Slot::B), robot.state());
    let file = write(robot.dir.path(), "update.bundle", bundle);
    assert_eq!(robot.refused(&["install", &file]), (exit, code.to_owned()));
    assert!(
        (robot.slot(Slot::A), robot.slot(Slot::B), robot.state()) == before,
        "{code}: something changed"
    );
}

fn good() -> Vec<u8> {
    bundle_of(&new_system(1 << 20, 1))
}

#[test]
fn bundles_for_others_are_refused() {
    let changed = |change: &dyn Fn(&mut common::bundles::Parts)| {
        let mut parts = system(&mixed(9000));
        change(&mut parts);
        parts.write(&[TestKey::new(1)])
    };
    let robot = Plan::default().make();
    let other = changed(&|p| p.manifest.product = "another".to_owned());
    refuses(&robot, &other, 3, "wrong-product");
    let other = changed(&|p| p.manifest.boards = vec!["board-two".to_owned()]);
    refuses(&robot, &other, 3, "wrong-board");
    let other = changed(&|p| p.manifest.components[0].payloads[0].role = "boot".to_owned());
    refuses(&robot, &other, 3, "unknown-payload");
    let other = changed(&|p| p.manifest.components[0].name = "api".to_owned());
    refuses(&robot, &other, 3, "unknown-payload");
    refuses(&robot, &bundle_of(&new_system((4 << 20) + 1, 1)), 3, "too-large");
    refuses(&robot, &good()[..1000], 5, "truncated");
    assert_eq!(robot.refused(&["install", "/nowhere.bundle"]), (5, "source".to_owned()));
    let file = write(robot.dir.path(), "update.bundle", &other);
    assert_eq!(robot.refused(&["verify", &file[..file.len() - 1]]), (5, "source".to_owned()));
}

#[test]
fn a_slot_of_two_partitions_takes_no_half() {
    let plan = Plan {
        partitions: "boot-a = { number = 4, start-sector = 1, sectors = 1 }\n\
                     boot-b = { number = 5, start-sector = 1, sectors = 1 }\n",
        ..Plan::default()
    };
    refuses(&plan.make(), &good(), 3, "incomplete-bundle");
}

#[test]
fn the_machine_itself_must_be_the_image_s_board() {
    let robot = Plan::default().make();
    robot.file("proc/device-tree/compatible", "maker,another\0soc\0");
    refuses(&robot, &good(), 3, "wrong-board");
    fs::remove_file(robot.path("proc/device-tree/compatible")).unwrap();
    refuses(&robot, &good(), 3, "wrong-board");
}

#[test]
fn versions_below_the_floor_are_refused_unless_a_reason_is_given() {
    let robot = Plan::default().make();
    let new = new_system(1 << 20, 2);
    // The floor of the image itself, before anything was installed.
    refuses(&robot, &bundle_of_version(&new, "0.9.0", "0.1.0"), 3, "below-floor");
    // The floor of the committed bundle.
    let file = write(robot.dir.path(), "two.bundle", &bundle_of_version(&new, "2.1.0", "2.0.0"));
    robot.run(&["install", &file]);
    // Not before the commit: after a rollback the older version may be installed again.
    robot.run(&["roll-back"]);
    let older = bundle_of_version(&new, "1.5.0", "1.0.0");
    let old_file = write(robot.dir.path(), "old.bundle", &older);
    robot.run(&["verify", &old_file]);
    robot.run(&["install", &file]);
    robot.start(Slot::B);
    robot.run(&["commit"]);
    refuses(&robot, &older, 3, "below-floor");
    assert_eq!(robot.refused(&["verify", &old_file]), (3, "below-floor".to_owned()));
    // If `data` has lost the floor, the installed image still has one; here 1.0.0.
    assert_eq!(robot.run(&["status"])["floor"]["version"], "2.0.0");

    let empty = robot.command(&["install", &old_file, "--allow-downgrade", ""]).output().unwrap();
    assert_eq!(empty.status.code(), Some(2));
    robot.run(&["install", &old_file, "--allow-downgrade", "field test 7 needs it"]);
    let events = robot.events();
    let allowed = events.iter().find(|e| e["event"] == "downgrade-allowed").unwrap();
    assert_eq!(allowed["reason"], "field test 7 needs it");
    // The floor is unchanged.
    assert_eq!(robot.run(&["status"])["floor"]["version"], "2.0.0");
    // The override does not apply to a wrong product.
    robot.run(&["roll-back"]);
    let mut other = system(&new);
    other.manifest.product = "another".to_owned();
    other.manifest.version = Version::parse("1.5.0").unwrap();
    let other = write(robot.dir.path(), "other.bundle", &other.write(&[TestKey::new(1)]));
    assert_eq!(
        robot.refused(&["install", &other, "--allow-downgrade", "x"]),
        (3, "wrong-product".to_owned())
    );
}

#[test]
fn only_keys_of_the_set_count() {
    let new = mixed(9000);
    let robot = Plan::default().make();
    refuses(&robot, &system(&new).write(&[TestKey::new(2)]), 3, "not-trusted");
    let mut forged = system(&new).write(&[TestKey::new(1)]);
    let at = forged.windows(10).position(|w| w == b"robot-test").unwrap();
    forged[at] = b'R';
    refuses(&robot, &forged, 3, "bad-signature");

    // No key: nothing installs.
    for keys in [KeySet::default(), {
        let mut keys = common::bundles::keys();
        keys.keys[0].revoked = true;
        keys
    }] {
        refuses(&Plan { keys, ..Plan::default() }.make(), &good(), 1, "no-keys");
    }
    let robot = Plan::default().make();
    fs::remove_file(robot.path("usr/lib/slipway/keyset.json")).unwrap();
    refuses(&robot, &good(), 1, "no-keys");
    robot.file("usr/lib/slipway/keyset.json", "{");
    refuses(&robot, &good(), 1, "key-set");
}

#[test]
fn a_release_robot_takes_nothing_of_development() {
    let release = |keys| Plan { kind: "release", keys, ..Plan::default() }.make();
    let both = keys_of(&[(1, BuildKind::Development, 1), (2, BuildKind::Release, 1)]);
    let robot = release(both.clone());
    // The development key is in the set by mistake.
    refuses(&robot, &system(&mixed(9000)).write(&[TestKey::new(1)]), 3, "not-trusted");
    // A development build that a release key signed.
    refuses(&robot, &system(&mixed(9000)).write(&[TestKey::new(2)]), 3, "wrong-kind");
    refuses(&release(common::bundles::keys()), &good(), 1, "no-keys");
    let mut parts = system(&mixed(9000));
    parts.manifest.kind = BuildKind::Release;
    let file = write(robot.dir.path(), "release.bundle", &parts.write(&[TestKey::new(2)]));
    robot.run(&["install", &file]);
    // A development robot accepts both.
    let robot = Plan { keys: both, ..Plan::default() }.make();
    robot.run(&["install", &file]);
}

#[test]
fn while_a_trial_is_undecided_nothing_else_is_started() {
    let robot = Plan::default().make();
    let file = write(robot.dir.path(), "update.bundle", &good());
    robot.run(&["install", &file]);
    refuses(&robot, &good(), 4, "trial-pending");
    assert_eq!(robot.refused(&["boot-other"]), (4, "trial-pending".to_owned()));
    // The trial has not started: the running slot is not the one to commit.
    assert_eq!(robot.refused(&["commit"]), (4, "trial-pending".to_owned()));
    // The trial is running.
    robot.set_state(BootState { tries: 0, ..robot.state() });
    robot.start(Slot::B);
    refuses(&robot, &good(), 4, "trial-pending");
    assert_eq!(robot.run(&["roll-back"])["restart"], "committed");
    refuses(&robot, &good(), 4, "not-committed");
    robot.start(Slot::A);
    assert_eq!(robot.refused(&["roll-back"]), (4, "nothing-on-trial".to_owned()));
    // A failed trial does not block an install.
    robot.set_state(BootState { sequence: 9, active: Slot::A, trial: Some(Slot::B), tries: 0 });
    robot.run(&["install", &file]);
}

#[test]
fn when_the_committed_slot_does_not_start_the_other_one_is_kept_or_left() {
    let plan = || Plan { running: Slot::B, ..Plan::default() };
    let robot = plan().make();
    refuses(&robot, &good(), 4, "not-committed");
    assert_eq!(robot.run(&["boot-other"])["slot"], "a");
    robot.run(&["commit"]);
    assert_eq!(robot.state().active, Slot::B);
    let file = write(robot.dir.path(), "update.bundle", &good());
    assert_eq!(robot.run(&["install", &file])["slot"], "a");
}

#[test]
fn a_second_one_at_the_same_time_is_refused() {
    let robot = Plan::default().make();
    let bundle = good();
    let mut first = robot.command(&["install", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = first.stdin.take().unwrap();
    input.write_all(&bundle[..bundle.len() / 2]).unwrap();
    // Wait until it has the lock.
    while !robot.path("data/slotd/log/events.jsonl").exists() {
        std::thread::yield_now();
    }
    let file = write(robot.dir.path(), "update.bundle", &bundle);
    for args in [&["install", &file][..], &["commit"], &["roll-back"], &["boot-other"]] {
        assert_eq!(robot.refused(args), (4, "busy".to_owned()), "{args:?}");
    }
    // Reading is allowed.
    robot.run(&["status"]);
    input.write_all(&bundle[bundle.len() / 2..]).unwrap();
    drop(input);
    assert!(first.wait().unwrap().success());
}

#[test]
fn a_slot_that_is_not_whole_is_not_tried() {
    let robot = Plan::default().make();
    let mut half = old_system(Slot::B, 4 << 20);
    half[..4096].fill(0);
    robot.fill(Slot::B, &half);
    let boot_other = ["boot-other", "--allow-downgrade", "a look"];
    assert_eq!(robot.refused(&boot_other), (4, "incomplete-slot".to_owned()));
    robot.fill(Slot::B, &old_system(Slot::B, 4 << 20));
    // Its version is unknown: it may be below the floor.
    assert_eq!(robot.refused(&["boot-other"]), (3, "below-floor".to_owned()));
    assert_eq!(robot.run(&["boot-other", "--allow-downgrade", "a look"])["restart"], "trial");
    assert_eq!(robot.state().trial, Some(Slot::B));
}

#[test]
fn a_robot_that_is_not_as_its_image_says_is_left_alone() {
    let robot = Plan::default().make();
    let device = robot.path("usr/lib/slipway/device.toml");
    let text = fs::read_to_string(&device).unwrap();
    let refused = |robot: &Robot, code: &str| {
        assert_eq!(robot.refused(&["status"]), (1, code.to_owned()));
    };
    fs::write(&device, text.replace("start-sector = 8192", "start-sector = 8193")).unwrap();
    refused(&robot, "unknown-slot");
    fs::write(&device, text.replace("kind = 'dev", "kind = 'x")).unwrap();
    refused(&robot, "bad-device");
    fs::write(&device, text.replace("sectors = [8, 16]", "sectors = [8]")).unwrap();
    refused(&robot, "bad-device");
    fs::remove_file(&device).unwrap();
    refused(&robot, "bad-device");
    fs::write(&device, text.replace("start-sector = 99999", "start-sector = 99998")).unwrap();
    refuses(&robot, &good(), 1, "wrong-layout");
    fs::write(&device, text).unwrap();
    robot.file("proc/self/mountinfo", "24 20 0:30 / / rw - overlay overlay rw\n");
    refused(&robot, "unknown-slot");
    // Its data is prepared anyway, because this does not depend on the slot.
    let prepared = robot.command(&["data", "prepare"]).output().unwrap();
    assert!(prepared.status.success(), "{prepared:?}");
}

/// Signs a key set, and writes both files.
fn key_file(robot: &Robot, set: &KeySet, signer: u8) -> String {
    let json = serde_json::to_vec(set).unwrap();
    let signature = TestKey::new(signer).sign(&json, "a key set").text;
    write(robot.dir.path(), "keyset.json.minisig", signature.as_bytes());
    write(robot.dir.path(), "keyset.json", &json)
}

#[test]
fn a_key_is_replaced_and_revoked_offline() {
    let robot = Plan::default().make();
    let mut next = keys_of(&[(1, BuildKind::Development, 1), (2, BuildKind::Development, 2)]);
    next.keys[0].revoked = true;
    let by_two = system(&mixed(9000)).write(&[TestKey::new(2)]);
    refuses(&robot, &by_two, 3, "not-trusted");

    let refused = |set: &KeySet, signer: u8, code: &str, exit: i32| {
        let file = key_file(&robot, set, signer);
        assert_eq!(robot.refused(&["keys", &file]), (exit, code.to_owned()));
    };
    // The same serial as the image's; signed by an unknown key; without a remaining key; changed after signing.
    refused(&next, 1, "old-key-set", 3);
    next.serial = 1;
    refused(&next, 2, "not-trusted", 3);
    refused(&KeySet { serial: 2, keys: Vec::new() }, 1, "key-set", 1);
    let file = key_file(&robot, &next, 1);
    let mut json = fs::read(&file).unwrap();
    json.push(b' ');
    fs::write(&file, json).unwrap();
    assert_eq!(robot.refused(&["keys", &file]), (3, "bad-signature".to_owned()));
    fs::remove_file(format!("{file}.minisig")).unwrap();
    assert_eq!(robot.refused(&["keys", &file]), (1, "key-set".to_owned()));

    let file = key_file(&robot, &next, 1);
    assert_eq!(robot.run(&["keys", &file])["serial"], 1);
    refuses(&robot, &system(&mixed(9000)).write(&[TestKey::new(1)]), 3, "not-trusted");
    // The revoked key signs no further set; the new one does.
    next.serial = 2;
    refused(&next, 1, "not-trusted", 3);
    let file = key_file(&robot, &next, 2);
    robot.run(&["keys", &file]);
    let update = write(robot.dir.path(), "update.bundle", &by_two);
    robot.run(&["install", &update]);
    // A damaged set does not restore the revoked key, and does not prevent updates.
    robot.file("data/slotd/keyset.json", "{");
    robot.run(&["verify", &update]);
    let old =
        write(robot.dir.path(), "old.bundle", &system(&mixed(9000)).write(&[TestKey::new(1)]));
    assert_eq!(robot.refused(&["verify", &old]), (3, "not-trusted".to_owned()));
}

#[test]
fn an_image_with_a_newer_key_set_brings_it_along() {
    let robot = Plan::default().make();
    let mut set = keys_of(&[(1, BuildKind::Development, 1), (2, BuildKind::Development, 2)]);
    set.serial = 3;
    robot.run(&["keys", &key_file(&robot, &set, 1)]);
    let mut image = keys_of(&[(4, BuildKind::Development, 4)]);
    image.serial = 4;
    robot.file("usr/lib/slipway/keyset.json", serde_json::to_vec(&image).unwrap());
    let keys = robot.run(&["keys"]);
    assert_eq!((&keys["serial"], keys["keys"].as_array().unwrap().len()), (&4.into(), 1));
}

#[test]
fn a_committed_bundle_s_key_epoch_counts_from_then_on() {
    let keys = keys_of(&[(1, BuildKind::Development, 1), (2, BuildKind::Development, 2)]);
    let robot = Plan { keys, ..Plan::default() }.make();
    let mut parts = system(&new_system(1 << 20, 5));
    parts.manifest.key_epoch = 2;
    let file = write(robot.dir.path(), "two.bundle", &parts.write(&[TestKey::new(2)]));
    robot.run(&["install", &file]);
    robot.start(Slot::B);
    robot.run(&["commit"]);
    refuses(&robot, &good(), 3, "not-trusted");
}

#[test]
fn two_payloads_for_one_partition_are_refused() {
    let mut two = parts(&[&mixed(9000), &mixed(8000)], 1);
    let version = Version::parse("1.2.3").unwrap();
    let mut payloads = std::mem::take(&mut two.manifest.components[0].payloads);
    payloads.iter_mut().for_each(|payload| payload.role = "root".to_owned());
    two.manifest.components = ["system", "other"]
        .iter()
        .zip(payloads)
        .map(|(name, payload)| BundleComponent {
            name: (*name).to_owned(),
            version: version.clone(),
            payloads: vec![payload],
        })
        .collect();
    refuses(&Plan::default().make(), &two.write(&[TestKey::new(1)]), 3, "unknown-payload");
}

fn quoted_after(text: &str, before: &str) -> Vec<String> {
    text.split(before)
        .skip(1)
        .filter_map(|rest| {
            let rest = rest.trim_start();
            Some(rest.strip_prefix('"')?.split('"').next()?.to_owned())
        })
        .collect()
}

fn sources(folder: &str, out: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(path.to_str().unwrap(), out);
        } else {
            out.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_code_is_listed_documented_and_in_use() {
    let here = env!("CARGO_MANIFEST_DIR");
    let listed: BTreeSet<String> = CODES.iter().map(|(code, _, _)| (*code).to_owned()).collect();
    assert_eq!(listed.len(), CODES.len(), "a code is listed twice");
    let mut text = String::new();
    sources(&format!("{here}/src"), &mut text);
    let mut used: BTreeSet<String> = quoted_after(&text, "Refusal::new(").into_iter().collect();
    let own = fs::read_to_string(format!("{here}/../contract/src/refusal.rs")).unwrap();
    used.extend(quoted_after(&own, "Self::new("));
    used.extend(quoted_after(&text, "Refusal { code:"));
    let errors = fs::read_to_string(format!("{here}/../bundle/src/error.rs")).unwrap();
    let of_bundle = errors.split("pub fn hint").next().unwrap();
    used.extend(quoted_after(of_bundle, "=>"));
    assert_eq!(used, listed);

    let path = format!("{here}/../docs/reference/refusals.md");
    let generated = page_of_codes();
    if std::env::var_os("SLIPWAY_BLESS").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == generated,
        "docs/reference/refusals.md differs from the codes in contract/src/refusal.rs\n\
         help: SLIPWAY_BLESS=1 cargo test --package slotd --test refusals writes it; review the difference"
    );
}

/// The reference of all codes, from the list in the source.
fn page_of_codes() -> String {
    let mut page = "# Refusal codes

When the agent refuses a request, it reports a code, a sentence and what to do. Codes are for programs and never change their
meaning; `slotd --format json` answers with `{\"refused\": {\"code\": …, \"message\": …, \"help\": …}}`. This page is generated from the agent's own
list (`SLIPWAY_BLESS=1 cargo test --package slotd --test refusals`).

The exit code of `slotd` says which part is responsible; 0 means success, 2 invalid arguments. [Find out why a robot refused an
update](../guides/why-was-it-refused.md) has the frequent codes with their causes.
"
    .to_owned();
    let chapters = [
        (
            RefusalKind::Robot,
            "The robot itself fails",
            "Its disk, its image or its agent is the cause.",
        ),
        (
            RefusalKind::Bundle,
            "The bundle is refused",
            "This robot does not accept the bundle or the key set, now or later.",
        ),
        (RefusalKind::State, "Not now", "The robot's state does not allow it at this moment."),
        (
            RefusalKind::Source,
            "The source fails",
            "The source of the bundle, backup or seed fails.",
        ),
    ];
    for (matter, title, meaning) in chapters {
        page +=
            &format!("\n## Exit code {}: {}\n\n{meaning}\n\n", matter as i32, title.to_lowercase());
        page += "| code | meaning |\n|---|---|\n";
        let codes: BTreeSet<(&str, &str)> = CODES
            .iter()
            .filter(|(_, of, _)| *of == matter)
            .map(|(code, _, meaning)| (*code, *meaning))
            .collect();
        for (code, meaning) in codes {
            page += &format!("| `{code}` | {meaning} |\n");
        }
    }
    page
}
