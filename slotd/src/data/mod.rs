//! The partition `data`: it grows, is repaired or set aside, is backed up, reset and restored, and is migrated to
//! the system's version, forward and back.

pub mod archive;
pub mod grow;
mod migrate;
mod pending;
pub mod seed;
pub mod verbs;

pub use migrate::{MigrationOutcome, MigrationStep, StepRunner, migrate, migrate_with, read_steps};
pub use pending::{
    ChangeOutcome, PendingChange, apply, apply_with, backup, reset, reset_with, restore,
    restore_with,
};
