//! Answers as text for a terminal.

use contract::answer::{
    ApiStatus, CheckOutcome, InstallOutcome, InstalledApi, InstalledSystem, RobotEvent,
    RobotStatus, ServingApi, SlotChange,
};
use contract::job::{Job, JobState};
use serde_json::{Value, json};
use slotd::lobby::{AgentResponse, describe_verdict};
use slotd::provision::{DifferenceKind, ProvisionOutcome, ProvisionReport};

use super::CliVerb;

/// An answer as text. The verb determines the wording for a changed slot.
pub fn format_answer(verb: &CliVerb, answer: &AgentResponse) -> String {
    match answer {
        AgentResponse::Status(status) => self::format_status(status),
        AgentResponse::Report { board, status } => {
            let text = status.as_ref().map_or_else(
                |refusal| refusal.message.clone(),
                |status| self::format_status(status),
            );
            format!("{}\n{text}", board.lines())
        }
        AgentResponse::Log(events) => join_lines(events.iter().map(format_event)),
        AgentResponse::Health(outcomes) => join_lines(outcomes.iter().map(format_check)),
        AgentResponse::Watched(verdict) => describe_verdict(verdict.as_ref()),
        AgentResponse::Verified(verified) => {
            let keys: Vec<&str> = verified.signed_by.iter().map(|by| by.id.as_str()).collect();
            let what = verified.slot.map_or(String::new(), |slot| format!("slot {slot} equals "));
            let whole = if verified.slot.is_some() { "in every block" } else { "is complete" };
            format!("{what}{} {whole}, signed by {}", verified.version, keys.join(", "))
        }
        AgentResponse::VerifiedApi(checked) => format!(
            "{} versions of the API with {} wheels are unchanged, {} MiB",
            checked.versions,
            checked.wheels,
            checked.size.div_ceil(1 << 20)
        ),
        AgentResponse::Installed(done) => match &done.answer {
            InstallOutcome::System(system) => installed_system(system, done.restarts),
            InstallOutcome::Api(api) => installed_api(api),
        },
        AgentResponse::Changed { changed, restarts } => {
            self::format_change(verb, changed, *restarts)
        }
        AgentResponse::WentBack(back) => match &back.version {
            Some(version) => format!("the API {version} serves again"),
            None => "the system's built-in API serves again".to_owned(),
        },
        AgentResponse::Keys(set) => join_lines(set.keys.iter().map(|key| {
            let state = if key.revoked { ", revoked" } else { "" };
            format!("{}  {} epoch {}{state}", key.id, key.kind, key.epoch)
        })),
        AgentResponse::Reset { backup, restarts } => {
            let backup = backup.as_ref();
            let backup =
                backup.map_or(String::new(), |path| format!(" (backup: {})", path.display()));
            with_restart(&format!("everything on data is removed{backup}"), *restarts)
        }
        AgentResponse::BackedUp(file) => {
            format!("{} is complete", file.as_deref().unwrap_or("the backup"))
        }
        AgentResponse::Restored { restarts, .. } => {
            with_restart("the backup replaces everything on data", *restarts)
        }
        AgentResponse::Provisioned(done) => format_provisioning(done),
        AgentResponse::Grown(grown) => {
            format!("data has {} MiB, before {} MiB", grown.to >> 11, grown.from >> 11)
        }
        AgentResponse::Prepared(done) => format!("data is prepared: {}", json!(done)),
        AgentResponse::Seeded(seeded) => match seeded.taken.as_slice() {
            [] => "the flasher left no settings".to_owned(),
            names => format!("applied from the flasher: {}", names.join(", ")),
        },
        AgentResponse::Job(job) => job.as_ref().map_or_else(
            || "no job since the robot's start".to_owned(),
            |job| self::format_job(job),
        ),
    }
}

fn join_lines(lines: impl Iterator<Item = String>) -> String {
    lines.collect::<Vec<_>>().join("\n")
}

fn with_restart(what: &str, restarts: bool) -> String {
    let when = if restarts { "restarting" } else { "with the next restart" };
    format!("{what}: {when}")
}

fn format_change(verb: &CliVerb, changed: &SlotChange, restarts: bool) -> String {
    let what = match verb {
        CliVerb::Commit => return format!("slot {} is committed", changed.slot),
        CliVerb::BootOther { .. } => "next is slot",
        _ => "the trial is over, slot",
    };
    let then = match (changed.restart.is_some(), restarts) {
        (true, true) => "; restarting",
        (true, false) => "; it runs after the next restart",
        (false, _) => " keeps running",
    };
    format!("{what} {}{then}", changed.slot)
}

fn format_check(outcome: &CheckOutcome) -> String {
    let state = if outcome.healthy { "well " } else { "FAILS" };
    format!("{state} {}: {}", outcome.name, outcome.found)
}

