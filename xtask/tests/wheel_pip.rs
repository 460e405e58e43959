//! We install the same files as pip: wheels with contradictory metadata, files that two wheels have in common, and (with
//! `SLIPWAY_TEST_ALL=1`) the most used wheels of the index, each compared file by file with pip's result.

use crate::common::skip::all;
use crate::wheel_support;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use camino::{Utf8Path, Utf8PathBuf};
use wheel_support::{Draft, arm64_root, install_into, locked, message, target, unpack};
use xtask::artifact::hash_bytes;
use xtask::cache::Cache;
use xtask::wheel::archive::digest_text;
use xtask::wheel::base::BaseSource;
use xtask::wheel::component::{WheelComponentRequest, find_unfit_files, make_payloads};
use xtask::wheel::{
    BasePython, CheckedWheel, InstallTarget, LockRequest, WheelLock, fetch_wheels, lock_wheels,
    preview_files,
};

/// Wheels of the index, `name==version` a line.
const MOST_USED: &str = "tests/wheels/most-used.txt";

/// Where the test for them is told that it runs with an index of its own beside the machine's.
const INDEX: &str = "SLIPWAY_TEST_INDEX";

/// As `pip install --target` lays out: everything below one directory.
fn beside_pip() -> InstallTarget {
    InstallTarget {
        site_packages: "/t".into(),
        scripts: "/t/bin".into(),
        prefix: "/t".into(),
        interpreter: "/usr/bin/python3".into(),
    }
}

/// A file of an installation: its hash, where that must be pip's, and whether it may be executed.
type Files = BTreeMap<String, (Option<String>, bool)>;

/// What every installer writes on its own account.
fn is_installers(path: &str) -> bool {
    path.rsplit_once(".dist-info/").is_some_and(|(_, file)| {
        ["RECORD", "INSTALLER", "REQUESTED", "direct_url.json"].contains(&file)
    })
}

fn ours(wheels: Vec<CheckedWheel>) -> anyhow::Result<Files> {
    let programs: Vec<String> = wheels
        .iter()
        .flat_map(|wheel| &wheel.entry_points)
        .map(|point| format!("bin/{}", point.name))
        .collect();
    let files = preview_files(wheels, &beside_pip(), "none")?.into_iter().map(|(path, file)| {
        let path = path.strip_prefix("t/").expect("below the target").to_owned();
        // The name of the interpreter's directory is the interpreter's.
        let path = path.replacen("include/python3/", "include/python/", 1);
        // A program names its interpreter in the first line.
        let digest = (!path.starts_with("bin/")).then_some(file.digest);
        (path, (digest, file.executable))
    });
    let files: Files = files.filter(|(path, _)| !is_installers(path)).collect();
    assert!(programs.iter().all(|program| files.contains_key(program)));
    Ok(files)
}

/// What pip makes of the same wheel files.
fn pips(wheels: &[Utf8PathBuf], dir: &Utf8Path) -> Files {
    let to = dir.join("pip");
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--no-index"]);
    pip.args(["--disable-pip-version-check", "--target", to.as_str(), "--only-binary=:all:"]);
    pip.args(["--implementation", "cp", "--python-version", "3.11"]);
    for platform in target().platforms() {
        pip.args(["--platform", &platform]);
    }
    let output = pip.args(wheels).output().expect("pip runs");
    assert!(output.status.success(), "pip: {}", String::from_utf8_lossy(&output.stderr));
    let mut files = Files::new();
    let mut waiting = vec![to.clone()];
    while let Some(folder) = waiting.pop() {
        for entry in folder.read_dir_utf8().expect("listed") {
            let entry = entry.expect("listed");
            if entry.file_type().expect("there").is_dir() {
                waiting.push(entry.path().to_owned());
                continue;
            }
            let path = entry.path().strip_prefix(&to).expect("below").to_string();
            let digest = digest_text(&std::fs::read(entry.path()).expect("read"));
            let mode = entry.metadata().expect("there").permissions().mode();
            let digest = (!path.starts_with("bin/")).then_some(digest);
            files.insert(path, (digest, mode & 0o111 != 0));
        }
    }
    files.retain(|path, _| !is_installers(path));
    files
}

