//! Wheels: one bad input for each rule with its message, installation compared with what other
//! tools read, and (with `SLIPWAY_TEST_ALL=1`) the real lock on the real index.

use crate::common::root;
use crate::common::skip::{all, skip};
use crate::wheel_support;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::Command;

use camino::{Utf8Path, Utf8PathBuf};
use wheel_support::{Draft, arm64_root, install_into, locked, message, rename, target, unpack};
use xtask::artifact::hash_bytes;
use xtask::cache::Cache;
use xtask::sbom::{self, SbomComponent, SbomOrigin, SbomSubject};
use xtask::wheel::archive::digest_text;
use xtask::wheel::base::BaseSource;
use xtask::wheel::component::{WheelComponentRequest, make_payloads};
use xtask::wheel::resolve::describe_missing;
use xtask::wheel::target::WheelName;
use xtask::wheel::{
    BaseDistribution, BasePython, CheckedWheel, InstalledWheels, LockRequest, WheelLock, bytecode,
    check_wheels, fetch_wheels, lock_identity, lock_wheels, update_lock,
};

#[test]
fn each_broken_wheel_is_refused_with_its_reason() {
    let good = || Draft::new("foo", "");
    assert_eq!(good().read().unwrap().metadata.name, "foo");
    let init = "foo/__init__.py";
    let info = "foo-1.0.dist-info";
    let mut other_name = good();
    other_name.file = "bar-1.0-py3-none-any.whl".into();
    let mut other_tag = good();
    other_tag.file = "foo-1.0-cp311-cp311-linux_aarch64.whl".into();
    let mut no_name = good();
    no_name.file = "foo-1.0.zip".into();
    let mut strange_name = good();
    strange_name.file = "foo-1.0-py3-none-a%y.whl".into();
    let mut twice = good().with("foo/a.py", "1", 0o644).with("foo/b.py", "1", 0o644);
    twice.bytes = |bytes| rename(bytes, b"foo/b.py", b"foo/a.py");
    let mut cut = good();
    cut.bytes = |bytes| bytes[..bytes.len() / 2].to_vec();
    let without = |end: &str| {
        let mut draft = good();
        draft.members.retain(|(path, _, _)| !path.ends_with(end));
        draft
    };
    let wrong_hash = |text: String| {
        let digest = digest_text(b"__version__ = '1.0'\n");
        assert!(text.contains(&digest));
        text.replace(&digest, &digest_text(b"something else"))
    };
    let cases: Vec<(Draft, String)> = vec![
        (no_name, "foo-1.0.zip is not a wheel's name: expected NAME-VERSION[-BUILD]-PYTHON-ABI-PLATFORM.whl".into()),
        (strange_name, "foo-1.0-py3-none-a%y.whl is not a wheel's name: it has an empty part or an unexpected character".into()),
        (cut, "opening the archive".into()),
        (other_name, format!("the wheel has the directory {info}, but its name needs \
         bar-1.0.dist-info")),
        (other_tag, format!("checking {info}/WHEEL: the tags in the wheel are py3-none-any, but \
         the file name has cp311-cp311-linux_aarch64")),
        (good().edit("/WHEEL", "Wheel-Version: 1.0", "Wheel-Version: 2.0"), format!("checking {info}/WHEEL: Wheel-Version is 2.0, but this tool supports 1.x only")),
        (good().edit("/WHEEL", "true", "maybe"), format!("checking {info}/WHEEL: Root-Is-Purelib is Some(\"maybe\"), expected true or false")),
        (good().edit("/WHEEL", "Tag: py3-none-any", "Tag: py3"), format!("checking {info}/WHEEL: 'py3' is not a tag")),
        (without("/WHEEL"), format!("{info}/WHEEL is missing")),
        (without("/METADATA"), format!("{info}/METADATA is missing")),
        (good().edit("/METADATA", "Name: foo", "Name: bar"), format!("checking {info}/METADATA: \
         Name is bar, but the file name has foo")),
        (good().edit("/METADATA", "Version: 1.0", "Version: 1.1"), format!("checking {info}/METADATA: Version is 1.1, but the file name has 1.0")),
        (good().edit("/METADATA", "\nVersion: 1.0", ""), format!("checking {info}/METADATA: Version is missing")),
        (Draft::new("foo", "Requires-Dist: not a requirement\n"), "'not a requirement' is not a requirement (PEP 508)".into()),
        (good().with("other-2.dist-info/x", "", 0o644), "the wheel has 2 .dist-info directories, \
         expected one".into()),
        (good().record(wrong_hash), format!("checking {init} with {info}/RECORD: the hash of the \
         file is {}", digest_text(b"__version__ = '1.0'\n"))),
        (good().record(|t| t.replace("sha256=", "md5=")), "the hash 'md5' is too weak: sha256 or better is needed (PEP 427)".into()),
        (good().record(|t| t.replace(",20\n", ",21\n")), format!("{info}/RECORD gives {init} 21 \
         bytes, but it has 20")),
        (good().record(|t| t.lines().skip(1).map(|l| format!("{l}\n")).collect()), format!("{init} is in the wheel but not in {info}/RECORD")),
        (good().record(|t| format!("{t}foo/gone.py,sha256=x,1\n")), format!("{info}/RECORD lists foo/gone.py, which the wheel does not have")),
        (good().record(|t| format!("{t}{t}")), format!("{info}/RECORD lists {init} twice")),
        (good().record(|t| t.replace("__init__.py,sha256=", "__init__.py,,sha256=")), "expected path, hash and size, found".into()),
        (good().record(|t| format!("{t}\"open,,\n")), "a quote is not closed".into()),
        (good().record(|t| format!("{t}../x,sha256=x,1\n")), format!("{info}/RECORD lists ../x, which the wheel does not have")),
        (good().record(|t| t.replace(&digest_text(b"__version__ = '1.0'\n"), "")), format!("{info}/RECORD has no hash for {init}")),
        (good().with("../evil.py", "", 0o644), "the path ../evil.py has the part '..', which can \
         lead out of its directory".into()),
        (good().with("/etc/evil", "", 0o644), "the path /etc/evil is absolute".into()),
        (good().with("foo//x", "", 0o644), "the path foo//x has the part '', which can lead out of \
         its directory".into()),
        (good().with("foo\\x", "", 0o644), "has a backslash or a control character".into()),
        (good().with("foo/link", "/etc/passwd", 0o120_777), "foo/link is a symbolic link, which is \
         not allowed in a wheel".into()),
        (twice, "the archive has two members named foo/a.py".into()),
        (good().with(&format!("{info}/entry_points.txt"), "[console_scripts]\nx = nothing\n", 0o644), format!("reading {info}/entry_points.txt: 'x = nothing' is not NAME = MODULE:FUNCTION")),
        (good().with(&format!("{info}/entry_points.txt"), "[console_scripts]\n../x = a:b\n", 0o644), "'../x = a:b' is not NAME = MODULE:FUNCTION".into()),
        (good().with(&format!("{info}/entry_points.txt"), "[gui_scripts]\nx = a:b;import os\n", 0o644), "'x = a:b;import os' is not NAME = MODULE:FUNCTION".into()),
    ];
    for (draft, expected) in cases {
        let found = message(draft.read());
        assert!(found.starts_with(&format!("reading the wheel {}: ", draft.file)), "{found}");
        assert!(found.contains(&expected), "expected: {expected}\nfound: {found}");
    }
    let bytes = good().build();
    let wrong = message(CheckedWheel::read(&bytes, "foo-1.0-py3-none-any.whl", Some("00")));
    let expected =
        format!("the sha256 of the wheel is {}, but the lock has 00", hash_bytes(&bytes));
    assert!(wrong.ends_with(&expected), "{wrong}");
}

