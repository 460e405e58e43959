//! Provisioning from real wheels of the API, fetched by hash, by the real agent; what compose tells it; and
//! the environment of the API's services, in real shells.

use crate::common::agent;
use crate::common::{folder, root};

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use agent::slotd;
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};
use xtask::artifact::hash_bytes;
use xtask::cache::Cache;
use xtask::compose::api::describe_api;
use xtask::rootfs::tree::{EntryOrigin, FileData, RootEntry, RootEntryKind, RootTree};
use xtask::wheel::{
    CheckedWheel, InstalledDistribution, LockedWheel, WheelLock, WheelTarget, fetch_wheels,
};

/// Version, tag, length and SHA-256 of each wheel.
const WHEELS: &[(&str, &str, u64, &str)] = &[
    (
        "2.5.2",
        "py2.py3",
        110_150,
        "8b13d07bff9578035962508a0b15c85f2be2b06e190e2a868c1e7ec79dde6a92",
    ),
    (
        "3.7.0",
        "py2.py3",
        941_449,
        "f86d395837ecc904c8b8aae2c47a86ee462003d79ab0fc5051d6b1201153f800",
    ),
    (
        "3.10.3",
        "py2.py3",
        1_047_117,
        "b78a7b4a96b0a58ea0a383f9c6e20aa0cd506fefa853ae2f6153a866931b0c18",
    ),
    (
        "3.12.0",
        "py2.py3",
        1_080_314,
        "5c0c24c019d144d72afbc7e41bc70ee43a2b7776c703d577657d8735599e7434",
    ),
    (
        "10.1.0",
        "py3",
        2_012_121,
        "3957c63b32e353225b6851660599b8e5e0ef498c82d4551a3346b7ee077e3332",
    ),
];

/// The distribution, which is also the module.
const API: &str = "opentrons";
const SITE: &str = "usr/local/lib/python3.11/dist-packages";

/// What `resources` of 3.7.0 hold: mode and name.
const OLD: &[&str] = &[
    "644 api.service",
    "644 inetd.conf",
    "644 jupyter/jupyter_notebook_config.py",
    "644 nginx.conf",
    "644 ot-environ.sh",
    "755 scripts/announce_mdns.py",
    "755 scripts/calibrate",
    "755 scripts/lpc21isp",
    "755 scripts/miniterm",
    "755 scripts/mount_usb.py",
    "755 scripts/pipette_memory",
    "755 scripts/provision-api-resources",
    "755 scripts/setup.sh",
    "755 scripts/setup_gpio.py",
    "755 scripts/start.sh",
    "755 scripts/switches_lights",
    "644 smoothie-edge-6168d32.hex",
];

/// What later versions have.
const NEW: &[&str] = &["755 scripts/lpc21isp", "644 smoothie-edge-8414642.hex"];

/// A wheel as the shared cache has it, every file checked against its RECORD.
fn wheel(version: &str) -> CheckedWheel {
    let (_, tag, size, sha256) = WHEELS.iter().find(|w| w.0 == version).unwrap();
    let locked = LockedWheel {
        name: API.to_owned(),
        version: version.to_owned(),
        file: format!("{API}-{version}-{tag}-none-any.whl"),
        size: *size,
        sha256: (*sha256).to_owned(),
        requires_python: None,
        needed_by: vec![],
    };
    let target = WheelTarget {
        python: "3.11".parse().unwrap(),
        implementation: "cp".into(),
        arch: "aarch64".into(),
        libc: "glibc 2.36".parse().unwrap(),
    };
    let lock = WheelLock::new(&format!("{API}=={version}"), target, vec![locked.clone()]);
    let fetched = fetch_wheels(&lock, &Cache::locate().unwrap(), false).unwrap();
    CheckedWheel::open(&fetched[0].path, &locked.file, Some(sha256)).unwrap()
}

/// A robot of files with the overlay's own environment.
struct Robot {
    dir: Utf8PathBuf,
    _keep: tempfile::TempDir,
}

