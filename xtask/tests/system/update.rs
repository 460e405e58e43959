//! Updates from end to end, in QEMU and through the real boot loader: a valid one is tried,
//! committed and followed by one back; each kind of invalid one is rejected, or rolls back
//! automatically. The tests wait for the boot loader's and the kernel's own output on the serial
//! console. The logs are in `dist/…/log`.

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bundle::bootstate::{BootState, Slot};
use bundle::{BuildKind, CompressionLevel, Version};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use xtask::cmd::check::ALL;
use xtask::config::machine::QemuMachine;
use xtask::keys::{self, KeyDirectory};
use xtask::push::{self, PushRequest, PushVerdict, push_to_robots};
use xtask::qemu::{self, CardOverlay, QemuSession, RestartEffect};
use xtask::update::{ComponentRequest, PackRequest, PayloadRequest, pack_bundle};

use crate::api::{self, Apis};
use crate::support::{
    Built, Folder, Xtask, built, built_of, copy_workspace, logs_in, results, results_of, root, say,
    tool,
};

const BOARD: &str = "qemu-arm64";
/// What a guest needs for one command, on a busy machine without hardware virtualisation.
const COMMAND: Duration = Duration::from_secs(180);
/// What a whole install may take there.
const INSTALL: Duration = Duration::from_secs(900);
/// And on the Pi, whose emulated card reader brings about 1 MiB a second: a slot is read once to compare.
const PI_INSTALL: Duration = Duration::from_secs(2700);
/// The size of the slots of a Pi's card, which the test of its update makes smaller.
const SLOT_SIZE: &str = "size = \"1GiB\"";
/// Seconds that a trial has there, instead of 300: for the same reason it needs 285 of them on an idle machine.
const PI_DEADLINE: u64 = 900;
/// Seconds until a trial without a commit is over, instead of the board's own: three times what a
/// start takes on a busy machine. One that shall be committed has the board's own, for its API must
/// answer.
const DEADLINE: u64 = 240;
/// The version of the update; the card has the product's own.
const UPDATE: &str = "0.1.1";

/// The user who may update the robot, and nothing else.
const USER: &str = "update";

/// The product of a copy of this workspace, after changes to the copy.
fn build(
    folder: &Folder,
    name: &str,
    change: impl FnOnce(&Utf8Path) -> Result<()>,
) -> Result<Built> {
    let workspace = folder.at(name);
    copy_workspace(&workspace)?;
    change(&workspace)?;
    let report = Xtask::new(&workspace).build(BOARD, &[])?;
    ensure!(report["stages"].is_array(), "the build's report has no stages");
    results(&workspace, BOARD)
}

/// The product with another version.
fn renumber(workspace: &Utf8Path, version: &str) -> Result<()> {
    let product = workspace.join("configs/robot-dev.toml");
    edit(&product, "\nversion = \"0.1.0\"", &format!("\nversion = \"{version}\""))
}

/// A product without an API: its server is minutes of work for an emulated robot, and has nothing to do with a slot.
fn without_api(workspace: &Utf8Path) -> Result<()> {
    let product = workspace.join("configs/robot-dev.toml");
    let text = fs::read_to_string(&product)?;
    let start = text.find("[api]\n").context("no [api]")?;
    let end = text[start..].find("\n\n").context("the end of [api]")? + start;
    fs::write(&product, [&text[..start], &text[end..]].concat())?;
    for file in [
        "etc/slotd/health.d/40-api.toml",
        "usr/lib/slipway/api-server",
        "usr/lib/slipway/proxy/locations.d/api.conf",
    ] {
        fs::remove_file(workspace.join("overlays/dev").join(file))?;
    }
    Ok(())
}

/// A card, and where what belongs to it is put.
struct Bench {
    folder: Folder,
    card: Built,
}

impl Bench {
    /// A card whose trials are over soon.
    fn new() -> Result<Self> {
        let folder = Folder::new()?;
        let card = build(&folder, "card", |workspace| {
            without_api(workspace)?;
            let board = workspace.join(format!("board/{BOARD}/board.toml"));
            edit(&board, "slipway.deadline=600", &format!("slipway.deadline={DEADLINE}"))
        })?;
        Ok(Self { folder, card })
    }

