//! Power cuts and failing disks during changes of `data` as a whole: a reset, a restore, a migration forward and back,
//! and each of them after an interrupted other one. Cuts are between any two changes, with unflushed changes lost or
//! torn (`common/crash.rs`); then the robot starts, with the code of a real robot. `data` must then have either the
//! complete old content or the complete new one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[allow(dead_code)]
#[path = "common/crash.rs"]
mod crash;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use bundle::Version;
use crash::{Recorder, Snapshot, snapshot};
use slotd::data::{
    MigrationStep, PendingChange, apply_with, backup, migrate_with, reset_with, restore_with,
};
use slotd::files::{DirectFileChanges, FileChanges};
use slotd::{Refusal, RootDir};

/// The content of `data`, identified by a word in every file.
fn fill(root: &RootDir, word: &str) {
    let put = |path: &str| {
        let path = root.data().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, word).unwrap();
    };
    for path in ["identity/hostname", "apps/settings/api.json", "home/robot/protocol.py"] {
        put(path);
    }
    put(&format!("extra-{word}/file"));
    fs::write(root.data().join("data-version.json"), record(word)).unwrap();
}

/// The record of version 1.0.0, with the same word.
fn record(word: &str) -> String {
    let word = if word == "old" { "0.1.0" } else { "0.2.0" };
    format!(
        "{{\n  \"version\": \"1.0.0\",\n  \"taken\": [],\n  \"under-way\": null,\n  \"needs\": \"{word}\"\n}}\n"
    )
}

fn robot(word: &str) -> (tempfile::TempDir, RootDir) {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
    let dir = tempfile::tempdir_in(place).unwrap();
    let root = RootDir::new(dir.path());
    fill(&root, word);
    fs::create_dir_all(root.state()).unwrap();
    fs::write(root.state().join("floor.json"), "floor").unwrap();
    (dir, root)
}

fn archive_of(word: &str) -> Vec<u8> {
    let (_dir, root) = robot(word);
    if word == "worse" {
        // More than a block of zstd's, so that it is damaged in the middle.
        let noise = (0..300_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8);
        fs::write(root.data().join("home/noise"), noise.collect::<Vec<u8>>()).unwrap();
    }
    let mut bytes = Vec::new();
    backup(&root, &mut bytes).unwrap();
    bytes
}

/// The owner's files: all except the agent's.
fn owners(all: &Snapshot) -> Snapshot {
    let ours = |path: &Path| path == Path::new("") || path.starts_with("slotd");
    all.iter().filter(|(path, _)| !ours(path)).map(|(p, t)| (p.clone(), t.clone())).collect()
}

fn of(word: &str) -> Snapshot {
    owners(&snapshot(&robot(word).1.data()))
}

/// What a start does.
fn start(root: &RootDir, files: &dyn FileChanges) -> Result<Option<PendingChange>, Refusal> {
    let applied = apply_with(root, files)?;
    migrate_with(root, &version("1.0.0"), files, &|_, _| Ok(()))?;
    Ok(applied.carried_out)
}

fn version(text: &str) -> Version {
    Version::parse(text).unwrap()
}

/// The results of `check` for all states that a cut of this recording could leave.
fn cut(what: &str, files: &Recorder, root: &RootDir, check: &dyn Fn(&str) -> String) -> usize {
    let mut states = 0;
    let (mut different, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for point in 0..files.points() {
        for (number, state) in files.states(point).into_iter().enumerate() {
            states += 1;
            if !different.insert(state.key(&|_| false)) {
                continue;
            }
            state.write(&root.data());
            seen.insert(check(&format!("{what}, point {point}, state {number}")));
        }
    }
    println!(
        "{what}: {} changes, {states} states, a start from each of the {} that differ: {seen:?}",
        files.points() - 1,
        different.len()
    );
    // At its end everything is durable.
    let mut end = BTreeSet::new();
    for state in files.states(files.points() - 1) {
        state.write(&root.data());
        end.insert(check(&format!("{what}, at its end")));
    }
    assert_eq!(end.len(), 1, "{what}: {end:?}");
    different.len()
}

/// The content of `data`, as one of the names; nothing else may be there.
fn which<'a>(root: &RootDir, known: &[(&'a str, &Snapshot)], at: &str) -> &'a str {
    let found = owners(&snapshot(&root.data()));
    let name = known.iter().find(|(_, expected)| **expected == found);
    name.unwrap_or_else(|| panic!("{at}: mixed or lost: {found:#?}")).0
}