#[test]
fn wheels_are_checked_against_the_target_and_each_other() {
    let wheel = |name: &str, headers: &str| Draft::new(name, headers).read().unwrap();
    let base = [BaseDistribution { name: "Sys_Tools".into(), version: "3.1".into() }];
    let verdict = |wheels: &[CheckedWheel]| check_wheels("foo==1.0", wheels, &target(), &base);
    let needs = "Requires-Dist: bar>=1; platform_machine == 'aarch64'\n\
                 Requires-Dist: sys-tools>3\n\
                 Requires-Dist: other; python_version < '3.8'\n\
                 Requires-Dist: windows; sys_platform == 'win32'\n\
                 Requires-Dist: extra-only; extra == 'x'\n\
                 Requires-Python: >=3.10\n";
    let good = [wheel("bar", ""), wheel("foo", needs)];
    verdict(&good).unwrap();

    let help = "\nhelp: resolve the wheels again for this base with `cargo xtask lock`";
    let mut compiled =
        Draft::new("foo", "").edit("/WHEEL", "py3-none-any", "cp312-cp312-linux_aarch64");
    compiled.file = "foo-1.0-cp312-cp312-linux_aarch64.whl".into();
    let cases: Vec<(Vec<CheckedWheel>, &str)> = vec![
        (
            vec![compiled.read().unwrap()],
            "foo-1.0-cp312-cp312-linux_aarch64.whl: its tags (cp312-cp312-linux_aarch64) do not fit CPython 3.11 on aarch64 with glibc 2.36",
        ),
        (
            vec![wheel("foo", "Requires-Python: >=3.12\n")],
            "foo-1.0-py3-none-any.whl: foo-1.0.dist-info/METADATA: the wheel requires Python \
             >=3.12, but the base has 3.11",
        ),
        (
            vec![good[1].clone()],
            "foo-1.0-py3-none-any.whl: foo-1.0.dist-info/METADATA requires bar>=1, but neither the \
             wheels nor the base contain it",
        ),
        (
            vec![wheel("foo", "Requires-Dist: sys-tools>=4\n")],
            "foo-1.0-py3-none-any.whl: foo-1.0.dist-info/METADATA requires sys-tools>=4, but the \
             version is 3.1",
        ),
        (
            vec![wheel("foo", ""), wheel("bar", "")],
            "bar-1.0-py3-none-any.whl: not needed by any other wheel",
        ),
        (
            vec![wheel("bar", ""), wheel("foo", "Requires-Dist: bar[fast]\n"), wheel("baz", "")],
            "baz-1.0-py3-none-any.whl: not needed by any other wheel",
        ),
        (
            vec![wheel("foo", ""), wheel("foo", "")],
            "foo-1.0-py3-none-any.whl: a second wheel of foo",
        ),
    ];
    for (wheels, expected) in cases {
        assert_eq!(message(verdict(&wheels)), format!("{expected}{help}"));
    }
    // An extra that is asked for brings its requirement.
    let fast = [
        wheel("bar", "Provides-Extra: fast\nRequires-Dist: baz; extra == 'fast'\n"),
        wheel("baz", ""),
        wheel("foo", "Requires-Dist: bar[fast]\n"),
    ];
    verdict(&fast).unwrap();
    assert!(
        message(verdict(&[fast[0].clone(), fast[2].clone()])).contains("METADATA requires baz")
    );
}