    /// Starts a machine on an image of this card.
    fn start(&self, name: &str, image: &Utf8Path) -> Result<Robot> {
        Robot::with_disks(&self.card, name, image, &self.folder, &[])
    }

    /// A copy of the card's image whose slot b is on trial after `break_it` worked on its file system.
    fn broken(&self, name: &str, commands: &[String]) -> Result<Utf8PathBuf> {
        let image = self.folder.at(&format!("{name}.img"));
        tool("cp").args(["--sparse=always", self.card.image.as_str(), image.as_str()]).run()?;
        let disk = &self.card.plan.disk;
        let root = disk.partition("root-b").context("root-b")?;
        let script = self.folder.at(&format!("{name}.debugfs"));
        fs::write(&script, commands.join("\n") + "\n")?;
        let device = format!("{image}?offset={}", root.offset);
        let printed = tool("debugfs").args(["-w", "-f", script.as_str(), &device]).read()?;
        ensure!(!printed.contains("not found"), "debugfs: {printed}");
        let state = BootState { sequence: 2, active: Slot::A, trial: Some(Slot::B), tries: 1 };
        let sector = disk.states.first().context("the board keeps no boot state")?;
        let file = fs::OpenOptions::new().write(true).open(&image)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &state.encode(), sector.offset)?;
        Ok(image)
    }
}

/// The machine of a card's board.
fn machine(card: &Built) -> Result<QemuMachine> {
    Ok(card.plan.board.qemu.as_ref().context("the board has no machine")?.machine.clone())
}

/// A machine with more disks behind its card.
fn with_disks<'a>(
    machine: &QemuMachine,
    disks: impl IntoIterator<Item = &'a Utf8Path>,
) -> QemuMachine {
    let mut machine = machine.clone();
    for (index, disk) in disks.into_iter().enumerate() {
        let file = disk.as_str().replace(',', ",,");
        machine.arguments.extend([
            "-drive".to_owned(),
            format!("file={file},format=raw,if=none,readonly=on,id=disk{index}"),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive=disk{index}"),
        ]);
    }
    machine
}

fn edit(path: &Utf8Path, from: &str, to: &str) -> Result<()> {
    let text = fs::read_to_string(path)?;
    ensure!(text.contains(from), "{path} has no `{from}`");
    Ok(fs::write(path, text.replacen(from, to, 1))?)
}

/// A running machine.
struct Robot {
    name: String,
    session: QemuSession,
    boot: Duration,
    hostname: String,
    /// Where its SSH server is, on the loopback address.
    port: u16,
    overlay: CardOverlay,
}

impl Robot {
    /// Starts a machine. The log is beside those of the other tests, also when the build is in
    /// another directory.
    fn start(
        card: &Built,
        name: &str,
        machine: &QemuMachine,
        overlay: CardOverlay,
    ) -> Result<Self> {
        let (product, board) = (&card.plan.product.name, &card.plan.board.name);
        let log = root().join(format!("dist/{product}/{board}/log/update-{name}.log"));
        say(format!("{name}: the console goes to {log}"));
        let files = card.qemu.as_ref().context("the board has no machine")?;
        let port = qemu::free_port(0)?;
        let network = machine.network.as_ref().map(|_| port);
        let session =
            QemuSession::start(machine, files, &overlay, &log, RestartEffect::Restart, network)?;
        let boot = Duration::from_secs(machine.boot_timeout);
        let hostname = card.plan.network.hostname.clone();
        Ok(Self { name: name.to_owned(), session, boot, hostname, port, overlay })
    }

    /// Starts a card's board on an image, with more disks behind it: `/dev/vdb` and so on.
    fn with_disks(
        card: &Built,
        name: &str,
        image: &Utf8Path,
        folder: &Folder,
        disks: &[&Utf8Path],
    ) -> Result<Self> {
        let machine = with_disks(&machine(card)?, disks.iter().copied());
        let overlay = CardOverlay::create(&machine, image, &folder.at(&format!("{name}.qcow2")))?;
        Self::start(card, name, &machine, overlay)
    }

    /// The machine ends at once and starts again from the same card.
    fn loses_its_power(self, card: &Built, machine: &QemuMachine) -> Result<Self> {
        let Self { name, session, overlay, .. } = self;
        session.lose_power()?;
        Self::start(card, &format!("{name}-again"), machine, overlay)
    }

