//! Installs a bundle into the idle slot, in this order: checks of signature, compatibility and size; only then
//! the first write; every frame is compared with its hash before it is decompressed, and every block before it
//! is written; the whole slot is read back from the device; and only then the trial is armed.
//!
//! While a slot is written, its first block on the device is zero. Every file system has its magic number
//! there, so no boot loader and no kernel mistakes a half-written slot for a system. That block is written
//! last.

mod check;
mod compare;
mod local;
mod payload;
mod queue;
mod scan;
mod target;

use std::time::{Duration, Instant};

use bundle::{BundleInput, BundleReader};
pub use contract::answer::{InstallStep, InstalledSystem, Progress};
use serde_json::json;

pub use check::admission_state;
pub(crate) use check::check_manifest;
pub(crate) use compare::{ReadOnlySlots, compare};

use crate::device::other_slot;
use crate::machine::RobotContext;
use crate::record::{self, InstallJournal};
use crate::refusal::{Refusal, Result};
use target::IdleSlot;

/// Options of the caller.
#[derive(Debug, Clone, Default)]
pub struct InstallOptions {
    /// Why a version below the floor is accepted, for this install only.
    pub allow_downgrade: Option<String>,
    /// Look for blocks in the running slot: worthwhile if skipping a frame saves its transfer.
    pub use_running_slot: bool,
}

/// Counters of an install.
#[derive(Debug, Default)]
struct Counts {
    held: u64,
    taken: u64,
    written: u64,
    read_back: Duration,
}

/// Writes a system into the idle slot.
pub(crate) fn install_system<I: BundleInput>(
    robot: &RobotContext<'_>,
    mut reader: BundleReader<I>,
    options: &InstallOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<InstalledSystem> {
    robot.flow.ready()?;
    let slot = other_slot(robot.running);
    let mut target = IdleSlot::open(robot, slot, reader.manifest())?;

    let manifest = reader.manifest_sha256().to_owned();
    let version = reader.manifest().version.clone();
    let size = reader.manifest().components.iter().flat_map(|c| &c.payloads).map(|p| p.size).sum();
    let installed = record::installed_by(reader.manifest(), &manifest, reader.signed_by());
    let journal = record::read_journal(robot.root)
        .filter(|journal| journal.manifest == manifest && journal.slot == slot);
    let resumed = journal.is_some();
    robot.events.add(
        "install-started",
        json!({ "slot": slot, "version": version, "manifest": manifest, "resumed": resumed, "signed-by": installed.signed_by }),
    );

    let started = Instant::now();
    let mut counts = Counts::default();
    let mut number = 0;
    while let Some(payload) = reader.next_payload().map_err(from_source)? {
        let work = payload::InstallState {
            robot,
            options,
            progress,
            journal: journal.as_ref(),
            fresh: InstallJournal {
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

    // A robot whose `data` is full must still accept the update that fixes it.
    if let Err(error) = record::write_slot(robot.root, slot, &installed) {
        robot.events.add("not-recorded", json!({ "slot": slot, "error": error.to_string() }));
    }
    robot.flow.arm_trial(slot)?;
    if let Err(error) = record::remove_journal(robot.root) {
        robot.events.add("not-recorded", json!({ "slot": slot, "error": error.to_string() }));
    }
    Ok(InstalledSystem {
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

/// Distinguishes failures of the source from those of the robot's own disk.
pub(crate) fn from_source(error: bundle::Error) -> Refusal {
    match error {
        bundle::Error::Io(error) => {
            let action = "reading the bundle";
            crate::source::distrusted(action, &error).unwrap_or_else(|| {
                let help =
                    "check the medium or the network, then install again: the install will resume";
                Refusal::new("source", format!("{action}: {error}"), help)
            })
        }
        other => other.into(),
    }
}
