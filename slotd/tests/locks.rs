//! An unprivileged user cannot block the agent: no other user can reach a lock, and a locked log delays a verb only
//! briefly.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by panicking"
)]

mod common;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use bundle::bootstate::Slot;
use common::rights::{NOBODY, is_root};
use common::{Plan, Robot, answer, bundle_of, bundle_of_version, new_system, write};
use rustix::fs::FlockOperation;
use slotd::lock::{LockScope, ProcessLock};

/// Longer than any verb takes, even on a busy machine: one that waits for a lock waits for ever.
const FOR_EVER: Duration = Duration::from_secs(120);

/// A robot that has updated once, with the directories of an older agent: accessible to all users.
fn robot() -> Robot {
    let robot = Plan::default().make();
    for folder in ["data", "data/slotd", "data/slotd/log", "run", "run/slotd"] {
        fs::create_dir_all(robot.path(folder)).unwrap();
    }
    for path in [".", "data", "data/slotd", "run", "run/slotd"] {
        fs::set_permissions(robot.path(path), Permissions::from_mode(0o755)).unwrap();
    }
    for lock in ["data/slotd/lock", "data/slotd/provision.lock", "data/slotd/log/lock"] {
        robot.file(lock, "");
    }
    robot
}

fn update(robot: &Robot) -> String {
    write(robot.dir.path(), "update.bundle", &bundle_of(&new_system(robot.size / 2, 3)))
}

/// Every file below a directory.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// Whether another user can take a lock on a file.
fn nobody_locks(path: &Path) -> bool {
    let mut command = Command::new("flock");
    command.arg("--nonblock").arg(path).arg("true").uid(NOBODY).gid(NOBODY);
    command.current_dir("/").stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn no_lock_is_within_the_reach_of_another_user() {
    let robot = robot();
    let prepared = robot.command(&["data", "prepare"]).output().unwrap();
    assert!(prepared.status.success(), "{prepared:?}");
    robot.run(&["install", "--no-restart", &update(&robot)]);
    robot.run(&["roll-back"]);
    drop(slotd::lock::ProcessLock::acquire(
        &robot.root(),
        slotd::lock::LockScope::Provision,
        "provision",
    ));
    for folder in ["data/slotd", "run/slotd"] {
        assert_eq!(fs::metadata(robot.path(folder)).unwrap().mode() & 0o7777, 0o700, "{folder}");
    }
    let mut all = Vec::new();
    files(&robot.path("data/slotd"), &mut all);
    files(&robot.path("run/slotd"), &mut all);
    for lock in ["run/slotd/lock", "run/slotd/provision.lock", "run/slotd/log.lock"] {
        let path = robot.path(lock);
        assert!(all.contains(&path), "{lock} is not there: {all:?}");
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, 0o600, "{lock}");
    }
    // Another user's process needs root.
    if !is_root("no_lock_is_within_the_reach_of_another_user") {
        return;
    }
    // A file that all users may open can be locked, in the same place by the same means.
    robot.file("run/open", "");
    assert!(nobody_locks(&robot.path("run/open")));
    for path in all {
        assert!(!nobody_locks(&path), "{} can be locked by everybody", path.display());
    }
}

