//! The overlays' files for a robot, tested on this machine: the boot steps below a directory
//! instead of `/`, the units as systemd reads them, the SSH server's settings as sshd reads them.

use crate::common::{make_program, root};
use crate::overlay_support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use bundle::manifest::BuildKind;
use camino::Utf8PathBuf;
use overlay_support::{Robot, output_text, plans};
use xtask::local::units;
use xtask::render::{OverlayContent, render};

#[test]
fn an_identity_is_made_once_and_kept() {
    let robot = Robot::development();
    let (name, title) = (robot.read("etc/hostname"), "Robot development system\n");
    assert_eq!(robot.step("identity", &[]), "");
    assert_eq!(robot.read("data/identity/machine-id"), format!("{}\n", "0a".repeat(16)));
    assert_eq!(robot.read("data/identity/hostname"), name);
    assert_eq!(robot.read("data/identity/display-name"), title);
    assert_eq!(robot.read("run/slipway/hostname"), name);
    // An update brings another name and starts with another id until it has looked: nothing changes.
    robot.put("etc/hostname", "other\n");
    robot.put("etc/machine-id", &format!("{}\n", "0b".repeat(16)));
    assert_eq!(robot.step("identity", &[]), "");
    assert_eq!(robot.read("data/identity/machine-id"), format!("{}\n", "0a".repeat(16)));
    assert_eq!(robot.read("run/slipway/hostname"), name);
    // The user's, from the next start on.
    robot.put("data/identity/hostname", "Left-Bench-2\n");
    robot.put("data/identity/display-name", "Labor 2, 50 % frei\n");
    assert_eq!(robot.step("identity", &[]), "");
    assert_eq!(robot.read("run/slipway/hostname"), "Left-Bench-2\n");
    assert_eq!(robot.read("run/slipway/machine-info"), "PRETTY_HOSTNAME=\"Labor 2, 50 % frei\"\n");
    let announced = robot.read("run/systemd/dnssd/slipway-http.dnssd");
    assert!(announced.contains("\nName=Labor 2, 50 %% frei\nType=_http._tcp\nPort=80\n"));
    let left: Vec<_> = fs::read_dir(robot.at("data/identity")).expect("a directory").collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn an_identity_that_makes_no_sense_is_reported_and_left_alone() {
    let robot = Robot::development();
    let long = "x".repeat(64);
    for bad in ["", "two words", "-x", "x-", "a.b", "ü", "$(reboot)", long.as_str()] {
        robot.put("data/identity/hostname", &format!("{bad}\n"));
        let printed = robot.step("identity", &[]);
        assert!(printed.contains("is not a valid host name"), "{bad}: {printed}");
        assert_eq!(robot.read("data/identity/hostname"), format!("{bad}\n"));
        assert_eq!(robot.read("run/slipway/hostname"), robot.read("etc/hostname"));
    }
    for bad in ["", "a \"b\"", "a\\", "a\tb", "`x`", long.as_str()] {
        robot.put("data/identity/display-name", &format!("{bad}\n"));
        let printed = robot.step("identity", &[]);
        assert!(printed.contains("is not a valid display name"), "{bad}: {printed}");
        let info = robot.read("run/slipway/machine-info");
        assert_eq!(info, "PRETTY_HOSTNAME=\"Robot development system\"\n");
    }
    // What a power cut has left of a first boot; a machine id is replaced, for systemd runs with another one.
    robot.put("data/identity/machine-id.new", "0a0");
    robot.put("data/identity/machine-id", "nonsense\n");
    assert!(robot.step("identity", &[]).contains("is not a valid machine id"));
    assert_eq!(robot.read("data/identity/machine-id"), format!("{}\n", "0a".repeat(16)));
    assert!(!robot.at("data/identity/machine-id.new").exists());
}

#[test]
fn without_a_place_to_keep_it_the_image_names_the_machine() {
    let robot = Robot::development();
    // As when data is full or fails: nothing can be written there.
    robot.put("data/identity", "a file where the directory should be");
    let printed = robot.step("identity", &[]);
    for name in ["machine-id", "hostname", "display-name"] {
        assert!(printed.contains(&format!("data/identity/{name} cannot be written")), "{printed}");
    }
    assert_eq!(robot.read("run/slipway/hostname"), robot.read("etc/hostname"));
    let info = robot.read("run/slipway/machine-info");
    assert_eq!(info, "PRETTY_HOSTNAME=\"Robot development system\"\n");
    robot.step("network", &[]);
    robot.step("links", &[]);
    robot.step("boot-scripts", &[]);
}

#[test]
fn connections_are_shown_and_broken_ones_reported() {
    let robot = Robot::development();
    assert_eq!(robot.step("network", &[]), "", "a missing connection is not a mistake");
    robot
        .put("data/network/10-lab.network", "[Match]\nName=eth1\n[Network]\nAddress=10.0.0.2/24\n");
    robot.put("data/network/20-bridge.netdev", "[NetDev]\nName=br0\nKind=bridge\n");
    robot.put("data/network/wpa_supplicant-wlan0.conf", "network={\n}\n");
    robot.put("data/network/30-empty.network", "");
    robot.put("data/network/notes.txt", "?");
    robot.put("data/network/80-slipway-wired.network", "[Match]\nName=*\n");
    symlink("nowhere", robot.at("data/network/40-lost.network")).expect("linked");
    robot.put("run/systemd/network/70-others.network", "[Match]\n");
    let before = fs::read_dir(robot.at("data/network")).expect("a directory").count();
    // Once and again: the same.
    for _ in 0..2 {
        let printed = robot.step("network", &[]);
        for (name, why) in [
            ("30-empty.network", "the file has no section [Match]"),
            ("notes.txt", "is not read: expected"),
            ("80-slipway-wired.network", "the image has a file with this name"),
            ("40-lost.network", "is a broken link"),
        ] {
            let line = printed.lines().find(|line| line.contains(name)).unwrap_or_default();
            assert!(line.starts_with("<4>") && line.contains(why), "{name}: {printed}");
        }
        assert_eq!(printed.lines().count(), 4, "{printed}");
        let link = |name: &str| fs::read_link(robot.at("run/systemd/network").join(name)).ok();
        assert_eq!(link("10-lab.network"), Some("/data/network/10-lab.network".into()));
        assert_eq!(link("20-bridge.netdev"), Some("/data/network/20-bridge.netdev".into()));
        let shown = fs::read_dir(robot.at("run/systemd/network")).expect("a directory").count();
        assert_eq!(shown, 3);
    }
    fs::remove_file(robot.at("data/network/10-lab.network")).expect("removed");
    robot.step("network", &[]);
    assert!(fs::symlink_metadata(robot.at("run/systemd/network/10-lab.network")).is_err());
    assert!(robot.at("run/systemd/network/70-others.network").exists());
    assert_eq!(fs::read_dir(robot.at("data/network")).expect("a directory").count(), before - 1);
}

#[test]
fn links_into_the_resources_are_listed_and_missing_targets_reported() {
    for plan in plans() {
        let robot = Robot::new(&plan);
        let mut listed: Vec<String> = Vec::new();
        if let Ok(lists) = fs::read_dir(robot.at("usr/lib/slipway/links.d")) {
            for list in lists {
                let text = fs::read_to_string(list.expect("an entry").path()).expect("a list");
                listed.extend(text.lines().filter(|l| l.starts_with('/')).map(str::to_owned));
            }
        }
        let mut found: Vec<String> = Vec::new();
        for file in render(&root(), &plan).expect("rendered").overlay {
            if let OverlayContent::Symlink(to) = &file.content
                && to.starts_with("/data/system/")
            {
                found.push(format!("/{}", file.target));
            }
        }
        listed.sort();
        found.sort();
        assert_eq!(listed, found, "left: links.d of {}; right: its links", plan.product.name);
        let printed = robot.step("links", &[]);
        assert_eq!(printed.matches("which is missing").count(), found.len(), "{printed}");
        let missing = robot.read("run/slipway/missing-links");
        assert_eq!(missing.lines().count(), found.len(), "{missing}");
        for link in &found {
            let target = fs::read_link(robot.at(&link[1..])).expect("a link");
            robot.put(&target.to_str().expect("UTF-8")[1..], "there");
        }
        assert_eq!(robot.step("links", &[]), "");
        assert_eq!(robot.read("run/slipway/missing-links"), "");
    }
}

#[test]
fn boot_scripts_run_in_order_and_hold_up_nothing() {
    let robot = Robot::development();
    assert_eq!(robot.step("boot-scripts", &["1"]), "");
    let script = |name: &str, mode: u32, text: &str| {
        let path = robot.at("data/boot.d").join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        make_program(&path, format!("#!/bin/sh\n{text}\n"));
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    };
    script("10-first", 0o755, "echo one");
    script("20-fails", 0o755, "echo two; exit 7");
    script("30-hangs", 0o755, "echo three; exec sleep 60");
    script("40-plain", 0o644, "echo never");
    script("50-anybodys", 0o777, "echo never");
    script("60-last", 0o700, "cat; echo four");
    let printed = robot.step("boot-scripts", &["1"]);
    let expected = [
        "10-first starts",
        "one",
        "10-first has finished",
        "20-fails starts",
        "two",
        "20-fails has failed with exit code 7",
        "30-hangs starts",
        "three",
        "30-hangs was stopped after 1 s",
        "40-plain is not executable: left out",
        "50-anybodys is writable by other users than root: left out",
        "60-last starts",
        "four",
        "60-last has finished",
    ];
    let mut lines: Vec<&str> = printed
        .lines()
        .map(|l| l.split_once("boot-scripts: ").map_or(l, |(_, text)| text))
        .collect();
    let mut wanted = expected.to_vec();
    // Standard output and standard error are two streams here.
    lines.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(lines, wanted, "{printed}");
    let starts: Vec<&str> = printed.lines().filter(|line| line.ends_with("starts")).collect();
    assert!(starts.is_sorted(), "{starts:?}");
}

/// What `systemd-analyze security` may say at most, in tenths: 0 is fully confined, 100 not at all.
const EXPOSURE: [(&str, u32); 8] = [
    ("slipway-api.service", 15),
    ("slipway-proxy.service", 17),
    ("slipway-links.service", 30),
    ("slipway-provision.service", 30),
    ("slipway-network.service", 35),
    ("slipway-ssh-keys.service", 30),
    ("slipway-identity.service", 45),
    ("slipway-wifi@.service", 50),
];

#[test]
fn units_are_valid_and_confined() {
    for plan in plans() {
        let robot = Robot::new(&plan);
        // What the base has: systemd's own targets, and the programs that units start.
        let ours = robot.at("usr/lib/systemd/system");
        for entry in fs::read_dir("/usr/lib/systemd/system").expect("systemd is installed") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "target") && path.is_file() {
                fs::copy(&path, ours.join(path.file_name().unwrap().to_str().unwrap())).unwrap();
            }
        }
        // And the API server of a product that brings none yet.
        let started = [
            "usr/sbin/nginx",
            "usr/sbin/wpa_supplicant",
            "usr/bin/slotd",
            "usr/lib/slipway/api-server",
        ];
        for program in started.into_iter().filter(|program| !robot.at(program).exists()) {
            robot.put(program, "");
            fs::set_permissions(robot.at(program), Permissions::from_mode(0o755)).unwrap();
        }
        let mut units: Vec<Utf8PathBuf> = fs::read_dir(&ours)
            .expect("units")
            .map(|entry| Utf8PathBuf::from_path_buf(entry.expect("one").path()).expect("UTF-8"))
            .filter(|path| path.file_name().is_some_and(|name| name.starts_with("slipway-")))
            .collect();
        units.sort();
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--root"])
            .arg(robot.at(""))
            .args(&units)
            .output()
            .expect("systemd-analyze runs: cargo xtask doctor --install");
        assert!(
            output.status.success() && output_text(&output).is_empty(),
            "{}",
            output_text(&output)
        );
        for (unit, most) in EXPOSURE {
            let output = Command::new("systemd-analyze")
                .args(["security", "--no-pager", "--offline=true"])
                .args([format!("--threshold={most}"), ours.join(unit).into_string()])
                .output()
                .expect("systemd-analyze runs");
            let printed = output_text(&output);
            assert!(output.status.success(), "{}", printed.lines().last().unwrap_or_default());
        }
    }
}

