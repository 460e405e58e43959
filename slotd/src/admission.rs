//! Leave to change the robot. What changes something takes an [`Admitted`], which is made here alone: under the lock that
//! keeps every other change out, so that nothing can happen between the question and the deed, and by the rules of
//! [`crate::policy`].

use contract::request::Verb;

use crate::lock::{Lock, Turn};
use crate::policy::{self, Standing};
use crate::refusal::Result;
use crate::root::Root;

/// Leave to change the robot, as long as it lives: nobody else has it meanwhile.
#[derive(Debug)]
pub struct Admitted {
    _lock: Option<Lock>,
}

/// Asks for leave to do something now. How the robot stands is looked at when nobody else can change it any more.
///
/// # Errors
/// `busy`: another operation runs. What [`policy::admit`] refuses, and `io`.
pub fn enter(root: &Root, verb: Verb, standing: impl FnOnce() -> Standing) -> Result<Admitted> {
    let admitted = take_turn(root, verb)?;
    policy::admit(verb, &standing())?;
    Ok(admitted)
}

/// [`enter`] for what has no rule but the turn, and is asked of a robot that could not update, too.
///
/// # Errors
/// `busy`: another operation runs. `io`.
pub fn take_turn(root: &Root, verb: Verb) -> Result<Admitted> {
    let lock = match policy::rules(verb).busy {
        true => Some(Lock::take(root, Turn::Slots, &verb.to_string())?),
        false => None,
    };
    Ok(Admitted { _lock: lock })
}
