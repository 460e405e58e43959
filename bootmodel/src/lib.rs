//! What a boot loader would do with a disk, without running it: so a test can ask after every single
//! write where the robot would come up. Only tests use this crate.
//!
//! - [`script`] is `boot.scr`, proven equal to the real script in the real U-Boot by
//!   `xtask/tests/bootscript`.
//! - [`firmware`] is the Raspberry Pi's firmware, which no emulator has: each rule names its source.

pub mod firmware;
pub mod script;
