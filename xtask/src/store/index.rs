//! Changes of a channel's index: releases are added, marked and retired, never silently replaced.
//! Pure.

use anyhow::{Result, ensure};
use bundle::{BuildKind, Version};

use super::format::{Channel, ChannelEntry, ChannelIndex, RetiredRelease, YankNotice};

/// How many releases of each product the nightly channel keeps: two weeks.
pub const NIGHTLIES: usize = 14;
/// How many the beta channel keeps.
pub const BETAS: usize = 10;

/// How long a retired release's objects are kept, in seconds: longer than any publish takes.
pub const GRACE: u64 = 24 * 3600;

/// Which releases to keep.
#[derive(Debug, Clone, Copy, Default)]
pub struct Retention {
    /// How many of each product, instead of the channel's own number. `stable` keeps all.
    pub keep: Option<usize>,
}

impl Retention {
    fn for_channel(self, channel: Channel) -> usize {
        match channel {
            Channel::Nightly => self.keep.unwrap_or(NIGHTLIES),
            Channel::Beta => self.keep.unwrap_or(BETAS),
            Channel::Stable => usize::MAX,
        }
    }
}

/// Whether a channel accepts products of this kind at all.
///
/// # Errors
/// When a development product would become stable.
pub fn check_channel_accepts(channel: Channel, product: &str, kind: BuildKind) -> Result<()> {
    ensure!(
        channel != Channel::Stable || kind == BuildKind::Release,
        "{product} is a development product, but the channel stable is for all robots\n\
         help: use beta, or `kind = \"release\"` in configs/{product}.toml"
    );
    Ok(())
}

impl ChannelIndex {
    /// Adds a release, which must be newer than all others of its product in this channel.
    ///
    /// # Errors
    /// When the version does not increase, or a development product would become stable.
    pub fn add(&mut self, entry: ChannelEntry) -> Result<()> {
        check_channel_accepts(self.channel, &entry.product, entry.kind)?;
        let newest = self.releases_of(&entry.product).next_back();
        if let Some(newest) = newest {
            ensure!(
                entry.version > newest.version,
                "{} {} is not newer than {} in the channel {}\n\
                 help: versions must increase; raise `version` in configs/{}.toml",
                entry.product,
                entry.version,
                newest.version,
                self.channel,
                entry.product
            );
        }
        self.insert(entry);
        Ok(())
    }

