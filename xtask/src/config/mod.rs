//! The configuration as written: the TOML files and the overlay trees, checked for form, with the
//! place of every value. Rules over several values are in `plan`.

pub mod board;
pub mod content;
mod file;
mod load;
pub mod machine;
pub mod overlay;
pub mod product;
pub mod reader;
mod tree;
pub mod units;

use std::collections::BTreeMap;

use crate::config::board::BoardConfig;
use crate::config::product::ProductConfig;
use camino::Utf8PathBuf;

pub use load::{
    default_product, list_boards, list_examples, list_products, load, product_file, read_board,
    read_product, workspace_root,
};

/// Everything that one build reads from the workspace.
#[derive(Debug)]
pub struct Config {
    /// The workspace's root directory.
    pub root: Utf8PathBuf,
    /// The product.
    pub product: ProductConfig,
    /// The board.
    pub board: BoardConfig,
    /// The names of all boards, sorted.
    pub boards: Vec<String>,
    /// The board's templates, by the names that its boot files have for them; paths relative to the workspace. One
    /// that is missing is a finding of the plan.
    pub templates: BTreeMap<Utf8PathBuf, Utf8PathBuf>,
    /// The product's overlays, in order.
    pub overlays: Vec<overlay::Overlay>,
    /// Packages that are unpacked, not installed, for all the product's boards, sorted.
    pub extra_packages: Vec<String>,
    /// Fragments of Buildroot's defconfig, path and text: the board's, then the product's. One that
    /// is missing is a finding of the plan.
    pub fragments: Vec<(Utf8PathBuf, String)>,
    /// The key files of further apt archives, path and content. One that is missing is a finding of the plan.
    pub source_keys: Vec<(Utf8PathBuf, Vec<u8>)>,
    /// The files of SSH public keys, path and content. One that is missing is a finding of the plan.
    pub authorized_keys: Vec<(Utf8PathBuf, Vec<u8>)>,
    /// Every file that was read, with its SHA-256, sorted by path.
    pub inputs: Vec<InputFile>,
}

/// A file of the workspace that the build depends on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct InputFile {
    /// Path relative to the workspace.
    pub path: Utf8PathBuf,
    /// SHA-256 of the content.
    pub sha256: String,
}
