//! Stores in directories: kills, two publishers, retention, marks, and what is removed.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use xtask::store::ReleaseStore;
use xtask::store::format::Channel;

use super::support::{Bench, OBJECTS, Reader, ended, killed_anywhere};

/// How often publishers are killed.
const KILLS: u32 = 30;

#[test]
fn a_publisher_that_is_killed_anywhere_leaves_no_broken_index_and_is_finished_by_the_next() {
    let bench = Bench::new();
    let local = bench.store("local");
    bench.release(&local, "robot", "1.0.0");
    bench.release(&local, "robot", "1.1.0");
    let place = |name: &str| bench.dir.join(name);
    killed_anywhere(
        KILLS,
        |name| bench.xtask(&["publish", name, "--from", "local"]),
        |name| Reader::of_folder(bench.keys(), place(name)).read().len(),
        |name| place(name).exists(),
    );
}

#[test]
fn two_publishers_at_once_lose_nothing_and_readers_see_whole_releases_only() {
    let bench = Bench::new();
    let stores = [("one", bench.store("local-one")), ("two", bench.store("local-two"))];
    let done = AtomicBool::new(false);
    let reader = Reader::of_folder(bench.keys(), bench.dir.join("target"));
    let keys = bench.keys();
    let reads = std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let reader = Reader::of_folder(keys, bench.dir.join("target"));
            let mut reads = 0;
            while !done.load(Ordering::Relaxed) {
                reader.read();
                reads += 1;
            }
            reads
        });
        for round in 1..=6 {
            let mut children = Vec::new();
            for (product, store) in &stores {
                bench.release(store, product, &format!("1.0.{round}"));
                let from = store.root().as_str();
                children.push(bench.xtask(&["publish", "target", "--from", from]).spawn().unwrap());
            }
            children.into_iter().for_each(|child| ended(child, false));
            let found = reader.read();
            assert_eq!(found.len(), 2 * round, "{found:?}");
        }
        done.store(true, Ordering::Relaxed);
        reading.join().unwrap()
    });
    assert!(reads > 3, "only {reads} reads");
}

#[test]
fn nothing_is_sent_twice_and_a_damaged_object_is_sent_again() {
    let bench = Bench::new();
    let local = bench.store("local");
    bench.release(&local, "robot", "1.0.0");
    let call = |more: &[&str]| -> serde_json::Value {
        let words = ["publish", "target", "--from", "local", "--format", "json"];
        let text = bench.good(&[&words[..], more].concat());
        serde_json::from_str::<serde_json::Value>(&text).unwrap()[0].clone()
    };
    let publish = || call(&[]);
    let restored = || call(&["--store-was-restored"]);
    let first = publish();
    assert_eq!(first["sent"], OBJECTS + 1, "{first}");
    assert_eq!(publish()["changed"], false);
    // As if a publisher had been killed before the index, on a medium that lost bytes.
    fs::remove_dir_all(bench.dir.join("target/channels")).unwrap();
    let folder = bench.dir.join("target/objects");
    let some = folder.read_dir_utf8().unwrap().next().unwrap().unwrap().into_path();
    let object = some.read_dir_utf8().unwrap().next().unwrap().unwrap().into_path();
    let mut content = fs::read(&object).unwrap();
    content[0] ^= 1;
    fs::write(&object, content).unwrap();
    // A channel that has vanished is an older one; this time we did it.
    let message = bench.refused(&["publish", "target", "--from", "local"]);
    assert!(
        message.contains("its serial is 0 (no index), but this machine has seen 1"),
        "{message}"
    );
    let again = restored();
    assert_eq!((&again["sent"], &again["kept"]), (&1.into(), &OBJECTS.into()), "{again}");
    assert_eq!(Reader::of_folder(bench.keys(), bench.dir.join("target")).read().len(), 1);
    // Damage on our side must not get out.
    bench.release(&local, "robot", "1.1.0");
    for path in xtask_files(&bench.dir.join("local/objects")) {
        let mut content = fs::read(&path).unwrap();
        content.push(0);
        fs::write(&path, content).unwrap();
    }
    let message = bench.refused(&["publish", "target", "--from", "local"]);
    assert!(message.contains("the file is damaged; create the release again"), "{message}");
    assert_eq!(Reader::of_folder(bench.keys(), bench.dir.join("target")).read().len(), 1);
}