    /// Waits for the boot loader's choice of a slot, and for nothing after it.
    fn chooses(&mut self, slot: Slot) -> Result<()> {
        // A panic's words come before its restart, and a trial's deadline may have to pass.
        let time = self.boot + Duration::from_secs(DEADLINE);
        self.session.expect("slipway: starting slot ", time).context("no boot loader")?;
        let chosen = self.session.expect("\n", self.boot)?;
        ensure!(
            chosen.trim() == slot.name(),
            "slot {} was started, expected {slot}",
            chosen.trim()
        );
        Ok(())
    }

    /// Waits for the boot loader to choose this slot, and then for the console's shell.
    fn comes_up(&mut self, slot: Slot) -> Result<()> {
        self.chooses(slot)?;
        self.logs_in(slot)
    }

    fn logs_in(&mut self, slot: Slot) -> Result<()> {
        self.session.expect(&format!("slipway-init: slot {slot}"), self.boot)?;
        logs_in(&mut self.session, &self.hostname, self.boot, COMMAND)
    }

    /// What the agent answers, and its exit code.
    fn slotd(&mut self, arguments: &str, time: Duration) -> Result<(i32, Value)> {
        let (code, printed) =
            self.session.run(&format!("slotd --format json {arguments} 2>/dev/null"), time)?;
        say(format!("{}: slotd {arguments}: {code} {printed}", self.name));
        // The console breaks no lines, but the shell's prompt may stand before.
        let json = printed.find('{').and_then(|at| serde_json::from_str(&printed[at..]).ok());
        Ok((code, json.with_context(|| format!("slotd {arguments} printed `{printed}`"))?))
    }

    fn status(&mut self) -> Result<Value> {
        let (code, status) = self.slotd("status", COMMAND)?;
        ensure!(code == 0, "slotd status failed with {code}");
        Ok(status)
    }

    /// Waits until nothing is on trial any more.
    fn settles(&mut self) -> Result<Value> {
        let end = Instant::now() + self.boot;
        loop {
            let status = self.status()?;
            if status["pending"] == false {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("the trial is not decided: {status}");
            }
            // Between two questions, each of which is seconds of an emulated processor.
            self.session.run("sleep 5", COMMAND)?;
        }
    }

    /// Refuses a bundle on a disk with this code and exit code.
    fn refuses(&mut self, disk: &str, code: &str, expected: i32) -> Result<()> {
        let (exit, printed) = self.slotd(&format!("install - </dev/{disk}"), INSTALL)?;
        ensure!(exit == expected, "expected exit code {expected}, found {exit}: {printed}");
        ensure!(printed["refused"]["code"] == code, "expected `{code}`, found {printed}");
        Ok(())
    }

    /// Installs a bundle and follows the restart into its trial.
    fn installs(&mut self, source: &str, slot: Slot, time: Duration) -> Result<()> {
        say(format!("installing {source} into slot {slot}"));
        let end = Instant::now() + self.boot;
        loop {
            self.session.send_line(&format!("slotd install {source}"))?;
            let words = ["slipway: starting slot ", "[busy]"];
            let (printed, _) =
                self.session.expect_any(&words, time).context("no restart into the trial")?;
            if printed == 0 {
                break;
            }
            // A commit ends with systemd taking over the watchdog, a little after the slot is committed.
            ensure!(Instant::now() < end, "the agent stays busy");
            self.session.run("sleep 2", COMMAND)?;
        }
        let chosen = self.session.expect("\n", self.boot)?;
        ensure!(chosen.trim() == slot.name(), "slot {} is tried, not {slot}", chosen.trim());
        self.logs_in(slot)
    }
}

fn expect_running(status: &Value, slot: Slot, version: &str) -> Result<()> {
    let name = slot.name();
    ensure!(status["running"] == name, "slot {} runs, expected {name}", status["running"]);
    ensure!(status["boot"]["active"] == name, "slot {} is committed", status["boot"]["active"]);
    ensure!(status["version"] == version, "version {} runs", status["version"]);
    Ok(())
}

