//! What several of these tests need.

pub mod agent;
pub mod archive;
pub mod noise;
pub mod workspace;
