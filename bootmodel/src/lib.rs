//! What a boot loader would do with a disk, without running it: so a test can ask after every single
//! write where the robot would come up, and a build whether each board would start from its card.
//!
//! - [`script`] is `boot.scr`, proven equal to the real script in the real U-Boot by
//!   `xtask/tests/bootscript`.
//! - [`firmware`] is the Raspberry Pi's choice of a slot, which no emulator has: each rule names its source.
//! - [`chain`] is a whole start, from the boot ROM to `/init`, for each model that a card is for.

pub mod chain;
mod file;
pub mod firmware;
pub mod script;