/// Where two installations differ.
/// Scripts may be executed here whatever the wheel says, as the specification wants it (binary distribution format,
/// "recommended installer features"); pip goes by the wheel's mode.
fn differences(ours: &Files, pips: &Files) -> Vec<String> {
    let mut found = Vec::new();
    for (path, file) in ours {
        let script = path.starts_with("bin/") && file.1;
        match pips.get(path) {
            None => found.push(format!("only ours has {path}")),
            Some(other) if script && other.0 == file.0 => {}
            Some(other) if other != file => found.push(format!("{path}: {file:?}, pip {other:?}")),
            Some(_) => {}
        }
    }
    found.extend(
        pips.keys().filter(|p| !ours.contains_key(*p)).map(|p| format!("only pip has {p}")),
    );
    found
}

/// Drafts as files under their names.
fn written(drafts: &[Draft], dir: &Utf8Path) -> Vec<Utf8PathBuf> {
    let paths = drafts.iter().map(|draft| {
        let path = dir.join(&draft.file);
        std::fs::write(&path, draft.build()).expect("written");
        path
    });
    paths.collect()
}

/// Read as a build does: the lock vouches for the bytes.
fn vouched(path: &Utf8Path) -> anyhow::Result<CheckedWheel> {
    let sha256 = hash_bytes(&std::fs::read(path)?);
    CheckedWheel::open(path, path.file_name().expect("a name"), Some(&sha256))
}

#[test]
fn a_wheel_that_contradicts_itself_is_installed_as_pip_does_and_told() {
    let good = || Draft::new("foo", "");
    let info = "foo-1.0.dist-info";
    let mut more_tags = good();
    more_tags.file = "foo-1.0-py2.py3-none-any.whl".into();
    let mut other_tag = good().edit("/WHEEL", "py3-none-any", "cp311-cp311-linux_aarch64");
    other_tag.file = "foo-1.0-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl".into();
    let mut other_folder = good();
    for (path, ..) in &mut other_folder.members {
        *path = path.replace("foo-1.0.dist-info", "Foo-1.0.0.dist-info");
    }
    other_folder.info = "Foo-1.0.0.dist-info".into();
    let cases: Vec<(Draft, &str)> = vec![
        (
            more_tags,
            "the tags in the wheel are py3-none-any, but the file name has py2-none-any, \
             py3-none-any",
        ),
        (other_tag, "the tags in the wheel are cp311-cp311-linux_aarch64, but the file name has"),
        (good().edit("/WHEEL", "Tag: py3-none-any", "Tag: py3"), "'py3' is not a tag"),
        (good().edit("/WHEEL", "true", "maybe"), "Root-Is-Purelib is Some(\"maybe\")"),
        (other_folder, ""),
        (good().record(|t| t.replace(",20\n", ",21\n")), "21 bytes, but it has 20"),
        (good().record(|t| t.replace("sha256=", "sha256=x")), "the hash of the file is"),
        (good().record(|t| t.replace("sha256=", "md5=")), "the hash 'md5' is too weak"),
        (good().record(|t| format!("{t}/usr/lib/x.py,sha256=x,1\n")), "lists /usr/lib/x.py, which"),
        (good().record(|t| format!("{t}../x,sha256=x,1\n")), "lists ../x, which"),
        (good().record(|t| format!("foo/,,\n{t}")), "lists foo/, which the wheel does not have"),
        (good().record(|t| format!("{t}{t}")), "lists foo/__init__.py twice"),
        (good().record(|_| String::new()), "is in the wheel but not in foo-1.0.dist-info/RECORD"),
        (
            Draft::new("foo", "Requires-Python: >=3.6,\n"),
            "Requires-Python '>=3.6,' is not a version specifier; read as '>=3.6'",
        ),
        (Draft::new("foo", "Requires-Python: >=3.6.*\n"), "read as '>=3.6'"),
        (Draft::new("foo", "Requires-Python: new\n"), "ignored"),
        (Draft::new("foo", "Requires-Dist: bar (>=1.0.*)\n"), "read as 'bar >=1.0'"),
        (
            Draft::new("foo", "Requires-Dist: bar[x] >=1.0, ; extra == 'y'\n"),
            "read as 'bar[x] >=1.0 ; extra == 'y''",
        ),
        (Draft::new("foo", "Requires-Dist: bar (>dev)\n"), "read as 'bar'"),
        (
            good()
                .with(&format!("{info}/entry_points.txt"), "[console_scripts]\nx = a:b\n", 0o644)
                .with("foo-1.0.data/scripts/x", "#!python\n", 0o755),
            "",
        ),
        (good().with("Foo.data/data/share/x", "x", 0o644), ""),
        (good().with("foo-1.0.data/headers/x.h", "x", 0o644), ""),
        (good().with("foo-1.0.data/scripts/run", "#!/bin/sh\n", 0o644), ""),
        (good().with("foo/tool", "#!/bin/sh\n", 0o755).with("foo/other", "x", 0o744), ""),
        (
            good().with("foo/resources/Case.txt", "1", 0o644).with(
                "foo/resources/case.txt",
                "2",
                0o644,
            ),
            "",
        ),
        (good().with(&format!("{}x", "foo/".repeat(40)), "deep", 0o644), ""),
    ];
    for (draft, expected) in &cases {
        let scratch = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(scratch.path()).unwrap();
        let paths = written(std::slice::from_ref(draft), dir);
        let wheel = vouched(&paths[0]).unwrap();
        let doubts = wheel.doubts.join("; ");
        assert_eq!(expected.is_empty(), doubts.is_empty(), "{expected}: {doubts}");
        assert!(doubts.contains(expected), "expected: {expected}\nfound: {doubts}");
        let found = differences(&ours(vec![wheel]).unwrap(), &pips(&paths, dir));
        assert!(found.is_empty(), "{expected}: {found:#?}");
        // Only the wheel itself confirms these bytes: then it must not contradict itself.
        assert_eq!(draft.read().is_ok(), expected.is_empty(), "{expected}");
    }
    println!("{} wheels as pip installs them", cases.len());
}

