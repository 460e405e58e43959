//! Benchmarks: our stages beside the usual tools, in one run, as ratios. Never a timed test.

pub mod bundle;
pub mod cold;
pub mod disk;
pub mod flash;
pub mod install;