#[test]
fn tags_are_those_that_pip_computes() {
    let target = target();
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "debug", "--verbose", "--python-version", "3.11"]);
    pip.args(["--implementation", "cp"]);
    for platform in target.platforms() {
        pip.args(["--platform", &platform]);
    }
    let printed = String::from_utf8(pip.output().unwrap().stdout).unwrap();
    let (_, list) = printed.split_once("Compatible tags:").expect("pip debug lists tags");
    let mut theirs: Vec<&str> =
        list.lines().skip(1).map(str::trim).filter(|l| !l.is_empty()).collect();
    let tags = target.tags();
    let mut ours: Vec<String> = tags.iter().map(ToString::to_string).collect();
    assert!(theirs.len() > 500, "{printed}");
    theirs.sort_unstable();
    theirs.dedup();
    ours.sort();
    assert_eq!(ours, theirs);
    assert_eq!(tags[0].to_string(), "cp311-cp311-manylinux_2_36_aarch64");
}

#[test]
fn a_missing_wheel_is_explained_with_the_tags_that_exist() {
    let named = |file: &str| WheelName::parse(file).unwrap();
    let wheels = [
        named("numpy-1.26.4-cp312-cp312-manylinux_2_17_aarch64.manylinux2014_aarch64.whl"),
        named("numpy-1.26.4-cp312-cp312-win_amd64.whl"),
        named("numpy-1.9.0-cp312-cp312-win_amd64.whl"),
        named("numpy-2.1.0-cp313-cp313-manylinux2014_aarch64.whl"),
    ];
    let mut target = target();
    target.python = "3.13".parse().unwrap();
    let printed = |requirement: &str| {
        describe_missing(requirement, Some("opentrons"), &target, &wheels).unwrap().to_string()
    };
    assert_eq!(
        printed("numpy<2,>=1.20.0"),
        "numpy<2,>=1.20.0, which opentrons needs, has no wheel for CPython 3.13 on aarch64 with glibc 2.36\n\
         numpy 1.26.4, the newest version in that range, has these tags for Linux on aarch64:\n  \
         cp312-cp312-manylinux2014_aarch64\n  cp312-cp312-manylinux_2_17_aarch64\n\
         help: use a base with one of these Pythons, or a version of opentrons that allows a newer numpy"
    );
    assert!(
        printed("numpy<1")
            .contains("no version in that range has any wheel; the newest version is 2.1.0")
    );
}

fn product_lock() -> WheelLock {
    WheelLock::load(&root().join("configs/robot-dev.wheels.lock")).unwrap()
}