/// Requires-Python still counts where it can be read.
#[test]
fn a_python_that_does_not_fit_is_refused_however_it_is_written() {
    let wheel = |headers: &str| {
        let bytes = Draft::new("foo", headers).build();
        CheckedWheel::read(&bytes, "foo-1.0-py3-none-any.whl", Some(&hash_bytes(&bytes))).unwrap()
    };
    let verdict = |headers: &str| wheel(headers).metadata.check_python(&target());
    verdict("Requires-Python: >=3.6.*\n").unwrap();
    verdict("Requires-Python: new\n").unwrap();
    assert!(message(verdict("Requires-Python: >=3.12.*,\n")).contains("the wheel requires Python"));
}

fn foo() -> Draft {
    Draft::new("foo", "Requires-Dist: bar\n")
}

/// What each part of a namespace package ships, as packaging.python.org has it.
const NAMESPACE: &str = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n";

#[test]
fn a_file_that_two_wheels_have_alike_is_both_s() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(scratch.path()).unwrap();
    let drafts = [foo(), Draft::new("bar", "")].map(|draft| {
        let part = format!("acme/{}.py", draft.info);
        draft.with("tests/__init__.py", "", 0o644).with("acme/__init__.py", NAMESPACE, 0o644).with(
            &part.replace(".dist-info", "").replace("-1.0", ""),
            "P = 1\n",
            0o644,
        )
    });
    let paths = written(&drafts, dir);
    let wheels = paths.iter().map(|path| vouched(path).unwrap()).collect();
    assert_eq!(differences(&ours(wheels).unwrap(), &pips(&paths, dir)), [""; 0]);

    // In an image: once, in both RECORDs, with its bytecode.
    let (cache, out) = (dir.join("cache"), dir.join("out.tar"));
    let lock = locked(&drafts, &cache);
    let installed = install_into(&lock, &cache, &out).unwrap();
    assert_eq!(installed.distributions.iter().map(|d| d.uncompiled).sum::<u64>(), 0);
    let tree = dir.join("tree");
    unpack(&out, &tree);
    let site = tree.join("usr/local/lib/python3.11/dist-packages");
    for name in ["foo", "bar"] {
        let record =
            std::fs::read_to_string(site.join(format!("{name}-1.0.dist-info/RECORD"))).unwrap();
        for file in [
            "acme/__init__.py,",
            "acme/__pycache__/__init__.cpython-311.pyc,",
            "tests/__init__.py,",
        ] {
            assert_eq!(record.matches(file).count(), 1, "{name}: {file}");
        }
    }

    // As a component: in both trees, which depend on nothing but their wheels.
    let made = make_component(&lock, dir, "both").unwrap();
    let alone = make_component(
        &locked(&[drafts[0].clone().edit("/METADATA", "Requires-Dist: bar\n", "")], &cache),
        dir,
        "alone",
    )
    .unwrap();
    assert_eq!(made.lock.wheels.len(), 2);
    assert_eq!(made.lock.wheels[1].files, alone.lock.wheels[0].files);
    for (role, tar) in &made.payloads[1..] {
        let listed = Command::new("tar").args(["-tf", tar.path.as_str()]).output().unwrap();
        assert!(
            String::from_utf8_lossy(&listed.stdout).contains("site/acme/__init__.py"),
            "{role}"
        );
    }
}

