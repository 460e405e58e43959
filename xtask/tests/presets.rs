//! The links that presets create: each case of a corpus of units and presets is compared with the recorded result of
//! the real `systemctl`, and with this machine's `systemctl` if there is one.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::common::skip::skip;
use camino::{Utf8Path, Utf8PathBuf};
use xtask::compose::units::apply_presets;
use xtask::rootfs::tree::{EntryOrigin, FileData, RootEntry, RootEntryKind, RootTree};

/// Cases; the form is told at the head of the file.
const CORPUS: &str = "tests/presets/corpus.txt";

/// Where links are made.
const CONFIG: &str = "etc/systemd/system/";

/// Links by path, with their targets.
type Links = BTreeMap<String, String>;

#[derive(Debug)]
struct Case {
    name: String,
    /// What `systemctl` is asked for.
    words: Vec<String>,
    /// Path and content; a content `-> TARGET` is a link.
    files: Vec<(String, String)>,
    /// The links that are there afterwards.
    links: Links,
}

impl Case {
    fn tree(&self) -> RootTree {
        let mut tree = RootTree::default();
        for (path, content) in &self.files {
            let kind = match content.strip_prefix("-> ") {
                Some(target) => RootEntryKind::Symlink(target.trim().to_owned()),
                None => RootEntryKind::File(FileData::Bytes(content.clone().into_bytes())),
            };
            // A preset of the base system is one whose name says so.
            let base = path.contains("-base.preset");
            let origin = if base { EntryOrigin::Base } else { EntryOrigin::Overlay(path.into()) };
            tree.insert(path, RootEntry::new(0o644, kind, origin)).expect("placed");
        }
        tree
    }

    fn write(&self, root: &Path) {
        for (path, content) in &self.files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("has one")).expect("made");
            match content.strip_prefix("-> ") {
                Some(target) => symlink(target.trim(), &path).expect("linked"),
                None => fs::write(&path, content).expect("written"),
            }
        }
    }
}

fn corpus_path() -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join(CORPUS)
}

/// The corpus: its head, and the cases.
fn corpus() -> (String, Vec<Case>) {
    let text = fs::read_to_string(corpus_path()).expect("the corpus");
    let mut parts = text.split("\n=== ");
    let head = parts.next().expect("a head").to_owned();
    let cases = parts.map(|part| {
        let (title, rest) = part.split_once('\n').unwrap_or((part, ""));
        let (name, words) = title.split_once(" | ").expect("NAME | WORDS");
        let mut case = Case {
            name: name.to_owned(),
            words: words.split_whitespace().map(str::to_owned).collect(),
            files: Vec::new(),
            links: Links::new(),
        };
        for part in format!("\n{rest}").split("\n--- ").skip(1) {
            let (path, content) = part.split_once('\n').unwrap_or((part, ""));
            if path == "links" {
                let pairs = content.lines().filter_map(|line| line.split_once(" -> "));
                case.links = pairs.map(|(a, b)| (a.to_owned(), b.to_owned())).collect();
            } else {
                // `\r` and other bytes that an editor would change are written as escapes.
                let content = content.replace("<CR>", "\r").replace("<BOM>", "\u{feff}");
                let end = if content.is_empty() || content.starts_with("-> ") { "" } else { "\n" };
                case.files.push((path.to_owned(), content + end));
            }
        }
        case
    });
    (head, cases.collect())
}

/// The links below `etc/systemd/system`, a tree's own and those that were made alike.
fn ours(tree: &RootTree) -> Links {
    let links = tree.iter().filter_map(|(path, entry)| match &entry.kind {
        RootEntryKind::Symlink(target) if path.starts_with(CONFIG) => {
            Some((path.to_owned(), target.clone()))
        }
        _ => None,
    });
    links.collect()
}

fn theirs(root: &Path) -> Links {
    fn walk(root: &Path, folder: &Path, links: &mut Links) {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.expect("listed").path();
            if let Ok(target) = fs::read_link(&path) {
                let name = path.strip_prefix(root).expect("below").to_str().expect("UTF-8");
                links.insert(name.to_owned(), target.to_str().expect("UTF-8").to_owned());
            } else if path.is_dir() {
                walk(root, &path, links);
            }
        }
    }
    let mut links = Links::new();
    walk(root, &root.join(CONFIG), &mut links);
    links
}

