//! Pushes through a real `sshd` on the loopback address into the real agent, whose robot is a
//! directory of files. Such a robot restarts nothing: the test plays the boot loader; the system
//! tests have the real one.

use crate::common::agent;
use crate::common::rights::is_root;
use crate::common::{find, folder, make_program, noise, tool};

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent::slotd;
use bundle::bootstate::{BootState, Slot};
use bundle::component::{ComponentLock, ComponentWheel, LOCK_ROLE};
use bundle::{BuildKind, CompressionLevel, Version};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::keys::KeyDirectory;
use xtask::push::{PushOutcome, PushRequest, PushVerdict, push_to_robots};
use xtask::qemu::free_port;
use xtask::update::{ComponentRequest, PackRequest, PayloadRequest, pack_bundle};

const MIB: usize = 1 << 20;
/// A slot with several of the agent's checkpoints, one for each 32 MiB.
const LARGE: usize = 96 * MIB;
/// A slot for what size means nothing to.
const SMALL: usize = 4 * MIB;

/// What pushes need: signing keys, a bundle, and the key that logs in.
struct Bench {
    dir: Utf8PathBuf,
    _keep: tempfile::TempDir,
    content: Vec<u8>,
}

impl Bench {
    fn new(size: usize) -> Self {
        let (_keep, dir) = folder();
        for name in ["user", "host"] {
            let path = dir.join(name);
            let args = ["-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path.as_str()];
            tool("ssh-keygen").args(args).run().unwrap();
        }
        let content = noise(size, 5);
        Self { dir, _keep, content }
    }

    /// A bundle with the slot's new content.
    fn bundle(&self, version: &str) -> Utf8PathBuf {
        let payload = self.dir.join("payload");
        fs::write(&payload, &self.content).unwrap();
        let payloads = vec![PayloadRequest { role: "root".to_owned(), path: payload }];
        self.pack(version, "system", version, payloads)
    }

    fn pack(
        &self,
        version: &str,
        component: &str,
        own: &str,
        payloads: Vec<PayloadRequest>,
    ) -> Utf8PathBuf {
        let signers = [KeyDirectory::open(&self.dir.join("keys"))
            .unwrap()
            .signer(BuildKind::Development)
            .unwrap()];
        let version = Version::parse(version).unwrap();
        let own = Version::parse(own).unwrap();
        let component = ComponentRequest { name: component.to_owned(), version: own, payloads };
        let request = PackRequest {
            product: "robot-test".to_owned(),
            version,
            kind: BuildKind::Development,
            boards: vec!["board-one".to_owned()],
            minimum_version: Version::parse("0.1.0").unwrap(),
            key_epoch: None,
            epoch: 0,
            components: vec![component],
            level: CompressionLevel::Fast,
            workers: None,
            signers: &signers,
        };
        let out = self.dir.join("a.bundle");
        pack_bundle(&request, &out).unwrap();
        out
    }

    fn push(
        &self,
        hosts: Vec<String>,
        bundle: Utf8PathBuf,
        wait: Option<Duration>,
    ) -> Vec<PushOutcome> {
        let ssh_options = vec![
            format!("IdentityFile={}", self.dir.join("user")),
            "IdentitiesOnly=yes".to_owned(),
            format!("UserKnownHostsFile={}", self.dir.join("known_hosts")),
        ];
        push_to_robots(&PushRequest { hosts, bundle, ssh_options, wait }).unwrap()
    }
}

/// A robot on files, and its `sshd`, which ends with this value.
struct Robot {
    root: Utf8PathBuf,
    port: u16,
    sshd: Child,
}

impl Robot {
    fn new(bench: &Bench, name: &str) -> Self {
        let root = bench.dir.join(name);
        let write = |path: &str, content: &[u8]| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        let size = bench.content.len();
        let sectors = size / 512;
        let device = format!(
            "product = 'robot-test'\nversion = '1.0.0'\nminimum-version = '1.0.0'\nkind = 'development'\n\
             board = 'board-one'\nboot-flow = 'uboot'\ncompatible = ['maker,board-one']\n\
             [boot-state]\nsectors = [8, 16]\n[partitions]\n\
             root-a = {{ number = 2, start-sector = 8192, sectors = {sectors} }}\n\
             root-b = {{ number = 3, start-sector = 999999, sectors = {sectors} }}\n"
        );
        // On a robot the mount point is there whatever became of the partition.
        fs::create_dir_all(root.join("data")).unwrap();
        write("usr/lib/slipway/device.toml", device.as_bytes());
        drop(
            KeyDirectory::open(&bench.dir.join("keys"))
                .unwrap()
                .signer(BuildKind::Development)
                .unwrap(),
        );
        let keys = fs::read(bench.dir.join("keys/keyset.json")).unwrap();
        write("usr/lib/slipway/keyset.json", &keys);
        write("proc/device-tree/compatible", b"maker,board-one\0");
        write("proc/sys/kernel/random/boot_id", b"01234567-89ab\n");
        write("proc/self/mountinfo", b"24 20 179:2 / / ro - ext4 /dev/diskp2 ro\n");
        write("sys/dev/block/README", b"");
        for (number, start) in [(2, 8192), (3, 999_999)] {
            let folder = format!("sys/devices/disk/diskp{number}");
            write(&format!("{folder}/partition"), format!("{number}\n").as_bytes());
            write(&format!("{folder}/start"), format!("{start}\n").as_bytes());
            write(&format!("{folder}/size"), format!("{sectors}\n").as_bytes());
            let link = root.join(format!("sys/dev/block/179:{number}"));
            symlink(format!("../../devices/disk/diskp{number}"), link).unwrap();
            write(&format!("dev/diskp{number}"), &noise(size, number));
        }
        let mut disk = vec![0; MIB];
        disk[8 * 512..][..512].copy_from_slice(&BootState::first().encode());
        write("dev/disk", &disk);
        // What the robot's shell finds: the agent; and for tests that do not run as root, a way to it.
        let script = |name: &str, text: &str| {
            make_program(&root.join("bin").join(name), format!("#!/bin/sh\n{text}\n"));
        };
        // A copy: this workspace may be in a home that another user cannot enter.
        let agent = root.join("bin/agent");
        fs::create_dir_all(root.join("bin")).unwrap();
        make_program(&agent, fs::read(slotd()).unwrap());
        script("slotd", &format!("exec '{agent}' --root '{root}' \"$@\""));
        script("sudo", "[ \"$1\" = -n ] || exit 1; shift; exec \"$@\"");
        let (port, sshd) = serve(bench, &root);
        Self { root, port, sshd }
    }

