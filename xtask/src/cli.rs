//! The command line: arguments and options only, no behaviour.

mod release;
pub mod slipway;

use camino::Utf8PathBuf;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::build::{BuildStage, BundleCompression};
use crate::rootfs::buildroot::overrides::SourceOverride;
use crate::store::format::Channel;
use crate::workspace::BuildSelection;

pub use release::{
    PublishArgs, ReleaseArgs, ReleaseCheckArgs, ReleaseCommand, ReleaseCreateArgs, StoreAccessArgs,
    StoreArgs,
};

/// Builds card images and the signed bundles that match them, without root and, once the downloads
/// are there, without a network.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
pub struct CommandLine {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build the card image, its bundle and the report.
    ///
    /// Installs missing tools (lists them first, and uses sudo where necessary), builds the base
    /// system, adds overlay and API, assembles the card image and packs the bundle that updates a
    /// robot to the same system. Finished stages are cached: a build without changes does no work.
    BuildImage(BuildImageArgs),
    /// Show the resolved build: every input with its hash, every partition with its offset.
    Plan(PlanArgs),
    /// Write every generated text (defconfig, overlay, boot files) to dist/…/rendered.
    Render(RenderArgs),
    /// Show what is in an image, a bundle or a slot image; or compare two.
    Inspect(InspectArgs),
    /// Check an image or a bundle against its hashes and signatures.
    Verify(VerifyArgs),
    /// Boot a built image in QEMU, with its serial console on this terminal; or run its services on
    /// this machine.
    ///
    /// With --local: builds the root file system and starts its services on this machine, as an
    /// ordinary user, without hardware, systemd or D-Bus, from the files that ship. Its `data` is
    /// kept. It is reachable at 127.0.0.1 only. Ctrl-C stops everything.
    Run(RunArgs),
    /// Write an image to a card and verify it by reading it back.
    ///
    /// Rejects system disks, mounted devices and devices that are too small, each with its reason.
    /// Asks for confirmation on a terminal. After an interruption the card has no partition table
    /// and does not boot.
    Flash(FlashArgs),
    /// Install a bundle on robots over SSH, wait for their restart, and report which system booted.
    ///
    /// Streams the bundle to the robot's agent without storing it on the way. Reconnects when the
    /// connection breaks. Exits with 0 only if every robot has committed this bundle's version.
    Push(PushArgs),
    /// Make releases from build results, and manage their channels.
    #[command(subcommand)]
    Release(ReleaseCommand),
    /// Copy releases to a directory, a USB stick, a host by SFTP, or an S3 bucket.
    ///
    /// Objects first, the channel's index last: readers never see an incomplete release. An
    /// interrupted publish resumes when it is run again.
    Publish(PublishArgs),
    /// Resolve packages and wheels again and write the lock files.
    Lock(LockArgs),
    /// Work with the engine buildroot: check the defconfig, change it, run Buildroot's own targets.
    #[command(subcommand)]
    Buildroot(BuildrootCommand),
    /// Make, list and rotate signing keys.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// List what this machine lacks for building and testing, each with its package.
    Doctor(DoctorArgs),
    /// Run the tests. Sets this machine up first, as build-image does.
    Test(TestArgs),
    /// Test updates of a machine in QEMU from end to end: valid bundles, invalid ones, failed
    /// trials. Part of `test`.
    E2e,
    /// Check formatting, lints and house rules; fast, and the first thing that `test` does.
    ///
    /// With --mutants or --fuzz, only that: whether the tests detect deliberate faults, and how the
    /// robot's code handles random inputs.
    Check(CheckArgs),
    /// Compare the speed of our stages with the usual tools, in one run.
    Bench(BenchArgs),
    /// Remove build results and cached stages.
    Clean(CleanArgs),
    /// Print the completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// Which build.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
    /// The product: a file in configs/, without .toml [default: the one with `default = true`].
    #[arg(long, short)]
    pub product: Option<String>,
    /// The board: a directory in board/ [default: the product's default-board].
    #[arg(long, short)]
    pub board: Option<String>,
}

impl TargetArgs {
    /// The same, for the library.
    pub fn selection(&self) -> BuildSelection {
        BuildSelection { product: self.product.clone(), board: self.board.clone() }
    }
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// Human-readable text.
    Text,
    /// JSON.
    Json,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Apply the faults listed in ci/mutants one at a time to a copy of the source, and check that
    /// a test fails; with FILTER only those whose names contain it. Fails when a fault is not
    /// detected.
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "")]
    pub mutants: Option<String>,
    /// Run each fuzz target for this many seconds. Fails, with the path of the input, when a target
    /// fails.
    #[arg(long, value_name = "SECONDS", conflicts_with = "mutants")]
    pub fuzz: Option<u64>,
    /// With --mutants: how to print the list of results.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `build-image`.
