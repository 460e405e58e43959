//! Power cuts between any two changes to `data` by the component `api`: installs, the change, going back, tidying up,
//! and the start that settles after a cut. Unflushed changes are present, lost, torn or out of order
//! (`common/crash.rs`); then the robot starts, with the code of a real robot.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;
#[path = "common/crash.rs"]
mod crash;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use bundle::SeekableInput;
use bundle::component::LOCK_ROLE;
use bundle::index::{sha256, to_hex};
use common::Robot;
use common::wheels::{Draft, base, trees};
use crash::{Recorder, Snapshot, State, snapshot};
use serde_json::Value;
use slotd::Refusal;
use slotd::components::{roll_back, settle};
use slotd::device::RobotDevice;
use slotd::events::EventLog;
use slotd::files::{DirectFileChanges, FileChanges};
use slotd::install::InstallOptions;
use slotd::machine::RobotContext;
use slotd::provision;
use slotd::update::InstallOutcome;

/// The built-in version.
const OWN: &str = "9.0.0";

/// The robot starts from this many first states, then from a sample of the states that differ in something
/// finished, and from a smaller sample of those that differ only in something unfinished.
const FEW: usize = 50;
const FINISHED: usize = 3;
const SAMPLE: usize = 16;

/// One in this many starts is followed by an install.
const INSTALLS: usize = 16;

/// A version that is healthy, unless its number ends with 9.
fn draft(version: &str) -> Draft {
    let mut trees = trees(version, "fine");
    if !version.ends_with('9') {
        trees[1] = trees[1].clone().with("site/robotapi/well", "");
    }
    Draft::new(&trees)
}

/// The name and the content of a version's directory.
fn folder(version: &str) -> (String, Snapshot) {
    let draft = draft(version);
    let json = draft.lock.to_json().unwrap();
    let mut tree = Snapshot::new();
    for tar in &draft.tars {
        for entry in tar::Archive::new(tar.as_slice()).entries().unwrap() {
            let entry = entry.unwrap();
            let mode = entry.header().mode().unwrap();
            let (path, text) = (entry.path().unwrap().into_owned(), std::io::read_to_string(entry));
            tree.insert(path, format!("{mode:o} {}", text.unwrap()));
        }
    }
    tree.insert(LOCK_ROLE.into(), format!("644 {}", String::from_utf8(json.clone()).unwrap()));
    let parents: BTreeSet<PathBuf> =
        tree.keys().flat_map(|path| path.ancestors().skip(1)).map(Path::to_owned).collect();
    tree.extend(parents.into_iter().map(|path| (path, "755 directory".to_owned())));
    (format!("{version}-{}", &to_hex(&sha256(&json))[..8]), tree)
}

/// A robot that has started once, and has these versions installed, the last one serving.
fn robot(installed: &[&str]) -> Robot {
    let robot = common::wheels::robot();
    // A check that starts no program: child processes share the locks of other tests for a moment.
    let check = "[space]\npath = '/data/apps/api/current/site/robotapi/well'\nfree-mib = 1\n";
    robot.file("etc/slotd/health.d/30-api.toml", check);
    start(&robot);
    for version in installed {
        install(&robot, version, &DirectFileChanges).unwrap();
    }
    robot
}

fn install(
    robot: &Robot,
    version: &str,
    files: &dyn FileChanges,
) -> Result<InstallOutcome, Refusal> {
    let root = robot.root();
    let device = RobotDevice::read(&root).unwrap();
    let flow = slotd::boot::open(&device).unwrap();
    let machine = RobotContext {
        root: &root,
        about: &device.about,
        running: device.running,
        flow: flow.as_ref(),
        slots: &device,
        files,
        events: &EventLog::new(&root),
    };
    let bundle = SeekableInput(Cursor::new(draft(version).bundle()));
    slotd::update::install(&machine, bundle, &InstallOptions::default(), &|_| {})
}

/// What a start does with `data`, in order.
fn start(robot: &Robot) {
    slotd::startup::prepare(&robot.root()).unwrap();
    provision::provision_at_start(&robot.root(), &EventLog::new(&robot.root())).unwrap();
}

