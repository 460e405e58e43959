//! What several of these tests need.

pub mod agent;
pub mod archive;
mod card;
mod folder;
mod noise;
mod program;
#[path = "../../../slotd/tests/common/rights.rs"]
pub mod rights;
pub mod skip;
mod workspace;

pub use card::partition;
pub use folder::{folder, folder_on_disk};
pub use noise::noise;
pub use program::{find, good, make_program, text, tool};
pub use workspace::{complain, copy, copy_to, files, root};
