//! The arguments of `release` and `publish`.

use camino::Utf8PathBuf;
use clap::{Args, Subcommand};

use super::OutputFormat;
use crate::build::BundleCompression;
use crate::store::format::Channel;

/// Which store.
#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    /// The store: a directory, ssh://[USER@]HOST[:PORT]/PATH, s3://BUCKET[/PREFIX], or
    /// https://HOST[/PATH] to read [default: dist/releases].
    #[arg(long, value_name = "STORE")]
    pub store: Option<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub access: StoreAccessArgs,
}

/// How a store is reached.
#[derive(Debug, Clone, Args)]
pub struct StoreAccessArgs {
    /// The S3 service [default: $AWS_ENDPOINT_URL, else Amazon's].
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// The S3 region [default: $AWS_REGION, else us-east-1].
    #[arg(long)]
    pub region: Option<String>,
    /// An option of ssh_config(5), such as IdentityFile=key; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub ssh_option: Vec<String>,
    /// Accept an index that is older than the newest that this machine has seen, and remember it as
    /// the newest. Use it only after the store was restored from a backup on purpose.
    #[arg(long)]
    pub store_was_restored: bool,
}

/// The verbs of `release`.
#[derive(Debug, Clone, Subcommand)]
pub enum ReleaseCommand {
    /// Make a signed release from the build results, in dist/releases. Verifies every file first.
    Create(ReleaseCreateArgs),
    /// List the releases of the channels.
    List {
        /// Only this channel.
        #[arg(long, value_enum)]
        channel: Option<Channel>,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        store: StoreArgs,
        /// How to print it.
        #[arg(long, value_enum, default_value = "text")]
        format: OutputFormat,
    },
    /// Show a release: its files, components and notes.
    Show {
        /// The version; or `latest`: the newest in the channel that was not yanked.
        version: String,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        which: ReleaseArgs,
        /// Print only the notes, as Markdown.
        #[arg(long)]
        notes: bool,
        /// How to print it.
        #[arg(long, value_enum, default_value = "text")]
        format: OutputFormat,
    },
    /// Fetch files of a release from a store and verify them.
    Get {
        /// The version; or `latest`: the newest in the channel that was not yanked.
        version: String,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        which: ReleaseArgs,
        /// The board [default: the only one of the release].
        #[arg(long, short)]
        board: Option<String>,
        /// Only the files of this role; may be repeated [default: image and bundle]. An image comes
        /// with its block map.
        #[arg(long, value_parser = ["image", "bundle", "sbom", "notes", "program"])]
        role: Vec<String>,
        /// The target directory, which is created if it does not exist.
        #[arg(long, value_name = "DIR", default_value = ".")]
        into: Utf8PathBuf,
        /// How to print it.
        #[arg(long, value_enum, default_value = "text")]
        format: OutputFormat,
    },
    /// Show what changed between two releases, the older first.
    Diff {
        /// The older version.
        old: String,
        /// The newer version.
        new: String,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        which: ReleaseArgs,
        /// Also compare every file: fetches and unpacks both images.
        #[arg(long)]
        files: bool,
        /// How to print it.
        #[arg(long, value_enum, default_value = "text")]
        format: OutputFormat,
    },
    /// Add a release of one channel to another one.
    Promote {
        /// The version.
        version: String,
        /// The target channel.
        #[arg(long, value_enum)]
        to: Channel,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        which: ReleaseArgs,
    },
    /// Mark a release as not to be used, in every channel that has it. The release is not removed.
    Yank {
        /// The version.
        version: String,
        /// The reason, as readable text.
        #[arg(long)]
        reason: String,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
        which: ReleaseArgs,
    },
    /// Build the same commit again in another directory, and compare every byte with the build
    /// results.
    ///
    /// Shows differences down to the file inside the filesystem. Uses an empty stage cache and the
    /// existing downloads. If a release in dist/releases was made of these results, its programs
    /// are verified and compared, too.
    Check(ReleaseCheckArgs),
    /// Remove files from a directory store one day after the last release stopped referring to
    /// them.
    Gc {
        /// The directory [default: dist/releases].
        #[arg(long, value_name = "DIR")]
        store: Option<Utf8PathBuf>,
        /// Only show what would be removed.
        #[arg(long)]
        dry_run: bool,
        /// Accept an index that is older than the newest that this machine has seen, or that it has
        /// never seen. Use it only after the store was restored from a backup on purpose.
        #[arg(long)]
        store_was_restored: bool,
        /// How to print it.
        #[arg(long, value_enum, default_value = "text")]
        format: OutputFormat,
    },
    /// Summarise all builds in dist as Markdown: sizes, times, failures with stage and log,
    /// changes.
    Summary,
}

/// Which release.
#[derive(Debug, Clone, Args)]
pub struct ReleaseArgs {
    /// The product [default: the one with `default = true`].
    #[arg(long, short)]
    pub product: Option<String>,
    /// The channel [default: any that has the version; for `latest`: nightly].
    #[arg(long, value_enum)]
    pub channel: Option<Channel>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub store: StoreArgs,
}

/// Options of `release create`.
#[derive(Debug, Clone, Args)]
pub struct ReleaseCreateArgs {
    /// The channel.
    #[arg(long, value_enum)]
    pub channel: Channel,
    /// The product [default: the one with `default = true`].
    #[arg(long, short)]
    pub product: Option<String>,
    /// Only this board; may be repeated [default: all of the product's].
    #[arg(long, short)]
    pub board: Vec<String>,
    /// How many releases of each product to keep [default: 14 nightlies, 10 betas]; `stable` keeps
    /// all.
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
    /// For a development product: also accept results that were built from uncommitted changes.
    #[arg(long)]
    pub allow_changes: bool,
    /// Accept an index in dist/releases that is older than the newest that this machine has seen.
    /// Use it only after the directory was restored from a backup on purpose.
    #[arg(long)]
    pub store_was_restored: bool,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `release check`.
#[derive(Debug, Clone, Args)]
pub struct ReleaseCheckArgs {
    /// The product [default: the one with `default = true`].
    #[arg(long, short)]
    pub product: Option<String>,
    /// The board [default: the product's default-board].
    #[arg(long, short)]
    pub board: Option<String>,
    /// Build nothing: compare with the results in this directory, another dist/<product>/<board>.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["keep_stage", "compression"])]
    pub against: Option<Utf8PathBuf>,
    /// Do not rebuild this stage; may be repeated. Faster, but checks less.
    #[arg(long, value_parser = ["root", "base", "api", "agent"])]
    pub keep_stage: Vec<String>,
    /// Compression level of the bundle.
    #[arg(long, value_enum, default_value = "fast")]
    pub compression: BundleCompression,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}

/// Options of `publish`.
#[derive(Debug, Clone, Args)]
pub struct PublishArgs {
    /// The target: a directory, ssh://[USER@]HOST[:PORT]/PATH, or s3://BUCKET[/PREFIX].
    pub target: String,
    /// Only this channel; may be repeated [default: all].
    #[arg(long, value_enum)]
    pub channel: Vec<Channel>,
    /// The source: a directory store [default: dist/releases].
    #[arg(long, value_name = "DIR")]
    pub from: Option<Utf8PathBuf>,
    /// How many releases of each product to keep in the target [default: 14 nightlies, 10 betas].
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened; clap would repeat the text in the help")]
    pub access: StoreAccessArgs,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    pub format: OutputFormat,
}
