//! The engine `buildroot`: a pinned release, our BR2_EXTERNAL tree, and a defconfig that is merged
//! from fragments; Kconfig cannot drop any of its lines silently.

pub mod check;
pub mod collect;
pub mod engine;
pub mod expr;
pub mod failure;
pub mod info;
pub mod make;
pub mod menus;
pub mod mirror;
pub mod overrides;
pub mod pending;
pub mod rebuild;
pub mod sources;
pub mod symbols;
pub mod tree;