fn xtask_files(dir: &camino::Utf8Path) -> Vec<camino::Utf8PathBuf> {
    let folders = dir.read_dir_utf8().unwrap().map(|folder| folder.unwrap().into_path());
    folders.flat_map(|f| f.read_dir_utf8().unwrap().map(|p| p.unwrap().into_path())).collect()
}

#[test]
fn retention_keeps_the_newest_and_what_nothing_refers_to_goes_a_day_later() {
    let bench = Bench::new();
    let local = bench.store("local");
    for n in 1..=3 {
        bench.release(&local, "robot", &format!("1.0.{n}"));
    }
    bench.good(&["publish", "target", "--from", "local"]);
    bench.release(&local, "robot", "1.0.4");
    bench.good(&["publish", "target", "--from", "local", "--keep", "2"]);
    let reader = Reader::of_folder(bench.keys(), bench.dir.join("target"));
    let kept = ["robot 1.0.3", "robot 1.0.4"].map(str::to_owned);
    assert_eq!(reader.read().into_iter().collect::<Vec<_>>(), kept);
    // What was let go of does not come back with the next publish.
    bench.good(&["publish", "target", "--from", "local", "--keep", "2"]);
    assert_eq!(reader.read().len(), 2);
    let left = bench.dir.join("target/objects/aa/.partial-0123456789abcdef");
    fs::create_dir_all(left.parent().unwrap()).unwrap();
    fs::write(&left, "half").unwrap();
    let gc = |dry: bool| -> serde_json::Value {
        let mut words = vec!["release", "gc", "--store", "target", "--format", "json"];
        words.extend(dry.then_some("--dry-run"));
        serde_json::from_str(&bench.good(&words)).unwrap()
    };
    assert_eq!(gc(false)["files"], serde_json::json!([]), "everything is young");
    let old = SystemTime::now() - Duration::from_secs(25 * 3600);
    let mut all = xtask_files(&bench.dir.join("target/objects"));
    all.extend(xtask_files(&bench.dir.join("target/releases")));
    for path in &all {
        fs::File::options().append(true).open(path).unwrap().set_modified(old).unwrap();
    }
    // The retired ones still count: a publisher may be about to offer them in another channel.
    let removed = gc(true);
    assert_eq!(removed["files"].as_array().unwrap().len(), 1, "{removed}");
    assert!(left.exists());
    gc(false);
    assert!(!left.exists());
    assert_eq!(reader.read().len(), 2);
}