/// The versions of a test.
struct Known(BTreeMap<String, (String, Snapshot)>);

impl Known {
    fn new(versions: &[&str]) -> Self {
        let known = versions.iter().map(|version| {
            let (name, tree) = folder(version);
            (name, ((*version).to_owned(), tree))
        });
        Self(known.collect())
    }

    /// The version in a directory, which must have exactly the files that were packed.
    fn whole(&self, apps: &Snapshot, name: &str, at: &str) -> String {
        let (version, tree) = self.0.get(name).unwrap_or_else(|| panic!("{at}: {name}"));
        let top = Path::new("api").join(name);
        let inside = apps.iter().filter_map(|(path, text)| {
            Some((path.strip_prefix(&top).ok()?.to_owned(), text.clone()))
        });
        let found: Snapshot = inside.collect();
        assert!(found == *tree, "{at}: {name} is not whole: {found:#?}");
        version.clone()
    }

    /// The version that serves, which must be complete.
    fn serves(&self, apps: &Snapshot, at: &str) -> String {
        let Some(link) = apps.get(Path::new("api/current")) else { return OWN.to_owned() };
        let name = link.strip_prefix("-> ").unwrap_or_else(|| panic!("{at}: {link}"));
        self.whole(apps, name, at)
    }

    /// Every version that is recorded as good must be complete.
    fn good(&self, apps: &Snapshot, at: &str) {
        for good in state(apps).unwrap_or_default()["good"].as_array().into_iter().flatten() {
            self.whole(apps, good["folder"].as_str().unwrap(), at);
        }
    }

    /// The version that was confirmed last; `None`: none was confirmed.
    fn confirmed(&self, apps: &Snapshot) -> Option<String> {
        let chosen = state(apps)?["chosen"].as_str().map(str::to_owned);
        Some(chosen.map_or(OWN.to_owned(), |name| self.0[&name].0.clone()))
    }
}

/// The recorded state.
fn state(apps: &Snapshot) -> Option<Value> {
    let text = apps.get(Path::new("api/.state.json"))?.strip_prefix("644 ").unwrap();
    Some(serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}")))
}

/// What must hold after a start: `expected` serves, its resources are provisioned, every version recorded as good
/// is complete, nothing is left over, and another start changes nothing.
fn check_started(robot: &Robot, known: &Known, expected: &str, at: &str) {
    let data = snapshot(&robot.path("data"));
    let below = |folder: &str| -> Snapshot {
        let inside = data.iter().filter_map(|(path, text)| {
            Some((path.strip_prefix(folder).ok()?.to_owned(), text.clone()))
        });
        inside.collect()
    };
    let apps = below("apps");
    assert_eq!(known.serves(&apps, at), expected, "{at}");
    let resources = [("", "755 directory".to_owned()), ("version.txt", format!("644 {expected}"))];
    let resources: Snapshot = resources.map(|(path, text)| (path.into(), text)).into();
    assert_eq!(below("system"), resources, "{at}");
    assert_eq!(state(&apps).unwrap_or_default()["trial"], Value::Null, "{at}");
    known.good(&apps, at);
    // Leftovers of the old resources are removed by the next provisioning that changes something.
    let left = apps.keys().find(|path| path.to_str().unwrap().ends_with(".new"));
    assert_eq!(left, None, "{at}");
    start(robot);
    assert!(snapshot(&robot.path("data")) == data, "{at}: a second start changes something");
}

/// What is cut, and the required result.
struct Scene<'a> {
    what: &'a str,
    /// The versions that may serve: one of them must.
    between: [&'a str; 2],
    /// All versions that there are.
    versions: &'a [&'a str],
    /// The version that must serve after a start, by the confirmed version.
    then: &'a dyn Fn(String) -> String,
}