#[derive(Debug, Clone, Args)]
pub struct BuildImageArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub target: TargetArgs,
    /// Stop after this stage.
    #[arg(long, value_enum)]
    pub until: Option<BuildStage>,
    /// Build only this component, as a separate bundle that updates running robots without a
    /// restart.
    #[arg(long, value_enum, conflicts_with_all = ["until", "zst", "legal_info"])]
    pub component: Option<SeparateComponent>,
    /// Use no network: everything must have been downloaded already.
    #[arg(long)]
    pub offline: bool,
    /// Fail if the package lock cannot be followed exactly.
    #[arg(long)]
    pub locked: bool,
    /// Also write the image as .img.zst.
    #[arg(long)]
    pub zst: bool,
    /// Build as a nightly: version 1.2.3 becomes 1.2.4-nightly.<the commit's time>.
    #[arg(long)]
    pub nightly: bool,
    /// Compression level of the bundle.
    #[arg(long, value_enum, default_value = "fast")]
    pub compression: BundleCompression,
    /// Never install missing tools; list them and fail.
    #[arg(long)]
    pub no_install: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub tree: BuildrootTreeArgs,
    /// Engine buildroot: also collect sources and licence texts into dist/…/legal-info.
    #[arg(long)]
    pub legal_info: bool,
    /// Engine buildroot: build everything again without asking. Required for that where there is no
    /// terminal.
    #[arg(long)]
    pub yes: bool,
    /// How to print the report.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Which Buildroot tree.
#[derive(Debug, Clone, Default, Args)]
pub struct BuildrootTreeArgs {
    /// Engine buildroot: use this checkout instead of the pinned release.
    #[arg(long, value_name = "DIR")]
    pub buildroot: Option<Utf8PathBuf>,
    /// With --buildroot: accept local changes in the checkout.
    #[arg(long, requires = "buildroot")]
    pub allow_changes: bool,
    /// Engine buildroot: build this package from this source directory; may be repeated. Such a
    /// build is a development build.
    #[arg(long = "override", value_name = "PKG=DIR")]
    pub overrides: Vec<SourceOverride>,
}

