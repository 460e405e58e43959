//! What a reset leaves of its owner's data: secrets are written wherever `data` may have some, and then searched in
//! every byte of a real ext4 if this process may mount one, otherwise in every file.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use slotd::RootDir;
use slotd::data::{apply, backup, reset, restore};

/// A mounted image; unmounted at the end, whatever happens.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: &Path) -> Option<Self> {
        fs::File::create(image).unwrap().set_len(48 << 20).unwrap();
        // As the builder creates `data`: no inline data, because old inodes would stay in the journal.
        let made = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^inline_data"])
            .arg(image)
            .status();
        assert!(made.expect("this test needs mke2fs").success());
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(image).arg(at).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// The files with secrets. The one in `slotd/floor.json` stays: it shows that the search works.
const PLANTED: [&str; 19] = [
    "slotd/floor.json",
    "identity/ssh/ssh_host_ed25519_key",
    "network/wpa_supplicant-wlan0.conf",
    "home/robot/.config/token",
    "home/robot/.profile",
    "boot.d/10-mine",
    "apps/api/10.1.0/site/settings.json",
    "apps/api/.state.json",
    "system/made",
    "var/log/journal/x",
    ".hidden",
    ".system.new/x",
    ".incoming/home/x",
    ".snapshot/home/x",
    "lost+found/#12/x",
    "slotd/snapshots/one.tar.zst",
    "slotd/before-reset.tar.zst",
    "slotd/backup/before-reset.tar.zst",
    "slotd/backup/backup.partial",
];

fn secret(path: &str) -> String {
    format!("secret of {path} {}", path.len() * 7919)
}

/// The content of all files below a directory, concatenated.
fn everything(folder: &Path) -> Vec<u8> {
    let (mut bytes, mut waiting) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            bytes.extend(fs::read(path).unwrap());
        }
    }
    bytes
}

fn found(bytes: &[u8]) -> Vec<&'static str> {
    let starts = bytes.iter().enumerate().filter(|(_, byte)| **byte == b's').map(|(at, _)| at);
    let here: Vec<&[u8]> =
        starts.map(|at| &bytes[at..]).filter(|rest| rest.starts_with(b"secret of ")).collect();
    let is_there = |path: &&str| here.iter().any(|rest| rest.starts_with(secret(path).as_bytes()));
    PLANTED.into_iter().filter(is_there).collect()
}

#[test]
fn a_reset_leaves_no_secret_of_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let root = RootDir::new(dir.path());
    fs::create_dir(root.data()).unwrap();
    let image = dir.path().join("card.img");
    let mounted = Mounted::new(&image, &root.data());
    println!("{}", if mounted.is_some() { "every byte of an ext4" } else { "every file" });
    for path in PLANTED {
        let file = root.data().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        // In many blocks, and not only at their beginning.
        fs::write(&file, format!("{}\n", secret(path)).repeat(300)).unwrap();
    }
    let shared = root.data().join("apps/api/.wheels");
    fs::create_dir_all(&shared).unwrap();
    fs::hard_link(root.data().join(PLANTED[6]), shared.join("settings.json")).unwrap();
    rustix::fs::syncfs(fs::File::open(root.data()).unwrap()).unwrap();
    let look = |mounted: bool| {
        if mounted { fs::read(&image).unwrap() } else { everything(&root.data()) }
    };
    assert_eq!(found(&look(mounted.is_some())), PLANTED, "the search finds what is there");

    assert_eq!(reset(&root, false).unwrap(), None);
    let applied = apply(&root).unwrap();
    assert_eq!(applied.not_overwritten, 0);
    let raw = mounted.is_some();
    assert_eq!(found(&everything(&root.data())), [PLANTED[0]]);
    drop(mounted);
    assert_eq!(found(&look(raw)), [PLANTED[0]], "in the blocks of the file system");
}

/// With a backup, only the backup has the secrets, and it is complete.
#[test]
fn a_reset_keeps_its_own_backup_only() {
    let dir = tempfile::tempdir().unwrap();
    let root = RootDir::new(dir.path());
    for path in PLANTED {
        let file = root.data().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, secret(path)).unwrap();
    }
    let before = {
        let mut bytes = Vec::new();
        backup(&root, &mut bytes).unwrap();
        bytes
    };
    let kept = reset(&root, true).unwrap().unwrap();
    apply(&root).unwrap();
    assert_eq!(found(&everything(&root.data())), [PLANTED[0]]);
    assert_eq!(fs::read(&kept).unwrap(), before);
    restore(&root, fs::File::open(&kept).unwrap()).unwrap();
    apply(&root).unwrap();
    let home = fs::read_to_string(root.data().join("home/robot/.profile")).unwrap();
    assert_eq!(home, secret("home/robot/.profile"));
    // The next reset removes the backup too.
    reset(&root, false).unwrap();
    apply(&root).unwrap();
    assert!(!kept.exists());
}