impl Scene<'_> {
    /// Records what `act` does to a robot, cuts it at every point, and starts from each result.
    fn cut(&self, robot: &Robot, act: impl FnOnce(&Recorder)) {
        let Self { what, between, versions, then } = self;
        let (known, data) = (Known::new(versions), robot.path("data"));
        let files = Recorder::new(&data);
        act(&files);
        let (mut states, mut starts) = (0, 0);
        let (mut different, mut finished) = (BTreeSet::new(), BTreeSet::new());
        let mut seen = BTreeSet::new();
        for point in 0..files.points() {
            for state in files.states(point) {
                states += 1;
                if !different.insert(state.key(&|_| false)) {
                    continue;
                }
                let (at, apps) = (format!("{what}, point {point}"), state.below("apps"));
                let now = known.serves(&apps, &at);
                assert!(between.contains(&now.as_str()), "{at}: {now}");
                known.good(&apps, &at);
                let unfinished = |name: &str| name.ends_with(".new") || name.ends_with(".partial");
                let every = if finished.insert(state.key(&unfinished)) { FINISHED } else { SAMPLE };
                let (number, moment) = (different.len(), (now.clone(), known.confirmed(&apps)));
                if number > FEW && !number.is_multiple_of(every) && seen.contains(&moment) {
                    continue;
                }
                starts += 1;
                let expected = then(moment.1.clone().unwrap_or(now));
                seen.insert(moment);
                state.write(&data);
                start(robot);
                check_started(robot, &known, &expected, &at);
                if starts % INSTALLS == 0 {
                    let version = versions.last().unwrap();
                    install(robot, version, &DirectFileChanges).unwrap();
                    check_started(robot, &known, version, &at);
                }
            }
        }
        // At its end everything is durable.
        let end = snapshot_of(&files, &known);
        assert_eq!(end.len(), 1, "{what}: {end:?}");
        println!(
            "{what}: {} changes, {states} states, {} of them different, {starts} starts; serving and confirmed: {seen:?}",
            files.points() - 1,
            different.len()
        );
        // Both the old and the new version occurred.
        let both = between[0] == between[1] || seen.len() > 1;
        assert!(states > 300 && starts > 20 && both, "{what}: the test sees too little");
    }
}

/// The versions that serve in all states at the end of a recording.
fn snapshot_of(files: &Recorder, known: &Known) -> BTreeSet<String> {
    let states = files.states(files.points() - 1);
    states.iter().map(|state| known.serves(&state.below("apps"), "at the end")).collect()
}

/// The confirmed version serves.
fn confirmed(version: String) -> String {
    version
}

#[test]
fn the_first_api() {
    let scene = Scene {
        what: "the first API",
        between: [OWN, "10.0.0"],
        versions: &["10.0.0"],
        then: &confirmed,
    };
    let robot = robot(&[]);
    scene.cut(&robot, |files| drop(install(&robot, "10.0.0", files).unwrap()));
}

#[test]
fn a_second_api() {
    let scene = Scene {
        what: "a second API",
        between: ["10.0.0", "10.1.0"],
        versions: &["10.0.0", "10.1.0"],
        then: &confirmed,
    };
    let robot = robot(&["10.0.0"]);
    scene.cut(&robot, |files| drop(install(&robot, "10.1.0", files).unwrap()));
}

#[test]
fn the_same_api_again_with_a_wheel_that_somebody_changed() {
    let scene = Scene {
        what: "the same API again",
        between: ["10.0.0", "10.0.0"],
        versions: &["10.0.0"],
        then: &confirmed,
    };
    let robot = robot(&["10.0.0"]);
    // Only in the wheel's own directory, as if an editor had replaced the file there.
    for wheel in fs::read_dir(robot.path("data/apps/api/.wheels")).unwrap() {
        let file = wheel.unwrap().path().join("site/helper/__init__.py");
        if file.exists() {
            fs::remove_file(&file).unwrap();
            fs::write(file, "VERSION = 'theirs'\n").unwrap();
        }
    }
    scene.cut(&robot, |files| drop(install(&robot, "10.0.0", files).unwrap()));
}

