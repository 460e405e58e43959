//! Nothing that is typed, sent or left on the boot partition keeps a Pi 3's U-Boot from its script: characters on both
//! serial ports (the motor controller of a robot, a modem), the keys of a USB keyboard (a barcode scanner), files
//! that Debian's U-Boot looks for by itself. The same card without our environment shows that each would.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8PathBuf;
use xtask::cmd::check::ALL;
use xtask::config::machine::QemuMachine;
use xtask::qemu::{CardOverlay, MachineFiles, QemuSession, RestartEffect};

use crate::support::{Folder, built, say, tool};

/// A bound, not a wait: U-Boot's own seconds are ten times as long on a busy machine.
const LIMIT: Duration = Duration::from_secs(900);
/// What is sent again and again: an answer of a motor controller, any key, an end of line, Ctrl-C.
const NOISE: &[u8] = b"ok\r\n \x03";

/// What U-Boot ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Kernel,
    Prompt,
    ForeignMenu,
}

struct Bench {
    machine: QemuMachine,
    files: MachineFiles,
    log: Utf8PathBuf,
    folder: Folder,
}

impl Bench {
    /// Starts the card and waits for the end of U-Boot.
    fn run(&self, name: &str, noise: bool) -> Result<End> {
        let at = |what: &str| self.folder.at(&format!("{name}.{what}"));
        let (console, monitor) = (at("console"), at("monitor"));
        let mut machine = self.machine.clone();
        // The first port is the session's; the second, U-Boot's, is a socket, of which both ends are looked at here.
        machine.serial_port = 0;
        let socket = |path: &Utf8PathBuf| format!("unix:{path},server=on,wait=off");
        machine.arguments.extend(["-serial".to_owned(), socket(&console)]);
        machine.arguments.extend(["-monitor".to_owned(), socket(&monitor)]);
        machine.arguments.extend(["-device", "usb-kbd"].map(str::to_owned));
        let overlay = CardOverlay::create(&machine, &self.files.image, &at("qcow2"))?;
        let log = self.log.join(format!("typed-{name}.log"));
        say(format!("{name}: what U-Boot says goes to {log}"));
        let mut session =
            QemuSession::start(&machine, &self.files, &overlay, &log, RestartEffect::Exit, None)?;
        let end = Instant::now() + LIMIT;
        let connect = |path: &Utf8PathBuf| -> Result<UnixStream> {
            loop {
                match UnixStream::connect(path) {
                    Ok(stream) => {
                        stream.set_nonblocking(true)?;
                        return Ok(stream);
                    }
                    Err(error) if Instant::now() > end => return Err(error).context("QEMU's port"),
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        };
        let (mut console, mut monitor) = (connect(&console)?, connect(&monitor)?);
        let mut printed = Vec::new();
        let mut turn = 0;
        let found = loop {
            let mut buffer = [0; 4096];
            match console.read(&mut buffer) {
                Ok(0) => bail!("the machine has ended:\n{}", String::from_utf8_lossy(&printed)),
                Ok(n) => printed.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
            let text = String::from_utf8_lossy(&printed);
            let last = text.lines().last().unwrap_or_default();
            if text.contains("slipway: starting slot a") && text.contains("Starting kernel") {
                break End::Kernel;
            } else if last.starts_with("U-Boot> ") || last.starts_with("=> ") {
                break End::Prompt;
            } else if text.contains("a foreign system") {
                break End::ForeignMenu;
            }
            ensure!(Instant::now() < end, "neither a kernel nor a prompt:\n{text}");
            if noise {
                // A full buffer is one that is not read, which is what the test expects.
                drop(console.write(NOISE));
                turn += 1;
                if turn % 20 == 0 {
                    session.send_line("ok")?;
                    drop(monitor.write(b"sendkey ret\nsendkey spc\nsendkey ctrl-c\n"));
                }
                drop(monitor.read(&mut buffer));
            }
        };
        drop(session);
        let text = String::from_utf8_lossy(&printed);
        fs::write(&log, text.as_bytes())?;
        say(format!("{name}: {found:?}, {} kB said", printed.len() >> 10));
        if found == End::Kernel {
            ensure!(
                text.contains("Loading Environment from FAT... OK"),
                "another environment:\n{text}"
            );
            ensure!(!text.contains("starting USB"), "USB was started:\n{text}");
        }
        Ok(found)
    }
}

#[test]
fn nothing_stops_u_boot_on_its_way() -> Result<()> {
    if std::env::var_os(ALL).is_none() {
        say("left out: takes 3 to 8 minutes; `cargo xtask test --all` does it");
        return Ok(());
    }
    let built = built("pi3")?;
    let machine = &built.plan.board.qemu.as_ref().context("the board has a machine")?.machine;
    let folder = Folder::new()?;
    let card = folder.at("card.img");
    tool("cp").args(["--sparse=always", built.image.as_str(), card.as_str()]).run()?;

    // All that Debian's U-Boot looks for before a boot.scr, and what looks like another environment.
    let boot = built.plan.disk.partition("boot").context("a boot partition")?;
    let volume = format!("{card}@@{}", boot.offset);
    let menu = folder.at("extlinux.conf");
    let text =
        "MENU TITLE a foreign system\nTIMEOUT 1\nLABEL x\nMENU LABEL a foreign system\nLINUX /x\n";
    fs::write(&menu, text)?;
    let script = folder.at("foreign.scr");
    let commands = folder.at("foreign.txt");
    fs::write(&commands, "echo a foreign system\nsleep 1000\n")?;
    let args = ["-A", "arm64", "-T", "script", "-C", "none", "-d"];
    tool("mkimage").args(args).args([commands.as_str(), script.as_str()]).read()?;
    tool("mmd").args(["-i", &volume, "::extlinux", "::boot"]).run()?;
    for (from, to) in [
        (&menu, "::extlinux/extlinux.conf"),
        (&script, "::boot.scr.uimg"),
        (&script, "::boot/boot.scr"),
        (&menu, "::uboot-redund.env"),
    ] {
        tool("mcopy").args(["-i", &volume, from.as_str(), to]).run()?;
    }
    let files = built.qemu.clone().context("the board has a machine")?;
    let log = built.dist.join("log");
    let files = MachineFiles { image: card, ..files };
    let bench = Bench { machine: machine.clone(), files, log, folder };
    let end = bench.run("ours", true)?;
    ensure!(end == End::Kernel, "with noise on all its inputs U-Boot ends in: {end:?}");

    // The same without our environment: the noise arrives, and so do the files.
    tool("mdel").args(["-i", &volume, "::uboot.env"]).run()?;
    let end = bench.run("stock-noise", true)?;
    ensure!(end == End::Prompt, "the noise does not reach U-Boot: {end:?}");
    let end = bench.run("stock-files", false)?;
    ensure!(end == End::ForeignMenu, "U-Boot does not look at the files: {end:?}");
    Ok(())
}
