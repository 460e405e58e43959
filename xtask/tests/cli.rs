//! The command line as a user calls it: help texts, hints, and verbs that need no build.

use crate::common::{folder, make_program, root};

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use camino::Utf8Path;
use serde_json::Value;

fn xtask(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(arguments)
        .current_dir(root())
        .envs(environment.iter().copied())
        .env("COLUMNS", "100")
        .output()
        .expect("the tool starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn good(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let output = xtask(arguments, environment);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The error, and the exit status that belongs to its kind.
fn refused(arguments: &[&str], status: i32) -> String {
    let output = xtask(arguments, &[]);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {errors}");
    errors
}

/// Every verb with what it must explain.
const VERBS: [(&str, &[&str]); 29] = [
    (
        "build-image",
        &[
            "--product",
            "--board",
            "--until",
            "--offline",
            "--locked",
            "--zst",
            "--nightly",
            "--compression",
            "--no-install",
            "--format",
        ],
    ),
    ("plan", &["--product", "--board", "--all", "--changed-since <REV>", "--format"]),
    ("render", &["--product", "--board", "--format"]),
    ("inspect", &["<FILE>", "--diff", "--format"]),
    ("verify", &["<FILE>", "--keys <FILE>", "--format"]),
    (
        "run",
        &[
            "--product",
            "--board",
            "--slot",
            "--ssh-port",
            "--local",
            "--fresh",
            "--site <DIR>",
            "--port",
            "--offline",
            "--format",
            "[-- <COMMAND>...]",
        ],
    ),
    (
        "flash",
        &[
            "[IMAGE|PRODUCT]",
            "[DEVICE]",
            "--board",
            "--list",
            "--yes",
            "--non-removable <NAME>",
            "--no-read-back",
            "--hostname <NAME>",
            "--ssh-key <FILE>",
            "--wifi <SSID>",
            "--wifi-password-file <FILE>",
            "--format",
        ],
    ),
    (
        "push",
        &[
            "<HOST>",
            "--bundle <FILE>",
            "--product",
            "--board",
            "--no-wait",
            "--timeout <SECONDS>",
            "--ssh-option <KEY=VALUE>",
            "--format",
        ],
    ),
    ("release create", &["--channel", "--product", "--board", "--keep", "--allow-changes"]),
    ("release list", &["--channel", "--store <STORE>", "--format"]),
    ("release show", &["<VERSION>", "--notes", "--product", "--channel", "--store", "--format"]),
    ("release get", &["<VERSION>", "--board", "--role", "--into <DIR>", "--product", "--store"]),
    ("release diff", &["<OLD>", "<NEW>", "--files", "--product", "--format"]),
    ("release promote", &["<VERSION>", "--to", "--product", "--store"]),
    ("release yank", &["<VERSION>", "--reason", "--product", "--store"]),
    ("release check", &["--against <DIR>", "--keep-stage", "--compression", "--format"]),
    ("release gc", &["--store <DIR>", "--dry-run", "--format"]),
    ("release summary", &["Markdown"]),
    ("publish", &["<TARGET>", "--from <DIR>", "--keep", "--endpoint <URL>", "--ssh-option"]),
    ("lock", &["--product", "--only"]),
    ("keys new", &["release key"]),
    ("keys list", &["--format"]),
    ("keys rotate", &["--revoke", "--development"]),
    ("doctor", &["--install", "--format"]),
    ("test", &["--all", "--quick", "--no-install"]),
    ("check", &["formatting"]),
    ("bench", &["--payload", "--only"]),
    ("clean", &["--stages", "--downloads", "--dry-run"]),
    ("completions", &["bash", "zsh", "fish"]),
];

#[test]
fn every_verb_explains_its_options() {
    for (verb, options) in VERBS {
        let mut arguments: Vec<&str> = verb.split(' ').collect();
        arguments.push("--help");
        let help = good(&arguments, &[]);
        assert!(help.contains(&format!("Usage: cargo xtask {verb}")), "{verb}: {help}");
        for option in options {
            assert!(help.contains(option), "the help of {verb} does not mention {option}: {help}");
        }
    }
}

#[test]
fn the_list_of_verbs_is_complete() {
    let help = good(&["--help"], &[]);
    for (verb, _) in VERBS {
        let name = verb.split(' ').next().expect("a verb");
        let line = help.lines().find(|line| line.trim_start().starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {help}"));
        let about = line.trim_start().trim_start_matches(name).trim();
        assert!(about.ends_with('.') || about.len() > 20, "{name} says nothing: {line}");
    }
}

#[test]
fn a_misspelt_name_brings_the_nearest() {
    let message = refused(&["plan", "--product", "robot-dew"], 1);
    assert!(message.starts_with("error: "), "{message}");
    assert!(message.contains("did you mean robot-dev?"), "{message}");
    let message = refused(&["plan", "--board", "pi33"], 1);
    assert!(message.contains("did you mean pi3?"), "{message}");
    let message = refused(&["biuld-image"], 2);
    assert!(message.contains("build-image"), "{message}");
    let message = refused(&["build-image", "--ofline"], 2);
    assert!(message.contains("--offline"), "{message}");
}

#[test]
fn a_plan_has_every_offset_and_hash() {
    let json = good(&["plan", "--board", "qemu-arm64", "--format", "json"], &[]);
    let plan: Value = serde_json::from_str(&json).expect("JSON");
    let partitions = plan["disk"]["partitions"].as_array().expect("partitions");
    let mut end = 0;
    for partition in partitions {
        let offset = partition["offset"].as_u64().expect("an offset");
        assert!(offset >= end && offset.is_multiple_of(1 << 20), "{partition}");
        end = offset + partition["size"].as_u64().expect("a size");
    }
    assert!(end <= plan["disk"]["size"].as_u64().expect("the disk's size"));
    assert_eq!(partitions.len(), 4);
    assert!(plan["epoch"].as_u64().is_some_and(|epoch| epoch > 1_700_000_000), "{}", plan["epoch"]);
    let inputs = plan["inputs"].as_array().expect("inputs");
    assert!(inputs.len() > 20, "{} inputs", inputs.len());
    for input in inputs {
        assert_eq!(input["sha256"].as_str().map(str::len), Some(64), "{input}");
    }
    let text = good(&["plan", "--board", "qemu-arm64"], &[]);
    for partition in partitions {
        assert!(text.contains(&partition["offset"].to_string()), "{text}");
    }
}

/// The workspace without its checkout.
fn copied() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a directory");
    let status = Command::new("cp")
        .arg("-a")
        .args(["Cargo.toml", "board", "configs", "overlays", "external"].map(|n| root().join(n)))
        .arg(folder.path())
        .status();
    assert!(status.expect("cp").success());
    folder
}

#[test]
fn who_writes_results_waits_for_whoever_does() {
    let folder = copied();
    let workspace = Utf8Path::from_path(folder.path()).expect("UTF-8");
    let dist = workspace.join("dist/robot-dev/qemu-arm64");
    fs::create_dir_all(&dist).expect("a directory for results");
    for verb in [&["render"][..], &["build-image", "--no-install", "--until", "render"]] {
        let build = fs::File::open(&dist).expect("that directory");
        build.lock().expect("no other process has it");
        let mut waiting = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(verb)
            .args(["--board", "qemu-arm64"])
            .current_dir(workspace)
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the tool starts");
        let mut printed = String::new();
        let mut errors = BufReader::new(waiting.stderr.take().expect("its words"));
        while !printed.contains("waiting for another build in") {
            let length = errors.read_line(&mut printed).expect("UTF-8");
            assert_ne!(length, 0, "{verb:?} did not wait: {printed}");
        }
        assert!(!dist.join("rendered").exists(), "{verb:?}");
        build.unlock().expect("it was locked");
        std::io::copy(&mut errors, &mut std::io::sink()).expect("the rest of its words");
        assert!(waiting.wait().expect("it ends").success(), "{verb:?}");
        assert!(dist.join("rendered/overlay").is_dir(), "{verb:?}");
        fs::remove_dir_all(dist.join("rendered")).expect("to be made again");
    }
}

#[test]
fn without_a_commit_git_says_why() {
    let folder = copied();
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("plan")
        .current_dir(folder.path())
        .env_remove("SOURCE_DATE_EPOCH")
        .env("LC_ALL", "C")
        .output()
        .expect("the tool starts");
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    for words in
        ["reading the commit's time", "fatal: not a git repository", "help: ", "SOURCE_DATE_EPOCH"]
    {
        assert!(message.contains(words), "no `{words}`: {message}");
    }
}

#[test]
fn a_bad_epoch_is_named() {
    let output = xtask(&["plan"], &[("SOURCE_DATE_EPOCH", "yesterday")]);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(message.contains("SOURCE_DATE_EPOCH") && message.contains("yesterday"), "{message}");
}

#[test]
fn bash_takes_the_completions() {
    let script = good(&["completions", "bash"], &[]);
    assert!(script.contains("build-image") && script.contains("--until"), "{script}");
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("completions.bash");
    fs::write(&path, script).expect("written");
    let bash = Command::new("bash").arg("-n").arg(&path).output().expect("bash");
    assert!(bash.status.success(), "{}", text(&bash.stderr));
}

#[test]
fn keys_are_listed_without_secrets() {
    let dir = tempfile::tempdir().expect("a directory");
    let keys = dir.path().join("keys");
    let environment = [("SLIPWAY_KEYS", keys.to_str().expect("UTF-8"))];
    assert!(good(&["keys", "list"], &environment).starts_with("no keys in "));
    let password = [environment[0], ("SLIPWAY_KEY_PASSWORD", "a password of a test")];
    good(&["keys", "new"], &password);
    let listed = good(&["keys", "list"], &environment);
    assert!(listed.contains("release") && listed.contains("epoch 1"), "{listed}");
    let json = good(&["keys", "list", "--format", "json"], &environment);
    let json: Value = serde_json::from_str(&json).expect("JSON");
    let entry = &json["keys"].as_array().expect("a list")[0];
    let public = entry["public"].as_str().expect("the public key");
    assert!(public.starts_with("RW"), "{entry}");
    let file = entry["secret"].as_str().expect("the secret's file");
    let secret = fs::read_to_string(file).expect("the secret key");
    let secret = secret.lines().nth(1).expect("the secret's second line");
    assert!(!json.to_string().contains(secret), "the secret was printed");
}

#[test]
fn clean_says_what_it_would_remove() {
    let cache = tempfile::tempdir().expect("a directory");
    let stages = cache.path().join("stages");
    fs::create_dir_all(&stages).expect("made");
    let cache_path = cache.path().to_str().expect("UTF-8");
    let output = xtask(&["clean", "--stages", "--dry-run"], &[("SLIPWAY_CACHE", cache_path)]);
    let printed = text(&output.stderr);
    assert!(output.status.success(), "{printed}");
    assert!(printed.contains(&format!("would remove {cache_path}/stages (")), "{printed}");
    assert!(stages.is_dir(), "it was removed");
}

#[test]
fn what_is_no_image_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("text.img");
    fs::write(&path, "not an image").expect("written");
    let path = path.to_str().expect("UTF-8");
    for verb in ["inspect", "verify"] {
        let message = refused(&[verb, path], 1);
        assert!(message.contains("neither a card image, a bundle nor a slot image"), "{message}");
        let message = refused(&[verb, "/there/is/no/such.img"], 1);
        assert!(message.contains("/there/is/no/such.img"), "{message}");
    }
}

#[test]
fn outside_a_workspace_it_says_where_to_run() {
    let dir = tempfile::tempdir().expect("a directory");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("plan")
        .current_dir(dir.path())
        .output()
        .expect("the tool starts");
    assert_eq!(output.status.code(), Some(1));
    let message = text(&output.stderr);
    assert!(message.contains("help: run this inside a checkout"), "{message}");
}

/// As an environment of `uv venv`: a Python without pip comes first on the path.
#[test]
fn pip_is_found_beside_an_environment_without_it() {
    let (_keep, dir) = folder();
    let python = dir.join("python3");
    make_program(&python, "#!/bin/sh\necho No module named pip >&2\nexit 1\n");
    let path = format!("{dir}:{}", std::env::var("PATH").expect("a path"));
    let output = xtask(&["doctor", "--format", "json"], &[("PATH", &path)]);
    let lacking: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let lacks = |program: &str| {
        lacking.as_array().expect("a list").iter().any(|need| need["program"] == program)
    };
    let has = Command::new("/usr/bin/python3").args(["-m", "pip", "--version"]).output();
    assert_eq!(lacks("@pip"), !has.is_ok_and(|output| output.status.success()), "{lacking}");
}

/// What a shell does with `| head`, and what a full disk does.
#[test]
fn an_output_that_is_closed_or_full_ends_the_tool_in_one_line_at_most() {
    for verb in [
        &["plan"][..],
        &["plan", "--format", "json"],
        &["keys", "list"],
        &["completions", "bash"],
        &["--help"],
    ] {
        for full in [false, true] {
            let out = if full {
                Stdio::from(
                    fs::OpenOptions::new().write(true).open("/dev/full").expect("it is there"),
                )
            } else {
                let (reader, writer) = std::io::pipe().expect("a pipe");
                drop(reader);
                Stdio::from(writer)
            };
            let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
                .args(verb)
                .current_dir(root())
                .stdout(out)
                .output()
                .expect("the tool starts");
            let printed = text(&output.stderr);
            assert!(!printed.contains("panicked"), "{verb:?}: {printed}");
            if *verb == ["--help"] {
                continue;
            }
            // A verb without a result has nothing that could be lost.
            assert!(output.status.code().is_some_and(|code| code <= 1), "{verb:?}: {output:?}");
            if full && ["plan", "completions"].contains(&verb[0]) {
                assert_eq!(output.status.code(), Some(1), "{verb:?}: {printed}");
                assert!(
                    printed.contains("error: writing the result to standard output: "),
                    "{printed}"
                );
            }
        }
    }
}

#[test]
fn a_folder_for_temporary_files_that_is_not_there_is_named() {
    for folder in ["/no/such/folder", "target"] {
        let output = xtask(&["plan"], &[("TMPDIR", folder)]);
        let printed = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{printed}");
        assert!(printed.contains(folder) && printed.contains("help: set TMPDIR"), "{printed}");
    }
}

/// As a shell completes it.
#[test]
fn a_product_may_be_named_by_its_file() {
    let by_name = good(&["plan", "--product", "robot-dev"], &[]);
    for file in ["configs/robot-dev.toml", "./configs/robot-dev.toml", "robot-dev.toml"] {
        assert_eq!(good(&["plan", "--product", file], &[]), by_name, "{file}");
    }
}