/// The content after a start: one of these, and the next start changes nothing.
fn settles<'a>(root: &RootDir, known: &[(&'a str, &Snapshot)], at: &str) -> &'a str {
    start(root, &DirectFileChanges).unwrap_or_else(|refusal| panic!("{at}: {refusal}"));
    let name = which(root, known, at);
    let all = snapshot(&root.data());
    start(root, &DirectFileChanges).unwrap();
    assert!(all == snapshot(&root.data()), "{at}: a second start changes something");
    assert_eq!(all[Path::new("slotd/floor.json")], "644 floor", "{at}");
    assert!(!all.contains_key(Path::new("slotd/pending.json")), "{at}");
    name
}

/// The record of a robot that has just been reset.
fn empty() -> Snapshot {
    let (_dir, root) = robot("old");
    reset_with(&root, false, &DirectFileChanges).unwrap();
    start(&root, &DirectFileChanges).unwrap();
    let left = owners(&snapshot(&root.data()));
    assert_eq!(left.keys().collect::<Vec<_>>(), [&PathBuf::from("data-version.json")]);
    left
}

/// A request, by its name.
fn ask(root: &RootDir, what: &str, files: &dyn FileChanges) -> Result<(), Refusal> {
    match what {
        "reset" => reset_with(root, false, files).map(drop),
        "reset and keep" => reset_with(root, true, files).map(drop),
        "bad restore" => {
            let mut bytes = archive_of("worse");
            bytes.truncate(bytes.len() - 20);
            restore_with(root, bytes.as_slice(), files)
        }
        word => restore_with(root, archive_of(word).as_slice(), files),
    }
}

/// The expected content after a request and a start.
fn outcome(what: &str) -> &'static str {
    match what {
        "reset" | "reset and keep" => "nothing",
        "new" => "new",
        "newer" => "newer",
        "bad restore" | "none" => "old",
        other => panic!("{other}"),
    }
}

const REQUESTS: [&str; 5] = ["reset", "reset and keep", "new", "newer", "bad restore"];

#[test]
fn every_request_over_every_other_one_cut_anywhere() {
    let (old, new, newer, nothing) = (of("old"), of("new"), of("newer"), empty());
    let known = [("old", &old), ("new", &new), ("newer", &newer), ("nothing", &nothing)];
    let mut starts = 0;
    for first in ["none", "reset", "reset and keep", "new", "bad restore"] {
        for second in REQUESTS {
            let (_dir, root) = robot("old");
            if first != "none" {
                drop(ask(&root, first, &DirectFileChanges));
            }
            let files = Recorder::new(&root.data());
            let refused = ask(&root, second, &files).is_err();
            assert_eq!(refused, second == "bad restore");
            let before = outcome(first);
            let after = if refused { before } else { outcome(second) };
            let what = format!("{second} over {first}");
            starts += cut(&what, &files, &root, &|at| {
                let found = settles(&root, &known, at);
                assert!(found == before || found == after, "{at}: {found}");
                if at.ends_with("at its end") {
                    assert_eq!(found, after, "{at}");
                }
                found.to_owned()
            });
        }
    }
    println!("{starts} starts from cut requests");
    assert!(starts > 5000, "{starts}");
}

#[test]
fn what_waits_is_carried_out_cut_anywhere() {
    let (old, new, nothing) = (of("old"), of("new"), empty());
    let known = [("old", &old), ("new", &new), ("nothing", &nothing)];
    let mut starts = 0;
    for what in ["reset", "reset and keep", "new"] {
        let (_dir, root) = robot("old");
        ask(&root, what, &DirectFileChanges).unwrap();
        let files = Recorder::new(&root.data());
        start(&root, &files).unwrap();
        starts += cut(&format!("carrying out {what}"), &files, &root, &|at| {
            let found = settles(&root, &known, at);
            assert_eq!(found, outcome(what), "{at}");
            let kept = root.state().join("backup/before-reset.tar.zst");
            assert_eq!(kept.exists(), what == "reset and keep", "{at}");
            found.to_owned()
        });
    }
    println!("{starts} starts from cut changes");
    assert!(starts > 500, "{starts}");
}