#[test]
fn the_products_lock_is_whole_and_each_contradiction_in_a_lock_is_refused() {
    let lock = product_lock();
    let text = lock.to_toml();
    assert_eq!(WheelLock::parse(&text, "a.lock".into()).unwrap(), lock);
    assert_eq!(lock.wheels.len(), 23);
    let first = lock.wheels[0].sha256.clone();
    let changed = text.replace(&first, &"0".repeat(64));
    assert_ne!(
        lock_identity(&lock),
        lock_identity(&WheelLock::parse(&changed, "a.lock".into()).unwrap())
    );
    let mut newer = lock.clone();
    newer.wheels[0].version = "9".into();
    let gone = newer.wheels.remove(1);
    assert_eq!(
        xtask::wheel::lock::describe_difference(Some(&lock), &newer),
        ["aionotify 0.3.1 -> 9".to_owned(), format!("- {} {}", gone.name, gone.version)]
    );
    assert!(xtask::wheel::lock::describe_difference(Some(&lock), &lock).is_empty());
    assert_eq!(xtask::wheel::lock::describe_difference(None, &lock).len(), 23);
    let half = text.find("[[wheel]]").unwrap();
    let block = text[half..].split("\n\n").next().unwrap();
    let python = text.lines().find(|line| line.starts_with("python = ")).unwrap();
    let cases = [
        (
            text.replace("format = 1", "format = 2"),
            "the lock has format 2, but this tool reads format 1",
        ),
        (text.replace("size = ", "length = "), "unknown field `length`"),
        (text.replace(&first, "zz"), "is 'zz': expected 64 lower-case hexadecimal digits"),
        (
            text.replace("\"glibc 2.36\"", "\"bionic\""),
            "'bionic' is not a C library: expected 'glibc 2.36' or 'musl 1.2'",
        ),
        (
            text.replace(python, "python = \"three\""),
            "'three' is not a Python version: expected 3.11 or 3.11.2",
        ),
        (text.replace(python, "python = \"3.8\""), "Python 3.8 is too old: 3.9 or later is needed"),
        (
            text.replace("\"cp\"", "\"pp\""),
            "the Python implementation is 'pp', only 'cp' (CPython) is supported",
        ),
        (
            text.replace("name = \"aionotify\"", "name = \"zzz\""),
            "the lock has 'zzz' for the file aionotify-0.3.1-py2.py3-none-any.whl: expected the \
             normalised name 'aionotify'",
        ),
        (format!("{}\n{block}\n{}", &text[..half], &text[half..]), "aionotify is locked twice"),
        (format!("{}\n{block}\n", text.replacen(block, "", 1)), "the wheels are not sorted: "),
        (
            text.replace("\"opentrons==10.1.0\"", "\"absent==1\""),
            "the requirement absent==1 has no [[wheel]]",
        ),
    ];
    for (bad, expected) in cases {
        let found = message(WheelLock::parse(&bad, "a.lock".into()));
        assert!(found.contains(expected), "expected: {expected}\nfound: {found}");
        if !found.contains("has format") {
            // A line of the file, and its text.
            let (place, shown) = found.split_once("\n  | ").expect("a place");
            let line = place.trim_start_matches("a.lock:").split(':').next().expect("a line");
            let line: usize = line.parse().expect("a line's number");
            let shown = shown.lines().next().expect("the line");
            assert_eq!(bad.lines().nth(line - 1).map(str::trim), Some(shown), "{found}");
        }
    }
}

/// Runs Python in the unpacked base with the modules of an unpacked installation.
fn python(installation: &Utf8Path, code: &str) -> String {
    python_with(&installation.join("usr/local/lib/python3.11/dist-packages"), code)
}