/// Bundles that a robot must refuse, made of the update's own root file system.
fn bad_bundles(folder: &Folder, update: &Built) -> Result<Vec<(Utf8PathBuf, &'static str, i32)>> {
    let root = folder.at("root.ext4");
    let placed = update.plan.disk.partition("root-a").context("root-a")?;
    // Small payloads do: each must be refused before the first of them is read.
    tool("dd")
        .args([&format!("if={}", update.image), &format!("of={root}"), "bs=1M", "count=4"])
        .args([format!("skip={}", placed.offset >> 20)])
        .run()?;
    let signer = KeyDirectory::open(&keys::key_directory()?)?.signer(BuildKind::Development)?;
    let make = |name: &str, board: &str, version: &str| -> Result<Utf8PathBuf> {
        let version = Version::parse(version).context("a version")?;
        let path = folder.at(name);
        let request = PackRequest {
            product: update.plan.product.name.clone(),
            version: version.clone(),
            kind: BuildKind::Development,
            boards: vec![board.to_owned()],
            minimum_version: Version::parse("0.0.1").context("a version")?,
            key_epoch: None,
            epoch: update.plan.epoch,
            components: vec![ComponentRequest {
                name: "system".to_owned(),
                version,
                payloads: vec![PayloadRequest { role: "root".to_owned(), path: root.clone() }],
            }],
            level: CompressionLevel::Fast,
            workers: None,
            signers: std::slice::from_ref(&signer),
        };
        pack_bundle(&request, &path)?;
        Ok(path)
    };
    let mut bundles = vec![
        (make("board.bundle", "another-board", UPDATE)?, "wrong-board", 3),
        (make("older.bundle", BOARD, "0.0.9")?, "below-floor", 3),
    ];
    // One bit of the signature: its base64 stays base64.
    let mut bytes = fs::read(&update.bundle)?;
    let words = b"\ntrusted comment:";
    let at = bytes.windows(words.len()).position(|w| w == words).context("a signature")? - 20;
    bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
    let signature = folder.at("signature.bundle");
    fs::write(&signature, &bytes)?;
    bundles.push((signature, "bad-signature", 3));
    let truncated = folder.at("truncated.bundle");
    bytes = fs::read(&update.bundle)?;
    bytes.truncate(bytes.len() / 2 / 512 * 512);
    fs::write(&truncated, &bytes)?;
    bundles.push((truncated, "truncated", 5));
    Ok(bundles)
}

#[test]
fn good_updates_are_tried_and_committed() -> Result<()> {
    let folder = &Folder::new()?;
    let card = &build(folder, "card", without_api)?;
    let update = &build(folder, "update", |workspace| {
        without_api(workspace)?;
        renumber(workspace, UPDATE)
    })?;
    let bad = bad_bundles(folder, update)?;
    let mut disks = vec![update.bundle.as_path()];
    disks.extend(bad.iter().map(|(path, ..)| path.as_path()));
    let mut robot = Robot::with_disks(card, "good", &card.image, folder, &disks)?;
    robot.comes_up(Slot::A)?;
    let version = card.plan.product.version.to_string();
    expect_running(&robot.status()?, Slot::A, &version)?;
    for ((_, code, exit), disk) in bad.iter().zip(["vdc", "vdd", "vde", "vdf"]) {
        robot.refuses(disk, code, *exit)?;
        expect_running(&robot.settles()?, Slot::A, &version)?;
    }
    robot.installs("- </dev/vdb", Slot::B, INSTALL)?;
    expect_running(&robot.settles()?, Slot::B, UPDATE)?;
    // And back into slot a, as the robot's owner would send the next one.
    pushed(folder, update, &mut robot)?;
    robot.comes_up(Slot::A)?;
    expect_running(&robot.settles()?, Slot::A, UPDATE)
}

