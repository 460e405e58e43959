//! Which indexes of a store are trusted: older ones, ones that the wrong kind of key has signed, and the loss of the
//! remembered serial numbers.

use crate::common::{good, tool};

use std::fs;
use std::process::Command;
use std::time::{Duration, SystemTime};

use bundle::{BuildKind, Version};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::store::ReleaseStore;
use xtask::store::directory::DirectoryStore;
use xtask::store::format::{Channel, ChannelEntry, ChannelIndex};

use super::support::Bench;

/// All files below a directory, with their content.
fn tree(dir: &Utf8Path) -> Vec<(Utf8PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in dir.read_dir_utf8().unwrap() {
        let path = entry.unwrap().into_path();
        if path.is_dir() {
            found.extend(tree(&path));
        } else {
            found.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

fn copy(from: &Utf8Path, to: &Utf8Path) {
    drop(fs::remove_dir_all(to));
    tool("cp").args(["-a", from.as_str(), to.as_str()]).run().unwrap();
}

/// So old that only a reference keeps a file.
fn age(store: &Utf8Path) {
    let old = SystemTime::now() - Duration::from_secs(25 * 3600);
    for (path, _) in tree(store) {
        fs::File::options().append(true).open(path).unwrap().set_modified(old).unwrap();
    }
}

/// A call on another machine of the same owner.
fn elsewhere(bench: &Bench, arguments: &[&str]) -> Command {
    let mut command = bench.xtask(arguments);
    command.env("SLIPWAY_STATE", bench.dir.join("elsewhere"));
    command
}

/// Replaces a channel's index by one that this kind of key has signed.
fn plant(bench: &Bench, store: &DirectoryStore, index: &ChannelIndex) {
    let mut authority = bench.authority();
    let content = index.sign(authority.signer(BuildKind::Development).unwrap()).unwrap();
    let path = store.root().join(index.channel.path());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    drop(fs::remove_dir_all(store.root().join(format!("channels/{}.d", index.channel))));
    fs::write(path, content).unwrap();
}

fn read(bench: &Bench, store: &DirectoryStore) -> ChannelIndex {
    let file = store.index(Channel::Nightly).unwrap().0.unwrap();
    bench.pins().open(Channel::Nightly, &file, &bench.keys()).unwrap()
}

#[test]
fn an_older_index_is_refused_with_both_serials_and_nothing_is_removed_on_its_word() {
    let bench = Bench::new();
    let local = bench.store("local");
    let [target, old] = ["target", "old"].map(|name| bench.dir.join(name));
    let publish = ["publish", "target", "--from", "local"];
    bench.release(&local, "robot", "1.0.0");
    bench.good(&publish);
    copy(&target, &old);
    bench.release(&local, "robot", "1.1.0");
    bench.good(&publish);
    bench.good(&[
        "release",
        "yank",
        "1.0.0",
        "--reason",
        "burns",
        "--product",
        "robot",
        "--store",
        "target",
    ]);
    let newest = bench.dir.join("newest");
    copy(&target, &newest);
    // The channel's files of the first day come back; objects stay, so that `gc` has something to delete.
    copy(&old.join("channels"), &target.join("channels"));
    age(&target);
    let before = tree(&target);
    let list = ["release", "list", "--store", "target"];
    let gc = ["release", "gc", "--store", "target"];
    let robot = ["--product", "robot", "--store", "target"];
    let with = |words: &[&'static str]| [words, &robot[..]].concat();
    for words in [
        list.to_vec(),
        publish.to_vec(),
        gc.to_vec(),
        with(&["release", "show", "1.0.0"]),
        with(&["release", "promote", "1.0.0", "--to", "beta"]),
        with(&["release", "yank", "1.0.0", "--reason", "hums"]),
    ] {
        let message = bench.refused(&words);
        assert!(message.contains("older index of the channel nightly"), "{words:?}: {message}");
        assert!(message.contains("its serial is 1, but this machine has seen 3"), "{message}");
        assert!(message.contains("--store-was-restored"), "{message}");
    }
    assert_eq!(tree(&target), before);
    // A machine that has seen nothing cannot know; but it does not delete on its first look.
    let printed = good(elsewhere(&bench, &list).output().unwrap());
    assert!(printed.contains("nightly (serial 1)"), "{printed}");
    drop(fs::remove_dir_all(bench.dir.join("elsewhere")));
    let first = elsewhere(&bench, &gc).output().unwrap();
    let message = String::from_utf8_lossy(&first.stderr);
    assert!(message.contains("has not seen nightly (serial 1) before"), "{message}");
    assert_eq!(tree(&target), before);
    // The store was restored on purpose: from now on its serial is the newest.
    bench.good(&[&list[..], &["--store-was-restored"]].concat());
    let printed = bench.good(&list);
    assert!(printed.contains("nightly (serial 1)") && !printed.contains("YANKED"), "{printed}");
    bench.good(&publish);
    // The one that was there before is now another one of that serial, or a newer one.
    copy(&newest, &target);
    assert!(bench.good(&list).contains("serial 3"));
    // No index at all is older than any.
    fs::remove_dir_all(target.join("channels")).unwrap();
    for words in [&list[..], &publish, &gc] {
        let message = bench.refused(words);
        assert!(message.contains("its serial is 0 (no index)"), "{message}");
    }
    // A missing directory is not a store, and contains no information about releases; a new store
    // begins.
    fs::remove_dir_all(&target).unwrap();
    assert!(bench.refused(&list).contains("there is no release store at target"));
    bench.good(&publish);
    assert!(bench.good(&list).contains("serial 1"));
}

/// The link is part of the address that was given: what was seen through it is remembered, too.
#[test]
fn a_link_that_leads_to_an_older_store_is_refused() {
    let bench = Bench::new();
    let local = bench.store("local");
    let [old, new, link] = ["old", "new", "link"].map(|name| bench.dir.join(name));
    bench.release(&local, "robot", "1.0.0");
    copy(local.root(), &old);
    bench.release(&local, "robot", "1.1.0");
    copy(local.root(), &new);
    let lead = |to: &Utf8Path| {
        drop(fs::remove_file(&link));
        std::os::unix::fs::symlink(to, &link).unwrap();
    };
    // The same place however it is typed, and below a link.
    let whole = format!("{link}/");
    for address in ["link", "./link", link.as_str(), &whole, "link/."] {
        let list = ["release", "list", "--store", address];
        lead(&new);
        assert!(bench.good(&list).contains("serial 2"), "{address}");
        lead(&old);
        let message = bench.refused(&list);
        for word in ["has an older index of the channel nightly", "its serial is 1", "has seen 2"] {
            assert!(message.contains(word), "{address}: no `{word}` in {message}");
        }
    }
    // A directory that was seen by its own name keeps what was seen there.
    assert!(bench.good(&["release", "list", "--store", "old"]).contains("serial 1"));
    bench.good(&["release", "list", "--store", "link", "--store-was-restored"]);
    assert!(bench.good(&["release", "list", "--store", "link"]).contains("serial 1"));
    assert!(bench.good(&["release", "list", "--store", "new"]).contains("serial 2"));
}

#[test]
fn two_publishers_with_memories_of_their_own_do_not_take_each_other_for_attackers() {
    let bench = Bench::new();
    for (name, product) in [("one", "first"), ("two", "second")] {
        bench.release(&bench.store(name), product, "1.0.0");
    }
    for round in 1..=3 {
        let version = format!("1.0.{round}");
        bench.release(&bench.store("one"), "first", &version);
        bench.release(&bench.store("two"), "second", &version);
        let mut pair = [
            bench.xtask(&["publish", "target", "--from", "one"]),
            elsewhere(&bench, &["publish", "target", "--from", "two"]),
        ];
        let children = pair.each_mut().map(|command| command.spawn().unwrap());
        for child in children {
            good(child.wait_with_output().unwrap());
        }
    }
    let first = bench.dir.join("first");
    copy(&bench.dir.join("target"), &first);
    bench.release(&bench.store("two"), "second", "2.0.0");
    good(elsewhere(&bench, &["publish", "target", "--from", "two"]).output().unwrap());
    // The one that has not seen the other's last change sees no difference; the other does.
    copy(&first, &bench.dir.join("target"));
    let list = ["release", "list", "--store", "target"];
    let printed = bench.good(&list);
    assert!(printed.contains("nightly (serial 6)"), "{printed}");
    let output = elsewhere(&bench, &list).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("its serial is 6, but this machine has seen 7"), "{message}");
}

#[test]
fn a_damaged_memory_is_an_error_with_a_way_out_and_two_histories_are_noticed() {
    let bench = Bench::new();
    let local = bench.store("local");
    bench.release(&local, "robot", "1.0.0");
    bench.good(&["publish", "target", "--from", "local"]);
    let list = ["release", "list", "--store", "target"];
    let target = bench.dir.join("target").canonicalize_utf8().unwrap();
    let remembered = tree(&bench.dir.join("state/stores"));
    let of_target = remembered
        .iter()
        .find(|(_, text)| String::from_utf8_lossy(text).contains(&format!("\"{target}\"")));
    let (path, text) = of_target.unwrap();
    let other = String::from_utf8_lossy(text).replace(target.as_str(), "/elsewhere");
    for damage in
        ["", "{", "{\"format\": 1}", "{\"format\": 9, \"store\": \"\", \"channels\": {}}", &other]
    {
        fs::write(path, damage).unwrap();
        for words in [&list[..], &["release", "gc", "--store", "target"]] {
            let message = bench.refused(words);
            assert!(message.contains(path.file_name().unwrap()), "{damage}: {message}");
            assert!(message.contains("--store-was-restored"), "{damage}: {message}");
        }
    }
    bench.good(&[&list[..], &["--store-was-restored"]].concat());
    assert_eq!(&fs::read(path).unwrap(), text, "what it had before it was damaged");
    // Another holder of our key has created another index with the same serial.
    let store = bench.store("target");
    let mut index = read(&bench, &store);
    index.releases.clear();
    plant(&bench, &store, &index);
    let message = bench.refused(&list);
    assert!(
        message.contains("another index of the channel nightly with the serial 1"),
        "{message}"
    );
}

#[test]
fn a_development_key_changes_nothing_that_release_robots_are_offered() {
    let bench = Bench::new();
    bench.release(&bench.store("local"), "robot-dev", "1.0.0");
    let target = bench.store("target");
    bench.good(&["publish", "target", "--from", "local"]);
    fs::write(bench.dir.join("configs/robot.toml"), "kind = \"release\"\n").unwrap();
    let listed = read(&bench, &target);
    age(target.root());
    let mut liar = listed.releases[0].clone();
    liar.product = "robot".to_owned();
    liar.manifest.path = liar.manifest.path.replace("robot-dev", "robot");
    let index = |channel, releases: &[ChannelEntry]| ChannelIndex {
        channel,
        serial: 9,
        releases: releases.to_vec(),
        ..ChannelIndex::empty(channel)
    };
    let refused = |index: &ChannelIndex, expected: &str| {
        plant(&bench, &target, index);
        let before = tree(target.root());
        for words in [
            &["release", "list", "--store", "target"][..],
            &["release", "gc", "--store", "target"],
            &["release", "gc", "--store", "target", "--store-was-restored"],
            &[
                "release",
                "show",
                "1.0.0",
                "--product",
                "robot",
                "--store",
                "target",
                "--channel",
                "stable",
            ],
        ] {
            // In a channel that is signed by development keys, release products are not looked up
            // at all.
            if words.contains(&"show") && index.channel != Channel::Stable {
                continue;
            }
            let message = bench.refused(words);
            assert!(message.contains(expected), "{words:?}: {message}");
        }
        assert_eq!(tree(target.root()), before);
        fs::remove_file(target.root().join(index.channel.path())).unwrap();
    };
    // Nothing, and what calls itself something else: the key that must sign is not the index's to choose.
    refused(&index(Channel::Stable, &[]), "the channel stable must be signed by a release key");
    refused(
        &index(Channel::Stable, &listed.releases),
        "the channel stable must be signed by a release key",
    );
    refused(
        &index(Channel::Stable, &[liar.clone()]),
        "the channel stable must be signed by a release key",
    );
    plant(&bench, &target, &index(Channel::Nightly, &listed.releases));
    let nightly = fs::read(target.root().join("channels/nightly.json")).unwrap();
    refused(&index(Channel::Beta, &[liar.clone()]), "configs/robot.toml has release");
    liar.kind = BuildKind::Release;
    refused(&index(Channel::Beta, &[liar]), "the channel beta is signed by development keys");
    // Not even that there is none.
    fs::write(target.root().join("channels/nightly.json"), nightly).unwrap();
    let words = ["release", "show", "latest", "--product", "robot", "--store", "target"];
    let message = bench.refused(&words);
    assert!(message.contains("the channel nightly is signed by development keys"), "{message}");
    // A channel that the workspace pins: what was good yesterday needs the other key today.
    fs::write(bench.dir.join("releases.toml"), "[channels]\nnightly = \"release\"\n").unwrap();
    let message = bench.refused(&["release", "list", "--store", "target"]);
    assert!(message.contains("the channel nightly must be signed by a release key"), "{message}");
    fs::write(bench.dir.join("releases.toml"), "[channels]\nstable = \"development\"\n").unwrap();
    let message = bench.refused(&["release", "list", "--store", "target"]);
    assert!(message.contains("`stable` is for all robots"), "{message}");
}

#[test]
fn a_manifest_is_what_its_channel_says_of_it() {
    let bench = Bench::new();
    let store = bench.store("local");
    bench.release(&store, "robot", "1.0.0");
    let mut index = read(&bench, &store);
    index.serial += 1;
    index.releases[0].version = Version::parse("1.0.1").unwrap();
    plant(&bench, &store, &index);
    let words = ["release", "show", "1.0.1", "--product", "robot", "--store", "local"];
    let message = bench.refused(&words);
    assert!(
        message.contains(
            "the manifest is of robot 1.0.0 (development), but the channel lists it as robot 1.0.1"
        ),
        "{message}"
    );
    age(store.root());
    let before = tree(store.root());
    bench.refused(&["release", "gc", "--store", "local"]);
    assert_eq!(tree(store.root()), before);
}