    /// Adopts the releases and the marks on them from another copy of this channel.
    ///
    /// # Errors
    /// When both contain a version with different content.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        for theirs in &other.releases {
            let ours = self
                .releases
                .iter_mut()
                .find(|ours| ours.product == theirs.product && ours.version == theirs.version);
            match ours {
                None => self.insert(theirs.clone()),
                Some(ours) => {
                    ensure!(
                        ours.manifest == theirs.manifest,
                        "{} {} was published before with other content ({}, not {})\n\
                         help: build it again under a higher version",
                        ours.product,
                        ours.version,
                        ours.manifest.path,
                        theirs.manifest.path
                    );
                    // A mark is never removed, and the first one is kept.
                    if ours.yanked.is_none() {
                        ours.yanked.clone_from(&theirs.yanked);
                    }
                }
            }
        }
        Ok(())
    }

    /// Marks a release.
    ///
    /// # Errors
    /// When there is none.
    pub fn yank(&mut self, product: &str, version: &Version, mark: &YankNotice) -> Result<()> {
        let channel = self.channel;
        let entry = self
            .releases
            .iter_mut()
            .find(|entry| entry.product == product && entry.version == *version);
        let Some(entry) = entry else {
            anyhow::bail!("the channel {channel} does not contain {product} {version}")
        };
        entry.yanked.get_or_insert_with(|| mark.clone());
        Ok(())
    }

    /// Retires all but the newest releases of each product, and removes entries that were retired
    /// long ago.
    pub fn retain(&mut self, retention: Retention, now: u64) {
        let keep = retention.for_channel(self.channel);
        let mut products: Vec<String> = self.releases.iter().map(|e| e.product.clone()).collect();
        products.dedup();
        for product in products {
            let surplus = self.releases_of(&product).count().saturating_sub(keep.max(1));
            for _ in 0..surplus {
                let Some(at) = self.releases.iter().position(|e| e.product == product) else {
                    break;
                };
                let ChannelEntry { product, version, manifest, .. } = self.releases.remove(at);
                self.retired.push(RetiredRelease { product, version, manifest, at: now });
            }
        }
        self.retired.retain(|retired| retired.at.saturating_add(GRACE) > now);
    }

    fn insert(&mut self, entry: ChannelEntry) {
        let key = |e: &ChannelEntry| (e.product.clone(), e.version.clone());
        let at = self.releases.partition_point(|e| key(e) < key(&entry));
        self.releases.insert(at, entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::format::StoreFile;

    fn entry(product: &str, version: &str) -> ChannelEntry {
        let version = Version::parse(version).expect("a version");
        let manifest = StoreFile::manifest(product, &version, version.as_str().as_bytes());
        let kind = BuildKind::Development;
        let product = product.to_owned();
        ChannelEntry { product, version, kind, commit: None, added: 0, manifest, yanked: None }
    }

    fn versions(index: &ChannelIndex) -> Vec<String> {
        index.releases.iter().map(|e| format!("{} {}", e.product, e.version)).collect()
    }

    #[test]
    fn versions_only_grow() {
        let mut index = ChannelIndex::empty(Channel::Beta);
        index.add(entry("a", "1.0.0")).expect("the first");
        index.add(entry("a", "1.0.1-nightly.9")).expect("a newer one");
        index.add(entry("b", "0.1.0")).expect("another product's");
        let message = index.add(entry("a", "1.0.0")).expect_err("an old one").to_string();
        assert!(message.contains("not newer than 1.0.1-nightly.9"), "{message}");
        assert_eq!(versions(&index), ["a 1.0.0", "a 1.0.1-nightly.9", "b 0.1.0"]);
        let mut stable = ChannelIndex::empty(Channel::Stable);
        let message = stable.add(entry("a", "1.0.0")).expect_err("not for all").to_string();
        assert!(message.contains("a development product"), "{message}");
    }

    #[test]
    fn merging_loses_nothing_and_keeps_marks() {
        let (mut one, mut two) =
            (ChannelIndex::empty(Channel::Beta), ChannelIndex::empty(Channel::Beta));
        one.add(entry("a", "2.0.0")).expect("added");
        two.add(entry("a", "1.0.0")).expect("added");
        two.add(entry("a", "2.0.0")).expect("added");
        let mark = YankNotice { reason: "burns".to_owned(), at: 7 };
        two.yank("a", &Version::parse("2.0.0").expect("a version"), &mark).expect("marked");
        one.merge(&two).expect("merged");
        assert_eq!(versions(&one), ["a 1.0.0", "a 2.0.0"]);
        assert_eq!(one.releases[1].yanked.as_ref(), Some(&mark));
        let mut forged = ChannelIndex::empty(Channel::Beta);
        let mut other = entry("a", "1.0.0");
        other.manifest = StoreFile::manifest("a", &other.version, b"something else");
        forged.add(other).expect("added");
        let message = one.merge(&forged).expect_err("two contents").to_string();
        assert!(message.contains("published before with other content"), "{message}");
    }

    #[test]
    fn retention_retires_the_oldest_of_each_product_and_waits_before_it_forgets() {
        let mut index = ChannelIndex::empty(Channel::Nightly);
        for n in 1..=4 {
            index.add(entry("a", &format!("1.0.{n}"))).expect("added");
        }
        index.add(entry("b", "0.1.0")).expect("added");
        index.retain(Retention { keep: Some(2) }, 100);
        assert_eq!(versions(&index), ["a 1.0.3", "a 1.0.4", "b 0.1.0"]);
        assert_eq!(index.retired.len(), 2);
        index.retain(Retention { keep: Some(2) }, 100 + GRACE - 1);
        assert_eq!(index.retired.len(), 2);
        index.retain(Retention { keep: Some(2) }, 100 + GRACE);
        assert!(index.retired.is_empty());
        let mut stable = ChannelIndex { channel: Channel::Stable, ..index };
        stable.retain(Retention { keep: Some(1) }, 0);
        assert_eq!(stable.releases.len(), 3, "stable keeps all");
    }
}