/// APIs alone, and what becomes of one under an update of the system and a reset.
#[test]
fn an_api_is_changed_and_the_system_below_it() -> Result<()> {
    let folder = &Folder::new()?;
    let card = built(BOARD)?;
    let update = build(folder, "update", |workspace| {
        renumber(workspace, UPDATE)?;
        // An older API on data does not fit it.
        let product = workspace.join("configs/robot-dev.toml");
        edit(&product, "\n[api]\n", "\n[api]\nminimum-version = \"10.1.0\"\n")
    })?;
    let apis = Apis::make(folder, BOARD, &card.plan)?;
    let mut disks = vec![update.bundle.as_path()];
    disks.extend(apis.disks());
    let mut robot = Robot::with_disks(card, "api", &card.image, folder, &disks)?;
    robot.comes_up(Slot::A)?;
    api::changed_without_a_restart(&mut robot.session, &apis, ["vdc", "vdd", "vde"])?;
    robot.installs("- </dev/vdb", Slot::B, INSTALL)?;
    expect_running(&robot.settles()?, Slot::B, UPDATE)?;
    api::fell_back(&mut robot.session, &apis)?;
    // Without anything on data, too.
    robot.session.send_line("slotd reset --no-backup")?;
    robot.comes_up(Slot::B)?;
    api::serves_its_own(&mut robot.session, &apis)
}

/// Sends the update over SSH as the user who may do nothing else, and follows it to its commit in slot a.
fn pushed(folder: &Folder, update: &Built, robot: &mut Robot) -> Result<()> {
    let key = folder.at("id_ed25519");
    tool("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", key.as_str()]).run()?;
    let public = fs::read_to_string(format!("{key}.pub"))?;
    let keys = "/data/identity/ssh/authorized_keys.d";
    let command =
        format!("mkdir -p {keys} && echo '{}' | tee {keys}/root >{keys}/{USER}", public.trim());
    let (code, printed) = robot.session.run(&command, COMMAND)?;
    ensure!(code == 0, "the key is not taken: {printed}");
    let mut ssh_options: Vec<String> =
        ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"].map(str::to_owned).to_vec();
    ssh_options.extend([format!("Port={}", robot.port), format!("IdentityFile={key}")]);
    let over_ssh = |user: &str, command: &str| -> Result<String> {
        let options = ssh_options.iter().flat_map(|option| ["-o", option]);
        tool("ssh").args(options).args([&format!("{user}@127.0.0.1"), command]).read()
    };
    for user in ["root", USER] {
        let status: Value = serde_json::from_str(&over_ssh(user, "slotd status --format json")?)?;
        ensure!(status["running"] == "b", "{user}: {status}");
    }
    ensure!(over_ssh("root", "id -un")?.trim() == "root", "root has no shell");
    for command in ["id -un", "slotd roll-back", "slotd status; id -un", "", "slotd keys /data/x"] {
        let printed = over_ssh(USER, command);
        ensure!(printed.is_err(), "{USER} may ask for `{command}`: {printed:?}");
    }
    let request = PushRequest {
        hosts: vec![format!("{USER}@127.0.0.1")],
        bundle: update.bundle.clone(),
        ssh_options,
        wait: Some(INSTALL),
    };
    let outcomes = push_to_robots(&request)?;
    for outcome in &outcomes {
        say(push::describe_outcome(outcome));
        let done =
            (outcome.verdict, outcome.slot, outcome.version.as_ref().map(ToString::to_string));
        let expected = (PushVerdict::Committed, Some(Slot::A), Some(UPDATE.to_owned()));
        ensure!(done == expected, "pushing: {outcome:?}");
    }
    ensure!(outcomes.len() == 1, "{} outcomes of one robot", outcomes.len());
    Ok(())
}

/// Starts a card with a broken trial; after what the trial says, slot a must start again. Where the agent is asked, the
/// trial must be over for it, too.
fn comes_back(bench: &Bench, case: &Case) -> Result<()> {
    let name = case.name;
    let image = bench.broken(name, &case.commands)?;
    let mut robot = bench.start(name, &image)?;
    (case.trial)(&mut robot).with_context(|| format!("{name}: the trial"))?;
    if case.to_a_login || std::env::var_os(ALL).is_some() {
        robot.comes_up(Slot::A).with_context(|| format!("{name}: coming back"))?;
        let status = robot.settles()?;
        let version = bench.card.plan.product.version.to_string();
        expect_running(&status, Slot::A, &version).with_context(|| format!("{name}: {status}"))?;
    } else {
        robot.chooses(Slot::A).with_context(|| format!("{name}: coming back"))?;
        robot.session.expect("slipway-init: slot a", robot.boot)?;
    }
    say(format!("{name}: came back"));
    drop(robot);
    Ok(fs::remove_file(image)?)
}

