//! Installs a bundle, which has a system or an API alone; and stores the floor and keys of the committed system.

use bundle::component::API;
use bundle::{Input, Reader};
pub use contract::answer::Installed;
use contract::request::Verb;
use serde_json::json;

use crate::admission;
use crate::components;
use crate::damage;
use crate::durable;
use crate::install::{self, Options, Progress};
use crate::machine::{Machine, undecided};
use crate::record;
use crate::refusal::Result;
use crate::trust::Trust;

/// Installs a bundle: a system into the idle slot, whose trial is then armed, and which the caller starts; or
/// an API, which serves when this returns.
///
/// # Errors
/// A refusal, which is also logged. Nothing was written, unless the device fails (`io`, `read-back`) or the
/// source fails during the transfer (`source`).
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

/// Whether a bundle is an API: it then has the component `api` and is installed without a restart.
fn is_api<I: Input>(reader: &Reader<I>) -> bool {
    reader.manifest().components.iter().any(|component| component.name == API)
}

fn run<I: Input>(
    machine: &Machine<'_>,
    input: I,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Installed> {
    let _admitted = admission::enter(machine.root, Verb::Install, || install::standing(machine))?;
    // Before the previous system's slot is overwritten: its floor and keys are recorded now.
    remember(machine);
    let trust = Trust::read(machine);
    let mut reader = Reader::open(input, &trust.keys()?).map_err(install::from_source)?;
    install::check_manifest(machine, &trust.floor, &reader, options)?;
    if is_api(&reader) {
        return components::install(machine, &mut reader, progress).map(Installed::Api);
    }
    install::system(machine, reader, options, progress).map(Installed::System)
}

/// Stores the floor and keys of the committed system, if it is running, and reports damage once per start. It
/// never fails: errors are logged, and the next change of a slot tries again.
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
    // The running system was flashed: `boot-other` needs its version later, when it is not running.
    let unknown = record::read_slot(machine.root, machine.running).is_none();
    let flashed = record::flashed(machine.about).filter(|_| unknown);
    if let Some(flashed) = flashed.filter(|_| undecided(machine).is_ok())
        && let Err(error) = record::write_slot(machine.root, machine.running, &flashed)
    {
        machine.events.add("not-recorded", json!({ "error": error.to_string() }));
    }
}

/// Removes damaged files that can be created again.
pub(crate) fn heal(machine: &Machine<'_>) {
    for damage in damage::found(machine.root) {
        if let Err(error) = damage.heal() {
            machine.events.add("not-recorded", json!({ "error": error.to_string() }));
        }
    }
}