fn format_status(status: &RobotStatus) -> String {
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
    if let Some(job) = status.job {
        lines.push(format!("job        {job} is running: see `slotd job`"));
    } else if let Some(journal) = &status.interrupted {
        lines.push(format!(
            "interrupted: an install of {} into slot {}; install the same bundle again to resume",
            journal.version, journal.slot
        ));
    }
    if let Some(floor) = &status.floor.version {
        lines.push(format!("floor      {floor}, key epoch {}", status.floor.key_epoch));
    }
    lines.push(format!("keys       {}", status.keys));
    lines.extend(status.api.as_ref().map(format_api));
    if let Some(data) = &status.data {
        lines.push(format!("data       {} MiB, {} free", data.size >> 20, data.free >> 20));
    }
    let alarms = status.alarm.iter().flat_map(|alarms| alarms.lines());
    lines.extend(alarms.map(|alarm| format!("ALARM      {alarm}")));
    lines.extend(status.boot.damage.iter().map(|damage| format!("DAMAGED    {damage}")));
    lines.join("\n")
}

fn format_api(api: &ApiStatus) -> String {
    let copy = match api.serves {
        ServingApi::Installed => "installed",
        ServingApi::BuiltIn => "built in",
    };
    format!("api        {} {}, {copy}: {}", api.package, api.version, api.why)
}

fn to_mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn to_seconds(millis: u64) -> f64 {
    millis as f64 / 1000.0
}

fn installed_system(done: &InstalledSystem, restarts: bool) -> String {
    format!(
        "{} is in slot {}: {:.1} MiB written, {:.1} MiB were present; {:.1} s, and {:.1} s reading back\n{}",
        done.version,
        done.slot,
        to_mib(done.written),
        to_mib(done.held),
        to_seconds(done.write_ms),
        to_seconds(done.read_back_ms),
        if restarts {
            "restarting into its trial"
        } else {
            "its trial begins with the next restart"
        }
    )
}

fn installed_api(done: &InstalledApi) -> String {
    format!(
        "the API {} serves, previously {}: {:.1} MiB written, {} of {} wheels were present; {:.1} s, and {:.1} s without an answer",
        done.version,
        done.before.as_deref().unwrap_or("the system's own"),
        to_mib(done.written),
        done.reused,
        done.wheels,
        to_seconds(done.write_ms),
        to_seconds(done.down_ms)
    )
}

fn format_provisioning(done: &ProvisionReport) -> String {
    let package = done.package.clone().unwrap_or_default();
    let package = package.display();
    let mut text = match done.outcome {
        ProvisionOutcome::Provisioned => {
            let count = |how: &[DifferenceKind]| {
                done.changes.iter().filter(|c| how.contains(&c.how)).count()
            };
            format!(
                "/data/system has the {} files of {package}: {} added, {} removed, {} changed",
                done.files,
                count(&[DifferenceKind::Missing]),
                count(&[DifferenceKind::Superfluous]),
                count(&[DifferenceKind::Content, DifferenceKind::Mode, DifferenceKind::Kind]),
            )
        }
        ProvisionOutcome::Unchanged => {
            format!("/data/system has the {} files of {package}", done.files)
        }
        ProvisionOutcome::NoResources => {
            format!("{package} has no resources: /data/system stays unchanged")
        }
        ProvisionOutcome::NoApi => "this product has no API: nothing to provision".to_owned(),
        ProvisionOutcome::Current => format!("{package} was provisioned for this base already"),
    };
    for path in &done.left_out {
        text.push_str(&format!("\n  left out: {}", path.to_string_lossy().escape_debug()));
    }
    for note in &done.notes {
        text.push_str(&format!("\n  not followed: {note}"));
    }
    text
}

fn format_event(event: &RobotEvent) -> String {
    let details = Value::Object(event.details.clone());
    format!("{} {} {} {} {details}", event.number, event.time, event.boot, event.event)
}

fn format_job(job: &Job) -> String {
    let state = match &job.state {
        JobState::Runs => match job.progress {
            Some(at) => format!("{} {} %", at.step.describe(), at.done * 100 / at.total.max(1)),
            None => "starting".to_owned(),
        },
        JobState::Done(_) => "done".to_owned(),
        JobState::Refused(refusal) => refusal.in_full(),
        JobState::Lost => {
            "ended without leaving its result: its process was killed, or `/run` is full\n\
            help: see `slotd status` and `slotd log` before you install the bundle again"
                .to_owned()
        }
    };
    let by = job.by.unit.as_deref().unwrap_or("a process without a unit").escape_debug();
    let command = job.by.command.escape_debug();
    format!(
        "job {} ({}): {state}\nrequested by user id {} in {by}: {command}",
        job.id,
        job.request.verb(),
        job.by.uid
    )
}
