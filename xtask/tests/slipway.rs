//! `slipway` as a technician runs it: in an empty directory, without a checkout, cargo and settings.

use crate::common::make_program;
use crate::common::skip::all;
use crate::flash_support::{self, Folder};
use crate::update;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};

use bundle::BuildKind;
use camino::{Utf8Path, Utf8PathBuf};
use xtask::build::program;
use xtask::cache::Cache;
use xtask::cli::slipway;
use xtask::disk::TableKind;
use xtask::keys::{KEY_SET, KeyDirectory};
use xtask::publish::pins::Platform;
use xtask::update::pack_bundle;

/// What a technician's machine has: the program, these programs, and an empty home.
const PROGRAMS: [&str; 2] = ["lsblk", "ssh"];

/// Words that are about a checkout, in no message and no help of the program.
const OF_A_CHECKOUT: [&str; 6] = [
    "cargo xtask",
    "default = true",
    "default-board",
    "dist/releases",
    "build-image",
    "inside a checkout",
];

/// A machine with nothing of ours.
pub struct Machine {
    /// Where the program runs.
    pub dir: Utf8PathBuf,
    _keep: tempfile::TempDir,
}

impl Machine {
    pub fn new() -> Self {
        let keep = tempfile::tempdir().expect("a directory");
        let dir = Utf8PathBuf::try_from(keep.path().to_owned()).expect("UTF-8");
        for name in ["bin", "home", "here"] {
            fs::create_dir(dir.join(name)).expect("a directory");
        }
        for name in PROGRAMS {
            let path =
                xtask::exec::find_program(name).unwrap_or_else(|| panic!("this test needs {name}"));
            symlink(path, dir.join("bin").join(name)).expect("a link");
        }
        Self { dir, _keep: keep }
    }

