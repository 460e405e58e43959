//! Which environment variables other programs get from us: a process with secrets starts programs that print their
//! environment, under the names of those that we call.

use crate::common::{folder, make_program};

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use camino::Utf8Path;
use xtask::exec::Tool;

/// Set for the process that has the secrets: the directory of the programs.
const FOLDER: &str = "TEST_ENVIRONMENT_FOLDER";

/// Variables that no other program may get.
const SECRETS: [&str; 11] = [
    "SLIPWAY_KEY_PASSWORD",
    "SLIPWAY_WIFI_PASSWORD",
    "SLIPWAY_SHARED_CACHE_AUTHORIZATION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "CARGO_REGISTRY_TOKEN",
    "CARGO_REGISTRIES_OURS_TOKEN",
    "GITHUB_TOKEN",
    "ACTIONS_RUNTIME_TOKEN",
    "LD_PRELOAD_OF_SOMEBODY",
];

/// What only some may have, and who.
const SOME: [(&str, &[&str]); 14] = [
    ("SSH_AUTH_SOCK", &["ssh", "sftp", "git"]),
    // Settings of ssh may name any.
    ("A_NAME_THAT_NOBODY_KNOWS", &["ssh", "sftp"]),
    ("XDG_RUNTIME_DIR", &["ssh", "sftp"]),
    (
        "https_proxy",
        &[
            "ssh",
            "sftp",
            "git",
            "python3",
            "cargo",
            "rustc",
            "apt-get",
            "mmdebstrap",
            "sudo",
            "unshare",
        ],
    ),
    ("PIP_INDEX_URL", &["python3"]),
    ("CARGO_HOME", &["cargo", "rustc"]),
    ("RUSTUP_HOME", &["ssh", "sftp", "cargo", "rustc"]),
    ("CC_aarch64_unknown_linux_gnu", &["ssh", "sftp", "cargo", "rustc"]),
    ("APT_CONFIG", &["ssh", "sftp", "apt-get", "mmdebstrap", "sudo"]),
    ("GIT_CONFIG_GLOBAL", &["git"]),
    // As hooks have them.
    ("GIT_DIR", &[]),
    ("GIT_WORK_TREE", &[]),
    ("GIT_INDEX_FILE", &[]),
    ("GIT_OBJECT_DIRECTORY", &[]),
];

/// All the names under which we call programs that run code of others, and some more.
const PROGRAMS: [&str; 16] = [
    "ssh",
    "sftp",
    "git",
    "python3",
    "cargo",
    "rustc",
    "make",
    "apt-get",
    "mmdebstrap",
    "sudo",
    "unshare",
    "dpkg-deb",
    "mke2fs",
    "qemu-aarch64-static",
    "lsblk",
    "setpriv",
];

/// This process has the secrets: calls each program, and prints what it sees.
fn child(folder: &Utf8Path) {
    // The test's own words may stand on this line.
    println!();
    for program in PROGRAMS {
        let tool = Tool::new(folder.join(program));
        let tool = if program == "unshare" { tool.with_network() } else { tool };
        println!("== {program}\n{}", tool.read().unwrap());
    }
    // As Buildroot's make, and a robot's service on this machine.
    let only = Tool::new(folder.join("make")).env_only(&["PATH"]).env("LC_ALL", "C");
    println!("== only\n{}", only.read().unwrap());
    // Every other way to call one.
    let tool = || Tool::new(folder.join("setpriv"));
    println!(
        "== converse\n{}",
        String::from_utf8(tool().converse(None, |_| {}).unwrap().1).unwrap()
    );
    println!("== lines");
    tool().run_lines(|line| println!("{line}")).unwrap();
    println!("== command");
    assert!(tool().into_command().status().unwrap().success());
    println!("== terminal");
    tool().run_on_terminal().unwrap();
    println!("== end");
}

#[test]
fn programs_see_what_they_need_and_no_secrets() {
    if let Ok(folder) = std::env::var(FOLDER) {
        return child(Utf8Path::new(&folder));
    }
    let (_keep, folder) = folder();
    for program in PROGRAMS {
        let path = folder.join(program);
        make_program(&path, "#!/bin/sh\nexec env\n");
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "environment::programs_see_what_they_need_and_no_secrets",
        "--nocapture",
    ]);
    command.env(FOLDER, &folder).env("LC_ALL", "C").env("HOME", "/home/of-somebody");
    for name in SECRETS.iter().chain(SOME.iter().map(|(name, _)| name)) {
        command.env(name, format!("the value of {name}"));
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut seen: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut program = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            program = name;
            seen.entry(program).or_default();
        } else if let Some((name, _)) = line.split_once('=') {
            seen.entry(program).or_default().insert(name);
        }
    }
    for program in PROGRAMS.iter().chain(&["only", "converse", "lines", "command", "terminal"]) {
        let seen = &seen[program];
        assert!(seen.contains("PATH") && seen.contains("LC_ALL"), "{program}: {seen:?}");
        assert_eq!(seen.contains("HOME"), *program != "only", "{program}: {seen:?}");
        for secret in SECRETS {
            assert!(!seen.contains(secret), "{program} sees {secret}");
        }
        for (name, who) in SOME {
            assert_eq!(seen.contains(name), who.contains(program), "{program}: {name}");
        }
    }
    for secret in SECRETS {
        assert!(!text.contains(&format!("the value of {secret}")), "{secret} in {text}");
    }
}
