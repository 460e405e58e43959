//! The plan: one build, fully resolved and validated. `resolve` is pure: it reads no file and runs
//! no program, so that all rules are checked before any slow work.

mod boards;
pub mod cmdline;
pub mod fragment;
pub mod identifiers;
pub mod keyring;
mod resolve;
mod sources;

use std::collections::BTreeMap;

use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;

use crate::config::board::{BootFlowKind, BootSource, ConsoleConfig, DiskBus, QemuConfig};
use crate::config::overlay::{FileAttributes, OverlayFileKind};
use crate::config::product::{BuildKind, Engine, NetworkConfig, SshConfig, Version};
use crate::config::reader::{ConfigFinding, ConfigPlace};
use crate::config::{Config, InputFile};
use crate::disk::layout::DiskLayout;
use fragment::Defconfig;
pub use identifiers::DiskIdentifiers;
pub use resolve::{check_package_names, resolve};
pub use sources::{AptSourcePlan, plan_sources};

/// Facts about this checkout. Collected once, by `facts::collect`.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckoutFacts {
    /// The commit that is checked out; `None` outside a git checkout.
    pub commit: Option<String>,
    /// Files differ from that commit (`git::changed_files`).
    pub modified: bool,
    /// Seconds since 1970 that every timestamp in the outputs is set to.
    pub epoch: u64,
}

/// One build. Stages read nothing else.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// Version of this structure's JSON form.
    pub schema: u32,
    /// What ships.
    pub product: ProductPlan,
    /// Where it runs.
    pub board: BoardPlan,
    /// The commit that is built.
    pub commit: Option<String>,
    /// The checkout differs from that commit.
    pub modified: bool,
    /// Seconds since 1970 that every timestamp in the outputs is set to.
    pub epoch: u64,
    /// UUIDs and volume ids, derived from product, version and board.
    pub identifiers: DiskIdentifiers,
    /// Every partition with its final byte offset.
    pub disk: DiskLayout,
    /// The base system.
    pub rootfs: RootfsPlan,
    /// Overlay files, later overlays over earlier ones, sorted by target.
    pub overlay: Vec<OverlayPlan>,
    /// Directories with a mode or owner of their own.
    pub directories: Vec<(Utf8PathBuf, FileAttributes)>,
    /// The API wheel.
    pub api: Option<ApiPlan>,
    /// Accounts.
    pub users: Vec<UserPlan>,
    /// SSH policy.
    pub ssh: SshConfig,
    /// Network defaults.
    pub network: NetworkConfig,
    /// Update policy.
    pub update: UpdatePlan,
    /// Files of the boot partitions.
    pub boot_files: Vec<BootFilePlan>,
    /// Every file of the workspace that the build reads.
    pub inputs: Vec<InputFile>,
}

/// What ships.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProductPlan {
    /// Name, as in file names.
    pub name: String,
    /// Human-readable title.
    pub title: String,
    /// Version.
    pub version: Version,
    /// Development or release.
    pub kind: BuildKind,
}

/// Where it runs.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BoardPlan {
    /// Name, as in file names.
    pub name: String,
    /// Human-readable title.
    pub title: String,
    /// Debian's name for the architecture.
    pub arch: String,
    /// How the slot that boots is selected.
    pub boot_flow: BootFlowKind,
    /// Device-tree `compatible` strings.
    pub compatible: Vec<String>,
    /// The date of the oldest EEPROM release that can try a slot; only with the flow `tryboot`.
    pub eeprom_since: Option<String>,
    /// Revisions of the board that are known not to boot; they are excluded on purpose.
    pub left_out_revisions: Vec<String>,
    /// Serial console; `None` where the product disables it.
    pub console: Option<ConsoleConfig>,
    /// Whether the console is on the board's own port: then firmware and U-Boot also print there.
    pub console_on_board: bool,
    /// Kernel command line, including the consoles and the radio's country.
    pub cmdline: Vec<String>,
    /// Globs of device trees.
    pub device_trees: Vec<String>,
    /// The bus of its disk.
    pub disk_bus: DiskBus,
    /// Modules of the initrd.
    pub initrd_modules: Vec<String>,
    /// Globs of the modules that stay.
    pub modules_keep: Vec<String>,
    /// Globs of firmware files: inside the board's packages, or below Buildroot's `images`.
    pub firmware: Vec<String>,
    /// U-Boot, in the same place.
    pub bootloader: Option<String>,
    /// Values for the boot script's template.
    pub uboot: BTreeMap<String, String>,
    /// How to run it in QEMU.
    pub qemu: Option<QemuConfig>,
    /// The layouts of cards that were flashed with earlier images: updates never change a card's
    /// partition table.
    pub earlier_cards: Vec<EarlierCardPlan>,
    /// How many elements of each list are from which file.
    pub origins: Vec<ListOrigin>,
}

/// The disk of cards that were flashed with an earlier image.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct EarlierCardPlan {
    /// The last date of images with it.
    pub until: String,
    /// Every partition with its offset.
    pub disk: DiskLayout,
}

