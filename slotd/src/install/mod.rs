//! Installs a bundle into the idle slot. In this order: whose signature, for what, how large; only then
//! the first write; every frame against its hash before it is decompressed; every block before it is
//! written; the whole slot read back from the device; and only then the trial.
//!
//! While a slot is written its first block is zero on the device, in which every file system has what
//! identifies it: no boot loader and no kernel takes a half-written slot for a system. That block is
//! written last.

mod check;
mod compare;
mod local;
mod payload;
mod queue;
mod scan;
mod target;

use std::time::{Duration, Instant};

use bundle::bootstate::Slot;
use bundle::component::API;
use bundle::{Input, Reader};
use contract::answer::Installed;
pub use contract::answer::{InstalledSystem as Outcome, Progress, Step};
use contract::request::Verb;
use serde_json::json;

pub use check::{standing, undecided};
pub(crate) use compare::{ReadOnly, compare};
pub use target::{Slots, TrustArea};

use crate::admission;
use crate::boot::BootFlow;
use crate::damage;
use crate::device::{Description, other};
use crate::durable;
use crate::events::Events;
use crate::files::Files;
use crate::record::{self, Floor, Journal};
use crate::refusal::{Refusal, Result};
use crate::root::Root;
use crate::trust::Trust;
use target::Target;

/// Everything of a robot that an install touches.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// Where the robot's memory lies.
    pub root: &'a Root,
    /// What its image says.
    pub about: &'a Description,
    /// The running slot.
    pub running: Slot,
    /// How its slot is chosen.
    pub flow: &'a dyn BootFlow,
    /// How its slots are opened.
    pub slots: &'a dyn Slots,
    /// What changes the files of an API.
    pub files: &'a dyn Files,
    /// Its log.
    pub events: &'a Events,
}

/// What the caller decides.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Why a version below the floor is accepted this once.
    pub allow_downgrade: Option<String>,
    /// Look in the running slot for blocks: pays where passing over a frame spares its transfer.
    pub use_running_slot: bool,
}

/// Counts while payloads pass.
#[derive(Debug, Default)]
struct Counts {
    held: u64,
    taken: u64,
    written: u64,
    read_back: Duration,
}