/// What services create in a start with an empty `data`: directories and a file.
fn services(root: &RootDir) {
    for name in ["apps", "home", "identity", "network"] {
        fs::create_dir_all(root.data().join(name)).unwrap();
    }
    fs::write(root.data().join("identity/made"), "in between").unwrap();
}

#[test]
fn a_disk_that_fails_at_any_change_loses_nothing_and_heals() {
    let (old, new, nothing) = (of("old"), of("new"), empty());
    let known = [("old", &old), ("new", &new), ("nothing", &nothing)];
    let mut failed = 0;
    // The request fails: it is refused, and the earlier pending change stays pending.
    for first in ["none", "reset", "new"] {
        for second in ["reset", "reset and keep", "newer"] {
            for call in 0.. {
                let (_dir, root) = robot("old");
                if first != "none" {
                    ask(&root, first, &DirectFileChanges).unwrap();
                }
                let files = Recorder::new(&root.data()).failing(call, [5, 28][call % 2]);
                let result = ask(&root, second, &files);
                if files.calls() <= call {
                    break;
                }
                failed += 1;
                let at = format!("{second} over {first}, call {call}");
                if result.is_err() {
                    assert_eq!(settles(&root, &known, &at), outcome(first), "{at}: {result:?}");
                }
            }
        }
    }
    // Carrying out fails: the start continues, services create their files, and the next start completes the change.
    for what in ["reset", "new"] {
        for call in 0.. {
            let (_dir, root) = robot("old");
            ask(&root, what, &DirectFileChanges).unwrap();
            let files = Recorder::new(&root.data()).failing(call, [5, 28][call % 2]);
            let result = apply_with(&root, &files);
            if files.calls() <= call {
                break;
            }
            failed += 1;
            let at = format!("carrying out {what}, call {call}");
            if result.is_err() {
                services(&root);
            }
            start(&root, &DirectFileChanges).unwrap_or_else(|refusal| panic!("{at}: {refusal}"));
            let found = snapshot(&root.data());
            assert!(!found.values().any(|text| text == "644 old"), "{at}: {found:#?}");
            for name in [".incoming", ".outgoing", ".incoming.new", "slotd/pending.json"] {
                assert!(!found.contains_key(Path::new(name)), "{at}: {name}");
            }
            let complete = new.iter().all(|(path, text)| found.get(path) == Some(text));
            assert!(what == "reset" || complete, "{at}: {found:#?}");
        }
    }
    println!("{failed} failures");
    assert!(failed > 300, "{failed}");
}

#[test]
fn a_note_without_its_parts_takes_nothing_away() {
    let old = of("old");
    for note in ["\"restore\"", "", "\"later\"", "nonsense", "\0\0\0"] {
        for incoming in ["none", "half"] {
            let (_dir, root) = robot("old");
            fs::write(root.state().join("pending.json"), note).unwrap();
            if incoming == "half" {
                fs::create_dir_all(root.data().join(".incoming/home")).unwrap();
            }
            assert_eq!(settles(&root, &[("old", &old)], note), "old");
        }
    }
}

/// A step's work, through the recorder: a program's unflushed changes can be lost like any others.
fn work(root: &RootDir, step: &MigrationStep, files: &dyn FileChanges) -> Result<(), String> {
    let data = root.data();
    let settings = data.join("apps/settings");
    let work = || -> std::io::Result<()> {
        let file = settings.join("api.json");
        files.remove(&file)?;
        files.create(&file)?;
        files.append(&file, step.name.as_bytes())?;
        files.set_mode(&file, 0o644)?;
        let made = data.join("system").join(&step.name);
        if !data.join("system").exists() {
            files.create_dir(&data.join("system"))?;
        }
        files.create(&made)?;
        files.append(&made, b"made")
    };
    work().map_err(|error| error.to_string())
}

fn steps(root: &RootDir) {
    let folder = root.path("etc/slotd/migrations.d");
    fs::create_dir_all(&folder).unwrap();
    for (name, version) in [("one", "1.1.0"), ("two", "1.2.0")] {
        let text = format!(
            "version = '{version}'\npaths = ['apps/settings', 'apps/settings/api.json', 'system']\nrun = ['true']\n"
        );
        fs::write(folder.join(format!("{name}.toml")), text).unwrap();
    }
}

/// The owner's files, without the record of the steps.
fn contents(root: &RootDir) -> Snapshot {
    let mut all = owners(&snapshot(&root.data()));
    all.remove(Path::new("data-version.json"));
    all
}