#[test]
fn a_yanked_release_is_marked_everywhere_and_versions_only_grow() {
    let bench = Bench::new();
    let local = bench.store("dist/releases");
    bench.release(&local, "robot", "1.0.0");
    bench.release(&local, "robot", "1.1.0");
    let robot = ["--product", "robot"];
    let run = |words: &[&str]| bench.good(&[words, &robot[..]].concat());
    let printed = run(&["release", "promote", "1.1.0", "--to", "beta"]);
    assert!(printed.starts_with("robot 1.1.0 of nightly is now also in beta of "), "{printed}");
    let printed = run(&["release", "promote", "1.1.0", "--to", "beta"]);
    assert!(printed.contains("was already in beta"), "{printed}");
    let refused = |words: &[&str]| bench.refused(&[words, &robot[..]].concat());
    let message = refused(&["release", "promote", "1.0.0", "--to", "beta"]);
    assert!(message.contains("1.0.0 is not newer than 1.1.0"), "{message}");
    let message = refused(&["release", "promote", "1.1.0", "--to", "stable"]);
    assert!(message.contains("a development product"), "{message}");
    let message = refused(&["release", "show", "2.0.0"]);
    assert!(message.contains("help: known: 1.0.0, 1.1.0"), "{message}");
    bench.good(&["publish", "target"]);
    let printed = run(&["release", "yank", "1.1.0", "--reason", "it hums\n  robot 9.0.0"]);
    assert_eq!(printed.lines().count(), 2, "{printed}");
    bench.good(&["publish", "target"]);
    let list = bench.good(&["release", "list", "--store", "target"]);
    assert_eq!(list.matches("YANKED: it hums\\n  robot 9.0.0\n").count(), 2, "{list}");
    let shown = run(&["release", "show", "latest", "--store", "target"]);
    assert!(shown.starts_with("robot 1.0.0 (development), channel nightly"), "{shown}");
    let notes = run(&["release", "show", "latest", "--store", "target", "--notes"]);
    for printed in [shown, notes] {
        assert!(
            printed.contains("\\u{1b}]0;owned\\u{7}") && !printed.contains('\u{1b}'),
            "{printed:?}"
        );
    }
    let message = refused(&["release", "promote", "1.1.0", "--to", "beta"]);
    assert!(message.contains("was yanked: it hums\\n  robot"), "{message}");
    run(&["release", "yank", "1.0.0", "--reason", "it smokes"]);
    let message = refused(&["release", "show", "latest"]);
    assert!(message.contains("each was yanked\nhelp: known: 1.0.0 (yanked), 1.1"), "{message}");
    // What was built goes; what was released stays.
    let built = bench.dir.join("dist/robot/one");
    fs::create_dir_all(&built).unwrap();
    bench.good(&["clean"]);
    assert!(!built.exists());
    assert_eq!(Reader::of_folder(bench.keys(), local.root().to_owned()).read().len(), 2);
}

#[test]
fn an_index_that_nobody_trusted_has_signed_is_refused() {
    let bench = Bench::new();
    bench.release(&bench.store("local"), "robot", "1.0.0");
    let stranger = Bench::new();
    stranger.release(&stranger.store("target"), "robot", "9.0.0");
    let target = stranger.dir.join("target");
    let message = bench.refused(&["publish", target.as_str(), "--from", "local"]);
    assert!(message.contains("is not in the key set"), "{message}");
    // One letter of a signed index.
    let path = bench.dir.join("local/channels/nightly.json");
    let text = fs::read_to_string(&path).unwrap();
    let forged = text.replace("1.0.0", "1.0.9");
    let error = bench.pins().open(Channel::Nightly, forged.as_bytes(), &bench.keys()).unwrap_err();
    assert!(format!("{error:#}").contains("signature"), "{error:#}");
    let other = bench.pins().open(Channel::Beta, text.as_bytes(), &bench.keys()).unwrap_err();
    assert!(format!("{other:#}").contains("the index belongs to the channel nightly"), "{other:#}");
}

#[test]
fn an_interrupted_index_is_finished_by_whoever_comes_next() {
    let bench = Bench::new();
    let local = bench.store("local");
    bench.release(&local, "robot", "1.0.0");
    bench.good(&["publish", "target", "--from", "local"]);
    let path = bench.dir.join("target/channels/nightly.json");
    let first = fs::read(&path).unwrap();
    bench.release(&local, "robot", "1.1.0");
    bench.good(&["publish", "target", "--from", "local"]);
    // Killed between the serial's own file and the one that readers take.
    fs::write(&path, first).unwrap();
    let printed = bench.good(&["publish", "target", "--from", "local"]);
    assert!(printed.contains("nothing new"), "{printed}");
    let reader = Reader::of_folder(bench.keys(), bench.dir.join("target"));
    assert_eq!(reader.read().len(), 2);
    assert!(local.index(Channel::Nightly).unwrap().0.is_some());
}
