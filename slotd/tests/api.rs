//! Updates of the API alone: real bundles of synthetic wheels, installed into a robot on files by the real program:
//! refusals, compatibility, what is kept, and the program killed at each of its changes.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bundle::component::{BaseRequirement, ComponentLock, ComponentWheel, LOCK_ROLE};
use bundle::index::{sha256, to_hex};
use common::wheels::{Draft, api, base, robot, trees};
use common::{Robot, new_system, write};
use serde_json::Value;

fn install(robot: &Robot, bundle: &[u8]) -> Value {
    let file = write(robot.dir.path(), "api.bundle", bundle);
    robot.run(&["install", &file])
}

fn refused(robot: &Robot, bundle: &[u8]) -> (i32, String) {
    let file = write(robot.dir.path(), "api.bundle", bundle);
    robot.refused(&["install", &file])
}

/// The version that serves, as a program would find it: through the link, else the built-in one.
fn serves(robot: &Robot) -> String {
    let own = robot.path("usr/lib/python3/dist-packages/robotapi/__init__.py");
    let installed = robot.path("data/apps/api/current/site/robotapi/__init__.py");
    let text = fs::read_to_string(&installed).or_else(|_| fs::read_to_string(own)).unwrap();
    text.split('\'').nth(1).unwrap().to_owned()
}

/// The version whose resources are provisioned.
fn provisioned(robot: &Robot) -> String {
    fs::read_to_string(robot.path("data/system/version.txt")).unwrap()
}