/// The version of this machine's systemctl; none where there is none.
fn systemctl_version() -> Option<u32> {
    let output = Command::new("systemctl").arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_whitespace().nth(1)?.parse().ok()
}

fn real(case: &Case) -> (Links, String) {
    let dir = tempfile::tempdir().expect("a directory");
    case.write(dir.path());
    let output = Command::new("systemctl")
        .arg("--root")
        .arg(dir.path())
        .args(&case.words)
        .output()
        .expect("systemctl runs");
    (theirs(dir.path()), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Cases that need a systemd of this version at least, by a word of their name.
fn needs(case: &Case) -> u32 {
    if case.name.contains("UpheldBy") { 254 } else { 252 }
}

#[test]
fn presets_make_the_links_that_systemctl_makes() {
    let (head, mut cases) = corpus();
    assert!(cases.len() >= 40, "{} cases", cases.len());
    let version = systemctl_version();
    let mut wrong = Vec::new();
    let mut compared = 0;
    for case in &mut cases {
        if version.is_some_and(|v| v >= needs(case)) {
            let (links, printed) = real(case);
            if std::env::var_os("SLIPWAY_BLESS").is_some() {
                case.links = links;
            } else if links != case.links {
                wrong.push(format!("{}: systemctl made {links:#?}\n{printed}", case.name));
            }
            compared += 1;
        }
        let mut tree = case.tree();
        let applied = apply_presets(&mut tree);
        if let Err(error) = applied {
            wrong.push(format!("{}: {error:#}", case.name));
        } else if ours(&tree) != case.links {
            wrong.push(format!(
                "{}: made {:#?}, expected {:#?}",
                case.name,
                ours(&tree),
                case.links
            ));
        }
    }
    if std::env::var_os("SLIPWAY_BLESS").is_some() {
        bless(&head, &cases);
    }
    println!("{} cases, {compared} of them with systemctl {version:?}", cases.len());
    assert!(wrong.is_empty(), "{} cases are wrong\n{}", wrong.len(), wrong.join("\n"));
}

fn bless(head: &str, cases: &[Case]) {
    let mut text = head.to_owned();
    for case in cases {
        text += &format!("\n=== {} | {}", case.name, case.words.join(" "));
        for (path, content) in &case.files {
            let content = content.replace('\r', "<CR>").replace('\u{feff}', "<BOM>");
            text += &format!("\n--- {path}\n{}", content.strip_suffix('\n').unwrap_or(&content));
        }
        text += "\n--- links";
        for (path, target) in &case.links {
            text += &format!("\n{path} -> {target}");
        }
    }
    fs::write(corpus_path(), text + "\n").expect("written");
}

/// This machine's own units, under presets that enable all and that disable all.
#[test]
fn the_units_of_this_machine_get_the_links_that_systemctl_makes() {
    let folder = Path::new("/usr/lib/systemd/system");
    if systemctl_version().is_none() || !folder.is_dir() {
        let test = "presets::the_units_of_this_machine_get_the_links_that_systemctl_makes";
        skip(test, "this machine has no systemd of its own", "install systemd");
        return;
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("listed") {
        let path = entry.expect("listed").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
        let place = format!("usr/lib/systemd/system/{name}");
        if let Ok(target) = fs::read_link(&path) {
            let target = target.to_str().expect("UTF-8").to_owned();
            let merged = target.strip_prefix("/lib/").map(|rest| format!("/usr/lib/{rest}"));
            files.push((place, format!("-> {}", merged.unwrap_or(target))));
        } else if path.is_file() {
            // A file that is not a text is not a unit.
            files.extend(fs::read_to_string(&path).ok().map(|text| (place, text)));
        }
    }
    assert!(files.len() >= 20, "{} files", files.len());
    let preset = |name: &str, text: &str| {
        (format!("usr/lib/systemd/system-preset/{name}"), format!("{text}\n"))
    };
    let rules = [
        "enable *",
        "disable *",
        "enable systemd-*\ndisable *",
        "enable *.timer\nenable *.socket\ndisable *",
    ];
    for first in rules {
        let mut case = Case {
            name: first.to_owned(),
            words: vec!["preset-all".to_owned()],
            files: files.clone(),
            links: Links::new(),
        };
        case.files.push(preset("50-all.preset", first));
        let (mut links, printed) = real(&case);
        let mut tree = case.tree();
        apply_presets(&mut tree).expect("applied");
        // Of several units that ask for one name systemd takes the one that the directory lists
        // first.
        let claimed = |path: &String| printed.contains(&format!("/{path}\" already exists"));
        links.retain(|path, _| !claimed(path));
        let mut made = ours(&tree);
        made.retain(|path, _| !claimed(path));
        assert_eq!(made, links, "{first}\n{printed}");
        // What was enabled is disabled again.
        if first == "enable *" {
            let had = links.len();
            case.files
                .extend(links.into_iter().map(|(path, target)| (path, format!("-> {target}"))));
            case.files.retain(|(path, _)| !path.ends_with("50-all.preset"));
            case.files.push(preset("50-all.preset", "disable *"));
            let (left, printed) = real(&case);
            let mut tree = case.tree();
            apply_presets(&mut tree).expect("applied");
            assert_eq!(ours(&tree), left, "disabled again\n{printed}");
            println!("{} units' files, {had} links made, {} left", files.len(), left.len());
        }
    }
}

fn refused(files: &[(&str, &str)]) -> String {
    let owned = |(path, text): &(&str, &str)| (path.to_string(), text.to_string());
    let case = Case {
        name: String::new(),
        words: Vec::new(),
        files: files.iter().map(owned).collect(),
        links: Links::new(),
    };
    format!("{:#}", apply_presets(&mut case.tree()).expect_err("refused"))
}

const PRESET: &str = "usr/lib/systemd/system-preset/10-x.preset";
const UNIT: &str = "usr/lib/systemd/system/a.service";
const GOOD: &str = "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n";

#[test]
fn a_unit_that_is_named_and_cannot_be_enabled_is_an_error() {
    let template = "usr/lib/systemd/system/a@.service";
    let cases: [(&[(&str, &str)], &str); 12] = [
        (&[(PRESET, "enable b.service\n")], "there is no unit b.service"),
        (&[(PRESET, "enable b@x.service\n")], "there is no unit b@.service"),
        (&[(PRESET, "enable a.service\n"), (UNIT, "[Service]\n")], "has no [Install] section"),
        (&[(PRESET, "enable a.service\n"), (UNIT, "")], "a.service is masked"),
        (
            &[(PRESET, "enable a@.service\n"), (template, GOOD)],
            "has no instance, so multi-user.target",
        ),
        (
            &[
                (PRESET, "enable b.service\n"),
                (UNIT, GOOD),
                ("etc/systemd/system/b.service", "-> /usr/lib/systemd/system/a.service"),
            ],
            "b.service is an alias of a.service",
        ),
        (
            &[(PRESET, "start a.service\n"), (UNIT, GOOD)],
            "expected `enable UNIT` or `disable UNIT`",
        ),
        (&[(PRESET, "enable a.service b.service\n"), (UNIT, GOOD)], "more than one word"),
        (&[(PRESET, "enable a[.service\n"), (UNIT, GOOD)], "reading the pattern"),
        (
            &[(PRESET, "enable a.service\n"), (UNIT, "[Install]\nWantedBy=%H.target\n")],
            "%H, whose value only the running robot knows",
        ),
        (
            &[(PRESET, "enable a.service\n"), (UNIT, "[Install]\nAlias=b.socket\n")],
            "cannot be an alias of a.service",
        ),
        (
            &[
                (PRESET, "enable a.service\nenable c.service\n"),
                (UNIT, "[Install]\nAlias=b.service\n"),
                ("usr/lib/systemd/system/c.service", "[Install]\nAlias=b.service\n"),
            ],
            "two units claim the same name",
        ),
    ];
    for (files, expected) in cases {
        let error = refused(files);
        assert!(error.contains(expected), "{files:?}: {error}");
    }
}

/// A pattern matches every entry, like `preset-all`, and skips entries that cannot be enabled.
#[test]
fn a_unit_that_a_pattern_finds_may_be_one_that_cannot_be_enabled() {
    let files = [
        (PRESET, "enable *\n"),
        (UNIT, GOOD),
        ("usr/lib/systemd/system/b.service", "[Service]\n"),
        ("usr/lib/systemd/system/c.service", "[Install\n"),
    ];
    let files = files.map(|(path, text)| (path.to_owned(), text.to_owned())).to_vec();
    let case = Case { name: String::new(), words: Vec::new(), files, links: Links::new() };
    let mut tree = case.tree();
    apply_presets(&mut tree).expect("applied");
    assert_eq!(ours(&tree).len(), 1);
}
