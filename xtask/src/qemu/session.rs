//! A machine driven by a program: wait for words on its serial console, type lines, read results.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::process::{Pid, Signal, kill_process};

use super::{CardOverlay, MachineFiles, PROGRAM, QemuMachine, RestartEffect, qemu_arguments};
use crate::exec::Tool;

/// How many of the console's last lines an error shows.
const TAIL_LINES: usize = 25;

/// Output after which waiting for anything else is useless.
const FATAL: [&str; 2] = ["Kernel panic - not syncing", "slipway-init: cannot start"];

/// A running machine. Dropping it stops it (and only it).
#[derive(Debug)]
pub struct QemuSession {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// Output of the console that was not waited for yet.
    unread: Vec<u8>,
    /// The last output of the console, for errors.
    tail: Vec<u8>,
    log: Utf8PathBuf,
    commands: u32,
}

impl QemuSession {
    /// Starts a machine on an overlay; the output of its console is also written to `log`. Its SSH
    /// server is at this port of the loopback address; without one it has no network.
    ///
    /// # Errors
    /// When QEMU is missing or older than the machine, or the log cannot be written.
    pub fn start(
        machine: &QemuMachine,
        files: &MachineFiles,
        overlay: &CardOverlay,
        log: &Utf8Path,
        on_restart: RestartEffect,
        ssh_port: Option<u16>,
    ) -> Result<Self> {
        if let Some(parent) = log.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
        }
        let mut log_file = File::create(log).with_context(|| format!("creating the log {log}"))?;
        super::require_version(machine)?;
        let card = overlay.path();
        let tree = files.tree(card.parent().context("the overlay is in a directory")?)?;
        let arguments =
            qemu_arguments(machine, files, tree.as_deref(), card, "stdio", ssh_port, on_restart);
        // The machine ends with the process that drives it, also when that is killed.
        let tool = Tool::new("setpriv").args(["--pdeathsig", "KILL", PROGRAM]).args(arguments);
        writeln!(log_file, "$ {}", tool.command_line())
            .with_context(|| format!("writing {log}"))?;
        Self::spawn(tool, log_file, log)
    }

    fn spawn(tool: Tool, mut log_file: File, log: &Utf8Path) -> Result<Self> {
        let shown = tool.command_line();
        let errors = log_file.try_clone().with_context(|| format!("opening the log {log}"))?;
        let mut child = tool
            .into_command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("running {shown}"))?;
        let (Some(input), Some(mut console)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("{shown} has no console");
        };
        let (sender, output) = channel();
        // Ends at the end of the console, that is, with the machine.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = console.read(&mut buffer) {
                // A full disk must not stop the machine; the output still reaches the session.
                drop(log_file.write_all(&buffer[..n]));
                if sender.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let log = log.to_owned();
        Ok(Self { child, input, output, unread: Vec::new(), tail: Vec::new(), log, commands: 0 })
    }

    /// Waits until the console has printed `words`, and returns the output up to their end (without
    /// terminal codes). Later output is kept for the next call.
    ///
    /// # Errors
    /// When the time is over, the machine ends, or its system cannot start; with the last lines.
    pub fn expect(&mut self, words: &str, timeout: Duration) -> Result<String> {
        self.expect_any(&[words], timeout).map(|(_, output)| output)
    }

    /// Like [`Self::expect`], for the first of several; also returns which.
    ///
    /// # Errors
    /// As [`Self::expect`].
    pub fn expect_any(&mut self, words: &[&str], timeout: Duration) -> Result<(usize, String)> {
        let end = Instant::now() + timeout;
        let wanted = words.join("` or `");
        // A console prints a few bytes at a time: do not search the same output again.
        let longest = words.iter().copied().chain(FATAL).map(str::len).max().unwrap_or_default();
        let mut looked = 0_usize;
        let mut last_words = None;
        loop {
            let from = looked.saturating_sub(longest);
            looked = self.unread.len();
            let first = words
                .iter()
                .enumerate()
                .filter_map(|(i, w)| Some((find_words(&self.unread, w, from)?, i, w.len())))
                .min();
            if let Some((start, index, length)) = first {
                let output: Vec<u8> = self.unread.drain(..start + length).collect();
                return Ok((index, strip_terminal_codes(&output)));
            }
            // Wait for the end of their line first: the reason follows them, and may be the
            // expected output.
            last_words = last_words.or_else(|| {
                FATAL.into_iter().find_map(|w| Some((find_words(&self.unread, w, from)?, w)))
            });
            if let Some((at, fatal)) = last_words
                && self.unread[at..].contains(&b'\n')
            {
                bail!(self.report(&format!(
                    "waiting for `{wanted}`: the system does not boot (`{fatal}`)"
                )));
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.handle_output(&bytes),
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = timeout.as_secs();
                    bail!(self.report(&format!("waiting for `{wanted}`: not within {seconds} s")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().context("waiting for the machine to stop")?;
                    bail!(self.report(&format!(
                        "waiting for `{wanted}`: the machine has stopped ({status})"
                    )));
                }
            }
        }
    }

    /// Types a line.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn send_line(&mut self, line: &str) -> Result<()> {
        let sent = self.input.write_all(format!("{line}\n").as_bytes());
        sent.and_then(|()| self.input.flush())
            .with_context(|| format!("typing `{line}` on the console"))
    }

    /// Runs a command in the shell that the console shows, and returns its exit code and output.
    ///
    /// # Errors
    /// As [`Self::expect`].
    pub fn run(&mut self, command: &str, timeout: Duration) -> Result<(i32, String)> {
        self.commands += 1;
        let n = self.commands;
        // The quotes distinguish the typed line, which the console echoes, from the result.
        self.send_line(&format!(
            "echo slipway'-begin-{n}'; {command}; echo slipway'-exit-{n}='$?"
        ))?;
        self.expect(&format!("slipway-begin-{n}"), timeout)?;
        let mut output = self.expect(&format!("slipway-exit-{n}="), timeout)?;
        let code = self.expect("\n", timeout)?;
        output.truncate(output.len() - format!("slipway-exit-{n}=").len());
        let code = code
            .trim()
            .parse()
            .with_context(|| format!("reading the exit code of `{command}` from `{code}`"))?;
        Ok((code, output.replace('\r', "").trim().to_owned()))
    }

    /// Waits until the machine has stopped by itself (powered off, or restarted where that stops
    /// it).
    ///
    /// # Errors
    /// When it has not within the time; with the last lines.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + timeout;
        loop {
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.handle_output(&bytes),
                Err(RecvTimeoutError::Disconnected) => {
                    return self.child.wait().context("waiting for the machine to stop");
                }
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = timeout.as_secs();
                    bail!(self.report(&format!("the machine has not stopped within {seconds} s")));
                }
            }
        }
    }

    fn handle_output(&mut self, bytes: &[u8]) {
        self.unread.extend_from_slice(bytes);
        self.tail.extend_from_slice(bytes);
        // Far more than the lines that are shown.
        let excess = self.tail.len().saturating_sub(16 << 10);
        self.tail.drain(..excess);
    }

    fn report(&self, problem: &str) -> String {
        let text = strip_terminal_codes(&self.tail).replace('\r', "");
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let mut message = problem.to_owned();
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            message.push_str("\n  | ");
            message.push_str(line);
        }
        message.push_str(&format!("\nfull log: {}", self.log));
        message
    }

    /// Cuts the power of the machine: the guest stops immediately, and what its disk has reported
    /// as written is kept. (A kill would lose more than a card does: QEMU writes the overlay's
    /// block table at its exit or when the guest flushes, which an SD card's driver never does.)
    ///
    /// # Errors
    /// When the machine cannot be ended.
    pub fn lose_power(mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.context("the machine's process id")?;
        kill_process(pid, Signal::TERM).context("stopping the machine")?;
        self.child.wait().context("waiting for the machine to stop")?;
        Ok(())
    }
}

