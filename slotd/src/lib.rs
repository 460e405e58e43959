//! The robot's agent: verifies a bundle, writes the idle slot, boots it on trial, commits it when the
//! robot is healthy, and otherwise lets it roll back. Every client sends its requests to [`lobby`]: the command
//! line, the user `update` over SSH, and later a USB stick, the local network and a web page.

/// Prints to standard error, for the journal. Unlike `eprintln!` it does not panic when standard error is closed: a
/// connection may break during an install.
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        drop(writeln!(std::io::stderr(), $($words)*));
    }};
}
pub(crate) use say;

pub mod admission;
pub mod agent;
pub mod boot;
mod buffer;
pub mod builtin;
pub mod components;
pub mod condition;
mod damage;
pub mod data;
pub mod device;
pub mod door;
pub mod durable;
pub mod events;
pub mod files;
pub mod health;
pub mod install;
pub mod lobby;
pub mod lock;
pub mod machine;
pub mod policy;
mod process;
pub mod provision;
pub mod python;
pub mod ratchet;
pub mod record;
pub mod report;
mod reserve;
pub mod root;
pub mod source;
pub mod startup;
pub mod storage;
pub mod trust;
pub mod update;

/// The help for an image that contradicts itself. Its reader may have only `slipway`, or a checkout.
const NEWER_IMAGE: &str = "flash a newer image (`slipway release get`, `slipway flash`), or build the image again with a current `cargo xtask`";

/// The same for a bundle.
const NEWER_BUNDLE: &str = "install a newer bundle (`slipway release get --role bundle`), or build the bundle again with a current `cargo xtask`";

pub use contract::refusal;
pub use contract::refusal::{Refusal, Result};
pub use root::RootDir;
