//! What several of these tests need.

pub mod agent;
pub mod archive;
pub mod noise;
#[path = "../../../slotd/tests/common/rights.rs"]
pub mod rights;
pub mod skip;
pub mod workspace;