/// Waits for a verb; one that hangs is ended, and fails the test.
fn ends(robot: &Robot, args: &[&str]) -> Output {
    let started = Instant::now();
    let mut child = robot.command(args).spawn().unwrap();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > FOR_EVER {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{args:?} hangs while the log is held");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn a_log_that_somebody_holds_holds_up_no_verb() {
    let robot = robot();
    robot.file("proc/uptime", "100.00 100.00\n");
    let first = update(&robot);
    robot.run(&["status"]);
    fs::create_dir_all(robot.path("run/slotd")).unwrap();
    // The paths of locks of all agent versions.
    let held: Vec<File> = ["run/slotd/log.lock", "data/slotd/log/lock"]
        .iter()
        .map(|lock| {
            let file = File::create(robot.path(lock)).unwrap();
            rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
            file
        })
        .collect();
    let done = |args: &[&str], event: &str| {
        let output = ends(&robot, args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        let printed = String::from_utf8_lossy(&output.stderr);
        assert!(printed.contains(&format!("the event `{event}`")), "{args:?}: {printed}");
        output
    };
    done(&["install", "--no-restart", &first], "installed");
    done(&["roll-back", "--no-restart"], "rolled-back");
    done(&["boot-other", "--no-restart"], "trial-armed");
    robot.start(Slot::B);
    done(&["commit"], "committed");
    done(&["backup", robot.path("backup").to_str().unwrap()], "backed-up");
    // The watch over a trial ends with its deadline at the latest: there is no systemd to report that this system has started.
    let next = bundle_of_version(&new_system(robot.size / 2, 4), "1.3.0", "1.0.0");
    let next = write(robot.dir.path(), "next.bundle", &next);
    done(&["install", "--no-restart", &next], "installed");
    robot.start(Slot::A);
    robot.file("run/slipway/trial", "deadline=117\nwatchdog=no\n");
    let watched = ends(&robot, &["health", "--watch"]);
    let printed = String::from_utf8_lossy(&watched.stderr);
    assert!(printed.contains("the event `health`"), "{watched:?}");
    let refused = ends(&robot, &["install", &next]);
    assert_eq!(answer(&refused)["refused"]["code"], "trial-pending", "{refused:?}");
    // Nothing was written without the lock, and afterwards everything works as before.
    let log = fs::read_to_string(robot.path("data/slotd/log/events.jsonl")).unwrap_or_default();
    assert_eq!(log, "");
    drop(held);
    fs::remove_file(robot.path("run/slipway/trial")).unwrap();
    robot.run(&["commit"]);
    assert_eq!(robot.events().last().unwrap()["event"], "committed");
}

#[test]
fn a_reason_of_any_length_stays_in_the_log() {
    for (letter, version) in [("x", "1.5.0"), ("\u{1b}", "1.6.0")] {
        let robot = Plan { version: "2.0.0", ..Plan::default() }.make();
        let device = fs::read_to_string(robot.path("usr/lib/slipway/device.toml")).unwrap();
        let device = device.replace("minimum-version = '1.0.0'", "minimum-version = '2.0.0'");
        robot.file("usr/lib/slipway/device.toml", device);
        let old = bundle_of_version(&new_system(robot.size / 2, 3), version, "1.0.0");
        let old = write(robot.dir.path(), "old.bundle", &old);
        let reason = letter.repeat(20 << 10);
        robot.run(&["install", "--no-restart", "--allow-downgrade", &reason, &old]);
        let events = robot.events();
        let allowed = events.iter().find(|event| event["event"] == "downgrade-allowed").unwrap();
        assert_eq!(allowed["version"], version);
        assert!(allowed["reason"].as_str().unwrap().starts_with(&reason[..1000]));
        assert!(allowed["shortened"].as_u64().unwrap() > 20 << 10);
    }
}

#[test]
fn two_agents_never_have_one_lock() {
    let robot = Plan::default().make();
    let root = robot.root();
    let first = ProcessLock::acquire(&root, LockScope::Slots, "install").unwrap();
    let refused = ProcessLock::acquire(&root, LockScope::Slots, "commit").unwrap_err();
    assert_eq!(refused.code, "busy");
    assert!(refused.message.contains("`slotd commit` cannot start"), "{refused}");
    assert!(refused.message.contains("(install, process "), "{refused}");
    let mut patience = Duration::from_millis(50);
    assert!(ProcessLock::acquire_within(&root, LockScope::Slots, &mut patience).is_err());
    // A different lock is free.
    ProcessLock::acquire(&root, LockScope::Provision, "provision").unwrap();
    drop(first);
    ProcessLock::acquire(&root, LockScope::Slots, "commit").unwrap();
}
