//! `data` on a real file system: backups that are restored unchanged, hostile archives, what a reset keeps,
//! migration steps forward and back. Power cuts are in `datacuts.rs`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bundle::Version;
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
use slotd::RootDir;
use slotd::data::archive::{self, ArchiveLimits};
use slotd::data::{
    ChangeOutcome, MigrationOutcome, PendingChange, apply, backup, migrate, reset, restore,
};
use slotd::files::DirectFileChanges;

/// Everything below a directory: kind, mode, content.
fn tree(folder: &Path) -> BTreeMap<PathBuf, String> {
    let (mut found, mut waiting) = (BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(path) = waiting.pop() {
        let about = fs::symlink_metadata(&path).unwrap();
        let mode = about.permissions().mode() & 0o7777;
        let text = if about.is_symlink() {
            format!("-> {}", fs::read_link(&path).unwrap().display())
        } else if about.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            format!("{mode:o} directory")
        } else {
            format!("{mode:o} {}", String::from_utf8_lossy(&fs::read(&path).unwrap()))
        };
        found.insert(path.strip_prefix(folder).unwrap().to_owned(), text);
    }
    found
}

fn put(root: &RootDir, path: &str, text: &str) {
    let path = root.data().join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn robot() -> (tempfile::TempDir, RootDir) {
    let dir = tempfile::tempdir().unwrap();
    let root = RootDir::new(dir.path());
    for (path, text) in [
        ("identity/hostname", "one"),
        ("apps/api/settings.json", "{}"),
        ("home/robot/protocol.py", "run()"),
        ("slotd/floor.json", "floor"),
        ("var/log/journal/x", "log"),
    ] {
        put(&root, path, text);
    }
    let data = root.data();
    fs::set_permissions(data.join("home/robot"), Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(data.join("apps/api/settings.json"), Permissions::from_mode(0o640))
        .unwrap();
    symlink("../apps/api", data.join("home/api")).unwrap();
    symlink("/etc/passwd", data.join("home/outside")).unwrap();
    (dir, root)
}

#[test]
fn a_backup_comes_back_the_same_on_another_robot() {
    let (_one, from) = robot();
    let mut bytes = Vec::new();
    backup(&from, &mut bytes).unwrap();
    let (_two, to) = robot();
    put(&to, "home/robot/other.py", "to be replaced");
    put(&to, "slotd/floor.json", "its own floor");
    restore(&to, bytes.as_slice()).unwrap();
    assert!(to.data().join("home/robot/other.py").exists(), "changed before the restart");
    assert_eq!(apply(&to).unwrap().carried_out, Some(PendingChange::Restore));
    for name in ["identity", "apps", "home"] {
        assert_eq!(tree(&from.data().join(name)), tree(&to.data().join(name)), "{name}");
    }
    assert_eq!(fs::read(to.data().join("slotd/floor.json")).unwrap(), b"its own floor");
    assert_eq!(apply(&to).unwrap(), ChangeOutcome::default());
    // Standard tools read it.
    let file = to.data().join("backup.tar.zst");
    fs::write(&file, &bytes).unwrap();
    let printed = Command::new("tar").args(["--zstd", "-tf"]).arg(&file).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.contains("home/robot/protocol.py") && !printed.contains("slotd"), "{printed}");
}

#[test]
fn a_reset_keeps_what_the_agent_knows_and_a_backup() {
    let (_dir, root) = robot();
    let kept = reset(&root, true).unwrap().unwrap();
    assert_eq!(PendingChange::read(&root).unwrap(), Some(PendingChange::Reset));
    apply(&root).unwrap();
    let mut left: Vec<_> =
        fs::read_dir(root.data()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["slotd"]);
    assert_eq!(fs::read(root.data().join("slotd/floor.json")).unwrap(), b"floor");
    restore(&root, File::open(kept).unwrap()).unwrap();
    apply(&root).unwrap();
    assert_eq!(fs::read(root.data().join("home/robot/protocol.py")).unwrap(), b"run()");
}

fn room(bytes: u64) -> ArchiveLimits {
    ArchiveLimits { bytes, ..ArchiveLimits::BACKUP }
}

/// An archive with one entry that a careful tool would not write.
fn hostile(name: &[u8], kind: tar::EntryType, link: &str, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o4777);
    header.set_uid(0);
    header.set_gid(0);
    if !link.is_empty() {
        header.set_link_name(link).unwrap();
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend([b'x'; 512]);
    bytes.extend([0; 1024]);
    zstd::encode_all(bytes.as_slice(), 1).unwrap()
}

#[test]
fn nothing_of_a_hostile_archive_is_taken() {
    use tar::EntryType as Kind;
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("absolute", hostile(b"/etc/shadow", Kind::Regular, "", 1), "bad-archive"),
        ("upwards", hostile(b"home/../../x", Kind::Regular, "", 1), "bad-archive"),
        ("the floor", hostile(b"slotd/floor.json", Kind::Regular, "", 1), "bad-archive"),
        ("the floor, dotted", hostile(b"./slotd/floor.json", Kind::Regular, "", 1), "bad-archive"),
        ("logs", hostile(b"var/log/x", Kind::Regular, "", 1), "bad-archive"),
        ("hidden", hostile(b".incoming/x", Kind::Regular, "", 1), "bad-archive"),
        ("nothing", hostile(b".", Kind::Directory, "", 0), "bad-archive"),
        ("hard link", hostile(b"home/x", Kind::Link, "/etc/shadow", 0), "bad-archive"),
        ("device", hostile(b"home/x", Kind::Block, "", 0), "bad-archive"),
        ("pipe", hostile(b"home/x", Kind::Fifo, "", 0), "bad-archive"),
        ("too large", hostile(b"home/x", Kind::Regular, "", 1 << 33), "no-space"),
        ("ends early", hostile(b"home/x", Kind::Regular, "", 4000), "bad-archive"),
        ("no archive", b"nonsense".to_vec(), "bad-archive"),
        ("empty", Vec::new(), "bad-archive"),
    ];
    for (name, bytes, code) in cases {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("data/.incoming");
        fs::create_dir_all(&into).unwrap();
        let refused = archive::unpack(&DirectFileChanges, bytes.as_slice(), &into, room(1 << 30));
        // An empty stream must not be accepted as an empty archive.
        let refused = refused.expect_err(name);
        assert_eq!(refused.code, code, "{name}: {refused}");
        let outside: Vec<_> =
            tree(dir.path()).into_keys().filter(|p| !p.starts_with("data/.incoming")).collect();
        assert_eq!(outside, [PathBuf::new(), "data".into()], "{name}");
    }
    // A link, then a file through it.
    let mut tar = tar::Builder::new(Vec::new());
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(Kind::Symlink);
    link.set_size(0);
    link.set_uid(0);
    link.set_gid(0);
    tar.append_link(&mut link, "home/link", "/tmp").unwrap();
    let mut file = tar::Header::new_gnu();
    file.set_size(1);
    file.set_mode(0o644);
    file.set_uid(0);
    file.set_gid(0);
    tar.append_data(&mut file, "home/link/through", &b"x"[..]).unwrap();
    let bytes = zstd::encode_all(tar.into_inner().unwrap().as_slice(), 1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    archive::unpack(&DirectFileChanges, bytes.as_slice(), dir.path(), room(1 << 20)).unwrap_err();
    assert!(!Path::new("/tmp/through").exists());
}

#[test]
fn a_refused_restore_changes_nothing() {
    let (_dir, root) = robot();
    let before = tree(&root.data());
    restore(&root, b"nonsense".as_slice()).unwrap_err();
    assert_eq!(tree(&root.data()), before);
    assert_eq!(apply(&root).unwrap(), ChangeOutcome::default());
    assert_eq!(tree(&root.data()), before);
}

fn version(text: &str) -> Version {
    Version::parse(text).unwrap()
}

fn step(root: &RootDir, name: &str, version: &str, paths: &str, script: &str) {
    let folder = root.path("etc/slotd/migrations.d");
    fs::create_dir_all(&folder).unwrap();
    let text = format!(
        "version = \"{version}\"\npaths = [{paths}]\nrun = [\"sh\", \"-c\", '''{script}''']\n"
    );
    fs::write(folder.join(format!("{name}.toml")), text).unwrap();
}

fn read(root: &RootDir, path: &str) -> Option<String> {
    fs::read_to_string(root.data().join(path)).ok()
}

#[test]
fn steps_go_forth_with_a_new_version_and_back_with_an_old_one() {
    let (_dir, root) = robot();
    assert_eq!(migrate(&root, &version("1.0.0")).unwrap(), MigrationOutcome::New);
    assert_eq!(migrate(&root, &version("1.0.0")).unwrap(), MigrationOutcome::Unchanged);
    step(
        &root,
        "settings",
        "1.1.0",
        "\"apps/api\"",
        "echo two >apps/api/settings.json; echo x >apps/api/made",
    );
    step(
        &root,
        "names",
        "1.2.0",
        "\"system/names\"",
        "mkdir -p system/names; echo n >system/names/one",
    );
    step(&root, "later", "2.0.0", "\"apps\"", "exit 1");
    let forth = migrate(&root, &version("1.2.0")).unwrap();
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        forth,
        MigrationOutcome::Forth { from: version("1.0.0"), steps: names(&["settings", "names"]) }
    );
    assert_eq!(read(&root, "apps/api/settings.json").as_deref(), Some("two\n"));
    assert_eq!(migrate(&root, &version("1.2.0")).unwrap(), MigrationOutcome::Unchanged);
    // After a failed trial the old version starts again. Files that no step names stay unchanged.
    put(&root, "home/robot/protocol.py", "written since");
    let back = migrate(&root, &version("1.0.0")).unwrap();
    assert_eq!(
        back,
        MigrationOutcome::Back { from: version("1.2.0"), steps: names(&["names", "settings"]) }
    );
    assert_eq!(read(&root, "apps/api/settings.json").as_deref(), Some("{}"));
    assert_eq!(read(&root, "apps/api/made"), None);
    assert!(!root.data().join("system/names").exists());
    assert_eq!(read(&root, "home/robot/protocol.py").as_deref(), Some("written since"));
    let mode =
        fs::metadata(root.data().join("apps/api/settings.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    // And forward again.
    assert_eq!(migrate(&root, &version("1.2.0")).unwrap(), forth);
}

#[test]
fn half_of_a_way_back_is_not_gone() {
    let (_dir, root) = robot();
    migrate(&root, &version("1.0.0")).unwrap();
    step(&root, "settings", "1.1.0", "\"apps/api\"", "echo two >apps/api/settings.json");
    step(&root, "names", "1.2.0", "\"system/names\"", "mkdir -p system/names");
    migrate(&root, &version("1.2.0")).unwrap();
    fs::remove_file(root.state().join("snapshots/settings.tar.zst")).unwrap();
    let before = tree(&root.data());
    let refused = migrate(&root, &version("1.0.0")).unwrap_err();
    assert_eq!(refused.code, "newer-data");
    assert!(
        refused.message.contains("the snapshot for going back over settings is lost"),
        "{refused}"
    );
    assert_eq!(tree(&root.data()), before);
}

#[test]
fn a_step_that_fails_leaves_what_was_there() {
    let (_dir, root) = robot();
    migrate(&root, &version("1.0.0")).unwrap();
    let before = tree(&root.data().join("apps"));
    step(&root, "bad", "1.1.0", "\"apps\"", "rm -r apps/api; echo broken; exit 3");
    for _ in 0..2 {
        let refused = migrate(&root, &version("1.1.0")).unwrap_err();
        assert_eq!(refused.code, "migration-failed");
        assert!(refused.message.contains("exit status: 3: broken"), "{refused}");
        assert_eq!(tree(&root.data().join("apps")), before);
    }
    // After the rollback, the old version finds everything in order.
    assert_eq!(migrate(&root, &version("1.0.0")).unwrap(), MigrationOutcome::Unchanged);
}

#[test]
fn a_step_that_was_cut_is_undone_before_it_is_taken_again() {
    let (_dir, root) = robot();
    migrate(&root, &version("1.0.0")).unwrap();
    // Interrupts the agent in the middle: the record is left as after a power cut.
    step(
        &root,
        "half",
        "1.1.0",
        "\"apps\"",
        "echo half >>apps/api/settings.json; cp -r . ../cut; exit 0",
    );
    migrate(&root, &version("1.1.0")).unwrap();
    let cut = RootDir::new(root.data().parent().unwrap().join("robot"));
    fs::create_dir_all(cut.path("etc/slotd")).unwrap();
    fs::rename(root.data().parent().unwrap().join("cut"), cut.data()).unwrap();
    assert_eq!(read(&cut, "apps/api/settings.json").as_deref(), Some("{}half\n"));
    step(&cut, "half", "1.1.0", "\"apps\"", "echo half >>apps/api/settings.json");
    migrate(&cut, &version("1.1.0")).unwrap();
    assert_eq!(read(&cut, "apps/api/settings.json").as_deref(), Some("{}half\n"), "taken twice");
    // Or the old version starts first.
    assert!(matches!(migrate(&cut, &version("1.0.0")).unwrap(), MigrationOutcome::Back { .. }));
    assert_eq!(read(&cut, "apps/api/settings.json").as_deref(), Some("{}"));
}

#[test]
fn a_backup_of_a_newer_robot_is_told_from_a_rollback() {
    let (_one, from) = robot();
    migrate(&from, &version("1.0.0")).unwrap();
    step(&from, "settings", "1.1.0", "\"apps\"", "true");
    migrate(&from, &version("1.1.0")).unwrap();
    let mut bytes = Vec::new();
    backup(&from, &mut bytes).unwrap();
    let (_two, to) = robot();
    restore(&to, bytes.as_slice()).unwrap();
    apply(&to).unwrap();
    assert_eq!(migrate(&to, &version("1.0.0")).unwrap_err().code, "newer-data");
    assert_eq!(migrate(&to, &version("1.1.0")).unwrap(), MigrationOutcome::Unchanged);
}

/// Snapshots as an agent before 0.2 wrote them: readable by all users, and the record without the field `needs`.
#[test]
fn the_way_back_of_an_older_agent_is_gone() {
    let (_dir, root) = robot();
    let before = tree(&root.data().join("apps"));
    fs::create_dir_all(root.state().join("snapshots")).unwrap();
    // As its `pack` did: without parent directories, without a checksum.
    let mut old = tar::Builder::new(zstd::Encoder::new(Vec::new(), 3).unwrap());
    old.follow_symlinks(false);
    for name in ["apps/api", "apps/api/settings.json"] {
        old.append_path_with_name(root.data().join(name), name).unwrap();
    }
    let way = root.state().join("snapshots/settings.tar.zst");
    fs::write(&way, old.into_inner().unwrap().finish().unwrap()).unwrap();
    put(&root, "apps/api/settings.json", "{\"form\": 2}");
    let record = r#"{"version": "1.1.0", "taken": [{"name": "settings", "version": "1.1.0",
        "paths": ["apps/api"]}], "under-way": null}"#;
    put(&root, "data-version.json", record);
    assert_eq!(migrate(&root, &version("1.1.0")).unwrap(), MigrationOutcome::Unchanged);
    let mode = fs::metadata(way.parent().unwrap()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let back = migrate(&root, &version("1.0.0")).unwrap();
    assert!(matches!(back, MigrationOutcome::Back { steps, .. } if steps == ["settings"]));
    assert_eq!(tree(&root.data().join("apps")), before);
    assert!(!way.exists());
    // And an older agent reads what this one writes: its format had these three fields.
    step(&root, "settings", "1.1.0", "\"apps/api\"", "true");
    migrate(&root, &version("1.1.0")).unwrap();
    let written: serde_json::Value =
        serde_json::from_str(&read(&root, "data-version.json").unwrap()).unwrap();
    assert_eq!(written["version"], "1.1.0");
    assert_eq!(written["taken"][0]["name"], "settings");
    assert_eq!(written["taken"][0]["paths"][0], "apps/api");
    assert!(written["under-way"].is_null());
}