fn make_component(
    lock: &WheelLock,
    dir: &Utf8Path,
    out: &str,
) -> anyhow::Result<xtask::wheel::WheelComponent> {
    let cache = dir.join("cache");
    let wheels = fetch_wheels(lock, &Cache::in_dir(cache.clone()), true)?;
    let base = BasePython::read(BaseSource::Root(arm64_root().to_owned()))?;
    let out = dir.join(out);
    std::fs::create_dir_all(&out)?;
    make_payloads(&WheelComponentRequest {
        lock,
        wheels: &wheels,
        base: &base,
        cache: &cache,
        out: &out,
        log: None,
    })
}

#[test]
fn files_that_differ_are_told_with_both_wheels() {
    let drafts =
        [foo().with("LICENSE", "MIT", 0o644), Draft::new("bar", "").with("LICENSE", "BSD", 0o644)];
    let scratch = tempfile::tempdir().unwrap();
    let paths = written(&drafts, Utf8Path::from_path(scratch.path()).unwrap());
    let found = message(ours(paths.iter().map(|path| vouched(path).unwrap()).collect()));
    let expected = "bar-1.0-py3-none-any.whl and foo-1.0-py3-none-any.whl both install /t/LICENSE, \
     with different \
                    content or mode\nhelp: ";
    assert!(found.contains(expected), "{found}");
}

#[test]
fn what_no_robot_takes_is_no_component_and_told_when_it_is_locked() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(scratch.path()).unwrap();
    let deep = format!("foo/{}x", "d/".repeat(40));
    let long = format!("foo/{}/{}/{}", "a".repeat(200), "b".repeat(200), "c".repeat(200));
    let plain = || Draft::new("foo", "");
    let cases = [
        (
            plain().with("foo/Case.txt", "1", 0o644).with("foo/case.txt", "2", 0o644),
            "occurs twice",
            "capital letters",
        ),
        (plain().with(&deep, "x", 0o644), "33 parts, at most 32", "43 parts"),
        (plain().with(&long, "x", 0o644), "at most 512", "at most 512"),
        (
            plain().with("foo-1.0.data/data/.hidden", "x", 0o644),
            "the path begins with `.hidden`",
            "begins",
        ),
        (
            plain().with("foo-1.0.data/data/component.json", "x", 0o644),
            "the path begins with `component.json`",
            "begins",
        ),
    ];
    for (draft, refused, told) in cases {
        let lock = locked(std::slice::from_ref(&draft), &dir.join("cache"));
        let found = message(make_component(&lock, dir, "out"));
        assert!(
            found.starts_with("foo-1.0-py3-none-any.whl: robots would reject this wheel: "),
            "{found}"
        );
        assert!(found.contains(refused) && found.contains("\nhelp: build an image"), "{found}");
        // An image does.
        install_into(&lock, &dir.join("cache"), &dir.join("out.tar")).unwrap();
        let wheel = vouched(&written(&[draft], dir)[0]).unwrap();
        let told_of = find_unfit_files(
            &preview_files(vec![wheel], &InstallTarget::on_data(), "foo").unwrap(),
        );
        assert!(told_of.len() == 1 && told_of[0].contains(told), "{told_of:?}");
    }
}

/// Set for the process that locks under settings of a machine: its directory.
const SETTINGS: &str = "TEST_PIP_SETTINGS";

