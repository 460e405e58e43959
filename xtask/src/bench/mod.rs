//! Our own speed beside that of the tools that do the same work, side by side in one run.
pub mod disk;