fn python_with(site: &Utf8Path, code: &str) -> String {
    let root = arm64_root();
    let output = Command::new("qemu-aarch64-static")
        .args(["-L", root.as_str(), root.join("usr/bin/python3.11").as_str(), "-B", "-c", code])
        .env("PYTHONPATH", site)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn rich() -> Draft {
    let info = "foo-1.0.dist-info";
    Draft::new("foo", "Summary: A test\nLicense-Expression: MIT\nRequires-Dist: bar\n")
        .with("foo/main.py", "class Tool:\n    @staticmethod\n    def go():\n        return 3\n", 0o644)
        .with("foo/broken.py", "print 'Python 2'\n", 0o644)
        .with("foo/resources/a, b.sh", "#!/bin/sh\n", 0o755)
        .with("foo/__pycache__/main.cpython-311.pyc", "stale", 0o644)
        .with("foo-1.0.data/scripts/tool", "#!python -u\nprint('tool')\n", 0o644)
        .with("foo-1.0.data/scripts/shell", "#!/bin/sh\n", 0o644)
        .with("foo-1.0.data/data/share/foo/x", "x", 0o644)
        .with("foo-1.0.data/purelib/pure.py", "P = 1\n", 0o644)
        .with("foo-1.0.data/platlib/plat.py", "P = 2\n", 0o644)
        .with("foo-1.0.data/headers/foo.h", "//\n", 0o644)
        .with(
            &format!("{info}/entry_points.txt"),
            "[console_scripts]\nfoo-go = foo.main:Tool.go [x]\n[gui_scripts]\nfoo-gui=foo.main:Tool.go\n[other]\nx=y\n",
            0o644,
        )
}

#[test]
fn installation_is_what_a_standard_installer_makes() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(scratch.path()).unwrap();
    let (cache, out) = (dir.join("cache"), dir.join("out.tar"));
    let lock = locked(&[rich(), Draft::new("bar", "")], &cache);
    let installed = install_into(&lock, &cache, &out).unwrap();
    let tree = dir.join("tree");
    unpack(&out, &tree);
    let site = tree.join("usr/local/lib/python3.11/dist-packages");
    let text = |path: &str| std::fs::read_to_string(tree.join(path)).unwrap();
    assert_eq!(text("usr/local/bin/tool"), "#!/usr/bin/python3 -u\nprint('tool')\n");
    assert_eq!(text("usr/local/bin/shell"), "#!/bin/sh\n");
    assert_eq!(text("usr/local/share/foo/x"), "x");
    assert_eq!(text("usr/local/include/python3.11/foo/foo.h"), "//\n");
    assert!(site.join("foo-1.0.dist-info/REQUESTED").exists());
    assert!(!site.join("bar-1.0.dist-info/REQUESTED").exists());
    assert!(!site.join("foo-1.0.dist-info/direct_url.json").exists());
    let names: Vec<(&str, bool, u64)> = installed
        .distributions
        .iter()
        .map(|d| (d.name.as_str(), d.top_level, d.uncompiled))
        .collect();
    assert_eq!(names, [("bar", false, 0), ("foo", true, 1)]);
    assert_eq!(
        installed.distributions[1].resources.as_deref().map(Utf8Path::as_str),
        Some("/usr/local/lib/python3.11/dist-packages/foo/resources")
    );

    // The tar: owners, modes, times, order; Python's own reader judges.
    let facts = Command::new("python3")
        .arg("-c")
        .arg(
            "import sys, tarfile\n\
             members = tarfile.open(sys.argv[1]).getmembers()\n\
             names = [m.name for m in members]\n\
             assert names == sorted(names), names\n\
             assert {(m.uid, m.gid, m.mtime) for m in members} == {(0, 0, 1700000000)}\n\
             modes = {m.name: oct(m.mode) for m in members}\n\
             site = 'usr/local/lib/python3.11/dist-packages/'\n\
             print(modes['usr'], modes['usr/local/bin/tool'], modes['usr/local/bin/foo-gui'],\n\
                   modes[site + 'foo/resources/a, b.sh'], modes[site + 'foo/main.py'])\n",
        )
        .arg(&out)
        .output()
        .unwrap();
    assert!(facts.status.success(), "{}", String::from_utf8_lossy(&facts.stderr));
    assert_eq!(String::from_utf8_lossy(&facts.stdout).trim(), "0o755 0o755 0o755 0o755 0o644");

    // The robot's Python: importlib.metadata reads RECORD, every line of it is true; the modules
    // come from bytecode that needs no time and names the robot's paths; the programs run.
    let printed = python(
        &tree,
        "import base64, hashlib, importlib.metadata as m, runpy, sys, foo.main\n\
         d = m.distribution('foo')\n\
         listed = set()\n\
         for f in d.files:\n\
         \x20   data = f.locate().read_bytes(); listed.add(str(f))\n\
         \x20   if f.name == 'RECORD' and f.hash is None: continue\n\
         \x20   digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()\n\
         \x20   assert (f.hash.mode, f.hash.value, f.size) == ('sha256', digest, len(data)), f\n\
         assert '../../../bin/foo-go' in listed and 'foo/__pycache__/main.cpython-311.pyc' in listed\n\
         import marshal; code = marshal.loads(open(foo.main.__cached__, 'rb').read()[16:])\n\
         header = open(foo.main.__cached__, 'rb').read()[:8]\n\
         print(d.read_text('INSTALLER').strip(), len(listed), code.co_filename, header[4:])\n\
         try: runpy.run_path(str(d.locate_file('../../../bin/foo-go')), run_name='__main__')\n\
         except SystemExit as e: print(e.code)\n",
    );
    assert_eq!(
        printed,
        "slipway 22 /usr/local/lib/python3.11/dist-packages/foo/main.py b'\\x01\\x00\\x00\\x00'\n3\n"
    );
    let counted = walk(&tree);
    assert_eq!(installed.distributions.iter().map(|d| d.files).sum::<u64>(), counted.len() as u64);
    assert_eq!(
        installed.distributions.iter().map(|d| d.installed_bytes).sum::<u64>(),
        counted.values().sum::<u64>()
    );

    // Again: from the cache, then without it.
    let again = dir.join("again.tar");
    assert_eq!(install_into(&lock, &cache, &again).unwrap().tar.sha256, installed.tar.sha256);
    std::fs::remove_dir_all(cache.join("stages")).unwrap();
    assert_eq!(install_into(&lock, &cache, &again).unwrap().tar.sha256, installed.tar.sha256);
}