/// Every file below a directory with its content.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut waiting) = (BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(path) = waiting.pop() {
        for entry in fs::read_dir(&path).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_symlink() {
                let to = fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
                found.insert(path, to);
            } else if path.is_dir() {
                waiting.push(path);
            } else {
                found.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn folders(robot: &Robot) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(robot.path("data/apps/api"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.') && name != "current")
        .collect();
    names.sort();
    names
}

#[test]
fn an_api_is_installed_beside_the_one_that_serves_and_taken_back() {
    let robot = robot();
    assert_eq!(robot.run(&["status"])["api"]["serves"], "built-in");
    let first = install(&robot, &api("10.0.0"));
    assert_eq!((&first["component"], &first["version"]), (&"api".into(), &"10.0.0".into()));
    assert_eq!((&first["reused"], &first["before"]), (&0.into(), &Value::Null));
    assert_eq!((serves(&robot), provisioned(&robot)), ("10.0.0".into(), "10.0.0".into()));
    let mode = fs::metadata(robot.path("data/apps/api/current/bin/robotapi")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o755);

    // The wheel that has not changed is neither written nor stored again.
    let second = install(&robot, &api("10.1.0"));
    assert_eq!((&second["reused"], &second["before"]), (&1.into(), &"10.0.0".into()));
    assert_eq!(serves(&robot), "10.1.0");
    let helper = |folder: &Value| {
        let path = format!("data/apps/api/{}/site/helper/__init__.py", folder.as_str().unwrap());
        fs::metadata(robot.path(&path)).unwrap().ino()
    };
    assert_eq!(helper(&first["folder"]), helper(&second["folder"]));
    let status = &robot.run(&["status"])["api"];
    assert_eq!((&status["serves"], &status["version"]), (&"installed".into(), &"10.1.0".into()));
    assert_eq!(status["manifest"], second["manifest"]);
    // Slots, boot state and floor are unchanged.
    assert_eq!(robot.state(), bundle::bootstate::BootState::first());
    assert_eq!(robot.run(&["status"])["floor"]["version"], "1.0.0");

    // Installing the same again changes nothing, and is not an error.
    let again = install(&robot, &api("10.1.0"));
    assert_eq!((&again["reused"], &again["written"]), (&2.into(), &0.into()));
    assert_eq!(folders(&robot).len(), 2);

    assert_eq!(provisioned(&robot), "10.1.0");
    let back = robot.run(&["roll-back", "--component", "api"]);
    assert_eq!(back["version"], "10.0.0");
    assert_eq!((serves(&robot), provisioned(&robot)), ("10.0.0".into(), "10.0.0".into()));
    let back = robot.run(&["roll-back", "--component", "api"]);
    assert_eq!((&back["version"], serves(&robot)), (&Value::Null, "9.0.0".to_owned()));
    assert_eq!(provisioned(&robot), "9.0.0");
    let none = robot.refused(&["roll-back", "--component", "api"]);
    assert_eq!(none, (4, "no-other-api".to_owned()));
}

/// Flips a bit of a file, whose length and time stay.
fn rot(path: &Path) {
    let time = fs::metadata(path).unwrap().modified().unwrap();
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, &bytes).unwrap();
    fs::File::open(path).unwrap().set_modified(time).unwrap();
}

/// The files that `verify --component api` names.
fn differs(robot: &Robot) -> Vec<String> {
    let output = robot.command(&["verify", "--component", "api"]).output().unwrap();
    let refused = &common::answer(&output)["refused"];
    assert_eq!((output.status.code(), &refused["code"]), (Some(4), &Value::from("api-differs")));
    let message = refused["message"].as_str().unwrap();
    message.lines().skip(1).map(|line| line.trim().to_owned()).collect()
}

#[test]
fn a_wheel_that_rots_is_found_and_healed_in_all_versions() {
    let robot = robot();
    assert_eq!(robot.run(&["verify", "--component", "api"])["versions"], 0);
    let first = install(&robot, &api("10.0.0"))["folder"].as_str().unwrap().to_owned();
    let second = install(&robot, &api("10.1.0"))["folder"].as_str().unwrap().to_owned();
    let apis = robot.path("data/apps/api");
    let before = content(&apis);
    let whole = |versions: u64, wheels: u64| {
        let checked = robot.run(&["verify", "--component", "api"]);
        assert_eq!((&checked["versions"], &checked["wheels"]), (&versions.into(), &wheels.into()));
    };
    whole(2, 3);
    // One bit, in the file that the wheel and both versions share.
    rot(&apis.join("current/site/helper/__init__.py"));
    let why = "site/helper/__init__.py: the file has changed since it was unpacked";
    let all =
        [format!("wheel helper 2.0: {why}"), format!("{first}: {why}"), format!("{second}: {why}")];
    assert_eq!(differs(&robot), all);
    assert_eq!(install(&robot, &api("10.1.0"))["reused"], 1);
    assert_eq!(content(&apis), before);
    whole(2, 3);
    let inode = |path: &str| fs::metadata(apis.join(path)).unwrap().ino();
    let helper = inode(&format!("{first}/site/helper/__init__.py"));
    assert_eq!(helper, inode(&format!("{second}/site/helper/__init__.py")));
    assert_eq!(install(&robot, &api("10.1.0"))["reused"], 2);

    // A file of a version that does not serve: installing that version repairs it.
    rot(&apis.join(&first).join("site/robotapi/__init__.py"));
    assert_eq!(differs(&robot).len(), 2);
    install(&robot, &api("10.1.0"));
    assert_eq!(differs(&robot).len(), 2);
    install(&robot, &api("10.0.0"));
    whole(2, 3);

    // Other differences; files that Python adds are ignored.
    let path = |name: &str| apis.join(&second).join(name);
    fs::create_dir(path("site/robotapi/resources/__pycache__")).unwrap();
    fs::write(path("site/robotapi/resources/__pycache__/more.pyc"), "").unwrap();
    whole(2, 3);
    fs::write(path("site/more.py"), "").unwrap();
    fs::remove_file(path("site/robotapi/__init__.py")).unwrap();
    fs::set_permissions(path("bin/robotapi"), Permissions::from_mode(0o644)).unwrap();
    let lock = fs::read_to_string(path(LOCK_ROLE)).unwrap();
    fs::write(path(LOCK_ROLE), lock.replacen('{', "{ ", 1)).unwrap();
    let found = differs(&robot).join("\n");
    for expected in
        ["more.py: no wheel", "__init__.py: No such", "bin/robotapi: the file has", LOCK_ROLE]
    {
        assert!(found.contains(expected), "{expected}: {found}");
    }
    install(&robot, &api("10.1.0"));
    whole(2, 3);
}

#[test]
fn wheels_without_hashes_are_unpacked_again() {
    let robot = robot();
    let bundle = api("10.0.0");
    install(&robot, &bundle);
    let wheels = || fs::read_dir(robot.path("data/apps/api/.wheels")).unwrap();
    // A wheel of an agent that stored no hashes.
    wheels().for_each(|wheel| fs::remove_file(wheel.unwrap().path().join(".sum")).unwrap());
    let found = differs(&robot).join("\n");
    assert!(
        found.contains("wheel helper 2.0: the stored hashes") && found.contains("wheel robotapi"),
        "{found}"
    );
    assert_eq!(install(&robot, &bundle)["reused"], 0);
    robot.run(&["verify", "--component", "api"]);
    // Damaged hashes are treated as missing.
    wheels().for_each(|wheel| rot(&wheel.unwrap().path().join(".sum")));
    assert_eq!(differs(&robot).len(), 2);
    assert_eq!(install(&robot, &bundle)["reused"], 0);
    assert_eq!(install(&robot, &bundle)["reused"], 2);
}

#[test]
fn an_api_that_is_not_well_is_switched_back_by_itself() {
    let robot = robot();
    let sick = |version: &str| {
        let mut trees = trees(version, "fine");
        trees[1] = trees[1].clone().with("site/robotapi/sick", "");
        Draft::new(&trees).bundle()
    };
    // Back to the built-in API.
    assert_eq!(refused(&robot, &sick("10.0.0")), (4, "api-unhealthy".to_owned()));
    assert_eq!((serves(&robot), provisioned(&robot)), ("9.0.0".into(), "9.0.0".into()));
    assert_eq!(folders(&robot), Vec::<String>::new());
    // Back to the previous version.
    install(&robot, &api("10.0.0"));
    let before = content(&robot.path("data/apps/api"));
    assert_eq!(refused(&robot, &sick("10.1.0")), (4, "api-unhealthy".to_owned()));
    assert_eq!(serves(&robot), "10.0.0");
    assert!(content(&robot.path("data/apps/api")) == before, "something changed");
    let events = robot.events();
    let taken = events.iter().rfind(|event| event["event"] == "api-taken-back").unwrap();
    assert!(taken["why"]["message"].as_str().unwrap().contains("30-api"), "{taken}");
    // A check that already fails and does not concern the API is ignored.
    robot.file("etc/slotd/health.d/20-other.toml", "[command]\nrun = ['false']\n");
    install(&robot, &api("10.2.0"));
    // A check of an address always applies.
    robot.file("etc/slotd/health.d/20-other.toml", "[http]\nurl = 'http://127.0.0.1:1/'\n");
    assert_eq!(refused(&robot, &api("10.3.0")), (4, "api-unhealthy".to_owned()));
    assert_eq!(serves(&robot), "10.2.0");
}

#[test]
fn what_is_refused_leaves_the_api_alone() {
    let robot = robot();
    install(&robot, &api("10.0.0"));
    let before = content(&robot.path("data/apps/api"));
    let draft = || Draft::new(&trees("10.1.0", "fine"));
    let check = |draft: Draft, code: &str| {
        assert_eq!(refused(&robot, &draft.bundle()), (3, code.to_owned()));
        assert!(content(&robot.path("data/apps/api")) == before, "{code}: something changed");
    };
    check(Draft { more: vec![("system", new_system(9000, 1))], ..draft() }, "mixed-bundle");
    check(Draft { version: "0.9.0", ..draft() }, "below-floor");
    check(draft().edit(|lock| lock.python = "3.12".into()), "api-unfit");
    check(draft().edit(|lock| lock.arch = "vax".into()), "api-unfit");
    check(draft().edit(|lock| lock.libc = "glibc 2.41".into()), "api-unfit");
    check(draft().edit(|lock| lock.libc = "musl 1.2".into()), "api-unfit");
    check(draft().edit(|lock| lock.module = "helper".into()), "api-unfit");
    check(Draft::new(&trees("7.9.9", "")), "api-unfit");
    check(Draft::new(&trees("8.0.0rc1", "")), "api-unfit");
    let need = |version: &str| BaseRequirement { name: "sixseven".into(), version: version.into() };
    check(draft().edit(|lock| lock.base = vec![need("1.15")]), "api-unfit");
    check(draft().edit(|lock| lock.wheels.swap(0, 1)), "bad-component");
    check(draft().edit(|lock| lock.wheels[0].size += 1), "bad-component");
    check(Draft { json: Some(b"{}".to_vec()), ..draft() }, "bad-component");
    check(draft().edit(|lock| lock.wheels[1].scripts[0].name = "other".into()), "bad-component");
    let module =
        |lock: &mut ComponentLock| lock.wheels[1].scripts[0].module = "robotapi.gui".into();
    check(draft().edit(module), "bad-component");
    check(draft().edit(|lock| lock.wheels[1].tree = "5".repeat(64)), "wrong-hash");
    let mut unsigned = draft().bundle();
    let at = unsigned.windows(10).position(|w| w == b"robot-test").unwrap();
    unsigned[at] = b'R';
    assert_eq!(refused(&robot, &unsigned), (3, "bad-signature".to_owned()));
    let whole = draft().bundle();
    assert_eq!(refused(&robot, &whole[..whole.len() - 600]), (5, "truncated".to_owned()));
    assert_eq!(serves(&robot), "10.0.0");
    install(&robot, &draft().edit(|lock| lock.base = vec![need("1.16")]).bundle());

    // Refusals because of the robot's state.
    robot.file("run/slipway/data-state", "condition=memory\nwhy=no card\n");
    assert_eq!(refused(&robot, &whole), (4, "no-data".to_owned()));
    robot.file("run/slipway/data-state", "condition=clean\n");
    let huge = draft().edit(|lock| {
        // Wheels that claim 65536 files each; nothing is ever unpacked.
        let one = lock.wheels[0].clone();
        let many = (0..120).map(|n| ComponentWheel {
            role: format!("w{n}"),
            name: format!("w{n}"),
            files: 65536,
            ..one.clone()
        });
        lock.wheels.extend(many);
    });
    let tars = huge.lock.wheels.iter().map(|_| huge.tars[0].clone()).collect();
    let mut huge = Draft { tars, ..huge };
    huge.tars[1] = trees("10.1.0", "fine")[1].tar();
    assert_eq!(refused(&robot, &huge.bundle()), (4, "no-space".to_owned()));
    fs::remove_file(robot.path("usr/lib/slipway/api.toml")).unwrap();
    assert_eq!(refused(&robot, &whole), (3, "unknown-payload".to_owned()));
    assert_eq!(robot.run(&["status"])["api"], Value::Null);
}

/// A tar with one entry that no builder writes.
fn hostile(name: &[u8], kind: tar::EntryType, link: &str, text: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_size(text.len() as u64);
    header.set_mode(0o4777);
    if !link.is_empty() {
        header.set_link_name(link).unwrap();
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(text);
    bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
    bytes
}

#[test]
fn nothing_of_a_hostile_tree_is_taken() {
    use tar::EntryType as Kind;
    let two = |one: &[u8], other: &[u8]| {
        let mut bytes = hostile(one, Kind::Regular, "", b"x");
        bytes.truncate(1024);
        bytes.extend(hostile(other, Kind::Regular, "", b"x"));
        bytes
    };
    let long: String = "site/".to_owned() + &"a/".repeat(40) + "x";
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("absolute", hostile(b"/etc/shadow", Kind::Regular, "", b"x")),
        ("upwards", hostile(b"site/../../../x", Kind::Regular, "", b"x")),
        ("dotted", hostile(b"./site/x", Kind::Regular, "", b"x")),
        ("hidden", hostile(b".state.json", Kind::Regular, "", b"x")),
        ("the lock", hostile(b"component.json", Kind::Regular, "", b"x")),
        ("nothing", hostile(b"", Kind::Regular, "", b"x")),
        ("no text", hostile(b"site/\xff\xfe", Kind::Regular, "", b"x")),
        ("deep", hostile(long.as_bytes(), Kind::Regular, "", b"x")),
        ("link", hostile(b"site/x", Kind::Symlink, "/etc", b"")),
        ("hard link", hostile(b"site/x", Kind::Link, "/etc/passwd", b"")),
        ("device", hostile(b"site/x", Kind::Block, "", b"")),
        ("pipe", hostile(b"site/x", Kind::Fifo, "", b"")),
        ("sparse", hostile(b"site/x", Kind::GNUSparse, "", b"x")),
        ("twice", two(b"site/x", b"site/x")),
        ("case", two(b"site/x", b"site/X")),
        ("a file as a directory", two(b"site/x", b"site/x/y")),
        ("too much", hostile(b"site/x", Kind::Regular, "", &[b'x'; 6000])),
        ("too many", two(b"site/x", b"site/y")),
        ("nothing at all", vec![0; 1024]),
        ("no tar", vec![b'x'; 4096]),
    ];
    let robot = robot();
    install(&robot, &api("10.0.0"));
    let outside = content(robot.dir.path());
    let ours = |path: &PathBuf| {
        path.starts_with(robot.path("data/slotd")) || path.starts_with(robot.path("run/slotd"))
    };
    for (what, tar) in cases {
        let mut draft = Draft::new(&trees("10.1.0", "fine"));
        let (files, bytes) = (if what == "too many" { 1 } else { 2 }, 100.min(tar.len() as u64));
        let claim = ComponentWheel {
            tree: to_hex(&sha256(&tar)),
            size: tar.len() as u64,
            files,
            bytes,
            ..draft.lock.wheels[1].clone()
        };
        draft.lock.wheels[1] = claim;
        draft.tars[1] = tar;
        let (exit, code) = refused(&robot, &draft.bundle());
        let io = what == "a file as a directory";
        let expected = if io { (1, "io") } else { (3, "bad-tree") };
        assert_eq!((exit, code.as_str()), expected, "{what}");
        assert_eq!(serves(&robot), "10.0.0", "{what}");
        let mut now = content(robot.dir.path());
        // The log, and the bundle itself.
        now.retain(|path, _| outside.contains_key(path) || !ours(path));
        assert!(now.keys().eq(outside.keys()), "{what}: something is left");
    }
    install(&robot, &api("10.2.0"));
}

#[test]
fn a_base_that_the_api_does_not_fit_serves_its_own_until_it_fits_again() {
    let robot = robot();
    install(&robot, &api("10.0.0"));
    let start = || {
        let prepared = robot.command(&["data", "prepare"]).output().unwrap();
        assert!(prepared.status.success(), "{prepared:?}");
        robot.run(&["status"])["api"].clone()
    };
    assert_eq!(start()["why"], "an API is installed and fits this system");
    for (rest, why) in [
        ("python = '3.12'\n", "needs Python 3.11, but this system has 3.12"),
        ("python = '3.11'\nminimum-version = '10.0.1'\n", "this system requires 10.0.1 or later"),
    ] {
        base(&robot, rest);
        let status = start();
        assert_eq!((&status["serves"], &status["version"]), (&"built-in".into(), &"9.0.0".into()));
        assert!(status["why"].as_str().unwrap().contains(why), "{status}");
        assert_eq!(serves(&robot), "9.0.0");
        assert!(!robot.path("data/apps/api/current").is_symlink());
    }
    let settled = robot.events().iter().filter(|e| e["event"] == "api-settled").count();
    assert_eq!(settled, 1, "a start that changes nothing is not logged");
    // The previous base starts again, as after a failed trial.
    base(&robot, "python = '3.11'\n");
    assert_eq!(start()["version"], "10.0.0");
    assert_eq!(serves(&robot), "10.0.0");
    // Damaged state: the link's target serves. Damaged API: the built-in one serves.
    robot.file("data/apps/api/.state.json", "{");
    assert_eq!(start()["version"], "10.0.0");
    let lock = format!("data/apps/api/{}/component.json", folders(&robot)[0]);
    robot.file(&lock, "");
    let status = start();
    assert!(status["why"].as_str().unwrap().contains("is damaged"), "{status}");
    assert_eq!(serves(&robot), "9.0.0");
    // A link or a record that points elsewhere is ignored.
    symlink("../../../etc", robot.path("data/apps/api/current")).unwrap();
    robot.file("data/apps/api/.state.json", "{ \"chosen\": \"../../../etc\" }");
    assert_eq!(start()["serves"], "built-in");
    assert!(!robot.path("data/apps/api/current").is_symlink());
}

#[test]
fn the_last_good_ones_are_kept_and_no_wheel_without_a_version() {
    let robot = robot();
    let mut kept = Vec::new();
    for version in ["10.0.0", "10.1.0", "10.2.0", "10.3.0"] {
        kept.push(install(&robot, &api(version))["folder"].as_str().unwrap().to_owned());
    }
    assert_eq!(folders(&robot), kept[1..]);
    let wheels = || fs::read_dir(robot.path("data/apps/api/.wheels")).unwrap().count();
    assert_eq!(wheels(), 4);
    // A wheel with changed files is not used again.
    let helper = format!("data/apps/api/{}/site/helper/__init__.py", kept[3]);
    fs::write(robot.path(&helper), "VERSION = 'theirs'\n# the same in al\n").unwrap();
    assert_eq!(install(&robot, &api("10.4.0"))["reused"], 0);
    let text = fs::read_to_string(robot.path("data/apps/api/current/site/helper/__init__.py"));
    assert!(text.unwrap().contains("2.0"));
    // A backup has the versions, and their wheels once each.
    let backup = robot.path("b.tar.zst");
    robot.run(&["backup", backup.to_str().unwrap()]);
    let printed = Command::new("tar").args(["--zstd", "-tf"]).arg(&backup).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.contains("10.4.0-") && printed.contains("apps/api/current"), "{printed}");
    assert!(!printed.contains(".wheels"), "{printed}");
}