#[test]
fn a_wheel_that_rotted_heals_in_all_versions() {
    let known = Known::new(&["10.0.0", "10.1.0"]);
    let robot = robot(&["10.0.0", "10.1.0"]);
    let (data, file) = (robot.path("data"), Path::new("site/helper/__init__.py"));
    // One bit of the file that the wheel and both versions share; length and time stay the same.
    let path = data.join("apps/api/current").join(file);
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[0] ^= 1;
    let rotted = format!("644 {}", String::from_utf8(bytes.clone()).unwrap());
    fs::write(&path, &bytes).unwrap();
    fs::File::open(&path).unwrap().set_modified(time).unwrap();
    // Each version is complete, except perhaps for that file; count the versions that have it.
    let rotten = |apps: &Snapshot, at: &str| {
        let mut apps = apps.clone();
        let mut count = 0;
        for (name, (_, tree)) in &known.0 {
            let found = apps.get_mut(&Path::new("api").join(name).join(file)).unwrap();
            if *found == rotted {
                count += 1;
                found.clone_from(&tree[file]);
            }
            known.whole(&apps, name, at);
        }
        assert_eq!(known.serves(&apps, at), "10.1.0", "{at}");
        count
    };
    assert_eq!(rotten(&snapshot(&data.join("apps")), "before"), 2);
    let files = Recorder::new(&data);
    install(&robot, "10.1.0", &files).unwrap();
    let (mut different, mut seen, mut installs) = (BTreeSet::new(), BTreeSet::new(), 0);
    for point in 0..files.points() {
        for state in files.states(point) {
            if !different.insert(state.key(&|_| false)) {
                continue;
            }
            let at = format!("a wheel that rotted, point {point}");
            let count = rotten(&state.below("apps"), &at);
            seen.insert(count);
            assert!(count == 0 || point + 1 < files.points(), "{at}: the end is not on the disk");
            if different.len().is_multiple_of(INSTALLS) {
                installs += 1;
                state.write(&data);
                start(&robot);
                install(&robot, "10.1.0", &DirectFileChanges).unwrap();
                check_started(&robot, &known, "10.1.0", &at);
            }
        }
    }
    println!("a wheel that rotted: {} states, {installs} installs", different.len());
    assert!(seen.len() == 3 && installs > 10, "{seen:?}, {installs}: the test sees too little");
}

#[test]
fn an_api_that_is_not_well() {
    let scene = Scene {
        what: "an API that is not well",
        between: ["10.0.0", "10.1.9"],
        versions: &["10.1.9", "10.0.0"],
        then: &|confirmed| {
            assert_eq!(confirmed, "10.0.0", "an unhealthy API is never confirmed");
            confirmed
        },
    };
    let robot = robot(&["10.0.0"]);
    scene.cut(&robot, |files| {
        assert_eq!(install(&robot, "10.1.9", files).unwrap_err().code, "api-unhealthy");
    });
}

#[test]
fn back_by_hand() {
    let scene = Scene {
        what: "back to the API before",
        between: ["10.0.0", "10.1.0"],
        versions: &["10.0.0", "10.1.0"],
        then: &confirmed,
    };
    let robot = robot(&["10.0.0", "10.1.0"]);
    let events = EventLog::new(&robot.root());
    scene.cut(&robot, |files| drop(roll_back(&robot.root(), &events, files).unwrap()));
}

#[test]
fn back_to_the_systems_own() {
    let scene = Scene {
        what: "back to the system's own",
        between: ["10.0.0", OWN],
        versions: &["10.0.0"],
        then: &confirmed,
    };
    let robot = robot(&["10.0.0"]);
    // The built-in API would fail this check.
    fs::remove_file(robot.path("etc/slotd/health.d/30-api.toml")).unwrap();
    let events = EventLog::new(&robot.root());
    scene.cut(&robot, |files| drop(roll_back(&robot.root(), &events, files).unwrap()));
}

#[test]
fn one_more_than_is_kept() {
    let versions = ["10.0.0", "10.1.0", "10.2.0", "10.3.0"];
    let scene = Scene {
        what: "one more than is kept",
        between: ["10.2.0", "10.3.0"],
        versions: &versions,
        then: &confirmed,
    };
    let robot = robot(&versions[..3]);
    scene.cut(&robot, |files| {
        install(&robot, "10.3.0", files).unwrap();
        assert!(!robot.path("data/apps/api").join(folder("10.0.0").0).exists());
    });
}