/// Settings of a user whose pip does other things; `{dir}` is a directory. Of sources they name only wheels in it.
const HOSTILE: &str = "[global]
index-url = http://127.0.0.1:9/simple
no-index = true
find-links = {dir}/wheels
user = true
require-hashes = true
require-virtualenv = true
quiet = 3
constraint = {dir}/constraints.txt
no-deps = true
no-binary = :all:
platform = win_amd64
abi = cp27
python-version = 2.7
pre = true

[install]
target = {dir}/target
root = {dir}/root
user = true

[download]
dest = {dir}/dest
";

/// Run by the test below in a process of its own: what is locked, or why nothing is.
#[test]
fn locks_under_the_settings_of_a_machine() {
    let Ok(dir) = std::env::var(SETTINGS) else { return };
    let dir = Utf8Path::new(&dir);
    let request = LockRequest {
        requirement: "foo==1.0".into(),
        target: target(),
        base: vec![],
        cache: dir.join("cache"),
        log: None,
    };
    let told =
        lock_wheels(&request).map_or_else(|error| format!("{error:#}"), |lock| lock.to_toml());
    std::fs::write(dir.join("told"), told).unwrap();
}

/// One lock, whatever the machine's pip is set to do and wherever that is written; but a source is the user's to name.
#[test]
fn pips_settings_say_where_from_and_nothing_else() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(scratch.path()).unwrap().canonicalize_utf8().unwrap();
    let dir = dir.as_path();
    std::fs::create_dir(dir.join("wheels")).unwrap();
    let newer = || {
        let mut draft = Draft::new("bar", "").edit("/METADATA", "Version: 1.0", "Version: 2.0a1");
        draft.file = draft.file.replace("1.0", "2.0a1");
        draft.info = draft.info.replace("1.0", "2.0a1");
        for (path, _, _) in &mut draft.members {
            *path = path.replace("-1.0.dist-info", "-2.0a1.dist-info");
        }
        draft
    };
    let drafts = [Draft::new("foo", "Requires-Dist: bar"), Draft::new("bar", ""), newer()];
    written(&drafts, &dir.join("wheels"));
    std::fs::write(dir.join("constraints.txt"), "bar==0.9\n").unwrap();
    let settings = HOSTILE.replace("{dir}", dir.as_str());
    let file = dir.join("settings");
    std::fs::write(&file, &settings).unwrap();
    let put = |path: &str, text: &str| {
        let path = dir.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    // Without them, and without those of the user that runs the test.
    let told = |home: &str, environment: &[(&str, &str)], before: &[&str]| {
        let this = std::env::current_exe().unwrap();
        let words = [before, &[this.to_str().unwrap()]].concat();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .args(["--exact", "wheel_pip::locks_under_the_settings_of_a_machine"]);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PIP_")) {
            command.env_remove(name);
        }
        command.env_remove("XDG_CONFIG_HOME").env_remove("VIRTUAL_ENV");
        command.env("HOME", dir.join(home)).env(SETTINGS, dir);
        let output = command.envs(environment.iter().copied()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let told = std::fs::read_to_string(dir.join("told")).unwrap();
        std::fs::remove_file(dir.join("told")).unwrap();
        // What was downloaded before must not be found again.
        std::fs::remove_dir_all(dir.join("cache")).ok();
        told
    };
    let links = dir.join("wheels");
    let sources = [("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", links.as_str())];
    let plain = told("none", &sources, &[]);
    assert!(plain.contains("\"bar\"\nversion = \"1.0\"") && plain.contains("\"foo\""), "{plain}");

    put("home/.config/pip/pip.conf", &settings);
    put("old/.pip/pip.conf", &settings);
    put("xdg/pip/pip.conf", &settings);
    // An environment that is active: its Python has the distribution's pip.
    let venv = dir.join("venv");
    let made = Command::new("/usr/bin/python3")
        .args(["-m", "venv", "--without-pip", "--system-site-packages", venv.as_str()])
        .status()
        .unwrap();
    assert!(made.success());
    put("venv/pip.conf", &settings);
    let path = format!("{venv}/bin:{}", std::env::var("PATH").unwrap());
    let xdg = dir.join("xdg");
    // The machine's own: this file mounted over /etc/pip.conf, seen by that process only.
    let etc = dir.join("etc");
    std::fs::create_dir(&etc).unwrap();
    let machine = format!(
        "cp -r /etc/. {etc} 2>{dir}/unreadable; cp {file} {etc}/pip.conf && mount --bind {etc} /etc && exec \"$@\""
    );
    let variables: Vec<(String, String)> = settings
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(key, value)| {
            (format!("PIP_{}", key.to_uppercase().replace('-', "_")), value.to_owned())
        })
        .collect();
    let variables: Vec<(&str, &str)> =
        variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);
    let cases: [Case<'_>; 7] = [
        ("home", "home", &[], &[]),
        ("home of old", "old", &[], &[]),
        ("XDG_CONFIG_HOME", "none", &[("XDG_CONFIG_HOME", xdg.as_str())], &[]),
        ("a virtual environment", "none", &[("PATH", &path)], &[]),
        ("PIP_CONFIG_FILE", "none", &[("PIP_CONFIG_FILE", file.as_str())], &[]),
        ("variables", "none", &variables, &[]),
        ("/etc", "none", &[], &["unshare", "-rm", "sh", "-c", &machine, "sh"]),
    ];
    for (name, home, environment, before) in cases {
        assert_eq!(told(home, environment, before), plain, "{name}");
        for made in ["target", "root", "dest"] {
            assert!(!dir.join(made).exists(), "{name}: pip has made {made}");
        }
    }
    // No server answers at the index that a file names, and no other one is asked.
    let dead = settings.replace("no-index = true\n", "retries = 0\n").replace("find-links", "#");
    put("dead/.config/pip/pip.conf", &dead);
    let refused = told("dead", &[], &[]);
    assert!(refused.contains("127.0.0.1") && refused.contains("foo"), "{refused}");
    // A variable outweighs the file.
    assert_eq!(told("dead", &sources, &[]), plain);
}

