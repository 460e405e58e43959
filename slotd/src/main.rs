//! The command line of the agent.

mod cli;
mod keep;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Parser;
use serde::Serialize;
use serde_json::{Value, json};
use slotd::agent::{Agent, Changed, Restart, Status};
use slotd::components::{Installed, Serves};
use slotd::door;
use slotd::events::Event;
use slotd::health::{Outcome, Verdict};
use slotd::install::{self, Options, Progress, Step};
use slotd::source::Source;
use slotd::{Refusal, Result, Root, report};

use cli::{Cli, Component, Format, Verb};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Verb::Door { serve } = &cli.verb {
        return door(&cli, *serve);
    }
    match run(&cli) {
        Ok(answer) => match answer.show(cli.format) {
            Ok(()) => ExitCode::SUCCESS,
            // Nobody reads any more; the work is done.
            Err(_) => ExitCode::from(1),
        },
        Err(refusal) => {
            let said = match cli.format {
                Format::Json => writeln!(std::io::stdout(), "{}", json!({ "refused": refusal })),
                Format::Text => {
                    let Refusal { code, message, help } = &refusal;
                    writeln!(std::io::stderr(), "slotd: {message} [{code}]\nhelp: {help}")
                }
            };
            // The exit code says it too.
            drop(said);
            ExitCode::from(refusal.matter() as u8)
        }
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
            // Both forms: nobody knows yet for whom the answer is.
            let said =
                writeln!(std::io::stdout(), "{}", json!({ "refused": refusal })).and_then(|()| {
                    let Refusal { code, message, help } = &refusal;
                    writeln!(std::io::stderr(), "slotd: {message} [{code}]\nhelp: {help}")
                });
            // The exit code says it too.
            drop(said);
            ExitCode::from(refusal.matter() as u8)
        },
        ExitCode::from,
    )
}

/// An answer in both forms.
pub(crate) struct Answer {
    json: Value,
    text: String,
    silent: bool,
}

impl Answer {
    pub(crate) fn new(value: &impl Serialize, text: String) -> Self {
        Self { json: json!(value), text, silent: false }
    }

    /// For a verb that has written its result to standard output itself.
    pub(crate) fn silent(self) -> Self {
        Self { silent: true, ..self }
    }

    fn show(&self, format: Format) -> std::io::Result<()> {
        let mut out = std::io::stdout();
        match format {
            _ if self.silent => out.flush(),
            Format::Json => writeln!(out, "{}", self.json),
            Format::Text => writeln!(out, "{}", self.text),
        }
    }
}

