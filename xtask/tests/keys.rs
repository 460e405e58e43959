//! The key directory as people meet it: under any umask, with a damaged key set, with ids as other tools write them.

use crate::common::{folder, good};

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use bundle::KeySet;
use camino::Utf8Path;
use xtask::store::FileStore;
use xtask::store::directory::DirectoryStore;

const PASSWORD: &str = "a password of a test";

/// A program under a umask.
fn under(umask: &str, program: &str, args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", "umask \"$1\" && shift && exec \"$@\"", "sh", umask, program]);
    command.args(args).env("SLIPWAY_KEY_PASSWORD", PASSWORD);
    command.envs(environment.iter().copied()).output().expect("sh runs")
}

fn keys(dir: &Utf8Path, args: &[&str]) -> Output {
    let args = [&["keys"][..], args].concat();
    under("022", env!("CARGO_BIN_EXE_xtask"), &args, &[("SLIPWAY_KEYS", dir.as_str())])
}

fn refused(output: Output) -> String {
    assert!(!output.status.success(), "it went well");
    String::from_utf8(output.stderr).expect("UTF-8")
}

fn mode(path: &Utf8Path) -> u32 {
    fs::metadata(path).expect("it is there").permissions().mode() & 0o7777
}

#[test]
fn secrets_are_their_owners_and_the_rest_is_readable_under_any_umask() {
    for umask in ["0", "022", "077", "0777"] {
        let (_keep, dir) = folder();
        let dir = dir.join("keys");
        let environment = [("SLIPWAY_KEYS", dir.as_str())];
        let run = |args: &[&str]| {
            let args = [&["keys"][..], args].concat();
            good(under(umask, env!("CARGO_BIN_EXE_xtask"), &args, &environment))
        };
        // Made, changed, and made beside what is there.
        run(&["new"]);
        run(&["rotate"]);
        assert_eq!(mode(&dir), 0o700, "umask {umask}");
        let mut found = [0; 3];
        for entry in dir.read_dir_utf8().expect("the directory") {
            let path = entry.expect("an entry").into_path();
            let (at, expected) = match (path.extension(), path.file_name()) {
                (Some("key"), _) | (_, Some(".lock")) => (0, 0o600),
                (Some("pub"), _) => (1, 0o644),
                (_, Some("keyset.json")) => (2, 0o644),
                _ => panic!("{path} is nothing that we know"),
            };
            assert_eq!(mode(&path), expected, "{path}, umask {umask}");
            found[at] += 1;
        }
        assert_eq!(found, [3, 2, 1], "umask {umask}");
    }
}

/// Names the directory of the store that a copy of this program makes.
const STORE: &str = "TEST_KEYS_STORE";

#[test]
fn a_store_is_readable_under_any_umask() {
    for umask in ["0", "022", "077", "0777"] {
        let (_keep, dir) = folder();
        let store = dir.join("store");
        let own = std::env::current_exe().expect("this program");
        let own = own.to_str().expect("UTF-8");
        fs::write(dir.join("object"), "").expect("written");
        let args = ["--exact", "--nocapture", "keys::in_a_copy_that_stores"];
        let printed = good(under(umask, own, &args, &[(STORE, store.as_str())]));
        assert!(printed.contains("1 passed"), "{printed}");
        let mut checked = 0;
        let mut folders = vec![store];
        while let Some(folder) = folders.pop() {
            assert_eq!(mode(&folder) & 0o555, 0o555, "{folder}, umask {umask}");
            for entry in folder.read_dir_utf8().expect("a directory") {
                let path = entry.expect("an entry").into_path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => {
                        assert_eq!(mode(&path) & 0o644, 0o644, "{path}, umask {umask}");
                        checked += 1;
                    }
                }
            }
        }
        assert_eq!(checked, 1);
    }
}

/// Run by the test above.
#[test]
fn in_a_copy_that_stores() {
    let Ok(store) = std::env::var(STORE) else { return };
    let store = Utf8Path::new(&store);
    let object = store.with_file_name("object");
    DirectoryStore::new(store)
        .put(&xtask::artifact::hash_bytes(b""), &object)
        .expect("it is stored");
}

