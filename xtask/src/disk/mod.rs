//! The card image: where everything lies (`layout`), writing it once, in place and sparse
//! (`assemble`), and reading it back (`read`). Nothing is mounted and no loop device is used.

pub mod layout;

pub use layout::{
    DiskRequest, Filesystem, Layout, PartitionRequest, Placed, StateSector, TableKind, place,
};