#[test]
fn a_component_has_each_wheel_as_a_tree_of_its_own() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(scratch.path()).unwrap();
    let cache = dir.join("cache");
    let base = BasePython::read(BaseSource::Root(arm64_root().to_owned())).unwrap();
    let make = |drafts: &[Draft], out: &str| {
        let lock = locked(drafts, &cache);
        let (wheels, out) =
            (fetch_wheels(&lock, &Cache::in_dir(cache.clone()), true).unwrap(), dir.join(out));
        std::fs::create_dir(&out).unwrap();
        let (lock, wheels, out) = (&lock, wheels.as_slice(), out.as_path());
        let request =
            WheelComponentRequest { lock, wheels, base: &base, cache: &cache, out, log: None };
        make_payloads(&request).unwrap()
    };
    let bar = || Draft::new("bar", "");
    let made = make(&[rich(), bar()], "one");
    let roles: Vec<&str> = made.payloads.iter().map(|(role, _)| role.as_str()).collect();
    assert_eq!(roles, ["component.json", "bar", "foo"]);
    let json = std::fs::read(&made.payloads[0].1.path).unwrap();
    assert_eq!(bundle::component::ComponentLock::parse(&json).unwrap(), made.lock);
    let (lock, foo) = (&made.lock, &made.lock.wheels[1]);
    let facts = [&lock.module, &lock.version, &made.version, &lock.python, &lock.arch, &lock.libc];
    assert_eq!(facts, ["foo", "1.0", "1.0.0", "3.11", "aarch64", "glibc 2.36"]);
    assert_eq!(foo.requires, ["bar"]);
    let scripts = foo.scripts.iter().map(|script| format!("{} {}", script.name, script.module));
    assert_eq!(scripts.collect::<Vec<_>>(), ["foo-go foo.main", "foo-gui foo.main"]);

    // Both trees together are an installation for the place on `data`.
    let tree = dir.join("tree");
    made.payloads[1..].iter().for_each(|(_, tar)| unpack(&tar.path, &tree));
    let counted = walk(&tree);
    assert_eq!(lock.wheels.iter().map(|w| w.files).sum::<u64>(), counted.len() as u64);
    assert_eq!(lock.wheels.iter().map(|w| w.bytes).sum::<u64>(), counted.values().sum::<u64>());
    let program = std::fs::read_to_string(tree.join("bin/tool")).unwrap();
    assert!(program.starts_with("#!/usr/bin/python3 -u\n"), "{program}");
    let printed = python_with(
        &tree.join("site"),
        "import marshal, foo.main, importlib.metadata as m\n\
         code = marshal.loads(open(foo.main.__cached__, 'rb').read()[16:])\n\
         assert m.distribution('foo').locate_file('../bin/foo-go').is_file()\n\
         print(code.co_filename, '../bin/foo-go' in map(str, m.files('foo')))\n",
    );
    assert_eq!(printed, "/data/apps/api/current/site/foo/main.py True\n");
    // Again, without the kept bytecode: the same bytes. With another wheel beside it: the same tree.
    std::fs::remove_dir_all(cache.join("stages")).unwrap();
    assert_eq!(make(&[rich(), bar()], "two").lock, made.lock);
    let other = make(&[rich().with("foo/new.py", "", 0o644), bar()], "three");
    assert_eq!(other.lock.wheels[0], lock.wheels[0]);
    assert_ne!(other.lock.wheels[1].tree, foo.tree);
}

fn walk(folder: &Utf8Path) -> BTreeMap<Utf8PathBuf, u64> {
    let mut found = BTreeMap::new();
    for item in folder.read_dir_utf8().unwrap() {
        let item = item.unwrap();
        let kind = item.metadata().unwrap();
        if kind.is_dir() {
            found.extend(walk(item.path()));
        } else {
            found.insert(item.path().to_owned(), kind.len());
        }
    }
    found
}

