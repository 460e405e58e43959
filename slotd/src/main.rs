//! The command line of the agent: parses the arguments, passes a request to the lobby, and prints the answer.

mod cli;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Parser;
use contract::answer::{InstallStep, Progress};
use contract::job::JobMessage;
use serde_json::json;
use slotd::door;
use slotd::lobby::{self, AgentRequest, AgentResponse, Caller, CallerRights, detached};
use slotd::{Result, RootDir};

use cli::{AgentCli, AnswerFormat, CliVerb, text};

fn main() -> ExitCode {
    let cli = AgentCli::parse();
    let root = RootDir::new(&cli.root);
    let rights = if cli.as_update { CallerRights::Update } else { CallerRights::All };
    let caller = lobby::this_process(&root, rights);
    match &cli.verb {
        CliVerb::Door { serve } => return run_door(&cli, *serve),
        CliVerb::Work { caller, install } => return run_job(&root, caller, &install.request()),
        _ => {}
    }
    match get_answer(&cli, &root, &caller) {
        Ok(answer) => match print_answer(&cli, &answer) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                say_unprinted(&error);
                ExitCode::from(1)
            }
        },
        Err(refusal) => {
            let printed = match cli.format {
                AnswerFormat::Json => {
                    let printed = writeln!(std::io::stdout(), "{}", json!({ "refused": refusal }));
                    printed.inspect_err(say_unprinted)
                }
                AnswerFormat::Text => writeln!(std::io::stderr(), "slotd: {}", refusal.in_full()),
            };
            // The exit code also says that it failed.
            drop(printed);
            ExitCode::from(refusal.kind() as u8)
        }
    }
}

/// Says that the answer could not be printed, unless its reader has ended, as in `slotd log | head`.
fn say_unprinted(error: &std::io::Error) {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        return;
    }
    let printed = writeln!(
        std::io::stderr(),
        "slotd: the request was processed, but its answer could not be written to standard output: {error}\n\
         help: see `slotd log` and `slotd status`"
    );
    // The exit code also says that it failed.
    drop(printed);
}

/// A job, for the process that waits for it.
fn run_job(root: &RootDir, caller: &str, request: &AgentRequest) -> ExitCode {
    match serde_json::from_str::<Caller>(caller) {
        Ok(caller) => ExitCode::from(detached::run_job(root, &caller, request)),
        // As for all invalid arguments.
        Err(_) => ExitCode::from(2),
    }
}

/// The update user's door, whose answers are the agent's own bytes.
fn run_door(cli: &AgentCli, serve: bool) -> ExitCode {
    let root = RootDir::new(&cli.root);
    // What is not UTF-8 is refused with the rest of the line.
    let line = std::env::var_os("SSH_ORIGINAL_COMMAND").unwrap_or_default();
    let line = line.to_string_lossy();
    let done = match serve {
        true => door::run_server(&root, &cli.root).map(|()| 0),
        false => door::run_client(&root, &line),
    };
    done.map_or_else(
        |refusal| {
            // In both forms: it is not known yet which one the client expects.
            let printed = writeln!(std::io::stdout(), "{}", json!({ "refused": refusal }))
                .and_then(|()| writeln!(std::io::stderr(), "slotd: {}", refusal.in_full()));
            // The exit code also says that it failed.
            drop(printed);
            ExitCode::from(refusal.kind() as u8)
        },
        ExitCode::from,
    )
}

/// Makes the request and gets its answer: in this process, or from a job that continues without it.
fn get_answer(cli: &AgentCli, root: &RootDir, caller: &Caller) -> Result<AgentResponse> {
    let progress = ProgressLines::new(cli.format);
    let watcher = |at| progress.show(at);
    match &cli.verb {
        CliVerb::Job { watch: true, .. } => {
            lobby::authorise(caller, &AgentRequest::Job)?;
            lobby::job::watch(root, &watcher).map(AgentResponse::Installed)
        }
        CliVerb::Install { foreground: false, .. } => {
            let request = cli.request()?;
            lobby::authorise(caller, &request)?;
            detached::start_job(root, caller, &request, &mut |told| match told {
                JobMessage::Progress(at) => watcher(*at),
                JobMessage::Done(_) | JobMessage::Refused(_) => {}
            })
            .map(AgentResponse::Installed)
        }
        _ => lobby::dispatch(root, caller, &cli.request()?, &watcher),
    }
}

/// Prints an answer in the form that was asked for.
fn print_answer(cli: &AgentCli, answer: &AgentResponse) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    match cli.format {
        // The archive itself was the answer.
        _ if matches!(answer, AgentResponse::BackedUp(None)) => out.flush(),
        AnswerFormat::Json => writeln!(out, "{}", answer.json()),
        AnswerFormat::Text => writeln!(out, "{}", text::format_answer(&cli.verb, answer)),
    }
}

/// Progress on standard error, twice a second.
struct ProgressLines {
    format: AnswerFormat,
    terminal: bool,
    last: Mutex<Option<(Instant, InstallStep)>>,
}

impl ProgressLines {
    fn new(format: AnswerFormat) -> Self {
        Self { format, terminal: std::io::stderr().is_terminal(), last: Mutex::new(None) }
    }

    fn show(&self, at: Progress) {
        if self.format == AnswerFormat::Text && !self.terminal {
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let soon = |(when, step): &(Instant, InstallStep)| {
            *step == at.step && when.elapsed() < Duration::from_millis(500)
        };
        let ended = at.done == at.total;
        if last.as_ref().is_some_and(soon) && !ended {
            return;
        }
        *last = Some((Instant::now(), at.step));
        let mut err = std::io::stderr();
        let printed = match self.format {
            AnswerFormat::Json => writeln!(err, "{}", json!({ "progress": at })),
            AnswerFormat::Text => {
                let percent = at.done * 100 / at.total.max(1);
                let end = if ended { "\n" } else { "" };
                write!(err, "\r{} {percent} %   {end}", at.step.describe())
            }
        };
        // Standard error is closed; the work continues.
        drop(printed);
    }
}
