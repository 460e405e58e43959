//! Benchmarks: compare our stages with the usual tools in one run, as ratios. Tests never depend on
//! times.

pub mod bundle;
pub mod cold;
pub mod disk;
pub mod flash;
pub mod install;
