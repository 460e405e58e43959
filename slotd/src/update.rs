//! Installs a bundle, which has a system or an API alone; and stores the floor and keys of the committed system.

use bundle::component::API;
use bundle::{BundleInput, BundleReader};
pub use contract::answer::InstallOutcome;
use contract::request::AgentVerb;
use serde_json::json;

use crate::admission;
use crate::components;
use crate::damage;
use crate::durable;
use crate::install::{self, InstallOptions, Progress};
use crate::machine::{RobotContext, require_decided};
use crate::record;
use crate::refusal::Result;
use crate::trust::TrustStore;

/// Installs a bundle: a system into the idle slot, whose trial is then armed, and which the caller starts; or
/// an API, which serves when this returns.
///
/// # Errors
/// A refusal, which is also logged. Nothing was written, unless the device fails (`io`, `read-back`) or the
/// source fails during the transfer (`source`).
pub fn install<I: BundleInput>(
    robot: &RobotContext<'_>,
    input: I,
    options: &InstallOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<InstallOutcome> {
    let result = run(robot, input, options, progress);
    match &result {
        Ok(InstallOutcome::System(outcome)) => robot.events.add("installed", json!(outcome)),
        Ok(InstallOutcome::Api(outcome)) => robot.events.add("api-installed", json!(outcome)),
        Err(refusal) => robot.events.add("install-refused", json!(refusal)),
    }
    result
}

/// Whether a bundle is an API: it then has the component `api` and is installed without a restart.
fn is_api<I: BundleInput>(reader: &BundleReader<I>) -> bool {
    reader.manifest().components.iter().any(|component| component.name == API)
}

fn run<I: BundleInput>(
    robot: &RobotContext<'_>,
    input: I,
    options: &InstallOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<InstallOutcome> {
    let _admitted = admission::request_permit(robot.root, AgentVerb::Install, || {
        install::admission_state(robot)
    })?;
    // Before the previous system's slot is overwritten: its floor and keys are recorded now.
    store_requirements(robot);
    let trust = TrustStore::read(robot);
    let mut reader = BundleReader::open(input, &trust.keys()?).map_err(install::from_source)?;
    install::check_manifest(robot, &trust.floor, &reader, options)?;
    if is_api(&reader) {
        return components::install(robot, &mut reader, progress).map(InstallOutcome::Api);
    }
    install::install_system(robot, reader, options, progress).map(InstallOutcome::System)
}

/// Stores the floor and keys of the committed system, if it is running, and reports damage once per start. It
/// never fails: errors are logged, and the next change of a slot tries again.
pub(crate) fn store_requirements(robot: &RobotContext<'_>) {
    let trust = TrustStore::read(robot);
    let mut alarms = trust.alarms.clone();
    alarms.extend(damage::find_damaged(robot.root).into_iter().map(|damage| damage.what));
    let told = robot.root.path("run/slotd/alarms.json");
    let known: Option<Vec<String>> = durable::read_json(&told).ok().flatten();
    if known.unwrap_or_default() != alarms {
        let event = if alarms.is_empty() { "damage-healed" } else { "damage-found" };
        robot.events.add(event, json!({ "alarms": alarms }));
        if let Err(error) = durable::write_json(&told, &alarms) {
            robot.events.add("not-recorded", json!({ "error": error.to_string() }));
        }
    }
    for error in trust.store_requirements(robot) {
        robot.events.add("not-recorded", json!({ "error": error }));
    }
    // The running system was flashed: `boot-other` needs its version later, when it is not running.
    let unknown = record::read_slot(robot.root, robot.running).is_none();
    let flashed = record::flashed(robot.about).filter(|_| unknown);
    if let Some(flashed) = flashed.filter(|_| require_decided(robot).is_ok())
        && let Err(error) = record::write_slot(robot.root, robot.running, &flashed)
    {
        robot.events.add("not-recorded", json!({ "error": error.to_string() }));
    }
}

/// Removes damaged files that can be created again.
pub(crate) fn remove_damaged(robot: &RobotContext<'_>) {
    for damage in damage::find_damaged(robot.root) {
        if let Err(error) = damage.remove() {
            robot.events.add("not-recorded", json!({ "error": error.to_string() }));
        }
    }
}
