//! Provisioning: valid and invalid resources of a package, power cuts between any two changes, failing disks, kills
//! of the real program, and the first start of a base. Packages here are synthetic; the real ones are in
//! `xtask/tests/provision.rs`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/crash.rs"]
mod crash;
#[path = "common/api_robot.rs"]
mod robot;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crash::{Recorder, Snapshot, snapshot};
use slotd::events::EventLog;
use slotd::files::DirectFileChanges;
use slotd::provision::{DifferenceKind, ProvisionOutcome, check, run_with};

use robot::{ON_DATA, Robot, SITE, complete, old_tree};

#[test]
fn an_equal_tree_is_not_written() {
    let robot = Robot::new();
    robot.resources();
    robot.run().unwrap();
    let before = snapshot(&robot.path("data"));
    let inode =
        |path: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(robot.path(path)).unwrap());
    let (tree, record) = (inode("data/system"), inode("data/slotd/provisioned.json"));
    let files = Recorder::new(&robot.path("data"));
    let done = run_with(&robot.root(), &EventLog::new(&robot.root()), &files).unwrap();
    assert_eq!((done.outcome, files.calls()), (ProvisionOutcome::Unchanged, 0));
    assert_eq!(check(&robot.root()).unwrap().outcome, ProvisionOutcome::Unchanged);
    assert_eq!((inode("data/system"), inode("data/slotd/provisioned.json")), (tree, record));
    assert_eq!(snapshot(&robot.path("data")), before);
}

#[test]
fn drift_is_told_and_repaired() {
    type Harm = fn(&Robot);
    let harms: [(&str, &str, DifferenceKind, Harm); 9] = [
        ("nginx.conf", "different content", DifferenceKind::Content, |r| {
            r.file("data/system/nginx.conf", "server }{");
        }),
        ("scripts/start", "different mode", DifferenceKind::Mode, |r| {
            r.mode("data/system/scripts/start", 0o644)
        }),
        ("", "different mode", DifferenceKind::Mode, |r| r.mode("data/system", 0o777)),
        ("scripts", "different mode", DifferenceKind::Mode, |r| {
            r.mode("data/system/scripts", 0o700)
        }),
        ("added", "superfluous", DifferenceKind::Superfluous, |r| {
            r.file("data/system/added", "");
        }),
        ("empty", "missing", DifferenceKind::Missing, |r| {
            fs::remove_file(r.path("data/system/empty")).unwrap()
        }),
        ("empty", "different kind", DifferenceKind::Kind, |r| {
            fs::remove_file(r.path("data/system/empty")).unwrap();
            symlink("nginx.conf", r.path("data/system/empty")).unwrap();
        }),
        ("scripts/link", "different content", DifferenceKind::Content, |r| {
            fs::remove_file(r.path("data/system/scripts/link")).unwrap();
            symlink("../empty", r.path("data/system/scripts/link")).unwrap();
        }),
        ("", "different kind", DifferenceKind::Kind, |r| {
            fs::remove_dir_all(r.path("data/system")).unwrap();
            r.file("data/system", "a file");
        }),
    ];
    let robot = Robot::new();
    robot.resources();
    assert_eq!(check(&robot.root()).unwrap_err().code, "drift");
    robot.run().unwrap();
    for (path, word, how, harm) in harms {
        harm(&robot);
        let harmed = robot.system();
        let refusal = check(&robot.root()).unwrap_err();
        assert_eq!(refusal.code, "drift");
        let place = if path.is_empty() { "/data/system itself" } else { path };
        assert!(refusal.message.contains(&format!("\n  {place}: {word}")), "{}", refusal.message);
        assert_eq!(robot.system(), harmed, "checking has changed something");
        let done = robot.run().unwrap();
        assert_eq!(done.outcome, ProvisionOutcome::Provisioned);
        assert!(done.changes.iter().any(|c| c.path == Path::new(path) && c.how == how), "{done:?}");
        assert_eq!(robot.system(), complete(), "{path}: {word}");
    }
}