/// Puts a file into the broken slot: a debugfs command for each step.
fn put(bench: &Bench, path: &str, content: &str, executable: bool) -> Result<Vec<String>> {
    let source = bench.folder.at(&path.replace('/', "_"));
    fs::write(&source, content)?;
    let (folder, name) = path.rsplit_once('/').context("a directory")?;
    let mode = if executable { "0100755" } else { "0100644" };
    Ok(vec![
        format!("cd {folder}"),
        format!("write {source} {name}"),
        format!("sif {path} mode {mode}"),
    ])
}

const SOON: Duration = Duration::from_secs(600);

/// A broken trial: how it is broken, and what the robot says until it comes back.
struct Case {
    name: &'static str,
    commands: Vec<String>,
    trial: fn(&mut Robot) -> Result<()>,
    /// Whether to ask the agent afterwards in every run, and not only in `test --all`: a minute and more of a start that
    /// is the same for every trial that the boot loader ends.
    to_a_login: bool,
}

fn cases(bench: &Bench) -> Result<Vec<Case>> {
    let mut no_initrd = vec!["rm /boot/initrd.img".to_owned()];
    no_initrd.extend(put(bench, "/boot/initrd.img", "no initrd at all", false)?);
    let mut hangs = vec!["rm /usr/sbin/init".to_owned()];
    hangs.extend(put(bench, "/usr/sbin/init", "#!/bin/sh\nexec sleep infinity\n", true)?);
    let check = "[command]\nrun = [\"/bin/false\"]\n";
    let unhealthy = put(bench, "/etc/slotd/health.d/99-fails.toml", check, false)?;
    // Without a commit or a restart, the watchdog restarts the robot.
    let masked = "rm /etc/systemd/system/multi-user.target.wants/slipway-health.service".to_owned();
    Ok(vec![
        Case {
            name: "hang",
            commands: hangs,
            trial: |robot| {
                robot.chooses(Slot::B)?;
                robot.session.expect("slipway-init: slot b", SOON).map(drop)
            },
            to_a_login: true,
        },
        Case {
            name: "unhealthy",
            commands: unhealthy,
            trial: |robot| robot.comes_up(Slot::B),
            to_a_login: true,
        },
        Case {
            name: "deadline",
            commands: vec![masked],
            trial: |robot| robot.comes_up(Slot::B),
            to_a_login: false,
        },
        Case {
            name: "no-kernel",
            commands: vec!["rm /boot/vmlinuz".to_owned()],
            trial: |robot| {
                let words = "slipway: slot b does not load, its trial has failed";
                robot.session.expect(words, SOON).map(drop)
            },
            to_a_login: false,
        },
        Case {
            name: "panic",
            commands: no_initrd,
            trial: |robot| {
                robot.chooses(Slot::B)?;
                robot.session.expect("Kernel panic - not syncing", SOON).map(drop)
            },
            to_a_login: false,
        },
        Case {
            name: "no-init",
            commands: vec!["rm /usr/sbin/init".to_owned()],
            trial: |robot| {
                robot.chooses(Slot::B)?;
                let words = "slipway-init: cannot start: slot b has no /sbin/init";
                robot.session.expect(words, SOON).map(drop)
            },
            to_a_login: false,
        },
    ])
}

/// How many at a time: a start keeps little more than one core busy, and the first three cases mostly wait for
/// their deadline. More than that, and a start would not end before it.
fn at_once() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 3))
}

#[test]
fn bad_updates_come_back_by_themselves() -> Result<()> {
    let bench = &Bench::new()?;
    let left = Mutex::new(cases(bench)?.into_iter());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let worker = || -> Result<()> {
        while let Some(case) = next() {
            comes_back(bench, &case)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once()).map(|_| scope.spawn(worker)).collect();
        let results = workers.into_iter().map(|w| w.join().map_err(|_| anyhow!("a case died"))?);
        // All cases come to their end, so that one failure does not hide another's log.
        results.collect::<Vec<_>>().into_iter().collect()
    })
}

