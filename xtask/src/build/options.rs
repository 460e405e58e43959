//! What a build is asked for.

use camino::Utf8PathBuf;
use clap::ValueEnum;

use crate::rootfs::buildroot::overrides::SourceOverride;
use crate::workspace::BuildSelection;

/// What a build is asked for.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// Which product, for which board.
    pub selection: BuildSelection,
    /// The last stage; `None`: all.
    pub until: Option<BuildStage>,
    /// Use no network: everything must have been downloaded already.
    pub offline: bool,
    /// Fail if the package lock cannot be followed exactly.
    pub locked: bool,
    /// Also write the image as .img.zst.
    pub zst: bool,
    /// Build as a nightly.
    pub nightly: bool,
    /// Compression level of the bundle.
    pub compression: BundleCompression,
    /// Never install missing tools; list them and fail.
    pub no_install: bool,
    /// Engine buildroot: this checkout instead of the pinned release.
    pub buildroot: Option<Utf8PathBuf>,
    /// Take that checkout with local changes, too.
    pub allow_changes: bool,
    /// Engine buildroot: packages that are built from a source directory.
    pub overrides: Vec<SourceOverride>,
    /// Engine buildroot: also collect sources and licence texts.
    pub legal_info: bool,
    /// Engine buildroot: build everything again without asking.
    pub yes: bool,
}

/// The stages of a build, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum BuildStage {
    /// Resolve everything, but build nothing.
    Plan,
    /// Generate texts.
    Render,
    /// Make the base system.
    Base,
    /// Install the API wheels.
    Api,
    /// Compile the robot's agent.
    Agent,
    /// Make the root filesystem image.
    Compose,
    /// Assemble the card image.
    Image,
    /// Pack and sign the bundle.
    Bundle,
}

impl BuildStage {
    /// Its name: that of its log, and what may be typed.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Compression levels of the bundle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum BundleCompression {
    /// Like zstd -3: for daily work.
    #[default]
    Fast,
    /// Like zstd -9: for nightly builds.
    Release,
    /// Like zstd -19: smallest, takes minutes.
    Slow,
}
