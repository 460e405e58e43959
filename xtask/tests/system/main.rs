//! Whole builds and what becomes of them: booted, repeated, read by foreign tools, interrupted.
//! `cargo xtask test` runs some of them beside each other, with everything that they say.
//!
//! All share one build for each board, in this workspace's `dist/` and the machine's own cache. What
//! needs a changed workspace works on a copy of it below `target/tmp`.

mod api;
mod boot;
mod failures;
mod firmware;
mod foreign;
mod kill;
mod laptop;
mod local;
mod nightly;
mod owners;
#[path = "../common/program.rs"]
mod program;
mod repeat;
mod services;
mod support;
mod typed;
mod update;
#[path = "../common/workspace.rs"]
mod workspace;
