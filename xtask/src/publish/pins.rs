//! The workspace's own information about channels, products and releases, which is not taken from a store:
//! the kind of the keys that sign a channel, the kind of a product, and the platforms of `slipway`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use bundle::{KeySet, Kind};
use camino::Utf8Path;
use serde::Deserialize;

use crate::config;
use crate::store::format::{Channel, Entry, Index};
use crate::store::index;

/// The file with the channels' kinds, in the workspace's root.
pub const FILE: &str = "releases.toml";

/// The pinned kinds.
#[derive(Debug, Clone, Default)]
pub struct Pins {
    channels: BTreeMap<Channel, Kind>,
    products: BTreeMap<String, Kind>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    channels: BTreeMap<Channel, Kind>,
    #[serde(default)]
    programs: Vec<Platform>,
}

impl File {
    /// The file of a workspace; empty when there is none.
    fn read(root: &Utf8Path) -> Result<Self> {
        let path = root.join(FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).with_context(|| format!("reading {path}")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("reading {path}")),
        }
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
    kind: Kind,
}

impl Pins {
    /// The pins of the workspace.
    ///
    /// # Errors
    /// When a file cannot be read: then its pin is unknown.
    pub fn read(root: &Utf8Path) -> Result<Self> {
        let Self { channels, mut products } = Self::of_channels(root)?;
        for name in config::products(root)? {
            let path = root.join("configs").join(format!("{name}.toml"));
            let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            let product: Product = toml::from_str(&text)
                .with_context(|| format!("reading the kind of the product in {path}"))?;
            products.insert(name, product.kind);
        }
        Ok(Self { channels, products })
    }

    /// The pins of the channels alone, from [`FILE`] in this directory; the defaults ([`Pins::channel`]) when there is none.
    ///
    /// # Errors
    /// When the file cannot be read: then its pins are unknown.
    pub fn of_channels(dir: &Utf8Path) -> Result<Self> {
        let channels = File::read(dir)?.channels;
        ensure!(
            channels.get(&Channel::Stable) != Some(&Kind::Development),
            "{dir}/{FILE}: the channel `stable` is for all robots and must be signed by release keys\n\
             help: remove the line, or use beta"
        );
        Ok(Self { channels, products: BTreeMap::new() })
    }

    /// Opens a channel's file as this workspace pins it: [`Index::open`] with the channel's kind, and each product
    /// in it of the kind that is pinned for it.
    ///
    /// # Errors
    /// As [`Index::open`]; or a product is of another kind.
    pub fn open(&self, channel: Channel, file: &[u8], keys: &KeySet) -> Result<Index> {
        let index = Index::open(channel, file, keys, self.channel(channel))?;
        self.check(&index).with_context(|| format!("reading {}", channel.path()))?;
        Ok(index)
    }

    /// The kind of key that signs a channel. Without an entry in [`FILE`]: release keys for
    /// `stable`, development keys for the others.
    pub fn channel(&self, channel: Channel) -> Kind {
        self.channels.get(&channel).copied().unwrap_or(match channel {
            Channel::Nightly | Channel::Beta => Kind::Development,
            Channel::Stable => Kind::Release,
        })
    }

    /// Whether a product of this kind may be in this channel.
    ///
    /// # Errors
    /// When the product has another kind in the workspace, or the channel does not accept its kind.
    pub fn fits(&self, channel: Channel, product: &str, kind: Kind) -> Result<()> {
        if let Some(pinned) = self.products.get(product) {
            ensure!(
                *pinned == kind,
                "{product} is listed as a {kind} product, but configs/{product}.toml has {pinned}\n\
                 help: the entry was written with another configuration, or is an attack"
            );
        }
        ensure!(
            kind == Kind::Development || self.channel(channel) == Kind::Release,
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
    /// As [`Pins::fits`].
    pub fn check(&self, index: &Index) -> Result<()> {
        let fits = |e: &Entry| self.fits(index.channel, &e.product, e.kind);
        index.releases.iter().try_for_each(fits)
    }

    /// Whether a release of this product may be made in this channel.
    ///
    /// # Errors
    /// As [`Pins::may_speak_of`]; when it is a development product, and the channel is `stable`.
    pub fn takes(&self, channel: Channel, product: &str) -> Result<()> {
        self.may_speak_of(channel, product)?;
        let kind = self.products.get(product);
        kind.map_or(Ok(()), |kind| index::takes(channel, product, *kind))
    }

    /// Whether a channel is authoritative for this product at all, even for the absence of
    /// releases.
    ///
    /// # Errors
    /// When it is a release product, but development keys sign the channel.
    pub fn may_speak_of(&self, channel: Channel, product: &str) -> Result<()> {
        match self.products.get(product) {
            Some(kind) => self.fits(channel, product, *kind),
            None => Ok(()),
        }
    }
}
