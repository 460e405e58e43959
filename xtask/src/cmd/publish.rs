//! `publish`: copies releases into another store.

use anyhow::Result;

use crate::cli::{OutputFormat, PublishArgs};
use crate::config::workspace_root;
use crate::progress::format_bytes;
use crate::publish::{self, SigningAuthority};
use crate::release::create::local_store;
use crate::store::directory::DirectoryStore;
use crate::store::format::Channel;
use crate::store::index::Retention;
use crate::store::{self, ReleaseStore, StoreOptions};
use crate::tools::{self, ToolPurpose};
use crate::{outln, text};

/// `cargo xtask publish`.
///
/// # Errors
/// When the target cannot be written, or has one of these releases with other content.
pub fn publish(options: &PublishArgs) -> Result<()> {
    let from = match &options.from {
        Some(dir) => DirectoryStore::new(dir),
        None => local_store(&workspace_root()?),
    };
    if options.target.starts_with("ssh://") {
        tools::require_tools(&[ToolPurpose::Push], true)?;
    }
    let to = store::open_store(&options.target, &store_options(&options.access))?;
    let mut authority = SigningAuthority::open(options.access.store_was_restored)?;
    let mut channels = options.channel.clone();
    channels.sort();
    channels.dedup();
    if channels.is_empty() {
        for channel in Channel::ALL {
            if from.index(channel)?.0.is_some() {
                channels.push(channel);
            }
        }
        anyhow::ensure!(
            !channels.is_empty(),
            "there is nothing to publish in {}\nhelp: cargo xtask release create --channel nightly",
            from.root()
        );
    }
    let mut done = Vec::new();
    for channel in channels {
        let retention = Retention { keep: options.keep };
        done.push(publish::publish_channel(
            &from,
            to.as_ref(),
            channel,
            &mut authority,
            retention,
        )?);
    }
    match options.format {
        OutputFormat::Json => outln!("{}", text::to_json(&done)?),
        OutputFormat::Text => {
            for one in &done {
                let what = if one.releases.is_empty() {
                    (if one.changed { "metadata only" } else { "nothing new" }).to_owned()
                } else {
                    one.releases.join(", ")
                };
                outln!(
                    " {:<8} {what}; {} sent in {} objects, {} were there already",
                    one.channel,
                    format_bytes(one.bytes),
                    one.sent,
                    one.kept
                );
            }
        }
    }
    Ok(())
}

/// How a store is reached, as it was typed.
pub fn store_options(access: &crate::cli::StoreAccessArgs) -> StoreOptions {
    StoreOptions {
        endpoint: access.endpoint.clone(),
        region: access.region.clone(),
        ssh: access.ssh_option.clone(),
        ..StoreOptions::default()
    }
}
