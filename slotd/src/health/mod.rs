//! Is this system fit to keep? Declared checks, the watch over a trial until it is committed, and the
//! hand-over of the watchdog. A trial that is not committed within its deadline is ended by the
//! watchdog, which the initrd has armed and nobody feeds: nothing here must work for that.

mod check;
mod probe;
mod trial;
pub mod watchdog;

pub(crate) use probe::program;

pub use check::{Check, Kind, Outcome, load};
pub use trial::{Phase, State, Trial, Verdict, Watch, state};