    fn slot_b(&self) -> Vec<u8> {
        fs::read(self.root.join("dev/diskp3")).unwrap()
    }

    fn address(&self) -> String {
        address(self.port)
    }

    fn slotd(&self, args: &[&str]) -> serde_json::Value {
        let output = Command::new(self.root.join("bin/slotd").as_str())
            .args(["--format", "json"])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits for the trial, and plays the restart: the boot loader counts the try, and `slot` runs
    /// under another boot id.
    fn restart(&self, slot: Slot, version: &str) {
        let started = Instant::now();
        while self.slotd(&["status"])["pending"] != true {
            assert!(started.elapsed() < Duration::from_secs(120), "no trial was armed");
            std::thread::sleep(Duration::from_millis(100));
        }
        let state = BootState { sequence: 99, active: Slot::A, trial: Some(Slot::B), tries: 0 };
        let disk = fs::File::options().write(true).open(self.root.join("dev/disk")).unwrap();
        disk.write_all_at(&state.encode(), 8 * 512).unwrap();
        let number = if slot == Slot::A { 2 } else { 3 };
        let mounts = format!("24 20 179:{number} / / ro - ext4 /dev/diskp{number} ro\n");
        fs::write(self.root.join("proc/self/mountinfo"), mounts).unwrap();
        let device = self.root.join("usr/lib/slipway/device.toml");
        let text = fs::read_to_string(&device).unwrap();
        fs::write(device, text.replace("version = '1.0.0'", &format!("version = '{version}'")))
            .unwrap();
        // Last: the push looks at nothing else before this has changed.
        fs::write(self.root.join("proc/sys/kernel/random/boot_id"), "89abcdef-0123\n").unwrap();
    }
}

impl Drop for Robot {
    fn drop(&mut self) {
        self.sshd.kill().expect("sshd runs until now");
        self.sshd.wait().expect("it ended");
    }
}

/// The user of this process: an `sshd` that is not root's serves no other user.
fn address(port: u16) -> String {
    let output = Command::new("id").arg("-un").output().unwrap();
    let user = String::from_utf8(output.stdout).unwrap();
    format!("ssh://{}@127.0.0.1:{port}", user.trim())
}

fn serve(bench: &Bench, root: &Utf8Path) -> (u16, Child) {
    let port = free_port(0).unwrap();
    let dir = &bench.dir;
    // Root's sshd wants it; a package's own service makes it otherwise.
    if rustix::process::getuid().is_root() {
        fs::create_dir_all("/run/sshd").unwrap();
    }
    let config = root.join("sshd_config");
    let text = format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {dir}/host\nAuthorizedKeysFile {dir}/user.pub\n\
         PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n\
         KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n\
         SetEnv PATH={root}/bin:/usr/bin:/bin\n"
    );
    fs::write(&config, text).unwrap();
    let log = fs::File::create(root.join("sshd.log")).unwrap();
    // It insists on an absolute path of itself.
    let program = find("sshd");
    let mut sshd = Command::new(program.as_str())
        .args(["-D", "-e", "-f", config.as_str()])
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let started = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        let log = fs::read_to_string(root.join("sshd.log")).unwrap();
        assert!(sshd.try_wait().unwrap().is_none(), "sshd ended: {log}");
        assert!(started.elapsed() < Duration::from_secs(30), "sshd does not listen: {log}");
        std::thread::sleep(Duration::from_millis(20));
    }
    (port, sshd)
}