/// The card image of a Raspberry Pi with its own bundle on `data`: into slot b, committed. Then slot a on trial, whose power
/// goes before it is committed: slot b again.
fn a_pi_takes_an_update(board: &str) -> Result<()> {
    let folder = Folder::new()?;
    let workspace = folder.at("card");
    copy_workspace(&workspace)?;
    without_api(&workspace)?;
    let options = "\"watchdog.open_timeout=120\"";
    let more = format!("{options}, \"slipway.deadline={PI_DEADLINE}\"");
    edit(&workspace.join("board/common/linux.toml"), options, &more)?;
    // A slot is read as a whole, a mebibyte a second.
    let flow = workspace.join("board/common/flow-uboot.toml");
    let text = fs::read_to_string(&flow)?;
    // Those of earlier cards come behind, and stay.
    ensure!(text.matches(SLOT_SIZE).count() == 4, "{flow} has other slots than `{SLOT_SIZE}`");
    fs::write(&flow, text.replacen(SLOT_SIZE, "size = \"384MiB\"", 2))?;
    Xtask::new(&workspace).build(board, &[])?;
    let card = &results(&workspace, board)?;
    let image = folder.at("card.img");
    tool("cp").args(["--sparse=always", card.image.as_str(), image.as_str()]).run()?;
    write_to_data(card, &image, &[(&card.bundle, "update.bundle")], &folder)?;

    let machine = &machine(card)?;
    let overlay = CardOverlay::create(machine, &image, &folder.at("card.qcow2"))?;
    let mut robot = Robot::start(card, board, machine, overlay)?;
    robot.comes_up(Slot::A)?;
    robot.installs("/data/update.bundle", Slot::B, PI_INSTALL)?;
    let version = card.plan.product.version.to_string();
    expect_running(&robot.settles()?, Slot::B, &version)?;
    robot.session.send_line("slotd boot-other")?;
    robot.chooses(Slot::A)?;
    robot.session.expect("slipway-init: slot a", robot.boot)?;
    let mut robot = robot.loses_its_power(card, machine)?;
    robot.comes_up(Slot::B)?;
    expect_running(&robot.settles()?, Slot::B, &version)
}

#[test]
fn a_pi_3_takes_an_update() -> Result<()> {
    if std::env::var_os(ALL).is_none() {
        say("left out: takes 45 minutes; `cargo xtask test --all` does it");
        return Ok(());
    }
    a_pi_takes_an_update("pi3")
}

#[test]
fn a_pi_4_takes_an_update() -> Result<()> {
    if std::env::var_os(ALL).is_none() {
        say("left out: takes an hour; `cargo xtask test --all` does it");
        return Ok(());
    }
    if let Err(older) = qemu::require_version(&machine(built("pi4-uboot")?)?) {
        say(format!("left out: {older}"));
        return Ok(());
    }
    a_pi_takes_an_update("pi4-uboot")
}

/// The keys of a team that makes releases, and what it builds with them.
struct Team {
    folder: Folder,
    keys: Utf8PathBuf,
}

impl Team {
    const PASSWORD: &str = "a password of tests";

    fn tool(&self, workspace: &Utf8Path) -> Xtask {
        let tool = Xtask::new(workspace).env("SLIPWAY_KEYS", &self.keys);
        tool.env("SLIPWAY_KEY_PASSWORD", Self::PASSWORD)
    }

    fn keys(&self, words: &[&str]) -> Result<String> {
        self.tool(&root()).run(&[&["keys"], words].concat())?.good()
    }

    /// The development product as a release of this version.
    fn build(&self, version: &str) -> Result<Built> {
        let workspace = self.folder.at(version);
        copy_workspace(&workspace)?;
        let product = workspace.join("configs/robot-dev.toml");
        edit(&product, "\nkind = \"development\"", "\nkind = \"release\"")?;
        renumber(&workspace, version)?;
        self.tool(&workspace).build(BOARD, &[])?;
        results(&workspace, BOARD)
    }
}

/// Puts files at the top of a card image's `data`.
fn write_to_data(
    card: &Built,
    image: &Utf8Path,
    files: &[(&Utf8PathBuf, &str)],
    folder: &Folder,
) -> Result<()> {
    let data = card.plan.disk.partition("data").context("data")?;
    let script = folder.at("debugfs");
    let lines = files.iter().map(|(path, name)| format!("write {path} {name}\n"));
    fs::write(&script, lines.collect::<String>())?;
    let device = format!("{image}?offset={}", data.offset);
    tool("debugfs").args(["-w", "-f", script.as_str(), &device]).run()
}