#[test]
fn a_local_system_understands_every_unit() {
    for plan in plans() {
        let robot = Robot::new(&plan);
        // As compose enables them.
        let preset = robot.read("usr/lib/systemd/system-preset/10-slipway.preset");
        let enabled: Vec<&str> =
            preset.lines().filter_map(|line| line.strip_prefix("enable ")).collect();
        // A local system does not support sockets: it has no logins.
        let enabled: Vec<&str> = enabled.into_iter().filter(|u| u.ends_with(".service")).collect();
        for unit in &enabled {
            robot.put(&format!("etc/systemd/system/multi-user.target.wants/{unit}"), "");
        }
        let overlay = plan.overlay.iter().map(|file| file.target.clone()).collect();
        let system = units::read_services(&robot.at(""), &overlay).expect("a system");
        assert_eq!(system.notes, [""; 0], "{}", plan.product.name);
        let names: Vec<&str> = system.units.iter().map(|unit| unit.name.as_str()).collect();
        let missing: Vec<_> = enabled.iter().filter(|unit| !names.contains(*unit)).collect();
        assert!(missing.is_empty() && enabled.len() > 8, "{missing:?} of {enabled:?}");
        let at = |name: &str| names.iter().position(|n| *n == format!("slipway-{name}.service"));
        assert!(at("state") < at("identity") && at("state") < at("provision"), "{names:?}");
        assert!(at("provision") < at("api") && at("provision") < at("proxy"), "{names:?}");
        // What serves a card, links or wireless devices has none to serve.
        let here = |name: &str| {
            let unit = at(name).and_then(|at| system.units.get(at)).expect("a unit");
            !unit.conditions.iter().any(|c| c.test == units::ConditionTest::Container && c.negated)
        };
        assert!(["state", "identity", "provision", "links", "api", "proxy"].into_iter().all(here));
        assert!(!["seed", "network", "ssh-keys"].into_iter().any(here));
        let after: Vec<_> = system.mounts.iter().filter_map(|mount| mount.after.as_ref()).collect();
        assert!(after.iter().all(|unit| names.contains(&unit.as_str())), "fstab: {after:?}");
    }
}

