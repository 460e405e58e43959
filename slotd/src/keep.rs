//! The verbs for `data` and what lies on it, on the command line.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use slotd::agent::{Agent, Restart};
use slotd::components;
use slotd::data::{seed, verbs};
use slotd::events::Events;
use slotd::files::{Files, RealFiles, Writer};
use slotd::provision::{self, How, Outcome, Provisioned};
use slotd::{Refusal, Result, Root};

use crate::Answer;
use crate::cli::Step;

pub(crate) fn start(root: &Root, step: Step) -> Result<Answer> {
    match step {
        Step::Grow => {
            let grown = verbs::grow(root)?;
            let text = format!("data has {} MiB, had {}", grown.to >> 11, grown.from >> 11);
            Ok(Answer::new(&json!({ "from": grown.from, "to": grown.to }), text))
        }
        Step::Prepare => {
            let done = verbs::prepare(root)?;
            let text = format!("data is prepared: {}", json!(done));
            Ok(Answer::new(&done, text))
        }
    }
}

pub(crate) fn provision(root: &Root, check: bool, boot: bool) -> Result<Answer> {
    let events = Events::new(root);
    let done = match (check, boot) {
        (true, _) => provision::check(root),
        (false, true) => provision::boot(root, &events),
        (false, false) => provision::run(root, &events),
    }?;
    Ok(Answer::new(&done, provision_text(&done)))
}

fn provision_text(done: &Provisioned) -> String {
    let package = done.package.clone().unwrap_or_default();
    let package = package.display();
    let mut text = match done.outcome {
        Outcome::Provisioned => {
            let count = |how: &[How]| done.changes.iter().filter(|c| how.contains(&c.how)).count();
            format!(
                "/data/system has the {} files of {package}: {} added, {} removed, {} changed",
                done.files,
                count(&[How::Missing]),
                count(&[How::Superfluous]),
                count(&[How::Content, How::Mode, How::Kind]),
            )
        }
        Outcome::Unchanged => format!("/data/system has the {} files of {package}", done.files),
        Outcome::NoResources => format!("{package} has no resources: /data/system stays as it is"),
        Outcome::NoApi => "this product has no API: nothing to provision".to_owned(),
        Outcome::Current => format!("{package} was provisioned for this base already"),
    };
    for path in &done.left_out {
        text.push_str(&format!("\n  left out: {}", path.to_string_lossy().escape_debug()));
    }
    for note in &done.notes {
        text.push_str(&format!("\n  not followed: {note}"));
    }
    text
}

pub(crate) fn seed(root: &Root) -> Result<Answer> {
    let seeded = seed::seed(root)?;
    let text = match seeded.taken.as_slice() {
        [] => "the flasher left nothing to take over".to_owned(),
        names => format!("taken over from the flasher: {}", names.join(", ")),
    };
    Ok(Answer::new(&seeded, text))
}

pub(crate) fn reset(agent: &Agent, keep: bool, stay: bool) -> Result<Answer> {
    let kept = verbs::reset(agent.device().root(), keep)?;
    let backup =
        kept.as_ref().map_or(String::new(), |path| format!(" (backup: {})", path.display()));
    then(agent, stay, json!({ "backup": kept }), &format!("everything on data goes{backup}"))
}

pub(crate) fn restore(agent: &Agent, file: &str, stay: bool) -> Result<Answer> {
    verbs::restore(agent.device().root(), verbs::open(file)?)?;
    then(
        agent,
        stay,
        json!({ "restored": file }),
        "the backup takes the place of everything on data",
    )
}

fn then(agent: &Agent, stay: bool, value: serde_json::Value, what: &str) -> Result<Answer> {
    let restarts = !stay && agent.restart(Restart::Committed)?;
    let when = if restarts { "restarting" } else { "with the next restart" };
    Ok(Answer::new(&value, format!("{what}: {when}")))
}

pub(crate) fn backup(root: &Root, file: &str) -> Result<Answer> {
    if file == "-" {
        verbs::backup(root, io::stdout().lock())?;
        // The archive is the answer.
        return Ok(Answer::new(&(), String::new()).silent());
    }
    let failed = |error: io::Error| Refusal::io(format!("writing {file}"), &error);
    // Complete under its name, or not there; and for its owner only from its first byte.
    let partial = PathBuf::from(format!("{file}.partial"));
    RealFiles.remove(&partial).and_then(|()| RealFiles.create(&partial)).map_err(failed)?;
    let mut out = Writer::new(&RealFiles, &partial, u64::MAX);
    let written = verbs::backup(root, &mut out).and_then(|()| {
        let folder = Path::new(file).parent().filter(|folder| !folder.as_os_str().is_empty());
        let done = out.flush().and_then(|()| RealFiles.sync(&partial));
        done.and_then(|()| RealFiles.replace(&partial, Path::new(file)))
            .and_then(|()| RealFiles.sync(folder.unwrap_or(Path::new("."))))
            .map_err(failed)
    });
    if let Err(refusal) = written {
        // The first failure is the one to tell.
        drop(RealFiles.remove(&partial));
        return Err(refusal);
    }
    Ok(Answer::new(&json!({ "backup": file }), format!("{file} is complete")))
}

pub(crate) fn api_text(outcome: &components::Outcome) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let seconds = |millis: u64| millis as f64 / 1000.0;
    format!(
        "the API {} serves, before it {}: {:.1} MiB written, {} of {} wheels were there; {:.1} s, and {:.1} s without an answer",
        outcome.version,
        outcome.before.as_deref().unwrap_or("the system's own"),
        mib(outcome.written),
        outcome.reused,
        outcome.wheels,
        seconds(outcome.write_ms),
        seconds(outcome.down_ms)
    )
}
