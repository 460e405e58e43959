//! A job in a process of its own. Whoever asks for an install may leave: the terminal closes, the connection breaks, Ctrl-C.
//! The install goes on, and its record says how it went.
//!
//! That process is this program again, in a session of its own, which no terminal can end. It has the client's standard
//! input, in case the bundle comes from there, and its standard error. What it tells goes through a pipe, of which it is
//! never made to wait: a client that is gone, stopped or slow misses progress, and the record has the rest.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use contract::answer::Progress;
use contract::job::{Caller, Done, Told};
use contract::request::Request;
use rustix::fs::OFlags;

use super::{Response, dispatch};
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// How long the answer waits for a client that does not read.
const PATIENCE: Duration = Duration::from_secs(5);

/// The words of the command line that do this job in the process of [`work`].
fn words(caller: &Caller, request: &Request) -> Result<Vec<String>> {
    let failed = |error: serde_json::Error| Refusal::io("starting the job", &error.into());
    let Request::Install { source, no_restart, allow_downgrade } = request else {
        let what = request.verb();
        return Err(Refusal::new("internal", format!("`{what}` is no job"), "tell the developers"));
    };
    let mut words = vec!["work".to_owned(), serde_json::to_string(caller).map_err(failed)?];
    words.extend(no_restart.then(|| "--no-restart".to_owned()));
    words.extend(allow_downgrade.as_ref().map(|reason| format!("--allow-downgrade={reason}")));
    words.extend(["--".to_owned(), source.clone()]);
    Ok(words)
}

/// Starts a job, and waits for it. If this process ends, the job goes on. `told` hears what the job tells.
///
/// # Errors
/// What the job is refused for. `io`: it cannot be started, or was killed.
pub fn start(
    root: &Root,
    caller: &Caller,
    request: &Request,
    told: &mut dyn FnMut(&Told),
) -> Result<Done> {
    let failed = |error: io::Error| Refusal::io("starting the job", &error);
    let mut child = Command::new(std::env::current_exe().map_err(failed)?)
        .arg("--root")
        .arg(root.path(""))
        .args(words(caller, request)?)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut answer = None;
    for line in child.stdout.take().into_iter().flat_map(|pipe| BufReader::new(pipe).lines()) {
        let Ok(line) = line else { break };
        // The job's own words; anything else is a library's.
        let Ok(said) = serde_json::from_str::<Told>(&line) else { continue };
        told(&said);
        answer = match said {
            Told::Progress(_) => answer,
            Told::Done(done) => Some(Ok(done)),
            Told::Refused(refusal) => Some(Err(refusal)),
        };
    }
    let status = child.wait().map_err(failed)?;
    answer.unwrap_or_else(|| {
        Err(Refusal::new(
            "io",
            format!("the process that does the job has ended without an answer: {status}"),
            "install the bundle again to resume; `slotd job` and the journal may say why",
        ))
    })
}

/// Does a job in this process, which [`start`] has made for it. Returns the exit code.
pub fn work(root: &Root, caller: &Caller, request: &Request) -> u8 {
    // It fails for the leader of a process group alone, which no terminal signals by accident either.
    rustix::process::setsid().ok();
    let told = Teller::new();
    let done = dispatch(root, caller, request, &|at| told.progress(at));
    let (said, code) = match done {
        Ok(Response::Installed(done)) => (Told::Done(done), 0),
        Ok(_) => {
            let refusal = Refusal::new("internal", "it is no job", "tell the developers");
            (Told::Refused(refusal), 1)
        }
        Err(refusal) => {
            let code = refusal.matter() as u8;
            (Told::Refused(refusal), code)
        }
    };
    told.answer(&said);
    code
}

/// The way back to the client.
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
        // Without it the record still has everything.
        Self { out: open().ok() }
    }

    /// Tells, if there is room. A line of progress is written whole or not at all: it is shorter than PIPE_BUF (4096,
    /// pipe(7)).
    fn progress(&self, at: Progress) {
        let Some(mut out) = self.out.as_ref() else { return };
        let Ok(mut line) = serde_json::to_vec(&Told::Progress(at)) else { return };
        line.push(b'\n');
        // It is gone, or does not read now.
        drop(out.write(&line));
    }

    /// Tells, and waits a moment for the client to read.
    fn answer(&self, said: &Told) {
        let Some(mut out) = self.out.as_ref() else { return };
        let Ok(mut line) = serde_json::to_vec(said) else { return };
        line.push(b'\n');
        let (started, mut rest) = (Instant::now(), line.as_slice());
        while !rest.is_empty() && started.elapsed() < PATIENCE {
            match out.write(rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody waits any more.
                Err(_) => return,
            }
        }
    }
}