const SSHD: &str = "etc/ssh/sshd_config.d/10-slipway.conf";

#[test]
fn a_release_takes_keys_only() {
    let folder = tempfile::tempdir().expect("a directory");
    let key = folder.path().join("key");
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(&key)
        .status()
        .expect("ssh-keygen runs");
    assert!(made.success());
    // Root's sshd wants it.
    if rustix::process::geteuid().is_root() {
        fs::create_dir_all("/run/sshd").expect("made");
    }
    let mut releases = 0;
    for plan in plans() {
        let robot = Robot::new(&plan);
        // As the server itself reads it, for a client on the local link; with a host key of this
        // machine.
        let kept = "/data/identity/ssh/ssh_host_ed25519_key";
        let settings = robot.read(SSHD);
        assert!(settings.contains(&format!("\nHostKey {kept}\n")), "{settings}");
        robot.put(SSHD, &settings.replace(kept, key.to_str().expect("UTF-8")));
        let output = Command::new("/usr/sbin/sshd")
            .args(["-T", "-C", "user=root,host=laptop,addr=169.254.7.7"])
            .arg("-f")
            .arg(robot.at(SSHD))
            .output()
            .expect("sshd runs: cargo xtask doctor --install");
        let printed = output_text(&output);
        assert!(output.status.success(), "{printed}");
        let has = |line: &str| printed.lines().any(|l| l == line);
        assert!(has("kbdinteractiveauthentication no"), "{printed}");
        if plan.product.kind == BuildKind::Release {
            releases += 1;
            assert!(
                has("passwordauthentication no") && has("pubkeyauthentication yes"),
                "{printed}"
            );
            assert!(has("authenticationmethods publickey"), "{printed}");
            assert!(has("permitrootlogin no"), "{printed}");
        }
        let files = "/etc/ssh/authorized_keys.d/%u /data/identity/ssh/authorized_keys.d/%u";
        assert!(has(&format!("authorizedkeysfile {files}")), "{printed}");
    }
    assert!(releases > 0, "no product is a release");
}