fn run(cli: &Cli) -> Result<Answer> {
    let root = Root::new(&cli.root);
    // In a start nothing else is asked for: it must work on a robot that could not update.
    if let Verb::Data { step } = &cli.verb {
        return keep::start(&root, *step);
    }
    if let Verb::Provision { check, boot } = &cli.verb {
        return keep::provision(&root, *check, *boot);
    }
    if let Verb::Seed = &cli.verb {
        return keep::seed(&root);
    }
    // Also where the agent itself finds nothing as it should be.
    if let Verb::Report = &cli.verb {
        let report = report::collect(&root);
        let agent = Agent::open(&root).and_then(|agent| agent.status());
        let (status, text) = match &agent {
            Ok(status) => (json!(status), status_text(status)),
            Err(refusal) => (json!({ "refused": refusal }), refusal.message.clone()),
        };
        let both = json!({ "board": report, "status": status });
        return Ok(Answer::new(&both, format!("{}\n{text}", report.lines())));
    }
    let agent = Agent::open(&root)?;
    let show = Shown::new(cli.format);
    match &cli.verb {
        Verb::Status => agent.status().map(|status| Answer::new(&status, status_text(&status))),
        Verb::Verify { source: None, .. } => {
            let checked = agent.verify_api()?;
            let text = format!(
                "{} versions of the API with {} wheels are as they were unpacked, {} MiB",
                checked.versions,
                checked.wheels,
                checked.size.div_ceil(1 << 20)
            );
            Ok(Answer::new(&checked, text))
        }
        Verb::Verify { source: Some(source), slot, .. } => {
            let source = Source::open(source, &root)?;
            let verified = match slot {
                None => agent.verify(source, &|_| {})?,
                Some(slot) => agent.verify_slot(source, (*slot).into(), &|at| show.progress(at))?,
            };
            let keys: Vec<&str> = verified.signed_by.iter().map(|by| by.id.as_str()).collect();
            let what = verified.slot.map_or(String::new(), |slot| format!("slot {slot} is "));
            let whole = if verified.slot.is_some() { "to its last block" } else { "is whole" };
            let text = format!("{what}{} {whole}, signed by {}", verified.version, keys.join(", "));
            Ok(Answer::new(&verified, text))
        }
        Verb::Install { source, no_restart, allow_downgrade } => {
            let source = Source::open(source, &root)?;
            let options = Options {
                allow_downgrade: allow_downgrade.clone(),
                use_running_slot: source.transfers(),
            };
            match agent.install(source, &options, &|at| show.progress(at))? {
                Installed::System(outcome) => {
                    let restarts = !no_restart && agent.restart(Restart::Trial)?;
                    Ok(Answer::new(&outcome, install_text(&outcome, restarts)))
                }
                Installed::Api(outcome) => Ok(Answer::new(&outcome, keep::api_text(&outcome))),
            }
        }
        Verb::Commit => {
            let changed = agent.commit()?;
            Ok(Answer::new(&changed, format!("slot {} is committed", changed.slot)))
        }
        Verb::RollBack { component: Some(Component::Api), .. } => {
            let back = agent.api_back()?;
            let text = match &back.version {
                Some(version) => format!("the API {version} serves again"),
                None => "the system's own API serves again".to_owned(),
            };
            Ok(Answer::new(&back, text))
        }
        Verb::RollBack { no_restart, .. } => {
            let changed = agent.roll_back()?;
            restart(&agent, changed, *no_restart, "the trial is over, slot")
        }
        Verb::BootOther { no_restart, allow_downgrade } => {
            let changed = agent.boot_other(allow_downgrade.as_deref())?;
            restart(&agent, changed, *no_restart, "next is slot")
        }
        Verb::Keys { file } => {
            let set = match file {
                Some(file) => agent.take_keys(file)?,
                None => agent.keys()?,
            };
            let lines = set.keys.iter().map(|key| {
                let state = if key.revoked { ", revoked" } else { "" };
                format!("{}  {} epoch {}{state}", key.id, key.kind, key.epoch)
            });
            let lines: Vec<String> = lines.collect();
            Ok(Answer::new(&set, lines.join("\n")))
        }
        Verb::Health { watch: true } => {
            let text = match agent.watch()? {
                None => "no trial runs".to_owned(),
                Some(Verdict::Committed) => "the trial is committed".to_owned(),
                Some(Verdict::OutOfTime(state)) => state.why(),
            };
            Ok(Answer::new(&json!({ "verdict": text }), text))
        }
        Verb::Health { watch: false } => health(&agent),
        Verb::Reset { no_backup, no_restart } => keep::reset(&agent, !no_backup, *no_restart),
        Verb::Backup { file } => keep::backup(&root, file),
        Verb::Restore { file, no_restart } => keep::restore(&agent, file, *no_restart),
        Verb::Data { step } => keep::start(&root, *step),
        Verb::Provision { check, boot } => keep::provision(&root, *check, *boot),
        Verb::Seed => keep::seed(&root),
        Verb::Door { .. } | Verb::Report => {
            Err(Refusal::new("internal", "this is answered elsewhere", "tell the developers"))
        }
        Verb::Log { last } => {
            let events =
                agent.events().read().map_err(|error| Refusal::io("reading the log", &error))?;
            let skip = events.len().saturating_sub(last.unwrap_or(usize::MAX));
            let events: Vec<Event> = events.into_iter().skip(skip).collect();
            let lines: Vec<String> = events.iter().map(event_text).collect();
            Ok(Answer::new(&events, lines.join("\n")))
        }
    }
}

fn health(agent: &Agent) -> Result<Answer> {
    let outcomes = agent.health();
    let line = |outcome: &Outcome| {
        let state = if outcome.healthy { "well " } else { "FAILS" };
        format!("{state} {}: {}", outcome.name, outcome.found)
    };
    if outcomes.iter().all(|outcome| outcome.healthy) {
        let lines: Vec<String> = outcomes.iter().map(line).collect();
        return Ok(Answer::new(&outcomes, lines.join("\n")));
    }
    let failing: Vec<String> = outcomes.iter().filter(|o| !o.healthy).map(line).collect();
    Err(Refusal::new("unhealthy", failing.join("\n"), "see the journal of what fails"))
}