impl Drop for QemuSession {
    fn drop(&mut self) {
        // It may have stopped by itself; errors cannot be handled here.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The position of these words, searched from here on.
fn find_words(text: &[u8], words: &str, from: usize) -> Option<usize> {
    let found = text[from..].windows(words.len()).position(|window| window == words.as_bytes());
    found.map(|at| from + at)
}

/// Text without terminal codes (`ESC [ … letter`, `ESC ] … BEL`).
fn strip_terminal_codes(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut kept = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\u{1b}' {
            kept.push(c);
            continue;
        }
        match chars.next() {
            Some('[') => drop(chars.find(|c| ('@'..='~').contains(c))),
            Some(']') => drop(chars.find(|c| *c == '\u{7}')),
            _ => {}
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// A shell instead of a machine: a session works the same with both.
    fn shell(dir: &Utf8Path, script: &str) -> QemuSession {
        let log = dir.join("console.log");
        let file = File::create(&log).unwrap();
        QemuSession::spawn(Tool::new("sh").args(["-c", script]), file, &log).unwrap()
    }

    #[test]
    fn words_are_found_in_order_and_logged() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let mut session = shell(dir, "printf 'one \\033[31mtwo\\033[0m three\\n'; cat");
        assert_eq!(session.expect("two", SOON).unwrap(), "one two");
        assert_eq!(session.expect_any(&["nine", "three"], SOON).unwrap().0, 1);
        session.send_line("typed").unwrap();
        session.expect("typed", SOON).unwrap();
        assert!(std::fs::read_to_string(dir.join("console.log")).unwrap().contains("typed"));
    }

    #[test]
    fn a_command_gives_its_output_and_code() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let mut session =
            shell(dir, "while read -r line; do echo \"# $line\"; eval \"$line\"; done");
        assert_eq!(session.run("echo hello", SOON).unwrap(), (0, "hello".to_owned()));
        assert_eq!(session.run("(exit 7)", SOON).unwrap(), (7, String::new()));
    }

    #[test]
    fn failures_show_the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let message = |script: &str, time| {
            let mut session = shell(dir, script);
            session.expect("login:", time).unwrap_err().to_string()
        };
        let short = Duration::from_millis(50);
        let late = message("echo booting; exec cat", short);
        assert!(late.contains("waiting for `login:`: not within 0 s"), "{late}");
        let ended = message("echo booting; exit 3", SOON);
        assert!(ended.contains("has stopped (exit status: 3)\n  | booting\nfull log: "), "{ended}");
        let fatal = message("echo 'slipway-init: cannot start: no disk'; exec cat", SOON);
        assert!(fatal.contains("does not boot") && fatal.contains("no disk"), "{fatal}");
    }

    #[test]
    fn a_failure_that_is_waited_for_may_come_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let script = "printf 'slipway-init: cannot start'; sleep 1; echo ': no disk'; exec cat";
        let output = shell(dir, script).expect("cannot start: no disk", SOON);
        assert_eq!(output.unwrap(), "slipway-init: cannot start: no disk");
    }

    #[test]
    fn words_may_come_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let script = "for i in a b l o g i n :; do printf $i; sleep 0.1; done; exec cat";
        assert_eq!(shell(dir, script).expect("login:", SOON).unwrap(), "ablogin:");
    }

    #[test]
    fn the_end_of_the_machine_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        assert!(shell(dir, "exit 0").wait(SOON).unwrap().success());
        let late = shell(dir, "exec cat").wait(Duration::from_millis(50)).unwrap_err();
        assert!(late.to_string().contains("has not stopped"), "{late}");
    }
}