/// Installs a bundle: a system into the idle slot, whose trial is armed, and the restart is the caller's;
/// or an API, which serves when this returns.
///
/// # Errors
/// A refusal, which is in the log too. Unless it is one of the device (`io`, `read-back`) or of the
/// medium in the middle (`source`), nothing was written.
pub fn install<I: Input>(
    machine: &Machine<'_>,
    input: I,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Installed> {
    let result = run(machine, input, options, progress);
    match &result {
        Ok(Installed::System(outcome)) => machine.events.add("installed", json!(outcome)),
        Ok(Installed::Api(outcome)) => machine.events.add("api-installed", json!(outcome)),
        Err(refusal) => machine.events.add("install-refused", json!(refusal)),
    }
    result
}

/// Which of the two a bundle is: with the component `api` it is one for a running robot.
fn is_api<I: Input>(reader: &Reader<I>) -> bool {
    reader.manifest().components.iter().any(|component| component.name == API)
}

fn run<I: Input>(
    machine: &Machine<'_>,
    input: I,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Installed> {
    let _admitted = admission::enter(machine.root, Verb::Install, || standing(machine))?;
    // Before the slot of the system before this one is overwritten: what that one knew is known from here on.
    remember(machine);
    let trust = Trust::read(machine);
    let mut reader = Reader::open(input, &trust.keys()?).map_err(from_source)?;
    check::manifest(machine, &trust.floor, &reader, options)?;
    if is_api(&reader) {
        return crate::components::install(machine, &mut reader, progress).map(Installed::Api);
    }
    system(machine, reader, options, progress).map(Installed::System)
}

/// Writes a system into the idle slot.
fn system<I: Input>(
    machine: &Machine<'_>,
    mut reader: Reader<I>,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Outcome> {
    machine.flow.ready()?;
    let slot = other(machine.running);
    let mut target = Target::open(machine, slot, reader.manifest())?;

    let manifest = reader.manifest_sha256().to_owned();
    let version = reader.manifest().version.clone();
    let size = reader.manifest().components.iter().flat_map(|c| &c.payloads).map(|p| p.size).sum();
    let installed = record::installed_by(reader.manifest(), &manifest, reader.signed_by());
    let journal = record::read_journal(machine.root)
        .filter(|journal| journal.manifest == manifest && journal.slot == slot);
    let resumed = journal.is_some();
    machine.events.add(
        "install-started",
        json!({ "slot": slot, "version": version, "manifest": manifest, "resumed": resumed, "signed-by": installed.signed_by }),
    );

    let started = Instant::now();
    let mut counts = Counts::default();
    let mut number = 0;
    while let Some(payload) = reader.next_payload().map_err(from_source)? {
        let work = payload::Work {
            machine,
            options,
            progress,
            journal: journal.as_ref(),
            fresh: Journal {
                manifest: manifest.clone(),
                slot,
                version: version.clone(),
                payload: number,
                frames: 0,
            },
        };
        work.run(payload, &mut target, &mut counts)?;
        number += 1;
    }
    counts.written += target.complete()?;
    let write = started.elapsed().saturating_sub(counts.read_back);

    // A robot whose `data` is full must still take the update that cures it.
    if let Err(error) = record::write_slot(machine.root, slot, &installed) {
        machine.events.add("not-recorded", json!({ "slot": slot, "error": error.to_string() }));
    }
    machine.flow.arm_trial(slot)?;
    if let Err(error) = record::remove_journal(machine.root) {
        machine.events.add("not-recorded", json!({ "slot": slot, "error": error.to_string() }));
    }
    Ok(Outcome {
        slot,
        version,
        manifest,
        resumed,
        size,
        held: counts.held,
        taken: counts.taken,
        written: counts.written,
        write_ms: u64::try_from(write.as_millis()).unwrap_or(u64::MAX),
        read_back_ms: u64::try_from(counts.read_back.as_millis()).unwrap_or(u64::MAX),
    })
}

/// Whether a bundle is one for this robot; its size is not looked at.
pub(crate) fn check_bundle<I: Input>(
    machine: &Machine<'_>,
    floor: &Floor,
    reader: &Reader<I>,
) -> Result<()> {
    check::manifest(machine, floor, reader, &Options::default())
}

/// Keeps what the committed system asks for, if it is the one that runs, and tells once in a start what is
/// damaged. It never fails: what cannot be kept is logged, and the next change of a slot tries again.
pub(crate) fn remember(machine: &Machine<'_>) {
    let trust = Trust::read(machine);
    let mut alarms = trust.alarms.clone();
    alarms.extend(damage::found(machine.root).into_iter().map(|damage| damage.what));
    let told = machine.root.path("run/slotd/alarms.json");
    let known: Option<Vec<String>> = durable::read_json(&told).ok().flatten();
    if known.unwrap_or_default() != alarms {
        let event = if alarms.is_empty() { "damage-healed" } else { "damage-found" };
        machine.events.add(event, json!({ "alarms": alarms }));
        if let Err(error) = durable::write_json(&told, &alarms) {
            machine.events.add("not-recorded", json!({ "error": error.to_string() }));
        }
    }
    for error in trust.keep(machine) {
        machine.events.add("not-recorded", json!({ "error": error }));
    }
    // What runs was flashed: `boot-other` will want to know its version when it runs no more.
    let unknown = record::read_slot(machine.root, machine.running).is_none();
    let flashed = record::flashed(machine.about).filter(|_| unknown);
    if let Some(flashed) = flashed.filter(|_| undecided(machine).is_ok())
        && let Err(error) = record::write_slot(machine.root, machine.running, &flashed)
    {
        machine.events.add("not-recorded", json!({ "error": error.to_string() }));
    }
}

/// Forgets what is damaged and can be made anew.
pub(crate) fn heal(machine: &Machine<'_>) {
    for damage in damage::found(machine.root) {
        if let Err(error) = damage.heal() {
            machine.events.add("not-recorded", json!({ "error": error.to_string() }));
        }
    }
}

/// A failure of the medium is told apart from one of the robot's own disk.
pub(crate) fn from_source(error: bundle::Error) -> Refusal {
    match error {
        bundle::Error::Io(error) => {
            let doing = "reading the bundle";
            crate::source::distrusted(doing, &error).unwrap_or_else(|| {
                let help = "check the medium or the network, and install again: it goes on where it stopped";
                Refusal::new("source", format!("{doing}: {error}"), help)
            })
        }
        other => other.into(),
    }
}
