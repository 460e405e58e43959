//! Decides whether a system is kept: declared checks, the watch over a trial until it is committed, and
//! the hand-over of the watchdog. A trial that is not committed within its deadline is ended by the
//! watchdog, which the initrd has armed and which is not fed; this works even if slotd does not.

mod check;
mod probe;
mod trial;
pub mod watchdog;

pub use check::{CheckKind, CheckOutcome, HealthCheck, load_checks};
pub use trial::{TrialPhase, TrialRecord, TrialState, TrialVerdict, TrialWatch, read_state};
