//! `device.toml`: what a system is and where things are on its card, the same bytes in either slot. The overlay's
//! template `device.toml.j2` writes it; the build refuses what [`Description::parse`] does not take.

use std::collections::BTreeMap;

use bundle::{Kind, Version};
use serde::{Deserialize, Serialize};

/// Where it is in the root file system.
pub const PATH: &str = "usr/lib/slipway/device.toml";

/// Bytes of a sector, the unit of `device.toml` and of sysfs, whatever the disk's own sector is.
pub const SECTOR: u64 = 512;

/// Who chooses the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flow {
    /// U-Boot's script, from the boot state in raw sectors.
    Uboot,
    /// The Raspberry Pi's firmware, from `autoboot.txt`.
    Tryboot,
}

/// A partition, as the image's builder laid it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Partition {
    /// Its number in the table, from 1.
    pub number: u32,
    /// Its first sector.
    pub start_sector: u64,
    /// Its length in sectors; `data` has grown since.
    pub sectors: u64,
}

/// Where the boot state is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct BootStateSectors {
    /// First sector of each copy; none where the boot flow keeps its state elsewhere.
    #[serde(default)]
    pub sectors: Vec<u64>,
}

/// Where what must not be forgotten is kept besides `data`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct TrustSectors {
    /// First sector of each of the two copies, each of [`bundle::area::COPY`] bytes; none in an image that knows
    /// of no such place.
    #[serde(default)]
    pub sectors: Vec<u64>,
}

/// Where things are on cards that were flashed with an earlier image: a card keeps its table for life.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct EarlierCard {
    /// Where the boot state is.
    #[serde(default)]
    pub boot_state: BootStateSectors,
    /// Where the floor and the keys are kept besides `data`.
    #[serde(default)]
    pub trust: TrustSectors,
    /// By role, as in [`Description`].
    pub partitions: BTreeMap<String, Partition>,
}

/// `device.toml`. Unknown keys are skipped: a later image may say more. A known key of another type is an error, and so
/// is a missing one that has no default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Description {
    /// The product.
    pub product: String,
    /// The version of the running system.
    pub version: Version,
    /// The lowest version that may follow this one.
    #[serde(default)]
    pub minimum_version: Option<Version>,
    /// The lowest key epoch that counts; 0: any.
    #[serde(default)]
    pub key_epoch: u32,
    /// A development image accepts development keys and bundles; a release image never does.
    pub kind: Kind,
    /// The board.
    pub board: String,
    /// The boot flow.
    pub boot_flow: Flow,
    /// One of these must be among the running machine's device-tree compatibles.
    pub compatible: Vec<String>,
    /// The oldest EEPROM release that can try a slot, as a day; only with the flow `tryboot`.
    #[serde(default)]
    pub eeprom_since: Option<String>,
    /// Where the boot state is.
    #[serde(default)]
    pub boot_state: BootStateSectors,
    /// Where the floor and the keys are kept besides `data`.
    #[serde(default)]
    pub trust: TrustSectors,
    /// By role: `boot`, `root-a`, `root-b`, `data`, …
    pub partitions: BTreeMap<String, Partition>,
    /// The other cards that this image runs on. Of the running device, `boot_state`, `trust` and `partitions` are its
    /// own card's, whichever that is.
    #[serde(default)]
    pub earlier_cards: Vec<EarlierCard>,
}

impl Description {
    /// Reads the text of `device.toml`.
    ///
    /// # Errors
    /// What is wrong and where, without the file's name.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }
}

/// The places in raw sectors alone, as `inspect` reads them: of an image of any age, which need not be complete
/// otherwise. Everything else is skipped, whatever it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RawPlaces {
    /// Where the boot state is; empty in an image that does not say so.
    #[serde(default)]
    pub boot_state: BootStateSectors,
    /// Where the floor and the keys are kept besides `data`; empty in an image that does not say so.
    #[serde(default)]
    pub trust: TrustSectors,
}

impl RawPlaces {
    /// Reads the text of `device.toml`.
    ///
    /// # Errors
    /// What is wrong and where, without the file's name.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }
}