/// What services that face the network must not see, as docs/reference/robot.md lists it for each.
fn hidden_from(unit: &str) -> &'static [&'static str] {
    match unit {
        "slipway-api.service" | "slipway-proxy.service" => &[
            "/data/slotd",
            "/data/identity",
            "/data/network",
            "/data/home",
            "/data/boot.d",
            "/data/var",
        ],
        "systemd-resolved.service" | "systemd-timesyncd.service" => {
            &["/data/slotd", "/data/identity", "/data/network", "/data/home"]
        }
        // They read the connections.
        "slipway-wifi@.service" | "systemd-networkd.service" => &["/data/slotd", "/data/identity"],
        _ => &["/data/slotd", "/data/identity", "/data/network"],
    }
}

/// The values of a setting in section [Service] of a unit and its drop-ins, as systemd.syntax(7) adds them up: an
/// empty one forgets those before it.
fn values<'a>(texts: &'a str, key: &str) -> Vec<&'a str> {
    let (mut section, mut found) = ("", Vec::new());
    for line in texts.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        } else if let Some((name, value)) = line.split_once('=')
            && name.trim_end() == key
            && section == "[Service]"
        {
            match value.trim() {
                "" => found.clear(),
                value => found.push(value),
            }
        }
    }
    found
}

/// What is wrong with the confinement of a unit that faces the network.
fn exposed(name: &str, text: &str) -> Vec<String> {
    let words = |key: &str| -> Vec<&str> {
        values(text, key).into_iter().flat_map(str::split_whitespace).collect()
    };
    let hidden = words("InaccessiblePaths");
    let sees = hidden_from(name)
        .iter()
        .filter(|path| !hidden.contains(&format!("-{path}").as_str()))
        .map(|path| format!("{name} sees {path}"));
    let mut findings: Vec<String> = sees.collect();
    // What would show it all the same (systemd.exec(5)).
    for key in ["BindPaths", "BindReadOnlyPaths", "RootDirectory", "RootImage"] {
        findings.extend(words(key).iter().map(|word| format!("{name} has {key}={word}")));
    }
    for key in
        ["ExecStart", "ExecStartPre", "ExecStartPost", "ExecReload", "ExecStop", "ExecStopPost"]
    {
        // With `+` a program sees and may everything (systemd.service(5)).
        let mut bare = values(text, key)
            .into_iter()
            .filter(|line| line.chars().take_while(|c| "@-:+!|".contains(*c)).any(|c| c == '+'));
        findings.extend(bare.next().map(|line| format!("{name} is not confined in {key}={line}")));
    }
    findings
}