fn bring(root: &RootDir, to: &str, files: &dyn FileChanges) -> Result<(), Refusal> {
    apply_with(root, files)?;
    migrate_with(root, &version(to), files, &|root, step| work(root, step, files)).map(drop)
}

#[test]
fn migration_forth_and_back_cut_anywhere() {
    let mut trees = Vec::new();
    for to in ["1.0.0", "1.1.0", "1.2.0"] {
        let (_dir, root) = robot("old");
        steps(&root);
        bring(&root, to, &DirectFileChanges).unwrap();
        trees.push((to, contents(&root)));
    }
    let tree = |to: &str| &trees.iter().find(|(version, _)| *version == to).unwrap().1;
    let mut starts = 0;
    for path in [&["1.2.0"][..], &["1.1.0", "1.2.0"], &["1.2.0", "1.0.0"], &["1.2.0", "1.1.0"]] {
        let (_dir, root) = robot("old");
        steps(&root);
        let (last, before) = path.split_last().unwrap();
        for to in before {
            bring(&root, to, &DirectFileChanges).unwrap();
        }
        let files = Recorder::new(&root.data());
        bring(&root, last, &files).unwrap();
        // Each system that may start then has its own data.
        for next in ["1.0.0", "1.1.0", "1.2.0"] {
            // A rollback over two versions is impossible.
            if path == ["1.1.0", "1.2.0"] && next == "1.0.0" {
                continue;
            }
            starts += cut(&format!("{path:?}, then {next}"), &files, &root, &|at| {
                bring(&root, next, &DirectFileChanges)
                    .unwrap_or_else(|refusal| panic!("{at}: {refusal}"));
                assert!(contents(&root) == *tree(next), "{at}: {:#?}", contents(&root));
                let all = snapshot(&root.data());
                bring(&root, next, &DirectFileChanges).unwrap();
                assert!(all == snapshot(&root.data()), "{at}: a second start changes something");
                let ways = all.keys().filter(|path| path.starts_with("slotd/snapshots")).count();
                assert!(ways <= 3, "{at}: superfluous snapshots: {all:#?}");
                next.to_owned()
            });
        }
    }
    println!("{starts} starts from cut migrations");
    assert!(starts > 1500, "{starts}");
}

#[test]
fn a_disk_that_fails_at_any_change_of_a_migration_mixes_nothing() {
    let mut failed = 0;
    for (before, to) in [("1.0.0", "1.2.0"), ("1.2.0", "1.0.0")] {
        let (_dir, root) = robot("old");
        steps(&root);
        bring(&root, to, &DirectFileChanges).unwrap();
        let expected = contents(&root);
        for call in 0.. {
            let (_dir, root) = robot("old");
            steps(&root);
            bring(&root, before, &DirectFileChanges).unwrap();
            let files = Recorder::new(&root.data()).failing(call, [5, 28][call % 2]);
            let result = bring(&root, to, &files);
            if files.calls() <= call {
                break;
            }
            failed += 1;
            let at = format!("{before} to {to}, call {call}: {result:?}");
            bring(&root, to, &DirectFileChanges)
                .unwrap_or_else(|refusal| panic!("{at}: {refusal}"));
            assert!(contents(&root) == expected, "{at}: {:#?}", contents(&root));
        }
    }
    println!("{failed} failures");
    assert!(failed > 80, "{failed}");
}