#[test]
fn a_base_in_a_tar_is_the_same_base() {
    let scratch = tempfile::tempdir().unwrap();
    let tar = Utf8Path::from_path(scratch.path()).unwrap().join("base.tar");
    // Without root, a few directories of other users (caches, host keys) cannot be read; Python is
    // not in them.
    let mut pack = Command::new("tar");
    pack.args(["--ignore-failed-read", "-cf", tar.as_str(), "-C", arm64_root().as_str(), "."]);
    assert!(pack.status().unwrap().success());
    let from_tar = BasePython::read(BaseSource::Tar(tar)).unwrap();
    let mut from_root = BasePython::read(BaseSource::Root(arm64_root().to_owned())).unwrap();
    from_root.source = from_tar.source.clone();
    assert_eq!(from_tar, from_root);
    assert_eq!(from_tar.version.short(), "3.11");
    let target = scratch.path().join("empty");
    std::fs::create_dir(&target).unwrap();
    let none = BasePython::read(BaseSource::Root(target.try_into().unwrap()));
    assert!(message(none).starts_with("the base has no /usr/bin/python3"));
}

#[test]
fn what_cannot_be_installed_says_why() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(scratch.path()).unwrap();
    let (cache, out) = (dir.join("cache"), dir.join("out.tar"));
    let try_it = |drafts: &[Draft]| message(install_into(&locked(drafts, &cache), &cache, &out));
    let foo = || Draft::new("foo", "Requires-Dist: bar\n");
    let both = try_it(&[foo(), Draft::new("bar", "").with("foo/__init__.py", "", 0o644)]);
    assert!(
        both.contains(
            "foo-1.0-py3-none-any.whl and bar-1.0-py3-none-any.whl both install \
             /usr/local/lib/python3.11/dist-packages/foo/__init__.py, with different content"
        ),
        "{both}"
    );
    let scheme = try_it(&[Draft::new("foo", "").with("foo-1.0.data/etc/x", "", 0o644)]);
    assert!(scheme.ends_with("foo-1.0.data/etc/x is in the unknown scheme 'etc'"), "{scheme}");
    let loose = try_it(&[Draft::new("foo", "").with("foo-1.0.data/x", "", 0o644)]);
    assert!(loose.ends_with("foo-1.0.data/x is not in the directory of a scheme"), "{loose}");
    let mut other = locked(&[Draft::new("foo", "")], &cache);
    other.target.python = "3.12".parse().unwrap();
    let python = message(install_into(&other, &cache, &out));
    assert!(
        python.starts_with("the wheels were locked for Python 3.12, but the base has 3.11"),
        "{python}"
    );
    assert!(!out.exists());
}

#[test]
fn offline_names_what_the_cache_lacks_and_a_damaged_file_is_not_used() {
    let scratch = tempfile::tempdir().unwrap();
    let cache = Utf8Path::from_path(scratch.path()).unwrap();
    let lock = locked(&[Draft::new("bar", ""), Draft::new("foo", "")], cache);
    let of = Cache::in_dir(cache.to_owned());
    let all = fetch_wheels(&lock, &of, true).unwrap();
    std::fs::write(&all[1].path, "damaged").unwrap();
    let found = message(fetch_wheels(&lock, &of, true));
    assert_eq!(
        found,
        format!(
            "1 of 2 wheels are not in the cache {cache}, and --offline forbids downloads:\n  \
             foo-1.0-py3-none-any.whl\nhelp: build once without --offline"
        )
    );
    let mut short = locked(&[Draft::new("foo", "")], cache);
    short.wheels[0].size += 1;
    assert!(message(fetch_wheels(&short, &of, true)).contains("bytes, but the lock has"));
}

#[test]
fn the_real_api_is_locked_installed_and_imported() {
    if !all("wheel::the_real_api_is_locked_installed_and_imported") {
        return;
    }
    let cache = Utf8Path::new(env!("CARGO_TARGET_TMPDIR")).join("wheel-cache");
    let scratch = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(scratch.path()).unwrap();
    let mut request = LockRequest {
        requirement: "opentrons==10.1.0".into(),
        target: target(),
        base: vec![],
        cache: cache.clone(),
        log: None,
    };
    let path = dir.join("fresh.lock");
    let (fresh, _) = update_lock(&request, &path).unwrap();
    assert_eq!(WheelLock::load(&path).unwrap(), fresh);
    assert!(fresh.wheels.iter().any(|w| w.name == "opentrons" && w.needed_by.is_empty()));

    let product = product_lock();
    fetch_wheels(&product, &Cache::in_dir(cache.clone()), false).unwrap();
    let out = dir.join("api.tar");
    let installed = install_into(&product, &cache, &out).unwrap();
    unpack(&out, &dir.join("tree"));
    let printed = python(&dir.join("tree"), "import opentrons; print(opentrons.__version__)");
    assert_eq!(printed, "10.1.0\n");
    validate_bill(&installed, &product, dir);

    request.target.python = "3.13".parse().unwrap();
    let missing = message(lock_wheels(&request));
    assert!(missing.contains("numpy<2"), "{missing}");
    assert!(missing.contains("\n  cp312-cp312-manylinux_2_17_aarch64\n"), "{missing}");
}

