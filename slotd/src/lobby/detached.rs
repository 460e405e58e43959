//! A job in a separate process. The client of an install may end at any time: its terminal closes, the connection breaks,
//! the user presses Ctrl-C. The install continues, and its record has the result.
//!
//! The process is this program again, in a separate session, which no terminal can end. It inherits the client's standard
//! input, in case the bundle comes from there, and its standard error. It sends messages through a pipe and never waits for
//! the client: a client that has ended, is stopped or is slow misses progress; the record is complete.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use contract::answer::Progress;
use contract::job::{Caller, InstallDone, JobMessage};
use contract::request::AgentRequest;
use rustix::fs::OFlags;

use super::{AgentResponse, dispatch};
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// How long the answer may wait for a client that does not read.
const PATIENCE: Duration = Duration::from_secs(5);

/// The arguments for the process that runs this job with [`run_job`].
fn job_arguments(caller: &Caller, request: &AgentRequest) -> Result<Vec<String>> {
    let failed = |error: serde_json::Error| Refusal::io("starting the job", &error.into());
    let AgentRequest::Install { source, no_restart, allow_downgrade } = request else {
        let what = request.verb();
        return Err(Refusal::new("internal", format!("`{what}` is not a job"), "report this bug"));
    };
    let mut words = vec!["work".to_owned(), serde_json::to_string(caller).map_err(failed)?];
    words.extend(no_restart.then(|| "--no-restart".to_owned()));
    words.extend(allow_downgrade.as_ref().map(|reason| format!("--allow-downgrade={reason}")));
    words.extend(["--".to_owned(), source.clone()]);
    Ok(words)
}

/// Starts a job and waits for it. If this process ends, the job continues. `told` receives the job's messages.
///
/// # Errors
/// The refusal of the job. `io`: it cannot be started, or ended without an answer.
pub fn start_job(
    root: &RootDir,
    caller: &Caller,
    request: &AgentRequest,
    told: &mut dyn FnMut(&JobMessage),
) -> Result<InstallDone> {
    let failed = |error: io::Error| Refusal::io("starting the job", &error);
    let mut child = Command::new(std::env::current_exe().map_err(failed)?)
        .arg("--root")
        .arg(root.path(""))
        .args(job_arguments(caller, request)?)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut answer = None;
    for line in child.stdout.take().into_iter().flat_map(|pipe| BufReader::new(pipe).lines()) {
        let Ok(line) = line else { break };
        // Only the job's own messages; anything else is from a library.
        let Ok(message) = serde_json::from_str::<JobMessage>(&line) else { continue };
        told(&message);
        answer = match message {
            JobMessage::Progress(_) => answer,
            JobMessage::Done(done) => Some(Ok(done)),
            JobMessage::Refused(refusal) => Some(Err(refusal)),
        };
    }
    let status = child.wait().map_err(failed)?;
    answer.unwrap_or_else(|| {
        Err(Refusal::new(
            "io",
            format!("the process of the job ended without an answer: {status}"),
            "see `slotd job`, `slotd status` and `slotd log` before you install the bundle again",
        ))
    })
}

/// Runs a job in this process, which [`start_job`] has started. Returns the exit code.
pub fn run_job(root: &RootDir, caller: &Caller, request: &AgentRequest) -> u8 {
    // It fails only for the leader of a process group, which receives no signal from the client's terminal either.
    rustix::process::setsid().ok();
    let told = Teller::new();
    let done = dispatch(root, caller, request, &|at| told.progress(at));
    let (message, code) = match done {
        Ok(AgentResponse::Installed(done)) => (JobMessage::Done(done), 0),
        Ok(_) => {
            let refusal = Refusal::new("internal", "the request is not a job", "report this bug");
            (JobMessage::Refused(refusal), 1)
        }
        Err(refusal) => {
            let code = refusal.kind() as u8;
            (JobMessage::Refused(refusal), code)
        }
    };
    told.answer(&message);
    code
}

/// The connection to the client.
struct Teller {
    out: Option<File>,
}

impl Teller {
    fn new() -> Self {
        let open = || -> io::Result<File> {
            let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
            let flags = rustix::fs::fcntl_getfl(&file)?;
            rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
            Ok(file)
        };
        // Without it, the record still has everything.
        Self { out: open().ok() }
    }

    /// Sends the progress, if the pipe has space. The line is written completely or not at all: it is shorter than
    /// PIPE_BUF (4096, pipe(7)).
    fn progress(&self, at: Progress) {
        let Some(mut out) = self.out.as_ref() else { return };
        let Ok(mut line) = serde_json::to_vec(&JobMessage::Progress(at)) else { return };
        line.push(b'\n');
        // The client has ended, or is not reading now.
        drop(out.write(&line));
    }

    /// Sends the answer, and waits a moment for the client to read it.
    fn answer(&self, message: &JobMessage) {
        let Some(mut out) = self.out.as_ref() else { return };
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        let (started, mut rest) = (Instant::now(), line.as_slice());
        while !rest.is_empty() && started.elapsed() < PATIENCE {
            match out.write(rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The client has ended.
                Err(_) => return,
            }
        }
    }
}