#[test]
fn what_shows_a_hidden_folder_is_found() {
    let unit = |more: &str| {
        format!("[Service]\nInaccessiblePaths=-/data/slotd -/data/identity -/data/network\n{more}")
    };
    assert_eq!(exposed("a.service", &unit("")), [""; 0]);
    for (more, expected) in [
        // A drop-in's.
        ("[Service]\nInaccessiblePaths=\n", "a.service sees /data/slotd"),
        ("InaccessiblePaths=\nInaccessiblePaths=-/data/slotd\n", "a.service sees /data/identity"),
        ("BindReadOnlyPaths=/data/identity\n", "a.service has BindReadOnlyPaths=/data/identity"),
        ("ExecStartPre=-+/bin/sh\n", "a.service is not confined in ExecStartPre=-+/bin/sh"),
    ] {
        assert_eq!(exposed("a.service", &unit(more))[0], expected);
    }
    let elsewhere = "[Unit]\nInaccessiblePaths=-/data/slotd -/data/identity -/data/network\n";
    assert_eq!(exposed("a.service", elsewhere).len(), 3);
    assert_eq!(exposed("slipway-api.service", &unit(""))[0], "slipway-api.service sees /data/home");
}

/// Who is not kept from it, and why.
const TRUSTED: [(&str, &str); 5] = [
    ("slipway-state.service", "makes /data, before there is a network"),
    ("slipway-seed.service", "the agent, before there is a network"),
    ("slipway-health.service", "the agent; it asks addresses of this robot"),
    ("slipway-update@.service", "the agent; it is asked over a socket of this robot"),
    ("slipway-boot-scripts.service", "the owner's own programs, as root"),
];

/// The base system's own that talk to the link, and that an overlay confines further.
const BASE: [&str; 3] = ["systemd-networkd", "systemd-resolved", "systemd-timesyncd"];