/// The published schema, which a Python package carries, judges the bill.
fn validate_bill(installed: &InstalledWheels, lock: &WheelLock, dir: &Utf8Path) {
    let mut components = sbom::wheel_components(installed, lock);
    components.push(SbomComponent {
        name: "libstdc++6".into(),
        version: "1:12.2.0-14+deb12u1".into(),
        origin: SbomOrigin::Debian { arch: "arm64".into(), release: "bookworm".into() },
        sha256: Some("0".repeat(64)),
        license: None,
        summary: Some("GNU Standard C++ Library v3".into()),
        cpe: None,
        depends_on: vec![],
    });
    let meta = SbomSubject {
        product: "robot".into(),
        version: "0.1.0".into(),
        board: "pi".into(),
        epoch: 1_700_000_000,
    };
    let bill = dir.join("sbom.cdx.json");
    sbom::write_sbom(&bill, &components, &meta).unwrap();
    let first = std::fs::read(&bill).unwrap();
    components.reverse();
    sbom::write_sbom(&bill, &components, &meta).unwrap();
    let mut second = Vec::new();
    std::fs::File::open(&bill).unwrap().read_to_end(&mut second).unwrap();
    assert_eq!(first, second, "the order of the components must not matter");

    let venv = Utf8Path::new(env!("CARGO_TARGET_TMPDIR")).join("cyclonedx");
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {args:?}: {errors}");
    };
    let python = venv.join("bin/python3");
    run("python3", &["-m", "venv", venv.as_str()]);
    run(python.as_str(), &["-m", "pip", "install", "-q", "cyclonedx-python-lib[json-validation]"]);
    let script = "import sys\n\
        from cyclonedx.schema import SchemaVersion\n\
        from cyclonedx.validation.json import JsonStrictValidator\n\
        errors = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())\n\
        sys.exit(repr(errors) if errors else 0)\n";
    run(python.as_str(), &["-c", script, bill.as_str()]);
    let text = String::from_utf8(first).unwrap().replace("\"SHA-256\"", "\"SHA-99\"");
    std::fs::write(&bill, text).unwrap();
    let refused = Command::new(&python).args(["-c", script, bill.as_str()]).output().unwrap();
    assert!(!refused.status.success(), "the validator accepts anything");
}

/// The library of the base's Python, compiled by the base's interpreter and by this machine's: the same bytes.
#[test]
fn bytecode_is_the_same_on_every_processor() {
    let emulated = BasePython::read(BaseSource::Root(arm64_root().to_owned())).unwrap();
    let query = ["--show", "--showformat=${Version}", "python3.11-minimal"];
    let Ok(package) = xtask::exec::Tool::new("dpkg-query").args(query).read() else {
        skip(
            "wheel::bytecode_is_the_same_on_every_processor",
            "this machine has no Python 3.11 of Debian's, and so compiles under emulation",
            "run it on Debian 12, with python3.11-minimal",
        );
        return;
    };
    let own = BasePython { package: Some(package.trim().to_owned()), ..emulated.clone() };
    assert_eq!((emulated.own(), own.own()), (None, Some("/usr/bin/python3.11".into())));
    let other = BasePython { package: Some("3.11.9-1".to_owned()), ..emulated.clone() };
    assert_eq!(other.own(), None);

    let library = arm64_root().join("usr/lib/python3.11");
    let mut files = Vec::new();
    for folder in ["", "asyncio", "email", "json", "multiprocessing", "unittest"] {
        for entry in library.join(folder).read_dir_utf8().unwrap() {
            let path = entry.unwrap().into_path();
            if path.extension() == Some("py") && path.is_file() {
                files.push((path.as_str().to_owned(), std::fs::read(&path).unwrap()));
            }
        }
    }
    assert!(files.len() > 250, "{} modules", files.len());
    let sources: bytecode::ModuleSources<'_> = files
        .iter()
        .map(|(path, bytes)| (path.trim_start_matches('/'), bytes.as_slice()))
        .collect();
    let wheels = [("a wheel".to_owned(), sources)];
    let compile = |base: &BasePython| {
        let cache = tempfile::tempdir().unwrap();
        let cache = Utf8Path::from_path(cache.path()).unwrap();
        bytecode::compile_wheels(&wheels, base, "aarch64", cache, None).unwrap()
    };
    let (here, there) = (compile(&own), compile(&emulated));
    assert_eq!(here[0].len(), files.len());
    assert!(here == there, "the bytes differ");
}