/// A robot of a release product, from the making of its key: developers' bundles count for nothing there, and a
/// key that is replaced and revoked reaches it as a file.
#[test]
fn a_release_takes_releases_only() -> Result<()> {
    if std::env::var_os(ALL).is_none() {
        say("left out: takes 10 minutes; `cargo xtask test --all` does it");
        return Ok(());
    }
    let developers = built(BOARD)?;
    let folder = Folder::new()?;
    let team = Team { keys: folder.at("keys"), folder };
    let without_key = team.build("0.1.0").map(drop).map_err(|error| format!("{error:#}"));
    ensure!(
        without_key.as_ref().is_err_and(|e| e.contains("a release cannot be signed by a dev")),
        "a release without a key: {without_key:?}"
    );
    fs::remove_dir_all(team.folder.at("0.1.0"))?;
    team.keys(&["new"])?;
    let (card, update) = (team.build("0.1.0")?, team.build(UPDATE)?);
    let listed = team.keys(&["list"])?;
    // The first line is about the set.
    let old = listed.lines().nth(1).and_then(|line| line.split_whitespace().next());
    let old = old.context("a key")?.to_owned();
    team.keys(&["rotate", "--revoke"])?;
    let next = team.build("0.1.2")?;
    // As the documentation has it: the set with the new key, signed by the one that the robot knows.
    let secret = team.keys.join(format!("release-1-{old}.key"));
    let set = team.keys.join("keyset.json");
    let mut sign = std::process::Command::new("minisign");
    sign.args(["-S", "-s", secret.as_str(), "-m", set.as_str()]);
    let mut child = sign.stdin(std::process::Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("standard input")?;
    std::io::Write::write_all(&mut input, format!("{}\n", Team::PASSWORD).as_bytes())?;
    drop(input);
    ensure!(child.wait()?.success(), "minisign failed");

    let signature = format!("{set}.minisig").into();
    let files = [(&set, "keyset.json"), (&signature, "keyset.json.minisig")];
    write_to_data(&card, &card.image, &files, &team.folder)?;
    let disks = [&developers.bundle, &next.bundle, &update.bundle].map(|path| path.as_path());
    let mut robot = Robot::with_disks(&card, "release", &card.image, &team.folder, &disks)?;
    robot.comes_up(Slot::A)?;
    robot.refuses("vdb", "not-trusted", 3)?;
    robot.refuses("vdc", "not-trusted", 3)?;
    robot.installs("- </dev/vdd", Slot::B, INSTALL)?;
    expect_running(&robot.settles()?, Slot::B, UPDATE)?;
    let (code, printed) = robot.slotd("keys /data/keyset.json", COMMAND)?;
    ensure!(code == 0, "the key set is not taken: {printed}");
    robot.refuses("vdd", "not-trusted", 3)?;
    robot.installs("- </dev/vdc", Slot::A, INSTALL)?;
    expect_running(&robot.settles()?, Slot::A, "0.1.2")
}

/// From one version to the next on the next Debian: its systemd, its kernel's watchdog, its boot loader.
#[test]
fn the_next_debian_takes_an_update() -> Result<()> {
    if std::env::var_os(ALL).is_none() {
        say("left out: another base, some 10 minutes; `cargo xtask test --all` does it");
        return Ok(());
    }
    const PRODUCT: &str = "robot-trixie";
    let card = built_of(Some(PRODUCT), BOARD)?;
    let folder = Folder::new()?;
    let workspace = folder.at("update");
    copy_workspace(&workspace)?;
    let product = workspace.join(format!("configs/examples/{PRODUCT}.toml"));
    edit(&product, "\nversion = \"0.1.0\"", &format!("\nversion = \"{UPDATE}\""))?;
    Xtask::new(&workspace).build(BOARD, &["--product", PRODUCT])?;
    let update = results_of(&workspace, Some(PRODUCT), BOARD)?;
    let disks = [update.bundle.as_path()];
    let mut robot = Robot::with_disks(card, "next-debian", &card.image, &folder, &disks)?;
    robot.comes_up(Slot::A)?;
    robot.installs("- </dev/vdb", Slot::B, INSTALL)?;
    expect_running(&robot.settles()?, Slot::B, UPDATE)
}