/// Passes connections on to a port, and cuts the first one that has sent `limit` bytes to it.
fn cutting(to: u16, limit: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let cut = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let far = TcpStream::connect(("127.0.0.1", to)).unwrap();
            let (mut back, mut client) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            // Either side may be gone at any moment: that is what this is for.
            std::thread::spawn(move || {
                drop(std::io::copy(&mut back, &mut client));
                drop(client.shutdown(Shutdown::Both));
            });
            let cut = cut.clone();
            std::thread::spawn(move || {
                let (mut near, mut far) = (near, far);
                let (mut sent, mut buffer) = (0, vec![0; 64 << 10]);
                while let Ok(n @ 1..) = near.read(&mut buffer) {
                    if far.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                    sent += n;
                    if sent > limit && !cut.swap(true, std::sync::atomic::Ordering::SeqCst) {
                        break;
                    }
                }
                drop(near.shutdown(Shutdown::Both));
                drop(far.shutdown(Shutdown::Both));
            });
        }
    });
    port
}

#[test]
fn two_robots_at_once_and_one_that_is_not_there() {
    let bench = Bench::new(SMALL);
    let bundle = bench.bundle("1.1.0");
    let (one, two) = (Robot::new(&bench, "one"), Robot::new(&bench, "two"));
    let nobody = address(free_port(0).unwrap());
    let hosts = vec![one.address(), nobody.clone(), two.address()];
    let outcomes = bench.push(hosts.clone(), bundle, None);
    let named: Vec<&String> = outcomes.iter().map(|outcome| &outcome.host).collect();
    assert_eq!(named, hosts.iter().collect::<Vec<_>>());
    for (robot, outcome) in [(&one, &outcomes[0]), (&two, &outcomes[2])] {
        assert_eq!(outcome.verdict, PushVerdict::Installed, "{outcome:?}");
        assert_eq!(outcome.version, Some(Version::parse("1.1.0").unwrap()));
        assert_eq!(outcome.slot, Some(Slot::B));
        assert_eq!(outcome.breaks, 0);
        let installed = outcome.installed.as_ref().unwrap();
        assert!(!installed.resumed && installed.written >= SMALL as u64, "{installed:?}");
        assert!(robot.slot_b() == bench.content, "slot b has other bytes");
    }
    assert_eq!(outcomes[1].verdict, PushVerdict::Failed);
    let why = outcomes[1].why.as_deref().unwrap();
    assert!(
        why.contains("Connection refused") && why.contains("check that the robot is on"),
        "{why}"
    );
}

#[test]
fn slipway_pushes_from_a_machine_without_a_checkout() {
    let bench = Bench::new(SMALL);
    let bundle = bench.bundle("1.1.0");
    let robot = Robot::new(&bench, "robot");
    let machine = crate::slipway::Machine::new();
    let there = robot.address();
    let options = [
        format!("IdentityFile={}", bench.dir.join("user")),
        format!("UserKnownHostsFile={}", bench.dir.join("known_hosts")),
    ];
    let mut arguments = vec!["push", &there, "--bundle", bundle.as_str(), "--no-wait"];
    arguments.extend(options.iter().flat_map(|option| ["--ssh-option", option]));
    let printed = machine.good(&arguments);
    assert!(printed.contains("1.1.0"), "{printed}");
    assert!(robot.slot_b() == bench.content, "slot b has other bytes");
    let nobody = address(free_port(0).expect("a free port"));
    arguments[1] = &nobody;
    machine.refused(&arguments, 1, &["not installed on 1 of 1 robots"]);
}

