//! What this workspace says about channels and products, so that no store says it of itself: which kind of
//! key signs a channel, and of which kind a product is.

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
}

/// The one key of a product's file that counts here; the others are checked by whoever builds it.
#[derive(Debug, Deserialize)]
struct Product {
    kind: Kind,
}

impl Pins {
    /// What the workspace says; outside of one, what holds without a word ([`Pins::channel`]).
    ///
    /// # Errors
    /// When a file cannot be read: then its pin is not known.
    pub fn read(root: Option<&Utf8Path>) -> Result<Self> {
        let Some(root) = root else { return Ok(Self::default()) };
        let path = root.join(FILE);
        let channels = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let file: File =
                    toml::from_str(&text).with_context(|| format!("reading {path}"))?;
                file.channels
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| format!("reading {path}")),
        };
        ensure!(
            channels.get(&Channel::Stable) != Some(&Kind::Development),
            "{path}: `stable` is for everybody, so release keys sign it\n\
             help: remove the line, or use beta"
        );
        let mut products = BTreeMap::new();
        for name in config::products(root)? {
            let path = root.join("configs").join(format!("{name}.toml"));
            let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            let product: Product = toml::from_str(&text)
                .with_context(|| format!("reading the kind of the product in {path}"))?;
            products.insert(name, product.kind);
        }
        Ok(Self { channels, products })
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

    /// The kind of key that signs a channel. Without a word in [`FILE`]: `stable` by release keys, the
    /// others by development keys.
    pub fn channel(&self, channel: Channel) -> Kind {
        self.channels.get(&channel).copied().unwrap_or(match channel {
            Channel::Nightly | Channel::Beta => Kind::Development,
            Channel::Stable => Kind::Release,
        })
    }

    /// Whether a product of this kind may be in this channel.
    ///
    /// # Errors
    /// When the workspace says that the product is of another kind, or that the channel takes none of it.
    pub fn fits(&self, channel: Channel, product: &str, kind: Kind) -> Result<()> {
        if let Some(pinned) = self.products.get(product) {
            ensure!(
                *pinned == kind,
                "{product} is called a {kind} product, and configs/{product}.toml says {pinned}\n\
                 help: whoever wrote this had another configuration, or means to deceive"
            );
        }
        ensure!(
            kind == Kind::Development || self.channel(channel) == Kind::Release,
            "{product} is a release product, and development keys sign the channel {channel}\n\
             help: use stable; or, for a channel of which no store has anything yet, `{channel} = \"release\"` below \
             [channels] in {FILE}: a release key signs it then"
        );
        Ok(())
    }

    /// Checks all that a channel offers.
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

    /// Whether a channel may say anything about this product at all, even that there is nothing.
    ///
    /// # Errors
    /// When it is a release product, and development keys sign the channel.
    pub fn may_speak_of(&self, channel: Channel, product: &str) -> Result<()> {
        match self.products.get(product) {
            Some(kind) => self.fits(channel, product, *kind),
            None => Ok(()),
        }
    }
}