    /// The program, not started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slipway"));
        command.args(arguments).current_dir(self.dir.join("here")).env_clear();
        command.env("PATH", self.dir.join("bin")).env("HOME", self.dir.join("home"));
        command.stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.checked(self.command(arguments))
    }

    /// Runs it; nothing that it says is about a checkout.
    fn checked(&self, mut command: Command) -> Output {
        let output = command.output().expect("the program starts");
        let printed = text(&output.stdout) + &text(&output.stderr);
        for words in OF_A_CHECKOUT {
            assert!(!printed.contains(words), "{command:?} says `{words}`: {printed}");
        }
        output
    }

    pub fn good(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Its error, with this exit status and all of these words.
    pub fn refused(&self, arguments: &[&str], status: i32, words: &[&str]) -> String {
        let output = self.run(arguments);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {message}");
        for word in words {
            assert!(message.contains(word), "{arguments:?}: no `{word}` in {message}");
        }
        message
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A bundle, its key set, and another key set, in this directory.
fn bundle_in(dir: &Utf8Path) -> [Utf8PathBuf; 3] {
    let mut keys = KeyDirectory::open(&dir.join("keys")).expect("keys");
    let signers = [keys.signer(BuildKind::Development).expect("a key")];
    KeyDirectory::open(&dir.join("other"))
        .expect("keys")
        .signer(BuildKind::Development)
        .expect("another key");
    let path = dir.join("robot.bundle");
    let payload = update::payload(dir);
    pack_bundle(&update::request(&payload, BuildKind::Development, &signers), &path)
        .expect("a bundle");
    [path, dir.join("keys").join(KEY_SET), dir.join("other").join(KEY_SET)]
}

/// The verbs that a help lists.
fn listed(help: &str) -> Vec<&str> {
    let rows = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let rows = rows.take_while(|line| !line.is_empty()).filter_map(|line| line.strip_prefix("  "));
    // The second line of a long text begins further right.
    rows.filter(|row| !row.starts_with(' ')).filter_map(|row| row.split(' ').next()).collect()
}

#[test]
fn it_has_the_verbs_that_need_no_checkout_and_no_others() {
    let machine = Machine::new();
    let verbs = ["flash", "verify", "inspect", "push", "release", "keys", "completions", "help"];
    assert_eq!(listed(&machine.good(&["--help"])), verbs);
    assert_eq!(
        listed(&machine.good(&["release", "--help"])),
        ["list", "show", "get", "diff", "help"]
    );
    assert_eq!(listed(&machine.good(&["keys", "--help"])), ["list", "help"]);
    for verb in [
        "flash",
        "verify",
        "inspect",
        "push",
        "release list",
        "release show",
        "release diff",
        "keys list",
    ] {
        let mut arguments: Vec<&str> = verb.split(' ').collect();
        arguments.push("--help");
        let help = machine.good(&arguments);
        assert!(help.contains(&format!("Usage: slipway {verb}")), "{help}");
        let unusable = ["--board", "--component", "--offline", "PRODUCT]"];
        assert!(unusable.iter().all(|option| !help.contains(option)), "{help}");
    }
    for verb in ["run", "plan", "lock", "clean", "publish", "test"] {
        machine.refused(&[verb], 2, &["unrecognized subcommand"]);
    }
    machine.refused(&["release", "create", "--channel", "beta"], 2, &["unrecognized subcommand"]);
    machine.refused(&["keys", "new"], 2, &["unrecognized subcommand"]);
    assert!(machine.good(&["--version"]).starts_with(concat!(
        "slipway ",
        env!("CARGO_PKG_VERSION"),
        " ("
    )));
    slipway::command("1").debug_assert();
}

#[test]
fn it_verifies_and_inspects_what_it_is_given() {
    let machine = Machine::new();
    let [bundle, keys, other] = bundle_in(&machine.dir);
    let (bundle, keys, other) = (bundle.as_str(), keys.as_str(), other.as_str());
    let printed = machine.good(&["verify", bundle, "--keys", keys]);
    assert!(printed.starts_with("good: robot-test 0.1.0 for board-one, signed by"), "{printed}");
    machine.refused(&["verify", bundle, "--keys", other], 1, &["(not-trusted)", "help: "]);
    machine.refused(&["verify", bundle], 1, &["no trusted keys", "with --keys"]);
    assert!(machine.good(&["keys", "list"]).starts_with("no keys in "));
    let printed = machine.good(&["inspect", bundle]);
    assert!(printed.contains("run `slipway verify "), "{printed}");
    // As the guide says it.
    let home = machine.dir.join("home/.config/slipway/keys");
    fs::create_dir_all(&home).expect("the key directory");
    fs::copy(keys, home.join(KEY_SET)).expect("the team's key set");
    assert!(machine.good(&["keys", "list"]).contains("public part only"));
    machine.good(&["verify", bundle]);
    // Without a home, the keys have to be named.
    let homeless = |arguments: &[&str]| {
        let mut command = machine.command(arguments);
        command.env_remove("HOME");
        machine.checked(command)
    };
    assert!(homeless(&["verify", bundle, "--keys", keys]).status.success());
    assert!(text(&homeless(&["verify", bundle]).stderr).contains("SLIPWAY_KEYS"));
    let mut bytes = fs::read(bundle).expect("the bundle");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(machine.dir.join("damaged.bundle"), &bytes).expect("written");
    bytes[700] ^= 1;
    fs::write(machine.dir.join("forged.bundle"), &bytes).expect("written");
    machine.refused(
        &["verify", "../damaged.bundle", "--keys", keys],
        1,
        &["damaged.bundle", "help: "],
    );
    machine.refused(
        &["verify", "../forged.bundle", "--keys", keys],
        1,
        &["(bad-signature)", "help: "],
    );
}

#[test]
fn it_writes_a_card() {
    let (machine, folder) = (Machine::new(), Folder::new());
    let image = flash_support::image(&folder, TableKind::Gpt, 11).path;
    let card = folder.at("card");
    flash_support::old_card(&card, flash_support::SIZE);
    let printed = machine.good(&["flash", image.as_str(), card.as_str(), "--yes"]);
    assert!(printed.contains("written and verified"), "{printed}");
    assert_eq!(flash_support::differences(&image, &card), Vec::<u64>::new());
    assert!(machine.good(&["verify", image.as_str()]).starts_with("good: "));
    assert!(machine.good(&["inspect", image.as_str()]).contains("root-a"));
    machine.good(&["flash", "--list"]);
    machine.refused(
        &["flash", image.as_str()],
        1,
        &["help: name a device: slipway flash IMAGE DEVICE --yes"],
    );
    machine.refused(
        &["flash", image.as_str(), "nowhere"],
        1,
        &["looking for nowhere", "help: slipway flash --list shows devices", "8G FILE\n"],
    );
    machine.refused(
        &["flash", image.as_str(), "/dev/null"],
        1,
        &["help: slipway flash --list shows devices"],
    );
    machine.refused(&["flash", image.as_str(), card.as_str()], 1, &["add --yes"]);
    let linked = folder.at("linked");
    fs::hard_link(&image, &linked).expect("a link");
    machine.refused(&["flash", image.as_str(), linked.as_str(), "--yes"], 1, &["the same file"]);
    // A plain name is a file here, never a product.
    machine.refused(&["flash", "robot", card.as_str()], 1, &["./robot"]);
}

#[test]
fn what_a_checkout_would_say_has_to_be_given() {
    let machine = Machine::new();
    machine.refused(&["flash"], 2, &["<IMAGE>"]);
    machine.refused(&["push", "robot"], 2, &["--bundle <FILE>"]);
    machine.refused(&["push", "robot", "--component", "api"], 2, &["needs a checkout"]);
    machine.refused(
        &["push", "robot", "--bundle", "x", "--product", "y"],
        2,
        &["needs a checkout"],
    );
    machine.refused(&["release", "list"], 2, &["--store <STORE>"]);
    machine.refused(&["release", "show", "latest"], 2, &["--store <STORE>", "--product <PRODUCT>"]);
    machine.refused(
        &["release", "diff", "1.0.0", "1.1.0", "--store", "x"],
        2,
        &["--product <PRODUCT>"],
    );
    for arguments in [
        &["push", "robot", "--bundle", "none.bundle"][..],
        &["inspect", "none.img"],
        &["verify", "none.img"],
        &["flash", "none.img", "card"],
    ] {
        machine.refused(arguments, 1, &["none.", "No such file", "help: check the path"]);
    }
    let show = ["release", "show", "one", "--store", "x", "--product", "y"];
    machine.refused(&show, 1, &["`one` is not a version", "help: `slipway release list`"]);
    machine.refused(
        &["release", "list", "--store", "http://127.0.0.1:1"],
        1,
        &["Connection refused", "help: check the address"],
    );
    // `latest` has no default channel here.
    for part in ["show", "get", "diff"] {
        let help = machine.good(&["release", part, "--help"]);
        assert!(
            help.contains("required for `latest`") && !help.contains("latest`: nightly"),
            "{help}"
        );
    }
    assert!(machine.good(&["flash", "--help"]).contains("flash [OPTIONS] <IMAGE> [DEVICE]"));
    machine.refused(&["release", "list", "--store", "ftp://x"], 1, &["help: a directory, ssh://"]);
    machine.refused(
        &["release", "show", "1.0.0", "--store", "x", "--product", "y"],
        1,
        &["there is no release store at x", "help: check the address"],
    );
}

#[test]
fn a_missing_program_is_named_with_its_packages_and_never_installed() {
    let machine = Machine::new();
    let empty = machine.dir.join("empty");
    fs::create_dir(&empty).expect("a directory");
    for name in ["apt-get", "sudo", "dnf"] {
        let script = format!("#!/bin/sh\necho called > '{}/called'\n", machine.dir);
        make_program(&empty.join(name), script);
    }
    fs::write(machine.dir.join("here/a.bundle"), "no bundle").expect("written");
    let store = ["release", "list", "--store", "ssh://host/srv"];
    let ssh = ["openssh-client (Debian", "openssh-clients (Fedora)"];
    for (arguments, words) in [
        (&["push", "robot", "--bundle", "a.bundle"][..], ssh),
        (&store, ssh),
        (&["flash", "--list"], ["util-linux (Debian", "util-linux (Fedora)"]),
    ] {
        let mut command = machine.command(arguments);
        command.env("PATH", &empty);
        let output = machine.checked(command);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{arguments:?}: {message}");
        assert!(!machine.dir.join("called").exists(), "{arguments:?} called another program");
    }
}

#[test]
fn what_is_no_file_is_refused_and_does_not_block() {
    let machine = Machine::new();
    let here = machine.dir.join("here");
    let kinds = ["a FIFO", "a socket", "a character device", "a directory"];
    for (name, kind) in ["fifo", "socket", "device", "directory"].into_iter().zip(kinds) {
        let path = here.join(format!("{name}.img"));
        let _listener = match name {
            "fifo" => {
                use rustix::fs::{CWD, FileType, mknodat};
                mknodat(CWD, path.as_std_path(), FileType::Fifo, 0o644.into(), 0).expect("a FIFO");
                None
            }
            "socket" => Some(UnixListener::bind(&path).expect("a socket")),
            "device" => {
                symlink("/dev/zero", &path).expect("a link");
                None
            }
            _ => {
                fs::create_dir(&path).expect("a directory");
                None
            }
        };
        let words = [path.file_name().expect("a name"), kind, "expected a regular file", "help: "];
        for arguments in [
            &["inspect", path.as_str()][..],
            &["inspect", "--diff", path.as_str(), path.as_str()],
            &["verify", path.as_str()],
            &["flash", path.as_str(), "card", "--yes"],
            &["push", "robot", "--bundle", path.as_str()],
        ] {
            machine.refused(arguments, 1, &words);
        }
    }
}

/// Another directory of keys would be used instead, and another password.
#[test]
fn a_variable_that_is_not_utf_8_is_refused_by_name() {
    let machine = Machine::new();
    let web = ["release", "list", "--store", "https://127.0.0.1:1/store"];
    let bucket = ["release", "list", "--store", "s3://bucket"];
    for (name, arguments) in [
        ("SLIPWAY_KEYS", &["keys", "list"][..]),
        ("XDG_CONFIG_HOME", &["keys", "list"]),
        ("HOME", &["keys", "list"]),
        ("SLIPWAY_STATE", &web),
        ("XDG_STATE_HOME", &web),
        ("SSL_CERT_FILE", &web),
        ("AWS_SECRET_ACCESS_KEY", &bucket),
    ] {
        let mut command = machine.command(arguments);
        command.env(name, OsStr::from_bytes(b"/secret-\xff"));
        let output = machine.checked(command);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        for words in [name, "is not UTF-8", "help: "] {
            assert!(message.contains(words), "{name}: no `{words}` in {message}");
        }
        assert!(!message.contains("secret-"), "{message}");
    }
}

#[test]
fn bash_takes_its_completions() {
    let machine = Machine::new();
    let script = machine.good(&["completions", "bash"]);
    assert!(script.contains("slipway") && !script.contains("create"), "{script}");
    let path = machine.dir.join("completions.bash");
    fs::write(&path, script).expect("written");
    let bash = Command::new("bash").arg("-n").arg(&path).output().expect("bash");
    assert!(bash.status.success(), "{}", text(&bash.stderr));
}

/// The sources as git has them, in a directory of its own.
fn sources(to: &Utf8Path) {
    let root = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let listed = Command::new("git")
        .args([
            "ls-files",
            "-z",
            ".cargo",
            "Cargo.*",
            "bootmodel",
            "bundle",
            "contract",
            "slotd",
            "xtask",
        ])
        .current_dir(root)
        .output()
        .expect("git");
    assert!(listed.status.success(), "{}", text(&listed.stderr));
    for path in text(&listed.stdout).split_terminator('\0') {
        let into = to.join(path);
        fs::create_dir_all(into.parent().expect("a parent")).expect("a directory");
        fs::copy(root.join(path), into).expect(path);
    }
}

/// Runs a program with another root, as root there; with `log`, under strace.
fn in_root(root: &Utf8Path, log: Option<&Utf8Path>, arguments: &[&str]) -> Output {
    let mut words = Vec::new();
    if let Some(log) = log {
        words.extend([
            "strace",
            "-f",
            "-e",
            "trace=execve,open,openat,connect",
            "-o",
            log.as_str(),
        ]);
    }
    words.push("unshare");
    if !rustix::process::getuid().is_root() {
        words.push("--map-root-user");
    }
    let changed = format!("--root={root}");
    words.extend([changed.as_str(), "--", "/slipway"]);
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).args(arguments).env_clear().env("HOME", "/").env("TMPDIR", "/");
    command.env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
        command.env(name, "of a test");
    }
    command.output().unwrap_or_else(|error| panic!("{}: {error}", words[0]))
}