#[test]
fn junk_stays_behind() {
    let robot = Robot::new();
    robot.resources();
    let junk = [
        ".DS_Store",
        "scripts/.DS_Store",
        "._nginx.conf",
        "__MACOSX/nginx.conf",
        "Thumbs.db",
        "desktop.ini",
        "__pycache__/a.cpython-311.pyc",
        "a.pyc",
        "a.pyo",
        "nginx.conf~",
        ".nginx.conf.swp",
        ".x.swo",
        "#nginx.conf#",
        ".#nginx.conf",
        "only/.DS_Store",
    ];
    for path in junk {
        robot.resource(path, "junk");
    }
    fs::create_dir_all(robot.path(&format!("{SITE}/robotapi/resources/void/deep"))).unwrap();
    let done = robot.run().unwrap();
    assert_eq!(robot.system(), complete());
    assert_eq!(done.left_out.len(), junk.len(), "{:?}", done.left_out);
    // Names that only look like junk are content.
    let robot = Robot::new();
    let kept =
        ["a.orig", "a.bak", ".hidden", "swp", "a.swp", "#a", ".swp", "thumbs.dbx", "pycache"];
    for path in kept {
        robot.resource(path, "");
    }
    assert_eq!(robot.run().unwrap().files, kept.len());
}

#[test]
fn what_no_package_should_have_leaves_the_old_tree() {
    type Break = fn(&Robot, &Path);
    let breaks: [(&str, &str, Break); 10] = [
        ("bad-resources", "is absolute", |_, r| symlink("/etc/passwd", r.join("x")).unwrap()),
        ("bad-resources", "points outside of the tree", |_, r| {
            symlink("../__init__.py", r.join("x")).unwrap()
        }),
        ("bad-resources", "points outside of the tree", |_, r| {
            // Lexically the target is inside of the tree.
            symlink("..", r.join("scripts/up")).unwrap();
            symlink("scripts/up/../__init__.py", r.join("x")).unwrap();
        }),
        ("bad-resources", "points to a missing file", |_, r| symlink("gone", r.join("x")).unwrap()),
        ("bad-resources", "points to a missing file", |_, r| symlink("x", r.join("x")).unwrap()),
        ("bad-resources", "a file that is left out", |_, r| {
            fs::write(r.join("a.pyc"), "").unwrap();
            symlink("a.pyc", r.join("x")).unwrap();
        }),
        ("bad-resources", "neither a file", |_, r| {
            let path = r.join("pipe\n");
            let kind = rustix::fs::FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, path, kind, 0o600.into(), 0).unwrap();
        }),
        ("bad-resources", "not a directory", |_, r| {
            fs::remove_dir_all(r).unwrap();
            fs::write(r, "a file").unwrap();
        }),
        ("bad-resources", "more than 64 deep", |_, r| {
            fs::create_dir_all(r.join("d/".repeat(66))).unwrap();
        }),
        ("no-package", "Python would not find `robotapi`", |robot, _| {
            fs::remove_dir_all(robot.path(&format!("{SITE}/robotapi"))).unwrap();
            robot.file(&format!("{SITE}/a.pth"), "import os\n");
        }),
    ];
    for (code, message, harm) in breaks {
        let robot = Robot::new();
        robot.resources();
        robot.run().unwrap();
        robot.resource("new", "new");
        harm(&robot, &robot.path(&format!("{SITE}/robotapi/resources")));
        let refusal = robot.run().unwrap_err();
        assert_eq!(refusal.code, code);
        assert!(refusal.message.contains(message), "{}", refusal.message);
        assert!(!refusal.message.contains("pipe\n"), "{}", refusal.message);
        assert_eq!(check(&robot.root()).unwrap_err().code, code);
        assert_eq!((robot.system(), robot.leftovers()), (complete(), Vec::new()));
        assert_eq!(robot.events(), ["provisioned", "provision-refused"]);
    }
    for text in [
        "package = 1",
        "",
        "package='a'\nmodule='a.b'\nversion='1'\nsite-packages='/s'\npython='3.11'",
        "package='a'\nmodule='a'\nversion='1'\nsite-packages='/s'\npython='three'",
    ] {
        let robot = Robot::new();
        robot.resources().file("usr/lib/slipway/api.toml", text);
        assert_eq!(robot.run().unwrap_err().code, "bad-api", "{text}");
    }
}