/// System calls that change files: the program is killed before each of them. Some architectures lack the
/// older of two variants (`?`, strace(1)).
const CHANGES: [&str; 16] = [
    "?mkdir",
    "mkdirat",
    "openat",
    "write",
    "?chmod",
    "fchmodat",
    "utimensat",
    "linkat",
    "?rename",
    "?renameat",
    "renameat2",
    "symlinkat",
    "?unlink",
    "unlinkat",
    "fsync",
    "syncfs",
];

#[test]
fn killed_at_any_change_the_robot_has_one_whole_api() {
    let robot = robot();
    install(&robot, &api("10.0.0"));
    let good = write(robot.dir.path(), "good.bundle", &api("10.1.0"));
    let bytes = fs::read(&good).unwrap();
    let original = robot.path("original");
    let copy = |from: &Path, to: &Path| {
        let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
        assert!(status.success());
    };
    copy(&robot.path("data"), &original);
    let (mut kills, mut outcomes) = (0, BTreeMap::new());
    for call in CHANGES {
        // Reading also opens files; every third kill is enough there.
        let step = if call == "openat" { 3 } else { 1 };
        for number in (1..).step_by(step) {
            fs::remove_dir_all(robot.path("data")).unwrap();
            copy(&original, &robot.path("data"));
            let program = env!("CARGO_BIN_EXE_slotd");
            let inject = format!("inject={call}:signal=KILL:when={number}");
            let output = Command::new("strace")
                .args([
                    "-f",
                    "-qq",
                    "-e",
                    &inject,
                    "-e",
                    &format!("trace={call}"),
                    "-o",
                    "/dev/null",
                ])
                .args([program, "--format", "json", "--root"])
                .arg(robot.dir.path())
                .args(["install", "--foreground", &good])
                .output()
                .expect("this test needs strace");
            if output.status.success() {
                break;
            }
            kills += 1;
            // One complete API serves, and also after the next start.
            let at = format!("{call} {number}");
            let now = whole(&robot, &at);
            let prepared = robot.command(&["data", "prepare"]).output().unwrap();
            assert!(prepared.status.success(), "{at}: {prepared:?}");
            let settled = whole(&robot, &at);
            robot.run(&["provision", "--boot"]);
            assert_eq!(provisioned(&robot), settled, "{at}");
            let status = robot.run(&["status"])["api"].clone();
            assert_eq!(
                (&status["version"], &status["pending"]),
                (&settled.as_str().into(), &false.into()),
                "{at}"
            );
            // An unconfirmed change never stays.
            assert!(settled == "10.0.0" || now == "10.1.0", "{at}: {now} became {settled}");
            *outcomes.entry((now, settled)).or_insert(0) += 1;
            // And the same install succeeds.
            if kills % 7 == 0 {
                install(&robot, &bytes);
                assert_eq!(whole(&robot, &at), "10.1.0");
            }
        }
    }
    let seen =
        |now: &str, settled: &str| outcomes.contains_key(&(now.to_owned(), settled.to_owned()));
    // Before the change, unconfirmed, and confirmed: all three states occurred.
    assert!(
        seen("10.0.0", "10.0.0") && seen("10.1.0", "10.0.0") && seen("10.1.0", "10.1.0"),
        "{outcomes:?}"
    );
    assert!(kills > 60, "{kills}");
}

