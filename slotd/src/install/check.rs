//! Everything that can be refused before the first write.

use bundle::{BuildKind, BundleInput, BundlePolicy, BundleReader, Version};
use serde_json::json;

use super::InstallOptions;
use crate::condition::DataState;
use crate::machine::{RobotContext, require_decided};
use crate::policy::{AdmissionState, SlotsState};
use crate::record::Floor;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// The state that the rules of [`crate::policy`] examine.
pub fn admission_state(robot: &RobotContext<'_>) -> AdmissionState {
    let status = robot.flow.status();
    let slots = match (&status, require_decided(robot)) {
        (Err(why), _) => SlotsState::Unknown(why.clone()),
        (Ok(_), Ok(())) => SlotsState::Decided,
        (Ok(status), Err(why)) => match status.pending(robot.running) {
            Some(trial) if trial.slot == robot.running => SlotsState::TrialRuns(why),
            Some(_) => SlotsState::TrialWaits(why),
            None => SlotsState::NotCommitted(why),
        },
    };
    let no_trial = status.ok().filter(|status| status.trial.is_none()).map(|status| {
        Refusal::new(
            "nothing-on-trial",
            format!("slot {} is committed, and no slot is on trial", status.active),
            "to go to the other slot, use `slotd boot-other`",
        )
    });
    let no_data = DataState::require_writable(robot.root).err();
    AdmissionState { slots, no_trial, wrong_board: right_board(robot).err(), no_data }
}

/// Refuses if the running image is for another board than this machine.
///
/// # Errors
/// `wrong-board`.
fn right_board(robot: &RobotContext<'_>) -> Result<()> {
    let known = machine_names(robot.root);
    if !robot.about.compatible.iter().any(|one| known.contains(one)) {
        return Err(Refusal::new(
            "wrong-board",
            format!(
                "this machine is {}, but the running image is for {}",
                if known.is_empty() { "of an unknown model".to_owned() } else { known.join(", ") },
                robot.about.compatible.join(", ")
            ),
            "flash the image that was built for this board",
        ));
    }
    Ok(())
}

/// The machine's own names for itself, the most precise first (Devicetree Specification 0.4, 2.3.1).
fn machine_names(root: &RootDir) -> Vec<String> {
    let bytes = std::fs::read(root.path("proc/device-tree/compatible")).unwrap_or_default();
    bytes
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).escape_debug().to_string())
        .collect()
}

/// Compares the manifest with this robot. The target checks the sizes.
pub(crate) fn check_manifest<I: BundleInput>(
    robot: &RobotContext<'_>,
    floor: &Floor,
    reader: &BundleReader<I>,
    options: &InstallOptions,
) -> Result<()> {
    let (about, manifest) = (robot.about, reader.manifest());
    let mut policy = BundlePolicy {
        product: Some(&about.product),
        board: Some(&about.board),
        floor: floor.version.as_ref(),
        key_epoch: floor.key_epoch,
    };
    if about.kind == BuildKind::Release && manifest.kind == BuildKind::Development {
        return Err(Refusal::new(
            "wrong-kind",
            "the bundle is a development build, but this robot accepts only releases",
            "build the bundle from the release product",
        ));
    }
    let below = floor.version.as_ref().filter(|floor| manifest.version < **floor);
    if let (Some(reason), Some(floor)) = (&options.allow_downgrade, below) {
        policy.floor = None;
        reader.check(&policy)?;
        log_allowed_downgrade(robot, &manifest.version, floor, reason);
        return Ok(());
    }
    reader.check(&policy).map_err(|error| {
        let help = match &error {
            bundle::Error::BelowFloor { .. } => {
                Some("use a newer bundle, or override with `--allow-downgrade REASON`")
            }
            _ => None,
        };
        let mut refusal = Refusal::from(error);
        if let Some(help) = help {
            refusal.help = help.to_owned();
        }
        refusal
    })
}

fn log_allowed_downgrade(
    robot: &RobotContext<'_>,
    version: &Version,
    floor: &Version,
    reason: &str,
) {
    robot
        .events
        .add("downgrade-allowed", json!({ "version": version, "floor": floor, "reason": reason }));
}