#[test]
fn without_resources_the_old_tree_stays() {
    let robot = Robot::new();
    robot.resources();
    robot.run().unwrap();
    fs::remove_dir_all(robot.path(&format!("{SITE}/robotapi/resources"))).unwrap();
    assert_eq!(robot.run().unwrap().outcome, ProvisionOutcome::NoResources);
    assert_eq!(check(&robot.root()).unwrap().outcome, ProvisionOutcome::NoResources);
    // A directory with only junk is treated as empty; and a module that is one file has no resources.
    robot.resource(".DS_Store", "");
    assert_eq!(robot.run().unwrap().outcome, ProvisionOutcome::NoResources);
    fs::remove_dir_all(robot.path(&format!("{SITE}/robotapi"))).unwrap();
    robot.file(&format!("{SITE}/robotapi.py"), "");
    assert_eq!(robot.run().unwrap().outcome, ProvisionOutcome::NoResources);
    assert_eq!(robot.system(), complete());
    fs::remove_file(robot.path("usr/lib/slipway/api.toml")).unwrap();
    assert_eq!(robot.run().unwrap().outcome, ProvisionOutcome::NoApi);
    assert_eq!((robot.system(), robot.boot().unwrap()), (complete(), ProvisionOutcome::NoApi));
}

#[test]
fn the_api_on_data_comes_first_and_the_built_in_one_serves_without_it() {
    let robot = Robot::new();
    robot.resources();
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Provisioned);
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Current);
    for version in ["1", "2"] {
        let site = format!("data/apps/api/{version}/site/robotapi");
        robot
            .file(&format!("{site}/__init__.py"), "")
            .file(&format!("{site}/resources/v"), version);
    }
    let switch = |version: &str| {
        drop(fs::remove_file(robot.path("data/apps/api/current")));
        symlink(version, robot.path("data/apps/api/current")).unwrap();
    };
    for version in ["1", "2", "1"] {
        switch(version);
        // The next start notices that Python would find another package.
        assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Provisioned);
        assert_eq!(robot.system()[Path::new("v")], format!("644 {version}"));
        assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Current);
    }
    // A damaged package, which Python treats as a namespace: the built-in package is used.
    fs::remove_file(robot.path(&format!("{ON_DATA}/robotapi/__init__.py"))).unwrap();
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Provisioned);
    assert_eq!(robot.system(), complete());
    fs::remove_file(robot.path("data/apps/api/current")).unwrap();
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Current);
}

#[test]
fn a_base_is_recorded_after_success_only() {
    let robot = Robot::new();
    robot.resources();
    robot.boot().unwrap();
    // Manual changes stay until provisioning has a reason to run.
    robot.file("data/system/nginx.conf", "mine");
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Current);
    assert_eq!(robot.system()[Path::new("nginx.conf")], "644 mine");
    // A new base whose package is broken: each start tries again.
    robot.file("usr/lib/slipway/base-id", "two\n");
    let link = robot.path(&format!("{SITE}/robotapi/resources/out"));
    symlink("/etc", &link).unwrap();
    for _ in 0..2 {
        assert_eq!(robot.boot().unwrap_err().code, "bad-resources");
        assert_eq!(robot.system()[Path::new("nginx.conf")], "644 mine");
    }
    fs::remove_file(link).unwrap();
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Provisioned);
    assert_eq!(robot.system(), complete());
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Current);
    // Removed tree, missing or damaged record, or no base id: provisioned again.
    fs::remove_dir_all(robot.path("data/system")).unwrap();
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Provisioned);
    slotd::provision::forget(&robot.root(), &DirectFileChanges).unwrap();
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Unchanged);
    robot.file("data/slotd/provisioned.json", "{");
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Unchanged);
    fs::remove_file(robot.path("usr/lib/slipway/base-id")).unwrap();
    for _ in 0..2 {
        assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Unchanged);
    }
}

#[test]
fn a_cut_between_any_two_changes_leaves_one_whole_tree() {
    for old in [true, false] {
        let robot = Robot::new();
        robot.resources();
        let before = if old { old_tree(&robot) } else { Snapshot::new() };
        // Leftovers of an earlier cut.
        robot.file("data/.system.new/half", "").file("data/.system.new/dir/half", "");
        // The directories of the log and the locks, which nothing depends on.
        fs::create_dir(robot.path("data/slotd")).unwrap();
        let files = Recorder::new(&robot.path("data"));
        run_with(&robot.root(), &EventLog::new(&robot.root()), &files).unwrap();
        let (mut seen, mut states, mut new) = (BTreeSet::new(), 0, 0);
        for point in 0..files.points() {
            for state in files.states(point) {
                states += 1;
                let found = state.below("system");
                assert!(
                    found == before || found == complete(),
                    "old: {old}, point {point}: {found:?}"
                );
                if !seen.insert(state.key(&|_| false)) {
                    continue;
                }
                new += usize::from(found == complete());
                // The next start.
                let after = Robot::new();
                after.resources();
                state.write(&after.path("data"));
                // If the record exists, the tree is there: only then a start has nothing to do.
                let known = state.below("slotd").contains_key(Path::new("provisioned.json"));
                let outcome = after.boot().unwrap();
                assert_eq!(outcome == ProvisionOutcome::Current, known, "point {point}");
                assert_eq!(
                    (after.system(), after.leftovers()),
                    (complete(), Vec::new()),
                    "point {point}"
                );
            }
        }
        // At its end everything is durable.
        for state in files.states(files.points() - 1) {
            assert_eq!(state.below("system"), complete());
        }
        println!(
            "old: {old}: {} changes, {states} states, {} of them different, {new} with the new tree",
            files.points() - 1,
            seen.len()
        );
        assert!(files.points() > 30 && seen.len() > 80 && new > 0, "the test sees too little");
    }
}

