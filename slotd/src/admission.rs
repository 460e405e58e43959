//! The permission to change the robot. Every function that changes something takes a [`ChangePermit`], which only this
//! module creates: after the checks of [`crate::policy`], under the lock that excludes every other change, so that the
//! state cannot change between the check and the operation.

use contract::request::AgentVerb;

use crate::lock::{LockScope, ProcessLock};
use crate::policy::{self, AdmissionState};
use crate::refusal::Result;
use crate::root::RootDir;

/// The permission to change the robot. No other process has one at the same time.
#[derive(Debug)]
pub struct ChangePermit {
    _lock: Option<ProcessLock>,
}

/// Requests the permission for `verb`. The robot's state is read after the lock is taken.
///
/// # Errors
/// `busy`: another operation is running. What [`policy::check_state`] refuses, and `io`.
pub fn request_permit(
    root: &RootDir,
    verb: AgentVerb,
    standing: impl FnOnce() -> AdmissionState,
) -> Result<ChangePermit> {
    let permit = request_lock(root, verb)?;
    policy::check_state(verb, &standing())?;
    Ok(permit)
}

/// [`request_permit`] for a verb that needs only the lock, and that also works on a robot that cannot update.
///
/// # Errors
/// `busy`: another operation is running. `io`.
pub fn request_lock(root: &RootDir, verb: AgentVerb) -> Result<ChangePermit> {
    let lock = match policy::rules_for(verb).busy {
        true => Some(ProcessLock::acquire(root, LockScope::Slots, &verb.to_string())?),
        false => None,
    };
    Ok(ChangePermit { _lock: lock })
}
