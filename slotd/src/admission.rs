//! The permission to change the robot. Every function that changes something takes an [`Admitted`], which only this module
//! creates: after the checks of [`crate::policy`], under the lock that excludes every other change, so that the state
//! cannot change between the check and the operation.

use contract::request::Verb;

use crate::lock::{Lock, Turn};
use crate::policy::{self, Standing};
use crate::refusal::Result;
use crate::root::Root;

/// The permission to change the robot. No other process has one at the same time.
#[derive(Debug)]
pub struct Admitted {
    _lock: Option<Lock>,
}

/// Requests the permission for `verb`. The robot's state is read after the lock is taken.
///
/// # Errors
/// `busy`: another operation is running. What [`policy::admit`] refuses, and `io`.
pub fn enter(root: &Root, verb: Verb, standing: impl FnOnce() -> Standing) -> Result<Admitted> {
    let admitted = take_turn(root, verb)?;
    policy::admit(verb, &standing())?;
    Ok(admitted)
}

/// [`enter`] for a verb that needs only the lock, and that also works on a robot that cannot update.
///
/// # Errors
/// `busy`: another operation is running. `io`.
pub fn take_turn(root: &Root, verb: Verb) -> Result<Admitted> {
    let lock = match policy::rules(verb).busy {
        true => Some(Lock::take(root, Turn::Slots, &verb.to_string())?),
        false => None,
    };
    Ok(Admitted { _lock: lock })
}