#[test]
fn a_disk_that_fails_at_any_change_leaves_one_whole_tree() {
    // EIO and ENOSPC, as every Linux architecture numbers them.
    for (errno, code) in [(5, "io"), (28, "no-space")] {
        let (mut failed, mut silent) = (0, 0);
        for call in 0.. {
            let robot = Robot::new();
            robot.resources();
            let before = old_tree(&robot);
            fs::create_dir(robot.path("data/slotd")).unwrap();
            let files = Recorder::new(&robot.path("data")).failing(call, errno);
            let result = run_with(&robot.root(), &EventLog::new(&robot.root()), &files);
            if files.calls() <= call {
                break;
            }
            let found = robot.system();
            match result {
                // Only the removal of the old tree may fail silently.
                Ok(_) => {
                    silent += 1;
                    assert_eq!(found, complete());
                }
                Err(refusal) => {
                    failed += 1;
                    assert!(found == before || found == complete());
                    // The first removal does not belong to writing the new tree.
                    assert!(refusal.code == code || call == 0, "{call}: {refusal:?}");
                    let outcome = robot.boot().unwrap();
                    assert_eq!(outcome == ProvisionOutcome::Provisioned, found == before, "{call}");
                }
            }
            robot.run().unwrap();
            assert_eq!((robot.system(), robot.leftovers()), (complete(), Vec::new()));
        }
        assert!(failed > 30 && silent == 2, "{failed}, {silent}");
    }
}

#[test]
fn two_at_once_are_one_after_the_other() {
    let robot = Robot::new();
    robot.resources();
    let _held = slotd::lock::ProcessLock::acquire(
        &robot.root(),
        slotd::lock::LockScope::Provision,
        "provision",
    )
    .unwrap();
    assert_eq!(robot.run().unwrap_err().code, "busy");
    assert_eq!(robot.system(), Snapshot::new());
    // Comparing needs no lock.
    assert_eq!(check(&robot.root()).unwrap_err().code, "drift");
}

#[test]
fn a_reset_has_the_next_start_provision_again() {
    let robot = Robot::new();
    robot.resources();
    robot.boot().unwrap();
    slotd::data::reset(&robot.root(), false).unwrap();
    slotd::data::apply(&robot.root()).unwrap();
    assert_eq!(robot.system(), Snapshot::new());
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Provisioned);
    let mut backup = Vec::new();
    robot.file("data/system/nginx.conf", "of another time");
    slotd::data::backup(&robot.root(), &mut backup).unwrap();
    robot.run().unwrap();
    slotd::data::restore(&robot.root(), backup.as_slice()).unwrap();
    slotd::data::apply(&robot.root()).unwrap();
    assert_eq!(robot.system()[Path::new("nginx.conf")], "644 of another time");
    assert_eq!(robot.boot().unwrap(), ProvisionOutcome::Provisioned);
    assert_eq!(robot.system(), complete());
}

#[test]
fn a_package_beyond_every_bound_is_refused_before_anything_is_written() {
    let robot = Robot::new();
    robot.resources();
    let before = old_tree(&robot);
    // Sparse, so that it occupies no space.
    let huge = robot.path(&format!("{SITE}/robotapi/resources/huge"));
    fs::File::create(huge).unwrap().set_len(1 << 31).unwrap();
    assert_eq!(robot.run().unwrap_err().code, "bad-resources");
    assert_eq!((robot.system(), robot.leftovers()), (before, Vec::new()));
}
