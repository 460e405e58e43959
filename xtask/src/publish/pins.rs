//! The workspace's own information about channels, products and releases, which is not taken from a store:
//! the kind of the keys that sign a channel, the kind of a product, and the platforms of `slipway`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use bundle::{BuildKind, KeySet};
use camino::Utf8Path;
use serde::Deserialize;

use crate::artifact::none_if_missing;
use crate::config;
use crate::store::format::{Channel, ChannelEntry, ChannelIndex};
use crate::store::index;

/// The file with the channels' kinds, in the workspace's root.
pub const FILE: &str = "releases.toml";

/// The pinned kinds.
#[derive(Debug, Clone, Default)]
pub struct PinnedKinds {
    channels: BTreeMap<Channel, BuildKind>,
    products: BTreeMap<String, BuildKind>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    channels: BTreeMap<Channel, BuildKind>,
    #[serde(default)]
    programs: Vec<Platform>,
}

impl File {
    /// The file of a workspace; empty when there is none.
    fn read(root: &Utf8Path) -> Result<Self> {
        let path = root.join(FILE);
        let context = || format!("reading {path}");
        let text = none_if_missing(std::fs::read_to_string(&path)).with_context(context)?;
        text.map_or_else(|| Ok(Self::default()), |text| toml::from_str(&text)).with_context(context)
    }
}

/// A kind of machine that `slipway` is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum Platform {
    /// 64-bit PCs.
    #[serde(rename = "x86-64")]
    X86_64,
    /// 64-bit Arm.
    #[serde(rename = "arm64")]
    Arm64,
}

/// The platforms whose `slipway` each release of this workspace has, sorted; by default none.
///
/// # Errors
/// When the file cannot be read.
pub fn programs(root: &Utf8Path) -> Result<Vec<Platform>> {
    let mut platforms = File::read(root)?.programs;
    platforms.sort();
    platforms.dedup();
    Ok(platforms)
}

/// The only key of a product's file that is used here; the build checks the others.
#[derive(Debug, Deserialize)]
struct Product {
    kind: BuildKind,
}

impl PinnedKinds {
    /// The pins of the workspace.
    ///
    /// # Errors
    /// When a file cannot be read: then its pin is unknown.
    pub fn read(root: &Utf8Path) -> Result<Self> {
        let Self { channels, mut products } = Self::of_channels(root)?;
        for name in config::list_products(root)? {
            let path = root.join("configs").join(format!("{name}.toml"));
            let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            let product: Product = toml::from_str(&text)
                .with_context(|| format!("reading the kind of the product in {path}"))?;
            products.insert(name, product.kind);
        }
        Ok(Self { channels, products })
    }

    /// The pins of the channels alone, from [`FILE`] in this directory; the defaults ([`PinnedKinds::channel`]) when there is none.
    ///
    /// # Errors
    /// When the file cannot be read: then its pins are unknown.
    pub fn of_channels(dir: &Utf8Path) -> Result<Self> {
        let channels = File::read(dir)?.channels;
        ensure!(
            channels.get(&Channel::Stable) != Some(&BuildKind::Development),
            "{dir}/{FILE}: the channel `stable` is for all robots and must be signed by release keys\n\
             help: remove the line, or use beta"
        );
        Ok(Self { channels, products: BTreeMap::new() })
    }

    /// Opens a channel's file as this workspace pins it: [`ChannelIndex::open`] with the channel's kind, and each product
    /// in it of the kind that is pinned for it.
    ///
    /// # Errors
    /// As [`ChannelIndex::open`]; or a product is of another kind.
    pub fn open(&self, channel: Channel, file: &[u8], keys: &KeySet) -> Result<ChannelIndex> {
        let index = ChannelIndex::open(channel, file, keys, self.channel(channel))?;
        self.check(&index).with_context(|| format!("reading {}", channel.path()))?;
        Ok(index)
    }

    /// The kind of key that signs a channel. Without an entry in [`FILE`]: release keys for
    /// `stable`, development keys for the others.
    pub fn channel(&self, channel: Channel) -> BuildKind {
        self.channels.get(&channel).copied().unwrap_or(match channel {
            Channel::Nightly | Channel::Beta => BuildKind::Development,
            Channel::Stable => BuildKind::Release,
        })
    }

    /// Whether a product of this kind may be in this channel.
    ///
    /// # Errors
    /// When the product has another kind in the workspace, or the channel does not accept its kind.
    pub fn check_product(&self, channel: Channel, product: &str, kind: BuildKind) -> Result<()> {
        if let Some(pinned) = self.products.get(product) {
            ensure!(
                *pinned == kind,
                "{product} is listed as a {kind} product, but configs/{product}.toml has {pinned}\n\
                 help: the entry was written with another configuration, or is an attack"
            );
        }
        ensure!(
            kind == BuildKind::Development || self.channel(channel) == BuildKind::Release,
            "{product} is a release product, but the channel {channel} is signed by development \
             keys\n\
             help: use stable; or, if no store contains this channel yet, write `{channel} = \
             \"release\"` below \
             [channels] in {FILE} to have it signed by release keys"
        );
        Ok(())
    }

    /// Checks all releases of a channel.
    ///
    /// # Errors
    /// As [`PinnedKinds::check_product`].
    pub fn check(&self, index: &ChannelIndex) -> Result<()> {
        let fits = |e: &ChannelEntry| self.check_product(index.channel, &e.product, e.kind);
        index.releases.iter().try_for_each(fits)
    }

    /// Whether a release of this product may be made in this channel.
    ///
    /// # Errors
    /// As [`PinnedKinds::may_speak_of`]; when it is a development product, and the channel is `stable`.
    pub fn check_new_release(&self, channel: Channel, product: &str) -> Result<()> {
        self.may_speak_of(channel, product)?;
        let kind = self.products.get(product);
        kind.map_or(Ok(()), |kind| index::check_channel_accepts(channel, product, *kind))
    }

    /// Whether a channel is authoritative for this product at all, even for the absence of
    /// releases.
    ///
    /// # Errors
    /// When it is a release product, but development keys sign the channel.
    pub fn may_speak_of(&self, channel: Channel, product: &str) -> Result<()> {
        match self.products.get(product) {
            Some(kind) => self.check_product(channel, product, *kind),
            None => Ok(()),
        }
    }
}