/// A file that a list of the board comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ListOrigin {
    /// The list's key.
    pub list: &'static str,
    /// The file.
    pub file: Utf8PathBuf,
    /// How many of its elements are from it.
    pub count: usize,
}

/// The base system.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RootfsPlan {
    /// Which engine.
    pub engine: Engine,
    /// Debian suite; empty for Buildroot.
    pub suite: String,
    /// Debian archive components.
    pub components: Vec<String>,
    /// Installed packages, without their dependencies.
    pub packages: Vec<String>,
    /// Unpacked packages, of all the product's boards: one lock serves them all.
    pub extra_packages: Vec<String>,
    /// Package lock.
    pub lock: Option<Utf8PathBuf>,
    /// Further apt archives.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<AptSourcePlan>,
    /// The pinned Buildroot and its defconfig.
    pub buildroot: Option<BuildrootPlan>,
    /// Percent of the slot above which the build fails.
    pub fill_limit: u32,
    /// Percent of the slot above which it warns.
    pub fill_warning: u32,
    /// Globs of paths that are removed.
    pub prune: Vec<String>,
    /// Exceptions from `prune`.
    pub keep: Vec<String>,
}

/// The pinned Buildroot.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BuildrootPlan {
    /// The git repository.
    pub url: String,
    /// The release, which is its tag.
    pub release: String,
    /// The tag's commit.
    pub commit: String,
    /// The Python that wheels are locked for, such as `3.12`.
    pub python: String,
    /// The C library that wheels are locked for, such as `glibc 2.40`.
    pub libc: String,
    /// The defconfig, merged from the fragments; every symbol with its origins.
    pub defconfig: Defconfig,
    /// Packages that are built from a source directory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<OverridePlan>,
}

/// A package that is built from a source directory instead of its release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct OverridePlan {
    /// The package.
    pub package: String,
    /// The directory. Not in any output: it is a path of this machine.
    #[serde(skip)]
    pub directory: Utf8PathBuf,
    /// The directory's name.
    pub name: String,
    /// Its commit; `None` outside a git checkout.
    pub commit: Option<String>,
    /// It differs from that commit.
    pub modified: bool,
    /// SHA-256 of all names and contents that Buildroot copies.
    pub content: String,
}

impl OverridePlan {
    /// The version of the package, as results show it: `custom (linux at 0123456789ab, modified)`.
    pub fn version(&self) -> String {
        let short = |id: &str| id.get(..12).unwrap_or(id).to_owned();
        let content = short(&self.content);
        match &self.commit {
            Some(id) if self.modified => {
                format!("custom ({} at {}, modified to {content})", self.name, short(id))
            }
            Some(id) => format!("custom ({} at {})", self.name, short(id)),
            None => format!("custom ({} with content {content})", self.name),
        }
    }
}

/// An overlay file.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct OverlayPlan {
    /// Path in the workspace.
    pub source: Utf8PathBuf,
    /// Path on the robot, without the leading slash.
    pub target: Utf8PathBuf,
    /// Literal, template or link.
    pub kind: OverlayFileKind,
    /// Mode and owner.
    pub attributes: FileAttributes,
}

/// The API wheel.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiPlan {
    /// Requirement, such as `name==1.2.3`.
    pub package: String,
    /// Wheel lock.
    pub lock: Utf8PathBuf,
    /// The lowest version that may serve from `data`; `None`: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimum_version: Option<String>,
}

/// An account.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct UserPlan {
    /// Login name.
    pub name: String,
    /// Numeric id.
    pub uid: u32,
    /// Further groups.
    pub groups: Vec<String>,
    /// Shell.
    pub shell: String,
    /// Home.
    pub home: String,
    /// `locked`, `empty` or a crypt(5) hash. Not printed with the plan.
    #[serde(skip)]
    pub password: String,
    /// Files of public keys.
    pub authorized_keys: Vec<Utf8PathBuf>,
}

/// Update policy.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct UpdatePlan {
    /// Bundles below this version are rejected.
    pub minimum_version: Version,
    /// Bundles that are signed only by keys of an earlier epoch are rejected; 0: any epoch is
    /// accepted.
    pub key_epoch: u32,
}

/// A file of a boot partition.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BootFilePlan {
    /// Its origin.
    pub source: BootSourcePlan,
    /// Its name; `.` keeps the names of several.
    pub path: String,
    /// The partition's role.
    pub partition: String,
    /// Names that its device trees give to nodes besides their own, `name=/path`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

/// Where a boot file comes from; a template by its path in the workspace.
pub type BootSourcePlan = BootSource<Utf8PathBuf>;

/// Finds fault with a file that a configuration names and that is not there.
fn must_exist(
    config: &Config,
    place: &ConfigPlace,
    path: &Utf8Path,
    help: &str,
    out: &mut Vec<ConfigFinding>,
) {
    if !config.inputs.iter().any(|input| input.path == path) {
        out.push(ConfigFinding::new(place, format!("the file {path} does not exist"), help));
    }
}

impl Plan {
    /// The start of every output's file name: product, version, board.
    pub fn stem(&self) -> String {
        format!("{}-{}-{}", self.product.name, self.product.version, self.board.name)
    }
}
