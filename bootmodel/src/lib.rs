//! Models what a boot loader would do with a disk, without running it. A test can ask after every single
//! write what the robot would start, and a build can check whether each board would start from its card.
//!
//! - [`script`] models `boot.scr`; `xtask/tests/bootscript` compares it with the real script in the real U-Boot.
//! - [`firmware`] models how the Raspberry Pi chooses a slot. No emulator does this, so each rule names its source.
//! - [`chain`] models a whole start, from the boot ROM to `/init`, for each model that a card is for.

pub mod chain;
mod file;
pub mod firmware;
pub mod script;