/// The verbs of `buildroot`.
#[derive(Debug, Clone, Subcommand)]
pub enum BuildrootCommand {
    /// Check that Kconfig accepts every line of the generated defconfig.
    Check {
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        target: BuildrootTargetArgs,
        /// Also ask Buildroot for its list of packages, which detects dependencies that are used
        /// but not selected.
        #[arg(long)]
        packages: bool,
        /// How to print it.
        #[arg(long, value_enum, default_value = "text")]
        format: OutputFormat,
    },
    /// Change the configuration in Buildroot's menus; then see `buildroot diff`.
    Menuconfig(BuildrootTargetArgs),
    /// Change the kernel's configuration in its menus; then see `buildroot diff`.
    LinuxMenuconfig(BuildrootTargetArgs),
    /// Change U-Boot's configuration in its menus; then see `buildroot diff`.
    UbootMenuconfig(BuildrootTargetArgs),
    /// Show what was changed in the menus, as lines for fragments with the file for each line.
    Diff(BuildrootTargetArgs),
    /// Show which packages the next build would build again, and why. Changes nothing.
    Why {
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        target: BuildrootTargetArgs,
        /// How to print it.
        #[arg(long, value_enum, default_value = "text")]
        format: OutputFormat,
    },
    /// List every source file of the product once: hashes, size, addresses, licences, and where it
    /// is. Fill or check a mirror of them.
    Sources(BuildrootSourcesArgs),
    /// Run any target of Buildroot's make, with the product's configuration.
    Make {
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        target: BuildrootTargetArgs,
        /// Targets and variables, such as `busybox-rebuild`.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

/// Which configuration of Buildroot.
#[derive(Debug, Clone, Args)]
pub struct BuildrootTargetArgs {
    /// The product: a file in configs/, without .toml [default: the one whose engine is buildroot].
    #[arg(long, short)]
    pub product: Option<String>,
    /// The board: a directory in board/ [default: all of the product's for `check` and `sources`,
    /// else its default-board].
    #[arg(long, short)]
    pub board: Option<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub tree: BuildrootTreeArgs,
    /// Use no network: the tree and all downloads must be there.
    #[arg(long)]
    pub offline: bool,
}

/// Options of `buildroot sources`.
#[derive(Debug, Clone, Args)]
pub struct BuildrootSourcesArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub target: BuildrootTargetArgs,
    /// First search this directory for missing sources by their hash, under any name, and copy them
    /// to the directory of downloads; may be repeated.
    #[arg(long, value_name = "DIR")]
    pub from: Vec<Utf8PathBuf>,
    /// First make GitHub's archives of tags from this clone; only those with the right hash are kept;
    /// may be repeated.
    #[arg(long, value_name = "REPO")]
    pub pack_git: Vec<Utf8PathBuf>,
    /// Copy all sources to this directory in the layout of a mirror, with an index of hashes;
    /// download what is missing.
    #[arg(long, value_name = "DIR")]
    pub mirror_to: Option<Utf8PathBuf>,
    /// Check that this mirror has every source; name each missing, damaged and misnamed file.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["from", "pack_git", "mirror_to"])]
    pub check: Option<Utf8PathBuf>,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// The parts of a product that can have a separate bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SeparateComponent {
    /// The API's wheels.
    Api,
}

/// Options of `plan`.
#[derive(Debug, Clone, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub target: TargetArgs,
    /// List all products and boards, for CI: with JSON, one entry for each build.
    #[arg(long)]
    pub all: bool,
    /// List only the builds that changed since this commit, with the components and the reasons.
    #[arg(long, value_name = "REV")]
    pub changed_since: Option<String>,
    /// Of these, list only the products that this channel accepts (releases.toml).
    #[arg(long, value_enum)]
    pub channel: Option<Channel>,
    /// Engine buildroot: build this package from this source directory; may be repeated.
    #[arg(long = "override", value_name = "PKG=DIR")]
    pub overrides: Vec<SourceOverride>,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `render`.
#[derive(Debug, Clone, Args)]
pub struct RenderArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub target: TargetArgs,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `inspect`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// A card image (.img), a bundle (.bundle) or a slot image (.ext4).
    pub file: Utf8PathBuf,
    /// Compare two card images or slot images, the older first: which packages, wheels and files
    /// changed.
    #[arg(long, requires = "new")]
    pub diff: bool,
    /// With --diff: the newer one.
    #[arg(requires = "diff")]
    pub new: Option<Utf8PathBuf>,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `verify`.
#[derive(Debug, Clone, Args)]
pub struct VerifyArgs {
    /// A card image (.img) with its .bmap beside it, or a bundle (.bundle).
    pub file: Utf8PathBuf,
    /// Public keys to trust: a key set (JSON) or a minisign public key [default: your own key set].
    #[arg(long, value_name = "FILE")]
    pub keys: Option<Utf8PathBuf>,
    /// How to print the result.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub target: TargetArgs,
    /// Boot this slot instead of the one that the boot state selects.
    #[arg(long, value_parser = ["a", "b"])]
    pub slot: Option<String>,
    /// Forward this port of 127.0.0.1 to the robot's SSH port.
    #[arg(long, default_value_t = 2222)]
    pub ssh_port: u16,
    /// Run the robot's services on this machine, without QEMU.
    #[arg(long, conflicts_with_all = ["slot", "ssh_port"])]
    pub local: bool,
    /// With --local: start with an empty `data`.
    #[arg(long, requires = "local")]
    pub fresh: bool,
    /// With --local: serve the API package in this directory, as on a robot that has a newer API on
    /// `data`.
    #[arg(long, value_name = "DIR", requires = "local")]
    pub site: Option<Utf8PathBuf>,
    /// With --local: forward this port of 127.0.0.1 to the robot's port 80; 0 selects a free port.
    #[arg(long, requires = "local", default_value_t = 8080)]
    pub port: u16,
    /// With --local: use no network to build.
    #[arg(long, requires = "local")]
    pub offline: bool,
    /// With --local: how to print the result.
    #[arg(long, requires = "local", value_enum, default_value = "text")]
    pub format: OutputFormat,
    /// With --local: once every health check at an address succeeds, run this command in the system
    /// as root, then stop. Succeeds if the command does.
    #[arg(last = true, requires = "local")]
    pub command: Vec<String>,
}

/// Options of `flash`.
#[derive(Debug, Clone, Args)]
pub struct FlashArgs {
    /// A card image (.img, .img.zst, .img.xz), or a product whose image was built [default: the product
    /// with `default = true`].
    #[arg(value_name = "IMAGE|PRODUCT")]
    pub image: Option<String>,
    /// The target: a disk such as sdb or /dev/mmcblk0, or a plain file [default: asks].
    pub device: Option<Utf8PathBuf>,
    /// The board, with a product [default: the product's default-board].
    #[arg(long, short)]
    pub board: Option<String>,
    /// Only list the disks of this machine, each with the reasons why it may not be written.
    #[arg(long, conflicts_with_all = ["device", "yes"])]
    pub list: bool,
    /// Do not ask for confirmation. Required where there is no terminal.
    #[arg(long, requires = "device")]
    pub yes: bool,
    /// Allow writing to a non-removable disk; repeat its NAME to confirm.
    #[arg(long, value_name = "NAME", requires = "device")]
    pub non_removable: Option<String>,
    /// Do not read back what was written.
    #[arg(long)]
    pub no_read_back: bool,
    /// Host name for the first boot to apply.
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Public keys for the first boot to accept for root, from this file; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Vec<Utf8PathBuf>,
    /// Wi-Fi for the first boot to join. Asks for its password, or reads it from
    /// SLIPWAY_WIFI_PASSWORD.
    #[arg(long, value_name = "SSID")]
    pub wifi: Option<String>,
    /// Read the Wi-Fi password from this file.
    #[arg(long, value_name = "FILE", requires = "wifi")]
    pub wifi_password_file: Option<Utf8PathBuf>,
    /// How to print the result.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `push`.
#[derive(Debug, Clone, Args)]
pub struct PushArgs {
    /// Robots, as ssh takes them: HOST, USER@HOST or ssh://USER@HOST:PORT. Without a user: root.
    #[arg(required = true, value_name = "HOST")]
    pub hosts: Vec<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub target: TargetArgs,
    /// The bundle [default: the one that build-image packed for this product and board].
    #[arg(long, value_name = "FILE", conflicts_with_all = ["product", "board", "component"])]
    pub bundle: Option<Utf8PathBuf>,
    /// Build this component now, and push only that: the robot keeps running.
    #[arg(long, value_enum, conflicts_with = "no_wait")]
    pub component: Option<SeparateComponent>,
    /// With --component: use no network to build it.
    #[arg(long, requires = "component")]
    pub offline: bool,
    /// Only install: do not wait for the restart and the trial.
    #[arg(long)]
    pub no_wait: bool,
    /// Seconds to wait from the end of the install until the trial is decided.
    #[arg(long, value_name = "SECONDS", default_value_t = 900, conflicts_with = "no_wait")]
    pub timeout: u64,
    /// An option of ssh_config(5), such as Port=2222 or IdentityFile=key; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub ssh_option: Vec<String>,
    /// How to print the result.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `lock`.
#[derive(Debug, Clone, Args)]
pub struct LockArgs {
    /// The product: a file in configs/, without .toml [default: the one with `default = true`].
    #[arg(long, short)]
    pub product: Option<String>,
    /// Only the package lock, only the wheel lock, or only that of the agent's compiler.
    #[arg(long, value_parser = ["packages", "wheels", "compiler"])]
    pub only: Option<String>,
}

/// The verbs of `keys`.
#[derive(Debug, Clone, Subcommand)]
pub enum KeysCommand {
    /// Make the first release key, protected by a password.
    New,
    /// List the keys of the key set; secrets are never shown.
    List {
        /// How to print it.
        #[arg(long, value_enum, default_value = "text")]
        format: OutputFormat,
    },
    /// Make the next release key. The previous one stays trusted unless it is revoked.
    Rotate {
        /// Revoke all keys of that kind before the new one.
        #[arg(long)]
        revoke: bool,
        /// Replace the development key instead, which has no password: after a theft, for example.
        #[arg(long)]
        development: bool,
    },
    /// Revoke a release key: robots that know of the revocation reject what only this key has
    /// signed.
    Revoke {
        /// The key's id, as `list` shows it.
        id: String,
    },
}

/// Options of `doctor`.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Also check what the engine buildroot needs.
    #[arg(long)]
    pub buildroot: bool,
    /// Install everything that is missing.
    #[arg(long)]
    pub install: bool,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `test`.
#[derive(Debug, Clone, Args)]
pub struct TestArgs {
    /// Also run the slow tests: the Pi 3 in QEMU, the slow compression level, a browser.
    #[arg(long)]
    pub all: bool,
    /// Only run the quick tests: build no image, boot nothing.
    #[arg(long, conflicts_with = "all")]
    pub quick: bool,
    /// Never install missing tools; list them and fail.
    #[arg(long)]
    pub no_install: bool,
}

/// Options of `bench`.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// A filesystem image to measure with [default: the last root filesystem that was built].
    #[arg(long)]
    pub payload: Option<Utf8PathBuf>,
    /// Which benchmark; `cold`, which needs an hour, root and a clone of the commit, only runs when
    /// it is named.
    #[arg(long, value_parser = ["disk", "bundle", "flash", "install", "cold"])]
    pub only: Option<String>,
    /// Also measure the slow compression level, which takes minutes.
    #[arg(long)]
    pub slow: bool,
}

/// Options of `clean`.
#[derive(Debug, Clone, Args)]
pub struct CleanArgs {
    /// Also remove the cached stages: the next build takes minutes longer.
    #[arg(long)]
    pub stages: bool,
    /// Also remove the downloads: the next build downloads them again.
    #[arg(long)]
    pub downloads: bool,
    /// Only show what would be removed.
    #[arg(long)]
    pub dry_run: bool,
}