/// Locks what the index has, and compares what we install with what pip does.
#[test]
fn the_most_used_wheels_are_installed_as_pip_does() {
    if !all("wheel_pip::the_most_used_wheels_are_installed_as_pip_does") {
        return;
    }
    let list = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join(MOST_USED);
    let text = std::fs::read_to_string(&list).unwrap();
    let pins: Vec<&str> = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    assert!(pins.len() >= 150, "{} wheels", pins.len());
    let scratch = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(scratch.path()).unwrap();
    if std::env::var_os(INDEX).is_none() {
        // One wheel that needs all of them, in an index of its own: the environment is that of a new process.
        let headers: String = pins.iter().map(|pin| format!("Requires-Dist: {pin}\n")).collect();
        written(&[Draft::new("most_used", &headers)], dir);
        let links = std::env::var("PIP_FIND_LINKS").unwrap_or_default();
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "wheel_pip::the_most_used_wheels_are_installed_as_pip_does",
                "--nocapture",
            ])
            .env("PIP_FIND_LINKS", format!("{links} {dir}").trim())
            .env(INDEX, dir)
            .stderr(std::process::Stdio::inherit())
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
        return;
    }
    let cache = Utf8Path::new(env!("CARGO_TARGET_TMPDIR")).join("wheel-cache");
    let request = LockRequest {
        requirement: "most-used==1.0".into(),
        target: target(),
        base: vec![],
        cache: cache.clone(),
        log: None,
    };
    let lock = lock_wheels(&request).unwrap();
    let fetched = fetch_wheels(&lock, &Cache::in_dir(cache), true).unwrap();
    let (mut wheels, mut paths) = (Vec::new(), Vec::new());
    let (mut doubts, mut compiled) = (0, 0);
    for one in &fetched {
        let path = dir.join(&one.locked.file);
        std::os::unix::fs::symlink(&one.path, &path).unwrap();
        let wheel = vouched(&path).unwrap();
        doubts += usize::from(!wheel.doubts.is_empty());
        compiled += usize::from(one.locked.file.contains("aarch64"));
        wheels.push(wheel);
        paths.push(path);
    }
    let robots = find_unfit_files(
        &preview_files(wheels.clone(), &InstallTarget::on_data(), "most-used").unwrap(),
    );
    let ours = ours(wheels).unwrap();
    let found = differences(&ours, &pips(&paths, dir));
    println!(
        "{} wheels, {compiled} of them for aarch64, {} files; {doubts} contradict themselves, {} fit no robot; {} files differ from pip's",
        paths.len(),
        ours.len(),
        robots.len(),
        found.len()
    );
    assert!(found.is_empty(), "{found:#?}");
}