#[test]
fn what_gets_its_name_is_on_the_disk_before() {
    let robot = robot();
    install(&robot, &api("10.0.0"));
    let file = write(robot.dir.path(), "api.bundle", &api("10.1.0"));
    let log = robot.path("calls");
    let calls = "trace=?rename,?renameat,renameat2,fsync,syncfs,linkat,?mkdir,mkdirat,symlinkat";
    let status = Command::new("strace")
        .args(["-f", "-qq", "-e", calls, "-e", "status=successful", "-o"])
        .arg(&log)
        .args([env!("CARGO_BIN_EXE_slotd"), "--format", "json", "--root"])
        .arg(robot.dir.path())
        .args(["install", &file])
        .output()
        .expect("this test needs strace")
        .status;
    assert!(status.success());
    let text = fs::read_to_string(log).unwrap();
    // `1234 rename("…", "…") = 0`
    let lines: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().split_once(' '))
        .map(|(_, call)| call.trim())
        .collect();
    let removed = |line: &str| line.contains(".new\", RENAME_NOREPLACE");
    let below = |line: &str| line.contains("/data/apps/api/") && !removed(line);
    let mut seen = 0;
    for (at, line) in
        lines.iter().enumerate().filter(|(_, line)| line.starts_with("rename") && below(line))
    {
        let (before, after) = (lines[at - 1], lines[at + 1]);
        // A link's own content is part of the name's journal entry; a file's is not.
        assert!(
            ["fsync", "syncfs", "symlinkat"].iter().any(|call| before.starts_with(call)),
            "{before}\n{line}"
        );
        assert!(after.starts_with("fsync"), "{line}\n{after}");
        seen += 1;
    }
    // The wheel, the lock in the version, the version, the link, and the state, twice.
    assert!(seen >= 6, "{seen} of\n{text}");
}

/// The API that serves. It must have every file of its lock's wheels and nothing else.
fn whole(robot: &Robot, at: &str) -> String {
    let version = serves(robot);
    let current = robot.path("data/apps/api/current");
    assert!(current.is_symlink(), "{at}");
    let mut expected: Vec<(PathBuf, Vec<u8>)> = trees(&version, "fine")
        .into_iter()
        .flat_map(|tree| tree.files)
        .map(|(path, text)| (PathBuf::from(path), text.into_bytes()))
        .collect();
    expected.sort();
    let folder = fs::canonicalize(&current).unwrap();
    let mut found: Vec<(PathBuf, Vec<u8>)> = content(&folder)
        .into_iter()
        .map(|(path, bytes)| (path.strip_prefix(&folder).unwrap().to_owned(), bytes))
        .filter(|(path, _)| path != Path::new(LOCK_ROLE))
        .collect();
    found.sort();
    assert!(found == expected, "{at}: {version} is not whole");
    version
}
