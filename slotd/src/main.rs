//! The command line of the agent: parses the arguments, passes a request to the lobby, and prints the answer.

mod cli;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Parser;
use contract::answer::{Progress, Step};
use contract::job::Told;
use serde_json::json;
use slotd::door;
use slotd::lobby::{self, Caller, Request, Response, Rights, detached};
use slotd::{Result, Root};

use cli::{Cli, Format, Verb, text};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let root = Root::new(&cli.root);
    let rights = if cli.as_update { Rights::Update } else { Rights::All };
    let caller = lobby::this_process(&root, rights);
    match &cli.verb {
        Verb::Door { serve } => return door(&cli, *serve),
        Verb::Work { caller, install } => return work(&root, caller, &install.request()),
        _ => {}
    }
    match answer(&cli, &root, &caller) {
        Ok(answer) => match show(&cli, &answer) {
            Ok(()) => ExitCode::SUCCESS,
            // Standard output is closed; the work is done.
            Err(_) => ExitCode::from(1),
        },
        Err(refusal) => {
            let printed = match cli.format {
                Format::Json => writeln!(std::io::stdout(), "{}", json!({ "refused": refusal })),
                Format::Text => writeln!(std::io::stderr(), "slotd: {}", refusal.in_full()),
            };
            // The exit code also says that it failed.
            drop(printed);
            ExitCode::from(refusal.matter() as u8)
        }
    }
}

/// A job, for the process that waits for it.
fn work(root: &Root, caller: &str, request: &Request) -> ExitCode {
    match serde_json::from_str::<Caller>(caller) {
        Ok(caller) => ExitCode::from(detached::work(root, &caller, request)),
        // As for all invalid arguments.
        Err(_) => ExitCode::from(2),
    }
}

/// The update user's door, whose answers are the agent's own bytes.
fn door(cli: &Cli, serve: bool) -> ExitCode {
    let root = Root::new(&cli.root);
    let line = std::env::var("SSH_ORIGINAL_COMMAND").unwrap_or_default();
    let done = match serve {
        true => door::serve(&root, &cli.root).map(|()| 0),
        false => door::ask(&root, &line),
    };
    done.map_or_else(
        |refusal| {
            // In both forms: it is not known yet which one the client expects.
            let printed = writeln!(std::io::stdout(), "{}", json!({ "refused": refusal }))
                .and_then(|()| writeln!(std::io::stderr(), "slotd: {}", refusal.in_full()));
            // The exit code also says that it failed.
            drop(printed);
            ExitCode::from(refusal.matter() as u8)
        },
        ExitCode::from,
    )
}

/// Makes the request and gets its answer: in this process, or from a job that continues without it.
fn answer(cli: &Cli, root: &Root, caller: &Caller) -> Result<Response> {
    let progress = ProgressLines::new(cli.format);
    let watcher = |at| progress.show(at);
    match &cli.verb {
        Verb::Job { watch: true, .. } => {
            lobby::authorise(caller, &Request::Job)?;
            lobby::job::watch(root, &watcher).map(Response::Installed)
        }
        Verb::Install { foreground: false, .. } => {
            let request = cli.request()?;
            lobby::authorise(caller, &request)?;
            detached::start(root, caller, &request, &mut |told| match told {
                Told::Progress(at) => watcher(*at),
                Told::Done(_) | Told::Refused(_) => {}
            })
            .map(Response::Installed)
        }
        _ => lobby::dispatch(root, caller, &cli.request()?, &watcher),
    }
}

/// Prints an answer in the form that was asked for.
fn show(cli: &Cli, answer: &Response) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    match cli.format {
        // The archive itself was the answer.
        _ if matches!(answer, Response::BackedUp(None)) => out.flush(),
        Format::Json => writeln!(out, "{}", answer.json()),
        Format::Text => writeln!(out, "{}", text::of(&cli.verb, answer)),
    }
}

/// Progress on standard error, twice a second.
struct ProgressLines {
    format: Format,
    terminal: bool,
    last: Mutex<Option<(Instant, Step)>>,
}

impl ProgressLines {
    fn new(format: Format) -> Self {
        Self { format, terminal: std::io::stderr().is_terminal(), last: Mutex::new(None) }
    }

    fn show(&self, at: Progress) {
        if self.format == Format::Text && !self.terminal {
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let soon = |(when, step): &(Instant, Step)| {
            *step == at.step && when.elapsed() < Duration::from_millis(500)
        };
        let ended = at.done == at.total;
        if last.as_ref().is_some_and(soon) && !ended {
            return;
        }
        *last = Some((Instant::now(), at.step));
        let mut err = std::io::stderr();
        let printed = match self.format {
            Format::Json => writeln!(err, "{}", json!({ "progress": at })),
            Format::Text => {
                let percent = at.done * 100 / at.total.max(1);
                let end = if ended { "\n" } else { "" };
                write!(err, "\r{} {percent} %   {end}", at.step.doing())
            }
        };
        // Standard error is closed; the work continues.
        drop(printed);
    }
}