/// Answers every request with an error, and counts them.
fn server() -> (u16, std::sync::Arc<std::sync::atomic::AtomicU32>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let requests = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let counted = requests.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            // The client may be gone at any moment.
            drop(stream.read(&mut [0; 4096]));
            drop(stream.write_all(
                b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            ));
        }
    });
    (port, requests)
}

#[test]
fn the_static_program_needs_nothing_and_is_the_same_from_every_directory() {
    if !all("slipway::the_static_program_needs_nothing_and_is_the_same_from_every_directory") {
        return;
    }
    // Crates of others are compiled once for each of the two.
    let dir = Utf8Path::new(env!("CARGO_TARGET_TMPDIR")).join("static-slipway");
    fs::create_dir_all(&dir).expect("a directory");
    let lock = fs::File::create(dir.join("lock")).expect("a file");
    lock.lock().expect("one such test at a time");
    let platform = if cfg!(target_arch = "x86_64") { Platform::X86_64 } else { Platform::Arm64 };
    let clear = |path: &Utf8Path| {
        if path.exists() {
            fs::remove_dir_all(path).expect("removed");
        }
    };
    let places = ["one", "a longer way/to the/second"].map(|name| dir.join(name));
    for root in &places {
        clear(root);
        sources(root);
    }
    let made = places.map(|root| {
        let cache = Cache::in_dir(format!("{root}-cache").into());
        clear(&cache.stages());
        program(&root, &cache, platform, "0123456789abcdef").expect("compiled")
    });
    assert_eq!(made[0].binary.sha256, made[1].binary.sha256, "two compilations differ");

    let root = dir.join("root");
    clear(&root);
    fs::create_dir_all(root.join("etc")).expect("a directory");
    make_program(&root.join("slipway"), fs::read(&made[0].binary.path).expect("read"));
    let printed = in_root(&root, None, &["--version"]);
    assert!(text(&printed.stdout).ends_with("(commit 0123456789abcdef)\n"), "{printed:?}");
    let keep = tempfile::tempdir_in(&dir).expect("a directory");
    let [bundle, keys, _] = bundle_in(Utf8Path::from_path(keep.path()).expect("UTF-8"));
    fs::rename(bundle, root.join("a.bundle")).expect("moved");
    fs::rename(keys, root.join("keyset.json")).expect("moved");
    let printed = in_root(&root, None, &["verify", "/a.bundle", "--keys", "/keyset.json"]);
    assert!(text(&printed.stdout).starts_with("good: "), "{printed:?}");

    // A host's name comes from /etc/hosts, whatever modules the machine's own programs ask before.
    let (port, requests) = server();
    fs::write(
        root.join("etc/nsswitch.conf"),
        "hosts: mdns4_minimal [NOTFOUND=return] resolve files\n",
    )
    .expect("written");
    fs::write(root.join("etc/hosts"), "127.0.0.1 store.of-a-test\n").expect("written");
    let log = dir.join("strace.log");
    let endpoint = format!("http://store.of-a-test:{port}");
    let printed = in_root(
        &root,
        Some(&log),
        &["release", "list", "--store", "s3://bucket", "--endpoint", &endpoint],
    );
    let calls = fs::read_to_string(&log).expect("strace's log");
    let (_, calls) = calls.split_once("execve(\"/slipway\"").expect("the program was started");
    assert!(requests.load(std::sync::atomic::Ordering::SeqCst) > 0, "{printed:?}\n{calls}");
    assert!(calls.contains("/etc/hosts") && !calls.contains(".so"), "{calls}");
}
