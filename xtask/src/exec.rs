//! The one way to run another program: an argument list (never a shell string), an environment of
//! what it needs (never our secrets), a log of its whole output, and an error that shows the
//! command, its exit code and its last lines.

mod environment;
mod lines;

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use crate::variable;

/// How many of a failed program's last lines its error shows.
const TAIL_LINES: usize = 15;

/// The longest answer of a program whose output comes from an untrusted machine: 16 MiB, as
/// `store::format::LARGEST_TEXT`.
const MOST_ANSWER: u64 = 16 << 20;

/// One call of another program.
#[derive(Debug)]
pub struct Tool {
    command: Command,
    words: Vec<String>,
    log: Option<Utf8PathBuf>,
}

/// What `cargo run` tells this program about its own package. A cargo that inherits them recompiles
/// crates whose build scripts read these variables, and everything that depends on them; the next
/// run without them does so again.
pub fn of_cargo_run() -> Vec<String> {
    const OTHERS: [&str; 5] = [
        "CARGO_MANIFEST_DIR",
        "CARGO_MANIFEST_PATH",
        "CARGO_BIN_NAME",
        "CARGO_CRATE_NAME",
        "OUT_DIR",
    ];
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| name.starts_with("CARGO_PKG_") || OTHERS.contains(&name.as_str())).collect()
}

/// The cargo that started this program, else the one on the path.
pub fn cargo_program() -> String {
    // What cargo sets is not a setting of the user.
    let own = std::env::var_os("CARGO").and_then(|path| path.into_string().ok());
    own.unwrap_or_else(|| "cargo".to_owned())
}

/// Where cargo keeps its settings and what it downloads.
///
/// # Errors
/// When neither variable is set, or one is not UTF-8.
pub fn cargo_home() -> Result<String> {
    if let Some(dir) = variable::find("CARGO_HOME")? {
        return Ok(dir);
    }
    let home = variable::find("HOME")?.context("neither CARGO_HOME nor HOME is set")?;
    Ok(format!("{home}/.cargo"))
}

impl Tool {
    /// Cargo, for a workspace that the caller names.
    pub fn cargo() -> Self {
        let tool = Self::new(cargo_program());
        of_cargo_run().iter().fold(tool, |tool, name| tool.env_remove(name))
    }

    /// Starts with the program's name or path. The program gets those of our variables that a
    /// program of this name needs.
    pub fn new(program: impl AsRef<str>) -> Self {
        let program = program.as_ref();
        let mut command = Command::new(program);
        command.env_clear().envs(environment::variables_for(program));
        Self { command, words: vec![program.to_owned()], log: None }
    }

    /// Passes the settings of proxies and certificates to the program, for the programs that it
    /// starts.
    #[must_use]
    pub fn with_network(mut self) -> Self {
        self.command.envs(environment::of_network());
        self
    }