/// Without any one of its flushes an operation loses data: each flush is needed, and a test fails when its line is
/// removed.
#[test]
fn every_flush_is_needed() {
    let (old, new, nothing) = (of("old"), of("new"), empty());
    let known = [("old", &old), ("new", &new), ("nothing", &nothing)];
    let mut not_needed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut tried = 0;
    let mut try_all = |what: &str,
                       run: &dyn Fn(&RootDir, &Recorder),
                       before: &dyn Fn(&RootDir),
                       check: &dyn Fn(&RootDir, &str) -> String| {
        let mut without_effect = BTreeSet::new();
        for flush in 0.. {
            let (_dir, root) = robot("old");
            before(&root);
            let files = Recorder::new(&root.data()).forgetting(flush);
            run(&root, &files);
            let flushes = files.flushes();
            let Some(path) = flushes.get(flush) else { break };
            tried += 1;
            let kept = std::panic::AssertUnwindSafe(|| {
                cut(what, &files, &root, &|at| check(&root, at));
            });
            if std::panic::catch_unwind(kept).is_ok() {
                without_effect.insert(format!("{flush}, of /{}", path.display()));
            }
        }
        // For each system that may start then: one that loses data is enough.
        let known = not_needed.entry(what.to_owned()).or_insert_with(|| without_effect.clone());
        known.retain(|flush| without_effect.contains(flush));
    };
    for what in ["reset", "reset and keep", "new"] {
        let run = |root: &RootDir, files: &Recorder| ask(root, what, files).unwrap();
        try_all(&format!("asking for {what}"), &run, &|_| (), &|root, at| {
            let found = settles(root, &known, at);
            assert!(found == "old" || found == outcome(what), "{at}: {found}");
            if what == "reset and keep" && found == "nothing" {
                let kept = fs::File::open(root.state().join("backup/before-reset.tar.zst"));
                restore_with(root, kept.unwrap(), &DirectFileChanges).unwrap();
                assert_eq!(settles(root, &known, at), "old", "{at}: the backup");
            }
            found.to_owned()
        });
        let run = |root: &RootDir, files: &Recorder| {
            assert!(apply_with(root, files).unwrap().carried_out.is_some());
        };
        let before = |root: &RootDir| ask(root, what, &DirectFileChanges).unwrap();
        try_all(&format!("carrying out {what}"), &run, &before, &|root, at| {
            let outgoing = snapshot(&root.data().join(".outgoing"));
            let marked = outgoing.contains_key(Path::new(".overwrite"));
            assert!(what == "new" || outgoing.len() < 2 || marked, "{at}: {outgoing:#?}");
            if at.ends_with("at its end") {
                assert!(!root.state().join("pending.json").exists(), "{at}: again and again");
            }
            let found = settles(root, &known, at);
            assert_eq!(found, outcome(what), "{at}");
            found.to_owned()
        });
    }
    for (from, to) in [("1.0.0", "1.1.0"), ("1.1.0", "1.0.0")] {
        let trees: Vec<Snapshot> = ["1.0.0", "1.1.0"]
            .map(|to| {
                let (_dir, root) = robot("old");
                steps(&root);
                bring(&root, to, &DirectFileChanges).unwrap();
                contents(&root)
            })
            .into();
        for (next, tree) in ["1.0.0", "1.1.0"].into_iter().zip(&trees) {
            let run = |root: &RootDir, files: &Recorder| bring(root, to, files).unwrap();
            let before = |root: &RootDir| {
                steps(root);
                bring(root, from, &DirectFileChanges).unwrap();
            };
            try_all(&format!("{from} to {to}"), &run, &before, &|root, at| {
                bring(root, next, &DirectFileChanges)
                    .unwrap_or_else(|refusal| panic!("{at}: {refusal}"));
                assert!(contents(root) == *tree, "{at}: {:#?}", contents(root));
                next.to_owned()
            });
        }
    }
    println!("{tried} flushes were left out one by one; without effect: {not_needed:#?}");
    assert!(tried > 40, "{tried}");
    let expected = [
        // The directory of a record, flushed by `durable`: the next flush covers it too.
        ("asking for new", vec!["2, of /.incoming.new"]),
        // The directory that files are moved into (if it were lost, nothing could overwrite their blocks), and the zeros,
        // which would be dropped with their files: this test does not see blocks (`secrets` does). And that of the
        // record, which the flush of everything at the end covers too.
        ("carrying out reset", vec!["1, of /", "4, of /slotd", "5, of /"]),
        ("carrying out reset and keep", vec!["1, of /", "4, of /slotd", "5, of /"]),
        // A damaged record: the files on the disk show which change was in progress.
        ("carrying out new", vec!["2, of /slotd/pending.partial"]),
        // The directory of the record: running or rolling back a step again does no harm.
        ("1.0.0 to 1.1.0", vec!["7, of /", "9, of /"]),
        // And two flushes of which either is sufficient.
        ("1.1.0 to 1.0.0", vec!["1, of /", "2, of /.snapshot", "5, of /", "7, of /"]),
    ];
    not_needed.retain(|_, flushes| !flushes.is_empty());
    let expected: BTreeMap<String, BTreeSet<String>> = expected
        .into_iter()
        .map(|(what, list)| (what.to_owned(), list.into_iter().map(str::to_owned).collect()))
        .collect();
    assert_eq!(not_needed, expected);
}