#[test]
fn the_start_that_takes_an_unconfirmed_api_back() {
    let scene = Scene {
        what: "an unconfirmed API is rolled back",
        between: ["10.0.0", "10.1.0"],
        versions: &["10.0.0", "10.1.0"],
        then: &|_| "10.0.0".to_owned(),
    };
    let robot = robot(&["10.0.0"]);
    let files = Recorder::new(&robot.path("data"));
    install(&robot, "10.1.0", &files).unwrap();
    // The last moment before it is confirmed: everything else is done, its resources are provisioned.
    let on_trial = |state: &State| {
        let pending = self::state(&state.below("apps")).is_some_and(|s| s["trial"] != Value::Null);
        let system = state.below("system");
        pending && system.get(Path::new("version.txt")).is_some_and(|text| text.ends_with("10.1.0"))
    };
    let states = (0..files.points()).rev().map(|point| files.states(point).swap_remove(0));
    states.into_iter().find(on_trial).unwrap().write(&robot.path("data"));
    let (root, events) = (robot.root(), EventLog::new(&robot.root()));
    scene.cut(&robot, |files| {
        settle(&root, &events, files).unwrap();
        provision::run_with(&root, &events, files).unwrap();
    });
}

#[test]
fn the_start_of_a_base_that_the_api_does_not_fit() {
    let scene = Scene {
        what: "a base that the API does not fit",
        between: ["10.0.0", OWN],
        versions: &["10.0.0", "10.1.0"],
        then: &|confirmed| {
            if confirmed == "10.0.0" { OWN.to_owned() } else { confirmed }
        },
    };
    let robot = robot(&["10.0.0"]);
    base(&robot, "python = '3.11'\nminimum-version = '10.0.1'\n");
    let (root, events) = (robot.root(), EventLog::new(&robot.root()));
    // Without recorded state: only the link tells which API was chosen.
    fs::write(robot.path("data/apps/api/.state.json"), "{").unwrap();
    let versions = Known::new(scene.versions);
    let files = Recorder::new(&robot.path("data"));
    settle(&root, &events, &files).unwrap();
    let mut different = BTreeSet::new();
    for point in 0..files.points() {
        for state in files.states(point) {
            if !different.insert(state.key(&|_| false)) {
                continue;
            }
            state.write(&robot.path("data"));
            start(&robot);
            check_started(&robot, &versions, OWN, "with a damaged note");
            // The previous base starts again, and finds its API.
            base(&robot, "python = '3.11'\n");
            start(&robot);
            check_started(&robot, &versions, "10.0.0", "with a damaged note, back");
            base(&robot, "python = '3.11'\nminimum-version = '10.0.1'\n");
        }
    }
    base(&robot, "python = '3.11'\n");
    start(&robot);
    base(&robot, "python = '3.11'\nminimum-version = '10.0.1'\n");
    scene.cut(&robot, |files| {
        settle(&root, &events, files).unwrap();
        provision::run_with(&root, &events, files).unwrap();
    });
}

#[test]
fn a_disk_that_fails_at_any_change_leaves_one_whole_api() {
    let known = Known::new(&["10.0.0", "10.1.0", "10.1.9"]);
    let robot = robot(&["10.0.0"]);
    let data = robot.path("data");
    let fresh = Recorder::new(&data).states(0).swap_remove(0);
    let mut failed = 0;
    for version in ["10.1.0", "10.1.9"] {
        for call in 0.. {
            fresh.write(&data);
            // EIO and ENOSPC, as every Linux architecture numbers them.
            let files = Recorder::new(&data).failing(call, [5, 28][call % 2]);
            let result = install(&robot, version, &files);
            if files.calls() <= call {
                break;
            }
            failed += 1;
            let at = format!("{version}, call {call}");
            let apps = snapshot(&data.join("apps"));
            let now = known.serves(&apps, &at);
            match &result {
                // Only tidying up may fail silently.
                Ok(_) => assert_eq!((now.as_str(), version), (version, "10.1.0"), "{at}"),
                // An unhealthy API may keep serving if it cannot be rolled back, until the next start.
                Err(_) => assert!(now == "10.0.0" || version == "10.1.9", "{at}: {result:?}"),
            }
            let expected = if result.is_ok() { version } else { "10.0.0" };
            start(&robot);
            check_started(&robot, &known, expected, &at);
        }
    }
    assert!(failed > 150, "{failed}");
}