/// Steps in a backup's record are ignored: the agent's own files are not touched, and nothing is rolled back.
#[test]
fn the_record_of_a_backup_steers_nothing() {
    let planted = |name: &str, path: &str| {
        let step = format!(r#"{{"name": "{name}", "version": "9.9.9", "paths": ["{path}"]}}"#);
        [
            format!(r#"{{"version": "1.0.0", "taken": [], "under-way": {step}}}"#),
            format!(r#"{{"version": "1.0.0", "taken": [{step}], "under-way": null}}"#),
        ]
    };
    let (_own, own) = robot();
    put(&own, "slotd/keyset.json", "keys");
    for record in [
        planted("../../home/robot/way", "a/../../data/slotd/floor.json"),
        planted("../../home/robot/way", "slotd/keyset.json"),
        planted("way", "/etc/passwd"),
        planted("way", "home/robot"),
    ]
    .concat()
    {
        let (_one, from) = robot();
        let mut way = Vec::new();
        archive::pack(&from.data(), &["identity".into()], &mut way, ArchiveLimits::BACKUP).unwrap();
        fs::write(from.data().join("home/robot/way.tar.zst"), way).unwrap();
        put(&from, "data-version.json", &record);
        let mut bytes = Vec::new();
        backup(&from, &mut bytes).unwrap();
        // The record of a backup, and the same on a robot: an older agent has restored it.
        for restored in [true, false] {
            let (_two, to) = robot();
            put(&to, "slotd/keyset.json", "keys");
            if restored {
                restore(&to, bytes.as_slice()).unwrap();
                apply(&to).unwrap();
                let left = read(&to, "data-version.json").unwrap();
                assert!(!left.contains("paths"), "{left}");
            } else {
                put(&to, "data-version.json", &record);
            }
            let expected = tree(&to.data().join("home"));
            // Its requirements may refuse a start, and have no other effect.
            drop(migrate(&to, &version("1.0.0")));
            assert_eq!(tree(&to.data().join("slotd")), tree(&own.data().join("slotd")), "{record}");
            if restored {
                assert_eq!(tree(&to.data().join("home")), expected, "{record}");
            }
        }
    }
}

#[test]
fn a_record_that_makes_no_sense_is_one_of_this_version() {
    for (text, expected) in [
        ("", MigrationOutcome::Damaged),
        ("{", MigrationOutcome::Damaged),
        ("[1]", MigrationOutcome::Damaged),
        (r#"{"version": "1.0.0", "taken": "of a later form"}"#, MigrationOutcome::Unchanged),
    ] {
        let (_dir, root) = robot();
        put(&root, "data-version.json", text);
        assert_eq!(migrate(&root, &version("1.0.0")).unwrap(), expected, "{text}");
        assert_eq!(
            migrate(&root, &version("1.0.0")).unwrap(),
            MigrationOutcome::Unchanged,
            "{text}"
        );
    }
}

#[test]
fn a_step_whose_way_back_would_not_be_taken_is_not_taken() {
    let (_dir, root) = robot();
    migrate(&root, &version("1.0.0")).unwrap();
    step(&root, "large", "1.1.0", "\"home\"", "echo taken >home/taken");
    // 4 GiB and one byte, without a block of it on the disk.
    let large = File::create(root.data().join("home/large")).unwrap();
    large.set_len((1 << 32) + 1).unwrap();
    let refused = migrate(&root, &version("1.1.0")).unwrap_err();
    assert_eq!(refused.code, "no-archive", "{refused}");
    assert!(!root.data().join("home/taken").exists());
    assert_eq!(fs::read_dir(root.state().join("snapshots")).unwrap().count(), 0);
    large.set_len(1 << 20).unwrap();
    migrate(&root, &version("1.1.0")).unwrap();
    assert!(root.data().join("home/taken").exists());
    migrate(&root, &version("1.0.0")).unwrap();
    assert!(!root.data().join("home/taken").exists());
}

/// For every file name of the agent it is decided whether a reset keeps or removes the file.
#[test]
fn a_reset_knows_every_file_of_the_agent() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut waiting, mut names) = (vec![sources], BTreeSet::new());
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let text = fs::read_to_string(&path).unwrap().replace("format!(", "");
        for (at, found) in text.match_indices("state().join(\"") {
            let rest = &text[at + found.len()..];
            names.insert(rest[..rest.find('"').unwrap()].replace("{slot}", "a"));
        }
    }
    let goes = ["backup", "provisioned.json", "reserve", "snapshots"];
    assert!(names.len() > 8 && names.contains("floor.json"), "{names:?}");
    let (_dir, root) = robot();
    for name in &names {
        let path = root.state().join(name);
        fs::write(path, "mine").unwrap();
    }
    fs::remove_file(root.state().join("pending.json")).unwrap();
    fs::remove_file(root.state().join("backup")).unwrap();
    reset(&root, false).unwrap();
    apply(&root).unwrap();
    for name in &names {
        let path = root.state().join(name);
        let kept = !goes.contains(&name.as_str()) && name != "pending.json";
        assert_eq!(
            path.exists(),
            kept,
            "{name}: does a reset keep it? say so in `KEPT`, and in docs/reference/robot.md"
        );
    }
}

/// Every file that may contain a secret is readable only by root, from its first byte on.
#[test]
fn copies_of_secrets_are_for_root_only() {
    let (_dir, root) = robot();
    let mode =
        |path: &str| fs::metadata(root.data().join(path)).unwrap().permissions().mode() & 0o777;
    reset(&root, true).unwrap();
    assert_eq!(mode("slotd/backup"), 0o700);
    assert_eq!(mode("slotd/backup/before-reset.tar.zst"), 0o600);
    let mut bytes = Vec::new();
    backup(&root, &mut bytes).unwrap();
    restore(&root, bytes.as_slice()).unwrap();
    assert_eq!(mode(".incoming"), 0o700);
    apply(&root).unwrap();
    migrate(&root, &version("1.0.0")).unwrap();
    step(&root, "any", "1.1.0", "\"identity\"", "true");
    migrate(&root, &version("1.1.0")).unwrap();
    assert_eq!(mode("slotd/snapshots"), 0o700);
    assert_eq!(mode("slotd/snapshots/any.tar.zst"), 0o600);
}

#[test]
fn a_step_outside_of_data_is_refused() {
    let (_dir, root) = robot();
    migrate(&root, &version("1.0.0")).unwrap();
    for paths in ["\"/etc\"", "\"../x\"", "\"slotd\"", ""] {
        step(&root, "bad", "1.1.0", paths, "true");
        assert_eq!(migrate(&root, &version("1.1.0")).unwrap_err().code, "bad-migration", "{paths}");
    }
}

/// Whatever kind of file has the name of one of the agent's: a start continues, and a reset is carried out.
#[test]
fn a_start_and_a_reset_go_on_whatever_has_a_name_of_ours() {
    let names = [
        "slotd",
        "slotd/pending.json",
        "slotd/backup",
        "slotd/snapshots",
        "data-version.json",
        ".incoming",
        ".incoming.new",
        ".outgoing",
        ".snapshot",
        ".undone",
        "lost+found",
    ];
    for name in names {
        for what in ["file", "too long", "folder", "link", "link to itself", "pipe"] {
            let (_dir, root) = robot();
            let path = root.data().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if path.is_dir() {
                fs::remove_dir_all(&path).unwrap();
            } else {
                drop(fs::remove_file(&path));
            }
            match what {
                "file" => fs::write(&path, "junk").unwrap(),
                "too long" => fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap(),
                "folder" => fs::create_dir_all(path.join("sub")).unwrap(),
                "link" => symlink("/nowhere/at/all", &path).unwrap(),
                "link to itself" => symlink(&path, &path).unwrap(),
                _ => assert!(Command::new("mkfifo").arg(&path).status().unwrap().success()),
            }
            let place = format!("{name}, {what}");
            // As a start begins.
            slotd::lock::private_dir(&root.state()).unwrap();
            apply(&root).unwrap_or_else(|refusal| panic!("{place}: {refusal:?}"));
            migrate(&root, &version("1.0.0")).unwrap_or_else(|e| panic!("{place}: {e:?}"));
            reset(&root, true).unwrap_or_else(|refusal| panic!("{place}: {refusal:?}"));
            let applied = apply(&root).unwrap_or_else(|refusal| panic!("{place}: {refusal:?}"));
            assert_eq!(applied.carried_out, Some(PendingChange::Reset), "{place}");
        }
    }
}

/// A user's huge sparse file does not block the agent for hours: a backup names it and refuses immediately.
#[test]
fn what_is_longer_than_data_itself_is_not_packed() {
    let (_dir, root) = robot();
    let path = root.data().join("home/holes");
    File::create(&path).unwrap().set_len(8 << 40).unwrap();
    for refusal in [backup(&root, io::sink()).unwrap_err(), reset(&root, true).unwrap_err()] {
        assert_eq!(refusal.code, "no-archive", "{refusal:?}");
        assert!(refusal.message.contains("home/holes"), "{refusal:?}");
    }
    reset(&root, false).unwrap();
}

/// Nested directories, deeper than the longest path and than a process may hold directories open.
#[test]
fn a_reset_takes_folders_of_any_depth() {
    let (_dir, root) = robot();
    let home = root.data().join("home/robot");
    fs::create_dir_all(&home).unwrap();
    let (new, open) = (Mode::RWXU, OFlags::DIRECTORY | OFlags::RDONLY);
    let mut folder = openat(CWD, &home, open, Mode::empty()).unwrap();
    for depth in 0..3000 {
        let name = if depth % 100 == 0 { "x".repeat(255) } else { "folder".to_owned() };
        mkdirat(&folder, &*name, new).unwrap();
        folder = openat(&folder, &*name, open, Mode::empty()).unwrap();
        drop(openat(&folder, "file", OFlags::CREATE | OFlags::WRONLY, new).unwrap());
    }
    drop(folder);
    reset(&root, false).unwrap();
    let applied = apply(&root).unwrap();
    assert_eq!((applied.carried_out, applied.not_overwritten), (Some(PendingChange::Reset), 0));
    assert!(!home.exists() && !root.data().join(".outgoing").exists());
}