    /// Passes the variables to cargo that the workspace's tests and benchmarks may need.
    #[must_use]
    pub fn with_tests(mut self) -> Self {
        self.command.envs(environment::of_tests());
        of_cargo_run().iter().fold(self, |tool, name| tool.env_remove(name))
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<str>) -> Self {
        self.command.arg(arg.as_ref());
        self.words.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<str>>(self, args: impl IntoIterator<Item = S>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets an environment variable for the program.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Removes an environment variable for the program.
    #[must_use]
    pub fn env_remove(mut self, key: &str) -> Self {
        self.command.env_remove(key);
        self
    }

    /// Passes only these of our variables to the program. Call it before [`Tool::env`].
    #[must_use]
    pub fn env_only(mut self, kept: &[&str]) -> Self {
        self.command.env_clear();
        for key in kept {
            if let Some(value) = std::env::var_os(key) {
                self.command.env(key, value);
            }
        }
        self
    }

    /// Runs the program in this directory.
    #[must_use]
    pub fn current_dir(mut self, dir: &Utf8Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Appends everything that the program prints to this file; errors name it.
    #[must_use]
    pub fn log(mut self, path: &Utf8Path) -> Self {
        self.log = Some(path.to_owned());
        self
    }

    /// Adds arguments that messages omit: our own settings, which would make the command hard to
    /// read.
    #[must_use]
    pub fn args_unshown(mut self, args: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        for arg in args {
            self.command.arg(arg.as_ref());
        }
        self
    }

    /// The command as a person would type it (for messages only; it is never given to a shell).
    pub fn command_line(&self) -> String {
        let quote = |s: &String| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
            if !s.is_empty() && s.chars().all(plain) {
                s.clone()
            } else {
                format!("'{}'", s.replace('\'', r"'\''"))
            }
        };
        self.words.iter().map(quote).collect::<Vec<_>>().join(" ")
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// When the program is missing or exits with anything but zero.
    pub fn run(self) -> Result<()> {
        self.run_lines(|_| {})
    }

    /// Runs to the end and shows each line (standard output and standard error) to `each`.
    ///
    /// # Errors
    /// When the program is missing or exits with anything but zero.
    pub fn run_lines(mut self, mut each: impl FnMut(&str)) -> Result<()> {
        let mut log = self.open_log()?;
        let command_line = self.command_line();
        let (reader, writer) = std::io::pipe().context("making a pipe")?;
        let second = writer.try_clone().context("making a pipe")?;
        self.command.stdin(Stdio::null()).stdout(writer).stderr(second);
        let mut child = self.command.spawn().with_context(|| format!("running {command_line}"))?;
        // `Command` keeps its ends of the pipe open; without this the reader would never end.
        self.command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut tail = Vec::new();
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        // The log gets the whole of a line that is too long to be shown.
        let mut keep = |piece: &[u8]| log.as_mut().map_or(Ok(()), |log| log.write_all(piece));
        while lines::read_line(&mut reader, &mut line, &mut keep)
            .with_context(|| format!("running {command_line} and writing its log"))?
            .is_some()
        {
            let text = String::from_utf8_lossy(&line);
            each(text.trim_end());
            keep_tail(&mut tail, text.trim_end());
        }
        let status = child.wait().with_context(|| format!("waiting for {command_line}"))?;
        self.check(status, &tail)
    }

    /// Inherits stdin, stdout and stderr, for interactive programs.
    ///
    /// # Errors
    /// When the program is missing or exits with anything but zero.
    pub fn run_on_terminal(mut self) -> Result<()> {
        let command_line = self.command_line();
        let status = self.command.status().with_context(|| format!("running {command_line}"))?;
        self.check(status, &[])
    }

    /// Runs to the end and returns what the program wrote to standard output.
    ///
    /// # Errors
    /// When the program is missing, exits with a code other than zero, or its output is not UTF-8.
    pub fn read(self) -> Result<String> {
        let command_line = self.command_line();
        String::from_utf8(self.read_bytes()?)
            .with_context(|| format!("{command_line} printed something that is not UTF-8"))
    }

    /// Runs to the end and returns the bytes that the program wrote to standard output.
    ///
    /// # Errors
    /// When the program is missing or exits with anything but zero.
    pub fn read_bytes(mut self) -> Result<Vec<u8>> {
        let mut log = self.open_log()?;
        let command_line = self.command_line();
        let output = self
            .command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("running {command_line}"))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        let mut tail = Vec::new();
        for line in errors.lines() {
            if let Some(log) = &mut log {
                writeln!(log, "{line}").context("writing the log")?;
            }
            keep_tail(&mut tail, line);
        }
        self.check(output.status, &tail)?;
        Ok(output.stdout)
    }

    /// Runs the program and hands its standard output to `consume` as it arrives; standard error
    /// goes to the log (or nowhere).
    ///
    /// # Errors
    /// When the program is missing or fails, or `consume` does.
    pub fn stream<T>(mut self, consume: impl FnOnce(&mut dyn Read) -> Result<T>) -> Result<T> {
        let errors = match self.open_log()? {
            Some(log) => Stdio::from(log),
            None => Stdio::null(),
        };
        let command_line = self.command_line();
        let mut child = self
            .command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("running {command_line}"))?;
        let consumed = match child.stdout.take() {
            Some(mut out) => consume(&mut out),
            None => bail!("{command_line} has no standard output"),
        };
        let status = child.wait().with_context(|| format!("waiting for {command_line}"))?;
        let value = consumed?;
        self.check(status, &[])?;
        Ok(value)
    }

    /// Runs to the end with `input` as its standard input (nothing: an empty one), shows each line
    /// of its standard error to `each`, and returns how it ended and what it wrote to standard
    /// output: for a program whose failure is also a result, and whose output may come from an
    /// untrusted machine: the program is ended on a line of more than 64 KiB or an answer of more
    /// than 16 MiB.
    ///
    /// # Errors
    /// When the program is missing, its output cannot be read, or its output is too long.
    pub fn converse(
        mut self,
        input: Option<File>,
        mut each: impl FnMut(&str),
    ) -> Result<(ExitStatus, Vec<u8>)> {
        let command_line = self.command_line();
        let mut child = self
            .command
            .stdin(input.map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("running {command_line}"))?;
        let (Some(out), Some(errors)) = (child.stdout.take(), child.stderr.take()) else {
            bail!("{command_line} has no standard output")
        };
        // The process is waited for only below, so its id stays valid until then.
        let process = rustix::process::Pid::from_child(&child);
        let stop = move || rustix::process::kill_process(process, rustix::process::Signal::KILL);
        let heard = std::thread::scope(|scope| -> Result<Vec<u8>> {
            let output = scope.spawn(move || -> Result<Vec<u8>> {
                let mut bytes = Vec::new();
                let read = out.take(MOST_ANSWER + 1).read_to_end(&mut bytes);
                if read.is_err() || bytes.len() as u64 > MOST_ANSWER {
                    stop().context("ending it")?;
                }
                read?;
                ensure!(
                    bytes.len() as u64 <= MOST_ANSWER,
                    "its answer is longer than {MOST_ANSWER} bytes"
                );
                Ok(bytes)
            });
            let mut errors = BufReader::new(errors);
            let mut line = Vec::new();
            let listened = loop {
                // A process that never ends is not waited for.
                let mut length = 0;
                let bounded = |piece: &[u8]| {
                    length += piece.len();
                    let most = lines::LONGEST;
                    if length <= most + 1 {
                        return Ok(());
                    }
                    Err(io::Error::other(format!("it wrote a line of more than {most} bytes")))
                };
                match lines::read_line(&mut errors, &mut line, bounded) {
                    Ok(None) => break Ok(()),
                    Ok(Some(_)) => each(String::from_utf8_lossy(&line).trim_end()),
                    Err(error) => break Err(error.into()),
                }
            };
            if listened.is_err() {
                stop().context("ending it")?;
            }
            let output = output.join().map_err(|_| anyhow::anyhow!("the reading thread failed"))?;
            listened.and(output)
        });
        let status = child.wait().with_context(|| format!("waiting for {command_line}"))?;
        Ok((status, heard.with_context(|| format!("reading the output of {command_line}"))?))
    }

    /// The command itself, for the one program that is interactive while it runs: a virtual machine
    /// with its serial console. The caller ends the child and reports its failure.
    pub fn into_command(self) -> Command {
        self.command
    }

    fn open_log(&self) -> Result<Option<File>> {
        let Some(path) = &self.log else { return Ok(None) };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
        }
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("opening the log {path}"))?;
        writeln!(file, "$ {}", self.command_line()).with_context(|| format!("writing {path}"))?;
        Ok(Some(file))
    }

    fn check(&self, status: ExitStatus, tail: &[String]) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        let mut message = format!("{} failed: {status}", self.command_line());
        for line in tail {
            message.push_str("\n  | ");
            message.push_str(line);
        }
        if let Some(log) = &self.log {
            message.push_str(&format!("\nfull log: {log}"));
        }
        bail!(message)
    }
}

fn keep_tail(tail: &mut Vec<String>, line: &str) {
    if tail.len() == TAIL_LINES {
        tail.remove(0);
    }
    tail.push(line.to_owned());
}

/// The path of a program on `PATH`, in `/usr/sbin` or in `/sbin` (which `PATH` lacks for many
/// users).
pub fn find_program(program: &str) -> Option<Utf8PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // A directory whose name is not UTF-8 does not hide the others.
    std::env::split_paths(&path)
        .filter_map(|dir| Utf8PathBuf::try_from(dir).ok())
        .chain(["/usr/sbin", "/sbin"].map(Utf8PathBuf::from))
        .filter(|dir| !dir.as_str().is_empty())
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}