#[test]
fn a_connection_that_is_cut_is_made_again_and_the_install_goes_on() {
    let bench = Bench::new(LARGE);
    let bundle = bench.bundle("1.1.0");
    let robot = Robot::new(&bench, "robot");
    let through = cutting(robot.port, 75 * MIB);
    let outcome = bench.push(vec![address(through)], bundle, None).remove(0);
    assert_eq!(outcome.verdict, PushVerdict::Installed, "{outcome:?}");
    assert_eq!(outcome.breaks, 1);
    let installed = outcome.installed.as_ref().unwrap();
    assert!(installed.resumed, "{installed:?}");
    // What the agent had noted; what it wrote after that may count too.
    assert!(installed.held >= 32 * MIB as u64, "{installed:?}");
    assert!(installed.written <= (LARGE - 32 * MIB) as u64, "{installed:?}");
    assert!(robot.slot_b() == bench.content, "slot b has other bytes");
    assert!(xtask::push::describe_outcome(&outcome).contains("skipped"), "{outcome:?}");
}

#[test]
fn a_refusal_is_shown_with_code_sentence_and_help() {
    let bench = Bench::new(SMALL);
    let robot = Robot::new(&bench, "robot");
    let before = robot.slot_b();
    let outcome = bench.push(vec![robot.address()], bench.bundle("0.9.0"), None).remove(0);
    assert_eq!(outcome.verdict, PushVerdict::Refused, "{outcome:?}");
    let refused = outcome.refused.unwrap();
    assert_eq!(refused.code, "below-floor");
    assert!(refused.message.contains("0.9.0") && !refused.help.is_empty(), "{refused:?}");
    assert!(robot.slot_b() == before, "a refused bundle was written");

    // The same from the command line, and invalid robots and bundles.
    let bundle = bench.bundle("0.9.0");
    let xtask = |args: &[&str]| {
        let option =
            |name: &str, file: &str| format!("--ssh-option={name}={}", bench.dir.join(file));
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["push", "--bundle", bundle.as_str()])
            .args(["--no-wait", &option("IdentityFile", "user")])
            .args([&option("UserKnownHostsFile", "known_hosts")])
            .args(args)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (text(output.stdout), text(output.stderr))
    };
    let (out, errors) = xtask(&[&robot.address()]);
    assert!(out.contains("[below-floor]") && out.contains("help: "), "{out}");
    assert!(errors.contains("error: not installed on 1 of 1 robots"), "{errors}");
    let (out, _) = xtask(&[&robot.address(), "--format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json[0]["refused"]["code"], "below-floor");
    assert_eq!(json[0]["verdict"], "refused");
    let (_, errors) = xtask(&["--", "-oProxyCommand=false"]);
    assert!(errors.contains("invalid address of a robot"), "{errors}");
    let (_, errors) = xtask(&["robot.local", "robot.local"]);
    assert!(errors.contains("given twice"), "{errors}");
    let (_, errors) = xtask(&["robot.local", "--ssh-option=-F/dev/null"]);
    assert!(errors.contains("invalid option of ssh"), "{errors}");
    fs::write(&bundle, "no bundle").unwrap();
    let (_, errors) = xtask(&["robot.local"]);
    assert!(errors.contains("reading the bundle"), "{errors}");
}

/// A bundle of the API alone: one wheel, with a file that a robot's check may find.
fn api_bundle(bench: &Bench, version: &str, file: &str) -> Utf8PathBuf {
    let mut tar = tar::Builder::new(Vec::new());
    let large = noise(MIB, version.len() as u64);
    let (init, file) = ("site/robotapi/__init__.py", format!("site/robotapi/{file}"));
    for (name, content) in [(init, version.as_bytes()), (&file, &large)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let lock = ComponentLock {
        format: 1,
        package: "robotapi".to_owned(),
        module: "robotapi".to_owned(),
        version: version.to_owned(),
        python: "3.11".to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        libc: "glibc 2.36".to_owned(),
        base: Vec::new(),
        wheels: vec![ComponentWheel {
            role: "robotapi".to_owned(),
            name: "robotapi".to_owned(),
            version: version.to_owned(),
            sha256: "0".repeat(64),
            tree: xtask::artifact::hash_bytes(&tar),
            size: tar.len() as u64,
            files: 2,
            bytes: (version.len() + large.len()) as u64,
            requires: Vec::new(),
            scripts: Vec::new(),
        }],
    };
    let write = |name: &str, bytes: &[u8]| {
        let path = bench.dir.join(name);
        fs::write(&path, bytes).unwrap();
        PayloadRequest { role: name.to_owned(), path }
    };
    let payloads = vec![write(LOCK_ROLE, &lock.to_json().unwrap()), write("robotapi", &tar)];
    bench.pack("1.0.0", "api", version, payloads)
}

#[test]
fn an_api_alone_is_pushed_to_a_robot_that_goes_on_running() {
    let bench = Bench::new(SMALL);
    let robot = Robot::new(&bench, "robot");
    let write = |path: &str, text: &str| {
        let path = robot.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write(
        "usr/lib/slipway/api.toml",
        "package = 'robotapi'\nmodule = 'robotapi'\nversion = '1.0.0'\npython = '3.11'\n\
         site-packages = '/usr/lib/python3/dist-packages'\n",
    );
    write("usr/lib/slipway/api.env", "PYTHONPATH=/data/apps/api/current/site\n");
    write("usr/lib/python3/dist-packages/robotapi/__init__.py", "");
    write(
        "etc/slotd/health.d/40-api.toml",
        &format!(
            "[command]\nrun = ['sh', '-c', '! ls {}/data/apps/api/current/site/robotapi/sick']\n",
            robot.root
        ),
    );
    let before = robot.slot_b();
    let hosts = || vec![robot.address()];
    let wait = Some(Duration::from_secs(60));
    let outcome = bench.push(hosts(), api_bundle(&bench, "2.0.0", "well"), wait).remove(0);
    assert_eq!(outcome.verdict, PushVerdict::Committed, "{outcome:?}");
    let api = outcome.api.clone().unwrap();
    assert_eq!((api.version.as_str(), api.before, api.wheels), ("2.0.0", None, 1));
    let text = xtask::push::describe_outcome(&outcome);
    assert!(text.starts_with("the API 2.0.0 is running, previously the system's own;"), "{text}");
    assert_eq!(robot.slotd(&["status"])["api"]["version"], "2.0.0");

    // One that is not healthy: the robot itself rolls back to the previous version.
    let outcome = bench.push(hosts(), api_bundle(&bench, "3.0.0", "sick"), wait).remove(0);
    assert_eq!(outcome.verdict, PushVerdict::TakenBack, "{outcome:?}");
    let text = xtask::push::describe_outcome(&outcome);
    assert!(text.starts_with("rolled back") && text.contains("[api-unhealthy]"), "{text}");
    assert_eq!(robot.slotd(&["status"])["api"]["version"], "2.0.0");

    // A connection that breaks: sent again, and nothing done twice.
    let bundle = api_bundle(&bench, "4.0.0", "well");
    let through = cutting(robot.port, MIB / 2);
    let outcome = bench.push(vec![address(through)], bundle, wait).remove(0);
    assert_eq!((outcome.verdict, outcome.breaks), (PushVerdict::Committed, 1), "{outcome:?}");
    assert_eq!(robot.slotd(&["status"])["api"]["version"], "4.0.0");
    assert!(robot.slot_b() == before, "an API was written into a slot");
    let boot_id = robot.slotd(&["status"])["boot-id"].clone();
    assert_eq!(boot_id, "01234567-89ab");
}

#[test]
fn a_push_waits_until_the_trial_is_decided() {
    let bench = Bench::new(SMALL);
    let bundle = bench.bundle("1.1.0");
    let names = ["commits", "comes-back", "stays", "never"];
    let [commits, comes_back, stays, never] = names.map(|name| Robot::new(&bench, name));
    let hosts = [&commits, &comes_back, &stays, &never].map(Robot::address).to_vec();
    let outcomes = std::thread::scope(|scope| {
        scope.spawn(|| {
            commits.restart(Slot::B, "1.1.0");
            std::thread::sleep(Duration::from_secs(3));
            commits.slotd(&["commit"]);
        });
        scope.spawn(|| comes_back.restart(Slot::A, "1.0.0"));
        scope.spawn(|| stays.restart(Slot::B, "1.1.0"));
        bench.push(hosts, bundle, Some(Duration::from_secs(40)))
    });
    let verdicts: Vec<PushVerdict> = outcomes.iter().map(|outcome| outcome.verdict).collect();
    let expected = [
        PushVerdict::Committed,
        PushVerdict::TakenBack,
        PushVerdict::Undecided,
        PushVerdict::Undecided,
    ];
    assert_eq!(verdicts, expected, "{outcomes:#?}");
    let runs = |outcome: &PushOutcome| {
        (outcome.slot.unwrap(), outcome.version.as_ref().unwrap().to_string())
    };
    assert_eq!(runs(&outcomes[0]), (Slot::B, "1.1.0".to_owned()));
    assert_eq!(runs(&outcomes[1]), (Slot::A, "1.0.0".to_owned()));
    assert_eq!(runs(&outcomes[2]), (Slot::B, "1.1.0".to_owned()));
    assert_eq!(runs(&outcomes[3]), (Slot::A, "1.0.0".to_owned()));
    let why = |at: usize| outcomes[at].why.as_deref().unwrap();
    assert!(why(1).contains("slot b did not boot"), "{}", why(1));
    assert!(why(2).contains("not decided after 40 s: on trial"), "{}", why(2));
    assert!(why(3).contains("the robot has not restarted yet"), "{}", why(3));
}

#[test]
fn a_robot_that_says_too_much_or_harm_is_refused_and_drives_no_terminal() {
    let bench = Bench::new(SMALL);
    let bundle = bench.bundle("1.1.0");
    let robot = Robot::new(&bench, "robot");
    let push = |script: &str| {
        fs::write(robot.root.join("bin/slotd"), format!("#!/bin/sh\n{script}\n")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(["push", &robot.address(), "--bundle", bundle.as_str()]);
        for option in [
            format!("IdentityFile={}", bench.dir.join("user")),
            "IdentitiesOnly=yes".to_owned(),
            format!("UserKnownHostsFile={}", bench.dir.join("known_hosts")),
        ] {
            command.args(["--ssh-option", &option]);
        }
        let output = command.env("SLIPWAY_KEYS", bench.dir.join("keys")).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    // Both never end by themselves.
    let printed = push("exec yes '{\"version\": '");
    assert!(printed.contains("its answer is longer than 16777216 bytes"), "{printed}");
    let printed = push("exec tr '\\0' x < /dev/zero >&2");
    assert!(printed.contains("it wrote a line of more than 65536 bytes"), "{printed}");
    // A refusal in the agent's own form, an invalid message, and one of ssh's.
    let harm = "\\\\u001b]0;owned\\\\u0007";
    let refusal = format!(
        "{{\"refused\": {{\"code\": \"{harm}\", \"message\": \"{harm}\", \"help\": \"{harm}\"}}}}"
    );
    for script in [
        format!("printf '{refusal}'; exit 5"),
        "printf '\\033]0;owned\\007\\n' >&2; exit 3".to_owned(),
        "printf '\\033]0;owned\\007\\n' >&2; exit 255".to_owned(),
    ] {
        let printed = push(&script);
        assert!(printed.contains("\\u{1b}]0;owned\\u{7}"), "{script}: {printed:?}");
        assert!(!printed.contains(|c: char| c.is_control() && c != '\n'), "{script}: {printed:?}");
    }
}

/// The shipped settings of sshd for the user who may update and do nothing else.
fn door_settings() -> String {
    let path = Utf8Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../overlays/base/etc/ssh/sshd_config.d/10-slipway.conf.j2");
    let text = fs::read_to_string(path).unwrap();
    let at = text.find("Match User update").expect("the block of the user");
    text[at..].to_owned()
}

#[test]
fn the_user_update_installs_and_does_nothing_else() {
    // Another user than one's own needs an account of that name, which root gives sshd in mounts of its own.
    if !is_root("push::the_user_update_installs_and_does_nothing_else") {
        return;
    }
    let bench = Bench::new(SMALL);
    let bundle = bench.bundle("1.1.0");
    let robot = Robot::new(&bench, "robot");
    let port = free_port(0).unwrap();
    let root = &robot.root;
    let account = "update:x:60000:60000::/:/bin/sh\n";
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/passwd"), fs::read_to_string("/etc/passwd").unwrap() + account)
        .unwrap();
    let config = root.join("door_config");
    let settings = door_settings().replace("/usr/bin/slotd", root.join("bin/slotd").as_str());
    assert!(settings.contains(&format!("ForceCommand {root}/bin/slotd door\n")), "{settings}");
    let own = fs::read_to_string(root.join("sshd_config")).unwrap();
    let own = own.replace(&format!("Port {}", robot.port), &format!("Port {port}"));
    fs::write(&config, own + &settings).unwrap();
    // The client is the user's process: it passes through these directories, and reads the key.
    for path in
        [bench.dir.as_path(), root, &root.join("bin"), &root.join("run"), &root.join("run/slipway")]
    {
        fs::create_dir_all(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let socket = root.join("run/slipway/update.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    let agent = root.join("bin/slotd");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let input = Stdio::from(std::os::fd::OwnedFd::from(stream));
            let mut server = Command::new(&agent);
            let mut server = server.args(["door", "--serve"]).stdin(input).spawn().unwrap();
            std::thread::spawn(move || server.wait());
        }
    });
    let mut sshd = Command::new("unshare")
        .args([
            "--mount",
            "--",
            "sh",
            "-c",
            "mount --bind \"$1\" /etc/passwd && shift && exec \"$@\"",
            "sh",
        ])
        .arg(root.join("etc/passwd"))
        .arg(find("sshd"))
        .args(["-D", "-e", "-f", config.as_str()])
        .stdin(Stdio::null())
        .stderr(fs::File::create(root.join("door.log")).unwrap())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        let log = fs::read_to_string(root.join("door.log")).unwrap();
        assert!(sshd.try_wait().unwrap().is_none(), "sshd ended: {log}");
        assert!(started.elapsed() < Duration::from_secs(30), "sshd does not listen: {log}");
        std::thread::sleep(Duration::from_millis(20));
    }
    let printed = |words: &[&str]| {
        let output = Command::new("ssh")
            .args(["-T", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"])
            .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"])
            .args([
                "-i",
                bench.dir.join("user").as_str(),
                "-p",
                &port.to_string(),
                "update@127.0.0.1",
            ])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    for words in
        [&[][..], &["id"], &["sh", "-c", "id"], &["slotd", "boot-other"], &["slotd", "keys"]]
    {
        let printed = printed(words);
        assert!(
            printed.contains("not-offered") && !printed.contains("uid="),
            "{words:?}: {printed}"
        );
    }
    let host = format!("ssh://update@127.0.0.1:{port}");
    let outcome = bench.push(vec![host], bundle, None).remove(0);
    let log = fs::read_to_string(root.join("door.log")).unwrap();
    sshd.kill().unwrap();
    sshd.wait().unwrap();
    assert_eq!(outcome.verdict, PushVerdict::Installed, "{outcome:?}\n{log}");
    assert!(robot.slot_b() == bench.content, "slot b has other bytes");
}

/// What people write into their ssh_config(5) for logins of their own, for every robot.
const FOR_PEOPLE: &str = "Host *\n RemoteCommand tmux new -A -s main\n RequestTTY force\n SessionType none\n \
    StdinNull yes\n ForkAfterAuthentication yes\n PermitLocalCommand yes\n LocalCommand echo connected\n \
    LocalForward 127.0.0.1:1 127.0.0.1:1\n";

#[test]
fn settings_for_people_do_not_stop_a_push() {
    let bench = Bench::new(SMALL);
    let robot = Robot::new(&bench, "robot");
    // ssh reads its user's own file wherever HOME is; this one names another.
    let bin = bench.dir.join("bin");
    fs::create_dir(&bin).unwrap();
    let config = bench.dir.join("ssh_config");
    fs::write(&config, FOR_PEOPLE).unwrap();
    let real = find("ssh");
    make_program(&bin.join("ssh"), format!("#!/bin/sh\nexec {real} -F '{config}' \"$@\"\n"));
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
    let bundle = bench.bundle("2.0.0");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["push", &robot.address(), "--no-wait", "--bundle", bundle.as_str()])
        .args(["--ssh-option", &format!("IdentityFile={}", bench.dir.join("user"))])
        .args(["--ssh-option", "IdentitiesOnly=yes"])
        .args(["--ssh-option", &format!("UserKnownHostsFile={}", bench.dir.join("known_hosts"))])
        .env("PATH", path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(robot.slot_b(), bench.content);
}
