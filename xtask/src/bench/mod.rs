//! Benchmarks against other tools, side by side in one run.

pub mod bundle;
