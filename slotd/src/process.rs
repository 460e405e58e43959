//! Runs a program of the robot to its end, or for as long as it may take, with all that it starts.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process_group};

/// Maximum number of characters of a program's last line that are kept.
const LAST_LINE: usize = 200;

/// Maximum number of bytes of a program's output that are read.
const OUTPUT: u64 = 16 << 10;

/// How often a running program is polled.
const POLL: Duration = Duration::from_millis(20);

/// Runs a program, in its own directory if given, until it ends or `timeout` expires. All processes that it
/// starts are ended too. Returns standard output and standard error combined.
pub(crate) fn run_program(
    name: &str,
    arguments: &[&str],
    folder: Option<&Path>,
    timeout: Duration,
) -> Result<(ExitStatus, String), String> {
    let failed = |error: io::Error| format!("{name}: {error}");
    // A file, not a pipe: a surviving grandchild could hold a pipe open for ever.
    let mut output = create_memory_file().map_err(failed)?;
    let (first, second) =
        (output.try_clone().map_err(failed)?, output.try_clone().map_err(failed)?);
    let mut command = Command::new(name);
    if let Some(folder) = folder {
        command.current_dir(folder);
    }
    let mut child = command
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(first)
        .stderr(second)
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let end = Instant::now() + timeout;
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if Instant::now() < end => std::thread::sleep(POLL),
            None => {
                let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
                // Killing fails if the program has just ended.
                group.map(|group| kill_process_group(group, Signal::KILL).ok());
                child.wait().map_err(failed)?;
                return Err(format!("{name} has not ended within {} s", timeout.as_secs()));
            }
        }
    };
    let mut text = Vec::new();
    output.rewind().map_err(failed)?;
    output.take(OUTPUT).read_to_end(&mut text).map_err(failed)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    match status.signal() {
        Some(signal) => Err(format!("{name} was killed by signal {signal}: {}", last_line(&text))),
        None => Ok((status, text)),
    }
}

/// A file in memory, which disappears with its last user.
fn create_memory_file() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("slotd-probe", MemfdFlags::CLOEXEC)?.into())
}

/// The last line that says something, cut to [`LAST_LINE`] characters.
pub(crate) fn last_line(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim().chars().take(LAST_LINE).collect()
}