#[test]
fn an_id_is_the_same_in_small_letters() {
    let (_keep, dir) = folder();
    good(keys(&dir, &["new"]));
    // Each rotation leaves one more key that may be revoked; one id in two thousand has no letters.
    let (id, small) = loop {
        good(keys(&dir, &["rotate"]));
        let listed = good(keys(&dir, &["list"]));
        let ids: Vec<&str> = listed.lines().skip(1).filter_map(|l| l.split(' ').next()).collect();
        let (_newest, older) = ids.split_last().expect("keys");
        if let Some(id) = older.iter().find(|id| id.to_lowercase() != **id) {
            break ((*id).to_owned(), id.to_lowercase());
        }
    };
    let printed = good(keys(&dir, &["revoke", &small]));
    assert!(printed.contains(&format!("revoked the release key {id} in ")), "{printed}");
    let printed = refused(keys(&dir, &["revoke", &small]));
    assert!(printed.contains(&format!("the key {id}: the key is already revoked")), "{printed}");
}

#[test]
fn the_key_sets_serial_is_listed() {
    let (_keep, dir) = folder();
    good(keys(&dir, &["new"]));
    for serial in [1, 2] {
        let listed = good(keys(&dir, &["list"]));
        let first = format!("key set {dir}/keyset.json, serial {serial}\n");
        assert!(listed.starts_with(&first), "{listed}");
        let json = good(keys(&dir, &["list", "--format", "json"]));
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(json["serial"], serial);
        let set = KeySet::parse(&fs::read(dir.join("keyset.json")).expect("the set")).expect("one");
        assert_eq!(u64::from(set.serial), serial);
        good(keys(&dir, &["rotate"]));
    }
}

#[test]
fn a_damaged_key_set_says_what_where_and_what_to_do() {
    let (_keep, dir) = folder();
    good(keys(&dir, &["new"]));
    let (set, other) = (dir.join("keyset.json"), dir.join("other.json"));
    let whole = fs::read_to_string(&set).expect("the set");
    let wrong = whole.replace("\"keys\"", "\"kehs\"");
    let cases = [
        (&whole[..whole.len() / 2], "the key set ends in the middle, in line "),
        ("", "the key set is empty"),
        ("{ nonsense", "the key set is not JSON from line 1 on"),
        (wrong.as_str(), "the key set: unknown field `kehs`"),
    ];
    for (text, expected) in cases {
        fs::write(&set, text).expect("written");
        let printed = refused(keys(&dir, &["list"]));
        let start = format!("error: reading the key set {set}: unusable key: {expected}");
        assert!(printed.starts_with(&start), "{printed}");
        assert!(
            printed.contains("\nhelp: the file was truncated or changed")
                && printed.contains("a copy"),
            "{printed}"
        );
        assert!(!printed.contains("EOF"), "{printed}");
        // Nothing is made in its place.
        assert_eq!(fs::read_to_string(&set).expect("the set"), text);
    }
    // One that was named.
    fs::write(&set, &whole).expect("written");
    fs::write(&other, &whole[..whole.len() / 2]).expect("written");
    let bundle = dir.join("a.bundle");
    let mut head = [0; 512];
    head[..13].copy_from_slice(b"manifest.json");
    head[257..262].copy_from_slice(b"ustar");
    fs::write(&bundle, head).expect("written");
    let words = ["verify", bundle.as_str(), "--keys", other.as_str()];
    let printed = refused(under("022", env!("CARGO_BIN_EXE_xtask"), &words, &[]));
    assert!(printed.starts_with(&format!("error: reading the key set {other}: ")), "{printed}");
    assert!(printed.contains("\nhelp: the file was truncated or changed"), "{printed}");
    // And a refusal is said once.
    let own = [("SLIPWAY_KEYS", dir.as_str())];
    let printed =
        refused(under("022", env!("CARGO_BIN_EXE_xtask"), &["verify", bundle.as_str()], &own));
    let (sentence, _) = printed.split_once("\nhelp: ").expect("help");
    let (_, why) = sentence.split_once(&format!("verifying {bundle}: ")).expect("the file");
    let (why, code) = why.rsplit_once(" (").expect("a code");
    assert!(code.ends_with(')') && sentence.matches(why).count() == 1, "{printed}");
}