impl Robot {
    fn new() -> Self {
        let (_keep, dir) = folder();
        let robot = Self { dir, _keep };
        let env = "usr/lib/slipway/api.env";
        robot.file(env, &fs::read(root().join("overlays/base").join(env)).unwrap());
        robot.file("usr/lib/slipway/base-id", b"one\n");
        fs::create_dir_all(robot.dir.join("data")).unwrap();
        robot
    }

    fn file(&self, path: &str, content: &[u8]) {
        let path = self.dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Installs a wheel into a directory of modules and replaces its content; `modes`: as in the
    /// archive.
    fn install(&self, wheel: &CheckedWheel, site: &str, modes: bool) {
        drop(fs::remove_dir_all(self.dir.join(site)));
        for (path, file) in &wheel.files {
            let path = format!("{site}/{path}");
            self.file(&path, &file.bytes);
            let mode = if modes && file.executable { 0o775 } else { 0o664 };
            fs::set_permissions(self.dir.join(path), fs::Permissions::from_mode(mode)).unwrap();
        }
    }

    /// The image's own API.
    fn built_in(&self, version: &str) {
        self.install(&wheel(version), SITE, true);
        self.describe(version);
    }

    fn describe(&self, version: &str) {
        let tree = tree_of(SITE, &format!("{API}-{version}"), API);
        let text = describe_api(&tree, &[distribution(API, version, true)], None, None).unwrap();
        self.file("usr/lib/slipway/api.toml", text.as_bytes());
    }

    fn slotd(&self, args: &[&str]) -> (i32, Value) {
        let output = Command::new(slotd())
            .args(["--format", "json", "--root", self.dir.as_str()])
            .args(args)
            .output()
            .unwrap();
        let printed = serde_json::from_slice(&output.stdout);
        (output.status.code().unwrap(), printed.unwrap_or_else(|_| panic!("{output:?}")))
    }

    fn provision(&self) -> Value {
        let (code, printed) = self.slotd(&["provision"]);
        assert_eq!(code, 0, "{printed}");
        let (code, checked) = self.slotd(&["provision", "--check"]);
        assert_eq!(code, 0, "{checked}");
        printed
    }

    /// `mode name` of every file, and its hash.
    fn system(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let mut waiting = vec![self.dir.join("data/system")];
        while let Some(folder) = waiting.pop() {
            for entry in folder.read_dir_utf8().into_iter().flatten() {
                let path = entry.unwrap().into_path();
                let about = path.symlink_metadata().unwrap();
                let mode = about.permissions().mode() & 0o7777;
                if about.is_dir() {
                    assert_eq!(mode, 0o755, "{path}");
                    waiting.push(path);
                } else {
                    let name = path.strip_prefix(self.dir.join("data/system")).unwrap();
                    found.insert(format!("{mode:o} {name}"), hash_bytes(&fs::read(&path).unwrap()));
                }
            }
        }
        found
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.system().into_keys().collect();
        names.sort_by(|a, b| a[4..].cmp(&b[4..]));
        names
    }
}

/// What a wheel has as resources, and their hashes.
fn resources(wheel: &CheckedWheel) -> BTreeMap<String, String> {
    let prefix = format!("{API}/resources/");
    let files = wheel.files.iter().filter_map(|(path, file)| {
        let name = path.strip_prefix(&prefix)?;
        let mode = if file.executable { 755 } else { 644 };
        Some((format!("{mode} {name}"), hash_bytes(&file.bytes)))
    });
    files.collect()
}

fn distribution(name: &str, version: &str, top_level: bool) -> InstalledDistribution {
    InstalledDistribution {
        name: name.to_owned(),
        version: version.to_owned(),
        wheel: format!("{name}-{version}-py3-none-any.whl"),
        sha256: hash_bytes(name.as_bytes()),
        summary: None,
        license: None,
        installed_bytes: 0,
        files: 0,
        uncompiled: 0,
        top_level,
        resources: None,
    }
}

fn tree_of(site: &str, info: &str, module: &str) -> RootTree {
    let mut tree = RootTree::default();
    for (path, kind) in [
        (
            format!("{site}/{info}.dist-info/REQUESTED"),
            RootEntryKind::File(FileData::Bytes(Vec::new())),
        ),
        (format!("{site}/{module}"), RootEntryKind::Folder),
    ] {
        tree.insert(&path, RootEntry::new(0o755, kind, EntryOrigin::Api)).unwrap();
    }
    tree
}

#[test]
fn the_historical_wheels_are_provisioned_exactly() {
    let robot = Robot::new();
    robot.built_in("3.7.0");
    let printed = robot.provision();
    assert_eq!(
        (printed["outcome"].as_str(), printed["files"].as_u64()),
        (Some("provisioned"), Some(17))
    );
    assert_eq!(robot.names(), OLD);
    assert_eq!(robot.system(), resources(&wheel("3.7.0")));
    assert_eq!(robot.provision()["outcome"], "unchanged");

    // Two files change, and the firmware is another one.
    robot.built_in("3.10.3");
    let (code, drift) = robot.slotd(&["provision", "--check"]);
    let message = drift["refused"]["message"].as_str().unwrap();
    assert_eq!((code, message.lines().count()), (4, 5), "{message}");
    assert_eq!(
        robot.provision()["changes"],
        json!([
            { "path": "nginx.conf", "how": "content" },
            { "path": "scripts/start.sh", "how": "content" },
            { "path": "smoothie-edge-6168d32.hex", "how": "superfluous" },
            { "path": "smoothie-edge-8414642.hex", "how": "missing" },
        ])
    );
    assert_eq!(robot.system(), resources(&wheel("3.10.3")));

    for version in ["3.12.0", "10.1.0"] {
        robot.built_in(version);
        robot.provision();
        assert_eq!(robot.names(), NEW, "{version}");
        assert_eq!(robot.system(), resources(&wheel(version)), "{version}");
    }
    // 10.1.0 has another package of that name, which has never been one of ours.
    assert!(robot.dir.join(format!("{SITE}/{API}/protocol_engine/resources")).is_dir());
}

#[test]
fn a_wheel_without_resources_changes_nothing_and_says_so() {
    let robot = Robot::new();
    robot.built_in("3.7.0");
    robot.provision();
    robot.built_in("2.5.2");
    assert_eq!(robot.provision()["outcome"], "no-resources");
    assert_eq!(robot.names(), OLD);
    let printed =
        Command::new(slotd()).args(["--root", robot.dir.as_str(), "provision"]).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert_eq!(printed, format!("/{SITE}/{API} has no resources: /data/system stays unchanged\n"));
    // One that has only the other package of that name.
    let mut other = wheel("10.1.0");
    other.files.retain(|path, _| !path.starts_with(&format!("{API}/resources/")));
    robot.install(&other, SITE, true);
    assert_eq!(robot.provision()["outcome"], "no-resources");
    assert_eq!(robot.names(), OLD);
}

#[test]
fn lost_modes_come_back_and_junk_stays_behind() {
    let robot = Robot::new();
    let mut junk = wheel("3.7.0");
    let some = junk.files.values().next().unwrap().clone();
    for name in [".DS_Store", "scripts/.DS_Store", "scripts/__pycache__/setup_gpio.cpython-311.pyc"]
    {
        junk.files.insert(format!("{API}/resources/{name}"), some.clone());
    }
    robot.describe("3.7.0");
    robot.install(&junk, SITE, false);
    let printed = robot.provision();
    assert_eq!(
        printed["left-out"],
        json!([".DS_Store", "scripts/.DS_Store", "scripts/__pycache__"])
    );
    assert_eq!(robot.system(), resources(&wheel("3.7.0")));
}

#[test]
fn no_package_is_ever_imported() {
    for start in [
        "raise SystemExit(9)\n",
        "open('@', 'w').write('imported')\n",
        "import nothing of that name\n",
    ] {
        let robot = Robot::new();
        let mut hostile = wheel("3.7.0");
        let trace = robot.dir.join("imported");
        let start = start.replace('@', trace.as_str());
        for (path, file) in &mut hostile.files {
            if path.ends_with("/__init__.py") {
                file.bytes = start.clone().into_bytes();
            }
        }
        robot.describe("3.7.0");
        robot.install(&hostile, SITE, true);
        robot.file(
            &format!("{SITE}/hostile.pth"),
            format!("import os; open('{trace}', 'w').write('run')\n").as_bytes(),
        );
        assert_eq!(robot.provision()["files"], 17);
        assert!(!trace.exists(), "something of the package was run");
        assert!(!robot.dir.join(SITE).join(API).join("__pycache__").exists());
    }
}

#[test]
fn the_api_on_data_wins_and_its_loss_is_none() {
    let robot = Robot::new();
    robot.built_in("10.1.0");
    robot.install(&wheel("3.7.0"), "data/apps/api/3.7.0/site", true);
    symlink("3.7.0", robot.dir.join("data/apps/api/current")).unwrap();
    assert_eq!(robot.provision()["package"], format!("/data/apps/api/current/site/{API}"));
    assert_eq!(robot.names(), OLD);
    fs::remove_dir_all(robot.dir.join("data/apps")).unwrap();
    assert_eq!(robot.slotd(&["provision", "--boot"]).1["outcome"], "provisioned");
    assert_eq!(robot.names(), NEW);
}

#[test]
fn compose_describes_what_was_installed() {
    let site = "usr/lib/python3.12/site-packages";
    let all = [distribution("other", "2.0", false), distribution("My-API", "1.5", true)];
    let tree = tree_of(site, "my_api-1.5", "my_api");
    let text = describe_api(&tree, &all, Some("1.2"), Some("glibc 2.36")).unwrap();
    let value: toml::Table = text.parse().unwrap();
    for (key, expected) in [
        ("package", "My-API"),
        ("module", "my_api"),
        ("version", "1.5"),
        ("site-packages", "/usr/lib/python3.12/site-packages"),
        ("python", "3.12"),
        ("libc", "glibc 2.36"),
        ("minimum-version", "1.2"),
    ] {
        assert_eq!(value[key].as_str(), Some(expected), "{key}");
    }
    let wheels = value["wheels"].as_array().unwrap();
    assert_eq!(wheels.len(), 2);
    assert_eq!(wheels[0]["name"].as_str(), Some("My-API"));
    assert_eq!(wheels[1]["sha256"].as_str(), Some(all[0].sha256.as_str()));

    let elsewhere =
        describe_api(&tree_of(site, "my_api-1.5", "another"), &all, None, None).unwrap_err();
    assert!(elsewhere.to_string().starts_with("My-API installs no module my_api"), "{elsewhere}");
    let none = describe_api(&RootTree::default(), &all, None, None).unwrap_err();
    assert_eq!(none.to_string(), "My-API is not in the tree");
    let version =
        describe_api(&tree_of("usr/lib/modules", "my_api-1.5", "my_api"), &all, None, None);
    assert_eq!(
        version.unwrap_err().to_string(),
        "/usr/lib/modules does not contain a version of Python"
    );
}

/// Sources the profile's script so many times in a shell, and returns the environment of what it starts.
fn environment(shell: &str, times: usize, preset: &[(&str, &str)]) -> BTreeMap<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let base = root().join("overlays/base");
    let script = fs::read_to_string(base.join("etc/profile.d/slipway-api.sh")).unwrap();
    let env = base.join("usr/lib/slipway/api.env");
    let script = script.replace("/usr/lib/slipway/api.env", &format!("'{env}'"));
    let path = dir.path().join("slipway-api.sh");
    fs::write(&path, script).unwrap();
    // Strict options, and separators that cut words anywhere.
    let text = format!(
        "set -eu; IFS=/:a=\n{}exec /usr/bin/env -0",
        format!(". '{}'\n", path.display()).repeat(times)
    );
    let output = Command::new(shell)
        .args(["-c", &text])
        .env_clear()
        .envs(preset.iter().copied())
        .output()
        .unwrap_or_else(|error| panic!("{shell}: {error}"));
    assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let pairs = text.split_terminator('\0').filter_map(|pair| pair.split_once('='));
    // What every shell sets for itself.
    let own = |name: &str| ["_", "SHLVL", "OLDPWD", "PWD"].contains(&name);
    pairs.filter(|(k, _)| !own(k)).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

const OURS: &str = "/data/apps/api/current/bin:/data/system/scripts:/usr/local/sbin:/usr/local/bin:\
                    /usr/sbin:/usr/bin:/sbin:/bin";

#[test]
fn the_environment_is_fixed_whatever_was_set_before() {
    let text = fs::read_to_string(root().join("overlays/base/usr/lib/slipway/api.env")).unwrap();
    let fixed: BTreeMap<&str, &str> =
        text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split_once('=')).collect();
    assert_eq!(fixed["PATH"], OURS);
    assert_eq!(fixed["SLIPWAY_API_PORT"], "31950");
    assert_eq!(fixed["PYTHONPATH"], "/data/apps/api/current/site");
    // systemd takes such lines as they are: no quotes, no expansion, no blanks around them.
    for (key, value) in &fixed {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:".contains(c);
        assert!(key.chars().all(|c| c.is_ascii_uppercase() || c == '_'), "{key}");
        assert!(!value.is_empty() && value.chars().all(plain), "{key}={value}");
    }
    let hostile: &[(&str, &str)] = &[
        ("SLIPWAY_API_PORT", "80"),
        ("SLIPWAY_SYSTEM", "/tmp"),
        ("PYTHONPATH", "/tmp/evil:"),
        ("PYTHONNOUSERSITE", ""),
        (
            "PATH",
            "::/opt/x y:/usr/bin:.:/data/system/scripts:/data/apps/api/current/bin:/usr/bin::$(id):*",
        ),
        ("slipway_line", "PATH=/tmp"),
        ("slipway_rest", "/tmp"),
        ("OTHER", "kept; $(touch /nowhere)"),
    ];
    for shell in ["/bin/sh", "/bin/bash"] {
        for (preset, rest) in [(hostile, ":/opt/x y:.:$(id):*"), (&[][..], "")] {
            let once = environment(shell, 1, preset);
            assert_eq!(environment(shell, 2, preset), once, "{shell}: twice is not once");
            assert_eq!(environment(shell, 5, preset), once);
            for (key, value) in fixed.iter().filter(|(key, _)| !["PATH", "LANG"].contains(*key)) {
                assert_eq!(once[*key], *value, "{shell}: {key}");
            }
            // bash without a PATH has one of its own.
            if !preset.is_empty() {
                assert_eq!(once["PATH"], format!("{OURS}{rest}"), "{shell}");
                assert_eq!(once["OTHER"], "kept; $(touch /nowhere)");
            }
            assert!(once["PATH"].starts_with(OURS), "{shell}: {}", once["PATH"]);
        }
    }
}

#[test]
fn python_takes_the_persistent_copy_and_else_the_built_in_one() {
    // Both real: the interpreter of this machine, and the variables of the environment file.
    let dir = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(dir.path()).unwrap();
    let env = environment("/bin/sh", 1, &[("PYTHONPATH", "/tmp")]);
    let first = env["PYTHONPATH"].replace("/data", dir.join("data").as_str());
    let built_in = dir.join("image");
    for place in [Utf8Path::new(&first), &built_in] {
        fs::create_dir_all(place.join("robotapi")).unwrap();
        fs::write(place.join("robotapi/__init__.py"), "").unwrap();
    }
    let where_is = || {
        let script = format!(
            "import sys, importlib.util as u; sys.path.append('{built_in}'); print(u.find_spec('robotapi').origin)"
        );
        let output = Command::new("python3")
            .args(["-c", &script])
            .env_remove("PYTHONHOME")
            .env("PYTHONPATH", &first)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(where_is(), format!("{first}/robotapi/__init__.py"));
    fs::remove_dir_all(dir.join("data")).unwrap();
    assert_eq!(where_is(), format!("{built_in}/robotapi/__init__.py"));
}