#[test]
fn what_faces_the_network_sees_nothing_of_the_agents() {
    for plan in plans() {
        let mut units: std::collections::BTreeMap<String, String> = Default::default();
        for file in render(&root(), &plan).expect("rendered").overlay {
            let OverlayContent::File(bytes) = &file.content else { continue };
            let mut parts = file.target.rsplit('/');
            let (name, folder) =
                (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            // Of a drop-in: the unit that it belongs to.
            let unit = folder.strip_suffix(".d").unwrap_or(name);
            if file.target.contains("/systemd/system/") && unit.ends_with(".service") {
                let text = std::str::from_utf8(bytes).expect("UTF-8");
                let all = units.entry(unit.to_owned()).or_default();
                // The unit's own file counts first, whatever their order here.
                match unit == name {
                    true => all.insert_str(0, &format!("{text}\n")),
                    false => all.push_str(&format!("{text}\n")),
                }
            }
        }
        let own = |name: &str| name.starts_with("slipway-");
        assert!(units.keys().filter(|name| own(name)).count() >= 12, "{:?}", units.keys());
        for name in BASE {
            assert!(units.contains_key(&format!("{name}.service")), "{name} is not confined");
        }
        for (name, text) in &units {
            // A serial console is not a network.
            let alone = values(text, "PrivateNetwork").last() == Some(&"yes")
                || name.starts_with("serial-getty@");
            if alone || TRUSTED.iter().any(|(trusted, _)| trusted == name) {
                continue;
            }
            assert_eq!(exposed(name, text), [""; 0]);
            let most = values(text, "MemoryMax");
            assert!(!own(name) || most.len() == 1, "{name} has no MemoryMax");
        }
        for (name, _) in TRUSTED {
            assert!(units.contains_key(name), "{name} is not a unit any more");
        }
    }
}

/// Runs the state script with replacements of the programs that access disks; returns the calls,
/// one for each line.
fn state(robot: &Robot, check: &str) -> String {
    let root = robot.at("").as_str().trim_end_matches('/').to_owned();
    let calls = robot.at("calls");
    fs::write(&calls, "").expect("written");
    for (name, more) in [
        ("mountpoint", "exit 1"),
        ("e2fsck", check),
        ("mount", ""),
        ("resize2fs", ""),
        ("slotd", ""),
        // What looks over all disks finds the stick.
        ("findfs", "echo /dev/sda1"),
        ("blkid", "echo /dev/sda1"),
    ] {
        let text = format!("#!/bin/sh\necho {name} \"$@\" >>'{calls}'\n{more}\n");
        fs::create_dir_all(robot.at("stubs")).expect("made");
        make_program(&robot.at("stubs").join(name), text);
    }
    robot.put("dev/kmsg", "");
    let output = Command::new(robot.at("usr/lib/slipway/state"))
        .arg(&root)
        .env("PATH", format!("{}:/usr/bin:/bin", robot.at("stubs")))
        .output()
        .expect("it runs");
    assert!(output.status.success() && output_text(&output).is_empty(), "{}", output_text(&output));
    fs::read_to_string(calls).expect("calls").replace(&root, "")
}

#[test]
fn only_the_disk_that_was_started_from_becomes_data() {
    let robot = Robot::development();
    let device = robot.read("usr/lib/slipway/device.toml");
    let line = device.lines().find_map(|l| l.strip_prefix("data = { number = ")).expect("data");
    let (number, rest) = line.split_once(", start-sector = ").expect("a number and a place");
    let start = rest.split(',').next().expect("a place");
    robot.put("run/slipway/disk", "/dev/mmcblk0\n");
    // A stick with a partition of that number and of that label.
    let partition = |disk: &str, part: &str, start: &str| {
        robot.put(&format!("sys/block/{disk}/{part}/partition"), &format!("{number}\n"));
        robot.put(&format!("sys/block/{disk}/{part}/start"), &format!("{start}\n"));
    };
    partition("sda", &format!("sda{number}"), start);
    robot.put("run/slipway/data", "/dev/sda1\n");
    robot.put("data/.keep", "");
    // The card's has gone: memory, and nothing happens to the stick.
    for lost in [None, Some(("mmcblk1", start)), Some(("mmcblk0", "64"))] {
        if let Some((other, start)) = lost {
            partition(other, &format!("{other}p{number}"), start);
        }
        let calls = state(&robot, "");
        assert!(!calls.contains("sda") && !calls.contains("e2fsck"), "{calls}");
        assert!(calls.contains("mount -t tmpfs "), "{calls}");
        let state = robot.read("run/slipway/data-state");
        assert_eq!(state, "condition=memory\nwhy=this disk has no data partition\n");
    }
    // It is there, whatever its first blocks say.
    let part = format!("mmcblk0p{number}");
    partition("mmcblk0", &part, start);
    for (check, condition) in [("", "clean"), ("exit 4", "repaired")] {
        let calls = state(&robot, check);
        assert!(!calls.contains("sda") && !calls.contains("tmpfs"), "{calls}");
        for program in ["e2fsck -p", "resize2fs"] {
            assert!(calls.contains(&format!("{program} /dev/{part}\n")), "{calls}");
        }
        assert_eq!(calls.contains(&format!("e2fsck -fy /dev/{part}\n")), condition == "repaired");
        assert!(calls.contains(&format!(" /dev/{part} /data\n")), "{calls}");
        let state = robot.read("run/slipway/data-state");
        assert!(state.starts_with(&format!("condition={condition}\n")), "{state}");
    }
    let mode = fs::metadata(robot.at("data/slotd")).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}
