//! Malicious images, given to `inspect` in 1 GiB of address space: sizes without content, circular
//! directories, blocks that belong to many files, and names with control characters for the terminal.

use crate::common::{find, folder};

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use bundle::bootstate::{BootState, Slot};
use camino::{Utf8Path, Utf8PathBuf};

const MIB: u64 = 1 << 20;

fn run(mut command: Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {printed}");
    printed
}

struct Folder {
    dir: Utf8PathBuf,
    _keep: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        let (_keep, dir) = folder();
        Self { dir, _keep }
    }

    fn write(&self, path: &str, content: &[u8]) {
        let path = self.dir.join("root").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// A slot image of what was written, changed by these requests of debugfs(8).
    fn slot(&self, name: &str, requests: &[&str]) -> Utf8PathBuf {
        let path = self.dir.join(name);
        let mut make = Command::new(find("mke2fs"));
        // Without checksums, which an attacker would correct anyway.
        make.args(["-q", "-F", "-t", "ext4", "-O", "^metadata_csum", "-d"]);
        make.args([self.dir.join("root").as_str(), path.as_str(), "64M"]);
        run(make);
        for request in requests {
            let mut debugfs = Command::new(find("debugfs"));
            debugfs.args(["-w", "-R", request, path.as_str()]);
            let printed = run(debugfs);
            assert_eq!(printed.lines().count(), 1, "{request}: {printed}");
        }
        path
    }

    fn inspect(&self, words: &[&str]) -> (Option<i32>, String) {
        let mut command = Command::new(find("prlimit"));
        command.args(["--as=1073741824", env!("CARGO_BIN_EXE_xtask"), "inspect"]).args(words);
        command.env("SLIPWAY_KEYS", self.dir.join("keys"));
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }

    fn refused(&self, path: &Utf8Path, expected: &str) {
        let (code, printed) = self.inspect(&[path.as_str()]);
        assert_eq!(code, Some(1), "{expected}: {printed}");
        assert!(
            printed.contains(expected) && printed.contains(path.as_str()),
            "{expected}: {printed}"
        );
    }
}

fn system() -> Folder {
    let folder = Folder::new();
    folder.write("etc/os-release", b"PRETTY_NAME=\"A robot\"\n");
    folder.write("usr/lib/a", &[7; 5000]);
    folder.write("usr/lib/b/c", b"c");
    folder
}

#[test]
fn sizes_that_are_claimed_are_not_allocated() {
    let folder = system();
    let good = folder.slot("good", &[]);
    let (code, printed) = folder.inspect(&[good.as_str()]);
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains("A robot, 3 files"), "{printed}");
    let cases = [
        (
            "sif /etc/os-release size 1099511627776",
            "/etc/os-release: the file has 1099511627776 bytes",
        ),
        ("sif /etc/os-release size 6442450944", "/etc/os-release: the file has 6442450944 bytes"),
        ("sif /usr/lib/a size 1099511627776", "/usr/lib/a claims 1099511627776 bytes"),
        ("sif /usr/lib/b size 1099511627776", "/usr/lib/b claims 1099511627776 bytes"),
        ("ssv blocks_count 4294967295", "counts 4294967295 blocks"),
        ("ssv blocks_per_group 8", "groups of 8 blocks"),
        ("ssv log_block_size 31", "blocks have 2^41 bytes"),
    ];
    for (at, (request, expected)) in cases.into_iter().enumerate() {
        let path = folder.slot(&format!("slot-{at}"), &[]);
        if let Some((field, value)) = request.strip_prefix("ssv ").and_then(|r| r.split_once(' ')) {
            // debugfs would not open the next one: s_blocks_count_lo, s_log_block_size, s_blocks_per_group.
            let offset = match field {
                "blocks_count" => 0x4,
                "log_block_size" => 0x18,
                _ => 0x20,
            };
            let number: u32 = value.parse().unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&number.to_le_bytes(), 1024 + offset).unwrap();
        } else {
            let mut debugfs = Command::new(find("debugfs"));
            debugfs.args(["-w", "-R", request, path.as_str()]);
            run(debugfs);
        }
        folder.refused(&path, expected);
    }
}

#[test]
fn folders_in_circles_and_blocks_of_many_files_have_an_end() {
    let folder = system();
    let circle = folder.slot("circle", &["link /usr /usr/lib/again"]);
    folder.refused(&circle, "bytes, expected at most 4096");
    // Each of these has all of the filesystem, as its superblock would allow for one.
    let requests: Vec<String> = (0..6).map(|n| format!("sif /many/{n} size 67108864")).collect();
    for n in 0..6 {
        folder.write(&format!("many/{n}"), b"x");
    }
    let many: Vec<&str> = requests.iter().map(String::as_str).collect();
    let overlapping = folder.slot("many", &many);
    folder.refused(&overlapping, "bytes together, but the filesystem has 67108864");
}