fn restart(agent: &Agent, changed: Changed, stay: bool, what: &str) -> Result<Answer> {
    let restarts = match changed.restart {
        Some(into) if !stay => agent.restart(into)?,
        _ => false,
    };
    let then = match (changed.restart.is_some(), restarts) {
        (true, true) => "; restarting",
        (true, false) => "; it runs after the next restart",
        (false, _) => " runs on",
    };
    Ok(Answer::new(&changed, format!("{what} {}{then}", changed.slot)))
}

fn status_text(status: &Status) -> String {
    let mut lines = vec![
        format!("{} {} on {}", status.product, status.version, status.board),
        format!("running    slot {}", status.running),
        format!("committed  slot {}", status.boot.active),
    ];
    if let Some(trial) = status.boot.trial {
        let state = match (status.pending, trial.slot == status.running) {
            (false, _) => "failed; the committed slot runs".to_owned(),
            (true, true) => "runs, and is not committed yet".to_owned(),
            (true, false) => format!("starts with the next restart, {} tries left", trial.tries),
        };
        lines.push(format!("trial      slot {} {state}", trial.slot));
    }
    if let Some(health) = &status.health {
        lines.push(format!("health     {}", health.why));
    }
    if let Some(other) = &status.other {
        lines.push(format!("other      {}", other.version));
    }
    if let Some(journal) = &status.interrupted {
        lines.push(format!(
            "interrupted: an install of {} into slot {}; install the same bundle again to go on",
            journal.version, journal.slot
        ));
    }
    if let Some(floor) = &status.floor.version {
        lines.push(format!("floor      {floor}, key epoch {}", status.floor.key_epoch));
    }
    lines.push(format!("keys       {}", status.keys));
    if let Some(api) = &status.api {
        let copy = match api.serves {
            Serves::Installed => "installed",
            Serves::BuiltIn => "built in",
        };
        lines.push(format!("api        {} {}, {copy}: {}", api.package, api.version, api.why));
    }
    if let Some(data) = &status.data {
        lines.push(format!("data       {} MiB, {} free", data.size >> 20, data.free >> 20));
    }
    let alarms = status.alarm.iter().flat_map(|alarms| alarms.lines());
    lines.extend(alarms.map(|alarm| format!("ALARM      {alarm}")));
    lines.extend(status.boot.damage.iter().map(|damage| format!("DAMAGED    {damage}")));
    lines.join("\n")
}

fn install_text(outcome: &install::Outcome, restarts: bool) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    format!(
        "{} is in slot {}: {:.1} MiB written, {:.1} MiB were there; {:.1} s, and {:.1} s reading back\n{}",
        outcome.version,
        outcome.slot,
        mib(outcome.written),
        mib(outcome.held),
        outcome.write_ms as f64 / 1000.0,
        outcome.read_back_ms as f64 / 1000.0,
        if restarts {
            "restarting into its trial"
        } else {
            "its trial begins with the next restart"
        }
    )
}

fn event_text(event: &Event) -> String {
    let details = Value::Object(event.details.clone());
    format!("{} {} {} {} {details}", event.number, event.time, event.boot, event.event)
}

/// Progress on standard error, twice a second.
struct Shown {
    format: Format,
    terminal: bool,
    last: Mutex<Option<(Instant, Step)>>,
}

impl Shown {
    fn new(format: Format) -> Self {
        Self { format, terminal: std::io::stderr().is_terminal(), last: Mutex::new(None) }
    }

    fn progress(&self, at: Progress) {
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
        let said = match self.format {
            Format::Json => writeln!(err, "{}", json!({ "progress": at })),
            Format::Text => {
                let what = at.step.doing();
                let percent = at.done * 100 / at.total.max(1);
                write!(err, "\r{what} {percent} %   {}", if ended { "\n" } else { "" })
            }
        };
        // Whoever watched has gone; the work goes on.
        drop(said);
    }
}