/// A card with one slot, by an MBR.
fn card(folder: &Folder, slot: &Utf8Path) -> Utf8PathBuf {
    let path = folder.dir.join("card.img");
    let file = File::create(&path).unwrap();
    file.set_len(66 * MIB).unwrap();
    file.write_all_at(&fs::read(slot).unwrap(), MIB).unwrap();
    let mut mbr = [0; 512];
    mbr[446 + 4] = 0x83;
    mbr[446 + 8..][..4].copy_from_slice(&2048_u32.to_le_bytes());
    mbr[446 + 12..][..4].copy_from_slice(&131_072_u32.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&mbr, 0).unwrap();
    path
}

#[test]
fn a_boot_state_beyond_all_offsets_is_refused() {
    let folder = system();
    let device = |sectors: &str| {
        let text = format!("[boot-state]\nsectors = [{sectors}]\n");
        folder.write("usr/lib/slipway/device.toml", text.as_bytes());
        card(&folder, &folder.slot("slot", &[]))
    };
    folder.refused(&device("9223372036854775807"), "a sector for the boot state beyond 64 bits");
    let many = vec!["8"; 100].join(", ");
    folder.refused(&device(&many), "names 100 sectors");
    folder.refused(&device("99999999"), "reading the boot state at 51199999488");
}

#[test]
fn a_boot_state_is_told_in_words() {
    let folder = system();
    folder.write("usr/lib/slipway/device.toml", b"[boot-state]\nsectors = [8, 16, 24, 32]\n");
    let image = card(&folder, &folder.slot("slot", &[]));
    let file = File::options().write(true).open(&image).unwrap();
    let state = |sequence, active, trial, tries| BootState { sequence, active, trial, tries };
    for (sector, state) in [
        (8, state(7, Slot::A, None, 0)),
        (16, state(8, Slot::A, Some(Slot::B), 1)),
        (24, state(9, Slot::B, Some(Slot::A), 0)),
    ] {
        file.write_all_at(&state.encode(), sector * 512).unwrap();
    }
    let (code, printed) = folder.inspect(&[image.as_str()]);
    assert_eq!(code, Some(0), "{printed}");
    for line in [
        "  boot state at 4096: slot a is committed, no trial; write 7\n",
        "  boot state at 8192: slot a is committed, trial of slot b, 1 start left; write 8\n",
        "  boot state at 12288: slot b is committed, trial of slot a used up; write 9\n",
        "  boot state at 16384: empty or invalid: slot a is started\n",
    ] {
        assert!(printed.contains(line), "{line}: {printed}");
    }
    // For programs it is what it was.
    let (_, json) = folder.inspect(&[image.as_str(), "--format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let first = serde_json::json!({
        "offset": 4096,
        "state": "BootState { sequence: 7, active: A, trial: None, tries: 0 }",
    });
    assert_eq!(json["boot-states"][0], first);
}

#[test]
fn nothing_of_an_image_drives_the_terminal() {
    let folder = Folder::new();
    let bad = "\u{1b}]0;owned\u{7}\u{9b}31m\u{202e}";
    folder.write("etc/os-release", format!("PRETTY_NAME=\"{bad}\"\n").as_bytes());
    folder.write(&format!("usr/lib/{bad}"), b"1");
    let metadata = format!("Name: {bad}\nVersion: {bad}\n");
    folder.write("usr/lib/python3/dist-packages/a-1.dist-info/METADATA", metadata.as_bytes());
    let status = format!("Package: {bad}\nStatus: install ok installed\nVersion: {bad}\n");
    folder.write("var/lib/dpkg/status", status.as_bytes());
    let old = folder.slot("old", &[]);
    folder.write(&format!("usr/lib/{bad}"), b"2");
    std::os::unix::fs::symlink(bad, folder.dir.join("root/usr/link")).unwrap();
    let new = folder.slot("new", &[]);
    let image = card(&folder, &old);
    let harmful = |c: char| (c.is_control() && c != '\n') || ('\u{202a}'..='\u{202e}').contains(&c);
    for words in [
        vec![old.as_str()],
        vec![image.as_str()],
        vec![old.as_str(), new.as_str(), "--diff"],
        vec![old.as_str(), "--format", "json"],
        vec![image.as_str(), "--format", "json"],
        vec![old.as_str(), new.as_str(), "--diff", "--format", "json"],
    ] {
        let (code, printed) = folder.inspect(&words);
        assert_eq!(code, Some(0), "{words:?}: {printed}");
        assert!(!printed.contains(harmful), "{words:?}: {printed:?}");
        let shown = if words.contains(&"json") {
            let value: serde_json::Value =
                serde_json::from_str(&printed).expect("it is still JSON");
            value.to_string().contains("\\u001b]0;owned")
        } else {
            printed.contains("\\u{1b}]0;owned\\u{7}\\u{9b}31m\\u{202e}")
        };
        assert!(shown, "{words:?}: {printed}");
    }
    // Nor what is only quoted in an error.
    folder.write("usr/lib/slipway/device.toml", format!("a = {bad}\n").as_bytes());
    let (code, printed) = folder.inspect(&[card(&folder, &folder.slot("slot", &[])).as_str()]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(!printed.contains(harmful), "{printed:?}");
}
